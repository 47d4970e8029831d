"""An asyncio loop whose clock jumps to the next timer: hours in seconds, in the same order each time."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

EPOCH = 1.7e9  # Unix time at which every run begins


class VirtualLoop(asyncio.SelectorEventLoop):
    """Where nothing is ready, the time is at once that of the next timer. It knows no other threads."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._now

    def jump(self, seconds: float) -> None:
        """So much later."""
        self._now += seconds


class _Selector(selectors.DefaultSelector):  # type: ignore[misc,valid-type]
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if not found:
            if timeout is None:
                raise RuntimeError("nothing will ever happen any more")
            self._loop.jump(timeout)
        return found


class _Time:
    """What stands in the place of the module `time`."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def time(self) -> float:
        return EPOCH + self._loop.time()

    def monotonic(self) -> float:
        return self._loop.time()


@contextlib.contextmanager
def virtual_time(*packages: str) -> Iterator[VirtualLoop]:
    """A loop, and its time in the modules of these packages that ask `time.time()` or `time.monotonic()`."""
    loop = VirtualLoop()
    with contextlib.ExitStack() as stack:
        stack.callback(loop.close)
        for name, module in list(sys.modules.items()):
            if name.startswith(packages) and getattr(module, "time", None) is time:
                stack.enter_context(mock.patch.object(module, "time", _Time(loop)))
        yield loop
