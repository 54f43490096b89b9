"""What a user sees while it runs: bars on a terminal, one line a step in a pipe, next to nothing
with --quiet; and tensorboard's copy of the log."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
import torch
from conftest import PATIENCE, ROOT, script

import train
from engine import workers as sampling_workers
from engine.workers import in_parallel
from runtime import bars
from runtime.flags import BadInput
from sample import Sampler
from tasks import opening

SHORT = (
    "train.py",
    "--preset",
    "smoke",
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--tokens",
    "20000",
    "--base-tokens",
    "60000",
    "--eval-questions",
    "32",
    "--look-questions",
    "16",
    "--eval-every",
    "2",
)
# phases of any length are worth a bar
EAGER = "import sys, bars; bars.DELAY = 0; sys.argv = sys.argv[1:]; import parallel, {0}; parallel.run({0}.main)"


def on_a_terminal(folder, *words):
    """Runs Python with these words on a pseudo-terminal -> all that it wrote there, screen and
    errors."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    # every update is drawn
    environment = os.environ | dict(
        PYTHONPATH=str(ROOT), TERM="xterm", TQDM_MININTERVAL="0", TQDM_MINITERS="1"
    )
    running = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
    )
    os.close(slave)
    seen = b""
    try:
        while piece := os.read(master, 65536):
            seen += piece
    except OSError:  # the other end is closed
        pass
    os.close(master)
    assert running.wait(timeout=PATIENCE) == 0, seen[-3000:]
    return seen.decode(errors="replace")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bars")


def test_bars_on_a_terminal(folder):
    """Catches a phase without a bar, and bars without rate and remaining time: the base, the run,
    attempts, corrections, looks and tables."""
    seen = on_a_terminal(folder, "-c", EAGER.format("train"), *SHORT, "--name", "seen")
    for name in (
        "base model",
        "seen",
        "attempts",
        "corrections",
        "held-out questions",
        "base, greedy",
        "MGRPO, temperature 1",
    ):
        assert re.search(rf"{name}: +\d+%\|[^\n]*\d+:\d\d<[^\n]*/s", seen), name
    full = re.findall(r"(?:attempts|corrections): 100%\|[^|]*\| (\d+)/(\d+)", seen)
    assert (
        full
        and all(done == total for done, total in full)
        and {total for _, total in full} == {"64", "192"}
    )
    seen = on_a_terminal(
        folder,
        "-c",
        EAGER.format("eval"),
        "eval.py",
        "--checkpoint",
        "out/seen/checkpoint.pt",
        "--questions",
        "40",
        "--samples",
        "2",
        "--dtype",
        "float32",
    )
    assert re.search(r"evaluating: +\d+%\|[^\n]* 160/160", seen)


