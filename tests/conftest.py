"""What all tests share: one table of tolerances, and one way to use it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conceptmaster.kernels.tolerances import TOLERANCES

# Triton decides when a kernel is defined whether its interpreter runs it, so before any test imports one. In
# the tests it always does: `make gpu` checks the kernels on a GPU.
os.environ["TRITON_INTERPRET"] = "1"
# Tests of graphs import ONNX Runtime themselves: see runtime/backends/onnxruntime_module.py.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"


def _array(value: Any) -> np.ndarray:
    """A NumPy array of anything array-like; tensors of any dtype, device and gradient."""
    return value.detach().cpu().double().numpy() if hasattr(value, "detach") else np.asarray(value)


@pytest.fixture(scope="session")
def tolerances() -> dict[str, tuple[float, float]]:
    """The table: dtype name to (relative, absolute)."""
    return TOLERANCES


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """`assert_close(actual, expected, dtype="float32")`: same shape, and close by the table's row."""

    def check(actual: Any, expected: Any, dtype: Any = "float32") -> None:
        relative, absolute = TOLERANCES[str(dtype).removeprefix("torch.")]
        actual, expected = _array(actual), _array(expected)
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=relative, atol=absolute)

    return check


@pytest.fixture(scope="session")
def wan_parts() -> Callable[..., dict[str, Any]]:
    """`wan_parts(seed=0)`: the parts of a tiny WanPipeline by its argument names, with random weights."""

    def build(seed: int = 0) -> dict[str, Any]:
        torch = pytest.importorskip("torch")
        diffusers = pytest.importorskip("diffusers")
        from transformers.models.umt5.configuration_umt5 import UMT5Config
        from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tokenizer = _tokenizer()
            text_encoder = UMT5EncoderModel(
                UMT5Config(vocab_size=320, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
            )
            transformer = diffusers.WanTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=24,
                freq_dim=16,
                ffn_dim=48,
                num_layers=2,
            )
            vae = diffusers.AutoencoderKLWan(
                base_dim=16,  # of 4 channels there may be nearly nothing, whose norm is mostly rounding
                z_dim=4,
                dim_mult=[1, 1, 2, 2],
                num_res_blocks=1,
                latents_mean=[0.3, -0.2, 0.1, 0.0],
                latents_std=[1.5, 0.7, 1.0, 2.0],
            )
            for module in (transformer, text_encoder):  # far enough from nothing to show in the pixels
                for parameter in module.parameters():
                    torch.nn.init.normal_(parameter, mean=0.0, std=0.3)
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        return {
            "tokenizer": tokenizer,
            "text_encoder": text_encoder.eval(),
            "transformer": transformer.eval(),
            "vae": vae.eval(),
            "scheduler": scheduler,
        }

    return build


