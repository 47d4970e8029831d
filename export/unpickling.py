"""A program of its own, which convert.py runs: PyTorch's checkpoint in, safetensors out.

Of all code here this alone reads a pickle, with torch's `weights_only`: tensors, containers and numbers;
whatever else a pickle asks for is refused by name and never called. It is run by its path, so that it needs
nothing of this package: unpickling.py FILE OUTPUT. The last line that it prints is JSON: {"tensors": how
many, "bytes": their size, "left_out": names}; {"refused": why} of a file that is not converted; {"failed":
why} where one could not be written; {"missing": a package}.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

WRAPPERS = ("state_dict", "model", "module")
"""Entries under which people put the state dict, beside an optimizer's and other things."""
KINDS = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 "
    "int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool"
).split()
"""torch's dtypes that this project reads from safetensors."""


class Refused(Exception):
    """Why a file is not converted, in words that follow its name."""


def main(source: str, output: str) -> dict[str, Any]:
    """Converts, and returns what is to be printed. Memory: with a file of today's format, mapped, what is not
    contiguous or shared; with one of before 2020 the file."""
    try:
        import torch
        from safetensors import safe_open
        from safetensors.torch import save_file
    except ModuleNotFoundError as error:
        return {"missing": error.name}
    try:
        mapped = zipfile.is_zipfile(source)
        loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever a damaged or hostile file leads to
        return {"refused": _why(error)}
    try:
        state, left_out = _state_dict(loaded)
        tensors = _storable(state)
    except Refused as error:
        return {"refused": str(error)}
    size = sum(tensor.nbytes for tensor in tensors.values())
    try:
        if size > (free := shutil.disk_usage(Path(output).parent).free):
            return {"failed": f"needs {_size(size)} on the disk, where {_size(free)} are free"}
        save_file(tensors, output, metadata={"format": "pt"})
        with safe_open(output, framework="pt") as file:
            if set(file.keys()) != set(tensors):
                return {"refused": "has names that safetensors cannot hold"}
    except Exception as error:  # the library has a type of its own for a full disk
        return {"failed": f"could not be written: {' '.join(str(error).split()):.200}"}
    return {"tensors": len(tensors), "bytes": size, "left_out": left_out}


def _why(error: Exception) -> str:
    """What torch said, short."""
    text = " ".join(str(error).split())
    if found := re.search(r"(?:GLOBAL|class|instantiate) ([\w.]*\.[\w.]*\w)", text):
        return f"holds {found[1]}, which is no tensor: it was not executed, and the file is not converted"
    if "TorchScript" in text:
        return "is a TorchScript archive, which is code: it was not executed, and is not converted"
    text = text.rpartition("WeightsUnpickler error:")[2].partition(" Check the documentation")[0].strip()
    return (
        f"is not a checkpoint of PyTorch that can be read ({type(error).__name__}{text and ': '}{text:.200})"
    )


def _state_dict(loaded: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by name, taken out of what people wrap around them, and the names of what is no tensor."""
    left_out: list[str] = []
    where = ""
    while True:
        if not isinstance(loaded, dict):
            raise Refused(f"is no state dict: {where or 'it'} is a {type(loaded).__name__}")
        if any(map(_is_tensor, loaded.values())):
            break
        within = [name for name in WRAPPERS if isinstance(loaded.get(name), dict)] or [
            name
            for name, value in loaded.items()
            if isinstance(value, dict) and any(map(_is_tensor, value.values()))
        ]
        if not within or len(within) > 1 and within[0] not in WRAPPERS:
            names = ", ".join(f"{name!s:.40}" for name in list(loaded)[:6])
            raise Refused(f"is no state dict: it has {names or 'nothing'}")
        left_out += [f"{where}{name}" for name in loaded if name != within[0]]
        where, loaded = f"{where}{within[0]}.", loaded[within[0]]
    if wrong := [name for name in loaded if not isinstance(name, str)]:
        raise Refused(f"is no state dict: it has the name {wrong[0]!r:.40}")
    left_out += [f"{where}{name}" for name, value in loaded.items() if not _is_tensor(value)]
    return {name: value.detach() for name, value in loaded.items() if _is_tensor(value)}, left_out


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _storable(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` as safetensors can hold it: each tensor contiguous, in memory that no other one has."""
    import torch

    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout != torch.strided or tensor.is_quantized or kind not in KINDS:
            raise Refused(f"has {name} of {kind}, {tensor.layout}, which is not converted")
        storage = tensor.untyped_storage()
        if tensor.device.type != "cpu" or tensor.nbytes > storage.nbytes():  # a pickle may say any shape
            raise Refused(f"has {name} of {tuple(tensor.shape)}, which it does not hold the numbers of")
        shared = storage.data_ptr() in seen
        seen.add(storage.data_ptr())
        tensors[name] = tensor.clone() if shared else tensor
        tensors[name] = tensors[name].contiguous()
    return tensors


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2])))
