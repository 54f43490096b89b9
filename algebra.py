r"""Whether two expressions are equal: exactly, modulo a prime, or in floats at random points. Nothing is simplified or eval-ed.

    python algebra.py "\frac12" 0.5             # -> equal
    python algebra.py "\sin 2x" "2\sin x\cos x"

The idea. Two expressions are equal when they have the same variables and the same value wherever both are defined. Simplifying
is slow and can be made to hang; evaluating at random points is neither. Three ways of evaluating, the first one that can do both:

- Exact: constants as fractions of integers of bounded size. 1234576 is never 1234567, 0.3333 never 1/3.
- Modular: rational functions at random points modulo a prime of 31 digits. Exact up to a chance of 1e-27; (x+1)^{100000} costs no
  more than (x+1)^2. The prime is 1 modulo 4, so that i has a value too.
- Floating: roots, logarithms, trigonometry, variables in exponents; complex floats at a dozen points, to a relative 1e-12.
  With variables and without i the points are real, and those where a root or a logarithm is not are left out.

The points come from a hash of the two expressions: grading is reproducible. What is read is hostile: digits and exponents are
bounded, so that no operation is slow, and a deadline in CPU time is looked at in every node all the same.

Policies: the variables must agree, so 0x is not 0 and x^0 not 1. 1/0 is nothing, not even infinity.
"""
import cmath
import gc
import hashlib
import math
import sys
import threading
import time
from fractions import Fraction

from latex import Expression, Unreadable, clean, parse

BITS = 8_192             # of a numerator or denominator in exact arithmetic
SECONDS = 0.05           # of CPU time for one comparison
PRIME = 10**30 + 57     # 1 modulo 4


class Unfit(Exception):
    """This way of evaluating cannot do it; another one may."""


class Undefined(Exception):
    """No value at this point: a division by 0, the logarithm of 0, a number beyond the range of floats."""


class OutOfTime(Exception):
    """The comparison hit its deadline."""


class Deadline(threading.local):
    """When the comparison of this thread must end: `with deadline:` gives it SECONDS. Python's garbage collector waits meanwhile: with a
    large heap it takes longer than that, and the answer would be blamed for it."""
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


clock = time.thread_time         # CPU time of the thread: one that waits for its core has not used any
deadline = Deadline()


# ------------------------------------------------------------------------------------------------------------ evaluation

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
    return getattr(field, {"+": "sum", "*": "product", "-": "negative", "/": "inverse"}[operation])(*values)


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
    if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n or min(k, n - k) * int(n).bit_length() > BITS:
        raise Unfit
    return Fraction(math.comb(int(n), int(k)))


WHOLE = {"!": factorial, "binom": binomial, "abs": abs,
         "floor": lambda x: Fraction(math.floor(x)), "ceil": lambda x: Fraction(math.ceil(x))}
EXACT = Exact()


