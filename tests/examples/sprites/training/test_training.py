"""The sprites training: every variant learns and exports, a stop loses nothing, and a broken checkpoint is
named."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch

from conceptmaster.engine.checkpoints.safetensors_io import load, load_model, save_model
from conceptmaster.engine.encoders import CLIP_MEAN, CLIP_STD
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.engine.presets import preset
from conceptmaster.errors import InputError
from conceptmaster.examples.sprites import processes
from conceptmaster.examples.sprites.training import (
    attention,
    batches,
    clip_arrays,
    drawn,
    learning,
    loop,
    noising,
    starting,
    train_model,
    train_pictures,
    train_vae,
)
from conceptmaster.examples.sprites.training import train as train_stages
from conceptmaster.examples.sprites.training.cli import add_train_arguments
from conceptmaster.examples.sprites.training.options import FROZEN
from conceptmaster.examples.sprites.world import decoys, shapes
from conceptmaster.examples.sprites.world.scenes import (
    ACCESSORIES,
    NOUNS,
    PERIODS,
    PLACES,
    TEXTURES,
    random_scene,
)
from conceptmaster.examples.sprites.world.vocabulary import build_tokenizer, tokenise

from ..small import CLIPS, how_it_runs, small_config, train_small

COMPONENTS = preset("sprites").vae["z_dim"]
VARIANTS = [
    {},
    {"injection": "shared_query"},
    {"injection": "merged"},
    {"encoder": "mlp"},
    {"binding": "none"},
    {"binding": "concat_mlp"},
    {"binding": "self_attention"},
]


@pytest.fixture(autouse=True)
def few_are_drawn(monkeypatch):
    monkeypatch.setattr(train_pictures, "JUDGED", 32)
    monkeypatch.setattr(train_vae, "CLIPS", CLIPS)


def train(pool, output, steps, pictures=1, **concept):
    how = {"steps": steps, "picture_steps": pictures, "caption_steps": 2}
    train_small(pool, output, config=small_config(**concept), **how)
    return load_model(output / "model.safetensors")


def untrained(**concept):
    """A model in which nothing starts at zero."""
    torch.manual_seed(5)
    model = ConceptMaster(small_config(**concept))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def test_a_batch_is_of_the_pools_clips(pool):
    """Against the arrays themselves."""
    dropped = batches.Dropped(0.3, 0.2, 0.2, foreign=0.3)
    got = pool.batch(np.random.default_rng(0), 64, dropped)
    files = {name: value.numpy() for name, value in pool.arrays.items()}
    scenes = [random_scene(seed, held_out=False) for seed in range(CLIPS)]
    (empty,), _ = tokenise(build_tokenizer(), [""], 48)
    fates, order = set(), set()
    for b in range(64):
        latents = got.latents[b].numpy() * 0.5 + 0.1
        (k,) = [k for k in range(CLIPS) if np.abs(latents - files["latents"][k]).max() < 1e-4]
        np.testing.assert_allclose(got.decoys[b] * 0.5 + 0.1, files["decoys"][k], atol=1e-4)
        filled, actors = got.label_mask[b].any(-1), scenes[k].actors
        assert filled.sum() == len(actors)
        no_caption = bool((got.token_ids[b].numpy() == empty).all())
        ids, mask = tokenise(build_tokenizer(), ["" if no_caption else scenes[k].caption], 48)
        assert np.array_equal(got.token_ids[b], ids[0]) and np.array_equal(got.token_mask[b], mask[0])
        shown = bool(got.concept_mask[b].any())
        assert torch.equal(got.concept_mask[b], filled & shown)
        fates.add((no_caption, shown))
        order.add(tuple(filled.tolist()))
        for slot in torch.nonzero(filled)[:, 0]:
            spelled = [tokenise(build_tokenizer(), [actor.label], 8) for actor in actors]
            label = got.label_ids[b, slot].numpy(), got.label_mask[b, slot].numpy()
            (n,) = [n for n, (i, m) in enumerate(spelled) if np.array_equal((i[0], m[0]), label)]
            np.testing.assert_allclose(got.coverage[b, slot], files["coverage"][k, n] / 255, atol=1e-6)
            portrait = (got.portraits[b, slot].movedim(0, -1) + 1) * 127.5
            np.testing.assert_allclose(portrait, files["portraits"][k, n], atol=1e-3)
            assert got.traits[b, slot].tolist() == files["traits"][k, n].tolist()
            np.testing.assert_allclose(got.patterns[b, slot], how_it_runs(actors[n].identity), atol=1e-5)
            strange = bool(got.foreign[b, slot])
            views = files["foreign" if strange else "references"][k, n].reshape(-1, 64, 64, 3)
            seen = got.pixels[b, slot].movedim(0, -1) * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)
            assert sum(np.abs(seen.numpy() * 255 - view).max() < 0.01 for view in views) == 1
    assert fates == {(True, True), (True, False), (False, True), (False, False)} and len(order) > 3
    again = pool.batch(np.random.default_rng(0), 64, dropped)
    assert torch.equal(again.pixels, got.pixels)
    filled = got.label_mask.any(-1)
    assert float(got.foreign[filled].float().mean()) == pytest.approx(0.3, abs=0.15)
    assert not got.foreign[~filled].any()


def test_training_by_the_clock_ends_with_it(pool, tmp_path, monkeypatch):
    now, scales, step = [0.0], [], learning.MuonAdamW.step
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(learning.MuonAdamW, "step", lambda self: now.__setitem__(0, now[0] + 1) or step(self))
    set_scale = learning.MuonAdamW.set_scale
    monkeypatch.setattr(learning.MuonAdamW, "set_scale", lambda *a: scales.append(a[1]) or set_scale(*a))
    train_small(pool, tmp_path, steps=1, minutes=0.1)
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["seconds"] == last["step"] == 6
    assert scales[1:] == pytest.approx([learning.schedule(k / 6) for k in range(6)])  # first: as it is made
    assert load_model(tmp_path / "model.safetensors").config == small_config()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()) or "default")
def test_every_variant_trains(variant, pool, tmp_path):
    model = train(pool, tmp_path, 2, **variant)
    for field, value in variant.items():
        assert getattr(model.config.concept, field) == value
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    pictures, captions, record = (json.loads(line) for line in lines)
    assert pictures["phase"] == "pictures" and 0 <= pictures["held_out_texture"] <= 1
    assert captions["phase"] == "captions" and len(captions["story"]) == 1
    assert record["step"] == 2 and all(np.isfinite(v) for v in record.values())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [(train_pictures, "new_pictures"), (batches.Pool, "batch")])
def test_an_interrupted_training_resumes_to_the_same_weights(stage, pool, tmp_path, monkeypatch):
    whole = train(pool, tmp_path / "whole", 6, pictures=4)
    draw, calls = getattr(*stage), []

    def stop_at_the_fifth(*args, **how):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return draw(*args, **how)

    monkeypatch.setattr(*stage, stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        train(pool, tmp_path / "parts", 6, pictures=4)
    monkeypatch.undo()
    resumed = train(pool, tmp_path / "parts", 6, pictures=4)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    lines = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    logged = [record["step"] for record in map(json.loads, lines) if "phase" not in record]
    assert logged[-1] == 6 and len(set(logged)) == 3


def test_a_truncated_checkpoint_is_named(pool, tmp_path):
    train(pool, tmp_path, 2)
    file = tmp_path / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(learning.CheckpointError, match=r"training\.safetensors is not a whole checkpoint"):
        train(pool, tmp_path, 4)


def test_a_full_disk_is_an_error_and_costs_no_checkpoint(pool, tmp_path, monkeypatch):
    train(pool, tmp_path, 2)
    before = (tmp_path / "training.safetensors").read_bytes()

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(learning, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(pool, tmp_path, 4)
    monkeypatch.undo()
    assert (tmp_path / "training.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*")), "a partial file stayed behind"
    train(pool, tmp_path, 4)


def test_the_components_lose_least(folder):
    """Against NumPy's SVD of the same blocks: no basis of as many vectors loses less."""
    vae, videos = train_vae.load_vae(folder), train_vae.from_bytes(clip_arrays.draw_videos(CLIPS, "cpu"))
    whole = torch.cat([videos[:, :, :1]] * 3 + [videos], dim=2)
    blocks = vae.cut(whole).reshape(-1, 768).double().numpy()
    values = np.linalg.svd(blocks - blocks.mean(0), compute_uv=False)
    best = (values[COMPONENTS:] ** 2).sum() / blocks.size
    again = (
        ((vae.encode(videos) / vae.scale[:, None, None, None]).permute(0, 2, 3, 4, 1)) @ vae.basis
    ) + vae.mean
    lost = ((again.reshape(-1, 768).double().numpy() - blocks) ** 2).mean()
    assert lost == pytest.approx(best, rel=1e-3)


