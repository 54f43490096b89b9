"""Where a run is computed, and in which type: the flags of the hardware group."""

import os
import time
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch

from runtime.distributed import broadcast_object
from runtime.flags import AtLeast, BadInput


@dataclass(frozen=True)
class Hardware:
    """Hardware: changes how a run is computed, but not what it computes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    # compute type; master weights are float32. auto: bfloat16 on CUDA, the faster one on a CPU
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # tokens that go through the model together in training: fewer take less memory, for the same
    # gradient
    tokens_per_microbatch: Annotated[int, AtLeast(1)] = 16_384
    # tokens whose keys and values the sampler may hold; 0: no limit on a CPU, half of the free
    # memory on CUDA
    cache_tokens: Annotated[int, AtLeast(0)] = 0
    # activation checkpointing: less memory, more time; auto: with a real model
    recompute: Literal["auto", "yes", "no"] = "auto"


def pick_device(name):
    """ "auto", "cpu" or "cuda" -> "cpu" or "cuda". BadInput for cuda where there is none, or fewer
    devices than torchrun started processes on this machine. On CUDA products in bf16 are then
    summed in fp32 throughout."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    device = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    gpus = torch.cuda.device_count()
    if device == "cuda" and int(os.environ.get("LOCAL_RANK", 0)) >= gpus:
        raise BadInput(
            f"torchrun's --nproc_per_node is more than the {gpus} GPUs of this machine: use "
            f"{gpus}, or --device cpu"
        )
    if device == "cuda":
        # A product whose sum is split over programs adds the parts in bf16 otherwise.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return device


def compute_dtype(name, device):
    """-> the dtype of activations for "float32", "bfloat16" or "auto": bfloat16 on CUDA; on a CPU
    the type that multiplies faster here.

    The measurement: the best of 5 products of each type, 2,048 x 384 by 384 x 512, on one thread:
    about 20 ms in all. With bfloat16 instructions (avx512_bf16, AMX) that type is 2-4 times faster,
    else slower.
    """
    if name != "auto":
        return getattr(torch, name)
    if device == "cuda":
        supported = not torch.cuda.is_available() or torch.cuda.is_bf16_supported()
        return torch.bfloat16 if supported else torch.float32
    seconds, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other where other programs have a core
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(2048, 384, dtype=dtype), torch.ones(384, 512, dtype=dtype)
        times = []
        for _ in range(6):  # the first one only warms up
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times[1:])
    torch.set_num_threads(threads)
    return min(seconds, key=seconds.get)


def resolve(hardware, real=False):
    """-> the Hardware with device, dtype and recompute settled, the same on all ranks.

    real: a model in Hugging Face's format; its activations are recomputed unless --recompute no.
    """
    device = pick_device(hardware.device)
    # rank 0 measures for all: two machines could come to different types
    dtype = broadcast_object(lambda: compute_dtype(hardware.dtype, device))
    recompute = {"auto": "yes" if real else "no"}.get(hardware.recompute, hardware.recompute)
    return replace(
        hardware, device=device, dtype=str(dtype).removeprefix("torch."), recompute=recompute
    )
