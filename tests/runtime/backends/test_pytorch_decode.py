"""Decoding on the torch backend: several latent frames a call, replayed, in 16 bits, and its memory."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from conceptmaster.engine.config import ModelConfig  # noqa: E402
from conceptmaster.engine.presets import preset  # noqa: E402
from conceptmaster.engine.vae.wan_decoder import build_vae  # noqa: E402
from conceptmaster.engine.vae.wan_fused import FusedDecoder  # noqa: E402
from conceptmaster.errors import GenerationError  # noqa: E402
from conceptmaster.runtime.backends import open_backend  # noqa: E402
from conceptmaster.runtime.backends.pytorch import memory_plan  # noqa: E402
from conceptmaster.runtime.backends.pytorch.causal import causal_half  # noqa: E402
from conceptmaster.runtime.backends.pytorch.options import TorchOptions  # noqa: E402
from conceptmaster.runtime.bundle_format.find import Bundle  # noqa: E402
from conceptmaster.runtime.pipeline import Pipeline  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle without graphs, of the tiny preset and seven latent frames, with its weights inside."""
    pytest.importorskip("onnxscript")
    from conceptmaster.engine.checkpoints.safetensors_io import save, save_model
    from conceptmaster.engine.checkpoints.source import random_source
    from conceptmaster.export.bundle import write_bundle

    folder = tmp_path_factory.mktemp("decode") / "tiny"
    source = random_source(dataclasses.replace(preset("tiny"), frames=25))
    write_bundle(source, folder, with_graphs=False)
    (folder / "weights").mkdir()
    save_model(source.model, folder / "weights" / "model.safetensors")
    save(folder / "weights" / "vae.safetensors", source.vae.state_dict())
    return folder


def opened(folder, **options):
    bundle = Bundle.open(folder)
    backend = open_backend(bundle, "cpu", 1, "torch", TorchOptions(**options))
    return Pipeline(bundle, backend)