def test_the_networks_training_leaves_the_latents_alone_and_mends_the_picture(folder, tmp_path):
    copy_vae(folder, tmp_path)
    before = train_vae.load_vae(tmp_path)
    judged = clip_arrays.draw_videos(24, "cpu", held_out=True).numpy()
    train_vae.train_vae(tmp_path, train_vae.VAEOptions(12, batch_size=4, log_every=12))
    after = train_vae.load_vae(tmp_path)
    clip = train_vae.from_bytes(torch.from_numpy(judged[:1]))
    assert torch.equal(before.encode(clip), after.encode(clip))
    record = json.loads((tmp_path / "vae-log.jsonl").read_text().splitlines()[-1])
    assert record["psnr"] == pytest.approx(train_vae.psnr(after, judged), abs=1e-3)
    assert record["psnr"] > train_vae.psnr(before, judged) - 0.5


def copy_vae(source, target):
    target.mkdir(exist_ok=True)
    for name in ("vae.json", "vae.safetensors"):
        shutil.copyfile(source / name, target / name)


def test_an_interrupted_vae_training_resumes_to_the_same_weights(folder, tmp_path, monkeypatch):
    def train_part(output):
        train_vae.train_vae(output, train_vae.VAEOptions(4, batch_size=2, log_every=2))
        return load(output / "vae.safetensors")[0]

    copy_vae(folder, tmp_path / "whole")
    copy_vae(folder, tmp_path / "parts")
    whole = train_part(tmp_path / "whole")
    step, calls = learning.MuonAdamW.step, []

    def stop_at_the_fourth(self):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(learning.MuonAdamW, "step", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        train_part(tmp_path / "parts")
    monkeypatch.setattr(learning.MuonAdamW, "step", step)
    resumed = train_part(tmp_path / "parts")
    assert not [name for name in whole if not torch.equal(whole[name], resumed[name])]


def test_muon_steps_are_nearly_orthogonal():
    torch.manual_seed(0)
    for shape in ((24, 24), (16, 64), (64, 16)):
        values = torch.linalg.svdvals(learning.orthogonalised(torch.randn(1, *shape)))
        assert values.max() < 1.4 and values.median() > 0.5


def test_a_step_lowers_a_quadratic():
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8)
    optimizer = learning.MuonAdamW(layer.named_parameters(), lr=0.02, adam_lr=0.02)
    x, y = torch.randn(64, 8), torch.randn(64, 8)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] * 0.95


