"""What tests share: of scoring a perfect model, a hopeless one and a bundle of another world; of training a
small pool."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from conceptmaster.examples.sprites.scoring.judging import Generate
from conceptmaster.examples.sprites.scoring.score import judged_scene
from conceptmaster.examples.sprites.training import clip_arrays, drawn, train_vae
from conceptmaster.examples.sprites.world.draw import draw_clip
from conceptmaster.examples.sprites.world.scenes import FPS, FRAMES, SIZE
from conceptmaster.examples.sprites.world.vocabulary import build_tokenizer
from conceptmaster.runtime.request import Request
from conceptmaster.runtime.video import Video

from .small import CLIPS, small_config


@pytest.fixture
def truth() -> Generate:
    """Answers every request, of any row, with its true video."""

    def generate(request: Request) -> Video:
        rows = [(2, False), (2, True), (3, False)]
        scenes = [judged_scene(request.seed, *row) for row in rows]
        (scene,) = [scene for scene in scenes if scene.caption == request.prompt]
        return Video(draw_clip(scene)[0], FPS, request.seed)

    return generate


@pytest.fixture
def noise() -> Generate:
    """Answers every request with noise."""

    def generate(request: Request) -> Video:
        rng = np.random.default_rng(request.seed)
        return Video(rng.integers(0, 256, (FRAMES, SIZE, SIZE, 3), np.uint8), FPS, request.seed)

    return generate


@pytest.fixture
def other_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bundle is one of another world."""
    shapes = SimpleNamespace(frames=81, height=480, width=832)
    bundle = SimpleNamespace(manifest=SimpleNamespace(name="wan", shapes=shapes))
    monkeypatch.setattr("conceptmaster.runtime.bundle_format.find.Bundle.open", lambda name: bundle)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The VAE of a few clips, as `train` leaves it."""
    root = tmp_path_factory.mktemp("vae")
    vae = train_vae.new_vae(small_config().vae)
    train_vae.analyse(vae, clip_arrays.draw_videos(CLIPS, "cpu"))
    train_vae.write_vae(vae, root, small_config().vae)
    return root


@pytest.fixture(scope="session")
def pool(folder):
    """A few clips, their latents normalised by other numbers than 0 and 1."""
    config = small_config()
    channels = config.vae["z_dim"]
    numbers = {"latents_mean": [0.1] * channels, "latents_std": [0.5] * channels}
    config = dataclasses.replace(config, vae=config.vae | numbers)
    pool = drawn.DrawnPool(config, train_vae.load_vae(folder), drawn.Drawing(CLIPS, videos=True), "cpu")
    pool.close()
    return pool