def test_a_pipe_gets_one_line_a_step(folder):
    """Catches bars written into files, and a step without its line; and --quiet that still says
    every step, or hides the table."""
    done = subprocess.run(
        [sys.executable, str(ROOT / SHORT[0]), *SHORT[1:], "--name", "piped"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    steps = [
        json.loads(line)["step"]
        for line in (folder / "out/piped/metrics.jsonl").read_text().splitlines()
    ]
    assert (
        done.returncode == 0
        and "%|" not in done.stdout + done.stderr
        and "\r" not in done.stdout + done.stderr
    )
    assert [
        int(number) for number in re.findall(r"^ +(\d+) +\d\.\d\d ", done.stdout, re.M)
    ] == steps and len(steps) >= 3
    assert (
        len(re.findall(r"^held out, 16 questions, greedy: Acc@t1 ", done.stdout, re.M))
        == (len(steps) - 1) // 2
    )
    quiet = script(folder, *SHORT, "--name", "quiet", "--quiet")
    assert (
        not re.findall(r"^ +\d+ +\d\.\d\d ", quiet, re.M)
        and "MGRPO" in quiet
        and "out/quiet/report.html" in quiet
    )
    assert "%|" not in on_a_terminal(
        folder, str(ROOT / SHORT[0]), *SHORT[1:], "--name", "quieter", "--quiet"
    )
    lines = [
        [
            json.loads(line)
            for line in (folder / f"out/{name}/metrics.jsonl").read_text().splitlines()
        ]
        for name in ("piped", "quiet")
    ]
    clock = (
        "seconds",
        "seconds_sampling",
        "seconds_training",
        "seconds_transcripts",
        "seconds_heldout",
        "tokens_per_s",
        "peak_gb",
    )
    piped, quiet = (
        [{k: v for k, v in line.items() if k not in clock} for line in run] for run in lines
    )
    assert piped == quiet


def test_looks_change_nothing(folder):
    """Catches a look at held-out questions, or the pass for the transcripts, that moves random
    numbers or weights: the run without them is the same."""
    script(folder, *SHORT, "--name", "blind", "--look-questions", "0", "--transcripts", "0")
    script(folder, *SHORT, "--name", "looking", "--eval-every", "1", "--transcripts", "5")
    runs = [
        [
            json.loads(line)
            for line in (folder / f"out/{name}/metrics.jsonl").read_text().splitlines()
        ]
        for name in ("blind", "looking")
    ]
    looked = {k for line in runs[1] for k in line if "heldout" in k}
    assert looked == {
        f"heldout{x}{se}" for x in ("1", "2", "_fix", "_broke") for se in ("", "_se")
    } | {"seconds_heldout"} and not {k for line in runs[0] for k in line if "heldout" in k}
    loose = {
        "seconds",
        "seconds_sampling",
        "seconds_training",
        "seconds_transcripts",
        "tokens_per_s",
        "peak_gb",
        *looked,
    }
    assert [{k: v for k, v in line.items() if k not in loose} for line in runs[0]] == [
        {k: v for k, v in line.items() if k not in loose} for line in runs[1]
    ]
    assert not (folder / "out/blind/rollouts.jsonl").exists() and len(
        (folder / "out/looking/rollouts.jsonl").read_text().splitlines()
    ) == 5 * len(runs[1])
    ours, theirs = (
        torch.load(folder / f"out/{name}/checkpoint.pt", weights_only=True)["weights"]
        for name in ("blind", "looking")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_are_counted_as_they_end(gpt, random_prompts, workers, monkeypatch):
    """Catches rows counted twice or not at all, in one process and in several, and a counter that
    is left behind for the next call."""
    monkeypatch.setattr(sampling_workers, "POLL_SECONDS", 1e-4)
    sampler, seen = in_parallel(Sampler(gpt), workers), []
    for _ in range(2):
        seen.clear()
        sampler.seen = lambda rows, ended: seen.append(ended)
        sampler.generate(random_prompts, 12, [5 + i % 40 for i in range(84)])
        assert sum(seen) == 84 and min(seen) >= 0 and len([ended for ended in seen if ended]) > 3
    sampler.seen = None
    with bars.rows_of(sampler, 84, "attempts") as drawn:
        assert drawn.disable and sampler.seen is None  # in a pipe nobody counts
    assert sampler.generate(random_prompts, 12, 9).tokens.shape[0] == 84 and sum(seen) == 84


def test_a_failed_phase_leaves_no_counter(gpt, monkeypatch):
    """Catches a bar that goes on counting after the call that it belonged to was broken off."""
    sampler = Sampler(gpt)
    monkeypatch.setattr(bars, "tqdm", lambda **options: Drawn())
    with pytest.raises(ValueError), bars.rows_of(sampler, 3, "attempts"):
        assert sampler.seen is not None
        sampler.generate([], 1, 1)
    assert sampler.seen is None


class Drawn:
    """A bar on a terminal, as far as rows_of sees."""

    disable = False

    def update(self, count):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


# ---- tensorboard ---------------------------------------------------------------------------------


@pytest.mark.extra
def test_tensorboard_has_the_log(folder):
    """Catches a number of metrics.jsonl that tensorboard has not, or at another step, also when the
    run goes on from a state."""
    pytest.importorskip("tensorboard", reason="needs tensorboard (requirements-extra.txt)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script(folder, *SHORT, "--name", "board", "--tensorboard", "--save-every", "1")
    script(folder, "train.py", "--resume", "out/board", "--tokens", "30000", "--tensorboard")
    lines = [
        json.loads(line) for line in (folder / "out/board/metrics.jsonl").read_text().splitlines()
    ]
    found = EventAccumulator(str(folder / "out/board/tensorboard")).Reload()
    assert set(found.Tags()["scalars"]) == {k for line in lines for k in line}
    for name in found.Tags()["scalars"]:
        assert [(e.step, e.value) for e in found.Scalars(name)] == [
            (line["step"], pytest.approx(line[name], rel=1e-4))
            for line in lines
            if line.get(name) is not None
        ], name


def test_without_tensorboard_it_is_said_at_once(monkeypatch):
    """Catches an ImportError after the base was made."""
    monkeypatch.setattr(opening.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install tensorboard"):
        opening.validate(train.Config(tensorboard=True))
