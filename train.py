"""MGRPO from a base model to the paper's table: sample layer 1, sample layer 2, score, advantages,
loss, step, log.

    python train.py                          # no GPU, no download: a base model, then MGRPO, then
                                             the table; minutes on 2 cores
    python train.py --layers 1 --attempts 16 # plain GRPO with as many rollouts per question
    python train.py --preset smoke           # the same in about a minute, on a toy size
    python train.py --init path/to/Qwen2.5-Math-1.5B --data gsm8k/train.jsonl --eval-data
    gsm8k/test.jsonl
    python train.py --resume                 # goes on with the newest run, exactly where it was
                                             (checkpoints.py)
    torchrun --nproc_per_node=8 train.py     # eight GPUs (parallel.py)

The idea. One step draws P questions and grows a tree on each: G attempts, and H corrections of
every attempt. Both layers are scored by a rule and trained by one loss (mgrpo.py); nothing else
makes it "multi-layer". A run ends after `--tokens` generated tokens, not after steps, so that runs
of different shape compare at equal cost. With several processes each has a share of the questions;
counts are summed over all before they divide anything.

A run leaves in out/<run>/: report.html (open it: table, curves, trees), config.json, metrics.jsonl
(a line per step, every field by name), rollouts.jsonl and samples.md (trees, token by token and as
text), result.json (the table), state/ (to go on from, 12 bytes a parameter each), and checkpoint.pt
or, from --init, model/ in Hugging Face's format (eval.py reads both). README explains every column
of the log.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C while torch is imported is one sentence too

# isort: split
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_type_hints

import torch

import heldout
from engine.kernels import fold
from engine.packing import batch_of, by_layer, leaf, logprobs, row_packs, tree_packs
from eval import make_sampler
from huggingface.weights import save_pretrained
from mgrpo import (
    Sampling,
    collect,
    completion_logprobs,
    loss_denominator,
    pad_rows,
    policy_loss,
    targets,
)
from model import narrow_copy, save_checkpoint, weights_checksum
from report import page
from runtime import bars, distributed, memory, transcripts
from runtime.checkpoints import (
    FREE,
    Progress,
    Stop,
    alone_in,
    go_on,
    resumed_run,
    resumed_settings,
    resumed_state,
    save_state,
    saved,
)
from runtime.flags import BadInput, Maybe, check_fields, kinds, parse_flags, ran_out
from runtime.log import (
    log,
    note_resume,
    open_board,
    post_mortem,
    rollout_metrics,
    run_folder,
    say,
    write_json,
    write_samples,
)
from tasks import base as pretrain
from tasks.base import pick_preset
from tasks.catalog import draw
from tasks.opening import later, method, plan, prepare, row_tokens, wanted_tokens


@dataclass(frozen=True)
class Config(pretrain.Config):
    # folder of a model in Hugging Face's format to start from; empty: a base of the built-in task
    init: str = ""
    data: str = ""  # files of problems for it (data.py), separated by commas
    # files to evaluate on; empty: every eighth problem of --data, which is then not trained on
    eval_data: str = ""
    # of prompts (prompts.py); auto: the model's own
    template: Literal["auto", "paper", "words", "chatml", "llama3", "plain"] = "auto"
    prompt_tokens: int = 512  # questions whose prompt is longer are left out
    # who says what is right: reward.py, or that library
    verifier: Literal["rules", "math-verify"] = "rules"
    # go on with the newest run (of --name), or with the run's folder or state's file that is named
    resume: Maybe = ""
    save_every: int = 0  # steps between two saved states; 0: ten a run
    keep: int = 2  # states that are kept, besides the best
    # folder under out/; empty: named after task, method and seed, with a number if that exists
    name: str = ""
    # of RL: questions, sampling, phrases; the base has its own, so that seeds share a base
    seed: int = 0
    tokens: int = 1_260_000  # generated tokens, both layers together, after which the run ends
    prompts: int = 32  # P, questions per step, of all processes together
    attempts: int = 4  # G, layer-1 answers per question
    corrections: int = 3  # H, layer-2 answers per attempt
    layers: int = 2  # 2: MGRPO; 1: GRPO
    # attempts that get a second look; balanced: one right, one wrong
    sources: Literal["all", "wrong", "balanced"] = "all"
    # failed corrections: dropped after normalising | kept | raw reward
    failed: Literal["mask", "keep", "raw"] = "mask"
    # siblings in layer 2: corrections of one attempt | of one question
    group: Literal["attempt", "question"] = "attempt"
    # times a step that questions whose tree teaches nothing (equal rewards in every group) give way
    # to new ones
    resample: int = 0
    layer2_weight: float = 1.0  # w in J = J_1 + w J_2
    # one step on both layers | one on each (Adam then undoes the weight)
    update: Literal["joint", "alternating"] = "joint"
    # AdamW's learning rate at the start; it falls to 0 in a straight line over --tokens. No weight
    # decay
    lr: float = 1e-4
    clip_low: float = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2  # 0.28 is DAPO's "clip higher"
    kl_coef: float = 0.0  # β, weight of KL(policy || base); the paper: 0.001
    # KL estimator; k1 has no gradient on average (mgrpo.kl_estimate)
    kl: Literal["k1", "k2", "k3"] = "k3"
    # mean over a row's tokens (paper) | all tokens | fixed length
    normalize: Literal["sequence", "token", "constant"] = "sequence"
    epochs: int = 1  # passes over each rollout
    minibatches: int = 2  # optimiser steps per pass, each on its share of the questions
    # that go through the model together: fewer take less memory, for the same gradient
    tokens_per_microbatch: int = 16_384
    # every token of a rollout once (packing.py) | rows, padded, each with its whole past
    pack: Literal["tree", "rows"] = "tree"
    # the blocks' elementwise parts through torch.compile; the first steps then take a minute longer
    compile: bool = False
    # activation checkpointing: less memory, more time; auto: with --init
    recompute: Literal["auto", "yes", "no"] = "auto"
    # per completion; 0: half as much again as a right answer can need; of a real model what fits,
    # at most 1,024
    max_new_tokens: int = 0
    # tokens whose keys and values the sampler may hold; 0: no limit on a CPU, half of the free
    # memory on CUDA
    cache_tokens: int = 0
    temperature: float = 1.0  # of sampling, and of the log-probabilities that are trained
    # reward for <think>..</think><answer>..</answer>, at most 0.5 so that it never beats being
    # right
    format_weight: float = 0.0
    eval_questions: int = 1024  # held-out questions of the tables before and after
    look_questions: int = 256  # of them, greedily, in the looks in between; 0: no looks
    eval_every: int = 0  # steps between two looks; 0: one each tenth of the run
    # the first so many questions of a step have their trees kept, token by token (rollouts.jsonl);
    # 0: none
    transcripts: int = 2
    # also write the numbers of metrics.jsonl to out/<run>/tensorboard, where that package is
    # installed
    tensorboard: bool = False
    # no bars, and no line a step: what is measured and what goes wrong is said all the same
    quiet: bool = False


PRESETS = {
    "cpu": pretrain.PRESETS["cpu"],
    "gpu": pretrain.PRESETS["gpu"]
    | dict(
        prompts=128,
        attempts=8,
        corrections=4,
        tokens=100_000_000,
        tokens_per_microbatch=65_536,
        lr=3e-5,
        # more of everything a GPU does in parallel
        eval_questions=4096,
    ),
    "smoke": pretrain.PRESETS["smoke"] | dict(tokens=200_000, prompts=16, eval_questions=256),
}


# Of a model from --init: what the paper used, as far as public re-implementations know (H, the
# tokens and what is kept are ours).
REAL = dict(
    prompts=32, attempts=8, corrections=4, lr=5e-7, kl_coef=0.001, tokens=100_000_000, transcripts=1
)


# of a step
SUMS = (
    "tokens",
    "clipped",
    "kl",
    "ratio",
    "loss",
    "entropy",
    "gauge",
    "gauge_tokens",
    "gauge_max",
    "packed",
    "padding",
)
SKIPS = 5  # optimiser steps in a row whose gradient is not finite, after which a run ends
REFUSED = dict.fromkeys(
    ("top_k", "top_p", "min_p"),
    "rollouts must be drawn from the distribution whose log-probabilities are trained, or "
    "the gradient is biased; evaluation may filter: python eval.py --help",
)


def presets(given):
    """What stands under the given flags. BadInput for flags of the one kind of run given to the
    other."""
    own = {field.name for field in dataclasses.fields(pretrain.Config)} - {"device", "dtype"}
    if given.get("resume"):
        old = resumed_settings(given, [field.name for field in dataclasses.fields(Config)], say)
        where = resumed_run(given["resume"], given.get("name", "")) / "config.json"
        check_fields(old, {name: kind for name, kind in kinds(Config).items() if name in old}, where)
        return old
    if given.get("init"):
        for name in own & given.keys():
            raise BadInput(
                f"--{name.replace('_', '-')} is about bases that are made here; a model from "
                "--init is what it is"
            )
        if not given.get("data"):
            raise BadInput(
                "--data is missing: a model from --init learns from files of problems, say --data "
                "gsm8k/train.jsonl (data.py)"
            )
        return REAL
    for name in ("data", "eval_data", "template", "prompt_tokens", "verifier"):
        if name in given:
            raise BadInput(
                f"--{name.replace('_', '-')} needs --init, the model that is asked; the built-in "
                "tasks make their own problems"
            )
    return pick_preset(given, PRESETS)


# ---- loop ----------------------------------------------------------------------------------------


def train(c):
    """The whole run for a config -> path of its folder. BadInput for bad input, and when memory
    runs out."""
    setup = prepare(c)
    total = memory.available(setup.c.device)
    planned = plan(setup, total)
    say(memory.plan_text(planned, total))
    try:
        folder = rollouts_and_steps(setup, planned)
    except (RuntimeError, MemoryError) as error:
        if ran_out(error):
            raise memory.out_of_memory(planned, error, total) from None
        raise
    page.at_the_end(folder, say)
    return folder


def assemble(setup, planned):
    """All that a run works with -> policy, reference or None, optimizer, sampler, progress, folder,
    and the lock on it."""
    c, clock, state, began = setup.c, time.time(), None, None
    if c.resume:
        folder = resumed_run(c.resume, c.name)
        lock = alone_in(folder)
        state = resumed_state(c.resume, folder, settings(c), setup.shape, say)
        # the weights are in the state; the reference is not
        began = state["progress"]["base"] if c.kl_coef else ""
    policy, base = setup.load(began)
    policy.recompute = c.recompute == "yes"
    progress = Progress(
        base=str(base),
        reference=weights_checksum(policy) if c.kl_coef and distributed.rank() == 0 else "",
    )
    if not c.resume:
        folder = run_folder(c.name, settings(c), base, time.time() - clock)
        lock = alone_in(folder)
    elif progress.reference and progress.reference != state["progress"]["reference"]:
        raise BadInput(
            f"{base}: its weights are not those that {folder} began with, which its KL term needs: "
            "bring them back, or start a "
            "new run"
        )
    # cast at every use anyway
    reference = distributed.shard(narrow_copy(policy)) if c.kl_coef else None
    if state:
        policy.load_state_dict(state["weights"])
    sampler = make_sampler(
        policy, c.cache_tokens, row_tokens(setup), wanted_tokens(setup), later(planned)
    )
    if c.compile:
        policy.compile_blocks()
    distributed.shard(policy)  # the sampler's copy is whole; the masters are in slices from here on
    optimizer = torch.optim.AdamW(policy.parameters(), c.lr, weight_decay=0.0, fused=True)
    if state:
        progress = go_on(state, folder, policy, optimizer)
        note_resume(folder, {name: getattr(c, name) for name in FREE}, progress.step)
    return policy, reference, optimizer, sampler, progress, folder, lock


def rollouts_and_steps(setup, planned):
    """Table, loop, table -> the run's folder."""
    c = setup.c
    policy, reference, optimizer, sampler, progress, folder, _lock = assemble(setup, planned)
    start = time.time() - progress.seconds
    bar = bars.bar(c.tokens, c.name, "tok", unit_scale=True, initial=progress.generated)
    try:
        with Stop(say) as stop, open_board(folder, c.tensorboard, progress.step) as board:
            if not progress.results:
                heldout.table_of("base", sampler, setup, progress)
                write_json(folder / "result.json", progress.results)
            # of all processes together, or they would wait for each other
            stopping = distributed.most(stop.asked)
            while progress.generated < c.tokens and not stopping:
                before = progress.generated
                metrics, trees = one_step(
                    policy, reference, optimizer, sampler, setup, progress, folder
                )
                tenth = 10 * progress.generated // c.tokens > 10 * before // c.tokens
                if heldout.due(progress, tenth, c):
                    metrics |= heldout.look(sampler, setup, progress)
                progress.seconds = time.time() - start
                metrics |= dict(
                    seconds=progress.seconds,
                    peak_gb=distributed.most(memory.peak(c.device) / memory.GB),
                )
                log(folder, metrics, board, c.quiet)
                watch(folder, progress, metrics, trees, c)
                bar.update(progress.generated - before)
                stopping = distributed.most(stop.asked)
                if (
                    progress.step == 1
                    or stopping
                    or (progress.step % c.save_every == 0 if c.save_every else tenth)
                ):
                    write_samples(
                        folder / "samples.md",
                        progress.step,
                        trees[0].layers,
                        trees[0].problems,
                        setup.encoding,
                    )
                    save(folder, policy, optimizer, progress, c)
            if progress.generated < c.tokens:
                # stopped in the base's table: even that need not be made again
                if not progress.step:
                    save(folder, policy, optimizer, progress, c)
                say(
                    f"stopped after step {progress.step}: {how_to_evaluate(folder, c)} shows how "
                    "far it got, "
                    f"python train.py --resume {folder} goes on"
                )
                return folder
            save(folder, policy, optimizer, progress, c)
            heldout.table_of(method(c), sampler, setup, progress)
            progress.seconds = time.time() - start
    except OSError as error:
        if isinstance(error, BrokenPipeError) or not saved(folder / "state"):
            raise
        raise OSError(
            f"{error}; python train.py --resume {folder} goes on from the last saved state"
        ) from None
    except KeyboardInterrupt:
        say(
            f"stopped at once after step {progress.step}: {how_to_evaluate(folder, c)} shows the "
            "last state that was saved, "
            f"python train.py --resume {folder} goes on from it"
        )
        raise
    finally:
        bar.close()
    heldout.finish(folder, progress, how_to_evaluate(folder, c))
    return folder


