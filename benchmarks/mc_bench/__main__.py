"""MC-Bench: makes the set from a folder of pictures, and scores what any model made of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from conceptmaster.runtime.commands import Command, in_module, run_program

DESCRIPTION = """\
MC-Bench: six scenarios of two or three concepts, nine measures. `samples` writes the set as request lines,
`conceptmaster generate --requests` or any other system makes the videos, `score` measures them. No weights
ship: CLIP, DINOv2, OWLv2, CLIPSeg and SAM 2 are given by folder or by their name in the Hugging Face Hub;
what needs none runs without.
"""


def _here(name: str, summary: str, module: str, function: str = "") -> Command:
    return in_module(name, summary, f"conceptmaster.benchmarks.mc_bench.{module}", "mc-bench", function)


COMMANDS = (
    _here("samples", "write the set's request lines, from a folder of pictures", "command", "samples"),
    _here("score", "score a folder of videos", "command", "score"),
    _here("opens2v-requests", "write OpenS2V-Eval's prompts as request lines", "opens2v", "requests"),
    _here("opens2v-layout", "write request lines in OpenS2V-Eval's layout", "opens2v", "layout"),
    _here("opens2v-score", "score motion as OpenS2V-Eval does", "opens2v", "score"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command (sys.argv's if argv is None); returns its exit code, as ``conceptmaster``'s."""
    return run_program("python -m conceptmaster.benchmarks.mc_bench", DESCRIPTION, COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
