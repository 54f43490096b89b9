"""The base model that RL starts from: next-token training on the task's own texts, until it does
what they do.

    python pretrain.py                           # makes out/base-<hash>.pt, about three minutes on
                                                 2 CPU cores
    python pretrain.py --task chain --modulus 23
    python pretrain.py --data gsm8k/train.jsonl --tokenizer path/to/tokenizer --save out/tiny-qwen       # on worked solutions, as a Qwen2

The idea. RL sharpens what a model already does sometimes; it cannot find what is never sampled. So
the base must answer in the format, must err, and must hold the seed of checking. It reads two kinds
of text (tasks.py), half and half:

    solution   question | attempt                            one candidate, blindly chosen, computed
               honestly
    review     question, attempt, phrase | correction        compares first, and doubts too much

with the loss on what stands after the bar. Training stops by MEASURED accuracy, not by the clock:
the texts' own accuracy in both turns is the ceiling, and once the model comes near it the learning
rate decays to 0 and that is the base. (Comparing is learnt after the arithmetic and suddenly; a
base that stops before it leaves layer 2 nothing to strengthen.)

The base is kept under out/, named by a hash of everything that made it: the settings below and the
code that ran. A changed setting never meets a wrong base; a file that is damaged, which its
checksum shows, is put aside, and the base made anew.

With --data it learns worked solutions of a data set instead, in the format that the paper's
template asks for, and is saved as others save theirs. Such a model is far too small to solve
anything; it is there so that the way from files to files can be walked without a download.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C while torch is imported is one sentence too

# isort: split
import collections
import dataclasses
import hashlib
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import mgrpo
from huggingface import prompts
from huggingface.weights import library
from mgrpo import PHRASES, Sampling, completion_logprobs, expand, pad_rows, phrase_text, second_look
from model import GPT, ModelConfig, compute_dtype, load_checkpoint, save_checkpoint
from runtime import bars, distributed
from runtime.flags import BadInput, check_fields, guarded, make_folder, parse_flags
from sample import Sampler
from tasks.catalog import TASKS
from tasks.files import names, read_problems
from tasks.legacy import attempt_to_review, draw, prompts_and_golds, task_of, token_limits
from tasks.problems import prompt_text
from tasks.tokenizer import build_encoding

CHECK_EVERY = 50  # steps between measurements
CHECK_ON = 512  # problems per measurement
CHECKS = 3  # measurements averaged before they count: together a standard error of .01
NEAR = 0.90  # decay begins when accuracy in both turns is this share of the texts' own
LR = 1e-3  # peak learning rate at depth 4 (width 128), smaller as 1 / sqrt(width)
DECAY = 0.12  # length of the decay, as a share of the steps before it
# tokens of a worked solution with its prompt, at most: a review holds it twice, and a context 2,048
SOLUTION = 960


@dataclass(frozen=True)
class Config:
    # sizes that go together; flags override single values
    preset: Literal["auto", "cpu", "gpu", "smoke"] = "auto"
    # guess and check | arithmetic chain | make a number
    task: Literal["solve", "chain", "countdown"] = "solve"
    candidates: int = 3  # solve: most candidates for x
    operations: int = 4  # solve, chain: most operations of a problem
    modulus: int = 11  # solve, chain: arithmetic is mod this
    numbers: int = 4  # countdown: how many numbers are given
    depth: int = 4  # model: number of blocks, and of heads; the width is 32 x depth
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    # compute; masters are fp32. auto: the faster one, measured
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    base_seed: int = 0  # seed of the base model: its weights and its texts
    # base training gives up after so many tokens (it stops by accuracy before)
    base_tokens: int = 6_000_000


PRESETS = {
    "cpu": {},  # the defaults above: what two cores train in minutes
    # harder, since a larger model saturates the small task
    "gpu": dict(candidates=5, operations=6, modulus=23, depth=12, base_tokens=200_000_000),
    # the least that still learns both skills: ends in seconds
    "smoke": dict(candidates=2, operations=2, modulus=5, depth=2, base_tokens=1_500_000),
}


def preset_name(preset, device):
    """ "auto" is gpu where CUDA is and may be used, else cpu."""
    return (
        preset
        if preset != "auto"
        else "gpu"
        if torch.cuda.is_available() and device != "cpu"
        else "cpu"
    )


def pick_preset(given, presets=PRESETS):
    """What a preset puts under the given flags. BadInput for a difficulty that the task does not
    have."""
    task, difficulty = (
        given.get("task", "solve"),
        {"candidates", "operations", "modulus", "numbers"},
    )
    concerned = difficulty & {field.name for field in dataclasses.fields(TASKS[task])}
    for name in difficulty & given.keys() - concerned:
        raise BadInput(
            f"--{name} means nothing to the task {task}, whose difficulty is set by "
            f"--{' and --'.join(sorted(concerned))}"
        )
    return presets[preset_name(given.get("preset", "auto"), given.get("device", "auto"))]


def pick_device(name):
    """-> "cpu" or "cuda". BadInput for cuda where there is none, or fewer than torchrun started
    processes on this machine."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    device, there = (
        name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu",
        torch.cuda.device_count(),
    )
    if device == "cuda" and int(os.environ.get("LOCAL_RANK", 0)) >= there:
        raise BadInput(
            f"torchrun's --nproc_per_node is more than the {there} GPUs of this machine: use "
            f"{there}, or --device cpu"
        )
    return device


