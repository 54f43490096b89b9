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
import os
import re
import resource
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from model import CHUNK, GPT, ModelConfig
from runtime import distributed
from runtime.flags import BadInput, guarded, parse_flags
from sample import SHARE

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


def kv_tokens(prompts, attempts, corrections, prompt, completion, layers=2, phrase=PHRASE):
    """Tokens whose keys and values a whole rollout has at its end: questions once, attempts, their
    copies with a phrase, corrections."""
    first = prompts * (prompt + attempts * completion)
    return (
        first
        if layers == 1
        else first + prompts * attempts * (completion + phrase + corrections * completion)
    )


def kv_bytes(c, compute, device):
    """Bytes of a token's keys and values in all layers; on a CPU twice, since rows that decode have
    what is above them copied together."""
    return 2 * c.depth * c.kv_heads * c.head_size * compute.itemsize * (2 if device == "cpu" else 1)


def cache_room(c, compute):
    """How many tokens' keys and values may exist on a CPU: those of half of the memory that is free
    now. (A Linux that has run out ends the process without a word, so it must not come to that.)"""
    return int(SHARE * available("cpu")) // kv_bytes(c, compute, "cpu")


def plan(
    config,
    *,
    compute,
    tokens,
    prompts,
    attempts,
    corrections,
    prompt,
    completion,
    layers=2,
    cache_tokens=0,
    reference=False,
    recompute=False,
    offload=False,
    device="cuda",
    total=None,
    phrase=PHRASE,
    ranks=1,
):
    """-> {what: bytes} on the device (and "host"), for a training step with these flags (names as
    in train.py; prompt and completion: their most tokens). total: bytes that there are; of what the
    rest leaves of them the cache takes half at most (sample.SHARE). ranks: on each of so many
    (parallel.py), with its slice of masters and moments, and what is gathered at a time."""
    # fused attention with shared keys
    count, c, flash = parameters(config), config, device == "cuda" and compute == torch.bfloat16
    longest = prompt + completion + (phrase + completion if layers == 2 else 0)
    cached = kv_tokens(
        -(-prompts // ranks), attempts, corrections, prompt, completion, layers, phrase
    )
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
        planned["KV cache"] = min(planned["KV cache"], int(SHARE * left))
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


# ---- optimiser on the host -----------------------------------------------------------------------


class HostAdamW:
    """AdamW whose moments live in host memory, with masters to update there; the device keeps fp32
    weights and gradients. Same arithmetic, so the same result.

    A step copies gradients to the host, updates there (torch's fused CPU kernel), and copies the
    weights back: 8 bytes a parameter over the bus, for 8 bytes a parameter less on the device.
    """

    def __init__(self, params, lr, **options):
        self.params = list(params)  # on several ranks slices, of which each has its part
        mine = [distributed.local(p.detach()) for p in self.params]
        buffer = torch.empty(2, sum(x.numel() for x in mine))  # masters, and gradients on their way
        if self.params[0].is_cuda:
            self.pin(buffer)
        masters, self.grads = (
            [to.view(x.shape) for to, x in zip(part.split([x.numel() for x in mine]), mine)]
            for part in buffer
        )
        self.masters = [torch.nn.Parameter(to.copy_(x)) for to, x in zip(masters, mine)]
        self.adam = torch.optim.AdamW(self.masters, lr, fused=True, **options)
        self.param_groups = self.adam.param_groups

    def pin(self, buffer):
        """Locks this memory for as long as the optimiser lives: out of memory that may be paged
        out, copies are slower and the host waits.

        The obvious pin_memory=True takes a block for each tensor whose size is rounded up to a
        power of two, so that host memory would be up to twice the plan's. Ordinary memory is as
        large as was asked for, and one buffer shares no page with another that is locked.
        RuntimeError with CUDA's reason if that much cannot be locked.
        """
        cuda, address = torch.cuda.cudart(), buffer.data_ptr()
        torch.cuda.check_error(cuda.cudaHostRegister(address, buffer.nbytes, 0))
        weakref.finalize(self, cuda.cudaHostUnregister, address).atexit = False

    @torch.no_grad()
    def step(self):
        for master, grad, p in zip(self.masters, self.grads, self.params):
            master.grad = (
                None if p.grad is None else grad.copy_(distributed.local(p.grad), non_blocking=True)
            )
        if self.params[0].is_cuda:
            torch.cuda.synchronize(self.params[0].device)
        self.adam.step()
        for master, p in zip(self.masters, self.params):
            distributed.local(p).copy_(master, non_blocking=True)

    def zero_grad(self, set_to_none=True):
        for p in self.params:
            p.grad = None

    def state_dict(self):
        """Adam's moments; the masters are the parameters, bit by bit."""
        return self.adam.state_dict()

    def load_state_dict(self, state):
        """Moments from a state, masters from the parameters as they are now."""
        moments = {
            i: {name: distributed.local(value) for name, value in found.items()}
            for i, found in state["state"].items()
        }
        self.adam.load_state_dict(state | dict(state=moments))
        with torch.no_grad():
            for master, p in zip(self.masters, self.params):
                master.copy_(distributed.local(p))


def make_optimizer(policy, lr, offload):
    """AdamW without weight decay, on the device or on the host."""
    make = (
        HostAdamW
        if offload
        else lambda params, lr, **options: torch.optim.AdamW(params, lr, fused=True, **options)
    )
    return make(policy.parameters(), lr, weight_decay=0.0)


# ---- the table -----------------------------------------------------------------------------------

SHAPES = {  # V, D, L, N, K, C, hidden: from the models' config.json
    "Qwen2.5-0.5B": ModelConfig(
        151_936, 896, 24, 14, 2, 64, 4864, 32_768, qkv_bias=True, tied=True
    ),
    "Llama-3.2-1B": ModelConfig(128_256, 2048, 16, 32, 8, 64, 8192, 131_072, tied=True),
    "Qwen2.5-Math-1.5B": ModelConfig(
        151_936, 1536, 28, 12, 2, 128, 8960, 4096, qkv_bias=True, tied=True
    ),
    "Qwen3-4B": ModelConfig(151_936, 2560, 36, 32, 8, 128, 9728, 40_960, qk_norm=True, tied=True),
    "Qwen2.5-Math-7B": ModelConfig(
        152_064, 3584, 28, 28, 4, 128, 18_944, 4096, qkv_bias=True, tied=False
    ),
}


@dataclass(frozen=True)
class Config:
    prompts: int = 32  # P, questions per step
    corrections: int = 4  # H, layer-2 answers per attempt
    prompt_tokens: int = 512  # most tokens of a question's prompt
    tokens_per_microbatch: int = 16_384  # tokens that go through the model together
    # tokens whose keys and values the sampler may hold; 0: those of the whole rollout
    cache_tokens: int = 0
    recompute: Literal["yes", "no"] = "yes"  # activation checkpointing
    offload_optimizer: bool = False  # Adam's moments and the masters that it updates in host memory
    # GPUs that share the questions, the masters and Adam's moments; also prints what goes over the
    # wires
    ranks: int = 1
    reference: Literal["yes", "no"] = "yes"  # a copy for the KL term
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # compute type


def received(shape, c, passes):
    """Bytes that a rank receives in a step of so many passes."""
    return sum(
        distributed.traffic(
            shape, getattr(torch, c.dtype), c.ranks, passes, c.reference == "yes"
        ).values()
    )


def main():
    c = parse_flags(Config, __doc__)
    for name in ("prompts", "corrections", "prompt_tokens", "tokens_per_microbatch", "ranks"):
        if getattr(c, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(c, name)}: must be at least 1")
    titles = [
        "model",
        "completion",
        "G",
        "weights, reference",
        "masters, gradients, Adam",
        "activations",
        "logits",
        "sum, GB",
    ]
    titles += ["+ KV cache", *(["received a pass", "a step"] if c.ranks > 1 else [])]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for name, shape in SHAPES.items():
        fitting = [n for n in (1024, 4096) if c.prompt_tokens + 2 * n + PHRASE <= shape.context]
        for completion in fitting or [(shape.context - c.prompt_tokens - PHRASE) // 2]:
            for attempts in (8, 16):
                p = plan(
                    shape,
                    compute=getattr(torch, c.dtype),
                    tokens=c.tokens_per_microbatch,
                    prompts=c.prompts,
                    attempts=attempts,
                    corrections=c.corrections,
                    prompt=c.prompt_tokens,
                    completion=completion,
                    cache_tokens=c.cache_tokens,
                    reference=c.reference == "yes",
                    recompute=c.recompute == "yes",
                    offload=c.offload_optimizer,
                    ranks=c.ranks,
                )
                sums = [
                    p["weights"] + p["reference"],
                    p["masters and gradients"] + p["Adam"],
                    p["activations"] + p["gathered"],
                    p["logits"],
                    on_device(p) - p["KV cache"],
                    p["KV cache"],
                ]
                # each token once
                packed = kv_tokens(
                    -(-c.prompts // c.ranks), attempts, c.corrections, c.prompt_tokens, completion
                )
                passes = -(-packed // c.tokens_per_microbatch)
                sums += (
                    [received(shape, c, 1) - received(shape, c, 0), received(shape, c, passes)]
                    if c.ranks > 1
                    else []
                )
                print(
                    f"| {name} | {completion:,} | {attempts} | "
                    f"{' | '.join(f'{size / GB:.1f}' for size in sums)} |"
                )


if __name__ == "__main__":
    guarded(main)
