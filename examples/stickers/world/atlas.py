"""All pictures in one file: rendered, cut to what shows of them, each with its noun, set and main colour.

A picture is a tile of ``TILE`` x ``TILE`` pixels with alpha whose longer side fills ``BOX`` of them. On disk
a tile is WebP, so that the whole atlas takes some 20 MB.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from conceptmaster.errors import InputError, MissingDependency, how_to_install

from . import openclipart, own
from .nouns import Noun, nouns_of
from .sets import SETS, fetch, read

TILE, BOX = 80, 72
RENDERED = 160
"""Side in pixels at which a picture is rendered before it is cut and scaled down."""
LEAST_SHOWN = 0.04
"""Least share of a tile that a picture covers: of thinner ones nothing is to be recognised."""
COLOURFUL = 0.08
"""Least colourfulness of a picture of a set that has drawings in black and white, too."""
SPLITS = ("train", "nouns", "sets", "all")
"""What may be asked for: what is trained on, nouns that never are, sets that never are, and all there is."""


@dataclass(frozen=True)
class Entry:
    """One picture's words: its noun, other names of it, and its set."""

    noun: str
    synonyms: tuple[str, ...]
    set: str

    @property
    def split(self) -> str:
        """Which of ``SPLITS`` it belongs to."""
        if any(each.held_out for each in SETS if each.name == self.set):
            return "sets"
        return "nouns" if Noun(self.noun, ()).held_out else "train"


@dataclass(frozen=True)
class Atlas:
    """Tiles uint8 [K,TILE,TILE,4] (RGB not multiplied by alpha), and what each shows."""

    tiles: np.ndarray
    entries: tuple[Entry, ...]

    def of(self, split: str) -> dict[str, list[int]]:
        """The pictures of a split, by noun, in order. Raises InputError for a split that is not one or has no
        picture."""
        if split not in SPLITS:
            raise InputError(f"there is no split {split!r}: {', '.join(SPLITS)}")
        found = self._splits[split]
        if not found:
            raise InputError(f"the atlas has no picture of the split {split!r}")
        return found

    @cached_property
    def _splits(self) -> dict[str, dict[str, list[int]]]:
        found: dict[str, dict[str, list[int]]] = {split: {} for split in SPLITS}
        for number, entry in enumerate(self.entries):
            for split in (entry.split, "all"):
                found[split].setdefault(entry.noun, []).append(number)
        return found

    @cached_property
    def colours(self) -> np.ndarray:
        """The main colour of every picture, RGB in 0..1, float32 [K,3]; see ``main_colour``."""
        return np.stack([main_colour(tile) for tile in self.tiles])

    def save(self, path: Path) -> None:
        """Write the atlas as one file."""
        packed = [_webp(tile) for tile in tqdm(self.tiles, desc="atlas", disable=None)]
        ends = np.cumsum([len(each) for each in packed])
        words = [[entry.noun, list(entry.synonyms), entry.set] for entry in self.entries]
        with path.open("wb") as file:
            np.savez(
                file,
                pictures=np.frombuffer(b"".join(packed), np.uint8),
                ends=ends,
                words=np.frombuffer(json.dumps(words).encode(), np.uint8),
            )


def load(path: Path) -> Atlas:
    """An atlas that ``Atlas.save`` wrote. Raises InputError where there is none, or it cannot be read."""
    if not path.exists():
        raise InputError(f"{path} is missing: `python -m conceptmaster.examples.stickers fetch` makes it")
    try:
        with np.load(path, allow_pickle=False) as file:
            pictures, ends, words = file["pictures"].tobytes(), file["ends"], file["words"].tobytes()
        starts = [0, *ends[:-1]]
        with ThreadPoolExecutor() as pool:
            tiles = list(pool.map(_tile, [pictures[a:b] for a, b in zip(starts, ends, strict=True)]))
        entries = [Entry(noun, tuple(synonyms), title) for noun, synonyms, title in json.loads(words)]
    except (KeyError, OSError, ValueError) as error:
        raise InputError(f"{path} is no atlas of pictures: {error}") from None
    return Atlas(np.stack(tiles), tuple(entries))


def splits(atlas: Atlas) -> dict[str, dict[str, list[int]]]:
    """The pictures of every split that has any, by noun."""
    return {split: found for split, found in atlas._splits.items() if found}


