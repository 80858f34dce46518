"""Proxies: an object with a stack of commits on it for the time of a block.

    fast = CommitObjectProxy(unet).clone_and_add_commit(LoraCommit("style.safetensors"))
    with fast as unet:      # applied
        unet(x)
                            # taken back

All proxies of one object share what is applied to it: entering another one takes back only what
its stack does not begin with. Blocks nest; a block that is left gives the block around it its own
stack back. One thread, or one task of asyncio, has an object's blocks at a time; others wait.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch

from opguard.pools import _managed, _stacks
from opguard.pools._arguments import check_timeout
from opguard.pools._places import line_outside
from opguard.pools._turns import current_owner
from opguard.pools._undoing import through
from opguard.pools.commits import CallableCommit, CommitABC
from opguard.pools.users import ResourcePoolUser, register_user

__all__ = ["AutoManageCommitObjectProxy", "CommitObjectProxy"]

T = TypeVar("T")
_Self = TypeVar("_Self", bound="CommitObjectProxy[Any]")


class CommitObjectProxy(Generic[T]):
    """An object and the commits that it has inside ``with``.

    Args:
        base: any object. The proxy keeps it alive and never copies it: what is patched is the
            object itself, for the time of the block, which ends at the latest with the proxy.
        commits: bottom first; each at most once.
        timeout: seconds to wait for another thread's or task's block on the same object; None
            waits as long as it takes, 0 refuses at once.

    Raises, when entered or left:
        PatchFailed: a commit raised. The object has what it had before, and the commit is named;
            when leaving, the patches stay until another block on any proxy of the object is
            entered or left, which tries again, or ``give_up``.
        LeaseTimeout, Deadlock: another thread or task has the object.
    """

    def __init__(
        self, base: T, commits: Iterable[CommitABC] = (), *, timeout: float | None = None
    ) -> None:
        if isinstance(base, CommitObjectProxy):
            raise TypeError(
                "expected the object itself, got a proxy of it: use proxy.clone(), or proxy.base"
            )
        check_timeout(timeout)
        if isinstance(commits, type) or not isinstance(commits, Iterable):
            raise TypeError(
                f"expected commits as a list, got {commits!r:.80}; write [commit] for one"
            )
        self._commits = _checked(tuple(commits))
        self.timeout = timeout
        self._entries: list[_stacks.Entry] = []
        # These too, and those on their way in or out: what is left of them goes with the proxy.
        self._begun: list[_stacks.Entry] = []
        self._record = _stacks.record_of(base, self)

    # -- what it is -----------------------------------------------------------------------------

    @property
    def base(self) -> T:
        """The object, with whatever is applied to it now."""
        base: T = self._record.obj
        return base

    @property
    def commits(self) -> tuple[CommitABC, ...]:
        """This proxy's stack, bottom first."""
        return self._commits

    @property
    def applied(self) -> tuple[CommitABC, ...]:
        """What is on the object now, by whichever proxy, bottom first."""
        return self._record.stack

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for the same object with the same commits in the same order: for caches.

        The object's part is made when first asked for and never used again for another object.
        """
        return (self._record.identity, *(commit.uuid for commit in self._commits))

    def clone(self: _Self) -> _Self:
        """Another proxy of the same object, with the same stack and settings."""
        return self._with(self._commits)

    def clone_and_add_commit(self: _Self, *commits: CommitABC) -> _Self:
        """Another proxy of the same object, with these commits on top."""
        return self._with((*self._commits, *commits))

    def clone_and_add_callable_commit(self: _Self, fn: Callable[[T], Callable[[], Any]]) -> _Self:
        """The same with ``CallableCommit(fn)``: ``fn(obj)`` returns what takes its change back."""
        return self._with((*self._commits, CallableCommit(fn)))

    def _with(self: _Self, commits: tuple[CommitABC, ...]) -> _Self:
        return type(self)(self.base, commits, timeout=self.timeout)

    def __repr__(self) -> str:
        on = ", ".join(map(repr, self._commits)) or "no commits"
        return f"<{type(self).__name__} of {type(self.base).__name__}: {on}>"

    # -- blocks ---------------------------------------------------------------------------------

    def __enter__(self) -> T:
        entry = self._entry()
        try:
            self._record.acquire(entry.owner, self.timeout, entry)
            entry.lease = self._lease()
            if entry.lease is not None:
                entry.lease.__enter__()
            self._opened(entry)
            _stacks.run_later()
            return self.base
        except BaseException:
            self._left(entry)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closed(error)

    async def __aenter__(self) -> T:
        entry = self._entry()
        try:
            await self._record.acquire_async(entry.owner, self.timeout, entry)
            entry.lease = self._lease()
            if entry.lease is not None:
                await entry.lease.__aenter__()
            self._opened(entry)
            _stacks.run_later()
            return self.base
        except BaseException:
            self._left(entry)
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closed(error)

    def _entry(self) -> _stacks.Entry:
        line = line_outside(sys._getframe()) or "somewhere"
        entry = _stacks.Entry(current_owner(), self._commits, line)
        self._begun.append(entry)
        return entry

    def _lease(self) -> Any:
        """What holds a managed object in memory for a block, not entered; None for others."""
        return _managed.block_lease(self.base, self.timeout)

    def _opened(self, entry: _stacks.Entry) -> None:
        with _managed.waiting(self.timeout):
            self._record.open(entry)
        self._entries.append(entry)

    def _left(self, entry: _stacks.Entry) -> None:
        """Gives back what entering took, however far it came."""
        try:  # at once: no interrupt comes before
            self._leave(entry)
        except KeyboardInterrupt:
            through(partial(self._leave, entry))
            raise

    def _leave(self, entry: _stacks.Entry) -> None:
        try:
            if entry in self._entries:
                self._entries.remove(entry)
            if entry in self._record.entries:  # interrupted before it was closed
                self._record.close(entry)
        finally:
            self._let_go(entry)

    def _let_go(self, entry: _stacks.Entry) -> None:
        try:
            if entry.lease is not None and entry.lease.entered:
                entry.lease.__exit__(None, None, None)
        finally:
            self._record.release(entry)
        if entry in self._begun:
            self._begun.remove(entry)

    def _closed(self, error: BaseException | None) -> None:
        if not self._entries:
            raise RuntimeError(f"{self!r} is left without having been entered")
        entry = self._entries[-1]
        try:
            with _managed.waiting(self.timeout):
                self._record.close(entry)
        except Exception as failed:
            if error is None or isinstance(error, Exception):
                raise
            error.add_note(str(failed))  # an interrupt must arrive as one
        finally:
            self._left(entry)
        _stacks.run_later()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the object with the commits on it."""
        with self as obj:
            return obj(*args, **kwargs)  # type: ignore[operator]

    # -- without a block ------------------------------------------------------------------------

    def apply_commit_stack(self) -> T:
        """Puts the stack on the object until ``revert_commit_stack`` or another proxy's call.

        Also when all proxies of the object are gone it is taken back. Blocks go before it, and
        give it back when they are left.
        """
        return self._rest(self._commits)

    def revert_commit_stack(self) -> T:
        """Takes back what ``apply_commit_stack`` of any proxy of the object has put there."""
        return self._rest(())

    def _rest(self, stack: tuple[CommitABC, ...]) -> T:
        hold = object()
        try:
            self._record.acquire(current_owner(), self.timeout, hold)
            with _managed.waiting(self.timeout):
                self._record.rest(stack)
        finally:
            self._record.release(hold)
        _stacks.run_later()
        return self.base

    def give_up(self, commit: CommitABC) -> None:
        """Strikes an applied commit that cannot be taken back; its change stays for good.

        Commits that were made into one with it are struck too.
        """
        hold = object()
        try:
            self._record.acquire(current_owner(), self.timeout, hold)
            self._record.give_up(commit)
        finally:
            self._record.release(hold)