def resolve(config):
    """The config with preset, device and compute type settled and checked."""
    if not 1 <= config.depth <= 64:
        raise BadInput(f"--depth {config.depth} is out of range: choose 1 to 64")
    if config.base_tokens < 1:
        raise BadInput(f"--base-tokens {config.base_tokens}: a base reads at least 1")
    device = pick_device(config.device)
    # measured by one for all
    dtype = str(distributed.from_rank0(lambda: compute_dtype(config.dtype, device))).removeprefix(
        "torch."
    )
    return dataclasses.replace(
        config, preset=preset_name(config.preset, config.device), device=device, dtype=dtype
    )


# ---- texts ---------------------------------------------------------------------------------------


def text_pair(task, encoding, seed, index, review):
    """Text `index` of the stream -> (prompt ids, target ids with the end token); the loss is on the
    target alone."""
    problem, rng = draw(task, "train", f"base/{seed}", index), random.Random(f"text/{seed}/{index}")
    attempt = attempt_to_review(task, problem, rng) if review else task.attempt(problem, rng)
    if review:
        prompt = prompt_text(problem) + attempt.text + phrase_text(rng.choice(PHRASES))
        target = task.review(problem, attempt, rng)
    else:
        prompt, target = prompt_text(problem), attempt.text
    return encoding.encode_ordinary(prompt), encoding.encode_ordinary(target) + [encoding.eot_token]


