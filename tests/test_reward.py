"""The reward: the policy would learn every hole in it.

python -m tests.test_reward 10000      # the slowest of 10,000 repetitive texts
"""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval import agree
from reward import Makes, Reward, extract_answer, is_correct, score
from verifier import algebra, answers
from verifier.answers import LONGEST, VerifierFailed, parse_number

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<answer>3</answer> no, <answer>4</answer>", "4"),
        (r"\boxed{3} or rather <answer>4</answer>", "4"),
        (r"<answer>4</answer> or rather \boxed{3}", "3"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),  # braces inside
        (r"\boxed{{1}} x}", "{1}"),
        ("<answer>3</answer><answer>4", "3"),  # truncated
        (r"\boxed{3} and \boxed{4", "3"),
        ("<answer>1<answer>2</answer>", "2"),
        ("</answer>5<answer>", None),
        ("5", None),
        ("", None),
        (r"\boxed5", None),
        ("<answer></answer>", ""),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{\boxed{5}} \boxed{6}", "6"),
        (r"<answer>so \boxed{5}.</answer>", "5"),
        (r"\boxed{<answer>5</answer>}", "5"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{9}}", "9"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"{ \boxed{5}", "5"),
        (r"\unboxed{5}", None),
        (r"\boxed{a\\}", r"a\\"),
        ("#### 18", "18"),
        ("####18\n", "18"),
        ("#### 17\nno\n#### 18\n\nbye", "18"),
        ("####", ""),
        ("##### 5", None),
        ("### 5", None),
        (r"<think>\boxed{5}", None),
        (r"\boxed{4}<think>\boxed{5}", "4"),
        (r"<think>a</think>\boxed{4}<think>#### 5", "4"),
        (r"<think>\boxed{5}<think>", None),
        (r"<think>\boxed{4}</think> so \boxed{5}", "5"),
        (r"a</think>\boxed{5}", "5"),
        (r"<think>\boxed{5}</think", None),
        ("<answer>5<think></answer>", None),
        (r"<thinking>\boxed{5}", None),
        (r"<THINK>\boxed{5}", None),
        (r"\\boxed{5}", "5"),
        (r"#### 18 \boxed{19}", "19"),
        (r"\boxed{19} #### 18", "19"),
        ("<answer>19</answer>\n#### 18", "19"),
        ("<answer>19\n#### 18", "18"),
    ],
)
def test_the_last_complete_tag_or_box_is_the_answer(text, answer):
    """Catches the first answer taken, unbalanced braces, and truncated answers accepted."""
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("7", "7"),
        ("+7", "7"),
        ("-7", "-7"),
        ("\u22127", "-7"),
        ("1,234", "1234"),
        ("1234", "1,234"),
        ("0.5", "1/2"),
        ("1/2", "2/4"),
        (r"\frac{3}{4}", "0.75"),
        (r"-\frac{3}{4}", "-0.75"),
        ("5.", "5"),
        ("5.0", "5"),
        (".5", "0.5"),
        ("-0", "0"),
        ("$12$", "12"),
        (" 12 ", "12"),
        ("007", "7"),
        ("1 2 3", "1 2 3"),
        ("1  2\n3", "1 2 3"),
        ("01 2.0 3", "1 2 3"),
        ("east", "east"),
        ("-1/-2", "1/2"),
        ("1e3", "1000"),
        (r"\frac12", "0.5"),
        (r"2\pi", "2π"),
        ("x=5", "5"),
        (r"5\text{ cm}", "5"),
        ("2,1", "1,2"),
        ("10^{10^{10}}", "10^{10^{10}}"),
        ("12345678901234567890123", "12345678901234567890123"),
    ],
)
def test_equal_answers_are_paid(answer, gold):
    """Catches false negatives: a right answer scored 0 teaches the policy that it was wrong."""
    assert is_correct(f"<think>x</think><answer>{answer}</answer>", gold) and is_correct(
        rf"so \boxed{{{answer}}}", gold
    )


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("8", "7"),
        ("-7", "7"),
        ("1234576", "1234567"),
        ("0.333", "1/3"),
        ("3.0000001", "3"),
        ("1,23", "123"),
        ("1,2", "12"),
        ("1 2", "12"),
        ("1 2 4", "1 2 3"),
        ("1 2 3 4", "1 2 3"),
        ("1 2", "1 2 3"),
        ("3 2 1", "1 2 3"),
        ("6 7 8 9", "7"),
        ("7 or 8", "7"),
        ("1/0", "0"),
        ("0/0", "0"),
        ("", ""),
        ("", "0"),
        ("nan", "0"),
        ("inf", "1"),
        ("1_0", "10"),
        ("\u0663", "3"),
        ("0x10", "16"),
        ("--7", "7"),
        ("True", "1"),
        ("__import__('os')", "1"),
        ("12345678901234567890124", "12345678901234567890123"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_different_answers_are_not_paid(answer, gold):
    """Catches false positives: near misses, many answers, echoes, floats that compare equal, digits
    of other scripts."""
    assert not is_correct(f"<answer>{answer}</answer>", gold)


@pytest.mark.parametrize(
    "response",
    [
        "7",
        "<answer>",
        "<answer>7",
        "</answer>7<answer>",
        r"\boxed{7",
        "the answer is 7",
        "<answer> </answer>",
        "<answer>6 7 8</answer>",
        "<answer>7</answer><answer></answer>",
        "<answer>7</answer><answer>8</answer>",
        "x in {7}",
        "",
    ],
)
def test_naming_the_gold_without_answering_scores_zero(response):
    """Catches rewards for a gold that is truncated, one of several, or echoed from the question."""
    assert score(response, "7").total == 0


def test_countdown_uses_each_number_once_and_makes_the_target():
    """Catches numbers left out or used twice, a wrong order of operations, and anything that is not
    arithmetic."""
    gold = Makes(24, (1, 3, 8))
    for right in ("(3*8)*1", "3*8*1", "8*3/1", "(8/1)*3", "8/(1/3)", "1*3*8"):
        assert is_correct(f"<answer>{right}</answer>", gold), right
    for wrong in (
        "24",
        "3*8",
        "3*8*1*1",
        "3+8*1",
        "3*8**1",
        "(3*8)*1+0",
        "8/(3-3*1)",
        "8/0",
        "int(24)",
        "3*8*1)",
        "[3*8*1]",
        "",
        "3*8*01",
        "(" * 90 + "3",
        "3*8*1 == 24",
        "-3*-8*1",
    ):
        assert not is_correct(f"<answer>{wrong}</answer>", gold), wrong


def test_good_form_never_beats_a_right_answer():
    """Catches additive format rewards that make a long wrong answer look good."""
    form_only, right_only = (
        score("<think>a</think><answer>8</answer>", "7", 0.5),
        score("so <answer>7</answer>", "7", 0.5),
    )
    assert form_only.total == 0.5 and right_only.total == 1.0 and right_only.format == 0
    assert score("<think>a</think><answer>7</answer>", "7", 0.5).total == 1.5
    assert score("<think><think>a</think></think><answer>7</answer>", "7", 0.5).format == 0
    with pytest.raises(ValueError, match="format weight"):
        score("", "7", 0.9)


def test_no_response_raises():
    """Catches an exception, which would end a run: 20,000 strings of the characters that matter,
    and long hostile ones."""
    rng = random.Random(0)
    words = r"<answer> </answer> \boxed{ { } <think> </think> 1 7 / 0 . , - ( ) * \frac é"
    alphabet = [*words.split(), " "]
    for _ in range(20_000):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 14)))
        assert is_correct(text, "7") in (True, False)
        assert is_correct(text, Makes(7, (1, 7))) in (True, False)
    for hostile in (
        "\\boxed{" * 50_000,
        "<answer>" * 50_000 + "</answer>",
        "{" * 100_000 + "}" * 100_000,
        "<answer>" + "1/" * 40_000 + "</answer>",
    ):
        assert not is_correct(hostile, "7")


