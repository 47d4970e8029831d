"""Models of the Hugging Face Hub by name: the one place that calls huggingface_hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ...errors import MissingDependency, WeightsError, how_to_install

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")


def snapshot(place: str, revision: str | None, wanted: Sequence[str]) -> Path:
    """The folder that holds a model's files, which are fetched if need be.

    Args: place: OWNER/NAME; revision: a branch, tag or commit; wanted: patterns of files. The Hub's cache and
        its environment variables (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, …) are honoured.
    Raises: WeightsError, one line; MissingDependency without huggingface_hub.
    """
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"{place} is no folder, and the Hugging Face Hub needs: {how_to_install('export')}"
        ) from error
    try:
        return Path(snapshot_download(place, revision=revision, allow_patterns=list(wanted)))
    except Exception as error:  # those of huggingface_hub and of its HTTP client have no common base
        reason = " ".join(str(error).split()) or type(error).__name__
        at = "" if revision is None else f" at revision {revision!r}"
        raise WeightsError(
            f"{place} is no folder, and not to be had from the Hub{at}: {reason:.300}"
        ) from error
