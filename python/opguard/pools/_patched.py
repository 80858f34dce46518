"""Pointing a module's parameters at patched tensors, and back.

A patched tensor is always computed from the base with every patch below it, so it does not depend
on what was applied before, and taking a patch back is pointing back: bit-exact. The parameters stay
the same objects, and nothing is written into the base.
"""

from __future__ import annotations

import threading
import warnings
from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from opguard.pools import _lora_math, _managed, _stacks
from opguard.pools._arenas import Chunk, put_chunk, rounded, take_chunk
from opguard.pools._forks import ForkLock
from opguard.pools._parameters import groups_of, is_at, point_all, tensors_of
from opguard.pools._undoing import through
from opguard.pools._views import version_of
from opguard.pools.commits import CommitABC
from opguard.pools.errors import PatchFailed

__all__ = ["Delta", "DeltaCommit", "PatchedWeightsChanged"]

_TILE = 1 << 18
_WIDE = (torch.float32, torch.float64, torch.complex64, torch.complex128)


class Delta(Protocol):
    """What one commit adds to one tensor.

    Called without autograd as ``delta(source, out)``: writes ``source + what it adds`` to ``out``.
    Both have the shape of the parameter, one dtype (float32 where the parameter's is narrower, else
    its own), its device and any strides; ``out`` may be ``source``. Called again for the same base
    it must write the same bits. A delta must not keep either of them.

    A delta may also have ``rows(start, stop) -> Delta`` for these rows of dimension 0 alone: narrow
    dtypes are then computed in pieces that stay in the cache.
    """

    def __call__(self, source: Tensor, out: Tensor) -> None: ...


