"""Cutting a module into blocks: what has to be there while one module's forward runs.

A block is a module whose whole subtree fits a chunk, or a bigger module with its own tensors only,
whose children are blocks of their own. Tensors are told apart by storage; storages that the same
blocks use lie together in one segment, so what is tied between two blocks is a segment of its own
that both of them take.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from opguard.pools._storages import inner_leaves

__all__ = ["Block", "Cut", "all_storages", "cut_module", "own_storages", "storage_sizes"]

# Their forward reads weights of children whose forward it does not call.
UNCUT = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """What is taken while the forward of one module runs.

    Attributes:
        name: path of the module from the root, "" for the root itself.
        module: whose forward it is, referred to weakly: who keeps blocks must not keep the model.
        segments: numbers of the segments that hold its tensors, ascending.
        around: numbers of the blocks whose forward runs around this one.
    """

    name: str
    module: weakref.ref[nn.Module]
    segments: tuple[int, ...]
    around: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """A module in blocks.

    Attributes:
        blocks: in the order of the tree.
        segments: the storages of each segment, by ``untyped_storage()._cdata``.
        sizes: bytes of each segment, each storage rounded up to 64 bytes, the sum to whole pages.
    """

    blocks: tuple[Block, ...]
    segments: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]

    def bytes_of(self, block: Block) -> int:
        """Bytes of the block's own segments."""
        return sum(self.sizes[segment] for segment in block.segments)

    def bytes_held(self, block: Block) -> int:
        """Bytes that are held while the block runs: its own, and of the blocks around it."""
        around = (self.blocks[number].segments for number in block.around)
        return sum(self.sizes[segment] for segment in {*block.segments}.union(*around))

    def largest(self) -> Block:
        """The block that needs the most bytes to be there at once."""
        return max(self.blocks, key=self.bytes_held)


def storage_sizes(tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    """(key, bytes) of each storage that a tensor, or a subclass made of tensors, lies in."""
    for leaf in inner_leaves("", tensor):
        storage = leaf.tensor.untyped_storage()
        yield storage._cdata, storage.nbytes()


def own_storages(module: nn.Module) -> dict[int, int]:
    """Bytes by key of the storages of a module's own parameters and buffers, not its children's."""
    found: dict[int, int] = {}
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None:
                found.update(storage_sizes(tensor))
    return found


def all_storages(module: nn.Module) -> dict[int, int]:
    """The same of the whole tree."""
    found: dict[int, int] = {}
    for each in module.modules():
        found.update(own_storages(each))
    return found


def _rounded(nbytes: int, to: int) -> int:
    return -(-nbytes // to) * to


def _has_forward(module: nn.Module) -> bool:
    # ModuleList and its like hold modules for somebody else's forward.
    return getattr(type(module), "forward", None) is not nn.Module.forward


def _may_be_cut(module: nn.Module, *, is_root: bool) -> bool:
    # What is compiled runs as one, unless that is all there is.
    return not isinstance(module, UNCUT) and (is_root or "_orig_mod" not in module._modules)


@dataclass
class _Cutter:
    chunk: int
    found: list[tuple[str, nn.Module, set[int], tuple[int, ...]]] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    sizes: dict[int, int] = field(default_factory=dict)

    def visit(self, module: nn.Module, name: str, around: tuple[int, ...]) -> None:
        if id(module) in self.seen:
            return
        storages = all_storages(module)
        self.sizes |= storages
        if not storages:
            return
        self.seen.add(id(module))
        fits = sum(storages.values()) <= self.chunk and _has_forward(module)
        children = [child for child in module.children() if all_storages(child)]
        if fits or not children or not _may_be_cut(module, is_root=not around):
            self.found.append((name, module, set(storages), around))
            return
        own = set(own_storages(module))
        if not around or _has_forward(module):
            # The root always: what the path of no forward leads to has to belong to somebody.
            around = (*around, len(self.found))
            self.found.append((name, module, own, around[:-1]))
        else:
            self.found[around[-1]][2].update(own)
        for child_name, child in module.named_children():
            self.visit(child, f"{name}.{child_name}" if name else child_name, around)


def cut_module(module: nn.Module, chunk: int) -> Cut:
    """Cuts a module into blocks of at most ``chunk`` bytes where its tree allows that.

    A module without children, and one that reads its children's weights itself, is one block
    however large.
    """
    cutter = _Cutter(chunk)
    cutter.visit(module, "", ())
    users: dict[int, list[int]] = {}
    for number, (_, _, storages, _) in enumerate(cutter.found):
        for key in storages:
            users.setdefault(key, []).append(number)
    groups: dict[tuple[int, ...], list[int]] = {}
    for key in cutter.sizes:  # in the order of the tree
        groups.setdefault(tuple(users[key]), []).append(key)
    segments: list[list[int]] = [[] for _ in cutter.found]
    for segment, by in enumerate(groups):
        for number in by:
            segments[number].append(segment)
    blocks = tuple(
        Block(name, weakref.ref(each), tuple(segments[number]), around)
        for number, (name, each, _, around) in enumerate(cutter.found)
    )
    sizes = tuple(
        _rounded(sum(_rounded(cutter.sizes[key], 64) for key in keys), mmap.PAGESIZE)
        for keys in groups.values()
    )
    return Cut(blocks, tuple(map(tuple, groups.values())), sizes)
