"""What people pass, looked at where they pass it: later nobody could say whose mistake it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from math import isnan
from operator import index
from typing import Any

from opguard.pools._budgets import parse_bytes

__all__ = [
    "check_folder",
    "check_name",
    "check_priority",
    "check_timeout",
    "checked_options",
]

LARGEST = (1 << 63) - 1


def check_timeout(timeout: Any) -> None:
    """TypeError or ValueError where that is no number of seconds. Less than 0 is none to wait."""
    if timeout is None:
        return
    wanted = "expected timeout in seconds, None for as long as it takes or 0 for not at all, got "
    if isinstance(timeout, bool | str) or not hasattr(timeout, "__float__"):
        raise TypeError(f"{wanted}{timeout!r:.80}")
    try:
        seconds = float(timeout)
    except OverflowError:
        raise ValueError(f"{wanted}a larger number than there are seconds") from None
    if isnan(seconds):
        raise ValueError(f"{wanted}{timeout!r:.80}")


def check_name(name: Any) -> None:
    """TypeError where that is no text."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"expected the name of what is managed as text, got {name!r:.80}")


def check_priority(priority: Any) -> int | None:
    """The priority as an int, None as it is.

    Raises:
        TypeError, ValueError: it is none of 64 bits.
    """
    if priority is None:
        return None
    try:
        number = index(priority)
    except TypeError:
        raise TypeError(f"expected priority as an int, got {priority!r:.80}") from None
    if not -LARGEST <= number <= LARGEST:
        raise ValueError("expected priority to be an int of 64 bits, got a larger one")
    return number


def check_folder(spill_dir: Any) -> None:
    """TypeError or ValueError where that is no path; None is the default's."""
    wanted = "expected spill_dir as the path of a folder, got "
    text = spill_dir.__fspath__() if isinstance(spill_dir, os.PathLike) else spill_dir
    if text is not None and not isinstance(text, str):
        raise TypeError(f"{wanted}{spill_dir!r:.80}")
    if text == "":
        raise ValueError(f"{wanted}''; '.' is the working directory, None the default")


def _flag(value: Any, name: str) -> bool:
    if not hasattr(value, "__bool__") or value not in (0, 1):
        raise TypeError(f"{name}: expected True or False, got {value!r:.80}")
    return bool(value)


def _inference(value: Any, _: str) -> Any:
    if callable(value):
        return value
    return parse_bytes(value, what="inference, the memory of a call,")


def _verify(value: Any, _: str) -> Any:
    if value != "bytes":
        raise ValueError(f"expected verify to be None or 'bytes', got {value!r:.80}")
    return value


def _as_it_is(value: Any, _: str) -> Any:
    return value


_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "pin": _flag,
    "inference": _inference,
    "trust_files": _flag,
    "stream": _flag,
    "verify": _verify,
}


def checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of ``manage``'s options that are named, as what they are.

    Raises:
        TypeError, ValueError: one is something else.
    """
    check_name(options.get("name"))
    check_priority(options.get("priority"))
    named = {key: value for key, value in options.items() if value is not None}
    return {key: _CHECKS.get(key, _as_it_is)(value, key) for key, value in named.items()}
