"""MGRPO from a base model to the paper's table: sample layer 1, sample layer 2, score, advantages, loss, step, log.

    python train.py                          # no GPU, no download: a base model, then MGRPO, then the table; minutes on 2 cores
    python train.py --layers 1 --attempts 16 # plain GRPO with as many rollouts per question
    python train.py --preset smoke           # the same in under a minute, on a toy size
    python train.py --init path/to/Qwen2.5-Math-1.5B --data gsm8k/train.jsonl --eval-data gsm8k/test.jsonl
    python train.py --resume                 # goes on with the newest run, exactly where it was (checkpoints.py)

The idea. One step draws P questions and grows a tree on each: G attempts, and H corrections of every attempt. Both layers are
scored by a rule and trained by one loss (mgrpo.py); nothing else makes it "multi-layer". A run ends after `--tokens` generated
tokens, not after steps, so that runs of different shape compare at equal cost.

A run leaves in out/<run>/: config.json, metrics.jsonl (a line per step, every field by name), samples.md (whole trees, the best and
the worst), result.json (the table), state/ (to go on from, 12 bytes a parameter each), and checkpoint.pt or, from --init, model/ in Hugging
Face's format (eval.py reads both). README explains every column of the log.
"""
import dataclasses
import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import memory
import pretrain
from checkpoints import Stop, resumed_run, resumed_settings, resumed_state, save_state
from eval import evaluate, held_out_questions, make_sampler, table
from flags import BadInput, Maybe, guarded, parse_flags
from journal import cut_log, log, post_mortem, rollout_metrics, run_folder, say, write_json, write_samples
from kernels import fold
from mgrpo import Sampling, collect, completion_logprobs, loss_denominator, pack, policy_loss
from model import save_checkpoint
from pretrain import pick_preset
from starting import frozen, later, method, plan, prepare, row_tokens, wanted_tokens
from tasks import draw


@dataclass(frozen=True)
class Config(pretrain.Config):
    init: str = ""            # folder of a model in Hugging Face's format to start from; empty: a base of the built-in task
    data: str = ""            # files of problems for it (data.py), separated by commas
    eval_data: str = ""       # files to evaluate on; empty: every eighth problem of --data, which is then not trained on
    template: Literal["auto", "paper", "words", "chatml", "llama3", "plain"] = "auto"    # of prompts (prompts.py); auto: the model's own
    prompt_tokens: int = 512  # questions whose prompt is longer are left out
    verifier: Literal["rules", "math-verify"] = "rules"           # who says what is right: reward.py, or that library
    resume: Maybe = ""        # go on with the newest run (of --run), or with the run's folder or state's file that is named
    save_every: int = 0       # steps between two saved states; 0: ten a run
    keep: int = 2             # states that are kept, besides the best
    run: str = ""             # folder under out/; empty: named after task, method and seed, with a number if that exists
    seed: int = 0             # of RL: questions, sampling, phrases; the base has its own, so that seeds share a base
    tokens: int = 1_260_000   # generated tokens, both layers together, after which the run ends
    prompts: int = 32         # P, questions per step
    attempts: int = 4         # G, layer-1 answers per question
    corrections: int = 3      # H, layer-2 answers per attempt
    layers: int = 2           # 2: MGRPO; 1: GRPO
    sources: Literal["all", "wrong", "balanced"] = "all"          # attempts that get a second look; balanced: one right, one wrong
    failed: Literal["mask", "keep", "raw"] = "mask"               # failed corrections: dropped after normalising | kept | raw reward
    group: Literal["attempt", "question"] = "attempt"             # siblings in layer 2: corrections of one attempt | of one question
    layer2_weight: float = 1.0     # w in J = J_1 + w J_2
    update: Literal["joint", "alternating"] = "joint"             # one step on both layers | one on each (Adam then undoes the weight)
    lr: float = 1e-4          # AdamW's learning rate at the start; it falls to 0 in a straight line over --tokens. No weight decay
    clip_low: float = 0.2     # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2    # 0.28 is DAPO's "clip higher"
    kl_coef: float = 0.0      # β, weight of KL(policy || base); the paper: 0.001
    kl: Literal["k1", "k2", "k3"] = "k3"                          # KL estimator; k1 has no gradient on average (mgrpo.kl_estimate)
    normalize: Literal["sequence", "token", "constant"] = "sequence"   # mean over a row's tokens (paper) | all tokens | fixed length
    epochs: int = 1           # passes over each rollout
    minibatches: int = 2      # optimiser steps per pass, each on its share of the questions
    rows: int = 128           # rows per micro-batch: less memory, same gradient
    recompute: Literal["auto", "yes", "no"] = "auto"              # activation checkpointing: less memory, more time; auto: with --init
    offload_optimizer: bool = False    # Adam's moments, and masters for it, in host memory: 8 bytes a parameter less on the device
    max_new_tokens: int = 0   # per completion; 0: half as much again as a right answer can need; of a real model what fits, at most 1,024
    cache_tokens: int = 0     # tokens whose keys and values the sampler may hold; 0: no limit on a CPU, half of the free memory on CUDA
    temperature: float = 1.0  # of sampling, and of the log-probabilities that are trained
    format_weight: float = 0.0     # reward for <think>..</think><answer>..</answer>, at most 0.5 so that it never beats being right
    eval_questions: int = 1024     # held-out questions of the final table


