"""eval.py and tasks/opening.py: statistics against hand-computed cases, the table to the character,
dialogues, and what can be opened."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from test_mgrpo import FixedTask, ScriptedSampler, answer

import eval as evaluation
from eval import (
    as_metrics,
    details,
    evaluate,
    majority,
    mean_and_error,
    pass_at,
    several_samples,
    summarise,
    table,
    trained_turns,
    what_reviews_say,
)
from mgrpo import SamplingParams, draw_phrases, rollout
from reward import extract_answer
from runtime.flags import BadInput
from runtime.transcripts import Dialogues
from sample import Sampler
from tasks import opening
from tasks.opening import RealConfig, fitting_new_tokens, make_sampler, open_model_and_tasks
from tasks.problems import Problem

# ---- statistics ----------------------------------------------------------------------------------


def test_transitions_by_hand():
    """Catches i→c and c→i swapped, and samples of one question counted as independent. Four
    questions, two samples, two turns."""
    right = torch.tensor(
        [[[1, 1], [1, 0]], [[0, 1], [0, 1]], [[0, 0], [1, 1]], [[1, 0], [0, 0]]]
    ).float()
    found = summarise(right)
    means = {name: pair[0] for name, pair in found.items()}
    assert means == dict(t1=0.5, t2=0.5, delta=0.0, fix2=0.25, broke2=0.25)
    assert found["t1"][1] == pytest.approx(torch.tensor([1, 0, 0.5, 0.5]).std().item() / 2)


def test_transitions_of_three_turns_are_between_neighbours():
    """Catches a third turn compared with the first, and a Δ that is not from the first to the
    last."""
    right = torch.tensor([[[1, 0, 1]], [[0, 0, 1]], [[0, 1, 1]], [[1, 1, 0]]]).float()
    means = {name: pair[0] for name, pair in summarise(right).items()}
    assert means == dict(
        t1=0.5, t2=0.5, t3=0.75, delta=0.25, fix2=0.25, broke2=0.25, fix3=0.5, broke3=0.25
    )
    assert set(summarise(right[..., :1])) == {"t1"}


def test_standard_error_of_a_share():
    """Catches a std for a standard error: 300 ones among 1,000 have an error of sqrt(p(1-p)/n), but
    for n - 1."""
    mean, error = mean_and_error(torch.cat([torch.ones(300), torch.zeros(700)]))
    assert mean == pytest.approx(0.3) and error == pytest.approx(math.sqrt(0.21 / 999), rel=1e-3)


# ---- the table -----------------------------------------------------------------------------------

TWO_TURNS = dict(
    t1=(0.6171875, 0.0304),
    t2=(0.6523438, 0.0298),
    delta=(0.0351563, 0.0531),
    fix2=(0.3789063, 0.0304),
    broke2=(0.34375, 0.0297),
    questions=256,
)


def test_the_table_of_two_turns_to_the_character():
    """Catches a column lost, a sign dropped, and a width changed: this is what earlier versions
    printed for the same figures."""
    other = TWO_TURNS | dict(t2=(0.9960938, 0.0039), delta=(-0.3789063, None), questions=1319)
    assert table({"base": TWO_TURNS, "temperature 0.7": other}) == (
        "                                 Acc@t1         Acc@t2       Δ(t1,t2)          Δ i→c          Δ c→i   questions\n"
        "base                         61.7 ± 3.0     65.2 ± 3.0     +3.5 ± 5.3     37.9 ± 3.0     34.4 ± 3.0         256\n"
        "temperature 0.7              61.7 ± 3.0     99.6 ± 0.4      -37.9 ± ?     37.9 ± 3.0     34.4 ± 3.0       1,319\n"
        "(percent ± standard error over held-out questions)"
    )


def test_the_table_of_three_turns_has_each_pair_of_neighbours():
    """Catches a turn without its accuracy, and transitions that do not say which turn they are
    of."""
    three = TWO_TURNS | dict(t3=(0.75, 0.027), fix3=(0.125, 0.02), broke3=(0.0273, 0.01))
    lines = table({"MGRPO": three}, "questions").splitlines()
    assert " ".join(lines[0].split()) == "Acc@t1 Acc@t2 Acc@t3 Δ(t1,t3) questions"
    assert " ".join(lines[2].split()) == "Δ i→c t2 Δ c→i t2 Δ i→c t3 Δ c→i t3"
    assert "75.0 ± 2.7" in lines[1] and "12.5 ± 2.0" in lines[3] and "2.7 ± 1.0" in lines[3]
    assert lines[1].index("75.0 ± 2.7") + 10 == lines[0].index("Acc@t3") + 6
    assert lines[3].index("12.5 ± 2.0") + 10 == lines[2].index("Δ i→c t3") + 8
    assert lines[4] == "(percent ± standard error over questions)"
    # rows of different turns share what both have
    mixed = table({"GRPO": TWO_TURNS, "MGRPO": three}).splitlines()
    assert "Acc@t3" not in mixed[0] and len({len(line) for line in mixed[:3]}) == 1


@pytest.mark.parametrize("sizes, turns", [([16], 2), ([4, 3], 2), ([4, 1, 1, 1], 4)])
def test_a_run_is_asked_as_often_as_it_trained(tmp_path, sizes, turns):
    """Catches two answers in a row shown of a run that trained four."""
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.json").write_text(json.dumps(dict(group_sizes=sizes)))
    assert trained_turns(tmp_path) == turns
    assert trained_turns(tmp_path / "checkpoint.pt") == 2


def test_results_become_fields_of_the_log():
    """Catches a standard error lost on the way to metrics.jsonl, and one turn's value under
    another's name."""
    fields = as_metrics(TWO_TURNS)
    assert fields == dict(
        heldout1=0.6171875,
        heldout1_se=0.0304,
        heldout2=0.6523438,
        heldout2_se=0.0298,
        heldout_fix2=0.3789063,
        heldout_fix2_se=0.0304,
        heldout_broke2=0.34375,
        heldout_broke2_se=0.0297,
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


def test_several_samples_by_hand():
    """Catches pass@k of the wrong turn, and a maj@n that is an average accuracy: 2 questions, 4
    samples, 2 turns."""
    right = torch.zeros(2, 4, 2)
    right[0, :2, 0], right[1, :, 1] = 1, 1
    found = several_samples(right, [[1.0, 0.0], [0.0, 1.0]])
    assert [found["pass1"][k][0] for k in (1, 2, 4)] == pytest.approx([1 / 4, 5 / 12, 1 / 2])
    assert set(found["pass1"]) == {1, 2, 4}
    assert found["pass2"][1] == found["pass2"][4] == (0.5, pytest.approx(0.5))
    assert found["maj1"][0] == found["maj2"][0] == 0.5 and several_samples(right[:, :1], []) == {}
    assert set(several_samples(torch.zeros(1, 5, 1), [[0.0]])["pass1"]) == {1, 2, 4, 5}


def test_details_name_all_that_is_asked():
    """Catches a figure that is computed and not shown."""
    right = torch.ones(3, 2, 2)
    row = summarise(right) | several_samples(right, [[1.0, 1.0]] * 3)
    row |= dict(length1=12.3, length2=45.6, truncated=0.25, undecided=7, samples=2)
    row |= dict(no_right2=(0.25, 0.01), no_wrong2=(None, None), fresh2=(1.0, 0.0))
    assert details({"greedy": row}, "rules").splitlines() == [
        "greedy, turn 1: pass@1 100.0 ± 0.0, pass@2 100.0 ± 0.0, maj@2 100.0 ± 0.0",
        "greedy, turn 2: pass@1 100.0 ± 0.0, pass@2 100.0 ± 0.0, maj@2 100.0 ± 0.0",
        "greedy, turn 2 changes 25.0 ± 1.0 of right answers, - of wrong ones; 100.0 ± 0.0 of its "
        "other answers are new",
        "greedy: 12 and 46 tokens an answer, 25.0 % of answers truncated; verifier rules, "
        "7 undecided",
    ]


def test_what_reviews_say_by_hand():
    """Catches shares of the wrong answers: three questions with two samples and three turns. Right
    answers before turn 2: two, one of them changed. Wrong ones: four, three changed. Turn 3 changes
    three answers, two of them to new ones."""
    right = torch.tensor([[[1, 0, 0], [0, 0, 1]], [[1, 1, 1], [0, 1, 0]], [[0, 0, 0], [0, 0, 0]]])
    changed = torch.tensor([[[0, 1, 0], [0, 1, 1]], [[0, 0, 0], [0, 1, 1]], [[0, 1, 0], [0, 0, 1]]])
    fresh = torch.tensor([[[0, 1, 0], [0, 1, 1]], [[0, 0, 0], [0, 1, 0]], [[0, 1, 0], [0, 0, 1]]])
    found = what_reviews_say(*(x.float() for x in (right, changed, fresh)))
    shares = {name: pair[0] for name, pair in found.items()}
    assert shares == pytest.approx(
        dict(
            no_right2=1 / 2,
            no_wrong2=3 / 4,
            fresh2=1,
            no_right3=1 / 2,
            no_wrong3=2 / 4,
            fresh3=2 / 3,
        )
    )
    # Errors of ratios by hand: no_wrong2 has 1 of 1, 1 of 1 and 1 of 2 in the questions.
    apart = math.sqrt(2 * (1 - 0.75) ** 2 + (1 - 2 * 0.75) ** 2) / 4
    assert found["no_wrong2"][1] == pytest.approx(apart)
    assert what_reviews_say(*[torch.zeros(2, 1, 2)] * 3)["no_right2"] == (None, None)


# ---- the whole -----------------------------------------------------------------------------------


class FailsOnSeven:
    """A verifier without a verdict for the answer 7."""

    def same(self, answer, gold):
        if answer == "7":
            raise RuntimeError("no verdict")
        return answer == gold


def test_evaluate_asks_every_question_once(monkeypatch, encoding):
    """Catches the last batch lost or counted twice, and rows numbered anew in each batch (they
    would draw the same random numbers): 5 questions, 2 samples, batches of 2 questions."""
    # sample 0 is right; sample 1 is wrong, truncated, or without a verdict
    texts = {0: answer(1), 1: "<think>1", 3: answer(7), 5: answer(0), 7: answer(7), 9: answer(0)}
    write = lambda layer, number: texts[number] if number % 2 else texts[0]
    sampler, asked = ScriptedSampler(encoding, write), []
    task = FixedTask(encoding, [Problem(str(i), "1", None) for i in range(5)], FailsOnSeven())
    monkeypatch.setattr(evaluation, "EVALUATED_ROWS", 4)
    result = evaluate(
        sampler,
        task,
        task.problems,
        turns=1,
        samples=2,
        temperature=1.0,
        record=lambda problems, layers, sampling: asked.append([p.question for p in problems]),
    )
    assert asked == [["0", "1"], ["2", "3"], ["4"]] and sampler.first_rows == [0, 4, 8]
    assert result["t1"][0] == 0.5 and result["undecided"] == 2
    assert result["truncated"] == pytest.approx(0.1)
    lengths = [len(encoding.encode_ordinary(texts[0])) + 1] * 5
    lengths += [len(encoding.encode_ordinary(texts[i])) + (i != 1) for i in (1, 3, 5, 7, 9)]
    assert result["length1"] == result["tokens"] == pytest.approx(sum(lengths) / 10)
    assert result["pass1"][2][0] == 1 and "t2" not in result and "pass2" not in result
    assert [result[name] for name in ("questions", "samples", "temperature")] == [5, 2, 1.0]


def test_evaluate_of_three_turns_by_hand(encoding):
    """Catches turns out of step with each other: two questions, two samples, each with one
    correction of its correction."""
    # turn 1: right wrong | wrong wrong; turn 2: right right | wrong right; turn 3: wrong right | ..
    right = {1: (1, 0, 0, 0), 2: (1, 1, 0, 1), 3: (0, 1, 0, 0)}
    write = lambda layer, number: answer("ab"[number // 2] if right[layer][number] else 0)
    task = FixedTask(encoding, [Problem("?", "a", None), Problem("!", "b", None)])
    sampler = ScriptedSampler(encoding, write)
    result = evaluate(sampler, task, task.problems, turns=3, samples=2, temperature=1.0)
    means = {name: result[name][0] for name in summarise(torch.zeros(2, 2, 3))}
    assert means == dict(
        t1=0.25, t2=0.75, t3=0.25, delta=0.0, fix2=0.5, broke2=0.0, fix3=0.0, broke3=0.5
    )
    assert [result[f"pass{k}"][2][0] for k in (1, 2, 3)] == [0.5, 1.0, 0.5]
    # a tie of two answers of turn 1 is half right
    assert [result[f"maj{k}"][0] for k in (1, 2, 3)] == [0.25, 0.75, 0.25]
    assert result["tokens"] == sum(result[f"length{k}"] for k in (1, 2, 3))


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_evaluation_is_the_rollout_of_training(gpt, encoding, turns):
    """Catches an evaluation that samples in a way of its own: its rows are those of
    mgrpo.rollout, phrases and log-probabilities included."""
    task, layers = FixedTask(encoding, [Problem(f"x = {i}", "1", None) for i in range(3)]), []
    record = lambda problems, recorded, sampling: layers.extend(recorded)
    options = dict(turns=turns, samples=2, temperature=0.7, seed=9)
    result = evaluate(Sampler(gpt), task, task.problems, record=record, **options)
    sampling = SamplingParams(12, 0.7, 9)
    expected = rollout(Sampler(gpt), task, task.problems, (2, 1, 1)[:turns], sampling)
    assert len(layers) == len(expected) == turns and (f"t{turns}" in result)
    for ours, theirs in zip(layers, expected):
        assert ours.completions.sampled == theirs.completions.sampled
        assert torch.equal(ours.completions.logprobs, theirs.completions.logprobs)
        assert ours.phrases == theirs.phrases and len(ours.texts) == 6
    assert f"t{turns + 1}" not in result and ("delta" in result) == (turns > 1)


def test_filters_reach_every_turn(gpt, encoding):
    """Catches --top-k that corrections ignore: of one likeliest token each, sampling is greedy."""
    task, texts = FixedTask(encoding, [Problem("x = 3", "1", None)]), []
    record = lambda problems, layers, sampling: texts.append([layer.texts for layer in layers])
    sampler = Sampler(gpt)
    evaluate(sampler, task, task.problems, turns=3, record=record)
    evaluate(
        sampler, task, task.problems, turns=3, temperature=1.0, filters=dict(top_k=1), record=record
    )
    assert texts[0] == texts[1]


def test_dialogues_hold_every_turn(tmp_path, encoding):
    """Catches a turn beside another sample's, a phrase that was not the one appended, lines lost
    between batches, and an earlier evaluation written over."""
    right = {1: (1, 0, 0, 1), 2: (1, 1, 0, 0), 3: (0, 1, 1, 0)}
    write = lambda layer, number: answer(1 if right[layer][number % 4] else layer + 1)
    task = FixedTask(encoding, [Problem(name, "1", None) for name in "ab"])
    dialogues = Dialogues(tmp_path / "deep", "t", dict(model="m"), extract_answer)
    for _ in range(2):
        evaluate(
            ScriptedSampler(encoding, write),
            task,
            task.problems,
            turns=3,
            samples=2,
            temperature=0.7,
            seed=3,
            record=dialogues.record,
        )
    path = tmp_path / "deep/t.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 8 and lines[:4] == lines[4:]
    for row, line in enumerate(lines[:4]):
        assert line["question"] == "ab"[row // 2] and line["sample"] == row % 2
        assert line["number"] == row and line["temperature"] == 0.7 and line["model"] == "m"
        for k, turn in enumerate(line["turns"], 1):
            assert turn["right"] == bool(right[k][row]) and turn["text"] == write(k, row)
            assert turn["answer"] == str(1 if right[k][row] else k + 1)
            phrase = draw_phrases(3, k, [row])[0] if k > 1 else None
            assert turn.get("phrase") == phrase
        assert len(line["turns"]) == 3
    assert Dialogues(tmp_path / "deep", "t", {}, extract_answer).path.name == "t.2.jsonl"


# ---- opening -------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize(
    "context, prompt, asked, expected",
    [(8192, 512, 0, 1024), (1000, 300, 0, None), (8192, 512, 700, 700)],
)
def test_what_fits_the_context(gpt, context, prompt, asked, expected, turns):
    """Catches a last turn that has no room: prompt, completions and the longest phrases between
    them must fit, and one token more is refused."""
    shape = dataclasses.replace(gpt.config, context=context)
    room = (context - prompt - 2 * (turns - 1)) // turns
    assert fitting_new_tokens(shape, prompt, 2, asked, turns) == (expected or room)
    assert fitting_new_tokens(shape, prompt, 2, room, turns) == room
    for prompt_tokens, new_tokens in ((prompt, room + 1), (context, 0)):
        with pytest.raises(BadInput, match="do not fit"):
            fitting_new_tokens(shape, prompt_tokens, 2, new_tokens, turns)


def test_rows_wait_on_a_cpu_without_room(gpt, monkeypatch):
    """Catches a process that Linux ends without a word: where a batch wants more than half of the
    free memory, the cache gets a limit, never below one row; and none where there is room."""
    monkeypatch.setattr(opening.memory, "available", lambda device: 1_000_000)
    monkeypatch.setattr(opening, "row_tokens", lambda task, turns: task)
    monkeypatch.setattr(opening, "EVALUATED_ROWS", 1)
    monkeypatch.setattr(opening, "in_parallel", lambda sampler: sampler)
    tokens = 500_000 // (2 * 2 * 3 * 2 * 16 * 4)
    for row, wanted, limit in ((100, 10**6, tokens), (10**5, 10**6, 10**5), (100, tokens, None)):
        assert make_sampler(gpt, [row], 2, 0, wanted).pool.limit == limit
    with pytest.raises(BadInput, match="a row may need 100"):
        opening.check_cache(99, 100, 2)


@pytest.mark.parametrize(
    "model, options, says",
    [
        ("nowhere", dict(sets=[((), ("x.jsonl",))]), "there is no such folder"),
        ("folder", dict(), "config.json"),
        ("folder", dict(sets=[((), ("x.jsonl",))]), "config.json"),
        ("x.pt", dict(), "is not a checkpoint of this project"),
        ("x.pt", dict(sets=[((), ("x.jsonl",))]), "--data: x.pt was trained on a built-in task"),
        ("x.pt", dict(real=RealConfig(verifier="math-verify")), "--verifier: x.pt was trained on"),
        ("run", dict(sets=[((), ("x.jsonl",))]), "has not saved a model yet"),
    ],
)
def test_what_cannot_be_opened(model, options, says, tmp_path, monkeypatch):
    """Catches a traceback, and a flag that is ignored."""
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("")
    (tmp_path / "x.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(BadInput, match=says):
        open_model_and_tasks(model, device="cpu", dtype="float32", **options)
