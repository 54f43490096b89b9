"""README and the chapters against the code: what they say of files, commands and figures is true.

pytest tests/test_readme.py
"""

import ast
import functools
import importlib
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import flags
from tools import compare, tables
from tools.one_step import read_steps, steps_table

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "docs").glob("*.md"))
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *CHAPTERS]
}
README = PAGES["README.md"]
ROOMS = ("engine", "verifier", "tasks", "huggingface", "variants", "runtime", "report", "tools")
CODE = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
MAP_PAGES = ("docs/map.md", "docs/more-map.md", "docs/depth.md")
OLD_NAMES = "docs/old-names.md"  # speaks of flags and scripts that are gone
# Flags of other programs: torchrun, srun, docker, git, and those that every command has.
FOREIGN = {
    *("nproc_per_node", "nnodes", "rdzv_backend", "rdzv_id", "rdzv_endpoint", "shutdown-timeout"),
    *("nodes", "ntasks-per-node", "gpus-per-node", "shm-size", "help", "debug"),
}


def without_code(text):
    """The text without its code blocks, which hold output of programs, commands and diffs."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


# ------------------------------------------------------------------------------------------ form


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_short(name):
    """Catches a README or a chapter that grows beyond one sitting, and lines that need scrolling.

    Only tables may be wider, and code blocks, which are what a program printed.
    """
    assert len(PAGES[name].splitlines()) <= (200 if name == "README.md" else 150)
    lines = without_code(PAGES[name]).splitlines()
    assert [line for line in lines if len(line) > (130 if line.startswith("|") else 110)] == []


def test_readme_has_one_result_table_and_one_figure():
    """Catches results that creep back into README, and the gain without what it does not show."""
    assert len(re.findall(r"^\| (?:grpo|GRPO)\b", README, re.M)) == 1
    assert re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README) == ["docs/tree.svg", "docs/looks.svg"]
    results = README.split("## Results")[1].split("## Use it")[0]
    for control in ("best constant", "perfect checks", "does not show"):
        assert control in " ".join(results.split()), control


def test_nothing_is_left_to_fill_in():
    """Catches a placeholder that was never replaced, in any tracked text."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    marks = ("@" * 2, "TO" + "DO", "FIX" + "ME")
    wrong = []
    for path in map(ROOT.joinpath, listing.split() or ["README.md"]):
        if path.suffix in (".py", ".md", ".txt") and path.exists():
            text = re.sub(
                r"^```diff$.*?^```$", "", path.read_text(errors="ignore"), flags=re.M | re.S
            )
            wrong += [(path.name, mark) for mark in marks if mark in text]
    assert wrong == []


# ----------------------------------------------------------------------------------------- links


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", without_code(text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(name):
    """[(text, target), ...] of the local links of a page, pictures and references included."""
    text = PAGES[name]
    targets = dict(re.findall(r"^\[(\w+)\]: (\S+)$", text, re.M))
    found = re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text)
    found += [(label, targets[key]) for label, key in re.findall(r"\[([^\]]*)\]\[(\w+)\]", text)]
    return [(label, target) for label, target in found if not target.startswith("http")]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    """Catches a link to a file that moved or to a heading that was renamed."""
    wrong = []
    for _, target in links(name):
        path, _, anchor = target.partition("#")
        file = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            wrong.append(target)
    assert wrong == []


def test_every_chapter_is_found_from_readme():
    """Catches a chapter that no reader finds."""
    reached = {target.partition("#")[0] for _, target in links("README.md")}
    assert [name for name in PAGES if name != "README.md" and name not in reached] == []


def test_links_name_functions_that_exist():
    """Catches an equation beside a function that was renamed: `mgrpo.policy_loss` is a name in mgrpo.py."""
    wrong, count = [], 0
    for name in PAGES:
        for label, target in links(name):
            named = re.fullmatch(r"`(\w+)\.(\w+)`", label)
            if named and target.endswith(".py"):
                tree = ast.parse(((ROOT / name).parent / target).read_text())
                defined = {node.name for node in tree.body if hasattr(node, "name")}
                count += 1
                if Path(target).stem != named[1] or named[2] not in defined:
                    wrong.append((name, label))
    assert wrong == [] and count > 10


