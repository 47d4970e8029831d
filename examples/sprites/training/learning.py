"""What all trainings share: Muon with AdamW, a moving average, a schedule, and checkpoints that survive a
stop.

Muon (momentum orthogonalised by Newton-Schulz iterations) is by Keller Jordan et al., 2024; the coefficients
are theirs.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from conceptmaster.atomic_write import replacing
from conceptmaster.errors import ConceptMasterError


class CheckpointError(ConceptMasterError):
    """A training that cannot go on: a checkpoint that cannot be read, or a gradient that is not finite."""


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@functools.cache
def fast_dtype(device: str) -> torch.dtype:
    """What matrices are multiplied in: bfloat16 where the device has instructions for it, otherwise float32,
    which is then several times as fast as bfloat16 made up."""
    if torch.device(device).type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return torch.bfloat16


def autocast(device: str) -> torch.autocast:
    """Mixed precision in ``fast_dtype``; nothing is cast where that is float32."""
    dtype = fast_dtype(device)
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def orthogonalised(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly: [n, r, c] -> [n, r, c] with singular values near 1;
    computed in ``fast_dtype``, in three calls a step."""
    a, b, c = NEWTON_SCHULZ
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.to(fast_dtype(str(matrices.device)))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for weights of two or more dimensions (flattened to [out, rest]), AdamW for everything else.

    ``parameters`` are (name, parameter) pairs; names that contain one of ``adam_names`` take AdamW whatever
    their shape (embeddings, tables), those that contain one of ``fast_names`` at ``fast_lr``. ``lr`` is
    Muon's, ``adam_lr`` the others'; a schedule scales all of them through ``set_scale``.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.nn.Parameter]],
        lr: float,
        adam_lr: float,
        adam_names: tuple[str, ...] = (),
        fast_names: tuple[str, ...] = (),
        fast_lr: float = 0.0,
    ) -> None:
        pairs = [(n, p) for n, p in parameters if p.requires_grad]
        groups: list[dict[str, object]] = [
            {"params": [], "muon": True, "base": lr},
            {"params": [], "muon": False, "base": adam_lr},
            {"params": [], "muon": False, "base": fast_lr},
        ]
        for name, p in pairs:
            adam = p.ndim < 2 or any(part in name for part in adam_names)
            kind = 2 if any(part in name for part in fast_names) else 1 if adam else 0
            groups[kind]["params"].append(p)  # type: ignore[attr-defined]
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, {"lr": lr})
        self.set_scale(1.0)

    def set_scale(self, scale: float) -> None:
        """Set both learning rates to ``scale`` times their base."""
        for group in self.param_groups:
            group["lr"] = group["base"] * scale

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients that are there; a parameter without a gradient stays as it is."""
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                self._muon(given, group["lr"])
            elif given:
                self._adam(given, group["lr"])

    def _muon(self, parameters: list[torch.Tensor], lr: float) -> None:
        """Matrices of one shape are orthogonalised together: small ones cost most of their time in calls."""
        momenta, grads = self._state(parameters, "momentum"), _gradients(parameters)
        torch._foreach_lerp_(momenta, grads, 0.05)
        updates = torch._foreach_lerp(grads, momenta, 0.95)
        shapes: dict[tuple[int, ...], list[int]] = {}
        for k, p in enumerate(parameters):
            shapes.setdefault(tuple(p.shape), []).append(k)
        for places in shapes.values():
            alike = [parameters[k] for k in places]
            stacked = orthogonalised(torch.stack([updates[k].flatten(1) for k in places]))
            gain = max(1.0, stacked.shape[1] / stacked.shape[2]) ** 0.5
            steps = [update.view_as(p) for p, update in zip(alike, stacked, strict=True)]
            torch._foreach_add_(alike, steps, alpha=-lr * gain)

    def _adam(self, parameters: list[torch.Tensor], lr: float) -> None:
        """Parameters that have been moved as often are moved together, in a few calls."""
        counts: dict[int, list[torch.Tensor]] = {}
        for p in parameters:
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
            counts.setdefault(state["step"], []).append(p)
        for count, alike in counts.items():
            grads = _gradients(alike)
            first, second = (self._state(alike, name) for name in ("first", "second"))
            torch._foreach_lerp_(first, grads, 0.1)
            torch._foreach_mul_(second, 0.98)
            torch._foreach_addcmul_(second, grads, grads, 0.02)
            deviation = torch._foreach_div(second, 1 - 0.98**count)
            torch._foreach_sqrt_(deviation)
            torch._foreach_add_(deviation, 1e-8)
            torch._foreach_addcdiv_(alike, first, deviation, -lr / (1 - 0.9**count))

    def _state(self, parameters: list[torch.Tensor], name: str) -> list[torch.Tensor]:
        """A tensor of the state of each, zero at first."""
        for p in parameters:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in parameters]


def _gradients(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def schedule(progress: float, warmup: float = 0.02, final: float = 0.02) -> float:
    """Learning rate scale over ``progress`` in 0..1: linear warm-up, flat, then linear down over the last 40
    %."""
    if progress < warmup:
        return max(progress, 1e-4) / warmup
    if progress < 0.6:
        return 1.0
    return final + (1 - final) * max(0.0, (1 - progress) / 0.4)


class Average:
    """Exponential moving average of a module's parameters (and a copy of its buffers)."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Move towards the module; the first updates move faster."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        now = module.state_dict()
        moving = [k for k, v in now.items() if v.dtype.is_floating_point]
        torch._foreach_lerp_([self.shadow[k] for k in moving], [now[k] for k in moving], 1 - decay)
        for k in now.keys() - set(moving):
            self.shadow[k].copy_(now[k])

    @contextmanager
    def in_place(self, module: torch.nn.Module) -> Iterator[None]:
        """Puts the average into the module for a while."""
        trained = {k: v.clone() for k, v in module.state_dict().items()}
        module.load_state_dict(self.shadow)
        yield
        module.load_state_dict(trained)


