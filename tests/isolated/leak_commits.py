"""Whether commits leak: blocks kept per entered proxy, failed patch and dead proxy, by slope."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping

import torch
from slope import report
from torch import Tensor, nn

from opguard.pools import AttributeCommit, CommitObjectProxy, DeltaCommit, ForwardHookCommit
from opguard.pools.errors import PatchFailed

MODEL = nn.Linear(4, 4).requires_grad_(False)


def double(source: Tensor, out: Tensor) -> None:
    torch.mul(source, 2, out=out)


class Doubles(DeltaCommit):
    def deltas(self, obj: nn.Module) -> Mapping[Tensor, object]:
        return dict.fromkeys(obj.parameters(), double)


class Fails(DeltaCommit):
    def deltas(self, obj: nn.Module) -> Mapping[Tensor, object]:
        raise LookupError(obj)


STACK = [Doubles(), AttributeCommit("note", 1), ForwardHookCommit(lambda *_: None), Doubles()]
KEPT = CommitObjectProxy(MODEL, STACK)


def blocks() -> None:
    with KEPT, CommitObjectProxy(MODEL, STACK[:1]), CommitObjectProxy(MODEL):
        MODEL(torch.ones(1, 4))


def fresh() -> None:
    model = nn.Linear(4, 4).requires_grad_(False)
    with CommitObjectProxy(model, STACK):
        pass
    CommitObjectProxy(model, [Doubles()]).apply_commit_stack()


def failing() -> None:
    with contextlib.suppress(PatchFailed), KEPT.clone_and_add_commit(Fails()):
        pass


if __name__ == "__main__":
    sys.exit(report(30, 130, blocks, fresh, failing))
