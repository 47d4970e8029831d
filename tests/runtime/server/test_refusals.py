"""What clients must not be able to do: hostile bodies, names, pictures, sites. Every answer is one of those
that /openapi.json describes, and no traceback is ever shown or logged."""

from __future__ import annotations

import io
import json
import re
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conceptmaster.runtime.server.asked import KNOWN

from .conftest import PROMPT, Server

SETTINGS = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def _no_traceback(server: Server) -> Any:
    before = len(server.log.read_text())
    yield
    assert "Traceback" not in server.log.read_text()[before:]


@pytest.fixture(scope="module")
def described(server: Server) -> dict[str, Any]:
    return server.http.get("/openapi.json").json()


def sound(answer: httpx.Response, described: dict[str, Any], path: str, method: str = "post") -> None:
    """An answer that is described, and an error that is one of OpenAI's shape."""
    statuses = described["paths"][path][method]["responses"]
    assert str(answer.status_code) in statuses and answer.status_code < 500, answer.text
    assert "Traceback" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]


def test_every_field_is_described(described: dict[str, Any]) -> None:
    content = described["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    form, value = (
        content[kind]["schema"]["properties"] for kind in ("multipart/form-data", "application/json")
    )
    assert set(form) | set(value) == set(KNOWN) and set(value) - set(form) == {"input_references"}


# Bodies.

