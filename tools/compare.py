"""The claim, tested: GRPO and MGRPO from the same bases, at equal generated tokens, with controls.

    python -m tools.compare                                   # README's table, 5 bases
    python -m tools.compare --arms grpo,mgrpo,keep,raw --bases 3
    python -m tools.compare --name chain --flags "--task chain"
    python -m tools.compare --bases 0                         # only prints what is there
    python -m tools.compare --arms family --bases 2 --seeds 3 # the relatives of GRPO
    python -m tools.compare --map                             # every experiment of MAP, for hours

The idea. All runs of a pair (base, RL seed) start from one base, end after the same number of
generated tokens, and are evaluated on the same questions with the same random numbers; every pair
has its own. GRPO gets as many answers per question (16) as MGRPO's tree has nodes (4 + 4 x 3). Two
controls cost no training: `dial`, the base with the best constants (dial.py), and as many
independent first answers as the table has turns (their majority, and whether any is right).

Each run adds a JSON line to results/compare-<name>.jsonl as it ends, so that a killed comparison
goes on where it was. A run is not repeated while its flags, its base and the code (comments aside)
are what they were. Where all runs of an arm are older, they are printed, and the row says so.
tables.py makes the tables, with 95 % intervals over bases.
"""

from runtime import flags  # noqa: F401 - first: Ctrl-C while torch is imported is one sentence too

# isort: split
import ast
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from tqdm import tqdm

import train
from eval import majorities, mean_and_error
from mgrpo import SamplingParams, rollout
from report.trees import lines_of
from runtime import device
from runtime.checkpoints import load_checkpoint
from runtime.flags import (
    ROOT,
    AtLeast,
    BadInput,
    Between,
    Maybe,
    file_name,
    flat,
    guarded,
    parse_flags,
    reading,
    writing,
)
from runtime.log import say, versions
from sample import Sampler
from tasks.base import base_model, base_path
from tasks.catalog import TaskConfig, difficulty, make_task
from tools.dial import dialled
from tools.tables import ROWS, all_tables, turns_in
from variants.table import METHODS

