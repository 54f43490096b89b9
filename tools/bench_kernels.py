"""What each Triton kernel of a decode step moves, computes and needs, without a GPU.

    python -m tools.bench_kernels                  # every model shape, float32 and bfloat16

The idea. Triton compiles for a GPU that is not there. So each launch of a decode step is recorded,
compiled for sm_80 and sm_90, and its binary tells the registers, the spilled bytes and the shared
memory. A spilled register is traffic that nobody counted. Bytes and flops are counted by hand.

Then what a step would take on an H200: the floor, at the share of it that large products reach, and
what launches and the choice of tokens add. That is computed from the counts, with assumed speeds,
and not measured.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
import contextlib
import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine import kernels, keys
from engine.in_flight import RowState
from model import GPT, ModelConfig
from runtime.flags import AtLeast, BadInput, guarded, parse_flags
from sample import Sampler
from tools.machine import RENAMED, SHAPES, Load, decode_work, type_name

CAPABILITIES = (80, 90)  # A100, H100
KERNELS = ("_add_norm", "_swiglu", "_attend", "_choose", "_settle")
# An H200: bytes/s, FLOP/s in bf16 and instructions/s (132 multiprocessors x 128 lanes x 1.8 GHz) of
# its data sheet. Assumed: seconds from one launch of a graph to the next, and the share of the
# floor that matrix products and attention reach.
BANDWIDTH, PEAK, INSTRUCTIONS = 4.8e12, 989e12, 3.0e13
LAUNCH, REACHED = 1.5e-6, 0.8
TRITON_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Config:
    group_size: Annotated[int, AtLeast(1)] = 8  # completions of each prompt

    load: Load = Load()


# ---- launches ------------------------------------------------------------------------------------


class Recorder:
    """Stands in for a kernel: notes what its wrapper would launch it with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, grid, args, options))


def launches_of(m, dtype, rows, prompt, own, group):
    """Every launch of a decode step -> [(kernel, grid, arguments, options), ...], and its work
    {kernel's name: (bytes, flops)}.

    m: ModelConfig. rows: in flight; prompt: tokens that `group` rows share; own: tokens of a row.
    """
    with recorded() as launches:
        launch_all(m, dtype, rows, prompt, own, group)
    return launches, work_of(m, dtype, rows, prompt, own, group)


@contextlib.contextmanager
def recorded():
    """-> the list of launches, which grows while this is open. No kernel runs."""
    # A wrapper finds its kernel by its name in the module: a recorder under that name gets the
    # launch.
    launches, originals = [], {name: getattr(kernels, name) for name in KERNELS}
    try:
        for name in KERNELS:
            setattr(kernels, name, Recorder(originals[name], launches))
        yield launches
    finally:
        for name in KERNELS:
            setattr(kernels, name, originals[name])


