"""MGRPO from a base model to the paper's table: rollout, advantages, loss, optimiser step, log.

    python train.py                          # CPU, no download: base model, MGRPO, table; minutes
    python train.py --group-sizes 16         # plain GRPO with as many answers a question
    python train.py --method disco           # a relative of GRPO: python -m variants.table
    python train.py --preset smoke           # the same in about a minute, at toy size
    python train.py --init path/to/Qwen2.5-Math-1.5B --data gsm8k/train.jsonl
    python train.py --resume                 # continues the newest run, bit for bit
    torchrun --nproc_per_node=8 train.py     # eight GPUs

One step draws P questions and grows a tree on each: g_1 answers, g_2 corrections of every answer,
and so on. A rule scores all layers and one loss trains them (mgrpo.py). A run ends after `--tokens`
generated tokens, not after steps, so that runs of different shape compare at equal cost.

A run leaves in out/<run>/: report.html (table, curves, trees), config.json, metrics.jsonl (a line a
step; docs/metrics.md explains it), rollouts.jsonl (trees), result.json (the table), state/ (to
resume from), and the model: checkpoint.pt, or model/ in Hugging Face's format.
"""

from runtime import flags  # first: Ctrl-C while torch is imported is one sentence too

# isort: split
import copy
import dataclasses
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch

from engine import packing
from eval import as_metrics, evaluate, percent
from eval import table as accuracy_table
from mgrpo import (
    SamplingParams,
    credit,
    loss_denominator,
    loss_inputs,
    policy_loss,
    rollout,
    step_seed,
)
from report import page
from runtime import distributed
from runtime.flags import Above, AtLeast, BadInput, Between, Maybe, file_name, flat, parse_flags
from runtime.log import Logging, Metrics, bar_of_rows, say
from runtime.run import Run, origin_of, resumed_run, resumed_settings
from tasks import opening
from tasks.opening import BaseConfig, Hardware, RealConfig, TaskConfig
from variants import observing, table


@dataclass(frozen=True)
class Config:
    # Sizes that go together; flags override single values. paper: what is known of the paper's.
    preset: Literal["auto", "cpu", "gpu", "smoke", "paper"] = "auto"
    init: str = ""  # folder of a model in Hugging Face's format; empty: a base of a built-in task
    data: tuple[str, ...] = ()  # JSONL files of problems for --init, separated by commas
    eval_data: tuple[str, ...] = ()  # files to evaluate on; empty: every eighth problem of --data
    name: str = ""  # folder under out/; empty: task, method and seed
    seed: int = 0  # of RL: questions, sampling, phrases (the base has its own)
    resume: Maybe = ""  # continue the newest run (of --name), or the folder or state file given

    # A relative of GRPO, and changes to its constants: python -m variants.table lists both.
    method: str = "mgrpo"
    method_args: tuple[str, ...] = ()  # name=value,...; for all: sources, siblings, failed

    # The rollout.

    tokens: Annotated[int, AtLeast(1)] = 1_260_000  # generated, all layers; then the run ends
    prompts: Annotated[int, AtLeast(1)] = 32  # P, questions a step, of all ranks together
    # g_1,g_2,...: answers to each prompt of a layer. 16 is GRPO, 4,3 MGRPO, 4,3,2 has three layers.
    # Other methods have one layer of as many rows, unless told otherwise.
    group_sizes: Annotated[tuple[int, ...], AtLeast(1)] = (4, 3)
    # Tokens of a completion at most. 0: half as much again as a right answer can need; for a model
    # of --init what fits into its context, at most 1,024.
    max_new_tokens: Annotated[int, AtLeast(0)] = 0
    temperature: Annotated[float, Above(0)] = 1.0  # of sampling and of trained log-probabilities
    format_weight: Annotated[float, Between(0, 0.5)] = 0.0  # reward for <think>..<answer>.. alone

    # The loss and the optimiser.

    layer_weights: tuple[float, ...] = ()  # w_k in J = w_1 J_1 + w_2 J_2 + ...; empty: all 1
    lr: Annotated[float, AtLeast(0)] = 1e-4  # AdamW's at the start; falls to 0 in a straight line
    clip: tuple[float, ...] = (0.2,)  # ε: ratios in [1 - ε, 1 + ε]; 0.2,0.28 is DAPO's clip-higher
    kl_coef: Annotated[float, AtLeast(0)] = 0.0  # β of KL(policy || base); the paper: 0.001
    # Mean over a row's tokens (the paper) | over all tokens | sum over a fixed length.
    normalize: Literal["sequence", "token", "constant"] = "sequence"
    epochs: Annotated[int, AtLeast(1)] = 1  # passes over each rollout
    minibatches: Annotated[int, AtLeast(1)] = 2  # optimiser steps a pass; questions are dealt out

    # Evaluation.

    # Held-out questions of the tables before and after training.
    eval_questions: Annotated[int, Between(2, 1 << 24)] = 1024
    # Answers in a row to each of them; 0: as many as layers, and one correction for GRPO too.
    turns: Annotated[int, Between(0, 16)] = 0
    eval_every: Annotated[int, AtLeast(0)] = 0  # steps between quick evaluations; 0: ten a run

    puzzle: TaskConfig = TaskConfig()
    base: BaseConfig = BaseConfig()
    real: RealConfig = RealConfig()
    hardware: Hardware = Hardware()
    logging: Logging = Logging()


