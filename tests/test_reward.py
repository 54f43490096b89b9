"""The verifier: a hole here is what the policy would learn."""
import json
import random
from pathlib import Path

import pytest

import algebra
import answers
from reward import Makes, Reward, VerifierFailed, extract_answer, is_correct, parse_number, score

DATA = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.mark.parametrize("text, answer", [
    ("<answer>3</answer> no, <answer>4</answer>", "4"),                  # the last one counts
    (r"\boxed{3} or rather <answer>4</answer>", "4"),
    (r"<answer>4</answer> or rather \boxed{3}", "3"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),                            # braces inside
    (r"\boxed{{1}} x}", "{1}"),
    ("<answer>3</answer><answer>4", "3"),                                # cut off: the last COMPLETE one
    (r"\boxed{3} and \boxed{4", "3"),
    ("<answer>1<answer>2</answer>", "2"),
    ("</answer>5<answer>", None), ("5", None), ("", None), (r"\boxed5", None), ("<answer></answer>", ""),
    (r"\boxed {5}", "5"), (r"\fbox{5}", "5"), (r"\boxed{\boxed{5}}", "5"), (r"\boxed{x = \boxed{5}}", "5"), (r"\boxed{\boxed{5}} \boxed{6}", "6"),
    (r"<answer>so \boxed{5}.</answer>", "5"), (r"\boxed{<answer>5</answer>}", "5"), (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{9}}", "9"),
    (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."), (r"{ \boxed{5}", "5"), (r"\unboxed{5}", None), (r"\boxed{a\\}", r"a\\"),
    ("#### 18", "18"), ("####18\n", "18"), ("#### 17\nno\n#### 18\n\nbye", "18"), ("####", ""), ("##### 5", None), ("### 5", None),
    (r"#### 18 \boxed{19}", "19"), (r"\boxed{19} #### 18", "19"), ("<answer>19</answer>\n#### 18", "19"), ("<answer>19\n#### 18", "18"),
])
def test_extract_answer(text, answer):
    """Catches first-instead-of-last, unbalanced braces, and truncated answers accepted."""
    assert extract_answer(text) == answer


@pytest.mark.parametrize("answer, gold", [
    ("7", "7"), ("+7", "7"), ("-7", "-7"), ("\u22127", "-7"), ("1,234", "1234"), ("1234", "1,234"), ("0.5", "1/2"), ("1/2", "2/4"),
    (r"\frac{3}{4}", "0.75"), (r"-\frac{3}{4}", "-0.75"), ("5.", "5"), ("5.0", "5"), (".5", "0.5"), ("-0", "0"), ("$12$", "12"), (" 12 ", "12"),
    ("007", "7"), ("1 2 3", "1 2 3"), ("1  2\n3", "1 2 3"), ("01 2.0 3", "1 2 3"), ("east", "east"), ("-1/-2", "1/2"),
    ("1e3", "1000"), (r"\frac12", "0.5"), (r"2\pi", "2π"), ("x=5", "5"), (r"5\text{ cm}", "5"), ("2,1", "1,2"), ("10^{10^{10}}", "10^{10^{10}}"),
    ("12345678901234567890123", "12345678901234567890123"),
])
def test_equal_answers(answer, gold):
    """Catches false negatives: a right answer scored 0 teaches the policy that it was wrong."""
    assert is_correct(f"<think>x</think><answer>{answer}</answer>", gold) and is_correct(rf"so \boxed{{{answer}}}", gold)


@pytest.mark.parametrize("answer, gold", [
    ("8", "7"), ("-7", "7"), ("1234576", "1234567"), ("0.333", "1/3"), ("3.0000001", "3"), ("1,23", "123"), ("1,2", "12"), ("1 2", "12"),
    ("1 2 4", "1 2 3"), ("1 2 3 4", "1 2 3"), ("1 2", "1 2 3"), ("3 2 1", "1 2 3"), ("6 7 8 9", "7"), ("7 or 8", "7"), ("1/0", "0"),
    ("0/0", "0"), ("", ""), ("", "0"), ("nan", "0"), ("inf", "1"), ("1_0", "10"), ("\u0663", "3"), ("0x10", "16"), ("--7", "7"),
    ("True", "1"), ("__import__('os')", "1"), ("12345678901234567890124", "12345678901234567890123"), ("9" * 5000, "9" * 5000),
])
def test_different_answers(answer, gold):
    """Catches false positives: near misses, many answers, echoes, floats that compare equal, digits of other scripts."""
    assert not is_correct(f"<answer>{answer}</answer>", gold)


@pytest.mark.parametrize("response", [
    "7", "<answer>", "<answer>7", "</answer>7<answer>", r"\boxed{7", "the answer is 7", "<answer> </answer>", "<answer>6 7 8</answer>",
    "<answer>7</answer><answer></answer>", "<answer>7</answer><answer>8</answer>", "x in {7}", "",
])
def test_hacks_score_zero(response):
    """Catches rewards for naming the gold anywhere: unfinished, empty, several at once, or echoed from the question."""
    assert score(response, "7").total == 0


def test_countdown_answers():
    """Catches numbers left out or used twice, a wrong order of operations, and anything that is not arithmetic."""
    gold = Makes(24, (1, 3, 8))
    for right in ("(3*8)*1", "3*8*1", "8*3/1", "(8/1)*3", "8/(1/3)", "1*3*8"):
        assert is_correct(f"<answer>{right}</answer>", gold), right
    for wrong in ("24", "3*8", "3*8*1*1", "3+8*1", "3*8**1", "(3*8)*1+0", "8/(3-3*1)", "8/0", "int(24)", "3*8*1)", "[3*8*1]", "", "3*8*01",
                  "(" * 90 + "3", "3*8*1 == 24", "-3*-8*1"):
        assert not is_correct(f"<answer>{wrong}</answer>", gold), wrong


def test_format_never_beats_being_right():
    """Catches additive format rewards that make a long wrong answer look good."""
    form_only, right_only = score("<think>a</think><answer>8</answer>", "7", 0.5), score("so <answer>7</answer>", "7", 0.5)
    assert form_only.total == 0.5 and right_only.total == 1.0 and right_only.format == 0
    assert score("<think>a</think><answer>7</answer>", "7", 0.5).total == 1.5
    assert score("<think><think>a</think></think><answer>7</answer>", "7", 0.5).format == 0
    with pytest.raises(ValueError, match="format weight"):
        score("", "7", 0.9)


def test_no_response_breaks_it():
    """Catches an exception in the verifier, which would end a run: 20,000 strings of the characters that matter, and long hostile ones."""
    rng = random.Random(0)
    alphabet = ["<answer>", "</answer>", "\\boxed{", "{", "}", "<think>", "</think>", "1", "7", "/", "0", ".", ",", "-", "(", ")", "*", " ", "\\frac", "é"]
    for _ in range(20_000):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 14)))
        assert is_correct(text, "7") in (True, False) and is_correct(text, Makes(7, (1, 7))) in (True, False)
    for hostile in ("\\boxed{" * 50_000, "<answer>" * 50_000 + "</answer>", "{" * 100_000 + "}" * 100_000, "<answer>" + "1/" * 40_000 + "</answer>"):
        assert not is_correct(hostile, "7")


