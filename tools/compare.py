"""The claim, tested: GRPO and MGRPO from the same base, at equal generated tokens, over seeds.

    python compare.py                                                  # grpo and mgrpo on `solve`,
                                                                       5 seeds each
    python compare.py --arms grpo,mgrpo,keep,raw,wrong --seeds 3       # the switches of layer 2
    python compare.py --name chain --flags "--task chain"              # another task

The idea. Both methods start from one base and stop after the same number of GENERATED tokens, the
currency of RL; GRPO gets as many rollouts per question (16) as MGRPO's tree has nodes (4 + 4 x 3).
GRPO's second answer is what its first-answer training makes of the guiding phrase ("intrinsic"
correction, never trained). Since MGRPO spends two completions at inference, GRPO is also given more
of them: a second fresh sample in place of the second look, and the majority of three.

Every run adds a JSON line to results/compare-<name>.jsonl. Runs already there are not run again, as
long as flags, base and code (comments aside; of all files that a run goes through) are what they
were. An arm that only has runs from before a change is printed from them, and its row says so. The
table shows mean ± standard error over seeds, and paired differences (same seed) with a 95 %
interval from Student's t.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C while torch is imported is one sentence too

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

import torch
from tqdm import tqdm

import train
from eval import COLUMNS, held_out_questions, load_policy, majorities, mean_and_error
from mgrpo import Sampling, expand
from report.trees import lines_of
from runtime.flags import BadInput, file_name, guarded, parse_flags, writing
from sample import Sampler
from tasks import legacy as pretrain
from tasks import opening
from tasks.legacy import prompts_and_golds, task_of
from tasks.tokenizer import build_encoding

ARMS = {  # name -> what it adds to train.py's defaults
    "grpo": "--layers 1",  # and as many attempts as the tree has nodes, G + G x H (see `words`)
    "mgrpo": "",  # the paper's way: all attempts go on, failures masked after normalising
    "keep": "--failed keep",
    "raw": "--failed raw",
    "wrong": "--sources wrong",
    "balanced": "--sources balanced --attempts 8 --corrections 4",
    "question": "--group question",
    "alternating": "--update alternating",
    "kl": "--kl-coef 0.001",  # the paper's coefficient
}
# what the table calls it -> what result.json calls it
KEYS = {"greedy": "greedy", "T=1": "temperature 1"}
VOTES = 3
OURS = dict.fromkeys(("name", "seed", "resume"), "compare.py gives it to each run") | dict.fromkeys(
    ("init", "data", "eval_data", "template", "prompt_tokens", "verifier"),
    "compare.py compares runs on built-in tasks",
)
FIELDS = (
    "arm",
    "seed",
    "flags",
    "version",
    "base",
    "made_by",
    "generated",
    "steps",
    "seconds",
    "base_result",
    "result",
    "extra",
)  # that a line of the result file needs
LOCK = threading.Lock()
ROOT = Path(__file__).resolve().parents[1]
# Student's t, 97.5 %, for 1, 2, 3, ... degrees of freedom
T95 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
)


@dataclass(frozen=True)
class Config:
    # of the result file, results/compare-<name>.jsonl, and of the runs, out/compare-<name>-...
    name: str = "solve"
    arms: str = "grpo,mgrpo"  # which to run, with commas between (see ARMS)
    seeds: int = 5  # RL seeds 0, 1, ... of each arm; 0 only prints the table of what is there
    flags: str = ""  # more flags for every train.py, in quotes
    jobs: int = 2  # runs at a time; each gets its share of the cores


# ---- runs ----------------------------------------------------------------------------------------


@functools.cache
def settled(c):
    """train.py's config for these flags, with device and compute type chosen once, here, and so
    alike for all runs."""
    config = parse_flags(
        train.Config,
        "",
        lambda given: pretrain.pick_preset(given, train.PRESETS),
        split_flags(c),
        OURS,
    )
    opening.validate(config)
    return pretrain.resolve(config)


def split_flags(c):
    """--flags as a list of words. BadInput for a quotation mark without its other one."""
    try:
        return shlex.split(c.flags)
    except ValueError as error:
        raise BadInput(
            f"--flags {c.flags!r} cannot be split into words ({error}): quotation marks come in "
            "pairs"
        ) from None


@functools.cache
def all_code():
    """{file's name: its code as text} of this file and of every file beside it that it imports,
    directly or not."""
    found, todo = {}, ["tools/compare.py", "train.py"]
    while todo:
        name = todo.pop()
        if name in found or not (ROOT / name).exists():
            continue
        source = (ROOT / name).read_text(encoding="utf-8")
        found[name] = code_in(source)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                todo += [f"{alias.name.replace('.', '/')}.py" for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                module = node.module.replace(".", "/")
                todo += [f"{module}.py", *(f"{module}/{alias.name}.py" for alias in node.names)]
    return found


def code_in(source):
    """The syntax tree of a file's text, without comments and docstrings, as text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None
        ):
            del node.body[0]
    return ast.dump(tree)


