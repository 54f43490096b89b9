"""The base model that reinforcement learning starts from, trained on the texts of a built-in task.

    python -m tasks.base                              # makes out/base-solve-....pt: about three
                                                      # minutes on 2 CPU cores
    python -m tasks.base --task chain --modulus 23

The idea. Reinforcement learning sharpens what a model already does sometimes; it cannot find what
is never sampled. So a base must answer in the format, must err, and must hold the seed of checking.
It is trained on two kinds of text, half and half, with the loss on the part after the bar:

    solution   question | attempt                         one candidate, blindly chosen, computed
    review     question, attempt, phrase | correction     compares first, and doubts too much

Training stops by measured accuracy, not after a number of steps: once the model comes near the
texts' own accuracy in both turns, the learning rate decays to 0. (Comparing is learnt after the
arithmetic, and suddenly. A base that stops before it leaves layer 2 nothing to strengthen.)
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
import collections
import dataclasses
import hashlib
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from engine.packing import pad_rows, padded_logprobs
from engine.workers import in_parallel
from mgrpo import PHRASES, SamplingParams, phrase_text, rollout
from model import GPT, ModelConfig
from reward import score
from runtime import log
from runtime.checkpoints import load_checkpoint, save_checkpoint
from runtime.device import compute_dtype, pick_device
from runtime.flags import AtLeast, BadInput, Between, check_fields, guarded, parse_flags
from sample import Sampler
from tasks.catalog import TaskConfig, difficulty, make_task
from tasks.problems import draw, prompt_text

CHECK_EVERY = 50  # steps between measurements
CHECK_ON = 512  # problems per measurement
CHECKS = 3  # measurements averaged before they count: together a standard error of .01
GOOD_ENOUGH = 0.90  # the decay begins at this share of the texts' own accuracy, in both turns
LR = 1e-3  # peak learning rate at depth 4 (width 128), smaller as 1 / sqrt(width)
DECAY = 0.12  # length of the decay, as a share of the steps before it
PHRASE_TOKENS = 8  # room for a newline and a phrase in the context; today's take 2 tokens


@dataclass(frozen=True)
class BaseConfig:
    """The base model of a built-in task."""

    depth: Annotated[int, Between(1, 64)] = 4  # blocks, and heads; the width is 32 x depth
    base_seed: int = 0  # seed of its weights and of its texts
    # its training gives up after so many tokens; it stops earlier, by accuracy, as a rule
    base_tokens: Annotated[int, AtLeast(1)] = 6_000_000


PRESETS = {
    "cpu": {},  # the defaults: what two cores train in minutes
    # harder, since a larger model saturates the small task
    "gpu": dict(candidates=5, operations=6, modulus=23, depth=12, base_tokens=200_000_000),
    # the least that still learns both skills: a minute
    "smoke": dict(candidates=2, operations=2, modulus=5, depth=2, base_tokens=1_500_000),
}


def preset_name(preset, device):
    """--preset and --device -> name in PRESETS. "auto" is gpu where CUDA is and may be used."""
    if preset != "auto":
        return preset
    return "gpu" if torch.cuda.is_available() and device != "cpu" else "cpu"


def pick_preset(given, presets=PRESETS):
    """{flag: value} of the command line -> the values of its preset.

    Raises BadInput for a difficulty that the task does not have.
    """
    task = given.get("task", "solve")
    names = {field.name for field in dataclasses.fields(TaskConfig)} - {"task"}
    for name in names & given.keys() - {*difficulty(task)}:
        raise BadInput(
            f"--{name} means nothing to the task {task}, whose difficulty is set by "
            f"--{' and --'.join(sorted(difficulty(task)))}"
        )
    return presets[preset_name(given.get("preset", "auto"), given.get("device", "auto"))]


# ---- texts ---------------------------------------------------------------------------------------


def text_pair(task, seed, index, review):
    """Text `index` of the stream -> (prompt ids, target ids with the end token). The loss is on the
    target alone."""
    puzzle, encode = task.puzzle, task.encoding.encode_ordinary
    problem = draw(puzzle, "train", f"base/{seed}", index)
    rng = random.Random(f"text/{seed}/{index}")
    if review:
        attempt = puzzle.attempt_to_review(problem, rng)
        prompt = prompt_text(problem) + attempt.text + phrase_text(rng.choice(PHRASES))
        target = puzzle.review(problem, attempt, rng)
    else:
        prompt, target = prompt_text(problem), puzzle.attempt(problem, rng).text
    return encode(prompt), encode(target) + [task.encoding.eot_token]


def batches(task, base, step, device):
    """The two micro-batches of a step: solutions, then reviews, which are longer.

    Each has 12 texts, more for a wider model. Steps are small because the skills come suddenly,
    after about 1,200 steps, and hardly sooner with twice the texts in each.
    """
    half = max(12, 12 * (base.depth // 4) ** 2)
    for review in (False, True):
        first = (2 * step + review) * half
        pairs = [text_pair(task, base.base_seed, first + i, review) for i in range(half)]
        yield pad_rows(*zip(*pairs), device)


def texts_accuracy(puzzle, count):
    """-> accuracy of the texts themselves in turn 1 and in turn 2: the score of a model that has
    learnt them perfectly."""
    right = [0, 0]
    for index in range(count):
        problem, rng = draw(puzzle, "train", "check", index), random.Random(index)
        attempt = puzzle.attempt(problem, rng)
        for turn, text in enumerate((attempt.text, puzzle.review(problem, attempt, rng))):
            right[turn] += score(text, problem.gold).accuracy
    return right[0] / count, right[1] / count


def measure(sampler, task, count):
    """-> accuracy of the model at temperature 1 in turn 1 and in turn 2.

    The questions are of the training split, from a stream of their own: the held-out ones are for
    results alone.
    """
    problems = [draw(task.puzzle, "train", "check", index) for index in range(count)]
    sampling = SamplingParams(task.max_new_tokens, 1.0, seed=0)
    first, second = rollout(sampler, task, problems, (1, 1), sampling)
    return first.correct.float().mean().item(), second.correct.float().mean().item()


# ---- training ------------------------------------------------------------------------------------


def base_shape(task, depth, turns=2):
    """-> ModelConfig of a base. Its context holds the longest question, `turns` completions, and
    the phrases between them."""
    width, heads = 32 * depth, depth
    context = task.puzzle.prompt_tokens
    context += turns * task.puzzle.max_new_tokens + (turns - 1) * PHRASE_TOKENS
    return ModelConfig(
        task.encoding.n_vocab,
        width,
        depth,
        heads,
        kv_heads=1 if heads % 4 else heads // 4,
        head_size=32,
        hidden=3 * width,
        context=context,
        qk_norm=True,
        end_tokens=(task.encoding.eot_token,),
    )


def new_model(shape, seed, device, dtype):
    """-> an untrained GPT with weights by `seed`; dtype: of its activations, "float32" or
    "bfloat16"."""
    torch.manual_seed(seed)
    return GPT(shape, getattr(torch, dtype)).to(device)


def pretrain(task, base, device, dtype, say=print):
    """Trains a base model -> GPT, {"t1", "t2": its accuracies at temperature 1, "tokens"}."""
    model = new_model(base_shape(task, base.depth), base.base_seed, device, dtype)
    peak = LR * (4 / base.depth) ** 0.5
    optimizers = make_optimizers(model, peak)
    sampler, ceiling = in_parallel(Sampler(model)), texts_accuracy(task.puzzle, 4 * CHECK_ON)
    say(
        f"base: {sum(p.numel() for p in model.parameters()):,} parameters in {dtype}; its texts "
        f"are right in {ceiling[0]:.2f} of attempts, {ceiling[1]:.2f} of reviews"
    )
    tokens, step, near = 0, 0, False
    decay_from = None  # the step at which the learning rate begins to fall; None: not yet
    recent = collections.deque([(0.0, 0.0)] * CHECKS, CHECKS)
    bar = log.bar(base.base_tokens, "base model", "tok")
    while decay_from is None or step < decay_from * (1 + DECAY):
        micro_batches = list(batches(task, base, step, device))
        seen = train_step(model, optimizers, micro_batches, learning_rate(peak, step, decay_from))
        tokens, step = tokens + seen, step + 1
        bar.update(seen)
        if decay_from is not None:
            continue
        if step % CHECK_EVERY == 0:
            sampler.refresh()
            recent.append(measure(sampler, task, CHECK_ON))
            accuracy = [sum(turn) / CHECKS for turn in zip(*recent)]
            near = all(a >= GOOD_ENOUGH * c for a, c in zip(accuracy, ceiling))
            bar.set_postfix_str(f"right {accuracy[0]:.2f} {accuracy[1]:.2f}")
        if near or tokens * (1 + DECAY) > base.base_tokens:
            decay_from = step
    bar.close()
    sampler.refresh()
    t1, t2 = measure(sampler, task, 2 * CHECK_ON)
    say(
        f"base: right in {t1:.2f} of attempts and {t2:.2f} of reviews after {tokens / 1e6:.1f} M "
        f"tokens, {step} steps"
    )
    if not near:
        say(
            "base: WARNING: that is below the bar; RL may find nothing to strengthen. Raise "
            "--base-tokens, or make the task easier"
        )
    return model, dict(t1=t1, t2=t2, tokens=tokens)


def parameter_groups(model):
    """-> {"matrices", "embeddings", "vectors"}: every parameter once.

    Weight decay acts on matrices alone, as is usual: an embedding has rows that most batches do not
    touch, and a vector (norm, bias) sets a scale, not a direction.
    """
    groups = dict(matrices=[], embeddings=[], vectors=[])
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            groups["vectors"].append(parameter)
        elif name.startswith(("embed", "head")):
            groups["embeddings"].append(parameter)
        else:
            groups["matrices"].append(parameter)
    return groups


def make_optimizers(model, lr):
    """Muon for the matrices of the blocks, AdamW for embeddings and vectors -> [Muon, AdamW].

    Muon (K. Jordan 2024) turns each update into the nearest orthogonal matrix, so that rare
    directions learn as fast as common ones; it is scaled to AdamW's usual step size (arXiv
    2502.16982, eq. 4). A base learns arithmetic and comparing in 1,200 steps with it; AdamW alone
    had not learnt them after 2,000.
    """
    groups = parameter_groups(model)
    plain = [dict(params=groups["embeddings"] + groups["vectors"], weight_decay=0.0)]
    return [
        torch.optim.Muon(groups["matrices"], lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(plain, lr, betas=(0.9, 0.95), fused=True),
    ]


def learning_rate(peak, step, decay_from):
    """Warm-up over 50 steps, then constant, then linear to 0 from step `decay_from` on."""
    if decay_from is not None:
        return peak * max(0.0, 1 - (step - decay_from) / (DECAY * decay_from))
    return peak * min(1.0, (step + 1) / 50)


def train_step(model, optimizers, micro_batches, lr):
    """One step on -mean log p of the target tokens -> tokens read, prompts included. The mean is
    over all micro-batches together."""
    targets = sum(int(batch.lengths.sum()) for batch in micro_batches)
    for batch in micro_batches:
        logp, _ = padded_logprobs(model, batch)  # [B, T], 0 behind the end of a row
        (-logp.sum() / targets).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return sum(int((batch.prompt_lengths + batch.lengths).sum()) for batch in micro_batches)


# ---- files ---------------------------------------------------------------------------------------


def base_settings(task_config, base, device, dtype):
    """-> {flag: value} of everything that makes a base, as its file holds it."""
    return vars(task_config) | vars(base) | dict(device=device, dtype=dtype)


def base_path(task_config, base, device, dtype):
    """-> Path out/base-<task>-<hash of settings>-<hash of code>.pt, so that a change of either
    makes another base.

    Settings are the fields of both configs, device and dtype, the guiding phrases and torch's
    version. Code is model.py and tasks/*.py, byte by byte: a changed comment there costs minutes
    for a new base, and a base never is that of other code.
    """
    fields = sorted(base_settings(task_config, base, device, dtype).items())
    settings = repr([fields, PHRASES, torch.__version__]).encode()
    root = Path(__file__).resolve().parents[1]
    files = [root / "model.py", *sorted(root.glob("tasks/*.py"))]
    code = b"".join(path.read_bytes() for path in files)
    hashes = (hashlib.sha256(data).hexdigest()[:6] for data in (settings, code))
    return Path("out") / f"base-{task_config.task}-{'-'.join(hashes)}.pt"


def base_model(task_config, base, device, dtype, say=print, turns=2):
    """The base model of these settings, from out/ or made now -> GPT, {"t1", "t2", "tokens"}, Path.

    A damaged file is renamed to <name>.damaged, and the base made anew. turns: answers that the
    context must hold; the model in the file has room for 2.
    """
    task, path = make_task(task_config), base_path(task_config, base, device, dtype)
    loaded = load_base(path, task, base, device, dtype, say) if path.exists() else None
    if not loaded:
        loaded = pretrain(task, base, device, dtype, say)
        path.parent.mkdir(parents=True, exist_ok=True)
        # opening.py reads this file like the checkpoint of a run, which has max_new_tokens too
        settings = base_settings(task_config, base, device, dtype) | dict(max_new_tokens=0)
        save_checkpoint(path, loaded[0], measured=loaded[1], config=settings)
    model, measured = loaded
    return with_context(model, base_shape(task, base.depth, turns).context), measured, path


def load_base(path, task, base, device, dtype, say):
    """-> GPT, what was measured of it; None for a damaged file, which is then out of the way."""
    try:
        model, extra = load_checkpoint(path, getattr(torch, dtype), device)
        kinds = dict(t1=float, t2=float, tokens=int)
        check_fields(extra.get("measured"), kinds, f"{path}: what was measured of it")
        if model.config != base_shape(task, base.depth):
            raise BadInput(f"{path} holds a model of another shape")
        say(f"base: reusing {path}")
        return model, extra["measured"]
    except (ValueError, BadInput) as error:
        os.replace(path, f"{path}.damaged")
        say(f"base: {error}; it is put aside as {path}.damaged, and made anew")


def with_context(model, context):
    """-> the model, or one with the same weights and room for `context` tokens. (Positions are
    rotations, not weights: a longer context has no more parameters.)"""
    if context <= model.config.context:
        return model
    config = dataclasses.replace(model.config, context=context)
    longer = GPT(config, model.compute).to(model.embed.weight.device)
    longer.load_state_dict(model.state_dict())
    return longer


# ---- command -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    # sizes that go together; flags override single values
    preset: Literal["auto", "cpu", "gpu", "smoke"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    # compute type; master weights are float32. auto: the faster one, measured
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    problems: TaskConfig = TaskConfig()
    base: BaseConfig = BaseConfig()


def main():
    config = parse_flags(Config, __doc__, pick_preset)
    device = pick_device(config.device)
    dtype = str(compute_dtype(config.dtype, device)).removeprefix("torch.")
    _, measured, path = base_model(config.problems, config.base, device, dtype)
    print(f"{path}: {measured}")


if __name__ == "__main__":
    guarded(main)
