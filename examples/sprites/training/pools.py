"""Pools of encoded shards: mapped, or on an accelerator.

On a GPU a step of this world takes tens of milliseconds; fetching its clips from files takes longer than
that. A clip with its pictures is 0.3 MB, so a hundred thousand of them fit there.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from conceptmaster.engine.config import ModelConfig

from .batches import Pool
from .shards import ARRAYS, is_encoded, open_array, shard_folders


def open_pool(folder: Path, config: ModelConfig, device: str) -> ShardPool:
    """The pool of a folder's shards whose batches come fastest for a model on this device."""
    kind = ShardPool if torch.device(device).type == "cpu" else ResidentPool
    return kind(folder, config, device)


class ShardPool(Pool):
    """All encoded shards of a folder, which stay there; grows when ``refresh`` finds new ones."""

    def __init__(self, folder: Path, config: ModelConfig, device: str = "cpu") -> None:
        super().__init__(config, device)
        self.folder = folder
        self.folders: list[Path] = []
        self.ends: list[int] = []
        """Of each shard, the number of its last clip and one."""
        self._arrays: list[dict[str, np.ndarray]] = []
        self.refresh()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def place(self, clip: int) -> tuple[int, int]:
        """The number of the shard that a clip stands in, in this pool, and of the clip in that."""
        shard = bisect_right(self.ends, clip)
        return shard, clip - (self.ends[shard - 1] if shard else 0)

    def rows(self, name: str, clips: Tensor) -> Tensor:
        """See ``Pool``."""
        places = [self.place(int(clip)) for clip in clips]
        found = [self._arrays[shard][name][clip] for shard, clip in places]
        return torch.from_numpy(np.stack(found)).to(self.device)

    def refresh(self) -> None:
        """Take up shards that have been encoded since."""
        for folder in shard_folders(self.folder):
            if folder not in self.folders and is_encoded(folder):
                self.folders.append(folder)
                self._arrays.append({name: open_array(folder, name) for name in ARRAYS})
                self.ends.append(len(self) + len(self._arrays[-1]["count"]))


class ResidentPool(ShardPool):
    """A ``ShardPool`` that is kept on its device."""

    def __init__(self, folder: Path, config: ModelConfig, device: str) -> None:
        self._resident: dict[str, Tensor] = {}
        super().__init__(folder, config, device)

    def rows(self, name: str, clips: Tensor) -> Tensor:
        """See ``Pool``."""
        return self._resident[name][clips]

    def refresh(self) -> None:
        """Take up shards that have been encoded since, to the device."""
        known = len(self._arrays)
        super().refresh()
        parts = [
            {name: torch.from_numpy(np.array(value)).to(self.device) for name, value in arrays.items()}
            for arrays in self._arrays[known:]
        ]
        if parts:
            parts = [self._resident, *parts] if self._resident else parts
            self._resident = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
