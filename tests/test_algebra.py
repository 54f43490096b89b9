"""Expressions: how they are parsed, and which two are equal."""

import gc
import random
from fractions import Fraction

import pytest

from verifier import algebra
from verifier.algebra import (
    EXACT,
    PRIME,
    OutOfTime,
    Undecided,
    deadline,
    difference,
    drawn_prime,
    equal,
    evaluate,
    is_unfinished,
    proportional,
    root_of_minus_one,
    values_at_points,
)
from verifier.latex import Unreadable, clean, parse


def parsed(*texts):
    return [parse(clean(text)) for text in texts]


@pytest.mark.parametrize(
    "first, second",
    [
        ("x^2+2x+1", "(x+1)^2"),
        (r"\frac{x^2-1}{x-1}", "x+1"),
        ("(x+1)^{100000}", "(1+x)^{100000}"),
        (r"\sin 2x", r"2\sin x\cos x"),
        (r"\sin^2 x", r"1-\cos^2 x"),
        (r"\tan^{-1} 2", r"\arctan 2"),
        (r"\log_2 8", "3"),
        (r"\log_3 9x", r"2+\log_3 x"),
        (r"\ln x^2", r"2\ln x"),
        (r"\sqrt{5+2\sqrt{6}}", r"\sqrt2+\sqrt3"),
        (r"\frac{1}{\sqrt 2}", r"\frac{\sqrt2}{2}"),
        (r"\sqrt[3]{-8}", "-2"),
        (r"\sqrt{-4}", "2i"),
        ("i^2", "-1"),
        (r"e^{i\pi}", "-1"),
        (r"\frac{1}{1+i}", r"\frac{1-i}{2}"),
        ("2^{n+1}", r"2\cdot 2^n"),
        ("n!", "n(n-1)!"),
        ("(-1)^{2n}n", "n"),
        (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
        ("|x-1|", "|1-x|"),
        (r"\sqrt{x^2}", "|x|"),
        (r"\sqrt{ab}", r"\sqrt a\sqrt b"),
        ("2^{1000001}", r"2\cdot 2^{1000000}"),
        ("10^37", "10^{37}"),
        ("x^{10}", "x^5x^5"),
        ("4.5e33", r"4.5\times10^{33}"),
        (r"0.1\overline{6}", "1/6"),
        ("-1./3", r"-\frac13"),
        (r"\frac12", ".5"),
        (r"2\frac12", "5/2"),
        ("x2", "2x"),
        (r"\sin\pi", "0"),
        (r"\sqrt{3+2\sqrt2}-1-\sqrt2", "0"),
        (r"2\sin(x)y", r"2y\sin x"),
        (r"\sin(x)^2", r"\sin^2 x"),
        ("x_{1}y", "yx_1"),
        (r"a\cdot -2", "-2a"),
        (r"\frac{10^{400}}{10^{400}}", "1"),
        ("e^{2x}", "(e^x)^2"),
        (r"\sqrt{x}", "x^{0.5}"),
        ("x**2", "x^2"),
        ("(-4)^{1/2}", "2i"),
        (r"\binom{n}{k}", r"\frac{n!}{k!(n-k)!}"),
    ],
)
def test_equal_expressions(first, second):
    """Catches false negatives in every way of evaluating, and an order that matters."""
    a, b = parsed(first, second)
    assert equal(a, b) and equal(b, a) and equal(a, a)


@pytest.mark.parametrize(
    "first, second",
    [
        ("1234576", "1234567"),
        ("0.3333", "1/3"),
        ("3.0000001", "3"),
        (r"\sqrt2", "1.41421356"),
        (r"\sqrt2", "1.41421356237309504880168872420969807857"),
        (r"\pi", "3.14159265358979323846"),
        (r"\sqrt2x", "1.4142135623730951x"),
        ("2^{1000000}", "2^{1000001}"),
        ("3^{2024}", "3^{2023}"),
        (r"\frac{10^{400}}{10^{400}-1}", "1"),
        ("6.63e-34", "0"),
        (r"10^{-20}\sqrt2", r"10^{-20}\sqrt3"),
        (r"10^{-20}\sqrt2", "0"),
        ("x^2", "x^3"),
        ("2x", "2y"),
        ("0x", "0"),
        ("x^0", "1"),
        ("x", "-x"),
        ("x-y", "y-x"),
        (r"\sqrt{x^2}", "x"),
        ("X", "x"),
        ("x_1", "x_2"),
        ("i", "-i"),
        ("3+4i", "3-4i"),
        (r"\sin 2x", r"2\sin x"),
        (r"\ln x", r"\log_2 x"),
        ("(-1)^n", "1"),
        ("a/bc", "a/(bc)"),
        (r"\frac10", r"\infty"),
        (r"\frac00", "0"),
        (r"\infty", r"-\infty"),
        ("x^{100000}", "x^{100001}"),
        (r"\sqrt[3]2", r"\sqrt2"),
        (r"-1\frac12", r"-\frac12"),
        (r"2\frac12", "1"),
        ("e", "2.718281828"),
        (str(PRIME + 5), "5"),
        (r"\log_2 3", r"\log_3 2"),
        (r"\binom{9}{4}", "125"),
        (r"\lfloor\pi\rfloor", "4"),
        ("|x-5|", "5-x"),
        ("|x-5|", "x-5"),
        (r"\lfloor n/8\rfloor", r"\lfloor n/2\rfloor"),
        (r"\lceil x\rceil", r"\lfloor x\rfloor+1"),
        (r"\sin \pi n", "0n"),
        (r"|x+7|", "x+7"),
        ("n!", "n"),
        ("f(x)", "g(x)"),
    ],
)
def test_different_expressions(first, second):
    """Catches false positives: tolerances for exact numbers, floats that overflow to the same,
    residues taken for integers."""
    a, b = parsed(first, second)
    assert not equal(a, b) and not equal(b, a)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "+",
        "1 2",
        "2^10",
        "x^10",
        "--7",
        "2--3",
        "(1",
        "1)",
        "(1]",
        "|1",
        r"\frac{1}",
        r"\sum k",
        "x^",
        "1,2",
        "x=1",
        "5!!",
        "x^2^3",
        "?",
        "5?",
        "٣",
        "5é",
        "1_0",
        r"\foo",
        r"\text{a}",
        "{}",
        "()",
        "\0",
        "5\0",
        ".",
        r"\sqrt",
        "1..2",
        "(" * 60 + "1" + ")" * 60,
        "lambda: 5",
        '"5"',
        "7%7",
        r"2\frac{1}{2}3",
    ],
)
def test_text_outside_of_the_subset_is_unreadable(text):
    """Catches a parser that guesses an expression where there is none."""
    with pytest.raises(Unreadable):
        parse(clean(text))


