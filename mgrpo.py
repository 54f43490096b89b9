"""MGRPO (Multi-Layer GRPO, arXiv 2506.04746): phrases, rollout, advantages, loss, and what a
method is.

    grep -n "MGRPO:" mgrpo.py train.py        # the lines where it differs from plain GRPO

Layer 1 is GRPO. For a question q the policy that samples, π_old, gives G answers o_i. A rule scores
them, R_i, and

    Â_i  = (R_i - mean(R_1..R_G)) / std(R_1..R_G)                      (1)  group_advantages
    J_1  = E 1/G Σ_i 1/|o_i| Σ_t [ min(r_it Â_i, clip(r_it, 1-ε, 1+ε) Â_i)
                                   - β KL_it(π_θ || π_ref) ]           (2)  policy_loss
    r_it = π_θ(o_it | q, o_i<t) / π_old(o_it | q, o_i<t)               (3)  policy_loss

Layer 2 is the same with another prompt. Each answer goes on as  q o_i "\\n" phrase;  the phrase is
one of seven such as "Wait, let me double-check that.". The policy gives H corrections c_ij of o_i:

    Â_ij = (R_ij - mean(R_i1..R_iH)) / std(R_i1..R_iH)                 (1)  among siblings
    J_2  = (2) with q replaced by (q, o_i, phrase), o_i by c_ij, G by H
    J    = w_1 J_1 + w_2 J_2 + ...                                     (2)  one sum over the layers

Layer k continues the answers of layer k - 1 in the same way. The copied answers and phrases are
prompt: no loss is on them. Each completion is rewarded for the answer that it states, not for its
reasoning.

Deviations from the paper, and what is not known of it. (This was written without the full text and
without official code. Phrases and settings come from public re-implementations.)
 1. The prompt of layer 2 continues the model's own turn: phrases 5 and 6 stop in mid-sentence and
    fit nowhere else. The paper's template is unknown. Layer 1's template is the task's.
 2. The formula of J_2, the weights w and the order of updates are unknown. Here: the same form,
    w = 1, one joint step.
 3. "Failed corrections are discarded", read literally, gives no gradient: what is left of a group
    has equal rewards, so (1) is 0. Default (`failed=mask`): normalise over all siblings, THEN
    discard: a failed correction counts in its siblings' mean and std and in the denominator, but
    has no gradient. So rare fixes weigh most. `keep` is plain GRPO in layer 2. `raw` takes the
    reward itself as advantage there, so confirmations in all-right groups count too.
 4. H, the temperature, the optimiser and the epochs are unknown: see the defaults of train.py.
 5. Whether right answers enter layer 2 is unknown. By default all do (`sources=all`): with wrong
    ones only, no example teaches the policy to leave a right answer alone.
 6. std is the sample standard deviation (n - 1) plus 1e-4, as in TRL and verl. The paper's formula
    may divide by n.
 7. No KL term by default (β = 0; the paper's 0.001 is `--kl-coef 0.001`). With one, discarded
    corrections are free of it too.
 8. Rows whose advantage is 0 (and KL off) are left out of the forward pass. They count in every
    denominator, so loss and gradient are what they would be.
 9. π_old is the sampler's own log-probability, in bf16 where compute is bf16. The log's `gauge`
    is |log π_θ - log π_old| before the first update. A rollout makes two optimiser steps by
    default, each on half of the questions.
10. By default siblings are all corrections of one question (`siblings=question`): the policy
    learns more here at about the same cost (docs/controls.md). `parent` compares those of one
    answer, as above.

The relatives of GRPO differ from it in a few places: the reward, the advantage, which rows and
tokens are trained, the loss. A Method (below) names these places; variants/ holds a file for each
relative. GRPO and MGRPO are Methods too. `--method-args failed=keep,siblings=parent` changes one.

Words: a completion is what the policy samples; it is called an answer in layer 1, a correction from
layer 2 on. A row is a completion by its number in a layer; siblings are the rows that are compared.

Letters: P questions, g_k completions of each prompt in layer k (g_1 = G, g_2 = H), B rows, T tokens
of a completion.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from engine.keys import hash_seed
from engine.packing import to_device
from reward import extract_answer, score

MAX_LOG_RATIO = 20.0  # |log r| is cut here before exp: e^20 is finite, and far outside of any clip

# The guiding phrases, as public re-implementations of the paper list them.
PHRASES = (
    "Where might I have gone wrong this time? Let me double-check carefully.",
    "Wait, let me double-check that.",
    "Wait a minute, let me make sure I didn't make a mistake.",
    "Hmm, let me think if there's another way to approach this problem.",
    "Wait, maybe I can think about it like this:",
    "Another thought: maybe I can",
    "But wait, let me just make sure I didn't miss anything in the original problem.",
)


# ---- the guiding phrase --------------------------------------------------------------------------


def phrase_text(phrase):
    """What is appended to an answer: "\\n" and the phrase. The model goes on in its own turn."""
    return "\n" + phrase


def longest_phrase(encoding):
    """Tokens of the longest guiding phrase, as it is appended."""
    return max(len(encoding.encode_ordinary(phrase_text(phrase))) for phrase in PHRASES)


def draw_phrases(seed, layer_number, row_numbers):
    """MGRPO: one guiding phrase for each answer that layer `layer_number` (2, 3, ...) continues.

    row_numbers: Completions.numbers of these answers. A phrase depends on (seed, layer, row number)
    only, so it is the same whatever batch or rank the answer is in.
    """
    # 0x9A5E: a stream of its own, apart from the sampler's.
    keys = (hash_seed(seed, 0x9A5E + layer_number - 2, number) for number in row_numbers)
    return [PHRASES[key % len(PHRASES)] for key in keys]


# ---- rollout -------------------------------------------------------------------------------------


class SamplingParams(NamedTuple):
    """How completions are drawn, in all layers."""

    max_new_tokens: int
    temperature: float
    seed: int  # of this step: hash_seed(the run's seed, step)
    first_row: int = 0  # number of the first row, when a batch is a part of a larger one
    filters: dict = {}  # top_k, top_p, min_p: for evaluation only, see sample.filtered


@dataclass
class Layer:
    """One generation of answers, scored: B rows, siblings side by side. Tensors are on the CPU."""

    number: int  # 1: answers to the question, 2: corrections of them, ...
    completions: Any  # sample.Completions
    texts: list  # B decoded completions, without the end token
    answers: list  # B tuples: the answers stated from layer 1 down to the row's own (None: none)
    rewards: torch.Tensor  # [B] fp32
    correct: torch.Tensor  # [B] bool
    undecided: torch.Tensor  # [B] bool: the verifier failed, so the accuracy is 0
    questions: torch.Tensor  # [B] which of the P questions
    parents: torch.Tensor  # [B] row of the layer above that was continued; layer 1: the question
    problems: list = None  # B problems
    encoding: Any = None  # the task's, of ids and text
    phrases: list = None  # B phrases before the completions; None in layer 1
    # See `credit`.
    siblings: torch.Tensor = None  # [B] equal for rows whose mean and std make the advantages
    shaped: torch.Tensor = None  # [B] fp32: rewards as the method changes them
    advantages: torch.Tensor = None  # [B] fp32
    trained: torch.Tensor = None  # [B] bool: in the loss at all
    token_weights: torch.Tensor = None  # [B, T] fp32, times the surrogate; None: all 1
    given: torch.Tensor = None  # [B] bool: text that the method put there; None: all was sampled
    sampled_correct: torch.Tensor = None  # [B] bool: before the method put text there
    counts: torch.Tensor = None  # [B] fp32: a row's part of the denominator; None: --normalize's
    observed: dict = field(default_factory=dict)  # name -> [B, ...], see Method.observe

    @functools.cached_property
    def lengths(self):
        """[B] sampled tokens, end token included."""
        return self.completions.lengths.cpu()

    @functools.cached_property
    def mask(self):
        """[B, T] bool: the sampled tokens, end token included.

        From the lengths, never from token values: a sampled 0 is an action too.
        """
        return torch.arange(int(self.lengths.max())) < self.lengths[:, None]

    @functools.cached_property
    def tokens(self):
        """[B, T] ids of the sampled tokens, end token included, zeros behind."""
        return self.completions.tokens.cpu()[:, : self.mask.shape[1]]

    @functools.cached_property
    def old_logp(self):
        """[B, T] fp32 log π_old of them."""
        return self.completions.logprobs.cpu()[:, : self.mask.shape[1]]

    @functools.cached_property
    def pieces(self):
        """B lists: the bytes of each token, but of no end token. (Real vocabularies have ids that
        are no text.)"""
        return [[bytes_of(self.encoding, token) for token in ids] for ids in self.completions.ids]

    @functools.cached_property
    def truncated(self):
        """[B] bool: cut off at max_new_tokens."""
        return ~self.completions.ended.cpu()

    @functools.cached_property
    def changed(self):
        """[B] bool: the correction states another answer than the one it corrects."""
        return torch.tensor([answers[-1] not in answers[-2:-1] for answers in self.answers])

    @functools.cached_property
    def fresh(self):
        """[B] bool: it states an answer that stands nowhere above it."""
        return torch.tensor([answers[-1] not in answers[:-1] for answers in self.answers])

    def active(self, kl_coef):
        """[B] bool: rows with a gradient. A KL term acts on all trained rows."""
        return self.trained if kl_coef else self.trained & (self.advantages != 0)


def bytes_of(encoding, token):
    try:
        return encoding.decode_single_token_bytes(token)
    except KeyError:
        return b""


def step_seed(seed, step):
    """The seed of a step's rollout: all its random numbers derive from it and from row numbers."""
    return hash_seed(seed, step)


