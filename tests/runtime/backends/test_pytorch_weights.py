"""The torch backend with the weights that a bundle records: a base's on disk, LoRAs, adapters; what is not
there is named."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("onnxscript")

from safetensors.torch import load_file, save_file  # noqa: E402

from conceptmaster import Concept, Pipeline  # noqa: E402
from conceptmaster.engine.checkpoints import lazy_weights  # noqa: E402
from conceptmaster.engine.checkpoints.adapter import save_adapter  # noqa: E402
from conceptmaster.engine.checkpoints.source import Choices, loras_of, open_source  # noqa: E402
from conceptmaster.errors import ConfigError, InputError  # noqa: E402
from conceptmaster.export.bundle import write_bundle  # noqa: E402
from conceptmaster.runtime.backends import open_backend  # noqa: E402
from conceptmaster.runtime.backends.pytorch.options import TorchOptions  # noqa: E402
from conceptmaster.runtime.bundle_format import manifest as manifests  # noqa: E402
from conceptmaster.runtime.bundle_format.find import SHIPPED, Bundle  # noqa: E402

SCALES = (0.5, -1.5)
PICTURE = np.full((16, 16, 3), (200, 30, 60), np.uint8)


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Two LoRAs that overlap."""
    folder, g = tmp_path_factory.mktemp("loras"), torch.Generator().manual_seed(0)
    for file, layers in (
        ("style", ("attn1.to_q", "attn2.to_v")),
        ("few-steps", ("attn1.to_q", "attn1.to_out.0")),
    ):
        tensors = {}
        for layer in layers:
            name = f"transformer.blocks.1.{layer}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, 24, generator=g) * 0.4
            tensors[f"{name}.lora_B.weight"] = torch.randn(24, 2, generator=g) * 0.4
        save_file(tensors, folder / f"{file}.safetensors")
    return folder / "style.safetensors", folder / "few-steps.safetensors"


@pytest.fixture(scope="module")
def bundle(wan_folder, loras, tmp_path_factory):
    """A base with a CLIP, whose adapter is new, and two LoRAs, with its graphs."""
    folder = tmp_path_factory.mktemp("bundles") / "stacked"
    write_bundle(open_source(wan_folder, Choices((64, 64), 9, loras=loras_of(loras, SCALES))), folder)
    return folder


@pytest.fixture(scope="module")
def adapter(wan_folder, tmp_path_factory):
    """A trained one."""
    model = open_source(wan_folder, Choices((64, 64), 5)).model
    for parameter in model.transformer.blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("adapters") / "adapter.safetensors"
    save_adapter(model, path)
    return path


def frames(folder, concepts=(), **options):
    pipeline = Pipeline.from_bundle(folder, threads=1, **options)
    return pipeline("a red ball", concepts, steps=3, seed=1).frames.astype(int)


def refused(folder, words, **options):
    with pytest.raises(InputError, match=words) as caught:
        open_backend(Bundle.open(folder), "cpu", 1, "torch", TorchOptions(**options)).load(())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("smallest", [64, 2**20])
def test_weights_on_disk_and_loras_give_the_graphs_frames(bundle, wan_folder, loras, monkeypatch, smallest):
    monkeypatch.setattr(lazy_weights, "MIN_ELEMENTS", smallest)
    concepts = [Concept("red ball", PICTURE)]
    expected = frames(bundle, concepts)
    options = TorchOptions(
        weights=wan_folder, lora=loras[::-1]
    )  # in any order: they are known by their hashes
    found = frames(bundle, concepts, backend="torch", options=options)
    assert expected.std() > 5 and abs(found - expected).max() <= 1
    loaded = Pipeline.from_bundle(bundle, backend="torch", options=options)
    loaded.load()
    assert not any(p.is_meta for p in loaded.backend.stepper.denoise.parameters())


def test_what_lies_beside_the_weights_is_found(bundle, wan_folder, loras, tmp_path):
    weights = shutil.copytree(wan_folder, tmp_path / "other-name")
    for path in loras:
        shutil.copy(path, weights)
    own = shutil.copytree(bundle, tmp_path / "own")
    expected = frames(bundle)
    assert abs(frames(own, backend="torch", options=TorchOptions(weights=weights)) - expected).max() <= 1
    weights.rename(own / "weights")
    assert abs(frames(own, backend="torch") - expected).max() <= 1


