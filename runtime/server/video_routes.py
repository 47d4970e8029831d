"""Routes of OpenAI's API of videos, and those of this engine beside them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile

from ...untrusted import printable
from ..pictures import media_type
from ..workers.interface import KINDS
from . import asked, described, jobs
from .asked import Asked
from .jobs import Job
from .refusals import Refused, not_found, stopping
from .service import Service
from .serving import Owner, Serving

SHORTEST_POLL, LONGEST_POLL = 500, 10_000  # milliseconds
MOST_FIELDS = 64
LONGEST_REPEAT = 255  # characters of an Idempotency-Key
TYPES = {".mp4": "video/mp4", ".webp": "image/webp", ".png": "image/png"}

router = APIRouter(default_response_class=Response)  # each says itself what it answers


async def asked_of(request: Request) -> Asked:
    """What the body of a POST says. Raises Refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        try:
            async with request.form(
                max_files=asked.MOST_PICTURES, max_fields=MOST_FIELDS, max_part_size=asked.LARGEST_DATA_URL
            ) as form:
                parts = [
                    (name, await value.read() if isinstance(value, UploadFile) else value)
                    for name, value in form.multi_items()
                ]
        except FormParserError as error:
            raise Refused(f"the form cannot be read: {printable(error, 200)}") from None
        return await asyncio.to_thread(asked.from_form, parts)
    if kind == "application/json":
        data = await request.body()
        try:
            return await asyncio.to_thread(lambda: asked.from_json(asked.parse(data)))
        except ValueError as error:
            raise Refused(f"the body {printable(error, 200)}") from None
    raise Refused("send multipart/form-data or application/json", status=415, code="unsupported_media_type")


