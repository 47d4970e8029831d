"""Weights on disk: safetensors only, strict, with the configuration inside; no pickle anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...atomic_write import replacing
from ...errors import ConfigError, OutOfMemory, WeightsError, free_memory, is_out_of_memory
from ...untrusted import open_plain, parse_json, shell_word
from ..config import ModelConfig
from ..model import ConceptMaster

OTHERS = {
    b"version https://git-lfs": "it is Git LFS's pointer to the file, which `git lfs pull` fetches",
    b"GGUF": "it is GGUF, whose name must end in .gguf",
    b"PK\3\4": "it is a pickle, which `conceptmaster convert` turns into safetensors",
    b"<": "it is a web page, fetch the file itself",
}
"""What files that are called safetensors may be, by their first bytes."""
LONGEST_NAME, TOLD = 500, 120  # characters of a tensor's name; and of one of several that a message tells
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LARGEST_HEADER = 16 * 2**20  # bytes; of the largest models it is one
MOST_AXES = 8
KINDS = "F64 F32 F16 BF16 F8_E4M3 F8_E5M2 I64 I32 I16 I8 U64 U32 U16 U8 BOOL".split()
"""The dtypes that are read, as safetensors spells them."""


class _Comparable(Protocol):
    """A tensor, or something that stands for one."""

    @property
    def shape(self) -> torch.Size: ...

    def is_floating_point(self) -> bool: ...

    def equal(self, other: Any, /) -> bool: ...


_Shaped = TypeVar("_Shaped", bound=_Comparable)
_Module = TypeVar("_Module")
_Built = TypeVar("_Built", bound=nn.Module)


def save(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as safetensors, whole or not at all.

    A tensor that appears under two names (tied weights) is written once, under the first.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        tensors[name] = tensor.detach().contiguous()
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary, metadata=dict(metadata or {}))


def refuse_pickle(path: Path) -> None:
    """Raises WeightsError, which tells how to convert it, when `path` has one of the suffixes PICKLES."""
    if path.suffix.lower() in PICKLES:
        raise WeightsError(
            f"{path} is a pickle, which can run code when it is loaded: only safetensors are read. Convert "
            f"it, which runs nothing, with: conceptmaster convert {shell_word(path)} "
            f"{shell_word(path.with_suffix('.safetensors'))}"
        )


def unreadable(path: Path, error: Exception) -> WeightsError:
    """What to raise for a file that safetensors cannot read, `error`: it says what to do, as well."""
    advice = "it is cut off or damaged, fetch it again"
    try:
        with open_plain(path) as file:
            start = file.read(max(map(len, OTHERS)))
        advice = next((what for begin, what in OTHERS.items() if start.startswith(begin)), advice)
    except (OSError, ValueError):
        advice = "it cannot be opened"
    reason = " ".join(str(error).split())
    return WeightsError(f"{path} is not a readable safetensors file, {advice}: {reason:.300}")


def check_file(path: Path) -> None:
    """Looks at a safetensors file's kind, size and header, before the library does.

    Raises: FileNotFoundError; WeightsError, as `refuse_pickle` and `unreadable`, for what is no regular file,
        and for a header that is cut off, large beyond reason, or lists a tensor that cannot be.
    """
    if not path.exists():
        raise FileNotFoundError(f"no weights file at {path}")
    refuse_pickle(path)
    try:
        with open_plain(path) as file:
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"a header of {length} bytes does not fit into {size}")
            if length > LARGEST_HEADER:
                raise ValueError(f"a header of {length} bytes is beyond reason")
            _check_header(parse_json(file.read(length)))
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def _check_header(header: Any) -> None:
    """Raises ValueError. Whether places fit the file, and each other, is what the library checks."""
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if len(name) > LONGEST_NAME:
            raise ValueError(f"the name {name!r:.100}… of a tensor has {len(name)} characters")
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
            raise ValueError(f"the tensor {name!r:.200} has no shape")
        if len(shape) > MOST_AXES:
            raise ValueError(f"the tensor {name!r:.200} has {len(shape)} axes, more than {MOST_AXES}")
        if entry.get("dtype") not in KINDS:
            raise ValueError(f"the tensor {name!r:.200} is of {entry.get('dtype')!r:.40}, which is not read")


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file: (tensors on the CPU, metadata).

    Raises FileNotFoundError, or WeightsError for a damaged file.
    """
    path = Path(path)
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise unreadable(path, error) from error


