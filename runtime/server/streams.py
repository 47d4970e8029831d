"""Server-sent events: one video to its end, or all that a key has asked for. The only file that imports
sse_starlette.

A browser has six connections to a server, so the page listens to all of its videos in one stream.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from sse_starlette.sse import EventSourceResponse

from . import described
from .events import QUEUE
from .jobs import Job
from .service import Service
from .serving import Owner, Serving

Event = dict[str, str]

router = APIRouter(default_response_class=Response)  # each says itself what it answers


@router.get("/v1/videos/{id}/events", responses=described.EVENTS)
async def of_one(id: str, owner: Owner, service: Serving) -> Response:
    """Server-sent events to the end: `status` (the video), `step`, `preview` (its address), `deleted`."""
    service.job(id, owner)
    return _stream(_of_one(service, id))


@router.get("/v1/events", responses=described.EVENTS)
async def of_all(owner: Owner, service: Serving) -> Response:
    """The same of all this key's videos, beginning with those that are not finished, without end; `queue`:
    places, where they have changed."""
    return _stream(_of_all(service, owner))


async def _of_one(service: Service, id: str) -> AsyncIterator[Event]:
    with service.dispatcher.events.of(id) as changes:
        found = ["status"]
        while True:
            for what in found:
                if (job := service.dispatcher.store.get(id)) is None:
                    yield _event("deleted", {"id": id})
                    return
                yield _told(service, job, what if job.active else "status")  # its end is always told
                if not job.active:
                    return
            found = [what for _, what in await changes.take()]


async def _of_all(service: Service, owner: str) -> AsyncIterator[Event]:
    store = service.dispatcher.store
    with service.dispatcher.events.of_owner(owner) as changes:
        for job in store.active():
            if job.owner == owner:
                yield _told(service, job, "status")
                if service.folder.preview(job.id).exists():
                    yield _told(service, job, "preview")
        while True:
            for id, what in await changes.take():
                if (id, what) == QUEUE:
                    yield _event("queue", service.dispatcher.places(owner))
                elif (now := store.get(id)) is None:
                    yield _event("deleted", {"id": id})
                else:
                    yield _told(service, now, what)


def _told(service: Service, job: Job, what: str) -> Event:
    if what == "preview":
        return _event(what, {"id": job.id, "url": f"/v1/videos/{job.id}/preview?step={job.step}"})
    video = service.video(job)
    if what == "step":
        video = {name: video[name] for name in ("id", "step", "steps", "progress")}
    return _event(what, video)


def _event(name: str, data: dict[str, Any]) -> Event:
    return {"event": name, "data": json.dumps(data)}


def _stream(events: AsyncIterator[Event]) -> Response:
    return EventSourceResponse(events, headers={"cache-control": "no-store"})
