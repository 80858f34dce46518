"""Which memory a module's weights lie in: one entry a piece of memory, whatever shares it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from opguard._loaded import loaded
from opguard.pools.errors import Unmanageable

__all__ = [
    "Leaf",
    "Storage",
    "grain_of",
    "inner_leaves",
    "leaves_of",
    "refuse",
    "storages_of",
    "tensor_called",
]

ALIGNMENT = 64
WIDEST = 16  # bytes of an element of the widest dtype


@dataclass(eq=False)
class Leaf:
    """A tensor with memory of its own kind: a parameter, a buffer, or what is inside of one."""

    name: str
    tensor: Tensor

    @property
    def extent(self) -> tuple[int, int]:
        """First byte and the one after the last, from the start of its storage."""
        tensor = self.tensor
        if not tensor.numel():
            return (0, 0)
        last = sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        first = tensor.storage_offset() * tensor.element_size()
        return (int(first), int(first + (last + 1) * tensor.element_size()))


@dataclass(eq=False)
class Storage:
    """A run of bytes that one or more tensors lie in.

    Attributes:
        start, stop: bytes from the start of the torch storage.
        leaves: the tensors in it; the first gives the name.
    """

    start: int
    stop: int
    leaves: list[Leaf] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.leaves[0].name

    @property
    def nbytes(self) -> int:
        """Bytes, not rounded."""
        return self.stop - self.start

    @property
    def device(self) -> torch.device:
        return self.leaves[0].tensor.device

    @property
    def address(self) -> int:
        """Where the bytes are now."""
        return self.leaves[0].tensor.untyped_storage().data_ptr() + self.start


def inner_leaves(name: str, tensor: Tensor) -> Iterator[Leaf]:
    """A wrapper's tensors by torch's own protocol; a plain tensor itself."""
    if hasattr(tensor, "__tensor_flatten__"):
        for attribute in tensor.__tensor_flatten__()[0]:
            yield from inner_leaves(f"{name}::{attribute}", getattr(tensor, attribute))
    else:
        yield Leaf(name, tensor)


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has, non-persistent buffers too."""
    for prefix, owner in module.named_modules(remove_duplicate=True):
        dot = f"{prefix}." if prefix else ""
        for kind in (owner._parameters, owner._buffers):
            for name, tensor in kind.items():
                if tensor is not None:
                    yield dot + name, tensor


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors kept as ordinary attributes: they may be views of weights."""
    for prefix, owner in module.named_modules(remove_duplicate=True):
        dot = f"{prefix}." if prefix else ""
        for name, value in list(vars(owner).items()):
            if isinstance(value, Tensor):
                yield dot + name, value


def leaves_of(module: nn.Module) -> list[Leaf]:
    """The tensors of a module that have memory, each object once, in the module's order.

    Gradients are not among them. Tensors that are no parameter or buffer are, if they share the
    memory of one.
    """
    found: dict[int, Leaf] = {}
    for name, tensor in _named(module):
        for leaf in inner_leaves(name, tensor):
            found.setdefault(id(leaf.tensor), leaf)
    shared = {
        leaf.tensor.untyped_storage()._cdata
        for leaf in found.values()
        if _why_not(leaf.tensor) is None
    }
    for name, tensor in _plain_attributes(module):
        for leaf in inner_leaves(name, tensor):
            if _why_not(leaf.tensor) is None and leaf.tensor.untyped_storage()._cdata in shared:
                found.setdefault(id(leaf.tensor), leaf)
    return list(found.values())


def tensor_called(module: nn.Module, name: str) -> Tensor | None:
    """What the module has now under the name of a leaf."""
    path, *inner = name.split("::")
    owner: Any = module
    *parts, last = path.split(".")
    for part in parts:
        if part not in owner._modules:
            return None
        owner = owner._modules[part]
    value = vars(owner).get(last)
    for kind in (owner._buffers, owner._parameters):
        if last in kind:
            value = kind[last]
    for attribute in inner:
        value = getattr(value, attribute, None)
    return value if isinstance(value, Tensor) else None


def storages_of(leaves: list[Leaf]) -> list[Storage]:
    """The runs of bytes that the tensors lie in, in the order of their first tensor.

    Raises:
        Unmanageable: tensors of two storages show the same memory, as views of one NumPy array do.
    """
    _refuse_two_of_one(leaves)
    groups: dict[tuple[torch.device, int], list[tuple[int, int, int, Leaf]]] = {}
    for order, leaf in enumerate(leaves):
        start, stop = leaf.extent
        if stop > start:
            key = (leaf.tensor.device, leaf.tensor.untyped_storage()._cdata)
            groups.setdefault(key, []).append((start, stop, order, leaf))
    found: list[tuple[int, Storage]] = []
    for members in groups.values():
        members.sort(key=lambda member: member[:3])
        open_run: list[tuple[int, int, int, Leaf]] = []
        end = -1
        for member in members:
            if open_run and member[0] >= end:
                found.append(_run(open_run, end))
                open_run = []
            open_run.append(member)
            end = max(end, member[1]) if len(open_run) > 1 else member[1]
        found.append(_run(open_run, end))
    return [storage for _, storage in sorted(found, key=lambda pair: pair[0])]


def grain_of(storages: Iterable[Storage]) -> int:
    """Bytes of the smallest element in them, at most 8."""
    return min(8, *(leaf.tensor.element_size() for one in storages for leaf in one.leaves))


def _refuse_two_of_one(leaves: list[Leaf]) -> None:
    """Nothing of torch's says that they are tied: moved, they would no longer be."""
    spans = []
    for leaf in leaves:
        start, stop = leaf.extent
        if stop > start:
            storage = leaf.tensor.untyped_storage()
            at = storage.data_ptr()
            spans.append((str(leaf.tensor.device), at + start, at + stop, storage._cdata, leaf))
    furthest = None
    for span in sorted(spans, key=lambda span: span[:3]):
        if furthest is None or furthest[0] != span[0] or furthest[2] <= span[1]:
            furthest = span
        elif furthest[3] != span[3]:
            raise Unmanageable(
                f"expected tensors that share memory to share a storage, {furthest[4].name} and "
                f"{span[4].name} show the same bytes through two; make one of them a view of the "
                "other, or a copy"
            )
        elif furthest[2] < span[2]:
            furthest = span


