"""Speeds, beside what the machine could do: the sampler step by step, against transformers'
`generate`; and what each kernel moves.

    python bench.py sampler                      # from recomputing everything to this sampler;
                                                 transformers too, where it is installed
    python bench.py sampler --shape 0.5b --rows 256 --prompt 256 --new 512      # on a GPU: the shape of Qwen2.5-0.5B, random weights
    python bench.py train                        # a training step by phases; trees beside padded
                                                 rows; TRL, where it is installed
    python bench.py verifier                     # comparisons a second, by kind of answer
    python bench.py kernels                      # registers, spills, shared memory, bytes,
                                                 operations of the Triton kernels; needs no GPU

The idea. A speed alone says little: machines differ and other jobs interfere. So variants take
turns within one run, medians are quoted as ratios, each side runs in whichever of fp32 and bf16 is
faster for it, and the floor stands beside: the longer of the time that the bytes take at the
bandwidth measured here and the time that the arithmetic takes at the speed of a large matrix
product,

    bytes = weights once a step + every row's own keys and values + every shared prefix ONCE for all
    of its rows flops = 2 x parameters a token + 4 x heads x head size x layers for every key that a
    token looks at

Two tables. The ladder adds one idea a line to a naive sampler, on rows that end at lengths drawn
evenly from 1 to --new; tokens count up to the end only. Against `generate`, which pays for ended
rows as long as one is alive, all rows run the full length, so that nothing is compared but the work
of a step.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C while torch is imported is one sentence too

# isort: split
import gc
import itertools
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from engine import kernels
from engine.in_flight import RowState
from engine.workers import in_parallel
from model import GPT, ModelConfig
from reward import is_correct
from runtime.device import pick_device
from runtime.flags import BadInput, guarded, parse_flags
from sample import Sampler
from tasks.tokenizer import build_encoding
from verifier import answers, latex

SHAPES = {  # ModelConfig's fields; the large ones are those of Qwen2.5
    "default": dict(vocab_size=build_encoding().n_vocab, qk_norm=True),
    "0.5b": dict(
        vocab_size=151_936,
        width=896,
        depth=24,
        heads=14,
        kv_heads=2,
        head_size=64,
        hidden=4_864,
        qkv_bias=True,
    ),
    "1.5b": dict(
        vocab_size=151_936,
        width=1_536,
        depth=28,
        heads=12,
        kv_heads=2,
        head_size=128,
        hidden=8_960,
        qkv_bias=True,
    ),
    "7b": dict(
        vocab_size=152_064,
        width=3_584,
        depth=28,
        heads=28,
        kv_heads=4,
        head_size=128,
        hidden=18_944,
        qkv_bias=True,
        tied=False,
    ),
}
LADDER = {  # what each line switches on: arguments of Sampler, and `workers` (None: no cache at all)
    "recompute everything": None,
    "KV cache": dict(share=False, leave=False, fused=False, graph=False, workers=1),
    "+ shared prefix": dict(leave=False, fused=False, graph=False, workers=1),
    "+ ended rows leave": dict(fused=False, graph=False, workers=1),
    "+ a process on each core": dict(fused=False),
    "+ fused kernels": dict(fused=True, graph=False),
    "+ CUDA graph": dict(fused=True, graph=True),
}
ABSENT = {  # device -> what it has not: why
    "cpu": {
        "+ fused kernels": "compiled, not run: needs CUDA",
        "+ CUDA graph": "compiled, not run: needs CUDA",
    },
    "cuda": {"+ a process on each core": "for CPUs"},
}


@dataclass(frozen=True)
class Config:
    # what to measure; may also be given as a bare first word
    what: Literal["sampler", "train", "kernels", "verifier"] = "sampler"
    # of the model; all but the default want a GPU
    shape: Literal["default", "0.5b", "1.5b", "7b"] = "default"
    rows: int = 256  # completions at a time
    group: int = 8  # completions per prompt
    corrections: int = 4  # train: per completion, in layer 2
    prompt: int = 32  # tokens per prompt
    new: int = 64  # tokens per completion
    tokens_per_microbatch: int = 16_384  # train: that go through the model together
    rounds: int = 5  # every variant is timed so many times, in turns; medians are shown
    threads: int = 0  # CPU threads; 0: all
    # lines of the ladder; "last": only the sampler as it is used
    ladder: Literal["all", "last", "none"] = "all"
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one


# ---- measuring -----------------------------------------------------------------------------------


def in_turns(variants, rounds, device):
    """{name: function} -> {name: seconds of each round}; all take turns.

    Every timed call comes right after an untimed one of the same variant: the library of matrix
    products keeps a limited number of compiled kernels, and a variant whose shapes change from step
    to step throws out those of the others.
    """
    # else collections walk the millions of objects that importing transformers leaves, in
    # everybody's time
    gc.freeze()
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            run()
            seconds[name].append(timed(run, device))
    return seconds


def timed(run, device):
    """Seconds of run(), everything that it put onto the device included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def best_of(run, device, times=20):
    return min(timed(run, device) for _ in range(times))


