"""The parts `sprites`, `whole` and `high`: the shipped model, and a Wan2.1 base of 1.3B with random weights,
from the files of weights to the file of the video.

Each is made as a user makes it: `conceptmaster export --no-graphs` writes a bundle, `conceptmaster generate
--backend torch` runs it. Then it is made without this project's kernels: a video whose latents are further
from that than rounding takes them is wrong, and so is one of the sprites that is not what a CPU makes.
"""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conceptmaster.errors import MissingDependency

from ...reports import ROOT
from ..job import Job
from .base import Base
from .command_line import CommandFailed, conceptmaster
from .making import Ordered, make

SPRITES = ROOT / "examples" / "sprites"
REQUEST = SPRITES / "requests" / "first" / "request.json"
LEAST_DB = 40.0
"""PSNR of the sprites' frames, bfloat16 on a GPU to float32 on a CPU; on a CPU bfloat16 has 49
(benchmarks/results/lossy.json)."""
MOST_APART = 5e-2
"""Relative L2 of the latents of two ways to compute the same in bfloat16, after four steps. A forward of
either is 0.011 from float32."""
RANKS = (2, 4, 8)
"""How many GPUs make a request together."""
PROMPT = "a ball and a cat move from left to right over a green meadow while a drum and a kite stand still"
PICTURES = {
    "ball": ROOT / "examples" / "pictures" / "ball.png",
    "cat": ROOT / "examples" / "pictures" / "cat.png",
    "drum": SPRITES / "requests" / "first" / "1.png",
    "kite": SPRITES / "requests" / "first" / "2.png",
}


def sprites(job: Job, folder: Path) -> None:
    """The shipped model end to end on the job's device by the torch backend, then by ONNX Runtime: with its
    CUDA provider and on the CPU, where these are there."""
    bundle = folder / "sprites"
    if not bundle.exists():
        seconds = conceptmaster(_export(SPRITES / "weights", bundle), max(30.0, job.left()))
        job.found["export_s"] = seconds
    common = ["--request", str(REQUEST), "--bundle", str(bundle), "--weights", str(SPRITES / "weights")]
    common += ["--backend", "torch"]
    steps = ("--steps", "2") if job.small else ()
    frames, exact = folder / "frames.npy", folder / "exact.npy"
    ours = [
        Ordered("cold", (*_out(folder, "sprites"), "--frames", str(frames), *steps)),
        *(Ordered(f"warm {n}", (*_out(folder, "sprites"), *steps)) for n in (1, 2, 3)),
    ]
    title = f"torch on {job.device}"
    make(title, [*common, "--device", job.device], ours, job)
    reference = Ordered("cold", ("--output", str(exact), *steps))
    make("torch on cpu, float32", [*common, "--device", "cpu", "--dtype", "float32"], [reference], job)
    found = job.found[title]
    if not (frames.exists() and exact.exists()):
        return  # no time was left
    found["psnr_db"] = decibels = psnr(np.load(frames), np.load(exact))
    job.say(f"sprites: {decibels:.1f} dB from what the CPU makes in float32, {LEAST_DB:.0f} are the least")
    if not decibels >= LEAST_DB:
        found["wrong"] = f"{decibels:.1f} dB from what the CPU makes"
    _onnxruntime(job, folder, steps)


def _onnxruntime(job: Job, folder: Path, steps: tuple[str, ...]) -> None:
    common = ["--request", str(REQUEST), "--bundle", "sprites", "--backend", "onnxruntime"]
    videos = [Ordered(name, (*_out(folder, "sprites"), *steps)) for name in ("cold", "warm 1", "warm 2")]
    for device in ("cuda", "cpu"):
        title = f"onnxruntime on {device}"
        try:
            make(title, [*common, "--device", device], videos, job)
        except CommandFailed as error:  # without the wheel or the bundle's graphs, which are not needed here
            job.found[title] = {"missing": str(error)}
            job.say(f"{title}: missing: {error}")


@dataclass(frozen=True)
class Way:
    """A way to make a video of the base. bundle: the name of what `export` writes with these defaults;
    options: of `generate`; needs: seconds that the first video takes on an H100, roughly, with its bundle;
    spare: those that a second one leaves to the parts that follow; plain: it is also made without this
    project's kernels."""

    name: str
    bundle: str
    defaults: tuple[str, ...]
    options: tuple[str, ...] = ()
    needs: float = 60.0
    spare: float = 0.0
    plain: bool = False


def _ways(small: bool) -> tuple[Way, Way]:
    """Few steps without guidance, and many with it."""
    few, many = ("2", "3") if small else ("4", "50")
    unguided = ("--solver", "euler", "--steps", few, "--guidance", "1")
    guided = ("--solver", "unipc", "--steps", many, "--guidance", "5")
    return (
        Way(f"{few} steps", "few", unguided, needs=60.0, plain=True),
        Way(f"{many} steps, guided", "many", guided, needs=110.0, spare=200.0),
    )


def whole(job: Job, base: Base) -> None:
    """The base end to end, cold and warm: few steps without guidance, then many with it."""
    for way in _ways(job.small):
        _make(way, job, base)