class PatchedWeightsChanged(UserWarning):
    """Patched weights were written to while the patch was applied.

    Taking the patch back puts the base there again, bit by bit; what was written is kept here.

    Attributes:
        tensors: the patched weights as they were left, by name.
    """

    def __init__(self, message: str, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(message)
        self.tensors = dict(tensors)


class DeltaCommit(CommitABC):
    """A commit that adds to parameters: says what, never writes into them.

    ``apply`` and ``revert`` are done here; several on one stack are computed as one. Where weights
    are written to under the patch, taking it back warns with `PatchedWeightsChanged`, which has
    them. Seen is what moves the parameter's version; ``.data.add_`` and NumPy do not.

    Raises, when applied:
        TypeError: a parameter that cannot be pointed at a patched tensor: quantized, sparse, on
            the meta device, of integers.
        ValueError: a parameter whose memory others share in part, or that is held by a live
            autograd graph, whose backward would read the patched weights.
    """

    undoes_itself = True
    squash_key: Hashable | None = "opguard.deltas"

    @abstractmethod
    def deltas(self, obj: Any) -> Mapping[Tensor, Delta]:
        """What is added to each parameter object of ``obj``; tied weights are one key.

        Raises what it likes where it cannot: nothing has been changed by then.
        """

    def apply(self, obj: Any) -> None:
        """Points the parameters at patched tensors."""
        with torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
            deltas = self.deltas(obj)
            leases = _managed.lease_owners(deltas)
            if leases is not None:
                undo.callback(leases.close)
            chunks = _chunks(obj, deltas, leases is not None)
            undo.callback(_free, obj, chunks)
            with _lock.here:
                patch = _Patch(obj, chunks)
                undo.callback(through, patch.take_back)
                patch.put_on(deltas)
            self._keep(obj, patch)
            patch.rest, patch.leases = undo.pop_all(), leases or ExitStack()

    def revert(self, obj: Any) -> None:
        """Points the parameters back."""
        patch: _Patch = self._kept_for(obj)
        try:
            if not patch.taken_back:
                with _lock.here, torch.inference_mode(False), torch.no_grad():
                    patch.take_back()
        finally:
            if patch.taken_back:
                patch.rest.close()
                self._forget(obj)

    def _recalled(self, obj: Any) -> Any:
        kept = super()._recalled(obj)
        return None if kept is None or getattr(kept[1], "taken_back", False) else kept

    def _remember(self, obj: Any, kept: Any) -> None:
        gone = None if kept is not None else super()._recalled(obj)
        super()._remember(obj, kept)
        if gone is not None and isinstance(gone[1], _Patch):
            gone[1].rest.close()

    def settle(self, obj: Any) -> None:
        """The patch stays, outside of all blocks: what it patched need not stay in memory."""
        patch: _Patch = self._kept_for(obj)
        patch.park()

    def squash(self, commits: Sequence[CommitABC]) -> CommitABC:
        """All of them as one: each weight is computed and rounded once."""
        return _Together(commits)


class _Together(DeltaCommit):
    def __init__(self, commits: Sequence[CommitABC]) -> None:
        self._commits = commits

    def deltas(self, obj: Any) -> Mapping[Tensor, Delta]:
        found: dict[Tensor, list[Delta]] = {}
        for commit in self._commits:
            assert isinstance(commit, DeltaCommit)
            try:
                deltas = commit.deltas(obj)
            except Exception as error:
                raise PatchFailed(
                    f"{commit!r} could not be applied to {type(obj).__name__}, which is as it was "
                    f"before: {type(error).__name__}: {error}",
                    commit,
                ) from error
            for parameter, delta in deltas.items():
                found.setdefault(parameter, []).append(delta)
        return {p: d[0] if len(d) == 1 else _Chain(d) for p, d in found.items()}


class _Chain:
    """Several deltas of one parameter, one after the other."""

    def __init__(self, deltas: Sequence[Delta]) -> None:
        self.deltas = list(deltas)

    def __call__(self, source: Tensor, out: Tensor) -> None:
        for delta in self.deltas:
            delta(source, out)
            source = out


# --- what is patched now --------------------------------------------------------------------------

# Computing is under the lock: a parameter may belong to several objects that are patched at a time.
_lock = ForkLock(threading.RLock)
_states: dict[int, _State] = {}


def is_patched(parameter: Tensor) -> bool:
    """Whether a patch says where the parameter points."""
    return id(parameter) in _states


class _Level:
    """What one patch made of one weight; ``tensor`` is None while the weight is not in memory."""

    __slots__ = ("changed", "delta", "patch", "tensor", "versions")

    def __init__(self, patch: _Patch, delta: Delta, tensor: Tensor) -> None:
        self.patch, self.delta = patch, delta
        self.tensor: Tensor | None = tensor
        self.versions: list[int | None] = []
        self.changed = False


class _State:
    """A weight while it is patched: the parameters that are this memory, and its levels."""

    __slots__ = ("base", "levels", "parameters")

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.base: Tensor | None = parameters[0].data
        self.levels: list[_Level] = []

    def has(self, patch: _Patch) -> bool:
        return any(level.patch is patch for level in self.levels)

    def level_of(self, patch: _Patch) -> int:
        return next(i for i, level in enumerate(self.levels) if level.patch is patch)

    def below(self, at: int) -> Tensor | None:
        """Where the parameters point without the levels from ``at`` on; None: not in memory."""
        here = (level.tensor for level in reversed(self.levels[:at]) if level.tensor is not None)
        return next(here, self.base)

    @property
    def top(self) -> Tensor | None:
        return self.below(len(self.levels))

    def note(self) -> None:
        """Remembers whether the top was written to, before something is put on it."""
        if self.levels and self.levels[-1].tensor is not None:
            self.levels[-1].changed |= self.versions() != self.levels[-1].versions

    def versions(self) -> list[int | None]:
        return [version_of(parameter) for parameter in self.parameters]

    def moves(self, at: int) -> tuple[list[_Move], dict[int, Tensor]]:
        """To point from level ``at``, the top, to what is below; and what was written there."""
        level, below = self.levels[at], self.below(at)
        if level.tensor is None or below is None:
            return [], {}
        found = {}
        # No versions: it was interrupted on its way there.
        known = zip(self.parameters, level.versions, strict=True) if level.versions else ()
        for parameter, version in known:
            if is_at(parameter, below):  # by a taking back that was interrupted
                continue
            moved = not is_at(parameter, level.tensor)
            if moved or level.changed or version_of(parameter) != version:
                found[id(parameter)] = parameter.data
        return [(parameter, parameter.data, below) for parameter in self.parameters], found


_Move = tuple[Tensor, Tensor, Tensor]


class _Patch:
    """What one commit did to one object: the weights it patched, and their memory.

    While the object only has the patch on it, outside of all blocks, a managed module may go: its
    patched weights go with it, and are computed again when it comes back (``park``).
    """

    def __init__(self, obj: Any, chunks: dict[torch.device, Chunk]) -> None:
        self.obj, self.chunks = obj, chunks
        self.taken_back = False
        self.parked: _managed.Parking | None = None
        self.rest = self.leases = ExitStack()
        self.states: list[_State] = []

    def put_on(self, deltas: Mapping[Tensor, Delta]) -> None:
        """Computes the patched weights and points there; all of them or none."""
        groups = groups_of(self.obj, deltas)
        _refuse_moved(self.obj, deltas)
        self.states = [_states.get(id(group[0])) or _State(group) for group in groups]
        levels = []
        moves: list[_Move] = []
        for state, delta in zip(self.states, deltas.values(), strict=True):
            level, more = self._computed(state, len(state.levels), delta)
            levels.append(level)
            moves += more
        # On the list first: wherever this ends, `take_back` points back what points there.
        for state, level in zip(self.states, levels, strict=True):
            state.note()
            _states.update((id(parameter), state) for parameter in state.parameters)
            state.levels.append(level)
        point_all(moves)
        for state, level in zip(self.states, levels, strict=True):
            level.versions = state.versions()

    def _computed(self, state: _State, at: int, delta: Delta) -> tuple[_Level, list[_Move]]:
        base = state.base
        assert base is not None, "what is patched is in memory"
        tensor = self.chunks[base.device].cut(base)
        _compute(base, [*(level.delta for level in state.levels[:at]), delta], tensor)
        moves = [(parameter, parameter.data, tensor) for parameter in state.parameters]
        return _Level(self, delta, tensor), moves

    def take_back(self) -> None:
        """Points back; what was written to the patched weights meanwhile is reported."""
        if self.taken_back:
            return
        moves: list[_Move] = []
        anew: list[tuple[Tensor, Tensor]] = []
        changed: dict[int, Tensor] = {}
        for state in self.states:
            if not state.has(self):  # struck before an interrupt
                continue
            at = state.level_of(self)
            if at + 1 < len(state.levels):
                anew += _without(state, at)
            else:
                more, found = state.moves(at)
                moves += more
                changed.update(found)
        try:
            self._point(moves, changed)
            for tensor, values in anew:
                tensor.copy_(values)
            self._strike()
        except BaseException as error:
            if isinstance(error, Exception) or not all(is_at(p, there) for p, _, there in moves):
                raise
            self._strike()  # interrupted after all of them were pointed back
            self.states, self.taken_back = [], True
            raise
        self.states, self.taken_back = [], True

    def _strike(self) -> None:
        """Its levels are gone from the weights' states. Interrupted, it may be called again."""
        for state in self.states:
            state.levels = [level for level in state.levels if level.patch is not self]
            if state.levels:
                state.levels[-1].versions = state.versions()
            else:
                for parameter in state.parameters:
                    _states.pop(id(parameter), None)

    def _point(self, moves: list[_Move], changed: dict[int, Tensor]) -> None:
        names = {id(tensor): name for name, tensor in tensors_of(self.obj)} if changed else {}
        point_all(moves)
        if changed:
            _report(self.obj, {names.get(key, "?"): value for key, value in changed.items()})

    # --- while the module is away ---

    def park(self) -> None:
        """Lets the module go; its patched weights then count as its own."""
        if self.parked is None and not self.taken_back and len(self.chunks) == 1:
            (chunk,) = self.chunks.values()
            self.parked = _managed.park(self, [state.parameters for state in self.states], chunk)
            if self.parked is not None:
                self.leases.close()
                self.rest.callback(self.parked.leave)

    def give_back(self) -> None:
        """The module goes: parameters point at the base, and the patched weights are dropped."""
        with _lock.here, torch.inference_mode(False), torch.no_grad():
            moves: list[_Move] = []
            changed: dict[int, Tensor] = {}
            for state in self.states:
                more, found = state.moves(state.level_of(self))
                moves += more
                changed.update(found)
            self._point(moves, changed)
            for state in self.states:
                state.levels[state.level_of(self)].tensor = None
                if all(level.tensor is None for level in state.levels):
                    state.base = None
            for chunk in self.chunks.values():
                chunk.give_back()

    def bring_in(self) -> None:
        """The module is back: computes its patched weights again, from the base as it is now."""
        if self.taken_back:
            return
        with _lock.here, torch.inference_mode(False), torch.no_grad():
            for chunk in self.chunks.values():
                chunk.reset()
                chunk.bring_in()
            moves: list[_Move] = []
            levels = []
            for state in self.states:
                if state.base is None:
                    state.base = state.parameters[0].data
                at = state.level_of(self)
                if state.levels[at].tensor is None:
                    level, more = self._computed(state, at, state.levels[at].delta)
                    moves += more
                    levels.append((state, at, level))
            point_all(moves)
            for state, at, level in levels:
                level.versions = state.versions()
                state.levels[at] = level


def _chunks(obj: Any, deltas: Mapping[Tensor, Delta], counted: bool) -> dict[torch.device, Chunk]:
    """Memory for the patched tensors, one chunk a device."""
    needs: dict[torch.device, int] = {}
    for parameter in deltas:
        if isinstance(parameter, Tensor):
            nbytes = rounded(parameter.numel() * parameter.element_size())
            needs[parameter.device] = needs.get(parameter.device, 0) + nbytes
    chunks: dict[torch.device, Chunk] = {}
    try:
        for device, nbytes in needs.items():
            chunks[device] = take_chunk(obj, nbytes, device, counted)
    except BaseException:
        _free(obj, chunks)
        raise
    return chunks


def _free(obj: Any, chunks: dict[torch.device, Chunk]) -> None:
    for chunk in chunks.values():
        put_chunk(obj, chunk)


def _without(state: _State, at: int) -> list[tuple[Tensor, Tensor]]:
    """The levels above one that goes, and their values without it."""
    below = [level.delta for level in state.levels[:at]]
    found = []
    for level in state.levels[at + 1 :]:
        below.append(level.delta)
        if level.tensor is not None and state.base is not None:
            values = torch.empty_like(level.tensor)
            _compute(state.base, below, values)
            found.append((level.tensor, values))
    return found


def _report(obj: Any, tensors: dict[str, Tensor]) -> None:
    warning = PatchedWeightsChanged(
        f"expected nobody to write to the patched weights of {type(obj).__name__}, and "
        f"{', '.join(sorted(tensors)[:3])} changed: the base is back as it was, and what was "
        "written is in this warning's tensors; leave the block before changing weights",
        tensors,
    )
    _stacks.later(partial(warnings.warn, warning, stacklevel=4))


# --- computing -----------------------------------------------------------------------


def _compute(base: Tensor, deltas: Sequence[Delta], out: Tensor) -> None:
    """``out`` = the base and all deltas, in float32 or wider, rounded once."""
    flat = [part for delta in deltas for part in getattr(delta, "deltas", [delta])]
    product = _lora_math.together(base, flat, out)
    if product is not None:
        product(base, out)
    elif base.dtype in _WIDE:
        source = base
        for delta in flat:
            delta(source, out)
            source = out
    else:
        _compute_narrow(base, flat, out)
    if (
        base.dtype is torch.float16
        and not bool(out.isfinite().all())
        and bool(base.isfinite().all())
    ):
        raise OverflowError(
            f"expected patched weights of shape {tuple(base.shape)} to fit float16, and some are "
            "above 65504: use bfloat16 weights, or a smaller scale"
        )


def _compute_narrow(base: Tensor, deltas: Sequence[Delta], out: Tensor) -> None:
    """The same for dtypes narrower than float32, by way of it."""
    by_rows = base.dim() > 0 and all(hasattr(delta, "rows") for delta in deltas)
    rows = base.shape[0] if base.dim() else 1
    step = max(1, _TILE * rows // max(base.numel(), 1)) if by_rows else rows
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        whole = step >= rows
        wide = (base if whole else base[start:stop]).to(torch.float32)
        for delta in deltas:
            # Callers that check hasattr above know it has rows.
            (delta if whole else delta.rows(start, stop))(wide, wide)  # type: ignore[attr-defined]
        (out if whole else out[start:stop]).copy_(wide)


def _refuse_moved(obj: Any, deltas: Mapping[Tensor, Delta]) -> None:
    for parameter in deltas:
        state = _states.get(id(parameter))
        top = None if state is None else state.top
        if top is not None and not is_at(parameter, top):
            names = {id(tensor): name for name, tensor in tensors_of(obj)}
            raise ValueError(
                f"expected {names.get(id(parameter))} where the patch below points it, and it was "
                "moved or converted meanwhile: leave that block first"
            )
