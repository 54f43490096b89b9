"""The library math-verify in a process that can be killed. Workers of a few lines replace the
library where it is not installed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT

from reward import Makes, score
from verifier import math_verify
from verifier.answers import LONGEST, VerifierFailed
from verifier.math_verify import MathVerify

ECHO = """
import json, sys, time
print("{}", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["answer"] == "hang":
        time.sleep(60)
    if asked["answer"] == "die":
        sys.exit(1)
    if asked["answer"] == "babble":
        print("not JSON", flush=True)
    if asked["answer"] == "break":
        print(json.dumps({"error": "broken"}), flush=True)
        continue
    print(json.dumps({"same": asked["answer"] == asked["gold"]}), flush=True)
"""


@pytest.fixture
def fake():
    """A verifier whose worker compares strings, and misbehaves when asked to."""
    verifier = MathVerify(seconds=PATIENCE, command=[sys.executable, "-c", ECHO])
    yield verifier
    verifier.close()


def is_alive(pid):
    """Whether a process is there, as a zombie or otherwise."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_missing_library_is_refused_at_once(monkeypatch):
    """Catches an error in the middle of a run instead of one sentence with the remedy."""
    monkeypatch.setattr(math_verify.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install math-verify"):
        MathVerify()


def test_one_worker_compares_many(fake):
    """Catches a new process for every comparison, and replies that belong to another question."""
    assert fake.same("5", "5") and not fake.same("6", "5")
    pid = fake.worker.pid
    assert [fake.same(str(i % 3), "1") for i in range(30)] == [i % 3 == 1 for i in range(30)]
    assert fake.worker.pid == pid


@pytest.mark.parametrize("trouble", ["hang", "die", "babble"])
def test_a_bad_worker_is_killed_and_replaced(fake, trouble):
    """Catches a run that hangs, a zombie, and a verifier that stays broken afterwards."""
    assert fake.same("5", "5")
    pid, fake.seconds = fake.worker.pid, 0.3 if trouble == "hang" else PATIENCE
    with pytest.raises(VerifierFailed):
        fake.same(trouble, "5")
    fake.seconds = PATIENCE
    assert fake.worker is None and not is_alive(pid)
    assert fake.same("5", "5") and fake.worker.pid != pid


def test_an_error_in_the_library_is_a_failure(fake):
    """Catches errors reported as wrong answers."""
    with pytest.raises(VerifierFailed, match="math-verify: broken"):
        fake.same("break", "5")


def test_only_the_answer_is_sent(fake, monkeypatch):
    """Catches a whole response, a long answer or a Countdown gold sent to the worker."""
    sent = []
    monkeypatch.setattr(fake, "ask", lambda line: sent.append(line) or {"same": True})
    monkeypatch.setattr(fake, "start", lambda: None)
    score(r"secret \boxed{42} secret", "5", 0, fake)
    assert sent == ['{"answer": "42", "gold": "5"}']
    assert not fake.same("9" * (LONGEST + 1), "5")
    assert score("<answer>3*8</answer>", Makes(24, (3, 8)), 0, fake).accuracy == 1
    assert score("5", "5", 0, fake).accuracy == 0  # no answer
    assert len(sent) == 1


def test_close_ends_the_worker(fake):
    """Catches workers left behind by a run that has ended."""
    fake.same("5", "5")
    pid = fake.worker.pid
    fake.close()
    fake.close()
    assert not is_alive(pid)


def test_the_worker_ends_with_its_parent():
    """Catches an orphan: the worker must end when its input does."""
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from verifier.math_verify import MathVerify\n"
        f"v = MathVerify(5, [sys.executable, '-c', {ECHO!r}]); v.same('5', '5'); "
        "print(v.worker.pid, flush=True); import os; os._exit(0)"
    )
    command = [sys.executable, "-c", script]
    pid = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    end = time.monotonic() + PATIENCE
    # an orphan is reaped by init, which may take a while
    while is_alive(pid) and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < end, "the worker is still there"
        time.sleep(0.05)


@pytest.mark.extra
@pytest.mark.slow
def test_the_library_decides(tmp_path, monkeypatch):
    """Catches a gold or an answer that does not reach the library whole, and a worker that starts
    in one folder only."""
    pytest.importorskip("math_verify")
    monkeypatch.chdir(tmp_path)
    verifier = MathVerify()
    for answer, gold, expected in (
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{3}", "0.5", False),
        ("(x+1)^2", "x^2+2x+1", True),
        ("2,1", "1,2", True),
    ):
        assert verifier.same(answer, gold) == expected, answer
    verifier.close()


@pytest.mark.extra
@pytest.mark.slow
def test_a_library_that_hangs_is_killed():
    """Catches a factorial that is computed in C, where no alarm of Python is handled."""
    pytest.importorskip("math_verify")
    verifier = MathVerify(seconds=PATIENCE)
    assert verifier.same("5", "5")
    pid, verifier.seconds = verifier.worker.pid, 1
    with pytest.raises(VerifierFailed, match="no reply"):
        verifier.same("99999999!", "5")
    verifier.seconds = PATIENCE
    assert not is_alive(pid) and verifier.same("5", "5")
    verifier.close()
