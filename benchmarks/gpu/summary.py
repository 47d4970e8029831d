"""What a run found, in a screenful."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .card import clocks_in_words
from .whole.making import in_words


def summary(report: dict[str, Any]) -> list[str]:
    """Lines for people. Of what is red there is no time, and nothing is compared with it."""
    return ["", *_videos(report), *_kernels(report), *_model(report), *_answers(report), *_not(report)]


def _videos(report: dict[str, Any]) -> Iterator[str]:
    for part in ("whole", "sprites", "high", "ranks"):
        for title, entry in report.get(part, {}).items():
            if not isinstance(entry, dict):
                continue
            if "wrong" in entry:
                yield f"{part}, {title}: WRONG, {entry['wrong']}"
                continue
            if "unchecked" in entry:
                yield f"{part}, {title}: not checked, {entry['unchecked']}"
            for name, told in entry.get("videos", {}).items():
                if "seconds" in told:
                    yield f"{part}, {title}, {name}: {in_words(told)}"


def _kernels(report: dict[str, Any]) -> Iterator[str]:
    rows = report.get("cases", {})
    if rows:
        red = [name for name, row in rows.items() if not row["ok"]]
        yield f"kernels: {len(rows) - len(red)} of {len(rows)} are right" + (
            f"; RED: {'; '.join(red)}" if red else ""
        )
    for name, row in rows.items():
        timing = row.get("timing", {})
        lost = [
            f"{rival} {entry['times_ours']:.2f}×"
            for rival, entry in timing.items()
            if entry.get("times_ours", 1.0) < 1.0
        ]
        if row["ok"] and lost:
            yield f"  loses: {name}: {', '.join(lost)}"


def _model(report: dict[str, Any]) -> Iterator[str]:
    for part, kinds in (("forward", ("timing", "step")), ("ladder", ("timing",)), ("compiled", ("timing",))):
        for kind in kinds:
            timing = report.get(part, {}).get(kind, {})
            words = [f"{n} {e['p50_ms']:.1f}" for n, e in timing.items() if "p50_ms" in e]
            if words:
                yield f"{part}{', step' if kind == 'step' else ''}, ms: {', '.join(words)}"
    for key in ("clocks", "step_clocks"):
        if "sm_mhz" in (clocks := report.get("forward", {}).get(key, {})):
            yield f"forward, {key.replace('_', ' ')}: {clocks_in_words(clocks)}"
    if "lossless" in (forward := report.get("forward", {})):
        yield f"forward: {'lossless' if forward['lossless'] else 'NOT lossless'}, {forward['relative_l2']}"
    words = [f"{n} {e['p50_ms']:.1f}" for n, e in report.get("stages", {}).items() if "p50_ms" in e]
    if words:
        yield f"stages, ms: {', '.join(words)}"


def _answers(report: dict[str, Any]) -> Iterator[str]:
    for name, found in report.get("questions", {}).items():
        timing = found.get("timing", {}) if isinstance(found, dict) else {}
        words = [
            f"{n} {e['p50_ms']:.3f}" if "p50_ms" in e else f"{n} {next(iter(e))}" for n, e in timing.items()
        ]
        if words:
            yield f"{name}, ms: {', '.join(words)}"


def _not(report: dict[str, Any]) -> Iterator[str]:
    for part in report.get("parts", ()):
        for kind in ("failed", "missing"):
            if kind in (found := report.get(part, {})):
                yield f"{kind}: {part}: {found[kind]}"
    if report.get("left_out"):
        yield f"no time was left for: {', '.join(report['left_out'])}"
    yield "all is right" if report["ok"] else "NOT ALL IS RIGHT"
