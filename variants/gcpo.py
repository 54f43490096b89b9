"""GCPO: advantages times a cosine that tells what an answer adds to the others (arXiv 2508.05428).

    Â_i α cos(z_i, Z̄_i - Z̄'_i + z̄)

z is the vector that predicts an answer's last token, z̄ their mean; Z̄_i and Z̄'_i are the same for
fused answers written without and with answer i.

Confirmed: the factor, α = 2. Left out: a second KL term, with 0.06, to something that is no
distribution.
Stand-ins: fused answers would need all answers in one prompt. Here Z̄_i is the mean z of the
corrections of other answers, Z̄'_i that of the corrections of i; without a next layer both are 0,
and the factor is α cos(z_i, z̄). A negative cosine turns the sign of an advantage.
"""

import torch

from mgrpo import Method


def by_cause(group, alpha=2.0):
    """-> [n] advantages. group.advantages: [n]; group.hidden: [n, T, D]."""
    z = last_vectors(group.layer, group.rows)
    without, fused = torch.zeros_like(z), torch.zeros_like(z)
    below = group.layers[group.number] if group.number < len(group.layers) else None
    if below is not None:
        among = torch.isin(below.parents, group.rows).nonzero()[:, 0]
        of, parents = last_vectors(below, among), below.parents[among]
        for i, row in enumerate(group.rows.tolist()):
            own = parents == row
            if own.any() and not own.all():
                without[i], fused[i] = of[~own].mean(0), of[own].mean(0)
    return times_cosine(group.advantages, z, without, fused, alpha)


def times_cosine(advantages, z, without, fused, alpha=2.0):
    """The formula. advantages: [n]; z, without, fused: [n, D] -> [n]."""
    direction = without - fused + z.mean(0)
    return advantages * alpha * torch.cosine_similarity(z, direction, dim=1)


def last_vectors(layer, rows):
    """-> [n, D], the vectors that predict the last sampled token of these rows."""
    return layer.observed["hidden"][rows, layer.lengths[rows] - 1]


METHOD = Method(
    "GCPO, arXiv 2508.05428: advantages times a cosine; corrections stand in for fused answers",
    flags=dict(group_sizes=(4, 3)),
    observe=("hidden",),
    advantage=by_cause,
)
