"""What a run needs to go on exactly where it was, in files that are whole or not there.

    python train.py --resume --name solve-mgrpo-0        # goes on after a kill, a crash, Ctrl-C or
                                                         a full disk

The idea. A run can die at any moment, also while it writes. So a state is written to a temporary
file, forced to the disk, and only then given its name in one move; and the name holds the checksum
of the content:

    out/<run>/state/step-0000120-9f86d081884c7d65.pt

A file that was cut short or has a flipped bit does not match its name. It is named, and the one
before it is used: the last few are kept, and the best. Everything in a file is tensors and plain
values; reading one runs no code (torch.load with weights_only). A state holds the settings that
made it, and `check_state` refuses one that is not of the run that is to go on, or not what
save_state was given.

Bit-exact resuming needs little besides, since nothing here depends on what was drawn before: data
order and random numbers are functions of (seed, step, row, position).
"""

import dataclasses
import fcntl
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import torch

from model import GPT, check_weights, checksum
from runtime import distributed
from runtime.distributed import rank0
from runtime.flags import BadInput, check_fields, is_a, ran_out, read_json
from runtime.log import cut_log, write_json
from tables import COLUMNS

# Settings that may differ when a run goes on: how it is computed, and how long. Any other would
# make it another run.
FREE = (
    "tokens_per_microbatch",
    "pack",
    "compile",
    "cache_tokens",
    "recompute",
    "offload_optimizer",
    "eval_questions",
    "keep",
    "save_every",
    "device",
    "tokens",
    "look_questions",
    "eval_every",
    "transcripts",
    "tensorboard",
    "quiet",
)
NAME = re.compile(r"step-(\d{7})-([0-9a-f]{16})\.pt")


@dataclass
class Progress:
    """How far a run is: plain values, which its saved states keep."""

    step: int = 0
    generated: int = 0  # tokens
    seconds: float = 0.0
    sampling: float = 0.0  # seconds of them
    training: float = 0.0
    looking: float = 0.0  # at held-out questions
    updates: int = 0  # optimiser steps made
    skipped: int = 0  # in a row, for gradients that were not finite
    # the step whose state is the best: by accuracy of the last layer since the state before
    best: int = -1
    accuracy: float = -1.0  # of the best
    base: str = ""  # where the run began: a base's file, or the folder of --init
    reference: str = ""  # checksum of the weights there, with a KL term
    recent: list = dataclasses.field(default_factory=list)  # accuracies since the last state
    results: dict = dataclasses.field(default_factory=dict)  # tables


def saved(folder):
    """-> [(step, path)] of the states in a folder, the newest first."""
    found = ((NAME.fullmatch(path.name), path) for path in Path(folder).glob("step-*.pt"))
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def save_state(folder, step, state, keep=2):
    """Writes a state (tensors and plain values) as step `step`, then removes all but the last
    `keep` and the best -> its path.

    state["best"]: the step of the best one so far. OSError for a disk that is full or cannot be
    written; what was there is intact.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.tmp"):  # of a process that was killed while it wrote
        leftover.unlink()
    temporary = folder / f"{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"step-{step:07d}-{checksum(temporary)}.pt"
        os.replace(temporary, path)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError when the disk is full
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{folder}: step {step} could not be saved ({str(error).splitlines()[0]}); the steps "
            "before it are intact"
        ) from None
    for other, old in saved(folder)[keep:]:
        if other != state.get("best"):
            old.unlink()
    return path


def sync_folder(folder):
    """Forces a rename to the disk: until then a power cut may undo it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_state(path, known=False):
    """-> the state in one file. BadInput for one that is damaged, which its checksum shows, or that
    is no state. known: it has been looked at, by rank 0."""
    match = NAME.fullmatch(Path(path).name)
    try:
        if not known and (match is None or checksum(path) != match[2]):
            raise BadInput(
                f"{path} is damaged: its content does not have the checksum that its name says"
            )
        # read where it is needed
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except BadInput:
        raise
    except Exception as error:  # torch.load raises many types for many kinds of files
        raise BadInput(f"{path} cannot be read ({type(error).__name__})") from None


