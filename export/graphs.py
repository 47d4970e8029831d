"""The graphs that a model is exported as: for each its module, named inputs and outputs, and sample inputs.

Which graphs there are says runtime/bundle_format/graph_list.py, what they compute engine/step.py.

Letters: K guidance branches, N concepts, P picture tokens, Q tokens per concept, C = N*Q, T text tokens,
L label tokens, F H W latent frames, height, width, A heads, E head width, M solver states, Cz latent
channels, Cg channels of the conditioned frames, Dt text width, Dc concept width, f video frames of
one latent frame.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..engine.checkpoints.lazy_weights import faked, stored_weights
from ..engine.concept_config import ENCODER_INPUTS, PATCH
from ..engine.concepts import VisualOnly
from ..engine.config import ModelConfig
from ..engine.model import ConceptMaster
from ..engine.references import AS_TOKENS
from ..engine.step import condition_names, graph_modules
from ..kernels.cross_attention import padding_bias
from ..runtime.bundle_format.graph_list import (
    BASE,
    CONCEPTS,
    EACH_STEP,
    FIRST_FRAME,
    FRAMES_ALONE,
    IMAGE_TO_VIDEO,
    LATER_FRAMES,
    REFERENCES,
    TEXT_OR_IMAGE,
    Graph,
    condition_of,
    graphs_of,
)
from ..runtime.bundle_format.schema import TensorSpec

if TYPE_CHECKING:
    from ..engine.vae.wan_decoder import VAE

Sample = dict[str, Tensor]


@dataclass(frozen=True)
class GraphSpec:
    """One graph: `module(*inputs)` gives the outputs, in the order of `inputs` and `outputs`.

    sample(seed) makes realistic inputs, name to tensor, in the order of `inputs`; the same for the same seed.
    external: the weights go into a file beside the graph, whatever their number.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sample: Callable[[int], Sample]
    external: bool = False

    def run(self, sample: Sample) -> Sample:
        """The module's outputs for `sample`, name to tensor: what the exported graph is held to."""
        with torch.inference_mode():
            outputs = self.module(*sample.values())
        found = (outputs,) if isinstance(outputs, Tensor) else outputs
        return dict(zip((spec.name for spec in self.outputs), found, strict=True))


def graph_specs(
    model: ConceptMaster,
    vae: VAE,
    *,
    branches: int = 2,
    solver_states: int = 4,
    config: ModelConfig | None = None,
    tile: tuple[int, int] | None = None,
    whole_text: int | None = None,
    seeing: int = 1,
) -> list[GraphSpec]:
    """Every graph of `model` and `vae`, in the order in which a request runs them.

    branches: K, 1 to 3; solver_states: M; config: the model's for another video or fewer text tokens;
    tile: height and width, in latents, of what the decoder takes at once, None for all of a frame;
    whole_text: None, or the model's own number of text tokens, which those of `config` stand for: then one of
    them stands for all padding; seeing: how many branches, the last ones, have an injector: the last alone
    sees concepts (runtime/guidance.py), but older bundles have it in all. Both modules must be in evaluation
    mode and float32. Of an image-to-video base the picture tokens are the concept tokens. Where weights are
    on disk all are external.
    """
    config = config or model.config
    shapes, samples = (
        _Samples(model, vae, config, branches, solver_states, tile, whole_text, seeing) for _ in range(2)
    )
    external = bool(stored_weights(model))
    if external:  # a model that is not in memory is too large to be run for its shapes
        with faked(model) as mode, mode:
            specs = _specs(shapes)
    else:
        specs = _specs(shapes)
    return [replace(spec, sample=getattr(samples, spec.name), external=external) for spec in specs]


