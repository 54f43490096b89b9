r"""Compares answers: numbers, units, lists, tuples, intervals, sets, matrices, equations, words.

    python -m verifier.answers "(-\infty,1)\cup(2,\infty)" "x<1 \text{ or } x>2"

The idea. `equal` tries the cheap ways first: exact numbers, then equal text. Everything else is
read and matched:

- `read` takes a cleaned answer apart from the outside in, by the separators at its top level and
  by the brackets around it, into one of the types below. latex.py parses single expressions.
- `match` compares two values: elements in order for tuples and in any order for lists, sets and
  unions; expressions by algebra.py; unreadable text letter by letter.

There is no numerical tolerance. Where a gold leaves something open, the rule stands at the
function that applies it.
"""

import functools
import operator
import re
import signal
import sys
from fractions import Fraction
from typing import Any, NamedTuple

from verifier import algebra
from verifier.latex import Expression, Unreadable, clean, parse
from verifier.units import NO_UNIT, PERCENT, SMALL, TENS, Unit, split_unit

LONGEST = 1_000  # characters; a real answer has tens, and a longer text is wrong unread
MAX_ITEMS = 40  # of a list or a matrix; golds have fewer
MAX_DEPTH = 6  # sets of tuples of ...


class VerifierFailed(Exception):
    """The verifier reached no verdict, which says nothing about the answer."""


# ---- the door ------------------------------------------------------------------------------------


def equal(answer, gold):
    """answer, gold: text -> bool, whether they are the same answer.

    Takes at most algebra.SECONDS of CPU time. Raises VerifierFailed when that was too short, when
    numbers are too close to 0 to be told apart, and for any error in here.
    """
    if not answer or len(answer) > LONGEST:
        return False
    try:
        with algebra.deadline:
            # 1. Two numbers are compared as fractions: 0.5 is 1/2, and 1234576 is not 1234567.
            a, b = parse_number(answer), parse_number(gold)
            if a is not None and b is not None:
                return a == b

            # 2. So are numbers between spaces, "8 10 6 4", one by one and nothing else.
            golds = gold.split()
            if len(golds) > 1 and all(parse_number(part) is not None for part in golds):
                parts = answer.split()
                return len(parts) == len(golds) and all(
                    parse_number(x) == parse_number(y) for x, y in zip(parts, golds)
                )

            # 3. Equal text needs no evaluation, so 2^{1000000} costs nothing.
            answer, gold = clean(answer), clean(gold)
            if not answer or not gold or gold.lower() == "nan":
                return False
            if without_idle_spaces(answer) == without_idle_spaces(gold):
                return True

            # 4. Structure and algebra. 17 \times 23 repeats the question whose answer is 391.
            value, gold_value = read(answer), read(gold)
            return match(value, gold_value) and not leaves_more_undone(value, gold_value)
    except Exception as error:
        raise VerifierFailed(f"{type(error).__name__}: {error}") from error


DECIMAL = re.compile(r"([+-]?)((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?)")


@functools.lru_cache(4096)  # a rollout states the same few numbers again and again
def parse_number(text):
    """-> Fraction, or None when text is not ONE number.

    A number is an integer, a decimal, thousands with commas, a/b or \\frac{a}{b}.
    """
    # Dollars around it, the minus sign of Unicode, a full stop behind.
    text = text.strip().strip("$").strip().replace("\u2212", "-").removesuffix(".")
    fraction = re.fullmatch(r"([+-]?)\s*\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", text)
    if fraction:
        text = f"{fraction[1]}{fraction[2].strip()}/{fraction[3].strip()}"
    above, slash, below = text.partition("/")
    if slash:
        above, below = parse_decimal(above.strip()), parse_decimal(below.strip())
        return above / below if above is not None and below else None
    return parse_decimal(text)


def parse_decimal(text):
    """-> Fraction of a signed decimal in ASCII digits, or None.

    int() alone would accept "1_0" and "\u0663".
    """
    digits = DECIMAL.fullmatch(text)
    if not digits or not any(char.isdigit() for char in digits[2]):
        return None
    value = Fraction(digits[2].replace(",", "").removesuffix("."))
    return -value if digits[1] == "-" else value


def without_idle_spaces(text):
    """A cleaned answer without the spaces that mean nothing."""
    return re.sub(r" *(?<![0-9A-Za-z]) | (?![0-9A-Za-z]) *", "", text)


