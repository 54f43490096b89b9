"""Every Triton kernel against its torch reference, interpreted on a CPU or run on CUDA; and
compiled ahead of time for sm_80 and sm_90.

conftest.py switches Triton's interpreter on before anything imports triton, unless there is a CUDA
device.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import END, PATIENCE, ROOT, VOCABULARY
from test_sample import choose_torch, seated, worst_gap

from engine import kernels, keys
from engine.cuda_graphs import StepGraphs
from engine.keys import exponential_from_bits, exponential_noise, position_keys, row_keys, tl
from engine.packing import pad_rows, padded_logprobs
from model import GPT, ModelConfig
from sample import Sampler

# the interpreter computes masked places too
pytestmark = [
    pytest.mark.extra,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(
        keys.triton is None, reason="needs triton: pip install -r requirements-extra.txt"
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# type -> bound on ‖out - ref‖ / ‖ref‖; bf16 keeps 8 bits, and twins round more often
TYPES = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def error(out, ref):
    """‖out - ref‖ / ‖ref‖."""
    out, ref = out.float().cpu(), ref.float().cpu()
    assert out.shape == ref.shape and torch.isfinite(out).all()
    return ((out - ref).norm() / ref.norm().clamp(min=1e-20)).item()


def randn(*shape, dtype=torch.float32, seed=0):
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
        .to(dtype)
        .to(DEVICE)
    )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("R, D", [(1, 16), (3, 33), (9, 96), (2, 130)])
def test_add_norm(R, D, dtype):
    """Catches pad columns in the mean of squares, a norm of x without δ, and a sum that is not the
    rounded one that goes on."""
    x, delta, weight = (
        randn(R, D, dtype=dtype),
        randn(R, D, dtype=dtype, seed=1),
        randn(D, dtype=dtype),
    )
    for d in (delta, None):
        for out, ref in zip(
            kernels.add_norm(x, d, weight, 1e-6), kernels.add_norm_torch(x, d, weight, 1e-6)
        ):
            assert error(out, ref) < TYPES[dtype]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("R, size", [(1, 1), (3, 37), (2, 1025)])
def test_swiglu(R, size, dtype):
    """Catches gate and up exchanged, and a second block of columns read from the first."""
    gate_up = randn(R, 2 * size, dtype=dtype)
    assert error(kernels.swiglu(gate_up), kernels.swiglu_torch(gate_up)) < TYPES[dtype]


CASES = {  # heads, key/value heads, head size, shared layers [(members, starts, lengths)], own
    # (starts, lengths)
    "one row, one key": (1, 1, 16, [([[0]], [9], [0])], ([3], [1])),
    "nothing shared": (2, 1, 24, [], ([0, 40], [3, 37])),
    "one shared layer": (4, 2, 32, [([[0, 1, 2]], [0], [5])], ([10, 20, 30], [1, 1, 2])),
    "around a block": (
        4,
        1,
        64,
        [([[0, 1], [2, 3]], [0, 70], [64, 63])],
        ([200, 300, 400, 500], [65, 64, 63, 1]),
    ),
    "seven heads a key, odd head size": (
        14,
        2,
        24,
        [([[0, 1, -1], [2, -1, -1]], [0, 40], [33, 17])],
        ([90, 110, 150], [9, 31, 3]),
    ),
    "three generations": (
        4,
        2,
        128,
        [([[0, 1, 2, 3]], [0], [40]), ([[0, 1], [2, 3]], [50, 90], [33, 7])],
        ([120, 130, 140, 150], [1, 2, 3, 4]),
    ),
    "two tiles of fourteen queries and one of seven": (
        14,
        2,
        64,
        [([[0, 1], [2, 3], [4, -1]], [0, 0, 0], [70] * 3)],
        ([80, 90, 100, 110, 120], [1, 2, 3, 4, 1]),
    ),
    "two tiles of thirty-two queries, long heads": (
        8,
        1,
        256,
        [([[0, 1, 2, 3], [4, 5, 6, 7]], [0, 40], [33, 16])],
        (list(range(100, 180, 10)), [1] * 8),
    ),
    "nine rows, two empty places, lines of other rows": (
        2,
        1,
        80,
        [
            (
                [[0, 1, 2, 3], [4, 5, 6, 8], [10, 700, -1, -1], [11, 12, -1, -1]],
                [0, 0, 600, 620],
                [21, 21, 9, 5],
            )
        ],
        (list(range(30, 140, 10)), [1, 2, 3, 4, 5, 6, 7, 0, 9, 0, 1]),
    ),
}


def inputs(N, K, C, layers, own, norm, dtype=torch.float32, places=0):
    """What kernels.attend takes, of a case. Whatever is not to be read is NaN."""
    H, R = len(layers), len(own[0])
    lines = max([len(rows) for rows, _, _ in layers] + [R, places])
    members = max([len(rows[0]) for rows, _, _ in layers] + [1])
    shared = kernels.Shared(
        torch.full((H, lines, members), 12345),  # lines that are not in use name no row
        *(torch.full((H, lines), 123456789) for _ in range(2)),
        torch.tensor([len(rows) for rows, _, _ in layers], dtype=torch.long),
    )
    k, v = (torch.full((640, K, C), torch.nan, dtype=dtype) for _ in "kv")
    starts, lengths = torch.tensor(own[0]), torch.tensor(own[1])
    filled = [*zip(own[0], (length - 1 for length in own[1]))]
    for layer, (rows, first, size) in enumerate(layers):
        n = len(rows)
        shared.rows[layer, :n, : len(rows[0])] = torch.tensor(rows)
        shared.rows[layer, :n, len(rows[0]) :] = -1
        shared.starts[layer, :n], shared.lengths[layer, :n] = (
            torch.tensor(first),
            torch.tensor(size),
        )
        filled += [x for row, x in zip(rows, zip(first, size)) if row[0] < R]
    for start, length in filled:
        for x, seed in ((k, start), (v, -start)):
            x[start : start + max(0, length)] = randn(
                max(0, length), K, C, dtype=dtype, seed=seed
            ).cpu()
    slot = torch.where(lengths > 0, starts + lengths - 1, -1)
    qkv = randn(R, (N + 2 * K) * C, dtype=dtype)
    qkv[lengths == 0] = torch.nan
    angle = randn(R, C // 2)
    cos = torch.cat([angle.cos(), angle.cos()], 1).to(dtype)
    sin = torch.cat([-angle.sin(), angle.sin()], 1).to(dtype)
    norms = (1 + randn(N + K, C) / 4).to(dtype) if norm else None
    arrived = torch.zeros(R + places, N, dtype=torch.int32)
    to = lambda x: None if x is None else x.to(DEVICE)
    shared = kernels.Shared(*map(to, shared))
    return (
        *map(to, (qkv, norms, cos, sin, slot, k, v)),
        shared,
        *map(to, (starts, lengths, arrived)),
    )


def reference(N, qkv, norms, cos, sin, slot, k, v, shared, starts, lengths, arrived):
    """What attend gives for the rows that are there, and the keys and values that it leaves. As in
    the kernel, q, k and v are rounded once."""
    wide = lambda x: None if x is None else x.cpu().float()
    live = (slot >= 0).cpu()
    q, k32, v32 = torch.zeros(len(qkv), N, k.shape[2]), wide(k), wide(v)
    q[live] = kernels.rope_store_torch(
        *(wide(qkv)[live], wide(norms), wide(cos)[live], wide(sin)[live], slot.cpu()[live]),
        *(k32, v32, N, 1e-6),
    )
    # A graph of fewer rows than the tables name: the others do not count.
    shared = shared._replace(rows=shared.rows.where(shared.rows < len(qkv), -1))
    q, k, v = (x.to(qkv.dtype) for x in (q, k32, v32))
    segments = kernels.Shared(*(x.cpu() for x in shared)), starts.cpu(), lengths.cpu()
    return kernels.attend_torch(q, k.nan_to_num(), v.nan_to_num(), *segments), live, k, v


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("case", CASES)
def test_attend(case, dtype, monkeypatch):
    """Catches keys beyond a length, a split or layer left out or counted twice, members mixed up,
    the wrong partner in the rotation, norms of the wrong head, keys in values' place, the newest
    key unseen, -inf - -inf, and counters that are not zero again. Whatever is not to be read is
    NaN, so reading it once shows. All of it with one part a segment and with several, in as many
    programs as there are lines and in fewer."""
    N, K, C, layers, own = CASES[case]
    for norm, fill in ((True, 1), (False, 16), (False, 64)):
        monkeypatch.setattr(kernels, "FILL", fill)
        given = inputs(N, K, C, layers, own, norm, dtype)
        ref, live, k, v = reference(N, *given)
        for _ in range(2):  # the second launch finds the counters of the first
            out = kernels.attend(*given, N, 1e-6).cpu()
            # In bf16 weights are rounded too, and rounded scores stand in an exponent.
            assert error(out[live], ref[live]) < 1.5 * TYPES[dtype]
            assert not given[-1].any()
        for stored, twin in zip(given[5:7], (k, v)):
            stored = stored.cpu()
            assert torch.equal(stored.isnan(), twin.isnan())
            assert error(stored.nan_to_num(), twin.nan_to_num()) < TYPES[dtype]


def test_padded_rows_are_inert():
    """Catches an empty place that reads, writes, or spoils its neighbours: with its queries, keys
    and activations NaN, the other rows are as without it, and neither the cache nor the result
    takes anything from it."""
    own = ([4, 0, 8], [1, 0, 2])
    given = inputs(2, 1, 16, [([[0, 2]], [20], [5])], own, False)
    before = given[5].clone()
    out = kernels.attend(*given, 2, 1e-6)
    changed = (given[5].nan_to_num() != before.nan_to_num()).flatten(1).any(1)
    assert changed.nonzero()[:, 0].tolist() == [4, 9] and torch.isfinite(out[[0, 2]]).all()
    rows = seated(3, most=4, device=DEVICE)
    rows.alive[1], rows.slot[:], rows.length[:] = (
        False,
        torch.tensor([4, -1, 9]),
        torch.tensor([1, 0, 2]),
    )
    logits = randn(3, 40)
    logits[1] = torch.nan
    kernels.choose(logits, 1.0, rows)
    assert (
        rows.length.tolist() == [2, 0, 3]
        and not rows.tokens[1].any()
        and not rows.logprobs[1].any()
        and torch.isfinite(rows.logprobs).all()
    )


@pytest.mark.parametrize("V", [1, 2, 257, 5000, pytest.param(151_936, marks=pytest.mark.slow)])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_choose(V, temperature):
    """Catches other random bits than torch draws, a column beyond the vocabulary, a wrong
    normaliser over several blocks, a wrong end: tokens and bookkeeping equal the twin's, and
    log-probabilities those in float64, for logits of each type."""
    types = (torch.float32, torch.bfloat16, torch.float16)
    for dtype in types if V < 10_000 else (torch.bfloat16,):
        logits = 3 * randn(3, V, dtype=dtype)
        ours, twins = (
            seated(3, most=5, end_tokens=(V + 7, int(logits[2].argmax())), device=DEVICE)
            for _ in range(2)
        )
        for rows in (ours, twins):
            rows.key.copy_(row_keys(5, torch.arange(3)))
            rows.length.copy_(torch.tensor([0, 4, 2]))
        kernels.choose(logits, temperature, ours)
        choose_torch(logits, temperature, twins)
        for name in ("token", "position", "length", "slot", "alive", "tokens"):
            assert torch.equal(getattr(ours, name), getattr(twins, name)), name
        # Over 152 k columns torch's softmax in fp32 is off by 2e-5.
        exact = (logits.double() / (temperature or 1)).log_softmax(-1)
        exact = exact.gather(1, ours.token[:, None])[:, 0]
        assert (ours.logprobs.sum(1) - exact).abs().max() < 5e-6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_choose_when_a_filter_leaves_nothing_of_a_block(temperature):
    """Catches -inf - -inf in the running sum: the first 4,096 of 5,000 tokens are filtered out, or
    all but one."""
    logits = randn(3, 5000)
    logits[:, :4200] = -torch.inf
    logits[1, 4201:] = -torch.inf
    logits[2, 0], logits[2, 4200:] = 1.5, -torch.inf
    ours, twins = seated(3, device=DEVICE), seated(3, device=DEVICE)
    kernels.choose(logits, temperature, ours)
    choose_torch(logits, temperature, twins)
    assert torch.equal(ours.tokens, twins.tokens) and ours.tokens[1:, 0].tolist() == [4200, 0]
    assert (ours.logprobs - twins.logprobs).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_choose_is_the_same_in_any_number_of_programs(temperature, monkeypatch):
    """Catches a part of the vocabulary that is read twice or by nobody, and parts compared without
    their scales: five tiles read by one program a row, by two and by four, the logits rising from
    tile to tile so that every lane's sum fades."""
    logits, found = randn(2, 5000) + torch.arange(5000, device=DEVICE) / 100, []
    for fill in (0, 1, 1024):
        monkeypatch.setattr(kernels, "FILL", fill)
        rows = seated(2, device=DEVICE)
        kernels.choose(logits, temperature, rows)
        found.append(rows)
    twins = seated(2, device=DEVICE)
    choose_torch(logits, temperature, twins)
    for rows in found:
        assert torch.equal(rows.tokens, twins.tokens)
        assert (rows.logprobs - twins.logprobs).abs().max() < 1e-5
    assert [kernels.choose_splits(rows, 5) for rows in (1, 2048, 4096)] == [4, 2, 1]


