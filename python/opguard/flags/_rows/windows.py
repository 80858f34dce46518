"""Row rule of windows over each sample: ``as_strided`` that never steps out of a sample's memory.

That is how frames of a signal are cut (``torch.stft``).
"""

from __future__ import annotations

from collections.abc import Sequence

from opguard.flags._rows.axes import Axis, product
from opguard.flags._rows.rows import Rows

__all__ = ["windowed"]


def windowed(
    rows: Rows, size: Sequence[int], stride: Sequence[int], old: Sequence[int], ahead: int
) -> Rows | None:
    """The rows of windows into a tensor of strides ``old``, from its element ``ahead`` on.

    None unless samples lie along one dimension whose steps are longer than a sample is, and every
    window stays within one sample.
    """
    rows = rows.aligned()
    several = [axis for axis in rows.axes if axis.size != 1]
    if len(several) != 1 or 0 in size or ahead < 0:
        return None
    batch = several[0].dim
    step = old[batch]
    reach = sum(
        (n - 1) * s for d, (n, s) in enumerate(zip(rows.shape, old, strict=True)) if d != batch
    )
    along = [k for k in range(len(size)) if stride[k] == step and size[k] > 1]
    first, left = divmod(ahead, step) if step > 0 else (0, 0)
    left += sum(
        (n - 1) * s for k, (n, s) in enumerate(zip(size, stride, strict=True)) if k not in along
    )
    inside = first + (size[along[0]] if along else 1) <= rows.shape[batch]
    # Between what is in the tensor its storage may hold elements of other rows.
    held = product(n for d, n in enumerate(rows.shape) if d != batch)
    if step <= reach or left > reach or reach + 1 != held or len(along) > 1 or not inside:
        return None
    if not along:
        one = rows.selected(batch, first)
        return Rows(size, (), one.payload)
    count = size[along[0]]
    cut = rows.sliced(batch, first, first + count)
    return Rows(size, (Axis(along[0], 1, count),), cut.payload)
