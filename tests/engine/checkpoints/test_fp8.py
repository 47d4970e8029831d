"""Weights in 8 bits of floating point, in the three spellings of their scales, against plain arithmetic."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from conceptmaster.engine.checkpoints.fp8 import descaled, in_16_bits  # noqa: E402
from conceptmaster.engine.checkpoints.weight_files import read_header  # noqa: E402
from conceptmaster.errors import WeightsError  # noqa: E402

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
MARK = torch.zeros(0, dtype=E4)


def note(**values):
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


@pytest.fixture
def read(tmp_path):
    """`read(tensors)`: the tensors of a file that holds these, descaled."""

    def call(tensors):
        path = tmp_path / "a.safetensors"
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
        return descaled(read_header(path), path)

    return call


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [E4, E5])
@pytest.mark.parametrize(
    "scale", [torch.tensor(0.0123), torch.tensor([0.0123]), drawn(6).abs(), drawn(6, 1).abs()]
)
@pytest.mark.parametrize("spelling", ["comfyui", "comfyui-today", "lightx2v"])
def test_a_scaled_weight_is_the_product_rounded_to_float16(spelling, scale, dtype, read):
    weight, plain = (drawn(6, 5) * 90).to(dtype), drawn(3).to(torch.bfloat16)
    tensors = {"a.weight": weight, "a.bias": plain, "b.weight": plain}
    if spelling == "comfyui":
        tensors |= {"a.scale_weight": scale, "a.scale_input": torch.ones(()), "scaled_fp8": MARK}
    elif spelling == "comfyui-today":
        kind = "float8_e4m3fn" if dtype == E4 else "float8_e5m2"
        tensors |= {
            "a.weight_scale": scale,
            "a.input_scale": torch.ones(()),
            "a.comfy_quant": note(format=kind),
        }
    else:
        tensors["a.weight_scale"] = scale
    found = read(tensors)
    rows = scale.view(-1, 1) if scale.numel() > 1 else scale
    expected = (weight.to(torch.float64) * rows.to(torch.float64)).to(torch.float16)
    assert found.keys() == {"a.weight", "a.bias", "b.weight"}
    assert found["a.weight"].read().equal(expected.float()) and found["a.weight"].dtype == torch.float16
    assert found["a.bias"].read().equal(plain.float()) and found["a.bias"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [E4, E5])
def test_a_plain_cast_needs_nothing_and_16_bits_hold_it(dtype, read):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    every = every[every.float().isfinite()]
    found = read({"a.weight": every})["a.weight"]
    assert found.read().equal(every.float()) and found.read().to(torch.float16).float().equal(every.float())


def test_rounding_is_of_half_a_unit_and_leaves_what_float16_cannot_hold():
    values = drawn(10_000) * 0.03
    narrow = in_16_bits(values)
    normal = values.abs() > 2**-14
    assert narrow.dtype == torch.float16
    assert ((narrow.float() - values).abs()[normal] <= values.abs()[normal] * 2**-11).all()
    assert ((narrow.float() - values).abs()[~normal] <= 2**-25).all()
    assert in_16_bits(torch.tensor([1e5])).dtype == torch.float32


WEIGHT, SCALE = drawn(4, 4).to(E4), torch.tensor(0.5)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"a.weight": WEIGHT, "scaled_fp8": MARK},
            "1 weights in fp8 without a scale, in a file of scaled fp8: a",
        ),
        (
            {"a.weight": WEIGHT, "a.scale_weight": SCALE, "b.weight": WEIGHT},
            "1 weights in fp8 without a scale, in a file of scaled fp8: b.weight",
        ),
        (
            {"a.weight": WEIGHT, "b.weight": WEIGHT, "b.weight_scale": SCALE},
            "1 weights in fp8 without a scale, in a file of scaled fp8: a.weight",
        ),
        (
            {"a.weight": WEIGHT, "a.weight_scale": SCALE, "a.scale_weight": SCALE + 1},
            "has two scales of one weight: a.scale_weight; a.weight_scale",
        ),
        ({"a.scale_weight": SCALE, "scaled_fp8": MARK}, "1 scales without a weight: a.scale_weight"),
        (
            {"a.weight": drawn(4, 4), "a.weight_scale": SCALE},
            r"1 scales of weights that are not in fp8: a.weight \(F32\)",
        ),
        (
            {"a.weight": torch.ones(4, 4, dtype=torch.int8), "a.weight_scale": SCALE},
            r"scales of weights that are not in fp8: a.weight \(I8\)",
        ),
        (
            {"a.weight": WEIGHT, "a.scale_weight": drawn(3)},
            r"fit no weight: a.scale_weight \(3,\) for \(4, 4\)",
        ),
        ({"a.weight": WEIGHT, "a.scale_weight": drawn(1, 4)}, "fit no weight"),
        ({"a.weight": WEIGHT, "a.scale_weight": torch.ones((), dtype=torch.int32)}, "fit no weight"),
        (
            {"a.weight": WEIGHT, "a.weight_scale": SCALE, "a.comfy_quant": note(format="nvfp4")},
            "tells of 'nvfp4', read are float8_e4m3fn, float8_e5m2",
        ),
        ({"a.weight": WEIGHT, "a.comfy_quant": torch.ones(2)}, "is no short text"),
        ({"a.weight": WEIGHT, "a.comfy_quant": torch.ones(5000, dtype=torch.uint8)}, "is no short text"),
        ({"a.weight": WEIGHT, "a.comfy_quant": torch.ones(5, dtype=torch.uint8)}, "is not JSON"),
    ],
)
def test_half_of_it_is_refused_by_name(tensors, message, read):
    with pytest.raises(WeightsError, match=message) as caught:
        read(tensors)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_scale_that_is_no_number(read):
    found = read({"a.weight": WEIGHT, "a.scale_weight": torch.tensor(float("nan"))})
    with pytest.raises(WeightsError, match="a scale that is not finite"):
        found["a.weight"].read()


def test_many_are_counted(read):
    tensors = {f"{i}.weight": WEIGHT.clone() for i in range(50)} | {"scaled_fp8": MARK}
    with pytest.raises(WeightsError, match="50 weights in fp8 without a scale.*; and 44 more"):
        read(tensors)
