"""Parts of a batch on threads of their own: how a small model is trained on several CPU cores.

    python train.py --preset smoke      # t_train in its log; compare with OMP_NUM_THREADS=1

The idea. torch splits an operation between threads, which meet at its end. Most operations of a
small model are too short for that. And when other programs take a core, every meeting waits until
the last thread has had its turn: a step then takes ten times as long. So each thread computes whole
trees of the batch alone, and they meet once, at the end. The gradients of the parts are summed in
the order of the parts, so that a run is the same bit by bit whatever the machine does besides.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import torch

# Parameters of a small model. Each part has a gradient of its own, in fp32: 0.2 GB at this size.
# The operations of a larger model are long enough to be split.
SMALL = 50_000_000
FEWEST = 2  # parts, with one thread too: one and two cores then compute the same numbers

pool, count = None, 1  # inside of `apart` the threads, and the parts that a batch is computed in


@contextlib.contextmanager
def apart(model):
    """Inside, torch's threads compute a part of each batch each, and split no operation.

    Nothing changes on CUDA, for a large model, or in one of several processes.
    """
    global pool, count
    threads, size = torch.get_num_threads(), sum(weight.numel() for weight in model.parameters())
    whole = model.cos.device.type == "cpu" and not torch.distributed.is_initialized()
    if size > SMALL or not whole:
        yield
        return
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    count = max(FEWEST, threads)
    try:
        yield
    finally:
        pool.shutdown(cancel_futures=True)
        pool, count = None, 1
        torch.set_num_threads(threads)


def run(function, parts):
    """Iterates over function(part), in the order of the parts; inside of `apart` on its threads."""
    return (pool.map if pool else map)(function, parts)
