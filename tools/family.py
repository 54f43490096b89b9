"""What each relative of GRPO claims, beside what was measured here.

    python -m tools.compare --map family,family-chain,family-long   # the runs: hours
    python -m tools.one_step                                    # what one step of each does
    python -m tools.family                                      # looks at them, prints the tables

The idea. A paper claims an effect: shorter answers, wider choice, calmer gradients. Each claim has
a figure that shows the effect itself, which a tiny run resolves sooner than accuracy. A run is
compared with GRPO's from the same base and seed, at equal generated tokens; a step with GRPO's on
the same answers. A claim is confirmed or refuted where the 95 % interval over bases leaves 0 out,
and not resolved where it does not. That two are as accurate is confirmed where the whole interval
lies within a hundredth.

What the log does not have is measured on the models that the runs left: 16 first answers to each of
some held-out questions at temperature 1, by the run and by its base. Each look adds a JSON line to
results/looked-<name>.jsonl.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
import functools
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from tqdm import tqdm

from eval import pass_at
from mgrpo import SamplingParams, rollout
from report.trees import lines_of
from runtime.flags import Between, guarded, parse_flags
from tasks.opening import make_sampler, open_model_and_task
from tools.compare import append, read_lines
from tools.controls import base_of
from tools.one_step import FIGURES, read_steps, steps_table
from tools.tables import arms_of, by_base, interval
from variants.group_dro import kind
from variants.table import METHODS, SEES_GOLD
from variants.veripo import consistent

SAMPLES = 16
HARD = 0.2  # a hard question: the base is right in less
SAME = 0.01  # "as accurate": shares that differ by no more
FIELDS = ("arm", "base_seed", "seed", "version", "pass", "hard", "easy", "worst", "consistent")
FIELDS += ("tokens",)

# Claims of the papers: method, what it claims, figure, experiment, the sign of method - GRPO that
# is claimed, and that which we expect at this size. "0" means no difference.
RUNS = SOLVE, CHAIN, LONG = "family", "family-chain", "family-long"
STEP = "one step"
CLAIMS = (
    ("mgrpo", "mends its answers", "Acc@t2", SOLVE, "+", "+"),
    ("mgrpo", "mends its answers", "i→c", SOLVE, "+", "+"),
    ("dr-grpo", "no length bias", "tokens", CHAIN, "-", "0"),
    ("dr-grpo", "as accurate", "pass@1", CHAIN, "0", "0"),
    ("rloo", "as accurate, unbiased", "pass@1", CHAIN, "0", "0"),
    ("ws-grpo", "shorter", "tokens", CHAIN, "-", "-"),
    ("ws-grpo", "about as accurate", "pass@1", CHAIN, "0", "-"),
    ("igrpo", "better single answers", "pass@1", SOLVE, "+", "0"),
    ("igrpo", "mends its answers", "Acc@t2", SOLVE, "+", "+"),
    ("igrpo", "mends its answers", "i→c", SOLVE, "+", "+"),
    ("dagrpo", "calmer gradients", "gradient, largest / median", CHAIN, "-", "-"),
    ("dagrpo", "as accurate", "pass@1", CHAIN, "0", "0"),
    ("e-grpo", "near misses teach", "groups with a signal, first half", LONG, "+", "+"),
    ("e-grpo", "near misses teach", "accuracy, first fifth", LONG, "+", "+"),
    ("lambda-grpo", "learns sooner", "accuracy, first half", CHAIN, "+", "0"),
    ("gcpo", "better answers", "pass@1", CHAIN, "+", "0"),
    ("gcpo", "signs turn", "turned", STEP, "+", "+"),
    ("edge", "advantages of mixed groups vary more", "variance", STEP, "+", "+"),
    ("edge", "groups with one verdict stay without a signal", "signal", STEP, "0", "0"),
    ("edge", "keeps entropy", "entropy at the end", SOLVE, "+", "+"),
    (
        "edge-gec",
        "no group stays wrong",
        "groups with a signal, first half",
        SOLVE,
        "+",
        "+",
    ),
    ("grpo-care", "consistent", "consistent", CHAIN, "+", "+"),
    ("grpo-care", "as accurate", "pass@1", CHAIN, "0", "0"),
    ("unlikely", "rare right answers rise", "rare", STEP, "+", "+"),
    ("unlikely", "and more than others do", "rare over all right", STEP, "+", "+"),
    ("unlikely", "wider", "pass@16", SOLVE, "+", "+"),
    ("unlikely", "wider, not sharper", "pass@1", SOLVE, "0", "0"),
    ("veripo", "consistent", "consistent", CHAIN, "+", "+"),
    ("veripo", "learns sooner", "accuracy, first half", CHAIN, "+", "+"),
    ("nthr", "right answers are not dragged down", "right", STEP, "+", "+"),
    ("nthr", "right answers are not dragged down", "fell", STEP, "-", "-"),
    ("nthr", "better answers", "pass@1", CHAIN, "+", "0"),
    ("disco", "hard questions count", "pass@1, hard questions", LONG, "+", "+"),
    ("disco", "keeps entropy", "entropy at the end", LONG, "+", "+"),
    ("raft", "gains early", "accuracy, first fifth", CHAIN, "+", "+"),
    ("raft", "entropy collapses", "entropy at the end", CHAIN, "-", "-"),
    ("raft", "ends lower", "pass@1", CHAIN, "-", "-"),
    ("raft++", "close to GRPO", "pass@1", CHAIN, "0", "0"),
    ("reinforce-rej", "close to GRPO", "pass@1", CHAIN, "0", "0"),
    ("grpo-lead", "shorter", "tokens", LONG, "-", "-"),
    ("grpo-lead", "hard questions count", "pass@1, hard questions", LONG, "+", "+"),
    ("grpo-lead", "easy ones stay", "pass@1, other questions", LONG, "0", "0"),
    ("group-dro", "the worst kind gets better", "pass@1, worst kind", LONG, "+", "+"),
    ("group-dro", "the mean stays", "pass@1", LONG, "0", "0"),
)
# Figures that are no shares, and their digits.
NO_SHARES = {"tokens": 2, "gradient, largest / median": 1, "entropy at the end": 4}
NO_SHARES |= {"rare over all right": 2}
# What the table of all runs shows, with shorter heads.
MEANS = {
    "Acc@t1": "Acc@t1",
    "Acc@t2": "Acc@t2",
    "pass@1": "pass@1",
    "pass@4": "pass@4",
    f"pass@{SAMPLES}": f"pass@{SAMPLES}",
    "pass@1, hard questions": "hard",
    "consistent": "consistent",
    "tokens": "tokens",
    "groups with a signal, first half": "signal",
    "entropy at the end": "entropy",
    "gradient, largest / median": "gradient",
}


@dataclass(frozen=True)
class Config:
    names: tuple[str, ...] = RUNS  # of comparisons
    # Held-out questions that are asked 16 times; 0: only prints what is there.
    questions: Annotated[int, Between(0, 1 << 20)] = 512


# ---- figures of a run ----------------------------------------------------------------------------


def figures(line, looked):
    """A line of compare.py, and what was looked at -> {figure: number}."""
    log, row = line["log"], line["result"]["temperature 1"]
    gradient = log["grad_norm"]
    return {
        "Acc@t1": row["t1"][0],
        "Acc@t2": row["t2"][0],
        "i→c": row["fix2"][0],
        **{f"pass@{k}": looked["pass"][i] for i, k in enumerate((1, 4, SAMPLES))},
        "pass@1, hard questions": looked["hard"],
        "pass@1, other questions": looked["easy"],
        "pass@1, worst kind": looked["worst"],
        "consistent": looked["consistent"],
        "tokens": looked["tokens"],
        # log: mean in the first fifth of the steps, first half, last tenth; median, largest
        "accuracy, first fifth": log["accuracy1"][0],
        "accuracy, first half": log["accuracy1"][1],
        "groups with a signal, first half": log["signal1"][1],
        "entropy at the end": log["entropy"][2],
        "gradient, largest / median": gradient[4] / max(gradient[3], 1e-9),
    }


def look(name, line, questions):
    """Asks the model that a run left, and its base -> a line for the result file."""
    folder = f"out/compare-{name}-{line['arm']}-{line['base_seed']}-{line['seed']}"
    problems, mine = asked(folder, questions, line["seed"])
    right = mine.correct.view(-1, SAMPLES).float()  # [Q, 16]
    hard = right_before(base_of([line]), questions, line["seed"]) < HARD
    sound = [consistent(text, problem) for text, problem in zip(mine.texts, mine.problems)]
    kinds = {}
    for problem, share in zip(problems, right.mean(1).tolist()):
        kinds.setdefault(kind(problem.question), []).append(share)
    return dict(
        arm=line["arm"],
        base_seed=line["base_seed"],
        seed=line["seed"],
        version=line["version"],
        hard=right[hard].mean().item() if hard.any() else None,
        easy=right[~hard].mean().item() if not hard.all() else None,
        worst=min(statistics.mean(shares) for shares in kinds.values()),
        consistent=statistics.mean(sound),
        tokens=mine.lengths.float().mean().item(),
        questions=len(problems),
        **{"pass": [chances(right, k) for k in (1, 4, SAMPLES)]},
    )


def asked(folder, questions, seed):
    """-> held-out problems, and the Layer of SAMPLES first answers to each of the model there."""
    model, task = open_model_and_task(folder, say=lambda text: None)
    problems = task.held_out(questions, seed)
    # A seed apart from the tables': these are other answers.
    sampling = SamplingParams(task.max_new_tokens, 1.0, seed=2_000_000 + seed)
    sampler = make_sampler(model, [task], 1)
    (answers,) = rollout(sampler, task, problems, (SAMPLES,), sampling)
    return problems, answers


@functools.cache
def right_before(base, questions, seed):
    """-> [questions], the share of the base's answers that are right; the same for all its runs."""
    return asked(base, questions, seed)[1].correct.view(-1, SAMPLES).float().mean(1)


