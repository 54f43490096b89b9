"""Where and in which type a model computes."""

import torch

from runtime.device import compute_dtype, pick_device


def test_compute_dtype():
    """Catches auto falling back to an error, or a named type being overruled."""
    assert (
        compute_dtype("float32", "cuda") == torch.float32
        and compute_dtype("auto", "cuda") == torch.bfloat16
    )
    assert compute_dtype("auto", "cpu") in (torch.float32, torch.bfloat16)


def test_products_in_bf16_are_summed_in_fp32(monkeypatch):
    """Catches torch's default, by which cuBLAS may add the parts of a sum in bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    try:
        assert pick_device("auto") == "cuda" and not matmul.allow_bf16_reduced_precision_reduction
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
