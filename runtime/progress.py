"""Progress bars on standard error. The only file that imports tqdm."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def bar(items: Iterable[T], total: int, label: str, show: bool) -> Iterable[T]:
    """`items` as they are, with a progress bar called `label` that goes away when it is done, if `show`.

    Without tqdm one line names the step and its length instead.
    """
    if not show:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"{label} ({total}) ...", file=sys.stderr)
        return items
    return tqdm(items, desc=label, total=total, leave=False, file=sys.stderr)