@pytest.mark.parametrize(
    "places", [(3, 4), (2061, 2062), (0, 1023), (7, 4000), (1024, 2048), (4999, 4099)]
)
def test_greedy_takes_the_first_of_level_logits(places):
    """Catches another choice than torch's among equal logits, be they one load of a lane, in two
    lanes, in two tiles or in two programs."""
    logits = randn(1, 5000).clamp(max=2.0)
    logits[0, list(places)] = 9.0
    rows = seated(1, device=DEVICE)
    kernels.choose(logits, 0.0, rows)
    assert rows.tokens[0, 0] == min(places)
    assert abs(rows.logprobs[0, 0] - logits.log_softmax(-1)[0, places[0]]) < 1e-5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("V", [3, 257, 5000])
def test_logits_that_are_no_number_choose_a_token_of_the_vocabulary(V, temperature):
    """Catches a token outside of the vocabulary, whose embedding the next step would read beyond
    its table: of a row of NaN and of one with a single number."""
    logits = torch.full((2, V), torch.nan, device=DEVICE)
    logits[1, V - 1] = 0.5
    rows = seated(2, device=DEVICE)
    kernels.choose(logits, temperature, rows)
    assert rows.tokens[:, 0].tolist() == [0, V - 1]


def test_the_kernels_noise_decides_as_torchs_does():
    """Catches a generator that drifts from its twin in one bit: the kernel's noise decides between
    equal logits, so that over 600 rows of 64 tokens every choice must be that of the largest -log
    E, and so must the share of tokens (chi-square, 63 degrees of freedom, bound 120: p < 2e-5)."""
    n = 600 if DEVICE == "cuda" else 60
    rows = seated(n, device=DEVICE)
    rows.key.copy_(row_keys(9, torch.arange(n)))
    kernels.choose(torch.zeros(n, 64, device=DEVICE), 1.0, rows)
    keys = row_keys(9, torch.arange(n))
    expected = exponential_noise(keys, position_keys(keys, torch.zeros(n)), 64).argmin(1)
    assert torch.equal(rows.tokens[:, 0].cpu(), expected)
    counts = expected.bincount(minlength=64)
    assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 120


