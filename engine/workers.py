"""Sampling on several CPU cores: a process on each, with its share of the prompts and the cache
that belongs to them.

    python bench.py sampler            # on a machine with several cores "ours" is this

The idea. A decode step is some thousand small operations, most of them too short to be shared
between cores: two threads gain a third over one, and wait for each other at every turn. Prompts
have nothing to do with each other, so each process takes some of them through the whole call, alone
on its core. The weights lie in memory that all share, so `refresh` reaches everybody; the cache
stays with whoever made it, and `extend` sends each attempt to where its keys are. A row's random
numbers depend on its number only (kernels.py), not on who samples it.

The processes are forks, as those of torch's DataLoader are on Linux; elsewhere one process samples
with all threads. They start at the first call and end with the sampler. When a call is broken off
(Ctrl-C, an error, a process that died), all are dismissed and the next call starts new ones: nobody
then holds half an answer. Caches are lost with them, and made again from the prompts.
"""

import ctypes
import itertools
import multiprocessing
import signal
import sys
import traceback
import weakref
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

LEAST = 32  # rows a process should have, or it is not worth asking
MOST = 16  # processes: a rollout has not many times LEAST rows
TICK = 0.1  # seconds between two looks at how far they are, when somebody wants to know


def crew_size(device):
    """How many processes to sample with: one a thread on a CPU, at most MOST, where there are
    forks."""
    return (
        min(MOST, torch.get_num_threads())
        if device.type == "cpu" and sys.platform == "linux"
        else 1
    )


@dataclass(eq=False)
class Home:
    """Where the cache of some Completions is: with the processes of `team`, under the number of the
    call that made it; process i has the rows cuts[i] .. cuts[i + 1] - 1."""

    team: object
    call: int
    cuts: list


@dataclass(eq=False)
class Team:
    """Processes that live and end together, their pipes, for each the calls whose caches it may
    forget, and a count."""

    members: list
    pipes: list
    dropped: list
    # how many rows of the present call have ended, for each process, in shared memory
    ended: torch.Tensor


