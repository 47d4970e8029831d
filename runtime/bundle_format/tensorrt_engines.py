"""engines.json: the TensorRT engines beside a bundle's graphs, and what they were built for. Format 1.

An engine runs on one kind of GPU, under one version of one TensorRT. So engines lie in a folder that says
both, `engines/sm90-tensorrt11.4.0-bf16/`, with the SHA-256 of each and of the graph that it was built from.
Whatever does not fit is a BundleError that names the command which builds it again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ...errors import BundleError, InputError
from ...untrusted import shell_word
from . import strict_json
from .find import Bundle
from .hashed_file import CheckedFiles, HashedFile
from .schema import GraphFile

FORMAT = 1
FILE_NAME = "engines.json"
FOLDER = "engines"
MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
EXTRAS = {"tensorrt": "tensorrt", "rtx": "tensorrt-rtx"}
"""By flavor, the library's module, and this project's extra that installs it."""
FLAVORS = tuple(MODULES)
"""tensorrt: the datacenter and workstation library; rtx: TensorRT for RTX, for consumers' cards."""
PRECISIONS = ("fp32", "fp16", "bf16", "fp8")
"""What engines compute their products in."""

CACHE, SCRIPT, LOG, GRAPHS = "timing.cache", "build.sh", "build.log", "graphs"
"""What lies beside engines: the builder's timings; of trtexec, its script, log and folder of graphs."""

PLUGIN_ABI = 1
"""Rises when the plugin's inputs, outputs or attributes change; 0 in an engine without the plugin."""


@dataclass(frozen=True)
class EngineFile:
    """One engine: its file, relative to its folder, and the `graph_sha256` of the bundle's graph it was built
    from."""

    file: str
    sha256: str
    graph_sha256: str

    def __post_init__(self) -> None:
        HashedFile(self.file, self.sha256)
        HashedFile(self.file, self.graph_sha256)

    @property
    def hashed(self) -> HashedFile:
        """The file with its own SHA-256."""
        return HashedFile(self.file, self.sha256)


@dataclass(frozen=True)
class Engines:
    """What engines.json says, but for its checksum.

    flavor: one of FLAVORS; version: of that library, as 11.4.0; capability: the GPU's, 90 for sm_90;
    precision: of the products; plugin_abi: see PLUGIN_ABI; engines: graph name -> engine.
    """

    format: int
    flavor: str
    version: str
    capability: int
    precision: str
    plugin_abi: int
    engines: dict[str, EngineFile]

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format must be {FORMAT}")
        if self.flavor not in FLAVORS:
            raise ValueError(f"unknown flavor {self.flavor!r:.80}")
        if not re.fullmatch(r"\w{1,9}(\.\w{1,9}){0,3}", self.version) or not 0 < self.capability < 1000:
            raise ValueError("version must be like 11.4.0 and capability like 90")
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r:.80}")

    @property
    def folder_name(self) -> str:
        """The folder below `engines/`."""
        return f"sm{self.capability}-{self.flavor}{self.version}-{self.precision}"


def target_capability(target: str) -> int:
    """ "sm_90" -> 90. Raises InputError for anything else."""
    found = re.fullmatch(r"sm_?(\d{2,3})", target)
    if not found:
        raise InputError(f"{target!r} is no target: write sm_ and the compute capability, sm_90 for an H100")
    return int(found[1])


def short_version(version: str) -> str:
    """ "11.4.0.106" -> "11.4.0": engines do not depend on what comes after."""
    return ".".join(version.split(".")[:3])