def chances(right, k):
    """right: [Q, samples] 0/1 -> the chance that k samples of a question hold a right one."""
    return statistics.mean(pass_at(k, right.shape[1], int(c)) for c in right.sum(1))


# ---- the table -----------------------------------------------------------------------------------


def verdict(groups, claimed):
    """Differences by base, and the sign that a paper claims -> what they say of it. "0" claims that
    the difference is at most SAME."""
    mean, half = interval(groups)
    if len(groups) < 3:
        return "not resolved"
    least, most = abs(mean) - half, abs(mean) + half  # of the difference, its sign aside
    if claimed == "0":
        return "confirmed" if most <= SAME else "refuted" if least > SAME else "not resolved"
    if least <= 0 or half == 0:  # equal differences: the figure's grain is coarser than they are
        return "not resolved"
    return "confirmed" if (mean > 0) == (claimed == "+") else "refuted"


def differences(runs, arm, figure, other="grpo"):
    """[(line, figures)] -> [[arm minus the other of each seed], ...], a list for each base."""
    key = lambda line: (line["base_seed"], line["seed"])
    runs = [(line, found[figure]) for line, found in runs if found[figure] is not None]
    theirs = {key(line): x for line, x in runs if line["arm"] == other}
    pairs = [
        line | dict(difference=x - theirs[key(line)])
        for line, x in runs
        if line["arm"] == arm and key(line) in theirs
    ]
    return by_base(pairs, lambda line: line["difference"])


