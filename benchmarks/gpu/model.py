"""The transformer at full size on a GPU, ours and diffusers': built, called, and held to float32.

Weights are random; nothing here depends on their values. What is timed (forward.py, ladder.py, further.py)
has been held to float32 first, on a clip of HELD_FRAMES, because float32 attention over all 32,760 tokens
takes many seconds (`full` does it): a forward may be called lossless when its relative L2 error is not above
that of diffusers' own in bfloat16 (of the engine's plain one, where diffusers is not installed), and nothing
is timed that is further off than RIGHT times that. At full size it has to agree with diffusers' as far.

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

from conceptmaster.engine.blocks import Block
from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.dit import ConceptDiT
from conceptmaster.engine.fused import narrow
from conceptmaster.engine.presets import preset
from conceptmaster.engine.seen import Seen
from conceptmaster.engine.step import DenoiseStep
from conceptmaster.kernels import self_attention as attending
from conceptmaster.kernels.common import in_plain_torch
from conceptmaster.kernels.cross_attention import attention
from conceptmaster.runtime.backends.pytorch.stepper import Stepper

from .case import fastest_first
from .job import Job
from .timing import Call, Say, failed

MARGIN = 1.0
"""How much of diffusers' own error ours may be, to be called lossless."""
RIGHT = 1.25
"""How much of it ours may be, to be timed at all: what is wrong is off by far more."""
APART = 2.0
"""How far two models that are right may be from each other, in errors of one of them."""
HELD_FRAMES = 21
STATES = 4


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
    """What a forward of branches with the same latents, the last of which sees the concepts, computes, keys
    and values of text and concepts being there: by kind. The first block's self-attention and all before the
    text are one branch's."""
    t, tokens = config.transformer, tokens_of(config)
    row = 2.0 * tokens  # a multiplication and an addition for each token
    rows, shared = t.num_layers * branches * row, (branches - 1) * row
    concepts = config.concept.concept_tokens if config.concept.injection != "none" else 0
    return {
        "self-attention": (rows - shared) * 2 * tokens * t.width,
        "linear": rows * (6 * t.width**2 + 2 * t.width * t.ffn_dim) - shared * 5 * t.width**2,
        "text": rows * 2 * config.text_tokens * t.width,
        "concepts": t.num_layers * row * (2 * t.width**2 + 2 * concepts * t.width) if concepts else 0.0,
    }


def build(config: ModelConfig, device: str, seed: int = 0) -> ConceptDiT:
    """A transformer in float32, every weight random: also those that start at zero."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = ConceptDiT(config)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model.eval().requires_grad_(False).to(device)  # tables are made on the CPU wherever the rest is


def twin(model: ConceptDiT) -> ConceptDiT:
    """The same weights in another module, whose blocks can be replaced."""
    found = copy.copy(model)
    found.__dict__["_modules"] = dict(model._modules)
    found.blocks = nn.ModuleList(model.blocks)
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


def plainly(call: Call) -> Call:
    """The call without any kernel of this project."""

    def run() -> Any:
        with in_plain_torch():
            return call()

    return run


def attention_that_is_right(say: Say, tokens: int = 32760) -> dict[str, Any]:
    """The lossless attention at the model's size, held to float64: {"order", "relative_l2"}.

    What fails or is wrong is taken out of the order, for ours and for all rivals alike, until one is right.
    """
    g = torch.Generator(device="cuda").manual_seed(2)
    new = functools.partial(torch.randn, generator=g, device="cuda", dtype=torch.bfloat16)
    q, k, v = (new(1, tokens, 12, 128) for _ in range(3))
    rows = torch.arange(0, tokens, tokens // 64, device="cuda")
    exact = attention(q[:, rows].double(), k.double(), v.double())
    found: dict[str, Any] = {"relative_l2": {}}
    while True:
        first = attending.FASTEST[0].name
        try:
            error = relative_l2(attending.self_attention(q, k, v, attending.PYTORCH)[:, rows], exact)
        except Exception as raised:  # of cuDNN, which says so when it is too late to take another
            error = failed(raised)["failed"]
        found["relative_l2"][first] = error
        say(f"lossless attention, {first} first: relative L2 {error}")
        if (isinstance(error, float) and error < 1e-2) or len(attending.FASTEST) == 1:
            return found | {"order": [backend.name for backend in attending.FASTEST]}
        del attending.FASTEST[0]


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
    return theirs.eval().requires_grad_(False).to(model.proj_out.weight.device)


def relative_l2(found: Tensor, exact: Tensor) -> float:
    """Of a whole result."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def held_to(size: Size) -> ModelConfig:
    """What is held to float32: the clip's first frames."""
    return dataclasses.replace(size, frames=min(size.frames, HELD_FRAMES)).config


