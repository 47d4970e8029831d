"""What the page asks for, without a browser: its files, one stream of all videos, pictures, sessions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conceptmaster.runtime.server.app import PAGE
from conceptmaster.runtime.server.keys import new_key

EXAMPLES = Path(__file__).parents[3] / "examples"
PICTURE = EXAMPLES / "sprites" / "requests" / "first" / "1.png"


def test_files_are_asked_about_each_time_and_sent_once(server: Any) -> None:
    for path in PAGE.iterdir():
        answer = server.http.get(f"/{path.name}")
        assert answer.content == path.read_bytes()
        assert answer.headers["cache-control"] == "no-cache"
        again = server.http.get(f"/{path.name}", headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert server.http.get("/").content == (PAGE / "index.html").read_bytes()
    assert server.http.get("/app.js").headers["content-type"].startswith("text/javascript")
    assert server.http.get("/nothing.js").json()["error"]["code"] == "not_found"
    assert server.http.get("/../app.py").status_code == 404


def test_nothing_is_loaded_from_elsewhere() -> None:
    """Nor written where the policy forbids it: scripts and styles are files."""
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon[a-z]+=|javascript:", html)
    named = re.findall(r'(?:src|href)="([^"#]+)"', html)
    for path in PAGE.glob("*.js"):
        named += re.findall(r'(?:from|path:) "([^"]+)"', path.read_text())
    assert len(named) > 20
    assert [name for name in named if not (PAGE / name).is_file()] == []
    texts = [path.read_text() for path in PAGE.iterdir() if path.suffix in (".html", ".css", ".js", ".svg")]
    assert {url for text in texts for url in re.findall(r"https?://[^\s\"']+", text)} <= {
        "http://www.w3.org/2000/svg"
    }


@pytest.mark.parametrize("world", ["sprites", "stickers"])
def test_the_examples_are_those_of_the_worlds(world: str) -> None:
    script = (PAGE / "examples.js").read_text()
    for folder in (EXAMPLES / world / "requests").iterdir():
        request = json.loads((folder / "request.json").read_text())
        written = re.sub(r'" \+\s*"', "", script)
        assert f'"{request["prompt"]}"' in written
        for concept in request["concepts"]:
            picture = (folder / concept["image"]).read_bytes()
            (copy,) = (path for path in PAGE.glob("example-*.png") if path.read_bytes() == picture)
            assert f'{{ label: "{concept["label"]}", path: "{copy.name}" }}' in script


def events(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """Names and data of a stream."""
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_one_stream_tells_of_all_videos(server: Any) -> None:
    long = server.ask(steps="1000", n="60")
    with server.http.stream("GET", "/v1/events") as stream:
        told = events(stream.iter_lines())
        assert next(told)[1]["id"] == long["id"]  # what was there before
        assert any(name == "step" and data["id"] == long["id"] for name, data in told)  # waits for one
        waits = server.ask(steps="2")
        gone = server.ask(steps="2")
        server.http.delete(f"/v1/videos/{gone['id']}")
        server.http.post(f"/v1/videos/{long['id']}/cancel")
        seen: list[tuple[str, Any]] = []
        while not any(name == "status" and data["status"] == "completed" for name, data in seen):
            seen.append(next(told))
    names = [(name, data.get("id")) for name, data in seen]
    assert ("deleted", gone["id"]) in names
    assert ("queue", {waits["id"]: 0}) in seen
    assert seen[-1][1]["id"] == waits["id"]
    steps = [data for name, data in seen if name == "step" and data["id"] == waits["id"]]
    assert steps[-1] == {"id": waits["id"], "step": 2, "steps": 2, "progress": 99}


def test_pictures_are_given_back_to_whom_they_are(start_server: Callable[..., Any], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    first, second = new_key("first", keys), new_key("second", keys)
    server = start_server("--api-key-file", str(keys), api_key=first)
    server.http.headers["authorization"] = f"Bearer {first}"
    id = server.ask(PICTURE)["id"]
    place = f"/v1/videos/{id}/references"
    answer = server.http.get(f"{place}/0")
    assert (answer.content, answer.headers["content-type"]) == (PICTURE.read_bytes(), "image/png")
    assert server.http.get(f"{place}/0", headers={"if-none-match": answer.headers["etag"]}).status_code == 304
    assert server.http.get(f"{place}/1").status_code == 404
    assert server.http.get(f"{place}/-1").status_code == 404
    other = {"authorization": f"Bearer {second}"}
    assert server.http.get(f"{place}/0", headers=other).status_code == 404
    with server.http.stream("GET", "/v1/events", headers=other) as stream:
        told = events(stream.iter_lines())
        mine = server.http.post("/v1/videos", json={"prompt": "a ball"}, headers=other).json()["id"]
        assert next(told)[1]["id"] == mine  # and nothing of the first key's

    del server.http.headers["authorization"]
    assert server.http.get("/session").json() == {"needed": True, "name": None}
    assert server.http.get("/app.js").status_code == 200  # it is what asks for the key
    assert server.http.post("/session", json={"key": first}).status_code == 204
    assert server.http.get("/session").json() == {"needed": True, "name": "first"}
    assert server.http.get(f"{place}/0").content == PICTURE.read_bytes()  # by the cookie
    assert server.http.delete("/session").status_code == 204
    assert server.http.get(f"{place}/0").status_code == 401


def test_what_was_asked_for_besides_is_told(server: Any) -> None:
    video = server.ask(steps="3", guidance="1.5", negative_prompt="a cat", seed="7")
    assert video["options"] == {"steps": 3, "guidance": 1.5, "negative_prompt": "a cat"}
    assert server.ask()["options"] == {}