# What is known of the paper's settings, as public re-implementations report them; g_2 is ours.
PAPER = dict(prompts=32, group_sizes=(8, 4), method_args=("siblings=parent",), kl_coef=0.001)
# What a preset sets besides the size of the task and of its base (tasks/base.py).
PRESETS = {
    "paper": PAPER,  # but not its learning rate, 5e-7: that is for a model of billions of weights
    "cpu": {},  # the defaults above: what two cores train in minutes
    "gpu": dict(  # more of everything that a GPU does in parallel
        prompts=128,
        group_sizes=(8, 4),
        tokens=100_000_000,
        tokens_per_microbatch=65_536,
        lr=3e-5,
        eval_questions=4096,
    ),
    "smoke": dict(tokens=200_000, prompts=16, eval_questions=256),
}
QUICK_QUESTIONS = 256  # of the quick evaluations during a run; greedy
MAX_GRADIENT_NORM = 1.0
MOST_ROWS = 1 << 24  # a step; more rows end in memory that runs out, or never


# ---- the run -------------------------------------------------------------------------------------


def train(config):
    """The whole run -> path of its folder. BadInput for bad input, and when memory runs out."""
    check(config)
    policy, task = opening.open_model_and_task(
        # The weights of a resumed run are in its state; its KL term needs the base it began with.
        origin_of(config) if config.resume and needs_reference(config) else config.init,
        weights=not config.resume or needs_reference(config),
        puzzle=config.puzzle,
        base=config.base,
        real=config.real,
        data=config.data,
        eval_data=config.eval_data,
        device=config.hardware.device,
        dtype=config.hardware.dtype,
        max_new_tokens=config.max_new_tokens,
        turns=turns(config),
        cache_tokens=config.hardware.cache_tokens,
    )
    config = settled(config, policy, task)
    say(f"method: {config.method}: {method_of(config).about}")
    policy.recompute = config.hardware.recompute == "yes"
    distributed.agree("settings", config)
    first = task.train_problems(config.seed, 0, config.prompts)
    distributed.agree("questions to learn from", [problem.question for problem in first])

    # The sampler decodes with a whole low-precision copy of the weights, so it is made before the
    # fp32 masters are cut into slices. (On one GPU `shard` does nothing.)
    follows = method_of(config).decay < 1
    kind = (torch.float32 if follows else policy.compute) if needs_reference(config) else None
    sampler, plan = opening.training_sampler(config, policy, task, turns(config), kind)
    reference = opening.make_reference(policy, follows) if kind else None
    policy, reference = distributed.shard(policy), reference and distributed.shard(reference)
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr, weight_decay=0.0, fused=True)

    saved = settings(config)
    with Run(config, saved, policy, reference, optimizer, opening.save_policy, plan) as run:
        # A resumed run has just put the weights of its last state into the policy.
        sampler.refresh(distributed.full_tensors(policy, policy.compute))
        if "base" not in run.results:
            run.table("base", held_out_tables("base", run, sampler, task, config))
        # Ctrl-C and SIGTERM end the loop after the step under way: it is saved, and no table made.
        while run.tokens < config.tokens and not run.stop_asked():
            problems, layers, metrics = step(
                policy,
                reference,
                sampler,
                optimizer,
                task,
                config,
                run.step,
                run.tokens,
                run.memory,
            )
            run.finish_step(metrics)
            if run.due("eval"):
                metrics |= quick_evaluation(run, sampler, task, config)
            run.log(metrics, problems, layers, task.encoding)
            if run.due("save"):  # ten times a run, and after its last step
                run.save()
        if run.tokens >= config.tokens:  # else it was stopped
            name = label(config)
            run.table(name, held_out_tables(name, run, sampler, task, config))
            for row in run.results["base"]:  # greedy, temperature 1
                rows = {name: results[row] for name, results in run.results.items()}
                say(f"\n{row}\n{accuracy_table(rows, task.unit)}")
            say(f"\n{run.where_time_went()}")
            say(f"{run.folder}: {run.minutes():.1f} minutes after the base; {how_to_evaluate(run)}")
    return run.folder


