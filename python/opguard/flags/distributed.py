"""Flags of several processes as one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from opguard.flags import _engine
from opguard.flags._words import as_words
from opguard.flags.config import CARRIERS, get_config
from opguard.flags.errors import BatchMismatchError, FlagsError, FlagsLayoutError
from opguard.flags.guarded import GuardedTensor

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from opguard.flags.config import ErrorConfig

__all__ = ["dist_merge"]

_DTYPES = tuple(CARRIERS)


def dist_merge(
    flags: Tensor, group: ProcessGroup | None = None, config: ErrorConfig | None = None
) -> Tensor:
    """The flags (N, W) of all ranks of ``group`` merged in rank order, the same on every rank.

    Sample i of the result holds the errors of sample i of every rank, as ``err.merge`` of them
    would. For ranks that hold the same samples: tensor parallel, pipeline stages, ensembles. Every
    rank of the group has to call it; two collectives, the first of which the host waits for. Not
    for compiled code.

    Args:
        flags: of one shape and dtype on all ranks, on the kind of device the group talks over.
        group: None is the default group.
        config: how errors are kept, the same on all ranks; None is the current configuration.

    Raises:
        FlagsError: ranks differ in N (BatchMismatchError), in width, dtype or device
            (FlagsLayoutError), or in configuration; the same error on every rank.
        RuntimeError: there is no process group, or this process is not in it.
    """
    if isinstance(flags, GuardedTensor):
        return flags.with_flags(dist_merge(flags.flags, group, config))
    dist = _ready(group)
    key = (get_config() if config is None else config).key
    _agree(_tell_all(dist, _describe(flags, key), group))
    if flags.numel() == 0 or dist.get_world_size(group) == 1:
        return flags.clone()
    # As integers: no collective may take a word for a number.
    words = as_words(flags.detach().contiguous())
    parts = [torch.empty_like(words) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, words, group=group)
    return _engine.merge([part.view(flags.dtype) for part in parts], key)


def _ready(group: ProcessGroup | None) -> Any:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "expected a process group to merge flags over, there is none; call "
            "torch.distributed.init_process_group first"
        )
    if dist.get_rank(group) < 0:
        raise RuntimeError(
            "expected this process to be a rank of the group it merges flags over; call "
            "dist_merge on the group's ranks alone"
        )
    return dist


def _describe(flags: object, key: int) -> list[int]:
    """(is it flags, N, W, dtype, device, key): also of what is no flags, or the others wait."""
    if (
        not isinstance(flags, torch.Tensor)
        or flags.dim() != 2
        or flags.shape[1] == 0
        or flags.dtype not in _DTYPES
    ):
        return [0, 0, 0, 0, 0, key]
    device = ("cpu", "cuda").index(flags.device.type) if flags.device.type in ("cpu", "cuda") else 2
    return [1, *flags.shape, _DTYPES.index(flags.dtype), device, key]


def _tell_all(dist: Any, mine: list[int], group: ProcessGroup | None) -> list[list[int]]:
    """Every rank's description. Over the host where the group can, so that devices may differ."""
    backends = str(dist.get_backend_config(group))
    device = "cpu" if "gloo" in backends or "mpi" in backends else "cuda"
    told = torch.tensor(mine, dtype=torch.int64, device=device)
    parts = [torch.empty_like(told) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, told, group=group)
    return [part.tolist() for part in parts]


def _said(rank: int, one: list[int]) -> str:
    dtype = str(_DTYPES[one[3]]).removeprefix("torch.")
    device = ("the CPU", "CUDA", "another device")[one[4]]
    return f"({one[1]}, {one[2]}) of {dtype} on {device} from rank {rank}"


def _agree(all_ranks: list[list[int]]) -> None:
    first = all_ranks[0]
    for rank, one in enumerate(all_ranks):
        if not one[0]:
            raise FlagsLayoutError(
                "expected flags (N, W) of int64, int32, float64 or float32 from every rank, rank "
                f"{rank} gave something else"
            )
    for rank, one in enumerate(all_ranks):
        if one[1:5] != first[1:5]:
            only_samples = one[2:5] == first[2:5]
            raise (BatchMismatchError if only_samples else FlagsLayoutError)(
                f"expected flags of one shape, dtype and device from every rank, got "
                f"{_said(0, first)} and {_said(rank, one)}; make them with one batch size and one "
                "configuration"
            )
        if one[5] != first[5]:
            raise FlagsError(
                f"expected one configuration on every rank, ranks 0 and {rank} differ; pass "
                "dist_merge the same config"
            )
