import pytest
import torch

from conceptmaster.examples.stickers.training import reading
from conceptmaster.examples.stickers.training.artist import Artist
from conceptmaster.examples.stickers.training.components import doubled, halved
from conceptmaster.examples.stickers.training.train import SPRITES
from conceptmaster.examples.stickers.training.trainee import Trainee
from conceptmaster.examples.stickers.world import grounds
from conceptmaster.examples.stickers.world.scenes import Wish
from conceptmaster.examples.stickers.world.tokens import build_tokenizer

from ..small import atlas, small_config


@pytest.fixture(scope="module")
def artist():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(grounds, "EACH", 2)
        config = small_config()
        vae = doubled(config.vae, SPRITES / "vae.safetensors")
        yield Artist(atlas(), build_tokenizer(atlas(), captions=100), config, halved(vae))


@pytest.mark.parametrize(("name", "value"), [("white", 1.0), ("black", -1.0)])
def test_a_background_is_nearest_to_the_latents_of_a_clip_of_its_colour(artist, name, value):
    found = artist.backgrounds(range(200), Wish(foreign=0.0))
    side = artist.config.height // 2
    clip = torch.full((1, 3, artist.config.frames, side, side), value)
    latents = artist.small.encode(clip)[0, :, 0, :, 0]  # [Cz,H]
    mean, deviation = (
        torch.tensor(artist.config.vae[key])[:, None] for key in ("latents_mean", "latents_std")
    )
    far = {key: (each - (latents - mean) / deviation).square().mean() for key, each in found.items()}
    assert len(far) > 10 and min(far, key=far.__getitem__) == name


def test_captions_come_to_tell_backgrounds(artist, monkeypatch):
    monkeypatch.setattr(reading, "DRAWN", 64)
    torch.manual_seed(0)
    losses = reading.learn_to_read(Trainee(small_config()), artist, 50, 16, "cpu", keep=False)
    assert losses["scenery"][-1] < 0.9 * losses["scenery"][0]


def test_what_a_transformer_reads_already_stays_where_that_is_asked_for(artist, monkeypatch):
    monkeypatch.setattr(reading, "DRAWN", 16)
    monkeypatch.setattr(reading, "KEPT", 100.0)
    torch.manual_seed(0)
    trainee = Trainee(small_config())
    captions = artist.captions(range(8), Wish(foreign=0.0))
    told = captions.token_ids, captions.token_mask
    before = trainee.embedded(trainee.read(*told)).detach()
    losses = reading.learn_to_read(trainee, artist, 4, 8, "cpu", keep=True)
    moved = trainee.embedded(trainee.read(*told)).detach() - before
    assert 0 < moved.square().mean() < 0.1 * before.square().mean() and losses["moved"][0] > 0
