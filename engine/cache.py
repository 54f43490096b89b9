"""The KV cache as a tree: a prefix that rows share is computed once.

    pytest tests/test_sample.py                    # held against the model without a cache

The idea. In a rollout, prefixes are shared: a question by all of its answers, an answer by all of
its corrections. The cache is a tree of segments, each a run of slots:

    path    questions      q0 q0 q0 q0 .   q1 q1 ...    read once per step for ALL rows below
            answers        a0 a0 w0 w0 .   a1 a1 ...    an answer, then its phrase
    own     corrections    c0 .  .  .  .   c1 c1 ...    one more slot of each row per step

A cached key carries its position (RoPE), so a segment may lie anywhere in memory. CUDA keeps the
tree, and stores every key once (engine/cuda_cache.py). On a CPU a row that is decoded has a copy of
its path, which one small product reads (`CpuCache`).

Letters: R rows, L blocks, N query heads, K key/value heads, C head size, S new tokens, T slots of a
segment.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from engine.kernels import rope_store_torch
from model import attention_scores, causal_attention

# The part of the free CUDA memory that the cache may take when no limit is given.
CACHE_SHARE_OF_FREE_MEMORY = 0.5
# Attention scores, or gathered keys, of a prefill at a time: a few tensors of 256 MB in fp32.
MAX_SCORES = 1 << 26
# Slots by which rows grow on a CPU. Its matrix products want contiguous blocks, and every growth
# copies them. torch's softmax of 48 numbers in bf16 takes longer than one of 64.
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
    path: list  # [(Segments, node of each row [B])], root first; empty on a CPU
    segments: Segments  # the rows' own, by row number; on a CPU with their paths


class SlotPool:
    """The slots of all segments.

    shared: all segments lie in one pair of tensors k, v [L, slots, K, C], since kernels want one
    address. The pair fills from the bottom, and is emptied when a new tree begins. Without it every
    generation of segments has tensors of its own (CPU).
    limit: slots in all (None: no limit). It bounds a call together with the completions that it
    extends; on a CPU completions keep their segments beside that.
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

    def slots_of_row(self, longest, most):
        """-> slots of a row in flight behind a prompt of `longest` tokens. On a CPU it has a copy
        of the prompt, and grows by GROWTH."""
        return most if self.shared else longest + most + -(longest + most) % GROWTH

    def fits(self, prompts, longest, n, most):
        """Whether prompts of at most `longest` tokens, with n rows of at most `most` new tokens
        each, fit beside what is in use."""
        return prompts * (longest + n * self.slots_of_row(longest, most)) <= self.free()

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


# ---- attention, in torch -------------------------------------------------------------------------


