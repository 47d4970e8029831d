"""The command `generate`: it builds a request, the pipeline does the work."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..untrusted import LARGEST_JSON, open_plain, parse_json
from .backends import torchrun
from .bundle_format import DEFAULT
from .workers import on_ray

if TYPE_CHECKING:
    import numpy as np

    from .backends.pytorch.options import TorchOptions
    from .outputs import Outputs
    from .pipeline import Pipeline
    from .request import Request
    from .video import Video
    from .workers.remote import RemotePipeline

GENERATE = """\
Generates a video in which every concept looks like its own picture.

  conceptmaster generate --seed 7 --output out.mp4 --sheet sheet.png \\
      --prompt "a panda on the left jumps and a sunflower on the right grows, in a meadow" \\
      --concept panda examples/pictures/panda.png --concept sunflower examples/pictures/sunflower.png
"""
REQUEST = """\
A request file is JSON; only "prompt" must be there, pictures are found beside the file:
  {"prompt": "a ball in the middle falls down", "concepts": [{"label": "ball", "image": "ball.png"}],
   "negative": "", "steps": 4, "guidance": 1.5, "concept_guidance": null, "solver": "unipc",
   "shift": 3.0, "seed": 7, "samples": 1, "guidance_2": null,
   "boxes": {"ball": {"0": [0.1, 0.1, 0.5, 0.5], "16": [0.1, 0.5, 0.5, 0.9]}}}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `generate`."""
    parser.description, parser.epilog = GENERATE, REQUEST
    what = parser.add_argument_group("what")
    what.add_argument("--prompt", metavar="TEXT", help="the caption: what happens in the video")
    what.add_argument(
        "--concept",
        nargs=2,
        action="append",
        metavar=("LABEL", "IMAGE"),
        default=None,
        help="a thing to show and its picture; repeat for more, each with its own label. Of an "
        "image-to-video bundle: a first frame, a last frame, or references, in this order",
    )
    what.add_argument(
        "--box",
        nargs=2,
        action="append",
        metavar=("LABEL", "X0,Y0,X1,Y1[@FRAME]"),
        help="where a concept is, in fractions of the picture from its top left corner, of a bundle that "
        "takes boxes; repeat for more concepts, and for one that moves: between two frames (counted from 0, "
        "which is meant without one) its box moves evenly",
    )
    what.add_argument(
        "--request",
        metavar="FILE.json",
        help="all of it from a file (-: standard input, pictures are found from here), instead of the two "
        "above; the options below override it",
    )
    what.add_argument(
        "--requests",
        metavar="FILE.jsonl",
        help='a batch: such a request on every line, which may have a "name", too. --output, --sheet and '
        "--frames then hold {name} (left out: the line's number). What an earlier run has made is not made "
        "again",
    )
    what.add_argument("--negative", metavar="TEXT", help="what the video should not be")
    how = parser.add_argument_group("how (left out: the bundle's defaults)")
    how.add_argument(
        "--bundle", metavar="NAME", default=DEFAULT, help=f"shipped bundle or a path ({DEFAULT})"
    )
    how.add_argument("--steps", type=int, metavar="N", help="model evaluations, 1 to 1000")
    how.add_argument("--guidance", type=float, metavar="G", help="how strongly to follow the request")
    how.add_argument(
        "--guidance-2",
        type=float,
        metavar="G",
        help="of a bundle of two experts: scale of the second, for low noise (--guidance, if given)",
    )
    how.add_argument(
        "--concept-guidance",
        type=float,
        metavar="C",
        help="a scale of its own for the concepts, where the bundle has one",
    )
    how.add_argument("--solver", metavar="NAME", help="unipc, unipc_wan, euler or euler_trailing")
    how.add_argument("--shift", type=float, metavar="S", help="above 1: more of the steps at high noise")
    how.add_argument("--seed", type=int, metavar="N", help="the noise; same seed, same video (0)")
    how.add_argument("--noise", metavar="FILE.npy", help="the noise itself, float32 [samples,Cz,F,H,W]")
    how.add_argument(
        "--samples", type=int, metavar="N", help="videos, 1 to 64, with the seeds seed, seed + 1, ... (1)"
    )
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads (one per usable CPU)")
    how.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="of a batch: requests at a time, over one pipeline, or with --ray over a worker each (1)",
    )
    how.add_argument("--device", metavar="NAME", default="cpu", help="cpu, cuda, tensorrt or rtx (cpu)")
    how.add_argument(
        "--backend", metavar="NAME", default="onnxruntime", help="onnxruntime or torch (onnxruntime)"
    )
    how.add_argument(
        "--precision",
        metavar="P",
        help="of the engines for --device tensorrt or rtx: fp32, fp16, bf16 or fp8 (the only one there)",
    )
    how.add_argument(
        "--custom",
        metavar="FILE",
        action="append",
        default=[],
        help="a delta of CustomDiffusion: new words, such as <fox-1>, which the prompt then says; repeatable",
    )
    how.add_argument(
        "--strict",
        action="store_true",
        help="refuse what is otherwise warned of: a label that is not in the caption, words that the bundle "
        "does not know, numbers that it was not made for (`inspect` lists them)",
    )
    add_torch_options(parser.add_argument_group("with --backend torch"))
    on_ray.add_arguments(parser.add_argument_group("of a batch: on the machines of a Ray cluster"))
    out = parser.add_argument_group("output")
    out.add_argument(
        "--output",
        metavar="FILE",
        default="out.mp4",
        help=".mp4, .webm, .webp, .gif, .png (sheet of frames) or .npy; "
        "{seed} becomes the seed, otherwise samples are numbered out-0.mp4, ... (out.mp4)",
    )
    out.add_argument("--sheet", metavar="FILE.png", help="also a contact sheet: pictures, caption, frames")
    out.add_argument(
        "--frames", metavar="FILE.npy", help="also the frames, uint8 [F,H,W,3] or [samples,F,H,W,3]"
    )
    out.add_argument(
        "--scale",
        type=int,
        metavar="N",
        help="enlarge --output N times, 1 to 64 (a video whose smaller side is below 256 pixels: by the "
        "smallest whole number that makes it at least 256; .png and .npy: 1)",
    )
    out.add_argument(
        "--chroma",
        metavar="C",
        help="of .mp4 and .webm: 420, which all players show, or 444, which keeps every colour edge and many "
        "browsers do not show (420)",
    )
    out.add_argument("--json", action="store_true", help="last line on standard output: one JSON object")
    quiet = out.add_mutually_exclusive_group()
    quiet.add_argument("--quiet", action="store_true", help="no progress bar, no text on standard output")
    quiet.add_argument(
        "--progress", action="store_true", help="a progress bar even where there is no terminal"
    )
    out.add_argument("--verbose", action="store_true", help="say which backend is used")


def add_torch_options(group: argparse._ArgumentGroup) -> None:
    """The options of the torch backend, which `torch_options` reads."""
    from .backends.pytorch.options import PARTS

    group.add_argument(
        "--weights",
        metavar="SOURCE",
        help="what the bundle was exported from (where its manifest says; its folder weights/)",
    )
    for name, what in PARTS.items():
        option, why = (
            f"--{name.replace('_', '-')}",
            f"of a base: {what}, if it was exported from single files",
        )
        group.add_argument(option, metavar="FILE", help=why)
    group.add_argument("--adapter", metavar="FILE", help="of a base: concept modules it was exported with")
    lora = group.add_argument("--lora", metavar="FILE", action="append")
    lora.help = "of a base: a LoRA that it was exported with; repeatable"
    scale = group.add_argument("--lora-scale", metavar="S", action="append", type=float)
    scale.help = "what each LoRA is multiplied with (as recorded, or 1)"
    group.add_argument("--lora-2", metavar="FILE", action="append", help="the same of the low-noise expert")
    group.add_argument("--lora-2-scale", metavar="S", action="append", type=float)
    part = group.add_argument("--lora-partial", action="store_true", default=None)
    part.help = "leave out what the base has no modules for (as recorded)"
    group.add_argument("--dtype", metavar="D", help="float32 or bfloat16 (cpu: float32, cuda: bfloat16)")
    way = group.add_argument("--attention", metavar="WAY")
    way.help = "on cuda: pytorch, pytorch-heads-first or flash-attention-3 (the fastest, by measuring)"
    group.add_argument(
        "--vae-dtype",
        metavar="D",
        help="of Wan's video autoencoder: float32; lossy: bfloat16, float16 (float32)",
    )
    group.add_argument("--tier", metavar="T", help="lossless, or high: 8 bits, lossy (lossless)")
    group.add_argument(
        "--skip-guidance",
        type=float,
        metavar="X",
        help="lossy: the last X (0 to 1) of steps unguided (0)",
    )
    group.add_argument(
        "--step-cache", type=float, metavar="X", help="lossy: leave out steps that change less than X (0)"
    )


def torch_options(args: argparse.Namespace) -> TorchOptions | None:
    """The options that were given, None if none was."""
    from .backends.pytorch.options import TorchOptions

    names = [field.name for field in dataclasses.fields(TorchOptions)]
    found = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    return TorchOptions(**given) if given else None


def run(args: argparse.Namespace) -> int:
    """Generates; returns the exit code 0, of a batch 1 if a request failed. Raises what the pipeline
    raises."""
    if args.ray is not None and args.requests is None:
        raise InputError("--ray goes with --requests: one request is a file of one line")
    on_ray.check(args)
    if args.requests is not None:
        from . import batch

        options = torch_options(args)
        how = {name: getattr(args, name) for name in ("backend", "device", "precision", "strict")}
        how |= {} if options is None else dataclasses.asdict(options)
        if args.custom:
            from .custom import hashes

            how["custom"] = hashes(args.custom)
        return batch.run(args, overrides(args), how, lambda: open_batch(args))
    if args.jobs is not None:
        raise InputError("--jobs goes with --requests")
    start = time.perf_counter()
    from .video_file import check_options, enlargement

    request = _request(args)
    outputs = _outputs(args, request)
    suffix = outputs.videos[0].suffix.lower()
    check_options(suffix, args.scale, args.chroma)
    noise = None if args.noise is None else _load_noise(args.noise)
    pipeline = open_pipeline(args)
    shapes = pipeline.manifest.shapes
    scale = enlargement(suffix, shapes.height, shapes.width, args.scale)
    opened = time.perf_counter() - start
    progress = args.progress or (sys.stderr.isatty() and not args.quiet)
    videos = pipeline.generate(request, noise=noise, progress=progress, strict=args.strict)
    writing = time.perf_counter()
    outputs.write(videos, scale, args.chroma)
    seconds = {"open": opened, **_total(videos), "write": time.perf_counter() - writing}
    seconds["total"] = time.perf_counter() - start
    if not args.quiet:
        enlarged = f", enlarged {scale} times" if scale > 1 else ""
        for video, path in zip(videos, outputs.videos, strict=True):
            print(f"{path} (seed {video.seed}{enlarged})")
        print(", ".join(f"{stage} {value:.2f} s" for stage, value in seconds.items()))
    if args.json:
        report = {
            "bundle": pipeline.manifest.name,
            "seed": request.seed,
            "seeds": list(request.seeds),
            "outputs": [str(path) for path in outputs.videos],
            "scale": scale,
            "sheets": [str(path) for path in outputs.sheets],
            "frames": None if outputs.frames is None else str(outputs.frames),
            "warnings": list(videos[0].warnings),
            "seconds": {stage: round(value, 4) for stage, value in seconds.items()},
        }
        print(json.dumps(report))
    return 0


def open_pipeline(args: argparse.Namespace) -> Pipeline:
    """The pipeline that the arguments ask for. Raises what `Pipeline.from_bundle` raises."""
    from .pipeline import Pipeline

    world, gpus = torchrun.world(), args.gpus_per_worker
    if world > 1 and gpus not in (1, world):
        raise InputError(f"torchrun has started {world} ranks, --gpus-per-worker says {gpus}: leave it out")
    if args.backend == "torch" and not args.quiet:  # which memory it plans is worth a line
        logging.getLogger(__name__.partition(".")[0]).setLevel(logging.INFO)  # until the command ends
    return Pipeline.from_bundle(
        args.bundle,
        device=args.device,
        threads=args.threads,
        backend=args.backend,
        options=torch_options(args),
        precision=args.precision,
        gpus=None if world > 1 else gpus,
        custom=args.custom,
    )


def open_batch(args: argparse.Namespace) -> Pipeline | RemotePipeline:
    """What makes a batch: a pipeline here, or workers elsewhere. Raises what `Bundle.open` raises, and
    `Pipeline.from_bundle`."""
    if args.ray is None:
        return open_pipeline(args)
    from .backends import check_choice
    from .bundle_format.find import Bundle
    from .cpus import usable
    from .workers.ray_worker import Gateway
    from .workers.remote import RemotePipeline

    check_choice(args.device, args.threads, args.backend, args.precision, args.gpus_per_worker)
    if torchrun.world() > 1:
        raise InputError("with --ray, workers start their ranks themselves (--gpus-per-worker), not torchrun")
    bundle, count = Bundle.open(args.bundle), args.jobs or 1
    options = worker_options(args) | {"place": str(bundle.folder)}
    options["threads"] = options["threads"] or max(1, usable() // count)
    gateway = Gateway(args.ray, max(usable(), count * options["threads"]), args.verbose)
    workers = on_ray.workers(args, bundle.manifest.name, options, gateway, count)
    return RemotePipeline(bundle, workers, args.step_timeout, gateway.close)


def worker_options(args: argparse.Namespace) -> dict[str, Any]:
    """What a worker opens its bundle with, but the bundle."""
    options = torch_options(args)
    return {
        "device": args.device,
        "backend": args.backend,
        "precision": args.precision,
        "threads": args.threads,
        "gpus": args.gpus_per_worker,
        "custom": [os.path.abspath(path) for path in args.custom],
        "options": None if options is None else dataclasses.asdict(options),
        "verbose": args.verbose,
    }


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a request that options were given for."""
    scales = ("guidance", "guidance_2", "concept_guidance")
    names = ("negative", "steps", *scales, "solver", "shift", "seed", "samples")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.box is not None:
        from .boxes import read

        given["boxes"] = read(args.box)
    return given


