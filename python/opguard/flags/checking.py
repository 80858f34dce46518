"""Flags for whole models: every leaf module's output is checked, without a change to the model.

    c = check_model(model)
    y = model(x)
    c.flags          # (N, words): which samples, which module, NaN or Inf
    c.remove()

The checks are forward hooks. What a call finds is kept for the thread that calls, in one flags
tensor a call. What is hooked is in ``_leaves``, what a call has found in ``_found``, how hooks and
torch.compile get along in ``_tracing``.
"""

from __future__ import annotations

import fnmatch
import itertools
import logging
import random
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from opguard.flags import _engine
from opguard.flags._compiled import checks_of
from opguard.flags._found import THREADS, Found, Token, record, record_plain, record_rest
from opguard.flags._leaves import Dims, Leaf, bare, batch_dims, ends_in, leaves_of
from opguard.flags._places import places_of
from opguard.flags._tracing import break_graph, compile_anew, never_a_frame
from opguard.flags.config import ErrorConfig, get_config
from opguard.flags.errors import FlagsError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["FlagEvent", "ModelCheck", "check_model", "check_parts"]

Patterns = str | Iterable[str]

logger = logging.getLogger("opguard")

_is_compiling = torch.compiler.is_compiling
# The number of the backward pass that runs in this thread, -1 for none.
_backward = getattr(torch._C, "_current_graph_task_id", None) or (lambda: -1)


@dataclass(frozen=True)
class FlagEvent:
    """What ``on_flag`` is told: a call of ``model`` whose ``flags`` (N, words) hold an error.

    ``call`` counts the calls of the checked model from 1, of all threads together.
    """

    flags: Tensor
    model: nn.Module
    call: int


