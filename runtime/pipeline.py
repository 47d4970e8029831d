"""From a prompt and concepts to a video, once from top to bottom:

prompt, labels ──▶ text_encoder ─────────────┐
pictures ──▶ image_encoder ▶ qformer ▶ dam ──┴─▶ condition ──▶ denoise × steps ──▶ decode

Of an image-to-video model there is no qformer and no dam, and its pictures are frames, too, or frames alone:
see frame_conditioning.py. Of two experts, each has its condition and its denoise: see experts.py.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, overload

import numpy as np

from ..errors import Cancelled, GenerationError, InputError, wrong_in
from . import boxes as placing
from . import experts, frame_conditioning, pictures, tiles, vocabulary
from . import noise as noises
from .backends import Backend, check_choice, open_backend
from .bundle_format.find import Bundle
from .bundle_format.graph_list import CONCEPT_GRAPHS, FRAME_GRAPHS, other_expert
from .canvas import canvas_of
from .causal import run_causal, spans
from .guidance import Guidance
from .naming import spoken
from .pixels import to_uint8
from .progress import bar, timed
from .recent import Recent
from .request import Concept, Request
from .solver import STATES, Schedule, make_schedule
from .tokenizer import open_tokenizer, padded, padding_bias, tokenised
from .video import Video

if TYPE_CHECKING:
    from .backends.pytorch.options import TorchOptions

Preview = Callable[[], np.ndarray]
Callback = Callable[[int, int, Preview], bool | np.bool_ | None]
"""callback(step, steps, preview): called after each step, step = 1..steps, counted over all samples of the
request. preview() decodes the model's current estimate of a frame at the start, uint8 [H,W,3]. Returning
False (NumPy's, too) cancels."""

CACHED_TEXTS = 32  # encoded strings kept per pipeline
CACHED_PICTURES = 2**27  # bytes of encoded pictures kept per pipeline


class Pipeline:
    """A loaded bundle, ready to generate.

    It holds no state of a request, so several threads may call one pipeline at once; their requests then
    share the CPU threads, so one after the other is usually as fast. As a context manager it closes itself.
    It cannot be pickled or copied: open the bundle in each process.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self._backend: Backend | None = backend
        self._tiles = tiles.layout(bundle.manifest)
        self._tokenizer = open_tokenizer(bundle)
        self._text = functools.lru_cache(CACHED_TEXTS)(self._encode_text)
        self._empty = functools.lru_cache(1)(self._encode_nothing)
        self._pictured = Recent(CACHED_PICTURES)

    @classmethod
    def from_bundle(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: str = "cpu",
        threads: int | None = None,
        backend: str = "onnxruntime",
        options: TorchOptions | None = None,
        precision: str | None = None,
        gpus: int | None = 1,
        custom: Sequence[str | os.PathLike[str]] = (),
    ) -> Pipeline:
        """Opens and verifies a bundle: the name of a shipped one ("stickers") or a path.

        Args: device: "cpu", "cuda", "tensorrt" or "rtx"; threads: CPU threads, None for one per CPU that
            this process may use; backend: "onnxruntime" or "torch"; options: of the latter, and gpus: how
            many make a request together (None: torchrun's); precision: of TensorRT's engines, None: the one;
            custom: deltas to hand in, see custom.py.
        Raises: InputError, BundleError (not sound), MissingDependency, OutOfMemory, RanksLost.
        """
        check_choice(device, threads, backend, precision, gpus)  # before files are hashed, for minutes
        bundle = Bundle.open(name_or_path).with_custom(custom)
        return cls(bundle, open_backend(bundle, device, threads, backend, options, precision, gpus))

    @property
    def backend(self) -> Backend:
        """What runs the graphs. Raises InputError once the pipeline is closed."""
        if self._backend is None:
            raise InputError("this pipeline is closed: open the bundle again, with Pipeline.from_bundle")
        return self._backend

    def load(self) -> None:
        """Makes every graph ready now; otherwise the first request that needs one pays for it. Raises
        BundleError, InputError, OutOfMemory."""
        self.backend.load(self.manifest.graphs)

    def close(self) -> None:
        """Frees the graphs and their memory; whatever is asked of the pipeline afterwards is an InputError.
        To be called while no request is running; twice does no harm."""
        if self._backend is not None:
            self._backend.close()
        self._backend = None
        self._text.cache_clear()
        self._empty.cache_clear()
        self._pictured.clear()

    def __enter__(self) -> Self:
        _ = self.backend  # a closed pipeline says so
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        s, state = self.manifest.shapes, "" if self._backend is not None else ", closed"
        size = f"{s.frames} frames of {s.width}×{s.height}, up to {self.manifest.concepts} concepts"
        return f"<Pipeline {self.manifest.name!r}, {self.manifest.precision}: {size}{state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Pipeline holds open sessions and can be neither pickled nor copied: open the bundle in each "
            "process, with Pipeline.from_bundle"
        )

    @overload
    def __call__(
        self,
        prompt: str,
        concepts: Sequence[Concept] = (),
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_2: float | None = None,
        concept_guidance: float | None = None,
        negative: str | None = None,
        solver: str | None = None,
        shift: float | None = None,
        boxes: Mapping[str, Any] | None = None,
        samples: Literal[1] = 1,
        noise: np.ndarray | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        strict: bool = False,
    ) -> Video: ...

    @overload
    def __call__(
        self,
        prompt: str,
        concepts: Sequence[Concept] = (),
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_2: float | None = None,
        concept_guidance: float | None = None,
        negative: str | None = None,
        solver: str | None = None,
        shift: float | None = None,
        boxes: Mapping[str, Any] | None = None,
        samples: int,
        noise: np.ndarray | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        strict: bool = False,
    ) -> Video | list[Video]: ...

    def __call__(
        self,
        prompt: str,
        concepts: Sequence[Concept] = (),
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_2: float | None = None,
        concept_guidance: float | None = None,
        negative: str | None = None,
        solver: str | None = None,
        shift: float | None = None,
        boxes: Mapping[str, Any] | None = None,
        samples: int = 1,
        noise: np.ndarray | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        strict: bool = False,
    ) -> Video | list[Video]:
        """Generates one video, or a list of them if samples > 1. The arguments are the fields of `Request`
        (None: the bundle's default) and the arguments of `generate`. Raises what they raise."""
        request = Request(
            prompt,
            concepts,
            negative,
            steps,
            guidance,
            concept_guidance,
            solver,
            shift,
            seed,
            samples,
            guidance_2,
            {} if boxes is None else boxes,
        )
        videos = self.generate(request, noise=noise, callback=callback, progress=progress, strict=strict)
        return videos[0] if request.samples == 1 else videos

    def generate(
        self,
        request: Request,
        *,
        noise: np.ndarray | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        strict: bool = False,
    ) -> list[Video]:
        """Generates request.samples videos.

        Args: noise: [samples,Cz,F,H,W] or, for one sample, [Cz,F,H,W], instead of noise from the seed;
            callback: see `Callback`; progress: show a progress bar on standard error; strict: refuse what is
            otherwise warned of.
        Raises: InputError, before anything is computed; Cancelled; GenerationError; BundleError.
        Warns: RequestWarning, before anything is computed, for each thing that the bundle was not made for,
            see vocabulary.py.
        """
        shapes, backend = self.manifest.shapes, self.backend
        if not isinstance(request, Request):
            raise InputError(f"generate takes a Request, not {type(request).__name__}")
        if callback is not None and not callable(callback):
            raise InputError(f"callback must be a function or None, not {type(callback).__name__}")
        request, guidance = request.resolve(self.manifest)
        assert request.solver is not None and request.steps is not None and request.shift is not None
        schedule = make_schedule(request.solver, request.steps, request.shift)
        graphs = experts.step_graphs(self.manifest, schedule.timesteps)
        starts: Sequence[np.ndarray | None] = [None] * request.samples  # None: from its seed, in its turn
        if noise is not None:
            starts = noises.from_array(noise, self.manifest.denoised, request.samples)
        tokens = tokenised(request, guidance, self.manifest, self._tokenizer)
        concepts, seen, frames, area = self._read_pictures(request)
        remarks = vocabulary.remarks(request, self.manifest, self._tokenizer.read)
        vocabulary.warn(remarks, strict)

        seconds: dict[str, float] = {}
        with timed(seconds, "load"):
            skipped = other_expert(graphs[0])  # which is made ready at its turn
            skipped |= set() if concepts else {*CONCEPT_GRAPHS, *FRAME_GRAPHS}
            backend.load(graph for graph in self.manifest.graphs if graph not in skipped)
        with timed(seconds, "encode"):
            known: dict[str, Any] = self._branch_texts(request, guidance, tokens)
            box = placing.means(request, self.manifest) if self.manifest.takes("box") else None  # [N,4]
            known["concept_tokens"] = self._pictured.get(
                ([concept.label for concept in concepts], [*seen, box]),
                lambda: backend.to_host(self._concept_tokens(concepts, seen, tokens, box)),
            )  # [N,Q,Dc]
            given = None
            if self.manifest.conditioning is not None:
                given = self._pictured.get(
                    (frames, area),
                    lambda: frame_conditioning.channels(backend, frames, self.manifest, self._empty, area),
                )
                known["given"] = given  # [1,Cg,F,H,W]
        with timed(seconds, "condition"):
            labels = [len(tokens.get(concept.label, ())) for concept in concepts]
            known["concept_mask"] = frame_conditioning.concept_mask(self.manifest, guidance, labels)
            if self.manifest.takes("boxes"):
                known["boxes"] = placing.drawn(request, self.manifest)  # [S,N]
            conditions = experts.Conditions(backend, known, guidance)
            conditions.of(graphs[0])

        videos, leading = [], frame_conditioning.leading(self.manifest, len(concepts))
        steps = request.samples * request.steps
        decodes = request.samples * shapes.latent[1] * len(self._tiles)
        with bar(steps + decodes, "steps and frames", progress) as advance:
            shown = frame_conditioning.previewed(self.manifest, len(concepts))
            report = self._reporter(callback, steps, advance, shown)
            for seed, start in zip(request.seeds, starts, strict=True):
                own = dict(seconds)
                with timed(own, "denoise"):
                    if start is None:
                        start = noises.from_seed(seed, self.manifest.denoised)  # [Cz,F,H,W]
                    latents = self._denoise(start, conditions, graphs, schedule, report)  # [Cz,F,H,W]
                latents = frame_conditioning.kept(latents, given, self.manifest)
                with timed(own, "decode"):
                    video = self._decode(latents, advance)[leading:]  # [frames,height,width,3]
                about = (seed, request.prompt, concepts, own, tuple(remarks))
                videos.append(Video(video, self.manifest.fps, *about))
        return videos

    @wrong_in("concepts")
    def _read_pictures(
        self, request: Request
    ) -> tuple[tuple[Concept, ...], list[np.ndarray], dict[int, np.ndarray], np.ndarray | None]:
        """The concepts with their pictures, uint8 [px,px,3]; what the picture encoder sees, these or one
        canvas of all, [px,px,3]; the frames of the video that they are; and of a frame of several which part
        of it they are, bool [H,W]. One picture at a time: each may be large."""
        how, size = self.manifest.pictures, self.manifest.shapes.picture_size
        canvas = canvas_of(self.manifest, len(request.concepts))
        concepts: list[Concept] = []
        frames: dict[int, np.ndarray] = {}
        for index, (label, picture) in enumerate((c.label, c.image) for c in request.concepts):
            image = pictures.read(picture, how.background, f"the picture of {label!r}")
            if canvas is not None:
                canvas.place(index, image)
                concepts.append(Concept(label, pictures.fit(image, (size, size), "whole", how.background)))
            else:
                concepts.append(Concept(label, pictures.prepare(image, how, size)))
            frames |= frame_conditioning.fitted(image, index, label, self.manifest)
            del image  # before the next one is read
        if canvas is not None:
            return tuple(concepts), [canvas.seen()], canvas.frames(), canvas.area()
        return tuple(concepts), [np.asarray(concept.image) for concept in concepts], frames, None

    def _encode_text(self, tokens: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """One text → text [1,T,Dt] float32 (zero behind its end), mask [1,T]. Cached as `_text`."""
        ids, mask = padded(tokens, self.manifest.shapes.text_tokens)
        outputs = self.backend.run("text_encoder", {"token_ids": ids, "token_mask": mask})
        return self.backend.to_host(outputs["text"]), mask

    def _encode_nothing(self) -> np.ndarray:
        """The latents of an empty video, float32 [1,Cz,F,H,W]. Cached as `_empty`."""
        return frame_conditioning.encoded(self.backend, {}, self.manifest.shapes)

    def _branch_texts(
        self, request: Request, guidance: Guidance, tokens: dict[str, tuple[int, ...]]
    ) -> dict[str, np.ndarray]:
        """text [K,T,Dt], and text_bias [K,T], for what lets one key stand for all padding."""
        prompt = spoken(request, self.manifest)
        texts = [prompt if caption else request.negative or "" for caption in guidance.caption]
        length = self.manifest.shapes.text_tokens
        whole = self.manifest.whole_text or length
        return {
            "text": np.concatenate([self._text(tokens[text])[0] for text in texts]),
            "text_bias": padding_bias([len(tokens[text]) for text in texts], length, whole),
        }

    def _concept_tokens(
        self,
        concepts: tuple[Concept, ...],
        seen: list[np.ndarray],
        tokens: dict[str, tuple[int, ...]],
        box: np.ndarray | None,
    ) -> Any:
        """What the picture encoder sees, labels, and perhaps boxes [N,4] → concept tokens [N,Q,Dc] on the
        device; places without a concept hold anything finite.
        """
        shapes, images = self.manifest.shapes, self.manifest.pictures
        if not concepts or "image_encoder" not in self.manifest.graphs:
            return np.zeros((shapes.concepts, shapes.queries, shapes.concept_width), np.float32)
        pixels = np.zeros((shapes.concepts, 3, shapes.picture_size, shapes.picture_size), np.float32)
        for i, picture in enumerate(seen):
            pixels[i] = pictures.normalise(picture, images.mean, images.std)
        known: dict[str, Any] = {"pixels": pixels}
        for name in CONCEPT_GRAPHS:
            if (graph := self.manifest.graphs.get(name)) is not None:
                labels = {} if graph.input("label_text") is None else self._labels(concepts, tokens)
                known = self.backend.run(name, known | labels | {"box": box})
        return known["concept_tokens"]

    def _labels(
        self, concepts: tuple[Concept, ...], tokens: dict[str, tuple[int, ...]]
    ) -> dict[str, np.ndarray]:
        """Each label, encoded on its own: label_text [N,L,Dt], label_mask [N,L]."""
        shapes = self.manifest.shapes
        text = np.zeros((shapes.concepts, shapes.label_tokens, shapes.text_width), np.float32)
        mask = np.zeros((shapes.concepts, shapes.label_tokens), bool)
        mask[:, 0] = True  # a softmax over no token is not a number, even where it is thrown away later
        for i, concept in enumerate(concepts):
            label_text, label_mask = self._text(tokens[concept.label])
            text[i], mask[i] = label_text[0, : shapes.label_tokens], label_mask[0, : shapes.label_tokens]
        return {"label_text": text, "label_mask": mask}

    def _denoise(
        self,
        start: np.ndarray,
        conditions: experts.Conditions,
        graphs: Sequence[str],
        schedule: Schedule,
        report: Callable[[Any], None],
    ) -> np.ndarray:
        """Noise [Cz,F,H,W] → latents [Cz,F,H,W]: one graph call a step, of graphs; the state stays on the
        device."""
        state: Any = np.zeros((STATES, *start.shape), np.float32)  # [M,Cz,F,H,W]
        state[0] = start
        for step, (graph, coefficients) in enumerate(zip(graphs, schedule.coefficients, strict=True)):
            scalars = {"time": schedule.timesteps[step : step + 1], "coefficients": coefficients}
            scalars["step"] = np.array([step, len(schedule.coefficients)])  # no graph's: for lossy options
            if step and graph != graphs[step - 1]:  # a result of ONNX Runtime keeps its session's memory
                state = self.backend.to_host(state)
            inputs = {**conditions.of(graph), **scalars, "state": state}
            state = self.backend.run(graph, inputs)["next_state"]
            del inputs  # the next expert's keys and values take these ones' place
            report(state)
        latents = self.backend.to_host(state)[0]
        if not np.isfinite(latents).all():
            raise GenerationError("the latents are not finite: try a lower guidance scale or more steps")
        return latents

    def _reporter(
        self, callback: Callback | None, steps: int, advance: Callable[[], object], first: int
    ) -> Callable[[Any], None]:
        """A function to be called with the state after each step, of all samples together; first: the latent
        frame to preview."""
        counter = itertools.count(1)

        def report(state: Any) -> None:
            step = next(counter)
            advance()
            if callback is None:
                return
            answer = callback(step, steps, lambda: self._preview(state, first))
            if isinstance(answer, (bool, np.bool_)) and not answer:
                raise Cancelled(f"cancelled after step {step} of {steps}")

        return report

    def _preview(self, state: Any, first: int) -> np.ndarray:
        """The latent frame `first` of the newest estimate of the data (slot 2), uint8 [H,W,3]."""
        latents = self.backend.to_host(state)[2]  # [Cz,F,H,W]
        return self._decode(latents[:, first : first + 1], lambda: None)[0]

    def _decode(self, latents: np.ndarray, advance: Callable[[], object]) -> np.ndarray:
        """Latents [Cz,F,H,W] → uint8 [frames,height,width,3], some latent frames at a time."""
        pixels, host = self.backend.to_pixels, self.backend.to_host
        if len(self._tiles) == 1:
            return np.concatenate([pixels(frames) for frames in self._stream(latents, advance)])
        video = tiles.decode(
            latents, lambda part: map(host, self._stream(part, advance)), self.manifest, self._tiles
        )  # [frames,height,width,3]
        return np.stack([to_uint8(frame) for frame in video])

    def _stream(self, latents: np.ndarray, advance: Callable[[], object]) -> Iterator[Any]:
        """Latents [Cz,F,H,W], of all of the picture or of a tile → their frames by the call, arrays
        [f,height,width,3]; the decoder's state stays on the device."""
        calls = spans(latents.shape[1], self.backend.latent_frames)
        parts = ({"latents": np.ascontiguousarray(latents[None, :, s.start : s.stop])} for s in calls)
        for call, frames in zip(calls, run_causal(self.backend, "decode", parts, "frames"), strict=True):
            for _ in call:
                advance()
            yield frames
