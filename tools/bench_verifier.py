"""How many comparisons per second the verifier makes, by kind of answer.

    python -m tools.bench_verifier --rounds 9

The idea. Each gold answer is compared with itself, with the same text and a space behind it, and
with the gold before it: right and wrong ones. "new" forgets every text that was read before; in
training most golds are compared many times, and that is "again". One core; medians.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
import platform
import statistics
import time
from dataclasses import dataclass
from typing import Annotated

from reward import is_correct
from runtime.flags import AtLeast, guarded, parse_flags
from verifier import answers, latex

# Golds of the kinds that data sets have, and of the kind that an attacker would write.
GOLDS = {
    "integers": ["72", "1,024", "-5", "18.00", "\\$40", "25\\%", "1{,}000", "3.0", "10080", "0"],
    "fractions, surds": [
        r"\frac{1}{2}",
        r"\dfrac{3\sqrt{2}}{4}",
        r"1+\sqrt{5}",
        r"2\pi",
        r"\frac{\pi}{6}",
        r"5\frac{3}{4}",
        r"\sqrt[3]{2}",
        "4.5e33",
    ],
    "algebra": [
        "x^2+2x+1",
        r"\frac{n(n+1)}{2}",
        r"\sin^2 x",
        "(x-2)(x+3)",
        "y=2x+1",
        r"2^{1009}",
        r"f(x)=2 x",
        "p-q",
    ],
    "structure": [
        r"\left(3, \frac{\pi}{2}\right)",
        r"(-\infty,1)\cup(2,\infty)",
        "1,-2",
        r"\{1,2,3\}",
        r"1\pm\sqrt{2}",
        r"\text{Evelyn}",
        "x>3",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
    ],
    "hostile": [
        "10^{10^{10}}",
        "((100!)!)!",
        r"\binom{1000000000}{500000000}",
        "1e999999999",
        "9" * 900,
        "(" * 400 + "6" + ")" * 400,
        r"\frac{1}{" * 100 + "2" + "}" * 100,
        "(x+1)^{100000}",
    ],
}


@dataclass(frozen=True)
class Config:
    rounds: Annotated[int, AtLeast(1)] = 5  # each comparison is timed so many times


def pairs_of(golds):
    """-> [(response, gold), ...]: each gold with itself, rewritten, and with another."""
    return [
        (rf"so \boxed{{{answer}}}", gold)
        for i, gold in enumerate(golds)
        for answer in (gold, f"{gold} ", golds[i - 1])
    ]


def verdict_seconds(response, gold, forget):
    """Seconds of one comparison. forget: empty the caches before it."""
    if forget:
        answers.read.cache_clear()
        latex.clean.cache_clear()
    start = time.perf_counter()
    is_correct(response, gold)
    return time.perf_counter() - start


def main():
    """Prints comparisons per second of each kind of gold answer."""
    config = parse_flags(Config, __doc__)
    print(f"{platform.machine()}, one core; {config.rounds} rounds, medians")
    print(f"{'':20}{'new a second':>16}{'again':>12}{'slowest, ms':>14}")
    for kind, golds in GOLDS.items():
        # "new" and "again" take turns within a round.
        pairs, rates, slowest = pairs_of(golds), {"new": [], "again": []}, 0.0
        for _ in range(config.rounds):
            for name in rates:
                took = [verdict_seconds(*pair, forget=name == "new") for pair in pairs]
                rates[name].append(len(took) / sum(took))
                slowest = max(slowest, *took)
        new, again = (statistics.median(rates[name]) for name in rates)
        print(f"{kind:20}{new:16,.0f}{again:12,.0f}{1e3 * slowest:14.2f}")


if __name__ == "__main__":
    guarded(main)
