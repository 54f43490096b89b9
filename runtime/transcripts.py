"""Transcripts on disk: the trees of training and the dialogues of an evaluation, as lines of JSON.

    python -m report out/run                                 # shows them as a page
    python -m report.trees out/run                           # prints them as text
    head -1 out/run/rollouts.jsonl | python -m json.tool     # the form of one tree

Two kinds of files hold transcripts, one line of JSON at a time:

    rollouts.jsonl   training: the trees of the first questions of every step. Questions are drawn
                     at random, so the trees are a fair sample. A node has the text of each token,
                     the sampler's log-probability of it, reward, advantage, and its own "answers".
    eval-*.jsonl     evaluation: a line for each sample of each question, with its "turns".

Layers, problems and the encoding are given by the caller; report/trees.py reads the files.
"""

import codecs
import itertools
import json
import math

from runtime import distributed
from runtime.distributed import rank0
from runtime.flags import make_folder, writing

REPLACEMENT = "\ufffd".encode()  # the character that stands for bytes that are no text


# ---- training ------------------------------------------------------------------------------------


@rank0
def write_trees(path, layers, problems, encoding, count, about, entropies=None):
    """Appends the trees of the first `count` questions of a rollout to a JSONL file.

    layers: [Layer 1, ..., Layer N] with advantages; problems: the questions of this rank; about:
    the dict that every line begins with, {"step", "generated"}; entropies: {(layer number, row):
    [float, ...]}, nats before each sampled token, of the rows for which they are known. Rank 0
    writes. OSError when the file cannot be written.
    """
    # Found once for each layer. A search for the children of every node would take quadratic time.
    below = [children(layer) for layer in layers]
    lines = []
    for question, problem in enumerate(problems[:count]):
        answers = nodes(layers, below, 0, question, encoding, entropies or {})
        tree = about | dict(question=problem.question, gold=str(problem.gold), answers=answers)
        lines.append(json.dumps(tree, ensure_ascii=False, separators=(",", ":")) + "\n")
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.writelines(lines)


def children(layer):
    """{parent: [row, ...]} of a layer. The parents of layer 1 are the questions."""
    rows = {}
    for row, parent in enumerate(layer.parents.tolist()):
        rows.setdefault(parent, []).append(row)
    return rows


def nodes(layers, below, depth, parent, encoding, entropies):
    """The answers of layers[depth] to one parent, with all that continues them -> list of dicts."""
    if depth == len(layers):
        return []
    return [
        node(layers[depth], depth + 1, row, encoding, entropies)
        | dict(answers=nodes(layers, below, depth + 1, row, encoding, entropies))
        for row in below[depth].get(parent, ())
    ]


def node(layer, number, row, encoding, entropies):
    """A row of layer `number` as a dict of plain values."""
    completions, length = layer.completions, int(layer.lengths[row])
    reward, advantage = short((layer.rewards[row], layer.advantages[row]))
    values = dict(
        right=bool(layer.correct[row]),
        undecided=bool(layer.undecided[row]),
        truncated=not bool(completions.ended[row]),
        trained=bool(layer.trained[row]),
        **(dict(given=True) if layer.given is not None and layer.given[row] else {}),
        reward=reward,
        advantage=advantage,
        tokens=pieces(encoding, completions.sampled[row]),
        logprobs=short(completions.logprobs[row, :length].tolist()),
    )
    if layer.phrases is not None:
        values["phrase"] = layer.phrases[row]
    if (number, row) in entropies:
        values["entropy"] = short(entropies[number, row][:length])
    return values


def short(values):
    """Numbers to four decimals; None for NaN and infinity, which JSON cannot hold."""
    # + 0.0 turns -0.0 into 0.0
    return [round(x, 4) + 0.0 if math.isfinite(x) else None for x in map(float, values)]


def pieces(encoding, ids):
    """Token ids -> the text of each; joined, the text of all.

    A character whose bytes are split over several tokens stands with the last of them. Bytes that
    never complete a character, and ids without a token, become U+FFFD.
    """
    # It keeps the bytes of an unfinished character until the next token.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(bytes_of(encoding, token)) for token in ids]
    # Bytes that are left over now complete no character: they become U+FFFD.
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return texts


def bytes_of(encoding, token):
    """The bytes of a token, special tokens included; those of U+FFFD for an id without a token."""
    try:
        return encoding.decode_single_token_bytes(token)
    except (KeyError, OverflowError):
        return REPLACEMENT


# ---- evaluation ----------------------------------------------------------------------------------


class Dialogues:
    """A JSONL file of dialogues, one line for each sample of each question.

    A file that exists is never overwritten: the next one gets a number. Each of several ranks
    writes its own file. about: a dict that every line begins with; answer_of(text): the answer in a
    completion, None if there is none (reward.extract_answer).
    """

    def __init__(self, folder, name, about, answer_of):
        make_folder(folder)
        ranks = [""]
        if distributed.size() > 1:
            ranks = [f"-rank{rank}" for rank in range(distributed.size())]
        # Each item is the files of all ranks under one number, made when it is asked for.
        names = (
            [folder / f"{name}{rank}{'' if number == 1 else f'.{number}'}.jsonl" for rank in ranks]
            for number in itertools.count(1)
        )
        # Rank 0 chooses for all: another rank could find the first file already written.
        self.paths = distributed.broadcast_object(
            lambda: next(paths for paths in names if not any(path.exists() for path in paths))
        )
        self.path = self.paths[distributed.rank()]
        self.about, self.answer_of = about, answer_of

    def record(self, problems, layers, sampling):
        """Appends the dialogues of a batch. layers: one for each turn, row i of all of them being
        one dialogue; sampling: the temperature they were drawn at."""
        first, lines = layers[0], []
        for row in range(len(first.texts)):
            problem = problems[int(first.questions[row])]
            line = self.about | dict(
                question=problem.question,
                gold=str(problem.gold),
                source=str(getattr(problem.data, "place", "")),
                **getattr(problem.data, "about", {}),
                temperature=sampling.temperature,
                sample=row % first.completions.n,
                number=int(first.completions.numbers[row]),
                turns=[self.turn(layer, row) for layer in layers],
            )
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.writelines(lines)

    def turn(self, layer, row):
        """A row of a layer as a dict of plain values."""
        values = dict(
            text=layer.texts[row],
            answer=self.answer_of(layer.texts[row]),
            right=bool(layer.correct[row]),
            undecided=bool(layer.undecided[row]),
            tokens=int(layer.lengths[row]),
            truncated=not bool(layer.completions.ended[row]),
        )
        return values if layer.phrases is None else values | dict(phrase=layer.phrases[row])
