"""Flags from a frozen dataclass: a field is a flag, its comment is its help, and bad input gets one
sentence.

    python train.py --help              # what this file prints for train.py's Config

The idea. A script's settings are one dataclass, read top to bottom:

    attempts: int = 4       # G, answers sampled per question

From that line come the flag `--attempts`, its type, its default and its line of help; nothing is
said twice, so nothing can disagree. A bool is a flag without a value, there or not; a Maybe has one
or not. A flag that does not exist is answered with the nearest one that does.

However a script ends early, `last_words` makes one sentence of the exception, and the exit code
tells them apart: 2 for bad input and for disks that are full or cannot be written, 70 for a fault
of this code, 130 for Ctrl-C. --debug prints the traceback besides.
"""

import contextlib
import dataclasses
import difflib
import errno
import inspect
import json
import math
import os
import re
import select
import signal
import sys
import tempfile
import textwrap
import traceback
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]  # of the project


class Maybe(str):
    """The type of a flag that may stand without a value: it is "newest" then."""


class BadInput(Exception):
    """Something the user gave cannot be used. The message names the thing and the remedy; `guarded`
    prints it."""


OWN_FLAGS = "Flags (--name value or --name=value; --debug shows the traceback of an error besides its sentence):"


def comments(config):
    """-> {field: its comment}, read from the source of the dataclass and of those it inherits from.

    The comment of a field stands behind it, or in whole lines above it.
    """
    found = {}
    for cls in reversed(config.__mro__[:-1]):
        above = []
        for line in inspect.getsource(cls).splitlines():
            field = re.match(r"    (\w+): [^#]*?(?:  # (.+))?$", line)
            if field:
                found[field[1]] = " ".join([*above, *filter(None, [field[2]])])
            whole_line = re.match(r"    # (.+)$", line)
            above = [*above, whole_line[1]] if whole_line else []
    return found


def help_text(config, doc):
    """The script's docstring, then its own flags, then those it takes over from another script's
    config, under that script's name."""
    lines, fields = [doc.strip()], {field.name: field for field in dataclasses.fields(config)}
    for cls in config.__mro__[:-1]:
        here = cls.__module__ == config.__module__
        lines += ["", OWN_FLAGS if here else f"Flags of {cls.__module__}.py, taken here too:", ""]
        lines += [
            line
            for name in inspect.get_annotations(cls)
            for line in help_lines(config, fields[name])
        ]
    return "\n".join(lines)


def help_lines(config, field):
    """A line or two for a flag: name, values, meaning, default."""
    kind, note = get_type_hints(config)[field.name], comments(config).get(field.name, "")
    kind = (
        "|".join(get_args(kind))
        if get_origin(kind) is Literal
        else {bool: "", Maybe: "[str]"}.get(kind, kind.__name__)
    )
    note = f"{note} [{field.default!r}]" if field.default not in ("", False) else note
    head = f"  --{field.name.replace('_', '-')} {kind}"
    body = textwrap.wrap(note, 84, initial_indent=" " * 36, subsequent_indent=" " * 36)
    return [head.ljust(36) + body[0].strip(), *body[1:]] if len(head) < 36 else [head, *body]


