"""The KV cache as a tree: every key and value is stored once, and rows share those of their prefix.

    pytest tests/test_sample.py                    # held against the model without a cache

The idea. In a rollout, prefixes are shared: a question by all of its answers, an answer by all of
its corrections. The cache is a tree of segments, each a run of slots:

    path    questions      q0 q0 q0 q0 .   q1 q1 ...    read once per step for ALL rows below
            answers        a0 a0 w0 w0 .   a1 a1 ...    an answer, then its phrase
    own     corrections    c0 .  .  .  .   c1 c1 ...    one more slot of each row per step

A cached key carries its position (RoPE), so a segment may lie anywhere in memory.

Letters: R rows, L blocks, N query heads, K key/value heads, C head size, S new tokens, T slots of a
segment.
"""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from engine.kernels import rope_store_torch
from engine.shapes import rounded
from model import attention_scores, causal_attention

# The part of the free CUDA memory that the cache may take when no limit is given.
CACHE_SHARE_OF_FREE_MEMORY = 0.5
# Attention scores that a prefill holds at a time: a few tensors of 256 MB in fp32.
MAX_SCORES = 1 << 26
# Slots by which the rows' own segments grow on a CPU. Its matrix products want contiguous blocks,
# and every growth copies them. torch's softmax of 48 numbers in bf16 takes longer than one of 64.
GROWTH = 32


# ---- memory --------------------------------------------------------------------------------------


@dataclass
class Segments:
    """The segments of one layer. Node i has the slots base + i T .. base + i T + lengths[i] - 1 of
    store.k, store.v [L, slots, K, C]."""

    store: object
    base: int
    T: int
    lengths: torch.Tensor  # [nodes]

    def starts(self):
        """-> [nodes], the first slot of each."""
        return self.base + self.T * torch.arange(len(self.lengths), device=self.lengths.device)

    def views(self):
        """-> k, v as [L, nodes, T, K, C] views."""
        nodes = len(self.lengths)
        return tuple(
            x[:, self.base : self.base + nodes * self.T].unflatten(1, (nodes, self.T))
            for x in (self.store.k, self.store.v)
        )

    def copy_from(self, other, nodes):
        """Node i takes the keys and values of node nodes[i] of `other`."""
        width = min(self.T, other.T)
        for target, source in zip(self.views(), other.views()):
            for block in range(len(target)):  # block by block: the copy stays small
                target[block, :, :width] = source[block, :, :width].index_select(0, nodes)


class CachedTree(NamedTuple):
    """The cache behind sampled rows: what `extend` continues."""

    tree: object  # SlotPool.tree at the time
    path: list  # [(Segments, node of each row [B])], root first
    segments: Segments  # the rows' own, by row number


