"""Memory for patched tensors as a user of pools."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from opguard.pools._arenas import Chunk
from opguard.pools.users import ResourcePoolUser

__all__ = ["ChunkUser"]


class ChunkUser(ResourcePoolUser):
    """A chunk: in use while a patch is applied, kept warm after it until others need the bytes."""

    def __init__(self, chunk: Chunk) -> None:
        super().__init__(chunk)
        self._device = chunk.device
        self._needs = {str(chunk.device): chunk.nbytes}

    def needs(self) -> Mapping[str, int]:
        return self._needs

    def bring_in(self) -> int:
        self.obj.bring_in()
        return 0

    def give_back(self) -> int:
        chunk = self.obj
        if chunk is not None:
            chunk.give_back()
        return 0

    @property
    def execution_device(self) -> torch.device:
        return self._device

    def describe(self) -> str:
        return "patched weights"
