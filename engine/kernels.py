"""The operations of a decode step besides matrix products: five Triton kernels, each beside its
torch reference.

    python -m tools.bench_kernels                  # bytes, operations, registers and spills
    pytest tests/test_kernels.py                   # every kernel against its reference, in Triton's
                                                   # interpreter (needs triton, no GPU)

The idea. Between two matrix products a decode step does little arithmetic on small tensors. torch
launches several kernels for each line of it, and each of them reads and writes memory. A fused
kernel reads every number once and writes the result. The wrapper checks dtype, shape and strides: a
wrong stride gives wrong numbers, not an error.

A CPU runs the references, except for attention: there engine/cache.py forms larger products.

Letters: R rows, N query heads, K key/value heads, G = N / K, C head size, V vocabulary, D width, F
width of the MLP, H layers of shared segments, M queries of a tile. A slot holds one token's keys
and values: the cache is k, v [slots, K, C] a block.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from engine.keys import (
    INTERPRETED,
    _exp2,
    _log2,
    _position_key,
    _waits,
    exponential_noise,
    jit,
    tl,
    triton,
)
from model import rms_normalise, rotate, scaled


def power_of_2(n):
    """The smallest power of two that is at least n: Triton's blocks have such sizes."""
    return 1 << max(0, n - 1).bit_length()


def check(condition, sentence):
    """ValueError with this sentence, unless the condition holds."""
    if not condition:
        raise ValueError(sentence)


def check_dense(**tensors):
    """ValueError for a tensor that is not contiguous: the kernels compute addresses from shapes."""
    for name, x in tensors.items():
        check(
            x.is_contiguous(),
            f"{name} of shape {tuple(x.shape)} has strides {x.stride()}: it must be contiguous",
        )


# ---- add, norm -----------------------------------------------------------------------------------


def add_norm_torch(x, delta, weight, eps):
    """total = x + δ, normed = total / rms(total) · weight.

    x, delta: [R, D] (delta None: 0); weight: [D] -> total, normed [R, D].
    """
    x = x if delta is None else x + delta
    return x, rms_normalise(x, eps) * weight


@jit
def _add_norm(
    x, delta, weight, total, normed, D, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr
):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    # BLOCK is a power of two. Columns beyond D read as 0 and are not written.
    inside = column < D
    # 64 bits: R x D may exceed 2^31.
    at = row.to(tl.int64) * D + column
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    if HAS_DELTA:
        value += tl.load(delta + at, inside, 0.0).to(tl.float32)
    stored = value.to(total.dtype.element_ty)
    tl.store(total + at, stored, inside)
    value = stored.to(tl.float32)  # the rounded sum, which the next block reads
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
    w = tl.load(weight + column, inside, 0.0).to(tl.float32)
    tl.store(normed + at, (value * scale * w).to(normed.dtype.element_ty), inside)


def add_norm(x, delta, weight, eps):
    """The kernel of `add_norm_torch`: reads x and δ once, writes the sum and its norm.

    Grid: R, one program a row.
    """
    R, D = x.shape
    check(
        weight.shape == (D,)
        and (delta is None or (delta.shape == x.shape and delta.dtype == x.dtype)),
        f"add_norm: x is {tuple(x.shape)}, weight {tuple(weight.shape)}, delta "
        f"{None if delta is None else tuple(delta.shape)}",
    )
    check_dense(x=x, weight=weight, **({} if delta is None else dict(delta=delta)))
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _add_norm[(R,)](
        x,
        x if delta is None else delta,
        weight,
        total,
        normed,
        D,
        eps,
        HAS_DELTA=delta is not None,
        BLOCK=power_of_2(D),
        num_warps=4 if D <= 2048 else 8,
    )
    return total, normed


# ---- SwiGLU --------------------------------------------------------------------------------------


