"""report/ and runtime/transcripts.py: the trees that a run keeps, tables made again from verdicts,
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
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import script

from report import curves, page, trees
from report.trees import count_answers, read_trees, tree_text, walk
from reward import extract_answer
from runtime.flags import BadInput, guarded
from runtime.transcripts import Dialogues, pieces, short, write_trees
from sample import Sampler

HOSTILE = (
    "<script>window.hacked = 1</script>",
    '</script><img src=x onerror="window.hacked = 2">',
    "<!--@data--> \u2028 \x1b[31m \x00 \u202egnp.exe",
    '"; window.hacked = 3; //',
    "${window.hacked = 4}",
)
PHRASES = ("Wait, let me check.", "Is that right?", "Once more.")
PATIENCE = 300_000  # milliseconds that a browser may take for anything


# ---- a run that nobody had to train --------------------------------------------------------------


def node(right, words, advantage=0.0, answers=(), **more):
    return (
        dict(
            right=right,
            undecided=False,
            truncated=False,
            trained=True,
            reward=float(right),
            advantage=advantage,
            tokens=words,
            logprobs=[-0.25 * i for i in range(len(words))],
            answers=list(answers),
        )
        | more
    )


def tree_of(step, kind, text="7+8=4", layers=2):
    """A tree of two attempts. The first attempt is corrected twice; the first correction is
    corrected again in each further layer. kind, of the last layer: "fixed", "broken", "truncated"
    or "plain"."""
    before, after = dict(fixed=(False, True), broken=(True, False)).get(kind, (True, True))
    words = ["<think>", text, "</think>", "<|endoftext|>"]
    last = node(after, words, 1.155, truncated=kind == "truncated", phrase=PHRASES[layers - 2])
    for depth in range(layers - 1, 1, -1):
        sibling = node(before, words, 0.0, trained=before, phrase=PHRASES[depth - 1])
        above = node(before, words, 1.155, [last, sibling], phrase=PHRASES[depth - 2])
        last = above
    sibling = node(before, words, 0.0, trained=before, phrase=PHRASES[0])
    entropy = [0.5 * i for i in range(len(words))]  # of this one node
    attempt = node(before, words, 0.5 if before else -1.5, [last, sibling], entropy=entropy)
    return dict(
        step=step,
        generated=1000 * step,
        question=f"question {step} {text}",
        gold="4",
        answers=[attempt, node(True, words)],
    )


def metrics_of(step, layers=2):
    line = dict(
        step=step,
        generated=1000 * step,
        seconds=2.0 * step,
        seconds_sampling=1.0,
        seconds_training=0.5,
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
    look = dict(seconds_heldout=0.3)
    for k in range(1, layers + 1):
        line |= {
            f"reward{k}": 0.5,
            f"accuracy{k}": 0.5 + step / 100,
            f"length{k}": 20.0,
            f"truncated{k}": 0.0,
            f"signal{k}": 0.4,
        }
        look |= {f"heldout{k}": (4 + k) / 10, f"heldout{k}_se": k / 100}
    for k in range(2, layers + 1):
        line |= {f"fix{k}": 0.2, f"broke{k}": 0.1, f"no_right{k}": 0.3, f"no_wrong{k}": 0.8}
        look |= {f"heldout_fix{k}": 0.2, f"heldout_broke{k}": 0.1}
        look |= {f"heldout_fix{k}_se": 0.01, f"heldout_broke{k}_se": 0.01}
    return line | (look if step % 4 == 0 else {})


def row_of(last, turns=2):
    """A row of the table: Acc@t1 of 0.6, Acc@tN of `last`."""
    row = {f"t{k}": (0.6, 0.015) for k in range(1, turns)}
    row |= {f"t{turns}": (last, 0.012), "delta": (last - 0.6, 0.01)}
    for k in range(2, turns + 1):
        row |= {f"fix{k}": (0.2, 0.01), f"broke{k}": (0.1, 0.01)}
    return row | dict(questions=1024)


def write_run(folder, forest, steps=12, results=("base", "MGRPO"), layers=2, **settings):
    folder.mkdir(parents=True)
    made_by = dict(commit="abc1234", torch="2", seconds_base=7.5)
    config = dict(task="solve", tokens=12_000, kl_coef=0.0, made_by=made_by) | settings
    (folder / "config.json").write_text(json.dumps(config))
    lines = [json.dumps(metrics_of(step, layers)) + "\n" for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(tree) + "\n" for tree in forest))
    tables = {
        name: {label: row_of(0.65 + 0.2 * i, layers) for label in ("greedy", "temperature 1")}
        for i, name in enumerate(results)
    }
    (folder / "result.json").write_text(json.dumps(tables))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a tree of each kind, hostile ones among them."""
    kinds = ["fixed", "broken", "truncated", "plain", "plain", "fixed"]
    forest = [tree_of(step, kind) for step, kind in enumerate(kinds, 1)]
    forest += [tree_of(7 + i, "plain", text) for i, text in enumerate(HOSTILE)]
    return write_run(tmp_path_factory.mktemp("report") / "out/hostile", forest)


