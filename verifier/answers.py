r"""Answers with structure: numbers with units, lists, tuples, intervals, sets, matrices, equations,
inequalities, words.

    python answers.py "(-\infty,1)\cup(2,\infty)" "x<1 \text{ or } x>2"      # -> the two as they are read, and whether they are equal

The idea. `read` looks at a cleaned answer from the outside in - what separates it at the top level,
what encloses it - and gives a value of one of the types below; single expressions go to latex.py.
`match` compares two values: by elements, in order for tuples and in any order for lists, sets and
unions; expressions by algebra.py; whatever cannot be read, letter by letter. Equal strings are
equal before anything is read, so 2^{1000000} costs nothing. Nothing here is a number's tolerance:
there is none.

Policies, where a gold leaves it open:
- a unit, also %, a degree sign, a currency, a.m. or p.m., may be missing on one side, but two units
must agree (units.py).
- 3:2 is 3/2, but 3:30 is a time, not 1:10. The base of a numeral may be missing, but 1011_2 is not
11.
- x=5 is 5 and f(x)=2x is 2x; x=5 is not y=5. Of a chain x=10/2=5 all values must be equal.
- {1,2} is the list 1,2, not the tuple (1,2); repeated elements count. x=1,y=2 is (1,2). (1,2) is
1<x<2. \pm 2 is 2,-2.
- arithmetic left undone (17 \times 23, (3-1, 2), 2 \cdot 3x) restates the question: wrong, unless
  the gold leaves some undone too. What that is, and that 6/2, 2^{10} and 10! are not, is defined in
  algebra.is_unfinished.
- 1,234 is a number, 1, 234 a list, 1.234 a decimal. What follows \approx is not looked at. Words:
  case and a leading article do not count; a single letter keeps its case, with or without brackets;
  five is 5. nan is the answer to nothing.
"""

import functools
import re
import sys
from fractions import Fraction
from typing import Any, NamedTuple

from runtime.flags import BadInput, guarded
from verifier import algebra
from verifier.latex import Expression, Unreadable, clean, parse
from verifier.units import NO_UNIT, PERCENT, SMALL, TENS, Unit, with_unit

MANY = 40  # elements of a list or a matrix; golds have fewer
DEEP = 6  # sets of tuples of ...


class Scalar(NamedTuple):
    expression: Expression
    unit: Unit | None
    text: str


class Sequence(NamedTuple):
    kind: str  # "tuple" (ordered); "list", "set", "union" (any order)
    items: tuple


class Interval(NamedTuple):
    ends: tuple
    brackets: str  # "()", "[)", ...
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
    text: str  # whatever is nothing else


# ---- reading -------------------------------------------------------------------------------------

SCAN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.S)
OPEN, CLOSE = (
    {"(", "[", "{", r"\{", r"\langle", r"\begin"},
    {")", "]", "}", r"\}", r"\rangle", r"\end"},
)
RELATIONS = {"=": "=", "<": "<", ">": ">", r"\leq": "<=", r"\geq": ">=", r"\neq": "!="}
SEPARATOR = re.compile(r"[,;=<>:]|\\(?:cup|leq|geq|neq|approx)(?![a-zA-Z])")
OR = re.compile(r",?\s*(?:\\text ?\{\s*,?\s*or\s*\}|(?<=\s)or(?=\s))\s*")
TO = re.compile(r"\s*(?:\\text ?\{\s*to\s*\}|(?<=[0-9] )to(?= [0-9]))\s*")
AND = re.compile(r",?\s*(?:\\text ?\{\s*,?\s*and\s*\}|(?<=\s)and(?=\s))\s*")
THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])")
NAME = re.compile(
    r"(?:[A-Za-z]|\\(?!frac|sqrt|pi|infty|text)[a-zA-Z]+)(?:_(?:\w|\{\w+\}))?'*(?:\^\{-1\})?"
    r"\s*(?:\([A-Za-z](?:\s*,\s*[A-Za-z])*\))?|\([A-Za-z](?:\s*,\s*[A-Za-z])+\)|\\text ?\{[A-Za-z "
    r"]+\}|[A-Za-z]{2,12}"
)
MEMBER = re.compile(r"[A-Za-z](?:_\w)?\s*\\in(?![a-zA-Z])\s*")
NUMERAL = re.compile(
    r"\(?([0-9A-F]+)\)?_(?:\{?\s*([0-9]{1,2})\s*\}?|\{\s*\\text ?\{\s*([a-z]+)\s*\}\s*\})"
)
ENVIRONMENT = re.compile(
    r"(.*?)\\begin\{([pbBvV]?matrix|smallmatrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\2\}(.*)", re.S
)
COUNTS = {word: n for n, word in enumerate(SMALL.split())} | {
    f"{ten}-{one}".removesuffix("-zero"): 10 * n + m
    for n, ten in enumerate(TENS.split(), 2)
    for m, one in enumerate(SMALL.split()[:10])
}