def limits_of_machine(dtype, device):
    """-> FLOP/s of a large matrix product in this type, bytes/s of reading and writing a large
    buffer, measured here and now."""
    size = 8192 if device == "cuda" else 1024
    a, b = (
        torch.ones(size, size, dtype=dtype, device=device),
        torch.ones(size, size, dtype=dtype, device=device),
    )
    x = torch.ones((1 << 30) if device == "cuda" else (1 << 27), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * size**3 / best_of(lambda: torch.mm(a, b), device), 2 * len(x) / best_of(
        lambda: y.copy_(x), device
    )


def work(model_config, dtype, c, lengths):
    """-> bytes, flops of decoding rows of these lengths (a list, prompt by prompt), whatever the
    sampler."""
    m, size = model_config, dtype.itemsize
    block = (
        m.width * (m.heads + 2 * m.kv_heads) * m.head_size
        + m.heads * m.head_size * m.width
        + 3 * m.width * m.hidden
    )
    parameters = m.depth * block + m.vocab_size * m.width
    cached, seen = (
        2 * m.depth * m.kv_heads * m.head_size * size,
        sum(length * (length + 1) // 2 for length in lengths),
    )
    prefixes = sum(
        c.prompt * max(lengths[i : i + c.group]) for i in range(0, len(lengths), c.group)
    )
    tokens = sum(lengths)
    return (
        size * parameters * max(lengths) + cached * (seen + prefixes),
        2 * parameters * tokens + 4 * m.heads * m.head_size * m.depth * (seen + c.prompt * tokens),
    )


# ---- sampler -------------------------------------------------------------------------------------


def make_model(c, dtype, device, context=0):
    """A model of the shape asked for, random weights, with an end token that no row samples."""
    torch.manual_seed(0)
    config = ModelConfig(**SHAPES[c.shape] | dict(context=max(512, c.prompt + c.new, context)))
    with torch.device(device):
        return GPT(config, dtype)


@torch.inference_mode()
def recompute(model, prompts, n, limits):
    """The naive sampler: every step runs every row through the model from its first token on."""
    tokens = torch.tensor(prompts, device=model.embed.weight.device).repeat_interleave(n, 0)
    for _ in range(max(limits)):
        logits = F.linear(model(tokens)[:, -1], model.head.weight.to(model.compute))
        tokens = torch.cat([tokens, logits.float().softmax(-1).multinomial(1)], 1)


def rung(switches, model, c, prompts, limits):
    if switches is None:
        return lambda: recompute(model, prompts, c.group, limits)
    switches = dict(switches)
    workers = switches.pop("workers", None)
    sampler = in_parallel(Sampler(model, **switches), workers)
    return lambda: sampler.generate(prompts, c.group, limits, seed=0)


def their_model(c, dtype, device):
    """transformers' Qwen2 or Qwen3 of the same shape, random weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    m = make_model(c, dtype, "meta").config
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


def theirs(dtype, c, prompts, device):
    """transformers' generate with its default (dynamic) cache."""
    model = their_model(c, dtype, device).eval()
    tokens = torch.tensor(prompts, device=device).repeat_interleave(c.group, 0)
    settings = dict(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=c.new,
        min_new_tokens=c.new,
        eos_token_id=None,
        pad_token_id=0,
    )

    @torch.no_grad()
    def run():
        assert (
            model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings).shape[1]
            == c.prompt + c.new
        )

    return run


def report(title, seconds, lengths, c, device):
    """Prints a table: a line for each (name, type) of `seconds`, with the floor of the work in that
    type beside it."""
    print(
        f"\n{title}\n{'':28}{'':10}{'tokens/s':>11}{'ms/step':>9}{'GB':>8}{'GFLOP':>9}{'floor ms':>10}{'of floor':>9}"
    )
    limits = {dtype: limits_of_machine(dtype, device) for dtype in {dtype for _, dtype in seconds}}
    for (name, dtype), times in seconds.items():
        if not times:
            print(
                f"{name:28}{str(dtype)[6:]:10}{ABSENT[device].get(name, 'not run: only for --shape default'):>40}"
            )
            continue
        volume, flops = work(ModelConfig(**SHAPES[c.shape]), dtype, c, lengths)
        floor = max(volume / limits[dtype][1], flops / limits[dtype][0])
        middle, steps = statistics.median(times), max(lengths)
        print(
            f"{name:28}{str(dtype)[6:]:10}{sum(lengths) / middle:11,.0f}{middle / steps * 1e3:9.2f}{volume / 1e9:8.2f}{flops / 1e9:9.1f}"
            f"{floor / steps * 1e3:10.3f}{floor / middle:9.1%}"
        )
    for dtype, (peak, bandwidth) in limits.items():
        print(
            f"measured limits, {str(dtype)[6:]}: {peak / 1e12:.3g} TFLOP/s, {bandwidth / 1e9:.3g} "
            "GB/s"
        )


def bench_sampler(c):
    """The ladder and the comparison with transformers."""
    torch.set_num_threads(c.threads or torch.get_num_threads())
    device, generator = pick_device(c.device), torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 256, (c.rows // c.group, c.prompt), generator=generator).tolist()
    types = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)
    machine = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{torch.get_num_threads()} threads, {platform.machine()}"
    )
    print(
        f"{c.rows} rows ({c.rows // c.group} prompts x {c.group}), {c.prompt} prompt + {c.new} new "
        f"tokens, shape {c.shape}; {machine}, "
        f"torch {torch.__version__}; medians of {c.rounds} rounds in turns"
    )
    if c.ladder != "none":
        lengths = torch.randint(1, c.new + 1, (c.rows,), generator=generator).tolist()
        seconds = bench_ladder(c, types, device, prompts, lengths)
        report(
            "The ladder: one idea more in each line; rows end at lengths from 1 to the longest",
            seconds,
            lengths,
            c,
            device,
        )
    bench_peers(c, types, device, prompts)


