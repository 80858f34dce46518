"""What the flags mean, slowly and readably: plain Python ints, one sample at a time.

Written from csrc/core/slots.h's sentences. A sample is the list of its slots, 0 where nothing is
recorded, as long as its flags have slots. Property tests hold the ops and the package against it.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch

CHRONO, BY_SEVERITY, BY_LOCATION = 0, 1, 2
FIRST, LAST = 0, 1
NONE, CODE, LOCATION, UNIQUE = 0, 1, 2, 3
CARRIERS = (torch.int64, torch.int32, torch.float64, torch.float32)
SLOTS_A_WORD = {torch.int64: 4, torch.int32: 2, torch.float64: 4, torch.float32: 2}

NAN, INF, OVERFLOW, OUT_OF_BOUNDS, EMPTY_INPUT = 1, 2, 3, 5, 7
WARN, ERROR, CRITICAL = 1, 2, 3
SEVERITIES = {1: CRITICAL, 2: CRITICAL, 3: ERROR, 5: ERROR, 6: ERROR, 7: ERROR,
              9: WARN, 10: WARN, 11: WARN, 13: WARN, 14: WARN}  # fmt: skip

Row = list[int]


@dataclass(frozen=True)
class Policy:
    num_slots: int = 16
    priority: int = CHRONO
    order: int = FIRST
    dedupe: int = UNIQUE
    carrier: int = 0

    @property
    def key(self) -> int:
        upper = self.priority << 16 | self.order << 18 | self.dedupe << 19 | self.carrier << 21
        return self.num_slots | upper

    @property
    def dtype(self) -> torch.dtype:
        return CARRIERS[self.carrier]

    @property
    def words(self) -> int:
        return -(-self.num_slots // SLOTS_A_WORD[self.dtype])

    @property
    def capacity(self) -> int:
        return self.words * SLOTS_A_WORD[self.dtype]


def slot_of(location: int, code: int, severity: int) -> int:
    return severity | code << 2 | location << 6


def severity_of(slot: int) -> int:
    return slot & 3


def code_of(slot: int) -> int:
    return slot >> 2 & 15


def location_of(slot: int) -> int:
    return slot >> 6


def severity_by_code(code: int, default: int = ERROR) -> int:
    return 0 if code == 0 else SEVERITIES.get(code, default)


# --- one sample -----------------------------------------------------------------------------------


def closed(row: Row) -> Row:
    """The same errors without holes between them."""
    used = [slot for slot in row if slot]
    return used + [0] * (len(row) - len(used))


def same(a: int, b: int, dedupe: int) -> bool:
    if dedupe == CODE:
        return code_of(a) == code_of(b)
    if dedupe == LOCATION:
        return location_of(a) == location_of(b)
    return code_of(a) == code_of(b) and location_of(a) == location_of(b)


def rank(slot: int, policy: Policy) -> int:
    """The higher, the longer it stays in a full row."""
    value = severity_of(slot) if policy.priority == BY_SEVERITY else location_of(slot)
    return value if policy.order == LAST else -value


def push(row: Row, slot: int, policy: Policy) -> Row:
    """row with one more error; itself when the slot has no code or no severity."""
    if code_of(slot) == 0 or severity_of(slot) == 0:
        return list(row)
    capacity = len(row)
    limit = min(policy.num_slots, capacity)
    used = [one for one in row if one]
    twin = next((i for i, one in enumerate(used) if same(one, slot, policy.dedupe)), None)
    if policy.dedupe != NONE and twin is not None:
        if severity_of(slot) > severity_of(used[twin]):
            used[twin] = slot
    elif policy.priority == CHRONO and policy.order == LAST:
        used = [slot, *used][:limit]
    elif len(used) < limit:
        used.append(slot)
    elif policy.priority != CHRONO:
        least = min(range(len(used)), key=lambda i: rank(used[i], policy))
        if rank(slot, policy) > rank(used[least], policy):
            used[least] = slot
    return used + [0] * (capacity - len(used))


def merge(row: Row, other: Row, policy: Policy) -> Row:
    """row with the errors of other, the younger, pushed from the eldest to the newest."""
    newest_first = policy.priority == CHRONO and policy.order == LAST
    for slot in reversed(other) if newest_first else other:
        row = push(row, slot, policy)
    return list(row)


def clear(row: Row, code: int) -> Row:
    return closed([0 if code_of(slot) == code else slot for slot in row])


def find(row: Row, mask: int, value: int) -> bool:
    return any(slot and slot & mask == value for slot in row)


def count(row: Row) -> int:
    return sum(slot != 0 for slot in row)


def max_severity(row: Row) -> int:
    return max(map(severity_of, row), default=0)


def check(row: Row, found: int, checks: int, location: int, policy: Policy) -> Row:
    """found: 1 NaN, 2 +Inf, 4 -Inf; checks: which of these to record."""
    if found & checks & 1:
        row = push(row, slot_of(location, NAN, CRITICAL), policy)
    if found & checks & 6:
        row = push(row, slot_of(location, INF, CRITICAL), policy)
    return list(row)


def findings(values: object) -> int:
    """The bits of a number, or of a nested list of numbers: 1 NaN, 2 +Inf, 4 -Inf."""
    if isinstance(values, list | tuple):
        found = 0
        for value in values:
            found |= findings(value)
        return found
    if isinstance(values, complex):
        return findings([values.real, values.imag])
    value = float(values)  # type: ignore[arg-type]
    if math.isnan(value):
        return 1
    return 2 * (value == math.inf) | 4 * (value == -math.inf)


# --- flags ----------------------------------------------------------------------------------------


def new(samples: int, policy: Policy) -> list[Row]:
    return [[0] * policy.capacity for _ in range(samples)]


def to_flags(rows: list[Row], policy: Policy, words: int | None = None) -> torch.Tensor:
    """(N, W) of the policy's carrier."""
    words = policy.words if words is None else words
    raw = b"".join(struct.pack(f"<{len(row)}H", *row) for row in rows)
    if not raw:
        return torch.zeros(len(rows), words, dtype=policy.dtype)
    return torch.frombuffer(bytearray(raw), dtype=policy.dtype).reshape(len(rows), words)


def to_rows(flags: torch.Tensor) -> list[Row]:
    """The slots of each sample of (N, W) flags in host memory."""
    slots = flags.shape[1] * SLOTS_A_WORD[flags.dtype]
    raw = bytes(flags.contiguous().view(torch.uint8).flatten().tolist())
    step = 2 * slots
    return [
        list(struct.unpack(f"<{slots}H", raw[i * step : (i + 1) * step]))
        for i in range(flags.shape[0])
    ]
