"""The one way in for weights: files as people have them, what is told of them, what is refused as what."""

from __future__ import annotations

import hashlib
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

from safetensors.torch import load_file, save_file  # noqa: E402

from conceptmaster.engine.checkpoints import hub  # noqa: E402
from conceptmaster.engine.checkpoints.lora import LoraReport  # noqa: E402
from conceptmaster.engine.checkpoints.source import Choices, LoraFile, loras_of, open_source  # noqa: E402
from conceptmaster.engine.checkpoints.wan_names import wan_name  # noqa: E402
from conceptmaster.errors import InputError  # noqa: E402

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
SMALL = Choices((64, 64), 9)


@pytest.fixture
def own(wan_folder, tmp_path):
    """A tiny base, to be changed."""
    return shutil.copytree(wan_folder, tmp_path / "own")


def state(source):
    return {name: value.clone() for name, value in source.model.transformer.state_dict().items()}


def refused(place, *words, choices=SMALL):
    """Wrong input, told in one short line."""
    with pytest.raises(InputError) as caught:
        open_source(place, choices)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700, text
    assert all(word in text for word in words), text


def test_every_file_is_told_by_its_sha256(own):
    origin = open_source(f"{own}/", SMALL).origin
    files = {file: hashlib.sha256((own / file).read_bytes()).hexdigest() for file in origin.files}
    assert origin.name == "own" and origin.files == files and origin.commit is None
    assert {TRANSFORMER, TEXT, "tokenizer/tokenizer.json", "vae/config.json"} < set(files)
    assert not any(file.startswith("/") for file in files)


@pytest.mark.parametrize("name", [TRANSFORMER, "tokenizer/tokenizer.json", "extra.safetensors"])
def test_a_file_that_is_replaced_after_it_was_read_is_noticed(own, name, monkeypatch):
    """Its hash would be that of another file than the one that was read."""
    from conceptmaster.engine.checkpoints import source

    lora = own / "extra.safetensors"
    save_file({"blocks.0.self_attn.q.diff": torch.zeros(24, 24)}, lora)
    real = source.load_base_vae

    def load(*given):
        found = real(*given)
        shutil.copy(own / name, own / "copy")
        (own / "copy").replace(own / name)
        return found

    monkeypatch.setattr(source, "load_base_vae", load)
    monkeypatch.setattr(source, "merge_lora", lambda *_: LoraReport("merged", 1.0, (), ()))
    choices = Choices((64, 64), 9, loras=(LoraFile(lora),))
    refused(own, f"{name}' was changed while it was read", choices=choices)


def test_a_model_of_the_hub_is_told_by_its_commit(own, monkeypatch):
    commit, asked = "0123456789abcdef" * 2, []
    snapshot = own.rename(own.parent / commit)

    def download(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(snapshot)

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for place in (
        "Wan-AI/Wan2.1",
        "https://huggingface.co/Wan-AI/Wan2.1/",
        "https://hf.co/Wan-AI/Wan2.1/tree/dev",
    ):
        source = open_source(place, SMALL)
        assert (source.origin.name, source.origin.commit) == ("Wan-AI/Wan2.1", commit)
        assert source.model.config.name == "Wan2.1"
    assert asked == [("Wan-AI/Wan2.1", None), ("Wan-AI/Wan2.1", None), ("Wan-AI/Wan2.1", "dev")]
    shutil.rmtree(snapshot / "transformer")
    (snapshot / "model_index.json").unlink(missing_ok=True)
    refused(
        "Wan-AI/Wan2.1", "Wan-AI/Wan2.1 of the Hub is not in diffusers' layout: take the release that ends in"
    )


# Files that lie beside the right ones.


def test_what_published_files_hold_besides_is_passed_over(own):
    expected = state(open_source(own, SMALL))
    tensors = load_file(own / TRANSFORMER)
    for block in range(2):
        tensors[f"blocks.{block}.attn2.norm_added_q.weight"] = torch.ones(24)
    save_file(tensors, own / TRANSFORMER)
    (own / "transformer" / "._diffusion_pytorch_model.safetensors").write_bytes(b"\0\5\x16\7")
    shutil.copy(
        own / "vae/diffusion_pytorch_model.safetensors", own / "vae/diffusion_pytorch_model.fp16.safetensors"
    )
    found = open_source(own, SMALL)
    assert state(found).keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in state(found).items())
    assert [file for file in found.origin.files if file.startswith("vae/")] == [
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attn1.norm_added_q.weight",
        "blocks.0.attn2.norm_added_q.bias",
        "x.blocks.0.attn2.norm_added_q.weight",
    ],
)
def test_names_like_it_are_not(own, name):
    save_file(load_file(own / TRANSFORMER) | {name: torch.ones(24)}, own / TRANSFORMER)
    refused(own, f"1 unexpected: {name}")


