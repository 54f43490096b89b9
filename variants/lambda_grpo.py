"""λ-GRPO: every token's weight is divided by the answers that share it (arXiv 2509.21154).

    w_it = 1 / |{j : o_j agrees with o_i up to token t}|

GRPO gives a node of the tree of shared prefixes n times the mean advantage of its n answers.
Divided by n it is the mean, which is a process reward estimated by Monte Carlo: GRPO is secretly a
process reward model, but weighs nodes by how often they are visited.

Confirmed by the authors' code: the weights. The equivalence holds for the token mean and one update
a rollout, so these are the defaults here; the release's default is the mean of each row.
Denominators count tokens, not weights. A KL term is not weighed here (in the release it is).
"""

from mgrpo import Method


def one_over_sharing(group):
    """-> [n, T] weights. group.tokens: [n, T] ids; mask: [n, T] bool; parents: [n]."""
    tokens, mask = group.tokens, group.mask
    same = (tokens[:, None] == tokens) & mask[:, None] & mask  # [n, n, T]
    # Corrections of different answers share no node, whatever they say.
    same &= (group.parents[:, None] == group.parents)[..., None]
    sharing = same.cumprod(-1).sum(1)  # [n, T] answers that agree up to here, itself included
    return mask / sharing.clamp(min=1)


METHOD = Method(
    "λ-GRPO, arXiv 2509.21154: tokens weigh 1 / number of answers that share them",
    flags=dict(normalize="token", minibatches=1),
    token_weight=one_over_sharing,
)
