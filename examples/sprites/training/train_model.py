"""Train ConceptMaster on the sprites world's latents.

What makes it learn to look at the pictures at all: places are told in the caption, noisy times are drawn
more often, and training-only heads ask early for what the concepts must carry. ``LayoutHead`` asks the middle
block where every concept is, a ``TraitHead`` what the concept looks like that its tokens will show;
``StoryHead`` asks the caption where every concept is (so that its tokens know their place and motion before
the video needs them); those of ``train_pictures`` ask the visual queries how it looks. None of them is
shipped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conceptmaster.engine.checkpoints.safetensors_io import save_model
from conceptmaster.engine.concept_config import ENCODER_INPUTS, ENCODERS
from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.engine.rival_encoders import selection_loss
from conceptmaster.errors import InputError

from .attention import cheapest_attention
from .batches import KEEP_ALL, Batch, Dropped, Pool
from .drawn import DrawnPool
from .heads import LayoutHead, StoryHead, coverage_loss
from .learning import Average, MuonAdamW, autocast, saved_progress
from .loop import Log, LoopOptions, log_to, random_of, train
from .noising import DECOY_HELD, HELD_SIGMA, decoy_noise, flow_loss, noised, normal, random_sigma
from .options import TrainOptions
from .probing import errors
from .starting import start_from
from .tiling import tiled
from .train_captions import learn_captions
from .train_pictures import PictureHeads, PictureOptions, Sight, TraitHead, learn_pictures, trait_losses

REFRESHED = 100
"""Steps after which the pool draws new clips."""
PICTURES = 128
"""Least number of pictures in a step that learns from pictures alone."""
GROUNDING_DROPPED = 0.1
"""Share of concepts whose label and box an encoder that reads both is not told, as MS-Diffusion has it."""
LAYOUT_WEIGHT, STORY_WEIGHT, PICTURE_WEIGHT, LOOK_WEIGHT = 1.0, 0.3, 0.3, 0.3
LOOK_COVERAGE = 0.4
"""A video token is asked for the look of a concept that covers at least so much of it."""
ADAM_NAMES = (
    "shared",
    "embed_tokens",
    "relative_attention_bias",
    "position_embedding",
    "class_embedding",
    "scale_shift_table",
    "queries",
    "proj_out",
    "embeddings",
    "places",
    "grounding_latents",
)
"""Tables and embeddings, which AdamW trains."""


class Told(NamedTuple):
    """What becomes of a batch's pictures and labels: concept tokens [B,N,Q,Dc] of the filled slots (zero
    elsewhere; N = 1 where pictures are tiled), and of the M filled ones visual queries [M,Q,Dc], picture
    tokens [M,P,Dp], and labels where they are read: text [M,L,Dt], mask bool [M,L]."""

    concepts: Tensor
    visual: Tensor
    seen: Tensor
    label_text: Tensor | None
    label_mask: Tensor


class Trainee(nn.Module):
    """The model with its training-only heads; ``forward`` is the loss of one batch.

    bare: without those that ask what becomes of pictures and labels, as it always is where all pictures are
    tiled, so that no concept has tokens of its own. selection: the weight of ``selection_loss``.
    """

    def __init__(self, config: ModelConfig, bare: bool = False, selection: float = 0.1) -> None:
        super().__init__()
        self.model = ConceptMaster(config)
        concept = config.concept
        self.bare, self.selection = bare or concept.tiled is not None, selection
        self.layout = LayoutHead(config.transformer.width, concept.width)
        grid = [n // p for n, p in zip(config.latent_shape[1:], config.transformer.patch_size, strict=True)]
        self.story = StoryHead(concept.width, config.transformer.text_dim, int(np.prod(grid)))
        self.pictures = PictureHeads(concept)
        self.look = TraitHead(1, config.transformer.width)
        self.middle = config.transformer.num_layers // 2 - 1

    def concepts(self, batch: Batch) -> Told:
        """What becomes of its pictures and labels."""
        model, concept = self.model, self.model.config.concept
        filled = batch.label_mask.any(-1)  # [B,N]
        pixels, mask = batch.pixels[filled], batch.label_mask[filled]  # [M,3,px,px], [M,L]
        if concept.tiled is not None:
            pixels, filled = tiled(batch.pixels, filled), filled.any(1, keepdim=True)  # [B,3,px,px], [B,1]
            pixels = pixels[filled[:, 0]]
        seen = model.image_encoder(pixels)  # [M,P,Dp]
        known, label = {"label_mask": mask, "box": batch.box[batch.label_mask.any(-1)]}, None
        if concept.reads_labels:
            label = known["label_text"] = model.text_encoder(batch.label_ids[filled], mask)  # [M,L,Dt]
        tokens, visual = model.bound(seen, known)  # [M,Q,Dc] each
        out = tokens.new_zeros((*filled.shape, *tokens.shape[1:]))
        out[filled] = tokens
        return Told(out, visual, seen, label, mask)

    def velocity(self, batch: Batch, noisy: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Told]:
        """Velocity [B,Cz,F,H,W], the middle block's tokens, text, and what ``concepts`` gives."""
        text = self.model.text_encoder(batch.token_ids, batch.token_mask)
        told, mask = self.concepts(batch), batch.concept_mask
        if self.model.config.concept.tiled is not None:
            mask = mask.any(1, keepdim=True)  # [B,1]
        kept: list[Tensor] = []
        handle = self.model.transformer.blocks[self.middle].register_forward_hook(
            lambda *a: kept.append(a[2])
        )
        seen = self.model.seen(mask, batch.label_mask)
        boxes = {"boxes": batch.boxes} if self.model.config.concept.mask == "boxes" else {}
        velocity = self.model.transformer(noisy, sigma * 1000.0, text, told.concepts, seen, **boxes)
        handle.remove()
        return velocity, kept[0], text, told

    def forward(self, batch: Batch, noise: Tensor, sigma: Tensor, held: Tensor) -> dict[str, Tensor]:
        """Losses: ``total`` and its parts. ``noise`` like the latents, ``sigma`` [B] in 0..1, ``held`` [B]:
        see ``flow_loss``."""
        noisy = noised(batch.latents, noise, sigma)
        velocity, hidden, text, told = self.velocity(batch, noisy, sigma)
        flow = flow_loss(velocity, batch.latents, noise, sigma, batch.coverage, held)
        patch = self.model.config.transformer.patch_size
        target = F.avg_pool3d(batch.coverage.flatten(0, 1)[:, None], patch).flatten(1)  # [B*N,S]
        look = self._look_losses(batch, hidden, target.view(*batch.concept_mask.shape, -1))
        losses = {"flow": flow, "total": flow + LOOK_WEIGHT * look.pop("total")}
        losses |= {f"look_{name}": value for name, value in look.items()}
        if self.model.config.concept.encoder == "label_selected":
            losses["selection"] = self._selection_loss(told)
            losses["total"] = losses["total"] + self.selection * losses["selection"]
        if not self.bare:
            asked = self._concept_losses(batch, hidden, text, told, target)
            losses["total"] = losses["total"] + asked.pop("total")
            losses |= asked
        return losses

    def _selection_loss(self, told: Told) -> Tensor:
        assert told.label_text is not None
        label = self.model.transformer.condition_embedder.text_embedder(told.label_text)  # [M,L,D]
        return selection_loss(told.visual.float(), label.float(), told.label_mask)

    def _concept_losses(
        self, batch: Batch, hidden: Tensor, text: Tensor, told: Told, target: Tensor
    ) -> dict[str, Tensor]:
        """What the heads that ask what becomes of pictures and labels find, as ``total`` and its parts;
        target [B*N,S]: how much of a video token each concept covers."""
        logits = self.layout(hidden.float(), told.concepts.float()).flatten(0, 1)
        shown = batch.concept_mask.flatten()
        layout = coverage_loss(logits, target, shown)
        read = shown & (batch.token_mask.sum(1) > 1).repeat_interleave(batch.concept_mask.shape[1])
        logits = self.story(told.concepts.float(), text.float(), batch.token_mask).flatten(0, 1)
        story = coverage_loss(logits, target, read)
        filled = batch.label_mask.any(-1)
        shows = ~batch.foreign[filled]  # what the picture alone says is asked where it shows the noun
        truth = [each[filled][shows] for each in (batch.portraits, batch.traits, batch.patterns)]
        pictures = self.pictures(told.seen[shows], told.visual[shows].float(), *truth)
        total = LAYOUT_WEIGHT * layout + STORY_WEIGHT * story + PICTURE_WEIGHT * pictures.pop("total")
        return {"total": total, "layout": layout, "story": story, **pictures}

    def _look_losses(self, batch: Batch, hidden: Tensor, coverage: Tensor) -> dict[str, Tensor]:
        """What the middle block's tokens [B,S,D] know of the look of the concept that covers most of them;
        ``coverage`` [B,N,S]. Without shown concepts nothing is asked."""
        most, which = (coverage * batch.concept_mask[..., None]).max(1)  # [B,S]
        rows, columns = torch.nonzero(most > LOOK_COVERAGE, as_tuple=True)
        concept = which[rows, columns]
        traits, patterns = batch.traits[rows, concept], batch.patterns[rows, concept]
        return trait_losses(self.look, hidden[rows, columns, None].float(), traits, patterns)


