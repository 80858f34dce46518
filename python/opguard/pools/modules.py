"""How an nn.Module is a user of pools: its weights live in one map, here or on an accelerator."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from opguard._sizes import readable
from opguard.pools._homes import Home
from opguard.pools._lending import home_for
from opguard.pools._module_user import Estimate, ModuleUser
from opguard.pools._reading import Reading
from opguard.pools._storages import refuse
from opguard.pools.errors import PoolError, Unmanageable
from opguard.pools.users import ResourcePoolUser, register_user

if TYPE_CHECKING:
    from opguard.pools.management import Management

__all__ = ["TorchModuleWrapper"]


class TorchModuleWrapper(ModuleUser):
    """A module's storages, written once to a file of ours and read from its private map.

    On the CPU they point at the map for good: given back, the pages are read again from the file
    by whoever touches them. Where little of them is touched they are left to that, and all of them
    count all the same: see `opguard.pools._reading`. On an accelerator they point at its memory
    while the module is in.

    Args:
        module: the module.
        inference_memory_estimator: bytes that calls need beside the weights, or a callable that
            says so given the module: when it comes in, idle models go until that much is free.
        name: for the file, and for messages.
        trust_files: leave storages that lie in a private map of a file of yours (what
            ``safetensors.torch.load_file`` gives) there, and read that file again.
        verify: ``"bytes"`` finds out by checksums what was changed on an accelerator; None trusts
            version counters and training mode, see `opguard.pools._devices`.

    Raises:
        Unmanageable: for modules whose weights must not move.
        OSError: where the file cannot be written; the module is as it was.
    """

    stream = False

    def __init__(
        self,
        module: torch.nn.Module,
        inference_memory_estimator: Estimate | None = None,
        *,
        management: Management | None = None,
        name: str | None = None,
        trust_files: bool = False,
        verify: str | None = None,
    ) -> None:
        super().__init__(module, inference_memory_estimator, management, name, trust_files)
        management = self._management
        home = Home.adopt(module, management.folder, self._name, trust_files=trust_files)
        self.home = home_for(home, management, self._name, verify)
        self._reading = Reading(home.nbytes if self.home is home else 0)

    @property
    def nbytes(self) -> int:
        """Bytes in memory while it is in: unique storages, in whole pages."""
        return int(self.home.nbytes)

    def needs(self) -> Mapping[str, int]:
        return {self._pool.name: self.nbytes}

    def bring_in(self) -> int:
        self.warn_of_strays(again=False)
        if self._reading.lazily():
            self.home.check()
            self.raise_if_broken()
            return 0
        try:
            self.home.bring_in()
        except torch.OutOfMemoryError:
            # The budget has room and the device has not: others of ours make it.
            if not self._management.free(self._pool.name, self.nbytes):
                raise
            self.home.bring_in()
        self.raise_if_broken()
        return self.nbytes

    def give_back(self) -> int:
        if self._reading.looking:
            self._reading.saw(self.home.resident())
        written = int(self.home.give_back() or 0)
        left = self.home.changed() if self.trust_files else 0
        if left:
            raise PoolError(
                f"expected weights in the user's file to be unchanged, {readable(left)} of "
                f"{type(self.obj).__name__} are not, and stay in memory; leave trust_files out"
            )
        return written

    def unused_since(self, mark: Any) -> None:
        if not isinstance(self.home, Home):
            self.home.unused_since(mark)

    def raise_if_broken(self) -> None:
        self.home.raise_if_broken()

    def sweep(self) -> None:
        host = getattr(self.home, "home", self.home)
        if host.resident():  # asking takes a quarter of the time of giving back nothing
            self.home.give_back()

    def close(self) -> None:
        self.home.close()

    def describe(self) -> str:
        return f"disk, {self._pool.name}" if self._pool.executes else "disk"


# Whose each tensor is, by id: an id may be another's since, so what is found here is looked at.
_managed: dict[int, weakref.ref[ResourcePoolUser]] = {}


def _tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _refuse_parts(module: torch.nn.Module, management: Management) -> list[torch.Tensor]:
    """The module's tensors; Unmanageable where one is another managed module's too.

    Its bytes would count twice, and both would say where it points.
    """
    tensors = _tensors_of(module)
    for tensor in tensors:
        found = _managed.get(id(tensor))
        user = None if found is None else found()
        obj: torch.nn.Module | None = None if user is None else user.obj
        entry = None if obj is None else management.find(obj)
        if (
            obj is not None
            and obj is not module
            and entry is not None
            and any(tensor is other for other in _tensors_of(obj))
        ):
            raise Unmanageable(
                f"expected {type(module).__name__} to share no weights with another managed "
                f"module, it does with {entry.name!r}; lease that one, or unmanage it first"
            )
    return tensors


def _note(tensors: list[torch.Tensor], user: ResourcePoolUser) -> None:
    keys = [id(tensor) for tensor in tensors]

    def forget(gone: weakref.ref[ResourcePoolUser]) -> None:
        for key in keys:
            if _managed.get(key) is gone:
                _managed.pop(key, None)

    _managed.update(dict.fromkeys(keys, weakref.ref(user, forget)))


def module_user(
    module: torch.nn.Module,
    *,
    management: Management,
    stream: bool | None = None,
    inference_memory_estimator: Estimate | None = None,
    name: str | None = None,
    trust_files: bool = False,
    verify: str | None = None,
) -> ResourcePoolUser:
    """A module as a whole, or in blocks: where ``stream`` says so, or it outgrows the budget."""
    # Not at the top: what is not needed before the first module makes an import slower.
    from opguard.pools.streaming import StreamedModule, outgrows

    refuse(module)
    tensors = _refuse_parts(module, management)
    kind: Any = TorchModuleWrapper
    if outgrows(module, management) if stream is None else stream:
        kind = StreamedModule
    user: ResourcePoolUser = kind(
        module,
        inference_memory_estimator,
        management=management,
        name=name,
        trust_files=trust_files,
        verify=verify,
    )
    _note(tensors, user)
    return user


register_user(torch.nn.Module, module_user)
