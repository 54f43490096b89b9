"""report.py and what it is made of: the trees that a run keeps, tables made again from verdicts,
hostile text, and the page in a real browser."""

import base64
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import sys

import pytest
import torch
from conftest import script
from test_mgrpo import scripted_rollout
from test_train import rollout  # noqa: F401 - a fixture

from eval import evaluate
from mgrpo import PHRASES
from mgrpo import completion_logprobs, pad_rows
from report import curves
from report import page as report
from runtime import transcripts
from runtime.flags import BadInput, guarded
from runtime.transcripts import Dialogues, answers, pieces, read_trees
from sample import Sampler
from tasks.legacy import draw, make_task
from train import Trees

HOSTILE = (
    "<script>window.hacked = 1</script>",
    '</script><img src=x onerror="window.hacked = 2">',
    "<!--@data--> \u2028 \x1b[31m \x00 \u202egnp.exe",
    '"; window.hacked = 3; //',
    "${window.hacked = 4}",
)

PATIENCE = 600_000  # milliseconds that a browser may take for anything


# ---- a run that nobody had to train --------------------------------------------------------------


def node(right, words, advantage=0.0, **more):
    return (
        dict(
            right=right,
            undecided=False,
            cut=False,
            trained=True,
            reward=float(right),
            advantage=advantage,
            tokens=words,
            logprobs=[-0.25 * i for i in range(len(words))],
            entropy=[0.5 * i for i in range(len(words))],
        )
        | more
    )


def tree_of(step, kind, text="7+8=4"):
    """kind: "fixed", "broken", "cut" or "plain"."""
    first, second = dict(fixed=(False, True), broken=(True, False)).get(kind, (True, True))
    words = ["<think>", text, "</think>", "<|endoftext|>"]
    correction = node(second, words, 1.155, cut=kind == "cut")
    attempt = node(
        first,
        words,
        0.5 if first else -1.5,
        phrase=PHRASES[0],
        corrections=[correction, node(first, words, 0.0, trained=first)],
    )
    return dict(
        step=step,
        generated=1000 * step,
        question=f"question {step} {text}",
        gold="4",
        attempts=[attempt, node(True, words)],
    )


def metrics_of(step):
    line = dict(
        step=step,
        generated=1000 * step,
        seconds=2.0 * step,
        seconds_sampling=1.0,
        seconds_training=0.5,
        seconds_transcripts=0.1,
        tokens_per_s=500.0,
        peak_gb=1.5,
        gauge_max=1e-5,
        gauge_mean=1e-6,
        entropy=0.1,
        kl=0.0,
        grad_norm=0.2,
        clipped=0.0,
        lr=1e-4,
        loss=0.0,
    )
    for i in (1, 2):
        line |= {
            f"reward{i}": 0.5,
            f"accuracy{i}": 0.5 + step / 100,
            f"length{i}": 20.0,
            f"cut{i}": 0.0,
            f"signal{i}": 0.4,
        }
    look = dict(
        heldout1=0.5,
        heldout2=0.6,
        heldout1_se=0.01,
        heldout2_se=0.02,
        heldout_fix=0.2,
        heldout_broke=0.1,
        heldout_fix_se=0.01,
        heldout_broke_se=0.01,
        seconds_heldout=0.3,
    )
    return line | dict(fix=0.2, broke=0.1) | (look if step % 4 == 0 else {})


