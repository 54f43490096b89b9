"""What this machine can do, and how a time is measured fairly: what the benches share.

    python -m tools.machine                # the measured limits of this machine

The idea. A speed alone says little: machines differ, and other programs run on them. So variants
take turns within one run, medians are compared, and each speed stands beside its floor:

    floor = max(bytes / bandwidth, flops / peak)

with the bandwidth of a large copy and the peak of a large matrix product, both measured in the same
run. `decode_work` counts the bytes and flops that no sampler can leave out.

Letters: D width, N query heads, K key/value heads, C head size, L blocks.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
import gc
import importlib
import os
import platform
import statistics
import time
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from model import GPT, ModelConfig
from runtime.device import pick_device
from runtime.flags import AtLeast, BadInput, guarded, parse_flags
from tasks.tokenizer import build_encoding

QWEN = dict(qkv_bias=True)
SHAPES = {  # fields of ModelConfig; the large shapes are those of Qwen2.5
    "default": dict(vocab_size=build_encoding().n_vocab, qk_norm=True),
    "0.5b": QWEN
    | dict(vocab_size=151_936, width=896, depth=24, heads=14, kv_heads=2, head_size=64)
    | dict(hidden=4_864),
    "1.5b": QWEN
    | dict(vocab_size=151_936, width=1_536, depth=28, heads=12, kv_heads=2, head_size=128)
    | dict(hidden=8_960),
    "7b": QWEN
    | dict(vocab_size=152_064, width=3_584, depth=28, heads=28, kv_heads=4, head_size=128)
    | dict(hidden=18_944, tied=False),
}


@dataclass(frozen=True)
class Load:
    """The work."""

    prompts: Annotated[int, AtLeast(1)] = 32  # sampled together
    prompt_tokens: Annotated[int, AtLeast(1)] = 32  # of each prompt
    new_tokens: Annotated[int, AtLeast(1)] = 64  # of each completion, at most


@dataclass(frozen=True)
class Measuring:
    """The measurement."""

    # of the model; all but the default want a GPU
    shape: Literal["default", "0.5b", "1.5b", "7b"] = "default"
    # every variant is timed so many times, in turns; medians are shown
    rounds: Annotated[int, AtLeast(1)] = 5
    threads: Annotated[int, AtLeast(0)] = 0  # of the CPU; 0: all
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one


RENAMED = dict(
    rows="--prompts and --group-size make the rows",
    group="--group-size 8",
    prompt="--prompt-tokens 32",
    new="--new-tokens 64",
)


# ---- time ----------------------------------------------------------------------------------------


def in_turns(variants, rounds, device):
    """{name: function} -> {name: [seconds of each round]}. All variants take turns.

    Every timed call comes right after an untimed one of the same variant. The library of matrix
    products keeps a limited number of compiled kernels, and a variant whose shapes change from step
    to step throws out those of the others.
    """
    # Otherwise collections walk the millions of objects that importing transformers leaves, and
    # their time counts for whichever variant runs.
    gc.freeze()
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            run()
            seconds[name].append(timed(run, device))
    return seconds


def timed(run, device):
    """Seconds of run(), with everything that it queued on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def best_of(run, device, times=20):
    """Seconds of the fastest of so many calls."""
    return min(timed(run, device) for _ in range(times))


def median_ratio(a, b):
    """Median of the ratios a / b of two lists of seconds, round by round: a machine that is slow
    for a while is slow for both."""
    return statistics.median(x / y for x, y in zip(a, b))


# ---- the machine ---------------------------------------------------------------------------------


