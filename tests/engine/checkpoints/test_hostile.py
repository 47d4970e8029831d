"""Files that somebody made to do harm: each ends in one error of the project's, soon and in little memory."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conceptmaster.engine.checkpoints import safetensors_io
from conceptmaster.engine.checkpoints.adapter import read_adapter, save_adapter
from conceptmaster.engine.checkpoints.diffusers_folder import open_folder
from conceptmaster.engine.checkpoints.lora import merge_lora
from conceptmaster.engine.checkpoints.safetensors_io import load, load_model, on_meta, save, save_model
from conceptmaster.engine.checkpoints.source import random_source
from conceptmaster.engine.checkpoints.wan import read_config, read_sampling
from conceptmaster.engine.checkpoints.weight_files import read_header, stored_tensors
from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.engine.presets import preset
from conceptmaster.errors import ConceptMasterError, ConfigError, OutOfMemory, WeightsError

HOSTILE: tuple[Any, ...] = (
    *(10**9, 10**30, -1, 0, 1, 1.5, 1e300, float("nan"), float("inf"), "2", "x" * 10**5, "\x1b[2J", True),
    *(None, [], [[1]], [10**9] * 3, ["a"], {}, {"a": 1}, [0.5] * 5000),
)
WRONG = [value for value in HOSTILE if type(value) not in (int, float) or not abs(value) <= 1e30]
FLOAT = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    """A safetensors file with this header; length: what it says of the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


FILES = {
    "empty": b"",
    "short": b"1234567",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "a longer header than the file": raw({}, length=2**62),
    "no JSON": raw(b"{" * 100),
    "deep": raw(b'{"a":' * 100_000),
    "a list": raw([]),
    "cut off": raw({"a": {"dtype": "F32", "shape": [10**6], "data_offsets": [0, 4 * 10**6]}}),
    "overlapping": raw({"a": FLOAT, "b": FLOAT}),
    "a hole": raw({"a": FLOAT | {"data_offsets": [8, 16]}}, b"\0" * 16),
    "another size": raw({"a": FLOAT | {"shape": [3]}}),
    "an overflow": raw({"a": FLOAT | {"shape": [2**47] * 4}}),
    "many axes": raw({"a": {"dtype": "F32", "shape": [1] * 10**6, "data_offsets": [0, 4]}}, b"\0" * 4),
    "a shape of text": raw({"a": FLOAT | {"shape": ["2"]}}),
    "a negative shape": raw({"a": FLOAT | {"shape": [-2]}}),
    "an unknown dtype": raw({"a": FLOAT | {"dtype": "F4"}}),
    "no tensor": raw({"a": 1}),
    "a name twice": raw(b'{"a":%s,"a":%s}' % ((json.dumps(FLOAT).encode(),) * 2)),
    "metadata of numbers": raw({"__metadata__": {"a": 1}, "a": FLOAT}),
}


