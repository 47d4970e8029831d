"""Grounding-DINO, SAM 2, CLIP and captioning models, tiny and random: each against transformers' own way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conceptmaster.errors import WeightsError
from conceptmaster.examples.data import learned
from conceptmaster.examples.data.cli import main
from conceptmaster.examples.data.thresholds import Thresholds

from .small import write_drawn

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "a", "photo", "of", "cat", "ball", "dog", *LETTERS]
WORDS += [f"##{letter}" for letter in LETTERS]
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
WORDS = list(dict.fromkeys(WORDS))
IDS = {word: number for number, word in enumerate([*WORDS, *SPECIAL])}
CLASSES = ["cat", "ball", "dog"]
FRAME = np.random.default_rng(0).integers(0, 256, (72, 96, 3), np.uint8)


def save_tokenizer(folder: Path, end: str = "[SEP]") -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordPiece({word: IDS[word] for word in WORDS}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    if end == "[SEP]":
        around = [(word, IDS[word]) for word in ("[CLS]", "[SEP]")]
        words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    else:
        words.add_special_tokens(SPECIAL)
    names = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "eos_token": end,
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=64 if end == "[SEP]" else 512, **names
    ).save_pretrained(folder)


def make_detector(folder: Path) -> None:
    from transformers import BertConfig, GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig
    from transformers import GroundingDinoImageProcessorPil as Processor

    small: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = BertConfig(vocab_size=len(WORDS), hidden_size=32, max_position_embeddings=64, **small)
    backbone = SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[1] * 4,
        num_heads=[1] * 4,
        window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )
    config = GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=20,
        num_feature_levels=4,
        max_text_len=64,
        fusion_droppath=0.0,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    Processor(size={"shortest_edge": 96, "longest_edge": 128}).save_pretrained(folder)
    save_tokenizer(folder)


def make_clip(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPModel
    from transformers import CLIPImageProcessorPil as Processor

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(WORDS), "max_position_embeddings": 64, "eos_token_id": IDS["[SEP]"]}
    vision = small | {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    Processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    save_tokenizer(folder)


def make_segmenter(folder: Path) -> None:
    from transformers import Sam2Config, Sam2HieraDetConfig, Sam2Model, Sam2VisionConfig

    backbone = Sam2HieraDetConfig(
        hidden_size=8,
        num_attention_heads=1,
        image_size=[64, 64],
        blocks_per_stage=[1] * 4,
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1] * 4,
        window_size_per_stage=[4] * 4,
        global_attention_blocks=[],
        window_positional_embedding_background_size=[4, 4],
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        fpn_hidden_size=32,
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
    )
    prompts = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 32,
        "mlp_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    }
    config = Sam2Config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    Sam2Model(config).save_pretrained(folder)


def make_blip(folder: Path) -> None:
    from transformers import BlipConfig, BlipForConditionalGeneration
    from transformers import BlipImageProcessorPil as Processor

    small = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 16,
    }
    text = small | {
        "vocab_size": len(WORDS),
        "encoder_hidden_size": 32,
        "max_position_embeddings": 128,
        "bos_token_id": IDS["[CLS]"],
        "pad_token_id": 0,
        "eos_token_id": IDS["[SEP]"],
        "sep_token_id": IDS["[SEP]"],
    }
    vision = small | {"image_size": 32, "patch_size": 8}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16, image_text_hidden_size=16)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    Processor(size={"height": 32, "width": 32}).save_pretrained(folder)
    save_tokenizer(folder)


def make_qwen(folder: Path) -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers import Qwen2VLImageProcessorPil as Processor

    text = {
        "vocab_size": len(IDS),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": IDS["<|im_start|>"],
        "eos_token_id": IDS["<|im_end|>"],
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 1,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 2,
        "mlp_ratio": 1,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    ids = {name: IDS[word] for name, word in names.items()}
    Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    ).save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 1024}
    Processor(patch_size=4, merge_size=2, temporal_patch_size=2, size=size).save_pretrained(folder)
    save_tokenizer(folder, "<|im_end|>")


MAKERS = {
    "detector": make_detector,
    "clip": make_clip,
    "segmenter": make_segmenter,
    "blip": make_blip,
    "qwen": make_qwen,
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, make in MAKERS.items():
        make(root / name)
    return {name: str(root / name) for name in MAKERS}


def part(name: str, place: str, **thresholds: float) -> Any:
    model = learned.load(name, place, "cpu")
    (found,) = learned.part(name, model, Thresholds(**thresholds), CLASSES).values()  # type: ignore[arg-type]
    return found


def test_the_detectors_boxes_are_those_of_transformers(places: dict[str, str]) -> None:
    from transformers import GroundingDinoImageProcessorPil, GroundingDinoProcessor, PreTrainedTokenizerFast

    place = places["detector"]
    processor = GroundingDinoProcessor(
        GroundingDinoImageProcessorPil.from_pretrained(place), PreTrainedTokenizerFast.from_pretrained(place)
    )
    inputs = processor(images=FRAME, text="ball. cat.", return_tensors="pt")
    with torch.inference_mode():
        out = learned.load("detector", place, "cpu").model(**inputs)
    theirs = processor.post_process_grounded_object_detection(out, inputs.input_ids, threshold=0.0)[0]
    ours = part("detector", place, box_score=0.0)(FRAME, ["ball", "cat"])
    assert len(ours) == len(theirs["boxes"]) == 20 and {each.label for each in ours} <= {"ball", "cat"}
    wanted = theirs["boxes"].clamp(0, 1).numpy()
    assert np.allclose(sorted(each.box for each in ours), sorted(map(tuple, wanted)), atol=1e-4)
    assert all(each.score <= best + 1e-5 for each, best in zip(ours, theirs["scores"].tolist(), strict=True))
    first = [float(out.logits[0, :, n].sigmoid().max()) for n in (1, 3)]  # [CLS] ball . cat .
    assert max(each.score for each in ours) == pytest.approx(max(first), abs=1e-5)
    assert part("detector", place, box_score=1.0)(FRAME, ["ball", "cat"]) == []


def test_clip_agrees_as_its_own_logits_do(places: dict[str, str]) -> None:
    from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast.from_pretrained(places["clip"])
    texts = words([f"a photo of a {name}" for name in CLASSES], padding=True, return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(places["clip"])(images=FRAME, return_tensors="pt")
    with torch.inference_mode():
        model = learned.load("clip", places["clip"], "cpu").model
        logits = model(**{"input_ids": texts.input_ids, "attention_mask": texts.attention_mask}, **pixels)
    order = logits.logits_per_image[0].argsort(descending=True).tolist()
    for rank in (1, 2, 3):
        agrees = part("clip", places["clip"], clip_rank=rank)
        assert [agrees(FRAME, name) for name in CLASSES] == [n in order[:rank] for n in range(3)]


def test_the_segmenters_mask_is_of_the_frame_and_of_the_box(places: dict[str, str]) -> None:
    segment = part("segmenter", places["segmenter"])
    found = [
        segment(0, FRAME, box) for box in ((0.1, 0.1, 0.5, 0.6), (0.6, 0.4, 0.9, 0.9), (0.1, 0.1, 0.5, 0.6))
    ]
    assert all(mask.shape == (72, 96) and mask.dtype == bool for mask in found)
    assert np.array_equal(found[0], found[2])


def test_captions_are_text(places: dict[str, str]) -> None:
    from transformers import BlipForConditionalGeneration, BlipImageProcessorPil, PreTrainedTokenizerFast

    frames = [FRAME, 255 - FRAME, FRAME]
    said = part("captioner", places["blip"])(frames)
    pixels = BlipImageProcessorPil.from_pretrained(places["blip"])(images=255 - FRAME, return_tensors="pt")
    model = BlipForConditionalGeneration.from_pretrained(places["blip"]).eval()
    out = model.generate(**pixels, max_new_tokens=learned.WORDS, do_sample=False)
    words = PreTrainedTokenizerFast.from_pretrained(places["blip"])
    assert said == " ".join(words.decode(out[0], skip_special_tokens=True).split())
    several, one = (part("captioner", places["qwen"])(some) for some in (frames, frames[:1]))
    assert isinstance(several, str) and "image_pad" not in several and isinstance(one, str)


@pytest.mark.parametrize("name", ["captioner", "detector", "segmenter", "clip"])
def test_a_model_of_the_wrong_kind_is_named_before_any_work(
    name: str, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(b"")
    wrong = places["clip" if name != "clip" else "blip"]
    with pytest.raises(WeightsError, match="is needed here"):
        learned.check(name, wrong)
    arguments = ["pairs", "--videos", str(videos), "--output", str(tmp_path / "o"), f"--{name}", wrong]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    kind = "clip" if name != "clip" else "blip"
    assert f"is a model of the kind '{kind}'" in error and len(error.splitlines()) == 1


def test_a_run_with_all_of_them(places: dict[str, str], tmp_path: Path) -> None:
    """Random models know nothing: with every rule off, what they say reaches the report, and nothing
    fails."""
    videos, output = tmp_path / "videos", tmp_path / "pairs"
    write_drawn(videos, 10, 12)
    (videos / "1.txt").unlink()
    models = [f"--{name}={places[name]}" for name in ("detector", "segmenter", "clip")]
    off = [
        "--least-area=0",
        "--box-score=0",
        "--nms=0",
        "--clip-rank=120",
        "--least-seen=0",
        "--least-mask=0",
    ]
    arguments = [
        "pairs",
        "--videos",
        str(videos),
        "--output",
        str(output),
        *models,
        f"--captioner={places['qwen']}",
    ]
    assert main([*arguments, *off]) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["models"].keys() == {"captioner", "detector", "segmenter", "clip"}
    assert report["models"]["clip"]["files"].keys() == {"config.json", "model.safetensors"}
    assert report["without"] == ["nouns: the taxonomy's words; no --spacy was given"]
    reached = {each["video"]: each["stage"] for each in report["dropped"]}
    assert reached["0.mp4"] in ("boxes", "masks") or report["pairs"]
    captions = [json.loads(path.read_text()) for path in output.glob("stages/1-*/captions.json")]
    assert [shot["caption_by"] for each in captions for shot in each["shots"]] in ([], ["captioner"])