def swiglu_torch(gate_up):
    """silu(gate) · up. gate_up: [R, 2F], gate beside up -> [R, F]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@jit
def _swiglu(gate_up, out, size, BLOCK: tl.constexpr):
    # A row of gate_up is 2F long: gate, then up.
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_up + row * 2 * size + column, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + column, inside, 0.0).to(tl.float32)
    tl.store(
        out + row * size + column,
        (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty),
        inside,
    )


def swiglu(gate_up):
    """The kernel of `swiglu_torch`.

    Grid: R x F / 1,024, one program a row and block of columns.
    """
    R, size = gate_up.shape[0], gate_up.shape[1] // 2
    check(
        gate_up.shape[1] == 2 * size,
        f"swiglu: {gate_up.shape[1]} columns do not split into gate and up",
    )
    check_dense(gate_up=gate_up)
    out, block = gate_up.new_empty(R, size), min(1024, power_of_2(size))
    _swiglu[(R, triton.cdiv(size, block))](gate_up, out, size, BLOCK=block)
    return out


# ---- rotary positions, into the cache ------------------------------------------------------------


def rope_store_torch(qkv, norms, cos, sin, slot, k, v, heads, eps):
    """q and k: x = norm(x), then x · cos + roll(x) · sin; keys and values go into the cache.

    qkv: [R, (N + 2K) C]; norms: None, or the weights of q's and k's norms [N + K, C]; cos, sin:
    [R, C] of each row's position; slot: [R]; k, v: [slots, K, C], written -> q [R, N, C].
    """
    K, C = k.shape[1:]
    qk, value = qkv.view(len(qkv), -1, C).split([heads + K, K], 1)
    qk = qk if norms is None else rms_normalise(qk, eps) * norms
    q, key = rotate(qk, cos[:, None], sin[:, None]).split([heads, K], 1)
    k.index_copy_(0, slot, key)
    v.index_copy_(0, slot, value)
    return q


@jit
def _turned(qkv, norms, cos, sin, at, head, row, live, c, eps, C: tl.constexpr, NORM: tl.constexpr):
    """Heads as they enter attention, normalised and turned: fp32 [M, C]. at, head, row, live: [M],
    where in qkv a head begins, its number among q's and k's, its row, whether it is one."""
    inside, other = live[:, None] & (c < C)[None, :], (c + C // 2) % C  # RoPE turns c with `other`
    x = tl.load(qkv + at[:, None] + c[None, :], inside, 0.0).to(tl.float32)
    y = tl.load(qkv + at[:, None] + other[None, :], inside, 0.0).to(tl.float32)
    if NORM:
        # Both are normalised by the head's one scale, each with the weight of its own column.
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / C + eps)[:, None]
        weights = norms + head[:, None] * C
        x *= scale * tl.load(weights + c[None, :], inside, 0.0).to(tl.float32)
        y *= scale * tl.load(weights + other[None, :], inside, 0.0).to(tl.float32)
    # The minus sign of the rotation is in sin (model.rope_tables).
    turn = row[:, None] * C + c[None, :]
    x *= tl.load(cos + turn, inside, 0.0).to(tl.float32)
    return x + y * tl.load(sin + turn, inside, 0.0).to(tl.float32)


# ---- decode attention ----------------------------------------------------------------------------


class Shared(NamedTuple):
    """The segments that rows share, H layers of them. A line is a segment and as many of its rows
    as one tile holds; a layer's lines stand at the front, and those behind them are not read."""

    rows: torch.Tensor  # [H, lines, members] rows that see the segment, -1 behind them
    starts: torch.Tensor  # [H, lines] first slot
    lengths: torch.Tensor  # [H, lines]
    used: torch.Tensor  # [H] lines in use