def rollout(sampler, task, problems, group_sizes, sampling, sources="all", format_weight=0.0):
    """Grows a tree of answers on each problem -> [Layer 1, ..., Layer N], without advantages.

    task, problems: see tasks/. group_sizes: g_1 .. g_N, so (16,) is GRPO and (4, 3) is MGRPO.
    sources: see `choose_sources`. Ends early when no answer is selected.
    """
    grow = functools.partial(
        expand, sampler, task, problems, sampling=sampling, format_weight=format_weight
    )
    # Layer 1 has P g_1 rows, layer 2 (if all its answers go on) P g_1 g_2, and so on.
    layers = [grow(n=group_sizes[0])]
    for number, n in enumerate(group_sizes[1:], 2):  # MGRPO: the same, one level down
        above = layers[-1]
        rows = choose_sources(above, sources, sampling.seed)
        if len(rows) == 0:
            break
        phrases = draw_phrases(sampling.seed, number, above.completions.numbers[rows].tolist())
        layers.append(grow(n=n, above=above, rows=rows, phrases=phrases))
    return layers


def expand(
    sampler, task, problems, n, sampling, above=None, rows=None, phrases=None, format_weight=0.0
):
    """THE operation of a rollout: continue each prefix n times and score the completions -> Layer.

    Layer 1: a prefix is the prompt of a problem. Below: a prefix is a row of the Layer `above`, of
    the ascending numbers `rows`, and its phrase.
    """
    limits = (n, sampling.max_new_tokens, sampling.temperature, sampling.seed)
    if above is None:
        prompts = [task.prompt_ids(problem) for problem in problems]
        completions = sampler.generate(prompts, *limits, sampling.first_row, **sampling.filters)
        parents = questions = completions.parents.cpu()  # [B]
    else:
        # MGRPO: the prompt is the parent's prompt + its answer without the end token + "\n" + the
        # phrase (Sampler.continued joins token ids). Only the phrase is not in the KV cache yet.
        phrase_ids = [task.encoding.encode_ordinary(phrase_text(phrase)) for phrase in phrases]
        completions = sampler.extend(
            above.completions, phrase_ids, *limits, rows, **sampling.filters
        )
        parents = completions.parents.cpu()  # [B]
        questions = above.questions[parents]

    # The verifier sees the text of this layer alone: a correction must state its answer.
    # One by one: tiktoken's decode_batch starts threads, which takes longer than all of the work.
    texts = [task.encoding.decode(ids) for ids in completions.ids]
    golds = [problems[q].gold for q in questions.tolist()]
    scores = [score(text, gold, format_weight, task.verifier) for text, gold in zip(texts, golds)]
    before = [()] * len(texts) if above is None else [above.answers[i] for i in parents.tolist()]
    answers = [(*stated, extract_answer(text)) for stated, text in zip(before, texts)]
    return Layer(
        1 if above is None else above.number + 1,
        completions,
        texts,
        answers,
        rewards=torch.tensor([s.total for s in scores]),
        correct=torch.tensor([s.accuracy == 1 for s in scores]),
        undecided=torch.tensor([s.failed == 1 for s in scores]),
        questions=questions,
        parents=parents,
        problems=[problems[q] for q in questions.tolist()],
        encoding=task.encoding,
        phrases=None if above is None else [phrase for phrase in phrases for _ in range(n)],
    )