def step(policy, reference, sampler, optimizer, task, config, number, generated, memory=None):
    """One step of a method -> this rank's problems, their layers, metrics of all ranks.

    number: steps made before; generated: tokens of those steps; memory: what the method keeps from
    step to step, a dict.
    """
    clock, method = time.perf_counter(), method_of(config)

    # 1. Questions: a pure function of (seed, step). Each rank takes its share of them.
    share = distributed.share(config.prompts)
    problems = task.train_problems(config.seed, number, config.prompts)[share.start : share.stop]

    # 2. Rollout: layer 1 answers, layer k corrects the answers of layer k - 1. The random numbers
    #    of a row depend on (seed, step) and its own number, not on the rank that samples it.
    sampling = SamplingParams(
        config.max_new_tokens,
        config.temperature,
        seed=step_seed(config.seed, number),
        first_row=share.start * config.group_sizes[0],
    )
    rows = len(problems) * sum(rows_per_question(config.group_sizes))
    with bar_of_rows(sampler, rows, "rollout"):
        layers = rollout(
            sampler,
            task,
            problems,
            config.group_sizes,  # MGRPO: a number for each layer
            sampling,
            method.sources,
            config.format_weight,
        )
    new = distributed.sum_over_ranks(dict(new=sum(int(layer.lengths.sum()) for layer in layers)))
    layers = observing.rewritten(policy, layers, method, task, config, sampling.seed)
    sampled = time.perf_counter()

    # 3. Learn from the trees. (A method may have a second stage on the same ones.) AdamW's rate
    #    falls to 0 in a straight line over the run's tokens.
    rate, tally = config.lr * (1 - generated / config.tokens), Tally()
    learn(policy, reference, optimizer, layers, method, rate, config, share.start, memory, tally)
    if method.then:  # on copies: the log shows the first stage's advantages
        again = [copy.copy(layer) for layer in layers]
        rest = (rate, config, share.start, memory, tally)
        learn(policy, reference, optimizer, again, method.then, *rest)
    observing.follow(reference, policy, method, number + 1)

    # 4. The sampler decodes with its own copy of the weights: renew it.
    sampler.refresh(distributed.full_tensors(policy, policy.compute))
    trained = time.perf_counter()

    new, seconds = int(new["new"]), trained - clock
    return (
        problems,
        layers,
        {
            "step": number + 1,
            "generated": generated + new,
            **tally.rewards,
            **loss_metrics(tally),
            "grad_norm": sum(tally.norms) / max(len(tally.norms), 1),
            "updates": len(tally.norms),
            "skipped": tally.skipped,
            "tokens_per_s": new / seconds,
            "seconds_sampling": sampled - clock,
            "seconds_training": trained - sampled,
            "lr": rate,
        },
    )


@dataclass
class Tally:
    """What a step's optimiser steps leave for the log."""

    rewards: dict = None  # metrics of the rollout
    sums: Metrics = field(default_factory=Metrics)  # over tokens
    norms: list = field(default_factory=list)  # of the gradients, one for each update
    tried: int = 0  # optimiser steps, with those that were skipped
    skipped: int = 0  # because the gradient was not finite


