"""Errors as clients of OpenAI's API know them."""

from __future__ import annotations

from typing import Any


class Refused(Exception):
    """A request that is not answered as it was meant. `str(error)`: one line for people.

    status: of HTTP; param: the field that is wrong; code: a word for programs; headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        """As JSON."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def stopping() -> Refused:
    """No more jobs are taken."""
    return Refused("the server is stopping", status=503, code="stopping", headers={"retry-after": "5"})


def not_found(id: str) -> Refused:
    """No such video, or not this client's."""
    return Refused(f"there is no video {id!r:.80}", status=404, code="not_found")
