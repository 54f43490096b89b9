r"""Decides whether two expressions are equal: exact, modulo a prime, or at random points.

    python -m verifier.answers "\sin 2x" "2\sin x\cos x"

The idea. Two expressions are equal when they have the same variables, and the same value wherever
both are defined. Simplifying is slow and can be made to hang; evaluating at random points is
neither. There are three ways to evaluate, and the first one that handles both expressions decides:

- Exact: constants, as fractions of integers of bounded size. 0.3333 is never 1/3.
- Modular: rational functions, at random points modulo primes of 100 bits. (x+1)^{100000} costs no
  more than (x+1)^2.
- Floating: roots, logarithms, trigonometry, variables in exponents. Complex floats at a dozen
  points refute; what they hold equal is checked again with 400 digits.

A hash of the two expressions seeds the points, so verdicts are reproducible. Expressions are
hostile: digits and exponents are bounded, and every node checks a deadline in CPU time.
"""

import cmath
import functools
import gc
import hashlib
import math
import threading
import time
from fractions import Fraction

import mpmath  # comes with torch, for sympy

from verifier.latex import Expression

BITS = 8_192  # of a numerator or denominator in exact arithmetic
SECONDS = 0.05  # of CPU time for one comparison

# The modulus of the first, quick look. Like all moduli here it is 1 modulo 4, so that i has a value
# too. This prime is published, so an answer can be built on it: x^2 + PRIME. Therefore PRIME only
# refutes. Two expressions that it holds equal are compared again modulo a prime that a hash of both
# texts picks among 2^93.
PRIME = 10**30 + 57
# Exponents on top of each other, multiplied, modulo a prime. Up to this the difference of two
# expressions has so few digits that at most one in 2^45 of the picked primes divides it.
REACH = 2**40
SMALL_PRIMES = math.prod(
    prime for prime in range(3, 200) if all(prime % i for i in range(2, prime))
)


class Unfit(Exception):
    """This way of evaluating cannot handle the expression; another one may."""


class Undefined(Exception):
    """No value at this point: a division by 0, the logarithm of 0, or a float out of range."""


class Underflow(Exception):
    """A value too close to 0, or to a function's limit, for the digits there are."""


class Undecided(Exception):
    """No way of evaluating can decide whether the two are equal."""


class OutOfTime(Exception):
    """The comparison reached its deadline."""


class Deadline(threading.local):
    """`with deadline:` gives a comparison of this thread SECONDS of CPU time.

    Python's garbage collector is off meanwhile. On a large heap one collection takes longer than
    the deadline, and the answer would be counted as undecided for it.
    """

    end = math.inf
    collector_was_on = False

    def __enter__(self):
        self.end, self.collector_was_on = clock() + SECONDS, gc.isenabled()
        gc.disable()

    def __exit__(self, *_):
        self.end = math.inf
        if self.collector_was_on:
            gc.enable()

    def check(self):
        """Raises OutOfTime after the deadline."""
        if clock() > self.end:
            raise OutOfTime(f"not decided within {SECONDS} s")


clock = time.thread_time  # CPU time of this thread: waiting for a core on a busy machine is free
deadline = Deadline()


# ---- evaluation ----------------------------------------------------------------------------------

METHODS = {"+": "sum", "*": "product", "-": "negative", "/": "inverse"}


def evaluate(tree, field):
    """The value of a tree in a field: Exact, Modular, Floating or Precise."""
    deadline.check()
    operation, *operands = tree
    if operation == "num":
        return field.number(operands[0])
    if operation == "name":
        return field.name(operands[0])
    # Calls and powers evaluate their operands themselves: an exponent is an exact number in every
    # field but the floats.
    if operation == "call":
        return field.call(operands[0], operands[1:])
    if operation == "^":
        return field.power(*operands)
    values = [evaluate(operand, field) for operand in operands]
    return getattr(field, METHODS[operation])(*values)


