"""What one call of a checked model has found, and how a tensor's findings come to it.

All of it is also traced, into graphs that torch.compile and torch.export make: there flags are
handed on from op to op, where otherwise they are written into.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from opguard.flags import _engine
from opguard.flags._leaves import Dims
from opguard.flags.guarded import GuardedTensor

__all__ = ["THREADS", "Found", "Token", "record", "record_plain", "record_rest"]

DEEPEST = 8  # of containers in a container: what holds itself ends somewhere

_is_compiling = torch.compiler.is_compiling
_modules = sys.modules
# Where a torch has no such function, flags are never written into: right, and slower.
_transforms_run = getattr(torch._C, "_are_functorch_transforms_active", None) or (lambda: True)
_strided = torch.strided


def tensors(value: Any, depth: int = 0) -> list[Tensor]:
    """The tensors in ``value``: in lists, tuples, mappings and dataclasses, however nested."""
    if isinstance(value, Tensor):
        return [value]
    if depth == DEEPEST or value is None:
        return []
    if isinstance(value, list | tuple):
        inner = list(value)
    elif isinstance(value, Mapping):
        inner = list(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        inner = [getattr(value, each.name, None) for each in fields(value)]
    else:
        return []
    found: list[Tensor] = []
    for each in inner:
        found += tensors(each, depth + 1)
    return found


class Found:
    """The flags of one call, and its number of samples once it is ``sized``."""

    def __init__(self, users: int) -> None:
        self.sized = False
        self._rows = 0
        # Tells the rows to a graph by its shape: of a number Dynamo would make a graph for each.
        self._like: Tensor | None = None
        self.users = users  # the calls and blocks that run now
        self.held = 0  # how many of them are blocks
        self.here: Tensor | None = None  # on the device of what was recorded first
        self.elsewhere: dict[torch.device, Tensor] | None = None
        # What a leaf returned last, by weak references, each with its version and batch dimension.
        self.last: list[tuple[Callable[[], Any], int, int | None]] = []

    def size(self, args: Any, kwargs: Any) -> None:
        """Takes the number of samples from the first tensor of a call: dim 0 is the batch.

        A call without a tensor is one sample.
        """
        self.sized = True
        self._rows = 1
        if args and type(args[0]) is Tensor and args[0].dim():  # the common case
            self._rows = args[0].size(0)  # a nested tensor may have no shape
        else:
            for each in tensors((args, kwargs)):
                if each.dim():
                    self._rows = each.size(0)
                    break
        if "torch._dynamo" in _modules and not _is_compiling():
            self._like = torch.empty((self._rows, 0))

    def rows(self) -> int:
        return self._rows if self._like is None else self._like.shape[0]

    def on(self, device: torch.device) -> Tensor | None:
        """The flags on ``device``, None where there are none yet."""
        here = self.here
        if here is None or here.device == device:
            return here
        return None if self.elsewhere is None else self.elsewhere.get(device)

    def put(self, flags: Tensor) -> None:
        if self.here is None or self.here.device == flags.device:
            self.here = flags
        else:
            self.elsewhere = (self.elsewhere or {}) | {flags.device: flags}

    def note(self, x: Tensor, dim: int | None) -> None:
        """Remembers what the last leaf returned: the model may return it as it is."""
        # An inference tensor counts no versions: whether it changed cannot be told.
        self.last.append((weakref.ref(x), -1 if x.is_inference() else x._version, dim))

    def noted(self, x: Tensor) -> tuple[bool, int | None]:
        """Whether ``x`` was recorded as it is, and which of its dimensions is the batch."""
        for refers, version, dim in self.last:
            if refers() is x:
                return version >= 0 and version == x._version, dim
        return False, 0

    def end(self) -> None:
        """No call or block runs any more."""
        self.users = self.held = 0
        self.last = []

    def flags(self, key: int) -> Tensor:
        """All of it as one tensor (rows, words), an ordinary one outside of inference mode."""
        here = self.here
        if here is None:
            here = _engine.new(self.rows(), "cpu", key)
        if self.elsewhere is not None:
            for other in self.elsewhere.values():
                here = _engine.merge((here, other.to(here.device)), key)
            self.elsewhere = None
        if not _is_compiling() and here.is_inference() and not torch.is_inference_mode_enabled():
            here = here.clone()
        self.here = here
        return here

    def is_readable(self) -> bool:
        """Whether there was a call, and not one that only traced the model."""
        if _is_compiling():
            return True
        from torch._subclasses.fake_tensor import FakeTensor

        return self.sized and not isinstance(self.here, FakeTensor)

    def is_out_of_reach(self) -> bool:
        """Whether the flags belong to a transform, such as vmap, which is over."""
        if _is_compiling() or self.here is None or _transforms_run():
            return False
        inside = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", None)
        return inside is not None and bool(inside(self.here))


class Slot:
    """Where a thread keeps what its last call found."""

    def __init__(self) -> None:
        self.found: Found | None = None


class Threads(threading.local):
    """``slot`` is the calling thread's own.

    One object a thread, made once: Dynamo writes attributes of a ``threading.local`` past the
    thread's own, and of what it holds rightly.
    """

    def __init__(self) -> None:
        self.slot = Slot()


# By number. A global, and not in the hooks: of what it finds through a module Dynamo takes every
# size for a constant, and would make a graph for each number of samples.
THREADS: dict[int, Threads] = {}
_numbers = itertools.count()


class Token:
    """Keeps an entry of ``THREADS`` as long as a hook or a check has it."""

    def __init__(self) -> None:
        self.number = next(_numbers)
        THREADS[self.number] = Threads()

    def __del__(self, threads: dict[int, Threads] = THREADS) -> None:
        threads.pop(self.number, None)  # at exit, when the module has lost its globals, too


def record_plain(found: Found, x: Tensor, place: int, how: tuple[int, int]) -> bool:
    """Records a tensor where all is as it is most often; False where it is not, or not quite.

    What :func:`record` asks beforehand an error tells here, in eager code.
    """
    here = found.here
    try:
        if here is not None:
            if not (x.is_cpu and here.is_cpu):
                return False
            _engine.check_(x, place, here, *how)
            return True
        if found.sized and x.dim() and x.shape[0] == found.rows():
            found.here = _engine.check(x, place, None, *how)
            return True
    except Exception:
        return False
    return False


def record(found: Found, output: Any, place: int, how: tuple[int, int], dims: Dims | None) -> None:
    """Records all that a leaf returned; ``how`` is the checks' mask and the key."""
    eager = not _is_compiling()
    if eager:
        found.last = []
    if type(output) is Tensor and dims is None:
        add(found, output, place, how, 0)
        if eager:
            found.note(output, 0)
        return
    answers: list[tuple[Tensor, int | None]]
    if dims is not None:
        answers = dims(output)
    elif isinstance(output, PackedSequence):  # its rows are steps of all sequences
        answers = [(output.data, None)]
    else:
        answers = [(each, 0) for each in tensors(output)]
    for each, dim in answers:
        add(found, each, place, how, dim)
        if eager:
            found.note(each, dim)


