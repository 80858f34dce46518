"""The picture of a report: samples from left to right, locations from top to bottom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opguard._pictures import label, new_figure, shows_itself
from opguard.flags._reporting_text import COLOURS
from opguard.flags.codes import ErrorCode, Severity
from opguard.flags.constants import CODE_BITS, CODE_MASK, CODE_SHIFT
from opguard.flags.errors import FlagsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from opguard.flags._reporting_found import Errors

__all__ = ["draw"]

_ROW, _MOST, _LEAST = 0.26, 12.0, 1.6  # inches: of a row, of the picture's height
_NAME, _CODES = 60, 3  # letters of a name, of which the end says more; codes beside it


def _new_axes(rows: int) -> Axes:
    """Axes of a figure of its own."""
    height = min(_MOST, max(_LEAST, 0.9 + _ROW * rows))
    figure = new_figure(9, height, "flags.plot", "print flags.report(f)")
    return shows_itself(figure.add_subplot(), figure)


def _row_name(name: str, codes: list[int]) -> str:
    shown = ", ".join(map(ErrorCode.name, codes[:_CODES]))
    more = f" +{len(codes) - _CODES}" if len(codes) > _CODES else ""
    return f"{label(name, _NAME)}  {shown}{more}"


def draw(errors: Errors, axes: Axes | None) -> Axes:
    """Draws the worst severity of each sample at each location; only locations with errors.

    What is narrower than two pixels is joined with its neighbours, and the worst of them is shown:
    one bad sample of a hundred thousand stays visible.
    """
    import numpy as np

    places, row = np.unique(errors.location, return_inverse=True)
    if axes is None:
        axes = _new_axes(places.size)
    elif not hasattr(axes, "imshow"):
        raise FlagsError(
            f"flags.plot(ax=...): expected matplotlib Axes, got {type(axes).__qualname__}; leave it"
            " out for a picture of its own"
        )
    box = axes.get_window_extent()
    total, rows = max(errors.total, 1), max(places.size, 1)
    wide = -(-total // max(1, min(total, int(box.width) // 2)))  # samples a column
    high = -(-rows // max(1, min(rows, int(box.height) // 2)))
    worst = np.zeros((-(-rows // high), -(-total // wide)), np.uint8)
    np.maximum.at(worst, (row // high, errors.sample // wide), errors.severity.astype(np.uint8))
    _paint(axes, worst, (-0.5, worst.shape[1] * wide - 0.5, worst.shape[0] * high - 0.5, -0.5))
    axes.set_xlim(-0.5, total - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlabel(f"sample (of {errors.total})")
    axes.set_title(f"{errors.bad} of {errors.total} samples with errors", loc="left")
    found: dict[int, list[int]] = {}
    for pair in np.unique(errors.value >> CODE_SHIFT).tolist():
        found.setdefault(pair >> CODE_BITS, []).append(pair & CODE_MASK)
    _label(
        axes, [_row_name(errors.name(at), codes) for at, codes in found.items()], int(box.height)
    )
    return axes


def _paint(axes: Axes, worst: Any, extent: tuple[float, float, float, float]) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    colours = ["#f1f3f5", *(COLOURS[severity] for severity in (1, 2, 3))]
    axes.imshow(
        worst,
        cmap=ListedColormap(colours),
        vmin=-0.5,
        vmax=3.5,
        extent=extent,
        aspect="auto",
        interpolation="nearest",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    shown = [severity for severity in (3, 2, 1) if (worst == severity).any()]
    if shown:
        axes.legend(
            handles=[Patch(color=colours[each], label=Severity.name(each)) for each in shown],
            loc="lower right",
            bbox_to_anchor=(1, 1),
            ncols=len(shown),
            frameon=False,
        )


def _label(axes: Axes, names: list[str], pixels: int) -> None:
    """A name every row, or every few rows where they would overlap."""
    step = max(1, -(-len(names) * 13 // max(pixels, 1)))
    ticks = range(0, len(names), step)
    axes.set_yticks(list(ticks), [names[tick] for tick in ticks], fontsize=8)
