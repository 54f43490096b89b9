"""Rewarding the Unlikely: a right answer is paid less the likelier it was (arXiv 2506.02355).

    R_i (1 - β k_i / n)          k_i: rank by mean log π_old, 0 for the least likely of the group

GRPO sharpens: it makes likely right answers likelier, so pass@k for large k does not rise. Groups
that are all right or all wrong by the raw reward carry nothing.

Confirmed by the released code (rewarding-unlikely-release@ca1cff0, ray_lean_trainer.py): the
formula (the paper has k + 1), β = 0.25, the filter, two epochs, KL with 0.1 (k3). Equal likelihoods
rank by the order of rows. Paper: groups of 32, learning rate 1e-6.
"""

import torch

from mgrpo import Method


def rarely_said(group, beta=0.25):
    """-> [n] rewards. group.rewards: [n]; old_logp, mask: [n, T]."""
    mean = (group.old_logp * group.mask).sum(1) / group.mask.sum(1).clamp(min=1)
    return discounted(group.rewards, mean, beta)


def discounted(rewards, mean_logp, beta=0.25):
    """The formula. rewards, mean_logp: [n] -> [n]."""
    rank = mean_logp.argsort(stable=True).argsort()
    return rewards * (1 - beta * rank / len(rewards))


def mixed(group):
    """-> [n] bool: the group has right and wrong answers."""
    right = group.correct
    return torch.full_like(right, bool(right.any() and not right.all()))


METHOD = Method(
    "Rewarding the Unlikely, arXiv 2506.02355: likely right answers are paid less",
    flags=dict(epochs=2, kl_coef=0.1),
    reward=rarely_said,
    keep=mixed,
)
