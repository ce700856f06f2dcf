"""Fused attention with heads and keys filled up to what a CPU's vectors hold: the same sums."""

from __future__ import annotations

import pytest
import torch

from pipeline.models.attention import attention_probabilities, fused_attention


@pytest.mark.parametrize("width", [8, 16, 40])
@pytest.mark.parametrize("keys", [9, 64, 77, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_filled_up_heads_and_keys_change_no_sum(width: int, keys: int, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn((2, 3, length, width), generator=generator, dtype=dtype) for length in (50, keys, keys)
    )
    expected = attention_probabilities(query, key, 0.5) @ value
    found = fused_attention(query, key, value, None, 0.5)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_a_given_mask_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn((1, 1, 77, 8), generator=generator) for _ in range(3))
    mask = torch.zeros((1, 1, 1, 77))
    mask[..., 70:] = float("-inf")
    found = fused_attention(query, key, value, mask, 0.5)
    torch.testing.assert_close(found, fused_attention(query, key[:, :, :70], value[:, :, :70], None, 0.5))
