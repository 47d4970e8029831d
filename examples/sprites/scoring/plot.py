"""The chart of a step sweep: a panel per measure; and the only place that imports matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conceptmaster.atomic_write import replacing
from conceptmaster.errors import MissingDependency, how_to_install

from .measures import MEASURES
from .reports import Row

COLUMNS = 3
COLOURS = ("#1f6fb2", "#d1701f", "#3a8f4d", "#8a5aa8")
"""One per solver; told apart with colour-blind eyes too."""
STYLES = (("--", "o"), ("-", "s"), (":", "^"), ("-.", "D"))
"""Line and marker, one per guidance, the weakest first."""
OFFSET = 1.025
"""Lines stand apart sideways by this factor, so that equal ones do not hide each other."""


def import_matplotlib() -> Any:
    """``matplotlib.figure.Figure``, which draws without a display. Raises MissingDependency."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency(f"a plot needs matplotlib: {how_to_install('dev')}") from error
    return Figure


def plot_sweep(rows: Sequence[Row], chance: Mapping[str, float], path: Path) -> None:
    """Write the chart as a PNG, whole or not at all: share won over steps, a line per solver and guidance.

    rows: of one sweep; chance: measure → 0..1, a grey line. Raises MissingDependency, OSError.
    """
    panels = -(-(len(MEASURES) + 1) // COLUMNS)  # one more for the legend
    figure = import_matplotlib()(figsize=(4 * COLUMNS, 3.2 * panels), layout="constrained")
    axes = figure.subplots(panels, COLUMNS).ravel()
    for axis, measure in zip(axes, MEASURES, strict=False):
        _panel(axis, rows, measure, chance[measure])
    for axis in axes[len(MEASURES) :]:
        axis.axis("off")
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].legend(handles, labels, title="± one standard error", loc="center", frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _panel(axis: Any, rows: Sequence[Row], measure: str, chance: float) -> None:
    solvers = sorted({row.solver for row in rows})
    scales = sorted({row.guidance for row in rows})
    ticks = sorted({row.steps for row in rows})
    for solver in solvers:
        for scale in scales:
            line = sorted(
                (row for row in rows if (row.solver, row.guidance) == (solver, scale)), key=lambda r: r.steps
            )
            if not line:
                continue
            number = solvers.index(solver) * len(scales) + scales.index(scale)
            aside = OFFSET ** (number - (len(solvers) * len(scales) - 1) / 2)
            style, marker = STYLES[scales.index(scale) % len(STYLES)]
            axis.errorbar(
                [row.steps * aside for row in line],
                [100 * row.scores[measure] for row in line],
                [100 * (row.standard_errors[measure] or 0.0) for row in line],
                color=COLOURS[solvers.index(solver) % len(COLOURS)],
                linestyle=style,
                marker=marker,
                markersize=4,
                linewidth=1.4,
                elinewidth=0.8,
                capsize=2,
                label=f"{solver}, " + ("no guidance" if scale == 1 else f"guidance {scale:g}"),
            )
    axis.axhline(100 * chance, color="0.6", linewidth=0.8, label="chance")
    axis.set_title(measure.replace("_", " "), fontsize=11)
    axis.set_xscale("log")
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("steps")
    axis.set_ylabel("won, percent")
    axis.grid(axis="y", color="0.9", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
