"""Geometry of subspaces: what holds for any."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.subspaces import (
    Leading,
    finished,
    geodesic_distance,
    improved,
    mean_directions,
    orthonormal,
    power_spectrum,
    principal_angles,
    transported,
    with_fixed_signs,
)

D, M, N = 24, 18, 4


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def span(seed: int, rows: int = N, columns: int = M, dtype: torch.dtype = torch.float64) -> Tensor:
    return orthonormal(random(rows, columns, seed=seed, dtype=dtype))


def basis(seed: int, rows: int = N) -> Leading:
    """Of a random linear map, by an independent decomposition."""
    u, s, vt = torch.linalg.svd(random(M, D, seed=seed), full_matrices=False)
    return Leading(vt[:rows], s[:rows], u.mT[:rows].contiguous())


def test_iterating_comes_to_the_singular_values_of_a_linear_map_and_to_its_rows() -> None:
    jacobian, exact, rows = random(M, D, seed=3), basis(3), span(7, N + 4, D)
    for _ in range(60):
        rows, stretches = improved(rows @ jacobian.mT @ jacobian)
    torch.testing.assert_close(stretches[:N], exact.stretches, rtol=1e-8, atol=0.0)
    assert geodesic_distance(rows[:N], exact.tangents) < 1e-4


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_a_subspace_has_no_distance_to_itself_however_it_is_turned(dtype: torch.dtype, rounding: float) -> None:
    one = span(1, dtype=dtype)
    turned = orthonormal(random(N, N, seed=9, dtype=dtype)) @ one
    assert geodesic_distance(one, one) < 5 * rounding
    assert geodesic_distance(one, turned) < 20 * rounding


def test_distances_are_symmetric_keep_to_the_triangle_and_are_largest_between_complements() -> None:
    spans = [span(seed) for seed in range(3)]
    far = [geodesic_distance(spans[at], spans[(at + 1) % 3]) for at in range(3)]
    back = [geodesic_distance(spans[(at + 1) % 3], spans[at]) for at in range(3)]
    torch.testing.assert_close(torch.tensor(far), torch.tensor(back))
    assert all(far[at] <= far[at - 1] + far[at - 2] for at in range(3))
    whole = span(4, 2 * N)
    assert geodesic_distance(whole[:N], whole[N:]) == pytest.approx(math.sqrt(N) * math.pi / 2)


def test_angles_are_those_by_which_a_plane_was_turned() -> None:
    angles = torch.tensor([1e-9, 0.3, 1.2], dtype=torch.float64)
    axes = torch.eye(6, dtype=torch.float64)
    turned = angles.cos()[:, None] * axes[:3] + angles.sin()[:, None] * axes[3:]
    torch.testing.assert_close(principal_angles(axes[:3], turned), angles, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(principal_angles(turned[2:], axes[:3]), angles[2:])


def test_a_direction_carried_to_its_own_sample_is_itself_whatever_the_pairs_signs() -> None:
    own = basis(1)
    for at in range(N):
        carried = transported(own.features[at], own)
        assert carried.kept == pytest.approx(1.0)
        torch.testing.assert_close(carried.direction, own.tangents[at])
    other = basis(2)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)[:, None]
    flipped = Leading(other.tangents * signs, other.stretches, other.features * signs)
    for one in own.features:
        plain, turned = transported(one, other), transported(one, flipped)
        torch.testing.assert_close(plain.direction, turned.direction)
        assert 0.0 < plain.kept <= 1.0
        assert float(plain.direction.norm()) == pytest.approx(1.0)


def test_a_full_basis_keeps_all_of_a_direction() -> None:
    full = basis(3, rows=M)
    assert transported(basis(1).features[0], full).kept == pytest.approx(1.0)


def test_what_a_basis_holds_nothing_of_is_carried_nowhere() -> None:
    whole = span(1, 2 * N)
    carried = transported(whole[-1], Leading(span(2, N, D), torch.ones(N), whole[:N]))
    assert carried.kept < 1e-12


def test_finishing_gives_singular_pairs_of_what_the_rows_span() -> None:
    jacobian = random(M, D, seed=5)
    rows = span(6, N, D)
    found = finished(rows, rows @ jacobian.mT, 3)
    torch.testing.assert_close(found.tangents @ jacobian.mT, found.stretches[:, None] * found.features)
    torch.testing.assert_close(found.tangents @ found.tangents.mT, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(found.features @ found.features.mT, torch.eye(3, dtype=torch.float64))
    assert found.stretches.tolist() == sorted(found.stretches.tolist(), reverse=True)
    largest = found.tangents.abs().argmax(dim=1)
    assert (found.tangents[torch.arange(3), largest] > 0).all()


def test_signs_are_fixed_by_the_largest_entry_and_pairs_stay_pairs() -> None:
    tangents, features = random(N, D), random(N, M, seed=1)
    one, two = with_fixed_signs(tangents, features), with_fixed_signs(-tangents, -features)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(with_fixed_signs(-tangents, features)[1], -one[1])


def test_the_mean_of_equal_subspaces_is_their_own_and_of_two_lies_between_them() -> None:
    one = span(1)
    same = mean_directions(torch.stack([one, -one]), N)
    assert geodesic_distance(same, one) < 1e-7
    angle = torch.tensor([0.0, 0.5], dtype=torch.float64)
    lines = torch.stack([angle.cos(), angle.sin()], dim=1)[:, None]  # (2, 1, 2)
    (middle,) = mean_directions(lines, 1)
    assert float(torch.atan2(middle[1], middle[0])) == pytest.approx(0.25)


def test_a_spectrum_adds_up_to_one_and_puts_a_wave_where_its_frequency_is() -> None:
    assert float(power_spectrum(random(N, 3, 16, 12)).sum()) == pytest.approx(1.0)
    constant = power_spectrum(torch.ones((1, 2, 8, 8)))
    assert float(constant[0]) == pytest.approx(1.0)
    place = torch.arange(16, dtype=torch.float64)
    wave = torch.cos(2 * math.pi * 5 * place / 16).expand(1, 1, 16, 16)
    assert float(power_spectrum(wave)[5]) == pytest.approx(1.0)
