"""Smoke."""

import pytest


@pytest.mark.smoke
def test_import():
    import opguard

    assert opguard.__version__