def batches(task, encoding, config, step):
    """The two micro-batches of a step, solutions and reviews apart because their lengths are: 12 of
    each, more for a wider model.

    Small steps, because what is to be learnt comes suddenly after about 1,200 of them, hardly
    sooner with twice the texts in each.
    """
    half = max(12, 12 * (config.depth // 4) ** 2)
    for review in (False, True):
        pairs = [
            text_pair(task, encoding, config.base_seed, (2 * step + review) * half + i, review)
            for i in range(half)
        ]
        yield pad_rows(*zip(*pairs), config.device)


def texts_accuracy(task, count):
    """Accuracy of the texts themselves in turn 1 and 2: what a model that learnt them perfectly
    would score."""
    right = [0, 0]
    for index in range(count):
        problem, rng = draw(task, "train", "check", index), random.Random(index)
        attempt = task.attempt(problem, rng)
        for turn, text in enumerate((attempt.text, task.review(problem, attempt, rng))):
            right[turn] += mgrpo.score(text, problem.gold).accuracy
    return right[0] / count, right[1] / count


def measure(sampler, encoding, task, count, max_new_tokens):
    """Accuracy of the model at temperature 1 in both turns, on training-side questions from a
    stream of their own."""
    prompts, golds = prompts_and_golds(
        encoding, [draw(task, "train", "check", index) for index in range(count)]
    )
    how = Sampling(max_new_tokens, 1.0, seed=0)
    first = expand(sampler, encoding, golds, prompts, 1, how)
    second = second_look(sampler, encoding, golds, first, 1, how)
    return first.correct.float().mean().item(), second.correct.float().mean().item()


# ---- training ------------------------------------------------------------------------------------


def shape_for(config, encoding, task):
    """The ModelConfig of a base; its context holds the longest question, two completions and a
    phrase."""
    heads, width, (question, completion) = config.depth, 32 * config.depth, token_limits(task)
    return ModelConfig(
        encoding.n_vocab,
        width,
        config.depth,
        heads,
        kv_heads=1 if heads % 4 else heads // 4,
        head_size=32,
        hidden=3 * width,
        context=question + 2 * completion + 8,
        qk_norm=True,
        end_tokens=(encoding.eot_token,),
    )


def new_model(config, shape):
    """An untrained GPT of this shape, by the config's seed."""
    torch.manual_seed(config.base_seed)
    return GPT(shape, getattr(torch, config.dtype)).to(config.device)


def pretrain(config, say=print):
    """Trains a base model -> model, {"t1", "t2": measured accuracy, "tokens"}. `config` must be
    resolved."""
    encoding, task = build_encoding(), task_of(config)
    max_new = token_limits(task)[1]
    gpt = new_model(config, shape_for(config, encoding, task))
    peak = LR * (4 / config.depth) ** 0.5
    optimizers = make_optimizers(gpt, peak)
    sampler, ceiling = Sampler(gpt), texts_accuracy(task, 4 * CHECK_ON)
    say(
        f"base: {sum(p.numel() for p in gpt.parameters()):,} parameters in {config.dtype}; its "
        "texts are right in "
        f"{ceiling[0]:.2f} of attempts, {ceiling[1]:.2f} of reviews"
    )
    tokens, step, decay_from, near, recent = (
        0,
        0,
        None,
        False,
        collections.deque([(0.0, 0.0)] * CHECKS, CHECKS),
    )
    bar = bars.bar(config.base_tokens, "base model", "tok", unit_scale=True)
    while decay_from is None or step < decay_from * (1 + DECAY):
        seen = train_step(
            gpt,
            optimizers,
            list(batches(task, encoding, config, step)),
            learning_rate(peak, step, decay_from),
        )
        tokens, step = tokens + seen, step + 1
        bar.update(seen)
        if decay_from is None and step % CHECK_EVERY == 0:
            sampler.refresh()
            recent.append(measure(sampler, encoding, task, CHECK_ON, max_new))
            found = [sum(accuracy) / CHECKS for accuracy in zip(*recent)]
            near = all(f >= NEAR * c for f, c in zip(found, ceiling))
            bar.set_postfix_str(f"right {found[0]:.2f} {found[1]:.2f}")
        if decay_from is None and (near or tokens * (1 + DECAY) > config.base_tokens):
            decay_from = step
    bar.close()
    sampler.refresh()
    found = measure(sampler, encoding, task, 2 * CHECK_ON, max_new)
    say(
        f"base: right in {found[0]:.2f} of attempts and {found[1]:.2f} of reviews after "
        f"{tokens / 1e6:.1f} M tokens, {step} steps"
    )
    if not near:
        say(
            "base: WARNING: that is below the bar; RL may find nothing to strengthen. Raise "
            "--base-tokens, or make the task easier"
        )
    return gpt, dict(t1=found[0], t2=found[1], tokens=tokens)


def make_optimizers(gpt, lr):
    """Muon on the blocks' matrices, AdamW on embeddings and vectors, at one learning rate.

    Muon (K. Jordan 2024) turns each update into the nearest orthogonal matrix, so that rare
    directions learn as fast as common ones; scaled to AdamW's usual step size (arXiv 2502.16982,
    eq. 4). Here it learns arithmetic and comparing in 1,200 steps; AdamW alone was not there after
    2,000.
    """
    groups = gpt.parameter_groups()
    plain = [dict(params=groups["embeddings"] + groups["vectors"], weight_decay=0.0)]
    return [
        torch.optim.Muon(groups["matrices"], lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(plain, lr, betas=(0.9, 0.95), fused=True),
    ]


def learning_rate(peak, step, decay_from):
    """Warm-up over 50 steps, then constant, then linearly to 0 from `decay_from` on."""
    if decay_from is not None:
        return peak * max(0.0, 1 - (step - decay_from) / (DECAY * decay_from))
    return peak * min(1.0, (step + 1) / 50)


def train_step(gpt, optimizers, micro_batches, lr):
    """One step on -mean log p of the target tokens; -> tokens read. The mean is over all
    micro-batches together."""
    targets = sum(int(rows.lengths.sum()) for rows in micro_batches)
    for rows in micro_batches:
        logp, _ = completion_logprobs(gpt, rows)
        (-logp.sum() / targets).backward()
    torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return sum(int((rows.prompt_lengths + rows.lengths).sum()) for rows in micro_batches)


# ---- cache ---------------------------------------------------------------------------------------


def base_path(config):
    """out/base-<task>-<hash of settings>-<hash of code>.pt: a change of either is another base.

    The settings are the fields of Config above, the guiding phrases and torch's version. The name
    of the preset does not count, its values do. The code is model.py and tasks/*.py, byte by byte:
    a change of a comment there makes a new base, which costs minutes and cannot mislead.
    """
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)} | dict(preset="")
    settings = repr([sorted(fields.items()), PHRASES, torch.__version__]).encode()
    root = Path(__file__).resolve().parents[1]
    files = [root / "model.py", *sorted(root.glob("tasks/*.py"))]
    code = b"".join(path.read_bytes() for path in files)
    settings, code = (hashlib.sha256(data).hexdigest()[:6] for data in (settings, code))
    return Path("out") / f"base-{config.task}-{settings}-{code}.pt"


def base_model(config, say=print):
    """The base model for this (resolved) config, from out/ or made now -> model, what was measured
    of it, its path. One that is damaged is put aside, and made anew."""
    path = base_path(config)
    if path.exists():
        try:
            gpt, extra = load_checkpoint(path, getattr(torch, config.dtype), config.device)
            check_fields(
                extra.get("measured"),
                dict(t1=float, t2=float, tokens=int),
                f"{path}: what was measured of it",
            )
            if gpt.config != shape_for(config, build_encoding(), task_of(config)):
                raise BadInput(f"{path} holds a model of another shape")
            say(f"base: reusing {path}")
            return gpt, extra["measured"], path
        except (ValueError, BadInput) as error:
            os.replace(path, f"{path}.damaged")
            say(f"base: {error}; it is put aside as {path}.damaged, and made anew")
    gpt, measured = pretrain(config, say)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, gpt, measured=measured, config=dataclasses.asdict(config))
    return gpt, measured, path


