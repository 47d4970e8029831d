"""Pictures as frames of the video that is made: what an image-to-video model knows of it beforehand.

The video is thought of as empty (grey) but for these frames, and encoded. In front of its latents stands,
for each video frame that a latent frame stands for, a channel that is one where the frame is known: the first
latent frame, which stands for one, has it in all channels. So diffusers' WanImageToVideoPipeline does it with
one picture or two, and SkyReels-A2's A2Pipeline with references that lead the video, at three for three, and
are left out of it afterwards.

Of a model whose picture may be left out, the one picture is the first latent frame itself: clean at every
step, with a mask that says so, and put there once more behind the last step, as diffusers' pipelines do it
where they expand time steps. Without a picture the mask is zero, and the video is of text alone.

Of VACE each picture is a latent frame of its own beside the video's, and what the model is told of all of
them is a control: the latents of what is kept and of what is made anew, then a mask of the pixels that are
made anew. A picture is kept, of the video nothing is: it is empty, and encoded, once for all requests. So
diffusers' WanVACEPipeline does it with references alone.

Of Bernini each picture keeps its size, see grids.py.

Of Phantom and SkyReels-V3 each picture is a clean latent frame behind the video's, which no step changes; a
place that no picture fills has zero latents.

Of MAGREF all pictures are on one canvas, the first frame, of which they are a part: see canvas.py.

A2Pipeline draws its latents from the encoder's distribution; here they are its mean, as in diffusers. With
one reference A2Pipeline fails (its mask has a latent frame too many); here it is as one would expect.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from . import pictures
from .causal import run_causal, spans
from .grids import own_grids

if TYPE_CHECKING:
    from PIL.Image import Image

    from .backends import Backend
    from .bundle_format.schema import Manifest, Shapes
    from .guidance import Guidance

log = logging.getLogger(__name__)

MAX_STRETCH = 1.05  # beyond this it shows


def fitted(image: Image, index: int, label: str, manifest: Manifest) -> dict[int, np.ndarray]:
    """The frames (of VACE latent frames) that a request's picture number `index` is, by number, each
    [height,width,3] in 0..255, see `pictures.fit`; none unless the manifest has `conditioning`, and none of
    a canvas, see canvas.py.

    Warns: a log line for a picture whose shape is lost.
    """
    if manifest.conditioning is None or manifest.conditioning.kind == "canvas":
        return {}
    size = (manifest.shapes.width, manifest.shapes.height)
    if side := manifest.conditioning.side:
        size = (side, side)
    place = manifest.conditioning.placements[index]
    ratio = (image.width * size[1]) / (image.height * size[0])
    if place.fit == "stretched" and max(ratio, 1 / ratio) > MAX_STRETCH:
        shape = (label, *image.size, *size)
        log.warning("the picture of %r is %d×%d: it is stretched to the video's %d×%d", *shape)
    frame = pictures.fit(image, size, place.fit, manifest.pictures.background)
    total = manifest.denoised[1] if manifest.conditioning.beside else manifest.shapes.frames
    return dict.fromkeys(place.frames(total), frame)


def leading(manifest: Manifest, count: int) -> int:
    """How many frames at the start of a video from `count` pictures are not part of it."""
    return 0 if manifest.conditioning is None else manifest.conditioning.leading(count)


def lengths(manifest: Manifest) -> tuple[int, int]:
    """How many frames the videos have that come out, the fewest and the most: each picture may cost some."""
    least = 0 if manifest.conditioning is None else manifest.conditioning.required
    total = manifest.shapes.frames
    return total - leading(manifest, manifest.concepts), total - leading(manifest, least)


def seen(manifest: Manifest, concepts: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which guidance branches see the pictures. concepts: those that would see them as concepts are seen: of
    an image-to-video model guidance is of captions alone, unless its pictures are tokens of their own."""
    conditioning = manifest.conditioning
    own = conditioning is None or conditioning.by_branch
    return tuple(concept or not own for concept in concepts)


def concept_mask(manifest: Manifest, guidance: Guidance, labels: Sequence[int]) -> np.ndarray:
    """Which branch sees which of the concepts, bool [K,N]; where their tokens are masked one by one, [K,C].
    labels: how many tokens each one's label has."""
    s = manifest.shapes
    mask = np.zeros((s.branches, s.concepts), bool)
    mask[np.array(seen(manifest, guidance.concepts)), : len(labels)] = True
    if not manifest.masks_tokens:
        return mask
    counts = np.zeros((s.concepts, 1), int)
    counts[: len(labels), 0] = labels
    tokens = np.arange(s.queries) % s.label_tokens < counts  # [N,Q]
    return (mask[:, :, None] & tokens).reshape(s.branches, -1)


