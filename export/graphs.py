"""The graphs that a model is exported as: for each a module, named inputs and outputs, and sample inputs.

Exporter, verifier and manifest all read `GraphSpec`; nothing about a graph is written down a second time.

Letters: K guidance branches, N concepts, P picture tokens, Q tokens per concept, C = N*Q, T text tokens,
L label tokens, F H W latent frames, height, width, A heads, E head width, M solver states, Cz latent
channels, Cg channels that tell the frames which are given, Dt text width, Dc concept width, f video frames of
one latent frame.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..engine.checkpoints.lazy_weights import faked, stored_weights
from ..engine.concepts import VisualOnly
from ..engine.config import ModelConfig
from ..engine.dit import BlockConditions, ConceptDiT
from ..engine.model import ConceptMaster
from ..engine.vae.wan_decoder import streaming_decoders
from ..engine.vae.wan_encoder import streaming_encoders
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


class Condition(nn.Module):
    """(text [K,T,Dt], concept_tokens [N,Q,Dc], concept_mask bool [K,N]) -> every block's keys and values."""

    def __init__(self, transformer: ConceptDiT) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, text: Tensor, concept_tokens: Tensor, concept_mask: Tensor) -> tuple[Tensor, ...]:
        """In the order of `condition_names`: two tensors [layers,K,T|T+C,A,E], then (unless the injection is
        `merged`) two [layers,K,C,A,E]."""
        return tuple(self.transformer.condition(text, concept_tokens, concept_mask).values())


class DenoiseStep(nn.Module):
    """One step of the solver: guidance and update around the transformer.

    state [M,Cz,F,H,W], time [1] (sigma * 1000), concept_mask bool [K,N], guidance [K], coefficients
    [M,M+1], for an image-to-video base given [1,Cg,F,H,W], then the tensors of `Condition` -> next state
    [M,Cz,F,H,W].
    """

    def __init__(self, transformer: ConceptDiT) -> None:
        super().__init__()
        self.transformer = transformer
        self.reads_given = transformer.config.given_channels > 0

    def forward(
        self,
        state: Tensor,
        time: Tensor,
        concept_mask: Tensor,
        guidance: Tensor,
        coefficients: Tensor,
        *known: Tensor,
    ) -> Tensor:
        """coefficients @ [state_0 .. state_{M-1}, sum_k guidance_k velocity_k(state_0)]."""
        given, conditions = (known[0], known[1:]) if self.reads_given else (None, known)
        kv = dict(zip(BlockConditions._fields, conditions, strict=False))
        branches = concept_mask.shape[0]
        latents = state[:1].expand(branches, -1, -1, -1, -1)  # [K,Cz,F,H,W]
        velocities = self.transformer.denoise(latents, time, kv, concept_mask, given)  # [K,Cz,F,H,W]
        velocity = (guidance[:, None] * velocities.flatten(1).float()).sum(
            dim=0, keepdim=True
        )  # [1,Cz*F*H*W]
        seen = torch.cat((state.flatten(1), velocity))  # [M+1,Cz*F*H*W]
        return (coefficients @ seen).unflatten(1, state.shape[1:])  # [M,Cz,F,H,W]


def condition_names(injection: str) -> tuple[str, ...]:
    """The outputs of `condition`, which `denoise` reads; `merged` has the concepts' tokens in the text's, and
    `none` has no concepts."""
    return BlockConditions._fields[:2] if injection in ("merged", "none") else BlockConditions._fields


def graph_specs(
    model: ConceptMaster,
    vae: VAE,
    *,
    branches: int = 2,
    solver_states: int = 4,
    config: ModelConfig | None = None,
    tile: tuple[int, int] | None = None,
) -> list[GraphSpec]:
    """Every graph of `model` and `vae`, in the order in which a request runs them.

    branches: K, 1 to 3; solver_states: M; config: the model's for another video or fewer text tokens;
    tile: height and width, in latents, of what the decoder takes at once, None for all of a frame. Both
    modules must be in evaluation mode and float32. A video of one latent frame has no graph `decode`, a model
    that takes no concepts none of those that make their tokens. Of an image-to-video base the picture tokens
    are the concept tokens, and two graphs encode its frames. Where weights are on disk all are external.
    """
    config = config or model.config
    shapes, samples = (_Samples(model, vae, config, branches, solver_states, tile) for _ in range(2))
    external = bool(stored_weights(model))
    if external:  # a model that is not in memory is too large to be run for its shapes
        with faked(model) as mode, mode:
            specs = _specs(shapes)
    else:
        specs = _specs(shapes)
    return [replace(spec, sample=getattr(samples, spec.name), external=external) for spec in specs]


