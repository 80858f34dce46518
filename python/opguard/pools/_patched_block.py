"""A block in which a managed proxy's object is in memory and has the proxy's commits."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

__all__ = ["PatchedBlock"]


class PatchedBlock:
    """``with auto_manage(proxy) as handle:``; also ``async with``."""

    def __init__(
        self, handle: Any, timeout: float | None, after: Callable[[], object] | None
    ) -> None:
        self._handle, self._after = handle, after
        self._proxy = handle.obj.clone()
        if timeout is not None:
            self._proxy.timeout = timeout

    def __enter__(self) -> Any:
        self._proxy.__enter__()
        return self._handle

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._proxy.__exit__(kind, error, traceback)
        finally:
            self._let_go()

    async def __aenter__(self) -> Any:
        await self._proxy.__aenter__()
        return self._handle

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._proxy.__aexit__(kind, error, traceback)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if self._after is not None:
            self._after()
