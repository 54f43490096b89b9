"""Rows in flight: the rows that a decode step adds a token to, and those that wait for cache space.

The idea. Each row has one place in a few tensors that stay where they are in memory, so that a CUDA
graph can replay a step on them. Rows that have ended leave, with their cache, once they are an
eighth of the rows in flight: a step costs time for every row, but moving the others costs time too.
Some stay longer, so that the same numbers of rows come again (engine/shapes.py). The others close
up, and waiting rows take the free places.

Letters: B rows of a request, R rows in flight, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch

from engine.cuda_graphs import AliveMirror
from engine.shapes import rounded

# The fields of RowState with an entry for each place, besides the list `nodes`.
PER_ROW = ("token", "position", "length", "slot", "start", "limit", "key", "row", "alive")


@dataclass
class Request:
    """B rows to be sampled, and the prefixes that they continue."""

    path: list  # [(Segments, node [B])], root first
    node: torch.Tensor  # [B] the prefix that a row continues
    logits: torch.Tensor  # [prefixes, V] of the token behind each prefix
    starts: torch.Tensor  # [prefixes] position of that token
    limits: torch.Tensor  # [B] the most tokens that a row may sample
    keys: torch.Tensor  # [B] int32, of the rows' random numbers


@dataclass
class RowState:
    """The state of the rows, one place each: integers [places], except where noted."""

    token: torch.Tensor  # chosen last; its keys and values are not cached yet
    position: torch.Tensor  # of that token in the sequence
    length: torch.Tensor  # tokens sampled so far
    slot: torch.Tensor  # where that token's keys and values go; -1: nowhere, the place is empty
    start: torch.Tensor  # first slot of the row's own segment
    limit: torch.Tensor  # the most tokens it may sample
    key: torch.Tensor  # int32, of its random numbers
    row: torch.Tensor  # its number within the request
    alive: torch.Tensor  # bool: has neither ended nor reached its limit
    nodes: list  # for each layer of the path [places], the node that the row continues
    tokens: torch.Tensor = None  # [B, most + 1] the request's sampled tokens, see `advance`
    logprobs: torch.Tensor = None  # [B, most + 1] fp32
    position_keys: torch.Tensor = None  # [B, most + 1] int32, of their noise; unused by the kernel
    ends: torch.Tensor = None  # [4] tokens that end a row, -1 where there are fewer

    @staticmethod
    def blank(places, layers, end_tokens, device):
        """-> empty places, for paths of so many layers."""
        zeros = [torch.zeros(places, dtype=torch.long, device=device) for _ in range(7 + layers)]
        token, position, length, slot, start, limit, row, *nodes = zeros
        return RowState(
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
        """-> places first .. last - 1: views."""
        views = {name: getattr(self, name)[first:last] for name in PER_ROW}
        return replace(self, nodes=[node[first:last] for node in self.nodes], **views)

    def clear(self):
        """Empties these places: they write nothing, see nothing, and are not advanced."""
        self.slot.fill_(-1)
        self.length.zero_()
        self.alive.fill_(False)

    def close_up(self, stay):
        """stay: [R] bool. Those of the first R rows take the lowest places, in order."""
        index = stay.nonzero()[:, 0].to(self.token.device)
        # x[index] is a copy, so a row may take a place whose own row moves too.
        for x in (*(getattr(self, name) for name in PER_ROW), *self.nodes):
            x[: len(index)] = x[index]
        self.part(len(index), len(stay)).clear()

    def advance(self, token, logp):
        """Every row samples its `token` [R], with log-probability `logp` [R].

        A row that has ended writes too, behind its end: always into the same column, at most column
        `most`, and `sample.Completions` is cut before it. That is cheaper than a mask.
        """
        self.tokens[self.row, self.length] = token
        self.logprobs[self.row, self.length] = logp
        self.token.copy_(token)
        # alive is 0 or 1: a row that has ended stays where it is.
        for x in (self.position, self.length, self.slot):
            x += self.alive
        # length counts the new token already. The token that ends a row is part of the completion.
        self.alive &= ~torch.isin(token, self.ends) & (self.length < self.limit)


class InFlight:
    """A request while it is decoded.

    rows: R, the rows in flight; active: their RowState; tokens, logprobs [B, most + 1] and lengths
    [B]: the result, complete when no row is in flight or waits.
    capacity: rows that the cache has space for. leave: whether ended rows leave before all have
    ended. observer: None, or called after every step with `active` and the number of rows that now
    leave.
    """

    def __init__(self, request, cache, capacity, most, leave=True, observer=None):
        B, device = len(request.keys), request.keys.device
        self.request, self.cache, self.state = request, cache, cache.rows
        self.capacity, self.leave, self.observer = capacity, leave, observer
        self.tokens = torch.zeros(B, most + 1, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(B, most + 1, device=device)
        self.lengths = torch.zeros(B, dtype=torch.long, device=device)
        self.state.tokens, self.state.logprobs = self.tokens, self.logprobs
        self.waiting, self.rows = B, 0
        # Rounds of the decode loop so far, and the round after which every row is at its limit:
        # then all have ended, and the host need not ask the device.
        self.round, self.last_round = 0, 0
        self.mirror = AliveMirror(device)

    @property
    def can_admit(self):
        """Whether a row waits and a place is free."""
        return self.waiting > 0 and self.rows < self.capacity

    def admit(self):
        """Waiting rows take the free places -> their RowState. They have no token yet."""
        request, first = self.request, len(self.request.keys) - self.waiting
        count = min(self.waiting, self.capacity - self.rows)
        numbers = torch.arange(first, first + count, device=request.keys.device)
        new = self.state.part(self.rows, self.rows + count)
        # Off by one: the first token belongs at `starts`. The position before it is set here, since
        # `advance` adds 1 with the token.
        new.position.copy_(request.starts[request.node[numbers]] - 1)
        new.limit.copy_(request.limits[numbers])
        new.key.copy_(request.keys[numbers])
        new.row.copy_(numbers)
        for target, (_, node) in zip(new.nodes, request.path):
            target.copy_(node[numbers])
        new.length.zero_()
        new.alive.fill_(True)
        self.cache.admit(self.rows, count)
        # The rows that are in flight already do not advance in this round: one more for them.
        limit = int(request.limits[numbers].max())
        self.last_round = max(self.last_round + 1, self.round + limit)
        self.waiting -= count
        self._set_rows(self.rows + count)
        return new

    def retire_finished(self):
        """Ends a round: rows that have ended leave with their cache, if they are enough."""
        self.round += 1
        R, device = self.rows, self.lengths.device
        # By now every row has reached its limit.
        if self.round == self.last_round:
            alive = torch.zeros(R, dtype=torch.bool)
        else:
            alive = self.mirror.read(self.active.alive)  # [R] on the CPU; None: not known yet
        # As many rows stay as make a size of `rounded`, ended ones too.
        going = 0 if alive is None else R - rounded(int(alive.sum()))
        # All rows have ended, or at least an eighth of them can go.
        leaving = going == R or (self.leave and 0 < going and R <= 8 * going)
        if self.observer:
            self.observer(self.active, going if leaving else 0)
        if not leaving:
            return
        # Copies: both may be views of the state, which close_up overwrites.
        stay, numbers = alive.clone(), self.state.row[:R].clone()
        stay[(~stay).nonzero()[going:]] = True
        # The result takes their lengths before other rows move into their places.
        gone = (~stay).nonzero()[:, 0].to(device)
        self.lengths[numbers[gone]] = self.state.length[gone]
        self.state.close_up(stay)
        self.cache.retire(stay, numbers)
        self._set_rows(R - going)

    def _set_rows(self, R):
        self.rows, self.active = R, self.state.part(0, R)
        self.mirror.forget()  # rows have moved

    def finish(self):
        """-> Segments of the rows by their number, without the last token of each, whose keys were
        never computed. None when rows had to wait: others have taken their slots."""
        whole = self.capacity == len(self.lengths)
        return self.cache.finish(self.lengths - 1) if whole else None
