"""Clips drawn where a model is trained: the same pixels as the world's own drawing, and a pool that renews
itself the same way each time."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from conceptmaster.engine.checkpoints.safetensors_io import load_model
from conceptmaster.examples.sprites.training import (
    batches,
    clip_arrays,
    drawn,
    learning,
    train_model,
    train_vae,
)
from conceptmaster.examples.sprites.world import draw, paint_many, scene_arrays, shapes
from conceptmaster.examples.sprites.world.decoys import decoy
from conceptmaster.examples.sprites.world.scenes import (
    ACCESSORIES,
    BACKGROUNDS,
    MAX_CONCEPTS,
    NOUNS,
    SIZE,
    TEXTURES,
    Actor,
    Identity,
    random_identity,
    random_scene,
)
from conceptmaster.examples.sprites.world.vocabulary import build_tokenizer

from ..small import how_it_runs, small_config, train_small

SCENES = 24
CLIPS = 18


@pytest.fixture(scope="module")
def scenes():
    return [random_scene(seed, held_out=False) for seed in range(SCENES)]


@pytest.fixture(scope="module")
def arrays():
    found = scene_arrays.scene_arrays(0, SCENES)
    return {name: torch.from_numpy(value) for name, value in found.items() if value.dtype != object}


def random(seed: int, key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, key]))


def of_concepts(arrays):
    """Row and column of every concept that there is."""
    return torch.nonzero(torch.arange(MAX_CONCEPTS) < arrays["count"][:, None], as_tuple=True)


def test_many_sprites_are_painted_as_each_alone_is():
    """Every noun with every texture and accessory, turned and leaning, at one pixel size each."""
    rng = np.random.default_rng(0)
    kinds = [(n, t, a) for n in NOUNS for t in TEXTURES for a in ACCESSORIES]
    drawn_looks = [random_identity(rng, held_out=False) for _ in kinds]
    each = [
        dataclasses.replace(look, texture=t, accessory=a)
        for look, (_, t, a) in zip(drawn_looks, kinds, strict=True)
    ]
    angle, pixel, turned = rng.uniform(-2, 2, (3, len(kinds))).astype(np.float32)
    pixel = 0.05 + 0.05 * abs(pixel)
    axis = np.linspace(-1.5, 1.5, 24, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    c, s = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    u, v = x * c + y * s, y * c - 0.9 * x * s
    actors = zip([noun for noun, _, _ in kinds], each, strict=True)
    cast = clip_arrays.cast_of([Actor(noun, noun, look, 1, (0, 0), (1, 1), "still") for noun, look in actors])
    many = paint_many.paint_many(cast, *(torch.from_numpy(array) for array in (u, v, pixel, turned)))
    for k, (noun, _, _) in enumerate(kinds):
        rgb, alpha = shapes.paint_sprite(noun, each[k], u[k], v[k], float(pixel[k]), float(turned[k]))
        assert np.abs(many[k, ..., :3].numpy() - rgb).max() < 2e-4, kinds[k]
        assert np.abs(many[k, ..., 3].numpy() - alpha).max() < 2e-4, kinds[k]


@pytest.mark.parametrize("astray", [False, True])
def test_clips_are_the_worlds_own(astray, scenes, arrays):
    ground = np.stack([draw.paint_background(s.background, random(s.seed, 7)) for s in scenes])
    cast = clip_arrays.looks_of(arrays, "decoy_" if astray else "")
    clips, visible = paint_many.draw_clips(cast, arrays, torch.from_numpy(ground.astype(np.float32)))
    found = clip_arrays.coverage(visible).numpy()
    for k, scene in enumerate(scenes):
        true, masks = draw.draw_clip(decoy(scene, random(scene.seed, 13)) if astray else scene)
        apart = np.abs(true.astype(int) - clips[k].numpy())
        assert apart.max() <= 2 and (apart > 0).mean() < 1e-4
        count = len(scene.actors)
        cells = masks.reshape(count, 17, 8, 8, 8, 8).mean((3, 5))
        cells = np.concatenate([cells[:, :1], cells[:, 1:].reshape(count, 4, 4, 8, 8).mean(2)], axis=1)
        assert np.abs(cells * 255 - found[k, :count]).max() <= 1.01
        assert not found[k, count:].any()


def test_portraits_and_what_is_told_of_textures_are_the_worlds_own(scenes, arrays):
    rows, columns = of_concepts(arrays)
    cast = {name: value[rows, columns] for name, value in clip_arrays.looks_of(arrays, "").items()}
    told = clip_arrays.targets_of(cast)
    for k, (row, column) in enumerate(zip(rows, columns, strict=True)):
        actor = scenes[row].actors[column]
        centre = np.full((1, 2), 16, np.float32)
        (rgb,), (alpha,) = draw.paint_along(actor.noun, actor.identity, 0.35 * 32, centre, size=32)
        upright = 255 * (0.5 * (1 - alpha[..., None]) + rgb).clip(0, 1)
        assert np.abs(upright - told["portraits"][k].numpy()).max() <= 1
        np.testing.assert_allclose(told["patterns"][k].numpy(), how_it_runs(actor.identity), atol=1e-5)


def test_references_show_the_concept_in_poses_of_their_own(arrays):
    rows, columns = of_concepts(arrays)
    cast = {name: value[rows, columns] for name, value in clip_arrays.looks_of(arrays, "").items()}
    first, other = (paint_many.draw_references(cast, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    again = paint_many.draw_references(cast, torch.Generator().manual_seed(0))
    assert first.shape == (len(rows), SIZE, SIZE, 3) and torch.equal(first, again)
    corners = first[:, [0, -1]][:, :, [0, -1]].flatten(1, 2)
    assert (corners.amax(-1) >= 0.8 * 255 - 1).float().mean() > 0.9  # plain, light ground
    assert ((first.int() - other.int()).abs().amax((1, 2, 3)) > 60).all()
    body = (cast["body"] * 255).round()[:, None]
    for picture in (first, other):
        near = ((picture.flatten(1, 2).float() - body).abs().amax(-1) < 2).sum(1)
        assert (near >= 20).all()  # its own colour is in both


def test_colours_are_told_as_pythons_colorsys_tells_them():
    import colorsys

    values = np.random.default_rng(0).random((64, 3)).astype(np.float32)
    found = paint_many.hsv(*torch.from_numpy(values).unbind(1))
    expected = [colorsys.hsv_to_rgb(*map(float, row)) for row in values]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_scenes_are_told_in_tokens_and_nothing_is_held_out(scenes):
    found = scene_arrays.tokenised(scene_arrays.scene_arrays(0, SCENES), 48, 8)
    words = build_tokenizer()
    for k, scene in enumerate(scenes):
        ids = words.encode(scene.caption).ids
        assert found["token_ids"][k, : len(ids)].tolist() == ids
        assert found["token_mask"][k].sum() == len(ids)
        assert list(BACKGROUNDS)[found["background"][k]] == scene.background
        for n, actor in enumerate(scene.actors):
            label = words.encode(actor.label).ids
            assert found["label_ids"][k, n][found["label_mask"][k, n]].tolist() == label
            assert found["foreign_noun"][k, n] != found["noun"][k, n] == NOUNS.index(actor.noun)
        assert not found["label_mask"][k, len(scene.actors) :].any()
        assert not found["label_ids"][k, len(scene.actors) :].any()
    rows, columns = np.nonzero(np.arange(MAX_CONCEPTS) < found["count"][:, None])
    for row, column in zip(rows, columns, strict=True):
        at = {name: found[name][row, column] for name in scene_arrays.LOOKS}
        colours = {name: tuple(map(float, at[name])) for name in ("body", "second", "accent")}
        texture, accessory = TEXTURES[at["texture"]], ACCESSORIES[at["accessory"]]
        look = Identity(**colours, texture=texture, period=0.6, angle=0.0, accessory=accessory)
        assert not look.held_out


@pytest.fixture(scope="module")
def make_pool(folder):
    vae, made = train_vae.load_vae(folder), []

    def make(done=0, seed=0):
        drawing = drawn.Drawing(CLIPS, seed)
        made.append(drawn.DrawnPool(small_config(), vae, drawing, "cpu", done))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_pool_renews_its_oldest_block_and_whoever_resumes_has_the_same(make_pool):
    going = make_pool()
    before = {name: value.clone() for name, value in going.arrays.items()}
    going.refresh()
    kept = slice(going.block, None)
    assert torch.equal(going.arrays["latents"][kept], before["latents"][kept])
    fresh = going.arrays["latents"][: going.block].flatten(1).float()
    assert float((fresh - before["latents"][: going.block].flatten(1).float()).abs().amax(1).min()) > 0.1
    resumed, other = make_pool(done=1), make_pool(seed=1)
    for name, value in going.arrays.items():
        assert torch.equal(value.nan_to_num(9), resumed.arrays[name].nan_to_num(9)), name
    assert not torch.equal(other.arrays["latents"], before["latents"])
    batch = going.batch(np.random.default_rng(0), 16, batches.Dropped(foreign=0.5))
    alike = resumed.batch(np.random.default_rng(0), 16, batches.Dropped(foreign=0.5))
    assert torch.equal(batch.pixels, alike.pixels) and torch.equal(batch.latents, alike.latents)
    captions = going.captions(np.random.default_rng(0), 8)
    assert captions.token_mask.any(1).all() and captions.coverage.amax() <= 1


def test_what_a_pool_holds_belongs_together(make_pool, folder):
    there, vae = make_pool().arrays, train_vae.load_vae(folder)
    scenes = [random_scene(seed, held_out=False) for seed in range(CLIPS)]
    assert there["count"].tolist() == [len(scene.actors) for scene in scenes]
    for k, scene in enumerate(scenes):
        for n, actor in enumerate(scene.actors):
            look = actor.identity
            told = TEXTURES.index(look.texture), ACCESSORIES.index(look.accessory), NOUNS.index(actor.noun)
            assert tuple(there["traits"][k, n].tolist()) == told
            assert there["coverage"][k, n].any() and there["references"][k, n].any()
        empty = slice(len(scene.actors), None)
        assert not there["coverage"][k, empty].any() and (there["portraits"][k, empty] == 128).all()
        assert there["patterns"][k, empty].isnan().all()
        found = []
        for ground in scene_arrays.backgrounds(scene.background, 2):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(draw, "paint_background", lambda *_, ground=ground: ground.astype(np.float32))
                clip = draw.draw_clip(scene)[0]
            latents = vae.encode(train_vae.from_bytes(torch.from_numpy(clip[None])))[0]
            found.append(float((latents - there["latents"][k].float()).abs().max()))
        assert min(found) < 0.02 < sorted(found)[1]  # one of these backgrounds, and the scene before it


def test_what_is_judged_by_is_held_out_and_always_the_same(folder, monkeypatch):
    monkeypatch.setattr(drawn, "JUDGED", 8)
    first, again = (drawn.judging_pool(small_config(), train_vae.load_vae(folder), "cpu") for _ in range(2))
    scenes = [random_scene(seed, held_out=True) for seed in range(8)]
    for k, scene in enumerate(scenes):
        kinds = [
            (TEXTURES.index(actor.identity.texture), ACCESSORIES.index(actor.identity.accessory))
            for actor in scene.actors
        ]
        assert [tuple(each) for each in first.arrays["traits"][k, : len(kinds), :2].tolist()] == kinds
    for name, value in first.arrays.items():
        assert torch.equal(value.nan_to_num(9), again.arrays[name].nan_to_num(9)), name


@pytest.mark.parametrize("held_out", [False, True])
def test_clips_without_pictures_are_the_worlds_own_on_their_own_backgrounds(held_out, monkeypatch):
    monkeypatch.setitem(clip_arrays.AT_ONCE, "cpu", 4)
    for seed, clip in enumerate(clip_arrays.draw_videos(6, "cpu", held_out).numpy()):
        true = draw.draw_clip(random_scene(seed, held_out=held_out))[0]
        assert np.abs(true.astype(int) - clip).max() <= 2


@pytest.mark.slow
def test_a_training_on_drawn_clips_resumes_to_the_same_weights(
    pool,
    make_pool,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(train_model, "REFRESHED", 2)
    asked = []

    def open_data(done):
        asked.append(done)
        return make_pool(done)

    def train(output):
        how = {"steps": 6, "picture_steps": 1, "caption_steps": 1}
        train_small(pool, output, open_data, **how)
        return load_model(output / "model.safetensors").state_dict()

    whole = train(tmp_path / "whole")
    step, calls = learning.MuonAdamW.step, []

    def stop_at_the_fourth(self):
        calls.append(1)
        if len(calls) == 6:  # one on pictures, one on captions, and the fourth of these
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(learning.MuonAdamW, "step", stop_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts")
    resumed = train(tmp_path / "parts")
    assert asked == [0, 0, 1]
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_the_progress_of_a_broken_checkpoint_is_not_read(tmp_path):
    file = tmp_path / "training.safetensors"
    file.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(learning.CheckpointError, match="is not a whole checkpoint"):
        learning.saved_progress(file)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_blocks_train_alike(pool, tmp_path):
    found = []
    for compiled in (False, True):
        output = tmp_path / str(compiled)
        train_small(pool, output, steps=2, compile=compiled)
        found.append(load_model(output / "model.safetensors").state_dict())
    plain, faster = found
    for name, value in plain.items():
        if value.is_floating_point():
            torch.testing.assert_close(faster[name], value, atol=5e-3, rtol=0.05)
