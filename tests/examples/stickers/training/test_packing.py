import json

import pytest
import torch

from conceptmaster.engine.checkpoints.safetensors_io import save
from conceptmaster.errors import InputError
from conceptmaster.examples.stickers.training import packing
from conceptmaster.examples.stickers.training.packing import pack, pack_folder, state_of, unpack


def state():
    torch.manual_seed(0)
    return {
        "a": torch.randn(40, 30),
        "b": torch.randn(7),
        "c": torch.randn(8, 4, 1, 2) * 100,
        "d": torch.zeros(3, 3),
    }


def test_a_packed_state_comes_back_to_a_two_hundredth_of_its_rows(tmp_path):
    pack(state(), tmp_path)
    back = unpack(tmp_path)
    for name, value in state().items():
        assert back[name].dtype == torch.float32 and back[name].shape == value.shape
        rows = value.flatten(1) if value.ndim > 1 else value[:, None]
        largest = rows.abs().amax(1, keepdim=True)
        difference = (back[name].view(rows.shape) - rows).abs()
        assert (difference <= largest / 200 + 1e-9).all()


def test_files_are_no_larger_than_told(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "LARGEST", 2**18 + 900)
    paths = pack(state(), tmp_path)
    assert len(paths) == 2 and unpack(tmp_path).keys() == state().keys()


def test_a_training_is_packed_whole(tmp_path):
    training, output = tmp_path / "training", tmp_path / "packed"
    training.mkdir()
    with pytest.raises(InputError, match="model.safetensors is missing"):
        pack_folder(training, output)
    save(training / "model.safetensors", state())
    save(training / "heads.safetensors", {"look.weight": torch.randn(4, 4)})
    save(training / "vae.safetensors", {"basis": torch.randn(4, 4)})
    (training / "vae.json").write_text(json.dumps({"kind": "blocks"}))
    (training / "tokenizer.json").write_text("{}")
    names = {path.name for path in pack_folder(training, output)}
    assert names == {"weights-1.safetensors", "vae.json", "tokenizer.json", "vae.safetensors"}
    assert state_of(output).keys() == state_of(training).keys()
    assert {"model.a", "look.weight"} <= state_of(output).keys()
    (output / "vae.json").write_text("changed by hand")
    with pytest.raises(InputError, match="is there already: --overwrite replaces it"):
        pack_folder(training, output)
    assert (output / "vae.json").read_text() == "changed by hand"
    pack_folder(training, output, overwrite=True)
    assert (output / "vae.json").read_text() == (training / "vae.json").read_text()