PRESETS = {
    "cpu": pretrain.PRESETS["cpu"],
    "gpu": pretrain.PRESETS["gpu"] | dict(prompts=128, attempts=8, corrections=4, tokens=100_000_000, rows=1024, lr=3e-5,
                                          eval_questions=4096),     # more of everything a GPU does in parallel
    "smoke": pretrain.PRESETS["smoke"] | dict(tokens=200_000, prompts=16, eval_questions=256),
}


# Of a model from --init: what the paper used, as far as public re-implementations know (H and the tokens are ours).
REAL = dict(prompts=32, attempts=8, corrections=4, lr=5e-7, kl_coef=0.001, tokens=100_000_000, rows=8)


SKIPS = 5                 # optimiser steps in a row whose gradient is not finite, after which a run ends
REFUSED = dict.fromkeys(("top_k", "top_p", "min_p"), "rollouts must be drawn from the distribution whose log-probabilities are trained, or "
                        "the gradient is biased; evaluation may filter: python eval.py --help")


def presets(given):
    """What stands under the given flags. BadInput for flags of the one kind of run given to the other."""
    own = {field.name for field in dataclasses.fields(pretrain.Config)} - {"device", "dtype"}
    if given.get("resume"):
        return resumed_settings(given, [field.name for field in dataclasses.fields(Config)], say)
    if given.get("init"):
        for name in own & given.keys():
            raise BadInput(f"--{name.replace('_', '-')} is about bases that are made here; a model from --init is what it is")
        if not given.get("data"):
            raise BadInput("--data is missing: a model from --init learns from files of problems, say --data gsm8k/train.jsonl (data.py)")
        return REAL
    for name in ("data", "eval_data", "template", "prompt_tokens", "verifier"):
        if name in given:
            raise BadInput(f"--{name.replace('_', '-')} needs --init, the model that is asked; the built-in tasks make their own problems")
    return pick_preset(given, PRESETS)


# ------------------------------------------------------------------------------------------------------------------ loop

def train(c):
    """The whole run for a config -> path of its folder. BadInput for bad input, and when memory runs out."""
    setup = prepare(c)
    total = memory.available(setup.c.device)
    planned = plan(setup, total)
    say(memory.plan_text(planned, total))
    try:
        return rollouts_and_steps(setup, planned)
    except (RuntimeError, MemoryError) as error:
        if memory.ran_out(error):
            raise memory.out_of_memory(planned, error, total) from None
        raise


@dataclass
class Progress:
    """How far a run is: plain values, which its saved states keep."""
    step: int = 0
    generated: int = 0        # tokens
    seconds: float = 0.0
    updates: int = 0          # optimiser steps made
    skipped: int = 0          # in a row, for gradients that were not finite
    best: int = -1            # the step whose state is the best: by accuracy of the last layer since the state before
    accuracy: float = -1.0    # of the best
    recent: list = dataclasses.field(default_factory=list)     # accuracies since the last state
    results: dict = dataclasses.field(default_factory=dict)    # tables


