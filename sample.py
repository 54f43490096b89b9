"""The sampler: n completions of each prompt, and n continuations of each of those, over one KV
cache that grows as a tree.

    python -m tools.bench_sampler                  # tokens per second, from a naive sampler to this
                                                   # one, and the share of the floor
    pytest tests/test_sample.py

The physics. Prefill runs all tokens of a prompt through the model at once: every weight that is
read serves many tokens, and arithmetic is the limit. Decode adds one token to each row: a step
reads every weight for two operations per row, and every visible key and value for a few, so memory
is the limit. (On CUDA a prefix that rows share is read once for all of them.) A model of four
blocks has 0.8 M parameters: 1.6 MB in bf16, and 512 bytes of KV cache a token (4 blocks x key and
value x 32 numbers). A step of 256 rows of 100 tokens, none shared, reads 1.6 MB of weights and 13
MB of cache for 0.4 GFLOP. These are 28 operations a byte, and a GPU can do hundreds. A prefill of
64 prompts of 32 tokens does 3.3 GFLOP on 1.6 MB of weights: 2,000 operations a byte.

The design follows from that.
1. Prefixes are computed once. `generate` prefills each prompt once and decodes n rows from it.
   `extend` continues rows one layer down: it copies their cache, and prefills only the phrase
   behind them.
2. A decode step (`decode_step`) is the same few lines on a CPU and on CUDA. Between its matrix
   products stand fused kernels or their torch references (engine/kernels.py). CUDA replays the step
   as a graph (engine/cuda_graphs.py).
3. Finished rows leave the batch. Rows without cache space wait for it (engine/in_flight.py).

One Sampler runs in one process. engine/workers.py runs one on each core of a CPU.

The random numbers of a row depend on (seed, layer, the row's number, token position) alone, not on
the batch, the process or the device (engine/keys.py). Logits do depend on the batch, in their last
bits: a matrix product of another shape sums in another order. So a token may differ where two are
nearly level, once in many thousands in fp32.

Letters: P prompts, n completions of a prompt, B rows, R rows in flight, T tokens, V vocabulary, D
width, N query heads, C head size.
"""

import copy
import functools
import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine import kernels
from engine.cache import GROWTH, MAX_SCORES, CachedTree, CpuCache, PrefillAttention, SlotPool
from engine.cuda_cache import CudaCache, measured_limit
from engine.cuda_graphs import StepGraphs
from engine.in_flight import InFlight, Request, RowState
from engine.keys import hash_seed, position_keys, row_keys
from model import logits_of


@dataclass
class Completions:
    """B sampled rows, those of one prompt side by side: row i continues prompts[i // n]."""

    prompts: list  # [P] lists of token ids
    n: int
    layer: int  # 1: of prompts, 2: of completions of prompts, ...
    tokens: torch.Tensor  # [B, T], the end token included, zeros behind it
    logprobs: torch.Tensor  # [B, T] fp32 at the sampling temperature (at 1 for greedy)
    lengths: torch.Tensor  # [B]
    ended: torch.Tensor  # [B] bool; False: truncated at max_new_tokens
    parents: torch.Tensor  # [B] the prompt in `generate`, the extended row in `extend`
    numbers: torch.Tensor  # [B] the rows' own numbers, which seed their noise
    cache: object = field(default=None, repr=False)  # what `extend` continues; None: nothing

    def __len__(self):
        return len(self.lengths)

    @functools.cached_property
    def sampled(self):
        """The tokens of each row as lists, end token included: one copy from the device for all."""
        return [row[:length] for row, length in zip(self.tokens.tolist(), self.lengths.tolist())]

    @functools.cached_property
    def ids(self):
        """The same without end tokens."""
        return [ids[:-1] if ended else ids for ids, ended in zip(self.sampled, self.ended.tolist())]


# ---- the sampler ---------------------------------------------------------------------------------


