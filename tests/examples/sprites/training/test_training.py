"""The sprites training: every variant learns and exports, a stop loses nothing, and a broken checkpoint is
named."""

from __future__ import annotations

import argparse
import copy
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
    learning,
    loop,
    noising,
    polish,
    pools,
    shards,
    starting,
    train_model,
    train_pictures,
    train_vae,
)
from conceptmaster.examples.sprites.training import train as train_stages
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

from ..small import CLIPS, how_it_runs, small_config, small_pool, train_small

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
def few_are_judged(monkeypatch):
    monkeypatch.setattr(train_pictures, "JUDGED", 32)


def train(folder, output, steps, pictures=1, **concept):
    how = {"steps": steps, "picture_steps": pictures, "caption_steps": 2}
    train_small(folder, output, config=small_config(**concept), **how)
    return load_model(output / "model.safetensors")


def untrained(**concept):
    """A model in which nothing starts at zero."""
    torch.manual_seed(5)
    model = ConceptMaster(small_config(**concept))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=[pools.ShardPool, pools.ResidentPool])
def pool(request, folder):
    """The same clips as a pool that reads shards, and as one that is kept on its device."""
    return small_pool(folder, kind=request.param)


def test_a_batch_is_of_the_pools_clips(pool, folder):
    """Against the files themselves."""
    dropped = batches.Dropped(0.3, 0.2, 0.2, foreign=0.3)
    got = pool.batch(np.random.default_rng(0), 64, dropped)
    files = {
        name: np.concatenate([shards.open_array(shard, name) for shard in shards.shard_folders(folder)])
        for name in ("latents", "decoys", "references", "foreign", "coverage", "portraits", "traits")
    }
    scenes = [random_scene(seed, held_out=False) for seed in range(2 * CLIPS)]
    (empty,), _ = tokenise(build_tokenizer(), [""], 48)
    fates, order = set(), set()
    for b in range(64):
        latents = got.latents[b].numpy() * 0.5 + 0.1
        (k,) = [k for k in range(2 * CLIPS) if np.abs(latents - files["latents"][k]).max() < 1e-4]
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


def test_pictures_are_of_the_pools_concepts(pool):
    got = pool.pictures(np.random.default_rng(0), 64)
    known = pool.collate(torch.arange(2 * CLIPS), np.random.default_rng(0), batches.KEEP_ALL)
    seen = set()
    for m in range(64):
        there = known.label_mask.any(-1).nonzero()
        (where,) = [at for at in there if torch.equal(known.portraits[*at], got.portraits[m])]
        for name in ("label_ids", "label_mask", "traits"):
            assert torch.equal(getattr(got, name)[m], getattr(known, name)[*where]), name
        seen.add(tuple(where.tolist()))
    assert len(seen) > CLIPS


@pytest.mark.parametrize("kind", [pools.ShardPool, pools.ResidentPool])
def test_a_pool_takes_up_new_shards(kind, folder, tmp_path):
    first, second = shards.shard_folders(folder)
    shutil.copytree(first, tmp_path / first.name)
    growing = small_pool(tmp_path, kind=kind)
    assert len(growing) == CLIPS
    shutil.copytree(second, tmp_path / second.name)
    growing.refresh()
    growing.refresh()
    assert len(growing) == 2 * CLIPS and growing.place(CLIPS + 1) == (1, 1)
    latents = growing.batch(np.random.default_rng(0), 64, batches.Dropped()).latents
    assert len(torch.unique(latents.flatten(1)[:, :4], dim=0)) == 2 * CLIPS


def test_training_by_the_clock_ends_with_it(folder, tmp_path, monkeypatch):
    now, scales, set_scale = [0.0], [], learning.MuonAdamW.set_scale
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now.__setitem__(0, now[0] + 1) or now[0])
    monkeypatch.setattr(learning.MuonAdamW, "set_scale", lambda *a: scales.append(a[1]) or set_scale(*a))
    train_small(folder, tmp_path, steps=1, minutes=0.1)
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["seconds"] == last["step"] == 6
    assert scales[1:] == pytest.approx([learning.schedule(k / 6) for k in range(6)])  # first: as it is made
    assert load_model(tmp_path / "model.safetensors").config == small_config()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()) or "default")