def probe(trainee: Trainee, pool: Pool, device: str, count: int = 96) -> dict[str, float]:
    """What ``probing.errors`` finds on the same clips of two concepts of ``pool`` (held-out looks)."""
    rng = np.random.default_rng(0)
    pairs = torch.nonzero(pool.arrays["count"] == 2)[:count, 0]
    batches = (pool.collate(clips, rng, KEEP_ALL) for clips in pairs.split(32))
    found = errors(lambda *asked: trainee.velocity(*asked)[0], batches, rng, device)
    return {f"probe_{name}": value for name, value in found.items()}


def _learn_parts(trainee: Trainee, pool: Pool, output: Path, log: Log, options: TrainOptions) -> None:
    """What is learned before the videos: to see pictures, and to read captions."""
    if options.start is not None:
        log({"phase": "start", "fresh": start_from(trainee.model, options.start)})
    if options.picture_steps:
        sight = Sight(trainee.model, trainee.pictures).to(options.device)
        pictures = PictureOptions(
            options.picture_steps,
            max(PICTURES, options.batch_size),
            options.seed,
            options.device,
            log_every=max(1, options.log_every // 2),
        )
        with cheapest_attention(options.device):
            learn_pictures(sight, output / "pictures.safetensors", pictures, ADAM_NAMES, log)
    if options.caption_steps:
        steps, seed = options.caption_steps, options.seed
        losses = learn_captions(trainee.model, trainee.story, pool, steps, seed, options.device, ADAM_NAMES)
        log({"phase": "captions", "story": losses})


def train_model(
    config: ModelConfig,
    open_data: Callable[[int], DrawnPool],
    judge: Pool,
    output: Path,
    options: TrainOptions,
) -> None:
    """Learn to see pictures alone, and to read captions alone, then train to ``options.steps``.

    Resumes from ``output/training.safetensors``, before that from ``pictures.safetensors``; a batch depends
    on seed and step only. ``open_data`` draws the pool of clips, told how often it has been refreshed;
    ``judge`` has looks held out. Writes ``model.safetensors`` (averaged weights with their configuration),
    appends to ``log.jsonl``.
    """
    device = options.device
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    trainee = Trainee(config, options.bare, options.selection).to(device)
    if (options.picture_steps or options.caption_steps) and (
        trainee.bare or config.concept.encoder not in ENCODERS
    ):
        raise InputError(
            "pictures and captions alone are learned with heads, by an encoder that reads no label"
        )
    checkpoint = output / "training.safetensors"
    steps_done = saved_progress(checkpoint)["step"] if checkpoint.exists() else 0
    pool = open_data(int(steps_done) // REFRESHED)
    log = log_to(output / "log.jsonl")
    if not checkpoint.exists():
        _learn_parts(trainee, pool, output, log, options)
    for name in options.freeze:
        trainee.model.get_submodule(name).requires_grad_(False)
    optimizer = MuonAdamW(trainee.named_parameters(), options.lr, options.lr / 8, adam_names=ADAM_NAMES)
    if options.compile:
        for block in trainee.model.transformer.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)  # not the block: it keeps its hooks

    def losses_of(step: int) -> dict[str, Tensor]:
        rng = random_of(options.seed, step)
        grounding = GROUNDING_DROPPED if "box" in ENCODER_INPUTS.get(config.concept.encoder, ()) else 0.0
        boxed = options.boxes or float(config.concept.mask == "boxes")  # of a model with boxes, all
        boxes = {"boxed": boxed, "loose": options.loose}
        dropped = Dropped(foreign=options.foreign, grounding=grounding, **boxes)
        batch = pool.batch(rng, options.batch_size, dropped)
        noise = normal(rng, tuple(batch.latents.shape), device)
        sigma = random_sigma(rng, len(noise), device)
        noise, astray = decoy_noise(batch, noise, sigma, rng, options.decoys)
        held = torch.where(astray, DECOY_HELD, HELD_SIGMA)
        with cheapest_attention(device), autocast(device):
            return trainee(batch, noise, sigma, held)

    def publish(steps: int) -> dict[str, float]:
        save_model(trainee.model, output / "model.safetensors")
        return probe(trainee, judge, device)

    def refresh(steps: int) -> None:
        if steps % REFRESHED == 0:
            pool.refresh()

    how = LoopOptions(
        "train",
        options.steps,
        options.minutes,
        log_every=options.log_every,
        save_every=5 * options.log_every,
        also=(options.log_every,),
    )
    train(
        trainee,
        optimizer,
        losses_of,
        how,
        log=lambda record: log(record | {"samples": record["step"] * options.batch_size}),
        average=Average(trainee, 0.995),
        checkpoint=checkpoint,
        publish=publish,
        after_step=refresh,
    )
    pool.close()