def newest_state(folder, say):
    """-> (state, path) of the newest whole state in a folder; damaged ones are named and passed
    over. BadInput when there is none."""
    for _, path in saved(folder):
        try:
            return load_state(path), path
        except BadInput as error:
            say(f"{error}; the one before it is used")
    raise BadInput(f"{folder} holds no state to resume from: a run writes one with its first step")


# ---- going on, stopping --------------------------------------------------------------------------


def resumed_run(resume, name=""):
    """--resume as it was given ("newest", a run's folder, or a state's file) and --name -> the
    run's folder, the same on all ranks."""
    return distributed.from_rank0(lambda: find_run(resume, name))


def find_run(resume, run):
    if resume == "newest":
        states = sorted(
            (path.stat().st_mtime, path.parents[1])
            for path in Path("out").glob("*/state/step-*.pt")
        )
        found = [
            folder
            for _, folder in states
            if not run or re.fullmatch(re.escape(run) + r"(\.\d+)?", folder.name)
        ]
        if not found:
            raise BadInput(
                f"--resume: no run under out/{' called ' + run if run else ''} has a state to go "
                "on from; name its folder"
            )
        return found[-1]
    folder = Path(resume)
    if folder.is_file():
        if not NAME.fullmatch(folder.name) or folder.absolute().parent.name != "state":
            raise BadInput(
                f"--resume {resume} is no state: name a run's folder, or a file state/step-...pt "
                "of one"
            )
        folder = folder.parents[1] if len(folder.parts) > 2 else folder.absolute().parents[1]
    if not saved(folder / "state"):
        raise BadInput(
            f"--resume {resume}: {folder} holds no state to go on from (state/step-...pt)"
        )
    return folder


def resumed_settings(given, names, say):
    """What stands under the given flags when a run goes on: its own config, of the fields `names`.
    A flag that differs from it is shown; BadInput for one that would make it another run."""
    folder = resumed_run(given["resume"], given.get("name", ""))
    stored = read_json(folder / "config.json", "a run has one")
    # of this process alone
    old = {
        name: stored[name]
        for name in names
        if name in stored and name not in ("quiet", "tensorboard")
    }
    for name in sorted(given.keys() - {"resume", "name"}):
        flag = f"--{name.replace('_', '-')}"
        was = old.get(name)
        if given[name] != was and name not in FREE:
            raise BadInput(
                f"{flag} {given[name]}: {folder} was made with {was}, and would not be continued "
                f"by this; leave {flag} out, or "
                "start a new run"
            )
        if given[name] != was:
            say(f"resume: {flag} {given[name]} (was {was})")
    return old


def resumed_state(resume, folder, settings, shape, say):
    """The state to go on from, checked, the same on all ranks -> what save_state was given."""
    found = {}

    def look():
        state, path = (
            (load_state(resume), resume)
            if Path(resume).is_file()
            else newest_state(folder / "state", say)
        )
        check_state(state, path, settings, shape)
        found["state"] = state
        return path

    path = distributed.from_rank0(look)
    say(f"resume: from {path}")
    return found["state"] if found else load_state(path, known=True)


def check_state(state, path, settings, shape):
    """BadInput, naming the file and what is wrong, unless a state is whole, and one of a run with
    these settings and a model of this shape (model.ModelConfig). A checksum says that a file is as
    it was written; this, that it is what was to be written."""
    kinds = dict(
        settings=dict, weights=dict, optimizer=dict, best=int, generator=torch.Tensor, progress=dict
    )
    if not isinstance(state, dict) or state.keys() != kinds.keys():
        raise BadInput(
            f"{path} does not hold {', '.join(kinds)}: it is no state of this version; the code "
            "that wrote it can go on with it "
            "(config.json names its commit), or start a new run"
        )
    check_fields(state, kinds, path)
    for name in sorted(
        (state["settings"].keys() | settings.keys()) - {*FREE, "name", "resume"}, key=str
    ):
        was, now = (found.get(name) for found in (state["settings"], settings))
        if type(was) is not type(now) or was != now:
            raise BadInput(
                f"{path} was made with {name} = {was!r}, and its run's config.json now says "
                f"{now!r}: put that back, or start a "
                "new run"
            )
    try:
        check_weights(state["weights"], shape)
        check_progress(state["progress"], int(NAME.fullmatch(Path(path).name)[1]), state["best"])
        check_moments(state["optimizer"], shape, state["progress"]["updates"])
        torch.Generator().set_state(state["generator"])
    except (ValueError, TypeError, RuntimeError) as error:
        if ran_out(error):
            raise
        raise BadInput(
            f"{path} does not fit this model and run ({str(error).splitlines()[0]}); is --init "
            "another one now?"
        ) from None


