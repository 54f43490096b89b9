"""Tables of compare.py: means over bases, with intervals that hold.

    python -m tools.compare --bases 0        # the tables of the runs that are there
    python -m tools.tables                   # a line for each experiment of the map

The idea. A result has three sources of chance: the base model, the RL seed, and the questions with
their random numbers. All runs of a (base, seed) pair ask the same questions with the same random
numbers, so two arms are compared pair by pair. Another pair asks other questions. So all that
varies is in the spread of the bases' means, and Student's t over bases gives a 95 % interval that
covers the truth in 95 % of simulated comparisons, whichever of the three varies most
(tests/test_compare.py). In 1,000 of them a percentile bootstrap over bases, seeds and questions
covered 99 % where only questions vary, and 88 % where bases differ most: it counts the chance of
questions twice, and resamples five bases.

Two bases have no interval of use (t is 12.7), so their two values are shown. With a single base the
interval is over its seeds, and says nothing about other bases.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from eval import turns_of
from report.trees import lines_of
from runtime.flags import BadInput, guarded, parse_flags, reading

# Student's t, 97.5 %, for 1, 2, 3, ... degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
T95 += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)
ROWS = {"T=1": "temperature 1", "greedy": "greedy"}  # title in tables -> row of a result
# What every answer after the first does: field of a result, without the turn's number -> title.
# (A bar, as in P(no | right), would end the cell.)
LOOKS = dict(
    fix="i→c",
    broke="c→i",
    no_right="changes a right answer",
    no_wrong="changes a wrong answer",
    fresh="changed to a new answer",
)


# ---- intervals -----------------------------------------------------------------------------------


def interval(groups):
    """[values of the seeds of a base, ...] -> mean over bases, half-width of its 95 % interval.

    The half-width is None for a single value.
    """
    means = [statistics.mean(values) for values in groups]
    mean = statistics.mean(means)
    if len(means) == 1:
        means = groups[0]
    if len(means) == 1:
        return mean, None
    t = T95[min(len(means) - 2, len(T95) - 1)]
    return mean, t * statistics.stdev(means) / math.sqrt(len(means))


def by_base(lines, value):
    """-> [[value(line) of each seed], ...], a list for each base. None is left out."""
    groups = {}
    for line in sorted(lines, key=lambda line: (line["base_seed"], line["seed"])):
        if (x := value(line)) is not None:
            groups.setdefault(line["base_seed"], []).append(x)
    return list(groups.values())


def cell(groups, sign=""):
    """Groups of shares -> "85.2 ± 1.3", in percent; "84.0 / 86.4" of two; empty without values."""
    if not groups:
        return ""
    if len(groups) == 2:
        return " / ".join(f"{100 * statistics.mean(values):{sign}.1f}" for values in groups)
    mean, half = interval(groups)
    return f"{100 * mean:{sign}.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


# ---- tables --------------------------------------------------------------------------------------


def value_of(label, name):
    """-> function: a line's share in column `name` ("t1", "no_right4", ...) of a table."""

    def value(line):
        found = line["result"][ROWS[label]].get(name)
        return found and found[0]

    return value


def differences(lines, reference, label, name):
    """-> [[share of a line minus that of the reference's line of its base and seed, ...] of each
    base]. Lines without such a partner are left out."""
    value, theirs = value_of(label, name), {(r["base_seed"], r["seed"]): r for r in reference}
    pairs = [line for line in lines if (line["base_seed"], line["seed"]) in theirs]
    return by_base(pairs, lambda line: value(line) - value(theirs[line["base_seed"], line["seed"]]))


def extra_of(name):
    """-> function: a line's share in its extra column `name`; None if it has none."""
    return lambda line: line["extra"][name][0] if name in line["extra"] else None


def turns_in(lines):
    """The most answers in a row that these runs were asked for."""
    return max(turns_of(line["result"][row]) for line in lines for row in ROWS.values())


