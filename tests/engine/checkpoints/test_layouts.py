"""Bases in the layouts that people hold, written by code apart (benchmarks/layouts.py), against the same
weights in diffusers' layout."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

from safetensors.torch import load_file, save_file  # noqa: E402

from conceptmaster.benchmarks import layouts, random_base  # noqa: E402
from conceptmaster.engine.checkpoints.derived import derive  # noqa: E402
from conceptmaster.engine.checkpoints.lazy_weights import Stored  # noqa: E402
from conceptmaster.engine.checkpoints.source import Choices, open_source  # noqa: E402
from conceptmaster.engine.checkpoints.spellings import as_diffusers, spelling_of  # noqa: E402
from conceptmaster.engine.concept_config import ConceptConfig  # noqa: E402
from conceptmaster.engine.presets import preset  # noqa: E402
from conceptmaster.errors import InputError  # noqa: E402

SIZE = Choices((64, 64), 9)
COMFYUI = {
    "transformer": "diffusion_models/wan2.1-1.3b.safetensors",
    "text_encoder": "text_encoders/umt5_xxl.safetensors",
    "vae": "vae/wan_2.1_vae.safetensors",
}


def tiny(name="wan2.1-1.3b", given="none", **transformer):
    """A base of one head of 128 channels, whose VAE has as many latent channels as the real one."""
    config = preset(name)
    sizes = {"num_attention_heads": 1, "text_dim": 24, "freq_dim": 16, "ffn_dim": 64, "num_layers": 2}
    text = {"vocab_size": 320, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    vae = {"base_dim": 16, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1}
    return dataclasses.replace(
        config,
        transformer=dataclasses.replace(config.transformer, **(sizes | transformer)),
        concept=ConceptConfig(
            injection="none", given=given, **({"max_concepts": 1} if given != "none" else {})
        ),
        image_encoder={},
        text_encoder=config.text_encoder | text,
        vae=config.vae | vae,
    )


def state(source):
    """Every tensor of a source by name."""
    parts = {"model": source.model, "vae": source.vae}
    return {f"{part}.{name}": value for part in parts for name, value in parts[part].state_dict().items()}


def same(source, expected):
    """Bit for bit."""
    found = state(source)
    assert found.keys() == expected.keys()
    differing = [name for name, value in found.items() if not value.equal(expected[name])]
    assert not differing, differing


def refused(place, *words, choices=SIZE):
    """Wrong input, told in one short line."""
    with pytest.raises(InputError) as caught:
        open_source(place, choices)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1000, text
    assert all(word in text for word in words), text


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """`bases(layout, bits)`: a folder, written once. Not to be changed: copy it."""
    root = tmp_path_factory.mktemp("layouts")

    def write(layout, bits=None):
        folder = root / f"{layout}-{bits}"
        if not folder.exists():
            random_base.write_base(tiny(), folder, layout=layout, bits=bits)
        return folder

    return write


@pytest.fixture
def comfyui(bases, tmp_path):
    """ComfyUI's folder, to be changed."""
    return shutil.copytree(bases("comfyui"), tmp_path / "models")


@pytest.fixture(scope="module")
def expected(bases):
    """The tensors of the base in diffusers' layout."""
    return state(open_source(bases("diffusers"), SIZE))


# Names.


def shapes(module):
    """A module's tensors as ones on disk, of which only the shapes are known."""
    return {name: Stored(_nothing, value.shape, "F32") for name, value in module.state_dict().items()}


def _nothing():
    raise AssertionError("no value is read")