def split(text, separators):
    """-> (parts, the separators between them), at the top level: not inside brackets, braces or
    environments."""
    if not SEPARATOR.search(text):
        return [text], []
    parts, found, depth, start = [], [], 0, 0
    for token in SCAN.finditer(text):
        if token[0] in OPEN:
            depth += 1
        elif token[0] in CLOSE:
            depth -= 1
        elif depth == 0 and token[0] in separators:
            parts.append(text[start : token.start()].strip())
            found.append(token[0])
            start = token.end()
    return [*parts, text[start:].strip()], found


@functools.lru_cache(2048)
def read(text, depth=0):
    """A cleaned answer -> a value of one of the types above."""
    text = next(filter(None, split(text, {r"\approx"})[0]), text)
    text = re.sub(
        r"^\\text ?\{\s*([0-9$\\(][^{}]*)\}$", r"\1", MEMBER.sub("", text, count=1)
    ).strip()
    if depth == 0 and not re.search(r"[(\[]|\\\{", text):
        text = THOUSANDS.sub(lambda run: run[0].replace(",", ""), text)
    if depth <= DEEP and len(text) > 0:
        for rule in (read_list, read_union, read_relation, read_brackets, read_matrix, read_scalar):
            found = rule(text, depth + 1)
            if found is not None:
                return found
    return Words(words(text))


def read_list(text, depth):
    r"""1, 2 and 3; x<1 or x>2; \pm 2."""
    alternatives = OR.sub(",", text)
    parts, _ = split(AND.sub(",", alternatives), {",", ";"})
    if (
        len(parts) == 1
        and not parts[0].startswith(r"\begin")
        and re.search(r"\\[pm][mp](?![a-z])", parts[0])
    ):
        signs = {r"\pm": "+", r"\mp": "-"}, {r"\pm": "-", r"\mp": "+"}
        parts = [
            re.sub(r"\\pm|\\mp", lambda sign, swap=swap: swap[sign[0]], text) for swap in signs
        ]
    if not 1 < len(parts) <= MANY:
        return (
            None
            if len(parts) == 1 and parts[0] == text
            else read(parts[0], depth)
            if len(parts) == 1
            else Words(words(text))
        )
    items = [read(part, depth) for part in parts]
    items = [
        piece
        for item in items
        for piece in (item.items if isinstance(item, Sequence) and item.kind == "list" else (item,))
    ]
    union = alternatives != text and all(isinstance(item, Interval) for item in items)
    return Sequence("union" if union else "list", tuple(items))


def read_union(text, depth):
    r"""(-\infty, 1) \cup (2, \infty)."""
    parts, _ = split(text, {r"\cup"})
    return (
        Sequence("union", tuple(read(part, depth) for part in parts[:MANY]))
        if len(parts) > 1
        else None
    )


def read_relation(text, depth):
    """Equations, chains of them, and inequalities."""
    parts, found = split(text, RELATIONS)
    if not found:
        return None
    if set(found) == {"="}:
        return read_equation(parts, depth) or Words(words(text))
    found, values = (
        [RELATIONS[relation] for relation in found],
        [read(part, depth) for part in parts],
    )
    if not all(isinstance(value, Scalar) for value in values) or len(parts) > 3:
        return Words(words(text))
    if found[0][0] == ">":
        found, values, parts = (
            [relation.replace(">", "<") for relation in found[::-1]],
            values[::-1],
            parts[::-1],
        )
    if len(parts) == 2:
        return inequality(found[0], parts, values)
    if all(relation[0] == "<" for relation in found) and NAME.fullmatch(parts[1]):
        return Interval(
            (values[0], values[2]),
            ("(" if found[0] == "<" else "[") + (")" if found[1] == "<" else "]"),
            parts[1],
        )
    return Words(words(text))


