"""Names of before the Task interface, for callers that are not rewired yet. Delete with the last."""

from tasks import problems
from tasks.catalog import TaskConfig, make_puzzle


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