def test_parse_number_is_exact():
    """Catches floats on the way: 0.1 + 0.2 must be 0.3 here, and 1/3 not 0.333."""
    assert parse_number("0.1") + parse_number("0.2") == parse_number("0.3")
    assert parse_number("1/3") != parse_number("0." + "3" * 30)
    assert parse_number("3 apples") is None and parse_number("") is None and parse_number("-") is None


def test_golds_of_numbers_between_spaces_stay_strict():
    """Catches mixed numbers, products and units read into lists: "8 10 6 4" is compared number by number, nothing else counts."""
    for wrong in ("8 10 6", "8 10 6 4 4", "10 8 6 4", "8,10,6,4", "81064", r"8\,10\,6\,4", "(8,10,6,4)", "8 10 6 4 cm", "8 10 10/6 4"):
        assert not is_correct(f"<answer>{wrong}</answer>", "8 10 6 4"), wrong
    assert is_correct("<answer>08 10.0 12/2 4</answer>", "8 10 6 4")


class Breaks:
    """A verifier that raises what it is given."""
    def __init__(self, error):
        self.error = error

    def same(self, answer, gold):
        raise self.error


@pytest.mark.parametrize("error", [VerifierFailed("no reply"), RuntimeError("bug"), RecursionError(), MemoryError()])
def test_a_failing_verifier_is_counted(error, monkeypatch):
    """Catches a broken verifier that ends a run, or that silently turns right answers into wrong ones."""
    form = "<think>a</think><answer>x+1</answer>"
    assert score(form, "1+x") == Reward(1, 1, 1, 0) == (1, 1, 1, 0)
    assert score(form, "1+x", 0.5, Breaks(error)) == (0, 1, 0.5, 1)

    def broken(*_):
        raise error
    monkeypatch.setattr(answers, "match", broken)
    assert score(form, "1+x") == (0, 1, 0, 1) and not is_correct(form, "1+x")
    assert score("<answer>7</answer>", "7") == (1, 0, 1, 0)                  # what needs no algebra still works


