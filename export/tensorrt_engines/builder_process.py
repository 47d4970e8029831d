"""The builder in a process of its own: NVIDIA's library may crash, and then one line says so.

One process builds all engines of a bundle, since importing the library takes seconds. It reads an order a
line on standard input, and writes an answer a line, both JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ... import errors
from ...errors import ConceptMasterError, ExportError
from ...runtime.bundle_format.tensorrt_engines import MODULES
from .builder import Limits, build, graph_name, library


@dataclass(frozen=True)
class EngineSummary:
    """What became of one graph: bytes of the engine; layers, and attention layers kept whole and taken apart,
    of the network that TensorRT's parser made, 0 where trtexec has built it."""

    graph: str
    size: int
    layers: int = 0
    whole_attention: int = 0
    decomposed_attention: int = 0


class BuilderProcess:
    """Builds engines with the library of `flavor` until it is closed; to be used in a `with` statement.

    with_plugin: register this project's plugin first.
    """

    def __init__(self, flavor: str, with_plugin: bool) -> None:
        self._module = MODULES[flavor]
        self._errors = tempfile.TemporaryFile()
        path = os.pathsep.join(place or os.getcwd() for place in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, flavor, *(["with-plugin"] if with_plugin else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"PYTHONPATH": path},
            text=True,
        )

    def __enter__(self) -> BuilderProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()  # it has answered, or nobody waits for it
        self._process.communicate()
        self._errors.close()

    def build(
        self,
        graph: Path,
        engine: Path,
        precision: str,
        capability: int | None,
        limits: Limits,
        cache: Path | None,
    ) -> EngineSummary:
        """Builds the prepared `graph` and writes `engine`; the other arguments are those of `builder.build`.

        precision: what the graph was prepared in, for the message. Raises: what `builder.library`,
        `plugin.register` and `builder.build` raise; ExportError when the process ends instead of answering.
        """
        order = {"graph": graph, "engine": engine, "capability": capability, "cache": cache} | asdict(limits)
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(order, default=str), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:  # it was gone already
            answer = ""
        if not answer:
            raise ExportError(self._how_it_ended(graph_name(graph), precision))
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise getattr(errors, found["error"])(found["message"])
        return EngineSummary(**found)

    def _how_it_ended(self, graph: str, precision: str) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        how = f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        if code == -signal.SIGKILL:
            how += ", for which a lack of memory is the usual reason,"
        last = f" ({said[-1]:.200})" if said else ""
        return (
            f"the builder of {self._module} {how} while it built the graph {graph} in {precision}{last}: try "
            f"another --precision, --level 0, or another version of {self._module}"
        )


def serve(flavor: str, with_plugin: bool) -> None:
    """What the process does: answers orders until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    trt = None
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        graph, cache = Path(order["graph"]), order["cache"] and Path(order["cache"])
        try:
            if trt is None:
                trt = library(flavor)
                if with_plugin:
                    from .plugin import register

                    register(trt)
            limits = Limits(order["workspace"], order["level"])
            built = build(trt, graph, order["capability"], limits, cache)
            Path(order["engine"]).write_bytes(built.engine)
            whole, apart = len(built.whole_attention), len(built.decomposed_attention)
            answer = asdict(EngineSummary(graph_name(graph), len(built.engine), built.layers, whole, apart))
        except ConceptMasterError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], "with-plugin" in sys.argv)
