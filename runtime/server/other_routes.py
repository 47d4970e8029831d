"""Routes around the videos: models, health, measures, and the page's session."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from . import answers, asked, described, measures
from .refusals import Refused
from .serving import COOKIE, Owner, Serving

router = APIRouter()


@router.get("/v1/models", responses=described.MODELS)
async def models(owner: Owner, service: Serving) -> Response:
    """The bundles that are served."""
    return JSONResponse(answers.models(service.catalogue))


@router.get("/v1/models/{name}", responses=described.MODEL)
async def model(name: str, owner: Owner, service: Serving) -> Response:
    """One of them."""
    served = service.catalogue.get(name)
    if served is None:
        raise Refused(f"there is no model {name!r:.80}", status=404, param="model", code="model_not_found")
    return JSONResponse(answers.model(served))


@router.get("/health/live")
async def live() -> dict[str, str]:
    """Whether the server answers."""
    return {"status": "ok"}


@router.get("/health/ready", responses=described.NOT_READY)
async def ready(service: Serving) -> Response:
    """Whether every model has a worker that is loaded."""
    able = service.dispatcher.ready
    about = {"status": "ready" if able else "not ready", "workers": service.dispatcher.workers_ready}
    return JSONResponse(about, 200 if able else 503)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(owner: Owner, service: Serving) -> Response:
    """For Prometheus."""
    return Response(service.measures.text(), media_type=measures.CONTENT_TYPE)


@router.get("/session", responses=described.SESSION_NOW)
async def session(request: Request, service: Serving) -> dict[str, Any]:
    """Whether a key is needed, and the name of the one that the page has signed in with."""
    cookie = request.cookies.get(COOKIE)
    signed_in = None if service.keys is None or cookie is None else service.keys.session(cookie)
    return {"needed": service.keys is not None, "name": signed_in}


@router.post("/session", status_code=204, openapi_extra=described.SESSION)
async def sign_in(request: Request, service: Serving) -> Response:
    """Takes an API key once, {"key": …}, and gives a cookie in its stead, which scripts cannot read."""
    response = Response(status_code=204)
    if service.keys is None:
        return response
    try:
        value = asked.parse(await request.body())
        key = value.get("key") if isinstance(value, dict) else None
    except ValueError:
        key = None
    owner = service.keys.owner(key) if isinstance(key, str) else None
    if owner is None:
        raise Refused("this API key is not known", status=401, code="invalid_api_key")
    response.set_cookie(
        COOKIE,
        service.keys.sign_in(owner),
        httponly=True,
        samesite="strict",
        secure=service.secure,
        path="/",
    )
    return response


@router.delete("/session", status_code=204)
async def sign_out(request: Request, service: Serving) -> Response:
    """Ends the page's session."""
    response = Response(status_code=204)
    if service.keys is not None and (cookie := request.cookies.get(COOKIE)) is not None:
        service.keys.sign_out(cookie)
    response.delete_cookie(COOKIE, path="/")
    return response
