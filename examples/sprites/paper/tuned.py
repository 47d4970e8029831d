"""Rows that are tuned on each request: CustomDiffusion and DreamBooth, on the same base, by ``tuning.py``.

They take no concepts when they are asked; how they look is in their weights. So each request costs
its own training, which is what "without test-time tuning" saves.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conceptmaster.delta_file import read_delta
from conceptmaster.engine.checkpoints.deltas import merge_deltas
from conceptmaster.engine.checkpoints.safetensors_io import load_model, load_strict, save, save_model
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.engine.vae.block_vae import BlockVAE
from conceptmaster.runtime.atomic_folder import replacing_folder
from conceptmaster.runtime.request import Concept, Request

from ..scoring.reports import write_json
from ..training.attention import cheapest_attention
from ..training.tuning import Base, Tuned, tune
from ..training.tuning_options import TuneOptions
from ..world.requesting import PICTURE
from ..world.vocabulary import build_tokenizer, tokenise
from .judging import judge, request_scene
from .pool import Clips, clips_of, draw
from .rows import Row
from .sampling import frames, sample
from .setting import paper_config
from .trainee import Trainee
from .unit import Budget, Ground, read_done, result_of, written

REQUESTS = 32
"""The first of those that are scored: one costs as much as hundreds of the other rows'."""


def run_tuned(row: Row, seed: int, ground: Ground, budget: Budget, folder: Path) -> dict[str, Any]:
    """Tune and score a row with a seed, request by request, of which those that are done are not done again;
    returns what ``result.json`` holds."""
    if (known := result_of(folder)) is not None:
        return known
    result = folder / "result.json"
    folder.mkdir(parents=True, exist_ok=True)
    asked = range(min(REQUESTS, budget.requests))
    base = open_tuning_base(ground.base, ground.vae, folder)
    done = [_request(row, seed, number, base, ground, folder) for number in asked]
    seconds = sum(each["seconds"] for each in done) / len(done)
    found = {name: [each["scores"][name] for each in done] for name in done[0]["scores"]}
    write_json(
        result,
        {
            "row": row.name,
            "seed": seed,
            "training_seconds": 0,
            "seconds_per_request": round(seconds, 1),
            "requests": written(found),
        },
    )
    return json.loads(result.read_text("utf-8"))


def open_tuning_base(tensors: Mapping[str, Tensor], vae: BlockVAE, folder: Path) -> Base:
    """The base of all rows as tuning takes it."""
    model = ConceptMaster(paper_config(injection="none"))
    load_strict(model, {n: v for n, v in tensors.items() if not n.startswith("image_encoder.")})
    return Base(folder, model, vae, build_tokenizer().to_str())


def write_weights(base: Base, output: Path) -> None:
    """Write a base as a new weights folder, in float16: what `tune` starts from, and ``conceptmaster export``
    takes. Whole or not at all; raises InputError where the folder ``output`` holds files."""
    with replacing_folder(output) as new:
        save_model(base.model.half(), new / "model.safetensors")
        save(new / "vae.safetensors", {name: value.half() for name, value in base.vae.state_dict().items()})
        (new / "tokenizer.json").write_text(base.tokenizer, encoding="utf-8")


def _request(row: Row, seed: int, number: int, base: Base, ground: Ground, folder: Path) -> dict[str, Any]:
    path, work = folder / f"{number}.json", folder / f"tuned-{number}"
    if (known := read_done(path, lambda found: (found["seconds"], found["scores"]))) is not None:
        return known
    assert row.tuned is not None
    scene, config = request_scene(number), base.model.config
    drawn = draw([scene], config, ground.vae)
    pictures = drawn["pictures"][0, : len(scene.actors)]  # those that the other rows see
    scale = PICTURE // pictures.shape[1]
    pictures = pictures.repeat(scale, 1).repeat(scale, 2)
    concepts = [Concept(actor.label, picture) for actor, picture in zip(scene.actors, pictures, strict=True)]
    request = Request(scene.caption, tuple(concepts), seed=number)
    began = time.perf_counter()
    with cheapest_attention("cpu"):
        tuned = tune(row.tuned, base, request, work, TuneOptions(seed=seed))
    latents = sample_tuned(tuned, base, clips_of(drawn, config), ground, number)
    seconds = time.perf_counter() - began
    scores = judge([scene], frames(latents, ground.vae, config))
    found = {"seconds": round(seconds, 2), "scores": {name: value[0] for name, value in scores.items()}}
    write_json(path, found)
    shutil.rmtree(work)
    return found


def sample_tuned(tuned: Tuned, base: Base, asked: Clips, ground: Ground, seed: int) -> Tensor:
    """The latents of a request by what was tuned for it, [1,Cz,F,H,W]."""
    tokenizer, model = base.tokenizer, copy.deepcopy(base.model)
    if tuned.method == "custom_diffusion":
        tokenizer = merge_deltas(model, tokenizer, [read_delta(tuned.files[0])])
    else:
        model = load_model(tuned.files[0] / "model.safetensors").float()
    trainee = Trainee(base.model.config, base.model.state_dict(), torch.ones(1), 0)
    trainee.model = model
    words = type(build_tokenizer()).from_str(tokenizer)
    ids, mask = (torch.from_numpy(part) for part in tokenise(words, [tuned.prompt], asked.token_ids.shape[1]))
    named = asked.without_concepts().told(ids, mask)
    return sample(trainee, named, ground.pool.no_caption, [seed])
