"""Random bases in every layout, written with names of their own: what is opened is the same model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from conceptmaster.benchmarks.layouts import LINEAR  # noqa: E402
from conceptmaster.benchmarks.random_base import write_base  # noqa: E402
from conceptmaster.engine.checkpoints.source import Choices, Source, open_source  # noqa: E402
from conceptmaster.engine.concept_config import ConceptConfig  # noqa: E402
from conceptmaster.engine.config import ModelConfig  # noqa: E402
from conceptmaster.engine.presets import preset  # noqa: E402

SIZE = Choices(size=(64, 64), frames=9)


def small(name: str) -> ModelConfig:
    """A base of that kind: one head of the true width, thin in every other way."""
    base = preset(name)
    text = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2, "vocab_size": 400}
    thin = {name: 8 for name in ("base_dim", "decoder_base_dim") if name in base.vae}
    no_concepts = base.concept.injection == "standalone"
    return dataclasses.replace(
        base,
        transformer=dataclasses.replace(
            base.transformer, num_attention_heads=1, num_layers=2, ffn_dim=64, text_dim=32
        ),
        text_encoder=base.text_encoder | text,
        vae=base.vae | thin,
        concept=ConceptConfig(injection="none") if no_concepts else base.concept,
        image_encoder={} if no_concepts else base.image_encoder,
    )


def opened(folder: Path, name: str, layout: str, bits: str | None = None) -> Source:
    """The base of that kind, written in that layout and opened."""
    place = folder / f"{layout}-{bits}"
    write_base(small(name), place, layout=layout, bits=bits)
    return open_source(place, SIZE)


def tensors(source: Source) -> dict[str, torch.Tensor]:
    """Everything that the model and the VAE have, wherever it lies."""
    from conceptmaster.engine.checkpoints.lazy_weights import settle

    settle(source.model, torch.device("cpu"))
    found = {f"model.{name}": value for name, value in source.model.state_dict().items()}
    return found | {f"vae.{name}": value for name, value in source.vae.state_dict().items()}


WAN = ["wan2.1-1.3b", "wan2.2-ti2v-5b", "wan2.2-t2v-a14b", "wan2.2-i2v-a14b"]
PHANTOM = ["phantom-wan-1.3b", "phantom-wan-14b"]  # one file, or shards, without a configuration


@pytest.mark.parametrize("name", [*WAN, *PHANTOM])
@pytest.mark.parametrize("layout", ["wan", "comfyui"])
def test_each_layout_is_the_same_model(tmp_path: Path, name: str, layout: str) -> None:
    plain, other = opened(tmp_path, name, "diffusers"), opened(tmp_path, name, layout)
    for part in ("transformer", "concept", "latent_shape", "fps", "boundary"):
        assert getattr(other.model.config, part) == getattr(plain.model.config, part)
    if name != "wan2.1-1.3b":  # whose shift in diffusers' folders is that of 480p; Wan's own program has 5
        assert other.sampling == plain.sampling
    expected, found = tensors(plain), tensors(other)
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_what_takes_references_is_known_again(tmp_path: Path) -> None:
    """A class tells SkyReels-V3, a file's name Phantom."""
    source = opened(tmp_path, "skyreels-v3-r2v-14b", "diffusers")
    concept = preset("skyreels-v3-r2v-14b").concept
    assert source.model.config.concept == concept and source.model.config.fps == 24
    phantom = opened(tmp_path, "phantom-wan-14b", "wan")
    assert phantom.model.config.concept == preset("phantom-wan-14b").concept
    assert "Phantom_Wan_14B.safetensors.index.json" in phantom.origin.files


@pytest.mark.parametrize(("bits", "error"), [("fp8", 0.0626), ("fp8-scaled", 0.0626), ("Q8_0", 0.01)])
def test_fewer_bits_are_near(tmp_path: Path, bits: str, error: float) -> None:
    """error: of a number, relative to the largest of its row; of fp8 three bits behind the leading one."""
    expected = tensors(opened(tmp_path, "wan2.1-1.3b", "diffusers"))
    found = tensors(opened(tmp_path, "wan2.1-1.3b", "comfyui", bits))
    coarse = 0
    for key, value in expected.items():
        own = found[key]
        if key.startswith("vae.") or not LINEAR.fullmatch(key):
            assert torch.allclose(own, value, rtol=1e-3, atol=1e-6), key
            continue
        coarse += not torch.equal(own, value)
        assert ((own - value).abs() <= error * value.abs().max(-1, keepdim=True).values).all(), key
    assert coarse > 10


@pytest.mark.parametrize("name", ["bernini-r-1.3b", "bernini-r-14b"])
def test_bernini_is_known_by_its_root(tmp_path: Path, name: str) -> None:
    config = opened(tmp_path, name, "diffusers").model.config
    wanted = preset(name)
    assert (config.concept, config.boundary) == (wanted.concept, wanted.boundary)
    assert (config.guidance_rule, config.transformer.in_channels) == ("projected", 16)
