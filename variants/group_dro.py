"""Group DRO: kinds of questions that go badly weigh more (Sagawa et al., arXiv 1911.08731).

    q_k <- q_k exp(rate · loss_k), normalised;   Â_i times q_k · (number of kinds)

loss_k is the share of wrong answers to the step's questions of kind k; a kind that was not drawn
stays as it is. Kinds are pairs (number of operations, number of candidates).

(Of `solve` and `chain`; other tasks have one kind, and this is GRPO there.)

A stand-in for AGRO and GDR-MDP, which build on it. (DeSel chooses among demonstrations, and has no
meaning here.)
"""

import math
import re

from mgrpo import Method


def renew(layers, memory, gather, rate=0.1):
    """q after this step's answers. gather: a list of this rank -> that of all ranks."""
    layer = layers[0]
    kinds = [kind(problem.question) for problem in layer.problems]
    wrong = {}
    for name, right in gather(list(zip(kinds, layer.correct.tolist()))):
        wrong.setdefault(name, []).append(not right)
    q = memory.setdefault("q", {})
    for name in sorted(wrong.keys() - q.keys()):  # a new kind has the mean weight
        q[name] = sum(q.values()) / len(q) if q else 1.0
    memory["q"] = weighed(q, {name: sum(w) / len(w) for name, w in wrong.items()}, rate)


def weighed(q, losses, rate=0.1):
    """The formula. q: {kind: weight}; losses: {kind: share wrong} of those drawn -> q."""
    worst = max(losses.values(), default=0.0)  # taken off, so that exp stays finite
    q = {name: x * math.exp(rate * (losses.get(name, 0.0) - worst)) for name, x in q.items()}
    return {name: x / sum(q.values()) for name, x in q.items()}


def by_kind(group):
    """-> [n] advantages. group.advantages: [n]."""
    q = group.memory["q"]
    return group.advantages * q[kind(group.problems[0].question)] * len(q)


def kind(question):
    """-> "operations/candidates" of a question of `solve` or `chain`; else "all"."""
    if "(mod " not in question:
        return "all"
    listed, _, rest = question.rpartition("}")
    return f"{len(re.findall(r'[+*-][0-9]', rest))}/{listed.count(',') + 1}"


METHOD = Method(
    "Group DRO, arXiv 1911.08731, stands for AGRO and GDR-MDP: hard kinds of questions weigh more",
    learn=renew,
    advantage=by_kind,
)
