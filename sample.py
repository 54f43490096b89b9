"""The sampler: n continuations of each prompt, and n continuations of each of those, over one KV cache that grows as a tree.

    python bench.py sampler            # tokens per second, and the share of the floor

The physics. Generating is two kinds of work. Prefill runs a prompt's tokens through the model at once: many vectors meet each
weight, so arithmetic is the limit. Decode adds one token to every row: a step reads all weights once, for two operations a weight
and ROW, and every key and value that a row can see, for a few operations each; so the cache, and at few rows the weights, are limited by
memory. For the default model (0.8 M parameters, 1.6 MB in bf16; 4 layers x 2 x 32 numbers = 512 bytes of cache a token) at
256 rows of 100 tokens a step reads 1.6 MB of weights and 13 MB of cache, and does 0.4 GFLOP. What is shared should therefore be
read once, and what has ended should leave.

The design.
1. A rollout is a tree: question -> attempts -> corrections. A `Level` holds the keys and values of one generation of segments;
   a node's prefix exists ONCE, however many rows continue it. Rows attend to their ancestors' levels (all rows of a node
   in one matrix product) and to their own segment, under one softmax.
2. `generate` prefills each prompt once and decodes n rows from it. `extend` goes one level down: it copies the chosen rows'
   segments behind one another, prefills only the phrase (and a last token whose keys were never needed), and decodes again.
3. All rows of a call decode in step. Once an eighth of them has ended they leave, and the rest closes up.

Random numbers are a pure function of (seed, depth in the tree, the row's own number, token position): what a row draws depends
neither on the batch around it nor on rows that ended, nor on how many processes share the work.

Letters: P prompts, R rows alive, n continuations of a prompt, T tokens, L layers, N query heads, K key/value heads, g = N / K,
C head size, V vocabulary.
"""
import copy
import math
from dataclasses import dataclass, field, replace

import torch

from model import scaled_logits

WIDEN = 16        # columns added to the rows' own cache at a time: whole blocks stay contiguous, which matrix products want


# ------------------------------------------------------------------------------------------------- keyed random numbers

MULTIPLIER = 0x846CA68B - (1 << 32)         # as the signed number with these 32 bits

def mix(x):
    """A bijective scrambler of 32-bit integers ("lowbias32", C. Wellons): every input bit flips each output bit half the time.

    x: int32 tensor, or a Python int in [0, 2³²) -> the same kind. Tensors wrap at 32 bits by themselves; >> on a signed
    tensor copies the sign, so its top bits are masked off.
    """
    if isinstance(x, int):
        x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16
    x = x ^ (x >> 16 & 0xFFFF)
    x = x.mul_(0x7FEB352D)
    x = x.bitwise_xor_(x >> 15 & 0x1FFFF)
    x = x.mul_(MULTIPLIER)
    return x.bitwise_xor_(x >> 16 & 0xFFFF)


def fold(*numbers):
    """One 32-bit number from several, order included: fold(seed, step) is a seed of its own for every step."""
    key = 0
    for number in numbers:
        key = mix(key + 0x9E3779B9 & 0xFFFFFFFF ^ mix(number & 0xFFFFFFFF))
    return key


def row_keys(seed, rows, positions):
    """rows: [R] row numbers, positions: T -> int32 [R, T], a key for each (row, position)."""
    row = mix(rows.to(torch.int32) ^ _signed(fold(seed)))
    return mix(row[:, None] ^ mix(torch.arange(positions, dtype=torch.int32, device=rows.device) + 1)[None])


def exponentials(keys, size):
    """keys: int32 [R] -> fp32 [R, size], independent draws from the exponential distribution of mean 1.

    Keys and columns are well mixed already, so half of a `mix` joins them. u = bits / 2³² + 1/2 is then squeezed a little, to stay inside
    (0, 1): at u = 1, to which the largest numbers would round in fp32, E is 0 and its token wins at ANY probability. -log u is exponential.
    """
    column = mix(torch.arange(size, dtype=torch.int32, device=keys.device))
    bits = (keys[:, None] ^ column[None]).mul_(0x7FEB352D)                            # [R, V], the largest tensor of a step:
    bits = bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).mul_(MULTIPLIER)     # written in place where it can be
    return bits.float().mul_(2.0 ** -32 * (1 - 2.0 ** -21)).add_(0.5).log_().neg_()


def _signed(x):
    return x - (1 << 32) if x >= 1 << 31 else x


