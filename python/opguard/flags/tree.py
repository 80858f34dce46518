"""Which paths of a model get an id of their own when there are more paths than ids."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from opguard.flags.errors import LocationError
from opguard.flags.locations import MAX_LOCATION, ErrorLocation

__all__ = ["LocationTree", "WeightedLocationTree"]


@dataclass
class _Node:
    path: str
    cost: float  # of showing this node; 1 a level, less below heavy ones
    added: bool = False  # a path of its own, not only the way to one
    children: dict[str, _Node] = field(default_factory=dict)

    def walk(self) -> Iterator[_Node]:
        """Depth first, children in the order in which they came."""
        for child in self.children.values():
            yield child
            yield from child.walk()


class LocationTree:
    """Dotted paths that get ids, depth first, in the order in which they were added.

    With more paths than ids the tree is cut at the greatest depth at which they fit: paths below
    share the id of their ancestor there. Where the first level alone is too wide, its first paths
    get the ids and the others 0, "Unknown".

        tree = LocationTree(max_locations=1024)
        for path, _ in model.named_modules():
            tree.add_path(path)
        tree.build_ids()
        tree.get_location("encoder.layer.0.attn.q")

    Attributes:
        max_locations: how many ids there may be; never one above 1023, the ids have ten bits.
        path_to_id: path -> id, of all paths that have one or share one.
        root: the paths as nested dictionaries.
    """

    def __init__(self, max_locations: int = 1024) -> None:
        if max_locations < 1:
            raise LocationError(f"expected max_locations to be at least 1, got {max_locations}")
        self.max_locations = max_locations
        self.path_to_id: dict[str, int] = {}
        self._top = _Node("", 0.0)
        self._nodes: dict[str, _Node] = {}
        self._owner: dict[str, str] = {}  # path -> the path whose id it has
        self._built = False

    @property
    def root(self) -> dict[str, Any]:
        """The paths as nested dictionaries, leaves empty."""
        return _nested(self._top)

    def add_path(self, path: str) -> None:
        """Adds a path; "" (the model itself) is passed over.

        Raises:
            RuntimeError: the ids are built already.
        """
        if self._built:
            raise RuntimeError("expected add_path() before build_ids(), the tree is built already")
        node = self._top
        for part in path.split(".") if path else ():
            below = f"{node.path}.{part}" if node.path else part
            if part not in node.children:
                node.children[part] = self._nodes[below] = _Node(below, 0.0)
            node = node.children[part]
        node.added = bool(path)

    def count_leaves(self, node: dict[str, Any] | None = None) -> int:
        """How many paths have none below them, in the tree or in a part of ``root``."""
        if node is None:
            return sum(not inner.children for inner in self._top.walk())
        return sum(self.count_leaves(child) if child else 1 for child in node.values())

    def build_ids(self, start_id: int = 1) -> None:
        """Gives ids from ``start_id`` on; a second call changes nothing.

        Raises:
            LocationError: ``start_id`` is not 1..1023.
        """
        if not 1 <= start_id <= MAX_LOCATION:
            raise LocationError(f"expected start_id to be 1 to {MAX_LOCATION}, got {start_id}")
        if self._built:
            return
        self._price(self._top)
        room = min(self.max_locations, MAX_LOCATION - start_id + 1)
        self._share(self._top, self._cut(room), None)
        for owner in dict.fromkeys(self._owner.values()):
            if len(self.path_to_id) >= room:
                break
            self.path_to_id[owner] = start_id + len(self.path_to_id)
        self._owner = {p: owner for p, owner in self._owner.items() if owner in self.path_to_id}
        self.path_to_id = {p: self.path_to_id[owner] for p, owner in self._owner.items()}
        self._built = True

    def _weight(self, path: str) -> float:
        return 1.0

    def _price(self, node: _Node) -> None:
        for child in node.children.values():
            weight = self._weight(child.path) if node is not self._top else 1.0
            # Rounded, so that equal sums by different ways are one level.
            child.cost = round(node.cost + 1 / weight, 9) if weight else math.inf
            self._price(child)

    def _cut(self, room: int) -> float:
        """The highest cost at which the paths fit; that of the first level if none does."""
        levels = sorted({node.cost for node in self._top.walk()})
        best = levels[0] if levels else 0.0
        for level in levels:
            if self._ids_at(self._top, level) > room:
                break
            best = level
        return best

    def _ids_at(self, node: _Node, cut: float) -> int:
        count = 0
        for child in node.children.values():
            if child.cost <= cut:
                own = child.added or any(c.cost > cut for c in child.children.values())
                count += own + self._ids_at(child, cut)
        return count

    def _share(self, node: _Node, cut: float, owner: str | None) -> None:
        for child in node.children.values():
            above = owner
            if child.cost <= cut:
                hides = any(c.cost > cut for c in child.children.values())
                above = child.path if child.added or hides else None
            if above is not None:
                self._owner[child.path] = above
            self._share(child, cut, above)

    def get_location(self, path: str) -> int:
        """The id of a path, or of the longest beginning of it that has one; else 0.

        Raises:
            RuntimeError: the ids are not built.
        """
        if not self._built:
            raise RuntimeError("expected build_ids() before get_location()")
        while path:
            if path in self.path_to_id:
                return self.path_to_id[path]
            path = path.rpartition(".")[0]
        return 0

    def stands_for(self, path: str) -> str | None:
        """The path whose id ``path`` has: itself or an ancestor; None for Unknown."""
        while path:
            if path in self._owner:
                return self._owner[path]
            path = path.rpartition(".")[0]
        return None

    def register_all(self) -> dict[str, int]:
        """Registers the paths that have an id of their own; path -> :class:`ErrorLocation`'s id.

        Paths that share an id here share it there. The registry's ids may be others than the
        tree's, since it may hold more than this tree.
        """
        return {path: ErrorLocation.register(owner) for path, owner in self._owner.items()}

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries with ``{"__id__": id}`` where a path ends, -1 before the build."""
        return self._to_dict(self._top)

    def _to_dict(self, node: _Node) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, child in node.children.items():
            out[name] = self._to_dict(child)
            if child.added or not child.children:
                out[name]["__id__"] = self.path_to_id.get(child.path, 0) if self._built else -1
        return out

    def print_tree(self) -> None:
        """Prints the tree to the standard output."""
        print(self)

    def __str__(self) -> str:
        lines = [repr(self)]
        for node in self._top.walk():
            ident = f" [{self.path_to_id[node.path]}]" if node.path in self.path_to_id else ""
            name = node.path.rpartition(".")[2]
            lines.append("  " * (node.path.count(".") + 1) + name + ident)
        return "\n".join(lines)

    def __repr__(self) -> str:
        ids = f"{len(set(self.path_to_id.values()))} ids" if self._built else "not built"
        return (
            f"{type(self).__name__}({self.count_leaves()} leaves, max {self.max_locations}, {ids})"
        )