@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v", "ti2v"])
def test_a_transformer_s_names_are_those_that_diffusers_makes_of_them(kind, tmp_path):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    pictures = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 256}
    more = {"t2v": {}, "i2v": pictures, "flf2v": pictures | {"pos_embed_seq_len": 514}}
    more["ti2v"] = {"in_channels": 48, "out_channels": 48}
    config = {"num_attention_heads": 2, "num_layers": 2, "ffn_dim": 320, "text_dim": 96} | more[kind]
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(**config)
    right = shapes(model)
    own = {layouts.wan_transformer(name): tensor for name, tensor in right.items()}
    assert len(own) == len(right) and not own.keys() >= right.keys()
    theirs = convert_wan_transformer_to_diffusers(dict(own))
    theirs.pop("img_emb.emb_pos", None)  # which it leaves as it is
    for prefix in ("", "model.diffusion_model."):
        found = as_diffusers("transformer", {prefix + name: t for name, t in own.items()}, tmp_path)
        assert found == right and theirs.items() <= found.items()
    derived = derive("transformer", right, tmp_path, None)
    for name, value in derived.items():
        known = getattr(model.config, name, None)
        assert name == "_class_name" or value == (list(known) if name == "patch_size" else known), name


@pytest.mark.parametrize("name", ["wan2.1-1.3b", "wan2.2-ti2v-5b"])
def test_a_vae_s_names_and_its_configuration(name, tmp_path):
    """At its real size: diffusers' own table knows no other."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    config = preset(name).vae
    with torch.device("meta"):
        right = shapes(diffusers.AutoencoderKLWan(**config))
    rename = layouts.wan_vae(config)
    own = {rename(key): tensor for key, tensor in right.items()}
    assert len(own) == len(right) and "decoder.middle.0.residual.0.gamma" in own
    found = as_diffusers("vae", own, tmp_path)
    assert found == right
    if name == "wan2.1-1.3b":
        assert found == convert_wan_vae_to_diffusers(own)
    derived = derive("vae", found, tmp_path, None)
    assert {key: derived[key] for key in config} == config


def test_the_text_encoder_of_wan_s_own_code_computes_the_same(tmp_path, assert_close):
    """Its forward pass, written out after wan/modules/t5.py, with its own names."""
    from transformers.models.umt5.configuration_umt5 import UMT5Config
    from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

    torch.manual_seed(0)
    model = UMT5EncoderModel(
        UMT5Config(vocab_size=40, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    right = {name: tensor for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
    own = {layouts.wan_text_encoder(name): tensor for name, tensor in right.items()}
    ids = torch.randint(0, 40, (1, 9))
    with torch.no_grad():
        assert_close(_wan_t5(own, ids), model.eval()(ids).last_hidden_state)
    stored = {name: _in_memory(tensor) for name, tensor in own.items()}
    found = as_diffusers("text_encoder", stored, tmp_path)
    assert found.keys() == right.keys() and all(found[name].read().equal(right[name]) for name in right)
    derived = derive("text_encoder", found, tmp_path, None)
    assert all(getattr(model.config, key) == value for key, value in derived.items())


def _in_memory(tensor):
    return Stored(lambda: tensor, tensor.shape, "F32")


def _wan_t5(weights, ids):
    def norm(x, name):
        return weights[name] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def bucket(distance):  # bidirectional, 32 buckets, farthest 128
        exact, far = 8, distance.abs()
        large = exact + (torch.log(far.float() / exact) / torch.log(torch.tensor(16.0)) * 8).long()
        return (distance > 0) * 16 + torch.where(far < exact, far, large.clamp(max=15))

    x = weights["token_embedding.weight"][ids[0]]
    places = torch.arange(len(x))
    for block in ("blocks.0", "blocks.1"):
        bias = weights[f"{block}.pos_embedding.embedding.weight"][bucket(places[None] - places[:, None])]
        y = norm(x, f"{block}.norm1.weight")
        q, k, v = ((y @ weights[f"{block}.attn.{part}.weight"].T).view(-1, 3, 8) for part in "qkv")
        seen = (torch.einsum("ihc,jhc->hij", q, k) + bias.permute(2, 0, 1)).softmax(-1)
        x = (
            x
            + torch.einsum("hij,jhc->ihc", seen, v).reshape(len(x), 24) @ weights[f"{block}.attn.o.weight"].T
        )
        y = norm(x, f"{block}.norm2.weight")
        gate = torch.nn.functional.gelu(y @ weights[f"{block}.ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (y @ weights[f"{block}.ffn.fc1.weight"].T * gate) @ weights[f"{block}.ffn.fc2.weight"].T
    return norm(x, "norm.weight")[None]


def test_a_decoder_beside_the_text_encoder_is_left_out(tmp_path):
    names = (
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.final_layer_norm.weight",
    )
    more = ("decoder.block.0.layer.0.SelfAttention.q.weight", "lm_head.weight")
    tensors = {name: Stored(_nothing, torch.Size((2, 2)), "F32") for name in (*names, *more)}
    assert tuple(as_diffusers("text_encoder", tensors, tmp_path)) == names


def test_clip_s_picture_tower_in_wan_s_own_names(tmp_path):
    from transformers.models.clip.configuration_clip import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

    sizes = {"hidden_size": 1280, "num_hidden_layers": 1, "num_attention_heads": 16, "intermediate_size": 40}
    sizes |= {"patch_size": 14, "image_size": 42, "projection_dim": 24}
    torch.manual_seed(0)
    right = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes)).state_dict()
    right = {name: tensor for name, tensor in right.items() if not name.endswith("position_ids")}
    own = layouts.wan_clip(right) | {"textual.head.0.weight": torch.zeros(2, 2)}
    found = as_diffusers("image_encoder", {name: _in_memory(t) for name, t in own.items()}, tmp_path)
    assert found.keys() == right.keys()
    assert all(found[name].shape == right[name].shape for name in right)
    assert all(found[name].read().equal(right[name]) for name in right)
    derived = derive("image_encoder", found, tmp_path, None)
    assert {key: derived[key] for key in sizes} == sizes and derived["hidden_act"] == "gelu"


def test_names_that_meet_are_told(tmp_path):
    one = Stored(_nothing, torch.Size((2, 2)), "F32")
    both = {"blocks.0.self_attn.q.weight": one, "blocks.0.attn1.to_q.weight": one}
    with pytest.raises(InputError, match="it has 'blocks.0.attn1.to_q.weight' twice"):
        as_diffusers("transformer", both, tmp_path)
    assert spelling_of({"blocks.0.self_attn.k.weight": one}) is None


# Whole bases.


@pytest.mark.parametrize("layout", ["wan", "comfyui"])
def test_a_layout_is_the_same_base(layout, bases, expected):
    source = open_source(bases(layout), SIZE)
    same(source, expected)
    assert dataclasses.astuple(source.sampling)[:4] == ("unipc", 5.0, 50, 5.0)
    plain = open_source(bases("diffusers"), SIZE)
    assert source.tokenizer == plain.tokenizer
    assert source.model.config.transformer == plain.model.config.transformer
    held = {file for file in source.origin.files if file.endswith(("safetensors", "tokenizer.json"))}
    assert len(held) == 4 and all(len(digest) == 64 for digest in source.origin.files.values())


def test_files_one_by_one_and_over_another_base(bases, expected, tmp_path, monkeypatch):
    from conceptmaster.engine.checkpoints import lazy_weights

    monkeypatch.setattr(lazy_weights, "MIN_ELEMENTS", 64)  # nearly all stay on disk
    files = {part: bases("comfyui") / file for part, file in COMFYUI.items()}
    given = dataclasses.replace(SIZE, parts=files, tokenizer=bases("comfyui") / "tokenizer.json")
    source = open_source(None, given)
    for module in (source.model, source.vae):
        lazy_weights.settle(module, torch.device("cpu"))
    same(source, expected)
    assert source.origin.name == source.model.config.name == "wan2.1-1.3b"
    assert sorted(source.origin.files) == [
        "tokenizer.json", "umt5_xxl.safetensors", "wan2.1-1.3b.safetensors", "wan_2.1_vae.safetensors"
    ]  # fmt: skip
    refused(None, "has no tokenizer", choices=dataclasses.replace(SIZE, parts=files))
    text = shutil.copytree(bases("comfyui") / "text_encoders", tmp_path / "text") / "umt5_xxl.safetensors"
    (tmp_path / "text/umt5-xxl").mkdir()
    shutil.copy(bases("comfyui") / "tokenizer.json", tmp_path / "text/umt5-xxl")
    beside = open_source(None, dataclasses.replace(SIZE, parts=files | {"text_encoder": text}))
    assert beside.tokenizer == source.tokenizer and "tokenizer.json" in beside.origin.files
    other = shutil.copytree(bases("diffusers"), tmp_path / "other")
    shutil.rmtree(other / "vae")  # whose place need not be whole
    shutil.copytree(bases("diffusers") / "vae", tmp_path / "vae")
    over = dataclasses.replace(SIZE, parts={"vae": tmp_path / "vae", "transformer": files["transformer"]})
    source = open_source(other, over)
    same(source, expected) if not lazy_weights.stored_weights(source.model) else None
    assert "transformer/config.json" not in source.origin.files and "config.json" in source.origin.files
    refused(other, f"{files['vae']} is a vae, no transformer: give it with --vae",
            choices=dataclasses.replace(SIZE, parts={"transformer": files["vae"]}))  # fmt: skip


def test_a_configuration_that_shapes_do_not_tell_is_that_of_the_place(wan_folder, tmp_path):
    """Two heads of 12 channels, and a VAE of four."""
    plain = state(open_source(wan_folder, SIZE))
    tensors = load_file(wan_folder / "transformer/diffusion_pytorch_model.safetensors")
    file = tmp_path / "a.safetensors"
    save_file({layouts.wan_transformer(name): tensor for name, tensor in tensors.items()}, file)
    vae = wan_folder / "vae/diffusion_pytorch_model.safetensors"
    shutil.copy(vae, tmp_path / "vae.safetensors")
    parts = {"transformer": file, "vae": tmp_path / "vae.safetensors"}
    found = state(open_source(wan_folder, dataclasses.replace(SIZE, parts=parts)))
    concept = {name for name in plain if not name.startswith(("model.transformer", "vae"))}
    assert all(found[name].equal(plain[name]) for name in plain.keys() - concept)
    choices = dataclasses.replace(SIZE, parts=parts | {"text_encoder": wan_folder / "text_encoder"})
    refused(
        None, "the width is 24, no multiple of 128: a config.json or NAME.json beside tells", choices=choices
    )


def test_a_configuration_beside_each_file(wan_folder, tmp_path):
    """Of a part that shapes do not tell, in one folder with all others."""
    plain = state(open_source(wan_folder, SIZE))
    for part, name in (("transformer", "wan"), ("vae", "vae"), ("text_encoder", "umt5")):
        (file,) = (wan_folder / part).glob("*.safetensors")
        tensors = load_file(file)
        if part == "transformer":
            tensors = {layouts.wan_transformer(key): tensor for key, tensor in tensors.items()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
        shutil.copy(wan_folder / part / "config.json", tmp_path / f"{name}.json")
    shutil.copy(wan_folder / "tokenizer/tokenizer.json", tmp_path)
    source = open_source(tmp_path, SIZE)
    found = state(source)
    assert all(value.equal(plain[name]) for name, value in found.items()) and len(found) > 100
    assert {"wan.json", "vae.json", "umt5.json"} < set(source.origin.files)
    (tmp_path / "vae.json").unlink()
    refused(tmp_path, "no VAE of 4 latent channels is known (16; 48 are): a config.json or NAME.json")
    (tmp_path / "vae.json").write_text("{")
    refused(tmp_path, "vae.json is not JSON")


def test_several_dtypes_in_one_file_and_fp8_under_diffusers_names(bases, tmp_path):
    own = shutil.copytree(bases("diffusers"), tmp_path / "own")
    (file,) = (own / "transformer").glob("*.safetensors")
    next((own / "transformer").glob("*.index.json")).unlink()
    tensors, expected = load_file(file), {}
    for i, (name, tensor) in enumerate(tensors.items()):
        kinds = torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn
        tensors[name] = tensor.to(kinds[i % 5])
        expected[f"model.transformer.{name}"] = tensors[name].float()
    name = "blocks.1.ffn.net.2.weight"
    tensors[name] = tensors[name].to(torch.float8_e5m2)
    expected[f"model.transformer.{name}"] = tensors[name].float()
    save_file(tensors, file)
    found = state(open_source(own, SIZE))
    assert all(found[name].equal(value) for name, value in expected.items())
    save_file(tensors | {"blocks.1.ffn.net.2.weight_scale": torch.tensor(2.0)}, file)
    refused(own, "weights in fp8 without a scale, in a file of scaled fp8")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            tensors[name] = tensor.half()
    save_file(tensors | {"blocks.1.ffn.net.2.weight_scale": torch.tensor(2.0)}, file)
    name = "blocks.1.ffn.net.2.weight"
    assert state(open_source(own, SIZE))[f"model.transformer.{name}"].equal(tensors[name].float() * 2)


def test_shards_in_each_layout(comfyui, expected):
    folder = comfyui / "diffusion_models"
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    names = sorted(tensors)
    shards = {"w-1.safetensors": names[::2], "w-2.safetensors": names[1::2]}
    for shard, own in shards.items():
        save_file({name: tensors[name] for name in own}, folder / shard)
    listed = {name: shard for shard, own in shards.items() for name in own}
    (folder / "w.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    file.unlink()
    same(open_source(comfyui, SIZE), expected)
    (comfyui / "tokenizer.json").rename(comfyui.parent / "tokenizer.json")
    same(open_source(comfyui.rename(comfyui.parent / "split_files").parent, SIZE), expected)


CLIP = {"hidden_size": 1280, "num_hidden_layers": 1, "num_attention_heads": 16, "intermediate_size": 32}
CLIP |= {"patch_size": 14, "image_size": 28, "projection_dim": 24, "hidden_act": "gelu"}
SMALL_VAE = {"base_dim": 16, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1}


def with_pictures(given):
    """Wan2.1's image-to-video models, of a first picture or of a first and a last one."""
    count = {"first": 1, "first_last": 2}[given]
    config = tiny()
    sizes = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 128}
    sizes |= {"pos_embed_seq_len": 5 * count} if count == 2 else {}
    concept = ConceptConfig(
        max_concepts=count, picture_size=28, picture_tokens=5, picture_dim=1280, width=1280, heads=1,
        injection="base", given=given,
    )  # fmt: skip
    transformer = dataclasses.replace(config.transformer, **sizes)
    return dataclasses.replace(config, transformer=transformer, concept=concept, image_encoder=CLIP)


