"""The dispatch mode: every op of the block comes by here, and goes on unchanged."""

from __future__ import annotations

import logging
import sys
import threading
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opguard.flags._opchecks_book import Book
from opguard.flags._opchecks_graph import Traced
from opguard.flags._opchecks_host import Host
from opguard.flags._opchecks_ops import Kind, ids_of, is_quiet, kind_of, with_ids
from opguard.flags._opchecks_places import Place, in_backward, place_of_stack
from opguard.flags._opchecks_rows import Tracker, of_batch, outermost_call, samples_of, settled
from opguard.flags._opchecks_user import SITES, place_name, plain, tell
from opguard.flags._rows import Rows
from opguard.flags._rows.rules import tensors_of
from opguard.flags._tracing import never_a_frame
from opguard.flags.codes import ErrorCode

__all__ = ["HERE", "Mode", "Watch", "pop_modes", "push_modes"]

logger = logging.getLogger("opguard")

_push: Any = torch._C._push_on_torch_dispatch_stack
_pop_by_key: Any = torch._C._pop_torch_dispatch_stack
_top: Any = torch._C._get_dispatch_stack_at
_length: Any = torch._C._len_torch_dispatch_stack
_DisableTorchDispatch: Any = torch._C._DisableTorchDispatch
_DisableFuncTorch: Any = torch._C._DisableFuncTorch

_kinds: dict[Any, Kind] = {}
_strided = torch.strided


class _Here(threading.local):
    """This thread's own: whether it looks at something now, and is not to be looked at."""

    busy = False


HERE = _Here()


class _looking:
    """While it lasts nobody sees what this thread runs: neither blocks nor other modes' users."""

    __slots__ = ("_hidden", "_transforms")

    def __init__(self, transforms: bool = False) -> None:
        self._transforms = transforms  # torch.func's see nothing either

    def __enter__(self) -> None:
        HERE.busy = True
        self._hidden: Any = None
        if self._transforms or _length():
            self._hidden = _DisableTorchDispatch(), self._transforms and _DisableFuncTorch()

    def __exit__(self, *_: object) -> None:
        HERE.busy = False
        self._hidden = None


def _looks_at_ids(mode: Any) -> bool:
    return isinstance(mode, Mode) and getattr(mode.watch, "checks_ids", False)