def test_running_out_of_time_is_a_failure(monkeypatch):
    """Catches a deadline that is never set, or whose hit counts as a wrong answer."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(algebra, "clock", lambda: float(next(ticks)))
    assert score(r"\boxed{x+1}", "1+x").failed == 1 and score(r"\boxed{x+1}", "1+x").accuracy == 0


def test_another_verifier_decides():
    """Catches a verifier that is not asked, is asked without an answer, or is asked about Countdown's golds."""
    asked = []

    class Always:
        def same(self, answer, gold):
            asked.append((answer, gold))
            return True
    assert score(r"so \boxed{4}", "5", 0.0, Always()).accuracy == 1 and asked == [("4", "5")]
    assert score("5", "5", 0.0, Always()).accuracy == score(r"\boxed{}", "5", 0.0, Always()).accuracy == 0
    assert score("<answer>3*8</answer>", Makes(24, (3, 8)), 0.0, Always()).accuracy == 1
    assert score("<answer>3+8</answer>", Makes(24, (3, 8)), 0.0, Always()).accuracy == 0 and len(asked) == 1


def lines_of(name):
    """The records of a file beside this repository."""
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not beside this repository")
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


# Where a policy of ours differs from the expectation: a complete box stands when a later one is cut off; 100,200 is one number.
OTHERWISE = {29, 121}


def test_cases_of_real_graders():
    """Catches every mistake that known graders make: truncated boxes, joined boxes, units, order, tolerance, hangs, injected code."""
    cases = lines_of("grader_cases.jsonl")
    rewards = {case["id"]: score(case["response"], case["gold"]) for case in cases}
    assert [case for case in cases if rewards[case["id"]].accuracy != case["expected"] and case["id"] not in OTHERWISE] == []
    assert all(case["ambiguous"] for case in cases if case["id"] in OTHERWISE) and not any(reward.failed for reward in rewards.values())


@pytest.mark.parametrize("name", ["gsm8k/test.jsonl", "gsm8k/train.jsonl"])
def test_gsm8k_golds_verify_against_their_solutions(name):
    """Catches golds with commas or signs that their own solutions do not reach, and golds that another problem's solution does."""
    solutions = [record["answer"] for record in lines_of(name)]
    golds = [text.rpartition("#### ")[2] for text in solutions]
    assert all(map(is_correct, solutions, golds))
    numbers = [int(gold.replace(",", "")) for gold in golds]
    others = [numbers[i] != numbers[i - 1] for i in range(len(golds))]
    assert [is_correct(solutions[i], golds[i - 1]) for i in range(len(golds))] == [not other for other in others] and sum(others) > 1000
