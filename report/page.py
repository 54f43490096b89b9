"""A page about a run: its table, its curves, its trees, and what made it, in one file.

    python -m report out/solve-mgrpo-0                          # writes report.html into the folder
    python -m report out/solve-mgrpo-0 --output page.html
    python -m report out/tiny-qwen-eval-gsm8k-test.jsonl        # the dialogues of an evaluation

Everything is made from what a run has written so far (config.json, metrics.jsonl, rollouts.jsonl,
result.json, eval-*.jsonl), so a run that was killed has its page too; train.py makes it at its end.
Tables are HTML and curves are SVG (curves.py; without matplotlib the page has none). Trees are data
that page.html's script draws a screenful at a time, so a large page opens at once. Of more trees
than fit into `MAX_TREE_BYTES` the page shows evenly chosen ones, and their number.

The text of a model may be anything, also HTML. It reaches the page as JSON without any "<", and
the script inserts it as text nodes. The page's policy names the one script that may run by its
hash, and allows no source to load anything from.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
import base64
import hashlib
import html
import itertools
import json
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from eval import columns, percent, summarise, turns_of
from report import curves
from report.trees import (
    complain,
    count_answers,
    dialogues,
    evaluation_of,
    lines_of,
    read_trees,
    set_of,
)
from runtime.distributed import rank0
from runtime.flags import BadInput, guarded, parse_flags, read_json, reading

MAX_TREE_BYTES = 9_000_000  # of trees on a page, about
TEMPLATE = Path(__file__).with_name("page.html")
NO_CURVES = (
    "<p>The curves need matplotlib: <code>pip install matplotlib</code>, then <code>python -m "
    "report</code> again.</p>"
)


@dataclass(frozen=True)
class Config:
    run: str = ""  # a run's folder, or an eval-....jsonl; the flag's name may be left out
    output: str = ""  # where the page goes; empty: report.html in the run's folder


class Run(NamedTuple):
    """The files of a run, or of an evaluation without one."""

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
        return evaluation(path)
    if not (path / "config.json").exists():
        raise BadInput(
            f"{path} is no run (it has no config.json) and no eval-....jsonl of eval.py: name a "
            "folder like out/solve-mgrpo-0"
        )
    result, rollouts = path / "result.json", path / "rollouts.jsonl"
    return Run(
        path.resolve().name,
        read_json(path / "config.json", "a run has one"),
        list(lines_of(path / "metrics.jsonl", ("step", "generated"))),
        read_json(result, "a run has one") if result.exists() else {},
        [rollouts] if rollouts.exists() else [],
        sorted(path.glob("*eval-*.jsonl")),
        path / "report.html",
    )


def evaluation(path):
    """A file of dialogues -> Run of its evaluation, with the files of all its ranks."""
    name = evaluation_of(path)
    paths = sorted(other for other in path.parent.glob("*.jsonl") if evaluation_of(other) == name)
    return Run(name, {}, [], {}, [], paths, path.with_name(f"{name}.html"))


# ---- tables --------------------------------------------------------------------------------------


def tables_part(run):
    """The paper's table as HTML, before and after the run, greedy and at temperature 1; then the
    tables of its evaluations."""
    parts = []
    for label in ("greedy", "temperature 1"):
        rows = [
            ("before, the base" if name == "base" else f"after {name}", results[label])
            for name, results in run.result.items()
            if label in results
        ]
        if rows:
            parts.append(table(f"Held-out questions, {label}", rows))
    # The table of the base is there, the one after training is not.
    if len(run.result) == 1:
        parts.append(
            f"<p>{html.escape(run.name)} has not finished, so there is no table for after training "
            f"yet. {so_far(run)}</p>"
        )
    parts += [table(title, [(run.name, row)]) for title, row in evaluated(run.evals).items()]
    return "\n".join(parts) or "<p>No table yet: it is made before the first step.</p>"


def table(title, rows):
    """[(name, {column: (mean, error), "questions"})] -> HTML."""
    titles = columns(max(turns_of(row) for _, row in rows))
    shown = {k: head for k, head in titles.items() if any(k in row for _, row in rows)}
    head = "".join(f"<th scope=col>{html.escape(k)}</th>" for k in (*shown.values(), "questions"))
    body = "".join(
        f"<tr><th scope=row>{html.escape(name)}</th>"
        + "".join(f"<td>{cell(row, k)}</td>" for k in shown)
        + f"<td>{row['questions']:,}</td></tr>"
        for name, row in rows
    )
    caption = f"{html.escape(title)}: percent ± standard error over questions"
    return (
        f"<div class=wide><table><caption>{caption}</caption>"
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def cell(row, column):
    """A number of the table, its error set small."""
    text = percent(row[column], "+" if column == "delta" else "") if column in row else "–"
    value, _, error = text.partition(" ")
    return f"{value} <small>{error}</small>"


def so_far(run):
    """The last held-out evaluation of a run's log, as a sentence; empty when there was none."""
    quick_evaluations = [line for line in run.metrics if line.get("heldout1") is not None]
    if not quick_evaluations:
        return ""
    last, accuracies = quick_evaluations[-1], []
    for k in itertools.count(1):
        if last.get(f"heldout{k}") is None:
            break
        pair = last[f"heldout{k}"], last.get(f"heldout{k}_se")
        accuracies.append(f"Acc@t{k} {percent(pair)}")
    return (
        f"The last held-out evaluation, after {last['generated']:,} generated tokens: "
        f"{', '.join(accuracies)} (greedy)."
    )


