"""The names of opguard.flags under the second path that TorchGuard gave them; nothing differs.

Flags have the dtype that the configuration says, here as there: floating words are
``CONFIG.flag_dtype = torch.float32`` (or ``torch.float64``).
"""

from __future__ import annotations

from opguard.flags._err import err
from opguard.flags.control import AND, HAS, IF, IS, NOT, OR

__all__ = ["AND", "HAS", "IF", "IS", "NOT", "OR", "err"]
