"""How much memory a run will take, computed from shapes before the first step; and what it took.

    python -m tools.memory_table                # models x completion length x group sizes -> GB

Six things take memory, and each has its flag:

    weights      the sampler's copy, in the compute type
    masters      fp32 weights, gradients and Adam's two moments: 16 bytes a parameter
    reference    one more copy, with --kl-coef or a method that looks at it
    KV cache     2 x L x K x C numbers a token of the rollout (--cache-tokens limits it)
    activations  what backward needs of a micro-batch (--tokens-per-microbatch); with --recompute a
                 vector a token and block
    logits       those of 1,024 tokens at a time, never [rows, time, vocabulary]

Each of several ranks holds a slice of masters, moments and reference, its share of the rollout, and
whole blocks while they are computed. Not in the plan: CUDA's own context, its graphs, and gaps that
an allocator cannot use. tests/test_memory.py compares activations and logits with what torch
allocates.

Letters: L blocks, N query heads, K key/value heads, C head size, D width, V vocabulary.
"""

import functools
import math
import os
import re
import resource
import sys
from pathlib import Path

import torch

from engine.cache import CACHE_SHARE_OF_FREE_MEMORY as CACHE_SHARE
from model import CHUNK, GPT
from runtime.flags import BadInput

GB = 1e9


# ---- parts of the plan ---------------------------------------------------------------------------


@functools.cache
def parameters(shape):
    """How many numbers a model of this shape (model.ModelConfig) has."""
    with torch.device("meta"):  # a model without memory
        return sum(p.numel() for p in GPT(shape).parameters())


def block_parameters(shape):
    embeddings = shape.vocab_size * shape.width * (1 if shape.tied else 2)
    return (parameters(shape) - embeddings) // shape.depth


def block_bytes(shape, rows, length, compute, flash=True):
    """Bytes that one block keeps for backward: what its norms give, the inputs of its products and
    gates. Without a fused attention kernel also the attention weights."""
    inner, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    numbers = 4 * shape.width + 4 * inner + 3 * keys + 4 * shape.hidden
    if shape.qk_norm:
        numbers += inner + keys
    if not flash:
        numbers += shape.heads * length  # [heads, length, length] weights a row
    return rows * length * numbers * compute.itemsize


def activations(shape, rows, length, compute, recompute, flash=True):
    """Bytes that a micro-batch of `rows` x `length` tokens keeps for backward.

    All blocks, and their matrices cast to the compute type; with recompute one block at a time, and
    the input of each. In both cases the gradients inside one MLP.
    """
    blocks = 1 if recompute else shape.depth
    cast = 0 if compute.itemsize == 4 else compute.itemsize * block_parameters(shape)
    numbers = 2 * shape.hidden + shape.width * (shape.depth if recompute else 1)
    kept = block_bytes(shape, rows, length, compute, flash) + cast
    return blocks * kept + rows * length * numbers * compute.itemsize


