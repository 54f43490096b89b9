"""Property-based fuzzing of what reads text from others: the verifier and the JSONL loader.
EXAMPLES=100000 pytest tests/test_fuzz.py for a long run."""

import json
import os
import re

import pytest

from reward import Reward, extract_answer, score
from runtime.flags import BadInput
from tasks.files import read_problems

hypothesis = pytest.importorskip(
    "hypothesis", reason="needs hypothesis: pip install -r requirements-extra.txt"
)
from hypothesis import HealthCheck, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.extra
long = settings(
    max_examples=int(os.environ.get("EXAMPLES", 1500)),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
BITS = [
    r"\boxed{",
    "}",
    "{",
    "<answer>",
    "</answer>",
    "<think>",
    "</think>",
    "#### ",
    r"\frac",
    r"\sqrt",
    "^",
    "_",
    "(",
    ")",
    "[",
    "]",
    ",",
    ";",
    "=",
    "<",
    ">",
    "+",
    "-",
    "*",
    "/",
    "!",
    ".",
    "%",
    r"\$",
    "$",
    " ",
    "0",
    "1",
    "7",
    "12",
    "1,000",
    "3.5",
    "1e9",
    "9" * 40,
    "x",
    "y",
    "n",
    "i",
    r"\pi",
    "e",
    r"\infty",
    r"\pm",
    r"\cup",
    r"\text{",
    "cm",
    r"\sin",
    r"\log",
    r"\binom",
    r"\begin{pmatrix}",
    "&",
    r"\\",
    r"\end{pmatrix}",
    r"\left(",
    r"\right)",
    r"\overline{",
    "π",
    "√",
    "−",
    "½",
    "３",
    "\x00",
    "\n",
    "np.",
    "__import__('os')",
    r"\cdot 10^{",
    "**",
    "or",
    "and",
    r"\leq",
    r"\neq",
    "mod",
    "|",
    r"\lfloor",
    r"\rfloor",
]
fragments = st.lists(st.sampled_from(BITS), max_size=40).map("".join)
golds = st.one_of(
    st.sampled_from(
        [
            "5",
            r"\frac{1}{2}",
            "x^2+1",
            "(1,2)",
            r"\{1,2\}",
            "x=5",
            r"1\pm\sqrt{2}",
            "1011_2",
            r"\text{east}",
            r"(-\infty,2]",
            r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
            "4.5e33",
        ]
    ),
    fragments,
)


@long
@given(
    st.one_of(
        fragments,
        fragments.map(lambda text: rf"\boxed{{{text}}}"),
        fragments.map(lambda text: f"<answer>{text}</answer>"),
        st.text(max_size=300),
    ),
    golds,
)
@example(r"\boxed{" + "!" * 900 + "}", "5")
@example(r"\boxed{" + "(" * 400 + "6" + ")" * 400 + "}", "6")
def test_no_answer_breaks_the_verifier(response, gold):
    """Catches an exception, and a comparison that hits its deadline of 50 ms of CPU time: both come
    out as `failed`."""
    found = score(response, gold, 0.5)
    assert (
        isinstance(found, Reward)
        and found.failed == 0
        and found.accuracy in (0, 1)
        and 0 <= found.total <= 1.5
    )
    answer = extract_answer(response)
    assert answer is None or (isinstance(answer, str) and answer == answer.strip())


@long
@given(fragments.filter(lambda text: text.strip() and len(text) < 900))
def test_what_is_right_for_one_is_right_for_the_other(text):
    """Catches a comparison that depends on which side is the gold: whatever equals itself does so
    in a box and in a tag."""
    if (
        "boxed" not in text
        and "answer" not in text
        and "think" not in text
        and not re.search(r"[{}]", re.sub(r"\\[\\{}]", "", text))
    ):
        assert (
            score(rf"\boxed{{{text}}}", text).accuracy
            == score(f"<answer>{text}</answer>", text).accuracy
        )


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
rows = st.dictionaries(
    st.sampled_from(
        [
            "question",
            "problem",
            "answer",
            "solution",
            "final_answer",
            "unit",
            "context",
            "level",
            "text",
        ]
    ),
    values,
    max_size=6,
).map(json.dumps)


@long
@given(
    st.lists(
        st.one_of(
            rows.map(str.encode),
            st.binary(max_size=60),
            st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
        ),
        max_size=4,
    )
)
def test_no_file_breaks_the_loader(tmp_path_factory, lines):
    """Catches a traceback for a line that nobody thought of: a file is read, or refused in one
    sentence."""
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        problems, counts = read_problems(path)
        assert (
            problems
            and sum(counts.values()) >= len(problems)
            and all(p.question.strip() and p.gold for p in problems)
        )
    except BadInput as error:
        assert str(path) in str(error) and "\n" not in str(error)