@pytest.mark.parametrize(
    ("given", "shift", "steps", "fps"),
    [
        ("first", 3.0, 40, 16.0),
        ("first_last", 16.0, 50, 16.0),
        ("clean", 5.0, 50, 24.0),
        ("control", 16.0, 50, 16.0),
    ],
)
def test_models_that_take_pictures(given, shift, steps, fps, tmp_path, monkeypatch):
    """In all layouts the same, and sampled as their release is."""
    from conceptmaster.engine.checkpoints import lazy_weights

    monkeypatch.setattr(lazy_weights, "MIN_ELEMENTS", 2**40)
    if given == "clean":
        config = tiny("wan2.2-ti2v-5b", in_channels=48, out_channels=48)
        config = dataclasses.replace(config, vae=config.vae | {"decoder_base_dim": 16})
        config = dataclasses.replace(config, concept=preset("wan2.2-ti2v-5b").concept)
    elif given == "control":
        config = tiny(num_layers=4, vace_layers=(0, 2), vace_in_channels=96, given=given)
    else:
        config = with_pictures(given)
    expected = None
    for layout in random_base.LAYOUTS:
        random_base.write_base(config, tmp_path / layout, layout=layout)
        source = open_source(tmp_path / layout, SIZE)
        expected = expected or state(source)
        same(source, expected)
        assert source.model.config.concept.given == given and source.model.config.fps == fps
    assert (source.sampling.shift, source.sampling.steps, source.sampling.guidance) == (shift, steps, 5.0)
    if given == "first":
        (tmp_path / "comfyui/clip_vision/clip_vision_h.safetensors").unlink()
        refused(tmp_path / "comfyui", "has no image_encoder: say where with --image-encoder FILE")


