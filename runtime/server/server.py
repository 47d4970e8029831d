"""Puts the parts of the server together and runs them. The only file that imports uvicorn."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn

from ...errors import GenerationError, InputError
from ..bundle_format import DEFAULT
from ..cpus import usable
from ..logs import keep_quiet
from ..workers import on_ray
from ..workers.interface import Worker, WorkerLost
from ..workers.process import ProcessWorker
from ..workers.ray_worker import Gateway
from .app import create_app
from .callbacks import Callbacks, secret_of
from .catalogue import Catalogue
from .dispatcher import Dispatcher
from .folder import Folder
from .jobs import Store
from .keys import Keys
from .measures import Measures
from .service import Limits, Service

log = logging.getLogger(__name__)

BACKLOG = 2048  # connections that wait to be taken


def serve(args: argparse.Namespace, options: dict[str, Any], hosts: tuple[str, ...] | None) -> int:
    """Until a signal ends it; returns the exit code.

    Raises InputError, what Bundle.open raises, and GenerationError where no worker comes up.
    """
    if not args.verbose:
        keep_quiet()
    keys = None if args.api_key_file is None else Keys(args.api_key_file)
    catalogue = Catalogue(args.bundle or [DEFAULT], args.custom)
    count = (args.max_workers or args.workers) * len(catalogue.names)
    options["threads"] = options["threads"] or max(1, usable() // count)
    listening = _listen(args.host, args.port)
    with listening, Folder(args.data) as folder:
        try:
            store = Store(folder.database)
        except (sqlite3.Error, ValueError) as error:
            raise InputError(f"cannot read the jobs in {str(folder.database)!r}: {error}") from None
        measures = Measures()
        gateway = None
        if args.ray is not None:
            gateway = Gateway(args.ray, max(usable(), count * options["threads"]), args.verbose)
        workers = list(_workers(args, options, catalogue, gateway))
        dispatcher = Dispatcher(
            store,
            folder,
            workers,
            measures,
            most=args.max_queue,
            keep=args.keep * 3600.0,
            patience=args.step_timeout,
            always=args.workers,
            idle=args.idle,
        )
        measures.watch(dispatcher.waiting)
        service = Service(
            catalogue,
            folder,
            dispatcher,
            measures,
            Callbacks(args.callback_host, secret_of(folder.path / "callback-secret")),
            Limits(args.max_body * 10**6, args.max_queue_per_key or args.max_queue),
            keys,
            hosts,
            (args.public_url or "").startswith("https"),
            args.drain,
        )
        folder.sweep(store.known_jobs(), store.known_pictures())
        try:
            return asyncio.run(_run(service, listening, gateway, args.verbose))
        finally:
            store.close()


def _workers(
    args: argparse.Namespace, options: dict[str, Any], catalogue: Catalogue, gateway: Gateway | None
) -> Iterator[Worker]:
    gpus = itertools.cycle(args.gpu or [None])
    for served in catalogue:
        own = {**options, "place": str(served.folder)}
        if gateway is None:
            yield from (ProcessWorker(served.name, own, next(gpus)) for _ in range(args.workers))
        else:
            yield from on_ray.workers(args, served.name, own, gateway, args.max_workers or args.workers)


def _listen(host: str, port: int) -> socket.socket:
    """Raises InputError where the address is taken, before anything is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host.strip("[]"), port))
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        raise InputError(f"cannot listen at {host}:{port}: {error.strerror}; --port says another") from None
    return found


async def _run(service: Service, listening: socket.socket, gateway: Gateway | None, verbose: bool) -> int:
    config = uvicorn.Config(
        create_app(service),  # type: ignore[arg-type]
        log_config=None,
        access_log=verbose,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=int(service.drain) + 5,
    )
    server = _Server(config, service)
    host, port = listening.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    failed: list[WorkerLost] = []

    async def load() -> None:
        try:
            await service.dispatcher.start()
            print(f"http://{address} serves {', '.join(service.catalogue.names)}", flush=True)
        except WorkerLost as error:
            if not service.dispatcher.held.is_set():  # else it was told to stop meanwhile
                failed.append(error)
                server.should_exit = True

    loading = asyncio.create_task(load())
    with suppress(KeyboardInterrupt):  # the signal that ended it, which uvicorn raises once more
        await server.serve(sockets=[listening])
    loading.cancel()
    if gateway is not None:
        await gateway.close()
    if failed:
        raise GenerationError(f"no worker came up: {failed[0]}")
    return 0


class _Server(uvicorn.Server):
    """A signal stops the queue at once, not when the last client is gone; a second one ends it all."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's handler."""
        self._service.dispatcher.hold()
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)
