"""One training of the open world's model, from the sprites' weights or a checkpoint, in a folder of its own.

The folder holds ``vae.safetensors`` (components, and the decoder's network once it is trained),
``tokenizer.json``, ``training.safetensors`` (what an interrupted training goes on from, exactly),
``model.safetensors`` and ``heads.safetensors`` (averaged weights) and ``log.jsonl``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from tokenizers import Tokenizer
from torch import Tensor

from conceptmaster.engine.checkpoints.safetensors_io import save, save_model
from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.presets import preset
from conceptmaster.engine.vae.block_vae import BlockVAE
from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.training.attention import cheapest_attention
from conceptmaster.examples.sprites.training.learning import (
    Average,
    MuonAdamW,
    autocast,
    save_checkpoint,
    saved_progress,
)
from conceptmaster.examples.sprites.training.loop import Log, LoopOptions, log_to, random_of
from conceptmaster.examples.sprites.training.loop import train as run_loop
from conceptmaster.examples.sprites.training.noising import decoy_noise, normal, random_sigma
from conceptmaster.examples.sprites.training.train_model import ADAM_NAMES
from conceptmaster.examples.sprites.training.train_vae import load_vae, write_vae

from ..world.atlas import Atlas
from ..world.scenes import Wish
from ..world.tokens import build_tokenizer
from .artist import Artist
from .batches import Batch, Captions, Pool, Told
from .boxing import Boxing
from .components import add_components, doubled, halved
from .options import Options, Supply
from .packing import HEADS, pack_folder, state_of
from .placing import placing_noise
from .probing import probe
from .reading import learn_to_read
from .seeing import learn_to_see
from .speed import Pace, matrix_rate, operations
from .starting import start_from_sprites
from .studio import Studio
from .trainee import Trainee
from .windows import random_window

PACKED = "packed"
"""The folder with a small checkpoint, renewed with every other one; see ``packing``."""
DECAY = 0.995
"""Of the averaged weights."""
BOXES = 1 << 62
"""First step of the random numbers that tell of boxes: others go on as they would without."""
BEFORE = {"boxes": 0.0}
"""Options that folders of before do not name, and what they were."""
MEASURED = 2.0
"""Seconds in which a GPU's matrix rate is measured."""
COUNTED = 16
"""Operations are counted on one clip in so many."""
FREE = {"minutes", "steps", "log_every", "device", "eager", "workers"}
"""Options that may change from run to run without a word."""
SPRITES = Path(__file__).parents[2] / "sprites" / "weights"
LOG = logging.getLogger(__name__)
JUDGED = 1 << 48
"""First seed of what the probe looks at."""
ANALYSED, PROBED = 288, 96
"""Clips that the components are found from, and clips of each held-out split that the probe looks at."""
WINDOW = 2
"""Latent frames of a clip that are seen in some of the steps."""
WARM, FLAT, FINAL = 0.02, 0.6, 0.04
"""Shares of a training up to which its learning rates rise, and stay; what they have come down to in the
end."""


def rate(done: float) -> float:
    """What learning rates are scaled by where a share ``done`` of a training is over."""
    if done < WARM:
        return max(done, 1e-4) / WARM
    return 1 - (1 - FINAL) * min(1.0, max(0.0, (done - FLAT) / (1 - FLAT)))