def write_run(folder, trees, steps=12, results=("base", "MGRPO"), **settings):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps(
            dict(
                task="solve",
                tokens=12_000,
                kl_coef=0.0,
                made_by=dict(commit="abc1234", torch="2", seconds_base=7.5),
            )
            | settings
        )
    )
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(metrics_of(step)) + "\n" for step in range(1, steps + 1))
    )
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(tree) + "\n" for tree in trees))
    row = lambda t2: dict(
        t1=(0.6, 0.015),
        t2=(t2, 0.012),
        delta=(t2 - 0.6, 0.01),
        i2c=(0.2, 0.01),
        c2i=(0.1, 0.01),
        questions=1024,
    )
    found = {
        name: {label: row(0.65 + 0.2 * i) for label in ("greedy", "temperature 1")}
        for i, name in enumerate(results)
    }
    (folder / "result.json").write_text(json.dumps(found))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a tree of each kind, hostile ones among them."""
    kinds = ["fixed", "broken", "cut", "plain", "plain", "fixed"]
    trees = [tree_of(step, kind) for step, kind in enumerate(kinds, 1)] + [
        tree_of(7 + i, "plain", text) for i, text in enumerate(HOSTILE)
    ]
    return write_run(tmp_path_factory.mktemp("report") / "out/hostile", trees)


def page_of(folder):
    report.write_page([report.open_run(folder)], lambda text: None)
    return (folder / "report.html").read_text(encoding="utf-8")


def embedded(text):
    """The trees that a page holds, as its script reads them."""
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    )


# ---- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", ["tree", "rows"])
def test_a_kept_tree_is_the_rollout(rollout, encoding, tmp_path, pack):  # noqa: F811
    """The oracle for rollouts.jsonl: texts, log-probabilities, rewards and advantages of the
    rollout, and entropies of a forward pass row by row; catches rows mixed up by packing, and an
    attempt's corrections under another attempt."""
    import dataclasses

    gpt, layers, c = rollout
    problems = [draw(make_task("solve", 2, 2, 5), "train", 0, i) for i in range(4)]
    c = dataclasses.replace(c, transcripts=3, pack=pack, tokens_per_microbatch=200, temperature=0.9)
    for layer in layers:
        layer.undecided = torch.zeros(len(layer.texts), dtype=torch.bool)
    transcripts.record(
        tmp_path, gpt, Trees(layers, problems, torch.arange(4)), encoding, c, 5, 1000
    )
    trees = list(read_trees(tmp_path / "rollouts.jsonl"))
    assert [(tree["step"], tree["question"], tree["gold"]) for tree in trees] == [
        (5, p.question, p.gold) for p in problems[:3]
    ]
    for question, tree in enumerate(trees):
        rows = (layers[0].questions == question).nonzero()[:, 0].tolist()
        assert len(tree["attempts"]) == 3 and answers(tree) == 3 + 6
        for row, attempt in zip(rows, tree["attempts"]):
            below = (layers[1].parents == row).nonzero()[:, 0].tolist()
            for layer, i, kept in [
                (layers[0], row, attempt),
                *((layers[1], j, kept) for j, kept in zip(below, attempt["corrections"])),
            ]:
                done, ids = layer.completions, layer.completions.sampled[i]
                prompt = done.prompts[i // done.n]
                _, entropy = completion_logprobs(gpt, pad_rows([prompt], [ids], "cpu"), 0.9)
                assert "".join(kept["tokens"]) == encoding.decode(ids) and len(
                    kept["tokens"]
                ) == len(ids) == int(layer.lengths[i])
                assert kept["entropy"] == pytest.approx(entropy[0].tolist(), abs=2e-4) and kept[
                    "logprobs"
                ] == pytest.approx(done.logprobs[i, : len(ids)].tolist(), abs=6e-5)
                assert kept["advantage"] == pytest.approx(
                    float(layer.advantages[i]), abs=6e-5
                ) and kept["reward"] == float(layer.rewards[i])
                assert (kept["right"], kept["trained"], kept["cut"]) == (
                    bool(layer.correct[i]),
                    bool(layer.trained[i]),
                    not bool(done.ended[i]),
                )
            assert encoding.decode(layers[1].completions.prompts[below[0] // 2]).endswith(
                attempt["phrase"]
            )


def test_pieces_never_break_a_character(encoding):
    """Catches U+FFFD where a character's bytes are several tokens, and a crash on an id that no
    token has."""
    for text in ("7+8=4 größer ≥ 😀<answer>", "\u202e\x00", ""):
        ids = encoding.encode_ordinary(text)
        assert "".join(pieces(encoding, ids)) == text and len(pieces(encoding, ids)) == len(ids)
    half = encoding.encode_ordinary("é")[:1]
    assert pieces(encoding, half) == ["\ufffd"] and pieces(encoding, [10**6]) == ["\ufffd"]


def test_tables_are_made_again_from_verdicts(gpt, encoding, tmp_path):
    """The oracle for the page's tables of an evaluation: what evaluate() itself found, with several
    samples, from the file of dialogues alone."""
    torch.manual_seed(0)
    problems, sampler = (
        [draw(make_task("solve", 2, 2, 5), "held out", 0, i) for i in range(6)],
        Sampler(gpt),
    )
    kept = Dialogues(tmp_path, "eval-solve", dict(model="m"))
    lucky = lambda batch, layers, how: (
        [layer.correct.random_(0, 2) for layer in layers] and kept.record(batch, layers, how)
    )
    found, record = {}, []
    for temperature, samples in ((0.0, 1), (0.5, 4)):
        record.clear()
        evaluate(
            sampler,
            encoding,
            problems,
            5,
            temperature=temperature,
            samples=samples,
            record=lambda *batch: (record.append(batch), lucky(*batch)),
        )
        parts = [
            torch.stack([layer.correct.view(6, samples).float() for layer in layers], -1)
            for _, layers, _ in record
        ]
        found[temperature] = report.summarise(torch.cat(parts))
    again = report.evaluated(kept.paths)
    assert list(again) == ["eval-solve, greedy", "eval-solve, temperature 0.5"] and all(
        table["questions"] == 6 for table in again.values()
    )
    for ours, theirs in zip(again.values(), found.values()):
        assert 0 < theirs["t1"][0] < 1 and all(ours[k] == pytest.approx(theirs[k]) for k in theirs)


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_stands_alone_and_nothing_in_it_runs(run):
    """Catches a page that loads something, hostile text that leaves its JSON, and a policy that
    does not name the script that is there."""
    text = page_of(run)
    assert (
        not re.findall(
            r"""(?:src|href|url)\s*[=(]\s*["']?(?!#|x=|"#)[a-z]+:""", text.replace("xmlns", "")
        )
        and "@import" not in text
    )
    script_text = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(script_text) == 1 and text.count("<script") == 2
    digest = base64.b64encode(hashlib.sha256(script_text[0].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    assert "hacked" in text and not any(bad in text for bad in HOSTILE[:3])
    kept = embedded(text)
    assert [tree["question"].split(" ", 2)[2] for tree in kept[6:]] == list(HOSTILE) and kept[0][
        "set"
    ] == "training"


def test_the_table_of_two_runs(run, tmp_path):
    """Catches the difference taken the wrong way round, or its error without one of the two."""
    other = write_run(
        tmp_path / "out/grpo", [tree_of(1, "plain")], results=("base", "GRPO"), layers=1, lr=0.5
    )
    found = json.loads((other / "result.json").read_text())
    found["GRPO"]["greedy"]["t2"] = (0.7, 0.016)
    (other / "result.json").write_text(json.dumps(found))
    ((_, row),) = report.difference([report.open_run(other), report.open_run(run)], "greedy")
    assert (
        row["t2"] == (pytest.approx(0.15), pytest.approx(0.02))
        and report.cell(row, "t2") == "+15.0 <small>± 2.0</small>"
    )
    said = []
    report.write_page([report.open_run(other), report.open_run(run)], said.append)
    text = (run / "report-grpo.html").read_text()
    assert all(
        words in text
        for words in (
            "grpo beside hostile",
            "before, the base (grpo)",
            "after MGRPO (hostile)",
            "hostile minus grpo",
            "+15.0 <small>± 2.0</small>",
        )
    )
    assert (
        re.search(r"<tr class=differs><th scope=row>lr</th><td>0.5</td><td>–</td>", text)
        and "report-grpo.html" in said[0]
    )
    assert {tree["set"] for tree in embedded(text)} == {"grpo, training", "hostile, training"}


def test_a_run_that_was_killed_has_its_page(tmp_path):
    """Catches a page that needs a finished run: half a line in each file, no result yet; then
    nothing but a config."""
    folder = write_run(tmp_path / "killed", [tree_of(1, "fixed")], steps=5, results=("base",))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with open(folder / name, "a") as file:
            file.write('{"step": 6, "que')
    text = page_of(folder)
    assert (
        "has not finished" in text
        and "after 4,000 generated tokens: Acc@t1 50.0 ± 1.0, Acc@t2 60.0 ± 2.0" in text
    )
    assert (
        "5,000 tokens generated of 12,000; it was stopped, or is still running." in text
        and len(embedded(text)) == 1
    )
    for name in ("metrics.jsonl", "rollouts.jsonl", "result.json"):
        (folder / name).unlink()
    text = page_of(folder)
    assert "No table yet" in text and "No step has been made" in text and embedded(text) == []


@pytest.mark.parametrize("many", [False, True])
def test_damaged_lines_are_counted_aloud(tmp_path, monkeypatch, capsys, many):
    """Catches steps or trees that are missing from a page without a word, trees that are counted
    and not there, and one line counted each time that a file is read: a page of all trees, and one
    of so many that some are chosen."""
    folder = write_run(
        tmp_path / "damaged", [tree_of(step, "fixed") for step in range(1, 5)], steps=5
    )
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text(
            "".join([lines[0], lines[1][:30] + "\n", "[]\n", *lines[2:], '{"step": 6, "que'])
        )
    write_dialogues(
        folder / "eval-solve.jsonl", [("a", 0.0, [(True, True)]), ("b", 0.0, [(True, True)])]
    )
    with open(folder / "eval-solve.jsonl", "a") as file:
        file.write('{"quest')
    if many:
        monkeypatch.setattr(page, "ROOM", 3000)
    text = page_of(folder)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"{folder}/{name} passed over"
        for name in (
            "metrics.jsonl: 3 damaged lines are",
            "rollouts.jsonl: 3 damaged lines are",
            "eval-solve.jsonl: 1 damaged line is",
        )
    ]
    assert "5 trees that were kept" in text and (len(embedded(text)) == 5) != many


def test_without_matplotlib_tables_and_trees_are_there(run, monkeypatch):
    """Catches a page that needs the optional package."""
    monkeypatch.setattr(curves, "available", lambda: False)
    text = page_of(run)
    assert (
        "pip install matplotlib" in text
        and "<svg" not in text
        and "after MGRPO" in text
        and len(embedded(text)) == 11
    )


def test_the_wall_time_adds_up(run):
    """Catches phases that are counted twice: 12 steps in 24 s, of which 12 sample, 6 train, 3 x 0.3
    look, 12 x 0.1 keep trees."""
    shown = report.phases(report.open_run(run))
    assert shown == {
        "making or loading the model": "7.5 s, before all that",
        "sampling": "12.0 s, 50%",
        "training": "6.0 s, 25%",
        "looks at held-out questions": "0.9 s, 4%",
        "entropies of the kept trees": "1.2 s, 5%",
        "the table before, saving and the rest": "3.9 s, 16%",
        "steps": "12",
        "from the table before to the last step": "24.0 s",
    }


def test_ten_thousand_transcripts_are_sampled(tmp_path):
    """Catches a page that nobody can open, and one that shows the begin of a run and loses its end:
    of 10,500 answers of 120 tokens, and dialogues besides, it holds evenly chosen ones, below 20
    MB, and says how many. (The file is as dense as write_trees makes it.)"""
    words = [f"{i} " for i in range(120)]
    long = dict(tokens=words, logprobs=[-0.1234] * 120, entropy=[0.5678] * 120)
    trees = [tree_of(step, "plain") for step in range(1, 2101)]
    for tree in trees:
        for one in (tree["attempts"][0], *tree["attempts"][0]["corrections"], tree["attempts"][1]):
            one |= long
        tree["attempts"][1]["corrections"] = [tree["attempts"][0]["corrections"][0]]
    folder = write_run(tmp_path / "large", [])
    (folder / "rollouts.jsonl").write_text(
        "".join(json.dumps(tree, separators=(",", ":")) + "\n" for tree in trees)
    )
    write_dialogues(
        folder / "eval-solve.jsonl", [(f"q{i}", 0.0, [(True, True)]) for i in range(400)]
    )
    text = page_of(folder)
    kept = embedded(text)
    assert (
        len(text.encode()) < 20e6
        and f"Here are {len(kept):,} of the 2,500 trees that were kept, evenly chosen ({sum(map(answers, kept)):,} answers)."
        in text
    )
    steps = [tree["step"] for tree in kept if tree["set"] == "training"]
    assert (
        500 < len(steps) < 2000
        and steps[0] < 5
        and steps[-1] > 2094
        and max(b - a for a, b in itertools.pairwise(steps)) < 6
    )
    assert (
        0.8
        < sum(tree["set"] == "eval-solve, greedy" for tree in kept) / (400 * len(steps) / 2100)
        < 1.2
    )


def write_dialogues(path, questions):
    """questions: [(question, temperature, [(right in turn 1, in turn 2) of each sample])]"""
    turn = lambda right, **more: (
        dict(
            text=f"<answer>{int(right)}</answer>",
            answer="4",
            right=right,
            undecided=False,
            tokens=3,
            cut=False,
        )
        | more
    )
    path.write_text(
        "".join(
            json.dumps(
                dict(
                    model="m",
                    seed=0,
                    question=question,
                    gold="4",
                    temperature=temperature,
                    sample=i,
                    turn1=turn(first),
                    turn2=turn(second, phrase=PHRASES[1]),
                )
            )
            + "\n"
            for question, temperature, samples in questions
            for i, (first, second) in enumerate(samples)
        )
    )


def test_a_question_that_is_there_twice_counts_twice(tmp_path):
    """Catches a table that one repeated question empties: a benchmark's questions need not differ.
    And a last question that was cut off."""
    write_dialogues(
        tmp_path / "eval-x.jsonl",
        [
            ("a", 0.0, [(True, True)]),
            ("b", 0.0, [(True, True)]),
            ("d", 0.0, [(False, True)]),
            ("d", 0.0, [(False, True)]),
            ("a", 0.5, [(True, True)] * 2),
            ("a", 0.5, [(False, True)] * 2),
            ("b", 0.5, [(False, False)]),
        ],
    )
    greedy, sampled = report.evaluated([tmp_path / "eval-x.jsonl"]).values()
    assert (greedy["questions"], greedy["t1"][0], greedy["t2"][0]) == (4, 0.5, 1.0) and (
        sampled["questions"],
        sampled["t1"][0],
        sampled["t2"][0],
    ) == (2, 0.5, 1.0)
    assert [(tree["question"], answers(tree)) for tree in read_trees(tmp_path / "eval-x.jsonl")][
        2:6
    ] == [("d", 2), ("d", 2), ("a", 4), ("a", 4)]


def test_evaluations_are_told_apart(tmp_path):
    """Catches two evaluations by several processes counted as two samples, and a data set whose
    name holds "-rank"."""
    for name, right in (
        ("eval-x-rank0", True),
        ("eval-x-rank1", True),
        ("eval-x-rank0.2", False),
        ("eval-x-rank1.2", False),
        ("eval-my-ranking", True),
    ):
        write_dialogues(tmp_path / f"{name}.jsonl", [(name, 0.0, [(right, right)])] * 2)
    found = report.evaluated(sorted(tmp_path.glob("*.jsonl")))
    assert {
        title: (columns["questions"], columns["t1"][0]) for title, columns in found.items()
    } == {
        "eval-my-ranking, greedy": (2, 1.0),
        "eval-x, greedy": (4, 1.0),
        "eval-x.2, greedy": (4, 0.0),
    }
    assert {tree["set"] for path in tmp_path.glob("*.jsonl") for tree in read_trees(path)} == set(
        found
    )


def test_numbers_that_are_none(tmp_path):
    """Catches one NaN of a diverged model that makes the data of the whole page unreadable, and a
    page that a foreign NaN breaks."""
    assert transcripts.short([1.23456, float("nan"), -0.00001, float("inf")]) == [
        1.2346,
        None,
        0.0,
        None,
    ]
    text = page_of(write_run(tmp_path / "nan", [tree_of(1, "plain") | dict(loss=float("nan"))]))
    json.loads(
        re.search(r'id="data">(.*?)</script>', text, re.S)[1],
        parse_constant=lambda name: pytest.fail(name),
    )
    assert embedded(text)[0]["loss"] is None


def test_two_runs_of_one_name_are_told_apart(tmp_path):
    """Catches settings of one run shown as those of both."""
    runs = [
        write_run(tmp_path / place / "out/r", [tree_of(1, "plain")], lr=lr)
        for place, lr in (("a", 1), ("b", 2))
    ]
    report.write_page(
        [report.open_run(path) for path in runs], lambda text: None, output=str(tmp_path / "p.html")
    )
    text = (tmp_path / "p.html").read_text()
    assert (
        "<th scope=col>r (1)</th><th scope=col>r (2)</th>" in text
        and "<tr class=differs><th scope=row>lr</th><td>1</td><td>2</td></tr>" in text
    )
    assert {tree["set"] for tree in embedded(text)} == {"r (1), training", "r (2), training"}


def test_runs_that_were_asked_other_questions_have_no_difference(run, tmp_path):
    """Catches accuracies of different tasks subtracted, and an unknown error shown as 0."""
    other = report.open_run(write_run(tmp_path / "out/other", [], task="chain"))
    assert report.difference([other, report.open_run(run)], "greedy") == []
    same = report.open_run(write_run(tmp_path / "out/same", []))
    same.result["MGRPO"]["greedy"]["t1"] = (0.6, None)
    ((_, row),) = report.difference([same, report.open_run(run)], "greedy")
    assert row["t1"] == (0.0, None) and report.cell(row, "t1") == "+0.0 <small>± ?</small>"


def test_every_row_of_a_page_has_its_number_of_questions(run):
    """Catches a number of questions that stands for another row's, or for none."""
    one = dict(t1=(0.5, 0.1))
    for counts in ((1024, 5), (7, 7)):
        text = report.table(
            "x", [(name, one | dict(questions=count)) for name, count in zip("ab", counts)]
        )
        assert (
            re.findall(r"<td>([\d,]+)</td></tr>", text) == [f"{count:,}" for count in counts]
            and "<th scope=col>questions</th></tr>" in text
        )


@pytest.mark.parametrize("what", ["damaged evaluation", "full disk", "broken matplotlib"])
def test_a_run_does_not_fail_for_its_page(run, tmp_path, monkeypatch, what):
    """Catches a training run that ends with an error, and a comparison that dies, since the page
    could not be made."""
    folder, said = tmp_path / "copied", []
    shutil.copytree(run, folder)
    if what == "damaged evaluation":
        (folder / "eval-x.jsonl").write_text('{"question": "q"}\n')
    elif what == "full disk":
        monkeypatch.setattr(
            page.Path,
            "write_bytes",
            lambda path, text: (_ for _ in ()).throw(OSError(28, "No space left on device")),
        )
    else:
        monkeypatch.setattr(curves, "available", lambda: True)
        monkeypatch.setattr(curves, "charts", lambda runs: 1 / 0)
    report.at_the_end(folder, said.append)
    assert (
        len(said) == 1
        and said[0].startswith("no page was made (")
        and f"python report.py {folder} tries again" in said[0]
    )


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "0 runs given"),
        (["a", "b", "c"], "3 runs given"),
        (["nowhere"], "is no run"),
        (["{run}", "--outptu", "x"], "did you mean --output"),
        (["{run}", "--output", "no/such/folder.html"], "cannot be written"),
        (["{damaged}"], "is damaged"),
        (["--output", "p.html", "nowhere"], "is no run"),
        (["{run}/rollouts.jsonl"], "is no run"),
    ],
)
def test_bad_input_of_report(run, tmp_path, monkeypatch, capsys, words, says):
    """Catches a traceback, and half a page where the old one was."""
    (tmp_path / "eval-x.jsonl").write_text('{"question": "q", "temperature": 0.0}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        ["report.py", *(word.format(run=run, damaged="eval-x.jsonl") for word in words)],
    )
    with pytest.raises(SystemExit) as stop:
        guarded(report.main)
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and says in said
        and said.count("\n") == 1
        and [path.name for path in tmp_path.iterdir()] == ["eval-x.jsonl"]
    )


