"""Many requests out of one file, with one load: `generate --requests FILE.jsonl`.

Beside every video lies a record, `.NAME.mp4.json`, which is written last: the hash of what was asked for
(request, pictures' bytes, bundle, options) and of each file that was made. A line whose record and files are
right is not made again. So a batch that was killed, at whatever point, goes on when it is run again; a
changed picture, request or file makes that line anew; two runs at once cost time, not videos.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic_write import check_output, hashing
from ..errors import (
    BundleError,
    Cancelled,
    ConceptMasterError,
    InputError,
    MissingDependency,
    RequestWarning,
    is_out_of_memory,
)
from ..untrusted import LARGEST_JSON, open_plain, parse_json
from . import batch_record
from .commands import what_the_system_says
from .outputs import Outputs
from .progress import bar
from .request import Request
from .video_file import SUFFIXES, check_options, enlargement

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .workers.remote import RemotePipeline

log = logging.getLogger(__name__)

MOST_JOBS, MOST_WORKERS = 64, 4096
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class Line:
    """A line of the file, and what became of it.

    number: counted from 1; status: "left" (not made yet), "made", "kept" (an earlier run has made it) or
    "failed"; reason: of a failure, one line; request, outputs, record: None where the line is wrong.
    """

    number: int
    name: str | None = None
    request: Request | None = None
    outputs: Outputs | None = None
    record: Path | None = None
    status: str = "left"
    reason: str | None = None
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        named = "" if self.name in (None, str(self.number)) else f" ({self.name})"
        return f"line {self.number}{named}"

    def fail(self, reason: str) -> None:
        """Notes a failure."""
        self.status, self.reason = "failed", " ".join(reason.split())

    def about(self) -> dict[str, Any]:
        """For --json."""
        outputs = self.outputs or Outputs(())
        return {
            "line": self.number,
            "name": self.name,
            "status": self.status,
            "reason": self.reason,
            "seeds": [] if self.request is None else list(self.request.seeds),
            "outputs": [str(path) for path in outputs.videos],
            "sheets": [str(path) for path in outputs.sheets],
            "frames": None if outputs.frames is None else str(outputs.frames),
            "warnings": self.warnings,
        }


def run(
    args: argparse.Namespace,
    given: dict[str, Any],
    how: dict[str, Any],
    open_pipeline: Callable[[], Pipeline | RemotePipeline],
) -> int:
    """Makes what is not made yet; returns 0, or 1 if a line failed.

    given: fields of every request that options were given for; how: what else changes the frames, for the
    records. Raises InputError for arguments that cannot work and a file that cannot be read; an interrupt, a
    full disk and a damaged bundle end it, after the summary.
    """
    start = time.perf_counter()
    _check(args)
    lines = list(_read(args.requests, args, given))
    if not lines:
        raise InputError(f"{args.requests!r} holds no request: one JSON object on every line")
    _check_apart(lines, args.requests)
    pipeline = open_pipeline()
    shapes = pipeline.manifest.shapes
    scale = enlargement(Path(args.output).suffix.lower(), shapes.height, shapes.width, args.scale)
    written = {"suffix": Path(args.output).suffix.lower(), "scale": scale, "chroma": args.chroma}
    asked = batch_record.Asked.of(pipeline.bundle, {"how": how, "written": written})
    for line in lines:
        if line.status == "left":
            with _failing(line):
                assert line.request is not None and line.outputs is not None and line.record is not None
                if asked.made(line.request, line.outputs, line.record):
                    line.status = "kept"
    wrong = [line for line in lines if line.status == "failed"]
    if wrong and len(wrong) < len(lines):
        log.warning("%s: left out, the others are made", _numbers(wrong))
    left = [line for line in lines if line.status == "left"]
    try:
        if left:
            with pipeline:  # whose workers, where it has some, are started now
                _make_all(pipeline, asked, left, args, scale)
    finally:
        _report(lines, args, pipeline.manifest.name, time.perf_counter() - start)
    return int(any(line.status == "failed" for line in lines))


def _check(args: argparse.Namespace) -> None:
    for option in ("prompt", "concept", "box", "request", "noise"):
        if getattr(args, option) is not None:
            raise InputError(f"--{option} is for one request: leave it out, or --requests")
    most = MOST_JOBS if args.ray is None else MOST_WORKERS
    if args.jobs is not None and not 1 <= args.jobs <= most:
        raise InputError(f"--jobs must be 1 to {most}, not {args.jobs}")
    for option in ("output", "sheet", "frames"):
        name = getattr(args, option)
        if name is not None and "{name}" not in name:
            raise InputError(f"--{option} {name!r} lacks {{name}}, which tells the videos apart")
    check_options(check_output(Path(args.output), SUFFIXES).suffix.lower(), args.scale, args.chroma)


def _read(path: str, args: argparse.Namespace, given: dict[str, Any]) -> Iterator[Line]:
    """The file's lines that are not blank. Raises InputError where it cannot be read."""
    folder = Path() if path == "-" else Path(path).parent
    for number, data in _raw_lines(path):
        line = Line(number)
        with _failing(line):
            value = parse_json(data)
            named = value.pop("name", None) if isinstance(value, dict) else None
            line.name = str(number) if named is None else _file_name(named)
            line.request = replace(Request.from_data(value, folder), **given)
            video, sheet, frames = (_named(n, line.name) for n in (args.output, args.sheet, args.frames))
            line.outputs = Outputs.of(line.request, str(video), sheet, frames)
            line.outputs.check_apart(())
            line.record = check_output(batch_record.place(Path(str(video))), (".json",))
        yield line