@pytest.fixture
def matplotlib():
    """For tests that draw."""
    return pytest.importorskip("matplotlib", reason="needs matplotlib (requirements-extra.txt)")


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Pages of other tests have no curves: drawing them takes seconds a page."""
    if "matplotlib" not in request.fixturenames:
        monkeypatch.setattr(curves, "available", lambda: False)


def page_of(folder):
    page.write_page(page.open_run(folder), lambda text: None)
    return (folder / "report.html").read_text(encoding="utf-8")


def embedded(text):
    """The trees that a page holds, as its script reads them."""
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(data[1])


# ---- what is kept --------------------------------------------------------------------------------


@pytest.fixture
def layers(gpt, encoding):
    """A real rollout of the random model with group sizes 3, 2, 2 on three questions, with made-up
    scores; of layer 1 only rows 0, 2, 3, ... go on."""
    torch.manual_seed(0)
    sampler = Sampler(gpt)
    prompts = [encoding.encode_ordinary(f"question {i}\n") for i in range(3)]
    grown = [layer_of(sampler.generate(prompts, 3, 8, 0.9, 5), encoding, None, None)]
    for number, n in ((2, 2), (3, 2)):
        above = grown[-1]
        rows = [row for row in range(len(above.texts)) if number > 2 or row != 1]
        phrases = [f"{PHRASES[row % 3]} {number}.{row}" for row in rows]
        prefixes = [encoding.encode_ordinary("\n" + phrase) for phrase in phrases]
        done = sampler.extend(above.completions, prefixes, n, 8, 0.9, 5, rows)
        repeated = [phrase for phrase in phrases for _ in range(n)]
        grown.append(layer_of(done, encoding, repeated, above))
    return grown


def layer_of(completions, encoding, phrases, above):
    """Completions as a scored layer, with made-up scores."""
    parents, size = completions.parents.cpu(), len(completions)
    return SimpleNamespace(
        completions=completions,
        texts=[encoding.decode(ids) for ids in completions.ids],
        lengths=completions.lengths.cpu(),
        rewards=torch.rand(size),
        advantages=torch.randn(size),
        correct=torch.rand(size) < 0.5,
        given=None,
        undecided=torch.rand(size) < 0.2,
        trained=torch.rand(size) < 0.8,
        parents=parents,
        questions=parents if above is None else above.questions[parents],
        phrases=phrases,
    )


def test_a_kept_tree_is_the_rollout(layers, encoding, tmp_path):
    """Catches an answer under another parent, a layer left out, a phrase of another row, and
    tokens, log-probabilities, rewards or advantages of another row."""
    path = tmp_path / "rollouts.jsonl"
    problems = [SimpleNamespace(question=f"question {i}", gold=i) for i in range(3)]
    entropies = {(3, 2): [0.5] * 99}
    for step in (1, 2):
        about = dict(step=step, generated=1000)
        write_trees(path, layers, problems, encoding, 2, about, entropies)
    kept = list(read_trees(path))
    assert [(tree["step"], tree["question"], tree["gold"]) for tree in kept] == [
        (step, f"question {i}", str(i)) for step in (1, 2) for i in (0, 1)
    ]
    assert kept[0]["answers"] == kept[2]["answers"]
    rows = [[] for _ in layers]  # the row that each node should be, in the order of the walk

    def expect(number, parent):
        if number < 3:
            for row in (layers[number].parents == parent).nonzero()[:, 0].tolist():
                rows[number].append(row)
                expect(number + 1, row)

    expect(0, 0)
    expect(0, 1)
    assert list(map(len, rows)) == [6, 10, 20]
    for depth, values, _ in walk(kept[0]["answers"] + kept[1]["answers"]):
        layer, row = layers[depth - 1], rows[depth - 1].pop(0)
        done, ids = layer.completions, layer.completions.sampled[row]
        assert "".join(values["tokens"]) == encoding.decode(ids)
        assert len(values["tokens"]) == len(ids) == int(layer.lengths[row])
        logprobs = done.logprobs[row, : len(ids)].tolist()
        assert values["logprobs"] == pytest.approx(logprobs, abs=6e-5)
        assert values["advantage"] == pytest.approx(float(layer.advantages[row]), abs=6e-5)
        assert values["reward"] == pytest.approx(float(layer.rewards[row]), abs=6e-5)
        for name in ("right", "trained", "undecided"):
            assert values[name] == bool(getattr(layer, dict(right="correct").get(name, name))[row])
        assert values["truncated"] == (not bool(done.ended[row]))
        assert values.get("phrase") == (layer.phrases and layer.phrases[row])
        known = depth == 3 and row == 2
        assert values.get("entropy") == ([0.5] * len(ids) if known else None)
    assert not any(rows)


def test_pieces_never_break_a_character(encoding):
    """Catches U+FFFD where a character's bytes are several tokens, and a crash on an id that no
    token has."""
    for text in ("7+8=4 größer ≥ 😀<answer>", "\u202e\x00", ""):
        ids = encoding.encode_ordinary(text)
        assert "".join(pieces(encoding, ids)) == text and len(pieces(encoding, ids)) == len(ids)
    half = encoding.encode_ordinary("é")[:1]
    assert pieces(encoding, half) == ["\ufffd"] and pieces(encoding, [10**6]) == ["\ufffd"]


def test_tables_are_made_again_from_verdicts(layers, tmp_path):
    """Catches verdicts that change their turn, sample or question on the way through the file: the
    page's table of an evaluation of three turns is the one of its layers, which summarise() gets."""
    first = layers[0]  # three questions, three samples
    kept, tables = Dialogues(tmp_path, "eval-solve", dict(model="m"), extract_answer), []
    problems = [SimpleNamespace(question=f"question {i}", gold=i, data=None) for i in range(3)]
    for temperature in (0.0, 0.5):
        turns = [
            SimpleNamespace(
                **vars(first)
                | dict(correct=torch.rand(9) < 0.5, phrases=turn and [PHRASES[turn]] * 9)
            )
            for turn in (None, 1, 2)
        ]
        kept.record(problems, turns, SimpleNamespace(temperature=temperature))
        right = torch.stack([turn.correct.view(3, 3).float() for turn in turns], -1)
        tables.append(page.summarise(right) | dict(questions=3))
    again = page.evaluated(kept.paths)
    assert list(again) == ["eval-solve, greedy", "eval-solve, temperature 0.5"]
    for ours, theirs in zip(again.values(), tables):
        assert 0 < theirs["t3"][0] < 1 and ours.keys() == theirs.keys()
        assert all(ours[k] == pytest.approx(theirs[k]) for k in theirs)
    tree = next(read_trees(kept.path))
    assert count_answers(tree) == 9 and tree["set"] == "eval-solve, greedy"
    words = [(depth, node["text"], node.get("phrase")) for depth, node, _ in walk(tree["answers"])]
    text = first.texts
    expected = [(1, text[0], None), (2, text[0], PHRASES[1]), (3, text[0], PHRASES[2])]
    assert words[:4] == [*expected, (1, text[1], None)]


