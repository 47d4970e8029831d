"""The commands `conceptmaster export` and `conceptmaster verify`, for the root's cli.py. Their help needs no
PyTorch: what does is imported when they run."""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..runtime.backends.pytorch.options import PARTS
from ..runtime.bundle_format.find import Bundle
from ..runtime.bundle_format.place import check_place
from ..runtime.bundle_format.schema import SOLVERS
from ..runtime.progress import shown

if TYPE_CHECKING:
    from ..engine.checkpoints.source import Choices, Source
    from .verify import Row

EXPORT = """\
Turns weights into a bundle, which `conceptmaster generate` runs without PyTorch. Every graph is compared
with the PyTorch module that it came from before the bundle is put into place.

  conceptmaster export weights/ --output my-bundle
  conceptmaster export weights/ --output my-bundle-int8 --int8
  conceptmaster export preset:tiny --output tiny        # random weights, to try things
  conceptmaster export Wan-AI/Wan2.1-T2V-1.3B-Diffusers --output wan --size 832x480 --frames 81

The last is a base: a folder in diffusers' layout (transformer/, vae/, text_encoder/, tokenizer/,
scheduler/), or the name of one in the Hugging Face Hub; Wan's original folder; or single files as ComfyUI has
them, safetensors (16 bits, fp8, scaled fp8) or GGUF, in a folder or named one by one, which also replaces a
part of any base:

  conceptmaster export --transformer wan2.1_t2v_1.3B_fp16.safetensors --vae wan_2.1_vae.safetensors \\
      --text-encoder umt5_xxl_fp8_e4m3fn_scaled.safetensors --output wan --size 832x480 --frames 81

With a CLIP in image_encoder/ it takes concepts, which show once it has a trained --adapter; without one its
bundle makes videos from captions alone.
An image-to-video base takes its pictures itself: a first frame, a first and a last one, or, of SkyReels-A2,
up to three references; Wan2.2's I2V-A14B a first frame and perhaps a last one, its TI2V-5B a first frame or
none; VACE and Phantom as many references as --references says, Bernini-R up to as many, SkyReels-V3 1 to 4,
MAGREF 1 to 8. A base with a LoRA for few steps, and a bundle without guidance, which takes half the time:

  conceptmaster export wan/ --output fast --lora few-steps.safetensors --solver euler --steps 4 --guidance 1
"""
VERIFY = """\
Runs every graph of a bundle in ONNX Runtime and in PyTorch, on the same inputs, and prints how far apart the
two are. Exit code 1 when a graph is further off than its tolerance.

  conceptmaster verify stickers
  conceptmaster verify my-bundle --source weights/
"""


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `conceptmaster export`."""
    parser.description = EXPORT
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        help="a folder with model.safetensors, vae.safetensors and tokenizer.json, a base, or preset:NAME; "
        "none where --transformer, --text-encoder and --vae are given",
    )
    parser.add_argument("--output", metavar="BUNDLE", required=True, help="the folder to write")
    parser.add_argument("--int8", action="store_true", help="linear layers in int8: faster on CPUs")
    parser.add_argument(
        "--branches",
        type=int,
        choices=(1, 2, 3),
        metavar="K",
        help="guidance branches: 1 none, 2 one scale, 3 a scale of its own for the concepts "
        "(2, of Phantom and SkyReels-V3 3; 1 where the default guidance is 1, which is none)",
    )
    parser.add_argument(
        "--tile",
        type=_size,
        metavar="WxH",
        help="decode in tiles of so many pixels, which overlap: less memory for large videos, but not the "
        "same frames to the last bit",
    )
    parser.add_argument(
        "--text-tokens",
        type=int,
        metavar="T",
        help="graphs for prompts of fewer than T tokens, which take less time for the same video (as many as "
        "the model reads, padding and all: 512 for Wan)",
    )
    parser.add_argument(
        "--boxes",
        action="store_true",
        help="let requests say where their concepts are: outside of its box nothing of the video sees a "
        "concept; needs no other weights",
    )
    parser.add_argument(
        "--no-graphs", action="store_true", help="manifest and tokenizer alone, for --backend torch: seconds"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a bundle that is there, if it holds nothing else"
    )
    defaults = parser.add_argument_group("defaults of requests")
    defaults.add_argument("--solver", choices=SOLVERS)
    defaults.add_argument("--steps", type=int, metavar="N", help="of the solver")
    defaults.add_argument("--shift", type=float, metavar="S", help="of its time")
    defaults.add_argument("--guidance", type=float, metavar="G", help="scale; 1 is none")
    defaults.add_argument(
        "--guidance-2",
        type=float,
        metavar="G",
        help="of the second of two experts (--guidance, if that is given)",
    )
    defaults.add_argument(
        "--concept-guidance", type=float, metavar="C", help="of the pictures, where there are three branches"
    )
    base = parser.add_argument_group("of a base")
    base.add_argument(
        "--size",
        type=_size,
        metavar="WxH",
        help="of the video, in pixels (832x480; of TI2V-5B 1280x704, of SkyReels-V3 1280x720)",
    )
    base.add_argument("--frames", type=int, metavar="N", help="of the video (81; of TI2V-5B, … 121)")
    base.add_argument(
        "--references",
        type=int,
        metavar="R",
        help="of VACE and Phantom: how many pictures each request has (1); of Bernini-R at most (4)",
    )
    base.add_argument(
        "--reference-side",
        type=int,
        metavar="PIXELS",
        help="of Bernini-R: what the longer side of a picture is at most, which is never enlarged (848)",
    )
    _add_base_arguments(base)
    _add_merged_arguments(parser.add_argument_group("merged into the weights"))
    _add_output_arguments(parser)


def run_export(args: argparse.Namespace) -> int:
    """Writes a bundle; returns the exit code: 0, 1 failed, 2 wrong input."""
    check_place(Path(os.path.abspath(args.output)), args.overwrite)
    from ..engine.checkpoints.source import open_source
    from .bundle import write_bundle

    choices = replace(_choices(args), size=args.size, frames=args.frames, references=args.references)
    choices = replace(choices, reference_side=args.reference_side)
    source = _with_defaults(open_source(args.source, choices), args)
    if args.boxes:
        source.model.mask_by("boxes")
    rows = write_bundle(
        source,
        args.output,
        precision="int8" if args.int8 else "fp32",
        branches=args.branches or ((source.sampling.branches or 2) if source.sampling.guided else 1),
        tile=args.tile,
        text_tokens=args.text_tokens,
        with_graphs=not args.no_graphs,
        overwrite=args.overwrite,
        progress=shown(args.quiet),
    )
    _report(args, rows, {"bundle": args.output})
    return 0


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `conceptmaster verify`."""
    parser.description = VERIFY
    parser.add_argument("bundle", metavar="BUNDLE", help="shipped bundle or a path")
    parser.add_argument(
        "--source",
        metavar="SOURCE",
        help="the weights it was exported from (where its manifest says)",
    )
    _add_base_arguments(parser.add_argument_group("of a base"))
    _add_merged_arguments(parser.add_argument_group("merged into the weights"))
    _add_output_arguments(parser)