def shown(groups, figure):
    """The mean difference and its interval, in percent but for figures that are no shares."""
    if figure in FIGURES:
        _, scale, digits = FIGURES[figure]
    else:
        scale, digits = (1, NO_SHARES[figure]) if figure in NO_SHARES else (100, 1)
    mean, half = interval(groups)
    error = "" if half is None else f" ± {scale * half:.{digits}f}"
    return f"{scale * mean:+.{digits}f}{error}"


def claims_table(runs):
    """{experiment: [(line, figures)]} -> the table of docs/variants.md."""
    heads = "claims | figure, minus GRPO's | claimed | expected | measured | verdict | bases"
    rows = [f"| method | {heads} |", "|---|---|---|---|---|---|---|---|"]
    for gold in (False, True):
        for method, claim, figure, name, claimed, expected in CLAIMS:
            groups = differences(runs.get(name, []), method, figure)
            if (method in SEES_GOLD) == gold and groups:
                title = FIGURES[figure][0] if figure in FIGURES else figure
                cells = (f"`{method}`" + "*" * gold, claim, f"{title}; {name}", claimed, expected)
                measured = (shown(groups, figure), verdict(groups, claimed), str(len(groups)))
                rows.append(f"| {' | '.join([*cells, *measured])} |")
    return "\n".join(rows)