ARMS = {  # name -> what it adds to train.py's defaults
    # No training: the base with the best shift of its verdict and temperature.
    "dial": "--method-args siblings=parent",
    # One layer of as many answers as MGRPO's tree has nodes: see `arm_words`.
    "grpo": "--method-args siblings=parent",
    # The paper's groups: corrections of one answer are compared. The next arms change one thing.
    "mgrpo": "--method-args siblings=parent",
    "question": "",  # train.py's defaults
    # For as long as `chains` takes on a CPU.
    "longer": "--method-args siblings=parent --tokens 2100000",
    "lr": "--method-args siblings=parent --lr 3e-4",  # three times train.py's
    "paper": "--method-args siblings=parent --group-sizes 8,4 --kl-coef 0.001",  # --preset paper
    "kl": "--method-args siblings=parent --kl-coef 0.001",
    "three": "--method-args siblings=parent --group-sizes 3,2,2",
    "keep": "--method-args siblings=parent,failed=keep",
    "raw": "--method-args siblings=parent,failed=raw",
    "wrong": "--method-args siblings=parent,sources=wrong",
    # The whole tree is sampled, only corrections are trained.
    "layer2": "--method-args siblings=parent --layer-weights 0,1",
    "weights1:3": "--method-args siblings=parent --layer-weights 1,3",
    # Steps towards right corrections, no others.
    "supervised": "--method-args siblings=parent,failed=raw --layer-weights 0,1",
    # GRPO for half of the tokens, then corrections alone: see `run_words`.
    "rounds": "--method-args siblings=parent",
    "chains": "--group-sizes 4,1,1,1",  # four layers, one correction of each answer
    "chains3": "--group-sizes 4,1,1",
    "chains2": "--group-sizes 4,1",
}
# The relatives of GRPO (variants/), one layer each; some of them as MGRPO, in both layers.
ARMS |= {name: f"--method {name}" for name in METHODS if name not in ("grpo", "mgrpo")}
COMPOSED = dict.fromkeys(("dr-grpo", "lambda-grpo", "unlikely"), " --method-args failed=mask")
COMPOSED |= {"disco": "", "e-grpo": ""}  # these need failures
ARMS |= {
    f"{name}-4,3": f"--method {name}{args} --group-sizes 4,3" for name, args in COMPOSED.items()
}
FAMILY = ("grpo", "mgrpo", *(name for name in METHODS if name not in ("grpo", "mgrpo")))
FAMILY += tuple(f"{name}-4,3" for name in COMPOSED)
ON_SOLVE = ("mgrpo", "igrpo", "edge", "edge-gec", "unlikely")  # their claims are about corrections
ON_LONG = ("disco", "e-grpo", "grpo-lead", "group-dro")  # about hard questions
ON_CHAIN = tuple(name for name in METHODS if name not in ("grpo", *ON_SOLVE, *ON_LONG))
README_ARMS = ("dial", "grpo", "mgrpo", "question", "chains")
# The experiments of --map: name of the result file, arms, bases, flags.
MAP = (
    ("solve", README_ARMS, 5, ""),
    # Bases of four blocks from here on, twice the default's.
    (
        "switches",
        tuple(x for x in ARMS if x not in ("chains3", "wrong", *FAMILY[2:])),
        2,
        "--depth 4",
    ),
    ("reviewer-doubting", ("dial", "grpo", "mgrpo", "chains"), 2, "--reviewer doubting --depth 4"),
    ("reviewer-lazy", ("dial", "grpo", "mgrpo", "chains"), 2, "--reviewer lazy --depth 4"),
    ("reviewer-fair", ("dial", "grpo", "mgrpo", "chains"), 2, "--reviewer fair --depth 4"),
    ("depth", ("grpo", "chains2", "chains3", "chains"), 2, "--looks 6 --depth 4"),
    ("candidates-2", ("dial", "grpo", "mgrpo", "chains"), 2, "--candidates 2 --depth 4"),
    ("candidates-3", ("dial", "grpo", "mgrpo", "chains"), 2, "--candidates 3 --depth 4"),
    ("candidates-8", ("dial", "grpo", "mgrpo", "chains"), 2, "--candidates 8 --depth 4"),
    ("reviewed-2", ("grpo", "mgrpo", "chains"), 2, "--reviewed 0.5 --depth 4"),
    ("reviewed-8", ("grpo", "mgrpo", "chains"), 2, "--reviewed 0.125 --depth 4"),
    (
        "reviewed-32",
        ("grpo", "mgrpo", "chains", "longer", "lr", "keep"),
        2,
        "--reviewed 0.03125 --depth 4",
    ),
    ("habit-0.5", ("grpo", "mgrpo"), 2, "--habit 0.005 --depth 4"),
    ("habit-5", ("grpo", "mgrpo"), 2, "--habit 0.05 --depth 4"),
    ("habit-20", ("grpo", "mgrpo"), 2, "--habit 0.2 --depth 4"),
    ("chain", ("grpo", "mgrpo", "keep", "layer2", "question"), 2, "--task chain --depth 4"),
    (
        "countdown",
        ("dial", "grpo", "mgrpo", "keep", "layer2", "question"),
        2,
        "--task countdown --depth 4",
    ),
    # What GRPO's relatives claim, on the task where it would show (tools/family.py). Two blocks.
    ("family-chain", ("grpo",), 5, "--task chain"),
    ("family-chain", ON_CHAIN, 3, "--task chain"),
    ("family-long", ("grpo", "disco"), 5, "--task chain --operations 8"),
    ("family-long", ON_LONG[1:], 3, "--task chain --operations 8"),
    ("family", ("grpo", "mgrpo", "unlikely", "edge"), 5, ""),
    ("family", ("question", "igrpo", "edge-gec", *(f"{name}-4,3" for name in COMPOSED)), 3, ""),
)
VALUES = (
    "README_ARMS",
    "ARMS",
    "COMPOSED",
    "FAMILY",
    "ON_SOLVE",
    "ON_LONG",
    "ON_CHAIN",
    "MAP",
    "PRESETS",
    "PAPER",
)  # constants that hold values of flags
# Flags of train.py that --flags may not have.
REFUSED = (
    train.REFUSED
    | dict.fromkeys(
        ("name", "seed", "base_seed", "start", "resume"), "compare gives it to each run"
    )
    | dict.fromkeys(
        ("init", "data", "eval_data", "template", "prompt_tokens", "verifier"),
        "compare compares runs on built-in tasks",
    )
)
# What a line of the result file needs.
FIELDS = ("arm", "base_seed", "seed", "flags", "version", "base", "made_by", "generated", "steps")
FIELDS += ("seconds", "base_result", "result", "extra")
LOCK = threading.Lock()  # of the result file


