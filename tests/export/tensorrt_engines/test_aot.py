"""The plugin's kernel: its order of arguments in the interpreter, its PTX, and what TensorRT is told. No
GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("onnxscript")

from conceptmaster.errors import ExportError, MissingDependency  # noqa: E402
from conceptmaster.export.tensorrt_engines import aot, plugin, plugin_kernels  # noqa: E402
from conceptmaster.export.tensorrt_engines.aot import (  # noqa: E402
    BIASED,
    BOXED,
    INJECTION,
    TENSORS,
    only_parameters,
)
from conceptmaster.kernels.cross_attention import (  # noqa: E402
    concept_injection,
    decoupled_cross_attention,
    padding_bias,
)

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("concepts", [6, 40])
def test_the_entries_pass_everything_on_in_the_right_place(concepts, assert_close):
    batch, tokens, text, heads, width = 2, 37, 9, 3, 16
    g = torch.Generator().manual_seed(0)
    q, tk, tv, k, v = (
        torch.randn(batch, n, heads, width, generator=g) for n in (tokens, text, text, concepts, concepts)
    )
    mask = torch.rand(batch, concepts, generator=g) < 0.6
    mask[0] = False
    flat = [x.flatten(2).contiguous() for x in (q, tk, tv, k, v)]
    scale = math.log2(math.e) / math.sqrt(width)
    tiles = {"BLOCK_S": 32, "BLOCK_T": 16, "BLOCK_C": 16, "BLOCK_E": 16, "ONE_BLOCK": concepts <= 16}
    constants = {
        "A": heads,
        "WIDTH": width,
        "SCALE": scale,
        "PRECISION": "ieee",
        "EACH": 0,
        "BLOCK_N": 2,
    } | tiles
    grid = (-(-tokens // 32), batch * heads)
    out = torch.full_like(flat[0], float("nan"))
    plugin_kernels.injection_entry[grid](flat[0], *flat[3:], mask, tokens, concepts, out, **constants)
    assert_close(out.unflatten(2, (heads, width)), concept_injection(q, k, v, mask))
    out = torch.full_like(flat[0], float("nan"))
    plugin_kernels.decoupled_entry[grid](*flat, mask, tokens, text, concepts, out, **constants)
    assert_close(out.unflatten(2, (heads, width)), decoupled_cross_attention(q, tk, tv, k, v, mask))
    out, bias = torch.full_like(flat[0], float("nan")), padding_bias(torch.tensor([2, 7]), text, 90)
    plugin_kernels.biased_entry[grid](*flat, mask, bias, tokens, text, concepts, out, **constants)
    expected = decoupled_cross_attention(q, tk, tv, k, v, mask, text_bias=bias)
    assert_close(out.unflatten(2, (heads, width)), expected)

    boxes, constants["EACH"] = torch.rand(1, tokens, 2, generator=g) < 0.5, concepts // 2
    assert not boxes.any(-1).all()
    out = torch.full_like(flat[0], float("nan"))
    plugin_kernels.boxed_injection_entry[grid](
        flat[0], *flat[3:], mask, boxes, tokens, concepts, out, **constants
    )
    assert_close(out.unflatten(2, (heads, width)), concept_injection(q, k, v, mask, boxes))
    out = torch.full_like(flat[0], float("nan"))
    plugin_kernels.boxed_decoupled_entry[grid](*flat, mask, boxes, tokens, text, concepts, out, **constants)
    expected = decoupled_cross_attention(q, tk, tv, k, v, mask, boxes=boxes)
    assert_close(out.unflatten(2, (heads, width)), expected)
    out = torch.full_like(flat[0], float("nan"))
    plugin_kernels.boxed_biased_entry[grid](
        *flat, mask, bias, boxes, tokens, text, concepts, out, **constants
    )
    expected = decoupled_cross_attention(q, tk, tv, k, v, mask, text_bias=bias, boxes=boxes)
    assert_close(out.unflatten(2, (heads, width)), expected)


PTX = """
.visible .entry k(
    .param .u64 k_param_0,
    .param .u32 k_param_1,
    .param .u64 k_param_2
)
{ ld.param.u64 %rd1, [k_param_0]; ld.param.u32 %r1, [k_param_1]; }
"""


def test_parameters_that_nobody_passes_go():
    found = only_parameters(PTX, 2)
    assert "k_param_2" not in found and "k_param_1\n)" in found and "[k_param_1]" in found
    assert only_parameters(PTX, 3).split() == PTX.split()
    with pytest.raises(ExportError, match="uses its parameter k_param_1, which TensorRT does not pass"):
        only_parameters(PTX, 1)


COMPILE = """
import subprocess, tempfile, os, re
from pathlib import Path
import triton
from conceptmaster.export.tensorrt_engines.aot import (
    SIZES, TENSORS, compile_node, tactics
)
ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
for node, dtype, number in CASES:
    each = 16 if "boxes" in TENSORS[node] else 0
    kernel = compile_node(node, dtype, 12, 128, 64, tactics(dtype)[number], 90, each)
    header = re.search(r"\\.entry\\s+(\\w+)\\s*\\((.*?)\\)", kernel.ptx, re.DOTALL)
    assert header[1] == kernel.name
    kinds = re.findall(r"\\.param \\.(\\w+)", header[2])
    assert kinds == ["u64"] * len(TENSORS[node]) + ["u32"] * len(SIZES[node]) + ["u64"], kinds
    assert kernel.threads == 32 * kernel.tiles.warps
    assert kernel.shared <= (49152 if number == len(tactics(dtype)) - 1 else 232448)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(kernel.ptx)
        command = [ptxas, "-v", "--gpu-name=sm_90a", path, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr, done.stderr
print("compiled", len(CASES))
"""


def compile_for_hopper(cases):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = f"CASES = {cases!r}\n{COMPILE}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"compiled {len(cases)}"


def test_a_kernel_compiles_for_hopper_and_takes_what_tensorrt_passes():
    compile_for_hopper([(INJECTION, "bfloat16", 2), (BOXED + BIASED, "bfloat16", 0)])


@pytest.mark.slow
def test_every_tactic_compiles_without_a_spill():
    compile_for_hopper(
        [
            (node, dtype, number)
            for node in TENSORS
            for dtype in ("bfloat16", "float16", "float32")
            for number in range(len(aot.tactics(dtype)))
        ]
    )


class Size(int):
    """A symbolic size that is known."""

    def constant_value(self):
        return int(self)

    def __mul__(self, other):
        return Size(int(self) * int(other))


class Desc:
    def __init__(self, shape, dtype):
        self.shape_expr = [Size(size) for size in shape]
        self.dtype = types.SimpleNamespace(name=dtype)

    def like(self):
        return Desc(self.shape_expr, self.dtype.name)


class Combination:
    def __init__(self, kinds, layout, numbers):
        self.given = kinds, layout, numbers


@pytest.fixture
def registered(monkeypatch):
    """What `register` tells a fake of tensorrt.plugin: (step, identity) -> function."""
    found = {}
    fake = types.ModuleType("tensorrt.plugin")
    fake.op = types.SimpleNamespace()
    fake.TensorDesc, fake.AutoTuneCombination = Desc, Combination
    fake.KernelLaunchParams = type("KernelLaunchParams", (), {})
    fake.SymIntExprs = type("SymIntExprs", (dict,), {"__init__": lambda self, n: dict.__init__(self)})
    fake.SymInt32 = int
    fake.cdiv = lambda a, b: -(-int(a) // b)
    for step in ("register", "autotune", "aot_impl"):
        setattr(fake, step, lambda identity, step=step: lambda f: found.setdefault((step, identity), f))
    trt = types.ModuleType("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", fake)
    plugin.register(trt, 90)
    return found


@pytest.mark.parametrize("node", TENSORS)
def test_tensorrt_is_told_shapes_types_tactics_and_launch(registered, node, monkeypatch):
    import inspect

    identity = f"conceptmaster::{node}"
    shapes = {"q": (2, 1000, 384), "mask": (2, 48), "text_bias": (2, 77), "boxes": (1, 1000, 3)}
    own = [{"mask": "BOOL", "boxes": "BOOL", "text_bias": "FP32"}.get(n, "BF16") for n in TENSORS[node]]
    descs = [Desc(shapes.get(n, (2, 77 if "text" in n else 48, 384)), kind)
             for n, kind in zip(aot.TENSORS[node], own, strict=True)]  # fmt: skip
    out = registered["register", identity](*descs, 12)
    assert out.shape_expr == [2, 1000, 384] and out.dtype.name == "BF16"
    signature = inspect.signature(registered["register", identity])
    assert list(signature.parameters) == [*aot.TENSORS[node], "heads"]

    (combination,) = registered["autotune", identity](*descs, 12, (out,))
    kinds, layout, numbers = combination.given
    assert kinds == ", ".join([*own, "BF16"]) and layout == "LINEAR"
    assert numbers == [1, 2, 3]

    asked = []
    kernel = aot.Compiled("k", "ptx", 256, 1234, aot.tactics("bfloat16")[0])
    monkeypatch.setattr(plugin, "compile_node", lambda *given: asked.append(given) or kernel)
    name, ptx, launch, extra = registered["aot_impl", identity](*descs, 12, (out,), 1)
    each = 16 if node.startswith(BOXED) else 0
    assert asked == [(node, "bfloat16", 12, 32, 48, aot.tactics("bfloat16")[0], 90, each)]
    assert (name, ptx) == ("k", "ptx")
    assert (launch.grid_x, launch.grid_y, launch.block_x, launch.shared_mem) == (8, 24, 256, 1234)
    sizes = {"S": 1000, "T": 77, "C": 48}
    assert [extra[i] for i in range(len(extra))] == [sizes[letter] for letter in aot.SIZES[node]]


def test_without_triton_the_build_says_so_in_one_line(monkeypatch):
    from conceptmaster.kernels import common

    monkeypatch.setattr(common, "INSTALLED", False)
    with pytest.raises(MissingDependency, match=r"needs Triton: .*pip install '.\[gpu\]'"):
        plugin.register(types.ModuleType("tensorrt"), 90)
