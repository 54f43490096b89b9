"""Problems, their texts, and the encoding they are written in."""

import collections
import random

import pytest

from eval import held_out_questions
from huggingface.tokenizer import PHRASES, TAGS, WORDS
from reward import is_correct, score
from runtime.flags import BadInput
from tasks import catalog
from tasks.catalog import draw, make_task, phrase_text, prompt_text

NAMES = ("solve", "chain", "countdown")


@pytest.mark.parametrize("name", NAMES)
def test_streams_are_pure_functions(name):
    """Catches shared random state: problem 5 must be the same whatever was drawn before, and differ
    between seeds, splits and indices."""
    task = make_task(name)
    assert draw(task, "train", 1, 5) == draw(task, "train", 1, 5)
    assert (
        len(
            {
                draw(task, split, seed, i).question
                for split in ("train", "held out")
                for seed in (0, 1)
                for i in (5, 6)
            }
        )
        == 8
    )


@pytest.mark.parametrize("name", NAMES)
def test_no_held_out_computation_is_met_in_training(name):
    """Catches evaluation on what training can work through in other words, another order or for
    other candidates: none of 20,000 training-side draws has a computation of the held-out
    questions, told apart here by other means than in tasks.py; and a split that leaves too few."""
    functions = lambda operations: tuple(
        tuple(catalog.apply(op, x, b) % 11 for x in range(11)) for op, b in operations
    )
    # an attempt may try any candidate
    worked = dict(
        solve=lambda problem: {(x, functions(problem.data[1])) for x in problem.data[0]},
        chain=lambda problem: {(problem.data[0], functions(problem.data[1]))},
        countdown=lambda problem: {problem.gold.numbers},
    )[name]  # and reach any target
    task, count = make_task(name), 500 if name == "countdown" else 1024
    asked, learnt = (
        held_out_questions(task, count),
        [draw(task, "train", "base/0", i) for i in range(20_000)],
    )
    met = set().union(*map(worked, learnt))
    assert [problem.question for problem in asked if worked(problem) & met] == []
    assert len({problem.question for problem in asked}) == len(asked) == count


@pytest.mark.parametrize(
    "name, flags",
    [
        ("solve", {}),
        ("chain", {}),
        ("countdown", {}),
        ("solve", dict(candidates=2, operations=2, modulus=5)),
    ],
)
def test_the_two_sides_are_alike(name, flags):
    """Catches a split by which one side is harder, or has other answers: shares of lengths, answers
    and operations. (Two samples of 8,000 of one distribution differ by less than 0.02 in each;
    countdown's 70 held-out sets of numbers are few.)"""
    task = make_task(name, **flags)
    sides = [[draw(task, split, 0, i) for i in range(8000)] for split in ("train", "held out")]
    looks = (
        dict(target=lambda p: [p.gold.target])
        if name == "countdown"
        else dict(
            length=lambda p: [len(p.data[1])],
            answer=lambda p: [p.gold.split()[-1]],
            operation=lambda p: [op for op, _ in p.data[1]],
            first=lambda p: [p.data[0] if name == "chain" else len(p.data[0])],
        )
    )
    for what, look in looks.items():
        counts = [
            collections.Counter(found for problem in side for found in look(problem))
            for side in sides
        ]
        apart = (
            sum(
                abs(counts[0][k] / counts[0].total() - counts[1][k] / counts[1].total())
                for k in counts[0].keys() | counts[1].keys()
            )
            / 2
        )
        assert apart < (0.1 if name == "countdown" else 0.05), (what, apart)


def test_every_small_task_has_two_sides():
    """Catches a task within its limits that has nothing to train on, or nothing to ask."""
    for task in [
        *(
            make_task(name, 1, 2, modulus)
            for name in ("solve", "chain")
            for modulus in range(3, 14)
        ),
        *(make_task("countdown", numbers=n) for n in range(2, 7)),
    ]:
        for split in ("train", "held out"):
            assert catalog.held_out(task, draw(task, split, 0, 0)) == (split == "held out")


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_as_right_as_they_claim(name):
    """Catches a gold answer, an attempt and a verifier that disagree: an attempt that reached the
    target must verify, others must not."""
    task, rng = make_task(name), random.Random(0)
    for i in range(400):
        problem = draw(task, "train", 2, i)
        attempt = task.attempt(problem, rng)
        target = (
            int(problem.gold)
            if name == "chain"
            else problem.gold.target
            if name == "countdown"
            else problem.data[2]
        )
        assert is_correct(attempt.text, problem.gold) == (attempt.reached == target)
        assert (
            score(attempt.text, problem.gold).format
            == score(task.review(problem, attempt, rng), problem.gold).format
            == 1
        )


def test_solve_has_exactly_one_solution():
    """Catches two candidates that reach the target: the gold list would then be one of several
    right ones."""
    for modulus in (11, 12, 23):
        task = make_task("solve", modulus=modulus, candidates=5)
        for i in range(300):
            candidates, operations, target = draw(task, "train", 0, i).data
            assert (
                sum(catalog.compute(x, operations, modulus)[-1] == target for x in candidates) == 1
            )


