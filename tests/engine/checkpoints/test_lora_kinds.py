"""LoHa, LoKr, DoRA and Tucker's form: equal to PEFT's merge of what PEFT wrote, and to arithmetic written out
here of what LyCORIS and ComfyUI have; what is of another kind is told by its name."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.engine.checkpoints.lora import merge_lora  # noqa: E402
from conceptmaster.engine.checkpoints.safetensors_io import save  # noqa: E402
from conceptmaster.engine.dit import ConceptDiT  # noqa: E402
from conceptmaster.errors import WeightsError  # noqa: E402

LAYERS = ["attn1.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2", "time_proj"]
Q, FFN, PATCH = "blocks.0.attn1.to_q", "blocks.1.ffn.net.0.proj", "patch_embedding"


@pytest.fixture
def model(tiny, randomise):
    return randomise(ConceptDiT(tiny(position_channels=0)))


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.3


def peft_config(kind, **options):
    import peft

    return getattr(peft, kind)(target_modules=LAYERS, **options)


PATTERNS = {"alpha_pattern": {r"blocks\.\d+\.ffn.net.2": 5}, "rank_pattern": {"time_proj": 5}}
PEFT = {
    "LoKr": ("LoKrConfig", {"r": 2, "alpha": 3}),
    "LoKr of two pairs": ("LoKrConfig", {"r": 1, "alpha": 2, "decompose_both": True, "decompose_factor": 4}),
    "LoKr whole": ("LoKrConfig", {"r": 64, "alpha": 16, **PATTERNS}),
    "LoHa": ("LoHaConfig", {"r": 3, "alpha": 2, **PATTERNS}),
    "LoRA": ("LoraConfig", {"r": 3, "lora_alpha": 2, "use_rslora": True, **PATTERNS}),
    "DoRA": ("LoraConfig", {"r": 3, "lora_alpha": 2, "use_dora": True, **PATTERNS}),
}


@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("name", PEFT)
def test_what_peft_wrote_is_merged_as_peft_does(model, name, scale, tmp_path, assert_close):
    peft = pytest.importorskip("peft")
    kind, options = PEFT[name]
    other = peft.get_peft_model(copy.deepcopy(model), peft_config(kind, **options))
    for i, (key, parameter) in enumerate(other.named_parameters()):
        if "lokr_" in key or "hada_" in key or "lora_" in key:
            drawn = draw(*parameter.shape, seed=i)
            parameter.data = drawn.abs() + 1 if "magnitude" in key else drawn
    other.save_pretrained(tmp_path)
    for module in other.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(scale)
    expected, before = other.merge_and_unload().state_dict(), state_of(model)
    report = merge_lora(model, tmp_path / "adapter_model.safetensors", scale)
    assert len(report.names) == 9
    for key, value in model.state_dict().items():
        assert_close(value, expected[key])
        assert (key in report.names) == (not value.equal(before[key]))


@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_dora_as_diffusers_fuses_it(model, tiny, scale, tmp_path, assert_close):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    config = tiny(position_channels=0).transformer
    names = "patch_size num_attention_heads attention_head_dim in_channels out_channels text_dim freq_dim"
    names += " ffn_dim num_layers cross_attn_norm eps rope_max_seq_len"
    wan = diffusers.WanTransformer3DModel(**{name: getattr(config, name) for name in names.split()})
    own = model.state_dict()
    wan.load_state_dict({key: own[key] for key in wan.state_dict()})
    tensors = {}
    for layer in (Q, FFN):
        o, i = own[f"{layer}.weight"].shape
        tensors[f"transformer.{layer}.lora_A.weight"] = draw(2, i)
        tensors[f"transformer.{layer}.lora_B.weight"] = draw(o, 2)
        tensors[f"transformer.{layer}.lora_magnitude_vector"] = draw(o).abs() + 1
    save(tmp_path / "lora.safetensors", tensors)
    diffusers.WanPipeline.load_lora_into_transformer(tensors, wan, adapter_name="lora")
    wan.fuse_lora(lora_scale=scale)
    wan.unload_lora()
    assert merge_lora(model, tmp_path / "lora.safetensors", scale).names == (f"{Q}.weight", f"{FFN}.weight")
    for key, value in wan.state_dict().items():
        assert_close(model.state_dict()[key], value)


def kron(one, two):
    """The Kronecker product of matrices, by its definition."""
    (a, b), (c, d) = one.shape, two.shape
    return (one[:, None, :, None] * two[None, :, None, :]).reshape(a * c, b * d)


def lokr(alpha):
    one, a, b = draw(4, 3, seed=1), draw(6, 2, seed=2), draw(2, 8, seed=3)
    parts = {"lokr_w1": one, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(alpha)}
    return parts, alpha / 2 * kron(one, a @ b)


def loha(alpha):
    one, two = (draw(24, 3, seed=1), draw(3, 24, seed=2)), (draw(24, 3, seed=3), draw(3, 24, seed=4))
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    parts = dict(zip(names, one + two, strict=True)) | {"alpha": torch.tensor(alpha)}
    return parts, alpha / 3 * (one[0] @ one[1]) * (two[0] @ two[1])


def lora(alpha):
    down, up = draw(3, 24, seed=1), draw(24, 3, seed=2)
    parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}
    return parts, alpha / 3 * up @ down


CHANGES = {"LoKr": lokr, "LoHa": loha, "LoRA": lora}


def put(path, layer, parts):
    save(path, {f"lycoris_{layer.replace('.', '_')}.{name}": tensor for name, tensor in parts.items()})


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", CHANGES)
def test_lycoris_and_dora_by_plain_arithmetic(model, kind, axis, tmp_path, assert_close):
    parts, change = CHANGES[kind](1.5)
    path, layer = tmp_path / "lora.safetensors", f"{Q}.weight"
    before = state_of(model)
    put(path, Q, parts)
    merge_lora(model, path, 0.5)
    after = model.state_dict()
    assert_close(after[layer], before[layer] + 0.5 * change)
    assert all(torch.equal(value, before[key]) for key, value in after.items() if key != layer)
    # with DoRA on top of what is there by now: lengths of rows (axis 0) or of columns
    weight = after[layer].clone()
    lengths = draw(24, seed=9).abs() + 1
    put(path, Q, parts | {"dora_scale": lengths[:, None] if axis == 0 else lengths[None]})
    merge_lora(model, path, 1.0)
    total = weight + change
    found = model.state_dict()[layer].clone()
    assert_close(found.pow(2).sum(1 - axis).sqrt(), lengths)
    assert_close(found, total / total.norm(dim=1 - axis, keepdim=True) * lengths.unsqueeze(1 - axis))
    merge_lora(model, path, 0.25)
    total = found + change
    scaled = total / total.norm(dim=1 - axis, keepdim=True) * lengths.unsqueeze(1 - axis)
    assert_close(model.state_dict()[layer], 0.75 * found + 0.25 * scaled)


def tucker(mid, a, b):
    """Every number by its sum: mid [m,n,…], a [o,m], b [n,i]."""
    out = torch.zeros(a.shape[0], b.shape[1], *mid.shape[2:])
    for m in range(mid.shape[0]):
        for n in range(mid.shape[1]):
            out += a[:, m].reshape(-1, 1, 1, 1, 1) * b[n].reshape(1, -1, 1, 1, 1) * mid[m, n]
    return out


def test_convolutions_whole_flat_and_by_tucker(model, tmp_path, assert_close):
    """The patch embedding of the tiny preset is [24,4,1,2,2]."""
    mid, up, down = draw(3, 3, 1, 2, 2), draw(24, 3, 1, 1, 1), draw(3, 4, 1, 1, 1)
    one, two = draw(6, 2), draw(4, 2, 1, 2, 2)
    a, b, t = draw(3, 4, seed=1), draw(3, 2, seed=2), draw(3, 3, 1, 2, 2, seed=5)
    c, d = (draw(3, 24, seed=1), draw(3, 4, seed=2)), (draw(3, 24, seed=3), draw(3, 4, seed=4))
    by_parts = kron(one, two.flatten(1)).reshape(24, 2, 2, 4).reshape(24, 4, 1, 2, 2)
    t2 = tucker(t, a.T, b)
    files = [
        ({"lora_mid.weight": mid, "lora_up.weight": up, "lora_down.weight": down},
         tucker(mid, up[..., 0, 0, 0], down[..., 0, 0, 0])),
        ({"lokr_w1": one, "lokr_w2": two}, by_parts),
        ({"lokr_w1": one, "lokr_w2": two.flatten(1)}, by_parts),
        ({"lokr_w1": one, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t},
         kron(one, t2.flatten(1)).reshape(24, 4, 1, 2, 2)),
        ({"hada_t1": mid, "hada_w1_a": c[0], "hada_w1_b": c[1], "hada_t2": t, "hada_w2_a": d[0],
          "hada_w2_b": d[1]}, tucker(mid, c[0].T, c[1]) * tucker(t, d[0].T, d[1])),
    ]  # fmt: skip
    path = tmp_path / "lora.safetensors"
    for parts, change in files:
        before = state_of(model)
        save(path, {f"diffusion_model.{PATCH}.{name}": tensor for name, tensor in parts.items()})
        assert merge_lora(model, path, 2.0).names == (f"{PATCH}.weight",)
        assert_close(model.state_dict()[f"{PATCH}.weight"], before[f"{PATCH}.weight"] + 2.0 * change)


def test_kinds_and_precisions_mix_in_one_file(model, tmp_path, assert_close):
    before, (one, first), (two, second) = state_of(model), lokr(2.0), lora(3.0)
    down, up = draw(2, 24, seed=5).to(torch.float8_e4m3fn), draw(48, 2, seed=6).to(torch.float8_e4m3fn)
    name = "diffusion_model.blocks.{}.self_attn.q.{}"
    tensors = {name.format(0, key): value for key, value in one.items()}
    tensors |= {
        name.format(1, key): value if key == "alpha" else value.bfloat16() for key, value in two.items()
    }
    ffn = "diffusion_model.blocks.1.ffn.0"
    tensors |= {f"{ffn}.lora_A": down, f"{ffn}.lora_B": up, f"{ffn}.diff_b": torch.ones(48).half()}
    save(tmp_path / "lora.safetensors", tensors)
    merge_lora(model, tmp_path / "lora.safetensors")
    after = model.state_dict()
    assert_close(after[f"{Q}.weight"], before[f"{Q}.weight"] + first)
    q = "blocks.1.attn1.to_q.weight"
    assert_close(after[q], before[q] + second, "bfloat16")
    assert_close(after[f"{FFN}.weight"], before[f"{FFN}.weight"] + up.float() @ down.float())
    assert_close(after[f"{FFN}.bias"], before[f"{FFN}.bias"] + 1)


OTHERS = {
    "OFT": "oft_R",
    "BOFT": "boft_R",
    "OFT or BOFT": "oft_blocks",
    "VeRA": "vera_lambda_b",
    "IA3": "ia3_l",
    "GLoRA": "a1.weight",
    "AdaLoRA": "lora_E.default",
    "HRA": "hra_u",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_named(model, kind, tmp_path):
    before = state_of(model)
    tensors = {f"blocks.1.self_attn.q.{name}": tensor for name, tensor in lora(1.0)[0].items()}
    save(tmp_path / "a.safetensors", tensors | {f"blocks.0.self_attn.q.{OTHERS[kind]}": torch.ones(4)})
    with pytest.raises(WeightsError, match=f"is of the kind {kind} \\(.*, which is not merged") as error:
        merge_lora(model, tmp_path / "a.safetensors", partial=True)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def without(parts, *names):
    return {key: value for key, value in parts.items() if key not in names}


BROKEN = {
    r"lokr_w2_b without the other half of the pair, of the kind LoKr": without(lokr(1.0)[0], "lokr_w2_a"),
    r"lokr_w2_a and .*lokr_w2_b without the other half .* LoKr": without(lokr(1.0)[0], "lokr_w1"),
    r"hada_w1_a and .*hada_w2_a without the other half .* LoHa": without(loha(1.0)[0], "hada_w2_b"),
    r"lokr_t2 without the other half": {"lokr_t2": torch.ones(2, 2, 1, 1)},
    r"does not fit: .*to_q.weight is \(24, 24\), .*lokr_w1 \(4, 3\)": lokr(1.0)[0]
    | {"lokr_w2_a": draw(5, 2)},
    r"does not fit: .*hada_w1_a \(24, 3\)": loha(1.0)[0]
    | {"hada_w2_b": draw(3, 1)},  # else it would be repeated
    r"hada_w2_b \(4, 24\)": loha(1.0)[0] | {"hada_w2_b": draw(4, 24)},
    r"hada_w1_b \(0, 24\), which must have rows": loha(1.0)[0] | {"hada_w1_b": torch.ones(0, 24)},
    r"does not fit: .*dora_scale \(23, 1\)": lora(1.0)[0] | {"dora_scale": torch.ones(23, 1)},
    r"does not fit: .*lora_magnitude_vector \(1,\)": lora(1.0)[0] | {"lora_magnitude_vector": torch.ones(1)},
    r"numbers in .*dora_scale that are not finite": lora(1.0)[0]
    | {"dora_scale": torch.full((24, 1), float("nan"))},
    r"dora_scale, which goes with one product": {"dora_scale": torch.ones(24, 1)},
    r"lora_magnitude_vector, which goes with one product": lora(1.0)[0]
    | lokr(1.0)[0]
    | {"lora_magnitude_vector": torch.ones(24)},
    r"whole numbers in .*lokr_w1: quantised": lokr(1.0)[0] | {"lokr_w1": torch.ones(4, 3, dtype=torch.int8)},
    r"numbers in .*lokr_w1 that are not finite": lokr(1.0)[0] | {"lokr_w1": torch.full((4, 3), float("inf"))},
    r"1 keys that match nothing: .*lora_down.scale_weight": lora(1.0)[0]
    | {"lora_down.scale_weight": torch.ones(1)},
    r"enlarged to \(24, 48\): such a LoRA is not merged": lora(1.0)[0]
    | {"reshape_weight": torch.tensor([24, 48])},
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_files_change_nothing(model, message, tmp_path):
    before = state_of(model)
    put(tmp_path / "lora.safetensors", Q, BROKEN[message])
    with pytest.raises(WeightsError, match=message) as error:
        merge_lora(model, tmp_path / "lora.safetensors", partial=True)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"peft_type": "OFT"}', "of the kind 'OFT', of which nothing is merged"),
        ('{"init_lora_weights": "pissa_niter_4"}', "'pissa_niter_4' changes the base as well"),
        ('{"rank_pattern": []}', None),
        ('{"rank_pattern": {"(a+)+$": 1}}', "no module's name"),
        ('{"r": "two"}', "every rank must be a finite number"),
    ],
)
def test_configurations_of_peft(model, config, words, tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    save(path, {f"base_model.model.{Q}.{name}": tensor for name, tensor in lokr(1.0)[0].items()})
    (tmp_path / "adapter_config.json").write_text(config)
    if words is None:
        merge_lora(model, path)
    else:
        with pytest.raises(WeightsError, match=words):
            merge_lora(model, path)
