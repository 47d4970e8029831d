"""Systems that are tuned on a request's own pictures before they can show it, with the world's base.

``custom_diffusion``: the text's keys and values of every block and one new word per concept (Kumari et al.,
arXiv 2212.04488) make a delta, which `generate --custom` takes beside the base's own bundle. ``dreambooth``:
the whole transformer, on a rare word that is there already ("sks"; Ruiz et al., arXiv 2208.12242), makes
weights, and so a bundle, per request; ``dreambooth_lora`` its small form, a LoRA. All keep what the base
knows of the noun by clips of others of its kind (prior preservation).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor, nn

from conceptmaster.atomic_write import replacing
from conceptmaster.delta_file import write_delta
from conceptmaster.engine.checkpoints.deltas import delta_of, give_words, text_keys_values
from conceptmaster.engine.checkpoints.safetensors_io import load_model, save, save_model
from conceptmaster.engine.dit import MIN_SIGMA
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.engine.vae.block_vae import BlockVAE
from conceptmaster.errors import InputError
from conceptmaster.hashed import sha256_files
from conceptmaster.runtime.request import Concept, Request
from conceptmaster.tokenizer_file import add_words, read_tokenizer
from conceptmaster.untrusted import read_json

from ..world.requesting import PICTURE, make_folder
from ..world.scenes import NOUNS
from ..world.vocabulary import tokenise
from .noising import HELD_SIGMA, normal, random_sigma
from .train_vae import load_vae
from .tuning_clips import Clips, class_clips, picture_clips
from .tuning_options import METHODS, TuneOptions

RARE = ("sks", "zwx", "qvj")
"""Words that nothing is called: what DreamBooth names a request's concepts."""
DONE = "tuned.json"
MADE = dict(zip(METHODS, ("delta.safetensors", "weights", "lora.safetensors"), strict=True))
"""By method, the file or the folder that it makes."""


@dataclass(frozen=True)
class Base:
    """A model of this world without concepts, opened: what all requests start from."""

    folder: Path
    model: ConceptMaster
    vae: BlockVAE
    tokenizer: str


@dataclass(frozen=True)
class Tuned:
    """What tuning made. files: a delta, a LoRA, or the folder of whole weights, which `export` reads; prompt:
    the request's, with the concepts' new names; names: these by label; seconds: of the whole tuning."""

    method: str
    files: tuple[Path, ...]
    prompt: str
    names: Mapping[str, str]
    seconds: float


def open_base(folder: Path) -> Base:
    """Opens a weights folder. Raises InputError for one that cannot be read, and for a model that takes
    concepts."""
    try:
        model = load_model(folder / "model.safetensors")
        if model.config.concept.injection != "none":
            raise InputError("it takes concepts, tuning starts from a base whose injection is 'none'")
        vae = load_vae(folder, model.config.vae)
        _, tokenizer = read_tokenizer(folder / "tokenizer.json", model.config.text_encoder["vocab_size"])
        return Base(folder, model, vae, tokenizer)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot start from {folder}: {error}") from error


def tune(
    method: str, base: Base, request: Request, output: Path, options: TuneOptions | None = None
) -> Tuned:
    """Tunes a base on a request's pictures; ``base`` stays as it is.

    Writes into the folder ``output``, and ``tuned.json`` at the end: where that is, it is read, and nothing
    is done. request: its concepts' pictures are uint8 arrays [H,W,3], each alone on plain ground; a label's
    last word is its noun. Raises InputError for a method that is none, for a request without concepts, with
    more than DreamBooth has rare words for, or with one that cannot be learned, and for an output folder of
    another tuning.
    """
    options = options or TuneOptions()
    if method not in METHODS:
        raise InputError(f"the method must be one of {', '.join(METHODS)}, not {method!r}")
    if not request.concepts:
        raise InputError("a request without concepts: there is nothing to tune on")
    if len(request.concepts) > len(RARE):
        raise InputError(f"{len(request.concepts)} concepts: a request is tuned on 1 to {len(RARE)}")
    names = names_of(method, [concept.label for concept in request.concepts])
    prompt = named(request.prompt, names)
    for concept in request.concepts:
        _check(concept)
    called = {label: f"{word} {_noun(label)}" for label, word in names.items()}
    if (output / DONE).exists():
        return Tuned(method, (output / MADE[method],), prompt, called, _read(output, method, prompt, options))
    began = time.perf_counter()
    make_folder(output)
    torch.manual_seed(options.seed)
    trainee = _TRAINEES[method](base, list(names.values()), options)
    steps = options.steps or (250 if len(names) == 1 else 500)
    _learn(trainee, base, _clips(base, request, names, options), steps, options)
    files = trainee.write(output)
    tuned = Tuned(method, files, prompt, called, time.perf_counter() - began)
    _write(tuned, options, output)
    return tuned


