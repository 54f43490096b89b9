"""What several tests need: a small random model, its encoding, scripts run as a user runs them, and
where optional data lies."""

import os
import subprocess
import sys
from pathlib import Path

# Before torch is imported, here and in scripts: with two threads and both cores taken by other
# programs, the library of matrix products rounds sums in another order now and then, and runs that
# are compared bit by bit differ in their last digits. (On one thread it never does.)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it once

from model import GPT, ModelConfig
from tasks.tokenizer import build_encoding

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
# seconds after which a test takes something for hung; never how fast it should be, as the machine
# may be busy
PATIENCE = 1800
VOCABULARY = build_encoding().n_vocab
END = build_encoding().eot_token


def command(*words):
    """The command line of a script: train.py or eval.py by path, tools.chat and others by module."""
    return [
        sys.executable,
        *([str(ROOT / words[0])] if words[0].endswith(".py") else ["-m", words[0]]),
        *words[1:],
    ]


def script(cwd, *words, threads=1):
    """Runs a script in a process of its own, in folder cwd -> what it printed."""
    done = subprocess.run(
        command(*words),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=os.environ | dict(OMP_NUM_THREADS=str(threads), PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="session")
def encoding():
    return build_encoding()


@pytest.fixture
def gpt():
    """A random fp32 GPT whose embeddings are large enough for its predictions to differ (an
    untrained one is nearly uniform)."""
    torch.manual_seed(0)
    model = GPT(
        ModelConfig(
            VOCABULARY,
            width=64,
            depth=3,
            heads=4,
            kv_heads=2,
            head_size=16,
            hidden=96,
            context=256,
            end_tokens=(END,),
        )
    )
    with torch.no_grad():
        model.embed.weight.mul_(12)
    return model


@pytest.fixture
def random_prompts():
    """Prompts of different lengths, random tokens."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, END, (length,), generator=generator).tolist()
        for length in (3, 17, 9, 1, 24, 12, 5)
    ]
