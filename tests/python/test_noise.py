"""The noise of variations."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from starweave_image.pictures.noise import Between, slerp


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1 / 3, 0.5, 1.0])
def test_the_way_is_an_arc_and_each_part_of_it_the_same_angle(fraction: float) -> None:
    a, b = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    at = slerp(a, b, fraction)
    torch.testing.assert_close(at.norm(), torch.tensor(2.0))
    assert math.atan2(at[1, 0], at[0, 0]) == pytest.approx(fraction * math.pi / 2, abs=1e-6)


def test_on_the_way_noise_has_the_spread_of_noise() -> None:
    a, b = torch.randn(100_000, generator=seeded(1)), torch.randn(100_000, generator=seeded(2))
    assert slerp(a, b, 0.5).std() == pytest.approx(1.0, abs=0.01)
    # And no straight line has.
    assert (0.5 * a + 0.5 * b).std() < 0.75


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_ends_and_what_is_equal_are_exact(dtype: torch.dtype) -> None:
    a, b = (torch.randn(1, 4, 64, 64, generator=seeded(seed), dtype=dtype) for seed in (1, 2))
    assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)
    assert torch.equal(slerp(a, a.clone(), 0.3), a)
    assert slerp(a, b, 0.3).dtype == dtype


def test_only_draws_of_that_generator_in_this_thread_are_changed() -> None:
    base, elsewhere = seeded(1), []
    with Between(base, seeded(2), 0.5):
        drawn = torch.randn(8, generator=base)
        other = torch.randn(8, generator=seeded(1))
        thread = threading.Thread(target=lambda: elsewhere.append(torch.randn(8, generator=seeded(1))))
        thread.start()
        thread.join()
    plain = torch.randn(8, generator=seeded(1))
    assert torch.equal(other, plain) and torch.equal(elsewhere[0], plain)
    assert torch.equal(drawn, slerp(plain, torch.randn(8, generator=seeded(2)), 0.5))
    # The generator was drawn from once, and no more than usual.
    torch.randn(8, generator=(usual := seeded(1)))
    assert torch.equal(torch.randn(8, generator=base), torch.randn(8, generator=usual))
