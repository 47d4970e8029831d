"""The whole training as one command with two stages, each resumable: vae, model.

Everything lives below one output folder: ``vae/``, ``model/``, and at the end ``weights/``, which
`conceptmaster export` turns into a bundle. Clips are drawn where they are needed and never written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from conceptmaster.engine.checkpoints.safetensors_io import load_model, save_model
from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.presets import preset
from conceptmaster.engine.vae.block_vae import BlockVAE
from conceptmaster.errors import InputError, WeightsError

from ..arguments import check_counts, options_from, set_threads
from ..world.requesting import make_folder
from ..world.scenes import MAX_CONCEPTS
from ..world.vocabulary import KNOWN, build_tokenizer
from .clip_arrays import draw_videos
from .drawn import Drawing, DrawnPool, judging_pool
from .learning import CheckpointError
from .options import TrainOptions
from .train_model import train_model
from .train_vae import ANALYSED, VAEOptions, analyse, load_vae, new_vae, train_vae, write_vae

DEFAULTS = {
    "solver": "unipc",
    "steps": 4,
    "shift": 3.0,
    "guidance": 1.5,
    "concept_guidance": None,
    "negative": "",
}
RANGES = {"steps": [2, 50], "guidance": [1, 2], "concepts": [0, MAX_CONCEPTS]}
"""Where the scores are as good as they get, see benchmarks/results/sweep-sprites-ranges.json."""


def run(args: argparse.Namespace) -> int:
    """Run the asked stages; returns 0.

    Raises InputError for arguments that cannot work, CheckpointError for what cannot be gone on from.
    """
    try:
        return _run(args)
    except WeightsError as error:
        raise CheckpointError(f"{error}; delete the file to make it again") from error


def _run(args: argparse.Namespace) -> int:
    check_counts(args, "clips", "workers")
    first = {"picture_steps": 1500, "caption_steps": 550}
    for name, usual in first.items():
        asked = getattr(args, name)
        first[name] = asked if asked is not None else 0 if args.start else usual
    start = args.start and args.start / "model.safetensors"
    options = options_from(TrainOptions, args, **first, start=start)
    vae_options = options_from(VAEOptions, args, steps=args.vae_steps, batch_size=args.vae_batch_size)
    set_threads(args)
    config = preset("sprites")
    concept = {name: getattr(args, name) for name in ("encoder", "binding", "injection")}
    config = dataclasses.replace(config, concept=dataclasses.replace(config.concept, **concept))
    started = None if args.start is None else started_vae(args.start, config)
    if options.boxes:  # which changes no weight
        boxed = dataclasses.replace(config.concept, mask="boxes")
        config = dataclasses.replace(config, concept=boxed)
    make_folder(args.output)  # before minutes of drawing
    vae_folder, model_folder = args.output / "vae", args.output / "model"
    if not (vae_folder / "vae.json").exists():
        write_vae(started or _analysed_vae(config.vae, args.device), vae_folder, config.vae)
    if "vae" in args.stages:
        train_vae(vae_folder, vae_options)
    if "model" in args.stages:
        vae = load_vae(vae_folder).to(args.device)

        def open_data(done: int) -> DrawnPool:
            drawing = Drawing(args.clips, args.seed, args.workers)
            return DrawnPool(config, vae, drawing, args.device, done)

        judge = judging_pool(config, vae, args.device)
        train_model(config, open_data, judge, model_folder, options)
        collect(vae_folder, model_folder, args.output / "weights")
        print(f"weights: {args.output / 'weights'}")
    return 0


def _analysed_vae(config: dict[str, Any], device: str) -> BlockVAE:
    """A VAE of fresh components, whose network adds nothing yet."""
    vae = new_vae(config)
    analyse(vae, draw_videos(ANALYSED, device).cpu())
    return vae


def started_vae(weights: Path, config: ModelConfig) -> BlockVAE:
    """The VAE of weights that are gone on from. Raises InputError for what is no weights folder, or one of
    another configuration."""
    try:
        other = load_model(weights / "model.safetensors").config
        if other == config:
            return load_vae(weights, config.vae)
    except (FileNotFoundError, WeightsError) as error:
        raise InputError(f"cannot start from {weights}: {error}") from error
    fields = [field.name for field in dataclasses.fields(config)]
    differs = [name for name in fields if getattr(other, name) != getattr(config, name)]
    raise InputError(f"cannot start from {weights}: of another configuration, in {', '.join(differs)}")


def save_rounded(trained: Path, shipped: Path) -> None:
    """Write a model file again, rounded to float16: half the bytes, and a bundle's half."""
    save_model(load_model(trained).half(), shipped)


def collect(vae_folder: Path, model_folder: Path, output: Path) -> None:
    """Put what ``conceptmaster export`` reads into one folder: weights, tokenizer, sampling defaults, words
    and ranges that the model was made for."""
    output.mkdir(parents=True, exist_ok=True)
    save_rounded(model_folder / "model.safetensors", output / "model.safetensors")
    shutil.copyfile(vae_folder / "vae.safetensors", output / "vae.safetensors")
    build_tokenizer().save(str(output / "tokenizer.json"))
    for name, content in (("defaults", DEFAULTS), ("vocabulary", KNOWN), ("ranges", RANGES)):
        (output / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
