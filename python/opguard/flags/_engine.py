"""The flag functions, as every part of opguard.flags calls them.

All take the configuration as its integer ``key`` (``ErrorConfig.key``). ``checks`` is a mask:
1 NaN, 2 +Inf, 4 -Inf. A ``location`` is an id, a name, a module or None. A function without an
underscore at its end never changes the flags it is given; one with it writes into them and returns
them. Bad input raises a subclass of ValueError and changes nothing.
"""

from __future__ import annotations

from opguard.flags._traced import (
    Location,
    check,
    check_,
    clear,
    count,
    find,
    index,
    index_clamp,
    is_err,
    is_ok,
    location_of,
    max_severity,
    merge,
    merge_,
    new,
    push,
    push_,
    push_codes,
    read,
    read_all,
    slot_of,
)

__all__ = [
    "Location",
    "check",
    "check_",
    "clear",
    "count",
    "find",
    "index",
    "index_clamp",
    "is_err",
    "is_ok",
    "location_of",
    "max_severity",
    "merge",
    "merge_",
    "new",
    "push",
    "push_",
    "push_codes",
    "read",
    "read_all",
    "slot_of",
]
