"""Code under torch.compile: inside a block it is compiled once more, with the checks in its graph.

``torch.compiler.set_stance`` puts a backend of ours in place of all others for as long as a block
is entered; what was compiled before is found again afterwards, and what is compiled here in the
next block of the same kind. The backend wraps the graph that Dynamo made into one that runs it op
by op while it is traced, under the mode, and hands it to the compiler asked for.
"""

from __future__ import annotations

import logging
import operator
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opguard.flags._opchecks_eager import Mode, Watch, pop_modes, push_modes
from opguard.flags._opchecks_graph import Traced
from opguard.flags._opchecks_limits import Limits
from opguard.flags._opchecks_places import HERE, Place, place_of_node, place_of_stack
from opguard.flags._opchecks_rows import samples_of
from opguard.flags._rows import Axis, Rows, SamplePayload
from opguard.flags._rows.axes import same

__all__ = ["INSIDE", "enter"]

_INPUT = "place" + "holder"  # what torch.fx calls a graph's input
_CPU = torch.device("cpu")
INSIDE = (
    "check_ops: expected to be entered outside of compiled code, got a block in a function that"
    " torch.compile runs; put the block around the call of that function"
)
logger = logging.getLogger("opguard")
_lock = threading.Lock()
_backends: dict[Any, Backend] = {}
_entered: list[list[Backend]] = []  # those of the blocks of all threads
_before: list[Any] = []  # the stance before the first of them
_ours: list[Any] = []  # those that were set here since


def enter(
    backend: str | Callable[..., Any], mask: int, categories: frozenset[str]
) -> Callable[[], None]:
    """Makes compiled code checked from now on; what ends that.

    The stance of torch.compile is one for all threads: it is the latest block's, and the user's
    own again when the last block ends.
    """
    import torch._dynamo.eval_frame as frames

    if not all(hasattr(frames, name) for name in ("_stance", "_set_stance", "DynamoStance")):
        logger.warning(
            "check_ops: torch %s says otherwise what compiled code is run by; code under"
            " torch.compile is not looked at in this block, eager code is",
            torch.__version__,
        )
        return lambda: None
    with _lock:
        stance = _before[0] if _entered else frames._stance
        if stance.stance != "default":
            return lambda: None  # the user wants eager code, or no compiling
        key = (backend if stance.backend is None else stance.backend, mask, categories)
        ours = _backends.get(key)
        if ours is None:
            ours = _backends[key] = Backend(*key)
    entry = [ours]  # unlike all others, whatever it holds

    def leave() -> None:
        """In this order, it can be called again after an interrupt."""
        with _lock:
            rest = [each for each in _entered if each is not entry]
            if len(rest) == len(_entered):
                return
            if any(frames._stance is each for each in _ours):  # else the block set one: it stays
                if rest:
                    _use(rest[-1][0])
                else:
                    frames._set_stance(_before[0])
            if not rest:
                _limits.back()
                _ours.clear()
            _entered[:] = rest

    try:
        with _lock:
            if not _entered:
                _before[:] = [stance]
                _limits.up()
            _entered.append(entry)
            _use(ours)
    except BaseException:
        leave()
        raise
    return leave


def _use(backend: Backend) -> None:
    import torch._dynamo.eval_frame as frames

    stance = frames.DynamoStance(backend=backend)
    _ours[:] = [each for each in _ours if each is frames._stance] + [stance]
    try:
        frames._set_stance(stance)
    except RuntimeError as error:
        raise RuntimeError(INSIDE) from error


class _Names(torch.fx.Interpreter):
    """Runs Dynamo's graph and knows which node is at work."""

    node: torch.fx.Node
    traced: Traced | None = None

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.nn.functional.embedding and self.traced is not None and len(args) > 1:
            args = (self.traced.right_ids(args[0], args[1]), *args[1:])
        return super().call_function(target, args, kwargs)

    def run_node(self, n: torch.fx.Node) -> Any:
        self.node = n
        return super().run_node(n)