def test_the_tokenizer_knows_every_word_and_any_byte():
    tokenizer = build_tokenizer()
    assert all(len(tokenizer.encode(noun).ids) == 2 for noun in NOUNS)  # the word and the end
    for text in ("a ball", "ein Bär 🐻"):
        assert tokenizer.decode(tokenizer.encode(text).ids).strip() == text


def test_dropping_follows_its_rates(pool):
    rng = np.random.default_rng(0)
    batch = pool.batch(rng, 600, batches.Dropped(0.2, 0.1, 0.1))
    shown, told = batch.concept_mask.any(1), batch.token_mask.sum(1) > 1
    assert abs(float((~shown & told).float().mean()) - 0.2) < 0.05
    assert abs(float((shown & ~told).float().mean()) - 0.1) < 0.04
    assert abs(float((~shown & ~told).float().mean()) - 0.1) < 0.04


def test_coverage_lies_where_the_concepts_are(pool):
    batch = pool.collate(torch.tensor([0]), np.random.default_rng(0), batches.KEEP_ALL)
    scene = random_scene(0, held_out=False)
    cells = {actor.label: actor.cell for actor in scene.actors}
    assert set(cells.values()) <= set(PLACES)
    filled = batch.label_mask[0].any(-1)
    assert int(filled.sum()) == len(scene.actors)
    for actor in scene.actors:
        ids, _ = tokenise(build_tokenizer(), [actor.label], 8)
        slot = next(n for n in range(3) if np.array_equal(batch.label_ids[0, n].numpy(), ids[0]))
        y, x = np.unravel_index(int(batch.coverage[0, slot, 0].argmax()), (8, 8))
        assert abs(x * 8 + 4 - actor.start[0]) < 10 and abs(y * 8 + 4 - actor.start[1]) < 10


