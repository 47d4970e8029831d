"""Noise that says where what has no told place will be."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
import torch

from conceptmaster.examples.stickers.training.placing import (
    NINTHS,
    NOBODY,
    brightness,
    ninths,
    placing_noise,
    spot_of,
)
from conceptmaster.examples.stickers.world.looks import Look
from conceptmaster.examples.stickers.world.scenes import Actor


def noise(count: int, frames: int = 5) -> torch.Tensor:
    return torch.randn(count, 6, frames, 8, 8, generator=torch.Generator().manual_seed(frames))


def test_every_cell_is_of_one_ninth() -> None:
    found = ninths(8, 8)
    assert (found.sum(0) == 1).all()
    assert found.sum((1, 2)).tolist() == [9, 6, 9, 6, 4, 6, 9, 6, 9]


@pytest.mark.parametrize(("x", "y", "ninth"), [(10, 10, 0), (32, 10, 1), (54, 54, 8), (21.9, 42.1, 6)])
def test_a_place_is_in_the_ninth_of_its_cell(x: float, y: float, ninth: int) -> None:
    def actor(cell: tuple[int, int] | None) -> Actor:
        return Actor(0, Look(), "fox", "fox", "fox", "", 10.0, (x, y), cell, "still")

    assert spot_of(actor(None)) == ninth and spot_of(actor((0, 0))) == NINTHS + ninth
    assert ninths(8, 8)[ninth, int(y // 8), int(x // 8)] == 1


@pytest.mark.parametrize("frames", [5, 2])
def test_the_brightest_ninths_are_those_of_the_concepts_in_turn(frames: int) -> None:
    spots = torch.tensor([[3, NOBODY, NOBODY, NOBODY], [8, 0, 4, NOBODY], [NINTHS + 2, 5, 5, 7]])
    before = noise(3, frames)
    after = brightness(placing_noise(before, spots))
    assert after[0].argmax() == 3
    assert after[1].argsort(descending=True)[:3].tolist() == [8, 0, 4]
    others = [n for n in range(NINTHS) if n != 2]  # of which the first is the fifth's, the next the seventh's
    assert [others[k] for k in after[2, others].argsort(descending=True)[:2].tolist()] == [5, 7]
    assert torch.allclose(after.sort().values, brightness(before).sort().values, atol=1e-5)
    assert torch.allclose(after[2, 2], brightness(before)[2, 2], atol=1e-5)  # where one is told to be


def test_told_places_and_empty_captions_leave_noise_alone() -> None:
    spots = torch.tensor([[NINTHS, NINTHS + 4, NOBODY, NOBODY], [NOBODY] * 4])
    assert torch.equal(placing_noise(noise(2), spots), noise(2))


def test_nothing_else_of_the_noise_changes() -> None:
    before, spots = noise(200), torch.randint(NINTHS, (200, 4), generator=torch.Generator().manual_seed(1))
    after = placing_noise(before, spots)
    assert torch.equal(after[:, 4:], before[:, 4:])
    cells = ninths(8, 8)
    for each in cells.bool():  # within a ninth all is moved alike
        moved = (after - before)[:, :4, :, each].flatten(1)
        assert torch.allclose(moved, moved[:, :1].expand_as(moved), atol=1e-5)


def test_of_all_places_together_the_noise_is_normal() -> None:
    """As likely any ninth, and independent: means, variances and covariances of 40,000 are a normal's."""
    g = torch.Generator().manual_seed(2)
    count = 40_000
    before = torch.randn(count, 4, 1, 8, 8, generator=g)
    spots = torch.rand(count, NINTHS, generator=g).argsort(1)[:, :2]
    found = brightness(placing_noise(before, spots))
    assert (found.mean(0)).abs().max() < 0.03
    assert (torch.cov(found.T) - torch.eye(NINTHS)).abs().max() < 0.04
    assert ((found**4).mean(0) - 3).abs().max() < 0.25
