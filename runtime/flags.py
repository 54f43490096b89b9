"""The flags of a script, from a frozen dataclass; and one sentence for everything that ends it.

    python train.py --help              # what this file prints for train.py's Config

The settings of a script are one dataclass:

    prompts: Annotated[int, AtLeast(1)] = 32       # P, questions per step

That line gives the flag `--prompts`, its type, its range, its default and its line of help. A field
whose type is another dataclass is a group: its fields are flags too, under a heading of their own.

`last_words` turns the exception that ends a script into a sentence and an exit code: 2 for bad
input and for a disk that is full or read-only, 70 for a bug, 130 for Ctrl-C. --debug prints the
traceback as well.
"""

import ast
import contextlib
import dataclasses
import difflib
import errno
import functools
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
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]  # of the repository


class BadInput(Exception):
    """Bad input of the user. The message names the thing and the remedy; `guarded` prints it."""


# ---- what a field can be -------------------------------------------------------------------------


class Maybe(str):
    """Type of a flag whose value is optional: without one it is "newest"."""


class Range(NamedTuple):
    """What a number must satisfy, as a function and in words."""

    holds: Any  # value -> bool
    words: str  # "of at least 1"


# For an end that is open: Annotated[float, Above(0), AtMost(1)].
def AtLeast(limit):
    return Range(lambda value: value >= limit, f"of at least {limit:,}")


def AtMost(limit):
    return Range(lambda value: value <= limit, f"of at most {limit:,}")


def Above(limit):
    return Range(lambda value: value > limit, f"above {limit:,}")


def Below(limit):
    return Range(lambda value: value < limit, f"below {limit:,}")


def Between(low, high):
    return Range(lambda value: low <= value <= high, f"from {low:,} to {high:,}")


class Flag(NamedTuple):
    kind: Any  # int, float, str, bool, Maybe, Literal[...] or tuple[int | float | str, ...]
    ranges: tuple  # what its number, or each number of its tuple, must satisfy: (AtLeast(1), ...)
    default: Any
    note: str  # the comment of the field
    group: str  # field of the config whose dataclass holds it; "" for the config's own fields


@functools.cache
def flags_of(config):
    """-> {name of a flag: Flag} of a dataclass and its groups, its own fields first.

    A group's defaults are those of the instance that stands in the field, so a script can choose
    others: `hardware: Hardware = Hardware(recompute="yes")`.
    """
    hints, own, grouped = get_type_hints(config, include_extras=True), {}, {}
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        # A group: its fields are flags, with the defaults of the instance in this field.
        if dataclasses.is_dataclass(kind):
            for name, flag in flags_of(kind).items():
                # two groups with the same field could not be told apart on the command line
                assert name not in hints and name not in grouped, f"--{name} is in two dataclasses"
                default = getattr(default_of(field), name)
                grouped[name] = flag._replace(default=default, group=field.name)
        else:
            # Annotated[int, AtLeast(1)] -> int, [AtLeast(1)].
            kind, *ranges = (kind.__origin__, *kind.__metadata__) if is_annotated(kind) else (kind,)
            note = comments(config).get(field.name, "")
            own[field.name] = Flag(kind, tuple(ranges), default_of(field), note, "")
    return own | grouped


def default_of(field):
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default


def is_annotated(kind):
    return get_origin(kind) is Annotated


def comments(config):
    """-> {field: its comment}, read from the source of a dataclass and of those it inherits from.

    The comment of a field stands behind it, or in whole lines directly above it.
    """
    notes = {}
    for cls in reversed(config.__mro__[:-1]):
        source = textwrap.dedent(inspect.getsource(cls))
        lines = source.splitlines()
        for field in ast.parse(source).body[0].body:
            if isinstance(field, ast.AnnAssign):
                # Off by one: lineno counts from 1, so lines[first] is the field itself, and the
                # line above is lines[first - 1]. `first` moves up over whole lines of comment.
                first = field.lineno - 1
                while lines[first - 1].startswith("    # "):
                    first -= 1
                above = [line.strip(" #") for line in lines[first : field.lineno - 1]]
                # a declaration may take several lines, and its comment stands behind the last
                behind = re.search(r"  # (.+)$", lines[field.end_lineno - 1])
                notes[field.target.id] = " ".join(above + ([behind[1]] if behind else []))
    return notes


