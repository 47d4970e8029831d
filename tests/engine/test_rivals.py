"""Other systems' encoders, held to their own definitions, and what their tokens do in the transformer."""

from __future__ import annotations

import dataclasses
import math

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.engine.checkpoints import lazy_weights  # noqa: E402
from conceptmaster.engine.checkpoints.adapter import adapter_keys, load_adapter, read_adapter, save_adapter  # noqa: E402
from conceptmaster.engine.concept_config import ENCODER_INPUTS, ConceptConfig  # noqa: E402
from conceptmaster.engine.concepts import concept_encoder  # noqa: E402
from conceptmaster.engine.config import ModelConfig  # noqa: E402
from conceptmaster.engine.dit import ConceptDiT  # noqa: E402
from conceptmaster.engine.encoders import ImageEncoder  # noqa: E402
from conceptmaster.engine.fused import fuse  # noqa: E402
from conceptmaster.engine.model import ConceptMaster  # noqa: E402
from conceptmaster.engine.presets import preset  # noqa: E402
from conceptmaster.engine.rival_encoders import fourier, selection_loss  # noqa: E402
from conceptmaster.engine.rivals import SYSTEMS, like  # noqa: E402
from conceptmaster.errors import ConfigError  # noqa: E402


def known(config, count=3, seed=1):
    """What an encoder reads of so many concepts, of which the labels have 1, 2, … tokens."""
    g = torch.Generator().manual_seed(seed)
    c = config.concept
    mask = torch.arange(c.label_tokens) <= torch.arange(count)[:, None]
    text = torch.randn(count, c.label_tokens, config.transformer.text_dim, generator=g)
    low = 0.5 * torch.rand(count, 2, generator=g)
    told = {"label_text": text * mask[..., None], "label_mask": mask, "box": torch.cat((low, low + 0.3), 1)}
    pictures = torch.randn(count, c.picture_tokens, c.picture_dim, generator=g)
    return pictures, [told[name] for name in ENCODER_INPUTS.get(c.encoder, ())]


def test_ip_adapter_s_tokens_are_diffusers(assert_close):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    config = like(preset("tiny"), "ip-adapter")
    c = config.concept
    own = concept_encoder(config)
    theirs = embeddings.ImageProjection(c.picture_dim, c.width, num_image_text_embeds=4)
    state = own.state_dict()
    names = {"proj": "image_embeds"}
    theirs.load_state_dict(
        {f"{names.get(k.split('.')[0], 'norm')}.{k.split('.')[1]}": v for k, v in state.items()}
    )
    pictures, _ = known(config)
    assert_close(own(pictures), theirs(pictures[:, 0]))


@pytest.mark.parametrize("gives", ["embedding", "mean", "hidden", "layers"])
def test_the_picture_encoder_gives_what_transformers_names(gives, randomise, assert_close):
    clip = pytest.importorskip("transformers.models.clip.modeling_clip")
    from transformers.models.clip.configuration_clip import CLIPVisionConfig

    config = preset("tiny").image_encoder
    own = randomise(ImageEncoder(config, gives, (1, 2)))
    theirs = clip.CLIPVisionModelWithProjection(CLIPVisionConfig(**config)).eval()
    theirs.load_state_dict(own.model.state_dict())
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    out = theirs(pixel_values=pixels, output_hidden_states=True)
    states = out.hidden_states
    patches = theirs.visual_projection(theirs.vision_model.post_layernorm(states[-1][:, 1:]))
    expected = {
        "embedding": out.image_embeds[:, None],
        "mean": patches.mean(1, keepdim=True),
        "hidden": states[-2],
        "layers": torch.cat((states[1], states[2]), dim=1),
    }[gives]
    assert_close(own(pixels), expected)