def inequality(relation, parts, values):
    r"""left < right: an interval where a variable alone is compared with a constant, otherwise the
    difference and its sign."""
    low, high = (value.expression for value in values)
    if relation != "!=" and NAME.fullmatch(parts[0]) and not high.names:
        return Interval(
            (read(r"-\infty"), values[1]), "(" + (")" if relation == "<" else "]"), parts[0]
        )
    if relation != "!=" and NAME.fullmatch(parts[1]) and not low.names:
        return Interval(
            (values[0], read(r"\infty")), ("(" if relation == "<" else "[") + ")", parts[1]
        )
    return Inequality(relation, algebra.difference(low, high))


def read_equation(parts, depth):
    """x = 5, f(x) = 2x, x = 10/2 = 5, x^2 + y^2 = 4; None for a chain of different values."""
    if NAME.fullmatch(parts[0]):
        name, parts = parts[0], parts[1:]
    elif len(parts) == 2 and NAME.fullmatch(parts[1]):
        name, parts = parts[1], parts[:1]
    else:
        name = ""
    values = [read(part, depth) for part in parts]
    if name:
        left = read(name, depth)
        return (
            Equation(name.replace(" ", ""), left, values[-1])
            if all(match(values[-1], value) for value in values[:-1])
            else None
        )
    if all(match(values[-1], value) for value in values[:-1]):
        return values[-1]  # 2 + 3 = 5
    return Equation("", *values) if len(values) == 2 else None


def read_brackets(text, depth):
    """(1, 2), [1, 2), {1, 2}, <1, 2>. Brackets around one expression are its own."""
    opening = next((sign for sign in ("(", "[", r"\{", r"\langle") if text.startswith(sign)), None)
    closing = next((sign for sign in (")", "]", r"\}", r"\rangle") if text.endswith(sign)), None)
    if text in (r"\emptyset", "{}"):
        return Sequence("set", ())
    if text in (
        r"\mathbb{R}",
        r"\mathbb R",
        r"\text{all real numbers}",
        r"\text{All real numbers}",
    ):
        return Interval((read(r"-\infty"), read(r"\infty")), "()")
    if not opening or not closing or len(text) < len(opening + closing) or not encloses(text):
        return None
    inner = text[len(opening) : -len(closing)].strip()
    parts, _ = split(inner, {","}) if inner else ([], [])
    if len(parts) > MANY or (len(parts) < 2 and opening != r"\{"):
        return None
    items = tuple(read(part, depth) for part in parts)
    if opening == r"\{":
        return Sequence("set", items) if closing == r"\}" else None
    if opening + closing in ("[]", "[)", "(]") and len(items) == 2:
        return Interval(items, opening + closing)
    return (
        Sequence("tuple", items)
        if (opening, closing) in (("(", ")"), ("[", "]"), (r"\langle", r"\rangle"))
        else None
    )


def encloses(text):
    """Whether the bracket at the start is closed by the one at the end, not before: (1,2)+(3,4) is
    not one tuple."""
    depth = 0
    for token in SCAN.finditer(text):
        depth += (token[0] in OPEN) - (token[0] in CLOSE)
        if depth <= 0 and token.end() < len(text):
            return False
    return depth == 0


def read_matrix(text, depth):
    r"""\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}, an array in brackets, with a number before it
    or not."""
    found = ENVIRONMENT.fullmatch(text)
    if not found:
        return None
    before, kind, inner, after = found.groups()
    if kind == "array" and (before[-1:], after[:1]) in (("(", ")"), ("[", "]")):
        before, after = before[:-1], after[1:]
    if after.strip() or r"\begin" in inner or kind in ("vmatrix", "Vmatrix"):
        return None
    scale = before.strip() if before.strip() != "-" else "-1"
    lines = [
        line
        for line in re.split(r"\\\\(?:\[[^\]]*\])?", inner.replace(r"\hline", ""))
        if line.strip()
    ]
    rows = tuple(
        tuple(read(cell.strip(), depth) for cell in line.split("&")) for line in lines[:MANY]
    )
    if not scale:
        return Matrix(rows)
    scale = read_scalar(scale, depth)
    return (
        Matrix(rows, scale)
        if scale and all(isinstance(cell, Scalar) for row in rows for cell in row)
        else None
    )


