"""What an export costs: minutes by the clock and of the processor, memory and the bundle's size, of
`conceptmaster export` in its own process.

    python tests/full_size/export_cost.py RESULT.json base/ --output bundle --size 832x480

Everything behind RESULT.json goes to `conceptmaster export`. Memory is sampled ten times a second: `resident`
with the parts of files that are mapped, which the system takes back when it needs them, and `anonymous`
without, which it cannot. Linux only.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from conceptmaster.benchmarks.reports import commit, machine, write

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "transformers", "diffusers", "safetensors")
FIELDS = {"VmRSS": "resident", "RssAnon": "anonymous"}


def measure(arguments: list[str]) -> dict[str, object]:
    """Runs `conceptmaster export ARGUMENTS`; raises CalledProcessError where it fails."""
    command = [sys.executable, "-m", "conceptmaster", "export", *arguments, "--json"]
    peak = dict.fromkeys(FIELDS.values(), 0)
    start, before = time.perf_counter(), _processor_seconds()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            for name, value in _memory(process.pid).items():
                peak[name] = max(peak[name], value)
            time.sleep(0.1)
        assert process.stdout is not None
        out = process.stdout.read()
    minutes = (time.perf_counter() - start) / 60
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    files = {path.name: path.stat().st_size for path in sorted(Path(_output(arguments)).iterdir())}
    return {
        "command": "conceptmaster export " + " ".join(map(_named, arguments)),
        "commit": commit(),
        "minutes": round(minutes, 1),
        "processor_minutes": round((_processor_seconds() - before) / 60, 1),
        "peak_gib": {name: round(value / 2**20, 2) for name, value in peak.items()},
        "bundle_gb": round(sum(files.values()) / 1e9, 2),
        "files": files,
        "graphs": json.loads(out)["graphs"],
        "machine": machine(PACKAGES)
        | {
            "threads": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
    }


def _processor_seconds() -> float:
    """Of all processes that this one has started and that have ended: user and system."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _memory(pid: int) -> dict[str, int]:
    """KiB by FIELDS' names; nothing of a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    entries = (line.split() for line in lines)
    return {FIELDS[e[0][:-1]]: int(e[1]) for e in entries if e and e[0][:-1] in FIELDS}


def _named(argument: str) -> str:
    """An argument as it is told elsewhere: of a path the last name."""
    return Path(argument).name if "/" in argument and Path(argument).exists() else argument


def _output(arguments: list[str]) -> str:
    return arguments[arguments.index("--output") + 1]


def main() -> None:
    """The command line."""
    if len(sys.argv) < 3 or "--output" not in sys.argv:
        raise SystemExit(__doc__)
    result = measure(sys.argv[2:])
    write(result, Path(sys.argv[1]))
    print(
        json.dumps({name: result[name] for name in ("minutes", "processor_minutes", "peak_gib", "bundle_gb")})
    )


if __name__ == "__main__":
    main()