def bench_ladder(c, types, device, prompts, lengths):
    """-> {(line, type): seconds}, empty where a line needs CUDA."""
    variants, absent = {}, {}
    for dtype in types:
        model = make_model(c, dtype, device)
        for name, switches in LADDER.items() if c.ladder == "all" else list(LADDER.items())[-1:]:
            if name in ABSENT[device] or (switches is None and c.shape != "default"):
                absent[name, dtype] = []
            else:
                variants[name, dtype] = rung(switches, model, c, prompts, lengths)
    # once is enough
    slow = {
        key: [timed(run, device)]
        for key, run in variants.items()
        if key[0] == "recompute everything"
    }
    return (
        slow
        | in_turns({key: run for key, run in variants.items() if key not in slow}, c.rounds, device)
        | absent
    )


def bench_peers(c, types, device, prompts):
    """Ours and transformers', all rows of full length; the ratio is between each side's faster
    type."""
    makers = {
        "ours": lambda dtype: rung({}, make_model(c, dtype, device), c, prompts, [c.new] * c.rows)
    }
    try:
        import transformers

        makers[f"transformers {transformers.__version__}"] = lambda dtype: theirs(
            dtype, c, prompts, device
        )
    except ImportError:
        print("transformers is not installed (pip install -r requirements-extra.txt)")
    seconds = in_turns(
        {(name, dtype): make(dtype) for name, make in makers.items() for dtype in types},
        c.rounds,
        device,
    )
    report(
        "Against transformers' generate: every row of full length",
        seconds,
        [c.new] * c.rows,
        c,
        device,
    )
    best = {
        name: min(types, key=lambda dtype: statistics.median(seconds[name, dtype]))
        for name in makers
    }
    for name in list(makers)[1:]:
        ratio = statistics.median(
            a / b for a, b in zip(seconds[name, best[name]], seconds["ours", best["ours"]])
        )
        print(f"ours ({str(best['ours'])[6:]}) is {ratio:.1f} times {name} ({str(best[name])[6:]})")


