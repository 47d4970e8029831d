"""The paper's tables 2 and 3 in small: its variants, trained alike from one base, scored alike, in one table.

As in the paper, where CLIP, T5 and the video transformer came pretrained, every run starts from the same text
encoder, picture encoder (both stay as they are) and plain transformer, and learns what ties pictures to the
video anew: Q-Former, DAM and injection, drawn from the run's seed. Each row differs from ours in one field of
the configuration.

A run lives in ``OUTPUT/NAME-SEED/`` and ends with its ``score.json``; one that has it is not run again, so
the command may be stopped at any moment and goes on when it is given again.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conceptmaster import __version__
from conceptmaster.atomic_write import replacing
from conceptmaster.engine.checkpoints.adapter import adapter_keys
from conceptmaster.engine.checkpoints.safetensors_io import load, load_model, save
from conceptmaster.engine.checkpoints.source import open_source
from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.errors import ConceptMasterError, InputError, WeightsError
from conceptmaster.export.bundle import write_bundle
from conceptmaster.hashed import sha256_file

from ..arguments import (
    check_counts,
    options_from,
    set_threads,
)
from ..scoring.reports import percent, write_json
from ..scoring.score import Options, score
from .drawn import Drawing, DrawnPool, judging_pool
from .options import TrainOptions
from .train import collect
from .train_model import train_model
from .train_vae import load_vae
from .variant_list import FIELDS, VARIANTS, Variant

CONCEPTS = 2
"""Concepts of every request that is scored."""
SCORES = {"different_nouns": False, "same_noun": True}
"""The two scores of a run, by whether the concepts of a request share their noun."""
COLUMNS = {
    "pair binding, different nouns": ("different_nouns", "pair_binding"),
    "pair binding, same noun": ("same_noun", "pair_binding"),
    "identity": ("different_nouns", "identity"),
    "noun": ("different_nouns", "noun"),
    "texture": ("different_nouns", "texture"),
    "motion": ("different_nouns", "motion"),
}
"""The table's measures: title → (which score, which measure)."""
SECTIONS = {2: "How concepts enter the transformer", 3: "How pictures are bound to labels"}
"""The paper's tables."""

Report = dict[str, Any]
"""The content of a run's ``score.json``."""


def run(args: argparse.Namespace) -> int:
    """Train and score what is not done yet, all variants seed by seed; returns 0.

    The table and the JSON hold every finished run of the output folder and are rewritten after each. Raises
    InputError for arguments or a base that cannot work, or an output folder with runs of another
    budget; ConceptMasterError, naming the run, for one that fails.
    """
    _check_arguments(args)
    base = _open_base(args.base)
    args.output.mkdir(parents=True, exist_ok=True)
    table, everything = args.output / "table.md", args.output / "variants.json"
    settings = {
        "steps": args.steps,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "score_seeds": [args.score_seeds.start, args.score_seeds.stop],
        "base_sha256": sha256_file(args.base / "model.safetensors"),
        "base_concept": {name: getattr(base.config.concept, name) for name in FIELDS},
        "vae_sha256": sha256_file(args.base / "vae.safetensors"),
        "clips": args.clips,
    }
    _hold(settings, args.output / "settings.json")
    write_base(base, args.output / "base.safetensors")
    set_threads(args)
    _publish(args.output, settings, table, everything)
    for seed in args.seeds:
        for variant in (v for v in VARIANTS if v.name in args.only):
            folder = args.output / f"{variant.name}-{seed}"
            if not (folder / "score.json").exists():
                try:
                    _train_and_score(variant, base.config, seed, args, folder)
                except ConceptMasterError as error:
                    raise ConceptMasterError(f"{folder}: {error}") from error
                _publish(args.output, settings, table, everything)
            _tidy(folder)
    print(table.read_text("utf-8"))
    print(f"table: {table}\njson: {everything}")
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    options_from(TrainOptions, args)
    check_counts(args, "clips", "workers")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"--seeds must be different whole numbers from 0, got {args.seeds}")
    Options(seeds=args.score_seeds, concepts=CONCEPTS)