def test_two_experts(tmp_path):
    """In all layouts: which is which is told by folders' or files' names, or by the options."""
    config = dataclasses.replace(tiny("wan2.1-14b"), boundary=0.875)
    sources = {}
    for layout in random_base.LAYOUTS:
        random_base.write_base(config, tmp_path / layout, layout=layout)
        sources[layout] = open_source(tmp_path / layout, SIZE)
        same(sources[layout], state(sources["diffusers"]))
        assert sources[layout].model.config.boundary == 0.875
    assert dataclasses.astuple(sources["comfyui"].sampling)[:4] == ("unipc", 12.0, 40, 4.0)
    models = tmp_path / "comfyui" / "diffusion_models"
    high, low = sorted(models.glob("*.safetensors"))
    refused(high, "has no vae, text_encoder: say where with --vae FILE, --text-encoder FILE")
    alone = tmp_path / "alone"
    shutil.copytree(tmp_path / "comfyui", alone)
    (alone / "diffusion_models" / low.name).unlink()
    refused(alone, "is by its name the high-noise one of Wan2.2 A14B's two experts", "--transformer-2 FILE")
    shutil.copy(low, alone / "diffusion_models" / "a.safetensors")
    (alone / "diffusion_models" / high.name).rename(alone / "diffusion_models" / "b.safetensors")
    refused(alone, "has 2 transformers (a.safetensors; b.safetensors): say which with --transformer FILE")
    parts = {"transformer": alone / "diffusion_models/b.safetensors"}
    parts["transformer_2"] = alone / "diffusion_models/a.safetensors"
    same(open_source(alone, dataclasses.replace(SIZE, parts=parts)), state(sources["diffusers"]))
    parts = {"transformer": low, "transformer_2": high}
    with pytest.raises(InputError, match="by their names the two experts are swapped"):
        open_source(alone, dataclasses.replace(SIZE, parts=parts))
    choices = dataclasses.replace(SIZE, parts={"transformer": low, "transformer_2": low})
    refused(tmp_path / "comfyui", "is given for both experts", choices=choices)
    refused(tmp_path / "wan/low_noise_model", "two experts", "give the folder that has both")
    for folder, name in (("wan/high_noise_model", "high"), ("wan/low_noise_model", "low")):
        choices = dataclasses.replace(
            SIZE, parts={"transformer": tmp_path / folder, "vae": alone / COMFYUI["vae"],
                         "text_encoder": alone / COMFYUI["text_encoder"]}
        )  # fmt: skip
        refused(None, f"is by its name the {name}-noise one", choices=choices)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "F16", "BF16"])
