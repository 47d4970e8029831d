"""One training of the open world's model, from the sprites' weights or a checkpoint, in a folder of its own.

The folder holds ``vae.safetensors`` (components, and the decoder's network once it is trained),
``tokenizer.json``, ``training.safetensors`` (what an interrupted training goes on from, exactly),
``model.safetensors`` (averaged weights) and ``log.jsonl``.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from conceptmaster.engine.checkpoints.safetensors_io import save_model
from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.presets import preset
from conceptmaster.engine.vae.block_vae import BlockVAE
from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.training.attention import cheapest_attention
from conceptmaster.examples.sprites.training.batches import Dropped
from conceptmaster.examples.sprites.training.learning import (
    Average,
    MuonAdamW,
    autocast,
    gradient_norm,
    load_checkpoint,
    save_checkpoint,
)
from conceptmaster.examples.sprites.training.noising import (
    DECOY_HELD,
    HELD_SIGMA,
    decoy_noise,
    normal,
    random_sigma,
)
from conceptmaster.examples.sprites.training.starting import start_from
from conceptmaster.examples.sprites.training.train_model import ADAM_NAMES
from conceptmaster.examples.sprites.training.train_vae import load_vae, write_vae

from ..world.atlas import Atlas
from ..world.scenes import Wish
from ..world.tokens import build_tokenizer
from .batches import Artist, Pool, Supply
from .components import add_components, doubled, halved
from .probing import probe
from .reading import learn_to_read
from .starting import start_from_sprites
from .trainee import Trainee

SPRITES = Path(__file__).parents[2] / "sprites" / "weights"
TRAINED, JUDGED = 0, 1 << 48
"""First seeds of what is trained on, and of what the probe looks at."""
ANALYSED, PROBED = 288, 96
"""Clips that the components are found from, and clips of each held-out split that the probe looks at."""


@dataclass(frozen=True)
class Options:
    """How to train.

    minutes, or steps, one of them: of training, this and former runs of the folder together. The learning
    rate follows them, flat to ``flat`` of the time, then down to ``final`` of it. lr is
    Muon's, for matrices; AdamW takes an eighth.
    decoys: share of the noisy clips that go on from one with other pictures. captions: sentences that are
    read beside every batch, and in each of the ``reading`` steps before the first. log_every, save_every: in
    steps.
    """

    minutes: float | None = None
    steps: int | None = None
    batch_size: int = 48
    lr: float = 0.008
    flat: float = 0.6
    final: float = 0.04
    average: float = 0.995
    decoys: float = 0.5
    captions: int = 64
    reading: int = 300
    dropped: Dropped = field(default_factory=Dropped)
    supply: Supply = field(default_factory=Supply)
    seed: int = 0
    device: str = "cpu"
    log_every: int = 10
    save_every: int = 50

    def __post_init__(self) -> None:
        """Raises InputError for what cannot be trained."""
        if (self.minutes is None) == (self.steps is None):
            raise InputError("how long to train is told by --minutes or by --steps, one of them")
        for name in ("minutes", "steps", "batch_size", "lr", "log_every", "save_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"--{name.replace('_', '-')} must be more than 0, got {value}")

    def done(self, progress: Mapping[str, float]) -> float:
        """How much of the training is over, from 0 to 1."""
        if self.steps is not None:
            return progress["step"] / self.steps
        assert self.minutes is not None
        return progress["seconds"] / (60 * self.minutes)

    def rate(self, done: float) -> float:
        """Scale of the learning rates where a share ``done`` of the time is over."""
        if done < 0.02:
            return max(done, 1e-4) / 0.02
        down = max(0.0, (done - self.flat) / (1 - self.flat))
        return 1 - (1 - self.final) * min(1.0, down)


def train(atlas: Atlas, output: Path, options: Options, start: Path | None = None) -> None:
    """Train to the end of the options' minutes; goes on from the folder where there is a training in it.

    ``start``: a folder with ``model.safetensors``, ``vae.safetensors`` and ``tokenizer.json`` of this world
    to begin from, with a fresh optimizer; None begins from the sprites' weights. Raises InputError,
    CheckpointError.
    """
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    config, device = preset("stickers"), options.device
    tokenizer = _tokenizer(atlas, output, start)
    vae = _vae(atlas, tokenizer, config, output, start)
    trainee = Trainee(config).to(device)
    checkpoint, progress = output / "training.safetensors", {"step": 0.0, "seconds": 0.0}
    artist = Artist(atlas, tokenizer, config, halved(vae), device)
    judges = {split: _judge(artist, config, split) for split in ("nouns", "sets")}
    pool = Pool(lambda number: _block(artist, options.supply, options.seed, number), config, options.supply)
    if not checkpoint.exists():
        fresh = _begin(trainee, start)
        _log(output, {"phase": "start", "fresh": fresh})
        read = learn_to_read(trainee, artist, options.reading, options.captions, device)
        _log(output, {"phase": "read", "story": read})
    optimizer = MuonAdamW(trainee.named_parameters(), options.lr, options.lr / 8, adam_names=ADAM_NAMES)
    average = Average(trainee, options.average)
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, trainee, average, optimizer)
    else:
        save_checkpoint(checkpoint, trainee, average, optimizer, progress)
    if progress["step"] == 0:
        _log(output, {"step": 0} | _probes(trainee, judges, device))
    sums: dict[str, Tensor] = {}
    began = time.perf_counter()
    bar = tqdm(desc="train", disable=None)
    while (done := options.done(progress)) < 1:
        step = int(progress["step"])
        pool.at(step)
        losses = _step(trainee, artist, pool, optimizer, options, step, done)
        average.update(trainee)
        for name, value in losses.items():
            sums[name] = sums.get(name, torch.zeros(())) + value.detach().cpu() / options.log_every
        progress["step"] += 1
        now = time.perf_counter()
        progress["seconds"], began = progress["seconds"] + now - began, now
        bar.update(1)
        last = options.done(progress) >= 1
        if (step + 1) % options.log_every and not last:
            continue
        record: dict[str, object] = {"step": step + 1, "samples": (step + 1) * options.batch_size}
        record |= {"seconds": round(progress["seconds"]), "rate": round(options.rate(done), 3)}
        record |= {name: round(float(value), 4) for name, value in sums.items()}
        sums = {}
        if (step + 1) % options.save_every == 0 or last:
            record |= _save(trainee, average, judges, output, device)
            save_checkpoint(checkpoint, trainee, average, optimizer, progress)
        _log(output, record)
    bar.close()


def _step(
    trainee: Trainee,
    artist: Artist,
    pool: Pool,
    optimizer: MuonAdamW,
    options: Options,
    step: int,
    done: float,
) -> dict[str, Tensor]:
    """One update; what happens in it follows from the seed and the step."""
    rng = np.random.Generator(np.random.Philox(key=[options.seed, step * 64]))
    torch.manual_seed(options.seed * 1_000_003 + step)  # the heads' noise
    batch = pool.batch(rng, options.batch_size, options.dropped).to(options.device)
    first = (1 << 44) + step * options.captions
    captions = artist.captions(range(first, first + options.captions), Wish())
    noise = normal(rng, tuple(batch.latents.shape), options.device)
    sigma = random_sigma(rng, len(noise)).to(options.device)
    held = torch.full_like(sigma, HELD_SIGMA)
    # The sprites' function asks of a batch what this one has, too.
    noise, astray = decoy_noise(batch, noise, sigma, rng, options.decoys)  # type: ignore[arg-type]
    held = torch.where(astray, held.clamp(min=DECOY_HELD), held)
    optimizer.set_scale(options.rate(done))
    with cheapest_attention(options.device), autocast(options.device):
        losses: dict[str, Tensor] = trainee(batch, captions, noise, sigma, held)
    optimizer.zero_grad(set_to_none=True)
    losses["total"].backward()
    gradient_norm(trainee.parameters(), 2.0)
    optimizer.step()
    return losses


def _block(artist: Artist, supply: Supply, seed: int, number: int) -> dict[str, Tensor]:
    first = TRAINED + (seed * (1 << 24) + number) * supply.size
    return artist.draw(artist.scenes(range(first, first + supply.size), Wish()), first)


def _judge(artist: Artist, config: ModelConfig, split: str) -> Pool:
    """Clips of two concepts of a split, for the probe."""
    wish = Wish(split=split, concepts=2, plain=True)
    scenes = artist.scenes(range(JUDGED, JUDGED + PROBED), wish)
    found = artist.draw(scenes, JUDGED, decoys=False)
    pool = Pool(lambda _: found, config, Supply(1, PROBED, 1))
    pool.at(0)
    return pool


def _tokenizer(atlas: Atlas, output: Path, start: Path | None) -> Tokenizer:
    path = output / "tokenizer.json"
    if not path.exists():
        found = build_tokenizer(atlas) if start is None else Tokenizer.from_file(str(start / path.name))
        found.save(str(path))
    return Tokenizer.from_file(str(path))


def _vae(
    atlas: Atlas, tokenizer: Tokenizer, config: ModelConfig, output: Path, start: Path | None
) -> BlockVAE:
    """The VAE of the folder; made, or copied from ``start``, where there is none yet."""
    if not (output / "vae.safetensors").exists():
        if start is not None:
            vae = load_vae(start)
        else:
            vae = doubled(config.vae, SPRITES / "vae.safetensors")
            known = halved(vae)
            artist = Artist(atlas, tokenizer, config, known)
            scenes = artist.scenes(range(JUDGED - ANALYSED, JUDGED), Wish())
            first = int((vae.basis.abs().sum(1) > 0).sum())
            add_components(vae, artist.pixels(scenes), first)
        write_vae(vae, output, config.vae)
    return load_vae(output)


def _begin(trainee: Trainee, start: Path | None) -> list[str]:
    if start is None:
        return start_from_sprites(trainee.model, SPRITES / "model.safetensors")
    return start_from(trainee.model, start / "model.safetensors")


def _probes(trainee: Trainee, judges: Mapping[str, Pool], device: str) -> dict[str, object]:
    return {f"probe_{split}": probe(trainee, judge, device, PROBED) for split, judge in judges.items()}


def _save(
    trainee: Trainee, average: Average, judges: Mapping[str, Pool], output: Path, device: str
) -> dict[str, object]:
    """Write the averaged model; returns what the probe says of it."""
    trained = {name: value.clone() for name, value in trainee.state_dict().items()}
    trainee.load_state_dict(average.shadow)
    found = _probes(trainee, judges, device)
    save_model(trainee.model, output / "model.safetensors")
    trainee.load_state_dict(trained)
    return found


def _log(output: Path, record: Mapping[str, object]) -> None:
    with (output / "log.jsonl").open("a") as log:
        log.write(json.dumps(record) + "\n")
    tqdm.write(json.dumps(record))
