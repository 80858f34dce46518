"""Which commits are on an object now, and who may change that.

One record an object, shared by all its proxies: the applied stack, the blocks that are open, and
the one owner (a thread, or a task of asyncio) whose blocks they are. Only the owner changes the
stack. The record lives while a proxy lives or a commit is on the object, so that what is applied
is never forgotten.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from uuid import uuid4

from opguard.pools._turns import Owner, Turn, current_owner, locked
from opguard.pools._undoing import Snapshot, through
from opguard.pools.commits import CommitABC
from opguard.pools.errors import PatchFailed

__all__ = [
    "Entry",
    "PatchedObject",
    "has_record",
    "later",
    "line_of",
    "on_forget",
    "record_of",
    "run_later",
]

_records: dict[int, PatchedObject] = {}
_orphans: deque[PatchedObject] = deque()
# What a record is held for while nobody's patches are taken back.
_OURS = object()
_identities: dict[int, tuple[weakref.ref[Any], str]] = {}


# Called with an object whose last proxy died, once all is taken back.
on_forget: list[Callable[[Any], None]] = []


class _Pending(threading.local):
    calls: list[Callable[[], None]] | None = None


_pending = _Pending()


def later(call: Callable[[], None]) -> None:
    """Calls after the change of a stack that is under way, or now: what may raise, as warnings."""
    if _pending.calls is None:
        call()
    else:
        _pending.calls.append(call)


def run_later() -> None:
    """Makes the calls that were put off."""
    calls, _pending.calls = _pending.calls, None
    for call in calls or ():
        call()


def line_of(thread: int, task: Any) -> str | None:
    """Where this thread or task opened its innermost block, for messages."""
    key = Owner(thread, task).key
    entries = (e for record in tuple(_records.values()) for e in reversed(record.entries))
    return next((entry.line for entry in entries if entry.owner.key == key), None)


def has_record(obj: Any) -> bool:
    """Whether some proxy of the object lives."""
    return id(obj) in _records


class Entry:
    """One open block: the stack it wants on the object, and where it was opened."""

    __slots__ = ("lease", "line", "owner", "stack")

    def __init__(self, owner: Owner, stack: tuple[CommitABC, ...], line: str) -> None:
        self.owner, self.stack, self.line = owner, stack, line
        self.lease: Any = None


class _Applied:
    """A commit on the object, or several that were made into one."""

    __slots__ = ("commits", "unit")

    def __init__(self, commits: tuple[CommitABC, ...], unit: CommitABC) -> None:
        self.commits, self.unit = commits, unit

    def __str__(self) -> str:
        return " + ".join(map(repr, self.commits))

    def failed(self, verb: str, obj: Any, error: Exception) -> PatchFailed:
        if isinstance(error, PatchFailed) and error.patch is not None:
            return error
        patch = self.commits[0] if len(self.commits) == 1 else self.commits
        return PatchFailed(
            f"{self} could not be {verb} {type(obj).__name__}, which is as it was before: "
            f"{type(error).__name__}: {error}",
            patch,
        )


class PatchedObject(Turn):
    """The record of one object."""

    def __init__(self, obj: Any) -> None:
        super().__init__()
        self.obj = obj
        self.identity = _identity(obj)
        self.applied: list[_Applied] = []
        self.resting: tuple[CommitABC, ...] = ()
        self.entries: list[Entry] = []
        self.proxies = 0
        # Whether a block went without having been left, or not wholly.
        self.behind = False

    @property
    def stack(self) -> tuple[CommitABC, ...]:
        """The commits that are on the object now, bottom first."""
        return tuple(commit for applied in self.applied for commit in applied.commits)

    def described(self) -> str:
        """What is held, for messages."""
        return f"the patches of {type(self.obj).__name__}"

    def holders(self) -> tuple[str, ...]:
        """One line for each open block."""
        return tuple(f"{e.owner} has {self.described()} since {e.line}" for e in self.entries)

    def on_free(self) -> None:
        """The last to hold it may have outlived all proxies."""
        if self.behind or not self.proxies:
            _orphans.append(self)

    @property
    def wanted(self) -> tuple[CommitABC, ...]:
        """What should be on the object: the innermost block's stack, or that of no block."""
        entries = tuple(self.entries)
        return entries[-1].stack if entries else self.resting if self.proxies else ()

    def lose(self, entries: Sequence[Entry]) -> None:
        """Under the lock: a proxy died inside these blocks of its, so nobody will leave them."""
        self.proxies -= 1
        for entry in entries:
            if entry in self.entries:
                self.entries.remove(entry)
                self.behind = True
            self._release_locked(entry)

    # -- blocks ---------------------------------------------------------------------------------

    def open(self, entry: Entry) -> None:
        """Puts the entry's stack on the object; the owner must hold it."""
        self.entries.append(entry)
        try:
            self.rebase(entry.stack)
        except BaseException:
            self.entries.remove(entry)
            raise

    def close(self, entry: Entry) -> None:
        """Puts the stack of the innermost block that is left on the object."""
        if entry in self.entries:
            self.entries.remove(entry)
        try:
            self.rebase(self.wanted)
        except Exception:
            raise
        except BaseException:  # interrupted: whoever lets go of it next goes on
            self.behind = True
            raise
        self._settle()

    def rest(self, stack: tuple[CommitABC, ...]) -> None:
        """Makes this the stack outside of all blocks."""
        before, self.resting = self.resting, stack
        if not self.entries:
            try:
                self.rebase(stack)
            except BaseException:
                self.resting = before
                raise
        self._settle()

    def _settle(self) -> None:
        """Outside of all blocks what is applied holds nothing in memory."""
        if not self.entries:
            for applied in self.applied:
                applied.unit.settle(self.obj)

    # -- the stack ------------------------------------------------------------------------------

    def rebase(self, target: Sequence[CommitABC]) -> None:
        """Makes ``target`` the applied stack: what both begin with stays, the rest is exchanged.

        Raises:
            PatchFailed: a commit raised; the object has the stack it had before.
        """
        if _pending.calls is None:
            _pending.calls = []
        same = self._common(target)
        before = list(self.applied)
        try:
            while len(self.applied) > same:
                self._revert_top()
            for applied in _grouped(target[len(self.stack) :]):
                self._apply(applied)
        except BaseException as error:
            self._go_back(before, error)
            _pending.calls = None
            raise

    def _common(self, target: Sequence[CommitABC]) -> int:
        """How many of the applied units the target begins with."""
        at = 0
        for index, applied in enumerate(self.applied):
            wanted = target[at : at + len(applied.commits)]
            if [c.uuid for c in wanted] != [c.uuid for c in applied.commits]:
                return index
            at += len(applied.commits)
        return len(self.applied)

    def _apply(self, applied: _Applied) -> None:
        self._change(applied, applied.unit.apply, self.applied.append, "applied to")

    def _revert_top(self) -> None:
        applied = self.applied[-1]
        self._change(applied, applied.unit.revert, self.applied.remove, "taken back from")

    def _change(
        self,
        applied: _Applied,
        change: Callable[[Any], None],
        note: Callable[[_Applied], None],
        verb: str,
    ) -> None:
        """Makes a change and notes it: both or neither, wherever it is interrupted."""
        unit, was = applied.unit, applied in self.applied
        snapshot = None if unit.undoes_itself else Snapshot(self.obj)
        kept = unit._recalled(self.obj)
        try:
            change(self.obj)
            note(applied)
        except BaseException as error:
            if (applied in self.applied) is was:
                try:
                    self._undo(applied, snapshot, kept)
                except KeyboardInterrupt:
                    through(partial(self._undo, applied, snapshot, kept))
                    raise
            if isinstance(error, Exception):
                failed = applied.failed(verb, self.obj, error)
                raise failed from (error if failed is not error else error.__cause__)
            raise

    def _undo(self, applied: _Applied, snapshot: Snapshot | None, kept: Any) -> None:
        """After a change that was not noted; one that undid itself may also be complete."""
        unit = applied.unit
        if snapshot is not None:
            snapshot.restore()
            unit._remember(self.obj, kept)
        elif kept is None and unit._recalled(self.obj) is not None:
            unit.revert(self.obj)
        elif kept is None:
            unit._remember(self.obj, None)
        elif kept is not None and unit._recalled(self.obj) is None:
            self.applied[:] = [other for other in self.applied if other is not applied]
            unit._remember(self.obj, None)

    def _go_back(self, before: list[_Applied], error: BaseException) -> None:
        """After a failure: makes the applied stack what it was, as far as that can be done."""
        same = 0
        for mine, its in zip(self.applied, before, strict=False):
            if mine is not its:
                break
            same += 1
        try:
            while len(self.applied) > same:
                self._revert_top()
            for applied in before[same:]:
                self._apply(applied)
        except Exception as second:
            now = ", ".join(map(str, self.applied)) or "no commit"
            error.add_note(f"nor could what was there be put back, it has {now} now: {second}")

    def give_up(self, commit: CommitABC) -> None:
        """Strikes a commit that cannot be taken back: its change stays on the object for good."""
        for index, applied in enumerate(self.applied):
            if any(c.uuid == commit.uuid for c in applied.commits):
                applied.unit.release_revert_resource(self.obj)
                del self.applied[index]
                gone = {c.uuid for c in applied.commits}
                self.resting = tuple(c for c in self.resting if c.uuid not in gone)
                return
        raise ValueError(f"{commit!r} is not applied to this {type(self.obj).__name__}")


