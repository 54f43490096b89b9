"""The family of GRPO: every method by its name, and --method-args.

    python -m variants.table               # all methods and their constants
    python train.py --method disco --method-args tau=1

A method is a mgrpo.Method. To add one: write a file like dr_grpo.py, and enter it here
(docs/a-method.md). What is confirmed of a paper, and what is a stand-in, stands at the top of its
method's file.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
import dataclasses
import difflib
import functools
import inspect
import math
import textwrap

from mgrpo import GRPO, MGRPO, SOURCES, Method, successes
from runtime.flags import guarded
from variants import (
    dagrpo,
    disco,
    dr_grpo,
    e_grpo,
    edge,
    gcpo,
    group_dro,
    grpo_care,
    grpo_lead,
    igrpo,
    lambda_grpo,
    nthr,
    raft,
    rloo,
    unlikely,
    veripo,
    ws_grpo,
)

METHODS = {
    "grpo": GRPO,
    "mgrpo": MGRPO,
    "dr-grpo": dr_grpo.METHOD,
    "rloo": rloo.METHOD,
    "ws-grpo": ws_grpo.METHOD,
    "igrpo": igrpo.METHOD,
    "dagrpo": dagrpo.METHOD,
    "e-grpo": e_grpo.METHOD,
    "lambda-grpo": lambda_grpo.METHOD,
    "gcpo": gcpo.METHOD,
    "edge": edge.METHOD,
    "edge-gec": edge.GEC,
    "grpo-care": grpo_care.METHOD,
    "unlikely": unlikely.METHOD,
    "veripo": veripo.METHOD,
    "nthr": nthr.METHOD,
    "disco": disco.METHOD,
    "raft": raft.RAFT,
    "raft++": raft.RAFT_PLUS,
    "reinforce-rej": raft.REINFORCE_REJ,
    "grpo-lead": grpo_lead.METHOD,
    "group-dro": group_dro.METHOD,
}
SEES_GOLD = ("e-grpo", "dagrpo", "edge-gec")  # gold solutions, not only their verdicts
# Constants of all methods, and their values. failed: failed corrections from layer 2 on.
WORDS = dict(
    sources=tuple(SOURCES), siblings=("question", "parent"), failed=("mask", "keep", "raw")
)
# Constants that are bounded: least and most, both allowed. All others are 0 or more.
BOUNDS = dict(
    tau=(1e-6, math.inf),  # inf: a plain mean
    delta=(0, 1),
    alpha=(0, 100),
    anchors=(0, 1),
    decay=(0, 1),
    follow_every=(1, 1e6),
    cap=(0, 1),
    margin=(-1, 1),
    rate=(0, 100),
    beta=(0, 1e6),
    penalty=(-100, 100),
    middle=(0, 1),
)
MOST = 1e6  # of the others
FUNCTIONS = (
    "rewrite",
    "learn",
    "reward",
    "advantage",
    "keep",
    "token_weight",
    "count",
    "constraint",
)


def method_of(name, arguments=()):
    """A method by its name, with constants changed. arguments: ["beta=0.25", ...].

    ValueError with one sentence for a name, a constant or a value that does not exist.
    """
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}{nearest(name, METHODS)}")
    method, values = METHODS[name], {}
    known = constants(method)
    for argument in arguments:
        key, _, text = (part.strip() for part in argument.partition("="))
        if key not in known:
            raise ValueError(f"{name} has no constant {key!r}{nearest(key, known)}")
        if key in values:
            raise ValueError(f"{key} is given twice")
        values[key] = value_of(key, text, known[key])
    if values.get("failed") == "raw" and method.advantage:
        raise ValueError(f"failed=raw: {name} has an advantage of its own, which raw would replace")
    settled = known | values
    for low, high in (("least", "most"), ("floor", "ceiling")):
        if low in settled and settled[low] > settled[high]:
            raise ValueError(f"{low} is above {high}")
    return with_constants(method, values)


def constants(method):
    """{name: value} of all that --method-args can change: keywords of its functions, and fields."""
    found = dict(siblings=method.siblings, failed="mask" if method.keep is successes else "keep")
    if isinstance(method.sources, str):  # others choose by a rule of their own
        found["sources"] = method.sources
    if method.decay != 1:
        found |= dict(decay=method.decay, follow_every=method.follow_every)
    for name in FUNCTIONS:
        function = getattr(method, name)
        for key, parameter in inspect.signature(function).parameters.items() if function else ():
            if parameter.default is not parameter.empty:
                found[key] = parameter.default
    return found | (constants_of_stage(method.then) if method.then else {})


def constants_of_stage(stage):
    """Those of the second stage, but for the fields, which the first one has."""
    return {key: x for key, x in constants(stage).items() if key not in WORDS}


def value_of(key, text, default):
    """The text of a constant as a value like its default. ValueError with one sentence."""
    if key in WORDS:
        if text not in WORDS[key]:
            raise ValueError(f"{key} must be one of: {', '.join(WORDS[key])}; got {text!r}")
        return text
    least, most = BOUNDS.get(key, (0, MOST))
    try:
        value = type(default)(text)
        if not least <= value <= most:  # nan is not, either
            raise ValueError
        return value
    except ValueError:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise ValueError(f"{key} must be {kind} from {least:g} to {most:g}; got {text!r}") from None


def with_constants(method, values):
    """The method with some constants changed."""
    changed = {key: x for key, x in values.items() if key in {f.name for f in FIELDS}}
    for name in FUNCTIONS:
        function = getattr(method, name)
        own = {}
        if function:
            own = {k: values[k] for k in values.keys() & inspect.signature(function).parameters}
        if own:
            changed[name] = functools.partial(function, **own)
    if method.then:
        own = {"siblings", *constants_of_stage(method.then)}
        stage = {k: x for k, x in values.items() if k in own}
        changed["then"] = with_constants(method.then, stage)
    method = dataclasses.replace(method, **changed)
    return with_failures(method, values["failed"]) if "failed" in values else method


def with_failures(method, failed):
    """What becomes of failed corrections: "mask" discards them after normalising, "keep" trains
    them like failed answers, "raw" discards them and takes the reward itself as advantage."""
    own = None if method.keep is successes else method.keep
    if failed == "keep":
        return dataclasses.replace(method, keep=own)
    both = successes if own is None else lambda group: own(group) & successes(group)
    method = dataclasses.replace(method, keep=both)
    return dataclasses.replace(method, advantage=raw, alone=True) if failed == "raw" else method


def raw(group):
    """-> [n] advantages: equation (1)'s in layer 1, the rewards from layer 2 on."""
    return group.advantages if group.number == 1 else group.rewards