def choose(logits, keys):
    """logits: fp32 [R, V], already divided by the temperature; keys: int32 [R], or None for greedy -> tokens [R], logp [R].

    An exponential race: if every token v waits a time E_v / p_v, E_v exponential, the first to arrive is v with probability p_v. (Its
    logarithm is the Gumbel-max trick.) logp is the fp32 log-probability of the token chosen.
    """
    p = logits.softmax(-1)                                                            # [R, V]
    tokens = (p if keys is None else p / exponentials(keys, p.shape[1])).argmax(-1)
    return tokens, p.gather(1, tokens[:, None])[:, 0].log()


# --------------------------------------------------------------------------------------------------------- the KV cache

@dataclass
class Level:
    """Keys and values of one generation of the tree: k, v [L, nodes, K, T, C]; of node i the first lengths[i] columns count."""
    k: torch.Tensor
    v: torch.Tensor
    lengths: torch.Tensor

    def select(self, nodes):
        return Level(self.k.index_select(1, nodes), self.v.index_select(1, nodes), self.lengths[nodes])

    def append(self, other):
        """Level with each node of `other` written right behind the same node of this one (over the pads that follow it)."""
        S = other.k.shape[3]
        columns = self.lengths[:, None] + torch.arange(S, device=self.lengths.device)          # [nodes, S]
        index = columns[None, :, None, :, None].expand_as(other.k)
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, S)).scatter_(3, index, y)
                for x, y in ((self.k, other.k), (self.v, other.v)))
        return Level(k, v, self.lengths + other.lengths)


class Ancestor:
    """A level as the rows below it see it: row r continues node[r] (ascending). Queries are regrouped so that the keys and
    values of a node meet ALL its rows in one matrix product, and so are read once."""

    def __init__(self, level, node):
        alive, node = node.unique(return_inverse=True)
        self.level = level if len(alive) == level.k.shape[1] else level.select(alive)
        self.node, count = node, node.bincount()
        self.nodes, self.width = len(count), int(count.max())
        first = count.cumsum(0) - count
        uneven = int(count.min()) != self.width          # rows have left: pad every node to the widest one
        self.slot = node * self.width + torch.arange(len(node), device=node.device) - first[node] if uneven else None

    def regroup(self, x):
        """[R * K, Q, *] -> [nodes * K, width * Q, *], a node's rows side by side. (A view where K = 1 and no row has left.)"""
        K, Q, size = x.shape[0] // len(self.node), x.shape[1], x.shape[2]
        if self.slot is not None:
            x = x.new_zeros(self.nodes * self.width, K * Q * size).index_copy_(0, self.slot, x.view(len(self.node), -1))
        return x.view(self.nodes, self.width, K, Q, size).transpose(1, 2).reshape(self.nodes * K, self.width * Q, size)

    def ungroup(self, x, Q):
        """The inverse: [nodes * K, width * Q, *] -> [R * K, Q, *]."""
        K, size = x.shape[0] // self.nodes, x.shape[2]
        x = x.view(self.nodes, K, self.width, Q, size).transpose(1, 2).reshape(self.nodes * self.width, K * Q * size)
        return (x if self.slot is None else x.index_select(0, self.slot)).view(-1, Q, size)

    def scores(self, layer, q):
        """q: [R * K, Q, C] -> [R * K, Q, T]."""
        return self.ungroup(torch.bmm(self.regroup(q), self.level.k[layer].flatten(0, 1).mT), q.shape[1])

    def values(self, layer, weights):
        """weights: [R * K, Q, T] -> [R * K, Q, C]."""
        return self.ungroup(torch.bmm(self.regroup(weights), self.level.v[layer].flatten(0, 1)), weights.shape[1])

    def hidden(self):
        """[R, T] bool: the pad columns, which no row may see."""
        columns = torch.arange(self.level.k.shape[3], device=self.node.device)
        return (columns >= self.level.lengths[:, None])[self.node]


