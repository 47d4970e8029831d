"""The GPU script, rehearsed on the CPU at small sizes: its cases fit together, and it never times what is
wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.benchmarks.gpu import (  # noqa: E402
    case,
    check,
    forward,
    kernel_times,
    plot,
    setting,
    suite,
    timing,
)
from conceptmaster.benchmarks.gpu import model as gpu_model  # noqa: E402
from conceptmaster.benchmarks.reports import write  # noqa: E402
from conceptmaster.kernels import modulate  # noqa: E402


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(setting, "ROUNDS", 2)


def test_every_case_is_right_and_timed():
    lines: list[str] = []
    report = suite.run(case.Shapes("cpu", small=True), 1e9, lines.append, ("kernels",))
    assert report["ok"] and report["left_out"] == [] and len(report["cases"]) == 10
    for row in report["cases"].values():
        assert (
            row["timing"]["ours"]["p20_ms"]
            <= row["timing"]["ours"]["p50_ms"]
            <= row["timing"]["ours"]["p80_ms"]
        )
        assert len(row["timing"]) > 1  # a rival in the same run
    assert {"processor", "torch", "python"} <= report["hardware"].keys()
    assert json.loads(json.dumps(report)) == report


def test_what_is_wrong_is_not_timed_and_the_rest_is(monkeypatch):
    right = modulate.residual_reference
    monkeypatch.setattr(
        modulate,
        "residual_reference",
        lambda x, *rest: right(x, *rest) * (1 if x.dtype == torch.float64 else 1.2),
    )
    lines: list[str] = []
    parts = ("kernels", "forward", "ladder")
    report = suite.run(case.Shapes("cpu", small=True), 1e9, lines.append, parts)
    rows = report["cases"]
    assert not report["ok"] and [name for name, row in rows.items() if not row["ok"]] == [
        "residual and modulation, small"
    ]
    assert all(("timing" in row) == row["ok"] for row in rows.values())
    for part in ("forward", "ladder"):  # they use it
        assert report[part] == {"failed": "not run, a kernel of it is red: residual and modulation, small"}


def test_a_case_that_raises_stops_neither_the_others_nor_the_report(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(modulate, "residual_modulate", fail)
    lines: list[str] = []
    report = suite.run(case.Shapes("cpu", small=True), 1e9, lines.append, ("kernels",))
    rows = report["cases"]
    assert len(rows) == 10 and not report["ok"]
    assert rows["residual and modulation, small"]["failed"] == "RuntimeError: out of luck"
    assert sum("timing" in row for row in rows.values()) == 9
    assert any(line.startswith("FAILED residual and modulation") for line in lines)


def test_a_part_that_raises_stops_no_other_and_all_is_in_the_file(monkeypatch, tmp_path):
    def fail(size, job, high=True):
        job.found["before"] = 1
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(forward, "forward", fail)
    report: dict = {}
    path, written = tmp_path / "new" / "suite.json", []

    def say(line):
        write(report, path)
        written.append(json.loads(path.read_text("utf-8")))

    suite.run(case.Shapes("cpu", small=True), 1e9, say, ("forward", "profile"), report)
    assert report["forward"] == {"before": 1, "failed": "RuntimeError: out of luck"} and not report["ok"]
    assert report["profile"]["step"] and report["done"] == ["forward", "profile"]
    assert written[-1]["forward"] == report["forward"]
    assert [file.name for file in path.parent.iterdir()] == ["suite.json"]


def test_a_lost_gpu_ends_the_run_and_another_goes_on_with_the_rest(monkeypatch):
    def lose(*arguments, **options):
        raise timing.DeviceLost("illegal memory access")

    lines: list[str] = []
    parts = ("kernels", "forward", "profile")
    with monkeypatch.context() as patch:
        patch.setattr(forward, "forward", lose)
        report = suite.run(case.Shapes("cpu", small=True), 1e9, lines.append, parts)
    assert report["stopped"] == "illegal memory access" and report["at"] == "forward"
    assert "profile" not in report and not report["ok"]
    kept = json.loads(json.dumps(report))
    again = suite.run(case.Shapes("cpu", small=True), 1e9, lines.append, parts, kept)
    assert "stopped" not in again and again["profile"]["step"] and "lost" in again["forward"]["failed"]
    assert again["cases"] == report["cases"] and not again["ok"]


@pytest.mark.slow
def test_several_processes_check_as_one_does(monkeypatch):
    rows: dict = {"concept injection, small": {"ok": True, "relative_l2": 0.0}}
    lines: list[str] = []
    check.at_once(case.Shapes("cpu", small=True), rows, lines.append, processes=2)
    assert len(rows) == 10 and all(row["ok"] for row in rows.values()) and len(lines) == 9


def test_in_plain_torch_no_op_of_ours_is_called(monkeypatch):
    from conceptmaster.kernels import common

    class OnCuda:
        is_cuda, requires_grad = True, False

    assert common.served(OnCuda())
    with common.in_plain_torch():
        assert not common.served(OnCuda())
    assert common.served(OnCuda())


def test_a_process_that_dies_names_its_case_and_another_does_the_rest():
    rows: dict = {}
    lines: list[str] = []
    text = (
        '{"at": "a"}\n{"name": "a", "row": {"ok": true, "relative_l2": 0.1}}\n{"at": "b"}\nSegmentation fault'
    )
    assert check._collect(text, [3, 4], rows, "its process ended with -11", lines.append) == [3, 4]
    assert rows["b"] == {"ok": False, "failed": "its process ended with -11: Segmentation fault"}
    assert rows["a"]["ok"] and len(lines) == 2
    assert check._collect('{"done": 3}', [3, 4], rows, "", lines.append) == [4]


def test_a_case_without_time_is_named():
    report = suite.run(case.Shapes("cpu", small=True), 0.0, lambda line: None)
    assert report["left_out"] == list(suite.PARTS) and not report["cases"]


# The whole model: the tiny preset takes the place of Wan2.1's.


@pytest.fixture(scope="module")
def model():
    """The report of the parts of the model, and what was said."""
    pytest.importorskip("diffusers")
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setting, "ROUNDS", 2)
        patch.setattr(gpu_model, "MARGIN", 1.5)  # of a model so small rounding is a matter of luck
        parts = ("forward", "ladder", "concepts", "compiled", "full", "stages", "scaling", "profile")
        report = suite.run(case.Shapes("cpu", small=True), 1e9, lines.append, parts)
    return report, lines


@pytest.mark.slow
def test_a_forward_and_a_step_are_held_to_diffusers(model):
    report, _ = model
    forward = report["forward"]
    assert forward["lossless"] and forward["judged_by"] == "diffusers eager"
    assert forward["timing"].keys() == {"diffusers eager", "plain", "ours", "ours high"}
    assert forward["step"].keys() == {"diffusers eager", "ours", "ours high"}
    assert 0 < forward["full_size_apart"] < 0.05
    assert 0 < forward["relative_l2"]["ours"] < 0.05
    assert forward["of_matrix_rate"] == pytest.approx(forward["tflops"] / report["roofline"]["matrix_tflops"])
    assert json.loads(json.dumps(report)) == report


@pytest.mark.slow
def test_every_rung_has_its_error_and_its_gain(model):
    ladder = model[0]["ladder"]
    rungs = ["eager", "fastest attention", "fused kernels", "condition cache", "CUDA graph"]
    assert list(ladder["timing"])[:5] == rungs and len(ladder["timing"]) == 6
    for name in rungs:
        assert 0 < ladder["relative_l2"][name] < 0.05 and ladder["timing"][name]["gain"] > 0
    assert model[0]["profile"]["step"][0]["ms"] > 0


@pytest.mark.slow
def test_what_is_compiled_is_held_to_what_is_not(model):
    compiled = model[0]["compiled"]
    names = ["diffusers", "diffusers compiled", "ours", "ours compiled"]
    assert list(compiled["timing"]) == names and compiled["mode"] == "default"
    assert compiled["relative_l2"]["ours compiled"] < 1e-2 and compiled["compile_s"].keys() == set(
        names[1::2]
    )
    assert all(0 < error < 0.05 for error in model[0]["full"]["relative_l2"].values())


@pytest.mark.slow
def test_scaling_is_beside_its_prediction(model):
    rows = model[0]["scaling"]["rows"]
    assert [row["concepts"] for row in rows] == [2, 0, 2] and [row["frames"] for row in rows] == [5, 5, 9]
    assert rows[0]["predicted_ms"] == rows[0]["p50_ms"]
    assert rows[2]["predicted_ms"] > rows[0]["predicted_ms"] > rows[1]["predicted_ms"]


@pytest.mark.slow
def test_every_stage_is_timed(model):
    stages = model[0]["stages"]
    assert all("p50_ms" in entry for entry in stages.values()), stages
    assert list(stages) == [
        "text encoder",
        "image encoder",
        "Q-Former and DAM",
        "condition",
        "decode, first latent frame",
        "decode, four others, float32",
        "decode, four others, float16",
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


def test_a_forward_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(gpu_model, "MARGIN", 0.0)
    monkeypatch.setattr(gpu_model, "RIGHT", 0.0)
    lines: list[str] = []
    report = suite.run(case.Shapes("cpu", small=True), 1e9, lines.append, ("forward",))
    assert not report["ok"] and "timing" not in report["forward"] and "step" not in report["forward"]
    assert "NOT lossless" in lines[-1]


def test_a_rival_that_fails_is_named_and_the_others_are_timed():
    def fail():
        raise RuntimeError("out of\nluck")

    found = timing.in_turn({"good": lambda: None, "bad": fail}, 2)
    assert found["bad"] == {"failed": "RuntimeError: out of luck"} and "p50_ms" in found["good"]


def test_rounds_end_with_their_time():
    found = timing.in_turn({"slow": lambda: time.sleep(0.02)}, 1000, seconds=0.1)
    assert timing.MIN_ROUNDS <= found["slow"]["rounds"] < 20
    assert timing.in_turn({"slow": lambda: None}, 1000, seconds=0.0)["slow"]["rounds"] == 3


@pytest.mark.slow
def test_a_report_is_drawn(model, tmp_path):
    pytest.importorskip("matplotlib")
    plot.draw(model[0], tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text("utf-8")
    assert text.startswith("<?xml") and len(text) > 5000
    with pytest.raises(ValueError, match="nothing in this report has been timed"):
        plot.draw({"hardware": {}}, tmp_path / "b.svg")


def test_an_unwritten_element_is_wrong():
    first = next(kernel_times.each(case.Shapes("cpu", small=True)))
    out = first.ours()
    out.view(out.shape[0], out.shape[1], -1)[0, -1, 0] = float("nan")
    broken = case.Case(**{**vars(first), "ours": lambda: out})
    assert check.check(first)["ok"] and not check.check(broken)["ok"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    command = [sys.executable, "-m", "conceptmaster.benchmarks.gpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "make gpu" in done.stderr
