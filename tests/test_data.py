"""Data sets on disk: the forms of the known sets, bad lines, what is left out and counted, and the
Task interface over them."""

import json
import sys
from types import SimpleNamespace

import pytest
from conftest import SHARED

from reward import is_correct
from runtime.flags import BadInput, guarded
from tasks import files
from tasks.catalog import TaskConfig, make_task
from tasks.files import DataSet, make_verifier, read_problem, read_problems

WORDS = SimpleNamespace(template=str.split)  # an encoding whose prompts are words
GSM8K = dict(question="How many?", answer="48/2 = <<48/2=24>>24\n#### 1,024")
MATH = dict(
    problem="Simplify.",
    solution=r"So $\boxed{1}$, no, $\boxed{\frac{1}{2}}$.",
    level="Level 1",
    type="Algebra",
)
OLYMPIAD = dict(
    id=1,
    subfield="x",
    context=None,
    question="Find all.",
    solution=["..."],
    final_answer=["$69$,$84$"],
    is_multiple_answer=True,
    unit=None,
    answer_type="Numerical",
    error=None,
)


@pytest.mark.parametrize(
    "row, form, question, gold",
    [
        (GSM8K, "GSM8K", "How many?", "1,024"),
        (dict(question="q", answer="#### 3 are red, so\n#### 4"), "GSM8K", "q", "4"),
        (dict(question="q", answer=r"7"), "question and answer", "q", "7"),
        (MATH, "problem and solution", "Simplify.", r"\frac{1}{2}"),
        (MATH | dict(answer="0.5"), "problem and answer", "Simplify.", "0.5"),
        (MATH | dict(answer=""), "problem and answer", "Simplify.", r"\frac{1}{2}"),
        (dict(problem="p", answer=72), "problem and answer", "p", "72"),
        (dict(problem="p", solution="none here"), "problem and solution", "p", ""),
        (dict(problem="p", solution=None), "problem and solution", "p", ""),
        (dict(problem="p", solution=r"\boxed{cut", idx=3), "problem and solution", "p", ""),
        (dict(problem="p", answer=None), "problem and answer", "p", ""),
        (OLYMPIAD, "OlympiadBench", "Find all.", "$69$,$84$"),
        (OLYMPIAD | dict(context="Let x."), "OlympiadBench", "Let x.\n\nFind all.", "$69$,$84$"),
        (OLYMPIAD | dict(final_answer=["1", "2"]), "OlympiadBench", "Find all.", "1, 2"),
        (OLYMPIAD | dict(final_answer=[]), "OlympiadBench", "Find all.", ""),
    ],
)
def test_a_line_is_recognised_by_its_fields(row, form, question, gold):
    """Catches a set read as another, the first box instead of the last, a context dropped."""
    assert read_problem(json.dumps(row))[:3] == (form, question, gold)
    assert read_problem(json.dumps(row))[4] == {
        name: row[name] for name in ("level", "subject", "type", "subfield") if name in row
    }


