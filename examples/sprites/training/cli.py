"""The commands `train` and `variants` of the world's command line. Their help needs no PyTorch: what does is
imported when they run."""

from __future__ import annotations

import argparse
from pathlib import Path

from conceptmaster.engine.concept_config import BINDINGS, ENCODERS, INJECTIONS

from ..arguments import add_device, add_drawing, add_options, seed_range
from .options import STAGES, TrainOptions
from .variant_list import VARIANTS


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``train``."""
    parser.add_argument("--output", required=True, type=Path, help="folder for checkpoints and weights")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="which stages to run (all)"
    )
    parser.add_argument("--start", type=Path, help="weights folder to go on from, with a fresh optimizer")
    parser.add_argument("--vae-steps", type=int, default=6000, help="steps of the VAE's network (6000)")
    parser.add_argument("--vae-batch-size", type=int, default=16, help="clips in such a step (16)")
    add_options(parser, TrainOptions, picture_steps=None, caption_steps=None)
    parser.add_argument("--encoder", choices=ENCODERS, default="qformer")
    parser.add_argument("--binding", choices=BINDINGS, default="dam")
    parser.add_argument("--injection", choices=INJECTIONS, default="standalone")
    add_drawing(parser)
    add_device(parser)


def run_train(args: argparse.Namespace) -> int:
    """Runs `train`, see `train.run`."""
    from .train import run

    return run(args)


def add_variants_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``variants``."""
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--base", required=True, type=Path, help="weights folder to start all from")
    parser.add_argument("--output", required=True, type=Path, help="folder for checkpoints and results")
    add_options(parser, TrainOptions, "steps", "batch_size", "lr", steps=400)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the trainings (0 1)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="which variants to run (all)")
    parser.add_argument(
        "--score-seeds", type=seed_range, default=range(64), metavar="A:B", help="of the requests (0:64)"
    )
    add_drawing(parser)
    add_device(parser)


def run_variants(args: argparse.Namespace) -> int:
    """Runs `variants`, see `variants.run`."""
    from .variants import run

    return run(args)
