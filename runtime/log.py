"""What a run writes while it runs: its folder, a line a step, and whole trees to read.

The idea. A run that cannot be read afterwards did not happen. So out/<run>/ holds

    config.json      every setting with nothing left open, and what made it: command, versions,
                     machine, git commit
    metrics.jsonl    a line per step, every field by name; the screen shows the columns of `LINE`
                     (README explains each)
    samples.md       the trees of the best and the worst question of a step, with rewards and
                     advantages at every node
    tensorboard/     with --tensorboard: the numbers of metrics.jsonl again

Nothing here draws random numbers or touches the model. Of several processes (parallel.py) rank 0
writes.
"""

import contextlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from runtime import distributed
from runtime.distributed import rank0
from runtime.flags import BadInput, inert, make_folder, read_json, writing
from mgrpo import phrase_text


def say(text):
    """Prints beside a progress bar without tearing it; what comes from files cannot steer the
    terminal."""
    tqdm.write(inert(text))


# ---- a step --------------------------------------------------------------------------------------


def rollout_metrics(layers, depth=2):
    """What a rollout of `depth` layers at most shows before any training, means over the rows of
    all ranks: rewards, accuracies, transitions, lengths, answers cut, and the share of groups with
    a signal: some row is trained with an advantage that is not 0."""
    found = dict(undecided=0)
    for i in range(1, depth + 1):
        sums = distributed.total(layer_sums(layers, i))
        if sums["rows"]:
            found |= {
                f"{name}{i}": sums[name] / sums["rows"]
                for name in ("reward", "accuracy", "length", "cut")
            }
            found |= {
                f"signal{i}": sums["signal"] / sums["groups"],
                "undecided": found["undecided"] + int(sums["undecided"]),
            }
            found |= {name: sums[name] / sums["rows"] for name in ("fix", "broke") if i == 2}
    return found


def layer_sums(layers, i):
    """{name: sum over the rows of layer i}, zeros for one that is not there."""
    names = (
        "rows",
        "groups",
        "signal",
        "undecided",
        "reward",
        "accuracy",
        "length",
        "cut",
        "fix",
        "broke",
    )
    if i > len(layers):
        return dict.fromkeys(names, 0)
    layer = layers[i - 1]
    before, right = layers[0].correct[layer.parents] if i == 2 else layer.correct, layer.correct
    groups = [len(layer.siblings[rows].unique()) for rows in (slice(None), layer.active(0))]
    columns = (
        layer.undecided,
        layer.rewards,
        right,
        layer.lengths,
        ~layer.completions.ended.cpu(),
        ~before & right,
        before & ~right,
    )
    return dict(
        zip(names, [len(right), *groups, *(column.double().sum().item() for column in columns)])
    )


LINE = (
    ("step", "step", "{:5.0f}"),
    ("reward1", "  R1", "{:4.2f}"),
    ("reward2", "  R2", "{:4.2f}"),
    ("accuracy1", "acc1", "{:4.2f}"),
    ("accuracy2", "acc2", "{:4.2f}"),
    ("fix", " fix", "{:4.2f}"),
    ("broke", "brok", "{:4.2f}"),
    ("length1", "len1", "{:4.0f}"),
    ("length2", "len2", "{:4.0f}"),
    ("entropy", "entr", "{:4.2f}"),
    ("grad_norm", "|grad|", "{:6.3f}"),
    ("clipped", "clip%", "{:5.1%}"),
    ("gauge_max", " gauge", "{:6.0e}"),
    ("signal1", "sig1", "{:4.0%}"),
    ("signal2", "sig2", "{:4.0%}"),
    ("cut", " cut", "{:4.0%}"),
    ("undecided", "und", "{:3.0f}"),
    ("peak_gb", "  GB", "{:4.1f}"),
    ("tokens_per_s", " tok/s", "{:6.0f}"),
    ("seconds_sampling", "s smp", "{:5.2f}"),
    ("seconds_training", "s trn", "{:5.2f}"),
)


