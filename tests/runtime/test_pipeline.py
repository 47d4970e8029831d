"""The pipeline over a fake bundle, against the same arithmetic in plain NumPy."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conceptmaster.errors import Cancelled, GenerationError, InputError
from conceptmaster.runtime import noise
from conceptmaster.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from conceptmaster.runtime.pipeline import Pipeline
from conceptmaster.runtime.request import Concept, Request
from conceptmaster.runtime.video import Video

LATENT = (4, 3, 2, 2)
MEAN, STD = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.4])


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(bundle, threads=1)


def normalised(path: Path) -> np.ndarray:
    return ((np.asarray(Image.open(path)) / 255 - MEAN) / STD).transpose(2, 0, 1)


def concepts(pictures: dict[str, Path], *labels: str) -> list[Concept]:
    return [Concept(label, pictures[label]) for label in labels]


def close(frames: np.ndarray, expected: np.ndarray) -> bool:
    """Equal but for the rounding of a value that lies on the edge."""
    return frames.shape == expected.shape and np.abs(frames.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize("labels", [(), ("ball",), ("ball", "cat")])
def test_two_branches(pipe: Pipeline, reference, pictures, solver: str, labels: tuple[str, ...]) -> None:
    video = pipe(
        "a ball rolls left",
        concepts(pictures, *labels),
        seed=3,
        steps=5,
        guidance=2.0,
        negative="bad",
        solver=solver,
    )
    assert isinstance(video, Video)
    expected = reference.generate(
        "a ball rolls left",
        [(label, normalised(pictures[label])) for label in labels],
        noise.from_seed(3, LATENT),
        [(-1.0, "bad", False), (2.0, "a ball rolls left", True)],
        steps=5,
        solver=solver,
    )
    assert video.frames.dtype == np.uint8 and close(video.frames, expected)
    assert expected.std() > 5, "a grey video would prove nothing"
    assert (video.fps, video.seed) == (8.0, 3)
    assert set(video.seconds) == {"load", "encode", "condition", "denoise", "decode"}


def test_a_picture_may_be_bytes_or_an_open_file(pipe: Pipeline, pictures) -> None:
    frames = []
    with pictures["cat"].open("rb") as file:
        for picture in (pictures["cat"], pictures["cat"].read_bytes(), file, file):
            video = pipe("a ball rolls left", [Concept("cat", picture)], steps=1)
            assert isinstance(video, Video)
            frames.append(video.frames)
    assert all(np.array_equal(found, frames[0]) for found in frames)


def test_every_text_is_tokenised_once(bundle: Path, pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, seen = Pipeline.from_bundle(bundle, threads=1), list[str]()
    encode = pipe._tokenizer.encode

    def counted(text: str, *limits: object) -> tuple[int, ...]:
        seen.append(text)
        return encode(text, *limits)

    monkeypatch.setattr(pipe._tokenizer, "encode", counted)
    pipe("a ball rolls left", concepts(pictures, "ball", "cat"), negative="bad", samples=2, steps=1)
    assert sorted(seen) == ["", "a ball rolls left", "bad", "ball", "cat"]  # of "" nothing else is left


@pytest.mark.parametrize(
    ("branches", "guidance", "concept_guidance", "weights"),
    [
        (1, 1.0, None, [(1.0, "a cat runs", True)]),
        (3, 1.5, None, [(-0.5, "", False), (0.0, "a cat runs", False), (1.5, "a cat runs", True)]),
        (3, 1.5, 2.25, [(-0.5, "", False), (-0.75, "a cat runs", False), (2.25, "a cat runs", True)]),
    ],
)
def test_other_branches(
    make_bundle: Callable[..., Path],
    reference,
    pictures,
    branches: int,
    guidance: float,
    concept_guidance: float | None,
    weights: list,
) -> None:
    pipe = Pipeline.from_bundle(make_bundle(branches=branches), threads=1)
    video = pipe(
        "a cat runs", concepts(pictures, "cat"), guidance=guidance, concept_guidance=concept_guidance
    )
    expected = reference.generate(
        "a cat runs",
        [("cat", normalised(pictures["cat"]))],
        noise.from_seed(0, LATENT),
        weights,
        steps=4,
        solver="unipc",
    )
    assert isinstance(video, Video) and close(video.frames, expected)


def test_guidance_that_the_bundle_cannot_follow(pipe: Pipeline, make_bundle: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="3 guidance branches"):
        pipe("a ball", concept_guidance=2.0)
    with pytest.raises(InputError, match="guidance must be 1"):
        Pipeline.from_bundle(make_bundle(branches=1))("a ball", guidance=2.0)


def test_same_seed_same_video_and_samples_count_up(pipe: Pipeline, pictures) -> None:
    request = Request("a ball", tuple(concepts(pictures, "ball")), seed=5, samples=3)
    videos = pipe.generate(request)
    again = [pipe("a ball", concepts(pictures, "ball"), seed=seed) for seed in (5, 6, 7)]
    assert [video.seed for video in videos] == [5, 6, 7]
    for video, other in zip(videos, again, strict=True):
        assert isinstance(other, Video)
        np.testing.assert_array_equal(video.frames, other.frames)
    assert (videos[0].frames != videos[1].frames).any()
    listed = pipe("a ball", concepts(pictures, "ball"), seed=5, samples=2)
    assert isinstance(listed, list) and len(listed) == 2


def test_concepts_matter_and_their_order_does_not(pipe: Pipeline, pictures) -> None:
    def frames(*labels: str) -> np.ndarray:
        video = pipe("a ball and a cat", concepts(pictures, *labels))
        assert isinstance(video, Video)
        return video.frames

    assert (frames("ball") != frames()).any()
    assert (frames("ball") != frames("ball", "cat")).any()
    assert close(frames("ball", "cat"), frames("cat", "ball"))


def test_given_noise_replaces_the_seed(pipe: Pipeline) -> None:
    start = noise.from_seed(9, LATENT)
    expected = pipe("a ball", seed=9)
    assert isinstance(expected, Video)
    for given in (start, start.astype(np.float64), start[None]):
        video = pipe("a ball", noise=given)
        assert isinstance(video, Video)
        np.testing.assert_array_equal(video.frames, expected.frames)
    two = pipe("a ball", samples=2, noise=np.stack([noise.from_seed(1, LATENT), start]))
    assert isinstance(two, list)
    np.testing.assert_array_equal(two[1].frames, expected.frames)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (np.zeros(LATENT, np.int64), "float32"),
        (np.zeros(LATENT, np.complex64), "float32"),
        ([0.0], "float32"),
        (np.zeros((4, 3, 2, 3), np.float32), "shape"),
        (np.zeros((2, *LATENT), np.float32), "shape"),
        (np.full(LATENT, np.nan), "not a number"),
        (np.full(LATENT, 1e300), "infinite"),  # too large for float32
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_bad_noise(pipe: Pipeline, given: object, word: str) -> None:
    with pytest.raises(InputError, match=word):
        pipe("a ball", noise=given)  # type: ignore[arg-type]


def test_noise_is_philox() -> None:
    """Pinned: these numbers must never change, on any machine."""
    values = noise.from_seed(7, (4,))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, [-0.5023736, 0.50684536, 2.0193486, 0.85149574], rtol=1e-6)


def test_callback_sees_every_step_and_a_preview(pipe: Pipeline) -> None:
    seen, shots = [], []

    def callback(step: int, steps: int, preview: Callable[[], np.ndarray]) -> None:
        seen.append((step, steps))
        shots.append(preview())

    videos = pipe("a ball", steps=3, samples=2, callback=callback)
    assert isinstance(videos, list)
    assert seen == [(i, 6) for i in range(1, 7)]
    assert all(shot.shape == (8, 8, 3) and shot.dtype == np.uint8 for shot in shots)
    for video, last in zip(videos, (shots[2], shots[5]), strict=True):
        assert close(video.frames[0], last)  # the last estimate is the result


@pytest.mark.parametrize("how", ["returns False", "returns NumPy's False", "raises"])
def test_cancel(pipe: Pipeline, how: str) -> None:
    steps = []

    def callback(step: int, total: int, preview: object) -> bool | np.bool_:
        steps.append(step)
        if step == 2 and how == "raises":
            raise Cancelled("enough")
        return np.bool_(step < 2) if "NumPy" in how else step < 2

    with pytest.raises(Cancelled):
        pipe("a ball", steps=10, callback=callback)
    assert steps == [1, 2]


def test_all_input_is_checked_before_anything_runs(pipe: Pipeline, pictures, monkeypatch) -> None:
    monkeypatch.setattr(pipe.backend, "run", lambda *_: pytest.fail("computed something"))
    long = " ".join(["ball"] * 12)
    good = concepts(pictures, "ball")
    with pytest.raises(InputError, match="the prompt takes 13 tokens, 12 are allowed"):
        pipe(long)
    with pytest.raises(InputError, match="negative prompt takes 13"):
        pipe("a ball", negative=long)
    with pytest.raises(InputError, match="label 'a red red ball' takes 5 tokens, 4"):
        pipe("a ball", [Concept("a red red ball", pictures["ball"])])
    with pytest.raises(InputError, match="4 concepts, but the bundle 'fake' takes at most 3"):
        pipe("a ball", [Concept(str(i), pictures["ball"]) for i in range(4)])
    with pytest.raises(InputError, match="picture of 'cat'.*No such file") as missing:
        pipe("a ball", [*good, Concept("cat", "nowhere.png")])
    assert missing.value.field == "concepts"
    with pytest.raises(InputError, match="noise"):
        pipe("a ball", good, noise=np.zeros(3))
    with pytest.raises(InputError, match="generate takes a Request, not str"):
        pipe.generate("a ball")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="callback must be a function or None, not int"):
        pipe("a ball", good, callback=3)  # type: ignore[call-overload]
    # this bundle's tokenizer knows neither word
    with pytest.raises(InputError, match="reads the labels 'zebra' and 'okapi' alike"):
        pipe("a ball", [Concept("zebra", pictures["ball"]), Concept("okapi", pictures["cat"])])
    encode = pipe._tokenizer.encode  # as a tokenizer does that drops what cannot be seen
    dropping = lambda text, *rest: encode(text.replace("\u200b", ""), *rest)  # noqa: E731
    monkeypatch.setattr(pipe._tokenizer, "encode", dropping)
    for prompt, label, what in (("\u200b", "cat", "prompt"), ("a", "\u200b", "label '.u200b'")):
        with pytest.raises(InputError, match=f"the {what} is empty: the bundle 'fake' reads no word of it"):
            pipe(prompt, [Concept(label, pictures["ball"])])


@pytest.mark.parametrize(("graph", "output"), [("denoise", "next_state"), ("decode", "frames")])
def test_numbers_that_are_no_video_are_an_error(bundle: Path, monkeypatch, graph: str, output: str) -> None:
    pipe = Pipeline.from_bundle(bundle, threads=1)
    run = pipe.backend.run

    def broken(name: str, inputs: dict) -> dict:
        outputs = run(name, inputs)
        return outputs | {output: outputs[output].numpy() * np.nan} if name == graph else outputs

    monkeypatch.setattr(pipe.backend, "run", broken)
    with pytest.raises(GenerationError, match="not finite"):
        pipe("a ball")


def test_threads_share_a_pipeline(pipe: Pipeline, pictures) -> None:
    expected = [pipe("a ball", concepts(pictures, "ball"), seed=seed) for seed in range(4)]
    found: dict[int, Video | list[Video]] = {}

    def work(seed: int) -> None:
        found[seed] = pipe("a ball", concepts(pictures, "ball"), seed=seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, video in enumerate(expected):
        assert isinstance(video, Video)
        other = found[seed]
        assert isinstance(other, Video)
        np.testing.assert_array_equal(video.frames, other.frames)


def test_text_is_encoded_once(bundle: Path, monkeypatch) -> None:
    pipe = Pipeline.from_bundle(bundle, threads=1)
    calls, run = [], pipe.backend.run
    monkeypatch.setattr(pipe.backend, "run", lambda graph, inputs: calls.append(graph) or run(graph, inputs))
    pipe("a ball")
    pipe("a ball", seed=1)
    assert calls.count("text_encoder") == 2  # the prompt and the empty negative prompt
    assert "image_encoder" not in calls and "dam" not in calls


def test_a_model_without_labels_does_not_encode_them(make_bundle: Callable[..., Path], pictures) -> None:
    pipe = Pipeline.from_bundle(make_bundle(labels=False), threads=1)
    videos = [pipe("a ball", [Concept(label, pictures["ball"])]) for label in ("ball", "cat")]
    assert isinstance(videos[0], Video) and isinstance(videos[1], Video)
    np.testing.assert_array_equal(videos[0].frames, videos[1].frames)
    assert pipe._text.cache_info().misses == 2  # the prompt and the empty negative prompt


@pytest.mark.parametrize(
    ("options", "word"),
    [({"device": "tpu"}, "device"), ({"threads": 0}, "threads"), ({"threads": True}, "threads")],
)
def test_bad_backend_options(bundle: Path, options: dict, word: str) -> None:
    with pytest.raises(InputError, match=word):
        Pipeline.from_bundle(bundle, **options)


def test_no_silent_fallback_from_cuda(bundle: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(InputError, match="onnxruntime-gpu"):
        Pipeline.from_bundle(bundle, device="cuda")


def test_load_makes_everything_ready(bundle: Path, pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipeline.from_bundle(bundle, threads=1)
    pipe.load()
    backend = pipe.backend
    assert isinstance(backend, OnnxRuntimeBackend) and set(backend._sessions) == set(pipe.manifest.graphs)
    monkeypatch.setattr(backend, "_open", lambda graph: pytest.fail(f"opened {graph} again"))
    pipe("a ball", concepts(pictures, "ball"), steps=1)


def test_a_closed_pipeline_says_so(bundle: Path, pictures) -> None:
    with Pipeline.from_bundle(bundle, threads=1) as pipe:
        pipe("a ball", concepts(pictures, "ball"), steps=1)
        session = weakref.ref(next(iter(pipe.backend._sessions.values())))  # type: ignore[attr-defined]
        assert repr(pipe) == "<Pipeline 'fake', fp32: 9 frames of 8×8, up to 3 concepts>"
    assert session() is None, "the memory is not given back"
    assert repr(pipe).endswith("up to 3 concepts, closed>")
    pipe.close()
    for use in (pipe.load, lambda: pipe("a ball"), lambda: pipe.generate(Request("a ball")), pipe.__enter__):
        with pytest.raises(InputError, match="this pipeline is closed: open the bundle again"):
            use()


@pytest.mark.parametrize("way", [ForkingPickler.dumps, copy.copy, copy.deepcopy])
def test_a_pipeline_says_why_it_cannot_be_pickled(pipe: Pipeline, way: Callable) -> None:
    with pytest.raises(TypeError, match="open the bundle in each process"):
        way(pipe)