class Operations(TorchDispatchMode):
    """Notes the torch operations that would launch a kernel: all but views and allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not function.is_view and not name.startswith(("empty", "new_empty", "_unsafe_view")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def step_launches(m, layers=1):
    """-> launches of a decode step in each block, and beside the blocks: counted in a step of two
    small models of this kind, with so many layers of shared segments."""
    counts = []
    for depth in (1, 2):
        small = replace(m, vocab_size=8, depth=depth, width=16, hidden=16, context=8)
        small = replace(small, heads=2, kv_heads=1, head_size=8)
        sampler = Sampler(GPT(small), fused=True)
        one = torch.ones(1, dtype=torch.long)
        path = [(sampler.pool.take(1, 1, one), one) for _ in range(layers)]
        cache = sampler._open_cache(path, 1, 1, True)
        cache.admit(0, 1)
        rows = cache.rows.part(0, 1)
        rows.tokens, rows.logprobs = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2)
        with torch.inference_mode(), recorded() as launches, Operations() as operations:
            logits = sampler.decode_step(rows, cache)
            sampler.choose(logits, rows, 1.0, {})
        counts.append(len(launches) + len(operations.names))
    return counts[1] - counts[0], 2 * counts[0] - counts[1]


def launch_all(m, dtype, rows, prompt, own, group):
    """Calls every wrapper once, with tensors shaped as in a decode step."""
    D, N, K, C = m.width, m.heads, m.kv_heads, m.head_size
    slots = rows // group * prompt + rows * own
    x = torch.empty(rows, D, dtype=dtype)
    k, v = (x.new_empty(slots, K, C) for _ in range(2))
    kernels.add_norm(x, x, x[0].clone(), 1e-6)
    kernels.swiglu(x.new_empty(rows, 2 * m.hidden))

    # Two kinds of segments: a prefix with the rows that share it, and each row's own.
    rotation, row = x.new_empty(rows, C), torch.arange(rows)
    qkv = x.new_empty(rows, (N + 2 * K) * C)
    norms = x.new_empty(N + K, C) if m.qk_norm else None
    members = torch.zeros(1, rows, kernels.members_for(N, K), dtype=torch.long)
    shared = kernels.Shared(members, row[None], row[None], row[:1])
    arrived = torch.zeros(rows, N, dtype=torch.int32)
    kernels.attend(qkv, norms, rotation, rotation, row, k, v, shared, row, row, arrived, N, 1e-6)

    state = RowState.blank(rows, 1, (0,), "cpu")
    state.tokens = torch.empty(rows, own, dtype=torch.long)
    state.logprobs = torch.empty(rows, own)
    kernels.choose(torch.empty(rows, m.vocab_size), 1.0, state)  # model.logits_of: fp32 on CUDA


def work_of(m, dtype, rows, prompt, own, group):
    """-> {kernel's name: (bytes, flops)} of a decode step."""
    D, N, K, C, byte = m.width, m.heads, m.kv_heads, m.head_size, dtype.itemsize
    cached = rows // group * prompt + rows * own  # tokens whose keys and values are read
    lines = -(-rows // kernels.members_for(N, K))
    parts = kernels.splits_for(lines, K) + kernels.splits_for(rows, K)
    partial = rows * N * parts * (C + 1) * 4  # bytes of the outputs of the parts, fp32
    return dict(
        _add_norm=(4 * byte * rows * D, 5 * rows * D),
        _swiglu=(3 * byte * rows * m.hidden, 5 * rows * m.hidden),
        _attend=(
            2 * byte * cached * K * C + 2 * byte * rows * (N + K) * C + 2 * partial,
            4 * rows * (prompt + own) * N * C + 8 * rows * (N + K) * C + 2 * partial // 4,
        ),
        # Temperature, exponential, sum, and of the noise two logarithms.
        _choose=(4 * rows * m.vocab_size, 10 * rows * m.vocab_size),
        _settle=(100 * rows, 100 * rows),
    )


# ---- the compiler --------------------------------------------------------------------------------


def compiled(launch, capability):
    """Compiles a launch ahead of time for sm_<capability> -> {"registers", "spills", "shared",
    "loop"}.

    Spills and shared memory are in bytes, as cuobjdump reads them from the binary. Spilled
    registers live on the stack or in local memory. loop: instructions of the longest loop.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, _, args, options = launch
    names = [parameter.name for parameter in kernel.params]
    given = {name: value for name, value in options.items() if name in names}
    values = dict(zip(names, args)) | given
    # What a kernel is compiled for has upper-case names. Lower-case options (num_warps) are the
    # compiler's.
    constants = {name: value for name, value in given.items() if name.isupper()}
    signature = {
        name: "constexpr" if name in constants else triton_type(value)
        for name, value in values.items()
    }
    # Triton compiles another kernel for numbers that 16 divides, as a launch would ask for.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in constants and is_aligned(values[name])
    }
    source = triton.compiler.ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs=aligned
    )
    rest = {name: value for name, value in options.items() if name not in names}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=rest)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        printed, code = (
            subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, option, path],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    # "REG:32 STACK:0 SHARED:0 LOCAL:0 ..."
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
    return dict(
        registers=used["REG"],
        spills=used["STACK"] + used["LOCAL"],
        shared=binary.metadata.shared,
        loop=longest_loop(code),
    )


def longest_loop(code):
    """Disassembled code -> instructions of its longest loop: a branch to an earlier address closes
    one."""
    # "/*18b0*/  @!P1 BRA 0x7e0 ;"
    lines = [
        (int(at, 16), words) for at, words in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)
    ]
    longest = 0
    for at, words in lines:
        back = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", words)
        if back and int(back[1], 16) < at:
            longest = max(longest, sum(int(back[1], 16) <= other <= at for other, _ in lines))
    return longest


def triton_type(value):
    if isinstance(value, torch.Tensor):
        return TRITON_TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def is_aligned(value):
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


# ---- the table -----------------------------------------------------------------------------------


def main():
    """Prints the table: a line for each kernel of each model shape and type."""
    config = parse_flags(Config, __doc__, renamed=RENAMED)
    if keys.triton is None:
        raise BadInput(
            "bench_kernels compiles with triton, which is not installed: pip install -r "
            "requirements-extra.txt"
        )
    if keys.INTERPRETED:
        raise BadInput(
            "bench_kernels compiles kernels, and TRITON_INTERPRET=1 interprets them: unset it"
        )
    # Bytes and flops by hand, registers and spills from the compiler, a line for each launch.
    load, group_size = config.load, config.group_size
    rows, prompt, own = load.prompts * group_size, load.prompt_tokens, load.new_tokens
    print(
        f"one decode step of {rows} rows ({load.prompts} prompts x {group_size}), {prompt} "
        f"prompt + {own} own tokens\n"
    )
    print(
        "loop/logit: instructions of the loop of `choose` for each logit; 0: one tile holds all\n"
    )
    heads = "".join(f"{f'sm_{sm}: regs':>13}{'spills':>8}{'shared':>8}" for sm in CAPABILITIES)
    heads += "".join(f"{f'sm_{sm}: loop/logit':>19}" for sm in CAPABILITIES)
    print(f"{'shape':9}{'type':10}{'kernel':13}{'warps':>6}{'MB':>10}{'MFLOP':>10}{heads}")
    choosing = {}  # shape -> instructions for each logit, in bf16 on the newer GPU
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        m = ModelConfig(**SHAPES[shape])
        launches, work = launches_of(m, dtype, rows, prompt, own, group_size)
        for launch in launches:
            name, warps = launch[0].__name__, launch[3].get("num_warps", 4)
            volume, flops = work[name]
            needs = [compiled(launch, capability) for capability in CAPABILITIES]
            cells = "".join(f"{n['registers']:13}{n['spills']:8}{n['shared']:8}" for n in needs)
            if name == "_choose":
                each = [per_logit(launch, n) for n in needs]
                cells += "".join(f"{number:19.1f}" for number in each)
                choosing[shape] = each[-1]
            print(
                f"{shape:9}{type_name(dtype):10}{name[1:]:13}{warps:6}{volume / 1e6:10.3f}"
                f"{flops / 1e6:10.2f}{cells}"
            )
    expectations(choosing, rows, prompt, own, group_size)


def per_logit(launch, needs):
    """Instructions of the loop of `choose`, for each logit."""
    options, (values, names) = launch[3], (launch[2], [p.name for p in launch[0].params])
    V = values[names.index("V")]
    return needs["loop"] / options["WIDTH"] if V > options["LANES"] * options["WIDTH"] else 0.0


def expectations(choosing, rows, prompt, new, group_size):
    """Prints what a decode step in bfloat16 would take on an H200, on average over a completion.
    choosing: {shape: instructions that choosing a token takes for each logit}."""
    print("\na step in bfloat16 on an H200: computed, not measured (microseconds)")
    heads = ("launches", "GB", "GFLOP", "floor", "launching", "choose", "of floor")
    print(f"{'shape':9}" + "".join(f"{head:>10}" for head in heads))
    for shape in SHAPES:
        m = ModelConfig(**SHAPES[shape])
        volume, flops = decode_work(m, torch.bfloat16, prompt, group_size, [new] * rows)
        volume, flops = volume / new, flops / new
        block, beside = step_launches(m)
        count = m.depth * block + beside
        floor = max(volume / BANDWIDTH, flops / PEAK)
        # What the matrix products do not hide: a gap at each launch, and the choice of tokens.
        choice = rows * m.vocab_size * choosing[shape] / INSTRUCTIONS
        took = floor / REACHED + count * LAUNCH + choice
        print(
            f"{shape:9}{count:10}{volume / 1e9:10.3f}{flops / 1e9:10.1f}{floor * 1e6:10.1f}"
            f"{count * LAUNCH * 1e6:10.1f}{choice * 1e6:10.1f}{floor / took:10.1%}"
        )


if __name__ == "__main__":
    guarded(main)
