"""The API as others' clients use it: OpenAI's, curl, a plain HTTP client, a browser's event stream."""

from __future__ import annotations

import base64
import http.server
import json
import re
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from conceptmaster import Concept, Pipeline
from conceptmaster.runtime.server.command import SERVE

from .conftest import LONG, PROMPT, Server, waited


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(bundle, threads=1) as opened:
        yield opened


def expected(pipeline: Pipeline, tmp_path: Path, concepts: dict[str, Path], **options: Any) -> bytes:
    """The file that the command line makes of a request."""
    named = [Concept(label, path) for label, path in concepts.items()]
    return pipeline(PROMPT, named, **options).save(tmp_path / "expected.mp4").read_bytes()


# OpenAI's client.


def test_the_openai_client_makes_polls_and_downloads_a_video(
    server: Server, pictures: dict[str, Path], pipeline: Pipeline, tmp_path: Path
) -> None:
    with pictures["ball"].open("rb") as file:
        video = server.openai.videos.create_and_poll(
            prompt=PROMPT, input_reference=file, extra_body={"label": "ball", "seed": 7, "steps": 3}
        )
    assert (video.status, video.progress, video.error, video.seconds, video.size) == (
        "completed", 100, None, "1.125", "8x8",
    )  # fmt: skip
    content = server.openai.videos.download_content(video.id)
    assert content.read() == expected(pipeline, tmp_path, {"ball": pictures["ball"]}, seed=7, steps=3)
    for variant, suffix, kind in (("thumbnail", "webp", "WEBP"), ("spritesheet", "png", "PNG")):
        place = tmp_path / f"{variant}.{suffix}"
        server.openai.videos.download_content(video.id, variant=variant).write_to_file(place)  # type: ignore[arg-type]
        with Image.open(place) as picture:
            assert picture.format == kind
    assert server.openai.videos.retrieve(video.id) == video


def test_the_openai_client_sends_several_pictures(
    server: Server, pictures: dict[str, Path], pipeline: Pipeline, tmp_path: Path
) -> None:
    listed = [
        {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"},
            "label": label,
        }
        for label, path in pictures.items()
    ]
    video = server.openai.videos.create_and_poll(prompt=PROMPT, extra_body={"input_references": listed})
    right = expected(pipeline, tmp_path, pictures)
    assert server.openai.videos.download_content(video.id).read() == right
    parts = [("prompt", (None, PROMPT))]
    for label, path in pictures.items():
        parts += [("input_reference", (path.name, path.read_bytes())), ("label", (None, label))]  # type: ignore[list-item]
    answer = server.http.post("/v1/videos", files=parts)
    assert answer.json()["labels"] == list(pictures)
    assert server.content(server.wait(answer.json()["id"])["id"]) == right


def test_the_openai_client_lists_and_deletes(server: Server) -> None:
    made = [server.openai.videos.create(prompt=PROMPT).id for _ in range(5)]
    first = server.openai.videos.list(limit=2)
    assert [video.id for video in first.data] == made[:2:-1] and first.has_more
    seen = [video.id for video in server.openai.videos.list(limit=2)]  # which asks for page after page
    assert seen[:5] == made[::-1]
    ascending = [video.id for video in server.openai.videos.list(limit=3, order="asc", after=made[0])]
    assert ascending == made[1:]
    for id in made:
        assert server.openai.videos.delete(id).deleted
        with pytest.raises(openai.NotFoundError, match="there is no video"):
            server.openai.videos.retrieve(id)


def test_the_openai_client_shows_our_errors(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="size must be 8x8 for the model 'fake'") as error:
        server.openai.videos.create(prompt=PROMPT, size="1280x720")
    assert (error.value.param, error.value.type) == ("size", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match=r"seconds must be 1\.125"):
        server.openai.videos.create(prompt=PROMPT, seconds="8")
    with pytest.raises(openai.NotFoundError, match="there is no model 'sora-2'; there are fake"):
        server.openai.videos.create(prompt=PROMPT, model="sora-2")
    with pytest.raises(openai.BadRequestError, match="steps must be 1 to 1000, not 0"):
        server.openai.videos.create(prompt=PROMPT, extra_body={"steps": 0})