def test_precedence_is_that_of_latex():
    """Catches precedence and arguments gone wrong: \\frac12 takes one digit each, a minus is
    outside of a mixed number and of a power."""
    for text, value in (
        (r"\frac12", "1/2"),
        (r"\frac1{72}", "1/72"),
        (r"\frac{72}5", "72/5"),
        ("-2^2", "-4"),
        (r"-1\frac12", "-3/2"),
        ("2/3/4", "1/6"),
        ("2-3-4", "-5"),
        ("2+3(4-1)^2/9", "5"),
    ):
        assert evaluate(parse(text).tree, EXACT) == Fraction(value), text
    assert parse(r"x_1+y_{12}+\theta").names == {"x_1", "y_12", r"\theta"}
    assert parse(r"e+\pi+2").names == frozenset()


def test_polynomials_equal_their_reordered_sums():
    """Catches wrong modular arithmetic: 300 random polynomials, equal to their reordered sums and
    different from them plus one."""
    rng = random.Random(0)
    for _ in range(300):
        terms = [
            f"{rng.randint(1, 99)}x^{rng.randint(1, 9)}y^{rng.randint(1, 9)}"
            for _ in range(rng.randint(2, 6))
        ]
        first, second = "+".join(terms), "+".join(rng.sample(terms, len(terms)))
        assert equal(*parsed(first, second))
        assert not equal(*parsed(first, second + "+1"))
        assert not equal(*parsed(first, second + "+x"))
        assert equal(*parsed(rf"\sqrt{{{first}}}", rf"({second})^{{1/2}}"))


