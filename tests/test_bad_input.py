"""What goes wrong at the command line and on disk: one sentence that names the thing and the remedy, exit code 2, nothing written."""
import json
import os
import sys

import pytest
import torch
from test_flags import SCRIPTS
from test_prompts import TOKENS, make_folder

import data
import prompts
from flags import guarded
from model import GPT, ModelConfig, save_checkpoint

MAINS = SCRIPTS | dict(data=data, prompts=prompts)
CONFIG = dict(model_type="qwen2", vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, intermediate_size=16,
              max_position_embeddings=4096, rms_norm_eps=1e-6, eos_token_id=256, tie_word_embeddings=True)
LINE = json.dumps(dict(problem="p", answer="1")) + "\n"


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A folder of things that are not what they should be, beside some that are."""
    folder = tmp_path_factory.mktemp("ground")
    model = lambda name, **fields: make_folder(folder / name, TOKENS["chatml"], CONFIG | fields)
    model("good")
    for name, fields in dict(gemma=dict(model_type="gemma3"), sliding=dict(use_sliding_window=True), quantised=dict(quantization_config=dict(bits=4)), yarn=dict(rope_scaling=dict(rope_type="yarn", factor=4)),
                             gelu=dict(hidden_act="gelu"), ends=dict(eos_token_id=[1, 2, 3, 4, 5]), farends=dict(eos_token_id=999), small=dict(vocab_size=100), noends=dict(eos_token_id=None)).items():
        model(name, **fields)
    model("nosize")
    (folder / "nosize/config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "hidden_size"}))
    model("brokenconfig")
    (folder / "brokenconfig/config.json").write_text("{")
    model("listconfig")
    (folder / "listconfig/config.json").write_text("[]")
    model("brokentokenizer")
    (folder / "brokentokenizer/tokenizer.json").write_text("{}")
    model("notokenizer")
    (folder / "notokenizer/tokenizer.json").unlink()
    model("run")
    (folder / "run/metrics.jsonl").write_text("")
    files = {"good.jsonl": LINE, "empty.jsonl": "", "goldless.jsonl": json.dumps(dict(problem="p", solution="s")), "array.jsonl": f"[\n{LINE}]", "fields.jsonl": LINE + '{"text": "x"}',
             "broken.jsonl": LINE + "{", "number.jsonl": "3", "blank.jsonl": json.dumps(dict(problem=" ", answer="1")), "list.jsonl": json.dumps(dict(problem="p", answer=["1"])),
             "long.jsonl": json.dumps(dict(problem="p" * 900, answer="1")), "text.pt": "not a checkpoint", "file": ""}
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "escapes.jsonl").write_text(json.dumps({"\x1b[2J\x07evil": 1}))
    (folder / "latin.jsonl").write_bytes(LINE.encode().replace(b"p\"", b"\xff\""))
    (folder / "folder").mkdir()
    save_checkpoint(folder / "good.pt", GPT(ModelConfig(vocab_size=20, width=16, depth=1, heads=1, head_size=16, hidden=16)), config=dict(task="solve", candidates=3, operations=4, modulus=11, numbers=4))
    (folder / "cut.pt").write_bytes((folder / "good.pt").read_bytes()[:-50])
    torch.save(dict(model_config={}, weights={}, extra={}), folder / "empty.pt")
    save_checkpoint(folder / "taskless.pt", GPT(ModelConfig(vocab_size=20, width=16, depth=1, heads=1, head_size=16, hidden=16)))
    (folder / "odd/state").mkdir(parents=True)
    return folder


REAL = ["train.py", "--init", "good", "--data", "good.jsonl"]
EVAL = ["eval.py", "--init", "good", "--data"]
CASES = [
    (["train.py", "--attemps", "3"], "did you mean --attempts?"), (["train.py", "attempts"], "unknown argument"), (["train.py", "--attempts"], "needs a value"),
    (["train.py", "--lr", "fast"], "not a number"), (["train.py", "--attempts", "1.5"], "not a whole number"), (["train.py", "--task", "slove"], "did you mean 'solve'?"),
    (["train.py", "--lr", "inf"], "--lr inf"), (["train.py", "--lr", "-1"], "--lr -1"), (["train.py", "--tokens", "0"], "--tokens 0"), (["train.py", "--keep", "0"], "--keep 0"),
    (["train.py", "--save-every", "-1"], "--save-every -1"), (["train.py", "--min-p", "0.1"], "the gradient is biased"), (["train.py", "--offload-optimizer=no"], "takes no value"),
    (["train.py", "--device", "cuda"], "sees no CUDA device"), (["train.py", "--depth", "99"], "--depth 99"), (["train.py", "--modulus", "1"], "--modulus 1"),
    (["train.py", "--candidates", "30"], "--candidates 30"), (["train.py", "--task", "chain", "--numbers", "3"], "means nothing to the task"), (["train.py", "--max-new-tokens", "999"], "--max-new-tokens 999"),
    (["train.py", "--resume"], "no run under out/ has a state"), (["train.py", "--resume", "nowhere"], "holds no state"), (["train.py", "--resume", "odd"], "holds no state"),
    (["train.py", "--init", "good"], "--data is missing"), (["train.py", "--data", "good.jsonl"], "--data needs --init"), ([*REAL, "--task", "chain"], "--task is about bases"),
    (["train.py", "--init", "nowhere", "--data", "good.jsonl"], "nothing is downloaded"), (["train.py", "--init", "file", "--data", "good.jsonl"], "no such folder"),
    (["train.py", "--init", "run", "--data", "good.jsonl"], "has not saved a model yet"), ([*REAL, "--template", "llama3"], "has no token <|begin_of_text|>"),
    *[(["train.py", "--init", name, "--data", "good.jsonl"], says) for name, says in dict(
        gemma="model_type = 'gemma3'", sliding="use_sliding_window = True", quantised="quantization_config", yarn="rope_type = 'yarn'", gelu="hidden_act = 'gelu'", ends="eos_token_id",
        farends="ids up to 999", small="ids up to 258", nosize="hidden_size", brokenconfig="is not JSON", listconfig="is damaged", brokentokenizer="is damaged", notokenizer="there is no such file",
        folder="config.json: there is no such file").items()],
    ([*REAL, "--prompt-tokens", "9"], "every prompt has more than 9"), ([*REAL, "--max-new-tokens", "4000"], "do not fit"),
    *[([*EVAL, f"{name}.jsonl"], says) for name, says in dict(
        nowhere="there is no such file", empty="no problem with a gold answer", goldless="no problem with a gold answer", array="an object a line", fields="fields.jsonl:2: ", broken="broken.jsonl:2: ",
        number="it is int, not an object", blank="its problem is empty", list="its answer is list", long="every prompt has more than", latin="is not UTF-8").items()],
    ([*EVAL, "folder"], "is a folder"), ([*EVAL, "good.jsonl,nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
    (["eval.py", "--init", "good"], "--data is missing"), (["eval.py"], "--checkpoint is missing"), (["eval.py", "--checkpoint", "nowhere.pt"], "there is no such file"),
    (["eval.py", "--checkpoint", "text.pt"], "is not a checkpoint"), (["eval.py", "--checkpoint", "cut.pt"], "is damaged"), (["eval.py", "--checkpoint", "empty.pt"], "is not a checkpoint"),
    (["eval.py", "--checkpoint", "taskless.pt"], "does not say its task"), (["eval.py", "--checkpoint", "good.pt", "--data", "good.jsonl"], "--data: this model"),
    (["eval.py", "--checkpoint", "good.pt", "--init", "good"], "use one"), (["eval.py", "--checkpoint", "good.pt", "--samples", "0"], "--samples at least 1"),
    (["eval.py", "--checkpoint", "good.pt", "--samples", "2", "--temperature", "0"], "the same answer every time"), (["eval.py", "--checkpoint", "good.pt", "--json", "file/x.json"], "file cannot be made"),
    (["eval.py", "--checkpoint", "good.pt", "--cache-tokens", "3"], "a row may need"),
    (["pretrain.py", "--data", "good.jsonl"], "belong together"), (["pretrain.py", "--data", "good.jsonl", "--tokenizer", "folder", "--save", "new"], "folder"),
    (["pretrain.py", "--data", "good.jsonl", "--tokenizer", "good", "--save", "file"], "is not written over"), (["data.py"], "usage"), (["data.py", "nowhere"], "there is no such file"),
    (["prompts.py", "good"], "usage"), (["prompts.py", "nowhere", "?"], "no such folder"), (["memory.py", "--tokens-per-microbatch", "0"], "--tokens-per-microbatch 0"), (["tasks.py", "--modulus", "99"], "--modulus 99"),
    (["train.py", "--prompts", "1000000000000"], "rows a step"), (["train.py", "--eval-questions", "999999999999"], "at most 16,777,216"),
    (["eval.py", "--checkpoint", "good.pt", "--samples", "99999999"], "--samples 99999999: at most"), (["train.py", "--cache-tokens", "5"], "a row may need"), (["train.py", "--name", "../../evil"], "no slashes"), (["train.py", "--name", "a\x1b[2J"], "control characters"),
    (["train.py", "--name", "."], "no dot"), (["train.py", "--name", "a" * 300], "at most 200 bytes"), (["train.py", "--clip-high", "inf"], "--clip-high inf"),
    (["train.py", "--init", "good", "--data", ","], "names no file"), ([*EVAL, "good.jsonl,,good.jsonl"], "names no file"),
    ([*EVAL, "good.jsonl", "--cache-tokens", "5"], "a row may need"), ([*EVAL, "escapes.jsonl"], r"\x1b[2J\x07evil"),
    (["eval.py", "--checkpoint", "good.pt", "--questions", "4", "--max-new-tokens", "200"], "--max-new-tokens 200"),
    (["compare.py", "--flags", "'unclosed"], "quotation marks"), (["compare.py", "--flags", "--init x"], "--init is not for this script"), (["compare.py", "--flags", "--tokens 0"], "--tokens 0"),
    (["compare.py", "--flags", "--name x"], "gives it to each run"), (["compare.py", "--name", "../x", "--seeds", "0"], "no slashes"), (["bench.py", "sampler", "--threads", "99999999"], "--threads 99999999"),
    (["compare.py", "--arms", "none"], "'none'"), (["bench.py", "nothing"], "choose one of"), (["bench.py", "--rows", "9"], "multiple of --group"),
]


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("words, says", CASES, ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "")
def test_one_sentence(words, says, ground, monkeypatch, capsys):
    """Catches tracebacks, sentences that do not name the thing, success as exit code, and files that are changed or left behind."""
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    if words[0] == "pretrain.py" and "file" in words:
        pytest.importorskip("safetensors", reason="needs safetensors: pip install -r requirements-extra.txt")
    before = everything(ground)
    monkeypatch.chdir(ground)
    monkeypatch.setattr(sys, "argv", [words[0], *(("--dtype", "float32") if words[0] in ("train.py", "eval.py") else ()), *words[1:]])
    with pytest.raises(SystemExit) as stop:
        guarded(MAINS[words[0].removesuffix(".py")].main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and says in said and said.count("\n") == 1 and "\x1b" not in said and len(said) < 600, said
    assert everything(ground) == before and not os.path.exists("out")


def test_there_are_enough():
    """Catches a table that shrinks."""
    assert len(CASES) >= 100