def test_callbacks_are_what_the_openai_client_takes_for_webhooks(server: Server, tmp_path: Path) -> None:
    taken: list[tuple[dict[str, str], bytes]] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            taken.append((dict(self.headers), body))
            self.send_response(503 if len(taken) == 1 else 302)  # tried again; a redirect is not followed
            self.send_header("location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{receiver.server_address[1]}/hook"
        id = server.ask(callback_url=url)["id"]
        waited(lambda: len(taken) == 2)
        receiver.shutdown()
    folder = Path(_option(server, "--data"))
    secret = (folder / "callback-secret").read_text().strip()
    assert (folder / "callback-secret").stat().st_mode & 0o777 == 0o600
    for headers, body in taken:
        event = server.openai.webhooks.unwrap(body, headers, secret=secret)
        assert (event.type, event.data.id) == ("video.completed", id)
        with pytest.raises(openai.InvalidWebhookSignatureError):
            server.openai.webhooks.unwrap(body + b" ", headers, secret=secret)
    server.http.delete(f"/v1/videos/{id}")  # so that it is not told again


def _option(server: Server, name: str) -> str:
    arguments = server.process.args
    assert isinstance(arguments, list)
    return str(arguments[arguments.index(name) + 1])


# curl, as the help has it.


def test_the_commands_of_the_help_work(server: Server, pictures: dict[str, Path]) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    found = re.search(r"^  (curl (?:.*\\\n)*.*)$", SERVE, re.M)
    assert found is not None
    command = found[1].replace("\\\n", " ").replace("localhost:8000", server.url.removeprefix("http://"))
    words = shlex.split(command.replace("ball.png", str(pictures["ball"])))
    made = subprocess.run([*words, "-sS"], capture_output=True, text=True, check=True)
    assert json.loads(made.stdout)["labels"] == ["ball"]


# Plain HTTP.


def test_a_file_comes_whole_in_parts_or_not_at_all(server: Server) -> None:
    id = server.wait(server.ask()["id"])["id"]
    url = f"/v1/videos/{id}/content"
    whole = server.http.get(url)
    assert whole.headers["content-type"] == "video/mp4" and whole.headers["accept-ranges"] == "bytes"
    part = server.http.get(url, headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole.content[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole.content)}"
    assert server.http.get(url, headers={"range": "bytes=-5"}).content == whole.content[-5:]
    assert server.http.get(url, headers={"range": "bytes=99999999-"}).status_code == 416
    tag = whole.headers["etag"]
    for same in (tag, f'"another", {tag}', f"W/{tag}", "*"):
        again = server.http.get(url, headers={"if-none-match": same})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert server.http.get(url, headers={"if-none-match": '"another"'}).status_code == 200
    assert server.http.get(url, headers={"range": "bytes=0-4", "if-range": tag}).status_code == 206
    assert server.http.get(url, headers={"range": "bytes=0-4", "if-range": '"another"'}).status_code == 200
    head = server.http.head(url)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(whole.content))


def test_several_videos_of_one_request(server: Server, pipeline: Pipeline, tmp_path: Path) -> None:
    video = server.wait(server.ask(n="2", seed="5")["id"])
    assert (video["n"], video["steps"]) == (2, 2 * pipeline.manifest.defaults.steps)
    for index, seed in enumerate((5, 6)):
        answer = server.http.get(f"/v1/videos/{video['id']}/content", params={"index": index})
        assert answer.content == expected(pipeline, tmp_path, {}, seed=seed)
    assert server.http.get(f"/v1/videos/{video['id']}/content?index=2").status_code == 400


