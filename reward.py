r"""The verifier: finds the answer in a response, compares it with the gold answer, and turns that
into a reward.

    python reward.py "<think>6*7</think><answer>42</answer>" 42       # -> accuracy 1, format 1
    python reward.py "so \boxed{\frac12}" 0.5

The idea. MGRPO has no reward MODEL: a rule looks at the final answer and says 1 or 0, in both
layers. Everything the policy learns comes through this rule, so a hole in it is what the policy
will learn. Hence:

- The LAST complete <answer>...</answer> or \boxed{...} (\fbox too) is the answer, nothing else: not
  the last number, not a tag left open by truncation, not "the gold stands somewhere in the text".
  Without any, what follows the last `#### ` (GSM8K's form). No answer, or an empty one, scores 0; a
  box that is cut off leaves an earlier, complete one standing. A thought that is not closed was cut
  off as well: nothing in it is an answer.
- Numbers are compared exactly, as fractions of integers: 0.5 = 1/2, 1,234 = 1234, +7 = 7; 1234576
  is not 1234567. Lists between spaces, "8 10 6 4", are compared number by number. Everything else
  goes on to answers.py (structure) and algebra.py (expressions).
- Model text is hostile: it is never evaluated by Python, and whatever is longer than a real answer
is wrong unread.
- A verifier that breaks, or runs out of time, gives no reward and says so: `failed` counts what
would otherwise look like wrong answers.
- The optional format term is smaller than the accuracy term, so a wrong answer in perfect form
never beats a right one.
"""

import ast
import operator
import re
import sys
from fractions import Fraction
from typing import NamedTuple

from runtime.flags import BadInput, guarded
from verifier import algebra, answers

