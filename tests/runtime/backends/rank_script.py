"""What torchrun starts in test_ranks.py: `rank_script.py JOBS.json`. Rank 0 makes job after job over all
ranks and saves their latents; the others follow."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from conceptmaster import Concept, Pipeline, Request
from conceptmaster.runtime.backends import torchrun
from conceptmaster.runtime.backends.pytorch.options import TorchOptions


def latents_of(job: dict[str, Any], gpus: int | None) -> np.ndarray:
    """Of every sample, [samples,Cz,F,H,W], made over `gpus` (None: torchrun's ranks)."""
    options = TorchOptions(**job.get("options", {}))
    concepts = [Concept(label, Path(path)) for label, path in job["concepts"]]
    found: list[np.ndarray] = []
    arguments: dict[str, Any] = {"backend": "torch", "threads": 1, "options": options, "gpus": gpus}
    with Pipeline.from_bundle(job["bundle"], **arguments) as pipeline:

        def decoded(latents: np.ndarray, advance: Any) -> np.ndarray:
            found.append(latents)
            s = pipeline.manifest.shapes
            return np.zeros((s.frames + 64, s.height, s.width, 3), np.uint8)  # some models leave a few out

        pipeline._decode = decoded  # type: ignore[method-assign]
        pipeline.generate(Request(concepts=concepts, **job["request"]))
    return np.stack(found)


def main() -> int:
    """Over the jobs."""
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if torchrun.rank():
            from conceptmaster.runtime.backends.pytorch import follower

            assert follower.main() == 0
        else:
            np.save(job["save"], latents_of(job, None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
