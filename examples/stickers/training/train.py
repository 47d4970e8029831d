"""One training of the open world's model, from the sprites' weights or a checkpoint, in a folder of its own.

The folder holds ``vae.safetensors`` (components, and the decoder's network once it is trained),
``tokenizer.json``, ``training.safetensors`` (what an interrupted training goes on from, exactly),
``model.safetensors`` and ``heads.safetensors`` (averaged weights) and ``log.jsonl``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from conceptmaster.engine.checkpoints.safetensors_io import save, save_model
from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.presets import preset
from conceptmaster.engine.vae.block_vae import BlockVAE
from conceptmaster.examples.sprites.training.attention import cheapest_attention
from conceptmaster.examples.sprites.training.learning import Average, MuonAdamW, autocast, save_checkpoint
from conceptmaster.examples.sprites.training.loop import LoopOptions, log_to, random_of
from conceptmaster.examples.sprites.training.loop import train as run_loop
from conceptmaster.examples.sprites.training.noising import (
    DECOY_HELD,
    HELD_SIGMA,
    decoy_noise,
    normal,
    random_sigma,
)
from conceptmaster.examples.sprites.training.train_model import ADAM_NAMES
from conceptmaster.examples.sprites.training.train_vae import load_vae, write_vae

from ..world.atlas import Atlas
from ..world.scenes import Wish
from ..world.tokens import build_tokenizer
from .batches import Artist, Pool
from .components import add_components, doubled, halved
from .options import Options, Supply
from .packing import HEADS, state_of
from .probing import probe
from .reading import learn_to_read
from .seeing import learn_to_see
from .starting import start_from_sprites
from .trainee import Trainee
from .windows import cut, random_window

SPRITES = Path(__file__).parents[2] / "sprites" / "weights"
READ_BESIDE, JUDGED = 1 << 44, 1 << 48
"""First seeds of the captions that are read beside the batches, and of what the probe looks at."""
ANALYSED, PROBED = 288, 96
"""Clips that the components are found from, and clips of each held-out split that the probe looks at."""
WINDOW, MORE = 2, 2
"""Latent frames of a clip that are seen in some of the steps, and how many times as many clips are then."""
WARM, FLAT, FINAL = 0.02, 0.6, 0.04
"""Shares of a training up to which its learning rates rise, and stay; what they have come down to in the
end."""


def rate(done: float) -> float:
    """What learning rates are scaled by where a share ``done`` of a training is over."""
    if done < WARM:
        return max(done, 1e-4) / WARM
    return 1 - (1 - FINAL) * min(1.0, max(0.0, (done - FLAT) / (1 - FLAT)))


def train(atlas: Atlas, output: Path, options: Options, start: Path | None = None) -> None:
    """Train to the end of the options' minutes or steps; goes on from the folder where a training is in it.

    ``start``: a folder of another training, or of a packed checkpoint (see ``packing``), to begin from with a
    fresh optimizer; None begins from the sprites' weights. Raises InputError, CheckpointError.
    """
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    config, device = preset("stickers"), options.device
    tokenizer = _tokenizer(atlas, output, start)
    vae = _vae(atlas, tokenizer, config, output, start)
    trainee = Trainee(config).to(device)
    checkpoint, log = output / "training.safetensors", log_to(output / "log.jsonl")
    artist = Artist(atlas, tokenizer, config, halved(vae), device)
    judges = {split: _judge(artist, config, split) for split in ("nouns", "sets")}
    pool = Pool(lambda number: _block(artist, options, number), config, options.supply)
    optimizer = MuonAdamW(trainee.named_parameters(), options.lr, options.lr / 8, adam_names=ADAM_NAMES)
    average = Average(trainee, 0.995)
    if not checkpoint.exists():
        log({"phase": "start", "fresh": _begin(trainee, start)})
        if options.seeing:
            log({"phase": "see", "portrait": learn_to_see(trainee, artist, options.seeing, device)})
        if options.reading:
            read = learn_to_read(trainee, artist, options.reading, options.captions, device)
            log({"phase": "read", "story": read})
        average = Average(trainee, 0.995)
        save_checkpoint(checkpoint, trainee, average, optimizer, {"step": 0.0, "seconds": 0.0})
        log({"step": 0} | _probes(trainee, judges, device))

    clips = options.batch_size * (1 + (MORE - 1) * options.windows)  # of a step, on average

    def losses_of(step: int) -> dict[str, Tensor]:
        pool.at(step)
        return _losses(trainee, artist, pool, options, step)

    def publish(steps: int) -> dict[str, object]:
        save_model(trainee.model, output / "model.safetensors")
        save(output / HEADS, trainee.heads)
        return _probes(trainee, judges, device)

    run_loop(
        trainee,
        optimizer,
        losses_of,
        LoopOptions(
            "train",
            options.steps,
            options.minutes,
            rate,
            log_every=options.log_every,
            save_every=5 * options.log_every,
        ),
        log=lambda record: log(record | {"samples": round(record["step"] * clips)}),
        average=average,
        checkpoint=checkpoint,
        publish=publish,
    )


def _losses(trainee: Trainee, artist: Artist, pool: Pool, options: Options, step: int) -> dict[str, Tensor]:
    """The losses of a step; what happens in it follows from the seed and its number."""
    rng, device = random_of(options.seed, step), options.device
    window = random_window(rng, artist.config.latent_shape[1], options.windows, WINDOW)
    size = options.batch_size if window is None else MORE * options.batch_size
    batch = cut(pool.batch(rng, size, options.dropped), window).to(device)
    first = READ_BESIDE + step * options.captions
    captions = artist.captions(range(first, first + options.captions), Wish())
    noise = normal(rng, tuple(batch.latents.shape), device)
    sigma = random_sigma(rng, len(noise)).to(device)
    # The sprites' function asks of a batch what this one has, too.
    noise, astray = decoy_noise(batch, noise, sigma, rng, options.decoys)  # type: ignore[arg-type]
    held = torch.where(astray, DECOY_HELD, HELD_SIGMA)
    with cheapest_attention(device), autocast(device):
        losses: dict[str, Tensor] = trainee(batch, captions, noise, sigma, held, window)
    return losses


def _block(artist: Artist, options: Options, number: int) -> dict[str, Tensor]:
    size = options.supply.size
    first = (options.seed * (1 << 24) + number) * size
    return artist.draw(artist.scenes(range(first, first + size), Wish()), first)


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


def _probes(trainee: Trainee, judges: Mapping[str, Pool], device: str) -> dict[str, object]:
    return {f"probe_{split}": probe(trainee, judge, device, PROBED) for split, judge in judges.items()}