def arms_of(lines):
    """{arm: its lines}, in the order of their first line."""
    arms = {}
    for line in lines:
        arms.setdefault(line["arm"], []).append(line)
    return arms


def with_bases(lines):
    """The lines, and before them one for each (base, seed) with the base's own result. Lines that
    have been through it already stay as they are."""
    bases = {}
    for line in lines:
        # The arm `rounds` ends with a run that begins with another run, not with a base.
        if line["base_result"] and Path(line["base"]).name.startswith("base-"):
            bases[line["base_seed"], line["seed"]] = line | dict(
                arm="base", result=line["base_result"], extra={}
            )
    return [*bases.values(), *(line for line in lines if line["arm"] != "base")]


def all_tables(lines, old=()):
    """Everything that compare.py prints of the runs of one experiment, as Markdown."""
    runs = with_bases(lines)
    parts = [short_table(runs, old), *(main_table(runs, label, old) for label in ROWS)]
    for reference in ("grpo", "mgrpo"):
        parts += [paired_table(runs, label, reference) for label in ROWS]
    parts += [looks_table(runs, "T=1", field) for field in LOOKS]
    parts += [placebo(lines), footnotes(lines), remark(lines, old)]
    return "\n\n".join(filter(None, parts))


def short_table(lines, old=()):
    """Markdown: first, second and last answer at T=1, the last one greedy, and what it gains at T=1
    over GRPO and over the best constants of the base; the head names the flags of all runs."""
    arms, last = arms_of(lines), turns_in(lines)
    shown = sorted({1, 2, last})
    references = [name for name in ("grpo", "dial") if name in arms]
    heads = [f"Acc@t{k}" for k in shown] + [f"greedy t{last}"]
    heads += [f"t{last} minus {name}" for name in references] + ["bases x seeds x questions"]
    rows = [row(f"`{lines[0]['flags']}`" if lines[0]["flags"] else "defaults", heads)]
    rows.append("|---" * (len(heads) + 1) + "|")
    for arm, runs in arms.items():
        cells = [cell(by_base(runs, value_of("T=1", f"t{k}"))) for k in shown]
        cells.append(cell(by_base(runs, value_of("greedy", f"t{last}"))))
        for reference in references:
            groups = differences(runs, arms[reference], "T=1", f"t{last}")
            cells.append("" if arm == reference else cell(groups, "+"))
        rows.append(row(named(arm, old), [*cells, count(runs)]))
    return "\n".join(rows)


def map_table(experiments):
    """Markdown: for each experiment of the map, {name: lines}, what its base does to a first answer
    at T=1, its last accuracy, and what arms gain there over GRPO and over the best constants."""
    heads = ["rejects right", "rejects wrong", "base, last"]
    heads += ["mgrpo - GRPO", "mgrpo - dial", "chains - GRPO", "chains - dial", "bases"]
    rows = [row("T=1", heads), "|---" * (len(heads) + 1) + "|"]
    for name, lines in experiments.items():
        arms, last = arms_of(with_bases(lines)), f"t{turns_in(lines)}"
        names = ("no_right2", "no_wrong2", last)
        cells = [cell(by_base(arms["base"], value_of("T=1", name))) for name in names]
        for arm in ("mgrpo", "chains"):
            for less in ("grpo", "dial"):
                groups = differences(arms.get(arm, []), arms.get(less, []), "T=1", last)
                cells.append(cell(groups, "+"))
        rows.append(row(name, [*cells, str(len({line["base_seed"] for line in lines}))]))
    return "\n".join(rows)


def named(arm, old):
    """An arm's name in a row, which says so if other code made its runs."""
    return f"{arm} (other code)" if arm in old else arm