def check_progress(values, step, best):
    """ValueError unless `values` are the fields of a Progress that has come to `step` and has its
    best state at step `best`."""
    try:
        check_fields(values, get_type_hints(Progress), "progress")
    except BadInput as error:
        raise ValueError(error) from None
    p, counts = (
        Progress(**values),
        ("step", "generated", "seconds", "sampling", "training", "looking", "updates", "skipped"),
    )
    if (
        p.step != step
        or min(values[name] for name in counts) < 0
        or (p.generated > 0) != (step > 0)
        or not -1 <= p.best == best <= step
        or not -1 <= p.accuracy <= 1
        or p.recent
    ):
        shown = ", ".join(
            f"{name} = {values[name]!r:.40}" for name in (*counts, "best", "accuracy", "recent")
        )
        raise ValueError(f"progress holds what cannot be: {shown}")
    base = p.results.get("base") if p.results.keys() == {"base"} else None
    for row in (
        base.get(label) if isinstance(base, dict) else None for label in ("greedy", "temperature 1")
    ):
        pairs = (
            [row.get(column) for column in COLUMNS]
            if isinstance(row, dict) and type(row.get("questions")) is int
            else [None]
        )
        if not all(
            isinstance(pair, tuple) and len(pair) == 2 and all(is_a(x, float) for x in pair)
            for pair in pairs
        ):
            raise ValueError("progress: results do not hold the table of the base")


def check_moments(moments, shape, updates):
    """ValueError unless {number of a parameter: its moments} are those of AdamW after so many
    updates of a GPT of this shape."""
    with torch.device("meta"):
        parameters = list(GPT(shape).parameters())
    if moments.keys() != set(range(len(parameters) if updates else 0)):
        raise ValueError(
            f"after {updates} updates it holds the moments of {len(moments)} parameters, of "
            f"{len(parameters)}"
        )
    for i, found in moments.items():
        likes = dict(step=torch.empty(()), exp_avg=parameters[i], exp_avg_sq=parameters[i])
        if (
            not isinstance(found, dict)
            or found.keys() != likes.keys()
            or not all(
                isinstance(x, torch.Tensor)
                and x.dtype == torch.float32
                and x.shape == likes[name].shape
                and x.isfinite().all()
                for name, x in found.items()
            )
            or found["step"] != updates
            or found["exp_avg_sq"].amin() < 0
        ):
            raise ValueError(f"the moments of parameter {i} are not those after {updates} updates")


def go_on(state, folder, policy, optimizer):
    """Puts the rest of a saved state where it belongs -> Progress. The log is cut to it."""
    moments = distributed.scattered_optimizer(dict(state=state["optimizer"]), policy.parameters())
    # its settings are those of the flags, not of a file
    optimizer.load_state_dict(optimizer.state_dict() | moments)
    torch.set_rng_state(state["generator"])
    progress = Progress(**state["progress"])
    cut_log(folder, progress.step)
    # a table of after is not that of a run that goes on
    write_json(folder / "result.json", progress.results)
    return progress


@rank0
def alone_in(folder):
    """Takes the run's folder for as long as the file that is returned is open. BadInput if another
    process has it: they would write over each other's states."""
    file = open(folder / "lock", "w")  # noqa: SIM115 - the lock is let go when the file is closed
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(
            f"{folder}: another process is training here; wait for it to end, or stop it"
        ) from None
    except OSError:  # some network file systems have no locks
        pass
    return file


class Stop:
    """Ctrl-C and SIGTERM ask for a stop after the step that is under way (`asked`); then Ctrl-C
    once more stops at once. (SIGTERM does not: schedulers send it to every process, and torchrun
    passes its own on.)"""

    def __init__(self, say):
        self.say, self.asked = say, False

    def __enter__(self):
        self.before = {
            number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked:
            return
        self.asked = True
        self.say(
            f"{signal.Signals(number).name}: stopping after this step; Ctrl-C once more stops at "
            "once"
        )

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
