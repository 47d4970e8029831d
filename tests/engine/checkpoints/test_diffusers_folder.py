from __future__ import annotations

import json
import shutil

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.engine.checkpoints.diffusers_folder import is_folder, locate  # noqa: E402
from conceptmaster.engine.checkpoints.safetensors_io import save  # noqa: E402
from conceptmaster.engine.checkpoints.weight_files import read_json, stored_tensors  # noqa: E402
from conceptmaster.errors import WeightsError  # noqa: E402

INDEX = "model.safetensors.index.json"


@pytest.fixture
def part(tmp_path):
    """Two shards and their index."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    save(folder / "one.safetensors", {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.arange(3)})
    save(folder / "two.safetensors", {"c": torch.full((2, 2), 0.5)})
    files = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def index(part, **changes):
    files = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors", **changes}
    text = json.dumps({"weight_map": {name: file for name, file in files.items() if file}})
    (part / INDEX).write_text(text)


def test_shards_are_read_as_their_index_says(part):
    tensors = {name: stored.read() for name, stored in stored_tensors(part).items()}
    assert {name: value.dtype for name, value in tensors.items()} == {
        "a": torch.float32,
        "b": torch.int64,
        "c": torch.float32,
    }
    assert tensors["a"].tolist() == [1, 1] and tensors["c"].flatten().tolist() == [0.5] * 4
    shapes = {name: stored.shape for name, stored in stored_tensors(part).items()}
    assert shapes == {name: value.shape for name, value in tensors.items()}
    assert stored_tensors(part)["a"].dtype == torch.bfloat16 and stored_tensors(part)["b"].dtype is None


def test_shards_of_a_variant_are_read_where_nothing_else_is(part):
    """Named as diffusers and transformers do."""
    for kind in ("one", "two"):
        (part / f"{kind}.safetensors").rename(part / f"model.fp16-{kind}.safetensors")
    names = {"a": "model.fp16-one.safetensors", "b": "model.fp16-one.safetensors"}
    (part / INDEX).unlink()
    other = part / "model.safetensors.index.fp16.json"
    other.write_text(json.dumps({"weight_map": names | {"c": "model.fp16-two.safetensors"}}))
    assert set(stored_tensors(part)) == {"a", "b", "c"}
    save(part / "model.safetensors", {"d": torch.ones(1)})
    assert set(stored_tensors(part)) == {"d"}


def test_one_file_needs_no_index(part):
    (part / INDEX).unlink()
    with pytest.raises(WeightsError, match="several safetensors and no index.*one.safetensors, two"):
        stored_tensors(part)
    (part / "two.safetensors").unlink()
    assert set(stored_tensors(part)) == {"a", "b"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d": "three.safetensors"}, "names files that are missing: three.safetensors"),
        ({"d": "../two.safetensors"}, r"not in its folder: \.\./two"),
        ({"d": "/etc/passwd"}, "not in its folder: /etc/passwd"),
        ({"d": "sub/two.safetensors"}, "not in its folder"),
        ({"d": "C:\\two.safetensors"}, "not in its folder"),
        ({"d": ".."}, "not in its folder"),
        ({"d": "pytorch_model.bin"}, "pytorch_model.bin is a pickle"),
        ({"d": "two.safetensors"}, "do not agree on: d"),
        ({"c": "one.safetensors"}, "do not agree on: c"),
        ({"b": None}, "do not agree on: b"),
        ({"d": 5}, "no weight_map"),
    ],
)
def test_indices_that_are_wrong(part, changes, message):
    index(part, **changes)
    with pytest.raises(WeightsError, match=message):
        stored_tensors(part)


def test_files_that_are_wrong(part):
    whole = (part / "two.safetensors").read_bytes()
    for broken in (whole[:-1], whole[:40], b"", b"\xff" * 64):
        (part / "two.safetensors").write_bytes(broken)
        with pytest.raises(WeightsError, match="two.safetensors is not .* damaged, fetch it again"):
            stored_tensors(part)
    for other, message in (
        (b"version https://git-lfs.github.com/spec/v1\noid 0\n", "Git LFS's pointer.*`git lfs pull` fetches"),
        (b"GGUF" + bytes(64), "it is GGUF, whose name must end in .gguf"),
        (b"PK\3\4" + b"\xff" * 64, "it is a pickle, which `conceptmaster convert` turns into"),
        (b"<!DOCTYPE html><html>", "it is a web page"),
    ):
        (part / "two.safetensors").write_bytes(other)
        with pytest.raises(WeightsError, match=message):
            stored_tensors(part)
    save(part / "two.safetensors", {"d" * 60_000: torch.zeros(1)})
    with pytest.raises(WeightsError, match="d… of a tensor has 60000 characters") as caught:
        stored_tensors(part)
    assert len(str(caught.value)) < 400
    (part / INDEX).write_text("{")
    with pytest.raises(WeightsError, match="is not JSON"):
        stored_tensors(part)
    (part / INDEX).write_text("[]")
    with pytest.raises(WeightsError, match="is not a JSON object"):
        read_json(part / INDEX)
    shutil.copy(part / INDEX, part / "other.safetensors.index.json")
    with pytest.raises(WeightsError, match="several indices"):
        stored_tensors(part)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "wan.pth", "model.pt"])
def test_pickles_are_told_how_to_become_safetensors(tmp_path, name):
    part = tmp_path / "vae"
    part.mkdir()
    torch.save({"a": torch.ones(2), "b": torch.zeros(1)}, part / name)
    with pytest.raises(WeightsError, match=f"{name} is a pickle.*Convert it") as error:
        stored_tensors(part)
    file = part / name
    assert str(error.value).endswith(f"conceptmaster convert {file} {file.with_suffix('.safetensors')}")


def test_where_a_folder_is(part, tmp_path):
    assert locate(tmp_path) == tmp_path and is_folder(tmp_path) and not is_folder(part)
    with pytest.raises(WeightsError, match="a revision is one of the Hugging Face Hub"):
        locate(tmp_path, "main")
    assert locate(part / INDEX) == part / INDEX
    with pytest.raises(WeightsError, match="no folder at"):
        locate(tmp_path / "nothing")
    with pytest.raises(WeightsError, match="has no safetensors"):
        stored_tensors(tmp_path)


def test_the_hub_s_cache_is_honoured_and_nothing_is_fetched_offline(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    model = tmp_path / "models--someone--tiny-wan"
    (model / "snapshots" / commit / "transformer").mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    assert locate("someone/tiny-wan") == model / "snapshots" / commit
    assert locate("someone/tiny-wan", commit) == model / "snapshots" / commit
    for place, revision in (("someone/other", None), ("someone/tiny-wan", "v2")):
        with pytest.raises(WeightsError, match="is no folder, and not to be had from the Hub") as error:
            locate(place, revision)
        assert "\n" not in str(error.value)
        assert (" at revision 'v2': " in str(error.value)) == (revision is not None)
