"""Real models end to end, as far as that goes without a download: files in, files out, each step by
one command."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import PATIENCE, ROOT, script
from test_prompts import TOKENS, make_folder

import eval as evaluation
import heldout
import train
from runtime.flags import BadInput, guarded
from tasks import base as pretrain

FLOAT = ("--dtype", "float32", "--device", "cpu")
SMALL = ("--prompt-tokens", "640", "--max-new-tokens", "24")


def problems(count, first=0):
    return "".join(
        json.dumps(
            dict(
                question=f"Ann has {i} pens and buys {i % 3 + 1} more. How many?",
                answer=f"{i}+{i % 3 + 1} = <<{i}+{i % 3 + 1}={i + i % 3 + 1}>>{i + i % 3 + 1}\n#### {i + i % 3 + 1}",
            )
        )
        + "\n"
        for i in range(first, first + count)
    )


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """pretrain.py --data, train.py --init, eval.py --init in a folder of its own -> folder, what
    each printed."""
    pytest.importorskip(
        "safetensors", reason="needs safetensors: pip install -r requirements-extra.txt"
    )
    folder = tmp_path_factory.mktemp("real")
    make_folder(folder / "tokenizer", TOKENS["chatml"], dict(eos_token_id=256))
    (folder / "train.jsonl").write_text(problems(40))
    (folder / "test.jsonl").write_text(problems(5, 100))
    (folder / "math.jsonl").write_text(
        json.dumps(dict(problem="Half?", solution=r"\boxed{\frac12}"))
        + "\n"
        + json.dumps(dict(problem="?", solution="none"))
        + "\n"
    )
    printed = [
        script(
            folder,
            "pretrain.py",
            "--data",
            "train.jsonl",
            "--tokenizer",
            "tokenizer",
            "--save",
            "out/base",
            "--depth",
            "2",
            "--base-tokens",
            "60000",
            *FLOAT,
        )
    ]
    printed.append(
        script(
            folder,
            "train.py",
            "--init",
            "out/base",
            "--data",
            "train.jsonl",
            "--eval-data",
            "test.jsonl",
            "--name",
            "r",
            "--prompts",
            "2",
            "--attempts",
            "2",
            "--corrections",
            "2",
            "--tokens",
            "600",
            "--eval-questions",
            "4",
            "--lr",
            "1e-4",
            *SMALL,
            *FLOAT,
        )
    )
    printed.append(
        script(
            folder,
            "eval.py",
            "--init",
            "out/r",
            "--data",
            "test.jsonl,math.jsonl",
            "--samples",
            "3",
            "--json",
            "table.json",
            *SMALL,
            *FLOAT,
        )
    )
    return folder, printed


@pytest.mark.extra
def test_the_run_leaves_a_model(walked):
    """Catches a run that trains and loses the result, a config that claims a task, a plan that is
    not printed, a step without a gauge."""
    folder, (_, printed, _) = walked
    assert {path.name for path in (folder / "out/r").iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "samples.md",
        "result.json",
        "model",
    }
    config = json.loads((folder / "out/r/config.json").read_text())
    assert (
        config["template"] == "paper"
        and config["init"] == "out/base"
        and config["recompute"] == "yes"
        and "task" not in config
    )
    assert (
        "memory, GB: weights" in printed
        and "on the host" in printed
        and "at most up to here" in printed
        and "40 problems to train on, 5 held out" in printed
    )
    steps = [json.loads(line) for line in (folder / "out/r/metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["generated"] >= 600 and all(
        step["gauge_max"] < 1e-3 and step["undecided"] == 0 and step["peak_gb"] > 0
        for step in steps
    )
    # trees show questions, not prompts
    assert "You are a helpful" not in (folder / "out/r/samples.md").read_text(encoding="utf-8")


@pytest.mark.extra
def test_the_table_of_each_set(walked):
    """Catches sets mixed into one table, figures that are asked for and missing, and transcripts
    that are not there."""
    folder, (_, _, printed) = walked
    table = json.loads((folder / "table.json").read_text())
    sets = table["sets"]
    assert (
        list(sets) == ["test.jsonl", "math.jsonl"]
        and sets["test.jsonl"]["greedy"]["questions"] == 5
        and sets["math.jsonl"]["greedy"]["questions"] == 1
    )
    assert (
        table["settings"]["template"] == "paper"
        and table["settings"]["max_new_tokens"] == 24
        and table["made_by"]["torch"]
    )
    sampled = sets["test.jsonl"]["temperature 1"]
    assert set(sampled["pass1"]) == {"1", "2", "3"} and {
        "t1",
        "t2",
        "delta",
        "i2c",
        "c2i",
        "maj1",
        "maj2",
        "length1",
        "cut",
        "undecided",
    } <= set(sampled)
    assert (
        sampled["t1"][0] == pytest.approx(sampled["pass1"]["1"][0])
        and "1 without a gold answer" in printed
        and "verifier rules, 0 undecided" in printed
    )
    lines = [
        json.loads(line) for line in (folder / "out/r/eval-test.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 5 + 15 and {line["source"] for line in lines} == {
        f"test.jsonl:{i}" for i in range(1, 6)
    }
    assert all(
        line["turn2"]["phrase"]
        and line["turn1"]["text"] is not None
        and line["gold"]
        and line["model"] == "out/r"
        for line in lines
    )
    assert sorted(line["sample"] for line in lines) == [0] * 10 + [1] * 5 + [2] * 5


@pytest.mark.extra
def test_transformers_loads_what_we_leave(walked):
    """Catches an export that only we can read: transformers' logits of the same prompt equal ours,
    and it ends where we ended."""
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers: pip install -r requirements-extra.txt"
    )
    from huggingface.prompts import open_shape, open_weights

    folder = walked[0] / "out/r/model"
    shape, encoding = open_shape(folder)
    ours = open_weights(folder, shape, encoding, torch.float32, "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = encoding.template("How many?")
    assert tokenizer.decode(ids) == encoding.decode(ids) and theirs.config.eos_token_id == list(
        ours.config.end_tokens
    ) == [256, 258]
    with torch.no_grad():
        torch.testing.assert_close(
            ours(torch.tensor([ids])) @ ours.head.weight.T,
            theirs(torch.tensor([ids])).logits,
            atol=1e-4,
            rtol=0,
        )
    # though it ends with <|im_end|> now, as an instruct model does
    assert encoding.template_name == "paper"


@pytest.mark.extra
def test_what_is_saved_is_what_was_evaluated(walked):
    """Catches an export rounded to bf16 after fp32 training: steps of RL are smaller than a bf16
    weight's last bit."""
    from safetensors.torch import load_file

    saved = load_file(walked[0] / "out/r/model/model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in saved.values())


@pytest.mark.extra
def test_transcripts_are_kept(walked):
    """Catches one set's transcripts written over another's of the same file name, and over those of
    an earlier evaluation."""
    folder = walked[0]
    for name in ("x", "y"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "test.jsonl").write_text(problems(2, 200))
    before = (folder / "out/r/eval-test.jsonl").read_bytes()
    printed = script(
        folder,
        "eval.py",
        "--init",
        "out/r",
        "--data",
        "test.jsonl,x/test.jsonl,y/test.jsonl",
        "--questions",
        "2",
        "--temperature",
        "0",
        *SMALL,
        *FLOAT,
    )
    there = {path.name for path in (folder / "out/r").glob("eval-*")}
    assert {
        "eval-test.jsonl",
        "eval-test.2.jsonl",
        "eval-x-test.jsonl",
        "eval-y-test.jsonl",
    } <= there and before == (folder / "out/r/eval-test.jsonl").read_bytes()
    assert (
        re.search(r"± [?\d.]+ +2\n\(percent ± standard error over questions\)", printed)
        and "held-out" not in printed
    )


@pytest.mark.extra
def test_a_run_from_a_run(walked):
    """Catches a model of ours that we cannot start from again, --layers 1 on a real model, and a
    run without --eval-data that is evaluated on what it has learnt: the command that it prints asks
    the eighth that was held out, with the run's own limits."""
    folder = walked[0]
    printed = script(
        folder,
        "train.py",
        "--init",
        "out/r/model",
        "--data",
        "train.jsonl",
        "--name",
        "again",
        "--layers",
        "1",
        "--prompts",
        "2",
        "--attempts",
        "2",
        "--tokens",
        "200",
        "--eval-questions",
        "2",
        "--recompute",
        "no",
        "--kl-coef",
        "0",
        *SMALL,
        *FLOAT,
    )
    assert "held out" in printed and (folder / "out/again/model/model.safetensors").exists()
    command = printed.split("python ")[-1].splitlines()[0].split()
    held = int(printed.split(" held out")[0].split()[-1])
    assert command == ["eval.py", "--init", "out/again", "--data", "train.jsonl"] and 0 < held < 40
    (folder / "copy.jsonl").write_text((folder / "train.jsonl").read_text() + problems(1, 500))
    for init, data, count in (
        ("out/again", "train.jsonl", held),
        ("out/again/model", "copy.jsonl", held + 1),
    ):
        found = script(
            folder, "eval.py", "--init", init, "--data", data, "--temperature", "0", *FLOAT
        )
        assert (
            f"{40 - held} of these" in found
            and "were trained on by this run, and are left out" in found
        )
        assert re.search(rf" {count}\n\(percent ± standard error over questions\)", found)
    assert (folder / "out/again/eval-copy.jsonl").exists()


@pytest.mark.extra
def test_what_is_wrong_is_said_before_the_weights_are_read(walked, monkeypatch, capsys):
    """Catches minutes of loading before a missing data file, and a model written over by
    pretrain.py."""
    from huggingface import weights

    monkeypatch.chdir(walked[0])
    monkeypatch.setattr(weights, "Shards", lambda folder: pytest.fail("weights were read"))
    cases = [
        (
            train,
            ["train.py", "--init", "out/base", "--data", "nowhere.jsonl"],
            "nowhere.jsonl: there is no such file",
        ),
        (
            evaluation,
            ["eval.py", "--init", "out/base", "--data", "nowhere.jsonl"],
            "nowhere.jsonl: there is no such file",
        ),
        (
            pretrain,
            [
                "pretrain.py",
                "--data",
                "train.jsonl",
                "--tokenizer",
                "tokenizer",
                "--save",
                "out/base",
            ],
            "there is something already",
        ),
        (
            pretrain,
            [
                "pretrain.py",
                "--data",
                "train.jsonl",
                "--tokenizer",
                "tokenizer",
                "--save",
                "new",
                "--task",
                "chain",
            ],
            "--task is about",
        ),
        (pretrain, ["pretrain.py", "--data", "train.jsonl"], "belong together"),
    ]
    for module, words, says in cases:
        monkeypatch.setattr(sys, "argv", [*words, *FLOAT])
        with pytest.raises(SystemExit) as stop:
            guarded(module.main)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and says in said and said.count("\n") == 1, said


@pytest.mark.extra
def test_ctrl_c_shows_what_there_is(walked, monkeypatch, capsys):
    """Catches an interrupted evaluation that throws away the greedy table, and a training run that
    is stopped in its last table and does not say that its model is there."""
    monkeypatch.chdir(walked[0])
    count, real = [], evaluation.evaluate

    def stops(*args, **keywords):
        count.append(1)
        if len(count) % 3 == 0:
            raise KeyboardInterrupt
        return real(*args, **keywords)

    for module in (evaluation, heldout):
        monkeypatch.setattr(module, "evaluate", stops)
    count.append(1)  # eval: greedy, then Ctrl-C
    monkeypatch.setattr(
        sys, "argv", ["eval.py", "--init", "out/r", "--data", "test.jsonl", *SMALL, *FLOAT]
    )
    with pytest.raises(SystemExit) as stop:
        guarded(evaluation.main)
    out = capsys.readouterr().out
    assert (
        stop.value.code == 130
        and "Acc@t1" in out
        and "temperature" not in out
        and "every transcript" in out
    )
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            "--init",
            "out/base",
            "--data",
            "train.jsonl",
            "--name",
            "stopped",
            "--prompts",
            "2",
            "--attempts",
            "2",
            "--corrections",
            "2",
            "--tokens",
            "100",
            "--eval-questions",
            "2",
            *SMALL,
            *FLOAT,
        ],
    )
    with pytest.raises(SystemExit) as stop:  # train: both tables of the base, then Ctrl-C
        guarded(train.main)
    out = capsys.readouterr().out
    assert (
        stop.value.code == 130
        and "eval.py --init out/stopped" in out
        and (walked[0] / "out/stopped/model").is_dir()
    )
    assert json.loads((walked[0] / "out/stopped/result.json").read_text()).keys() == {"base"}


