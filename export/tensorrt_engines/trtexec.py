"""Engines by trtexec, NVIDIA's command, here or on another machine: a script that is kept, and its results.

BUNDLE/engines/sm90-by-hand-bf16/    in the end it is named after trtexec's version
    graphs/NAME.onnx, build.sh, build.log, NAME.engine, timing.cache, engines.json
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from ...errors import ExportError, InputError, MissingDependency
from ...runtime.atomic_folder import link, remove
from ...runtime.bundle_format import tensorrt_engines as stored
from ...runtime.bundle_format.find import Bundle
from ...runtime.bundle_format.tensorrt_engines import Engines
from ...runtime.progress import each
from ...untrusted import shell_word
from .build import Preparation, place_of, replacing_engines, vouch
from .builder import Limits
from .builder_process import EngineSummary

BY_HAND = "by-hand"  # where trtexec works, until it has said which version it is


def write_script(bundle: Bundle, capability: int, how: Preparation, limits: Limits, show: bool) -> Path:
    """Writes the prepared graphs and build.sh, which builds every engine with trtexec; returns its path.

    show: a progress bar on standard error. Raises what `prepare` raises; InputError where engines that an
    earlier script has made wait to be collected.
    """
    folder, graphs = _by_hand(bundle, capability, how.precision), list(bundle.manifest.graphs)
    if all((folder / f"{name}.engine").is_file() for name in graphs):
        raise InputError(
            f"{str(folder)!r} holds engines that wait: --collect takes them over, or delete them"
        )
    with replacing_engines(folder, lambda _: stored.built_files(graphs)) as new:
        (new / stored.GRAPHS).mkdir()
        for name in each(graphs, "prepare", show):
            how.write(bundle, name, new / stored.GRAPHS / f"{name}.onnx")
        script = new / stored.SCRIPT
        script.write_text(script_text(graphs, capability, limits), encoding="utf-8")
        script.chmod(0o755)
    return folder / stored.SCRIPT


def script_text(graphs: Iterable[str], capability: int, limits: Limits) -> str:
    """build.sh: one trtexec command line per graph."""
    # TensorRT 10 needs to be told that precision is the graph's; 11 knows nothing else, and takes the option
    options = ["--stronglyTyped", f"--timingCacheFile={stored.CACHE}", "--skipInference"]
    if limits.workspace is not None:
        options.append(f"--memPoolSize=workspace:{max(1, limits.workspace >> 20)}M")
    if limits.level is not None:
        options.append(f"--builderOptimizationLevel={limits.level}")
    lines = [
        "#!/usr/bin/env bash",
        f"# Builds the engines of this folder. Run it on the GPU that they are for (sm_{capability}), then:",
        "#   conceptmaster build BUNDLE --trtexec --collect, with the --target and --precision of before",
        "set -euo pipefail",
        'cd -- "$(dirname -- "$0")"',
        f": > {stored.LOG}",
    ]
    for name in graphs:
        command = ["trtexec", f"--onnx={stored.GRAPHS}/{name}.onnx", f"--saveEngine={name}.engine", *options]
        lines.append(f"{shlex.join(command)} 2>&1 | tee -a {stored.LOG}")
    return "\n".join(lines) + "\n"


def run_script(script: Path) -> None:
    """Runs build.sh. Raises MissingDependency when trtexec is not there, ExportError when it fails."""
    if shutil.which("trtexec") is None:
        raise MissingDependency(
            f"trtexec is not on the PATH: install TensorRT, or run {shell_word(script)} where it is"
        )
    done = subprocess.run(["bash", "--", str(script)], capture_output=True, text=True)
    if done.returncode:
        wrong = [line for line in done.stdout.splitlines() if "[E]" in line] or done.stderr.splitlines()
        raise ExportError(f"trtexec failed: {(wrong or ['it does not say why'])[0]:.300}")


def collect(bundle: Bundle, capability: int, precision: str) -> tuple[Path, list[EngineSummary]]:
    """Vouches for the engines that build.sh made; returns their folder, now named after trtexec's version.

    Raises InputError when it has not been run, ExportError when it has not made them all.
    """
    graphs = bundle.manifest.graphs
    folder = _by_hand(bundle, capability, precision)
    log = folder / stored.LOG
    if not log.is_file():
        raise InputError(f"{str(log)!r} is not there: run {shell_word(folder / stored.SCRIPT)} first")
    missing = [name for name in graphs if not (folder / f"{name}.engine").is_file()]
    if missing:
        raise ExportError(f"{str(folder)!r} lacks the engines of {', '.join(missing)}: see {stored.LOG}")
    engines = Engines(stored.FORMAT, "tensorrt", logged_version(log), capability, precision, 0, {})
    place, files = place_of(bundle, engines.folder_name), stored.built_files(graphs)
    with replacing_engines(place, stored.files) as new:
        (new / stored.GRAPHS).mkdir()
        for name in files:
            if (folder / name).is_file():
                link(folder / name, new / name)
        vouch(new, engines, bundle)
    remove(folder, files)
    return place, [EngineSummary(name, (place / f"{name}.engine").stat().st_size) for name in graphs]


def logged_version(log: Path) -> str:
    """The version that trtexec's first line gives: "[TensorRT v101303]" is 10.13.3. Raises ExportError."""
    found = re.search(r"TensorRT v(\d{1,2})(\d\d)(\d\d)\b", log.read_text("utf-8", errors="replace"))
    if not found:
        raise ExportError(f"{str(log)!r} does not say which TensorRT it was")
    return ".".join(str(int(part)) for part in found.groups())


def _by_hand(bundle: Bundle, capability: int, precision: str) -> Path:
    return place_of(bundle, f"sm{capability}-{BY_HAND}-{precision}")