def train(
    atlas: Atlas, output: Path, options: Options, start: Path | None = None, began: float | None = None
) -> None:
    """Train to the end of the options' minutes or steps; goes on from the folder where a training is in it.

    ``start``: a folder of another training, or of a packed checkpoint (see ``packing``), to begin from with a
    fresh optimizer; None begins from the sprites' weights. ``began``: when the minutes began, by
    ``time.perf_counter``; None: now. Raises InputError, CheckpointError.
    """
    began = time.perf_counter() if began is None else began
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    begun = any((output / name).exists() for name in ("training.safetensors", "options.json"))
    if (output / "model.safetensors").exists() and not begun:
        raise InputError(f"{output} holds weights that no training there made: choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    checkpoint, log = output / "training.safetensors", log_to(output / "log.jsonl")
    how = _loop_options(options, began)
    if checkpoint.exists() and how.part(done := saved_progress(checkpoint)) >= 1:
        asked = f"{options.minutes:g} minutes" if options.minutes else f"{options.steps} steps"
        LOG.warning("%s has had its %s, at step %d: ask for more", output, asked, done["step"])
        return
    _note_options(output, options, start, resumed=checkpoint.exists())
    torch.manual_seed(options.seed)
    config, device = boxed(preset("stickers")) if options.boxes else preset("stickers"), options.device
    tokenizer = _tokenizer(atlas, output, start)
    vae = _vae(atlas, tokenizer, config, output, start)
    artist = Artist(atlas, tokenizer, config, halved(vae), device)
    studio = Studio(artist, options)
    try:
        pool, told = Pool(studio.clips, config, options.supply), Told(studio.told, options.told_supply)
        trainee = Trainee(config).to(device)
        judges = {split: _judge(artist, config, split) for split in ("nouns", "sets")}
        optimizer = MuonAdamW(trainee.named_parameters(), options.lr, options.lr / 8, adam_names=ADAM_NAMES)

        def publish(steps: int) -> dict[str, object]:
            save_model(trainee.model, output / "model.safetensors")
            save(output / HEADS, trainee.heads)
            pack_folder(output, output / PACKED, overwrite=True)
            return {f"probe_{split}": probe(trainee, each, device, PROBED) for split, each in judges.items()}

        if not checkpoint.exists():
            log({"phase": "start", "fresh": _begin(trainee, start)})
            if options.seeing:
                log({"phase": "see", "portrait": learn_to_see(trainee, artist, options.seeing, device)})
            if options.reading:
                keep = start is not None
                read = learn_to_read(trainee, artist, options.reading, options.captions, device, keep)
                log({"phase": "read"} | read)
            writing = time.perf_counter()
            log({"step": 0} | publish(0))
            now = time.perf_counter()
            progress = {"step": 0.0, "seconds": now - began, "saving": 2 * (now - writing)}
            save_checkpoint(checkpoint, trainee, Average(trainee, DECAY), optimizer, progress)
            how = dataclasses.replace(how, began=now)
        _run(trainee, optimizer, artist, pool, told, options, how, checkpoint, publish, log)
    finally:
        studio.close()


def boxed(config: ModelConfig) -> ModelConfig:
    """A model that takes boxes, which changes no weight."""
    return dataclasses.replace(config, concept=dataclasses.replace(config.concept, mask="boxes"))


def _loop_options(options: Options, began: float) -> LoopOptions:
    gpu = torch.device(options.device).type == "cuda"
    return LoopOptions(
        "train",
        options.steps,
        options.minutes,
        rate,
        log_every=options.log_every,
        save_every=5 * options.log_every,
        save_minutes=1.0 if gpu else None,
        began=began,
    )


def _run(
    trainee: Trainee,
    optimizer: MuonAdamW,
    artist: Artist,
    pool: Pool,
    told: Told,
    options: Options,
    how: LoopOptions,
    checkpoint: Path,
    publish: Callable[[int], dict[str, object]],
    log: Log,
) -> None:
    """The steps, and how fast they go."""
    gpu = torch.device(options.device).type == "cuda"
    clips = options.batch_size * (1 + (options.more - 1) * options.windows)  # of a step, on average
    matrices = matrix_rate(options.device, MEASURED if gpu else MEASURED / 10)
    pace, taken = Pace(matrices), dict[tuple[int, int], int]()
    log({"phase": "speed", "matrix_tflops": round(matrices / 1e12, 3)})
    torch.backends.cudnn.benchmark = gpu  # shapes are few, and stay
    if gpu and not options.eager:
        trainee.compile_parts()

    def losses_of(step: int) -> dict[str, Tensor]:
        pool.at(step)
        told.at(step)
        drawn = Drawn.of(trainee, artist, pool, told, options, step)
        kind = drawn.batch.concept_mask.shape[1], drawn.batch.latents.shape[2]
        if kind not in taken:
            few = Drawn.of(trainee, artist, pool, told, options, step, COUNTED)
            taken[kind] = operations(lambda: few.losses()["total"]) // len(few.sigma)
            trainee.zero_grad(set_to_none=True)
        size = len(drawn.sigma)
        pace.step(size, taken[kind] * size)
        return drawn.losses()

    run_loop(
        trainee,
        optimizer,
        losses_of,
        how,
        log=lambda record: log(record | {"samples": round(record["step"] * clips)} | pace.told()),
        average=Average(trainee, DECAY),
        checkpoint=checkpoint,
        publish=publish,
    )


@dataclass(frozen=True)
class Drawn:
    """What a step learns from; it follows from the seed and the step's number."""

    trainee: Trainee
    device: str
    batch: Batch
    captions: Captions
    noise: Tensor
    sigma: Tensor
    window: slice | None

    @classmethod
    def of(
        cls,
        trainee: Trainee,
        artist: Artist,
        pool: Pool,
        told: Told,
        options: Options,
        step: int,
        shrunk: int = 1,
    ) -> Self:
        """That of a step; of a part, 1/``shrunk``, of its clips and captions."""
        rng, device = random_of(options.seed, step), options.device
        window = random_window(rng, artist.config.latent_shape[1], options.windows, WINDOW)
        size = options.batch_size if window is None else options.more * options.batch_size
        some = -(-size // shrunk)
        boxing = Boxing.random(random_of(options.seed, BOXES + step), some, options.boxes)
        batch = pool.batch(rng, some, options.dropped, window, options.apart, boxing)
        captions = told.captions(rng, -(-options.captions // shrunk))
        noise = placing_noise(normal(rng, tuple(batch.latents.shape), device), batch.spot)
        sigma = random_sigma(rng, len(noise), device, options.high)
        # The sprites' function asks of a batch what this one has, too.
        noise, _ = decoy_noise(batch, noise, sigma, rng, options.decoys)  # type: ignore[arg-type]
        return cls(trainee, device, batch, captions, noise, sigma, window)

    def losses(self) -> dict[str, Tensor]:
        """Those of the trainee."""
        with cheapest_attention(self.device), autocast(self.device):
            losses: dict[str, Tensor] = self.trainee(
                self.batch, self.captions, self.noise, self.sigma, self.window
            )
        return losses


def _note_options(output: Path, options: Options, start: Path | None, resumed: bool) -> None:
    """Keep what decides how a training goes; says where another run of the folder had it otherwise."""
    path, given = output / "options.json", dataclasses.asdict(options)
    now = {name: given[name] for name in sorted(given.keys() - FREE)} | {"start": start and str(start)}
    now = json.loads(json.dumps(now))
    before = BEFORE | json.loads(path.read_text()) if resumed and path.exists() else now
    other = [name for name in now if now[name] != before.get(name)]
    if other:
        told = ", ".join(f"{name} {now[name]} (so far {before.get(name)})" for name in other)
        LOG.warning("%s goes on with other options, not as it would have: %s", output, told)
    path.write_text(json.dumps(now, indent=1) + "\n")


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
            artist = Artist(atlas, tokenizer, config, halved(vae))
            scenes = artist.scenes(range(JUDGED - ANALYSED, JUDGED), Wish())
            known = int((vae.basis.abs().sum(1) > 0).sum())
            add_components(vae, artist.pixels(scenes), known)
        write_vae(vae, output, config.vae)
    return load_vae(output)


def _begin(trainee: Trainee, start: Path | None) -> list[str]:
    """Take over weights; returns the names of what stays fresh."""
    if start is None:
        return start_from_sprites(trainee.model, SPRITES / "model.safetensors")
    state = state_of(start)
    own = trainee.state_dict()
    taken = {name: state[name] for name in own if name in state and state[name].shape == own[name].shape}
    trainee.load_state_dict(taken, strict=False)
    tied = {own[name].data_ptr() for name in taken}
    return sorted(name for name, value in own.items() if name not in taken and value.data_ptr() not in tied)
