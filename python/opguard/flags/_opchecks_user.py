"""What users' own checks say: which samples failed, and the words with the first one's values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opguard.flags._opchecks_book import Book
from opguard.flags._opchecks_places import Place
from opguard.flags.codes import ErrorCode
from opguard.flags.errors import BatchMismatchError

__all__ = ["SITES", "Site", "place_name", "plain", "site_of", "tell"]

# Checks that were traced, by the number which their graphs have of them.
SITES: list[Site] = []


class Site:
    """A traced check: its message, and the values that were no tensors."""

    def __init__(self, message: str, names: tuple[str, ...], constants: dict[str, Any]) -> None:
        self.message = message
        self.names = names  # of the tensors, in order
        self.constants = constants

    def tell(self, book: Book, place: Place, pred: Tensor, tensors: Any) -> None:
        """Records what the graph said of it."""
        values = {**self.constants, **dict(zip(self.names, tensors, strict=True))}
        tell(book, place, pred, self.message, values)


def site_of(message: str, names: tuple[str, ...], constants: tuple[tuple[str, Any], ...]) -> int:
    """The number of a traced check; run once, while Dynamo traces."""
    SITES.append(Site(message, names, dict(constants)))
    return len(SITES) - 1


def place_name(message: str) -> str:
    """What stands for the op in a check's place."""
    return f'check "{message}"'


def plain(x: Any) -> Any:
    """What a tensor stands for where torch.func is at work; a batch of vmap's comes first."""
    inside: Any = torch._C._functorch
    try:
        while isinstance(x, Tensor) and inside.is_functorch_wrapped_tensor(x):
            dim = inside.maybe_get_bdim(x)
            x = inside.get_unwrapped(x)
            x = x.movedim(dim, 0) if dim > 0 else x
    except AttributeError:  # another torch calls them otherwise
        pass
    return x


def tell(book: Book, place: Place, pred: Any, message: str, values: dict[str, Any]) -> None:
    """Records the samples of which ``pred`` is False."""
    holds = torch.as_tensor(pred).detach()
    if holds.dim() > 1:
        holds = holds.flatten(1).all(1)
    bad = ~holds.to("cpu", torch.bool)
    if not bool(bad.any()):
        return
    samples = book.samples or 1
    first = int(bad.to(torch.uint8).argmax()) if bad.dim() else 0
    where = None
    if bad.dim() and samples > 1:
        if bad.shape[0] != samples:
            raise BatchMismatchError(
                f"check({message!r}): expected pred of shape ({samples},), one for each sample, or "
                f"(), got {tuple(bad.shape)}; reduce it to one value a sample"
            )
        where = bad.numpy()
    text = _filled(message, {name: _of(x, first, bad) for name, x in values.items()})
    book.add(ErrorCode.UNKNOWN, place, where, text)


def _of(value: Any, sample: int, bad: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if bad.dim() and value.dim() and value.shape[0] == bad.shape[0]:
        value = value[sample]
    if value.numel() == 1:
        number = value.item()
        return float(f"{number:.6g}") if isinstance(number, float) else number
    return value.tolist() if value.numel() <= 8 else f"tensor{tuple(value.shape)}"


def _filled(message: str, values: dict[str, Any]) -> str:
    try:
        return message.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError):
        return message
