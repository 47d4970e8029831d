"""Decoding in tiles: graphs of a tile's size, and the frames that diffusers' decoder gives of each tile."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest

from conceptmaster.errors import BundleError

torch = pytest.importorskip("torch")

HEIGHT, WIDTH, TILE = 48, 64, 32


@pytest.fixture(scope="module")
def source():
    """The tiny preset for a video of 6 by 8 latents."""
    from conceptmaster.engine.checkpoints.source import random_source
    from conceptmaster.engine.presets import preset

    return random_source(dataclasses.replace(preset("tiny"), height=HEIGHT, width=WIDTH))


@pytest.fixture(scope="module")
def tiled(source, bundle, taken_from, tmp_path_factory):
    """Its bundle, which decodes 4 by 4 latents at a time. Not to be changed."""
    from conceptmaster.export.bundle import write_bundle

    folder = tmp_path_factory.mktemp("tiles") / "tiled"
    with taken_from(bundle, "text_encoder", "image_encoder", "qformer", "dam", "condition"):
        write_bundle(source, folder, tile=(TILE, TILE))
    return folder


@torch.no_grad()
def test_a_tiled_bundle_gives_the_tiles_of_diffusers(source, tiled):
    """Wan's decoder sees all of a tile: it is the same only if each has a state of its own."""
    from conceptmaster.runtime.pipeline import Pipeline

    pipeline = Pipeline.from_bundle(tiled, threads=1)
    latents = np.random.default_rng(0).standard_normal((4, 2, 6, 8), np.float32)
    steps = []
    found = pipeline._decode(latents, lambda: steps.append(1))

    sums, weights = np.zeros((5, HEIGHT, WIDTH, 3)), np.zeros((HEIGHT, WIDTH, 1))
    mean, std = (torch.tensor(source.vae.config[f"latents_{n}"]).view(-1, 1, 1, 1) for n in ("mean", "std"))
    for top, left in itertools.product((0, 2), (0, 2, 4)):  # of latents; they share two, so 16 pixels
        part = torch.from_numpy(latents[:, :, top : top + 4, left : left + 4]) * std + mean
        frames = (source.vae.decode(part[None]).sample[0].permute(1, 2, 3, 0) + 1) / 2
        # one on the video's border, else rising from the edge to a latent, 8 pixels, inside
        rise = np.minimum((np.arange(TILE) + 0.5) / 8, 1)
        y = np.minimum(rise if top else 1, rise[::-1] if top < 2 else 1)
        x = np.minimum(rise if left else 1, rise[::-1] if left < 4 else 1)
        own = (y * np.ones(TILE))[:, None, None] * (x * np.ones(TILE))[:, None]
        place = (slice(8 * top, 8 * top + TILE), slice(8 * left, 8 * left + TILE))
        sums[:, *place] += frames.numpy() * own
        weights[place] += own
    expected = 255 * sums / weights
    assert len(steps) == 6 * 2 and found.shape == expected.shape and found.dtype == np.uint8
    assert expected.std() > 5 and abs(found - expected).max() <= 1.0
    whole = 255 * (source.vae.decode(torch.from_numpy(latents)[None] * std + mean).sample + 1) / 2
    assert abs(whole[0].permute(1, 2, 3, 0).numpy() - found).max() > 1  # not for nothing


def test_what_a_tiled_bundle_is(source, tiled, command):
    from conceptmaster.export.verify import verify
    from conceptmaster.runtime.bundle_format.find import Bundle
    from conceptmaster.runtime.bundle_format.manifest import load
    from conceptmaster.runtime.bundle_format.schema import Tile

    manifest = load(tiled)
    assert manifest.tile == Tile((4, 4), (1, 1)) and manifest.shapes.latent == (4, 2, 6, 8)
    for name, frames in (("decode_first", 1), ("decode", 4)):
        graph = manifest.graphs[name]
        assert graph.input("latents").shape == (1, 4, 1, 4, 4)
        assert graph.output("frames").shape == (frames, TILE, TILE, 3)
    assert all(row.ok for row in verify(Bundle.open(tiled), source))
    code, out, _ = command("inspect", tiled)
    assert code == 0 and "decoding  in tiles of 32×32, which share 8×8 pixels at least" in out


def test_the_pipeline_decodes_in_tiles(source, tiled, tmp_path):
    """Whole videos, previews, and the torch backend, which gives the same."""
    from conceptmaster.engine.checkpoints.safetensors_io import save, save_model
    from conceptmaster.runtime.backends.pytorch.options import TorchOptions
    from conceptmaster.runtime.pipeline import Pipeline

    save_model(source.model, tmp_path / "model.safetensors")
    save(tmp_path / "vae.safetensors", source.vae.state_dict())
    previews, videos = [], []
    for backend, options in (("onnxruntime", None), ("torch", TorchOptions(weights=tmp_path))):
        pipeline = Pipeline.from_bundle(tiled, threads=1, backend=backend, options=options)
        video = pipeline("a ball", steps=2, callback=lambda *args: previews.append(args[2]()))
        videos.append(video.frames.astype(int))
    assert [preview.shape for preview in previews] == [(HEIGHT, WIDTH, 3)] * 4
    assert videos[0].shape == (5, HEIGHT, WIDTH, 3) and abs(videos[0] - videos[1]).max() <= 1
    assert abs(previews[1].astype(int) - videos[0][0]).max() <= 1  # the last estimate is the video's start


def test_tiles_that_cannot_be(command, tmp_path):
    for size, nearest in (("33x32", "32x32"), ("16x70", "32x72"), ("0x64", "32x64")):
        result = command("export", "preset:tiny", "--output", tmp_path / "new", "--tile", size)
        assert result[:2] == (2, "") and result[2].count("\n") == 1
        assert f"a tile cannot be {size}" in result[2] and f"the nearest that works is {nearest}" in result[2]


def test_a_manifest_s_tile_must_fit(tiled, tmp_path):
    import hashlib

    from conceptmaster.runtime.bundle_format import manifest as manifests
    from conceptmaster.runtime.bundle_format import strict_json

    own = shutil.copytree(tiled, tmp_path / "own")
    data = json.loads((own / "manifest.json").read_text())
    del data["checksum"]
    for size, message in (([8, 4], "larger than the video"), ([4, 5], "wants 'latents'")):
        data["tile"]["size"] = size
        checksum = hashlib.sha256(strict_json.canonical(data)).hexdigest()
        (own / "manifest.json").write_text(json.dumps(data | {"checksum": checksum}))
        with pytest.raises(BundleError, match=message):
            manifests.load(own)


def test_a_tile_as_large_as_the_video_is_none():
    from conceptmaster.engine.presets import preset
    from conceptmaster.export.recipes import tile_of
    from conceptmaster.runtime.bundle_format.schema import Tile

    config = preset("wan2.1-1.3b")
    assert tile_of(config, None) is tile_of(config, (832, 480)) is tile_of(config, (1024, 512)) is None
    assert tile_of(config, (256, 256)) == Tile((32, 32), (8, 8))
    assert tile_of(config, (1024, 128)) == Tile((16, 104), (4, 26))
