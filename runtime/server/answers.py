"""Jobs as OpenAI's API tells of them, and the lists and models around them."""

from __future__ import annotations

from typing import Any

from .asked import NUMBERS, TEXTS
from .catalogue import Catalogue, Served
from .jobs import COMPLETED, Job

OPTIONS = {"steps": "steps", **{name: name for name in (*NUMBERS, "boxes")}, **TEXTS}
"""What a POST may ask for besides, and that field's name in runtime.Request."""


def video(job: Job, served: Served | None, place: int | None = None) -> dict[str, Any]:
    """A video object. served: None where the bundle is not served any more; place: jobs before it."""
    progress = 100 if job.status == COMPLETED else (100 * job.step) // max(1, job.steps)
    return {
        "id": job.id,
        "object": "video",
        "model": job.bundle,
        "status": job.status,
        "progress": min(progress, 99) if job.status != COMPLETED else progress,
        "created_at": int(job.created_at),
        "started_at": _whole(job.started_at),
        "completed_at": _whole(job.completed_at),
        "expires_at": _whole(job.expires_at),
        "size": None if served is None else served.size,
        "seconds": None if served is None else served.seconds,
        "prompt": job.request["prompt"],
        "seed": job.request["seed"],
        "n": job.samples,
        "options": {
            asked: job.request[name] for asked, name in OPTIONS.items() if job.request.get(name) is not None
        },
        "labels": [concept["label"] for concept in job.request["concepts"]],
        "queue_position": place,
        "step": job.step,
        "steps": job.steps,
        "warnings": list(job.warnings),
        "timings": job.seconds,
        "error": None if job.error is None else {"code": job.error[0], "message": job.error[1]},
        "remixed_from_video_id": None,
    }


def models(catalogue: Catalogue) -> dict[str, Any]:
    """The list of them."""
    return {"object": "list", "data": [model(served) for served in catalogue]}


def model(served: Served) -> dict[str, Any]:
    """One bundle."""
    return {"id": served.name, "object": "model", "created": 0, "owned_by": "local", **served.about()}


def _whole(time: float | None) -> int | None:
    return None if time is None else int(time)