class Trees(NamedTuple):
    """What a rollout grew on this rank's questions."""

    layers: list  # mgrpo.Layer, one or two
    problems: list
    # which of the step's P questions each is; -1: it taught nothing, and others took its place
    slots: torch.Tensor


def one_step(policy, reference, optimizer, sampler, setup, progress, folder):
    """One step of MGRPO: questions, a rollout of both layers, the optimiser's steps -> metrics,
    [Trees, ...]."""
    c, clock = setup.c, time.perf_counter()
    trees = rollout(sampler, setup, progress.step)
    sampled = time.perf_counter()
    transcripts.record(
        folder, policy, trees[0], setup.encoding, c, progress.step + 1, progress.generated
    )
    recorded = time.perf_counter()
    for parameters in optimizer.param_groups:
        parameters["lr"] = c.lr * (1 - progress.generated / c.tokens)
    learned = learn(policy, reference, optimizer, trees, c)
    sampler.refresh()
    seconds = sampled - clock, time.perf_counter() - recorded, recorded - sampled
    counts = distributed.total(
        dict(
            new=sum(int(layer.lengths.sum()) for tree in trees for layer in tree.layers),
            resampled=sum(int((tree.slots < 0).sum()) for tree in trees),
        )
    )
    progress.step, progress.generated = progress.step + 1, progress.generated + int(counts["new"])
    progress.sampling, progress.training = (
        progress.sampling + seconds[0],
        progress.training + seconds[1],
    )
    return (
        dict(step=progress.step, generated=progress.generated)
        | rollout_metrics(trees[0].layers, c.layers)
        | learned
        | dict(
            resampled=int(counts["resampled"]),
            tokens_per_s=counts["new"] / (seconds[0] + seconds[1]),
            seconds_sampling=seconds[0],
            seconds_training=seconds[1],
            seconds_transcripts=seconds[2],
            lr=optimizer.param_groups[0]["lr"],
        )
    ), trees


