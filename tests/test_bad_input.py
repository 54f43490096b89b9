"""What goes wrong at the command line and on disk: one sentence that names the thing and the
remedy, exit code 2, nothing written."""

import importlib
import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY
from test_prompts import TOKENS, make_folder

import eval as evaluation
import train
from huggingface import prompts
from model import GPT, ModelConfig
from runtime.checkpoints import save_checkpoint
from runtime.flags import BadInput, flag_name, guarded
from tasks.catalog import TaskConfig

CONFIG = dict(
    model_type="qwen2",
    vocab_size=300,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    intermediate_size=16,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    eos_token_id=256,
    tie_word_embeddings=True,
)
LINE = json.dumps(dict(problem="p", answer="1")) + "\n"
TASK = vars(TaskConfig()) | dict(max_new_tokens=40)


def tiny(vocabulary=VOCABULARY):
    return GPT(ModelConfig(vocabulary, width=16, depth=1, heads=1, head_size=16, hidden=16))


def main_of(command):
    """The main of a command: "train.py", or a module after `python -m`."""
    name = {"report": "report.page"}.get(command, command.removesuffix(".py"))
    return importlib.import_module(name).main


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A folder of things that are not what they should be, beside some that are."""
    folder = tmp_path_factory.mktemp("ground")
    model = lambda name, **fields: make_folder(folder / name, TOKENS["chatml"], CONFIG | fields)
    model("good")
    for name, fields in dict(
        gemma=dict(model_type="gemma3"),
        sliding=dict(use_sliding_window=True),
        quantised=dict(quantization_config=dict(bits=4)),
        yarn=dict(rope_scaling=dict(rope_type="yarn", factor=4)),
        gelu=dict(hidden_act="gelu"),
        ends=dict(eos_token_id=[1, 2, 3, 4, 5]),
        farends=dict(eos_token_id=999),
        small=dict(vocab_size=100),
        noends=dict(eos_token_id=None),
    ).items():
        model(name, **fields)
    model("nosize")
    (folder / "nosize/config.json").write_text(
        json.dumps({k: v for k, v in CONFIG.items() if k != "hidden_size"})
    )
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
    files = {
        "good.jsonl": LINE,
        "empty.jsonl": "",
        "goldless.jsonl": json.dumps(dict(problem="p", solution="s")),
        "array.jsonl": f"[\n{LINE}]",
        "fields.jsonl": LINE + '{"text": "x"}',
        "broken.jsonl": LINE + "{",
        "number.jsonl": "3",
        "blank.jsonl": json.dumps(dict(problem=" ", answer="1")),
        "list.jsonl": json.dumps(dict(problem="p", answer=["1"])),
        "long.jsonl": json.dumps(dict(problem="p" * 900, answer="1")),
        "text.pt": "not a checkpoint",
        "file": "",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "escapes.jsonl").write_text(json.dumps({"\x1b[2J\x07evil": 1}))
    (folder / "latin.jsonl").write_bytes(LINE.encode().replace(b'p"', b'\xff"'))
    (folder / "folder").mkdir()
    save_checkpoint(
        folder / "good.pt",
        tiny(),
        config=TASK,
    )
    (folder / "cut.pt").write_bytes((folder / "good.pt").read_bytes()[:-50])
    torch.save(dict(model_config={}, weights={}, extra={}), folder / "empty.pt")
    save_checkpoint(
        folder / "taskless.pt",
        tiny(20),
    )
    (folder / "odd/state").mkdir(parents=True)
    return folder


def sentence(command, capsys):
    """What a command wrote to stderr. Chat prints there, too, how its model is opened; its last line
    counts."""
    said = capsys.readouterr().err
    return said.splitlines(keepends=True)[-1] if command == "tools.chat" else said


REAL = ["train.py", "--init", "good", "--data", "good.jsonl"]
EVAL = ["eval.py", "good", "--data"]
CASES = [
    # The words of the command line.
    (["train.py", "--promts", "3"], "did you mean --prompts?"),
    (["train.py", "prompts"], "unknown argument"),
    (["train.py", "--prompts"], "needs a value"),
    (["train.py", "--lr", "fast"], "not a number"),
    (["train.py", "--prompts", "1.5"], "not a whole number"),
    (["train.py", "--prompts", "1" * 20], "at most 15 digits"),
    (["train.py", "--task", "slove"], "did you mean 'solve'?"),
    (["eval.py", "good.pt", "good"], "unknown argument"),
    (["eval.py", "--model=good.pt", "--task", "chain"], "unknown flag '--task'"),
    (["eval.py", "good.pt", "--verifer", "rules"], "did you mean --verifier?"),
    # Numbers that cannot be.
    (["train.py", "--lr", "inf"], "--lr inf"),
    (["train.py", "--lr", "nan"], "--lr 'nan'"),
    (["train.py", "--lr", "-1"], "--lr -1"),
    (["train.py", "--tokens", "0"], "--tokens 0"),
    (["train.py", "--temperature", "0"], "--temperature 0"),
    (["train.py", "--format-weight", "0.6"], "--format-weight 0.6"),
    (["train.py", "--save-every", "-1"], "--save-every -1"),
    (["train.py", "--eval-questions", "1"], "--eval-questions 1"),
    (["train.py", "--eval-questions", "999999999999"], "--eval-questions 999999999999"),
    (["train.py", "--depth", "99"], "--depth 99"),
    (["train.py", "--heads", "65"], "--heads 65"),
    (["train.py", "--base-tokens", "-1"], "--base-tokens -1"),
    (["train.py", "--modulus", "1"], "--modulus 1"),
    (["train.py", "--candidates", "30"], "--candidates 30"),
    (["train.py", "--max-new-tokens", "999"], "--max-new-tokens 999"),
    (["train.py", "--cache-tokens", "5"], "a row may need"),
    (["train.py", "--prompts", "1000000000000"], "too many rows a step"),
    (["train.py", "--prompts", "7"], "does not divide into --minibatches 2"),
    # The layers.
    (["train.py", "--group-sizes", "0"], "--group-sizes 0: each must be a number of at least 1"),
    (["train.py", "--group-sizes", "1"], "no answer has a sibling"),
    (["train.py", "--group-sizes", "1,1"], "no answer has a sibling"),
    (["train.py", "--method", "igrpo", "--group-sizes", "4,1"], "compares refinements"),
    (
        ["train.py", "--method", "edge-gec", "--group-sizes", "4,4"],
        "reflect once; say --group-sizes 8,1",
    ),
    (["train.py", "--method", "disco", "--normalize", "token"], "--normalize means nothing to"),
    (["train.py", "--method", "raft", "--clip", "0.3"], "--clip means nothing to"),
    (["train.py", "--group-sizes", "4,0"], "--group-sizes 4,0: each must be"),
    (["train.py", "--group-sizes", "4,-3"], "--group-sizes 4,-3"),
    (
        ["train.py", "--method-args", "siblings=parent", "--group-sizes", "4,1"],
        "only correction has no siblings",
    ),
    (
        ["train.py", "--method-args", "siblings=parent", "--group-sizes", "4,2,1"],
        "only correction has no siblings",
    ),
    (["train.py", "--group-sizes", "four,3"], "--group-sizes 'four' is not a whole number"),
    (["train.py", "--group-sizes", "4x3"], "--group-sizes '4x3' is not a whole number"),
    (["train.py", "--group-sizes", ","], "needs at least one number"),
    (["train.py", "--group-sizes", "9" * 7 + "," + "9" * 7], "too many rows a step"),
    (["train.py", "--group-sizes", ",".join("2" * 30)], "too many rows a step"),
    (["train.py", "--layer-weights", "1"], "--layer-weights has 1 numbers and --group-sizes 4,3 2"),
    (["train.py", "--layer-weights", "1,1,1"], "give one for each"),
    (["train.py", "--group-sizes", "16", "--layer-weights", "1,1"], "give one for each"),
    (["train.py", "--layer-weights", "1,-1"], "would unlearn its layer"),
    (["train.py", "--layer-weights", "1,inf"], "finite"),
    (["train.py", "--method", "discco"], "did you mean disco?"),
    (["train.py", "--method", "disco", "--method-args", "tua=1"], "did you mean tau?"),
    (
        ["train.py", "--method", "disco", "--method-args", "tau=many"],
        "tau must be a number from 1e-06 to inf",
    ),
    (["train.py", "--method", "grpo-care", "--kl-coef", "0.1"], "drop --kl-coef"),
    (["train.py", "--method", "disco", "--kl-coef", "0.1"], "drop --kl-coef"),
    (["train.py", "--method", "igrpo", "--group-sizes", "8"], "say --group-sizes 4,4"),
    (["train.py", "--method", "grpo-care", "--method-args", "follow_every=0"], "from 1 to"),
    (["train.py", "--failed", "keep"], "--method-args failed=keep"),
    (
        ["train.py", "--method-args", "siblings=parents"],
        "siblings must be one of: question, parent",
    ),
    (["train.py", "--clip", "0.1,0.2,0.3"], "--clip 0.1,0.2,0.3: give"),
    (["train.py", "--clip", "0"], "--clip 0"),
    (["train.py", "--clip", "1"], "--clip 1"),
    (["train.py", "--clip", "0.2,inf"], "--clip 0.2,inf"),
    (["train.py", "--clip", "a"], "--clip 'a' is not a number"),
    # Combinations that mean nothing.
    (["train.py", "--min-p", "0.1"], "the gradient is biased"),
    (["train.py", "--device", "cuda"], "sees no CUDA device"),
    (["train.py", "--task", "chain", "--numbers", "3"], "means nothing to the task"),
    (["train.py", "--name", "../../evil"], "no slashes"),
    (["train.py", "--name", "a\x1b[2J"], "control characters"),
    (["train.py", "--name", "."], "no dot"),
    (["train.py", "--name", "a" * 300], "at most 200 bytes"),
    (["train.py", "--resume"], "no run under out/ has a state"),
    (["train.py", "--resume", "--name", "nobody"], "no run under out/ called nobody"),
    (["train.py", "--resume", "nowhere"], "holds no state"),
    (["train.py", "--resume", "odd"], "holds no state"),
    (["train.py", "--resume", "good.pt"], "is no state: name a run's folder"),
    # A model of --init, and its data.
    (["train.py", "--init", "good"], "--data is missing"),
    (["train.py", "--init", "good", "--data", ","], "--data is missing"),
    (["train.py", "--data", "good.jsonl"], "--data needs --init"),
    (["train.py", "--verifier", "rules"], "--verifier needs --init"),
    ([*REAL, "--task", "chain"], "--task is about bases"),
    (["train.py", "--init", "nowhere", "--data", "good.jsonl"], "nothing is downloaded"),
    (["train.py", "--init", "file", "--data", "good.jsonl"], "--init file is no folder"),
    (["train.py", "--init", "good.pt"], "--init good.pt is no folder"),
    (["train.py", "--init", "run", "--data", "good.jsonl"], "has not saved a model yet"),
    ([*REAL, "--template", "llama3"], "has no token <|begin_of_text|>"),
    *[
        (["train.py", "--init", name, "--data", "good.jsonl"], says)
        for name, says in dict(
            gemma="model_type = 'gemma3'",
            sliding="use_sliding_window = True",
            quantised="quantization_config",
            yarn="rope_type = 'yarn'",
            gelu="hidden_act = 'gelu'",
            ends="eos_token_id",
            farends="ids up to 999",
            small="ids up to 258",
            nosize="hidden_size",
            brokenconfig="is not JSON",
            listconfig="is damaged",
            brokentokenizer="is damaged",
            notokenizer="there is no such file",
            folder="config.json: there is no such file",
        ).items()
    ],
    ([*REAL, "--prompt-tokens", "9"], "every prompt has more than 9"),
    ([*REAL, "--prompt-tokens", "0"], "--prompt-tokens 0"),
    ([*REAL, "--max-new-tokens", "4000"], "do not fit"),
    ([*REAL, "--group-sizes", "2,2,2,2", "--max-new-tokens", "1000"], "4 times --max-new-tokens"),
    # Evaluation.
    *[
        ([*EVAL, f"{name}.jsonl"], says)
        for name, says in dict(
            nowhere="there is no such file",
            empty="no problem with a gold answer",
            goldless="no problem with a gold answer",
            array="an object a line",
            fields="fields.jsonl:2: ",
            broken="broken.jsonl:2: ",
            number="it is int, not an object",
            blank="its problem is empty",
            list="its answer is list",
            long="every prompt has more than",
            latin="is not UTF-8",
            escapes=r"\x1b[2J\x07evil",
        ).items()
    ],
    ([*EVAL, "folder"], "is a folder"),
    ([*EVAL, "good.jsonl,nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
    ([*EVAL, "good.jsonl", "--cache-tokens", "5"], "a row may need"),
    ([*EVAL, "good.jsonl", "--turns", "16", "--max-new-tokens", "999"], "16 times"),
    (["eval.py", "good"], "--data is missing"),
    (["eval.py"], "no model is named"),
    (["eval.py", "--questions", "4"], "no model is named"),
    (["eval.py", "nowhere.pt"], "there is no such"),
    (["eval.py", "text.pt"], "is not a checkpoint"),
    (["eval.py", "cut.pt"], "does not end with its checksum"),
    (["eval.py", "empty.pt"], "is not a checkpoint"),
    (["eval.py", "taskless.pt"], "does not name its task"),
    (["eval.py", "good.pt", "--data", "good.jsonl"], "--data: good.pt was trained on a built-in"),
    (["eval.py", "good.pt", "--template", "plain"], "--template: good.pt was trained on a"),
    (["eval.py", "good.pt", "--questions", "1"], "--questions 1"),
    (["eval.py", "good.pt", "--questions", "999999999999"], "--questions 999999999999"),
    (["eval.py", "good.pt", "--samples", "0"], "--samples 0"),
    (["eval.py", "good.pt", "--samples", "99999999"], "--samples 99999999"),
    (["eval.py", "good.pt", "--samples", "2", "--temperature", "0"], "the same answer every time"),
    (["eval.py", "good.pt", "--turns", "17"], "--turns 17"),
    (["eval.py", "good.pt", "--turns", "17"], "--turns 17"),
    (["eval.py", "good.pt", "--turns", "5"], "5 answers in a row: the base's texts have 4"),
    (["eval.py", "good.pt", "--top-p", "0"], "--top-p 0"),
    (["eval.py", "good.pt", "--min-p", "1"], "--min-p 1"),
    (["eval.py", "good.pt", "--json", "file/x.json"], "file cannot be made"),
    (["eval.py", "good.pt", "--cache-tokens", "3"], "a row may need"),
    (["eval.py", "good.pt", "--questions", "4", "--max-new-tokens", "300"], "--max-new-tokens 300"),
    # Bases and looks.
    (["train.py", "--turns", "5"], "--turns 5 asks for 5 answers in a row"),
    (["train.py", "--group-sizes", "2,2,2,2,2"], "--group-sizes 2,2,2,2,2 asks for 5 answers"),
    (["train.py", "--group-sizes", "2,2,2", "--turns", "2"], "trains 3 answers in a row"),
    (["train.py", "--start", "nowhere"], "nowhere: there is no such file"),
    (["train.py", "--start", "good.pt", "--candidates", "3"], "good.pt was trained on solve: cand"),
    (["train.py", "--reviewer", "strict"], "--reviewer 'strict'"),
    # The other commands.
    (["tools.chat"], "no model is named"),
    (["tools.chat", "nowhere"], "there is no such folder"),
    (["tools.chat", "text.pt"], "is not a checkpoint"),
    (
        ["tools.chat", "good.pt", "--data", "good.jsonl"],
        "--data: good.pt was trained on a built-in",
    ),
    (["report"], "no run is named"),
    (["report", "odd"], "odd"),
    (["report.trees"], "no run is named"),
    (["report.trees", "odd"], "there are no trees to print"),
    (["tasks.files"], "usage"),
    (["tasks.files", "nowhere"], "there is no such file"),
    (["huggingface.prompts", "good"], "usage"),
    (["huggingface.prompts", "nowhere", "?"], "no such folder"),
    (["tasks.catalog", "--modulus", "99"], "--modulus 99"),
    (["tasks.base", "--base-tokens", "0"], "--base-tokens 0"),
    (["tasks.base", "--task", "chain", "--numbers", "3"], "means nothing to the task"),
    (["tools.compare", "--flags", "'unclosed"], "quotation marks"),
    (["tools.compare", "--flags", "--init x"], "--init is not for this script"),
    (["tools.compare", "--flags", "--tokens 0"], "--tokens 0"),
    (["tools.compare", "--flags", "--name x"], "gives it to each run"),
    (["tools.compare", "--name", "../x", "--bases", "0"], "no slashes"),
    (["tools.compare", "--arms", "none"], "'none'"),
    (["tools.compare", "--map", "moon"], "--map moon: there is no such experiment"),
    (["tools.dial"], "no model is named"),
    (["tools.dial", "nowhere.pt"], "there is no such"),
    (["tools.dial", "good.pt", "--turns", "5"], "5 answers in a row"),
    (["tools.compare", "--seeds", "999"], "--seeds 999"),
    (["tools.bench_sampler", "--group-size", "0"], "--group-size 0"),
    (["tools.bench_training", "--group-sizes", "8,0"], "--group-sizes 8,0"),
    (["tools.bench_verifier", "--rounds", "0"], "--rounds 0"),
    (["tools.memory_table", "--tokens-per-microbatch", "0"], "--tokens-per-microbatch 0"),
    (["tools.tiny_qwen", "--data", "good.jsonl"], "belong together"),
    (
        ["tools.tiny_qwen", "--data", "good.jsonl", "--tokenizer", "folder", "--save", "new"],
        "a tokenizer is tokenizer.json",
    ),
    (
        ["tools.tiny_qwen", "--data", "good.jsonl", "--tokenizer", "good", "--save", "file"],
        "is not written over",
    ),
]
# Every flag of earlier versions, and what stands in its place.
CASES += [
    ([script, flag_name(name), "1"], f"is not a flag any more: {successor}")
    for script, renamed in (("train.py", train.RENAMED), ("eval.py", evaluation.RENAMED))
    for name, successor in renamed.items()
]


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "words, says", CASES, ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else ""
)
def test_one_sentence(words, says, ground, monkeypatch, capsys):
    """Catches tracebacks, sentences that do not name the thing, success as exit code, files that
    are changed or left behind, and minutes of work before the sentence."""
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    before = everything(ground)
    monkeypatch.chdir(ground)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr("tasks.base.pretrain", lambda *_: pytest.fail("a base was made"))
    float32 = ("--dtype", "float32") if words[0] in ("train.py", "eval.py", "tools.chat") else ()
    float32 = () if "needs a value" in says else float32
    monkeypatch.setattr(sys, "argv", [*words, *float32])
    with pytest.raises(SystemExit) as stop:
        guarded(main_of(words[0]))
    said = sentence(words[0], capsys)
    assert (
        stop.value.code == 2
        and said.startswith("error: ")
        and says in said
        and said.count("\n") == 1
        and "\x1b" not in said
        and len(said) < 600
    ), said
    assert everything(ground) == before and not os.path.exists("out")


def test_there_are_enough():
    """Catches a table that shrinks."""
    assert len(CASES) >= 150


# ---- a model's files, damaged --------------------------------------------------------------------

SILLY = [
    None,
    True,
    -1,
    0,
    3,
    10**9,
    10**30,
    1.5,
    float("nan"),
    "",
    "x",
    [],
    [1],
    ["a"],
    {},
    {"a": 1},
]
# of tokenizer.json
UNREAD = (
    "decoder",
    "pair",
    "special_tokens",
    "trim_offsets",
    "type_id",
    "version",
    "truncation",
    "padding",
)


def places(whole, above=()):
    """The way to every value in nested dicts and lists, of long ones to the first and the last."""
    yield above
    keys = (
        list(whole)
        if isinstance(whole, dict)
        else range(len(whole))
        if isinstance(whole, list)
        else ()
    )
    for key in dict.fromkeys([*keys][:12] + [*keys][-3:]):
        if key not in UNREAD:
            yield from places(whole[key], (*above, key))


def other(whole, place, value):
    """A copy in which something else stands at a place; nothing, for `del`."""
    if not place:
        return value
    new = whole.copy()
    if value == "del" and len(place) == 1:
        del new[place[0]]
    else:
        new[place[0]] = other(whole[place[0]], place[1:], value)
    return new


def as_opened(folder):
    """What a folder without its weights means: the shape, the template, tokens of a text, the text
    of tokens."""
    shape, encoding = prompts.open_shape(folder)
    ids = encoding.template('6*7? e\u0301 ÀÁ!"#')
    return (
        replace(shape, end_tokens=()),
        shape.end_tokens,
        encoding.template_name,
        ids,
        encoding.decode([0, 1, 2, *ids, 259]),
    )


# Values that do not look wrong, and then mean what they say: fields of a shape, end tokens, an
# added token that is not used, no NFC, no opening; and a vocabulary without some byte, as SmolLM2's
# is.
MEANS = {
    "config.json": (
        "rope_theta",
        "eos_token_id",
        "max_position_embeddings",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
        "model_type",
    ),
    "generation_config.json": ("eos_token_id",),
    "tokenizer.json": ("normalizer", "post_processor", "added_tokens"),
}


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        pytest.param("tokenizer.json", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_file_of_a_model_is_refused_or_harmless(name, tmp_path):
    """Catches a traceback, or another meaning, for config.json, tokenizer.json and
    generation_config.json in which any one value is of another type, out of range, missing, or
    stands twice: the file is named in one sentence, or means what it did, or a value that can be
    meant is."""
    config = CONFIG | dict(
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        rope_theta=10000.0,
        rope_scaling=None,
        layer_types=["full_attention"],
        hidden_act="silu",
        use_sliding_window=False,
    )
    folder = make_folder(
        tmp_path / "good",
        TOKENS["chatml"],
        config,
        opening="<|endoftext|>",
        generation=dict(eos_token_id=[256, 258]),
    )
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    a, b, c, *_ = letters = list(tokenizer["model"]["vocab"])
    tokenizer |= dict(
        normalizer=dict(type="NFC"),
        model=dict(
            type="BPE",
            vocab={letter: i for i, letter in enumerate(letters)} | {a + b: 259, a + b + c: 260},
            merges=[f"{a} {b}", f"{a + b} {c}"],
        ),
    )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    meant, whole, counts = (
        as_opened(folder),
        json.loads((folder / name).read_text()),
        dict(refused=0, same=0, other=0),
    )
    for place in dict.fromkeys(places(whole)):
        for value in [*SILLY, *(["del"] if place else [])]:
            (folder / name).write_text(json.dumps(other(whole, place, value)))
            try:
                found = as_opened(folder)
            except BadInput as error:
                said = str(error)
                assert (
                    "\n" not in said
                    and len(said) < 600
                    and ("good" in said or "--template" in said)
                ), (place, value, said)
                counts["refused"] += 1
                continue
            assert (
                found == meant
                or (place or ("eos_token_id",))[0] in MEANS[name]
                or (value == "del" and place[1] == "vocab")
            ), (place, value, found, meant)
            counts["same" if found == meant else "other"] += 1
    assert counts["refused"] > 4 * counts["other"] and counts["refused"] > counts["same"], counts


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(hidden_size="64"), "hidden_size = '64' is not a whole number"),
        (dict(hidden_size=10**12), "width = 1000000000000"),
        (dict(num_hidden_layers=0), "depth = 0"),
        (dict(num_attention_heads=0), "num_attention_heads = 0"),
        (dict(num_attention_heads=3), "num_attention_heads = 3"),
        (dict(num_attention_heads=2.0), "num_attention_heads = 2.0 is not"),
        (dict(num_key_value_heads=0), "kv_heads = 0"),
        (dict(vocab_size=-1), "vocab_size = -1"),
        (dict(head_dim=15), "heads of size 15"),
        (dict(num_attention_heads=4, num_key_value_heads=3, head_dim=8), "3 key/value heads"),
        (dict(rope_scaling=["llama3"]), "rope_scaling = ['llama3'] is not a dict"),
        (dict(rope_scaling=dict(factor=8.0)), "factor = 8.0"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "has no field 'low_freq_factor'"),
        (dict(rope_theta="1e4"), "rope_theta = '1e4'"),
        (dict(rms_norm_eps=None), "rms_norm_eps"),
        (dict(rms_norm_eps=-1.0), "norm_eps = -1.0"),
        (dict(tie_word_embeddings="false"), "tie_word_embeddings = 'false' is not true or false"),
        (dict(eos_token_id="256"), "eos_token_id = '256'"),
        (dict(eos_token_id=[256.0]), "eos_token_id"),
        (dict(prompt_template="chatmk"), "prompt_template = 'chatmk'"),
        (dict(hidden_act=None), "hidden_act = None"),
        (dict(max_position_embeddings=10**10), "context = 10000000000"),
        (dict(layer_types="full"), "layer_types = 'full' is not a list"),
    ],
)
def test_a_config_of_wrong_types_is_refused(fields, says, tmp_path):
    """Catches each of these alone: a text for a number, sizes that cannot be, heads that do not
    divide, scalings of RoPE that are passed over."""
    folder = make_folder(tmp_path / "m", TOKENS["chatml"], CONFIG | fields)
    with pytest.raises(BadInput) as error:
        prompts.open_shape(folder)
    assert says in str(error.value) and "config.json" in str(error.value), error.value


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t["model"]["vocab"].update({"!": 1}), "gives the token"),
        (lambda t: t["model"]["vocab"].update({"!": -1}), "has the id -1"),
        (lambda t: t["model"]["vocab"].update({"!": 5000}), "ids up to 5000"),
        (lambda t: t["model"]["vocab"].update({"!": "0"}), "has the id '0'"),
        (lambda t: t["model"]["vocab"].update({"!": 0.5}), "has the id 0.5"),
        (lambda t: t["added_tokens"][0].update(id=7), "gives the token"),
        (lambda t: t["added_tokens"].append(dict(id=300, content="!")), "gives the token"),
        (lambda t: t["model"].update(vocab=[]), "vocab = [] is not a dict"),
        (lambda t: t["model"].update(merges=None), "merges = None is not a list"),
        (lambda t: t["model"].update(dropout=0.1), "dropout = 0.1"),
        (lambda t: t.update(normalizer={}), "is damaged"),
        (lambda t: t.update(normalizer=False), "is damaged"),
        (lambda t: t.update(post_processor=dict(type="RobertaProcessing")), "RobertaProcessing"),
        (lambda t: t["pre_tokenizer"].update(use_regex=1), "use_regex = 1 is not true or false"),
    ],
)
def test_a_tokenizer_of_wrong_ids_is_refused(change, says, tmp_path):
    """Catches ids that two tokens share, that are none, or that the model has no row for, and steps
    that are passed over."""
    folder = make_folder(tmp_path / "m", TOKENS["chatml"], CONFIG)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BadInput) as error:
        prompts.open_shape(folder)
    assert says in str(error.value) and str(folder) in str(error.value), error.value


@pytest.mark.parametrize(
    "config, says",
    [
        (3, "is a int"),
        (dict(TASK, task="chess"), "task = 'chess' is not one of"),
        (dict(TASK, task=["solve"]), "is not one of"),
        (dict(TASK, modulus="11"), "modulus = '11' is not a whole number"),
        (dict(TASK, operations=99), "operations = 99 must be a number from 2 to 12"),
        (dict(TASK, modulus=5, candidates=7), "--candidates 7"),
        ({k: v for k, v in TASK.items() if k != "numbers"}, "has no field 'numbers'"),
        (dict(TASK, max_new_tokens="9"), "max_new_tokens = '9'"),
        ({k: v for k, v in TASK.items() if k != "max_new_tokens"}, "no field 'max_new_tokens'"),
        (None, "is a NoneType"),
    ],
)
@pytest.mark.parametrize("command", ["eval.py", "tools.chat"])
def test_a_checkpoint_with_a_nonsensical_task_is_refused(
    command, config, says, tmp_path, monkeypatch, capsys
):
    """Catches a traceback for a checkpoint whose weights are fine and whose settings are not."""
    path = tmp_path / "c.pt"
    save_checkpoint(path, tiny(), config=config)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    words = [command, str(path), "--device", "cpu", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        guarded(main_of(command))
    said = sentence(command, capsys)
    assert stop.value.code == 2 and said.count("\n") == 1, said
    assert str(path) in said and says in said, said


def test_an_init_that_is_no_model(tmp_path, monkeypatch, capsys):
    """Catches a traceback for a model that is a loop of links, a file, an empty folder, a folder of
    folders; and for a run whose config.json is damaged."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nothing")
    Path("empty").mkdir()
    Path("config/config.json").mkdir(parents=True)
    Path("d.jsonl").write_text(LINE)
    cases = [
        ("loop", "there is no such folder"),
        ("dangling", "there is no such folder"),
        ("empty", "config.json: there is no such file"),
        ("config", "config.json"),
    ]
    fields = dict(data=["d.jsonl"], eval_data=[], prompt_tokens=9, max_new_tokens=9)
    for content in (
        [],
        {},
        dict(data=3),
        fields | dict(data="d.jsonl"),
        fields | dict(prompt_tokens="9"),
        fields | dict(prompt_tokens=0),
        fields | dict(max_new_tokens=-9),
    ):
        folder = tmp_path / f"run{len(cases)}"
        (folder / "model").mkdir(parents=True)
        make_folder(folder / "model", TOKENS["chatml"], CONFIG)
        (folder / "metrics.jsonl").write_text("")
        (folder / "config.json").write_text(json.dumps(content))
        cases.append((folder.name, f"{folder.name}/config.json"))
    for model, says in cases:
        for command in ("train.py", "eval.py", "tools.chat"):
            if command == "train.py" and model.startswith("run"):  # it reads no run
                continue
            words = [*(["--init"] if command == "train.py" else []), model, "--data", "d.jsonl"]
            words = [command, *words, "--device", "cpu", "--dtype", "float32"]
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as stop:
                guarded(main_of(command))
            said = sentence(command, capsys)
            assert (
                stop.value.code == 2
                and said.startswith("error: ")
                and said.count("\n") == 1
                and says in said
            ), (command, model, said)
