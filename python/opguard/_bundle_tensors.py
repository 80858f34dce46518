"""Tensors of a repro bundle: which bytes are saved, and how a tensor is made of them again.

Tensors that share memory are saved as that memory, once, and as views of it. What is saved are
bytes, so NaN payloads, conjugate views and strides come back as they were. A tensor alone on its
memory is saved with its own shape and dtype: any reader of safetensors shows it as what it is.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["TensorReader", "TensorWriter", "Unsavable"]

# What safetensors has known since 0.5; other dtypes are saved as bytes.
KNOWN = frozenset(
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()  # noqa: SIM905
)
MOST_BYTES = 4 * 2**30  # of one bundle
SLACK = 2**20  # memory between views that is saved rather than giving their sharing up
ALIGNMENT = 16
KINDS = {torch.Tensor: "Tensor", torch.nn.Parameter: "Parameter"}
COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}


class Unsavable(Exception):
    """A value that a bundle cannot carry; the message says why."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor whose memory is what ``tensor`` shows: no gradient, no lazy sign or conjugate."""
    plain = tensor.detach()
    if plain.is_conj():
        plain = plain.conj()
    return torch._neg_view(plain) if plain.is_neg() else plain


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last byte, exclusively, of its storage that a strided tensor shows."""
    size = tensor.element_size()
    start = int(tensor.storage_offset()) * size
    if tensor.numel() == 0:
        return start, start
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return start, start + (sum(int((n - 1) * step) for n, step in pairs) + 1) * size


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().reshape(-1)
    return flat if flat.dtype is torch.uint8 else flat.view(torch.uint8)


class _Memory:
    """One storage and the tensors that show parts of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.views: list[tuple[torch.Tensor, dict[str, Any]]] = []
        self.start, self.end = 0, 0

    def add(self, view: torch.Tensor, node: dict[str, Any]) -> int:
        """Adds a view; returns how many bytes the bundle grows by."""
        start, end = _span(view)
        start -= start % ALIGNMENT
        old = self.end - self.start
        self.start = min(self.start, start) if self.views else start
        self.end = max(self.end, end) if self.views else end
        self.views.append((view, node))
        return self.end - self.start - old

    def _is_alone(self) -> bool:
        return len(self.views) == 1 and self.views[0][0].is_contiguous()

    def _shares_little(self) -> bool:
        shown = sum(view.numel() * view.element_size() for view, _ in self.views)
        return self.end - self.start > 4 * shown + SLACK

    def save(self) -> dict[str, torch.Tensor]:
        if self._is_alone() or self._shares_little():
            saved = {}
            for index, (view, node) in enumerate(self.views):
                node["$tensor"] = f"{self.name}~{index}" if index else self.name
                known = node["dtype"] in KNOWN
                saved[node["$tensor"]] = (view.contiguous() if known else _as_bytes(view)).cpu()
            return saved
        storage = self.views[0][0].untyped_storage()
        raw = torch.empty(0, dtype=torch.uint8, device=storage.device)
        raw.set_(storage, self.start, (self.end - self.start,), (1,))
        for view, node in self.views:
            first = (
                (view.storage_offset() * view.element_size() - self.start) if view.numel() else 0
            )
            node.update({"$tensor": self.name, "first_byte": first, "stride": list(view.stride())})
        return {self.name: raw.cpu()}


class TensorWriter:
    """Collects tensors; each becomes a readable node, and ``saved`` has the bytes in the end."""

    def __init__(self) -> None:
        self._memories: dict[Any, _Memory] = {}
        self._bytes = 0

    def add(self, tensor: torch.Tensor, path: str) -> dict[str, Any]:
        """Returns the node of ``tensor``; what it leaves open is filled in by ``saved``.

        Raises:
            Unsavable: no memory to save (a meta tensor, a subclass without one), or too much.
        """
        kind = KINDS.get(type(tensor))
        if kind is None:
            raise Unsavable(f"a tensor of the subclass {type(tensor).__qualname__}")
        if tensor.is_nested:
            raise Unsavable("a nested tensor")
        node: dict[str, Any] = {
            "$tensor": "",
            "dtype": _name(tensor.dtype),
            "shape": list(tensor.shape),
            "device": str(tensor.device),
        }
        flags = {
            "parameter": kind == "Parameter",
            "requires_grad": tensor.requires_grad,
            "inference": tensor.is_inference(),
        }
        node |= {name: True for name, on in flags.items() if on}
        if tensor.is_meta:
            return node | {"stride": list(tensor.stride())}
        if tensor.is_quantized:
            return node | self._quantized(tensor, path)
        if tensor.layout is not torch.strided:
            return node | self._sparse(tensor.detach(), path)
        node |= {name: True for name in ("conj", "neg") if getattr(tensor, f"is_{name}")()}
        self._strided(_plain(tensor), path, node)
        return node

    def _strided(self, plain: torch.Tensor, path: str, node: dict[str, Any]) -> None:
        try:
            key: Any = (str(plain.device), plain.untyped_storage()._cdata)
            start, end = _span(plain)
        except (RuntimeError, NotImplementedError) as error:
            raise Unsavable("a tensor without memory of its own") from error
        if plain.numel() == 0:
            key = object()
        if self._bytes + min(end - start, plain.numel() * plain.element_size()) > MOST_BYTES:
            raise Unsavable(f"the bundle would have more than {MOST_BYTES} bytes")
        memory = self._memories.setdefault(key, _Memory(path))
        self._bytes += max(0, min(memory.add(plain, node), plain.numel() * plain.element_size()))

    def _parts(self, path: str, **parts: torch.Tensor) -> dict[str, Any]:
        return {name: self.add(part, f"{path}/{name}") for name, part in parts.items()}

    def _sparse(self, tensor: torch.Tensor, path: str) -> dict[str, Any]:
        if tensor.layout is torch.sparse_coo:
            parts = self._parts(path, indices=tensor._indices(), values=tensor._values())
            return {"layout": "sparse_coo", "coalesced": tensor.is_coalesced(), "parts": parts}
        if tensor.layout not in COMPRESSED:
            raise Unsavable(f"a tensor of the layout {tensor.layout}")
        found = {name: getattr(tensor, name)() for name in COMPRESSED[tensor.layout]}
        parts = self._parts(path, **found, values=tensor.values())
        return {"layout": str(tensor.layout).removeprefix("torch."), "parts": parts}

    def _quantized(self, tensor: torch.Tensor, path: str) -> dict[str, Any]:
        parts = self._parts(path, values=tensor.int_repr())
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            scale, zero = tensor.q_scale(), tensor.q_zero_point()
            return {"quantized": {"scale": scale, "zero_point": zero}, "parts": parts}
        scales, zeros = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
        parts |= self._parts(path, scales=scales, zero_points=zeros)
        return {"quantized": {"axis": tensor.q_per_channel_axis()}, "parts": parts}

    def saved(self) -> dict[str, torch.Tensor]:
        """The tensors to save, on the CPU and contiguous, by name."""
        result: dict[str, torch.Tensor] = {}
        for memory in self._memories.values():
            try:
                result |= memory.save()
            except RuntimeError as error:  # a device that failed gives nothing back
                why = f"copying it raised {type(error).__name__}"
                for view, node in memory.views:
                    node.clear()
                    node["$missing"] = {"type": f"torch:{type(view).__name__}", "why": why}
        return result


