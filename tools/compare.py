"""The claim, tested: GRPO and MGRPO from the same base, at equal generated tokens, over seeds.

    python -m tools.compare                                   # grpo and mgrpo, 5 seeds each
    python -m tools.compare --arms grpo,mgrpo,keep,raw,wrong --seeds 3
    python -m tools.compare --name chain --flags "--task chain"
    python -m tools.compare --seeds 0                         # only prints what is there

The idea. All arms start from one base and end after the same number of generated tokens. GRPO gets
as many answers per question (16) as MGRPO's tree has nodes (4 + 4 x 3). At inference MGRPO spends
two completions on a question. So GRPO is also given more of them: a second answer behind the
phrase, which it never trained; a fresh second sample; the majority of three.

Each run adds a JSON line to results/compare-<name>.jsonl. A run is not repeated while its flags,
its base and the code (comments aside) are what they were. Where all runs of an arm are older, they
are printed, and the row says so. Tables show mean ± standard error over seeds, and differences
between runs of the same seed with a 95 % interval.
"""

from runtime import flags  # noqa: F401 - first: Ctrl-C while torch is imported is one sentence too

# isort: split
import ast
import datetime
import functools
import hashlib
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from tqdm import tqdm

import train
from engine.workers import in_parallel
from eval import columns, majorities, mean_and_error, turns_of
from mgrpo import SamplingParams, rollout
from report.trees import lines_of
from runtime import device
from runtime.checkpoints import load_checkpoint
from runtime.flags import (
    ROOT,
    AtLeast,
    BadInput,
    Between,
    file_name,
    guarded,
    parse_flags,
    reading,
    writing,
)
from runtime.log import say
from sample import Sampler
from tasks.base import base_model, base_path
from tasks.catalog import make_task

ARMS = {  # name -> what it adds to train.py's defaults
    "grpo": "",  # one layer of as many answers as the tree has nodes: see `arm_words`
    "mgrpo": "",  # all answers are corrected, failures masked after normalising
    "keep": "--failed keep",
    "raw": "--failed raw",
    "wrong": "--sources wrong",
    "layer2only": "--layer-weights 0,1",  # the whole tree is sampled, only corrections are trained
}
ROWS = {"greedy": "greedy", "T=1": "temperature 1"}  # title in tables -> row of result.json
VOTES = 3
FRESH, MAJORITY = "T=1 fresh 2nd", f"T=1 majority of {VOTES}"
# Flags of train.py that --flags may not have.
REFUSED = (
    train.REFUSED
    | dict.fromkeys(("name", "seed", "resume"), "compare gives it to each run")
    | dict.fromkeys(
        ("init", "data", "eval_data", "template", "prompt_tokens", "verifier"),
        "compare compares runs on built-in tasks",
    )
)
FIELDS = ("arm", "seed", "flags", "version", "base", "made_by", "generated", "steps", "seconds")
FIELDS += ("base_result", "result", "extra")  # that a line of the result file needs
# Student's t, 97.5 %, for 1, 2, 3, ... degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
T95 += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)
LOCK = threading.Lock()  # of the result file


@dataclass(frozen=True)
class Config:
    # of the result file, results/compare-<name>.jsonl, and of the runs, out/compare-<name>-...
    name: str = "solve"
    # grpo, mgrpo, keep, raw, wrong, layer2only: see ARMS
    arms: tuple[str, ...] = ("grpo", "mgrpo")
    # RL seeds 0, 1, ... of each arm; 0 only prints the tables of what is there
    seeds: Annotated[int, Between(0, len(T95) + 1)] = 5
    flags: str = ""  # more flags for every train.py, in quotes
    jobs: Annotated[int, AtLeast(1)] = 2  # runs at a time; each gets its share of the cores


# ---- what a run is -------------------------------------------------------------------------------


def split_flags(config):
    """--flags as a list of words. BadInput for a quotation mark without its other one."""
    try:
        return shlex.split(config.flags)
    except ValueError as error:
        raise BadInput(
            f"--flags {config.flags!r} cannot be split into words ({error}): quotation marks come "
            "in pairs"
        ) from None


def parsed(words):
    """Flags of train.py -> train.Config."""
    return parse_flags(train.Config, "", train.presets, words, REFUSED, train.RENAMED)


@functools.cache
def settled(config):
    """train.Config of all runs, but for their arms.

    Device and compute type are chosen here, once: all runs share them.
    """
    settings = parsed(split_flags(config))
    hardware = device.resolve(settings.hardware)
    return parsed([*split_flags(config), "--device", hardware.device, "--dtype", hardware.dtype])


