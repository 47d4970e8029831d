"""The transformer at full size on a GPU: a forward and a step against diffusers, the ladder, and scaling.

Weights are random; nothing here depends on their values. What is timed has been held to float32 first: a
forward may be called lossless when its relative L2 error is not above that of diffusers' own in bfloat16
(of the engine's plain one, where diffusers is not installed), and nothing is timed if it is not.

Letters: K guidance branches, M solver states, C concept tokens, T text tokens, S video tokens, D width.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.dit import ConceptDiT
from conceptmaster.engine.fused import Fusing, fuse, narrow
from conceptmaster.engine.presets import preset
from conceptmaster.runtime.backends.torch_step import Stepper

from .gpu_timing import Call, in_turn, why

MARGIN = 1.0
"""How much of diffusers' own error ours may be, to be called lossless."""
STATES = 4
COMPILE = "max-autotune-no-cudagraphs"


@dataclass(frozen=True)
class Size:
    """A video, and the model that makes it: `preset` at so many frames of so many pixels, with concepts."""

    preset: str = "wan2.1-1.3b"
    frames: int = 81
    height: int = 480
    width: int = 832
    concepts: int = 4

    @property
    def config(self) -> ModelConfig:
        """Without concepts, the base alone, as diffusers has it."""
        config = preset(self.preset)
        injection = "standalone" if self.concepts else "none"
        concept = dataclasses.replace(config.concept, max_concepts=max(1, self.concepts), injection=injection)
        transformer = dataclasses.replace(config.transformer, position_channels=0)
        return dataclasses.replace(
            config,
            concept=concept,
            transformer=transformer,
            frames=self.frames,
            height=self.height,
            width=self.width,
        )


SMALL = Size("tiny", 5, 32, 32, 2)
"""What a CPU runs in the tests."""


def tokens_of(config: ModelConfig) -> int:
    """S: video tokens."""
    patch = config.transformer.patch_size
    return math.prod(n // p for n, p in zip(config.latent_shape[1:], patch, strict=True))


def flops_of(config: ModelConfig, branches: int) -> dict[str, float]:
    """What a forward computes, keys and values of text and concepts being there: by kind."""
    t, tokens = config.transformer, tokens_of(config)
    rows = 2.0 * t.num_layers * branches * tokens  # a multiplication and an addition each
    concepts = config.concept.concept_tokens if config.concept.injection != "none" else 0
    return {
        "self-attention": rows * 2 * tokens * t.width,
        "linear": rows * (6 * t.width**2 + 2 * t.width * t.ffn_dim),
        "text": rows * 2 * config.text_tokens * t.width,
        "concepts": rows * (2 * t.width**2 + 2 * concepts * t.width) if concepts else 0.0,
    }


def build(config: ModelConfig, device: str, seed: int = 0) -> ConceptDiT:
    """A transformer in float32, every weight random: also those that start at zero."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = ConceptDiT(config)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model.eval().requires_grad_(False)


def twin(model: ConceptDiT) -> ConceptDiT:
    """The same weights in another module, whose blocks can be replaced."""
    found = copy.copy(model)
    found.__dict__["_modules"] = dict(model._modules)
    return found


@dataclass(frozen=True)
class Inputs:
    """Random latents [K,Cz,F,H,W], time [1], text [K,T,Dt], concept tokens [N,Q,Dc] and mask [K,N]."""

    latents: Tensor
    time: Tensor
    text: Tensor
    concepts: Tensor
    mask: Tensor

    @classmethod
    def of(cls, config: ModelConfig, device: str, branches: int) -> Inputs:
        """In float32; the last branch alone sees the concepts."""
        g = torch.Generator(device=device).manual_seed(1)
        new = functools.partial(torch.randn, generator=g, device=device)
        c = config.concept
        mask = torch.zeros(branches, c.max_concepts, dtype=torch.bool, device=device)
        mask[-1] = c.injection != "none"
        return cls(
            new(1, *config.latent_shape).expand(branches, -1, -1, -1, -1),
            torch.full((1,), 600.0, device=device),
            new(branches, config.text_tokens, config.transformer.text_dim),
            new(c.max_concepts, c.tokens_per_concept, c.width),
            mask,
        )

    def to(self, dtype: torch.dtype) -> Inputs:
        """Latents, text and concepts in another dtype."""
        low = {name: getattr(self, name).to(dtype) for name in ("latents", "text", "concepts")}
        return dataclasses.replace(self, **low)


def fastest_first(call: Call) -> Call:
    """The call with PyTorch's attention in the order cuDNN, flash, memory-efficient, plain."""
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]

    def run() -> Any:
        with sdpa_kernel(order, set_priority=True):
            return call()

    return run


