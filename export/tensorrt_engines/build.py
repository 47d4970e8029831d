"""A bundle's graphs to TensorRT engines beside them, by the Python API or by trtexec.

BUNDLE/engines/sm90-tensorrt11.4.0-bf16/
    engines.json, NAME.engine, timing.cache
    graphs/NAME.onnx, build.sh, build.log    with trtexec
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ExportError, InputError
from ...runtime.bundle_format import manifest as manifests
from ...runtime.bundle_format import tensorrt_engines as stored
from ...runtime.bundle_format.hashed_file import sha256_file
from ...runtime.bundle_format.schema import Manifest
from ...runtime.bundle_format.tensorrt_engines import EngineFile, Engines
from . import builder
from .builder import Limits
from .calibrate import GRAPH as CALIBRATED
from .calibrate import Calibration
from .older_parsers import spell_out, unknown_to
from .precision import prepare

SCRIPT, LOG, CACHE = "build.sh", "build.log", "timing.cache"
LEAST_FP8 = 89
BY_HAND = "by-hand"  # where trtexec works, until it has said which version it is


@dataclass(frozen=True)
class Line:
    """What became of one graph: bytes of the engine, layers, attention layers kept whole and taken apart."""

    graph: str
    size: int
    layers: int = 0
    whole_attention: int = 0
    decomposed_attention: int = 0


def build_all(
    bundle: Path,
    flavor: str,
    capability: int | None,
    precision: str,
    limits: Limits,
    show: bool,
    calibration: Calibration | None = None,
) -> tuple[Path, list[Line]]:
    """Builds every engine with the Python API; returns their folder and a line each.

    capability: None for the GPU that is there, which is all that the full library builds for; calibration:
    for fp8.
    Raises: InputError, see engine_builder; BundleError for a bundle that is not sound.
    """
    manifest = manifests.load(bundle)
    trt = builder.library(flavor)
    target = _target(trt, flavor, capability)
    version = stored.short_version(trt.__version__)
    unknown = unknown_to(version) if flavor == "tensorrt" else []
    abi = _plugin(trt) if flavor == "tensorrt" and not unknown else 0
    engines = Engines(stored.FORMAT, flavor, version, target, precision, abi, {})
    folder = bundle / stored.FOLDER / engines.folder_name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / stored.FILE_NAME).unlink(missing_ok=True)  # until all are there, none is vouched for
    lines = []
    for name in _bar(manifest.graphs, "build", show):
        graph = folder / f".{name}.onnx"
        try:
            _prepare(bundle, manifest, name, graph, precision, calibration, unknown)
            rtx = flavor == "rtx"  # which takes a target, and for which a timing cache does nothing
            aim, cache = (target, None) if rtx else (None, folder / CACHE)
            built = builder.build(trt, graph, aim, limits, cache)
        finally:
            for file in (graph, graph.with_name(f"{graph.name}.data")):
                file.unlink(missing_ok=True)
        (folder / f"{name}.engine").write_bytes(built.engine)
        whole, apart = len(built.whole_attention), len(built.decomposed_attention)
        lines.append(Line(name, len(built.engine), built.layers, whole, apart))
    _store(folder, engines, manifest)
    return folder, lines


def write_script(
    bundle: Path,
    capability: int,
    precision: str,
    limits: Limits,
    show: bool,
    calibration: Calibration | None = None,
    version: str | None = None,
) -> Path:
    """Writes the prepared graphs and build.sh, which builds every engine with trtexec; returns its path.

    version: trtexec's, None for one that knows every operator.
    """
    manifest = manifests.load(bundle)
    folder = _by_hand(bundle, capability, precision)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "graphs").mkdir(parents=True)
    unknown = [] if version is None else unknown_to(version)
    for name in _bar(manifest.graphs, "prepare", show):
        _prepare(bundle, manifest, name, folder / "graphs" / f"{name}.onnx", precision, calibration, unknown)
    script = folder / SCRIPT
    script.write_text(script_text(manifest.graphs, capability, limits), encoding="utf-8")
    script.chmod(0o755)
    return script


def script_text(graphs: Iterable[str], capability: int, limits: Limits) -> str:
    """build.sh: one trtexec command line per graph."""
    # TensorRT 10 needs to be told that precision is the graph's; 11 knows nothing else, and takes the option
    options = ["--stronglyTyped", f"--timingCacheFile={CACHE}", "--skipInference"]
    if limits.workspace is not None:
        options.append(f"--memPoolSize=workspace:{max(1, limits.workspace >> 20)}M")
    if limits.level is not None:
        options.append(f"--builderOptimizationLevel={limits.level}")
    lines = [
        "#!/usr/bin/env bash",
        f"# Builds the engines of this folder. Run it on the GPU that they are for (sm_{capability}), then:",
        "#   conceptmaster build BUNDLE --trtexec --collect, with the --target and --precision of before",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        f": > {LOG}",
    ]
    for name in graphs:
        command = ["trtexec", f"--onnx=graphs/{name}.onnx", f"--saveEngine={name}.engine", *options]
        lines.append(f"{shlex.join(command)} 2>&1 | tee -a {LOG}")
    return "\n".join(lines) + "\n"


def run_script(script: Path) -> None:
    """Runs build.sh. Raises InputError when trtexec is not there or fails."""
    if shutil.which("trtexec") is None:
        raise ExportError(
            f"trtexec is not on the PATH: install TensorRT, or run {str(script)!r} where it is"
        )
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    if done.returncode:
        wrong = [line for line in done.stdout.splitlines() if "[E]" in line] or done.stderr.splitlines()
        raise ExportError(f"trtexec failed: {(wrong or ['it does not say why'])[0]:.300}")


def collect(bundle: Path, capability: int, precision: str) -> tuple[Path, list[Line]]:
    """Vouches for the engines that build.sh made; returns their folder, now named after trtexec's version."""
    manifest = manifests.load(bundle)
    folder = _by_hand(bundle, capability, precision)
    log = folder / LOG
    if not log.is_file():
        raise InputError(f"{str(log)!r} is not there: run {str(folder / SCRIPT)!r} first")
    missing = [name for name in manifest.graphs if not (folder / f"{name}.engine").is_file()]
    if missing:
        raise ExportError(f"{str(folder)!r} lacks the engines of {', '.join(missing)}: see {LOG}")
    engines = Engines(stored.FORMAT, "tensorrt", logged_version(log), capability, precision, 0, {})
    place = folder.with_name(engines.folder_name)
    shutil.rmtree(place, ignore_errors=True)
    folder.rename(place)
    _store(place, engines, manifest)
    return place, [Line(name, (place / f"{name}.engine").stat().st_size) for name in manifest.graphs]