def read_scalar(text, depth):
    """A number or an expression, with or without a unit; a ratio; a numeral with its base; a number
    in words."""
    numeral = NUMERAL.fullmatch(text)
    if numeral:
        base = COUNTS.get(numeral[3], 0) if numeral[3] else int(numeral[2])
        return Numeral(numeral[1].lstrip("0") or "0", base) if 2 <= base <= 36 else None
    head, unit = with_unit(text)
    parts, _ = split(TO.sub(":", head), {":"})
    if len(parts) > 2:
        return Sequence("ratio", tuple(read(part, depth) for part in parts[:MANY]))
    head = "/".join(f"({part})" for part in parts) if len(parts) == 2 else head
    head = re.sub(
        r"([0-9]) ([0-9]+)/([0-9]+)",
        r"\1\\frac{\2}{\3}",
        re.sub(r"(?<=[0-9])\s*[xX]\s*(?=10\^)", r"\\times ", head),
    )
    counted = re.fullmatch(r"(?:\\text ?\{)?\s*([a-z]+(?:[- ][a-z]+)?)\s*\}?", head.lower())
    if counted and counted[1].replace(" ", "-") in COUNTS:
        head = str(COUNTS[counted[1].replace(" ", "-")])
    if re.fullmatch(r"[A-Za-z]{3,}", head):
        return None  # a word, not a product: east is not seat
    try:
        return Scalar(parse(head), unit, text)
    except Unreadable:
        return None


def words(text):
    """Text as it is compared: without \\text, case, articles before it and points after it."""
    text = " ".join(re.sub(r"\\text ?\{([^{}]*)\}", r" \1 ", text).split()).strip(" .")
    letter = re.fullmatch(r"\(?([A-Za-z])[).]*", text)
    if letter:
        return letter[1]
    if not re.search(r"[\\^_]", text):
        text = re.sub(r"^(?:an?|the) ", "", text.casefold())
    return text


# ---- matching ------------------------------------------------------------------------------------


def match(answer, gold):
    """Whether two values of the types above are the same answer."""
    algebra.deadline.check()
    if isinstance(answer, Equation) or isinstance(gold, Equation):
        return match_equation(answer, gold)
    answer, gold = alike(answer, gold), alike(gold, answer)
    if type(answer) is not type(gold):
        return Words in (type(answer), type(gold)) and spelling(answer) == spelling(gold) != ""
    return MATCHES[type(gold)](answer, gold)


def alike(value, other):
    """`value` in the form of `other`, where both forms say the same: (1,2) is an interval beside
    one, x=1,y=2 a tuple, a column too."""
    if isinstance(value, Sequence):
        pair = value.kind == "tuple" and len(value.items) == 2
        if isinstance(other, Interval) and pair:
            return Interval(value.items, "()")
        named = value.kind == "list" and all(
            isinstance(item, Equation) and item.name for item in value.items
        )
        if named and getattr(other, "kind", "") == "tuple":
            return Sequence(
                "tuple",
                tuple(item.right for item in sorted(value.items, key=lambda item: item.name)),
            )
        if value.kind == "set" and len(value.items) == 1 and isinstance(other, Scalar):
            return value.items[0]
    if (
        isinstance(value, Matrix)
        and getattr(other, "kind", "") == "tuple"
        and 1 in (len(value.rows), max(map(len, value.rows), default=0))
    ):
        return Sequence("tuple", tuple(cell for row in entries(value) for cell in row))
    if isinstance(value, Numeral) and isinstance(other, Scalar):
        return Words(value.digits.lower())
    return value


def spelling(value):
    """How a value reads as words; "" for what has parts."""
    return (
        value.text
        if isinstance(value, Words)
        else words(value.text)
        if isinstance(value, Scalar)
        else ""
    )


def match_equation(answer, gold):
    """x=5 with 5; y=2x+1 with y=1+2x and 2x-y+1=0."""
    if not isinstance(answer, Equation):
        return gold.name != "" and match(answer, gold.right)
    if not isinstance(gold, Equation):
        return answer.name != "" and match(answer.right, gold)
    if (
        answer.name
        and gold.name
        and (
            answer.name == gold.name
            or ("(" in answer.name + gold.name and "y" in (answer.name, gold.name))
        )
    ):
        return match(answer.right, gold.right)
    sides = (answer.left, answer.right, gold.left, gold.right)
    if not all(isinstance(side, Scalar) for side in sides):
        return False
    a, b, c, d = (side.expression for side in sides)
    return algebra.proportional(algebra.difference(a, b), algebra.difference(c, d))


def match_scalar(answer, gold):
    """Values and units; a unit of one side only does not count, but percent and million do."""
    a, b = answer.expression, gold.expression
    if (
        ":" in answer.text
        and ":" in gold.text
        and re.search(r":\s*[0-9]{2}\b", answer.text + " " + gold.text)
    ):
        # times, not ratios: 3:30 is not 1:10
        return a.text == b.text and match_units(answer.unit, gold.unit)
    first, second = answer.unit or NO_UNIT, gold.unit or NO_UNIT
    x, y = first.count, second.count
    if first.dimension and second.dimension:
        if first.dimension != second.dimension:
            return False
        x, y = x * first.factor, y * second.factor
    return algebra.equal(scaled(a, x), scaled(b, y)) or (
        {first, second} == {PERCENT, NO_UNIT} and algebra.equal(a, b)
    )