def leaves_more_undone(answer, gold):
    """Whether the answer has arithmetic left to do (algebra.is_unfinished), unlike the gold."""
    # Where the gold is a number that is written out, so must the answer be.
    parts, gold_parts = list(expressions_in(answer)), list(expressions_in(gold))
    gold_values = (algebra.exact_value(part.tree) for part in gold_parts)
    is_number = gold_parts != [] and all(
        value is not None and algebra.is_short(value) for value in gold_values
    )
    return any(algebra.is_unfinished(part.tree, is_number) for part in parts) and not any(
        algebra.is_unfinished(part.tree) for part in gold_parts
    )


def expressions_in(value):
    """Yields all expressions in a value, as they are written."""
    if isinstance(value, Expression):
        yield value
    elif isinstance(value, tuple):  # one of the types below, or a tuple of them
        for part in value:
            yield from expressions_in(part)


# ---- types ---------------------------------------------------------------------------------------


class Scalar(NamedTuple):
    expression: Expression
    unit: Unit | None
    text: str


class Sequence(NamedTuple):
    kind: str  # "list", "set", "union", "tuple" or "ratio"
    items: tuple


class Interval(NamedTuple):
    ends: tuple  # two values
    brackets: str  # "()", "[)", "(]" or "[]"
    name: str = ""  # of the variable, when written as an inequality


class Matrix(NamedTuple):
    rows: tuple
    scale: Any = None  # a Scalar before it


class Equation(NamedTuple):
    name: str  # of what is defined, "" for an equation in unknowns
    left: Any
    right: Any


class Inequality(NamedTuple):
    relation: str  # "<", "<=" or "!=": with a difference that stands in that relation to 0
    difference: Expression


class Numeral(NamedTuple):
    digits: str
    base: int


class Words(NamedTuple):
    text: str  # everything that is none of the others


# ---- reading -------------------------------------------------------------------------------------

SCAN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.S)
OPENING = {"(", "[", "{", r"\{", r"\langle", r"\begin"}
CLOSING = {")", "]", "}", r"\}", r"\rangle", r"\end"}
RELATIONS = {"=": "=", "<": "<", ">": ">", r"\leq": "<=", r"\geq": ">=", r"\neq": "!="}
SEPARATOR = re.compile(r"[,;=<>:]|\\(?:cup|leq|geq|neq|approx)(?![a-zA-Z])")
OR = re.compile(r",?\s*(?:\\text ?\{\s*,?\s*or\s*\}|(?<=\s)or(?=\s))\s*")
AND = re.compile(r",?\s*(?:\\text ?\{\s*,?\s*and\s*\}|(?<=\s)and(?=\s))\s*")
TO = re.compile(r"\s*(?:\\text ?\{\s*to\s*\}|(?<=[0-9] )to(?= [0-9]))\s*")
PLUS_MINUS = re.compile(r"\\[pm][mp](?![a-z])")
# 1,234 is a number; 1, 234 is a list
THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])")
# the left side of a definition: x, \theta, x_1, f^{-1}, f(x); (x, y); \text{Area}; area
NAME = re.compile(
    r"(?:[A-Za-z]|\\(?!frac|sqrt|pi|infty|text)[a-zA-Z]+)(?:_(?:\w|\{\w+\}))?'*(?:\^\{-1\})?"
    r"\s*(?:\([A-Za-z](?:\s*,\s*[A-Za-z])*\))?|\([A-Za-z](?:\s*,\s*[A-Za-z])+\)"
    r"|\\text ?\{[A-Za-z ]+\}|[A-Za-z]{2,12}"
)
MEMBER = re.compile(r"[A-Za-z](?:_\w)?\s*\\in(?![a-zA-Z])\s*")
# 1011_2, (1011)_{2}, 1011_{\text{two}}
NUMERAL = re.compile(
    r"\(?([0-9A-F]+)\)?_(?:\{?\s*([0-9]{1,2})\s*\}?|\{\s*\\text ?\{\s*([a-z]+)\s*\}\s*\})"
)
# before, kind, cells, after
ENVIRONMENT = re.compile(
    r"(.*?)\\begin\{([pbBvV]?matrix|smallmatrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\2\}(.*)", re.S
)
ALL_REALS = (r"\mathbb{R}", r"\mathbb R", r"\text{all real numbers}", r"\text{All real numbers}")
# five is 5, twenty-one is 21
NUMBER_WORDS = {word: n for n, word in enumerate(SMALL.split())} | {
    f"{ten}-{one}".removesuffix("-zero"): 10 * n + m
    for n, ten in enumerate(TENS.split(), 2)
    for m, one in enumerate(SMALL.split()[:10])
}