@rank0
def log(folder, metrics, board=None, quiet=False):
    """One line on the screen (unless quiet), one line of JSON in metrics.jsonl, and the same
    numbers to `board` (open_board)."""
    metrics = metrics | dict(cut=max(metrics["cut1"], metrics.get("cut2", 0.0)))
    path = folder / "metrics.jsonl"
    with writing(path, "its lines before are whole"), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({k: plain(v) for k, v in metrics.items()}) + "\n")
    for name, value in metrics.items() if board else ():
        if value is not None:  # an error that a single question does not give
            board.add_scalar(name, value, metrics["step"])
    if quiet:
        return
    if metrics["step"] % 20 == 1:
        say(" ".join(f"{title:>{len(form.format(0))}}" for _, title, form in LINE))
    say(
        " ".join(
            form.format(metrics[k]) if k in metrics else "-".rjust(len(form.format(0)))
            for k, _, form in LINE
        )
    )


def open_board(folder, wanted, step):
    """A context with a tensorboard writer in the run's folder, or with None when none is wanted or
    this is not rank 0. What an earlier part of the run wrote after `step` is hidden."""
    if not wanted or distributed.rank() > 0:
        return contextlib.nullcontext()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


@rank0
def cut_log(folder, step):
    """Drops the lines of metrics.jsonl and rollouts.jsonl after `step`, for a run that goes on from
    there and writes them again; a half-written line too. Line by line: the second may be large."""
    for path in (folder / "metrics.jsonl", folder / "rollouts.jsonl"):
        if path.exists():
            temporary = Path(f"{path}.{os.getpid()}.tmp")
            try:
                # in bytes, since half a line may end within a character
                with writing(path), open(path, "rb") as old, open(temporary, "wb") as new:
                    new.writelines(line for line in old if step_of(line) <= step)
                    new.flush()
                    os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)


def step_of(line):
    """The step of a line (bytes) of a log; infinity for one that is cut short or damaged."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


@rank0
def note_resume(folder, settings, step):
    """Writes into config.json what a run that goes on was given, and by whom: the settings that may
    differ, and a list of such parts. What decides how sums are rounded, and is not what it was, is
    said."""
    stored, now = read_json(folder / "config.json", "a run has one"), versions()
    made_by = stored.get("made_by", {})
    earlier = made_by.get("resumed", [])
    before = {**made_by, **earlier[-1]} if earlier else made_by
    moved = [
        f"{name} {now[name]} (was {before[name]})"
        for name in ("threads", "processes", "processor", "torch")
        if before.get(name, now[name]) != now[name]
    ]
    if moved:
        say(
            f"resume: {', '.join(moved)}: sums are rounded otherwise, so that this run will not be "
            "bit for bit the one that was stopped"
        )
    parts = [*earlier, dict(after_step=step) | now]
    write_json(
        folder / "config.json", stored | settings | dict(made_by=made_by | dict(resumed=parts))
    )


def post_mortem(folder, step, layers):
    """Keeps a rollout that gave a gradient that is not finite: tokens, log-probabilities, rewards
    and advantages of every row. Each rank keeps its own, since nobody knows whose it was."""
    kept = [
        dict(
            prompts=layer.completions.prompts,
            tokens=layer.completions.tokens.cpu(),
            logprobs=layer.completions.logprobs.cpu(),
            lengths=layer.lengths,
            rewards=layer.rewards,
            advantages=layer.advantages,
            parents=layer.parents,
        )
        for layer in layers
    ]
    number = f"-rank{distributed.rank()}" if distributed.size() > 1 else ""
    path = make_folder(folder) / f"not-finite-{step}{number}.pt"
    # given a name instead, torch makes a RuntimeError of a full disk
    with writing(path), open(path, "wb") as file:
        torch.save(kept, file)
    say(
        f"step {step}: a gradient is not finite; its optimiser step is skipped, and the rollout "
        f"kept in {path}"
    )


def plain(value):
    """A number as JSON has it: six digits; null for what is not finite."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


