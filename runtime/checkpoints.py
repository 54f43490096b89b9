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
import hashlib
import os
import re
from pathlib import Path

import torch

from model import GPT, ModelConfig
from runtime.flags import BadInput

NAME = re.compile(r"step-(\d{7})\.pt")


# ---- files ---------------------------------------------------------------------------------------

CHECKSUM = 16  # hex digits at the end of a file


def write_file(path, content):
    """Writes tensors and plain values, and behind them their checksum. The file gets its name when
    it is whole and on the disk; OSError if it cannot be written, and the old file is intact."""
    path = Path(path)
    # In the same folder, since a rename is one move within a file system only. The number of the
    # process keeps two of them apart.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            file.write(checksum(temporary).encode())  # torch.load ignores what follows its data
            file.flush()
            # Before the rename: a power cut could otherwise leave the new name on half of a file.
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
            # The checksum comes last, so a file that was cut short fails here too.
            file.seek(max(0, os.path.getsize(path) - CHECKSUM))
            if file.read() != checksum(path, but=CHECKSUM).encode():
                raise ValueError("it does not end with its checksum")
    try:
        # weights_only: a pickle could run code. mmap: tensors are read when they are used.
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
    # After the new state is whole: at any moment there is one to resume from.
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
        # exp_avg_sq is a mean of squares: a negative number there is damage.
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
    # Now the weights are known to fit, so a damaged shape has not taken any memory.
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
