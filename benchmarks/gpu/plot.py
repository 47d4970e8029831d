"""Draws a report of `make gpu`: the ladder, the forward against diffusers, and scaling beside its prediction.

python -m conceptmaster.benchmarks.gpu.plot benchmarks/results/gpu.json docs/performance.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

OURS, THEIRS = "#1f6f8b", "#b8b8b8"


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes `path` (.svg or .png). Raises ImportError without matplotlib, ValueError if nothing is timed."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    panels = [
        (title, rows)
        for title, rows in (
            ("one forward, base", _bars(report.get("forward", {}).get("timing", {}))),
            ("one step of the base, two branches", _bars(report.get("forward", {}).get("step", {}))),
            ("one step with concepts: the ladder", _bars(report.get("ladder", {}).get("timing", {}))),
            ("scaling (mark: predicted)", _scaling(report.get("scaling", {}).get("rows", []))),
        )
        if rows
    ]
    if not panels:
        raise ValueError("nothing in this report has been timed")
    heights = [len(rows) for _, rows in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8, 0.5 * sum(heights) + 1.2 * len(panels)), squeeze=False,
        gridspec_kw={"height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    for (title, rows), ax in zip(panels, axes[:, 0], strict=True):
        names = [name for name, _, _ in rows]
        ax.barh(
            names,
            [value for _, value, _ in rows],
            color=[THEIRS if "diffusers" in name or name == "eager" else OURS for name in names],
        )
        for place, (_, value, predicted) in enumerate(rows):
            ax.annotate(f" {value:.2f}", (value, place), va="center", fontsize=8)
            if predicted is not None:
                ax.plot([predicted] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1)
        ax.invert_yaxis()
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_xlabel("milliseconds, median", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    hardware = report["hardware"]
    figure.suptitle(
        f"{hardware.get('gpu', hardware['processor'])}, torch {hardware['torch']}, {report['commit']}",
        fontsize=8,
    )
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _bars(timing: dict[str, dict[str, Any]]) -> list[tuple[str, float, float | None]]:
    return [(name, entry["p50_ms"], None) for name, entry in timing.items() if "p50_ms" in entry]


def _scaling(rows: list[dict[str, Any]]) -> list[tuple[str, float, float | None]]:
    return [(row["name"], row["p50_ms"], row.get("predicted_ms")) for row in rows if "p50_ms" in row]


def main() -> int:
    """The command."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("report", type=Path, help="the JSON that `make gpu` wrote")
    parser.add_argument("output", type=Path, help=".svg or .png")
    arguments = parser.parse_args()
    try:
        draw(json.loads(arguments.report.read_text("utf-8")), arguments.output)
    except (OSError, ValueError, ImportError) as error:
        print(f"cannot draw {arguments.report}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
