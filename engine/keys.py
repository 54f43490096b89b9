"""Seeded noise: random numbers that are a pure function of integers, equal in torch and in Triton.

    pytest tests/test_sample.py -k noise           # distribution, tails, independence
    pytest tests/test_kernels.py -k noise          # the Triton twin, bit by bit

The idea. A generator with a state makes a row's tokens depend on every draw before it: on the
batch, on the rows that have ended, on the device. Here the noise of (seed, layer, row, position,
token) is a hash of these five integers. A row draws the same tokens alone or among 300 others, in
one process or in eight, on a CPU or on a GPU.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

import functools
import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU needs none of it
    triton = tl = None


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

MULTIPLIER = 0x846CA68B - (1 << 32)  # as the signed number with these 32 bits
# Scales [0, 2³¹] to [0, 1): the largest factor in fp32 that stays below 1.
TO_UNIT = 2.0**-31 * (1 - 2.0**-24)
# Scales [-2³¹, 2³¹] to (-1/2, 1/2). In fp32 both ends are left out.
TO_HALF = 2.0**-32 * (1 - 2.0**-21)


def jit(function):
    """triton.jit, or the function itself where Triton is not installed."""
    return triton.jit(function) if triton else function


# ---- integers ------------------------------------------------------------------------------------


def mix(x):
    """A bijective hash of 32-bit integers ("lowbias32", C. Wellons): every input bit flips each
    output bit half the time.

    x: int32 tensor, or a Python int in [0, 2³²) -> the same kind. A new tensor; x stays as it is.
    """
    if isinstance(x, int):
        x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16
    # int32 products wrap at 32 bits by themselves. >> copies the sign bit: the masks clear it.
    x = x ^ (x >> 16 & 0xFFFF)
    x = x.mul_(0x7FEB352D)
    x = x.bitwise_xor_(x >> 15 & 0x1FFFF)
    x = x.mul_(MULTIPLIER)
    return x.bitwise_xor_(x >> 16 & 0xFFFF)


@jit
def _mix(x):
    """`mix` of a uint32."""
    return _mix_folded(x ^ (x >> 16))


@jit
def _mix_folded(x):
    """`_mix` of a number whose upper half is folded into its lower half already."""
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


def hash_seed(*integers):
    """Integers, in order -> one in [0, 2³²). hash_seed(seed, step) is a seed of its own for every
    step; seed + step would make step 1 of seed 0 equal to step 0 of seed 1."""
    key = 0
    for integer in integers:
        key = mix(key + 0x9E3779B9 & 0xFFFFFFFF ^ mix(integer & 0xFFFFFFFF))
    return key


def row_keys(seed, rows):
    """rows: [R] row numbers -> int32 [R], a key for each."""
    # int32 has no numbers from 2^31 on: the key becomes the signed number with the same bits.
    key = hash_seed(seed)
    return mix(rows.to(torch.int32) ^ (key - (1 << 32) if key >= 1 << 31 else key))


def position_keys(keys, positions):
    """keys: int32 [R] of rows; positions: [R] -> int32 [R], the keys of these rows at these
    positions. (Or any other shapes that broadcast.)"""
    return mix(keys ^ mix(positions.to(torch.int32) + 1))


@functools.cache
def token_keys(size, device):
    """int32 [size], the hashed numbers of a vocabulary's tokens."""
    return mix(torch.arange(size, dtype=torch.int32, device=device))


# ---- noise ---------------------------------------------------------------------------------------


def exponential_noise(keys, at, size):
    """keys: int32 [R] of rows; at: int32 [R], their `position_keys` -> fp32 [R, size], independent
    draws from the exponential distribution of mean 1."""
    # Both keys are hashed already, so half of a `mix` joins them. [R, V] is the largest tensor of a
    # decode step: it is written in place where it can be.
    bits = at[:, None] ^ token_keys(size, keys.device)  # [R, V]
    bits = bits.mul_(0x7FEB352D)
    bits = bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).mul_(MULTIPLIER)
    return exponential_from_bits(bits, keys)


def exponential_from_bits(bits, keys):
    """E = -log(1 - v), v = |bits + r| / 2³¹ uniform on (0, 1).

    bits: int32 [R, V]; keys: int32 [R] of rows, which give r in (0, 1) -> fp32 [R, V].

    A token of probability p is drawn when its E is about p or less, so rare tokens depend on the
    smallest E, and v must be fine near 0. The usual -log(u) is fine near u = 0, where E is large.
    Near u = 1 fp32 has steps of 6e-8: a token of probability 1e-7 would lose nine draws in ten.

    r fills the step between two integers. With r = 1/2 in every row, tokens of 1e-9 would be drawn
    0.991 times as often as they should be, of 1e-10 0.46 times. With a key's r no token down to
    1e-13 is drawn more than 1 % too rarely. v is never 0 (E = 0 wins at ANY probability) and never
    1 (E = inf loses to a token of probability 0).
    """
    r = keys[:, None] * TO_HALF + 0.5
    return bits.float().add_(r).abs_().mul_(-TO_UNIT).log1p_().neg_()


# The hardware's logarithm and exponential, one instruction each: log2 is right to 2⁻²² (absolutely
# near 1, where log2 is 0). tl.log is a subroutine of thirty, tl.exp2 tests for numbers below 2⁻¹²⁶,
# which become 0 here. The interpreter has numpy's instead.
FAST = tl.constexpr(not INTERPRETED) if tl else None


@jit
def _log2(x):
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@jit
def _exp2(x):
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@jit
def _waits_from_bits(bits, key):
    """`exponential_from_bits`, divided by log 2: a race is the same in any unit of time.

    log2(1 - v) has too few digits at small v: below 1/16 a polynomial, the nearest of its degree,
    right to 2e-6 of itself.
    """
    # bitcast: the signed number with the same bits, as torch has it.
    r = key.to(tl.int32, bitcast=True).to(tl.float32) * 2.3283053e-10 + 0.5  # TO_HALF, in fp32
    v = tl.abs(bits.to(tl.int32, bitcast=True).to(tl.float32) + r) * 4.6566126e-10  # TO_UNIT
    near = v * tl.fma(v, tl.fma(v, 0.5167808, 0.7204905), 1.4426980)
    return tl.where(v < 0.0625, near, -_log2(1.0 - v))


@jit
def _position_key(key, position):
    """`position_keys` of one row, a uint32."""
    return _mix(key ^ _mix((position + 1).to(tl.uint32)))


@jit
def _waits(key, position_key, folded):
    """`exponential_noise` of one row and a block of tokens, divided by log 2. folded: their
    numbers, ready for `_mix_folded`."""
    bits = (position_key ^ _mix_folded(folded)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return _waits_from_bits(bits, key)