def kinds(config):
    """-> {name of a flag: its type with its ranges}: what `check_fields` checks a file against."""
    return {
        name: Annotated[(flag.kind, *flag.ranges)] if flag.ranges else flag.kind
        for name, flag in flags_of(config).items()
    }


def flat(config):
    """-> {name of a flag: value} of a config and its groups: what config.json holds."""
    return {
        name: getattr(getattr(config, flag.group) if flag.group else config, name)
        for name, flag in flags_of(type(config)).items()
    }


def unflat(config, values):
    """-> a `config` with these {name of a flag: value}, and defaults for the rest.

    Lists, as JSON has them, become tuples. BadInput for a value of the wrong type or out of its
    range, TypeError for a name that is no flag.
    """
    flags = flags_of(config)
    if unknown := values.keys() - flags.keys():
        raise TypeError(
            f"{config.__module__}.{config.__name__} has no {', '.join(sorted(unknown))}"
        )
    # Values go to the config itself or to the group that has the field.
    own, groups = {}, {}
    for name, flag in flags.items():
        value = values.get(name, flag.default)
        if name in values:
            if why := unfit(value, flag.kind, flag.ranges):
                raise BadInput(f"{flag_name(name)} {shown(value)}: {why}")
            value = tuple(value) if isinstance(value, list) else value
        (groups.setdefault(flag.group, {}) if flag.group else own)[name] = value
    hints = get_type_hints(config)
    return config(**own, **{group: hints[group](**fields) for group, fields in groups.items()})


# ---- the command line ----------------------------------------------------------------------------

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
# a larger number fits no size of a tensor, and no float that it is divided by
LARGEST = (1 << 53) - 1


def flag_name(field):
    return f"--{field.replace('_', '-')}"


def shown(value):
    """A value as it is given on the command line."""
    words = [str(one) for one in (value if isinstance(value, (tuple, list)) else [value])]
    return ",".join(word.removesuffix(".0") for word in words)


def element(kind):
    """The X of tuple[X, ...]; None for other types."""
    return get_args(kind)[0] if get_origin(kind) is tuple else None