def arm_words(config, arm):
    """The flags that all runs of an arm share."""
    settings, words = settled(config), split_flags(config) + shlex.split(ARMS[arm])
    if arm == "grpo":
        nodes = sum(train.rows_per_question(settings.group_sizes))
        words += ["--group-sizes", str(nodes)]
    return [*words, "--device", settings.hardware.device, "--dtype", settings.hardware.dtype]


def words_for(config, arm, seed):
    """All flags of one run."""
    name = f"compare-{config.name}-{arm}-{seed}"
    return [*arm_words(config, arm), "--seed", str(seed), "--name", name]


def check_arms(config):
    """BadInput for an arm that does not exist, for --flags that train.py would refuse, and for an
    arm that cannot go with them."""
    for arm in config.arms:
        if arm not in ARMS:
            raise BadInput(f"--arms: there is no arm {arm!r}; choose from {', '.join(ARMS)}")
    train.check(settled(config))
    for arm in config.arms:
        try:
            train.check(parsed(arm_words(config, arm)))
        except BadInput as error:
            raise BadInput(f"arm {arm}: {error}") from None


@functools.cache
def all_code():
    """{path: its code as text} of this file, train.py, and every file here that they import,
    directly or not."""
    code, todo = {}, ["tools/compare.py", "train.py"]
    while todo:
        name = todo.pop()
        if name not in code and (ROOT / name).exists():
            code[name], modules = code_and_imports((ROOT / name).read_text(encoding="utf-8"))
            for module in modules:
                path = module.replace(".", "/")
                todo += [f"{path}.py", f"{path}/__init__.py"]
    return code


@functools.cache
def code_and_imports(source):
    """A file's text -> its syntax tree without comments and docstrings, as text; the modules that
    it may import."""
    tree, modules = ast.parse(source), []
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            del node.body[0]
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):  # `from a import b`: b may be a file, too
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return ast.dump(tree), modules