@keys.jit
def _write_noise(bits, row_key, out, V, BLOCK: tl.constexpr):
    row, v = tl.program_id(0), tl.arange(0, BLOCK)
    found = keys._waits_from_bits(tl.load(bits + row * V + v, v < V, 1), tl.load(row_key + row))
    tl.store(out + row * V + v, found, v < V)


def test_the_kernels_noise_equals_torchs_at_its_ends():
    """Catches another E where it is small (there rare tokens are decided), where the kernel's
    polynomial ends (v = 1/16) and at the ends: times log 2 it is the twin's to 4e-6 of itself, for
    bits of every size and sign, and for keys whose offset is next to 0 and next to 1."""
    size = (
        (2.0 ** torch.linspace(0, 31, 400, dtype=torch.float64))
        .round()
        .clamp(max=2**31 - 1)
        .to(torch.int64)
    )
    near = 2**27 + torch.arange(-640, 640, 16)
    bits = torch.cat([torch.tensor([0, -1, -(2**31)]), size, -size, near, -near]).to(torch.int32)
    keys = torch.cat(
        [torch.tensor([-(2**31), 2**31 - 1, 0], dtype=torch.int32), row_keys(1, torch.arange(9))]
    )
    bits = bits.expand(len(keys), -1).contiguous().to(DEVICE)
    out = torch.empty(bits.shape, device=DEVICE)
    _write_noise[(len(keys),)](
        bits, keys.to(DEVICE), out, bits.shape[1], BLOCK=kernels.power_of_2(bits.shape[1])
    )
    out *= math.log(2)
    twin = exponential_from_bits(bits, keys.to(DEVICE))
    assert out.min() > 0 and out.max() < 17 and ((out - twin).abs() / twin).max() < 4e-6


