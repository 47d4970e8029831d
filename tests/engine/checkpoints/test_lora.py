from __future__ import annotations

import copy
import json
import re

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.engine.checkpoints.lora import merge_lora  # noqa: E402
from conceptmaster.engine.checkpoints.safetensors_io import save  # noqa: E402
from conceptmaster.engine.checkpoints.wan_names import wan_name  # noqa: E402
from conceptmaster.engine.dit import ConceptDiT  # noqa: E402
from conceptmaster.errors import WeightsError  # noqa: E402

BLOCK = "blocks.1"
# Of everything that carries a LoRA in the public files: diffusers' name and Wan2.1's.
LAYERS = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}
for block in ("blocks.0", BLOCK):
    for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn")):
        for name in "qkv":
            LAYERS[f"{block}.{ours}.to_{name}"] = f"{block}.{theirs}.{name}"
        LAYERS[f"{block}.{ours}.to_out.0"] = f"{block}.{theirs}.o"
    LAYERS[f"{block}.ffn.net.0.proj"] = f"{block}.ffn.0"
    LAYERS[f"{block}.ffn.net.2"] = f"{block}.ffn.2"


@pytest.fixture(scope="module")
def config(tiny):
    return tiny(position_channels=0)


@pytest.fixture
def model(config, randomise):
    return randomise(ConceptDiT(config))


@pytest.fixture
def wan(config, model):
    """diffusers' transformer with the same base weights."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    names = "patch_size num_attention_heads attention_head_dim in_channels out_channels text_dim freq_dim"
    names += " ffn_dim num_layers cross_attn_norm eps rope_max_seq_len"
    wan = diffusers.WanTransformer3DModel(
        **{name: getattr(config.transformer, name) for name in names.split()}
    )
    base = {key: value for key, value in model.state_dict().items() if key not in model.concept_keys()}
    wan.load_state_dict(base)
    return wan.eval()


def pair(weight, rank=3, seed=0):
    """A random (down, up) for a weight; of a convolution the down keeps the kernel."""
    g = torch.Generator().manual_seed(seed + weight.shape[0] * 7 + weight.shape[1])
    ones = (1,) * (weight.ndim - 2)
    down = torch.randn(rank, *weight.shape[1:], generator=g) * 0.3
    return down, torch.randn(weight.shape[0], rank, *ones, generator=g) * 0.3


def copy_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def diffusers_file(model, tmp_path, alpha=None, layers=(*LAYERS, "patch_embedding")):
    """A LoRA as diffusers' pipelines write it, with alpha in the metadata."""
    state, tensors = model.state_dict(), {}
    for i, layer in enumerate(layers):
        down, up = pair(state[f"{layer}.weight"], rank=2 + i % 3, seed=i)
        tensors |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
    metadata = {}
    if alpha is not None:
        values = {
            "r": 2,
            "lora_alpha": alpha,
            "target_modules": list(layers),
            "rank_pattern": {layer: 2 + i % 3 for i, layer in enumerate(layers)},
            "alpha_pattern": {"blocks.1.attn1.to_q": 5.0, r"blocks\.\d+\.attn2\.to_v": 0.5},
            "use_rslora": alpha == 7,
        }
        values = {f"transformer.{key}": value for key, value in values.items()}
        metadata["lora_adapter_metadata"] = json.dumps(values)
    save(tmp_path / "lora.safetensors", tensors, metadata)


