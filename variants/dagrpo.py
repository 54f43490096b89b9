"""DaGRPO: only distinct answers are trained (arXiv 2512.06337).

An answer has a gradient if some answer with the other verdict differs from it in a finer score by
δ or more: near misses beside right answers pull in opposite directions with nearly the same text.
Advantages are normalised over all answers first.

In a group without a right answer nothing is distinct. With anchors=1 its last answer is replaced by
the gold solution, as a row that is trained like a sampled one.

A stand-in throughout: the paper's score is the mark of a language model, and its formula is not
public. Here the score is the share of intermediate values that are right; a task without any has no
anchors. Shares of m values differ by 1/m, and a smaller δ would leave out nothing: 0.3 leaves out
answers with one wrong value of four. The method sees the gold solution.
"""

import torch

from mgrpo import Method, split_by
from variants.e_grpo import matched, solution


def distinct(group, delta=0.3):
    """-> [n] bool. group.texts, problems, correct: of n answers."""
    pairs = [matched(text, problem) for text, problem in zip(group.texts, group.problems)]
    # A task without intermediate values: the verdict itself is the score.
    scores = [n / m if m else float(right) for (n, m), right in zip(pairs, group.correct.tolist())]
    return far_apart(group.correct, torch.tensor(scores), delta)


def far_apart(correct, scores, delta=0.3):
    """The rule. correct: [n] bool; scores: [n] in [0, 1] -> [n] bool."""
    other = correct[:, None] != correct  # [n, n]
    return (other & ((scores[:, None] - scores).abs() >= delta)).any(1)


def anchored(layer, seed, anchors=0):
    """-> {row: text}: the gold solution for the last answer of each group without a right one."""
    if not anchors:
        return {}
    lost = [rows for rows in split_by(layer.questions) if not layer.correct[rows].any()]
    texts = {int(rows[-1]): solution(layer.problems[int(rows[-1])]) for rows in lost}
    return {row: text for row, text in texts.items() if text}


METHOD = Method(
    "DaGRPO, arXiv 2512.06337: only answers that differ clearly are trained; all a stand-in",
    rewrite=anchored,
    keep=distinct,
)
