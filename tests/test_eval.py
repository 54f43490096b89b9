"""eval.py: its statistics against hand-computed cases, its transcripts, and what it can be pointed
at."""

import itertools
import json
import math

import pytest
import torch
from test_mgrpo import scripted_rollout

import eval as evaluation
from eval import Config, evaluate, majority, max_new_tokens, open_subject
from mgrpo import Sampling
from runtime.flags import BadInput
from runtime.transcripts import Dialogues
from tables import details, mean_and_error, pass_at, several, summarise, table
from tasks.problems import Problem


def test_transitions_by_hand():
    """Catches i→c and c→i swapped, and samples of one question counted as independent. Four
    questions, two samples, two turns."""
    right = torch.tensor(
        [[[1, 1], [1, 0]], [[0, 1], [0, 1]], [[0, 0], [1, 1]], [[1, 0], [0, 0]]]
    ).float()
    found = summarise(right)
    means = {k: v[0] for k, v in found.items()}
    assert means == dict(t1=0.5, t2=0.5, delta=0.0, i2c=0.25, c2i=0.25)
    assert found["t1"][1] == pytest.approx(torch.tensor([1, 0, 0.5, 0.5]).std().item() / 2)


def test_standard_error_of_a_share():
    """Catches a std for a standard error: 300 ones among 1,000 have an error of sqrt(p(1-p)/n), but
    for n - 1."""
    mean, error = mean_and_error(torch.cat([torch.ones(300), torch.zeros(700)]))
    assert mean == pytest.approx(0.3) and error == pytest.approx(math.sqrt(0.21 / 999), rel=1e-3)


def test_table_has_the_papers_columns():
    """Catches a column lost or a sign dropped."""
    result = dict(
        t1=(0.6, 0.015),
        t2=(0.7, 0.014),
        delta=(0.1, 0.01),
        i2c=(0.2, 0.01),
        c2i=(0.1, 0.01),
        questions=1024,
    )
    text = table({"base": result, "MGRPO": result})
    assert [w for w in ("Acc@t1", "Acc@t2", "Δ(t1,t2)", "Δ i→c", "Δ c→i") if w not in text] == []
    assert "+10.0 ± 1.0" in text and "over held-out questions" in text and text.count("\n") == 3


def test_every_row_has_its_number_of_questions():
    """Catches the first row's number of questions printed for all."""
    rows = {
        name: dict(t1=(0.6, 0.015), questions=questions)
        for name, questions in (("greedy", 1024), ("temperature 1", 565))
    }
    lines = table(rows).splitlines()
    assert (
        [line.split()[-1] for line in lines[:3]] == ["questions", "1,024", "565"]
        and "1024" not in lines[3]
        and len({len(line) for line in lines[:3]}) == 1
    )


# ---- several samples -----------------------------------------------------------------------------


@pytest.mark.parametrize("n, c", [(1, 0), (1, 1), (4, 0), (4, 1), (4, 3), (6, 2)])
def test_pass_at_k_is_the_share_of_subsets(n, c):
    """The oracle for the unbiased estimator: among ALL subsets of k of n samples, the share that
    holds a right one. (1 - (1 - c/n)^k, the biased one, is 0.68 for n = 4, c = 1, k = 4, where the
    answer is 1.)"""
    right = [1] * c + [0] * (n - c)
    for k in range(1, n + 1):
        subsets = [max(subset) for subset in itertools.combinations(right, k)]
        assert pass_at(k, n, c) == pytest.approx(sum(subsets) / len(subsets))


@pytest.mark.parametrize(
    "answers, right, share",
    [
        (["1", "2", "2"], [1, 0, 0], 0),
        (["0.5", r"\frac{1}{2}", "3", "4"], [1, 1, 0, 0], 1),
        (["1", "2"], [1, 0], 0.5),
        ([None, "", "7"], [0, 0, 1], 1),
        ([None, None], [0, 0], 0),
        (["9", None, None, None], [1, 0, 0, 0], 1),
        (["x", "x", "1,000", "1000", "1000.0"], [0, 0, 1, 1, 1], 1),
    ],
)
def test_majority(answers, right, share):
    """Catches votes counted by spelling (0.5 and 1/2 are one answer), no answer taken for one, and
    ties decided by who came first."""
    assert majority(answers, right) == share


def test_several_by_hand():
    """Catches pass@k of the wrong turn, and a maj@n that is an average accuracy: 2 questions, 4
    samples, 2 turns."""
    right = torch.zeros(2, 4, 2)
    right[0, :2, 0], right[1, :, 1] = 1, 1
    found = several(right, [[1.0, 0.0], [0.0, 1.0]])
    assert (
        found["pass1"][1][0] == pytest.approx(0.25)
        and found["pass1"][2][0] == pytest.approx(5 / 12)
        and found["pass1"][4][0] == 0.5
    )
    assert set(found["pass1"]) == {1, 2, 4} and found["pass2"][1] == found["pass2"][4] == (
        0.5,
        pytest.approx(0.5),
    )
    assert found["maj1"][0] == found["maj2"][0] == 0.5 and several(right[:, :1], []) == {}
    assert set(several(torch.zeros(1, 5, 1), [[0.0]])["pass1"]) == {1, 2, 4, 5}


def test_details_say_all_that_is_asked():
    """Catches a figure that is computed and not shown."""
    right = torch.ones(3, 2, 2)
    row = (
        summarise(right)
        | several(right, [[1.0, 1.0]] * 3)
        | dict(length1=12.3, length2=45.6, cut=0.25, undecided=7, samples=2)
    )
    text = details({"greedy": row}, "rules")
    for part in (
        "turn 1: pass@1 100.0 ± 0.0",
        "turn 2",
        "pass@2",
        "maj@2",
        "12 and 46 tokens",
        "25.0 % of answers cut",
        "verifier rules, 7 undecided",
    ):
        assert part in text, part


