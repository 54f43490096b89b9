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
from runtime.flags import BadInput, flat, guarded, parse_flags
from tools import tiny_qwen

FLOAT = ("--dtype", "float32", "--device", "cpu")
WORDS = ("--data", "train.jsonl", "--tokenizer", "tokenizer")
SMALL = ("--prompt-tokens", "640", "--max-new-tokens", "24")


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def split(command_line):
    return command_line.split()


def problems(count, first=0):
    """Lines of a data set with worked solutions, as GSM8K has them."""
    lines = []
    for i in range(first, first + count):
        more = i % 3 + 1
        question = f"Ann has {i} pens and buys {more} more. How many?"
        solution = f"{i}+{more} = <<{i}+{more}={i + more}>>{i + more}\n#### {i + more}"
        lines.append(json.dumps(dict(question=question, answer=solution)) + "\n")
    return "".join(lines)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """tools.tiny_qwen, train.py --init, eval.py in a folder of its own -> folder, what each
    printed."""
    pytest.importorskip(
        "safetensors", reason="needs safetensors: pip install -r requirements-extra.txt"
    )
    folder = tmp_path_factory.mktemp("real")
    make_folder(folder / "tokenizer", TOKENS["chatml"], dict(eos_token_id=256))
    (folder / "train.jsonl").write_text(problems(40))
    (folder / "test.jsonl").write_text(problems(5, 100))
    rows = dict(problem="Half?", solution=r"\boxed{\frac12}"), dict(problem="?", solution="none")
    (folder / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = ("--save", "out/base", "--depth", "2", "--base-tokens", "60000")
    trained = split("""--init out/base --data train.jsonl --eval-data test.jsonl --name r --prompts 2
        --group-sizes 2,2,2 --tokens 1500 --eval-questions 4 --lr 1e-4 --kl-coef 0.001""")
    asked = ("--data", "test.jsonl,math.jsonl", "--samples", "3", "--json", "table.json")
    return folder, [
        script(folder, "tools.tiny_qwen", *WORDS, *made, *FLOAT),
        script(folder, "train.py", *trained, *SMALL, *FLOAT),
        script(folder, "eval.py", "out/r", "--turns", "3", *asked, *SMALL, *FLOAT),
    ]


@pytest.mark.slow
@pytest.mark.extra
def test_a_run_leaves_a_model(walked):
    """Catches a run that trains and loses the result, a config that claims a task, a plan that is
    not printed, a step without a gauge."""
    folder, (_, printed, _) = walked
    path = folder / "out/r"
    files = {"config.json", "metrics.jsonl", "rollouts.jsonl", "result.json", "model", "state"}
    assert files <= {file.name for file in path.iterdir()}
    config = json.loads((path / "config.json").read_text())
    assert config["template"] == "paper" and config["init"] == "out/base"
    assert config["recompute"] == "yes" and config["group_sizes"] == [2, 2, 2]
    assert not {"task", "depth", "base_tokens"} & set(config)
    assert "memory, GB: weights" in printed and "peak so far" in printed
    assert "40 problems to train on, 5 held out" in printed
    steps = lines_of(path / "metrics.jsonl")
    assert steps[-1]["generated"] >= 1500
    assert all(step["gauge_max"] < 1e-3 and step["undecided"] == 0 for step in steps)
    assert all(step["peak_gb"] > 0 and "accuracy3" in step for step in steps)
    # trees show questions, not prompts
    trees = (path / "rollouts.jsonl").read_text(encoding="utf-8")
    assert "You are a helpful" not in trees and "Ann has" in trees


@pytest.mark.slow
@pytest.mark.extra
def test_each_set_has_its_table(walked):
    """Catches sets mixed into one table, figures that are asked for and missing, and dialogues that
    are not kept."""
    folder, (_, _, printed) = walked
    figures = json.loads((folder / "table.json").read_text())
    sets = figures["sets"]
    assert list(sets) == ["test.jsonl", "math.jsonl"]
    assert [sets[name]["greedy"]["questions"] for name in sets] == [5, 1]
    settings = figures["settings"]
    assert settings["template"] == "paper" and settings["turns"] == 3
    assert settings["max_new_tokens"] == 24 and settings["prompt_tokens"] == 640
    assert figures["made_by"]["torch"]
    sampled = sets["test.jsonl"]["temperature 1"]
    assert set(sampled["pass1"]) == {"1", "2", "3"}
    columns = "t1 t2 t3 delta fix2 broke2 fix3 broke3 maj1 maj3 length3 truncated undecided"
    assert set(columns.split()) <= set(sampled)
    assert sampled["t1"][0] == pytest.approx(sampled["pass1"]["1"][0])
    assert "1 without a gold answer" in printed and "verifier rules, 0 undecided" in printed
    lines = lines_of(folder / "out/r/eval-test.jsonl")
    assert len(lines) == 5 + 15
    assert {line["source"] for line in lines} == {f"test.jsonl:{i}" for i in range(1, 6)}
    for line in lines:
        first, second, third = line["turns"]
        assert second["phrase"] and third["phrase"] and "phrase" not in first
        assert line["gold"] and line["model"] == "out/r" and first["text"] is not None
    assert sorted(line["sample"] for line in lines) == [0] * 10 + [1] * 5 + [2] * 5


@pytest.mark.slow
@pytest.mark.extra
def test_transformers_loads_what_we_leave(walked):
    """Catches an export that only we can read: transformers' logits of the same prompt equal ours,
    and it ends where we ended."""
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers: pip install -r requirements-extra.txt"
    )
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