def test_the_code_map_lists_every_file():
    """Catches a file that a reader is not told of."""
    listed = {(ROOT / "docs" / target).resolve() for _, target in links("docs/code-map.md")}
    assert [path for path in CODE if path.name != "__init__.py" and path not in listed] == []


def test_pictures_are_small_and_shown():
    """Catches a picture that is missing, that no page shows, or that makes the repository heavy."""
    there = {
        p.resolve(): p.stat().st_size
        for p in (ROOT / "docs").glob("*")
        if p.suffix in (".svg", ".png")
    }
    shown = set()
    for name, text in PAGES.items():
        shown |= {
            ((ROOT / name).parent / p).resolve()
            for p in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
        }
    assert shown == set(there) and max(there.values()) < 200_000


@pytest.mark.extra
def test_pictures_are_those_of_the_committed_results(tmp_path):
    """Catches a picture that no longer is what the script draws."""
    pytest.importorskip("matplotlib", reason="needs matplotlib (requirements-extra.txt)")
    words = [sys.executable, "-m", "tools.pictures", "--docs", str(tmp_path)]
    subprocess.run(words, cwd=ROOT, check=True, timeout=1800)
    for path in (ROOT / "docs").glob("*.svg"):
        assert (tmp_path / path.name).read_text() == path.read_text(), (
            f"docs/{path.name} has changed"
        )


# -------------------------------------------------------------------------------------- commands


def commands():
    """["train.py --resume", "-m report out/run", ...] of all pages and of the code's docstrings.

    A command is what stands behind `python` or `torchrun` up to the end of the line, a comment or a
    quotation mark around it. Lines that end with a backslash go on.
    """
    docstrings = [ast.get_docstring(ast.parse(path.read_text())) or "" for path in CODE]
    found = set()
    for text in [*PAGES.values(), *docstrings]:
        text = re.sub(r"\\\n\s*", "", text)
        text = re.sub(r"^```diff$.*?^```$", "", text, flags=re.M | re.S)
        for script, rest in re.findall(
            r"(?:\bpython|\btorchrun\b[^\n`]*?) (-m [\w.]+|\w[\w/]*\.py)((?: [^\n`#|;&']+)?)", text
        ):
            if script.removeprefix("-m ").split(".")[0] not in sys.stdlib_module_names:
                found.add(f"{script} {rest.strip()}".strip())
    return sorted(found)


def target_of(command):
    """(["train.py"], its file) or (["-m", "report"], its file) of a command."""
    words = command.split()
    if words[0] != "-m":
        return words[:1], ROOT / words[0]
    path = ROOT / words[1].replace(".", "/")
    return words[:2], path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def flags_of(*words):
    """The flags of a command: the fields of its Config and of the groups in it."""
    name = words[-1].removesuffix(".py")
    module = importlib.import_module("report.page" if name == "report" else name)
    return set(flags.flags_of(module.Config)) if hasattr(module, "Config") else set()


def named_flags(text):
    """The flags in a text, `--name` or `--name=value`, as `name`."""
    return {flag.replace("_", "-") for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)}


@pytest.mark.parametrize("command", commands())
def test_every_command_exists_with_its_flags(command):
    """Catches a documented command or flag that was renamed."""
    words, file = target_of(command)
    assert file.exists()
    arguments = command.split(maxsplit=len(words))[len(words) :]
    named = set()
    for word in shlex.split(arguments[0], posix=True) if arguments else []:
        # flags in quotes, as of compare's --flags "--task chain", are train.py's
        named |= named_flags(word) if " " not in word else set()
        assert " " not in word or named_flags(word) <= flags_of("train.py")
    if named - {"help", "debug"}:
        assert named - {"help", "debug"} <= {flag.replace("_", "-") for flag in flags_of(*words)}