def logged_version(log: Path) -> str:
    """The version that trtexec's first line gives: "[TensorRT v101303]" is 10.13.3. Raises InputError."""
    found = re.search(r"TensorRT v(\d{1,2})(\d\d)(\d\d)\b", log.read_text("utf-8", errors="replace"))
    if not found:
        raise ExportError(f"{str(log)!r} does not say which TensorRT it was")
    return ".".join(str(int(part)) for part in found.groups())


def find_target(flavor: str, capability: int | None) -> int:
    """The capability that engines are to be built for. Raises InputError for one that the library does not
    build for, and when the library or the GPU is not there."""
    return _target(builder.library(flavor), flavor, capability)


def require_fp8(capability: int) -> None:
    """Raises InputError for GPUs without 8-bit floating-point tensor cores."""
    if capability < LEAST_FP8:
        raise InputError(f"fp8 needs sm_{LEAST_FP8} or newer, not sm_{capability}: choose --precision bf16")


def gpu_capability() -> int:
    """The compute capability of the first GPU, 90 for sm_90. Raises InputError when there is none."""
    advice = (
        "TensorRT builds on the GPU that the engine is for. Elsewhere: --trtexec --dry-run --target sm_90 "
        "writes what to run there, --flavor rtx builds for RTX cards"
    )
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise ExportError(
            f"cuda-python is not installed: pip install 'conceptmaster[tensorrt]'. {advice}"
        ) from error
    kinds = runtime.cudaDeviceAttr
    numbers = []
    for kind in (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor):
        status, number = runtime.cudaDeviceGetAttribute(kind, 0)
        if int(status):
            raise ExportError(f"no GPU is there ({status.name}). {advice}")
        numbers.append(int(number))
    return 10 * numbers[0] + numbers[1]


def table(lines: list[Line]) -> str:
    """For people, a line each."""
    head = f"{'graph':14} {'engine':>10} {'layers':>7}  attention"
    rows = [
        f"{line.graph:14} {line.size / 2**20:7.2f} MB {line.layers or '':>7}  "
        + (
            f"{line.whole_attention} whole, {line.decomposed_attention} taken apart"
            if line.whole_attention or line.decomposed_attention
            else ""
        )
        for line in lines
    ]
    return "\n".join([head, *rows])


def _target(trt: Any, flavor: str, capability: int | None) -> int:
    known = builder.capabilities(trt)
    if flavor == "rtx":
        if capability is None or capability not in known:
            asked = "no --target" if capability is None else f"--target sm_{capability}"
            names = ", ".join(f"sm_{number}" for number in known)
            raise InputError(f"{asked}: TensorRT for RTX builds for one of {names}")
        return capability
    here = gpu_capability()
    if capability not in (None, here):
        raise InputError(
            f"--target sm_{capability}: the GPU here is sm_{here}, and TensorRT builds for no other; "
            "--trtexec --dry-run writes what to run on another one"
        )
    return here


def _by_hand(bundle: Path, capability: int, precision: str) -> Path:
    return bundle / stored.FOLDER / f"sm{capability}-{BY_HAND}-{precision}"


def _prepare(
    bundle: Path,
    manifest: Manifest,
    name: str,
    target: Path,
    precision: str,
    calibration: Calibration | None,
    unknown: Sequence[str],
) -> None:
    """Writes the graph `name` to `target` as a parser takes it that does not know the operators `unknown`."""
    largest = calibration.largest if calibration is not None and name == CALIBRATED else {}
    prepare(bundle / manifest.graphs[name].file, target, precision, largest)
    spell_out(target, unknown)


def _plugin(trt: Any) -> int:
    """Registers the Triton kernel's plugin; its ABI."""
    from .plugin import register

    register(trt)
    return stored.PLUGIN_ABI


def _store(folder: Path, engines: Engines, manifest: Manifest) -> None:
    for name, graph in manifest.graphs.items():
        file = f"{name}.engine"
        engines.engines[name] = EngineFile(
            file, sha256_file(folder / file), stored.graph_sha256(graph)
        )
    stored.save(engines, folder)


def _bar(graphs: Iterable[str], label: str, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(list(graphs), desc=label, unit="graph", disable=not show, leave=False)
