"""``python -m conceptmaster.examples.data``: the data pipeline's command line."""

from __future__ import annotations

import sys

from conceptmaster.runtime import stop_signals


def program() -> int:
    """Runs one command and returns its exit code."""
    from .cli import main  # here, so that an interrupt is looked after before more is loaded

    return main()


if __name__ == "__main__":
    sys.exit(stop_signals.guarded("data", True, program))