class _Hook:
    """A hook that stays with its model: a copy of the model gets one that takes itself off."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Gone, ()


class _Gone:
    """What a copy or a pickle of a checked model has in a hook's place; the first call removes it.

    A model's copy is another model, which nobody asked to check.
    """

    def __call__(self, module: nn.Module, *args: Any) -> None:
        if _is_compiling():
            return
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]
                for more in (
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                    module._forward_pre_hooks_with_kwargs,
                ):
                    more.pop(key, None)


class _LeafHook(_Hook):
    """Records what a leaf module returned."""

    def __init__(self, token: Token, place: int, how: tuple[int, int], dims: Dims | None) -> None:
        self._token = token
        self._number = token.number
        self._place = place
        self._how = how
        self._dims = dims
        self.notes = True  # whether the model's own answer is looked at

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        slot = THREADS[self._number].slot
        found = slot.found
        if (
            not _is_compiling()
            and found is not None
            and found.users
            and self._dims is None
            and type(output) is torch.Tensor
            and record_plain(found, output, self._place, self._how)
        ):
            if self.notes:
                found.last = []
                found.note(output, 0)
            return
        if found is None or not found.users:
            # Called by itself, outside a call of its model: a call of its own. A backward pass
            # runs a checkpointed leaf once more, which is none.
            if not _is_compiling() and _backward() != -1:
                return
            found = slot.found = Found(users=0)
        if not found.sized:
            found.size(args, {})
        record(found, output, self._place, self._how, self._dims)


class _EnterHook(_Hook):
    """Begins what a call of the model finds."""

    def __init__(self, token: Token, roots: frozenset[int]) -> None:
        self._token = token
        self._number = token.number
        self._roots = roots

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        slot = THREADS[self._number].slot
        found = slot.found
        if found is not None and found.users > found.held and not _is_compiling():
            # One call in another, or the last one ended without its hook: by Ctrl-C, say.
            found.users = found.held + _calls_under_way(found, self._roots)
        if found is None or not found.users:
            found = slot.found = Found(users=0)
        found.users += 1
        if not found.sized:
            found.size(args, kwargs)


class _LeaveHook(_Hook):
    """Ends it, and looks at what the model itself returned: no leaf sees what comes after it."""

    def __init__(
        self, token: Token, place: int | None, how: tuple[int, int], watch: _Watch | None
    ) -> None:
        self._token = token
        self._number = token.number
        self._place = place
        self._how = how
        self._watch = watch

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        found = THREADS[self._number].slot.found
        if found is None or found.users <= found.held:
            return  # the hooks came in the middle of the call
        try:
            if self._place is not None and output is not None:
                record_rest(found, output, self._place, self._how)
        finally:
            found.users -= 1
        if not found.users:
            found.end()
            if self._watch is not None:
                self._watch.look(found, module, self._how[1])


def _calls_under_way(found: Found, roots: frozenset[int]) -> int:
    """How many calls of the roots the stack of this thread holds, but for the one that begins.

    Only asked where one call seems to run inside another; the count kept is too high after an
    exception that runs no hooks.
    """
    code = torch.nn.Module._call_impl.__code__
    frame: Any = sys._getframe()
    calls = 0
    while frame is not None:
        if frame.f_code is code and id(frame.f_locals.get("self")) in roots:
            calls += 1
        frame = frame.f_back
    return calls - 1 if calls else found.users - found.held


class _Watch:
    """Calls ``on_flag`` after calls with an error, of those that are looked at."""

    def __init__(
        self, on_flag: Callable[[FlagEvent], object], every: int, sample_rate: float
    ) -> None:
        self._on_flag = on_flag
        self._every = every
        self._rate = sample_rate
        self._count = itertools.count(1)
        self._draw = random.Random().random

    def look(self, found: Found, module: nn.Module | None, key: int) -> None:
        """Tells of the errors in ``found``; reading them waits for an accelerator."""
        if _is_compiling():
            break_graph()
        call = next(self._count)
        if (call - 1) % self._every or (self._rate < 1 and self._draw() >= self._rate):
            return
        flags = found.flags(key)
        if module is not None and bool(_engine.is_err(flags).any()):
            self._on_flag(FlagEvent(flags, module, call))


class ModelCheck:
    """The checks on a model, as :func:`check_model` puts them there."""

    def __init__(
        self,
        roots: Mapping[str, nn.Module],
        *,
        how: tuple[int, int],
        watch: _Watch | None = None,
        keep: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self._token = Token()
        self._number = self._token.number
        self._models = [weakref.ref(root) for root in roots.values()]
        self._key = how[1]
        self._watch = watch
        self._handles: list[Any] = []
        self._locations: dict[str, int] = {}
        models = {name: bare(root) for name, root in roots.items()}
        whole = frozenset(map(id, models.values()))
        try:
            for name, root in models.items():
                self._attach(name, root, whole, how, keep)
        except BaseException:
            self.remove()
            raise
        compile_anew(models.values())

    def _attach(
        self,
        prefix: str,
        root: nn.Module,
        roots: frozenset[int],
        how: tuple[int, int],
        keep: Callable[[str], bool],
    ) -> None:
        leaves = [leaf for leaf in leaves_of(root) if keep(leaf.name)]
        names = [f"{prefix}.{leaf.name}".strip(".") for leaf in leaves]
        own, ids = places_of(root, prefix, dict(zip(names, leaves, strict=True)))
        # First in, last out: a call has begun for every other hook.
        enter = root.register_forward_pre_hook(
            _EnterHook(self._token, roots), prepend=True, with_kwargs=True
        )
        self._handles.append(enter)
        hooks = {
            leaf: self._hook(leaf, place, how) for leaf, place in zip(leaves, ids, strict=True)
        }
        seen = [leaf.module for leaf, hook in hooks.items() if hook is not None]
        rest = None if ends_in(root, seen) else own
        for name, place, hook in zip(names, ids, hooks.values(), strict=True):
            if hook is not None:
                hook.notes = rest is not None
                self._locations[name or type(root).__name__] = place
        leave = _LeaveHook(self._token, rest, how, self._watch)
        self._handles.append(root.register_forward_hook(leave, always_call=True))

    def _hook(self, leaf: Leaf, place: int, how: tuple[int, int]) -> _LeafHook | None:
        hook = _LeafHook(self._token, place, how, batch_dims(leaf.module))
        try:
            self._handles.append(leaf.module.register_forward_hook(hook))
        except RuntimeError:  # a scripted module takes none
            logger.warning(
                "check_model: %s is a %s, which takes no hooks; what it returns is seen where it "
                "goes in next",
                leaf.name or "the model",
                type(leaf.module).__name__,
            )
            return None
        return hook

    @property
    def flags(self) -> Tensor:
        """Flags (N, words) of the last call that this thread made of the model.

        After a call that failed, what was found up to there. On the model's device; reading them
        there waits for nothing.

        Raises:
            RuntimeError: this thread has not called the model yet, or did in a transform that is
                over.
        """
        found = THREADS[self._number].slot.found
        if found is None or not (found.held or found.is_readable()):
            raise RuntimeError(
                "check_model: expected a call of the model in this thread before its flags are "
                "read, there was none; call the model first"
            )
        if found.is_out_of_reach():
            raise RuntimeError(
                "check_model: expected the flags of a call inside torch.vmap or another transform "
                "to be read there; return .flags from the function that is transformed"
            )
        return found.flags(self._key)

    @property
    def locations(self) -> dict[str, int]:
        """Id of each checked module by its name, as flags have it."""
        return dict(self._locations)

    @contextmanager
    def collect(self) -> Iterator[Self]:
        """Calls in the block add up to one flags tensor, of the first call's samples.

        For what calls a model many times for one answer, such as ``generate``. Calls of other
        threads stand apart, as always; coroutines of one thread do not, so await nothing in it.
        """
        slot = THREADS[self._number].slot
        before = slot.found
        found = slot.found = Found(users=1)
        found.held = 1
        try:
            yield self
        finally:
            found.end()
            if before is not None and before.users:
                slot.found = before
        if self._watch is not None:
            self._watch.look(found, self._models[0](), self._key)

    def remove(self) -> None:
        """Takes every hook off; the flags of the last call stay readable. Twice is once."""
        if not self._handles:
            return
        while self._handles:
            self._handles.pop().remove()
        living = (model() for model in self._models)
        compile_anew([model for model in living if model is not None])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "ModelCheck: expected to stay with the model it checks, it cannot be copied or "
            "pickled; call check_model on the copy of the model"
        )

    def __repr__(self) -> str:
        state = f"{len(self._locations)} modules" if self._handles else "removed"
        return f"ModelCheck({state})"


never_a_frame(_LeafHook.__call__, _EnterHook.__call__, _LeaveHook.__call__, _Gone.__call__)


def _matcher(
    include: Patterns | None, exclude: Patterns | None, names: list[str]
) -> Callable[[str], bool]:
    """Tells which of ``names`` the patterns keep."""
    wanted = _patterns("include", include, names)
    unwanted = _patterns("exclude", exclude, names)

    def keep(name: str) -> bool:
        if wanted is not None and not any(fnmatch.fnmatchcase(name, each) for each in wanted):
            return False
        return not any(fnmatch.fnmatchcase(name, each) for each in unwanted or ())

    return keep


def _patterns(keyword: str, given: Patterns | None, names: list[str]) -> list[str] | None:
    if given is None:
        return None
    patterns = [given] if isinstance(given, str) else list(given)
    for each in patterns:
        if not fnmatch.filter(names, each):
            raise FlagsError(
                f"check_model({keyword}=...): expected patterns of module names such as "
                f"{names[0]!r}, got {each!r}, which is nobody's; the names are those of the leaves "
                "in model.named_modules()"
            )
    return patterns


def _watch(on_flag: Any, every: int, sample_rate: float) -> _Watch | None:
    if on_flag is not None and not callable(on_flag):
        raise TypeError(
            f"check_model(on_flag=...): expected a function of one FlagEvent, got "
            f"{type(on_flag).__name__}; write a function, or leave it out and read .flags"
        )
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise FlagsError(
            f"check_model(every=...): expected a whole number from 1 on, got {every!r}; every=10 "
            "looks at each tenth call"
        )
    if not 0 < sample_rate <= 1:
        raise FlagsError(
            f"check_model(sample_rate=...): expected a share above 0 and at most 1, got "
            f"{sample_rate!r}; sample_rate=0.01 looks at one call in a hundred"
        )
    return None if on_flag is None else _Watch(on_flag, every, sample_rate)


def _checked_arguments(model: Any, inf: str, config: ErrorConfig | None) -> tuple[int, int]:
    """The mask of the checks and the configuration's key."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"check_model: expected a torch.nn.Module, got {type(model).__name__}; for what a "
            "function returns use flag_nan_and_inf"
        )
    devices = len(model.device_ids) if isinstance(model, torch.nn.DataParallel) else 0
    if devices > 1:
        raise FlagsError(
            "check_model: expected a model that runs in one thread, got a DataParallel on "
            f"{devices} devices; check the module inside and return .flags from its "
            "forward, DataParallel gathers them"
        )
    return checks_of(inf, 1), (get_config() if config is None else config).key


