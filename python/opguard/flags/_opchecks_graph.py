"""The checks as ops of a graph: nothing is read, what they find is in one flags tensor.

While a function is traced, the mode calls :meth:`Traced.run` for each op. Locations in the flags
are numbers of the graph's own places, so that a graph depends on no registry and takes no ids for
what is never found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opguard.flags._opchecks_host import floats
from opguard.flags._opchecks_ops import (
    Kind,
    brings_inf,
    ids_of,
    is_quiet,
    kind_of,
    overflows,
    puts_inf,
    with_ids,
)
from opguard.flags._opchecks_places import Place
from opguard.flags._opchecks_rows import Tracker, by_rows, samples_of, settled
from opguard.flags._opchecks_user import SITES, place_name
from opguard.flags._rows import Rows
from opguard.flags.codes import ErrorCode
from opguard.flags.constants import CODE_MASK, CODE_SHIFT, LOCATION_SHIFT

__all__ = ["MORE_KEY", "Traced"]

# Four slots of an int64 word, the oldest are kept: a sample's first NaN and its first Inf.
_CHRONO_FIRST_BY_CODE = 4 | 1 << 19
# Sixteen slots, one for each code and place: bad ids, divisors.
MORE_KEY = 16 | 3 << 19
_MOST_PLACES = 1023

_ops: Any = torch.ops.opguard


class Traced:
    """What a graph finds, while it is traced; the batch has ``samples``, None for no batch."""

    def __init__(
        self,
        mask: int,
        categories: frozenset[str],
        samples: Any,
        place_of: Callable[[str], Place],
        device: torch.device,
    ) -> None:
        self.mask = mask
        self.samples = samples
        self.tracker = Tracker()
        self.places: dict[Place, int] = {}
        self.wide: set[int] = set()
        self.notes: list[Any] = []
        self._inf_tracker = Tracker()  # tensors that may rightly hold an Inf
        self._right_ids = Tracker()
        self._made = Tracker()  # what ops made, in eager code
        self._ids = "index" in categories
        self._divisions = "div" in categories
        self._place_of = place_of
        self._rows = 1 if samples is None else samples
        self._device = device
        self.found = torch.zeros((self._rows, 1), dtype=torch.int64, device=device)
        self.more: Tensor | None = None

    def may_hold_inf(self, x: Tensor) -> None:
        """An Inf in ``x`` is meant."""
        self._inf_tracker.put(x, _MARK)

    def may(self, x: Tensor) -> bool:
        """Whether an Inf in ``x`` may be meant."""
        return self._inf_tracker.rows(x) is not None

    def note(self, pred: Tensor, number: int, tensors: Any) -> None:
        """A check of the user's: what it looked at goes out of the graph."""
        place = self._place_of(place_name(SITES[number].message))
        self.notes.append((SITES[number], place, pred, list(tensors)))

    # --- one op ----------------------------------------------------------------------------------

    def run(self, op: Any, kind: Kind, args: Any, kwargs: Any) -> Any:
        """Runs the op in the trace and adds the look at what it returned."""
        flat = (*args, *kwargs.values())
        if self._ids and (kind.ids is not None or kind.id_lists):
            args, kwargs = self._with_right_ids(kind, args, kwargs)
        inputs = list(floats(flat))
        tainted = [x for x in inputs if self.may(x)]
        finish = self.tracker.plan(op, args, kwargs)
        out = op(*args, **kwargs)
        outputs = [out] if isinstance(out, Tensor) else _flat(out)
        rows = settled(finish, out, len(outputs))
        for each, mine in zip(outputs, rows, strict=True):
            self.tracker.put(each, mine)
        self.after(kind, (args, kwargs), tainted, outputs, rows)
        return out

    def after(
        self,
        kind: Kind,
        call: tuple[Any, Any],
        tainted: list[Tensor],
        outputs: list[Tensor],
        rows: list[Rows | None],
    ) -> None:
        """Adds the look at what an op returned; an Inf in ``tainted`` inputs was meant."""
        taints = brings_inf((*call[0], *call[1].values())) or "lift_fresh" in kind.name
        taints = taints or (bool(tainted) and not kind.ends_inf)
        for each, mine in zip(outputs[: kind.results], rows, strict=False):
            if not (each.is_floating_point() or each.is_complex()):
                continue
            if kind.ids is not None or kind.id_lists or not is_quiet(kind, call[0], each):
                clean = [x for x in tainted if x is not each]
                self._scan(kind, each, mine, *call, clean if tainted else None)
            if taints:
                self.may_hold_inf(each)

    def after_eager(
        self, kind: Kind, call: tuple[Any, Any], outputs: list[Tensor], rows: list[Rows | None]
    ) -> None:
        """:meth:`after` for an op that ran on an accelerator just now."""
        inputs = [x for x in floats((*call[0], *call[1].values())) if x.device == self._device]
        for x in inputs:
            if not (isinstance(x, torch.nn.Parameter) or self._made.knows(x)):
                self.may_hold_inf(x)
        tainted = [x for x in inputs if self.may(x)]
        self.after(kind, call, tainted, outputs, rows)
        for x in outputs:
            self._made.put(x, None)

    def look_at_input(self, name: str, x: Tensor, rows: Rows) -> None:
        """Looks at a tensor of the batch."""
        self._made.put(x, None)
        number = self.places.setdefault(Place(name, "", ""), len(self.places) + 1)
        self._look(x, rows, number, self.mask)

    def _number(self, kind: Kind, what: str = "") -> int:
        place = self._place_of(what + kind.name)
        number = self.places.get(place)
        if number is not None:
            return number
        if len(self.places) >= _MOST_PLACES - 1:
            place = Place("later ops", "", "")
        elif len(self.places) >= _MOST_PLACES - 127:
            place = place._replace(op="an op")
        return self.places.setdefault(place, len(self.places) + 1)

    def _scan(  # noqa: PLR0917
        self,
        kind: Kind,
        out: Tensor,
        rows: Rows | None,
        args: Any,
        kwargs: Any,
        inputs: list[Tensor] | None,
    ) -> None:
        if out.layout is not torch.strided:
            return
        number = self._number(kind)
        if self._divisions and kind.divisor is not None:
            self._divided(kind, out, rows, args, kwargs)
        if kind.casts:
            self._look(overflows(kind, args, out), rows, number, self.mask & 6)
            return
        mask = self.mask & 1 if puts_inf(kind, (*args, *kwargs.values())) else self.mask
        if inputs is None or not mask & 6:
            self._look(out, rows, number, mask)
            return
        self._look(out, rows, number, self.mask & 1)
        if kind.pointwise and not kind.writes:
            for each in inputs:
                if not isinstance(each, torch.nn.Parameter):
                    out = torch.where(torch.isfinite(each), out, 0)
            self._look(out, rows, number, self.mask & 6)
            return
        held = None
        for each in inputs:
            bits = self._bits(each, self.tracker.rows(each)) != 0
            held = bits if held is None else held | bits
        bad = (self._bits(out, rows) & (self.mask & 6)) != 0
        bad = bad if held is None else bad & ~held
        self._push(bad, ErrorCode.INF, number, self._is_proven(rows))

    def _is_proven(self, rows: Rows | None) -> bool:
        return rows is not None and self.samples is not None and _every_row(rows) is not None

    def _look(self, x: Tensor, rows: Rows | None, number: int, mask: int) -> None:
        if not mask:
            return
        if x.device == self._device:
            if self.samples is None:
                view = x.unsqueeze(0) if x.dim() else x
                self.found = _ops.flags_check(self.found, view, number, mask, _CHRONO_FIRST_BY_CODE)
                return
            if rows is not None and samples_of(rows).identity:
                self.found = _ops.flags_check(
                    self.found, by_rows(x, rows), number, mask, _CHRONO_FIRST_BY_CODE
                )
                return
        bits = self._bits(x, rows)
        proven = self._is_proven(rows)
        if mask & 1:
            self._push((bits & 1) != 0, ErrorCode.NAN, number, proven)
        if mask & 6:
            self._push((bits & (mask & 6)) != 0, ErrorCode.INF, number, proven)

    def _bits(self, x: Tensor, rows: Rows | None) -> Tensor:
        """(N,) or (1,) uint8: what each sample holds."""
        order = None if rows is None or self.samples is None else _every_row(rows)
        bits: Tensor
        if rows is None or order is None:
            bits = _ops.row_findings(x.unsqueeze(0) if x.dim() else x)
            return bits.to(self._device)
        bits = _ops.row_findings(by_rows(x, rows)).to(self._device)
        if samples_of(rows).identity:
            return bits
        return _per_sample(bits, order, self.samples)

    def _push(self, bad: Tensor, code: int, number: int, proven: bool) -> None:
        if not proven and self.samples is not None:
            # Where a sample has one already, the others may have it from there.
            self.wide.add(number)
            mask = CODE_MASK << CODE_SHIFT
            earlier = _ops.flags_find(self.found, mask, ErrorCode.NAN << CODE_SHIFT)
            if code == ErrorCode.INF:
                earlier = earlier | _ops.flags_find(self.found, mask, code << CODE_SHIFT)
            bad = bad & ~earlier.any()
        slot = 3 | code << CODE_SHIFT | number << LOCATION_SHIFT
        bad = bad.expand(self._rows)
        self.found = _ops.flags_push(self.found, bad, slot, _CHRONO_FIRST_BY_CODE)

    # --- ids and divisors ------------------------------------------------------------------------

    def _also(self) -> Tensor:
        if self.more is None:
            self.more = torch.zeros((self._rows, 4), dtype=torch.int64, device=self._device)
        return self.more

    def _divided(self, kind: Kind, out: Tensor, rows: Rows | None, args: Any, kwargs: Any) -> None:
        by = kind.argument(kind.divisor or "", args, kwargs)
        if not isinstance(by, Tensor) or by is out or isinstance(by, torch.nn.Parameter):
            return
        bad = torch.where((by == 0) & ~torch.isfinite(out), torch.inf, torch.zeros_like(out))
        for each in floats((*args, *kwargs.values())):
            bad = torch.where(torch.isfinite(each), bad, 0)
        number = self._number(kind, "zero divisor of ")
        slot = 2 | ErrorCode.INVALID_VALUE << CODE_SHIFT | number << LOCATION_SHIFT
        where = (self._bits(bad, rows) != 0).expand(self._rows)
        self.more = _ops.flags_push(self._also(), where, slot, MORE_KEY)

    def _with_right_ids(self, kind: Kind, args: Any, kwargs: Any) -> Any:
        old = [each for each in ids_of(kind, args, kwargs) if not self._right_ids.knows(each[0])]
        # Autograd has kept the ids as they were: its pass would write past the table by them.
        kept = torch.is_grad_enabled() and any(x.requires_grad for x in floats(args))
        new = [self._right(kind, *each) for each in old]
        if kept:
            return args, kwargs
        return (
            with_ids(kind, args, kwargs, [each[0] for each in old], new) if old else (args, kwargs)
        )

    def right_ids(self, ids: Tensor, table: Tensor) -> Tensor:
        """Ids of an embedding made right before autograd sees them; told as those of its op."""
        if not self._ids or not isinstance(table.shape[0], int):
            return ids
        fixed = self._right(kind_of(torch.ops.aten.embedding.default), ids, 0, table.shape[0] - 1)
        self._right_ids.put(fixed, None)
        return fixed

    def _right(self, kind: Kind, ids: Tensor, low: Any, high: Any) -> Tensor:
        if not isinstance(high, int) or high < 0:
            return ids
        rows = self.tracker.rows(ids)
        fixed = ids.clamp(low, high)
        wrong = torch.where(fixed != ids, torch.nan, 0.0)
        slot = 2 | ErrorCode.OUT_OF_BOUNDS << CODE_SHIFT | self._number(kind) << LOCATION_SHIFT
        where = (self._bits(wrong, rows) != 0).expand(self._rows)
        self.more = _ops.flags_push(self._also(), where, slot, MORE_KEY)
        self.tracker.put(fixed, rows)
        return fixed


_MARK: Any = object()


def _every_row(rows: Rows) -> Any:
    """The sample of each row, if each has one: an array, or True where row i is sample i."""
    if samples_of(rows).identity:
        return True
    ids = samples_of(rows).ids()
    return None if ids is None or not (ids >= 0).all() else ids


def _per_sample(bits: Tensor, ids: Any, samples: Any) -> Tensor:
    """(rows,) bits to (N,), those of a sample's rows or-ed."""
    bad = bits.new_zeros(samples)
    for bit in (1, 2, 4):
        index = torch.as_tensor(ids, device=bits.device)
        held = bits.new_zeros(samples).index_add(0, index, ((bits & bit) != 0).to(bits.dtype))
        bad = bad | torch.where(held != 0, bit, 0).to(bits.dtype)
    return bad


def _flat(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, list | tuple):
        return [x for each in out for x in _flat(each)]
    return []
