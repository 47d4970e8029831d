"""Where a concept is in a frame: boxes of OWLv2 (version 1 of the paper), masks of CLIPSeg or SAM 2 (version
2).

The paper's version 2 uses LISA, which is not in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

OWLV2 = {"owlv2": "Owlv2ForObjectDetection"}
CLIPSEG = {"clipseg": "CLIPSegForImageSegmentation"}
SAM2 = {"sam2": "Sam2Model", "sam2_video": "Sam2Model"}
SCORE = 0.1
"""Least score of a box: OWLv2's default."""
HALF = 0.5
"""Least probability of a mask's pixel."""
AREA = 0.001
"""Least part of a frame that is something."""
OUTSIDE = 255
"""What stands outside of a mask in its crop: white, as around pictures that are cut out."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Region:
    """box: x0, y0, x1, y1 in whole pixels, the last two just outside; mask: bool [H,W] of the frame, or
    None."""

    box: tuple[int, int, int, int]
    mask: np.ndarray | None = None

    def cut(self, frame: np.ndarray) -> np.ndarray:
        """What of a frame, uint8 [H,W,3], is in it: uint8 [h,w,3]."""
        x0, y0, x1, y1 = self.box
        if self.mask is None:
            return frame[y0:y1, x0:x1]
        inside = self.mask[y0:y1, x0:x1, None]
        return np.where(inside, frame[y0:y1, x0:x1], np.uint8(OUTSIDE))


def boxed(box: Sequence[float], height: int, width: int) -> Region | None:
    """The region of a box in pixels, inside of the frame; None where it is next to nothing."""
    low, high = np.floor(box[:2]), np.ceil(box[2:])
    x0, y0, x1, y1 = (int(v) for v in np.clip([*low, *high], 0, [width, height] * 2))
    big = x1 > x0 and y1 > y0 and (x1 - x0) * (y1 - y0) >= AREA * height * width
    return Region((x0, y0, x1, y1)) if big else None


def masked(mask: np.ndarray) -> Region | None:
    """The region of a mask, bool [H,W]; None where it is next to nothing."""
    if mask.mean() < AREA:
        return None
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return Region((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1), mask)


class Finder(Protocol):
    """Finds concepts. version: 1 for boxes, 2 for masks: whose names the measures then have."""

    version: int

    def find(
        self, frames: np.ndarray, labels: Sequence[str], indices: Sequence[int], name: str
    ) -> list[Found]:
        """Of each label its region in each frame, uint8 [n,H,W,3].

        indices: which frames of the video these are; name: the sample's. Who finds by looking needs neither.
        """


Found = list[Region | None]
"""A concept in each frame; None where it is not found."""


class Owlv2Boxes:
    """The box of each label that OWLv2 is surest of."""

    version = 1

    def __init__(self, owlv2: Any) -> None:
        self.owlv2, self.processor = owlv2, owlv2.processor()

    def find(
        self, frames: np.ndarray, labels: Sequence[str], indices: Sequence[int], name: str
    ) -> list[Found]:
        """See ``Finder``."""
        each = [self._in_frame(frame, labels) for frame in frames]
        return [list(column) for column in zip(*each, strict=True)]

    def _in_frame(self, frame: np.ndarray, labels: Sequence[str]) -> list[Region | None]:
        import torch

        height, width = frame.shape[:2]
        asked = [f"a photo of {label}" for label in labels]
        inputs = self.processor(
            text=asked,
            images=Image.fromarray(frame),
            return_tensors="pt",
            padding="max_length",
            truncation=True,
        )
        with torch.no_grad():
            outputs = self.owlv2.model(**inputs.to(self.owlv2.device))
        scores = outputs.logits[0].sigmoid()  # [boxes,labels]
        # centres and sizes in parts of the padded square, whose sides are the frame's longer one
        centre, size = outputs.pred_boxes[0].split(2, dim=-1)
        corners = (max(height, width) * torch_cat(centre - size / 2, centre + size / 2)).cpu().numpy()
        found: list[Region | None] = []
        for number in range(len(labels)):
            best = int(scores[:, number].argmax())
            sure = float(scores[best, number]) >= SCORE
            found.append(boxed(corners[best], height, width) if sure else None)
        return found


class ClipSegMasks:
    """The pixels that CLIPSeg takes for each label."""

    version = 2

    def __init__(self, clipseg: Any) -> None:
        self.clipseg, self.processor = clipseg, clipseg.processor()

    def find(
        self, frames: np.ndarray, labels: Sequence[str], indices: Sequence[int], name: str
    ) -> list[Found]:
        """See ``Finder``."""
        import torch

        found: list[Found] = [[] for _ in labels]
        for frame in frames:
            images = [Image.fromarray(frame)] * len(labels)
            inputs = self.processor(
                text=list(labels), images=images, return_tensors="pt", padding=True, truncation=True
            )
            with torch.no_grad():
                logits = self.clipseg.model(**inputs.to(self.clipseg.device)).logits
            logits = logits.reshape(len(labels), 1, *logits.shape[-2:])  # one label comes without its axis
            shown = _resized(logits, frame.shape[:2]).sigmoid()[:, 0].cpu().numpy()
            best = shown.argmax(0)  # a pixel is of one concept
            for number, share in enumerate(shown):
                found[number].append(masked((share >= HALF) & (best == number)))
        return found


class Sam2Masks:
    """The mask that SAM 2 draws in each of OWLv2's boxes."""

    version = 2

    def __init__(self, boxes: Finder, sam2: Any) -> None:
        self.boxes, self.sam2 = boxes, sam2
        self.side = int(sam2.model.config.vision_config.backbone_config.image_size[0])

    def find(
        self, frames: np.ndarray, labels: Sequence[str], indices: Sequence[int], name: str
    ) -> list[Found]:
        """See ``Finder``."""
        found = self.boxes.find(frames, labels, indices, name)
        for number, frame in enumerate(frames):
            there = [of for of in found if of[number] is not None]
            boxes = [region.box for of in there if (region := of[number]) is not None]
            for of, mask in zip(there, self.masks(frame, boxes) if boxes else [], strict=True):
                of[number] = masked(mask)
        return found

    def masks(self, frame: np.ndarray, boxes: Sequence[Sequence[float]]) -> np.ndarray:
        """bool [n,H,W] of boxes x0, y0, x1, y1 in a frame's pixels; as Sam2Processor, which needs
        torchvision."""
        import torch

        device, (height, width) = self.sam2.device, frame.shape[:2]
        pixels = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float() / 255
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = _resized((pixels - mean) / std, (self.side, self.side))
        scale = torch.tensor([self.side / width, self.side / height] * 2)
        prompts = (torch.tensor(np.asarray(boxes), dtype=torch.float32) * scale)[None]  # [1,n,4]
        with torch.no_grad():
            found = self.sam2.model(
                pixel_values=pixels.to(device), input_boxes=prompts.to(device), multimask_output=False
            )
        return (_resized(found.pred_masks[0], (height, width))[:, 0] > 0).cpu().numpy()


def torch_cat(*parts: Any) -> Any:
    """Tensors joined along their last axis."""
    import torch

    return torch.cat(parts, dim=-1)


def _resized(values: Any, size: tuple[int, ...]) -> Any:
    """[n,C,h,w] -> [n,C,*size]."""
    import torch

    shrinks = values.shape[-2] > size[0] or values.shape[-1] > size[1]
    return torch.nn.functional.interpolate(
        values, size, mode="bilinear", align_corners=False, antialias=shrinks
    )