def test_frozen_parts_stay_as_they_are(pool, tmp_path):
    start = train(pool, tmp_path / "start", 2)
    trained = tmp_path / "start" / "model.safetensors"
    train_small(pool, tmp_path / "on", steps=2, start=trained, freeze=FROZEN)
    after = load_model(tmp_path / "on" / "model.safetensors").state_dict()
    before = start.state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"dam", "transformer"}


def test_pictures_that_are_all_foreign_ask_nothing_of_what_they_show(pool, tmp_path):
    train_small(pool, tmp_path, steps=2, log_every=1, foreign=1.0)
    record = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert record["portrait"] == record["eye_pattern"] == 0 < record["flow"]


def test_plain_attention_is_torchs_own():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    for options in ({}, {"attn_mask": torch.rand(2, 1, 5, 7) > 0.3}, {"attn_mask": torch.randn(2, 1, 5, 7)}):
        own = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
        with attention.PlainAttention():
            plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
        torch.testing.assert_close(plain, own)
        assert plain is not own


def test_the_picture_encoder_learns_alone_first_and_an_interrupted_one_goes_on(tmp_path):
    def learn(checkpoint, stop_after=None):
        torch.manual_seed(3)
        model = ConceptMaster(small_config())
        before = {name: value.clone() for name, value in model.state_dict().items()}
        heads = train_pictures.PictureHeads(model.config.concept)
        sight, records = train_pictures.Sight(model, heads), []

        def log(record):
            moved = {n.split(".")[0] for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
            records.append(record | {"moved": moved})
            if record["step"] == stop_after:
                raise KeyboardInterrupt

        options = train_pictures.PictureOptions(10, batch_size=16, log_every=4, alone=0.6)
        try:
            train_pictures.learn_pictures(sight, checkpoint, options, train_model.ADAM_NAMES, log)
        except KeyboardInterrupt:
            return records, None
        return records, {name: value.clone() for name, value in sight.state_dict().items()}

    records, whole = learn(tmp_path / "whole.safetensors")
    assert [record["step"] for record in records] == [4, 6, 8, 10]
    assert [record["moved"] for record in records[:2]] == [{"image_encoder"}] * 2
    assert records[-1]["moved"] == {"image_encoder", "qformer"}
    assert records[1]["held_out_eye_pattern"] < records[0]["eye_pattern"]
    learn(tmp_path / "cut.safetensors", stop_after=6)
    rest, again = learn(tmp_path / "cut.safetensors")
    assert rest[0]["step"] == 8
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_every_query_tells_its_own_square():
    head = train_pictures.PictureHeads(preset("sprites").concept).portrait
    assert type(head) is train_pictures.UprightHead
    queries = torch.zeros(1, 64, 128)
    with torch.no_grad():
        plain = head(queries)
        for square in (0, 9, 63):
            queries[:] = 0
            queries[0, square] = 1
            changed = (head(queries) != plain).any(1)[0]
            row, column = divmod(square, 8)
            assert changed.sum() == 16
            assert changed[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].all()
    few = dataclasses.replace(preset("sprites").concept, queries=8)
    assert isinstance(train_pictures.PictureHeads(few).portrait, train_pictures.PortraitHead)


@pytest.mark.parametrize("held_out", [False, True])
def test_new_pictures_are_like_those_of_clips_and_of_the_looks_asked_for(held_out, pool, monkeypatch):
    draw, seen = batches.random_identity, []
    monkeypatch.setattr(batches, "random_identity", lambda *a, **k: seen.append(draw(*a, **k)) or seen[-1])
    new = batches.new_pictures(np.random.default_rng(0), 48, "cpu", held_out)
    batch = pool.batch(np.random.default_rng(0), 4, batches.KEEP_ALL)
    for name, other in vars(new).items():
        value = getattr(batch, name)[batch.concept_mask]
        assert (other.shape[1:], other.dtype) == (value.shape[1:], value.dtype), name
    assert len(seen) == len(set(seen)) == 48 and all(look.held_out == held_out for look in seen)
    for row, look in enumerate(seen):
        texture, accessory, _ = new.traits[row].tolist()
        assert (TEXTURES[texture], ACCESSORIES[accessory]) == (look.texture, look.accessory)
        body = torch.tensor(look.body) * 2 - 1  # somewhere in the portrait, as it is
        assert (new.portraits[row] - body[:, None, None]).abs().amax(0).min() < 0.05
    again = batches.new_pictures(np.random.default_rng(0), 48, "cpu", held_out)
    assert torch.equal(again.pixels, new.pixels)


def runs_of(look):
    actor = dataclasses.replace(random_scene(0, held_out=False).actors[0], identity=look)
    return clip_arrays.patterns(clip_arrays.cast_of([actor]))[0].numpy()


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_that_look_alike_are_told_alike_and_others_are_not(texture):
    axis = np.linspace(-1, 1, 64, dtype=np.float32)
    u, v = np.meshgrid(axis, axis)
    look = dataclasses.replace(random_scene(0, held_out=False).actors[0].identity, texture=texture)

    def paint_and_runs(look):
        return shapes.texture(look, u, v, 0.05), np.nan_to_num(runs_of(look))

    painted, told = paint_and_runs(look)
    for change in (
        {"angle": look.angle + np.pi},
        {"angle": look.angle + np.pi / 2},
        {"angle": look.angle + 0.4},
    ):
        repainted, retold = paint_and_runs(dataclasses.replace(look, **change))
        same = np.abs(repainted - painted).max() < 1e-3
        assert np.allclose(told, retold, atol=1e-5) == same, change
    other = runs_of(dataclasses.replace(look, period=PERIODS[1]))
    assert np.isnan(other[6]) if texture == "plain" else other[6] == pytest.approx(1)


def test_a_clip_noised_by_its_decoy_is_its_decoy_noised(pool):
    batch = pool.batch(np.random.default_rng(0), 64, batches.Dropped(foreign=0.5))
    assert batch.foreign.any() and not batch.foreign[~batch.label_mask.any(-1)].any()
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0))
    sigma = noising.random_sigma(np.random.default_rng(2), 64)
    found, chosen = noising.decoy_noise(batch, noise, sigma, np.random.default_rng(1), 0.7)
    s = sigma[:, None, None, None, None]
    shown = ((1 - s) * batch.latents + s * found - s * noise) / (1 - s)
    decoys = (shown - batch.decoys).abs().amax((1, 2, 3, 4)) < 1e-3
    clips = (shown - batch.latents).abs().amax((1, 2, 3, 4)) < 1e-3
    assert decoys[chosen].all() and clips[~chosen].all() and 0 < chosen.sum() < 64
    assert not chosen[~batch.concept_mask.any(-1)].any()
    assert not chosen[sigma < noising.DECOY_SIGMAS[0]].any()