def main_table(lines, label, old=()):
    """Markdown: the accuracy of every answer, and of as many independent first answers at about the
    same tokens: their majority, and whether any is right (pass).

    A cell is mean ± half of the 95 % interval over bases. Rows of the arms in `old` say that other
    code made them.
    """
    turns = turns_in(lines)
    titles = {f"t{k}": f"Acc@t{k}" for k in range(1, turns + 1)}
    extra = {"majority": f"majority of {turns}", "pass": f"pass@{turns}"}
    if label != "T=1" or turns > 4:  # six columns of accuracies leave no room
        extra = {}
    heads = [*titles.values(), *extra.values(), "bases x seeds x questions"]
    rows = [row(label, heads), "|---" * (len(heads) + 1) + "|"]
    for arm, runs in arms_of(lines).items():
        cells = [cell(by_base(runs, value_of(label, name))) for name in titles]
        cells += [cell(by_base(runs, extra_of(name))) for name in extra]
        rows.append(row(named(arm, old), [*cells, count(runs)]))
    return "\n".join(rows)


def count(runs):
    """5 x 1 x 1,024: bases, seeds of each, questions of each run."""
    bases = {run["base_seed"] for run in runs}
    questions = {run["result"]["greedy"]["questions"] for run in runs}
    seeds = len(runs) / len(bases)
    return f"{len(bases)} x {seeds:g} x {' or '.join(f'{q:,}' for q in sorted(questions))}"


def looks_table(lines, label, field):
    """Markdown: one of LOOKS at every answer after the first."""
    names = [f"{field}{k}" for k in range(2, turns_in(lines) + 1)]
    heads = [f"t{k}" for k in range(2, turns_in(lines) + 1)]
    rows = [row(f"{label}, {LOOKS[field]}", heads), "|---" * (len(heads) + 1) + "|"]
    for arm, runs in arms_of(lines).items():
        rows.append(row(arm, [cell(by_base(runs, value_of(label, name))) for name in names]))
    return "\n".join(rows)


def paired_table(lines, label, reference="grpo"):
    """Markdown: each arm minus the reference, run by run of the same base and seed."""
    arms = arms_of(lines)
    if reference not in arms or len(arms) < 2:
        return ""
    turns = turns_in(lines)
    heads = [f"Acc@t{k}" for k in range(1, turns + 1)]
    rows = [row(f"{label}, minus {reference}", heads), "|---" * (len(heads) + 1) + "|"]
    for arm, runs in arms.items():
        names = [f"t{k}" for k in range(1, turns + 1)]
        groups = [differences(runs, arms[reference], label, name) for name in names]
        if arm != reference and groups[0]:
            rows.append(row(arm, [cell(values, "+") for values in groups]))
    return "\n".join(rows)


def row(name, cells):
    """Cells as a line of Markdown; an empty cell is a single space."""
    return f"| {name} |" + "".join(f" {text} |" if text else " |" for text in cells)


def placebo(lines):
    """A line: of each arm a second independent first answer minus the first, in truth 0."""
    gap = lambda line: line["extra"]["fresh"][0] - line["result"]["temperature 1"]["t1"][0]
    cells = []
    for arm, runs in arms_of(lines).items():
        groups = by_base([run for run in runs if "fresh" in run["extra"]], gap)
        cells += [f"{arm} {cell(groups, '+')}"] if groups else []
    return f"placebo, 0 in truth: {', '.join(cells)}" if cells else ""


def footnotes(lines):
    """What the tables rest on: tokens, steps and time of a run, inference tokens of a question."""
    rows = []
    for arm, runs in arms_of(lines).items():
        middle = {
            name: statistics.median(run[name] for run in runs)
            for name in ("generated", "steps", "seconds")
        }
        asked = statistics.mean(run["result"]["temperature 1"]["tokens"] for run in runs)
        votes = [run["extra"]["tokens"] for run in runs if "tokens" in run["extra"]]
        text = f"inference {asked:.0f} tokens for {turns_in(runs)} answers in a row"
        if votes:
            text += f", {statistics.mean(votes):.0f} for as many independent ones"
        rows.append(
            f"{arm}: {middle['generated'] / 1e6:.2f} M generated tokens, {middle['steps']:.0f} "
            f"steps, {middle['seconds']:.0f} s a run; {text}"
        )
    return "\n".join(rows)