# ---- worked solutions ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Script(Config):
    # files of problems with worked solutions (data.py), separated by commas, to learn from
    data: str = ""
    tokenizer: str = ""  # folder of the Hugging Face tokenizer for it
    save: str = ""  # folder for the model, in Hugging Face's format
    quiet: bool = False  # no bar


def solution_pair(encoding, problem, rng, review):
    """A worked solution as (prompt ids, target ids), in the format of the paper's template. In a
    review a solution stands before the phrase, half of the time with a wrong answer, and the target
    is the right one."""
    # GSM8K's notes for a calculator
    steps = re.sub(r"<<[^<>]*>>", "", problem.data.solution).strip()
    right = f"<think>{steps}</think><answer>{problem.gold}</answer>"
    prompt, target = (
        encoding.template(problem.question),
        encoding.encode_ordinary(right) + [encoding.eot_token],
    )
    if review:
        given = (
            right
            if rng.random() < 0.5
            else f"<think>{steps}</think><answer>{rng.randint(1, 99)}</answer>"
        )
        prompt = (
            prompt
            + encoding.encode_ordinary(given)
            + encoding.encode_ordinary(phrase_text(rng.choice(PHRASES)))
        )
    return prompt, target


def open_solutions(c):
    """-> encoding with its template, problems that have a solution of a bearable length."""
    encoding = prompts.open_bare_tokenizer(c.tokenizer)
    problems = [
        problem
        for path in names(c.data)
        for problem in read_problems(path)[0]
        if problem.data.solution
    ]
    fitting = [
        p
        for p in problems
        if sum(map(len, solution_pair(encoding, p, random.Random(0), False))) <= SOLUTION
    ]
    if not fitting:
        raise BadInput(
            f"--data {c.data}: no problem there has a worked solution that, with its prompt, has "
            f"at most {SOLUTION} tokens"
        )
    return encoding, fitting