def test_a_decoy_differs_in_its_textures_alone():
    scene = random_scene(3, held_out=False, concepts=3)
    rng, kinds = np.random.default_rng(0), set()
    for _ in range(40):
        other = decoys.decoy(scene, rng)
        assert dataclasses.replace(other, actors=scene.actors) == scene
        for own, disguised in zip(scene.actors, other.actors, strict=True):
            kinds.add(disguised.identity.texture)
            kept = {name: getattr(own.identity, name) for name in ("second", "accent", "accessory")}
            assert kept.items() <= vars(disguised.identity).items()
            assert dataclasses.replace(disguised, identity=own.identity) == own
            if disguised.identity.texture != "plain":
                assert disguised.identity.body == own.identity.body
        stranger = decoys.foreign(scene.actors[0], rng)
        assert stranger.noun != scene.actors[0].noun and stranger.identity == scene.actors[0].identity
    assert kinds == set(TEXTURES)


def test_a_model_goes_on_with_more_latent_channels(tmp_path):
    """What it tells of the channels that it knew does not depend on the new ones, whose mean it tells."""
    small = small_config()
    channels = {"in_channels": 20, "out_channels": 20}
    numbers = {"z_dim": 20, "latents_mean": [0.0] * 20, "latents_std": [1.0] * 20}
    before = ConceptMaster(
        dataclasses.replace(
            small, transformer=dataclasses.replace(small.transformer, **channels), vae=small.vae | numbers
        )
    )
    with torch.no_grad():
        for parameter in before.parameters():
            parameter.add_(0.02)
    save_model(before, tmp_path / "model.safetensors")
    after = ConceptMaster(small)
    assert starting.start_from(after, tmp_path / "model.safetensors") == []
    torch.manual_seed(0)
    latents, concept = torch.randn(2, *small.latent_shape), small.concept
    rest = (
        torch.tensor([900.0, 200.0]),
        torch.randn(2, 48, small.transformer.text_dim),
        torch.randn(2, concept.max_concepts, concept.tokens_per_concept, concept.width),
        torch.ones(2, concept.max_concepts, dtype=torch.bool),
    )
    with torch.no_grad():
        known, told = before.transformer(latents[:, :20], *rest), after.transformer(latents, *rest)
    torch.testing.assert_close(told[:, :20], known, rtol=1e-4, atol=1e-4)
    sigma = rest[0][:, None, None, None, None] / 1000
    torch.testing.assert_close(told[:, 20:], latents[:, 20:] / sigma, rtol=1e-4, atol=1e-4)