def attend_torch(q, k, v, shared, starts, lengths):
    """softmax(q·kᵀ / sqrt C) · v over ALL segments that a row sees, in fp32.

    q: [R, N, C]; k, v: [slots, K, C]; shared: Shared; starts, lengths: [R], the rows' own segments.
    A segment is slots start .. start + length - 1. -> [R, N, C]; 0 for rows without keys.
    """
    (R, N, C), K = q.shape, k.shape[1]
    visible = [list(range(s, s + n)) for s, n in zip(starts.tolist(), lengths.tolist())]
    for rows, first, length, used in zip(*shared):
        for line in range(int(used)):
            for row in set(rows[line].tolist()) - {-1}:
                visible[row] += range(int(first[line]), int(first[line] + length[line]))
    out = torch.zeros(R, K, N // K, C, dtype=torch.float32)
    for row, slots in enumerate(visible):
        scores = q[row].view(K, -1, C).float() @ k[slots].float().permute(1, 2, 0)  # [K, G, T]
        weights = (scores * C**-0.5).softmax(-1)
        out[row] = weights @ v[slots].float().transpose(0, 1)
    return out.view(R, N, C).to(q.dtype)


FILL = 256  # programs that occupy a GPU


def splits_for(tiles, kv_heads):
    """-> the number of parts that a segment's keys are split into, so that few tiles (rows, or
    lines of rows that share a segment) still make FILL programs: a power of two, at most 16."""
    return max(1, min(16, power_of_2(FILL // (tiles * kv_heads))))


def members_for(heads, kv_heads):
    """-> the number of rows that meet a shared segment in one tile: 16 queries, the fewest that
    tensor cores multiply, G of each row. With more, a program has so many registers that few of
    them share a multiprocessor."""
    return max(1, 16 * kv_heads // heads)


@jit
def _meet(
    tile, k, v, start, begin, end, head, scale, K,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Queries [M, C] meet keys begin .. end - 1 of a segment -> the mean of its values, and the
    logarithm of the sum of exponentials, which is what this part weighs in `_merge`."""
    n, c = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    # Online softmax (arXiv 1805.02867): one pass over the keys. Sums so far are relative to the
    # largest score so far, and fade when a larger one comes.
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)  # running maximum, sum, weighted values
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for j in range(begin, end, BLOCK_N):
        inside = j + n < end
        at = ((start + j + n) * K + head) * C
        # [C, N]
        keys = tl.load(k + at[None, :] + c[:, None], inside[None, :] & (c < C)[:, None], 0.0)
        # [N, C]
        values = tl.load(v + at[:, None] + c[None, :], inside[:, None] & (c < C)[None, :], 0.0)
        if WIDE:
            tile, keys, values = tile.to(tl.float32), keys.to(tl.float32), values.to(tl.float32)
        score = tl.dot(tile, keys, input_precision="ieee") * scale
        score = tl.where(inside[None, :], score, -float("inf"))
        # In the first block top is -inf, so fade is 0.
        higher = tl.maximum(top, tl.max(score, 1))
        weight, fade = tl.exp(score - higher[:, None]), tl.exp(top - higher)
        acc = acc * fade[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
        total, top = total * fade + tl.sum(weight, 1), higher
    lse = tl.where(total > 0, top + tl.log(total), -float("inf"))
    return acc / tl.maximum(total, 1e-30)[:, None], lse


@jit
def _merge(
    mean, size, query, live, part, means, sizes, arrived, out,
    C: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes part number `part` of each query. Whoever brings a query's last part merges them, in
    the order of their numbers: o = Σ o_p exp(size_p) / Σ exp(size_p)."""
    c = tl.arange(0, BLOCK_C)
    at = query * PARTS + part
    tl.store(sizes + at, size, live)
    tl.store(means + at[:, None] * C + c[None, :], mean, live[:, None] & (c < C)[None, :])
    # All threads of this program have written before one of them says so.
    tl.debug_barrier()
    last = live & (tl.atomic_add(arrived + query, 1, live) == PARTS - 1)
    tl.debug_barrier()
    if tl.max(last.to(tl.int32), 0) > 0:
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        for p in range(PARTS):
            top = tl.maximum(top, tl.load(sizes + query * PARTS + p, last, -float("inf")))
        top = tl.where(top == -float("inf"), 0.0, top)  # a row without keys
        total, acc = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        inside = last[:, None] & (c < C)[None, :]
        for p in range(PARTS):
            at = query * PARTS + p
            weight = tl.exp(tl.load(sizes + at, last, -float("inf")) - top)
            total += weight
            acc += weight[:, None] * tl.load(means + at[:, None] * C + c[None, :], inside, 0.0)
        acc /= tl.maximum(total, 1e-30)[:, None]
        tl.store(out + query[:, None] * C + c[None, :], acc.to(out.dtype.element_ty), inside)
        tl.store(arrived + query, 0, last)  # for the next launch


@jit
def _attend(
    qkv,
    norms,
    cos,
    sin,
    slot,
    k,
    v,
    shared_rows,
    shared_starts,
    shared_lengths,
    used,
    starts,
    lengths,
    means,
    sizes,
    arrived,
    out,
    scale,
    eps,
    R,
    N,
    K,
    lines,
    programs,
    G: tl.constexpr,
    C: tl.constexpr,
    LAYERS: tl.constexpr,
    MEMBERS: tl.constexpr,
    SPLITS: tl.constexpr,
    OWN_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NORM: tl.constexpr,
    WIDE: tl.constexpr,
):
    program, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    m, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    heads = head * G + m % G  # query m: member m // G of a line, head m % G
    PARTS: tl.constexpr = LAYERS * SPLITS + OWN_SPLITS
    width = (N + 2 * K) * C  # of a row of qkv: N heads of queries, K of keys, K of values
    # The shared segments of a layer: each program takes every so-manieth item of those in use. The
    # programs behind the last layer have one item each, of a row's own segment.
    layer = tl.minimum(program // programs, LAYERS)
    first = program - layer * programs
    splits, stop = OWN_SPLITS, first + 1
    if layer < LAYERS:
        splits, stop = SPLITS, tl.load(used + layer) * SPLITS
    for item in range(first, stop, programs):
        line, split, newest = item // splits, item % splits, tl.full((), -1, tl.int64)
        if layer < LAYERS:
            at = layer * lines + line
            row = tl.load(shared_rows + at * MEMBERS + m // G, m // G < MEMBERS, -1)
            row = tl.where(row < R, row, -1)
            start, length = tl.load(shared_starts + at), tl.load(shared_lengths + at)
        else:
            # Slot -1 is an empty place: nothing is read or written for it.
            newest = tl.load(slot + line)
            row = tl.where((m < G) & (newest >= 0), line, -1)
            start, length = tl.load(starts + line), tl.load(lengths + line, newest >= 0, 0)
        # 100 keys in blocks of 32 are 4 blocks: 2 splits take keys 0..63 and 64..99.
        share = tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N
        begin = split * share
        end = tl.minimum(begin + share, length)
        if (newest >= 0) & (begin < end) & (end == length):
            # The newest key is among this program's: it is computed and stored here.
            one = tl.zeros([1], tl.int64)
            number = one + N + head
            key = _turned(
                qkv, norms, cos, sin, line * width + number * C, number, one + line,
                number > 0, c, eps, C, NORM,
            )  # fmt: skip
            inside = (c < C)[None, :]
            source = line * width + (number + K)[:, None] * C + c[None, :]
            value = tl.load(qkv + source, inside, 0.0)
            to = (one + newest * K + head)[:, None] * C + c[None, :]
            tl.store(k + to, key.to(k.dtype.element_ty), inside)
            tl.store(v + to, value, inside)
        tl.debug_barrier()  # then all threads of the program see it
        live = row >= 0
        tile = _turned(
            qkv, norms, cos, sin, row * width + heads * C, heads, row, live, c, eps, C, NORM
        ).to(qkv.dtype.element_ty)
        mean, size = _meet(
            tile, k, v, start, begin, end, head, scale, K, C, BLOCK_M, BLOCK_N, BLOCK_C, WIDE
        )
        _merge(
            mean, size, row * N + heads, live, layer * SPLITS + split,
            means, sizes, arrived, out, C, PARTS, BLOCK_M, BLOCK_C,
        )  # fmt: skip


def attend(qkv, norms, cos, sin, slot, k, v, shared, starts, lengths, arrived, heads, eps):
    """The kernel of `attend_torch(rope_store_torch(...), ...)`: turns q and k, stores the new keys
    and values, and attends -> [R, N, C]. Two steps: o_p, size_p of each part p of a row's keys,
    then o = Σ o_p exp(size_p) / Σ exp(size_p), by the program that finishes a row's last part.

    Grid: (H x programs for shared segments + R x splits for the rows' own) x K. A program holds
    M = members x G queries, and reads a shared segment's keys ONCE for all of them.

    Each row stands in one line of every layer. Its newest slot is the last of its own segment; a
    row whose slot is -1 is an empty place, which writes nothing and gets undefined values. Lengths
    and lines in use are read on the device, so a captured graph stays right while they change.
    arrived: int32 zeros, at least [R, N], and zeros again afterwards. (WIDE: the interpreter cannot
    multiply bf16.)
    """
    (R, K, C), N = (len(qkv), *k.shape[1:]), heads
    (layers, lines, members), G = shared.rows.shape, N // K
    check(
        N % K == 0 and C % 2 == 0 and qkv.shape[1] == (N + 2 * K) * C and k.shape == v.shape,
        f"attend: {qkv.shape[1]} columns are not ({N} + 2 x {K}) x {C}, C even, or the values are "
        f"{tuple(v.shape)}, the keys {tuple(k.shape)}",
    )
    check(
        k.dtype == v.dtype == qkv.dtype,
        f"attend: cache of {k.dtype} and {v.dtype}, activations of {qkv.dtype}",
    )
    check(
        cos.shape == sin.shape == (R, C) and (norms is None or norms.shape == (N + K, C)),
        f"attend: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} for {R} rows of {C}, norms "
        f"{None if norms is None else tuple(norms.shape)} for {N} + {K} heads",
    )
    numbers = slot, starts, lengths, *shared
    check(
        all(x.dtype == torch.int64 for x in numbers) and {len(x) for x in numbers[:3]} == {R},
        f"attend: slots, starts and lengths are int64, {R} of each, as are the tables of Shared",
    )
    check(
        arrived.dtype == torch.int32 and arrived.numel() >= R * N,
        f"attend: {tuple(arrived.shape)} counters of {arrived.dtype} for {R} x {N} heads",
    )
    check_dense(
        qkv=qkv,
        cos=cos,
        sin=sin,
        slot=slot,
        k=k,
        v=v,
        starts=starts,
        lengths=lengths,
        arrived=arrived,
        **{f"shared.{name}": x for name, x in shared._asdict().items()},
        **({} if norms is None else dict(norms=norms)),
    )
    wide = qkv.itemsize == 4
    # R rows have R lines at most, R / members when all of them are siblings.
    splits, own_splits = splits_for(triton.cdiv(R, members), K), splits_for(R, K)
    programs = min(R * splits, triton.cdiv(2 * FILL, K))
    parts = layers * splits + own_splits
    # In fp32: the parts are summed once more.
    means = torch.empty(R, N, parts, C, device=qkv.device)
    sizes = torch.empty(R, N, parts, device=qkv.device)
    out = qkv.new_empty(R, N, C)
    _attend[(layers * programs + R * own_splits, K)](
        qkv,
        qkv if norms is None else norms,
        cos,
        sin,
        slot,
        k,
        v,
        shared.rows,
        shared.starts,
        shared.lengths,
        shared.used,
        starts,
        lengths,
        means,
        sizes,
        arrived,
        out,
        C**-0.5,
        eps,
        R,
        N,
        K,
        lines,
        programs,
        G=G,
        C=C,
        LAYERS=layers,
        MEMBERS=members,
        SPLITS=splits,
        OWN_SPLITS=own_splits,
        BLOCK_M=max(16, power_of_2(members * G)),
        BLOCK_N=16 if wide and C > 64 else 32,  # as registers allow
        BLOCK_C=max(16, power_of_2(C)),
        NORM=norms is not None,
        WIDE=INTERPRETED,
        num_warps=4 if C * qkv.itemsize <= 256 else 8,
        # 128: so that four programs of four warps share a multiprocessor.
        maxnreg=128 if C <= 128 else 255,
    )
    return out


# ---- token choice --------------------------------------------------------------------------------


def choose_torch(logits, temperature, rows):
    """token = argmin E_v / p_v: an exponential race. If token v arrives after a time E_v / p_v,
    with E_v exponential, the first to arrive is v with probability p_v (the Gumbel-max trick,
    without its logarithms).

    logits: [R, V]; temperature: 0 is greedy, with log-probabilities at 1; rows: RowState, whose key
    and position_keys (at `length`) seed E -> token [R], log-probability fp32 [R].
    """
    p = scaled(logits, temperature).softmax(-1)  # [R, V]
    if temperature == 0:
        token = p.argmax(-1)
    else:
        at = rows.position_keys[rows.row, rows.length]
        token = exponential_noise(rows.key, at, p.shape[1]).div_(p).min(-1).indices
    return token, p.gather(1, token[:, None])[:, 0].log()


LOG2_E = 1.4426950408889634


def choose_splits(rows, blocks):
    """-> the number of programs that read a row's logits, so that few rows still make 4 FILL: a
    power of two, at most `blocks`, the tiles of logits in a row."""
    wanted = power_of_2(max(1, 4 * FILL // rows))
    return min(wanted, 1 << (blocks.bit_length() - 1))


@jit
def _race(z, folded, scale, position_key, row_key, GREEDY: tl.constexpr):
    """What logits race with: log2 p - log2 E, but for what all of a row have in common."""
    if GREEDY:
        return z
    else:
        return tl.fma(z, scale, -_log2(_waits(row_key, position_key, folded)))


@jit
def _read_tile(z, first, lane, state, scale, position_key, row_key, GREEDY: tl.constexpr):
    """A tile of logits [LANES, WIDTH] goes into the state that each lane keeps."""
    top, base, total, best, choice = state
    z = z.to(tl.float32)
    top = tl.maximum(top, tl.max(z, 1))
    # A lane's sum is relative to 2^base, and fades when a larger logit comes.
    higher = top * scale
    total = total * _exp2(base - higher) + tl.sum(_exp2(tl.fma(z, scale, -higher[:, None])), 1)
    # first is a multiple of the tile, so that this is (first + lane) ^ (first + lane >> 16).
    folded = (lane ^ (first ^ (first >> 16))).to(tl.uint32)
    race = tl.max(_race(z, folded, scale, position_key, row_key, GREEDY), 1)
    choice = tl.where(race > best, first, choice)
    return top, higher, total, tl.maximum(best, race), choice


@jit
def _choose(
    logits,
    key,
    length,
    alive,
    races,
    bases,
    totals,
    choices,
    V,
    stride,
    scale,
    GREEDY: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    # A row that has ended stays as it is.
    r, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(alive + r):
        # The token's number in its row seeds the noise.
        row_key = tl.load(key + r).to(tl.uint32, bitcast=True)
        position_key = _position_key(row_key, tl.load(length + r))
        # Lane i reads logits i x WIDTH .. of each tile, and keeps its own maximum, sum and race:
        # no lane waits for another in the loop. Of the race it keeps the tile alone: which of its
        # WIDTH logits won there, `_settle` finds.
        TILE: tl.constexpr = LANES * WIDTH
        lane = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        at = logits + r * stride + lane
        # Finite, since -inf - -inf is no number; less than any logit that can be chosen.
        top = tl.full([LANES], -1e30, tl.float32)
        total = tl.zeros([LANES], tl.float32)
        best = tl.full([LANES], -float("inf"), tl.float32)
        state = top, top * scale, total, best, tl.zeros([LANES], tl.int32)
        share = tl.cdiv(tl.cdiv(V, TILE), SPLITS) * TILE  # logits of a split, whole tiles
        begin = split * share
        end = tl.maximum(begin, tl.minimum(begin + share, V))
        whole = begin + (end - begin) // TILE * TILE
        for first in range(begin, whole, TILE):
            z = tl.load(at + first)
            state = _read_tile(z, first, lane, state, scale, position_key, row_key, GREEDY)
        if whole < end:
            z = tl.load(at + whole, whole + lane < V, -float("inf"))
            state = _read_tile(z, whole, lane, state, scale, position_key, row_key, GREEDY)
        # The lanes meet. Of level lanes that with the first logits wins.
        top, base, total, best, choice = state
        high, win = tl.max(base, 0), tl.max(best, 0)
        choice = tl.where(best == win, choice + tl.arange(0, LANES) * WIDTH, 2147483647)
        part = r * SPLITS + split
        tl.store(races + part, win)
        tl.store(bases + part, high)
        tl.store(totals + part, tl.sum(total * _exp2(base - high), 0))
        tl.store(choices + part, tl.min(choice, 0))


@jit
def _settle(
    logits,
    key,
    token,
    position,
    length,
    slot,
    limit,
    alive,
    row,
    tokens,
    logprobs,
    ends,
    most,
    races,
    bases,
    totals,
    choices,
    V,
    stride,
    scale,
    GREEDY: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    if tl.load(alive + r):
        part = r * SPLITS + tl.arange(0, SPLITS)
        race, base = tl.load(races + part), tl.load(bases + part)
        first = tl.where(race == tl.max(race, 0), tl.load(choices + part), 2147483647)
        first, high = tl.min(first, 0), tl.max(base, 0)
        total = tl.sum(tl.load(totals + part) * tl.exp2(base - high), 0)
        # The winner is one of WIDTH logits: they race once more. Of level ones the first wins, as
        # in torch.argmax, and of a row that is no number.
        t, row_key = tl.load(length + r), tl.load(key + r).to(tl.uint32, bitcast=True)
        column = first + tl.arange(0, WIDTH)
        z = tl.load(logits + r * stride + column, column < V, -float("inf")).to(tl.float32)
        folded = (column ^ (column >> 16)).to(tl.uint32)
        race = _race(z, folded, scale, _position_key(row_key, t), row_key, GREEDY)
        race = tl.where(race > -float("inf"), race, -float("inf"))
        choice = tl.min(tl.where(race == tl.max(race, 0), column, 2147483647), 0)
        z = tl.load(logits + r * stride + choice).to(tl.float32)
        logprob = (tl.fma(z, scale, -high) - tl.log2(total)) * 0.6931472  # log 2
        # The row moves on, as in RowState.advance.
        out = tl.load(row + r) * most + t  # most: columns of the result
        tl.store(tokens + out, choice.to(tl.int64))
        tl.store(logprobs + out, logprob)
        tl.store(token + r, choice.to(tl.int64))
        tl.store(position + r, tl.load(position + r) + 1)
        tl.store(slot + r, tl.load(slot + r) + 1)
        tl.store(length + r, t + 1)
        ended = tl.sum((tl.load(ends + tl.arange(0, 4)) == choice).to(tl.int32), 0) > 0
        tl.store(alive + r, ~ended & (t + 1 < tl.load(limit + r)))


def choose(logits, temperature, rows):
    """The kernels of `rows.advance(*choose_torch(logits, temperature, rows))`: one pass over the
    logits, with the sum of exponentials and the race side by side.

    The largest log2 p - log2 E wins: the same token as the smallest E / p, without a division. Two
    races that differ by less than 1e-5 of themselves may end as in torch or the other way around.

    Grid: R x splits, one program a row and part of the vocabulary. Then R, one program a row that
    compares the parts' winners.
    """
    R, V = logits.shape
    check(
        logits.stride(1) == 1 and len(rows.token) == R,
        f"choose: logits {tuple(logits.shape)} for {len(rows.token)} rows",
    )
    check_dense(tokens=rows.tokens, logprobs=rows.logprobs)
    width = 16 // logits.itemsize  # what a thread loads at a time: 16 bytes
    lanes = min(256, power_of_2(triton.cdiv(V, width)))
    splits = choose_splits(R, triton.cdiv(V, lanes * width))
    # Of each part the winner's race, the sum of exponentials and what it is relative to.
    races, bases, totals = torch.empty(3, R, splits, device=logits.device)
    choices = torch.empty(R, splits, dtype=torch.int32, device=logits.device)
    parts, scale = (races, bases, totals, choices), LOG2_E / (temperature or 1)
    _choose[(R, splits)](
        logits,
        rows.key,
        rows.length,
        rows.alive,
        *parts,
        V,
        logits.stride(0),
        scale,
        GREEDY=temperature == 0,
        LANES=lanes,
        WIDTH=width,
        SPLITS=splits,
        num_warps=max(1, lanes // 32),
    )
    _settle[(R,)](
        logits,
        rows.key,
        rows.token,
        rows.position,
        rows.length,
        rows.slot,
        rows.limit,
        rows.alive,
        rows.row,
        rows.tokens,
        rows.logprobs,
        rows.ends,
        rows.tokens.shape[1],
        *parts,
        V,
        logits.stride(0),
        scale,
        GREEDY=temperature == 0,
        WIDTH=width,
        SPLITS=splits,
        num_warps=1,
    )


# The same operations under the same names: a decode step takes one of the two sets.
FUSED = SimpleNamespace(add_norm=add_norm, swiglu=swiglu)
REFERENCE = SimpleNamespace(add_norm=add_norm_torch, swiglu=swiglu_torch)