SOURCES = {
    "all": lambda layer, seed: torch.ones_like(layer.correct),
    "wrong": lambda layer, seed: ~layer.correct,  # no pressure against breaking right answers
}


def choose_sources(layer, rule="all", seed=0):
    """MGRPO: which answers of a Layer the next layer continues -> ascending row numbers.

    rule: a name in SOURCES, or a function of (layer, seed) that gives a [B] bool.
    """
    return SOURCES.get(rule, rule)(layer, seed).nonzero()[:, 0]


# ---- advantages ----------------------------------------------------------------------------------


def group_advantages(rewards, groups, std=True, eps=1e-4):
    """Equation (1). rewards: [B]; groups: [B] integers, equal for siblings -> advantages [B] fp32.

    Exactly 0 where all siblings have the same reward, found by max == min: their std as computed
    may be 1e-9. std=False leaves R - mean (Dr. GRPO, arXiv 2503.20783).
    """
    # Groups may differ in size, and rows of a group need not lie side by side: sums go by number.
    rewards, n = rewards.float(), int(groups.max()) + 1
    count = torch.zeros(n).index_add_(0, groups, torch.ones_like(rewards))
    mean = torch.zeros(n).index_add_(0, groups, rewards) / count.clamp(min=1)
    centred = rewards - mean[groups]
    # A group without a signal has one reward. In fp32 the mean of seven times 0.1 is not 0.1: its
    # rows would have tiny advantages, and go through the model for nothing.
    least = torch.zeros(n).scatter_reduce(0, groups, rewards, "amin", include_self=False)
    most = torch.zeros(n).scatter_reduce(0, groups, rewards, "amax", include_self=False)
    centred = centred.masked_fill((least == most)[groups], 0.0)
    if not std:
        return centred
    variance = torch.zeros(n).index_add_(0, groups, centred**2) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + eps)[groups]