class Cache:
    """What a set of rows attends to while its own segment grows: `ancestors`, shared, then k, v [L, R, K, T, C], its own.

    `attend` is what model.GPT.forward calls; `begin(S)` must announce how many tokens the next forward pass brings.
    """

    def __init__(self, config, dtype, ancestors, rows, device):
        self.config, self.ancestors, self.filled = config, ancestors, 0
        shape = config.depth, rows, config.kv_heads, 0, config.head_size
        self.k, self.v = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
        self.bias = None

    def begin(self, S):
        """Makes room for S more columns, and unlocks them in the mask."""
        if self.filled + S > self.k.shape[3]:
            extra = WIDEN if S == 1 else S                                # a prefill fills its columns exactly
            self.k, self.v = (torch.nn.functional.pad(x, (0, 0, 0, extra)) for x in (self.k, self.v))
            self.bias = None
        if self.bias is None or S > 1:
            self.bias = self._mask(S)
        self.bias[..., self.bias.shape[-1] - self.k.shape[3] + self.filled] = 0.0
        self.start, self.filled = self.filled, self.filled + S

    def _mask(self, S):
        """fp32 [R, 1, S * g or 1, all columns]: 0 where a row's query may look, -inf elsewhere.

        Own columns are causal: token j of the S new ones sees what was filled before, and itself.
        """
        R, T = self.k.shape[1], self.k.shape[3]
        column, new = torch.arange(T, device=self.k.device), torch.arange(S, device=self.k.device)
        own = (column > self.filled + new[:, None]).expand(R, S, T)
        hidden = torch.cat([*(a.hidden()[:, None].expand(R, S, -1) for a in self.ancestors), own], -1)
        if S > 1:
            hidden = hidden.repeat_interleave(self.config.heads // self.config.kv_heads, 1)
        return torch.zeros(hidden.shape, device=self.k.device).masked_fill_(hidden, -math.inf)[:, None]

    def attend(self, layer, q, k, v):
        """q: [R, S, N, C]; k, v: [R, S, K, C] -> [R, S, N, C]; k and v go into the cache. The arithmetic is that of
        model.causal_attention on a CPU; in bf16 the sums over levels round apart, by about 0.01 nats a token."""
        (R, S, N, C), K = q.shape, k.shape[2]
        own_k, own_v = self.k[layer], self.v[layer]                                        # [R, K, T, C]
        own_k[:, :, self.start:self.filled], own_v[:, :, self.start:self.filled] = k.transpose(1, 2), v.transpose(1, 2)
        own_k, own_v = own_k.flatten(0, 1), own_v.flatten(0, 1)                            # [R * K, T, C], and so are all below
        q = (q * C ** -0.5).view(R, S, K, N // K, C).transpose(1, 2).reshape(R * K, -1, C)
        scores = torch.cat([*(a.scores(layer, q) for a in self.ancestors), torch.bmm(q, own_k.mT)], -1)
        weights = (scores.view(R, K, *scores.shape[1:]) + self.bias).softmax(-1).to(q.dtype).flatten(0, 1)   # softmax in fp32
        *shared, own = weights.split([*(a.level.k.shape[3] for a in self.ancestors), own_k.shape[1]], -1)
        out = torch.bmm(own, own_v)
        for ancestor, weight in zip(self.ancestors, shared):
            out = out + ancestor.values(layer, weight.contiguous())
        return out.view(R, K, S, N // K, C).transpose(1, 2).reshape(R, S, N, C)

    def keep(self, rows):
        """Rows that are not in `rows` leave; the rest closes up, here and under every ancestor."""
        self.k, self.v = self.k.index_select(1, rows), self.v.index_select(1, rows)
        self.ancestors = [Ancestor(a.level, a.node[rows]) for a in self.ancestors]
        self.bias = self.bias.index_select(0, rows) if self.bias is not None else None


# ---------------------------------------------------------------------------------------------------------- the sampler

@dataclass
class Completions:
    """B sampled rows, those of one prompt side by side: row i continues prompts[i // n].

    tokens [B, T] (end token included, zeros behind it), logprobs [B, T] fp32 at the sampling temperature (at 1 for greedy),
    lengths [B], ended [B] (False: cut at max_new_tokens), parents [B] (the prompt in `generate`, the row of the
    completions extended in `extend`), numbers [B] (the row's own number, for keys).
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
    path: list = field(repr=False)               # [(Level, node of each row)], root first
    level: Level = field(repr=False)             # what the rows themselves wrote
    starts: torch.Tensor = field(repr=False)     # [B] position of a row's first sampled token

    def __len__(self):
        return len(self.lengths)

    def text_ids(self, i):
        """The sampled tokens of row i without its end token."""
        return self.tokens[i, :int(self.lengths[i]) - bool(self.ended[i])].tolist()


def usable(completions):
    """Completions whose tensors may meet autograd: those made in inference mode (which is faster than no_grad) may not, copies may."""
    names = ("tokens", "logprobs", "lengths", "ended", "parents", "numbers", "starts")
    return replace(completions, **{name: getattr(completions, name).clone() for name in names})


class Sampler:
    """Samples from a model with its own copy of the weights in the compute type; call refresh() after every optimiser step."""

    def __init__(self, model):
        self.source = model
        with torch.no_grad():
            self.model = copy.deepcopy(model).requires_grad_(False)
            for parameter in self.model.parameters():
                parameter.data = parameter.data.to(model.compute)
        self.refresh()

    @torch.no_grad()
    def refresh(self):
        """Copies the master weights, so that decoding never casts them again."""
        for mine, master in zip(self.model.parameters(), self.source.parameters()):
            mine.copy_(master)

    def generate(self, prompts, n, max_new_tokens, temperature=1.0, seed=0, first_row=0):
        """Samples n completions of each prompt (lists of token ids, lengths may differ).

        temperature 0 is greedy. Row i of the result has number first_row + i; equal seeds and numbers draw equal tokens.
        Raises ValueError for no prompts, an empty prompt, a token outside of the vocabulary, or one too long for the context.
        """
        self._check(prompts, [len(p) for p in prompts], n, max_new_tokens, temperature)
        device = self.model.embed.weight.device
        starts = torch.zeros(len(prompts), dtype=torch.long, device=device)
        level, logits = self._prefill(prompts, [], starts, temperature)
        parents = torch.arange(len(prompts), device=device).repeat_interleave(n)
        return usable(self._decode([(level, parents)], logits, prompts, n, max_new_tokens, temperature, seed, parents,
                                   first_row + torch.arange(len(parents), device=device), starts + level.lengths, depth=1))

    def extend(self, completions, phrases, n, max_new_tokens, temperature=1.0, seed=0, rows=None):
        """Samples n continuations of (prompt + completion without its end token + phrase), one phrase (token ids) a row.

        rows: which rows of `completions` go on (indices, ascending; all if omitted), in step with `phrases`. Only the phrase
        is prefilled, after the last token of a completion that was cut: its keys had not been needed.
        Raises ValueError as generate does.
        """
        c, device = completions, completions.lengths.device
        rows = torch.arange(len(c), device=device) if rows is None else torch.as_tensor(rows, device=device)
        prompts = [c.prompts[i // c.n] + c.text_ids(i) + phrase for i, phrase in zip(rows.tolist(), phrases, strict=True)]
        news = [([] if c.ended[i] else c.tokens[i, c.lengths[i] - 1:c.lengths[i]].tolist()) + phrase
                for i, phrase in zip(rows.tolist(), phrases)]
        self._check(news, [len(p) for p in prompts], n, max_new_tokens, temperature)
        if (rows[1:] <= rows[:-1]).any():
            raise ValueError("rows must be given in ascending order: siblings lie side by side")
        with torch.inference_mode():
            own, starts = c.level.select(rows), c.starts[rows]
            path = [(level, node[rows]) for level, node in c.path]
            me = torch.arange(len(rows), device=device)
            phrase_level, logits = self._prefill(news, [*path, (own, me)], starts + own.lengths, temperature)
            own = own.append(phrase_level)
        me, parents = me.repeat_interleave(n), rows.repeat_interleave(n)
        path = [(level, node[me]) for level, node in path] + [(own, me)]
        numbers = c.numbers[parents] * n + torch.arange(n, device=device).repeat(len(rows))
        return usable(self._decode(path, logits, prompts, n, max_new_tokens, temperature, seed, parents, numbers,
                                   starts + own.lengths, c.depth + 1))

    def _check(self, news, lengths, n, max_new_tokens, temperature):
        if n < 1 or temperature < 0:
            raise ValueError(f"cannot sample {n} completions at temperature {temperature}: at least 1, and 0 (greedy) or more")
        V, context = self.model.config.vocab_size, self.model.config.context
        if not news or min(map(len, news)) == 0:
            raise ValueError("nothing to sample from: there are no prompts, or one of them is empty")
        if max(map(max, news)) >= V or min(map(min, news)) < 0:
            raise ValueError(f"a prompt holds a token outside of the vocabulary of {V}")
        if max_new_tokens < 1 or max(lengths) + max_new_tokens > context:
            raise ValueError(f"a prompt of {max(lengths)} tokens and {max_new_tokens} new ones do not fit the context of "
                             f"{context} tokens: shorten the prompts or max_new_tokens, or give the model a longer context")

    @torch.inference_mode()
    def _prefill(self, segments, path, starts, temperature):
        """Runs ragged segments behind their path -> (Level of them, logits [rows, V] after the last token of each)."""
        model, device = self.model, starts.device
        lengths = torch.tensor([len(s) for s in segments], device=device)
        S = int(lengths.max())
        tokens = torch.tensor([s + [0] * (S - len(s)) for s in segments], device=device)      # pads on the right
        cache = Cache(model.config, model.compute, [Ancestor(*p) for p in path], len(segments), device)
        cache.begin(S)
        positions = starts[:, None] + torch.arange(S, device=device)                           # [rows, S]
        hidden = model(tokens, positions.clamp_(max=model.config.context - 1), cache.attend)   # a pad may lie beyond it
        last = hidden[torch.arange(len(segments), device=device), lengths - 1]
        return Level(cache.k, cache.v, lengths), scaled_logits(last, model.head.weight, temperature)

    @torch.inference_mode()
    def _decode(self, path, logits, prompts, n, max_new, temperature, seed, parents, numbers, starts, depth):
        """The loop: choose a token for every row, note it, let ended rows leave, run the model on the tokens chosen."""
        model, B, device = self.model, len(parents), logits.device
        logits, position = logits.repeat_interleave(n, 0), starts.repeat_interleave(n)[:, None]         # n rows from each prompt
        tokens, logprobs = torch.zeros(max_new, B, dtype=torch.long, device=device), torch.zeros(max_new, B, device=device)
        keys = row_keys(fold(seed, depth), numbers, max_new) if temperature > 0 else None               # [B, max_new]
        cache = Cache(model.config, model.compute, [Ancestor(*p) for p in path], B, device)
        rows, left = torch.arange(B, device=device), []                        # who is in the batch; segments of who left
        done = torch.zeros(B, dtype=torch.bool, device=device)                 # of rows
        for t in range(max_new):
            token, logp = choose(logits, None if keys is None else keys[:, t])
            tokens[t].index_copy_(0, rows, token)
            logprobs[t].index_copy_(0, rows, logp)
            done = done | (token == model.config.end_token)
            ended = int(done.sum())
            if t == max_new - 1 or ended == len(rows):
                break
            if 8 * ended >= len(rows):
                stay = (~done).nonzero()[:, 0]
                left.append((rows[done], cache.k[:, done], cache.v[:, done]))
                cache.keep(stay)
                rows, token, position, done, keys = (x if x is None else x[stay] for x in (rows, token, position, done, keys))
            cache.begin(1)
            hidden = model(token[:, None], position + t, cache.attend)                                   # [R, 1, D]
            logits = scaled_logits(hidden[:, 0], model.head.weight, temperature)
        left.append((rows, cache.k, cache.v))
        tokens, logprobs, lengths, ended = finished(tokens.T, logprobs.T, model.config.end_token)
        level = gather(left, B, tokens.shape[1], lengths - 1)
        return Completions(prompts, n, depth, tokens, logprobs, lengths, ended, parents, numbers, path, level, starts.repeat_interleave(n))


def finished(tokens, logprobs, end_token):
    """[B, max_new] buffers -> tokens, logprobs cut at the longest row and blank behind each row's end, lengths, ended.

    A row ends at its FIRST end token: it stays in the batch for a while and goes on sampling, and that is dropped here.
    """
    ends = tokens == end_token
    ended = ends.any(1)
    lengths = torch.where(ended, ends.int().argmax(1) + 1, tokens.shape[1])
    T = int(lengths.max())
    behind = torch.arange(T, device=lengths.device) >= lengths[:, None]
    return tokens[:, :T].masked_fill(behind, 0), logprobs[:, :T].masked_fill(behind, 0.0), lengths, ended


def gather(left, B, T, lengths):
    """One Level [L, B, K, T, C] from the segments of rows that left at different times: [(rows, k, v), ...]."""
    rows, k, v = left[0]
    whole = Level(*(k.new_zeros(k.shape[0], B, k.shape[2], T, k.shape[4]) for _ in "kv"), lengths)
    for rows, k, v in left:
        width = min(T, k.shape[3])
        whole.k[:, rows, :, :width], whole.v[:, rows, :, :width] = k[..., :width, :], v[..., :width, :]
    return whole