def _grouped(commits: Sequence[CommitABC]) -> list[_Applied]:
    """Runs of commits that can be made into one, as one; each other by itself."""
    runs: list[list[CommitABC]] = []
    for commit in commits:
        key = commit.squash_key
        if runs and key is not None and runs[-1][0].squash_key == key:
            runs[-1].append(commit)
        else:
            runs.append([commit])
    return [_Applied(tuple(r), r[0] if len(r) == 1 else _Squashed(r)) for r in runs]


class _Squashed(CommitABC):
    """Several commits as the one they make; made when it is applied, so that failing is named."""

    def __init__(self, commits: Sequence[CommitABC]) -> None:
        self._commits = list(commits)
        self._made: CommitABC | None = None

    @property
    def undoes_itself(self) -> bool:  # type: ignore[override]
        made = self._made or self._commits[0]
        return made.undoes_itself

    def _recalled(self, obj: Any) -> Any:
        return None if self._made is None else self._made._recalled(obj)

    def _remember(self, obj: Any, kept: Any) -> None:
        if self._made is not None:
            self._made._remember(obj, kept)

    def apply(self, obj: Any) -> None:
        if self._made is None:
            self._made = self._commits[0].squash(self._commits)
        self._made.apply(obj)

    def revert(self, obj: Any) -> None:
        if self._made is not None:
            self._made.revert(obj)

    def settle(self, obj: Any) -> None:
        if self._made is not None:
            self._made.settle(obj)

    def release_revert_resource(self, obj: Any) -> None:
        if self._made is not None:
            self._made.release_revert_resource(obj)


