"""Ranks, processes with a GPU each that make one request together: how they find each other and talk.

Through gloo go messages (a line of JSON, and arrays) and, on the CPU, everything; through NCCL what lies on
GPUs. A collective waits for ever: whether that takes too long is looked after by a thread, which ends the
process with one line, since nothing else ends one that waits for a GPU. What a rank fails of it leaves in the
store, where rank 0 finds it.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ....engine.shares import Share, split
from ....errors import RanksLost
from .. import torchrun

TIMEOUT = "CONCEPTMASTER_RANK_TIMEOUT"
"""The environment's variable of how many seconds ranks wait for each other in one step."""
PATIENCE = 600.0  # such seconds where the environment does not say
FOR_EVER = timedelta(days=365)
LOOPBACK = ("127.0.0.1", "localhost")
POLL = 0.5  # seconds
ERROR = "error"
"""In the store: what a rank has failed of."""
DEVICE = "device"
"""In the store: the kind of rank 0's device."""

PREFIX = "conceptmaster/"
_MEETINGS = itertools.count()


class Others(Protocol):
    """The processes of other ranks, where this one has started them."""

    def ended(self) -> str | None:
        """Which has ended, in words; None where none has."""

    def stop(self) -> None:
        """Ends them."""


class Gone(Exception):
    """To a follower: there is no rank 0 any more."""


