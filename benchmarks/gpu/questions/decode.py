"""Decoding with Wan's video autoencoder: as diffusers' modules do it and as the torch backend does it, in
which dtype, and how many latent frames a call.

Letters: Cz latent channels, H W of a latent frame, n latent frames a call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.vae.wan_decoder import build_vae, streaming_decoders
from conceptmaster.engine.vae.wan_fused import fused_modules
from conceptmaster.errors import MissingDependency

from ..job import Job
from ..model import SMALL, Size, in_float32, relative_l2
from ..timing import Call
from .question import Missing, Question

LATER = 4
"""Latent frames that are decoded, behind the first one; each gives four frames."""
ALLOWED = {"float32": 1e-2, "bfloat16": 5e-2, "float16": 1e-2}
"""float32 with PyTorch's defaults for convolutions, which are TF32."""

Parts = tuple[nn.Module, nn.Module]


def questions(job: Job) -> Iterator[Question]:
    """At 832x480: four later latent frames, which give sixteen frames."""
    config = dataclasses.replace(SMALL if job.small else Size(), concepts=0).config
    channels, _, height, width = config.latent_shape
    g = torch.Generator(device=job.device).manual_seed(6)
    latents = torch.randn(1, channels, 1 + LATER, height, width, generator=g, device=job.device)
    exact: list[Tensor] = []

    def error(frames: Tensor) -> float:
        if not exact:
            exact.append(in_float32(_call(_streaming(config, torch.float32, job.device), latents, 1)))
        return relative_l2(frames, exact[0])

    def way(make: Callable[[ModelConfig, torch.dtype, str], Parts], name: str, each: int) -> Call:
        try:
            return _call(make(config, getattr(torch, name), job.device), latents, each)
        except MissingDependency as missing:
            raise Missing(str(missing)) from None

    answers: dict[str, Callable[[], Call]] = {
        f"diffusers' modules, {name}": lambda name=name: way(_streaming, name, 1)  # type: ignore[misc]
        for name in ("float32", "bfloat16")
    }
    for name, each in (("float32", 1), ("float32", 4), ("bfloat16", 4), *(("float16", n) for n in (1, 2, 4))):
        answers[f"{name}, {each} a call"] = lambda name=name, each=each: way(fused, name, each)  # type: ignore[misc]
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True  # as the torch backend
    yield Question(
        "decode, four later latent frames",
        {"Cz": channels, "H": height, "W": width, "F": LATER},
        answers,
        error,
        {answer: next(ALLOWED[name] for name in ALLOWED if name in answer) for answer in answers},
        seconds=20.0,
    )
    torch.backends.cudnn.benchmark = before


def _streaming(config: ModelConfig, dtype: torch.dtype, device: str) -> Parts:
    torch.manual_seed(0)
    first, later = streaming_decoders(build_vae(config))
    return _placed(first, device).to(dtype), _placed(later, device).to(dtype)


def fused(config: ModelConfig, dtype: torch.dtype, device: str) -> Parts:
    """As the torch backend decodes: what takes the first latent frame, and what takes later ones."""
    torch.manual_seed(0)
    vae = build_vae(config).to(device)
    modules = fused_modules(vae, ("decode_first", "decode"), dtype)  # type: ignore[arg-type]  # of Wan
    return _placed(modules["decode_first"], device), _placed(modules["decode"], device)


def _placed(part: nn.Module, device: str) -> nn.Module:
    return part.requires_grad_(False).to(device)


def _call(parts: Parts, latents: Tensor, each: int) -> Call:
    """Decodes all but the first of latents [1,Cz,F,H,W], `each` a call -> frames [f,height,width,3]."""
    first, later = parts
    given = latents.to(next(later.parameters()).dtype)
    _, *before = first(given[:, :, :1])
    begun = [state.clone() for state in before]

    def decode() -> Tensor:
        states, found = begun, list[Tensor]()
        for chunk in given[:, :, 1:].split(each, dim=2):
            frames, *states = later(chunk, *states)
            found.append(frames)
        return torch.cat(found)

    return decode