def controls_tables(lines, runs):
    """The constants' accuracies, what arms gain over them, and the rates by operation, as Markdown.

    lines: of controls.py; runs: of compare.py, one RL seed for each base, in the order of the rows.
    """
    turns, questions = len(lines[0]["right"]["one"]), lines[0]["questions"]
    heads = [*(f"Acc@t{k}" for k in range(1, turns + 1)), "bases x seeds x questions"]
    rows = [row("constants", heads), "|---" * (len(heads) + 1) + "|"]
    for kind in ("one", "three"):
        columns = zip(*(line["right"][kind] for line in lines))  # by turn, of all bases
        cells = [cell([[x] for x in column]) for column in columns]
        rows.append(row(kind, [*cells, f"{len(lines)} x 1 x {questions:,}"]))

    pairs = [(label, kind) for label in ROWS for kind in ("one", "three")]
    heads = [f"{label}, minus {kind}" for label, kind in pairs]
    rows += ["", row(f"Acc@t{turns}", heads), "|---" * (len(heads) + 1) + "|"]
    last = {
        kind: {line["base_seed"]: line["right"][kind][-1] for line in lines} for _, kind in pairs
    }
    for arm, of in arms_of([run for run in runs if run["base_seed"] in last["one"]]).items():
        cells = []
        for label, kind in pairs:
            value, control = value_of(label, f"t{turns}"), last[kind]
            groups = by_base(of, lambda run, v=value, c=control: v(run) - c[run["base_seed"]])
            cells.append(cell(groups, "+"))
        rows.append(row(arm, cells))

    cues = [(part, x) for part in (0, 1) for x in lines[0]["rates"]["base"]]
    heads = [f"{('right', 'wrong')[part]}, {operation}" for part, operation in cues]
    rows += ["", row("changes, T=1", [*heads, "bases"]), "|---" * (len(heads) + 2) + "|"]
    for arm in dict.fromkeys(arm for line in lines for arm in line["rates"]):
        cells, have = [], [line["rates"][arm] for line in lines if arm in line["rates"]]
        for part, operation in cues:
            shares = [one[operation][part] for one in have if one[operation][part] is not None]
            cells.append(f"{100 * statistics.mean(shares):.0f}" if shares else "")
        rows.append(row(arm, [*cells, str(len(have))]))
    return "\n".join(rows)


def remark(lines, old):
    """How many of the runs are not today's, in a line; empty when all are."""
    stale = sum(line["arm"] in old for line in lines)
    if not stale:
        return ""
    return (
        f"{stale} of these {len(lines)} runs ({', '.join(old)}) were made by other code, from "
        "another base or with another compute type than a run of today; --arms with --bases makes "
        "new ones"
    )


def bound(candidates, turns, memory=True):
    """Acc@tk to be expected on `solve` if every check is right -> [turns].

    memory: no candidate is tried twice, so of c candidates k tries hit with probability
    min(k / c, 1). Without it each further try is any candidate but the last one, and misses with
    probability 1 - 1 / (c - 1). c is uniform in 1..candidates.
    """

    def hit(c, k):
        if memory or c == 1:
            return min(k / c, 1.0)
        return 1 - (1 - 1 / c) * (1 - 1 / (c - 1)) ** (k - 1)

    counts = range(1, candidates + 1)
    return [statistics.mean(hit(c, k) for c in counts) for k in range(1, turns + 1)]


def experiments():
    """{name: lines} of all files results/compare-<name>.jsonl."""
    paths = sorted(Path("results").glob("compare-*.jsonl"))
    return {path.stem.removeprefix("compare-"): list(lines_of(path, ("arm",))) for path in paths}


@dataclass(frozen=True)
class Config:
    """No flags."""


def main():
    """Prints the map's first table."""
    parse_flags(Config, __doc__)
    found = experiments()
    if not found:
        raise BadInput("results/ has no runs of tools.compare: run python -m tools.compare --map")
    with reading("results/compare-*.jsonl"):
        print(map_table(found))


if __name__ == "__main__":
    guarded(main)
