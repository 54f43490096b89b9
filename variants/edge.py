"""EDGE-GRPO: advantages divided by relative entropy (arXiv 2507.21848).

    Â_i / P̂_i          P̂_i = mean entropy of answer i / mean of the group's

Confident answers weigh more, right or wrong, so the advantages of a mixed group differ. A group
with one verdict stays without a signal: division makes nothing of 0.

Against that, guided error correction (`edge-gec`) rewrites wrong answers before they are scored:
half of them reflect and answer again, a quarter is told the answer, a quarter is replaced by the
reference solution. What was put there is trained as if it had been sampled. It sees gold solutions.

Confirmed by the released code: the formula, the token mean, the three ways and their shares.
Stand-ins: P̂ is held in [0.1, 10] (commented out in the release), over sampled tokens only, and
detached; to reflect is a guiding phrase and a correction, a row of the next layer that has its
answer's advantage (so its tokens have a mean of their own, and P̂ is that of the answer alone); to
be told is a guiding phrase and the answer. A task without steps has no solutions to be shown.
Paper: groups of 8, temperature 0.6, learning rate 1e-6 (EDGE-GRPO@cbe13ca, grpo_aha_trainer.py).
"""

import torch

from engine.keys import hash_seed
from mgrpo import Method, draw_phrases, phrase_text
from variants.e_grpo import solution


def by_confidence(group, floor=0.1, ceiling=10.0):
    """-> [n] advantages. group.advantages: [n]; entropy, mask: [n, T]."""
    entropy = (group.entropy * group.mask).sum(1) / group.mask.sum(1).clamp(min=1)
    return divided(group.advantages, entropy, floor, ceiling)


def divided(advantages, entropy, floor=0.1, ceiling=10.0):
    """The formula. advantages, entropy: [n] -> [n]."""
    share = entropy / entropy.mean().clamp(min=1e-12)
    return advantages / share.clamp(floor, ceiling)


# ---- guided error correction ---------------------------------------------------------------------


def plan(layer, seed):
    """-> B words: what becomes of each answer of layer 1, by seed and row number."""
    numbers = layer.completions.numbers.tolist()
    # 0x6EC and 0x6ED: streams of their own.
    draws = [[hash_seed(seed, 0x6EC + k, n) % 2**20 / 2**20 for k in (0, 1)] for n in numbers]
    return planned(layer.correct.tolist(), draws)


def planned(right, draws):
    """The rule. right: B bools; draws: B pairs of numbers in [0, 1)."""
    return [
        "keep" if ok else "reflect" if a < 0.5 else "answer" if b < 0.5 else "solution"
        for ok, (a, b) in zip(right, draws)
    ]


def to_reflect(layer, seed):
    """-> [B] bool: the answers that go on."""
    return torch.tensor([word == "reflect" for word in plan(layer, seed)])


def told(layer, seed):
    """-> {row: text} of the answers that are told the answer, or replaced by the solution."""
    texts, words = {}, plan(layer, seed)
    phrases = draw_phrases(seed, 2, layer.completions.numbers.tolist())
    for row, (word, phrase) in enumerate(zip(words, phrases)):
        problem = layer.problems[row]
        if word == "answer" and isinstance(problem.gold, str):
            answer = f"<think></think><answer>{problem.gold}</answer>"
            texts[row] = layer.texts[row] + phrase_text(phrase) + answer
        elif word == "solution" and solution(problem):
            texts[row] = solution(problem)
    return texts


def of_the_edited(group):
    """-> [n] rewards: an answer that reflects has its correction's."""
    rewards = group.rewards.clone()
    if group.number == 1 and len(group.layers) > 1:
        below = group.layers[1]
        for i, row in enumerate(group.rows.tolist()):
            own = below.rewards[below.parents == row]  # one, or none
            rewards[i] = own[0] if len(own) else rewards[i]
    return rewards


def one_reflection(sizes):
    """Group sizes -> "", or what speaks against them."""
    good = len(sizes) == 2 and sizes[0] > 1 and sizes[1] == 1
    return "" if good else "lets an answer reflect once"


def of_the_answer(group, floor=0.1, ceiling=10.0):
    """-> [n] advantages: a correction has its answer's."""
    if group.number == 1:
        return by_confidence(group, floor, ceiling)
    return group.layers[group.number - 2].advantages[group.layer.parents[group.rows]]


GEC = Method(
    "EDGE-GRPO with error correction, arXiv 2507.21848",
    flags=dict(normalize="token", group_sizes=(8, 1)),
    sources=to_reflect,
    rewrite=told,
    observe=("entropy",),
    reward=of_the_edited,
    advantage=of_the_answer,
    alone=True,
    fits=one_reflection,
)
METHOD = Method(
    "EDGE-GRPO, arXiv 2507.21848: advantages divided by relative entropy",
    flags=dict(normalize="token"),
    observe=("entropy",),
    advantage=by_confidence,
)