@pytest.mark.slow
@pytest.mark.extra
def test_the_saved_weights_are_those_that_were_evaluated(walked):
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
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "test.jsonl").write_text(problems(2, 200))
    before = (folder / "out/r/eval-test.jsonl").read_bytes()
    asked = ("--data", "test.jsonl,x/test.jsonl,y/test.jsonl", "--questions", "2")
    printed = script(folder, "eval.py", "out/r", *asked, "--temperature", "0", *SMALL, *FLOAT)
    names = {path.name for path in (folder / "out/r").glob("eval-*")}
    wanted = {f"eval-{name}.jsonl" for name in ("test", "test.2", "x-test", "y-test")}
    assert wanted <= names and before == (folder / "out/r/eval-test.jsonl").read_bytes()
    assert re.search(r"± [?\d.]+ +2\n", printed)
    assert "\n(percent ± standard error over questions)" in printed
    assert "held-out" not in printed


@pytest.mark.slow
@pytest.mark.extra
def test_a_run_begins_from_a_run(walked):
    """Catches a model of ours that we cannot start from again, plain GRPO on a real model, and a
    run without --eval-data that is evaluated on what it has learnt: the command that it prints asks
    the eighth that was held out, with the run's own limits."""
    folder = walked[0]
    words = split("""--init out/r/model --data train.jsonl --name again --group-sizes 2 --prompts 2
        --tokens 200 --eval-questions 2 --recompute no --kl-coef 0""")
    printed = script(folder, "train.py", *words, *SMALL, *FLOAT)
    assert "held out" in printed and (folder / "out/again/model/model.safetensors").exists()
    command = printed.split("; python ")[-1].splitlines()[0].split()
    held = int(printed.split(" held out")[0].split()[-1])
    assert command == ["eval.py", "out/again", "--data", "train.jsonl"] and 0 < held < 40
    (folder / "copy.jsonl").write_text((folder / "train.jsonl").read_text() + problems(1, 500))
    for model, data, count in (
        ("out/again", "train.jsonl", held),
        ("out/again/model", "copy.jsonl", held + 1),
    ):
        printed = script(folder, "eval.py", model, "--data", data, "--temperature", "0", *FLOAT)
        assert f"{40 - held} of these" in printed and "left out" in printed
        assert re.search(rf" {count}\n\(percent ± standard error over questions\)", printed)
    assert (folder / "out/again/eval-copy.jsonl").exists()


@pytest.mark.slow
@pytest.mark.extra
def test_a_real_run_resumes_bit_for_bit(walked):
    """Catches a run of a real model that cannot go on: from its last state but one it makes the
    same weights again, with the base for its KL term read anew."""
    folder = walked[0]
    saved = (folder / "out/r/model/model.safetensors").read_bytes()
    steps = lines_of(folder / "out/r/metrics.jsonl")
    states = sorted((folder / "out/r/state").glob("step-*.pt"))
    assert len(states) > 1
    (folder / "out/r/model/model.safetensors").unlink()
    script(folder, "train.py", "--resume", str(states[-2].relative_to(folder)))
    assert (folder / "out/r/model/model.safetensors").read_bytes() == saved
    again = lines_of(folder / "out/r/metrics.jsonl")
    figures = lambda line: {k: line[k] for k in line if not re.search("second|_per_s|peak", k)}
    assert list(map(figures, again)) == list(map(figures, steps))


