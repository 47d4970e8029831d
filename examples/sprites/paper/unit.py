"""One row with one seed: trained, watched on the way, scored; a folder that ends with its ``result.json``.

A unit that is stopped goes on from its last checkpoint, and one that has its result is not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conceptmaster.engine.checkpoints.safetensors_io import load, load_strict, save
from conceptmaster.engine.vae.block_vae import BlockVAE
from conceptmaster.errors import InputError
from conceptmaster.untrusted import read_json

from ..scoring.reports import write_json
from ..training.attention import cheapest_attention
from ..training.learning import Average, MuonAdamW, autocast
from ..training.loop import LoopOptions, log_to, random_of, train
from ..training.noising import noised, normal
from ..training.train_model import ADAM_NAMES
from .judging import judge, request_scene
from .pool import ClipPool, Clips, clips_of, draw
from .rows import Row
from .sampling import frames, sample
from .setting import pixel_weights, row_config
from .trainee import Trainee

MAIN = "margin"
"""The measure that rows are compared by: like DINO-I it is a matter of degree."""
MEASURES = (MAIN, "pair_binding", "identity", "noun", "texture", "motion")
LOWEST = 0.5
"""Noise level above which rows learn, half of the time above 0.94: a sampler settles there how things look,
while a noised clip says it already a little below."""
WATCHED, WATCHED_SIGMA = 64, 0.95
"""Clips of two held-out looks whose errors are looked at on the way, and their noise level."""
WATCH_SEED = 2**25


@dataclass(frozen=True)
class Budget:
    """What every row gets. steps of ``batch`` clips; lr: Muon's, AdamW takes an eighth of it; requests: how
    many are scored, the seeds from 0."""

    steps: int = 512
    batch: int = 32
    lr: float = 0.012
    requests: int = 200

    @property
    def samples(self) -> int:
        """Clips that a row meets."""
        return self.steps * self.batch


@dataclass(frozen=True)
class Ground:
    """What all units stand on: the base's tensors, the VAE, and the pool of clips."""

    base: Mapping[str, Tensor]
    vae: BlockVAE
    pool: ClipPool


def folder_of(output: Path, row: str, seed: int) -> Path:
    """Where a unit lives."""
    return output / f"{row}-{seed}"


def read_done(
    path: Path, check: Callable[[Any], object], cure: str = "delete it, and it is made again"
) -> dict[str, Any] | None:
    """What was written when something was done, None where it is not. check: raises KeyError, or what else a
    damaged file gives. Raises InputError for one, with the cure."""
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = read_json(path)
        check(found)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{path} is damaged, {error!r}: {cure}") from error
    return found


def result_of(folder: Path) -> dict[str, Any] | None:
    """What a unit's ``result.json`` holds, None where it has none. Raises InputError for a damaged one."""

    def check(found: Any) -> None:
        np.stack([read(found["requests"][measure]) for measure in MEASURES])
        gaps(found)
        sum(found[name] for name in ("seed", "training_seconds", "seconds_per_request"))

    return read_done(folder / "result.json", check)


def run_unit(row: Row, seed: int, ground: Ground, budget: Budget, folder: Path) -> dict[str, Any]:
    """Train and score a row with a seed; returns what ``result.json`` holds. Raises CheckpointError, and
    InputError for a damaged result."""
    if (found := result_of(folder)) is not None:
        return found
    result = folder / "result.json"
    folder.mkdir(parents=True, exist_ok=True)
    trainee = Trainee(row_config(row), ground.base, pixel_weights(ground.vae), seed)
    _train(trainee, seed, ground, budget, folder)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    began = time.perf_counter()
    scenes = [request_scene(request) for request in range(budget.requests)]
    asked = clips_of(draw(scenes, trainee.config, ground.vae), trainee.config)
    latents = sample(trainee, asked, ground.pool.no_caption, list(range(budget.requests)))
    sampled = time.perf_counter() - began
    judged = judge(scenes, frames(latents, ground.vae, trainee.config))
    write_json(
        result,
        {
            "row": row.name,
            "seed": seed,
            "samples": budget.samples,
            "parameters": sum(p.numel() for p in trainee.adapter.parameters()),
            "tokens_per_concept": trainee.config.concept.tokens_per_concept,
            "training_seconds": log[-1]["seconds"],
            "seconds_per_request": round(sampled / budget.requests, 3),
            "curve": [{name: line[name] for name in ("samples", *ERRORS)} for line in log if "with" in line],
            "requests": written(judged),
        },
    )
    (folder / "training.safetensors").unlink(missing_ok=True)
    return json.loads(result.read_text("utf-8"))


