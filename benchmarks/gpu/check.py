"""Every kernel against float64: in this process, or on a GPU in several at once.

    python -m conceptmaster.benchmarks.gpu.check '{"device": "cuda", "small": false, "groups": [0], …}'

is one of these: a line of JSON before a case, and one with what was found. An illegal access of memory makes
everything fail that its process does afterwards, so such a process ends there, and another does the rest.
Compiling the kernels takes most of the time; what one process has compiled all find in Triton's cache.
"""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from conceptmaster.kernels.tolerances import TOLERANCES

from .case import Case, Shapes
from .cases import cases
from .timing import DeviceLost, Say, failed, guarded

MOST_ROWS = 1024
"""Tokens of a case that are held to float64, spread over all of them."""
PROCESSES = 12
PATIENCE = 60.0
"""Seconds that a process may take."""


def check(case: Case) -> dict[str, Any]:
    """Ours against float64: {"ok", "relative_l2", "worst"}; worst: the largest error over what is allowed."""
    step = max(1, case.tokens // MOST_ROWS)
    rows = torch.arange(case.tokens - 1, -1, -step)[:MOST_ROWS].flip(0)
    found = case.ours()
    rows = rows.to((found[0] if isinstance(found, tuple) else found).device)
    expected = case.exact(rows)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    worst, l2 = 0.0, 0.0
    for ours, exact in pairs:
        error = ours[:, rows].double() - exact
        l2 = max(l2, float(error.norm() / exact.norm()))
        relative, absolute = TOLERANCES[case.dtype]
        allowed = absolute + relative * exact.abs()
        worst = max(worst, float((error.abs() / allowed).max()) if error.isfinite().all() else math.inf)
    ok = worst <= 1 if case.l2 is None else l2 <= case.l2 and math.isfinite(worst)
    return {"ok": ok, "relative_l2": l2, "worst": worst}


def results(shapes: Shapes, numbers: Iterable[int], skip: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """What is found, group by group: {"at": name} before a case, {"name", "row"} after it, {"done": number}
    after its group. skip: cases that are not run.

    A case that raises is not right, with the reason. After DeviceLost nothing further comes.
    """
    made = list(cases(shapes))
    for number in numbers:
        group = made[number]
        yield {"at": group.name}
        at, about = group.name, dict[str, Any]()
        try:
            for case in group.make():
                if case.name in skip:
                    continue
                at, about = case.name, {"shape": case.shape, "dtype": case.dtype}
                yield {"at": at}
                yield {"name": at, "row": about | guarded(functools.partial(check, case), ok=False)}
        except DeviceLost as lost:
            yield {"name": at, "row": about | {"ok": False, "failed": f"GPU lost: {lost}"}}
            raise
        except Exception as error:  # there was not even memory for a group's tensors
            yield {"name": group.name, "row": {"ok": False, **failed(error)}}
        yield {"done": number}


def here(shapes: Shapes, rows: dict[str, Any], say: Say) -> None:
    """Adds every case to `rows`, one after the other in this process. Raises DeviceLost."""
    for found in results(shapes, range(len(list(cases(shapes)))), rows):
        if "row" in found:
            rows[found["name"]] = found["row"]
            say(line(found["name"], found["row"]))


def line(name: str, row: dict[str, Any]) -> str:
    """A row for people."""
    if "failed" in row:
        return f"FAILED {name:58} {row['failed']}"
    return f"{'right' if row['ok'] else 'WRONG'}  {name:58} relative L2 {row['relative_l2']:.1e}"


def at_once(
    shapes: Shapes, rows: dict[str, Any], say: Say, processes: int = PROCESSES, most: int = 4
) -> None:
    """Adds every case to `rows`, from several processes; those that end early are followed by others."""
    names = [group.name for group in cases(shapes)]
    left = list(range(len(names)))
    with ThreadPoolExecutor(processes) as pool:
        for _ in range(most):
            shares = [share for n in range(processes) if (share := left[n::processes])]
            order = {"device": shapes.device, "small": shapes.small, "fp8": shapes.fp8, "skip": list(rows)}
            ended = pool.map(_process, [order | {"groups": share} for share in shares])
            found = zip(shares, ended, strict=True)
            left = [n for share, (text, how) in found for n in _collect(text, share, rows, how, say)]
    for number in left:
        rows[names[number]] = {"ok": False, "failed": "not all of it could be checked"}
        say(line(names[number], rows[names[number]]))


def _process(order: dict[str, Any]) -> tuple[str, str]:
    """What a process with this order writes, and how it ends."""
    command = [sys.executable, "-m", __spec__.name, json.dumps(order)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE)
        written, how = done.stdout, f"its process ended with {done.returncode}"
    except subprocess.TimeoutExpired as late:
        written, how = late.stdout or b"", f"no answer in {PATIENCE:.0f} s"
    return written.decode("utf-8", "replace"), how


def _collect(text: str, share: list[int], rows: dict[str, Any], reason: str, say: Say) -> list[int]:
    """Adds what a process wrote to `rows`; the groups that it did not get through."""
    at, unread, done = "", "", set()
    for written in text.splitlines():
        try:
            found = json.loads(written)
        except ValueError:
            unread = written
            continue
        if "at" in found:
            at = found["at"]
        elif "done" in found:
            done.add(found["done"])
        else:
            rows[found["name"]] = found["row"]
            say(line(found["name"], found["row"]))
            at = ""
    if at:
        rows[at] = {"ok": False, "failed": f"{reason}: {unread[:200]}"}
        say(line(at, rows[at]))
    elif share and not done and not any(name in text for name in ('"name"', '"done"')):
        say(f"a process for checks came to nothing, {reason}: {unread[:300]}")
    return [number for number in share if number not in done]


def _work(order: dict[str, Any]) -> None:
    """What one process does. Ends at once when the GPU is lost."""
    shapes = Shapes(order["device"], order["small"], fp8=order["fp8"])
    try:
        for found in results(shapes, order["groups"], order["skip"]):
            print(json.dumps(found), flush=True)
            if "done" in found and torch.cuda.is_available():
                torch.cuda.empty_cache()
    except DeviceLost:
        os._exit(1)  # a process without its GPU may hang as it ends


if __name__ == "__main__":
    with torch.no_grad():
        _work(json.loads(sys.argv[1]))
