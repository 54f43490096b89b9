r"""Whether two expressions are equal: exactly, modulo a prime, or in floats at random points.
Nothing is simplified or eval-ed.

    python algebra.py "\frac12" 0.5             # -> equal
    python algebra.py "\sin 2x" "2\sin x\cos x"

The idea. Two expressions are equal when they have the same variables and the same value wherever
both are defined. Simplifying is slow and can be made to hang; evaluating at random points is
neither. Three ways of evaluating, the first one that can do both:

- Exact: constants as fractions of integers of bounded size. 1234576 is never 1234567, 0.3333 never
1/3.
- Modular: rational functions at random points modulo primes of 100 bits; (x+1)^{100000} costs no
  more than (x+1)^2. A prime that is known can be written into an answer: x^2 + the prime. So the
  known one only refutes, and what it holds equal is looked at again modulo a prime that a hash of
  both texts picks among 2^93. Exponents on top of each other multiply to 2^40 at most, so the
  difference of two expressions has too few digits for more than one in 2^45 of these primes to
  divide it.
- Floating: roots, logarithms, trigonometry, variables in exponents; complex floats at a dozen
  points, which refute. What they hold equal is looked at again with 400 digits: no decimal is ever
  an irrational number. With variables and without i the points are real, and those where a root or
  a logarithm is not are left out.

The points come from a hash of the two expressions: grading is reproducible. What is read is
hostile: digits and exponents are bounded, so that no operation is slow, and a deadline in CPU time
is looked at in every node all the same.

Policies: the variables must agree, so 0x is not 0 and x^0 not 1. 1/0 is nothing, not even infinity.
e^{-1000} is not 0: what is too small to be told from 0 is Undecided, unless another point tells the
two apart.
"""

import cmath
import functools
import gc
import hashlib
import math
import sys
import threading
import time
from fractions import Fraction

import mpmath  # which torch brings, for sympy

from runtime.flags import BadInput, guarded
from verifier.latex import Expression, Unreadable, clean, parse

BITS = 8_192  # of a numerator or denominator in exact arithmetic
SECONDS = 0.05  # of CPU time for one comparison
REACH = 2**40  # exponents on top of each other, multiplied, modulo a prime
# the one that refutes; like all here it is 1 modulo 4, so that i has a value too
PRIME = 10**30 + 57
LITTLE = math.prod(prime for prime in range(3, 200) if all(prime % i for i in range(2, prime)))


class Unfit(Exception):
    """This way of evaluating cannot do it; another one may."""


class Undefined(Exception):
    """No value at this point: a division by 0, the logarithm of 0, a number beyond the range of
    floats."""


class Underflow(Exception):
    """A value too near to 0, or to what a function tends to, for the digits there are."""


class Undecided(Exception):
    """No way of evaluating can tell whether the two are equal."""


class OutOfTime(Exception):
    """The comparison hit its deadline."""


class Deadline(threading.local):
    """When the comparison of this thread must end: `with deadline:` gives it SECONDS. Python's
    garbage collector waits meanwhile: with a large heap it takes longer than that, and the answer
    would be blamed for it."""

    end, collects = math.inf, False

    def __enter__(self):
        self.end, self.collects = clock() + SECONDS, gc.isenabled()
        gc.disable()

    def __exit__(self, *_):
        self.end = math.inf
        if self.collects:
            gc.enable()

    def check(self):
        if clock() > self.end:
            raise OutOfTime(f"not decided within {SECONDS} s")


clock = time.thread_time  # CPU time of the thread: one that waits for its core has not used any
deadline = Deadline()


# ---- evaluation ----------------------------------------------------------------------------------


def evaluate(tree, field):
    """The value of a tree in a field: Exact, Modular or Floating."""
    deadline.check()
    operation, *operands = tree
    if operation == "num":
        return field.number(operands[0])
    if operation == "name":
        return field.name(operands[0])
    if operation == "call":
        return field.call(operands[0], operands[1:])
    if operation == "^":
        return field.power(*operands)
    values = [evaluate(operand, field) for operand in operands]
    return getattr(field, {"+": "sum", "*": "product", "-": "negative", "/": "inverse"}[operation])(
        *values
    )


