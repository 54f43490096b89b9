r"""Another verifier: the library math-verify (sympy), in a process of its own that can be killed.

    pip install math-verify
    python mathverify.py "\frac12" 0.5         # answer, gold -> same

The idea. reward.py decides in microseconds and knows a fixed set of forms; math-verify knows more
of them, and is slower by hundreds of times and can hang: 99999999! is computed in C, where no
Python alarm is heard. Hence one long-lived worker that is sent an answer and a gold, and is killed
when it has not replied within the deadline; the next comparison starts a new one. That comparison
is a failure of the verifier (VerifierFailed), which the run counts, not a wrong answer.

- The worker is a fresh interpreter, not a fork: its parent may hold a GPU and be large. It speaks
JSON, a line for a line.
- It is sent the answer, in \boxed{...}, never the response: what math-verify would find elsewhere
in a text is not the answer.
- It ends with its parent: at the end of its input, and by the kernel's alarm should it be in the
middle of a comparison.
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

from reward import LONGEST, VerifierFailed
from runtime.flags import BadInput, guarded

STARTING = 600  # seconds for a worker to import what it needs


class MathVerify:
    """A verifier for reward.score: same(answer, gold) -> bool, VerifierFailed when there is no
    reply within `seconds`."""

    def __init__(self, seconds=5.0, command=None):
        """command: how to start a worker, for tests; the default is this file. BadInput when
        math-verify is not installed."""
        if command is None and importlib.util.find_spec("math_verify") is None:
            raise BadInput("the verifier math-verify needs its library: pip install math-verify")
        self.seconds = seconds
        self.command = command or [
            sys.executable,
            str(Path(__file__).resolve()),
            "--worker",
            str(seconds),
        ]
        self.worker, self.owner = None, os.getpid()

    def same(self, answer, gold):
        """Whether math-verify takes the two for equal. An answer too long to be one is wrong
        unsent."""
        if len(answer) > LONGEST:
            return False
        # a fork must not talk over its parent's pipe
        if self.worker is None or self.owner != os.getpid():
            self.start()
        reply = self.ask(json.dumps({"answer": answer, "gold": gold}))
        if "error" in reply:
            raise VerifierFailed(f"math-verify: {reply['error']}")
        return reply["same"]

    def start(self):
        """A worker that has imported everything and waits."""
        self.owner = os.getpid()
        self.worker = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        self.receive(STARTING)

    def ask(self, line):
        """-> the worker's reply to a line."""
        try:
            self.worker.stdin.write(line.encode() + b"\n")
        except OSError:
            self.close()
            raise VerifierFailed("math-verify's worker is dead") from None
        return self.receive(self.seconds)

    def receive(self, seconds):
        """The worker's next line. When it does not come in time, or is none, the worker is
        killed."""
        end, line, output = time.monotonic() + seconds, b"", self.worker.stdout.fileno()
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([output], [], [], max(0, end - time.monotonic()))
            piece = os.read(output, 65_536) if ready else b""
            if not piece:
                self.close()
                raise VerifierFailed(
                    "math-verify's worker died"
                    if ready
                    else f"math-verify: no reply within {seconds:g} s"
                )
            line += piece
        try:
            return json.loads(line)
        except ValueError:
            self.close()
            raise VerifierFailed(f"math-verify's worker said {line[:80]!r}") from None

    def close(self):
        """Ends the worker, if this process has one, and waits for its end: no zombies."""
        if self.worker is not None and self.owner == os.getpid():
            self.worker.kill()
            self.worker.wait()
            self.worker.stdin.close()
            self.worker.stdout.close()
        self.worker = None


# ---- worker --------------------------------------------------------------------------------------


def work(seconds):
    """The worker: reads {"answer", "gold"} a line, writes {"same"} or {"error"} a line, until its
    input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no reply
    import math_verify

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # a stop is the parent's business, which may want to finish a step
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    print("{}", file=replies)
    for line in sys.stdin:
        # its default action ends the process, in C code too
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)
        try:
            reply = {"same": compare(math_verify, **json.loads(line))}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:200]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies)


def compare(math_verify, answer, gold):
    """math-verify's verdict; its own timeouts are off, as only the main process can enforce one."""
    parsed, wanted = (
        math_verify.parse(rf"\boxed{{{text}}}", parsing_timeout=None, raise_on_error=True)
        for text in (answer, gold)
    )
    if not wanted:
        raise ValueError(f"the gold {gold[:80]!r} cannot be read")
    return bool(math_verify.verify(wanted, parsed, timeout_seconds=None, raise_on_error=True))


def main():
    if len(sys.argv) != 3:
        raise BadInput("usage: python mathverify.py ANSWER GOLD")
    else:
        verifier = MathVerify()
        try:
            print("same" if verifier.same(*sys.argv[1:]) else "different")
        except VerifierFailed as error:
            raise BadInput(f"undecided: {error}") from None
        finally:
            verifier.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(float(sys.argv[2]))
    else:
        guarded(main)
