"""Weights that stay on disk until a layer is called: a model of any size in the memory of its largest layer.

`stream` gives a module that was built on the meta device its small tensors for good and leaves the large ones
in their file. A layer reads its own when it is called and lets go of them right after, so the module computes
what it would with all of them in memory, a little slower. `settle` brings all of them to a device for good,
one after the other. `faked` is for tracing: no values at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import WeightsError
from ...hashed import Identity, identity
from .safetensors_io import check_strict, unreadable

MIN_ELEMENTS = 2**20
"""Of the smallest tensor that stays on disk."""
LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules whose forward is all that reads their parameters; those of others are kept in memory."""

_Module = TypeVar("_Module", bound=nn.Module)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor on disk, and what is to be changed in it whenever it is read (a LoRA's sums).

    load: reads it, as it is kept; shape: of what `load` gives; kind: its dtype, as safetensors spells it.
    """

    load: Callable[[], Tensor]
    shape: torch.Size
    kind: str
    changes: list[Callable[[Tensor], None]] = field(default_factory=list)

    @classmethod
    def in_file(cls, path: Path, name: str, shape: torch.Size, kind: str, held: Identity) -> Stored:
        """A tensor of a safetensors file; held: what the file was, so that no other one is read later."""
        return cls(partial(_from_file, path, name, held), shape, kind)

    def then(
        self, change: Callable[[Tensor], Tensor], shape: Sequence[int], kind: str | None = None
    ) -> Stored:
        """What `change` makes of this tensor, of another shape or kind, whenever it is read."""
        return Stored(lambda: change(self.load()), torch.Size(shape), kind or self.kind)

    @property
    def dtype(self) -> torch.dtype | None:
        """In the file; None for one that is not one of DTYPES."""
        return DTYPES.get(self.kind)

    def is_floating_point(self) -> bool:
        """Whether its numbers are of floating point."""
        return self.kind.startswith(("F", "BF"))

    def read(self, dtype: torch.dtype = torch.float32, copied: bool = False) -> Tensor:
        """The tensor on the CPU, in `dtype` if it is of floating point. Raises WeightsError.

        copied: it never is the file itself, mapped to memory.
        """
        tensor = self.load()
        if self.changes:  # in float32, whatever the file has
            tensor = tensor.to(torch.float32, copy=True)
            for change in self.changes:
                change(tensor)
            copied = False
        return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=copied)

    def equal(self, other: Stored) -> bool:
        """Whether both hold the same values."""
        return self.read().equal(other.read())


def _from_file(path: Path, name: str, held: Identity) -> Tensor:
    """A tensor of a safetensors file that is what it was."""
    try:
        # Opened anew each time: the memory that a file is mapped to goes with the tensor, not at the end.
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
        if held != identity(path):
            raise WeightsError(f"{path} was changed while it was in use: start again")
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error
    return tensor


def stream(module: nn.Module, stored: Mapping[str, Stored], absent: Set[str] = frozenset()) -> None:
    """Gives `module`, which is on the meta device, its weights: strictly, as `load_strict` does.

    Tensors of MIN_ELEMENTS and more that belong to one of LAYERS stay where they are. Raises WeightsError.
    """
    full = check_strict(module, stored, absent)
    memo: dict[int, nn.Parameter] = {}
    for prefix, layer in module.named_modules():
        own = {name: f"{prefix}.{name}" if prefix else name for name in (*layer._parameters, *layer._buffers)}
        later = {}
        for name, qualified in own.items():
            if qualified not in full:
                continue
            tensor = full[qualified]
            old = layer._parameters.get(name)
            if old is None:
                layer._buffers[name] = tensor.read()
            elif isinstance(layer, LAYERS) and tensor.shape.numel() >= MIN_ELEMENTS:
                later[name] = tensor
            else:
                if id(old) not in memo:
                    memo[id(old)] = nn.Parameter(tensor.read(), old.requires_grad)
                layer._parameters[name] = memo[id(old)]
        if later:
            _OnDemand(later).attach(layer)


def settle(module: _Module, device: torch.device, dtype: torch.dtype | None = None) -> _Module:
    """Brings the weights to `device`, those on disk one by one: the host holds the largest of them at a time.

    dtype: of those of floating point; None leaves each in that of its parameter. Raises WeightsError.
    """
    settled: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # of the old one's id; which is kept, or freed
    for layer in module.modules():
        for name, stored in _on_demand(layer).items():
            old = layer._parameters[name]
            assert old is not None
            if id(old) not in settled:
                tensor = stored.read(dtype or old.dtype, device.type == "cpu").to(device)
                settled[id(old)] = old, nn.Parameter(tensor, old.requires_grad)
            layer._parameters[name] = settled[id(old)][1]
        for owner in _owners(layer):
            owner.detach()
    return module.to(device, dtype)


def stored_weights(module: nn.Module) -> dict[str, Stored]:
    """What of `module`'s parameters is on disk, by name; a tied one under each of its names."""
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, layer in module.named_modules()
        for name, tensor in _on_demand(layer).items()
    }


