"""Makes sure there is a torch opguard can work with, then loads the ops library.

Imported first by the package, so that a missing or old torch is one clear sentence.
"""

from __future__ import annotations

from pathlib import Path

TORCH_FLOOR = (2, 10)


def _check_torch() -> None:
    floor = ".".join(map(str, TORCH_FLOOR))
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"opguard expects torch >= {floor} beside it, none is installed; "
            f"run: python -m pip install 'torch>={floor}'"
        ) from None
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < TORCH_FLOOR:
        raise ImportError(
            f"opguard expects torch >= {floor}, found {torch.__version__}; "
            f"run: python -m pip install --upgrade 'torch>={floor}'"
        )


_check_torch()

import torch  # noqa: E402  (after the check, which says what is missing)

from opguard import _C  # noqa: E402

_C.load_ops(str(Path(__file__).with_name("libopguard_ops.so")))
_C.bind_types(torch.Tensor, torch.nn.Parameter)
