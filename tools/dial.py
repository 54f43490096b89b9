"""The cheapest control: how far one number added to a logit takes a base before RL.

    python -m tools.dial out/base-solve-....pt

The idea. A base that doubts too much, or too little, is mended by a constant on the logit of its
verdict: no training, no look at the question. So a gain of RL counts as learnt only as far as it
goes beyond the best such constant. Here it is searched for, together with the best temperature: on
other questions than those of the table, by the mean accuracy of all answers but the first.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
import statistics
from dataclasses import dataclass
from typing import Annotated

from eval import evaluate, table
from runtime.flags import BadInput, Between, guarded, parse_flags
from sample import Sampler
from tasks.opening import open_model_and_task
from tasks.problems import draw

SHIFTS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)  # of the logit of ": yes"
TEMPERATURES = (1.0, 0.7, 0.4)
FITTED_ON = 256  # questions of the training split


class DialledSampler(Sampler):
    """A Sampler that adds `shift` to the logit of one token before a token is chosen."""

    def __init__(self, model, token, **options):
        super().__init__(model, **options)
        self.token, self.shift = token, 0.0

    def choose(self, logits, rows, temperature, filters):
        logits = logits.float()  # in bf16 a shift of a large logit would be rounded
        logits[:, self.token] += self.shift
        super().choose(logits, rows, temperature, filters)


def fit(sampler, task, turns, temperatures, seed=0):
    """-> (shift, temperature) with the best mean accuracy of answers 2 to `turns`."""
    problems = [draw(task.puzzle, "train", f"dial/{seed}", i) for i in range(FITTED_ON)]
    found = {}
    for temperature in temperatures:
        for shift in SHIFTS:
            sampler.shift = shift
            result = evaluate(
                sampler, task, problems, turns=turns, temperature=temperature, name="fitting"
            )
            later = [result[f"t{k}"][0] for k in range(2, turns + 1)]
            found[shift, temperature] = statistics.mean(later)
    return max(found, key=found.get)


def dialled(policy, task, questions, turns, seed=0):
    """A base with its best constants -> {row: result of evaluate}, {row: (shift, temperature)}.

    "greedy" has the best shift at temperature 0, "temperature 1" the best shift and temperature of
    TEMPERATURES. The questions are held out, as in the tables of a run with this seed.
    """
    if task.name not in ("solve", "countdown"):
        raise BadInput(f"the task {task.name} has no verdict to shift")
    (token,) = task.encoding.encode_ordinary(": yes")
    sampler = DialledSampler(policy, token)
    problems = task.held_out(questions, seed)
    results, constants = {}, {}
    for row, temperatures in {"greedy": (0.0,), "temperature 1": TEMPERATURES}.items():
        constants[row] = fit(sampler, task, turns, temperatures, seed)
        sampler.shift, temperature = constants[row]
        results[row] = evaluate(
            sampler, task, problems, turns=turns, temperature=temperature, seed=seed, name=row
        )
    return results, constants


@dataclass(frozen=True)
class Config:
    model: str = ""  # a base, or the folder of a run
    questions: Annotated[int, Between(2, 1 << 24)] = 1024  # held-out ones of the table
    turns: Annotated[int, Between(2, 8)] = 4  # answers in a row
    seed: int = 0  # of the questions and of the sampling


def main():
    """Prints the table of a base as it is, and with the constants that were found."""
    config = parse_flags(Config, __doc__, first_word="model")
    if not config.model:
        raise BadInput("no model is named: name a base, say out/base-solve-....pt")
    policy, task = open_model_and_task(config.model, turns=config.turns)
    problems = task.held_out(config.questions, config.seed)
    results, constants = dialled(policy, task, config.questions, config.turns, config.seed)
    for row, (shift, temperature) in constants.items():
        plain = evaluate(
            Sampler(policy),
            task,
            problems,
            turns=config.turns,
            temperature=0.0 if row == "greedy" else 1.0,
            seed=config.seed,
            name=row,
        )
        name = f"{shift:+.1f} on yes, T={temperature:g}"
        print(f"\n{row}\n{table({'as it is': plain, name: results[row]}, task.unit)}")


if __name__ == "__main__":
    guarded(main)
