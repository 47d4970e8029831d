"""Ctrl-C, SIGTERM and a terminal that closes all end a program in the same way: it cleans up, and says so in
one line."""

from __future__ import annotations

import _thread
import functools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows lacks the last
AGAIN = 0.02  # seconds until a signal that came at a bad time is looked at again
REFLEX = 1.0  # seconds in which a second signal would only disturb the cleaning up after the first


class Stopped(KeyboardInterrupt):
    """A signal asks the program to end. number: the signal's; exit_code: 128 more, as a shell has it."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
        self.number = number
        self.exit_code = 128 + number


class Stops:
    """What has come so far. `last`: the Stopped that was raised last, None as long as there was none."""

    def __init__(self) -> None:
        self.last: Stopped | None = None
        self._when = 0.0
        self._imports = _imports(sys._getframe())  # that the whole program is part of

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler. Raises Stopped in the main thread."""
        if _imports(frame) > self._imports:
            _later(number)  # an extension would make an ImportError of it, and the import's end swallow it
        elif self.last is None or time.monotonic() - self._when > REFLEX:
            self.last, self._when = Stopped(number), time.monotonic()
            raise self.last

    def swallowed(self, number: int) -> None:
        """What was raised has gone where nobody catches it: raises it again, somewhat later."""
        self.last = None
        _later(number)


_active: Stops | None = None


def guarded(name: str, whole_process: bool, program: Callable[[], int]) -> int:
    """What `program` returns; `name: error: interrupted` and the exit code where a signal stops it, also
    while it is imported. whole_process: see `raised`."""
    with raised(whole_process):
        try:
            return program()
        except KeyboardInterrupt as stop:
            if sys.stderr is not None:  # closed: `print` would take standard output
                print(f"{name}: error: {stop}", file=sys.stderr)
            return getattr(stop, "exit_code", 130)


@contextmanager
def raised(whole_process: bool) -> Iterator[Stops]:
    """While the block runs, the signals raise Stopped; those that are ignored stay so (`nohup`, `&`). Inside
    of another such block this is the same one.

    whole_process: when the block ends, so does the process: from then on the signals kill it, without a word.
    Does nothing outside of the main thread.
    """
    global _active
    if _active is not None or threading.current_thread() is not threading.main_thread():
        yield _active or Stops()
        return
    _active = stops = Stops()
    before: dict[int, Any] = {}
    hook = sys.unraisablehook
    for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
        if (old := signal.getsignal(number)) not in (signal.SIG_IGN, None):
            before[number] = signal.SIG_DFL if whole_process else old
            signal.signal(number, stops)

    def unraisable(found: Any) -> None:
        if isinstance(found.exc_value, Stopped):  # it came in a destructor, or in a callback
            stops.swallowed(found.exc_value.number)
        else:
            hook(found)

    sys.unraisablehook = unraisable
    try:
        yield stops
    finally:
        _active, sys.unraisablehook = None, hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _later(number: int) -> None:
    """Sends the signal to the main thread once more; it also ends a wait there, but on Windows."""
    send: Callable[[], object] = functools.partial(_thread.interrupt_main, signal.Signals(number))
    if hasattr(signal, "pthread_kill"):
        send = functools.partial(signal.pthread_kill, _thread.get_ident(), number)
    timer = threading.Timer(AGAIN, send)
    timer.daemon = True
    timer.start()


def _imports(frame: FrameType | None) -> int:
    """How many of Python's importing functions are under way in `frame` and its callers."""
    count = 0
    while frame is not None:
        count += frame.f_globals.get("__name__") == "importlib._bootstrap"
        frame = frame.f_back
    return count
