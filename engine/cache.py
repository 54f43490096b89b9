"""The KV cache as a tree: which keys and values a row attends to, each stored once, and two ways to
read them.

    pytest tests/test_sample.py                    # what follows, held against the model without a
                                                   cache

The idea. A key and a value in each layer are all that the past of a sequence leaves behind. In a
rollout pasts are shared: a question by all of its attempts, an attempt by all of its corrections.
So the cache is a tree of segments, each a run of slots:

    level 0  questions     q0  q0  q0  q0  .   q1  q1 ...          a node a question, read once for
             ALL rows below it
    level 1  attempts      a0  a0  p0  p0  p0   a1  a1 ...         a node an attempt, its phrase
             behind it
    own      corrections   c0  .   .   .        c1  c1 ...         what each row has sampled so far,
             a slot more each step

A `Level` is one generation of nodes. Keys carry their position (RoPE), so where in memory a segment
lies means nothing.

There are two readers of the same tree. `Grouped` (the CPU's) turns the rows of a node into ONE tall
matrix product with its keys, and puts everything a row sees under one softmax. `Tables` (CUDA's)
tells the kernels of kernels.py which segment begins where, how long it is and who sees it. Tables
keep their places in memory and lengths are read on the device, so a captured CUDA graph serves
every step.

Letters: R rows, L layers, N query heads, K key/value heads, g = N / K, C head size, S new tokens, T
slots of a segment.
"""

import itertools
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from engine import kernels
from model import causal_attention

# slots by which rows' own segments grow on a CPU: contiguous blocks are what its matrix products
# want
WIDEN = 16
EPOCHS = itertools.count()


@dataclass
class Level:
    """One generation of nodes: node i has the slots base + i T .. base + i T + lengths[i] - 1 of
    home.k, home.v [L, slots, K, C]."""

    home: object
    base: int
    T: int
    lengths: torch.Tensor  # [nodes]

    def starts(self):
        """[nodes] first slot of each."""
        return self.base + self.T * torch.arange(len(self.lengths), device=self.lengths.device)

    def blocks(self):
        """-> k, v as [L, nodes, T, K, C] views."""
        nodes = len(self.lengths)
        return tuple(
            x[:, self.base : self.base + nodes * self.T].unflatten(1, (nodes, self.T))
            for x in (self.home.k, self.home.v)
        )


