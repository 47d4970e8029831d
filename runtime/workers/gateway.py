"""The process that speaks with a Ray cluster: `python -m conceptmaster.runtime.workers.gateway`.

Started by ray_worker.py. Reads lines of JSON from standard input: first where the cluster is, then what is
asked of which worker; answers in lines. Each worker is an actor on some node, see actor.py; what comes back
of a job is written into its folder here. The end of its input is the end of this process, and of its actors.
The only file that imports ray.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import select
import socket
import sys
import tempfile
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from ... import __version__
from ...atomic_write import replacing, sync
from ...errors import ConceptMasterError, how_to_install, not_loaded
from .actor import Actor
from .fetch import Parcel, Source
from .interface import PREVIEW

REACHING = 5.0  # seconds for an address to answer
JOINING = 45.0  # seconds for a cluster to let this process join
PLACING = 10.0  # seconds after which it is said that a worker waits for a node
STORE = 512 * 2**20  # bytes of a Ray of our own for what is on its way
ENDING = 10.0  # seconds for Ray to end
BETWEEN_LOOKS = 5.0  # seconds between two looks at whether the cluster is there
SILENCE = 30.0  # seconds for its head to answer


class Line:
    """What is said to the server, from any thread."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)  # whoever prints, prints for people
        self._lock = threading.Lock()

    def say(self, what: str, **more: Any) -> None:
        """One line."""
        with self._lock, suppress(OSError):
            self._out.write(json.dumps({"say": what, **more}) + "\n")


def main() -> int:
    """Joins the cluster, then does what it is told, until nobody tells any more."""
    line = Line()
    told = json.loads(sys.stdin.readline() or "null")
    if told is None:
        return 0
    if not told["verbose"]:  # Ray writes of what it survives, and of whatever ends, at length
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    with ExitStack() as stack:
        try:
            ray = _join(told["address"], told["cpus"], stack, line)
        except Exception as error:
            line.say("lost", message=_one_line(error))
            return 1
        line.say("joined")
        try:
            asyncio.run(Cluster(ray, line).run())
        finally:
            threading.Timer(ENDING, os._exit, (1,)).start()
            ray.shutdown()
    os._exit(0)  # not when the timer has run out


def _join(address: str, cpus: int, stack: ExitStack, line: Line) -> Any:
    """The module ray, which is part of a cluster now."""
    if address == "local":
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # else it is reached from other machines, too
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # nor by another user of this one
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else it is kept in the home folder
    try:
        import ray
    except ImportError as error:
        raise not_loaded("ray", how_to_install("ray"), error) from error
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="conceptmaster-ray-", ignore_cleanup_errors=True)
        )
        own = {"num_cpus": cpus, "object_store_memory": STORE, "_temp_dir": folder}
        ray.init("local", **quiet, **own, include_dashboard=False, _node_ip_address="127.0.0.1")
        return ray
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), REACHING).close()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConceptMasterError(f"no Ray answers at {address}: {why}") from error
    joined = threading.Event()
    threading.Thread(target=_wait_in_vain, args=(address, joined, line), daemon=True).start()
    try:
        ray.init(address, **quiet)
    except Exception as error:
        asks = "; where it asks for a token, RAY_AUTH_TOKEN is what it asks for"
        raise ConceptMasterError(f"cannot join the Ray at {address}: {_one_line(error)}{asks}") from error
    finally:
        joined.set()
    return ray


def _wait_in_vain(address: str, joined: threading.Event, line: Line) -> None:
    """Ends this process when nobody waits for it any more, or it has waited too long to join: Ray itself
    waits for ever for whoever listens there and says nothing, or speaks of something else."""
    asked = select.poll()
    asked.register(0, 0)  # for its end alone
    ended = asked.poll(JOINING * 1000)
    if joined.is_set():
        return
    if not ended:
        waited = f"whoever listens there has not answered as its head for {JOINING:g} seconds"
        line.say("lost", message=f"cannot join the Ray at {address}: {waited}")
    os._exit(1)


