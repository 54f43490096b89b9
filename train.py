"""MGRPO from a base model to the paper's table: sample layer 1, sample layer 2, score, advantages, loss, step, log.

    python train.py                          # no GPU, no download: a base model, then MGRPO, then the table; minutes on 2 cores
    python train.py --layers 1 --attempts 16 # plain GRPO with as many rollouts per question
    python train.py --preset smoke           # the same in under a minute, on a toy size
    python train.py --init path/to/Qwen2.5-Math-1.5B --data gsm8k/train.jsonl --eval-data gsm8k/test.jsonl

The idea. One step draws P questions and grows a tree on each: G attempts, and H corrections of every attempt. Both layers are
scored by a rule and trained by one loss (mgrpo.py); nothing else makes it "multi-layer". A run ends after `--tokens` generated
tokens, not after steps, so that runs of different shape compare at equal cost.

A run leaves in out/<run>/: config.json, metrics.jsonl (a line per step, every field by name), samples.md (whole trees, the best and
the worst), result.json (the table), and checkpoint.pt or, from --init, model/ in Hugging Face's format (eval.py reads both). README
explains every column of the log.
"""
import copy
import dataclasses
import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tqdm import tqdm

import memory
import pretrain
from data import DataSet, names
from eval import ROWS, evaluate, held_out_questions, make_sampler, make_verifier, max_new_tokens, table
from flags import BadInput, guarded, make_folder, parse_flags
from journal import log, rollout_metrics, run_folder, say, write_json, write_samples
from kernels import fold
from mgrpo import Sampling, collect, completion_logprobs, loss_denominator, pack, policy_loss
from model import ModelConfig, save_checkpoint
from pretrain import base_model, pick_device, pick_preset, resolve
from prompts import model_folder, open_shape, open_weights
from tasks import draw, longest_phrase, task_of, token_limits
from tokenizer import build_encoding
from weights import library


@dataclass(frozen=True)
class Config(pretrain.Config):
    init: str = ""            # folder of a model in Hugging Face's format to start from; empty: a base of the built-in task
    data: str = ""            # files of problems for it (data.py), separated by commas
    eval_data: str = ""       # files to evaluate on; empty: every eighth problem of --data, which is then not trained on
    template: Literal["auto", "paper", "words", "chatml", "llama3", "plain"] = "auto"    # of prompts (prompts.py); auto: the model's own
    prompt_tokens: int = 512  # questions whose prompt is longer are left out
    verifier: Literal["rules", "math-verify"] = "rules"           # who says what is right: reward.py, or that library
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


REFUSED = dict.fromkeys(("top_k", "top_p", "min_p"), "rollouts must be drawn from the distribution whose log-probabilities are trained, or "
                        "the gradient is biased; evaluation may filter: python eval.py --help")


def presets(given):
    """What stands under the given flags. BadInput for flags of the one kind of run given to the other."""
    own = {field.name for field in dataclasses.fields(pretrain.Config)} - {"device", "dtype"}
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


def validate(c):
    """BadInput for values that cannot work together, with the consequence and the way out."""
    for name in ("tokens", "prompts", "attempts", "corrections", "epochs", "minibatches", "rows"):
        if getattr(c, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(c, name)}: must be at least 1")
    for name, least in (("eval_questions", 2), ("prompt_tokens", 1), ("cache_tokens", 0), ("max_new_tokens", 0), ("lr", 0), ("kl_coef", 0),
                        ("layer2_weight", 0)):
        if not least <= getattr(c, name) < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(c, name)}: must be a number of at least {least}")
    if c.layers not in (1, 2):
        raise BadInput(f"--layers {c.layers}: 1 is GRPO, 2 is MGRPO")
    if c.layers == 2 and c.corrections == 1 and c.group == "attempt" and c.failed != "raw":
        raise BadInput("--corrections 1: an attempt's only correction has no siblings to be better than, so layer 2 would learn "
                       "nothing; use --corrections 2 or more, --group question, or --failed raw")
    if c.layers == 1 and c.attempts == 1:
        raise BadInput("--attempts 1: a single answer has no siblings to be better than; use --attempts 2 or more")
    if c.prompts % c.minibatches:
        raise BadInput(f"--prompts {c.prompts} does not divide into --minibatches {c.minibatches}: choose a multiple")
    if c.failed == "raw" and c.group == "question":
        raise BadInput("--failed raw takes the reward itself as advantage, so --group question would change nothing; drop one of them")
    if not 0 < c.temperature < math.inf:
        raise BadInput(f"--temperature {c.temperature}: rollouts must be sampled; greedy ones are all alike and teach nothing")
    if not 0 <= c.format_weight <= 0.5:
        raise BadInput(f"--format-weight {c.format_weight} is not in [0, 0.5]: form could pay better than being right")
    if not 0 < c.clip_low < 1 or c.clip_high <= 0:
        raise BadInput(f"--clip-low {c.clip_low} must lie in (0, 1) and --clip-high {c.clip_high} above 0")


