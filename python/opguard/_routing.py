"""Which keywords of a call reach which step of an ``OpGuardBase``; read from signatures once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["Routes", "Step", "near_miss"]

STEPS = {"_preprocess": "input_raw", "_predict": "input_proc", "_postprocess": "output_raw"}
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Step:  # a NamedTuple takes as long to define as all of this module to read
    """Which keywords a step takes beside its input, which of them have no default.

    ``open``: it takes any (``**kwargs``).
    """

    __slots__ = ("names", "open", "required")

    def __init__(self, names: frozenset[str], required: frozenset[str], open: bool) -> None:
        self.names = names
        self.required = required
        self.open = open

    @classmethod
    def of(cls, function: Callable[..., Any], *skip: str) -> Step:
        parameters = inspect.signature(function).parameters.values()
        named = [each for each in parameters if each.kind in NAMED]
        names = frozenset(each.name for each in named) - {"self", *skip}
        without = frozenset(each.name for each in named if each.default is each.empty)
        anything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
        return cls(names, names & without, anything)

    def pick(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: given[name] for name in given if self.open or name in self.names}


class Routes:
    """How one class's call keywords reach its three steps; read from signatures once a class."""

    __slots__ = ("accepted", "required", "steps")

    def __init__(
        self,
        steps: tuple[Step, Step, Step],
        accepted: frozenset[str] | None,  # None: anything goes
        required: frozenset[str],
    ) -> None:
        self.steps = steps
        self.accepted = accepted
        self.required = required

    @classmethod
    def of(cls, owner: Any, base: Any) -> Routes:
        steps = [Step.of(getattr(owner, name), main) for name, main in STEPS.items()]
        caller = Step.of(owner._caller)
        accepted: frozenset[str] | None = caller.names
        required = caller.required
        ours = owner._caller is base._caller
        if ours:
            required = required.union(*(step.required for step in steps))
        if caller.open:
            known = ours and not any(step.open for step in steps)
            accepted = caller.names.union(*(step.names for step in steps)) if known else None
        return cls((steps[0], steps[1], steps[2]), accepted, required)


def near_miss(wrong: Iterable[str], known: Iterable[str]) -> str:
    """``'dtyp_override' (did you mean 'dtype_override'?)`` for each unknown name."""
    import difflib

    known = sorted(known)
    parts = []
    for name in wrong:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        parts.append(f"{name!r} (did you mean {close[0]!r}?)" if close else repr(name))
    return ", ".join(parts)