class Exact:
    """Fractions of integers of at most BITS bits."""

    def number(self, value):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
            raise Unfit
        return value

    def name(self, name):
        raise Unfit

    def sum(self, *values):
        total = Fraction(0)
        for value in values:
            total = self.number(total + value)
        return total

    def product(self, *values):
        total = Fraction(1)
        for value in values:
            total = self.number(total * value)
        return total

    def negative(self, value):
        return -value

    def inverse(self, value):
        if not value:
            raise Undefined
        return 1 / value

    def power(self, base, exponent):
        base, exponent = evaluate(base, self), evaluate(exponent, self)
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if exponent.denominator != 1 or size * abs(exponent) > BITS:
            raise Unfit
        if not base and exponent <= 0:
            raise Undefined
        return base ** int(exponent)

    def call(self, name, operands):
        values = [evaluate(operand, self) for operand in operands]
        if name in WHOLE:
            return WHOLE[name](*values)
        if name == "sqrt" and values[0] >= 0:
            roots = [math.isqrt(part) for part in values[0].as_integer_ratio()]
            if roots[0] ** 2 == values[0].numerator and roots[1] ** 2 == values[0].denominator:
                return Fraction(*roots)
        raise Unfit


def factorial(n):
    """n! as a Fraction, for n up to 500."""
    if n.denominator != 1 or not 0 <= n <= 500:
        raise Unfit
    return Fraction(math.factorial(int(n)))


def binomial(n, k):
    """n over k as a Fraction, if it has no more than BITS bits."""
    if (
        n.denominator != 1
        or k.denominator != 1
        or not 0 <= k <= n
        or min(k, n - k) * int(n).bit_length() > BITS
    ):
        raise Unfit
    return Fraction(math.comb(int(n), int(k)))


WHOLE = {
    "!": factorial,
    "binom": binomial,
    "abs": abs,
    "floor": lambda x: Fraction(math.floor(x)),
    "ceil": lambda x: Fraction(math.ceil(x)),
}
EXACT = Exact()


def chance(seed, name):
    """A random number of 128 bits that belongs to a name: the same in every process."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed} {name}".encode(errors="replace"), digest_size=16).digest(), "big"
    )


@functools.lru_cache(64)
def drawn_prime(seed):
    """The first prime 1 modulo 4 after a random number of 100 bits that belongs to the seed.
    Fermat's test is enough for random ones."""
    candidate = (chance(seed, "prime") >> 28 | 1 << 99) // 4 * 4 + 1
    while math.gcd(candidate, LITTLE) > 1 or pow(2, candidate - 1, candidate) != 1:
        candidate += 4
    return candidate