def wanted(kind):
    """A type in words: "a whole number"."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if element(kind):
        return {int: "whole numbers", float: "numbers", str: "texts"}[element(kind)]
    return WORDS.get(str if kind is Maybe else kind) or f"a {kind.__name__}"


def is_a(value, kind):
    """Whether a value, of a flag or from a file, has a field's type. A whole number is a float too.
    True is not a number, and neither are NaN and infinity."""
    if is_annotated(kind):
        kind = kind.__origin__
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if element(kind):  # JSON has lists
        return isinstance(value, (tuple, list)) and all(is_a(x, element(kind)) for x in value)
    # NaN is not below infinity either.
    if kind is float:
        return type(value) in (int, float) and abs(value) < math.inf
    kind = str if kind is Maybe else kind
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def unfit(value, kind, ranges=()):
    """-> why a value cannot be that of a field, or ""."""
    if not is_a(value, kind):
        return f"must be {wanted(kind)}{', and finite' if float in (kind, element(kind)) else ''}"
    numbers = value if element(kind) else [value]
    if element(kind) in (int, float) and not numbers:
        return "needs at least one number"
    if all(range.holds(number) for range in ranges for number in numbers):
        return ""
    must = "each must be" if element(kind) else "must be"
    return f"{must} a number {' and '.join(range.words for range in ranges)}"


def convert(name, text, kind):
    """`text` as the field's type. BadInput names the flag, the value and what is accepted."""
    if get_origin(kind) is Literal:
        if text in get_args(kind):
            return text
        # A close spelling helps more than the list alone.
        near = difflib.get_close_matches(text, get_args(kind), 1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise BadInput(f"--{name} {text!r}: choose one of {', '.join(get_args(kind))}{guess}")
    if element(kind):
        parts = [part.strip() for part in text.split(",")]
        return tuple(convert(name, part, element(kind)) for part in parts if part)
    try:
        value = kind(text)
        if kind is float and math.isnan(value):  # every comparison with NaN is false
            raise ValueError
    except ValueError:
        raise BadInput(f"--{name} {text!r} is not {WORDS[kind]}") from None
    if kind is int and abs(value) > LARGEST:
        raise BadInput(f"--{name} {text}: whole numbers here have at most 15 digits")
    return value


def parse(config, argv, refused=(), renamed=(), first_word=""):
    """-> {field: value} of the flags in argv, those of groups too.

    BadInput for an unknown flag, a flag without a value, a stray word, a flag of other scripts that
    this one `refused` ({name: reason}), and an old flag, `renamed` ({name: sentence with its
    successor}). first_word: the field that a word in front of all flags stands for.
    """
    flags, given, words = flags_of(config), {}, list(argv)
    if first_word and words and not words[0].startswith("-"):
        words[0] = f"--{first_word}={words[0]}"
    while words:
        # --name value, or --name=value.
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        # Flags with an answer of their own come before the general one.
        if name in refused:
            raise BadInput(f"{flag} is not for this script: {refused[name]}")
        if name in renamed and word.startswith("--"):
            raise BadInput(f"{flag} is not a flag any more: {renamed[name]}")
        if not word.startswith("--") or name not in flags:
            near = difflib.get_close_matches(name, [*flags, *renamed], 1, 0.5)
            guess = f"did you mean {flag_name(near[0])}?" if near else "--help lists the flags"
            if near and near[0] in renamed:
                guess += f" It is not a flag any more: {renamed[near[0]]}"
            what = "flag" if word.startswith("-") else "argument"
            raise BadInput(f"unknown {what} {flag!r}: {guess}")
        kind = flags[name].kind
        if kind is bool:
            if equals:
                raise BadInput(f"{flag} takes no value: it is given or not")
            given[name] = True
            continue
        # --resume alone: another flag follows, or nothing.
        if kind is Maybe and not equals and (not words or words[0].startswith("--")):
            given[name] = Maybe("newest")
            continue
        if not equals and not words:
            raise BadInput(f"{flag} needs a value")
        value = value if equals else words.pop(0)
        given[name] = convert(flag.removeprefix("--"), value, kind)
    return given


def parse_flags(config, doc, presets=None, argv=None, refused=(), renamed=(), first_word=""):
    """The settings of a script -> an instance of the dataclass `config`: its defaults, then the
    preset's values, then the flags of the command line. All are checked against types and ranges.

    presets(given) -> {name of a flag: value} may depend on what was given (to pick a preset).
    Prints help and exits with 0 for --help. refused, renamed, first_word: as in `parse`.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        # flushed here, where `guarded` handles a reader that has left
        print(help_text(config, doc), flush=True)
        sys.exit(0)
    given = parse(config, argv, refused, renamed, first_word)
    # The command line wins over the preset, the preset over the defaults.
    return unflat(config, {**(presets(given) if presets else {}), **given})


# ---- help ----------------------------------------------------------------------------------------

OWN_FLAGS = "Flags (--name value or --name=value; --debug prints the traceback of an error):"
COLUMN, WIDTH = 32, 100  # where the meaning of a flag begins, and where its lines end


def help_text(config, doc):
    """The script's docstring, its own flags, then a block for each group under the first line of
    the group's docstring."""
    hints, lines, group = get_type_hints(config), [doc.strip(), "", OWN_FLAGS, ""], ""
    for name, flag in flags_of(config).items():
        if flag.group != group:
            group = flag.group
            lines += ["", hints[group].__doc__.strip().splitlines()[0].rstrip(".") + ":", ""]
        lines += help_lines(name, flag)
    return "\n".join(lines)


def help_lines(name, flag):
    """A line or more for a flag: name, values, meaning, default."""
    kind, note = flag.kind, flag.note
    if get_origin(kind) is Literal:
        values = "|".join(get_args(kind))
    elif element(kind):
        values = f"{element(kind).__name__},..."
    else:
        values = {bool: "", Maybe: "[str]"}.get(kind, kind.__name__)
    # Defaults in brackets; an empty one would say nothing.
    if flag.default not in ("", False, ()) or kind in (int, float):
        default = shown(flag.default)
        note += f" [{default}]" if kind in (int, float) or element(kind) else f" [{default!r}]"
    margin = " " * COLUMN
    head = f"  {flag_name(name)} {values}"
    body = textwrap.wrap(note, WIDTH, initial_indent=margin, subsequent_indent=margin) or [""]
    return (
        [head.ljust(COLUMN) + body[0].strip(), *body[1:]] if len(head) < COLUMN else [head, *body]
    )


# ---- files ---------------------------------------------------------------------------------------


def read_json(path, hint):
    """-> the dict in a JSON file. BadInput if the file is missing (`hint`: what it should be), not
    JSON, or no dict."""
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


def check_fields(values, kinds, where):
    """BadInput, which begins with `where`, unless `values` is a dict with every field of `kinds`,
    {name: type}; a type may carry ranges (`kinds` of a config)."""
    if not isinstance(values, dict):
        raise BadInput(f"{where} is a {type(values).__name__}, and should hold fields with names")
    for name, kind in kinds.items():
        if name not in values:
            raise BadInput(f"{where} has no field {name!r}")
        value, ranges = values[name], getattr(kind, "__metadata__", ())
        kind = kind.__origin__ if is_annotated(kind) else kind
        if not is_a(value, kind):
            raise BadInput(f"{where}: {name} = {value!r:.60} is not {wanted(kind)}")
        if why := unfit(value, kind, ranges):
            raise BadInput(f"{where}: {name} = {shown(value)} {why}")


def make_folder(path):
    """Makes a folder and its parents, unless they exist -> its Path. BadInput if that fails, or if
    no file can be written there."""
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
    """Context in which a file's content is used: a missing or misplaced value becomes BadInput."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as e:
        raise BadInput(
            f"{path} is damaged, or not what it should be ({type(e).__name__}: {e})"
        ) from None


@contextlib.contextmanager
def writing(path, kept="what was there before is whole"):
    """Context in which a file is written: if the disk is full or read-only, the OSError names the
    file (that of Python does not) and what was `kept`."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror or error}); {kept}") from None


