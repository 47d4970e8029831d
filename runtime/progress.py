"""Progress bars on standard error. The only file that imports tqdm."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def shown(quiet: bool) -> bool:
    """Whether a command shows its bars: on a terminal, unless it is to be quiet."""
    return sys.stderr.isatty() and not quiet


@contextmanager
def bar(total: int, label: str, show: bool) -> Iterator[Callable[[], object]]:
    """Shows a bar called `label` while the block runs, if `show`; yields a function to be called after each
    of the `total` parts. The bar goes away with the block. Without tqdm one line names the work and its
    length instead.
    """
    if not show:
        yield lambda: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"{label} ({total}) ...", file=sys.stderr)
        yield lambda: None
        return
    with tqdm(desc=label, total=total, leave=False, file=sys.stderr) as drawn:
        yield drawn.update