class Crew:
    """The processes of a sampler (sample.Sampler)."""

    def __init__(self, size):
        self.size, self.team, self.calls = size, None, 0

    def start(self, sampler):
        """Forks. The children see the weights of `sampler`, whatever they become."""
        try:
            for tensor in (
                *sampler.model.parameters(),
                *(norm for norm in sampler.norms if norm is not None),
            ):
                tensor.data.share_memory_()
        except RuntimeError as error:
            raise OSError(
                "no room in shared memory for the weights of the sampling processes "
                f"({str(error).splitlines()[0]}): enlarge "
                "/dev/shm (docker run --shm-size=8g), or give --cache-tokens, with which one "
                "process samples"
            ) from None
        context, team = (
            multiprocessing.get_context("fork"),
            Team([], [], [], torch.zeros(self.size, dtype=torch.long).share_memory_()),
        )
        for number in range(self.size):
            mine, theirs = context.Pipe()
            team.pipes.append(mine)
            team.members.append(
                context.Process(
                    target=serve,
                    args=(sampler, theirs, list(team.pipes), team.ended[number]),
                    daemon=True,
                )
            )
            team.members[-1].start()
            theirs.close()
            team.dropped.append([])
        weakref.finalize(team, dismiss, team.members)
        self.team = team

    def shares(self, prompts, n):
        """[(first, last), ...]: which prompts each process takes; None when there are too few to
        share."""
        count = min(self.size, len(prompts), len(prompts) * n // LEAST)
        cuts = [len(prompts) * i // count for i in range(count + 1)] if count > 1 else []
        return list(itertools.pairwise(cuts)) or None

    def has(self, completions):
        """Whether the cache of these Completions is with processes that are there."""
        return completions.home is not None and completions.home.team is self.team

    def call(self, sampler, orders, prompts, parents, offsets):
        """orders: for each process None or (name, above, arguments, keywords) -> Completions of
        all, with a `home`.

        name: "generate" or "extend"; above: the call whose result is extended; offsets: the first
        row of each process.
        """
        if self.team is None:
            self.start(sampler)
        self.calls, team = self.calls + 1, self.team
        team.ended.zero_()
        try:
            for pipe, dropped, order in zip(team.pipes, team.dropped, orders):
                if order is not None:
                    forget, dropped[:] = list(dropped), []
                    pipe.send((self.calls, sampler.pool.epoch, forget, *order))
            parts = [
                tensors(answer)
                for answer in answers(
                    team, [p for p, order in zip(team.pipes, orders) if order is not None], sampler
                )
            ]
        except (EOFError, ConnectionError):
            self.end()
            raise ChildProcessError(
                "a sampling process has died, perhaps because memory ran out: use fewer --prompts "
                "at a time"
            ) from None
        except BaseException:
            self.end()
            raise
        whole = together(parts, prompts, parents)
        whole.home = Home(team, self.calls, [*offsets, len(whole)])
        weakref.finalize(whole.home, forget_in, team.dropped, self.calls)
        return whole

    def end(self):
        dismiss(self.team.members)
        self.team = None


def answers(team, pipes, sampler):
    """What comes through these pipes, in their order. Meanwhile `sampler.seen`, if it is set, hears
    how many more rows have ended."""
    told = 0
    for pipe in pipes:
        while sampler.seen and not pipe.poll(TICK):
            ended = int(team.ended.sum())
            sampler.seen(None, ended - told)
            told = ended
        yield pipe.recv()
    if sampler.seen:
        sampler.seen(None, int(team.ended.sum()) - told)


def tensors(result):
    """Completions as they came through a pipe, numpy arrays for tensors. RuntimeError with what a
    process that failed has to say."""
    if isinstance(result, str):
        raise RuntimeError(f"a sampling process failed:\n{result}")
    return replace(
        result,
        **{
            name: torch.from_numpy(x)
            for name, x in vars(result).items()
            if hasattr(x, "__array_interface__")
        },
    )


def serve(sampler, pipe, not_ours, count):
    """What a process does: answers calls until its parent is gone. A stop is the parent's business,
    which may want to finish a step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_memory()
    for end in not_ours:  # a fork has its parent's ends too, and would never see them close
        end.close()
    sampler.crew, kept, sampler.seen = (
        None,
        {},
        lambda rows, ended: count.add_(ended) if ended else None,
    )
    while True:
        try:
            number, sampler.pool.epoch, forget, name, above, args, keywords = pipe.recv()
        except EOFError:
            return
        for old in forget:
            kept.pop(old, None)
        try:
            c = kept[number] = (
                sampler.generate(*args, **keywords)
                if name == "generate"
                else sampler.extend(kept[above], *args, **keywords)
            )
            bare = replace(c, path=None, level=None, prompts=None, parents=None)
            answer = replace(
                bare,
                **{
                    field: x.numpy()
                    for field, x in vars(bare).items()
                    if isinstance(x, torch.Tensor)
                },
            )
        except Exception:
            answer = traceback.format_exc()
        pipe.send(answer)


def keep_memory():
    """Tells glibc not to hand freed memory back: every step asks for the same again, and new pages
    cost a twentieth of its time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(option, 1 << 30)


def dismiss(members):
    for member in members:
        member.kill()
    for member in members:
        member.join()


def forget_in(lists, call):
    for calls in lists:
        calls.append(call)


def together(parts, prompts, parents):
    """One Completions from those of several processes: rows behind one another, padded to the
    longest."""
    T = max(part.tokens.shape[1] for part in parts)
    padded = [
        replace(
            part,
            **{
                name: F.pad(getattr(part, name), (0, T - part.tokens.shape[1]))
                for name in ("tokens", "logprobs")
            },
        )
        for part in parts
    ]
    joined = {
        name: torch.cat([getattr(part, name) for part in padded])
        for name in ("tokens", "logprobs", "lengths", "ended", "numbers")
    }
    return replace(parts[0], prompts=prompts, parents=parents, **joined)