ERRORS = ("with", "without", "swapped")
"""What is watched: the squared error where the concepts are, with their pictures, with none, and with each
other's."""


def gaps(unit: Mapping[str, Any]) -> dict[int, float]:
    """By samples, a unit's error with the right pictures less that with swapped ones; none of a tuned row."""
    return {point["samples"]: point["with"] - point["swapped"] for point in unit.get("curve", ())}


def written(found: Mapping[str, list[float]]) -> dict[str, str]:
    """Scores by request as one line each: in hundredths, separated by spaces."""
    return {name: " ".join(str(round(100 * value)) for value in values) for name, values in found.items()}


def read(line: str) -> np.ndarray:
    """What ``written`` wrote of a measure, float64 [requests]."""
    return np.array(line.split(), np.float64) / 100


def _train(trainee: Trainee, seed: int, ground: Ground, budget: Budget, folder: Path) -> None:
    pool, adapter = ground.pool, trainee.adapter
    optimizer = MuonAdamW(adapter.named_parameters(), budget.lr, budget.lr / 8, adam_names=ADAM_NAMES)
    order = pool.order(seed, budget.steps, budget.batch)
    scenes = [request_scene(2 * (WATCH_SEED + n)) for n in range(WATCHED)]
    watched = clips_of(draw(scenes, trainee.config, ground.vae), trainee.config)
    log = log_to(folder / "log.jsonl")

    def losses_of(step: int) -> dict[str, Tensor]:
        rng = random_of(seed, step)
        clips = pool.batch(order[step])
        noise = normal(rng, tuple(clips.latents.shape), "cpu")
        sigma = torch.from_numpy(1 - (1 - LOWEST) * rng.random(budget.batch, np.float32) ** 3)
        with cheapest_attention("cpu"), autocast("cpu"):
            return {"total": trainee.loss(clips, noise, sigma)}

    def publish(steps: int) -> dict[str, float]:
        save(folder / "adapter.safetensors", adapter.state_dict())
        return errors(trainee, watched)

    train(
        adapter,
        optimizer,
        losses_of,
        LoopOptions("row", budget.steps, log_every=max(1, budget.steps // 8)),
        log=lambda record: log(record | {"samples": record["step"] * budget.batch}),
        average=Average(adapter, 0.98),
        checkpoint=folder / "training.safetensors",
        publish=publish,
    )
    load_strict(adapter, load(folder / "adapter.safetensors")[0])  # the average, which is what is scored


@torch.no_grad()
def errors(trainee: Trainee, clips: Clips) -> dict[str, float]:
    """``ERRORS`` of clips of two concepts at one noise level, always from the same noise."""
    noise = normal(random_of(0, 0), tuple(clips.latents.shape), "cpu")
    sigma = torch.full((len(noise),), WATCHED_SIGMA)
    noisy = noised(clips.latents, noise, sigma)
    weight = clips.coverage.sum(1, keepdim=True).clamp(max=1)
    found = {}
    for name, other in zip(ERRORS, (clips, clips.without_concepts(), clips.swapped()), strict=True):
        with cheapest_attention("cpu"), autocast("cpu"):
            velocity = trainee.velocity(trainee.told(other), noisy, sigma).float()
        error = (velocity - (noise - clips.latents)).square() * weight
        error = error * trainee.channels[:, None, None, None]
        found[name] = round(float(error.mean() / weight.mean()), 5)
    return found