# ---- what a method is ----------------------------------------------------------------------------


def split_by(labels):
    """labels: [B] integers -> the row numbers of each label, ascending, a tensor for each."""
    order = labels.argsort(stable=True)
    return order.split(labels[order].unique_consecutive(return_counts=True)[1].tolist())


@dataclass
class Group:
    """Siblings, the n rows of a layer that are compared: all that a Method's functions see.

    Whatever a Layer has of its B rows, a Group has of its n: rewards [n] (from `advantage` on those
    that `reward` made), correct [n], lengths [n], tokens and mask [n, T], old_logp [n, T], texts,
    problems, advantages; and what the method observes: entropy [n, T], hidden [n, T, D], ...
    """

    layers: list  # of the rollout
    layer: Any  # theirs
    rows: torch.Tensor  # [n] their numbers
    memory: dict  # what the method keeps from step to step

    @property
    def number(self):
        return self.layer.number

    @property
    def rewards(self):
        return self.layer.shaped[self.rows]

    def __getattr__(self, name):
        if name.startswith("__"):  # what copy and pickle ask for
            raise AttributeError(name)
        layer = self.layer
        if name not in layer.observed and not hasattr(layer, name):
            raise AttributeError(f"a group has no {name}: does the method's `observe` name it?")
        column = layer.observed[name] if name in layer.observed else getattr(layer, name)
        if isinstance(column, torch.Tensor):
            return column[self.rows]
        return column and [column[row] for row in self.rows.tolist()]


