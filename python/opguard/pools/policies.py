"""Who goes first when bytes are needed: names of policies, and what a user's own policy is told."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import NamedTuple

import torch

__all__ = ["Candidate", "Policy", "check_policy", "name_of_policy", "rank_of"]

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
    called without any lock, and never asked about what is in use or pinned. What it raises reaches
    whoever asks for bytes; where bytes are only given back, what it said before counts.
    """
    if callable(policy) or policy in NAMES:
        return policy
    raise ValueError(f"expected a policy of {NAMES} or a callable, got {policy!r}")


def name_of_policy(policy: Policy) -> str:
    """``"lru"``, or what a callable is called."""
    if isinstance(policy, str):
        return policy
    name = getattr(policy, "__name__", None)
    return name if isinstance(name, str) else type(policy).__name__


def rank_of(policy: Callable[[Candidate], float], candidate: Candidate) -> float:
    """What a user's policy says of a candidate.

    Raises:
        TypeError: it is no finite number.
    """
    value = policy(candidate)
    try:
        rank = float(value)
    except (TypeError, ValueError, OverflowError):
        rank = float("nan")
    if not isfinite(rank):
        raise TypeError(
            f"expected the policy {name_of_policy(policy)} to answer {candidate.name!r} with a "
            f"finite number, got {value!r:.80}"
        )
    return rank
