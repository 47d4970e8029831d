"""A delta: what CustomDiffusion makes of a few pictures, in one small safetensors file.

It teaches a base new words. Of each of the base's blocks it changes the keys and values of the text's
cross-attention, and each word brings its own row of the text encoder's table (Kumari et al., arXiv
2212.04488). In this engine these keys and values come from `condition` alone: `denoise` and its engine stay.

    words.<fox-1>                                float [Dt], its embedding
    transformer.blocks.0.attn2.to_k.weight       float [D,D], what is added to the base's

The metadata say what it was made for: `injection`, and of each transformer the SHA-256 of the weights that it
changes, as they were (`fingerprint`). Everybody may import this; it reads no pickle and needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .atomic_write import replacing
from .errors import InputError, how_to_install, not_loaded
from .tokenizer_file import WORD
from .untrusted import open_plain, parse_json, printable

FORMAT = "conceptmaster delta 1"
CHANGED = re.compile(r"(transformer|transformer_2)\.(?:vace_)?blocks\.\d{1,4}\.attn2\.to_[kv]\.weight")
WORDS = "words."
MOST_WORDS = 64
EXTRA = "custom"


@dataclass(frozen=True)
class Delta:
    """A delta, see the module's text.

    path: of its file; injection: of the model that it was made for; bases: SHA-256 by transformer; words:
    float32 [Dt] each; changes: floating point, [out,in] each, by the names of the weights.
    """

    path: Path
    injection: str
    bases: Mapping[str, str]
    words: Mapping[str, np.ndarray]
    changes: Mapping[str, np.ndarray]

    def __str__(self) -> str:
        """What messages call it, with its path: the files of all tunings are called alike."""
        return f"the delta {str(self.path)!r}"

    def of(self, transformer: str) -> dict[str, np.ndarray]:
        """What it changes of a transformer, by the names there."""
        begin = f"{transformer}."
        return {n.removeprefix(begin): v for n, v in self.changes.items() if n.startswith(begin)}


def read_delta(path: str | Path) -> Delta:
    """Reads what `write_delta` wrote. Raises InputError, one line, for any other file; MissingDependency."""
    path = Path(path)
    if path.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise InputError(
            f"{printable(path)} is a pickle, which can run code when it is loaded: a delta is safetensors"
        )
    try:
        open_plain(path).close()
        tensors, metadata = _open(path)
        if (found := metadata.get("format")) != FORMAT:
            raise ValueError(f"is no delta: its format is {found!r:.80}, not {FORMAT!r}")
        bases = parse_json(metadata.get("bases", "null"))
        texts = isinstance(bases, dict) and all(isinstance(value, str) for value in bases.values())
        injection = metadata.get("injection")
        if not texts or injection is None:
            raise ValueError("does not say what it was made for")
        words = {n.removeprefix(WORDS): _finite(n, v) for n, v in tensors.items() if n.startswith(WORDS)}
        changes = {n: _finite(n, v) for n, v in tensors.items() if not n.startswith(WORDS)}
        _check_words(words)
        if odd := next((name for name in changes if not CHANGED.fullmatch(name)), None):
            raise ValueError(f"changes {odd:.200}, and not the text's keys and values alone")
        if {name.partition(".")[0] for name in changes} != bases.keys():
            raise ValueError("does not say which weights it was made for")
    except OSError as error:
        raise InputError(f"cannot read the delta {str(path)!r}: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"the delta {str(path)!r} {error}") from None
    return Delta(path, injection, bases, words, changes)


def write_delta(path: str | Path, delta: Delta) -> None:
    """Writes a delta, whole or not at all. Raises InputError for words or names that none may have."""
    try:
        _check_words(delta.words)
    except ValueError as error:
        raise InputError(f"{delta} {error}") from None
    metadata = {"format": FORMAT, "injection": delta.injection, "bases": json.dumps(dict(delta.bases))}
    tensors = {f"{WORDS}{word}": value for word, value in delta.words.items()} | dict(delta.changes)
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    with replacing(Path(path)) as temporary:
        _library().numpy.save_file(arrays, temporary, metadata=metadata)


def fingerprint(weights: Mapping[str, Callable[[], np.ndarray]], names: Iterable[str]) -> str:
    """The SHA-256 of these weights: names in order, and values as float32, whatever they are stored in.
    weights: what gives each, one at a time."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(weights[name](), "<f4").data)
    return digest.hexdigest()


