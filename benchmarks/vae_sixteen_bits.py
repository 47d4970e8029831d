"""How far Wan's decoder in 16 bits is from float32. No GPU is needed.

    python -m conceptmaster.benchmarks.vae_sixteen_bits [--write]

A decoder of Wan2.1's form, narrow and with random weights, decodes white noise by the modules of the torch
backend (engine/vae/wan_fused.py). Its last convolution is scaled so that frames fill their range. Nothing is
timed. `--write` also writes benchmarks/results/vae-sixteen-bits.json.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from conceptmaster.engine.presets import preset
from conceptmaster.engine.vae.wan_decoder import build_vae
from conceptmaster.engine.vae.wan_fused import fused_modules

from .reports import RESULTS, commit, machine, write

WIDTH, SIDE, LATENTS, CHANNELS = 12, 192, 2, 4
"""Of the narrowest layer; of a frame in pixels, more than MS-SSIM's 11 pixels on five scales need; latent
frames; latent channels."""
DEVIATION = 0.24
"""Of the frames, which lie in 0 to 1."""
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of MS-SSIM's scales (Wang, Simoncelli and Bovik 2003)."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="How far Wan's decoder in 16 bits is from float32.")
    parser.add_argument("--write", action="store_true", help="write the report")
    arguments = parser.parse_args()
    report = {
        "what": f"Wan2.1's decoder, width {WIDTH}, random weights, {SIDE}x{SIDE}, {1 + 4 * (LATENTS - 1)} "
        "frames of white noise; against float32",
        "command": "python -m conceptmaster.benchmarks.vae_sixteen_bits --write",
        "commit": commit(),
        "machine": machine(("torch", "diffusers")),
        "seeds": {str(seed): errors(seed) for seed in (0, 1)},
    }
    print(json.dumps(report["seeds"], indent=1))
    if arguments.write:
        write(report, RESULTS / "vae-sixteen-bits.json")


def errors(seed: int) -> dict[str, dict[str, float]]:
    """By dtype: MS-SSIM, and the largest and mean difference in grey levels of 255."""
    torch.manual_seed(seed)
    vae = _vae()
    latents = torch.randn(1, CHANNELS, LATENTS, SIDE // 8, SIDE // 8)
    last = vae.decoder.conv_out
    last.bias.data.zero_()
    last.weight.data.mul_(DEVIATION / float(_frames(vae, latents, torch.float32).std()))
    exact = _frames(vae, latents, torch.float32)
    found = {}
    for dtype in (torch.float16, torch.bfloat16):
        frames = _frames(vae, latents, dtype)
        difference = 255 * (frames - exact).abs()
        found[str(dtype).removeprefix("torch.")] = {
            "ms_ssim": round(ms_ssim(frames, exact), 7),
            "largest_grey_levels": round(float(difference.max()), 2),
            "mean_grey_levels": round(float(difference.mean()), 3),
        }
    return found


def ms_ssim(one: Tensor, other: Tensor) -> float:
    """Multi-scale structural similarity of frames [n,H,W,3] in 0..1 (Wang, Simoncelli and Bovik 2003)."""
    one, other = (frames.permute(0, 3, 1, 2).double() for frames in (one, other))
    bell = torch.exp(-((torch.arange(11).double() - 5) ** 2) / (2 * 1.5**2))
    window = (bell[:, None] * bell / bell.sum() ** 2).expand(3, 1, 11, 11)

    def mean(frames: Tensor) -> Tensor:
        return F.conv2d(frames, window, groups=3)

    product = 1.0
    for weight in SCALES:
        a, b = mean(one), mean(other)
        spread = mean(one**2) - a**2 + mean(other**2) - b**2
        structure = (2 * (mean(one * other) - a * b) + 0.03**2) / (spread + 0.03**2)
        if weight == SCALES[-1]:
            structure = structure * (2 * a * b + 0.01**2) / (a**2 + b**2 + 0.01**2)
        product *= max(float(structure.mean()), 0.0) ** weight
        one, other = F.avg_pool2d(one, 2), F.avg_pool2d(other, 2)
    return product


def _vae() -> Any:
    narrow = {
        "base_dim": WIDTH,
        "z_dim": CHANNELS,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.0] * CHANNELS,
        "latents_std": [1.0] * CHANNELS,
        "patch_size": None,
        "in_channels": 3,
        "out_channels": 3,
        "scale_factor_spatial": 8,
        "scale_factor_temporal": 4,
    }
    tiny = preset("tiny")
    return build_vae(dataclasses.replace(tiny, height=SIDE, width=SIDE, vae=tiny.vae | narrow))


@torch.inference_mode()
def _frames(vae: Any, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Frames [n,H,W,3] in 0..1, float32."""
    decoder = cast("Any", fused_modules(copy.deepcopy(vae), ("decode",), dtype)["decode"])
    frames, *_ = decoder(latents.to(dtype))
    return frames.float()


if __name__ == "__main__":
    main()
