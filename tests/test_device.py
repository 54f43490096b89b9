"""Where and in which type a model computes."""

import torch

from runtime.device import compute_dtype


def test_compute_dtype():
    """Catches auto falling back to an error, or a named type being overruled."""
    assert (
        compute_dtype("float32", "cuda") == torch.float32
        and compute_dtype("auto", "cuda") == torch.bfloat16
    )
    assert compute_dtype("auto", "cpu") in (torch.float32, torch.bfloat16)
