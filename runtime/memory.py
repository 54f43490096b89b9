"""Where the memory goes: a plan before the first step, the peak after it, and an optimiser that
keeps its state on the host.

    python memory.py                                          # README's table: models x completion
                                                              length x G -> GB, computed
    python memory.py --tokens-per-microbatch 8192 --offload-optimizer             # the same with other flags

The idea. Six things take memory, and each has its flag:

    weights      the sampler's copy, in the compute type
    masters      fp32 weights and gradients: 8 bytes a parameter, and 8 more for Adam's moments,
                 unless with --offload-optimizer
    reference    one more copy in the compute type, with --kl-coef
    KV cache     2 x L x K x C numbers a token of the rollout; with --cache-tokens so many at most,
                 and rows wait their turn
    activations  what backward needs of a micro-batch (--tokens-per-microbatch): with --recompute a
                 vector a token and layer
    logits       those of 1,024 tokens at a time, never [rows, time, vocabulary]
                 (model.TokenLogprobs)

On several GPUs (--ranks, parallel.py) each has a slice of the masters, of Adam's moments and of the
reference, its share of the rollout, and whole what it is computing with: two blocks, the
embeddings.

Computed from shapes; tests/test_memory.py holds activations and logits against what torch
allocates. Not in the plan: CUDA's own context, its graphs, and what an allocator cannot use for
being in pieces.

Letters: L layers, N query heads, K key/value heads, C head size, D width, V vocabulary.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C while torch is imported is one sentence too

# isort: split
import contextlib
import os
import re
import resource
import sys
from pathlib import Path

import torch

from engine.cache import CACHE_SHARE_OF_FREE_MEMORY
from model import CHUNK, GPT
from runtime.flags import BadInput, ran_out

GB = 1e9
PHRASE = 24  # tokens of the longest guiding phrase with a large vocabulary, and a few


# ---- the plan ------------------------------------------------------------------------------------


def parameters(config):
    """How many numbers a model of this shape has."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


def block_bytes(c, rows, length, compute, flash=True):
    """What one block keeps for backward: the inputs of its norms, products and gates; attention
    weights where no fused kernel computes them (on a CPU: in fp32, and cast)."""
    inner, keys = c.heads * c.head_size, c.kv_heads * c.head_size
    numbers = (
        6 * c.width + 4 * inner + 3 * keys + 4 * c.hidden + (3 * (inner + keys) if c.qk_norm else 0)
    )
    weights = (
        0 if flash else c.heads * length * (4 + (compute.itemsize if compute.itemsize < 4 else 0))
    )
    return rows * length * (numbers * compute.itemsize + weights)


def activations(c, rows, length, compute, recompute, flash=True):
    """Bytes that a micro-batch of `rows` x `length` tokens keeps for backward: all blocks, and
    their matrices as cast to the compute type; with recompute one block at a time, and each block's
    input. Besides, the gradients inside an MLP."""
    blocks = 1 if recompute else c.depth
    cast = 0 if compute.itemsize == 4 else compute.itemsize * block_parameters(c)
    inputs = (
        rows * length * (2 * c.hidden + c.width * (c.depth if recompute else 1)) * compute.itemsize
    )
    return blocks * (block_bytes(c, rows, length, compute, flash) + cast) + inputs


def block_parameters(c):
    return (parameters(c) - c.vocab_size * c.width * (1 if c.tied else 2)) // c.depth


