"""Row rules of reductions, scans and normalisations along dimensions.

Along a dimension that holds samples they merge; along any other they follow. What picks one of many
values (max, median, mode) depends on all of them, so its samples merge as a sum's do.
"""

from __future__ import annotations

from opguard.flags._rows.placing import After, Shape, broadcast, reduced, spell, union
from opguard.flags._rows.rows import Rows
from opguard.flags._rows.rules import Call, names_of, rule

__all__: list[str] = []


def _dims_of(call: Call) -> list[int] | None:
    """The dims an op reduces: its ``dim`` argument as a list; None for all of them."""
    if all(argument.name != "dim" for argument in call.op._schema.arguments):
        return None
    dim = call["dim"]
    if dim is None:
        return None
    if isinstance(dim, (list, tuple)):
        return list(dim) or None
    return [dim]


def _reduce(call: Call) -> After:
    dims = _dims_of(call)
    return union(call, lambda name, rows, shape: reduced(rows, dims, shape))


rule(
    *names_of(
        "sum mean prod amax amin max min argmax argmin all any std var std_mean var_mean norm "
        "native_norm linalg_vector_norm linalg__powsum logsumexp nansum median nanmedian mode "
        "count_nonzero aminmax _aminmax hash_tensor nuclear_norm"
    )
)(_reduce)


def _along(call: Call) -> After:
    """Same shapes; everything along ``dim`` sees each other."""
    dim = call["dim"]

    def placed(name: str, rows: Rows, shape: Shape) -> Rows | None:
        # A mask (N, L) of padding stands for (N, 1, 1, L), one (L, L) for (1, 1, L, L).
        fits = name != "mask" or len(rows.shape) == len(shape)
        found = broadcast(rows, shape) if fits else rows.whole(shape)
        if found is None or not shape:
            return found
        return found.mixed(range(len(shape)) if dim is None else [dim % len(shape)])

    return union(call, placed)


rule(
    *names_of(
        "_softmax _log_softmax _safe_softmax _masked_softmax softmax log_softmax cumsum cumprod "
        "cummax cummin logcumsumexp _logcumsumexp _softmax_backward_data "
        "_log_softmax_backward_data"
    )
)(_along)


@rule("aten::glu")
def _gate(call: Call) -> After:
    """Half of a dimension gates the other half: element j sees j and j + n / 2."""
    dim = call["dim"] % max(len(call.shape("self")), 1)
    return union(call, lambda name, rows, shape: rows.resized(dim, shape[dim]))


@rule("aten::renorm")
def _renorm(call: Call) -> After:
    """One norm for each index of ``dim``, over all other dimensions."""
    rank = len(call.shape("self"))
    gone = [dim for dim in range(rank) if dim != call["dim"] % max(rank, 1)]
    return union(call, lambda name, rows, shape: rows.mixed(gone))


@rule("aten::_weight_norm_interface")
def _weight_norm(call: Call) -> After:
    """One norm for each index of ``dim``: the vectors' direction, scaled."""
    rank = len(call.shape("v"))
    gone = [dim for dim in range(rank) if dim != call["dim"] % max(rank, 1)]
    return union(call, lambda name, rows, shape: broadcast(rows.mixed(gone), shape))


# What is counted over a whole tensor, or made of all of it.
spell(
    "histc bincount histogram _histogramdd_bin_edges _histogramdd_from_bin_cts "
    "_histogramdd_from_bin_tensors _is_all_true _is_any_true _cummax_helper _cummin_helper "
    "segment_reduce",
    "",
)
spell("multinomial", "*s", self="*c")