def names_of(method: str, labels: Sequence[str]) -> dict[str, str]:
    """The word of each label: new ones, "<cat-1>", or rare ones that are there."""
    if method == "custom_diffusion":
        return {label: f"<{_noun(label)}-{k}>" for k, label in enumerate(labels, 1)}
    return dict(zip(labels, RARE, strict=False))


def named(prompt: str, names: Mapping[str, str]) -> str:
    """A prompt with each label's word before its noun: "the first <cat-1> cat". Raises InputError where it
    has not the label."""
    for label, word in names.items():
        noun = _noun(label)
        own, said = f"{label.removesuffix(noun)}{word} {noun}", rf"(?<![\w<]){re.escape(label)}(?!\w)"
        prompt, count = re.subn(said, own, prompt, count=1)
        if not count:
            raise InputError(f"the prompt does not say {label!r}")
    return prompt


def _noun(label: str) -> str:
    return label.split()[-1]


def _check(concept: Concept) -> None:
    """Raises InputError for a concept that cannot be learned."""
    label, picture = concept.label, concept.image
    if _noun(label) not in NOUNS:
        raise InputError(f"the label {label!r} must end in a noun of this world: {', '.join(NOUNS)}")
    found = f"{picture.dtype} {list(picture.shape)}" if isinstance(picture, np.ndarray) else "no array"
    if found != f"uint8 [{PICTURE}, {PICTURE}, 3]":
        raise InputError(f"the picture of {label!r} must be uint8 [{PICTURE},{PICTURE},3], not {found}")


def _clips(
    base: Base, request: Request, names: Mapping[str, str], options: TuneOptions
) -> list[tuple[Clips, Clips]]:
    """Of each concept clips of its picture, and of its kind."""
    found, how = [], (base.model.config, base.vae)
    for k, concept in enumerate(request.concepts):
        seed, noun, picture = options.seed * 64 + k, _noun(concept.label), np.asarray(concept.image)
        own = picture_clips(f"{names[concept.label]} {noun}", [picture], options.views, seed, *how)
        found.append((own, class_clips(noun, options.prior, seed, *how)))
    return found


