"""Property-based fuzzing of the code that reads foreign text: the verifier and the JSONL loader.

EXAMPLES=100000 pytest -m extra tests/test_fuzz.py      # a long run
"""

import json
import os
import re

import pytest

from reward import extract_answer, score
from runtime.flags import BadInput
from tasks.files import read_problems

hypothesis = pytest.importorskip(
    "hypothesis", reason="needs hypothesis: pip install -r requirements-extra.txt"
)
from hypothesis import HealthCheck, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = [pytest.mark.extra, pytest.mark.slow]
long = settings(
    max_examples=int(os.environ.get("EXAMPLES", 1500)),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
BITS = r"""
    \boxed{ } { <answer> </answer> <think> </think> \frac \sqrt ^ _ ( ) [ ] , ; = < > + - * / ! . %
    \$ $ 0 1 7 12 1,000 3.5 1e9 9999999999999999999999999999999999999999 x y n i \pi e \infty \pm
    \cup \text{ cm \sin \log \binom \begin{pmatrix} & \\ \end{pmatrix} \left( \right) \overline{ π √
    − ½ ３ np. __import__('os') ** or and \leq \neq mod | \lfloor \rfloor \dfrac \sqrt[3] \{ \} : 2
    999 0.5 \ln \in \text{cm} \text{or} \% ^\circ \overline {,} \! \, \approx \mathbb{R} \emptyset
    e9 10^ ^{99} \cdot \times ² ٣ \sum_{k=1}^{9} five \langle \rangle a_1 ' 3:30 1011_2 \0
"""
SPACED = ["#### ", " ", "\x00", "\n", "\\cdot 10^{"]
fragments = st.lists(st.sampled_from([*BITS.split(), *SPACED]), max_size=40).map("".join)
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
def test_every_response_gets_a_verdict_in_time(response, gold):
    """Catches an exception, and a comparison that reaches its deadline of 50 ms of CPU time: both
    give `failed`."""
    reward = score(response, gold, 0.5)
    assert reward.failed == 0 and reward.accuracy in (0, 1) and 0 <= reward.total <= 1.5
    answer = extract_answer(response)
    assert answer is None or (isinstance(answer, str) and answer == answer.strip())


@long
@given(fragments.filter(lambda text: text.strip() and len(text) < 900))
def test_box_and_tag_get_the_same_accuracy(text):
    """Catches an answer that loses something in a box or in a tag."""
    without_sets = re.sub(r"\\[\\{}]", "", text)
    if not re.search(r"boxed|answer|think|[{}]", without_sets):
        in_box, in_tag = score(rf"\boxed{{{text}}}", text), score(f"<answer>{text}</answer>", text)
        assert in_box.accuracy == in_tag.accuracy


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
    """Catches a traceback: every file is either read or refused in one sentence."""
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