@pytest.mark.slow
def test_the_kernels_noise_draws_rare_tokens_too():
    """Catches a tail that is lost in the kernel alone: rows whose draw, in torch, is one of 151,935
    tokens of 1.3e-7 each, beside one of 98 %."""
    V = 151_936
    logits = torch.full((1, V), -15.843)
    logits[:, 7] = 0.0
    found = []
    for first in range(0, 400, 8):
        rows = seated(8)
        rows.key.copy_(row_keys(2, torch.arange(first, first + 8)))
        choose_torch(logits.expand(8, -1), 1.0, rows)
        found += [
            (key, token)
            for key, token in zip(rows.key.tolist(), rows.tokens[:, 0].tolist())
            if token != 7
        ]
    assert len(found) > 2
    rows = seated(3, device=DEVICE)
    rows.key.copy_(torch.tensor([key for key, _ in found[:3]]))
    kernels.choose(logits.expand(3, -1).contiguous().to(DEVICE), 1.0, rows)
    assert rows.tokens[:, 0].tolist() == [token for _, token in found[:3]]


def half(number):
    """What kernels.attend takes, with half of one of its arguments."""
    given = list(inputs(1, 1, 16, [], ([0, 4], [1, 1]), False))
    given[number] = given[number][:1]
    return given


@pytest.mark.parametrize(
    "call",
    [
        lambda: kernels.add_norm(randn(2, 8).T, None, randn(2), 1e-6),
        lambda: kernels.add_norm(randn(2, 8), randn(2, 8).bfloat16(), randn(8), 1e-6),
        lambda: kernels.swiglu(randn(2, 7)),
        lambda: kernels.attend(*inputs(3, 2, 16, [], ([0], [1]), False), 3, 1e-6),
        lambda: kernels.attend(*inputs(4, 2, 16, [], ([0], [1]), False), 2, 1e-6),
        lambda: kernels.attend(*inputs(1, 1, 7, [], ([0], [1]), False), 1, 1e-6),
        lambda: kernels.attend(*half(2), 1, 1e-6),  # cos
        lambda: kernels.attend(*half(4), 1, 1e-6),  # slot
        lambda: kernels.choose(randn(3, 8), 1.0, seated(2)),
    ],
)
def test_wrappers_refuse_what_does_not_fit(call):
    """Catches a kernel launched on what it would read wrongly: strides, types and shapes that do
    not fit are one ValueError."""
    with pytest.raises(ValueError, match=r"contiguous|: "):
        call()


