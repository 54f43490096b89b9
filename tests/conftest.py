"""What several tests need: a small random model, its encoding, and where the optional shared data lies."""
from pathlib import Path

import pytest
import torch

from model import GPT, ModelConfig
from tokenizer import build_encoding

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def encoding():
    return build_encoding()


@pytest.fixture
def gpt():
    """A random fp32 GPT whose embeddings are large enough for its predictions to differ (an untrained one is nearly uniform)."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=370, width=64, depth=3, heads=4, kv_heads=2, head_size=16, hidden=96, context=256))
    with torch.no_grad():
        model.embed.weight.mul_(12)
    return model


@pytest.fixture
def random_prompts():
    """Prompts of different lengths, random tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 369, (length,), generator=generator).tolist() for length in (3, 17, 9, 1, 24, 12, 5)]