# ------------------------------------------------------------------------------------------------------------------ loop

class Setup(NamedTuple):
    """What a run needs to know before any weights are there."""
    c: Config                 # with nothing left open
    encoding: Any
    task: Any                 # of tasks.py, or a data.DataSet
    shape: ModelConfig
    load: Any                 # () -> the policy and where it came from
    verifier: Any


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


def rollouts_and_steps(setup, planned):
    """Table, loop, table -> the run's folder."""
    c, encoding, task, verifier = setup.c, setup.encoding, setup.task, setup.verifier
    policy, base_path = setup.load()
    folder, start = run_folder(c.run, settings(c), base_path), time.time()
    policy.recompute = c.recompute == "yes"
    optimizer = memory.make_optimizer(policy, c.lr, c.offload_optimizer)
    reference = frozen(policy) if c.kl_coef else None
    sampler = make_sampler(policy, c.cache_tokens, row_tokens(setup), wanted_tokens(setup), later(planned))
    results = {"base": final_table(sampler, encoding, task, c, "base", verifier)}
    write_json(folder / "result.json", results)
    generated, step, updates, bar = 0, 0, 0, tqdm(total=c.tokens, unit="tok", unit_scale=True, desc=c.run, disable=None)
    try:
        while generated < c.tokens:
            problems = [draw(task, "train", f"rl/{c.seed}", step * c.prompts + i) for i in range(c.prompts)]
            clock = time.perf_counter()
            how = Sampling(c.max_new_tokens, c.temperature, fold(c.seed, step), c.format_weight, verifier=verifier)
            layers = collect(sampler, encoding, problems, c.attempts, c.corrections, how,                 # MGRPO: two of them
                             layers=c.layers, sources=c.sources, failed=c.failed, group=c.group)
            sampled = time.perf_counter()
            lr = c.lr * (1 - generated / c.tokens)
            for parameters in optimizer.param_groups:
                parameters["lr"] = lr
            learned = learn(policy, reference, optimizer, layers, c)
            sampler.refresh()
            seconds = sampled - clock, time.perf_counter() - sampled
            new = sum(int(layer.lengths.sum()) for layer in layers)
            generated, step = generated + new, step + 1
            log(folder, bar, dict(step=step, generated=generated) | rollout_metrics(layers) | learned
                | dict(tokens_per_s=new / sum(seconds), seconds_sampling=seconds[0], seconds_training=seconds[1], lr=lr,
                       seconds=time.time() - start, peak_gb=memory.peak(c.device) / memory.GB))
            updates += learned["updates"]
            if step == 1:
                say(f"memory, GB: {memory.peak(c.device) / memory.GB:.2f} at most up to here"
                    f"{'' if c.device == 'cuda' else ', Python and torch themselves included'}")
            if step == 1 or 10 * generated // c.tokens > 10 * (generated - new) // c.tokens:               # ten times a run
                write_samples(folder / "samples.md", step, layers, problems, encoding)
                save(folder, policy, c)
            bar.update(new)
        save(folder, policy, c)
        if not updates:
            say("nothing was learnt: no group had both right and wrong answers. An easier task, more --attempts or longer answers may help")
        results[method(c)] = final_table(sampler, encoding, task, c, method(c), verifier)
    except KeyboardInterrupt:
        save(folder, policy, c)
        say(f"stopped after step {step}: {how_to_evaluate(folder, c)} shows how far it got")
        raise
    finally:
        bar.close()
    finish(folder, results, c, time.time() - start)
    return folder


def prepare(c):
    """Checks the config and reads all but the weights, so that what is wrong is said at once -> Setup."""
    validate(c)
    measured, c = c.dtype == "auto" and pick_device(c.device) == "cpu", resolve(c)
    name = Path(c.init).resolve().name if c.init else c.task
    c = dataclasses.replace(c, run=c.run or f"{name}-{method(c).lower()}-{c.seed}", recompute={"auto": "yes" if c.init else "no"}.get(
        c.recompute, c.recompute))
    say(f"{c.device}, {c.dtype} compute over float32 masters{' (measured to be the faster here)' if measured else ''}")
    setup = (real_model if c.init else tiny_model)(c)
    say(str(setup.task))
    make_folder("out")
    return setup


def tiny_model(c):
    """A built-in task, and its base from out/ or yet to be made -> Setup."""
    task, encoding, longest = task_of(c), build_encoding(), token_limits(task_of(c))[1]
    if c.max_new_tokens > longest:
        raise BadInput(f"--max-new-tokens {c.max_new_tokens}: a question and two such completions may not fit the context of this task's "
                       f"model; use at most {longest}, or 0 for that")
    c = dataclasses.replace(c, max_new_tokens=c.max_new_tokens or longest)
    return Setup(c, encoding, task, pretrain.shape_for(c, encoding, task), lambda: base_model(base_config(c), say)[::2], None)