def test_a_full_disk_leaves_the_old_page(run, monkeypatch):
    """Catches half a page."""
    before = page_of(run)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BadInput, match="No space left"):
        report.write_page([report.open_run(run)], print)
    assert (run / "report.html").read_text() == before and not list(run.glob("*.tmp"))


def test_output_names_the_page(run, tmp_path):
    """Catches a flag that is not obeyed."""
    printed = script(tmp_path, "report.py", str(run), "--output", "here.html")
    assert "here.html" in printed and "after MGRPO" in (tmp_path / "here.html").read_text()


# ---- the curves ----------------------------------------------------------------------------------


@pytest.mark.extra
def test_curves_show_what_there_is(run):
    """Catches a chart that is lost, colours that no dark page can change, ids that several pictures
    share, and a long run drawn point by point."""
    pytest.importorskip("matplotlib", reason="needs matplotlib (requirements-extra.txt)")
    text = page_of(run)
    names = [
        name
        for name in re.findall(r"<h3>(.*?)</h3>", text)
        if name in {chart.name for chart in curves.CHARTS}
    ]
    assert names == [
        chart.name for chart in curves.CHARTS if chart.name != "KL from the reference"
    ] and text.count("<svg") == len(names)
    assert (
        "There is no KL" in text
        and not set(re.findall(r"#0[1-7]{5}", text))
        and "var(--line0)" in text
        and "var(--ink)" in text
    )
    lines = [dict(metrics_of(step), kl=0.01) for step in range(1, 3001)]
    long = {
        chart.name: svg for chart, svg in curves.charts([("a", lines, {}), ("b", lines[:1], {})])
    }
    assert "KL from the reference" in long and max(map(len, long.values())) < 100_000


