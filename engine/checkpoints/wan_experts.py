"""Bases of two transformers, as Wan2.2's A14B: experts for high and for low noise, and the boundary
between."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from ...errors import ConfigError
from ..checked import is_number
from ..transformer_config import TransformerConfig
from .base import Base
from .bernini import SKIPPED, is_bernini
from .diffusers_folder import INDEX, LAYOUT
from .releases import release_of

EXPERT = re.compile(r"(high|low)[-_ ]?noise", re.IGNORECASE)
ONE_OF_TWO = re.compile(r"(?<![a-z])(high|low)(?![a-z])", re.IGNORECASE)
"""Enough where there are two: of one alone, "low" may be about something else."""
HAVE = "Wan2.2's T2V-A14B has 0.875, I2V-A14B 0.9"


def read_boundary(base: Base, first: TransformerConfig, second: TransformerConfig | None) -> float | None:
    """Down to which time, as a fraction, the first of two experts runs; None for one transformer.

    Args: second: the configuration of the part transformer_2, None where it is not there. Outside diffusers'
        layout, which must say it, the boundary is the release's.
    Raises: ConfigError, one line: an expert or the boundary is missing, the boundary is none, the experts
        are not of one shape.
    """
    listed, said = base.index.get("transformer_2"), base.index.get("boundary_ratio")
    named = isinstance(listed, list) and any(listed)
    if said is not None and not (is_number(said) and 0 < said < 1):
        raise ConfigError(
            f"{base.where}: boundary_ratio must be a number between 0 and 1 ({HAVE}), got {said!r:.80}"
        )
    if second is None:
        if named or said is not None:
            why = f"{INDEX} " + ("names one" if named else f"has boundary_ratio {said:g}")
            why = f"config.json does not say {SKIPPED}" if is_bernini(base.root) else why
            raise ConfigError(
                f"{base.where} has no transformer_2, the expert for low noise, but its {why}: "
                "one expert alone makes no video"
            )
        where = base.part("transformer").where
        if (expert := expert_named(where)) is not None or "a14b" in "/".join(where.parts[-2:]).lower():
            kind = "one" if expert is None else f"the {expert}-noise one"
            raise ConfigError(
                f"{where} is by its name {kind} of Wan2.2 A14B's two experts, which alone makes no video: "
                "give both, --transformer FILE (high noise) and --transformer-2 FILE (low noise)"
            )
        return None
    places = [base.part(name).where for name in ("transformer", "transformer_2")]
    if places[0] == places[1]:
        raise ConfigError(f"{places[0]} is given for both experts, of high noise and of low")
    if said is None and base.layout == LAYOUT:
        raise ConfigError(
            f"{base.where} has a transformer_2, but no boundary_ratio in {INDEX} says when it runs: {HAVE}"
        )
    if [expert_named(where, True) for where in places] == ["low", "high"]:
        raise ConfigError(
            f"{base.where}: by their names the two experts are swapped: the high-noise one is the "
            "transformer, the low-noise one transformer_2 (--transformer-2)"
        )
    for field in dataclasses.fields(TransformerConfig):
        high, low = getattr(first, field.name), getattr(second, field.name)
        if high != low:
            raise ConfigError(
                f"{base.where}: the two experts must have one shape, but {field.name} is {high!r:.60} in "
                f"transformer and {low!r:.60} in transformer_2"
            )
    return release_of(base).boundary if said is None else float(said)


def expert_named(where: Path, of_two: bool = False) -> str | None:
    """ "high" or "low", where the name of a file, or of its folder, says which of two experts it is; of_two:
    whether there are two."""
    found = EXPERT.search(where.name) or EXPERT.search(where.parent.name)
    if of_two and found is None:
        found = ONE_OF_TWO.search(where.name)
    return None if found is None else found[1].lower()