@dataclass(frozen=True)
class Config:
    # of the result file, results/compare-<name>.jsonl, and of the runs, out/compare-<name>-...
    name: str = "solve"
    arms: tuple[str, ...] = README_ARMS  # see ARMS in this file; family: all relatives of GRPO
    bases: Annotated[int, Between(0, 20)] = 5  # bases 0, 1, ...; 0 only prints what is there
    seeds: Annotated[int, Between(1, 20)] = 1  # RL seeds of each arm from each base
    flags: str = ""  # more flags for every train.py, in quotes
    jobs: Annotated[int, AtLeast(1)] = 2  # runs at a time; each gets its share of the cores
    map: Maybe = ""  # run every experiment of MAP in this file, or those named, separated by commas


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


def parsed(words, refused=REFUSED):
    """Flags of train.py -> train.Config."""
    return parse_flags(train.Config, "", train.presets, words, refused, train.RENAMED)


@functools.cache
def settled(config):
    """train.Config of all runs, but for their arms.

    Device and compute type are chosen here, once: all runs share them. All are asked for as many
    answers in a row as the base's texts have.
    """
    settings = parsed(split_flags(config))
    hardware = device.resolve(settings.hardware)
    words = [*split_flags(config), "--device", hardware.device, "--dtype", hardware.dtype]
    return parsed([*words, "--turns", str(settings.turns or settings.puzzle.looks)])


def arm_words(config, arm):
    """The flags that all runs of an arm share."""
    settings, words = settled(config), split_flags(config) + shlex.split(ARMS[arm])
    if arm in ("grpo", "rounds"):
        nodes = sum(train.rows_per_question(settings.group_sizes))
        words += ["--group-sizes", str(nodes)]
    words += ["--device", settings.hardware.device, "--dtype", settings.hardware.dtype]
    return [*words, "--turns", str(settings.turns)]