class Sampler:
    """Samples from a model with its own copy of the weights in the compute type. Call refresh()
    after every optimiser step.

    cache_tokens: tokens whose keys and values may exist at a time (0: no limit on a CPU; on CUDA
    half of the memory that is free after a warm-up). reserved: bytes of CUDA memory that others
    will need, which do not count as free.
    For measuring what each is worth: fused, graph: use the kernels, replay CUDA graphs (None: where
    there is CUDA); leave: finished rows leave the batch; share: a prompt is prefilled once, not
    once per row.

    `seen`, if set, is called after every step with the rows in flight (in_flight.RowState) and the
    number of rows that now leave: for progress bars, and for streaming a dialogue.
    """

    def __init__(
        self, model, *, cache_tokens=0, fused=None, graph=None, leave=True, share=True, reserved=0
    ):
        self.source, self.model = model, narrow_copy(model)
        self.device = self.model.embed.weight.device
        self.fused = self.device.type == "cuda" if fused is None else fused
        self.graph = self.fused and self.device.type == "cuda" if graph is None else graph
        if self.graph and not self.fused:
            raise ValueError(
                "graph needs fused: without the kernels a step depends on shapes that only the "
                "host knows"
            )
        self.leave, self.share, self.reserved, self.seen = leave, share, reserved, None
        c = model.config
        self.pool = SlotPool(
            c, model.compute, self.device, shared=self.fused, limit=cache_tokens or None
        )
        self.cuda_cache = self.graphs = None  # made by the first call, reused by the next ones
        # In the compute type: the rotations [context, C], and the weights of q's and k's norms,
        # head by head [N + K, C] (None: the model has none).
        self.cos, self.sin = (x.to(model.compute) for x in (self.model.cos, self.model.sin))
        self.norms = [
            self.cos.new_empty(c.heads + c.kv_heads, c.head_size) if c.qk_norm else None
            for _ in self.model.blocks
        ]
        self.refresh()

    @torch.no_grad()
    def refresh(self, weights=None):
        """Copies the weights in the compute type, so that decoding never casts them. The cache of
        the old weights becomes invalid.

        weights: full tensors in the order of the model's parameters (None: the model's own).
        """
        weights = self.source.parameters() if weights is None else weights
        for own, master in zip(self.model.parameters(), weights, strict=True):
            own.copy_(master)
        for block, norms in zip(self.model.blocks, self.norms):
            if norms is not None:
                heads = self.model.config.heads
                norms[:heads], norms[heads:] = block.q_norm.weight, block.k_norm.weight
        self.pool.forget()

    def generate(self, prompts, n, max_new_tokens, temperature=1.0, seed=0, first_row=0, **filters):
        """Samples n completions of each prompt -> Completions.

        prompts: lists of token ids, of any lengths. max_new_tokens: one limit, or a list of one for
        each row. temperature: 0 is greedy. first_row: row i has number first_row + i; equal seeds
        and numbers draw equal tokens. filters: top_k, top_p, min_p, for evaluation (see
        `filtered`). Raises ValueError for no prompts, an empty prompt, a token outside of the
        vocabulary, a prompt too long for the context or the cache; MemoryError when CUDA has too
        little memory.
        """
        if not self.share:
            prompts, n = [prompt for prompt in prompts for _ in range(n)], 1
        limits = self.checked_limits(prompts, prompts, n, max_new_tokens, temperature, filters)
        rows = torch.arange(len(prompts) * n, device=self.device)
        keys = row_keys(hash_seed(seed, 1), first_row + rows)  # [B]
        sampled = self._sample(prompts, prompts, None, n, limits, keys, temperature, filters)
        return self._completions(prompts, n, 1, rows // n, first_row + rows, *sampled)

    def extend(
        self, completions, phrases, n, max_new_tokens, temperature=1.0, seed=0, rows=None, **filters
    ):
        """Samples n continuations of prompt + completion without its end token + phrase ->
        Completions, one layer down.

        phrases: token ids, one list per row. rows: the rows of `completions` that go on (ascending;
        None: all), in step with `phrases`. The rest as in `generate`.
        Only the phrase is prefilled, after the last token of a truncated completion, whose keys are
        not cached. The whole prompt is prefilled when the cache is gone: after refresh(), after
        another generate() on CUDA, or when it did not fit.
        """
        c = completions
        rows, prompts, new_tokens = self.continued(c, phrases, rows)
        limits = self.checked_limits(prompts, new_tokens, n, max_new_tokens, temperature, filters)
        parents = rows.repeat_interleave(n)  # [B]
        numbers = c.numbers[parents] * n + torch.arange(n, device=self.device).repeat(len(rows))
        keys = row_keys(hash_seed(seed, c.layer + 1), numbers)
        sampled = self._sample(
            prompts, new_tokens, (c.cache, rows), n, limits, keys, temperature, filters
        )
        return self._completions(prompts, n, c.layer + 1, parents, numbers, *sampled)

    # ---- prefill, decode -------------------------------------------------------------------------

    def _sample(self, prompts, new_tokens, above, n, limits, keys, temperature, filters):
        """Prefills, then decodes -> tokens, logprobs [B, most + 1], lengths [B], CachedTree or
        None. most: the longest limit; the last column is for rows that have ended.

        new_tokens: what is not cached of each prompt. above: None, or (cache, rows [P]).
        """
        P, longest, most = len(prompts), max(map(len, prompts)), max(limits)
        if self.pool.limit is None and self.device.type == "cuda":
            self.pool.limit = measured_limit(self.model, prompts[0], self.reserved)
        limits = torch.tensor(limits, device=self.device)  # [B]
        if above and self.pool.holds(above[0]) and self.pool.fits(P, longest, n, most):
            parts = [(0, P)]
        else:
            new_tokens, above = prompts, None
            # All prompts together, unless the cache has no room for their rows.
            parts = self.pool.turns(P, longest, n, most)
        filters = filters if filtering(**filters) else {}
        results = []
        with torch.inference_mode():
            for first, last in parts:
                part, rows = slice(first, last), slice(first * n, last * n)
                request = self.prefill(
                    prompts[part], new_tokens[part], above, n, limits[rows], keys[rows]
                )
                flight = self.decode(request, most, temperature, filters)
                results.append((flight.tokens, flight.logprobs, flight.lengths))
                segments = flight.finish()
        keep = segments is not None and len(parts) == 1
        # On a CPU the rows' segments begin with their paths.
        path = request.path if self.fused else []
        cache = CachedTree(self.pool.tree, path, segments) if keep else None
        return *(torch.cat(tensors) for tensors in zip(*results)), cache

    def prefill(self, prompts, new_tokens, above, n, limits, keys):
        """Runs the new tokens of each prompt through the model, behind what is cached of it ->
        Request of n rows per prompt."""
        new = torch.tensor([len(tokens) for tokens in new_tokens], device=self.device)  # [P]
        filled = torch.zeros_like(new)  # [P] slots copied from the row that is continued
        # [(Segments, node [P])], from the question down: a prompt's prefix is one segment of each.
        path = []
        if above is None:
            self.pool.reset()
        else:
            cache, rows = above
            path = [(segments, node[rows]) for segments, node in cache.path]
            filled = cache.segments.lengths[rows]
        T = int((filled + new).max())
        # Few shapes: on a CPU the slots are a column of matrices.
        T += -T % GROWTH if self.pool.limit is None and not self.pool.shared else 0
        # All slots of this call at once: later growth would move the cache.
        self.pool.reserve(self.pool.top + len(prompts) * T + len(keys) * int(limits.max()))
        segments = self.pool.take(len(prompts), T, filled + new)
        if above is not None:
            segments.copy_from(cache.segments, rows)

        # The new tokens as one matrix [P, S], with pads on the right. A token's position counts the
        # tokens before it on its path.
        S = int(new.max())
        tokens = torch.tensor(
            [ids + [0] * (S - len(ids)) for ids in new_tokens], device=self.device
        )
        start = sum((layer.lengths[node] for layer, node in path), filled)  # [P]
        positions = start[:, None] + torch.arange(S, device=self.device)  # [P, S]
        positions.clamp_(max=self.model.config.context - 1)  # a pad may lie beyond it
        # Scores are [prompts, N, S, visible], keys [prompts, visible, K, C]: as many prompts at
        # once as MAX_SCORES of either allow.
        c, visible = self.model.config, S + T + sum(layer.T for layer, _ in path)
        at_once = max(1, MAX_SCORES // (visible * max(S * c.heads, c.kv_heads * c.head_size)))
        last = []  # [(prompts at once, D)], the vectors of each prompt's last token
        for nodes in torch.arange(len(prompts), device=self.device).split(at_once):
            attention = PrefillAttention(
                self.model.config,
                [(layer, node[nodes]) for layer, node in path],
                segments,
                nodes,
                filled[nodes],
                new[nodes],
            )
            width = int(new[nodes].max())
            hidden = self.model(tokens[nodes, :width], positions[nodes, :width], attention.attend)
            last.append(hidden[torch.arange(len(nodes), device=self.device), new[nodes] - 1])
        logits = logits_of(torch.cat(last), self.model.head.weight)  # [P, V]

        # From here on a row, not a prompt, is the unit: row i belongs to prompt i // n.
        node = torch.arange(len(prompts), device=self.device).repeat_interleave(n)  # [B]
        path = [(layer, layer_node[node]) for layer, layer_node in path] + [(segments, node)]
        starts = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        return Request(path, node, logits, starts, limits, keys)

    def decode(self, request, most, temperature, filters):
        """Adds tokens to every row of the request until all have ended -> InFlight. most: the
        longest completion."""
        # Rows that have space. (On a CPU at least one: a limit that fits a single row is kept but
        # for the copy of its prompt.)
        row = self.pool.slots_of_row(int(request.starts.max()), most)
        capacity = int(min(len(request.keys), max(1, self.pool.free() / row)))
        cache = self._open_cache(request.path, capacity, most, capacity == len(request.keys))
        flight = InFlight(request, cache, capacity, most, self.leave, self.seen)
        if not self.fused:  # for choose_torch: 22 small operations once, not in every step
            columns = torch.arange(most + 1, device=self.device)
            flight.state.position_keys = position_keys(request.keys[:, None], columns)
        while flight.rows or flight.waiting:
            if flight.can_admit:
                # New rows take the free places. The prefill has the logits of their first token.
                rows = flight.admit()
                logits = request.logits[request.node[rows.row]]  # [new rows, V]
            elif self.graphs:  # the other branch, recorded on CUDA
                rows, logits = flight.active, self.graphs.replay(self.decode_step, flight.rows)
            else:
                rows, logits = flight.active, self.decode_step(flight.active, cache)  # [R, V]
            self.choose(logits, rows, temperature, filters)
            flight.retire_finished()
        return flight

    def decode_step(self, rows, cache, out=None):
        """The tokens chosen last go through the model -> logits [R, V] of the next ones, in `out`
        if that is given.

        This is model.Block for one token per row. What lies between two matrix products is one
        operation of engine/kernels.py.
        """
        c, model = self.model.config, self.model
        ops = kernels.FUSED if self.fused else kernels.REFERENCE
        cache.make_room(len(rows.token))
        x, delta = F.embedding(rows.token, model.embed.weight), None  # [R, D]
        cos, sin = self.cos[rows.position], self.sin[rows.position]  # [R, C]
        for i, block in enumerate(model.blocks):
            # x + delta, the last block's MLP, is added here, in the operation that reads it anyway.
            x, h = ops.add_norm(x, delta, block.norm1.weight, c.norm_eps)
            qkv = F.linear(h, block.qkv.weight, block.qkv.bias)  # [R, (N + 2K) C]
            # Turns q and k by the rows' positions; k and v go straight into the rows' cache slots.
            attended = cache.attend(i, qkv, self.norms[i], cos, sin)  # [R, N, C]
            delta = F.linear(attended.flatten(1), block.out.weight)
            x, h = ops.add_norm(x, delta, block.norm2.weight, c.norm_eps)
            delta = F.linear(ops.swiglu(F.linear(h, block.gate_up.weight)), block.down.weight)
        _, h = ops.add_norm(x, delta, model.norm.weight, c.norm_eps)
        return logits_of(h, model.head.weight, out)

    def choose(self, logits, rows, temperature, filters):
        """Each row samples a token from its logits [R, V], and is no longer alive after an end
        token or at its limit."""
        if filters:  # they act on tempered logits, and `choose` divides by the temperature itself
            logits = filtered(logits.float() / (temperature or 1), **filters) * (temperature or 1)
        if self.fused:
            kernels.choose(logits, temperature, rows)  # the next line as one kernel
        else:
            rows.advance(*kernels.choose_torch(logits, temperature, rows))

    def _open_cache(self, path, capacity, most, keep):
        """-> the cache of `capacity` rows in flight below this path."""
        layers = [segments for segments, _ in path]
        if not self.fused:
            c = self.model.config
            rows = RowState.blank(capacity, len(layers), c.end_tokens, self.device)
            return CpuCache(c, self.pool, path, rows, most, keep)
        config, old = self.model.config, self.cuda_cache
        self.cuda_cache = CudaCache.opened(old, config, self.pool, layers, capacity, most)
        if self.graph and self.cuda_cache is not old:
            self.graphs = StepGraphs(self.cuda_cache, config.vocab_size)
        return self.cuda_cache

    # ---- calls and results -----------------------------------------------------------------------

    def continued(self, completions, phrases, rows=None):
        """-> rows [P], and for each of them the prompt of the next layer and those of its tokens
        that are not cached. ValueError for rows out of order.

        The prompt of the next layer: the row's own prompt, its completion without the end token,
        the phrase. Token ids are joined, never encoded again.
        """
        c = completions
        if rows is None:
            rows = torch.arange(len(c), device=self.device)
        rows = torch.as_tensor(rows, dtype=torch.long, device=self.device)
        if (rows[1:] <= rows[:-1]).any() or (len(rows) and (rows[0] < 0 or rows[-1] >= len(c))):
            raise ValueError(
                f"rows must be numbers of the {len(c)} rows, in ascending order: siblings lie side "
                "by side"
            )
        # Lists, not tensors: rows are of any length, and a prompt is checked and joined once.
        prompts, new_tokens = [], []
        for row, phrase in zip(rows.tolist(), phrases, strict=True):
            prompts.append(c.prompts[row // c.n] + c.ids[row] + phrase)
            # Off by one: keys are cached of all sampled tokens but the last. a b END leaves the
            # phrase alone (END is dropped); a b c, truncated, leaves c and the phrase.
            new_tokens.append(c.ids[row][len(c.sampled[row]) - 1 :] + phrase)
        return rows, prompts, new_tokens

    def checked_limits(self, prompts, new_tokens, n, max_new, temperature, filters):
        """-> the most tokens of each row, a list. ValueError for what cannot be sampled."""
        limits = [max_new] * (n * len(prompts)) if isinstance(max_new, int) else list(max_new)
        if n < 1 or not temperature >= 0:
            raise ValueError(
                f"cannot sample {n} completions at temperature {temperature}: at least 1, and 0 "
                "(greedy) or more"
            )
        filtering(**filters)
        V, context = self.model.config.vocab_size, self.model.config.context
        if not new_tokens or min(map(len, new_tokens)) == 0:
            raise ValueError(
                "nothing to sample from: there are no prompts, or one of them is empty"
            )
        if max(map(max, new_tokens)) >= V or min(map(min, new_tokens)) < 0:
            raise ValueError(f"a prompt holds a token outside of the vocabulary of {V}")
        if len(limits) != n * len(prompts):
            raise ValueError(f"{len(limits)} limits for {n * len(prompts)} rows")
        longest = max(map(len, prompts))
        if min(limits) < 1 or longest + max(limits) > context:
            raise ValueError(
                f"a prompt of {longest} tokens and {max(limits)} new ones do not fit the context "
                f"of {context} tokens: shorten the prompts or max_new_tokens, or give the model a "
                "longer context"
            )
        return limits

    def _completions(self, prompts, n, layer, parents, numbers, tokens, logprobs, lengths, cache):
        """Cuts the result of `_sample` to the longest row -> Completions."""
        T = int(lengths.max())
        behind = torch.arange(T, device=self.device) >= lengths[:, None]  # [B, T]
        last = tokens[torch.arange(len(tokens), device=self.device), lengths - 1]
        ends = torch.tensor(self.model.config.end_tokens, dtype=torch.long, device=self.device)
        tokens, logprobs = (x[:, :T].masked_fill(behind, 0) for x in (tokens, logprobs))
        ended = torch.isin(last, ends)
        return Completions(
            prompts, n, layer, tokens, logprobs, lengths, ended, parents, numbers, cache
        )


def narrow_copy(model):
    """-> a frozen copy of a GPT whose parameters are in its compute type, cast one by one: a second
    model in fp32 never exists."""
    narrow = {
        id(parameter): nn.Parameter(parameter.detach().to(model.compute, copy=True), False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, narrow)  # takes the tensors of this memo instead of copying


# ---- filters, for evaluation ---------------------------------------------------------------------


def filtering(top_k=0, top_p=1.0, min_p=0.0):
    """Whether these filters exclude any token. ValueError for values out of range."""
    if top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p < 1:
        raise ValueError(
            f"top_k {top_k} must be at least 0, top_p {top_p} in (0, 1], min_p {min_p} in [0, 1)"
        )
    return top_k > 0 or top_p < 1 or min_p > 0


def filtered(logits, top_k=0, top_p=1.0, min_p=0.0):
    """logits: [R, V], divided by the temperature -> the same with -inf for excluded tokens.

    For evaluation only. The log-probabilities of a rollout drawn from a cut distribution are not
    those of the policy: training on it is biased.

    top_k: the k likeliest tokens stay (0: all). top_p: the fewest likeliest whose probabilities sum
    to p. min_p: those at least p times as likely as the likeliest.
    """
    keep = torch.ones_like(logits, dtype=torch.bool)
    if top_k:
        keep &= logits >= logits.topk(min(top_k, logits.shape[1]), -1)[0][:, -1:]
    if top_p < 1:
        p, order = logits.softmax(-1).sort(-1, descending=True)
        # A token stays if those before it sum to less than top_p: the one that crosses it stays.
        keep &= torch.empty_like(keep).scatter_(1, order, p.cumsum(-1) - p < top_p)
    if min_p:
        keep &= logits >= logits.amax(-1, keepdim=True) + math.log(min_p)
    return logits.masked_fill(~keep, -torch.inf)