def check_model(
    model: nn.Module,
    *,
    config: ErrorConfig | None = None,
    inf: Literal["both", "pos", "none"] = "both",
    on_flag: Callable[[FlagEvent], object] | None = None,
    every: int = 1,
    sample_rate: float = 1.0,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
) -> ModelCheck:
    """Checks every leaf module of ``model`` in each call, until ``remove()`` or its ``with`` ends.

        with check_model(model) as c:
            y = model(x)
            print(flags.repr(c.flags))

    A leaf is a module without modules inside. All floating tensors that it returns are looked at,
    in tuples, mappings and dataclasses too; NaN and Inf are recorded under the leaf's qualified
    name. So is what the model itself returns, under its own name, in samples that no leaf flagged.

    The first tensor that the model is called with says how many samples there are: its dim 0. A
    tensor with that size in its dim 0 is looked at sample by sample; in any other (time first, one
    row for several, a constant), a finding is every sample's. A size that agrees by accident cannot
    be told. ``nn.RNNBase`` and ``nn.MultiheadAttention`` say themselves where their batch is.

    Compiles (``torch.compile(fullgraph=True)``, before or after) and exports. A function that was
    compiled before the model was checked keeps its graph, without checks. A copy of the model comes
    without checks; modules added later have none.

    Args:
        config: how errors are kept; None for the current configuration, as it is now.
        inf: "pos" leaves -inf alone, "none" every infinity.
        on_flag: called with a :class:`FlagEvent` after a call whose flags hold an error. It may
            raise. Looking waits for an accelerator; without ``on_flag`` nothing does.
        every: look at each n-th call only.
        sample_rate: look at this share of the calls, drawn at random.
        include, exclude: patterns (``"encoder.*"``) of names of leaves to check, not to check.

    Raises:
        TypeError: ``model`` is no module, ``on_flag`` cannot be called.
        FlagsError: (a ValueError) a value that means nothing, a pattern that is no module's.
    """
    how = _checked_arguments(model, inf, config)
    watch = _watch(on_flag, every, sample_rate)
    keep = _matcher(include, exclude, [leaf.name for leaf in leaves_of(bare(model))])
    return ModelCheck({"": model}, how=how, watch=watch, keep=keep)


def check_parts(model: Any) -> ModelCheck | None:
    """:func:`check_model` of a module or of all that a pipeline has; None where there is none."""
    if isinstance(model, torch.nn.Module):
        return check_model(model)
    parts = getattr(model, "components", model)
    if isinstance(parts, list | tuple):
        parts = dict(enumerate(parts))
    if not isinstance(parts, Mapping):
        return None
    roots = {str(name): each for name, each in parts.items() if isinstance(each, torch.nn.Module)}
    return ModelCheck(roots, how=(checks_of("both", 1), get_config().key)) if roots else None