def run_verify(args: argparse.Namespace) -> int:
    """Compares a bundle with its source; returns the exit code: 0, 1 too far off, 2 wrong input."""
    bundle = Bundle.open(args.bundle).with_graphs()
    from ..runtime.backends.pytorch.weights import open_weights
    from .verify import verify

    source = open_weights(bundle, args.source, _choices(args), "--source")
    rows = verify(bundle, source, shown(args.quiet))
    _report(args, rows, {"bundle": args.bundle})
    return 0 if all(row.ok for row in rows) else 1


def _size(text: str) -> tuple[int, int]:
    """WxH in pixels."""
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write width x height like 832x480")
    return int(found[1]), int(found[2])


def _with_defaults(source: Source, args: argparse.Namespace) -> Source:
    """`source` with the defaults that are given."""
    names = ("solver", "steps", "shift", "guidance", "guidance_2", "concept_guidance")
    named = {name: getattr(args, name) for name in names}
    given = {name: value for name, value in named.items() if value is not None}
    if "guidance" in given:  # alone, it is of both experts
        given.setdefault("guidance_2", None)
    return replace(source, sampling=replace(source.sampling, **given))


def _choices(args: argparse.Namespace) -> Choices:
    from ..engine.checkpoints.source import SECOND, Choices, loras_of

    loras = loras_of(args.lora, tuple(args.lora_scale), args.lora_partial)
    loras += loras_of(args.lora_2, tuple(args.lora_2_scale), args.lora_partial, SECOND)
    if args.lora_partial and not loras:
        raise InputError("--lora-partial without a LoRA: --lora FILE says which")
    parts = {name: path for name in PARTS if (path := getattr(args, name)) is not None}
    choices = Choices(adapter=args.adapter, revision=args.revision, loras=loras, parts=parts)
    return replace(choices, tokenizer=args.tokenizer, custom=tuple(args.custom))


def _add_base_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--adapter", type=Path, metavar="FILE", help="trained concept modules, safetensors")
    group.add_argument("--revision", metavar="R", help="branch, tag or commit in the Hugging Face Hub")
    for name, what in PARTS.items():
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, dest=name, type=Path, metavar="FILE", help=f"{what}, in a file of its own")
    group.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="tokenizer.json or spiece.model of UMT5"
    )


def _add_merged_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--lora", type=Path, action="append", default=[], metavar="FILE",
        help="merged into the transformer, safetensors; repeatable",
    )  # fmt: skip
    group.add_argument(
        "--lora-scale", type=float, action="append", default=[], metavar="S",
        help="what a LoRA is multiplied with, one for each in their order (1)",
    )  # fmt: skip
    group.add_argument(
        "--lora-2", type=Path, action="append", default=[], metavar="FILE",
        help="merged into the low-noise expert of two, where --lora is the high-noise one's; repeatable",
    )  # fmt: skip
    group.add_argument("--lora-2-scale", type=float, action="append", default=[], metavar="S")
    group.add_argument(
        "--lora-partial", action="store_true",
        help="merge what fits of LoRAs that are for modules, too, which the base does not have, as those of "
        "image-to-video models are for a text-to-video one, and list the rest",
    )  # fmt: skip
    group.add_argument(
        "--custom", type=Path, action="append", default=[], metavar="FILE",
        help="a delta of CustomDiffusion, with its new words; repeatable. `generate --custom` hands one in "
        "beside a bundle",
    )  # fmt: skip


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _report(args: argparse.Namespace, rows: list[Row], about: dict[str, str]) -> None:
    from .verify import table

    if args.json:
        print(json.dumps(about | {"graphs": [asdict(row) | {"ok": row.ok} for row in rows]}))
    else:
        print(table(rows) if rows else f"{about['bundle']}: a manifest and a tokenizer, no graphs")