@functools.cache
def all_flags():
    """The flags of every command that the pages name."""
    scripts = {tuple(target_of(command)[0]) for command in commands()}
    known = set()
    for words in scripts:
        source = target_of(" ".join(words))[1].read_text()
        if "parse_flags" in source or "Config" in source:
            known |= flags_of(*words)
    return known


@pytest.mark.parametrize("name", [name for name in PAGES if name != OLD_NAMES])
def test_every_flag_named_exists(name):
    """Catches a flag in the running text that no command has any more."""
    known = {flag.replace("_", "-") for flag in all_flags() | FOREIGN}
    # diffs are applied and run by tests/test_changes.py
    text = re.sub(r"^```diff$.*?^```$", "", PAGES[name], flags=re.M | re.S)
    assert sorted(named_flags(text) - known) == []


def test_flags_that_are_gone_are_gone():
    """Catches a flag that the chapter of old names calls gone and that train.py still takes."""
    rows = re.findall(r"^\| (.+?) \| gone;", PAGES[OLD_NAMES], re.M)
    gone = set().union(*map(named_flags, rows))
    assert len(gone) >= 8 and sorted(gone & flags_of("train.py")) == []


def test_mgrpo_lines_are_marked():
    """Catches README's grep showing nothing: what GRPO does not need is marked in rollout and loop."""
    assert all((ROOT / name).read_text().count("MGRPO:") >= 2 for name in ("mgrpo.py", "train.py"))


# --------------------------------------------------------------------------------------- figures

COLUMNS = {"t1": "Acc@t1", "t2": "Acc@t2", "delta": "Δ(t1,t2)", "fix2": "Δ i→c", "broke2": "Δ c→i"}
LABELS = {"greedy": "greedy", "temperature 1": "T=1"}
# Student's t, 97.5 %, for 2 and 4 degrees of freedom: 3 and 5 seeds
T95 = {3: 4.303, 5: 2.776}


def percents(line):
    """One committed run -> {"greedy Acc@t1": percent, ..., "T=1 majority of 3": percent}."""
    found = {
        f"{label} {title}": 100 * line["result"][key][name][0]
        for key, label in LABELS.items()
        for name, title in COLUMNS.items()
    }
    extra = line["extra"]
    return found | {
        "T=1 fresh 2nd": 100 * extra["fresh"][0],
        "T=1 majority of 3": 100 * extra["majority"][0],
    }


def mean_error(values):
    """'71.2 ± 0.4': mean and standard error over seeds."""
    return (
        f"{statistics.mean(values):.1f} ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"
    )