def grow_stored(
    layer: nn.Module, name: str, change: Callable[[Tensor], Tensor], shape: Sequence[int]
) -> Tensor | None:
    """Where this parameter of a layer is on disk: it is then what `change` makes of it, of another shape, and
    that shape's tensor on the meta device is returned; the caller makes it the parameter. None where not."""
    own = _on_demand(layer)
    if name not in own:
        return None
    own[name] = own[name].then(change, shape)
    return torch.empty(*shape, dtype=getattr(layer, name).dtype, device="meta")


@contextmanager
def faked(*modules: nn.Module) -> Iterator[FakeTensorMode]:
    """For the block the modules' weights on disk are tensors of the right shape without values.

    Whatever is computed with the mode that is yielded has shapes and dtypes only, and costs no memory.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    made: dict[int, nn.Parameter] = {}
    try:
        for layer in (layer for module in modules for layer in module.modules()):
            for name in _on_demand(layer):
                old = layer._parameters[name]
                if old is None or old.device.type != "meta":
                    continue  # the same layer, reached from another of the modules
                if id(old) not in made:
                    with mode:
                        made[id(old)] = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), False)
                kept.append((layer, name, old))
                layer._parameters[name] = made[id(old)]
        yield mode
    finally:
        for layer, name, old in kept:
            layer._parameters[name] = old


class _OnDemand:
    """Two hooks of one layer: before a call its tensors are read, after it they are let go."""

    def __init__(self, stored: dict[str, Stored]) -> None:
        self.stored = stored
        self._meta: dict[str, Any] = {}

    def attach(self, layer: nn.Module) -> None:
        self._hooks = (
            layer.register_forward_pre_hook(self.before),
            layer.register_forward_hook(self.after, always_call=True),
        )

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def before(self, layer: nn.Module, _inputs: Any) -> None:
        for name, tensor in self.stored.items():
            old = layer._parameters[name]
            if old is not None and old.device.type == "meta":  # else it has values, or is traced
                self._meta[name] = old
                layer._parameters[name] = nn.Parameter(tensor.read(), requires_grad=False)

    def after(self, layer: nn.Module, _inputs: Any, _outputs: Any) -> None:
        layer._parameters.update(self._meta)
        self._meta.clear()


def weight_of(layer: nn.Linear) -> Tensor:
    """A layer's weight, read for this once where it stays on disk."""
    stored = _on_demand(layer).get("weight")
    return layer.weight if stored is None else stored.read()


def _on_demand(layer: nn.Module) -> dict[str, Stored]:
    """What of a layer's own parameters is on disk."""
    return next((owner.stored for owner in _owners(layer)), {})


def _owners(layer: nn.Module) -> list[_OnDemand]:
    owners = [getattr(hook, "__self__", None) for hook in layer._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, _OnDemand)]