def previewed(manifest: Manifest, count: int) -> int:
    """The latent frame to preview of a video from `count` pictures: the first one that is made."""
    if manifest.conditioning is not None and manifest.conditioning.beside:
        return _own(manifest)[0]
    if manifest.conditioning is not None and manifest.conditioning.kind == "canvas":
        return min(count, 1)
    return count if leading(manifest, count) or manifest.begins_clean else 0


def channels(
    backend: Backend,
    frames: dict[int, np.ndarray],
    manifest: Manifest,
    empty: Callable[[], np.ndarray] | None = None,
    area: np.ndarray | None = None,
) -> np.ndarray:
    """What `fitted` gave → the mask and the latents, float32 [1,t+Cz,F,H,W]; of a picture that may be left
    out [1,1+Cz,1,H,W]; of pictures beside the video the control, [1,2*Cz+p,F,H,W] with p pixels of a latent;
    of pictures behind it their latents alone, [1,Cz,N,H,W]; of pictures of their own size see `own_grids`.
    empty: gives `encoded` of no frames, where that is known already; area: bool [H,W], of a frame what is
    known, all of it where it is None."""
    shapes = manifest.shapes
    if manifest.conditioning is not None and manifest.conditioning.kind == "grids":
        return own_grids(backend, frames, manifest)
    if manifest.conditioning is not None and manifest.conditioning.kind == "behind":
        behind = np.zeros((1, shapes.latent[0], shapes.concepts, *shapes.latent[2:]), np.float32)
        for number, picture in frames.items():
            behind[:, :, number] = _encoded_alone(backend, picture)[:, :, 0]
        return behind
    if manifest.conditioning is not None and manifest.conditioning.beside:
        nothing = encoded(backend, {}, shapes) if empty is None else empty()
        return _control(backend, frames, manifest, nothing)
    if manifest.begins_clean:
        if not frames:
            return np.zeros((1, 1 + shapes.latent[0], 1, *shapes.latent[2:]), np.float32)
        clean = _encoded_alone(backend, frames[0])  # [1,Cz,1,H,W]
        return np.concatenate((np.ones_like(clean[:, :1]), clean), axis=1)
    known = mask(frames, shapes)
    known = known if area is None else known * area.astype(np.float32)
    return np.concatenate((known, encoded(backend, frames, shapes)), axis=1)


def encoded(backend: Backend, frames: dict[int, np.ndarray], shapes: Shapes) -> np.ndarray:
    """The latents of a video that is empty but for these frames, float32 [1,Cz,F,H,W]."""
    chunks = ({"frames": chunk} for chunk in _chunks(frames, shapes, backend.latent_frames))
    parts = [backend.to_host(part) for part in run_causal(backend, "encode", chunks, "latents")]
    return np.concatenate(parts, axis=2)  # [1,Cz,F,H,W]


def _encoded_alone(backend: Backend, frame: np.ndarray) -> np.ndarray:
    """The latents of a single picture, float32 [1,Cz,1,H,W]."""
    return backend.to_host(backend.run("encode_first", {"frames": _unit(frame)[None]})["latents"])


def _own(manifest: Manifest) -> list[int]:
    """The latent frames that are the video's own, of all that steps make."""
    assert manifest.conditioning is not None
    total = manifest.denoised[1]
    beside = {n for place in manifest.conditioning.placements for n in place.frames(total)}
    return [number for number in range(total) if number not in beside]


def _control(
    backend: Backend, pictured: dict[int, np.ndarray], manifest: Manifest, empty: np.ndarray
) -> np.ndarray:
    """pictured: latent frame → picture; empty: an empty video's latents [1,Cz,F,H,W]."""
    channels, total, *sides = manifest.denoised
    control = np.zeros((1, 2 * channels + manifest.shapes.space**2, total, *sides), np.float32)
    own = _own(manifest)
    control[:, :channels, own] = empty
    control[:, channels : 2 * channels, own] = empty
    control[:, 2 * channels :, own] = 1.0
    for number, picture in pictured.items():
        control[:, :channels, number] = _encoded_alone(backend, picture)[:, :, 0]
    return control


def kept(latents: np.ndarray, given: np.ndarray | None, manifest: Manifest) -> np.ndarray:
    """The latents [Cz,F,H,W] behind the last step, with the picture of `channels` where that is the first,
    and without what stands beside the video."""
    if manifest.conditioning is not None and manifest.conditioning.beside:
        return latents[:, _own(manifest)]
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
    """0..255 -> float32 in -1..1."""
    return frame.astype(np.float32) / 255.0 * 2.0 - 1.0