def test_a_file_of_dialogues_is_never_overwritten(layers, tmp_path):
    """Catches a second evaluation that replaces the first or is appended to it; an answer that is
    not the verifier's; and a question's place and fields that are lost."""
    data = SimpleNamespace(place="file:3", about=dict(id="x"))
    problems = [SimpleNamespace(question=f"question {i}", gold=i, data=data) for i in range(3)]
    for _ in range(2):
        kept = Dialogues(tmp_path / "deep", "t", dict(model="m"), lambda text: text[:2])
        for _ in range(2):
            kept.record(problems, layers[:1], SimpleNamespace(temperature=0.7))
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["t.2.jsonl", "t.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "deep/t.jsonl").read_text().splitlines()]
    assert [line["sample"] for line in lines] == [0, 1, 2] * 6
    for i, line in enumerate(lines):
        turn = line["turns"][0]
        assert line["question"] == f"question {i % 9 // 3}" and line["temperature"] == 0.7
        assert turn["text"] == layers[0].texts[i % 9] and turn["answer"] == turn["text"][:2]
        assert (line["model"], line["source"], line["id"]) == ("m", "file:3", "x")
        assert line["number"] == i % 9 and turn["tokens"] == int(layers[0].lengths[i % 9])


# ---- trees as text -------------------------------------------------------------------------------


def test_trees_are_printed_with_every_layer():
    """Catches a layer that is not printed, an answer under another parent, a phrase that is missing
    or repeated for siblings, and a line break that leaves the tree."""
    tree = tree_of(3, "fixed", "a\nb", layers=3)
    tree["answers"][1]["undecided"] = True
    words = "<think>{}</think><|endoftext|>".format("a\n{}│  b")
    wrong, right = "├─ [WRONG R=0.00 A={}] " + words, "├─ [right R=1.00 A={}] " + words
    deep, deeper = "│  ", "│  │  "
    assert tree_text(tree).splitlines() == [
        "## step 3",
        "question 3 a",
        "b",
        "gold: 4",
        *wrong.format("-1.50", "").splitlines(),
        deep + PHRASES[0],
        *(deep + wrong.format("+1.16", deep)).splitlines(),
        deeper + PHRASES[1],
        *(deeper + right.format("+1.16", deeper)).splitlines(),
        *(deeper + wrong.format("+0.00", deeper)).splitlines(),
        *(deep + wrong.format("+0.00", deep)).splitlines(),
        *right.replace("right", "undecided").format("+0.00", "").splitlines(),
    ]


def printed_trees(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["report.trees", *map(str, words)])
    guarded(trees.main)
    return capsys.readouterr().out


def test_the_trees_of_a_run_are_printed(run, tmp_path, monkeypatch, capsys):
    """Catches trees of another step, dialogues that are not printed, and an escape sequence of a
    model that reaches the terminal."""
    text = printed_trees(monkeypatch, capsys, run)
    assert text.count("## step") == 11 and HOSTILE[0] in text
    assert "\x1b" not in text and "\\x1b[31m" in text
    assert printed_trees(monkeypatch, capsys, run, "--step", "2").count("## step 2\n") == 1
    write_dialogues(tmp_path / "eval-x.jsonl", [("why", 0.5, [(True, False), (True, True)])])
    assert printed_trees(monkeypatch, capsys, "--run", tmp_path / "eval-x.jsonl") == (
        "## eval-x, temperature 0.5\nwhy\ngold: 4\n"
        "├─ [right] <answer>1</answer>\n│  Is that right?\n│  ├─ [WRONG] <answer>0</answer>\n"
        "├─ [right] <answer>1</answer>\n│  Is that right?\n│  ├─ [right] <answer>1</answer>\n\n"
    )


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "no run is named"),
        (["nowhere"], "there are no trees to print"),
        (["empty"], "rollouts.jsonl: there are no trees to print"),
        (["eval-x.jsonl"], "is damaged"),
        (["empty", "--setp", "1"], "did you mean --step"),
    ],
)
def test_trees_that_cannot_be_read_are_one_sentence(words, says, tmp_path, monkeypatch, capsys):
    """Catches a traceback, and success as exit code."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("eval-x.jsonl").write_text('{"question": "q", "temperature": 0.0}\n')
    with pytest.raises(SystemExit) as stop:
        printed_trees(monkeypatch, capsys, *words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1


def test_a_picture_of_a_tree_has_every_layer():
    """Catches README's picture without a layer, and a branch that begins at another answer."""
    from tools.pictures import HEIGHT, tree_picture

    text = tree_picture(tree_of(1, "fixed", "a<b", layers=3))
    lines = re.findall(r'<text x="(\d+)".*?>([^<]*)</text>', text)
    depths = [(int(x) - 14) // 34 for x, _ in lines]
    assert depths == [0, 1, 2, 2, 3, 3, 3, 2, 1]  # phrases stand at the depth of their answers
    assert [lines[2][1], lines[4][1]] == list(PHRASES[:2]) and "a&lt;b" in lines[1][1]
    branches = re.findall(r'd="M \d+ (\d+) V (\d+) h 24"', text)
    ends = [((int(y) - 28) // HEIGHT, (int(end) - 20) // HEIGHT) for y, end in branches]
    assert ends == [(0, 1), (1, 3), (3, 5), (3, 6), (1, 7), (0, 8)]


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


def test_a_run_of_three_layers_has_all_of_them_on_its_page(tmp_path):
    """Catches "two" written somewhere: columns of each turn and each pair of neighbours, one
    difference from the first to the last, answers of every layer."""
    folder = write_run(tmp_path / "three", [tree_of(1, "fixed", layers=3)], layers=3)
    text = page_of(folder)
    heads = re.findall(r"<th scope=col>(.*?)</th>", text)
    assert heads[: len(heads) // 2] == [*page.columns(3).values(), "questions"]
    assert heads[:4] == ["Acc@t1", "Acc@t2", "Acc@t3", "Δ(t1,t3)"] and len(set(heads)) == 9
    assert "+25.0 <small>± 1.0</small>" in text and "(6 answers)" in text
    (tree,) = embedded(text)
    assert [depth for depth, _, _ in walk(tree["answers"])] == [1, 2, 3, 3, 2, 1]


def test_a_run_of_one_layer_has_a_page(tmp_path):
    """Catches a page that needs corrections: GRPO evaluated in one turn."""
    folder = write_run(tmp_path / "one", [], layers=1, results=("base",), steps=4)
    (folder / "result.json").write_text(
        json.dumps(dict(base=dict(greedy=dict(t1=(0.5, 0.01), questions=9))))
    )
    text = page_of(folder)
    heads = re.findall(r"<th scope=col>(.*?)</th>", text)
    assert heads == ["Acc@t1", "questions"] and "Acc@t1 50.0 ± 1.0 (greedy)" in text


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
        monkeypatch.setattr(page, "MAX_TREE_BYTES", 3000)
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


def test_without_matplotlib_tables_and_trees_are_there(run):
    """Catches a page that needs the optional package (the fixture `quick` takes it away)."""
    text = page_of(run)
    assert (
        "pip install matplotlib" in text
        and "<svg" not in text
        and "after MGRPO" in text
        and len(embedded(text)) == 11
    )


def test_the_wall_time_adds_up(run):
    """Catches phases that are counted twice: 12 steps in 24 s, of which 12 sample, 6 train, 3 x 0.3
    evaluate."""
    shown = page.phases(page.open_run(run))
    assert shown == {
        "making or loading the model": "7.5 s, before all that",
        "sampling": "12.0 s, 50%",
        "training": "6.0 s, 25%",
        "held-out evaluations": "0.9 s, 4%",
        "the table before, saving and the rest": "5.1 s, 21%",
        "steps": "12",
        "from the table before to the last step": "24.0 s",
    }


@pytest.mark.slow
def test_ten_thousand_transcripts_are_sampled(tmp_path):
    """Catches a page that nobody can open, and one that shows the begin of a run and loses its end:
    of 10,500 answers of 120 tokens, and dialogues besides, it holds evenly chosen ones, below 20
    MB, and says how many. (The file is as dense as write_trees makes it.)"""
    words = [f"{i} " for i in range(120)]
    long = dict(tokens=words, logprobs=[-0.1234] * 120, entropy=[0.5678] * 120)
    forest = [tree_of(step, "plain") for step in range(1, 2101)]
    for tree in forest:
        for _, answer, _ in walk(tree["answers"]):
            answer |= long
        tree["answers"][1]["answers"] = [tree["answers"][0]["answers"][0]]
    folder = write_run(tmp_path / "large", [])
    (folder / "rollouts.jsonl").write_text(
        "".join(json.dumps(tree, separators=(",", ":")) + "\n" for tree in forest)
    )
    write_dialogues(
        folder / "eval-solve.jsonl", [(f"q{i}", 0.0, [(True, True)]) for i in range(400)]
    )
    text = page_of(folder)
    kept = embedded(text)
    assert (
        len(text.encode()) < 20e6
        and f"Here are {len(kept):,} of the 2,500 trees that were kept, evenly chosen ({sum(map(count_answers, kept)):,} answers)."
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
            truncated=False,
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
                    turns=[turn(first), turn(second, phrase=PHRASES[1])],
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
    greedy, sampled = page.evaluated([tmp_path / "eval-x.jsonl"]).values()
    assert (greedy["questions"], greedy["t1"][0], greedy["t2"][0]) == (4, 0.5, 1.0) and (
        sampled["questions"],
        sampled["t1"][0],
        sampled["t2"][0],
    ) == (2, 0.5, 1.0)
    assert [
        (tree["question"], count_answers(tree)) for tree in read_trees(tmp_path / "eval-x.jsonl")
    ][2:6] == [("d", 2), ("d", 2), ("a", 4), ("a", 4)]


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
    found = page.evaluated(sorted(tmp_path.glob("*.jsonl")))
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
    alone = page.open_run(tmp_path / "eval-x-rank1.jsonl")
    assert [path.name for path in alone.evals] == ["eval-x-rank0.jsonl", "eval-x-rank1.jsonl"]
    assert alone.page == tmp_path / "eval-x.html"


def test_numbers_that_are_none(tmp_path):
    """Catches one NaN of a diverged model that makes the data of the whole page unreadable, and a
    page that a foreign NaN breaks."""
    assert short([1.23456, float("nan"), -0.00001, float("inf")]) == [
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


def test_every_row_of_a_page_has_its_number_of_questions(run):
    """Catches a number of questions that stands for another row's, or for none."""
    one = dict(t1=(0.5, 0.1))
    for counts in ((1024, 5), (7, 7)):
        text = page.table(
            "x", [(name, one | dict(questions=count)) for name, count in zip("ab", counts)]
        )
        assert (
            re.findall(r"<td>([\d,]+)</td></tr>", text) == [f"{count:,}" for count in counts]
            and "<th scope=col>questions</th></tr>" in text
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
    assert [tree["question"] for tree in mine] == ["a", "b"] and mine[0]["answers"][0][
        "answers"
    ] == [
        dict(
            right=True,
            undecided=False,
            truncated=False,
            text="<answer>1</answer>",
            phrase=PHRASES[1],
            answers=[],
        )
    ]
    alone = folder / "eval-solve.jsonl"
    page.write_page(page.open_run(alone), lambda text: None)
    assert "come from eval.py alone" in alone.with_suffix(".html").read_text()


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
        monkeypatch.setattr(curves, "charts", lambda *_: 1 / 0)
    page.at_the_end(folder, said.append)
    assert (
        len(said) == 1
        and said[0].startswith("no page was made (")
        and f"python -m report {folder} makes it again" in said[0]
    )


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "no run is named"),
        (["a", "b"], "unknown argument 'b'"),
        (["nowhere"], "is no run"),
        (["{run}", "--outptu", "x"], "did you mean --output"),
        (["{run}", "--output", "no/such/folder.html"], "cannot be written"),
        (["{damaged}"], "is damaged"),
        (["--output", "p.html", "--run", "nowhere"], "is no run"),
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
        ["report", *(word.format(run=run, damaged="eval-x.jsonl") for word in words)],
    )
    with pytest.raises(SystemExit) as stop:
        guarded(page.main)
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
        page.write_page(page.open_run(run), print)
    assert (run / "report.html").read_text() == before and not list(run.glob("*.tmp"))


@pytest.mark.slow
def test_output_names_the_page(run, tmp_path):
    """Catches a flag that is not obeyed."""
    printed = script(tmp_path, "report", str(run), "--output", "here.html")
    assert "here.html" in printed and "after MGRPO" in (tmp_path / "here.html").read_text()


# ---- the curves ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.extra
def test_curves_show_what_there_is(matplotlib, run):
    """Catches a chart that is lost, colours that no dark page can change, ids that several pictures
    share, and a long run drawn point by point."""
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
        and not set(re.findall(r"#0[1-9]0[1-9]0[1-9]", text))
        and "var(--line0)" in text
        and "var(--ink)" in text
    )
    lines = [dict(metrics_of(step), kl=0.01) for step in range(1, 3001)]
    long = {chart.name: svg for chart, svg in curves.charts(lines, {})}
    assert "KL from the reference" in long and max(map(len, long.values())) < 100_000


@pytest.mark.parametrize(
    "layers, accuracy, transitions",
    [
        (1, ["layer 1"], []),
        (2, ["layer 1", "layer 2"], ["i→c", "c→i"]),
        (
            3,
            ["layer 1", "layer 2", "layer 3"],
            ["i→c, layer 2", "i→c, layer 3", "c→i, layer 2", "c→i, layer 3"],
        ),
    ],
)
def test_every_layer_has_its_line(layers, accuracy, transitions):
    """Catches a chart that stops at layer 2, two lines of one colour, and the standard errors or
    the number of a layer 10 taken for another field."""
    metrics = [metrics_of(step, layers) for step in range(1, 5)]
    charts = {chart.name: chart for chart in curves.CHARTS}
    shown = {
        name: curves.series(chart.fields, metrics) for name, chart in charts.items() if chart.fields
    }
    assert [line.label for line in shown["Accuracy in training"]] == accuracy
    assert [line.label for line in shown["What corrections change"]] == transitions
    held_out = curves.series(charts["Accuracy on held-out questions"].held_out, metrics)
    assert [line.label for line in held_out] == [f"Acc@t{k}" for k in range(1, layers + 1)]
    for lines in (*shown.values(), held_out):
        assert len({line.colour for line in lines}) == len(lines)
    fields = [line.field for line in curves.series({"reward{k}": ("x", 0)}, [metrics_of(1, 11)])]
    assert fields == [f"reward{k}" for k in range(1, 12)]


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
    few = curves.evenly_spaced(np.arange(200))
    assert (few[0], few[-1], len(few)) == (0, 199, curves.LOOKS) and curves.evenly_spaced(
        np.arange(9)
    ).tolist() == list(range(9))


def test_held_out_points_begin_and_end_with_the_tables():
    """Catches a curve without the base, or with the final table at the first step."""
    result = {
        name: dict(greedy=dict(t1=(0.5, 0.01), t2=(t2, 0.01), fix2=(0.1, 0), broke2=(0, 0)))
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
    result["base"]["greedy"]["fix2"] = (0.1, 0.03)
    assert curves.column(curves.with_ends([metrics_of(1)], result), "heldout_fix2")[2].tolist() == [
        0.03,
        0,
    ]


@pytest.mark.extra
def test_the_upper_axis_counts_steps(matplotlib):
    """Catches steps in the wrong place where a second run goes on for longer: the first makes a
    step in 1,000 tokens, there and beyond."""
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
def test_odd_runs_are_drawn(matplotlib):
    """Catches a formula in a run's name, a single step that leaves no mark, and a log axis without
    anything above 0."""
    one = dict(metrics_of(1), gauge_max=0.0, gauge_mean=0.0)
    assert len(curves.charts([one], {})) == len(curves.CHARTS) - 2  # no KL, nothing held out
    figure = curves.draw(curves.CHARTS[0], [("a$_$b", [one]), ("c", [one])])
    assert "layer 1, a$_$b" in curves.svg(figure, "salt")
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
def tab(browser, run):
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


def questions(tab):
    return [text.split()[1] for text in tab.locator("#trees > article > .text").all_inner_texts()]


@pytest.mark.slow
@pytest.mark.extra
def test_filters_in_a_browser(tab):
    """Catches filters that show other trees than they say."""
    assert len(questions(tab)) == 11 and "11 of 11 trees" in tab.inner_text("#count")
    for kind, found in (("fixed", ["1", "6"]), ("broken", ["2"]), ("truncated", ["3"])):
        tab.select_option("#kind", kind)
        assert questions(tab) == found
        assert tab.locator("#trees li.found").count() == len(found)
    tab.select_option("#kind", "all")
    tab.fill("#from", "2")
    tab.fill("#to", "4")
    tab.keyboard.press("Tab")
    assert questions(tab) == ["2", "3", "4"]
    tab.select_option("#kind", "fixed")
    assert questions(tab) == [] and tab.inner_text("#count") == "no tree is like this"


@pytest.mark.slow
@pytest.mark.extra
def test_tints_and_numbers_in_a_browser(tab):
    """Catches a tint of the wrong sign or of nothing, and numbers on hover that are not the
    token's."""
    token = tab.locator("#trees article").first.locator(".answer").first.locator("span").nth(1)
    look = lambda: (
        token.get_attribute("class"),
        token.evaluate("e => getComputedStyle(e).backgroundColor"),
    )
    assert look() == ("", "rgba(0, 0, 0, 0)")
    for tint, name in (("advantage", "down"), ("logprobs", "heat"), ("entropy", "heat")):
        tab.click(f"[data-tint={tint}]")
        assert (
            look()[0] == name
            and look()[1] != "rgba(0, 0, 0, 0)"
            and tab.get_attribute(f"[data-tint={tint}]", "aria-pressed") == "true"
        )
    token.hover()
    says = tab.inner_text("#inspector")
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
    tab.click('[data-tint=""]')
    assert look()[1] == "rgba(0, 0, 0, 0)"


@pytest.mark.slow
@pytest.mark.extra
def test_hostile_text_is_text_in_a_browser(tab):
    """Catches markup of a model that becomes part of the page: it is there to read, and made no
    element (the fixture sees that nothing ran)."""
    shown = tab.inner_text("#trees")
    assert (
        HOSTILE[0] in shown and HOSTILE[1] in shown and "\u241b[31m \u2400 \ufffdgnp.exe" in shown
    )
    assert (
        tab.locator("#trees script, #trees img").count() == 0 and tab.locator("script").count() == 2
    )


@pytest.mark.slow
@pytest.mark.extra
def test_the_keyboard_is_enough(tab):
    """Catches what only a mouse can reach: j and k go from tree to tree, t tints, arrows walk
    through the tokens of an answer, Tab reaches every control."""
    focused = lambda: tab.evaluate(
        "[...document.querySelectorAll('#trees > article')].indexOf(document.activeElement)"
    )
    tab.keyboard.press("j")
    assert focused() == 0
    tab.keyboard.press("j")
    tab.keyboard.press("j")
    tab.keyboard.press("k")
    assert focused() == 1
    tab.keyboard.press("t")
    assert tab.get_attribute("[data-tint=advantage]", "aria-pressed") == "true"
    tab.keyboard.press("Tab")
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowLeft")
    assert '"7+8=4"' in tab.inner_text("#inspector") and tab.locator(".cursor").count() == 1
    tab.focus("nav a")
    reached = set()
    for _ in range(20):
        tab.keyboard.press("Tab")
        reached.add(
            tab.evaluate("document.activeElement.id || document.activeElement.dataset.tint || ''")
        )
    assert {"kind", "set", "from", "to", "advantage", "logprobs", "entropy"} <= reached


@pytest.mark.slow
@pytest.mark.extra
def test_the_page_is_readable_small_and_dark(matplotlib, browser, run):
    """Catches a page that scrolls sideways on a telephone, ink on ink in dark mode, and a blank
    picture."""
    image = pytest.importorskip("PIL.Image", reason="needs pillow, which comes with matplotlib")
    page_of(run)
    for width, scheme in ((400, "light"), (400, "dark"), (1200, "dark")):
        tab = new_page(browser, viewport=dict(width=width, height=900), color_scheme=scheme)
        tab.goto(f"file://{run}/report.html")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert (
            min(
                tab.evaluate(
                    "[...document.querySelectorAll('#curves text')].map(e => "
                    "e.getBoundingClientRect().height)"
                )
            )
            >= 8
        )
        picture = image.open(io.BytesIO(tab.screenshot())).convert("L")
        shades = picture.histogram()
        assert (
            len([count for count in shades if count]) > 50
            and max(shades) < 0.99 * picture.width * picture.height
        )
        assert (sum(i * count for i, count in enumerate(shades)) / sum(shades) < 80) == (
            scheme == "dark"
        )
        tab.close()


@pytest.mark.slow
@pytest.mark.extra
def test_a_large_page_is_drawn_in_parts(browser, tmp_path):
    """Catches a page that draws ten thousand answers at once: those that fit a screen or two, more
    at a click, and j goes on into them."""
    folder = write_run(
        tmp_path / "many", [tree_of(step, "plain", "x" * 50) for step in range(1, 2001)]
    )
    page_of(folder)
    tab = new_page(browser)
    tab.goto(f"file://{folder}/report.html")
    first = tab.locator("#trees > article").count()
    assert 10 < first < 500 and f"{first} of 2000 trees" in tab.inner_text("#count")
    tab.click("#more")
    assert tab.locator("#trees > article").count() == 2 * first
    for _ in range(2 * first + 1):
        tab.keyboard.press("j")
    assert tab.locator("#trees > article").count() == 3 * first
    tab.close()


@pytest.mark.slow
@pytest.mark.extra
def test_three_layers_in_a_browser(browser, tmp_path):
    """Catches a script that draws or filters two layers only, a phrase under the wrong answer or
    repeated for siblings, and a tint that these trees have no values for."""
    folder = write_run(tmp_path / "three", [tree_of(1, "fixed", layers=3), tree_of(2, "plain")])
    text = (folder / "rollouts.jsonl").read_text().replace('"entropy"', '"unknown"')
    (folder / "rollouts.jsonl").write_text(text)
    page_of(folder)
    tab = new_page(browser)
    tab.goto(f"file://{folder}/report.html")
    tree = tab.locator("#trees > article").first
    assert tree.locator(".head span:nth-child(2)").all_inner_texts() == [
        *("answer 1", "correction 1.1", "correction 1.1.1", "correction 1.1.2"),
        *("correction 1.2", "answer 2"),
    ]
    assert tree.locator(".phrase").all_inner_texts() == [PHRASES[0], PHRASES[1]]
    assert tree.locator("ul > li > ul > li > .phrase").all_inner_texts() == [PHRASES[1]]
    assert not tab.is_visible("[data-tint=entropy]") and tab.is_visible("[data-tint=logprobs]")
    for _ in range(3):
        tab.keyboard.press("t")
    assert tab.get_attribute("[data-tint='']", "aria-pressed") == "true"
    tab.select_option("#kind", "fixed")
    assert tab.locator("#trees > article").count() == 1
    found = tab.locator("#trees li.found > .head span:nth-child(2)").all_inner_texts()
    assert found == ["correction 1.1.1"]
    tab.close()