class AutoManageCommitObjectProxy(CommitObjectProxy[T]):
    """A proxy whose object is managed: in memory from entry to exit, and free to go after it.

    Any proxy of an object that is managed does that; this one has it managed.

    Args:
        base: what ``manage`` takes; or a handle.
        commits: bottom first.
        timeout: seconds to wait, for other blocks and for bytes.
        options: of ``manage``, as ``priority`` and ``pin``.

    Attributes:
        am: the handle.
    """

    def __init__(
        self,
        base: T,
        commits: Iterable[CommitABC] = (),
        *,
        timeout: float | None = None,
        **options: Any,
    ) -> None:
        from opguard.pools.wrappers import manage

        if isinstance(base, CommitObjectProxy):
            raise TypeError(
                "expected the object itself, got a proxy of it: use proxy.clone(), or proxy.base"
            )
        self.am = manage(base, **options)
        super().__init__(self.am.obj, commits, timeout=timeout)

    def _lease(self) -> Any:
        return self.am.lease(self.timeout)


class _ProxyUser(ResourcePoolUser):
    """A proxy that is managed: its bytes are its object's."""

    def __init__(self, proxy: CommitObjectProxy[Any], *, management: Any = None) -> None:
        from opguard.pools.wrappers import AutoManageWrapper

        super().__init__(proxy)
        self._handle = AutoManageWrapper(proxy.base, management)

    def needs(self) -> Mapping[str, int]:
        return {}

    def bring_in(self) -> int:
        return 0

    def give_back(self) -> int:
        return 0

    @property
    def execution_device(self) -> torch.device:
        return self._handle.get_execution_device()

    @property
    def members(self) -> tuple[Any, ...]:
        """Whose bytes it uses."""
        return (self._handle.entry,)

    def seat(self, own: Any) -> Any:
        """A lease on the proxy is one on its object."""
        del own
        return self._handle.seat

    def change(self, **options: Any) -> None:
        """Options of a managed proxy are its object's."""
        self._handle.user.change(**options)

    def describe(self) -> str:
        return "patched"


register_user(CommitObjectProxy, _ProxyUser)


def _checked(commits: tuple[CommitABC, ...]) -> tuple[CommitABC, ...]:
    seen: set[str] = set()
    for commit in commits:
        if not isinstance(commit, CommitABC):
            raise TypeError(
                f"expected commits, got {type(commit).__name__}: subclass CommitABC, or use "
                "clone_and_add_callable_commit(fn)"
            )
        if commit.uuid in seen:
            raise ValueError(
                f"{commit!r} is in this stack twice: make a second commit that does the same"
            )
        seen.add(commit.uuid)
    return commits