def in_float32(call: Call) -> Any:
    """The call's result in plain PyTorch, with nothing rounded to fewer bits on the way."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with in_plain_torch():
            return call()
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def diffusers_in_bfloat16(exact: ConceptDiT, job: Job) -> dict[str, Any]:
    """{"diffusers eager": its transformer with the weights of `exact`}, or {} and the reason in the job."""
    try:
        return {"diffusers eager": narrow(diffusers_model(exact), torch.bfloat16)}
    except Exception as error:  # not installed, or not for the packages that are
        job.found["no_diffusers"] = failed(error)["failed"]
        job.say(f"without diffusers: {job.found['no_diffusers']}")
        return {}


def errors_of(calls: dict[str, Call], expected: Tensor, errors: dict[str, Any]) -> list[str]:
    """Puts relative L2 errors of what the calls give into `errors`; the names of those that fail, whose
    reason is there instead. Raises DeviceLost."""
    wrong = []
    for name, call in calls.items():
        try:
            result = call()
            errors[name] = relative_l2(result[1] if isinstance(result, tuple) else result, expected)
        except Exception as error:  # of the tier `high` on a GPU without fp8, or of a compiler
            errors[name] = failed(error)["failed"]
            wrong.append(name)
    return wrong


NOTHING_ALIKE = 0.5
"""From this relative L2 error on a rung is wrong, even one in 8 bits."""


def too_far(errors: dict[str, Any]) -> list[str]:
    """The names of those that are wrong."""
    return [n for n, error in errors.items() if isinstance(error, float) and not error < NOTHING_ALIKE]


def their_forward(model: Any, given: Inputs) -> Call:
    """diffusers' forward, with the fastest attention."""
    time = given.time.expand(len(given.latents))
    return fastest_first(lambda: model(given.latents, time, given.text, return_dict=False)[0])


def their_step(model: Any, given: Inputs) -> Call:
    """As diffusers' pipeline does a step, with both branches in one batch: guidance, then Euler's update;
    gives the next latents [Cz,F,H,W]."""
    forward = their_forward(model, given)

    def step() -> Tensor:
        without, guided = forward().float()  # [Cz,F,H,W] each
        return given.latents[0].float() - 0.02 * (without + 2.5 * (guided - without))

    return step


def _conditions(
    model: ConceptDiT, given: Inputs
) -> Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Keys and values, and {"concept_mask": …} where there must be one. As the torch backend does it: fused
    blocks are given nothing of the concepts that nobody sees."""
    mask, concepts, partly = given.mask, given.concepts, True
    if not isinstance(model.blocks[0], Block):
        seen = Seen.of(mask.cpu(), model.config)
        mask, concepts, partly = seen.mask.to(mask.device), seen.tokens(concepts), seen.partly
    return lambda: (model.condition(given.text, concepts, mask), {"concept_mask": mask} if partly else {})


def denoise_call(model: ConceptDiT, given: Inputs) -> Call:
    """Our forward, with keys and values that are there already."""
    kv, masked = _conditions(model, given)()
    return lambda: model.denoise(given.latents, given.time, kv, masked.get("concept_mask"))


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
    stepper = Stepper(DenoiseStep(model))
    inputs = {"state": state, "time": given.time, "guidance": guidance, "coefficients": coefficients}
    conditions = _conditions(model, given)
    kept = conditions() if cached else None

    def step() -> tuple[Tensor, Tensor]:
        kv, masked = conditions() if kept is None else kept
        return stepper._step(**inputs, **masked, **kv)

    return step


def say_timings(say: Say, what: str, timing: dict[str, dict[str, Any]]) -> None:
    """A line for each of the timings."""
    for name, entry in timing.items():
        words = entry.get("failed") or f"{entry['p50_ms']:9.2f} ms"
        gain = f"  {entry['gain']:.2f}×" if "gain" in entry else ""
        say(f"{what}: {name:40} {words}{gain}")
