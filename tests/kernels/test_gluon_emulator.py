"""Faults put into Hopper's kernel: the emulator, or the comparison with float64, tells every one of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from conceptmaster.kernels import cross_attention_hopper as hopper  # noqa: E402
from conceptmaster.kernels.common import launches_to  # noqa: E402
from tests.kernels.gluon_emulator import Emulator, Stuck  # noqa: E402
from tests.kernels.test_cross_attention_hopper import CASES, exactly, given_for  # noqa: E402

RELEASE = "mbarrier.arrive(empty.index(place % STAGES), count=1, pred=release)"
BOTH_SETS = [
    f"place = _put_blocks({name}_k, {name}_v, ring, place, {name}_blocks, batch, column, E, STAGES)"
    for name in ("first", "second")
]
BETWEEN = "\n" + 16 * " "

FAULTS = {
    "a release too many": ("count=1, pred=turn > 0)", "count=1, pred=True)"),
    "a store not waited for": ("            tma.store_wait(0)\n", ""),
    "one warpgroup releases for both": ("init(empty.index(stage), count=2)",
                                        "init(empty.index(stage), count=1)"),
    "keys not waited for": ("mbarrier.wait(k_full.index(stage), place // STAGES & 1)", "pass"),
    "values not waited for": ("mbarrier.wait(v_full.index(stage), place // STAGES & 1)", "pass"),
    "a stage not waited for": ("mbarrier.wait(empty.index(stage), place // STAGES & 1 ^ 1)", "pass"),
    "a slot not waited for": ("mbarrier.wait(q_empty.index(slot), turn // SLOTS & 1 ^ 1)", "pass"),
    "queries not waited for": ("mbarrier.wait(q_full.index(slot), turn // SLOTS & 1)", "pass"),
    "the wrong phase": ("mbarrier.wait(k_full.index(stage), place // STAGES & 1)",
                        "mbarrier.wait(k_full.index(stage), place // STAGES & 1 ^ 1)"),
    "no fence": ("            fence_async_shared()\n", ""),
    "kept past its head": ("release = (item == end - 1) | (tile == tiles - 1)", "release = item == end - 1"),
    "kept past its batch row": ("release = (item == end - 1) | (tile == tiles - 1)",
                                "release = tile == tiles - 1"),
    "not brought for the first tile": ("if not RESIDENT or (item == begin) | (tile == 0):",
                                       "if not RESIDENT or tile == 0:"),
    "sets in another order": (BETWEEN.join(BOTH_SETS), BETWEEN.join(reversed(BOTH_SETS))),
    "released under a product": (f"acc = warpgroup_mma_wait(0, deps=[acc])\n            {RELEASE}",
                                 f"{RELEASE}\n            acc = warpgroup_mma_wait(0, deps=[acc])"),
    "not a number": ('finite = gl.where(higher == -float("inf"), 0.0, higher)', "finite = higher"),
    "old sums not shrunk": ("acc = acc * gl.convert_layout(shrink, out_row)[:, None]", "acc = acc * 1.0"),
    "too many bytes": ("mbarrier.expect(full, ROWS * E * 2)", "mbarrier.expect(full, ROWS * E * 4)"),
    "too few bytes": ("mbarrier.expect(full, ROWS * E * 2)", "mbarrier.expect(full, ROWS * E)"),
    "the wrong slot": ("(turn + 1) % SLOTS", "turn % SLOTS"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told(fault, tmp_path, assert_close):
    right, wrong = FAULTS[fault]
    text = Path(hopper.__file__).read_text("utf-8")
    assert right in text
    text = text.replace("from .common", "from conceptmaster.kernels.common")
    path = tmp_path / "faulty.py"
    path.write_text(text.replace(right, wrong), "utf-8")
    spec = importlib.util.spec_from_file_location("faulty", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises((Stuck, AssertionError)):
        for case in CASES:
            given = given_for(case)
            for seed in range(3):
                out = torch.full_like(given[0], torch.nan)
                with launches_to(Emulator(seed)):
                    module.hopper_attention_triton(out, *given, programs=CASES[case][-1])
                assert_close(out, exactly(*given), "bfloat16")
