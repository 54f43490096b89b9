"""From right and wrong answers to the paper's table: shares, standard errors, pass@k.

    python eval.py --checkpoint out/solve-mgrpo-0/checkpoint.pt        # prints such a table

The idea. With c1, c2 = right or wrong in each turn, over all questions (SCoRe, arXiv 2409.12917,
section 3):

    Acc@t1 = mean c1      Acc@t2 = mean c2       Δ(t1,t2) = Acc@t2 - Acc@t1
    Δ i→c  = share wrong first, right second     Δ c→i = share right first, wrong second
           Δ(t1,t2) = Δ i→c - Δ c→i

With n samples of a question, c of them right, also

    pass@k = 1 - C(n-c, k) / C(n, k)     a right one among k, without bias (arXiv 2107.03374, eq. 1)
    maj@n  = the answer that most of the n give is right; answers count as one if reward.py holds
           them equal, and a tie is shared

Errors are standard errors over QUESTIONS: with several samples of each, the samples of one question
are averaged first, since they are not independent. Nothing here knows a model: a table is made
again from transcripts at any time (report.py).

Letters: Q questions, n samples of each.
"""

import math

import torch

COLUMNS = {"t1": "Acc@t1", "t2": "Acc@t2", "delta": "Δ(t1,t2)", "i2c": "Δ i→c", "c2i": "Δ c→i"}


def summarise(right):
    """right: [Q, samples, turns] 0/1 -> {name: (mean, standard error over questions)} of the
    columns that apply."""
    c1, c2 = right[..., 0], right[..., -1]
    values = dict(t1=c1)
    if right.shape[-1] == 2:
        values |= dict(t2=c2, delta=c2 - c1, i2c=(1 - c1) * c2, c2i=c1 * (1 - c2))
    return {name: mean_and_error(x.mean(1)) for name, x in values.items()}


def several(right, votes):
    """pass@k for k = 1, 2, 4, ..., n and maj@n of each turn -> {"pass1": {k: (mean, error)},
    "maj1": (mean, error), "pass2": ...}; nothing for one sample. right: [Q, n, turns]; votes: [Q]
    lists with a value for each turn."""
    n, found = right.shape[1], {}
    for turn in range(right.shape[-1] if n > 1 else 0):
        count = right[..., turn].sum(1).int().tolist()
        sizes = [k for k in (2**i for i in range(20)) if k < n] + [n]
        found[f"pass{turn + 1}"] = {
            k: mean_and_error(torch.tensor([pass_at(k, n, c) for c in count])) for k in sizes
        }
        found[f"maj{turn + 1}"] = mean_and_error(torch.tensor([vote[turn] for vote in votes]))
    return found


def pass_at(k, n, c):
    """Probability that k of n samples, drawn without replacement, hold one of the c right ones
    (arXiv 2107.03374, eq. 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def as_look(found):
    """A result of eval.evaluate as the fields of a look at held-out questions, with standard
    errors."""
    names = dict(t1="heldout1", t2="heldout2", i2c="heldout_fix", c2i="heldout_broke")
    return {
        f"{field}{end}": found[name][i]
        for name, field in names.items()
        for i, end in enumerate(("", "_se"))
    }


def mean_and_error(x):
    """Mean of a vector and its standard error, std / sqrt(n); of one number it is not known,
    None."""
    return x.mean().item(), (x.std().item() / math.sqrt(len(x)) if len(x) > 1 else None)


# ---- showing -------------------------------------------------------------------------------------


def percent(pair, sign=""):
    return f"{100 * pair[0]:{sign}.1f} ± {'?' if pair[1] is None else f'{100 * pair[1]:.1f}'}"


def table(rows, what="held-out questions"):
    """{name: result of evaluate} -> the paper's table as text, in percent. Rows may have been asked
    different numbers of them."""
    shown = {k: v for k, v in COLUMNS.items() if all(k in result for result in rows.values())}
    lines = [
        f"{'':24}" + "".join(f"{title:>15}" for title in shown.values()) + f"{'questions':>12}"
    ]
    for name, result in rows.items():
        lines.append(
            f"{name:24}"
            + "".join(f"{percent(result[k], '+' if k == 'delta' else ''):>15}" for k in shown)
            + f"{result['questions']:>12,}"
        )
    return "\n".join([*lines, f"(percent ± standard error over {what})"])


def details(rows, verifier):
    """What else is worth knowing of each row: pass@k and maj@n, lengths, answers cut at the limit,
    verifier's failures."""
    lines = []
    for name, result in rows.items():
        turns = [turn for turn in (1, 2) if f"length{turn}" in result]
        for turn in turns if f"pass{turns[0]}" in result else ():
            found = [f"pass@{k} {percent(value)}" for k, value in result[f"pass{turn}"].items()]
            lines.append(
                f"{name}, turn {turn}: {', '.join(found)}, maj@{result['samples']} "
                f"{percent(result[f'maj{turn}'])}"
            )
        lengths = " and ".join(f"{result[f'length{turn}']:.0f}" for turn in turns)
        lines.append(
            f"{name}: {lengths} tokens an answer, {100 * result['cut']:.1f} % of answers cut at "
            f"the limit; verifier {verifier}, "
            f"{result['undecided']} undecided"
        )
    return "\n".join(lines)
