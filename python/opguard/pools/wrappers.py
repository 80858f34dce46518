"""What users call: manage an object, hold it while it is used, let it go."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal

import torch

from opguard import _C
from opguard._loaded import loaded
from opguard.pools._arguments import check_timeout, checked_options
from opguard.pools._books import READY, Entry
from opguard.pools.errors import PoolError
from opguard.pools.management import Management, get_management
from opguard.pools.pipelines import keepers_of, weakly

if TYPE_CHECKING:
    from opguard.pools.users import ResourcePoolUser

__all__ = ["AutoManageWrapper", "auto_manage", "free", "manage", "unmanage"]

Offload = Literal["lazy", "exit"]


class AutoManageWrapper:
    """A handle on a managed object. It keeps the object alive; the pools do not."""

    def __init__(self, obj: object, management: Management | None = None, **options: Any) -> None:
        """Manages ``obj`` as `manage` does, with its options."""
        self._management = management or get_management()
        self._kept = weakly(obj)
        self._entry = self._management.manage(self._kept, **options)
        self._obj = obj
        self._loads: list[Any] = []

    @property
    def obj(self) -> Any:
        """The object."""
        return self._obj

    @property
    def name(self) -> str:
        """What reports and messages call it."""
        return self._entry.name

    @property
    def entry(self) -> Entry:
        """What the management keeps of it: its units and figures."""
        return self._entry

    @property
    def seat(self) -> Any:
        """What its leases share; for hooks. PoolError: the object is not managed any more."""
        self._look()
        return self._entry.user.seat(self._entry.seat)

    def _look(self) -> None:
        if self._management.find(self._kept) is not self._entry:
            raise PoolError(
                f"expected {self.name!r} to be managed, it was let go of by unmanage since this "
                "handle was made; use the one that manage returns for it now"
            )

    @property
    def user(self) -> ResourcePoolUser:
        """Its user of the pools."""
        return self._entry.user

    @property
    def loaded(self) -> bool:
        """Whether all of it is there now."""
        return all(self._management.state(unit) == READY for unit in self._entry.all_units)

    @property
    def pinned(self) -> bool:
        """Whether it stays once it is in, whoever else needs the bytes. May be set."""
        return any(self._info("pinned"))

    @pinned.setter
    def pinned(self, pin: bool) -> None:
        self._look()
        self._management.update(self._entry, pin=pin)

    @property
    def priority(self) -> int:
        """Who has more goes later. May be set."""
        return int(max(self._info("priority"), default=0))

    @priority.setter
    def priority(self, priority: int) -> None:
        self._look()
        self._management.update(self._entry, priority=priority)

    def _info(self, field: str) -> list[Any]:
        infos = (self._management.unit(unit) for unit in self._entry.all_units)
        return [getattr(info, field) for info in infos if info is not None]

    def get_execution_device(self) -> torch.device:
        """Where it runs, and where its inputs belong."""
        return self._entry.user.execution_device

    def lease(self, timeout: float | None = None) -> Any:
        """``with handle.lease() as handle:`` brings it in and keeps it there; also ``async with``.

        Args:
            timeout: seconds to wait for bytes others hold; None as long as it takes, 0 not at all.

        Raises:
            PoolRefused, Deadlock, LeaseTimeout: on entry, where the bytes cannot be had.
        """
        check_timeout(timeout)
        return _C.Lease(self.seat, self, timeout)

    def load(self, timeout: float | None = None) -> AutoManageWrapper:
        """Bring it in and keep it until `offload`, as often as this was called."""
        lease = self.lease(timeout)
        lease.__enter__()
        self._loads.append(lease)
        return self

    def offload(self) -> None:
        """Undo one `load`; when nothing holds it any more, tell it to go.

        Telling costs microseconds. Its bytes are given back soon after, or when somebody needs
        them, and count as used until then.
        """
        try:
            lease = self._loads.pop()
        except IndexError:
            lease = None
        if lease is not None:
            lease.__exit__(None, None, None)
        if not self._loads:
            self.let_go()

    def let_go(self) -> None:
        """Tell it to go once nobody holds it."""
        self._look()
        self._management.condemn(self._entry)

    def prefetch(self) -> None:
        """Begin to bring it in, in the background, if that takes nothing from anybody in use."""
        if not self.loaded:
            Thread(target=self._prefetch, name="opguard-prefetch", daemon=True).start()

    def _prefetch(self) -> None:
        try:
            with self.lease(0):
                pass
        except PoolError:  # not now: whoever needs it will wait for it, and be told why not
            return

    def __getstate__(self) -> dict[str, Any]:
        """A copy is a handle on a copy of the object, without the loads of this one."""
        return {"_obj": self._obj, "_loads": []}

    if not TYPE_CHECKING:  # misspelt names are to be found

        def __getattr__(self, name: str) -> Any:
            """A copy's object is managed when it is asked for: until then it may be half made."""
            if name not in ("_management", "_kept", "_entry") or "_obj" not in self.__dict__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            self._management = get_management()
            self._kept = weakly(self._obj)
            self._entry = self._management.manage(self._kept)
            return self.__dict__[name]

    def __repr__(self) -> str:
        state = "loaded" if self.loaded else "not loaded"
        return f"<{type(self).__name__} {self.name!r}: {state}>"