def learn(policy, reference, optimizer, layers, method, rate, config, first, memory, tally):
    """Credit and the optimiser steps of one method on one rollout. Adds to `tally`.

    rate: the learning rate; first: number of this rank's first question in the step.
    """
    # Credit: every answer is compared with its siblings, by default all answers of its layer to the
    # same question. Some methods look at entropies or vectors first: a pass without gradient.
    observing.observe_all(policy, reference, layers, method, config)
    if method.learn:
        method.learn(layers, memory, observing.gathered)
    credit(layers, method, memory)
    tally.rewards = tally.rewards or rollout_metrics(layers, len(config.group_sizes))
    for group in optimizer.param_groups:
        group["lr"] = method.lr * rate

    # Each optimiser step sees its share of the questions, in micro-batches.
    for minibatch in minibatches(layers, first, config):
        if method.fresh and tally.norms:  # the policy has moved since
            observing.observe(policy, layers, minibatch, ["new_logp"], config)
            credit(layers, method, memory)
        # Denominators count ALL rows of all ranks before the first backward pass: neither how rows
        # are cut into micro-batches and ranks nor which rows carry a gradient changes the result.
        denominators = distributed.sum_over_ranks(loss_denominators(minibatch, method, config))
        leash = observing.leash(minibatch, method)
        # A KL term goes with the denominators of --normalize, not with a method's own.
        kl_coef = config.kl_coef if method.count is None else 0.0
        # Only rows with a gradient go through the model. They share prefixes, so a micro-batch is a
        # packed tree in which every token stands once; to the loss a row is as if it were alone.
        branches = [
            packing.branch_of(layers, layer.number, row)
            for layer, rows in minibatch
            for row in rows[layer.active(kl_coef or leash)[rows]].tolist()
        ]
        batches = packing.microbatches(branches, config.hardware.tokens_per_microbatch)
        # All ranks make as many passes as the busiest one: gathering weights and summing gradients
        # needs all of them. The others make passes over nothing.
        passes = int(distributed.max_over_ranks(len(batches)))
        for batch in [*batches, *[[]] * (passes - len(batches))]:
            rest = (denominators, method, kl_coef, leash, config, not tally.norms)
            loss_of = lambda pack, rest=rest: batch_loss(policy, reference, pack, *rest)
            for sums in packing.backward(policy, batch, loss_of):
                tally.sums.join(sums)
        if not passes:  # no row has a gradient: skip the update, or momentum alone would make one
            continue
        tally.tried += 1
        norm = distributed.clip_gradient(policy, MAX_GRADIENT_NORM)
        if math.isfinite(norm):
            optimizer.step()
            tally.norms.append(norm)
        else:
            tally.skipped += 1
        optimizer.zero_grad(set_to_none=True)


def batch_loss(policy, reference, pack, denominators, method, kl_coef, leash, config, first):
    """The part of the loss of one micro-batch -> scalar, Metrics of its tokens.

    Nothing here waits for the device. leash: weight of each token's log π_old - log π, the method's
    constraint. first: before the first update the policy is still the one that sampled, so its
    log-probabilities are compared with the sampler's (the gauge). On-policy the ratio is 1 and the
    advantages of a group sum to 0, so the loss is about 0, but its gradient is not.
    """
    sums = Metrics()
    logp, entropy = packing.tree_logprobs(policy, pack, config.temperature)  # [B, T] each
    ref_logp = torch.zeros_like(logp)
    if kl_coef:
        with torch.no_grad():
            ref_logp, _ = packing.tree_logprobs(reference, pack, config.temperature)

    clip_low, clip_high = config.clip[0], config.clip[-1]
    losses = []
    for layer, places, rows in pack.layers:  # places [b] in this batch, rows [b] in the layer
        old_logp, advantages, mask, weights = loss_inputs(layer, rows)  # [b, t], [b], [b, t] twice
        layer_logp, layer_ref = (x[places, : mask.shape[1]] for x in (logp, ref_logp))
        loss, found = policy_loss(
            layer_logp,
            old_logp,
            advantages,
            mask,
            clip_low=clip_low,
            clip_high=clip_high,
            ref_logp=layer_ref,
            kl_coef=kl_coef,
            normalize=method.normalize or config.normalize,
            denominator=denominators[layer.number],
            surrogate=method.surrogate,
            token_weights=weights,
        )
        loss = config.layer_weights[layer.number - 1] * loss  # MGRPO: J = Σ w_k J_k
        if leash:
            loss = loss + leash * ((old_logp - layer_logp) * mask).sum()
        losses.append(loss)
        sums.add(**found, loss=losses[-1].detach())
        if first:
            gap = ((layer_logp.detach() - old_logp) * mask).abs()
            sums.add(gauge=gap.sum(), gauge_tokens=mask.sum())
            sums.largest(gauge_max=gap.max())
    if not losses:  # a pass over nothing
        return 0 * logp.sum(), sums
    padding = pack.tokens.numel() - pack.real_tokens
    sums.add(entropy=entropy.sum(), packed=pack.tokens.numel(), padding=padding)
    return sum(losses), sums


