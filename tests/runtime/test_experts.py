"""Two experts: which of them makes a step, with which guidance, and that one at a time is enough."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conceptmaster.errors import InputError
from conceptmaster.runtime import experts
from conceptmaster.runtime.backends import onnxruntime_backend
from conceptmaster.runtime.bundle_format import manifest as manifests
from conceptmaster.runtime.pipeline import Pipeline
from conceptmaster.runtime.request import Request
from conceptmaster.runtime.solver import make_schedule

SECOND = {"condition_2", "denoise_2"}


@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.57, 0.001, 0.999])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
def test_the_boundary_is_diffusers_s(make_experts: Any, boundary: float, shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    upstream = {
        "unipc": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        ),
        "euler": diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
    }
    manifest = manifests.load(make_experts(boundary))
    for solver, scheduler in upstream.items():
        for steps in (1, 4, 7, 40):
            scheduler.set_timesteps(steps)
            high = [bool(t >= boundary * 1000) for t in scheduler.timesteps]  # as WanPipeline compares
            found = experts.step_graphs(manifest, make_schedule(solver, steps, shift).timesteps)
            assert found == ["denoise" if first else "denoise_2" for first in high]


def test_one_transformer_makes_every_step(bundle: Path) -> None:
    times = make_schedule("unipc", 5, 3.0).timesteps
    assert experts.step_graphs(manifests.load(bundle), times) == ["denoise"] * 5


def test_two_experts_that_are_the_same_give_the_video_of_one(bundle: Path, make_experts: Any) -> None:
    with Pipeline.from_bundle(bundle, threads=1) as one, Pipeline.from_bundle(make_experts()) as two:
        expected = one("a red ball", steps=6, samples=2)
        found = two("a red ball", steps=6, samples=2)
    for a, b in zip(found, expected, strict=True):
        assert (a.frames == b.frames).all()
        assert a.frames.std() > 0


@pytest.mark.parametrize(
    ("asked", "scales"),
    [
        ({}, (2.5, 1.5)),
        ({"guidance": 4.0}, (4.0, 4.0)),
        ({"guidance_2": 3.0}, (2.5, 3.0)),
        ({"guidance": 4.0, "guidance_2": 3.0}, (4.0, 3.0)),
    ],
)
def test_each_expert_has_its_guidance(make_experts: Any, asked: dict, scales: tuple) -> None:
    manifest = manifests.load(make_experts(guidance_2=1.5))
    request, guidance = Request("a ball", **asked).resolve(manifest)
    assert (request.guidance, request.guidance_2) == scales
    assert guidance.weights_2 is not None
    assert (guidance.weights[1], guidance.weights_2[1]) == scales


def test_a_second_guidance_shows(make_experts: Any) -> None:
    with Pipeline.from_bundle(make_experts(), threads=1) as pipeline:
        videos = [pipeline("a ball", steps=6, guidance=2.0, guidance_2=g).frames for g in (None, 2.0, 9.0)]
    assert (videos[0] == videos[1]).all() and (videos[0] != videos[2]).any()


def test_one_transformer_has_no_second_guidance(bundle: Path) -> None:
    with pytest.raises(InputError, match="guidance_2 is of a second expert.*one transformer: leave it out"):
        Request("a ball", guidance_2=2.0).resolve(manifests.load(bundle))
    for wrong in (-1.0, float("nan"), "2", True):
        with pytest.raises(InputError, match="guidance_2 must be"):
            Request("a ball", guidance_2=wrong)  # type: ignore[arg-type]


def test_the_experts_bundle_is_described(make_experts: Any, capsys: Any) -> None:
    from conceptmaster.runtime.cli import main

    assert main(["inspect", str(make_experts(guidance_2=1.5))]) == 0
    out = capsys.readouterr().out
    assert "experts   transformer from noise 1 to 0.9, guidance 2.5; transformer_2 below, guidance 1.5" in out
    assert "\ncondition_2 " in out and "\ndenoise_2 " in out


def test_the_command_line_passes_the_second_guidance_on() -> None:
    from conceptmaster.runtime import generate_command

    parser = argparse.ArgumentParser()
    generate_command.add_arguments(parser)
    given = generate_command.overrides(parser.parse_args(["--guidance", "4", "--guidance-2", "3"]))
    assert given == {"guidance": 4.0, "guidance_2": 3.0}


# Memory.


@pytest.fixture
def opened(make_experts: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`opened(free)`: a pipeline where so many bytes are free, and the list of graphs whose sessions it
    makes."""

    def build(free: int | None) -> tuple[Pipeline, list[str]]:
        monkeypatch.setattr(onnxruntime_backend, "free_memory", lambda: free)
        pipeline = Pipeline.from_bundle(make_experts(), threads=1)
        made: list[str] = []
        backend: Any = pipeline.backend
        real = backend._open
        monkeypatch.setattr(backend, "_open", lambda graph: made.append(graph) or real(graph))
        return pipeline, made

    return build


