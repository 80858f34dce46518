"""Who is in the way, in words: by name, thread or task, and source line."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from opguard._loaded import loaded
from opguard._sizes import readable
from opguard.pools._places import is_ours, line_outside, name_of_thread, place
from opguard.pools.errors import Deadlock, LeaseTimeout, PoolRefused

if TYPE_CHECKING:
    from opguard.pools._books import Books
    from opguard.pools._requests import Ask

__all__ = ["holder_lines", "owner_name", "refusal", "timed_out"]

TOO_LARGE, DEADLOCK, BUSY, GONE = 2, 3, 4, 5


def holder_lines(management: Books, holders: Iterable[tuple[int, int, int]]) -> tuple[str, ...]:
    """One line for each (owner, unit, count)."""
    return tuple(_line(management, *holder) for holder in holders)


def _line(management: Books, owner: int, unit: int, count: int) -> str:
    if unit == 0:
        return f"{readable(count)} are reserved by {owner_name(management, owner)}"
    entry = management.entries.get(unit)
    name = entry.name if entry else f"unit {unit}"
    if owner == 0:
        trouble = entry and entry.stats.trouble
        return f"{name!r} is pinned, or would not go{f' ({trouble})' if trouble else ''}"
    who = management.owner(owner)
    thread = getattr(who, "thread", 0)
    task = getattr(who, "task", None)
    where = next(_places(who, unit), None) or _running_place(thread, task)
    times = f" {count} times" if count > 1 else ""
    since = f" since {where}" if where else ""
    return f"{owner_name(management, owner)} holds {name!r}{times}{since}"


def owner_name(management: Books, owner: int) -> str:
    who = management.owner(owner)
    thread, task = getattr(who, "thread", 0), getattr(who, "task", None)
    if task is not None:
        return f"task {task.get_name()}"
    name = name_of_thread(thread)
    if name is not None:
        return f"thread {name}"
    return f"a thread that ended ({thread})" if thread else "an owner that is gone"


def _places(who: Any, unit: int) -> Iterator[str]:
    """Lines of the ``with`` statements that hold it, the innermost first."""
    for units, code, line in who.held if who is not None else ():
        if unit not in units or code is None:
            continue
        if not is_ours(code):
            yield place(code, line)
        elif line_of := loaded("opguard.pools._stacks", "line_of"):  # a patch may have taken it
            block = line_of(who.thread, who.task)
            if block is not None:
                yield block


def _running_place(thread: int, task: Any) -> str | None:
    """Where the holder is now, for a call that notes no line: its innermost frame outside torch."""
    if task is not None:
        frames = task.get_stack(limit=1)
        return place(frames[-1].f_code, frames[-1].f_lineno) if frames else None
    return line_outside(sys._current_frames().get(thread))


def _wanted(ask: Ask) -> str:
    entries = [ask.management.entries.get(unit) for unit in ask.units]
    names = dict.fromkeys(repr(entry.name) for entry in entries if entry is not None)
    return ", ".join(names) or "memory"


def _stuck(ask: Ask) -> str:
    if not ask.stuck:
        return ""
    name, error = ask.stuck[-1]
    return f"; {name!r} could not be given back ({type(error).__name__}: {error})"


def refusal(ask: Ask) -> PoolRefused:
    """The exception for what the ledger refused."""
    answer = ask.answer
    lines = holder_lines(ask.management, answer.holders)
    figures = f"{readable(answer.need)} needed, {readable(answer.have)} can be had"
    held = f": {'; '.join(lines)}" if lines else ""
    wanted, stuck = _wanted(ask), _stuck(ask)
    error: PoolRefused
    if answer.verdict == DEADLOCK:
        error = Deadlock(
            f"waiting for {wanted} would never end, since those who hold what it needs wait for "
            f"this owner or its thread ({figures}){held}{stuck}; ask for all of it at once, give a "
            "lease up first, or, where who started this does not wait for it, ask with a timeout",
            lines,
        )
    elif answer.verdict == GONE:
        error = PoolRefused(
            f"{wanted} was freed, or is not managed any more: manage it again", lines
        )
    elif answer.verdict == BUSY:
        error = LeaseTimeout(
            f"{wanted} is not free now ({figures}){held}{stuck}; wait for it with a timeout above "
            "0, or have a holder let go",
            lines,
        )
    else:
        error = PoolRefused(
            f"{wanted} does not fit ({figures}{_budgets(ask.management)}){held}{stuck}; raise the "
            "budget, or take fewer at once",
            lines,
        )
    if ask.stuck:
        error.__cause__ = ask.stuck[-1][1]
    return error


def _budgets(management: Books) -> str:
    said = (f"{pool.name} {readable(pool.budget)}" for pool in management.pools.values())
    return f"; budgets: {', '.join(said)}"


def timed_out(ask: Ask) -> LeaseTimeout:
    """The exception for a wait that took too long, with who was in the way when it ended."""
    holders = ask.management.in_the_way(ask.units)
    lines = holder_lines(ask.management, holders)
    held = f": {'; '.join(lines)}" if lines else ""
    return LeaseTimeout(
        f"{_wanted(ask)} was not free within {ask.timeout} s{held}{_stuck(ask)}; wait longer, or "
        "have a holder let go",
        lines,
    )
