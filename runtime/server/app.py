"""The HTTP side put together: routes, what errors look like, the page. It imports no model."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from ...untrusted import printable
from . import described, other_routes, streams, video_routes
from .guard import Guard
from .refusals import Refused
from .service import Service

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"


class _Page(StaticFiles):
    """Files that a browser asks about each time, so that the page is always this server's own; where the ETag
    is the one that it has, they are not sent again."""

    def file_response(self, *args: Any, **more: Any) -> Response:
        """As StaticFiles."""
        response = super().file_response(*args, **more)
        response.headers["cache-control"] = "no-cache"
        return response


def create_app(service: Service) -> Guard:
    """The ASGI application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for job in service.dispatcher.store.untold():
            service.follow(job.id)
        for job in service.dispatcher.store.active():
            if job.callback_url is not None:
                service.follow(job.id)
        yield
        await service.dispatcher.drain(service.drain)
        for task in service.telling:
            task.cancel()

    app = FastAPI(
        title="conceptmaster",
        summary="Videos of several named, pictured things",
        version=described.version(),
        lifespan=lifespan,
        docs_url=None,  # which would load scripts from elsewhere
        redoc_url=None,
        responses=described.ERRORS,
    )
    app.state.service = service
    describe = app.openapi
    app.openapi = lambda: described.without_422(describe())  # type: ignore[method-assign]
    _errors(app)
    app.include_router(streams.router)
    app.include_router(video_routes.router)
    app.include_router(other_routes.router)
    app.mount("/", _Page(directory=PAGE, html=True), name="page")
    return Guard(app, hosts=service.hosts, most=service.limits.body)  # type: ignore[arg-type]


def _errors(app: FastAPI) -> None:
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return JSONResponse(error.body(), error.status, error.headers)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        body = Refused(
            printable(error.detail), status=error.status_code, code=_code(error.status_code)
        ).body()
        return JSONResponse(body, error.status_code, error.headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return JSONResponse(Refused(printable(f"{name}: {first['msg']}", 300), param=name).body(), 400)

    async def broken(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        message = "something went wrong: the server's log has it"
        return JSONResponse(Refused(message, status=500, code="internal_error").body(), 500)

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, broken)


def _code(status: int) -> str | None:
    return {404: "not_found", 405: "method_not_allowed"}.get(status)
