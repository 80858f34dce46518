"""Two paths that change places in one step."""

from __future__ import annotations

import os

import pytest


def test_exchange_paths(C, tmp_path):
    first, second = tmp_path / "first", tmp_path / "sécond"
    first.mkdir()
    (first / "a").write_text("1")
    second.mkdir()
    C.exchange_paths(first, os.fsencode(second))
    assert not (first / "a").exists()
    assert (second / "a").read_text() == "1"
    with pytest.raises(FileNotFoundError) as caught:
        C.exchange_paths(first, tmp_path / "none")
    assert caught.value.filename == os.fsencode(tmp_path / "none").decode()
    for wrong in ((1, "x"), ("x", 1), ("x",), ("a\0b", "x")):
        with pytest.raises((TypeError, ValueError)):
            C.exchange_paths(*wrong)