class Watch:
    """What is known and what was found in one block."""

    def __init__(self, mask: int, categories: frozenset[str], *, given: bool = False) -> None:
        self.mask = mask
        self.given = given  # the batch is what was given, no module is asked for its arguments
        self.categories = categories
        self.book = Book()
        self.tracker = Tracker()
        self.batch = Tracker()  # what was given as the batch, or called for it
        self.host = Host(self.book, self.tracker, mask, "div" in categories)
        self.until: FrameType | None = None  # the frame of the block
        self.checks_ids = "index" in categories
        self.failed = False
        self._elsewhere: dict[Any, Traced] = {}

    # --- the batch -------------------------------------------------------------------------------

    def take_given(self, batch: list[Tensor]) -> None:
        """Takes what the block was given."""
        with _looking():
            self.take_batch("input", batch)

    def take_batch(self, name: str, batch: list[Tensor]) -> None:
        """Tensors whose dimension 0 is the batch; the first of them says how many samples."""
        for each in batch:
            # Known without rows: made of the batch in a way that nobody could follow.
            if not each.dim() or self.tracker.knows(each):
                continue
            if self.book.samples is None:
                self.book.size(each.shape[0], each.device)
            if each.shape[0] != self.book.samples:
                continue
            rows = of_batch(each, self.book.samples)
            self.tracker.put(each, rows)
            self.batch.put(each, rows)
            if _is_floats(each):
                self._look_at_input(name, each, rows)

    def _look_at_input(self, name: str, x: Tensor, rows: Rows) -> None:
        if _is_elsewhere(x):
            self._on(x.device).look_at_input(name, x, rows)
            return
        data = _data_of(x) if self.mask else None
        found = None if data is None else self.host.bits(data, rows, self.mask)
        if found is None:
            return
        nan, inf = self.book.unseen(found[0], wide=False)
        place = Place(name, "", "")
        if nan is not None:
            self.book.add(ErrorCode.NAN, place, nan)
        if inf is not None:
            self.book.add(ErrorCode.INF, place, inf)

    def knows(self, inputs: list[Tensor]) -> bool:
        """Whether the rows of any input are known; looks for the batch where it may be new."""
        samples, tracker = self.book.samples, self.tracker
        known = look = False
        for each in inputs:
            if tracker.rows(each) is not None:
                known = True
            elif (
                (samples is None or (each.dim() and each.shape[0] == samples))
                and not isinstance(each, torch.nn.Parameter)
                and not tracker.knows(each)
            ):
                look = not self.given
        if not look or not self.find_batch():
            return known
        for each in inputs:
            if tracker.rows(each) is not None:
                known = True
            elif self.book.samples is not None and each.dim() and not tracker.knows(each):
                tracker.put(each, None)
        return known

    def find_batch(self) -> bool:
        """Takes the tensors of the outermost call of a module in the block for its batch."""
        call = outermost_call(self.until)
        if call is not None:
            batch = [x for x in call[1] if not isinstance(x, torch.nn.Parameter)]
            self.take_batch(f"input of {call[0]}", batch)
        return call is not None

    # --- one op ----------------------------------------------------------------------------------

    def run(self, op: Any, kind: Kind, args: Any, kwargs: Any) -> Any:
        """Runs the op and looks at what it made."""
        HERE.busy = True  # as in _looking, without a call
        hidden = _DisableTorchDispatch() if _length() else None
        try:
            finish, before, args, kwargs = self._before(op, kind, args, kwargs)
        finally:
            HERE.busy = False
            del hidden
        try:
            out = op(*args, **kwargs)
        except Exception:
            if kind.divisor is not None and self.host.divisions:
                self._failed_division(kind, args, kwargs)
            raise
        HERE.busy = True
        hidden = _DisableTorchDispatch() if _length() else None
        try:
            self._after(kind, (args, kwargs), out, finish, before)
        except Exception as error:  # what looks on must not end what it looks at
            self._complain(kind, error)
        finally:
            HERE.busy = False
            del hidden
        return out

    def _complain(self, kind: Kind, error: Exception) -> None:
        if not self.failed:
            self.failed = True
            logger.warning(
                "check_ops: could not look at what %s returned: %s: %s",
                kind.name,
                type(error).__name__,
                error,
            )

    def _before(self, op: Any, kind: Kind, args: Any, kwargs: Any) -> Any:
        finish, before = None, {}
        try:
            inputs = list(tensors_of((*args, *kwargs.values()) if kwargs else args))
            inputs = [x for x in inputs if not x.is_nested]
            known = self.knows(inputs)
            if self.checks_ids and (kind.ids is not None or kind.id_lists):
                args, kwargs = self._with_right_ids(kind, args, kwargs)
            if known:
                finish = self.tracker.plan(op, args, kwargs)
            if kind.writes:
                before = self._written(kind, args, kwargs)
        except Exception as error:
            self._complain(kind, error)
        return finish, before, args, kwargs

    def _written(self, kind: Kind, args: Any, kwargs: Any) -> dict[int, Any]:
        """The rows, and where it matters what they hold, of tensors that the op writes into."""
        found: dict[int, Any] = {}
        for at in kind.writes:
            value = kind.argument(kind.names[at], args, kwargs)
            for each in tensors_of(value):
                rows = self.tracker.rows(each)
                held = None
                data = _data_of(each) if at == 0 and not kind.quiet else None
                if data is not None and _is_floats(data):
                    held = self.host.bits(data, rows)
                found[id(each)] = (rows, held)
        return found

    def _after(self, kind: Kind, call: Any, out: Any, finish: Any, before: Any) -> None:
        outputs = [out] if isinstance(out, Tensor) else list(tensors_of(out))
        if not outputs and before:  # written into, and nothing returned: foreach ops
            outputs, finish = [x for x in tensors_of(call[0]) if id(x) in before], None
        outputs = [x for x in outputs if not x.is_nested]
        if not outputs:
            return
        rows = settled(finish, out, len(outputs))
        samples, tracker = self.book.samples, self.tracker
        for each, mine in zip(outputs, rows, strict=True):
            if before and id(each) in before:
                if mine is not None or self._comes_from_batch(call):
                    self._rewritten(each, mine, before[id(each)][0])
            elif mine is not None or (
                each.dim() and each.shape[0] == samples and self._comes_from_batch(call)
            ):
                tracker.put(each, mine)
        if kind.quiet and not (kind.ids or kind.id_lists):
            self.host.note_weights(call[0], outputs)
            if not kind.casts:
                return
        for each, mine in zip(outputs[: kind.results], rows, strict=False):
            if not _is_floats(each) or (kind.casts and is_quiet(kind, call[0], each)):
                continue
            data = _data_of(each)
            if data is not None:
                self.host.scan(kind, data, mine, call, before)
            elif _is_elsewhere(each):
                self._on(each.device).after_eager(kind, call, [each], [mine])

    def _comes_from_batch(self, call: Any) -> bool:
        inputs = list(tensors_of((*call[0], *call[1].values())))
        return any(self.tracker.knows(x) for x in inputs)

    def _rewritten(self, x: Tensor, rows: Rows | None, old: Rows | None) -> None:
        self.tracker.put(x, rows)
        if rows is old:
            return
        same = (
            rows is not None
            and old is not None
            and rows.axes == old.axes
            and (
                rows.payload is old.payload
                or (samples_of(rows).identity and samples_of(old).identity)
            )
        )
        if not same:
            self.tracker.forget_storage(x)

    def _on(self, device: torch.device) -> Traced:
        """What is found on an accelerator stays there until the flags are asked for."""
        at = device, self.book.samples
        traced = self._elsewhere.get(at)
        if traced is None:
            traced = Traced(self.mask, self.categories, at[1], place_of_stack, device)
            traced.tracker = self.tracker
            self._elsewhere[at] = traced
            self.book.pending.append(lambda: self._read(at))
        return traced

    def _read(self, at: Any) -> None:
        traced = self._elsewhere.pop(at)
        for flags in (traced.found, traced.more):
            if flags is not None:
                slots = flags.cpu().numpy().view("uint16")
                self.book.take(slots, list(traced.places), traced.wide, "")

    def look_at_gradients(self, name: str, before: Any, after: Any) -> None:
        """What a compiled backward pass made of gradients ``before`` it; it is one op here."""
        with _looking():
            if any(self._holds(x) for x in before):
                return
            for x in after:
                found = self._holds(x)
                if found is None:
                    continue
                nan, inf = self.book.unseen(found[0], wide=True)
                place = place_of_stack(f"backward of {name}")._replace(op=f"backward of {name}")
                if nan is not None:
                    self.book.add(ErrorCode.NAN, place, nan)
                if inf is not None:
                    self.book.add(ErrorCode.INF, place, inf)

    def _holds(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not _is_floats(x) or not self.mask:
            return None
        data = _data_of(x)
        return None if data is None else self.host.bits(data, None, self.mask)

    # --- users' checks ---------------------------------------------------------------------------

    def check(self, pred: Any, message: str, values: dict[str, Any]) -> None:
        """Records a check of the user's; on an accelerator it is read when flags are."""
        place = place_of_stack(place_name(message))
        with _looking(True):
            pred = plain(pred)
            values = {name: plain(x) for name, x in values.items()}
            if isinstance(pred, Tensor) and not _is_real(pred):
                return  # somebody traces: there is no value yet
            if isinstance(pred, Tensor) and not pred.is_cpu:
                held = pred.clone()
                kept = {k: x.clone() if isinstance(x, Tensor) else x for k, x in values.items()}
                self.book.pending.append(lambda: tell(self.book, place, held, message, kept))
            else:
                tell(self.book, place, pred, message, values)

    def note(self, pred: Tensor, number: int, tensors: Any) -> None:
        """A check in a graph that runs op by op."""
        if "user" in self.categories:
            site = SITES[number]
            place = place_of_stack(place_name(site.message))
            site.tell(self.book, place, pred, tensors)

    # --- ids and divisors ------------------------------------------------------------------------

    def _with_right_ids(self, kind: Kind, args: Any, kwargs: Any) -> Any:
        old = ids_of(kind, args, kwargs)
        new = [self._right(kind, *each) for each in old]
        ids = [each[0] for each in old]
        if all(a is b for a, b in zip(ids, new, strict=True)):
            return args, kwargs
        return with_ids(kind, args, kwargs, ids, new)

    def _right(self, kind: Kind, ids: Tensor, low: int, high: int) -> Tensor:
        """``ids``, or where some are bad a copy in which they are the nearest good ones."""
        if not _is_real(ids) or not ids.is_cpu or high < 0 or not ids.numel():
            return ids
        rows = self.tracker.rows(ids)
        bad = self.host.bad_ids(ids - low if low else ids, high - low + 1, rows)
        if bad is None:
            return ids
        if in_backward() == -1:  # else that was said of the forward op
            self.book.add(ErrorCode.OUT_OF_BOUNDS, place_of_stack(kind.name), bad)
        if any(_looks_at_ids(_top(i)) for i in range(_length())):
            return ids  # a block around this one is to see them as they are
        fixed = ids.clamp(low, high)
        if rows is not None:
            self.tracker.put(fixed, rows)
        return fixed

    def _failed_division(self, kind: Kind, args: Any, kwargs: Any) -> None:
        by = kind.argument(kind.divisor or "", args, kwargs)
        with _looking():
            try:
                if not isinstance(by, Tensor):
                    by = torch.as_tensor(by, device="cpu")
                if not _is_real(by):
                    return
                zero = torch.zeros(by.shape, device="cpu").masked_fill_(by == 0, torch.nan)
                found = self.host.bits(zero, self.tracker.rows(by))
                if found is not None:
                    place = place_of_stack(kind.name)
                    place = place._replace(op=f"zero divisor of {place.op}")
                    self.book.add(ErrorCode.INVALID_VALUE, place, found[0] != 0)
            except Exception as error:
                self._complain(kind, error)


_blocks: ContextVar[tuple[Mode, ...]] = ContextVar("opguard_check_ops", default=())


def _in_a_task() -> bool:
    """Whether an asyncio task runs in this thread now."""
    asyncio = sys.modules.get("asyncio")
    if asyncio is None or asyncio._get_running_loop() is None:
        return False
    return asyncio.current_task() is not None


class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every op that this thread runs, below autograd."""

    supports_higher_order_operators = True

    def __init__(self, watch: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch
        self._of_a_task = _in_a_task()
        if self._of_a_task:
            _blocks.set((*_blocks.get(), self))

    def leave(self) -> None:
        """The task begins others without it from now on."""
        if self._of_a_task:
            _blocks.set(tuple(each for each in _blocks.get() if each is not self))

    def is_elsewhere(self) -> bool:
        """Whether another task runs here, that was not begun in the block; the stack is one."""
        return self._of_a_task and self not in _blocks.get() and _in_a_task()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # said to Dynamo below, at no cost a call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = _kinds.get(func)
        if kind is None:
            kind = _kinds[func] = kind_of(func)
        if kind.plain or HERE.busy or (self._of_a_task and self.is_elsewhere()):
            if kind.name == "opguard::check_note" and not (HERE.busy or self.is_elsewhere()):
                self.watch.note(*args)
            return func(*args, **kwargs) if kwargs else func(*args)
        if kind.splits:
            _push(self)
            try:
                return func.decompose(*args, **(kwargs or {}))
            finally:
                pop_modes(self)
        return self.watch.run(func, kind, args, kwargs or {})


never_a_frame(Mode.__torch_dispatch__)


def push_modes(modes: list[Any]) -> None:
    """Puts modes on this thread's stack, the last one on top."""
    for mode in modes:
        _push(mode)


def pop_modes(mode: Any = None) -> list[Any]:
    """Takes ``mode`` off this thread's stack, wherever it is; None: all of check_ops's that lie
    on top. Those taken off."""
    if mode is None:
        taken = []
        while _length() and isinstance(_top(_length() - 1), Mode):
            taken.append(_pop_by_key(None))
        taken.reverse()
        return taken
    above = []
    while _length():
        top = _pop_by_key(None)
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        _push(other)
    return [mode]


def _is_floats(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _is_real(x: Tensor) -> bool:
    kind = type(x)
    return (kind is Tensor or kind is torch.nn.Parameter) and x.layout is _strided


def _is_elsewhere(x: Tensor) -> bool:
    """Whether it lies in the memory of an accelerator."""
    return x.device.type not in {"cpu", "meta"} and _is_real(x) and x.numel() > 0


def _data_of(x: Tensor) -> Tensor | None:
    """The plain tensor in ``x``, None where there is none that can be read."""
    if not _is_real(x):
        inner = getattr(x, "_data", None)
        if not isinstance(inner, Tensor) or not _is_real(inner):
            return None
        x = inner
    return x if x.numel() and x.is_cpu else None
