"""What tests share: of scoring a perfect model, a hopeless one and a bundle of another world; of training a
small pool."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from conceptmaster.examples.sprites.scoring.score import Generate, judged_scene
from conceptmaster.examples.sprites.training import shards, train_vae
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pool of a few clips with their latents, and the VAE that these are of beside it."""
    root = tmp_path_factory.mktemp("pool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", CLIPS)
        shards.draw_shard(root, 0)
        shards.draw_shard(root, 1)
        vae = train_vae.new_vae(small_config().vae)
        train_vae.analyse(vae, root, clips=3 * CLIPS)
        train_vae.write_vae(vae, root, small_config().vae)
        for shard in shards.shard_folders(root):
            shards.encode_shard(shard, lambda video: vae.encode(train_vae.to_tensor(video)).numpy())
    return root
