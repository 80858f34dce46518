"""check_model: an MLP of 3 x 512 with checks on every layer, against the same without."""

from __future__ import annotations

import torch
from harness import Row

from opguard.base import OpGuardBase
from opguard.flags import check_model
from opguard.tasks._generating import RowGuard


def mlp() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(512, 512), torch.nn.Linear(512, 512), torch.nn.Linear(512, 512)]
    return torch.nn.Sequential(*layers)


def _eager(batch: int, limit: float) -> Row:
    plain, checked, x = mlp(), mlp(), torch.randn(batch, 512)
    check_model(checked)

    def ours() -> object:
        with torch.no_grad():
            return checked(x)

    def theirs() -> object:
        with torch.no_grad():
            return plain(x)

    return Row(f"check_model, MLP 3x512, batch {batch}, eager", ours, theirs, limit=limit)


def _compiled(batch: int, limit: float) -> Row:
    plain, checked, x = mlp(), mlp(), torch.randn(batch, 512)
    c = check_model(checked)

    @torch.compile(fullgraph=True)
    def with_flags(x: torch.Tensor) -> object:
        return checked(x), c.flags

    @torch.compile(fullgraph=True)
    def without(x: torch.Tensor) -> object:
        return plain(x)

    def ours() -> object:
        with torch.no_grad():
            return with_flags(x)

    def theirs() -> object:
        with torch.no_grad():
            return without(x)

    return Row(f"check_model, MLP 3x512, batch {batch}, compiled", ours, theirs, limit=limit)


class Tiny(OpGuardBase):
    NAME = "tiny"
    MODEL_ID = "."
    DETECTOR_TYPE = staticmethod(lambda model_id: torch.nn.Linear(4, 4))


def _base() -> Row:
    plain = Tiny(device_override="cpu", keep_warm=True)
    flagged = Tiny(device_override="cpu", keep_warm=True, flags=True)
    x = torch.ones(1, 4)
    return Row(
        "OpGuardBase(flags=True) call, tiny Linear, kept warm, against flags=False",
        lambda: flagged(input_raw=x),
        lambda: plain(input_raw=x),
        extra_us=30,
    )


def _row_guard() -> Row:
    """A step of generation, 9 rows of 50,000 scores."""
    ids, scores, guard = torch.zeros(9, 4, dtype=torch.long), torch.randn(9, 50_000), RowGuard(3)

    def by_torch() -> object:
        bad = ~scores.amax(-1).isfinite()
        return torch.where(bad.unsqueeze(-1), -1e6, scores)

    return Row(
        "RowGuard.scores, 9 x 50,000, against amax, isfinite and where",
        lambda: guard.scores(ids, scores),
        by_torch,
        limit=0.6,
    )


def rows() -> list[Row]:
    eager = ((1, 1.4), (32, 1.1), (256, 1.05), (4096, 1.05))
    return [
        *(_eager(batch, limit) for batch, limit in eager),
        _compiled(256, 1.1),
        _base(),
        _row_guard(),
    ]
