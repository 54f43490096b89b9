"""What a decode step is made of, besides matrix products: each operation as a Triton kernel and as
its twin in torch.

    python bench.py kernels                        # what each kernel moves and computes; registers
                                                   and spills for sm_80, sm_90
    pytest tests/test_kernels.py                   # every kernel in Triton's interpreter, against
                                                   its twin (needs triton, not a GPU)

The idea. Between two matrix products a decode step does little arithmetic on small tensors, and
torch launches several kernels for each line of it, every one of which reads and writes memory. A
fused kernel reads what it needs once and writes the result. Here are five, and for each: the
mathematics in a line, the grid in a line (who computes what), the twin, and a wrapper that checks
what a kernel cannot (a wrong stride gives wrong numbers, not an error) and launches it.

    add_norm     x + δ, and its RMSNorm               1 program a row
    swiglu       silu(gate) · up                      1 program a row and 1,024 columns
    rope_store   q/k norm, RoPE, keys and values      1 program a row and head
                 into the cache
    attend       attention to segments of the cache   1 program a segment (with the rows that share
                 it), key/value head and split,
                                                      then 1 program a row and head that merges what
                                                      they found
    choose       temperature, noise, argmax,          1 program a row, one pass over the logits
                 log-probability, bookkeeping

The twins are what runs on a CPU (attention apart: there cache.Grouped makes larger products of
rows; the twin here is its oracle).

Random numbers are written twice, in torch and in Triton, from the same integers: a row draws the
same bits on every device.

Letters: R rows, N query heads, K key/value heads, G = N / K query heads a key/value head, C head
size, V vocabulary, D width, F inner size of the MLP. "Slots" are places for one token's keys and
values: the cache is k, v [slots, K, C] for each layer.
"""

from __future__ import annotations

import functools
import os

import torch
import torch.nn.functional as F

from model import rms_normalise, rotate, scaled

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU needs none of it
    triton = tl = None


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def jit(function):
    return triton.jit(function) if triton else function


def power_of_2(n):
    """The smallest power of two that is at least n: Triton's blocks have such sizes."""
    return 1 << max(0, n - 1).bit_length()


def check(condition, sentence):
    if not condition:
        raise ValueError(sentence)


def check_dense(**tensors):
    """Kernels compute addresses themselves: what they are given must lie in memory as its shape
    says."""
    for name, x in tensors.items():
        check(
            x.is_contiguous(),
            f"{name} of shape {tuple(x.shape)} has strides {x.stride()}: it must be contiguous",
        )


# ---- keyed random numbers ------------------------------------------------------------------------

MULTIPLIER = 0x846CA68B - (1 << 32)  # as the signed number with these 32 bits
# scales [0, 2³¹] to below 1: the largest number in fp32 that does
TO_1 = 2.0**-31 * (1 - 2.0**-24)
INSIDE = 2.0**-32 * (1 - 2.0**-21)  # and [-2³¹, 2³¹] to (-1/2, 1/2), both ends left out in fp32


def mix(x):
    """A bijective scrambler of 32-bit integers ("lowbias32", C. Wellons): every input bit flips
    each output bit half the time.

    x: int32 tensor, or a Python int in [0, 2³²) -> the same kind. Tensors wrap at 32 bits by
    themselves; >> on a signed tensor copies the sign, so its top bits are masked off.
    """
    if isinstance(x, int):
        x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16
    x = x ^ (x >> 16 & 0xFFFF)
    x = x.mul_(0x7FEB352D)
    x = x.bitwise_xor_(x >> 15 & 0x1FFFF)
    x = x.mul_(MULTIPLIER)
    return x.bitwise_xor_(x >> 16 & 0xFFFF)


@jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


def fold(*numbers):
    """One 32-bit number from several, order included: fold(seed, step) is a seed of its own for
    every step."""
    key = 0
    for number in numbers:
        key = mix(key + 0x9E3779B9 & 0xFFFFFFFF ^ mix(number & 0xFFFFFFFF))
    return key


def row_keys(seed, rows):
    """rows: [R] row numbers -> int32 [R], a key for each."""
    key = fold(seed)
    return mix(rows.to(torch.int32) ^ (key - (1 << 32) if key >= 1 << 31 else key))


def at_position(keys, positions):
    """keys: int32 [R] of rows; positions: [R] -> int32 [R], the keys of these rows at these
    positions."""
    return mix(keys ^ mix(positions.to(torch.int32) + 1))