def rollouts_and_steps(setup, planned):
    """Table, loop, table -> the run's folder."""
    c = setup.c
    policy, base_path = setup.load()
    policy.recompute = c.recompute == "yes"
    reference = frozen(policy) if c.kl_coef else None
    folder = resumed_run(c.resume, c.run) if c.resume else run_folder(c.run, settings(c), base_path)
    optimizer = memory.make_optimizer(policy, c.lr, c.offload_optimizer)
    progress = load(resumed_state(c.resume, folder, say), folder, policy, optimizer) if c.resume else Progress()
    sampler = make_sampler(policy, c.cache_tokens, row_tokens(setup), wanted_tokens(setup), later(planned))
    table_of = lambda name: final_table(sampler, setup.encoding, setup.task, c, name, setup.verifier)
    start = time.time() - progress.seconds
    bar = tqdm(total=c.tokens, initial=progress.generated, unit="tok", unit_scale=True, desc=c.run, disable=None)
    try:
        with Stop(say) as stop:
            if not progress.results:
                progress.results["base"] = table_of("base")
                write_json(folder / "result.json", progress.results)
            while progress.generated < c.tokens and not stop.asked:
                before = progress.generated
                metrics, layers, problems = one_step(policy, reference, optimizer, sampler, setup, progress)
                progress.seconds = time.time() - start
                log(folder, bar, metrics | dict(seconds=progress.seconds, peak_gb=memory.peak(c.device) / memory.GB))
                watch(folder, progress, metrics, layers, c)
                bar.update(progress.generated - before)
                tenth = 10 * progress.generated // c.tokens > 10 * before // c.tokens
                if progress.step == 1 or stop.asked or (progress.step % c.save_every == 0 if c.save_every else tenth):
                    write_samples(folder / "samples.md", progress.step, layers, problems, setup.encoding)
                    save(folder, policy, optimizer, progress, c)
            if progress.generated < c.tokens:
                if not progress.step:                        # stopped in the base's table: even that need not be made again
                    save(folder, policy, optimizer, progress, c)
                say(f"stopped after step {progress.step}: {how_to_evaluate(folder, c)} shows how far it got, "
                    f"python train.py --resume {folder} goes on")
                return folder
            save(folder, policy, optimizer, progress, c)
            progress.results[method(c)] = table_of(method(c))
    except KeyboardInterrupt:
        say(f"stopped at once after step {progress.step}: {how_to_evaluate(folder, c)} shows the last state that was saved, "
            f"python train.py --resume {folder} goes on from it")
        raise
    finally:
        bar.close()
    finish(folder, progress.results, c, progress.seconds)
    return folder


def one_step(policy, reference, optimizer, sampler, setup, progress):
    """One step of MGRPO: questions, a rollout of both layers, the optimiser's steps -> metrics, layers, problems."""
    c, clock = setup.c, time.perf_counter()
    problems = [draw(setup.task, "train", f"rl/{c.seed}", progress.step * c.prompts + i) for i in range(c.prompts)]
    how = Sampling(c.max_new_tokens, c.temperature, fold(c.seed, progress.step), c.format_weight, verifier=setup.verifier)
    layers = collect(sampler, setup.encoding, problems, c.attempts, c.corrections, how,                       # MGRPO: two of them
                     layers=c.layers, sources=c.sources, failed=c.failed, group=c.group)
    sampled = time.perf_counter()
    for parameters in optimizer.param_groups:
        parameters["lr"] = c.lr * (1 - progress.generated / c.tokens)
    learned = learn(policy, reference, optimizer, layers, c)
    sampler.refresh()
    seconds = sampled - clock, time.perf_counter() - sampled
    new = sum(int(layer.lengths.sum()) for layer in layers)
    progress.step, progress.generated = progress.step + 1, progress.generated + new
    return (dict(step=progress.step, generated=progress.generated) | rollout_metrics(layers) | learned
            | dict(tokens_per_s=new / sum(seconds), seconds_sampling=seconds[0], seconds_training=seconds[1],
                   lr=optimizer.param_groups[0]["lr"])), layers, problems