@rank0
def write_samples(path, step, layers, problems, encoding):
    """Appends the trees of the best and the worst question of this rollout, by the sum of rewards
    of all their nodes."""
    total = sum(
        torch.zeros(len(problems)).index_add_(0, layer.questions, layer.rewards) for layer in layers
    )
    with writing(path), open(path, "a", encoding="utf-8") as file:
        for name, question in (("best", int(total.argmax())), ("worst", int(total.argmin()))):
            file.write(
                f"## Step {step}, {name} "
                f"tree\n\n```\n{tree_text(layers, problems[question], question, encoding)}\n```\n\n"
            )


def tree_text(layers, problem, question, encoding):
    """A whole tree as indented text: reward and advantage at each node."""
    first, lines = layers[0], [problem.question, f"gold: {problem.gold}"]
    for i in (first.questions == question).nonzero()[:, 0].tolist():
        lines.append(
            f"├─ [{'right' if first.correct[i] else 'WRONG'} R={first.rewards[i]:.2f} "
            f"A={first.advantages[i]:+.2f}] {first.texts[i]}"
        )
        if len(layers) == 2:
            second = layers[1]
            for row, j in enumerate((second.parents == i).nonzero()[:, 0].tolist()):
                if row == 0:
                    given = encoding.decode(second.completions.prompts[j // second.completions.n])
                    lines.append("│  " + given[given.rindex(phrase_text("")) + 1 :])
                lines.append(
                    f"│  ├─ [{'right' if second.correct[j] else 'WRONG'} R={second.rewards[j]:.2f} "
                    f"A={second.advantages[j]:+.2f}] {second.texts[j]}"
                )
    return "\n".join(lines)


# ---- the folder ----------------------------------------------------------------------------------


def run_folder(run, settings, base_path, seconds):
    """Makes out/<run> with config.json: the settings (a dict) and what made it -> its path.
    seconds: that it took to load or make the model. A run that exists is never written over, nor
    one that another process makes at this moment."""
    folder = distributed.from_rank0(lambda: new_folder(Path("out") / run))
    made_by = dict(base=str(base_path), seconds_base=round(seconds, 1)) | versions()
    try:
        write_json(folder / "config.json", settings | dict(made_by=made_by))
    except OSError:
        folder.rmdir()  # a run without its settings is none
        raise
    say(
        f"run: {folder}"
        + (f" (there is an out/{run}, which is not written over)" if folder.name != run else "")
    )
    return folder


def new_folder(path):
    """Makes `path`, or the first of path.2, path.3, ... that is not there -> the Path."""
    make_folder(path.parent)
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}.{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise BadInput(
                f"{folder} cannot be made ({error.strerror}): there must be a folder that can be "
                "written to"
            ) from None


def versions():
    """What ran where: the command, torch, Python, machine, threads, processes, git commit."""
    return dict(
        command=command(),
        torch=torch.__version__,
        python=platform.python_version(),
        machine=platform.platform(),
        processor=processor(),
        threads=torch.get_num_threads(),
        processes=distributed.size(),
        commit=commit(),
    )


def command():
    """The command line of this process; of several, as on one machine."""
    start = (
        ["torchrun", f"--nproc_per_node={distributed.size()}"] if distributed.size() > 1 else ["python"]
    )
    return shlex.join([*start, os.path.basename(sys.argv[0]), *sys.argv[1:]])


def processor():
    """The name of this machine's GPU; without one that of the CPU, and how many cores it has."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.M) if info.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


@rank0
def write_json(path, what):
    """Writes JSON in one move: a reader, and a disk that fills up meanwhile, has the old file or
    the new one. OSError names the file."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    with writing(path):
        try:
            temporary.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def commit():
    """The git commit of this code, with "+" when files differ from it; empty without git."""
    try:
        words = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(
            words, capture_output=True, text=True, cwd=Path(__file__).parents[1]
        ).stdout.strip()
    except OSError:
        return ""
