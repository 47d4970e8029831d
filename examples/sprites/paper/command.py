"""`paper`: every row of the paper's tables from one frozen base, unit by unit; `paper-base`: that base;
`paper-weights`: the same as a weights folder.

A unit, a row with a seed, lives in ``OUTPUT/ROW-SEED/`` and ends with its ``result.json``. Table and JSON
hold every finished unit of the output folder and are rewritten after each, so the command may be stopped at
any moment, goes on when it is given again, and several may share the work by ``--only`` and ``--seeds``.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conceptmaster import __version__
from conceptmaster.atomic_write import check_output, replacing
from conceptmaster.engine.checkpoints.safetensors_io import load, save
from conceptmaster.engine.vae.block_vae import BlockVAE
from conceptmaster.errors import ConceptMasterError, InputError, WeightsError
from conceptmaster.hashed import sha256_file

from ..arguments import LAST_SEED, check_counts, set_threads
from ..scoring.reports import write_json
from ..training.train_vae import load_vae
from ..world.requesting import make_folder
from .base import Base, train_base
from .eye import Eye, train_eye
from .pool import ClipPool
from .report import check_marks, filled, finished, tables
from .rows import OURS, ROWS
from .sampling import GUIDANCE, SHIFT, SOLVER, STEPS
from .setting import paper_config, pixel_weights, row_config
from .showing import show
from .trainee import Trainee
from .tuned import open_tuning_base, run_tuned, write_weights
from .unit import Budget, Ground, folder_of, read_done, run_unit

GIVEN = ("text_encoder.", "image_encoder.")
"""Of the shipped model's weights, what the base is given."""


