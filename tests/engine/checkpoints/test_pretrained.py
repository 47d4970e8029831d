"""Models by path: tiny random ones, saved as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from conceptmaster.engine.checkpoints.pretrained import hashes_of, kind_of, open_pretrained  # noqa: E402
from conceptmaster.errors import OutOfMemory, WeightsError  # noqa: E402

DINO = {"dinov2": "Dinov2Model"}


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("models") / "dino"
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


def copied(folder: Path, to: Path, **config: object) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    values = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(values))
    return to


def test_a_model_opens_as_it_was_saved(dino):
    from transformers import Dinov2Model

    opened = open_pretrained(dino, DINO)
    torch.manual_seed(1)  # what is not read would be drawn anew
    theirs = Dinov2Model.from_pretrained(dino).state_dict()
    assert opened.kind == kind_of(dino) == "dinov2"
    assert all(torch.equal(value, theirs[name]) for name, value in opened.model.state_dict().items())
    assert not opened.model.training and not any(p.requires_grad for p in opened.model.parameters())
    assert set(opened.files) == {"config.json", "model.safetensors"}


def test_another_kind_is_named_before_weights_are_read(dino, tmp_path):
    folder = copied(dino, tmp_path / "other", model_type="bert")
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"of the kind 'bert': dinov2 is needed here"):
        open_pretrained(folder, DINO)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nothing/at/all", "no folder at 'nothing/at/all'"),
        ("\0", "no folder at"),
        ("x" * 5000, "no folder at"),
    ],
)
def test_nothing_there_is_one_line(name, told):
    with pytest.raises(WeightsError, match=told) as caught:
        open_pretrained(name, DINO)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_folders_that_are_no_model(dino, tmp_path):
    with pytest.raises(WeightsError, match="has no config.json"):
        open_pretrained(tmp_path, DINO)
    with pytest.raises(WeightsError, match="is a file: give the folder"):
        open_pretrained(dino / "config.json", DINO)
    empty = copied(dino, tmp_path / "none")
    (empty / "model.safetensors").rename(empty / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="is a pickle"):
        open_pretrained(empty, DINO)
    (empty / "pytorch_model.bin").unlink()
    with pytest.raises(WeightsError, match=r"has no model\.safetensors"):
        open_pretrained(empty, DINO)


def test_weights_must_be_whole(dino, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copied(dino, tmp_path / "part")
    tensors = load_file(folder / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks weights of Dinov2Model: layernorm\.weight"):
        open_pretrained(folder, DINO)
    cut = (folder / "model.safetensors").read_bytes()[:100]
    (folder / "model.safetensors").write_bytes(cut)
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        open_pretrained(folder, DINO)
    with pytest.raises(WeightsError, match="does not load as Dinov2Model"):
        open_pretrained(copied(dino, tmp_path / "wide", hidden_size=32), DINO)


def test_code_and_quantization_of_a_config_are_not_followed(dino, tmp_path):
    folder = copied(
        dino,
        tmp_path / "own",
        auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Config"},
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
        _attn_implementation="somebody/kernels",
    )
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    model = open_pretrained(folder, DINO).model
    assert type(model).__module__.startswith("transformers.models.dinov2")


def test_missing_parts_beside_the_weights_are_told(dino):
    opened = open_pretrained(dino, DINO)
    with pytest.raises(WeightsError, match="needs preprocessor_config.json beside its weights"):
        opened.image_processor()
    with pytest.raises(WeightsError, match="needs tokenizer.json"):
        opened.tokenizer()


def test_memory_that_is_short_is_told(dino, monkeypatch):
    from transformers import Dinov2Model

    def short(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Dinov2Model, "from_pretrained", short)
    with pytest.raises(OutOfMemory):
        open_pretrained(dino, DINO)


def test_of_the_hub_the_configuration_comes_first(dino, monkeypatch):
    import huggingface_hub

    asked = []

    def download(place: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((place, revision, allow_patterns))
        return str(dino)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(WeightsError, match="someone/dino is a model of the kind 'dinov2': clip is needed"):
        open_pretrained("someone/dino", {"clip": "CLIPModel"}, revision="main")
    assert asked == [("someone/dino", "main", ["config.json"])]
    assert open_pretrained("someone/dino", DINO).place == "someone/dino"
    wanted = asked[-1][2]
    assert "model.safetensors" in wanted and not any("bin" in name or ".py" in name for name in wanted)
    assert hashes_of("someone/dino", DINO) == open_pretrained(dino, DINO).files
