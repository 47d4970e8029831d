"""Train the world's VAE: diffusers' ``AutoencoderKLWan``, small, on drawn clips.

The networks are called directly with their causal caches, the first frame and then the rest, because
``decode()`` clamps its output and a clamped pixel has no gradient. Noise of fixed size on the latents and a
small pull towards zero keep them smooth, as the KL term does.
"""

from __future__ import annotations

import json
import math
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

from .learning import Average, MuonAdamW, gradient_norm, load_checkpoint, save_checkpoint, schedule
from .pool import open_shard, shards

LATENT_NOISE = 0.1
PULL = 1e-3


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
    return torch.from_numpy(video).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0)


def _crops(rng: np.random.Generator, pool: list[np.ndarray], batch: int, frames: int, size: int) -> Tensor:
    out = np.empty((batch, frames, size, size, 3), np.uint8)
    for b in range(batch):
        video = pool[rng.integers(len(pool))]
        k, f = rng.integers(len(video)), rng.integers(video.shape[1] - frames + 1)
        y, x = (rng.integers(video.shape[axis] - size + 1) for axis in (2, 3))
        out[b] = video[k, f : f + frames, y : y + size, x : x + size]
    return to_tensor(out)


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, videos: np.ndarray) -> float:
    """Mean PSNR in dB over whole clips uint8 [n, F, H, W, 3]."""
    values = []
    for k in range(0, len(videos), 4):
        x = to_tensor(videos[k : k + 4]).to(next(vae.parameters()).device)
        error = (decode(vae, encode(vae, x)).clamp(-1, 1) - x).square().mean((1, 2, 3, 4)) / 4
        values += (-10 * torch.log10(error)).tolist()
    return float(np.mean(values))