def record_rest(found: Found, output: Any, place: int, how: tuple[int, int]) -> None:
    """Records what the model returned in the samples of which no leaf said anything."""
    told: dict[torch.device, Tensor] = {}
    for each in tensors(output):
        recorded, dim = (False, 0) if _is_compiling() else found.noted(each)
        if recorded:
            continue
        flags = found.on(each.device)
        if flags is None:
            add(found, each, place, how, dim)
            continue
        if each.device not in told:
            told[each.device] = _engine.is_err(flags).unsqueeze(1)
        rest = _looked_at(found, each, place, how, dim)
        if rest is not None:
            _join(found, rest.masked_fill(told[each.device], 0), how[1])


def add(found: Found, x: Tensor, place: int, how: tuple[int, int], dim: int | None) -> None:
    """Records a tensor whose dimension ``dim`` is the batch.

    Where that has another size than the call has samples, what is found is every sample's.
    """
    x, dim = _batched(found, x, dim)
    flags = found.on(x.device)
    if dim is None or flags is None:
        more = _looked_at(found, x, place, how, dim)
        if more is not None:
            _join(found, more, how[1])
    elif _is_compiling() or _transforms_run():
        found.put(_engine.check(x, place, flags, *how))
    else:
        _engine.check_(x, place, flags, *how)


def _batched(found: Found, x: Tensor, dim: int | None) -> tuple[Tensor, int | None]:
    """``x`` with the batch in dim 0; None where it has none."""
    if isinstance(x, GuardedTensor):  # its own flags are its own
        x = x.unwrap()
    if x.layout is not _strided or x.is_nested:
        return (x._values() if x.layout is torch.sparse_coo else x.values()), None
    if dim:
        x, dim = (x.transpose(0, dim), 0) if x.dim() > dim else (x, None)
    if dim is None or not x.dim() or x.shape[0] != found.rows():
        return x, None
    return x, 0


def _looked_at(
    found: Found, x: Tensor, place: int, how: tuple[int, int], dim: int | None
) -> Tensor | None:
    """New flags (rows, words) of ``x`` alone; None where it cannot hold a NaN."""
    if not (x.is_floating_point() or x.is_complex()):
        return None
    x, dim = _batched(found, x, dim)
    if dim is not None:
        return _engine.check(x, place, None, *how)
    one = _engine.check(x.unsqueeze(0), place, None, *how)
    return one.expand(found.rows(), one.shape[1])


def _join(found: Found, more: Tensor, key: int) -> None:
    flags = found.on(more.device)
    if flags is None:
        found.put(more.contiguous())
    elif _is_compiling() or _transforms_run():
        found.put(_engine.merge((flags, more), key))
    else:
        _engine.merge_(flags, more, key)