def minibatches(layers, first_question, config):
    """The rows of each optimiser step -> [(layer, row numbers), ...] a step, epochs x minibatches.

    Questions are dealt over the minibatches by their number in the step. Siblings stay together,
    since all rows of a question do.
    """
    for _ in range(config.epochs):
        for m in range(config.minibatches):
            minibatch = []
            for layer in layers:
                slots = layer.questions + first_question  # numbers of the questions in the step
                minibatch.append((layer, (slots % config.minibatches == m).nonzero()[:, 0]))
            yield minibatch


def loss_denominators(minibatch, method, config):
    """-> {layer's number: this rank's part of its denominator}, of all layers of the run."""
    denominators = dict.fromkeys(range(1, len(config.group_sizes) + 1), 0)
    for layer, rows in minibatch:
        denominators[layer.number] = loss_denominator(
            layer.lengths[rows], method.normalize or config.normalize, config.max_new_tokens
        )
        if layer.counts is not None:
            denominators[layer.number] = float(layer.counts[rows].sum())
    return denominators


# ---- metrics: docs/metrics.md explains each ------------------------------------------------------


def rollout_metrics(layers, count):
    """Means over the rows of all ranks, before any training, of up to `count` layers."""
    metrics = dict(undecided=0)
    for number in range(1, count + 1):
        sums = distributed.sum_over_ranks(layer_sums(layers, number))
        rows = sums.pop("rows")
        if not rows:
            continue
        metrics["undecided"] += int(sums.pop("undecided"))
        # The share of groups with a signal: some row is trained with an advantage that is not 0.
        metrics[f"signal{number}"] = sums.pop("with_signal") / sums.pop("groups")
        if number == 1:
            del sums["fix"], sums["broke"]
        # Shares of other numbers than all rows: corrections of right answers, and so on.
        for name, of in (("no_right", "of_right"), ("no_wrong", "of_wrong"), ("fresh", "changed")):
            part, whole = sums.pop(name), sums[of]
            if number > 1 and whole:
                metrics[f"{name}{number}"] = part / whole
        for name in ("of_right", "of_wrong", "changed"):
            del sums[name]
        metrics |= {f"{name}{number}": value / rows for name, value in sums.items()}
    return metrics


def layer_sums(layers, number):
    """{name: sum over this rank's rows of a layer}, zeros for a layer that was not grown."""
    names = ("rows", "groups", "with_signal", "undecided", "reward", "accuracy", "length")
    names += ("truncated", "fix", "broke", "changed", "fresh", "no_right", "no_wrong", "of_right")
    names += ("of_wrong",)
    if number > len(layers):
        return dict.fromkeys(names, 0)
    layer = layers[number - 1]
    right, own = layer.correct, slice(None) if layer.given is None else ~layer.given
    before = right
    if number > 1:  # what was corrected, though the method may have put other text in its place
        above = layers[number - 2]
        before = above.correct if above.sampled_correct is None else above.sampled_correct
        before = before[layer.parents]
    values = dict(
        undecided=layer.undecided,
        reward=layer.rewards,
        accuracy=right,
        length=layer.lengths,
        truncated=layer.truncated,
        fix=~before & right,  # against the parent
        broke=before & ~right,
        changed=layer.changed,
        fresh=layer.fresh,
        no_right=layer.changed & before,
        no_wrong=layer.changed & ~before,
        of_right=before,
        of_wrong=~before,
    )
    return dict(
        rows=len(right[own]),  # that were sampled
        groups=len(layer.siblings.unique()),
        with_signal=len(layer.siblings[layer.active(0)].unique()),
        **{name: value[own].double().sum().item() for name, value in values.items()},
    )