def rollout(sampler, setup, step):
    """The trees of a step's questions, of this rank's share of them -> [Trees], more than one with
    --resample.

    A question whose groups all have equal rewards has no gradient. With --resample it gives way to
    another, at most so many times (DAPO's dynamic sampling, arXiv 2503.14476, with a cap); what was
    drawn for it counts as generated. Who takes its place is a function of (seed, step, its slot,
    how many times), and random numbers are keyed by its place among all ranks' such questions.
    """
    c, trees, slots = setup.c, [], list(range(setup.c.prompts))
    for turn in range(c.resample + 1):
        mine, stream, key = (
            distributed.share(len(slots)),
            f"rl/{c.seed}" + turn * "/again",
            (c.seed, step) + turn * (0xA6A1,),
        )
        if mine:
            problems = [
                draw(setup.task, "train", stream, step * c.prompts + slots[i]) for i in mine
            ]
            how = Sampling(
                c.max_new_tokens,
                c.temperature,
                fold(*key),
                c.format_weight,
                mine.start * c.attempts,
                verifier=setup.verifier,
            )
            # MGRPO: two of them
            layers = collect(
                sampler,
                setup.encoding,
                problems,
                c.attempts,
                c.corrections,
                how,
                layers=c.layers,
                sources=c.sources,
                failed=c.failed,
                group=c.group,
            )
            trees.append(Trees(layers, problems, torch.tensor([slots[i] for i in mine])))
        if turn < c.resample:
            slots = sorted(
                slot for some in distributed.everyone(dull(trees[-1]) if mine else []) for slot in some
            )
    return trees