def compiled(model: Any) -> Any:
    """The model with its blocks compiled; all have one code, so it is compiled once."""
    if torch.cuda.is_available():
        for block in model.blocks:
            block.compile(dynamic=False, mode=COMPILE)
    return model


def diffusers_model(model: ConceptDiT) -> Any:
    """diffusers' transformer with the weights of `model`, a base alone. Raises ImportError without it."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    c = model.config.transformer
    names = [
        *("patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels"),
        *("text_dim", "freq_dim", "ffn_dim", "num_layers", "cross_attn_norm", "eps", "rope_max_seq_len"),
    ]
    with torch.device(model.proj_out.weight.device):
        theirs = WanTransformer3DModel(**{name: getattr(c, name) for name in names})
    theirs.load_state_dict(model.state_dict(), strict=True)
    return theirs.eval().requires_grad_(False)


def relative_l2(found: Tensor, exact: Tensor) -> float:
    """Of a whole result."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def forward(size: Size, device: str, rounds: int, say: Callable[[str], object]) -> dict[str, Any]:
    """The base against diffusers: held to float32, then in turn one forward, K = 1, and one step, K = 2.

    diffusers computes the text's keys and values in every forward, ours once per request.
    """
    config = dataclasses.replace(size, concepts=0).config
    exact = build(config, device)
    wide = Inputs.of(config, device, 1)
    torch.set_float32_matmul_precision("highest")
    expected = exact.denoise(wide.latents, wide.time, _conditions(exact, wide), wide.mask)
    report: dict[str, Any] = {"tokens": tokens_of(config), "flops": sum(flops_of(config, 1).values())}
    theirs: dict[str, Any] = {}
    try:
        theirs["diffusers eager"] = narrow(diffusers_model(exact), torch.bfloat16)
        theirs["diffusers compiled"] = compiled(copy.deepcopy(theirs["diffusers eager"]))
    except ImportError as error:
        report["no_diffusers"] = why(error)
    plain = narrow(exact, torch.bfloat16)
    ours = {
        "plain": plain,
        "ours": fuse(twin(plain)),
        "ours compiled": compiled(fuse(twin(plain))),
        "ours high": fuse(copy.deepcopy(plain), Fusing(tier="high")),
    }
    low = wide.to(torch.bfloat16)
    calls = {name: _their_forward(model, low) for name, model in theirs.items()}
    calls |= {name: _denoise(model, low) for name, model in ours.items()}
    errors = report["relative_l2"] = errors_of(calls, expected)
    judge = report["judged_by"] = "diffusers eager" if "diffusers eager" in errors else "plain"
    held = [errors["ours"], errors[judge]]
    numbers = all(isinstance(error, float) for error in held)
    report["lossless"] = numbers and held[0] <= MARGIN * held[1]
    verdict = "lossless" if report["lossless"] else "NOT lossless, so nothing of it is timed"
    say(f"forward, relative L2: ours {held[0]}, {judge} {held[1]}: {verdict}")
    if report["lossless"]:
        report["timing"] = in_turn(calls, rounds)
        _say_timings(say, "forward", report["timing"])
        both = Inputs.of(config, device, 2).to(torch.bfloat16)
        calls = {name: _their_step(model, both) for name, model in theirs.items()}
        calls |= {name: step_call(model, both, True) for name, model in ours.items()}
        report["step"] = in_turn(calls, rounds)
        _say_timings(say, "step of the base", report["step"])
    return report


def errors_of(calls: dict[str, Call], expected: Tensor) -> dict[str, Any]:
    """Relative L2 errors of what the calls give; one that fails is dropped from `calls`, its reason kept."""
    found: dict[str, Any] = {}
    for name in list(calls):
        try:
            result = calls[name]()
            found[name] = relative_l2(result[1] if isinstance(result, tuple) else result, expected)
        except Exception as error:  # of the tier `high` on a GPU without fp8, or of a compiler
            found[name] = why(error)
            del calls[name]
    return found


def _their_forward(model: Any, given: Inputs) -> Call:
    time = given.time.expand(len(given.latents))
    return fastest_first(lambda: model(given.latents, time, given.text, return_dict=False)[0])


def _their_step(model: Any, given: Inputs) -> Call:
    """As diffusers' pipeline does a step, with both branches in one batch: guidance, then Euler's update."""
    forward = _their_forward(model, given)

    def step() -> Tensor:
        without, guided = forward().float()  # [Cz,F,H,W] each
        return given.latents[0].float() - 0.02 * (without + 2.5 * (guided - without))

    return step


def _conditions(model: ConceptDiT, given: Inputs) -> dict[str, Tensor]:
    return model.condition(given.text, given.concepts, given.mask)


