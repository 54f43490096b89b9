"""The command line: what is wrong is said in one sentence, and nothing is a flag that nobody
reads."""

import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import PATIENCE, ROOT

import eval as evaluation
import train
from report import page as report
from runtime import memory
from runtime.flags import BadInput, comments, guarded, help_text, parse, parse_flags, writing
from tasks import base as pretrain
from tasks import catalog as tasks
from tools import bench, chat, compare

SCRIPTS = dict(
    train=train,
    eval=evaluation,
    pretrain=pretrain,
    compare=compare,
    bench=bench,
    tasks=tasks,
    memory=memory,
    report=report,
    chat=chat,
)


def config_of(name):
    """The flags that a script takes on its own command line (pretrain.py's Config is what others
    inherit)."""
    return getattr(SCRIPTS[name], "Script", SCRIPTS[name].Config)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_used_and_explained(name):
    """Catches dead flags: every field is read somewhere outside of its declaration, and has a line
    of help."""
    config = config_of(name)
    source = "".join(
        (ROOT / f"{n}.py").read_text()
        for n in {name, "tasks"}
        | (
            {"pretrain", "starting", "checkpoints", "heldout", "transcripts"}
            if name == "train"
            else set()
        )
    )
    for field in dataclasses.fields(config):
        used = re.search(rf"\b(c|config)\.{field.name}\b|\"{field.name}\"", source)
        assert used, f"--{field.name} of {name}.py is read nowhere"
        assert len(comments(config).get(field.name, "")) > 5, (
            f"--{field.name} of {name}.py has no comment, so no help"
        )
    text = help_text(config, SCRIPTS[name].__doc__)
    assert all(f"--{field.name.replace('_', '-')} " in text for field in dataclasses.fields(config))
    assert max(map(len, text.splitlines())) <= 140


def test_own_flags_come_first():
    """Catches a wall of flags: train.py's own, in the order of the dataclass, and the base model's
    follow under a heading of their own."""
    own, base = help_text(train.Config, train.__doc__).split(
        "Flags of pretrain.py, taken here too:"
    )
    listed = [re.findall(r"^  --([\w-]+) ", part, re.M) for part in (own, base)]
    assert [len(names) for names in listed] == [45, 11]
    assert [name.replace("-", "_") for name in listed[1] + listed[0]] == [
        field.name for field in dataclasses.fields(train.Config)
    ]


def test_values_presets_and_order():
    """Catches a preset that overrules the command line, and ints refused for floats."""
    c = parse_flags(
        train.Config,
        "",
        lambda given: pretrain.pick_preset(given, train.PRESETS),
        ["--preset", "smoke", "--prompts=4", "--lr", "1"],
    )
    assert (c.prompts, c.depth, c.lr, c.attempts) == (4, 2, 1.0, 4)
    assert parse(train.Config, ["--clip_high", "0.3", "--max-new-tokens", "7"]) == dict(
        clip_high=0.3, max_new_tokens=7
    )


@pytest.mark.parametrize(
    "words, says",
    [
        (["--attemps", "3"], "did you mean --attempts?"),
        (["--attempts", "three"], "'three' is not a whole number"),
        (["--attempts"], "needs a value"),
        (["--lr", "fast"], "'fast' is not a number"),
        (["--task", "sovle"], "did you mean 'solve'?"),
        (["solve"], "unknown argument 'solve'"),
        (["--attempts", "2.5"], "is not a whole number"),
        (["-x"], "unknown flag '-x'"),
        (["--zzzzzzzz", "1"], "--help lists the flags"),
    ],
)
def test_bad_flags(words, says):
    """Catches a bare assert, a traceback, or a misspelt flag silently dropped."""
    with pytest.raises(BadInput, match=re.escape(says)):
        parse(train.Config, words)


