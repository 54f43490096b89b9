"""What a user sees while it runs: bars on a terminal, one line a step in a pipe."""

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
from conftest import PATIENCE, ROOT, command

from engine import workers as sampling_workers
from engine.workers import in_parallel
from runtime import log
from sample import Sampler

SHORT = (
    *("train.py", "--preset", "smoke", "--dtype", "float32", "--device", "cpu"),
    *("--tokens", "50000", "--base-tokens", "60000"),
    *("--eval-questions", "32", "--eval-every", "2"),
)
ROWS = 16 * (4 + 4 * 3)  # of a step of --preset smoke
# Phases of any length are worth a bar.
EAGER = (
    "import sys; from runtime import distributed, log; log.BAR_DELAY = 0; "
    "sys.argv = sys.argv[1:]; import {0}; distributed.run({0}.main)"
)


def on_a_terminal(folder, *words):
    """Runs Python with these words on a pseudo-terminal -> all that it wrote there, screen and
    errors."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    # Every update is drawn.
    environment = os.environ | dict(
        PYTHONPATH=str(ROOT), TERM="xterm", TQDM_MININTERVAL="0", TQDM_MINITERS="1"
    )
    streams = dict(stdin=slave, stdout=slave, stderr=slave)
    process = subprocess.Popen([sys.executable, *words], cwd=folder, env=environment, **streams)
    os.close(slave)
    output = b""
    try:
        while piece := os.read(master, 65536):
            output += piece
    except OSError:  # the other end is closed
        pass
    os.close(master)
    assert process.wait(timeout=PATIENCE) == 0, output[-3000:]
    return output.decode(errors="replace")


def lines_of(folder, name):
    """The steps of a run's log."""
    text = (folder / f"out/{name}/metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bars")


@pytest.mark.slow
def test_a_terminal_shows_a_bar_for_every_phase(folder):
    """Catches a phase without a bar, and bars without rate and remaining time: the base, the run,
    rollouts, quick evaluations and tables; and rows counted wrongly in a bar."""
    output = on_a_terminal(folder, "-c", EAGER.format("train"), *SHORT, "--name", "drawn")
    for name in (
        *("base model", "drawn", "rollout", "held-out questions"),
        *("base, greedy", "MGRPO, temperature 1"),
    ):
        assert re.search(rf"{name}: +\d+%\|[^\n]*\d+:\d\d<[^\n]*/s", output), name
    full = re.findall(r"rollout: 100%\|[^|]*\| (\d+)/(\d+)", output)
    assert full and set(full) == {(str(ROWS), str(ROWS))}
    output = on_a_terminal(
        folder,
        *("-c", EAGER.format("eval"), "eval.py", "out/drawn", "--dtype", "float32"),
        *("--questions", "40", "--samples", "2"),
    )
    assert re.search(r"temperature 1: +\d+%\|[^\n]* 160/160", output)


@pytest.mark.slow
@pytest.mark.parametrize("disabled", [False, True])
def test_an_environment_variable_turns_bars_off(folder, disabled, monkeypatch):
    """Catches TQDM_DISABLE=1, the successor of --quiet, without effect on a terminal."""
    if disabled:
        monkeypatch.setenv("TQDM_DISABLE", "1")
    code = "from runtime import log; bar = log.bar(9, 'run', 'tok'); bar.update(9); "
    output = on_a_terminal(folder, "-c", code + "bar.close(); log.say('a line')")
    assert "a line" in output and ("%|" in output) == (not disabled)


@pytest.mark.slow
def test_a_pipe_gets_one_line_a_step(folder):
    """Catches bars written into files, and a step without its line."""
    done = subprocess.run(
        command(*SHORT, "--name", "piped"),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "%|" not in done.stdout + done.stderr and "\r" not in done.stdout + done.stderr
    lines = lines_of(folder, "piped")
    printed = re.findall(r"^ +(\d+) +\d\.\d\d ", done.stdout, re.M)
    assert [int(number) for number in printed] == [line["step"] for line in lines]
    assert len(lines) >= 3
    evaluations = re.findall(r"^held out, 32 questions, greedy: Acc@t1 ", done.stdout, re.M)
    assert len(evaluations) == len([line for line in lines if "heldout1" in line]) > 0


@pytest.mark.slow
def test_quick_evaluations_and_transcripts_change_nothing(folder):
    """Catches an evaluation, or the writing of trees, that moves random numbers or weights: the run
    with few of them is the run with many."""
    runs = dict(
        few=("--eval-every", "1000", "--transcripts", "0"),
        many=("--eval-every", "1", "--transcripts", "5"),
    )
    logs, weights = {}, {}
    for name, options in runs.items():
        subprocess.run(
            command(*SHORT[:-2], *options, "--name", name),
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=PATIENCE,
            env=os.environ | dict(PYTHONPATH=str(ROOT)),
        )
        logs[name] = lines_of(folder, name)
        checkpoint = torch.load(folder / f"out/{name}/checkpoint.pt", weights_only=True)
        weights[name] = checkpoint["weights"]
    heldout = {key for line in logs["many"] for key in line if "heldout" in key}
    kinds = ("1", "2", "_fix2", "_broke2")
    assert heldout >= {f"heldout{kind}{se}" for kind in kinds for se in ("", "_se")}
    assert not any("heldout" in key for key in logs["few"][0])
    clocks = {key for line in logs["many"] for key in line if key.startswith("seconds")}
    ignored = {*heldout, *clocks, "tokens_per_s", "peak_gb"}
    few, many = (
        [{k: v for k, v in line.items() if k not in ignored} for line in logs[name]]
        for name in ("few", "many")
    )
    assert few == many
    assert not (folder / "out/few/rollouts.jsonl").exists()
    trees = (folder / "out/many/rollouts.jsonl").read_text().splitlines()
    assert len(trees) == 5 * len(many)
    for name, weight in weights["few"].items():
        assert torch.equal(weight, weights["many"][name]), name


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_are_counted_as_they_end(gpt, random_prompts, workers, monkeypatch):
    """Catches rows counted twice or not at all, in one process and in several, and a counter that
    is left behind for the next call."""
    monkeypatch.setattr(sampling_workers, "POLL_SECONDS", 1e-4)
    sampler, counts = in_parallel(Sampler(gpt), workers), []
    for _ in range(2):
        counts.clear()
        sampler.seen = lambda rows, ended: counts.append(ended)
        sampler.generate(random_prompts, 12, [5 + i % 40 for i in range(84)])
        assert sum(counts) == 84 and min(counts) >= 0
        assert len([ended for ended in counts if ended]) > 3
    sampler.seen = None
    with log.bar_of_rows(sampler, 84, "rollout"):
        assert sampler.seen is None  # in a pipe rows are not counted
    assert sampler.generate(random_prompts, 12, 9).tokens.shape[0] == 84 and sum(counts) == 84


def test_a_failed_phase_leaves_no_counter(gpt, monkeypatch):
    """Catches a bar that goes on counting after the call that it belonged to was broken off."""
    sampler = Sampler(gpt)
    monkeypatch.setattr(log, "tqdm", lambda **options: Drawn())
    with pytest.raises(ValueError), log.bar_of_rows(sampler, 3, "rollout"):
        assert sampler.seen is not None
        sampler.generate([], 1, 1)
    assert sampler.seen is None


class Drawn:
    """A bar on a terminal, as far as bar_of_rows sees."""

    disable = False

    def update(self, count):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass
