"""Tuning on a request: what each method changes, what it writes, and that others read what it wrote."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from conceptmaster.delta_file import read_delta
from conceptmaster.engine.checkpoints.safetensors_io import save, save_model
from conceptmaster.engine.checkpoints.source import Choices, LoraFile, open_source
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.engine.vae.wan_decoder import build_vae
from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.scoring.score import judged_scene
from conceptmaster.examples.sprites.training.tuning import named, open_base, tune
from conceptmaster.examples.sprites.training.tuning_clips import class_clips, picture_clips
from conceptmaster.examples.sprites.training.tuning_options import METHODS, TuneOptions
from conceptmaster.examples.sprites.world.requesting import concepts, references
from conceptmaster.examples.sprites.world.vocabulary import build_tokenizer
from conceptmaster.runtime.request import Concept, Request

from ..small import small_config

FEW = TuneOptions(steps=4, views=3, prior=3)
STICKERS = Path(__file__).resolve().parents[4] / "examples" / "stickers" / "weights"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    config = dataclasses.replace(small_config(injection="none"), image_encoder={})
    torch.manual_seed(5)
    model = ConceptMaster(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    save_model(model.half(), folder / "model.safetensors")
    save(folder / "vae.safetensors", build_vae(config).state_dict())
    build_tokenizer().save(str(folder / "tokenizer.json"))
    return open_base(folder)


@pytest.fixture(scope="module")
def request_():
    scene = judged_scene(3, 2, same_noun=True)
    return Request(scene.caption, concepts(scene, references(scene)), seed=3)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_changes_is_what_its_file_says(base, request_, tmp_path, method):
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    tuned = tune(method, base, request_, tmp_path / "first", FEW)
    (file,) = tuned.files
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    choices, place = Choices(), base.folder
    if method == "custom_diffusion":
        choices = Choices(custom=(file,))
        noun = request_.concepts[0].label.split()[-1]
        assert list(read_delta(file).words) == [f"<{noun}-1>", f"<{noun}-2>"]
    elif method == "dreambooth_lora":
        choices = Choices(loras=(LoraFile(file),))
    else:
        place = file
    source = open_source(place, choices)
    state = source.model.state_dict()
    changed = {n for n, v in state.items() if v.shape != before[n].shape or not torch.equal(v, before[n])}
    kinds = {
        "custom_diffusion": (
            "attn2.to_k.weight",
            "attn2.to_v.weight",
            "shared.weight",
            "embed_tokens.weight",
        ),
        "dreambooth": ("",),
        "dreambooth_lora": ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"),
    }
    assert changed and all(name.endswith(kinds[method]) for name in changed)
    assert all(
        name.startswith("transformer.") for name in changed if "shared" not in name and "embed" not in name
    )

    again = tune(method, base, request_, tmp_path / "second", FEW)
    assert again.files[0] != file
    other = open_source(again.files[0] if method == "dreambooth" else place, _with(choices, again.files[0]))
    assert all(torch.equal(v, state[n]) for n, v in other.model.state_dict().items())

    kept = file.stat().st_mtime_ns
    assert dataclasses.replace(tune(method, base, request_, tmp_path / "first", FEW), seconds=0.0) == (
        dataclasses.replace(tuned, seconds=0.0)
    )
    assert file.stat().st_mtime_ns == kept
    rival = METHODS[METHODS.index(method) - 1]
    for asked in ((rival, FEW), (method, dataclasses.replace(FEW, steps=5))):
        with pytest.raises(InputError, match="was tuned with .* choose another --output"):
            tune(asked[0], base, request_, tmp_path / "first", asked[1])
    assert file.stat().st_mtime_ns == kept
    made = file / "model.safetensors" if file.is_dir() else file
    made.write_bytes(made.read_bytes()[:500])
    with pytest.raises(InputError, match=f"{file} is not what was tuned: delete .*tuned.json to tune again"):
        tune(method, base, request_, tmp_path / "first", FEW)
    made.unlink()
    with pytest.raises(InputError, match=f"{file} is not what was tuned"):
        tune(method, base, request_, tmp_path / "first", FEW)


@pytest.mark.parametrize(
    "spoil", [{"seconds": "x"}, {"seconds": None}, {"options": 1}, {"sha256": None}, {"method": []}]
)
def test_a_damaged_record_is_told_of(base, request_, tmp_path, spoil):
    tune(METHODS[0], base, request_, tmp_path, dataclasses.replace(FEW, steps=1))
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | spoil))
    with pytest.raises(InputError, match="is damaged|was tuned with|is not what was tuned"):
        tune(METHODS[0], base, request_, tmp_path, dataclasses.replace(FEW, steps=1))


@pytest.mark.parametrize("content", ["{", "{}", "\xff", None])
def test_a_tokenizer_that_cannot_be_read(base, tmp_path, content):
    for name in ("model.safetensors", "vae.safetensors"):
        shutil.copyfile(base.folder / name, tmp_path / name)
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, "latin-1")
    with pytest.raises(InputError, match=f"cannot start from {tmp_path}: .*"):
        open_base(tmp_path)


def test_a_tokenizer_of_another_model(base, tmp_path):
    for name in ("model.safetensors", "vae.safetensors"):
        shutil.copyfile(base.folder / name, tmp_path / name)
    shutil.copyfile(STICKERS / "tokenizer.json", tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="it has 2048 entries, the text encoder knows 512"):
        open_base(tmp_path)


def _with(choices, file):
    if choices.custom:
        return Choices(custom=(file,))
    return Choices(loras=(LoraFile(file),)) if choices.loras else choices


def test_the_prompt_says_the_new_names(request_):
    first, second = (concept.label for concept in request_.concepts)
    said = named(request_.prompt, {first: "<a-1>", second: "<a-2>"})
    for label, word in ((first, "<a-1>"), (second, "<a-2>")):
        rank, noun = label.split()
        assert f"{rank} {word} {noun}" in said
    with pytest.raises(InputError, match="does not say 'whale'"):
        named(request_.prompt, {"whale": "<a-1>"})


def test_clips_show_the_picture_where_they_count(base, request_):
    concept = request_.concepts[0]
    how = base.model.config, base.vae
    own = picture_clips("<a-1> cat", [np.asarray(concept.image)], 3, 0, *how)
    assert own.latents.shape == (3, *base.model.config.latent_shape)
    assert all("a <a-1> cat " in caption for caption in own.captions)
    assert (own.weight == 0).any() and (own.weight > 2).any()
    kind = class_clips("cat", 3, 0, *how)
    assert all(" cat " in f" {caption} " for caption in kind.captions) and (kind.weight >= 1).all()


def test_what_cannot_be_tuned(base, request_, tmp_path):
    with pytest.raises(InputError, match="method must be one of custom_diffusion"):
        tune("lora", base, request_, tmp_path)
    with pytest.raises(InputError, match="without concepts"):
        tune(METHODS[0], base, Request("a cat"), tmp_path)
    picture = np.zeros((192, 192, 3), np.uint8)
    for label, image, prompt, told in (
        ("cat", picture, "a dog", "does not say 'cat'"),
        ("dragon", picture, "a dragon", "noun of this world"),
        ("cat", np.zeros((192, 192, 4), np.uint8), "a cat", r"not uint8 \[192, 192, 4\]"),
        ("cat", picture.astype(float), "a cat", "not float64"),
        ("cat", "cat.png", "a cat", "not no array"),
    ):
        with pytest.raises(InputError, match=told):
            tune(METHODS[0], base, Request(prompt, (Concept(label, image),)), tmp_path / "none", FEW)
    assert not (tmp_path / "none").exists()  # nothing was begun
    with pytest.raises(InputError, match="cannot start from .* no weights file"):
        open_base(tmp_path)
    save_model(ConceptMaster(small_config()), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="injection is 'none'"):
        open_base(tmp_path)
