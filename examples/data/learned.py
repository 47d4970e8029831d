"""The learned parts, from transformers: Grounding-DINO, SAM 2, CLIP, and captioning models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from conceptmaster.engine.checkpoints.pretrained import Pretrained, check_kind, open_pretrained
from conceptmaster.errors import InputError

from .boxes import Agrees, Detect, Found
from .captions import Captioner
from .masks import Segment
from .rectangles import Box
from .thresholds import Thresholds

KINDS = {
    "captioner": {
        "blip": "BlipForConditionalGeneration",
        "qwen2_vl": "Qwen2VLForConditionalGeneration",
        "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    },
    "detector": {"grounding-dino": "GroundingDinoForObjectDetection"},
    "segmenter": {"sam2": "Sam2Model", "sam2_video": "Sam2Model"},
    "clip": {"clip": "CLIPModel"},
}
"""By part the kinds of models that will do, by config.json's model_type."""
QUESTION = "Describe this video in one sentence: which things it shows, where they are and what they do."
WORDS = 64
"""Most tokens of a caption."""
TEMPLATE = "a photo of a {}"
"""What CLIP reads of a class: Radford et al. 2021's."""
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's colours: how SAM 2 sees them."""


def check_device(device: str) -> None:
    """Raises InputError for a device that is not there."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device, re.ASCII):
        raise InputError(f"--device must be cpu, cuda or cuda:N, not {device!r:.40}")
    if device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {device}: this machine, or this build of PyTorch, has no such GPU")


def check(name: str, place: str) -> None:
    """Raises WeightsError where the model at `place` is not of a kind that the part needs."""
    check_kind(place, KINDS[name])


def load(name: str, place: str, device: str) -> Pretrained:
    """Opens the model of a part. Raises as `open_pretrained`."""
    return open_pretrained(place, KINDS[name], device)


def part(name: str, model: Pretrained, thresholds: Thresholds, classes: Sequence[str]) -> dict[str, Any]:
    """A model as the part that `parts.Parts` has of it, by its name there."""
    if name == "captioner":
        return {"captioner": captioner(model)}
    if name == "detector":
        return {"detect": detector(model, thresholds.box_score)}
    if name == "segmenter":
        return {"segment": segmenter(model)}
    return {"agrees": recogniser(model, classes, thresholds.clip_rank)}


def detector(model: Pretrained, least: float) -> Detect:
    """Grounding-DINO (Liu et al. 2023): boxes of labels in a frame. A box's score for a label is that of the
    label's best token, its label the best one."""
    tokenizer, processor = model.tokenizer(), model.image_processor()

    @torch.inference_mode()
    def detect(frame: np.ndarray, labels: Sequence[str]) -> list[Found]:
        text, spans = "", []
        for label in labels:
            spans.append((len(text), len(text) + len(label)))
            text += f"{label.lower()}. "
        words = tokenizer(text.strip(), return_tensors="pt", return_offsets_mapping=True)
        offsets = words.pop("offset_mapping")[0].tolist()
        pixels = processor(images=frame, return_tensors="pt")
        out = model.model(**words.to(model.device), **pixels.to(model.device))
        scores = out.logits[0].float().sigmoid().cpu()[:, : len(offsets)]  # [queries,tokens]
        of = [[n for n, (a, b) in enumerate(offsets) if first <= a < b <= last] for first, last in spans]
        each = torch.stack([scores[:, tokens].amax(1) for tokens in of], 1)  # [queries,labels]
        best, which = each.max(1)
        x, y, w, h = out.pred_boxes[0].float().cpu().unbind(1)
        boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1).clamp(0, 1)
        return [
            Found(tuple(boxes[n].tolist()), float(best[n]), labels[int(which[n])])  # type: ignore[arg-type]
            for n in torch.nonzero(best >= least)[:, 0].tolist()
        ]

    return detect


def segmenter(model: Pretrained) -> Segment:
    """SAM 2 (Ravi et al. 2024): the mask of a box."""
    side = int(model.model.config.prompt_encoder_config.image_size)

    @torch.inference_mode()
    def segment(number: int, frame: np.ndarray, box: Box) -> np.ndarray:
        picture = torch.from_numpy(frame).to(model.device).permute(2, 0, 1)[None].float() / 255
        picture = F.interpolate(picture, (side, side), mode="bilinear", antialias=True)
        mean, spread = (picture.new_tensor(each)[:, None, None] for each in (MEAN, SPREAD))
        corners = picture.new_tensor(box)[None, None] * side  # [1,1,4]
        out = model.model(pixel_values=(picture - mean) / spread, input_boxes=corners, multimask_output=False)
        masks = out.pred_masks[0, 0, :1][None].float()  # [1,1,h,w]
        whole = F.interpolate(masks, frame.shape[:2], mode="bilinear")
        return np.asarray((whole[0, 0] > 0).cpu())

    return segment


def recogniser(model: Pretrained, classes: Sequence[str], rank: int) -> Agrees:
    """CLIP (Radford et al. 2021): whether a class is among the `rank` best of all for a picture."""
    tokenizer, processor = model.tokenizer(), model.image_processor()
    with torch.inference_mode():
        words = tokenizer([TEMPLATE.format(name) for name in classes], padding=True, return_tensors="pt")
        text = model.model.get_text_features(**words.to(model.device)).pooler_output
        text = F.normalize(text, dim=-1)  # [classes,width]

    @torch.inference_mode()
    def agrees(picture: np.ndarray, name: str) -> bool:
        pixels = processor(images=picture, return_tensors="pt", input_data_format="channels_last")
        seen = model.model.get_image_features(**pixels.to(model.device)).pooler_output
        likeness = (F.normalize(seen, dim=-1) @ text.T)[0]  # [classes]
        return bool((likeness > likeness[list(classes).index(name)]).sum() < rank)

    return agrees


def captioner(model: Pretrained) -> Captioner:
    """BLIP (Li et al. 2022), of the middle frame, or Qwen2-VL (Wang et al. 2024), of all of them."""
    tokenizer, processor = model.tokenizer(), model.image_processor()

    @torch.inference_mode()
    def caption(frames: list[np.ndarray]) -> str:
        if model.kind == "blip":
            given: dict[str, Any] = dict(processor(images=frames[len(frames) // 2], return_tensors="pt"))
            start = 0
        else:
            given = dict(processor(images=frames, return_tensors="pt"))
            merged = processor.merge_size**2
            seen = "".join(
                f"<|vision_start|>{'<|image_pad|>' * (int(grid.prod()) // merged)}<|vision_end|>"
                for grid in given["image_grid_thw"]
            )
            text = f"<|im_start|>user\n{seen}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
            given |= dict(tokenizer(text, return_tensors="pt"))
            given["mm_token_type_ids"] = (given["input_ids"] == model.model.config.image_token_id).int()
            start = given["input_ids"].shape[1]
        given = {name: value.to(model.device) for name, value in given.items()}
        out = model.model.generate(**given, max_new_tokens=WORDS, do_sample=False)
        said = tokenizer.decode(out[0, start:], skip_special_tokens=True)
        return re.sub(r"\s+", " ", said).strip()

    return caption