def test_numbers_are_exact_fractions():
    """Catches floats on the way: 0.1 + 0.2 must be 0.3 here, and 1/3 not 0.333."""
    assert parse_number("0.1") + parse_number("0.2") == parse_number("0.3")
    assert parse_number("1/3") != parse_number("0." + "3" * 30)
    assert (
        parse_number("3 apples") is None and parse_number("") is None and parse_number("-") is None
    )


def test_numbers_between_spaces_are_compared_one_by_one():
    """Catches mixed numbers, products and units read into lists such as "8 10 6 4"."""
    for wrong in (
        "8 10 6",
        "8 10 6 4 4",
        "10 8 6 4",
        "8,10,6,4",
        "81064",
        r"8\,10\,6\,4",
        "(8,10,6,4)",
        "8 10 6 4 cm",
        "8 10 10/6 4",
    ):
        assert not is_correct(f"<answer>{wrong}</answer>", "8 10 6 4"), wrong
    assert is_correct("<answer>08 10.0 12/2 4</answer>", "8 10 6 4")


class Breaks:
    """A verifier that raises what it is given."""

    def __init__(self, error):
        self.error = error

    def same(self, answer, gold):
        raise self.error


@pytest.mark.parametrize(
    "error", [VerifierFailed("no reply"), RuntimeError("bug"), RecursionError(), MemoryError()]
)
def test_a_failing_verifier_is_counted(error, monkeypatch):
    """Catches a broken verifier that ends a run, or that silently turns right answers into wrong
    ones."""
    form = "<think>a</think><answer>x+1</answer>"
    assert score(form, "1+x") == Reward(1, 1, 1, 0) == (1, 1, 1, 0)
    assert score(form, "1+x", 0.5, Breaks(error)) == (0, 1, 0.5, 1)

    def broken(*_):
        raise error

    monkeypatch.setattr(answers, "match", broken)
    assert score(form, "1+x") == (0, 1, 0, 1) and not is_correct(form, "1+x")
    assert score("<answer>7</answer>", "7") == (1, 0, 1, 0)  # numbers need no algebra
    assert agree("7", "7.0") and not agree("x+1", "1+x")  # two votes without a verdict are two


