"""Row rules of linear algebra: what is contracted merges, what is a batch follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from opguard.flags._rows.axes import Axis
from opguard.flags._rows.placing import After, Shape, broadcast, place, spell, union
from opguard.flags._rows.rows import Rows
from opguard.flags._rows.rules import Call, rule

__all__: list[str] = []

spell("mm _int_mm", "mn", self="mk", mat2="kn")
spell("_scaled_mm", "mn", self="mk", mat2="kn")
spell("addmm _addmm_activation", "mn", self="mn", mat1="mk", mat2="kn")
spell("bmm", "bmn", self="bmk", mat2="bkn")
spell("baddbmm", "bmn", self="bmn", batch1="bmk", batch2="bkn")
spell("addbmm", "mn", self="mn", batch1="bmk", batch2="bkn")
spell("mv", "m", self="mk", vec="k")
spell("addmv", "m", self="m", mat="mk", vec="k")
spell("addr", "mn", self="mn", vec1="m", vec2="n")
spell("dot vdot", "", self="k", other="k", tensor="k")
spell("linear mkldnn_linear", "*o", input="*k", self="*k", weight="ok", bias="o")
spell("_weight_int8pack_mm _weight_int4pack_mm _weight_int4pack_mm_for_cpu", "mn", self="mk")
spell("_dyn_quant_matmul_4bit", "mn", inp="mk")
spell("_cdist_forward", "*mn", x1="*mk", x2="*nk")
spell("_euclidean_dist", "*mn", x1="*mk", x2="*nk")
spell("trace dist _compute_linear_combination", "")

# --- linalg: leading dimensions are a batch, the matrices themselves merge ------------------------

spell("linalg_cholesky_ex linalg_inv_ex", "*xy", "*", A="*mn", self="*mn")
spell("cholesky cholesky_inverse linalg_matrix_exp", "*xy", self="*mn")
spell("_cholesky_solve_helper cholesky_solve", "*xy", self="*mn", A="*pq", input2="*pq")
spell("linalg_lu", "*xy", A="*mn")
spell("linalg_lu_factor_ex linalg_ldl_factor_ex", "*xy", "*x", "*", A="*mn", self="*mn")
spell("linalg_lu_solve", "*xy", LU="*mn", pivots="*k", B="*pq")
spell("linalg_ldl_solve", "*xy", LD="*mn", pivots="*k", B="*pq")
spell("lu_unpack", "*xy", LU_data="*mn", LU_pivots="*k")
spell("linalg_qr", "*xy", A="*mn")
spell("geqrf", "*xy", "*x", self="*mn")
spell("linalg_householder_product", "*xy", input="*mn", tau="*k")
spell("ormqr", "*xy", self="*mn", input2="*k", input3="*pq")
spell("linalg_eig", "*x", "*xy", self="*mn")
spell("linalg_eigvals _linalg_eigvals", "*x", self="*mn")
spell("_linalg_eigh", "*x", "*xy", A="*mn")
spell("_linalg_svd", "*xy", "*x", "*xy", A="*mn")
spell("_linalg_det", "*", "*xy", "*x", A="*mn")
spell("_linalg_slogdet", "*", "*", "*xy", "*x", A="*mn")
spell("linalg_solve_triangular", "*xy", self="*mn", B="*pq")
spell("triangular_solve", "*xy", self="*mn", A="*pq")
spell("linalg_pinv", "*xy", self="*mn", atol="*", rtol="*")


def _is_vector(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether the right-hand side of ``first @ x = second`` is a (batch of) vector(s)."""
    return len(second) == 1 or (
        len(first) - 1 == len(second) and all(a == b for a, b in zip(first, second, strict=False))
    )


def _solving(call: Call, first: str, second: str) -> After:
    """Leading dimensions are a batch, which broadcasts; the right-hand side may be vectors."""
    left, right = call.shape(first), call.shape(second)
    cores = {first: 2, second: 1 if _is_vector(left, right) else 2}
    batch = max(len(left) - 2, len(right) - cores[second])

    def placed(name: str, rows: Rows, shape: Shape) -> Rows | None:
        lead = len(rows.shape) - cores.get(name, 0)
        if len(shape) < batch or not 0 <= lead <= batch or name not in cores:
            return rows.whole(shape)
        dims: list[int | None] = [batch - lead + at for at in range(lead)]
        return place(rows, dims + [None] * cores[name], shape)

    return union(call, placed)


@rule("aten::_linalg_solve_ex")
def _solve(call: Call) -> After:
    return _solving(call, "A", "B")


@rule("aten::linalg_lstsq")
def _least_squares(call: Call) -> After:
    return _solving(call, "self", "b")


@rule("aten::linalg_cross")
def _cross(call: Call) -> After:
    dim = call["dim"]

    def placed(name: str, rows: Rows, shape: Shape) -> Rows | None:
        found = broadcast(rows, shape)
        return None if found is None else found.mixed([dim % len(shape)])

    return union(call, placed)


@rule("aten::_fft_c2c", "aten::_fft_r2c", "aten::_fft_c2r")
def _fourier(call: Call) -> After:
    """Along the transformed dimensions all see all; the others follow."""
    rank = len(call.shape("self"))
    gone = {dim % rank for dim in call["dim"]} if rank else set()

    def placed(name: str, rows: Rows, shape: Shape) -> Rows | None:
        return place(rows.mixed(list(gone)), range(rank), shape)

    return union(call, placed)


@rule("aten::_trilinear")
def _trilinear(call: Call) -> After:
    """Three factors with dimensions put in, multiplied, some dimensions summed."""
    rank = len(call.shape("i1")) + len(call["expand1"])
    summed = [dim % rank for dim in call["sumdim"]]
    kept = [dim for dim in range(rank) if dim not in summed]

    def placed(name: str, rows: Rows, shape: Shape) -> Rows | None:
        new = {dim % rank for dim in call[f"expand{name[1]}"]}
        own = [dim for dim in range(rank) if dim not in new]
        return place(rows, [kept.index(dim) if dim in kept else None for dim in own], shape)

    return union(call, placed)


@rule("aten::_pdist_forward")
def _pairs(call: Call) -> After:
    """Output k is the distance of the k-th pair (i, j), i < j, of the input's rows."""
    count = call.shape("self")[0]

    def placed(name: str, rows: Rows, shape: Shape) -> Rows | None:
        rows = rows.aligned()
        if rows.axes != (Axis(0, 1, count),) or type(count) is not int:
            return rows.whole(shape)
        index = torch.triu_indices(count, count, 1).t().contiguous()
        return Rows(shape, (Axis(0, 1, len(index)),), rows.payload.gather(index))

    return union(call, placed)
