"""OpenS2V-Eval (PKU-YuanGroup, arXiv 2505.20292), the public benchmark that peers report: its 180 prompts as
request lines, a set of ours in its layout, and of its scores the one that needs no weights, motion.

    Open-Domain_Eval.json  {"singleobj_1": {"img_paths": ["Images/…"], "prompt": …, "class_label": ["Cup"],
    …}, …} Images/…               what img_paths name, from the same folder VIDEOS/singleobj_1.mp4, which its
    scripts get with --input_video_folder

NexusScore, FaceSim, GmeScore, NaturalScore and the aesthetic score are left to its own scripts, and their
weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conceptmaster.atomic_write import check_output, replacing
from conceptmaster.errors import InputError
from conceptmaster.untrusted import read_json

from .samples import Sample, read_samples, write_samples

RANKS = ("first", "second", "third", "fourth", "fifth", "sixth")
OURS = "MC-Bench_Eval.json"
IMAGES = "Images"


def add_requests_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `opens2v-requests`."""
    parser.description = (
        "Request lines of OpenS2V-Eval's prompts: the videos' names are what its scripts want."
    )
    parser.add_argument(
        "--eval", required=True, metavar="FILE.json", help="Open-Domain_Eval.json, with Images/"
    )
    parser.add_argument("--output", required=True, metavar="FILE.jsonl", help="the request lines")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the first; one more for each (0)"
    )


def run_requests(args: argparse.Namespace) -> int:
    """Writes the request lines."""
    output = check_output(Path(args.output), (".jsonl",))
    samples = read_eval(Path(args.eval), args.seed)
    write_samples(samples, output)
    print(f"{len(samples)} requests: {output}")
    return 0


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `opens2v-layout`."""
    parser.description = (
        "Request lines, as `samples` makes them, in OpenS2V-Eval's layout for its own scripts."
    )
    parser.add_argument("--requests", required=True, metavar="FILE.jsonl", help="the request lines")
    parser.add_argument("--output", required=True, metavar="DIR", help=f"gets {OURS} and {IMAGES}/")


def run_layout(args: argparse.Namespace) -> int:
    """Writes the layout."""
    path = write_eval(read_samples(Path(args.requests)), Path(args.output))
    print(path)
    return 0


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `opens2v-score`."""
    parser.description = (
        "OpenS2V-Eval's motion (Farneback's flow) of a folder of videos, as its get_motionscore.py."
    )
    parser.add_argument("--videos", required=True, metavar="DIR", help="ID.mp4 each")
    parser.add_argument("--output", required=True, metavar="FILE.json", help="{ID: {motion_fb: …}}")
    parser.add_argument("--eval", metavar="FILE.json", help="tells which IDs should be there")


def run_score(args: argparse.Namespace) -> int:
    """Writes the scores, and says what was left out."""
    from conceptmaster.benchmarks import reports

    output = check_output(Path(args.output), (".json",))
    asked = None if args.eval is None else [sample.name for sample in read_eval(Path(args.eval))]
    scores, skipped = motion_scores(Path(args.videos), asked)
    reports.write(scores, output)
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")
    mean = sum(entry["motion_fb"] for entry in scores.values()) / len(scores)
    print(f"motion_fb of {len(scores)} videos: {mean:.4f}")
    return 0


def read_eval(path: Path, seed: int = 0) -> list[Sample]:
    """The requests of an evaluation file; labels in small letters, ranked ("first man") where several are
    alike.

    Raises: InputError, one line, for a file that cannot be read or is of another layout.
    """
    try:
        found = read_json(path)
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{str(path)!r} {error}") from None
    if not isinstance(found, dict) or not found:
        raise InputError(
            f"{str(path)!r} is no evaluation file of OpenS2V-Eval: an object of requests by their IDs"
        )
    return [_sample(name, entry, path, seed + number) for number, (name, entry) in enumerate(found.items())]


def _sample(name: str, entry: Any, path: Path, seed: int) -> Sample:
    fine = isinstance(entry, Mapping) and isinstance(entry.get("prompt"), str)
    images, labels = (entry.get("img_paths"), entry.get("class_label")) if fine else (None, None)
    for told in (images, labels):
        fine = fine and isinstance(told, list) and all(isinstance(text, str) and text for text in told)
    if not fine or len(images) != len(labels):  # type: ignore[arg-type]
        raise InputError(
            f"{str(path)!r}: {name!r:.60} must have prompt, img_paths and as many names in class_label"
        )
    assert images is not None and labels is not None
    plain = [label.lower() for label in labels]
    ranked = [
        label if plain.count(label) == 1 else f"{RANKS[min(plain[:i].count(label), len(RANKS) - 1)]} {label}"
        for i, label in enumerate(plain)
    ]
    return Sample(name, entry["prompt"], tuple(ranked), tuple(path.parent / image for image in images), seed)


def write_eval(samples: Sequence[Sample], folder: Path) -> Path:
    """Samples in its layout, pictures copied. Returns the JSON file. Raises InputError, OSError."""
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    found = {}
    for sample in samples:
        images = []
        for number, picture in enumerate(sample.pictures, 1):
            name = f"{IMAGES}/{sample.name}-{number}{picture.suffix.lower()}"
            if not picture.is_file():
                raise InputError(f"the picture {str(picture)!r} of {sample.name} is missing")
            with replacing(folder / name) as temporary:
                shutil.copyfile(picture, temporary)
            images.append(name)
        found[sample.name] = {
            "img_paths": images,
            "prompt": sample.caption,
            "synthesis_flag": "wrong",  # so it marks pictures that are not synthetic
            "class_label": [label.title() for label in sample.labels],
        }
    with replacing(folder / OURS) as temporary:
        temporary.write_text(json.dumps(found, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder / OURS


def motion_scores(
    folder: Path, asked: Sequence[str] | None = None
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """By ID, motion_fb; and by ID why there is none. asked: which should be there, all that are if None.

    Raises: InputError where there is no video at all.
    """
    from . import videos
    from .flow import farneback

    if not folder.is_dir():
        raise InputError(f"no folder of videos at {str(folder)!r}")
    there = {path.stem: path for path in sorted(folder.glob("*.mp4"))}
    names = list(there) if asked is None else asked
    scores, skipped = {}, {}
    for name in names:
        if name not in there:
            skipped[name] = "there is no video"
            continue
        try:
            scores[name] = {"motion_fb": farneback(videos.read(there[name]).frames)}
        except ValueError as error:
            skipped[name] = str(error)
    if not scores:
        raise InputError(f"{str(folder)!r} has no video that can be scored: they are called ID.mp4")
    return scores, skipped