def run_words(config, arm, base_seed, seed):
    """-> [flags of a run of train.py, ...]: one run, but two for the arm `rounds`."""
    name = f"compare-{config.name}-{arm}-{base_seed}-{seed}"
    own = ["--base-seed", str(base_seed), "--seed", str(seed)]
    words = [*arm_words(config, arm), *own]
    if arm != "rounds":
        return [[*words, "--name", name]]
    # GRPO for half of the tokens, then corrections alone: the paper's two stages, one by one.
    settings = settled(config)
    half = ["--tokens", str(settings.tokens // 2)]
    sizes = ",".join(map(str, settings.group_sizes))
    second = ["--group-sizes", sizes, "--layer-weights", "0,1", "--start", f"out/{name}-first"]
    return [
        [*words, *half, "--name", f"{name}-first"],
        [*words, *half, *second, "--name", name],
    ]


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
    directly or not; but for tables.py, which only prints."""
    code, todo = {}, ["tools/compare.py", "train.py"]
    while todo:
        name = todo.pop()
        if name not in code and name != "tools/tables.py" and (ROOT / name).exists():
            code[name], modules = code_and_imports((ROOT / name).read_text(encoding="utf-8"))
            for module in modules:
                path = module.replace(".", "/")
                todo += [f"{path}.py", f"{path}/__init__.py"]
    return code


@functools.cache
def code_and_imports(source):
    """A file's text -> its syntax tree as text; the modules that it may import.

    Comments and docstrings are left out, and so are values of flags (defaults, PRESETS, ARMS, MAP):
    those of a run stand in its settings.
    """
    tree, modules = ast.parse(source), []
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            del node.body[0]
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            for field in node.body:
                field.value = None
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if ast.unparse(target) in VALUES:
                node.value = ast.Constant(None)
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):  # `from a import b`: b may be a file, too
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return ast.dump(tree), modules


def version(config, arm):
    """8 hex digits of what makes an arm's runs what they are, but for the seeds: the base, with its
    device and compute type, all settings, and the code."""
    parts = [base_of(config, 0).name]
    for words in run_words(config, arm, 0, 0):
        settings = flat(parsed(words, train.REFUSED))
        settings |= dict(name="", preset="", start=bool(settings["start"]))
        parts.append(repr(sorted(settings.items())))
    parts += [text for _, text in sorted(all_code().items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def base_of(config, base_seed):
    """Path of the base that all runs with this seed share."""
    settings = settled(config)
    hardware, base = settings.hardware, replace(settings.base, base_seed=base_seed)
    return base_path(settings.puzzle, base, hardware.device, hardware.dtype)


# ---- runs ----------------------------------------------------------------------------------------


def make_base(config, base_seed):
    """Makes a base in a process of its own, unless it is there."""
    path = base_of(config, base_seed)
    if path.exists():
        return
    settings = settled(config)
    known = {**vars(settings.puzzle), **vars(settings.base), "base_seed": base_seed}
    words = [
        word
        for name, value in known.items()
        if name != "start" and concerns(settings.puzzle.task, name)
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    words += ["--device", settings.hardware.device, "--dtype", settings.hardware.dtype]
    finished(config, f"base {base_seed}", ["-m", "tasks.base", *words])


def concerns(task, name):
    """Whether a flag may be given with this task."""
    fields = {field.name for field in dataclasses.fields(TaskConfig)} - {"task"}
    return name not in fields or name in difficulty(task)


def finished(config, what, words):
    """Runs a script of this project to its end, on a share of the cores -> what it printed.

    BadInput with its last line if it fails.
    """
    threads = max(1, (os.cpu_count() or 1) // config.jobs)
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env)
    if done.returncode:
        last = (done.stderr.strip() or str(done.returncode)).splitlines()[-1]
        raise BadInput(f"{what}: {Path(words[0]).name} failed: {last}")
    return done.stdout


def run_once(config, arm, base_seed, seed):
    """Trains one arm from one base with one seed -> its line for the result file."""
    about = dict(
        arm=arm,
        base_seed=base_seed,
        seed=seed,
        flags=config.flags,
        version=version(config, arm),
        date=datetime.date.today().isoformat(),
    )
    if arm == "dial":
        return about | run_dial(config, base_seed, seed)
    steps = []
    for words in run_words(config, arm, base_seed, seed):
        printed = finished(config, f"arm {arm}, base {base_seed}", [str(ROOT / "train.py"), *words])
        found = next(line for line in printed.splitlines() if line.startswith("run: "))
        folder = Path(found.removeprefix("run: ").split(" (")[0])
        needed = ("generated", "seconds_sampling", "seconds_training")
        steps.append(list(lines_of(folder / "metrics.jsonl", needed)))
    settings = json.loads((folder / "config.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    (after,) = (result[name] for name in result if name != "base")
    seconds = sum(s["seconds_sampling"] + s["seconds_training"] for part in steps for s in part)
    return about | dict(
        command=shlex.join(["python", "train.py", *words]),
        base=settings["made_by"]["base"],
        made_by=settings["made_by"],
        generated=sum(part[-1]["generated"] for part in steps),
        steps=sum(map(len, steps)),
        seconds=round(seconds, 1),
        base_result=result["base"],
        result=after,
        log=summary([line for part in steps for line in part]),
        extra=more_answers(config, folder / "checkpoint.pt", seed),
    )


def summary(log):
    """Lines of metrics.jsonl -> {column: its means in the first fifth of the steps, in the first
    half and in the last tenth, its median, its largest}, of columns with numbers in all lines."""
    columns = {}
    fifth, half, tenth = (max(1, len(log) // part) for part in (5, 2, 10))
    for name in log[0]:
        values = [line[name] for line in log if isinstance(line.get(name), (int, float))]
        if len(values) == len(log):
            parts = (values[:fifth], values[:half], values[-tenth:])
            means = [sum(part) / len(part) for part in parts]
            columns[name] = [*means, statistics.median(values), max(values)]
    return columns


def run_dial(config, base_seed, seed):
    """The control without training -> the rest of its line."""
    torch.set_num_threads(1)  # other runs have the other cores
    settings, clock = settled(config), time.time()
    hardware, base = settings.hardware, replace(settings.base, base_seed=base_seed)
    policy, _, path = base_model(settings.puzzle, base, hardware.device, hardware.dtype)
    task = make_task(settings.puzzle)
    result, constants = dialled(policy, task, settings.eval_questions, settings.turns, seed)
    return dict(
        command=f"python -m tools.dial {path} --seed {seed}",
        base=str(path),
        made_by=versions(),
        generated=0,
        steps=0,
        seconds=round(time.time() - clock, 1),
        base_result=None,
        result=result,
        extra=dict(constants=constants),
    )


def more_answers(config, checkpoint, seed):
    """Independent first answers at temperature 1, as many per question as the tables have turns.

    -> {"fresh": (mean, error) of the second of them, "majority", "pass": whether any is right,
    "tokens": mean of all of a question together}.
    """
    torch.set_num_threads(1)  # other runs have the other cores
    settings = settled(config)
    compute = getattr(torch, settings.hardware.dtype)
    policy, _ = load_checkpoint(checkpoint, compute, settings.hardware.device)
    task, votes = make_task(settings.puzzle), settings.turns
    problems = task.held_out(settings.eval_questions, seed)
    # A seed apart from the table's: its first answers must not come again.
    sampling = SamplingParams(task.max_new_tokens, 1.0, seed=1_000_000 + seed)
    (layer,) = rollout(Sampler(policy), task, problems, (votes,), sampling)
    right = layer.correct.view(-1, votes).float()  # [Q, votes]
    majority = torch.tensor(majorities([layer], votes))[:, 0]  # [Q]
    return dict(
        fresh=mean_and_error(right[:, 1]),
        majority=mean_and_error(majority),
        **{"pass": mean_and_error(right.amax(1))},
        tokens=layer.lengths.view(-1, votes).sum(1).float().mean().item(),
    )


def run_and_keep(config, path, arm, base_seed, seed):
    """run_once; its line goes into the result file at once, and its figures on the screen."""
    line = run_once(config, arm, base_seed, seed)
    with LOCK:
        append(path, line)
    row = line["result"][ROWS["T=1"]]
    figures = " ".join(f"{100 * row[f't{k}'][0]:.1f}" for k in range(1, turns_in([line]) + 1))
    say(f"{arm}, base {base_seed}, seed {seed}: T=1 {figures} ({line['seconds']:.0f} s)")


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
    """-> [(arm, base seed, seed), ...] that were asked for and that no line is of, as they would be
    today. RL seeds of different bases differ, so that they ask different questions."""
    there = {
        (line["arm"], line["base_seed"], line["seed"])
        for line in lines
        if line["flags"] == config.flags and is_todays(config, line)
    }
    asked = [
        (arm, base, 20 * base + i)
        for i in range(config.seeds)
        for base in range(config.bases)
        for arm in config.arms
    ]
    return [run for run in asked if run not in there]


def is_todays(config, line):
    """Whether a run was made by what would make it today."""
    return line["arm"] in ARMS and line["version"] == version(config, line["arm"])


def one_version(lines, now=lambda line: False):
    """Of each arm the runs that were made alike: those for which now(line) holds, else those of the
    version of its last line."""
    latest = {line["arm"]: line["version"] for line in lines}
    latest |= {line["arm"]: line["version"] for line in lines if now(line)}
    return [line for line in lines if line["version"] == latest[line["arm"]]]


# ---- the command line ----------------------------------------------------------------------------


def compare(config):
    """Makes the runs that are missing, and prints the tables."""
    if config.arms == ("family",):
        config = replace(config, arms=FAMILY)
    check_arms(config)
    path = Path("results") / f"compare-{file_name('name', config.name)}.jsonl"
    todo = missing_runs(config, read_lines(path))
    if todo:
        path.parent.mkdir(exist_ok=True)
        with ThreadPoolExecutor(config.jobs) as pool:
            list(pool.map(lambda base: make_base(config, base), sorted({run[1] for run in todo})))
            runs = pool.map(lambda run: run_and_keep(config, path, *run), todo)
            list(tqdm(runs, config.name, total=len(todo), unit="run", disable=None))
    lines = [line for line in read_lines(path) if line["flags"] == config.flags]
    lines = one_version(lines, lambda line: is_todays(config, line))
    if not lines:
        raise BadInput(f"{path} holds no runs with these flags; use --bases 1 or more")
    old = list(dict.fromkeys(line["arm"] for line in lines if not is_todays(config, line)))
    lines.sort(key=lambda line: list(ARMS).index(line["arm"]) if line["arm"] in ARMS else 99)
    with reading(path):
        print(all_tables(lines, old))


def main():
    """One comparison, or those of the map one after another."""
    config = parse_flags(Config, __doc__)
    if not config.map:
        compare(config)
        return
    known = list(dict.fromkeys(name for name, *_ in MAP))
    names = known if config.map == "newest" else config.map.split(",")
    for name in names:
        if name not in known:
            raise BadInput(
                f"--map {name}: there is no such experiment; choose from {', '.join(known)}"
            )
    chosen = [experiment for experiment in MAP if experiment[0] in names]
    for name, arms, bases, words in tqdm(chosen, "map", unit="experiment", disable=None):
        more = f"{config.flags} {words}".strip()
        print(f"\n## {name}\n")
        compare(replace(config, name=name, arms=arms, bases=min(bases, config.bases), flags=more))


if __name__ == "__main__":
    guarded(main)