def test_a_transformer_in_gguf_is_what_its_blocks_say(kind, bases, expected):
    gguf = pytest.importorskip("gguf")
    source = open_source(bases("comfyui", kind), SIZE)
    found, changed = state(source), 0
    for name, value in expected.items():
        own = layouts.wan_transformer(name.removeprefix("model.transformer."))
        if name.startswith("model.transformer.") and value.ndim > 1:
            blocks = layouts.LINEAR.fullmatch(own) and value.ndim == 2 and value.shape[-1] % 32 == 0
            dtype = gguf.GGMLQuantizationType[kind if blocks else "F16"]
            shape = value.shape if value.ndim < 5 else (value.shape[0], -1)
            packed = gguf.quants.quantize(value.reshape(shape).numpy(), dtype)
            value = torch.from_numpy(gguf.dequantize(packed, dtype)).reshape(value.shape)
            value = value if kind == "BF16" and blocks else value.half().float()
            changed += not value.equal(expected[name])
        assert found[name].equal(value), name
    assert changed > 20
    assert any(file.endswith(".gguf") for file in source.origin.files)


def test_a_text_encoder_in_gguf(bases, expected, tmp_path):
    """In llama.cpp's names, with its tokenizer and, perhaps, a decoder."""
    gguf = pytest.importorskip("gguf")
    own = shutil.copytree(bases("comfyui"), tmp_path / "own")
    file = own / COMFYUI["text_encoder"]
    (own / "tokenizer.json").unlink()
    parts = {"layer.0.layer_norm": "attn_norm", "layer.1.layer_norm": "ffn_norm"}
    parts |= {f"layer.0.SelfAttention.{part}": f"attn_{part}" for part in "qkvo"}
    parts |= {"layer.0.SelfAttention.relative_attention_bias": "attn_rel_b"}
    parts |= {
        f"layer.1.DenseReluDense.{a}": f"ffn_{b}"
        for a, b in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))
    }
    writer = gguf.GGUFWriter(file.with_suffix(".gguf"), "t5encoder")
    for name, tensor in load_file(file).items():
        name = {
            "shared.weight": "token_embd.weight",
            "encoder.final_layer_norm.weight": "enc.output_norm.weight",
        }.get(name, name)
        name = name.replace("encoder.block.", "enc.blk.")
        for theirs, llama in parts.items():
            name = name.replace(f".{theirs}.", f".{llama}.")
        writer.add_tensor(name, tensor.float().numpy())
    writer.add_tensor("dec.blk.0.attn_q.weight", torch.zeros(2, 2).numpy())
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abc", "[PAD7]"]
    writer.add_tokenizer_model("t5")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0, 0.0, 0.0, *[-2.0] * 5])
    writer.add_token_types([3, 3, 2, 1, 1, 1, 1, 5])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.unlink()
    source = open_source(own, SIZE)
    same(source, expected)
    assert [piece for piece, _ in json.loads(source.tokenizer)["model"]["vocab"]] == pieces[:-1]