def test_running_means_by_hand():
    """Catches means that shrink at the ends, and curves thinned by leaving points out."""
    import numpy as np

    assert curves.running_mean(np.array([1.0, 2.0, 6.0]), 3).tolist() == pytest.approx(
        [1.5, 3.0, 4.0]
    )
    assert (
        curves.thinned(np.arange(800.0)).tolist()[:2] == [0.5, 2.5]
        and len(curves.thinned(np.arange(1201.0))) == curves.POINTS
    )
    assert curves.thinned(np.arange(800.0), np.max).tolist()[:2] == [1, 3]
    few = curves.some(np.arange(200))
    assert (few[0], few[-1], len(few)) == (0, 199, curves.LOOKS) and curves.some(
        np.arange(9)
    ).tolist() == list(range(9))


def test_held_out_points_begin_and_end_with_the_tables():
    """Catches a curve without the base, or with the final table at the first step."""
    result = {
        name: dict(greedy=dict(t1=(0.5, 0.01), t2=(t2, 0.01), i2c=(0.1, 0), c2i=(0, 0)))
        for name, t2 in (("base", 0.6), ("MGRPO", 0.9))
    }
    x, y, error = curves.column(
        curves.with_ends([metrics_of(step) for step in range(1, 7)], result), "heldout2"
    )
    assert (x.tolist(), y.tolist(), error.tolist()) == (
        [0, 4000, 6000],
        [0.6, 0.6, 0.9],
        [0.01, 0.02, 0.01],
    )
    result["base"]["greedy"]["i2c"] = (0.1, 0.03)
    assert curves.column(curves.with_ends([metrics_of(1)], result), "heldout_fix")[2].tolist() == [
        0.03,
        0,
    ]