def train_vae(
    config: dict[str, Any],
    data: Path,
    output: Path,
    *,
    seconds: float,
    seed: int = 0,
    device: str = "cpu",
    lr: float = 0.01,
) -> None:
    """Train for about ``seconds`` of computation (resumes from ``output/vae-training.safetensors``).

    Writes ``vae.safetensors`` (averaged weights) with ``vae.json`` (configuration with the latents'
    statistics) and appends one JSON line a minute to ``vae-log.jsonl``. Single frames come first, then clips
    of nine frames.
    """
    torch.manual_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKLWan.from_config(config)
    initialise(vae)
    vae.to(device)
    optimizer = MuonAdamW(vae.named_parameters(), lr=lr, adam_lr=2e-3)
    average = Average(vae, 0.998)
    checkpoint = output / "vae-training.safetensors"
    progress = {"seconds": 0.0, "step": 0.0}
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, vae, average, optimizer)
    held_out = np.asarray(open_shard(shards(data)[0]).video[:24])
    rng = np.random.default_rng(seed + int(progress["step"]))
    bar = tqdm(total=round(seconds), initial=round(progress["seconds"]), desc="vae", unit="s")
    last_log, known = progress["seconds"], 0
    pool: list[np.ndarray] = []
    while progress["seconds"] < seconds:
        start = time.perf_counter()
        if int(progress["step"]) % 200 == 0 or not pool:
            folders = shards(data)[1:]
            if len(folders) > known:
                pool, known = [open_shard(folder).video for folder in folders], len(folders)
        done = progress["seconds"] / seconds
        optimizer.set_scale(schedule(done))
        x = _crops(rng, pool, 8, 1, 64) if done < 0.1 else _crops(rng, pool, 8, 9, 32)
        x = x.to(device)
        with torch.autocast(x.device.type, torch.bfloat16):
            latents = encode(vae, x)
            y = decode(vae, latents + LATENT_NOISE * torch.randn_like(latents))
        difference, latents = y.float() - x, latents.float()
        loss = difference.abs().mean() + 0.5 * difference.square().mean() + PULL * latents.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradient_norm(vae.parameters(), 1.0)
        optimizer.step()
        average.update(vae)
        spent = time.perf_counter() - start
        progress["seconds"] += spent
        progress["step"] += 1
        bar.n = round(progress["seconds"])
        bar.set_postfix(loss=f"{float(loss):.4f}", step=int(progress["step"]), refresh=False)
        bar.update(0)
        if progress["seconds"] - last_log > 60 or progress["seconds"] >= seconds:
            last_log = progress["seconds"]
            trained = {k: v.clone() for k, v in vae.state_dict().items()}
            vae.load_state_dict(average.shadow)
            record = progress | {"loss": float(loss), "psnr": psnr(vae, held_out)}
            vae.load_state_dict(trained)
            with (output / "vae-log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            tqdm.write(json.dumps(record))
            save_checkpoint(checkpoint, vae, average, optimizer, progress)
    bar.close()
    vae.load_state_dict(average.shadow)
    finish_vae(vae, data, output)


@torch.no_grad()
def finish_vae(vae: AutoencoderKLWan, data: Path, output: Path) -> None:
    """Measure the latents' mean and deviation per channel and write ``vae.safetensors`` and ``vae.json``."""
    parts = []
    device = next(vae.parameters()).device
    for folder in shards(data)[:4]:
        for k in range(0, 100, 10):
            parts.append(
                encode(vae, to_tensor(np.asarray(open_shard(folder).video[k : k + 10])).to(device)).cpu()
            )
    latents = torch.cat(parts)
    mean, deviation = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    if not math.isfinite(float(deviation.min())) or float(deviation.min()) < 1e-4:
        raise ValueError(f"a latent channel is dead (deviations {deviation.tolist()}); train the VAE again")
    config = {k: v for k, v in vae.config.items() if not k.startswith("_")}
    config |= {"latents_mean": mean.tolist(), "latents_std": deviation.tolist()}
    save(output / "vae.safetensors", vae.state_dict())
    (output / "vae.json").write_text(json.dumps(config, indent=1))


def load_vae(folder: Path) -> AutoencoderKLWan:
    """The VAE that ``finish_vae`` wrote. Raises FileNotFoundError where there is none yet."""
    vae = AutoencoderKLWan.from_config(json.loads((folder / "vae.json").read_text()))
    load_strict(vae, load(folder / "vae.safetensors")[0])
    return vae.eval()


def polish_decoder(
    data: Path,
    output: Path,
    *,
    seconds: float,
    seed: int = 1,
    device: str = "cpu",
    lr: float = 0.008,
    batch: int = 3,
) -> None:
    """Train the decoder alone on whole clips; latents stay what they are, so the model may train beside it.

    Clips of nine frames leave the causal state unused to longer ones: colours drift towards the end. Takes
    latents from the encoded pool, writes ``vae.safetensors`` again once a minute, resumes from
    ``polish.safetensors``.
    """
    torch.manual_seed(seed)
    vae = load_vae(output).to(device)
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    for module in (vae.encoder, vae.quant_conv):
        module.requires_grad_(False)
    optimizer = MuonAdamW(vae.named_parameters(), lr=lr, adam_lr=1e-3)
    average = Average(vae, 0.995)
    checkpoint, progress = output / "polish.safetensors", {"seconds": 0.0, "step": 0.0}
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, vae, average, optimizer)
    folders = [f for f in shards(data) if (f / "latents.npy").exists()]
    held_out, pool = np.asarray(open_shard(folders[0]).video[:24]), [open_shard(f) for f in folders[1:]]
    latents = [np.load(f / "latents.npy", mmap_mode="r") for f in folders[1:]]
    bar, last_log = tqdm(total=round(seconds), desc="decoder", unit="s"), progress["seconds"]
    while progress["seconds"] < seconds:
        start = time.perf_counter()
        rng = np.random.Generator(np.random.Philox(key=[seed, int(progress["step"])]))
        picks = [(int(rng.integers(len(pool))), int(rng.integers(len(pool[0].video)))) for _ in range(batch)]
        x = to_tensor(np.stack([pool[s].video[k] for s, k in picks])).to(device)
        z = torch.from_numpy(np.stack([latents[s][k] for s, k in picks]).astype(np.float32)).to(device)
        optimizer.set_scale(schedule(progress["seconds"] / seconds))
        with torch.autocast(x.device.type, torch.bfloat16):
            y = decode(vae, z + LATENT_NOISE * torch.randn_like(z))
        difference = y.float() - x
        loss = difference.abs().mean() + 0.5 * difference.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradient_norm([p for p in vae.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        average.update(vae)
        progress["seconds"] += time.perf_counter() - start
        progress["step"] += 1
        bar.n = round(progress["seconds"])
        bar.update(0)
        if progress["seconds"] - last_log > 90 or progress["seconds"] >= seconds:
            last_log = progress["seconds"]
            trained = {k: v.clone() for k, v in vae.state_dict().items()}
            vae.load_state_dict(average.shadow)
            record = progress | {"phase": "decoder", "loss": float(loss), "psnr": psnr(vae, held_out)}
            save(output / "vae.safetensors", vae.state_dict())
            vae.load_state_dict(trained)
            with (output / "vae-log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            tqdm.write(json.dumps(record))
            save_checkpoint(checkpoint, vae, average, optimizer, progress)
    bar.close()
    vae.load_state_dict(average.shadow)
    for name in before:
        if name.startswith(("encoder.", "quant_conv.")) and not torch.equal(
            before[name], vae.state_dict()[name]
        ):
            raise AssertionError(f"{name} changed while only the decoder was to learn")
    save(output / "vae.safetensors", vae.state_dict())