LONGEST = 1_000  # characters of an answer that are looked at; a real one has tens
END = 100_000  # characters at the end of a response in which its answer is looked for
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# up to the end of the last one that is closed
THOUGHTS = re.compile(r"[\s\S]*</think(?:ing)?\s{0,9}>", re.I)
THOUGHT = re.compile(r"<think(?:ing)?\s{0,9}>", re.I)
BOX = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{")
# escaped ones, of a set, are not counted
BRACE = re.compile(BOX.pattern + r"|\\[{}]|\\\\(?!boxed|fbox)|[{}]")
HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")
NUMBER = re.compile(r"([+-]?)((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?)")


class Reward(NamedTuple):
    accuracy: float  # 1 right, 0 wrong
    format: float  # 1 when the whole response is <think>...</think><answer>...</answer>
    total: float  # accuracy + format_weight * format: what the advantages are made of
    failed: float = 0.0  # 1 when the verifier itself could not decide; the accuracy is 0 then


class Makes(NamedTuple):
    """A gold answer that many texts satisfy: any arithmetic over exactly these numbers that makes
    `target` (Countdown)."""

    target: int
    numbers: tuple

    def __str__(self):
        return f"{self.target}, made of {', '.join(map(str, self.numbers))}"


class VerifierFailed(Exception):
    """A verifier could not decide, through no fault of the answer: it broke, or ran out of time."""


# ---- extraction ----------------------------------------------------------------------------------


def extract_answer(text):
    """-> the content of the last complete <answer>...</answer> or \\boxed{...} in text, stripped;
    None if there is none.

    "Last" is by where it ends. What stands in a <think> (or <thinking>) that is not closed does not
    count. A box in an answer or in another box is unwrapped. Braces inside \\boxed are matched, so
    \\boxed{\\frac{1}{2}} comes out whole. One pass each: ten thousand opened boxes cost no more
    than ten thousand characters, and of a very long text only the last END are looked through.
    """
    text = finished(text)[-END:]
    found = last_answer(text)
    if found is None:
        marked = HASHES.findall(text)
        return marked[-1].strip() if marked else None
    inner = last_answer(found)
    return (found if inner is None else inner).strip()


def finished(text):
    """text up to a thought that is not closed; all of it without one."""
    if not THOUGHT.search(text):
        return text
    closed = THOUGHTS.match(text)
    opened = THOUGHT.search(text, closed.end() if closed else 0)
    return text[: opened.start()] if opened else text


def last_answer(text):
    """-> what the last complete tag or box of text holds, None without one."""
    tag_start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    tag_end = text.find("</answer>", tag_start)
    tagged = (
        (tag_end, text[tag_start + len("<answer>") : tag_end]) if tag_start >= 0 else (-1, None)
    )
    return max(tagged, last_box(text), key=lambda found: found[0])[1]


def last_box(text):
    """-> (where it ends, content) of the last closed \\boxed{...}, of a box in a box the inner;
    (-1, None) without one."""
    opened, found, inner, first = [], (-1, None), -1, BOX.search(text)
    for brace in BRACE.finditer(text, first.start()) if first else ():
        if brace[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box:
                found, inner = (
                    (brace.start(), found[1] if inner >= start else text[start : brace.start()]),
                    max(inner, start),
                )
        elif brace[0] == "{" or len(brace[0]) > 2:
            opened.append((brace.end(), brace[0] != "{"))
    return found


def has_form(response):
    """Whether the whole response is one <think>...</think> and one <answer>...</answer>, with
    nothing but space around them."""
    text = response.strip()
    if (
        not text.startswith("<think>")
        or not text.endswith("</answer>")
        or any(text.count(tag) != 1 for tag in TAGS)
    ):
        return False
    return text[text.index("</think>") + len("</think>") :].lstrip().startswith("<answer>")


# ---- comparison ----------------------------------------------------------------------------------


def parse_number(text):
    """-> Fraction, or None when text is not ONE number: integer, decimal, thousands with commas,
    a/b, \\frac{a}{b}."""
    text = text.strip().strip("$").strip().replace("\u2212", "-").removesuffix(".")
    fraction = re.fullmatch(r"([+-]?)\s*\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", text)
    if fraction:
        text = f"{fraction[1]}{fraction[2].strip()}/{fraction[3].strip()}"
    above, slash, below = text.partition("/")
    if slash:
        above, below = _decimal(above.strip()), _decimal(below.strip())
        return above / below if above is not None and below else None
    return _decimal(text)


def _decimal(text):
    """-> Fraction of a signed decimal in ASCII digits, None otherwise. int() alone would accept
    "1_0" and "\u0663"."""
    match = NUMBER.fullmatch(text)
    if not match or not any(c.isdigit() for c in match[2]):
        return None
    value = Fraction(match[2].replace(",", "").removesuffix("."))
    return -value if match[1] == "-" else value


def same(answer, gold):
    """Whether two answers are equal: as numbers, as lists of numbers between spaces, or as
    answers.py reads them."""
    if not answer or len(answer) > LONGEST:
        return False
    a, b = parse_number(answer), parse_number(gold)
    if a is not None and b is not None:
        return a == b
    golds = gold.split()
    if len(golds) > 1 and all(parse_number(part) is not None for part in golds):
        parts = answer.split()
        return len(parts) == len(golds) and all(
            parse_number(x) == parse_number(y) for x, y in zip(parts, golds)
        )
    return answers.same(answer, gold)


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def makes(answer, gold):
    """Whether `answer` is + - * / arithmetic that uses each of gold.numbers exactly once and gives
    gold.target exactly."""
    if not re.fullmatch(r"[0-9+\-*/() ]{1,100}", answer):
        return False
    try:
        used = []
        value = _value(ast.parse(answer.strip(), mode="eval").body, used)
    # not an expression, a power, or x/0: a wrong answer
    except (SyntaxError, ValueError, ZeroDivisionError):
        return False
    return value == gold.target and sorted(used) == sorted(gold.numbers)


def _value(node, used):
    """Exact value of a parsed expression; numbers met go into `used`. ValueError for all but
    numbers and + - * /."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left, used), _value(node.right, used))
    raise ValueError("not a sum, difference, product or quotient of numbers")


# ---- reward --------------------------------------------------------------------------------------


def judge(response, gold, verifier=None):
    """-> whether the response's answer is the gold one. Raises VerifierFailed when that could not
    be decided."""
    answer = extract_answer(response)
    if not answer:
        return False
    if isinstance(gold, Makes):
        return makes(answer, gold)
    try:
        with algebra.deadline:
            return (verifier.same if verifier else same)(answer, gold)
    except VerifierFailed:
        raise
    except Exception as error:  # whatever it is, it says nothing about the answer
        raise VerifierFailed(f"{type(error).__name__}: {error}") from error


def agree(answer, other):
    """Whether two answers (extracted ones) are the same, for counting votes; undecided is no."""
    try:
        with algebra.deadline:
            return same(answer, other)
    except Exception:  # whatever it is: two votes that cannot be compared are two
        return False


def is_correct(response, gold):
    """response: what the model wrote, without the prompt; gold: a string or Makes -> bool. Never
    raises on a response."""
    return bool(score(response, gold).accuracy)


def score(response, gold, format_weight=0.0, verifier=None):
    """-> Reward. format_weight in [0, 0.5]: a wrong answer gets at most 0.5, a right one at least
    1.

    verifier: None for this one, or an object with same(answer, gold) -> bool that raises
    VerifierFailed when it could not decide. Raises ValueError for a weight outside of that.
    """
    if not 0 <= format_weight <= 0.5:
        raise ValueError(
            f"format weight {format_weight} is not in [0, 0.5]: form could pay better than being "
            "right"
        )
    try:
        accuracy, failed = float(judge(response, gold, verifier)), 0.0
    except VerifierFailed:
        accuracy, failed = 0.0, 1.0
    form = float(has_form(response))
    return Reward(accuracy, form, accuracy + format_weight * form, failed)


def main():
    if len(sys.argv) != 3:
        raise BadInput("usage: python reward.py RESPONSE GOLD")
    print(f"answer {extract_answer(sys.argv[1])!r}; {score(*sys.argv[1:])}")


if __name__ == "__main__":
    guarded(main)
