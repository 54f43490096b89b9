"""A sampler on each CPU core: processes that each sample a share of the prompts, behind the
interface of sample.Sampler.

    sampler = in_parallel(Sampler(model))
    python -m tools.bench_sampler      # "ours", on a machine with several cores

The idea. A decode step is some two hundred small operations, most of them too short to be split
between threads: two threads gain a third over one. Prompts are independent, so each process samples
some of them through the whole call, on one thread. The weights lie in shared memory, so one
refresh() reaches every process. The cache stays in the process that made it, and `extend` sends
each row there. A row's noise depends on its number alone, so the result is that of one process.

The processes are forks (Linux; elsewhere there is one process). They start at the first call and
end with the sampler. When a call is broken off (Ctrl-C, an error, a dead process), all of them are
killed, so that no answer is left in a pipe, and the next call starts new ones.
"""

import contextlib
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

MIN_ROWS_PER_WORKER = 32  # with fewer, a process costs more than it saves
MAX_WORKERS = 16  # a rollout has rows for few more
POLL_SECONDS = 0.1  # between two looks at the workers' progress, when an observer is set


def in_parallel(sampler, workers=None):
    """-> ParallelSampler of a sampler, or the sampler itself when one process is best.

    workers: processes; None: one for each thread of torch on a CPU where there are forks, but a
    single one if the sampler uses kernels or has a limit of cache tokens.
    """
    if workers is None:
        forks = sampler.device.type == "cpu" and sys.platform == "linux"
        alone = not forks or sampler.fused or sampler.pool.limit_given
        workers = 1 if alone else min(MAX_WORKERS, torch.get_num_threads())
    return ParallelSampler(sampler, workers) if workers > 1 else sampler


# ---- the parent's side ---------------------------------------------------------------------------


@dataclass(eq=False)
class Team:
    """Processes that live and end together: for each its pipe, the calls whose cache it may drop,
    and how many of its rows have ended in the present call (in shared memory)."""

    processes: list
    pipes: list
    dropped: list
    ended: torch.Tensor  # [workers]


@dataclass(eq=False)
class RemoteCache:
    """Where the cache of some Completions is: in the processes of `team`, under the number of the
    call that made it. Process i has the rows cuts[i] .. cuts[i + 1] - 1."""

    team: Team
    call: int
    cuts: list