def watch(folder, progress, metrics, layers, c):
    """What must not go unseen: memory after the first step, answers cut short, gradients that are not finite (five in a row end the run),
    and that nothing was learnt."""
    progress.updates += metrics["updates"]
    progress.skipped = progress.skipped + metrics["skipped"] if not metrics["updates"] else 0
    progress.recent.append(metrics.get("accuracy2", metrics["accuracy1"]))
    if progress.step == 1:
        say(f"memory, GB: {memory.peak(c.device) / memory.GB:.2f} at most up to here"
            f"{'' if c.device == 'cuda' else ', Python and torch themselves included'}")
    cut = max(metrics["cut1"], metrics.get("cut2", 0.0))
    if cut > 0.2 and progress.step % 100 == 1:
        say(f"{cut:.0%} of answers are cut at {c.max_new_tokens} tokens, and score 0 whatever they were about to say: raise "
            "--max-new-tokens")
    if metrics["skipped"]:
        post_mortem(folder, progress.step, layers)
    if progress.skipped >= SKIPS:
        raise BadInput(f"{progress.skipped} gradients in a row were not finite; the last saved state is intact: python train.py --resume "
                       f"{folder}. Lower --lr in a new run, or use --dtype float32")
    if progress.generated >= c.tokens and not progress.updates:
        say("nothing was learnt: no group had both right and wrong answers. An easier task, more --attempts or longer answers may help")


