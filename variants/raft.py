"""RAFT, RAFT++ and Reinforce-Rej: how little GRPO needs (arXiv 2504.11343).

    RAFT           Â = max(R, 0), loss -Â log π     only right answers, no baseline
    RAFT++         the same Â with equation (2)'s ratio and clip
    Reinforce-Rej  Â = R in groups with both verdicts, else 0; R = +1 or -1

The paper's claim: most of GRPO's gain is that it drops questions whose answers are all wrong.

Confirmed by the released code (Minimal-RL@e3b49f0, core_algos.py): RAFT, RAFT++, and the token mean
over all sampled tokens. (There 4 answers a question and a KL with 0.001; here --group-sizes and
--kl-coef say.) R = +1 or -1 is the paper's; with the release's 0 and 1
Reinforce-Rej is RAFT++ on mixed groups.
"""

import torch

from mgrpo import Method


def positives(group):
    """-> [n]. group.rewards: [n]."""
    return group.rewards.clamp(min=0)


def plus_minus(group):
    """-> [n] rewards: +1 right, -1 wrong."""
    return torch.where(group.correct, 1.0, -1.0)


def of_mixed_groups(group):
    """-> [n]: the reward, and 0 where all rewards are equal."""
    return group.rewards * (group.rewards.min() != group.rewards.max())


RAFT = Method(
    "RAFT, arXiv 2504.11343: log-likelihood of right answers",
    flags=dict(normalize="token"),
    advantage=positives,
    alone=True,
    surrogate="likelihood",
)
RAFT_PLUS = Method(
    "RAFT++, arXiv 2504.11343: RAFT with ratio and clip",
    flags=dict(normalize="token"),
    advantage=positives,
    alone=True,
)
REINFORCE_REJ = Method(
    "Reinforce-Rej, arXiv 2504.11343: REINFORCE on questions with both verdicts",
    flags=dict(normalize="token"),
    reward=plus_minus,
    advantage=of_mixed_groups,
)