# ---- the sampler, on kernels ---------------------------------------------------------------------


def small(dtype=torch.float32, qk_norm=True):
    torch.manual_seed(0)
    model = GPT(
        ModelConfig(
            VOCABULARY,
            width=32,
            depth=2,
            heads=4,
            kv_heads=2,
            head_size=16,
            hidden=32,
            context=64,
            end_tokens=(END,),
            qk_norm=qk_norm,
        ),
        dtype,
    )
    with torch.no_grad():
        model.embed.weight.mul_(12)
        model.embed.weight[END] *= 3  # rows end now and then
    return model.to(DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("cache_tokens", [0, 60])
def test_the_fused_sampler_equals_the_torch_one(cache_tokens, monkeypatch):
    """Catches any difference between the two readers of the tree: tables, segments, closing up, the
    queue and the second level, token for token; log-probabilities equal the trainer's (the gap that
    matters) within 1e-4."""
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "FILL", 24)  # interpreted programs run one after the other
    model, results = small(), []
    for fused in (True, False):
        sampler = Sampler(model, fused=fused, cache_tokens=cache_tokens)
        first = sampler.generate([[1, 2, 3], [4], [5, 6]], 2, 8, seed=0)
        results.append((first, sampler.extend(first, [[7, 8]] * 6, 2, 5, seed=0)))
    for ours, twins in zip(*results):
        assert (
            ours.tokens.tolist() == twins.tokens.tolist()
            and ours.lengths.tolist() == twins.lengths.tolist()
        )
        assert (ours.logprobs - twins.logprobs).abs().max() < 1e-4 and worst_gap(model, ours) < 1e-4
    assert any(result.ended.any() for result in results[0]) and not all(
        result.ended.all() for result in results[0]
    )