# ---- the whole -----------------------------------------------------------------------------------


def test_evaluate_sees_every_question_once(monkeypatch, encoding):
    """Catches the last batch lost or counted twice, and rows numbered anew in each batch (they
    would draw the same random numbers): 5 questions, 2 samples, batches of 2 questions."""
    seen, (layers, _) = [], scripted_rollout(encoding)

    def answer(sampler, encoding, problems, how, samples, turns):
        seen.append((how.first_row, [p.question for p in problems]))
        layer = layers[0]
        rows = len(problems) * samples
        monkeypatch.setattr(layer, "correct", torch.tensor([True, False] * len(problems)))
        monkeypatch.setattr(layer, "undecided", torch.tensor([True] + [False] * (rows - 1)))
        monkeypatch.setattr(layer, "lengths", torch.full((rows,), 6))
        monkeypatch.setattr(layer.completions, "ended", torch.tensor([True, False] * len(problems)))
        monkeypatch.setattr(layer, "texts", ["<answer>1</answer>"] * rows)
        return [layer]

    monkeypatch.setattr(evaluation, "two_turns", answer)
    monkeypatch.setattr(evaluation, "ROWS", 4)
    batches = []
    result = evaluate(
        None,
        encoding,
        [Problem(str(i), "1", None) for i in range(5)],
        9,
        temperature=1.0,
        samples=2,
        turns=1,
        record=lambda *batch: batches.append(batch),
    )
    assert seen == [(0, ["0", "1"]), (4, ["2", "3"]), (8, ["4"])] and len(batches) == 3
    assert (
        result["t1"][0] == 0.5
        and result["cut"] == 0.5
        and result["length1"] == result["tokens"] == 6
        and result["undecided"] == 3
    )
    assert result["pass1"][2][0] == 1 and "t2" not in result and "pass2" not in result


def test_transcripts_hold_the_dialogue(tmp_path, encoding):
    """Catches turn 2 beside the wrong turn 1, a phrase that was not the one appended, and lines
    lost between batches."""
    from mgrpo import draw_phrases

    layers, _ = scripted_rollout(encoding)
    layers[1] = layers[0]  # one second look at each answer
    transcripts, how = Dialogues(tmp_path / "deep", "t", dict(model="m")), Sampling(9, 0.7, 3)
    for _ in range(2):
        transcripts.record([Problem(name, "1", None) for name in "ab"], layers, how)
    lines = [json.loads(line) for line in (tmp_path / "deep/t.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * len(layers[0].texts)
    for i, line in enumerate(lines[: len(layers[0].texts)]):
        assert (
            line["question"] == "ab"[int(layers[0].questions[i])]
            and line["turn1"]["text"] == layers[0].texts[i] == line["turn2"]["text"]
        )
        assert (
            line["turn1"]["right"] == bool(layers[0].correct[i])
            and "phrase" not in line["turn1"]
            and line["temperature"] == 0.7
        )
        assert line["turn2"]["phrase"] == draw_phrases(3, [line["number"]])[0]
    assert (
        line["model"] == "m"
        and Dialogues(tmp_path / "deep", "t", {}).path.name == "t.2.jsonl"
        and len((tmp_path / "deep/t.jsonl").read_text().splitlines()) == len(lines)
    )


@pytest.mark.parametrize(
    "context, prompt, asked, found",
    [(4096, 512, 0, 1024), (1000, 300, 0, None), (4096, 512, 700, 700)],
)
def test_what_fits_the_context(gpt, encoding, context, prompt, asked, found):
    """Catches a second turn that has no room: prompt, two completions and the longest phrase must
    fit, and one token more is refused."""
    from dataclasses import replace

    shape = replace(gpt.config, context=context)
    phrase = 2  # "\n" and a phrase, which is one token here
    room = (context - prompt - phrase) // 2
    assert max_new_tokens(shape, encoding, prompt, asked) == (found or room)
    assert max_new_tokens(shape, encoding, prompt, room) == room
    with pytest.raises(BadInput, match="do not fit"):
        max_new_tokens(shape, encoding, prompt, room + 1)
    with pytest.raises(BadInput, match="do not fit"):
        max_new_tokens(shape, encoding, context, 0)


def test_a_cpu_that_has_no_room_makes_rows_wait(gpt, monkeypatch):
    """Catches a process that Linux ends without a word: where a batch wants more than half of the
    free memory, the cache gets a limit, never below one row; and none where there is room."""
    monkeypatch.setattr(evaluation.memory, "available", lambda device: 1_000_000)
    tokens = 500_000 // (2 * 2 * 3 * 2 * 16 * 4)
    for row, wanted, limit in ((100, 10**6, tokens), (10**5, 10**6, 10**5), (100, tokens, None)):
        assert evaluation.make_sampler(gpt, 0, row, wanted).pool.limit == limit
    with pytest.raises(BadInput, match="a row may need 100"):
        evaluation.make_sampler(gpt, 99, 100)


@pytest.mark.parametrize(
    "flags, says",
    [
        (dict(init="nowhere", data="x.jsonl"), "there is no such folder"),
        (dict(init="."), "--data is missing"),
        (dict(init=".", data="x.jsonl"), "config.json"),
        (dict(checkpoint="x.pt", data="x.jsonl"), "--data: this model"),
        (dict(checkpoint="x.pt", verifier="math-verify"), "--verifier: this model"),
    ],
)
def test_what_cannot_be_opened(flags, says, tmp_path, monkeypatch):
    """Catches a traceback, or a flag that is ignored."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=says):
        open_subject(Config(device="cpu", dtype="float32", **flags))