@dataclass(frozen=True)
class Method:
    """What distinguishes a method, in the order of a training step. The defaults are GRPO's.

    Functions take a Group of n siblings, where no other arguments are named. Their keyword
    arguments are the method's constants; --method-args changes these, sources, siblings and failed.
    """

    # What --help and the log say: the paper, and what here stands in for what is not known of it.
    about: str = ""
    flags: dict = field(default_factory=dict)  # defaults of train.py's flags that belong to it

    # The rollout: answers that the next layer continues, see `choose_sources`; corrections that are
    # compared, of one "parent" or of one "question". fits: group sizes -> "", or why not these.
    sources: Any = "all"
    siblings: str = "question"
    fits: Callable = None
    # (Layer 1, seed) -> {row: text}: answers to be replaced before anything is compared.
    rewrite: Callable = None

    # What it looks at in a pass without gradient under the policy that sampled: "entropy" [B, T],
    # "hidden" [B, T, D] (the vectors that predict the tokens); under the reference: "ref_logp"
    # [B, T], "ref_hidden". The reference is the base, unless it follows the policy: every
    # `follow_every` steps it moves to decay * itself + (1 - decay) * policy.
    observe: tuple = ()
    decay: float = 1.0
    follow_every: int = 10
    # (layers, memory, gather): renews what is kept from step to step, a dict of numbers and tensors
    # that saved states hold. gather: a list of this rank -> that of all ranks.
    learn: Callable = None

    # Credit.
    reward: Callable = None  # -> [n] instead of the verifier's
    advantage: Callable = None  # -> [n] instead of equation (1), which group.advantages has
    alone: bool = False  # whether a row without siblings can have an advantage
    # -> [n] bool: has a gradient. A row without one counts in mean, std and denominators.
    keep: Callable = None
    token_weight: Callable = None  # -> [n, T], times the surrogate of each token

    # The loss. surrogate: "clipped", equation (2), or "likelihood", A log π. fresh: advantages are
    # made anew before each optimiser step, from "new_logp" [B, T], the policy's there.
    surrogate: str = "clipped"
    fresh: bool = False
    count: Callable = None  # -> [n] the rows' parts of the denominator, instead of --normalize's
    normalize: str = ""  # instead of --normalize
    constraint: Callable = None  # mean of log π_old - log π, a KL -> weight of that KL in the loss
    then: Any = None  # a second Method for the same trees, with optimiser steps of its own
    lr: float = 1.0  # times --lr, in `then`


def successes(group):
    """MGRPO: failed corrections are discarded, AFTER all siblings were normalised -> [n] bool.

    With a share p of successes among n siblings a success has sqrt((1-p)/p · (n-1)/n): rare fixes
    weigh most.
    """
    return group.correct | (group.number == 1)


GRPO = Method("GRPO, arXiv 2402.03300: equations (1) and (2), in all layers")
MGRPO = Method(
    "Multi-Layer GRPO, arXiv 2506.04746: failed corrections are discarded", keep=successes
)


def credit(layers, method, memory=None):
    """Fills siblings, shaped, advantages, trained, token_weights and counts of each layer.

    method.siblings, from layer 2 on: "parent" compares the corrections of one answer, which
    isolates the skill of correcting. "question" compares all corrections of one question, which
    also credits the luck of a better answer above; it is needed where an answer has a single
    correction.
    """
    for layer in layers:
        layer.siblings = layer.questions if method.siblings == "question" else layer.parents
        groups = [Group(layers, layer, rows, memory) for rows in split_by(layer.siblings)]
        layer.shaped = layer.rewards.float()
        layer.shaped = of_groups(method.reward, groups, layer.shaped)
        layer.advantages = group_advantages(layer.shaped, layer.siblings)  # (1)
        layer.advantages = of_groups(method.advantage, groups, layer.advantages)
        # MGRPO: discards failures here.
        layer.trained = of_groups(method.keep, groups, torch.ones_like(layer.correct))
        layer.advantages = layer.advantages.masked_fill(~layer.trained, 0.0)
        layer.token_weights = of_groups(method.token_weight, groups, None)
        layer.counts = of_groups(method.count, groups, None)


def of_groups(function, groups, otherwise):
    """A Method's function of each Group -> one column [B, ...] of the layer; `otherwise` without a
    function."""
    if function is None:
        return otherwise
    column = None
    for group in groups:
        part = function(group)
        if not isinstance(part, torch.Tensor) or part.shape[:1] != group.rows.shape:
            raise TypeError(f"{function} must give a tensor with an entry for each row of a group")
        if column is None:
            B = sum(len(group.rows) for group in groups)
            column = torch.zeros(B, *part.shape[1:], dtype=part.dtype)
        column[group.rows] = part
    return column if column.dtype == torch.bool else column.float()


# ---- loss ----------------------------------------------------------------------------------------