def test_the_base_doubts_as_stated():
    """Catches reviews that reveal the truth, or hold no seed of it: P(no | wrong) and P(no | right)
    within 4 standard errors."""
    task, rng, said = make_task("solve"), random.Random(0), {True: [], False: []}
    for i in range(3000):
        problem = draw(task, "train", 0, i)
        attempt = task.attempt(problem, rng)
        said[is_correct(attempt.text, problem.gold)].append(
            ": no. " in task.review(problem, attempt, rng)
        )
    for right, p in ((True, catalog.DOUBTS_RIGHT), (False, catalog.DOUBTS_WRONG)):
        n = len(said[right])
        assert abs(sum(said[right]) / n - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_reviews_of_countdown_see_right_attempts_half_of_the_time():
    """Catches a base that never reads "yes": one attempt in six is right, but of those under review
    0.5 + 0.5 / 6, within 4 standard errors."""
    task, rng = make_task("countdown"), random.Random(0)
    problems = [draw(task, "train", 0, i) for i in range(2000)]
    alone = sum(task.attempt(p, rng).reached == p.gold.target for p in problems) / 2000
    reviewed = (
        sum(catalog.attempt_to_review(task, p, rng).reached == p.gold.target for p in problems)
        / 2000
    )
    assert 0.10 < alone < 0.25 and abs(reviewed - (0.5 + alone / 2)) < 4 * (0.25 / 2000) ** 0.5
    assert {
        catalog.attempt_to_review(
            make_task("solve"), draw(make_task("solve"), "train", 0, i), rng
        ).choice
        for i in range(200)
    } == set(range(11))


def test_a_doubting_review_tries_another_candidate():
    """Catches a review that says no and then repeats the attempt: half the use of a second look."""
    task, rng, changed = make_task("solve"), random.Random(1), 0
    for i in range(300):
        problem = draw(task, "train", 3, i)
        attempt = task.attempt(problem, rng)
        review = task.review(problem, attempt, rng)
        if ": no. " in review and len(problem.data[0]) > 1:
            assert not review.split(": no. ")[1].startswith(
                f"{attempt.choice}{problem.data[1][0][0]}"
            )
            changed += 1
    assert changed > 100


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("solve", dict(candidates=0)),
        ("solve", dict(candidates=12)),
        ("solve", dict(operations=1)),
        ("chain", dict(modulus=2)),
        ("solve", dict(modulus=98)),
        ("countdown", dict(numbers=9)),
    ],
)
def test_difficulty_out_of_range(name, wrong):
    """Catches a task that can draw nothing, or hangs."""
    with pytest.raises(BadInput, match=f"--{next(iter(wrong))}"):
        make_task(name, **wrong)


# ---- encoding ------------------------------------------------------------------------------------


def test_any_text_round_trips(encoding):
    """Catches text that cannot be encoded: 3,000 random strings of any Unicode come back exactly,
    and never hold the end token."""
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(
            rng.choice(
                [
                    chr(
                        rng.choice(
                            [
                                rng.randrange(128),
                                rng.randrange(0xD800),
                                rng.randrange(0xE000, 0x110000),
                            ]
                        )
                    ),
                    *TAGS,
                    *WORDS,
                    "<|endoftext|>",
                    "12",
                    "007",
                ]
            )
            for _ in range(rng.randint(0, 12))
        )
        ids = encoding.encode_ordinary(text)
        assert (
            encoding.decode(ids) == text
            and encoding.eot_token not in ids
            and all(0 <= i < encoding.n_vocab for i in ids)
        )


def test_what_tasks_write_is_one_token_each(encoding):
    """Catches a number, tag or phrase cut into bytes: small models learn far slower so."""
    for text in [*TAGS, *WORDS, *PHRASES, *map(str, range(100))]:
        assert len(encoding.encode_ordinary(text)) == 1, text
    ids = encoding.encode_ordinary("<think>7*8=10, +7=6</think><answer>7 10 6</answer>")
    assert [encoding.decode([i]) for i in ids] == [
        "<think>",
        "7",
        "*",
        "8",
        "=",
        "10",
        ", ",
        "+",
        "7",
        "=",
        "6",
        "</think>",
        "<answer>",
        "7",
        " ",
        "10",
        " ",
        "6",
        "</answer>",
    ]
    assert len(encoding.encode_ordinary("<|endoftext|>")) == 13


def test_layer_2_prompt_is_layer_1s_and_more(encoding):
    """Catches a phrase whose tokens merge with the attempt's: the tokens of the whole text are
    those of its parts."""
    problem = draw(make_task("solve"), "train", 0, 0)
    attempt = make_task("solve").attempt(problem, random.Random(0))
    parts = [prompt_text(problem), attempt.text, phrase_text(PHRASES[3])]
    assert encoding.encode_ordinary("".join(parts)) == [
        i for part in parts for i in encoding.encode_ordinary(part)
    ]