def convert(name, text, kind):
    """`text` as the field's type. BadInput names the flag, the value and what is accepted."""
    accepted = {int: "a whole number", float: "a number"}
    if get_origin(kind) is Literal:
        if text in get_args(kind):
            return text
        near = difflib.get_close_matches(text, get_args(kind), 1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise BadInput(f"--{name} {text!r}: choose one of {', '.join(get_args(kind))}{guess}")
    try:
        value = kind(text)
        # every comparison with it is false, so no range would refuse it
        if kind is float and math.isnan(value):
            raise ValueError
    except ValueError:
        raise BadInput(f"--{name} {text!r} is not {accepted[kind]}") from None
    # more fits no tensor's size, and no float that it is divided by
    if kind is int and abs(value) >= 1 << 53:
        raise BadInput(f"--{name} {text}: whole numbers here have at most 15 digits")
    return value


def parse(config, argv, refused=()):
    """-> {field: value} of the flags in argv. BadInput for an unknown flag, a flag without a value,
    a stray word, or a flag that other scripts have and this one `refused`: {name: reason}."""
    hints, given, words = get_type_hints(config), {}, list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if name in refused:
            raise BadInput(f"{flag} is not for this script: {refused[name]}")
        if not word.startswith("--") or name not in hints:
            near = difflib.get_close_matches(name, hints, 1, 0.5)
            guess = (
                f"did you mean --{near[0].replace('_', '-')}?" if near else "--help lists the flags"
            )
            raise BadInput(
                f"unknown {'flag' if word.startswith('-') else 'argument'} {flag!r}: {guess}"
            )
        if hints[name] is bool:
            if equals:
                raise BadInput(f"{flag} takes no value: it is given or not")
            given[name] = True
            continue
        if hints[name] is Maybe and not equals and (not words or words[0].startswith("--")):
            given[name] = Maybe("newest")
            continue
        if not equals and not words:
            raise BadInput(f"{flag} needs a value")
        value = value if equals else words.pop(0)
        given[name] = convert(flag.removeprefix("--"), value, hints[name])
    return given


def parse_flags(config, doc, presets=None, argv=None, refused=()):
    """The settings of a script: dataclass defaults, then the preset's, then the flags of the
    command line.

    presets(given) -> {field: value} may look at what was given (to pick a preset) and returns what
    to put under it. Prints help and exits 0 for --help.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        # here, where `guarded` sees a reader that has left
        print(help_text(config, doc), flush=True)
        sys.exit(0)
    given = parse(config, argv, refused)
    return config(**{**(presets(given) if presets else {}), **given})


def read_json(path, hint):
    """The dict that a JSON file holds. BadInput when it is not there (`hint` says what was
    expected), is not JSON, or holds no dict."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: there is no such file; {hint}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadInput(
            f"{path} is damaged, or not what it should be: it holds a {type(found).__name__}, not "
            "fields with names"
        )
    return found


def is_a(value, kind):
    """Whether a value from a file has a field's type. A whole number does for a float; True is no
    number, and NaN is none either."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return type(value) in (int, float) and abs(value) < math.inf
    return isinstance(value, str if kind is Maybe else kind) and (
        kind is bool or not isinstance(value, bool)
    )


def check_fields(values, kinds, where):
    """BadInput, which begins with `where`, unless `values` is a dict with every field of `kinds`,
    {name: type}."""
    wanted = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        Maybe: "a text",
    }
    if not isinstance(values, dict):
        raise BadInput(f"{where} is a {type(values).__name__}, and should hold fields with names")
    for name, kind in kinds.items():
        if name not in values:
            raise BadInput(f"{where} has no field {name!r}")
        if not is_a(values[name], kind):
            one = (
                f"one of {', '.join(get_args(kind))}"
                if get_origin(kind) is Literal
                else wanted.get(kind) or f"a {kind.__name__}"
            )
            raise BadInput(f"{where}: {name} = {values[name]!r:.60} is not {one}")


def make_folder(path):
    """Makes a folder and those above it, unless they exist -> its Path. BadInput when that cannot
    be, or no file can be written there."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        # asking for permissions instead would miss read-only and full disks
        tempfile.TemporaryFile(dir=path).close()
        return Path(path)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or error
        raise BadInput(
            f"{path} cannot be made or written to ({reason}): name a folder that can be, or free "
            "some space"
        ) from None