def build(cache: Path, without: Collection[str] = ()) -> Atlas:
    """Fetch the sets into ``cache``, render them, and draw what this project draws itself.

    ``without``: names of sets that are left out. Raises InputError for a name that no set has, and where a
    set cannot be fetched.
    """
    names = (*(each.name for each in SETS), openclipart.NAME, own.SPRITES, own.CUT_OUTS)
    if unknown := sorted(set(without) - set(names)):
        raise InputError(f"there is no picture set {unknown[0]!r}: {', '.join(names)}")
    wanted = [each for each in SETS if each.name not in without]
    drawn = None if openclipart.NAME in without else openclipart.fetch(cache)
    sources = {each.name: read(path) for each, path in zip(wanted, fetch(cache, wanted), strict=True)}
    found, nouns = nouns_of(sources)
    render = renderer()
    tiles, entries = [], []

    def add(picture: Image.Image, noun: Noun, title: str, colourful: float = 0.0) -> None:
        tile = cut_out(picture)
        if tile is not None and colourfulness(tile) >= colourful:
            tiles.append(tile)
            entries.append(Entry(noun.name, noun.synonyms, title))

    for (title, name), noun in tqdm(found.items(), desc="render", disable=None):
        packed = sources[title].pictures[name]
        add(render(packed) if isinstance(packed, str) else _opened(packed), noun, title)
    by_phrase = {phrase: noun for noun in nouns for phrase in (*noun.synonyms, noun.name)}
    if drawn is not None:
        known = {phrase: noun.name for phrase, noun in by_phrase.items()}
        for name, packed in openclipart.drawings(drawn, known):
            add(_opened(packed), by_phrase[name], openclipart.NAME, COLOURFUL)
    for title, pictures in ((own.SPRITES, own.sprites()), (own.CUT_OUTS, own.cut_outs())):
        for name, picture in () if title in without else pictures:
            add(picture, by_phrase.get(name, Noun(name, ())), title)
    return Atlas(np.stack(tiles), tuple(entries))


def renderer() -> Callable[[str], Image.Image]:
    """What draws an SVG document as a picture with alpha. Raises MissingDependency without resvg."""
    try:
        import resvg_py
    except ImportError:
        raise MissingDependency(f"pictures are rendered with resvg: {how_to_install('stickers')}") from None

    def render(svg: str) -> Image.Image:
        packed = resvg_py.svg_to_bytes(
            svg_string=svg, width=RENDERED, height=RENDERED, skip_system_fonts=True
        )
        return Image.open(io.BytesIO(bytes(packed))).convert("RGBA")

    return render


def cut_out(picture: Image.Image) -> np.ndarray | None:
    """What shows of a picture with alpha, in the middle of a tile, uint8 [TILE,TILE,4]; None where hardly
    anything does."""
    box = picture.getchannel("A").point(lambda a: 255 if a > 12 else 0).getbbox()
    if box is None:
        return None
    shown = picture.crop(box)
    scale = BOX / max(shown.size)
    size = max(1, round(shown.width * scale)), max(1, round(shown.height * scale))
    small = shown.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    tile = Image.new("RGBA", (TILE, TILE))
    tile.paste(small, ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    pixels = np.asarray(tile)
    return pixels if pixels[..., 3].mean() / 255 >= LEAST_SHOWN else None


def main_colour(tile: np.ndarray) -> np.ndarray:
    """The mean colour of the part of a tile's pixels that are most alike, RGB in 0..1, float32 [3]."""
    rgb, alpha = tile[..., :3].reshape(-1, 3), tile[..., 3].reshape(-1) / 255.0
    cell = (rgb // 64).astype(int) @ (16, 4, 1)
    weight = np.bincount(cell, alpha, 64)
    mine = (cell == weight.argmax()) * alpha
    return ((rgb * mine[:, None]).sum(0) / max(mine.sum(), 1e-6) / 255).astype(np.float32)


def colourfulness(tile: np.ndarray) -> float:
    """The mean difference of a tile's strongest and weakest channel where it shows, 0 (grey) to 1."""
    rgb, alpha = tile[..., :3].astype(np.float32) / 255, tile[..., 3] / 255.0
    return float(((rgb.max(-1) - rgb.min(-1)) * alpha).sum() / max(alpha.sum(), 1e-6))


def from_pictures(pictures: Iterable[tuple[str, Image.Image]], title: str) -> Atlas:
    """An atlas of pictures with alpha by label, as one set. Raises InputError where nothing of one shows."""
    tiles, entries = [], []
    for label, picture in pictures:
        tile = cut_out(picture.convert("RGBA"))
        if tile is None:
            raise InputError(f"nothing is to be seen of the picture of {label!r}")
        tiles.append(tile)
        entries.append(Entry(label, (), title))
    if not tiles:
        raise InputError("there is no picture")
    return Atlas(np.stack(tiles), tuple(entries))


def of_folder(folder: Path) -> Atlas:
    """An atlas of a folder's PNGs with alpha, each called as its file (``red_fox.png``: "red fox").

    Raises InputError for a folder without pictures, and for a picture that cannot be read.
    """
    paths = sorted(folder.glob("*.png")) if folder.is_dir() else []
    if not paths:
        raise InputError(f"{folder} is no folder with PNG files")
    pictures = []
    for path in paths:
        try:
            pictures.append((path.stem.replace("_", " ").strip(), Image.open(path).convert("RGBA")))
        except OSError:
            raise InputError(f"{path} cannot be read as a picture") from None
    return from_pictures(pictures, str(folder))


def _opened(packed: bytes) -> Image.Image:
    """A picture file; no larger than it needs to be, whatever its size."""
    picture = Image.open(io.BytesIO(packed))
    picture.thumbnail((2 * RENDERED, 2 * RENDERED), reducing_gap=2.0)
    return picture.convert("RGBA")


def _webp(tile: np.ndarray) -> bytes:
    packed = io.BytesIO()
    Image.fromarray(tile).save(packed, "WEBP", quality=84, alpha_quality=90, method=4)
    return packed.getvalue()


def _tile(packed: bytes) -> np.ndarray:
    tile = np.asarray(_opened(packed))
    if tile.shape != (TILE, TILE, 4):
        raise ValueError(f"a tile of {tile.shape}")
    return tile