def test_the_record_has_names_and_hashes_and_no_path(bundle, wan_folder, loras):
    source = manifests.load(bundle).source
    assert source is not None and source.name == wan_folder.name and source.commit is None
    assert [(lora.file, lora.scale) for lora in source.loras] == [
        (path.name, scale) for path, scale in zip(loras, SCALES, strict=True)
    ]
    assert str(wan_folder.parent) not in (bundle / "manifest.json").read_text()


def test_a_missing_or_other_piece_is_named(bundle, wan_folder, loras, adapter, tmp_path):
    refused(bundle, "no weights of the bundle .* \\(it was made from 'tiny-wan'\\): say where .* --weights")
    refused(bundle, "made with the LoRA 'style.safetensors' .*--lora FILE", weights=wan_folder)
    options = {"weights": wan_folder, "lora": (loras[0], adapter)}
    refused(bundle, "made with the LoRA 'few-steps.safetensors' .*adapter.safetensors is another", **options)
    refused(bundle, "is another", weights=wan_folder, lora=(*loras[:1], tmp_path / "none"))
    options = {"weights": wan_folder, "lora": loras, "lora_scale": SCALES[::-1]}
    refused(bundle, "has 'style.safetensors' at scale 0.5, not -1.5", **options)
    refused(
        bundle, "3 --lora and 1 --lora-scale", weights=wan_folder, lora=(*loras, adapter), lora_scale=(1.0,)
    )
    refused(bundle, "made without the LoRA .*adapter", weights=wan_folder, lora=(*loras, adapter))
    refused(bundle, "made without the adapter", weights=wan_folder, lora=loras, adapter=adapter)
    other = shutil.copytree(wan_folder, tmp_path / "other")
    file = other / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"shared.weight": tensors["shared.weight"] + 1e-3}, file)
    refused(bundle, "text_encoder/model.safetensors has SHA-256 .*, recorded is", weights=other, lora=loras)


def test_a_bundle_that_records_nothing_takes_what_is_given(bundle, wan_folder, loras, tmp_path, caplog):
    import dataclasses

    own = shutil.copytree(bundle, tmp_path / "own")
    manifests.save(dataclasses.replace(manifests.load(own), format=2, source=None), own)
    options = TorchOptions(weights=wan_folder, lora=loras, lora_scale=SCALES)
    with caplog.at_level(logging.INFO):
        found = frames(own, backend="torch", options=options)
    assert abs(found - frames(bundle)).max() <= 1
    assert "records no SHA-256 of its weights" in caplog.text
    plain = frames(own, backend="torch", options=TorchOptions(weights=wan_folder))
    assert abs(plain - found).mean() > 1


# Bundles without graphs.


