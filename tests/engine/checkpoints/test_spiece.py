"""SentencePiece models as tokenizers, against transformers' own conversion."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("google.protobuf")

from safetensors.torch import load_file, save_file  # noqa: E402

from conceptmaster.engine.checkpoints.source import Choices, open_source  # noqa: E402
from conceptmaster.engine.checkpoints.spiece import from_gguf, from_spiece  # noqa: E402
from conceptmaster.errors import InputError  # noqa: E402
from conceptmaster.tokenizer_file import parse_tokenizer  # noqa: E402

WORDS = "▁a ▁red ▁ball ▁rolls ▁to ▁the ▁left ▁and ▁two ▁cats in ed s".split()
LETTERS = [letter for letter in "▁abcdefghijklmnopqrtuvwxyz0123456789&.,!?'é" if letter != "s"]
TEXTS = [
    "a red ball rolls to the left",
    "  two   cats\tand\n a ball, in 1999! ",
    "Zebra <pad> the</s> é 漢 ▁ball",
    "",
    "<unk> sand",
]


def pieces():
    """(text, score, kind): 2 is unknown, 3 control, 1 normal."""
    special = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2)]
    return (
        special + [(word, -2.0 - i / 64, 1) for i, word in enumerate(WORDS)] + [(c, -8.0, 1) for c in LETTERS]
    )


def model(entries=None, charsmap=b""):
    """A SentencePiece model's bytes, by the protobuf classes that come with transformers."""
    from transformers.utils import sentencepiece_model_pb2_new as proto

    built = proto.ModelProto()
    for text, score, kind in entries or pieces():
        built.pieces.add(piece=text, score=score, type=kind)
    built.trainer_spec.model_type, built.trainer_spec.unk_id, built.trainer_spec.pad_id = 1, 2, 0
    built.trainer_spec.eos_id, built.trainer_spec.bos_id = 1, -1
    built.normalizer_spec.name = "nmt_nfkc"
    built.normalizer_spec.precompiled_charsmap = charsmap
    return built.SerializeToString()


def test_the_ids_are_those_of_transformers_conversion():
    """By its own classes: the library that reads the file for them is not installed."""
    from transformers import T5Tokenizer
    from transformers.convert_slow_tokenizer import T5Converter

    vocabulary = [(text, score) for text, score, _ in pieces()]
    theirs = T5Tokenizer(**T5Converter.convert_from_spm(vocabulary, extra_ids=0))
    tokenizer, text = parse_tokenizer(from_spiece(model()).encode(), 320)
    for prompt in TEXTS:
        assert tokenizer.encode(prompt).ids == theirs(prompt).input_ids, prompt
    assert json.loads(text)["model"]["vocab"][3] == [WORDS[0], -2.0]


def test_what_llama_cpp_keeps_is_the_same():
    found = pieces()
    metadata = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": [text for text, _, _ in found] + ["[PAD]"] * 5,
        "tokenizer.ggml.scores": [score for _, score, _ in found] + [-1000.0] * 5,
        "tokenizer.ggml.token_type": [kind for _, _, kind in found] + [5] * 5,
    }
    assert from_gguf(metadata) == from_spiece(model())
    assert from_gguf({}) is None and from_gguf(metadata | {"tokenizer.ggml.model": "llama"}) is None
    for key, value in (("tokens", ["a"]), ("scores", [0.0]), ("token_type", [1])):
        with pytest.raises(ValueError, match="not equally many"):
            from_gguf(metadata | {f"tokenizer.ggml.{key}": value})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x0a",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x0a\x05\x0a",
        b"\x0b",
        b"\x08\x01",
        b"\x0a\x02\x08\x01",
        b"\x80" * 30,
        b"\x0a\x03\x0a\x01\xff",
        model([("a", 0.0, 1)]),
        model([("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 1)]),
    ],
)
def test_bytes_that_are_no_model(data):
    with pytest.raises(ValueError, match="SentencePiece model|first pieces are not|can't decode") as caught:
        from_spiece(data)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_cut_off_anywhere():
    whole = model()
    for length in range(len(whole)):
        try:
            from_spiece(whole[:length])
        except ValueError as error:
            assert len(str(error)) < 300
    with pytest.raises(ValueError, match="charsmap is cut off"):
        parse_tokenizer(from_spiece(model(charsmap=b"\1\2\3")).encode(), 320)


def test_it_lies_in_the_text_encoder_s_file_in_the_folder_or_is_given(wan_folder, tmp_path):
    small = Choices((64, 64), 9)
    file = tmp_path / "text.safetensors"
    tensors = load_file(wan_folder / "text_encoder/model.safetensors")
    blob = torch.frombuffer(bytearray(model()), dtype=torch.uint8)
    save_file(tensors | {"spiece_model": blob}, file)
    (tmp_path / "spiece.model").write_bytes(model())
    parts = {"text_encoder": file}
    inside = open_source(wan_folder, Choices((64, 64), 9, parts=parts)).tokenizer
    given = open_source(wan_folder, Choices((64, 64), 9, tokenizer=tmp_path / "spiece.model")).tokenizer
    assert inside == given == from_spiece(model()) != open_source(wan_folder, small).tokenizer
    for wrong, word in (
        (blob[:-3], "its tokenizer is not read: it is cut off"),
        (blob.to(torch.int16), "no SentencePiece"),
    ):
        save_file(tensors | {"spiece_model": wrong}, file)
        with pytest.raises(InputError, match=word):
            open_source(wan_folder, Choices((64, 64), 9, parts=parts))
    (tmp_path / "spiece.model").write_bytes(b"x")
    with pytest.raises(InputError, match="has no tokenizer that is read"):
        open_source(wan_folder, Choices((64, 64), 9, tokenizer=tmp_path / "spiece.model"))
