"""What one training step of each method does to a base, and what it costs.

    python -m tools.one_step                       # 22 methods on 5 bases: a quarter of an hour
    python -m tools.one_step --flags "--task chain" --name chain

The idea. Most claims of GRPO's relatives are about a single step: right answers are not dragged
down, rare ones rise most, the signs of some advantages turn. At the end of a run such an effect is
mixed with all that followed from it. So every method makes one step from the same base on the same
answers, and the log-probability of every answer is compared before and after. More steps follow for
the clock: the methods take turns, so a busy moment hits all of them.

Each method on each base adds a JSON line to results/one-step-<name>.jsonl.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
import copy
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from tqdm import tqdm

import train
from mgrpo import GRPO, credit
from report.trees import lines_of
from runtime.flags import AtLeast, Between, guarded, parse_flags
from runtime.log import versions
from tasks import opening
from tools.compare import append
from tools.tables import by_base, interval
from variants import observing
from variants.table import METHODS

# Figures of the table: name in the lines -> title, scale, digits. Δ: of log π, in nats an answer.
FIGURES = dict(
    right=("Δ right", 1, 3),
    fell=("right that fell, %", 100, 0),
    rare=("Δ rare right", 1, 3),
    wrong=("Δ wrong", 1, 3),
    signal=("rows with A, %", 100, 0),
    turned=("turned, %", 100, 1),
    variance=("variance of A", 1, 2),
)
FIELDS = ("method", "base_seed", "seed", "seconds", *FIGURES)


@dataclass(frozen=True)
class Config:
    name: str = "solve"  # of the result file, results/one-step-<name>.jsonl
    bases: Annotated[int, Between(0, 20)] = 5  # bases 0, 1, ...; 0 only prints what is there
    steps: Annotated[int, AtLeast(2)] = 6  # the first for the effect, the others for the clock
    flags: str = ""  # more flags for every train.py, in quotes


def parsed(words):
    """Flags of train.py -> train.Config."""
    return parse_flags(train.Config, "", train.presets, words, train.REFUSED, train.RENAMED)


class Stepper:
    """A method at a base: a policy of its own, and what `train.step` takes besides."""

    def __init__(self, name, words, base, task):
        config = parsed([*words, "--method", name])
        self.policy, self.task, self.memory = copy.deepcopy(base), task, {}
        self.config, self.method = train.settled(config, base, task), train.method_of(config)
        self.reference = None
        if train.needs_reference(config):
            self.reference = opening.make_reference(base, self.method.decay < 1)
        self.sampler = opening.make_sampler(self.policy, [task], train.turns(config))
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), config.lr, weight_decay=0.0, fused=True
        )
        self.generated, self.seconds, self.found = 0, [], None

    def step(self, number, base):
        """Makes step `number`, on the clock; after the first one notes its effect on the base."""
        _, layers, metrics = train.step(
            self.policy,
            self.reference,
            self.sampler,
            self.optimizer,
            self.task,
            self.config,
            number,
            self.generated,
            self.memory,
        )
        self.generated = metrics["generated"]
        if number == 0:
            self.found = effect(base, self.policy, layers, self.config)
        else:
            self.seconds.append(metrics["seconds_sampling"] + metrics["seconds_training"])


def effect(before, after, layers, config):
    """What a step did to the answers of its first layer -> {name of FIGURES: number}.

    before, after: the policy; layers: of the step, with the method's advantages. None where a
    figure has no rows.
    """
    layer = layers[0]
    rows = [(layer, torch.arange(len(layer.rewards)))]
    # Both by the trainer: the sampler's numbers may come from other kernels.
    for model, name in ((before, "before_logp"), (after, "after_logp")):
        observing.observe(model, layers, rows, [name], config)
    moved = layer.observed["after_logp"] - layer.observed["before_logp"]  # [B, T]
    moved = (moved * layer.mask).sum(1)  # [B] nats an answer
    was = (layer.observed["before_logp"] * layer.mask).sum(1)
    # Text that the method put there was not sampled.
    own = torch.ones_like(layer.correct) if layer.given is None else ~layer.given
    right, wrong = layer.correct & own, ~layer.correct & own
    rare = right & (was < was[right].median()) if right.any() else right

    # GRPO's advantages of the same rows.
    plain = [copy.copy(one) for one in layers]
    credit(plain, GRPO)
    given, grpos = layer.advantages * layer.trained, plain[0].advantages
    mixed = grpos != 0  # rows of groups with both verdicts
    mean = lambda x, of: x[of].double().mean().item() if of.any() else None
    return dict(
        right=mean(moved, right),
        fell=mean(moved < 0, right),
        rare=mean(moved, rare),
        wrong=mean(moved, wrong),
        signal=mean(given != 0, own),
        turned=mean(given * grpos < 0, mixed),
        variance=mean(given**2, mixed & own),
    )


def steps_from(base_seed, config):
    """All methods, step by step from one base -> a line for each."""
    torch.set_num_threads(1)
    words = [*shlex.split(config.flags), "--base-seed", str(base_seed), "--seed", str(base_seed)]
    settings = parsed(words)
    base, task = opening.open_model_and_task(
        puzzle=settings.puzzle, base=settings.base, turns=settings.puzzle.looks
    )
    steppers = {name: Stepper(name, words, base, task) for name in METHODS}
    for number in tqdm(range(config.steps), f"base {base_seed}", unit="step", disable=None):
        for stepper in steppers.values():
            stepper.step(number, base)
    return [
        dict(
            method=name,
            base_seed=base_seed,
            seed=base_seed,
            flags=config.flags,
            base=str(base.origin),
            made_by=versions(),
            seconds=statistics.median(stepper.seconds),
            **stepper.found,
        )
        for name, stepper in steppers.items()
    ]


# ---- tables --------------------------------------------------------------------------------------


def read_steps(name):
    """-> the lines of results/one-step-<name>.jsonl, if there is one."""
    path = Path("results") / f"one-step-{name}.jsonl"
    return list(lines_of(path, FIELDS)) if path.exists() else []


def steps_table(lines):
    """The effect of a step of each method, mean over bases ± half of a 95 % interval; what a step
    takes, as a multiple of GRPO's on the same base."""
    titles = [title for title, _, _ in FIGURES.values()]
    rows = [f"| method | {' | '.join(titles)} | time |"]
    rows += ["|---" * (len(titles) + 2) + "|"]
    plain = {line["base_seed"]: line["seconds"] for line in lines if line["method"] == "grpo"}
    for method in METHODS:
        own = [line for line in lines if line["method"] == method]
        if not own:
            continue
        cells = []
        for name, (_, scale, digits) in FIGURES.items():
            groups = by_base(own, lambda line, name=name: line[name])
            cells.append(shown(groups, scale, digits) if groups else "")
        ratio = statistics.median(line["seconds"] / plain[line["base_seed"]] for line in own)
        rows.append(f"| `{method}` | {' | '.join(cells)} | {ratio:.2f} |")
    return "\n".join(rows)


def shown(groups, scale, digits):
    mean, half = interval(groups)
    error = "" if half is None or len(groups) < 3 else f" ± {scale * half:.{digits}f}"
    return f"{scale * mean:.{digits}f}{error}"


def main():
    config = parse_flags(Config, __doc__)
    lines = read_steps(config.name)
    for base_seed in range(config.bases):
        if base_seed not in {line["base_seed"] for line in lines}:
            for line in steps_from(base_seed, config):
                append(Path("results") / f"one-step-{config.name}.jsonl", line)
                lines.append(line)
    print(steps_table(lines))


if __name__ == "__main__":
    guarded(main)