def test_ssr_encoder_is_its_equation(randomise, assert_close):
    config = like(preset("tiny"), "ssr-encoder")
    own = randomise(concept_encoder(config)).double()
    pictures, (text,) = known(config)
    w, heads = own.state_dict(), 8
    out = own(pictures.double(), text.double())
    for m, (picture, label) in enumerate(zip(pictures.double(), text.double(), strict=True)):
        layers = picture.chunk(2)
        q, k = label @ w["to_q.weight"].T, layers[-1] @ w["to_k.weight"].T
        found = []
        for i, hidden in enumerate(layers):
            v = hidden @ w[f"to_v.{i}.weight"].T
            parts = [slice(64 * h, 64 * h + 64) for h in range(heads)]
            read = [(q[:, p] @ k[:, p].T / math.sqrt(64)).softmax(-1) @ v[:, p] for p in parts]
            found.append(torch.cat(read, dim=1) @ w[f"to_out.{i}.weight"].T)
        o = torch.cat(found)
        o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        assert_close(out[m], o * w["norm.weight"] + w["norm.bias"], "float64")


def test_ssr_encoder_s_loss_is_the_sum_over_layers_of_what_is_missing():
    g = torch.Generator().manual_seed(0)
    label = torch.randn(2, 3, 5, generator=g, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    tokens = torch.cat(
        (label.detach() * 2.0, -label.detach()), dim=1
    )  # alike in one layer, opposite in the other
    assert selection_loss(tokens, label, mask).item() == pytest.approx(2.0, abs=1e-6)
    padding = torch.cat((mask, mask), dim=1)
    other = torch.where(padding[..., None], tokens, 7.0).requires_grad_()
    loss = selection_loss(other, label, mask)
    assert loss.item() == pytest.approx(2.0, abs=1e-6)
    loss.backward()
    assert label.grad is None and other.grad.isfinite().all()


def test_a_box_is_told_as_ms_diffusion_tells_it():
    box = torch.tensor([[0.1, 0.2, 0.5, 0.9]])
    expected = []
    for k in range(8):
        angles = box[0].double() * 100.0 ** (k / 8)
        expected += [*angles.sin().tolist(), *angles.cos().tolist()]
    assert fourier(box)[0].tolist() == pytest.approx(expected, abs=2e-5)


def test_ms_diffusion_s_latents_are_of_label_and_box_or_learned(randomise, assert_close):
    config = like(preset("tiny"), "ms-diffusion")
    own = randomise(concept_encoder(config))
    pictures, (text, mask, box) = known(config)
    out = own(pictures, text, mask, box)
    assert out.shape == (3, 16, config.concept.width)
    moved = own(pictures, text, mask, box + torch.tensor([0.1, 0.0, 0.1, 0.0]))
    renamed = own(pictures, text * 2.0, mask, box)
    for other in (moved, renamed):
        assert not torch.allclose(out, other, atol=1e-3)
    nothing = own(pictures, text, mask, torch.zeros(3, 4))
    assert torch.equal(
        nothing, own(pictures, text + 1.0, mask, torch.tensor([[0.3, 0.2, 0.3, 0.9]]).expand(3, -1))
    )
    learned = own.grounding_latents.expand(3, -1, -1)
    picture = own.proj_in(pictures)
    for attend, feed in own.layers:
        learned = learned + attend(picture, learned)
        learned = learned + feed(learned)
    assert_close(nothing, own.norm_out(own.proj_out(own.attention_norm(learned))))


def test_a_resampler_s_layer_attends_to_picture_and_latents(randomise, assert_close):
    config = like(preset("tiny"), "ms-diffusion")
    layer = randomise(concept_encoder(config).layers[0][0]).double()
    g = torch.Generator().manual_seed(3)
    picture, latents = (torch.randn(1, n, 16, generator=g, dtype=torch.float64) for n in (5, 4))
    x, z = layer.norm1(picture)[0], layer.norm2(latents)[0]
    w = {name: value for name, value in layer.state_dict().items()}
    both = torch.cat((x, z)) @ w["to_kv.weight"].T
    q, k, v = z @ w["to_q.weight"].T, both[:, :16], both[:, 16:]
    read = [
        (q[:, h : h + 8] @ k[:, h : h + 8].T / math.sqrt(8)).softmax(-1) @ v[:, h : h + 8] for h in (0, 8)
    ]
    assert_close(layer(picture, latents)[0], torch.cat(read, dim=1) @ w["to_out.weight"].T, "float64")


NAMES = {
    "ip-adapter": "proj.weight proj.bias norm.weight norm.bias",
    "ssr-encoder": "to_q.weight to_k.weight to_v.0.weight to_v.1.weight to_out.0.weight to_out.1.weight "
    "norm.weight norm.bias",
    "ms-diffusion": "grounding_latents latent_proj.0.weight latent_proj.0.bias latent_proj.2.weight "
    "latent_proj.2.bias latent_norm.weight latent_norm.bias proj_in.weight proj_in.bias "
    "attention_norm.weight attention_norm.bias proj_out.weight proj_out.bias norm_out.weight norm_out.bias "
    "layers.0.0.norm1.weight layers.0.0.norm1.bias layers.0.0.norm2.weight layers.0.0.norm2.bias "
    "layers.0.0.to_q.weight layers.0.0.to_kv.weight layers.0.0.to_out.weight layers.0.1.0.weight "
    "layers.0.1.0.bias layers.0.1.1.weight layers.0.1.3.weight",
}
"""Of the tensors as their own files have them: image_proj of the first and the last, and SSR-Encoder's
aligner (whose to_v and to_out are its processor's)."""


@pytest.mark.parametrize("system", SYSTEMS)
def test_tensors_have_the_names_that_their_own_files_give_them(system):
    state = concept_encoder(like(preset("tiny"), system)).state_dict()
    assert {n for n in state if not n.startswith(("layers.1", "layers.2", "layers.3"))} == set(
        NAMES[system].split()
    )
    if system == "ms-diffusion":
        assert state["grounding_latents"].shape == (1, 16, 16)
        assert state["latent_proj.0.weight"].shape == (2 * (16 + 64), 16 + 64)


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_concept_is_encoded_alone(system, randomise, assert_close):
    config = like(preset("tiny"), system)
    own = randomise(concept_encoder(config))
    pictures, told = known(config)
    out = own(pictures, *told)
    assert out.shape == (3, config.concept.tokens_per_concept, config.concept.width)
    assert_close(out[1:2], own(pictures[1:2], *(each[1:2] for each in told)))


def asked_of(config, request_for, randomise):
    torch.manual_seed(0)
    model = randomise(ConceptMaster(config))
    asked = request_for(config)
    if config.concept.max_concepts == 1:
        asked["concept_mask"] = torch.tensor([[True], [False]])
        asked["label_mask"][:, :, :3] = True
    if config.concept.encoder == "grounded":
        asked["box"] = torch.tensor([0.1, 0.2, 0.6, 0.9]).expand(2, config.concept.max_concepts, 4)
    return model, asked


@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_masked_concepts_change_no_bit_and_seen_ones_do(system, request_for, randomise):
    model, asked = asked_of(like(preset("tiny"), system), request_for, randomise)
    found = model.velocity(**asked)
    hidden = ~asked["concept_mask"]
    other = asked | {"pixels": torch.where(hidden[..., None, None, None], 3.0, asked["pixels"])}
    assert torch.equal(found, model.velocity(**other))
    seen = asked | {"pixels": torch.where(hidden[..., None, None, None], asked["pixels"], 3.0)}
    assert not torch.equal(found, model.velocity(**seen))


@torch.no_grad()
def test_a_label_s_padding_gives_no_keys(request_for, randomise):
    """What its tokens hold is not read, not even where it is no number; without the mask it would be."""
    config = like(preset("tiny"), "ssr-encoder")
    model, asked = asked_of(config, request_for, randomise)
    mask = model.seen(asked["concept_mask"], asked["label_mask"])
    c = config.concept
    assert mask.shape == (2, c.concept_tokens)
    by_hand = [
        bool(asked["concept_mask"][b, n] and asked["label_mask"][b, n, q % c.label_tokens])
        for b in range(2)
        for n in range(c.max_concepts)
        for q in range(c.queries)
    ]
    assert mask.flatten().tolist() == by_hand
    text = model.text_encoder(asked["token_ids"], asked["token_mask"])
    tokens = model.concepts(asked["pixels"], asked["label_ids"], asked["label_mask"])
    known = asked["latents"], asked["time"], text
    found = model.transformer(*known, tokens, mask)
    broken = torch.where(mask.view(2, c.max_concepts, c.queries, 1), tokens, math.nan)
    assert torch.equal(found, model.transformer(*known, broken, mask))
    every = asked["concept_mask"][..., None].expand(-1, -1, c.queries).flatten(1)
    assert not torch.equal(found, model.transformer(*known, tokens, every))


@torch.no_grad()
def test_lambda_scales_what_concepts_add(tiny, randomise, assert_close):
    found = []
    for scale in (1.0, 0.6):
        config = tiny(injection="shared_query", scale=scale)
        kv = randomise(ConceptDiT(config)).condition(
            torch.ones(1, 4, 16), torch.ones(3, 2, 16), torch.ones(1, 3, dtype=torch.bool)
        )
        found.append(kv)
    assert_close(found[0]["concept_values"] * 0.6, found[1]["concept_values"])
    for name in ("text_keys", "text_values", "concept_keys"):
        assert torch.equal(found[0][name], found[1][name])


@torch.no_grad()
def test_keys_of_the_text_s_start_as_the_text_s(randomise):
    transformer = ConceptDiT(like(preset("tiny"), "ip-adapter"))
    base = randomise(ConceptDiT(dataclasses.replace(preset("tiny"), concept=ConceptConfig(injection="none"))))
    transformer.load_state_dict(base.state_dict(), strict=False)
    transformer.start_from_text()
    for block in transformer.blocks:
        attn = block.attn2
        assert attn.add_k_proj.bias is None and attn.add_v_proj.bias is None
        assert torch.equal(attn.add_k_proj.weight, attn.to_k.weight)
        assert torch.equal(attn.add_v_proj.weight, attn.to_v.weight)
        assert torch.equal(attn.norm_added_k.weight, attn.norm_k.weight)
        assert attn.add_k_proj.weight.data_ptr() != attn.to_k.weight.data_ptr()


@pytest.mark.parametrize("name", ["tiny", "sprites", "wan2.1-1.3b"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_systems_are_configurations_that_are_stored_and_read_back(name, system):
    base = preset(name)
    config = like(base, system)
    assert ModelConfig.from_dict(config.to_dict()) == config
    placed = dataclasses.replace(base, concept=dataclasses.replace(base.concept, mask="boxes"))
    assert like(placed, system) == config  # whose boxes are its own matter
    if system == "ssr-encoder" and name == "wan2.1-1.3b":
        assert config.concept.picture_layers == (4, 8, 12, 16, 20, 24)
        assert config.concept.picture_tokens == 6 * 257


def test_a_model_of_before_is_stored_as_ever():
    stored = preset("tiny").to_dict()["concept"]
    assert not {"keys", "scale", "picture_layers", "tiled"} & set(stored)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encoder": "pooled"},
            "encoder must be one of qformer, mlp, joined_mlp, image_embedding, label_selected",
        ),
        ({"keys": "text"}, "keys must be 'own' where the injection is 'standalone'"),
        ({"keys": "text", "injection": "shared_query"}, "concept.width must be the transformer's (24)"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"scale": 0.5, "injection": "merged"}, "1 unless the injection is standalone or shared_query"),
        ({"tiled": 3}, "tiled must be None, or 1 to 8 where max_concepts is 1 and no label or box is read"),
        ({"tiled": 3, "max_concepts": 1}, "tiled must be None"),
        ({"tiled": 9, "max_concepts": 1, "binding": "none"}, "tiled must be None, or 1 to 8"),
        ({"picture_layers": (1, 2)}, "picture_layers must be there for 'label_selected' and nowhere else"),
        ({"encoder": "label_selected", "binding": "none"}, "picture_layers must be there"),
        ({"encoder": "grounded"}, "binding must be 'none' for 'grounded', which reads the label itself"),
        ({"encoder": "label_selected", "binding": "none", "picture_layers": (2, 1)}, "upwards from 1"),
        (
            {"encoder": "label_selected", "binding": "none", "picture_layers": (1, 2), "queries": 4},
            "queries must be 12, one for each label token and each of picture_layers",
        ),
        ({"encoder": "image_embedding"}, "concept.picture_tokens must be 1, got 4"),
        ({"pooled": "mean"}, "pooled must be 'class' for 'qformer'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(tiny, changes, message):
    with pytest.raises(ConfigError) as error:
        tiny(**changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_layer_that_is_not_there_and_an_unknown_system_are_refused():
    config = like(preset("tiny"), "ssr-encoder")
    concept = dataclasses.replace(config.concept, picture_layers=(1, 3))
    with pytest.raises(ConfigError, match="picture_layers must be at most 2"):
        dataclasses.replace(config, concept=concept)
    with pytest.raises(
        ConfigError, match="unknown system 'blip'; there are ip-adapter, ssr-encoder, ms-diffusion"
    ):
        like(config, "blip")


@torch.no_grad()
@pytest.mark.parametrize("injection", ["standalone", "shared_query"])
def test_lambda_in_fused_blocks(tiny, randomise, assert_close, injection):
    """Also where the injector's way out is folded into the values."""
    config = tiny(injection=injection, scale=0.6)
    plain = randomise(ConceptDiT(config))
    g = torch.Generator().manual_seed(4)
    c = config.concept
    latents, text = torch.randn(1, *config.latent_shape, generator=g), torch.randn(1, 24, 16, generator=g)
    tokens, mask = torch.randn(3, c.queries, c.width, generator=g), torch.ones(1, 3, dtype=torch.bool)
    time = torch.tensor([500.0])
    expected = plain.denoise(latents, time, plain.condition(text, tokens, mask), mask)
    strong = plain.denoise(latents, time, _unscaled(plain).condition(text, tokens, mask), mask)
    fused = fuse(_with_scale(plain, 0.6))
    found = fused.denoise(latents, time, fused.condition(text, tokens, mask), mask)
    assert_close(found, expected)
    assert not torch.allclose(expected, strong, atol=1e-3)


def _with_scale(transformer, scale):
    concept = dataclasses.replace(transformer.config.concept, scale=scale)
    transformer.config = dataclasses.replace(transformer.config, concept=concept)
    return transformer


def _unscaled(transformer):
    return _with_scale(transformer, 1.0)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_s_part_is_an_adapter(system, randomise, tmp_path):
    config = like(preset("tiny"), system)
    trained, other = (randomise(ConceptMaster(config), seed) for seed in (0, 1))
    save_adapter(trained, tmp_path / "adapter.safetensors")
    assert read_adapter(tmp_path / "adapter.safetensors").concept == config.concept
    load_adapter(other, tmp_path / "adapter.safetensors")
    own = adapter_keys(other)
    assert {name.partition(".")[0] for name in own} == {"qformer", "transformer"}
    assert all(torch.equal(other.state_dict()[name], trained.state_dict()[name]) for name in own)


@torch.no_grad()
def test_keys_start_as_the_text_s_where_these_stay_on_disk(randomise, tmp_path, monkeypatch):
    monkeypatch.setattr(lazy_weights, "MIN_ELEMENTS", 64)
    base = randomise(ConceptDiT(dataclasses.replace(preset("tiny"), concept=ConceptConfig(injection="none"))))
    stored = {
        name: lazy_weights.Stored(lambda value=value: value, value.shape, "F32")
        for name, value in base.state_dict().items()
    }
    with torch.device("meta"):
        transformer = ConceptDiT(like(preset("tiny"), "ms-diffusion"))
    lazy_weights.stream(transformer, stored, absent=transformer.concept_keys())
    attn = transformer.blocks[1].attn2
    assert attn.to_k.weight.device.type == "meta"
    transformer.initialise_concepts(lazy_weights.weight_of)
    assert torch.equal(attn.add_k_proj.weight, base.blocks[1].attn2.to_k.weight)
    assert torch.equal(attn.add_v_proj.weight, base.blocks[1].attn2.to_v.weight)
    assert torch.equal(attn.norm_added_k.weight, base.blocks[1].attn2.norm_k.weight)
    assert attn.to_k.weight.device.type == "meta"
