"""One forward and one step of the base at full size, against diffusers."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import torch

from conceptmaster.engine.fused import Fusing, fuse, narrow

from . import model
from .card import clocks_in_words
from .job import Job
from .model import (
    Inputs,
    Size,
    build,
    denoise_call,
    diffusers_in_bfloat16,
    errors_of,
    flops_of,
    held_to,
    in_float32,
    relative_l2,
    say_timings,
    step_call,
    their_forward,
    their_step,
    tokens_of,
    too_far,
    twin,
)
from .timing import Call, in_turn


def forward(size: Size, job: Job, high: bool = True) -> None:
    """The base against diffusers: held to float32, then in turn one forward, K = 1, and one step, K = 2.

    diffusers computes the text's keys and values in every forward, ours once per request. All are launched
    kernel by kernel: at this size the GPU is never waiting for that. high: whether the tier of that name is
    there, too.
    """
    base, found, say = dataclasses.replace(size, concepts=0), job.found, job.say
    config, held = base.config, held_to(base)
    found |= {"tokens": tokens_of(config), "flops": sum(flops_of(config, 1).values())}
    found["held_to_float32"] = {"frames": held.frames, "tokens": tokens_of(held)}
    exact = build(config, job.device)
    wide = Inputs.of(held, job.device, 1)
    expected = in_float32(denoise_call(exact, wide))
    say("forward: the reference in float32 is there")
    models = diffusers_in_bfloat16(exact, job)
    plain = models["plain"] = narrow(exact, torch.bfloat16)
    models["ours"] = fuse(twin(plain))
    if high:
        models["ours high"] = fuse(copy.deepcopy(plain), Fusing(tier="high"))

    def calls(given: Inputs, step: bool = False) -> dict[str, Call]:
        their = their_step if step else their_forward
        our = functools.partial(step_call, cached=True) if step else denoise_call
        return {n: (their if n.startswith("diffusers") else our)(net, given) for n, net in models.items()}

    errors: dict[str, Any] = {}
    found["relative_l2"] = errors
    wrong = errors_of(calls(wide.to(torch.bfloat16)), expected, errors)
    for name in (*wrong, *too_far(errors)):
        del models[name]
    judge = found["judged_by"] = "diffusers eager" if "diffusers eager" in models else "plain"
    ours, theirs = errors["ours"], errors[judge]
    numbers = isinstance(ours, float) and isinstance(theirs, float)
    found["lossless"] = numbers and ours <= model.MARGIN * theirs
    verdict = "lossless" if found["lossless"] else "NOT lossless"
    right = numbers and ours <= model.RIGHT * theirs
    if not right:
        verdict += ", so nothing of it is timed"
    say(f"forward, relative L2: ours {ours}, {judge} {theirs}: {verdict}")
    if not right:
        return
    say(f"forward, relative L2: {errors}")
    full = calls(Inputs.of(config, job.device, 1).to(torch.bfloat16))
    apart = found["full_size_apart"] = relative_l2(full["ours"](), full[judge]())
    if not apart <= model.APART * theirs:
        found["lossless"] = False
        say(f"forward: at full size ours is {apart} from {judge}: wrong, so nothing of it is timed")
        return
    say(f"forward: at full size ours is {apart:.2e} from {judge}")
    with job.watch.during(found):
        found["timing"] = in_turn(full, job.rounds, graphs=False, seconds=12)
    say_timings(say, "forward", found["timing"])
    say(f"forward: {clocks_in_words(found['clocks'])}")
    both = calls(Inputs.of(config, job.device, 2).to(torch.bfloat16), step=True)
    both = {name: both[name] for name in ("diffusers eager", "ours", "ours high") if name in both}
    found["step"] = in_turn(both, min(job.rounds, 3), graphs=False, seconds=8)
    say_timings(say, "step of the base", found["step"])
    if "p50_ms" in found["step"].get("ours", {}):
        with job.watch.during(found, "step_clocks"):
            in_turn({"ours": both["ours"]}, 3, graphs=False)
        say(f"step of the base, ours alone: {clocks_in_words(found['step_clocks'])}")
