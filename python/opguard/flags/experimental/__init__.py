"""The names of opguard.flags under the second path that TorchGuard gave them; nothing differs."""

from __future__ import annotations

__all__: list[str] = []
