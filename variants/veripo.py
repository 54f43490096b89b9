"""VerIPO: GRPO, a verifier, then DPO on the same trees (arXiv 2505.19000).

    loss = mean over pairs of -log σ(x),   x = β ((S_w - ref_w) - (S_l - ref_l))

S is the summed log-probability of an answer now, ref that at the start of the stage. Winners are
right, consistent and well formed; losers are wrong, or right but inconsistent. All winners and
losers to the same prompt are pairs. The stage costs no generated tokens.

As in DisCO the slopes of the loss, -β σ(-x) for each winner and +β σ(-x) for each loser, are
constants of an optimiser step, so minus the slope is the advantage of a loss A log π.

Confirmed: the loop, half of GRPO's learning rate. Stand-ins: β = 0.1; who wins over whom; the
verifier, a small language model there, is a rule: the last number of the reasoning is the last of
the answer. The dropping of solved questions between rounds is left out.
"""

import re

import torch

from mgrpo import Method
from variants.e_grpo import own_work, right_values, well_formed


def preferred(group, beta=0.1):
    """-> [n] advantages. group.new_logp, logp, mask: [n, T]."""
    now, then = ((logp * group.mask).sum(1) for logp in (group.new_logp, group.logp))
    return slopes(now, then, winners_over_losers(group), beta)


def slopes(now, then, pairs, beta=0.1):
    """Minus the slopes of the summed loss. now, then: S and ref, [n]; pairs: [n, n] bool -> [n]."""
    gap = now - then
    push = beta * torch.sigmoid(-beta * (gap[:, None] - gap)) * pairs
    return push.sum(1) - push.sum(0)


def winners_over_losers(group):
    """-> [n, n] bool: row i wins over row j. Both answer the same prompt."""
    sound = torch.tensor([consistent(text, p) for text, p in zip(group.texts, group.problems)])
    pairs = pair_up(group.correct, sound, well_formed(group))
    return pairs & (group.parents[:, None] == group.parents)


def pair_up(correct, sound, formed):
    """The rule. All [n] bool -> [n, n] bool."""
    return (correct & sound & formed)[:, None] & (~correct | ~sound)


def consistent(text, problem):
    """Whether the last number of the work is the last of the answer. A confirmation is: it has no
    work of its own. So is whatever answers a problem without steps (countdown), whose answer is no
    number."""
    if not right_values(problem):
        return True
    answer = text.partition("</think>")[2]
    worked, stated = (re.findall(r"-?\d+", part) for part in (own_work(text), answer))
    return bool(worked and stated) and worked[-1] == stated[-1]


def number_of_pairs(group):
    """The mean is over pairs: each counts for its winner."""
    return winners_over_losers(group).sum(1).float()


DPO = Method(
    normalize="constant",  # a sum over tokens, divided by the pairs
    observe=("logp",),
    advantage=preferred,
    surrogate="likelihood",
    fresh=True,
    count=number_of_pairs,
    lr=0.5,
)
METHOD = Method(
    "VerIPO, arXiv 2505.19000: GRPO, then DPO on the same trees; its verifier is a rule here",
    then=DPO,
)
