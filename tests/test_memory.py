"""The memory plan against what torch allocates, and the ways to need less, none of which may change
a number."""

import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.packing import pad_rows, padded_logprobs
from model import CHUNK, GPT, ModelConfig, token_logprobs
from runtime.flags import guarded
from runtime.memory import (
    activations,
    block_bytes,
    cached_tokens,
    logits,
    out_of_memory,
    parameters,
    plan,
    plan_text,
    reserved,
    row_tokens,
)
from tools import memory_table

SHAPE = ModelConfig(3000, 128, 6, 4, 2, 32, 512, 600)


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that exist: `now`, at most (`peak`), and of the largest one."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak, self.largest = {}, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak, self.largest = (
                        max(self.peak, self.now),
                        max(self.largest, storage.nbytes()),
                    )
                    weakref.finalize(storage, self.gone, storage._cdata)
        return out

    def gone(self, key):
        self.now -= self.sizes.pop(key, 0)


def random_rows(rows=6, length=100):
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 3000, (2, rows, length), generator=generator).tolist()
    return pad_rows(*texts, "cpu")


@pytest.mark.parametrize("switches", [{}, dict(qk_norm=True), dict(qkv_bias=True, tied=False)])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planned_activations_are_what_is_allocated(switches, recompute, dtype):
    """Catches a term forgotten or counted twice: forward and backward of 6 x 199 tokens, measured
    by counting live tensors, must lie between 0.7 and 1.1 times the plan (fp32 lies within 10 % of
    it; in bf16 the plan is up to 30 % too careful)."""
    config = ModelConfig(**SHAPE.__dict__ | switches)
    model, tokens = GPT(config, dtype), random_rows().tokens[:, :-1]
    model.recompute = recompute
    with Live() as live:
        model(tokens).sum().backward()
    gradients = sum(4 * p.numel() for p in model.parameters() if p.grad is not None)
    planned = activations(config, 6, 199, dtype, recompute, flash=False)
    assert (
        (0.9 if dtype == torch.float32 else 0.7) * planned < live.peak - gradients < 1.1 * planned
    )


