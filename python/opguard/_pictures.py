"""Figures that pyplot never hears of, so that nothing is left to be closed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from opguard._tables import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["label", "new_figure", "shows_itself"]


def new_figure(width: float, height: float, what: str, instead: str) -> Figure:
    """An empty figure of that many inches.

    Raises:
        ImportError: matplotlib is not installed; names ``what`` needs it and what to do instead.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{what}: expected matplotlib to draw with, it is not installed; run: python -m pip"
            f" install matplotlib, or {instead}"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Figure) -> bytes:
    import io

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    return buffer.getvalue()


def shows_itself(axes: Axes, figure: Figure) -> Axes:
    """Jupyter shows figures of pyplot only; asked for a picture, these axes give their figure's."""
    axes._repr_png_ = functools.partial(_png, figure)  # type: ignore[attr-defined]
    return axes


def label(name: str, most: int) -> str:
    """A user's name as text in a picture: at most ``most`` letters, of which the end says more."""
    name = name if len(name) <= most else "..." + name[3 - most :]
    name = f" {name}" if name.startswith("_") else name  # else a legend leaves it out
    return one_line(name).replace("$", r"\$")  # a dollar sign would begin mathematics
