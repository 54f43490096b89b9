"""NTHR: tokens of wrong answers that look like right ones are pushed down less (arXiv 2505.18830).

    s_t = g_tᵀ M h_t,   g = onehot(token) - π,   M = Σ over tokens of right answers g hᵀ
    tokens of wrong answers with s_t > τ weigh η = 2 |1/2 - p|,  τ = β min over right answers of
    their mean s,  p: the share of right answers

h is the vector that predicts a token. s measures how much a push on token t moves the right
answers' likelihood: GRPO lowers it without wanting to (lazy likelihood displacement).

Confirmed by the text and a tested third-party code: the formula, β = 1, g on the tokens that occur
in the group with the full softmax's denominator. All of it under the policy that sampled.
"""

import torch

from mgrpo import Method


def spared(group, beta=1.0):
    """-> [n, T] weights. group.tokens, logp, mask: [n, T]; hidden: [n, T, D]. The layer's `head`,
    [V, D], turns vectors into logits."""
    vocabulary, index = group.tokens[group.mask].unique(return_inverse=True)
    onehot = torch.zeros(*group.mask.shape, len(vocabulary))
    onehot[group.mask] = torch.nn.functional.one_hot(index, len(vocabulary)).float()
    # π over the group's own tokens: exp(logit - log Z). The sum Z over the whole vocabulary comes
    # from the sampled token, for which log Z = its logit minus its log-probability.
    head = group.layer.observed["head"]
    logits = group.hidden @ head[vocabulary].T  # [n, T, v]
    own = (logits * onehot).sum(-1)
    probabilities = (logits - (own - group.logp)[..., None]).exp()
    return alike(group.correct, group.hidden, onehot - probabilities, group.mask, beta)


def alike(correct, hidden, error, mask, beta=1.0):
    """The formula. correct: [n]; hidden: [n, T, D]; error: g, [n, T, v]; mask: [n, T] -> [n, T]."""
    weights, p = mask.to(hidden.dtype), correct.to(hidden.dtype).mean()
    if correct.all() or not correct.any():
        return weights
    right = correct[:, None] & mask
    M = error[right].T @ hidden[right]  # [v, D]
    s = torch.einsum("ntv,vd,ntd->nt", error, M, hidden)
    mean = (s * mask).sum(1) / mask.sum(1).clamp(min=1)  # [n]
    selected = ~correct[:, None] & mask & (s > beta * mean[correct].min())
    return weights.masked_fill(selected, float(2 * (0.5 - p).abs()))


METHOD = Method(
    "NTHR, arXiv 2505.18830: tokens of wrong answers that right ones need are spared",
    observe=("hidden", "logp", "head"),
    token_weight=spared,
)