class WeightedLocationTree(LocationTree):
    """A tree in which heavy paths stay apart at deeper levels than light ones.

    Each level costs ``1 / weight`` on the way down, and the tree is cut by cost instead of depth:
    below a path of weight 10, ten levels are as shallow as one elsewhere. Weight 0 hides a path in
    its ancestor as soon as anything has to be hidden. The first level has no ancestor to share an
    id with and costs 1 always.

        tree = WeightedLocationTree(max_locations=1024)
        tree.set_weight("head.*", 10.0)
        tree.set_weight("encoder.layer*", 0.5)

    Attributes:
        weights: pattern -> weight.
    """

    def __init__(self, max_locations: int = 1024) -> None:
        super().__init__(max_locations)
        self.weights: dict[str, float] = {}
        self._default = 1.0

    def set_weight(self, path_pattern: str, weight: float) -> None:
        """The weight of the paths that equal the pattern, or begin with it where it ends in ``*``.

        Of several patterns that match, the longest counts.

        Raises:
            ValueError: a weight below 0, or not finite.
        """
        self.weights[path_pattern] = _checked(weight)

    def set_default_weight(self, weight: float) -> None:
        """The weight of all other paths, 1 unless set; ValueError as in :meth:`set_weight`."""
        self._default = _checked(weight)

    def _weight(self, path: str) -> float:
        best, found = self._default, -1
        for pattern, weight in self.weights.items():
            star = pattern.endswith("*")
            fits = path.startswith(pattern[:-1]) if star else path == pattern
            if fits and len(pattern) > found:
                best, found = weight, len(pattern)
        return best


def _checked(weight: float) -> float:
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"expected a weight of at least 0, got {weight}")
    return float(weight)


def _nested(node: _Node) -> dict[str, Any]:
    return {name: _nested(child) for name, child in node.children.items()}
