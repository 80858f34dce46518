"""How often torch.compile may compile a function: blocks of checks use up nothing of that.

Dynamo gives a function up for good when it was compiled too often, by whatever backend.
"""

from __future__ import annotations

from typing import Any

__all__ = ["Limits"]


class Limits:
    """What a block changes of it, and what it puts back; called under the blocks' lock."""

    def __init__(self, kind: type) -> None:
        self.compiled = False  # by a backend of ours, since the last block began
        self._kind = kind  # of our backends
        self._raised: tuple[int, int] | None = None  # from, to

    def up(self) -> None:
        """In a block as much again may be compiled."""
        from torch._dynamo import config

        own = getattr(config, "recompile_limit", None)
        if own is not None:
            self._raised = own, 2 * own
            config.recompile_limit = 2 * own

    def back(self) -> None:
        """Puts the limit back, and forgets functions of which little else could be compiled."""
        from torch._dynamo import config

        limit, now = self._raised or (8, None)
        self._raised = None
        if now is not None and config.recompile_limit == now:
            config.recompile_limit = limit
        if self.compiled:
            self.compiled = False
            self._forget(limit)

    def _forget(self, limit: int) -> None:
        try:
            from torch._dynamo import convert_frame, eval_frame

            frames: Any = eval_frame
            entries, forget = frames._debug_get_cache_entry_list, frames.reset_code
            for code in {each() for each in convert_frame.input_codes.seen} - {None}:
                backends = [_innermost(each.backend) for each in entries(code)]
                ours = sum(isinstance(each, self._kind) for each in backends)
                if ours > limit // 4 or (ours and len(backends) >= limit):
                    forget(code)
        except (AttributeError, ImportError):
            return  # another torch keeps them elsewhere


def _innermost(backend: Any) -> Any:
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return backend
