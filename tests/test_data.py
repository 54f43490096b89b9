"""Data sets on disk: the forms of the known sets, what is refused, what is left out and counted,
and how problems are drawn."""

import functools
import json
import sys
from types import SimpleNamespace

import pytest
from conftest import SHARED

from reward import is_correct
from runtime.flags import BadInput, guarded
from tasks import files
from tasks.files import DataSet, names, read_problem, read_problems

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
def test_forms(row, form, question, gold):
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


def test_units_of_olympiadbench():
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


def test_files_that_are_no_sets(tmp_path):
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


def test_what_is_left_out_is_counted(tmp_path):
    """Catches a set that is silently smaller: rows without a gold answer, and prompts that are too
    long."""
    rows = [
        GSM8K,
        dict(problem="p", solution="?"),
        dict(problem="one two three four", answer="1"),
        dict(problem="p", answer="2"),
    ]
    said = []
    found = DataSet([], WORDS, 3, [write(tmp_path / "a.jsonl", rows)], said.append)
    assert [problem.gold for problem in found.some("held out", 0, 0)] == ["1,024", "2"]
    assert (
        "1 GSM8K" in said[0]
        and "2 problem and answer" in said[0]
        and "1 without a gold answer" in said[0]
    )
    assert "1 with a prompt of more than 3 tokens; 2 are used" in said[0]
    with pytest.raises(BadInput, match="every prompt has more than 0 tokens"):
        DataSet([], WORDS, 0, [write(tmp_path / "a.jsonl", rows)], said.append)


def questions(count, offset=0):
    return [dict(problem=f"question {i + offset}", answer=str(i)) for i in range(count)]


def test_every_problem_once_an_epoch(tmp_path):
    """Catches drawing with replacement, one order for all epochs or seeds, and an order that
    depends on what was drawn before."""
    found = DataSet(
        [write(tmp_path / "a.jsonl", questions(20))],
        WORDS,
        9,
        [write(tmp_path / "b.jsonl", questions(3, 100))],
        [].append,
    )
    draw = functools.partial(found.draw, "train")
    epochs = [[draw(0, 20 * epoch + i).gold for i in range(20)] for epoch in range(3)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(20)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != [draw(1, i).gold for i in range(20)]
    assert [draw(0, i).gold for i in (7, 3, 45)] == [epochs[0][7], epochs[0][3], epochs[2][5]]


def test_nothing_is_both_learnt_and_asked(tmp_path):
    """Catches a held-out question in training: with files of its own that repeat a training
    question, and without any."""
    path, said = write(tmp_path / "a.jsonl", questions(400)), []
    apart = DataSet(
        [path],
        WORDS,
        9,
        [
            write(
                tmp_path / "b.jsonl",
                [dict(problem=" question  7", answer="7"), dict(problem="new", answer="1")],
            )
        ],
        said.append,
    )
    assert (
        len(apart.splits["train"]) == 399
        and len(apart.splits["held out"]) == 2
        and "1 of the training problems" in said[-1]
    )
    alone = DataSet([path], WORDS, 9, (), said.append)
    train, held = (
        {problem.question for problem in alone.splits[name]} for name in ("train", "held out")
    )
    # an eighth is 50; a binomial's 4 sigma are 27
    assert not train & held and len(train | held) == 400 and 25 <= len(held) <= 80
    assert "350" in str(alone) or str(len(train)) in str(alone)


def test_some_are_in_the_files_order(tmp_path):
    """Catches a part of a set that is always its beginning, and one that changes between calls."""
    found = DataSet([], WORDS, 9, [write(tmp_path / "a.jsonl", questions(50))], [].append)
    part = [int(problem.gold) for problem in found.some("held out", 10, 0)]
    assert (
        part == sorted(part)
        and part != list(range(10))
        and part == [int(p.gold) for p in found.some("held out", 10, 0)]
    )
    assert part != [int(p.gold) for p in found.some("held out", 10, 1)] and len(
        found.some("held out", 0, 0)
    ) == 50 == len(found.some("held out", 99, 0))


def test_data_shows_what_is_there(tmp_path, monkeypatch, capsys):
    """Catches a script that only its author can run."""
    monkeypatch.setattr(sys, "argv", ["data.py", write(tmp_path / "a.jsonl", [GSM8K, MATH])])
    files.main()
    assert "1 GSM8K, 1 problem and solution" in capsys.readouterr().out and names(" a, b,") == [
        "a",
        "b",
    ]
    monkeypatch.setattr(sys, "argv", ["data.py"])
    with pytest.raises(SystemExit):
        guarded(files.main)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_gsm8k():
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
