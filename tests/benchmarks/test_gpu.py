"""The GPU script, rehearsed on the CPU at small sizes: its cases fit together, and it never times what is
wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.benchmarks import gpu, gpu_cases, gpu_model, gpu_plot, gpu_video  # noqa: E402
from conceptmaster.kernels import modulate  # noqa: E402


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(gpu, "ROUNDS", 2)


def test_every_case_is_right_and_timed():
    lines: list[str] = []
    report = gpu.run(gpu_cases.Shapes("cpu", small=True), 1e9, lines.append, ("kernels",))
    assert report["ok"] and report["left_out"] == [] and len(report["cases"]) == 7
    for row in report["cases"].values():
        assert (
            row["timing"]["ours"]["p20_ms"]
            <= row["timing"]["ours"]["p50_ms"]
            <= row["timing"]["ours"]["p80_ms"]
        )
        assert len(row["timing"]) > 1  # a rival in the same run
    assert {"processor", "torch", "python"} <= report["hardware"].keys()
    assert json.loads(json.dumps(report)) == report


def test_nothing_is_timed_while_one_is_wrong(monkeypatch):
    right = modulate.residual_reference
    monkeypatch.setattr(
        modulate,
        "residual_reference",
        lambda x, *rest: right(x, *rest) * (1 if x.dtype == torch.float64 else 1.2),
    )
    lines: list[str] = []
    report = gpu.run(gpu_cases.Shapes("cpu", small=True), 1e9, lines.append)
    assert not report["ok"] and "roofline" not in report
    assert not any("timing" in row for row in report["cases"].values())
    assert lines[-1] == "a check is red: nothing is timed" and not any(" ms" in line for line in lines)


def test_a_case_without_time_is_named():
    report = gpu.run(gpu_cases.Shapes("cpu", small=True), 0.0, lambda line: None)
    assert report["left_out"] == [*report["cases"], "forward", "ladder", "video", "scaling", "stages"]


# The whole model: the tiny preset takes the place of Wan2.1's.


@pytest.fixture(scope="module")
def model():
    """The report of the parts of the model, and what was said."""
    pytest.importorskip("diffusers")
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "ROUNDS", 2)
        patch.setattr(gpu_model, "MARGIN", 1.5)  # of a model so small rounding is a matter of luck
        parts = ("forward", "ladder", "scaling", "stages")
        report = gpu.run(gpu_cases.Shapes("cpu", small=True), 1e9, lines.append, parts)
    return report, lines


def test_a_forward_and_a_step_are_held_to_diffusers(model):
    report, _ = model
    forward = report["forward"]
    rivals = {"diffusers eager", "diffusers compiled", "plain", "ours", "ours compiled"}
    assert forward["lossless"] and forward["judged_by"] == "diffusers eager"
    assert rivals <= forward["timing"].keys() and rivals <= forward["step"].keys()
    assert 0 < forward["relative_l2"]["ours"] < 0.05
    assert forward["relative_l2"]["ours high"] > forward["relative_l2"]["ours"]
    assert forward["of_matrix_rate"] == pytest.approx(forward["tflops"] / report["roofline"]["matrix_tflops"])
    assert json.loads(json.dumps(report)) == report


def test_every_rung_has_its_error_and_its_gain(model):
    ladder = model[0]["ladder"]
    rungs = ["eager", "fused kernels", "condition cache", "CUDA graph", "compile"]
    assert list(ladder["timing"])[:5] == rungs
    for name in rungs:
        assert 0 < ladder["relative_l2"][name] < 0.05 and ladder["timing"][name]["gain"] > 0
    assert ladder["profile"] and ladder["profile"][0]["ms"] > 0


def test_scaling_is_beside_its_prediction(model):
    rows = model[0]["scaling"]["rows"]
    assert [row["concepts"] for row in rows] == [2, 0, 2] and rows[0]["predicted_ms"] == rows[0]["p50_ms"]
    assert rows[2]["predicted_ms"] > rows[0]["predicted_ms"] > rows[1]["predicted_ms"]


def test_every_stage_is_timed(model):
    stages = model[0]["stages"]
    assert all("p50_ms" in entry for entry in stages.values()), stages
    assert list(stages) == [
        "text encoder",
        "image encoder",
        "Q-Former and DAM",
        "condition",
        "decode, first latent frame",
        "decode, each other",
    ]


def test_the_operations_are_counted_as_torch_counts_them():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = gpu_model.SMALL.config
    given = gpu_model.Inputs.of(config, "cpu", 2)
    call = gpu_model.step_call(gpu_model.build(config, "cpu"), given, True)
    plain = sdpa_kernel(SDPBackend.MATH)  # as products, which it counts: attention on a CPU it does not
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        call()
    counted = counter.get_total_flops()
    ours = sum(gpu_model.flops_of(config, 2).values())
    assert 0.75 < ours / counted <= 1  # the rest is outside of the blocks, much at this size


def test_a_forward_that_is_not_lossless_is_not_timed(monkeypatch):
    monkeypatch.setattr(gpu_model, "MARGIN", 0.0)
    lines: list[str] = []
    report = gpu.run(gpu_cases.Shapes("cpu", small=True), 1e9, lines.append, ("forward",))
    assert not report["ok"] and "timing" not in report["forward"] and "step" not in report["forward"]
    assert "NOT lossless" in lines[-1]


def test_a_rival_that_fails_is_named_and_the_others_are_timed():
    def fail():
        raise RuntimeError("out of\nluck")

    found = gpu.in_turn({"good": lambda: None, "bad": fail}, 2)
    assert found["bad"] == {"failed": "RuntimeError: out of luck"} and "p50_ms" in found["good"]


def test_the_shipped_model_end_to_end():
    found = gpu_video.shipped("cpu", 2, steps=2)
    for entry in found.values():
        assert {"load", "encode", "condition", "denoise", "decode", "total"} <= entry["warm"].keys()
        assert isinstance(entry["cold_s"]["encode_mp4"], float)
    assert found["torch on cpu"]["planned_bytes"]["peak"] > 0


def test_a_report_is_drawn(model, tmp_path):
    pytest.importorskip("matplotlib")
    gpu_plot.draw(model[0], tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text("utf-8")
    assert text.startswith("<?xml") and len(text) > 5000
    with pytest.raises(ValueError, match="nothing in this report has been timed"):
        gpu_plot.draw({"hardware": {}}, tmp_path / "b.svg")


def test_an_unwritten_element_is_wrong():
    case = next(gpu._each(gpu_cases.Shapes("cpu", small=True)))
    out = case.ours()
    out[0, -1, 0, 0] = float("nan")
    broken = gpu_cases.Case(**{**vars(case), "ours": lambda: out})
    assert gpu.check(case)["ok"] and not gpu.check(broken)["ok"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    command = [sys.executable, "-m", "conceptmaster.benchmarks.gpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "make gpu" in done.stderr
