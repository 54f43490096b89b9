"""What each Triton kernel of a decode step moves, computes and needs, without a GPU.

    python -m tools.bench_kernels                  # every model shape, float32 and bfloat16

The idea. Triton compiles for a GPU that is not there. So each launch of a decode step is recorded,
compiled for sm_80 and sm_90, and its binary tells the registers, the spilled bytes and the shared
memory. A spilled register is traffic that nobody counted. Bytes and flops are counted by hand.

`attend` stands twice: for shared prefixes, and for the rows' own segments. Its MB and MFLOP are
those of both together.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from engine import kernels, keys
from engine.in_flight import RowState
from model import ModelConfig
from runtime.flags import AtLeast, BadInput, guarded, parse_flags
from tools.machine import RENAMED, SHAPES, Load, type_name

CAPABILITIES = (80, 90)  # A100, H100
KERNELS = ("_add_norm", "_swiglu", "_rope_store", "_attend", "_merge", "_choose", "_settle")
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
    # A wrapper finds its kernel by its name in the module: a recorder under that name gets the
    # launch.
    launches, originals = [], {name: getattr(kernels, name) for name in KERNELS}
    try:
        for name in KERNELS:
            setattr(kernels, name, Recorder(originals[name], launches))
        launch_all(m, dtype, rows, prompt, own, group)
    finally:
        for name in KERNELS:
            setattr(kernels, name, originals[name])
    return launches, work_of(m, dtype, rows, prompt, own, group)


def launch_all(m, dtype, rows, prompt, own, group):
    """Calls every wrapper once, with tensors shaped as in a decode step."""
    D, N, K, C = m.width, m.heads, m.kv_heads, m.head_size
    slots = rows // group * prompt + rows * own
    x = torch.empty(rows, D, dtype=dtype)
    k, v = (x.new_empty(slots, K, C) for _ in range(2))
    kernels.add_norm(x, x, x[0].clone(), 1e-6)
    kernels.swiglu(x.new_empty(rows, 2 * m.hidden))

    rotation, row = x.new_empty(rows, C), torch.arange(rows)
    qkv, norms = x.new_empty(rows, (N + 2 * K) * C), x.new_empty(N + K, C)
    kernels.rope_store(qkv, norms, rotation, rotation, row, k, v, N, 1e-6)

    # Two kinds of segments: a prefix with the rows that share it, and each row's own.
    members = torch.zeros(rows, kernels.members_for(dtype, N, K), dtype=torch.long)
    segments = [(members, row, row), (row[:, None], row, row)]
    splits = kernels.splits_for(rows, K)
    kernels.attend(x.new_empty(rows, N, C), k, v, segments, splits)

    state = RowState.blank(rows, 1, (0,), "cpu")
    state.tokens = torch.empty(rows, own, dtype=torch.long)
    state.logprobs = torch.empty(rows, own)
    kernels.choose(x.new_empty(rows, m.vocab_size), 1.0, state)


def work_of(m, dtype, rows, prompt, own, group):
    """-> {kernel's name: (bytes, flops)} of a decode step."""
    D, N, K, C, byte = m.width, m.heads, m.kv_heads, m.head_size, dtype.itemsize
    cached = rows // group * prompt + rows * own  # tokens whose keys and values are read
    parts = 2 * kernels.splits_for(rows, K)
    partial = rows * N * parts * (C + 1) * 4  # bytes of the outputs of the parts, fp32
    return dict(
        _add_norm=(4 * byte * rows * D, 5 * rows * D),
        _swiglu=(3 * byte * rows * m.hidden, 5 * rows * m.hidden),
        _rope_store=(2 * byte * rows * (N + 2 * K) * C, 8 * rows * (N + K) * C),
        _attend=(
            2 * byte * cached * K * C + byte * rows * N * C + partial,
            4 * rows * (prompt + own) * N * C,
        ),
        _merge=(partial + byte * rows * N * C, 2 * rows * N * parts * C),
        _choose=(byte * rows * m.vocab_size, 34 * rows * m.vocab_size),
        _settle=(100 * rows, 100 * rows),
    )


# ---- the compiler --------------------------------------------------------------------------------


def compiled(launch, capability):
    """Compiles a launch ahead of time for sm_<capability> -> {"registers", "spills", "shared"}.

    Spills and shared memory are in bytes, as cuobjdump reads them from the binary. Spilled
    registers live on the stack or in local memory.
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
        words = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path]
        printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    # "REG:32 STACK:0 SHARED:0 LOCAL:0 ..."
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
    return dict(
        registers=used["REG"], spills=used["STACK"] + used["LOCAL"], shared=binary.metadata.shared
    )


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
    heads = "".join(f"{f'sm_{sm}: regs':>13}{'spills':>8}{'shared':>8}" for sm in CAPABILITIES)
    print(f"{'shape':9}{'type':10}{'kernel':13}{'warps':>6}{'MB':>10}{'MFLOP':>10}{heads}")
    for shape, dtype in itertools.product(SHAPES, (torch.bfloat16, torch.float32)):
        m = ModelConfig(**SHAPES[shape])
        launches, work = launches_of(m, dtype, rows, prompt, own, group_size)
        for launch in launches:
            name, warps = launch[0].__name__, launch[3].get("num_warps", 4)
            volume, flops = work[name]
            needs = [compiled(launch, capability) for capability in CAPABILITIES]
            cells = "".join(f"{n['registers']:13}{n['spills']:8}{n['shared']:8}" for n in needs)
            print(
                f"{shape:9}{type_name(dtype):10}{name[1:]:13}{warps:6}{volume / 1e6:10.3f}"
                f"{flops / 1e6:10.2f}{cells}"
            )


if __name__ == "__main__":
    guarded(main)