def test_every_variant_trains(variant, folder, tmp_path):
    model = train(folder, tmp_path, 2, **variant)
    for field, value in variant.items():
        assert getattr(model.config.concept, field) == value
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    pictures, captions, record = (json.loads(line) for line in lines)
    assert pictures["phase"] == "pictures" and 0 <= pictures["held_out_texture"] <= 1
    assert captions["phase"] == "captions" and len(captions["story"]) == 1
    assert record["step"] == 2 and all(np.isfinite(v) for v in record.values())


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pictures", "batch"])
def test_an_interrupted_training_resumes_to_the_same_weights(stage, folder, tmp_path, monkeypatch):
    whole = train(folder, tmp_path / "whole", 6, pictures=4)
    draw, calls = getattr(pools.ShardPool, stage), []

    def stop_at_the_fifth(self, *args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return draw(self, *args)

    monkeypatch.setattr(pools.ShardPool, stage, stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path / "parts", 6, pictures=4)
    monkeypatch.undo()
    resumed = train(folder, tmp_path / "parts", 6, pictures=4)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    lines = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    logged = [record["step"] for record in map(json.loads, lines) if "phase" not in record]
    assert logged[-1] == 6 and len(set(logged)) == 3


def test_a_truncated_checkpoint_is_named(folder, tmp_path):
    train(folder, tmp_path, 2)
    file = tmp_path / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(learning.CheckpointError, match=r"training\.safetensors is not a whole checkpoint"):
        train(folder, tmp_path, 4)


def test_a_full_disk_is_an_error_and_costs_no_checkpoint(folder, tmp_path, monkeypatch):
    train(folder, tmp_path, 2)
    before = (tmp_path / "training.safetensors").read_bytes()

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(learning, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(folder, tmp_path, 4)
    monkeypatch.undo()
    assert (tmp_path / "training.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*")), "a partial file stayed behind"
    train(folder, tmp_path, 4)


def test_the_components_lose_least(folder):
    """Against NumPy's SVD of the same blocks: no basis of as many vectors loses less."""
    clips = np.array(shards.open_array(shards.shard_folders(folder)[1], "video"))
    vae, videos = train_vae.load_vae(folder), train_vae.to_tensor(clips)
    whole = torch.cat([videos[:, :, :1]] * 3 + [videos], dim=2)
    blocks = vae.cut(whole).reshape(-1, 768).double().numpy()
    values = np.linalg.svd(blocks - blocks.mean(0), compute_uv=False)
    best = (values[COMPONENTS:] ** 2).sum() / blocks.size
    again = (
        ((vae.encode(videos) / vae.scale[:, None, None, None]).permute(0, 2, 3, 4, 1)) @ vae.basis
    ) + vae.mean
    lost = ((again.reshape(-1, 768).double().numpy() - blocks) ** 2).mean()
    assert best < lost <= best * 1.5  # the analysis drew some of these clips twice, some never


def test_the_networks_training_leaves_the_latents_alone_and_mends_the_picture(folder, tmp_path):
    copy_vae(folder, tmp_path)
    before = train_vae.load_vae(tmp_path)
    judged = np.array(shards.open_array(shards.shard_folders(folder)[0], "video"))
    train_vae.train_vae(folder, tmp_path, train_vae.VAEOptions(12, batch_size=4, log_every=12))
    after = train_vae.load_vae(tmp_path)
    clip = train_vae.to_tensor(judged[:1])
    assert torch.equal(before.encode(clip), after.encode(clip))
    record = json.loads((tmp_path / "vae-log.jsonl").read_text().splitlines()[-1])
    assert record["psnr"] == pytest.approx(train_vae.psnr(after, judged[:24]), abs=1e-3)
    assert record["psnr"] > train_vae.psnr(before, judged[:24]) - 0.5


def copy_vae(source, target):
    target.mkdir(exist_ok=True)
    for name in ("vae.json", "vae.safetensors"):
        shutil.copyfile(source / name, target / name)


def test_an_interrupted_vae_training_resumes_to_the_same_weights(folder, tmp_path, monkeypatch):
    def train_part(output):
        train_vae.train_vae(folder, output, train_vae.VAEOptions(4, batch_size=2, log_every=2))
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
        values = torch.linalg.svdvals(learning.orthogonalised(torch.randn(shape)))
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


def test_dropping_follows_its_rates(folder):
    data = small_pool(folder)
    rng = np.random.default_rng(0)
    batch = data.batch(rng, 600, batches.Dropped(0.2, 0.1, 0.1))
    shown, told = batch.concept_mask.any(1), batch.token_mask.sum(1) > 1
    assert abs(float((~shown & told).float().mean()) - 0.2) < 0.05
    assert abs(float((shown & ~told).float().mean()) - 0.1) < 0.04
    assert abs(float((~shown & ~told).float().mean()) - 0.1) < 0.04


def test_coverage_lies_where_the_concepts_are(folder):
    data = small_pool(folder)
    batch = data.collate(torch.tensor([0]), np.random.default_rng(0), batches.KEEP_ALL)
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


def test_denoising_in_one_step_without_guidance_follows_the_models_own_velocity(folder):
    model, data = untrained(), small_pool(folder)
    batch = data.batch(np.random.default_rng(0), 3, batches.Dropped(0, 0, 0))
    sigmas = torch.tensor([[1.0, 0.4]]).repeat(3, 1)
    with torch.no_grad():
        text = model.text_encoder(batch.token_ids, batch.token_mask)
        concepts = model.concepts(batch.pixels, batch.label_ids, batch.label_mask)
        velocity = model.transformer(batch.latents, sigmas[:, 0] * 1000, text, concepts, batch.concept_mask)
    reached = polish.denoise(model, batch, batch.latents, sigmas, 1.0)
    torch.testing.assert_close(reached, batch.latents - 0.6 * velocity, rtol=1e-4, atol=1e-4)


def test_polishing_changes_the_network_alone_and_draws_the_models_latents_better(
    folder, tmp_path, monkeypatch
):
    model = untrained()
    copy_vae(folder, tmp_path)
    monkeypatch.setattr(polish, "TOGETHER", 4)
    options = polish.PolishOptions(30, batch_size=4, log_every=30, clips=8)
    polish.redo(model, folder, tmp_path / "redone.npz", options)
    with np.load(tmp_path / "redone.npz") as file:
        latents, picks = torch.from_numpy(file["latents"].astype(np.float32)), file["picks"]
    assert latents.shape == (8, COMPONENTS, 5, 8, 8) and {int(s) for s, _ in picks} == {1}
    videos = train_vae.to_tensor(
        np.stack([shards.open_array(folder / f"shard-{s:05d}", "video")[k] for s, k in picks])
    )
    before = train_vae.load_vae(tmp_path)
    polish.polish(folder, tmp_path, tmp_path / "redone.npz", options)
    after = train_vae.load_vae(tmp_path)
    assert torch.equal(before.encode(videos), after.encode(videos))
    with torch.no_grad():
        errors = [(vae.decode(latents) - videos).abs().mean() for vae in (before, after)]
    assert errors[1] < errors[0]


def test_frozen_parts_stay_as_they_are(folder, tmp_path):
    start = train(folder, tmp_path / "start", 2)
    trained = tmp_path / "start" / "model.safetensors"
    train_small(folder, tmp_path / "on", steps=2, start=trained, freeze=train_model.FROZEN)
    after = load_model(tmp_path / "on" / "model.safetensors").state_dict()
    before = start.state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"dam", "transformer"}


