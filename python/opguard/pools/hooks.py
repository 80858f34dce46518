"""Modules that bring themselves in: a lease around each call of an unmodified module."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import nn

from opguard.pools._arguments import check_timeout
from opguard.pools._inputs import input_mover
from opguard.pools._marks import CALL, Mark, lock, manage_here, mark_of

__all__ = ["AutoManageHook"]


def _are_names(methods: Any) -> bool:
    return isinstance(methods, Sequence) and all(isinstance(name, str) for name in methods)


class AutoManageHook:
    """Brings a module in for each of its calls, and moves its inputs to where it runs.

    The module stays the object it is: its class, ``forward``, hooks, parameters and compiled code
    are not touched, nor anything global. A call takes a counted lease before the module's own
    hooks run and gives it back after them, however it ends; a generator or coroutine that
    ``forward`` returns holds one from its first step to its last. Calls of ``forward`` itself
    take none unless ``methods`` names it.

    A copy, by ``copy.deepcopy`` or ``pickle`` (which then needs opguard where it is read), is
    another model with a hook of its own, managed by its first call. A shallow copy, and a copy of
    a class that copies or pickles itself, may be a plain one.

    Compiled modules stay compiled: ``torch.compile(module)``, ``module.compile()`` and a hook on
    what ``torch.compile`` returned make one graph inside the lease, in any order. Compiled code
    that has a managed module as a part takes no lease for it: manage the whole, or hold one
    around the call.

    Example:
        >>> hook = AutoManageHook(unet).attach()
        >>> unet(x)  # brought in, run, free to go
        >>> hook.remove()

    Args:
        module: an nn.Module, managed here if it is not, or its handle.
        methods: names of more methods that use the weights, such as ``encode`` and ``decode``.
        timeout: seconds that a call waits for bytes others hold; None as long as it takes.

    Raises:
        TypeError: for what is no module, or has no such method.
    """

    def __init__(
        self, module: Any, *, methods: Sequence[str] = (), timeout: float | None = None
    ) -> None:
        obj = module if isinstance(module, nn.Module) else getattr(module, "obj", None)
        if not isinstance(obj, nn.Module):
            raise TypeError(
                f"module: expected an nn.Module or the handle of one, got {type(module).__name__}; "
                "use auto_manage for other objects"
            )
        check_timeout(timeout)
        if isinstance(methods, str) or not _are_names(methods):
            raise TypeError(
                "methods: expected names of methods, such as ('encode', 'decode'), got "
                f"{methods!r:.80}"
            )
        for name in methods:
            if not callable(getattr(obj, name, None)):
                raise TypeError(
                    f"methods: expected methods of {type(obj).__name__}, it has none called "
                    f"{name!r}; name those that use its weights"
                )
        self._module = weakref.ref(obj)
        self._handle = None if obj is module else module
        self._methods = tuple(methods)
        self._timeout = timeout
        self._token = object()

    @classmethod
    def manage_module(cls, module: Any) -> AutoManageHook:
        """The one hook of ``module`` that this makes, attached; made at the first time."""
        hook = cls(module)
        hook._token = cls
        return hook.attach()

    @property
    def module(self) -> nn.Module | None:
        """The module while it is alive."""
        return self._module()

    @property
    def attached(self) -> bool:
        """Whether calls take leases because of this hook."""
        mark = mark_of(self._module())
        return mark is not None and self._token in mark.tokens

    def attach(self) -> AutoManageHook:
        """From now on calls take leases. Once more changes nothing."""
        module = self._module()
        if module is None:
            raise ReferenceError("expected the module of the hook to be alive, it is gone")
        handle = self._handle or manage_here(module)
        with lock.here:
            mark = mark_of(module) or Mark(module)
            mark.seat, mark.prepare = handle.seat, input_mover(handle.get_execution_device())
            mark.install((CALL, *self._methods), self._timeout)
            mark.tokens.add(self._token)
        self._handle = None  # it keeps the module alive
        return self

    def remove(self) -> None:
        """The module is as it was before; what is not attached is left alone.

        Calls under way keep their leases. Where somebody else has wrapped one of its methods
        since, what lies below goes on without leases.
        """
        with lock.here:
            mark = mark_of(self._module())
            if mark is not None:
                mark.tokens.discard(self._token)
                if not mark.tokens:
                    mark.uninstall()

    def __enter__(self) -> AutoManageHook:
        return self.attach()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()
