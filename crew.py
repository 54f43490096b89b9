"""Sampling on several CPU cores: a process on each, with its share of the prompts and the cache that belongs to them.

    python bench.py sampler            # on a machine with several cores "ours" is this

The idea. A decode step is some fifteen hundred small operations, most of them too short to be shared between cores: two threads gain
a third over one, and wait for each other at every turn. Prompts have nothing to do with each other, so each process takes some of them
through the whole call, alone on its core. The weights lie in memory that all share, so `refresh` reaches everybody; the cache stays with
whoever made it, and `extend` sends each attempt to where its keys are. A row's random numbers depend on its number only (kernels.py):
who samples it changes nothing.

The processes are forks, as those of torch's DataLoader are on Linux; elsewhere one process samples with all threads.
"""
import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
import weakref
from dataclasses import replace

import torch
import torch.nn.functional as F

LEAST = 32                # rows a process should have, or it is not worth asking


def crew_size(device):
    """How many processes to sample with: one a thread on a CPU, where there are forks."""
    return torch.get_num_threads() if device.type == "cpu" and sys.platform == "linux" else 1


class Crew:
    """The processes of a sampler (sample.Sampler); they start at the first call and end with it."""

    def __init__(self, sampler, size):
        self.size, self.members, self.pipes, self.calls, self.dropped = size, [], [], 0, []
        for tensor in (*sampler.model.parameters(), *(norm for norm in sampler.norms if norm is not None)):
            tensor.data.share_memory_()

    def start(self, sampler):
        """Forks. The children see the weights of `sampler`, whatever they become."""
        context = multiprocessing.get_context("fork")
        for _ in range(self.size):
            mine, theirs = context.Pipe()
            self.members.append(context.Process(target=serve, args=(sampler, theirs, os.getpid()), daemon=True))
            self.members[-1].start()
            theirs.close()
            self.pipes.append(mine)
        weakref.finalize(self, dismiss, self.members)

    def shares(self, prompts, n):
        """[(first, last), ...]: which prompts each process takes; None when there are too few to share."""
        count = min(self.size, len(prompts), len(prompts) * n // LEAST)
        cuts = [len(prompts) * i // count for i in range(count + 1)] if count > 1 else []
        return list(itertools.pairwise(cuts)) or None

    def call(self, sampler, orders):
        """orders: for each process None or (name, above, arguments, keywords) -> its Completions (without a cache), in the same order.

        name: "generate" or "extend"; above: the number of the call whose result is extended. The result of this call has number self.calls.
        """
        if not self.pipes:
            self.start(sampler)
        self.calls += 1
        dropped, self.dropped = self.dropped, []
        try:
            for pipe, order in zip(self.pipes, orders):
                if order is not None:
                    pipe.send((self.calls, sampler.pool.epoch, dropped, *order))
            results = [receive(pipe, self.calls) for pipe, order in zip(self.pipes, orders) if order is not None]
        except (EOFError, ConnectionError):
            raise ChildProcessError("a sampling process has died, perhaps because memory ran out: use fewer --prompts at a time") from None
        for error in filter(lambda result: isinstance(result, Exception), results):
            raise error
        return results

    def keep(self, whole, offsets):
        """Notes that process i has the rows of `whole` from offsets[i] on; the processes forget theirs when it goes."""
        whole.home = self.calls, offsets + [len(whole)]
        weakref.finalize(whole, self.dropped.append, self.calls)
        return whole


def receive(pipe, number):
    """The answer to call `number`, Completions or an exception; answers to calls that were interrupted are skipped."""
    answered, result = pipe.recv()
    while answered != number:
        answered, result = pipe.recv()
    if isinstance(result, Exception):
        return result
    return replace(result, **{name: torch.from_numpy(x) for name, x in vars(result).items() if hasattr(x, "__array_interface__")})


def serve(sampler, pipe, parent):
    """What a process does: answers calls until its parent is gone. Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_memory()
    sampler.crew, kept = None, {}
    while True:
        while not pipe.poll(5):
            if os.getppid() != parent:
                os._exit(0)
        number, sampler.pool.epoch, dropped, name, above, args, keywords = pipe.recv()
        for old in dropped:
            kept.pop(old, None)
        try:
            kept[number] = c = sampler.generate(*args, **keywords) if name == "generate" else sampler.extend(kept[above], *args, **keywords)
            bare = replace(c, path=None, level=None)
            pipe.send((number, replace(bare, **{field: x.numpy() for field, x in vars(bare).items() if isinstance(x, torch.Tensor)})))
        except Exception as error:
            pipe.send((number, error))


def keep_memory():
    """Tells glibc not to hand freed memory back: every step asks for the same again, and new pages cost a twentieth of its time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for option in (-1, -3):                    # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(option, 1 << 30)


def dismiss(members):
    for member in members:
        member.terminate()


def together(parts, prompts, parents):
    """One Completions from those of several processes: rows behind one another, padded to the longest."""
    T = max(part.tokens.shape[1] for part in parts)
    padded = [replace(part, **{name: F.pad(getattr(part, name), (0, T - part.tokens.shape[1])) for name in ("tokens", "logprobs")})
              for part in parts]
    joined = {name: torch.cat([getattr(part, name) for part in padded]) for name in ("tokens", "logprobs", "lengths", "ended", "numbers")}
    return replace(parts[0], prompts=prompts, parents=parents, **joined)
