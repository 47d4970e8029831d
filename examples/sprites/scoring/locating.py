"""Where a sprite is in a frame, found without being told where to look."""

from __future__ import annotations

import numpy as np

from ..world.draw import REACH, paint_along
from ..world.scenes import SIZE, Identity

LOOKED_AT = (0, 4, 8, 12, 16)
"""Frames: the last of each latent one."""


def locate(frames: np.ndarray, noun: str, identity: Identity, radius: float, look: float) -> np.ndarray:
    """The sprite's centre in each frame, float [F,2] as (x, y) in pixels.

    frames uint8 [F,S,S,3]. The sprite is painted and laid over every whole pixel of the frame; where its own
    colours (RGB, squared, over its own pixels inside of the frame) are nearest, there it is.
    """
    half = int(np.ceil(REACH * radius)) + 1
    side, size = 2 * half + 1, SIZE + 2 * half
    middle = np.full((1, 2), half + 0.5, np.float32)
    painted, covers = paint_along(noun, identity, radius, middle, look, side)
    weight, colour = covers[0], painted[0]  # [w,w], premultiplied [w,w,3]
    square = (colour * colour).sum(-1) / np.maximum(weight, 1e-6)
    factors = np.stack((weight, *(-2 * np.moveaxis(colour, -1, 0)), square))  # [5,w,w]
    turned = np.conj(np.fft.rfft2(factors, (size, size)))
    seen = np.zeros((len(frames), 5, size, size), np.float32)  # |f|², f, 1, with a border of nothing
    inner = np.s_[half : half + SIZE, half : half + SIZE]
    picture = frames.astype(np.float32) / 255
    seen[:, 0][:, *inner] = (picture * picture).sum(-1)
    seen[:, 1:4][:, :, *inner] = np.moveaxis(picture, -1, 1)
    seen[:, 4][:, *inner] = 1
    spectrum = np.fft.rfft2(seen)
    place = np.s_[:SIZE, :SIZE]  # of the template's corner: its centre is on a pixel of the frame
    error = np.fft.irfft2((spectrum * turned).sum(1), (size, size))[:, *place]
    inside = np.fft.irfft2(spectrum[:, 4] * turned[0], (size, size))[:, *place]
    best = (error / np.maximum(inside, 1e-6)).reshape(len(frames), -1).argmin(1)
    return np.stack((best % SIZE, best // SIZE), axis=1) + 0.5