def test_a_variant_alone_is_read_and_two_are_not(own):
    part = own / "transformer"
    (own / TRANSFORMER).rename(part / "diffusion_pytorch_model.fp16.safetensors")
    open_source(own, SMALL)
    shutil.copy(
        part / "diffusion_pytorch_model.fp16.safetensors", part / "diffusion_pytorch_model.bf16.safetensors"
    )
    refused(own, "several safetensors and no index")


# LoRAs.


def test_loras_add_up_each_with_its_scale(own, tmp_path):
    g = torch.Generator().manual_seed(0)
    changes = {}
    for file, layer in (
        ("a", "blocks.0.attn1.to_q"),
        ("b", "blocks.0.attn1.to_q"),
        ("c", "blocks.1.attn2.to_k"),
    ):
        changes[file] = layer, torch.randn(2, 24, generator=g), torch.randn(24, 2, generator=g)
        pair = {f"{layer}.lora_A.weight": changes[file][1], f"{layer}.lora_B.weight": changes[file][2]}
        save_file(pair, tmp_path / f"{file}.safetensors")
    scales = {"a": 0.5, "b": -2.0, "c": 1.0}
    expected = state(open_source(own, SMALL))
    for file, (layer, down, up) in changes.items():
        expected[f"{layer}.weight"] += scales[file] * up @ down
    loras = loras_of([tmp_path / f"{file}.safetensors" for file in scales], tuple(scales.values()))
    source = open_source(own, Choices((64, 64), 9, loras=loras))
    for name, value in state(source).items():
        torch.testing.assert_close(value, expected[name])
    assert [(lora.name, lora.scale) for lora in source.origin.loras] == [
        (f"{file}.safetensors", scale) for file, scale in scales.items()
    ]


def test_scales_pair_up_in_order():
    assert [lora.scale for lora in loras_of(["a", "b"], (0.5, 2.0))] == [0.5, 2.0]
    assert [lora.scale for lora in loras_of(["a", "b"], ())] == [None, None]
    with pytest.raises(InputError, match="2 --lora and 1 --lora-scale"):
        loras_of(["a", "b"], (1.0,))
    with pytest.raises(InputError, match="finite"):
        loras_of(["a"], (float("nan"),))


def test_a_lora_of_whole_numbers(own, tmp_path):
    ones = torch.ones(2, 24, dtype=torch.int8)
    pair = {
        "blocks.0.attn1.to_q.lora_A.weight": ones,
        "blocks.0.attn1.to_q.lora_B.weight": ones.T.contiguous(),
    }
    save_file(pair, tmp_path / "lora.safetensors")
    choices = Choices((64, 64), 9, loras=(LoraFile(tmp_path / "lora.safetensors"),))
    refused(own, "has whole numbers in blocks.0.attn1.to_q.lora_", choices=choices)


# Weights that are not read, each told as what it is.


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64])
@pytest.mark.parametrize("file", [TRANSFORMER, TEXT, "vae/diffusion_pytorch_model.safetensors"])
def test_whole_numbers_under_plain_names(own, file, dtype):
    tensors = load_file(own / file)
    name = max(tensors, key=lambda key: tensors[key].numel())
    save_file(tensors | {name: tensors[name].to(dtype)}, own / file)
    refused(own, f"1 of whole numbers, not of floating point (quantised weights are not read): {name}")


def test_wans_own_names_in_diffusers_folder(own):
    tensors = {}
    for key, value in load_file(own / TRANSFORMER).items():
        module, dot, kind = key.rpartition(".")
        plain = kind not in ("weight", "bias")
        tensors[wan_name(key) if plain else f"{wan_name(module)}{dot}{kind}"] = value
    expected = state(open_source(own, SMALL))
    save_file(tensors, own / TRANSFORMER)
    found = state(open_source(own, SMALL))
    assert found.keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in found.items())


def test_many_wrong_tensors_are_counted_and_some_are_named(own):
    tensors = {f"other.{i}.weight": torch.ones(1) for i in range(3000)}
    save_file(tensors, own / TRANSFORMER)
    refused(own, "3000 unexpected: other.0.weight", "and 2994 more")


def test_an_unreachable_hub_is_told_shortly(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refused("https://huggingface.co/someone/wan", "someone/wan is no folder, and not to be had from the Hub")
    assert hub.HUB_ID.fullmatch("someone/wan")
