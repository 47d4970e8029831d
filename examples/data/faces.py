"""Whether a picture of a person shows a face, by OpenCV's cascades (Viola and Jones 2001), which are in its
wheels below version 5."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from conceptmaster.errors import MissingDependency, how_to_install

CASCADES = ("haarcascade_frontalface_default.xml", "haarcascade_profileface.xml")
NEIGHBOURS = 5
"""Detections beside each other that make a face: fewer are chance."""
SMALLEST = 24
"""Side in pixels of the smallest face that the cascades know."""


def face_finder(least: float) -> Callable[[np.ndarray], bool]:
    """Of a picture uint8 [H,W,3], RGB: whether it shows a face whose side is at least `least` of the
    picture's shorter one. A profile counts to either side.

    Raises: MissingDependency for an OpenCV without the cascades.
    """
    folder = Path(cv2.data.haarcascades)  # type: ignore[attr-defined]  # its stubs lack it
    paths = [folder / name for name in CASCADES]
    if not hasattr(cv2, "CascadeClassifier") or not all(path.is_file() for path in paths):
        raise MissingDependency(f"this OpenCV ({cv2.__version__}) has no faces: {how_to_install('data')}")
    frontal, profile = (cv2.CascadeClassifier(str(path)) for path in paths)

    def has_face(picture: np.ndarray) -> bool:
        grey = cv2.equalizeHist(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))
        side = max(SMALLEST, round(least * min(grey.shape)))
        looks = ((frontal, grey), (profile, grey), (profile, np.ascontiguousarray(grey[:, ::-1])))
        return any(
            len(cascade.detectMultiScale(image, minNeighbors=NEIGHBOURS, minSize=(side, side)))
            for cascade, image in looks
        )

    return has_face
