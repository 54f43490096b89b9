"""The GPT: a decoder-only transformer in plain torch, one class for the tiny default and for large
models.

    python model.py                # the default model's parameters, module by module

The idea. A token becomes a vector of D numbers. L blocks each add two updates to it: attention,
from the tokens before, and an MLP, from the vector alone. The last vector, compared with every row
of the embedding table, gives the logits of the next token. The parts are those of Qwen2/2.5/3,
Llama-3 and SmolLM2, switched by config.

1. `forward` takes a function attend(block, q, k, v): training passes `causal_attention` or one for
   packed trees, the sampler's prefill one that fills its KV cache. Decoding repeats this forward
   pass with fused operations (sample.Sampler.decode_step). Tests hold the two together: in fp32
   log-probabilities differ by less than 1e-4.
2. Weights are stored in fp32 and cast to the compute type at use. An Adam step at lr 1e-6 is
   smaller than what bf16 weights can hold: most of it would be rounded away.

Letters: B rows, T tokens, L blocks, D width, N query heads, K key/value heads, C head size, V
vocabulary, M any number of flattened tokens.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # tokens whose logits exist at a time in training
# The largest sizes that a file may ask for; 2^20 of any other size.
LARGEST = dict(depth=1024, context=1 << 22)


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    width: int = 128  # D
    depth: int = 4  # L, the number of blocks
    heads: int = 4  # N
    kv_heads: int = 1  # K; N query heads share them
    head_size: int = 32  # C; Qwen3 and others choose it apart from width / heads
    hidden: int = 384  # width of the MLP
    context: int = 512  # longest sequence, prompt included
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False  # Qwen2, Qwen2.5
    qk_norm: bool = False  # Qwen3
    tied: bool = True  # the output head is the embedding table
    end_tokens: tuple = ()  # tokens that end a completion, at most 4 (Llama-3 has several)
    # Llama-3.x: factor, low and high frequency factor, original context
    rope_scaling: tuple | None = None

    def __post_init__(self):
        """ValueError for sizes that are no transformer's: a shape may come from an untrusted
        file."""
        for name in (
            "vocab_size",
            "width",
            "depth",
            "heads",
            "kv_heads",
            "head_size",
            "hidden",
            "context",
        ):
            size, most = getattr(self, name), LARGEST.get(name, 1 << 20)
            if type(size) is not int or not 1 <= size <= most:
                raise ValueError(
                    f"{name} = {size!r:.40}, and must be a whole number from 1 to {most:,}"
                )
        for name, most in dict(rope_theta=math.inf, norm_eps=1).items():
            if type(getattr(self, name)) not in (int, float) or not 0 < getattr(self, name) < most:
                raise ValueError(
                    f"{name} = {getattr(self, name)!r:.40}, and must be a number above "
                    f"0{' and below 1' if most == 1 else ''}"
                )
        for name in ("qkv_bias", "qk_norm", "tied"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} = {getattr(self, name)!r:.40}, and must be true or false")
        if self.heads % self.kv_heads or self.head_size % 2:
            raise ValueError(
                f"{self.heads} heads of size {self.head_size}, {self.kv_heads} key/value heads: "
                "these must divide the heads, and the size must be even, since RoPE turns pairs"
            )
        if type(self.end_tokens) is not tuple or not all(
            type(end) is int and end >= 0 for end in self.end_tokens
        ):
            raise ValueError(f"end_tokens = {self.end_tokens!r:.40}, and must be token ids")
        if self.rope_scaling is not None:
            _, low, high, _ = self.rope_scaling
            if (
                not all(type(x) in (int, float) and 0 < x < math.inf for x in self.rope_scaling)
                or low >= high
            ):
                raise ValueError(
                    f"rope_scaling = {self.rope_scaling!r:.80}: four numbers above 0, the second "
                    "below the third"
                )


# ---- building blocks -----------------------------------------------------------------------------


class Linear(nn.Linear):
    """nn.Linear whose fp32 master weight is cast to the type of its input; [..., in] -> [...,
    out]."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (arXiv 1910.07467, eq. 4)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return rms_normalise(x, self.eps) * self.weight.to(x.dtype)


def rms_normalise(x, eps):
    """x / sqrt(mean(x²) + eps) over the last dimension, summed in fp32."""
    if torch.is_grad_enabled():
        return Normalised.apply(x, eps)
    return x * inverse_rms(x, eps)


