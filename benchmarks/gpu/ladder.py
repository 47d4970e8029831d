"""A step with concepts, from plain PyTorch up, rung by rung."""

from __future__ import annotations

import copy

import torch

from conceptmaster.engine.fused import Fusing, fuse, narrow

from . import model
from .case import fastest_first
from .job import Job
from .model import (
    Inputs,
    Size,
    build,
    errors_of,
    held_to,
    in_float32,
    plainly,
    say_timings,
    step_call,
    tokens_of,
    too_far,
    twin,
)
from .timing import Call, in_turn


def ladder(size: Size, job: Job, high: bool = True) -> None:
    """A step with concepts, K = 2, from plain PyTorch up: every rung's error against float32 and its gain.

    "eager" has the attention that PyTorch takes by itself. Rungs up to "CUDA graph" are launched one kernel
    at a time, and timed so. high: whether the tier of that name is a rung.
    """
    config, held, found, say = size.config, held_to(size), job.found, job.say
    found |= {"branches": 2, "concepts": size.concepts, "ok": False}
    found["held_to_float32"] = {"frames": held.frames, "tokens": tokens_of(held)}
    exact = build(config, job.device)
    wide = Inputs.of(held, job.device, 2)
    expected = in_float32(step_call(exact, wide, True))[1]
    say("ladder: the reference in float32 is there")
    plain = narrow(exact, torch.bfloat16)
    fused = fuse(twin(plain))
    eight = fuse(copy.deepcopy(plain), Fusing(tier="high")) if high else None

    def rungs(given: Inputs) -> tuple[dict[str, Call], dict[str, Call]]:
        launched = {
            "eager": plainly(step_call(plain, given, False)),
            "fastest attention": fastest_first(plainly(step_call(plain, given, False))),
            "fused kernels": step_call(fused, given, False),
            "condition cache": step_call(fused, given, True),
        }
        replayed = {"CUDA graph": step_call(fused, given, True)}
        if eight is not None:
            replayed["high: fp8 layers"] = step_call(eight, given, True)
        return launched, replayed

    errors = found["relative_l2"] = {}
    launched, replayed = rungs(wide.to(torch.bfloat16))
    wrong = errors_of(launched | replayed, expected, errors)
    wrong += too_far(errors)
    judge = found["judged_by"] = "fastest attention" if "eager" in wrong else "eager"
    numbers = all(isinstance(errors[name], float) for name in (judge, "fused kernels"))
    right = numbers and errors["fused kernels"] <= model.RIGHT * errors[judge]
    found["ok"] = numbers and errors["fused kernels"] <= model.MARGIN * errors[judge]
    say(f"ladder, relative L2: {errors}")
    if not right:
        say("the ladder is wrong: nothing of it is timed")
        return
    launched, replayed = rungs(Inputs.of(config, job.device, 2).to(torch.bfloat16))
    for name in wrong:
        launched.pop(name, None)
        replayed.pop(name, None)
    found["timing"] = in_turn(launched, job.rounds, graphs=False, seconds=14)
    say_timings(say, "step", found["timing"])
    found["timing"] |= in_turn(replayed, job.rounds, seconds=8)
    before = None
    for entry in found["timing"].values():
        if "p50_ms" in entry:
            entry["gain"] = 1.0 if before is None else before / entry["p50_ms"]
            before = entry["p50_ms"]
    say_timings(say, "step", found["timing"])
