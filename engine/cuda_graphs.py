"""A decode step as a CUDA graph, and the host's view of which rows have ended.

The idea. A step of a small model is a few hundred kernels of some microseconds each, and launching
them one by one takes longer than running them. A graph launches all of them at once. It replays the
same kernels on the same addresses, so all that a step reads lies in tensors that stay where they
are (in_flight.RowState, cuda_cache.CudaCache), and lengths are read on the device.

A graph has a fixed number of rows: there is one for each number in BUCKETS. The places beyond R are
empty and write nothing.
"""

import functools

import torch

# Rows of a graph. From 16 on each is at most half as large again as the one before, so less than a
# third of the rows of a step are empty places.
BUCKETS = (
    *(1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256),
    *(384, 512, 768, 1024, 1536, 2048, 3072, 4096),
)
# Steps between two looks at which rows have ended, on CUDA. Each look costs the host a wait.
POLL_EVERY = 8


def bucket_for(rows):
    """-> the smallest bucket for so many rows, or `rows` beyond the largest."""
    return next((bucket for bucket in BUCKETS if bucket >= rows), rows)


class StepGraphs:
    """The graphs of decode steps on one CudaCache.

    step: called as step(rows, cache, out) with RowState of some places; writes their logits to
    `out` [places, V].
    """

    def __init__(self, cache, vocab_size):
        self.cache, self.places = cache, len(cache.rows.token)
        # fp32, as model.logits_of has them on CUDA.
        self.logits = torch.empty(self.places, vocab_size, device=cache.rows.token.device)
        self.graphs = {}  # (places, layers of the path) -> torch.cuda.CUDAGraph

    @functools.cached_property
    def stream(self):
        """Where all graphs are captured: cuBLAS keeps its working memory for each stream."""
        return torch.cuda.Stream()

    def replay(self, step, R):
        """-> logits [R, V] of a step of the R rows in flight, valid until the next call."""
        layers = len(self.cache.path)
        # The smallest graph with room. Its places beyond R are empty.
        bucket = next((b for b in BUCKETS if R <= b <= self.places), self.places)
        if (bucket, layers) not in self.graphs:
            self._capture_all(step, R, layers)
        self.graphs[bucket, layers].replay()
        return self.logits[:R]

    def _capture_all(self, step, R, layers):
        """Captures a graph for every bucket, from the largest down: the smaller ones then find room
        in the memory of the largest."""
        rows = self.cache.rows
        # Rows are in flight at the first replay: what the warm-up hides is put back behind it.
        slot = rows.slot.clone()
        self.cache.close()  # the warm-up steps must neither write nor read anything
        sizes = {self.places, *(bucket for bucket in BUCKETS if bucket < self.places)}
        for places in sorted(sizes, reverse=True):
            self.graphs[places, layers] = self.capture(step, places)
        rows.slot.copy_(slot)
        self.cache.write_tables(R)

    def capture(self, step, places):
        """-> the graph of a step of the first `places` places."""
        arguments = self.cache.rows.part(0, places), self.cache, self.logits[:places]
        # A first run on that stream: kernels compile and libraries set themselves up outside of
        # the capture.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            step(*arguments)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # All graphs work in the same memory, since no two run at the same time.
        memory = next((other.pool() for other in self.graphs.values()), None)
        # thread_local: NCCL's watchdog, another thread, may call CUDA meanwhile
        options = dict(stream=self.stream, capture_error_mode="thread_local")
        with torch.cuda.graph(graph, pool=memory, **options):
            step(*arguments)
        return graph


class AliveMirror:
    """The host's copy of the rows' `alive` flags. On CUDA it is POLL_EVERY steps old: the host
    never waits for the newest step, and the device always has steps queued. The first copy begins
    with the first step after rows have moved."""

    def __init__(self, device):
        self.event = torch.cuda.Event() if device.type == "cuda" else None
        self.forget()

    def forget(self):
        """Rows have moved: a copy that is under way describes other rows."""
        self.steps, self.copy = -1, None

    def read(self, alive):
        """alive: [R] bool -> the same on the CPU, perhaps of an earlier step; None while there is
        no copy."""
        if self.event is None:
            return alive
        # Most steps ask nothing.
        self.steps += 1
        if self.steps % POLL_EVERY:
            return None
        # The copy began POLL_EVERY steps ago, so waiting for it is short, and newer steps stay
        # queued.
        finished = self.copy
        if finished is not None:
            self.event.synchronize()
        # Pinned: a copy into ordinary memory would make the host wait.
        pinned = torch.empty(len(alive), dtype=torch.bool, pin_memory=True)
        self.copy = pinned.copy_(alive, non_blocking=True)
        self.event.record()
        return finished