def evaluated(paths):
    """Files of dialogues -> {title: row of the table}, computed from the verdicts. A last question
    that lacks samples, because the evaluation was killed, is left out."""
    # The files of all ranks come under one title: they are parts of one evaluation.
    rights = defaultdict(list)  # [question][sample][turn] of each evaluation
    for path in paths:
        with reading(path):
            for samples in dialogues(path):
                title = set_of(path, samples[0]["temperature"])
                rights[title].append([[turn["right"] for turn in x["turns"]] for x in samples])
    return {title: row_of(questions) for title, questions in rights.items()}


def row_of(questions):
    """[question][sample][turn] -> row of the table, over the questions with as many samples and
    turns as any."""
    size = max((len(samples), len(samples[0])) for samples in questions)
    whole = [samples for samples in questions if (len(samples), min(map(len, samples))) == size]
    return summarise(torch.tensor(whole, dtype=torch.float)) | dict(questions=len(whole))


# ---- curves --------------------------------------------------------------------------------------


def curves_part(run):
    """The curves of a run as HTML, with a line on how to read them; or the reason for their
    absence."""
    if not run.metrics:
        return "<p>No step has been made.</p>"
    if not curves.available():
        return NO_CURVES
    figures = []
    for chart, svg in curves.charts(run.metrics, run.result):
        name = html.escape(chart.name)
        label = f"{name}, {html.escape(chart.unit)}"
        figures.append(f'<figure role="img" aria-label="{label}"><h3>{name}</h3>{svg}</figure>')
    without = " There is no KL, since there was no reference (<code>--kl-coef</code> 0)."
    return (
        "<p class=soft>Lower axis: generated tokens; upper axis: steps. Thin line: every step (of "
        f"more than {curves.POINTS}, neighbours are averaged; of the largest gauge the largest is "
        "kept). Thick line: running mean. Points: held-out questions with standard errors; the "
        "first and the last come from the tables above, which have more questions."
        f"{'' if run.config.get('kl_coef') else without}</p>"
        f"<div class=grid>{''.join(figures)}</div>"
    )


# ---- transcripts ---------------------------------------------------------------------------------


def chosen_trees(run):
    """-> trees for the page, how many answers they hold, and how many trees there are in all. Of
    more than MAX_TREE_BYTES every so many-th of each file is chosen."""
    sources = run.rollouts + run.evals
    every = max(1.0, sum(path.stat().st_size for path in sources) / MAX_TREE_BYTES)
    kept, total = [], 0
    for path in sources:
        with reading(path):
            count, wanted = 0, None
            # Count first, then read those in the middle of each stretch of `every` trees.
            if every > 1:
                lines = open_lines(path) if path in run.rollouts else dialogues(path)
                count = sum(1 for _ in lines)
                numbers = range(max(1, int(count / every)))
                wanted = {round((i + 0.5) * every) for i in numbers}.__contains__
            trees = [dict(set="training") | tree for tree in read_trees(path, wanted)]
            kept += [(tree, count_answers(tree)) for tree in trees]
            total += count or len(trees)
    # where a few trees are far longer than the others
    while len(kept) > 1 and len(as_json([tree for tree, _ in kept])) > 1.5 * MAX_TREE_BYTES:
        kept = kept[1::2]
    return [tree for tree, _ in kept], sum(answers for _, answers in kept), total


def open_lines(path):
    """The complete lines of a file, as bytes and unparsed: there may be gigabytes. A message counts
    the others."""
    damaged = 0
    with open(path, "rb") as file:
        for line in file:
            if line.startswith(b"{") and line.endswith(b"}\n"):
                yield line
            else:
                damaged += 1
    complain(str(path), damaged)


