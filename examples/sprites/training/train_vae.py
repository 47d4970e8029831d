"""The world's VAE (engine/vae/block_vae.py): its components by analysis, its decoder's network by training.

The latents are known after the analysis, so the network, and the model, train at the same time. Component k
is scaled to the deviation (variance_k / variance_0)^(1/4): between whitening, where noise-like detail counts
as much as colour, and plain projection, where detail hardly counts at all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conceptmaster.engine.checkpoints.safetensors_io import load, load_strict, save
from conceptmaster.engine.vae.block_vae import BlockVAE

from ..arguments import check_counts, check_seed, option
from .clip_arrays import draw_videos
from .learning import Average, MuonAdamW, autocast
from .loop import LoopOptions, log_to, random_of, train
from .noising import normal

LATENT_NOISE = 0.05
"""Largest deviation of the noise on the latents that the network learns from: a model's are not exact."""
CLIPS, ANALYSED, JUDGED = 1024, 512, 24
"""Clips that the network learns from, clips that the components are found in, and held-out clips over which
PSNR is measured."""


def new_vae(config: dict[str, Any]) -> BlockVAE:
    """A BlockVAE of a configuration's `vae` whose network still adds nothing: it decodes linearly."""
    vae = BlockVAE(**{name: value for name, value in config.items() if name != "kind"})
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
            if name.endswith("conv2"):
                module.weight.data.mul_(0.3)
    torch.nn.init.zeros_(vae.conv_out.weight)
    return vae


@torch.no_grad()
def analyse(vae: BlockVAE, videos: Tensor) -> None:
    """Set mean, basis and scale to the principal components of clips, uint8 [n,F,sH,sW,3], on the CPU."""
    size = vae.basis.shape[1]
    total, products, count = torch.zeros(size).double(), torch.zeros(size, size).double(), 0
    for clip in videos.split(1):
        video = from_bytes(clip)
        whole = torch.cat([video[:, :, :1]] * (vae.frames - 1) + [video], dim=2)
        blocks = vae.cut(whole).reshape(-1, size).double()
        total += blocks.sum(0)
        products += blocks.T @ blocks
        count += len(blocks)
    mean = total / count
    variance, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    order = torch.arange(size - 1, size - 1 - len(vae.basis), -1)
    basis, variance = vectors[:, order].T, variance[order]
    vae.mean.copy_(mean)
    # A vector's sign is free: fixed, so that the same clips give the same latents on every machine.
    vae.basis.copy_(basis * torch.sign(basis.sum(1, keepdim=True)))
    vae.scale.copy_((variance * variance[0]) ** -0.25)


def from_bytes(video: Tensor) -> Tensor:
    """uint8 [B, F, H, W, 3] to float [B, 3, F, H, W] in -1..1, where it is."""
    return video.permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0)


@torch.no_grad()
def psnr(vae: BlockVAE, videos: np.ndarray) -> float:
    """Mean PSNR in dB over clips uint8 [n, F, H, W, 3], each through encoder and decoder."""
    values = []
    for k in range(0, len(videos), 4):
        x = from_bytes(torch.from_numpy(videos[k : k + 4])).to(vae.device)
        error = (vae.decode(vae.encode(x)).clamp(-1, 1) - x).square().mean((1, 2, 3, 4)) / 4
        values += (-10 * torch.log10(error)).tolist()
    return float(np.mean(values))


def random_frames(rng: np.random.Generator, videos: Tensor, t: int, batch: int) -> tuple[Tensor, Tensor]:
    """Random clips and latent frames of ``videos`` [n,F,H,W,3]: their numbers, int64 [batch] each."""
    count = 1 + (videos.shape[1] - 1) // t
    numbers = rng.integers(len(videos), size=batch), rng.integers(count, size=batch)
    clips, frames = (torch.from_numpy(each).to(videos.device) for each in numbers)
    return clips, frames


def frames_of(videos: Tensor, clips: Tensor, frames: Tensor, t: int) -> Tensor:
    """The 2t video frames that a latent frame and the one before stand for, float [batch,3,2t,sH,sW] in
    -1..1; a clip's first video frame stands for all before it.

    ``videos`` uint8 [n,F,sH,sW,3]; ``clips`` and ``frames`` [batch]: which clips, and which latent frames.
    """
    those = (t * frames[:, None] + torch.arange(1 - 2 * t, 1, device=frames.device)).clamp(min=0)
    return from_bytes(videos[clips[:, None], those])