def load(state, folder, policy, optimizer):
    """Puts a saved state where it belongs -> Progress. The log is cut to it."""
    try:
        policy.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["generator"])
        progress = Progress(**state["progress"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if memory.ran_out(error):
            raise
        raise BadInput(f"{folder}: its state does not fit this model ({str(error).splitlines()[0]}); is --init another one now?") from None
    cut_log(folder, progress.step)
    return progress


def learn(policy, reference, optimizer, layers, c):
    """Epochs x minibatches of optimiser steps on one rollout -> diagnostics, means over its steps or over the tokens trained on."""
    sums, norms, skipped = {}, [], 0
    for epoch in range(c.epochs):
        for parts in optimiser_steps(layers, c):
            for layer, rows in parts:
                first = epoch == 0 and not norms                      # the policy still is the one that sampled
                for name, value in accumulate(policy, reference, layer, rows, c, first).items():
                    sums[name] = max(sums.get(name, 0.0), value) if name.startswith("gauge_max") else sums.get(name, 0.0) + value
            if any(p.grad is not None for p in policy.parameters()):  # all advantages 0: Adam's momentum alone is no reason to move
                norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item()
                if math.isfinite(norm):
                    norms.append(norm)
                    optimizer.step()
                else:
                    skipped += 1
                optimizer.zero_grad(set_to_none=True)
    tokens = max(sums.get("tokens", 0), 1)
    return dict(loss=sums.get("loss", 0.0) / max(len(norms), 1), grad_norm=sum(norms) / max(len(norms), 1), updates=len(norms),
                skipped=skipped,
                **{name: sums.get(name, 0.0) / tokens for name in ("clipped", "entropy", "kl", "ratio")},
                gauge_max=sums.get("gauge_max", 0.0), gauge_mean=sums.get("gauge", 0.0) / max(sums.get("gauge_tokens", 0), 1))


def optimiser_steps(layers, c):
    """What each optimiser step trains on -> [[(layer, its row indices), ...], ...].

    Questions are dealt over the minibatches; siblings stay together, since a question's rows do.
    """
    steps = []
    for m in range(c.minibatches):
        parts = [(layer, (layer.questions % c.minibatches == m).nonzero()[:, 0]) for layer in layers]
        steps += [parts] if c.update == "joint" else [[part] for part in parts]                        # MGRPO: both layers, one step
    return steps


def accumulate(policy, reference, layer, rows, c, first):
    """Adds the gradient of these rows of a layer, in micro-batches -> sums over their tokens.

    The denominator counts ALL rows, before the first backward: neither how rows are cut into micro-batches nor which of them
    carry a gradient changes the result. Rows go longest beside longest, so that little is padding.
    """
    denominator = loss_denominator(layer.lengths[rows], c.normalize, c.max_new_tokens)
    weight = 1.0 if layer.completions.depth == 1 else c.layer2_weight                                   # MGRPO: J = J_1 + w J_2
    rows, sums = rows[layer.active(c.kl_coef)[rows]], {}
    rows = rows[layer.totals[rows].argsort(stable=True)]
    for index in rows.split(c.rows) if len(rows) else ():
        batch, old_logp, advantages = pack(layer, index)
        logp, entropy = completion_logprobs(policy, batch, c.temperature)
        ref_logp = None
        if reference is not None:
            with torch.no_grad():
                ref_logp, _ = completion_logprobs(reference, batch, c.temperature)
        loss, found = policy_loss(logp, old_logp, advantages, batch.mask, clip_low=c.clip_low, clip_high=c.clip_high,
                                  ref_logp=ref_logp, kl_coef=c.kl_coef, kl=c.kl, normalize=c.normalize, denominator=denominator)
        (weight * loss).backward()
        found |= dict(loss=weight * loss.detach(), entropy=entropy.sum())
        if first:
            gap = (logp.detach() - old_logp).abs()[batch.mask]
            found |= dict(gauge=gap.sum(), gauge_tokens=len(gap))
            sums["gauge_max"] = max(sums.get("gauge_max", 0.0), gap.max().item())
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums


# --------------------------------------------------------------------------------------------------------------- results

def settings(c):
    """The config as a dict; for a model from --init without what made a base here."""
    base = {field.name for field in dataclasses.fields(pretrain.Config)} - {"device", "dtype"} if c.init else set()
    return {name: value for name, value in dataclasses.asdict(c).items() if name not in base} | dict(resume="")


def save(folder, policy, optimizer, progress, c):
    """The run's state, to go on from; and its model: a built-in task's as checkpoint.pt, a real one as it came, a folder that transformers
    and vLLM load."""
    accuracy = sum(progress.recent) / max(len(progress.recent), 1)
    if progress.recent and accuracy >= progress.accuracy:
        progress.best, progress.accuracy = progress.step, accuracy
    progress.recent = []
    save_state(folder / "state", progress.step, dict(weights=policy.state_dict(), optimizer=optimizer.state_dict(), best=progress.best,
                                                     generator=torch.get_rng_state(), progress=dataclasses.asdict(progress)), c.keep)
    if c.init:
        policy.save_pretrained(folder / "model", policy.compute)
    else:
        save_checkpoint(folder / "checkpoint.pt", policy, config=settings(c))


def how_to_evaluate(folder, c):
    if c.init:
        verifier = "" if c.verifier == "rules" else f" --verifier {c.verifier}"
        return f"python eval.py --init {folder} --data {c.eval_data or c.data}{verifier}"
    return f"python eval.py --checkpoint {folder}/checkpoint.pt"


def final_table(sampler, encoding, task, c, name, verifier):
    """Held-out accuracy, greedy and at temperature 1 -> {"greedy": ..., "temperature 1": ...}."""
    problems = held_out_questions(task, c.eval_questions)
    ask = functools.partial(evaluate, sampler, encoding, problems, c.max_new_tokens, verifier=verifier)
    return {label: ask(temperature=temperature, say=f"{name}, {label}") for label, temperature in (("greedy", 0.0), ("temperature 1", 1.0))}


def finish(folder, results, c, seconds):
    """Prints the paper's table and writes result.json."""
    write_json(folder / "result.json", results)
    for label in ("greedy", "temperature 1"):
        say(f"\n{label}\n{table({name: result[label] for name, result in results.items()})}")
    say(f"\n{folder}: {seconds / 60:.1f} minutes after the base; {how_to_evaluate(folder, c)}")


def main():
    c = parse_flags(Config, __doc__, presets, refused=REFUSED)
    if c.resume:
        folder = resumed_run(c.resume, c.run)
        c = dataclasses.replace(c, run=folder.name, resume=c.resume if Path(c.resume).is_file() else str(folder))
    train(c)


if __name__ == "__main__":
    guarded(main)