class Replayed:
    """A CUDA graph without CUDA: replaying it runs the step again on the tensors that it was
    captured with."""

    def __init__(self, graphs, step, places):
        arguments = graphs.cache.rows.part(0, places), graphs.cache, graphs.logits[:places]
        self.replay = lambda: step(*arguments)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="there are real graphs here")
def test_the_sampler_on_graphs_equals_the_plain_one(monkeypatch):
    """Catches a bucket too small, empty places that write, tables and slots not put back after the
    capture, logits of another step: all but the capture itself. Five rows run in a bucket of 8;
    those that capture run first on tables that were meant for more rows."""

    def capture(graphs, step, places):
        graph = Replayed(graphs, step, places)
        graph.replay()  # the warm-up
        return graph

    monkeypatch.setattr(kernels, "FILL", 8)
    monkeypatch.setattr(StepGraphs, "capture", capture)
    graphed, plain = Sampler(small(), fused=True), Sampler(small(), fused=False)
    graphed.graph = True
    for seed in range(2):  # the second call finds graphs, and rows of the first that have left
        ours, twins = (
            s.generate([[1, 2, 3], [4, 9], [7], [5, 6], [8]], 1, 5, seed=seed)
            for s in (graphed, plain)
        )
        assert (
            ours.tokens.tolist() == twins.tokens.tolist()
            and (ours.logprobs - twins.logprobs).abs().max() < 1e-4
        )
    ours, twins = (
        s.extend(c, [[7, 8]], 3, 4, seed=1, rows=[2]) for s, c in ((graphed, ours), (plain, twins))
    )
    assert ours.tokens.tolist() == twins.tokens.tolist() and {
        places for places, _ in graphed.graphs.graphs
    } == {1, 2, 4, 8}


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_graphs_equal_the_eager_step():
    """Catches a graph that reads memory which has moved, a bucket whose empty places are not inert,
    and stale weights after refresh()."""
    model = small()
    samplers = [Sampler(model, graph=graph) for graph in (True, False)]
    for step in range(3):
        results = []
        for sampler in samplers:
            sampler.refresh()
            first = sampler.generate([[1, 2, 3], [4], [5, 6]] * 9, 5, 20, seed=step)
            results.append((first, sampler.extend(first, [[7, 8]] * 135, 3, 9, seed=step)))
        for ours, eager in zip(*results):
            assert (
                ours.tokens.tolist() == eager.tokens.tolist()
                and (ours.logprobs - eager.logprobs).abs().max() < 1e-4
            )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_the_fused_sampler_in_bf16_is_near_the_trainer():
    """Catches a precision lost in a kernel: log-probabilities in bf16 stay within 0.2 nats of the
    trainer's, 0.02 on average."""
    model = small(torch.bfloat16)
    c = Sampler(model).generate([[1, 2, 3], [4], [5, 6]] * 20, 8, 30, seed=1)
    rows = pad_rows(
        [c.prompts[i // c.n] for i in range(len(c))],
        [c.tokens[i, : c.lengths[i]].tolist() for i in range(len(c))],
        DEVICE,
    )
    gap = (padded_logprobs(model, rows)[0] - c.logprobs[:, : rows.mask.shape[1]])[rows.mask].abs()
    assert gap.max() < 0.2 and gap.mean() < 0.02


# ---- ahead of time -------------------------------------------------------------------------------


def without_interpreter(tmp_path, *words):
    """What python prints, in a process that compiles kernels. The deadline is for one that
    hangs."""
    environment = {
        name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
    } | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_every_kernel_compiles_and_none_spills(tmp_path):
    """Catches what the interpreter forgives: each launch of a decode step, in the shapes of four
    models and in both compute types, compiled for sm_80 and sm_90 in a process without the
    interpreter. A spilled register would be traffic that nobody counted."""
    lines = [
        line.split()
        for line in without_interpreter(tmp_path, "-m", "tools.bench_kernels").splitlines()
    ]
    lines = [line for line in lines if line[1:2] in (["float32"], ["bfloat16"])]
    assert len(lines) == 40 and {line[2] for line in lines} == {
        "add_norm",
        "swiglu",
        "attend",
        "choose",
        "settle",
    }
    for line in lines:
        assert line[7] == line[10] == "0" and 0 < int(line[6]) < 256 and 0 < int(line[9]) < 256, (
            line
        )


@pytest.mark.slow
def test_attention_to_long_heads_does_not_spill(tmp_path):
    """Catches a tile too large for what none of those shapes has: heads of 256, with 8 query heads
    a key head, with 3 and with one, and of 128 with one; with norms of q and k and without."""
    program = """
import itertools, torch, model
from tools import bench_kernels as bench
shapes = ((8, 1, 256, False), (3, 1, 256, False), (4, 4, 256, True), (1, 1, 128, True))
for dtype, (heads, kv_heads, size, norm) in itertools.product((torch.bfloat16, torch.float32), shapes):
    m = model.ModelConfig(512, heads=heads, kv_heads=kv_heads, head_size=size, qk_norm=norm)
    for launch in bench.launches_of(m, dtype, 64, 32, 64, 8)[0]:
        if launch[0].__name__ == "_attend":
            print(*(bench.compiled(launch, sm)["spills"] for sm in (80, 90)))"""
    spills = without_interpreter(tmp_path, "-c", program).split()
    assert spills == ["0"] * 16