@pytest.mark.parametrize(
    "line, says",
    [
        ("{", "it is not JSON"),
        ("[", "an object a line"),
        ("[1]", "it is list, not an object"),
        ('{"prompt": "p"}', "its fields are prompt; a problem has"),
        ("{}", "its fields are none"),
        ('{"question": "", "answer": "1"}', "its question is empty"),
        ('{"question": 3, "answer": "1"}', "its question is empty or not text"),
        ('{"problem": "p", "answer": [1]}', "its answer is list"),
        ('{"question": "p", "answer": ["#### 1"]}', "its answer is list"),
        ('{"question": "p", "final_answer": ["1"], "unit": "\\udc00"}', "half of a character"),
        ('{"problem": "p", "answer": true}', "its answer is bool"),
        ('{"question": "p", "final_answer": 3}', "not a list of texts"),
        ('{"question": "\\ud800", "answer": "1"}', "half of a character"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_named(line, says, tmp_path):
    """Catches a line skipped in silence, a traceback, and a count that is off by blank lines: file,
    number and fault are said."""
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(GSM8K) + "\n\n" + line + "\n")
    with pytest.raises(BadInput) as error:
        read_problems(path)
    assert (
        f"{path}:3: this line is not a problem: " in str(error.value)
        and says in str(error.value)
        and "\n" not in str(error.value)
    )


def test_units_of_olympiadbench_are_part_of_its_golds():
    """Catches a unit dropped, so that 5 cm is 5 m; and one that the verifier cannot read, beside
    which no answer would be right."""
    for unit, right, wrong in (
        ("m", ["5", r"5 \text{ m}", "500 cm"], ["5 cm", "6"]),
        (r"$\mathrm{~km}$", ["5", "5 km"], ["5 cm"]),
        ("widgets per zork^{?", ["5"], ["6"]),
    ):
        gold = read_problem(json.dumps(OLYMPIAD | dict(final_answer=["5"], unit=unit)))[2]
        assert all(is_correct(rf"\boxed{{{answer}}}", gold) for answer in right) and not any(
            is_correct(rf"\boxed{{{answer}}}", gold) for answer in wrong
        ), unit


def test_files_that_are_not_data_sets_are_refused(tmp_path):
    """Catches tracebacks for what is missing, not UTF-8, or without a single gold answer."""
    (tmp_path / "latin").write_bytes('{"question": "é"'.encode("latin-1"))
    (tmp_path / "goldless").write_text('{"problem": "p", "solution": "?"}\n')
    (tmp_path / "folder").mkdir()
    for name, says in (
        ("folder", "is a folder; data is files"),
        ("nowhere", "there is no such file"),
        ("latin", "is not UTF-8"),
        ("goldless", "no problem with a gold answer"),
    ):
        with pytest.raises(BadInput, match=says):
            read_problems(tmp_path / name)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(count, offset=0):
    return [dict(problem=f"question {i + offset}", answer=str(i)) for i in range(count)]


def golds(problems):
    return [problem.gold for problem in problems]


def test_what_is_left_out_is_counted(tmp_path):
    """Catches a set that is silently smaller: rows without a gold answer, and prompts that are too
    long."""
    rows = [
        GSM8K,
        dict(problem="p", solution="?"),
        dict(problem="one two three four", answer="1"),
        dict(problem="p", answer="2"),
    ]
    said, path = [], write(tmp_path / "a.jsonl", rows)
    data = DataSet((), WORDS, 3, (path,), say=said.append)
    assert golds(data.held_out()) == ["1,024", "2"]
    for words in (
        "1 GSM8K",
        "2 problem and answer",
        "1 without a gold answer",
        "1 with a prompt of more than 3 tokens; 2 are used",
    ):
        assert words in said[0]
    with pytest.raises(BadInput, match="every prompt has more than 0 tokens"):
        DataSet((), WORDS, 0, (path,), say=said.append)


def test_a_data_set_has_the_interface_of_a_built_in_task(tmp_path):
    """Catches a caller's need to ask which kind of task it has: same names, same kinds of values."""
    (tmp_path / "gsm8k").mkdir()
    path = write(tmp_path / "gsm8k/train.jsonl", questions(40))
    data = DataSet((path,), WORDS, 9, max_new_tokens=77, say=[].append)
    built_in = make_task(TaskConfig())
    for name in ("name", "unit", "prompt_tokens", "max_new_tokens"):
        assert type(getattr(data, name)) is type(getattr(built_in, name)), name
    assert data.verifier is built_in.verifier is None and data.encoding is WORDS
    assert (data.name, data.unit, data.prompt_tokens, data.max_new_tokens) == (
        "gsm8k-train",
        "questions",
        9,
        77,
    )
    for task in (data, built_in):
        (problem,) = task.train_problems(0, 3, 1)
        assert isinstance(task.prompt_ids(problem), list) and str(task).count("\n") == 0
        assert isinstance(task.canonical(problem), str) and problem not in task.held_out(4)
    problem = data.held_out()[0]
    assert data.prompt_ids(problem) == problem.question.split()


def test_every_problem_comes_once_an_epoch(tmp_path):
    """Catches drawing with replacement, one order for all epochs or seeds, and an order that
    depends on earlier draws."""
    path, other = (
        write(tmp_path / "a.jsonl", questions(20)),
        write(tmp_path / "b.jsonl", questions(3, 100)),
    )
    data = DataSet((path,), WORDS, 9, (other,), say=[].append)
    epochs = [golds(data.train_problems(0, epoch, 20)) for epoch in range(3)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(20)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != golds(data.train_problems(1, 0, 20))
    steps = [golds(data.train_problems(0, step, 5)) for step in (7, 3, 10)]
    assert steps == [epochs[1][15:20], epochs[0][15:20], epochs[2][10:15]]
    # the stream by which earlier versions' runs were drawn
    stream = [data.draw("train", "rl/0", i).gold for i in range(20)]
    assert stream == epochs[0]


def test_no_held_out_question_is_trained_on(tmp_path):
    """Catches a held-out question in training: with files of its own that repeat a training
    question, and without any."""
    path, said = write(tmp_path / "a.jsonl", questions(400)), []
    rows = [dict(problem=" question  7", answer="7"), dict(problem="new", answer="1")]
    other = write(tmp_path / "b.jsonl", rows)
    apart = DataSet((path,), WORDS, 9, (other,), say=said.append)
    assert len(apart.splits["train"]) == 399 and len(apart.held_out()) == 2
    assert "1 of the training problems" in said[-1]
    alone = DataSet((path,), WORDS, 9, say=said.append)
    train, held = (
        {problem.question for problem in alone.splits[name]} for name in ("train", "held out")
    )
    # an eighth is 50; a binomial's 4 sigma are 27
    assert not train & held and len(train | held) == 400 and 25 <= len(held) <= 80
    assert f"{len(train)} problems to train on, {len(held)} held out" in str(alone)


def test_questions_that_a_run_was_trained_on_are_not_asked(tmp_path):
    """Catches an evaluation on training data, whatever file it comes from."""
    path, said = write(tmp_path / "a.jsonl", questions(20)), []
    data = DataSet((), WORDS, 9, (path,), known={"question 3", "question 4"}, say=said.append)
    assert len(data.held_out()) == 18 and "2 of these 20 problems were trained on" in said[-1]
    known = {f"question {i}" for i in range(20)}
    with pytest.raises(BadInput, match="no problem is left for the split 'held out'"):
        DataSet((), WORDS, 9, (path,), known=known, say=said.append)


def test_a_part_of_a_set_is_in_the_files_order(tmp_path):
    """Catches a part that is always the beginning, and one that changes between calls."""
    path = write(tmp_path / "a.jsonl", questions(50))
    data = DataSet((), WORDS, 9, (path,), say=[].append)
    part = [int(problem.gold) for problem in data.held_out(10)]
    assert part == sorted(part) != list(range(10)) and golds(data.held_out(10)) == [*map(str, part)]
    assert golds(data.held_out(10, seed=1)) != [*map(str, part)]
    assert len(data.held_out()) == len(data.held_out(99)) == 50


def test_verifiers_by_name(monkeypatch):
    """Catches the rules replaced by another verifier, and a traceback for a missing library."""
    from verifier import math_verify

    assert make_verifier("rules") is None
    for error in (ImportError("pip install math-verify"), BadInput("pip install math-verify")):

        def fails(error=error):
            raise error

        monkeypatch.setattr(math_verify, "MathVerify", fails)
        with pytest.raises(BadInput, match="pip install math-verify"):
            make_verifier("math-verify")


def test_files_shows_what_is_there(tmp_path, monkeypatch, capsys):
    """Catches a command that only its author can run."""
    monkeypatch.setattr(sys, "argv", ["files.py", write(tmp_path / "a.jsonl", [GSM8K, MATH])])
    files.main()
    assert "1 GSM8K, 1 problem and solution" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["files.py"])
    with pytest.raises(SystemExit):
        guarded(files.main)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_gsm8ks_golds_verify_against_their_solutions():
    """Catches a loader that knows only lines made here: all of GSM8K is read, and each gold
    verifies against its own worked solution."""
    for name, count in (("train", 7473), ("test", 1319)):
        problems, counts = read_problems(SHARED / f"data/gsm8k/{name}.jsonl")
        assert counts == {"GSM8K": count} and len(problems) == count
        wrong = [
            p.data.place
            for p in problems
            if not is_correct(f"{p.data.solution}\n#### {p.gold}", p.gold)
        ]
        assert not wrong, wrong[:3]
