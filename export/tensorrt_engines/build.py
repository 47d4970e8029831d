"""A bundle's graphs to TensorRT engines beside them, by the library's Python API.

BUNDLE/engines/sm90-tensorrt11.4.0-bf16/
    engines.json, NAME.engine, timing.cache
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ...atomic_write import check_folder_of
from ...errors import InputError
from ...hashed import sha256_file
from ...runtime.atomic_folder import Files, replacing_folder
from ...runtime.bundle_format import tensorrt_engines as stored
from ...runtime.bundle_format.find import Bundle
from ...runtime.bundle_format.tensorrt_engines import EngineFile, Engines
from ...runtime.progress import each
from . import builder
from .builder import Limits
from .builder_process import BuilderProcess, EngineSummary
from .calibrate import Calibration
from .older_parsers import spell_out, unknown_to
from .precision import prepare

OLDEST_FP8 = 89


@dataclass(frozen=True)
class Preparation:
    """How a bundle's graphs are written for TensorRT.

    precision: one of PRECISIONS; calibration: for fp8; unknown_operators: what the parser does not know.
    """

    precision: str
    calibration: Calibration | None = None
    unknown_operators: tuple[str, ...] = ()

    def write(self, bundle: Bundle, graph: str, target: Path) -> None:
        """Writes a graph of `bundle` to `target`. Raises what `prepare` raises."""
        largest = {} if self.calibration is None else self.calibration.largest.get(graph, {})
        with bundle.reading(graph) as path:
            prepare(path, target, self.precision, largest)
        spell_out(target, self.unknown_operators)


def build_all(
    bundle: Bundle, flavor: str, capability: int, how: Preparation, limits: Limits, show: bool
) -> tuple[Path, list[EngineSummary]]:
    """Builds every engine with the Python API; returns their folder and a summary of each.

    capability: from `find_target`; show: a progress bar on standard error.
    Raises: see `BuilderProcess.build` and `prepare`.
    """
    rtx = flavor == "rtx"  # which takes a target, and for which a timing cache does nothing
    version = stored.short_version(builder.library(flavor).__version__)
    if not rtx:
        how = replace(how, unknown_operators=tuple(unknown_to(version)))
    with_plugin = not rtx and not how.unknown_operators
    abi = stored.PLUGIN_ABI if with_plugin else 0
    engines = Engines(stored.FORMAT, flavor, version, capability, how.precision, abi, {})
    folder = place_of(bundle, engines.folder_name)
    summaries = []
    with replacing_engines(folder, stored.files) as new, BuilderProcess(flavor, with_plugin) as process:
        if (folder / stored.CACHE).is_file():
            shutil.copyfile(folder / stored.CACHE, new / stored.CACHE)
        for name in each(list(bundle.manifest.graphs), "build", show):
            graph = new / f".{name}.onnx"
            aim, cache = (capability, None) if rtx else (None, new / stored.CACHE)
            how.write(bundle, name, graph)
            engine = new / f"{name}.engine"
            summaries.append(process.build(graph, engine, how.precision, aim, limits, cache))
            for file in (graph, graph.with_name(f"{graph.name}.data")):
                file.unlink(missing_ok=True)
        vouch(new, engines, bundle)
    return folder, summaries


def place_of(bundle: Bundle, name: str) -> Path:
    """The folder `name` of engines of `bundle`."""
    return bundle.folder / stored.FOLDER / name


def check_place(bundle: Bundle) -> None:
    """Raises InputError where no engines can lie in `bundle`, before hours are spent on them."""
    folder = bundle.folder / stored.FOLDER
    check_folder_of(folder)
    if folder.is_symlink():
        raise InputError(f"{str(folder)!r} is a link: engines must lie in the bundle to be run")


@contextmanager
def replacing_engines(folder: Path, files: Files) -> Iterator[Path]:
    """Yields a new folder that takes the place `folder`, of a bundle's engines, see `replacing_folder`."""
    folder.parent.mkdir(exist_ok=True)
    try:
        with replacing_folder(folder, files, replace=True) as new:
            yield new
    finally:
        with suppress(OSError):
            folder.parent.rmdir()  # which is empty if these were the first engines, and nothing came of them


def find_target(flavor: str, capability: int | None) -> int:
    """The capability that engines are to be built for; None: that of the GPU here. Raises InputError for one
    that the library does not build for, and what `builder.library` and `builder.gpu_capability` raise."""
    known = builder.capabilities(builder.library(flavor))
    if flavor == "rtx":
        if capability is None or capability not in known:
            asked = "no --target" if capability is None else f"--target sm_{capability}"
            names = ", ".join(f"sm_{number}" for number in known)
            raise InputError(f"{asked}: TensorRT for RTX builds for one of {names}")
        return capability
    here = builder.gpu_capability()
    if capability not in (None, here):
        raise InputError(
            f"--target sm_{capability}: the GPU here is sm_{here}, and TensorRT builds for no other; "
            "--trtexec --dry-run writes what to run on another one"
        )
    return here


def require_fp8(capability: int) -> None:
    """Raises InputError for GPUs without 8-bit floating-point tensor cores."""
    if capability < OLDEST_FP8:
        raise InputError(f"fp8 needs sm_{OLDEST_FP8} or newer, not sm_{capability}: choose --precision bf16")


def vouch(folder: Path, engines: Engines, bundle: Bundle) -> None:
    """Writes engines.json: `engines`, with the hash of each engine in `folder` and of its graph."""
    for name, graph in bundle.manifest.graphs.items():
        file = f"{name}.engine"
        engines.engines[name] = EngineFile(file, sha256_file(folder / file), stored.graph_sha256(graph))
    stored.save(engines, folder)


def table(summaries: Iterable[EngineSummary]) -> str:
    """For people, a line each."""
    rows = [f"{'graph':14} {'engine':>10} {'layers':>7}  attention"]
    for one in summaries:
        whole, apart = one.whole_attention, one.decomposed_attention
        attention = f"{whole} whole, {apart} taken apart" if whole or apart else ""
        rows.append(f"{one.graph:14} {one.size / 2**20:7.2f} MB {one.layers or '':>7}  {attention}")
    return "\n".join(rows)
