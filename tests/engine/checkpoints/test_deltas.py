"""Deltas and models: what a merge changes and what it refuses, and the closed form against a solver that
knows nothing of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conceptmaster.delta_file import Delta, read_delta, write_delta  # noqa: E402
from conceptmaster.engine.checkpoints.deltas import delta_of, merge_deltas, text_keys_values  # noqa: E402
from conceptmaster.engine.checkpoints.merged_deltas import constrained, merge_into_one  # noqa: E402
from conceptmaster.engine.checkpoints.source import byte_tokenizer, random_source  # noqa: E402
from conceptmaster.engine.presets import preset  # noqa: E402
from conceptmaster.errors import InputError  # noqa: E402
from conceptmaster.tokenizer_file import encode, parse_tokenizer  # noqa: E402


@pytest.fixture
def model():
    return random_source(preset("tiny")).model


def made_for(model, path: Path, word: str, seed: int = 1, scale: float = 0.3) -> Delta:
    g = torch.Generator().manual_seed(seed)
    transformer = model.transformer
    changes = {
        name: torch.randn(transformer.get_parameter(name).shape, generator=g) * scale
        for name in text_keys_values(transformer)
    }
    row = torch.randn(model.config.transformer.text_dim, generator=g)
    write_delta(path, delta_of(path, model, {"transformer": changes}, {word: row}))
    return read_delta(path)


def test_merged_weights_are_sums_and_the_word_has_its_row(model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    delta = made_for(model, tmp_path / "a.safetensors", "<fox-1>")
    assert len(delta.changes) == 2 * model.config.transformer.num_layers
    text = merge_deltas(model, byte_tokenizer(512), [delta])
    tokenizer, _ = parse_tokenizer(text.encode(), 512)
    ids = encode(tokenizer, "a <fox-1> fox", 512)
    new = tokenizer.token_to_id("<fox-1>")
    assert ids.count(new) == 1
    changed = set()
    for name, value in model.state_dict().items():
        if name.startswith("text_encoder") and value.shape == (512, 16):
            assert torch.equal(value[new], torch.from_numpy(delta.words["<fox-1>"]))
            value, before[name] = value.clone(), before[name].clone()
            value[new] = before[name][new] = 0
        if not torch.equal(value, before[name]):
            changed.add(name)
            sum_ = before[name].numpy() + delta.changes[name].astype(np.float32)
            assert np.array_equal(value.numpy(), sum_)
    assert changed == set(delta.changes)


def test_a_full_table_grows(model, tmp_path):
    delta = made_for(model, tmp_path / "a.safetensors", "<fox-1>")
    full = byte_tokenizer(512)
    rust, _ = parse_tokenizer(full.encode(), 512)
    rust.add_tokens([f"token{k}" for k in range(512 - rust.get_vocab_size())])
    text = merge_deltas(model, rust.to_str(), [delta])
    assert (
        model.config.text_encoder["vocab_size"] == model.transformer.config.text_encoder["vocab_size"] == 513
    )
    ids = torch.tensor([encode(parse_tokenizer(text.encode(), 513)[0], "<fox-1>", 513)])
    assert ids.max() == 512
    assert model.text_encoder(ids, torch.ones_like(ids, dtype=torch.bool)).isfinite().all()


def other_base(delta, model):
    model.transformer.blocks[1].attn2.to_v.weight.data[0, 0] += 1
    return delta


def other_shape(delta, model):
    name = next(iter(delta.changes))
    wrong = {**delta.changes, name: np.zeros((3, 4), np.float16)}
    return Delta(delta.path, delta.injection, delta.bases, delta.words, wrong)


def other_width(delta, model):
    words = {"<fox-1>": np.zeros(5, np.float32)}
    return Delta(delta.path, delta.injection, delta.bases, words, delta.changes)


def other_injection(delta, model):
    return Delta(delta.path, "none", delta.bases, delta.words, delta.changes)


def other_layers(delta, model):
    extra = {"transformer.blocks.7.attn2.to_k.weight": next(iter(delta.changes.values()))}
    return Delta(delta.path, delta.injection, delta.bases, delta.words, {**delta.changes, **extra})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_base, "was made for another base"),
        (other_shape, r"has \(3, 4\) for blocks.0.attn2"),
        (other_width, "embedding of 5 numbers for <fox-1>, the text encoder's have 16"),
        (other_injection, "whose injection is 'none', this one's is 'standalone'"),
        (other_layers, "blocks.7.attn2.to_k.weight, which this model does not have"),
    ],
)
def test_a_delta_for_another_model_changes_nothing(model, tmp_path, spoil, message):
    delta = spoil(made_for(model, tmp_path / "a.safetensors", "<fox-1>"), model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        merge_deltas(model, byte_tokenizer(512), [delta])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_two_deltas_with_one_word(model, tmp_path):
    deltas = [made_for(model, tmp_path / f"{k}.safetensors", "<fox-1>", k) for k in (1, 2)]
    with pytest.raises(InputError, match="both bring the word <fox-1>"):
        merge_deltas(model, byte_tokenizer(512), deltas)


def test_the_closed_form_is_the_constrained_least_squares():
    """Against the normal equations with Lagrange multipliers, solved whole by numpy."""
    rng = np.random.default_rng(0)
    weight, regular = rng.standard_normal((7, 9)), rng.standard_normal((40, 9))
    targets, wanted = rng.standard_normal((4, 9)), rng.standard_normal((4, 7))
    found = constrained(*map(torch.from_numpy, (weight, regular, targets, wanted))).numpy()
    # each row x of W' minimises |R x - R w|^2 with C x = v
    system = np.block([[2 * regular.T @ regular, targets.T], [targets, np.zeros((4, 4))]])
    sides = np.vstack([2 * regular.T @ regular @ weight.T, wanted])
    np.testing.assert_allclose(found, np.linalg.solve(system, sides)[:9].T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(targets @ found.T, wanted, rtol=1e-6, atol=1e-6)
    twice = constrained(
        *map(torch.from_numpy, (weight, regular, np.repeat(targets, 2, 0), np.repeat(wanted, 2, 0)))
    )
    np.testing.assert_allclose(twice.numpy(), found, rtol=1e-5, atol=1e-5)


def test_merged_into_one_each_word_says_what_its_own_delta_says(model, tmp_path):
    own = [made_for(model, tmp_path / f"{k}.safetensors", f"<fox-{k}>", k, 0.02) for k in (1, 2)]
    captions = [["<fox-1>"], ["<fox-2>"]]  # few tokens of a narrow model, so that there is room for others
    regular = [f"the {word} runs {n}" for word in ("cat", "ball", "tree") for n in range(9)]
    one = merge_into_one(tmp_path / "one.safetensors", model, byte_tokenizer(512), own, captions, regular)
    write_delta(one.path, one)

    def keys(deltas, text):
        other = random_source(preset("tiny")).model
        tokenizer = merge_deltas(other, byte_tokenizer(512), deltas) if deltas else byte_tokenizer(512)
        ids = torch.tensor([encode(parse_tokenizer(tokenizer.encode(), 512)[0], text, 512)])
        text = other.text_encoder(ids, torch.ones_like(ids, dtype=torch.bool))
        text = other.transformer.condition_embedder.text_embedder(text)
        block = other.transformer.blocks[1].attn2
        return torch.cat([block.to_k(text), block.to_v(text)]).detach()

    def off(deltas, text, like):
        return float((keys(deltas, text) - keys(like, text)).abs().mean())

    # the second word's id is another when its delta comes alone, its row is the same: so is what it says
    for k in (0, 1):
        assert off([read_delta(one.path)], captions[k][0], [own[k]]) < 0.1 * off(
            own, captions[k][0], [own[k]]
        )
    quiet = "the cat runs 3"
    assert off([one], quiet, []) < 0.5 * off(own, quiet, [])
    with pytest.raises(InputError, match="no caption of the delta '.*/2.safetensors' says its word <fox-2>"):
        merge_into_one(one.path, model, byte_tokenizer(512), own, [["a <fox-1>"], ["a fox"]], regular)
