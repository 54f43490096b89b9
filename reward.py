r"""Turns a response into a reward: finds the answer, compares it with the gold answer, scores it.

    python reward.py "<think>6*7</think><answer>42</answer>" 42       # -> accuracy 1, format 1
    python reward.py "so \boxed{\frac12}" 0.5

The idea. MGRPO has no reward model: a rule checks the final answer and gives 1 or 0 in every layer
(plus `--format-weight` for the form, off by default). The policy learns whatever this rule pays
for, so every hole in it will be learned.

- The LAST complete <answer>...</answer> or \boxed{...} is the answer, else the text behind the last
  `#### ` (GSM8K's form). A number elsewhere in the response is not an answer.
- Model text is hostile. It is never evaluated by Python, and a text longer than a real answer is
  wrong unread.
- If the verifier fails, the accuracy is 0 and `failed` is 1, so that a run can count the failures.
- The format term is smaller than the accuracy term: a wrong answer never beats a right one.
"""

import ast
import operator
import re
from fractions import Fraction
from typing import NamedTuple

from verifier.answers import equal, two_arguments


class Reward(NamedTuple):
    accuracy: float  # 1 right, 0 wrong
    format: float  # 1 when the whole response is <think>...</think><answer>...</answer>
    total: float  # accuracy + format_weight * format; the advantages are computed from it
    failed: float = 0.0  # 1 when the verifier reached no verdict; the accuracy is 0 then


class Makes(NamedTuple):
    """A gold answer of Countdown: any arithmetic over exactly these numbers that makes `target`."""

    target: int
    numbers: tuple

    def __str__(self):
        return f"{self.target}, made of {', '.join(map(str, self.numbers))}"


# ---- find the answer -----------------------------------------------------------------------------

# Characters at the end of a response in which its answer is searched.
END = 100_000
# A thought, open or closed. The repetition of spaces is bounded, so that no match takes long.
THOUGHT = re.compile(r"<think(?:ing)?\s{0,9}>", re.I)
CLOSED_THOUGHTS = re.compile(r"[\s\S]*</think(?:ing)?\s{0,9}>", re.I)  # up to the last closed one
BOX = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{")
# An opened box, or a brace; \{ and \} belong to a set and are skipped.
BRACE = re.compile(BOX.pattern + r"|\\[{}]|\\\\(?!boxed|fbox)|[{}]")
HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")


def extract_answer(response):
    """-> the text of the answer, stripped; None if the response has none.

    Takes one pass over the response: ten thousand opened boxes cost ten thousand characters.
    """
    # A thought that is not closed was truncated: nothing in it is an answer.
    if THOUGHT.search(response):
        closed = CLOSED_THOUGHTS.match(response)
        opened = THOUGHT.search(response, closed.end() if closed else 0)
        response = response[: opened.start()] if opened else response
    response = response[-END:]

    # The last complete tag or box. A box inside an answer or inside another box is unwrapped.
    answer = last_tag_or_box(response)
    if answer is not None:
        inner = last_tag_or_box(answer)
        return (answer if inner is None else inner).strip()

    # Without any, the line behind the last ####.
    lines = HASHES.findall(response)
    return lines[-1].strip() if lines else None


def last_tag_or_box(text):
    """-> what the last complete <answer>...</answer> or \\boxed{...} holds; None without one.

    "Last" is by where it ends. A truncated box leaves an earlier, complete one standing.
    """
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    if start < 0:
        return last_box(text)[1]
    end = text.find("</answer>", start)
    box_end, box = last_box(text)
    return box if box_end > end else text[start + len("<answer>") : end]


def last_box(text):
    """-> (where it ends, content) of the last closed \\boxed{...}; (-1, None) without one.

    Braces are matched, so \\boxed{\\frac{1}{2}} comes out whole. Of a box in a box the inner one is
    taken.
    """
    first_box = BOX.search(text)
    if not first_box:
        return -1, None
    open_braces = []  # (start of the content, whether it is a box)
    box_end, box, box_start = -1, None, -1
    for brace in BRACE.finditer(text, first_box.start()):
        if brace[0] == "}" and open_braces:
            start, is_box = open_braces.pop()
            if is_box:
                # a box that closes around the last one keeps the inner content
                if box_start < start:
                    box_start, box = start, text[start : brace.start()]
                box_end = brace.start()
        elif brace[0] == "{" or len(brace[0]) > 2:
            open_braces.append((brace.end(), brace[0] != "{"))
    return box_end, box


# ---- compare -------------------------------------------------------------------------------------

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def makes(answer, gold):
    """Whether `answer` is + - * / arithmetic that makes gold.target from gold.numbers, each once.

    Python parses the answer but does not evaluate it.
    """
    if not re.fullmatch(r"[0-9+\-*/() ]{1,100}", answer):
        return False
    numbers = []
    try:
        value = arithmetic_value(ast.parse(answer.strip(), mode="eval").body, numbers)
    except (SyntaxError, ValueError, ZeroDivisionError):  # not an expression, a power, or x/0
        return False
    return value == gold.target and sorted(numbers) == sorted(gold.numbers)


def arithmetic_value(node, numbers):
    """-> the exact value of a parsed expression. Appends the numbers in it to `numbers`.

    Raises ValueError for everything except integers and + - * /.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = arithmetic_value(node.left, numbers), arithmetic_value(node.right, numbers)
        return OPERATORS[type(node.op)](left, right)
    raise ValueError("not a sum, difference, product or quotient of numbers")


# ---- score ---------------------------------------------------------------------------------------

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def has_form(response):
    """Whether the whole response is <think>...</think><answer>...</answer>, each tag once.

    Only white space may stand around and between them.
    """
    text = response.strip()
    if not text.startswith("<think>") or not text.endswith("</answer>"):
        return False
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    return text[text.index("</think>") + len("</think>") :].lstrip().startswith("<answer>")


def score(response, gold, format_weight=0.0, verifier=None):
    """response: what the model wrote, without the prompt; gold: a string or Makes -> Reward.

    format_weight in [0, 0.5]: a wrong answer gets at most 0.5, a right one at least 1. verifier:
    None for verifier.equal, or an object with same(answer, gold) -> bool. Raises ValueError for a
    weight outside of that range, and nothing for any response.
    """
    if not 0 <= format_weight <= 0.5:
        raise ValueError(
            f"format weight {format_weight} is not in [0, 0.5]: good form could pay better than a "
            "right answer"
        )
    # 1. Find the answer. A response without one, or with an empty one, is wrong.
    answer, correct, failed = extract_answer(response), False, False

    # 2. Compare it with the gold.
    if answer and isinstance(gold, Makes):
        correct = makes(answer, gold)
    elif answer:
        try:
            correct = verifier.same(answer, gold) if verifier else equal(answer, gold)
        except Exception:  # also of a foreign verifier; it says nothing about the answer
            failed = True

    # 3. Score it.
    accuracy, form = float(correct), float(has_form(response))
    return Reward(accuracy, form, accuracy + format_weight * form, float(failed))


def is_correct(response, gold):
    """response: what the model wrote, without the prompt; gold: a string or Makes -> bool."""
    return bool(score(response, gold).accuracy)


def main():
    response, gold = two_arguments(__doc__, "python reward.py RESPONSE GOLD")
    print(f"answer {extract_answer(response)!r}; {score(response, gold)}")


if __name__ == "__main__":
    main()