@pytest.mark.extra
def test_the_upper_axis_counts_steps(tmp_path):
    """Catches steps in the wrong place where a second run goes on for longer: the first makes a
    step in 1,000 tokens, there and beyond."""
    pytest.importorskip("matplotlib", reason="needs matplotlib (requirements-extra.txt)")
    runs = [
        ("a", [metrics_of(step) for step in range(1, 11)]),
        ("b", [metrics_of(step) | dict(generated=50_000 * step) for step in range(1, 21)]),
    ]
    axes = curves.draw(curves.CHARTS[0], runs).axes[0]
    above = axes.child_axes[0]
    assert (
        above._functions[0](5000.0) == pytest.approx(5)
        and above._functions[0](500_000.0) == pytest.approx(500)
        and above._functions[1](20.0) == pytest.approx(20_000)
    )


@pytest.mark.extra
def test_odd_runs_are_drawn(tmp_path):
    """Catches a formula in a run's name, a single step that leaves no mark, and a log axis without
    anything above 0."""
    pytest.importorskip("matplotlib", reason="needs matplotlib (requirements-extra.txt)")
    one = dict(metrics_of(1), gauge_max=0.0, gauge_mean=0.0)
    names = [
        chart.name
        for chart, svg in curves.charts([("a$_$b", [one], {}), ("c", [one], {})])
        if "a$_$b" in svg
    ]
    assert "Accuracy in training" in names
    assert curves.draw(curves.CHARTS[0], [("a", [one])]).axes[0].lines[0].get_marker() == "o"