def gradient_norm(parameters: Iterable[torch.nn.Parameter], limit: float) -> torch.Tensor:
    """Clip the gradients' norm to ``limit``; returns the norm before, on their device: see ``check_norm``."""
    return torch.nn.utils.clip_grad_norm_(list(parameters), limit)


def check_norm(norm: torch.Tensor) -> None:
    """Waits for the device. Raises CheckpointError for a norm that is not finite."""
    if not math.isfinite(norm):
        raise CheckpointError(
            "the gradient is not finite; resume from the last checkpoint with a lower learning rate"
        )


def save_checkpoint(
    path: Path,
    module: torch.nn.Module,
    average: Average | None,
    optimizer: MuonAdamW,
    progress: dict[str, float],
) -> None:
    """Write weights, average (if there is one), optimizer state and ``progress`` as one safetensors file,
    whole or not at all."""
    tensors = {f"model.{k}": v.detach().clone().contiguous() for k, v in module.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{k}": v.contiguous() for k, v in average.shadow.items()}
        progress = progress | {"average_count": average.count}
    names = {id(p): n for n, p in module.named_parameters()}
    steps = {}
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{key}.{names[id(p)]}"] = value.contiguous()
            else:
                steps[names[id(p)]] = value
    header = {"progress": json.dumps(progress), "steps": json.dumps(steps)}
    with replacing(path) as partial:
        save_file(tensors, partial, metadata=header)


def _not_whole(path: Path, error: Exception) -> CheckpointError:
    why = (str(error).strip() or type(error).__name__).splitlines()[0]
    why = why[:200]  # of another model PyTorch names every tensor
    return CheckpointError(
        f"{path} is not a whole checkpoint of this training ({why}); delete it to start over"
    )


def saved_progress(path: Path) -> dict[str, float]:
    """The ``progress`` of a checkpoint, without its tensors. Raises CheckpointError where it is truncated."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["progress"])
    except Exception as error:
        raise _not_whole(path, error) from error


def load_checkpoint(
    path: Path, module: torch.nn.Module, average: Average | None, optimizer: MuonAdamW
) -> dict[str, float]:
    """Read back what ``save_checkpoint`` wrote into the same objects; returns ``progress``.

    Raises CheckpointError naming the file where it is truncated or of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        progress, steps = json.loads(header["progress"]), json.loads(header["steps"])
        module.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, strict=True)
    except Exception as error:
        raise _not_whole(path, error) from error
    device = next(module.parameters()).device
    if average is not None:
        average.shadow = {k[8:]: v.to(device) for k, v in tensors.items() if k.startswith("average.")}
        average.count = int(progress["average_count"])
    for name, p in module.named_parameters():
        for key in ("momentum", "first", "second"):
            tensor = tensors.get(f"optimizer.{key}.{name}")
            if tensor is not None:
                optimizer.state[p][key] = tensor.to(device)
        if name in steps:
            optimizer.state[p]["step"] = steps[name]
    return progress
