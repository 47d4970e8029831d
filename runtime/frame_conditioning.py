"""Pictures as frames of the video that is made: what an image-to-video model knows of it beforehand.

The video is thought of as empty (grey) but for these frames, and encoded. In front of its latents stands,
for each video frame that a latent frame stands for, a channel that is one where the frame is known: the first
latent frame, which stands for one, has it in all channels. So diffusers' WanImageToVideoPipeline does it with
one picture or two, and SkyReels-A2's A2Pipeline with references that lead the video, at three for three, and
are left out of it afterwards.

Of a model whose picture may be left out, the one picture is the first latent frame itself: clean at every
step, with a mask that says so, and put there once more behind the last step, as diffusers' pipelines do it
where they expand time steps. Without a picture the mask is zero, and the video is of text alone.

A2Pipeline draws its latents from the encoder's distribution; here they are its mean, as in diffusers. With
one reference A2Pipeline fails (its mask has a latent frame too many); here it is as one would expect.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from . import pictures
from .causal import run_causal, spans

if TYPE_CHECKING:
    from PIL.Image import Image

    from .backends import Backend
    from .bundle_format.schema import Manifest, Shapes

log = logging.getLogger(__name__)

MAX_STRETCH = 1.05  # beyond this it shows


def fitted(image: Image, index: int, label: str, manifest: Manifest) -> dict[int, np.ndarray]:
    """The frames that a request's picture number `index` is, by number, each uint8 [height,width,3]; none
    unless the manifest has `conditioning`.

    Warns: a log line for a picture whose shape is lost.
    """
    if manifest.conditioning is None:
        return {}
    size = (manifest.shapes.width, manifest.shapes.height)
    place = manifest.conditioning.placements[index]
    ratio = (image.width * size[1]) / (image.height * size[0])
    if place.fit == "stretched" and max(ratio, 1 / ratio) > MAX_STRETCH:
        shape = (label, *image.size, *size)
        log.warning("the picture of %r is %d×%d: it is stretched to the video's %d×%d", *shape)
    frame = pictures.fit(image, size, place.fit, manifest.pictures.background)
    return dict.fromkeys(place.frames(manifest.shapes.frames), frame)


def leading(manifest: Manifest, count: int) -> int:
    """How many frames at the start of a video from `count` pictures are not part of it."""
    return 0 if manifest.conditioning is None else manifest.conditioning.dropped_frames * count


def previewed(manifest: Manifest, count: int) -> int:
    """The latent frame to preview of a video from `count` pictures: the first one that is made."""
    return count if leading(manifest, count) or manifest.begins_clean else 0


def channels(backend: Backend, frames: dict[int, np.ndarray], manifest: Manifest) -> np.ndarray:
    """What `fitted` gave → the mask and the latents, float32 [1,t+Cz,F,H,W]; of a picture that may be left
    out [1,1+Cz,1,H,W]."""
    shapes = manifest.shapes
    if manifest.begins_clean:
        if not frames:
            return np.zeros((1, 1 + shapes.latent[0], 1, *shapes.latent[2:]), np.float32)
        encoded = backend.run("encode_first", {"frames": _unit(frames[0])[None]})["latents"]
        clean = backend.to_host(encoded)  # [1,Cz,1,H,W]
        return np.concatenate((np.ones_like(clean[:, :1]), clean), axis=1)
    chunks = ({"frames": chunk} for chunk in _chunks(frames, shapes, backend.latent_frames))
    parts = [backend.to_host(part) for part in run_causal(backend, "encode", chunks, "latents")]
    latents = np.concatenate(parts, axis=2)  # [1,Cz,F,H,W]
    return np.concatenate((mask(frames, shapes), latents), axis=1)


def kept(latents: np.ndarray, given: np.ndarray | None, manifest: Manifest) -> np.ndarray:
    """The latents [Cz,F,H,W] behind the last step with the picture of `channels`, where that is the first."""
    if given is None or not manifest.begins_clean:
        return latents
    known, clean = given[0, :1], given[0, 1:]  # [1,1,H,W], [Cz,1,H,W]
    return np.concatenate((known * clean + (1 - known) * latents[:, :1], latents[:, 1:]), axis=1)


def mask(frames: dict[int, np.ndarray], shapes: Shapes) -> np.ndarray:
    """One where a frame is known, float32 [1,t,F,H,W]."""
    _, latent_frames, height, width = shapes.latent
    times = shapes.frames_per_latent
    known = np.isin(np.arange(shapes.frames), list(frames)).astype(np.float32)  # [frames]
    known = np.concatenate((np.repeat(known[:1], times), known[1:]))  # [F*t]
    planes = known.reshape(latent_frames, times).T[None, :, :, None, None]  # [1,t,F,1,1]
    return np.broadcast_to(planes, (1, times, latent_frames, height, width))


def _chunks(frames: dict[int, np.ndarray], shapes: Shapes, at_once: int) -> Iterator[np.ndarray]:
    """The whole video, the frames of one latent frame, then of `at_once`: float32 [n*t,height,width,3],
    -1..1."""
    for span in spans(shapes.latent[1], at_once):
        start, end = (max(0, 1 + (i - 1) * shapes.frames_per_latent) for i in (span.start, span.stop))
        chunk = np.zeros((end - start, shapes.height, shapes.width, 3), np.float32)
        for number in range(start, end):
            if number in frames:
                chunk[number - start] = _unit(frames[number])
        yield chunk


def _unit(frame: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in -1..1."""
    return frame.astype(np.float32) / 255.0 * 2.0 - 1.0
