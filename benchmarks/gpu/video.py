"""From request to mp4 by stage: the shipped model through the pipeline, and Wan2.1's stages one by one.

The first is cold (weights loaded, kernels compiled, the step captured) and then warm. The second has random
weights and no bundle: each stage alone, in the dtype that the torch backend runs it in. What lacks a package
is named, not left out in silence.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from conceptmaster.engine.config import ModelConfig

from ..reports import ROOT, percentiles
from .job import Job
from .model import Size
from .timing import Call, failed, guarded, in_turn, why

REQUEST = ROOT / "examples" / "sprites" / "requests" / "first" / "request.json"


def shipped(job: Job, backends: Iterable[str] = ("torch", "onnxruntime"), steps: int | None = None) -> None:
    """The shipped bundle's videos by stage: torch on the job's device, ONNX Runtime on the CPU beside it."""
    for backend in backends:
        place = job.device if backend == "torch" else "cpu"
        name = f"{backend} on {place}"
        found = job.found[name] = {}
        try:
            _videos(backend, place, job.rounds, steps, found)
            words = f"cold {found['cold_s']['total']:.1f} s, warm {found['warm']['total']['p50_ms']:.1f} ms"
        except Exception as error:  # a package that this machine lacks, each with an error of its own
            found |= failed(error)
            words = found["failed"]
        job.say(f"video, {name}: {words}")


def _videos(backend: str, device: str, rounds: int, steps: int | None, report: dict[str, Any]) -> None:
    import dataclasses

    from conceptmaster import Pipeline
    from conceptmaster.runtime.request import Request

    request = dataclasses.replace(Request.from_json(REQUEST), steps=steps)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    pipeline = Pipeline.from_bundle("sprites", device=device, backend=backend)
    video = pipeline.generate(request)[0]
    report["cold_s"] = {"total": time.perf_counter() - start, **video.seconds, "encode_mp4": _encode(video)}
    stages: dict[str, list[float]] = {}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 2 and time.perf_counter() - begin > VIDEO_SECONDS:
            break
        pipeline._text.cache_clear()  # a caption is encoded once per request
        start = time.perf_counter()
        video = pipeline.generate(request)[0]
        seconds = {"total": time.perf_counter() - start, **video.seconds}
        for stage, value in seconds.items():
            stages.setdefault(stage, []).append(1e3 * value)
    report["warm"] = {stage: percentiles(values) for stage, values in stages.items()}
    if device == "cuda":
        report["peak_bytes"] = torch.cuda.max_memory_allocated()
    plan = getattr(pipeline.backend, "plan", None)
    if plan is not None:
        report["planned_bytes"] = plan


VIDEO_SECONDS = 6.0
"""What warm videos may take, beside two that are always made."""
STAGE_SECONDS = 8.0
"""Without so many no stage is begun."""


def _encode(video: Any) -> float | str:
    """Seconds that the mp4 takes, or why there is none."""
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        try:
            video.save(Path(folder) / "a.mp4")
        except Exception as error:  # without av, or with another one than this was written for
            return why(error)
        return time.perf_counter() - start


def stages(size: Size, job: Job) -> None:
    """Milliseconds of every stage beside the steps, one after the other, each with its peak memory."""
    for name, make in _makers(size.config, job.device):
        found = {"failed": "no time was left"}
        if job.left() >= STAGE_SECONDS:
            found = guarded(functools.partial(_stage, make, job.rounds))
        job.found[name] = found
        job.say(f"stage: {name:30} {found.get('failed') or format(found['p50_ms'], '.2f') + ' ms'}")


def _stage(make: Callable[[], Call], rounds: int) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found = in_turn({"stage": make()}, rounds, graphs=False, seconds=2)["stage"]
    return found | ({"peak_bytes": torch.cuda.max_memory_allocated()} if cuda else {})


def _makers(config: ModelConfig, device: str) -> Iterator[tuple[str, Callable[[], Call]]]:
    """(stage, what builds it with random weights and gives its call)."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    yield "text encoder", functools.partial(_text, config, device, dtype)
    if config.concept.injection != "none":
        yield "image encoder", functools.partial(_image, config, device, dtype)
        yield "Q-Former and DAM", functools.partial(_concepts, config, device, dtype)
    yield "condition", functools.partial(_condition, config, device)
    yield "decode, first latent frame", functools.partial(_decode, config, device, 0)
    yield "decode, each other", functools.partial(_decode, config, device, 1)


def _placed(build: Callable[[], torch.nn.Module], device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Built on the device in its dtype, so that billions of weights are never there in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return build().eval().requires_grad_(False).to(device)  # constants are made on the CPU
    finally:
        torch.set_default_dtype(before)


def _text(config: ModelConfig, device: str, dtype: torch.dtype) -> Call:
    from conceptmaster.engine.encoders import TextEncoder

    model = _placed(lambda: TextEncoder(config.text_encoder), device, dtype)
    ids = torch.ones((1, config.text_tokens), dtype=torch.int64, device=device)
    return lambda: model(ids, ids.bool())


def _image(config: ModelConfig, device: str, dtype: torch.dtype) -> Call:
    from conceptmaster.engine.encoders import ImageEncoder

    model = _placed(lambda: ImageEncoder(config.image_encoder), device, dtype)
    c = config.concept
    pixels = torch.randn(c.max_concepts, 3, c.picture_size, c.picture_size, device=device, dtype=dtype)
    return lambda: model(pixels)


def _concepts(config: ModelConfig, device: str, dtype: torch.dtype) -> Call:
    from conceptmaster.engine.concepts import concept_binder, concept_encoder

    encoder = _placed(lambda: concept_encoder(config), device, dtype)
    binder = _placed(lambda: concept_binder(config), device, dtype)
    c = config.concept
    new = functools.partial(torch.randn, device=device, dtype=dtype)
    pictures = new(c.max_concepts, c.picture_tokens, c.picture_dim)
    label = new(c.max_concepts, c.label_tokens, config.transformer.text_dim)
    mask = torch.ones(label.shape[:2], dtype=torch.bool, device=device)
    return lambda: binder(encoder(pictures), label, mask)


def _condition(config: ModelConfig, device: str) -> Call:
    from conceptmaster.engine.fused import fuse, narrow

    from .model import Inputs, build

    model = fuse(narrow(build(config, device), torch.bfloat16))
    given = Inputs.of(config, device, 2).to(torch.bfloat16)
    return lambda: model.condition(given.text, given.concepts, given.mask)


def _decode(config: ModelConfig, device: str, which: int) -> Call:
    from conceptmaster.engine.vae.wan_decoder import build_vae, streaming_decoders

    first, following = (part.to(device) for part in streaming_decoders(build_vae(config)))
    channels, _, height, width = config.latent_shape
    latents = torch.randn(1, channels, 1, height, width, device=device)
    if which == 0:
        return lambda: first(latents)
    _, *states = first(latents)
    return lambda: following(latents, *states)