class Pool:
    """Where levels get their slots. shared: all from one pair of tensors k, v [L, slots, K, C] (the
    kernels want one address), from the bottom up, and taken back all at once when a new tree
    begins. Else each level has tensors of its own.

    limit: slots there may be in all (None: no limit); the pair grows to what calls need. It bounds
    what a call and those it extends hold; on a CPU older results keep their levels beside that.
    `epoch` names the tree: segments of another one are gone.
    """

    def __init__(self, config, dtype, device, shared, limit=None):
        self.shape = config.depth, 0, config.kv_heads, config.head_size
        self.dtype, self.device, self.shared, self.limit, self.top, self.moves = (
            dtype,
            device,
            shared,
            limit,
            0,
            0,
        )
        self.k, self.v = self.blank(0), self.blank(0)
        self.renew()

    def blank(self, slots):
        L, _, K, C = self.shape
        return torch.zeros(L, slots, K, C, dtype=self.dtype, device=self.device)

    def reset(self):
        """A new tree begins."""
        self.top = 0
        if self.shared:
            self.renew()

    def renew(self):
        """What has been cached is of no use any more. No two pools ever have the same epoch."""
        self.epoch = next(EPOCHS)

    def free(self):
        return math.inf if self.limit is None else self.limit - self.top

    def level(self, nodes, T, lengths):
        """Takes nodes x T slots -> Level."""
        self.reserve(self.top + nodes * T)
        base, self.top = self.top, self.top + nodes * T
        if not self.shared:
            return Level(
                SimpleNamespace(k=self.blank(nodes * T), v=self.blank(nodes * T)), 0, T, lengths
            )
        return Level(self, base, T, lengths)

    def reserve(self, slots):
        """Makes the pair at least so long, within the limit, and a quarter longer than it was; what
        it holds stays.

        A pair at its limit stays where it is, whatever is asked for: rows will wait, and graphs
        captured on it go on serving.
        """
        there = self.k.shape[1]
        more = (
            min(max(slots, there * 5 // 4), math.inf if self.limit is None else self.limit) - there
        )
        if not self.shared or slots <= there or more <= 0:
            return
        self.moves += 1
        if self.top == 0:  # it holds nothing: let go of it first
            self.k = self.v = None
            self.k, self.v = self.blank(there + more), self.blank(there + more)
        else:
            self.k = F.pad(self.k, (0, 0, 0, 0, 0, more))
            self.v = F.pad(self.v, (0, 0, 0, 0, 0, more))


# ---- rows in flight ------------------------------------------------------------------------------

PER_ROW = ("token", "position", "length", "slot", "start", "limit", "key", "row", "alive")


@dataclass
class Rows:
    """The rows in flight: one place each in tensors that stay where they are. A row moves to a
    lower place when others leave."""

    token: torch.Tensor  # [places] the token chosen last; its keys and values are not cached yet
    position: torch.Tensor  # where that stands in the sequence
    length: torch.Tensor  # tokens sampled so far
    # of the cache, where that token's keys and values go; -1: nowhere, there is no row here
    slot: torch.Tensor
    start: torch.Tensor  # first slot of the row's own segment
    limit: torch.Tensor  # most tokens it may sample
    key: torch.Tensor  # int32, of its random numbers
    row: torch.Tensor  # which row of the result it is
    alive: torch.Tensor  # bool: has neither ended nor reached its limit
    nodes: list  # for each level of the path [places], the node that the row continues
    tokens: torch.Tensor = None  # [B, most + 1] the result
    logprobs: torch.Tensor = None  # [B, most + 1]
    ends: torch.Tensor = None  # [4] tokens that end a row, -1 where there are fewer

    @staticmethod
    def blank(places, levels, end_tokens, device):
        zeros = [torch.zeros(places, dtype=torch.long, device=device) for _ in range(7 + levels)]
        token, position, length, slot, start, limit, row, *nodes = zeros
        return Rows(
            token,
            position,
            length,
            slot.fill_(-1),
            start,
            limit,
            torch.zeros(places, dtype=torch.int32, device=device),
            row,
            torch.zeros(places, dtype=torch.bool, device=device),
            nodes,
            ends=torch.tensor([*end_tokens, -1, -1, -1, -1][:4], device=device),
        )

    def part(self, first, last):
        """Places first .. last - 1 as Rows: views."""
        return replace(
            self,
            nodes=[x[first:last] for x in self.nodes],
            **{name: getattr(self, name)[first:last] for name in PER_ROW},
        )

    def seat(self, first, rows, job):
        """Rows `rows` (numbers within a sample.Job) take the places from `first` on; none of them
        has sampled a token."""
        place = self.part(first, first + len(rows))
        place.position.copy_(job.starts[job.node[rows]] - 1)
        for mine, given in zip(
            (place.limit, place.key, *place.nodes),
            (job.limits, job.keys, *(node for _, node in job.path)),
        ):
            mine.copy_(given[rows])
        place.row.copy_(rows)
        place.length.zero_()
        place.alive.fill_(True)

    def clear(self):
        """Nobody is here: these places write nothing, see nothing, and are not moved on."""
        self.slot.fill_(-1)
        self.length.zero_()
        self.alive.fill_(False)

    def keep(self, stay, R):
        """Of R rows those of the mask `stay` close up; the places behind them are empty."""
        index = stay.nonzero()[:, 0].to(self.token.device)
        for x in (*(getattr(self, name) for name in PER_ROW), *self.nodes):
            x[: len(index)] = x[index]
        self.part(len(index), R).clear()

    def advance(self, token, logp):
        """Notes a token for every row (see kernels.choose_torch). Those that are not alive move on
        no more: what they note stands behind their end, where it is wiped out at last."""
        self.tokens[self.row, self.length], self.logprobs[self.row, self.length] = token, logp
        self.token.copy_(token)
        for x in (self.position, self.length, self.slot):
            x += self.alive
        self.alive &= ~torch.isin(token, self.ends) & (self.length < self.limit)


# ---- grouped rows, in torch ----------------------------------------------------------------------


class Ancestor:
    """A level as the rows below it see it: row r continues node[r] (ascending). Queries are
    regrouped so that the keys and values of a node meet ALL its rows in one matrix product, and so
    are read once."""

    def __init__(self, level, node):
        alive, self.node = node.unique(return_inverse=True)
        self.lengths, (self.k, self.v) = level.lengths[alive], level.blocks()  # [L, nodes, T, K, C]
        if len(alive) < self.k.shape[1]:
            self.k, self.v = self.k.index_select(1, alive), self.v.index_select(1, alive)
        self.T = level.T
        # [L, nodes * K, T, C], views where K = 1
        k, v = (x.transpose(2, 3).flatten(1, 2) for x in (self.k, self.v))
        self.k, self.v = k.mT.unbind(0), v.unbind(0)  # of each layer
        count = self.node.bincount()
        self.nodes, self.width = len(count), int(count.max())
        first = count.cumsum(0) - count
        uneven = int(count.min()) != self.width  # rows have left: pad every node to the widest one
        self.place = (
            self.node * self.width + torch.arange(len(node), device=node.device) - first[self.node]
            if uneven
            else None
        )

    def regroup(self, x):
        """[R * K, Q, *] -> [nodes * K, width * Q, *], a node's rows side by side. (A view where K =
        1 and no row has left.)"""
        K, Q, size = x.shape[0] // len(self.node), x.shape[1], x.shape[2]
        if K == 1 and self.place is None:
            return x.view(self.nodes, self.width * Q, size)
        if self.place is not None:
            x = x.new_zeros(self.nodes * self.width, K * Q * size).index_copy_(
                0, self.place, x.view(len(self.node), -1)
            )
        return (
            x.view(self.nodes, self.width, K, Q, size)
            .transpose(1, 2)
            .reshape(self.nodes * K, self.width * Q, size)
        )

    def ungroup(self, x, Q):
        """The inverse: [nodes * K, width * Q, *] -> [R * K, Q, *]."""
        K, size = x.shape[0] // self.nodes, x.shape[2]
        if K == 1 and self.place is None:
            return x.view(-1, Q, size)
        x = (
            x.view(self.nodes, K, self.width, Q, size)
            .transpose(1, 2)
            .reshape(self.nodes * self.width, K * Q * size)
        )
        return (x if self.place is None else x.index_select(0, self.place)).view(-1, Q, size)

    def scores(self, layer, q):
        """q: [R * K, Q, C] -> [R * K, Q, T]."""
        return self.ungroup(torch.bmm(self.regroup(q), self.k[layer]), q.shape[1])

    def values(self, layer, weights):
        """weights: [R * K, Q, T] -> [R * K, Q, C]."""
        return self.ungroup(torch.bmm(self.regroup(weights), self.v[layer]), weights.shape[1])

    def hidden(self):
        """[R, T] bool: the pad columns, which no row may see."""
        columns = torch.arange(self.T, device=self.node.device)
        return (columns >= self.lengths[:, None])[self.node]


def grouped_attention(layer, q, k, v, bias, ancestors):
    """Q queries of each row and key/value head, q: [R * K, Q, C]; k, v: [R * K, T, C], the rows'
    own; bias: fp32 [R * K, Q or 1, columns], 0 or -inf -> [R * K, Q, C].

    The arithmetic is that of model.causal_attention on a CPU; in bf16 the sums over levels round
    apart, by about 0.01 nats a token.
    """
    scores = torch.cat([*(a.scores(layer, q) for a in ancestors), torch.bmm(q, k.mT)], -1)
    # softmax in fp32
    weights = torch.add(bias, scores, alpha=q.shape[2] ** -0.5).softmax(-1).to(q.dtype)
    *shared, own = weights.split([*(a.T for a in ancestors), k.shape[1]], -1)
    out = torch.bmm(own, v)
    for ancestor, weight in zip(ancestors, shared):
        out = out + ancestor.values(layer, weight.contiguous())
    return out


class Prefill:
    """Attention of a forward pass over new tokens behind a path: model.GPT.forward calls `attend`,
    which stores their keys and values.

    Row r of the pass adds news[r] tokens to node nodes[r] of `level`, behind the before[r] slots
    filled already (an attempt's, when its phrase is prefilled).
    """

    def __init__(self, config, path, level, nodes, before, news):
        self.level, (R, S), device = level, (len(nodes), int(news.max())), nodes.device
        self.ancestors = [Ancestor(*step) for step in path]
        if bool(before.any()):
            filled = torch.zeros_like(level.lengths).index_copy_(0, nodes, before)
            self.ancestors.append(Ancestor(replace(level, lengths=filled), nodes))
        new = torch.arange(S, device=device)
        self.real = new < news[:, None]  # [R, S]: not a pad
        self.slots = (level.starts()[nodes][:, None] + before[:, None] + new)[self.real]
        if device.type == "cuda" and not self.ancestors:
            return  # see attend: nothing but the causal triangle
        hidden = [
            *(a.hidden()[:, None].expand(R, S, -1) for a in self.ancestors),
            (new > new[:, None]).expand(R, S, S),
        ]
        # [R, S * g, columns]
        hidden = torch.cat(hidden, -1).repeat_interleave(config.heads // config.kv_heads, 1)
        hidden = hidden.repeat_interleave(config.kv_heads, 0)
        self.bias = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -math.inf)

    def attend(self, layer, q, k, v):
        """q: [R, S, N, C]; k, v: [R, S, K, C] -> [R, S, N, C]."""
        self.level.home.k[layer].index_copy_(0, self.slots, k[self.real])
        self.level.home.v[layer].index_copy_(0, self.slots, v[self.real])
        if q.is_cuda and not self.ancestors:
            return causal_attention(layer, q, k, v)
        (R, S, N, C), K = q.shape, k.shape[2]
        k, v = (x.transpose(1, 2).reshape(R * K, S, C) for x in (k, v))
        q = q.reshape(R, S, K, N // K, C).transpose(1, 2).reshape(R * K, -1, C)
        out = grouped_attention(layer, q, k, v, self.bias, self.ancestors)  # [R * K, S * g, C]
        return out.view(R, K, S, N // K, C).transpose(1, 2).reshape(R, S, N, C)


class Grouped:
    """What rows attend to while they decode, on a CPU: ancestors, and segments of their own that
    grow together, WIDEN slots at a time."""

    store = staticmethod(kernels.rope_store_torch)

    def __init__(self, pool, path, rows, most, whole):
        # tokens that a row may sample; whether segments of rows that leave are put by
        self.most, self.whole = most, whole
        self.pool, self.path, self.rows, self.T, self.longest, self.left = (
            pool,
            path,
            rows,
            WIDEN,
            0,
            [],
        )
        self.k, self.v = pool.blank(0), pool.blank(0)

    def admit(self, R, count):
        """`count` new rows behind the R there are."""
        self.k, self.v = (
            torch.cat([x, self.pool.blank(count * self.T)], 1) for x in (self.k, self.v)
        )
        self.ancestors = [
            Ancestor(level, node[: R + count]) for level, node in zip(self.path, self.rows.nodes)
        ]
        self.arrange(R + count)

    def arrange(self, R):
        """Notes where the segment of each of R rows lies, and what it may see."""
        self.rows.slot[:R] = (
            self.T * torch.arange(R, device=self.pool.device) + self.rows.length[:R] - 1
        )
        own = torch.arange(self.T, device=self.pool.device) >= self.rows.length[:R, None]
        hidden = torch.cat([*(a.hidden() for a in self.ancestors), own], -1).repeat_interleave(
            self.k.shape[2], 0
        )
        # [R * K, 1, columns]
        self.bias = torch.zeros(hidden.shape, device=self.pool.device).masked_fill_(
            hidden, -math.inf
        )[:, None]

    def keep(self, stay, R):
        """Of R rows those of the mask `stay` remain; segments of the others are put by. (rows.keep
        has yet to be called.)"""
        blocks, row = (
            [x.unflatten(1, (R, self.T)) for x in (self.k, self.v)],
            self.rows.row[:R].clone(),
        )
        if not stay.any():
            self.left += [(row, *blocks)] if self.whole else []
            self.k, self.v = self.pool.blank(0), self.pool.blank(0)
            return
        self.left += [(row[~stay], *(x[:, ~stay] for x in blocks))] if self.whole else []
        self.k, self.v = (x[:, stay].flatten(1, 2) for x in blocks)

    def kept(self, R):
        """rows.keep has been called: R rows are left."""
        if R:
            self.ancestors = [
                Ancestor(level, node[:R]) for level, node in zip(self.path, self.rows.nodes)
            ]
            self.arrange(R)

    def begin(self, R):
        """Before a step: room for one more token in each segment, and permission to see it."""
        # an upper bound: the row that was longest may have left
        self.longest = min(self.longest + 1, self.most)
        if self.longest > self.T:
            self.k, self.v = (
                F.pad(x.unflatten(1, (R, self.T)), (0, 0, 0, 0, 0, WIDEN)).flatten(1, 2)
                for x in (self.k, self.v)
            )
            self.T += WIDEN
            self.arrange(R)
        newest = self.bias.shape[2] - self.T - 1 + self.rows.length[:R]
        self.bias.scatter_(2, newest.repeat_interleave(self.k.shape[2])[:, None, None], 0.0)

    def attend(self, layer, q):
        """q: [R, N, C] -> [R, N, C]."""
        (R, N, C), K = q.shape, self.k.shape[2]
        k, v = self.k[layer].view(R, self.T, K, C), self.v[layer].view(R, self.T, K, C)
        k, v = (
            (k[:, :, 0], v[:, :, 0])
            if K == 1
            else (x.transpose(1, 2).reshape(R * K, self.T, C) for x in (k, v))
        )
        return grouped_attention(
            layer, q.contiguous().view(R * K, N // K, C), k, v, self.bias, self.ancestors
        ).view(R, N, C)

    def finish(self, B, lengths):
        """All rows have left -> Level of their segments, by row number."""
        if len(self.left) == 1:  # all at once, so they lie in order
            _, k, v = self.left[0]
            return Level(SimpleNamespace(k=k.flatten(1, 2), v=v.flatten(1, 2)), 0, self.T, lengths)
        level = self.pool.level(B, max(1, int(lengths.max())), lengths)
        k, v = level.blocks()
        for rows, left_k, left_v in self.left:
            width = min(level.T, left_k.shape[2])
            k[:, rows, :width], v[:, rows, :width] = left_k[:, :, :width], left_v[:, :, :width]
        return level


# ---- tables, for the kernels ---------------------------------------------------------------------


class Tables:
    """What rows attend to while they decode, for kernels.attend: for each level a table of segments
    and the rows that see them, as many to a line as a tile holds (kernels.members_for; a node with
    more rows has more lines). Tables stay where they are, for CUDA graphs."""

    store = staticmethod(kernels.rope_store)

    def __init__(self, config, pool, rows, capacity, levels):
        self.pool, self.rows, self.members = (
            pool,
            rows,
            kernels.members_for(pool.dtype, config.heads, config.kv_heads),
        )
        self.moves, self.me = pool.moves, torch.arange(capacity, device=pool.device)
        self.lines = [
            (
                torch.full((capacity, self.members), -1, device=pool.device),
                torch.zeros_like(self.me),
                torch.zeros_like(self.me),
            )
            for _ in range(levels)
        ]

    @property
    def k(self):
        return self.pool.k

    @property
    def v(self):
        return self.pool.v

    def close(self):
        """Nobody sees or writes anything, until `kept` and new slots."""
        self.rows.slot.fill_(-1)
        for rows, _, _ in self.lines:
            rows.fill_(-1)

    def open(self, path, own):
        """A new call: the levels above its rows, and the level whose nodes are their segments
        (`own`; lengths there mean nothing)."""
        self.path, self.own = path, own
        self.vacant, self.seats = list(range(len(own.lengths))), []

    def admit(self, R, count):
        """`count` new rows behind the R there are, each in a segment that is vacant."""
        seats, self.vacant = self.vacant[:count], self.vacant[count:]
        self.seats += seats
        self.rows.start[R : R + count] = self.own.base + self.own.T * torch.tensor(
            seats, device=self.pool.device
        )
        self.rows.slot[R : R + count] = self.rows.start[R : R + count] - 1
        self.kept(R + count)

    def keep(self, stay, R):
        """Of R rows those of the mask `stay` remain; segments of the others are vacant."""
        self.vacant += [seat for seat, stays in zip(self.seats, stay.tolist()) if not stays]
        self.seats = [seat for seat, stays in zip(self.seats, stay.tolist()) if stays]

    def kept(self, R):
        """Writes the tables for R rows. Siblings lie side by side: a line begins with every node,
        and with every `members` rows of it."""
        for level, node, (rows, starts, lengths) in zip(self.path, self.rows.nodes, self.lines):
            node, me = node[:R], self.me[:R]
            begins = torch.ones_like(node, dtype=torch.bool)
            begins[1:] = node[1:] != node[:-1]
            place = me - torch.where(begins, me, 0).cummax(0)[0]  # among the siblings
            line = (place % self.members == 0).cumsum(0) - 1
            rows.fill_(-1)[line, place % self.members] = me
            starts[line] = level.starts()[node]
            lengths.zero_()[line] = level.lengths[node]

    def begin(self, R):
        pass

    def attend(self, layer, q):
        """q: [R, N, C] -> [R, N, C]."""
        R, K = len(q), self.k.shape[2]
        groups = [tuple(x[:R] for x in line) for line in self.lines[: len(self.path)]]
        groups.append((self.me[:R, None], self.rows.start[:R], self.rows.length[:R]))
        return kernels.attend(
            q, self.k[layer], self.v[layer], groups, splits=kernels.splits_for(R, K)
        )

    def finish(self, B, lengths):
        """-> Level of the rows' segments, by row number; None when segments were used more than
        once."""
        return replace(self.own, lengths=lengths) if len(self.own.lengths) == B else None
