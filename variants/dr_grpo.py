"""Dr. GRPO: GRPO without its two divisions (Liu et al., arXiv 2503.20783).

    Â_i = R_i - mean(R)         and a loss summed over tokens, divided by a constant

Dividing by the std raises the weight of questions that are nearly always or nearly never solved;
dividing by an answer's own length spares long wrong answers.

Both changes are the paper's (`--normalize constant` is the second).
"""

from mgrpo import Method


def centred(group):
    """R - mean. group.rewards: [n] -> [n]."""
    # group.advantages is exactly 0 in a group of equal rewards; a difference may be 1e-9.
    return (group.rewards - group.rewards.mean()) * (group.advantages != 0)


METHOD = Method(
    "Dr. GRPO, arXiv 2503.20783: no division by std or length",
    flags=dict(normalize="constant"),
    advantage=centred,
)