@pytest.fixture(scope="module")
def latents(folder):
    shape = Bundle.open(folder).manifest.shapes.latent
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def test_the_video_is_the_same_however_many_latent_frames_a_call_takes(folder, latents):
    pipeline, videos = opened(folder), []
    for count in (1, 2, 4):
        backend = pipeline.backend
        backend._demand = dataclasses.replace(backend._demand, latent_frames=count)
        seen, steps, run = [], [], backend.run

        def watched(graph, inputs, run=run, seen=seen):
            seen.append((graph, inputs["latents"].shape[2]))
            return run(graph, inputs)

        backend.run = watched
        videos.append(pipeline._decode(latents, lambda steps=steps: steps.append(1)).astype(int))
        backend.run = run
        calls = [count] * (6 // count) + [6 % count] * (6 % count > 0)
        assert seen == [("decode_first", 1), *(("decode", n) for n in calls)] and len(steps) == 7
    assert videos[0].shape[0] == 25 and videos[0].std() > 5
    assert all(abs(video - videos[0]).max() <= 1 for video in videos)


def test_replayed_calls_give_the_same(folder, latents, pretend, assert_close):
    """Captured once for each length, with two videos' calls in turn."""
    backend, captures = opened(folder).backend, []
    module = FusedDecoder(build_vae(ModelConfig.from_dict(backend._manifest.model)))
    signature = backend._manifest.graphs["decode"]
    with torch.inference_mode():
        plain, replayed = (causal_half(signature, module, how) for how in (None, pretend(captures)))
        names = [spec.name for spec in signature.inputs]
        videos = [torch.from_numpy(latents[None]), torch.from_numpy(latents[None]).flip(2)]
        states = [module(video[:, :, :1])[1:] for video in videos]
        for start, end in ((1, 5), (5, 7)):
            for index, video in enumerate(videos):
                named = dict(zip(names, (video[:, :, start:end], *states[index]), strict=True))
                found, right = replayed(named), plain(named)
                for name in right:
                    assert_close(found[name], right[name])
                states[index] = [value for name, value in found.items() if name != "frames"]
    assert len(captures) == 2


@pytest.mark.parametrize(("dtype", "far"), [("float16", 2), ("bfloat16", 16)])
def test_sixteen_bits_are_near(folder, latents, dtype, far):
    """In grey levels; measured: 1 and 10, of white noise through random weights."""
    exact = opened(folder)._decode(latents, lambda: None).astype(int)
    found = opened(folder, vae_dtype=dtype)._decode(latents, lambda: None)
    assert found.dtype == np.uint8 and 0 < abs(found - exact).max() <= far


def test_frames_that_are_not_finite_are_an_error_that_names_the_option(folder):
    words_by_dtype = {"float16": "not finite; --vae-dtype bfloat16 or float32", "float32": "not finite$"}
    for dtype, words in words_by_dtype.items():
        backend = opened(folder, vae_dtype=dtype).backend
        frames = torch.tensor([0.0, float("nan"), 0.5])
        with pytest.raises(GenerationError, match=words):
            backend.to_pixels(frames)
    found = backend.to_pixels(torch.tensor([-0.5, 0.0, 0.5 / 255, 1.5 / 255, 1.0, 1.5]))
    assert found.tolist() == [0, 0, 0, 2, 255, 255] and found.dtype == np.uint8


def test_the_lengths_of_other_axes_are_still_checked(folder, latents):
    backend = opened(folder).backend
    with pytest.raises(ValueError, match=r"decode: 'latents' must be float32 \[1, 4, 3, "):
        backend._to_device(latents[None, :, 1:4, :3], "decode", backend._manifest.graphs["decode"].inputs[0])


@pytest.mark.parametrize("residual", [False, True])
def test_the_plan_holds_what_decoding_keeps_alive(folder, residual, peak_memory):
    backend = opened(folder).backend
    shape = {"is_residual": True, "dim_mult": [1, 2, 4, 4], "scale_factor_spatial": 16}
    shape |= {"num_res_blocks": 2, "temperal_downsample": [False, True, True]}
    vae = {**backend._manifest.model["vae"], **(shape if residual else {})}
    latent = backend._manifest.shapes.latent
    side = 4 * vae["scale_factor_spatial"]
    decoder = FusedDecoder(build_vae(dataclasses.replace(preset("tiny"), vae=vae, height=side, width=side)))
    shapes = dataclasses.replace(
        backend._manifest.shapes, latent=(*latent[:2], 4, 4), height=side, width=side
    )
    with torch.inference_mode():
        latents = torch.randn(1, latent[0], 5, 4, 4)
        _, *states = decoder(latents[:, :, :1])
        for count in memory_plan.AT_ONCE:
            given = latents[:, :, 1 : 1 + count].contiguous()
            with peak_memory([*decoder.parameters(), *decoder.buffers(), given]) as mode:
                decoder(given, *states)
            demand = dataclasses.replace(
                backend._demand,
                model={**backend._manifest.model, "vae": vae},
                shapes=shapes,
                states=sum(state.numel() for state in states),
                latent_frames=count,
            )
            before = 4 * demand.states  # which were made outside
            assert 0.7 < (mode.most + before) / memory_plan.plan(demand)["decode"] < 1.2


def test_as_many_latent_frames_a_call_as_there_is_memory_for(folder):
    demand = opened(folder).backend._demand
    peaks = {n: memory_plan.plan(dataclasses.replace(demand, latent_frames=n))["peak"] for n in (1, 2, 4)}
    for free, count in ((None, 4), (peaks[4], 4), (peaks[4] - 1, 2), (peaks[2] - 1, 1), (0, 1)):
        assert demand.fastest(free).latent_frames == count
    large = dataclasses.replace(demand, graphs=True)
    assert large.captured and not dataclasses.replace(large, latent_frames=1).captured
    kept = memory_plan.plan(large)["decode"] - memory_plan.plan(demand)["decode"]
    assert kept == 2 * 4 * demand.states
    half = memory_plan.plan(dataclasses.replace(demand, vae_dtype="float16"))
    assert all(half[name] < memory_plan.plan(demand)[name] for name in ("decode", "weights"))
