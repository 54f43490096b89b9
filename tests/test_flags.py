"""The command line: groups, ranges and tuples; one sentence for everything that ends a script."""

import ast
import errno
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch
from conftest import PATIENCE, ROOT, command

import eval as evaluation
import train
from report import page, trees
from runtime.flags import (
    Above,
    AtLeast,
    AtMost,
    BadInput,
    Below,
    Between,
    Maybe,
    check_fields,
    flags_of,
    flat,
    guarded,
    help_text,
    kinds,
    parse,
    parse_flags,
    unflat,
    writing,
)
from tasks import base, catalog
from tools import (
    bench_kernels,
    bench_sampler,
    bench_training,
    bench_verifier,
    chat,
    compare,
    controls,
    dial,
    machine,
    memory_table,
    pictures,
    tables,
    tiny_qwen,
)

# name of a script, as `command` starts it: its module
SCRIPTS = {
    "train.py": train,
    "eval.py": evaluation,
    "report": page,
    "report.trees": trees,
    "tasks.base": base,
    "tasks.catalog": catalog,
    "tools.bench_kernels": bench_kernels,
    "tools.bench_sampler": bench_sampler,
    "tools.bench_training": bench_training,
    "tools.bench_verifier": bench_verifier,
    "tools.chat": chat,
    "tools.compare": compare,
    "tools.controls": controls,
    "tools.dial": dial,
    "tools.machine": machine,
    "tools.memory_table": memory_table,
    "tools.pictures": pictures,
    "tools.tables": tables,
    "tools.tiny_qwen": tiny_qwen,
}