def _specs(samples: _Samples) -> list[GraphSpec]:
    """The specs by what `samples` gives; each graph's sample is the method of its name."""
    model = samples.model
    known = samples.upstream(0)
    conditions = {name: known[name] for name in condition_names(model.config.concept.injection)}
    first, states = samples.first_frame(0)

    specs = [
        _spec("text_encoder", model.text_encoder, samples.text_encoder, {"text": known["text"][:1]}),
        *_concept_specs(model, samples),
        _spec("condition", Condition(model.transformer), samples.condition, conditions),
        *_encoder_specs(samples),
        _spec("denoise", DenoiseStep(model.transformer), samples.denoise, {"next_state": samples.state(0)}),
        _spec("decode_first", samples.decoders[0], samples.decode_first, {"frames": first, **states}),
    ]
    if samples.config.latent_shape[1] > 1:
        with torch.inference_mode():
            frames, *following = samples.decoders[1](*samples.decode(0).values())
        outputs = {f"next_{name}": state for name, state in zip(states, following, strict=True)}
        specs.append(_spec("decode", samples.decoders[1], samples.decode, {"frames": frames, **outputs}))
    return specs


def _concept_specs(model: ConceptMaster, samples: _Samples) -> list[GraphSpec]:
    """From pictures and labels to concept tokens."""
    if not model.config.concept.takes_pictures:
        return []
    known = samples.upstream(0)
    if not model.config.concept.has_modules:
        tokens = _only(known, "concept_tokens")
        return [_spec("image_encoder", model.image_encoder, samples.image_encoder, tokens)]
    return [
        _spec("image_encoder", model.image_encoder, samples.image_encoder, _only(known, "picture_tokens")),
        _spec("qformer", model.qformer, samples.qformer, _only(known, "visual_queries")),
        _spec("dam", model.dam, samples.dam, _only(known, "concept_tokens")),
    ]


def _encoder_specs(samples: _Samples) -> list[GraphSpec]:
    """From frames that pictures give to their latents, one latent frame at a time."""
    if not samples.encoders:
        return []
    with torch.inference_mode():
        latents, states = samples.first_latents(0)
        _, *following = samples.encoders[1](*samples.encode(0).values())
    outputs = {f"next_{name}": state for name, state in zip(states, following, strict=True)}
    return [
        _spec("encode_first", samples.encoders[0], samples.encode_first, {"latents": latents, **states}),
        _spec("encode", samples.encoders[1], samples.encode, {"latents": latents, **outputs}),
    ]


def _only(known: Sample, name: str) -> Sample:
    return {name: known[name]}