class Backend:
    """Compiles graphs with checks of one kind. One object a kind: graphs are found again by it."""

    def __init__(
        self, inner: str | Callable[..., Any], mask: int, categories: frozenset[str]
    ) -> None:
        self.inner = inner
        self.mask = mask
        self.categories = categories
        self.__name__ = "check_ops"

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        _limits.compiled = True
        return Checked(self, graph, examples)

    def compile(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        """``graph`` by the compiler asked for."""
        inner = self.inner
        if isinstance(inner, str):
            from torch._dynamo.backends.registry import lookup_backend

            inner = lookup_backend(inner)
        return inner(graph, examples)


_limits = Limits(Backend)


class Checked:
    """One graph of Dynamo's with its checks, compiled for the rows that its inputs had then."""

    def __init__(self, backend: Backend, graph: torch.fx.GraphModule, examples: list[Any]) -> None:
        self.backend = backend
        self.graph = graph
        self.returns = len(_output(graph).args[0])
        self.parameters = frozenset(
            i for i, each in enumerate(examples) if isinstance(each, torch.nn.Parameter)
        )
        self.varying = [
            i
            for i, each in enumerate(examples)
            if isinstance(each, Tensor) and i not in self.parameters
        ]
        self.own = _own_inputs(graph)
        self.model = _model_of(graph)
        self.rows_of_outputs: list[Any] = []
        self.places: list[Place] = []
        self.wide: set[int] = set()
        self.notes: list[Any] = []
        watches = _watches()
        self.signature = self._signature(watches[-1], examples) if watches else None
        self.function = backend.compile(self._wrapped(), examples)

    # --- tracing ---------------------------------------------------------------------------------

    def _wrapped(self) -> torch.fx.GraphModule:
        """A graph of one call, whose outputs are the graph's own and what was found."""
        outer = torch.fx.Graph()
        inputs = []
        for node in self.graph.graph.nodes:
            if node.op == _INPUT:
                made = getattr(outer, _INPUT)(node.name)
                made.meta = dict(node.meta)
                inputs.append(made)
        call = outer.call_function(self._traced, tuple(inputs))
        count = self.returns + 2 + _size_of_notes(self.graph)
        outer.output(tuple(outer.call_function(operator.getitem, (call, i)) for i in range(count)))
        module = torch.fx.GraphModule(self.graph, outer)
        module.meta = dict(self.graph.meta)
        return module

    def _traced(self, *args: Any) -> tuple[Any, ...]:
        runner = _Names(self.graph)
        signature: list[Any] = [None] * len(args)
        for i, known in zip(self.varying, self.signature or (), strict=self.signature is not None):
            signature[i] = known
        samples, device = None, next((x.device for x in args if isinstance(x, Tensor)), _CPU)
        for x, known in zip(args, signature, strict=True):
            if known is not None:
                samples, device = x.shape[known[0]], x.device
                break
        traced = Traced(
            self.backend.mask,
            self.backend.categories,
            samples,
            lambda op: place_of_node(op, runner.node),
            device,
        )
        for i, (x, known) in enumerate(zip(args, signature, strict=True)):
            if known is not None:
                dim, is_batch = known
                axis = Axis(dim, 1, x.shape[dim])
                traced.tracker.put(x, Rows(tuple(x.shape), (axis,), SamplePayload(samples)))
            else:
                is_batch = i in self.parameters
            if isinstance(x, Tensor) and not is_batch:
                traced.may_hold_inf(x)
        mode = Mode(traced)
        runner.traced = traced
        push_modes([mode])
        try:
            outputs = runner.run(*args)
        finally:
            pop_modes(mode)
        self.places = list(traced.places)
        self.wide = traced.wide
        self.notes = [(site, place, len(values)) for site, place, _, values in traced.notes]
        self.rows_of_outputs = [_batch_dim(traced.tracker, each) for each in outputs]
        told = [x for *_, pred, values in traced.notes for x in (pred, *values)]
        return (*outputs, traced.found, traced.more, *told)

    # --- running ---------------------------------------------------------------------------------

    def _signature(self, watch: Watch, args: Any) -> tuple[Any, ...]:
        """Of each input but parameters its batch dimension and whether it was given as a batch."""
        tensors = [args[i] for i in self.varying]
        watch.knows(tensors)
        if self.own and not watch.given:
            mine = [args[i] for i in self.own if i in self.varying]
            watch.take_batch(f"input of {self.model}", mine)
        found: list[Any] = []
        for x in tensors:
            dim = _batch_dim(watch.tracker, x)
            found.append(None if dim is None else (dim, watch.batch.knows(x)))
        return tuple(found)

    def __call__(self, *args: Any) -> Any:
        watches = _watches()
        if not watches:  # another thread's block: its checks, nobody's findings
            return self.function(*args)[: self.returns]
        modes = pop_modes()
        try:
            signatures = [self._signature(watch, args) for watch in watches]
            if any(each != self.signature for each in signatures):
                return self._run_by_op(modes, args)
            out = self.function(*args)
            outputs, rest = out[: self.returns], out[self.returns :]
            for watch in watches:
                self._take(watch, outputs, rest)
            self._hook(outputs)
            return outputs
        finally:
            push_modes(modes)

    def _run_by_op(self, modes: list[Any], args: Any) -> Any:
        """Where the batch lies elsewhere than when it was compiled: op by op, as eager code."""
        runner = _Names(self.graph)
        push_modes(modes)
        before = HERE.place_of
        HERE.place_of = lambda op: place_of_node(op, runner.node)
        try:
            return runner.run(*args)
        finally:
            HERE.place_of = before
            pop_modes()

    def _hook(self, outputs: Any) -> None:
        """Has the gradients looked at that the compiled backward pass will give."""
        for x in outputs:
            node = x.grad_fn if isinstance(x, Tensor) else None
            if node is not None and "CompiledFunction" in type(node).__name__:
                node.register_hook(self._after_backward)
                return

    def _after_backward(self, given: Any, taken: Any) -> None:
        for watch in _watches():
            watch.look_at_gradients(self.model, taken, given)

    def _take(self, watch: Watch, outputs: Any, rest: Any) -> None:
        samples = watch.book.samples
        for x, dim in zip(outputs, self.rows_of_outputs, strict=True):
            if dim is not None and samples is not None and x.shape[dim] == samples:
                axis = Axis(dim, 1, samples)
                watch.tracker.put(x, Rows(tuple(x.shape), (axis,), SamplePayload(samples)))
        if all(x is None or x.is_cpu for x in rest):
            self._read(watch, rest, None)
        else:
            caller = place_of_stack("")
            watch.book.pending.append(lambda: self._read(watch, rest, caller))

    def _read(self, watch: Watch, rest: Any, caller: Place | None) -> None:
        found, more, *told = rest
        for flags in (found, more):
            if flags is None:
                continue
            slots = (flags if flags.is_cpu else flags.cpu()).numpy()
            if slots.any():
                line = (caller or place_of_stack("")).line
                watch.book.take(slots.view("uint16"), self.places, self.wide, line)
        at = 0
        for site, place, count in self.notes:
            if "user" in watch.categories:
                at_line = place
                if not place.line:
                    at_line = place._replace(line=(caller or place_of_stack("")).line)
                site.tell(watch.book, at_line, told[at], told[at + 1 : at + 1 + count])
            at += 1 + count


def _output(graph: torch.fx.GraphModule) -> Any:
    return next(node for node in graph.graph.nodes if node.op == "output")


def _size_of_notes(graph: torch.fx.GraphModule) -> int:
    note = torch.ops.opguard.check_note.default
    return sum(
        1 + len(node.args[2])
        for node in graph.graph.nodes
        if node.target in (note, note._overloadpacket)
    )


def _batch_dim(tracker: Any, x: Any) -> int | None:
    """The dimension of ``x`` in which row i is sample i; None where there is none such."""
    rows = tracker.rows(x) if isinstance(x, Tensor) else None
    if rows is None or not samples_of(rows).identity or len(rows.axes) != 1:
        return None
    axis = rows.axes[0]
    whole = same(axis.inner, 1) and same(axis.size, x.shape[axis.dim])
    return int(axis.dim) if whole else None


def _own_inputs(graph: torch.fx.GraphModule) -> list[int]:
    """The inputs that a compiled function was called with, where it calls modules itself."""
    nodes = list(graph.graph.nodes)
    if not any(node.meta.get("nn_module_stack") for node in nodes):
        return []
    places = []
    for i, node in enumerate(each for each in nodes if each.op == _INPUT):
        source = getattr(node.meta.get("grapharg"), "source", None)
        guard = getattr(source, "guard_source", None)
        guard = guard() if callable(guard) else guard
        if guard is not None and getattr(guard, "name", "") == "LOCAL":
            places.append(i)
    return places


def _model_of(graph: torch.fx.GraphModule) -> str:
    for node in graph.graph.nodes:
        for _, kind in (node.meta.get("nn_module_stack") or {}).values():
            return getattr(kind, "__name__", str(kind).rpartition(".")[2])
    return "the compiled function"


def _watches() -> list[Watch]:
    """What this thread's blocks look by, the innermost last."""
    from opguard.flags.opchecks import _BLOCKS

    return [block._watch for block in _BLOCKS.now if block._watch is not None]
