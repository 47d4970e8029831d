"""The whole training as one command with four stages, each resumable: draw, latents, vae, model.

Everything lives below one output folder: ``clips/`` and ``held-out/`` (pools), ``vae/``, ``model/``, and at
the end ``weights/``, which `conceptmaster export` turns into a bundle.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from conceptmaster.engine.checkpoints.safetensors_io import load, load_model, save_model
from conceptmaster.engine.config import BINDINGS, ENCODERS, INJECTIONS, ModelConfig
from conceptmaster.engine.presets import preset
from conceptmaster.engine.vae.block_vae import BlockVAE
from conceptmaster.errors import InputError, WeightsError

from ..arguments import add_device, add_options, check_counts, cores, options_from, set_threads
from ..processes import in_processes
from ..world.vocabulary import build_tokenizer
from .batches import Pool
from .drawn import Drawing, DrawnPool
from .learning import CheckpointError
from .pools import ShardPool, open_pool
from .shards import SHARD, draw_shard, encode_shard, shard_folders
from .train_model import TrainOptions, train_model
from .train_vae import COMPONENTS, VAEOptions, analyse, load_vae, new_vae, to_tensor, train_vae, write_vae

STAGES = ("draw", "latents", "vae", "model")
DEFAULTS = {
    "solver": "unipc",
    "steps": 4,
    "shift": 3.0,
    "guidance": 1.5,
    "concept_guidance": None,
    "negative": "",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``train``."""
    parser.add_argument("--output", required=True, type=Path, help="folder for data, checkpoints and weights")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="which stages to run (all)"
    )
    parser.add_argument("--start", type=Path, help="weights folder to go on from, with a fresh optimizer")
    parser.add_argument("--clips", type=int, default=20000, help="training clips to draw (20000)")
    parser.add_argument(
        "--draw-on-device",
        type=int,
        metavar="CLIPS",
        help="draw the model's clips where it is trained, so many at a time and new ones all the while, "
        "instead of reading those of the stage draw: for a GPU, 0.3 MB of its memory each",
    )
    parser.add_argument(
        "--components",
        type=int,
        help="latent channels; those that --start has stay, others join them (as many as it has, else 128)",
    )
    parser.add_argument("--vae-steps", type=int, default=6000, help="steps of the VAE's network (6000)")
    parser.add_argument("--vae-batch-size", type=int, default=16, help="clips in such a step (16)")
    add_options(parser, TrainOptions, picture_steps=None, caption_steps=None)
    parser.add_argument(
        "--queries", type=int, help="visual queries of a concept (as many as --start has, else 64)"
    )
    parser.add_argument("--encoder", choices=ENCODERS, default="qformer")
    parser.add_argument("--binding", choices=BINDINGS, default="dam")
    parser.add_argument("--injection", choices=INJECTIONS, default="standalone")
    add_device(parser)
    parser.add_argument(
        "--workers", type=int, default=cores(), help="processes that draw and encode (one per core)"
    )


def sprites_config(vae: dict[str, Any] | None = None, **concept: Any) -> ModelConfig:
    """The preset ``sprites`` with a trained VAE's configuration and, in ``concept``, a variant's fields."""
    config = preset("sprites")
    vae = config.vae if vae is None else vae
    channels = {"in_channels": vae["z_dim"], "out_channels": vae["z_dim"]}
    return dataclasses.replace(
        config,
        vae=vae,
        transformer=dataclasses.replace(config.transformer, **channels),
        concept=dataclasses.replace(config.concept, **concept),
    )


def vae_config(components: int | None) -> dict[str, Any]:
    """The preset's VAE, with another number of latent channels if one is given."""
    vae = preset("sprites").vae
    if components is None:
        return vae
    mean, deviation = vae["latents_mean"][0], vae["latents_std"][0]
    numbers = {"latents_mean": [mean] * components, "latents_std": [deviation] * components}
    return vae | {"z_dim": components, **numbers}


def run(args: argparse.Namespace) -> int:
    """Run the asked stages; returns 0.

    Raises InputError for arguments that cannot work, CheckpointError for what cannot be gone on from.
    """
    try:
        return _run(args)
    except WeightsError as error:
        raise CheckpointError(f"{error}; delete the file to make it again") from error


