"""The memory plan against what torch allocates, and the ways to need less: none of them may change
a number."""

import copy
import gc
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from mgrpo import completion_logprobs, pad_rows
from model import CHUNK, GPT, ModelConfig, token_logprobs
from runtime import memory
from runtime.flags import BadInput, guarded
from runtime.memory import (
    HostAdamW,
    activations,
    block_bytes,
    kv_tokens,
    logits,
    on_device,
    parameters,
    plan,
    plan_text,
)
from tasks import opening
from tasks.tokenizer import build_encoding

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
        logp, _ = completion_logprobs(model, random_rows())
        logp.sum().backward()
        found.append((logp.detach(), [p.grad.clone() for p in model.parameters()]))
    assert torch.equal(found[0][0], found[1][0]) and all(map(torch.equal, found[0][1], found[1][1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logits_are_never_whole(dtype, temperature):
    """Catches [rows, time, vocabulary] coming into being: 3,000 tokens and 20,000 logits each are
    240 MB in fp32, of which the naive way holds three copies; here no tensor is larger than a
    chunk's, and all together stay within the plan. Log-probabilities, entropies and gradients equal
    the naive ones."""
    torch.manual_seed(0)
    config = ModelConfig(20_000, 64)
    hidden, weight = (
        torch.randn(3000, 64, dtype=dtype).requires_grad_(),
        torch.randn(20_000, 64).requires_grad_(),
    )
    tokens, d = torch.randint(0, 20_000, (3000,)), torch.randn(3000)
    with Live() as live:
        logp, entropy = token_logprobs(hidden, weight, tokens, temperature)
        (logp * d).sum().backward()
    assert live.largest <= 4 * CHUNK * 20_000 < live.peak < 1.1 * logits(config, dtype) + 8e6
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


# ---- the optimiser -------------------------------------------------------------------------------


def test_adam_on_the_host_is_adam():
    """Catches a step lost on the way: ten steps with a changing learning rate give the very weights
    of torch's AdamW, and parameters without a gradient stay. The masters are copies: nothing of the
    optimiser's is the model's."""
    torch.manual_seed(0)
    ours, theirs = GPT(ModelConfig(50, 32, 2, 2, 1, 16, 32, 64)), None
    theirs = copy.deepcopy(ours)
    optimizers = (
        HostAdamW(ours.parameters(), 0.01, weight_decay=0.0),
        torch.optim.AdamW(theirs.parameters(), 0.01, weight_decay=0.0, fused=True),
    )
    for step in range(10):
        tokens = torch.randint(0, 50, (3, 9))
        for model, optimizer in zip((ours, theirs), optimizers):
            optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
            model(tokens).square().sum().backward()
            if step == 5:
                model.embed.weight.grad = None
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    storages = {p.untyped_storage().data_ptr() for p in ours.parameters()}
    assert not storages & {m.untyped_storage().data_ptr() for m in optimizers[0].masters}


class OnCuda(torch.nn.Parameter):
    """A parameter that says it is on a device."""

    is_cuda = True


def test_pinned_memory_is_what_is_planned(monkeypatch):
    """Catches host memory beyond the plan: torch's pinned allocator, here a stand-in that counts,
    rounds each block up to a power of two. What is locked is 8 of the 16 planned bytes a parameter,
    in one piece that holds masters and gradients, and let go of in the end."""
    taken, locked, empty = [], {}, torch.empty

    def allocate(*shape, pin_memory=False, **options):
        made = empty(*shape, **options)
        taken.append(1 << (made.nbytes - 1).bit_length() if pin_memory else made.nbytes)
        return made

    cudart = SimpleNamespace(
        cudaHostRegister=lambda at, size, flags: locked.update({at: size}),
        cudaHostUnregister=locked.pop,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    model = GPT(SHAPE)
    planned = plan(
        SHAPE,
        compute=torch.bfloat16,
        tokens=999,
        prompts=1,
        attempts=1,
        corrections=1,
        prompt=9,
        completion=9,
        offload=True,
    )["host"]
    monkeypatch.setattr(torch, "empty", allocate)
    optimizer = HostAdamW([OnCuda(p.detach()) for p in model.parameters()], 0.01)
    monkeypatch.undo()
    assert sum(taken) == planned // 2 == sum(locked.values())
    ((first, size),) = locked.items()
    assert all(
        first <= x.data_ptr() and x.data_ptr() + x.nbytes <= first + size
        for x in (*optimizer.masters, *optimizer.grads)
    )
    assert len({x.data_ptr() for x in (*optimizer.masters, *optimizer.grads)}) == 2 * len(
        optimizer.masters
    )
    assert all(map(torch.equal, optimizer.masters, model.parameters()))
    del optimizer
    gc.collect()
    assert not locked


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_takes_what_the_device_gives():
    """Catches an optimiser whose state stays on the device: a step on CUDA allocates nothing there
    that lasts."""
    model = GPT(SHAPE).cuda()
    optimizer = HostAdamW(model.parameters(), 0.01)
    model(random_rows().tokens.cuda()).sum().backward()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.memory_allocated() == before and all(
        m.device.type == "cpu" and m.is_pinned() for m in (*optimizer.masters, *optimizer.grads)
    )


# ---- the plan ------------------------------------------------------------------------------------


def test_the_plan_by_hand():
    """Catches a wrong factor: a model with D = 4, N = 2, K = 1, C = 2, L = 1, hidden 3, V = 7,
    tied, in bf16, with every part worked out."""
    c = ModelConfig(7, 4, 1, 2, 1, 2, 3)
    count = 7 * 4 + (4 + 4 * 8 + 4 * 4 + 4 + 4 * 6 + 3 * 4) + 4
    assert parameters(c) == count
    p = plan(
        c,
        compute=torch.bfloat16,
        tokens=5 * 64,
        prompts=2,
        attempts=3,
        corrections=4,
        prompt=10,
        completion=20,
        reference=True,
    )
    assert (p["weights"], p["masters and gradients"], p["Adam"], p["reference"], p["host"]) == (
        2 * count,
        8 * count,
        8 * count,
        2 * count,
        0,
    )
    tokens = 2 * 10 + 6 * 20 + 6 * (20 + memory.PHRASE) + 24 * 20
    assert (
        kv_tokens(2, 3, 4, 10, 20) == tokens
        and kv_tokens(2, 3, 4, 10, 20, layers=1) == 2 * 10 + 6 * 20
    )
    assert p["KV cache"] == tokens * 2 * 1 * 1 * 2 * 2
    assert block_bytes(c, 5, 8, torch.bfloat16) == 5 * 8 * 2 * (6 * 4 + 4 * 4 + 3 * 2 + 4 * 3)
    away = plan(
        c,
        compute=torch.bfloat16,
        tokens=5 * 64,
        prompts=2,
        attempts=3,
        corrections=4,
        prompt=10,
        completion=20,
        offload=True,
        cache_tokens=100,
    )
    assert away["Adam"] == 0 and away["host"] == 16 * count and away["KV cache"] == 100 * 8
    tight = plan(
        c,
        compute=torch.bfloat16,
        tokens=5 * 64,
        prompts=2,
        attempts=3,
        corrections=4,
        prompt=10,
        completion=20,
        reference=True,
        total=sum(p.values()) + 100 - p["KV cache"],
    )
    assert tight["KV cache"] == 50 and {k: v for k, v in tight.items() if k != "KV cache"} == {
        k: v for k, v in p.items() if k != "KV cache"
    }
    assert (
        on_device(p) == sum(p.values())
        and "on the host" in plan_text(away, 1e9)
        and "of 80" in plan_text(p, 80e9)
    )
    cpu = plan(
        c,
        compute=torch.bfloat16,
        tokens=5 * 64,
        prompts=2,
        attempts=3,
        corrections=4,
        prompt=10,
        completion=20,
        device="cpu",
    )
    assert cpu["KV cache"] == 2 * p["KV cache"] and cpu["activations"] > p["activations"]
    assert (
        plan(
            c,
            compute=torch.float32,
            tokens=5 * 64,
            prompts=2,
            attempts=3,
            corrections=4,
            prompt=10,
            completion=20,
        )["activations"]
        > 2 * p["activations"]
    )


def test_the_readmes_table(monkeypatch, capsys):
    """Catches a table that no command prints, or shapes that are not those models': parameters as
    published, in billions."""
    billions = {name: round(parameters(shape) / 1e9, 2) for name, shape in memory.SHAPES.items()}
    assert billions == {
        "Qwen2.5-0.5B": 0.49,
        "Llama-3.2-1B": 1.24,
        "Qwen2.5-Math-1.5B": 1.54,
        "Qwen3-4B": 4.02,
        "Qwen2.5-Math-7B": 7.62,
    }
    monkeypatch.setattr(sys, "argv", ["memory.py"])
    memory.main()
    rows = capsys.readouterr().out.splitlines()
    # two of them cannot hold 4,096 twice
    assert len(rows) == 2 + 4 * 3 + 2 * 2 and len({row.count("|") for row in rows}) == 1
    monkeypatch.setattr(sys, "argv", ["memory.py", "--tokens-per-microbatch", "0"])
    with pytest.raises(SystemExit):
        guarded(memory.main)


def test_out_of_memory_is_one_sentence_with_three_flags(tmp_path, monkeypatch):
    """Catches a traceback of an allocator: the plan, and the flags to lower, whichever way memory
    ends."""
    monkeypatch.chdir(tmp_path)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0"),
        MemoryError("no"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 "
            "bytes."
        ),
    ):
        monkeypatch.setattr(
            train, "rollouts_and_steps", lambda *_, error=error: (_ for _ in ()).throw(error)
        )
        monkeypatch.setattr(
            train, "prepare", lambda c: opening.Setup(c, build_encoding(), None, SHAPE, None, None)
        )
        with pytest.raises(BadInput) as said:
            train.train(train.Config(name="r", max_new_tokens=9, dtype="float32", device="cpu"))
        text = str(said.value)
        assert (
            all(
                flag in text
                for flag in ("--tokens-per-microbatch", "--max-new-tokens", "--cache-tokens")
            )
            and "memory, GB" in text
            and "\n" not in text
            and " of " in text
        )
    monkeypatch.setattr(
        train, "rollouts_and_steps", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes differ"))
    )
    with pytest.raises(RuntimeError, match="shapes differ"):
        train.train(train.Config(name="r2", max_new_tokens=9, dtype="float32", device="cpu"))


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