# What is not taken, each told as what it is.


def test_original_folders_with_pickles(bases, tmp_path):
    folder = shutil.copytree(bases("wan"), tmp_path / "Wan2.1-T2V-1.3B")
    names = [file.name for file in folder.glob("*VAE.safetensors")]
    names += [file.name for file in folder.glob("models_t5*.safetensors")]
    for name in names:
        (folder / name).rename(folder / name.replace(".safetensors", ".pth"))
    vae, text = (name.replace(".safetensors", ".pth") for name in names)
    commands = f"cd {folder} && conceptmaster convert {vae} {names[0]}", f"convert {text} {names[1]}"
    refused(folder, "has no vae, text_encoder, but pickles", *commands)
    (folder / vae).rename(folder / names[0])
    refused(folder, "has no text_encoder, but pickles, which can run code when loaded: convert them")
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "config.json").write_text('{"_class_name": "WanModel", "model_type": "t2v"}')
    save_file(
        {"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, stub / "diffusion_pytorch_model.safetensors"
    )
    (stub / "Wan2.1_VAE.pth").touch()
    for choices in (SIZE, Choices()):
        refused(stub, "but pickles", "conceptmaster convert Wan2.1_VAE.pth", choices=choices)


def test_places_without_weights(tmp_path):
    (tmp_path / "empty").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    torch.save({}, tmp_path / "a.pth")
    (tmp_path / "a.txt").touch()
    for choices in (SIZE, Choices()):
        refused(tmp_path / "empty", "has no weights in a layout that is read", choices=choices)
        refused(tmp_path / "a.safetensors", "is no transformer, VAE, UMT5 or CLIP of a Wan", choices=choices)
        refused(tmp_path / "a.pth", "is a pickle", "conceptmaster convert", choices=choices)
        refused(tmp_path / "a.txt", "is neither safetensors nor GGUF", choices=choices)
        refused("/models/is-not-there", "there is nothing at '/models/is-not-there'", choices=choices)
        refused("x" * 5000, "there is nothing at", choices=choices)
    t5 = {f"encoder.block.{i}.layer.0.SelfAttention.q.weight": torch.zeros(2, 2) for i in range(2)}
    save_file(t5, tmp_path / "t5.safetensors")
    refused(tmp_path / "t5.safetensors", "is no transformer, VAE, UMT5 or CLIP of a Wan", "its keys are")
    pair = {f"diffusion_model.blocks.0.ffn.0.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(pair, tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", "is a LoRA, no part of a base: give it with --lora")
    refused(None, "say what to open")


def test_files_that_are_missing_or_twice(comfyui):
    (comfyui / COMFYUI["vae"]).rename(comfyui / "vae" / "other.bin")
    refused(comfyui, "has no vae, but pickles", "conceptmaster convert vae/other.bin vae/other.safetensors")
    (comfyui / "vae" / "other.bin").rename(comfyui / "other")
    refused(comfyui, "has no vae: say where with --vae FILE")
    (comfyui / "other").rename(comfyui / COMFYUI["vae"])
    shutil.copy(comfyui / COMFYUI["vae"], comfyui / "vae" / "b.safetensors")
    refused(comfyui, "has several of the vae (b.safetensors; wan_2.1_vae.safetensors): say which with --vae")
    (comfyui / "vae" / "b.safetensors").unlink()
    (comfyui / "tokenizer.json").unlink()
    refused(comfyui, "has no tokenizer: give UMT5's tokenizer.json or spiece.model with --tokenizer FILE")


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("vace_blocks.0.before_proj.weight", "has no vace_patch_embedding.weight"),
        ("face_adapter.a", "is Wan-Animate's transformer"),
        ("first_stage_model.a", "is all parts in one file"),
        ("blocks.0.more", "1 unexpected: blocks.0.more"),
    ],
)
def test_transformers_of_other_models(comfyui, key, word):
    file = comfyui / COMFYUI["transformer"]
    prefix = "" if key.startswith("first") else "model.diffusion_model."
    save_file(load_file(file) | {prefix + key: torch.zeros(2)}, file)
    refused(comfyui, word)


