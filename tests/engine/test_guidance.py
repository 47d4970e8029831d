"""Guidance by projection, against Bernini's recipe restated in float64."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.engine.guidance import projected  # noqa: E402


def recipe(velocities, z, sigma, scales, dtype=torch.float64):
    """x of each branch, a chain of differences, each clipped to 50 and projected, and back to a velocity."""
    x = [(z - sigma * v).to(dtype) for v in velocities]
    total = x[0]
    for scale, before, after in zip(scales, x, x[1:], strict=False):
        d = after - before
        d = d * torch.minimum(torch.ones_like(d), 50.0 / d.norm(p=2, dim=[-1, -2, -4], keepdim=True))
        unit = torch.nn.functional.normalize(after.double(), dim=[-1, -2, -4])
        along = (d.double() * unit).sum(dim=[-1, -2, -4], keepdim=True) * unit
        total = total + scale * ((d.double() - along) + 0.5 * along).to(dtype)
    return (z - total) / sigma


@pytest.mark.parametrize("size", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("sigma", [0.999, 0.5, 0.0925])
@pytest.mark.parametrize(
    ("weights", "scales"),
    [
        ((1 - 4.5, 0.5, 4.0), (4.5, 4.0)),
        ((-2.0, 3.0), (3.0,)),
        ((1.0,), ()),
        ((1 - 3.0, -1.0, 4.0), (3.0, 4.0)),
    ],
)
def test_the_recipe(size, sigma, weights, scales):
    """Differences far below, around and far above the longest: frames differ in it."""
    g = torch.Generator().manual_seed(0)
    v = torch.randn(len(weights), 16, 3, 6, 10, generator=g) * size
    v[:, :, 1] *= 0.01
    z = torch.randn(1, 16, 3, 6, 10, generator=g)
    found = projected(v, z, torch.tensor([sigma]), torch.tensor(weights))
    exact = recipe(v[:, None].double(), z.double(), sigma, scales)
    assert found.dtype == torch.float32 and found.shape == exact.shape
    assert ((found - exact).norm() / exact.norm()).item() < 2e-6
    alike = recipe(v[:, None], z, torch.tensor(sigma), scales, torch.float32)  # as its program computes it
    assert ((found - alike).norm() / exact.norm()).item() < 1e-4 * max(1, 0.1 / size) / sigma
    if len(weights) > 1:
        linear = (torch.tensor(weights)[:, None, None, None, None] * v).sum(0, keepdim=True)
        assert ((found - linear).norm() / exact.norm()).item() > 1e-3


def test_branches_that_are_alike_are_not_guided():
    """A difference of zero has no direction."""
    v = torch.ones(3, 4, 2, 3, 3)
    found = projected(v, torch.zeros(1, 4, 2, 3, 3), torch.tensor([0.5]), torch.tensor([-3.5, 0.5, 4.0]))
    torch.testing.assert_close(found, v[:1])
    nothing = projected(0 * v, 0 * v[:1], torch.tensor([0.5]), torch.tensor([-3.5, 0.5, 4.0]))
    assert not nothing.any()
