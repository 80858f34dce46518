"""Every op of a block is checked, and what made the first NaN or Inf is named by source line.

    with check_ops() as c:
        y = model(x)
    print(flags.report(c.flags))   # aten::log at model.py:41 in Head.forward

Nothing of the model changes and nothing stays behind. Eager code is seen by a dispatch mode,
compiled code is compiled once more with the checks in its graph.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from opguard.flags._compiled import checks_of
from opguard.flags.config import ErrorConfig, get_config
from opguard.flags.errors import BatchMismatchError, FlagsError

if TYPE_CHECKING:
    from torch import Tensor

    from opguard.flags._opchecks_eager import Mode, Watch

__all__ = ["check", "check_ops"]

# What a traced `check` is in a graph: nothing, but to the backend of a block. Without results and
# effects it goes from all other graphs.
_LIBRARY = torch.library.Library("opguard", "FRAGMENT")  # type: ignore[no-untyped-call]
_define: Any = _LIBRARY.define
_implement: Any = _LIBRARY.impl
_define("check_note(Tensor pred, int site, Tensor[] values) -> ()")
_implement("check_note", lambda pred, site, values: None, "CompositeExplicitAutograd")
_check_note: Any = torch.ops.opguard.check_note.default

CATEGORIES = ("nan", "inf", "user", "index", "div")


class _Blocks(threading.local):
    """The blocks that this thread is in, the innermost one last."""

    def __init__(self) -> None:
        self.now: list[check_ops] = []


_BLOCKS = _Blocks()
_NUMBERS = (torch.float64, torch.int64)


class check_ops:
    """Checks every op in the block; afterwards ``flags`` says what it found.

    A sample's NaN is recorded where it first came up, its Inf where an op made it out of finite
    numbers, with the op and the user's line as the location. Where the row rules prove which
    elements are a sample's, only that sample is flagged, else all of them.

    Args:
        *batch: tensors whose dimension 0 is the batch. Without any, the tensors in the outermost
            call of a module in the block: the first one's dimension 0, and others of that size.
        checks: which of "nan", "inf", "user" (:func:`check`), "index" (ids outside their table:
            flagged and clamped, so that the run goes on) and "div" (zero divisors).
        inf: "both", "pos" (-inf is legal, as masked logits have it) or "none".
        config: how flags are stored; the current configuration if None.
        backend: what compiles the checked form of code that is under torch.compile.

    Raises:
        FlagsError: an unknown category, or an ``inf`` that is none.
        BatchMismatchError: tensors of different batch sizes.
    """

    def __init__(
        self,
        *batch: Tensor,
        checks: str | Iterable[str] = CATEGORIES,
        inf: str = "both",
        config: ErrorConfig | None = None,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        self._batch = list(batch)
        self._categories = _categories(checks)
        mask = checks_of(inf, 1)
        self._mask = (mask & 1 if "nan" in self._categories else 0) | (
            mask & 6 if "inf" in self._categories else 0
        )
        self._config = config
        self._backend = backend
        for each in batch:
            if not isinstance(each, torch.Tensor):
                raise TypeError(
                    "check_ops: expected tensors whose dimension 0 is the batch, got"
                    f" {type(each).__name__}; give checks=, inf=, config= and backend= by name"
                )
        sizes = {each.shape[0] if each.dim() else 1 for each in batch}
        if len(sizes) > 1:
            raise BatchMismatchError(
                f"check_ops: expected tensors of one batch, got batches of {sorted(sizes)}; pass "
                "those whose dimension 0 is the batch"
            )
        self._watch: Watch | None = None
        self._entered: list[tuple[Mode, Any, int]] = []

    def __enter__(self) -> Self:
        from opguard.flags._opchecks_compiled import INSIDE, enter
        from opguard.flags._opchecks_eager import HERE, Mode, Watch, push_modes

        if torch.compiler.is_compiling():
            raise RuntimeError(INSIDE)
        if self._entered:
            raise RuntimeError(
                "check_ops: expected a block that is not entered, it is; make one of its own for "
                "each block inside another or in another thread"
            )
        watch = self._watch = Watch(self._mask, self._categories, given=bool(self._batch))
        watch.until = sys._getframe(1)
        watch.take_given(self._batch)
        HERE.busy = False  # as an interrupt may have left it
        mode = Mode(watch)
        self._entered.append((mode, None, threading.get_ident()))
        try:
            leave = enter(self._backend, self._mask, self._categories)
            self._entered[-1] = (mode, leave, threading.get_ident())
            _BLOCKS.now.append(self)
            push_modes([mode])
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._leave()
        except BaseException:  # an interrupt: what it left undone is done before it goes on
            self._leave()
            raise
        watch = self._watch
        if watch is not None:
            watch.until = None
            watch.tracker.clear()
            watch.host.weights.clear()

    def _leave(self) -> None:
        """Takes back what entering did; what is taken back already stays so."""
        from opguard.flags._opchecks_eager import pop_modes

        if not self._entered:
            return
        mode, leave, thread = self._entered[-1]
        mode.leave()
        if thread == threading.get_ident():  # a generator's block may end in another one
            pop_modes(mode)
        blocks = _BLOCKS.now
        if self in blocks:
            blocks.remove(self)
        if leave is not None:
            leave()
        self._entered.pop()

    @property
    def flags(self) -> Tensor:
        """Flags (N, words) of what the block has found up to now; one row without a batch.

        Raises:
            RuntimeError: the block was not entered yet.
        """
        return self._found().book.flags(get_config() if self._config is None else self._config)

    @property
    def locations(self) -> dict[str, int]:
        """Id of each place where something was found, by its name."""
        book = self._found().book
        book.settle()
        return book.names()

    def _check(self, pred: Any, message: str, values: dict[str, Any]) -> None:
        if "user" not in self._categories or not self._entered:
            return
        if not self._entered[-1][0].is_elsewhere():
            self._found().check(pred, message, values)

    def _found(self) -> Watch:
        if self._watch is None:
            raise RuntimeError(
                "check_ops: expected its block to be entered before what it found is read; use "
                "it as `with check_ops() as c:`"
            )
        return self._watch

    def __repr__(self) -> str:
        if self._watch is None:
            return "check_ops(not entered)"
        found = self._watch.book
        found.settle()
        state = "running" if self._entered else "done"
        return f"check_ops({state}, {len(found.found)} findings)"


def _categories(checks: str | Iterable[str]) -> frozenset[str]:
    chosen = frozenset([checks] if isinstance(checks, str) else checks)
    unknown = sorted(map(str, chosen - set(CATEGORIES)))
    if unknown:
        raise FlagsError(
            f"check_ops(checks=...): expected categories out of {', '.join(CATEGORIES)}, got "
            f"{', '.join(unknown)}"
        )
    return chosen


def check(pred: Tensor, message: str, **values: object) -> None:
    """Records, in a block of :class:`check_ops`, the samples for which ``pred`` is False.

    Outside of such a block it does nothing.

    Args:
        pred: (N,) bool, or () for the whole batch.
        message: what is wrong, with ``{name}`` for ``values``: those of the first bad sample stand
            there in what is reported.
        **values: tensors (N, ...), or anything else that can be formatted; in compiled code
            numbers and constants.
    """
    if torch.compiler.is_dynamo_compiling():
        if torch.compiler.is_exporting():
            return  # an exported program runs where nobody checks it
        names, constants, kept = [], [], []
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                names.append(name)
                kept.append(value)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                names.append(name)  # it may be a symbol
                kept.append(torch.scalar_tensor(value, dtype=_NUMBERS[isinstance(value, int)]))
            else:
                constants.append((name, value))
        _check_note(pred, _site(message, tuple(names), tuple(constants)), kept)
        return
    for block in _BLOCKS.now:
        block._check(pred, message, values)


def _site(message: str, names: tuple[str, ...], constants: tuple[tuple[str, Any], ...]) -> int:
    from opguard.flags._opchecks_user import site_of

    return site_of(message, names, constants)


# What torch.compiler.assume_constant_result sets; that imports torch._dynamo, which takes 0.8 s.
vars(_site)["_dynamo_marked_constant"] = True