def test_running_out_of_time_is_a_failure(monkeypatch):
    """Catches a deadline that is never set, or whose hit counts as a wrong answer."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(algebra, "clock", lambda: float(next(ticks)))
    assert score(r"\boxed{x+1}", "1+x").failed == 1 and score(r"\boxed{x+1}", "1+x").accuracy == 0


def test_a_given_verifier_decides():
    """Catches a verifier that is not asked, is asked without an answer, or is asked about
    Countdown's golds."""
    asked = []

    class Always:
        def same(self, answer, gold):
            asked.append((answer, gold))
            return True

    assert score(r"so \boxed{4}", "5", 0.0, Always()).accuracy == 1 and asked == [("4", "5")]
    for response in ("5", r"\boxed{}"):
        assert score(response, "5", 0.0, Always()).accuracy == 0
    assert score("<answer>3*8</answer>", Makes(24, (3, 8)), 0.0, Always()).accuracy == 1
    assert score("<answer>3+8</answer>", Makes(24, (3, 8)), 0.0, Always()).accuracy == 0
    assert len(asked) == 1


def lines_of(name):
    """The records of a file beside this repository."""
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not beside this repository")
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


# Here our rules differ from the expectation: a complete box stands although a later one is
# truncated; 100,200 is one number.
OTHERWISE = {29, 121}