@dataclass(frozen=True)
class VAEOptions:
    """How the decoder's network is trained. lr: Muon's, AdamW takes a tenth of it; decay: of the averaged
    weights. Raises InputError."""

    steps: int = option(1500, "steps of training")
    batch_size: int = option(16, "latent frames in a step")
    seed: int = option(0, "of clips and batches")
    device: str = "cpu"
    lr: float = 0.02
    decay: float = 0.995
    log_every: int = 200

    def __post_init__(self) -> None:
        check_counts(self, "steps", "batch_size", "log_every")
        check_seed(self.seed)


def train_vae(output: Path, options: VAEOptions) -> None:
    """Train the decoder's network, that of ``output/vae.safetensors``, on drawn clips.

    Resumes from ``output/vae-training.safetensors``, to the same weights. Writes ``vae.safetensors`` again,
    averaged, every ``log_every`` steps, and lines in ``vae-log.jsonl``. Components, and so latents, stay what
    they are. Raises CheckpointError for a checkpoint that cannot be read.
    """
    videos = draw_videos(CLIPS, options.device)
    torch.manual_seed(options.seed)
    vae = load_vae(output).train().to(options.device)
    held_out = draw_videos(JUDGED, options.device, held_out=True).cpu().numpy()

    def losses_of(step: int) -> dict[str, Tensor]:
        rng = random_of(options.seed, step)
        drawn = random_frames(rng, videos, vae.frames, options.batch_size)
        return {"total": _loss(vae, frames_of(videos, *drawn, vae.frames), rng)}

    def publish(steps: int) -> dict[str, float]:
        write_vae(vae, output, json.loads((output / "vae.json").read_text()))
        return {"psnr": psnr(vae, held_out)}

    train(
        vae,
        MuonAdamW(vae.named_parameters(), options.lr, options.lr / 10),
        losses_of,
        LoopOptions("vae", options.steps, limit=1.0, log_every=options.log_every),
        log=log_to(output / "vae-log.jsonl"),
        average=Average(vae, options.decay),
        checkpoint=output / "vae-training.safetensors",
        publish=publish,
    )


def _loss(vae: BlockVAE, video: Tensor, rng: np.random.Generator) -> Tensor:
    """``drawing_loss`` of the later latent frame, from latents with a little noise; video [B,3,2t,sH,sW]."""
    latents = vae.project(video)  # [B,Cz,2,H,W]
    noise = normal(rng, tuple(latents.shape), str(video.device))
    level = torch.from_numpy(rng.random((len(latents), 1, 1, 1, 1), np.float32)).to(video.device)
    before, now = (latents + LATENT_NOISE * level * noise).unbind(2)
    return drawing_loss(vae, now, before, video[:, :, vae.frames :])


def drawing_loss(vae: BlockVAE, now: Tensor, before: Tensor, frames: Tensor) -> Tensor:
    """Mean absolute and half the squared error of a drawn latent frame: raw latents [B,Cz,H,W] of it and of
    the one before, and what they should show, [B,3,t,sH,sW]."""
    with autocast(str(frames.device)):
        drawn = vae.decode_frame(now, before)
    difference = drawn.float().permute(0, 4, 1, 2, 3) - frames
    return difference.abs().mean() + 0.5 * difference.square().mean()


def write_vae(vae: BlockVAE, output: Path, config: dict[str, Any]) -> None:
    """Write ``vae.safetensors`` and, as ``vae.json``, the configuration's ``vae`` entry."""
    output.mkdir(parents=True, exist_ok=True)
    save(output / "vae.safetensors", vae.state_dict())
    (output / "vae.json").write_text(json.dumps(config, indent=1))


def load_vae(folder: Path, config: dict[str, Any] | None = None) -> BlockVAE:
    """The VAE that ``write_vae`` wrote, or the one of a weights folder, whose configuration is given. Raises
    FileNotFoundError where there is none, WeightsError."""
    vae = new_vae(json.loads((folder / "vae.json").read_text()) if config is None else config)
    load_strict(vae, load(folder / "vae.safetensors")[0])
    return vae.eval()