@functools.cache
def arms(task):
    """{arm: {seed: percents}} of the committed comparison, and percents of its base."""
    text = (ROOT / f"results/first-{task}.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    found = {}
    for line in lines:
        found.setdefault(line["arm"], {})[line["seed"]] = percents(line)
    return found, percents(lines[0] | {"result": lines[0]["base_result"]})


def rows_of(task):
    """The rows that the pages must have for a task: of each arm, of the base, of the differences."""
    found, base = arms(task)
    rows = []
    for label in LABELS.values():
        columns = [column for column in percents_columns() if column.startswith(label)]
        shown = [f"{base[column]:.1f}" for column in columns[:5]]
        rows.append("| base | " + " | ".join(shown) + " |")
        for arm, runs in found.items():
            cells = [mean_error([run[column] for run in runs.values()]) for column in columns]
            rows.append(f"| {arm} ({len(runs)} seeds) | " + " | ".join(cells) + " |")
    ours, theirs = found["mgrpo"], found["grpo"]
    pairs = [
        (f"{t} Acc@t2", f"{t} {other}") for t in ("greedy", "T=1") for other in ("Acc@t1", "Acc@t2")
    ]
    pairs += [("T=1 Acc@t2", "T=1 fresh 2nd"), ("T=1 Acc@t2", "T=1 majority of 3")]
    pairs += [("greedy Acc@t1", "greedy Acc@t1"), ("T=1 Δ c→i", "T=1 Δ c→i")]
    for a, b in pairs:
        differences = [
            ours[seed][a] - theirs[seed][b] for seed in sorted(ours.keys() & theirs.keys())
        ]
        n, mean = len(differences), statistics.mean(differences)
        half = T95[n] * statistics.stdev(differences) / math.sqrt(n)
        rows.append(f"| {a} | {b} | {mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}] |")
    return rows


def percents_columns():
    """The columns in the order of the tables."""
    titles = [f"{label} {title}" for label in LABELS.values() for title in COLUMNS.values()]
    return [*titles, "T=1 fresh 2nd", "T=1 majority of 3"]


@pytest.mark.parametrize(
    "task, page",
    [("solve", "first-results"), ("countdown", "more-results"), ("chain", "more-results")],
)
def test_tables_are_those_of_the_committed_runs(task, page):
    """Catches a figure that was typed: every row is computed here from results/ and must stand there."""
    text = PAGES[f"docs/{page}.md"]
    assert [row for row in rows_of(task) if row not in text] == []


@functools.cache
def compared(name):
    """The runs of an experiment, in the order of the tool's tables, with those of the bases."""
    lines = [*map(json.loads, (ROOT / f"results/compare-{name}.jsonl").read_text().splitlines())]
    lines.sort(key=lambda line: list(compare.ARMS).index(line["arm"]))
    return tables.with_bases(lines)


ARM_NAMES = dict(
    base="base",
    grpo="GRPO, `16`",
    mgrpo="MGRPO, `4,3`, the paper's groups",
    question="MGRPO, `4,3`",
    chains="chains, `4,1,1,1`",
)
CONTROL_NAMES = dict(
    one="base, best constant and temperature", three="base, one for each cue, if told"
)


def leading_runs():
    """The runs of the arms that README and the results lead with."""
    return [line for line in compared("solve") if line["arm"] in ("base", *compare.README_ARMS)]


def measured_controls():
    """The lines of controls.py."""
    return [*map(json.loads, (ROOT / "results/controls-solve.jsonl").read_text().splitlines())]


def test_readmes_table_is_that_of_the_committed_runs():
    """Catches a figure that was typed: accuracies at T=1 over bases, of arms and controls."""
    arms = tables.arms_of(leading_runs())
    for arm, name in ARM_NAMES.items():
        groups = [tables.by_base(arms[arm], tables.value_of("T=1", f"t{k}")) for k in (1, 2, 3, 4)]
        cells = [*map(tables.cell, groups), tables.count(arms[arm])]
        assert tables.row(name, cells) in README
    for kind, name in CONTROL_NAMES.items():
        columns = zip(*(line["right"][kind] for line in measured_controls()))
        assert tables.row(name, [tables.cell([[x] for x in column]) for column in columns])[
            :-1
        ] in (README)


def test_tables_over_bases_are_those_of_the_committed_runs():
    """Catches a figure that was typed: what the tools print stands in the chapters."""
    runs = leading_runs()
    parts = [tables.main_table(runs, label) for label in tables.ROWS]
    parts += [tables.paired_table(runs, label) for label in tables.ROWS]
    parts += [tables.looks_table(runs, "T=1", field) for field in ("no_right", "no_wrong", "fresh")]
    parts += [tables.paired_table(compared("switches"), label, "mgrpo") for label in tables.ROWS]
    parts += [tables.controls_tables(measured_controls(), compared("solve"))]
    parts += [tables.placebo(runs)]
    chapter = [*PAGES["docs/results.md"].splitlines(), *PAGES["docs/controls.md"].splitlines()]
    for text in parts:
        assert [row for row in text.splitlines() if row not in chapter] == []


def test_the_pairs_of_the_first_run_are_those_of_the_committed_lines():
    """Catches a figure that was typed: default runs of faster code minus those before, by base."""
    now = [*map(json.loads, (ROOT / "results/sooner-solve.jsonl").read_text().splitlines())]
    before = {line["base_seed"]: line for line in compared("solve") if line["arm"] == "question"}
    for name, key in (("base", "base_result"), ("MGRPO, `4,3`", "result")):
        cells = []
        for k in (1, 2, 3, 4):
            share = lambda line, key=key, k=k: line[key]["temperature 1"][f"t{k}"][0]
            pairs = [[share(line) - share(before[line["base_seed"]])] for line in now]
            cells.append(tables.cell(pairs, "+"))
        assert tables.row(name, cells) in PAGES["docs/first-run.md"]


def test_tables_of_the_map_are_those_of_the_committed_runs():
    """Catches a figure that was typed, and an experiment that the map leaves out."""
    page = [row for name in MAP_PAGES for row in PAGES[name].splitlines()]
    names = {path.stem.removeprefix("compare-") for path in ROOT.glob("results/compare-*.jsonl")}
    names = {name for name in names if not name.startswith("family")}  # docs/variants.md
    known = {name for name, *_ in compare.MAP if not name.startswith("family")}
    assert names <= known
    waiting = re.findall(r"No runs yet: ((?:`[^`]+`,? ?)+)", " ".join(page))
    assert {*re.findall(r"`([^`]+)`", " ".join(waiting))} == known - names
    everything = {name: compared(name) for name in names}
    assert [row for row in tables.map_table(everything).splitlines() if row not in page] == []
    for name, runs in everything.items():
        alone = name in ("solve", "switches")  # they have chapters of their own
        rows = [] if alone else tables.short_table(runs).splitlines()
        if name == "depth":
            rows += tables.main_table(runs, "T=1").splitlines()
            for field in tables.LOOKS:
                rows += tables.looks_table(runs, "T=1", field).splitlines()
        assert [row for row in rows if row not in page] == [], name


def test_the_first_table_is_that_of_the_committed_run():
    """Catches README's expected last lines being those of another run."""
    result = json.loads((ROOT / "results/solve-mgrpo-0/result.json").read_text())
    for name in ("base", "MGRPO"):
        figures = result[name]["temperature 1"]
        cells = []
        for column in COLUMNS:
            mean, error = (100 * value for value in figures[column])
            cells.append(
                f"{mean:+.1f} ± {error:.1f}" if column == "delta" else f"{mean:.1f} ± {error:.1f}"
            )
        assert re.search(
            rf"^{name} +" + " +".join(map(re.escape, cells)) + " +1,024$", README, re.M
        )


def test_the_lines_of_the_log_are_those_of_the_committed_run():
    """Catches example lines of the metrics chapter that no run printed."""
    log = (ROOT / "results/solve-mgrpo-0/metrics.jsonl").read_text().splitlines()
    for text in (log[0], log[-1]):
        step = json.loads(text)
        cells = [f"{step['step']}"] + [
            f"{step[name]:.2f}"
            for name in ("reward1", "reward2", "accuracy1", "accuracy2", "fix2", "broke2")
        ]
        assert re.search(
            "^ +" + " +".join(map(re.escape, cells)) + " ", PAGES["docs/metrics.md"], re.M
        )


def test_the_tables_of_the_family_are_those_of_the_committed_lines():
    """Catches a figure that was typed: what the relatives claim, and what their runs end with."""
    from tools import family

    runs = family.read_runs()
    tables = [family.claims_table(runs), *(family.means_table(runs[name]) for name in family.RUNS)]
    tables.append(
        family.composition_table(compare.read_lines(ROOT / "results/compare-family.jsonl"))
    )
    pages = {line for page in PAGES.values() for line in page.splitlines()}
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) > 60 and [row for row in rows if row not in pages] == []


def test_the_table_of_steps_is_that_of_the_committed_lines():
    """Catches a figure that was typed: what one step of each method does."""
    page = PAGES["docs/one-step.md"].splitlines()
    assert [row for row in steps_table(read_steps("solve")).splitlines() if row not in page] == []