def kl_estimate(logp, ref_logp, kl="k3"):
    """Per-token estimate of KL(π || π_ref) from one sampled token, elementwise.

    With d = log π_ref - log π:
    k1 = -d: unbiased, but as a LOSS its expected gradient is 0, so it does nothing.
    k2 = d²/2: biased as a value; its expected gradient is exactly that of KL(π || π_ref).
    k3 = e^d - 1 - d: unbiased, never negative, low variance. Its expected gradient is that of
         KL(π_ref || π), the other direction. GRPO uses k3 (arXiv 2402.03300, eq. 4).
    tests/test_mgrpo.py checks values and gradients exactly.
    """
    d = (ref_logp - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kl == "k1":
        return -d
    return d**2 / 2 if kl == "k2" else torch.expm1(d) - d


def loss_denominator(lengths, normalize, max_new_tokens):
    """What the summed loss of these rows is divided by.

    Counted over a whole optimiser step, BEFORE its first backward pass: a micro-batch that divided
    by its own count would weigh its rows by how it was cut. lengths: [B] sampled tokens a row.
    "sequence": rows, each the mean of its tokens (the paper). "token": tokens, so long rows weigh
    more (DAPO, arXiv 2503.14476). "constant": rows x max_new_tokens, so a token weighs the same in
    every row and step (Dr. GRPO, arXiv 2503.20783).
    """
    if normalize == "sequence":
        return len(lengths)
    return int(lengths.sum()) if normalize == "token" else len(lengths) * max_new_tokens


def loss_inputs(layer, rows):
    """What the loss needs of some rows of a layer, besides log-probabilities under the policy.

    -> old_logp [b, t], advantages [b], mask [b, t], token weights [b, t] or None, on the sampler's
    device. t: the longest row.
    """
    completions, t = layer.completions, int(layer.lengths[rows].max())
    device = completions.tokens.device
    old_logp = completions.logprobs[to_device(rows, device), :t]
    weights = layer.token_weights
    return (
        old_logp,
        to_device(layer.advantages[rows], device),
        to_device(layer.mask[rows, :t], device),
        None if weights is None else to_device(weights[rows, :t], device),
    )


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
    surrogate="clipped",
    token_weights=None,
):
    """Equation (2) with its sign turned; the same for all layers.

    logp: [B, T] fp32 log π_θ of the sampled tokens, with gradient; old_logp: [B, T] the sampler's;
    advantages: [B]; mask: [B, T] bool, True on sampled tokens, end token included. denominator: see
    `loss_denominator`; by default that of this batch alone, T being the constant. surrogate:
    "clipped", or "likelihood", A log π, whose gradient is that at ratio 1. token_weights: [B, T].
    -> loss, sums over the masked tokens {tokens, clipped, kl, ratio}.
    """
    # One ratio a token. On the first update it is 1 up to rounding, and min and clamp do nothing.
    log_ratio = (logp - old_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()  # [B, T]                                                            (3)
    A = advantages[:, None]  # [B, 1]
    # min takes the worse of the two: a token that has moved far enough in the direction of its
    # advantage gains nothing more, one that has moved the wrong way keeps its full gradient.
    gain = torch.min(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)  # [B, T]          (2)
    # `clipped` counts the tokens where min picks the clipped term: their gain has no gradient.
    clipped = ((A > 0) & (ratio > 1 + clip_high)) | ((A < 0) & (ratio < 1 - clip_low))
    if surrogate == "likelihood":
        gain, clipped = logp * A, torch.zeros_like(clipped)
    if token_weights is not None:
        gain = gain * token_weights
    divergence = kl_estimate(logp, ref_logp, kl) if kl_coef else torch.zeros_like(logp)
    loss = (kl_coef * divergence - gain) * mask
    if denominator is None:
        denominator = loss_denominator(mask.sum(1), normalize, mask.shape[1])
    if normalize == "sequence":
        loss = loss / mask.sum(1, keepdim=True).clamp(min=1)  # 1/|o_i|                          (2)

    sums = dict(
        tokens=mask.sum(),
        clipped=(clipped & mask).sum(),
        kl=(divergence * mask).sum(),
        ratio=(ratio * mask).sum(),
    )
    return loss.sum() / max(denominator, 1), {name: x.detach() for name, x in sums.items()}