def manage(
    obj: Any,
    *,
    priority: int | None = None,
    pin: bool | None = None,
    name: str | None = None,
    inference: int | Callable[..., int] | None = None,
    trust_files: bool | None = None,
    stream: bool | None = None,
    verify: Literal["bytes"] | None = None,
) -> AutoManageWrapper:
    """Let the pools move ``obj``: afterwards it takes no memory until it is used.

    Managing it again gives a handle on the same user; what is named then holds from then on.

    What gives it other weights meanwhile (``half()``, ``share_memory()``, torchao's ``quantize_``,
    ``load_state_dict(assign=True)``, a new Parameter) takes them out of the pools and their
    budgets, where they stay right and stay in memory. `WeightsAstray` warns of it when it is next
    brought in, `report` shows it, and managing it again while nobody uses it takes them in.

    Args:
        obj: an nn.Module, a pipeline, or anything `register_user` was told of; or a handle.
        priority: who has more goes later; 0 unless named.
        pin: once it is in, it stays; False unless named.
        name: for messages and reports; else its type's name.
        inference: bytes that calls need beside the weights, or a callable that says so given the
            object: when it comes in, idle models go until that much is free.
        trust_files: read weights again from the user's own file they are mapped from, instead of
            writing them once to a file of ours. The file must not be changed meanwhile; that is
            looked at whenever they are brought in.
        stream: per module, for one larger than its pool; None decides by size.
        verify: ``"bytes"`` compares checksums on an accelerator to see what was changed there;
            None trusts version counters and training mode. In host memory all changes are seen.

    Raises:
        Unmanageable: where its weights must not move, with the reason.
        OSError: where the weights cannot be written; ``obj`` is as it was.
    """
    options: dict[str, Any] = {
        "priority": priority,
        "pin": pin,
        "name": name,
        "inference": inference,
        "trust_files": trust_files,
        "stream": stream,
        "verify": verify,
    }
    named = checked_options(options)
    if isinstance(obj, AutoManageWrapper):
        handle = obj
        handle._management.update(handle._entry, **named)
    else:
        handle = AutoManageWrapper(obj, **named)
    handle._management.renew(handle._entry)
    return handle


def unmanage(obj: Any) -> None:
    """Let go of ``obj`` or a handle's object: it works on as an ordinary one, outside any budget.

    Raises:
        PoolRefused: while it is in use, with who holds it.
        PoolFileChanged: after it was let go of: its file was cut or written by others, so that
            weights which were not in memory are not what they were.
    """
    if isinstance(obj, AutoManageWrapper):
        obj = obj.obj
    for each in (obj, *keepers_of(obj)):
        get_management().unmanage(each)


def auto_manage(obj: Any, *, offload: Offload = "lazy", timeout: float | None = None) -> Any:
    """``with auto_manage(obj) as handle:`` brings it in and keeps it there; also ``async with``.

    Leases are counted: what is used in several places, threads or tasks stays until the last of
    them has left, by an exception or not.

    Args:
        obj: what `manage` takes, managed here if it is not; or a handle. A CommitObjectProxy has
            its commits applied for the block.
        offload: ``"lazy"``: it stays until its bytes are needed. ``"exit"``: it is told to go.
        timeout: seconds to wait for bytes others hold; None as long as it takes, 0 not at all.

    Raises:
        PoolRefused, Deadlock, LeaseTimeout: on entry, with figures and who holds what.
    """
    if offload not in ("lazy", "exit"):
        raise ValueError(f"expected offload 'lazy' or 'exit', got {offload!r}")
    check_timeout(timeout)
    handle = obj if isinstance(obj, AutoManageWrapper) else AutoManageWrapper(obj)
    after = None if offload == "lazy" else handle.let_go
    # Who has a proxy has imported its class.
    if isinstance(handle.obj, loaded("opguard.pools.proxies", "CommitObjectProxy")):
        from opguard.pools._patched_block import PatchedBlock

        return PatchedBlock(handle, timeout, after)
    return _C.Lease(handle.seat, handle, timeout, after)


def free(device: torch.device | str | None = None, nbytes: int | str | None = None) -> int:
    """Give back what is in nobody's use, least valuable first. Returns bytes that came free.

    Args:
        device: of which memory; None is where modules run.
        nbytes: at least so many, where there are, as bytes or text; None is all.
    """
    return get_management().free(device, nbytes)
