"""Telling others that a job has ended: a POST that is signed, retried, and follows nothing.

Event and signature are OpenAI's webhooks', which are Standard Webhooks (standardwebhooks.com): the header
`webhook-signature` is "v1," and base64 of HMAC-SHA256 over "id.timestamp.body". Only this file imports httpx.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from ...atomic_write import replacing
from .jobs import Job
from .refusals import Refused

log = logging.getLogger(__name__)

PAUSES = (1.0, 5.0, 30.0, 300.0)  # seconds before each further try
PATIENCE = 10.0  # seconds for an answer
LONGEST_URL = 2048
PREFIX = "whsec_"


class Callbacks:
    """hosts: names, perhaps with a port, that may be told; secret: of the signature, with PREFIX."""

    def __init__(self, hosts: Sequence[str], secret: str) -> None:
        self._hosts = {host.lower() for host in hosts}
        self._key = base64.b64decode(secret.removeprefix(PREFIX))

    def check(self, url: str | None) -> None:
        """Raises Refused for an address that is not to be told."""
        if url is None:
            return
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError:
            host, port, parts = "", None, urlsplit("")
        right = parts.scheme in ("http", "https") and host and len(url) <= LONGEST_URL and url.isprintable()
        if not right or parts.username is not None:
            raise Refused(
                f"callback_url must be an address of http or https, not {url!r:.80}", param="callback_url"
            )
        if host not in self._hosts and f"{host}:{port}" not in self._hosts:
            raise Refused(
                f"callback_url: {host!r:.80} is not called: start the server with --callback-host {host:.80}",
                param="callback_url",
                status=403,
                code="callback_host_refused",
            )

    async def tell(self, job: Job) -> bool:
        """Tells a job's callback_url of its end, some times if need be; whether it was taken."""
        assert job.callback_url is not None
        id, now = f"evt_{job.id.removeprefix('video_')}", int(time.time())
        kind = f"video.{job.status}"
        event = {"id": id, "object": "event", "type": kind, "created_at": now, "data": {"id": job.id}}
        body = json.dumps(event).encode()
        async with httpx.AsyncClient(follow_redirects=False, timeout=PATIENCE, trust_env=False) as client:
            for pause in (0.0, *PAUSES):
                await asyncio.sleep(pause)
                try:
                    headers = self._headers(id, body)
                    async with client.stream(
                        "POST", job.callback_url, content=body, headers=headers
                    ) as answer:
                        if answer.is_success:  # what it says besides is not read
                            return True
                    why = f"it answered {answer.status_code}"
                except (httpx.HTTPError, httpx.InvalidURL) as error:
                    why = type(error).__name__
                log.warning("the callback of %s was not taken: %s", job.id, why)
        return False

    def _headers(self, id: str, body: bytes) -> dict[str, str]:
        stamp = str(int(time.time()))
        digest = hmac.new(self._key, f"{id}.{stamp}.".encode() + body, hashlib.sha256).digest()
        signature = f"v1,{base64.b64encode(digest).decode()}"
        return {
            "content-type": "application/json",
            "webhook-id": id,
            "webhook-timestamp": stamp,
            "webhook-signature": signature,
        }


def secret_of(path: Path) -> str:
    """The folder's own secret, made when it is first asked for. Raises OSError."""
    try:
        return path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        secret = PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()
        with replacing(path) as temporary:
            temporary.write_text(secret + "\n", encoding="ascii")
        path.chmod(0o600)
        return secret