def _denoise(model: ConceptDiT, given: Inputs) -> Call:
    kv = _conditions(model, given)
    return lambda: model.denoise(given.latents, given.time, kv, given.mask)


def step_call(model: ConceptDiT, given: Inputs, cached: bool) -> Call:
    """One whole step, K branches, guidance and update in it; gives (next state, velocity).

    cached: with keys and values that are there already, as in every request of this engine.
    """
    device, branches = given.latents.device, len(given.mask)
    state = torch.zeros(STATES, *given.latents.shape[1:], device=device)
    state[0] = given.latents[0]
    coefficients = torch.eye(STATES, STATES + 1, device=device)
    coefficients[0, -1] = -0.02
    guidance = torch.tensor([-1.5, 2.5] if branches == 2 else [1.0], device=device)
    stepper = Stepper(model, given.text.dtype)
    inputs = {"state": state, "time": given.time, "concept_mask": given.mask}
    inputs |= {"guidance": guidance, "coefficients": coefficients}
    kept = _conditions(model, given) if cached else None
    return lambda: stepper._step(**inputs, **(_conditions(model, given) if kept is None else kept))


def ladder(size: Size, device: str, rounds: int, say: Callable[[str], object]) -> dict[str, Any]:
    """A step with concepts, K = 2, from plain PyTorch up: every rung's error against float32 and its gain.

    Rungs up to "CUDA graph" are launched one kernel at a time, and timed so.
    """
    config = size.config
    exact = build(config, device)
    wide = Inputs.of(config, device, 2)
    low = wide.to(torch.bfloat16)
    torch.set_float32_matmul_precision("highest")
    expected = step_call(exact, wide, True)()[1]
    plain = narrow(exact, torch.bfloat16)
    fused = fuse(twin(plain))
    launched = {
        "eager": step_call(plain, low, False),
        "fused kernels": step_call(fused, low, False),
        "condition cache": step_call(fused, low, True),
    }
    replayed = {
        "CUDA graph": step_call(fused, low, True),
        "compile": step_call(compiled(fuse(twin(plain))), low, True),
        "high: 8-bit attention, fp8 layers": step_call(
            fuse(copy.deepcopy(plain), Fusing(tier="high")), low, True
        ),
    }
    errors = errors_of(launched, expected) | errors_of(replayed, expected)
    right = {name: isinstance(e, float) and math.isfinite(e) for name, e in errors.items()}
    numbers = right["eager"] and right["fused kernels"]
    ok = numbers and errors["fused kernels"] <= MARGIN * errors["eager"]
    report: dict[str, Any] = {"relative_l2": errors, "ok": ok, "branches": 2, "concepts": size.concepts}
    if not ok:
        say("the ladder is wrong: nothing of it is timed")
        return report
    timing = in_turn(launched, rounds, graphs=False) | in_turn(replayed, rounds)
    before = None
    for name in [*launched, *replayed]:
        entry = timing[name]
        if "p50_ms" in entry:
            entry["gain"] = 1.0 if before is None else before / entry["p50_ms"]
            before = entry["p50_ms"]
    report["timing"] = timing
    report["profile"] = profile(launched["condition cache"])
    _say_timings(say, "step", timing)
    return report


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


def scaling(sizes: list[Size], device: str, rounds: int, out_of_time: Callable[[], bool]) -> dict[str, Any]:
    """A replayed step at other sizes, beside what the first one's rate and the operations predict."""
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    for size in sizes:
        config = size.config
        name = f"{size.preset} {size.width}x{size.height}x{size.frames}, {size.concepts} concepts"
        if out_of_time():
            left.append(name)
            continue
        flops = sum(flops_of(config, 2).values())
        row: dict[str, Any] = {"name": name, **dataclasses.asdict(size), "tokens": tokens_of(config)}
        try:
            given = Inputs.of(config, device, 2).to(torch.bfloat16)
            call = step_call(fuse(narrow(build(config, device), torch.bfloat16)), given, True)
            row |= in_turn({"step": call}, rounds)["step"] | {"flops": flops}
        except torch.OutOfMemoryError as error:
            row["failed"] = why(error)
        rows.append(row)
        first = rows[0]
        if "p50_ms" in first:
            row["predicted_ms"] = first["p50_ms"] * flops / first["flops"]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return {"rows": rows, "left_out": left}


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


def _say_timings(say: Callable[[str], object], what: str, timing: dict[str, dict[str, Any]]) -> None:
    for name, entry in timing.items():
        words = entry.get("failed") or f"{entry['p50_ms']:9.2f} ms"
        gain = f"  {entry['gain']:.2f}×" if "gain" in entry else ""
        say(f"{what}: {name:40} {words}{gain}")
