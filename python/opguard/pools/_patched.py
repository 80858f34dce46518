"""Pointing a module's parameters at patched tensors, and back.

A patched tensor is always computed from the base with every patch of the stack, so it does not
depend on what was applied before, and taking a patch back is pointing back: bit-exact.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any, Protocol

from torch import Tensor

from opguard.pools.commits import CommitABC

__all__ = ["Delta", "DeltaCommit"]


class Delta(Protocol):
    """What one commit adds to one tensor.

    Called without autograd as ``delta(source, out)``: writes ``source + what it adds`` to ``out``.
    Both have the shape of the parameter, one dtype (float32 where the parameter's is narrower, else
    its own), its device and any strides; ``out`` may be ``source``. Called again for the same base
    it must write the same bits. A delta must not keep either of them.

    A delta may also have ``rows(start, stop) -> Delta`` for these rows of dimension 0 alone: narrow
    dtypes are then computed in pieces that stay in the cache.
    """

    def __call__(self, source: Tensor, out: Tensor) -> None: ...


class DeltaCommit(CommitABC):
    """A commit that adds to parameters: says what, never writes into them.

    ``apply`` and ``revert`` are done here; several on one stack are computed as one.
    """

    undoes_itself = True
    squash_key: Hashable | None = "opguard.deltas"

    @abstractmethod
    def deltas(self, obj: Any) -> Mapping[Tensor, Delta]:
        """What is added to each parameter object of ``obj``; tied weights are one key.

        Raises what it likes where it cannot: nothing has been changed by then.
        """

    def apply(self, obj: Any) -> None:
        """Points the parameters at patched tensors."""
        raise NotImplementedError

    def revert(self, obj: Any) -> None:
        """Points the parameters back."""
        raise NotImplementedError
