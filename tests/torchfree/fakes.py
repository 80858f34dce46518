"""Tensors for tests without torch: what the C core asks of a leaf, and nothing more.

``C.bind_types(FakeTensor, FakeParameter)`` makes the core take them for tensors.
"""

from __future__ import annotations

from math import prod
from typing import Any


class FakeStorage:
    """As many bytes as it was made with."""

    def __init__(self, size: int) -> None:
        self._size = size

    def nbytes(self) -> int:
        return self._size


class FakeTensor:
    """A leaf with the attributes and methods the core uses of ``torch.Tensor``.

    ``calls`` counts what was done to it; ``origin`` is the tensor it was made from.
    """

    def __init__(
        self,
        *shape: int,
        device: str = "cpu",
        requires_grad: bool = False,
        inference: bool = False,
        view: bool = False,
        storage: int | None = None,
        origin: FakeTensor | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = "fake.float32"
        self.device = device
        self.requires_grad = requires_grad
        self.origin = origin
        self.calls: list[str] = []
        self._inference = inference
        self._base = FakeTensor(*shape) if view else None
        self._storage = FakeStorage(4 * prod(shape) if storage is None else storage)

    @property
    def nbytes(self) -> int:
        return 4 * prod(self.shape)

    @property
    def is_cpu(self) -> bool:
        return self.device == "cpu"

    @property
    def is_meta(self) -> bool:
        return self.device == "meta"

    def numel(self) -> int:
        return prod(self.shape)

    def element_size(self) -> int:
        return 4

    def is_inference(self) -> bool:
        return self._inference

    def untyped_storage(self) -> FakeStorage:
        return self._storage

    def _new(self, call: str, **changes: Any) -> FakeTensor:
        self.calls.append(call)
        out = FakeTensor(*self.shape, **({"device": self.device, "origin": self} | changes))
        out.__class__ = FakeTensor if isinstance(self, FakeParameter) else type(self)
        return out

    def detach(self) -> FakeTensor:
        return self._new("detach", inference=self._inference, storage=self._storage.nbytes())

    def clone(self) -> FakeTensor:
        return self._new("clone", requires_grad=self.requires_grad)

    def cpu(self) -> FakeTensor:
        return self if self.device == "cpu" else self._new("cpu", device="cpu")


class FakeParameter(FakeTensor):
    """Made from a tensor, as ``torch.nn.Parameter`` is."""

    def __init__(self, data: FakeTensor | None = None, requires_grad: bool = True) -> None:
        data = FakeTensor(2) if data is None else data
        super().__init__(*data.shape, device=data.device, requires_grad=requires_grad, origin=data)