def version(c, arm):
    """8 hex digits of all that makes an arm's runs what they are, but for the seed: the base, with
    its device and compute type, the flags, and the code."""
    parts = [
        pretrain.base_path(opening.base_config(settled(c))).name,
        *arm_words(c, arm),
        *(text for _, text in sorted(all_code().items())),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def arm_words(c, arm):
    """The flags that all runs of an arm share."""
    config = settled(c)
    words = split_flags(c) + shlex.split(ARMS[arm])
    if arm == "grpo":
        words += ["--attempts", str(config.attempts * (1 + config.corrections))]
    return [*words, "--device", config.device, "--dtype", config.dtype]


def words_for(c, arm, seed):
    """The flags of one run, all of them."""
    return [*arm_words(c, arm), "--seed", str(seed), "--name", f"compare-{c.name}-{arm}-{seed}"]


def run_once(c, arm, seed):
    """Trains one arm with one seed in a process of its own -> its line for the result file."""
    words = words_for(c, arm, seed)
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // c.jobs))}
    script = str(ROOT / "train.py")
    done = subprocess.run(
        [sys.executable, script, *words], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise BadInput(
            f"arm {arm}, seed {seed}: train.py failed: "
            f"{(done.stderr.strip() or str(done.returncode)).splitlines()[-1]}"
        )
    folder = Path(
        next(line for line in done.stdout.splitlines() if line.startswith("run: "))[5:].split(" (")[
            0
        ]
    )
    config, result = (
        json.loads((folder / name).read_text()) for name in ("config.json", "result.json")
    )
    steps = list(
        lines_of(folder / "metrics.jsonl", ("generated", "seconds_sampling", "seconds_training"))
    )
    trained = result["GRPO" if config["layers"] == 1 else "MGRPO"]
    return dict(
        arm=arm,
        seed=seed,
        flags=c.flags,
        version=version(c, arm),
        command=shlex.join(["python", "train.py", *words]),
        base=config["made_by"]["base"],
        date=datetime.date.today().isoformat(),
        made_by=config["made_by"],
        generated=steps[-1]["generated"],
        steps=len(steps),
        seconds=round(sum(s["seconds_sampling"] + s["seconds_training"] for s in steps), 1),
        base_result=result["base"],
        result=trained,
        extra=more_answers(folder / "checkpoint.pt", config),
    )


def more_answers(checkpoint, config):
    """First answers at temperature 1, `VOTES` per question: accuracy of a second fresh sample and
    of the majority.

    -> {"fresh": (mean, error), "majority": (mean, error), "tokens": mean tokens of all votes of a
    question}.
    """
    torch.set_num_threads(1)
    model, _ = load_policy(checkpoint, config["dtype"], config["device"])
    encoding, task = build_encoding(), task_of(config)
    problems = held_out_questions(task, config["eval_questions"])
    prompts, golds = prompts_and_golds(encoding, problems)
    layer = expand(
        Sampler(model),
        encoding,
        golds,
        prompts,
        VOTES,
        Sampling(config["max_new_tokens"], 1.0, seed=77),
    )
    right, votes = layer.correct.view(-1, VOTES).float(), torch.tensor(majorities([layer], VOTES))
    return dict(
        fresh=mean_and_error(right[:, 1]),
        majority=mean_and_error(votes[:, 0]),
        tokens=layer.lengths.view(-1, VOTES).sum(1).float().mean().item(),
    )


def run_and_keep(c, path, arm, seed):
    """run_once, its line added to the result file as soon as it is there, and said aloud."""
    line = run_once(c, arm, seed)
    with LOCK:
        append(path, line)
    shown = figures(line)
    said = ", ".join(f"{name} {shown[name]:.1f}" for name in list(shown)[:2])
    print(f"{arm} {seed}: {said} ({line['seconds']:.0f} s)", flush=True)


def append(path, line):
    """Adds a line of JSON to a file; on a line of its own, also where the last one was cut
    short."""
    with writing(path, "its lines before are whole"), open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
        begun = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * begun + json.dumps(line).encode() + b"\n")


def make_base(c):
    """The base all runs share, made once, with all cores, before they start."""
    pretrain.base_model(opening.base_config(settled(c)))


def missing_runs(c, lines):
    """The (arm, seed) pairs asked for that the result file does not hold yet, as this code would
    run them."""
    there = {
        (line["arm"], line["seed"])
        for line in lines
        if line["flags"] == c.flags and todays(c, line)
    }
    return [
        (arm, seed)
        for seed in range(c.seeds)
        for arm in c.arms.split(",")
        if (arm, seed) not in there
    ]


def todays(c, line):
    """Whether a run was made by what would make it today."""
    return line["arm"] in ARMS and line["version"] == version(c, line["arm"])


def one_version(lines, now=lambda line: False):
    """Of each arm the runs that were made alike: those for which now(line) holds, else those of the
    version of its last line."""
    latest = {line["arm"]: line["version"] for line in lines} | {
        line["arm"]: line["version"] for line in lines if now(line)
    }
    return [line for line in lines if line["version"] == latest[line["arm"]]]


def read_lines(path):
    return list(lines_of(path, FIELDS))


# ---- table ---------------------------------------------------------------------------------------


def figures(line):
    """One run -> {column: value in percent}, greedy and at temperature 1, and GRPO-style extra
    answers."""
    found = {}
    for label, key in KEYS.items():
        found |= {
            f"{label} {title}": 100 * line["result"][key][name][0]
            for name, title in COLUMNS.items()
        }
    return found | {
        "T=1 fresh 2nd": 100 * line["extra"]["fresh"][0],
        f"T=1 majority of {VOTES}": 100 * line["extra"]["majority"][0],
    }


def mean_error(values):
    """ "71.2 ± 0.4": mean and standard error over seeds."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{error}"


def interval(differences):
    """Mean of paired differences and the half-width of its 95 % interval."""
    n = len(differences)
    half = T95[n - 2] * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.nan
    return statistics.mean(differences), half


def main_table(lines, label, old=()):
    """Markdown: the paper's columns at one temperature ("greedy" or "T=1"); the base and a row per
    arm, mean ± standard error over seeds. Rows of the arms in `old` say that other code made them;
    arms with different bases have a row for each."""
    arms = {
        arm: [figures(line) for line in lines if line["arm"] == arm]
        for arm in dict.fromkeys(line["arm"] for line in lines)
    }
    bases = {line["base"]: line["base_result"][KEYS[label]] for line in lines}
    columns = [column for column in figures(lines[0]) if column.startswith(label)]
    rows = [
        f"| {label} | " + " | ".join(column.removeprefix(label + " ") for column in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for path, base in bases.items():
        whose = (
            " of " + ", ".join(dict.fromkeys(line["arm"] for line in lines if line["base"] == path))
            if len(bases) > 1
            else ""
        )
        rows.append(
            f"| base{whose} | "
            + " | ".join(f"{100 * base[name][0]:.1f}" for name in COLUMNS)
            + " |"
            + " |" * (len(columns) - len(COLUMNS))
        )
    for arm, runs in arms.items():
        how = f"{len(runs)} seeds{', other code' if arm in old else ''}"
        rows.append(
            f"| {arm} ({how}) | "
            + " | ".join(mean_error([run[column] for run in runs]) for column in columns)
            + " |"
        )
    return "\n".join(rows)


def paired_table(lines, ours="mgrpo", theirs="grpo"):
    """Markdown: differences between the arms, seed by seed, with 95 % intervals; empty unless both
    are there twice."""
    by_seed = {
        arm: {line["seed"]: figures(line) for line in lines if line["arm"] == arm}
        for arm in (ours, theirs)
    }
    seeds = sorted(set(by_seed[ours]) & set(by_seed[theirs]))
    if len(seeds) < 2:
        return ""
    majority = f"T=1 majority of {VOTES}"
    pairs = [
        (f"{t} Acc@t2", f"{t} {other}") for t in ("greedy", "T=1") for other in ("Acc@t1", "Acc@t2")
    ]
    pairs += [
        ("T=1 Acc@t2", "T=1 fresh 2nd"),
        ("T=1 Acc@t2", majority),
        ("greedy Acc@t1", "greedy Acc@t1"),
        ("T=1 Δ c→i", "T=1 Δ c→i"),
    ]
    rows = [
        f"| {ours} | minus {theirs} | points, 95 % interval, {len(seeds)} seeds |",
        "|---|---|---|",
    ]
    for a, b in pairs:
        mean, half = interval([by_seed[ours][s][a] - by_seed[theirs][s][b] for s in seeds])
        rows.append(f"| {a} | {b} | {mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}] |")
    return "\n".join(rows)


def footnotes(lines):
    """What the tables rest on: tokens, steps and time per run, inference tokens per question."""
    rows = []
    for arm in dict.fromkeys(line["arm"] for line in lines):
        mine = [line for line in lines if line["arm"] == arm]
        middle = {
            k: statistics.median(line[k] for line in mine)
            for k in ("generated", "steps", "seconds")
        }
        two = statistics.mean(line["result"][KEYS["T=1"]]["tokens"] for line in mine)
        votes = statistics.mean(line["extra"]["tokens"] for line in mine)
        rows.append(
            f"{arm}: {middle['generated'] / 1e6:.2f} M generated tokens, {middle['steps']:.0f} "
            f"steps, {middle['seconds']:.0f} s "
            f"a run ({mine[0]['made_by']['threads']} thread); inference {two:.0f} tokens for two "
            f"turns, {votes:.0f} for {VOTES} "
            "votes"
        )
    return "\n".join(rows)


def remark(lines, old):
    """How many of the runs are not today's, in a line; empty when all are."""
    stale = sum(line["arm"] in old for line in lines)
    return (
        (
            f"{stale} of these {len(lines)} runs ({', '.join(old)}) were made by other code, from "
            "another base or with "
            "another compute type than a run of today; --arms with --seeds makes new ones"
        )
        if stale
        else ""
    )


def main():
    """Flags, the runs that are missing, the tables."""
    c = parse_flags(Config, __doc__)
    for arm in c.arms.split(","):
        if arm not in ARMS:
            raise BadInput(f"--arms: there is no arm {arm!r}; choose from {', '.join(ARMS)}")
    if c.jobs < 1 or not 0 <= c.seeds <= len(T95) + 1:
        raise BadInput(f"--jobs must be at least 1 and --seeds 0 to {len(T95) + 1}")
    settled(c)  # what is wrong with --flags is said before anything else is looked at
    path = Path("results") / f"compare-{file_name('name', c.name)}.jsonl"
    todo = missing_runs(c, read_lines(path))
    if todo:
        path.parent.mkdir(exist_ok=True)
        make_base(c)
        with ThreadPoolExecutor(c.jobs) as pool:
            list(
                tqdm(
                    pool.map(lambda pair: run_and_keep(c, path, *pair), todo),
                    total=len(todo),
                    unit="run",
                    disable=None,
                )
            )
    lines = one_version(
        [line for line in read_lines(path) if line["flags"] == c.flags],
        lambda line: todays(c, line),
    )
    if not lines:
        raise BadInput(f"{path} holds no runs with these flags; use --seeds 1 or more")
    old = list(dict.fromkeys(line["arm"] for line in lines if not todays(c, line)))
    tables = [main_table(lines, label, old) for label in KEYS]
    print(
        "\n\n".join(
            filter(None, (*tables, paired_table(lines), footnotes(lines), remark(lines, old)))
        )
    )


if __name__ == "__main__":
    guarded(main)