def as_json(trees):
    """Trees as JSON that may stand in a <script> element: without "<", and without the line
    separator U+2028."""
    text = json.dumps(trees, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028")


def transcripts_part(kept, answers, total):
    """The paragraph above the trees: how many there are, and what they show."""
    if not total:
        return "<p>None were kept (<code>--transcripts 0</code>, or no step has been made).</p>"
    shown = (
        f"Here are {len(kept):,} of the {total:,} trees that were kept, evenly chosen "
        f"({answers:,} answers)."
        if len(kept) < total
        else f"All {total:,} trees that were kept ({answers:,} answers)."
    )
    return (
        f"<p class=soft>{shown} Each is a question and the answers to it; below an answer stand "
        "the guiding phrase and the corrections. R is the reward, A the advantage over the "
        "siblings; numbers have four decimals. From training, the first questions of every step "
        "are kept: questions are drawn at random, so this is a fair sample.</p>"
    )


# ---- how it was made -----------------------------------------------------------------------------


def made_part(run):
    """Wall time by phase, what made the run, and all its settings."""
    if not run.config:
        return "<p>These dialogues come from eval.py alone; there is no run to describe.</p>"
    settings = {k: v for k, v in run.config.items() if k not in ("made_by", "resume")}
    return (
        listed("Wall time", phases(run))
        + listed("Versions and machine", run.config.get("made_by", {}))
        + listed("Settings", settings)
        + f"<p class=soft>{html.escape(progress_of(run))}</p>"
    )


def phases(run):
    """{phase: seconds and share} of what has been logged so far: from the table before the first
    step to the last step."""
    total = max((line.get("seconds") or 0.0 for line in run.metrics), default=0.0)
    fields = {
        "sampling": "seconds_sampling",
        "training": "seconds_training",
        "held-out evaluations": "seconds_heldout",
    }
    spent = {
        phase: sum(line.get(field) or 0.0 for line in run.metrics)
        for phase, field in fields.items()
    }
    # What is left of the wall time.
    spent["the table before, saving and the rest"] = total - sum(spent.values())
    shown = {}
    before = run.config.get("made_by", {}).get("seconds_base")
    if before is not None:
        shown["making or loading the model"] = f"{before:,.1f} s, before all that"
    if total:
        shown |= {name: f"{took:,.1f} s, {took / total:.0%}" for name, took in spent.items()}
    shown["from the table before to the last step"] = f"{total:,.1f} s"
    return shown | {"steps": f"{len(run.metrics):,}"}


def progress_of(run):
    """A sentence on how far the run came."""
    done = run.metrics[-1]["generated"] if run.metrics else 0
    wanted = run.config.get("tokens", 0)
    end = "." if done >= wanted else "; it was stopped, or is still running."
    return f"{run.name}: {done:,} tokens generated of {wanted:,}{end}"


def listed(title, values):
    """A dict as a table of two columns that opens and closes."""
    rows = "".join(
        f"<tr><th scope=row>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in values.items()
    )
    return (
        f"<details{' open' if title == 'Wall time' else ''}><summary>{title}</summary>"
        f"<div class=wide><table class=left><tbody>{rows}</tbody></table></div></details>"
    )


# ---- the page ------------------------------------------------------------------------------------


def page(run):
    """Run -> the text of its page."""
    kept, answers, total = chosen_trees(run)
    text = TEMPLATE.read_text(encoding="utf-8")
    # The policy allows the one script with this hash, so the text of a model cannot bring another.
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = dict(
        title=html.escape(run.name),
        hash=f"sha256-{digest}",
        tables=tables_part(run),
        curves=curves_part(run),
        transcripts=transcripts_part(kept, answers, total),
        made=made_part(run),
        data=as_json(kept),
    )
    # Split first, then insert: with str.replace, a mark in an inserted text would be replaced too.
    first, *others = text.split("<!--@")
    names_and_rests = (piece.split("-->", 1) for piece in others)
    return first + "".join(parts[name] + rest for name, rest in names_and_rests)


def write_page(run, say=print, output=""):
    """Makes the page of a Run and prints its path. BadInput when it cannot be written; a page that
    was there is intact then."""
    path, text = Path(output) if output else run.page, page(run).encode("utf-8", "replace")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(text)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BadInput(f"{path} cannot be written ({error.strerror})") from None
    missing = " (without curves: pip install matplotlib)"
    say(
        f"{path}: {len(text) / 1e6:.1f} MB, open it in a browser"
        f"{missing if run.metrics and not curves.available() else ''}"
    )


@rank0
def at_the_end(folder, say):
    """The last thing that train.py does: makes the page of the run in `folder`.

    All measurements are saved by now, so a page that cannot be made is a message and no failure.
    """
    try:
        write_page(open_run(folder), say)
    except Exception as error:
        say(
            f"no page was made ({type(error).__name__}: {error}); all other files are there, and "
            f"python -m report {folder} makes it again"
        )


def main():
    """Makes the page that the command line asks for."""
    config = parse_flags(Config, __doc__, first_word="run")
    if not config.run:
        raise BadInput("no run is named: name a folder, say out/solve-mgrpo-0, as the first word")
    write_page(open_run(config.run), output=config.output)


if __name__ == "__main__":
    guarded(main)
