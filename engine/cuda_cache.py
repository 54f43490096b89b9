"""The KV cache of rows in flight on CUDA: tables that tell kernels.attend where each segment lies
and which rows see it.

    pytest tests/test_kernels.py -k sampler        # held against the CPU's cache, interpreted

The idea. A line of a table is a segment, with as many of the rows that see it as one tile holds
(kernels.members_for). A prefix with more rows has more lines. Siblings lie side by side, so a table
is made with a few torch operations, and only when rows move. Tables keep their place in memory and
are longer than needed, so that a captured CUDA graph stays valid.
"""

from dataclasses import replace

import torch

from engine import kernels
from engine.cache import CACHE_SHARE_OF_FREE_MEMORY
from engine.cuda_graphs import bucket_for
from engine.in_flight import RowState


def measured_limit(model, prompt, reserved):
    """-> slots that the cache may have: CACHE_SHARE_OF_FREE_MEMORY of the CUDA memory that is free
    beside all else, less `reserved` bytes.

    A forward pass over 64 rows of `prompt`, cut at 64 tokens, first takes the memory that every
    prefill takes.
    """
    device, c = model.embed.weight.device, model.config
    with torch.inference_mode():
        model(torch.tensor([prompt[:64]] * 64, device=device))
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free = max(0, torch.cuda.mem_get_info(device)[0] - reserved)
    # Keys and values of one token in all blocks.
    bytes_per_slot = 2 * c.depth * c.kv_heads * c.head_size * model.compute.itemsize
    return int(CACHE_SHARE_OF_FREE_MEMORY * free) // bytes_per_slot


class CudaCache:
    """The tables, the rows' state, and the rows' own segments. It has the methods of
    cache.CpuCache."""

    def __init__(self, config, pool, places, layers):
        self.pool, self.moves = pool, pool.moves
        self.rows = RowState.blank(places, layers, config.end_tokens, pool.device)
        self.members = kernels.members_for(config.heads, config.kv_heads)
        self.index = torch.arange(places, device=pool.device)
        self.heads, self.eps = config.heads, config.norm_eps
        # Of each layer of the path: R rows need at most R lines.
        zeros = torch.zeros(layers, places, dtype=torch.long, device=pool.device)
        members = zeros[:, :, None].repeat(1, 1, self.members)
        self.tables = kernels.Shared(members, zeros, zeros.clone(), zeros[:, 0].clone())
        # Counts the parts of attention that each row and head has; zero between two launches.
        shape = places, config.heads
        self.arrived = torch.zeros(shape, dtype=torch.int32, device=pool.device)

    @staticmethod
    def opened(old, config, pool, path, capacity, most):
        """-> a CudaCache for `capacity` rows of at most `most` tokens below `path` [Segments]: the
        old one (or None), if it is large enough and the pool is where it was. The graphs captured
        on it then stay valid."""
        unused = torch.zeros(capacity, dtype=torch.long, device=pool.device)
        # Each row gets all the slots that it may ever need: a captured graph cannot allocate, and a
        # segment that moved would leave its address.
        own = pool.take(capacity, most, unused)  # lengths are those of the rows
        places, layers = bucket_for(capacity), max(2, len(path))
        if old is not None:  # never smaller than before: a large call would capture all graphs anew
            places, layers = max(places, len(old.index)), max(layers, len(old.tables.used))
        # The old cache serves again if nothing has moved: graphs captured on it still read the
        # right addresses.
        cache = old
        if (
            old is None
            or old.moves != pool.moves
            or (places, layers) != (len(old.index), len(old.tables.used))
        ):
            cache = CudaCache(config, pool, places, layers)
        cache.rows.clear()  # an interrupted call may have left rows
        cache.path, cache.own = path, own
        cache.vacant = list(range(capacity))  # own segments that no row has
        cache.seats = []  # the own segment of each row in flight
        return cache

    @property
    def k(self):
        return self.pool.k

    @property
    def v(self):
        return self.pool.v

    def close(self):
        """No row sees or writes anything, until `write_tables` and new slots."""
        self.rows.slot.fill_(-1)
        self.tables.used.zero_()

    def admit(self, R, count):
        """`count` new rows take the places behind the first R, and a vacant segment each."""
        seats, self.vacant = self.vacant[:count], self.vacant[count:]
        self.seats += seats
        # The slot before the first one: the first `advance` moves it to the start of the segment.
        offsets = self.own.T * torch.tensor(seats, device=self.pool.device)
        self.rows.start[R : R + count] = self.own.base + offsets
        self.rows.slot[R : R + count] = self.rows.start[R : R + count] - 1
        self.write_tables(R + count)

    def retire(self, stay, numbers):
        """stay: [R] bool, the rows that remain; they have closed up already. The segments of the
        others are vacant."""
        stay = stay.tolist()
        self.vacant += [seat for seat, stays in zip(self.seats, stay) if not stays]
        self.seats = [seat for seat, stays in zip(self.seats, stay) if stays]
        self.write_tables(len(self.seats))

    def write_tables(self, R):
        """Writes the tables for R rows, for instance with 2 members a line:

        node of each row   0 0 0 1 2 2     lines   [0 1] [2 .] [3 .] [4 5]
        """
        index = self.index[:R]
        for layer, (segments, node) in enumerate(zip(self.path, self.rows.nodes)):
            members, starts, lengths, used = (x[layer] for x in self.tables)
            # sibling: a row's number among the rows of its node. The running maximum of "first row
            # of a node" gives each row the number that its siblings begin with.
            node = node[:R]
            first_of_node = torch.ones_like(node, dtype=torch.bool)
            first_of_node[1:] = node[1:] != node[:-1]
            sibling = index - torch.where(first_of_node, index, 0).cummax(0)[0]  # 0, 1, 2, 0, ...
            # A line begins with every node, and again after `members` siblings.
            line = (sibling % self.members == 0).cumsum(0) - 1
            # Emptied first: a line that is not full could still name rows of an earlier step.
            members.fill_(-1)[line, sibling % self.members] = index
            starts[line] = segments.starts()[node]
            lengths[line] = segments.lengths[node]
            used.fill_(line[-1] + 1 if R else 0)

    def make_room(self, R):
        """Nothing to do: a row's segment has all its slots from the start."""

    def attend(self, block, qkv, norms, cos, sin):
        """Stores the new keys and values, and attends -> [R, N, C]."""
        R, rows = len(qkv), self.rows
        return kernels.attend(
            qkv,
            norms,
            cos,
            sin,
            rows.slot[:R],
            self.k[block],
            self.v[block],
            kernels.Shared(*(x[: len(self.path)] for x in self.tables)),
            rows.start[:R],
            rows.length[:R],
            self.arrived,
            self.heads,
            self.eps,
        )

    def finish(self, lengths):
        """lengths: [B], of the rows' segments -> Segments by row number: each row has had the
        segment of its number."""
        return replace(self.own, lengths=lengths)