def loss_metrics(tally):
    """Means over the trained tokens of all ranks; of the loss over the optimiser steps."""
    names = ("tokens", "clipped", "kl", "ratio", "loss", "entropy")
    names += ("gauge", "gauge_tokens", "packed", "padding")
    sums = tally.sums
    gauge_max = distributed.max_over_ranks(float(sums.get("gauge_max", 0.0)))
    sums = distributed.sum_over_ranks({name: float(sums.get(name, 0.0)) for name in names})
    tokens = max(sums["tokens"], 1)
    return dict(
        loss=sums["loss"] / max(tally.tried, 1),
        **{name: sums[name] / tokens for name in ("clipped", "entropy", "kl", "ratio")},
        gauge_max=gauge_max,
        gauge_mean=sums["gauge"] / max(sums["gauge_tokens"], 1),
        packed=int(sums["packed"]),
        padding=sums["padding"] / max(sums["packed"], 1),
    )


# ---- evaluation ----------------------------------------------------------------------------------


def held_out_tables(name, run, sampler, task, config):
    """The paper's rows for the model as it is -> {"greedy": results, "temperature 1": results}."""
    # Another seed asks other questions with other random numbers, so that results over seeds show
    # how much both matter.
    problems = task.held_out(config.eval_questions, config.seed)
    rows = {"greedy": 0.0, "temperature 1": 1.0}
    with run.evaluating():
        return {
            row: evaluate(
                sampler,
                task,
                problems,
                turns=turns(config),
                temperature=temperature,
                seed=config.seed,
                name=f"{name}, {row}",
            )
            for row, temperature in rows.items()
        }


def quick_evaluation(run, sampler, task, config):
    """Greedy accuracies on some held-out questions -> metrics, with standard errors.

    It draws no random numbers and changes nothing: a run with it is bit for bit the run without.
    """
    clock = time.perf_counter()
    problems = task.held_out(min(QUICK_QUESTIONS, config.eval_questions), config.seed)
    with run.evaluating():
        results = evaluate(sampler, task, problems, turns=turns(config), name="held-out questions")
    shown = (f"Acc@t{k} {percent(results[f't{k}'])}" for k in range(1, turns(config) + 1))
    say(f"held out, {results['questions']} questions, greedy: {', '.join(shown)}")
    return as_metrics(results) | dict(seconds_heldout=time.perf_counter() - clock)


# ---- settings ------------------------------------------------------------------------------------


def label(config):
    """Name of the method in folders and tables."""
    if config.method == "mgrpo":
        return "MGRPO" if len(config.group_sizes) > 1 else "GRPO"
    return config.method


def method_of(config):
    """mgrpo.Method. BadInput for a method or a constant that does not exist."""
    try:
        return table.method_of(config.method, config.method_args)
    except ValueError as error:
        flag = "--method-args" if config.method in table.METHODS else "--method"
        raise BadInput(f"{flag}: {error}") from None


def needs_reference(config):
    """A KL term does, and a method that looks at a reference."""
    return bool(config.kl_coef) or any(
        name.startswith("ref_") for name in method_of(config).observe
    )


def turns(config):
    """Answers in a row to a question in evaluation."""
    return config.turns or max(2, len(config.group_sizes))


def rows_per_question(group_sizes):
    """[g_1, g_1 g_2, g_1 g_2 g_3, ...]"""
    return [math.prod(group_sizes[:k]) for k in range(1, len(group_sizes) + 1)]


