"""GRPO-LEAD: short right answers and hard questions weigh more (arXiv 2504.09696).

    R_i = exp(-α z_i) if right, z_i = (length - mean) / std over right answers;  -1 if wrong;
          0 without an answer
    Â_i = equation (1) times w(ρ) if it is positive, else w(1 - ρ);  ρ: the share with R > 0
    w(x) = 0.4 + 1.1 / (1 + exp(10 (x - 0.75)))

A group that is all right keeps its signal if lengths differ: equation (1) blows differences of 5 %
up to 1. Groups without any positive reward, or with all exactly 1, are dropped.

Confirmed by the released code: all of this, α = 0.05. There lengths count only if the three
shortest answers have more than 4,000 tokens (`gate`); here 0, or they never would. (There answers
are read before "</think>".) Left out: -2 for an answer that repeats itself.
"""

import torch

from mgrpo import Method


def concise(group, alpha=0.05, gate=0):
    """-> [n] rewards. group.correct, lengths: [n]; answers: n tuples."""
    unparseable = torch.tensor([answers[-1] is None for answers in group.answers])
    return by_length(group.correct, group.lengths.double(), unparseable, alpha, gate)


def by_length(correct, lengths, unparseable, alpha=0.05, gate=0):
    """The reward. correct, unparseable: [n] bool; lengths: [n] -> [n]."""
    rewards = torch.where(correct, 1.0, -1.0).to(lengths.dtype)
    long = len(lengths) < 3 or lengths.sort()[0][:3].mean() > gate
    if correct.any() and long:
        own = lengths[correct]
        std = own.std() if len(own) > 1 else torch.ones(())
        rewards[correct] = (-alpha * (own - own.mean()) / (std + 1e-6)).exp()
    return rewards.masked_fill(unparseable, 0.0)


def by_difficulty(group, low=0.4, gain=1.1, slope=10.0, middle=0.75):
    """-> [n] advantages. group.rewards, advantages: [n]."""
    rewards, A = group.rewards, group.advantages
    if (rewards <= 0).all() or (rewards == 1).all():
        return torch.zeros_like(A)
    share = (rewards > 0).double().mean()
    w = lambda x: float(low + gain / (1 + torch.exp(slope * (x - middle))))
    return A * torch.where(A > 0, w(share), w(1 - share))


METHOD = Method(
    "GRPO-LEAD, arXiv 2504.09696: short answers and hard questions weigh more",
    reward=concise,
    advantage=by_difficulty,
)