def wan_file(model, tmp_path, style, layers=LAYERS):
    """A LoRA as the step-distilled ones are: Wan2.1's names, alphas, biases, the head's whole difference."""
    state, tensors = model.state_dict(), {}
    down_key, up_key = ("lora_A", "lora_B") if style == "A and B" else ("lora_down", "lora_up")
    for i, (ours, theirs) in enumerate(layers.items()):
        if style == "kohya":
            if not ours.startswith("blocks"):
                continue  # diffusers reads only blocks there
            name = "lora_unet_" + theirs.replace(".", "_")
        else:
            name = "diffusion_model." + theirs
        weight = state[f"{ours}.weight"]
        rank = weight.shape[0] if ours == "proj_out" else 3  # diffusers' reading of head.head.diff
        if style == "differences" and ours == "proj_out":
            tensors[f"{name}.diff"] = torch.randn(weight.shape) * 0.3
        else:
            down, up = pair(weight, rank, seed=i)
            tensors |= {f"{name}.{down_key}.weight": down, f"{name}.{up_key}.weight": up}
        if style == "kohya" or (style == "alpha" and ours.startswith("blocks")):
            tensors[f"{name}.alpha"] = torch.tensor(1.0 + i)
        if style == "differences":
            tensors[f"{name}.diff_b"] = torch.randn(weight.shape[0]) * 0.3
    save(tmp_path / "lora.safetensors", tensors)


FILES = {
    "no alpha": lambda *a: diffusers_file(*a),
    "metadata": lambda *a: diffusers_file(*a, alpha=6),
    "rslora": lambda *a: diffusers_file(*a, alpha=7),
    "A and B": lambda *a: wan_file(*a, "A and B"),
    "alpha": lambda *a: wan_file(*a, "alpha"),
    "differences": lambda *a: wan_file(*a, "differences"),
    "kohya": lambda *a: wan_file(*a, "kohya"),
}


@pytest.mark.parametrize("scale", [1.0, -0.6])
@pytest.mark.parametrize("file", FILES)
def test_merging_equals_diffusers_loading_and_fusing(config, model, wan, file, scale, tmp_path, assert_close):
    from diffusers import WanPipeline

    FILES[file](model, tmp_path)
    loaded, metadata = WanPipeline.lora_state_dict(
        str(tmp_path), weight_name="lora.safetensors", local_files_only=True, return_lora_metadata=True
    )
    WanPipeline.load_lora_into_transformer(loaded, wan, adapter_name="lora", metadata=metadata)
    wan.fuse_lora(lora_scale=scale)
    wan.unload_lora()

    before = copy_of(model)
    report = merge_lora(model, tmp_path / "lora.safetensors", scale)
    after, expected = model.state_dict(), wan.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == set(report.names) and not changed & model.concept_keys()
    assert changed == {name for name, value in expected.items() if not torch.equal(value, before[name])}
    for name, value in expected.items():
        assert_close(after[name], value)

    g = torch.Generator().manual_seed(1)
    c = config.concept
    latents = torch.randn(1, *config.latent_shape, generator=g)
    text = torch.randn(1, config.text_tokens, config.transformer.text_dim, generator=g)
    concepts = torch.zeros(1, c.max_concepts, c.tokens_per_concept, c.width)
    time, mask = torch.tensor([500.0]), torch.zeros(1, c.max_concepts, dtype=torch.bool)
    with torch.no_grad():
        video = model(latents, time, text, concepts, mask)
        wanted = wan(latents, time, text, return_dict=False)[0]
    unit = wanted.abs().max()
    assert_close(video / unit, wanted / unit)


IMAGE_LAYERS = LAYERS | {
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    **{
        f"blocks.{i}.attn2.add_{name}_proj": f"blocks.{i}.cross_attn.{name}_img"
        for i in range(2)
        for name in "kv"
    },
}


@pytest.mark.parametrize("style", ["diffusers", "A and B", "alpha", "differences"])
def test_merging_into_an_image_to_video_base(tiny_base, randomise, style, tmp_path, assert_close):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    config = tiny_base("first_last", 2, True)
    own = {"position_channels", "prediction"}
    fields = {k: v for k, v in config.to_dict()["transformer"].items() if k not in own}
    wan, model = randomise(diffusers.WanTransformer3DModel(**fields)), ConceptDiT(config)
    model.load_state_dict(wan.state_dict())
    if style == "diffusers":
        diffusers_file(model, tmp_path, layers=IMAGE_LAYERS)
    else:
        wan_file(model, tmp_path, style, IMAGE_LAYERS)
    path = tmp_path / "lora.safetensors"
    loaded = diffusers.WanPipeline.lora_state_dict(
        str(tmp_path), weight_name=path.name, local_files_only=True
    )
    diffusers.WanPipeline.load_lora_into_transformer(loaded, wan, adapter_name="lora")
    wan.fuse_lora(lora_scale=0.7)
    wan.unload_lora()
    before = copy_of(model)
    report = merge_lora(model, path, 0.7)
    assert {f"{layer}.weight" for layer in IMAGE_LAYERS} <= set(report.names)
    after = model.state_dict()
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} == set(
        report.names
    )
    for name, value in wan.state_dict().items():
        assert_close(after[name], value)