def test_recompute_needs_a_fraction():
    """Catches checkpointing that keeps everything all the same."""
    peaks = []
    for recompute in (False, True):
        model = GPT(SHAPE)
        model.recompute = recompute
        with Live() as live:
            model(random_rows().tokens).sum().backward()
        peaks.append(
            live.peak - sum(4 * p.numel() for p in model.parameters() if p.grad is not None)
        )
    assert peaks[1] < 0.3 * peaks[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("switches", [{}, dict(qk_norm=True, tied=False)])
def test_recompute_changes_nothing(switches, dtype):
    """Catches a block recomputed with other inputs, or its gradient lost: log-probabilities and all
    gradients are bit-equal."""
    torch.manual_seed(0)
    model, found = GPT(ModelConfig(**SHAPE.__dict__ | switches), dtype), []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        logp, _ = padded_logprobs(model, random_rows())
        logp.sum().backward()
        found.append((logp.detach(), [p.grad.clone() for p in model.parameters()]))
    assert torch.equal(found[0][0], found[1][0]) and all(map(torch.equal, found[0][1], found[1][1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logits_are_never_whole(dtype, temperature):
    """Catches [rows, time, vocabulary] coming into being: 3,000 tokens and 6,000 logits each are
    72 MB in fp32, of which the naive way holds three copies; here no tensor is larger than a
    chunk's, and all together stay within the plan. Log-probabilities, entropies and gradients equal
    the naive ones."""
    torch.manual_seed(0)
    config = ModelConfig(6000, 64)
    hidden, weight = (
        torch.randn(3000, 64, dtype=dtype).requires_grad_(),
        torch.randn(6000, 64).requires_grad_(),
    )
    tokens, d = torch.randint(0, 6000, (3000,)), torch.randn(3000)
    with Live() as live:
        logp, entropy = token_logprobs(hidden, weight, tokens, temperature)
        (logp * d).sum().backward()
    assert live.largest <= 4 * CHUNK * 6000 < live.peak < 1.1 * logits(config, dtype) + 8e6
    ours = logp.detach(), entropy, hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    with Live() as naive:
        z = ((hidden @ weight.to(dtype).T).float() / temperature).log_softmax(-1)
        (z.gather(1, tokens[:, None])[:, 0] * d).sum().backward()
    theirs = (
        z.gather(1, tokens[:, None])[:, 0].detach(),
        -(z.exp() * z).sum(-1).detach(),
        hidden.grad,
        weight.grad,
    )
    assert naive.peak > 2 * live.peak
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(
            mine,
            other,
            atol=1e-4 if dtype == torch.float32 else 5e-2,
            rtol=1e-4 if dtype == torch.float32 else 5e-2,
        )


# ---- the plan ------------------------------------------------------------------------------------


TINY = ModelConfig(7, 4, 1, 2, 1, 2, 3)  # V = 7, D = 4, L = 1, N = 2, K = 1, C = 2, hidden 3, tied
KNOWN = dict(
    compute=torch.bfloat16,
    prompts=2,
    group_sizes=(3, 4),
    prompt=10,
    completion=20,
    phrase=6,
    tokens_per_microbatch=5 * 64,
)


def test_every_part_of_the_plan_by_hand():
    """Catches a wrong factor: a tiny model in bf16, with every part worked out."""
    count = 7 * 4 + (4 + 4 * 8 + 4 * 4 + 4 + 4 * 6 + 3 * 4) + 4
    assert parameters(TINY) == count
    planned = plan(TINY, **KNOWN, reference=torch.bfloat16)
    for part, size in {
        "weights": 2 * count,
        "masters and gradients": 8 * count,
        "Adam": 8 * count,
        "reference": 2 * count,
        "gathered": 0,
    }.items():
        assert planned[part] == size, part
    a_token = 2 * 1 * 1 * 2 * 2  # keys and values, L, K, C, bytes
    assert planned["KV cache"] == cached_tokens(2, (3, 4), 10, 20, 6) * a_token
    numbers = 4 * 4 + 4 * 4 + 3 * 2 + 4 * 3
    assert block_bytes(TINY, 5, 8, torch.bfloat16) == 5 * 8 * 2 * numbers
    assert "of 80" in plan_text(planned, 80e9)
    later = ("Adam", "activations", "logits")
    assert reserved(planned) == 4 * count + sum(planned[part] for part in later)


@pytest.mark.parametrize(
    "sizes, longest, cached, copied",
    [
        ((5,), 10 + 20, 2 * 10 + 10 * 20, 2 * 10 + 10 * 30),
        (
            (3, 4),
            10 + 20 + 6 + 20,
            2 * 10 + 6 * 20 + 6 * (20 + 6) + 24 * 20,
            2 * 10 + 6 * 30 + 6 * 36 + 24 * 56,
        ),
        (
            (3, 4, 2),
            10 + 3 * 20 + 2 * 6,
            2 * 10 + 6 * 20 + 6 * (20 + 6) + 24 * 20 + 24 * (20 + 6) + 48 * 20,
            2 * 10 + 6 * 30 + 6 * 36 + 24 * 56 + 24 * 62 + 48 * 82,
        ),
    ],
)
def test_tokens_of_one_two_and_three_layers(sizes, longest, cached, copied):
    """Catches a plan for two layers only: the longest row, and the tokens whose keys exist, on CUDA
    and with the copies of a CPU."""
    assert row_tokens(len(sizes), 10, 20, 6) == longest
    assert cached_tokens(2, sizes, 10, 20, 6) == cached
    assert cached_tokens(2, sizes, 10, 20, 6, "cpu") == copied


def test_the_cache_gets_half_of_what_the_rest_leaves():
    """Catches a cache that is planned beyond the device, and a limit of the flags overruled."""
    whole = plan(TINY, **KNOWN, reference=torch.bfloat16)
    rest = sum(whole.values()) - whole["KV cache"]
    tight = plan(TINY, **KNOWN, reference=torch.bfloat16, total=rest + 100)
    assert tight == whole | {"KV cache": 50}
    assert plan(TINY, **KNOWN, cache_tokens=100, total=1)["KV cache"] == 100 * 8
    cpu = plan(TINY, **KNOWN, device="cpu")
    copied = cached_tokens(2, (3, 4), 10, 20, 6, "cpu")
    assert cpu["KV cache"] == 2 * copied * 8 and cpu["activations"] > whole["activations"]
    wide = plan(TINY, **KNOWN | dict(compute=torch.float32))
    assert wide["activations"] > 2 * whole["activations"]


def test_each_of_eight_ranks_plans_for_its_part():
    """Catches a plan that counts whole masters on every rank, or forgets what is gathered."""
    shape = memory_table.SHAPES["Qwen2.5-Math-7B"]
    known = KNOWN | dict(prompts=32, prompt=512, completion=1024, reference=torch.bfloat16)
    one, eight = plan(shape, **known), plan(shape, **known, ranks=8)
    for part in ("masters and gradients", "Adam", "KV cache"):
        assert eight[part] == one[part] // 8, part
    embeddings = 2 * 2 * shape.vocab_size * shape.width
    slices = (one["reference"] - embeddings) / 8 + embeddings
    assert eight["reference"] == pytest.approx(slices, rel=1e-3)
    assert eight["weights"] == one["weights"]
    assert one["gathered"] == 0 and 5e9 < eight["gathered"] < 15e9


def test_the_table_of_the_docs(monkeypatch, capsys):
    """Catches a table in the docs that its command does not print, or shapes that are not those
    models': parameters as published, in billions."""
    shapes = memory_table.SHAPES.items()
    assert {name: round(parameters(shape) / 1e9, 2) for name, shape in shapes} == {
        "Qwen2.5-0.5B": 0.49,
        "Llama-3.2-1B": 1.24,
        "Qwen2.5-Math-1.5B": 1.54,
        "Qwen3-4B": 4.02,
        "Qwen2.5-Math-7B": 7.62,
    }
    for words, lines in (
        ([], 2 + 3 * 4 + 2 * 2),  # two of the models cannot hold 4,096 tokens twice
        (["--group-sizes", "4,3,2"], 2 + 3 * 2 + 2),
    ):
        monkeypatch.setattr(sys, "argv", ["memory_table.py", *words])
        memory_table.main()
        table = capsys.readouterr().out.splitlines()
        assert len(table) == lines and len({line.count("|") for line in table}) == 1
        if not words:
            docs = (Path(__file__).parents[1] / "docs" / "memory.md").read_text()
            assert "\n".join(table) in docs, "python -m tools.memory_table"
    monkeypatch.setattr(sys, "argv", ["memory_table.py", "--tokens-per-microbatch", "0"])
    with pytest.raises(SystemExit) as stop:
        guarded(memory_table.main)
    assert stop.value.code == 2 and "of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0"),
        MemoryError("no"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_out_of_memory_names_the_plan_and_three_flags(error):
    """Catches a message without a remedy."""
    text = str(out_of_memory(plan(TINY, **KNOWN), error, 80e9))
    for flag in ("--tokens-per-microbatch", "--max-new-tokens", "--cache-tokens"):
        assert flag in text
    assert "memory, GB" in text and "of 80" in text and "\n" not in text


def test_what_is_reserved_is_not_the_caches(monkeypatch, gpt):
    """Catches a cache that takes what Adam will need after the first rollout: on CUDA half of the
    free memory, less what is reserved."""
    from engine.cuda_cache import measured_limit
    from sample import Sampler

    sampler = Sampler(gpt)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (30_000_000, 99_000_000))
    bytes_a_token = 2 * 3 * 2 * 16 * 4
    assert measured_limit(gpt, [1, 2, 3], 10_000_000) == int(0.5 * 20_000_000) // bytes_a_token
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (9_000_000, 99_000_000))
    sampler.pool.limit = measured_limit(gpt, [1, 2, 3], 10_000_000)
    # which train.py and eval.py turn into the plan
    with pytest.raises(MemoryError, match="do not fit a cache of 0 tokens"):
        sampler.generate([[1, 2, 3]], 2, 5)
