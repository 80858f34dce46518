"""Who goes first when bytes are needed: names of policies, and what a user's own policy is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

__all__ = ["Candidate", "Policy", "check_policy"]

NAMES = ("lru", "cost")


class Candidate(NamedTuple):
    """One user in one pool, as a policy sees it.

    Attributes:
        name: what it is called in reports.
        pool: name of the pool.
        device: of the pool.
        nbytes: bytes it holds there.
        priority: as given to ``manage``; a higher one goes later whatever the policy says.
        uses: leases so far.
        last_use: the ledger's count of requests when it was used last; higher is later.
        cost: what its user says that bringing it in costs.
    """

    name: str
    pool: str
    device: torch.device
    nbytes: int
    priority: int
    uses: int
    last_use: int
    cost: float


Policy = str | Callable[[Candidate], float]


def check_policy(policy: Policy) -> Policy:
    """The policy, or a sentence why it is none.

    ``"lru"``: longest unused first. ``"cost"``: use count times cost by byte, ageing; keeps what is
    used often. A callable is given a `Candidate` and returns a number, lowest goes first; it is
    called without any lock, and never asked about what is in use or pinned.
    """
    if callable(policy) or policy in NAMES:
        return policy
    raise ValueError(f"expected a policy of {NAMES} or a callable, got {policy!r}")