class Trainee:
    """What one method trains of a copy of the base, and what it writes."""

    def __init__(self, base: Base, words: Sequence[str], options: TuneOptions) -> None:
        self.base, self.options = base, options
        self.model = copy.deepcopy(base.model).requires_grad_(False)
        self.tokenizer = tokenizers.Tokenizer.from_str(base.tokenizer)

    def groups(self) -> list[dict[str, Any]]:
        """Parameters and their learning rates, as torch's optimizers take them."""
        raise NotImplementedError

    def write(self, output: Path) -> tuple[Path, ...]:
        """The files of what was learned."""
        raise NotImplementedError

    def keep(self) -> None:
        """Called after each step."""

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B,T] each -> text [B,T,Dt]."""
        return self.model.text_encoder(ids, mask)


class CustomDiffusion(Trainee):
    """The text's keys and values, and the words' rows, which start as the noun's."""

    def __init__(self, base: Base, words: Sequence[str], options: TuneOptions) -> None:
        super().__init__(base, words, options)
        self.words = list(words)
        ids = add_words(self.tokenizer, self.words)
        table = base.model.text_encoder.model.shared.weight
        nouns = [self.tokenizer.encode(word.strip("<>").rsplit("-", 1)[0]).ids[:-1] for word in words]
        rows = torch.stack([table[noun].mean(0) for noun in nouns]).detach()
        give_words(self.model, rows, ids.start)
        self.ids = torch.tensor(list(ids))
        self.table = self.model.text_encoder.model.shared.weight.requires_grad_(True)
        self.frozen = self.table.detach().clone()
        names = text_keys_values(self.model.transformer)
        self.changing = {name: self.model.transformer.get_parameter(name) for name in names}
        for weight in self.changing.values():
            weight.requires_grad_(True)

    def groups(self) -> list[dict[str, Any]]:
        """See ``Trainee``."""
        words = {"params": [self.table], "lr": self.options.word_lr}
        return [words, {"params": list(self.changing.values()), "lr": self.options.rate("custom_diffusion")}]

    @torch.no_grad()
    def keep(self) -> None:
        """All rows but the words' stay."""
        rows = self.table[self.ids]
        self.table.copy_(self.frozen)
        self.table[self.ids] = rows

    def write(self, output: Path) -> tuple[Path, ...]:
        """A delta."""
        path, before = output / MADE["custom_diffusion"], self.base.model.transformer
        changes = {name: weight - before.get_parameter(name) for name, weight in self.changing.items()}
        words = dict(zip(self.words, self.table[self.ids], strict=True))
        write_delta(path, delta_of(path, self.base.model, {"transformer": changes}, words))
        return (path,)


class DreamBooth(Trainee):
    """The whole transformer."""

    def groups(self) -> list[dict[str, Any]]:
        """See ``Trainee``."""
        self.model.transformer.requires_grad_(True)
        return [{"params": list(self.model.transformer.parameters()), "lr": self.options.rate("dreambooth")}]

    def write(self, output: Path) -> tuple[Path, ...]:
        """A weights folder."""
        folder = output / MADE["dreambooth"]
        folder.mkdir(exist_ok=True)
        save_model(self.model.half(), folder / "model.safetensors")
        for name in ("vae.safetensors", "tokenizer.json", "defaults.json", "vocabulary.json", "ranges.json"):
            if (self.base.folder / name).exists():
                shutil.copyfile(self.base.folder / name, folder / name)
        return (folder,)


class DreamBoothLora(Trainee):
    """Pairs of small matrices beside every attention's projections."""

    def __init__(self, base: Base, words: Sequence[str], options: TuneOptions) -> None:
        super().__init__(base, words, options)
        self.pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, module in self.model.transformer.named_modules():
            if isinstance(module, nn.Linear) and name.startswith("blocks.") and ".attn" in name:
                down = nn.Parameter(torch.randn(options.rank, module.in_features) / module.in_features**0.5)
                up = nn.Parameter(torch.zeros(module.out_features, options.rank))
                self.pairs[name] = down, up
                module.register_forward_hook(_beside(down, up))

    def groups(self) -> list[dict[str, Any]]:
        """See ``Trainee``."""
        pairs = [matrix for pair in self.pairs.values() for matrix in pair]
        return [{"params": pairs, "lr": self.options.rate("dreambooth_lora")}]

    def write(self, output: Path) -> tuple[Path, ...]:
        """A LoRA under diffusers' names."""
        tensors = {}
        for name, (down, up) in self.pairs.items():
            tensors[f"transformer.{name}.lora_A.weight"] = down.half()
            tensors[f"transformer.{name}.lora_B.weight"] = up.half()
        path = output / MADE["dreambooth_lora"]
        save(path, tensors)
        return (path,)


_TRAINEES: dict[str, type[Trainee]] = dict(
    zip(METHODS, (CustomDiffusion, DreamBooth, DreamBoothLora), strict=True)
)