def dull(tree):
    """Slots of the questions that teach nothing, since no row of theirs has an advantage; taken
    from them."""
    nothing = torch.ones(len(tree.slots), dtype=torch.bool)
    for layer in tree.layers:
        nothing[layer.questions[layer.active(0)]] = False
    slots = tree.slots[nothing].tolist()
    tree.slots[nothing] = -1
    return slots


def watch(folder, progress, metrics, trees, c):
    """What must not go unseen: memory after the first step, answers cut short, gradients that are
    not finite (five in a row end the run), and that nothing was learnt."""
    progress.updates += metrics["updates"]
    progress.skipped = progress.skipped + metrics["skipped"] if not metrics["updates"] else 0
    progress.recent.append(metrics.get("accuracy2", metrics["accuracy1"]))
    if progress.step == 1:
        say(
            f"memory, GB: {memory.peak(c.device) / memory.GB:.2f} at most up to here"
            f"{'' if c.device == 'cuda' else ', Python and torch themselves included'}; "
            f"{metrics['packed']:,} tokens went through training, {metrics['padding']:.1%} of them "
            "padding"
        )
    cut = max(metrics["cut1"], metrics.get("cut2", 0.0))
    if cut > 0.2 and progress.step % 100 == 1:
        say(
            f"{cut:.0%} of answers are cut at {c.max_new_tokens} tokens, and score 0 whatever they "
            "were about to say: raise "
            "--max-new-tokens"
        )
    if metrics["skipped"]:
        post_mortem(folder, progress.step, [layer for tree in trees for layer in tree.layers])
    if progress.skipped >= SKIPS:
        raise BadInput(
            f"{progress.skipped} gradients in a row were not finite; the last saved state is "
            "intact: python train.py --resume "
            f"{folder}. Lower --lr in a new run, or use --dtype float32"
        )
    if progress.generated >= c.tokens and not progress.updates:
        say(
            "nothing was learnt: no group had both right and wrong answers. An easier task, more "
            "--attempts or longer answers may help"
        )


