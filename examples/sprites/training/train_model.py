"""Train ConceptMaster on the sprites world's latents.

What makes it learn to look at the pictures at all: places are told in the caption, noisy times are drawn
more often, and training-only heads ask early for what the concepts must carry. ``LayoutHead`` asks the middle
block where every concept is, a ``TraitHead`` what the concept looks like that its tokens will show;
``StoryHead`` asks the caption where every concept is (so that its tokens know their place and motion before
the video needs them); those of ``train_pictures`` ask the visual queries how it looks. None of them is
shipped.
"""

from __future__ import annotations

import copy
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from conceptmaster.engine.checkpoints.safetensors_io import save_model
from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.dit import LEAST_SIGMA
from conceptmaster.engine.model import ConceptMaster

from .attention import cheapest_attention
from .batches import Batch, Dropped, LatentPool
from .heads import LayoutHead, StoryHead, coverage_loss
from .learning import (
    Average,
    MuonAdamW,
    autocast,
    gradient_norm,
    load_checkpoint,
    save_checkpoint,
    saved_progress,
    schedule,
)
from .noising import DECOY_HELD, decoy_noise, normal, own_noise, random_sigma
from .resident import pool_on
from .starting import start_from
from .train_captions import learn_captions
from .train_pictures import Sight, TraitHead, learn_pictures, picture_losses, portrait_head_for, trait_losses

FROZEN = ("text_encoder", "image_encoder", "qformer")
"""Parts that the last stage may leave as they are."""
REFRESHED = 100
"""Steps after which the pool takes up, or draws, new clips."""
PICTURES = 128
"""Least number of pictures in a step that learns from pictures alone."""
FOREGROUND = 3.0
"""Extra weight of the loss where a concept is."""
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
)