FIELDS = st.sampled_from(
    ["prompt", "model", "size", "seconds", "n", "seed", "steps", "guidance", "concept_guidance", "guidance_2",
     "negative_prompt", "solver", "shift", "boxes", "input_reference", "input_references", "label",
     "callback_url", "user", "metadata"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
    | st.sampled_from(["data:image/png;base64,AAAA", "http://127.0.0.1/", "fake", "8x8", "a", 10**400, -0.0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@SETTINGS
@given(
    st.dictionaries(FIELDS | st.text(max_size=9), VALUES, max_size=6),
    st.sampled_from([{}, {"prompt": PROMPT}]),
)
def test_any_json_is_answered(server: Server, described: dict, values: dict, more: dict) -> None:
    body = json.dumps({**values, **more, "n": 1, "steps": 1} if more else values)
    answer = server.http.post("/v1/videos", content=body, headers={"content-type": "application/json"})
    sound(answer, described, "/v1/videos")


@SETTINGS
@given(
    st.lists(
        st.tuples(FIELDS | st.text(max_size=9), st.text(max_size=30) | st.binary(max_size=30)), max_size=6
    )
)
def test_any_form_is_answered(server: Server, described: dict, parts: list) -> None:
    files = [(name, (None if isinstance(value, str) else "x.png", value)) for name, value in parts]
    answer = server.http.post("/v1/videos", files=files or [("prompt", (None, ""))])
    sound(answer, described, "/v1/videos")


@SETTINGS
@given(
    st.binary(max_size=200), st.sampled_from(["multipart/form-data; boundary=x", "application/json", "a/b"])
)
def test_any_bytes_are_answered(server: Server, described: dict, body: bytes, kind: str) -> None:
    for content in (body, b"--x\r\n" + body + b"\r\n--x--\r\n", b"--x\r\ncontent-disposition: " + body):
        answer = server.http.post("/v1/videos", content=content, headers={"content-type": kind})
        sound(answer, described, "/v1/videos")


@SETTINGS
@given(st.text(min_size=1, max_size=40), st.sampled_from(["", "/content", "/events", "/preview", "/cancel"]))
def test_any_name_is_answered(server: Server, id: str, what: str) -> None:
    place = f"/v1/videos/{quote(id, safe='')}{what}"
    answer = server.http.request("POST" if what == "/cancel" else "GET", place)
    assert answer.status_code in (400, 404, 405, 307), answer.text
    assert "Traceback" not in answer.text


BODIES = {
    "deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "many values": b'{"prompt": "a", "x": [' + b"[]," * 1_000_000 + b"[]]}",
    "a huge number": b'{"prompt": "a ball", "seed": ' + b"9" * 100_000 + b"}",
    "a huge exponent": b'{"prompt": "a ball", "guidance": 1e999999}',
    "not a number": b'{"prompt": "a ball", "guidance": NaN}',
    "half a surrogate": b'{"prompt": "\\ud800"}',
    "twice": b'{"prompt": "a ball", "prompt": "b"}',
    "no UTF-8": b'{"prompt": "\xff"}',
    "no object": b'"prompt"',
    "nothing": b"",
}


@pytest.mark.parametrize("name", list(BODIES))
def test_hostile_json_is_refused(server: Server, described: dict, name: str) -> None:
    answer = server.http.post(
        "/v1/videos", content=BODIES[name], headers={"content-type": "application/json"}
    )
    sound(answer, described, "/v1/videos")
    assert answer.status_code == 400 and len(answer.text) < 5000


def test_null_bytes_and_control_characters_are_text(server: Server, described: dict) -> None:
    answer = server.http.post("/v1/videos", json={"prompt": "a ball\0\x1b[31m rolls left"})
    sound(answer, described, "/v1/videos")
    answer = server.http.post("/v1/videos", json={"prompt": PROMPT, "size": "\x1b[31m\0"})
    assert answer.status_code == 400 and "\x1b" not in answer.json()["error"]["message"]


def test_hostile_forms_are_refused(server: Server, described: dict) -> None:
    many = [("x", (None, "1"))] * 10_000
    assert server.http.post("/v1/videos", files=many).status_code == 400
    pictures = [("input_reference", ("x.png", b"x"))] * 17
    answer = server.http.post("/v1/videos", files=[("prompt", (None, PROMPT)), *pictures])
    assert answer.status_code == 400
    path = [("prompt", (None, PROMPT)), ("label", (None, "ball")), ("input_reference", ("../../etc/x", b"x"))]
    answer = server.http.post("/v1/videos", files=path)
    assert answer.status_code == 400 and "etc" not in answer.text
    assert server.http.post("/v1/videos", files=[("prompt", ("f.txt", b"a ball"))]).status_code == 400
    assert server.http.post("/v1/videos", data={"prompt": PROMPT}).status_code == 415
    for kind in ("multipart/form-data", "multipart/form-data; boundary=" + "x" * 1000, "text/plain", ""):
        answer = server.http.post("/v1/videos", content=b"--x", headers={"content-type": kind})
        sound(answer, described, "/v1/videos")
        assert answer.status_code in (400, 415)
    answer = server.http.post("/v1/videos", json={"prompt": "x" * 10_001})
    assert answer.status_code == 400 and "10000 are the most" in answer.json()["error"]["message"]


def test_bodies_have_a_largest_size(server: Server) -> None:
    def endless(size: int) -> Any:
        for _ in range(size // 2**20):
            yield b"x" * 2**20

    kind = {"content-type": "application/json"}
    for declared in (True, False):  # by its length, or in chunks
        more = {"content-length": str(97 * 2**20)} if declared else {}
        try:
            answer = server.http.post("/v1/videos", content=endless(97 * 2**20), headers={**kind, **more})
        except httpx.HTTPError:
            continue  # it did not read all of it
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "too_large"
    for _ in range(10):  # it is seen, though much was still to be sent
        assert server.http.post("/session", content=b"x" * 2**21).status_code == 413
    large = {
        "prompt": (None, PROMPT),
        "label": (None, "ball"),
        "input_reference": ("x.png", bytes(33 * 2**20)),
    }
    assert server.http.post("/v1/videos", files=large).status_code == 413


@pytest.mark.parametrize(
    ("field", "value"),
    [("prompt", " "), ("prompt", "ball " * 999), ("negative_prompt", "ball " * 999), ("n", 65), ("seed", -1),
     ("steps", 0), ("guidance", -1), ("guidance_2", 1), ("guidance_2", -1), ("concept_guidance", -1),
     ("shift", 0), ("solver", "x"), ("boxes", {"ball": [0, 0, 2, 1]})],
)  # fmt: skip
def test_the_field_that_is_wrong_is_named(server: Server, field: str, value: Any) -> None:
    answer = server.http.post("/v1/videos", json={"prompt": PROMPT, field: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), answer.text


@pytest.mark.parametrize("labels", [("ball", "Ball"), ("ball", " "), ("ball", "ball " * 999)])
def test_labels_that_are_wrong_are_their_pictures_fault(
    server: Server, pictures: dict[str, Path], labels: tuple[str, ...]
) -> None:
    picture = ("x.png", pictures["ball"].read_bytes())
    parts = [("prompt", (None, PROMPT)), *(("label", (None, label)) for label in labels)]
    answer = server.http.post("/v1/videos", files=[*parts, *[("input_reference", picture)] * len(labels)])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_reference"), answer.text


# Pictures.


def _bomb(width: int, height: int) -> bytes:
    """A PNG of so many black pixels: a few kilobytes."""
    deflate = zlib.compressobj(9)
    rows = (
        b"".join(deflate.compress(bytes(1 + 3 * width)) for _ in range(min(height, 4000))) + deflate.flush()
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["bomb", "long", "text", "svg", "cut"])
def test_pictures_that_are_none_are_refused(server: Server, pictures: dict[str, Path], name: str) -> None:
    data = {
        "bomb": lambda: _bomb(30_000, 30_000),
        "long": lambda: _bomb(2_000_000, 1),
        "text": lambda: b"no picture at all",
        "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "cut": lambda: pictures["ball"].read_bytes()[:60],
    }[name]()
    parts = {"prompt": (None, PROMPT), "label": (None, "ball"), "input_reference": ("x.png", data)}
    answer = server.http.post("/v1/videos", files=parts)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert "the picture of 'ball'" in error["message"] and error["param"] == "input_reference"


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:1/x.png", "file:///etc/passwd", "ftp://x/y", "//x/y", "data:text/html,x", "/etc/x"],
)
def test_no_address_is_fetched(server: Server, url: str) -> None:
    listed = [{"type": "image_url", "image_url": {"url": url}, "label": "ball"}]
    for answer in (
        server.http.post("/v1/videos", json={"prompt": PROMPT, "input_references": listed}),
        server.http.post("/v1/videos", json={"prompt": PROMPT, "input_reference": url}),
        server.http.post("/v1/videos", files={"prompt": (None, PROMPT), "input_reference": (None, url)}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "remote_url_refused")


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/x", "http://127.0.0.1.evil.example/", "http://127.0.0.1@evil.example/",
     "http://user:x@127.0.0.1/", "file:///etc/passwd", "gopher://127.0.0.1/", "http://[::1]/",
     "http://127.1/", "x"],
)  # fmt: skip
def test_callbacks_go_to_no_other_host(server: Server, url: str) -> None:
    answer = server.http.post("/v1/videos", json={"prompt": PROMPT, "callback_url": url})
    assert answer.status_code in (400, 403) and answer.json()["error"]["param"] == "callback_url"


# Paths, sites, headers.


def test_no_path_reaches_the_disk(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    tricks = (
        "/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc%2fpasswd", "//etc/passwd",
        "/v1/videos/..%2F..%2Fjobs.sqlite/content", "/v1/videos/%00/content", "/v1/videos/a%0d%0ab: c",
        "/..\\..\\x", "/%c0%ae%c0%ae/x", "/page/../../command.py", "/app.py",
    )  # fmt: skip
    for path in tricks:
        with socket.create_connection((host, int(port))) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda client=client: client.recv(65536), b""))  # type: ignore[misc]
        assert re.match(rb"HTTP/1\.1 (307|400|404|405) ", answer), (path, answer[:200])
        assert b"root:" not in answer and b"Traceback" not in answer


def test_other_names_and_other_sites_are_refused(server: Server) -> None:
    port = server.url.rpartition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", ""):
        answer = server.http.get("/v1/videos", headers={"host": host})
        assert answer.status_code in (400, 421)
    for host in ("localhost", f"LOCALHOST:{port}", "127.0.0.1", f"[::1]:{port}"):
        assert server.http.get("/health/live", headers={"host": host}).status_code == 200
    for headers in (
        {"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "origin": f"http://localhost:{port}"},
    ):  # fmt: skip
        for answer in (
            server.http.post("/v1/videos", json={"prompt": PROMPT}, headers=headers),
            server.http.delete("/v1/videos/x", headers=headers),
            server.http.post("/session", json={"key": "x"}, headers=headers),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "other_site")
    same = {"origin": server.url, "sec-fetch-site": "same-origin"}
    assert server.http.post("/v1/videos", json={"prompt": PROMPT}, headers=same).status_code == 200
    assert (
        "access-control-allow-origin" not in server.http.get("/", headers={"origin": "https://x.y"}).headers
    )
    assert server.http.options("/v1/videos", headers={"origin": "https://x.y"}).status_code == 405


def test_every_answer_has_the_headers_of_safety(server: Server) -> None:
    id = server.wait(server.ask()["id"])["id"]
    answers = [
        server.http.get(path)
        for path in (
            "/",
            "/nowhere",
            "/openapi.json",
            "/metrics",
            f"/v1/videos/{id}/content",
            "/v1/videos?limit=0",
        )
    ]
    answers += [server.http.get("/", headers={"host": "evil.example"}), server.http.put("/v1/videos")]
    answers += [server.http.post("/v1/videos", content=b"{", headers={"content-type": "application/json"})]
    assert {answer.status_code for answer in answers} == {200, 400, 404, 405, 421}
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert (
            "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        )
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in answer.headers
    assert len(answers[-1].headers.get_list("content-security-policy")) == 1


def test_the_log_tells_neither_prompts_nor_pictures(server: Server, tmp_path: Path) -> None:
    from PIL import Image

    prompt, label = "a sekrit-prompt rolls left", "sekrit-label"
    file = io.BytesIO()
    Image.new("RGB", (5000, 4000)).save(file, "PNG")  # so large that it is worth a warning
    parts = {
        "prompt": (None, prompt),
        "label": (None, label),
        "input_reference": ("sekrit.png", file.getvalue()),
    }
    answer = server.http.post("/v1/videos", files=parts)
    server.wait(answer.json()["id"])
    server.http.post("/v1/videos", json={"prompt": prompt, "steps": 0})
    assert "sekrit" not in server.log.read_text()


def test_the_process_that_speaks_http_loads_no_model(environment: dict[str, str]) -> None:
    program = "import sys, conceptmaster.runtime.server.server; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert not {"onnxruntime", "torch", "tensorrt", "av"} & set(done.stdout.split())