@pytest.mark.parametrize(("positions", "pictures"), [(False, 1), (True, 2)])
def test_image_to_video_tensors_have_the_names_that_wan_gave_them(tiny_base, positions, pictures):
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    model = ConceptDiT(tiny_base("first_last" if positions else "first", pictures, positions))
    check_names(model.state_dict(), convert_wan_transformer_to_diffusers)


@pytest.mark.filterwarnings("ignore:Adapter .* invalid shape")  # PEFT takes its own biases for shards
def test_a_file_that_diffusers_saved(model, wan, tmp_path, assert_close):
    from peft import LoraConfig

    wan.add_adapter(LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "net.2"], lora_bias=True))
    g = torch.Generator().manual_seed(0)
    for name, parameter in wan.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=g) * 0.3
    wan.save_lora_adapter(tmp_path, weight_name="lora.safetensors")
    wan.fuse_lora(lora_scale=0.5)
    wan.unload_lora()
    report = merge_lora(model, tmp_path / "lora.safetensors", 0.5)
    assert len(report.names) == 12 and report.ranks == (2,)
    after = model.state_dict()
    for name, value in wan.state_dict().items():
        assert_close(after[name], value)


def check_names(keys, convert):
    """`convert`, diffusers' own, leads from our spelling of Wan2.1's names back to `keys`."""
    original = {}
    for key in keys:
        module, dot, kind = key.rpartition(".")
        if kind not in ("weight", "bias"):
            module, dot, kind = key, "", ""
        original[f"{wan_name(module)}{dot}{kind}"] = key
    assert len(original) == len(keys) and f"{BLOCK}.norm3.weight" in original
    unlike = {key for key, value in convert(original).items() if key != value}
    assert unlike <= {"img_emb.emb_pos"}  # which that function does not know: no LoRA is for a table


def test_every_tensor_has_the_name_that_wan_gave_it(config, model):
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    check_names(set(model.state_dict()) - model.concept_keys(), convert_wan_transformer_to_diffusers)
    assert {wan_name(ours) for ours in LAYERS} == set(LAYERS.values())


SPELLINGS = [
    "transformer.blocks.1.attn1.to_out.0.lora_{}.weight",
    "blocks.1.attn1.to_out.0.lora_{}.weight",
    "base_model.model.blocks.1.attn1.to_out.0.lora_{}.weight",
    "diffusion_model.blocks.1.self_attn.o.lora_{}.weight",
    "model.diffusion_model.blocks.1.self_attn.o.lora_{}.weight",
    "blocks.1.self_attn.o.lora_{}.weight",
    "lora_unet_blocks_1_self_attn_o.lora_{}.weight",
    "lora_unet_blocks_1_attn1_to_out_0.lora_{}.weight",
    "lora_unet__blocks_1_self_attn_o.lora_{}.weight",  # VideoX-Fun
    "pipe.dit.blocks.1.self_attn.o.lora_{}.weight",  # DiffSynth-Studio
    "lycoris_blocks_1_attn1_to_out_0.lora_{}.weight",
    "diffusion_model.blocks.1.self_attn.o.lora_{}",
]
ADAPTER_SPELLINGS = [  # PEFT names its adapters where they are not saved through PEFT
    "base_model.model.transformer.blocks.1.attn1.to_out.0.lora_{}.default.weight",
    "blocks.1.self_attn.o.lora_{}.default.weight",
    "transformer.blocks.1.attn1.to_out.0.lora_{}.my-adapter.weight",
]
OLD_SPELLINGS = [  # of diffusers, and of transformers
    "transformer.blocks.1.attn1.to_out.0.lora.{}.weight",
    "diffusion_model.blocks.1.self_attn.o_lora.{}.weight",
    "blocks.1.attn1.to_out.0.lora_linear_layer.{}.weight",
]


