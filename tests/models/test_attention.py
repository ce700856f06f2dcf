"""Fused attention with heads and keys filled up to what a CPU's vectors hold: the same sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import attention_memory
from pipeline.engine.calls import Denoise, EncodeText, NetworkCall, Steps
from pipeline.engine.engine import Engine
from pipeline.models import attention
from pipeline.models.attention import attention_probabilities, fused_attention
from tests.methods import analytic, levels, network_calls, source, tiny_sd


@pytest.mark.parametrize("width", [8, 16, 40])
@pytest.mark.parametrize("keys", [9, 64, 77, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_filled_up_keys_change_no_sum(width: int, keys: int, dtype: torch.dtype, tolerance: float) -> None:
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


def test_a_mask_of_places_is_held_of_few_rows_at_a_time_with_few_bytes_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two rows that read by classes, over 1,024 places: beside all else 1 MiB a byte and row."""
    side = 32
    monkeypatch.setattr(attention_memory, "SIDE", side)
    monkeypatch.setattr(attention_memory, "STEPS", 2)
    monkeypatch.setattr(attention_memory, "EDITS", {"masactrl": attention_memory.EDITS["masactrl"]})
    monkeypatch.setattr(attention, "PAIRS", side**4)
    assert attention_memory.measure()[0]["peak_of_a_call_mib"] < 13  # 16 with both at once, 15 with wider numbers


def test_rows_that_are_the_same_until_the_text_is_read_are_attended_to_once_with_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first self-attention of three prompts at one point is one row; beside another point's, two."""
    backbone, sizes = tiny_sd(), []

    def noted(query: Tensor, *given: Any) -> Tensor:
        sizes.append(len(query))
        return fused_attention(query, *given)

    latents = torch.randn((2, 4, 12, 12), generator=torch.Generator().manual_seed(0))
    prompts = [backbone.encode_text(text) for text in ("", "a hat", "a dog", "a hat")]
    rows = (latents[[0, 0, 0, 1]], levels(backbone, [401] * 4), prompts)
    monkeypatch.setattr(attention, "fused_attention", noted)
    apart = backbone.denoise(NetworkCall(*rows))
    assert sizes[0] == 4
    sizes.clear()
    together = backbone.denoise(NetworkCall(*rows, alike=[0, 0, 0, 3]))
    assert sizes[0] == 2
    assert torch.equal(together.predictions.noise, apart.predictions.noise)
    assert torch.equal(together.predictions.data, apart.predictions.data)


def test_rows_are_alike_only_at_one_place_and_level() -> None:
    latents, other = (source(analytic(), 1).latents for _ in range(2))  # equal numbers in two places
    engine = Engine(analytic(), call_size=8)
    calls = network_calls(engine)

    def asks(given: Tensor, *timesteps: int) -> Steps[None]:
        prompts = yield EncodeText(tuple(f"word{n}" for n in range(len(timesteps))))
        yield Denoise(given.expand(len(timesteps), -1, -1, -1), levels(analytic(), timesteps), prompts)

    list(engine.run([asks(latents, 401, 401, 402), asks(other, 401, 401), asks(latents.transpose(-1, -2), 401)]))
    (call,) = calls
    assert call.alike == [0, 0, 2, 3, 3, 5, 0, 0]  # the last two fill it up