@pytest.mark.slow
@pytest.mark.extra
def test_mistakes_are_found_before_the_weights_are_read(walked, monkeypatch, capsys):
    """Catches minutes of loading before a missing data file, and a model written over by
    tiny_qwen."""
    from huggingface import weights

    monkeypatch.chdir(walked[0])
    monkeypatch.setattr(weights, "Shards", lambda folder: pytest.fail("weights were read"))
    nowhere = "nowhere.jsonl: there is no such file"
    cases = [
        (train, ["train.py", "--init", "out/base", "--data", "nowhere.jsonl"], nowhere),
        (evaluation, ["eval.py", "out/base", "--data", "nowhere.jsonl"], nowhere),
        (evaluation, ["eval.py", "out/base"], "--data is missing"),
        (tiny_qwen, ["tiny_qwen", *WORDS, "--save", "out/base"], "there is something already"),
        (tiny_qwen, ["tiny_qwen", *WORDS, "--save", "m", "--task", "chain"], "'--task'"),
        (tiny_qwen, ["tiny_qwen", "--data", "train.jsonl"], "belong together"),
    ]
    for module, words, says in cases:
        printed = refused(module, [*words, *FLOAT], monkeypatch, capsys)
        assert says in printed, printed


def refused(module, words, monkeypatch, capsys):
    """The one sentence on stderr of a script that ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        guarded(module.main)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1, printed
    return printed


@pytest.mark.slow
@pytest.mark.extra
def test_ctrl_c_shows_what_was_measured(walked, monkeypatch, capsys):
    """Catches an interrupted evaluation that throws away the greedy table, and a training run that
    is stopped in its last table and has lost its model."""
    monkeypatch.chdir(walked[0])
    evaluate = evaluation.evaluate

    def interrupt_after(measured):
        """Ctrl-C in every evaluation after so many."""
        calls = []

        def counted(*args, **options):
            calls.append(1)
            if len(calls) > measured:
                raise KeyboardInterrupt
            return evaluate(*args, **options)

        monkeypatch.setattr(evaluation, "evaluate", counted)
        monkeypatch.setattr(train, "evaluate", counted)

    def interrupted(module, words):
        monkeypatch.setattr(sys, "argv", [*words, *SMALL, *FLOAT])
        with pytest.raises(SystemExit) as stop:
            guarded(module.main)
        assert stop.value.code == 130
        return capsys.readouterr().out

    interrupt_after(1)
    printed = interrupted(evaluation, ["eval.py", "out/r", "--data", "test.jsonl"])
    assert "Acc@t1" in printed and "temperature" not in printed and "every dialogue" in printed

    words = split("""train.py --init out/base --data train.jsonl --name stopped --prompts 2
        --group-sizes 2,2 --tokens 100 --eval-questions 2 --eval-every 1000""")
    interrupt_after(2)  # both rows of the base's table
    printed = interrupted(train, words)
    assert "python train.py --resume out/stopped" in printed
    assert (walked[0] / "out/stopped/model").is_dir()
    result = json.loads((walked[0] / "out/stopped/result.json").read_text())
    assert result.keys() == {"base"}


def test_solutions_that_are_too_long(tmp_path):
    """Catches a loop that never ends because no text fits."""
    make_folder(tmp_path / "tokenizer", TOKENS["chatml"], dict(eos_token_id=256))
    (tmp_path / "d.jsonl").write_text(
        json.dumps(dict(question="q", answer="x" * 3000 + "#### 1")) + "\n"
    )
    encoding = tiny_qwen.open_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(BadInput, match="at most 960 tokens"):
        tiny_qwen.read_solutions((str(tmp_path / "d.jsonl"),), encoding)


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
        (["--offload-optimizer"], "--tokens-per-microbatch"),
    ],
)
def test_flags_that_do_not_go_together(words, says, tmp_path, monkeypatch, capsys):
    """Catches flags of one kind of run ignored by the other: one sentence, exit code 2, nothing
    left behind."""
    monkeypatch.chdir(tmp_path)
    words = ["train.py", *words, *(FLOAT if "--init" in words else ())]
    assert says in refused(train, words, monkeypatch, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_safetensors_is_asked_for_before_the_work(tmp_path):
    """Catches minutes of work that end at a missing package: it is asked for first."""
    make_folder(tmp_path / "tokenizer", TOKENS["chatml"], dict(eos_token_id=256))
    (tmp_path / "d.jsonl").write_text(problems(3))
    hide = (
        "import sys, runpy; sys.modules['safetensors'] = None; "
        "runpy.run_module('tools.tiny_qwen', run_name='__main__', alter_sys=True)"
    )
    words = ["--data", "d.jsonl", "--tokenizer", "tokenizer", "--save", "m", *FLOAT]
    done = subprocess.run(
        [sys.executable, "-c", hide, *words],
        cwd=tmp_path,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
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
    words = ["--init", "m", "--data", "d", "--temperature", "0.9"]
    config = parse_flags(train.Config, "", train.presets, words)
    chosen = (config.prompts, config.group_sizes, config.lr, config.kl_coef, config.temperature)
    assert chosen == (32, (8, 4), 5e-7, 0.001, 0.9) and config.real.prompt_tokens == 512
    assert set(train.PAPER) <= set(flat(config))
    with pytest.raises(BadInput):
        train.presets(dict(eval_data="x"))