def _spec(
    name: str, module: nn.Module, sample: Callable[[int], Sample], outputs: dict[str, Tensor]
) -> GraphSpec:
    """outputs: by name, tensors of the right shapes."""
    inputs, given = (
        tuple(_tensor_spec(key, value) for key, value in side.items()) for side in (sample(0), outputs)
    )
    return GraphSpec(name, module.eval(), inputs, given, sample)


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
    ) -> None:
        self.model, self.config = model, config
        self.decoded = tile or config.latent_shape[2:]
        self.branches, self.solver_states = branches, solver_states
        self.decoders = streaming_decoders(vae)
        self.encoders: tuple[nn.Module, ...] = ()
        if model.config.given_channels:  # so it is Wan's VAE
            self.encoders = streaming_encoders(vae)  # type: ignore[arg-type]
        self.upstream = functools.lru_cache(4)(self._upstream)

    def text_encoder(self, seed: int) -> Sample:
        """One string of any length that fits."""
        g = torch.Generator().manual_seed(seed)
        length = torch.randint(1, self.config.text_tokens + 1, (1,), generator=g)
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
        """Picture tokens of `image_encoder`'s sample."""
        return {"picture_tokens": self.upstream(seed)["picture_tokens"]}

    def dam(self, seed: int) -> Sample:
        """Visual queries, and labels of all lengths; a padded place has one meaningless token."""
        kept = self.upstream(seed)
        names = ["visual_queries", "label_text", "label_mask"]
        return {name: kept[name] for name in (names[:1] if isinstance(self.model.dam, VisualOnly) else names)}

    def condition(self, seed: int) -> Sample:
        """K strings, all concept tokens, and which branch sees which concept."""
        kept = self.upstream(seed)
        return {name: kept[name] for name in ("text", "concept_tokens", "concept_mask")}

    def denoise(self, seed: int) -> Sample:
        """A state in the middle of a video. Of the solver's rows one is a plain step and one is the velocity
        alone, so that an error in the velocity shows whatever the state is."""
        g = torch.Generator().manual_seed(seed + 2)
        kept, states = self.upstream(seed), self.solver_states
        scales = torch.cat((torch.ones(1), 1.0 + 2.0 * torch.rand(self.branches - 1, generator=g)))
        guidance = scales - torch.cat((scales[1:], torch.zeros(1)))  # [K], sums to one
        coefficients = torch.randn(states, states + 1, generator=g)
        coefficients[0] = torch.tensor([1.0, *[0.0] * (states - 1), -0.1])
        coefficients[-1] = torch.tensor([*[0.0] * states, 1.0])
        return {
            "state": self.state(seed),
            "time": torch.rand(1, generator=g) * 1000,
            "concept_mask": kept["concept_mask"],
            "guidance": guidance,
            "coefficients": coefficients,
            **({"given": self.given(seed)} if self.encoders else {}),
            **{name: kept[name] for name in condition_names(self.config.concept.injection)},
        }

    def encode_first(self, seed: int) -> Sample:
        """A picture of smooth colours in -1..1."""
        return {"frames": self._frames(seed, 1)}

    def encode(self, seed: int) -> Sample:
        """Another picture, in each frame, and the state that the first left."""
        count = self.config.vae["scale_factor_temporal"]
        return {"frames": self._frames(seed + 1, 1).expand(count, -1, -1, -1), **self.first_latents(seed)[1]}

    def given(self, seed: int) -> Tensor:
        """A picture for the first frame and none for the others, [1,Cg,F,H,W]."""
        channels, frames, height, width = self.config.latent_shape
        mask = torch.zeros(1, self.config.given_channels - channels, frames, height, width)
        mask[:, :, 0] = 1.0
        latents = torch.zeros(1, channels, frames, height, width)
        latents[:, :, :1] = self.first_latents(seed)[0]
        return torch.cat((mask, latents), dim=1)

    def decode_first(self, seed: int) -> Sample:
        """Latents of a frame, or of a tile."""
        return {"latents": self._latents(seed)}

    def decode(self, seed: int) -> Sample:
        """The next latents, and the state that the first frame left."""
        return {"latents": self._latents(seed + 1), **self.first_frame(seed)[1]}

    def state(self, seed: int) -> Tensor:
        """The solver's state in the middle of a video, [M,Cz,F,H,W]."""
        g = torch.Generator().manual_seed(seed)
        return torch.randn(self.solver_states, *self.config.latent_shape, generator=g)

    @torch.inference_mode()
    def first_frame(self, seed: int) -> tuple[Tensor, Sample]:
        """The first frame [1,height,width,3] and the decoder's state behind it, by name."""
        frames, *states = self.decoders[0](self._latents(seed))
        return frames, {f"state_{i:02}": state for i, state in enumerate(states)}

    @torch.inference_mode()
    def first_latents(self, seed: int) -> tuple[Tensor, Sample]:
        """The latents [1,Cz,1,H,W] of a first frame, and the encoder's state behind it, by name."""
        latents, *states = self.encoders[0](self._frames(seed, 1))
        return latents, {f"state_{i:02}": state for i, state in enumerate(states)}

    def _frames(self, seed: int, count: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        coarse = torch.randn(count, 3, 4, 4, generator=g)
        size = (self.config.height, self.config.width)
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
        """The outputs of every module before the denoiser, for `seed`."""
        g = torch.Generator().manual_seed(seed)
        c, present = self.config.concept, self._present(seed)
        lengths = torch.randint(1, self.config.text_tokens + 1, (self.branches,), generator=g)
        text = self.model.text_encoder(*self._tokens(lengths, self.config.text_tokens, g))  # [K,T,Dt]
        seen = torch.zeros(self.branches, c.max_concepts, dtype=torch.bool)
        seen[0 if c.injection == "base" else -1 :] = present  # [K,N]; a base's guidance is of captions only
        if not c.takes_pictures:
            known = {"concept_tokens": torch.zeros(c.max_concepts, c.tokens_per_concept, c.width)}
        else:
            known = self._concepts(seed, present, g)
        conditions = self.model.transformer.condition(text, known["concept_tokens"], seen)
        return {"text": text, "concept_mask": seen, **known, **conditions}

    def _concepts(self, seed: int, present: Tensor, g: torch.Generator) -> Sample:
        """The outputs of the modules that make concept tokens, for the concepts that are there, bool [N]."""
        c = self.config.concept
        if not c.has_modules:
            return {"concept_tokens": self.model.image_encoder(self.image_encoder(seed)["pixels"])}
        lengths = torch.randint(1, c.label_tokens + 1, (c.max_concepts,), generator=g)
        ids, mask = self._tokens(torch.where(present, lengths, 1), c.label_tokens, g)
        labels = self.model.text_encoder(ids, mask) * present[:, None, None]  # [N,L,Dt]
        pictures = self.model.image_encoder(self.image_encoder(seed)["pixels"])  # [N,P,Dp]
        visual = self.model.qformer(pictures)  # [N,Q,Dc]
        return {
            "picture_tokens": pictures,
            "visual_queries": visual,
            "label_text": labels,
            "label_mask": mask,
            "concept_tokens": self.model.dam(visual, labels, mask),  # [N,Q,Dc]
        }