def _run(members: list[tuple[int, int, int, Leaf]], stop: int) -> tuple[int, Storage]:
    """Overlapping tensors as one run. It starts where elements of any width may start."""
    ordered = sorted(members, key=lambda member: member[2])
    start = members[0][0] // WIDEST * WIDEST
    return ordered[0][2], Storage(start, stop, [member[3] for member in ordered])


# --- refusals -----------------------------------------------------------------------------------


def _is_wrapper(tensor: Tensor) -> bool:
    """A subclass made by _make_wrapper_subclass, a fake tensor among them."""
    if type(tensor) in (Tensor, nn.Parameter, nn.Buffer):
        return False
    if isinstance(tensor, loaded("torch._subclasses.fake_tensor", "FakeTensor")):
        return True
    with contextlib.suppress(RuntimeError), torch._C.DisableTorchFunctionSubclass():
        return bool(tensor.numel()) and tensor.untyped_storage().data_ptr() == 0
    return True


def _too_short(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() < Leaf("", tensor).extent[1]


# Asked in this order: what comes later may raise for what comes before.
_REASONS: tuple[tuple[Callable[[Tensor], bool], str], ...] = (
    (nn.parameter.is_lazy, "it has no values yet: run the model once first"),
    (lambda t: t.is_meta, "it is on the meta device and has no values: load them first"),
    (
        lambda t: t.layout != torch.strided,
        "it is sparse or of a layout of its own: only dense tensors are one piece of memory",
    ),
    (lambda t: t.is_nested, "it is a nested tensor: use the jagged layout"),
    (lambda t: t.is_quantized, "it is of torch's old quantized kind: use torchao's"),
    (lambda t: t.grad_fn is not None, "it is computed by autograd: detach it"),
    (
        _is_wrapper,
        "its type has no memory of its own and no __tensor_flatten__ that says what is inside",
    ),
    (_too_short, "its memory was freed"),
)


def _why_not(tensor: Tensor) -> str | None:
    """Why this tensor's memory cannot be moved; None if it can."""
    return next((reason for holds, reason in _REASONS if holds(tensor)), None)


def _frozen(module: nn.Module) -> str | None:
    """Whether weights were copied into compiled code, where nothing can follow them."""
    if isinstance(module, torch.jit.ScriptModule) and not hasattr(module, "training"):
        return "it is a frozen ScriptModule, whose weights are constants of its graph"
    compiled = isinstance(module, loaded("torch._dynamo.eval_frame", "OptimizedModule")) or any(
        part._compiled_call_impl is not None for part in module.modules()
    )
    if compiled and loaded("torch._inductor.config", "freezing"):
        return "torch._inductor.config.freezing folds its weights into compiled code: turn it off"
    return None


def refuse(module: object) -> None:
    """Unmanageable, with the reason, if the module's weights must not be moved."""
    kind = type(module).__name__
    if not isinstance(module, nn.Module):
        raise Unmanageable(
            f"expected a torch.nn.Module, got {kind}, whose weights torch gives no access to"
        )
    frozen = _frozen(module)
    if frozen is not None:
        raise Unmanageable(f"expected weights that can be moved, {kind} has none: {frozen}")
    for leaf in leaves_of(module):
        why = _why_not(leaf.tensor)
        if why is not None:
            raise Unmanageable(
                f"expected {leaf.name} of {kind} to be memory that can be moved: {why}"
            )
