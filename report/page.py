"""A page about a run: its table, its curves, its trees, and what made it, in one file that opens
from disk.

    python report.py out/solve-mgrpo-0                       # writes out/solve-mgrpo-0/report.html
    python report.py out/solve-grpo-0 out/solve-mgrpo-0      # the second beside the first:
                                                             out/solve-mgrpo-0/report-solve-grpo-0.html
    python report.py out/tiny-qwen-eval-gsm8k-test.jsonl     # dialogues of eval.py alone
    python report.py out/solve-mgrpo-0 --output page.html

The idea. Everything is made again from what a run has written so far (config.json, metrics.jsonl,
rollouts.jsonl, result.json, eval-*.jsonl), so a run that was killed half-way has its page too;
train.py and eval.py make it at their end. Tables are HTML, curves SVG (curves.py; without
matplotlib the page has none and says so), and trees are data that page.html's script draws a
screenful at a time, so that a large page opens at once. A run with more trees than fit into `ROOM`
shows evenly chosen ones, and says so.

What a model writes may be anything, also HTML. It reaches the page as JSON in which no "<" stands,
is put there as text nodes, and the page's policy names the one script that may run by its hash, and
no source to load anything from.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C while torch is imported is one sentence too

# isort: split
import base64
import hashlib
import html
import itertools
import json
import math
import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from report import curves
from runtime.distributed import rank0
from runtime.flags import BadInput, guarded, parse_flags, read_json, reading
from runtime.transcripts import (
    answers,
    complain,
    dialogues,
    evaluation_of,
    lines_of,
    read_trees,
    set_of,
)
from tables import COLUMNS, percent, summarise

ROOM = 9_000_000  # bytes of trees on a page, about
# they make the questions
ASKED = (
    "task",
    "data",
    "eval_data",
    "eval_questions",
    "candidates",
    "operations",
    "modulus",
    "numbers",
)
PAGE = Path(__file__).with_name("page.html")
NO_CURVES = "<p>The curves need matplotlib: <code>pip install matplotlib</code>, then <code>python report.py</code> again.</p>"


@dataclass(frozen=True)
class Config:
    output: str = ""  # where the page goes; empty: report.html in the run's folder


class Run(NamedTuple):
    """What there is of a run, or of an evaluation without one."""

    name: str
    config: dict  # empty for an evaluation alone
    metrics: list  # lines of metrics.jsonl
    result: dict  # result.json: {"base": {"greedy": ..., "temperature 1": ...}, "MGRPO": ...}
    rollouts: list  # files of training's trees, one or none
    evals: list  # files of eval.py's dialogues
    page: Path  # where its page goes


# ---- reading -------------------------------------------------------------------------------------


def open_run(path):
    """A run's folder, or a file of dialogues -> Run. BadInput for what is neither."""
    path = Path(path)
    if path.is_file() and re.search(r"eval-.*\.jsonl$", path.name):
        return evaluation([path])
    if not (path / "config.json").exists():
        raise BadInput(
            f"{path} is no run (it has no config.json) and no eval-....jsonl of eval.py: name a "
            "folder like out/solve-mgrpo-0"
        )
    result, rollouts = path / "result.json", path / "rollouts.jsonl"
    return Run(
        path.resolve().name,
        object_in(path / "config.json"),
        list(lines_of(path / "metrics.jsonl", ("step", "generated"))),
        object_in(result) if result.exists() else {},
        [rollouts] if rollouts.exists() else [],
        sorted(path.glob("*eval-*.jsonl")),
        path / "report.html",
    )


def object_in(path):
    """The JSON object in a file that is there; BadInput if it holds something else."""
    found = read_json(path, "a run has one")
    if not isinstance(found, dict):
        raise BadInput(f"{path} is damaged, or not what it should be: it holds no JSON object")
    return found


def evaluation(paths):
    """Files of dialogues of one evaluation, several if several processes wrote them -> Run."""
    name = evaluation_of(paths[0])
    return Run(name, {}, [], {}, [], paths, paths[0].with_name(f"{name}.html"))


def distinct(runs):
    """Runs with names that tell them apart, also when their folders are called alike."""
    if len({run.name for run in runs}) == len(runs):
        return runs
    return [run._replace(name=f"{run.name} ({number})") for number, run in enumerate(runs, 1)]


# ---- tables --------------------------------------------------------------------------------------


