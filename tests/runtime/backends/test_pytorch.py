"""The torch backend against ONNX Runtime, its capturing of steps, its lossy options, and its errors."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from conceptmaster import Pipeline  # noqa: E402
from conceptmaster.engine.step import DenoiseStep  # noqa: E402
from conceptmaster.errors import InputError, OutOfMemory  # noqa: E402
from conceptmaster.runtime.backends import open_backend  # noqa: E402
from conceptmaster.runtime.backends.pytorch import backend as torch_backend  # noqa: E402
from conceptmaster.runtime.backends.pytorch import memory_plan  # noqa: E402
from conceptmaster.runtime.backends.pytorch import stepper as stepping  # noqa: E402
from conceptmaster.runtime.backends.pytorch.options import TorchOptions  # noqa: E402
from conceptmaster.runtime.bundle_format.find import Bundle  # noqa: E402
from conceptmaster.runtime.request import Request  # noqa: E402

ROOT = Path(__file__).parents[3]
REQUEST = ROOT / "examples" / "sprites" / "requests" / "first" / "request.json"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def request_4():
    """The first example request, in four steps."""
    return dataclasses.replace(Request.from_json(REQUEST), steps=4)


@pytest.fixture(scope="module")
def sprites():
    """The shipped bundle on the torch backend."""
    pipeline = Pipeline.from_bundle("sprites", threads=1, backend="torch")
    pipeline.backend.load(())
    return pipeline


@pytest.fixture(scope="module")
def frames(sprites, request_4):
    """The request's frames on the torch backend."""
    return sprites.generate(request_4)[0].frames


def test_frames_are_those_of_onnx_runtime(frames, request_4):
    expected = Pipeline.from_bundle("sprites", threads=1).generate(request_4)[0].frames
    difference = np.abs(frames.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def write_bundle(folder, injection):
    """A bundle of the tiny preset, with its weights inside."""
    pytest.importorskip("diffusers")
    pytest.importorskip("onnxscript")
    from conceptmaster.engine.checkpoints.safetensors_io import save, save_model
    from conceptmaster.engine.checkpoints.source import random_source
    from conceptmaster.engine.presets import preset
    from conceptmaster.export.bundle import write_bundle as write

    config = preset("tiny")
    config = dataclasses.replace(config, concept=dataclasses.replace(config.concept, injection=injection))
    source = random_source(config)
    write(source, folder)
    (folder / "weights").mkdir()
    save_model(source.model, folder / "weights" / "model.safetensors")
    save(folder / "weights" / "vae.safetensors", source.vae.state_dict())
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("torch") / "tiny", "standalone")


def upstream(backend, bundle, seed=0):
    """Outputs of every graph for random inputs, each graph's from those before it, as NumPy by name."""
    rng = np.random.default_rng(seed)
    shapes = bundle.manifest.shapes
    known = {
        "token_ids": rng.integers(2, 100, (1, shapes.text_tokens)),
        "token_mask": np.ones((1, shapes.text_tokens), bool),
        "pixels": rng.standard_normal((shapes.concepts, 3, *[shapes.picture_size] * 2), np.float32),
        "label_text": rng.standard_normal(
            (shapes.concepts, shapes.label_tokens, shapes.text_width), np.float32
        ),
        "label_mask": np.ones((shapes.concepts, shapes.label_tokens), bool),
        "concept_mask": np.arange(shapes.concepts) < [[0], [2]],
        "state": rng.standard_normal((shapes.solver_states, *shapes.latent), np.float32),
        "time": np.array([400.0], np.float32),
        "guidance": np.array([-1.5, 2.5], np.float32),
        "coefficients": rng.standard_normal((shapes.solver_states, shapes.solver_states + 1), np.float32),
        "latents": rng.standard_normal((1, shapes.latent[0], 1, *shapes.latent[2:]), np.float32),
    }
    if "dam" not in bundle.manifest.graphs:
        known["concept_tokens"] = np.zeros(
            (shapes.concepts, shapes.queries, shapes.concept_width), np.float32
        )
    found = {}
    for graph in bundle.manifest.graphs:
        if graph == "condition":
            known["text"] = np.concatenate([backend.to_host(known["text"])] * 2)
        outputs = backend.run(graph, known)
        known |= {name.removeprefix("next_"): value for name, value in outputs.items()}
        found |= {f"{graph} {name}": backend.to_host(value) for name, value in outputs.items()}
    return found