def test_cases_that_break_known_graders():
    """Catches every mistake that known graders make: truncated boxes, joined boxes, units, order,
    tolerance, hangs, injected code."""
    cases = lines_of("grader_cases.jsonl")
    rewards = {case["id"]: score(case["response"], case["gold"]) for case in cases}
    for case in cases:
        if case["id"] in OTHERWISE:
            assert case["ambiguous"]
        else:
            assert rewards[case["id"]].accuracy == case["expected"], case
    assert not any(reward.failed for reward in rewards.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsm8k/test.jsonl", "gsm8k/train.jsonl"])
def test_gsm8k_golds_verify_against_their_solutions(name):
    """Catches golds with commas or signs that their own solutions do not reach, and golds that the
    solution of another problem reaches."""
    solutions = [record["answer"] for record in lines_of(name)]
    golds = [text.rpartition("#### ")[2] for text in solutions]
    assert all(map(is_correct, solutions, golds))
    numbers = [int(gold.replace(",", "")) for gold in golds]
    verdicts = [is_correct(solutions[i], golds[i - 1]) for i in range(len(golds))]
    expected = [numbers[i] == numbers[i - 1] for i in range(len(golds))]
    assert verdicts == expected and expected.count(False) > 1000


UNPAID = {  # by class: (gold, answers that must not be paid)
    "arithmetic left undone": [
        ("17", r"3*4+5 4^2+1 2^4+1 \frac{34}{1}\cdot\frac12 (17)+0 17\cdot1"),
        ("18", "(16-3-4)*2 20-2 6(3) (6)(3) 9+9"),
        (
            "391",
            r"17\times23+0 |17\cdot23| |17|\cdot|23| (17\times23)^1 \sqrt{(17\cdot23)^2} "
            r"\sqrt{17^2}\cdot23 \frac{17\cdot46}{2} \lfloor17.01\cdot23\rfloor "
            r"\binom{17\cdot23}{1} "
            r"17^1\cdot23^1 20^2-3^2 e^{\ln17+\ln23} 391+\sqrt2-\sqrt2 17\sqrt{23}\sqrt{23} "
            r"\frac{17}{1/23} \frac{391!}{390!} 10^{30}-(10^{30}-391) "
            r"391\cdot\frac{2^{9999}}{2^{9999}} "
            r"x=17\cdot23 \{17\cdot23\} \$17\cdot23 17\cdot23\text{cm} 1e0*391 3.91\times10^{1+1} "
            r"3.91\times10\times10",
        ),
        ("-391", r"-17\cdot23 17\cdot(-23) -(-17\cdot-23)"),
        (
            r"\frac34",
            r"1-\frac14 \frac12+\frac14 3\cdot\frac14 \frac{1+2}{4} \frac{3}{2\cdot2} 3\cdot4^{-1} "
            r"0.5+0.25",
        ),
        ("0.06", r"0.2\cdot0.3"),
        ("(391,1)", r"(17\cdot23,1) (391,2-1) x=391,y=2-1"),
        ("1,2,3", "1,1+1,3"),
        (r"\{4,5\}", r"\{2+2,5\}"),
        (r"(-\infty,6]", r"(-\infty,2\cdot3] x\le2\cdot3"),
        ("4,2", r"3\pm1"),
        (
            r"\begin{pmatrix}6\\1\end{pmatrix}",
            r"\begin{pmatrix}2\cdot3\\1\end{pmatrix} 2\begin{pmatrix}1+2\\1/2\end{pmatrix}",
        ),
        ("50\\%", r"5\cdot10\%"),
        ("3:2", "(1+2):2"),
        ("6x", r"2\cdot3x 2(3x)"),
        ("x+2", "x+1+1"),
        ("x^6", r"x^{2\cdot3}"),
        (r"6\pi", r"2\cdot3\pi"),
        (r"1+\sqrt5", r"3-2+\sqrt5"),
        ("998244359987710471", r"1000000007\times998244353"),
    ],
    "the prime is known": [
        (
            "5",
            rf"5\cdot2^{{10^{{30}}+56}} 2^{{10^{{30}}+56}}+4 5^{{{algebra.PRIME}}} "
            rf"{algebra.PRIME + 5} 5\cdot2^{{500!}}",
        ),
        ("x", rf"x^{{{algebra.PRIME}}} x\cdot2^{{{algebra.PRIME - 1}}}"),
        (
            "x^2",
            rf"x^2+{algebra.PRIME} {algebra.PRIME + 1}x^2 x^2+{algebra.PRIME}^{{100}} "
            rf"x^2+{algebra.PRIME**2}",
        ),
        ("2+i", "2+164543371520667882579352850009"),
        (r"\frac{x}{2}", f"{(algebra.PRIME + 1) // 2}x"),
        (r"\frac1x", rf"x^{{{algebra.PRIME - 2}}}"),
        ("2^{1000000}", rf"2^{{{10**6 + algebra.PRIME - 1}}}"),
        ("y=2x+1", f"2x-y+{algebra.PRIME + 1}=0"),
        ("x+y", r"x+y+(x^{10^{30}+57}-x)"),
    ],
    "decimals of irrational numbers": [
        (
            r"\sqrt2",
            r"1.414213562373 1.4142135623730951 1.41421356237309504880168872420969807857 "
            r"\frac{665857}{470832} \frac{6369051672525773}{4503599627370496} \sqrt{2+10^{-50}} "
            r"\sqrt2+10^{-90} 2^{0.50000000000000001}",
        ),
        (r"\pi", r"3.14159265358979323846 \frac{245850922}{78256779} \pi+\sin(10^{-50})"),
        (r"\sqrt2x", "1.4142135623730950488x"),
        (r"(\sqrt2,\sqrt3)", "(1.4142135623730951,1.7320508075688772)"),
        (r"[0,\pi]", "[0,3.141592653589793]"),
        (r"y=\sqrt2x", "y=1.4142135623730951x 1.4142135623730951x-y=0"),
        ("262537412640768744", r"e^{\pi\sqrt{163}}"),
        ("5", r"5\tanh(40) 5\cos(10^{-9}) \sqrt{25+10^{-40}}"),
        ("0", r"\sqrt{10^{20}+1}-10^{10} 1e-30"),
        ("4", r"\lfloor4-10^{-40}\sqrt2\rfloor"),
        ("x", r"x+10^{-40}\sqrt{x}"),
        (r"10^{-20}\sqrt2", r"10^{-20}\sqrt3+10^6-10^6"),
    ],
    "unfinished thoughts": [
        (
            "5",
            r"<think>maybe\boxed{5},but <think>so<answer>5</answer> <think>####5 "
            r"<think>a</think>no<think>\boxed{5} <think>\boxed{5}</think <think>\boxed{5}<think> "
            r"<thinking>\boxed{5} \boxed{4}<think>\boxed{5}",
        )
    ],
}
BEHIND_FIVE = (
    "dozen|halves|half|thirds|tenths|hundredths|twelfths|millionths|quarters|times|times six|"
    "squared|cubed|doubled|tripled|plus six|minus one|over two|and a half|point five|hundred|"
    "score|gross|pairs|negative|below zero|maybe six|six|sixes|fives|zeroes|twenties|fold|"
    "factorial|mod seven|choose two|to the power two|equals six|versus six|not|cm six|"
    "cm times two|dozen eggs|million dollars|apples plus six|six apples|per six|percent of ten|"
    "lakh|googol|zillions|k|x|xy|of six|less one|more than four|recurring|degrees below zero|"
    "minuses|kilo"
)
IN_TEXT_BEHIND_FIVE = (
    r"0|.5|+ 6|-1|*2|/2|^2|!|e3|,000| 6|=6|:6|;6|<6|%6|\%|x|?|(6)| cm6|6 cm| dozen| times six|"
    r" and a half|00|th root|²|½|π|_6|~6|\frac12|\text{6}"
)
UNPAID_UNITS = (
    [("5", f"5 {words}") for words in BEHIND_FIVE.split("|")]
    + [("5", rf"5\text{{{text}}}") for text in IN_TEXT_BEHIND_FIVE.split("|")]
    + [
        ("-3", "-3 squared"),
        (r"\frac12", r"\frac12\text{ dozen}"),
        ("0.5", r"0.5\text{5}"),
        ("(1,2)", r"(1\text{0},2)"),
        ("1,2", r"1\text{ half},2"),
        ("x^2", r"x^2\text{+1}"),
        (r"5\text{ cm}", r"5\text{ dozen cm}"),
        (r"5\text{ cm}", r"5\text{ cm squared}"),
        ("1", "1 dozen"),
        ("1", "1 sixth"),
        (r"\$5", r"\$5 dozen"),
        (r"\$5", r"\$5\text{00}"),
        ("50", r"5\text{0}"),
        ("50", r"5\phantom{0}"),
        ("5", r"\phantom{5}"),
        (r"\{5,6\}", r"\{5\text{ dozen},6\}"),
    ]
)
UNPAID["units that are none"] = [(gold, [answer]) for gold, answer in UNPAID_UNITS]


def respond(answer):
    """A response with the answer in a box, unless it brings its own."""
    return answer if "boxed" in answer or "think>" in answer else rf"so \boxed{{{answer}}}"


@pytest.mark.parametrize("kind", UNPAID)
def test_hostile_answers_are_not_paid(kind):
    """Catches holes that a policy would find: the question as its answer, units that change the
    number, equal residues and roundings, boxes in a truncated thought."""
    for gold, unpaid in UNPAID[kind]:
        for answer in unpaid.split() if isinstance(unpaid, str) else unpaid:
            assert score(respond(answer), gold) == (0, 0, 0, 0), (gold, answer)


PAID = {  # gold: answers as models write them, all right
    "18": (
        r"18.0|\$18|18 dollars|\text{18 dollars}|18\text{ dollars per day}|18 eggs|"
        r"18\text{ eggs per day}|18~\mathrm{cm}|18\ \text{cm}^{2}|18\text{ square units}|"
        r"18\text{ sq. units}|18 people|18 apples|18 years old|18°|18^{\circ}|18\text{ degrees}|"
        r"18\%|18 percent|18 miles per hour|18\ \mathrm{m/s^2}|18\text{ m}/\text{s}^2|"
        r"18\ \text{kg}\cdot\text{m}^2|18\text{ N}|18 cubic meters|18 lbs|18 cups of flour|"
        r"18 months|18 red marbles|18\text{ ways}|18 boxes|18 sheep|18 inches tall|"
        r"18 dollars each|18 dollars per ticket|18 km/h|18cm|€18|x=18|20-2=18|x=36/2=18|"
        r"\frac{36}{2}|\sqrt{324}|\binom{18}{1}|18^1|eighteen|1.8\times10^1|"
        r"18\text{ kilowatt-hours}"
    ),
    "1": r"1 apple|1\text{ hour}|\sin90^\circ|\log_7 7|\tan\frac{\pi}{4}",
    "120": r"5!|\binom{10}{3}",
    r"\frac{1}{1024}": r"2^{-10}|\frac{1}{2^{10}}",
    r"\frac16": r"\frac{\frac12}{3}|1/6|\frac{5}{30}",
    "2.5": r"2\frac12|2 1/2|2½|5/2",
    r"2\sqrt3": r"\sqrt{12}|2\cdot\sqrt3",
    r"2\pi+1": r"1+2\pi",
    r"\frac{3\sqrt3}{4}": r"\frac34\sqrt3",
    r"\frac{1+\sqrt5}{2}": r"\frac12+\frac{\sqrt5}{2}",
    "4.5e33": r"4.5\times10^{33}|45e32",
    "3x+4": "4+3x",
    "3": r"\log_2 8|\sqrt[3]{27}",
    "6r^2-4r-24": "2(3r^2-2r-12)",
    "2^{1009}": r"2\cdot2^{1008}",
    r"\frac{2^{2021}-1}{3}": r"\frac{2^{2021}}{3}-\frac13",
    r"3\cdot 4+5": r"3\cdot4+5|17|5+3\cdot4",
    r"17\times 23": r"17\cdot23|391",
    "5000000": "5 million|5 million people",
    "60": "5 dozen|5 dozen eggs",
    r"5\text{ cm}": r"5|50\text{ mm}|5\text{ centimeters}",
    r"\begin{pmatrix}1&2\end{pmatrix}": r"\frac12\begin{pmatrix}2&4\end{pmatrix}",
    r"\pi": r"4\arctan1",
    r"\sqrt2+\sqrt3": r"\sqrt{5+2\sqrt6}",
    "2x+y<3": "2x+y-3<0",
    "0": r"\sin\pi|0.0",
    "7353": r"7353\ \text{\AA}",
    "6.63e-34": r"6.63\times10^{-34}\ \mathrm{J\cdot s}",
    r"\$0.75": r"75\text{ cents}|0.75",
    "x^{100000}y": "yx^{100000}",
    "(x+1)^{100000}": "(1+x)^{100000}",
    r"\text{June 20}": "June 20",
}


@pytest.mark.parametrize("gold", PAID)
def test_honest_answers_are_paid(gold):
    """Catches rules against hostile answers that cost honest ones."""
    for answer in PAID[gold].split("|"):
        assert score(rf"\boxed{{{answer}}}", gold) == (1, 0, 1, 0), answer


def test_cases_of_an_attack_get_the_expected_reward():
    """Catches holes that an attack found: 103 answers, of which 37 were once paid wrongly."""
    for case in lines_of("hostile_cases.jsonl"):
        reward = score(case["response"], case["gold"])
        assert (reward.accuracy, reward.failed) == (case["expected"], 0), case


def test_values_too_small_for_floats_are_undecided():
    """Catches underflow taken for 0: there is no reward, and the failure is counted."""
    for answer, gold in (
        ("e^{-1000}", "0"),
        ("2^{-5000.5}", "0"),
        ("5+e^{-1000}", "5"),
        ("e^{-1001}", "e^{-1000}"),
        ("x+e^{-800}", "x"),
        (r"\tanh(1000)", "1"),
        (r"\cos(10^{-200})", "1"),
        (r"10^{-400}\pi", "0"),
    ):
        assert score(rf"\boxed{{{answer}}}", gold) == (0, 0, 0, 1), answer
    for answer, gold in (
        ("e^{-1000}", "5"),
        ("x+e^{-800}", "x+1"),
        ("1e-400", "0"),
        ("10^{400}", r"\sqrt2"),
    ):
        assert score(rf"\boxed{{{answer}}}", gold).accuracy == 0
    assert score(r"\boxed{1e-400}", "0").failed == 0


# ---- repetitive text -----------------------------------------------------------------------------

WORDS = r"""
    \text \text{ \text{cm} \text{cm}^2 \text{or} \text{a b} \mathrm{m}/ \cdot \times \frac
    \frac{1}{2} \sqrt \sqrt[3] \overline{ \left( \right) \{ \} \begin{pmatrix} \end{pmatrix}
    \begin{array}{ \\ \\[ & \color \color[ \color{red} \boxed{ \fbox{ \pm \cup \in \leq \approx
    \circ ^\circ ^{\circ} \$ \% \! \, \; \quad \operatorname \mathbb{R} \binom \log_ \sin \infty \pi
    \phantom{ <answer> </answer> <think> </think> #### { } ( ) [ ] | $ % £ . , ; : ! ? = < > + - * /
    ^ _ ' ~ # 0 1 12 9,999 1,000 0.5 .5 1e9 999 x y n e i xy a_1 f(x) cm kg per of and or to five
    six dozen half apples the not maybe x= 1/2 3:30 1011_2 np. {,} ² √ π ½ − ° é ٣ 五
"""
SPACED = (
    " |  |\n|\t| \\ |5 | cm|cm | and | or | to |\\text{ cm} |, |1, | =|\\text {|^ {| / |#### \n|} {"
)
PIECES = WORDS.split() + SPACED.split("|")
GOLDS = (
    r"5|\frac{1}{2}|\sqrt{2}|x^2+1|(1,2)|\{1,2\}|[1,2)|x=5|y=2x+1|1,2|x>3|\text{east}|5\text{ cm}"
    "|8 10 6"
)


def repeated(rng, length):
    """A text of at most about `length` characters."""
    pieces = rng.choices(PIECES, k=rng.choice((1, 1, 2, 3)))
    room = rng.choice((length // 20, length // 4, length - 30))
    middle = "".join(pieces) * max(1, room // len("".join(pieces)))
    if rng.random() < 0.3:
        middle = "".join(piece * max(1, room // len(pieces) // len(piece)) for piece in pieces)
    return (
        "".join(rng.choices(PIECES, k=rng.randint(0, 2)))
        + middle
        + "".join(rng.choices(PIECES, k=rng.randint(0, 3)))
    )


def cases(seed, count, length=1_000_000):
    """Yields (response, gold): a text that once did not end, then answers in boxes and tags; every
    fiftieth response has `length` characters, open or closed."""
    yield r"\boxed{" + r"\text{cm} " * 24 + "x24 5}", "5"
    rng = random.Random(seed)
    for i in range(count):
        if i % 50 == 0:
            text = repeated(rng, length)
            yield (
                rng.choice(
                    (
                        text,
                        text + r"\boxed{5}",
                        rf"\boxed{{{text}",
                        f"<think>{text}</think><answer>5</answer>",
                        f"<answer>{text}",
                    )
                ),
                "5",
            )
        else:
            text = repeated(rng, LONGEST - 30)[:LONGEST]
            yield (
                rng.choice((rf"\boxed{{{text}}}", f"<answer>{text}</answer>", f"#### {text}")),
                rng.choice(GOLDS.split("|")),
            )


def test_repetitive_text_does_not_hang():
    """Catches regular expressions whose time explodes when a model repeats itself. They run in a
    process of their own, as they cannot be interrupted. A verdict should take 50 ms at most;
    `python -m tests.test_reward 10000` shows the slowest."""
    command = [sys.executable, "-m", "tests.test_reward", "300"]
    subprocess.run(command, cwd=ROOT, timeout=1800, check=True, capture_output=True)


@pytest.mark.parametrize(
    "words, code, printed",
    [
        (
            ["reward.py", r"so \boxed{\frac12}", "0.5"],
            0,
            r"answer '\\frac12'; Reward(accuracy=1.0,",
        ),
        (["reward.py", "<answer>-5</answer>", "-6"], 0, "answer '-5'; Reward(accuracy=0.0,"),
        (["reward.py", "--help"], 0, "python reward.py "),
        (["reward.py", "5"], 2, "error: usage: python reward.py RESPONSE GOLD\n"),
        (["-m", "verifier.answers", r"\frac12", "0.5"], 0, "\nequal\n"),
        (["-m", "verifier.answers", "1", "2"], 0, "\ndifferent\n"),
        (["-m", "verifier.answers", "e^{-1000}", "0"], 0, "\nundecided, "),
        (["-m", "verifier.answers", "--help"], 0, "python -m verifier.answers "),
        (["-m", "verifier.answers"], 2, "error: usage: python -m verifier.answers ANSWER GOLD\n"),
    ],
)
def test_commands(words, code, printed):
    """Catches a command that warns, or that answers bad usage with a traceback."""
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    output, other = (done.stderr, done.stdout) if code else (done.stdout, done.stderr)
    assert done.returncode == code and printed in output and other == ""


def main():
    """Prints the slowest texts, in CPU time. Arguments: how many to try, and a seed."""
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    seconds, failed = {"answers": [], "long responses": []}, 0
    for response, gold in cases(seed, count):
        start = time.thread_time()
        failed += score(response, gold, 0.5).failed
        seconds["answers" if len(response) < 5_000 else "long responses"].append(
            (time.thread_time() - start, response[:60])
        )
    for name, took in seconds.items():
        for second, text in sorted(took)[-3:]:
            print(f"{name}: {1e3 * second:.1f} ms, {text!r}")
    print(f"{count} texts, {failed:.0f} undecided")


if __name__ == "__main__":
    main()
