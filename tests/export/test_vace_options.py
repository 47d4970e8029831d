"""A VACE with what any base may be exported with: int8, fewer text tokens, a LoRA, for Triton's server."""

from __future__ import annotations

import importlib.util
import sys
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conceptmaster.runtime.bundle_format.manifest import load  # noqa: E402

pytestmark = pytest.mark.slow

PROMPT, NEGATIVE = "a red ball and two cats", "the rain"
WIDTH, HEIGHT, FRAMES, STEPS, GUIDANCE, SCALE = 48, 32, 5, 2, 5.0, 0.7
SIZE = ("--size", f"{WIDTH}x{HEIGHT}", "--frames", FRAMES, "--references", 1, "--quiet")
NOISE = np.random.default_rng(0).standard_normal((4, 3, HEIGHT // 8, WIDTH // 8), np.float32)
LAYERS = ("attn1.to_q", "attn2.to_v", "ffn.net.2")
SHARED = ("text_encoder", "encode_first", "encode", "decode_first", "decode")


@pytest.fixture(scope="module")
def image():
    from PIL import Image

    coarse = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def upstream(wan_parts):
    """diffusers' pipeline of tiny parts."""
    import diffusers
    from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_vace

    parts = wan_parts()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        plain = {k: v for k, v in parts["transformer"].config.items() if not k.startswith("_")}
        own = {"vace_layers": [0], "vace_in_channels": 2 * 4 + 64}
        transformer = diffusers.WanVACETransformer3DModel(**plain | own).eval()
        for parameter in transformer.parameters():
            torch.nn.init.normal_(parameter, mean=0.0, std=0.3)
        torch.nn.init.normal_(transformer.vace_patch_embedding.weight, std=1.5)
    pipeline = diffusers.WanVACEPipeline(**parts | {"transformer": transformer})
    pipeline.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:  # which needs ftfy
        patch.setattr(pipeline_wan_vace, "prompt_clean", pipeline_wan.prompt_clean)
        yield pipeline


@pytest.fixture(scope="module")
def folder(upstream, tmp_path_factory):
    """As diffusers saves it, and beside it a LoRA, of VACE's own blocks, too."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("pipelines") / "tiny-vace"
    upstream.save_pretrained(folder, safe_serialization=True)
    g, tensors = torch.Generator().manual_seed(3), {}
    for block in ("blocks.0", "blocks.1", "vace_blocks.0"):
        for layer in LAYERS:
            o, i = upstream.transformer.get_submodule(f"{block}.{layer}").weight.shape
            tensors[f"transformer.{block}.{layer}.lora_A.weight"] = torch.randn(3, i, generator=g) * 0.3
            tensors[f"transformer.{block}.{layer}.lora_B.weight"] = torch.randn(o, 3, generator=g) * 0.3
    save_file(tensors, folder.parent / "lora.safetensors")
    return folder


@pytest.fixture(scope="module")
def bundle(folder, tmp_path_factory):
    from conceptmaster.cli import main

    place = tmp_path_factory.mktemp("bundles") / "plain"
    assert main([str(a) for a in ("export", folder, "--output", place, *SIZE)]) == 0
    return place


@pytest.fixture(scope="module")
def expected(upstream, folder, image):
    """Its frames, before it gets the LoRA."""
    return frames_of(upstream, image)


def frames_of(pipeline, image):
    texts = {"prompt": PROMPT, "negative_prompt": NEGATIVE}
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    how = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}
    latents = torch.from_numpy(NOISE)[None]
    return 255 * pipeline(reference_images=[image], latents=latents, **texts, **size, **how).frames[0]


@pytest.fixture
def exported(folder, bundle, taken_from, command, tmp_path):
    """`exported(*options)`: a bundle, whose other graphs are those of `bundle`."""

    def build(*options, shared=SHARED):
        with taken_from(bundle, *shared):
            code, _, err = command("export", folder, "--output", tmp_path / "new", *SIZE, *options)
        assert (code, err) == (0, "")
        return tmp_path / "new"

    return build


def test_fewer_text_tokens_give_the_same_frames(folder, exported, generated, expected, image):
    made = exported("--text-tokens", 40, shared=SHARED[1:])
    assert load(made).whole_text == 512
    assert expected.std() > 5
    assert abs(generated(made, [image], NOISE) - expected).max() <= 1.0
    found = generated(made, [image], NOISE, "--backend", "torch", "--weights", folder)
    assert abs(found - expected).max() <= 1.0


def test_int8(folder, exported, generated, expected, image, command):
    made = exported("--int8")
    assert load(made).precision == "int8"
    code, out, err = command("verify", made, "--source", folder)
    assert (code, err, out.count(" ok\n")) == (0, "", 7)
    difference = abs(generated(made, [image], NOISE) - expected)
    assert 0 < difference.mean() < expected.std() / 4


def test_a_lora_of_its_own_blocks_too(folder, upstream, exported, generated, expected, image, command):
    lora = ("--lora", folder.parent / "lora.safetensors", "--lora-scale", SCALE)
    made = exported(*lora)
    assert command("verify", made, "--source", folder, *lora)[0] == 0
    pytest.importorskip("peft")
    upstream.load_lora_weights(str(folder.parent / "lora.safetensors"))
    try:
        upstream.fuse_lora(lora_scale=SCALE)
        fused = frames_of(upstream, image)
    finally:
        upstream.unfuse_lora()
        upstream.unload_lora_weights()
    assert abs(fused - expected).mean() > 2  # it shows
    assert abs(generated(made, [image], NOISE) - fused).max() <= 1.0


def test_triton_s_server(bundle, tmp_path, command, image, monkeypatch):
    """The model around the graphs, under a fake of the server that runs them."""
    import onnxruntime

    from conceptmaster import Concept, Pipeline

    code, _, err = command("export-triton", bundle, tmp_path / "models")
    assert (code, err) == (0, "")
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"conceptmaster", *load(bundle).graphs}
    server = types.ModuleType("triton_python_backend_utils")

    class Tensor:
        def __init__(self, name, array):
            self.name, self.array = lambda: name, array

        def as_numpy(self):
            return self.array

        @classmethod
        def from_dlpack(cls, name, other):
            return cls(name, other.array)

    class Response:
        def __init__(self, tensors, error=None):
            self.tensors, self.error = tensors, error

        def has_error(self):
            return self.error is not None

    class Request:
        def __init__(self, model_name, requested_output_names, inputs):
            self.given = model_name, requested_output_names, {t.name(): t.as_numpy() for t in inputs}

        def exec(self):
            name, names, inputs = self.given
            path = tmp_path / "models" / name / "1" / "model.onnx"
            found = onnxruntime.InferenceSession(str(path)).run(names, inputs)
            return Response([Tensor(n, value) for n, value in zip(names, found, strict=True)])

    server.Tensor, server.InferenceResponse, server.InferenceRequest = Tensor, Response, Request
    server.TritonError = str
    server.get_output_tensor_by_name = lambda response, name: next(
        t for t in response.tensors if t.name() == name
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server)
    monkeypatch.delitem(sys.modules, "conceptmaster.runtime.backends.triton_server", raising=False)
    path = tmp_path / "models" / "conceptmaster" / "1" / "model.py"
    spec = importlib.util.spec_from_file_location("model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({"model_repository": str(path.parents[1]), "model_version": "1"})
    given = {"PROMPT": [PROMPT.encode()], "LABELS": [b"ball"], "PICTURES": np.asarray(image)[None]}
    given |= {"SEED": [3], "STEPS": [1]}
    tensors = [Tensor(name, np.array(value)) for name, value in given.items()]
    (answer,) = model.execute([types.SimpleNamespace(inputs=lambda: tensors)])
    assert answer.error is None
    with Pipeline.from_bundle(bundle, threads=1) as pipeline:
        frames = pipeline(PROMPT, [Concept("ball", image)], seed=3, steps=1).frames
    found = answer.tensors[0].as_numpy()
    assert found.shape == frames.shape and abs(found.astype(int) - frames).max() <= 1
    model.execute([])
