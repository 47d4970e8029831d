"""How much memory a request takes at its peak: planned before anything is loaded, from shapes alone.

Weights and keys are counted. What a step keeps alive is estimated for the largest of a block's moments, what
decoding keeps for the decoder's widest layers; the allocator's own overhead is SLACK. A test holds the plan
to what a step on the CPU really keeps alive.

Letters: K guidance branches, C concept tokens, T text tokens, S video tokens, D width, A heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...bundle_format.schema import Shapes

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SLACK = 1.1
VAE = "vae"
"""The part whose weights have a dtype of their own."""
SECOND = "transformer_2"
"""The part that is the second of two experts."""
WIDEST = {False: 5, True: 8}
"""Tensors as wide as a Wan decoder's last layers that are there at a time, in Wan2.2 with its shortcuts; a
test holds it to what is so."""
AT_ONCE = (4, 2, 1)
"""How many latent frames a decoder may take a call, the fastest first."""


@dataclass(frozen=True)
class Demand:
    """What decides the memory: the engine's configuration, the shapes, and how it is run.

    model: the manifest's `model`; elements: of the weights by part, the video autoencoder's under "vae";
    graphs: whether steps are replayed as CUDA graphs, whose inputs are held twice; decoded: height and width
    in latents of what the decoder takes at once, None for a whole frame; vae_dtype: of the video autoencoder;
    states: elements of the decoder's causal state; latent_frames: how many the decoder takes a call;
    swapped: whether of two experts one is held at a time; ranks: how many share a step. One of them that
    decodes nothing has no video autoencoder.
    """

    model: Mapping[str, Any]
    shapes: Shapes
    elements: Mapping[str, int]
    dtype: str
    graphs: bool
    decoded: tuple[int, int] | None = None
    vae_dtype: str = "float32"
    states: int = 0
    latent_frames: int = 1
    swapped: bool = False
    ranks: int = 1

    @property
    def experts(self) -> int:
        """How many transformers are held at a time."""
        return 2 if SECOND in self.elements and not self.swapped else 1

    @property
    def captured(self) -> bool:
        """Whether decoding is replayed, too: not where its memory is scarce."""
        return self.graphs and self.latent_frames > 1

    def fastest(self, available: int | None) -> Demand:
        """With both experts and as many latent frames a call as fit into `available` bytes; where it is None,
        with one expert at a time and all frames that help."""
        two = SECOND in self.elements
        if available is None:
            return dataclasses.replace(self, swapped=two, latent_frames=AT_ONCE[0])
        kinds = [(swapped, count) for swapped in (False, True)[: 1 + two] for count in AT_ONCE]
        tries = [dataclasses.replace(self, swapped=swapped, latent_frames=count) for swapped, count in kinds]
        return next((demand for demand in tries if plan(demand)["peak"] <= available), tries[-1])

    def at(self, frames: int, scale: float) -> Demand:
        """For a video of so many latent frames, its sides scaled, in the steps that patches allow."""
        channels, _, height, width = self.shapes.latent
        patch = self.model["transformer"]["patch_size"]
        sides = (
            max(step, int(side * scale) // step * step)
            for side, step in zip((height, width), patch[1:], strict=True)
        )
        latent = (channels, max(patch[0], frames // patch[0] * patch[0]), *sides)
        space = self.shapes.space
        whole = math.prod(self.shapes.latent[2:])
        return dataclasses.replace(
            self,
            states=self.states * latent[2] * latent[3] // whole if self.decoded is None else self.states,
            shapes=dataclasses.replace(
                self.shapes,
                latent=latent,
                frames=1 + (latent[1] - 1) * max(1, self.shapes.frames_per_latent),
                height=latent[2] * space,
                width=latent[3] * space,
            ),
        )


def plan(demand: Demand) -> dict[str, int]:
    """Bytes by what they are for; "peak" is the planned whole, of which only the larger of step and decode
    counts."""
    shapes, model = demand.shapes, demand.model["transformer"]
    size = BYTES[demand.dtype]
    heads, width = model["num_attention_heads"], model["num_attention_heads"] * model["attention_head_dim"]
    concept = demand.model["concept"]
    pictures, given = concept["max_concepts"], concept["given"]
    channels, frames, *sides = shapes.latent
    latent = (frames + (pictures if given == "control" else 0), *sides)
    shown = (latent[0] + (pictures if given == "behind" else 0), *sides)  # by the transformer
    tokens = math.prod(n // p for n, p in zip(shown, model["patch_size"], strict=True))
    if side := concept.get("side"):  # each picture's square
        tokens += pictures * math.prod(side // shapes.space // p for p in model["patch_size"][1:])
    concepts = shapes.concepts * shapes.queries
    rows = -(-shapes.branches * tokens // demand.ranks)  # K*S, or a rank's

    sizes = {VAE: BYTES[demand.vae_dtype]}
    held = {part: n for part, n in demand.elements.items() if part != SECOND or demand.experts > 1}
    weights = sum(n * sizes.get(part, size) for part, n in held.items())
    # the concepts' values may be folded: A*C rows of D instead of C (kernels/absorbed_injection.py)
    folded = heads * concepts if heads * concepts < width + concepts else concepts
    controls = len(model.get("vace_layers") or ())
    keys = (model["num_layers"] + controls) * shapes.branches * width * size
    keys *= 2 * shapes.text_tokens + concepts + folded
    state = 4 * shapes.solver_states * channels * math.prod(latent)

    wide = max(4, size)
    moments = {
        # x, its norm, q, k, v, both rotated, what comes out; with others q, k and v on their way
        "attention": (8 + 6 * (demand.ranks > 1)) * width * size,
        "cross-attention": (5 * width + heads * concepts) * size,
        "feed-forward": (2 * width + 2 * model["ffn_dim"]) * size,
        "sums": width * (3 * size + 3 * wide),  # in plain torch
    }
    step = rows * (max(moments.values()) + 2 * width * size * bool(controls)) + 4 * state  # control, hint
    decode, kept = _decoding(demand) if VAE in demand.elements else (0, 0)
    found = {
        "weights": weights,
        "keys and values": keys * (1 + demand.experts * demand.graphs),
        "step": step,
        "decode": decode + kept,
    }
    found["peak"] = int(SLACK * (weights + found["keys and values"] + state + kept + max(step, decode)))
    return found


def _decoding(demand: Demand) -> tuple[int, int]:
    """While a call of the decoder runs, and for good where it is replayed; an image-to-video base's encoder,
    which runs before the steps, takes about the same.

    Frames in float32, twice; the causal states before and after; WIDEST times what the last layers hold of
    the call's frames, or, of one of blocks, six times its network's width.
    """
    vae, shapes = demand.model["vae"], demand.shapes
    space, whole = shapes.space, shapes.latent[2:]
    area = space**2 * math.prod(min(a, b) for a, b in zip(demand.decoded or whole, whole, strict=True))
    pixels = demand.latent_frames * max(1, shapes.frames_per_latent) * area
    frames = 4 * pixels * 3 * 2
    size = BYTES[demand.vae_dtype]
    states = 2 * size * demand.states
    if vae.get("kind") == "blocks":
        return frames + states + 4 * (pixels * 3 * 2 + 6 * vae["width"] * demand.latent_frames * area // 4), 0
    places = pixels // (vae.get("patch_size") or 1) ** 2
    width = vae.get("decoder_base_dim") or vae["base_dim"]
    widest = size * WIDEST[bool(vae.get("is_residual"))] * places * width
    return frames + states + widest, states if demand.captured else 0


def table(found: Mapping[str, int]) -> str:
    """One line for people."""
    parts = ", ".join(f"{name} {size_of(n)}" for name, n in found.items() if name != "peak")
    return f"planned peak memory {size_of(found['peak'])}: {parts}"


def size_of(count: int) -> str:
    """Bytes as people write them."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def what_fits(demand: Demand, available: int) -> str:
    """What would fit into `available` bytes, in words: narrower numbers, then fewer frames, then smaller."""
    tries: list[tuple[str, Callable[[], Demand]]] = []
    narrow = dataclasses.replace(demand, dtype="bfloat16")
    if demand.dtype != narrow.dtype:
        tries.append(("--dtype bfloat16", lambda: narrow))
    frames = demand.shapes.latent[1]
    for count in (3 * frames // 4, frames // 2, frames // 4):
        if 0 < count < frames:
            tries.append(("", lambda count=count: narrow.at(count, 1.0)))  # type: ignore[misc]
    for scale in (0.75, 0.5, 0.25):
        tries.append(("", lambda scale=scale: narrow.at(max(1, frames // 4), scale)))  # type: ignore[misc]
    for words, make in tries:
        smaller = make()
        if (peak := plan(smaller)["peak"]) <= available:
            s = smaller.shapes
            what = words or f"a bundle of {s.frames} frames of {s.width}x{s.height}, with --dtype bfloat16"
            return f"{what} would fit, with {size_of(peak)}"
    return f"nothing smaller fits: weights alone take {size_of(plan(narrow)['weights'])} in bfloat16"
