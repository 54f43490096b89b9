"""States of runs and checkpoints of models: files that are whole or not there, and run no code.

    out/<run>/state/step-0000120.pt      # all that a run needs to go on exactly where it was
    out/<run>/checkpoint.pt              # its model

A process can be killed at any moment, also while it writes. So a file is written under a temporary
name, forced to the disk, and then renamed in one move. Its last 16 bytes are the checksum of the
rest: a file that was cut short or has a flipped bit is refused by name, and `newest_state` uses the
one before it. Files hold tensors and plain values only (torch.load with weights_only).

Resuming bit-exactly needs little: weights, moments and counts. Data order and random numbers are
functions of (seed, step, row, position), so no generator's state decides what comes next.
"""

import dataclasses
import fcntl
import hashlib
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import torch

from model import GPT, ModelConfig
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
NAME = re.compile(r"step-(\d{7})\.pt")


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


# ---- files ---------------------------------------------------------------------------------------

CHECKSUM = 16  # hex digits at the end of a file


def write_file(path, content):
    """Writes tensors and plain values, and behind them their checksum. The file gets its name when
    it is whole and on the disk; OSError if it cannot be written, and the old file is intact."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            file.write(checksum(temporary).encode())  # torch.load ignores what follows its data
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
        raise OSError(
            f"{path} could not be written ({str(error).splitlines()[0]}); what was there before "
            "is intact"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def read_file(path, checked=False):
    """-> what `write_file` was given, on the CPU, tensors read when they are used. ValueError with
    the reason for a damaged file or one of another kind. checked: its checksum is known to fit."""
    if not checked:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - CHECKSUM))
            if file.read() != checksum(path, but=CHECKSUM).encode():
                raise ValueError("it does not end with its checksum")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch.load raises many types for many kinds of files
        raise ValueError(f"it cannot be read: {type(error).__name__}") from error


def checksum(path, but=0):
    """16 hex digits of the SHA-256 of a file's content, without its last `but` bytes."""
    digest, left = hashlib.sha256(), os.path.getsize(path) - but
    with open(path, "rb") as file:
        while piece := file.read(max(0, min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()[:CHECKSUM]


def sync_folder(folder):
    """Forces a rename to the disk: until then a power cut may undo it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- states --------------------------------------------------------------------------------------


def saved(folder):
    """-> [(step, path)] of the states in a folder, the newest first."""
    matches = ((NAME.fullmatch(path.name), path) for path in Path(folder).glob("step-*.pt"))
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def save_state(folder, step, state, keep=2):
    """Writes a state (tensors and plain values) as step `step`, then removes all but the last
    `keep` and the best -> its path.

    state["best"]: the step of the best state so far. OSError if it cannot be written; the states
    before it are intact.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.tmp"):  # of a process that was killed while it wrote
        leftover.unlink()
    path = folder / f"step-{step:07d}.pt"
    write_file(path, state)
    for other, old in saved(folder)[keep:]:
        if other != state.get("best"):
            old.unlink()
    return path


def load_state(path, known=False):
    """-> the state in one file. BadInput for a file that is damaged or no state. known: rank 0 has
    checked it."""
    try:
        return read_file(path, checked=known)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is damaged, or no state of a run ({error})") from None


def newest_state(folder, say):
    """-> (state, path) of the newest whole state in a folder; damaged ones are named and passed
    over. BadInput when there is none."""
    for _, path in saved(folder):
        try:
            return load_state(path), path
        except BadInput as error:
            say(f"{error}; the one before it is used")
    raise BadInput(f"{folder} holds no state to resume from: a run writes one with its first step")


def check_moments(moments, shape, updates):
    """ValueError unless {name of a parameter: its moments} are those of AdamW after so many updates
    of a GPT of this shape."""
    with torch.device("meta"):  # a model without memory
        parameters = dict(GPT(shape).named_parameters()) if updates else {}
    if moments.keys() != parameters.keys():
        raise ValueError(
            f"after {updates} updates it holds the moments of {len(moments)} parameters, of "
            f"{len(parameters)}"
        )
    for name, like in parameters.items():
        found, shapes = moments[name], dict(step=(), exp_avg=like.shape, exp_avg_sq=like.shape)
        fits = isinstance(found, dict) and found.keys() == shapes.keys()
        for kind, shape in shapes.items() if fits else ():
            x = found[kind]
            fits &= isinstance(x, torch.Tensor) and x.dtype == torch.float32 and x.shape == shape
            fits = fits and bool(x.isfinite().all())
        if not fits or found["step"] != updates or found["exp_avg_sq"].amin() < 0:
            raise ValueError(f"the moments of {name} are not those after {updates} updates")


# ---- checkpoints ---------------------------------------------------------------------------------


def save_checkpoint(path, model, weights=None, **extra):
    """Writes a model's shape, its weights (None: as they are in the model) and `extra` (plain
    values) to `path`. OSError if that cannot be; the old file is intact."""
    weights = weights or model.state_dict()
    shape = dataclasses.asdict(model.config)
    write_file(path, dict(model_config=shape, weights=weights, extra=extra))


def load_checkpoint(path, compute=torch.float32, device="cpu"):
    """-> model, extra. FileNotFoundError, or ValueError that names the file and why it is not a
    checkpoint of this project."""
    try:
        found = read_file(path)
        if not isinstance(found, dict) or not all(
            isinstance(found.get(name), dict) for name in ("model_config", "weights", "extra")
        ):
            raise ValueError("it does not hold model_config, weights and extra")
        if found["model_config"].keys() != {
            field.name for field in dataclasses.fields(ModelConfig)
        }:
            raise ValueError("its model_config has other fields than a model's")
        config = ModelConfig(**found["model_config"])
        check_weights(found["weights"], config)
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # a config that fits no model fails in many ways
        reason = (
            str(error).splitlines()[0] if isinstance(error, ValueError) else type(error).__name__
        )
        raise ValueError(
            f"{path} is not a checkpoint of this project, or is damaged ({reason})"
        ) from error
    model = GPT(config, compute)
    model.load_state_dict(found["weights"])
    return model.to(device), found["extra"]


def check_weights(weights, config):
    """ValueError unless {name: tensor} are the weights of a GPT of this shape: every name, shape
    and type, and finite numbers."""
    with torch.device("meta"):  # a model without memory
        expected = GPT(config).state_dict()
    if weights.keys() != expected.keys():
        name = min(map(str, weights.keys() ^ expected.keys()))
        raise ValueError(f"the weight {name} is there and should not be, or is missing")
    for name, like in expected.items():
        x = weights[name]
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} is {type(x).__name__}, not a tensor")
        if x.dtype != like.dtype or x.shape != like.shape:
            ours, theirs = f"{like.dtype} {tuple(like.shape)}", f"{x.dtype} {tuple(x.shape)}"
            raise ValueError(f"{name} is {theirs}, not {ours}")
        if not x.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")
    if config.tied and not torch.equal(weights["head.weight"], weights["embed.weight"]):
        raise ValueError("head.weight differs from embed.weight, with which it is tied")


def weights_checksum(model):
    """16 hex digits of a model's weights, wherever they were read from."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().flatten().numpy())
    return digest.hexdigest()[:CHECKSUM]


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


def go_on(state, folder, policy, optimizer):
    """Puts the rest of a saved state where it belongs -> Progress. The log is cut to it."""
    distributed.load_full_state(policy, optimizer, state["weights"], state["optimizer"])
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
