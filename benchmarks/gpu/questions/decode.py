"""Decoding a latent frame of Wan's video autoencoder: in which dtype and layout.

Letters: Cz latent channels, H W of a latent frame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from conceptmaster.engine.vae.wan_decoder import build_vae, streaming_decoders
from conceptmaster.errors import MissingDependency

from ..job import Job
from ..model import SMALL, Size, in_float32, relative_l2
from ..timing import Call
from .question import Missing, Question

ALLOWED = {"float32": 1e-2, "bfloat16": 5e-2, "bfloat16, channels last": 5e-2}
"""float32 with PyTorch's defaults for convolutions, which are TF32."""


def questions(job: Job) -> Iterator[Question]:
    """At 832x480: one later latent frame, which gives four frames."""
    size = SMALL if job.small else Size()
    config = dataclasses.replace(size, concepts=0).config
    channels, _, height, width = config.latent_shape
    latents = torch.randn(2, 1, channels, 1, height, width, device=job.device)  # two frames, one by one
    exact: list[Tensor] = []

    def make(dtype: torch.dtype, channels_last: bool = False) -> Call:
        try:
            torch.manual_seed(0)
            parts = streaming_decoders(build_vae(config))
        except MissingDependency as error:
            raise Missing(str(error)) from None
        first, later = (_placed(part, job.device, dtype, channels_last) for part in parts)
        before, now = latents.to(dtype)
        _, *states = first(before)
        return lambda: later(now, *states)[0]

    def error(frames: Tensor) -> float:
        if not exact:  # the first answer's weights: all are drawn from one seed
            exact.append(in_float32(make(torch.float32)))
        return relative_l2(frames, exact[0])

    yield Question(
        "decode, a later latent frame",
        {"Cz": channels, "H": height, "W": width},
        {
            "float32": lambda: make(torch.float32),
            "bfloat16": lambda: make(torch.bfloat16),
            "bfloat16, channels last": lambda: make(torch.bfloat16, True),
        },
        error,
        ALLOWED,
        seconds=12.0,
        graphs=False,
    )


def _placed(part: nn.Module, device: str, dtype: torch.dtype, channels_last: bool) -> nn.Module:
    part.requires_grad_(False).to(device, dtype)
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for weight in part.parameters() if channels_last else ():
        if weight.ndim in layouts:
            weight.data = weight.data.contiguous(memory_format=layouts[weight.ndim])
    return part
