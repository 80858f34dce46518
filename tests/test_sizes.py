"""Numbers of bytes in words."""

from __future__ import annotations

import pytest

from opguard._sizes import readable


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (-1536, "-1.5 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (12 * (1 << 20) + (1 << 19), "12.5 MiB"),
        (1 << 30, "1.0 GiB"),
        (3 << 50, "3072.0 TiB"),
    ],
)
def test_a_size_has_the_unit_that_keeps_it_short(nbytes, text):
    assert readable(nbytes) == text