def test_an_idempotency_key_is_one_job(server: Server) -> None:
    def post(prompt: str = PROMPT, key: str = "one") -> httpx.Response:
        return server.http.post("/v1/videos", json={"prompt": prompt}, headers={"idempotency-key": key})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1
    reused = post("a cat runs left")
    assert (reused.status_code, reused.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert post(key="").status_code == post(key="x" * 256).status_code == 400
    id = answers[0].json()["id"]
    server.http.delete(f"/v1/videos/{id}")
    assert post().json()["id"] != id


def test_a_synchronous_request_is_answered_with_the_file(
    server: Server, pipeline: Pipeline, tmp_path: Path
) -> None:
    answer = server.http.post("/v1/videos/sync", json={"prompt": PROMPT, "seed": 3})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    assert answer.content == expected(pipeline, tmp_path, {}, seed=3)


def test_a_client_that_leaves_cancels_what_it_waited_for(server: Server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/videos/sync", json={"prompt": PROMPT, "steps": 1000, "n": 60}, timeout=0.5)
    left = server.http.get("/v1/videos?limit=1").json()["data"][0]
    assert left["steps"] == 60_000
    assert server.wait(left["id"])["status"] == "cancelled"


# What becomes of a job, as its client sees it.


def test_events_tell_each_step_to_the_end(server: Server) -> None:
    blocking = server.ask(**LONG)["id"]
    id = server.ask(steps="5")["id"]
    told: list[tuple[str, dict[str, Any]]] = []
    with server.http.stream("GET", f"/v1/videos/{id}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in stream.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                told.append((name, json.loads(line[6:])))
                if len(told) == 1:
                    server.http.post(f"/v1/videos/{blocking}/cancel")
    statuses = [video["status"] for name, video in told if name == "status"]
    assert statuses[0] == "queued" and statuses[-1] == "completed" and "in_progress" in statuses
    assert told[0][1]["queue_position"] in (0, 1)
    steps = [data["step"] for name, data in told if name == "step"]
    assert steps == sorted(set(steps)) and steps[-1] == 5


def test_a_preview_is_made_for_who_looks(server: Server) -> None:
    id = server.ask(**LONG)["id"]
    with server.http.stream("GET", f"/v1/videos/{id}/events") as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("data: "))
        url = next(data["url"] for data in map(lambda line: json.loads(line[6:]), lines) if "url" in data)
    preview = server.http.get(url)
    assert (preview.status_code, preview.headers["content-type"]) == (200, "image/webp")
    assert server.http.post(f"/v1/videos/{id}/cancel").json()["status"] == "cancelled"
    assert waited(lambda: server.http.get(url).status_code == 404)


def test_cancel_and_delete_stop_within_a_step(server: Server) -> None:
    pace = {}
    for stop in ("cancel", "delete"):
        id = server.ask(**LONG)["id"]
        waiting = server.ask(steps="1")["id"]
        begun = server.wait(id, lambda video: video["progress"] >= 1)
        assert begun["status"] == "in_progress" and 0 < begun["progress"] < 100
        assert server.get(waiting)["status"] == "queued"  # as long as nothing is computed of it
        stopped = time.time()
        if stop == "cancel":
            assert server.http.post(f"/v1/videos/{id}/cancel").json()["status"] == "cancelled"
            video = server.get(id)
            assert (video["status"], server.http.get(f"/v1/videos/{id}/content").status_code) == (
                "cancelled",
                409,
            )
            assert server.http.post(f"/v1/videos/{id}/cancel").json() == video  # once more does no harm
        else:
            assert server.http.delete(f"/v1/videos/{id}").json() == {
                "id": id, "object": "video.deleted", "deleted": True,
            }  # fmt: skip
            assert server.http.get(f"/v1/videos/{id}").status_code == 404
        # The next job begins when the worker has let go: long before what was stopped would have been done.
        server.wait(waiting, lambda video: video["status"] in ("in_progress", "completed"))
        pace[stop] = time.time() - stopped
        remaining = (begun["steps"] - begun["step"]) * (stopped - begun["started_at"]) / begun["step"]
        assert pace[stop] < max(1.0, remaining / 4)


def test_the_queue_is_told_in_order(server: Server) -> None:
    blocking = server.ask(**LONG)
    waiting = [server.ask() for _ in range(3)]
    server.wait(blocking["id"], lambda video: video["status"] == "in_progress")
    assert [server.get(video["id"])["queue_position"] for video in waiting] == [0, 1, 2]
    answer = server.http.get(f"/v1/videos/{waiting[0]['id']}")
    assert answer.headers["openai-poll-after-ms"] == "500"
    server.http.delete(f"/v1/videos/{waiting[0]['id']}")
    assert [server.get(video["id"])["queue_position"] for video in waiting[1:]] == [0, 1]
    server.http.post(f"/v1/videos/{blocking['id']}/cancel")
    ends = [server.wait(video["id"])["completed_at"] for video in waiting[1:]]
    assert ends == sorted(ends)


def test_a_reference_of_the_same_bytes_is_stored_once(server: Server, pictures: dict[str, Path]) -> None:
    folder = Path(_option(server, "--data")) / "pictures"
    made = [server.ask(pictures["ball"])["id"] for _ in range(2)]
    digests = {path.name for path in folder.iterdir()}
    server.http.delete(f"/v1/videos/{made[0]}")
    assert {path.name for path in folder.iterdir()} == digests and digests
    assert server.wait(made[1])["status"] == "completed"
    assert server.http.get(f"/v1/videos/{made[1]}/references/0").content == pictures["ball"].read_bytes()


def test_metrics_and_health(server: Server) -> None:
    server.wait(server.ask()["id"])
    text = server.http.get("/metrics").text
    assert re.search(r'^conceptmaster_jobs_total\{status="completed"\} [1-9]', text, re.M)
    assert "conceptmaster_workers_ready 1.0" in text
    assert server.http.get("/health/live").json() == {"status": "ok"}
    assert server.http.get("/health/ready").json() == {"status": "ready", "workers": 1}
    models = server.openai.models.list()
    assert [model.id for model in models] == ["fake"]
    assert server.openai.models.retrieve("fake").id == "fake"