# ---- in a real browser ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium without a window, driven by Playwright."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright (requirements-extra.txt)"
    )
    path = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if path is None:
        pytest.skip("needs a Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"], timeout=PATIENCE
        )
        yield browser
        browser.close()


def new_page(browser, **more):
    """A page of the browser that waits for minutes, as on a machine whose cores are all taken."""
    opened = browser.new_page(**more)
    opened.set_default_timeout(PATIENCE)
    return opened


@pytest.fixture
def page(browser, run):
    """The hostile run's page, opened from disk; at the end nothing may have run that should not,
    nor been asked for."""
    page_of(run)
    opened, wrong, asked = new_page(browser), [], []
    opened.on("console", lambda message: wrong.append(message.text))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(f"file://{run}/report.html")
    yield opened
    assert (
        wrong == []
        and asked == [f"file://{run}/report.html"]
        and opened.evaluate("window.hacked") is None
    )
    opened.close()


def questions(page):
    return [text.split()[1] for text in page.locator("#trees > article > .text").all_inner_texts()]


@pytest.mark.extra
def test_filters_in_a_browser(page):
    """Catches filters that show other trees than they say."""
    assert len(questions(page)) == 11 and "11 of 11 trees" in report.inner_text("#count")
    for kind, found in (("fixed", ["1", "6"]), ("broken", ["2"]), ("cut", ["3"])):
        report.select_option("#kind", kind)
        assert questions(page) == found
        assert page.locator("#trees li.found").count() == len(found)
    report.select_option("#kind", "all")
    page.fill("#from", "2")
    page.fill("#to", "4")
    page.keyboard.press("Tab")
    assert questions(page) == ["2", "3", "4"]
    report.select_option("#kind", "fixed")
    assert questions(page) == [] and report.inner_text("#count") == "no tree is like this"