def load_strict(module: nn.Module, state: Mapping[str, Tensor], absent: Set[str] = frozenset()) -> None:
    """Copies `state` into `module` when it fits exactly, else changes nothing.

    `absent` names the tensors that must not be in `state`; they keep their values. Of tied weights one name
    is enough. Raises WeightsError as `check_strict`.
    """
    module.load_state_dict(check_strict(module, state, absent), strict=False)


def check_strict(
    module: nn.Module, state: Mapping[str, _Shaped], absent: Set[str] = frozenset()
) -> dict[str, _Shaped]:
    """`state`, which must fit `module` exactly, with every name of a tied parameter that it has under one.

    `absent` as for `load_strict`. Raises one WeightsError, one line, that lists what is missing, unexpected,
    mis-shaped or not of floating point, and tied tensors that differ: some of each, and how many there are.
    """
    own = module.state_dict()
    full, differing = _with_ties(module, state)
    needed = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    missing = sorted((needed & set(own)) - set(full) - absent)
    unexpected = sorted(set(full) - (set(own) - absent))
    shapes = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in sorted(set(state) & set(own))
        if state[name].shape != own[name].shape
    ]
    integers = sorted(
        name
        for name in set(state) & set(own)
        if own[name].is_floating_point() and not state[name].is_floating_point()
    )
    problems = [
        f"{len(found)} {kind}: {some(found)}"
        for kind, found in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("mis-shaped", shapes),
            ("of whole numbers, not of floating point (quantised weights are not read)", integers),
            ("not the same though the model has one tensor for both", differing),
        )
        if found
    ]
    if problems:
        raise WeightsError(f"the weights do not fit {type(module).__name__}: " + "; ".join(problems))
    return full


def on_meta(build: Callable[[ModelConfig], _Module], config: ModelConfig, where: Path | str) -> _Module:
    """What `build` makes of `config`, without memory for its weights. Raises ConfigError naming `where`."""
    try:
        with torch.device("meta"):
            return build(config)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # transformers and diffusers have types of their own for what they refuse
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}: its configuration cannot be built: {reason:.300}") from error


def built(
    build: Callable[[ModelConfig], _Built], config: ModelConfig, state: Mapping[str, Tensor], path: Path
) -> _Built:
    """What `build` makes of `config`, with the weights `state` of the file `path`. There is no memory taken
    for it before they are known to fit. Raises ConfigError, WeightsError, OutOfMemory that name `path`."""
    planned = on_meta(build, config, path)
    try:
        check_strict(planned, state)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    needed, free = 4 * sum(tensor.numel() for tensor in planned.state_dict().values()), free_memory()
    if free is not None and needed > free:  # a file with holes takes no room on a disk
        raise OutOfMemory(f"{path} needs {needed >> 20} MiB of memory, {free >> 20} are free")
    module = build(config)
    load_strict(module, state)
    return module


def some(names: Iterable[str], most: int = 6, longest: int = TOLD) -> str:
    """The names, the first `most` of them and how many more there are; of one beyond `longest` its start."""
    names = list(names)
    more = f"; and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(name[:longest] for name in names[:most]) + more


def _tied(module: nn.Module) -> list[list[str]]:
    """The names of each parameter of `module` that has more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _with_ties(module: nn.Module, state: Mapping[str, _Shaped]) -> tuple[dict[str, _Shaped], list[str]]:
    """`state` with every name of a tied parameter that it has under one; and the groups that contradict."""
    full, differing = dict(state), []
    for group in _tied(module):
        given = [state[name] for name in group if name in state]
        if any(tensor.shape == given[0].shape and not tensor.equal(given[0]) for tensor in given[1:]):
            differing.append(" and ".join(group))
        if given:
            full |= {name: given[0] for name in group if name not in state}
    return full, differing


def save_model(model: ConceptMaster, path: str | Path) -> None:
    """Writes a model with its configuration inside."""
    metadata = {"format": "conceptmaster", "config": json.dumps(model.config.to_dict())}
    save(path, model.state_dict(), metadata)


def load_model(path: str | Path) -> ConceptMaster:
    """Rebuilds, in evaluation mode on the CPU, what `save_model` wrote.

    Raises FileNotFoundError, or WeightsError for a damaged file, or weights that are not of the configuration
    that the file names.
    """
    state, metadata = load(path)
    if "config" not in metadata:
        raise WeightsError(
            f"{path} has no model configuration in its metadata; it was not written by save_model"
        )
    try:
        config = ModelConfig.from_dict(parse_json(metadata["config"]))
    except ValueError as error:  # ConfigError is one
        raise WeightsError(f"{path} has an unusable model configuration: {error}") from error
    return built(ConceptMaster, config, state, Path(path)).eval()
