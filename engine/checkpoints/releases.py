"""Which release of Wan a base is, by its shapes and parts, and how that release is meant to be sampled.

The numbers are those of Wan's own programs (Wan2.1 generate.py, Wan2.2 wan/configs/*.py), for what a layout
leaves open: where diffusers' files say a thing (the scheduler's shift, boundary_ratio), they win. The
programs of MAGREF (generate.py, magref_14B.py), SkyReels-V3 (reference_to_video_pipeline.py,
generate_video.py) and Phantom (generate.py; of its 14B the README's commands) make their schedulers
themselves: there a file says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .base import Base
from .bernini import is_bernini
from .magref import is_magref
from .wan_image_to_video import expands_timesteps, is_vace
from .wan_references import is_phantom, is_v3

NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The caption of what is not wanted that Wan's own programs have (wan/configs/shared_config.py)."""


@dataclass(frozen=True)
class Release:
    """One release's defaults.

    name: in words; shift: of the solver's time, for videos of `size`; guidance: scale, of the first expert
    where there are two; concept_guidance: of the pictures, where these have a branch of their own; branches:
    of guidance where any scale is not 1, None for two; negative: the caption of what is not wanted;
    own_scheduler: whether solver and shift are the release's whatever a scheduler's file says; guidance_2: of
    the second expert, which is the low-noise one; scale_2: what all scales are multiplied with for it where
    it has none of its own; boundary: where the second
    begins, as a fraction of the time; expand_timesteps: each token has a time of its own; fps, size (width
    and height in pixels), frames: of the video.
    """

    name: str
    shift: float
    solver: str = "unipc"
    steps: int = 50
    guidance: float = 5.0
    concept_guidance: float | None = None
    branches: int | None = None
    negative: str = ""
    own_scheduler: bool = False
    guidance_2: float | None = None
    scale_2: float = 1.0
    boundary: float | None = None
    expand_timesteps: bool = False
    fps: float = 16.0
    size: tuple[int, int] = (832, 480)
    frames: int = 81


T2V = Release("Wan2.1 T2V", shift=5.0)
I2V = Release("Wan2.1 I2V", shift=3.0, steps=40)
FLF2V = Release("Wan2.1 FLF2V", shift=16.0)
VACE = Release("Wan2.1 VACE", shift=16.0)
MAGREF = replace(
    I2V, name="MAGREF", solver="unipc_wan", negative="镜头晃动，" + NEGATIVE, own_scheduler=True, fps=15.0
)
V3 = Release(
    "SkyReels-V3 R2V",
    shift=5.0,
    solver="unipc_wan",
    steps=8,
    guidance=1.0,
    branches=3,
    own_scheduler=True,
    fps=24.0,
    size=(1280, 720),
    frames=121,
)
PHANTOM = Release(
    "Phantom 1.3B",
    shift=5.0,
    solver="unipc_wan",
    guidance=7.5,
    concept_guidance=5.0,
    branches=3,
    negative=NEGATIVE,
    own_scheduler=True,
)
PHANTOM_14B = replace(PHANTOM, name="Phantom 14B", fps=24.0, frames=121)
A14B = Release("Wan2.2 A14B", shift=12.0, steps=40, size=(1280, 720))
T2V_A14B = replace(A14B, name="Wan2.2 T2V-A14B", guidance=4.0, guidance_2=3.0, boundary=0.875)
I2V_A14B = replace(A14B, name="Wan2.2 I2V-A14B", shift=5.0, guidance=3.5, guidance_2=3.5, boundary=0.9)
TI2V_5B = Release("Wan2.2 TI2V-5B", shift=5.0, expand_timesteps=True, fps=24.0, size=(1280, 704), frames=121)
TI2V_CHANNELS = 48


BERNINI = Release(
    "Bernini-R 1.3B",
    shift=5.0,
    solver="unipc_wan",
    steps=40,
    guidance=4.0,
    concept_guidance=4.5,
    branches=3,
    negative=NEGATIVE,
    own_scheduler=True,
    size=(848, 480),
)
BERNINI_14B = replace(BERNINI, name="Bernini-R", scale_2=0.8, boundary=0.875)


def release_of(base: Base) -> Release:
    """The release that `base` is, or is most like. Raises WeightsError where it has no transformer."""
    config = base.part("transformer").config
    if is_bernini(base.root):
        return BERNINI_14B if "transformer_2" in base.parts else BERNINI
    if expands_timesteps(base) or config.get("in_channels") == TI2V_CHANNELS:
        return TI2V_5B
    from_pictures = config.get("in_channels") != config.get("out_channels", config.get("in_channels"))
    if "transformer_2" in base.parts:
        return I2V_A14B if from_pictures else T2V_A14B
    if is_vace(base):
        return VACE
    if is_v3(base):
        return V3
    if is_phantom(base):
        return PHANTOM if config.get("num_layers", 40) < 40 else PHANTOM_14B
    if config.get("image_dim") is None:
        return T2V
    if is_magref(base):
        return MAGREF
    return I2V if config.get("pos_embed_seq_len") is None else FLF2V