def test_a_training_goes_stage_by_stage_and_starts_from_its_own_weights_or_says_why_not(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(train_stages, "preset", lambda name: small_config())
    monkeypatch.setattr(train_stages, "ANALYSED", CLIPS)
    monkeypatch.setattr(drawn, "JUDGED", 8)
    monkeypatch.setattr(train_vae, "JUDGED", 2)
    parser = argparse.ArgumentParser()
    add_train_arguments(parser)

    def run(output, *more):
        words = ["--output", str(tmp_path / output), "--clips", "8", "--workers", "1", "--batch-size", "2"]
        words += ["--vae-steps", "1", "--device", "cpu"]
        return train_stages.run(parser.parse_args([*words, *more]))

    assert run("first", "--stages", "vae") == 0 and not (tmp_path / "first" / "model").exists()
    assert run("first", "--steps", "1", "--picture-steps", "2", "--caption-steps", "1") == 0
    weights = tmp_path / "first" / "weights"
    names = {"model.safetensors", "vae.safetensors", "tokenizer.json"}
    names |= {"defaults.json", "vocabulary.json", "ranges.json"}
    assert {path.name for path in weights.iterdir()} == names
    assert run("on", "--start", str(weights), "--steps", "1") == 0
    log = (tmp_path / "on" / "model" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[0]) == {"phase": "start", "fresh": []} and len(log) == 2  # nothing but videos
    before, after = (train_vae.load_vae(tmp_path / name / "vae") for name in ("first", "on"))
    assert torch.equal(before.basis, after.basis)
    with pytest.raises(InputError, match="cannot start from .*: of another configuration, in concept$"):
        run("other", "--start", str(weights), "--encoder", "mlp")
    with pytest.raises(InputError, match="cannot start from .*no weights file"):
        run("other", "--start", str(tmp_path))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_give_results_in_the_order_of_their_jobs(workers):
    assert list(processes.in_processes(math.sqrt, [9.0, 4.0, 1.0], workers)) == [3.0, 2.0, 1.0]
    with pytest.raises(ValueError, match="math domain|nonnegative"):
        list(processes.in_processes(math.sqrt, [1.0, -1.0], workers))


@pytest.mark.parametrize(("high", "expected"), [(0.0, 0.106), (0.4, 0.464)])
def test_a_share_of_the_noise_levels_is_high(high, expected):
    rng = np.random.default_rng(3)
    sigma = noising.random_sigma(rng, 200_000, high=high)
    assert 0 < sigma.min() and sigma.max() <= 1 and sigma.dtype == torch.float32
    # sigmoid(0.7 - 1.2 n) > 0.9 where n < -1.248: 10.6 % of a normal's values
    assert float((sigma > 0.9).float().mean()) == pytest.approx(expected, abs=0.005)
    assert float((sigma == 1).float().mean()) == pytest.approx(high / 2, abs=0.005)  # noise alone
