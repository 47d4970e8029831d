"""What a run kept, and what it dropped, where and why: report.json, and report.md for people."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

from conceptmaster.atomic_write import replacing

from .parts import Parts
from .stages import STAGES, Result
from .thresholds import Thresholds

SHOWN = 200
"""Dropped things that the report for people lists; the JSON has all."""


def build(results: dict[str, dict[str, Result]], thresholds: Thresholds, parts: Parts) -> dict[str, Any]:
    """The report of a run. results: by video, by stage.

    A stage counts shots, and "labels" what it dropped of a shot that may go on with other concepts.
    """
    stages, dropped = [], []
    for stage in STAGES:
        found = [(video, by[stage.name]) for video, by in results.items() if stage.name in by]
        out = [{"video": video, "stage": stage.name, **each} for video, (_, away) in found for each in away]
        dropped += out
        stages.append(
            {
                "stage": stage.name,
                "videos": len(found),
                "kept": sum(len(shots) for _, (shots, _) in found),
                "dropped": _counted(each for each in out if "label" not in each),
                "labels": _counted(each for each in out if "label" in each),
            }
        )
    clips = [line for by in results.values() for line in by.get("pairs", ([], []))[0]]
    pairs = [one for clip in clips for one in clip["concepts"]]
    return {
        "videos": len(results),
        "clips": len(clips),
        "pairs": len(pairs),
        "classes": dict(Counter(one["class"] for one in pairs).most_common()),
        "kinds": dict(Counter(one["kind"] for one in pairs).most_common()),
        "without": list(parts.without),
        "models": parts.told,
        "thresholds": dataclasses.asdict(thresholds),
        "stages": stages,
        "dropped": dropped,
    }


def write(report: dict[str, Any], output: Path) -> None:
    """Writes both. Raises OSError."""
    with replacing(output / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with replacing(output / "report.md") as temporary:
        temporary.write_text(markdown(report), encoding="utf-8")


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        "# Pairs",
        "",
        f"{report['videos']} videos gave {report['clips']} clips with {report['pairs']} pairs.",
        "",
        "| stage | videos | shots that go on | dropped | nouns dropped |",
        "| --- | --- | --- | --- | --- |",
    ]
    for stage in report["stages"]:
        why = [
            ", ".join(f"{n} {reason}" for reason, n in stage[key].items()) for key in ("dropped", "labels")
        ]
        lines.append(f"| {stage['stage']} | {stage['videos']} | {stage['kept']} | {why[0]} | {why[1]} |")
    lines += (
        ["", "Went without:", "", *(f"* {text}" for text in report["without"])] if report["without"] else []
    )
    if report["classes"]:
        lines += ["", "Classes: " + ", ".join(f"{n} {name}" for name, n in report["classes"].items()) + "."]
    lines += ["", "| video | stage | noun | why | value |", "| --- | --- | --- | --- | --- |"]
    for each in report["dropped"][:SHOWN]:
        cells = (each["video"], each["stage"], each.get("label", ""), each["why"], each.get("value", ""))
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    if len(report["dropped"]) > SHOWN:
        lines += ["", f"{len(report['dropped']) - SHOWN} more are in report.json."]
    return "\n".join(lines) + "\n"


def _counted(dropped: Any) -> dict[str, int]:
    return dict(Counter(each["why"] for each in dropped).most_common())
