"""Guarded PyTorch inference."""

from opguard import _runtime as _runtime

__version__ = "0.1.0"
