"""Rank 0 of several: it starts the others, or meets those that torchrun has started, and tells them what to
do.

What they do with it is `condition` and the shares of steps. Whatever is computed once per request they keep
under a number, until the pipeline has let go of it here.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .... import __version__
from ....engine.shares import split
from ....errors import InputError, RanksLost
from ....hashed import sha256_file
from ...bundle_format.find import SHIPPED, Bundle
from ...bundle_format.manifest import FILE_NAME
from .. import torchrun
from .options import TorchOptions
from .ranks import LOOPBACK, PREFIX, Ranks, meet

PACKAGE = __name__.partition(".")[0]
ENDING = 10.0  # seconds that a follower has to end in
MOST = 1025  # ranks are fewer


class Held:
    """What the others keep under a number, as long as this is there."""

    def __init__(self, number: int) -> None:
        self.number = number


class Leader:
    """Rank 0 of `gpus` ranks, on the CPU processes, that it starts; None: of those of torchrun.

    cuts: how many branches a step may have; heads: the transformer's. Raises InputError before anything is
    started, RanksLost where a rank does not come up, or is not like this one.
    """

    def __init__(
        self,
        gpus: int | None,
        bundle: Bundle,
        device: str,
        threads: int | None,
        options: TorchOptions,
        cuts: Iterable[int],
        heads: int,
    ) -> None:
        world = torchrun.world() if gpus is None else gpus
        self._numbers, self._dropped = itertools.count(), list[int]()
        cuts = list(cuts)
        _check(world, gpus, device, cuts, heads)
        where = torch.device(device)
        followers = None if gpus is None else Followers(world)
        try:
            if followers is None:
                self.ranks = Ranks(*meet(), where)
            else:
                self.ranks = Ranks(followers.store, 0, world, where, followers)
        except BaseException:
            if followers is not None:
                followers.stop()
            raise
        self._close = weakref.finalize(self, _close, self.ranks, followers)
        asked = {
            "do": "open",
            "bundle": bundle.folder.name if bundle.folder.parent == SHIPPED else str(bundle.folder),
            "device": device,
            "threads": threads,
            "options": options.to_plain(),
            "cuts": cuts,
            "heads": heads,
            "custom": [] if bundle.custom is None else list(map(str, bundle.custom.paths)),
            "print": fingerprint(bundle),
        }
        with self._all_done():
            self.tell(asked)
        with self.ranks.together():
            for branches in cuts:
                self.ranks.cut(branches, heads)

    def tell(self, what: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """To the others, and what they need not keep any longer."""
        dropped = [self._dropped.pop() for _ in range(len(self._dropped))]
        self.ranks.tell({**what, "dropped": dropped}, arrays)

    def condition(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Held:
        """Lets the others compute what `graph`, a condition, makes of a request, and keep it."""
        held = Held(next(self._numbers))
        weakref.finalize(held, self._dropped.append, held.number)
        with self.ranks.together():
            self.tell({"do": "condition", "graph": graph, "held": held.number}, inputs)
        return held

    @contextmanager
    def loading(self, graphs: list[str]) -> Iterator[None]:
        """While the block makes these graphs ready here, the others do so, too."""
        if not graphs:
            yield
            return
        with self._all_done():
            self.tell({"do": "load", "graphs": graphs})
            yield

    def close(self) -> None:
        """Lets the others end."""
        self._close()

    @contextmanager
    def _all_done(self) -> Iterator[None]:
        """Around what takes the others as long as it takes. Raises RanksLost where one fails."""
        try:
            with self.ranks.together(hurry=False):
                yield
                self.ranks.agree()
        except BaseException:
            self.close()
            raise


class Followers:
    """Ranks 1 and up as processes that this one starts. Each reads from a pipe that nobody else writes to, so
    it ends with this process, however that ends. store: where they meet."""

    def __init__(self, world: int) -> None:
        listening = socket.create_server((LOOPBACK[0], 0))  # TCPStore's own would be open to the network
        port = listening.getsockname()[1]
        served = dist.TCPStore(
            LOOPBACK[0],
            port,
            world,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )
        self.store = dist.PrefixStore(f"{PREFIX}0", served)  # it is their first meeting
        path = os.pathsep.join(p for p in sys.path if p)
        known = {"MASTER_ADDR": LOOPBACK[0], "MASTER_PORT": port, "WORLD_SIZE": world}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", f"{PACKAGE}.runtime.backends.pytorch.follower"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is rank 0's
                env=os.environ
                | {name: str(value) for name, value in known.items()}
                | {"PYTHONPATH": path, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(1, world)
        ]

    def ended(self) -> str | None:
        """Which has ended, in words."""
        for rank, process in enumerate(self.processes, 1):
            if (code := process.poll()) is not None:
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                return f"the process of rank {rank} has ended ({how})"
        return None

    def stop(self, patience: float = 0.0) -> None:
        """Ends them, those that have not ended after so many seconds by force."""
        until = time.monotonic() + patience
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            process.kill()
            process.wait()
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()


def fingerprint(bundle: Bundle) -> dict[str, str]:
    """What must be the same on all ranks."""
    return {
        "conceptmaster": __version__,
        "torch": torch.__version__,
        "manifest": sha256_file(bundle.folder / FILE_NAME),
    }


def _close(ranks: Ranks, followers: Followers | None) -> None:
    broken = ranks.broken
    if not broken:
        with suppress(RanksLost):
            ranks.tell({"do": "close", "dropped": []})
    ranks.leave()
    if followers is not None:
        followers.stop(0.0 if broken else ENDING)


def _check(world: int, gpus: int | None, device: str, cuts: list[int], heads: int) -> None:
    """Raises InputError where so many ranks cannot share a step, or are not there."""
    if dist.is_initialized():
        raise InputError("several GPUs are in use by this process already: close that pipeline first")
    able = [n for n in range(1, MOST) if all(split(n, branches, heads) for branches in cuts)]
    if world not in able:
        what = f"{max(cuts)} guidance branch{'es' if max(cuts) > 1 else ''} and {heads} heads"
        raise InputError(
            f"{world} GPUs cannot share {what}: take {', '.join(map(str, able[:-1]))} or {able[-1]} of them"
        )
    there = torch.cuda.device_count()
    if device == "cuda" and gpus is not None and gpus > there:
        raise InputError(f"{gpus} GPUs are asked for, and {there} {'is' if there == 1 else 'are'} there")
