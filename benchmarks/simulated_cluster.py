"""Nodes whose GPUs make jobs by the clock alone, and fail: what stands in the place of the process that
speaks with Ray (runtime/workers/gateway.py), and says what that would say.

A node dies as a whole, takes along what is made on it, which the head hears after NOTICED, and comes back
after REPAIR; now and then one of its workers hangs instead, and says nothing any more. Every draw is by the
seed and the node's name, so that nothing else moves it.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conceptmaster.runtime.workers.ray_worker import Gateway, Needs, RayWorker

# All of these are chosen.
GPUS = 8  # of a node
LOADING = 60.0  # seconds in which a worker loads its bundle
REPAIR = 900.0  # seconds until a node that has died is back
NOTICED = 30.0  # seconds until it is known that a node has died
HANGS = 0.1  # of the failures


class Watch:
    """What the simulation sees of jobs, and the processor's seconds that it takes itself."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.failures = self.hangs = self.broken_off = 0  # of nodes, of workers; jobs that were being made
        self.own = 0.0


class SimulatedGateway(Gateway):
    """timings: of each job, by its id, seconds until each step and until the end."""

    def __init__(self, timings: Mapping[str, Sequence[float]], watch: Watch) -> None:
        super().__init__("simulated", 0)
        self.timings, self.watch = timings, watch
        self.gpus: list[Gpu] = []  # by the worker's number

    async def start(self) -> None:
        """See Gateway."""

    def tell(self, value: dict[str, Any]) -> None:
        """See Gateway."""
        line = json.dumps(value).encode()
        own = time.thread_time()
        told = json.loads(line)
        gpu = self.gpus[told["worker"]]
        if told["do"] == "start":
            gpu.start(told["life"])
        elif told["do"] == "make":
            gpu.make(told["task"]["id"], Path(told["task"]["folder"]))
        else:  # stop and cancel: nobody looks
            gpu.end()
        self.watch.own += time.thread_time() - own

    def say(self, number: int, said: dict[str, Any]) -> None:
        """A line to the head."""
        own = time.thread_time()
        line = json.dumps({"worker": number, **said})
        self.watch.own += time.thread_time() - own
        heard = json.loads(line)
        self._hears[heard.pop("worker")](heard)


class Node:
    """Up to GPUS of them. mtbf: seconds between two failures of one GPU."""

    def __init__(self, name: str, mtbf: float, seed: int, watch: Watch) -> None:
        self.back = 0.0  # when it is there again
        self.gpus: list[Gpu] = []
        self._dice, self._mtbf, self._watch = random.Random(f"{seed} {name}"), mtbf, watch

    async def fail(self) -> None:
        """Now and then, without end."""
        while True:
            await asyncio.sleep(self._dice.expovariate(len(self.gpus) / self._mtbf))
            if self._dice.random() < HANGS:
                self._watch.hangs += 1
                self._dice.choice(self.gpus).hang()
                continue
            self._watch.failures += 1
            self.back = asyncio.get_running_loop().time() + REPAIR
            for gpu in self.gpus:
                gpu.die()
            await asyncio.sleep(REPAIR)


class Gpu:
    """One worker's. What it does next is its timer's."""

    def __init__(self, number: int, node: Node, gateway: SimulatedGateway) -> None:
        self._number, self._node, self._gateway, self._watch = number, node, gateway, gateway.watch
        self._life, self._on, self._makes, self._silent = 0, False, False, False
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        node.gpus.append(self)
        gateway.gpus.append(self)

    def start(self, life: int) -> None:
        """Loads a bundle, as soon as its node is there."""
        self._life, self._on = life, True
        self._after(max(0.0, self._node.back - self._loop.time()) + LOADING, self._say, "ready")

    def make(self, id: str, folder: Path) -> None:
        """A job, step by step."""
        *steps, last = self._gateway.timings[id]
        self._makes = True

        def go_on(number: int) -> None:
            if number == 0:
                self._watch.began.setdefault(id, self._loop.time())
                self._say("begun", id=id)
            else:
                self._say("step", id=id, step=number, steps=len(steps))
            self._say("alive", id=id)
            if number < len(steps):
                self._after(steps[number], go_on, number + 1)
            else:
                self._after(last, done)

        def done() -> None:
            self._makes = False
            own = time.thread_time()
            for name in ("video-0.mp4", "thumbnail-0.webp", "spritesheet-0.png"):
                (folder / name).touch()
            self._watch.own += time.thread_time() - own
            self._watch.ended[id] = self._loop.time()
            self._say("done", id=id, warnings=[], seconds={"denoise": sum(steps), "decode": last})

        if not self._silent:
            self._after(0.0, go_on, 0)

    def end(self) -> None:
        """Whatever it does."""
        self._watch.broken_off += self._makes
        self._on = self._makes = self._silent = False
        if self._timer is not None:
            self._timer.cancel()

    def die(self) -> None:
        """With its node."""
        if self._on:
            self._silent = True
            self._after(NOTICED, self._say, "lost")

    def hang(self) -> None:
        """Until it is ended."""
        if self._on:
            self._silent = True
            if self._timer is not None:
                self._timer.cancel()

    def _after(self, seconds: float, do: Callable[..., None], *given: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, do, *given)

    def _say(self, what: str, **more: Any) -> None:
        if what in ("ready", "lost"):
            more |= {"where": "a node", "message": "its node died"}
        self._gateway.say(self._number, {"life": self._life, "say": what, **more})


def cluster(
    gpus: Mapping[str, int], timings: Mapping[str, Sequence[float]], mtbf: float, seed: int, watch: Watch
) -> tuple[list[RayWorker], list[Node]]:
    """So many workers of each bundle, with a GPU each; each bundle has nodes of its own."""
    gateway = SimulatedGateway(timings, watch)
    workers, nodes = list[RayWorker](), list[Node]()
    for bundle, count in gpus.items():
        for index in range(count):
            if index % GPUS == 0:
                nodes.append(Node(f"{bundle} {index // GPUS}", mtbf, seed, watch))
            Gpu(len(workers), nodes[-1], gateway)
            workers.append(RayWorker(bundle, {}, gateway, Needs(0, 1)))
    return workers, nodes