def held(pipeline: Pipeline) -> set[str]:
    backend: Any = pipeline.backend
    return set(backend._sessions)


@pytest.mark.parametrize("free", [1, None])
def test_where_memory_is_short_one_expert_is_held_at_a_time(opened: Any, free: int | None) -> None:
    pipeline, made = opened(free)
    seen: list[set[str]] = []
    for _ in range(2):
        pipeline("a ball", steps=6, callback=lambda *_: seen.append(held(pipeline) & (SECOND | {"denoise"})))
    assert {"denoise"} in seen and SECOND in seen and len(set(map(frozenset, seen))) == 2
    assert made.count("denoise") == made.count("denoise_2") == 2


def test_where_memory_is_there_both_stay(opened: Any) -> None:
    pipeline, made = opened(1 << 40)
    for _ in range(2):
        pipeline("a ball", steps=6)
    assert held(pipeline) >= SECOND | {"condition", "denoise"}
    assert made.count("denoise") == made.count("denoise_2") == 1


def test_loading_all_loads_what_memory_holds(opened: Any) -> None:
    pipeline, made = opened(1)
    pipeline.load()
    assert not SECOND & held(pipeline) and not SECOND & set(made)
    assert held(pipeline) >= {"condition", "denoise", "decode", "text_encoder"}


def test_an_expert_whose_turn_never_comes_is_not_loaded(make_experts: Any) -> None:
    with Pipeline.from_bundle(make_experts(0.001), threads=1) as pipeline:
        pipeline("a ball", steps=4)
        assert not SECOND & held(pipeline)
    low = np.float32(1.0)
    assert experts.step_graphs(manifests.load(pipeline.bundle.folder), np.array([low])) == ["denoise"]


def test_the_state_alone_goes_over(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host: what a session gave would keep its memory, and a step cache tells the other nothing."""
    pipeline, _ = opened(1)
    real, kinds = pipeline.backend.run, list[tuple[str, bool]]()

    def run(graph: str, inputs: dict[str, Any]) -> dict[str, Any]:
        if graph.startswith("denoise"):
            kinds.append((graph, isinstance(inputs["state"], np.ndarray)))
        return real(graph, inputs)

    monkeypatch.setattr(pipeline.backend, "run", run)
    pipeline("a ball", steps=6)
    first = [graph for graph, _ in kinds].index("denoise_2")
    assert [on_host for _, on_host in kinds] == [i in (0, first) for i in range(6)]


def test_keys_of_one_expert_at_a_time_are_held(make_experts: Any) -> None:
    """While the second's are computed nothing holds the first's."""
    import gc
    import weakref

    class Keys:
        pass

    class Backend:
        kept: list[Any] = []

        def run(self, graph: str, inputs: dict[str, Any]) -> dict[str, Any]:
            gc.collect()
            assert all(reference() is None for reference in self.kept)
            keys = Keys()
            self.kept.append(weakref.ref(keys))
            return {"text_keys": keys}

    _, guidance = Request("a ball").resolve(manifests.load(make_experts()))
    conditions = experts.Conditions(Backend(), {"text": 1}, guidance)  # type: ignore[arg-type]
    first = conditions.of("denoise")["text_keys"]
    assert conditions.of("denoise")["text_keys"] is first  # computed once
    del first
    assert set(conditions.of("denoise_2")) == {"text", "text_keys", "guidance"}
    conditions.of("denoise")