def version(config, arm):
    """8 hex digits of what makes an arm's runs what they are, but for the seed: the base, with its
    device and compute type, the flags, and the code."""
    parts = [base_of(config).name, *arm_words(config, arm)]
    parts += [text for _, text in sorted(all_code().items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def base_of(config):
    """Path of the base that all runs share."""
    settings = settled(config)
    hardware = settings.hardware
    return base_path(settings.puzzle, settings.base, hardware.device, hardware.dtype)


# ---- runs ----------------------------------------------------------------------------------------


def make_base(config):
    """Makes the base of all runs, with all cores, unless it is there."""
    settings = settled(config)
    hardware = settings.hardware
    base_model(settings.puzzle, settings.base, hardware.device, hardware.dtype)


def run_once(config, arm, seed):
    """Trains one arm with one seed in a process of its own -> its line for the result file."""
    words = words_for(config, arm, seed)
    threads = max(1, (os.cpu_count() or 1) // config.jobs)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode:
        last = (done.stderr.strip() or str(done.returncode)).splitlines()[-1]
        raise BadInput(f"arm {arm}, seed {seed}: train.py failed: {last}")
    said = next(line for line in done.stdout.splitlines() if line.startswith("run: "))
    folder = Path(said.removeprefix("run: ").split(" (")[0])
    settings = json.loads((folder / "config.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    needed = ("generated", "seconds_sampling", "seconds_training")
    steps = list(lines_of(folder / "metrics.jsonl", needed))
    return dict(
        arm=arm,
        seed=seed,
        flags=config.flags,
        version=version(config, arm),
        command=shlex.join(["python", "train.py", *words]),
        base=settings["made_by"]["base"],
        date=datetime.date.today().isoformat(),
        made_by=settings["made_by"],
        generated=steps[-1]["generated"],
        steps=len(steps),
        seconds=round(sum(s["seconds_sampling"] + s["seconds_training"] for s in steps), 1),
        base_result=result["base"],
        result=result["GRPO" if len(settings["group_sizes"]) == 1 else "MGRPO"],
        extra=more_answers(config, folder / "checkpoint.pt", settings["max_new_tokens"]),
    )


def more_answers(config, checkpoint, max_new_tokens):
    """First answers at temperature 1, `VOTES` per question: what more samples are worth.

    -> {"fresh": (mean, error) of the second sample, "majority": (mean, error), "tokens": mean of
    all votes of a question together}.
    """
    torch.set_num_threads(1)  # other runs have the other cores
    settings = settled(config)
    compute = getattr(torch, settings.hardware.dtype)
    policy, _ = load_checkpoint(checkpoint, compute, settings.hardware.device)
    task = make_task(settings.puzzle, max_new_tokens)
    problems = task.held_out(settings.eval_questions)
    sampling = SamplingParams(max_new_tokens, 1.0, seed=77)
    (layer,) = rollout(in_parallel(Sampler(policy)), task, problems, (VOTES,), sampling)
    right = layer.correct.view(-1, VOTES).float()  # [Q, VOTES]
    majority = torch.tensor(majorities([layer], VOTES))[:, 0]  # [Q]
    return dict(
        fresh=mean_and_error(right[:, 1]),
        majority=mean_and_error(majority),
        tokens=layer.lengths.view(-1, VOTES).sum(1).float().mean().item(),
    )


def run_and_keep(config, path, arm, seed):
    """run_once; its line goes into the result file at once, and its figures on the screen."""
    line = run_once(config, arm, seed)
    with LOCK:
        append(path, line)
    shown, titles = figures(line), columns(2)
    said = ", ".join(f"greedy {titles[k]} {shown[f'greedy {k}']:.1f}" for k in ("t1", "t2"))
    say(f"{arm} {seed}: {said} ({line['seconds']:.0f} s)")


# ---- the result file -----------------------------------------------------------------------------


def append(path, line):
    """Adds a line of JSON to a file; on a line of its own, also where the last one was cut
    short."""
    with writing(path, "its lines before are whole"), open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
        begun = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * begun + json.dumps(line).encode() + b"\n")


def read_lines(path):
    return list(lines_of(path, FIELDS))


def missing_runs(config, lines):
    """-> [(arm, seed), ...] that were asked for and that no line is of, as a run would be today."""
    there = {
        (line["arm"], line["seed"])
        for line in lines
        if line["flags"] == config.flags and is_todays(config, line)
    }
    asked = [(arm, seed) for seed in range(config.seeds) for arm in config.arms]
    return [pair for pair in asked if pair not in there]


def is_todays(config, line):
    """Whether a run was made by what would make it today."""
    return line["arm"] in ARMS and line["version"] == version(config, line["arm"])


def one_version(lines, now=lambda line: False):
    """Of each arm the runs that were made alike: those for which now(line) holds, else those of the
    version of its last line."""
    latest = {line["arm"]: line["version"] for line in lines}
    latest |= {line["arm"]: line["version"] for line in lines if now(line)}
    return [line for line in lines if line["version"] == latest[line["arm"]]]


# ---- tables --------------------------------------------------------------------------------------


def figures(line):
    """One run -> {"greedy t1": percent, ..., "T=1 broke2": ..., FRESH: ..., MAJORITY: ...}."""
    shown = {
        f"{label} {name}": 100 * line["result"][row][name][0]
        for label, row in ROWS.items()
        for name in columns(turns_of(line["result"][row]))
    }
    extra = line["extra"]
    return shown | {FRESH: 100 * extra["fresh"][0], MAJORITY: 100 * extra["majority"][0]}


def turns_in(line):
    """How many answers in a row the tables of a run have."""
    return turns_of(line["result"]["greedy"])


def mean_error(values):
    """ "71.2 ± 0.4": mean and standard error over seeds."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{error}"


def interval(differences):
    """-> mean of paired differences, half-width of its 95 % interval; NaN for a single pair."""
    n = len(differences)
    half = T95[n - 2] * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.nan
    return statistics.mean(differences), half


def main_table(lines, label, old=()):
    """Markdown: the paper's columns of one of ROWS; a row for the base and for each arm.

    An arm's cells are mean ± standard error over seeds. Rows of the arms in `old` say that other
    code made them. Bases have a row each, if arms have different ones. A cell is empty where a run
    has fewer turns than the table.
    """
    turns = max(map(turns_in, lines))
    titles = columns(turns)
    extra = [FRESH, MAJORITY] if label == "T=1" else []
    heads = [*titles.values(), *(key.removeprefix(f"{label} ") for key in extra)]
    rows = [table_row(label, heads), "|---" * (len(heads) + 1) + "|"]

    bases = {line["base"]: line["base_result"][ROWS[label]] for line in lines}
    for path, base in bases.items():
        arms = dict.fromkeys(line["arm"] for line in lines if line["base"] == path)
        of_arms = f" of {', '.join(arms)}" if len(bases) > 1 else ""
        cells = [
            f"{100 * base[name][0]:.1f}" if has_column(base, name, turns) else "" for name in titles
        ]
        rows.append(table_row(f"base{of_arms}", [*cells, *[""] * len(extra)]))

    for arm in dict.fromkeys(line["arm"] for line in lines):
        runs = [line for line in lines if line["arm"] == arm]
        note = ", other code" if arm in old else ""
        shown = [figures(line) for line in runs]
        keys = [f"{label} {name}" for name in titles]
        there = [has_column(runs[0]["result"][ROWS[label]], name, turns) for name in titles]
        cells = [
            mean_error([run[key] for run in shown]) if known else ""
            for key, known in zip([*keys, *extra], [*there, *[True] * len(extra)])
        ]
        rows.append(table_row(f"{arm} ({len(runs)} seeds{note})", cells))
    return "\n".join(rows)


def table_row(name, cells):
    """Cells as a line of Markdown; an empty cell is a single space."""
    return f"| {name} |" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def has_column(result, name, turns):
    """Whether a result has this column of a table with so many turns. Its Δ from the first to the
    last turn is another one if it has fewer turns."""
    return name in result and (name != "delta" or turns_of(result) == turns)


def paired_table(lines, ours="mgrpo", theirs="grpo"):
    """Markdown: differences between two arms, seed by seed, with 95 % intervals; empty unless both
    are there twice."""
    runs = {arm: {x["seed"]: x for x in lines if x["arm"] == arm} for arm in (ours, theirs)}
    seeds = sorted(set(runs[ours]) & set(runs[theirs]))
    if len(seeds) < 2:
        return ""
    last, their_last = (f"t{turns_in(runs[arm][seeds[0]])}" for arm in (ours, theirs))
    pairs = [
        (f"{label} {last}", f"{label} {other}") for label in ROWS for other in ("t1", their_last)
    ]
    pairs += [
        (f"T=1 {last}", FRESH),
        (f"T=1 {last}", MAJORITY),
        ("greedy t1", "greedy t1"),
        ("T=1 broke2", "T=1 broke2"),
    ]
    rows = [
        f"| {ours} | minus {theirs} | points, 95 % interval, {len(seeds)} seeds |",
        "|---|---|---|",
    ]
    turns = {arm: turns_in(runs[arm][seeds[0]]) for arm in runs}
    shown = {arm: {seed: figures(runs[arm][seed]) for seed in seeds} for arm in runs}
    for a, b in pairs:
        mean, half = interval([shown[ours][s][a] - shown[theirs][s][b] for s in seeds])
        names = f"{title(a, turns[ours])} | {title(b, turns[theirs])}"
        rows.append(f"| {names} | {mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}] |")
    return "\n".join(rows)


def title(key, turns):
    """ "T=1 broke2" -> "T=1 Δ c→i"; other keys as they are."""
    label, _, name = key.partition(" ")
    return f"{label} {columns(turns).get(name, name)}"


def footnotes(lines):
    """What the tables rest on: tokens, steps and time of a run, inference tokens of a question."""
    rows = []
    for arm in dict.fromkeys(line["arm"] for line in lines):
        runs = [line for line in lines if line["arm"] == arm]
        names = ("generated", "steps", "seconds")
        middle = {name: statistics.median(line[name] for line in runs) for name in names}
        turns = {2: "two"}.get(turns_in(runs[0]), turns_in(runs[0]))
        asked = statistics.mean(line["result"][ROWS["T=1"]]["tokens"] for line in runs)
        votes = statistics.mean(line["extra"]["tokens"] for line in runs)
        rows.append(
            f"{arm}: {middle['generated'] / 1e6:.2f} M generated tokens, {middle['steps']:.0f} "
            f"steps, {middle['seconds']:.0f} s a run ({runs[0]['made_by']['threads']} thread); "
            f"inference {asked:.0f} tokens for {turns} turns, {votes:.0f} for {VOTES} votes"
        )
    return "\n".join(rows)


def remark(lines, old):
    """How many of the runs are not today's, in a line; empty when all are."""
    stale = sum(line["arm"] in old for line in lines)
    if not stale:
        return ""
    return (
        f"{stale} of these {len(lines)} runs ({', '.join(old)}) were made by other code, from "
        "another base or with another compute type than a run of today; --arms with --seeds makes "
        "new ones"
    )


def main():
    config = parse_flags(Config, __doc__)
    check_arms(config)
    path = Path("results") / f"compare-{file_name('name', config.name)}.jsonl"
    todo = missing_runs(config, read_lines(path))
    if todo:
        path.parent.mkdir(exist_ok=True)
        make_base(config)
        with ThreadPoolExecutor(config.jobs) as pool:
            runs = pool.map(lambda pair: run_and_keep(config, path, *pair), todo)
            list(tqdm(runs, total=len(todo), unit="run", disable=None))
    lines = [line for line in read_lines(path) if line["flags"] == config.flags]
    lines = one_version(lines, lambda line: is_todays(config, line))
    if not lines:
        raise BadInput(f"{path} holds no runs with these flags; use --seeds 1 or more")
    old = list(dict.fromkeys(line["arm"] for line in lines if not is_todays(config, line)))
    with reading(path):
        tables = [main_table(lines, label, old) for label in ROWS]
        tables += [paired_table(lines), footnotes(lines), remark(lines, old)]
    print("\n\n".join(filter(None, tables)))


if __name__ == "__main__":
    guarded(main)
