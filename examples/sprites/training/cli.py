"""The commands `train` and `tune` of the world's command line. Their help needs no PyTorch: what does is
imported when they run."""

from __future__ import annotations

import argparse
from pathlib import Path

from conceptmaster.engine.concept_config import BINDINGS, ENCODERS, INJECTIONS

from ..arguments import (
    add_device,
    add_drawing,
    add_options,
    check_seeds,
    options_from,
    seed_range,
    set_threads,
)
from .options import STAGES, TrainOptions
from .tuning_options import METHODS, TuneOptions

TUNE = """\
Tunes a base without concepts on requests of held-out looks, as systems do that learn a concept before they
show it: `custom_diffusion` writes a delta, which `conceptmaster generate --custom` takes beside the base's
bundle, `dreambooth` weights of its own for each request, `dreambooth_lora` a LoRA for `conceptmaster export`.
A request that has its tuned.json is not tuned again. Its prompt there says the concepts' new names.
"""


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


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tune``."""
    parser.description = TUNE
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--base", required=True, type=Path, help="weights folder of a base without concepts")
    parser.add_argument("--output", required=True, type=Path, help="folder, with one for each request")
    parser.add_argument(
        "--seeds", type=seed_range, default=range(32), metavar="A:B", help="of the requests (0:32)"
    )
    parser.add_argument("--concepts", type=int, default=2, metavar="K", help="of each request (2)")
    parser.add_argument("--same-noun", action="store_true", help="two of them share their noun")
    add_options(parser, TuneOptions)
    parser.add_argument("--threads", type=int, help="CPU threads (as PyTorch has it)")


def run_tune(args: argparse.Namespace) -> int:
    """Tunes on each request, those that are done left out; returns 0. Raises what `tuning.tune` raises."""
    from conceptmaster.runtime.request import Request

    from ..scoring.score import check_wishes, judged_scene
    from ..world.requesting import concepts, references
    from .tuning import open_base, tune

    check_seeds(args.seeds)
    check_wishes(args.concepts, args.same_noun)
    options = options_from(TuneOptions, args)
    set_threads(args)
    base = open_base(args.base)
    for seed in args.seeds:
        scene = judged_scene(seed, args.concepts, args.same_noun)
        request = Request(scene.caption, concepts(scene, references(scene)), seed=seed)
        done = tune(args.method, base, request, args.output / str(seed), options)
        print(f"{', '.join(map(str, done.files))}: {done.prompt} ({done.seconds:.0f} s)")
    return 0