def tables_part(runs):
    """The paper's table as HTML: before and after of each run, greedy and at temperature 1; the
    difference of two runs; evaluations."""
    parts = []
    for label in ("greedy", "temperature 1"):
        rows = [
            (
                f"{'before, the base' if name == 'base' else f'after {name}'}{f' ({run.name})' if len(runs) > 1 else ''}",
                result[label],
            )
            for run in runs
            for name, result in run.result.items()
            if label in result
        ]
        rows += difference(runs, label)
        if rows:
            parts.append(table(f"Held-out questions, {label}", rows))
        if len(runs) > 1 and rows and rows[-1][1].get("signed"):
            parts.append(
                "<p class=soft>The error of the difference takes the two runs for independent. "
                "They answer the same questions, so "
                "it is rather too large; over seeds, compare.py pairs them.</p>"
            )
    for run in runs:
        if len(run.result) == 1:
            parts.append(
                f"<p>{html.escape(run.name)} has not finished, so there is no table for after "
                f"training yet. {so_far(run)}</p>"
            )
        parts += [
            table(title, [(run.name, found)]) for title, found in evaluated(run.evals).items()
        ]
    return "\n".join(parts) or "<p>No table yet: it is made before the first step.</p>"


def difference(runs, label):
    """The last result of the second run minus that of the first, with the error that independent
    questions would give; nothing for one run, nor for runs that were asked different questions."""
    ends = [
        (run.name, list(run.result.values())[-1].get(label)) for run in runs if len(run.result) > 1
    ]
    asked = {json.dumps([run.config.get(name) for name in ASKED]) for run in runs}
    if len(ends) < 2 or len(asked) > 1 or not all(found for _, found in ends):
        return []
    (a, first), (b, second) = ends
    error = lambda k: (
        math.hypot(first[k][1], second[k][1]) if None not in (first[k][1], second[k][1]) else None
    )
    row = {k: (second[k][0] - first[k][0], error(k)) for k in COLUMNS if k in first and k in second}
    return [
        (
            f"{b} minus {a}",
            row | dict(questions=min(first["questions"], second["questions"]), signed=True),
        )
    ]


def table(title, rows):
    """[(name, {column: (mean, error), "questions"})] -> HTML."""
    shown = [k for k in COLUMNS if any(k in found for _, found in rows)]
    head = (
        "".join(f"<th scope=col>{html.escape(COLUMNS[k])}</th>" for k in shown)
        + "<th scope=col>questions</th>"
    )
    body = "".join(
        f"<tr><th scope=row>{html.escape(name)}</th>"
        + "".join(f"<td>{cell(found, k)}</td>" for k in shown)
        + f"<td>{found['questions']:,}</td></tr>"
        for name, found in rows
    )
    caption = f"{html.escape(title)}: percent ± standard error over questions"
    return (
        "<div "
        f"class=wide><table><caption>{caption}</caption><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
        "</div>"
    )


def cell(found, k):
    """A number of the table, its error set small."""
    value, _, error = (
        percent(found[k], "+" if k == "delta" or found.get("signed") else "") if k in found else "–"
    ).partition(" ")
    return f"{value} <small>{error}</small>"


def so_far(run):
    """The last look at held-out questions, as a sentence; empty when there was none."""
    looks = [line for line in run.metrics if line.get("heldout2") is not None]
    if not looks:
        return ""
    last = looks[-1]
    shown = (
        f"Acc@t{turn} {percent((last[f'heldout{turn}'], last.get(f'heldout{turn}_se')))}"
        for turn in (1, 2)
    )
    return (
        f"The last look, after {last['generated']:,} generated tokens: {', '.join(shown)} (greedy)."
    )


def evaluated(paths):
    """Files of dialogues -> {title: the columns}, made again from the verdicts, over the questions
    that have all their samples (the last may not, if the evaluation was killed)."""
    found = defaultdict(list)
    for path in paths:
        with reading(path):
            for some in dialogues(path):
                rights = [
                    [line[turn]["right"] for turn in ("turn1", "turn2") if turn in line]
                    for line in some
                ]
                found[set_of(path, some[0]["temperature"])].append(rights)
    return {title: columns(questions) for title, questions in found.items()}


def columns(questions):
    """[question][sample][turn] -> what tables.summarise finds, over the questions with as many
    samples and turns as any."""
    size = max((len(rights), len(rights[0])) for rights in questions)
    whole = [rights for rights in questions if (len(rights), min(map(len, rights))) == size]
    return summarise(torch.tensor(whole, dtype=torch.float)) | dict(questions=len(whole))


# ---- curves --------------------------------------------------------------------------------------


