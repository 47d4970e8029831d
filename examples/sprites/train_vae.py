"""Train the world's VAE: diffusers' ``AutoencoderKLWan``, small, on drawn clips, one half after the other.

The latents are given: ``components`` says what they are. So the decoder learns to draw a clip from its
components, and the encoder, which nothing shipped needs, to tell a clip's components; neither waits for the
other, and the model may train on the same latents at the same time.

The networks are called directly with their causal caches, the first frame and then the rest, because
``decode()`` clamps its output and a clamped pixel has no gradient.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch import Tensor
from tqdm import tqdm

from conceptmaster.engine.weights import load, load_strict, save

from .components import Components
from .learning import Average, MuonAdamW, gradient_norm, load_checkpoint, save_checkpoint, schedule
from .pool import open_shard, shards

LATENT_NOISE = 0.03
"""Deviation of the noise on the latents that the decoder learns from: a model's latents are not exact."""
WHOLE = 0.7
"""Share of the training after which whole clips take the place of crops."""
PARTS = {"decoder": ("decoder", "post_quant_conv"), "encoder": ("encoder", "quant_conv")}
KEPT_SHARDS = 16
"""Shards of a pool that are read into memory, 104 MB each."""


def initialise(vae: AutoencoderKLWan) -> None:
    """Kaiming-normal convolutions, each residual block's second one small: learns decibels faster than the
    default."""
    for name, module in vae.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
            if name.endswith("conv2"):
                module.weight.data.mul_(0.3)


def encode(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Mean latents [B, z, f, h, w], not normalised, of video [B, 3, F, H, W] in -1..1."""
    patch = vae.config.patch_size
    x = patchify(video, patch) if patch else video
    vae.clear_cache()
    parts = []
    for chunk in (x[:, :, :1], x[:, :, 1:]):
        if chunk.shape[2]:
            vae._enc_conv_idx = [0]
            parts.append(vae.encoder(chunk, feat_cache=vae._enc_feat_map, feat_idx=vae._enc_conv_idx))
    return vae.quant_conv(torch.cat(parts, 2)).chunk(2, dim=1)[0]


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Video [B, 3, F, H, W], not clamped, of latents [B, z, f, h, w]."""
    x = vae.post_quant_conv(latents)
    vae.clear_cache()
    parts = []
    for first, chunk in ((True, x[:, :, :1]), (False, x[:, :, 1:])):
        if chunk.shape[2]:
            vae._conv_idx = [0]
            parts.append(
                vae.decoder(chunk, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=first)
            )
    video = torch.cat(parts, 2)
    patch = vae.config.patch_size
    return unpatchify(video, patch) if patch else video


def to_tensor(video: np.ndarray) -> Tensor:
    """uint8 [B, F, H, W, 3] to float [B, 3, F, H, W] in -1..1."""
    return torch.from_numpy(np.array(video)).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0)


