"""Trees to look at: what was asked, attempted and corrected, token by token, with what the sampler
and the loss thought of each.

    python report.py out/run         # shows them as a page
    head -1 out/run/rollouts.jsonl | python -m json.tool

The idea. Figures say that something changed, transcripts say what. Two kinds are kept, both a line
of JSON at a time:

    rollouts.jsonl   of training: the trees of the first `--transcripts` questions of every step (of
                     several processes rank 0's). Questions
                     are drawn at random, so these are a fair sample, of good and bad ones. Each
                     node has the tokens as text, log π(token) of the sampler and the entropy of the
                     policy before the token, to four decimals, reward, advantage, and whether it is
                     in the loss at all.
    eval-*.jsonl     of eval.py: every dialogue, in texts.

`read_trees` makes one kind of tree of both: {step or set, question, gold, attempts: [node]}, a node
being {right, undecided, cut, reward, advantage, trained, tokens | text, logprobs, entropy} and, in
an attempt, {phrase, corrections: [node]}. What was not kept is not there.
"""

import codecs
import functools
import itertools
import json
import math
import re
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from engine.packing import batch_of, leaf, logprobs, row_packs, tree_packs
from mgrpo import PHRASES
from mgrpo import completion_logprobs, draw_phrases, pad_rows
from reward import extract_answer
from runtime import distributed
from runtime.flags import make_folder, writing

REPLACEMENT = "\ufffd".encode()


# ---- of training ---------------------------------------------------------------------------------


def record(folder, policy, tree, encoding, c, step, generated):
    """Appends the trees of the first questions of a step to rollouts.jsonl. tree: train.Trees of
    this rank; c: train.Config.

    Call it before the policy learns: the entropies are those of the policy that sampled. On several
    ranks all call it, since a pass needs everybody; rank 0, which has the first questions, writes.
    """
    rows = (
        [layer.questions < c.transcripts for layer in tree.layers]
        if c.transcripts and distributed.rank() == 0
        else []
    )
    leaves = [
        leaf(tree.layers, depth, row)
        for depth, some in enumerate(rows, 1)
        for row in some.nonzero()[:, 0].tolist()
    ]
    entropy = entropies(policy, leaves, c)
    if rows:
        write_trees(
            folder / "rollouts.jsonl",
            tree,
            encoding,
            entropy,
            min(c.transcripts, len(tree.problems)),
            dict(step=step, generated=generated),
        )


@torch.no_grad()
def entropies(policy, leaves, c):
    """Entropy of the policy, in nats, where each of the leaves' tokens was drawn -> {(depth, row):
    [float, ...]}."""
    device, found = policy.cos.device, {}
    batches = (tree_packs if c.pack == "tree" else row_packs)(leaves, c.tokens_per_microbatch)
    # asked before the first pass, which needs everybody
    idle = int(distributed.most(len(batches))) - len(batches)
    for some in batches:
        _, entropy = logprobs(policy, batch_of(some, c.pack, device), c.temperature)
        found |= {
            (one.layer.completions.depth, one.row): values
            for one, values in zip(some, entropy.tolist())
        }
    for _ in range(idle):
        completion_logprobs(policy, pad_rows([[0]], [[0]], device))
    distributed.released(policy)
    return found


