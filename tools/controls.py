"""Controls without training for the runs of compare.py: how far do one, or three, constants go?

    python -m tools.controls                # bases and runs of results/compare-solve.jsonl
    python -m tools.controls --bases 0      # only prints what is there

The idea. Before a gain is called learnt, look for the cheapest thing that has it too. dial.py adds
one constant to the logit of ": yes" and samples at T=1, as the tables do. Here the control gets all
that it can use without training: a finer grid, and any temperature, 0 included.

    one      a constant and a temperature for all questions
    three    a constant and a temperature for each last operation of a question: the reviewer `cues`
             goes by it, so this control is told what is wrong with the base

They are fitted on training questions with their answers, and measured on the questions that the
runs of the base are measured on, and compared with them base by base. Besides, the rates by last
operation: how often a model changes a right and a wrong first answer at T=1, before and after
training. They tell whether it goes by the cue. Needs out/, where compare.py left bases and runs; a
line of the result file has it all. A base is measured again when its file or the code has changed;
the tables have lines of today alone.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from tqdm import tqdm

from eval import share_and_error
from mgrpo import SamplingParams, rollout
from report.trees import lines_of
from runtime.flags import ROOT, BadInput, Between, file_name, guarded, parse_flags, reading
from runtime.log import versions
from tasks.opening import open_model_and_task
from tasks.problems import draw
from tools.compare import ARMS, all_code, append, code_and_imports, read_lines
from tools.dial import DialledSampler
from tools.tables import controls_tables, turns_in, with_bases

SHIFTS = tuple(i / 4 for i in range(-2, 13))  # of the logit of ": yes"
TEMPERATURES = (0.0, 0.4, 1.0)
FITTED_ON = 512  # questions of the training split
FIELDS = ("base_seed", "seed", "version", "constants", "right", "rates", "questions", "made_by")


@dataclass(frozen=True)
class Config:
    name: str = "solve"  # of the comparison, results/compare-<name>.jsonl
    bases: Annotated[int, Between(0, 20)] = 20  # bases to measure, if they have no line of today


def asked(sampler, task, problems, turns, temperature, seed, shift=0.0):
    """Asks every problem `turns` times in a row -> [Q, turns] right, [Q, turns] changed, as 0/1."""
    sampler.shift = shift
    sampling = SamplingParams(task.max_new_tokens, temperature, seed)
    layers = rollout(sampler, task, problems, (1,) * turns, sampling)
    columns = ([layer.correct for layer in layers], [layer.changed for layer in layers])
    return [torch.stack(column, 1).float() for column in columns]


def last_operations(problems):
    """-> {operation: indices of the problems that end with it}."""
    found = {}
    for i, problem in enumerate(problems):
        found.setdefault(problem.data[1][-1][0], []).append(i)
    return found


def fit(sampler, task, turns, seed):
    """-> {"one": {operation: (shift, temperature)}, "three": the same}, best in the mean accuracy
    of all answers but the first; of "one" all operations have the same."""
    problems = [draw(task.puzzle, "train", f"dial/{seed}", i) for i in range(FITTED_ON)]
    groups, scores = last_operations(problems), {}
    for constants in [(shift, t) for shift in SHIFTS for t in TEMPERATURES]:
        shift, temperature = constants
        right, _ = asked(sampler, task, problems, turns, temperature, seed, shift)
        later = right[:, 1:].mean(1)  # [Q]
        scores[constants] = {operation: later[rows].sum() for operation, rows in groups.items()}
    best = max(scores, key=lambda constants: sum(scores[constants].values()))
    three = {x: max(scores, key=lambda constants: scores[constants][x]) for x in groups}
    return dict(one=dict.fromkeys(groups, best), three=three)


def measured(sampler, task, problems, turns, seed, constants):
    """Accuracy of every answer if each question has the constants of its last operation."""
    right, groups = torch.zeros(len(problems), turns), last_operations(problems)
    for operation, rows in groups.items():
        shift, temperature = constants[operation]
        right[rows] = asked(sampler, task, problems, turns, temperature, seed, shift)[0][rows]
    return right.mean(0).tolist()


def rates(sampler, task, problems, seed):
    """-> {operation: [share of right, of wrong first answers that the second changes]} at T=1; None
    for a share of none."""
    right, changed = asked(sampler, task, problems, 2, 1.0, seed)
    found = {}
    for operation, rows in sorted(last_operations(problems).items()):
        before, after = right[rows, 0], changed[rows, 1]
        parts = (before[:, None], 1 - before[:, None])
        found[operation] = [share_and_error(after[:, None] * part, part)[0] for part in parts]
    return found


def opened(model, turns):
    """A base or a run -> its DialledSampler, its task."""
    policy, task = open_model_and_task(model, turns=turns, say=lambda text: None)
    (token,) = task.encoding.encode_ordinary(": yes")
    return DialledSampler(policy, token), task


def base_of(lines):
    """The path of the base that these runs began with. (The arm `rounds` names another run.)"""
    return next(line["base"] for line in lines if Path(line["base"]).name.startswith("base-"))


def version(lines):
    """8 hex digits of the base, whose name has a hash of its own, and of the code."""
    code, _ = code_and_imports(Path(ROOT, "tools/controls.py").read_text(encoding="utf-8"))
    parts = [base_of(lines), code, *(text for _, text in sorted(all_code().items()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def controls_of(name, lines):
    """The runs of one base and RL seed of the comparison `name` -> a line for the result file."""
    line, turns = lines[0], turns_in(lines)
    seed, questions = line["seed"], line["result"]["greedy"]["questions"]
    sampler, task = opened(base_of(lines), turns)
    problems = task.held_out(questions, seed)
    constants = fit(sampler, task, turns, seed)
    right = {k: measured(sampler, task, problems, turns, seed, c) for k, c in constants.items()}
    found = {"base": rates(sampler, task, problems, seed)}
    for one in lines:
        folder = Path("out") / f"compare-{name}-{one['arm']}-{one['base_seed']}-{seed}"
        if folder.exists():
            found[one["arm"]] = rates(opened(str(folder), turns)[0], task, problems, seed)
    about = dict(base_seed=line["base_seed"], seed=seed, version=version(lines))
    about |= dict(questions=questions, made_by=versions())
    return about | dict(constants=constants, right=right, rates=found)


def todays(path, now):
    """The lines of these {base seed: version}, by base."""
    lines = [one for one in lines_of(path, FIELDS) if one["version"] == now.get(one["base_seed"])]
    return sorted(lines, key=lambda line: line["base_seed"])


def main():
    """Measures the bases that have no line yet, and prints the tables."""
    config = parse_flags(Config, __doc__)
    source = Path("results") / f"compare-{file_name('name', config.name)}.jsonl"
    path = Path("results") / f"controls-{config.name}.jsonl"
    first_seeds = [line for line in read_lines(source) if line["seed"] == 20 * line["base_seed"]]
    known = [line for line in first_seeds if line["arm"] in ARMS]
    known.sort(key=lambda line: list(ARMS).index(line["arm"]))
    runs = {}
    for line in known:
        runs.setdefault(line["base_seed"], []).append(line)
    now = {base: version(of) for base, of in runs.items()}
    there = {line["base_seed"] for line in todays(path, now)}
    todo = [base for base in sorted(runs.keys() - there) if base < config.bases]
    for base in tqdm(todo, "controls", unit="base", disable=None):
        append(path, controls_of(config.name, runs[base]))
    lines = todays(path, now)
    if not lines:
        raise BadInput(f"{path} has no controls of today's code for {source}: run tools.compare")
    with reading(path):
        print(controls_tables(lines, with_bases(known)))


if __name__ == "__main__":
    guarded(main)