@functools.lru_cache(2048)
def read(text, depth=0):
    """A cleaned answer -> a value of one of the types above.

    Text behind \\approx is ignored.
    """
    text = next(filter(None, split(text, {r"\approx"})[0]), text)
    text = MEMBER.sub("", text, count=1)  # x \in [1,2] is [1,2]
    text = re.sub(r"^\\text ?\{\s*([0-9$\\(][^{}]*)\}$", r"\1", text).strip()
    # In brackets a comma separates: (1,234) may be a pair.
    if depth == 0 and not re.search(r"[(\[]|\\\{", text):
        text = THOUSANDS.sub(lambda run: run[0].replace(",", ""), text)
    if depth <= MAX_DEPTH and len(text) > 0:
        # The loosest separator first: "x = 1, y = 2" is a list of equations.
        for rule in (read_list, read_union, read_relation, read_brackets, read_matrix, read_scalar):
            value = rule(text, depth + 1)
            if value is not None:
                return value
    return as_words(text)


def split(text, separators):
    """-> (parts, the separators between them), at the top level of text.

    Separators in brackets, braces and environments do not count.
    """
    if not SEPARATOR.search(text):
        return [text], []
    parts, between, depth, start = [], [], 0, 0
    for token in SCAN.finditer(text):
        if token[0] in OPENING:
            depth += 1
        elif token[0] in CLOSING:
            depth -= 1
        elif depth == 0 and token[0] in separators:
            parts.append(text[start : token.start()].strip())
            between.append(token[0])
            start = token.end()
    return [*parts, text[start:].strip()], between


def read_list(text, depth):
    r"""1, 2 and 3; x<1 or x>2; \pm 2, which is 2,-2."""
    alternatives = OR.sub(",", text)
    parts, _ = split(AND.sub(",", alternatives), {",", ";"})
    # a \pm b is a list of two. \mp has the signs the other way round.
    if len(parts) == 1 and not parts[0].startswith(r"\begin") and PLUS_MINUS.search(parts[0]):
        signs = {r"\pm": "+", r"\mp": "-"}, {r"\pm": "-", r"\mp": "+"}
        parts = [
            re.sub(r"\\pm|\\mp", lambda sign, swap=swap: swap[sign[0]], text) for swap in signs
        ]
    if len(parts) == 1:
        return None if parts[0] == text else read(parts[0], depth)
    if len(parts) > MAX_ITEMS:
        return as_words(text)
    items = []
    for item in (read(part, depth) for part in parts):  # 0, \pm 2 has three items
        is_list = isinstance(item, Sequence) and item.kind == "list"
        items.extend(item.items if is_list else (item,))
    # only "or" joins intervals: x<1 and x>2 is not a union
    union = alternatives != text and all(isinstance(item, Interval) for item in items)
    return Sequence("union" if union else "list", tuple(items))


def read_union(text, depth):
    r"""(-\infty, 1) \cup (2, \infty)."""
    parts, _ = split(text, {r"\cup"})
    if len(parts) == 1:
        return None
    return Sequence("union", tuple(read(part, depth) for part in parts[:MAX_ITEMS]))


def read_relation(text, depth):
    """Equations, chains of them, and inequalities."""
    parts, relations = split(text, RELATIONS)
    if not relations:
        return None
    if set(relations) == {"="}:
        return read_equation(parts, depth) or as_words(text)
    relations = [RELATIONS[relation] for relation in relations]
    values = [read(part, depth) for part in parts]
    if not all(isinstance(value, Scalar) for value in values) or len(parts) > 3:
        return as_words(text)
    if relations[0][0] == ">":  # 2 > x is x < 2
        relations = [relation.replace(">", "<") for relation in relations[::-1]]
        values, parts = values[::-1], parts[::-1]
    if len(parts) == 2:
        return read_inequality(relations[0], parts, values)
    # 1 < x \leq 3.
    if all(relation[0] == "<" for relation in relations) and NAME.fullmatch(parts[1]):
        brackets = ("(" if relations[0] == "<" else "[") + (")" if relations[1] == "<" else "]")
        return Interval((values[0], values[2]), brackets, parts[1])
    return as_words(text)