def _raw_lines(path: str) -> Iterator[tuple[int, bytes]]:
    try:
        if path == "-" and sys.stdin is None:
            raise ValueError("is standard input, which is closed")
        with sys.stdin.buffer if path == "-" else open_plain(path, pipes=True) as file:
            number = 0
            while data := file.readline(LARGEST_JSON + 1):
                number += 1
                if len(data) > LARGEST_JSON:
                    raise ValueError(f"has a line of more than {LARGEST_JSON} bytes, {number}")
                if data.strip():
                    yield number, data
    except OSError as error:
        raise InputError(f"cannot read the requests {path!r}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"the file of requests {path!r} {error}") from None


def _named(template: str | None, name: str) -> str | None:
    return None if template is None else template.replace("{name}", name)


def _file_name(name: object) -> str:
    """Raises ValueError for what is no part of a file's name."""
    shown = isinstance(name, str) and name.isprintable() and name.strip()  # no escapes for the terminal
    if not isinstance(name, str) or not shown or name in (".", "..") or re.search(r"[/\\{}]", name):
        raise ValueError(f"a name becomes part of a file's: text without / \\ {{ }}, not {name!r:.60}")
    return name


def _check_apart(lines: list[Line], requests: str) -> None:
    """Fails lines that would write what another line writes, or what any line reads."""
    names: dict[str | None, int] = {}
    writers: dict[str, int] = {}
    read = {} if requests == "-" else {os.path.realpath(requests): "the file of requests"}
    for line in lines:
        for concept in line.request.concepts if line.request is not None else ():
            assert isinstance(concept.image, (str, os.PathLike))
            read[os.path.realpath(concept.image)] = f"a picture of line {line.number}"
    for line in lines:
        if line.outputs is None:
            continue
        first = names.setdefault(line.name, line.number)
        if first != line.number:
            line.fail(f"has the name {line.name!r}, as line {first}")
            continue
        for path in line.outputs.all():
            place = os.path.realpath(path)
            if place in read:
                line.fail(f"would write {str(path)!r}, which is {read[place]}")
            elif place in writers:
                line.fail(f"would write {str(path)!r}, as line {writers[place]} does")
            writers.setdefault(place, line.number)


@contextmanager
def _failing(line: Line) -> Iterator[None]:
    """Errors of the block fail the line; but what every line would meet goes on: a damaged bundle, a package
    that is missing, a full disk."""
    try:
        yield
    except Cancelled:
        pass
    except (BundleError, MissingDependency):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            line.fail(f"out of memory ({error})")
        elif isinstance(error, (ConceptMasterError, ValueError)):
            line.fail(str(error))
        elif isinstance(error, OSError) and error.errno not in FULL:
            line.fail(what_the_system_says(error))
        else:
            raise


def _make_all(
    pipeline: Pipeline | RemotePipeline,
    asked: batch_record.Asked,
    lines: list[Line],
    args: argparse.Namespace,
    scale: int,
) -> None:
    stop = threading.Event()

    def make(line: Line) -> Line:
        with _failing(line):
            assert line.request is not None and line.outputs is not None and line.record is not None
            if stop.is_set():
                return line
            key = asked.key(line.request)
            videos = pipeline.generate(
                line.request, callback=lambda *_: not stop.is_set(), strict=args.strict
            )
            line.warnings = list(videos[0].warnings)
            with hashing() as hashes:
                line.outputs.write(videos, scale, args.chroma)
            if asked.key(line.request) != key:
                raise InputError("a picture was changed while the video was made")
            batch_record.write(line.record, key, hashes)
            line.status = "made"
        return line

    shows = args.progress or (sys.stderr.isatty() and not args.quiet)
    # a worker elsewhere makes the next while the one before is written here
    at_once = (args.jobs or 1) * (1 if args.ray is None else 2)
    pool = ThreadPoolExecutor(at_once, thread_name_prefix="request")
    with warnings.catch_warnings(), bar(len(lines), "requests", shows) as advance:
        warnings.simplefilter("ignore", RequestWarning)  # they are told of each line, below
        try:
            for future in as_completed([pool.submit(make, line) for line in lines]):
                line = future.result()
                advance()
                for warning in line.warnings:
                    log.warning("%s: %s", line, warning)
                if line.status == "made" and not args.quiet and not shows:
                    assert line.outputs is not None
                    print("\n".join(map(str, line.outputs.videos)), flush=True)
        finally:  # an interrupt: what is under way ends after its next step, and what is made stays
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _report(lines: list[Line], args: argparse.Namespace, bundle: str, seconds: float) -> None:
    """The summary: numbers on standard output, why lines failed on standard error."""
    of = {s: [line for line in lines if line.status == s] for s in ("made", "kept", "failed", "left")}
    for line in of["failed"]:
        log.error("%s: %s", line, line.reason)
    if not args.quiet:
        told = [f"{len(of['made'])} made", f"{len(of['kept'])} kept from earlier"]
        told += [f"{len(of['failed'])} failed ({_numbers(of['failed'])})"] if of["failed"] else []
        told += [f"{len(of['left'])} left: the same command goes on"] if of["left"] else []
        print(f"{', '.join(told)}; {seconds:.2f} s")
    if args.json:
        counts = {status: len(found) for status, found in of.items()}
        about = [line.about() for line in lines]
        print(json.dumps({"bundle": bundle, **counts, "seconds": round(seconds, 4), "requests": about}))


def _numbers(lines: list[Line]) -> str:
    shown = ", ".join(str(line.number) for line in lines[:20])
    return f"line{'s' if len(lines) > 1 else ''} {shown}{', …' if len(lines) > 20 else ''}"