def inverse_rms(x, eps):
    """x: [..., D] -> 1 / sqrt(mean(x²) + eps), [..., 1]."""
    # vector_norm reads x once; square and mean would write it out twice.
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (
        torch.addcmul(constant(eps, x.device), length, length, value=1 / x.shape[-1])
        .rsqrt()
        .to(x.dtype)
    )


class Normalised(torch.autograd.Function):
    """`rms_normalise` with its gradient written down. With y = x · r it is

    dx = r · (dy - y · mean(dy · y)),

    half of the operations that autograd would make of the norm and its root.
    """

    @staticmethod
    def forward(ctx, x, eps):
        r = inverse_rms(x, eps)
        y = x * r
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    def backward(ctx, dy):
        y, r = ctx.saved_tensors
        mean = (dy * y).mean(-1, keepdim=True)  # summed in fp32
        return torch.addcmul(dy, y, mean, value=-1).mul_(r), None


@functools.cache
def constant(value, device):
    """A number as a tensor, made once. A Python number would become a new one in every
    operation."""
    with torch.inference_mode(False):  # a backward pass may use it later
        return torch.tensor(value, device=device)


def rope_tables(context, head_size, theta, scaling=None):
    """-> cos, sin: [context, C] fp32. Position p turns the pair (i, i + C/2) by p · theta^(-2i/C)
    (arXiv 2104.09864, eq. 15).

    The first half of sin carries the minus sign of the rotation, so that `rotate` is two products
    and a sum. scaling: Llama-3.1's. Turns that the original context saw less than once slow down by
    a factor, fast ones stay, and those between are blended.
    """
    # The first pair turns by one radian a token, the last one 1/theta as fast: near and far
    # distances each have pairs that tell them apart.
    frequency = theta ** (-torch.arange(0, head_size, 2).float() / head_size)  # [C/2]
    if scaling:
        factor, low, high, original = scaling
        turns = frequency * original / (2 * math.pi)  # in the original context
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (blend + (1 - blend) / factor)
    angle = torch.arange(context).float()[:, None] * frequency  # [context, C/2]
    return torch.cat([angle.cos(), angle.cos()], -1), torch.cat([-angle.sin(), angle.sin()], -1)


def rotate(x, cos, sin):
    """RoPE. x: [B, T, heads, C]; cos, sin: [B or 1, T, 1, C] -> x turned by its position."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def causal_attention(block, q, k, v):
    """Attention of training and of plain forward passes: token t sees tokens 0..t of its own row.

    block: its index, unused here; q: [B, T, N, C]; k, v: [B, T, K, C] -> [B, T, N, C]. Rows of
    different lengths are padded on the RIGHT: the causal triangle then keeps pads out, and no mask
    per row is needed.
    """
    if q.is_cuda:
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2)
    # On a CPU torch's fused kernel took 50 ms (bf16) where these lines take 9 (forward + backward,
    # 64 rows x 96 tokens, 4 query heads on 1). With K heads of G queries each, the G x T queries of
    # a key head form one tall matrix.
    B, T, N, C = q.shape
    K, G = k.shape[2], N // k.shape[2]
    q = q.view(B, T, K, G, C).transpose(1, 2).reshape(B * K, T * G, C)
    k, v = (x.transpose(1, 2).reshape(B * K, T, C) for x in (k, v))
    # [T * G, T]: 0 where a query may look, -inf above the diagonal; each row G times, once a head.
    bias = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1).repeat_interleave(G, 0)
    out = attention_scores(q, k, bias).softmax(-1) @ v
    return out.view(B, K, T, G, C).transpose(1, 2).reshape(B, T, N, C)


def attention_scores(q, k, bias):
    """q kᵀ / sqrt C + bias, in the compute type; the softmax of them is computed in fp32.

    q: [B, M, C]; k: [B, T, C]; bias: 0, or -inf where a query may not look -> [B, M, T]. One
    operation: with scores in fp32, and the bias added to them, attention took a third longer.
    """
    return torch.baddbmm(bias, q, k.mT, alpha=q.shape[-1] ** -0.5)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); [B, T, D] -> [B, T, D]."""

    def __init__(self, config, index):
        super().__init__()
        c, self.config, self.index = config, config, index
        self.norm1 = RMSNorm(c.width, c.norm_eps)
        # q, k and v in one product
        self.qkv = Linear(c.width, (c.heads + 2 * c.kv_heads) * c.head_size, bias=c.qkv_bias)
        self.out = Linear(c.heads * c.head_size, c.width, bias=False)
        self.norm2 = RMSNorm(c.width, c.norm_eps)
        self.gate_up = Linear(c.width, 2 * c.hidden, bias=False)  # two products in one
        self.down = Linear(c.hidden, c.width, bias=False)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_size, c.norm_eps)
            self.k_norm = RMSNorm(c.head_size, c.norm_eps)

    def forward(self, x, cos, sin, attend):
        """x: [B, T, D], the residual stream -> [B, T, D]. cos, sin: [B or 1, T, 1, C]."""
        c, (B, T, _) = self.config, x.shape
        # Attention. One product makes q, k and v: three small ones would each read the input.
        qkv = self.qkv(self.norm1(x)).view(B, T, -1, c.head_size)  # [B, T, N + 2K, C]
        qk, v = qkv.split([c.heads + c.kv_heads, c.kv_heads], 2)
        if c.qk_norm:  # q_norm(q) and k_norm(k) in one pass over both
            weights = [
                self.q_norm.weight.expand(c.heads, -1),
                self.k_norm.weight.expand(c.kv_heads, -1),
            ]
            qk = rms_normalise(qk, c.norm_eps) * torch.cat(weights).to(qk.dtype)
        q, k = rotate(qk, cos, sin).split([c.heads, c.kv_heads], 2)
        attended = attend(self.index, q, k, v)  # [B, T, N, C]
        x = x + self.out(attended.flatten(2))
        # The MLP is SwiGLU (arXiv 2002.05202): one half of the hidden numbers gates the other.
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)  # [B, T, hidden] each
        return x + self.down(F.silu(gate) * up)