class PrefillAttention:
    """Attention of a forward pass over new tokens behind a path. model.GPT.forward calls `attend`,
    which also stores the tokens' keys and values.

    Row r of the pass adds new[r] tokens to node nodes[r] of `segments`, behind the filled[r] slots
    that are there already (those of the answer, when its phrase is prefilled). All segments lie in
    one store.
    """

    def __init__(self, config, path, segments, nodes, filled, new):
        self.segments, R, device = segments, len(nodes), nodes.device
        # What a row sees before its new tokens: its path, and the filled slots behind it.
        parts = [(layer.starts()[node], layer.lengths[node]) for layer, node in path]
        parts.append((segments.starts()[nodes], filled))
        slots, hidden = [], []
        for start, length in parts:
            column = torch.arange(int(length.max()), device=device)
            slots.append(start[:, None] + column)
            hidden.append(column >= length[:, None])
        self.before, hidden = torch.cat(slots, 1), torch.cat(hidden, 1)  # [R, P] each
        column = torch.arange(int(new.max()), device=device)
        real = column < new[:, None]  # [R, S]: not a pad
        # Numbers, not the mask: to index by a mask the host waits for the device, in every block.
        self.real = real.flatten().nonzero()[:, 0]
        # New token j of a row goes into slot start + filled + j; pads go nowhere.
        self.slots = (segments.starts()[nodes][:, None] + filled[:, None] + column)[real]
        if device.type == "cuda" and not self.before.numel():
            return  # attend needs no bias: torch's kernel knows the causal triangle
        # Of the new tokens none may see a later one. Pads stand last, so this covers them too. G
        # query heads of a key/value head lie side by side: [R * K, S * G, P + S].
        K, S = config.kv_heads, len(column)
        later = (column > column[:, None]).expand(R, S, S)
        hidden = torch.cat([hidden[:, None].expand(-1, S, -1), later], 2)
        hidden = hidden.repeat_interleave(K, 0).repeat_interleave(config.heads // K, 1)
        self.bias = segments.store.k.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf)

    def attend(self, block, q, k, v):
        """q: [R, S, N, C]; k, v: [R, S, K, C] -> [R, S, N, C]."""
        stores = self.segments.store.k[block], self.segments.store.v[block]
        for store, x in zip(stores, (k, v)):
            store.index_copy_(0, self.slots, x.flatten(0, 1).index_select(0, self.real))
        if q.is_cuda and not self.before.numel():
            return causal_attention(block, q, k, v)
        # The keys and values of the path come from the cache, those of the new tokens from this
        # pass: [R * K, P + S, C].
        (R, S, N, C), K = q.shape, k.shape[2]
        k, v = (
            torch.cat([store[self.before], x], 1).transpose(1, 2).reshape(R * K, -1, C)
            for store, x in zip(stores, (k, v))
        )
        q = q.reshape(R, S, K, N // K, C).transpose(1, 2).reshape(R * K, -1, C)  # [R * K, S * G, C]
        out = attention_scores(q, k, self.bias).softmax(-1) @ v
        return out.view(R, K, S, N // K, C).transpose(1, 2).reshape(R, S, N, C)


class CpuCache:
    """The cache of rows in flight on a CPU. Each row has T slots, and slot p holds the token at
    position p. The first ones are a copy of its prompt.

    A small product on a CPU costs its start, not what it reads. With one product for what siblings
    share and one for their own, attention took twice as long for 48 rows, and a fifth longer for
    256 rows of 16 siblings. (It took a quarter less where these share 256 tokens.) And one product
    is what the trainer has: in bf16 both round at the same places.

    path: [(Segments, node of each row [B])], the prompts; rows: in_flight.RowState; most: tokens
    that a row may sample; keep: whether the slots of rows that leave are kept, for `extend`.
    cuda_cache.CudaCache has the same methods.
    """

    def __init__(self, config, pool, path, rows, most, keep):
        self.heads, self.eps = config.heads, config.norm_eps
        ((self.prompts, self.node),) = path
        self.rows, self.keep = rows, keep
        # An upper bound of the tokens that a row has now, and its last value.
        self.longest = int(self.prompts.lengths.max())
        self.most = self.longest + most
        self.T = self.prompts.T + -self.prompts.T % GROWTH
        # [L, K, R, T, C]: heads before rows, so that the products of all are one batch.
        L, _, K, C = pool.shape
        self.k = torch.zeros(L, K, 0, self.T, C, dtype=pool.dtype, device=pool.device)
        self.v = self.k
        self.left = []  # [(row numbers, k, v)] of the rows that have left

    def admit(self, R, count):
        """`count` new rows take the places behind the first R."""
        node = self.rows.nodes[0][R : R + count]
        prompts = (x.index_select(1, node).permute(0, 3, 1, 2, 4) for x in self.prompts.views())
        self.k, self.v = (
            torch.cat([x, F.pad(new, (0, 0, 0, self.T - new.shape[3]))], 2)
            for x, new in zip((self.k, self.v), prompts)
        )
        self.bias = None

    def retire(self, stay, numbers):
        """stay: [R] bool, the rows that remain; they have closed up already. numbers: [R], the row
        numbers from before that."""
        k, v = self.k, self.v
        # All leave at once: their slots are kept as they are, without a copy.
        leave = ~stay if stay.any() else slice(None)
        if self.keep:
            self.left.append((numbers[leave], k[:, :, leave], v[:, :, leave]))
        self.k, self.v = k[:, :, stay], v[:, :, stay]
        self.bias = None

    def make_room(self, R):
        """Before a step: each row gets a slot for its newest token, and may see it."""
        position, K = self.rows.position[:R], self.k.shape[1]
        self.longest = min(self.longest + 1, self.most)  # the longest row may have left
        if self.longest > self.T:
            self.k, self.v = (F.pad(x, (0, 0, 0, GROWTH)) for x in (self.k, self.v))
            self.T, self.bias = self.T + GROWTH, None
        if self.bias is None:  # rows or slots have moved
            # Views, made once: of each block [R * T, K, C] to store into, [K * R, T, C] to read.
            L, K, _, T, C = self.k.shape
            store = (x.view(L, K, R * T, C).transpose(1, 2) for x in (self.k, self.v))
            self.blocks = list(zip(*store, *(x.view(L, K * R, T, C) for x in (self.k, self.v))))
            self.first = self.T * torch.arange(R, device=position.device)
            later = torch.arange(self.T, device=position.device) > position[:, None]  # [R, T]
            bias = self.k.new_zeros(later.shape).masked_fill_(later, -math.inf)
            self.bias = bias.repeat(K, 1)[:, None]  # [K * R, 1, T]
        else:  # one entry of each row changes, and building it anew would write all of them
            self.bias.scatter_(2, position.repeat(K)[:, None, None], 0.0)
        self.slot = self.first + position

    def attend(self, block, qkv, norms, cos, sin):
        """Stores the new keys and values, and attends: the arguments are those of
        kernels.rope_store_torch -> [R, N, C]."""
        *store, k, v = self.blocks[block]
        q = rope_store_torch(qkv, norms, cos, sin, self.slot, *store, self.heads, self.eps)
        (R, N, C), K = q.shape, self.k.shape[1]
        q = q.reshape(R, K, N // K, C).transpose(0, 1).reshape(K * R, N // K, C)
        out = attention_scores(q, k, self.bias).softmax(-1) @ v
        return out.view(K, R, N // K, C).transpose(0, 1).reshape(R, N, C)

    def finish(self, lengths):
        """All rows have left. lengths: [B], of their own tokens -> Segments by row number, with
        their prompts."""
        if len(self.left) == 1:  # all at once, so they are in order
            _, k, v = self.left[0]
        else:
            # Rows left at different times: what each group left is put in order of row numbers.
            L, K, _, _, C = self.k.shape
            k, v = (self.k.new_zeros(L, K, len(lengths), self.T, C) for _ in range(2))
            for numbers, left_k, left_v in self.left:
                k[:, :, numbers, : left_k.shape[3]] = left_k
                v[:, :, numbers, : left_v.shape[3]] = left_v
        T = k.shape[3]
        k, v = (x.flatten(2, 3).transpose(1, 2) for x in (k, v))  # [L, B * T, K, C], views
        lengths = self.prompts.lengths[self.node] + lengths
        return Segments(SimpleNamespace(k=k, v=v), 0, T, lengths)
