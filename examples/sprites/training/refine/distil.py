"""Distil the trained model into one that needs few steps and no guidance.

The student starts as the teacher and learns to do in one Euler step of its own short schedule what the
teacher does in several guided ones: progressive distillation (Salimans and Ho, arXiv 2202.00512) with
guidance distilled in the same pass (Meng et al., arXiv 2210.03142). It begins at noised training clips, so
nothing is generated ahead, and the teacher's end points are fixed by where it starts: a plain squared error
does not blur.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from conceptmaster.engine.checkpoints.safetensors_io import load_model, save_model
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.runtime.solver import make_schedule

from ...arguments import add_refining, check_counts, check_shares, option, refining_options
from ..attention import cheapest_attention
from ..batches import Batch, Dropped
from ..learning import Average, MuonAdamW, autocast
from ..loop import LoopOptions, log_to, random_of, train
from ..noising import decoy_noise, normal
from ..pools import open_pool
from ..train import save_rounded
from ..train_model import ADAM_NAMES, foreground_weight

SOLVER = "euler_trailing"


@dataclass(frozen=True)
class DistilOptions:
    """How a student is trained. shift: of both schedules; lr: Muon's, AdamW takes an eighth of it. Raises
    InputError."""

    steps: int = option(1000, "steps of training")
    sampling_steps: int = option(4, "what the student will need")
    substeps: int = option(2, "the teacher's steps for each of these")
    guidance: float = option(3.0, "the teacher's (its default)")
    shift: float = 3.0
    batch_size: int = option(32, "clips in a step")
    seed: int = option(0, "of batches and noise")
    device: str = "cpu"
    lr: float = 0.004
    log_every: int = 50
    decoys: float = option(0.0, "share of clips that go on from their decoy")

    def __post_init__(self) -> None:
        check_counts(self, "steps", "batch_size", "sampling_steps", "substeps")
        check_shares(self, "decoys")

    def sigmas(self) -> np.ndarray:
        """Noise levels float32 [sampling_steps, substeps + 1]: from each of the student's levels to its
        next."""
        levels = make_schedule(SOLVER, self.sampling_steps, self.shift).sigmas
        within = np.linspace(0.0, 1.0, self.substeps + 1)
        return (levels[:-1, None] + (levels[1:] - levels[:-1])[:, None] * within).astype(np.float32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``distil``."""
    add_refining(parser, DistilOptions, "teacher", "weights folder of the trained model")


def run(args: argparse.Namespace) -> int:
    """Distil and collect a weights folder; returns 0. Raises InputError for what cannot work."""
    options = refining_options(DistilOptions, args, args.teacher)
    distil(args.teacher / "model.safetensors", args.data / "clips", args.output, options)
    weights = args.output / "weights"
    shutil.copytree(args.teacher, weights, dirs_exist_ok=True)
    save_rounded(args.output / "model.safetensors", weights / "model.safetensors")
    defaults = json.loads((args.teacher / "defaults.json").read_text())
    own = {"solver": SOLVER, "steps": options.sampling_steps, "shift": options.shift, "guidance": 1.0}
    (weights / "defaults.json").write_text(json.dumps(defaults | own, indent=1) + "\n")
    print(f"weights: {weights}; `conceptmaster export` them with --branches 1")
    return 0


@torch.no_grad()
def teach(teacher: ConceptMaster, batch: Batch, noisy: Tensor, sigmas: Tensor, guidance: float) -> Tensor:
    """Where the teacher's guided Euler steps lead: noisy [B,Cz,F,H,W] at sigmas [B,0] -> the same at
    sigmas[:, -1]. sigmas [B,m+1]."""
    conditions = _told(teacher, batch)
    mask = torch.cat([torch.zeros_like(batch.concept_mask), batch.concept_mask])
    kv = teacher.transformer.condition(*conditions, mask)
    x = noisy
    for now, following in zip(sigmas.T[:-1], sigmas.T[1:], strict=True):
        both = torch.cat([x, x])
        velocity = teacher.transformer.denoise(both, now.repeat(2) * 1000.0, kv, mask).float()
        without, asked = velocity.chunk(2)
        velocity = without + guidance * (asked - without)
        x = x + (following - now)[:, None, None, None, None] * velocity
    return x