def _specs(samples: _Samples) -> list[GraphSpec]:
    """The specs by what `samples` gives; each graph's sample is the method of its name."""
    concept = samples.model.config.concept
    kinds = {"none": BASE, "clean": TEXT_OR_IMAGE} | dict.fromkeys(AS_TOKENS, REFERENCES)
    kind = kinds.get(concept.given, FRAMES_ALONE)
    if concept.takes_pictures:
        kind = CONCEPTS if concept.has_modules else IMAGE_TO_VIDEO
    specs = []
    for graph in graphs_of(kind, samples.config.latent_shape[1], len(samples.model.experts())):
        sample = getattr(samples, graph.name)
        inputs, outputs = (
            tuple(_tensor_spec(name, tensor) for name, tensor in side.items())
            for side in (sample(0), samples.outputs(graph))
        )
        specs.append(GraphSpec(graph.name, samples.modules[graph.name].eval(), inputs, outputs, sample))
    return specs


def _tensor_spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


class _Samples:
    """Realistic inputs: each graph's come out of the modules before it, so that weights which expect each
    other's statistics get them. Some concepts are there and some are padded; the last branch alone sees
    concepts."""

    def __init__(
        self,
        model: ConceptMaster,
        vae: VAE,
        config: ModelConfig,
        branches: int,
        solver_states: int,
        tile: tuple[int, int] | None,
        whole_text: int | None,
        seeing: int,
    ) -> None:
        self.model, self.config = model, config
        self.decoded = tile or config.latent_shape[2:]
        self.branches, self.solver_states = branches, solver_states
        self.whole_text = whole_text
        self.longest = config.text_tokens - (whole_text is not None)  # of a text, in tokens
        injected = seeing if config.concept.injection == "standalone" else None
        self.modules = graph_modules(model, vae, whole_text is not None, injected)
        self.upstream = functools.lru_cache(4)(self._upstream)
        self.conditions = functools.lru_cache(4)(self._conditions)

    def text_encoder(self, seed: int) -> Sample:
        """One string of any length that fits."""
        g = torch.Generator().manual_seed(seed)
        length = torch.randint(1, self.longest + 1, (1,), generator=g)
        ids, mask = self._tokens(length, self.config.text_tokens, g)
        return {"token_ids": ids, "token_mask": mask}

    def image_encoder(self, seed: int) -> Sample:
        """Pictures of smooth colours; zeros in the padded places, as the pipeline has them."""
        g = torch.Generator().manual_seed(seed)
        c = self.config.concept
        coarse = torch.randn(c.max_concepts, 3, 4, 4, generator=g)
        pixels = nn.functional.interpolate(coarse, size=(c.picture_size,) * 2, mode="bilinear")
        pixels = pixels + 0.2 * torch.randn(pixels.shape, generator=g)
        return {"pixels": torch.where(self._present(seed)[:, None, None, None], pixels, 0.0)}

    def qformer(self, seed: int) -> Sample:
        """Picture tokens of `image_encoder`'s sample, and what else the encoder reads."""
        return self._kept(seed, "picture_tokens", *ENCODER_INPUTS.get(self.config.concept.encoder, ()))

    def dam(self, seed: int) -> Sample:
        """Visual queries, and labels of all lengths; a padded place has one meaningless token."""
        labels = () if isinstance(self.model.dam, VisualOnly) else ("label_text", "label_mask")
        return self._kept(seed, "visual_queries", *labels)

    def condition(self, seed: int) -> Sample:
        """K strings, all concept tokens, and which branch sees which concept."""
        return self._kept(seed, "text", "concept_tokens", "concept_mask")

    condition_2 = condition

    def denoise(self, seed: int) -> Sample:
        """A state in the middle of a video. Of the solver's rows one is a plain step and one is the velocity
        alone, so that an error in the velocity shows whatever the state is."""
        return self._step("denoise", self.config.boundary or 0.0, 1.0, seed)

    def denoise_2(self, seed: int) -> Sample:
        """The same below the boundary."""
        return self._step("denoise_2", 0.0, self.config.boundary or 1.0, seed)

    def _step(self, graph: str, low: float, high: float, seed: int) -> Sample:
        """A sample of a step at a time of low to high, in 0..1."""
        g = torch.Generator().manual_seed(seed + 2)
        states = self.solver_states
        scales = torch.cat((torch.ones(1), 1.0 + 2.0 * torch.rand(self.branches - 1, generator=g)))
        guidance = scales - torch.cat((scales[1:], torch.zeros(1)))  # [K], sums to one
        coefficients = torch.randn(states, states + 1, generator=g)
        coefficients[0] = torch.tensor([1.0, *[0.0] * (states - 1), -0.1])
        coefficients[-1] = torch.tensor([*[0.0] * states, 1.0])
        return {
            "state": self.state(seed),
            "time": (low + torch.rand(1, generator=g) * (high - low)) * 1000,
            **self._kept(seed, "concept_mask"),
            "guidance": guidance,
            "coefficients": coefficients,
            **({"given": self.conditioned(seed)} if self.config.conditioning_channels else {}),
            **({"boxes": self.boxes(seed)} if self.config.concept.mask == "boxes" else {}),
            **self.conditions(condition_of(graph), seed),
            **({} if self.whole_text is None else self._kept(seed, "text_bias")),
        }

    def encode_first(self, seed: int) -> Sample:
        """A picture of smooth colours in -1..1; of a size of its own with what is picture."""
        if self.config.concept.side is None:
            return {"frames": self._frames(seed, 1)}
        side, space = self.config.concept.side, self.config.vae["scale_factor_spatial"]
        area = torch.zeros(1, 1, 1, side // space, side // space)
        height, width = self._own_size(seed)
        area[..., :height, :width] = 1.0
        return {"frames": self._frames(seed, 1, (side, side)), "area": area}

    def _own_size(self, seed: int) -> tuple[int, int]:
        """Height and width in latents, whole patches, of a picture of its own size."""
        drawn = random.Random(seed)  # numbers that the host knows, also where tensors have no values
        most = (self.config.concept.side or 0) // PATCH
        whole = PATCH // self.config.vae["scale_factor_spatial"]
        return drawn.randint(1, most) * whole, drawn.randint(1, most) * whole

    def encode(self, seed: int) -> Sample:
        """Another picture, in each frame, and the state that the first left."""
        count = self.config.vae["scale_factor_temporal"]
        state = self._first("encode_first", seed)[1]
        return {"frames": self._frames(seed + 1, 1).expand(count, -1, -1, -1), **state}

    def conditioned(self, seed: int) -> Tensor:
        """A picture for the first frame and none for the others, [1,Cg,F,H,W]; where it is `clean`, of every
        other seed, [1,Cg,1,H,W]; where it is a `control`, in each frame beside the video's; `behind` it, one
        after the other, [1,Cg,N,H,W]."""
        channels, frames, height, width = self.config.latent_shape
        if self.config.concept.given == "clean":
            clean = self._first("encode_first", seed)[0]
            return torch.cat((torch.ones_like(clean[:, :1]), clean), dim=1) * float(seed % 2 == 0)
        if self.config.concept.side is not None:  # of each place its picture's number, then latents
            every = range(self.config.concept.max_concepts)
            made = [self._causal("encode_first", self.encode_first(seed + n)) for n in every]
            areas = [(n + 1) * self.encode_first(seed + n)["area"] for n in every]
            return torch.cat((torch.cat(areas, dim=2), torch.cat([m for m, _ in made], dim=2)), dim=1)
        if self.config.concept.given == "behind":
            every = range(self.config.concept.max_concepts)
            return torch.cat([self._first("encode_first", seed + n)[0] for n in every], dim=2)
        if self.config.concept.given == "control":  # the video's latents stand in for an empty one's
            beside = self.config.denoised_shape[1] - frames
            control = torch.zeros(1, self.config.conditioning_channels, beside + frames, height, width)
            empty = self._first("encode_first", seed + 1)[0]  # [1,Cz,1,H,W]
            control[:, : 2 * channels, beside:] = empty.repeat(1, 2, 1, 1, 1)
            control[:, 2 * channels :, beside:] = 1.0
            control[:, :channels, :beside] = self._first("encode_first", seed)[0]
            return control
        mask = torch.zeros(1, self.config.conditioning_channels - channels, frames, height, width)
        mask[:, :, 0] = 1.0
        latents = torch.zeros(1, channels, frames, height, width)
        latents[:, :, :1] = self._first("encode_first", seed)[0]
        return torch.cat((mask, latents), dim=1)

    def boxes(self, seed: int) -> Tensor:
        """Of each concept a box of half the height and width, elsewhere in each frame of patches: bool [S,N].
        Of few concepts there are tokens that see none."""
        g = torch.Generator().manual_seed(seed + 3)
        patch, concepts = self.config.transformer.patch_size, self.config.concept.max_concepts
        frames, *sides = (n // side for n, side in zip(self.config.latent_shape[1:], patch, strict=True))
        inside = []
        for side in sides:
            low = 0.5 * torch.rand(frames, 1, concepts, generator=g)
            centre = (torch.arange(side)[:, None] + 0.5) / side
            inside.append((low <= centre) & (centre < low + 0.5))  # [f,h,N], [f,w,N]
        return (inside[0][:, :, None] & inside[1][:, None]).flatten(0, 2)  # [S,N]

    def decode_first(self, seed: int) -> Sample:
        """Latents of a frame, or of a tile."""
        return {"latents": self._latents(seed)}

    def decode(self, seed: int) -> Sample:
        """The next latents, and the state that the first frame left."""
        return {"latents": self._latents(seed + 1), **self._first("decode_first", seed)[1]}

    def state(self, seed: int) -> Tensor:
        """The solver's state in the middle of a video, [M,Cz,F,H,W]."""
        g = torch.Generator().manual_seed(seed)
        return torch.randn(self.solver_states, *self.config.denoised_shape, generator=g)

    @torch.inference_mode()
    def outputs(self, graph: Graph) -> Sample:
        """Tensors of the shapes that the graph gives, by name."""
        concept = self.config.concept
        if graph.name == "text_encoder":
            return {"text": self.upstream(0)["text"][:1]}
        if graph.runs == EACH_STEP:
            return {"next_state": self.state(0)}
        if graph.expert:
            return self.conditions(graph.name, 0)
        if graph.runs in (FIRST_FRAME, LATER_FRAMES):
            made, states = self._causal(graph.name, getattr(self, graph.name)(0))
            ahead = "next_" if graph.runs == LATER_FRAMES else ""
            name = "frames" if graph.name.startswith("decode") else "latents"
            return {name: made} | {f"{ahead}{state}": tensor for state, tensor in states.items()}
        own = {"image_encoder": "picture_tokens", "qformer": "visual_queries"} if concept.has_modules else {}
        return self._kept(0, own.get(graph.name, "concept_tokens"))

    def _kept(self, seed: int, *names: str) -> Sample:
        """Outputs of the modules before."""
        known = self.upstream(seed)
        return {name: known[name] for name in names}

    def _first(self, graph: str, seed: int) -> tuple[Tensor, Sample]:
        """What the first graph of a decoder or encoder makes of its sample, and the state behind it."""
        return self._causal(graph, getattr(self, graph)(seed))

    @torch.inference_mode()
    def _causal(self, graph: str, sample: Sample) -> tuple[Tensor, Sample]:
        made, *states = self.modules[graph](*sample.values())
        return made, {f"state_{i:02}": state for i, state in enumerate(states)}

    def _frames(self, seed: int, count: int, size: tuple[int, int] | None = None) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        coarse = torch.randn(count, 3, 4, 4, generator=g)
        size = size or (self.config.height, self.config.width)
        frames = nn.functional.interpolate(coarse, size=size, mode="bilinear").clamp(-1.0, 1.0)
        return frames.permute(0, 2, 3, 1).contiguous()  # [f,height,width,3]

    def _latents(self, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return torch.randn(1, self.config.latent_shape[0], 1, *self.decoded, generator=g)

    def _present(self, seed: int) -> Tensor:
        """bool [N]: at least one concept and, where there is room for two, at least one padded place."""
        most = self.config.concept.max_concepts
        g = torch.Generator().manual_seed(seed + 1)
        return torch.arange(most) < torch.randint(1, max(2, most), (1,), generator=g)  # [N]

    def _tokens(self, lengths: Tensor, size: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """lengths [B] -> ids from the vocabulary, 0 where padded, and mask: int64 and bool [B,size]."""
        vocabulary = self.config.text_encoder["vocab_size"]
        ids = torch.randint(2, vocabulary, (len(lengths), size), generator=g)  # [B,size]
        mask = torch.arange(size) < lengths[:, None]  # [B,size]
        return torch.where(mask, ids, 0), mask

    @torch.inference_mode()
    def _upstream(self, seed: int) -> Sample:
        """The outputs of every module before `condition`, for `seed`, and what its branches see."""
        g = torch.Generator().manual_seed(seed)
        c, present = self.config.concept, self._present(seed)
        lengths = torch.randint(1, self.longest + 1, (self.branches,), generator=g)
        text = self.model.text_encoder(*self._tokens(lengths, self.config.text_tokens, g))  # [K,T,Dt]
        whole = self.whole_text or self.config.text_tokens
        bias = padding_bias(lengths, self.config.text_tokens, whole)  # [K,T]
        seen = torch.zeros(self.branches, c.max_concepts, dtype=torch.bool)
        # where they are frames every branch sees all, where they are tokens of their own all but the first
        first = {"none": -1} | dict.fromkeys(AS_TOKENS, min(1, self.branches - 1))
        seen[first.get(c.given, 0) :] = present  # [K,N]
        if not c.takes_pictures:
            known = {"concept_tokens": torch.zeros(c.max_concepts, c.tokens_per_concept, c.width)}
        else:
            known = self._concepts(seed, present, g)
        if c.masks_tokens:
            seen = self.model.seen(seen, known["label_mask"])  # [K,C]
        return {"text": text, "text_bias": bias, "concept_mask": seen, **known}

    @torch.inference_mode()
    def _conditions(self, graph: str, seed: int) -> Sample:
        """The keys and values that an expert's graph gives."""
        found = self.modules[graph](*self.condition(seed).values())
        return dict(zip(condition_names(self.config.concept.injection), found, strict=True))

    def _concepts(self, seed: int, present: Tensor, g: torch.Generator) -> Sample:
        """The outputs of the modules that make concept tokens, for the concepts that are there, bool [N]."""
        c = self.config.concept
        if not c.has_modules:
            return {"concept_tokens": self.model.image_encoder(self.image_encoder(seed)["pixels"])}
        lengths = torch.randint(1, c.label_tokens + 1, (c.max_concepts,), generator=g)
        ids, mask = self._tokens(torch.where(present, lengths, 1), c.label_tokens, g)
        labels = self.model.text_encoder(ids, mask) * present[:, None, None]  # [N,L,Dt]
        pictures = self.model.image_encoder(self.image_encoder(seed)["pixels"])  # [N,P,Dp]
        known = {"label_text": labels, "label_mask": mask, "box": self._boxes(seed)}
        tokens, visual = self.model.bound(pictures, known)  # [N,Q,Dc] each
        return {"picture_tokens": pictures, "visual_queries": visual, "concept_tokens": tokens, **known}

    def _boxes(self, seed: int) -> Tensor:
        """A box for each concept, none for the last of several: float32 [N,4]."""
        concepts = self.config.concept.max_concepts
        g = torch.Generator().manual_seed(seed + 4)
        low = 0.5 * torch.rand(concepts, 2, generator=g)
        boxes = torch.cat((low, low + 0.1 + 0.4 * torch.rand(concepts, 2, generator=g)), dim=1)
        return torch.where(torch.arange(concepts)[:, None] == max(1, concepts - 1), 0.0, boxes)