class TensorReader:
    """Makes tensors of nodes; ``notes`` says what came back otherwise than it was."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._placed: dict[tuple[str, str], torch.Tensor] = {}
        self.notes: list[str] = []

    def _device(self, name: str) -> torch.device:
        wanted = torch.device(name)
        try:
            torch.empty(0, device=wanted)
        except (RuntimeError, AssertionError, NotImplementedError):
            note = f"tensors that were on {name} are on the cpu, there is no {name} here"
            self.notes += [note] if note not in self.notes else []
            return torch.device("cpu")
        return wanted

    def make(self, node: dict[str, Any]) -> torch.Tensor:
        """Returns the tensor of ``node``.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: the node is none that was written.
        """
        with torch.inference_mode(bool(node.get("inference"))), torch.no_grad():
            tensor = self._bare(node)
        if node.get("parameter"):
            return torch.nn.Parameter(tensor, requires_grad=bool(node.get("requires_grad")))
        return tensor.requires_grad_() if node.get("requires_grad") else tensor

    def _bare(self, node: dict[str, Any]) -> torch.Tensor:
        dtype, shape = getattr(torch, node["dtype"]), tuple(node["shape"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{node['dtype']!r} is no dtype")
        if torch.device(node["device"]).type == "meta":
            return torch.empty_strided(shape, node["stride"], dtype=dtype, device="meta")
        if "quantized" in node:
            return self._quantized(node, dtype)
        if "layout" in node:
            return self._sparse(node, shape)
        tensor = self._strided(node, dtype, shape)
        if node.get("conj"):
            tensor = tensor.conj()
        return torch._neg_view(tensor) if node.get("neg") else tensor

    def _strided(
        self, node: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...]
    ) -> torch.Tensor:
        name, device = node["$tensor"], node["device"]
        found = self._placed.get((name, device))
        if found is None:
            # A copy of its own: what a call changes must not change the file's.
            found = self._tensors[name].to(self._device(device), copy=True)
            self._placed[name, device] = found
        if "stride" not in node:
            if found.dtype is not dtype:
                found = found.reshape(-1).view(dtype)
            return found.reshape(shape).view(shape)
        size = torch.empty(0, dtype=dtype).element_size()
        flat = torch.empty(0, dtype=dtype, device=found.device)
        flat.set_(found.untyped_storage(), 0, (found.numel() // size,), (1,))
        return flat.as_strided(shape, node["stride"], node["first_byte"] // size)

    def _sparse(self, node: dict[str, Any], shape: tuple[int, ...]) -> torch.Tensor:
        parts = {name: self.make(part) for name, part in node["parts"].items()}
        values = parts.pop("values")
        if node["layout"] == "sparse_coo":
            whole = torch.sparse_coo_tensor(
                parts["indices"], values, shape, check_invariants=True, device=values.device
            )
            return whole._coalesced_(bool(node["coalesced"]))
        layout = getattr(torch, node["layout"])
        compressed, plain = (parts[name] for name in COMPRESSED[layout])
        return torch.sparse_compressed_tensor(
            compressed, plain, values, shape, layout=layout, check_invariants=True
        )

    def _quantized(self, node: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
        parts = {name: self.make(part) for name, part in node["parts"].items()}
        how = node["quantized"]
        if "axis" in how:
            whole = torch._make_per_channel_quantized_tensor(
                parts["values"], parts["scales"], parts["zero_points"], how["axis"]
            )
        else:
            whole = torch._make_per_tensor_quantized_tensor(
                parts["values"], how["scale"], how["zero_point"]
            )
        if whole.dtype is not dtype:
            raise ValueError(f"expected {dtype}, the saved integers make {whole.dtype}")
        return whole