FIELDS = dataclasses.fields(Method)


def nearest(word, words):
    """The end of a message: the nearest word, or all of them."""
    close = difflib.get_close_matches(word.lower(), words, 1)
    return f"; did you mean {close[0]}?" if close else f"; choose from {', '.join(words)}"


def changes(method):
    """The fields in which a method differs from GRPO, and its own defaults of flags, as words."""
    plain = ("about", "flags", "follow_every")
    own = [f.name for f in FIELDS if f.name not in plain and getattr(method, f.name) != f.default]
    return own + [f"`--{name.replace('_', '-')}`" for name in method.flags]


def markdown():
    """The list of docs/relatives.md."""
    lines = []
    for name, method in METHODS.items():
        star = "*" * (name in SEES_GOLD)
        about = (
            f"- `{name}`{star}: {method.about}. Changes: {', '.join(changes(method)) or 'nothing'}."
        )
        lines += textwrap.wrap(about, 109, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


def listing():
    """A line for each method, for --help."""
    lines = (f"  {name:14} {method.about}" for name, method in METHODS.items())
    return "\n".join(["Methods (python -m variants.table has their constants):", "", *lines])


def main():
    for name, method in METHODS.items():
        print(f"{name:14} {method.about}")
        values = {**method.flags, **{k: x for k, x in constants(method).items() if k not in WORDS}}
        if values:
            print(" " * 15 + ", ".join(f"{key} {value}" for key, value in values.items()))


if __name__ == "__main__":
    guarded(main)
