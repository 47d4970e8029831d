import json

import pytest
import torch

from conceptmaster.engine.checkpoints.safetensors_io import load, save_model
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.training.train_vae import from_bytes, write_vae
from conceptmaster.examples.stickers.training import decoder, scenery, train
from conceptmaster.examples.stickers.training.artist import Artist
from conceptmaster.examples.stickers.training.components import doubled, halved
from conceptmaster.examples.stickers.training.decoder import Screen, train_decoder
from conceptmaster.examples.stickers.training.options import DecoderOptions, Shown
from conceptmaster.examples.stickers.training.own_latents import OwnLatents
from conceptmaster.examples.stickers.training.trainee import Trainee
from conceptmaster.examples.stickers.world import grounds
from conceptmaster.examples.stickers.world.captions import tell
from conceptmaster.examples.stickers.world.scenes import Wish, random_scene
from conceptmaster.examples.stickers.world.tokens import build_tokenizer

from ..small import atlas, small_config


@pytest.fixture(autouse=True)
def few_paintings(monkeypatch):
    monkeypatch.setattr(grounds, "EACH", 1)


def run(folder, steps, own=0.0):
    options = DecoderOptions(steps, batch_size=2, own=own, log_every=2, shown=Shown(4, 2, 1, 1))
    train_decoder(atlas(), folder, options)
    return load(folder / "vae.safetensors")[0]


def begin(folder):
    config = small_config()
    write_vae(doubled(config.vae, train.SPRITES / "vae.safetensors"), folder, config.vae)
    return load(folder / "vae.safetensors")[0]


def test_the_network_learns_and_the_components_stay(tmp_path):
    before = begin(tmp_path)
    after = run(tmp_path, 2)
    assert all(torch.equal(before[name], after[name]) for name in ("mean", "basis", "scale"))
    assert not torch.equal(before["conv_out.weight"], after["conv_out.weight"])
    (line,) = (tmp_path / "decoder-log.jsonl").read_text().splitlines()
    assert json.loads(line)["psnr"] > 10


def test_it_goes_on_from_its_checkpoint_and_needs_a_vae(tmp_path):
    with pytest.raises(InputError, match="vae.safetensors is missing: `train --output` makes it"):
        run(tmp_path, 2)
    begin(tmp_path)
    run(tmp_path, 2)
    run(tmp_path, 4)
    assert len((tmp_path / "decoder-log.jsonl").read_text().splitlines()) == 2


def test_the_models_own_latents_are_mended(tmp_path, monkeypatch):
    """Of a model that takes every clip for grey the decoder learns to make what clips are on average."""
    begin(tmp_path)
    with pytest.raises(InputError, match="model.safetensors is missing, whose latents are asked for"):
        run(tmp_path, 2, own=1.0)
    monkeypatch.setattr(decoder, "preset", lambda _: small_config())
    save_model(ConceptMaster(small_config()), tmp_path / "model.safetensors")
    build_tokenizer(atlas()).save(str(tmp_path / "tokenizer.json"))
    estimates = []

    def grey(own, scene, number, latents):
        estimates.append((number, latents.shape))
        return torch.zeros_like(latents)

    true = run(tmp_path, 2)
    with monkeypatch.context() as patched:
        patched.setattr(decoder.OwnLatents, "of", grey)
        (tmp_path / "decoder-training.safetensors").unlink()
        begin(tmp_path)
        mended = run(tmp_path, 2, own=1.0)
    assert [number for number, _ in estimates] == [0, 1, 2, 3, 4, 5]
    assert not torch.equal(true["conv_out.weight"], mended["conv_out.weight"])


def test_an_estimate_is_of_the_clip_that_was_noised(tmp_path):
    """A model that tells the noise exactly gives the clip back, whatever noise and level were drawn."""
    trainee, screen = Trainee(small_config()), Screen(atlas(), "cpu", Shown(1, 1, 1, 1))
    vae = doubled(small_config().vae, train.SPRITES / "vae.safetensors")
    own = OwnLatents(trainee, Artist(atlas(), build_tokenizer(atlas()), small_config(), halved(vae)))
    screen.at(0)
    latents = vae.encode(from_bytes(screen.videos))
    scene = random_scene(1 << 46, atlas(), Wish())
    seen = []

    def told(batch, noisy, sigma):
        seen.append(float(sigma))
        return (noisy - batch.latents) / sigma, None, None

    trainee.velocity = told
    torch.testing.assert_close(own.of(scene, 0, latents), latents, atol=1e-4, rtol=1e-4)
    own.of(scene, 1, latents)
    assert seen[0] != seen[1] and all(0.35 <= sigma <= 0.75 for sigma in seen)


def test_a_clip_that_a_model_reads_has_words_that_fit(monkeypatch):
    """Of a scene whose caption is too long another seed's is taken, and none is where nothing is read."""
    screen, config = Screen(atlas(), "cpu", Shown(1, 1, 1, 1)), small_config()
    long, seeds = tell(random_scene(3, atlas(), Wish())), range(2, 5)
    assert [screen._scene(seed) for seed in seeds] == [random_scene(s, atlas(), Wish()) for s in seeds]
    vae = doubled(config.vae, train.SPRITES / "vae.safetensors")
    screen.own = OwnLatents(Trainee(config), Artist(atlas(), build_tokenizer(atlas()), config, halved(vae)))
    monkeypatch.setattr(scenery, "fits", lambda tokenizer, texts, length: long not in texts)
    told = [tell(screen._scene(seed)) for seed in seeds]
    assert long not in told and told[::2] == [tell(random_scene(s, atlas(), Wish())) for s in (2, 4)]