@pytest.mark.parametrize(
    ("name", "ends"),
    [(name, ends) for name in SPELLINGS for ends in ("AB", ("down", "up"))]
    + [(name, "AB") for name in ADAPTER_SPELLINGS]
    + [(name, ("down", "up")) for name in OLD_SPELLINGS],
)
def test_one_layer_in_every_spelling(model, tmp_path, assert_close, name, ends):
    before = copy_of(model)
    target = "blocks.1.attn1.to_out.0.weight"
    down, up = pair(before[target])
    tensors = {name.format(ends[0]): down, name.format(ends[1]): up}
    tensors[re.split(r"[._]lora[._]", name)[0] + ".alpha"] = torch.tensor([6.0])
    save(tmp_path / "lora.safetensors", tensors)
    report = merge_lora(model, tmp_path / "lora.safetensors", 0.5)
    assert report.names == (target,) and report.ranks == (3,)
    assert "at scale 0.5: 1 tensors changed, rank 3" in str(report)
    after = model.state_dict()
    assert_close(after.pop(target), before[target] + 0.5 * (6.0 / 3) * up @ down)
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_whole_differences(model, tmp_path, assert_close):
    before = copy_of(model)
    targets = {
        "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
        "diffusion_model.patch_embedding.diff_b": "patch_embedding.bias",
        "diffusion_model.blocks.1.norm3.diff": "blocks.1.norm2.weight",
        "diffusion_model.blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
        "diffusion_model.blocks.0.cross_attn.norm_q.diff": "blocks.0.attn2.norm_q.weight",
        "diffusion_model.blocks.0.self_attn.norm_k.diff": "blocks.0.attn1.norm_k.weight",
        "diffusion_model.blocks.1.diff_m": "blocks.1.scale_shift_table",
        "diffusion_model.blocks.0.modulation.diff": "blocks.0.scale_shift_table",
        "diffusion_model.head.diff_m": "scale_shift_table",
        "diffusion_model.time_embedding.2.diff_b": "condition_embedder.time_embedder.linear_2.bias",
    }
    tensors = {key: torch.randn_like(before[name]) for key, name in targets.items()}
    save(tmp_path / "lora.safetensors", tensors)
    report = merge_lora(model, tmp_path / "lora.safetensors", 2.0)
    assert report.names == tuple(sorted(targets.values())) and report.ranks == ()
    after = model.state_dict()
    for key, name in targets.items():
        assert_close(after.pop(name), before[name] + 2.0 * tensors[key])
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_a_pair_a_difference_and_alphas_of_one_layer(model, tmp_path, assert_close):
    before = copy_of(model)
    name, layer = "diffusion_model.blocks.0.ffn.0", "blocks.0.ffn.net.0.proj"
    down, up = pair(before[f"{layer}.weight"])
    extra, bias, up_bias = torch.randn_like(before[f"{layer}.weight"]), *torch.randn(2, up.shape[0])
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": torch.tensor(1.5)}
    tensors |= {f"{name}.diff": extra, f"{name}.diff_b": bias, f"{name}.lora_B.bias": up_bias}
    save(tmp_path / "lora.safetensors", tensors)
    merge_lora(model, tmp_path / "lora.safetensors")
    after = model.state_dict()
    assert_close(after[f"{layer}.weight"], before[f"{layer}.weight"] + 0.5 * up @ down + extra)
    assert_close(after[f"{layer}.bias"], before[f"{layer}.bias"] + 0.5 * up_bias + bias)


