"""What every request passes before it is read, and every answer before it leaves. Plain ASGI: it streams.

A server on localhost can be reached by any page that a browser there shows. So requests are refused that name
another host (a name that was made to lead here), and writes that come from another site.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any

from .refusals import Refused

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
READS = ("GET", "HEAD", "OPTIONS")
SMALL = 2**16  # bytes of a body of any request but one for a video
BODIES = ("/v1/videos", "/v1/videos/sync")
AT_ONCE = 4  # of the largest bodies; what more comes in at the same time is to come again
PATIENCE = 30.0  # seconds in which a client must send some more of its body
LINGERING, LINGER = 2**24, 10.0  # bytes and seconds of a body that is not wanted


class Guard:
    """hosts: names that the server goes by, None for any; most: bytes of a body that asks for a video."""

    def __init__(self, app: App, *, hosts: Iterable[str] | None, most: int) -> None:
        self._app, self._most = app, most
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._held = 0  # bytes of all bodies that are being looked at

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, whole, received = False, False, 0
        most = self._most if scope["path"] in BODIES else SMALL

        async def limited() -> dict[str, Any]:
            nonlocal whole, received
            if whole:  # all was read; somebody waits for the client to leave
                self._held -= received
                received = 0
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), PATIENCE)
            except TimeoutError:
                raise Refused("the request did not come to its end", status=408, code="timeout") from None
            whole = not message.get("more_body", False)
            size = len(message.get("body", b""))
            received += size
            self._held += size
            if received > most:
                raise _too_large(most)
            if self._held > AT_ONCE * self._most:
                headers = {"retry-after": "1"}
                raise Refused("too much at once: try again", status=503, code="busy", headers=headers)
            return message

        async def guarded(message: dict[str, Any]) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                own = {name for name, _ in message.get("headers", ())}
                added = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in own]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            elif not whole and not message.get("more_body", False):
                await _rest(receive)
            await send(message)

        try:
            self._check(scope, most)
            await self._app(scope, limited, guarded)
        except Refused as error:
            if begun:
                raise
            body = json.dumps(error.body()).encode()
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
            }
            pairs = [(k.encode(), v.encode()) for k, v in {**headers, **error.headers}.items()]
            await guarded({"type": "http.response.start", "status": error.status, "headers": pairs})
            await guarded({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
        finally:
            self._held -= received

    def _check(self, scope: Scope, most: int) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if self._hosts is not None and _name(host) not in self._hosts and not _is_number(_name(host)):
            raise Refused(
                f"this server does not go by the name {host!r:.80}: start it with --public-url",
                status=421,
                code="wrong_host",
            )
        if scope["method"] not in READS:
            site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
            foreign = site not in (None, "same-origin", "none")
            if foreign or (
                site is None and origin is not None and _name(origin.partition("://")[2]) != _name(host)
            ):
                raise Refused("this comes from another site", status=403, code="other_site")
        length = headers.get(b"content-length", "0")
        if length.isdecimal() and len(length) < 20 and int(length) > most:
            raise _too_large(most)


async def _rest(receive: Receive) -> None:
    """Takes some more of a body that nobody wants: who still sends when the connection is closed may not see
    the answer."""
    left = LINGERING
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while left > 0 and (message := await receive()).get("more_body", False):
                left -= len(message["body"])


def _too_large(most: int) -> Refused:
    return Refused(f"this request has at most {most} bytes", status=413, code="too_large")


def _name(host: str) -> str:
    """A host without its port."""
    host = host.lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _is_number(host: str) -> bool:
    """Whether it is an address: no name, so nobody made it lead here."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