def pretrain_on_solutions(c, encoding, problems, say=print):
    """A model of Qwen2's shape that has read worked solutions, half of them as reviews, for
    --base-tokens -> GPT."""
    shape = ModelConfig(
        -(-encoding.n_vocab // 64) * 64,
        32 * c.depth,
        c.depth,
        c.depth,
        1 if c.depth % 4 else c.depth // 4,
        32,
        96 * c.depth,
        context=2048,
        qkv_bias=True,
        end_tokens=(encoding.eot_token,),
        rope_theta=1e6,
    )
    gpt, peak = new_model(c, shape), LR * (4 / c.depth) ** 0.5
    optimizers, tokens, step = make_optimizers(gpt, peak), 0, 0
    bar = bars.bar(c.base_tokens, "worked solutions", "tok", unit_scale=True)
    while tokens < c.base_tokens:
        rng = random.Random(f"solutions/{c.base_seed}/{step}")
        pairs = [
            solution_pair(encoding, rng.choice(problems), rng, review=i % 2 == 1) for i in range(16)
        ]
        pairs.sort(key=lambda pair: len(pair[0] + pair[1]))
        # like beside like: less padding
        micro_batches = [
            pad_rows(*zip(*pairs[i : i + 4]), c.device) for i in range(0, len(pairs), 4)
        ]
        left = 1 - tokens / c.base_tokens  # the learning rate falls to 0 over the last fifth
        seen = train_step(
            gpt, optimizers, micro_batches, learning_rate(peak, step, None) * min(1.0, 5 * left)
        )
        tokens, step = tokens + seen, step + 1
        bar.update(seen)
    bar.close()
    size = sum(p.numel() for p in gpt.parameters())
    say(
        f"{size:,} parameters read {tokens / 1e6:.1f} M tokens of {len(problems):,} worked "
        f"solutions in {step} steps"
    )
    return gpt


def presets(given):
    """What stands under the given flags. BadInput for flags of a task beside --data, which has no
    task."""
    for name in (
        {"task", "candidates", "operations", "modulus", "numbers"} & given.keys()
        if "data" in given
        else ()
    ):
        raise BadInput(f"--{name} is about the built-in tasks; --data brings problems of its own")
    return pick_preset(given)


def main():
    c = parse_flags(Script, __doc__, presets)
    bars.quieten(c.quiet)
    if (bool(c.data), bool(c.tokenizer), bool(c.save)) not in ((False,) * 3, (True,) * 3):
        raise BadInput(
            "--data, --tokenizer and --save belong together: files of solutions, a tokenizer's "
            "folder, and where the model goes"
        )
    if not c.data:
        _, measured, path = base_model(resolve(c))
        print(f"{path}: {measured}")
        return
    if Path(c.save).is_file() or list(Path(c.save).glob("*.safetensors")):
        raise BadInput(
            f"--save {c.save}: there is something already; it is not written over: give another "
            "name"
        )
    encoding, problems = open_solutions(c)
    library()  # missing? say so before the work, not after
    make_folder(c.save)
    gpt = pretrain_on_solutions(resolve(c), encoding, problems)
    gpt.source = Path(c.tokenizer)
    print(
        f"{gpt.save_pretrained(c.save, torch.float32)}: python eval.py --init {c.save} --data "
        f"{c.data}"
    )


if __name__ == "__main__":
    guarded(main)
