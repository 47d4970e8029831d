"""The commands `samples` and `score`."""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conceptmaster.errors import InputError

if TYPE_CHECKING:
    from .measures import Part

SAMPLES = """\
Makes the set from a folder of pictures: persons/LABEL/*.png, livings/LABEL/*.png, stuffs/LABEL/*.png, where a
folder's name is the label ("young man"); or pictures right below persons/ and so on, whose own names are
("dog.png"). The labels of a sample differ. The same pictures and seed give the same samples.
"""
SCORE = """\
Scores NAME.mp4 (or .webm, .mov, .mkv, .avi, .gif) of every request line. Motion and naturalness need no
weights; the rest is measured where the models for it are given. What is kept in OUTPUT/samples is not
computed again: an interrupted run goes on with the same command.
"""
SHEET_BY = ("DINO-I", "decoupling DINO-I", "CLIP-I", "decoupling CLIP-I", "CLIP-cap", "motion smoothness")
"""By which measure the sheets are, the first that there is."""


def add_samples_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `samples`."""
    from .scenarios import SCENARIOS

    parser.description = SAMPLES
    parser.add_argument("--pictures", required=True, metavar="DIR", help="the folder of pictures")
    parser.add_argument("--output", required=True, metavar="FILE.jsonl", help="the request lines")
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument(
        "--scenario", action="append", choices=names, metavar="NAME", help=f"only some of {', '.join(names)}"
    )
    parser.add_argument("--each", type=int, metavar="N", help="so many samples of each scenario (40 or 30)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the choice, and of the noise (0)"
    )


def run_samples(args: argparse.Namespace) -> int:
    """Writes the request lines."""
    from conceptmaster.atomic_write import check_output
    from conceptmaster.runtime.request import MAX_SEED

    from .samples import make_samples, read_pictures, write_samples
    from .scenarios import SCENARIOS

    if not 0 <= args.seed <= MAX_SEED:
        raise InputError(f"--seed must be 0 to {MAX_SEED}, not {args.seed}")
    if args.each is not None and not 1 <= args.each <= 10_000:
        raise InputError(f"--each must be 1 to 10000, not {args.each}")
    output = check_output(Path(args.output), (".jsonl",))
    scenarios = [s for s in SCENARIOS if args.scenario is None or s.name in args.scenario]
    samples = make_samples(read_pictures(Path(args.pictures), scenarios), scenarios, args.seed, args.each)
    write_samples(samples, output)
    print(f"{len(samples)} samples of {len(scenarios)} scenarios: {output}")
    return 0


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `score`."""
    parser.description = SCORE
    parser.add_argument("--requests", required=True, metavar="FILE.jsonl", help="the request lines")
    parser.add_argument("--videos", required=True, metavar="DIR", help="has NAME.mp4 of every line")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="gets report, table, sheets, what is kept"
    )
    parser.add_argument("--clip", metavar="PLACE", help="CLIP: a folder, or its name in the Hub")
    parser.add_argument("--dino", metavar="PLACE", help="DINOv2")
    parser.add_argument("--owlv2", metavar="PLACE", help="OWLv2: regions are boxes, the measures version 1's")
    parser.add_argument(
        "--clipseg", metavar="PLACE", help="CLIPSeg: regions are masks, the measures version 2's"
    )
    parser.add_argument(
        "--sam2", metavar="PLACE", help="SAM 2, with --owlv2: masks in its boxes, version 2's measures too"
    )
    parser.add_argument(
        "--aesthetic", metavar="FILE", help="LAION's linear head, safetensors; with --clip ViT-L/14"
    )
    parser.add_argument(
        "--frames", type=int, default=16, metavar="N", help="of a video for them, 0 for all (16)"
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda")
    parser.add_argument("--sheet-by", metavar="MEASURE", help="of the sheets of best and worst")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no table")
    parser.add_argument("--json", action="store_true", help="last line on standard output: the summary")


def run_score(args: argparse.Namespace) -> int:
    """Scores, and writes report.json, table.md, best.png and worst.png."""
    from conceptmaster.benchmarks import reports

    from . import summary
    from .samples import read_samples
    from .scoring import score

    began = time.perf_counter()
    _check(args)
    samples = read_samples(Path(args.requests))
    output = Path(args.output)
    if not Path(args.videos).is_dir():  # before models are looked at
        raise InputError(f"no folder of videos at {args.videos!r}")
    models, parts = _models(args)
    _make(output)
    scored = score(samples, Path(args.videos), output / "samples", parts, args.frames, not args.quiet)
    settings = {"requests": Path(args.requests).name, "frames": args.frames, "device": args.device}
    told = summary.report(scored, models, settings, time.perf_counter() - began)
    reports.write(told, output / "report.json")
    (output / "table.md").write_text(summary.table(told["summary"]) + "\n", "utf-8")
    _sheets(scored, args.sheet_by, output)
    for name, reason in told["skipped"].items():
        print(f"skipped {name}: {reason}")
    if not args.quiet:
        print(summary.table(told["summary"]))
    if args.json:
        print(json.dumps({"summary": told["summary"], "skipped": told["skipped"]}))
    return 0 if told["samples"] else 1


def _check(args: argparse.Namespace) -> None:
    from .measures import MEASURES

    if not 0 <= args.frames <= 100_000:
        raise InputError(f"--frames must be 0 to 100000, not {args.frames}")
    if args.sam2 and not args.owlv2:
        raise InputError("--sam2 draws masks in boxes: give --owlv2, too")
    if args.sam2 and args.clipseg:
        raise InputError("masks are of --sam2 or of --clipseg, not both")
    if args.aesthetic and not args.clip:
        raise InputError("--aesthetic is a head on CLIP ViT-L/14: give --clip, too")
    if (args.owlv2 or args.clipseg) and not (args.clip or args.dino):
        raise InputError("regions are compared by --clip or --dino: give one of them, too")
    if args.dino and not (args.owlv2 or args.clipseg):
        raise InputError("--dino compares regions: give --owlv2 or --clipseg, which find them")
    if args.sheet_by and args.sheet_by not in MEASURES:
        raise InputError(f"--sheet-by must be one of {', '.join(MEASURES)}, not {args.sheet_by!r}")


def _models(args: argparse.Namespace) -> tuple[dict[str, Any], list[Part]]:
    """What a report says of the models that were given, and the parts that they make possible.

    Each is looked at now, so that a wrong one is told at once, and loaded when the first video needs it.
    """
    from .embedders import CLIP, DINO, Aesthetic, Clip, Dino, read_head
    from .flow import opencv
    from .measures import Beauty, Caption, Concepts, Imaging, Motion
    from .naturalness import prior
    from .regions import CLIPSEG, OWLV2, SAM2, ClipSegMasks, Owlv2Boxes, Sam2Masks

    opencv(), prior()
    told: dict[str, Any] = {}

    def lazily(name: str, kinds: dict[str, str]) -> Callable[[], Any]:
        from conceptmaster.engine.checkpoints.pretrained import hashes_of, open_pretrained

        place = getattr(args, name)
        told[name] = {"place": place, "files": hashes_of(place, kinds)}
        return functools.cache(lambda: open_pretrained(place, kinds, args.device))

    def about(*names: str) -> dict[str, Any]:
        return {"frames": args.frames, **{name: told[name]["files"] for name in names if name in told}}

    parts: list[Part] = [Motion(), Imaging(args.frames)]
    names: Callable[[], Any] | None = None
    looks: Callable[[], Any] | None = None
    if args.clip:
        clip = lazily("clip", CLIP)
        names = functools.cache(lambda: Clip(clip()))
        parts.append(Caption(names, about("clip")))
        if args.aesthetic:
            from conceptmaster.hashed import sha256_file

            head, seen = read_head(Path(args.aesthetic)), names
            told["aesthetic"] = {"place": args.aesthetic, "files": {"head": sha256_file(args.aesthetic)}}
            parts.append(
                Beauty(functools.cache(lambda: Aesthetic(seen(), *head)), about("clip", "aesthetic"))
            )
    if args.dino:
        dino = lazily("dino", DINO)
        looks = functools.cache(lambda: Dino(dino()))
    embedders = ("clip", "dino")
    if args.owlv2:
        owlv2 = lazily("owlv2", OWLV2)
        boxes = functools.cache(lambda: Owlv2Boxes(owlv2()))
        parts.append(Concepts(boxes, 1, names, looks, about("owlv2", *embedders)))
        if args.sam2:
            sam2 = lazily("sam2", SAM2)
            masks = functools.cache(lambda: Sam2Masks(boxes(), sam2()))
            parts.append(Concepts(masks, 2, names, looks, about("owlv2", "sam2", *embedders)))
    if args.clipseg:
        clipseg = lazily("clipseg", CLIPSEG)
        segments = functools.cache(lambda: ClipSegMasks(clipseg()))
        parts.append(Concepts(segments, 2, names, looks, about("clipseg", *embedders)))
    return told, parts


def _sheets(scored: list[Any], measure: str | None, output: Path) -> None:
    from . import summary

    if measure is None:
        measure = next((name for name in SHEET_BY if any(name in one.values for one in scored)), None)
    order = [] if measure is None else summary.ranked(scored, measure)
    if order:
        assert measure is not None
        summary.save_sheet(order, measure, output / "best.png")
        summary.save_sheet(order[::-1], measure, output / "worst.png")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {str(folder)!r}: {error.strerror}") from None
