"""The packed tree: a training pass that computes every token of a rollout once.

    python -m engine.packing               # a small tree, packed, and which token sees which
    python -m tools.bench_training         # what packing is worth, beside padded rows

The idea. As padded rows, a rollout carries its question in every row and an answer in the rows of
all its corrections. As a tree each segment stands once, in depth-first order, one tree behind the
other:

    question ─┬─ answer, phrase ─┬─ correction     packed         q q q a a w x x y y y b b
              │                  └─ correction     position       0 1 2 3 4 5 6 7 6 7 8 3 4
              └─ answer                            visible_until  13. . 11. . 8 . 11. . 13.

`visible_until` is where the tree below a token's segment ends. In this order a token's ancestors
are found by two comparisons:    query i sees key k   if   k <= i < visible_until[k]

Only attention knows about the tree; for norms, products and MLPs the pack is one long row. CUDA
takes that comparison as a FlexAttention mask, and skips blocks of 128 x 128 without a pair. A CPU
computes level by level. Both are exact: log-probabilities and gradients are those of single rows.

A row's first token is predicted by the last token of the segment above, the others by the token
before. So a segment lacks its row's last token, unless another segment continues it.

Letters: B rows, T tokens of a completion (of a segment, in attention), S tokens packed, N query
heads, K key/value heads, C head size.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from engine import threads
from engine.shapes import rounded
from model import attention_scores, token_logprobs

BLOCK = 128  # FlexAttention's blocks; on CUDA the length of a pack is a multiple of it
# Pairs of tokens whose attention is computed together on a CPU: more would not fit its cache.
SCORES = 1 << 18


def to_device(x, device):
    """Copies a host tensor to the device. The host does not wait for the copy."""
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


# ---- from rows to micro-batches ------------------------------------------------------------------


class Branch(NamedTuple):
    """A sampled row, and the segments from the root of its tree down to it."""

    layer: Any  # mgrpo.Layer; None: a text that a base model learns
    row: int  # of the layer
    path: tuple  # ((key, tokens), ...), root first; the last is its own, without the last token
    sampled: list  # its tokens, end token included


def branch_of(layers, number, row):
    """Row `row` of layers[number - 1] -> Branch. layers: those of one rollout.

    Prompts are append-only: what the prompt of a correction has beyond the question is the answer
    and a phrase. So an answer that is continued is a longer segment, with the same beginning.
    """
    layer = layers[number - 1]
    completions = layer.completions
    prompt = completions.prompts[row // completions.n]
    # Off by one: of the completion c d END only c and d go through the model, as END predicts
    # nothing.
    sampled = completions.sampled[row]
    # Given text is no beginning of what its corrections continue: it has a segment of its own.
    given = layer.given is not None and layer.given[row]
    own = ((number, ~row if given else row), sampled[:-1])
    if number == 1:
        return Branch(layer, row, (((0, row // completions.n), prompt), own), sampled)
    # The segments above the parent stay as they are. The parent's own segment becomes all that this
    # prompt has beyond them: the whole answer and the phrase.
    parent = int(layer.parents[row])
    above, key = branch_of(layers, number - 1, parent).path[:-1], (number - 1, parent)
    start = sum(len(tokens) for _, tokens in above)
    return Branch(layer, row, (*above, (key, prompt[start:]), own), sampled)


def microbatches(branches, limit):
    """Branches -> lists of branches whose packed trees have at most `limit` tokens each.

    A single row may be longer than the limit. Branches are taken depth first, each for the price of
    those of its segments that are not in the micro-batch yet. A tree that is too large is cut into
    several, each with the trunk that its rows need.
    """
    # lengths: tokens of each segment in the micro-batch under way. `size` begins at the limit, so
    # the first branch opens the first micro-batch.
    batches, lengths, size = [], {}, limit
    # Sorted by path, branches with a common trunk are neighbours. In the order of rows each
    # micro-batch would compute the trunks of many trees again.
    for branch in sorted(branches, key=lambda branch: [key for key, _ in branch.path]):
        # An answer that a correction continues is the longer segment under the same key: only the
        # difference is paid for.
        price = sum(max(0, len(tokens) - lengths.get(key, 0)) for key, tokens in branch.path)
        if size + price > limit:
            batches.append([])
            lengths, size = {}, 0
            price = sum(len(tokens) for _, tokens in branch.path)
        batches[-1].append(branch)
        lengths |= {key: max(len(tokens), lengths.get(key, 0)) for key, tokens in branch.path}
        size += price
    return batches


def whole_trees(branches, count):
    """Branches -> at most `count` lists of about equally many tokens; a tree stays in one of them.

    The largest tree first, each into the list that has least so far.
    """
    if count == 1:
        return [branches]
    trees, parts = {}, [[0, []] for _ in range(count)]
    for branch in branches:
        trees.setdefault(branch.path[0][0], []).append(branch)
    cost = {root: sum(len(branch.sampled) for branch in tree) for root, tree in trees.items()}
    for root in sorted(trees, key=cost.get, reverse=True):
        part = min(parts, key=lambda part: part[0])
        part[0] += cost[root]
        part[1] += trees[root]
    return [part for _, part in parts if part] or [[]]


# ---- from branches to a pack ---------------------------------------------------------------------


@dataclass
class Segment:
    tokens: list
    above: Any  # Segment; None for a root
    start: int = 0  # in the pack
    position: int = 0  # of its first token in its rows
    depth: int = 0


@dataclass
class PackedTrees:
    """Packed trees of a micro-batch, and the M tokens of its B rows that are predicted there.

    Behind these M, `source` and `target` are padded.
    """

    tokens: torch.Tensor  # [S]
    positions: torch.Tensor  # [S] of a token in its own row
    visible_until: torch.Tensor  # [S] where the part of its tree that sees it ends
    source: torch.Tensor  # [M] place of the vector that predicts ...
    target: torch.Tensor  # [M] ... this token,
    row: torch.Tensor  # [M] of this row,
    column: torch.Tensor  # [M] as its sampled token number 0, 1, ...
    chunks: list  # of Chunk, for attention level by level on a CPU
    size: tuple  # B, T
    real_tokens: int  # how many of the S tokens are not padding
    layers: list  # (Layer, [its places among the B rows], [row numbers in the Layer]) of each layer


class Chunk(NamedTuple):
    """Some segments of one depth: places of their tokens and of their paths. S means padding."""

    own: torch.Tensor  # [n, T] padded behind
    above: torch.Tensor  # [n, P] padded before


def place_segments(branches):
    """Branches, depth first -> {key: Segment}, in the order of the pack."""
    segments, start = {}, 0
    # Branches come depth first, so the order in which segments are met is the order of the pack.
    for branch in branches:
        above = None
        for key, tokens in branch.path:
            depth = above.depth + 1 if above else 0
            segment = segments.setdefault(key, Segment(tokens, above, depth=depth))
            segment.tokens = max(segment.tokens, tokens, key=len)  # as long as it is continued
            above = segment
    # All lengths are known now. A segment starts behind the one before it in the pack; its
    # positions go on from the segment above, wherever that lies.
    for segment in segments.values():
        segment.start, start = start, start + len(segment.tokens)
        if segment.above:
            segment.position = segment.above.position + len(segment.above.tokens)
    return segments


def pack_trees(branches, device="cpu"):
    """Branches, as `microbatches` orders them -> PackedTrees; row i is branch i.

    S and M are rounded up (engine/shapes.py), S on CUDA to a multiple of BLOCK too. Padding tokens
    see themselves alone, and what they predict is dropped.
    Without branches: a pack of one token that predicts one, for a rank with nothing to do.
    """
    branches = branches or [NO_BRANCH]
    on_cuda = torch.device(device).type == "cuda"
    by_key = place_segments(branches)
    segments = list(by_key.values())
    S = sum(len(segment.tokens) for segment in segments)
    padding = rounded(S, 8) - S
    padding += -(S + padding) % (BLOCK if on_cuda else 1)

    # One entry for each token of the pack, segment by segment.
    tokens, positions, visible_until = [], [], []
    for segment, end in zip(segments, subtree_ends(segments, S)):
        tokens += segment.tokens
        positions += range(segment.position, segment.position + len(segment.tokens))
        visible_until += [end] * len(segment.tokens)
    tokens += [0] * padding
    positions += [0] * padding
    # Padding token i is visible until i + 1, to itself alone: no query is without a key.
    visible_until += range(S + 1, S + padding + 1)

    # Off by one. With prompt a b and completion c d, the segments are [a b] and [c], and
    # b (the last token above) predicts c, c predicts d: sources 1 2, targets c d.
    source, target, row, column = [], [], [], []
    for i, branch in enumerate(branches):
        own = by_key[branch.path[-1][0]]
        source += [own.above.start + len(own.above.tokens) - 1]
        source += range(own.start, own.start + len(branch.sampled) - 1)
        target += branch.sampled
        row += [i] * len(branch.sampled)
        column += range(len(branch.sampled))
    spare = [0] * (rounded(len(source), 8) - len(source))  # without a row and column

    # By way of numpy: torch reads a list five times as slowly, and no other thread runs meanwhile.
    index = lambda numbers: to_device(torch.from_numpy(np.array(numbers)), device)
    return PackedTrees(
        *map(index, (tokens, positions, visible_until, source + spare, target + spare)),
        *map(index, (row, column)),
        chunks=[] if on_cuda else same_depth_chunks(segments, S + padding),
        size=(len(branches), max(column) + 1),
        real_tokens=S,
        layers=rows_by_layer(branches, device),
    )


# The prompt [0], and the completion [0], which the prompt's only vector predicts. A last token has
# no vector, so the completion's segment is empty.
NO_BRANCH = Branch(None, 0, (((0, 0), [0]), ((1, 0), [])), [0])


def subtree_ends(segments, S):
    """Where the tree below each segment ends: where the next segment begins that is no deeper."""
    ends, next_start = [], {}  # depth -> start of the next segment at that depth
    # From the back, next_start has the nearest later segment of every depth. In the tree of this
    # file's docstring: b ends with the pack (13), y where b starts (11), x where y starts (8).
    for segment in reversed(segments):
        later = (start for depth, start in next_start.items() if depth <= segment.depth)
        ends.append(min(later, default=S))
        next_start[segment.depth] = segment.start
    return ends[::-1]


def rows_by_layer(branches, device):
    """-> [(layer, places of its rows in the micro-batch, on the device, row numbers), ...]"""
    layers = {}
    for place, branch in enumerate(branches):
        if branch.layer is None:
            continue
        _, places, rows = layers.setdefault(branch.layer.number, (branch.layer, [], []))
        places.append(place)
        rows.append(branch.row)
    return [
        (layer, to_device(torch.tensor(places), device), torch.tensor(rows))
        for layer, places, rows in layers.values()
    ]


# ---- attention -----------------------------------------------------------------------------------


def flex_attention_for(pack, attention=flex_attention):
    """attend(block, q, k, v) of model.py on CUDA. attention: flex_attention, compiled or not."""
    mask = block_mask(pack)

    def attend(block, q, k, v):
        """q: [1, S, N, C]; k, v: [1, S, K, C] -> [1, S, N, C]."""
        # FlexAttention takes heads before tokens.
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attention(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return attend


def block_mask(pack):
    """The mask of a pack for FlexAttention.

    Pairs of blocks without a visible pair are left out; full ones need no comparison. Of two
    blocks, one before the other, the later sees something of the earlier if the largest
    visible_until there reaches into it, and all of it if the smallest reaches to its end.
    """
    until, device = pack.visible_until, pack.visible_until.device
    blocks = len(until) // BLOCK
    # Rows of the grids below are blocks of queries, columns blocks of keys. A block's largest and
    # smallest visible_until decide for its 128 x 128 pairs at once.
    reach = until.view(blocks, BLOCK)
    begin = torch.arange(blocks, device=device)[:, None] * BLOCK
    before = begin > begin.T
    some, full = before & (reach.amax(1) > begin), before & (reach.amin(1) >= begin + BLOCK)
    # Inside a block on the diagonal `key <= i` always cuts, so it is compared pair by pair.
    partial = (some & ~full) | torch.eye(blocks, dtype=torch.bool, device=device)
    # BlockMask takes, for each block of queries, how many blocks of keys it meets and their
    # numbers, listed first. A stable sort of ones before zeros lists them in ascending order.
    order = lambda grid: grid.int().argsort(dim=1, descending=True, stable=True).int()
    listed = lambda grid: (grid.sum(1, dtype=torch.int32)[None, None], order(grid)[None, None])
    return BlockMask.from_kv_blocks(
        *listed(partial),
        *listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda b, h, i, key: (key <= i) & (i < until[key]),
    )


@functools.cache
def compiled_flex():
    """flex_attention as one kernel for packs of any length.

    fullgraph turns a silent fallback into an error: the fallback holds all S x S scores.
    """
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def same_depth_chunks(segments, S):
    """Segments -> [Chunk]: those of one depth together, segments of like length in one chunk."""
    chunks = []
    for depth in range(1 + max(segment.depth for segment in segments)):
        waiting = sorted(
            (segment for segment in segments if segment.depth == depth and segment.tokens),
            key=lambda segment: segment.position + len(segment.tokens),
        )
        # Takes segments from the front as long as their scores stay below SCORES. They are sorted
        # by where they end, so a chunk has little padding. A segment that is too large goes alone.
        while waiting:
            count, T, P = 0, 0, 0
            for count, segment in enumerate(waiting):
                wider = max(T, len(segment.tokens)), max(P, segment.position)
                # count + 1 segments, each with T queries and P + T keys.
                if count and (count + 1) * wider[0] * sum(wider) > SCORES:
                    break
                (T, P), count = wider, count + 1
            chosen, waiting = waiting[:count], waiting[count:]
            T += -T % 16
            P += -(P + T) % 32  # torch's softmax in bf16 likes multiples of 32
            # Padding points at place S, a row of zeros. Behind a segment's own tokens the causal
            # triangle masks it. Paths are padded before, so that own keys begin at column P in
            # every row.
            own, above = (np.full((rounded(len(chosen)), width), S) for width in (T, P))
            for segment, own_row, above_row in zip(chosen, own, above):
                own_row[: len(segment.tokens)] = places_of(segment)
                above_row[P - segment.position :] = path_places(segment)
            chunks.append(Chunk(torch.from_numpy(own), torch.from_numpy(above)))
    return chunks


def places_of(segment):
    return [*range(segment.start, segment.start + len(segment.tokens))]


def path_places(segment):
    """Places of the tokens that a segment continues, as a list."""
    above = segment.above
    return [*path_places(above), *places_of(above)] if above else []


def level_attention_for(pack):
    """attend(block, q, k, v) of model.py on a CPU, chunk by chunk.

    The queries of n segments meet the keys of their paths and their own keys.
    """
    S, biases = len(pack.tokens), []
    # [segments x T of all chunks], place S where it is padding: entry S of the next line takes
    # that, and is cut off.
    own = torch.cat([chunk.own.flatten() for chunk in pack.chunks])
    seen = [torch.cat([chunk.above, chunk.own], 1).flatten() for chunk in pack.chunks]
    sizes, seen = list(map(len, seen)), torch.cat(seen)
    # [S] of each token: its number among all tokens of the chunks
    place = torch.zeros(S + 1, dtype=torch.long).index_copy_(0, own, torch.arange(len(own)))[:S]

    def attend(block, q, k, v):
        """q: [1, S, N, C]; k, v: [1, S, K, C] -> [1, S, N, C]."""
        N, C, K = *q.shape[2:], k.shape[2]
        n, outputs = N // K, []
        if not biases:  # the same for all blocks
            biases.extend(attention_bias(chunk, S, n, K, q.dtype) for chunk in pack.chunks)
        with_padding = lambda x: F.pad(x, (0, 0, 0, 1))  # row S: zeros
        q = with_padding(q.reshape(S, N * C))
        # [S + 1, 2 K C]: keys and values side by side, so that one gather fetches both.
        kv = with_padding(torch.cat([k.reshape(S, K * C), v.reshape(S, K * C)], 1))
        q = F.embedding(own, q).split([chunk.own.numel() for chunk in pack.chunks])
        kv = F.embedding(seen, kv).split(sizes)
        for chunk, bias, queries, pairs in zip(pack.chunks, biases, q, kv):
            B, T = chunk.own.shape
            # [B K, T n, C]: the n query heads of a key/value head form one tall matrix.
            queries = queries.view(B, T, K, n, C).transpose(1, 2).reshape(B * K, T * n, C)
            # The keys of the path, then the segment's own: [B K, P + T, C].
            pairs = pairs.view(B, -1, 2, K, C).transpose(1, 3)
            keys, values = (x.reshape(B * K, -1, C) for x in pairs.unbind(2))
            out = attention_scores(queries, keys, bias).softmax(-1) @ values
            out = out.view(B, K, T, n, C)
            outputs.append(out.transpose(1, 2).reshape(B * T, N * C))
        # From the order of the chunks back to that of the pack. Tokens that pad the pack are in no
        # chunk: they take output 0, and nothing reads it.
        return F.embedding(place, torch.cat(outputs)).view(1, S, N, C)

    return attend


def attention_bias(chunk, S, n, K, dtype):
    """[segments K, T n, P + T]: 0 where a query sees a key, else -inf."""
    T, P = chunk.own.shape[1], chunk.above.shape[1]
    # [segments, P] for the path, [segments, T, T] for the own tokens, side by side.
    padding = torch.zeros(chunk.above.shape, dtype=dtype).masked_fill_(chunk.above == S, -math.inf)
    later = torch.full((T, T), -math.inf, dtype=dtype).triu(1).expand(len(padding), T, T)
    bias = torch.cat([padding[:, None].expand(-1, T, P), later], 2)
    # Query t n + j is token t with head j, so each line stands n times.
    return bias.repeat_interleave(n, 1)[:, None].expand(-1, K, -1, -1).flatten(0, 1)


# ---- log-probabilities ---------------------------------------------------------------------------


def tree_logprobs(model, pack, temperature=1.0):
    """log π of the sampled tokens of a pack under `model`, and the entropy there.

    -> two fp32 [B, T], zeros behind each row's end.
    """
    columns = tree_columns(model, pack, temperature, ("logp", "entropy"))
    return columns["logp"], columns["entropy"]


def tree_columns(model, pack, temperature, kinds):
    """-> {kind: column} of the sampled tokens: "logp" and "entropy" [B, T], as tree_logprobs, and
    "hidden" [B, T, D], the vectors that predict them."""
    on_cuda = pack.tokens.is_cuda
    attend = flex_attention_for(pack, compiled_flex()) if on_cuda else level_attention_for(pack)
    # Of the S vectors only the M that predict a sampled token meet the vocabulary.
    hidden = model(pack.tokens[None], pack.positions[None], attend)[0, pack.source]  # [M, D]
    logp, entropy = token_logprobs(hidden, model.head.weight, pack.target, temperature)
    # From [M] to the padded [B, T] of the loss.
    M, places = len(pack.row), (pack.row, pack.column)
    padded = lambda x: x.new_zeros(*pack.size, *x.shape[1:]).index_put(places, x[:M])
    columns = dict(logp=logp, entropy=entropy, hidden=hidden)
    return {kind: padded(columns[kind]) for kind in kinds}


def backward(model, branches, loss_of, pack=pack_trees):
    """Adds the gradient of a loss over these branches to that of the model.

    loss_of: a function of PackedTrees, or what else `pack` makes of branches -> loss, anything
    else. -> [that], for each part of the branches; a part is computed on its own thread
    (engine/threads.py). Losses of parts are summed.
    """
    parts, parameters = whole_trees(branches, threads.count), list(model.parameters())
    if len(parts) == 1:
        loss, beside = loss_of(pack(parts[0], model.cos.device))
        loss.backward()
        return [beside]

    def gradient(part):
        # Not loss.backward(): threads would add to the same tensors, in any order.
        loss, beside = loss_of(pack(part, model.cos.device))
        return torch.autograd.grad(loss, parameters), beside

    gradients, besides = zip(*threads.run(gradient, parts))
    for parameter, *found in zip(parameters, *gradients):
        parameter.grad = sum(found) if parameter.grad is None else sum(found, parameter.grad)
    return list(besides)


# Padded rows: what the tests and the bench hold the packed trees against.


class PaddedBatch(NamedTuple):
    """Prompts and completions, padded on the right."""

    tokens: torch.Tensor  # [B, S] prompt + completion, zeros behind
    prompt_lengths: torch.Tensor  # [B]
    lengths: torch.Tensor  # [B] completion tokens, end token included
    mask: torch.Tensor  # [B, T] bool, True on completion tokens
    real_tokens: int  # how many of the B x S tokens are not padding


def pad_rows(prompts, completions, device):
    """Two lists of token-id lists -> PaddedBatch.

    S is rounded up to one of 8 sizes an octave, as in `pack_trees`.
    """
    lengths = torch.tensor([len(completion) for completion in completions], device=device)
    rows = [prompt + completion for prompt, completion in zip(prompts, completions)]
    S = max(map(len, rows))
    S += -S % (1 << max(0, S.bit_length() - 4))
    return PaddedBatch(
        tokens=torch.tensor([row + [0] * (S - len(row)) for row in rows], device=device),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts], device=device),
        lengths=lengths,
        mask=torch.arange(int(lengths.max()), device=device) < lengths[:, None],
        real_tokens=sum(map(len, rows)),
    )


def padded_logprobs(model, batch, temperature=1.0):
    """log π of the completion tokens under `model`, and the entropy there.

    -> two fp32 [B, T], zeros behind each row's end. Off by one: with a prompt of 2 tokens,
    a b | c d, the vectors at b (column 1) and c (column 2) predict c and d: columns
    prompt_length - 1 onwards. Only they meet the vocabulary.
    """
    row, t = batch.mask.nonzero(as_tuple=True)  # the M completion tokens
    column = batch.prompt_lengths[row] + t  # where each stands
    tokens = batch.tokens[:, :-1][:, : model.config.context]  # padding may reach beyond the context
    hidden = model(tokens)[row, column - 1]  # [M, D]
    target = batch.tokens[row, column]
    logp, entropy = token_logprobs(hidden, model.head.weight, target, temperature)
    zeros = torch.zeros(batch.mask.shape, device=logp.device)
    return zeros.index_put((row, t), logp), zeros.index_put((row, t), entropy)


def main():
    """Prints the tree of this file's docstring, packed, and which token sees which."""
    texts = dict(q="qqq", a="aaw", x="xx", y="yyy", b="bb")
    paths = [tuple((key, list(texts[key])) for key in path) for path in ("qax", "qay", "qb")]
    segments = list(place_segments([Branch(None, 0, path, []) for path in paths]).values())
    tokens = [token for segment in segments for token in segment.tokens]
    ends = subtree_ends(segments, len(tokens))
    until = [end for segment, end in zip(segments, ends) for _ in segment.tokens]
    positions = [segment.position + i for segment in segments for i in range(len(segment.tokens))]
    print("packed        ", *(f"{token:>2}" for token in tokens))
    print("position      ", *(f"{position:2}" for position in positions))
    print("visible_until ", *(f"{end:2}" for end in until))
    for i, token in enumerate(tokens):
        print(f"{token:>13} ", *(" █" if key <= i < until[key] else "  " for key in range(i + 1)))


if __name__ == "__main__":
    main()