class ParallelSampler:
    """A Sampler in each of `workers` processes. Calls with few rows, and completions whose cache is
    in no process, go to `sampler` in this process."""

    def __init__(self, sampler, workers):
        self.sampler, self.workers, self.team = sampler, workers, None
        self.calls = self.refreshes = 0

    @property
    def seen(self):
        return self.sampler.seen

    @seen.setter
    def seen(self, observer):
        """As in Sampler; the rows in flight are None, as they are in other processes."""
        self.sampler.seen = observer

    def refresh(self, weights=None):
        """As Sampler.refresh."""
        self.sampler.refresh(weights)
        self.refreshes += 1

    def generate(self, prompts, n, max_new_tokens, temperature=1.0, seed=0, first_row=0, **filters):
        """As Sampler.generate."""
        sampler = self.sampler
        if not sampler.share:
            prompts, n = [prompt for prompt in prompts for _ in range(n)], 1
        # At most a process for each prompt, and enough rows for each process.
        count = min(self.workers, len(prompts), len(prompts) * n // MIN_ROWS_PER_WORKER)
        if count < 2:
            return sampler.generate(
                prompts, n, max_new_tokens, temperature, seed, first_row, **filters
            )
        limits = sampler.checked_limits(prompts, prompts, n, max_new_tokens, temperature, filters)
        # Process i samples prompts cuts[i] .. cuts[i + 1] - 1. The shares are contiguous, so the
        # rows of the results are in order.
        cuts = [len(prompts) * i // count for i in range(count + 1)]
        orders = []
        for a, b in itertools.pairwise(cuts):
            # A row keeps its number, which seeds its noise.
            limits_of_part, first_of_part = limits[a * n : b * n], first_row + a * n
            arguments = prompts[a:b], n, limits_of_part, temperature, seed, first_of_part
            orders.append((None, arguments, filters))
        parents = torch.arange(len(prompts) * n) // n
        return self._call(orders, prompts, parents, [n * cut for cut in cuts])

    def extend(
        self, completions, phrases, n, max_new_tokens, temperature=1.0, seed=0, rows=None, **filters
    ):
        """As Sampler.extend."""
        sampler, cache = self.sampler, completions.cache
        if not isinstance(cache, RemoteCache) or cache.team is not self.team:
            return sampler.extend(
                completions, phrases, n, max_new_tokens, temperature, seed, rows, **filters
            )
        rows, prompts, new_tokens = sampler.continued(completions, phrases, rows)
        limits = sampler.checked_limits(
            prompts, new_tokens, n, max_new_tokens, temperature, filters
        )
        # Each row goes to the process with its cache. rows are ascending, so those of process i are
        # rows[cuts[i] : cuts[i + 1]].
        cuts = torch.searchsorted(rows, torch.tensor(cache.cuts)).tolist()
        orders = []
        for first, a, b in zip(cache.cuts, cuts, cuts[1:]):
            # A process counts its rows from 0. numpy: a tensor in a pipe would become a
            # shared-memory file.
            own = (rows[a:b] - first).numpy()
            arguments = phrases[a:b], n, limits[a * n : b * n], temperature, seed, own
            orders.append((cache.call, arguments, filters) if a < b else None)
        return self._call(orders, prompts, rows.repeat_interleave(n), [n * cut for cut in cuts])

    def _call(self, orders, prompts, parents, cuts):
        """orders: for each process None or (call to extend or None, arguments, filters); cuts: the
        first row of each process, and behind them the number of rows -> Completions."""
        if self.team is None:
            self.team = self._start()
        self.calls, team = self.calls + 1, self.team
        team.ended.zero_()
        try:
            pipes = []
            for pipe, dropped, order in zip(team.pipes, team.dropped, orders):
                if order is not None:
                    # With every order goes the number of refreshes, since the cache of old weights
                    # is invalid, and the calls whose cache is not needed any more.
                    pipe.send((self.calls, self.refreshes, list(dropped), *order))
                    dropped.clear()
                    pipes.append(pipe)
            parts = [unpacked(answer) for answer in self._answers(pipes)]
        except (EOFError, ConnectionError):
            self._end()
            raise ChildProcessError(
                "a sampling process has died, perhaps because memory ran out: use fewer --prompts "
                "at a time"
            ) from None
        # Ctrl-C too: an answer left in a pipe would be taken for that of the next call.
        except BaseException:
            self._end()
            raise
        cache = RemoteCache(team, self.calls, cuts)
        # Once nothing holds this result, the next order tells the processes to drop its cache.
        weakref.finalize(cache, drop_call, team.dropped, self.calls)
        return concatenate(parts, prompts, parents, cache)

    def _answers(self, pipes):
        """Yields what comes through these pipes, in their order, and reports the rows that have
        ended meanwhile."""
        reported = 0
        for pipe in pipes:
            # Without an observer `recv` waits, and nothing is polled.
            while self.seen and not pipe.poll(POLL_SECONDS):
                ended = int(self.team.ended.sum())
                self.seen(None, ended - reported)
                reported = ended
            yield pipe.recv()
        if self.seen:
            self.seen(None, int(self.team.ended.sum()) - reported)

    def _start(self):
        """Forks the processes -> Team. They see the weights of the sampler, whatever these
        become."""
        try:
            # In place: refresh() writes into these tensors, and every process sees the new weights.
            norms = (norm for norm in self.sampler.norms if norm is not None)
            for tensor in (*self.sampler.model.parameters(), *norms):
                tensor.data.share_memory_()
        except RuntimeError as error:
            raise OSError(
                "no room in shared memory for the weights of the sampling processes "
                f"({str(error).splitlines()[0]}): enlarge /dev/shm (docker run --shm-size=8g), or "
                "give --cache-tokens, with which one process samples"
            ) from None
        context = multiprocessing.get_context("fork")
        ended = torch.zeros(self.workers, dtype=torch.long).share_memory_()
        team = Team([], [], [[] for _ in range(self.workers)], ended)
        for number in range(self.workers):
            parent_end, worker_end = context.Pipe()
            team.pipes.append(parent_end)
            arguments = self.sampler, worker_end, list(team.pipes), ended[number]
            process = context.Process(target=worker_loop, args=arguments, daemon=True)
            team.processes.append(process)
            process.start()
            # The parent's copy. While it were open, the pipe of a dead process would not end.
            worker_end.close()
        weakref.finalize(team, kill, team.processes)
        return team

    def _end(self):
        kill(self.team.processes)
        self.team = None


def unpacked(answer):
    """-> Completions as they came through a pipe, numpy arrays as tensors. RuntimeError with the
    traceback of a process that failed."""
    if isinstance(answer, str):
        raise RuntimeError(f"a sampling process failed:\n{answer}")
    arrays = {name: x for name, x in vars(answer).items() if hasattr(x, "__array_interface__")}
    return replace(answer, **{name: torch.from_numpy(x) for name, x in arrays.items()})


def concatenate(parts, prompts, parents, cache):
    """-> one Completions: the rows of the parts in order, padded to the longest."""
    T = max(part.tokens.shape[1] for part in parts)
    rows = {}
    for name in ("tokens", "logprobs"):  # [B, T]
        padded = [F.pad(getattr(part, name), (0, T - part.tokens.shape[1])) for part in parts]
        rows[name] = torch.cat(padded)
    for name in ("lengths", "ended", "numbers"):  # [B]
        rows[name] = torch.cat([getattr(part, name) for part in parts])
    return replace(parts[0], prompts=prompts, parents=parents, cache=cache, **rows)


def drop_call(lists, call):
    """Nothing holds the result of this call any more: every process may drop its cache."""
    for dropped in lists:
        dropped.append(call)


def kill(processes):
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


# ---- the workers' side ---------------------------------------------------------------------------


def worker_loop(sampler, pipe, parent_ends, ended):
    """Runs in a process: answers orders until the parent is gone. ended: a count in shared
    memory."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent decides: it may finish a step first
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_memory()
    for end in parent_ends:  # a fork inherits the parent's ends, and would never see them close
        end.close()
    sampler.seen = lambda rows, count: ended.add_(count) if count else None
    results, refreshes = {}, None  # {call: Completions with their cache}
    with contextlib.suppress(EOFError):
        while True:
            call, parents_refreshes, dropped, above, arguments, filters = pipe.recv()
            for old in dropped:
                results.pop(old, None)
            if parents_refreshes != refreshes:  # the weights in shared memory are new
                refreshes = parents_refreshes
                sampler.pool.forget()
            try:
                if above is None:
                    results[call] = sampler.generate(*arguments, **filters)
                else:
                    results[call] = sampler.extend(results[above], *arguments, **filters)
                answer = packed(results[call])
            except Exception:
                answer = traceback.format_exc()
            pipe.send(answer)


def packed(completions):
    """-> Completions for a pipe: numpy arrays instead of tensors, without what the parent has."""
    bare = replace(completions, cache=None, prompts=None, parents=None)
    tensors = {name: x for name, x in vars(bare).items() if isinstance(x, torch.Tensor)}
    return replace(bare, **{name: x.numpy() for name, x in tensors.items()})


def keep_memory():
    """Tells glibc to keep freed memory. Every step asks for the same again, and new pages cost a
    twentieth of its time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(option, 1 << 30)
