"""What looks like a secret, by its name or as a text: it is written into no file of opguard's."""

from __future__ import annotations

import re

__all__ = ["HIDDEN", "SECRET_NAME", "SECRET_TEXT", "masked"]

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
