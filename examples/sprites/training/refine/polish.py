"""Train the VAE's network on latents that the model made, so that it mends the model's faults too.

Training clips are noised part of the way and denoised again by the model, guided as it will be: what comes
back is still the same clip, but with the model's own smears around it. The network learns to draw the true
frames from these, and from true latents as before. Only the decoder changes: the model need not know.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from conceptmaster.engine.checkpoints.safetensors_io import load_model
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.engine.vae.block_vae import BlockVAE

from ...arguments import check_counts, check_trained, guidance_of
from ...world.vocabulary import build_tokenizer
from ..attention import cheapest_attention
from ..batches import Dropped, LatentPool
from ..learning import autocast
from ..pool import open_shard
from ..train_vae import Fit, drawing_loss, fit, frames_of, random_frames
from .distil import teach

SIGMAS = (0.4, 0.85)
"""Noise levels to denoise again from: below them nothing is lost, above another clip comes back."""
SUBSTEPS = 5
TRUE = 0.4
"""Share of true latents in a batch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``polish``."""
    parser.add_argument("--weights", required=True, type=Path, help="weights folder of the trained model")
    parser.add_argument("--data", required=True, type=Path, help="folder that `train --output` has filled")
    parser.add_argument("--output", required=True, type=Path, help="folder for checkpoints and weights")
    parser.add_argument("--clips", type=int, default=1600, help="clips to denoise again (1600)")
    parser.add_argument("--steps", type=int, default=1500, help="steps of training (1500)")
    parser.add_argument("--batch-size", type=int, default=16, help="latent frames in a step (16)")
    parser.add_argument("--guidance", type=float, help="of the denoising (the model's default)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (one per core)")


def run(args: argparse.Namespace) -> int:
    """Denoise, train, and write a weights folder; returns 0. Raises InputError for what cannot work."""
    check_counts(args, "clips", "steps", "batch_size")
    check_trained(args.weights, args.data)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    model = load_model(args.weights / "model.safetensors").to(args.device)
    redone = args.output / "redone.npz"
    if not redone.exists():
        guidance = guidance_of(args.weights, args.guidance)
        redo(model, args.data / "clips", redone, clips=args.clips, guidance=guidance, seed=args.seed)
    if not (args.output / "polish-training.safetensors").exists():
        shutil.copyfile(args.weights / "vae.safetensors", args.output / "vae.safetensors")
    (args.output / "vae.json").write_text(json.dumps(model.config.vae, indent=1))
    polish(
        args.data / "clips",
        args.output,
        redone,
        steps=args.steps,
        seed=args.seed,
        device=args.device,
        batch_size=args.batch_size,
    )
    weights = args.output / "weights"
    shutil.copytree(args.weights, weights, dirs_exist_ok=True)
    shutil.copyfile(args.output / "vae.safetensors", weights / "vae.safetensors")
    print(f"weights: {weights}")
    return 0


def redo(
    model: ConceptMaster, data: Path, path: Path, *, clips: int, guidance: float, seed: int, batch: int = 32
) -> None:
    """Write raw latents float16 [clips,Cz,F,H,W] of clips denoised again, and which these are (shard, clip).

    The first shard, which judges, is left out.
    """
    config, device = model.config, next(model.parameters()).device
    pool = LatentPool(data, build_tokenizer(), config.text_tokens, config.concept.label_tokens)
    pool.normalise(config.vae["latents_mean"], config.vae["latents_std"])
    rng, made, picked = np.random.default_rng(seed), [], []
    for _ in tqdm(range(-(-clips // batch)), desc="denoise"):
        chosen = rng.integers(1, len(pool.shards), size=batch)
        picks = [(int(s), int(rng.integers(len(pool.shards[s].captions)))) for s in chosen]
        b = pool.collate(picks, rng, Dropped(0, 0, 0)).to(str(device))
        noise = torch.from_numpy(rng.standard_normal(b.latents.shape, np.float32)).to(device)
        start = torch.from_numpy(rng.uniform(*SIGMAS, size=(batch, 1)).astype(np.float32)).to(device)
        sigmas = start * torch.linspace(1, 0, SUBSTEPS + 1, device=device)
        level = start[:, :, None, None, None]
        with cheapest_attention(str(device)), autocast(str(device)):
            latents = teach(model, b, (1 - level) * b.latents + level * noise, sigmas, guidance)
        made.append((latents.float().cpu().numpy() * pool.std + pool.mean).astype(np.float16))
        picked += [(int(pool.shards[s].folder.name.removeprefix("shard-")), k) for s, k in picks]
    partial = path.with_name(f".{path.name}.tmp.npz")
    np.savez(partial, latents=np.concatenate(made)[:clips], picks=np.array(picked)[:clips])
    partial.rename(path)


def polish(
    data: Path,
    output: Path,
    redone: Path,
    *,
    steps: int,
    seed: int = 0,
    device: str = "cpu",
    batch_size: int = 16,
    lr: float = 0.01,
    log_every: int = 100,
) -> None:
    """Train the network of ``output/vae.safetensors`` to ``steps`` on the latents of ``redo``; resumes."""
    with np.load(redone) as file:
        latents, picks = file["latents"], file["picks"]
    videos = np.stack([open_shard(data / f"shard-{s:05d}").video[k] for s, k in picks])
    made, true = (torch.from_numpy(array).to(device) for array in (latents, videos))

    def loss(vae: BlockVAE, rng: np.random.Generator) -> Tensor:
        return drawing_loss(vae, *_batch(rng, made, true, vae, batch_size))

    settings = Fit(steps, seed, device, log_every, lr, adam_lr=1e-3, decay=0.99)
    fit(data, output, "polish", loss, settings, about={"phase": "polish"})


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
