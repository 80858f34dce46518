"""The flag ops on one instruction set (the argument, by OPGUARD_ISA) against torch's own answers.

Findings of every floating dtype in dense, transposed, strided and expanded layouts, large ones by
two threads; queries of flags of many widths. Exits 1 on the first difference.
"""

from __future__ import annotations

import os
import sys

tier = sys.argv[1]
os.environ["OPGUARD_ISA"] = tier

import torch  # noqa: E402  (the instruction set is chosen once, before)

import opguard  # noqa: E402, F401
from opguard import _C  # noqa: E402

OPS = torch.ops.opguard
SLOTS = {torch.int64: 4, torch.int32: 2, torch.float64: 4, torch.float32: 2}
SPECIAL = (torch.nan, torch.inf, -torch.inf)


def findings(x: torch.Tensor) -> torch.Tensor:
    """What a scan should find, by torch's isnan and isinf of the real numbers of each row."""
    x = torch.view_as_real(x) if x.is_complex() else x
    x = x.float() if x.dtype.itemsize == 1 else x
    rows = x.flatten(1)
    asked = ((1, rows.isnan()), (2, rows == torch.inf), (4, rows == -torch.inf))
    return sum((bit * where.any(1).to(torch.uint8) for bit, where in asked), torch.tensor(0))


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {"dense": x, "transposed": x.t(), "every other": x[:, ::2], "inner": x[1:, 1:-1]}
    found["a row expanded"] = x[0].expand(5, -1)
    found["a column expanded"] = x[:, :1].expand(-1, 7)
    if x.shape[1] % 4 == 0:
        image = x.reshape(x.shape[0], 2, 2, -1)
        found["channels last"] = image.contiguous(memory_format=torch.channels_last)
        found["permuted"] = image.permute(2, 0, 3, 1)
    return found


def check_findings(
    dtype: torch.dtype, rows: int, columns: int, specials: int, threads: int = 1
) -> None:
    x = torch.randn(rows, columns)
    for _ in range(specials):
        row, column, kind = (int(torch.randint(n, ())) for n in (rows, columns, 3))
        x[row, column] = SPECIAL[kind]
    x = x.to(dtype)
    for name, view in layouts(x).items():
        expected = findings(view)
        torch.set_num_threads(threads)
        got = OPS.row_findings(view)
        torch.set_num_threads(1)
        if not torch.equal(expected.to(torch.uint8), got):
            sys.exit(f"{tier}: {dtype}, {name} {tuple(view.shape)}: {got} for {expected}")


def check_queries(dtype: torch.dtype, rows: int, words: int) -> None:
    slots = words * SLOTS[dtype]
    held = torch.randint(1, 1 << 15, (rows, slots)) * (torch.rand(rows, slots) < 0.2)
    held[: rows // 2] *= torch.rand(rows // 2, 1) < 0.3
    flags = held.to(torch.int16).view(dtype)
    code = int(torch.randint(1, 16, ()))
    expected = {
        "find": ((held & 0x3C) == code << 2).any(1),
        "err": (held != 0).any(1),
        "ok": (held == 0).all(1),
        "count": (held != 0).sum(1, dtype=torch.int32),
        "severity": (held & 3).amax(1),
    }
    got = {
        "find": OPS.flags_find(flags, 0x3C, code << 2),
        "err": OPS.flags_err(flags),
        "ok": OPS.flags_ok(flags),
        "count": OPS.flags_count(flags),
        "severity": OPS.flags_max_severity(flags).to(torch.int64),
    }
    for name, answer in expected.items():
        if not torch.equal(answer, got[name]):
            sys.exit(f"{tier}: {name} of {dtype} ({rows}, {words}): {got[name]} for {answer}")


def main() -> None:
    torch.manual_seed(5)
    floats = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
    narrow = ("e5m2", "e4m3fn", "e5m2fnuz", "e4m3fnuz")
    floats += [getattr(torch, f"float8_{name}") for name in narrow]
    torch.set_num_threads(1)
    for dtype in floats:
        for rows, columns in ((1, 3), (3, 17), (7, 64), (33, 40), (300, 12), (5, 1001)):
            for specials in (0, 1, rows * columns // 8):
                check_findings(dtype, rows, columns, specials)
    for dtype in (torch.float16, torch.float32, torch.float64):
        check_findings(dtype, 3, 120_000, 2, threads=2)
        check_findings(dtype, 3000, 100, 3, threads=2)
    for dtype, per_word in SLOTS.items():
        for words in (1, 2, 3, 4, 5, 8, 17, 256 // per_word):
            for rows in (0, 1, 7, 70):
                check_queries(dtype, rows, words)
    print(_C.ops_info()["isa"])


main()
