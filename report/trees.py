"""Trees of a run, read from its files: questions, answers, guiding phrases, corrections.

    python -m report.trees out/run                    # prints the trees that training kept
    python -m report.trees out/run --step 12          # those of one step
    python -m report.trees out/run/eval-solve.jsonl   # the dialogues of an evaluation

`read_trees` gives one form to both kinds of transcripts (runtime/transcripts.py):

    tree   {"step" | "set", "question", "gold", "answers": [node, ...]}
    node   {"right", "undecided", "truncated", "tokens" | "text", "answers": [node, ...]}, from
           training also {"trained", "reward", "advantage", "logprobs"}, and "entropy" where it is
           known; from layer 2 on "phrase", the text that came before this answer

A node's answers continue that node, to any depth. A dialogue is a tree without branches.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
import functools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from runtime.flags import BadInput, guarded, inert, parse_flags, reading

OF_A_TURN = ("right", "undecided", "truncated", "text", "phrase")  # what a page shows of a dialogue


@dataclass(frozen=True)
class Config:
    run: str = ""  # a run's folder, or a file of transcripts; the flag's name may be left out
    step: int = 0  # print the trees of this step only; 0: all


# ---- lines of JSON -------------------------------------------------------------------------------


def lines_of(path, fields=(), wanted=None):
    """The objects of a JSONL file that have these fields, one by one; none if there is no file.

    Other lines, such as the last line of a run that was killed, are passed over, and a message
    counts them. wanted(number): whether a line is read at all; there is no message then, since the
    lines left out are not checked.
    """
    damaged = 0
    if not Path(path).exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file):
            if wanted is not None and not wanted(number):
                continue
            values = parsed(line)
            if values is not None and values.keys() >= set(fields):
                yield values
            else:
                damaged += 1
    complain(str(path), damaged if wanted is None else 0)


@functools.cache  # a page reads its files several times; one message is enough
def complain(path, damaged):
    """Prints on stderr, once, how many lines of a file were passed over."""
    if damaged:
        lines = "lines are" if damaged > 1 else "line is"
        tqdm.write(f"{path}: {damaged:,} damaged {lines} passed over", file=sys.stderr)


def parsed(line):
    """A line of JSONL as a dict, None for anything else. NaN and infinity become None."""
    try:
        values = json.loads(line, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


# ---- trees ---------------------------------------------------------------------------------------


def read_trees(path, wanted=None):
    """A file of either kind -> iterator of trees, in the form that this file's opening describes.

    wanted(number): whether a tree is read. Only what is wanted is parsed of rollouts.jsonl, which
    may be far larger than what a page shows.
    """
    if path.name == "rollouts.jsonl":
        yield from lines_of(path, ("question", "answers"), wanted)
        return
    for number, samples in enumerate(dialogues(path)):
        if wanted is None or wanted(number):
            yield dict(
                set=set_of(path, samples[0]["temperature"]),
                question=samples[0]["question"],
                gold=str(samples[0]["gold"]),
                answers=[chain(line["turns"])[0] for line in samples],
            )


def dialogues(path):
    """A file of eval.py -> iterator of the lines of one question in one evaluation: its samples,
    the first of which has number 0."""
    samples = []
    for line in lines_of(path):
        # Sample 0 begins the next question.
        if line["sample"] == 0 and samples:
            yield samples
            samples = []
        samples.append(line)
    if samples:
        yield samples


def chain(turns):
    """The turns of a dialogue -> [node] of the first; each node's only answer is the next turn."""
    if not turns:
        return []
    # The rest of a turn (its answer, its tokens) is for other readers of the file.
    kept = {name: turns[0][name] for name in OF_A_TURN if name in turns[0]}
    return [kept | dict(answers=chain(turns[1:]))]


def set_of(path, temperature):
    """The name of an evaluation, as tables and trees show it."""
    return f"{evaluation_of(path)}, {f'temperature {temperature:g}' if temperature else 'greedy'}"


def evaluation_of(path):
    """The name of a file of dialogues without its rank: eval-x-rank0.jsonl and eval-x-rank1.jsonl
    hold one evaluation."""
    return re.sub(r"-rank\d+(?=(\.\d+)?$)", "", path.stem)


def walk(answers, depth=1, parent=None):
    """All nodes of a tree, each before those below it -> iterator of (depth, node, its parent or
    None)."""
    for node in answers:
        yield depth, node, parent
        yield from walk(node["answers"], depth + 1, node)


def count_answers(tree):
    """The number of answers in a tree, of all layers."""
    return sum(1 for _ in walk(tree["answers"]))


def text_of(node):
    """What the model wrote in a node."""
    return "".join(node["tokens"]) if "tokens" in node else node["text"]


# ---- as text -------------------------------------------------------------------------------------


def tree_text(tree):
    """A tree as indented text: each answer with its verdict, reward and advantage, each guiding
    phrase above the answers that follow it."""
    title = f"step {tree['step']}" if "step" in tree else tree["set"]
    lines = [f"## {title}", tree["question"], f"gold: {tree['gold']}"]
    return "\n".join(lines + branches(tree["answers"], ""))


def branches(answers, indent):
    """The lines of sibling answers, which share their phrase, and of all that continues them."""
    # Siblings continue one answer with one phrase, so it is shown once.
    lines = [f"{indent}{node['phrase']}" for node in answers[:1] if "phrase" in node]
    for node in answers:
        verdict = "undecided" if node["undecided"] else "right" if node["right"] else "WRONG"
        if "reward" in node:
            verdict += f" R={number(node['reward'], '.2f')} A={number(node['advantage'], '+.2f')}"
        # a completion may have lines of its own
        text = text_of(node).replace("\n", f"\n{indent}│  ")
        lines.append(f"{indent}├─ [{verdict}] {text}")
        lines += branches(node["answers"], indent + "│  ")
    return lines


def number(value, form):
    """A number as text; transcripts hold None for one that was not finite."""
    return "nan" if value is None else format(value, form)


def main():
    """Prints the trees of a run or of a file."""
    config = parse_flags(Config, __doc__, first_word="run")
    path = Path(config.run) / "rollouts.jsonl" if Path(config.run).is_dir() else Path(config.run)
    if not config.run or not path.is_file():
        raise BadInput(
            f"{path if config.run else 'no run is named'}: there are no trees to print; name a "
            "run's folder, say out/solve-mgrpo-0, or a file of transcripts in one"
        )
    with reading(path):
        for tree in read_trees(path):
            if config.step in (0, tree.get("step")):
                print(inert(tree_text(tree)) + "\n")


if __name__ == "__main__":
    guarded(main)