def graph_sha256(graph: GraphFile) -> str:
    """What an engine was built from: the graph, and the weights beside it, whose graph may be the same with
    others."""
    if not graph.external:
        return graph.sha256
    hashes = [graph.sha256, *(file.sha256 for file in graph.external)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def rebuild_command(bundle: Path, engines: Engines) -> str:
    """The command that builds these engines again."""
    flavor = " --flavor rtx" if engines.flavor == "rtx" else ""
    target = f"--target sm_{engines.capability} --precision {engines.precision}"
    return f"conceptmaster build {shell_word(bundle)} {target}{flavor}"


def save(engines: Engines, folder: Path) -> Path:
    """Writes engines.json, whole or not at all; returns its path. Raises OSError."""
    return strict_json.save(engines, folder / FILE_NAME)


def load(folder: Path) -> Engines:
    """Reads engines.json in `folder`, without looking at the engines. Raises BundleError."""
    path = folder / FILE_NAME
    try:
        return strict_json.load(Engines, path, FORMAT)
    except OSError as error:
        raise BundleError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise BundleError(
            f"bad engines: {str(path)!r} {error}; build them again: conceptmaster build"
        ) from None


def built(bundle: Path) -> list[Engines]:
    """What every engines.json below the folder `bundle` says. Raises BundleError."""
    return [load(path.parent) for path in sorted((bundle / FOLDER).glob(f"*/{FILE_NAME}"))]


def files(folder: Path) -> list[str]:
    """The files that building engines leaves in their folder, engines.json last.

    Raises: InputError where there is no engines.json; BundleError for an unreadable one.
    """
    if not (folder / FILE_NAME).exists():
        raise InputError(f"{str(folder)!r} is not empty and has no {FILE_NAME}: move it away")
    return [*built_files(load(folder).engines), FILE_NAME]


def built_files(graphs: Collection[str]) -> list[str]:
    """What building the engines of these graphs leaves, besides engines.json."""
    prepared = [f"{GRAPHS}/{name}.onnx{suffix}" for name in graphs for suffix in ("", ".data")]
    return [*(f"{name}.engine" for name in graphs), *prepared, CACHE, SCRIPT, LOG]


def choose(
    bundle: Bundle, flavor: str, version: str, capability: int, precision: str | None = None
) -> tuple[CheckedFiles, Engines]:
    """The engines for this GPU and library, every hash checked, and what their engines.json says.

    precision: one of PRECISIONS; None takes the only one that is there.
    Raises: InputError when there are several precisions and none is named; BundleError naming the command
    that builds them, when there are none for this GPU and library, and as `check` does.
    """
    found = built(bundle.folder)
    fitting = [
        e
        for e in found
        if (e.flavor, e.version, e.capability) == (flavor, version, capability)
        and precision in (None, e.precision)
    ]
    if len(fitting) > 1:
        choices = ", ".join(e.precision for e in fitting)
        raise InputError(f"{str(bundle.folder)!r} has engines in {choices}: choose one with --precision")
    if not fitting:
        wanted = Engines(FORMAT, flavor, version, capability, precision or "bf16", PLUGIN_ABI, {})
        there = ", ".join(e.folder_name for e in found) or "none"
        raise BundleError(
            f"{str(bundle.folder)!r} has no engines for sm_{capability} and {flavor} {version}"
            f"{f' in {precision}' if precision else ''} "
            f"(there are: {there}): {rebuild_command(bundle.folder, wanted)}"
        )
    (engines,) = fitting
    return check(bundle, engines), engines


def check(bundle: Bundle, engines: Engines) -> CheckedFiles:
    """The files of these engines, every hash checked. Raises BundleError naming the command that builds them
    again, when they were built from other graphs or for another plugin, or when a file is not what it was,
    or a link out of the bundle."""
    folder = bundle.folder / FOLDER / engines.folder_name
    build = rebuild_command(bundle.folder, engines)
    if engines.plugin_abi not in (0, PLUGIN_ABI):
        raise BundleError(
            f"the engines in {str(folder)!r} hold a plugin of ABI {engines.plugin_abi}, "
            f"this is {PLUGIN_ABI}: {build}"
        )
    files = CheckedFiles(folder, bundle.folder, lambda what: BundleError(f"{what}: {build}"))
    for name, graph in bundle.manifest.graphs.items():
        if name not in engines.engines:
            raise BundleError(f"{str(folder)!r} has no engine for the graph {name}: {build}")
        engine = engines.engines[name]
        path = folder / engine.file
        if engine.graph_sha256 != graph_sha256(graph):
            raise BundleError(f"{str(path)!r} was built from another {name} than this bundle's: {build}")
        files.check(engine.hashed)
    return files