@contextlib.contextmanager
def reading(path):
    """Around the reading of a file that may be damaged or of another kind: what is missing or
    misplaced in it becomes BadInput."""
    try:
        yield
    except (
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:
        raise BadInput(
            f"{path} is damaged, or not what it should be ({type(error).__name__}: {error})"
        ) from None


@contextlib.contextmanager
def writing(path, kept="what was there before is whole"):
    """Around the writing of a file: names it when the disk is full or cannot be written (Python
    does not), and says what was `kept`."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror or error}); {kept}") from None


def file_name(flag, name):
    """A name for files of a script, as it was given. BadInput for one that would lead out of their
    folder, or that cannot be shown."""
    if (
        "/" in name
        or "\\" in name
        or name.startswith(".")
        or len(name.encode(errors="replace")) > 200
        or not name.isprintable()
    ):
        raise BadInput(
            f"--{flag} {name!r} is to name a file or folder, and not a way to one: no slashes or "
            "control characters, no dot in "
            "front, at most 200 bytes"
        )
    return name


# ---- last words ----------------------------------------------------------------------------------

# What moves a cursor, rings, starts an escape sequence or turns the direction of writing, but for
# newline and tab.
CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# what writing fails with when a disk is full, or not well
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def inert(text):
    """Text of others for a terminal: control characters as Python writes them (\\x1b), so that they
    do nothing; newline and tab stay."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def processes():
    """How many of them torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def last_words(error):
    """What ended a script -> (a sentence for stderr, exit code). Nothing is said of a reader that
    has left, as in `| head`."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, BrokenPipeError) and reader_has_left():
        return "", 141  # as a program that SIGPIPE ends
    if isinstance(error, BadInput):
        return f"error: {error}", 2
    if isinstance(error, OSError) and error.filename is not None:
        return f"error: {error.filename}: {error.strerror}", 2
    if isinstance(error, OSError) and (error.errno in DISK or error.errno is None):
        return f"error: {error}", 2
    if (
        isinstance(error, ModuleNotFoundError)
        and not any(ROOT.glob(f"**/{str(error.name).rpartition('.')[2]}.py"))
    ):
        return f"error: the package {error.name} is missing: pip install -r requirements.txt", 2
    if ran_out(error):
        return (
            f"error: out of memory ({str(error).split('.')[0]}); lower the sizes that were asked "
            "for",
            2,
        )
    return (
        f"error: {type(error).__name__}: {error} ({place(error)}): a fault of this code, not of "
        f"your input; {evidence(error)}",
        70,
    )


def ran_out(error):
    """Whether an exception means that memory ran out. That of CUDA, of a CPU's allocator and of
    pinned memory tell it by their message."""
    return (
        isinstance(error, MemoryError)
        or re.search("out of memory|can't allocate memory", str(error), re.I) is not None
    )


def reader_has_left():
    """Whether stdout is what a BrokenPipeError came from; the pipe of another process may be too,
    and that is a fault. If so nothing more goes there, or Python would complain of the same at its
    end."""
    try:
        asked = select.poll()
        asked.register(sys.stdout.fileno(), 0)
        if not any(found & select.POLLERR for _, found in asked.poll(0)):
            return False
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    except (OSError, ValueError):  # no pipe at all
        return False


def place(error):
    """ "train.py:231", the innermost line of this project that an exception came through."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(ROOT)
    ]
    if not frames:
        return "outside of it"
    return f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}"


def evidence(error):
    """Keeps the traceback in a file, since a run of hours is not made again for --debug -> where to
    find it."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="nano-mgrpo-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.writelines(traceback.format_exception(error))
        return f"its traceback is in {file.name}"
    except OSError:
        return "--debug prints its traceback"


def at_the_end(error, debug, first=None, lost=lambda error: ""):
    """Says why a script ends early -> its exit code. first, lost: as in `guarded`."""
    said, code = (lost(error), 1) if lost(error) else last_words(error)
    if said and (first is None or first()):
        if debug:
            print("".join(traceback.format_exception(error)), end="", file=sys.stderr)
        print(inert(" ".join(said.split("\n"))), file=sys.stderr, flush=True)
    return code


def guarded(main, first=None, lost=lambda error: ""):
    """Runs a script's main; whatever goes wrong is one sentence and an exit code (`last_words`).

    Of several processes (parallel.run): first() tells whether this one is to say it, and
    lost(error) is the sentence for an error whose cause lies in another process, which exits with
    1.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - to the end of the process
    if signal.getsignal(signal.SIGINT) is stop_at_once:  # the imports are over
        signal.signal(signal.SIGINT, signal.default_int_handler)
    debug, sys.argv[1:] = (
        "--debug" in sys.argv,
        [word for word in sys.argv[1:] if word != "--debug"],
    )
    try:
        if first is None and processes() > 1:
            raise BadInput(
                "this script runs in one process, without torchrun, which is for train.py and "
                "eval.py"
            )
        main()
        sys.stdout.flush()  # here, where a reader that has left is no traceback
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(at_the_end(error, debug, first, lost))


def stop_at_once(number, frame):
    """Ctrl-C while a script imports: a KeyboardInterrupt there may end in the middle of torch's
    C++, which aborts."""
    os.write(2, b"interrupted\n")
    os._exit(130)


def while_importing(kind, error, trace):
    """sys.excepthook of our scripts, whose imports stand outside of `guarded`: a missing package is
    a sentence there too."""
    code = at_the_end(error, "--debug" in sys.argv)
    os._exit(code)  # threads of torch, half imported, may abort when Python ends under them


def is_ours(module):
    """Whether a module is a script of this project: a file of its root or of one of its rooms."""
    path = Path(getattr(module, "__file__", None) or "/").resolve()
    return ROOT in (path.parent, path.parent.parent)


# not where somebody imports this at a prompt
if is_ours(sys.modules["__main__"]) and not sys.flags.interactive:
    sys.excepthook = while_importing
    # not where a shell has Ctrl-C ignored, as behind `nohup`
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop_at_once)
