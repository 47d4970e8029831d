"""build.sh and what becomes of it, with a stand-in for trtexec that only writes files. No engine is built."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("onnxscript")

from conceptmaster.cli import main  # noqa: E402
from conceptmaster.errors import ExportError, MissingDependency  # noqa: E402
from conceptmaster.export.tensorrt_engines import trtexec as trtexec_engines  # noqa: E402
from conceptmaster.export.tensorrt_engines.builder import Limits  # noqa: E402
from conceptmaster.runtime.bundle_format import tensorrt_engines as stored  # noqa: E402
from conceptmaster.runtime.bundle_format.find import SHIPPED, Bundle  # noqa: E402
from conceptmaster.runtime.bundle_format.manifest import load  # noqa: E402

TRTEXEC = """#!/usr/bin/env bash
echo "&&&& RUNNING TensorRT.trtexec [TensorRT v101303] [b9] # trtexec $*"
for option in "$@"; do
  case "$option" in
    --onnx=*) test -f "${option#--onnx=}" || exit 1 ;;
    --saveEngine=*) echo engine > "${option#--saveEngine=}" ;;
  esac
done
"""


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(SHIPPED / "sprites", folder)
    return folder


@pytest.fixture
def trtexec(tmp_path, monkeypatch):
    path = tmp_path / "bin" / "trtexec"
    path.parent.mkdir()
    path.write_text(TRTEXEC)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    return path


def test_the_script_has_a_command_for_every_graph():
    text = trtexec_engines.script_text(["a", "b"], 90, Limits(4 << 30, 3))
    commands = [line for line in text.splitlines() if line.startswith("trtexec")]
    wanted = "--stronglyTyped --timingCacheFile=timing.cache --skipInference "
    wanted += "--memPoolSize=workspace:4096M --builderOptimizationLevel=3"
    assert commands == [
        f"trtexec --onnx=graphs/{name}.onnx --saveEngine={name}.engine {wanted} 2>&1 | tee -a build.log"
        for name in "ab"
    ]


def test_written_run_and_collected(folder, trtexec, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    folder = folder.rename("-rf").absolute()  # which nobody may take for an option
    options = ["--trtexec", "--target", "sm_90", "--precision", "fp16"]
    assert main(["build", "./-rf", *options, "--quiet"]) == 0
    files, engines = stored.choose(Bundle.open(folder), "tensorrt", "10.13.3", 90)
    place = files.folder
    assert engines.precision == "fp16" and engines.plugin_abi == 0
    assert {path.name for path in place.iterdir()} >= {"build.sh", "build.log", "graphs", "engines.json"}
    assert place.name in capsys.readouterr().out


def test_dry_run_then_by_hand_then_collect(folder, trtexec, capsys):
    import subprocess

    options = ["--trtexec", "--target", "sm_90"]
    assert main(["build", str(folder), *options, "--dry-run", "--quiet"]) == 0
    script = capsys.readouterr().out.strip()
    assert main(["build", str(folder), *options, "--collect"]) == 2  # not run yet
    subprocess.run([script], check=True, stdout=subprocess.DEVNULL)
    assert main(["build", str(folder), *options, "--collect"]) == 0


def test_engines_that_wait_are_not_thrown_away_and_notes_stop_it(folder, trtexec, capsys):
    import subprocess

    options = ["--trtexec", "--target", "sm_90"]
    assert main(["build", str(folder), *options, "--dry-run", "--quiet"]) == 0
    script = Path(capsys.readouterr().out.strip())
    (script.parent / "note").touch()
    assert main(["build", str(folder), *options, "--dry-run", "--quiet"]) == 2
    assert "would be lost: 'note'" in capsys.readouterr().err
    subprocess.run([script], check=True, stdout=subprocess.DEVNULL)
    assert main(["build", str(folder), *options, "--dry-run", "--quiet"]) == 2
    assert "holds engines that wait: --collect" in capsys.readouterr().err
    assert main(["build", str(folder), *options, "--collect"]) == 0
    assert [path.name for path in script.parent.iterdir()] == ["note"]


def test_a_failed_build_leaves_nothing_in_the_bundle(folder, monkeypatch):
    def fail(*arguments):
        raise ExportError("no")

    monkeypatch.setattr(trtexec_engines.Preparation, "write", fail)
    before = sorted(folder.rglob("*"))
    assert main(["build", str(folder), "--trtexec", "--target", "sm_90", "--dry-run", "--quiet"]) == 1
    assert sorted(folder.rglob("*")) == before


def test_where_engines_cannot_go(folder, tmp_path, capsys):
    (folder / "engines").symlink_to(tmp_path)
    assert main(["build", str(folder), "--trtexec", "--target", "sm_90", "--dry-run", "--quiet"]) == 2
    assert "engines' is a link: engines must lie in the bundle" in capsys.readouterr().err


def test_an_older_trtexec_gets_graphs_that_it_knows(folder):
    import onnx

    options = ["--trtexec", "--target", "sm_90", "--dry-run", "--quiet", "--trtexec-version", "10.14"]
    assert main(["build", str(folder), *options]) == 0
    graphs = sorted(folder.glob("engines/*/graphs/*.onnx"))
    assert {path.stem for path in graphs} == set(load(folder).graphs)
    found = {node.op_type for path in graphs for node in onnx.load(str(path)).graph.node}
    assert "Attention" in found and not found & {"RotaryEmbedding", "RMSNormalization"}


def test_fp8_goes_into_the_scripts_graphs(folder, capsys):
    import onnx

    options = ["--trtexec", "--target", "sm_90", "--dry-run", "--quiet", "--precision", "fp8"]
    assert main(["build", str(folder), *options]) == 0
    out, error = capsys.readouterr()
    assert out.strip().endswith("sm90-by-hand-fp8/build.sh") and "fp8: a step's estimate" in error
    (denoise,) = folder.glob("engines/*/graphs/denoise.onnx")
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(str(denoise)).graph.node)


def test_the_command_that_builds_again_can_be_pasted(tmp_path):
    engines = stored.Engines(stored.FORMAT, "rtx", "1.7.1", 89, "bf16", 0, {})
    for name, word in (("-rf", "./-rf"), ("a b; touch $(x)", "'a b; touch $(x)'")):
        text = stored.rebuild_command(Path(name), engines)
        assert text == f"conceptmaster build {word} --target sm_89 --precision bf16 --flavor rtx"


@pytest.mark.parametrize("wrong", [{"version": "../../x"}, {"capability": 10**9}, {"version": "1" * 99}])
def test_engines_lie_in_a_folder_of_their_own(wrong):
    right = {"version": "1.7.1", "capability": 89}
    with pytest.raises(ValueError, match="version must be like"):
        stored.Engines(stored.FORMAT, "rtx", precision="bf16", plugin_abi=0, engines={}, **right | wrong)


def test_what_trtexec_says_is_told(folder, trtexec):
    trtexec.write_text("#!/bin/sh\necho '[E] no kernel for it'\nexit 1\n")
    script = folder / "build.sh"
    script.write_text("trtexec\n")
    with pytest.raises(ExportError, match=r"trtexec failed: \[E\] no kernel for it"):
        trtexec_engines.run_script(script)


def test_without_trtexec_the_script_is_named(folder, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingDependency, match="trtexec is not on the PATH"):
        trtexec_engines.run_script(folder / "build.sh")


@pytest.mark.parametrize(("line", "version"), [("v101303", "10.13.3"), ("v110400", "11.4.0")])
def test_the_version_is_read_from_the_log(tmp_path, line, version):
    log = tmp_path / "build.log"
    log.write_text(f"&&&& RUNNING TensorRT.trtexec [TensorRT {line}] [b9]\n")
    assert trtexec_engines.logged_version(log) == version