def _request(args: argparse.Namespace) -> Request:
    from .request import Concept, Request

    given = overrides(args)
    if args.request is not None:
        if args.prompt is not None or args.concept is not None:
            raise InputError("--request already says what to show: leave out --prompt and --concept")
        asked = _from_standard_input() if args.request == "-" else Request.from_json(args.request)
        return dataclasses.replace(asked, **given)
    if args.prompt is None:
        raise InputError("--prompt or --request is needed (see conceptmaster generate --help)")
    return Request(args.prompt, tuple(Concept(label, image) for label, image in args.concept or ()), **given)


def _from_standard_input() -> Request:
    from .request import Request

    if sys.stdin is None:
        raise InputError("--request -: standard input is closed")
    try:
        data = sys.stdin.buffer.read(LARGEST_JSON + 1)
        if len(data) > LARGEST_JSON:
            raise ValueError(f"is larger than {LARGEST_JSON} bytes")
        return Request.from_data(parse_json(data), Path())
    except ValueError as error:  # InputError is one
        raise InputError(f"the request on standard input: {error}") from None


def _outputs(args: argparse.Namespace, request: Request) -> Outputs:
    """The files to write, checked."""
    from .outputs import Outputs

    outputs = Outputs.of(request, args.output, args.sheet, args.frames)
    read = [c.image for c in request.concepts if isinstance(c.image, (str, Path))]
    given = [path for path in (args.request, args.noise) if path is not None]
    outputs.check_apart([*given, *read])
    return outputs


def _load_noise(name: str) -> np.ndarray:
    import numpy as np

    try:
        open_plain(name).close()  # not a pipe, which would be waited for
        # mapped: a header that lies allocates nothing
        noise = np.load(name, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise InputError(f"cannot read the noise {name!r}: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"the noise {name!r} is not a .npy file of numbers: {error}") from None
    if not isinstance(noise, np.ndarray):
        raise InputError(f"the noise {name!r} is not a .npy file of numbers")
    return noise


def _total(videos: list[Video]) -> dict[str, float]:
    """Seconds by stage, over all samples; the stages before denoising are shared."""
    own = ("denoise", "decode")
    return {
        stage: sum(video.seconds[stage] for video in videos) if stage in own else value
        for stage, value in videos[0].seconds.items()
    }
