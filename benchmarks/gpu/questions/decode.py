"""Decoding latent frames of Wan's video autoencoder: in which dtype and layout, and how many a call.

Letters: Cz latent channels, H W of a latent frame, n latent frames.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from conceptmaster.engine.vae.wan_decoder import build_vae, streaming_decoders
from conceptmaster.engine.vae.wan_fused import FusedDecoder
from conceptmaster.errors import MissingDependency

from ..job import Job
from ..model import SMALL, Size, in_float32, relative_l2
from ..timing import Call, captured
from .question import Missing, Question

ALLOWED = {"float32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}
"""By dtype; float32 with PyTorch's defaults for convolutions, which are TF32."""
AT_ONCE = 4


def questions(job: Job) -> Iterator[Question]:
    """At 832x480: four later latent frames, which give sixteen frames, and then all 21 of a video against
    diffusers' own decoding. Frames are held to float32's."""
    size = SMALL if job.small else Size()
    config = dataclasses.replace(size, concepts=0).config
    channels, whole, height, width = config.latent_shape
    shape = {"Cz": channels, "H": height, "W": width}
    latents = torch.randn(1, channels, max(whole, 1 + AT_ONCE), height, width, device=job.device)

    def vae() -> Any:
        try:
            torch.manual_seed(0)
            return build_vae(config).to(job.device).requires_grad_(False)
        except MissingDependency as error:
            raise Missing(str(error)) from None

    def calls(dtype: torch.dtype, count: int, how: str) -> Call:
        """So many latent frames a call, four in all, behind the first."""
        first, later = _pair(vae(), dtype, how)
        given = latents[:, :, : 1 + AT_ONCE].to(torch.float32 if how == "ours" else dtype)
        _, *states = first(given[:, :, :1])
        parts = given[:, :, 1:].split(count, dim=2)
        return lambda: _streamed(later, parts, states)

    @functools.cache
    def exact(frames: int) -> Tensor:
        """Of four latent frames, or of a whole video."""
        if frames == AT_ONCE:
            return in_float32(calls(torch.float32, 1, "as diffusers'"))
        return in_float32(whole_video(torch.float32, "diffusers"))

    def whole_video(dtype: torch.dtype, how: str) -> Call:
        model, given = vae(), latents[:, :, :whole]
        if how == "diffusers":
            model.to(dtype)
            shape_of = (1, -1, 1, 1, 1)
            mean, std = (
                torch.tensor(values, device=job.device).view(shape_of)
                for values in (model.config.latents_mean, model.config.latents_std)
            )
            raw = (given * std + mean).to(dtype)
            return lambda: (model.decode(raw).sample[0].permute(1, 2, 3, 0) + 1) / 2
        first, later = _pair(model, dtype, how)

        def call() -> Tensor:
            frames, *states = first(given[:, :, :1])
            rest = given[:, :, 1:].split(AT_ONCE, dim=2)
            return torch.cat([frames, _streamed(later, rest, states)]) if rest[0].shape[2] else frames

        return call

    def graph(make: Callable[..., Call]) -> Call:
        return captured(make(AT_ONCE, "ours"))

    for name, allowed in ALLOWED.items():
        make = functools.partial(calls, getattr(torch, name))
        yield Question(
            f"decode, four later latent frames, {name}",
            shape,
            {
                "as diffusers', 1 a call": functools.partial(make, 1, "as diffusers'"),
                "channels last, 1 a call": functools.partial(make, 1, "channels last"),
                **{f"ours, {n} a call": functools.partial(make, n, "ours") for n in (1, 2, AT_ONCE)},
                "ours, 4 a call, CUDA graph": functools.partial(graph, make),
            },
            lambda frames: relative_l2(frames, exact(AT_ONCE)),
            allowed,
            seconds=12.0,
            graphs=False,  # which would each keep the memory of its own call
        )
    videos = {
        f"{name}, {how}": functools.partial(whole_video, getattr(torch, name), how)
        for name in ALLOWED
        for how in ("diffusers", "ours")
    }
    yield Question(
        "decode, all of a video",
        shape | {"n": whole},
        videos,
        lambda frames: relative_l2(frames, exact(whole)),
        {name: ALLOWED[name.split(",")[0]] for name in videos},
        seconds=40.0,
        graphs=False,
    )


def _pair(vae: Any, dtype: torch.dtype, how: str) -> tuple[nn.Module, nn.Module]:
    """What decodes the first latent frame and what the others, in its dtype."""
    if how == "ours":
        decoder = FusedDecoder(vae).eval()
        decoder.narrow(dtype)
        return decoder, decoder
    first, later = (part.to(dtype) for part in streaming_decoders(vae))
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for weight in vae.parameters() if how == "channels last" else ():
        if weight.ndim in layouts:
            weight.data = weight.data.contiguous(memory_format=layouts[weight.ndim])
    return first, later


def _streamed(later: nn.Module, parts: tuple[Tensor, ...], states: list[Tensor]) -> Tensor:
    found = []
    for part in parts:
        frames, *states = later(part, *states)
        found.append(frames)
    return torch.cat(found)