def test_pictures_that_are_all_foreign_ask_nothing_of_what_they_show(folder, tmp_path):
    train_small(folder, tmp_path, steps=2, log_every=1, foreign=1.0)
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


def sight_of(model, kept):
    return train_pictures.Sight(model, train_pictures.PictureHeads(model.config.concept), kept)


@pytest.mark.slow
def test_learning_to_see_more_keeps_what_the_transformer_reads(folder, tmp_path):
    start = train(folder, tmp_path, 2)
    torch.manual_seed(3)
    model = copy.deepcopy(start).train()
    with torch.no_grad():
        for parameter in model.qformer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    data, records = small_pool(folder), []
    train_pictures.learn_pictures(
        sight_of(model, start),
        data,
        data,
        tmp_path / "seeing.safetensors",
        train_pictures.PictureOptions(24, batch_size=16, log_every=4, alone=0),
        train_model.ADAM_NAMES,
        records.append,
    )
    held = [record["held_out_kept"] for record in records]
    assert held[-1] < 0.7 * held[0]
    pictures = data.pictures(np.random.default_rng(1), 8)
    with torch.no_grad():
        mask, filled = pictures.label_mask[:, None], pictures.pixels[:, None]
        a, b = (m.eval().concepts(filled, pictures.label_ids[:, None], mask) for m in (start, model))
    assert float((a - b).square().mean() / a.square().mean()) == pytest.approx(held[-1], abs=0.3)