def run(args: argparse.Namespace) -> int:
    """Train and score what is not done yet, seed by seed; returns 0.

    Raises InputError for a base that cannot be read, arguments that cannot work, or an output folder with
    units of another budget; ConceptMasterError, naming the unit, for one that fails.
    """
    _check(args)
    base, vae = _open(args.base)
    budget = Budget(args.steps, requests=args.requests)
    settings = {
        "steps": budget.steps,
        "batch": budget.batch,
        "lr": budget.lr,
        "requests": budget.requests,
        "clips": args.clips,
        "sampling": {"solver": SOLVER, "steps": STEPS, "shift": SHIFT, "guidance": GUIDANCE},
        "base_sha256": sha256_file(args.base / "model.safetensors"),
        "vae_sha256": sha256_file(args.base / "vae.safetensors"),
    }
    rows = [row for row in ROWS if row.name in args.only]
    units = {folder_of(args.output, row.name, seed): (row, seed) for seed in args.seeds for row in rows}
    for folder in (args.output / "pool", *units):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is no folder: choose another --output")
    make_folder(args.output)
    _hold(settings, args.output / "settings.json")
    _publish(args, settings)  # before minutes of drawing
    left = [folder for folder in units if not (folder / "result.json").exists()]
    if left or args.sheet is not None:
        ground = Ground(base, vae, ClipPool(args.output / "pool", paper_config(), vae, args.clips))
    for folder in left:
        row, seed = units[folder]
        try:
            (run_unit if row.tuned is None else run_tuned)(row, seed, ground, budget, folder)
        except ConceptMasterError as error:
            raise ConceptMasterError(f"{folder}: {error}") from error
        _publish(args, settings)
    print(_publish(args, settings))
    if args.sheet is not None:
        show(rows, args.output, base, vae, ground.pool.no_caption, args.sheet)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises InputError for the first argument that cannot work."""
    check_counts(args, "steps", "requests", "clips")
    if min(args.seeds) < 0 or max(args.seeds) > LAST_SEED or len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"--seeds must be different whole numbers, 0 to {LAST_SEED}, got {args.seeds}")
    if args.results is not None:
        check_output(args.results, (".json",))
    if args.sheet is not None:
        check_output(args.sheet, (".png",))
        if not any(row.tuned is None for row in ROWS if row.name in args.only):
            raise InputError("--sheet shows rows whose weights are kept, and --only has tuned ones alone")
    if args.document is not None:
        check_output(args.document, (".md",))
        try:
            check_marks(args.document.read_text("utf-8"))
        except FileNotFoundError:
            raise InputError(f"there is no document at {args.document}") from None
        except ValueError as error:
            raise InputError(f"cannot fill the document {args.document}: {error}") from error
    set_threads(args)


def _open(folder: Path) -> tuple[dict[str, Tensor], BlockVAE]:
    """A base and its VAE. Raises InputError for what rows cannot stand on."""
    vae = _vae(folder)
    try:
        base = {name: value.float() for name, value in load(folder / "model.safetensors")[0].items()}
        Trainee(row_config(OURS), base, pixel_weights(vae), 0)
    except (FileNotFoundError, WeightsError) as error:
        raise InputError(f"cannot start from {folder}: {error}") from error
    return base, vae


def _vae(folder: Path) -> BlockVAE:
    try:
        return load_vae(folder, paper_config().vae)
    except (FileNotFoundError, WeightsError) as error:
        raise InputError(f"cannot start from {folder}: {error}") from error


def _hold(settings: Mapping[str, Any], path: Path) -> None:
    """Keep the settings with the first unit; raises InputError where later ones would not compare with it."""
    before = read_done(path, lambda found: found.keys(), "choose another --output")
    if before is None:
        write_json(path, settings)
        return
    other = [f"{k} {before.get(k)}, not {v}" for k, v in settings.items() if before.get(k) != v]
    if other:
        raise InputError(f"{path.parent} has units with {'; '.join(other)}: choose another --output")


def _publish(args: argparse.Namespace, settings: Mapping[str, Any]) -> str:
    """Rewrite the JSON, and the document where there is one; returns the tables."""
    found = finished(args.output)
    about = {
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"conceptmaster": __version__, "torch": torch.__version__},
    }
    write_json(
        args.results or args.output / "paper_tables.json", {"settings": settings, **about, "rows": found}
    )
    if args.document is not None:
        text = filled(args.document.read_text("utf-8"), found)
        with replacing(args.document) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return tables(found)


def run_base(args: argparse.Namespace) -> int:
    """Make the base: the picture encoder's class token, then the transformer on captions alone; returns 0.

    Writes ``OUTPUT/model.safetensors``, in bfloat16. Raises InputError for weights that cannot be read.
    """
    check_counts(args, "steps", "eye_steps", "clips")
    if not 0 < args.lr < 1:
        raise InputError(f"--lr must lie between 0 and 1, got {args.lr}")
    set_threads(args)
    vae = _vae(args.vae)
    try:
        weights = load(args.weights / "model.safetensors")[0]
        text, image = (_part(weights, prefix) for prefix in GIVEN)
        Base(text, pixel_weights(vae)), Eye(image)  # they fit, before minutes of training
    except (FileNotFoundError, WeightsError) as error:
        raise InputError(f"cannot start from {args.weights}: {error}") from error
    made = args.output / "model.safetensors"
    if made.exists() and not (args.output / "eye").exists():
        raise InputError(f"{made} is there, and not of this command: choose another --output")
    make_folder(args.output)
    train_eye(image, args.output / "eye", args.eye_steps)
    pool = ClipPool(args.output / "pool", paper_config(), vae, args.clips)
    train_base(text, pixel_weights(vae), pool, args.output / "base", args.steps, args.lr)
    image = load(args.output / "eye" / "image_encoder.safetensors")[0]
    transformer = load(args.output / "base" / "transformer.safetensors")[0]
    parts = {"text_encoder": text, "image_encoder": image, "transformer": transformer}
    save(made, together(parts))
    print(made)
    return 0


def run_weights(args: argparse.Namespace) -> int:
    """Write a base as `tune` and ``conceptmaster export`` take it; returns 0. Raises InputError for one that
    cannot be read, and where the output folder holds anything else."""
    tensors, vae = _open(args.base)
    write_weights(open_tuning_base(tensors, vae, args.base), args.output)
    print(args.output)
    return 0


def together(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Modules' tensors as one model's, in bfloat16."""
    return {f"{part}.{name}": value.bfloat16() for part, own in parts.items() for name, value in own.items()}


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): value.float() for n, value in weights.items() if n.startswith(prefix)}