def check(config):
    """BadInput for values that cannot work together, with the consequence and the remedy."""
    sizes, text = config.group_sizes, ",".join(map(str, config.group_sizes))
    if math.prod([config.prompts, *sizes]) * len(sizes) > MOST_ROWS:
        raise BadInput(
            f"--prompts {config.prompts} and --group-sizes {text} make too many rows a step: lower "
            f"them to {MOST_ROWS:,} at most"
        )
    looks = config.puzzle.looks
    if not config.init and max(len(sizes), turns(config)) > looks:
        asked = f"--turns {config.turns}" if config.turns > looks else f"--group-sizes {text}"
        raise BadInput(
            f"{asked} asks for {max(len(sizes), turns(config))} answers in a row, and the base's "
            f"texts have {looks}: beyond them its accuracy collapses; ask for fewer, or raise "
            "--looks, which makes another base"
        )
    if 0 < config.turns < len(sizes):
        raise BadInput(
            f"--turns {config.turns}: --group-sizes {text} trains {len(sizes)} answers in a row; "
            "ask for as many or more"
        )
    method = method_of(config)
    why = method.fits(sizes) if method.fits else ""
    if why:
        own = ",".join(map(str, table.METHODS[config.method].flags["group_sizes"]))
        raise BadInput(
            f"--group-sizes {text}: --method {config.method} {why}; say --group-sizes {own}"
        )
    if max(sizes) == 1 and not method.alone:
        raise BadInput(
            f"--group-sizes {text}: no answer has a sibling to be compared with; use 2 or more in "
            "some layer"
        )
    if 1 in sizes[1:] and method.siblings == "parent" and not method.alone:
        raise BadInput(
            f"--group-sizes {text}: an answer's only correction has no siblings, so its layer "
            "would learn nothing; use 2 or more, or --method-args siblings=question or failed=raw"
        )
    unread = dict(
        normalize=bool(method.normalize) and "its own denominator",
        clip=method.surrogate != "clipped" and "a loss without a clip",
    )
    for name, has in unread.items():
        if has and getattr(config, name) != getattr(Config, name):
            raise BadInput(
                f"--{name.replace('_', '-')} means nothing to --method {config.method}, which has "
                f"{has}; leave it out"
            )
    if config.kl_coef and (method.decay < 1 or method.count):
        why = "its reference follows the policy" if method.decay < 1 else "it has a constraint"
        raise BadInput(
            f"--kl-coef: --method {config.method} goes with no KL term ({why}); drop --kl-coef"
        )
    parts = config.minibatches * distributed.size()
    if config.prompts % parts:
        ranks = f" on each of {distributed.size()} ranks" if distributed.size() > 1 else ""
        raise BadInput(
            f"--prompts {config.prompts} does not divide into --minibatches {config.minibatches}"
            f"{ranks}: choose a multiple of {parts}"
        )
    if config.layer_weights and len(config.layer_weights) != len(sizes):
        raise BadInput(
            f"--layer-weights has {len(config.layer_weights)} numbers and --group-sizes {text} "
            f"{len(sizes)} layers: give one for each"
        )
    if min(config.layer_weights, default=0) < 0:
        raise BadInput("--layer-weights: a negative weight would unlearn its layer; use 0 or more")
    low, high = config.clip[0], config.clip[-1]
    if len(config.clip) > 2 or not 0 < low < 1 or high <= 0:
        raise BadInput(
            f"--clip {','.join(map(str, config.clip))}: give ε in (0, 1), or two numbers, the "
            "first in (0, 1) and the second above 0"
        )
    file_name("name", config.name)


def settled(config, policy, task):
    """The config with nothing left open: what config.json and saved states hold."""
    what = Path(config.init).resolve().name if config.init else task.name
    recompute = {"auto": "yes" if config.init else "no"}
    hardware = dataclasses.replace(
        config.hardware,
        device=policy.cos.device.type,
        dtype=str(policy.compute).removeprefix("torch."),
        recompute=recompute.get(config.hardware.recompute, config.hardware.recompute),
    )
    return dataclasses.replace(
        config,
        preset=opening.preset_name(config.preset, config.hardware.device),
        name=config.name or f"{what}-{label(config).lower()}-{config.seed}",
        max_new_tokens=task.max_new_tokens,
        layer_weights=config.layer_weights or (1.0,) * len(config.group_sizes),
        real=dataclasses.replace(config.real, template=opening.template_of(policy)),
        hardware=hardware,
    )