def frozen_bytes(shape, compute, ranks):
    """Bytes of the reference. Each of several ranks has a slice of the blocks, but whole embeddings
    and head: without a backward pass fully_shard keeps them gathered."""
    blocks = shape.depth * block_parameters(shape)
    return (blocks // ranks + parameters(shape) - blocks) * compute.itemsize


def gathered(shape, compute):
    """Bytes that several ranks hold whole for a moment: two blocks (the next is gathered while one
    is computed), a block's fp32 gradient, and embeddings and head with their gradients."""
    block = block_parameters(shape)
    others = parameters(shape) - shape.depth * block
    return 2 * compute.itemsize * block + 4 * block + 8 * others


def logits(shape, compute):
    """Bytes of a chunk of logits (in fp32, their softmax, and one of the two in the compute type),
    of the head's gradient and of its cast weights."""
    narrow = compute.itemsize if compute.itemsize < 4 else 0
    head = shape.vocab_size * shape.width
    return CHUNK * shape.vocab_size * (8 + narrow) + head * (8 + 2 * narrow)


# ---- the KV cache --------------------------------------------------------------------------------


def row_tokens(layers, prompt, completion, phrase):
    """Tokens of the longest row of a rollout: a prompt, a completion of each layer, and a phrase
    between two completions."""
    return prompt + layers * completion + (layers - 1) * phrase


def cached_tokens(prompts, group_sizes, prompt, completion, phrase, device="cuda"):
    """Tokens whose keys and values a whole rollout holds at its end.

    Layer k has prompts x g_1 x ... x g_k rows. The completions of a layer that is extended exist
    twice: as they were decoded, and copied in front of the phrase, to be the prefix of the next. On
    a CPU each row and each prefix has a copy of all that is before it.
    """
    rows, new, path, tokens = prompts, prompt, prompt, 0
    for n in group_sizes:
        # The prefixes of this layer, then its rows.
        tokens += rows * (path if device == "cpu" else new)
        rows *= n
        tokens += rows * (completion + (path if device == "cpu" else 0))
        new = completion + phrase
        path += new
    return tokens


def kv_bytes(shape, compute, device):
    """Bytes of a token's keys and values in all blocks. On a CPU twice: rows that close up, or that
    get more slots, are copied."""
    numbers = 2 * shape.depth * shape.kv_heads * shape.head_size
    return numbers * compute.itemsize * (2 if device == "cpu" else 1)


def cache_room(shape, compute):
    """Tokens whose keys and values fit CACHE_SHARE of the memory of a CPU that is free now. (Linux
    kills a process that runs out of memory, without an exception, so it must not happen.)"""
    return int(CACHE_SHARE * available("cpu")) // kv_bytes(shape, compute, "cpu")


# ---- the plan ------------------------------------------------------------------------------------


def plan(
    shape,
    *,
    compute,
    prompts,
    group_sizes,
    prompt,
    completion,
    phrase,
    tokens_per_microbatch,
    cache_tokens=0,
    reference=None,
    recompute=False,
    device="cuda",
    total=None,
    ranks=1,
):
    """-> {part: bytes} on the device of each rank, for a training step of a model of this shape.

    prompt, completion, phrase: their most tokens. prompts: questions of a step, of all ranks.
    reference: the type that one is held in, if any. The other names are those of the flags. total:
    bytes of the device; the KV cache then gets at most CACHE_SHARE of what the rest leaves.
    """
    count, flash = parameters(shape), device == "cuda" and compute == torch.bfloat16
    longest = row_tokens(len(group_sizes), prompt, completion, phrase)
    cached = cached_tokens(-(-prompts // ranks), group_sizes, prompt, completion, phrase, device)
    # A fraction of a row is meant: the plan counts tokens. A row longer than a micro-batch is
    # computed whole.
    rows = max(1, tokens_per_microbatch / longest)
    in_flight = -(-prompts // ranks) * math.prod(group_sizes)
    planned = {
        "weights": count * compute.itemsize,
        "masters and gradients": 8 * count // ranks,
        "Adam": 8 * count // ranks,
        "reference": frozen_bytes(shape, reference, ranks) if reference else 0,
        "gathered": gathered(shape, compute) if ranks > 1 else 0,
        "KV cache": min(cached, cache_tokens or cached) * kv_bytes(shape, compute, device),
        "activations": activations(shape, rows, longest, compute, recompute, flash),
        # Of the trainer, and of each row in flight: those of its prefix, and of its next token.
        "logits": logits(shape, compute) + 2 * 4 * in_flight * shape.vocab_size,
    }
    if total and not cache_tokens:
        # What everything but the cache leaves.
        left = max(0, total - sum(planned.values()) + planned["KV cache"])
        planned["KV cache"] = min(planned["KV cache"], int(CACHE_SHARE * left))
    return planned


def reserved(planned):
    """Bytes of a plan that a step takes only after the first rollout, so that the KV cache must
    leave them free: gradients, Adam's moments, activations, logits, gathered blocks."""
    # Gradients are half of "masters and gradients", and do not exist before the first backward
    # pass.
    later = ("Adam", "gathered", "activations", "logits")
    return planned["masters and gradients"] // 2 + sum(planned[part] for part in later)


def plan_text(planned, total):
    """The plan in one line: GB of each part, their sum, and `total`, the bytes that there are."""
    parts = " + ".join(f"{part} {size / GB:.2f}" for part, size in planned.items() if size)
    return f"memory, GB: {parts} = {sum(planned.values()) / GB:.2f} of {total / GB:.0f}"


def out_of_memory(planned, error, total):
    """-> BadInput for a device or host with too little memory: the plan, and the flags to lower."""
    first = str(error).split(".")[0]
    return BadInput(
        f"out of memory ({first}). Planned were: {plan_text(planned, total)}. Lower "
        "--tokens-per-microbatch (activations), --max-new-tokens (KV cache) or --cache-tokens (KV "
        "cache; 0 means half of what is free); --recompute yes helps too. What was saved is intact"
    )


# ---- what there is, and what was taken -----------------------------------------------------------


def available(device):
    """Bytes that a CUDA device has; of a CPU, bytes that are free now for each process of torchrun
    on this machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        found = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
        return int(found[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    except (OSError, TypeError):  # not Linux: all memory of the machine
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak(device):
    """Most bytes that were in use at a time: tensors on CUDA; on a CPU the whole process, Python
    and torch (some 0.4 GB) included."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1024 if sys.platform == "linux" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