def test_alpha_in_the_file_that_peft_writes_beside(model, tmp_path, assert_close):
    before = copy_of(model)
    target = "blocks.0.attn1.to_q.weight"
    down, up = pair(before[target])
    prefix = "base_model.model.blocks.0.attn1.to_q.lora"
    path = tmp_path / "adapter_model.safetensors"
    save(path, {f"{prefix}_A.weight": down, f"{prefix}_B.weight": up})
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 6, "alpha_pattern": null}')
    merge_lora(model, path)
    assert_close(model.state_dict()[target], before[target] + 2 * up @ down)
    for wrong in ("{", "[]", '{"lora_alpha": "six"}', '{"lora_alpha": 1, "alpha_pattern": {"(": 1}}'):
        (tmp_path / "adapter_config.json").write_text(wrong)
        with pytest.raises(WeightsError, match=r"adapter_config\.json has no usable LoRA configuration"):
            merge_lora(model, path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back_and_nothing_at_all(model, tmp_path, assert_close, dtype):
    model = model.to(dtype)
    state = model.state_dict()
    state["proj_out.weight"][0, 0] = -0.0
    before = {name: value.clone() for name, value in state.items()}
    diffusers_file(model, tmp_path)
    path = tmp_path / "lora.safetensors"

    def bits(tensors):
        return {name: value.view(torch.uint8) for name, value in tensors.items() if value.ndim}

    merge_lora(model, path, 0.0)
    assert all(torch.equal(value, bits(before)[name]) for name, value in bits(state).items())
    report = merge_lora(model, path, 0.7)
    assert not any(torch.equal(state[name], before[name]) for name in report.names)
    merge_lora(model, path, -0.7)
    for name, value in state.items():
        assert value.dtype == dtype
        assert_close(value, before[name], dtype)


def test_bfloat16_is_rounded_once(model, tmp_path):
    diffusers_file(model, tmp_path)
    model = model.bfloat16()
    wide = copy.deepcopy(model).float()
    report = merge_lora(wide, tmp_path / "lora.safetensors")
    assert merge_lora(model, tmp_path / "lora.safetensors") == report
    after = model.state_dict()
    for name, value in wide.state_dict().items():
        assert torch.equal(after[name], value.bfloat16()), name
    assert all(value.dtype == torch.bfloat16 for value in after.values())


Q = "diffusion_model.blocks.0.self_attn.q"


def file_of(path, *left_out, **more):
    """A LoRA of one layer for the tiny preset (width 24), with keys taken out and put in."""
    tensors = {f"{Q}.lora_down.weight": torch.ones(2, 24), f"{Q}.lora_up.weight": torch.ones(24, 2)}
    tensors = {key: value for key, value in tensors.items() if key not in left_out} | more
    save(path, tensors)


@pytest.mark.parametrize(
    ("left_out", "more", "message"),
    [
        ([f"{Q}.lora_up.weight"], {}, "lora_down.weight without the other half"),
        ([f"{Q}.lora_down.weight"], {}, "lora_up.weight without the other half"),
        ([], {f"{Q}.lora_A.weight": torch.ones(2, 24)}, "the same thing twice: .*lora_.*lora_"),
        ([], {f"{Q}.alpha": torch.ones(2)}, r"q\.alpha \(2,\), which must be one number"),
        ([], {f"{Q}.alpha": torch.tensor(float("inf"))}, "alpha for blocks.0.attn1.to_q.weight that is not"),
        ([], {f"{Q}.diff_b": torch.full((24,), float("nan"))}, r"numbers in .*q\.diff_b that are not finite"),
        ([], {f"{Q}.lora_down.weight": torch.ones(0, 24)}, r"\(0, 24\), which must have rows"),
        (
            [],
            {f"{Q}.lora_up.weight": torch.ones(25, 2)},
            r"attn1.to_q.weight is \(24, 24\), .*lora_up.weight \(25, 2\) and .*lora_down.weight \(2, 24\)",
        ),
        ([], {f"{Q}.lora_down.weight": torch.ones(3, 24)}, r"lora_down.weight \(3, 24\)"),
        ([], {f"{Q}.lora_down.weight": torch.ones(2, 25)}, r"lora_down.weight \(2, 25\)"),
        ([], {f"{Q}.diff": torch.ones(24, 1)}, r"to_q.weight is \(24, 24\), .*q\.diff \(24, 1\)"),
        ([], {f"{Q}.diff_b": torch.ones(1)}, r"to_q.bias is \(24,\), .*q\.diff_b \(1,\)"),
        (
            [],
            {
                "diffusion_model.patch_embedding.lora_down.weight": torch.ones(2, 36, 1, 2, 2),
                "diffusion_model.patch_embedding.lora_up.weight": torch.ones(24, 2, 1, 1, 1),
            },
            "for a transformer of 36 input channels, this one has 4: such a LoRA is not merged, nor a part",
        ),
        (
            [],
            {
                "diffusion_model.blocks.0.norm3.lora_down.weight": torch.ones(2, 24),
                "diffusion_model.blocks.0.norm3.lora_up.weight": torch.ones(24, 2),
            },
            r"norm2.weight is \(24,\)",
        ),
        (
            [],
            {"blocks.9.ffn.0.diff_b": torch.ones(1), f"{Q}.something": torch.ones(1)},
            r"2 keys that match nothing: blocks.9.ffn.0.diff_b; .*q\.something",
        ),
        ([], {"blocks.0.self_attn.k.alpha": torch.ones(1)}, "1 keys that match nothing: .*k.alpha"),
        (
            [],
            {"blocks.0.self_attn.norm_q.diff_b": torch.ones(24)},
            "1 keys that match nothing: .*norm_q.diff_b",
        ),
        (
            [],
            {"blocks.0.self_attn.k.lora_B.bias": torch.ones(24)},
            "1 keys that match nothing: .*k.lora_B.bias",
        ),
        (
            [],
            {"diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": torch.ones(2, 24)},
            "LoRA of an image-to-video model, .* nothing for .*k_img.lora_down.weight",
        ),
        ([], {"transformer.blocks.0.attn2.add_v_proj.lora_A.weight": torch.ones(2, 24)}, "image-to-video"),
        (
            [f"{Q}.lora_down.weight", f"{Q}.lora_up.weight"],
            {"lora_te_a.lora_down.weight": torch.ones(1)},
            "matches nothing in the transformer: its keys are lora_te_a.lora_down.weight; ours are .*weight",
        ),
    ],
)
def test_files_that_do_not_fit_change_nothing(model, tmp_path, left_out, more, message):
    before = copy_of(model)
    file_of(tmp_path / "lora.safetensors", *left_out, **more)
    with pytest.raises(WeightsError, match=message) as error:
        merge_lora(model, tmp_path / "lora.safetensors")
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_files_and_scales_that_are_none(model, tmp_path):
    path = tmp_path / "lora.safetensors"
    with pytest.raises(FileNotFoundError, match="no weights file"):
        merge_lora(model, path)
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        merge_lora(model, path)
    save(path, {}, {"format": "pt"})
    with pytest.raises(WeightsError, match="matches nothing in the transformer: it has no keys; ours are"):
        merge_lora(model, path)
    for suffix in ("bin", "pt", "pth", "ckpt"):
        pickled = tmp_path / f"x.{suffix}"
        pickled.write_bytes(b"PK\x03\x04 and so on")
        with pytest.raises(WeightsError, match=r"is a pickle.*conceptmaster convert .*x\.safetensors"):
            merge_lora(model, pickled)
    file_of(path)
    for scale in (float("nan"), float("inf")):
        with pytest.raises(WeightsError, match="must be a finite number"):
            merge_lora(model, path, scale)
    save(path, {"a": torch.ones(1)}, {"lora_adapter_metadata": "{"})
    with pytest.raises(WeightsError, match="the metadata of .* has no usable LoRA configuration"):
        merge_lora(model, path)


def test_an_image_to_video_lora_does_not_land_on_concepts(tiny, tmp_path):
    model = ConceptDiT(tiny(injection="shared_query"))
    target = "blocks.0.attn2.add_k_proj"
    weight = model.state_dict()[f"{target}.weight"]
    down, up = pair(weight)
    file_of(tmp_path / "lora.safetensors", **{f"{target}.lora_A.weight": down, f"{target}.lora_B.weight": up})
    with pytest.raises(WeightsError, match="image-to-video"):
        merge_lora(model, tmp_path / "lora.safetensors")
    assert model.state_dict()[f"{target}.weight"].equal(weight)
