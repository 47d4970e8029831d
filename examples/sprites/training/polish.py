"""Train the VAE's network on latents that the model made, so that it mends the model's faults too.

Training clips are noised part of the way and denoised again by the model, guided as it will be: what comes
back is still the same clip, but with the model's own smears around it. The network learns to draw the true
frames from these, and from true latents as before. Only the decoder changes: the model need not know.
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
from tqdm import tqdm

from conceptmaster.engine.checkpoints.safetensors_io import load_model
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.engine.vae.block_vae import BlockVAE
from conceptmaster.errors import InputError
from conceptmaster.runtime.atomic_write import replacing

from ..arguments import add_device, add_options, check_counts, cores, option, options_from, set_threads
from .attention import cheapest_attention
from .batches import KEEP_ALL, Batch
from .drawn import Drawing, DrawnPool
from .learning import autocast
from .train_vae import VAEOptions, drawing_loss, fit, frames_of, load_vae, random_frames

SIGMAS = (0.4, 0.85)
"""Noise levels to denoise again from: below them nothing is lost, above another clip comes back."""
SUBSTEPS = 5
TRUE = 0.4
"""Share of true latents in a batch."""
TOGETHER = 32
"""Clips that are denoised at a time."""


@dataclass(frozen=True)
class PolishOptions(VAEOptions):
    """How the network is polished. Raises InputError."""

    lr: float = 0.01
    decay: float = 0.99
    log_every: int = 100
    clips: int = option(1600, "clips to denoise again")
    guidance: float = option(1.5, "of the denoising (the model's default)")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "clips")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``polish``."""
    parser.add_argument("--weights", required=True, type=Path, help="weights folder of the trained model")
    parser.add_argument("--output", required=True, type=Path, help="folder for checkpoints and results")
    add_options(parser, PolishOptions, guidance=None)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Denoise, train, and write a weights folder; returns 0. Raises InputError for what cannot work."""
    for name in ("model.safetensors", "vae.safetensors", "defaults.json"):
        if not (args.weights / name).exists():
            raise InputError(f"{args.weights / name} is missing: `train --output` makes it")
    set_threads(args)
    usual = float(json.loads((args.weights / "defaults.json").read_text())["guidance"])
    options = options_from(PolishOptions, args, guidance=usual if args.guidance is None else args.guidance)
    args.output.mkdir(parents=True, exist_ok=True)
    model = load_model(args.weights / "model.safetensors").to(args.device)
    redone = args.output / "redone.npz"
    if not redone.exists():
        drawing = Drawing(options.clips, options.seed, cores(), videos=True)
        pool = DrawnPool(model.config, load_vae(args.weights, model.config.vae), drawing, args.device)
        pool.close()
        redo(model, pool, redone, options)
    if not (args.output / "polish-training.safetensors").exists():
        shutil.copyfile(args.weights / "vae.safetensors", args.output / "vae.safetensors")
    (args.output / "vae.json").write_text(json.dumps(model.config.vae, indent=1))
    polish(args.output, redone, options)
    weights = args.output / "weights"
    shutil.copytree(args.weights, weights, dirs_exist_ok=True)
    shutil.copyfile(args.output / "vae.safetensors", weights / "vae.safetensors")
    print(f"weights: {weights}")
    return 0


def redo(model: ConceptMaster, pool: DrawnPool, path: Path, options: PolishOptions) -> None:
    """Write the clips of a pool, uint8 [n,F,sH,sW,3], and their raw latents, denoised again, float16
    [n,Cz,F,H,W]."""
    device, rng, made = options.device, np.random.default_rng(options.seed), []
    for clips in tqdm(torch.arange(len(pool), device=device).split(TOGETHER), desc="denoise"):
        batch = pool.collate(clips, rng, KEEP_ALL)
        noise = torch.from_numpy(rng.standard_normal(batch.latents.shape, np.float32)).to(device)
        levels = rng.uniform(*SIGMAS, size=(len(noise), 1)).astype(np.float32)
        start = torch.from_numpy(levels).to(device)
        sigmas = start * torch.linspace(1, 0, SUBSTEPS + 1, device=device)
        level = start[:, :, None, None, None]
        noisy = (1 - level) * batch.latents + level * noise
        with cheapest_attention(device), autocast(device):
            latents = denoise(model, batch, noisy, sigmas, options.guidance)
        made.append((latents.float() * pool.std + pool.mean).half().cpu().numpy())
    with replacing(path) as partial:
        np.savez(partial, latents=np.concatenate(made), videos=pool.arrays["video"].cpu().numpy())


@torch.no_grad()
def denoise(model: ConceptMaster, batch: Batch, noisy: Tensor, sigmas: Tensor, guidance: float) -> Tensor:
    """Where the model's guided Euler steps lead: noisy [B,Cz,F,H,W] at sigmas [B,0] -> the same at
    sigmas[:, -1]. sigmas [B,m+1]."""
    text = model.text_encoder(batch.token_ids, batch.token_mask)
    # The empty caption is its end token alone, which ends every caption.
    nothing, empty = torch.zeros_like(batch.token_ids), torch.zeros_like(batch.token_mask)
    nothing[:, :1] = batch.token_ids.gather(1, batch.token_mask.sum(1, keepdim=True) - 1)
    empty[:, 0] = True
    concepts = model.concepts(batch.pixels, batch.label_ids, batch.label_mask)
    mask = torch.cat([torch.zeros_like(batch.concept_mask), batch.concept_mask])
    told = torch.cat([model.text_encoder(nothing, empty), text]), torch.cat([concepts, concepts])
    kv = model.transformer.condition(*told, mask)
    x = noisy
    for now, following in zip(sigmas.T[:-1], sigmas.T[1:], strict=True):
        velocity = model.transformer.denoise(torch.cat([x, x]), now.repeat(2) * 1000.0, kv, mask).float()
        without, asked = velocity.chunk(2)
        velocity = without + guidance * (asked - without)
        x = x + (following - now)[:, None, None, None, None] * velocity
    return x


def polish(output: Path, redone: Path, options: PolishOptions) -> None:
    """Train the network of ``output/vae.safetensors`` on what ``redo`` wrote; resumes."""
    with np.load(redone) as file:
        made, true = (torch.from_numpy(file[name]).to(options.device) for name in ("latents", "videos"))

    def loss(vae: BlockVAE, rng: np.random.Generator) -> Tensor:
        return drawing_loss(vae, *_batch(rng, made, true, vae, options.batch_size))

    fit(output, "polish", loss, options, phase="polish")


def _batch(
    rng: np.random.Generator, latents: Tensor, videos: Tensor, vae: BlockVAE, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Raw latent frames and the ones before, [size,Cz,H,W] each; what to draw, [size,3,t,sH,sW]."""
    clips, frames = random_frames(rng, videos, vae.frames, size)
    pair = frames_of(videos, clips, frames, vae.frames)
    made = (latents[clips, :, each].float() for each in ((frames - 1).clamp(min=0), frames))
    true = torch.from_numpy(rng.random(size) < TRUE).to(latents.device)[:, None, None, None]
    before, now = (torch.where(true, a, b) for a, b in zip(vae.project(pair).unbind(2), made, strict=True))
    return now, before, pair[:, :, vae.frames :]