class Ranks:
    """One of `world` ranks; a group of them is the default one of torch.distributed, of which a process has
    one at a time.

    store: what torch.distributed calls so; device: where tensors are. Every rank makes this at the same
    time. Raises RanksLost.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world: int,
        device: torch.device,
        others: Others | None = None,
    ) -> None:
        self.rank, self.world, self.device = rank, world, device
        self.broken = False
        """Whether something was left in the middle, so that nothing more can be done together."""
        self._store, self._others = store, others
        if rank == 0:
            store.set(DEVICE, device.type)
        self._shares: dict[int, Share] = {}
        self._busy: float | None = None
        self._hurry = True
        self._patience = _patience() + (0.0 if rank == 0 else 10.0)  # rank 0 is the one to say so
        self._wait_for_all()
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        hook, more = sys.excepthook, {"store": store, "rank": rank, "world_size": world}
        with self.together(), _on_loopback():
            self._call(dist.init_process_group, backend, timeout=FOR_EVER, **more)
        sys.excepthook = hook  # torch's writes the rank before every line of the program's own errors

    def cut(self, branches: int, heads: int) -> None:
        """From now on `share` knows a step of so many branches; every rank at the same time."""
        found = split(self.world, branches, heads)
        assert found is not None  # rank 0 has checked it
        groups, parts = found
        own, place = divmod(self.rank, parts)
        each, exchange = branches // groups, None
        if parts == self.world:
            exchange = _Exchange(self, None, place, parts)
        elif parts > 1:
            with _on_loopback():
                for group in range(groups):
                    members = list(range(group * parts, (group + 1) * parts))
                    made = self._call(dist.new_group, members, timeout=FOR_EVER)
                    if group == own:
                        exchange = _Exchange(self, made, place, parts)
        self._shares[branches] = Share(own * each, (own + 1) * each, branches, exchange)

    def share(self, branches: int) -> Share:
        """This rank's of a step of so many branches."""
        return self._shares[branches]

    @contextmanager
    def together(self, hurry: bool = True) -> Iterator[None]:
        """Around what every rank does at the same time; an error in it is the end of that. hurry: whether it
        is over in the time that ranks wait for each other."""
        if self.broken:
            raise RanksLost("ranks that belong together have lost each other: open the bundle again")
        self._hurry, self._busy = hurry, time.monotonic()
        try:
            yield
            if self.device.type == "cuda":
                self._call(torch.cuda.synchronize)  # here a rank waits that the others keep waiting
        except BaseException:
            self.broken = True
            raise
        finally:
            self._busy = None

    def tell(self, what: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Rank 0: to all others, JSON and arrays."""
        arrays = arrays or {}
        kinds = {name: [str(array.dtype), array.shape] for name, array in arrays.items()}
        data = json.dumps({**what, "arrays": kinds}).encode()
        self._spread_bytes(np.array([len(data)]))
        self._spread_bytes(np.frombuffer(bytearray(data), np.uint8))
        for array in arrays.values():
            self._spread_bytes(np.ascontiguousarray(array))

    def hear(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The others: waits for what rank 0 tells, however long. Raises Gone."""
        size = np.zeros(1, np.int64)
        self._spread_bytes(size)
        data = np.zeros(int(size[0]), np.uint8)
        self._spread_bytes(data)
        what = json.loads(data.tobytes())
        arrays = {name: np.empty(shape, dtype) for name, (dtype, shape) in what.pop("arrays").items()}
        for array in arrays.values():
            self._spread_bytes(array)
        return what, arrays

    def spread(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor on the device, in the place of everybody's of its shape."""
        self._call(dist.broadcast, tensor, 0)
        return tensor

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of everybody's tensor, at rank 0."""
        self._call(dist.reduce, tensor, 0)
        return tensor

    def agree(self) -> None:
        """Waits until all are here. Raises RanksLost where one has failed."""
        self._call(dist.all_reduce, torch.zeros(1))

    def leave(self) -> None:
        """Lets go of the others, who notice."""
        self.broken = True
        _let_go()

    def _spread_bytes(self, array: np.ndarray) -> None:
        if array.size:
            self._call(dist.broadcast, torch.from_numpy(array).flatten().view(torch.uint8), 0)

    def _call(self, function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        """What the function gives; RuntimeErrors are somebody's end."""
        try:
            return function(*arguments, **more)
        except RuntimeError as error:
            if self.rank:
                raise Gone from error
            raise RanksLost(self._why(error)) from error

    def _wait_for_all(self) -> None:
        """Until all ranks have come so far that nothing keeps them from meeting."""
        names = [f"here/{rank}" for rank in range(self.world)]
        self._store.set(names[self.rank], "1")
        until = time.monotonic() + max(PATIENCE, self._patience)
        while not self._store.check(names):
            why = self._told() or self._ended_one()
            if why is None and time.monotonic() > until:
                why = f"not all of {self.world} ranks came up in {PATIENCE:g} seconds"
            if why is not None:
                raise Gone if self.rank else RanksLost(why)
            time.sleep(POLL / 10)

    def _ended_one(self) -> str | None:
        return None if self._others is None else self._others.ended()

    def _told(self) -> str | None:
        """What a rank says that it has failed of."""
        return str(self._store.get(ERROR), "utf-8") if self._store.check([ERROR]) else None

    def _why(self, error: RuntimeError) -> str:
        """Why others do not answer, after a moment for them to say so; what torch says of it is the least."""
        for _ in range(20):
            if (why := self._told() or self._ended_one()) is not None:
                return why
            time.sleep(POLL / 5)
        return f"ranks that belong together have lost each other ({' '.join(str(error).split()):.200})"

    def _watch(self) -> None:
        while not self.broken:
            time.sleep(POLL)
            if (since := self._busy) is None:
                continue
            waited = time.monotonic() - since
            why = None
            if self._hurry and waited > self._patience:
                who = "a rank" if self.rank == 0 else "rank 0"
                why = f"{who} does not answer for {self._patience:g} seconds (${TIMEOUT})"
            elif self.rank == 0 and waited > 10 * POLL:  # else the main thread is told, and says it better
                with suppress(RuntimeError):
                    why = self._told() or self._ended_one()
            if why is not None and self._busy == since:
                print(f"conceptmaster: error: {why}", file=sys.stderr, flush=True)
                if self._others is not None:
                    self._others.stop()
                os._exit(1)


class _Exchange:
    """See `Exchange` of engine/shares.py."""

    def __init__(self, ranks: Ranks, group: Any, rank: int, size: int) -> None:
        self._ranks, self._group, self.rank, self.size = ranks, group, rank, size

    def turn(self, pieces: Tensor) -> Tensor:
        """See `Exchange`."""
        found = torch.empty_like(pieces)
        self._ranks._call(dist.all_to_all_single, found, pieces, group=self._group)
        return found


def meet() -> tuple[dist.Store, int, int]:
    """Where the ranks that the environment tells of meet, which of them this is, and how many there are."""
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=_patience())))
    # of torchrun's ranks it is the same for all meetings
    return dist.PrefixStore(f"{PREFIX}{next(_MEETINGS)}", store), rank, world


def device_kind(store: dist.Store) -> str:
    """The kind of rank 0's device, as soon as that knows it. Raises Gone."""
    try:
        while not store.check([DEVICE]):
            time.sleep(POLL / 5)
        return str(store.get(DEVICE), "utf-8")
    except RuntimeError as error:
        raise Gone from error


def leave_word(store: dist.Store, rank: int, message: str) -> None:
    """Of what this rank has failed, and lets go of the others."""
    with suppress(RuntimeError):
        store.set(ERROR, f"rank {rank}: {message}")
    _let_go()


def _let_go() -> None:
    with suppress(RuntimeError, AssertionError, ValueError):
        dist.destroy_process_group()


def _patience() -> float:
    try:
        return float(os.environ.get(TIMEOUT, PATIENCE))
    except ValueError:
        return PATIENCE


@contextmanager
def _on_loopback() -> Iterator[None]:
    """gloo listens where the ranks meet: on the loopback interface, if that is where."""
    name = "GLOO_SOCKET_IFNAME"
    local = os.environ.get("MASTER_ADDR", LOOPBACK[0]) in LOOPBACK or torchrun.world() == 1
    if not local or name in os.environ or not sys.platform.startswith("linux"):
        yield
        return
    os.environ[name] = "lo"
    try:
        yield
    finally:
        del os.environ[name]