def _beside(down: Tensor, up: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda _, inputs, output: output + inputs[0] @ down.T @ up.T


def _learn(
    trainee: Trainee, base: Base, clips: Sequence[tuple[Clips, Clips]], steps: int, options: TuneOptions
) -> None:
    """Each step one clip of a concept, in turn, and one of its kind."""
    groups = trainee.groups()
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    rates, length = [group["lr"] for group in groups], base.model.config.text_tokens
    texts = [[_tokens(trainee, part.captions, length) for part in pair] for pair in clips]
    parameters = [parameter for group in groups for parameter in group["params"]]
    for step in range(steps):
        rng = np.random.Generator(np.random.Philox(key=[options.seed, step]))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / 20, (steps - step) / (0.4 * steps))
        concept = step % len(clips)
        rows = [int(rng.integers(len(part.captions))) for part in clips[concept]]
        loss = _loss(trainee, clips[concept], texts[concept], rows, rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        trainee.keep()


def _tokens(trainee: Trainee, captions: list[str], length: int) -> tuple[Tensor, Tensor]:
    ids, mask = tokenise(trainee.tokenizer, captions, length)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _loss(
    trainee: Trainee,
    clips: Sequence[Clips],
    texts: Sequence[tuple[Tensor, Tensor]],
    rows: Sequence[int],
    rng: np.random.Generator,
) -> Tensor:
    """The flow's error, as the base was trained on it (``Trainee`` of train_model.py), each clip's by its
    weights."""
    latents, weight = (
        torch.stack([getattr(part, name)[row] for part, row in zip(clips, rows, strict=True)])
        for name in ("latents", "weight")
    )
    ids, mask = (torch.stack([text[k][r] for text, r in zip(texts, rows, strict=True)]) for k in (0, 1))
    noise, sigma = normal(rng, tuple(latents.shape), "cpu"), random_sigma(rng, len(latents))
    s = sigma[:, None, None, None, None]
    transformer, c = trainee.model.transformer, trainee.model.config.concept
    nothing = latents.new_zeros(len(latents), c.max_concepts, c.tokens_per_concept, c.width)
    seen = torch.zeros(len(latents), c.max_concepts, dtype=torch.bool)
    noisy = (1 - s) * latents + s * noise
    velocity = transformer(noisy, sigma * 1000.0, trainee.text(ids, mask), nothing, seen)
    counted = s.clamp(min=MIN_SIGMA) / s.clamp(min=HELD_SIGMA)
    error = (velocity - (noise - latents)).square() * weight * counted.square()
    return (error.mean((1, 2, 3, 4)) / weight.mean((1, 2, 3, 4))).mean()


def _write(tuned: Tuned, options: TuneOptions, output: Path) -> None:
    about = {
        "method": tuned.method,
        "sha256": _hashes(output / MADE[tuned.method]),
        "prompt": tuned.prompt,
        "names": dict(tuned.names),
        "seconds": round(tuned.seconds, 2),
        "options": dataclasses.asdict(options),
    }
    with replacing(output / DONE) as temporary:
        temporary.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _hashes(made: Path) -> dict[str, str]:
    """SHA-256 of a file, or of each in a folder, by name."""
    folder, names = (made, sorted(os.listdir(made))) if made.is_dir() else (made.parent, [made.name])
    return sha256_files(folder, names)


def _read(output: Path, method: str, prompt: str, options: TuneOptions) -> float:
    """How long it took to tune before. Raises InputError where that was something else, and where its files
    are not those that it made."""
    try:
        about = read_json(output / DONE)
        asked = {"method": method, "prompt": prompt, "options": dataclasses.asdict(options)}
        other = [f"{k} {about[k]!r}, not {value!r}" for k, value in asked.items() if about[k] != value]
        seconds, hashes = float(about["seconds"]), about["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{output / DONE} is damaged, {error!r}: delete it to tune again") from error
    if other:
        raise InputError(f"{output} was tuned with {other[0]}: choose another --output")
    made = output / MADE[method]
    if not made.exists() or _hashes(made) != hashes:
        raise InputError(f"{made} is not what was tuned: delete {output / DONE} to tune again")
    return seconds