def settings(config):
    """The config as a flat dict; for a model of --init without what would have made a base."""
    unused = {"preset", *flat(config.puzzle), *flat(config.base)} if config.init else set()
    return {k: v for k, v in flat(config).items() if k not in unused} | dict(resume="")


def how_to_evaluate(run):
    config = run.config
    if not config.init:
        return f"python eval.py {run.folder}"
    verifier = "" if config.real.verifier == "rules" else f" --verifier {config.real.verifier}"
    files = ",".join(config.eval_data or config.data)
    return f"python eval.py {run.folder} --data {files}{verifier}"


# ---- the command line ----------------------------------------------------------------------------

BIASED = (
    "rollouts must be drawn from the distribution whose log-probabilities are trained, or the "
    "gradient is biased; evaluation may filter: python eval.py --help"
)
REFUSED = dict.fromkeys(("top_k", "top_p", "min_p"), BIASED)
RENAMED = dict(
    failed="--method-args failed=keep",
    sources="--method-args sources=wrong",
    siblings="--method-args siblings=parent",
    layers="--group-sizes 4,3 has as many layers as numbers",
    attempts="the first number of --group-sizes",
    corrections="the second number of --group-sizes",
    layer2_weight="--layer-weights 1,1",
    clip_low="--clip 0.2",
    clip_high="--clip 0.2,0.28",
    group="--method-args siblings=parent",
    kl="the estimator is k3; mgrpo.kl_estimate has the others",
    pack="trees are always packed",
    update="all layers share one optimiser step",
    resample="there is no dynamic sampling; a group without a signal has no gradient",
    compile="it did not pay (docs/speed.md)",
    offload_optimizer="lower --tokens-per-microbatch, or use more GPUs (docs/memory.md)",
    keep="the last two states and the best are kept",
    look_questions="a quick evaluation asks 256 questions, or --eval-questions if that is less",
    quiet="TQDM_DISABLE=1 turns progress bars off",
    tensorboard="report.html and metrics.jsonl have the curves",
)


def presets(given):
    """The values under the given flags. BadInput for flags of one kind of run given to another."""
    if given.get("resume"):
        stored = resumed_settings(given, flags.kinds(Config))
        return {name: stored[name] for name in flat(Config()) if name in stored}
    if given.get("init"):
        for name in {*flat(TaskConfig()), *flat(BaseConfig()), "preset"} & given.keys():
            raise BadInput(
                f"--{name.replace('_', '-')} is about bases that are made here; drop it with --init"
            )
        init = Path(given["init"])
        if init.is_file() or (init / "checkpoint.pt").exists():
            raise BadInput(
                f"--init {init} is no folder of a model in Hugging Face's format; a run on a "
                "built-in task continues with --resume"
            )
        if not given.get("data"):
            raise BadInput(
                "--data is missing: a model of --init learns from files of problems, say "
                "--data gsm8k/train.jsonl"
            )
        # The paper's; tokens and transcripts are ours.
        return of_method(given, PAPER | dict(lr=5e-7, tokens=100_000_000, transcripts=1))
    for name in {"data", "eval_data", *flat(RealConfig())} & given.keys():
        raise BadInput(
            f"--{name.replace('_', '-')} needs --init: the built-in tasks make their own problems"
        )
    return of_method(given, opening.preset(given, PRESETS))


def of_method(given, values):
    """The values of a preset, with those that belong to the method of --method."""
    name = given.get("method", "mgrpo")
    if name == "mgrpo" or name not in table.METHODS:  # `check` refuses the latter
        return values
    # One layer of as many answers as the preset's tree has, and nothing that is MGRPO's.
    sizes = values.get("group_sizes", Config.group_sizes)
    values = {k: x for k, x in values.items() if k not in ("method_args", "kl_coef")}
    values["group_sizes"] = (sum(rows_per_question(sizes)),)
    return values | table.METHODS[name].flags


def main():
    config = parse_flags(
        Config, f"{__doc__}\n{table.listing()}\n", presets, refused=REFUSED, renamed=RENAMED
    )
    if config.resume:
        folder = resumed_run(config.resume, config.name)
        config = dataclasses.replace(config, name=folder.name)
    page.at_the_end(train(config), say)


if __name__ == "__main__":
    distributed.run(main)