@pytest.mark.extra
def test_tints_and_numbers_in_a_browser(page):
    """Catches a tint of the wrong sign or of nothing, and numbers on hover that are not the
    token's."""
    token = page.locator("#trees article").first.locator(".answer").first.locator("span").nth(1)
    look = lambda: (
        token.get_attribute("class"),
        token.evaluate("e => getComputedStyle(e).backgroundColor"),
    )
    assert look() == ("", "rgba(0, 0, 0, 0)")
    for tint, name in (("advantage", "down"), ("logprobs", "heat"), ("entropy", "heat")):
        page.click(f"[data-tint={tint}]")
        assert (
            look()[0] == name
            and look()[1] != "rgba(0, 0, 0, 0)"
            and report.get_attribute(f"[data-tint={tint}]", "aria-pressed") == "true"
        )
    token.hover()
    says = report.inner_text("#inspector")
    assert (
        all(
            part in says
            for part in (
                '"7+8=4"',
                "log-probability -0.25",
                "p = 0.7788",
                "entropy 0.5 nats",
                "advantage -1.5",
                "reward 0",
            )
        )
        and token.get_attribute("title") == says
    )
    page.click('[data-tint=""]')
    assert look()[1] == "rgba(0, 0, 0, 0)"


@pytest.mark.extra
def test_hostile_text_is_text_in_a_browser(page):
    """Catches markup of a model that becomes part of the page: it is there to read, and made no
    element (the fixture sees that nothing ran)."""
    shown = report.inner_text("#trees")
    assert (
        HOSTILE[0] in shown and HOSTILE[1] in shown and "\u241b[31m \u2400 \ufffdgnp.exe" in shown
    )
    assert (
        page.locator("#trees script, #trees img").count() == 0
        and page.locator("script").count() == 2
    )