def test_sums_of_fractions_are_exact():
    """Catches arithmetic that is not exact: 300 random sums of fractions against Python's."""
    rng = random.Random(1)
    for _ in range(300):
        parts = [Fraction(rng.randint(-99, 99), rng.randint(1, 99)) for _ in range(5)]
        text = "+".join(
            rf"(-\frac{{{-part.numerator}}}{{{part.denominator}}})"
            if part < 0
            else f"{part.numerator}/{part.denominator}"
            for part in parts
        )
        assert evaluate(parse(text).tree, EXACT) == sum(parts)
        assert not equal(parse(text), parse(f"{text}+1/{10**30}"))


def test_points_depend_on_the_two_texts_only():
    """Catches points from the clock or from Python's salted hash: a verdict depends neither on the
    process nor on the order."""
    a, b = parsed(r"\sin x", "x")
    assert list(values_at_points(a, b)) == list(values_at_points(a, b))
    assert [x for x, _, _ in values_at_points(a, b)] == [x for _, x, _ in values_at_points(b, a)]
    assert algebra.hash_number("s", "x") == 119921562600028569162502981117393351470
    assert algebra.hash_number("s", "x") != algebra.hash_number("s", "y")


def test_every_modulus_is_prime_and_has_a_root_of_minus_one():
    """Catches a modulus that is not prime, without a root of -1, or drawn from Python's salted
    hash: Fermat's test to twenty bases."""
    assert drawn_prime("s") == 671760126679764327887313817093 != drawn_prime("t")
    for prime in (PRIME, *map(drawn_prime, "stuvwxyz")):
        assert prime.bit_length() == 100 and all(
            pow(base, prime - 1, prime) == 1 for base in range(2, 22)
        ), prime
        assert root_of_minus_one(prime) ** 2 % prime == prime - 1


def test_a_known_prime_proves_nothing(monkeypatch):
    """Catches a verdict that rests on a published prime: here the difference is a multiple of it.
    Exponents may also be so large that one text holds for many primes: then nothing is proved."""
    for first, second in (
        (f"x^2+{PRIME}", "x^2"),
        (f"x^{{{PRIME}}}", "x"),
        (rf"5\cdot2^{{{PRIME - 1}}}", "5"),
        (f"{(PRIME + 1) // 2}x", "x/2"),
        ("2^{10^{30}+56}+4", "5"),
    ):
        assert not equal(*parsed(first, second)) and not equal(*parsed(second, first))
    assert not proportional(*parsed(f"x-y+{PRIME}", "x-y"))
    monkeypatch.setattr(algebra, "drawn_prime", lambda seed: PRIME)
    assert equal(*parsed(f"x^2+{PRIME}", "x^2"))
    with pytest.raises(Undecided):
        equal(*parsed(f"x^{{{PRIME}}}", "x"))


def test_equations_are_equal_up_to_a_factor():
    """Catches equations compared by their sides, and signs lost when an inequality is multiplied by
    -1."""

    def sides(text):
        return difference(*parsed(*text.split("=")))

    for first, second in (
        ("y=2x+1", "2x-y+1=0"),
        ("x^2+y^2=4", "2y^2+2x^2=8"),
        (r"y=\sin x", r"\sin x-y=0"),
    ):
        assert proportional(sides(first), sides(second))
    for first, second in (
        ("y=2x+1", "2x+y+1=0"),
        ("x=2", "x^2=4"),
        ("x=2", "y=2"),
        ("1=1", "2=2"),
        ("x=x", "x=1"),
        (r"y=\sin x", r"y=\cos x"),
    ):
        assert not proportional(sides(first), sides(second))
    assert proportional(*parsed("2x+y-3", "4x+2y-6"), positive=True) and not proportional(
        *parsed("2x+y-3", "3-2x-y"), positive=True
    )