def curves_part(runs):
    """The curves of one run or two as HTML, with a line on how to read them; or why there are
    none."""
    runs = [run for run in runs if run.metrics]
    if not runs:
        return "<p>No step has been made.</p>"
    if not curves.available():
        return NO_CURVES
    figures = [
        f'<figure role="img" aria-label="{html.escape(chart.name)}, {html.escape(chart.unit)}"><h3>{html.escape(chart.name)}</h3>'
        f"{svg}</figure>"
        for chart, svg in curves.charts([(run.name, run.metrics, run.result) for run in runs])
    ]
    whose = " of the first run" if len(runs) > 1 else ""
    kl = any(run.config.get("kl_coef") for run in runs)
    without = (
        "" if kl else " There is no KL, since there was no reference (<code>--kl-coef</code> 0)."
    )
    return (
        f"<p class=soft>Lower axis: generated tokens; upper axis: steps{whose}. Thin line: every "
        f"step (of more than {curves.POINTS}, "
        "neighbours are averaged; of the largest gauge the largest is kept). Thick line: running "
        "mean. Points: held-out questions with "
        "standard errors; the first and the last come from the tables above, which ask more "
        "questions."
        f"{without}</p><div class=grid>{''.join(figures)}</div>"
    )


# ---- transcripts ---------------------------------------------------------------------------------


def chosen_trees(runs):
    """-> trees for the page, and how many there are in all. Of more than ROOM bytes every so
    many-th of each file is taken."""
    sources = [(run, path) for run in runs for path in run.rollouts + run.evals]
    every, kept, total = max(1.0, sum(path.stat().st_size for _, path in sources) / ROOM), [], 0
    for run, path in sources:
        with reading(path):
            count, chosen = 0, None
            if every > 1:
                count = sum(
                    1 for _ in (open_lines(path) if path in run.rollouts else dialogues(path))
                )
                chosen = {
                    round((i + 0.5) * every) for i in range(max(1, int(count / every)))
                }.__contains__
            trees = list(read_trees(path, chosen))
            for tree in trees:
                tree["set"] = ", ".join(
                    filter(None, (run.name if len(runs) > 1 else "", tree.get("set", "training")))
                )
            kept += trees
            total += count or len(trees)
    while len(kept) > 1 and len(as_json(kept)) > 1.5 * ROOM:  # a few are far longer than others
        kept = kept[1::2]
    return kept, total


def open_lines(path):
    """The lines of a file that look whole, as bytes, unparsed: there may be gigabytes. How many do
    not is said."""
    damaged = 0
    with open(path, "rb") as file:
        for line in file:
            if line.startswith(b"{") and line.endswith(b"}\n"):
                yield line
            else:
                damaged += 1
    complain(str(path), damaged)