def _open_base(weights: Path) -> ConceptMaster:
    """The base's whole model. Raises InputError for what is no weights folder of this world."""
    try:
        model = load_model(weights / "model.safetensors")
        if model.config.vae.get("kind") != "blocks":
            raise InputError(f"cannot start from {weights}: its VAE is not of blocks, as this world's is")
        load_vae(weights, model.config.vae)
    except (FileNotFoundError, WeightsError) as error:
        raise InputError(f"cannot start from {weights}: {error}") from error
    return model


def write_base(model: ConceptMaster, path: Path) -> None:
    """Write a model's weights without its concept path, as ``train_model`` takes them for ``start``."""
    new = adapter_keys(model)
    save(path, {name: tensor for name, tensor in model.state_dict().items() if name not in new})


def _hold(settings: Mapping[str, Any], path: Path) -> None:
    """Keep the settings with the first run; raises InputError where later ones would not compare with it."""
    if not path.exists():
        write_json(path, settings)
        return
    before = json.loads(path.read_text("utf-8"))
    other = [f"{k} {before.get(k)}, not {v}" for k, v in settings.items() if before.get(k) != v]
    if other:
        raise InputError(f"{path.parent} has runs with {'; '.join(other)}: choose another --output")


def _train_and_score(
    variant: Variant, base: ModelConfig, seed: int, args: argparse.Namespace, folder: Path
) -> None:
    """One run, from the base to its ``score.json``; goes on from its last checkpoint."""
    model_folder, config = folder / "model", variant.config(base)
    options = options_from(
        TrainOptions,
        args,
        seed=seed,
        log_every=max(1, args.steps // 20),  # a checkpoint every quarter
        start=args.output / "base.safetensors",
        freeze=("text_encoder", "image_encoder"),
    )
    vae = load_vae(args.base, config.vae).to(args.device)

    def open_data(done: int) -> DrawnPool:
        return DrawnPool(config, vae, Drawing(args.clips, 0, args.workers), args.device, done)

    train_model(config, open_data, judging_pool(config, vae, args.device), model_folder, options)
    progress = json.loads(load(model_folder / "training.safetensors")[1]["progress"])
    collect(args.base, model_folder, folder / "weights")
    write_bundle(open_source(folder / "weights"), folder / "bundle", overwrite=True)
    report: Report = {
        "variant": variant.name,
        "seed": seed,
        "steps": int(progress["step"]),
        "samples": int(progress["step"]) * args.batch_size,
        "training_seconds": round(progress["seconds"], 1),
        "machine": {
            "processor": platform.machine(),
            "device": args.device,
            "threads": torch.get_num_threads(),
        },
        "versions": {"conceptmaster": __version__, "torch": torch.__version__, "numpy": np.__version__},
    }
    for name, same_noun in SCORES.items():
        asked = Options(
            seeds=args.score_seeds,
            concepts=CONCEPTS,
            same_noun=same_noun,
            bundle=str(folder / "bundle"),
            controls=False,
            threads=args.threads,
        )
        report[name] = score(asked, progress=True)[0]
    write_json(folder / "score.json", report)


def _tidy(folder: Path) -> None:
    """Delete what a scored run needs no more; its weights and log stay."""
    shutil.rmtree(folder / "bundle", ignore_errors=True)
    for name in ("training.safetensors", "model.safetensors"):  # the second is in weights/ too
        (folder / "model" / name).unlink(missing_ok=True)


def _publish(output: Path, settings: Mapping[str, Any], table: Path, everything: Path) -> None:
    found = finished(output)
    with replacing(table) as temporary:
        temporary.write_text(render(found, settings), encoding="utf-8")
    rows = {
        v.name: {
            "title": v.title,
            "tables": v.tables,
            "paper_dino_i": v.dino_i,
            "concept": {name: getattr(v, name) for name in FIELDS},
            "summary": {title: summarise(found[v.name], *place) for title, place in COLUMNS.items()},
            "runs": found[v.name],
        }
        for v in VARIANTS
    }
    order = dict(by_identity(found))
    write_json(everything, {"settings": settings, "by_identity": order, "variants": rows})


def finished(output: Path) -> dict[str, list[Report]]:
    """The reports of every variant's scored runs in an output folder, in the order of their seeds."""
    found = {
        variant.name: [
            json.loads(path.read_text("utf-8")) for path in output.glob(f"{variant.name}-*/score.json")
        ]
        for variant in VARIANTS
    }
    return {name: sorted(reports, key=lambda report: report["seed"]) for name, reports in found.items()}


def summarise(reports: Sequence[Report], which: str, measure: str) -> tuple[float | None, float | None]:
    """Mean of a measure over runs, 0..1, and its spread: half the range, of one run the standard error over
    requests. None for what there is not."""
    values = [report[which][measure] for report in reports]
    if not values or None in values:
        return None, None
    if len(values) == 1:
        return values[0], reports[0][which]["standard_errors"][measure]
    return float(np.mean(values)), (max(values) - min(values)) / 2


def by_identity(found: Mapping[str, Sequence[Report]]) -> list[tuple[str, float]]:
    """The variants that have runs, (name, mean identity), the best first."""
    means = [(name, summarise(reports, *COLUMNS["identity"])[0]) for name, reports in found.items()]
    return sorted(((n, mean) for n, mean in means if mean is not None), key=lambda pair: -pair[1])


def render(found: Mapping[str, Sequence[Report]], settings: Mapping[str, Any]) -> str:
    """The table in Markdown, with what is needed to read it and the order that came out."""
    titles = ["", "DINO-I in the paper", *COLUMNS, "seeds", "samples", "seconds of training"]
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    for table, heading in SECTIONS.items():
        lines.append(f"| *{heading} (table {table})* " + "| " * (len(titles) - 1) + "|")
        lines += [_row(v, found[v.name]) for v in VARIANTS if table in v.tables]
    reports = [report for each in found.values() for report in each]
    if reports:
        lines.append(_chance(reports[0], len(titles)))
    first, end = settings["score_seeds"]
    samples = settings["steps"] * settings["batch_size"]
    grown = ", ".join(settings["base_concept"].values())
    lines += [
        "",
        f"Every run: {settings['steps']:,} steps of {settings['batch_size']} clips ({samples:,} samples), "
        f"from one base (SHA-256 {settings['base_sha256'][:12]}…) without its concept path, which starts "
        f"from the run's seed. What is left of the base grew up with {grown}, which may favour rows like "
        f"it. Scored on {end - first} requests of {CONCEPTS} held-out looks, of different nouns but for the "
        "second measure; in percent, ± half the range over seeds, or one standard error over requests "
        "where there is one seed. The paper's figures are of its own model, data and measure: orders may "
        "be compared, numbers may not. Each row differs from ours in one field; the paper's shared query "
        "also leaves out the labels.",
    ]
    if reports:
        order = "; ".join(f"{name} {100 * mean:.1f}" for name, mean in by_identity(found))
        paper = sorted((v for v in VARIANTS if found[v.name]), key=lambda v: -v.dino_i)
        theirs = "; ".join(f"{variant.name} {variant.dino_i}" for variant in paper)
        lines += ["", f"By identity, best first: {order}.", "", f"In the paper, by DINO-I: {theirs}."]
    return "\n".join(lines) + "\n"


def _row(variant: Variant, reports: Sequence[Report]) -> str:
    cells = [f"`{variant.name}`: {variant.title}", f"{variant.dino_i:.3f}"]
    cells += [percent(*summarise(reports, *place)) for place in COLUMNS.values()]
    seconds = [report["training_seconds"] for report in reports]
    budget = [f"{reports[0]['samples']:,}", f"{np.mean(seconds):,.0f}"] if reports else [percent(None)] * 2
    return "| " + " | ".join([*cells, str(len(reports)), *budget]) + " |"


def _chance(report: Report, columns: int) -> str:
    cells = ["*chance*", ""]
    cells += [percent(report[which]["chance"][measure], None) for which, measure in COLUMNS.values()]
    return "| " + " | ".join(cells + [""] * (columns - len(cells))) + " |"
