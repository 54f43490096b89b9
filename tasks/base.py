"""The base model that reinforcement learning starts from, trained on the texts of a built-in task.

    python -m tasks.base                              # makes out/base-solve-....pt
    python -m tasks.base --task chain --modulus 23

The idea. Reinforcement learning sharpens what a model already does sometimes; it cannot find what
is never sampled. So a base must answer in the format, must err, and must hold the seed of checking.
It reads two kinds of text, with a loss on what stands behind a bar:

    drills       8*4=|10|, 3+5=|8|, 1-2=|10| ...     until it knows them; a dialogue teaches
                                                     arithmetic several times slower
    dialogues    question |attempt| phrase |review| phrase |review| ...     `looks` answers
                           one candidate, blindly chosen, computed
                                            compares the last answer, then confirms or tries another

A text is a tree with one branch: it goes through the model as a packed tree, as the rollouts of
training do (engine/packing.py), so a prefix is read once for all that is learned behind it.

Stages end by what is measured, not after a number of steps. The drills end at a small loss. When
first answers come near the texts' own accuracy, the learning rate falls to 0, and comparing and
remembering what was tried become sharp. Then all turns are measured. A base below the bar goes on:
the learning rate rises to half of its height, and falls again.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
import dataclasses
import hashlib
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from engine import packing, threads
from engine.workers import in_parallel
from mgrpo import PHRASES, SamplingParams, phrase_text, rollout
from model import GPT, ModelConfig
from reward import extract_answer, is_correct
from runtime import log
from runtime.checkpoints import load_checkpoint, save_checkpoint
from runtime.device import compute_dtype, pick_device
from runtime.flags import AtLeast, BadInput, Between, check_fields, guarded, parse_flags
from sample import Sampler
from tasks.catalog import TaskConfig, difficulty, make_task
from tasks.problems import dialogue, draw, prompt_text

# Of a step at width 128; a wider model takes more.
DRILLS, FACTS = 96, 4  # texts of the first stage, and facts of each
DIALOGUES = 8  # texts of the second stage
LR = 4e-3  # peak learning rate at width 128, smaller as 1 / sqrt(width)
DRILLED = 0.3  # loss of a result, in nats, that ends the first stage
CHECK_EVERY, CHECK_ON = 25, 128  # steps between measurements of first answers; their questions
LEARNT = 0.5  # share of the texts' own accuracy in first answers that begins the decay
DECAY = 1.5  # length of the decay, as a multiple of the steps before it
MEASURED_ON = 512  # questions of the measurement that tells whether a base is good enough
# Shares of the texts' own accuracies, and of their shares of fresh tries, that a base must reach.
GOOD_ENOUGH, FRESH_ENOUGH = 0.9, 0.8
PHRASE_TOKENS = 8  # room for a newline and a phrase in the context; today's take 2 tokens


@dataclass(frozen=True)
class BaseConfig:
    """The base model of a built-in task."""

    depth: Annotated[int, Between(1, 64)] = 2  # blocks
    heads: Annotated[int, Between(1, 64)] = 4  # the width is 32 x heads
    base_seed: int = 0  # seed of its weights and of its texts
    # its training gives up after so many tokens; it stops earlier, by accuracy, as a rule
    base_tokens: Annotated[int, AtLeast(1)] = 6_000_000
    # share of its dialogues that go on after their first answer
    reviewed: Annotated[float, Between(0, 1)] = 1.0
    start: str = ""  # a run on the same task (folder or checkpoint.pt) to start from: no base then


PRESETS = {
    "cpu": {},  # the defaults: what two cores train in minutes
    # harder, since a larger model saturates the small task
    "gpu": dict(
        candidates=5, operations=6, modulus=23, depth=12, heads=12, base_tokens=200_000_000
    ),
    # the least that still learns both skills: a minute
    "smoke": dict(candidates=2, operations=2, modulus=5, looks=2, heads=2, base_tokens=1_500_000),
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
    # "paper" is about RL: its base is the default one.
    return presets.get(preset_name(given.get("preset", "auto"), given.get("device", "auto")), {})


# ---- texts ---------------------------------------------------------------------------------------


def branches_of(index, prompt, parts, end=()):
    """A text -> [packing.Branch], one for each part with a loss.

    prompt: token ids; parts: [(ids, whether there is a loss on them, ids that follow), ...]; end:
    what is to be learned behind each part, and does not stand in the text. The prompt of a part is
    all that stands before it.
    """
    path, branches = [((0, index), prompt)], []
    for number, (ids, learned, then) in enumerate(parts, 1):
        key, sampled = (number, index), [*ids, *end]
        if learned:
            branches.append(packing.Branch(None, index, (*path, (key, sampled[:-1])), sampled))
        path.append((key, [*ids, *then]))
    return branches


def drill_branches(task, base, index):
    """Text `index` of the first stage: bare arithmetic, with a loss on the results alone."""
    encode, rng = task.encoding.encode_ordinary, random.Random(f"drill/{base.base_seed}/{index}")
    facts = [task.puzzle.fact(rng) for _ in range(FACTS)]
    asked, results = [encode(ask) for ask, _ in facts], [encode(result) for _, result in facts]
    following = [[*encode(", "), *ask] for ask in asked[1:]] + [[]]
    parts = [(result, True, then) for result, then in zip(results, following)]
    return branches_of(index, asked[0], parts)


def dialogue_branches(task, base, index):
    """Text `index` of the second stage: a dialogue, with a loss on every answer and its end token,
    and on neither question nor phrases."""
    encode, puzzle = task.encoding.encode_ordinary, task.puzzle
    problem = draw(puzzle, "train", f"base/{base.base_seed}", index)
    rng = random.Random(f"text/{base.base_seed}/{index}")
    turns = dialogue(puzzle, problem, rng)
    turns = turns if rng.random() < base.reviewed else turns[:1]
    phrases = [encode(phrase_text(rng.choice(PHRASES))) for _ in turns]
    parts = [(encode(t.text), not t.given, phrase) for t, phrase in zip(turns, phrases)]
    return branches_of(index, encode(prompt_text(problem)), parts, [task.encoding.eot_token])


def skills(paths, right):
    """What counts in a base: its accuracy in every turn, then the share of fresh tries.

    paths: [the answers of a dialogue, ...]; right: [whether each is right, ...] -> [Acc@t1, ...,
    Acc@tN, fresh share of turn 3, ..., N]. A try is an answer that differs from the one before it;
    it is fresh if it differs from all before it. (In turn 2 every try is.)
    """
    turns, shares = range(len(paths[0])), []
    for k in turns[2:]:
        fresh = [path[k] not in path[:k] for path in paths if path[k] != path[k - 1]]
        shares.append(sum(fresh) / max(len(fresh), 1))
    return [sum(column) / len(right) for column in zip(*right)] + shares


def skills_of_texts(puzzle, count):
    """-> `skills` of the texts themselves: of a model that has learnt them perfectly."""
    paths, right = [], []
    for index in range(count):
        problem, rng = draw(puzzle, "train", "check", index), random.Random(index)
        turns = dialogue(puzzle, problem, rng, first=puzzle.attempt(problem, rng))
        paths.append([extract_answer(turn.text) for turn in turns])
        right.append([is_correct(turn.text, problem.gold) for turn in turns])
    return skills(paths, right)


def measure(sampler, task, count, looks):
    """-> `skills` of the model at temperature 1.

    The questions are of the training split, from a stream of their own: the held-out ones are for
    results alone.
    """
    problems = [draw(task.puzzle, "train", "check", index) for index in range(count)]
    sampling = SamplingParams(task.max_new_tokens, 1.0, seed=0)
    layers = rollout(sampler, task, problems, (1,) * looks, sampling)
    return skills(layers[-1].answers, list(zip(*(layer.correct.tolist() for layer in layers))))


def shown(figures, looks):
    """`skills` as text: 0.45 0.53 0.57 0.59, fresh 0.85 0.69"""
    words = [f"{figure:.2f}" for figure in figures]
    fresh = f", fresh {' '.join(words[looks:])}" if looks > 2 else ""
    return " ".join(words[:looks]) + fresh


# ---- training ------------------------------------------------------------------------------------


def base_shape(task, base):
    """-> ModelConfig of a base. Its context holds the longest question, as many completions as its
    texts have, and the phrases between them."""
    width = 32 * base.heads
    context = task.puzzle.prompt_tokens
    context += task.looks * task.puzzle.max_new_tokens + (task.looks - 1) * PHRASE_TOKENS
    return ModelConfig(
        task.encoding.n_vocab,
        width,
        base.depth,
        base.heads,
        kv_heads=1 if base.heads % 4 else base.heads // 4,
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
    """Trains a base model -> GPT, {"skills": measured at temperature 1, "tokens"}."""
    looks = task.looks
    model = new_model(base_shape(task, base), base.base_seed, device, dtype)
    # Blocks write about 0.3 into the residual stream at first. Embeddings of GPT-2's size, 0.02,
    # would drown in that, and arithmetic would be learnt several times later.
    with torch.no_grad():
        model.embed.weight *= 10
    peak = LR * (4 / base.heads) ** 0.5
    optimizers = make_optimizers(model, peak)
    sampler, texts = in_parallel(Sampler(model)), skills_of_texts(task.puzzle, 8 * CHECK_ON)
    say(
        f"base: {sum(p.numel() for p in model.parameters()):,} parameters in {dtype}; its texts "
        f"are right in {shown(texts, looks)}"
    )
    wider = max(1, (base.heads // 4) ** 2)  # a wider model takes more texts a step
    tokens, step, drilling = 0, 0, True
    fall = None  # how the learning rate falls to 0: first step, steps, height; None: not yet
    figures = None  # `skills` at the end of a fall
    bar = log.bar(base.base_tokens, "base model", "tok")
    with threads.apart(model):
        while figures is None:
            branches, count = (
                (drill_branches, DRILLS) if drilling else (dialogue_branches, DIALOGUES)
            )
            indices = range(step * count * wider, (step + 1) * count * wider)
            learning = [branches(task, base, index) for index in indices]
            seen, loss = train_step(model, optimizers, learning, learning_rate(peak, step, fall))
            tokens, step = tokens + seen, step + 1
            bar.update(seen)
            # No text comes twice, so the loss is that on unseen texts.
            drilling = drilling and loss > DRILLED
            if fall is None:
                learnt = tokens * (1 + DECAY) > base.base_tokens  # or there is no time for more
                if step % CHECK_EVERY == 0 and not drilling:
                    sampler.refresh()
                    # First answers: what comes after them is learnt while the learning rate falls.
                    (accuracy,) = measure(sampler, task, CHECK_ON, 1)
                    bar.set_postfix_str(f"right {accuracy:.2f}")
                    learnt = learnt or accuracy >= LEARNT * texts[0]
                fall = (step, max(1, int(DECAY * step)), peak) if learnt else None
            elif step == fall[0] + fall[1]:
                sampler.refresh()
                figures = measure(sampler, task, MEASURED_ON, looks)
                fall = (step, fall[1] // 2, fall[2] / 2)
                room = fall[1] >= CHECK_EVERY and tokens * (1 + fall[1] / step) <= base.base_tokens
                if below(figures, texts, looks) and room:
                    figures = None  # it goes on
    bar.close()
    say(f"base: right in {shown(figures, looks)} after {tokens / 1e6:.1f} M tokens, {step} steps")
    if below(figures, texts, looks):
        say(
            "base: WARNING: that is below the bar; RL may find nothing to strengthen. Raise "
            "--base-tokens, or make the task easier"
        )
    return model, dict(skills=figures, tokens=tokens)


def below(figures, texts, looks):
    """Whether the `skills` of a base are too far below those of its texts, in any turn."""
    bars = [GOOD_ENOUGH] * looks + [FRESH_ENOUGH] * (looks - 2)
    return any(figure < bar * best for figure, bar, best in zip(figures, bars, texts))


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
    2502.16982, eq. 4). A base learns arithmetic and comparing in 800 steps with it; AdamW alone had
    not learnt them after 2,000. Three Newton-Schulz steps instead of five are less exact, and make
    a step a sixth shorter.
    """
    groups = parameter_groups(model)
    plain = [dict(params=groups["embeddings"] + groups["vectors"], weight_decay=0.0)]
    return [
        torch.optim.Muon(
            groups["matrices"], lr, weight_decay=0.1, ns_steps=3, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(plain, lr, betas=(0.9, 0.95), fused=True),
    ]


def learning_rate(peak, step, fall):
    """Warm-up over 50 steps, then constant; linear to 0 in a fall (first step, steps, height)."""
    if fall:
        first, steps, height = fall
        return height * (1 - (step - first) / steps)
    return peak * min(1.0, (step + 1) / 50)


def train_step(model, optimizers, texts, lr):
    """One step on -mean log p of the learned tokens -> tokens read, prompts included; the loss.

    texts: [[packing.Branch, ...], ...], the branches of each text.
    """
    branches = [branch for text in texts for branch in text]
    targets = sum(len(branch.sampled) for branch in branches)

    def loss_of(pack):
        logp, _ = packing.tree_logprobs(model, pack)  # [B, T], 0 behind the end of a row
        loss = -logp.sum() / targets
        return loss, (pack.real_tokens, loss.item())

    read, losses = zip(*packing.backward(model, branches, loss_of))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return sum(read), sum(losses)


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


def base_model(task_config, base, device, dtype, say=print):
    """The base model of these settings, from out/ or made now -> GPT, {"skills", "tokens"}, Path.

    A damaged file is renamed to <name>.damaged, and the base made anew.
    """
    task, path = make_task(task_config), base_path(task_config, base, device, dtype)
    loaded = load_base(path, task, base, device, dtype, say) if path.exists() else None
    if not loaded:
        loaded = pretrain(task, base, device, dtype, say)
        path.parent.mkdir(parents=True, exist_ok=True)
        # opening.py reads this file like the checkpoint of a run, which has max_new_tokens too
        settings = base_settings(task_config, base, device, dtype) | dict(max_new_tokens=0)
        save_checkpoint(path, loaded[0], measured=loaded[1], config=settings)
    return *loaded, path


def load_base(path, task, base, device, dtype, say):
    """-> GPT, what was measured of it; None for a damaged file, which is then out of the way."""
    try:
        model, extra = load_checkpoint(path, getattr(torch, dtype), device)
        kinds = dict(skills=tuple[float, ...], tokens=int)
        check_fields(extra.get("measured"), kinds, f"{path}: what was measured of it")
        if model.config != base_shape(task, base):
            raise BadInput(f"{path} holds a model of another shape")
        say(f"base: reusing {path}")
        return model, extra["measured"]
    except (ValueError, BadInput) as error:
        os.replace(path, f"{path}.damaged")
        say(f"base: {error}; it is put aside as {path}.damaged, and made anew")


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