@pytest.fixture(scope="module")
def without_graphs(wan_folder, adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "without"
    source = open_source(wan_folder, Choices((64, 64), 9, adapter))
    assert write_bundle(source, folder, with_graphs=False) == []
    return folder


def test_a_bundle_without_graphs_runs_on_the_torch_backend(without_graphs, wan_folder, adapter):
    assert sorted(path.name for path in without_graphs.iterdir()) == ["manifest.json", "tokenizer.json"]
    options = TorchOptions(weights=wan_folder, adapter=adapter)
    seen = frames(without_graphs, [Concept("red ball", PICTURE)], backend="torch", options=options)
    assert abs(seen - frames(without_graphs, backend="torch", options=options)).mean() > 1
    refused(
        without_graphs, "made with the adapter 'adapter.safetensors' .*--adapter FILE", weights=wan_folder
    )


def test_a_base_without_concepts_runs_without_graphs(wan_folder, tmp_path):
    own = shutil.copytree(wan_folder, tmp_path / "base")
    shutil.rmtree(own / "image_encoder")
    write_bundle(open_source(own, Choices((64, 64), 9)), tmp_path / "new", with_graphs=False)
    write_bundle(open_source(wan_folder, Choices((64, 64), 9)), tmp_path / "other", with_graphs=False)
    assert (manifests.load(tmp_path / "new").concepts, manifests.load(tmp_path / "other").concepts) == (0, 4)
    found = frames(tmp_path / "new", backend="torch", options=TorchOptions(weights=own))
    assert found.std() > 5
    alike = frames(tmp_path / "other", backend="torch", options=TorchOptions(weights=wan_folder))
    assert np.array_equal(found, alike)  # the same weights, and no concept is given


def test_inspect_tells_the_source(bundle, without_graphs, capsys):
    from conceptmaster.cli import main

    assert main(["inspect", str(bundle)]) == main(["inspect", str(without_graphs)]) == 0
    out = capsys.readouterr().out
    assert "source    tiny-wan, LoRA style.safetensors × 0.5, LoRA few-steps.safetensors × -1.5, " in out
    assert "source    tiny-wan, adapter adapter.safetensors, " in out and "all               0.00 MB" in out


def test_whatever_needs_graphs_says_so(without_graphs, capsys, tmp_path):
    from conceptmaster.cli import main

    for command in (
        ("generate", "--bundle", without_graphs, "--prompt", "a", "--output", tmp_path / "a.npy"),
        ("verify", without_graphs),
        ("build", without_graphs, "--target", "sm_90"),
        ("export-triton", without_graphs, tmp_path / "models"),
    ):
        assert main([str(argument) for argument in command]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "was exported without graphs: run it with --backend torch" in err


def test_signatures_are_those_of_the_graphs(bundle, wan_folder, loras, tmp_path):
    source = open_source(wan_folder, Choices((64, 64), 9, loras=loras_of(loras, SCALES)))
    write_bundle(source, tmp_path / "new", with_graphs=False)
    exported, found = manifests.load(bundle), manifests.load(tmp_path / "new")
    assert found.shapes == exported.shapes and found.graphs.keys() == exported.graphs.keys()
    for name, graph in found.graphs.items():
        assert graph.outputs == exported.graphs[name].outputs
        assert set(graph.inputs) >= set(exported.graphs[name].inputs)


def test_a_configuration_that_leaves_defaults_out_is_planned(tmp_path, edit_manifest):
    """What the manifest says of the model is read by the engine, which knows them, not as it stands."""
    folder = tmp_path / "own"
    shutil.copytree(SHIPPED / "sprites", folder)
    full = open_backend(Bundle.open(folder), "cpu", None, "torch").plan
    edit_manifest(folder, lambda d: [d["model"]["transformer"].pop(name) for name in ("patch_size", "eps")])
    assert open_backend(Bundle.open(folder), "cpu", None, "torch").plan == full
    edit_manifest(folder, lambda d: d["model"]["transformer"].pop("ffn_dim"))
    assert open_backend(Bundle.open(folder), "cpu", None, "torch").plan["peak"] > full["peak"]
    edit_manifest(folder, lambda d: d["model"]["transformer"].update(num_layers=10**9))
    with pytest.raises(ConfigError, match="num_layers must be a positive whole number of at most 256"):
        open_backend(Bundle.open(folder), "cpu", None, "torch")


def test_single_files_are_found_by_the_options_of_the_export(wan_folder, tmp_path, monkeypatch):
    """And in another folder, under another name: their hashes count. A bundle records no path."""
    from conceptmaster.benchmarks.layouts import wan_transformer
    from conceptmaster.runtime.backends.pytorch.weights import open_weights

    tensors = load_file(wan_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({wan_transformer(name): value for name, value in tensors.items()}, tmp_path / "wan.safetensors")
    parts = {"transformer": tmp_path / "wan.safetensors"}
    write_bundle(
        open_source(wan_folder, Choices((64, 64), 9, parts=parts)), tmp_path / "b", with_graphs=False
    )
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.manifest.source is not None
    files = {file.file for file in bundle.manifest.source.weights()}
    assert "wan.safetensors" in files and not any("/wan" in file or "transformer/" in file for file in files)
    monkeypatch.chdir(tmp_path)
    options = TorchOptions(weights=wan_folder, transformer="wan.safetensors").from_here()
    shutil.copy(tmp_path / "wan.safetensors", tmp_path / "other.safetensors")
    for given in (options.parts, {"transformer": tmp_path / "other.safetensors"}):
        source = open_weights(bundle, wan_folder, Choices(parts=given))
        assert source.model.config.name == "tiny-wan"
    with pytest.raises(InputError, match="transformer/.* was not part of it|wan.safetensors is missing"):
        open_weights(bundle, wan_folder, Choices())
    tensors["proj_out.bias"] += 1
    save_file(
        {wan_transformer(name): value for name, value in tensors.items()}, tmp_path / "other.safetensors"
    )
    with pytest.raises(InputError, match="other.safetensors was not part of it"):
        open_weights(bundle, wan_folder, Choices(parts={"transformer": tmp_path / "other.safetensors"}))
