"""Boxes over HTTP: of a form or JSON they are the pipeline's, and outlive a server that is killed."""

from __future__ import annotations

import base64
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conceptmaster.runtime.pipeline import Pipeline
from conceptmaster.runtime.request import Concept, Request

from .conftest import PROMPT

BOXES: dict[str, Any] = {"ball": {"0": [0, 0.25, 0.5, 0.75], "8": [0.5, 0.25, 1, 0.75]}}


def test_boxes_come_with_a_form_or_json_and_outlive_the_server(
    placing: Callable[..., Path], pictures: dict[str, Path], start_server: Callable[..., Any], tmp_path: Path
) -> None:
    folder, data = placing(), tmp_path / "jobs"
    pipeline = Pipeline.from_bundle(folder, threads=1)
    concepts = (Concept("ball", pictures["ball"]),)
    right, plain = (
        pipeline.generate(Request(PROMPT, concepts, seed=3, **more))[0].save(tmp_path / name).read_bytes()  # type: ignore[union-attr]
        for name, more in (("boxed.mp4", {"boxes": BOXES}), ("plain.mp4", {}))
    )
    assert right != plain
    server = start_server("--bundle", str(folder), data=data)
    assert [model["takes_boxes"] for model in server.http.get("/v1/models").json()["data"]] == [False, True]
    by_form = server.ask(pictures["ball"], seed="3", model="placing", boxes=json.dumps(BOXES))
    url = f"data:image/png;base64,{base64.b64encode(pictures['ball'].read_bytes()).decode()}"
    body = {"prompt": PROMPT, "model": "placing", "seed": 3, "input_reference": url, "label": "ball"}
    by_json = server.http.post("/v1/videos", json=body | {"boxes": BOXES}).json()
    assert by_form["options"] == by_json["options"] == {"boxes": BOXES}
    without = server.http.post("/v1/videos", json=body | {"boxes": None}).json()
    assert without["options"] == {}
    for boxes, message in (
        ({"cat": [0, 0, 1, 1]}, "a box for 'cat', but no concept is labelled so: the labels are 'ball'"),
        (
            {"ball": {"9": [0, 0, 1, 1]}},
            "a box of 'ball' at frame 9: the videos of 'fake' have the frames 0 to 8",
        ),
        ("[0, 0, 1, 1]", 'boxes must be an object, {"cat": [0.1, 0.2, 0.5, 0.8]}, not [0, 0, 1, 1]'),
        (
            "{",
            'boxes must be an object, {"cat": [0.1, 0.2, 0.5, 0.8]}: the text is not JSON (Expecting '
            "property name enclosed in double quotes, line 1)",
        ),
    ):
        answer = server.http.post("/v1/videos", json=body | {"boxes": boxes})
        error = answer.json()["error"]
        assert (answer.status_code, error["message"], error["param"]) == (400, message, "boxes")
    refused = server.http.post("/v1/videos", json=body | {"model": "fake", "boxes": BOXES}).json()["error"]
    assert "'fake' cannot place concepts: leave the boxes out" in refused["message"]
    assert refused["param"] == "boxes"
    server.stop(signal.SIGKILL)
    server = start_server("--bundle", str(folder), data=data)
    for video in (by_form, by_json):
        made = server.wait(video["id"])
        assert made["status"] == "completed" and server.content(video["id"]) == right
        assert made["options"] == {"boxes": BOXES}
    assert server.content(server.wait(without["id"])["id"]) == plain