def frozen_bytes(c, compute, ranks):
    """Bytes of the reference; of several ranks each has a slice, but for embeddings and head: with
    no backward, nothing lets them go."""
    blocks = c.depth * block_parameters(c)
    return (blocks // ranks + parameters(c) - blocks) * compute.itemsize


def gathered(c, compute):
    """Bytes of what several ranks hold whole for a moment: two blocks (the next comes while one is
    computed), a block's gradient in fp32, and embeddings and head with their gradients."""
    block = block_parameters(c)
    return 2 * compute.itemsize * block + 4 * block + 8 * (parameters(c) - c.depth * block)


def logits(c, compute):
    """Bytes of a chunk of logits (as they come, in fp32, and their softmax), of the head's gradient
    and of its cast weights."""
    narrow = compute.itemsize if compute.itemsize < 4 else 0
    return CHUNK * c.vocab_size * (8 + narrow) + c.vocab_size * c.width * (8 + 2 * narrow)


def kv_tokens(prompts, group_sizes, prompt, completion, phrase=PHRASE):
    """Tokens whose keys and values a rollout holds at its end."""
    rows, tokens = prompts, prompts * prompt
    for number, n in enumerate(group_sizes, 1):
        rows *= n
        last = number == len(group_sizes)
        tokens += rows * completion + (0 if number == 1 else 0)
        if not last:
            tokens += rows * phrase
    return tokens


def kv_bytes(c, compute, device):
    """Bytes of a token's keys and values in all layers; on a CPU twice, since rows that decode have
    what is above them copied together."""
    return 2 * c.depth * c.kv_heads * c.head_size * compute.itemsize * (2 if device == "cpu" else 1)


def cache_room(c, compute):
    """How many tokens' keys and values may exist on a CPU: those of half of the memory that is free
    now. (A Linux that has run out ends the process without a word, so it must not come to that.)"""
    return int(CACHE_SHARE_OF_FREE_MEMORY * available("cpu")) // kv_bytes(c, compute, "cpu")


def plan(
    config,
    *,
    compute,
    tokens,
    prompts,
    group_sizes,
    prompt,
    completion,
    cache_tokens=0,
    reference=False,
    recompute=False,
    device="cuda",
    total=None,
    phrase=PHRASE,
    ranks=1,
):
    """-> {what: bytes} on the device (and "host"), for a training step with these flags (names as
    in train.py; prompt and completion: their most tokens). total: bytes that there are; of what the
    rest leaves of them the cache takes half at most (engine.cache). ranks: on each of so many
    (parallel.py), with its slice of masters and moments, and what is gathered at a time."""
    # fused attention with shared keys
    count, c, flash = parameters(config), config, device == "cuda" and compute == torch.bfloat16
    longest = prompt + completion + (len(group_sizes) - 1) * (phrase + completion)
    cached = kv_tokens(-(-prompts // ranks), group_sizes, prompt, completion, phrase)
    offload = False
    planned = {
        "weights": count * compute.itemsize,
        "masters and gradients": 8 * count // ranks,
        "Adam": 0 if offload else 8 * count // ranks,
        "reference": frozen_bytes(c, compute, ranks) if reference else 0,
        "gathered": gathered(c, compute) if ranks > 1 else 0,
        "KV cache": min(cached, cache_tokens or cached) * kv_bytes(c, compute, device),
        "activations": activations(c, max(1, tokens / longest), longest, compute, recompute, flash),
        "logits": logits(c, compute),
        "host": 16 * count // ranks if offload else 0,
    }
    if total and not cache_tokens:
        left = max(0, total - on_device(planned) + planned["KV cache"])
        planned["KV cache"] = min(planned["KV cache"], int(CACHE_SHARE_OF_FREE_MEMORY * left))
    return planned


def on_device(planned):
    return sum(size for what, size in planned.items() if what != "host")


def plan_text(planned, total):
    """The plan as a line: GB of each part, the sum, and what there is (total bytes)."""
    parts = " + ".join(
        f"{what} {size / GB:.2f}" for what, size in planned.items() if size and what != "host"
    )
    there = f" of {total / GB:.0f}"
    host = f"; on the host {planned['host'] / GB:.2f}" if planned["host"] else ""
    return f"memory, GB: {parts} = {on_device(planned) / GB:.2f}{there}{host}"


def available(device):
    """Bytes that a CUDA device has, or that are free to each process on this machine now."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        found = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
        return int(found[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    except (OSError, TypeError):  # not Linux: all that there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak(device):
    """Most bytes that were in use at a time: tensors on CUDA; on a CPU the whole process, torch
    itself (some 0.4 GB) included."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1024 if sys.platform == "linux" else 1
    )


def out_of_memory(planned, error, total):
    """The sentence for a device (or host) that has too little: where it went, and the three flags
    to lower."""
    first = str(error).split(".")[0]
    return BadInput(
        f"out of memory ({first}). Planned were: {plan_text(planned, total)}. Lower "
        "--tokens-per-microbatch (activations), "
        "--max-new-tokens (KV cache) or --cache-tokens (KV cache; 0 means half of what is free); "
        "--recompute yes and "
        "--offload-optimizer help too. What was saved is intact"
    )


MOST_ROWS = 1 << 24


@contextlib.contextmanager
def explained(planned=None, total=None):
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if ran_out(error):
            raise out_of_memory(planned, error, total) from None
        raise


def needed_in_training(planned):
    """Bytes of a plan that a step takes beside the sampler: gradients, AdamW, activations, logits."""
    parts = ("Adam", "gathered", "activations", "logits")
    return planned["masters and gradients"] // 2 + sum(planned[part] for part in parts)