def test_a_run_that_has_saved_nothing(tmp_path):
    """Catches a sentence about a missing tokenizer for a run that was stopped before its first
    save."""
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(BadInput, match="has not saved a model yet"):
        evaluation.open_subject(
            evaluation.Config(init=str(tmp_path), data="d.jsonl", device="cpu", dtype="float32")
        )


def test_solutions_that_are_too_long(tmp_path):
    """Catches a loop that never ends because no text fits."""
    make_folder(tmp_path / "tokenizer", TOKENS["chatml"], dict(eos_token_id=256))
    (tmp_path / "d.jsonl").write_text(
        json.dumps(dict(question="q", answer="x" * 3000 + "#### 1")) + "\n"
    )
    with pytest.raises(BadInput, match="at most 960 tokens"):
        pretrain.open_solutions(
            pretrain.Script(data=str(tmp_path / "d.jsonl"), tokenizer=str(tmp_path / "tokenizer"))
        )


@pytest.mark.parametrize(
    "words, says",
    [
        (["--init", "m"], "--data is missing"),
        (["--init", "m", "--data", "d", "--task", "chain"], "--task is about bases"),
        (["--data", "d"], "--data needs --init"),
        (["--prompt-tokens", "9"], "--prompt-tokens needs --init"),
        (["--verifier", "math-verify"], "--verifier needs --init"),
        (["--init", "m", "--data", "d", "--preset", "smoke"], "--preset is about bases"),
        (["--init", "m", "--data", "d", "--prompt-tokens", "0"], "--prompt-tokens 0"),
        (["--init", "m", "--data", "d"], "nothing is downloaded here"),
    ],
)
def test_what_does_not_go_together(words, says, tmp_path, monkeypatch, capsys):
    """Catches flags of one kind of run ignored by the other: one sentence, exit code 2, nothing
    left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *words, *(FLOAT if "--init" in words else ())])
    with pytest.raises(SystemExit) as stop:
        guarded(train.main)
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and says in said
        and said.count("\n") == 1
        and not list(tmp_path.iterdir())
    )


def test_nothing_is_learnt_without_safetensors(tmp_path):
    """Catches minutes of work that end at a missing package: it is asked for first."""
    make_folder(tmp_path / "tokenizer", TOKENS["chatml"], dict(eos_token_id=256))
    (tmp_path / "d.jsonl").write_text(problems(3))
    hide = "import sys; sys.modules['safetensors'] = None; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]); import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    words = [
        str(ROOT / "pretrain.py"),
        "--data",
        "d.jsonl",
        "--tokenizer",
        "tokenizer",
        "--save",
        "m",
        *FLOAT,
    ]
    done = subprocess.run(
        [sys.executable, "-c", hide, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (
        done.returncode == 2
        and "pip install safetensors" in done.stderr
        and done.stderr.count("\n") == 1
    )


def test_presets_of_a_real_run():
    """Catches a tiny task's sizes given to a real model: without flags it trains as the paper did,
    as far as that is known."""
    c = train.parse_flags(
        train.Config, "", train.presets, ["--init", "m", "--data", "d", "--attempts", "3"]
    )
    assert (c.prompts, c.attempts, c.lr, c.kl_coef, c.prompt_tokens) == (32, 3, 5e-7, 0.001, 512)
    with pytest.raises(BadInput):
        train.presets(dict(eval_data="x"))
