"""What looks like a secret, by its name or as a text: it is written into no file of opguard's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["HIDDEN", "SECRET_TEXT", "is_secret", "masked"]

SECRET_NAME = re.compile(
    r"token|.*(?:hf|api|access|auth|bearer|refresh|secret|session)_?token"
    r"|.*(?:password|passwd|secret|api_?key|access_?key|private_?key|authorization|credentials?)",
    re.IGNORECASE,
)
SECRET_TEXT = re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|AKIA)[A-Za-z0-9_-]{16,}")
HIDDEN = "***"


def masked(text: str) -> str:
    """Returns ``text`` without what looks like an access token."""
    return SECRET_TEXT.sub(HIDDEN, text)


def is_secret(name: object, value: Any) -> bool:
    """Whether the name says that the value is a secret, and the value can be one: it has text.

    A tensor named ``token`` is none.
    """
    return isinstance(name, str) and bool(SECRET_NAME.fullmatch(name)) and _has_text(value)


def _has_text(value: Any, depth: int = 0) -> bool:
    if isinstance(value, str | bytes | bytearray):
        return True
    if depth > 8 or not isinstance(value, list | tuple | set | frozenset | Mapping):
        return False
    inner = value.values() if isinstance(value, Mapping) else value
    return any(_has_text(each, depth + 1) for each in inner)