@dataclass(frozen=True)
class Place:
    """Where it is computed.

    No line of help.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    cache_tokens: Annotated[int, AtLeast(0)] = 0  # tokens in the cache


@dataclass(frozen=True)
class Config:
    # ---- a heading is no comment of the field after a blank line

    # completions per prompt
    # in each layer
    group_sizes: Annotated[tuple[int, ...], AtLeast(1)] = (4, 3)  # 16: GRPO
    clip: Annotated[
        tuple[float, ...],
        Above(0),
        Below(1),
    ] = (0.2,)  # of the ratio
    data: tuple[str, ...] = ()  # files, separated by commas
    lr: Annotated[float, AtLeast(0)] = 1e-4  # learning rate
    top_p: Annotated[float, Above(0), AtMost(1)] = 1.0  # nucleus
    share: Annotated[float, Between(0, 1)] = 0.5  # of something
    prompts: int = 32  # P
    resume: Maybe = ""  # goes on
    quiet: bool = False  # no bars
    place: Place = Place(cache_tokens=5)


# ---- flags of a dataclass ------------------------------------------------------------------------


def test_a_flag_sets_a_field_of_its_group():
    """Catches a group's flag that is unknown or lost, defaults of the group's class instead of the
    script's, a tuple that stays text, and a number that is not of the field's type."""
    words = "--group-sizes 4,3,2 --clip=.2,.28 --data a.jsonl,b.jsonl --device cpu --lr 1 --quiet"
    config = parse_flags(Config, "", argv=words.split())
    assert config == Config(
        group_sizes=(4, 3, 2),
        clip=(0.2, 0.28),
        data=("a.jsonl", "b.jsonl"),
        lr=1.0,
        quiet=True,
        place=Place(device="cpu", cache_tokens=5),
    )
    assert type(config.lr) is float
    assert parse(Config, ["--cache_tokens", "7"]) == dict(cache_tokens=7)  # _ for -
    assert parse(Config, ["--resume"]) == dict(resume="newest")
    assert parse(Config, ["out/run", "--quiet"], first_word="resume") == dict(
        resume="out/run", quiet=True
    )


@pytest.mark.parametrize(
    "words, message",
    [
        ("--lr -1", "--lr -1: must be a number of at least 0"),
        ("--lr inf", "--lr inf: must be a number, and finite"),
        ("--lr nan", "--lr 'nan' is not a number"),
        ("--top-p 0", "--top-p 0: must be a number above 0 and of at most 1"),
        ("--top-p 1.5", "--top-p 1.5: must be a number above 0 and of at most 1"),
        ("--share 2", "--share 2: must be a number from 0 to 1"),
        ("--clip 0.2,1", "--clip 0.2,1: each must be a number above 0 and below 1"),
        ("--cache-tokens -1", "--cache-tokens -1: must be a number of at least 0"),
        ("--group-sizes 4,0", "--group-sizes 4,0: each must be a number of at least 1"),
        ("--group-sizes 4,x", "--group-sizes 'x' is not a whole number"),
        ("--group-sizes=", "--group-sizes : needs at least one number"),
        ("--prompts three", "--prompts 'three' is not a whole number"),
        ("--prompts 2.5", "--prompts '2.5' is not a whole number"),
        (f"--prompts {'9' * 30}", "whole numbers here have at most 15 digits"),
        ("--prompts", "--prompts needs a value"),
        ("--quiet=no", "--quiet takes no value"),
        ("--device cup", "--device 'cup': choose one of auto, cpu, cuda; did you mean 'cpu'?"),
        ("--promts 3", "unknown flag '--promts': did you mean --prompts?"),
        ("--devise cpu", "unknown flag '--devise': did you mean --device?"),
        ("--zzzzzzzz 1", "unknown flag '--zzzzzzzz': --help lists the flags"),
        ("-x", "unknown flag '-x'"),
        ("solve", "unknown argument 'solve'"),
        ("--top-k 3", "--top-k is not for this script: the gradient would be biased"),
        ("--attempts 3", "--attempts is not a flag any more: use --group-sizes 4,3"),
        ("--attemps 3", "--attempts? It is not a flag any more: use --group-sizes 4,3"),
    ],
)
def test_bad_flags_name_flag_value_and_remedy(words, message):
    """Catches a misspelt flag that is dropped, a range that is not checked, an old flag without its
    successor."""
    with pytest.raises(BadInput, match=re.escape(message)):
        parse_flags(
            Config,
            "",
            argv=words.split(),
            refused=dict(top_k="the gradient would be biased"),
            renamed=dict(attempts="use --group-sizes 4,3"),
        )


def test_presets_stand_under_the_flags_and_are_checked():
    """Catches a preset that overrules the command line, one that is not asked for what was given,
    and values of a file that are out of range, of the wrong type or of no flag."""

    def preset(given):
        return dict(lr=3.0 if "quiet" in given else 2.0, cache_tokens=9, prompts=1)

    config = parse_flags(Config, "", preset, ["--prompts", "4", "--quiet"])
    assert (config.prompts, config.lr, config.place.cache_tokens) == (4, 3.0, 9)
    for bad, message in (
        (dict(lr=-1), "--lr -1: must be a number of at least 0"),
        (dict(lr=True), "--lr True: must be a number"),
        (dict(group_sizes=[4, "3"]), "--group-sizes 4,3: must be whole numbers"),
        (dict(device="gpu"), "--device gpu: must be one of auto, cpu, cuda"),
    ):
        with pytest.raises(BadInput, match=re.escape(message)):
            parse_flags(Config, "", lambda given, bad=bad: bad, [])
    with pytest.raises(TypeError, match="corrections"):
        parse_flags(Config, "", lambda given: dict(corrections=3), [])


def test_a_config_survives_its_file():
    """Catches a tuple that comes back from JSON as a list, and a field of a group that is lost."""
    config = Config(group_sizes=(2, 2), place=Place("cpu", 7))
    values = flat(config)
    assert values["group_sizes"] == (2, 2) and values["device"] == "cpu" and "place" not in values
    assert unflat(Config, values | dict(group_sizes=[2, 2])) == config


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(lr=-1), "c.json: lr = -1 must be a number of at least 0"),
        (dict(lr="1e-4"), "c.json: lr = '1e-4' is not a number"),
        (dict(group_sizes="4,3"), "c.json: group_sizes = '4,3' is not whole numbers"),
        (dict(prompts=True), "c.json: prompts = True is not a whole number"),
        (dict(device=["cpu"]), "c.json: device = ['cpu'] is not one of auto, cpu, cuda"),
    ],
)
def test_a_config_file_is_checked_by_name(change, message):
    """Catches a config.json whose fields are of another type or out of range."""
    values = flat(Config())
    check_fields(values, kinds(Config), "c.json")
    with pytest.raises(BadInput, match=re.escape(message)):
        check_fields(values | change, kinds(Config), "c.json")
    with pytest.raises(BadInput, match=r"c.json has no field 'lr'"):
        check_fields(
            {name: x for name, x in values.items() if name != "lr"}, kinds(Config), "c.json"
        )


def test_two_groups_cannot_share_a_flag():
    """Catches a flag that sets one of two fields."""

    @dataclass(frozen=True)
    class Twice:
        one: Place = Place()
        other: Place = Place()

    with pytest.raises(AssertionError, match="--device is in two dataclasses"):
        flags_of(Twice)


def test_help_has_a_block_per_group():
    """Catches a comment that is lost or taken from another field, a default that is not shown, and
    flags of a group that are not under its heading."""
    text = help_text(Config, "The docstring.")
    own, group = text.split("\nWhere it is computed:\n")
    assert own.startswith("The docstring.\n\nFlags (")
    assert (
        "--group-sizes int,...         completions per prompt in each layer 16: GRPO [4,3]" in own
    )
    assert "--clip float,...              of the ratio [0.2]" in own and "heading" not in own
    assert re.findall(r"^  --([\w-]+)", group, re.M) == ["device", "cache-tokens"]
    assert "tokens in the cache [5]" in group and "No line of help" not in text


# ---- the scripts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_used_and_explained(name):
    """Catches dead flags: every field is read somewhere outside of its declaration, and has a line
    of help."""
    sources = [path for path in ROOT.glob("**/*.py") if path.parent.name != "tests"]
    source = "".join(path.read_text() for path in sources)
    text = help_text(SCRIPTS[name].Config, "")
    for flag, about in flags_of(SCRIPTS[name].Config).items():
        assert re.search(rf"\w\.{flag}\b|[\"']{flag}[\"']", source), f"--{flag} is read nowhere"
        assert len(about.note) > 5, f"--{flag} of {name} has no comment, so no help"
        assert f"  --{flag.replace('_', '-')}" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_starts_no_work(name, monkeypatch, capsys):
    """Catches a --help that fails, or starts work."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        guarded(SCRIPTS[name].main)
    assert stop.value.code == 0 and "Flags" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, says",
    [
        (["train.py", "--group-size", "3"], "did you mean --group-sizes?"),
        (
            ["train.py", "--method-args", "siblings=parent", "--group-sizes", "4,1"],
            "no siblings",
        ),
        (["train.py", "--group-sizes", "1"], "no answer has a sibling"),
        (["train.py", "--group-sizes", "4,0"], "each must be a number of at least 1"),
        (["train.py", "--group-sizes", "9999,9999"], "too many rows a step"),
        (["train.py", "--layer-weights", "1,1,1"], "give one for each"),
        (["train.py", "--layer-weights", "1,-1"], "would unlearn its layer"),
        (["train.py", "--prompts", "3"], "--minibatches 2"),
        (["train.py", "--temperature", "0"], "--temperature 0: must be a number above 0"),
        (["train.py", "--format-weight", "0.9"], "must be a number from 0 to 0.5"),
        (["train.py", "--clip", "1"], "give ε in (0, 1)"),
        (["train.py", "--clip", "0.2,0.3,0.4"], "give ε in (0, 1)"),
        (["train.py", "--tokens-per-microbatch", "0"], "at least 1"),
        (["train.py", "--modulus", "98"], "must be a number from 3 to 97"),
        (["train.py", "--eval-questions", "1"], "--eval-questions 1"),
        (["train.py", "--top-p", "0.9"], "the gradient is biased"),
        (["train.py", "--attempts", "4"], "the first number of --group-sizes"),
        (["train.py", "--device", "cuda"], "sees no CUDA device"),
        (["train.py", "--depth", "0"], "--depth 0"),
        (
            ["train.py", "--task", "countdown", "--modulus", "7"],
            "means nothing to the task countdown",
        ),
        (
            ["train.py", "--task", "chain", "--candidates", "7"],
            "set by --looks and --modulus and --operations",
        ),
        (["train.py", "--preset", "smoke", "--max-new-tokens", "500"], "--max-new-tokens 500"),
        (["train.py", "--name", "a/b"], "--name"),
        (["eval.py"], "no model is named"),
        (["eval.py", "--checkpoint", "x.pt"], "name the model first: python eval.py out/run"),
        (["eval.py", "nowhere.pt"], "nowhere.pt"),
        (["eval.py", "README.md"], "README.md is not a checkpoint"),
        (["eval.py", "--model", "README.md"], "README.md is not a checkpoint"),
        (["eval.py", "x.pt", "--questions", "1"], "--questions 1: "),
        (["eval.py", "x.pt", "--top-p", "0"], "--top-p 0: must be a number above 0"),
        (["eval.py", "x.pt", "--temperature", "0", "--samples", "2"], "the same answer every time"),
        (["tasks.catalog", "--candidates", "99"], "--candidates 99"),
        (["tasks.catalog", "--candidates", "12"], "only 11 different numbers"),
        (["tools.compare", "--arms", "grpo,nothing"], "'nothing'"),
        (["tools.bench_sampler", "--rows", "9"], "--prompts and --group-size make the rows"),
        (["tools.bench_sampler", "--ladder", "nothing"], "choose one of all, last, none"),
        (["tools.bench_sampler", "--threads", "9999"], "the cores of this machine"),
        (["tools.bench_training", "--corrections", "4"], "the second number of --group-sizes"),
        (["tools.bench_kernels", "--group", "8"], "--group-size 8"),
        (["tools.bench_verifier", "--rounds", "0"], "--rounds 0: must be a number of at least 1"),
        (["tools.machine", "--threads", "9999"], "the cores of this machine"),
        (["tools.memory_table", "--ranks", "0"], "--ranks 0: must be a number of at least 1"),
        (["tools.tiny_qwen"], "--data, --tokenizer and --save belong together"),
        (["report", "nowhere"], "nowhere is no run"),
    ],
)
def test_bad_input_is_one_sentence_exit_code_2_and_no_files(
    words, says, tmp_path, monkeypatch, capsys
):
    """Catches tracebacks, exit code 0 or 1, and files left behind by a run that never began."""
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    (tmp_path / "README.md").write_text("not a checkpoint")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        guarded(SCRIPTS[words[0]].main)
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and says in said
        and said.startswith("error: ")
        and said.count("\n") == 1
    )
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_a_small_script_prints_its_usage():
    """Catches a script that stands outside of `guarded`: without words it is bad input."""
    done = subprocess.run(
        command("reward.py"), capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT
    )
    assert done.returncode == 2 and done.stderr.startswith("error: usage: python reward.py ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_exit_code_reaches_the_shell(tmp_path):
    """Catches a script that is guarded in tests and not when run: the same through a real
    process."""
    done = subprocess.run(
        command("train.py", "--promts", "3"),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=PATIENCE,
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "error: unknown flag '--promts': did you mean --prompts?\n"


# ---- last words ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, code, says",
    [
        (BadInput("no"), 2, "error: no\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a\x1b[2Jb"),
            2,
            "error: a\\x1b[2Jb: No such file or directory\n",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left"),
        (OSError("s: step 3 could not be saved"), 2, "error: s: step 3 could not be saved\n"),
        (MemoryError(), 2, "out of memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to"),
            2,
            "error: out of memory (CUDA out of memory)",
        ),
        (
            ModuleNotFoundError("No module named 'tiktoken'", name="tiktoken"),
            2,
            "pip install -r requirements.txt",
        ),
        (ModuleNotFoundError("No module named 'mgrpo'", name="mgrpo"), 70, "a fault of this code"),
        (OSError(errno.EBADF, "Bad file descriptor"), 70, "a fault of this code"),
        # stdout is well: it was another pipe
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 70, "a fault of this code"),
        (ValueError("two\nlines"), 70, "error: ValueError: two lines ("),
        (KeyError("x"), 70, "a fault of this code, not of your input; its traceback is in "),
    ],
)
def test_last_words(error, code, says, tmp_path, monkeypatch, capsys):
    """Catches bugs that look like bad input, disks that look like bugs, two lines, and a traceback
    that is lost."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        guarded(main)
    said = capsys.readouterr().err
    assert stop.value.code == code and says in said and said.count("\n") == 1 and "\x1b" not in said
    kept = [path.read_text() for path in tmp_path.iterdir()]
    assert len(kept) == (code == 70) and all(
        "Traceback" in text and "raise error" in text for text in kept
    )


def test_debug_prints_the_traceback(monkeypatch, capsys):
    """Catches --debug unknown to a script, or known and idle; and a sentence that it replaces."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--promts", "3", "--debug"])
    with pytest.raises(SystemExit) as stop:
        guarded(train.main)
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and said.startswith("Traceback")
        and said.endswith("did you mean --prompts?\n")
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_imports_flags_before_torch(name):
    """Catches a script that prints a traceback for Ctrl-C in the seconds that importing torch takes:
    runtime.flags handles it, if it comes first."""
    program = ast.parse(Path(SCRIPTS[name].__file__).read_text())
    imports = [line for line in program.body if isinstance(line, (ast.Import, ast.ImportFrom))]
    modules = [getattr(line, "module", None) or line.names[0].name for line in imports]
    ours = [module for module in modules if module.partition(".")[0] not in sys.stdlib_module_names]
    assert "torch" not in ours or ours[0].startswith("runtime"), ours


