"""What the routes do, without HTTP: who asks, whose job it is, and how a POST becomes one."""

from __future__ import annotations

import asyncio
import logging
import secrets
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...untrusted import printable
from ..bundle_format.strict_json import checksum
from ..request import Request
from . import answers, asked
from .asked import Asked
from .callbacks import Callbacks
from .catalogue import Catalogue, as_request
from .dispatcher import Dispatcher, QueueFull
from .folder import Folder
from .jobs import Job
from .keys import Keys
from .measures import Measures
from .refusals import Refused, not_found, stopping

log = logging.getLogger(__name__)

PICTURES_AT_ONCE = 2  # that are decoded to be looked at: each may be large


@dataclass(frozen=True)
class Limits:
    """body: bytes of a request; per_owner: jobs of one key that may wait."""

    body: int = 96 * 2**20
    per_owner: int = 100


@dataclass
class Service:
    """All that routes need. keys: None where anybody may ask; secure: whether cookies are for https alone."""

    catalogue: Catalogue
    folder: Folder
    dispatcher: Dispatcher
    measures: Measures
    callbacks: Callbacks
    limits: Limits
    keys: Keys | None = None
    hosts: tuple[str, ...] | None = None
    secure: bool = False
    drain: float = 60.0

    def __post_init__(self) -> None:
        self.looking = asyncio.Semaphore(PICTURES_AT_ONCE)
        self.telling: set[asyncio.Task[None]] = set()

    def owner(self, authorization: str, cookie: str | None) -> str:
        """Who asks: "Bearer KEY", or else the page's cookie. Raises Refused where it is nobody known."""
        if self.keys is None:
            return ""
        scheme, _, key = authorization.partition(" ")
        found = self.keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        if found is None and not scheme and cookie is not None:
            found = self.keys.session(cookie)
        if found is None:
            wrong = (
                "this API key is not known" if scheme else "an API key is needed: Authorization: Bearer KEY"
            )
            raise Refused(wrong, status=401, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return found

    def job(self, id: str, owner: str) -> Job:
        """A job of this owner. Raises Refused for any other."""
        job = self.dispatcher.store.get(id)
        if job is None or job.owner != owner:
            raise not_found(id)
        return job

    def video(self, job: Job) -> dict[str, Any]:
        """As clients see it."""
        return answers.video(job, self.catalogue.get(job.bundle), self.dispatcher.place(job))

    async def submit(self, asked_for: Asked, owner: str, repeat: str | None) -> Job:
        """The job of a POST, new or that of its Idempotency-Key. Raises Refused."""
        served = self.catalogue.get(asked_for.model)
        if served is None:
            names = ", ".join(self.catalogue.names)
            raise Refused(
                f"there is no model {asked_for.model!r:.80}; there are {names}",
                status=404,
                param="model",
                code="model_not_found",
            )
        asked.check_pictures(asked_for.pictures)
        self.callbacks.check(asked_for.callback_url)
        values, named = asked_for.request(served), asked_for.labelled(served)

        def looked_at() -> tuple[Request, list[str]]:
            request = as_request(values, named)
            return request.resolve(served.manifest)[0], served.check(request)

        try:
            async with self.looking:
                request, warned = await asyncio.to_thread(looked_at)
        except InputError as error:
            raise Refused(printable(error), param=asked.param_of(error.field)) from None
        assert request.steps is not None
        received: list[tuple[str, Path]] = []
        try:
            received = await asyncio.to_thread(self.folder.receive, [data for _, data in named])
            values |= {"seed": request.seed, "samples": request.samples}
            values["concepts"] = [
                {"label": label, "sha256": sha256}
                for (label, _), (sha256, _) in zip(named, received, strict=True)
            ]
            what = {"bundle": served.name, "request": values, "callback": asked_for.callback_url}
            job = Job(
                id=f"video_{secrets.token_hex(16)}",
                owner=owner,
                bundle=served.name,
                request=values,
                digest=checksum(what),
                created_at=time.time(),
                steps=request.steps * request.samples,
                warnings=tuple(warned),
                callback_url=asked_for.callback_url,
            )
            return await self._take(job, repeat, received)
        except (OSError, sqlite3.Error) as error:
            log.error("a job could not be kept: %s", error)
            message = "the server cannot keep your request: its disk is full, or fails"
            raise Refused(message, status=507, code="storage") from None
        finally:
            for _, path in received:
                path.unlink(missing_ok=True)

    async def _take(self, job: Job, repeat: str | None, received: list[tuple[str, Path]]) -> Job:
        """The job, or that of its Idempotency-Key. From here until it is kept there is no await: the same
        request, or one that deletes the same picture, comes before or after."""
        store = self.dispatcher.store
        if repeat is not None and (known := store.repeated(job.owner, repeat)) is not None:
            if known[0] != job.digest:
                raise Refused(
                    "this Idempotency-Key was used for another request",
                    status=409,
                    code="idempotency_key_reused",
                )
            return self.job(known[1], job.owner)
        if self.dispatcher.held.is_set():
            raise stopping()
        if self.dispatcher.waiting(job.owner) >= self.limits.per_owner:
            raise Refused(
                f"{self.limits.per_owner} of your videos wait already, which is the most",
                status=429,
                code="too_many_waiting",
                headers={"retry-after": "5"},
            )
        try:
            self.dispatcher.check_room(job.bundle)
        except QueueFull as error:
            raise Refused(
                "the queue is full: try again later",
                status=429,
                code="queue_full",
                headers={"retry-after": str(error.retry_after)},
            ) from None
        self.folder.keep(received)
        try:
            await self.dispatcher.submit(job, repeat)
        except sqlite3.Error:
            self.folder.drop_pictures(store.unheld(job.pictures))
            raise
        if job.callback_url is not None:
            self.follow(job.id)
        return job

    def follow(self, id: str) -> None:
        """Sees to it that a job's callback is told of its end."""
        task = asyncio.create_task(self._follow(id))
        self.telling.add(task)
        task.add_done_callback(self.telling.discard)

    async def _follow(self, id: str) -> None:
        job = await self.ended(id)
        if job is not None:
            await self.callbacks.tell(job)
            self.dispatcher.store.change(id, told=True)

    async def ended(self, id: str) -> Job | None:
        """A job once it has ended; None where it was deleted."""
        with self.dispatcher.events.of(id, watching=False) as changes:
            while (job := self.dispatcher.store.get(id)) is not None and job.active:
                await changes.take()
        return job
