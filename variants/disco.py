"""DisCO: right answers against wrong ones, without normalisation (arXiv 2505.12366).

    L_q = τ log mean over wrong j exp(s_j / τ)  -  mean over right i of s_i
    loss = mean over all questions of L_q,  + β max(KL - δ, 0) KL with the first factor held fixed

s is the mean log-probability of an answer under the current policy. Equation (1) gives easy and
hard questions less weight than middling ones; this does not. Of wrong answers the likeliest are
pushed down most.

dL/ds is -1/n+ for right answers and a softmax over the wrong ones. These slopes are constants of an
optimiser step: with minus the slope as "advantage" and A log π as loss, the gradient is L's, and
neither micro-batches nor ranks matter.

Confirmed by the released code (DisCO@bd2b078, core_algos.py): L with τ = 10, δ = 1e-4, β = 1e3. (A
plain mean over wrong answers is tau=inf. Left out: mean ratios as scores, with τ = 1.) KL is the
mean of log π_old - log π over the sampled tokens of the optimiser step; there a micro-batch is the
unit of mean, KL and constraint. Paper: 8 rollouts, temperature 0.6, learning rate 2e-6.
"""

import torch

from mgrpo import Method


def slopes(group, tau=10.0):
    """-> [n] advantages. group.correct: [n]; new_logp, mask: [n, T]."""
    scores = (group.new_logp * group.mask).sum(1) / group.mask.sum(1).clamp(min=1)
    return discriminate(group.correct, scores, tau)


def discriminate(correct, scores, tau=10.0):
    """The formula: minus dL/ds. correct: [n] bool; scores: [n] -> [n]."""
    if correct.all() or not correct.any():
        return torch.zeros_like(scores)
    advantages = correct.to(scores.dtype) / correct.sum()
    advantages[~correct] = -(scores[~correct] / tau).softmax(0)
    return advantages


def one_question(group):
    """The mean is over questions, those without a signal included: 1, shared by the rows."""
    return torch.full_like(group.advantages, 1 / len(group.rows))


def held_to(kl, delta=1e-4, beta=1e3):
    """-> weight of the KL in the loss, a number."""
    return beta * max(kl - delta, 0.0)


METHOD = Method(
    "DisCO, arXiv 2505.12366: right against wrong ones, held by a KL",
    observe=("logp",),
    advantage=slopes,
    surrogate="likelihood",
    normalize="sequence",  # a score is a mean over tokens
    fresh=True,
    count=one_question,
    constraint=held_to,
)