def high(job: Job, base: Base) -> None:
    """The same in the tier `high`, decoded in 16 bits."""
    for way in _ways(job.small):
        tier = ("--tier", "high", "--vae-dtype", "float16")
        _make(replace(way, name=f"{way.name}, high", options=tier, plain=False, spare=60.0), job, base)


def ranks(job: Job, base: Base) -> None:
    """The base's guided video on one GPU, then on 2, 4 and 8 together, of those that are there: frames held
    to those of one, and seconds."""
    there = 2 if job.small else torch.cuda.device_count()
    if there < 2:
        raise MissingDependency("there is one GPU: what several make together was not measured")
    steps = ("--steps", "2" if job.small else "10")
    way = replace(_ways(job.small)[1], options=steps)
    arguments = _prepared(way, job, base, job.found.setdefault("bundle", {}))
    one = base.folder / "frames-1.npy"
    for count in (1, *(n for n in RANKS if n <= there)):
        frames = base.folder / f"frames-{count}.npy"
        own = (*_out(base.folder, "video"), "--frames", str(frames), "--gpus-per-worker", str(count))
        title = f"{count} GPU{'s' if count > 1 else ''}"
        make(title, arguments, [Ordered("cold", own), Ordered("warm", own)], job)
        if not (one.exists() and frames.exists()):
            return  # no time was left
        decibels = job.found[title]["psnr_db"] = psnr(np.load(frames), np.load(one))
        job.say(f"ranks: {title} {decibels:.1f} dB from one, {LEAST_DB:.0f} are the least")
        if not decibels >= LEAST_DB:
            job.found[title]["wrong"] = f"{decibels:.1f} dB from what one GPU makes"


def _make(way: Way, job: Job, base: Base) -> None:
    """A bundle of the base and its videos, as far as there is time."""
    found: dict[str, Any] = job.found.setdefault(way.name, {})
    needs = 0.0 if job.small else way.needs
    if job.left() < needs:
        found["left_out"] = f"no time was left: {job.left():.0f} s, {needs:.0f} are needed"
        job.say(f"{way.name}: {found['left_out']}")
        return
    arguments = _prepared(way, job, base, found)
    own = tuple(_out(base.folder, "video"))
    videos = [Ordered("cold", own, needs), Ordered("warm", own, spare=0.0 if job.small else way.spare)]
    if way.plain:
        videos.append(Ordered("plain", own, plain=True))
    made = make(way.name, arguments, videos, job)
    if way.plain:
        _hold_to_plain(found, made["plain"] if "plain" in made else {}, job)


def _prepared(way: Way, job: Job, base: Base, found: dict[str, Any]) -> list[str]:
    """The arguments of `generate`, whose bundle and request are there."""
    base.write(job)
    bundle = base.folder / f"bundle-{way.bundle}"
    if not bundle.exists():
        arguments = _export(base.weights, bundle, "--adapter", str(base.adapter), *base.size, *way.defaults)
        found["export_s"] = conceptmaster(arguments, max(60.0, job.left()))
        job.say(f"{way.name}: export --no-graphs took {found['export_s']:.1f} s")
    request = base.folder / "request.json"
    concepts = [{"label": label, "image": str(path)} for label, path in PICTURES.items()]
    concepts = concepts[: base.config.concept.max_concepts]
    request.write_text(json.dumps({"prompt": PROMPT, "concepts": concepts, "seed": 7}), "utf-8")
    arguments = ["--request", str(request), "--bundle", str(bundle), "--weights", str(base.weights)]
    return [
        *arguments,
        "--adapter",
        str(base.adapter),
        "--backend",
        "torch",
        "--device",
        job.device,
        *way.options,
    ]


def _hold_to_plain(found: dict[str, Any], plain: dict[str, Any], job: Job) -> None:
    """Notes where a video is wrong, or was not made a second time to tell."""
    apart = plain.get("latents_from_first")
    if apart is None:
        reason = plain.get("failed") or plain.get("left_out") or "its process ended before"
        found["unchecked"] = f"not made without this project's kernels: {reason}"
    elif not apart <= MOST_APART:
        found["wrong"] = f"latents {apart:.1e} from those without our kernels, {MOST_APART:.0e} is allowed"
    for kind in ("unchecked", "wrong"):
        if kind in found:
            job.say(f"whole: {kind}: {found[kind]}")


def _export(weights: Path, bundle: Path, *more: str) -> list[str]:
    return ["export", str(weights), "--output", str(bundle), "--no-graphs", "--quiet", *more]


def _out(folder: Path, name: str) -> list[str]:
    """As an mp4 where av is installed, else as the frames alone."""
    suffix = "mp4" if importlib.util.find_spec("av") else "npy"
    return ["--output", str(folder / f"{name}.{suffix}")]


def psnr(found: np.ndarray, exact: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of frames, uint8 both; infinite where they are the same."""
    square = float(((found.astype(np.float64) - exact) ** 2).mean())
    return 10 * math.log10(255**2 / square) if square else math.inf
