"""What a run prints and writes while it runs: progress bars, a line a step, JSON, what made it.

A bar is drawn by tqdm on stderr, and only on a terminal, so that what a script prints can be piped.
(TQDM_DISABLE=1 turns bars off.) Of several ranks, rank 0 prints and writes.
"""

import contextlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from tqdm import tqdm

from runtime import distributed
from runtime.distributed import rank0
from runtime.flags import ROOT, AtLeast, inert, writing

BAR_DELAY = 1.0  # seconds before a phase of a step is worth a bar


@dataclass(frozen=True)
class Logging:
    """What a run keeps."""

    save_every: Annotated[int, AtLeast(0)] = 0  # steps between two saved states; 0: ten a run
    # The trees of the first so many questions of a step go into rollouts.jsonl; 0: none.
    transcripts: Annotated[int, AtLeast(0)] = 2


def say(text):
    """Prints beside a progress bar; control characters from files are made harmless."""
    tqdm.write(inert(text))


def bar(total, name, unit, **options):
    """-> a tqdm bar over `total` units; hidden on ranks above 0 and in a pipe."""
    # tqdm reads this variable only where `disable` is not given.
    off = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    # None: shown if stderr is a terminal
    hidden = True if off or distributed.rank() > 0 else None
    return tqdm(
        total=total,
        desc=name,
        unit=unit,
        unit_scale=total >= 100_000,
        disable=hidden,
        dynamic_ncols=True,
        **options,
    )


@contextlib.contextmanager
def bar_of_rows(sampler, total, name):
    """Around calls of a sampler that make `total` rows: a bar of how many rows have finished."""
    with bar(total, name, " rows", leave=False, delay=BAR_DELAY) as drawn:
        if drawn.disable:  # then rows need not be counted
            yield
            return
        sampler.seen = lambda rows, ended: drawn.update(ended)
        try:
            yield
        finally:
            sampler.seen = None


# ---- a step --------------------------------------------------------------------------------------


def columns(metrics, count):
    """The columns of a step's line -> [(title, text), ...]; a value that is missing shows as "-".

    count: layers of the run.
    """
    layers, corrections = range(1, count + 1), range(2, count + 1)
    shown = [("step", "step", "{:5.0f}")]
    shown += [(f"reward{k}", f"R{k}", "{:4.2f}") for k in layers]
    shown += [(f"accuracy{k}", f"acc{k}", "{:4.2f}") for k in layers]
    for k in corrections:
        # Two layers have one `fix`; of more, each has its number.
        number = k if count > 2 else ""
        shown += [(f"fix{k}", f"fix{number}", "{:4.2f}")]
        shown += [(f"broke{k}", f"broke{number}", "{:5.2f}" if count == 2 else "{:6.2f}")]
    shown += [(f"length{k}", f"len{k}", "{:4.0f}") for k in layers]
    shown += [
        ("entropy", "entr", "{:4.2f}"),
        ("grad_norm", "|grad|", "{:6.3f}"),
        ("clipped", "clip%", "{:5.1%}"),
        ("gauge_max", "gauge", "{:6.0e}"),
    ]
    shown += [(f"signal{k}", f"signal{k}", "{:7.0%}") for k in layers]
    shown += [
        ("truncated", "truncated", "{:9.0%}"),
        ("undecided", "undecided", "{:9.0f}"),
        ("peak_gb", "GB", "{:4.1f}"),
        ("tokens_per_s", "tok/s", "{:6.0f}"),
        ("seconds_sampling", "t_sample", "{:8.2f}"),
        ("seconds_training", "t_train", "{:7.2f}"),
    ]
    # Title and value are as wide as the format makes a 0, so that columns stand under each other.
    line = []
    for name, title, form in shown:
        width = len(form.format(0))
        value = metrics.get(name)
        text = "-".rjust(width) if value is None else form.format(value)
        line.append((f"{title:>{width}}", text))
    return line


@rank0
def print_line(metrics, count):
    """A step as a line on the screen, with the titles above every twentieth. count: of layers."""
    line = columns(metrics | dict(truncated=max_of(metrics, "truncated")), count)
    if metrics["step"] % 20 == 1:
        say(" ".join(title for title, _ in line))
    say(" ".join(text for _, text in line))


def max_of(metrics, name):
    """The largest of name1, name2, ..."""
    return max(value for key, value in metrics.items() if re.fullmatch(rf"{name}\d+", key))


def plain(value):
    """A number as JSON has it: six digits; null for what is not finite."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


class Metrics(dict):
    """{name: sum over the rows and micro-batches of a step}, as numbers or as tensors."""

    def add(self, **values):
        for name, value in values.items():
            # Tensors are added on their device: the host does not wait.
            self[name] = self[name] + value if name in self else value

    def join(self, other):
        """Adds all of another; of what ends in _max the larger stays."""
        for name, value in other.items():
            (self.largest if name.endswith("_max") else self.add)(**{name: value})

    def largest(self, **values):
        for name, value in values.items():
            self[name] = torch.maximum(value, self[name]) if name in self else value


# ---- what made it --------------------------------------------------------------------------------


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
    ranks = distributed.size()
    start = ["torchrun", f"--nproc_per_node={ranks}"] if ranks > 1 else ["python"]
    return shlex.join([*start, os.path.basename(sys.argv[0]), *sys.argv[1:]])


def processor():
    """The name of this machine's GPU; without one that of the CPU, and its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.M) if info.exists() else []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def commit():
    """The git commit of this code, with "+" when files differ from it; empty without git."""
    try:
        words = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(words, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except OSError:
        return ""


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
