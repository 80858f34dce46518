"""Where the samples of a tensor lie, and how ops move them: the one table of row rules.

:mod:`.axes` is the algebra of dimensions, :mod:`.payloads` what a row carries, :mod:`.rows` the
rows of a tensor, :mod:`.rules` the table. Nothing here runs before flags travel for the first time.
"""

from __future__ import annotations

from opguard.flags._rows.axes import Axis
from opguard.flags._rows.payloads import FlagPayload, Payload, SamplePayload
from opguard.flags._rows.rows import Rows, cat_rows, merge_rows, stack_rows
from opguard.flags._rows.rules import Call, load, lookup, lost, plan, rule

__all__ = [
    "Axis",
    "Call",
    "FlagPayload",
    "Payload",
    "Rows",
    "SamplePayload",
    "cat_rows",
    "load",
    "lookup",
    "lost",
    "merge_rows",
    "plan",
    "rule",
    "stack_rows",
]
