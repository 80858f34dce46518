"""Holds flags that travel against the data itself, for any op: who changes whom.

Every guarded row has a flag of its own. A row of the input is poisoned, the op runs on plain data,
and each output row that differs then must carry that row's flag.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from opguard.flags import ErrorCode, ErrorConfig, GuardedTensor
from opguard.flags import constants as k

CONFIG = ErrorConfig(num_slots=64)
LONGEST = 24  # more rows than this are too many flags for one merged row
LOOKED_AT = 40  # sample calls of an op, among which a few are taken
POISONED = 3  # rows of each tensor that are poisoned


def all_ops() -> list[Any]:
    """Every entry of torch's OpInfo database that runs on CPU floats."""
    before = dict(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db

    # Importing torch's test tools changes the process for every test after: undone.
    os.environ.clear()
    os.environ.update(before)
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    assert not torch.backends.flags_frozen()
    return [
        op
        for op in op_db
        if torch.float32 in op.supported_dtypes("cpu") and not op.name.startswith("jiterator")
    ]


def name_of(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


def flags_for(rows: int, base: int) -> Tensor:
    """(rows, 16) int64: row i holds one NaN found at location base + i."""
    slots = torch.arange(base, base + rows) << k.LOCATION_SHIFT
    flags = torch.zeros(rows, 16, dtype=torch.int64)
    flags[:, 0] = slots | int(ErrorCode.NAN) << k.CODE_SHIFT | 3
    return flags


def locations(flags: Tensor) -> list[set[int]]:
    """The locations that each row of flags names."""
    shifts = torch.arange(4) * k.SLOT_BITS
    slots = (flags.unsqueeze(-1) >> shifts & k.SLOT_MASK).flatten(1)
    return [{slot >> k.LOCATION_SHIFT for slot in row if slot} for row in slots.tolist()]


@dataclass
class Sample:
    """One call: its leaves, the guarded ones with their first location and their batch dim."""

    run: Callable[[list[Any]], Any]
    leaves: list[Any]
    lapack: bool = False  # may crash where it is given a NaN, and rounds anew at each run
    guarded: dict[int, tuple[int, int]] = field(default_factory=dict)

    def plain(self, leaves: list[Any] | None = None) -> Any:
        torch.default_generator.manual_seed(7)
        return self.run([_own(leaf) for leaf in (self.leaves if leaves is None else leaves)])

    def flagged(self, lost: str = "error") -> Any:
        leaves = [_own(leaf) for leaf in self.leaves]
        for at, (base, dim) in self.guarded.items():
            first = leaves[at].movedim(dim, 0)
            guarded = GuardedTensor(first, flags_for(len(first), base), CONFIG, lost=lost)
            leaves[at] = guarded.movedim(0, dim) if dim else guarded
        torch.default_generator.manual_seed(7)
        return self.run(leaves)


def _own(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    own = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype)
    return own.copy_(leaf.detach()).requires_grad_(leaf.requires_grad)


def _batch_dim(leaf: Any, prefer: int = 0) -> int | None:
    """Where a tensor may have its batch: the first dimension that is long enough, and not too."""
    if not isinstance(leaf, Tensor) or leaf.layout != torch.strided or not leaf.numel():
        return None
    if leaf.dtype not in (torch.float32, torch.complex64):
        return None
    if any(leaf.stride(dim) == 0 and leaf.shape[dim] > 1 for dim in range(leaf.dim())):
        return None
    dims = sorted(range(leaf.dim()), key=lambda dim: (dim != prefer, dim))
    return next((dim for dim in dims if 2 <= leaf.shape[dim] <= LONGEST), None)


_LAPACK = re.compile(
    r"linalg\..*|svd.*|pca_lowrank|pinverse|norm\.nuc|cholesky.*|qr|geqrf|ormqr|lu|lu_.*"
    r"|triangular_solve|logdet"
)


def _is_lapack(op: Any) -> bool:
    return _LAPACK.fullmatch(name_of(op)) is not None


def made_for(op: Any) -> Iterator[Any]:
    """The database's own calls; not by ``op.sample_inputs``, which reads the stack each time."""
    torch.default_generator.manual_seed(7)
    return iter(op.sample_inputs_func(op, "cpu", torch.float32, False))


def samples(op: Any, function: Callable[..., Any], most: int) -> Iterator[Sample]:
    """Calls of ``op``: its input guarded, in every second one its other tensors too.

    In every third one the batch lies in dimension 1.
    """
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for made in islice(made_for(op), LOOKED_AT):
            values, spec = tree_flatten((made.input, made.args, made.kwargs))
            first = len(tree_leaves(made.input))
            if any(_batch_dim(leaf) is not None for leaf in values[:first]):
                found.append((values, spec, first))
    step = max(len(found) // most, 1)
    for number, (values, spec, first) in enumerate(found[::step][:most]):

        def run(leaves: list[Any], spec: Any = spec) -> Any:
            given, args, kwargs = tree_unflatten(leaves, spec)
            return function(given, *args, **kwargs)

        sample, base = Sample(run, values, _is_lapack(op)), 1
        for at, leaf in enumerate(values):
            dim = _batch_dim(leaf, int(number % 3 == 2))
            if dim is not None and (at < first or number % 2):
                sample.guarded[at] = (base, dim)
                base += leaf.shape[dim]
        yield sample


def _poisons(leaf: Tensor, dim: int, row: int, lapack: bool) -> Iterator[Tensor]:
    near, far, nan = (0.5, 0.25), (-2.0, -0.5), (0.0, float("nan"))
    for factor, term in [near] if lapack else [far, nan]:
        changed = leaf.detach().clone()
        changed.select(dim, row).mul_(factor).add_(term)
        yield changed


def _differs(a: Tensor, b: Tensor, lapack: bool) -> Tensor:
    if lapack:
        return ~torch.isclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
        return _differs(a, b, lapack).any(-1)
    same = a == b
    return ~(same | (a.isnan() & b.isnan()))


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def by_rows(mask: Tensor, dims: tuple[int, ...]) -> list[bool]:
    """Which rows over ``dims`` hold anything, in row-major order of ``dims``."""
    moved = mask.movedim(dims, tuple(range(len(dims)))) if dims else mask
    rows = 1
    for dim in dims:
        rows *= mask.shape[dim]
    return [bool(row.any()) for row in moved.reshape(rows, -1)] if mask.numel() else [False] * rows


@dataclass
class Verdict:
    """What was found about one call."""

    faults: list[str]
    loose: bool  # a row carries a flag of a row that it did not depend on


def check(sample: Sample, outputs: Any, reference: Any, exact: bool = True) -> Verdict:
    """Flagged ``outputs`` against ``reference``, the plain run, and plain runs with poison.

    Not ``exact``: the data may differ by rounding.
    """
    faults: list[str] = []
    got, expected = tensors_in(outputs), tensors_in(reference)
    if len(got) != len(expected):
        return Verdict([f"{len(got)} tensors, plain {len(expected)}"], False)
    carried: list[tuple[list[set[int]], tuple[int, ...]]] = []
    for at, (one, plain) in enumerate(zip(got, expected, strict=True)):
        guarded = isinstance(one, GuardedTensor)
        data = one.unwrap() if guarded else one
        dims = one.batch_dims if guarded else ()
        found = locations(one.flags) if guarded else [set()]
        faults += _same_data(at, data, plain, exact)
        rows = 1
        for dim in dims:
            rows *= plain.shape[dim]
        if len(found) != rows:
            faults.append(f"output {at}: {len(found)} rows of flags for {dims} of {data.shape}")
            return Verdict(faults, False)
        carried.append((found, dims))
    depends = _dependencies(sample, expected, [dims for _, dims in carried], carried, faults)
    loose = any(
        location in poisoned and location not in depends[at][row]
        for poisoned in [{location for at in depends for row in at for location in row}]
        for at, (found, _) in enumerate(carried)
        for row, each in enumerate(found)
        for location in each
    )
    return Verdict(faults, loose)


def _same_data(at: int, data: Tensor, plain: Tensor, exact: bool = True) -> list[str]:
    if type(data) is not type(plain) or data.dtype != plain.dtype or data.shape != plain.shape:
        return [f"output {at}: {data.dtype} {tuple(data.shape)}, plain {tuple(plain.shape)}"]
    if data.layout != torch.strided:
        return []
    if data.stride() != plain.stride() and data.numel():
        return [f"output {at}: strides {data.stride()}, plain {plain.stride()}"]
    if not exact and torch.allclose(data, plain, rtol=1e-3, atol=1e-5, equal_nan=True):
        return []
    same = bits_of(data) == bits_of(plain)
    return [] if same else [f"output {at}: other data"]


def bits_of(tensor: Tensor) -> bytes:
    """Its elements in their order, bit for bit: -0.0 and the NaNs' payloads count."""
    if not tensor.numel():
        return b""
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return dense.reshape(-1).view(torch.uint8).numpy().tobytes()


def _dependencies(
    sample: Sample,
    expected: list[Tensor],
    dims: list[tuple[int, ...]],
    carried: list[tuple[list[set[int]], tuple[int, ...]]],
    faults: list[str],
) -> list[list[set[int]]]:
    depends: list[list[set[int]]] = [[set() for _ in found] for found, _ in carried]
    for leaf_at, (base, dim) in sample.guarded.items():
        leaf = sample.leaves[leaf_at]
        for row in list(dict.fromkeys((0, leaf.shape[dim] - 1, 1)))[:POISONED]:
            for poisoned in _poisons(leaf, dim, row, sample.lapack):
                leaves = list(sample.leaves)
                leaves[leaf_at] = poisoned
                try:
                    changed = tensors_in(sample.plain(leaves))
                except (RuntimeError, ValueError, IndexError):
                    continue  # torch refuses such data
                for at, (plain, new) in enumerate(zip(expected, changed, strict=False)):
                    if plain.shape != new.shape or plain.layout != torch.strided:
                        continue
                    hit = by_rows(_differs(plain, new, sample.lapack), dims[at])
                    found = carried[at][0]
                    for out_row, changed_here in enumerate(hit):
                        if not changed_here:
                            continue
                        depends[at][out_row].add(base + row)
                        if base + row not in found[out_row]:
                            faults.append(
                                f"output {at}: row {out_row} of dims {dims[at]} depends on row"
                                f" {row} of tensor {leaf_at}, and has not its flag"
                            )
    return depends


def repeats(one: Any, other: Any) -> bool:
    """Whether two plain runs gave the same bits."""
    pairs = zip(tensors_in(one), tensors_in(other), strict=True)
    return not any(_same_data(0, a, b) for a, b in pairs)