def test_a_vae_of_another_release(comfyui, bases, tmp_path):
    """Both ways round."""
    config = tiny("wan2.2-ti2v-5b", in_channels=48, out_channels=48)
    config = dataclasses.replace(config, vae=config.vae | {"decoder_base_dim": 16})
    random_base.write_base(config, tmp_path / "5b", layout="comfyui")
    five = tmp_path / "5b" / "vae/wan2.2_vae.safetensors"
    choices = dataclasses.replace(SIZE, parts={"vae": five})
    refused(comfyui, "is a VAE of 48 latent channels, which must equal the transformer's 16", choices=choices)
    parts = {"vae": comfyui / COMFYUI["vae"]}
    choices = dataclasses.replace(SIZE, parts=parts)
    refused(
        tmp_path / "5b",
        "is a VAE of 16 latent channels, which must equal the transformer's 48",
        choices=choices,
    )
    shutil.copy(five, comfyui / "vae")  # beside the right one it does not matter
    same(open_source(comfyui, SIZE), state(open_source(bases("diffusers"), SIZE)))


@pytest.mark.parametrize("layout", ["wan", "comfyui"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_whole_numbers_under_plain_names(layout, dtype, bases, tmp_path):
    own = shutil.copytree(bases(layout), tmp_path / "own")
    file = next(
        own.rglob("diffusion_pytorch_model*.safetensors" if layout == "wan" else "wan2.1*.safetensors")
    )
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("blocks.1.ffn.0.weight"))
    save_file(tensors | {name: tensors[name].to(dtype)}, file)
    refused(
        own, "1 of whole numbers, not of floating point (quantised weights are not read): blocks.1.ffn.net.0"
    )


def test_wan_s_own_configuration_is_held_to_the_tensors(bases, tmp_path):
    own = shutil.copytree(bases("wan"), tmp_path / "own")
    values = json.loads((own / "config.json").read_text())
    for changes, word in (
        ({"num_layers": 3}, "missing: blocks.2."),
        ({"model_type": "vace"}, "it is VACE's by its configuration, and has no vace_blocks"),
        ({"model_type": "s2v"}, "model_type is 's2v', which the engine does not have"),
        ({"num_heads": 0}, "give no width of a head"),
        ({"dim": "x"}, "give no width of a head"),
        ({"in_dim": -1}, "in_channels"),
        ({"eps": "no"}, "eps"),
        ({"text_len": 226}, "text_len is 226, the engine has 512"),
        ({"window_size": [8, 8]}, "window_size is [8, 8]"),
    ):
        (own / "config.json").write_text(json.dumps(values | changes))
        refused(own, word)
