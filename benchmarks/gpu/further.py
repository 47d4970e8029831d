"""What else is measured of the transformer: compiled, at full size in float32, at other sizes, by kernels."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.fused import fuse, narrow

from .case import COMPILE_MODE
from .job import Job
from .model import (
    SMALL,
    Inputs,
    Size,
    build,
    denoise_call,
    diffusers_in_bfloat16,
    errors_of,
    flops_of,
    in_float32,
    relative_l2,
    say_timings,
    step_call,
    their_forward,
    tokens_of,
    twin,
)
from .timing import Call, failed, in_turn

TOO_FAR = 5e-2
"""Relative L2 between a model and the same one compiled."""
COMPILING = 15.0
"""Seconds without which no model is compiled."""


def compiled(model: Any, mode: str = COMPILE_MODE) -> Any:
    """The model with its blocks compiled; all have one code, so it is compiled once."""
    if torch.cuda.is_available():
        for block in model.blocks:
            block.compile(dynamic=False, mode=mode)
    return model


def compiled_rivals(size: Size, job: Job, mode: str = COMPILE_MODE) -> None:
    """torch.compile of diffusers' forward and of ours, K = 1, in turn with both as they are.

    What is compiled is held to the same model as it is: a wrong one is not timed.
    """
    config, found = dataclasses.replace(size, concepts=0).config, job.found
    exact = build(config, job.device)
    given = Inputs.of(config, job.device, 1).to(torch.bfloat16)
    found |= {"mode": mode, "compile_s": {}, "relative_l2": {}}
    makers: dict[str, Callable[[], Call]] = {}
    theirs = diffusers_in_bfloat16(exact, job).get("diffusers eager")
    if theirs is not None:
        makers["diffusers"] = lambda: their_forward(copy.deepcopy(theirs), given)
        makers["diffusers compiled"] = lambda: their_forward(compiled(theirs, mode), given)
    plain = narrow(exact, torch.bfloat16)
    makers["ours"] = lambda: denoise_call(fuse(twin(plain)), given)
    makers["ours compiled"] = lambda: denoise_call(compiled(fuse(twin(plain)), mode), given)
    calls: dict[str, Call] = {}
    results: dict[str, Tensor] = {}
    for name, make in makers.items():
        if name.endswith("compiled") and job.left() < COMPILING:
            found["relative_l2"][name] = "no time was left"
            continue
        try:
            call, start = make(), time.perf_counter()
            result = results[name] = call()
            apart = relative_l2(result, results[name.removesuffix(" compiled")])
            found["relative_l2"][name] = apart
            if name.endswith("compiled"):
                found["compile_s"][name] = time.perf_counter() - start
            if apart < TOO_FAR:
                calls[name] = call
            job.say(
                f"compiled: {name}, {time.perf_counter() - start:.1f} s, relative L2 to eager {apart:.1e}"
            )
        except Exception as raised:  # of a compiler
            found["relative_l2"][name] = failed(raised)["failed"]
            job.say(f"compiled: {name} FAILED: {found['relative_l2'][name]}")
    found["timing"] = in_turn(calls, max(2, job.rounds), graphs=False, seconds=6)
    say_timings(job.say, "compiled", found["timing"])


def full(size: Size, job: Job) -> None:
    """The forward's errors against float32 at full size, K = 1: ours and diffusers'."""
    config = dataclasses.replace(size, concepts=0).config
    exact = build(config, job.device)
    wide = Inputs.of(config, job.device, 1)
    expected = in_float32(denoise_call(exact, wide))
    low = wide.to(torch.bfloat16)
    calls = {name: their_forward(theirs, low) for name, theirs in diffusers_in_bfloat16(exact, job).items()}
    plain = narrow(exact, torch.bfloat16)
    calls |= {"plain": denoise_call(plain, low), "ours": denoise_call(fuse(twin(plain)), low)}
    errors = job.found["relative_l2"] = {}
    errors_of(calls, expected, errors)
    job.say(f"full size, relative L2: {errors}")


def profiled(size: Size, job: Job) -> None:
    """Which kernels a step of ours spends its time in."""
    call = _step(size.config, job.device)
    call()
    job.found["step"] = profile(call)


def profile(call: Call, most: int = 15) -> list[dict[str, Any]]:
    """Where the time goes: the kernels that take most of it, by name, in milliseconds of one call."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    cuda = torch.cuda.is_available()
    with profiling(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        call()
        if cuda:
            torch.cuda.synchronize()
    spent = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = sorted(found.key_averages(), key=lambda row: -getattr(row, spent))[:most]
    return [{"kernel": r.key[:120], "calls": r.count, "ms": getattr(r, spent) / 1e3} for r in rows]


def scaling(sizes: list[Size], job: Job, least: Callable[[int], float]) -> None:
    """A step at other sizes, beside what the first one's rate and the operations predict; adds rows to those
    that are there.

    least: of the number of rows that are there, the seconds without which no further one is begun.
    """
    rows = job.found.setdefault("rows", [])
    missed = job.found.setdefault("left_out", [])
    for size in sizes:
        config = size.config
        name = f"{size.preset} {size.width}x{size.height}x{size.frames}, {size.concepts} concepts"
        if job.left() < least(len(rows)):
            missed.append(name)
            continue
        flops = sum(flops_of(config, 2).values())
        row: dict[str, Any] = {"name": name, **dataclasses.asdict(size), "tokens": tokens_of(config)}
        rows.append(row)
        try:
            step = {"step": _step(config, job.device)}
            row |= in_turn(step, job.rounds, graphs=False, seconds=4)["step"] | {"flops": flops}
        except Exception as error:  # out of memory, above all
            row |= failed(error)
        first = rows[0]
        if "p50_ms" in first:
            row["predicted_ms"] = first["p50_ms"] * flops / first["flops"]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        job.say(
            f"scaling: {name:44} {row.get('failed') or row['p50_ms']}, predicted {row.get('predicted_ms')} ms"
        )


def _step(config: ModelConfig, device: str) -> Call:
    """A step of ours with fused kernels, K = 2."""
    model = fuse(narrow(build(config, device), torch.bfloat16))
    return step_call(model, Inputs.of(config, device, 2).to(torch.bfloat16), True)


def scaling_sizes(small: bool) -> list[Size]:
    """The whole one first: concepts from 4 to 0, then frames, then pixels, then the larger model."""
    if small:
        return [SMALL, dataclasses.replace(SMALL, concepts=0), dataclasses.replace(SMALL, frames=9)]
    whole = Size()
    return [
        *(dataclasses.replace(whole, concepts=n) for n in (4, 0, 2, 1, 3)),
        *(dataclasses.replace(whole, frames=n) for n in (41, 21)),
        dataclasses.replace(whole, height=720, width=1280),
        dataclasses.replace(whole, preset="wan2.1-14b"),
    ]