@pytest.mark.extra
def test_the_keyboard_is_enough(page):
    """Catches what only a mouse can reach: j and k go from tree to tree, t tints, arrows walk
    through the tokens of an answer, Tab reaches every control."""
    focused = lambda: page.evaluate(
        "[...document.querySelectorAll('#trees > article')].indexOf(document.activeElement)"
    )
    page.keyboard.press("j")
    assert focused() == 0
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    assert focused() == 1
    page.keyboard.press("t")
    assert report.get_attribute("[data-tint=advantage]", "aria-pressed") == "true"
    page.keyboard.press("Tab")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert '"7+8=4"' in report.inner_text("#inspector") and page.locator(".cursor").count() == 1
    page.focus("nav a")
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.id || document.activeElement.dataset.tint || ''")
        )
    assert {"kind", "set", "from", "to", "advantage", "logprobs", "entropy"} <= reached


@pytest.mark.extra
def test_the_page_is_readable_small_and_dark(browser, run):
    """Catches a page that scrolls sideways on a telephone, ink on ink in dark mode, and a blank
    picture."""
    image = pytest.importorskip("PIL.Image", reason="needs pillow, which comes with matplotlib")
    page_of(run)
    for width, scheme in ((400, "light"), (400, "dark"), (1200, "dark")):
        page = new_page(browser, viewport=dict(width=width, height=900), color_scheme=scheme)
        page.goto(f"file://{run}/report.html")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert (
            min(
                page.evaluate(
                    "[...document.querySelectorAll('#curves text')].map(e => "
                    "e.getBoundingClientRect().height)"
                )
            )
            >= 8
        )
        picture = image.open(io.BytesIO(page.screenshot())).convert("L")
        shades = picture.histogram()
        assert (
            len([count for count in shades if count]) > 50
            and max(shades) < 0.99 * picture.width * picture.height
        )
        assert (sum(i * count for i, count in enumerate(shades)) / sum(shades) < 80) == (
            scheme == "dark"
        )
        report.close()


@pytest.mark.extra
def test_a_large_page_is_drawn_in_parts(browser, tmp_path):
    """Catches a page that draws ten thousand answers at once: those that fit a screen or two, more
    at a click, and j goes on into them."""
    folder = write_run(
        tmp_path / "many", [tree_of(step, "plain", "x" * 50) for step in range(1, 2001)]
    )
    page_of(folder)
    page = new_page(browser)
    page.goto(f"file://{folder}/report.html")
    first = page.locator("#trees > article").count()
    assert 10 < first < 500 and f"{first} of 2000 trees" in report.inner_text("#count")
    page.click("#more")
    assert page.locator("#trees > article").count() == 2 * first
    for _ in range(2 * first + 1):
        page.keyboard.press("j")
    assert page.locator("#trees > article").count() == 3 * first
    report.close()


def test_scripted_trees_reach_the_page(encoding, tmp_path, gpt):
    """Catches transitions of a hand-written rollout told wrongly: 3 corrections mend, 2 break
    (test_train counts the same)."""
    layers, problems = scripted_rollout(encoding)
    from train import Config

    for layer in layers:
        if layer.undecided is None:
            layer.undecided = torch.zeros(len(layer.texts), dtype=torch.bool)
    count = int(layers[0].questions.max()) + 1
    problems = [draw(make_task("solve", 2, 2, 5), "train", 0, i) for i in range(count)]
    transcripts.record(
        tmp_path,
        gpt,
        Trees(layers, problems, torch.arange(count)),
        encoding,
        Config(transcripts=count),
        1,
        0,
    )
    changes = [
        (attempt["right"], c["right"])
        for tree in read_trees(tmp_path / "rollouts.jsonl")
        for attempt in tree["attempts"]
        for c in attempt["corrections"]
    ]
    assert (
        changes.count((False, True)) == 3
        and changes.count((True, False)) == 2
        and len(changes) == 8
    )


def test_the_evaluations_of_a_run_are_on_its_page(run, tmp_path):
    """Catches dialogues that are read and not shown: as trees of their own set, without numbers
    that nobody kept, and a table."""
    folder = tmp_path / "copied"
    shutil.copytree(run, folder)
    write_dialogues(
        folder / "eval-solve.jsonl", [("a", 0.0, [(False, True)]), ("b", 0.0, [(False, False)])]
    )
    text = page_of(folder)
    assert (
        re.search(
            r"eval-solve, greedy: percent ± standard error over questions<.*?<th "
            r"scope=col>questions</th>.*?<td>2</td></tr></tbody>",
            text,
        )
        and "50.0 <small>± 50.0</small>" in text
    )
    mine = [tree for tree in embedded(text) if tree["set"] == "eval-solve, greedy"]
    assert [tree["question"] for tree in mine] == ["a", "b"] and mine[0]["attempts"][0][
        "corrections"
    ][0] == dict(right=True, undecided=False, cut=False, text="<answer>1</answer>")
    alone = folder / "eval-solve.jsonl"
    report.write_page([report.open_run(alone)], lambda text: None)
    assert "come from eval.py alone" in alone.with_suffix(".html").read_text()
