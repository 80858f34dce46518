"""dist_merge on the ranks of a gloo group: ``python flags_ranks.py SIZE FILE``.

Forks a process a rank, so that torch is imported once. Each compares what it got with the merge of
what all ranks have; the status is the number of ranks that failed.
"""

from __future__ import annotations

import os
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from opguard.flags import AccumulationConfig, Dedupe, ErrorConfig, Order, Priority, dist_merge, err
from opguard.flags.errors import BatchMismatchError, FlagsError, FlagsLayoutError

CARRIERS = (torch.int64, torch.int32, torch.float64, torch.float32)
POLICIES = (
    AccumulationConfig(),
    AccumulationConfig(Priority.SEVERITY, Order.LAST, Dedupe.NONE),
    AccumulationConfig(Priority.CHRONO, Order.LAST, Dedupe.CODE),
)


def flags_of(rank: int, config: ErrorConfig) -> torch.Tensor:
    """Sample i has an error of every rank that i's bits name, and one that all have."""
    f = err.new_t(16, config=config)
    mine = torch.arange(16) >> rank & 1 == 1
    f = err.push(f, 1 + rank, 10 + rank, config=config, where=mine)
    return err.push(f, err.UNKNOWN, 510 + rank % 2, config=config, where=torch.arange(16) > 8)


def same_everywhere(rank: int, size: int) -> None:
    for carrier in CARRIERS:
        for policy in POLICIES:
            config = ErrorConfig(num_slots=3, flag_dtype=carrier, accumulation=policy)
            mine = flags_of(rank, config)
            kept = mine.clone()
            got = dist_merge(mine, config=config)
            wanted = err.merge(*(flags_of(r, config) for r in range(size)), config=config)
            assert got.dtype == carrier
            assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))
            assert torch.equal(mine.view(torch.uint8), kept.view(torch.uint8))
    across = flags_of(rank, ErrorConfig()).t().contiguous().t()
    assert torch.equal(
        dist_merge(across), err.merge(*(flags_of(r, ErrorConfig()) for r in range(size)))
    )


def refused(kind: type[Exception], said: str, flags: object, config: ErrorConfig | None) -> None:
    try:
        dist_merge(flags, config=config)
    except kind as error:
        assert said in str(error), error
    else:
        raise AssertionError(f"expected {kind.__name__}: {said}")


def unequal_is_one_error_on_every_rank(rank: int) -> None:
    odd = rank == 2
    refused(BatchMismatchError, "from rank 2", err.new_t(5 if odd else 4), None)
    wide = ErrorConfig(num_slots=32 if odd else 16)
    refused(FlagsLayoutError, "(4, 8) of int64", err.new_t(4, config=wide), ErrorConfig())
    floats = ErrorConfig(num_slots=16, flag_dtype=torch.float64 if odd else torch.int64)
    refused(FlagsLayoutError, "float64", err.new_t(4, config=floats), ErrorConfig())
    refused(FlagsLayoutError, "rank 2 gave", None if odd else err.new_t(4), None)
    refused(FlagsLayoutError, "rank 2 gave", torch.zeros(4) if odd else err.new_t(4), None)
    other = ErrorConfig(num_slots=16, accumulation=POLICIES[1 if odd else 0])
    refused(FlagsError, "ranks 0 and 2 differ", err.new_t(4), other)


def groups(rank: int, size: int) -> None:
    pair = dist.new_group([1, 3])
    alone = [dist.new_group([r]) for r in range(size)]
    mine = flags_of(rank, ErrorConfig())
    if rank in (1, 3):
        both = [flags_of(r, ErrorConfig()) for r in (1, 3)]
        assert torch.equal(dist_merge(mine, pair), err.merge(*both))
    else:
        refused_here = False
        try:
            dist_merge(mine, pair)
        except RuntimeError as error:
            refused_here = "rank of the group" in str(error)
        assert refused_here
    assert torch.equal(dist_merge(mine, alone[rank]), mine)


def work(rank: int, size: int, meeting: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    same_everywhere(rank, size)
    unequal_is_one_error_on_every_rank(rank)
    groups(rank, size)
    assert dist_merge(err.new_t(0)).shape == (0, 4)
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    torch.set_num_threads(1)
    children = []
    for rank in range(int(sys.argv[1])):
        child = os.fork()
        if child == 0:
            try:
                work(rank, int(sys.argv[1]), sys.argv[2])
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


sys.exit(main())
