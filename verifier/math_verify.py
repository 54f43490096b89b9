r"""Another verifier: the library math-verify (sympy), in a process of its own that can be killed.

    pip install math-verify
    python -m verifier.math_verify "\frac12" 0.5         # ANSWER GOLD

The idea. verifier.equal decides in microseconds and knows a fixed set of forms. math-verify knows
more forms, is slower by hundreds of times, and can hang: it computes 99999999! in C, where no alarm
of Python is handled. So one long-lived worker process receives an answer and a gold at a time. The
worker is killed when no reply arrives within the deadline, and the next comparison starts a new
one. A comparison without a reply is a failure of the verifier (VerifierFailed), which the run
counts; it is not a wrong answer.
"""

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from verifier.answers import LONGEST, VerifierFailed, two_arguments

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 600  # for a worker to import sympy, on a busy machine


class MathVerify:
    """A verifier for reward.score: same(answer, gold) -> bool.

    Raises VerifierFailed when there is no reply within `seconds`.
    """

    def __init__(self, seconds=5.0, command=None):
        """command: starts a worker, for tests; the default runs this file.

        Raises ImportError when math-verify is not installed.
        """
        if command is None and importlib.util.find_spec("math_verify") is None:
            raise ImportError("math-verify is not installed: pip install math-verify")
        self.seconds = seconds
        worker = [sys.executable, "-m", "verifier.math_verify", "--worker", str(seconds)]
        self.command = command or worker
        self.worker, self.owner = None, os.getpid()

    def same(self, answer, gold):
        """Whether math-verify holds the two equal.

        Only the answer is sent, never the response: math-verify would also find numbers elsewhere
        in a text. An answer longer than LONGEST is wrong unsent.
        """
        if len(answer) > LONGEST:
            return False
        # after a fork, two processes would read from one pipe
        if self.worker is None or self.owner != os.getpid():
            self.start()
        reply = self.ask(json.dumps({"answer": answer, "gold": gold}))
        if "error" in reply:
            raise VerifierFailed(f"math-verify: {reply['error']}")
        return reply["same"]

    def start(self):
        """Starts a worker and waits until its imports are done.

        The worker is a fresh interpreter and not a fork: its parent may hold a GPU and be large.
        """
        self.owner = os.getpid()
        self.worker = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd=ROOT,  # where `python -m` finds this package
        )
        self.receive(START_SECONDS)

    def ask(self, line):
        """-> the worker's reply to a line of JSON."""
        try:
            self.worker.stdin.write(line.encode() + b"\n")
        except OSError:
            self.close()
            raise VerifierFailed("math-verify's worker is dead") from None
        return self.receive(self.seconds)

    def receive(self, seconds):
        """-> the worker's next line, parsed. Kills the worker if the line is late or not JSON."""
        end, line, output = time.monotonic() + seconds, b"", self.worker.stdout.fileno()
        while not line.endswith(b"\n"):
            # A reply may come in pieces: each wait gets what is left of the time.
            ready, _, _ = select.select([output], [], [], max(0, end - time.monotonic()))
            chunk = os.read(output, 65_536) if ready else b""
            if not chunk:
                self.close()
                late = f"math-verify: no reply within {seconds:g} s"
                raise VerifierFailed("math-verify's worker died" if ready else late)
            line += chunk
        try:
            return json.loads(line)
        except ValueError:
            self.close()
            raise VerifierFailed(f"math-verify's worker wrote {line[:80]!r}") from None

    def close(self):
        """Ends the worker, if this process has one, and reaps it: no zombies."""
        if self.worker is not None and self.owner == os.getpid():
            self.worker.kill()
            self.worker.wait()
            self.worker.stdin.close()
            self.worker.stdout.close()
        self.worker = None


# ---- worker --------------------------------------------------------------------------------------


def worker_loop(seconds):
    """Reads {"answer", "gold"} a line and writes {"same"} or {"error"} a line.

    It ends with its parent: when its input ends, or, in the middle of a comparison, by an alarm of
    the kernel.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is not a reply
    import math_verify

    # The default action of an alarm ends the process, in C code too.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # Ctrl-C reaches the whole process group, but the parent may want to finish a step.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    print("{}", file=replies)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)
        try:
            reply = {"same": compare(math_verify, **json.loads(line))}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:200]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies)


def compare(math_verify, answer, gold):
    """math-verify's verdict. Its own timeouts are off: they work in the main thread only."""
    parsed, parsed_gold = (
        math_verify.parse(rf"\boxed{{{text}}}", parsing_timeout=None, raise_on_error=True)
        for text in (answer, gold)
    )
    if not parsed_gold:
        raise ValueError(f"the gold {gold[:80]!r} cannot be read")
    return bool(math_verify.verify(parsed_gold, parsed, timeout_seconds=None, raise_on_error=True))


def main():
    """Compares the two answers of the command line; with --worker, serves a MathVerify."""
    if sys.argv[1:2] == ["--worker"]:
        worker_loop(float(sys.argv[2]))
        return
    answer, gold = two_arguments(__doc__, "python -m verifier.math_verify ANSWER GOLD")
    try:
        verifier = MathVerify()
        try:
            print("equal" if verifier.same(answer, gold) else "different")
        finally:
            verifier.close()
    except (ImportError, VerifierFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