def file_name(flag, name):
    """-> `name`, the value of a flag that names a file or folder. BadInput if it is a path, hidden,
    too long, or cannot be printed."""
    if (
        "/" in name
        or "\\" in name
        or name.startswith(".")
        or len(name.encode(errors="replace")) > 200
        or not name.isprintable()
    ):
        raise BadInput(
            f"--{flag} {name!r} must be the name of a file or folder, not a path: no slashes or "
            "control characters, no dot in front, at most 200 bytes"
        )
    return name


# ---- last words ----------------------------------------------------------------------------------

# characters that move the cursor, ring, start an escape sequence or change the direction of
# writing, except newline and tab
CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# errors of a disk that is full, read-only or broken
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def inert(text):
    """-> untrusted text, safe to print: control characters are escaped (\\x1b), except newline and
    tab."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def processes():
    """How many processes torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def last_words(error):
    """The exception that ended a script -> (sentence for stderr, exit code). The sentence is empty
    if the reader of stdout has closed the pipe, as `| head` does."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, BrokenPipeError) and reader_has_left():
        return "", 141  # as a program that SIGPIPE ends
    # Causes outside of this code, which the user can remove: exit code 2.
    if isinstance(error, BadInput):
        return f"error: {error}", 2
    if isinstance(error, OSError) and error.filename is not None:
        return f"error: {error.filename}: {error.strerror}", 2
    if isinstance(error, OSError) and (error.errno in DISK or error.errno is None):
        return f"error: {error}", 2
    # A missing file of this repository is a bug; a missing package is not.
    if isinstance(error, ModuleNotFoundError) and not any(
        ROOT.glob(f"**/{str(error.name).rpartition('.')[2]}.py")
    ):
        return f"error: the package {error.name} is missing: pip install -r requirements.txt", 2
    if ran_out(error):
        reason = str(error).split(".")[0]
        return f"error: out of memory ({reason}); lower the sizes that were asked for", 2
    # Everything else is a bug, and its traceback is kept.
    what = f"{type(error).__name__}: {error} ({place(error)})"
    return f"error: {what}: a fault of this code, not of your input; {evidence(error)}", 70


def ran_out(error):
    """Whether an exception means that memory ran out. CUDA and the CPU's allocator raise
    RuntimeError, with a message of their own."""
    message = re.search("out of memory|can't allocate memory", str(error), re.I)
    return isinstance(error, MemoryError) or message is not None


def reader_has_left():
    """Whether the reader of stdout has closed the pipe. (A BrokenPipeError of a pipe to a worker
    process is a bug.) If so, stdout goes to /dev/null from here on: Python flushes it at its end,
    and would complain."""
    try:
        # A pipe without a reader reports POLLERR, whatever events are asked for: hence 0.
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not any(event & select.POLLERR for _, event in poll.poll(0)):
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
    """Writes the traceback to a file, since a run of hours is not repeated for --debug -> where it
    is."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="nano-mgrpo-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.writelines(traceback.format_exception(error))
        return f"its traceback is in {file.name}"
    except OSError:
        return "--debug prints its traceback"