@functools.cache
def columns(size, device):
    """int32 [size], scrambled numbers of the tokens of a vocabulary."""
    return mix(torch.arange(size, dtype=torch.int32, device=device))


def exponentials(keys, positions, size):
    """keys: int32 [R] of rows; positions: [R] -> fp32 [R, size], independent draws from the
    exponential distribution of mean 1.

    Keys and columns are well mixed already, so half of a `mix` joins them.
    """
    # [R, V], the largest tensor of a step:
    bits = (at_position(keys, positions)[:, None] ^ columns(size, keys.device)).mul_(0x7FEB352D)
    # written in place where it can be
    bits = bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).mul_(MULTIPLIER)
    return waits(bits, keys)


def waits(bits, keys):
    """bits: int32 [R, V], keys: int32 [R] of rows -> fp32 [R, V], E = -log(1 - v) with v uniform on
    (0, 1).

    A token of probability p is drawn when its E is about p or less, so rare tokens live on the
    smallest E: v must be fine near 0. (The obvious -log u is fine near u = 0, where E is large;
    near u = 1 fp32 has steps of 6e-8, and a token of 1e-7 loses nine draws in ten.) v = |bits + r|
    / 2³¹, and r in (0, 1), from the row's key, fills the step between two integers. With 1/2 for
    every row, tokens of 1e-9 would be drawn 0.991 times as often as they should be, of 1e-10 0.46
    times; with r, down to 1e-13, none of them is short of 1 %. v is never 0 (E = 0 would win at ANY
    probability) nor 1 (E = inf would lose to a token that cannot come).
    """
    r = keys[:, None] * INSIDE + 0.5
    return bits.float().add_(r).abs_().mul_(-TO_1).log1p_().neg_()


@jit
def _waits(bits, key):
    """log(1 - v) keeps too few digits of a small v, and Triton has no log1p: below 1/64 four terms
    of its series, exact to 2⁻²⁶."""
    r = key.to(tl.int32, bitcast=True).to(tl.float32) * 2.3283053e-10 + 0.5  # INSIDE, in fp32
    v = tl.abs(bits.to(tl.int32, bitcast=True).to(tl.float32) + r) * 4.6566126e-10  # TO_1
    return tl.where(
        v < 0.015625, v * (1.0 + v * (0.5 + v * (0.33333334 + v * 0.25))), -tl.log(1.0 - v)
    )


@jit
def _exponentials(key, here, column):
    bits = (here ^ _mix(column.to(tl.uint32))) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return _waits(bits, key)


# ---- add, norm -----------------------------------------------------------------------------------


def add_norm_torch(x, delta, weight, eps):
    """x, delta: [R, D] (delta may be None); weight: [D] -> x + δ, and (x + δ) / rms(x + δ) ·
    weight."""
    x = x if delta is None else x + delta
    return x, rms_normalise(x, eps) * weight


@jit
def _add_norm(
    x, delta, weight, total, normed, D, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr
):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < D
    at = row.to(tl.int64) * D + column
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    if HAS_DELTA:
        value += tl.load(delta + at, inside, 0.0).to(tl.float32)
    stored = value.to(total.dtype.element_ty)
    tl.store(total + at, stored, inside)
    value = stored.to(tl.float32)  # what the next layer will read
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
    w = tl.load(weight + column, inside, 0.0).to(tl.float32)
    tl.store(normed + at, (value * scale * w).to(normed.dtype.element_ty), inside)