def read_inequality(relation, parts, values):
    """left < right: an interval when one side is a variable alone and the other a constant.

    Any other inequality is the difference of its sides and their relation.
    """
    low, high = (value.expression for value in values)
    if relation != "!=" and NAME.fullmatch(parts[0]) and not high.names:
        brackets = "(" + (")" if relation == "<" else "]")
        return Interval((read(r"-\infty"), values[1]), brackets, parts[0])
    if relation != "!=" and NAME.fullmatch(parts[1]) and not low.names:
        brackets = ("(" if relation == "<" else "[") + ")"
        return Interval((values[0], read(r"\infty")), brackets, parts[1])
    return Inequality(relation, algebra.difference(low, high))


def read_equation(parts, depth):
    """x = 5, f(x) = 2x, x = 10/2 = 5, x^2 + y^2 = 4; None for a chain of different values."""
    # A name at either end is what the equation defines. In a chain all values behind it must agree.
    if NAME.fullmatch(parts[0]):
        name, parts = parts[0], parts[1:]
    elif len(parts) == 2 and NAME.fullmatch(parts[1]):
        name, parts = parts[1], parts[:1]
    else:
        name = ""
    values = [read(part, depth) for part in parts]
    if name:
        left = read(name, depth)
        if not all(match(values[-1], value) for value in values[:-1]):
            return None
        return Equation(name.replace(" ", ""), left, values[-1])
    if all(match(values[-1], value) for value in values[:-1]):
        return values[-1]  # 2 + 3 = 5
    return Equation("", *values) if len(values) == 2 else None


def read_brackets(text, depth):
    """(1, 2), [1, 2), {1, 2}, <1, 2>. Brackets around one expression are part of it."""
    if text in (r"\emptyset", "{}"):
        return Sequence("set", ())
    if text in ALL_REALS:
        return Interval((read(r"-\infty"), read(r"\infty")), "()")
    opening = next((sign for sign in ("(", "[", r"\{", r"\langle") if text.startswith(sign)), None)
    closing = next((sign for sign in (")", "]", r"\}", r"\rangle") if text.endswith(sign)), None)
    if not opening or not closing or len(text) < len(opening + closing) or not encloses(text):
        return None
    inner = text[len(opening) : -len(closing)].strip()
    # (5) is 5 in brackets: only braces make a sequence of one item.
    parts, _ = split(inner, {","}) if inner else ([], [])
    if len(parts) > MAX_ITEMS or (len(parts) < 2 and opening != r"\{"):
        return None
    items = tuple(read(part, depth) for part in parts)
    if opening == r"\{":
        return Sequence("set", items) if closing == r"\}" else None
    if opening + closing in ("[]", "[)", "(]") and len(items) == 2:
        return Interval(items, opening + closing)
    if opening + closing in ("()", "[]", r"\langle\rangle"):
        return Sequence("tuple", items)
    return None


def encloses(text):
    """Whether the last bracket closes the first one: (1,2)+(3,4) is not one tuple."""
    depth = 0
    for token in SCAN.finditer(text):
        depth += (token[0] in OPENING) - (token[0] in CLOSING)
        if depth <= 0 and token.end() < len(text):
            return False
    return depth == 0


def read_matrix(text, depth):
    r"""\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}, or an array in brackets.

    A number may stand before it.
    """
    environment = ENVIRONMENT.fullmatch(text)
    if not environment:
        return None
    before, kind, cells, after = environment.groups()
    if kind == "array" and (before[-1:], after[:1]) in (("(", ")"), ("[", "]")):
        before, after = before[:-1], after[1:]
    # vmatrix is a determinant
    if after.strip() or r"\begin" in cells or kind in ("vmatrix", "Vmatrix"):
        return None
    # \\ ends a row, perhaps with a distance: \\[2mm].
    lines = re.split(r"\\\\(?:\[[^\]]*\])?", cells.replace(r"\hline", ""))
    lines = [line for line in lines if line.strip()]
    rows = tuple(
        tuple(read(cell.strip(), depth) for cell in line.split("&")) for line in lines[:MAX_ITEMS]
    )
    scale = before.strip() if before.strip() != "-" else "-1"
    if not scale:
        return Matrix(rows)
    scale = read_scalar(scale, depth)
    if not scale or not all(isinstance(cell, Scalar) for row in rows for cell in row):
        return None
    return Matrix(rows, scale)