def held_to_onnx_runtime(folder, assert_close):
    bundle = Bundle.open(folder)
    ours, theirs = (upstream(open_backend(bundle, "cpu", 1, n), bundle) for n in ("torch", "onnxruntime"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        if ours[name].shape == theirs[name].shape:  # what is folded or cut away is nobody else's concern
            scale = max(1.0, np.abs(theirs[name]).max())
            assert_close(ours[name] / scale, theirs[name] / scale)
        else:
            assert name.startswith("condition ")


def test_every_graph_is_that_of_onnx_runtime(tiny, assert_close):
    held_to_onnx_runtime(tiny, assert_close)


@pytest.mark.slow
@pytest.mark.parametrize("injection", ["shared_query", "merged", "none"])
def test_every_graph_of_another_injection_is_that_of_onnx_runtime(tmp_path, injection, assert_close):
    held_to_onnx_runtime(write_bundle(tmp_path / injection, injection), assert_close)


# Capturing, on the CPU: a replay calls the function again, into the outputs of the first time.


def test_captured_inputs_are_copied_when_they_are_others(pretend):
    captures, given = [], {"a": torch.ones(2), "b": torch.ones(2)}
    places = {name: stepping.Place(tensor) for name, tensor in given.items()}
    call = stepping.Captured(lambda a, b: (a + 10 * b,), places, given, pretend(captures))
    assert call(given)[0].tolist() == [11, 11]
    first = call({"a": torch.full((2,), 5.0), "b": given["b"]})[0]
    given["b"].fill_(7)  # the same tensor: what a request computes once is copied once
    assert call({"a": torch.full((2,), 6.0), "b": given["b"]})[0].tolist() == [16, 16]
    assert first.tolist() == [15, 15]  # outputs are the caller's
    assert len(captures) == 1


def test_replayed_steps_give_the_same_video(sprites, frames, request_4, monkeypatch, pretend):
    captures = []
    monkeypatch.setattr(sprites.backend.stepper, "capture", pretend(captures))
    monkeypatch.setattr(sprites.backend.stepper, "programs", {})
    assert np.array_equal(sprites.generate(request_4)[0].frames, frames)
    (program,) = sprites.backend.stepper.programs.values()
    keys = program.held["concept_keys"]  # of the branch that sees the concepts, and of those that are given
    assert keys.shape[1:3] == (1, len(request_4.concepts) * sprites.manifest.shapes.queries)
    assert "concept_mask" not in program.held
    prompt, concepts = "a cat on the left jumps", request_4.concepts[:1]
    other = dataclasses.replace(request_4, seed=99, prompt=prompt, concepts=concepts)
    replayed = sprites.generate(other)[0].frames
    assert np.array_equal(sprites.generate(request_4)[0].frames, frames)  # and nothing is left of the other
    assert len(captures) == 2
    monkeypatch.setattr(sprites.backend.stepper, "capture", None)
    assert np.array_equal(sprites.generate(other)[0].frames, replayed)


@torch.inference_mode()
def test_masks_that_change_never_meet_another_ones_graph(pretend):
    """Of a random model of three branches and three concepts; also where guidance is skipped."""
    from conceptmaster.engine.dit import ConceptDiT
    from conceptmaster.engine.fused import fuse
    from conceptmaster.engine.presets import preset
    from conceptmaster.engine.seen import Seen

    config = preset("tiny")
    config = dataclasses.replace(config, concept=dataclasses.replace(config.concept, max_concepts=3))
    torch.manual_seed(0)
    model = ConceptDiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    step, captures = DenoiseStep(fuse(model)), []
    replayed, plain = (
        stepping.Stepper(step, capture, skip_guidance=0.5) for capture in (pretend(captures), None)
    )
    text = torch.randn(3, config.text_tokens, config.transformer.text_dim)
    tokens = torch.randn(3, config.concept.tokens_per_concept, config.concept.width)
    given = {
        "time": torch.full((1,), 500.0), "guidance": torch.tensor([-1.0, 0.5, 1.5]),
        "coefficients": torch.tensor([[1.0, 0.0, -0.1], [0.0, 1.0, 0.0]]),
    }  # fmt: skip
    lone, pair, all_three = [[0] * 3, [0] * 3, [0, 0, 1]], [[0] * 3, [0] * 3, [1, 0, 1]], [[1] * 3] * 3
    masks = [lone, [[0] * 3] * 3, all_three, pair, lone, [[0] * 3, [0, 1, 0], [0, 1, 1]], [[0] * 3] * 3]
    for mask in masks:
        seen = Seen.of(torch.tensor(mask).bool(), config)
        inputs = given | model.condition(text, seen.tokens(tokens), seen.mask)
        if seen.partly:
            inputs["concept_mask"] = seen.mask
        start = stepping.Carried(torch.randn(2, *config.latent_shape))
        for index in range(2):
            found, expected = (stepper(start, inputs, index, 2) for stepper in (replayed, plain))
            torch.testing.assert_close(found.state, expected.state, rtol=0, atol=0)
    assert len(captures) >= 5 * 2 and replayed.evaluations == plain.evaluations == len(masks) * 4
    held = {name: place.memory.numel() for name, place in replayed.places.items()}
    whole = model.condition(text, tokens, torch.ones(3, 3, dtype=torch.bool))
    assert {name: tensor.numel() for name, tensor in whole.items()}.items() <= held.items()


# Lossy options.


@pytest.fixture
def lossy(sprites, monkeypatch):
    """`lossy(skip_guidance=0.5)`: the pipeline with another stepper of the same weights."""

    def build(**options):
        stepper = stepping.Stepper(sprites.backend.stepper.denoise, None, **options)
        monkeypatch.setitem(sprites.backend.steppers, "denoise", stepper)
        return stepper

    return build


def test_skipped_guidance_computes_one_branch(sprites, frames, request_4, lossy):
    stepper = lossy(skip_guidance=0.5)
    found = sprites.generate(request_4)[0].frames
    assert stepper.evaluations == 2 + 2 + 1 + 1
    assert 0 < np.abs(found.astype(int) - frames).mean() < 20
    stepper = lossy(skip_guidance=1.0)  # the same as no guidance at all
    found = sprites.generate(request_4)[0].frames
    assert stepper.evaluations == 4
    lossy()
    unguided = sprites.generate(dataclasses.replace(request_4, guidance=1.0))[0].frames
    assert np.abs(found.astype(int) - unguided).max() <= 1


def test_a_step_cache_leaves_out_steps(sprites, request_4, lossy):
    request = dataclasses.replace(request_4, steps=8)
    lossy()
    expected = sprites.generate(request)[0].frames
    stepper = lossy(step_cache=1.0)
    found = sprites.generate(request)[0].frames
    assert 2 * 3 <= stepper.evaluations <= 2 * 5  # the first two tell how fast it changes, the last is exact
    stepper = lossy(step_cache=1e-9)
    assert np.array_equal(sprites.generate(request)[0].frames, expected) and stepper.evaluations == 16
    assert 0 < np.abs(found.astype(int) - expected).mean() < 40


def test_a_step_cache_is_of_one_video(sprites, request_4, lossy):
    """Two videos with their steps in turn are those that each gives alone."""
    lossy(step_cache=0.3)
    request = dataclasses.replace(request_4, steps=6, samples=2)
    both = [video.frames for video in sprites.generate(request)]
    alone = [
        sprites.generate(dataclasses.replace(request, seed=request.seed + i, samples=1))[0].frames
        for i in range(2)
    ]
    assert all(np.array_equal(a, b) for a, b in zip(both, alone, strict=True))


def test_a_linear_change_is_predicted_exactly():
    """Where the velocity is the latents plus a constant, a cached step is no approximation."""

    class Model(DenoiseStep):
        def __init__(self):
            torch.nn.Module.__init__(self)

        def velocity(self, state, time, guidance, concept_mask, coefficients):
            return state[:1].flatten(1) + 3

    mask, guidance = torch.ones(1, 1, dtype=torch.bool), torch.ones(1)
    table = torch.tensor([[1.0, 0.0, -0.1], [0.0, 1.0, 0.0]])
    inputs = {"time": torch.ones(1), "concept_mask": mask, "guidance": guidance, "coefficients": table}
    results = []
    for threshold in (0.0, 1.0):
        stepper = stepping.Stepper(Model(), step_cache=threshold)
        carried = stepping.Carried(torch.arange(8.0).view(2, 1, 1, 2, 2))
        for step in range(6):
            carried = stepper(carried, inputs, step, 6)
        results.append((carried.state, stepper.evaluations))
    assert results[0][1] == 6 and results[1][1] == 3
    torch.testing.assert_close(results[0][0], results[1][0])


def test_bfloat16_is_near(frames, request_4):
    pipeline = Pipeline.from_bundle(
        "sprites", threads=1, backend="torch", options=TorchOptions(dtype="bfloat16")
    )
    found = pipeline.generate(request_4)[0].frames
    assert 0 < np.abs(found.astype(int) - frames).mean() < 4


# Memory.


def test_the_plan_holds_what_a_step_keeps_alive(sprites, request_4, peak_memory):
    backend, peaks = sprites.backend, []
    real = backend.stepper._step
    model = backend.stepper.denoise.transformer
    weights = [*model.parameters(), *model.buffers()]

    def watched(**given):
        with peak_memory([*weights, *given.values()]) as mode:
            found = real(**given)
        peaks.append(mode.most)
        return found

    backend.stepper._step = watched
    try:
        sprites.generate(dataclasses.replace(request_4, steps=1))
    finally:
        del backend.stepper._step
    planned = backend.plan
    assert 0.5 * planned["step"] < peaks[0] < 1.5 * planned["step"]
    stored = sum(p.numel() * p.element_size() for p in backend.stepper.denoise.transformer.parameters())
    assert stored < planned["weights"] < planned["peak"]


def test_a_larger_video_plans_more_and_bfloat16_less(sprites):
    demand = sprites.backend._demand
    peak = memory_plan.plan(demand)["peak"]
    assert memory_plan.plan(dataclasses.replace(demand, dtype="bfloat16"))["peak"] < peak
    assert memory_plan.plan(dataclasses.replace(demand, graphs=True))["peak"] > peak
    assert memory_plan.plan(demand.at(demand.shapes.latent[1], 2.0))["peak"] > peak
    half = demand.at(3, 0.5).shapes
    assert (half.latent[1:], half.frames, half.height, half.width) == ((3, 4, 4), 9, 32, 32)


def test_too_little_memory_is_said_before_loading_with_what_would_fit(sprites, monkeypatch):
    demand = dataclasses.replace(sprites.backend._demand, latent_frames=1)  # what little memory leaves
    peak = memory_plan.plan(demand)["peak"]
    narrow = memory_plan.plan(dataclasses.replace(demand, dtype="bfloat16"))["peak"]
    for free, words in (
        (peak - 1, "--dtype bfloat16 would fit, with"),
        (narrow - 1, "a bundle of .* frames of .* with --dtype bfloat16 would fit"),
        (2**20, "nothing smaller fits: weights alone take"),
    ):
        monkeypatch.setattr(torch_backend, "_free_memory", lambda device, free=free: free)
        monkeypatch.setattr(torch_backend, "open_weights", None)
        with pytest.raises(OutOfMemory, match=f"are planned on cpu, .* are free; {words}") as error:
            open_backend(sprites.bundle, "cpu", 1, "torch")
        assert "\n" not in str(error.value)


def test_running_out_of_memory_is_one_clear_error(sprites, monkeypatch):
    def fail(given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(sprites.backend._modules, "decode_first", fail)
    latents = np.zeros((1, 128, 1, 8, 8), np.float32)
    with pytest.raises(OutOfMemory, match="out of memory on cpu .* were planned.*; .*"):
        sprites.backend.run("decode_first", {"latents": latents})


# Errors, and the command line.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cpu", None, "tensorflow"), "unknown backend 'tensorflow': choose one of onnxruntime, torch"),
        (("cpu", None, "onnxruntime", TorchOptions()), "they are for the backend torch"),
        (("tpu", None, "torch"), "unknown device 'tpu'"),
        (("cpu", None, "torch", TorchOptions(weights="nowhere")), "there is nothing at 'nowhere'"),
    ],
)
def test_bad_input_is_one_clear_error(sprites, arguments, words):
    with pytest.raises(InputError, match=words):
        open_backend(sprites.bundle, *arguments).load(())


def test_other_weights_are_refused(sprites, tiny, tmp_path):
    from conceptmaster.engine.checkpoints.safetensors_io import load_model, save_model

    folder = shutil.copytree(ROOT / "examples" / "sprites" / "weights", tmp_path / "weights")
    model = load_model(folder / "model.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    save_model(model, folder / "model.safetensors")
    with pytest.raises(InputError, match="are not those that the bundle .* was exported from"):
        open_backend(sprites.bundle, "cpu", 1, "torch", TorchOptions(weights=folder)).load(())
    with pytest.raises(InputError, match="are of another model than the bundle"):
        open_backend(sprites.bundle, "cpu", 1, "torch", TorchOptions(weights=tiny / "weights")).load(())


def test_a_bundle_without_weights_says_where_they_go(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "alone", ignore=shutil.ignore_patterns("weights"))
    backend = open_backend(Bundle.open(tmp_path / "alone"), "cpu", 1, "torch")
    with pytest.raises(InputError, match="found no weights .* with --weights, or put its model.safetensors"):
        backend.load(())


def test_int8_is_refused():
    with pytest.raises(InputError, match="is int8, the torch backend is for fp32 bundles"):
        open_backend(Bundle.open("sprites-int8"), "cpu", 1, "torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_gpu_is_said(sprites):
    with pytest.raises(InputError, match="device 'cuda' is not there: this is PyTorch .*"):
        open_backend(sprites.bundle, "cuda", None, "torch")


def test_a_wrong_shape_is_named(sprites):
    with pytest.raises(ValueError, match=r"decode_first: 'latents' must be float32 \[1, 128, 1, 8, 8\]"):
        sprites.backend.run("decode_first", {"latents": np.zeros((1, 128, 1, 8, 9), np.float32)})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dtype": "float8"}, "unknown dtype 'float8': choose one of float32, bfloat16"),
        ({"vae_dtype": "int8"}, "unknown vae_dtype 'int8': choose one of float32, bfloat16, float16"),
        ({"tier": "fast"}, "unknown tier 'fast': choose one of lossless, high"),
        ({"attention": "fast"}, "unknown attention 'fast': choose one of pytorch, "),
        ({"skip_guidance": 1.5}, "skip_guidance must be a number from 0 to 1, not 1.5"),
        ({"step_cache": float("nan")}, "step_cache must be a number from 0 to 1, not nan"),
        ({"lora": "a.safetensors"}, "lora and lora_scale must be tuples"),
        ({"step_cache": True}, "step_cache must be a number from 0 to 1, not True"),
    ],
)
def test_wrong_options_are_one_clear_error(given, words):
    with pytest.raises(InputError, match=words):
        TorchOptions(**given)


def test_options_name_what_the_engine_has():
    from conceptmaster.engine.fused import TIERS
    from conceptmaster.kernels.self_attention import WAYS
    from conceptmaster.runtime.backends.pytorch import options

    assert tuple(TIERS) == options.TIERS and WAYS == options.ATTENTIONS


def test_the_plan_and_lossy_options_are_said(sprites, caplog):
    with caplog.at_level(logging.INFO):
        open_backend(sprites.bundle, "cpu", None, "torch", TorchOptions(tier="high", skip_guidance=0.25))
    assert "planned peak memory" in caplog.text and "weights" in caplog.text
    assert "lossy: --tier high, --skip-guidance 0.25" in caplog.text


def generate(*arguments):
    command = [sys.executable, "-m", "conceptmaster", "generate", "--bundle", "sprites"]
    command += ["--request", str(REQUEST), *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True)


def test_the_command_line_generates(tmp_path, frames):
    done = generate(
        "--backend", "torch", "--steps", 4, "--threads", 1, "--output", tmp_path / "a.mp4", "--json",
        "--frames", tmp_path / "a.npy",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["bundle"] == "sprites"
    assert "planned peak memory" in done.stderr
    assert np.abs(np.load(tmp_path / "a.npy").astype(int) - frames).max() <= 1
    assert (tmp_path / "a.mp4").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--backend", "torch", "--skip-guidance", "2"),
            "skip_guidance must be a number from 0 to 1, not 2.0",
        ),
        (("--dtype", "bfloat16"), "they are for the backend torch"),
    ],
)
def test_the_command_line_refuses_in_one_line(tmp_path, arguments, words):
    done = generate(*arguments, "--output", tmp_path / "a.mp4")
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and len(done.stderr.splitlines()) == 1
