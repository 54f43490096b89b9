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
import re

import torch


def columns(turns):
    """{name of a result's column: its title} of the table, in its order. Columns of a pair of
    turns name the second of them where there is more than one pair."""
    pair = lambda k: "" if turns == 2 else f", t{k}"
    titles = {f"t{k}": f"Acc@t{k}" for k in range(1, turns + 1)}
    titles |= {"delta": f"Δ(t1,t{turns})"} if turns > 1 else {}
    for k in range(2, turns + 1):
        titles |= {f"fix{k}": f"Δ i→c{pair(k)}", f"broke{k}": f"Δ c→i{pair(k)}"}
    return titles


COLUMNS = columns(2)


def turns_of(names):
    """The number of turns of a result with columns of these names."""
    return sum(re.fullmatch(r"t\d+", name) is not None for name in names)


def summarise(right):
    """right: [Q, samples, turns] 0/1 -> {column: (mean, standard error over questions)}."""
    c = right.unbind(-1)  # of each turn [Q, samples]
    values = {f"t{k}": now for k, now in enumerate(c, 1)}
    values |= {"delta": c[-1] - c[0]} if len(c) > 1 else {}
    for k in range(2, len(c) + 1):
        before, now = c[k - 2], c[k - 1]
        values |= {f"fix{k}": (1 - before) * now, f"broke{k}": before * (1 - now)}
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


def as_look(result):
    """A result of eval.evaluate as the held-out fields of metrics.jsonl, with standard errors."""
    fields = {}
    for k in range(1, turns_of(result) + 1):
        names = {f"t{k}": "heldout", f"fix{k}": "heldout_fix", f"broke{k}": "heldout_broke"}
        for name, field in names.items():
            if name in result:
                mean, error = result[name]
                fields |= {f"{field}{k}": mean, f"{field}{k}_se": error}
    return fields


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
    turns = min(turns_of(result) for result in rows.values())
    shown = columns(turns)
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
        turns = range(1, turns_of(result) + 1)
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