@functools.lru_cache(64)
def root_of_minus_one(prime):
    """A number whose square is -1 modulo the prime."""
    return next(
        root
        for root in (pow(base, prime // 4, prime) for base in range(2, 100))
        if root * root % prime == prime - 1
    )


class Modular:
    """Residues modulo a prime; variables are random ones."""

    def __init__(self, seed, prime):
        self.seed, self.prime, self.reach, self.proves = seed, prime, 1, True

    def name(self, name):
        if name in ("pi", "e", "degree"):
            raise Unfit
        return (
            root_of_minus_one(self.prime) if name == "i" else chance(self.seed, name) % self.prime
        )

    def number(self, value):
        return value.numerator * self.inverse(value.denominator) % self.prime

    def sum(self, *values):
        return sum(values) % self.prime

    def product(self, *values):
        total = 1
        for value in values:
            total = total * value % self.prime
        return total

    def negative(self, value):
        return -value % self.prime

    def inverse(self, value):
        if not value % self.prime:
            raise Undefined
        return pow(value, -1, self.prime)

    def power(self, base, exponent):
        exponent, reach = evaluate(exponent, EXACT), self.reach
        if exponent.denominator != 1:
            raise Unfit
        self.reach *= max(1, abs(exponent))
        self.proves = self.proves and self.reach <= REACH
        base, self.reach = evaluate(base, self), reach
        if not base and exponent <= 0:
            raise Undefined
        # Fermat: huge exponents cost no more
        return pow(base, int(exponent) % (self.prime - 1), self.prime) if base else 0

    def call(self, name, operands):
        return self.number(EXACT.call(name, operands))


# Small ones for arcsin, large and negative ones because |x - 5| is 5 - x at small ones; in (0, 0) a
# whole number.
SCALES = (
    (0.1, 0.9),
    (10, 100),
    (-0.9, -0.1),
    (0, 0),
    (1.1, 3),
    (-100, -10),
    (0.1, 0.9),
    (3, 9),
    (0, 0),
    (-9, -1.1),
    (20, 50),
    (0, 0),
)


class Floating:
    """Complex floats. Variables are real; `loose` allows complex values on the way."""

    library, near, rounding, most, relative = cmath, 1e-9, 4e-15, 1e-9, 1e-10

    def __init__(self, seed, scale, loose):
        self.seed, self.scale, self.loose, self.noise = seed, scale, loose, 0.0

    def tolerance(self, x, y):
        """What two values may differ by: rounding, and what cancellation leaves where 0 should
        be."""
        return max(self.relative * max(abs(x), abs(y)), min(self.noise, self.most))

    def name(self, name):
        if name in CONSTANTS:
            return CONSTANTS[name](self.library)
        drawn, (low, high) = chance(self.seed, name), self.scale
        return self.number(
            Fraction(2 + drawn % 11 if low == high else low + (high - low) * (drawn / 2**128))
        )

    def number(self, value):
        return self.seen(complex(value.numerator / value.denominator), value)

    def seen(self, value, *nonzero):
        """value, which is not 0 when none of the others is. Beside a number below 1e-100 even 400
        digits can be too few."""
        if abs(value) < 1e-100 and all(nonzero):
            raise Underflow
        return value

    def sum(self, *values):
        self.noise = max(self.noise, self.rounding * max(map(abs, values)))
        return sum(values)

    def product(self, *values):
        return self.seen(math.prod(values), *values)

    def negative(self, value):
        return 0 - value  # not -value: its imaginary part would be -0, and the root of -4 then -2i

    def inverse(self, value):
        return 1 / value

    def power(self, base, exponent):
        base, exponent = evaluate(base, self), evaluate(exponent, self)
        whole = not exponent.imag and exponent.real == int(exponent.real)
        if not self.loose and base.real < 0 and not whole:
            raise Undefined
        if not base and exponent.real <= 0:
            raise Undefined
        return self.seen(
            base ** (int(exponent.real) if whole and abs(exponent.real) < 100 else exponent), base
        )

    def call(self, name, operands):
        values = [evaluate(operand, self) for operand in operands]
        x = values[0]
        if name in WHOLE:
            return self.whole(name, values)
        if name == "root":
            degree = values[1]
            odd = x.real < 0 and not x.imag and degree.real % 2 == 1
            return -((-x) ** (1 / degree)) if odd else x ** (1 / degree)
        if name == "tanh" and abs(x.real) > 100:
            raise Underflow
        outside = (
            name in ("sqrt", "ln", "log", "lg") and min(value.real for value in values) < 0
        ) or (name in ("arcsin", "arccos") and abs(x.real) > 1)
        if outside and not self.loose:
            raise Undefined
        self.noise = (
            max(self.noise, self.rounding * abs(x))
            if name in ("sin", "cos", "tan", "sec", "csc", "cot")
            else self.noise
        )
        value = getattr(self.library, LIBRARY[name])(x)
        if name in ("sec", "csc", "cot"):
            return 1 / value
        return (
            value / self.library.log(values[1])
            if len(values) == 2
            else self.seen(value, name == "exp")
        )

    def whole(self, name, values):
        if name == "abs":
            return abs(values[0]) + 0j
        if any(value.imag for value in values):
            raise Undefined
        numbers = [value.real for value in values]
        whole = [int(number + (0.5 if number > 0 else -0.5)) for number in numbers]
        if any(abs(number - near) > self.near for number, near in zip(numbers, whole)):
            if name not in ("floor", "ceil"):
                raise Undefined
            return self.number(Fraction(int(numbers[0]) - (numbers[0] < 0) + (name == "ceil")))
        try:
            return self.number(WHOLE[name](*map(Fraction, whole)))
        except Unfit:
            raise Undefined from None


class Precise(Floating):
    """The same with 400 digits, for points at which floats have gone through: so nothing here is
    too large to be computed."""

    library = mpmath.mp.clone()
    library.dps = 400
    near, rounding, most, relative = (
        library.mpf("1e-300"),
        library.mpf("1e-330"),
        library.mpf("1e-250"),
        library.mpf("1e-300"),
    )

    def number(self, value):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > 400:
            raise Undefined  # digits enough to be taken for an irrational number
        return self.library.mpc(self.library.mpf(value.numerator) / value.denominator)

    def seen(self, value, *_):
        return value


CONSTANTS = {
    "pi": lambda library: library.pi + 0j,
    "e": lambda library: library.exp(1),
    "i": lambda library: library.sqrt(-1),
    "degree": lambda library: library.pi / 180 + 0j,
}
LIBRARY = {
    name: name for name in ("sqrt", "exp", "sin", "cos", "tan", "sinh", "cosh", "tanh", "log")
} | {
    "ln": "log",
    "lg": "log10",
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "cot": "tan",
    "sec": "cos",
    "csc": "sin",
}


# ---- comparison ----------------------------------------------------------------------------------

POINTS = 3  # at which two expressions must at least be defined, and agree


def seed_of(first, second):
    """What the random numbers of a comparison belong to."""
    return " ".join(sorted((first.text, second.text)))


def values(first, second, modular=True, refuting=True):
    """Yields (value of first, value of second, what they may differ by) at random points; nothing
    where one is undefined.

    refuting: a quick look comes first, which can only tell that two are different. Without it all
    residues are modulo one prime, and all floats are precise. Raises Undecided when floats are all
    there is, and too coarse.
    """
    seed, names = seed_of(first, second), (first.names | second.names) - {"i"}
    if modular:
        try:
            for point in range(POINTS):
                field = Modular(
                    f"{point} {seed}", PRIME if refuting and not point else drawn_prime(seed)
                )
                yield evaluate(first.tree, field), evaluate(second.tree, field), 0
            if not field.proves:
                raise Undecided("exponents too large")
            return
        except Unfit:
            pass
        except Undefined:
            yield 0, 1, 0  # no value: not equal to anything
            return
    found, coarse, loose = 0, False, not names or "i" in first.names | second.names
    for point, scale in enumerate(SCALES + ((0, 0),) * 20 if names else SCALES[:1]):
        if point >= len(SCALES) and found >= POINTS:
            return  # the twenty are for \binom{n}{k}, which is defined at few of the others
        try:
            seen = look(first, second, Floating(f"{point} {seed}", scale, loose))
            if seen and found < POINTS and not (refuting and abs(seen[0] - seen[1]) > seen[2]):
                seen = look(first, second, Precise(f"{point} {seed}", scale, loose))
        except Underflow:
            coarse, seen = True, None
        if seen:
            found += 1
            yield seen
    if coarse and found < (POINTS if names else 1):
        raise Undecided("too small for floats")


def look(first, second, field):
    """-> (value of first, value of second, what they may differ by) in a field of floats; None
    where one has no value."""
    try:
        x, y = evaluate(first.tree, field), evaluate(second.tree, field)
    except (Undefined, Unfit, OverflowError, ZeroDivisionError, ValueError):
        return None
    return (
        (x, y, field.tolerance(x, y))
        if field.library.isfinite(x) and field.library.isfinite(y)
        else None
    )


def equal(first, second):
    """Whether two expressions have the same variables and the same values."""
    if first.names - {"i"} != second.names - {"i"}:
        return False
    if not first.names and not second.names:
        try:
            return evaluate(first.tree, EXACT) == evaluate(second.tree, EXACT)
        except Unfit:
            pass
        except Undefined:
            return False
    agreed = 0
    for x, y, tolerance in values(first, second):
        if abs(x - y) > tolerance:
            return False
        agreed += 1
    return agreed >= (POINTS if first.names - {"i"} else 1)


def proportional(first, second, positive=False):
    """Whether first = 0 and second = 0 are one equation: first is second times a number; a positive
    one for first > 0, second > 0."""
    if not first.names or first.names - {"i"} != second.names - {"i"}:
        return False
    triples = list(values(first, second, modular=not positive, refuting=False))
    if len(triples) < POINTS or not all(x and y for x, y, _ in triples):
        return False
    (x0, y0, _), prime = triples[0], drawn_prime(seed_of(first, second))
    if positive and (x0 / y0).real <= 0:
        return False
    return all(
        (x * y0 - y * x0) % prime == 0
        if isinstance(x, int)
        else abs(x * y0 - y * x0) <= tolerance * max(abs(x0), abs(y0))
        for x, y, tolerance in triples[1:]
    )


def difference(left, right):
    """left - right as an Expression."""
    return Expression(
        ("+", left.tree, ("-", right.tree)), left.names | right.names, f"{left.text}-({right.text})"
    )


# ---- unfinished arithmetic -----------------------------------------------------------------------

DIGITS = 10**30  # numbers up to here are written out


def is_unfinished(tree, number=False):
    r"""Whether arithmetic stands somewhere in a tree that its author could have carried out: the
    question again, not its answer.

    Unfinished is a sum, difference or product, with or without variables, in which two numbers
    stand (17 \times 23, 2 \cdot 3x, x+1+1) or whose constants together come to a number
    (\sqrt2\sqrt8, 3\sqrt2-\sqrt{18}); a quotient of numbers that comes to a whole one, unless it is
    a plain fraction (9!/7!, but 6/2); and whatever holds one of these: |17 \cdot 23|, 2^{1+2}. A
    number is here what exact arithmetic works out. Finished are numbers, plain fractions, mixed
    numbers, 4.5 \times 10^{33}, powers, factorials, binomials, roots and other functions of
    finished numbers (2^{10}, 5!, \sqrt{81}, \log_2 8), fractions of these (1/2^{10}), sums and
    products of what comes to no number (1+\sqrt5, 2\pi), and those that come to a number too long
    to be written out (2^{2021}-1). number: whether the answer should be a number that is written
    out. Then the last two are unfinished as well (e^{\ln 17+\ln 23}), but for angles, which hold
    \pi or degrees.
    """
    operation, *parts = tree
    if operation in ("num", "name") or is_scientific(tree):
        return False
    if any(is_unfinished(part, number) for part in parts if isinstance(part, tuple)):
        return True
    if operation not in "+*":
        return False
    if operation == "*":  # 5(2x) is 5*2*x; fractions are kept together
        parts = [
            factor
            for part in parts
            for factor in (
                part[1:] if part[0] == "*" and all(f[0] != "/" for f in part[1:]) else (part,)
            )
        ]
    above = [part for part in parts if part[0] != "/" and not has_variables(part)]
    below = [part for part in parts if part[0] == "/" and not has_variables(part)]
    if len(above) == len(below) == 1:
        if is_literal(above[0]) and is_literal(below[0][1]):
            return False
        value = worked_out((operation, *above, *below), number)
        return value is not None and (value.denominator == 1 or exact(above[0]) is None)
    groups = [[part for part in group if exact(part) is not None] for group in (above, below)] + [
        above + below
    ]
    return any(
        len(group) > 1 and worked_out((operation, *group), number) is not None for group in groups
    )


def is_scientific(tree):
    r"""Whether a tree is a decimal times a power of ten, 4.5 \times 10^{33}."""
    return (
        tree[0] == "*"
        and len(tree) == 3
        and is_literal(tree[1])
        and tree[2][:2] == ("^", ("num", 10))
        and is_literal(tree[2][2])
    )


def is_literal(tree):
    """Whether a tree is a number as it is written, with or without a minus."""
    return tree[0] == "num" or (tree[0] == "-" and is_literal(tree[1]))


def names_of(tree):
    """The names in a tree."""
    return (
        {tree[1]}
        if tree[0] == "name"
        else set().union(*(names_of(part) for part in tree[1:] if isinstance(part, tuple)))
    )


def has_variables(tree):
    """Whether a tree has a value only when its variables have one."""
    return not names_of(tree) <= CONSTANTS.keys()


def exact(tree):
    """The value of a tree as a Fraction, None when exact arithmetic has none."""
    try:
        return evaluate(tree, EXACT)
    except (Unfit, Undefined):
        return None


def worked_out(tree, number):
    """The number that a tree of constants comes to; None where is_unfinished says that there is
    none."""
    value = exact(tree)
    if value is not None:
        return value if is_short(value) or number or all(map(is_literal, tree[1:])) else None
    try:
        found = evaluate(tree, Floating("", (0, 0), True))
        value = Fraction(found.real).limit_denominator(1000)
        if abs(found - complex(value)) <= 1e-12 * abs(found):
            return value
    except (Undefined, Unfit, Underflow, ArithmeticError, ValueError):
        pass
    return Fraction(0) if number and not names_of(tree) & {"pi", "degree"} else None


def is_short(value):
    """Whether a Fraction is one that is written out."""
    return max(abs(value.numerator), value.denominator) < DIGITS


def main():
    if len(sys.argv) != 3:
        raise BadInput("usage: python algebra.py EXPRESSION EXPRESSION")
    try:
        print("equal" if equal(*(parse(clean(text)) for text in sys.argv[1:])) else "different")
    except Unreadable as error:
        raise BadInput(f"not an expression: {error}") from None


if __name__ == "__main__":
    guarded(main)