def chance(seed, name):
    """A random number of 128 bits that belongs to a name: the same in every process."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(errors="replace"), digest_size=16).digest(), "big")


class Modular:
    """Residues modulo PRIME; variables are random ones."""
    i = next(root for root in (pow(base, PRIME // 4, PRIME) for base in range(2, 100)) if root * root % PRIME == PRIME - 1)

    def __init__(self, seed):
        self.seed = seed

    def name(self, name):
        if name in ("pi", "e", "degree"):
            raise Unfit
        return self.i if name == "i" else chance(self.seed, name) % PRIME

    def number(self, value):
        return value.numerator * self.inverse(value.denominator) % PRIME

    def sum(self, *values):
        return sum(values) % PRIME

    def product(self, *values):
        total = 1
        for value in values:
            total = total * value % PRIME
        return total

    def negative(self, value):
        return -value % PRIME

    def inverse(self, value):
        if not value % PRIME:
            raise Undefined
        return pow(value, -1, PRIME)

    def power(self, base, exponent):
        exponent, base = evaluate(exponent, EXACT), evaluate(base, self)
        if exponent.denominator != 1:
            raise Unfit
        if not base and exponent <= 0:
            raise Undefined
        return pow(base, int(exponent) % (PRIME - 1), PRIME) if base else 0    # Fermat: huge exponents are no larger than the prime

    def call(self, name, operands):
        return self.number(EXACT.call(name, operands))


# Small ones for arcsin, large and negative ones because |x - 5| is 5 - x at small ones; in (0, 0) a whole number.
SCALES = ((0.1, 0.9), (10, 100), (-0.9, -0.1), (0, 0), (1.1, 3), (-100, -10), (0.1, 0.9), (3, 9), (0, 0), (-9, -1.1), (20, 50), (0, 0))


class Floating:
    """Complex floats. Variables are real; `loose` allows complex values on the way."""
    def __init__(self, seed, scale, loose):
        self.seed, self.scale, self.loose, self.noise = seed, scale, loose, 0.0

    def name(self, name):
        if name in CONSTANTS:
            return CONSTANTS[name]
        drawn, (low, high) = chance(self.seed, name), self.scale
        return complex(2 + drawn % 11 if low == high else low + (high - low) * (drawn / 2**128))

    def number(self, value):
        return complex(value.numerator / value.denominator)

    def sum(self, *values):
        self.noise = max(self.noise, 4e-15 * max(map(abs, values)))       # what cancellation leaves where 0 should be
        return sum(values)

    def product(self, *values):
        return math.prod(values)

    def negative(self, value):
        return 0 - value                     # not -value: its imaginary part would be -0, and the root of -4 then -2i

    def inverse(self, value):
        return 1 / value

    def power(self, base, exponent):
        base, exponent = evaluate(base, self), evaluate(exponent, self)
        if not self.loose and base.real < 0 and not exponent.real.is_integer():
            raise Undefined
        if not base and exponent.real <= 0:
            raise Undefined
        return base ** (int(exponent.real) if not exponent.imag and exponent.real.is_integer() and abs(exponent.real) < 100 else exponent)

    def call(self, name, operands):
        values = [evaluate(operand, self) for operand in operands]
        x = values[0]
        if name in WHOLE:
            return self.whole(name, values)
        if name == "root":
            degree = values[1]
            odd = x.real < 0 and not x.imag and degree.real % 2 == 1
            return -(-x) ** (1 / degree) if odd else x ** (1 / degree)
        if not self.loose and ((x.real < 0 and name in ("sqrt", "ln", "log", "lg")) or (abs(x.real) > 1 and name in ("arcsin", "arccos"))):
            raise Undefined
        self.noise = max(self.noise, 4e-15 * abs(x)) if name in ("sin", "cos", "tan", "sec", "csc", "cot") else self.noise
        return CALLS[name](x)

    def whole(self, name, values):
        if name == "abs":
            return complex(abs(values[0]))
        if any(value.imag for value in values):
            raise Undefined
        near = [round(value.real) if abs(value.real - round(value.real)) < 1e-9 else value.real for value in values]
        try:
            return self.number(WHOLE[name](*map(Fraction, near)))
        except Unfit:
            raise Undefined from None


CONSTANTS = {"pi": complex(math.pi), "e": complex(math.e), "i": 1j, "degree": complex(math.pi / 180)}
CALLS = {name: getattr(cmath, name) for name in ("sqrt", "exp", "sin", "cos", "tan", "sinh", "cosh", "tanh", "log")} | {
    "ln": cmath.log, "lg": cmath.log10, "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan,
    "cot": lambda x: 1 / cmath.tan(x), "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x)}


# ------------------------------------------------------------------------------------------------------------- comparison

POINTS = 3               # at which two expressions must at least be defined, and agree


def values(first, second, modular=True):
    """Yields (value of first, value of second, what they may differ by) at random points; nothing where one is undefined."""
    seed = " ".join(sorted((first.text, second.text)))
    names = (first.names | second.names) - {"i"}
    if modular:
        try:
            for point in range(POINTS if names else 1):
                field = Modular(f"{point} {seed}")
                yield evaluate(first.tree, field), evaluate(second.tree, field), 0
            return
        except Unfit:
            pass
        except Undefined:
            return
    found = 0
    for point, scale in enumerate(SCALES + ((0, 0),) * 20 if names else SCALES[:1]):
        if point >= len(SCALES) and found >= POINTS:
            return                           # the twenty are for \binom{n}{k}, which is defined at few of the others
        field = Floating(f"{point} {seed}", scale, not names or "i" in first.names | second.names)
        try:
            x, y = evaluate(first.tree, field), evaluate(second.tree, field)
        except (Undefined, Unfit, OverflowError, ZeroDivisionError, ValueError):
            continue
        if cmath.isfinite(x) and cmath.isfinite(y):
            found += 1
            yield x, y, max((1e-10 if names else 1e-12) * max(abs(x), abs(y)), min(field.noise, 1e-9))


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
    """Whether first = 0 and second = 0 are one equation: first is second times a number; a positive one for first > 0, second > 0."""
    if not first.names or first.names - {"i"} != second.names - {"i"}:
        return False
    pairs = [(x, y) for x, y, _ in values(first, second, modular=not positive)]
    if len(pairs) < POINTS or not all(x and y for x, y in pairs):
        return False
    (x0, y0), modular = pairs[0], isinstance(pairs[0][0], int)
    if positive and (x0 / y0).real <= 0:
        return False
    return all((x * y0 - y * x0) % PRIME == 0 if modular else abs(x * y0 - y * x0) <= 1e-10 * abs(x * y0) for x, y in pairs[1:])


def difference(left, right):
    """left - right as an Expression."""
    return Expression(("+", left.tree, ("-", right.tree)), left.names | right.names, f"{left.text}-({right.text})")


def is_unfinished(expression):
    """Whether it is a bare sum or product of plain numbers, such as 17 \\times 23: the question again, not its answer."""
    operation, *parts = expression.tree
    return operation in "+*" and all(map(plain, parts)) and sum(part[0] != "/" for part in parts) > 1


def plain(tree):
    """Whether a tree is an integer, a decimal or a fraction of those, with any sign."""
    if tree[0] == "*":
        return len(tree) == 3 and tree[1][0] == "num" and tree[2][0] == "/" and tree[2][1][0] == "num"
    return tree[0] == "num" or (tree[0] in ("-", "/") and plain(tree[1]))


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: python algebra.py EXPRESSION EXPRESSION")
    try:
        print("equal" if equal(*(parse(clean(text)) for text in sys.argv[1:])) else "different")
    except Unreadable as error:
        sys.exit(f"not an expression: {error}")


if __name__ == "__main__":
    main()
