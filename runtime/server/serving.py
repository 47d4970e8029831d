"""What every route is given: the service, and who asks."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from .service import Service

COOKIE = "conceptmaster_session"


def _service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


Serving = Annotated[Service, Depends(_service)]


def _owner(request: Request, service: Serving) -> str:
    return service.owner(request.headers.get("authorization", ""), request.cookies.get(COOKIE))


Owner = Annotated[str, Depends(_owner)]
