"""What a pipeline keeps of pictures that it has encoded."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conceptmaster import Concept, Pipeline
from conceptmaster.runtime.recent import Recent


def made(value: int, size: int = 10) -> Callable[[], np.ndarray]:
    return lambda: np.full(size, value, np.uint8)


def test_the_same_is_made_once_and_anything_else_anew() -> None:
    recent, one = Recent(1000), np.arange(6, dtype=np.uint8)
    assert recent.get(["a", one], made(1))[0] == recent.get(["a", one.copy()], made(2))[0] == 1
    other = [
        ("a", one),
        ["b", one],
        ["a", one.reshape(2, 3)],
        ["a", one.astype(np.int8)],
        ["a", one[::-1]],
        ["a"],
    ]
    for number, value in enumerate([*other, {"a": one}, [["a", one]], ["a", one, one]], 2):
        assert recent.get(value, made(number))[0] == number
    recent.clear()
    assert recent.get(["a", one], made(99))[0] == 99


def test_it_holds_so_many_bytes_and_no_more() -> None:
    recent = Recent(25)
    for name in "aab":
        recent.get(name, made(1))
    recent.get("a", made(2))
    recent.get("c", made(1))  # b is the one that was not asked for longest
    assert [int(recent.get(name, made(2))[0]) for name in "acb"] == [1, 1, 2]
    recent.get("large", made(1, 26))
    assert recent.get("large", made(2, 26))[0] == 2


def test_frames_from_kept_encodings_are_the_same(
    bundle: Path, pictures: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pipeline.from_bundle(bundle, threads=1) as pipe:
        ran: list[str] = []
        run = pipe.backend.run
        monkeypatch.setattr(
            pipe.backend, "run", lambda graph, inputs: ran.append(graph) or run(graph, inputs)
        )

        def frames(*labels: str, seed: int = 1) -> Any:
            concepts = [Concept(label, pictures[label]) for label in labels]
            return pipe("a ball runs and a cat rolls", concepts, seed=seed).frames

        first = frames("ball", "cat")
        ran.clear()
        with ThreadPoolExecutor(4) as pool:
            again = list(pool.map(lambda _: frames("ball", "cat"), range(4)))
        assert all(np.array_equal(first, other) for other in again)
        assert not {"image_encoder", "qformer", "dam"} & set(ran) and "denoise" in ran
        assert not np.array_equal(frames("cat"), first)
        assert "image_encoder" in ran
        with Pipeline.from_bundle(bundle, threads=1) as fresh:
            concepts = [Concept(label, pictures[label]) for label in ("cat",)]
            other = fresh("a ball runs and a cat rolls", concepts, seed=1).frames
        assert np.array_equal(frames("cat"), other)
