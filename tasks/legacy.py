"""Names of before the Task interface, for callers not rewired yet. Delete with the last."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Literal

import torch

from runtime import distributed
from runtime.device import compute_dtype
from runtime.flags import BadInput
from tasks import base, problems
from tasks.base import PRESETS, pick_preset  # noqa: F401
from tasks.catalog import TaskConfig, make_puzzle
from tasks.problems import GeneratedTask


def make_task(name, candidates=3, operations=4, modulus=11, numbers=4):
    return make_puzzle(TaskConfig(name, candidates, operations, modulus, numbers))


def task_of(config):
    given = config if isinstance(config, dict) else vars(config)
    names = ("task", "candidates", "operations", "modulus", "numbers")
    return make_task(*(given[name] for name in names))


def token_limits(puzzle):
    return puzzle.prompt_tokens, puzzle.max_new_tokens


def draw(task, split, seed, index):
    if hasattr(task, "draw"):
        return task.draw(split, seed, index)
    return problems.draw(task, split, seed, index)


def attempt_to_review(puzzle, problem, rng):
    return puzzle.attempt_to_review(problem, rng)


def prompts_and_golds(encoding, problems_):
    template = getattr(encoding, "template", None)
    prompts = [
        template(p.question) if template else encoding.encode_ordinary(problems.prompt_text(p))
        for p in problems_
    ]
    return prompts, [p.gold for p in problems_]


# ---- of tasks/base.py, with one flat config ------------------------------------------------------


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


def groups(c):
    names = ("task", "candidates", "operations", "modulus", "numbers")
    task = TaskConfig(*(getattr(c, name) for name in names))
    return task, base.BaseConfig(c.depth, c.base_seed, c.base_tokens), c.device, c.dtype


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
        config, preset=base.preset_name(config.preset, config.device), device=device, dtype=dtype
    )


def shape_for(c, encoding, puzzle):
    return base.base_shape(GeneratedTask(puzzle, encoding, puzzle.max_new_tokens), c.depth)


def new_model(c, shape):
    return base.new_model(shape, c.base_seed, c.device, c.dtype)


def base_path(c):
    return base.base_path(*groups(c))


def base_model(c, say=print):
    return base.base_model(*groups(c), say)
