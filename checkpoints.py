"""What a run needs to go on exactly where it was, in files that are whole or not there.

    python train.py --resume --run solve-mgrpo-0        # goes on after a kill, a crash, Ctrl-C or a full disk

The idea. A run can die at any moment, also while it writes. So a state is written to a temporary file, forced to the disk, and only then
given its name in one move; and the name holds the checksum of the content:

    out/<run>/state/step-0000120-9f86d081884c7d65.pt

A file that was cut short or has a flipped bit does not match its name. It is named, and the one before it is used: the last few are kept,
and the best. Everything in a file is tensors and plain values; reading one runs no code (torch.load with weights_only).

Bit-exact resuming needs little besides, since nothing here depends on what was drawn before: data order and random numbers are functions
of (seed, step, row, position).
"""
import hashlib
import os
import re
import signal
from pathlib import Path

import torch

from flags import BadInput, read_json

# Settings that may differ when a run goes on: how it is computed, and how long. Any other would make it another run.
FREE = ("rows", "cache_tokens", "recompute", "offload_optimizer", "eval_questions", "keep", "save_every", "device", "tokens")
NAME = re.compile(r"step-(\d{7})-([0-9a-f]{16})\.pt")


def checksum(path):
    """16 hex digits of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()[:16]


def saved(folder):
    """-> [(step, path)] of the states in a folder, the newest first."""
    found = ((NAME.fullmatch(path.name), path) for path in Path(folder).glob("step-*.pt"))
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def save_state(folder, step, state, keep=2):
    """Writes a state (tensors and plain values) as step `step`, then removes all but the last `keep` and the best -> its path.

    state["best"]: the step of the best one so far. OSError for a disk that is full or cannot be written; what was there is intact.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.tmp"):                     # of a process that was killed while it wrote
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
    except (OSError, RuntimeError) as error:                  # torch says RuntimeError when the disk is full
        temporary.unlink(missing_ok=True)
        raise OSError(f"{folder}: step {step} could not be saved ({str(error).splitlines()[0]}); the steps before it are intact") from None
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


def load_state(path):
    """-> the state in one file. BadInput for one that is damaged, which its checksum shows, or that is no state."""
    match = NAME.fullmatch(Path(path).name)
    try:
        if match is None or checksum(path) != match[2]:
            raise BadInput(f"{path} is damaged: its content does not have the checksum that its name says")
        return torch.load(path, map_location="cpu", weights_only=True)
    except BadInput:
        raise
    except Exception as error:                                # torch.load raises many types for many kinds of files
        raise BadInput(f"{path} cannot be read ({type(error).__name__})") from None


def newest_state(folder, say):
    """-> (state, path) of the newest whole state in a folder; damaged ones are named and passed over. BadInput when there is none."""
    for _, path in saved(folder):
        try:
            return load_state(path), path
        except BadInput as error:
            say(f"{error}; the one before it is used")
    raise BadInput(f"{folder} holds no state to resume from: a run writes one with its first step")


# -------------------------------------------------------------------------------------------------------- going on, stopping

def resumed_run(resume, run=""):
    """--resume as it was given ("newest", a run's folder, or a state's file) and --run -> the run's folder."""
    if resume == "newest":
        states = sorted((path.stat().st_mtime, path.parents[1]) for path in Path("out").glob("*/state/step-*.pt"))
        found = [folder for _, folder in states if not run or re.fullmatch(re.escape(run) + r"(\.\d+)?", folder.name)]
        if not found:
            raise BadInput(f"--resume: no run under out/{' called ' + run if run else ''} has a state to go on from; name its folder")
        return found[-1]
    folder = Path(resume).parents[1] if Path(resume).is_file() else Path(resume)
    if not saved(folder / "state"):
        raise BadInput(f"--resume {resume}: {folder} holds no state to go on from (state/step-...pt)")
    return folder


def resumed_settings(given, names, say):
    """What stands under the given flags when a run goes on: its own config, of the fields `names`. A flag that differs from it is shown;
    BadInput for one that would make it another run."""
    folder = resumed_run(given["resume"], given.get("run", ""))
    stored = read_json(folder / "config.json", "a run has one")
    old = {name: stored[name] for name in names if name in stored}
    for name in sorted(given.keys() - {"resume", "run"}):
        flag = f"--{name.replace('_', '-')}"
        was = old.get(name)
        if given[name] != was and name not in FREE:
            raise BadInput(f"{flag} {given[name]}: {folder} was made with {was}, and would not be continued by this; leave {flag} out, or "
                           "start a new run")
        if given[name] != was:
            say(f"resume: {flag} {given[name]} (was {was})")
    return old


def resumed_state(resume, folder, say):
    """The state to go on from -> what save_state was given."""
    if Path(resume).is_file():
        return load_state(resume)
    state, path = newest_state(folder / "state", say)
    say(f"resume: from {path}")
    return state


class Stop:
    """Ctrl-C and SIGTERM ask for a stop after the step that is under way (`asked`); a second one stops at once."""

    def __init__(self, say):
        self.say, self.asked = say, False

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.say(f"{signal.Signals(number).name}: stopping after this step; once more stops at once")

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
