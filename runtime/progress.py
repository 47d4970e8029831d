"""Progress bars on standard error, and the time that stages take. The only file that imports tqdm."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def shown(quiet: bool) -> bool:
    """Whether a command shows its bars: on a terminal, unless it is to be quiet."""
    return sys.stderr.isatty() and not quiet


@contextmanager
def bar(total: int, label: str, show: bool) -> Iterator[Callable[[], object]]:
    """Shows a bar called `label` while the block runs, if `show`; yields a function to be called after each
    of the `total` parts. The bar goes away with the block.
    """
    if not show:
        yield lambda: None
        return
    from tqdm import tqdm  # here, because it takes 50 ms to load

    with tqdm(desc=label, total=total, leave=False, file=sys.stderr) as drawn:
        yield drawn.update


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Notes how long the block takes."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def each(items: Sequence[T], label: str, show: bool) -> Iterator[T]:
    """The items, one after the other, with a `bar` if `show`."""
    with bar(len(items), label, show) as advance:
        for item in items:
            yield item
            advance()
