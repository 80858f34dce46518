"""Cutting a module into blocks: what has to be there while one module's forward runs.

A block is a module whose whole subtree fits a chunk, or a bigger module with its own tensors only,
whose children are blocks of their own. Pieces of memory that the same blocks use lie together in
one segment, so what is tied between two blocks is a segment of its own that both of them take.
"""

from __future__ import annotations

import inspect
import mmap
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from opguard.pools._storages import ALIGNMENT, inner_leaves, leaves_of, storages_of

__all__ = ["Block", "Cut", "bytes_of", "cut_module"]

# Their forward reads weights of children whose forward it does not call from Python.
UNCUT = (nn.MultiheadAttention, nn.TransformerEncoderLayer, torch.jit.ScriptModule)


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
        sizes: bytes of each segment, each piece of memory rounded up to 64 bytes, the sum to whole
            pages.
    """

    blocks: tuple[Block, ...]
    sizes: tuple[int, ...]

    def bytes_of(self, block: Block) -> int:
        """Bytes of the block's own segments."""
        return sum(self.sizes[segment] for segment in block.segments)

    def bytes_held(self, block: Block) -> int:
        """Bytes that are held while the block runs: its own, and of the blocks around it."""
        around = (self.blocks[number].segments for number in block.around)
        return sum(self.sizes[segment] for segment in {*block.segments}.union(*around))

    def largest(self) -> Block | None:
        """The block that needs the most bytes to be there at once."""
        return max(self.blocks, key=self.bytes_held, default=None)


def bytes_of(module: nn.Module) -> int:
    """Bytes of the memory that the module's tensors lie in, what they share counted once."""
    return sum(piece.nbytes for piece in storages_of(leaves_of(module)))


def _rounded(nbytes: int, to: int) -> int:
    return -(-nbytes // to) * to


def _has_forward(module: nn.Module) -> bool:
    # ModuleList and its like hold modules for somebody else's forward. Asked of the class itself:
    # that of scripted modules makes methods of instances alone.
    return inspect.getattr_static(type(module), "forward", None) is not nn.Module.forward


def _may_be_cut(module: nn.Module, *, is_root: bool) -> bool:
    # What is compiled runs as one, unless that is all there is.
    return not isinstance(module, UNCUT) and (is_root or "_orig_mod" not in module._modules)


@dataclass
class _Cutter:
    """Walks the tree. Pieces of memory are known by their numbers."""

    chunk: int
    sizes: list[int]
    piece_of: dict[int, int]  # by the id of a tensor
    found: list[tuple[str, nn.Module, set[int], tuple[int, ...]]] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    known: dict[int, set[int]] = field(default_factory=dict)

    def own(self, module: nn.Module) -> set[int]:
        """Pieces of a module's own tensors, not its children's."""
        own = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        leaves = (leaf for t in own if isinstance(t, Tensor) for leaf in inner_leaves("", t))
        pieces = (self.piece_of.get(id(leaf.tensor)) for leaf in leaves)
        return {piece for piece in pieces if piece is not None}

    def all(self, module: nn.Module) -> set[int]:
        """Pieces of the whole tree below a module."""
        found = self.known.get(id(module))
        if found is None:
            found = self.known[id(module)] = self.own(module)  # a ring of modules ends here
            found.update(*map(self.all, module.children()))
        return found

    def visit(self, module: nn.Module, name: str, around: tuple[int, ...]) -> None:
        pieces = self.all(module)
        if id(module) in self.seen or not pieces:
            return
        self.seen.add(id(module))
        has_forward = _has_forward(module)
        if has_forward and not self._is_to_be_cut(module, pieces, is_root=not around):
            self.found.append((name, module, pieces, around))
            return
        if has_forward or not around:
            # The root always: what the path of no forward leads to has to belong to somebody.
            around = (*around, len(self.found))
            self.found.append((name, module, self.own(module), around[:-1]))
        else:
            self.found[around[-1]][2].update(self.own(module))
        for child_name, child in module.named_children():
            self.visit(child, f"{name}.{child_name}" if name else child_name, around)

    def _is_to_be_cut(self, module: nn.Module, pieces: set[int], *, is_root: bool) -> bool:
        too_large = sum(self.sizes[piece] for piece in pieces) > self.chunk
        return too_large and _may_be_cut(module, is_root=is_root) and self._has_parts(module)

    def _has_parts(self, module: nn.Module) -> bool:
        return any(self.all(child) for child in module.children())


def cut_module(module: nn.Module, chunk: int) -> tuple[Cut, list[list[Tensor]]]:
    """Cuts a module into blocks of at most ``chunk`` bytes where its tree allows that.

    A module without children, and one that reads its children's weights itself, is one block
    however large.

    Returns:
        The cut, and the tensors that lie in each of its segments.
    """
    pieces = storages_of(leaves_of(module))
    numbers = {id(leaf.tensor): n for n, piece in enumerate(pieces) for leaf in piece.leaves}
    cutter = _Cutter(chunk, [piece.nbytes for piece in pieces], numbers)
    cutter.visit(module, "", ())
    users: list[list[int]] = [[] for _ in pieces]
    for number, (_, _, taken, _) in enumerate(cutter.found):
        for piece in taken:
            users[piece].append(number)
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, by in enumerate(users):  # in the order of the tree
        groups.setdefault(tuple(by), []).append(number)
    blocks = tuple(
        Block(
            name,
            weakref.ref(each),
            tuple(segment for segment, by in enumerate(groups) if number in by),
            around,
        )
        for number, (name, each, _, around) in enumerate(cutter.found)
    )
    sizes = tuple(
        _rounded(sum(_rounded(pieces[n].nbytes, ALIGNMENT) for n in group), mmap.PAGESIZE)
        for group in groups.values()
    )
    tensors = [
        [leaf.tensor for n in group for leaf in pieces[n].leaves] for group in groups.values()
    ]
    return Cut(blocks, sizes), tensors