def as_json(trees):
    """Trees as JSON that may stand in a <script> element: there is no "<" in it, nor a line
    separator."""
    text = json.dumps(trees, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028")


def transcripts_part(kept, total):
    """What stands above the trees: how many there are, and what they show."""
    if not total:
        return "<p>None were kept (<code>--transcripts 0</code>, or no step has been made).</p>"
    shown = f"{sum(map(answers, kept)):,} answers"
    some = (
        f"Here are {len(kept):,} of the {total:,} trees that were kept, evenly chosen ({shown})."
        if len(kept) < total
        else f"All {total:,} trees that were kept ({shown})."
    )
    return (
        f"<p class=soft>{some} Each is a question, the attempts at it, and behind each attempt the "
        "guiding phrase and the corrections. "
        "R is the reward, A the advantage over the siblings; numbers have four decimals. From "
        "training, the first questions of every "
        "step are kept: questions are drawn at random, so this is a fair sample.</p>"
    )


# ---- how it was made -----------------------------------------------------------------------------


def made_part(runs):
    """Wall time by phase, what made each run, and all settings, those that differ first."""
    runs = [run for run in runs if run.config]
    if not runs:
        return "<p>These dialogues come from eval.py alone; there is no run to describe.</p>"
    settings = [
        {k: v for k, v in run.config.items() if k not in ("made_by", "resume")} for run in runs
    ]
    return (
        compared("Wall time", runs, [phases(run) for run in runs])
        + compared("Versions and machine", runs, [run.config.get("made_by", {}) for run in runs])
        + compared("Settings", runs, settings)
        + f"<p class=soft>{' '.join(html.escape(broken(run)) for run in runs)}</p>"
    )


def phases(run):
    """{phase: seconds and share} of what has been logged so far: from the table before the first
    step to the last step."""
    total = max((line.get("seconds") or 0.0 for line in run.metrics), default=0.0)
    spent = {
        phase: sum(line.get(field) or 0.0 for line in run.metrics)
        for phase, field in (
            ("sampling", "seconds_sampling"),
            ("training", "seconds_training"),
            ("entropies of the kept trees", "seconds_transcripts"),
            ("looks at held-out questions", "seconds_heldout"),
        )
    }
    spent["the table before, saving and the rest"] = total - sum(spent.values())
    shown = (
        {phase: f"{seconds:,.1f} s, {seconds / total:.0%}" for phase, seconds in spent.items()}
        if total
        else {}
    )
    before = run.config.get("made_by", {}).get("seconds_base")
    return (
        (
            {"making or loading the model": f"{before:,.1f} s, before all that"}
            if before is not None
            else {}
        )
        | shown
        | {
            "from the table before to the last step": f"{total:,.1f} s",
            "steps": f"{len(run.metrics):,}",
        }
    )


def broken(run):
    """Whether the run came to its end, in a sentence."""
    done = run.metrics[-1]["generated"] if run.metrics else 0
    wanted = run.config.get("tokens", 0)
    return f"{run.name}: {done:,} tokens generated of {wanted:,}{'.' if done >= wanted else '; it was stopped, or is still running.'}"


def compared(title, runs, values):
    """A table with a line for each name and a column for each run; lines that differ come first,
    marked."""
    names = list(dict.fromkeys(name for some in values for name in some))
    differs = {name: len({json.dumps(some.get(name)) for some in values}) > 1 for name in names}
    head = "".join(f"<th scope=col>{html.escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr{' class=differs' if differs[name] else ''}><th scope=row>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(str(some.get(name, '–')))}</td>" for some in values)
        + "</tr>"
        for name in sorted(names, key=lambda name: not differs[name])
    )
    return (
        f"<details{' open' if title == 'Wall time' else ''}><summary>{title}</summary><div "
        "class=wide><table class=left><thead><tr>"
        f"<th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


# ---- the page ------------------------------------------------------------------------------------


def page(runs):
    """Runs -> the page's text."""
    runs = distinct(runs)
    kept, total = chosen_trees(runs)
    text = PAGE.read_text(encoding="utf-8")
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = dict(
        title=html.escape(" beside ".join(run.name for run in runs)),
        hash=f"sha256-{digest}",
        tables=tables_part(runs),
        curves=curves_part(runs),
        transcripts=transcripts_part(kept, total),
        made=made_part(runs),
        data=as_json(kept),
    )
    pieces = text.split("<!--@")  # not replace: what is put in may hold such a mark
    return pieces[0] + "".join(
        parts[name] + rest for name, rest in ((piece.split("-->", 1)) for piece in pieces[1:])
    )


def write_page(runs, say=print, output=""):
    """Makes the page of one Run or two and says where it is. BadInput when it cannot be written; a
    page that was there is intact then."""
    beside = (
        runs[-1].page.with_name(f"report-{runs[0].name}.html") if len(runs) > 1 else runs[0].page
    )
    path, text = Path(output) if output else beside, page(runs).encode("utf-8", "replace")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(text)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BadInput(f"{path} cannot be written ({error.strerror})") from None
    missing = any(run.metrics for run in runs) and not curves.available()
    say(
        f"{path}: {len(text) / 1e6:.1f} MB, open it in a "
        f"browser{' (without curves: pip install matplotlib)' if missing else ''}"
    )


@rank0
def at_the_end(folder, say, files=(), elsewhere=False):
    """What train.py and eval.py do last: the page of the run in `folder`; of an evaluation that is
    no run's, or went elsewhere, one of its files of dialogues (of all sets and processes). What was
    measured is safe by now, so whatever goes wrong here is said and no failure."""
    try:
        if (folder / "config.json").exists() and not elsewhere:
            return write_page([open_run(folder)], say)
        for _, some in itertools.groupby(files, evaluation_of):
            write_page([evaluation(list(some))], say)
    except Exception as error:
        say(
            f"no page was made ({type(error).__name__}: {error}); all else is there, and python "
            f"report.py {folder} tries again"
        )


def main():
    words = sys.argv[1:]
    names = [
        word
        for before, word in zip(["", *words], words)
        if not word.startswith("-") and before != "--output"
    ]
    c = parse_flags(Config, __doc__, argv=[word for word in words if word not in names])
    if not 1 <= len(names) <= 2:
        raise BadInput(
            f"{len(names)} runs given: name one, say out/solve-mgrpo-0, or two to see them side by "
            "side"
        )
    write_page([open_run(name) for name in names], output=c.output)


if __name__ == "__main__":
    guarded(main)