def means_table(runs):
    """[(line, figures)] of an experiment -> the mean of each arm's figures over the bases that all
    arms have, in percent but for NO_SHARES; the claims have the intervals."""
    rows = [f"| method | {' | '.join(MEANS.values())} |", "|---" * (len(MEANS) + 1) + "|"]
    arms = arms_of([line for line, _ in runs])
    shared = set.intersection(*({line["base_seed"] for line in of} for of in arms.values()))
    for arm in arms:
        cells, of = (
            [],
            [run for run in runs if run[0]["arm"] == arm and run[0]["base_seed"] in shared],
        )
        for figure in MEANS:
            groups = by_base(
                [line | dict(x=found[figure]) for line, found in of], lambda line: line["x"]
            )
            scale, digits = (1, NO_SHARES[figure]) if figure in NO_SHARES else (100, 1)
            mean = interval(groups)[0] if groups else None
            cells.append("" if mean is None else f"{scale * mean:.{digits}f}")
        rows.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def composition_table(lines):
    """The relatives as MGRPO, minus MGRPO itself: accuracies at temperature 1 of 1, 2 and 4
    answers."""
    arms, turns = arms_of(lines), ("t1", "t2", "t4")
    rows = ["| method | Acc@t1 | Acc@t2 | Acc@t4 | bases |", "|---|---|---|---|---|"]
    of = lambda line: {turn: line["result"]["temperature 1"][turn][0] for turn in turns}
    runs = [(line, of(line)) for line in lines]
    for arm in [arm for arm in arms if arm.endswith("-4,3")]:
        groups = {turn: differences(runs, arm, turn, "question") for turn in turns}
        cells = [shown(groups[turn], turn) for turn in turns]
        rows.append(f"| `{arm}` | {' | '.join(cells)} | {len(groups['t1'])} |")
    return "\n".join(rows)


def looked_at(name, lines, questions):
    """Looks at the runs that nobody has looked at -> [(line, figures), ...] of those that are."""
    path = Path("results") / f"looked-{name}.jsonl"
    key = lambda line: (line["arm"], line["base_seed"], line["seed"], line["version"])
    there = {key(line): line for line in lines_of(path, FIELDS)} if path.exists() else {}
    todo = [line for line in lines if line["arm"] in METHODS and key(line) not in there]
    for line in tqdm(todo if questions else (), name, unit="run", disable=None):
        torch.set_num_threads(1)
        there[key(line)] = look(name, line, questions)
        append(path, there[key(line)])
    return [(line, figures(line, there[key(line)])) for line in lines if key(line) in there]


def read_runs(names=RUNS, questions=0):
    """-> {experiment: [(line, figures), ...]} of the committed runs and steps, and of those that
    are looked at now."""
    runs = {}
    for name in names:
        lines = read_lines(Path("results") / f"compare-{name}.jsonl")
        runs[name] = looked_at(name, lines, questions)
    runs[STEP] = []
    for line in read_steps("solve"):
        found = line | {"rare over all right": line["rare"] / line["right"]}
        runs[STEP].append((line | dict(arm=line["method"]), found))
    return runs


def main():
    config = parse_flags(Config, __doc__)
    runs = read_runs(config.names, config.questions)
    print(claims_table(runs))
    for name in config.names:
        print(f"\n{name}\n\n{means_table(runs[name])}")
    print(f"\n{composition_table(read_lines(Path('results') / f'compare-{SOLVE}.jsonl'))}")
    if runs[STEP]:
        print(f"\n{steps_table(read_steps('solve'))}")


if __name__ == "__main__":
    guarded(main)