@pytest.fixture(scope="session")
def image_to_video_parts(wan_parts: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`image_to_video_parts(positions=None)`: those of a tiny WanImageToVideoPipeline; positions: the
    transformer's pos_embed_seq_len. A picture has 5 tokens."""

    def build(positions: int | None = None) -> dict[str, Any]:
        import diffusers
        import torch
        from transformers.models.clip.configuration_clip import CLIPVisionConfig
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        from transformers.models.clip.modeling_clip import CLIPVisionModel

        parts = wan_parts()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            plain = {k: v for k, v in parts["transformer"].config.items() if not k.startswith("_")}
            own = {"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 24}
            transformer = diffusers.WanTransformer3DModel(**plain | own | {"pos_embed_seq_len": positions})
            sizes = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
            widths = {"hidden_size": 16, "intermediate_size": 32, "projection_dim": 8}
            clip = CLIPVisionModel(CLIPVisionConfig(**sizes, **widths))
            for parameter in [*transformer.parameters(), *clip.parameters()]:
                torch.nn.init.normal_(parameter, mean=0.0, std=0.3)
            torch.nn.init.normal_(transformer.patch_embedding.weight, std=1.5)  # pictures show in the pixels
            for block in transformer.blocks:
                torch.nn.init.normal_(block.attn2.add_v_proj.weight, std=3.0)
        square = {"height": 16, "width": 16}
        processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square)
        more = {"image_encoder": clip.eval(), "image_processor": processor}
        return parts | {"transformer": transformer.eval()} | more

    return build


def _tokenizer() -> Any:
    """Pieces as T5's tokenizers have them, words before letters: pad 0, end 1, unknown 2. Not trained: that
    gives other pieces each time."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = (
        "▁a ▁red ▁ball ▁rolls ▁to ▁the ▁left ▁and ▁two ▁quick ▁cats ▁run ▁up ▁over ▁rain ▁sky in ed s".split()
    )
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789&<>.,;!?'"))
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    pieces += [(word, -2.0) for word in words] + [(letter, -8.0) for letter in letters if letter != "s"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="session")
def wan_folder(wan_parts: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts of `wan_parts(0)` saved as diffusers saves them, and a CLIP. Not to be changed: copy it."""
    from transformers.models.clip.configuration_clip import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("wan") / "tiny-wan"
    for name, part in wan_parts().items():
        part.save_pretrained(folder / name)
    clip = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    CLIPVisionModelWithProjection(clip).save_pretrained(folder / "image_encoder")
    return folder


@pytest.fixture(scope="session")
def with_own_grids() -> Callable[..., Any]:
    """`with_own_grids(transformer, latents, pictures, sources, time, text)`: the velocity as Bernini's own
    program has it, by the modules of diffusers' WanTransformer3DModel: pictures' latents [1,C,1,h,w], each
    embedded by itself, their tokens in front of the video's and behind the last block left out; of each the
    rotary table of a grid of its own, as complex numbers of float32, times the phase of its source."""
    import torch

    def rows(transformer: Any, latents: Any, source: float) -> Any:
        head, (pf, ph, pw) = transformer.config.attention_head_dim, transformer.config.patch_size
        frames, height, width = latents.shape[2] // pf, latents.shape[3] // ph, latents.shape[4] // pw
        side = 2 * (head // 6)
        tables = []
        for axis, (length, dim) in enumerate(
            zip((frames, height, width), (head - 2 * side, side, side), strict=True)
        ):
            angles = torch.outer(torch.arange(length).float(), 1 / 10000 ** (torch.arange(0, dim, 2) / dim))
            shape = [1, 1, 1, dim // 2]
            shape[axis] = length
            table = torch.polar(torch.ones_like(angles), angles).view(shape)
            tables.append(table.expand(frames, height, width, -1))
        phase = float(source) / 10000 ** (torch.arange(0, head, 2) / head)
        return torch.cat(tables, dim=-1).flatten(0, 2) * torch.polar(torch.ones_like(phase), phase)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def forward(transformer: Any, latents: Any, pictures: Any, sources: Any, time: Any, text: Any) -> Any:
        every = [*pictures, latents]
        tokens = [transformer.patch_embedding(part).flatten(2).transpose(1, 2) for part in every]
        numbers = [*sources, 0.0]
        table = torch.cat([rows(transformer, p, n) for p, n in zip(every, numbers, strict=True)])
        rotary = [part.repeat_interleave(2, dim=1)[None, :, None] for part in (table.real, table.imag)]
        x = torch.cat(tokens, dim=1)
        temb, projected, text, _ = transformer.condition_embedder(time, text, None)
        for block in transformer.blocks:
            x = block(x, text, projected.unflatten(1, (6, -1)), tuple(rotary))
        shift, scale = (transformer.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        x = transformer.proj_out((transformer.norm_out(x.float()) * (1 + scale) + shift).type_as(x))
        pf, ph, pw = transformer.config.patch_size
        f, h, w = latents.shape[2] // pf, latents.shape[3] // ph, latents.shape[4] // pw
        x = x[:, -f * h * w :].reshape(1, f, h, w, pf, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    return forward
