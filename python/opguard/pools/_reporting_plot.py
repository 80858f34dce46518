"""The picture of a report: memory of each pool over time, a band a user, the budget as a line."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

from opguard._pictures import label, new_figure, shows_itself

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from opguard.pools._snapshots import PoolFigures, Snapshot

__all__ = ["draw"]

_MIB = 1 << 20
_NAME, _MOST = 40, 10  # letters of a name; users with a band of their own, the others share one
_COLOURS = (
    "#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#edc948",
    "#76b7b2", "#ff9da7", "#9c755f", "#86bcb6", "#d37295",
)  # fmt: skip
_OTHERS, _LINE, _BUDGET = "#ced4da", "#212529", "#a4133c"


class _Lines(NamedTuple):
    """One pool over time, each from one of ``times`` to the next: bytes used, and bytes by band."""

    times: list[float]
    used: list[int]
    bands: dict[str | None, list[int]]  # by user; None is all users without a band of their own


def _before(shot: Snapshot, pool: str) -> dict[str, int]:
    """What users had before the oldest event that is kept."""
    came_first: dict[str, bool] = {}
    for _at, name, user, held in shot.moves:
        if name == pool:
            came_first.setdefault(user, held > 0)
    # Who went before coming was there, and so was who is there and never moved.
    return {
        user.name: user.nbytes
        for user in shot.users
        if user.pool == pool and not came_first.get(user.name, user.state != "ready")
    }


def _largest(shot: Snapshot, pool: str, before: dict[str, int]) -> tuple[list[str], int]:
    """Who had the most bytes for the longest, in order of coming; and how many others there are."""
    level, since = dict(before), dict.fromkeys(before, 0.0)
    total: dict[str, float] = dict.fromkeys(before, 0.0)
    for at, name, user, nbytes in shot.moves:
        if name == pool:
            total[user] = total.get(user, 0.0) + level.get(user, 0) * (at - since.get(user, at))
            level[user], since[user] = nbytes, at
    for user, nbytes in level.items():
        total[user] += nbytes * (shot.seconds - since[user])
    order = [user for user in total if total[user] > 0]
    chosen = set(sorted(order, key=lambda user: -total[user])[:_MOST])
    return [user for user in order if user in chosen], len(order) - len(chosen)


def _lines(shot: Snapshot, pool: PoolFigures, users: list[str], level: dict[str, int]) -> _Lines:
    used = [(at, count) for at, name, count in shot.events if name == pool.name]
    moves: dict[float, list[tuple[str, int]]] = defaultdict(list)
    for at, name, user, nbytes in shot.moves:
        if name == pool.name:
            moves[at].append((user, nbytes))
    bands: dict[str | None, list[int]] = {user: [] for user in (*users, None)}
    everything = sum(level.values())
    end = max([shot.seconds, *(at for at, _ in used)])
    for at, count in [*used, (end, pool.used)]:
        for user, nbytes in moves.pop(at, ()):
            everything += nbytes - level.get(user, 0)
            level[user] = nbytes
        left, others = count, everything - sum(level.get(user, 0) for user in users)
        # Two threads may note their moves in another order than they made them: for that instant
        # the bands would add up to more than is used.
        for band, values in bands.items():
            values.append(min(left, others if band is None else level.get(band, 0)))
            left -= values[-1]
    return _Lines([*(at for at, _ in used), end], [*(n for _, n in used), pool.used], bands)


def _named(lines: _Lines, others: int) -> list[tuple[str, str, list[int]]]:
    """(label, colour, bytes over time) of each band that has any."""
    bands = [
        (f"{others} others", _OTHERS, values)
        if user is None
        else (label(user, _NAME), colour, values)
        for (user, values), colour in zip(lines.bands.items(), (*_COLOURS, _OTHERS), strict=False)
    ]
    return [band for band in bands if any(band[2])]


def _draw_pool(axes: Axes, shot: Snapshot, pool: PoolFigures) -> None:
    before = _before(shot, pool.name)
    users, others = _largest(shot, pool.name, before)
    lines = _lines(shot, pool, users, before)
    times, used, bands = lines.times, lines.used, _named(lines, others)
    mib: Any = [[value / _MIB for value in values] for _, _, values in bands]
    if bands:
        names, colours = [name for name, _, _ in bands], [colour for _, colour, _ in bands]
        axes.stackplot(times, mib, step="post", labels=names, colors=colours, linewidth=0)
    total = [value / _MIB for value in used]
    axes.step(times, total, where="post", color=_LINE, linewidth=1, label="used")
    budget = pool.budget / _MIB
    axes.axhline(budget, color=_BUDGET, linestyle="--", linewidth=1.5, label="budget")
    # A budget of all memory would flatten what happens far below it.
    top = max([*total, pool.peak / _MIB])
    axes.set_ylim(0, 1.1 * (budget if budget <= 20 * top else top) or 1)
    axes.set_xlim(times[0], times[-1] if times[-1] > times[0] else times[0] + 1)
    axes.set_ylabel("MiB")
    axes.set_xlabel("seconds since pools were set up")
    axes.set_title(f"{label(pool.name, _NAME)}: memory used", loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8, reverse=True)


def _chosen(shot: Snapshot, wanted: str | None) -> list[PoolFigures]:
    if wanted is None:
        moved = {name for _, name, _ in shot.events}
        return [pool for pool in shot.pools if pool.name in moved] or list(shot.pools[:1])
    found = [pool for pool in shot.pools if wanted in (pool.name, pool.name.partition(":")[0])]
    if not found:
        known = sorted(pool.name for pool in shot.pools)
        raise KeyError(f"expected one of the pools {known}, got {wanted!r}")
    return found[:1]


def draw(shot: Snapshot, axes: Axes | None, wanted: str | None) -> Axes:
    """Draws one pool into ``axes``, or each pool that was used into a figure of its own."""
    pools = _chosen(shot, wanted)
    if not pools:
        raise ValueError("expected a report of at least one pool to draw, there is none")
    if axes is not None:
        if not hasattr(axes, "stackplot"):
            raise TypeError(
                f"report().plot(ax=...): expected matplotlib Axes, got {type(axes).__qualname__};"
                " leave it out for a picture of its own"
            )
        _draw_pool(axes, shot, pools[0])
        return axes
    figure = new_figure(9, 2.8 * len(pools), "pools.report().plot", "print pools.report()")
    rows = figure.subplots(len(pools), squeeze=False)[:, 0]
    for each, pool in zip(rows, pools, strict=True):
        _draw_pool(each, shot, pool)
    return shows_itself(rows[0], figure)