def write_trees(path, tree, encoding, entropy, count, about):
    """Appends the trees of the first `count` questions, a line each. about: what every line says
    besides."""
    first, second = tree.layers[0], tree.layers[1] if len(tree.layers) > 1 else None
    lines = []
    for question, problem in enumerate(tree.problems[:count]):
        attempts = []
        taught = int(tree.slots[question]) >= 0  # else another question took its place (--resample)
        for row in (first.questions == question).nonzero()[:, 0].tolist():
            attempts.append(node(first, row, encoding, entropy[1, row], taught))
            below = (second.parents == row).nonzero()[:, 0].tolist() if second else []
            if below:
                corrections = [node(second, j, encoding, entropy[2, j], taught) for j in below]
                attempts[-1] |= dict(
                    phrase=phrase_of(second, below[0], encoding), corrections=corrections
                )
        line = about | dict(question=problem.question, gold=str(problem.gold), attempts=attempts)
        lines.append(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.writelines(lines)


def node(layer, row, encoding, entropy, taught):
    """One sampled row as a dict of plain values. taught: its question is in the loss."""
    c, n = layer.completions, int(layer.lengths[row])
    return dict(
        right=bool(layer.correct[row]),
        undecided=bool(layer.undecided[row]),
        cut=not bool(c.ended[row]),
        trained=taught and bool(layer.trained[row]),
        **dict(zip(("reward", "advantage"), short((layer.rewards[row], layer.advantages[row])))),
        tokens=pieces(encoding, c.sampled[row]),
        logprobs=short(c.logprobs[row, :n].tolist()),
        entropy=short(entropy[:n]),
    )


def short(values):
    """Numbers to four decimals; None for what is not finite, which JSON has no word for."""
    # + 0.0: no -0.0
    return [round(x, 4) + 0.0 if math.isfinite(x) else None for x in map(float, values)]


def phrase_of(layer, row, encoding):
    """The guiding phrase that a correction went on from: the last thing in its prompt."""
    given = encoding.decode(layer.completions.prompts[row // layer.completions.n])
    return next(phrase for phrase in PHRASES if given.endswith(phrase))


def pieces(encoding, ids):
    """Token ids -> their texts, which joined are the text of all. A character whose bytes are split
    over several tokens stands with the last of them; what never becomes a character, and ids that
    no token has, are U+FFFD."""
    decoder, found = codecs.getincrementaldecoder("utf-8")("replace"), []
    for token in ids:
        found.append(decoder.decode(bytes_of(encoding, token)))
    if found:
        found[-1] += decoder.decode(b"", final=True)
    return found


def bytes_of(encoding, token):
    """The bytes of a token, special ones included; those of U+FFFD for an id that no token has."""
    try:
        return encoding.decode_single_token_bytes(token)
    except (KeyError, OverflowError):
        return REPLACEMENT


# ---- of evaluation -------------------------------------------------------------------------------


class Dialogues:
    """A JSONL file of whole dialogues, a line for each sample of each question, written as batches
    come. One that exists is never written over: the next gets a number. about: what every line says
    besides (a dict)."""

    def __init__(self, folder, name, about):
        make_folder(folder)
        ranks = [f"-rank{rank}" if distributed.size() > 1 else "" for rank in range(distributed.size())]
        names = (
            [folder / f"{name}{rank}{'' if number == 1 else f'.{number}'}.jsonl" for rank in ranks]
            for number in itertools.count(1)
        )
        self.paths = distributed.from_rank0(
            lambda: next(paths for paths in names if not any(path.exists() for path in paths))
        )
        self.path, self.about = self.paths[distributed.rank()], about

    def record(self, problems, layers, how):
        """Appends the dialogues of a batch, as eval.evaluate hands them over."""
        phrases, lines = draw_phrases(how.seed, layers[0].completions.numbers.tolist()), []
        for row in range(len(layers[0].texts)):
            problem = problems[int(layers[0].questions[row])]
            line = self.about | dict(
                question=problem.question,
                gold=str(problem.gold),
                source=str(getattr(problem.data, "place", "")),
                **getattr(problem.data, "about", {}),
                temperature=how.temperature,
                sample=row % layers[0].completions.n,
                number=int(layers[0].completions.numbers[row]),
            )
            for turn, layer in enumerate(layers, 1):
                line[f"turn{turn}"] = dict(
                    text=layer.texts[row],
                    answer=extract_answer(layer.texts[row]),
                    right=bool(layer.correct[row]),
                    undecided=bool(layer.undecided[row]),
                    tokens=int(layer.lengths[row]),
                    cut=not bool(layer.completions.ended[row]),
                ) | (dict(phrase=phrases[row]) if turn == 2 else {})
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.writelines(lines)


# ---- reading -------------------------------------------------------------------------------------


def lines_of(path, fields=(), wanted=None):
    """The objects of a JSONL file that have these fields, one by one; none where there is no file.
    Other lines, like one that was cut short when a run was killed, are passed over, and their
    number is said at the end. wanted(number): which lines to look at; nothing is said then, since
    only some are seen."""
    damaged = 0
    if Path(path).exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file):
                if wanted is None or wanted(number):
                    found = parsed(line)
                    if found is not None and found.keys() >= set(fields):
                        yield found
                    else:
                        damaged += 1
        complain(str(path), damaged if wanted is None else 0)


@functools.cache  # a page reads its files several times
def complain(path, damaged):
    """Says on stderr, once, how many lines of a file are passed over."""
    if damaged:
        tqdm.write(
            f"{path}: {damaged:,} damaged line{'s are' if damaged > 1 else ' is'} passed over",
            file=sys.stderr,
        )


def parsed(line):
    """A line of JSONL as an object, None for what is none; a number that is not finite becomes
    None."""
    try:
        found = json.loads(line, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_trees(path, chosen=None):
    """A file of either kind -> iterator of trees, as this file's opening describes them;
    chosen(number): whether the number'th is wanted. It is read line by line, and of rollouts.jsonl
    only what is wanted is parsed: it may be far larger than what is to be shown."""
    if path.name == "rollouts.jsonl":
        yield from lines_of(path, ("question", "attempts"), chosen)
        return
    for number, some in enumerate(dialogues(path)):
        if chosen is None or chosen(number):
            yield dict(
                set=set_of(path, some[0]["temperature"]),
                question=some[0]["question"],
                gold=str(some[0]["gold"]),
                attempts=[attempt_of(line) for line in some],
            )


def dialogues(path):
    """A file of eval.py -> iterator of the lines of one question in one evaluation: its samples,
    the first of which has number 0."""
    some = []
    for line in lines_of(path):
        if line["sample"] == 0 and some:
            yield some
            some = []
        some.append(line)
    if some:
        yield some


def set_of(path, temperature):
    """The name of an evaluation; several processes write a file each, of one evaluation:
    eval-x-rank0.jsonl, eval-x-rank1.jsonl."""
    return f"{evaluation_of(path)}, {f'temperature {temperature:g}' if temperature else 'greedy'}"


def evaluation_of(path):
    """The name of a file of dialogues without the number of the process that wrote it."""
    return re.sub(r"-rank\d+(?=(\.\d+)?$)", "", path.stem)


def attempt_of(line):
    """A line of eval-*.jsonl as a node with at most one correction."""
    kept = ("right", "undecided", "cut", "text")
    attempt = {name: line["turn1"][name] for name in kept}
    if "turn2" in line:
        second = line["turn2"]
        attempt |= dict(
            phrase=second["phrase"], corrections=[{name: second[name] for name in kept}]
        )
    return attempt


def answers(tree):
    """How many answers a tree holds, of both layers."""
    return sum(1 + len(attempt.get("corrections", ())) for attempt in tree["attempts"])