def read_scalar(text, depth):
    """A number or an expression, with or without a unit.

    It may also be a ratio, a numeral with its base, or a number in words.
    """
    numeral = NUMERAL.fullmatch(text)
    if numeral:
        base = NUMBER_WORDS.get(numeral[3], 0) if numeral[3] else int(numeral[2])
        return Numeral(numeral[1].lstrip("0") or "0", base) if 2 <= base <= 36 else None

    # 3:2 and 3 to 2 are 3/2; 1:2:3 is a sequence
    head, unit = split_unit(text)
    parts, _ = split(TO.sub(":", head), {":"})
    if len(parts) > 2:
        return Sequence("ratio", tuple(read(part, depth) for part in parts[:MAX_ITEMS]))
    if len(parts) == 2:
        head = "/".join(f"({part})" for part in parts)

    # forms of plain text: 4.5 x 10^33, 2 1/2, twenty-one
    head = re.sub(r"(?<=[0-9])\s*[xX]\s*(?=10\^)", r"\\times ", head)
    head = re.sub(r"([0-9]) ([0-9]+)/([0-9]+)", r"\1\\frac{\2}{\3}", head)
    word = re.fullmatch(r"(?:\\text ?\{)?\s*([a-z]+(?:[- ][a-z]+)?)\s*\}?", head.lower())
    if word and word[1].replace(" ", "-") in NUMBER_WORDS:
        head = str(NUMBER_WORDS[word[1].replace(" ", "-")])

    if re.fullmatch(r"[A-Za-z]{3,}", head):
        return None  # a word, not a product: east is not seat
    try:
        return Scalar(parse(head), unit, text)
    except Unreadable:
        return None


def as_words(text):
    """Text as Words: without \\text, upper case, an article before it and points behind it.

    A single letter keeps its case, with or without brackets: (C) is C, and not c.
    """
    text = " ".join(re.sub(r"\\text ?\{([^{}]*)\}", r" \1 ", text).split()).strip(" .")
    letter = re.fullmatch(r"\(?([A-Za-z])[).]*", text)
    if letter:
        return Words(letter[1])
    if not re.search(r"[\\^_]", text):
        text = re.sub(r"^(?:an?|the) ", "", text.casefold())
    return Words(text)


# ---- matching ------------------------------------------------------------------------------------


def match(answer, gold):
    """Whether two values of the types above are the same answer."""
    algebra.deadline.check()
    if isinstance(answer, Equation) or isinstance(gold, Equation):
        return match_equation(answer, gold)
    # Each takes the form of the other as it was written.
    answer, gold = adapted(answer, gold), adapted(gold, answer)
    if type(answer) is not type(gold):
        return Words in (type(answer), type(gold)) and spelling(answer) == spelling(gold) != ""
    return MATCHES[type(gold)](answer, gold)


def adapted(value, other):
    """`value` in the form of `other`, where both forms mean the same.

    (1,2) is an interval beside an interval; x=1,y=2 and a column are tuples beside a tuple; {5} is
    5. The base of a numeral may be missing: 1011_2 is 1011, but it is not 11.
    """
    other_kind = getattr(other, "kind", "")
    if isinstance(value, Sequence):
        if value.kind == "tuple" and len(value.items) == 2 and isinstance(other, Interval):
            return Interval(value.items, "()")
        named = all(isinstance(item, Equation) and item.name for item in value.items)
        if value.kind == "list" and other_kind == "tuple" and named:
            by_name = sorted(value.items, key=lambda item: item.name)
            return Sequence("tuple", tuple(item.right for item in by_name))
        if value.kind == "set" and len(value.items) == 1 and isinstance(other, Scalar):
            return value.items[0]
    if isinstance(value, Matrix) and other_kind == "tuple":
        shape = len(value.rows), max(map(len, value.rows), default=0)
        cells = tuple(cell for row in scaled_rows(value) for cell in row)
        return Sequence("tuple", cells) if 1 in shape else value
    if isinstance(value, Numeral) and isinstance(other, Scalar):
        return Words(value.digits.lower())
    return value


def spelling(value):
    """How a value reads as words; "" for a value that has parts."""
    if isinstance(value, Words):
        return value.text
    return as_words(value.text).text if isinstance(value, Scalar) else ""


def match_equation(answer, gold):
    """x=5 is 5, and f(x)=2x is 2x, but x=5 is not y=5. y=2x+1 is 2x-y+1=0."""
    if not isinstance(answer, Equation):
        return gold.name != "" and match(answer, gold.right)
    if not isinstance(gold, Equation):
        return answer.name != "" and match(answer.right, gold)
    if answer.name and gold.name:
        names = (answer.name, gold.name)
        is_function = "y" in names and "(" in answer.name + gold.name  # f(x)=2x is y=2x
        if answer.name == gold.name or is_function:
            return match(answer.right, gold.right)
    sides = (answer.left, answer.right, gold.left, gold.right)
    if not all(isinstance(side, Scalar) for side in sides):
        return False
    a, b, c, d = (side.expression for side in sides)
    return algebra.proportional(algebra.difference(a, b), algebra.difference(c, d))


