"""Flags from a frozen dataclass: a field is a flag, its comment is its help, and bad input gets one sentence.

    python train.py --help              # what this file prints for train.py's Config

The idea. A script's settings are one dataclass, read top to bottom:

    attempts: int = 4       # G, answers sampled per question

From that line come the flag `--attempts`, its type, its default and its line of help; nothing is said twice, so nothing can
disagree. A bool is a flag without a value, there or not; a Maybe has one or not. A flag that does not exist is answered with the
nearest one that does; whatever else is wrong with the input is said in one sentence on stderr, with exit code 2 and no traceback.
"""
import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints


class Maybe(str):
    """The type of a flag that may stand without a value: it is "newest" then."""


class BadInput(Exception):
    """Something the user gave cannot be used. The message names the thing and the remedy; `guarded` prints it."""


def comments(config):
    """-> {field: its trailing comment}, read from the source of the dataclass and of those it inherits from."""
    found = {}
    for cls in reversed(config.__mro__[:-1]):
        for name, comment in re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(cls), re.M):
            found[name] = comment
    return found


def help_text(config, doc):
    """The script's docstring, then its own flags, then those it takes over from another script's config, under that script's name."""
    lines, fields = [doc.strip()], {field.name: field for field in dataclasses.fields(config)}
    for cls in config.__mro__[:-1]:
        here = cls.__module__ == config.__module__
        lines += ["", "Flags (--name value or --name=value):" if here else f"Flags of {cls.__module__}.py, taken here too:", ""]
        lines += [line for name in inspect.get_annotations(cls) for line in help_lines(config, fields[name])]
    return "\n".join(lines)


def help_lines(config, field):
    """A line or two for a flag: name, values, meaning, default."""
    kind, note = get_type_hints(config)[field.name], comments(config).get(field.name, "")
    kind = "|".join(get_args(kind)) if get_origin(kind) is Literal else {bool: "", Maybe: "[str]"}.get(kind, kind.__name__)
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
        return kind(text)
    except ValueError:
        raise BadInput(f"--{name} {text!r} is not {accepted[kind]}") from None


def parse(config, argv, refused=()):
    """-> {field: value} of the flags in argv. BadInput for an unknown flag, a flag without a value, a stray word, or a flag that other
    scripts have and this one `refused`: {name: reason}."""
    hints, given, words = get_type_hints(config), {}, list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if name in refused:
            raise BadInput(f"{flag} is not for this script: {refused[name]}")
        if not word.startswith("--") or name not in hints:
            near = difflib.get_close_matches(name, hints, 1, 0.5)
            guess = f"did you mean --{near[0].replace('_', '-')}?" if near else "--help lists the flags"
            raise BadInput(f"unknown {'flag' if word.startswith('-') else 'argument'} {flag!r}: {guess}")
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
    """The settings of a script: dataclass defaults, then the preset's, then the flags of the command line.

    presets(given) -> {field: value} may look at what was given (to pick a preset) and returns what to put under it.
    Prints help and exits 0 for --help.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(config, doc))
        sys.exit(0)
    given = parse(config, argv, refused)
    return config(**{**(presets(given) if presets else {}), **given})


def read_json(path, hint):
    """The dict that a JSON file holds. BadInput when it is not there (`hint` says what was expected), is not JSON, or holds no dict."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: there is no such file; {hint}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path} is damaged, or not what it should be: it holds a {type(found).__name__}, not fields with names")
    return found


def is_a(value, kind):
    """Whether a value from a file has a field's type. A whole number does for a float; True is no number, and NaN is none either."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return type(value) in (int, float) and abs(value) < math.inf
    return isinstance(value, str if kind is Maybe else kind) and (kind is bool or not isinstance(value, bool))


def check_fields(values, kinds, where):
    """BadInput, which begins with `where`, unless `values` is a dict with every field of `kinds`, {name: type}."""
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Maybe: "a text"}
    if not isinstance(values, dict):
        raise BadInput(f"{where} is a {type(values).__name__}, and should hold fields with names")
    for name, kind in kinds.items():
        if name not in values:
            raise BadInput(f"{where} has no field {name!r}")
        if not is_a(values[name], kind):
            one = f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else wanted.get(kind) or f"a {kind.__name__}"
            raise BadInput(f"{where}: {name} = {values[name]!r:.60} is not {one}")


def make_folder(path):
    """Makes a folder and those above it, unless they exist -> its Path. BadInput when that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        return Path(path)
    except OSError as error:
        raise BadInput(f"{path} cannot be made ({error.strerror}): there must be a folder that can be written to") from None


@contextlib.contextmanager
def reading(path):
    """Around the reading of a file that may be damaged or of another kind: what is missing or misplaced in it becomes BadInput."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError, RecursionError) as error:
        raise BadInput(f"{path} is damaged, or not what it should be ({type(error).__name__}: {error})") from None


def processes():
    """How many of them torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def guarded(main, first=None):
    """Runs a script's main: bad input, or a disk that is full or cannot be written, is one sentence and exit code 2; Ctrl-C is 130.

    first(): of several processes (parallel.run), whether this one is to say it.
    """
    speak = lambda text: print(text, file=sys.stderr) if first is None or first() else None
    try:
        if first is None and processes() > 1:
            raise BadInput("this script runs in one process, without torchrun, which is for train.py and eval.py")
        main()
    except (BadInput, OSError) as error:
        speak(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        speak("interrupted")
        sys.exit(130)