def at_the_end(error, debug, first=None):
    """Prints why a script ends early, unless another process has (`first`) -> its exit code."""
    sentence, code = last_words(error)
    if sentence and (first is None or first()):
        if debug:
            print("".join(traceback.format_exception(error)), end="", file=sys.stderr)
        print(inert(" ".join(sentence.split("\n"))), file=sys.stderr, flush=True)
    return code


def guarded(main, first=None):
    """Runs a script's main. An exception becomes a sentence and an exit code (`last_words`).

    first: of several processes (distributed.run), a function that tells whether this process is the
    first to fail; the others print nothing.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - to the end of the process
    if signal.getsignal(signal.SIGINT) is stop_at_once:  # the imports are over
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A flag of every script, so it is taken out before the script's own are parsed.
    debug = "--debug" in sys.argv
    sys.argv[1:] = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        if first is None and processes() > 1:
            raise BadInput("this script runs without torchrun, which is for train.py and eval.py")
        main()
        sys.stdout.flush()  # here, where a closed pipe is handled
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(at_the_end(error, debug, first))


def stop_at_once(number, frame):
    """Handles Ctrl-C while a script imports torch: a KeyboardInterrupt inside of its C++ aborts."""
    os.write(2, b"interrupted\n")
    os._exit(130)


def while_importing(kind, error, trace):
    """sys.excepthook of the scripts: an error of an import, such as a missing package, is raised
    outside of `guarded`."""
    code = at_the_end(error, "--debug" in sys.argv)
    os._exit(code)  # a half-imported torch may abort when Python ends in the ordinary way


def is_ours(module):
    """Whether a module is a script of this repository: in its root or in one of its folders."""
    path = Path(getattr(module, "__file__", None) or "/").resolve()
    return ROOT in (path.parent, path.parent.parent)


# not at an interactive prompt
if is_ours(sys.modules["__main__"]) and not sys.flags.interactive:
    sys.excepthook = while_importing
    # not where the shell ignores Ctrl-C, as under `nohup`
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop_at_once)