class Exact:
    """Fractions of integers of at most BITS bits."""

    def number(self, value):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
            raise Unfit
        return value

    def name(self, name):
        raise Unfit

    def sum(self, *values):
        # The size is checked after every term, so no sum grows beyond BITS on the way.
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
            raise Undefined  # 1/0 has no value, not even infinity
        return 1 / value

    def power(self, base, exponent):
        base, exponent = evaluate(base, self), evaluate(exponent, self)
        # base^exponent has about size x |exponent| bits: refused before it is computed.
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if exponent.denominator != 1 or size * abs(exponent) > BITS:
            raise Unfit
        if not base and exponent <= 0:
            raise Undefined
        return base ** int(exponent)

    def call(self, name, operands):
        """A function of rational numbers. Unfit if its value is not a rational number."""
        values = [evaluate(operand, self) for operand in operands]
        if name in EXACT_FUNCTIONS:
            return EXACT_FUNCTIONS[name](*values)
        if name == "sqrt" and values[0] >= 0:
            # The root of a fraction in lowest terms is exact if the roots of both of its parts are.
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
    if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n:
        raise Unfit
    if min(k, n - k) * int(n).bit_length() > BITS:
        raise Unfit
    return Fraction(math.comb(int(n), int(k)))


EXACT_FUNCTIONS = {
    "!": factorial,
    "binom": binomial,
    "abs": abs,
    "floor": lambda x: Fraction(math.floor(x)),
    "ceil": lambda x: Fraction(math.ceil(x)),
}
EXACT = Exact()