def _told(teacher: ConceptMaster, batch: Batch) -> tuple[Tensor, Tensor]:
    """Text and concept tokens of both branches: nothing, then everything."""
    text = teacher.text_encoder(batch.token_ids, batch.token_mask)
    # The empty caption is its end token alone, which ends every caption.
    last = batch.token_mask.sum(1, keepdim=True) - 1
    end = batch.token_ids.gather(1, last)
    nothing = torch.zeros_like(batch.token_ids)
    nothing[:, :1] = end
    empty = torch.zeros_like(batch.token_mask)
    empty[:, 0] = True
    concepts = teacher.concepts(batch.pixels, batch.label_ids, batch.label_mask)
    return torch.cat([teacher.text_encoder(nothing, empty), text]), torch.cat([concepts, concepts])


def distil(weights: Path, data: Path, output: Path, options: DistilOptions) -> None:
    """Train a student of ``weights`` on the pool ``data``; resumes from ``output/distil.safetensors``.

    Only the transformer learns; encoders, Q-Former and DAM stay the teacher's. Writes
    ``output/model.safetensors`` (averaged weights) and appends to ``output/distil-log.jsonl``. Raises
    WeightsError or CheckpointError for files that cannot be read.
    """
    device = options.device
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    teacher, student = load_model(weights).to(device), load_model(weights).to(device)
    for name, p in student.named_parameters():
        p.requires_grad_(name.startswith("transformer."))
    pool = open_pool(data, student.config, device)
    levels = torch.from_numpy(options.sigmas()).to(device)

    def losses_of(step: int) -> dict[str, Tensor]:
        rng = random_of(options.seed, step)
        batch = pool.batch(rng, options.batch_size, Dropped(concepts=0.1, caption=0, both=0))
        noise = normal(rng, tuple(batch.latents.shape), device)
        chosen = rng.integers(options.sampling_steps, size=options.batch_size)
        sigmas = levels[torch.from_numpy(chosen).to(device)]
        noise, _ = decoy_noise(batch, noise, sigmas[:, 0], rng, options.decoys)
        with cheapest_attention(device), autocast(device):
            return {"total": _loss(student, teacher, batch, noise, sigmas, options.guidance)}

    def publish(steps: int) -> dict[str, float]:
        save_model(student, output / "model.safetensors")
        return {}

    train(
        student,
        MuonAdamW(student.named_parameters(), options.lr, options.lr / 8, adam_names=ADAM_NAMES),
        losses_of,
        LoopOptions("distil", options.steps, log_every=options.log_every),
        log=log_to(output / "distil-log.jsonl"),
        average=Average(student, 0.99),
        checkpoint=output / "distil.safetensors",
        publish=publish,
    )


def _loss(
    student: ConceptMaster, teacher: ConceptMaster, batch: Batch, noise: Tensor, sigmas: Tensor, scale: float
) -> Tensor:
    """Mean squared error of the mean velocity between two of the student's levels; what the concepts cover
    counts as in the teacher's training."""
    first, last = (sigmas[:, k, None, None, None, None] for k in (0, -1))
    noisy = (1 - first) * batch.latents + first * noise
    reached = teach(teacher, batch, noisy, sigmas, scale)
    target = (noisy - reached) / (first - last)
    with torch.no_grad():
        text = student.text_encoder(batch.token_ids, batch.token_mask)
        concepts = student.concepts(batch.pixels, batch.label_ids, batch.label_mask)
    velocity = student.transformer(noisy, sigmas[:, 0] * 1000.0, text, concepts, batch.concept_mask)
    weight = foreground_weight(batch)  # [B,1,F,H,W]
    return ((velocity.float() - target).square() * weight).mean() / weight.mean()
