"""The packed tree: a training pass that computes every token of a rollout once.

    python packing.py                      # a small tree, packed, and who sees whom
    python bench.py train                  # what it is worth, beside padded rows

The idea. As padded rows a rollout carries its question in each of its G (1 + H) rows, and every
attempt in the rows of its H corrections. As a tree each segment stands once, in depth-first order,
all trees of a micro-batch one behind the other:

    question ─┬─ attempt, phrase ─┬─ correction          packed    q q q a a w x x y y y b b
              │                   └─ correction          position  0 1 2 3 4 5 6 7 6 7 8 3 4
              └─ attempt                                 until    13 . . 11. . 8 . 11. . 13.

`until` is where the part of the tree below a token's segment ends. In this order a token's
ancestors are found by two comparisons:

    query i sees key k   if   k <= i < until[k]

          q q q a a w x x y y y b b          Norms, products and MLPs know nothing of it: to them
                                             the packed tree is one long row. Only
        q █                                  attention does, and a block asks a function for that
                                             (model.py). There are two:
        q █ █
        q █ █ █                              FlexAttention on CUDA: that comparison as a mask;
                                             blocks of 128 x 128 that it leaves
        a █ █ █ █                            empty are never computed, found from the ends of
                                             segments alone.
        a █ █ █ █ █
        w █ █ █ █ █ █                        Level by level on a CPU: all questions at once, then
                                             all attempts, then all corrections,
        x █ █ █ █ █ █ █                      padded within a level; a segment's keys are its path's
                                             and its own.
        x █ █ █ █ █ █ █ █
        y █ █ █ █ █ █     █                  Both are exact: log-probabilities and gradients are
                          those of the rows one by one
        y █ █ █ █ █ █     █ █
        y █ █ █ █ █ █     █ █ █
        b █ █ █                 █
        b █ █ █                 █ █

(in bf16 but for rounding: what branches send back to their trunk is summed in bf16, where rows sum
weights' gradients in fp32).

A row's first token is predicted by the last one of the segment above, the others by the one before;
so a segment lacks its row's last token, unless something goes on from it.

Letters: B rows, T tokens of a completion (of a segment, in attention), S tokens packed, N query
heads, K key/value heads, C head size.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mgrpo import completion_logprobs, pad_rows, sent
from model import token_logprobs
from runtime.flags import guarded

BLOCK = 128  # FlexAttention's blocks; on CUDA a pack's length is a multiple of it
# pairs of tokens whose attention is computed together on a CPU: what they need then stays in its
# cache
SCORES = 1 << 18


# ---- from rows to micro-batches ------------------------------------------------------------------


class Leaf(NamedTuple):
    """A sampled row, and where it hangs."""

    layer: Any  # mgrpo.Layer
    row: int  # of it
    # ((key, tokens), ...) of its segments, root first; the last is its own, without the row's last
    # token
    path: tuple


def leaf(layers, depth, row, number=0):
    """Row `row` of layers[depth - 1] -> Leaf. layers: those of one rollout (mgrpo.collect), the
    `number`th of its step.

    Prompts are append-only: what a correction's prompt has beyond the question is its attempt and a
    phrase. So an attempt that is gone on from is longer than it is for itself, and begins alike.
    """
    layer = layers[depth - 1]
    c = layer.completions
    prompt, own = c.prompts[row // c.n], ((number, depth, row), c.sampled[row][:-1])
    if depth == 1:
        return Leaf(layer, row, (((number, 0, row // c.n), prompt), own))
    above = leaf(layers, depth - 1, int(layer.parents[row]), number).path
    start = sum(len(tokens) for _, tokens in above[:-1])
    return Leaf(layer, row, (*above[:-1], (above[-1][0], prompt[start:]), own))


def tree_packs(leaves, most):
    """Leaves -> [[Leaf, ...], ...], each a micro-batch whose packed trees have at most `most`
    tokens, as far as single rows allow.

    Leaves are taken depth first, each for the price of those of its segments that are not there
    yet. A tree that is too large is cut into several, each with the trunk that its rows need.
    """
    found, here, size = [], {}, most
    for one in sorted(leaves, key=lambda leaf: [key for key, _ in leaf.path]):
        price = sum(max(0, len(tokens) - here.get(key, 0)) for key, tokens in one.path)
        if size + price > most:
            found.append([])
            here, size, price = {}, 0, sum(len(tokens) for _, tokens in one.path)
        found[-1].append(one)
        here |= {key: max(len(tokens), here.get(key, 0)) for key, tokens in one.path}
        size += price
    return found


def row_packs(leaves, most):
    """The same as padded rows: longest beside longest, each micro-batch at most `most` tokens with
    its padding."""
    found, length = [], lambda leaf: sum(len(tokens) for _, tokens in leaf.path)
    # the first of a micro-batch is its longest
    for one in sorted(leaves, key=length, reverse=True):
        if not found or length(found[-1][0]) * (len(found[-1]) + 1) > most:
            found.append([])
        found[-1].append(one)
    return found


# ---- from rows to a tree -------------------------------------------------------------------------


@dataclass
class Segment:
    tokens: list
    above: Any  # Segment; None for a root
    start: int = 0  # in the pack
    position: int = 0  # of its first token in its rows
    depth: int = 0


@dataclass
class Forest:
    """Packed trees, and what is to be predicted of B rows: M tokens."""

    tokens: torch.Tensor  # [S]
    positions: torch.Tensor  # [S] in a token's own row
    until: torch.Tensor  # [S] where the part of its tree that sees it ends
    source: torch.Tensor  # [M] where the vector stands that predicts ...
    target: torch.Tensor  # [M] ... this token,
    row: torch.Tensor  # [M] of this row,
    column: torch.Tensor  # [M] the how many-th that was sampled
    chunks: list  # [Chunk], for attention level by level
    size: tuple  # B, T
    needed: int  # how many of the S tokens are not padding


class Chunk(NamedTuple):
    """Some segments of one depth: where their tokens stand in the pack, and those of their paths; S
    is nowhere."""

    own: torch.Tensor  # [n, T] padded behind
    above: torch.Tensor  # [n, P] padded before


def plant(leaves):
    """Leaves, depth first -> {key: Segment}, in the order of the pack."""
    segments, start = {}, 0
    for one in leaves:
        above = None
        for key, tokens in one.path:
            here = segments.setdefault(
                key, Segment(tokens, above, depth=above.depth + 1 if above else 0)
            )
            here.tokens, above = max(here.tokens, tokens, key=len), here
    for segment in segments.values():
        segment.start, start = start, start + len(segment.tokens)
        segment.position = (
            segment.above.position + len(segment.above.tokens) if segment.above else 0
        )
    return segments


def pack(leaves, device="cpu", multiple=1):
    """Leaves, as tree_packs gives them -> Forest, row i being leaf i.

    S is rounded up to one of 8 sizes an octave, since libraries keep a kernel for every shape that
    they have met, and to a `multiple`; what is missing are tokens that see themselves.
    """
    segments = plant(leaves)
    inside, B = list(segments.values()), len(leaves)
    S = sum(len(segment.tokens) for segment in inside)
    spare = -S % max(1 << max(0, S.bit_length() - 4), multiple)
    tokens = [token for segment in inside for token in segment.tokens] + [0] * spare
    positions = [segment.position + i for segment in inside for i in range(len(segment.tokens))] + [
        0
    ] * spare
    until = [end for segment, end in zip(inside, ends(inside, S)) for _ in segment.tokens] + list(
        range(S + 1, S + spare + 1)
    )
    source, target, row, column = [], [], [], []
    for i, one in enumerate(leaves):
        own, sampled = segments[one.path[-1][0]], one.layer.completions.sampled[one.row]
        source += [
            own.above.start + len(own.above.tokens) - 1,
            *range(own.start, own.start + len(sampled) - 1),
        ]
        target += sampled
        row += [i] * len(sampled)
        column += range(len(sampled))
    there = lambda numbers: sent(torch.tensor(numbers), device)
    chunks = chunked(inside, S + spare) if torch.device(device).type == "cpu" else []
    return Forest(
        *map(there, (tokens, positions, until, source, target, row, column)),
        chunks,
        (B, max(column) + 1),
        S,
    )


def ends(inside, S):
    """Where the tree below each segment ends: where the next one begins that is no deeper."""
    found, begins = [], {}
    for segment in reversed(inside):
        found.append(
            min((start for depth, start in begins.items() if depth <= segment.depth), default=S)
        )
        begins[segment.depth] = segment.start
    return found[::-1]


# ---- attention -----------------------------------------------------------------------------------


def by_flex(forest, attention=flex_attention):
    """attend(layer, q, k, v) of model.py on CUDA: FlexAttention. attention: flex_attention,
    compiled or not."""
    mask = block_mask(forest)

    def attend(layer, q, k, v):
        return attention(
            *(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=True
        ).transpose(1, 2)

    return attend


def block_mask(forest):
    """Who sees whom, for FlexAttention: pairs of blocks that see nothing of each other are left
    out, and full ones need no comparison.

    Of two blocks of tokens, one before the other, the later sees something of the earlier if the
    latest `until` there reaches into it, and all of it if the earliest reaches to its end.
    """
    until, device = forest.until, forest.until.device
    blocks = len(until) // BLOCK
    reach, begin = until.view(blocks, BLOCK), torch.arange(blocks, device=device)[:, None] * BLOCK
    before = begin > begin.T
    some, whole = before & (reach.amax(1) > begin), before & (reach.amin(1) >= begin + BLOCK)
    partly = (some & ~whole) | torch.eye(blocks, dtype=torch.bool, device=device)
    order = lambda grid: grid.int().argsort(dim=1, descending=True, stable=True).int()
    listed = lambda grid: (grid.sum(1, dtype=torch.int32)[None, None], order(grid)[None, None])
    return BlockMask.from_kv_blocks(
        *listed(partly),
        *listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda b, h, i, key: (key <= i) & (i < until[key]),
    )


@functools.cache
def compiled_flex():
    """flex_attention as one kernel for packs of any length. fullgraph: an error, where
    torch.compile would else fall back without a word to an attention that holds all S x S
    scores."""
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def chunked(inside, S):
    """Segments -> [Chunk]: those of a depth together, like lengths beside like."""
    found = []
    for depth in range(1 + max(segment.depth for segment in inside)):
        here = sorted(
            (segment for segment in inside if segment.depth == depth and segment.tokens),
            key=lambda segment: segment.position + len(segment.tokens),
        )
        while here:
            count, T, P = 0, 0, 0
            for count, segment in enumerate(here):
                wider = max(T, len(segment.tokens)), max(P, segment.position)
                if count and (count + 1) * wider[0] * sum(wider) > SCORES:
                    break
                (T, P), count = wider, count + 1
            some, here = here[:count], here[count:]
            paths, T, P = [above_of(segment) for segment in some], T + -T % 8, P + -P % 8
            own = [
                [*range(segment.start, segment.start + len(segment.tokens))]
                + [S] * (T - len(segment.tokens))
                for segment in some
            ]
            above = [[S] * (P - len(path)) + path for path in paths]
            found.append(
                Chunk(torch.tensor(own), torch.tensor(above, dtype=torch.long).view(len(some), P))
            )
    return found


def above_of(segment):
    """Where the tokens stand that a segment goes on from, as a list."""
    up = segment.above
    return [*above_of(up), *range(up.start, up.start + len(up.tokens))] if up else []


def by_levels(forest):
    """attend(layer, q, k, v) of model.py on a CPU, chunk by chunk: the queries of n segments meet
    the keys of their paths and their own."""
    S, biases = len(forest.tokens), []
    own = torch.cat([chunk.own.flatten() for chunk in forest.chunks])
    # of each token among all own ones
    place = torch.zeros(S + 1, dtype=torch.long).index_copy_(0, own, torch.arange(len(own)))[:S]

    def attend(layer, q, k, v):
        N, C, K = *q.shape[2:], k.shape[2]
        n, found = N // K, []
        if not biases:
            biases.extend(hidden(chunk, S, n) for chunk in forest.chunks)  # the same for all layers
        nowhere = lambda x: F.pad(x, (0, 0, 0, 1))  # row S, of zeros
        q, kv = (
            nowhere(q.reshape(S, N * C)),
            nowhere(torch.cat([k.reshape(S, K * C), v.reshape(S, K * C)], 1)),
        )
        for chunk, bias in zip(forest.chunks, biases):
            B, T = chunk.own.shape
            queries = (
                F.embedding(chunk.own, q)
                .view(B, T, K, n, C)
                .transpose(1, 2)
                .reshape(B, K, T * n, C)
            )
            keys, values = (
                F.embedding(torch.cat([chunk.above, chunk.own], 1), kv)
                .view(B, -1, 2, K, C)
                .transpose(1, 3)
                .unbind(2)
            )
            # softmax in fp32
            weights = torch.add(bias, queries @ keys.mT, alpha=C**-0.5).softmax(-1).to(q.dtype)
            found.append(
                (weights @ values).view(B, K, T, n, C).transpose(1, 2).reshape(B * T, N * C)
            )
        return F.embedding(place, torch.cat(found)).view(1, S, N, C)

    return attend


def hidden(chunk, S, n):
    """[segments, 1, T n, P + T]: 0 where a query sees a key, else -inf."""
    T, P = chunk.own.shape[1], chunk.above.shape[1]
    nowhere = (
        torch.zeros(chunk.above.shape)
        .masked_fill_(chunk.above == S, -math.inf)[:, None]
        .expand(-1, T, P)
    )
    later = torch.full((T, T), -math.inf).triu(1).expand(len(nowhere), T, T)
    return torch.cat([nowhere, later], 2).repeat_interleave(n, 1)[:, None]


# ---- log-probabilities ---------------------------------------------------------------------------


def batch_of(leaves, kind, device):
    """A micro-batch as train.py's --pack says: "tree" -> Forest, "rows" -> mgrpo.Rows."""
    if kind == "tree":
        return pack(leaves, device, BLOCK if torch.device(device).type == "cuda" else 1)
    c = [one.layer.completions for one in leaves]
    return pad_rows(
        [c.prompts[one.row // c.n] for c, one in zip(c, leaves)],
        [c.sampled[one.row] for c, one in zip(c, leaves)],
        device,
    )


def by_layer(leaves, device):
    """-> [(layer, where in the micro-batch its rows are, on the device, and their numbers in the
    layer), ...]"""
    found = {}
    for place, one in enumerate(leaves):
        found.setdefault(id(one.layer), (one.layer, [], []))
        found[id(one.layer)][1].append(place)
        found[id(one.layer)][2].append(one.row)
    return [
        (layer, sent(torch.tensor(places), device), torch.tensor(rows))
        for layer, places, rows in found.values()
    ]


def logprobs(model, batch, temperature=1.0):
    """log π of the sampled tokens of B rows under `model`, and its entropy there -> two fp32 [B,
    T], zeros behind each row's end."""
    if not isinstance(batch, Forest):
        return completion_logprobs(model, batch, temperature)
    attend = by_flex(batch, compiled_flex()) if batch.tokens.is_cuda else by_levels(batch)
    vectors = model(batch.tokens[None], batch.positions[None], attend)[0, batch.source]
    logp, entropy = token_logprobs(vectors, model.head.weight, batch.target, temperature)
    blank = torch.zeros(batch.size, device=logp.device)
    return blank.index_put((batch.row, batch.column), logp), blank.index_put(
        (batch.row, batch.column), entropy
    )


def main():
    """The tree of this file's opening, packed, and who sees whom."""
    texts, paths = dict(q="qqq", a="aaw", x="xx", y="yyy", b="bb"), ("qb", "qax", "qay")
    segments = plant(
        [Leaf(None, 0, tuple((key, list(texts[key])) for key in path)) for path in sorted(paths)]
    )
    inside = list(segments.values())
    tokens = [token for segment in inside for token in segment.tokens]
    until = [end for segment, end in zip(inside, ends(inside, len(tokens))) for _ in segment.tokens]
    print("packed   ", *(f"{token:>2}" for token in tokens))
    print(
        "position ",
        *(f"{segment.position + i:2}" for segment in inside for i in range(len(segment.tokens))),
    )
    print("until    ", *(f"{end:2}" for end in until))
    for i, token in enumerate(tokens):
        print(f"{token:>8} ", *(" █" if key <= i < until[key] else "  " for key in range(i + 1)))


if __name__ == "__main__":
    guarded(main)