class SlotPool:
    """The slots of all segments.

    shared: all segments lie in one pair of tensors k, v [L, slots, K, C], since kernels want one
    address. The pair fills from the bottom, and is emptied when a new tree begins. Without it every
    generation of segments has tensors of its own (CPU).
    limit: slots in all (None: no limit). It bounds a call together with the completions that it
    extends; on a CPU older completions keep their segments beside that.
    """

    def __init__(self, config, dtype, device, shared, limit=None):
        self.shape = config.depth, 0, config.kv_heads, config.head_size
        self.dtype, self.device, self.shared = dtype, device, shared
        self.limit, self.limit_given = limit, limit is not None
        self.top = 0  # slots in use
        self.moves = 0  # how often the pair has changed its place in memory
        self.k, self.v = self.blank(0), self.blank(0)
        self.forget()

    def blank(self, slots):
        """-> zeros [L, slots, K, C]."""
        L, _, K, C = self.shape
        return torch.zeros(L, slots, K, C, dtype=self.dtype, device=self.device)

    def forget(self):
        """Invalidates all that is cached, for instance after new weights."""
        # A CachedTree holds the object of its time. A new one makes `holds` refuse all of them.
        self.tree = object()

    def reset(self):
        """A new tree begins: all slots are free."""
        self.top = 0
        # The slots are given out again, so what is cached there is lost. Without the common pair
        # each CachedTree keeps tensors of its own, which stay valid.
        if self.shared:
            self.forget()

    def holds(self, cache):
        """Whether this CachedTree (or None) can be extended here."""
        return isinstance(cache, CachedTree) and cache.tree is self.tree

    def free(self):
        """-> slots that are left, infinity without a limit."""
        return math.inf if self.limit is None else self.limit - self.top

    def take(self, nodes, T, lengths):
        """-> Segments of nodes x T new slots."""
        self.reserve(self.top + nodes * T)
        base, self.top = self.top, self.top + nodes * T
        if not self.shared:
            own = SimpleNamespace(k=self.blank(nodes * T), v=self.blank(nodes * T))
            return Segments(own, 0, T, lengths)
        return Segments(self, base, T, lengths)

    def reserve(self, slots):
        """Makes the pair at least so long, within the limit, and at least a quarter longer than it
        was. Its contents stay.

        At its limit the pair keeps its place whatever is asked for: rows wait for slots, and the
        CUDA graphs captured on it stay valid.
        """
        size = self.k.shape[1]
        # At least a quarter longer: growing by what is missing would copy the whole cache in every
        # call.
        target = min(max(slots, size * 5 // 4), math.inf if self.limit is None else self.limit)
        if not self.shared or slots <= size or target <= size:
            return
        self.moves += 1
        if self.top == 0:  # nothing to keep: free the old pair before the new one is allocated
            self.k = self.v = None
            self.k, self.v = self.blank(target), self.blank(target)
        else:
            # Keys and values take turns, so only one of the two exists twice at a time.
            self.k = F.pad(self.k, (0, 0, 0, 0, 0, target - size))
            self.v = F.pad(self.v, (0, 0, 0, 0, 0, target - size))

    def fits(self, prompts, longest, n, most):
        """Whether prompts of at most `longest` tokens, with n rows of at most `most` tokens each,
        fit beside what is in use."""
        return prompts * (longest + n * most) <= self.free()

    def turns(self, prompts, longest, n, most):
        """Frees all slots -> [(first, last), ...]: the prompts that are sampled together.

        All of them, if they fit. Otherwise as many as fill half of the slots; their rows take turns
        in the other half. ValueError (MemoryError, if the limit was measured) when a single prompt
        and row do not fit.
        """
        self.reset()
        if self.fits(prompts, longest, n, most):
            return [(0, prompts)]
        # Half for prompts, half for rows. With all slots given to prompts no row could be decoded.
        at_once = int(min(prompts, max(1, self.free() / 2 / longest)))
        if at_once * longest + most > self.free():
            kind = ValueError if self.limit_given else MemoryError
            raise kind(
                f"a prompt of {longest} tokens and a completion of {most} do not fit a cache of "
                f"{self.limit} tokens"
            )
        return [(first, min(first + at_once, prompts)) for first in range(0, prompts, at_once)]


# ---- attention to shared prefixes, in torch ------------------------------------------------------


class SharedPrefix:
    """Segments as the rows below them see them: row r continues node[r] (ascending).

    Queries are regrouped, so that a node's keys and values meet ALL its rows in one matrix product
    and are read once. One product per row would read them once per row.
    """

    def __init__(self, segments, node):
        # Nodes without a row are left out: those in use are renumbered 0, 1, ...
        used, self.node = node.unique(return_inverse=True)
        self.lengths, (k, v) = segments.lengths[used], segments.views()  # [L, nodes, T, K, C]
        # Few shapes: some nodes behind them are kept, without a row.
        self.nodes = min(rounded(len(used)), k.shape[1])
        if len(used) < k.shape[1]:
            used = F.pad(used, (0, self.nodes - len(used)))
            k, v = k.index_select(1, used), v.index_select(1, used)
        self.T = segments.T
        # bmm's batch is a pair of node and key/value head.
        K = k.shape[3]
        k, v = (x.transpose(2, 3).flatten(1, 2) for x in (k, v))  # [L, nodes * K, T, C]
        self.k, self.v = k.unbind(0), v.unbind(0)  # of each block; views where K = 1
        # Slots behind a segment's length, which no row may see: [nodes * K, 1, T].
        lengths = segments.lengths[used].repeat_interleave(K)[:, None, None]
        padding = torch.arange(self.T, device=node.device) >= lengths
        self.bias = k.new_zeros(padding.shape).masked_fill_(padding, -math.inf)
        count = self.node.bincount(minlength=self.nodes)
        self.width = int(count.max())
        # While every node has equally many rows, regrouping is a view. Else every node is padded to
        # the widest: with nodes 0 0 1 the width is 2, the rows take places 0 1 2, place 3 is
        # padding.
        self.place = self.source = None
        if int(count.min()) != self.width:
            row = torch.arange(len(node), device=node.device)
            first = count.cumsum(0) - count
            self.place = self.node * self.width + row - first[self.node]  # [R]
            # [nodes * width]: the row of each place. Row 0 stands for padding: `ungroup` drops what
            # is computed for it.
            self.source = row.new_zeros(self.nodes * self.width).index_copy_(0, self.place, row)

    def regroup(self, x):
        """[R * K, Q, *] -> [nodes * K, width * Q, *], a node's rows side by side."""
        K, Q, size = x.shape[0] // len(self.node), x.shape[1], x.shape[2]
        x = x.view(-1, K, Q, size)
        x = x if self.source is None else x.index_select(0, self.source)
        x = x.reshape(self.nodes, self.width, K, Q, size).transpose(1, 2)
        return x.reshape(self.nodes * K, self.width * Q, size)

    def ungroup(self, x, Q):
        """The inverse: [nodes * K, width * Q, *] -> [R * K, Q, *]."""
        K, size = x.shape[0] // self.nodes, x.shape[2]
        x = x.view(self.nodes, K, self.width, Q, size).transpose(1, 2)
        x = x.reshape(self.nodes * self.width, K * Q * size)
        return (x if self.place is None else x.index_select(0, self.place)).view(-1, Q, size)

    def scores(self, block, q):
        """q: [R * K, Q, C] -> [R * K, Q, T]."""
        scores = attention_scores(self.regroup(q), self.k[block], self.bias)
        return self.ungroup(scores, q.shape[1])

    def values(self, block, weights):
        """weights: [R * K, Q, T] -> [R * K, Q, C]."""
        return self.ungroup(torch.bmm(self.regroup(weights), self.v[block]), weights.shape[1])


def grouped_attention(block, q, k, v, bias, prefixes):
    """softmax([q·k_prefixᵀ, q·kᵀ] / sqrt C + bias) · [v_prefix, v]: one softmax over all that a row
    sees, Q queries of each row and key/value head.

    q: [R * K, Q, C]; k, v: [R * K, T, C], the rows' own; bias: 0, or -inf for own keys that a query
    may not see, broadcast to [R * K, Q, T]; prefixes: [SharedPrefix] -> [R * K, Q, C]. The
    arithmetic is that of model.causal_attention on a CPU. In bf16 the sums over layers round apart,
    by about 0.01 nats a token.
    """
    # [R * K, Q, slots]: the slots of each prefix, root first, then the row's own.
    scores = [*(p.scores(block, q) for p in prefixes), attention_scores(q, k, bias)]
    weights = torch.cat(scores, -1).softmax(-1)
    # Joined values would be a copy of every prefix for every row: each part has its own product.
    *shared, own = weights.split([*(p.T for p in prefixes), k.shape[1]], -1)
    out = torch.bmm(own, v)
    for prefix, weight in zip(prefixes, shared):
        out = out + prefix.values(block, weight)
    return out


def joined(pool, path):
    """path: [(Segments, node of each row [R])], root first -> Segments with a node for each of the
    last step: the tokens of its path, one after another.

    It repeats a question below each of its answers. But on a CPU a small product costs its start:
    one with 80 slots is cheaper than two with 32 and 48.
    """
    rows, nodes = path[-1][1], len(path[-1][0].lengths)
    # [(Segments, node [nodes])]: where each node's path goes. Nodes without a row take any.
    path = [(layer, rows.new_zeros(nodes).index_copy_(0, rows, node)) for layer, node in path]
    lengths = sum(layer.lengths[node] for layer, node in path)
    T = int(lengths.max())
    T += -T % GROWTH
    store = SimpleNamespace(k=pool.blank(nodes * T), v=pool.blank(nodes * T))
    start = T * torch.arange(nodes, device=rows.device)  # [nodes] the next free slot
    for layer, node in path:
        column = torch.arange(layer.T, device=rows.device)
        real = column < layer.lengths[node][:, None]  # [nodes, slots]
        source = (layer.starts()[node][:, None] + column)[real]
        target = (start[:, None] + column)[real]
        store.k.index_copy_(1, target, layer.store.k.index_select(1, source))
        store.v.index_copy_(1, target, layer.store.v.index_select(1, source))
        start = start + layer.lengths[node]
    return Segments(store, 0, T, lengths)


class PrefillAttention:
    """Attention of a forward pass over new tokens behind a path. model.GPT.forward calls `attend`,
    which also stores the tokens' keys and values.

    Row r of the pass adds new[r] tokens to node nodes[r] of `segments`, behind the filled[r] slots
    that are there already (those of the answer, when its phrase is prefilled).
    """

    def __init__(self, config, path, segments, nodes, filled, new):
        self.segments, S, device = segments, int(new.max()), nodes.device
        self.prefixes = [SharedPrefix(*step) for step in path]
        # From layer 2 on the first slots of these segments hold the copied answer. For the new
        # tokens that is one more prefix, with a single row to each node.
        if bool(filled.any()):
            lengths = torch.zeros_like(segments.lengths).index_copy_(0, nodes, filled)
            self.prefixes.append(SharedPrefix(replace(segments, lengths=lengths), nodes))
        column = torch.arange(S, device=device)
        real = column < new[:, None]  # [R, S]: not a pad
        # Numbers, not the mask: to index by a mask the host waits for the device, in every block.
        self.real = real.flatten().nonzero()[:, 0]
        # New token j of a row goes into slot start + filled + j; pads go nowhere.
        self.slots = (segments.starts()[nodes][:, None] + filled[:, None] + column)[real]
        if device.type == "cuda" and not self.prefixes:
            return  # attend needs no bias: torch's kernel knows the causal triangle
        # Of the new tokens none may see a later one. Pads stand last, so this covers them too. G
        # query heads of a key/value head lie side by side: [S * G, S].
        later = (column > column[:, None]).repeat_interleave(config.heads // config.kv_heads, 0)
        self.bias = segments.store.k.new_zeros(later.shape).masked_fill_(later, -math.inf)

    def attend(self, block, q, k, v):
        """q: [R, S, N, C]; k, v: [R, S, K, C] -> [R, S, N, C]."""
        for store, x in ((self.segments.store.k, k), (self.segments.store.v, v)):
            store[block].index_copy_(0, self.slots, x.flatten(0, 1).index_select(0, self.real))
        if q.is_cuda and not self.prefixes:
            return causal_attention(block, q, k, v)
        # The keys and values of prefixes come from the cache, those of the new tokens from this
        # pass.
        (R, S, N, C), K = q.shape, k.shape[2]
        k, v = (x.transpose(1, 2).reshape(R * K, S, C) for x in (k, v))
        q = q.reshape(R, S, K, N // K, C).transpose(1, 2).reshape(R * K, -1, C)  # [R * K, S * G, C]
        out = grouped_attention(block, q, k, v, self.bias, self.prefixes)
        return out.view(R, K, S, N // K, C).transpose(1, 2).reshape(R, S, N, C)


class CpuCache:
    """The cache of rows in flight on a CPU: a prefix that rows share, and segments of the rows' own
    that grow together, GROWTH slots at a time.

    path: [(Segments, node of each row [B])], root first; rows: in_flight.RowState; most: tokens
    that a row may sample; keep: whether the segments of rows that leave are kept, for `extend`.
    cuda_cache.CudaCache has the same methods.
    """

    def __init__(self, config, pool, path, rows, most, keep):
        self.heads, self.eps = config.heads, config.norm_eps
        self.pool, self.rows, self.most, self.keep = pool, rows, most, keep
        self.above = path[0][0] if len(path) == 1 else joined(pool, path)
        self.T, self.longest = GROWTH, 0
        self.left = []  # [(row numbers, k, v [L, rows, T, K, C])] of the rows that have left
        self.k, self.v = pool.blank(0), pool.blank(0)  # [L, R * T, K, C]

    def admit(self, R, count):
        """`count` new rows take the places behind the first R."""
        self.k, self.v = (
            torch.cat([x, self.pool.blank(count * self.T)], 1) for x in (self.k, self.v)
        )
        self._arrange(R + count, path_changed=True)

    def retire(self, stay, numbers):
        """stay: [R] bool, the rows that remain; they have closed up already. numbers: [R], the row
        numbers from before that."""
        k, v = (x.unflatten(1, (len(stay), self.T)) for x in (self.k, self.v))
        # All leave at once: their segments are kept as they are, without a copy.
        if not stay.any():
            if self.keep:
                self.left.append((numbers, k, v))
            self.k, self.v = self.pool.blank(0), self.pool.blank(0)
            return
        if self.keep:
            self.left.append((numbers[~stay], k[:, ~stay], v[:, ~stay]))
        self.k, self.v = (x[:, stay].flatten(1, 2) for x in (k, v))
        self._arrange(int(stay.sum()), path_changed=True)

    def _arrange(self, R, path_changed):
        """Notes where the segment of each of R rows lies, and which slots a row may see."""
        if path_changed:
            self.prefix = SharedPrefix(self.above, self.rows.nodes[-1][:R])
        length = self.rows.length[:R]
        # Off by one: the token chosen last is number length - 1 of its row, and goes into that
        # slot. A new row (length 0) points before its segment; the first `advance` moves it to slot
        # 0.
        self.rows.slot[:R] = self.T * torch.arange(R, device=self.pool.device) + length - 1
        length = length.repeat_interleave(self.k.shape[2])[:, None, None]
        empty = torch.arange(self.T, device=self.pool.device) >= length  # [R * K, 1, T]
        self.bias = self.k.new_zeros(empty.shape).masked_fill_(empty, -math.inf)

    def make_room(self, R):
        """Before a step: each segment gets a slot for one more token, and its row may see it."""
        # An upper bound, since the longest row may have left.
        self.longest = min(self.longest + 1, self.most)
        if self.longest > self.T:
            self.k, self.v = (
                # [L, R, T, K, C]: GROWTH slots behind those of every row.
                F.pad(x.unflatten(1, (R, self.T)), (0, 0, 0, 0, 0, GROWTH)).flatten(1, 2)
                for x in (self.k, self.v)
            )
            self.T += GROWTH
            self._arrange(R, path_changed=False)
        # Column length - 1 is new. One entry of each row changes, and building the bias anew would
        # write all of them.
        newest = (self.rows.length[:R] - 1).repeat_interleave(self.k.shape[2])
        self.bias.scatter_(2, newest[:, None, None], 0.0)

    def attend(self, block, qkv, norms, cos, sin):
        """Stores the new keys and values, and attends: the arguments are those of
        kernels.rope_store_torch -> [R, N, C]."""
        k, v, slot = self.k[block], self.v[block], self.rows.slot[: len(qkv)]
        q = rope_store_torch(qkv, norms, cos, sin, slot, k, v, self.heads, self.eps)
        (R, N, C), K = q.shape, k.shape[1]
        k, v = k.view(R, self.T, K, C), v.view(R, self.T, K, C)
        if K == 1:  # views; with more heads, copies of [R * K, T, C]
            k, v = k[:, :, 0], v[:, :, 0]
        else:
            k, v = (x.transpose(1, 2).reshape(R * K, self.T, C) for x in (k, v))
        q = q.contiguous().view(R * K, N // K, C)
        return grouped_attention(block, q, k, v, self.bias, [self.prefix]).view(R, N, C)

    def finish(self, lengths):
        """All rows have left. lengths: [B], of their segments -> Segments by row number."""
        if len(self.left) == 1:  # all at once, so they are in order
            _, k, v = self.left[0]
            return Segments(
                SimpleNamespace(k=k.flatten(1, 2), v=v.flatten(1, 2)), 0, self.T, lengths
            )
        # Rows left at different times: what each group left is put in order of row numbers.
        segments = self.pool.take(len(lengths), max(1, int(lengths.max())), lengths)
        k, v = segments.views()
        for numbers, left_k, left_v in self.left:
            width = min(segments.T, left_k.shape[2])
            k[:, numbers, :width] = left_k[:, :, :width]
            v[:, numbers, :width] = left_v[:, :, :width]
        return segments