def match_scalar(answer, gold):
    """Values and units; a unit that only one side has is ignored, but percent and million count."""
    a, b = answer.expression, gold.expression
    texts = answer.text + " " + gold.text
    if ":" in answer.text and ":" in gold.text and re.search(r":\s*[0-9]{2}\b", texts):
        # times, not ratios: 3:30 is not 1:10
        return a.text == b.text and (None in (answer.unit, gold.unit) or answer.unit == gold.unit)
    # Counts (million, percent) always apply; sizes only where both sides have a dimension.
    first, second = answer.unit or NO_UNIT, gold.unit or NO_UNIT
    x, y = first.count, second.count
    if first.dimension and second.dimension:
        if first.dimension != second.dimension:
            return False
        x, y = x * first.factor, y * second.factor
    if algebra.equal(times(x, a), times(y, b)):
        return True
    return {first, second} == {PERCENT, NO_UNIT} and algebra.equal(a, b)  # 50\% is 50 too


def times(factor, expression):
    """factor times the expression."""
    if factor == 1:
        return expression
    tree = ("*", ("num", Fraction(factor)), expression.tree)
    return expression._replace(tree=tree, text=f"{factor}({expression.text})")


def match_sequence(answer, gold):
    """Element by element, in any order except for tuples and ratios; repeated elements count."""
    kinds = {answer.kind, gold.kind}
    if len(answer.items) != len(gold.items) or (len(kinds) == 2 and kinds != {"list", "set"}):
        return False
    if gold.kind in ("tuple", "ratio"):
        return all(map(match, answer.items, gold.items))
    rest = list(answer.items)
    for item in gold.items:  # greedy is enough: being the same answer is an equivalence
        at = next((i for i, other in enumerate(rest) if match(other, item)), None)
        if at is None:
            return False
        del rest[at]
    return True


def match_interval(answer, gold):
    """Ends and brackets; the variable too when both name one."""
    if answer.name and gold.name and answer.name != gold.name:
        return False
    return answer.brackets == gold.brackets and all(map(match, answer.ends, gold.ends))


def match_matrix(answer, gold):
    """Shape and entries."""
    shapes = [list(map(len, value.rows)) for value in (answer, gold)]
    rows = zip(scaled_rows(answer), scaled_rows(gold))
    pairs = [pair for row, gold_row in rows for pair in zip(row, gold_row)]
    return shapes[0] == shapes[1] and all(match(a, b) for a, b in pairs)


def scaled_rows(matrix):
    """The rows of a matrix, multiplied by the scalar before it."""
    if matrix.scale is None:
        return matrix.rows
    scale = matrix.scale.expression
    return [
        [cell._replace(expression=product(scale, cell.expression)) for cell in row]
        for row in matrix.rows
    ]


def product(a, b):
    """a * b as an Expression."""
    return Expression(("*", a.tree, b.tree), a.names | b.names, f"({a.text})({b.text})")


def match_inequality(answer, gold):
    """The same relation, and differences that are equal up to a factor."""
    return answer.relation == gold.relation and algebra.proportional(
        answer.difference, gold.difference, positive=gold.relation != "!="
    )


def match_words(answer, gold):
    """Letter by letter."""
    return answer.text == gold.text != ""


MATCHES = {
    Scalar: match_scalar,
    Sequence: match_sequence,
    Interval: match_interval,
    Matrix: match_matrix,
    Inequality: match_inequality,
    Numeral: operator.eq,
    Words: match_words,
}


# ---- command -------------------------------------------------------------------------------------


def two_arguments(doc, usage):
    """-> the two words behind a command.

    With --help it prints doc and exits; without two words it prints the usage and exits with 2.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is not an error
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(doc)
        sys.exit(0)
    if len(sys.argv) != 3:
        print(f"error: usage: {usage}", file=sys.stderr)
        sys.exit(2)
    return sys.argv[1:]


def main():
    """Prints how the two answers of the command line are read, and the verdict."""
    answer, gold = two_arguments(__doc__, "python -m verifier.answers ANSWER GOLD")
    try:
        verdict = "equal" if equal(answer, gold) else "different"
    except VerifierFailed as error:
        verdict = f"undecided, {error}"
    for text in (answer, gold):
        print(read(clean(text)))
    print(verdict)


if __name__ == "__main__":
    main()
