"""iGRPO: GRPO on refinements of the best draft (arXiv 2602.09000).

Half of the answers to a question are drafts. One of the best goes on, and the other half refines
it; only the refinements are trained, failures included. The best of N drafts is right with
probability 1 - (1 - p)^N, so refinements start from better answers than drafts do.

Confirmed: 4 drafts, 4 refinements, one of the best goes on, equation (1) among refinements, β = 0.
(The paper's learning rate is 1e-6, its temperature 0.7; here they are train.py's.) A stand-in: the
draft is followed by a guiding phrase, because the bases here read nothing else.
"""

import torch

from engine.keys import hash_seed
from mgrpo import Method, split_by


def best_drafts(layer, seed):
    """-> [B] bool: of the answers to each question one of those with the highest reward."""
    chosen = torch.zeros_like(layer.correct)
    for rows in split_by(layer.questions):
        best = rows[layer.rewards[rows] == layer.rewards[rows].max()].tolist()
        # 0xBE57: a stream of its own. The key is the number of the question's first row.
        key = hash_seed(seed, 0xBE57, int(layer.completions.numbers[rows[0]]))
        chosen[best[key % len(best)]] = True
    return chosen


def has_refinements(sizes):
    """Group sizes -> "", or what speaks against them."""
    return "" if len(sizes) > 1 and sizes[-1] > 1 else "compares refinements of a draft"


def refinements(group):
    """-> [n] bool: everything but drafts."""
    return torch.full_like(group.correct, group.number > 1)


METHOD = Method(
    "iGRPO, arXiv 2602.09000: refinements of the best draft are trained; the phrase is a stand-in",
    flags=dict(group_sizes=(4, 4)),
    sources=best_drafts,
    keep=refinements,
    fits=has_refinements,
)
