"""MGRPO: GRPO, called again one level down (Multi-Layer GRPO, arXiv 2506.04746). Rollouts,
advantages, loss: the paper is here.

    grep -n "MGRPO:" mgrpo.py train.py        # the lines where it differs from plain GRPO

Layer 1 is GRPO. For a question q the policy that samples, π_old, gives G attempts o_i; a rule
scores them, R_i; and

    Â_i = (R_i - mean(R_1..R_G)) / std(R_1..R_G)                                                         (1)  group_advantages
    J_1 = E 1/G Σ_i 1/|o_i| Σ_t [ min( r_it Â_i, clip(r_it, 1-ε, 1+ε) Â_i ) - β KL_it(π_θ || π_ref) ]    (2)  policy_loss
    r_it = π_θ(o_it | q, o_i<t) / π_old(o_it | q, o_i<t)                                                 (3)

Layer 2 is the same with another prompt. Each attempt goes on as  q o_i "\\n" phrase,  the phrase
                                                                  one of seven such as "Wait, let me
double-check that."; the policy gives H corrections c_ij of it, scored by the same rule; and

    Â_ij = (R_ij - mean(R_i1..R_iH)) / std(R_i1..R_iH)        over the siblings of one attempt
                                                              (1) again
    J_2  = (2) with q replaced by (q, o_i, phrase), o_i by c_ij, G by H; then J = J_1 + w J_2
         (2) again

The copied attempt and the phrase are prompt: no loss on them. Mending errors is rewarded by the
final answer alone, and in that sense supervises the process without a process reward model.

Deviations from the paper, and what is not known of it (this was written without the full text or
official code; the seven phrases and the settings come from public re-implementations):
 1. The layer-2 prompt is the model's own turn continued (phrases 5 and 6 stop in mid-sentence and
    fit nowhere else). The paper's template is unknown. For our tiny model the layer-1 template is
    the question and a newline; a real one has its own (prompts.py).
 2. The formula of J_2, the weight w and the order of updates are unknown: the same form, w = 1, one
    joint step; `--update alternating` steps on layer 1 first.
 3. "Failed corrections are discarded" read literally gives no gradient: what is left of a group has
    equal rewards, so (1) is 0. Default: normalise over all H, THEN discard (`--failed mask`): rare
    fixes weigh most. `keep` is plain GRPO in layer 2; `raw` takes the reward itself as advantage,
    so confirmations in all-right groups count too.
 4. H, the temperature, the optimiser and the epochs are unknown: see train.py's defaults.
 5. Whether right attempts enter layer 2 is unknown: all do by default (`--sources`). With wrong
    ones only, nothing teaches the policy to leave a right answer alone.
 6. std is the sample standard deviation (n - 1) with 1e-4 added, as TRL and verl have it; the
 formula's may divide by n.
 7. No KL term by default (β = 0; the paper's 0.001 is `--kl-coef 0.001`); with one, discarded
 corrections are free of it too.
 8. Rows whose advantage is 0 (and KL off) are left out of the forward pass. They count in every
    denominator, so loss and gradient are what they would be.
 9. π_old is the sampler's own log-probability, in bf16 where compute is bf16 (the log's gauge shows
    how near it is). A rollout makes two optimiser steps by default, each on half of the questions;
    the gradient is clipped to norm 1.

Letters: P questions, G attempts, H corrections per attempt, B rows, T tokens of a completion, S
tokens of prompt + completion.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from engine.kernels import fold
from huggingface.tokenizer import PHRASES
from model import token_logprobs
from reward import score
from runtime.bars import rows_of
from sample import filtering
from tasks.catalog import phrase_text, prompts_and_golds

# |log r| is cut here before exp: e^20 is far outside of any clip range, and finite
MAX_LOG_RATIO = 20.0


# ---- advantages ----------------------------------------------------------------------------------


def group_advantages(rewards, groups, std=True, eps=1e-4):
    """Equation (1). rewards: [B]; groups: [B] integers, equal for siblings -> advantages [B] fp32.

    Exactly 0 where all siblings have the same reward, found by max == min: their std as computed
    may be 1e-9. std=False leaves R - mean (Dr. GRPO, arXiv 2503.20783).
    """
    rewards, n = rewards.float(), int(groups.max()) + 1
    count = torch.zeros(n).index_add_(0, groups, torch.ones_like(rewards))
    mean = torch.zeros(n).index_add_(0, groups, rewards) / count.clamp(min=1)
    centred = rewards - mean[groups]
    least = torch.zeros(n).scatter_reduce(0, groups, rewards, "amin", include_self=False)
    most = torch.zeros(n).scatter_reduce(0, groups, rewards, "amax", include_self=False)
    centred = centred.masked_fill((least == most)[groups], 0.0)
    if not std:
        return centred
    variance = torch.zeros(n).index_add_(0, groups, centred**2) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + eps)[groups]


def layer2_advantages(rewards, correct, siblings, failed="mask"):
    """MGRPO: layer 2's advantages and who is trained, [B] each, for corrections with these rewards.

    correct: [B] bool; siblings: [B], equal for corrections of the same attempt (this isolates the
    skill of correcting) or of the same question (this also credits the luck of a better attempt;
    needed when H = 1, where an attempt's group is a single row). failed: "mask" (normalise over all
    siblings, then discard failures: positive advantages only, sqrt((1-p)/p · (n-1)/n) for a share p
    of successes among n) | "keep" (failures push down, as in layer 1) | "raw" (advantage = reward;
    failures discarded).
    """
    advantages = rewards.float() if failed == "raw" else group_advantages(rewards, siblings)
    trained = torch.ones_like(correct) if failed == "keep" else correct
    return advantages.masked_fill(~trained, 0.0), trained


def choose_sources(correct, questions, rule="all"):
    """MGRPO: which attempts go on to layer 2. correct: [B] bool; questions: [B] -> ascending row
    indices.

    "all" | "wrong" (no pressure against breaking right answers) | "balanced" (one right and one
    wrong attempt a question, the first of each; of a question whose attempts are all right or all
    wrong, one).
    """
    if rule != "balanced":
        return (torch.ones_like(correct) if rule == "all" else ~correct).nonzero()[:, 0]
    seen, rows = set(), []
    for row, kind in enumerate(zip(questions.tolist(), correct.tolist())):
        if kind not in seen:
            seen.add(kind)
            rows.append(row)
    return torch.tensor(rows)


# ---- loss ----------------------------------------------------------------------------------------


def kl_estimate(logp, ref_logp, kl="k3"):
    """Per-token estimate of KL(π || π_ref) from one sampled token, elementwise; d = log π_ref - log
    π.

    k1 = -d: unbiased, but as a LOSS its expected gradient is 0: it does nothing. k2 = d²/2: biased
    as a value, its expected gradient is exactly that of KL(π || π_ref). k3 = e^d - 1 - d: unbiased,
    never negative, low variance; its expected gradient is that of KL(π_ref || π), the other
    direction. k3 is what GRPO uses (arXiv 2402.03300, eq. 4). tests/test_mgrpo.py checks values and
    gradients exactly.
    """
    d = (ref_logp - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kl == "k1":
        return -d
    return d**2 / 2 if kl == "k2" else torch.expm1(d) - d


def loss_denominator(lengths, normalize, max_new_tokens):
    """What the summed loss of these rows is divided by, counted over a whole optimiser step BEFORE
    its first backward pass.

    lengths: [B] sampled tokens a row. "sequence": rows, each the mean of its tokens (the paper).
    "token": tokens, so long rows weigh more (DAPO). "constant": rows x max_new_tokens, so a token
    weighs the same in every row and step (Dr. GRPO).
    """
    if normalize == "sequence":
        return len(lengths)
    return int(lengths.sum()) if normalize == "token" else len(lengths) * max_new_tokens


def policy_loss(
    logp,
    old_logp,
    advantages,
    mask,
    *,
    clip_low=0.2,
    clip_high=0.2,
    ref_logp=None,
    kl_coef=0.0,
    kl="k3",
    normalize="sequence",
    denominator=None,
):
    """Equation (2) with its sign turned, for rows of either layer: nothing here knows which.

    logp: [B, T] fp32 log π_θ of the sampled tokens, with gradient; old_logp: the sampler's;
    advantages: [B]; mask: [B, T] bool, True on sampled tokens, end token included. denominator: see
    `loss_denominator`; by default that of this batch alone, T being the constant. -> loss, sums
    over the masked tokens {tokens, clipped, kl, ratio}.
    """
    log_ratio = (logp - old_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()  # (3)
    A = advantages[:, None]
    surrogate = torch.min(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)  # [B, T]
    divergence = kl_estimate(logp, ref_logp, kl) if kl_coef else torch.zeros_like(logp)
    loss = (kl_coef * divergence - surrogate) * mask
    if denominator is None:
        denominator = loss_denominator(mask.sum(1), normalize, mask.shape[1])
    if normalize == "sequence":
        loss = loss / mask.sum(1, keepdim=True).clamp(min=1)  # 1/|o_i|
    # no gradient there
    clipped = ((A > 0) & (ratio > 1 + clip_high)) | ((A < 0) & (ratio < 1 - clip_low))
    sums = dict(
        tokens=mask.sum(),
        clipped=(clipped & mask).sum(),
        kl=(divergence * mask).sum(),
        ratio=(ratio * mask).sum(),
    )
    return loss.sum() / max(denominator, 1), {name: value.detach() for name, value in sums.items()}


# ---- rollouts ------------------------------------------------------------------------------------


@dataclass
class Layer:
    """One generation of the tree, scored: B rows, siblings side by side. All tensors are [B] and on
    the CPU."""

    completions: Any  # sample.Completions
    texts: list  # what was sampled, decoded, end token left out
    rewards: torch.Tensor
    correct: torch.Tensor  # bool
    questions: torch.Tensor  # which of the P questions
    parents: torch.Tensor  # layer 1: the question; layer 2: the row of the attempt
    siblings: torch.Tensor = None  # the group whose mean and std make the advantages
    advantages: torch.Tensor = None
    trained: torch.Tensor = None  # bool: in the loss at all
    # bool: the verifier failed, and the reward is 0 for want of another
    undecided: torch.Tensor = None
    phrases: list = None  # the guiding phrase of each row; None in layer 1

    @functools.cached_property
    def lengths(self):
        return self.completions.lengths.cpu()

    def active(self, kl_coef):
        """Rows that carry a gradient, [B] bool: a KL term acts on every trained row, the rest only
        where Â is not 0."""
        return self.trained if kl_coef else self.trained & (self.advantages != 0)


class Sampling(NamedTuple):
    """How rollouts are drawn, in both layers."""

    max_new_tokens: int
    temperature: float
    seed: int  # of this step: fold(run's seed, step)
    format_weight: float = 0.0
    first_row: int = 0  # number of the first row, when a batch is a part of a larger one
    filters: dict = {}  # top_k, top_p, min_p: in evaluation only
    verifier: Any = None  # reward.score's; None: its own rules


def expand(sampler, encoding, golds, prefixes, n, how, above=None, rows=None):
    """THE operation of a rollout: continue each prefix n times and score what comes out -> Layer
    without advantages.

    Layer 1: prefixes are prompts, golds their answers. Layer 2: `above` is layer 1, `rows` the
    attempts that go on, prefixes the phrases appended to them.
    """
    if above is None:
        completions = sampler.generate(
            prefixes, n, how.max_new_tokens, how.temperature, how.seed, how.first_row, **how.filters
        )
    else:
        completions = sampler.extend(
            above.completions,
            prefixes,
            n,
            how.max_new_tokens,
            how.temperature,
            how.seed,
            rows,
            **how.filters,
        )
    parents = completions.parents.cpu()
    questions = parents if above is None else above.questions[parents]
    texts = encoding.decode_batch(completions.ids)
    results = [
        score(text, golds[q], how.format_weight, how.verifier)
        for text, q in zip(texts, questions.tolist())
    ]
    return Layer(
        completions,
        texts,
        torch.tensor([r.total for r in results]),
        torch.tensor([r.accuracy == 1 for r in results]),
        questions,
        parents,
        undecided=torch.tensor([r.failed == 1 for r in results]),
    )


def draw_phrases(seed, attempts):
    """MGRPO: one of the seven guiding phrases for each attempt, keyed by its number: drawn alike
    whatever batch it is in."""
    return [PHRASES[fold(seed, 0x9A5E, number) % len(PHRASES)] for number in attempts]


def second_look(sampler, encoding, golds, first, n, how, sources="all"):
    """MGRPO: expand, one level down: attempts chosen by `sources`, a phrase behind each, n
    corrections -> Layer, None if no attempt goes on."""
    rows = choose_sources(first.correct, first.questions, sources)
    if not len(rows):
        return None
    phrases = draw_phrases(how.seed, first.completions.numbers[rows].tolist())
    prefixes = [encoding.encode_ordinary(phrase_text(phrase)) for phrase in phrases]
    layer = expand(sampler, encoding, golds, prefixes, n, how, first, rows)
    layer.phrases = [phrase for phrase in phrases for _ in range(n)]
    return layer


def collect(
    sampler,
    encoding,
    problems,
    attempts,
    corrections,
    how,
    *,
    layers=2,
    sources="all",
    failed="mask",
    group="attempt",
):
    """A rollout: the tree of each problem, scored, with advantages -> [layer 1] or [layer 1, layer
    2].

    attempts: G; corrections: H; the other switches: choose_sources, layer2_advantages. layers=1 is
    plain GRPO. Raises ValueError for rollouts that top-k, top-p or min-p would cut: their
    log-probabilities are not the policy's.
    """
    if filtering(**how.filters):
        raise ValueError(
            "a training rollout must be drawn from the whole distribution, since its "
            "log-probabilities are trained: no top-k, "
            "top-p or min-p"
        )
    prompts, golds = prompts_and_golds(encoding, problems)
    with rows_of(sampler, len(prompts) * attempts, "attempts"):
        first = expand(sampler, encoding, golds, prompts, attempts, how)
    first.siblings, first.trained = first.questions, torch.ones_like(first.correct)
    first.advantages = group_advantages(first.rewards, first.siblings)
    if layers == 1:
        return [first]
    with rows_of(
        sampler,
        len(choose_sources(first.correct, first.questions, sources)) * corrections,
        "corrections",
    ):
        # MGRPO: the second layer
        second = second_look(sampler, encoding, golds, first, corrections, how, sources)
    if second is None:
        return [first]
    second.siblings = second.parents if group == "attempt" else second.questions
    second.advantages, second.trained = layer2_advantages(
        second.rewards, second.correct, second.siblings, failed
    )
    return [first, second]


# ---- from a rollout to log-probabilities ---------------------------------------------------------


class Rows(NamedTuple):
    """A micro-batch of prompts and what follows them, padded on the right."""

    tokens: torch.Tensor  # [B, S] prompt + completion, zeros behind
    prompt_lengths: torch.Tensor  # [B]
    lengths: torch.Tensor  # [B] completion tokens, end token included
    mask: torch.Tensor  # [B, T] bool, True on completion tokens
    needed: int  # how many of the B x S tokens are not padding


def pad_rows(prompts, completions, device):
    """Two lists of token-id lists -> Rows. The mask comes from the lengths, never from token
    values: a sampled 0 is an action too.

    S is rounded up to one of 8 sizes an octave, since libraries keep a kernel for every shape that
    they have met.
    """
    lengths = torch.tensor([len(c) for c in completions], device=device)
    rows = [p + c for p, c in zip(prompts, completions)]
    S = max(map(len, rows))
    S += -S % (1 << max(0, S.bit_length() - 4))
    tokens = torch.tensor([row + [0] * (S - len(row)) for row in rows], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    return Rows(
        tokens,
        torch.tensor([len(p) for p in prompts], device=device),
        lengths,
        mask,
        sum(map(len, rows)),
    )


def targets(layer, index):
    """What the loss needs of rows `index` of a layer besides their log-probabilities, on the
    sampler's device -> old_logp [B, T], advantages [B], mask [B, T]: True on sampled tokens."""
    c, lengths = layer.completions, layer.lengths[index]
    mask, device = torch.arange(int(lengths.max())) < lengths[:, None], c.tokens.device
    return (
        c.logprobs[sent(index, device), : mask.shape[1]],
        sent(layer.advantages[index], device),
        sent(mask, device),
    )


def sent(x, device):
    """A tensor of the host on a device; the host does not wait for the copy, nor for what the
    device does before it."""
    return (
        x.pin_memory().to(device, non_blocking=True)
        if torch.device(device).type == "cuda"
        else x.to(device)
    )


def completion_logprobs(model, rows, temperature=1.0):
    """log π of the sampled tokens under `model`, and its entropy there -> two fp32 [B, T], zeros
    behind each row's end.

    Off by one: with a prompt of 2 tokens, a b | c d, the vectors at b (column 1) and c (column 2)
    predict c and d: columns prompt_length - 1 onwards. Only they meet the vocabulary.
    """
    row, t = rows.mask.nonzero(as_tuple=True)  # the M sampled tokens
    column = rows.prompt_lengths[row] + t  # where each stands
    # [M, D]; padding may reach beyond the context
    hidden = model(rows.tokens[:, :-1][:, : model.config.context])[row, column - 1]
    logp, entropy = token_logprobs(hidden, model.head.weight, rows.tokens[row, column], temperature)
    blank = torch.zeros(rows.mask.shape, device=logp.device)
    return blank.index_put((row, t), logp), blank.index_put((row, t), entropy)
