import numpy as np
import pytest
import torch

from conceptmaster.engine.model import ConceptMaster
from conceptmaster.examples.stickers.training.windows import only, random_window

from ..small import small_config


@torch.no_grad()
@pytest.mark.parametrize("frames", [slice(0, 2), slice(3, 5)])
def test_some_frames_are_where_they_are_in_the_whole(frames):
    torch.manual_seed(0)
    transformer = ConceptMaster(small_config()).transformer.eval()
    latents = torch.randn(2, 192, 5, 8, 8)
    placed, (cos, sin) = transformer.positions(latents)
    with only(transformer, frames):
        part, (part_cos, part_sin) = transformer.positions(latents[:, :, frames])
    assert torch.equal(part, placed[:, :, frames])
    rows = slice(frames.start * 16, frames.stop * 16)  # 4x4 tokens of a frame
    assert torch.equal(part_cos, cos[rows]) and torch.equal(part_sin, sin[rows])
    again, _ = transformer.positions(latents)
    assert torch.equal(again, placed)


def test_windows_lie_anywhere_in_so_many_of_the_steps():
    rng = np.random.default_rng(0)
    found = [random_window(rng, 5, 0.7, 2) for _ in range(400)]
    assert 0.6 < sum(each is not None for each in found) / 400 < 0.8
    assert {each.start for each in found if each is not None} == {0, 1, 2, 3}
    assert all(each.stop - each.start == 2 for each in found if each is not None)
    assert random_window(rng, 5, 0.0, 2) is None
