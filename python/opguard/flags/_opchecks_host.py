"""The look at what an op returned on the CPU: one scan, and more only where something was found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from opguard.flags import _engine
from opguard.flags._opchecks_book import INF_BITS, NAN_BIT, Book
from opguard.flags._opchecks_ops import Kind, overflows, puts_inf
from opguard.flags._opchecks_places import Place, place_of_stack
from opguard.flags._opchecks_rows import Tracker, by_rows, samples_of
from opguard.flags._rows import Rows
from opguard.flags.codes import ErrorCode

__all__ = ["Host", "floats"]

_SCRATCH_KEY = 4  # four slots of an int64 word
_row_findings = torch.ops.opguard.row_findings.default


class Host:
    """Scans tensors whose memory can be read here and now."""

    def __init__(self, book: Book, tracker: Tracker, mask: int, divisions: bool) -> None:
        self.book = book
        self.tracker = tracker
        self.weights = Tracker()
        self.mask = mask
        self.divisions = divisions
        self._scratch: dict[int, tuple[Tensor, memoryview, bytes]] = {}

    def is_weight(self, x: Any) -> bool:
        """Whether it is a parameter, or one as layers take it: a view of it, in another dtype."""
        return isinstance(x, torch.nn.Parameter) or (
            isinstance(x, Tensor) and self.weights.knows(x)
        )

    def note_weights(self, args: Any, outputs: list[Tensor]) -> None:
        """What an op that computes nothing made of a weight is one."""
        if args and self.is_weight(args[0]):
            for each in outputs:
                self.weights.put(each, None)

    def _new_scratch(self, rows: int) -> tuple[Tensor, memoryview, bytes]:
        if len(self._scratch) > 64:
            self._scratch.clear()
        with torch.inference_mode(False):
            scratch = torch.zeros((rows, 1), dtype=torch.int64, device="cpu")
        memory: Any = scratch.numpy()
        made = scratch, memoryview(memory), bytes(8 * rows)
        self._scratch[rows] = made
        return made

    def _is_clean(self, view: Tensor, mask: int) -> bool:
        rows = view.shape[0] if view.dim() else 1
        scratch, memory, zeros = self._scratch.get(rows) or self._new_scratch(rows)
        _engine.check_(view, 0, scratch, mask, _SCRATCH_KEY)
        if memory.tobytes() == zeros:
            return True
        scratch.zero_()
        return False

    def bits(self, x: Tensor, rows: Rows | None, mask: int = 7) -> tuple[Any, bool] | None:
        """What each sample holds, (N,) uint8 of 1 NaN, 2 +Inf, 4 -Inf; None where it is clean.

        And whether that is said of all samples for want of knowing better.
        """
        samples = self.book.samples
        if rows is None or samples is None or samples_of(rows).mixed:
            view = x.unsqueeze(0) if x.dim() else x
            if self._is_clean(view, mask):
                return None
            import numpy

            value = int(_row_findings(view)[0]) & mask
            return numpy.full(samples or 1, value, numpy.uint8), True
        view = by_rows(x, rows)
        if self._is_clean(view, mask):
            return None
        found = _row_findings(view).numpy() & mask
        if samples_of(rows).identity:
            return found, False
        return self._spread(found, samples_of(rows).ids(), samples)

    def _spread(self, found: Any, ids: Any, samples: int) -> tuple[Any, bool]:
        import numpy

        proven = ids >= 0
        bits = numpy.zeros(samples, numpy.uint8)
        numpy.bitwise_or.at(bits, ids[proven], found[proven])
        rest = numpy.bitwise_or.reduce(found[~proven], initial=numpy.uint8(0))
        if rest:
            return bits | rest, True
        return bits, False

    def scan(
        self, kind: Kind, out: Tensor, rows: Rows | None, call: tuple[Any, Any], before: Any
    ) -> None:
        """Records what ``out`` holds and its op made; ``call`` are the op's arguments."""
        divides = self.divisions and kind.divisor is not None
        found = self.bits(out, rows, 7 if divides else self.mask)
        if found is None:
            return
        if kind.casts:
            found = self.bits(overflows(kind, call[0], out), rows, self.mask & 6)
            if found is None:
                return
        args = (*call[0], *call[1].values())
        nan, inf = self.book.unseen(found[0] & self.mask, wide=found[1])
        if inf is not None and not kind.casts:
            inf = self._made(kind, out, rows, args, before, inf)
        if nan is None and inf is None and not divides:
            return
        place = place_of_stack(kind.name)
        if divides:
            self._divided(kind, out, rows, call, place)
        if nan is not None:
            self.book.add(ErrorCode.NAN, place, nan)
        if inf is not None:
            self.book.add(ErrorCode.INF, place, inf)

    def _divided(
        self, kind: Kind, out: Tensor, rows: Rows | None, call: tuple[Any, Any], place: Place
    ) -> None:
        """Records the samples in which the op divided by zero, and not a NaN or an Inf."""
        by = kind.argument(kind.divisor or "", *call)
        if by is None or by is out:
            return
        bad = ~torch.isfinite(out) & (torch.as_tensor(by, device=out.device) == 0)
        for each in floats(call[0]):
            bad = bad & torch.isfinite(each)
        found = self.bits(torch.zeros_like(out).masked_fill_(bad, torch.inf), rows)
        if found is not None:
            place = place._replace(op=f"zero divisor of {place.op}")
            self.book.add(ErrorCode.INVALID_VALUE, place, found[0] != 0)

    def bad_ids(self, ids: Tensor, size: int, rows: Rows | None) -> Any:
        """(N,) bool: samples with an id outside 0..size-1; None where there is none."""
        import numpy

        samples = self.book.samples
        proven = rows if samples is not None else None
        if proven is None or samples_of(proven).mixed:
            found = _engine.index(ids.reshape(1, -1), size, 0, None, _SCRATCH_KEY).numpy()
            return numpy.ones(samples or 1, bool) if found.any() else None
        view = by_rows(ids, proven)
        found = _engine.index(view, size, 0, None, _SCRATCH_KEY).numpy()[:, 0] != 0
        if not found.any():
            return None
        if samples_of(proven).identity:
            return found
        ids_of_rows = samples_of(proven).ids()
        return self._spread(found.astype(numpy.uint8), ids_of_rows, samples or 1)[0] != 0

    def _made(  # noqa: PLR0917
        self,
        kind: Kind,
        out: Tensor,
        rows: Rows | None,
        args: Any,
        before: dict[int, Any],
        inf: Any,
    ) -> Any:
        """Of the samples in ``inf`` those whose Inf the op made out of finite numbers."""
        if puts_inf(kind, args):
            return None
        inputs = list(floats(args))
        if kind.pointwise and not kind.writes:
            bad = torch.isinf(out)
            for each in inputs:
                if not self.is_weight(each):
                    bad = bad & torch.isfinite(each)
            found = self.bits(out.masked_fill(~bad, 0), rows)
            return None if found is None else _some(inf & ((found[0] & INF_BITS) != 0))
        for each in inputs:
            if self.is_weight(each) or each is out:
                continue
            held = self.bits(each, self.tracker.rows(each))
            if held is not None:
                inf = inf & (held[0] == 0)
        held = before[id(out)][1] if id(out) in before else None
        if held is not None:
            inf = inf & ((held[0] & (INF_BITS | NAN_BIT)) == 0)
        return _some(inf)


def _some(where: Any) -> Any:
    return where if where.any() else None


def floats(args: Any) -> Iterable[Tensor]:
    """The floating tensors among arguments, those in lists too."""
    for each in args:
        if isinstance(each, Tensor):
            if each.is_floating_point() or each.is_complex():
                yield each
        elif isinstance(each, list | tuple):
            yield from floats(each)