@pytest.mark.parametrize(
    "words, says",
    [
        (["train.py", "--correction", "3"], "did you mean --corrections?"),
        (["train.py", "--corrections", "1"], "no siblings"),
        (["train.py", "--layers", "3"], "1 is GRPO, 2 is MGRPO"),
        (["train.py", "--layers", "1", "--attempts", "1"], "no siblings"),
        (["train.py", "--prompts", "3"], "--minibatches 2"),
        (["train.py", "--temperature", "0"], "must be sampled"),
        (["train.py", "--format-weight", "0.9"], "pay better than being right"),
        (["train.py", "--clip-low", "1"], "must lie in (0, 1)"),
        (["train.py", "--tokens-per-microbatch", "0"], "at least 1"),
        (["train.py", "--modulus", "98"], "choose 3 to 97"),
        (["train.py", "--lr", "nan"], "--lr 'nan' is not a number"),
        (["train.py", "--clip-high", "nan"], "--clip-high 'nan' is not a number"),
        (["train.py", "--tokens", "9" * 30], "at most 15 digits"),
        (["train.py", "--eval-questions", "1"], "--eval-questions 1"),
        (["train.py", "--failed", "raw", "--group", "question"], "would change nothing"),
        (["train.py", "--top-p", "0.9"], "the gradient is biased"),
        (["train.py", "--device", "cuda"], "sees no CUDA device"),
        (["train.py", "--depth", "0"], "--depth 0"),
        (
            ["train.py", "--task", "countdown", "--modulus", "7"],
            "means nothing to the task countdown",
        ),
        (["train.py", "--task", "chain", "--candidates", "7"], "set by --modulus and --operations"),
        (["train.py", "--preset", "smoke", "--max-new-tokens", "500"], "--max-new-tokens 500"),
        (["eval.py"], "--checkpoint is missing"),
        (["eval.py", "--checkpoint", "nowhere.pt"], "nowhere.pt: there is no such file"),
        (["eval.py", "--checkpoint", "README.md"], "README.md is not a checkpoint"),
        (["eval.py", "--checkpoint", "x.pt", "--questions", "1"], "--questions must be at least 2"),
        (["eval.py", "--checkpoint", "x.pt", "--top-p", "0"], "--top-p above 0"),
        (["bench.py", "--rows", "9"], "multiple of --group 8"),
        (["tasks.py", "--candidates", "99"], "choose 1 to 11"),
        (["compare.py", "--arms", "grpo,nothing"], "'nothing'"),
        (["bench.py", "--what", "nothing"], "choose one of"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(words, says, tmp_path, monkeypatch, capsys):
    """Catches tracebacks, exit code 0 or 1, and files left behind by a run that never began."""
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    (tmp_path / "README.md").write_text("not a checkpoint")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        guarded(SCRIPTS[words[0].removesuffix(".py")].main)
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and says in said
        and said.startswith("error: ")
        and said.count("\n") == 1
    )
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_the_exit_code_reaches_the_shell(tmp_path):
    """Catches a script that is guarded in tests and not when run: the same through a real
    process."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--attemps", "3"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=PATIENCE,
    )
    assert (
        done.returncode == 2
        and done.stderr == "error: unknown flag '--attemps': did you mean --attempts?\n"
        and not done.stdout
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, monkeypatch, capsys):
    """Catches a --help that fails, or starts work."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        guarded(SCRIPTS[name].main)
    assert stop.value.code == 0 and "Flags" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["algebra", "answers", "latex", "mathverify", "reward", "units"])
def test_usage(name):
    """Catches a small script that stands outside of `guarded`: without its words it says how it is
    used, and that is bad input."""
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{name}.py")], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith(f"error: usage: python {name}.py ")
        and done.stderr.count("\n") == 1
    )


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
    monkeypatch.setattr(sys, "argv", ["train.py", "--attemps", "3", "--debug"])
    with pytest.raises(SystemExit) as stop:
        guarded(train.main)
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and said.startswith("Traceback")
        and said.endswith("did you mean --attempts?\n")
    )


@pytest.mark.parametrize("name", sorted({*SCRIPTS, "prompts", "pictures"} - {"tasks"}))
@pytest.mark.parametrize(
    "body, code, says",
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
def test_while_it_imports(name, body, code, says, tmp_path):
    """Catches a traceback of Ctrl-C in the seconds that importing torch takes, or without torch: a
    torch that raises stands before the real one."""
    (tmp_path / "torch.py").write_text(body)
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{name}.py")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=os.environ | dict(PYTHONPATH=str(tmp_path)),
        # a shell may have it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stderr) == (code, says)


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


@pytest.mark.parametrize(
    "closed, code, says",
    [
        ("<&-", 2, "error: standard input is closed"),
        (">&-", 2, "error: --ckpt nowhere"),
        ("2>&-", 2, ""),
    ],
)
def test_closed_streams(closed, code, says):
    """Catches a traceback (AttributeError of None) where the shell has closed a stream."""
    done = subprocess.run(
        f"{sys.executable} {ROOT / 'chat.py'} --ckpt nowhere {closed}",
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


def test_a_folder_that_takes_no_files_is_said_before_the_work(tmp_path, monkeypatch, capsys):
    """Catches minutes of a base model that then cannot be kept: nobody, not even root, can write
    into /proc."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").symlink_to("/proc")
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "smoke", "--dtype", "float32"])
    monkeypatch.setattr("pretrain.pretrain", None)
    with pytest.raises(SystemExit) as stop:
        guarded(train.main)
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and said.startswith("error: out cannot be made or written to")
        and said.count("\n") == 1
    )
