"""What a module as a whole and one in blocks have in common, as users of pools."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from opguard.pools._homes import Home
from opguard.pools.users import ResourcePoolUser

if TYPE_CHECKING:
    from opguard.pools.management import Management

__all__ = ["Estimate", "ModuleUser"]

Estimate = int | Callable[..., int]


class ModuleUser(ResourcePoolUser):
    """A module whose weights have a home, in memory or on an accelerator while it is in.

    Args:
        module: the module.
        inference_memory_estimator: bytes that a call needs beside the weights, or a callable that
            says so given the module and the call's arguments.
        management: whose pools it takes from; the process's own unless given.
        name: for the file, and for messages; else its type's name.
        trust_files: leave storages that lie in a private map of a file of yours (what
            ``safetensors.torch.load_file`` gives) there, and read that file again.

    Attributes:
        home: set by the class itself, once the module is adopted.
    """

    fixed = frozenset({"stream", "trust_files"})
    stream: ClassVar[bool]
    home: Any

    def __init__(
        self,
        module: nn.Module,
        inference_memory_estimator: Estimate | None,
        management: Management | None,
        name: str | None,
        trust_files: bool,
    ) -> None:
        super().__init__(module)
        if management is None:
            from opguard.pools.management import get_management

            management = get_management()
        self.inference_memory_estimator = inference_memory_estimator
        self.trust_files = trust_files
        self._management = management
        self._pool = management.execution_pool
        self._name = name or type(module).__name__

    @property
    def execution_device(self) -> torch.device:
        return self._pool.device

    @property
    def verify(self) -> str | None:
        """How changes on an accelerator are found; set, it holds from the next bring-in on."""
        return getattr(self.home, "verify", None)

    @verify.setter
    def verify(self, value: str | None) -> None:
        if not isinstance(self.home, Home):  # in host memory the kernel tells
            self.home.verify = value
