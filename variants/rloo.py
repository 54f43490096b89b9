"""RLOO: REINFORCE with a leave-one-out baseline (Ahmadian et al., arXiv 2402.14740).

    Â_i = R_i - mean of the other rewards = n / (n - 1) · (R_i - mean(R))

The baseline of an answer does not contain its own reward, so the gradient is unbiased.

The advantage and the sum over tokens (`--normalize constant`) are the paper's. A stand-in: it
updates on-policy without a clip; here the second update of a rollout has equation (2)'s.
"""

from mgrpo import Method


def leave_one_out(group):
    """R minus the mean of the others. group.rewards: [n] -> [n]; 0 for a single answer."""
    n = len(group.rewards)
    return n / max(n - 1, 1) * (group.rewards - group.rewards.mean()) * (group.advantages != 0)


METHOD = Method(
    "RLOO, arXiv 2402.14740: the baseline is the mean of the others",
    flags=dict(normalize="constant"),
    advantage=leave_one_out,
)