def add_norm(x, delta, weight, eps):
    """The kernel of `add_norm_torch`: reads x and δ once, writes the sum and its norm. Grid:
    rows."""
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
    """[R, 2F], gate beside up -> silu(gate) · up [R, F]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@jit
def _swiglu(gate_up, out, size, BLOCK: tl.constexpr):
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
    """The kernel of `swiglu_torch`. Grid: rows x blocks of 1,024 columns."""
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
    """qkv: [R, (N + 2K) C]; norms: None, or q's and k's weights [N + K, C]; cos, sin: [R, C] of
    each row's position; slot: [R]; k, v: [slots, K, C], written -> q [R, N, C], turned: norm first,
    then x cos + roll(x) sin."""
    K, C = k.shape[1:]
    qk, value = qkv.view(len(qkv), -1, C).split([heads + K, K], 1)
    qk = qk if norms is None else rms_normalise(qk, eps) * norms
    q, key = rotate(qk, cos[:, None], sin[:, None]).split([heads, K], 1)
    k.index_copy_(0, slot, key)
    v.index_copy_(0, slot, value)
    return q


@jit
def _rope_store(
    qkv,
    norms,
    cos,
    sin,
    slot,
    q,
    k,
    v,
    eps,
    N,
    K,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK)
    inside, other = c < C, (c + C // 2) % C  # the partner that RoPE turns c with
    at = qkv + row * (N + 2 * K) * C + head * C
    x, y = (
        tl.load(at + c, inside, 0.0).to(tl.float32),
        tl.load(at + other, inside, 0.0).to(tl.float32),
    )
    where = tl.load(slot + row)
    if head < N + K:
        if NORM:
            scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / C + eps)
            x *= scale * tl.load(norms + head * C + c, inside, 0.0).to(tl.float32)
            y *= scale * tl.load(norms + head * C + other, inside, 0.0).to(tl.float32)
        turn = row * C + c
        x = x * tl.load(cos + turn, inside, 0.0).to(tl.float32) + y * tl.load(
            sin + turn, inside, 0.0
        ).to(tl.float32)
    x = x.to(q.dtype.element_ty)
    if head < N:
        tl.store(q + (row * N + head) * C + c, x, inside)
    elif head < N + K:
        tl.store(k + (where * K + head - N) * C + c, x, c < tl.where(where >= 0, C, 0))
    else:
        tl.store(v + (where * K + head - N - K) * C + c, x, c < tl.where(where >= 0, C, 0))


def rope_store(qkv, norms, cos, sin, slot, k, v, heads, eps):
    """The kernel of `rope_store_torch`. Grid: rows x (N + 2K) heads. A row whose slot is -1 is an
    empty place: it writes nothing."""
    (R, K, C), N = (len(qkv), *k.shape[1:]), heads
    check(
        qkv.shape[1] == (N + 2 * K) * C and C % 2 == 0,
        f"rope_store: {qkv.shape[1]} columns are not ({N} + 2 x {K}) x {C}, C even",
    )
    check(
        k.dtype == v.dtype == qkv.dtype,
        f"rope_store: cache of {k.dtype}, activations of {qkv.dtype}",
    )
    check_dense(
        qkv=qkv,
        cos=cos,
        sin=sin,
        slot=slot,
        k=k,
        v=v,
        **({} if norms is None else dict(norms=norms)),
    )
    q = qkv.new_empty(R, N, C)
    _rope_store[(R, N + 2 * K)](
        qkv,
        qkv if norms is None else norms,
        cos,
        sin,
        slot,
        q,
        k,
        v,
        eps,
        N,
        K,
        C=C,
        BLOCK=power_of_2(C),
        NORM=norms is not None,
        num_warps=1,
    )
    return q


# ---- decode attention ----------------------------------------------------------------------------


def attend_torch(q, k, v, groups):
    """softmax(q·kᵀ / sqrt C) v over ALL segments of a row, in fp32: the oracle. q: [R, N, C]; k, v:
    [slots, K, C].

    groups: [(rows [I, M], starts [I], lengths [I]), ...]: segment i of a group is slots starts[i]
    .. starts[i] + lengths[i] - 1, and its keys are seen by the rows named in rows[i] (-1: nobody).
    -> [R, N, C]; 0 for rows without keys.
    """
    (R, N, C), K, seen = q.shape, k.shape[1], [[] for _ in q]
    for rows, starts, lengths in groups:
        for members, start, length in zip(rows.tolist(), starts.tolist(), lengths.tolist()):
            for row in set(members) - {-1}:
                seen[row] += range(start, start + length)
    out = torch.zeros(R, K, N // K, C, dtype=torch.float32)
    for row, slots in enumerate(seen):
        # [K, G, T]
        weights = (
            q[row].view(K, -1, C).float() @ k[slots].float().permute(1, 2, 0) * C**-0.5
        ).softmax(-1)
        out[row] = weights @ v[slots].float().transpose(0, 1)
    return out.view(R, N, C).to(q.dtype)


FILL = 256  # programs that keep a GPU busy


def splits_for(rows, kv_heads):
    """Into how many parts the keys of a segment are split, so that few rows still make FILL
    programs: a power of two, at most 16."""
    return max(1, min(16, power_of_2(FILL // (rows * kv_heads))))


def members_for(dtype, heads, kv_heads):
    """How many rows meet a shared segment in one tile: with G queries each, 64 queries on the
    tensor cores. Products in fp32 are summed in ordinary registers, of which 64 queries want more
    than there are (5 to 10 kB a thread go to memory): 16 queries then."""
    return max(1, (16 if dtype.itemsize == 4 else 64) * kv_heads // heads)


@jit
def _attend(
    q,
    k,
    v,
    rows,
    starts,
    lengths,
    out,
    lse,
    first_part,
    scale,
    R,
    N,
    K,
    G: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    MEMBERS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    item, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    m, n, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    # query m: member m // G, head m % G
    row = tl.load(rows + item * MEMBERS + m // G, m // G < MEMBERS, -1).to(tl.int64)
    live = (row >= 0) & (row < R)
    length, start = tl.load(lengths + item), tl.load(starts + item)
    share = tl.cdiv(tl.cdiv(length, BLOCK_N), SPLITS) * BLOCK_N  # keys of a split, whole blocks
    begin = split * share
    end = tl.minimum(begin + share, length)
    at_q = (row * N + head * G + m % G) * C
    tile = tl.load(q + at_q[:, None] + c[None, :], live[:, None] & (c < C)[None, :], 0.0)  # [M, C]
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)  # running maximum, sum, weighted values
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for j in range(begin, end, BLOCK_N):
        seen = j + n < end
        at = ((start + j + n) * K + head) * C
        # [C, N]
        keys = tl.load(k + at[None, :] + c[:, None], seen[None, :] & (c < C)[:, None], 0.0)
        # [N, C]
        values = tl.load(v + at[:, None] + c[None, :], seen[:, None] & (c < C)[None, :], 0.0)
        if WIDE:
            tile, keys, values = tile.to(tl.float32), keys.to(tl.float32), values.to(tl.float32)
        score = tl.dot(tile, keys, input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight, fade = tl.exp(score - higher[:, None]), tl.exp(top - higher)
        acc = acc * fade[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
        total, top = total * fade + tl.sum(weight, 1), higher
    part = (row * N + head * G + m % G) * PARTS + first_part + split
    tl.store(lse + part, top + tl.log(total), live & (total > 0))
    tl.store(lse + part, top, live & (total == 0))  # -inf: nothing was seen
    tl.store(
        out + part[:, None] * C + c[None, :],
        acc / tl.maximum(total, 1e-30)[:, None],
        live[:, None] & (c < C)[None, :],
    )


@jit
def _merge(parts, lse, out, C, PARTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    at, p, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    size = tl.load(lse + at * PARTS + p, p < PARTS, -float("inf"))
    top = tl.max(size, 0)
    weight = tl.where(size > -float("inf"), tl.exp(size - top), 0.0)
    value = tl.load(
        parts + (at * PARTS + p)[:, None] * C + c[None, :],
        (p < PARTS)[:, None] & (c < C)[None, :],
        0.0,
    )
    value = tl.sum(value * weight[:, None], 0) / tl.maximum(tl.sum(weight, 0), 1e-30)
    tl.store(out + at * C + c, value.to(out.dtype.element_ty), c < C)


def attend(q, k, v, groups, splits=1):
    """The kernels of `attend_torch`. Grid: segments x K x splits, each with a tile of M = members x
    G queries that meets the segment's keys ONCE, on the tensor cores; then R x N, merging o = Σ o_p
    exp(lse_p) / Σ exp(lse_p) over the parts p a row has.

    A group is a kernel launch and `splits` parts of every row: one for each generation of shared
    prefixes, whose members are siblings, and one for the rows' own segments. Lengths are read on
    the device, so a captured graph serves whatever they have become. Rows named in no group get
    whatever was in memory: they must be rows that nobody looks at. (WIDE: the interpreter cannot
    multiply bf16 matrices.)
    """
    (R, N, C), K = q.shape, k.shape[1]
    G, parts, first = N // K, splits * len(groups), 0
    check(
        N % K == 0 and k.shape == v.shape and k.shape[2] == C and k.dtype == v.dtype == q.dtype,
        f"attend: q {tuple(q.shape)} {q.dtype} does not go with keys {tuple(k.shape)} {k.dtype}, "
        f"values {tuple(v.shape)} {v.dtype}",
    )
    wide = q.itemsize == 4
    block = (64 if C <= 64 else 32) // (2 if wide else 1)  # keys at a time: what registers hold
    # without this ptxas saves some and spills 8 or 16 bytes for it
    registers = 128 if wide else None
    found = torch.empty(R, N, parts, C, device=q.device)
    lse = torch.empty(R, N, parts, device=q.device)
    for rows, starts, lengths in groups:
        check(
            rows.dim() == 2 and len(rows) == len(starts) == len(lengths),
            "attend: a start and a length for each row of members",
        )
        check_dense(q=q, k=k, v=v, rows=rows, starts=starts, lengths=lengths)
        _attend[(len(rows), K, splits)](
            q,
            k,
            v,
            rows,
            starts,
            lengths,
            found,
            lse,
            first,
            C**-0.5,
            R,
            N,
            K,
            G=G,
            C=C,
            PARTS=parts,
            MEMBERS=rows.shape[1],
            SPLITS=splits,
            BLOCK_M=max(16, power_of_2(rows.shape[1] * G)),
            BLOCK_N=block,
            BLOCK_C=max(16, power_of_2(C)),
            WIDE=INTERPRETED,
            num_warps=4 if C * q.itemsize <= 256 else 8,
            maxnreg=registers,
        )
        first += splits
    out = torch.empty_like(q)
    _merge[(R * N,)](
        found,
        lse,
        out,
        C,
        PARTS=parts,
        BLOCK_P=power_of_2(parts),
        BLOCK_C=power_of_2(C),
        num_warps=1,
    )
    return out


# ---- token choice --------------------------------------------------------------------------------


def choose_torch(logits, temperature, rows):
    """An exponential race: if every token v waits a time E_v / p_v, E_v exponential, the first to
    arrive is v with probability p_v. (Its logarithm is the Gumbel-max trick: argmax log p_v - log
    E_v.) logits: [R, V]; temperature: 0 is greedy, with log-probabilities at 1.

    rows: cache.Rows, whose rows that are alive are moved on by a token: token and fp32
    log-probability noted, length and position up by one, and no longer alive after an end token or
    at their limit.
    """
    p = scaled(logits, temperature).softmax(-1)  # [R, V]
    token = (
        p.argmax(-1)
        if temperature == 0
        else exponentials(rows.key, rows.length, p.shape[1]).div_(p).argmin(-1)
    )
    rows.advance(token, p.gather(1, token[:, None])[:, 0].log())


@jit
def _choose(
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
    V,
    stride,
    temperature,
    ends,
    most,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    if tl.load(alive + r):
        t = tl.load(length + r)
        mine = tl.load(key + r).to(tl.uint32, bitcast=True)
        here = _mix(mine ^ _mix((t + 1).to(tl.uint32)))
        # best: the largest p / E, as far as p is known
        best, best_z, choice = 0.0, -float("inf"), 0
        top, total = -float("inf"), 0.0
        for first in range(0, V, BLOCK):
            v = first + tl.arange(0, BLOCK)
            z = tl.load(logits + r * stride + v, v < V, -float("inf")).to(tl.float32) / temperature
            higher = tl.maximum(top, tl.max(z, 0))
            # a filter may leave nothing of a block
            safe = tl.where(higher == -float("inf"), 0.0, higher)
            weight, fade = tl.exp(z - safe), tl.exp(top - safe)  # p, but for a factor
            total, best, top = total * fade + tl.sum(weight, 0), best * fade, higher
            race = weight if GREEDY else weight / _exponentials(mine, here, v)
            winner = tl.argmax(race, 0)
            high = tl.max(race, 0)
            z_there = tl.sum(tl.where(v == first + winner, z, 0.0), 0)
            choice = tl.where(high > best, first + winner, choice)
            best_z = tl.where(high > best, z_there, best_z)
            best = tl.maximum(best, high)
        out = tl.load(row + r) * most + t
        tl.store(tokens + out, choice.to(tl.int64))
        tl.store(logprobs + out, best_z - top - tl.log(total))
        tl.store(token + r, choice.to(tl.int64))
        tl.store(position + r, tl.load(position + r) + 1)
        tl.store(slot + r, tl.load(slot + r) + 1)
        tl.store(length + r, t + 1)
        ended = tl.sum((tl.load(ends + tl.arange(0, 4)) == choice).to(tl.int32), 0) > 0
        tl.store(alive + r, ~ended & (t + 1 < tl.load(limit + r)))


def choose(logits, temperature, rows):
    """The kernel of `choose_torch`. Grid: rows; each runs once over its logits, with the sum of
    exponentials and the race side by side."""
    R, V = logits.shape
    check(
        logits.stride(1) == 1 and len(rows.token) == R,
        f"choose: logits {tuple(logits.shape)} for {len(rows.token)} rows",
    )
    check_dense(tokens=rows.tokens, logprobs=rows.logprobs)
    _choose[(R,)](
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
        V,
        logits.stride(0),
        float(temperature or 1),
        rows.ends,
        rows.tokens.shape[1],
        GREEDY=temperature == 0,
        BLOCK=min(4096, power_of_2(V)),
        num_warps=8 if V > 4096 else 4,
    )