@pytest.fixture
def quick() -> Iterator[None]:
    """What no test here may exceed; it is a hang that this finds, not a slow machine."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 20


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_safetensors(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(FILES[kind])
    for read in (load, read_header, load_model, read_adapter):
        with pytest.raises(WeightsError, match="not a readable safetensors file") as caught:
            read(path)
        assert len(str(caught.value)) < 1000


@pytest.mark.usefixtures("quick")
def test_places_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    with (tmp_path / "sparse.safetensors").open("wb") as file:  # whose header is all of its gigabytes
        file.write(struct.pack("<Q", 2**33))
        file.truncate(2**33 + 8)
    for path in tmp_path.iterdir():
        for read in (load, read_header, load_model, read_adapter):
            with pytest.raises(WeightsError, match="not a readable safetensors file"):
                read(path)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ({f"t{i}": f"s{i}.safetensors" for i in range(50_000)}, "names 50000 files, more than 1000"),
        ({f"t{i}": "/etc/passwd" for i in range(10**5)}, "not in its folder"),
        ({"t": "../other/a.safetensors"}, "not in its folder"),
        ({"t": "pipe.safetensors"}, "files that are missing"),
        ({"t": 1}, "no weight_map"),
        ({f"t{i}": "a.safetensors" for i in range(10**5)}, "do not agree on: .* and 99.* more"),
    ],
)
def test_indices(tmp_path: Path, entries: dict[str, Any], word: str) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    save(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": entries}))
    with pytest.raises(WeightsError, match=word) as caught:
        stored_tensors(tmp_path)
    assert len(str(caught.value)) < 2000


def lora(folder: Path, *, rank: int = 2, **config: Any) -> Path:
    """A LoRA of one layer as PEFT writes it, for the tiny preset (width 24)."""
    name = "base_model.model.blocks.0.attn1.to_q"
    tensors = {"lora_A.weight": torch.ones(rank, 24), "lora_B.weight": torch.ones(24, rank)}
    path = folder / "adapter_model.safetensors"
    save(path, {f"{name}.{key}": value for key, value in tensors.items()})
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": rank} | config))
    return path


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "config",
    [
        {"alpha_pattern": {"(a+)+$": 1}},
        {"alpha_pattern": {r"(.*\.)*to_q": 1}},
        {"alpha_pattern": {"x" * 10**5: 1}},
        {"alpha_pattern": {f"layer{i}": 1 for i in range(10**5)}},
        *({"alpha_pattern": value} for value in HOSTILE if value and value != {"a": 1}),
        *({"alpha_pattern": {"to_q": value}} for value in WRONG),
        *({"lora_alpha": value} for value in WRONG),
    ],
    ids=lambda config: f"{config!r:.60}",
)
def test_alphas(tmp_path: Path, config: dict[str, Any]) -> None:
    model = ConceptMaster(preset("tiny")).transformer
    path = lora(tmp_path, **config)
    with pytest.raises(WeightsError, match=r"no usable LoRA configuration") as caught:
        merge_lora(model, path)
    assert len(str(caught.value)) < 500
    save(path, load(path)[0], {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(WeightsError, match=r"no usable LoRA configuration"):
        merge_lora(model, path)


def test_a_rank_beyond_reason(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not fit"):
        merge_lora(ConceptMaster(preset("tiny")).transformer, lora(tmp_path, rank=2000))


def entries_of(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in nested objects and lists."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*path, key)
        if isinstance(value, (dict, list)) and len(value) < 20:
            yield from entries_of(value, (*path, key))


def changed(values: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value there."""
    values = copy.deepcopy(values)
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return values


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["tiny", "sprites"])
def test_every_entry_of_a_configuration(name: str) -> None:
    """Refused, or small enough to be built; what is built is not always what was meant."""
    values = preset(name).to_dict()
    random.seed(1)
    accepted: list[ModelConfig] = []
    for path in entries_of(values):
        for value in random.sample(HOSTILE, 7):
            try:
                accepted.append(ModelConfig.from_dict(changed(values, path, value)))
            except ConfigError as error:
                assert len(str(error)) < 500
    with pytest.raises(ConfigError):
        ModelConfig.from_dict([])  # type: ignore[arg-type]
    for config in random.sample(accepted, 6):
        try:
            on_meta(ConceptMaster, config, "here")
        except ConfigError as error:
            assert str(error).startswith("here: its configuration cannot be built")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        (("transformer", "num_layers"), 10**9, "num_layers must be a positive whole number of at most 256"),
        (("transformer", "num_layers"), 200, "the weights do not fit"),
        (("transformer", "freq_dim"), 10**9, "freq_dim must be a positive whole number of at most 65536"),
        (("transformer", "ffn_dim"), 2**18, "the weights do not fit"),
        (("text_encoder", "vocab_size"), 2**21, "the weights do not fit"),
        (("text_encoder", "d_kv"), 2**16, "the weights do not fit"),
        (("text_encoder", "attn_implementation"), "somebody/kernels", "text_encoder has no entry"),
        (("concept", "width"), 2**14, "the weights do not fit"),
        (("image_encoder", "num_attention_heads"), 3, "cannot be built|do not fit"),
        (("text_encoder", "feed_forward_proj"), "gated-nothing", "cannot be built"),
    ],
)
def test_a_model_larger_than_its_file(tmp_path: Path, path: tuple[str, ...], value: Any, word: str) -> None:
    """Nothing of that size is built: a file of some kilobytes would ask for gigabytes."""
    model = random_source(preset("tiny")).model
    file = tmp_path / "model.safetensors"
    save_model(model, file)
    state, metadata = load(file)
    config = changed(json.loads(metadata["config"]), path, value)
    save(file, state, metadata | {"config": json.dumps(config)})
    with pytest.raises((WeightsError, ConfigError), match=word):
        load_model(file)


def test_a_model_larger_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with holes is as large as it likes."""
    file = tmp_path / "model.safetensors"
    save_model(random_source(preset("tiny")).model, file)
    monkeypatch.setattr(safetensors_io, "free_memory", lambda: 100 << 10)
    with pytest.raises(OutOfMemory, match="needs 0 MiB of memory, 0 are free"):
        load_model(file)


@pytest.mark.usefixtures("quick")
def test_metadata_that_is_no_configuration(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    for text in ("", "[]", "1", "{", "[" * 10**5, '{"a":1,"a":1}', '{"transformer": {}, "concept": []}'):
        save(file, {"a": torch.zeros(1)}, {"config": text})
        with pytest.raises(WeightsError, match="unusable model configuration"):
            load_model(file)
    source = random_source(preset("tiny"))
    save_adapter(source.model, file)
    state, metadata = load(file)
    for key in ("concept", "base"):
        for entry in json.loads(metadata[key]):
            for value in HOSTILE:
                values = json.loads(metadata[key]) | {entry: value}
                save(file, {"a": torch.zeros(1)}, metadata | {key: json.dumps(values)})
                try:
                    read_adapter(file)
                except WeightsError as error:
                    assert len(str(error)) < 500


@pytest.mark.usefixtures("quick")
def test_every_entry_of_a_folder(wan_folder: Path) -> None:
    base = open_folder(wan_folder)
    parts = ("transformer", "vae", "text_encoder", "image_encoder")
    for file in [*parts, "scheduler"]:
        values = dict((base.scheduler or {}) if file == "scheduler" else base.part(file).config)
        for entry in values:
            for value in HOSTILE:
                changed = json.loads(json.dumps(values | {entry: value}))
                if file == "scheduler":
                    own = dataclasses.replace(base, scheduler=changed)
                else:
                    part = dataclasses.replace(base.part(file), config=changed)
                    own = dataclasses.replace(base, parts={**base.parts, file: part})
                try:
                    read_sampling(own)
                    read_config(own, "base", (32, 32), 5)
                except ConceptMasterError as error:
                    assert len(str(error)) < 1000


def test_the_command_that_converts_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the file is called; the command does what it says."""
    name = "-x; touch owned $(touch owned) 'a'.pt"
    torch.save({"a": torch.arange(3.0)}, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="is a pickle") as caught:
        load(name)
    program = f"{sys.executable} -m conceptmaster"
    command = str(caught.value).partition("with: ")[2].replace("conceptmaster", program, 1)
    subprocess.run(["sh", "-c", command], check=True)
    assert load(tmp_path / name.replace(".pt", ".safetensors"))[0]["a"].tolist() == [0, 1, 2]
    assert not (tmp_path / "owned").exists()
