"""The bit layout of an error slot, equal to csrc/core/slots.h.

A slot is 16 bits: severity in bits 0-1, code in bits 2-5, location in bits 6-15. The masks are for
values already shifted down: ``code = (slot >> CODE_SHIFT) & CODE_MASK``.
"""

from __future__ import annotations

__all__ = [
    "CODE_BITS",
    "CODE_MASK",
    "CODE_SHIFT",
    "LOCATION_BITS",
    "LOCATION_MASK",
    "LOCATION_SHIFT",
    "SEVERITY_BITS",
    "SEVERITY_MASK",
    "SEVERITY_SHIFT",
    "SLOTS_PER_WORD",
    "SLOT_BITS",
    "SLOT_MASK",
]

SLOT_BITS = 16
SLOTS_PER_WORD = 4  # of a 64-bit word; a 32-bit word holds two
SLOT_MASK = 0xFFFF

SEVERITY_SHIFT = 0
SEVERITY_BITS = 2
SEVERITY_MASK = 0x3

CODE_SHIFT = 2
CODE_BITS = 4
CODE_MASK = 0xF

LOCATION_SHIFT = 6
LOCATION_BITS = 10
LOCATION_MASK = 0x3FF