def limits_of_machine(dtype, device):
    """-> FLOP/s of a large matrix product in this type, bytes/s of reading and writing a large
    buffer, both measured now."""
    # Large enough to be bound by arithmetic (the product) and by memory (the copy).
    size = 8192 if device == "cuda" else 1024
    # Random numbers: a GPU that multiplies ones draws less power, and keeps a higher clock.
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    x = torch.ones((1 << 30) if device == "cuda" else (1 << 27), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    peak = 2 * size**3 / best_of(lambda: torch.mm(a, b), device)
    return peak, 2 * len(x) / best_of(lambda: y.copy_(x), device)


def limits_text(dtype, peak, bandwidth):
    return (
        f"measured limits, {type_name(dtype)}: {peak / 1e12:.3g} TFLOP/s, "
        f"{bandwidth / 1e9:.3g} GB/s"
    )


def prepare(measuring):
    """Sets the threads -> "cpu" or "cuda". BadInput for more threads than cores: thousands of them
    end in a crash of OpenMP."""
    if measuring.threads > os.cpu_count():
        raise BadInput(
            f"--threads {measuring.threads}: choose 1 to {os.cpu_count()}, the cores of this "
            "machine, or 0 for all"
        )
    torch.set_num_threads(measuring.threads or torch.get_num_threads())
    return pick_device(measuring.device)


def types_on(device):
    """The compute types worth measuring: which one is faster on a CPU depends on the CPU."""
    return (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)


def type_name(dtype):
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


def machine_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads, {platform.machine()}"


# ---- models --------------------------------------------------------------------------------------


def make_model(shape, dtype, device, context=512):
    """A model of a shape of SHAPES with random weights. It has no end token, so that rows have the
    lengths that were asked for."""
    torch.manual_seed(0)
    config = ModelConfig(**SHAPES[shape], context=max(512, context))
    with torch.device(device):
        return GPT(config, dtype)


def their_model(shape, dtype, device, context=512):
    """transformers' Qwen2 or Qwen3 of the same shape, with random weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    m = make_model(shape, dtype, "meta", context).config
    kind = "Qwen3" if m.qk_norm else "Qwen2"
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=m.vocab_size,
        hidden_size=m.width,
        num_hidden_layers=m.depth,
        num_attention_heads=m.heads,
        num_key_value_heads=m.kv_heads,
        head_dim=m.head_size,
        intermediate_size=m.hidden,
        max_position_embeddings=m.context,
        tie_word_embeddings=m.tied,
    )
    with torch.device(device):
        return getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)


def decode_work(m, dtype, prompt_tokens, group_size, lengths):
    """-> bytes, flops of decoding rows of these lengths, whatever the sampler.

    m: ModelConfig. lengths: list of tokens sampled in each row, the `group_size` rows of a prompt
    side by side.

        bytes = weights once a step + every row's own keys and values + every shared prefix once a
                step for all of its rows
        flops = 2 x parameters a token + 4 N C L for every key that a token sees
    """
    inner, keys = m.heads * m.head_size, m.kv_heads * m.head_size
    # q, k and v; the output projection; the three matrices of the MLP. Norms and biases are left
    # out.
    block = m.width * (inner + 2 * keys) + inner * m.width + 3 * m.width * m.hidden
    parameters = m.depth * block + m.vocab_size * m.width
    cached = 2 * m.depth * keys * dtype.itemsize  # bytes of a token's keys and values
    own = sum(length * (length + 1) // 2 for length in lengths)  # keys of its row that a token sees
    groups = (lengths[i : i + group_size] for i in range(0, len(lengths), group_size))
    # A prefix is read in every step in which one of its rows is still sampled.
    prefixes = prompt_tokens * sum(map(max, groups))
    volume = dtype.itemsize * parameters * max(lengths) + cached * (own + prefixes)
    tokens = sum(lengths)
    flops = 2 * parameters * tokens + 4 * inner * m.depth * (own + prompt_tokens * tokens)
    return volume, flops


def installed(package):
    """Whether an optional package can be imported; prints how to install it if not."""
    try:
        importlib.import_module(package)
        return True
    except ImportError:
        print(f"\n{package} is not installed (pip install -r requirements-extra.txt)")
        return False


# ---- the command line ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    threads: Annotated[int, AtLeast(0)] = 0  # of the CPU; 0: all
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one


def main():
    """Prints this machine's limits in each compute type."""
    config = parse_flags(Config, __doc__)
    device = prepare(config)
    print(f"{machine_name(device)}, torch {torch.__version__}")
    for dtype in types_on(device):
        print(limits_text(dtype, *limits_of_machine(dtype, device)))


if __name__ == "__main__":
    guarded(main)