# -- finding records ----------------------------------------------------------------------------


def _identity(obj: Any) -> str:
    """What this object is known by as long as it lives, whether or not it has a record."""
    known = _identities.get(id(obj))
    if known is not None and known[0]() is obj:
        return known[1]
    made = uuid4().hex
    key = id(obj)
    try:
        ref = weakref.ref(obj, lambda _: _identities.pop(key, None))
    except TypeError:  # a dict, a list: as long as it has a proxy
        return made
    _identities[key] = (ref, made)
    return made


def record_of(obj: Any, proxy: Any) -> PatchedObject:
    """The record of ``obj``, which ``proxy`` keeps as long as it lives."""
    with locked.lock:
        record = _records.get(id(obj))
        if record is None:
            record = _records[id(obj)] = PatchedObject(obj)
        record.proxies += 1
    locked.after()
    weakref.finalize(proxy, _proxy_died, record, proxy._begun).atexit = False
    return record


_deaths: deque[tuple[PatchedObject, list[Entry]]] = deque()


def _proxy_died(record: PatchedObject, entries: list[Entry]) -> None:
    _deaths.append((record, entries))
    _look_after_orphans()


def _look_after_orphans() -> None:
    """Counts proxies that died, and takes back what nobody is left to take back."""
    while _deaths or _orphans:
        taken: list[PatchedObject] = []
        try:
            record = _next_orphan(taken)
            if record is None and (_deaths or _orphans):
                return  # whoever holds the lock comes here after it
            if record is not None:
                _take_back(record)
        except KeyboardInterrupt:  # whoever comes next goes on
            with locked.lock:
                for record in taken:
                    record._release_locked(_OURS)
            raise


def _next_orphan(taken: list[PatchedObject]) -> PatchedObject | None:
    """One that has what nobody is left to take back, held by this thread now."""
    if locked.lock._is_owned():  # this runs in a finalizer
        return None
    held: list[bool] = []  # an interrupt may come right after the lock was taken
    try:
        held.extend(map(locked.lock.acquire, (False,)))
        if not held[0]:
            return None
        while _deaths:
            dead, entries = _deaths.popleft()
            dead.lose(entries)
            _orphans.append(dead)
        while _orphans:
            record, owner = _orphans.popleft(), current_owner()
            # Whoever has a block on it will leave that; here only between two changes of ours.
            ours = record.owner is not None and record.owner.is_same(owner)
            if record._holds and (not ours or _pending.calls is not None):
                continue
            if record.behind or not (record._holds or record.proxies):
                taken.append(record)
                record.owner = owner if record.owner is None else record.owner
                record._holds.append(_OURS)
                return record
        return None
    finally:
        if held and held[0]:
            locked.lock.release()


def _take_back(record: PatchedObject) -> None:
    """The object gets what it should have; the record goes where nobody has a proxy of it."""
    gone = False
    try:
        record.behind = False
        if not record.proxies:
            record.resting = ()
        record.rebase(record.wanted)
        record._settle()
        gone = True
    finally:
        with locked.lock:
            record._holds.remove(_OURS)
            gone = gone and not (record.proxies or record._waiters or record._holds)
            gone = gone and _records.get(id(record.obj)) is record
            if not record._holds:
                record.owner = None
            if gone:
                del _records[id(record.obj)]
            elif record._waiters and not record._holds:
                record._pass_on()
    if gone:
        for forget in on_forget:
            forget(record.obj)
    run_later()


def _after_fork() -> None:
    """In a child: the other threads are gone, with their blocks; what is applied stays noted."""
    locked.renew()
    for record in _records.values():
        had = record.owner
        record.forked()
        if had is not record.owner:
            record.entries.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
locked.after = _look_after_orphans
