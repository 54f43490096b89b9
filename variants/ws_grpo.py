"""WS-GRPO: rewards for steps that a preference model likes, divided by their number (arXiv
2602.17025).

    R_i = (λ_1 Σ_t p_t + λ_2 c_i) / max(T_i, 1) - penalty [T_i not in 3..6]
    p_t = σ(f(prefix up to step t) - f(prefix up to step t - 1))

c is 1 for a right answer, T its number of steps. f is a small network on the vector at the end of a
step, trained once on (right, wrong) pairs of the base's answers, and frozen. A right answer of one
step is paid 5.5, one of four 1.75: short ones win.

Confirmed, second hand: a reward of steps and outcome with λ_1 = 1, λ_2 = 5; f with 512 hidden
units, Bradley-Terry, a frozen embedding, groups of 8. Stand-ins: the divisor T (the paper
contradicts itself); penalty 0; f's vectors are the reference's, and it is trained on those at the
ends of whole answers, in the first step that has pairs, of all ranks; a step is a piece of the
thought between commas.
"""

import itertools

import torch

from mgrpo import Method, split_by

UNITS = 512
UPDATES, RATE = 100, 1e-3  # of f, all pairs at once


def steps_and_outcome(group, step=1.0, outcome=5.0, penalty=0.0, least=3, most=6):
    """-> [n] rewards. group.ref_hidden: [n, T, D]; pieces, correct: of n answers."""
    network, sums, counts = group.memory.get("preference"), [], []
    for vectors, pieces in zip(group.ref_hidden, group.pieces):
        ends = step_ends(pieces)
        counts.append(len(ends))
        sums.append(0.0)
        if network:  # f is there once a question had right and wrong answers
            # The vector at token e predicts token e + 1; hidden[0] is that at the prompt's end.
            f = score(network, vectors[[0, *(e + 1 for e in ends)]])
            sums[-1] = float((f[1:] - f[:-1]).sigmoid().sum())
    sums, counts = torch.tensor(sums), torch.tensor(counts)
    return shared_out(sums, counts, group.correct, step, outcome, penalty, least, most)


def shared_out(sums, counts, correct, step=1.0, outcome=5.0, penalty=0.0, least=3, most=6):
    """The reward. sums: Σ_t p_t, counts: T, correct, all [n] -> [n]."""
    outside = (counts < least) | (counts > most)
    return (step * sums + outcome * correct) / counts.clamp(min=1) - penalty * outside


def step_ends(pieces):
    """-> numbers of the tokens that end a step: with a comma, or as the thought's last token.

    pieces: the bytes of each token.
    """
    think, closed, _ = b"".join(pieces).partition(b"</think>")
    if not closed or not think.removeprefix(b"<think>").strip():
        return []
    behind = {i + 1 for i, byte in enumerate(think) if byte == ord(",")} | {len(think)}
    ends = list(itertools.accumulate(map(len, pieces)))
    # A token may hold several marks, or end behind one.
    return sorted({next(t for t, end in enumerate(ends) if end >= b) for b in behind})


def score(network, vectors):
    """f. vectors: [m, D] -> [m]."""
    w1, b1, w2 = network["w1"], network["b1"], network["w2"]
    return (vectors @ w1 + b1).relu() @ w2


def learn_preferences(layers, memory, gather):
    """Trains f in the first step that has a question with right and wrong answers.

    gather: a list of this rank -> that of all ranks.
    """
    if "preference" in memory:
        return
    pairs = []
    for layer in layers:
        last = layer.observed["ref_hidden"][torch.arange(len(layer.lengths)), layer.lengths - 1]
        for rows in split_by(layer.questions):
            right, wrong = rows[layer.correct[rows]], rows[~layer.correct[rows]]
            # As many pairs as the rarer verdict has.
            pairs += [(last[a], last[b]) for a, b in zip(right.tolist(), wrong.tolist())]
    pairs = gather(pairs)
    if pairs:
        memory["preference"] = fit(pairs)


def fit(pairs):
    """pairs of vectors [D], (right, wrong) -> f. Loss -log σ(f(right) - f(wrong)), AdamW."""
    right, wrong = (torch.stack(vectors) for vectors in zip(*pairs))
    random, D = torch.Generator().manual_seed(0), right.shape[1]
    network = dict(
        w1=torch.randn(D, UNITS, generator=random) / D**0.5,
        b1=torch.zeros(UNITS),
        w2=torch.randn(UNITS, generator=random) / UNITS**0.5,
    )
    for x in network.values():
        x.requires_grad_()
    optimizer = torch.optim.AdamW(network.values(), RATE)
    for _ in range(UPDATES):
        margin = score(network, right) - score(network, wrong)
        (-torch.nn.functional.logsigmoid(margin).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: x.detach() for name, x in network.items()}


METHOD = Method(
    "WS-GRPO, arXiv 2602.17025: preferred steps are paid; f's vectors and pairs are stand-ins",
    observe=("ref_hidden",),
    learn=learn_preferences,
    reward=steps_and_outcome,
)
