import json

import pytest
import torch

from conceptmaster.engine.checkpoints.safetensors_io import load
from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.training.train_vae import write_vae
from conceptmaster.examples.stickers.training import train
from conceptmaster.examples.stickers.training.components import doubled
from conceptmaster.examples.stickers.training.decoder import train_decoder
from conceptmaster.examples.stickers.training.options import DecoderOptions, Shown
from conceptmaster.examples.stickers.world import grounds

from ..small import atlas, small_config


@pytest.fixture(autouse=True)
def few_paintings(monkeypatch):
    monkeypatch.setattr(grounds, "EACH", 1)


def run(folder, steps):
    options = DecoderOptions(steps, batch_size=2, log_every=2, shown=Shown(4, 2, 1, 1))
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