class Trainee(nn.Module):
    """The model with its training-only heads; ``forward`` is the loss of one batch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = ConceptMaster(config)
        concept = config.concept
        self.layout = LayoutHead(config.transformer.width, concept.width)
        grid = [n // p for n, p in zip(config.latent_shape[1:], config.transformer.patch_size, strict=True)]
        self.story = StoryHead(concept.width, config.transformer.text_dim, int(np.prod(grid)))
        self.portrait = portrait_head_for(concept)
        self.trait = TraitHead(concept.tokens_per_concept, concept.width)
        self.eye = TraitHead(1, concept.picture_dim, inner=256)
        self.look = TraitHead(1, config.transformer.width)
        self.middle = config.transformer.num_layers // 2 - 1

    def concepts(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Concept tokens [B,N,Q,Dc] of the filled slots (zero elsewhere), and their visual queries [M,Q,Dc]
        and picture tokens [M,P,Dp]."""
        model, filled = self.model, batch.label_mask.any(-1)  # [B,N]
        seen = model.image_encoder(batch.pixels[filled])  # [M,P,Dp]
        visual = model.qformer(seen)  # [M,Q,Dc]
        tokens = visual
        if model.config.concept.binding != "none":
            mask = batch.label_mask[filled]
            tokens = model.dam(visual, model.text_encoder(batch.label_ids[filled], mask), mask)
        out = tokens.new_zeros((*filled.shape, *tokens.shape[1:]))
        out[filled] = tokens
        return out, visual, seen

    def velocity(
        self, batch: Batch, noisy: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Velocity [B,Cz,F,H,W], the middle block's tokens, text, and what ``concepts`` gives."""
        text = self.model.text_encoder(batch.token_ids, batch.token_mask)
        told = self.concepts(batch)
        kept: list[Tensor] = []
        handle = self.model.transformer.blocks[self.middle].register_forward_hook(
            lambda *a: kept.append(a[2])
        )
        velocity = self.model.transformer(noisy, sigma * 1000.0, text, told[0], batch.concept_mask)
        handle.remove()
        return velocity, kept[0], text, told

    def forward(self, batch: Batch, noise: Tensor, sigma: Tensor, held: Tensor) -> dict[str, Tensor]:
        """Losses: ``total`` and its parts. ``noise`` like the latents, ``sigma`` [B] in 0..1.

        Below the level ``held`` [B] the loss counts the data's error, not the velocity's, which is 1/sigma
        times that: held, lest copying be all it learns, or what cannot be known any more be all that counts.
        """
        s = sigma[:, None, None, None, None]
        noisy = (1 - s) * batch.latents + s * noise
        velocity, hidden, text, (concepts, visual, seen) = self.velocity(batch, noisy, sigma)
        weight = foreground_weight(batch)  # [B,1,F,H,W]
        counted = s.clamp(min=LEAST_SIGMA) / torch.maximum(s, held[:, None, None, None, None])
        error = (velocity.float() - (noise - batch.latents)).square() * weight * counted.square()
        flow = error.mean() / weight.mean()
        patch = self.model.config.transformer.patch_size
        target = F.avg_pool3d(batch.coverage.flatten(0, 1)[:, None], patch).flatten(1)  # [B*N,S]
        logits = self.layout(hidden.float(), concepts.float()).flatten(0, 1)
        shown = batch.concept_mask.flatten()
        layout = coverage_loss(logits[shown], target[shown])
        told = shown & (batch.token_mask.sum(1) > 1).repeat_interleave(batch.concept_mask.shape[1])
        logits = self.story(concepts.float(), text.float(), batch.token_mask).flatten(0, 1)
        story = coverage_loss(logits[told], target[told])
        filled = batch.label_mask.any(-1)
        look = self._look_losses(batch, hidden, target.view(*batch.concept_mask.shape, -1))
        shows = ~batch.foreign[filled]  # what the picture alone says is asked where it shows the noun
        truth = [each[filled][shows] for each in (batch.portraits, batch.traits, batch.patterns)]
        if len(truth[0]):
            pictures = picture_losses(self.portrait, self.trait, visual[shows].float(), *truth)
            eye = trait_losses(self.eye, seen[shows].float().mean(1, keepdim=True), *truth[1:])
        else:
            eye = dict.fromkeys(("total", "pattern", "traits", "texture"), flow.new_zeros(()))
            pictures = eye | {"portrait": flow.new_zeros(())}
        total = flow + LAYOUT_WEIGHT * layout + STORY_WEIGHT * story + LOOK_WEIGHT * look.pop("total")
        total = total + PICTURE_WEIGHT * (pictures.pop("total") + eye.pop("total"))
        pictures |= {f"look_{name}": value for name, value in look.items()}
        pictures |= {f"eye_{name}": value for name, value in eye.items()}
        return {"total": total, "flow": flow, "layout": layout, "story": story, **pictures}

    def _look_losses(self, batch: Batch, hidden: Tensor, coverage: Tensor) -> dict[str, Tensor]:
        """What the middle block's tokens [B,S,D] know of the look of the concept that covers most of them;
        ``coverage`` [B,N,S]. Without shown concepts nothing is asked."""
        most, which = (coverage * batch.concept_mask[..., None]).max(1)  # [B,S]
        rows, columns = torch.nonzero(most > LOOK_COVERAGE, as_tuple=True)
        concept = which[rows, columns]
        traits, patterns = batch.traits[rows, concept], batch.patterns[rows, concept]
        if len(rows) == 0:
            return {name: hidden.new_zeros(()) for name in ("total", "pattern", "traits", "texture")}
        return trait_losses(self.look, hidden[rows, columns, None].float(), traits, patterns)


def foreground_weight(batch: Batch) -> Tensor:
    """How much each latent position counts: more where a concept is, [B,1,F,H,W]."""
    return 1 + FOREGROUND * batch.coverage.sum(1, keepdim=True).clamp(max=1)


@torch.no_grad()
def probe(trainee: Trainee, pool: LatentPool, device: str, count: int = 96) -> dict[str, float]:
    """Error where the concepts are at high noise (sigma 0.85), with the concepts, without, and with pictures
    swapped.

    On the same samples of ``pool`` (held-out looks). If the three are equal the pictures are ignored.
    """
    rng = np.random.default_rng(0)
    results: dict[str, list[float]] = {"with": [], "without": [], "swapped": []}
    picks = [(0, k) for k in range(len(pool.shards[0].captions)) if len(pool.shards[0].labels[k]) == 2][
        :count
    ]
    for start in range(0, len(picks), 32):
        batch = pool.collate(picks[start : start + 32], rng, Dropped(0, 0, 0)).to(device)
        noise = torch.from_numpy(rng.standard_normal(batch.latents.shape, np.float32)).to(device)
        sigma = torch.full((len(noise),), 0.85, device=device)
        noisy = 0.15 * batch.latents + 0.85 * noise
        weight = batch.coverage.sum(1, keepdim=True).clamp(max=1)
        mask, pixels = batch.concept_mask, batch.pixels
        swapped = pixels.clone()
        for b in range(len(pixels)):
            filled = torch.nonzero(mask[b])[:, 0]
            swapped[b, filled] = pixels[b, filled.roll(1)]
        for name in results:
            batch.concept_mask = mask & (name != "without")
            batch.pixels = swapped if name == "swapped" else pixels
            with cheapest_attention(device), torch.compiler.set_stance("force_eager"):
                velocity = trainee.velocity(batch, noisy, sigma)[0]
            error = (velocity - (noise - batch.latents)).square() * weight
            results[name].append(float(error.mean() / weight.mean()))
    return {f"probe_{name}": round(float(np.mean(values)), 4) for name, values in results.items()}


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    """Mean of the gradients over all processes; a parameter without one counts as zero."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)


def _agree(progress: dict[str, float], device: str) -> None:
    """The first process's clock is every process's: they stop after the same step."""
    seconds = torch.tensor(progress["seconds"], dtype=torch.float64, device=device)
    dist.broadcast(seconds, 0)
    progress["seconds"] = float(seconds)


def _learn_parts(
    trainee: Trainee,
    pool: LatentPool,
    judge: LatentPool,
    picture_steps: int,
    caption_steps: int,
    batch_size: int,
    seed: int,
    device: str,
    keep: bool,
    new_looks: bool,
    log: Callable[[Mapping[str, object]], None],
    log_every: int,
    checkpoint: Path,
    write: bool,
) -> None:
    """What is learned before the videos: to see pictures, with ``keep`` without becoming unreadable for the
    transformer that is there, and to read captions."""
    model = trainee.model
    if picture_steps:
        kept = copy.deepcopy(model).eval() if keep else None
        with cheapest_attention(device):
            learn_pictures(
                Sight(model, trainee.portrait, trainee.trait, trainee.eye, kept).to(device),
                pool,
                steps=picture_steps,
                seed=seed,
                device=device,
                adam_names=ADAM_NAMES,
                judge=judge,
                log=log,
                log_every=log_every,
                checkpoint=checkpoint,
                write=write,
                batch_size=max(PICTURES, batch_size),
                new_looks=new_looks,
            )
    losses = learn_captions(
        trainee, pool, steps=caption_steps, seed=seed, device=device, adam_names=ADAM_NAMES
    )
    if losses:
        log({"phase": "captions", "story": losses})


def _log(output: Path, record: Mapping[str, object]) -> None:
    with (output / "log.jsonl").open("a") as log:
        log.write(json.dumps(record) + "\n")
    tqdm.write(json.dumps(record))


def train_model(
    config: ModelConfig,
    data: Path,
    held_out: Path,
    output: Path,
    tokenizer: Tokenizer,
    *,
    steps: int,
    picture_steps: int,
    caption_steps: int,
    batch_size: int = 32,
    seed: int = 0,
    device: str = "cpu",
    lr: float = 0.012,
    log_every: int = 100,
    start: Path | None = None,
    freeze: Sequence[str] = (),
    own: float = 0.0,
    decoys: float = 0.0,
    foreign: float = 0.0,
    high: float = 0.0,
    minutes: float | None = None,
    new_looks: bool = False,
    drawn: Callable[[int], LatentPool] | None = None,
    compiled: bool = False,
) -> None:
    """Learn to see pictures alone, and to read captions alone, then train to ``steps``.

    Resumes from ``output/training.safetensors``, before that from ``pictures.safetensors``; a batch depends
    on seed and step only. ``start`` is a ``model.safetensors`` to go on from, with fresh heads and
    optimizer; usually without captions then. ``new_looks``: see ``learn_pictures``. ``lr`` is Muon's, for
    matrices; AdamW takes an eighth of it. ``freeze`` leaves parts, some of ``FROZEN``, as they are in the
    last stage; the paper does so with T5 and CLIP. ``own``: see ``own_noise``, ``decoys``: see
    ``decoy_noise``, ``foreign``: see ``Dropped``, ``high``: see ``random_sigma``. With ``minutes`` the last
    stage takes so long and as many steps as fit, its learning rate following the clock. ``data`` and
    ``held_out`` are pools with latents; ``drawn`` makes another in the place of ``data``, told how often it
    has been refreshed. ``compiled``: torch.compile makes the transformer's blocks faster first. Writes
    ``model.safetensors`` (averaged weights with their configuration), appends to ``log.jsonl``. Started by
    torchrun (``torchrun --nproc-per-node 2 -m -- conceptmaster.examples.sprites train …``), processes share
    the work through gloo or nccl.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo" if device == "cpu" else "nccl")
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    trainee = Trainee(config).to(device)
    checkpoint, progress = output / "training.safetensors", {"step": 0.0, "seconds": 0.0}
    if drawn is None:
        pool = pool_on(device, data, tokenizer, config.text_tokens, config.concept.label_tokens)
    else:
        steps_done = saved_progress(checkpoint)["step"] if checkpoint.exists() else 0
        pool = drawn(int(steps_done) // REFRESHED)
    judge = LatentPool(held_out, tokenizer, config.text_tokens, config.concept.label_tokens)
    for p in (pool, judge):
        p.normalise(config.vae["latents_mean"], config.vae["latents_std"])
    if not checkpoint.exists():
        told, keep = _log if rank == 0 else (lambda *_: None), start is not None
        if start is not None:
            fresh = start_from(trainee.model, start)
            told(output, {"phase": "start", "fresh": fresh})
            keep = not any(name.startswith(("qformer.", "dam.")) for name in fresh)
        log = partial(told, output)
        _learn_parts(
            trainee,
            pool,
            judge,
            picture_steps,
            caption_steps,
            batch_size,
            seed,
            device,
            keep,
            new_looks,
            log,
            log_every=max(1, log_every // 2),
            checkpoint=output / "pictures.safetensors",
            write=rank == 0,
        )
    for name in freeze:
        trainee.model.get_submodule(name).requires_grad_(False)
    parameters = [p for p in trainee.parameters() if p.requires_grad]
    optimizer = MuonAdamW(trainee.named_parameters(), lr, lr / 8, adam_names=ADAM_NAMES)
    average = Average(trainee, 0.995)
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, trainee, average, optimizer)
    if compiled:
        for block in trainee.model.transformer.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)  # not the block: it keeps its hooks
    bar = tqdm(total=steps, initial=int(progress["step"]), desc="train", disable=rank > 0)
    sums: dict[str, Tensor] = {}
    counted, began = 0, time.perf_counter()
    while (part := _part_done(progress, steps, minutes)) < 1:
        step = int(progress["step"])
        rng = np.random.Generator(np.random.Philox(key=[seed, step * 64 + rank]))
        batch = pool.batch(rng, batch_size // world, Dropped(foreign=foreign)).to(device)
        noise = normal(rng, tuple(batch.latents.shape), device)
        sigma = random_sigma(rng, len(noise), high).to(device)
        optimizer.set_scale(schedule(part))
        with cheapest_attention(device), autocast(device):
            noise, sigma, held = own_noise(trainee, batch, noise, sigma, rng, own)
            noise, astray = decoy_noise(batch, noise, sigma, rng, decoys)
            held = torch.where(astray, held.clamp(min=DECOY_HELD), held)
            losses = trainee(batch, noise, sigma, held)
        optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        if world > 1:
            _average_gradients(parameters)
        gradient_norm(parameters, 2.0)
        optimizer.step()
        average.update(trainee)
        progress["step"] += 1
        now = time.perf_counter()
        progress["seconds"] += now - began
        began = now
        if world > 1:
            _agree(progress, device)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
        counted += 1
        bar.update(1)
        last = _part_done(progress, steps, minutes) >= 1
        if rank == 0 and ((step + 1) % log_every == 0 or last):
            if (step + 1) % (log_every * 5) == 0 or last or step + 1 == log_every:
                trained = {k: v.clone() for k, v in trainee.state_dict().items()}
                trainee.load_state_dict(average.shadow)
                record = probe(trainee, judge, device)
                save_model(trainee.model, output / "model.safetensors")
                trainee.load_state_dict(trained)
                save_checkpoint(checkpoint, trainee, average, optimizer, progress)
            else:
                record = {}
            record |= {name: round(float(value) / counted, 4) for name, value in sums.items()}
            record |= {
                "step": step + 1,
                "samples": (step + 1) * batch_size,
                "seconds": round(progress["seconds"]),
            }
            sums, counted = {}, 0
            _log(output, record)
        if (step + 1) % REFRESHED == 0:
            pool.refresh()
    pool.close()
    bar.close()


def _part_done(progress: Mapping[str, float], steps: int, minutes: float | None) -> float:
    """How much of the last stage is done, from 0 to 1: of its steps, or of its time where that is given."""
    return progress["step"] / steps if minutes is None else progress["seconds"] / (60 * minutes)
