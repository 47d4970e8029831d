import json

import pytest
import torch

from conceptmaster.engine.checkpoints.safetensors_io import load, save, save_model
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.errors import InputError
from conceptmaster.examples.stickers.training.packing import HEADS, state_of
from conceptmaster.examples.stickers.training.shipping import collect
from conceptmaster.runtime.bundle_format.schema import Ranges, Vocabulary

from ..small import small_config


def test_weights_of_a_training_are_rounded_and_say_that_any_word_will_do(tmp_path):
    training, output = tmp_path / "training", tmp_path / "weights"
    training.mkdir()
    with pytest.raises(InputError, match="model.safetensors is missing"):
        collect(training, output)
    torch.manual_seed(0)
    save_model(ConceptMaster(small_config()), training / "model.safetensors")
    save(training / "vae.safetensors", {"basis": torch.full((2, 2), 1 / 3)})
    save(training / HEADS, {"heads.story.weight": torch.full((2, 2), 1 / 3)})
    (training / "tokenizer.json").write_text("{}")
    (training / "vae.json").write_text("{}")
    output.mkdir()
    (output / "model.safetensors").write_text("somebody's")
    with pytest.raises(InputError, match="is there already: --overwrite replaces it"):
        collect(training, output)
    assert (output / "model.safetensors").read_text() == "somebody's"
    collect(training, output, overwrite=True)
    before, after = (load(folder / "model.safetensors")[0] for folder in (training, output))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == torch.float16 and torch.equal(after[name], value.half())
    assert load(output / "vae.safetensors")[0]["basis"].dtype == torch.float16
    begun = state_of(output)  # a training begins from these with its heads
    assert begun.keys() == {f"model.{name}" for name in after} | {"heads.story.weight"}
    told = {name: json.loads((output / f"{name}.json").read_text()) for name in ("vocabulary", "ranges")}
    known = Vocabulary(**told["vocabulary"])
    assert known.open and "in a meadow" in known.phrases["backgrounds"]
    assert Ranges(**told["ranges"]).concepts == [0, 4]