class Cluster:
    """The workers of one server. Everything happens in one event loop."""

    def __init__(self, ray: Any, line: Line) -> None:
        self._ray, self._line = ray, line
        self._actors: dict[int, Any] = {}
        self._sources: dict[str, Any] = {}
        self._known: set[int] = set()
        self._where: dict[int, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until the end of the input, or of the cluster."""
        loop = asyncio.get_running_loop()
        watching = loop.create_task(self._watch())
        while text := await loop.run_in_executor(None, sys.stdin.readline):
            told = json.loads(text)
            task = loop.create_task(self._do(told))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        watching.cancel()

    async def _watch(self) -> None:
        """Ends this process when the cluster's head, or this machine's node, is not there any more: Ray waits
        for both, or for what nobody knows any more."""
        here = self._ray.get_runtime_context().get_node_id()
        why = ""
        while not why:
            await asyncio.sleep(BETWEEN_LOOKS)
            try:
                async with asyncio.timeout(SILENCE):
                    nodes = await asyncio.to_thread(self._ray.nodes)
                if not any(node["NodeID"] == here and node["Alive"] for node in nodes):
                    why = "the Ray cluster does not know this machine's node any more"
            except TimeoutError:
                why = f"the head of the Ray cluster has not answered for {SILENCE:g} seconds"
            except Exception as error:
                why = f"the Ray cluster is not there any more: {_one_line(error)}"
        for number in self._known:
            self._line.say("lost", worker=number, message=why)
        os._exit(1)

    async def _do(self, told: dict[str, Any]) -> None:
        number, life, do = told["worker"], told["life"], told["do"]

        def say(what: str, **more: Any) -> None:
            self._line.say(what, worker=number, life=life, **more)

        if do == "start" and number not in self._actors:
            needs = told["needs"]
            own = {"num_cpus": needs["cpus"], "num_gpus": needs["gpus"], "max_restarts": 0}
            self._actors[number] = self._ray.remote(Actor).options(**own).remote(told["bundle"])
        self._known.add(number)
        actor = self._actors.get(number)
        try:
            if actor is None:
                raise ConceptMasterError("it is not running")
            if do == "start":
                await self._start(actor, number, told, say)
            elif do == "make":
                await self._make(actor, told["task"], say)
            elif do == "stop":
                self._end(number, actor)
            else:
                await getattr(actor, do).remote(told["id"])
        except Exception as error:
            self._end(number, actor)
            ours = isinstance(error, ConceptMasterError) or number not in self._where
            say(
                "lost",
                message=_one_line(error) if ours else f"node {self._where[number]}: {_one_line(error)}",
            )

    def _end(self, number: int, actor: Any) -> None:
        if actor is not None and self._actors.get(number) is actor:
            del self._actors[number]
            self._ray.kill(actor)

    async def _start(self, actor: Any, number: int, told: dict[str, Any], say: Any) -> None:
        """Until the worker's process is gone."""
        options = dict(told["options"])
        parcel = await asyncio.to_thread(Parcel.of, options.pop("place"))
        where = self._where[number] = await self._placed(actor, told["needs"], say)
        said = await actor.start.remote(options, parcel, __version__)
        if said["say"] == "wanted":
            try:
                said = await actor.start.remote(options, parcel, __version__, self._source(parcel))
            except Exception:
                self._sources.pop(parcel.digest, None)
                raise
        if said["say"] != "ready":
            raise ConceptMasterError(said["message"])
        say("ready", where=where)
        say("lost", message=f"node {where} says: {await actor.gone.remote()}")

    async def _placed(self, actor: Any, needs: dict[str, float], say: Any) -> str:
        """Waits for the actor's node; its name. After a while it is said that and why it waits."""
        where = asyncio.ensure_future(actor.where.remote())
        if not (await asyncio.wait({where}, timeout=PLACING))[0]:
            nodes = [node["Resources"] for node in await asyncio.to_thread(self._ray.nodes) if node["Alive"]]
            has = [_amount(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes]
            all_of_it = "; ".join(filter(None, has)) or "nothing"
            say("waits", message=f"no node has {_amount(**needs)} free; in all, the nodes have: {all_of_it}")
        return str(await where)

    def _source(self, parcel: Parcel) -> Any:
        """The actor on this machine that a node reads the bundle from."""
        source = self._sources.get(parcel.digest)
        if source is None:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            here = NodeAffinitySchedulingStrategy(self._ray.get_runtime_context().get_node_id(), soft=False)
            source = self._ray.remote(Source).options(num_cpus=0, scheduling_strategy=here).remote(parcel)
            self._sources[parcel.digest] = source
        return source

    async def _make(self, actor: Any, told: dict[str, Any], say: Any) -> None:
        """A job, to its last word; its files first."""
        folder, id = Path(told["folder"]), told["id"]
        written, wrong = dict[Path, None](), ""
        pictures = [Path(path).read_bytes() for _, path in told["concepts"]]
        async for reference in actor.make.remote(told, pictures):
            said = await reference
            what, data = said.pop("say"), said.pop("data", b"")
            try:
                if what == "file" and not wrong:
                    path = folder / Path(said["name"]).name
                    await asyncio.to_thread(_append, path, data)
                    written[path] = None
                elif what == "preview":
                    with replacing(folder / PREVIEW) as temporary:
                        temporary.write_bytes(data)
                elif what == "done":
                    for path in written:
                        await asyncio.to_thread(sync, path)
            except OSError as error:
                wrong = f"its files could not be kept: {error.strerror}"
            if wrong and what in ("done", "failed", "cancelled"):
                say("failed", id=id, code="storage", message=wrong)
            elif what == "file":
                say("alive", id=id)  # many may take long
            else:
                say(what, **{**said, "id": id})


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def _amount(cpus: float, gpus: float) -> str:
    parts = [f"{n:g} {name}" for n, name in ((cpus, "CPUs"), (gpus, "GPUs")) if n]
    return " and ".join(parts)


def _one_line(error: BaseException) -> str:
    """What a program, or Ray, says of an error; of its tracebacks the end."""
    text = str(error)
    if "No module named 'conceptmaster" in text or "from 'conceptmaster" in text:
        return f"a node has no conceptmaster {__version__}: install it there"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if "Traceback" in text or "ray::" in lines[0] else lines[0]


if __name__ == "__main__":
    sys.exit(main())
