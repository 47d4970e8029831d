"""What rows make of the same requests, from the same noise, to be looked at: a contact sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from conceptmaster.engine.checkpoints.safetensors_io import load, load_strict
from conceptmaster.engine.vae.block_vae import BlockVAE
from conceptmaster.errors import InputError

from ..scoring.sheet import Row as Line
from ..scoring.sheet import save_sheet
from ..world.draw import draw_clip
from .judging import request_scene
from .pool import clips_of, draw
from .report import finished
from .rows import OURS, Row
from .sampling import frames, sample
from .setting import pixel_weights, row_config
from .trainee import Trainee
from .unit import folder_of

SHOWN = (0, 2, 4, 6, 1, 3)
"""Requests of the sheet: four of two nouns and two of one noun, the first of each."""


def show(
    rows: Sequence[Row],
    output: Path,
    base: Mapping[str, Tensor],
    vae: BlockVAE,
    no_caption: tuple[Tensor, Tensor],
    path: Path,
) -> None:
    """Writes a PNG: of each request the pictures, then the middle frame of the true video, of the base
    without concepts, and of each row whose trained weights are in the folder ``output`` (its lowest seed).

    no_caption: tokens of none, [1,T] each. Tuned rows, whose weights are not kept, are left out. Raises
    InputError where there are no weights, WeightsError for those that cannot be read.
    """
    units = finished(output)
    trained = [(row, found) for row in rows if (found := _weights(units[row.name], output)) is not None]
    if not trained:
        raise InputError(f"no row's weights are in {output}: there is nothing to show")
    scenes = [request_scene(number) for number in SHOWN]
    drawn = draw(scenes, row_config(OURS), vae)
    videos = {"truth": np.stack([draw_clip(scene)[0] for scene in scenes])}

    def made(row: Row, weights: Path | None) -> np.ndarray:
        trainee = Trainee(row_config(row), base, pixel_weights(vae), 0)
        asked = clips_of(drawn, trainee.config)
        if weights is None:
            asked = asked.without_concepts()
        else:
            load_strict(trainee.adapter, load(weights)[0])
        return frames(sample(trainee, asked, no_caption, list(SHOWN)), vae, trainee.config)

    videos["base"] = made(OURS, None)
    videos |= {row.name: made(row, weights) for row, weights in trained}
    middle = len(videos["truth"][0]) // 2
    lines = [
        Line(
            scene.caption,
            list(drawn["pictures"][k, : len(scene.actors)]),
            {name: found[k, middle : middle + 1] for name, found in videos.items()},
        )
        for k, scene in enumerate(scenes)
    ]
    save_sheet(lines, path)


def _weights(units: Sequence[Mapping[str, Any]], output: Path) -> Path | None:
    """Of a row's first finished unit that kept them."""
    paths = (folder_of(output, unit["row"], unit["seed"]) / "adapter.safetensors" for unit in units)
    return next((path for path in paths if path.exists()), None)