def learn(policy, reference, optimizer, trees, c):
    """Epochs x minibatches of optimiser steps on one rollout -> diagnostics, means over its steps
    or over the tokens trained on; of the loss, over minibatches, each of which has all of J, also
    where its layers have a step each."""
    sums, norms, skipped, seen = dict.fromkeys(SUMS, 0.0), [], 0, set()
    # the gauge is of both layers, and layer 1's step moves the policy
    if c.update == "alternating":
        found, both = dict(sums), optimiser_steps(trees, dataclasses.replace(c, update="joint"))
        any(accumulate(policy, reference, trees, parts, c, found, True) for parts in both)
        optimizer.zero_grad(set_to_none=True)
        sums |= {name: value for name, value in found.items() if name.startswith("gauge")}
    for epoch in range(c.epochs):
        for number, parts in enumerate(optimiser_steps(trees, c)):
            # the policy still is the one that sampled
            first = c.update == "joint" and epoch == 0 and not norms
            # else no advantages: momentum is no reason to move
            if accumulate(policy, reference, trees, parts, c, sums, first):
                seen.add((epoch, number if c.update == "joint" else number // c.layers))
                norm = distributed.clip_gradient(policy, 1.0)
                if math.isfinite(norm):
                    norms.append(norm)
                    optimizer.step()
                else:
                    skipped += 1
                optimizer.zero_grad(set_to_none=True)
    sums = {name: float(value) for name, value in sums.items()}
    gauge_max, sums = distributed.most(sums.pop("gauge_max")), distributed.total(sums)
    tokens = max(sums["tokens"], 1)
    return dict(
        loss=sums["loss"] / max(len(seen), 1),
        grad_norm=sum(norms) / max(len(norms), 1),
        updates=len(norms),
        skipped=skipped,
        **{name: sums[name] / tokens for name in ("clipped", "entropy", "kl", "ratio")},
        gauge_max=gauge_max,
        gauge_mean=sums["gauge"] / max(sums["gauge_tokens"], 1),
        packed=int(sums["packed"]),
        padding=sums["padding"] / max(sums["packed"], 1),
    )


def optimiser_steps(trees, c):
    """What each optimiser step trains on -> [[(tree's number, layer, its row indices), ...], ...],
    as many steps on every rank.

    Questions are dealt over the minibatches; siblings stay together, since a question's rows do.
    """
    steps = []
    for m in range(c.minibatches):
        parts = []
        for number, tree in enumerate(trees):
            for layer in tree.layers:
                slots = tree.slots[layer.questions]
                parts.append(
                    (number, layer, ((slots >= 0) & (slots % c.minibatches == m)).nonzero()[:, 0])
                )
        depths = range(1, c.layers + 1)  # MGRPO: both layers, one step
        steps += (
            [parts]
            if c.update == "joint"
            else [
                [part for part in parts if part[1].completions.depth == depth] for depth in depths
            ]
        )
    return steps


def accumulate(policy, reference, trees, parts, c, sums, first):
    """Adds the gradient of an optimiser step's rows, in micro-batches -> how many passes that took.
    sums: to them are added those over the rows' tokens; those of the gauge when this is the first
    step after sampling.

    Denominators count ALL rows, of all ranks, before the first backward: neither how rows are cut
    into micro-batches and ranks nor which of them carry a gradient changes the result. Ranks make
    as many passes as the busiest: a gather or a sum of gradients needs everybody.
    """
    denominators = distributed.total(
        {
            depth: sum(
                loss_denominator(layer.lengths[rows], c.normalize, c.max_new_tokens)
                for _, layer, rows in parts
                if layer.completions.depth == depth
            )
            for depth in (1, 2)
        }
    )
    leaves = [
        leaf(trees[number].layers, layer.completions.depth, row, number)
        for number, layer, rows in parts
        for row in rows[layer.active(c.kl_coef)[rows]].tolist()
    ]
    batches = (tree_packs if c.pack == "tree" else row_packs)(leaves, c.tokens_per_microbatch)
    passes = int(distributed.most(len(batches)))
    for some in batches:
        loss, found = loss_of(policy, reference, some, denominators, c)
        loss.backward()
        add(
            sums,
            {name: value for name, value in found.items() if first or not name.startswith("gauge")},
        )
    for _ in range(passes - len(batches)):
        idle_pass(policy, reference)
    return passes


def loss_of(policy, reference, leaves, denominators, c):
    """A micro-batch's part of the loss -> it, and sums over its tokens. With trees nothing here
    waits for the device."""
    batch = batch_of(leaves, c.pack, policy.cos.device)
    logp, entropy = logprobs(policy, batch, c.temperature)
    ref_logp = torch.zeros_like(logp)
    if reference is not None:
        with torch.no_grad():
            ref_logp, _ = logprobs(reference, batch, c.temperature)
    losses, sums = (
        [],
        dict(
            entropy=entropy.sum(),
            packed=batch.tokens.numel(),
            padding=batch.tokens.numel() - batch.needed,
        ),
    )
    for layer, places, rows in by_layer(leaves, logp.device):
        weight = 1.0 if layer.completions.depth == 1 else c.layer2_weight  # MGRPO: J = J_1 + w J_2
        old_logp, advantages, mask = targets(layer, rows)
        here, there = (x[places, : mask.shape[1]] for x in (logp, ref_logp))
        loss, found = policy_loss(
            here,
            old_logp,
            advantages,
            mask,
            clip_low=c.clip_low,
            clip_high=c.clip_high,
            ref_logp=there,
            kl_coef=c.kl_coef,
            kl=c.kl,
            normalize=c.normalize,
            denominator=denominators[layer.completions.depth],
        )
        losses.append(weight * loss)
        gap = ((here.detach() - old_logp) * mask).abs()
        add(
            sums,
            found
            | dict(
                loss=losses[-1].detach(),
                gauge=gap.sum(),
                gauge_tokens=mask.sum(),
                gauge_max=gap.max(),
            ),
        )
    return sum(losses), sums


def add(sums, found):
    """Adds what was found to the sums, tensors or numbers; of the largest gauge keeps the
    larger."""
    for name, value in found.items():
        before = sums.get(name, 0.0)
        largest = (
            torch.maximum(value, before)
            if name == "gauge_max" and torch.is_tensor(before)
            else value
        )
        sums[name] = largest if name == "gauge_max" else before + value


def idle_pass(policy, reference):
    """A pass over nothing, for a rank that has done its own while others have not."""
    nothing = pad_rows([[0]], [[0]], policy.cos.device)
    logp, _ = completion_logprobs(policy, nothing)
    if reference is not None:
        with torch.no_grad():
            completion_logprobs(reference, nothing)
    (0 * logp.sum()).backward()


# ---- results -------------------------------------------------------------------------------------


def settings(c):
    """The config as a dict; for a model from --init without what made a base here."""
    base = (
        {field.name for field in dataclasses.fields(pretrain.Config)} - {"device", "dtype"}
        if c.init
        else set()
    )
    return {
        name: value for name, value in dataclasses.asdict(c).items() if name not in base
    } | dict(resume="")


def save(folder, policy, optimizer, progress, c):
    """The run's state, to go on from; and its model: a built-in task's as checkpoint.pt, a real one
    as it came, a folder that transformers and vLLM load."""
    accuracy = sum(progress.recent) / max(len(progress.recent), 1)
    if progress.recent and accuracy >= progress.accuracy:
        progress.best, progress.accuracy = progress.step, accuracy
    progress.recent = []
    weights, moments = distributed.full_state(policy, optimizer)
    if distributed.rank() > 0:
        return
    save_state(
        folder / "state",
        progress.step,
        dict(
            settings=settings(c),
            weights=weights,
            optimizer=moments,
            best=progress.best,
            generator=torch.get_rng_state(),
            progress=dataclasses.asdict(progress),
        ),
        c.keep,
    )
    if c.init:
        save_pretrained(policy, folder / "model", policy.compute, weights)
    else:
        save_checkpoint(folder / "checkpoint.pt", policy, weights, config=settings(c))


def how_to_evaluate(folder, c):
    if c.init:
        verifier = "" if c.verifier == "rules" else f" --verifier {c.verifier}"
        return f"python eval.py --init {folder} --data {c.eval_data or c.data}{verifier}"
    return f"python eval.py --checkpoint {folder}/checkpoint.pt"


def main():
    gone = dict(offload_optimizer="Adam's moments stay on the device; use more GPUs (torchrun)")
    c = parse_flags(Config, __doc__, presets, refused=REFUSED, renamed=gone)
    bars.quieten(c.quiet)
    if c.resume:
        folder = resumed_run(c.resume, c.name)
        check_fields(vars(c), get_type_hints(Config), folder / "config.json")
        c = dataclasses.replace(
            c, name=folder.name, resume=c.resume if Path(c.resume).is_file() else str(folder)
        )
    train(c)


if __name__ == "__main__":
    distributed.run(main)
