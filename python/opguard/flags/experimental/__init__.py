"""The names of opguard.flags under TorchGuard's second path, where new flags have floating words.

Everything is the same but for what ``err.new``, ``err.new_t`` and ``err.from_code`` make: words of
the configuration's dtype where that is floating, else float32. Nothing of opguard needs that; it is
for code that keeps flags among floating tensors. Never do arithmetic on such flags.
"""

from __future__ import annotations

from opguard.flags._err import experimental_err as err
from opguard.flags.control import AND, HAS, IF, IS, NOT, OR

__all__ = ["AND", "HAS", "IF", "IS", "NOT", "OR", "err"]