def test_arithmetic_left_to_do_is_unfinished():
    """Catches 17 \\times 23 accepted for 391; and a fraction, a power or a scientific number taken
    for unfinished."""
    for text in (
        r"17\times 23",
        "2+3",
        "1/2+1/3",
        "5-2",
        "(6)+3",
        "2+3\\cdot 4",
        "|2-3|",
        "2^{1+2}",
        r"\frac{2+1}{5}",
        "-(2+3)",
        "2^4+1",
        r"\sqrt{4}+1",
        r"\sqrt2\sqrt8",
        "9!/7!",
        "1/2/3",
        "x+1+1",
        r"2\cdot 3x",
        "2(3x)",
        r"2\pi\cdot 3",
        r"\frac{6}{1/2}",
        r"\frac{4\pi}{2\pi}",
        r"4.5\times 10^3\times 2",
        r"10^{40}-10^{40}+1",
    ):
        assert is_unfinished(*parsed(text)[0][:1]), text
    for text in (
        "6/2",
        "-5",
        "2^{10}",
        r"4.5\times 10^3",
        "5!",
        r"2\frac12",
        "2x",
        r"1+\sqrt2",
        "4.5e3",
        r"\frac{-1}{2}",
        r"\binom{10}{3}",
        r"\log_2 8",
        r"\sqrt{81}",
        "3x+4",
        "2(3x+4)",
        r"\frac{3x}{4}",
        r"2\pi+1",
        "1/2^{10}",
        r"\frac34\sqrt3",
        r"\frac{\frac12}{3}",
        r"\sin\frac{\pi}{6}",
        r"e^{i\pi}",
        "2^{2021}-1",
        r"2\cdot 2^{1008}",
        r"\sqrt{5+2\sqrt6}",
        "3+4i",
        r"\frac{1}{2}mv^2",
    ):
        assert not is_unfinished(*parsed(text)[0][:1]), text
    for text in (r"e^{\ln 17+\ln 23}", r"2\cdot 2^{1008}", r"391\cdot\frac{2^{99999}}{2^{99999}}"):
        assert is_unfinished(*parsed(text)[0][:1], number=True), text
    assert not is_unfinished(*parsed(r"\sin\frac{5\pi}{6}")[0][:1], number=True)


def test_a_comparison_ends_at_its_deadline(monkeypatch):
    """Catches a comparison that never checks the clock, and a deadline that outlives it."""
    now = iter(range(1000))
    monkeypatch.setattr(algebra, "clock", lambda: next(now) * algebra.SECONDS / 8)
    a, b = parsed(
        "+".join(f"x_{i}" for i in range(10)), "+".join(f"x_{i}" for i in reversed(range(10)))
    )
    with pytest.raises(OutOfTime), deadline:
        equal(a, b)
    assert equal(a, b)


def test_exact_numbers_are_bounded(monkeypatch):
    """Catches numbers that grow without bound: towers of powers and factorials never come to more
    than BITS bits in exact arithmetic."""
    seen, number = [], algebra.Exact.number

    def watched(self, value):
        seen.append(value.numerator.bit_length())
        return number(self, value)

    monkeypatch.setattr(algebra.Exact, "number", watched)
    for text in (
        "10^{10^{10}}",
        "99999999!",
        r"\binom{10^9}{5\cdot 10^8}",
        "((100!)!)!",
        "1.0000000000001^{10^{15}}",
        "9^{9^{9^{9}}}",
        "1e999999999",
        "500!^{16}+1",
        r"(500!)(499!)(498!)(497!)",
        r"\lfloor 10^{300}\pi\rfloor",
        r"\frac{1}{2^{-99999999}}",
    ):
        assert not equal(*parsed(text, "5")), text
    assert max(seen) <= 2 * algebra.BITS
    with pytest.raises(algebra.Unfit):
        evaluate(parse("501!").tree, EXACT)


def test_the_garbage_collector_waits_for_a_comparison():
    """Catches comparisons that time out while Python collects a large heap (once in 5,000 under
    hypothesis), and a collector that stays off."""
    with algebra.deadline:
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with algebra.deadline:
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