@pytest.mark.parametrize(
    "body, code, message",
    [
        (
            "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)",
            130,
            "interrupted\n",
        ),
        (
            "raise ModuleNotFoundError('No module named', name='torch')",
            2,
            "error: the package torch is missing: pip install -r requirements.txt\n",
        ),
    ],
    ids=["Ctrl-C", "missing"],
)
def test_while_it_imports(body, code, message, tmp_path):
    """Catches a traceback of Ctrl-C while torch is imported, or without torch: a torch that raises
    stands before the real one."""
    (tmp_path / "torch.py").write_text(body)
    done = subprocess.run(
        command("train.py"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=os.environ | dict(PYTHONPATH=str(tmp_path)),
        # a shell may have it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stderr) == (code, message)


@pytest.mark.slow
def test_a_reader_that_leaves():
    """Catches a traceback, or Python's own complaint at its end, when what reads the output has
    left, as in `| head`."""
    running = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    running.stdout.close()
    assert running.stderr.read() == "" and running.wait(PATIENCE) == 141


@pytest.mark.slow
@pytest.mark.parametrize(
    "closed, code, says",
    [
        ("<&-", 2, "error: standard input is closed"),
        (">&-", 2, "error: nowhere"),
        ("2>&-", 2, ""),
    ],
)
def test_closed_streams(closed, code, says):
    """Catches a traceback (AttributeError of None) where the shell has closed a stream."""
    done = subprocess.run(
        f"{sys.executable} -m tools.chat nowhere {closed}",
        cwd=ROOT,
        shell=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (
        done.returncode == code and done.stderr.startswith(says) and "Traceback" not in done.stderr
    )


# ---- disks ---------------------------------------------------------------------------------------


def test_a_full_disk_is_named(tmp_path):
    """Catches Python's "No space left on device" that names no file: /dev/full takes nothing."""
    (tmp_path / "log").symlink_to("/dev/full")
    says = "log could not be written (No space left on device); what was there before is whole"
    with (
        pytest.raises(OSError, match=re.escape(says)),
        writing(tmp_path / "log"),
        open(tmp_path / "log", "w") as file,
    ):
        file.write("line")


def test_a_read_only_folder_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    """Catches minutes of a base model that then cannot be kept: nobody, not even root, can write
    into /proc."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").symlink_to("/proc")
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "smoke", "--dtype", "float32"])
    monkeypatch.setattr("tasks.base.pretrain", None)
    with pytest.raises(SystemExit) as stop:
        guarded(train.main)
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and said.startswith("error: out cannot be made or written to")
        and said.count("\n") == 1
    )
