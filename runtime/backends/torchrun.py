"""What torchrun has told this process: which of how many ranks it is. Importing this loads no torch.

Ranks make one request together. Rank 0 leads: it alone reads arguments, writes files and prints; the others
follow it (pytorch/follower.py).
"""

from __future__ import annotations

import os

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    """This process's number, 0 where torchrun has not started it."""
    return _number("RANK") if world() > 1 else 0


def local_rank() -> int:
    """Its number among those of this machine, which is that of its GPU."""
    return _number("LOCAL_RANK") if world() > 1 else 0


def world() -> int:
    """How many ranks there are, 1 where torchrun has not started this process: where a variable is missing,
    as those of MPI and Slurm are, or says what torchrun never says."""
    if not all(os.environ.get(name) for name in VARIABLES):
        return 1
    world = _number("WORLD_SIZE")
    sensible = 0 <= _number("RANK") < world and 0 <= _number("LOCAL_RANK") < world
    return world if sensible else 1


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        return -1
