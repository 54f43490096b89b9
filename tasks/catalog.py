"""The built-in tasks by name, and the flags that choose one and its difficulty.

    python -m tasks.catalog                                # a problem of each task, and a dialogue
                                                           # as a base model reads it
    python -m tasks.catalog --task solve --candidates 5    # a harder `solve`

The idea. To see what a second layer adds, one needs problems whose answers a rule can check, whose
difficulty is a knob, and which never run out. "When does a correction pay?" takes three tasks:

    solve        finding is hard, checking is easy: a second layer pays
    chain        checking is as hard as computing: it has little to offer
    countdown    checking is easy, but a failure hardly helps the next attempt
"""

import random
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from runtime.flags import BadInput, Between, guarded, parse_flags, unflat
from tasks.chain import Chain
from tasks.countdown import Countdown
from tasks.problems import GeneratedTask, dialogue, draw
from tasks.solve import Solve
from tasks.tokenizer import build_encoding

TASKS = {"solve": Solve, "chain": Chain, "countdown": Countdown}


@dataclass(frozen=True)
class TaskConfig:
    """A built-in task and its difficulty."""

    # guess and check | arithmetic chain | make a number
    task: Literal["solve", "chain", "countdown"] = "solve"
    candidates: Annotated[int, Between(1, 97)] = 5  # solve: most candidates for x
    operations: Annotated[int, Between(2, 12)] = 4  # solve, chain: most operations of a problem
    modulus: Annotated[int, Between(3, 97)] = 11  # solve, chain: arithmetic is mod this
    numbers: Annotated[int, Between(2, 6)] = 4  # countdown: how many numbers are given
    looks: Annotated[int, Between(2, 8)] = 4  # answers in a row that a base learns to give
    # solve, countdown: what is wrong with the reviews that a base reads (problems.REVIEWERS)
    reviewer: Literal["cues", "doubting", "lazy", "fair"] = "cues"
    # solve: share of a base's first answers that check themselves before they end
    habit: Annotated[float, Between(0, 1)] = 0.0


def make_puzzle(config):
    """TaskConfig -> Solve, Chain or Countdown. Raises BadInput for a number out of its range."""
    unflat(TaskConfig, vars(config))  # checks the ranges of a config that comes from a file, too
    if config.candidates > config.modulus:
        raise BadInput(
            f"--candidates {config.candidates}: only {config.modulus} different numbers exist mod "
            f"{config.modulus}; lower it, or raise --modulus"
        )
    puzzle = TASKS[config.task]
    return puzzle(**{name: getattr(config, name) for name in difficulty(config.task)})


def difficulty(name):
    """-> the fields of TaskConfig that concern the task `name`."""
    known = {field.name for field in fields(TaskConfig)}
    return [field.name for field in fields(TASKS[name]) if field.name in known]


def make_task(config, max_new_tokens=0):
    """TaskConfig -> GeneratedTask. max_new_tokens: of a completion; 0: the puzzle's own bound.

    Raises BadInput for more than that bound: the context of the task's base model has no room.
    """
    puzzle = make_puzzle(config)
    if max_new_tokens > puzzle.max_new_tokens:
        raise BadInput(
            f"--max-new-tokens {max_new_tokens} may not fit the context of this task's model: use "
            f"at most {puzzle.max_new_tokens}, or 0 for that"
        )
    return GeneratedTask(puzzle, build_encoding(), max_new_tokens or puzzle.max_new_tokens)


@dataclass(frozen=True)
class Config(TaskConfig):
    task: Literal["all", "solve", "chain", "countdown"] = "all"  # which task to show
    seed: int = 0  # another seed, other problems


def main():
    """Prints a problem of each task, with an attempt and its review."""
    config = parse_flags(Config, __doc__)
    chosen = {field.name: getattr(config, field.name) for field in fields(TaskConfig)}
    for name in TASKS if config.task == "all" else (config.task,):
        puzzle, rng = make_puzzle(TaskConfig(**chosen | {"task": name})), random.Random(config.seed)
        problem = draw(puzzle, "train", config.seed, 0)
        print(f"{name}\n  question  {problem.question}\n  gold      {problem.gold}")
        for number, turn in enumerate(dialogue(puzzle, problem, rng), 1):
            print(f"  answer {number}  {turn.text}")


if __name__ == "__main__":
    guarded(main)