# ---- kernels -------------------------------------------------------------------------------------


class Recorder:
    """Stands in for a kernel: notes what its wrapper would launch it with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, grid, args, options))


def launches_of(m, dtype, rows, prompt, own, group):
    """Every launch of a decode step of a model of this shape (ModelConfig) and compute type ->
    [(kernel, grid, arguments, options), ...], and {kernel's name: (bytes, flops)}."""
    launches, byte = [], dtype.itemsize
    names = ("_add_norm", "_swiglu", "_rope_store", "_attend", "_merge", "_choose")
    originals = {name: getattr(kernels, name) for name in names}
    D, size, N, K, C, V, nodes = (
        m.width,
        m.hidden,
        m.heads,
        m.kv_heads,
        m.head_size,
        m.vocab_size,
        rows // group,
    )
    slots = nodes * prompt + rows * own
    try:
        for name in names:
            setattr(kernels, name, Recorder(originals[name], launches))
        x = torch.empty(rows, D, dtype=dtype)
        k, v = x.new_empty(slots, K, C), x.new_empty(slots, K, C)
        table, me = (
            torch.zeros(rows, kernels.members_for(dtype, N, K), dtype=torch.long),
            torch.arange(rows),
        )
        kernels.add_norm(x, x, x[0].clone(), 1e-6)
        kernels.swiglu(x.new_empty(rows, 2 * size))
        turn = x.new_empty(rows, C)
        kernels.rope_store(
            x.new_empty(rows, (N + 2 * K) * C), x.new_empty(N + K, C), turn, turn, me, k, v, N, 1e-6
        )
        kernels.attend(
            x.new_empty(rows, N, C),
            k,
            v,
            [(table, me, me), (me[:, None], me, me)],
            kernels.splits_for(rows, K),
        )
        flight = RowState.blank(rows, 1, (0,), "cpu")
        flight.tokens, flight.logprobs = (
            torch.empty(rows, own, dtype=torch.long),
            torch.empty(rows, own),
        )
        kernels.choose(x.new_empty(rows, V), 1.0, flight)
    finally:
        for name in names:
            setattr(kernels, name, originals[name])
    keys, parts = nodes * prompt + rows * own, 2 * kernels.splits_for(rows, K)
    found = rows * N * parts * (C + 1) * 4  # what the parts of rows take, fp32
    return launches, dict(
        _add_norm=(4 * byte * rows * D, 5 * rows * D),
        _swiglu=(3 * byte * rows * size, 5 * rows * size),
        _rope_store=(2 * byte * rows * (N + 2 * K) * C, 8 * rows * (N + K) * C),
        _attend=(
            2 * byte * keys * K * C + byte * rows * N * C + found,
            4 * rows * (prompt + own) * N * C,
        ),
        _merge=(found + byte * rows * N * C, 2 * rows * N * parts * C),
        _choose=(byte * rows * V, 60 * rows * V),
    )


def compiled(launch, capability):
    """Compiles a launch ahead of time for sm_<capability> -> {"registers", "spills", "shared"}, the
    last two in bytes, as cuobjdump reads them from the binary. Spilled registers live on the stack
    or in local memory."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, _, args, options = launch
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, args)) | {
        name: value for name, value in options.items() if name in names
    }
    constants = {
        name: value for name, value in values.items() if name.isupper() and name in options
    }
    kinds = {
        torch.bfloat16: "*bf16",
        torch.float32: "*fp32",
        torch.int64: "*i64",
        torch.int32: "*i32",
        torch.bool: "*i1",
    }
    signature = {
        name: "constexpr"
        if name in constants
        else kinds[value.dtype]
        if isinstance(value, torch.Tensor)
        else "fp32"
        if isinstance(value, float)
        else "i32"
        for name, value in values.items()
    }
    whole = {
        name
        for name, value in values.items()
        if isinstance(value, int) and name not in constants and value % 16 == 0
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if isinstance(values[name], torch.Tensor) or name in whole
    }
    source = triton.compiler.ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs=aligned
    )
    made = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={k: v for k, v in options.items() if k not in names},
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(made.asm["cubin"])
        words = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path]
        said = subprocess.run(words, capture_output=True, text=True, check=True)
    used = {
        name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said.stdout)
    }
    return dict(
        registers=used["REG"], spills=used["STACK"] + used["LOCAL"], shared=made.metadata.shared
    )


def bench_kernels(c):
    """A line for each kernel that a decode step launches, in every shape and compute type, compiled
    for sm_80 and sm_90."""
    if kernels.triton is None:
        raise BadInput(
            "bench.py kernels compiles with triton, which is not installed: pip install -r "
            "requirements-extra.txt"
        )
    if kernels.INTERPRETED:
        raise BadInput(
            "bench.py kernels compiles kernels, and TRITON_INTERPRET=1 interprets them: unset it"
        )
    print(
        f"one decode step of {c.rows} rows ({c.rows // c.group} prompts x {c.group}), {c.prompt} "
        f"prompt + {c.new} own tokens\n"
    )
    print(
        f"{'shape':9}{'type':10}{'kernel':13}{'warps':>6}{'MB':>10}{'MFLOP':>10}"
        + "".join(f"{f'sm_{sm}: regs':>13}{'spills':>8}{'shared':>8}" for sm in (80, 90))
    )
    for shape, dtype in itertools.product(SHAPES, (torch.bfloat16, torch.float32)):
        launches, needs = launches_of(
            ModelConfig(**SHAPES[shape]), dtype, c.rows, c.prompt, c.new, c.group
        )
        for launch in launches:
            name, warps = launch[0].__name__, launch[3].get("num_warps", 4)
            volume, flops = needs[name]
            found = [compiled(launch, capability) for capability in (80, 90)]
            print(
                f"{shape:9}{str(dtype)[6:]:10}{name[1:]:13}{warps:6}{volume / 1e6:10.3f}{flops / 1e6:10.2f}"
                + "".join(f"{f['registers']:13}{f['spills']:8}{f['shared']:8}" for f in found)
            )
    print(
        "\nattend stands twice: for shared prefixes and for the rows' own segments; its MB and "
        "MFLOP are those of both together"
    )


# ---- verifier ------------------------------------------------------------------------------------

# golds of the kinds that data sets have; each is compared with itself, rewritten, and with the next
# one
ANSWERS = {
    "integers": ["72", "1,024", "-5", "18.00", "\\$40", "25\\%", "1{,}000", "3.0", "10080", "0"],
    "fractions, surds": [
        r"\frac{1}{2}",
        r"\dfrac{3\sqrt{2}}{4}",
        r"1+\sqrt{5}",
        r"2\pi",
        r"\frac{\pi}{6}",
        r"5\frac{3}{4}",
        r"\sqrt[3]{2}",
        "4.5e33",
    ],
    "algebra": [
        "x^2+2x+1",
        r"\frac{n(n+1)}{2}",
        r"\sin^2 x",
        "(x-2)(x+3)",
        "y=2x+1",
        r"2^{1009}",
        r"f(x)=2 x",
        "p-q",
    ],
    "structure": [
        r"\left(3, \frac{\pi}{2}\right)",
        r"(-\infty,1)\cup(2,\infty)",
        "1,-2",
        r"\{1,2,3\}",
        r"1\pm\sqrt{2}",
        r"\text{Evelyn}",
        "x>3",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
    ],
    "hostile": [
        "10^{10^{10}}",
        "((100!)!)!",
        r"\binom{1000000000}{500000000}",
        "1e999999999",
        "9" * 900,
        "(" * 400 + "6" + ")" * 400,
        r"\frac{1}{" * 100 + "2" + "}" * 100,
        "(x+1)^{100000}",
    ],
}


def bench_verifier(c):
    """Comparisons a second of reward.is_correct, right ones and wrong ones: as if every text were
    met for the first time, and again."""
    print(
        f"{platform.machine()}, one core; {c.rounds} rounds, "
        f"medians\n{'':20}{'new a second':>16}{'again':>12}{'slowest, ms':>14}"
    )
    for kind, golds in ANSWERS.items():
        pairs = [
            (rf"so \boxed{{{answer}}}", gold)
            for i, gold in enumerate(golds)
            for answer in (gold, f"{gold} ", golds[i - 1])
        ]
        rates, slowest = {"new": [], "again": []}, 0.0
        for _ in range(c.rounds):
            for name in rates:
                took = [verdict_seconds(*pair, forget=name == "new") for pair in pairs]
                rates[name].append(len(took) / sum(took))
                slowest = max(slowest, *took)
        new, again = (statistics.median(rates[name]) for name in rates)
        print(f"{kind:20}{new:16,.0f}{again:12,.0f}{1e3 * slowest:14.2f}")


def verdict_seconds(response, gold, forget):
    """Seconds of one comparison; `forget` empties the caches before it."""
    if forget:
        answers.read.cache_clear()
        latex.clean.cache_clear()
    start = time.perf_counter()
    is_correct(response, gold)
    return time.perf_counter() - start


def bench_train(c):
    """A training step (training_speed.py)."""
    from tools import bench_training  # which imports this file

    bench_training.bench_all(c)


def main():
    """Flags, with the first word as --what."""
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):
        words = ["--what", *words]
    c = parse_flags(Config, __doc__, argv=words)
    if c.rows < 1 or c.group < 1 or c.rows % c.group:
        raise BadInput(f"--rows {c.rows} must be a multiple of --group {c.group}")
    if min(c.prompt, c.new, c.rounds, c.corrections, c.tokens_per_microbatch) < 1:
        raise BadInput(
            "--prompt, --new, --rounds, --corrections and --tokens-per-microbatch must be at least "
            "1"
        )
    if not 0 <= c.threads <= os.cpu_count():  # thousands end in a crash of OpenMP
        raise BadInput(
            f"--threads {c.threads}: choose 1 to {os.cpu_count()}, the cores of this machine, or 0 "
            "for all"
        )
    {
        "sampler": bench_sampler,
        "train": bench_train,
        "kernels": bench_kernels,
        "verifier": bench_verifier,
    }[c.what](c)


if __name__ == "__main__":
    guarded(main)