def _repeat_of(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= LONGEST_REPEAT:
        raise Refused(f"an Idempotency-Key has 1 to {LONGEST_REPEAT} characters", param="idempotency-key")
    return key


def _answer(service: Service, job: Job) -> Response:
    """The video, and when it is worth asking again: when most of what is before it, or of itself, should be
    done. A thousand clients that ask twice a second would be the most that the server has to do."""
    video = service.video(job)
    wait = 800 * service.dispatcher.expected(job, video["queue_position"])
    pause = round(min(max(SHORTEST_POLL, wait), LONGEST_POLL))
    return JSONResponse(video, headers={"openai-poll-after-ms": str(pause)} if job.active else None)


@router.post("/v1/videos", openapi_extra=described.CREATE, responses=described.VIDEO)
async def create(request: Request, owner: Owner, service: Serving) -> Response:
    """Asks for a video; the answer comes at once."""
    return _answer(service, await service.submit(await asked_of(request), owner, _repeat_of(request)))


@router.post("/v1/videos/sync", openapi_extra=described.CREATE, responses=described.FILE)
async def create_and_wait(request: Request, owner: Owner, service: Serving) -> Response:
    """Asks for a video and waits for its file. A client that leaves cancels it, unless it gave an
    Idempotency-Key, with which it may come again."""
    repeat = _repeat_of(request)
    job = await service.submit(await asked_of(request), owner, repeat)
    waiting = asyncio.create_task(service.ended(job.id))
    gone = asyncio.create_task(_disconnected(request))
    held = asyncio.create_task(service.dispatcher.held.wait())
    try:
        await asyncio.wait({waiting, gone, held}, return_when=asyncio.FIRST_COMPLETED)
        if held.done() and not gone.done() and not service.dispatcher.makes(job.id):
            raise stopping()
        await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            return Response(status_code=499)
        ended = waiting.result()
    finally:
        if not waiting.done() and repeat is None:
            await service.dispatcher.cancel(job)
        for task in (waiting, gone, held):
            task.cancel()
    if ended is None or ended.status != jobs.COMPLETED:
        raise _unfinished(job.id, ended)
    return _file(service, request, ended, "video", 0)


@router.get("/v1/videos", responses=described.VIDEOS)
async def list_all(
    owner: Owner,
    service: Serving,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """This key's videos, a page at a time."""
    found = service.dispatcher.store.page(owner, limit, after, order == "asc")
    if found is None:
        raise Refused(f"after: there is no video {after!r:.80}", param="after")
    data = [service.video(job) for job in found[0]]
    ends = (
        {"first_id": data[0]["id"], "last_id": data[-1]["id"]}
        if data
        else {"first_id": None, "last_id": None}
    )
    return JSONResponse({"object": "list", "data": data, "has_more": found[1], **ends})


@router.head("/v1/videos/{id}", include_in_schema=False)
@router.get("/v1/videos/{id}", responses=described.VIDEO)
async def retrieve(id: str, owner: Owner, service: Serving) -> Response:
    """One video, as far as it is."""
    return _answer(service, service.job(id, owner))


@router.delete("/v1/videos/{id}", responses=described.DELETED)
async def delete(id: str, owner: Owner, service: Serving) -> Response:
    """Stops a video if it is being made, and forgets it."""
    await service.dispatcher.delete(service.job(id, owner))
    return JSONResponse({"id": id, "object": "video.deleted", "deleted": True})


@router.post("/v1/videos/{id}/cancel", responses=described.VIDEO)
async def cancel(id: str, owner: Owner, service: Serving) -> Response:
    """Stops a video within one step; one that has ended stays as it is."""
    return _answer(service, await service.dispatcher.cancel(service.job(id, owner)))


@router.head("/v1/videos/{id}/content", include_in_schema=False)
@router.get("/v1/videos/{id}/content", responses=described.FILE)
async def content(
    request: Request,
    id: str,
    owner: Owner,
    service: Serving,
    variant: Literal["video", "thumbnail", "spritesheet"] = "video",
    index: Annotated[int, Query(ge=0, le=63)] = 0,
) -> Response:
    """A finished video's file; index: which of n."""
    job = service.job(id, owner)
    if job.status != jobs.COMPLETED:
        raise _unfinished(id, job)
    if index >= job.samples:
        raise Refused(f"index must be 0 to {job.samples - 1}, not {index}", param="index")
    return _file(service, request, job, variant, index)


@router.get("/v1/videos/{id}/preview", responses=described.FILE)
async def preview(id: str, owner: Owner, service: Serving) -> Response:
    """What a video that is being made looks like so far: one frame."""
    job = service.job(id, owner)
    service.dispatcher.look(job)
    path = service.folder.preview(job.id)
    try:
        data = path.read_bytes()
    except OSError:
        raise Refused("there is no preview", status=404, code="not_found") from None
    return Response(data, media_type="image/webp", headers={"cache-control": "no-store"})


@router.get("/v1/videos/{id}/references/{index}", responses=described.PICTURE)
async def reference(request: Request, id: str, index: int, owner: Owner, service: Serving) -> Response:
    """A picture that came with the request; index: from 0, in the order of `labels`."""
    pictures = service.job(id, owner).pictures
    if not 0 <= index < len(pictures):
        raise Refused(
            f"video {id!r:.80} has {len(pictures)} pictures, counted from 0", status=404, param="index"
        )
    headers = {"etag": f'"{pictures[index]}"', "cache-control": "private, max-age=3600"}
    if _known(request, headers["etag"]):
        return Response(status_code=304, headers=headers)
    path = service.folder.picture(pictures[index])
    try:
        return FileResponse(path, media_type=media_type(path), headers=headers)
    except OSError:
        raise Refused("the picture has expired", status=410, code="expired") from None


def _unfinished(id: str, job: Job | None) -> Refused:
    """Why there is no file."""
    if job is None:
        return not_found(id)
    if job.status == jobs.EXPIRED:
        return Refused("the video's files have expired", status=410, code="expired")
    if job.error is not None:
        return Refused(job.error[1], status=409, code=job.error[0])
    return Refused(f"the video is {job.status}: it has no file", status=409, code=job.status)


def _file(service: Service, request: Request, job: Job, kind: str, sample: int) -> Response:
    """A file that never changes: with ranges, and an ETag that saves it being sent again."""
    tag = f'"{job.id}-{kind}-{sample}"'
    headers = {"etag": tag, "cache-control": "private, max-age=3600"}
    if _known(request, tag):
        return Response(status_code=304, headers=headers)
    path = service.folder.result(job.id, kind, sample)
    if not path.is_file():
        raise Refused("the video's files are gone", status=410, code="expired")
    name = f"{job.id}{f'-{sample}' if sample else ''}{'' if kind == 'video' else f'-{kind}'}{KINDS[kind]}"
    return FileResponse(
        path, media_type=TYPES[KINDS[kind]], headers=headers, filename=name, content_disposition_type="inline"
    )


def _known(request: Request, tag: str) -> bool:
    """Whether the client has it already."""
    known = [part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")]
    return tag in known or "*" in known


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
