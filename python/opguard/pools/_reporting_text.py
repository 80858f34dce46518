"""A report of pools as text for a terminal or a log, and as tables for a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from opguard._sizes import readable
from opguard._tables import html_table, one_line, text_table

if TYPE_CHECKING:
    from opguard.pools._snapshots import PoolFigures, Snapshot, UserFigures

__all__ = ["as_html", "as_text"]

_POOL_HEADS = ("pool", "device", "used", "budget", "peak", "there", "managed")
_POOL_RIGHT = range(2, 7)
_USER_HEADS = (
    "user", "pool", "tier", "state", "size", "leases", "hits", "misses", "evicted",
    "moved in", "written back", "waited", "loading",
)  # fmt: skip
_USER_RIGHT = range(4, 13)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def seconds(value: float) -> str:
    """``"0"``, ``"850 us"``, ``"12 ms"``, ``"3.4 s"``."""
    if value <= 0:
        return "0"
    if value < 1e-3:
        return f"{value * 1e6:.0f} us"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"


def _head(shot: Snapshot) -> str:
    there = sum(user.state != "absent" for user in shot.users)
    hits = sum(user.hits for user in shot.users)
    misses = sum(user.misses for user in shot.users)
    moved = sum(user.bytes_in for user in shot.users)
    return (
        f"{there} of {_plural(len(shot.users), 'user')} in memory, policy {shot.policy}:"
        f" {_plural(hits, 'hit')}, {misses} {'miss' if misses == 1 else 'misses'},"
        f" {readable(moved)} moved in, {_plural(len(shot.waiting), 'request')} waiting"
    )


def _pool_row(pool: PoolFigures, users: Sequence[UserFigures]) -> tuple[str, ...]:
    own = [user for user in users if user.pool == pool.name]
    there = sum(user.state != "absent" for user in own)
    sizes = (readable(size) for size in (pool.used, pool.budget, pool.peak))
    return (pool.name, pool.device, *sizes, str(there), str(len(own)))


def _user_row(user: UserFigures) -> tuple[str, ...]:
    state = user.state + (", pinned" if user.pinned else "")
    state += f", priority {user.priority}" if user.priority else ""
    counts = (user.leases, user.hits, user.misses, user.evictions)
    return (
        user.name,
        user.pool,
        user.tier,
        state,
        readable(user.nbytes),
        *map(str, counts),
        readable(user.bytes_in),
        readable(user.bytes_written_back),
        seconds(user.seconds_waited),
        seconds(user.seconds_loading),
    )


def _notes(shot: Snapshot) -> Iterator[str]:
    """Who holds what, who waits for what, and what would not go; a line each."""
    for user in shot.users:
        yield from user.holders
    for place, request in enumerate(shot.waiting, 1):
        wants = ", ".join(map(repr, request.wants)) or "memory"
        yield f"waiting, number {place}: {request.owner} wants {wants} ({readable(request.nbytes)})"
    for user in shot.users:
        if user.trouble:
            yield f"{user.name!r} would not go: {user.trouble}"
        if user.astray:
            count, first = len(user.astray), user.astray[0]
            yield f"{user.name!r} has {count} other weights than it was managed with, as {first!r}"


def _shown(shot: Snapshot, rows: int) -> tuple[list[UserFigures], int]:
    """Those who are in memory first; and how many are left out."""
    users = sorted(shot.users, key=lambda user: user.state == "absent")
    return users[:rows], max(0, len(users) - rows)


def as_text(shot: Snapshot, rows: int) -> str:
    """A line of sums, the pools, at most ``rows`` users, and as many notes."""
    users, more = _shown(shot, rows)
    lines = [one_line(_head(shot))]
    if shot.pools:
        pools = [_pool_row(pool, shot.users) for pool in shot.pools]
        lines += text_table(_POOL_HEADS, pools, right=_POOL_RIGHT)
    if users:
        lines += ["", *text_table(_USER_HEADS, list(map(_user_row, users)), right=_USER_RIGHT)]
    if more:
        lines.append(f"  ... and {more} more")
    notes = list(map(one_line, _notes(shot)))
    lines += ["", *notes[:rows]] if notes[:rows] else []
    if len(notes) > rows:
        lines.append(f"... and {len(notes) - rows} more")
    return "\n".join(lines)


def _marked(row: Sequence[str]) -> list[str]:
    name, *others = (escape(one_line(cell)) for cell in row)
    return [f"<code>{name}</code>", *others]


def as_html(shot: Snapshot, rows: int) -> str:
    """The same as HTML tables. All text is escaped; no script, no style sheet."""
    users, more = _shown(shot, rows)
    parts = [f"<div><b>{escape(one_line(_head(shot)))}</b>"]
    if shot.pools:
        pools = [_marked(_pool_row(pool, shot.users)) for pool in shot.pools]
        parts.append(html_table(_POOL_HEADS, pools, right=_POOL_RIGHT))
    if users:
        table = [_marked(_user_row(user)) for user in users]
        parts.append(html_table(_USER_HEADS, table, right=_USER_RIGHT))
    if more:
        parts.append(f"... and {more} more")
    notes = list(_notes(shot))
    parts += [f"<br>{escape(one_line(note))}" for note in notes[:rows]]
    if len(notes) > rows:
        parts.append(f"<br>... and {len(notes) - rows} more")
    return "".join([*parts, "</div>"])