def check_fits(
    deltas: Sequence[Delta], injection: str, text_width: int, transformers: Collection[str]
) -> None:
    """Raises InputError, one line, for a delta that was made for another injection or text encoder, or for
    other transformers than those, and for two that bring the same word."""
    taken: dict[str, Delta] = {}
    for delta in deltas:
        if delta.injection != injection:
            raise InputError(
                f"{delta} was made for a model whose injection is {delta.injection!r}, this "
                f"one's is {injection!r}"
            )
        if absent := next((name for name in delta.bases if name not in transformers), None):
            raise InputError(f"{delta} changes {absent}, which this model does not have")
        for word, value in delta.words.items():
            if value.shape != (text_width,):
                raise InputError(
                    f"{delta} has an embedding of {len(value)} numbers for {word}, the text "
                    f"encoder's have {text_width}"
                )
            if word in taken:
                raise InputError(f"{taken[word]} and {delta} both bring the word {word}")
            taken[word] = delta


def check_base(
    deltas: Sequence[Delta],
    transformer: str,
    shapes: Mapping[str, Sequence[int]],
    weights: Mapping[str, Callable[[], np.ndarray]],
) -> None:
    """Raises InputError, one line, for a delta of other shapes than a transformer has, or of another base.

    shapes, weights: of what the transformer has, by its own names; see `fingerprint`.
    """
    for delta in deltas:
        changes = delta.of(transformer)
        for name, change in changes.items():
            if name not in shapes:
                raise InputError(f"{delta} changes {name}, which this model does not have")
            if tuple(shapes[name]) != change.shape:
                raise InputError(f"{delta} has {change.shape} for {name}, the model {tuple(shapes[name])}")
        if changes and fingerprint(weights, changes) != delta.bases[transformer]:
            raise InputError(
                f"{delta} was made for another base: the weights that it changes are not "
                "the ones that are here"
            )


def added(deltas: Iterable[Delta], transformer: str) -> dict[str, np.ndarray]:
    """What is added to a transformer's weights by their names, float32: several deltas add up."""
    found: dict[str, np.ndarray] = {}
    for delta in deltas:
        for name, change in delta.of(transformer).items():
            found[name] = found[name] + change if name in found else change.astype(np.float32)
    return found


def words_of(deltas: Iterable[Delta]) -> dict[str, np.ndarray]:
    """All words, in order, which is that of their ids; float32 [Dt] each."""
    return {word: value for delta in deltas for word, value in delta.words.items()}


def _check_words(words: Mapping[str, np.ndarray]) -> None:
    if not 1 <= len(words) <= MOST_WORDS:
        raise ValueError(f"has {len(words)} words, it must have 1 to {MOST_WORDS}")
    for word, value in words.items():
        if not WORD.fullmatch(word):
            raise ValueError(f"has the word {word!r:.80}: write <name>, of letters, digits, - and _")
        if value.ndim != 1 or not value.size:
            raise ValueError(f"has no embedding for {word}")


def _finite(name: str, value: np.ndarray) -> np.ndarray:
    if value.dtype.kind != "f":
        raise ValueError(f"has {value.dtype} in {name:.200}, not floating point")
    if not np.isfinite(value).all():
        raise ValueError(f"has numbers in {name:.200} that are not finite")
    return value


def _library() -> Any:
    try:
        import safetensors.numpy
    except (ImportError, MemoryError) as error:
        raise not_loaded("a delta's file", how_to_install(EXTRA), error) from error
    return safetensors


def _open(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    library = _library()
    try:
        with library.safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (library.SafetensorError, TypeError) as error:  # the latter for numbers that NumPy has not
        raise ValueError(f"is no readable safetensors file: {' '.join(str(error).split()):.300}") from error
