"""GRPO-CARE: right answers that a slow copy of the model finds likely get a bonus (arXiv
2506.16141).

    R_i = reward + 0.5 accuracy_i [i in S and conf_i >= mean conf over S - margin]
    conf_i = exp(mean log-probability of the answer's tokens under the reference), at most 0.95

S are the right answers that are no worse than the group's mean. The confidence is of the text
between <answer> and </answer>, given the reasoning: a right answer that does not follow from its
reasoning is unlikely. The reference follows the policy: every 10 steps 0.995 of itself, 0.005 of
the policy.

Confirmed by the released code (GRPO-CARE@b0628fc, grpo_trainer_ref_ema.py): all of this, no clip,
no KL. An answer without a span has confidence 0 here (there 0.95). Paper: groups of 8, learning
rate 1e-6, gradients cut at norm 5.
"""

import itertools

import torch

from mgrpo import Method


def consistent(group, bonus=0.5, cap=0.95, margin=0.0):
    """-> [n] rewards. group.rewards, correct: [n]; ref_logp: [n, T]; pieces: of n."""
    confidences = [
        confidence(logp, answer_span(pieces)) for logp, pieces in zip(group.ref_logp, group.pieces)
    ]
    return with_bonus(group.rewards, group.correct, torch.tensor(confidences), bonus, cap, margin)


def with_bonus(rewards, correct, confidence, bonus=0.5, cap=0.95, margin=0.0):
    """The reward. rewards, correct, confidence: [n] -> [n]."""
    if not correct.any():
        return rewards
    confidence, accuracy = confidence.clamp(max=cap), correct.to(rewards.dtype)
    least = confidence[correct].mean() - margin
    return rewards + bonus * accuracy * (confidence >= least)


def confidence(logp, span):
    """logp: [T] under the reference; span: (first token, one behind the last) -> in [0, 1]."""
    first, end = span
    return float(logp[first:end].mean().exp()) if end > first else 0.0


def answer_span(pieces):
    """The tokens strictly between the last <answer> and its </answer>; (0, 0) without any.

    pieces: the bytes of each token.
    """
    text = b"".join(pieces)
    end = text.rfind(b"</answer>")
    start = text.rfind(b"<answer>", 0, max(end, 0)) + len(b"<answer>")
    if start < len(b"<answer>"):
        return 0, 0
    ends = list(itertools.accumulate(map(len, pieces)))
    begins = [0, *ends[:-1]]
    inside = [t for t, (a, b) in enumerate(zip(begins, ends)) if start <= a < b <= end]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


METHOD = Method(
    "GRPO-CARE, arXiv 2506.16141: a slow reference pays right answers it finds likely",
    observe=("ref_logp",),
    decay=0.995,
    follow_every=10,
    reward=consistent,
    surrogate="likelihood",
)
