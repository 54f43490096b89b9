"""The GPT and the way from vectors to probabilities, against plain formulas."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model import (
    GPT,
    ModelConfig,
    causal_attention,
    logits_of,
    rms_normalise,
    rope_tables,
    rotate,
    token_logprobs,
)


def test_attention_is_causal_and_ignores_right_pads(gpt):
    """Catches a mask that looks ahead, and pads that reach real tokens: changing what comes after
    must change nothing before."""
    a = torch.randint(0, 370, (2, 12))
    b = a.clone()
    b[:, 7:] = 0
    torch.testing.assert_close(gpt(a)[:, :7], gpt(b)[:, :7], atol=1e-4, rtol=0)
    torch.testing.assert_close(gpt(a[:, :7]), gpt(a)[:, :7], atol=1e-4, rtol=0)


def test_attention_equals_torchs(gpt):
    """Catches a wrong scale, head order or softmax in the CPU attention: torch's own fused
    attention is the oracle."""
    torch.manual_seed(0)
    for N, K in ((4, 1), (4, 2), (3, 3)):
        q, k, v = torch.randn(2, 9, N, 16), torch.randn(2, 9, K, 16), torch.randn(2, 9, K, 16)
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(causal_attention(0, q, k, v), expected.transpose(1, 2))


def test_the_gradient_of_the_norm_is_that_of_its_formula():
    """Catches a slip in the gradient that is written by hand, eps included: against autograd of
    x / sqrt(mean(x²) + eps), in fp32, for large and small vectors."""
    x = torch.randn(5, 7, 32) * torch.logspace(-3, 1, 5)[:, None, None]
    weight = torch.randn(5, 7, 32)
    for eps in (1e-6, 0.1):
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        y = rms_normalise(ours, eps)
        formula = theirs * (theirs.square().mean(-1, keepdim=True) + eps).rsqrt()
        assert torch.allclose(y, formula, atol=1e-6)
        (y * weight).sum().backward()
        (formula * weight).sum().backward()
        error = (ours.grad - theirs.grad).norm(dim=-1) / theirs.grad.norm(dim=-1)
        assert error.max() < 1e-5
        with torch.no_grad():
            assert torch.equal(rms_normalise(x, eps), y)


def test_rope_depends_on_distance_alone():
    """Catches a sign or a pairing error in RoPE: q at p+3 against k at p has the same product for
    every p, another for another distance."""
    cos, sin = rope_tables(64, 16, 10_000.0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def at(x, p):
        return rotate(x, cos[p][None, None, None], sin[p][None, None, None])

    products = [(at(q, p + 3) * at(k, p)).sum().item() for p in (0, 5, 40)]
    assert max(products) - min(products) < 1e-4
    assert abs((at(q, 9) * at(k, 5)).sum().item() - products[0]) > 1e-3
    torch.testing.assert_close(at(q, 11).norm(), q.norm())


def test_rope_turns_by_the_angles_of_the_paper():
    """Catches interleaved pairs for halves: position p turns (x_i, x_i+C/2) by p · theta^(-2i/C),
    as complex multiplication says."""
    cos, sin = rope_tables(8, 6, 100.0)
    x = torch.randn(6)
    turned = torch.complex(x[:3], x[3:]) * torch.polar(
        torch.ones(3), 5 * 100.0 ** (-2 * torch.arange(3) / 6)
    )
    torch.testing.assert_close(
        rotate(x[None, None, None], cos[5], sin[5]).flatten(), torch.cat([turned.real, turned.imag])
    )


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs_equal_the_naive_version(chunk, temperature):
    """Catches a wrong recomputation in backward, or a chunk border: values and both gradients equal
    log_softmax + gather in float64."""
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(23, 8, dtype=torch.float64),
        torch.randn(11, 8, dtype=torch.float64),
    )
    tokens, weights = torch.randint(0, 11, (23,)), torch.randn(23)
    results = []
    for naive in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if naive:
            z = (h @ w.T / temperature).log_softmax(-1)
            logp, entropy = z.gather(1, tokens[:, None])[:, 0], -(z.exp() * z).sum(-1)
        else:
            logp, entropy = token_logprobs(h, w, tokens, temperature, chunk)
        (logp * weights).sum().backward()
        results.append((logp.float(), entropy.float(), h.grad.float(), w.grad.float()))
    for ours, expected in zip(results[1], results[0]):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_not_rounded_on_cuda(device, dtype):
    """Catches logits rounded to bf16 on CUDA, in the trainer or in the buffer of a CUDA graph, and
    arguments that torch refuses there. (Tensors without numbers: no GPU is needed.)"""
    with FakeTensorMode():
        hidden = torch.empty(3, 8, device=device, dtype=dtype)
        weight = torch.empty(5, 8, device=device, dtype=dtype)
        expected = torch.float32 if device == "cuda" else dtype
        logits = logits_of(hidden, weight)
        assert (logits.dtype, logits.device.type, logits.shape) == (expected, device, (3, 5))
        out = torch.empty(3, 5, device=device, dtype=expected)
        assert logits_of(hidden, weight, out) is out


def test_entropy_carries_no_gradient():
    """Catches the diagnostic entering the loss."""
    hidden = torch.randn(3, 4, requires_grad=True)
    assert not token_logprobs(hidden, torch.randn(5, 4), torch.tensor([0, 1, 2]))[1].requires_grad


def test_initial_loss_is_that_of_a_uniform_guess():
    """Catches an init that starts far from uniform: the first loss of a fresh model must be log V,
    within 2 %."""
    torch.manual_seed(0)
    gpt = GPT(ModelConfig(vocab_size=370))
    tokens = torch.randint(0, 370, (8, 33))
    logp, _ = token_logprobs(
        gpt(tokens)[:, :-1].reshape(-1, 128), gpt.head.weight, tokens[:, 1:].reshape(-1)
    )
    assert abs(-logp.mean().item() / math.log(370) - 1) < 0.02


def test_masters_stay_fp32_under_bf16_compute():
    """Catches parameters stored in bf16, which would round away updates of an Adam step at small
    lr."""
    gpt = GPT(ModelConfig(vocab_size=50), torch.bfloat16)
    hidden = gpt(torch.randint(0, 50, (2, 5)))
    hidden.float().sum().backward()
    assert hidden.dtype == torch.bfloat16 and all(
        p.dtype == p.grad.dtype == torch.float32 for p in gpt.parameters()
    )


def test_too_long_a_row_is_refused(gpt):
    """Catches positions beyond the RoPE table."""
    with pytest.raises(ValueError, match="257 tokens does not fit the model's context of 256"):
        gpt(torch.zeros(1, 257, dtype=torch.long))
