"""What can go wrong between a model and a bundle."""

from __future__ import annotations


class ExportError(Exception):
    """An export or a check that cannot be done or came out wrong. `str(error)` is one line; `exit_code` is
    what the command line returns: 2 for what the caller gave, 1 for everything else."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code
