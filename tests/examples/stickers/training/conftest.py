import pytest

from conceptmaster.examples.stickers.training import train
from conceptmaster.examples.stickers.training.artist import Artist
from conceptmaster.examples.stickers.training.components import doubled, halved
from conceptmaster.examples.stickers.world import grounds
from conceptmaster.examples.stickers.world.tokens import build_tokenizer

from ..small import atlas, small_config


@pytest.fixture(scope="module")
def artist():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(grounds, "EACH", 2)
        config = small_config()
        vae = doubled(config.vae, train.SPRITES / "vae.safetensors")
        yield Artist(atlas(), build_tokenizer(atlas(), captions=300), config, halved(vae))