# ---- the GPT -------------------------------------------------------------------------------------


class GPT(nn.Module):
    """The model. `compute` is the type of activations (fp32 or bf16); parameters stay fp32.

    `recompute`: backward computes blocks a second time instead of keeping their activations: about
    a third more time, a fraction of the memory.
    """

    def __init__(self, config, compute=torch.float32):
        super().__init__()
        self.config, self.compute, self.recompute = config, compute, False
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList([Block(config, i) for i in range(config.depth)])
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = (
            self.embed if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        )
        cos, sin = rope_tables(
            config.context, config.head_size, config.rope_theta, config.rope_scaling
        )
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(self._init)

    def _init(self, module):
        """Embeddings N(0, 0.02). Matrices N(0, 1 / fan-in), which keeps the size of activations at
        any width; those that write into the residual stream are smaller by sqrt(2L), for its 2L
        writes (GPT-2)."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, Block):
            for linear in (module.out, module.down):
                nn.init.normal_(
                    linear.weight, std=(2 * self.config.depth * linear.in_features) ** -0.5
                )

    def forward(self, tokens, positions=None, attend=causal_attention):
        """tokens: [B, T] integers -> [B, T, D], the vectors that `scaled_logits` turns into logits
        of the NEXT token.

        positions: [B, T] or [1, T]; 0..T-1 if omitted. attend: see the top of this file.
        Raises ValueError when a row of omitted positions is longer than the context.
        """
        if positions is None:
            if tokens.shape[1] > self.config.context:
                raise ValueError(
                    f"a row of {tokens.shape[1]} tokens does not fit the model's context of "
                    f"{self.config.context}"
                )
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        # Rows are looked up in fp32 and then cast: casting first would cast the whole table.
        x = F.embedding(tokens, self.embed.weight).to(self.compute)  # [B, T, D]
        cos = self.cos[positions][:, :, None].to(self.compute)  # [B or 1, T, 1, C]
        sin = self.sin[positions][:, :, None].to(self.compute)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():  # checkpointing, arXiv 1604.06174
                options = dict(use_reentrant=False, preserve_rng_state=False)
                x = checkpoint(block, x, cos, sin, attend, **options)
            else:
                x = block(x, cos, sin, attend)
        return self.norm(x)


# ---- from vectors to probabilities ---------------------------------------------------------------


def logits_of(hidden, weight, out=None):
    """hidden: [M, D]; weight: [V, D] of the same type -> [M, V], in `out` if that is given.

    On CUDA fp32: the sums of a bf16 product leave it unrounded. A logit of 20 in bf16 is a multiple
    of 1/8. (On a CPU they are in the type of hidden: torch has no such product there.) torch has no
    gradient for it either: TokenLogprobs writes down its own.
    """
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.mT, out_dtype=torch.float32, out=out)
    return torch.mm(hidden, weight.mT, out=out)


def scaled_logits(hidden, weight, temperature=1.0):
    """Logits of the trainer and the reference. (The sampler applies `scaled`, or its fused form.)

    hidden: [M, D]; weight: [V, D] -> fp32 [M, V], divided by the temperature (0 = greedy: left as
    they are).
    """
    return scaled(logits_of(hidden, weight.to(hidden.dtype)), temperature)


def scaled(logits, temperature):
    """Logits of any type -> fp32, divided by the temperature (0 = greedy: left as they are)."""
    return logits.float() / temperature if temperature not in (0, 1) else logits.float()


class TokenLogprobs(torch.autograd.Function):
    """log π(token) and the entropy of π for M tokens, without ever holding [M, V] logits for more
    than `chunk` tokens.

    With u = hidden @ weightᵀ and z = u / temperature,
    forward:  logp = z[token] - logsumexp(z)
    backward: du = (onehot(token) - softmax(z)) · dlogp / temperature, from logits computed a second
    time. At V = 151,936 the logits of 16 rows of 2,048 tokens are 20 GB in fp32, those of a chunk
    of 1,024 tokens 0.6 GB. The entropy is a diagnostic: no gradient flows through it.
    """

    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature, chunk):
        ctx.save_for_backward(hidden, weight, tokens)
        ctx.temperature, ctx.chunk, cast = temperature, chunk, weight.to(hidden.dtype)
        parts = [
            TokenLogprobs._forward_chunk(h, cast, token, temperature)
            for h, token in zip(hidden.split(chunk), tokens.split(chunk))
        ]
        logp, entropy = (torch.cat(part) for part in zip(*parts))
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, dlogp, _):
        hidden, weight, tokens = ctx.saved_tensors
        dweight, dhidden = torch.zeros_like(weight), torch.empty_like(hidden)
        cast = weight.to(hidden.dtype)
        # Chunk by chunk, as forward: the logits of one chunk exist, never those of two.
        for h, token, d, dh in zip(*(x.split(ctx.chunk) for x in (hidden, tokens, dlogp, dhidden))):
            du = TokenLogprobs._backward_chunk(h, cast, token, d, ctx.temperature)  # [chunk, V]
            torch.mm(du, cast, out=dh)
            dweight += du.mT @ h
            del du  # before the next chunk's is allocated
        return dhidden, dweight, None, None, None

    @staticmethod
    def _forward_chunk(h, weight, token, temperature):
        """-> log-probabilities and entropies of a chunk. Its logits are freed on return."""
        z = scaled_logits(h, weight, temperature).log_softmax(-1)  # [chunk, V]
        return z.gather(-1, token[:, None])[:, 0], z.exp().mul_(z).sum(-1).neg_()

    @staticmethod
    def _backward_chunk(h, weight, token, d, temperature):
        """du of a chunk, in the type of h."""
        du = scaled_logits(h, weight, temperature).softmax(-1).mul_(-d[:, None])
        return du.scatter_add_(-1, token[:, None], d[:, None]).div_(temperature).to(h.dtype)


def token_logprobs(hidden, weight, tokens, temperature=1.0, chunk=CHUNK):
    """hidden: [M, D] vectors, weight: [V, D], tokens: [M] the tokens that followed -> logp [M]
    fp32, entropy [M] fp32.

    Off by one, with three tokens: in the row a b c, the vector at a predicts b, the vector at b
    predicts c; so hidden[:, :-1] goes with tokens[:, 1:].
    """
    return TokenLogprobs.apply(hidden, weight, tokens, temperature, chunk)


# ---- the command line ----------------------------------------------------------------------------


def main():
    model = GPT(ModelConfig(vocab_size=512))
    for name, parameter in model.named_parameters():
        print(f"{name:28} {str(tuple(parameter.shape)):14} {parameter.numel():9,}")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