def match_units(first, second):
    """Whether two units agree, either of which may be missing."""
    return first is None or second is None or first == second


def scaled(expression, factor):
    """factor times the expression."""
    if factor == 1:
        return expression
    return expression._replace(
        tree=("*", ("num", Fraction(factor)), expression.tree), text=f"{factor}({expression.text})"
    )


def match_sequence(answer, gold):
    """Element by element, in any order unless a tuple or a ratio."""
    kinds = {answer.kind, gold.kind}
    if len(answer.items) != len(gold.items) or (len(kinds) == 2 and kinds != {"list", "set"}):
        return False
    if gold.kind in ("tuple", "ratio"):
        return all(map(match, answer.items, gold.items))
    rest = list(answer.items)
    for item in gold.items:  # greedy is enough: being the same answer is an equivalence
        found = next((i for i, other in enumerate(rest) if match(other, item)), None)
        if found is None:
            return False
        del rest[found]
    return True


def match_interval(answer, gold):
    """Ends and brackets; the variable too when both name one."""
    named = answer.name and gold.name and answer.name != gold.name
    return (
        not named and answer.brackets == gold.brackets and all(map(match, answer.ends, gold.ends))
    )


def match_matrix(answer, gold):
    """Shape and entries."""
    shapes = [list(map(len, value.rows)) for value in (answer, gold)]
    pairs = [pair for rows in zip(entries(answer), entries(gold)) for pair in zip(*rows)]
    return shapes[0] == shapes[1] and all(match(a, b) for a, b in pairs)


def entries(matrix):
    """Its rows, multiplied by what stands before it."""
    if matrix.scale is None:
        return matrix.rows
    tree, names, text = matrix.scale.expression
    return [
        [
            cell._replace(
                expression=Expression(
                    ("*", tree, cell.expression.tree),
                    names | cell.expression.names,
                    f"({text})({cell.expression.text})",
                )
            )
            for cell in row
        ]
        for row in matrix.rows
    ]


def match_inequality(answer, gold):
    """The same relation of differences that are one, up to a factor."""
    return answer.relation == gold.relation and algebra.proportional(
        answer.difference, gold.difference, positive=gold.relation != "!="
    )


def match_numeral(answer, gold):
    """Digits and base."""
    return answer == gold


def match_words(answer, gold):
    """Letter by letter."""
    return answer.text == gold.text != ""


MATCHES = {
    Scalar: match_scalar,
    Sequence: match_sequence,
    Interval: match_interval,
    Matrix: match_matrix,
    Inequality: match_inequality,
    Numeral: match_numeral,
    Words: match_words,
}


def key(text):
    """A cleaned answer without the spaces that mean nothing."""
    return re.sub(r" *(?<![0-9A-Za-z]) | (?![0-9A-Za-z]) *", "", text)


def expressions(value):
    """All expressions in a value, as they are written."""
    if isinstance(value, Expression):
        yield value
    elif isinstance(value, tuple):  # one of the types above, or a tuple of them
        for part in value:
            yield from expressions(part)


def restates(answer, gold):
    """Whether arithmetic is left undone in the answer (algebra.is_unfinished) that the gold has not
    left undone either."""
    answers, golds = list(expressions(answer)), list(expressions(gold))
    number = golds != [] and all(
        (value := algebra.exact(gold.tree)) is not None and algebra.is_short(value)
        for gold in golds
    )
    return any(algebra.is_unfinished(part.tree, number) for part in answers) and not any(
        algebra.is_unfinished(part.tree) for part in golds
    )


def same(answer, gold):
    """Whether two answers, as they were written, are the same."""
    answer, gold = clean(answer), clean(gold)
    if not answer or not gold or gold.lower() == "nan":
        return False
    if key(answer) == key(gold):
        return True
    answer, gold = read(answer), read(gold)
    return match(answer, gold) and not restates(answer, gold)


def main():
    if len(sys.argv) != 3:
        raise BadInput("usage: python answers.py ANSWER GOLD")
    for text in sys.argv[1:]:
        print(read(clean(text)))
    print("same" if same(*sys.argv[1:]) else "different")


if __name__ == "__main__":
    guarded(main)
