"""Real models end to end, as far as that goes without a download: files in, files out, each step by
one command."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import PATIENCE, ROOT, script
from test_prompts import TOKENS, make_folder

import eval as evaluation
import train
from huggingface.prompts import open_shape, open_weights
from runtime.flags import BadInput, guarded
from tools import tiny_qwen

FLOAT = "--dtype float32 --device cpu"
SMALL = "--prompt-tokens 640 --max-new-tokens 24"
SOLUTIONS = "--data train.jsonl --tokenizer tokenizer"
FEW = "--prompts 2 --group-sizes 2,2 --eval-questions 4"


def question(i):
    more = i % 3 + 1
    return dict(
        question=f"Ann has {i} pens and buys {more} more. How many?",
        answer=f"{i}+{more} = <<{i}+{more}={i + more}>>{i + more}\n#### {i + more}",
    )


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(folder, command):
    """A command line as a user types it -> what it printed."""
    return script(folder, *command.split())


def refused(module, words, monkeypatch, capsys):
    """A script's main with these words -> its one sentence."""
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit) as stop:
        guarded(module.main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1, said
    return said


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """tools.tiny_qwen, train.py --init, eval.py in a folder of its own -> folder, what each
    printed."""
    reason = "needs safetensors: pip install -r requirements-extra.txt"
    pytest.importorskip("safetensors", reason=reason)
    folder = tmp_path_factory.mktemp("real")
    make_folder(folder / "tokenizer", TOKENS["chatml"], dict(eos_token_id=256))
    write(folder / "train.jsonl", map(question, range(40)))
    write(folder / "test.jsonl", map(question, range(100, 105)))
    write(
        folder / "math.jsonl",
        [
            dict(problem="Half?", solution=r"\boxed{\frac12}"),
            dict(problem="?", solution="none"),
        ],
    )
    return folder, [
        run(
            folder,
            f"tools.tiny_qwen {SOLUTIONS} --save out/base --depth 2 --base-tokens 60000 {FLOAT}",
        ),
        run(
            folder,
            "train.py --init out/base --data train.jsonl --eval-data test.jsonl --name r "
            f"--tokens 600 --lr 1e-4 {FEW} {SMALL} {FLOAT}",
        ),
        run(
            folder,
            "eval.py out/r --data test.jsonl,math.jsonl --samples 3 --json table.json "
            f"{SMALL} {FLOAT}",
        ),
    ]


# ---- the whole way -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.extra
def test_a_run_leaves_its_model(walked):
    """Catches a run that trains and loses the result, a plan that is not printed, a step without a
    gauge."""
    folder, (_, printed, _) = walked
    files = {path.name for path in (folder / "out/r").iterdir()}
    assert files >= {"config.json", "metrics.jsonl", "rollouts.jsonl", "result.json", "model"}
    config = json.loads((folder / "out/r/config.json").read_text())
    assert config["init"] == "out/base" and config["recompute"] == "yes"
    assert "memory, GB: weights" in printed and "40 problems to train on, 5 held out" in printed
    steps = lines_of(folder / "out/r/metrics.jsonl")
    assert steps[-1]["generated"] >= 600
    for step in steps:
        assert step["gauge_max"] < 1e-3 and step["undecided"] == 0 and step["peak_gb"] > 0
    # trees hold questions, not prompts
    trees = (folder / "out/r/rollouts.jsonl").read_text(encoding="utf-8")
    assert "Ann has" in trees and "You are a helpful" not in trees


@pytest.mark.slow
@pytest.mark.extra
def test_every_set_has_a_table_and_dialogues(walked):
    """Catches sets mixed into one table, figures that are asked for and missing, and transcripts
    that are not there."""
    folder, (_, _, printed) = walked
    figures = json.loads((folder / "table.json").read_text())
    sets = figures["sets"]
    assert {name: rows["greedy"]["questions"] for name, rows in sets.items()} == {
        "test.jsonl": 5,
        "math.jsonl": 1,
    }
    assert figures["settings"]["max_new_tokens"] == 24 and figures["made_by"]["torch"]
    sampled = sets["test.jsonl"]["temperature 1"]
    expected = "t1 t2 delta fix2 broke2 maj1 maj2 length1 length2 truncated undecided tokens"
    assert {*expected.split()} <= sampled.keys() and {*sampled["pass1"]} == {"1", "2", "3"}
    assert sampled["t1"][0] == pytest.approx(sampled["pass1"]["1"][0])
    assert "1 without a gold answer" in printed and "verifier rules, 0 undecided" in printed
    lines = lines_of(folder / "out/r/eval-test.jsonl")
    assert {line["source"] for line in lines} == {f"test.jsonl:{i}" for i in range(1, 6)}
    assert sorted(line["sample"] for line in lines) == [0] * 10 + [1] * 5 + [2] * 5
    for line in lines:
        first, second = line["turns"]
        assert "phrase" not in first and second["phrase"] and isinstance(first["text"], str)
        assert line["gold"] and line["model"] == "out/r"


@pytest.mark.slow
@pytest.mark.extra
def test_transformers_loads_the_model_of_a_run(walked):
    """Catches an export that only we can read: transformers' logits of the same prompt equal ours,
    and it ends where we ended."""
    reason = "needs transformers: pip install -r requirements-extra.txt"
    transformers = pytest.importorskip("transformers", reason=reason)
    folder = walked[0] / "out/r/model"
    shape, encoding = open_shape(folder)
    ours = open_weights(folder, shape, encoding, torch.float32, "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = encoding.template("How many?")
    assert tokenizer.decode(ids) == encoding.decode(ids)
    assert theirs.config.eos_token_id == list(ours.config.end_tokens) == [256, 258]
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits = ours(tokens) @ ours.head.weight.T
        torch.testing.assert_close(logits, theirs(tokens).logits, atol=1e-4, rtol=0)
    # though it ends with <|im_end|> now, as an instruct model does
    assert encoding.template_name == "paper"


@pytest.mark.slow
@pytest.mark.extra
def test_fp32_training_saves_fp32_weights(walked):
    """Catches an export rounded to bf16 after fp32 training: steps of RL are smaller than a bf16
    weight's last bit."""
    from safetensors.torch import load_file

    saved = load_file(walked[0] / "out/r/model/model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in saved.values())


@pytest.mark.slow
@pytest.mark.extra
def test_dialogues_are_never_written_over(walked):
    """Catches one set's dialogues written over another's of the same file name, and over those of
    an earlier evaluation."""
    folder = walked[0]
    for name in ("x", "y"):
        write(folder / name / "test.jsonl", map(question, (200, 201)))
    before = (folder / "out/r/eval-test.jsonl").read_bytes()
    data = "test.jsonl,x/test.jsonl,y/test.jsonl"
    printed = run(
        folder, f"eval.py out/r --data {data} --questions 2 --temperature 0 {SMALL} {FLOAT}"
    )
    names = {path.name for path in (folder / "out/r").glob("eval-*")}
    for name in ("test", "test.2", "x-test", "y-test"):
        assert f"eval-{name}.jsonl" in names
    assert before == (folder / "out/r/eval-test.jsonl").read_bytes()
    assert re.search(r"± [?\d.]+ +2\n\(percent ± standard error over questions\)", printed)
    assert "held-out" not in printed


@pytest.mark.slow
@pytest.mark.extra
def test_a_run_starts_from_a_run(walked):
    """Catches a model of ours that we cannot start from again, GRPO on a real model, and a run
    without --eval-data that is evaluated on what it has learnt: the command that it prints asks the
    eighth that was held out, with the run's own limits."""
    folder = walked[0]
    printed = run(
        folder,
        "train.py --init out/r/model --data train.jsonl --name again --prompts 2 --group-sizes 2 "
        f"--tokens 200 --eval-questions 2 --recompute no --kl-coef 0 {SMALL} {FLOAT}",
    )
    assert (folder / "out/again/model/model.safetensors").exists()
    command = printed.split("python ")[-1].splitlines()[0].split()
    held = int(printed.split(" held out")[0].split()[-1])
    assert command == ["eval.py", "out/again", "--data", "train.jsonl"] and 0 < held < 40
    write(folder / "copy.jsonl", map(question, [*range(40), 500]))
    for model, data, count in (
        ("out/again", "train.jsonl", held),
        ("out/again/model", "copy.jsonl", held + 1),
    ):
        printed = run(folder, f"eval.py {model} --data {data} --temperature 0 {FLOAT}")
        assert f"{40 - held} of these" in printed
        assert "were trained on by this run, and are left out" in printed
        assert re.search(rf" {count}\n\(percent ± standard error over questions\)", printed)
    assert (folder / "out/again/eval-copy.jsonl").exists()


# ---- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.extra
def test_bad_input_is_found_before_the_weights_are_read(walked, monkeypatch, capsys):
    """Catches minutes of loading before a missing data file, and a model that is written over."""
    from huggingface import weights

    monkeypatch.chdir(walked[0])
    monkeypatch.setattr(weights, "Shards", lambda folder: pytest.fail("weights were read"))
    for module, words, says in (
        (train, "train.py --init out/base --data nowhere.jsonl", "nowhere.jsonl: there is no such"),
        (evaluation, "eval.py out/base --data nowhere.jsonl", "nowhere.jsonl: there is no such"),
        (tiny_qwen, f"tiny_qwen {SOLUTIONS} --save out/base", "there is something already"),
        (tiny_qwen, f"tiny_qwen {SOLUTIONS} --save new --task chain", "unknown flag '--task'"),
        (tiny_qwen, "tiny_qwen --data train.jsonl", "belong together"),
    ):
        assert says in refused(module, f"{words} {FLOAT}", monkeypatch, capsys), words


@pytest.mark.slow
@pytest.mark.extra
def test_ctrl_c_shows_what_was_measured(walked, monkeypatch, capsys):
    """Catches an interrupted evaluation that throws away the greedy table."""
    monkeypatch.chdir(walked[0])
    measured, evaluate = [], evaluation.evaluate

    def stops(*args, **keywords):
        if measured:
            raise KeyboardInterrupt
        measured.append(evaluate(*args, **keywords))
        return measured[0]

    monkeypatch.setattr(evaluation, "evaluate", stops)
    words = f"eval.py out/r --data test.jsonl {SMALL} {FLOAT}"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit) as stop:
        guarded(evaluation.main)
    out = capsys.readouterr().out
    assert stop.value.code == 130 and "Acc@t1" in out and "temperature" not in out
    assert "every dialogue" in out


def test_a_run_that_has_saved_no_model_is_named(tmp_path, monkeypatch, capsys):
    """Catches a sentence about a missing tokenizer for a run that was stopped before its first
    save."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r").mkdir()
    (tmp_path / "r/metrics.jsonl").write_text("")
    words = f"eval.py r --data d.jsonl {FLOAT}"
    assert "has not saved a model yet" in refused(evaluation, words, monkeypatch, capsys)


def test_solutions_that_are_too_long_are_refused(tmp_path):
    """Catches a loop that never ends because no text fits."""
    make_folder(tmp_path / "tokenizer", TOKENS["chatml"], dict(eos_token_id=256))
    write(tmp_path / "d.jsonl", [dict(question="q", answer="x" * 3000 + "#### 1")])
    encoding = tiny_qwen.open_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(BadInput, match="at most 960 tokens"):
        tiny_qwen.read_solutions((str(tmp_path / "d.jsonl"),), encoding)


@pytest.mark.parametrize(
    "words, says",
    [
        ("--init m", "--data is missing"),
        ("--init m --data d --task chain", "--task is about bases"),
        ("--data d", "--data needs --init"),
        ("--prompt-tokens 9", "--prompt-tokens needs --init"),
        ("--verifier math-verify", "--verifier needs --init"),
        ("--init m --data d --preset smoke", "--preset is about bases"),
        ("--init m --data d --prompt-tokens 0", "--prompt-tokens 0"),
        ("--init m --data d", "nothing is downloaded here"),
    ],
)
def test_flags_of_the_other_kind_of_run_are_refused(words, says, tmp_path, monkeypatch, capsys):
    """Catches flags of one kind of run ignored by the other: one sentence, exit code 2, nothing
    left behind."""
    monkeypatch.chdir(tmp_path)
    assert says in refused(train, f"train.py {words} {FLOAT}", monkeypatch, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_missing_package_is_found_before_the_work(tmp_path):
    """Catches minutes of training that end at a missing safetensors."""
    make_folder(tmp_path / "tokenizer", TOKENS["chatml"], dict(eos_token_id=256))
    write(tmp_path / "train.jsonl", map(question, range(3)))
    hide = (
        "import sys, runpy; sys.modules['safetensors'] = None; "
        "runpy.run_module('tools.tiny_qwen', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", hide, *f"{SOLUTIONS} --save m {FLOAT}".split()],
        cwd=tmp_path,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 2 and "pip install safetensors" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_real_run_has_the_papers_settings():
    """Catches a tiny task's sizes given to a real model: without flags it trains as the paper did,
    as far as that is known."""
    words = ["--init", "m", "--data", "d", "--group-sizes", "3,2"]
    config = train.parse_flags(train.Config, "", train.presets, words)
    assert (config.prompts, config.group_sizes, config.lr, config.kl_coef) == (
        32,
        (3, 2),
        5e-7,
        0.001,
    )
    assert config.real.prompt_tokens == 512
    with pytest.raises(BadInput):
        train.presets(dict(eval_data="x"))