def hash_number(seed, name):
    """A number of 128 bits that depends on seed and name only: the same in every process."""
    text = f"{seed} {name}".encode(errors="replace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "big")


@functools.lru_cache(64)
def drawn_prime(seed):
    """The first prime 1 modulo 4 after a number of 100 bits that the seed picks.

    Fermat's test is enough for numbers that nobody chose.
    """
    # 128 - 28 = 100 bits with the highest one set, then made 1 modulo 4.
    candidate = (hash_number(seed, "prime") >> 28 | 1 << 99) // 4 * 4 + 1
    while math.gcd(candidate, SMALL_PRIMES) > 1 or pow(2, candidate - 1, candidate) != 1:
        candidate += 4
    return candidate


@functools.lru_cache(64)
def root_of_minus_one(prime):
    """A number whose square is -1 modulo the prime: the value of i."""
    # For half of all bases b, b^((p - 1) / 2) is -1, and b^((p - 1) / 4) is a root of it.
    candidates = (pow(base, prime // 4, prime) for base in range(2, 100))
    return next(root for root in candidates if root * root % prime == prime - 1)


class Modular:
    """Residues modulo a prime; variables are random residues."""

    def __init__(self, seed, prime):
        self.seed, self.prime = seed, prime
        self.reach = 1  # the exponents above this node, multiplied
        self.proves = True  # no reach was above REACH

    def name(self, name):
        # These are no fractions, and have no residue.
        if name in ("pi", "e", "degree"):
            raise Unfit
        if name == "i":
            return root_of_minus_one(self.prime)
        return hash_number(self.seed, name) % self.prime

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
        # Exponents multiply: in ((x^a)^b)^c the x has the reach a b c.
        self.reach *= max(1, abs(exponent))
        self.proves = self.proves and self.reach <= REACH
        base, self.reach = evaluate(base, self), reach
        if not base and exponent <= 0:
            raise Undefined
        # by Fermat's little theorem huge exponents cost no more than small ones
        return pow(base, int(exponent) % (self.prime - 1), self.prime) if base else 0

    def call(self, name, operands):
        """A function of constants: worked out exactly, then taken as a residue."""
        return self.number(EXACT.call(name, operands))


# Ranges of the variables at a dozen points. Small ones are for arcsin; large and negative ones are
# there because |x - 5| is 5 - x at small ones. (0, 0) stands for an integer from 2 to 12.
SCALES = (
    *((0.1, 0.9), (10, 100), (-0.9, -0.1), (0, 0), (1.1, 3), (-100, -10)),
    *((0.1, 0.9), (3, 9), (0, 0), (-9, -1.1), (20, 50), (0, 0)),
)


class Floating:
    """Complex floats; variables are real.

    Without allow_complex a point is left out (Undefined) where a root or a logarithm is not real.
    """

    library = cmath
    integer_slack = 1e-9  # a value this close to an integer is one, for n! and floor
    rounding = 4e-15  # relative error that one operation can leave
    max_noise = 1e-9  # cancellation never excuses more than this
    relative = 1e-10  # tolerance of a comparison

    def __init__(self, seed, scale, allow_complex):
        self.seed, self.scale, self.allow_complex = seed, scale, allow_complex
        self.noise = 0.0  # largest absolute rounding error of a sum or an angle so far

    def tolerance(self, x, y):
        """The difference that two values may have: rounding, and cancellation where 0 should be."""
        return max(self.relative * max(abs(x), abs(y)), min(self.noise, self.max_noise))

    def name(self, name):
        if name in CONSTANTS:
            return CONSTANTS[name](self.library)
        drawn, (low, high) = hash_number(self.seed, name), self.scale
        if low == high:
            return self.number(Fraction(2 + drawn % 11))
        return self.number(Fraction(low + (high - low) * (drawn / 2**128)))

    def number(self, value):
        return self.checked(complex(value.numerator / value.denominator), value)

    def checked(self, value, *nonzero):
        """value; raises Underflow if it is almost 0 although none of the others is 0.

        Beside a number below 1e-100 even 400 digits can be too few.
        """
        if abs(value) < 1e-100 and all(nonzero):
            raise Underflow
        return value

    def sum(self, *values):
        self.noise = max(self.noise, self.rounding * max(map(abs, values)))
        return sum(values)

    def product(self, *values):
        return self.checked(math.prod(values), *values)

    def negative(self, value):
        return 0 - value  # -value would have the imaginary part -0, and the root of -4 would be -2i

    def inverse(self, value):
        return 1 / value

    def power(self, base, exponent):
        base, exponent = evaluate(base, self), evaluate(exponent, self)
        is_integer = not exponent.imag and exponent.real == int(exponent.real)
        if not self.allow_complex and base.real < 0 and not is_integer:
            raise Undefined
        if not base and exponent.real <= 0:
            raise Undefined
        if is_integer and abs(exponent.real) < 100:
            exponent = int(exponent.real)
        return self.checked(base**exponent, base)

    def call(self, name, operands):
        """A function of complex floats. Undefined where it has no value (or no real one)."""
        values = [evaluate(operand, self) for operand in operands]
        x = values[0]
        if name in EXACT_FUNCTIONS:
            return self.exact_function(name, values)
        if name == "root":
            # An odd root of a negative number is real, as in school; the principal value is not.
            degree = values[1]
            if x.real < 0 and not x.imag and degree.real % 2 == 1:
                return -((-x) ** (1 / degree))  # \sqrt[3]{-8} is -2
            return x ** (1 / degree)
        if name == "tanh" and abs(x.real) > 100:
            raise Underflow  # 1, for the digits there are
        if not self.allow_complex:
            if name in ("sqrt", "ln", "log", "lg") and min(value.real for value in values) < 0:
                raise Undefined
            if name in ("arcsin", "arccos") and abs(x.real) > 1:
                raise Undefined
        # An error of the angle is an error of the value, and a large angle has a large one.
        if name in ("sin", "cos", "tan", "sec", "csc", "cot"):
            self.noise = max(self.noise, self.rounding * abs(x))
        value = getattr(self.library, LIBRARY[name])(x)
        if name in ("sec", "csc", "cot"):
            return 1 / value
        if len(values) == 2:  # a logarithm with its base
            return value / self.library.log(values[1])
        return self.checked(value, name == "exp")

    def exact_function(self, name, values):
        """A function of integers, for floats that are integers up to rounding; |x|, floor, ceil."""
        if name == "abs":
            return abs(values[0]) + 0j
        if any(value.imag for value in values):
            raise Undefined
        numbers = [value.real for value in values]
        nearest = [int(number + (0.5 if number > 0 else -0.5)) for number in numbers]
        if any(abs(number - near) > self.integer_slack for number, near in zip(numbers, nearest)):
            if name not in ("floor", "ceil"):
                raise Undefined
            return self.number(Fraction(int(numbers[0]) - (numbers[0] < 0) + (name == "ceil")))
        try:
            return self.number(EXACT_FUNCTIONS[name](*map(Fraction, nearest)))
        except Unfit:
            raise Undefined from None


class Precise(Floating):
    """The same with 400 digits: no decimal is ever equal to an irrational number.

    For points at which Floating has succeeded, so nothing here is too large to be computed.
    """

    library = mpmath.mp.clone()
    library.dps = 400
    integer_slack = library.mpf("1e-300")
    rounding = library.mpf("1e-330")
    max_noise = library.mpf("1e-250")
    relative = library.mpf("1e-300")

    def number(self, value):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > 400:
            raise Undefined  # enough digits to be taken for an irrational number
        return self.library.mpc(self.library.mpf(value.numerator) / value.denominator)

    def checked(self, value, *_):
        return value


CONSTANTS = {
    "pi": lambda library: library.pi + 0j,
    "e": lambda library: library.exp(1),
    "i": lambda library: library.sqrt(-1),
    "degree": lambda library: library.pi / 180 + 0j,
}
LIBRARY = {name: name for name in ("sqrt", "exp", "sin", "cos", "tan", "sinh", "cosh", "tanh")}
LIBRARY |= {"log": "log", "ln": "log", "lg": "log10"}
LIBRARY |= {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}
LIBRARY |= {"cot": "tan", "sec": "cos", "csc": "sin"}  # inverted in Floating.call


# ---- comparison ----------------------------------------------------------------------------------

POINTS = 3  # at which two expressions must at least be defined, and agree


def equal(first, second):
    """Whether two expressions have the same variables and the same values.

    The variables must agree: 0x is not 0, and x^0 is not 1. Raises Undecided.
    """
    if first.names - {"i"} != second.names - {"i"}:
        return False
    # Constants: exactly, where that is possible.
    if not first.names and not second.names:
        try:
            return evaluate(first.tree, EXACT) == evaluate(second.tree, EXACT)
        except Unfit:
            pass
        except Undefined:
            return False
    # Otherwise at points: one difference refutes, and a few agreements decide.
    agreed = 0
    for x, y, tolerance in values_at_points(first, second):
        if abs(x - y) > tolerance:
            return False
        agreed += 1
    return agreed >= (POINTS if first.names - {"i"} else 1)


def proportional(first, second, positive=False):
    """Whether first = 0 and second = 0 are one equation: first is second times a number.

    positive: the number must be positive, as for first > 0 and second > 0.
    """
    if not first.names or first.names - {"i"} != second.names - {"i"}:
        return False
    triples = list(values_at_points(first, second, modular=not positive, refuting=False))
    if len(triples) < POINTS or not all(x and y for x, y, _ in triples):
        return False
    # x / y must be the same at all points. Cross-multiplied, so that residues need no division.
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
    tree = ("+", left.tree, ("-", right.tree))
    return Expression(tree, left.names | right.names, f"{left.text}-({right.text})")


def seed_of(first, second):
    """The seed of a comparison, the same for both orders."""
    return " ".join(sorted((first.text, second.text)))


def values_at_points(first, second, modular=True, refuting=True):
    """Yields (value of first, value of second, tolerance) at random points.

    Points where one of the two is undefined are left out. modular: try residues before floats.
    refuting: start with cheap values (PRIME, plain floats), which can only show that the two
    differ. Without it all residues are modulo one prime and all floats are precise. Raises
    Undecided when the values are too close to 0 for floats: e^{-1000} is not 0.
    """
    seed, variables = seed_of(first, second), (first.names | second.names) - {"i"}
    # Residues, if both expressions have them. The first point, modulo PRIME, only refutes.
    if modular:
        try:
            for point in range(POINTS):
                prime = PRIME if refuting and not point else drawn_prime(seed)
                field = Modular(f"{point} {seed}", prime)
                yield evaluate(first.tree, field), evaluate(second.tree, field), 0
            if not field.proves:
                raise Undecided("exponents too large")
            return
        except Unfit:
            pass
        except Undefined:
            yield 0, 1, 0  # no value: not equal to anything
            return
    # Floats. Points that plain floats hold equal are evaluated again with 400 digits, POINTS times;
    # the rest can only refute.
    found, underflow = 0, False
    allow_complex = not variables or "i" in first.names | second.names
    # The twenty more points are integers, for \binom{n}{k}, which is defined at few of the dozen.
    # Constants have the same value everywhere: one point.
    scales = SCALES + ((0, 0),) * 20 if variables else SCALES[:1]
    for point, scale in enumerate(scales):
        if point >= len(SCALES) and found >= POINTS:
            return
        arguments = f"{point} {seed}", scale, allow_complex
        try:
            triple = values_in(first, second, Floating(*arguments))
            differs = refuting and triple and abs(triple[0] - triple[1]) > triple[2]
            if triple and found < POINTS and not differs:
                triple = values_in(first, second, Precise(*arguments))
        except Underflow:
            underflow, triple = True, None
        if triple:
            found += 1
            yield triple
    # raised at the end only: another point may have told the two apart
    if underflow and found < (POINTS if variables else 1):
        raise Undecided("too small for floats")


def values_in(first, second, field):
    """-> (value of first, value of second, tolerance) in a field of floats.

    None where one of the two has no value.
    """
    try:
        x, y = evaluate(first.tree, field), evaluate(second.tree, field)
    except (Undefined, Unfit, OverflowError, ZeroDivisionError, ValueError):
        return None
    if not (field.library.isfinite(x) and field.library.isfinite(y)):
        return None
    return x, y, field.tolerance(x, y)


# ---- unfinished arithmetic -----------------------------------------------------------------------

DIGITS = 10**30  # numbers up to here are written out


def is_unfinished(tree, number=False):
    r"""Whether a tree contains arithmetic that its author could have carried out.

    Such an answer repeats the question. number: whether the answer should be a number that is
    written out. Unfinished are

    - a sum, difference or product, with or without variables, that has two numbers (17 \times 23,
      2 \cdot 3x, x+1+1), or whose constants together come to a number (\sqrt2\sqrt8);
    - a quotient of numbers that comes to an integer and is not a plain fraction (9!/7!, but 6/2);
    - everything that contains one of these: |17 \cdot 23|, 2^{1+2}.

    A number is here a constant that exact arithmetic works out. Finished are numbers, plain
    fractions, mixed numbers, 4.5 \times 10^{33}; powers, factorials, binomials, roots and other
    functions of finished numbers (2^{10}, 5!, \sqrt{81}, \log_2 8), and fractions of these. Sums
    and products that come to no number (1+\sqrt5, 2\pi), or to one that is too long to be written
    out (2^{2021}-1), are finished without `number` and unfinished with it (e^{\ln 17+\ln 23}),
    except for angles, which contain \pi or degrees.
    """
    operation, *parts = tree
    if operation in ("num", "name") or is_scientific(tree):
        return False
    if any(is_unfinished(part, number) for part in parts if isinstance(part, tuple)):
        return True
    if operation not in "+*":
        return False
    if operation == "*":
        parts = flat_factors(parts)
    # Constants of the sum or product, and those that are divided by.
    above = [part for part in parts if part[0] != "/" and not has_variables(part)]
    below = [part for part in parts if part[0] == "/" and not has_variables(part)]
    if len(above) == len(below) == 1:  # one quotient
        if is_literal(above[0]) and is_literal(below[0][1]):
            return False
        value = constant_value((operation, *above, *below), number)
        return value is not None and (value.denominator == 1 or exact_value(above[0]) is None)
    # Left to do are numbers above the line, numbers below it, or constants that together make one.
    groups = [
        [part for part in above if exact_value(part) is not None],
        [part for part in below if exact_value(part) is not None],
        above + below,
    ]
    return any(
        len(group) > 1 and constant_value((operation, *group), number) is not None
        for group in groups
    )


def flat_factors(factors):
    """The factors of a product, with those of products in it: 5(2x) is 5*2*x.

    Fractions are kept together.
    """
    flat = []
    for factor in factors:
        is_product = factor[0] == "*" and all(part[0] != "/" for part in factor[1:])
        flat.extend(factor[1:] if is_product else (factor,))
    return flat


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
    if tree[0] == "name":
        return {tree[1]}
    return set().union(*(names_of(part) for part in tree[1:] if isinstance(part, tuple)))


def has_variables(tree):
    """Whether a tree has a value only when its variables have one."""
    return not names_of(tree) <= CONSTANTS.keys()


def exact_value(tree):
    """The value of a tree as a Fraction; None when exact arithmetic has none."""
    try:
        return evaluate(tree, EXACT)
    except (Unfit, Undefined):
        return None


def constant_value(tree, number):
    """The number that a tree of constants comes to; None if is_unfinished counts it as finished."""
    value = exact_value(tree)
    if value is not None:
        return value if is_short(value) or number or all(map(is_literal, tree[1:])) else None
    try:
        found = evaluate(tree, Floating("", (0, 0), allow_complex=True))
        # Irrational factors may cancel: \sqrt2\sqrt8 is 4.
        value = Fraction(found.real).limit_denominator(1000)
        if abs(found - complex(value)) <= 1e-12 * abs(found):
            return value
    except (Undefined, Unfit, Underflow, ArithmeticError, ValueError):
        pass
    # an irrational number; any Fraction will do
    return Fraction(0) if number and not names_of(tree) & {"pi", "degree"} else None


def is_short(value):
    """Whether a Fraction is one that is written out."""
    return max(abs(value.numerator), value.denominator) < DIGITS
