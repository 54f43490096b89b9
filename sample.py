"""The sampler: n continuations of each prompt, and n continuations of each of those, over one KV
cache that grows as a tree.

    python bench.py sampler            # tokens per second, step by step from a naive sampler to
                                       this one, and the share of the floor

The physics. Generating is two kinds of work. Prefill runs a prompt's tokens through the model at
once: many vectors meet each weight, so arithmetic is the limit. Decode adds one token to every row:
a step reads all weights once, for two operations a weight and ROW, and every key and value that a
row can see, for a few operations each; so the cache, and at few rows the weights, are limited by
memory. For the default model (0.8 M parameters, 1.6 MB in bf16; 4 layers x 2 x 32 numbers = 512
bytes of cache a token) at 256 rows of 100 tokens a step reads 1.6 MB of weights and 13 MB of cache,
and does 0.4 GFLOP. What is shared should therefore be read once, and what has ended should leave.

The design.
1. A rollout is a tree: question -> attempts -> corrections. A node's keys and values exist once for
   all rows that continue it (cache.py). `generate` prefills each prompt and decodes n rows from it;
   `extend` goes one level down: it copies the chosen rows' segments, prefills only the phrase
   behind them (and a last token whose keys were never needed), and decodes again.
2. A decode step (`Sampler._logits`) is the same few lines on a CPU and on CUDA. Between its matrix
   products stand the operations of kernels.py, as torch or as fused kernels. All that it needs lies
   in device tensors (`Rows`) that stay where they are, so that CUDA replays it as one graph: a
   graph for each number of rows in BUCKETS. The host only looks now and then at who has ended.
3. Rows that have ended leave once they are an eighth, and the rest closes up. Rows for which there
   is no memory wait, and take the place of those. What does not fit at all is made in turns; only
   then is a cache dropped, and made again when `extend` asks for it.

Random numbers are a pure function of (seed, depth in the tree, the row's own number, token
position): they depend neither on the batch around a row nor on rows that ended or waited, nor on
how many processes share the work, nor on the device. Logits do, in their last bits (a product of
other shape sums in another order), and so a token may differ where two are nearly level: once in
many thousands in fp32.

Letters: P prompts, R rows in flight, B rows in all, n continuations of a prompt, T tokens, V
vocabulary.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

from engine import kernels
from engine.cache import Grouped, Level, Pool, Prefill, Rows, Tables
from engine.kernels import fold, row_keys
from engine.workers import Crew, Home, crew_size
from model import narrow_copy

# rows of a CUDA graph
BUCKETS = (
    1,
    2,
    4,
    8,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
    192,
    256,
    384,
    512,
    768,
    1024,
    1536,
    2048,
    3072,
    4096,
)
LOOK = 8  # steps between two looks at who has ended, on CUDA; on a CPU looking costs nothing
# of the memory that is free after a warm-up: what the cache may take on CUDA when no limit is given
SHARE = 0.5
# attention scores of a prefill at a time (fp32, several tensors of 256 MB); more prompts go in
# turns
SCORES = 1 << 26


# ---- what goes in and out ------------------------------------------------------------------------


@dataclass
class Job:
    """B rows to be sampled: what is above them, and what is their own."""

    path: list  # [(Level, node [B])], root first
    node: torch.Tensor  # [B] which of the prefilled nodes a row continues
    logits: torch.Tensor  # [nodes, V] of the first token
    starts: torch.Tensor  # [nodes] position of the first token
    limits: torch.Tensor  # [B]
    keys: torch.Tensor  # [B] int32


class Result(NamedTuple):
    """What B rows write, each in its own line."""

    # [B, most + 1]; the last column is for rows that have ended and do not know it
    tokens: torch.Tensor
    logprobs: torch.Tensor  # [B, most + 1] fp32
    lengths: torch.Tensor  # [B]


@dataclass
class Completions:
    """B sampled rows, those of one prompt side by side: row i continues prompts[i // n].

    tokens [B, T] (end token included, zeros behind it), logprobs [B, T] fp32 at the sampling
    temperature (at 1 for greedy), lengths [B], ended [B] (False: cut at max_new_tokens), parents
    [B] (the prompt in `generate`, the row of the completions extended in `extend`), numbers [B]
    (the row's own number, for keys).
    """

    prompts: list
    n: int
    depth: int
    tokens: torch.Tensor
    logprobs: torch.Tensor
    lengths: torch.Tensor
    ended: torch.Tensor
    parents: torch.Tensor
    numbers: torch.Tensor
    path: list = field(default=None, repr=False)  # [(Level, node of each row)], root first
    level: Level = field(default=None, repr=False)  # what the rows themselves wrote; None: dropped
    epoch: int = -1  # which tree of the sampler's they belong to
    # which processes have the cache (crew.py); None: this one, if it has it
    home: Home = field(default=None, repr=False)

    def __len__(self):
        return len(self.lengths)

    @functools.cached_property
    def sampled(self):
        """The sampled tokens of each row, end token included, as lists: one copy from the device
        for all."""
        return [row[:length] for row, length in zip(self.tokens.tolist(), self.lengths.tolist())]

    @functools.cached_property
    def ids(self):
        """The same without end tokens."""
        return [ids[:-1] if ended else ids for ids, ended in zip(self.sampled, self.ended.tolist())]


class Watch:
    """The host's view of who is alive. On CUDA a copy that was begun `LOOK` steps ago: waiting for
    it keeps the host no more than that ahead of the device, which always has steps to do."""

    def __init__(self, device):
        self.event = torch.cuda.Event() if device.type == "cuda" else None
        self.forget()

    def forget(self):
        """Rows have moved: what is under way says nothing about them."""
        self.steps, self.copy = 0, None

    def look(self, alive):
        """alive: [R] bool -> the same on the CPU, perhaps of a while ago; None when nothing is
        known yet."""
        if self.event is None:
            return alive
        self.steps += 1
        if self.steps % LOOK:
            return None
        seen = self.copy
        if seen is not None:
            self.event.synchronize()
        self.copy = torch.empty(len(alive), dtype=torch.bool, pin_memory=True).copy_(
            alive, non_blocking=True
        )
        self.event.record()
        return seen


# ---- the sampler ---------------------------------------------------------------------------------


class Sampler:
    """Samples from a model with its own copy of the weights in the compute type; call refresh()
    after every optimiser step.

    cache_tokens: how many tokens' keys and values may exist at a time (0: no limit on a CPU; on
    CUDA half of the memory that is free after a warm-up). workers: processes on a CPU (crew.py;
    None: one a thread). fused, graph: use the kernels, replay CUDA graphs (None: where there is
    CUDA). leave: ended rows leave. share: a prompt's keys and values exist once, not once a row.
    (These five are for measuring what each of them is worth.) reserved: bytes of CUDA memory that
    others will need, which do not count as free.

    `seen`, if it is set, is called at every step with the rows in flight (cache.Rows; None when
    they are other processes') and how many have just ended: progress bars count these (bars.py),
    and a dialogue streams those (chat.py).
    """

    def __init__(
        self,
        model,
        *,
        cache_tokens=0,
        workers=None,
        fused=None,
        graph=None,
        leave=True,
        share=True,
        reserved=0,
    ):
        self.source = model
        self.model = narrow_copy(model)
        self.device = self.model.embed.weight.device
        self.fused = self.device.type == "cuda" if fused is None else fused
        self.graph = self.fused and self.device.type == "cuda" if graph is None else graph
        if self.graph and not self.fused:
            raise ValueError(
                "graph needs fused: without the kernels a step depends on shapes that only the "
                "host knows"
            )
        self.leave, self.share, self.reserved, self.tables, self.graphs, self.seen = (
            leave,
            share,
            reserved,
            None,
            {},
            None,
        )
        self.pool = Pool(
            model.config, model.compute, self.device, shared=self.fused, limit=cache_tokens or None
        )
        self.given, self.measured = (
            bool(cache_tokens),
            bool(cache_tokens) or self.device.type != "cuda",
        )
        self.cos, self.sin = (x.to(model.compute) for x in (self.model.cos, self.model.sin))
        c = model.config  # weights of q's and k's norms, head by head, or None
        self.norms = [
            self.cos.new_empty(c.heads + c.kv_heads, c.head_size) if c.qk_norm else None
            for _ in self.model.blocks
        ]
        workers = workers or (1 if self.fused or cache_tokens else crew_size(self.device))
        self.crew = Crew(workers) if workers > 1 else None
        self.refresh()

    @torch.no_grad()
    def refresh(self, weights=None):
        """Copies full weights (None: those of the source model)."""
        for mine, full in zip(self.model.parameters(), weights or self.source.parameters()):
            mine.copy_(full)
        for block, norms in zip(self.model.blocks, self.norms):
            if norms is not None:
                norms[: self.model.config.heads], norms[self.model.config.heads :] = (
                    block.q_norm.weight,
                    block.k_norm.weight,
                )
        self.pool.renew()

    def generate(self, prompts, n, max_new_tokens, temperature=1.0, seed=0, first_row=0, **filters):
        """Samples n completions of each prompt (lists of token ids, lengths may differ).

        max_new_tokens: one limit, or a list of one for each of the rows. temperature 0 is greedy.
        Row i of the result has number first_row + i; equal seeds and numbers draw equal tokens.
        filters: top_k, top_p, min_p, for evaluation (see `filtered`). Raises ValueError for no
        prompts, an empty prompt, a token outside of the vocabulary, or one too long for the
        context.
        """
        if not self.share:
            prompts, n = [prompt for prompt in prompts for _ in range(n)], 1
        rows = torch.arange(len(prompts) * n, device=self.device)
        shares = self.crew.shares(prompts, n) if self.crew else None
        if shares:
            limits = self._check(prompts, prompts, n, max_new_tokens, temperature, filters)
            orders = [
                (
                    "generate",
                    None,
                    (prompts[a:b], n, limits[a * n : b * n], temperature, seed, first_row + a * n),
                    filters,
                )
                for a, b in shares
            ]
            return self.crew.call(self, orders, prompts, rows // n, [a * n for a, _ in shares])
        return self._sample(
            prompts,
            prompts,
            None,
            n,
            max_new_tokens,
            temperature,
            seed,
            rows // n,
            first_row + rows,
            1,
            filters,
        )

    def extend(
        self, completions, phrases, n, max_new_tokens, temperature=1.0, seed=0, rows=None, **filters
    ):
        """Samples n continuations of (prompt + completion without its end token + phrase), one
        phrase (token ids) a row.

        rows: which rows of `completions` go on (indices, ascending; all if omitted), in step with
        `phrases`. Only the phrase is prefilled, after the last token of a completion that was cut:
        its keys had not been needed. (All of it is, when the cache has gone: a new tree was begun
        on CUDA, weights were refreshed, or there was no room.) Raises ValueError as generate does.
        """
        c = completions
        rows = (
            torch.arange(len(c), device=self.device)
            if rows is None
            else torch.as_tensor(rows, dtype=torch.long, device=self.device)
        )
        if (rows[1:] <= rows[:-1]).any() or (len(rows) and (rows[0] < 0 or rows[-1] >= len(c))):
            raise ValueError(
                f"rows must be numbers of the {len(c)} rows, in ascending order: siblings lie side "
                "by side"
            )
        prompts = [
            c.prompts[i // c.n] + c.ids[i] + phrase
            for i, phrase in zip(rows.tolist(), phrases, strict=True)
        ]
        news = [
            c.ids[i][len(c.sampled[i]) - 1 :] + phrase for i, phrase in zip(rows.tolist(), phrases)
        ]
        parents = rows.repeat_interleave(n)
        if self.crew and self.crew.has(c):
            limits, cuts, call = (
                self._check(prompts, news, n, max_new_tokens, temperature, filters),
                c.home.cuts,
                c.home.call,
            )
            bounds = torch.searchsorted(rows, torch.tensor(cuts)).tolist()  # whose rows are whose
            orders = [
                (
                    "extend",
                    call,
                    (
                        phrases[a:b],
                        n,
                        limits[a * n : b * n],
                        temperature,
                        seed,
                        (rows[a:b] - first).numpy(),
                    ),
                    filters,
                )
                if a < b
                else None
                for first, a, b in zip(cuts, bounds, bounds[1:])
            ]
            return self.crew.call(self, orders, prompts, parents, [a * n for a in bounds[:-1]])
        numbers = c.numbers[parents] * n + torch.arange(n, device=self.device).repeat(len(rows))
        return self._sample(
            prompts,
            news,
            (c, rows),
            n,
            max_new_tokens,
            temperature,
            seed,
            parents,
            numbers,
            c.depth + 1,
            filters,
        )

    # ---- from a call to jobs ---------------------------------------------------------------------

    def _check(self, prompts, news, n, max_new, temperature, filters):
        """-> the limit of each row. ValueError for what cannot be sampled."""
        limits = [max_new] * (n * len(prompts)) if isinstance(max_new, int) else list(max_new)
        if n < 1 or not temperature >= 0:
            raise ValueError(
                f"cannot sample {n} completions at temperature {temperature}: at least 1, and 0 "
                "(greedy) or more"
            )
        filtering(**filters)
        V, context = self.model.config.vocab_size, self.model.config.context
        if not news or min(map(len, news)) == 0:
            raise ValueError(
                "nothing to sample from: there are no prompts, or one of them is empty"
            )
        if max(map(max, news)) >= V or min(map(min, news)) < 0:
            raise ValueError(f"a prompt holds a token outside of the vocabulary of {V}")
        if len(limits) != n * len(prompts):
            raise ValueError(f"{len(limits)} limits for {n * len(prompts)} rows")
        longest = max(map(len, prompts))
        if min(limits) < 1 or longest + max(limits) > context:
            raise ValueError(
                f"a prompt of {longest} tokens and {max(limits)} new ones do not fit the context "
                "of "
                f"{context} tokens: shorten the prompts or max_new_tokens, or give the model a "
                "longer context"
            )
        return limits

    def _sample(
        self, prompts, news, above, n, max_new, temperature, seed, parents, numbers, depth, filters
    ):
        """What generate and extend share. news: what is to be prefilled of each prompt; above:
        None, or (completions, their rows)."""
        limits = self._check(prompts, news, n, max_new, temperature, filters)
        B, most = len(parents), max(limits)
        result = Result(
            torch.zeros(B, most + 1, dtype=torch.long, device=self.device),
            torch.zeros(B, most + 1, device=self.device),
            torch.zeros(B, dtype=torch.long, device=self.device),
        )
        limits, keys = (
            torch.tensor(limits, device=self.device),
            row_keys(fold(seed, depth), numbers),
        )
        filters = filters if filtering(**filters) else {}
        for a, b, cached in self._turns(prompts, above, n, most):
            rows = slice(a * n, b * n)
            path, level = self._run(
                prompts[a:b],
                news if cached else prompts[a:b],
                above if cached else None,
                n,
                limits[rows],
                keys[rows],
                temperature,
                filters,
                Result(*(x[rows] for x in result)),
            )
        path, level = (path, level) if b - a == len(prompts) else (None, None)
        T, last = (
            int(result.lengths.max()),
            result.tokens[torch.arange(B, device=self.device), result.lengths - 1],
        )
        behind = torch.arange(T, device=self.device) >= result.lengths[:, None]
        ends = torch.tensor(self.model.config.end_tokens, dtype=torch.long, device=self.device)
        tokens, logprobs = (
            x[:, :T].masked_fill(behind, 0) for x in (result.tokens, result.logprobs)
        )
        return Completions(
            prompts,
            n,
            depth,
            tokens,
            logprobs,
            result.lengths,
            torch.isin(last, ends),
            parents,
            numbers,
            path,
            level,
            self.pool.epoch,
        )

    def _turns(self, prompts, above, n, most):
        """Which prompts are worked on together, all if memory allows -> [(first, last, whether the
        cache of what is above serves)]."""
        self._measure(prompts)
        P, T = len(prompts), max(map(len, prompts))
        # epochs are unique
        cached = (
            above is not None and above[0].level is not None and above[0].epoch == self.pool.epoch
        )
        if cached and P * (T + n * most) <= self.pool.free():
            return [(0, P, True)]
        self.pool.reset()
        if P * (T + n * most) <= self.pool.free():
            return [(0, P, False)]
        # half for prompts, half for rows, which queue for it
        at_once = int(min(P, max(1, self.pool.free() / 2 / T)))
        if at_once * T + most > self.pool.free():
            kind = ValueError if self.given else MemoryError
            raise kind(
                f"a prompt of {T} tokens and a completion of {most} do not fit a cache of "
                f"{self.pool.limit} tokens"
            )
        return [(a, min(a + at_once, P), False) for a in range(0, P, at_once)]

    def _measure(self, prompts):
        """Once, on CUDA: how much memory is left beside everything else, after a forward pass over
        a few prompts has taken its own."""
        if not self.measured:
            with torch.inference_mode():
                self.model(torch.tensor([prompts[0][:64]] * 64, device=self.device))
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            c, free = (
                self.model.config,
                max(0, torch.cuda.mem_get_info(self.device)[0] - self.reserved),
            )
            self.pool.limit = int(SHARE * free) // (
                2 * c.depth * c.kv_heads * c.head_size * self.model.compute.itemsize
            )
            self.measured = True

    @torch.inference_mode()
    def _run(self, prompts, news, above, n, limits, keys, temperature, filters, result):
        """A turn: prefill, then decode -> path of the rows, their level (or None)."""
        if above is None:
            self.pool.reset()
            path, before = [], torch.zeros(len(news), dtype=torch.long, device=self.device)
        else:
            c, rows = above
            path, before = [(level, node[rows]) for level, node in c.path], c.level.lengths[rows]
        sizes = torch.tensor([len(s) for s in news], device=self.device)
        T = int((before + sizes).max())
        self.pool.reserve(self.pool.top + len(news) * T + len(keys) * int(limits.max()))
        level = self.pool.level(len(news), T, before + sizes)
        if above is not None:
            for mine, theirs in zip(level.blocks(), c.level.blocks()):
                width = min(level.T, c.level.T)
                for layer in range(len(mine)):
                    mine[layer, :, :width] = theirs[layer, :, :width].index_select(0, rows)
        logits = self._prefill(news, path, level, before, sizes)
        node = torch.arange(len(news), device=self.device).repeat_interleave(n)
        starts = torch.tensor([len(p) for p in prompts], device=self.device)
        path = [(above_level, up[node]) for above_level, up in path] + [(level, node)]
        return path, self._decode(
            Job(path, node, logits, starts, limits, keys), temperature, filters, result
        )

    def _prefill(self, news, path, level, before, sizes):
        """Runs ragged segments through the model, behind what is there already -> logits [rows, V]
        after the last token of each."""
        model, S = self.model, int(sizes.max())
        # pads on the right
        tokens = torch.tensor([s + [0] * (S - len(s)) for s in news], device=self.device)
        positions = (sum((up.lengths[node] for up, node in path), before))[:, None] + torch.arange(
            S, device=self.device
        )
        positions.clamp_(max=model.config.context - 1)  # a pad may lie beyond it
        columns = S + level.T + sum(above.T for above, _ in path)
        at_once, last = max(1, SCORES // (S * columns * model.config.heads)), []
        for nodes in torch.arange(len(news), device=self.device).split(at_once):
            attention = Prefill(
                model.config,
                [(above, node[nodes]) for above, node in path],
                level,
                nodes,
                before[nodes],
                sizes[nodes],
            )
            width = int(sizes[nodes].max())
            hidden = model(tokens[nodes, :width], positions[nodes, :width], attention.attend)
            last.append(hidden[torch.arange(len(nodes), device=self.device), sizes[nodes] - 1])
        return F.linear(torch.cat(last), model.head.weight)

    # ---- decode ----------------------------------------------------------------------------------

    def _decode(self, job, temperature, filters, result):
        """Seats rows as there is room, steps, looks who has ended, and closes up, until all have ->
        Level of the rows, or None."""
        B, most, seated, R, step, last = len(job.keys), result.tokens.shape[1] - 1, 0, 0, 0, 0
        capacity = int(min(B, self.pool.free() / most))
        cache = self._cache(job.path, capacity, most, capacity == B)
        rows, watch = cache.rows, Watch(self.device)
        rows.tokens, rows.logprobs = result.tokens, result.logprobs
        while True:
            if seated < B and R < capacity:
                new = torch.arange(seated, min(B, seated + capacity - R), device=self.device)
                rows.seat(R, new, job)
                cache.admit(R, len(new))
                self._choose(
                    job.logits[job.node[new]], temperature, filters, rows.part(R, R + len(new))
                )
                seated, R, last = (
                    seated + len(new),
                    R + len(new),
                    max(last, step + int(job.limits[new].max()) - 1),
                )
                live = rows.part(0, R)
                watch.forget()
            alive = torch.zeros(R, dtype=torch.bool) if step == last else watch.look(live.alive)
            ended = R - int(alive.sum()) if alive is not None else 0
            leaving = ended == R or (8 * ended >= R and ended and self.leave)
            if self.seen:
                self.seen(live, ended if leaving else 0)
            if leaving:
                gone = (~alive).nonzero()[:, 0].to(self.device)
                result.lengths[rows.row[gone]] = rows.length[gone]
                cache.keep(alive, R)
                rows.keep(alive, R)
                R -= ended
                cache.kept(R)
                live = rows.part(0, R)
                watch.forget()
                if R == 0 and seated == B:
                    break
                continue
            cache.begin(R)
            logits = self._replay(R) if self.graph else self._logits(cache, live)
            self._choose(logits, temperature, filters, live)
            step += 1
        return cache.finish(B, result.lengths - 1) if capacity == B else None

    def _choose(self, logits, temperature, filters, rows):
        """A token for each of these rows."""
        if filters:
            # since choose divides
            logits = filtered(logits.float() / (temperature or 1), **filters) * (temperature or 1)
        (kernels.choose if self.fused else kernels.choose_torch)(logits, temperature, rows)

    def _cache(self, path, capacity, most, whole):
        """Grouped or Tables for this call; Tables (and graphs) of an earlier call if they are large
        enough and the pool has not moved."""
        if not self.fused:
            rows = Rows.blank(capacity, len(path), self.model.config.end_tokens, self.device)
            return Grouped(self.pool, [level for level, _ in path], rows, most, whole)
        own = self.pool.level(
            capacity, most, torch.zeros(capacity, dtype=torch.long, device=self.device)
        )
        old, places, levels = (
            self.tables,
            next((b for b in BUCKETS if b >= capacity), capacity),
            max(2, len(path)),
        )
        # never smaller than before, or a large call after a small one would capture anew
        if old is not None:
            places, levels = max(places, len(old.me)), max(levels, len(old.lines))
        if (
            old is None
            or old.moves != self.pool.moves
            or (places, levels) != (len(old.me), len(old.lines))
        ):
            rows = Rows.blank(places, levels, self.model.config.end_tokens, self.device)
            self.tables, self.graphs = (
                Tables(self.model.config, self.pool, rows, places, levels),
                {},
            )
            self.outputs = self.cos.new_empty(
                places if self.graph else 0, self.model.config.vocab_size
            )
        self.tables.rows.clear()  # an interrupted call may have left rows behind
        self.tables.open([level for level, _ in path], own)
        return self.tables

    def _logits(self, cache, rows, out=None):
        """One decode step: the tokens chosen last go through the model -> logits [R, V] of the next
        ones, in `out` if that is given.

        This is model.Block, for one token a row, written so that what lies between two matrix
        products is one operation of kernels.py.
        """
        c, model = self.model.config, self.model
        add_norm, swiglu = (
            (kernels.add_norm, kernels.swiglu)
            if self.fused
            else (kernels.add_norm_torch, kernels.swiglu_torch)
        )
        x, delta = F.embedding(rows.token, model.embed.weight), None  # [R, D]
        cos, sin = self.cos[rows.position], self.sin[rows.position]  # [R, C]
        for layer, (block, norms) in enumerate(zip(model.blocks, self.norms)):
            x, h = add_norm(x, delta, block.norm1.weight, c.norm_eps)
            q = cache.store(
                F.linear(h, block.qkv.weight, block.qkv.bias),
                norms,
                cos,
                sin,
                rows.slot,
                cache.k[layer],
                cache.v[layer],
                c.heads,
                c.norm_eps,
            )  # [R, N, C]
            x, h = add_norm(
                x,
                F.linear(cache.attend(layer, q).flatten(1), block.out.weight),
                block.norm2.weight,
                c.norm_eps,
            )
            delta = F.linear(swiglu(F.linear(h, block.gate_up.weight)), block.down.weight)
        _, h = add_norm(x, delta, model.norm.weight, c.norm_eps)
        return (
            F.linear(h, model.head.weight)
            if out is None
            else torch.mm(h, model.head.weight.mT, out=out)
        )

    def _replay(self, R):
        """`_logits` as a CUDA graph: for the next larger bucket, whose rows beyond R are empty
        places and write nothing.

        Graphs are captured when first needed, from the largest down, so that the smaller ones find
        room in the memory of the largest; all write their logits to one tensor.
        """
        places, levels = len(self.tables.me), len(self.tables.path)
        bucket = next((b for b in BUCKETS if b >= R and b <= places), places)
        if (bucket, levels) not in self.graphs:
            slot = self.tables.rows.slot.clone()
            # steps that only warm up must neither write nor look at rows they do not have
            self.tables.close()
            for b in sorted({places, *(b for b in BUCKETS if b < places)}, reverse=True):
                self.graphs[b, levels] = self._capture(b)
            self.tables.rows.slot.copy_(slot)
            self.tables.kept(R)
        self.graphs[bucket, levels].replay()
        return self.outputs[:R]

    def _capture(self, places):
        """-> CUDA graph. The step is run first on a side stream: kernels compile and libraries set
        themselves up outside of the capture."""
        rows, stream = self.tables.rows.part(0, places), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._logits(self.tables, rows, self.outputs[:places])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other in self.graphs.values()), None)
        # NCCL's watchdog is another thread
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._logits(self.tables, rows, self.outputs[:places])
        return graph


def filtering(top_k=0, top_p=1.0, min_p=0.0):
    """Whether these filters keep any token out. ValueError for values out of range."""
    if top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p < 1:
        raise ValueError(
            f"top_k {top_k} must be at least 0, top_p {top_p} in (0, 1], min_p {min_p} in [0, 1)"
        )
    return top_k > 0 or top_p < 1 or min_p > 0


def filtered(logits, top_k=0, top_p=1.0, min_p=0.0):
    """logits: [R, V], divided by the temperature -> the same with -inf for tokens that are not to
    be drawn. For evaluation only: a rollout drawn from a cut distribution has log-probabilities
    that are not those of the policy, and training on it is biased.

    top_k: the k likeliest (0: all). top_p: the fewest likeliest whose probabilities sum to p.
    min_p: those at least p times as likely as the likeliest.
    """
    keep = torch.ones_like(logits, dtype=torch.bool)
    if top_k:
        keep &= logits >= logits.topk(min(top_k, logits.shape[1]), -1)[0][:, -1:]
    if top_p < 1:
        p, order = logits.softmax(-1).sort(-1, descending=True)
        # what stands before it is still below p
        keep &= torch.empty_like(keep).scatter_(1, order, p.cumsum(-1) - p < top_p)
    if min_p:
        keep &= logits >= logits.amax(-1, keepdim=True) + math.log(min_p)
    return logits.masked_fill(~keep, -torch.inf)