def _batch(rng: np.random.Generator, pool: list[np.ndarray], whole: bool) -> Tensor:
    """One whole clip, or as many pixels in four crops of all its frames: [B,3,F,H,W] in -1..1."""
    if whole:
        video = pool[rng.integers(len(pool))]
        return to_tensor(video[rng.integers(len(video))][None])
    crops = []
    for _ in range(4):
        video = pool[rng.integers(len(pool))]
        clip = video[rng.integers(len(video))]
        y, x = (rng.integers(side - side // 2 + 1) for side in clip.shape[1:3])
        crops.append(clip[:, y : y + clip.shape[1] // 2, x : x + clip.shape[2] // 2])
    return to_tensor(np.stack(crops))


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, videos: np.ndarray, components: Components | None = None) -> float:
    """Mean PSNR in dB over whole clips uint8 [n, F, H, W, 3] through encoder and decoder; with ``components``
    through these and the decoder."""
    values = []
    for k in range(0, len(videos), 4):
        x = to_tensor(videos[k : k + 4]).to(next(vae.parameters()).device)
        latents = encode(vae, x) if components is None else components.encode(x)
        error = (decode(vae, latents).clamp(-1, 1) - x).square().mean((1, 2, 3, 4)) / 4
        values += (-10 * torch.log10(error)).tolist()
    return float(np.mean(values))


def train_vae(
    part: str,
    config: dict[str, Any],
    data: Path,
    output: Path,
    *,
    steps: int,
    seed: int = 0,
    device: str = "cpu",
    lr: float = 0.025,
    log_every: int = 200,
) -> None:
    """Train one of ``PARTS`` to ``steps``; resumes from ``output/PART.safetensors`` to the same weights.

    Takes ``components.safetensors`` from ``output``. Every ``log_every`` steps it writes ``vae.safetensors``
    (averaged weights; the other part as it is found) and ``vae.json`` (configuration) there and appends a
    line to ``vae-log.jsonl``. Raises CheckpointError for a checkpoint that cannot be read.
    """
    torch.manual_seed(seed)
    components = Components.load(output).to(device)
    vae = AutoencoderKLWan.from_config(config)
    initialise(vae)
    if (output / "vae.safetensors").exists():
        load_strict(vae, load(output / "vae.safetensors")[0])
    vae.to(device)
    for name, p in vae.named_parameters():
        p.requires_grad_(name.startswith(PARTS[part]))
    optimizer = MuonAdamW(vae.named_parameters(), lr=lr, adam_lr=2e-3)
    average = Average(vae, 0.995)
    checkpoint, progress = output / f"{part}.safetensors", {"seconds": 0.0, "step": 0.0}
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, vae, average, optimizer)
    loss_of = {"decoder": _decoder_loss, "encoder": _encoder_loss}[part]
    folders = shards(data)
    held_out = np.asarray(open_shard(folders[0]).video[:24])
    pool = [np.load(folder / "video.npy") for folder in folders[1 : 1 + KEPT_SHARDS]]
    bar = tqdm(total=steps, initial=int(progress["step"]), desc=part)
    while progress["step"] < steps:
        start, step = time.perf_counter(), int(progress["step"])
        rng = np.random.Generator(np.random.Philox(key=[seed, step]))
        x = _batch(rng, pool, step >= WHOLE * steps).to(device)
        optimizer.set_scale(schedule(step / steps))
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = loss_of(vae, components, x, rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradient_norm([p for p in vae.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        average.update(vae)
        progress["seconds"] += time.perf_counter() - start
        progress["step"] += 1
        bar.update(1)
        if (step + 1) % log_every == 0 or step + 1 == steps:
            trained = {k: v.clone() for k, v in vae.state_dict().items()}
            vae.load_state_dict(average.shadow)
            through = components if part == "decoder" else None
            record = {"part": part, **progress, "loss": float(loss.detach()), "psnr": psnr(vae, held_out, through)}
            write_vae(vae, output)
            vae.load_state_dict(trained)
            save_checkpoint(checkpoint, vae, average, optimizer, progress)
            with (output / "vae-log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            tqdm.write(json.dumps(record))
    bar.close()


def _decoder_loss(
    vae: AutoencoderKLWan, components: Components, x: Tensor, rng: np.random.Generator
) -> Tensor:
    latents = components.encode(x)
    noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32)).to(x.device)
    difference = decode(vae, latents + LATENT_NOISE * noise).float() - x
    return difference.abs().mean() + 0.5 * difference.square().mean()


def _encoder_loss(
    vae: AutoencoderKLWan, components: Components, x: Tensor, _rng: np.random.Generator
) -> Tensor:
    """Squared error of the latents, each component weighted as its variance weighs in pixels."""
    error = (encode(vae, x).float() - components.encode(x)) / components.scale[:, None, None, None]
    return error.square().mean()


def write_vae(vae: AutoencoderKLWan, output: Path) -> None:
    """Write ``vae.safetensors`` and its configuration, ``vae.json``."""
    config = {k: v for k, v in vae.config.items() if not k.startswith("_")}
    save(output / "vae.safetensors", vae.state_dict())
    (output / "vae.json").write_text(json.dumps(config, indent=1))


def load_vae(folder: Path) -> AutoencoderKLWan:
    """The VAE that ``write_vae`` wrote. Raises FileNotFoundError where there is none yet."""
    vae = AutoencoderKLWan.from_config(json.loads((folder / "vae.json").read_text()))
    load_strict(vae, load(folder / "vae.safetensors")[0])
    return vae.eval()
