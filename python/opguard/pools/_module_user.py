"""What a module as a whole and one in blocks have in common, as users of pools."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn

from opguard._loaded import loaded
from opguard.pools._budgets import parse_bytes
from opguard.pools._homes import Home
from opguard.pools.errors import WeightsAstray
from opguard.pools.users import ResourcePoolUser

if TYPE_CHECKING:
    from opguard.pools.management import Management

__all__ = ["Estimate", "ModuleUser"]

Estimate = int | Callable[[nn.Module], int]


class _Watched(NamedTuple):
    """Where a parameter was when it was adopted, and where its bytes are at home."""

    name: str
    owner: weakref.ref[nn.Module]
    key: str
    address: int

    def is_astray(self, there: Container[int] = ()) -> bool:
        """Neither at home nor, on a device, at one of the addresses there."""
        owner = self.owner()
        if owner is None:
            return True
        # Under another name, as parametrizations have it, or of another type, as while somebody
        # traces it, it is no concern of ours.
        found = owner._parameters.get(self.key)
        if type(found) is not nn.Parameter or found.data_ptr() == self.address:
            return False
        return found.data_ptr() not in there and not _is_patched(found)


def _watch(module: nn.Module | None, home: Home) -> Iterator[tuple[int, _Watched]]:
    modules = {} if module is None else dict(module.named_modules(remove_duplicate=False))
    for member in home.members:
        path, _, key = member.name.rpartition(".")
        owner = modules.get(path)
        # A scripted module makes its table anew whenever it is asked for.
        table = None if owner is None else owner._parameters
        if owner is not None and isinstance(table, dict) and key in table:
            yield member.segment, _Watched(member.name, weakref.ref(owner), key, member.address)


def _is_patched(parameter: torch.Tensor) -> bool:
    is_patched = loaded("opguard.pools._patched", "is_patched")
    return bool(is_patched and is_patched(parameter))


class ModuleUser(ResourcePoolUser):
    """A module whose weights have a home, in memory or on an accelerator while it is in.

    Args:
        module: the module.
        inference_memory_estimator: bytes that calls need beside the weights, or a callable that
            says so given the module: when it comes in, idle models go until that much is free.
        management: whose pools it takes from; the process's own unless given.
        name: for the file, and for messages; else its type's name.
        trust_files: leave storages that lie in a private map of a file of yours (what
            ``safetensors.torch.load_file`` gives) there, and read that file again.

    A class of this sets ``home`` once the module is adopted.
    """

    fixed = frozenset({"stream", "trust_files"})
    stream: ClassVar[bool]

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
        self._home: Any = None
        self._watched: dict[int, list[_Watched]] = {}  # by segment
        self._warned = False

    @property
    def home(self) -> Any:
        """The `Home`, or `DeviceHome`, of its weights."""
        return self._home

    @home.setter
    def home(self, home: Any) -> None:
        self._home = home
        self._watched = {}
        for segment, watched in _watch(self.obj, getattr(home, "home", home)):
            self._watched.setdefault(segment, []).append(watched)

    def memory_of_calls(self) -> int:
        estimate = self.inference_memory_estimator
        if callable(estimate):
            estimate = estimate(self.obj)
        if estimate is None:
            return 0
        return parse_bytes(estimate, what=f"the memory of calls of {self._name!r}")

    def strays(self, segment: int | None = None) -> Sequence[str]:
        """Names of parameters that are others now than those that were adopted, or gone.

        That is what ``half()``, ``share_memory()``, ``load_state_dict(assign=True)`` and a new
        Parameter leave; not what a patch points elsewhere.
        """
        segments = self._watched if segment is None else (segment,)
        watched = (each for number in segments for each in self._watched.get(number, ()))
        found = [each for each in watched if each.is_astray()]
        if found and not isinstance(self._home, Home):
            there = self._home.addresses()
            found = [each for each in found if each.is_astray(there)]
        return [each.name for each in found]

    def warn_of_strays(self, segment: int | None = None, *, again: bool = True) -> None:
        """WeightsAstray where there are some.

        Args:
            segment: looked at.
            again: also where it was said before.
        """
        if self._warned and not again:
            return
        if not self.strays(segment):
            return
        self._warned, names = True, self.strays()
        message = (
            f"expected the weights of {self._name!r} to be those that it was managed with, "
            f"{len(names)} of them are others now, or gone ({', '.join(names[:3])}): what it has "
            "instead stays in memory, outside of every budget; manage it again when nobody uses it"
        )
        warnings.warn(WeightsAstray(message, names), stacklevel=2)

    def raise_if_lost(self) -> None:
        getattr(self.home, "home", self.home).check()

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
