"""Standard input, output and error as a program finds them: closed, full, with a small encoding, or with
nobody who reads."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

NOBODY_READS = 141  # the exit code: what a shell says of a program that SIGPIPE has ended


@contextmanager
def usable() -> Iterator[None]:
    """While the block runs, writing to a closed stream does nothing, and what a stream's encoding lacks is
    written as an escape like `\\xd7`."""
    _open_closed()
    errors = {
        stream: stream.errors for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)
    }
    for stream in errors:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, before in errors.items():
            with suppress(OSError, ValueError):  # it flushes first, and may be closed by now
                stream.reconfigure(errors=before)


def finish(stream: TextIO) -> OSError | None:
    """Writes what `stream` still holds. Returns why that fails; the stream then forgets it for good, so that
    Python says nothing at its end."""
    try:
        stream.flush()
    except OSError as error:
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        return error
    except ValueError:  # closed
        pass
    return None


def nobody_reads() -> bool:
    """Whether standard output or error is a pipe that nobody reads any more; what is left for it is
    dropped."""
    gone = []
    for stream in (sys.stdout, sys.stderr):
        unread = False
        with suppress(OSError, ValueError, AttributeError):  # no file, closed, Windows
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            unread = any(event & select.POLLERR for _, event in poll.poll(0))
        gone.append(isinstance(finish(stream), BrokenPipeError) or unread)
    return any(gone)


def _open_closed() -> None:
    """Opens nothing where a standard stream was closed. Else the next file that anybody opens gets its
    number, and what a library says to standard error is written into a video."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if name != "stdin":
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