def _run(args: argparse.Namespace) -> int:
    check_counts(args, "clips", "workers", "queries", "draw_on_device")
    if args.clips < 2 * SHARD:
        least = f"at least {2 * SHARD}, the first {SHARD} judge the VAE"
        raise InputError(f"--clips must be {least}, got {args.clips}")
    if args.components is not None and not 1 <= args.components <= 768:
        raise InputError(f"--components must lie between 1 and 768, got {args.components}")
    first = {"picture_steps": 1500, "caption_steps": 550}
    for name, usual in first.items():
        asked = getattr(args, name)
        first[name] = asked if asked is not None else 0 if args.start else usual
    start = args.start and args.start / "model.safetensors"
    options = options_from(TrainOptions, args, **first, start=start)
    vae_options = options_from(VAEOptions, args, steps=args.vae_steps, batch_size=args.vae_batch_size)
    set_threads(args)
    root: Path = args.output
    root.mkdir(parents=True, exist_ok=True)
    clips, held_out, vae_folder, model_folder = (root / n for n in ("clips", "held-out", "vae", "model"))
    begun = _new_vae(args.components) if args.start is None else _started_vae(args.start, args.components)
    if begun.complete and not (vae_folder / "vae.json").exists():
        write_vae(begun.vae, vae_folder, begun.config)
    if "draw" in args.stages:
        encoder = vae_folder if "latents" in args.stages and (vae_folder / "vae.json").exists() else None
        jobs = [(held_out, 0, True), *((clips, index, False) for index in range(-(-args.clips // SHARD)))]
        _all(_draw, [(*job, encoder) for job in jobs], args.workers, "draw")
    _require(shard_folders(clips), "draw", clips)
    if "latents" in args.stages:
        _find_latents(clips, held_out, vae_folder, begun, args.workers)
    _require((vae_folder / "vae.json").exists(), "latents", vae_folder)
    if "vae" in args.stages:
        train_vae(clips, vae_folder, vae_options)
    if "model" in args.stages:
        concept = {name: getattr(args, name) for name in ("encoder", "binding", "injection")}
        vae = json.loads((vae_folder / "vae.json").read_text())
        config = sprites_config(vae, queries=args.queries or begun.queries, **concept)

        def open_data(done: int) -> Pool:
            if args.draw_on_device is None:
                return open_pool(clips, config, args.device)
            drawing = Drawing(args.draw_on_device, args.seed, args.workers)
            return DrawnPool(config, load_vae(vae_folder), drawing, args.device, done)

        judge = ShardPool(held_out, config, args.device)
        train_model(config, open_data, judge, model_folder, options)
        collect(vae_folder, model_folder, root / "weights")
        print(f"weights: {root / 'weights'}")
    return 0


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A VAE of which the first ``kept`` components are known already, its configuration, and how many visual
    queries the model has that it is of."""

    vae: BlockVAE
    config: dict[str, Any]
    kept: int
    queries: int

    @property
    def complete(self) -> bool:
        """Whether nothing is left for an analysis."""
        return self.kept == self.config["z_dim"]


def _new_vae(components: int | None) -> _Begun:
    config = vae_config(components)
    return _Begun(new_vae(config), config, kept=0, queries=preset("sprites").concept.queries)


def _started_vae(weights: Path, components: int | None) -> _Begun:
    """The VAE of weights that are gone on from, with room for more components if these are asked for. Where
    its network has another size today, a fresh one takes its place."""
    try:
        begun = load_model(weights / "model.safetensors").config
        tensors = load(weights / "vae.safetensors")[0]
    except (FileNotFoundError, WeightsError) as error:
        raise InputError(f"cannot start from {weights}: {error}") from error
    old = begun.vae
    if old.get("kind") != "blocks":
        raise InputError(f"cannot start from {weights}: its VAE is not of blocks, as this world's is")
    kept = old["z_dim"]
    if components is not None and components < kept:
        raise InputError(f"--components must be at least the {kept} of {weights}, got {components}")
    config = vae_config(components or kept)
    vae = new_vae(config)
    state = vae.state_dict()
    same_network = all(old[name] == config[name] for name in ("width", "layers"))
    for name, tensor in tensors.items():
        if name == "mean":
            state[name].copy_(tensor)
        elif name in COMPONENTS:
            state[name][:kept] = tensor
        elif same_network:
            state[name].copy_(tensor)
    return _Begun(vae, config, kept, begun.concept.queries)


def _require(found: object, stage: str, folder: Path) -> None:
    if not found:
        raise InputError(f"{folder} has nothing of the stage {stage!r} yet: add it to --stages")


def _find_latents(clips: Path, held_out: Path, vae_folder: Path, begun: _Begun, workers: int) -> None:
    """The VAE's components, unless they are there, and every shard's latents."""
    if not (vae_folder / "vae.json").exists():
        analyse(begun.vae, clips, kept=begun.kept)
        write_vae(begun.vae, vae_folder, begun.config)
    jobs = [(vae_folder, folder) for pool in (held_out, clips) for folder in shard_folders(pool)]
    _all(_encode, jobs, workers, "latents")


def _all(function: Callable[[Any], object], jobs: list[Any], workers: int, label: str) -> None:
    for _ in tqdm(in_processes(function, jobs, workers), desc=label, unit="shard", total=len(jobs)):
        pass


def _draw(job: tuple[Path, int, bool, Path | None]) -> None:
    """Draw a shard, and encode it where there is an encoder already: training may begin meanwhile."""
    pool, index, judged, encoder = job
    _use_one_thread()
    folder = draw_shard(pool, index, held_out=judged)
    if encoder is not None:
        _encode((encoder, folder))


def _encode(job: tuple[Path, Path]) -> None:
    vae_folder, folder = job
    _use_one_thread()
    vae = load_vae(vae_folder)
    encode_shard(folder, lambda video: vae.encode(to_tensor(video)).numpy())


def _use_one_thread() -> None:
    """Where several processes draw and encode, each on a core of its own."""
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)


def save_rounded(trained: Path, shipped: Path) -> None:
    """Write a model file again, rounded to float16: half the bytes, and a bundle's half."""
    save_model(load_model(trained).half(), shipped)


def collect(vae_folder: Path, model_folder: Path, output: Path) -> None:
    """Put what ``conceptmaster export`` reads into one folder: weights, tokenizer and sampling defaults."""
    output.mkdir(parents=True, exist_ok=True)
    save_rounded(model_folder / "model.safetensors", output / "model.safetensors")
    shutil.copyfile(vae_folder / "vae.safetensors", output / "vae.safetensors")
    build_tokenizer().save(str(output / "tokenizer.json"))
    (output / "defaults.json").write_text(json.dumps(DEFAULTS, indent=1) + "\n")
