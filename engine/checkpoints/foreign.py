"""Layouts of weights that people have and that are not read: each is told as what it is, and what to take."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from ...errors import WeightsError
from .safetensors_io import refuse_pickle
from .weight_files import read_header

WAN_NAMES = re.compile(r"((model\.)?(diffusion_model\.)?)blocks\.\d+\.(self|cross)_attn\.[qkvo]\..*")
"""Tensors of a transformer as Wan's own code, and ComfyUI, name them."""
GGUF, COMFYUI = "a GGUF file", "a single file with Wan's own names, as ComfyUI has it"
ORIGINAL = ("Wan2.*_VAE.pth", "models_t5_*.pth", "models_clip_*.pth", "google/umt5*")
"""What lies in the folder of a release of Wan's own, beside its transformer."""


def refuse_foreign(path: Path) -> None:
    """Raises WeightsError, one short line, for a place that is not there, for a file, and for a folder in a
    layout that is known and not read."""
    try:
        there, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError):  # a name too long, or with a null byte
        there = is_folder = False
    if not there:
        raise WeightsError(
            f"there is nothing at {str(path)!r:.200}: give a folder, preset:NAME, or OWNER/NAME of the Hub"
        )
    if not is_folder:
        raise WeightsError(f"{path} is {_kind(path)}, which is not read: take {_instead(path)}")
    files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    if any(True for pattern in ORIGINAL for _ in path.glob(pattern)):
        raise WeightsError(f"{path} is in Wan's original layout, which is not read: take {_instead(path)}")
    for file in files:
        refuse_pickle(file)
    if not (path / "model.safetensors").exists():
        kinds = [_kind(file) for file in files if file.suffix in (".safetensors", ".gguf")]
        if known := sorted({GGUF, COMFYUI} & set(kinds)):
            raise WeightsError(f"{path} has {known[0]}, which is not read: take {_instead(path)}")


def refuse_wan_names(part: Path, names: Collection[str]) -> None:
    """Raises WeightsError where a part in diffusers' layout holds tensors under Wan's own names."""
    if any(WAN_NAMES.fullmatch(name) for name in names):
        raise WeightsError(
            f"{part} has the names of Wan's original layout or ComfyUI's, not diffusers': take "
            f"{_instead(part.parent)}"
        )


def _kind(path: Path) -> str:
    """What a file is, in words."""
    refuse_pickle(path)
    if path.suffix == ".gguf":
        return GGUF
    if path.suffix != ".safetensors":
        return "a file"
    if any(WAN_NAMES.fullmatch(name) for name in read_header(path)):
        return COMFYUI
    return "a single safetensors file"


def _instead(path: Path) -> str:
    """What to take: the release in diffusers' layout, by its name where the path tells which it is."""
    found = re.search(r"wan2[._]1[-_](t2v|i2v|flf2v)[-_](1\.?3b|14b)(?:[-_](480p|720p))?", str(path).lower())
    if found is None:
        return "a folder in diffusers' layout (of Wan's releases, those that end in -Diffusers)"
    size = f"-{found[3].upper()}" if found[3] else ""
    return f"Wan-AI/Wan2.1-{found[1].upper()}-{found[2].upper()}{size}-Diffusers"