def test_the_picture_encoder_learns_alone_first_and_an_interrupted_one_goes_on(folder, tmp_path):
    data = small_pool(folder)

    def learn(checkpoint, stop_after=None):
        torch.manual_seed(3)
        model = ConceptMaster(small_config())
        before = {name: value.clone() for name, value in model.state_dict().items()}
        sight, records = sight_of(model, None), []

        def log(record):
            moved = {n.split(".")[0] for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
            records.append(record | {"moved": moved})
            if record["step"] == stop_after:
                raise KeyboardInterrupt

        options = train_pictures.PictureOptions(10, batch_size=16, log_every=4, alone=0.6)
        try:
            train_pictures.learn_pictures(sight, data, data, checkpoint, options, train_model.ADAM_NAMES, log)
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


def test_new_pictures_are_like_those_of_clips_and_never_held_out(folder, monkeypatch):
    data = small_pool(folder)
    draw, seen = batches.random_identity, []
    monkeypatch.setattr(batches, "random_identity", lambda *a, **k: seen.append(draw(*a, **k)) or seen[-1])
    new, old = (
        batches.new_pictures(np.random.default_rng(0), 48, 8, "cpu"),
        data.pictures(np.random.default_rng(0), 48),
    )
    for name, value in vars(old).items():
        other = getattr(new, name)
        assert (other.shape, other.dtype) == (value.shape, value.dtype), name
    assert len(seen) == len(set(seen)) == 48 and not any(look.held_out for look in seen)
    for row, look in enumerate(seen):
        texture, accessory, noun = new.traits[row].tolist()
        assert (TEXTURES[texture], ACCESSORIES[accessory]) == (look.texture, look.accessory)
        assert np.array_equal(new.label_ids[row].numpy(), tokenise(build_tokenizer(), [NOUNS[noun]], 8)[0][0])
        body = torch.tensor(look.body) * 2 - 1  # somewhere in the portrait, as it is
        assert (new.portraits[row] - body[:, None, None]).abs().amax(0).min() < 0.05
    again = batches.new_pictures(np.random.default_rng(0), 48, 8, "cpu")
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


def test_a_clip_noised_by_its_decoy_is_its_decoy_noised(folder):
    data = small_pool(folder)
    batch = data.batch(np.random.default_rng(0), 64, batches.Dropped(foreign=0.5))
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


def test_more_components_join_those_that_are_known(folder):
    """What is added is orthogonal, and explains as much as if all had been found at once."""
    few = small_config().vae | {"z_dim": 20, "latents_mean": [0.0] * 20, "latents_std": [1.0] * 20}
    known, more = train_vae.new_vae(few), train_vae.new_vae(small_config().vae)
    train_vae.analyse(known, folder, clips=3 * CLIPS)
    more.mean.copy_(known.mean)
    more.basis[:20], more.scale[:20] = known.basis, known.scale
    train_vae.analyse(more, folder, clips=3 * CLIPS, kept=20)
    assert torch.equal(more.basis[:20], known.basis) and torch.equal(more.scale[:20], known.scale)
    torch.testing.assert_close(more.basis @ more.basis.T, torch.eye(COMPONENTS), rtol=0, atol=1e-4)
    at_once = train_vae.load_vae(folder)  # all of them, from the same clips
    torch.testing.assert_close(more.scale, at_once.scale, rtol=0.02, atol=0)
    videos = train_vae.to_tensor(np.array(shards.open_array(shards.shard_folders(folder)[1], "video")))
    first, whole = known.encode(videos), more.encode(videos)
    torch.testing.assert_close(whole[:, :20], first, rtol=1e-4, atol=1e-4)


def test_a_model_goes_on_with_more_latent_channels(folder, tmp_path):
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


def test_a_training_starts_from_weights_with_more_components_or_says_why_not(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", CLIPS)
    monkeypatch.setattr(train_stages, "SHARD", CLIPS)
    monkeypatch.setattr(train_vae, "ANALYSED", 3 * CLIPS)
    numbers = {"z_dim": 20, "latents_mean": [0.0] * 20, "latents_std": [0.5] * 20}
    small = small_config(queries=8)
    narrow = dataclasses.replace(small.transformer, in_channels=20, out_channels=20)
    config = dataclasses.replace(small, vae=small.vae | numbers, transformer=narrow)
    begun, old = tmp_path / "begun", train_vae.new_vae(config.vae)
    train_vae.write_vae(old, begun, config.vae)
    save_model(ConceptMaster(config), begun / "model.safetensors")
    parser = argparse.ArgumentParser()
    train_stages.add_arguments(parser)

    def run(*more):
        words = ["--output", str(tmp_path / "on"), "--start", str(begun), "--stages", "draw", "latents"]
        return train_stages.run(parser.parse_args([*words, "--clips", "12", "--workers", "1", *more]))

    with pytest.raises(InputError, match="must be at least the 20 of"):
        run("--components", "10")
    assert run("--components", "24") == 0
    new = train_vae.load_vae(tmp_path / "on" / "vae")
    assert new.basis.shape[0] == 24 and torch.equal(new.basis[:20], old.basis)
    encoded = list((tmp_path / "on").glob("*/*/latents.npy"))
    assert len(encoded) == 3 and all(np.load(path).shape[1] == 24 for path in encoded)
    assert train_stages._started_vae(begun, None).queries == 8
    save_model(ConceptMaster(preset("tiny")), begun / "model.safetensors")
    with pytest.raises(InputError, match="its VAE is not of blocks"):
        run()


def test_drawing_and_encoding_stop_at_any_shard_and_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", CLIPS)
    monkeypatch.setattr(train_stages, "SHARD", CLIPS)
    monkeypatch.setattr(train_vae, "ANALYSED", 3 * CLIPS)
    parser = argparse.ArgumentParser()
    train_stages.add_arguments(parser)
    words = ["--output", str(tmp_path), "--stages", "draw", "latents", "--clips", str(3 * CLIPS)]
    args = parser.parse_args([*words, "--workers", "1"])
    encode, calls = train_stages.encode_shard, []

    def stop_at_the_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        encode(*arguments)

    monkeypatch.setattr(train_stages, "encode_shard", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        train_stages.run(args)
    assert len(shards.shard_folders(tmp_path / "clips")) == 3
    monkeypatch.setattr(train_stages, "encode_shard", encode)
    first = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/shard-*/latents.npy")}
    assert len(first) == 1 and train_stages.run(args) == 0
    latents = [folder / "latents.npy" for folder in tmp_path.glob("*/shard-*")]
    assert len(latents) == 4 and all(np.load(path).shape == (CLIPS, COMPONENTS, 5, 8, 8) for path in latents)
    assert all(path.stat().st_mtime_ns == made for path, made in first.items())


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_give_results_in_the_order_of_their_jobs(workers):
    assert list(processes.in_processes(math.sqrt, [9.0, 4.0, 1.0], workers)) == [3.0, 2.0, 1.0]
    with pytest.raises(ValueError, match="math domain|nonnegative"):
        list(processes.in_processes(math.sqrt, [1.0, -1.0], workers))