def real_model(c):
    """The model of --init with the questions of --data -> Setup."""
    folder = model_folder(c.init)
    shape, encoding = open_shape(folder, c.template)
    library()                                                # missing? say so before the weights are needed
    c = dataclasses.replace(c, max_new_tokens=max_new_tokens(shape, encoding, c.prompt_tokens, c.max_new_tokens),
                            template=encoding.template_name)
    task = DataSet(names(c.data), encoding, c.prompt_tokens, names(c.eval_data), say)
    load = lambda: (open_weights(folder, shape, encoding, getattr(torch, c.dtype), c.device), c.init)
    return Setup(c, encoding, task, shape, load, make_verifier(c.verifier))


def frozen(policy):
    """The reference: the policy as it is now, in the compute type (in which it is cast at every use anyway: the same log-probabilities)."""
    reference = copy.deepcopy(policy).requires_grad_(False)
    for parameter in reference.parameters():
        parameter.data = parameter.data.to(policy.compute)
    return reference


def plan(setup, total):
    """memory.plan for the flags of a run on a device with `total` bytes."""
    c, shape, phrase = setup.c, setup.shape, longest_phrase(setup.encoding)
    prompt = c.prompt_tokens if c.init else shape.context - 2 * c.max_new_tokens - phrase
    return memory.plan(shape, compute=getattr(torch, c.dtype), rows=c.rows, prompts=c.prompts, attempts=c.attempts,
                       corrections=c.corrections, prompt=prompt, completion=c.max_new_tokens, layers=c.layers,
                       cache_tokens=c.cache_tokens, reference=c.kl_coef > 0, recompute=c.recompute == "yes",
                       offload=c.offload_optimizer, device=c.device, total=total, phrase=phrase)


def row_tokens(setup):
    """Tokens of the longest row: prompt, two completions, a phrase."""
    c = setup.c
    return c.prompt_tokens + 2 * c.max_new_tokens + longest_phrase(setup.encoding) if c.init else setup.shape.context


def wanted_tokens(setup):
    """Tokens that a rollout would have cached at a time, or a batch of evaluation."""
    c = setup.c
    rollout = memory.kv_tokens(c.prompts, c.attempts, c.corrections, c.prompt_tokens, c.max_new_tokens, c.layers)
    return max(rollout, min(c.eval_questions, ROWS) * row_tokens(setup)) if c.init else 0


def later(planned):
    """Bytes that a step will take after the sampler has looked how much is free: gradients, Adam, activations, logits."""
    return planned["masters and gradients"] // 2 + sum(planned[what] for what in ("Adam", "activations", "logits"))


def base_config(c):
    """The part of a config that makes the base."""
    return pretrain.Config(**{field.name: getattr(c, field.name) for field in dataclasses.fields(pretrain.Config)})


def learn(policy, reference, optimizer, layers, c):
    """Epochs x minibatches of optimiser steps on one rollout -> diagnostics, means over its steps or over the tokens trained on."""
    sums, norms = {}, []
    for epoch in range(c.epochs):
        for parts in optimiser_steps(layers, c):
            for layer, rows in parts:
                first = epoch == 0 and not norms                      # the policy still is the one that sampled
                for name, value in accumulate(policy, reference, layer, rows, c, first).items():
                    sums[name] = max(sums.get(name, 0.0), value) if name.startswith("gauge_max") else sums.get(name, 0.0) + value
            if any(p.grad is not None for p in policy.parameters()):  # all advantages 0: Adam's momentum alone is no reason to move
                norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item())
                check_finite(norms[-1])
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    tokens = max(sums.get("tokens", 0), 1)
    return dict(loss=sums.get("loss", 0.0) / max(len(norms), 1), grad_norm=sum(norms) / max(len(norms), 1), updates=len(norms),
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


def check_finite(norm):
    if not torch.isfinite(torch.tensor(norm)):
        raise BadInput("the gradient is not finite; the last checkpoint is intact. Lower --lr, or use --dtype float32")


# --------------------------------------------------------------------------------------------------------------- results

def method(c):
    return "MGRPO" if c.layers == 2 else "GRPO"


def settings(c):
    """The config as a dict; for a model from --init without what made a base here."""
    base = {field.name for field in dataclasses.fields(pretrain.Config)} - {"device", "dtype"} if c.init else set()
    return {name: value for name, value in dataclasses.asdict(c).items() if name not in base}


def save(folder, policy, c):
    """A built-in task's model as checkpoint.pt, a real one as it came: a folder that transformers and vLLM load."""
    if c.init:
        policy.save_pretrained(folder / "model", policy.compute)
    else:
        save_checkpoint(folder / "checkpoint.pt", policy, config=dataclasses.asdict(c))


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
    train(parse_flags(Config, __doc__, presets, refused=REFUSED))


if __name__ == "__main__":
    guarded(main)
