"""Tensors that carry the flags of their samples through every op.

A :class:`GuardedTensor` is a tensor and its flags. What is computed from it carries the flags of
the rows it was computed from: picked, moved, joined and merged exactly as the rows of the data are,
by the table of rules in ``_rows``. The data is never touched: every op runs on it as it is.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.data._utils.collate import default_collate_fn_map

from opguard.flags import _engine, _guarded_wrap
from opguard.flags import _guarded_ops as ops
from opguard.flags._guarded_dispatch import dispatch
from opguard.flags._guarded_wrap import build, public_rows, with_other_flags
from opguard.flags._tracing import never_a_frame
from opguard.flags.config import ErrorConfig, get_config
from opguard.flags.errors import BatchMismatchError, FlagsError, RowsLost

__all__ = ["GuardedTensor", "guard"]

Lost = Literal["error", "merge"]


def _merges(lost: Any) -> bool:
    if lost not in ("error", "merge"):
        raise FlagsError(f"expected lost to be 'error' or 'merge', got {lost!r}")
    return bool(lost == "merge")


class GuardedTensor(Tensor):
    """``data`` (N, ...) of any dtype with the flags (N, words) of its samples.

    It computes as ``data`` does, shares its memory and its place in autograd's graph, and never
    changes it by itself. Flags are shared among tensors: change them by the functions of
    :mod:`opguard.flags`, which give a tensor with others, not by writing into :attr:`flags`.

    Args:
        data: the samples, in dimension 0; a tensor without dimensions is one sample.
        flags: as :func:`opguard.flags.push` or ``err.new`` make them, one row a sample.
        config: how flags merge, in compiled code its ``key``; None: the current one.
        lost: what an op does that no rule can follow: ``"error"`` raises NotImplementedError
            before anything is computed, ``"merge"`` gives its result one row, of all samples.

    Raises:
        FlagsLayoutError, BatchMismatchError: for flags that are none, or of another batch.
        NotImplementedError: within ``torch.func``'s transforms, and for tensors with a tangent;
            what is guarded outside may be given to a transform.
    """

    _data: Tensor
    _merges = False
    _gradient = False
    _given = False
    _apart = False
    _public: Any = None
    _cell: Any = None
    _step: Any = None
    _seen = 0

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: Any,
        data: Tensor,
        flags: Tensor,
        config: ErrorConfig | int | None = None,
        *,
        lost: Lost = "error",
    ) -> Any:
        if not isinstance(data, Tensor) or isinstance(data, GuardedTensor):
            raise TypeError(f"expected data to be a plain tensor, got {type(data).__name__}")
        if isinstance(flags, GuardedTensor):
            flags = flags.flags
        _outside_of_transforms(data)
        _fits(data, flags)
        return _attached(data, flags, config, _merges(lost))

    @property
    def flags(self) -> Tensor:
        """The flags (n, words): a row for each index over :attr:`batch_dims`, the last fastest."""
        return public_rows(self)[1].flags

    @property
    def batch_dims(self) -> tuple[int, ...]:
        """The dimensions that tell samples apart; none where an op has dropped the batch."""
        return public_rows(self)[0]

    def unwrap(self) -> Tensor:
        """The data as a plain tensor: the same memory, in the same graph of autograd's."""
        if not self.requires_grad and not torch.compiler.is_compiling():
            return self._data.detach()
        return ops.UNWRAP(self)  # type: ignore[no-any-return]

    def with_flags(self, flags: Tensor) -> GuardedTensor:
        """The same data with other flags, of as many rows as :attr:`flags` has."""
        if not self.requires_grad and not torch.compiler.is_compiling():
            return with_other_flags(self, flags)  # type: ignore[no-any-return]
        return ops.WITH_FLAGS(self, flags)  # type: ignore[no-any-return]

    def is_err(self) -> Tensor:
        """(n,) bool: the row has errors."""
        return _engine.is_err(self)

    def is_ok(self) -> Tensor:
        """(n,) bool: the row has no errors."""
        return _engine.is_ok(self)

    def has_err(self) -> bool:
        """Whether any row has errors, as a Python bool: it waits for the device."""
        return bool(_engine.is_err(self).any())

    def subset(self, index: Any) -> GuardedTensor:
        """The rows that ``index`` picks: an int tensor, a mask (n,) in bool, a slice or a list.

        Rows come in dimension 0, also where :attr:`batch_dims` are others.
        """
        from opguard.flags._guarded_record import subset

        return subset(self, index)

    def take_ok(self) -> GuardedTensor:
        """The rows without errors."""
        return self.subset(self.is_ok())

    def take_err(self) -> GuardedTensor:
        """The rows with errors."""
        return self.subset(self.is_err())

    def partition(self) -> tuple[GuardedTensor, GuardedTensor]:
        """:meth:`take_ok` and :meth:`take_err`."""
        bad = self.is_err()
        return self.subset(~bad), self.subset(bad)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        dims, payload = public_rows(self)
        return ["_data", "flags"], (dims, payload.key, self._merges)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: Any, size: Any, stride: Any
    ) -> GuardedTensor:
        return build(inner["_data"], inner["flags"], context)  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    def _stable_hash_for_caching(self) -> str:
        return repr(self.__tensor_flatten__())

    def __coerce_same_metadata_as_tangent__(self, context: Any, kind: Any = None) -> Any:
        """What a compiled backward pass expects in the place of this gradient."""
        if kind is None or kind is GuardedTensor:
            return _tangent(self._data, context)
        return self._data if kind is Tensor else None

    def backward(self, gradient: Any = None, *args: Any, **kwargs: Any) -> None:
        """As that of the data."""
        if isinstance(gradient, GuardedTensor):
            gradient = gradient.unwrap()
        Tensor.backward(self, gradient, *args, **kwargs)  # type: ignore[no-untyped-call]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if type(self._data) is not Tensor:
            return f"GuardedTensor({self._data!r}, batch_dims={self.batch_dims})"
        flags = self.flags
        bad = int(_engine.is_err(flags).sum())
        extra = f", grad_fn=<{type(self.grad_fn).__name__}>" if self.grad_fn is not None else ""
        return (
            f"GuardedTensor({self._data!r}, batch_dims={self.batch_dims},"
            f" {bad} of {flags.shape[0]} rows with errors{extra})"
        )

    def __copy__(self) -> Any:
        # Of the same memory, as that of a plain tensor: what is written into one is in the other.
        return self.detach().requires_grad_(self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError(
                "expected a GuardedTensor made by the user to deepcopy, got one that autograd"
                " made; copy g.detach()"
            )
        _, context = self.__tensor_flatten__()
        flags = copy.deepcopy(self.flags, memo)
        result = build(copy.deepcopy(self._data, memo), flags, context)
        result.requires_grad_(self.requires_grad)
        result.grad = copy.deepcopy(self.grad, memo)
        memo[id(self)] = result
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, (dims, key, merges) = self.__tensor_flatten__()
        parts = (self._data, self.flags, dims, key, merges, self.requires_grad)
        return _rebuild, parts

    def numpy(self, *, force: bool = False) -> NoReturn:
        """Refused: an array has no flags."""
        raise TypeError(
            "expected a plain tensor for numpy(), got a GuardedTensor whose flags an array cannot"
            " hold; call .unwrap().numpy() and keep .flags"
        )

    def __array__(self, dtype: Any = None, copy: Any = None) -> NoReturn:
        self.numpy()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "expected a plain tensor for DLPack, got a GuardedTensor whose flags it cannot hold;"
            " pass .unwrap() and keep .flags"
        )

    def apply_(self, callable: Any) -> NoReturn:
        """Refused: Python functions see the elements of plain tensors alone."""
        raise TypeError(
            "expected a plain tensor for apply_() and map_(), got a GuardedTensor; call them on"
            " .unwrap(), whose memory is the same"
        )

    def map_(self, tensor: Any, callable: Any) -> NoReturn:
        """Refused as :meth:`apply_`."""
        self.apply_(callable)

    @property
    def data(self) -> Any:
        """The same without autograd, as :meth:`detach`."""
        return self.detach()

    @data.setter
    def data(self, new: Any) -> NoReturn:
        raise TypeError(
            "expected a plain tensor to assign .data of, got a GuardedTensor, whose flags are of"
            " the data it has; make another by GuardedTensor(data, flags)"
        )

    def data_ptr(self) -> int:
        """Where the data begins in memory."""
        return self._data.data_ptr()

    def share_memory_(self) -> GuardedTensor:
        """Moves the data and the flags to memory that other processes can share."""
        self._data.share_memory_()  # type: ignore[no-untyped-call]
        self.flags.share_memory_()  # type: ignore[no-untyped-call]
        return self

    def is_shared(self) -> bool:
        """Whether the data lies in memory that other processes can share."""
        return bool(self._data.is_shared())  # type: ignore[no-untyped-call]

    def __format__(self, spec: str) -> str:
        """A number is formatted as one; anything else takes no specification."""
        return (
            format(self.item(), spec) if spec and not self.dim() else object.__format__(self, spec)
        )

    def tolist(self) -> Any:
        """The data as nested lists of numbers."""
        return self._data.tolist()


_guarded_wrap.wrapper = GuardedTensor
# Between two graphs they run as they are: what they make is no GuardedTensor until they are done.
never_a_frame(
    *(dispatch, build, _guarded_wrap.wrap, GuardedTensor.__torch_dispatch__),
    *(GuardedTensor.__new__, GuardedTensor.__tensor_flatten__, GuardedTensor.backward),
)


_in_transform: Any = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", None)


def _outside_of_transforms(data: Tensor) -> None:
    """Refuses what holds more than its elements: the wrapper would leave out the rest unseen."""
    if _in_transform is not None and _in_transform(data):
        raise RowsLost(
            "expected a tensor outside of torch.func's transforms to guard, got one inside of"
            " vmap, grad, jvp or functionalize; guard it before the transform, or not at all"
        )
    unpack: Any = forward_ad.unpack_dual
    if forward_ad._current_level >= 0 and unpack(data).tangent is not None:
        raise RowsLost(
            "expected a tensor without a tangent to guard, got a dual tensor of forward mode"
            " differentiation, which a GuardedTensor cannot carry on; guard its primal"
        )


def _fits(data: Tensor, flags: Tensor) -> None:
    _engine.is_ok(flags)  # says what is wrong with flags that are none
    if data.layout is not torch.strided or data.is_conj() or data.is_neg():
        raise TypeError(
            f"expected data that lies in memory as it is, got {data.layout}, conjugate"
            f" {data.is_conj()}, negative {data.is_neg()}; call to_dense(), resolve_conj() or"
            " resolve_neg() first"
        )
    samples = data.shape[0] if data.dim() else 1
    if flags.shape[0] != samples:
        raise BatchMismatchError(
            f"expected flags of the {samples} samples in data, got flags of {flags.shape[0]};"
            " make flags for this batch"
        )


def _attached(data: Tensor, flags: Tensor, config: ErrorConfig | int | None, merges: bool) -> Any:
    key = config if isinstance(config, int) else (config or get_config()).key
    dims = (0,) if data.dim() else ()
    carrier = build(data.detach(), flags, (dims, key, merges))
    carrier._given = False  # also where it is traced, it is made here
    if not (data.requires_grad and torch.is_grad_enabled()):
        return carrier
    return ops.ATTACH(data, carrier)


def _rebuild(  # noqa: PLR0917 - the order in which pickles hold them
    data: Tensor, flags: Tensor, dims: Any, key: int, merges: bool, requires_grad: bool
) -> Any:
    return build(data, flags, (tuple(dims), key, merges)).requires_grad_(requires_grad)


def _tangent(data: Tensor, context: Any) -> Any:
    """A gradient as compiled code takes it, with flags that nothing reads."""
    dims, key, _ = context
    samples = 1
    for dim in dims:
        samples *= data.shape[dim]
    gradient = build(data, _engine.new(samples, data.device, key), context)
    gradient._gradient = True
    return gradient


def _coerce(self: Tensor, context: Any, kind: Any = None) -> Any:
    return _tangent(self, context) if kind is GuardedTensor else None


def _accept_gradients() -> None:
    """Lets a compiled function that gave a GuardedTensor take a plain gradient for it.

    torch asks the gradient itself to become what was expected, so plain tensors have to know how;
    for any other expectation they answer as without this: not at all.
    """
    if not hasattr(Tensor, "__coerce_same_metadata_as_tangent__"):
        Tensor.__coerce_same_metadata_as_tangent__ = _coerce  # type: ignore[attr-defined]


_accept_gradients()
torch.serialization.add_safe_globals([_rebuild])


def _collate(batch: Any, *, collate_fn_map: Any = None) -> Any:
    """Samples as one batch, each with its flags."""
    return torch.stack(tuple(batch))


default_collate_fn_map[GuardedTensor] = _collate


def guard(x: Tensor, config: ErrorConfig | None = None, *, lost: Lost = "error") -> GuardedTensor:
    """``x`` (N, ...) with flags (N, words) that hold no errors; a GuardedTensor as it is.

    Args:
        x: the batch; it is shared, never copied or changed.
        config: the flags' layout and how they merge; None: the current configuration.
        lost: as :class:`GuardedTensor`.

    Raises:
        FlagsError: for a tensor without dimensions.
    """
    if isinstance(x, GuardedTensor):
        return x
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor (N, ...) to guard, got {type(x).__name__}")
    if config is not None and not isinstance(config, ErrorConfig):
        raise TypeError(f"expected config to be an ErrorConfig or None, got {config!r}")
    if x.dim() == 0:
        raise FlagsError("expected a batch (N, ...) to guard, got a tensor without dimensions")
    key = (get_config() if config is None else config).key
    # By the class, which Dynamo takes into a graph as it is, without a look at how it is built.
    guarded: GuardedTensor = GuardedTensor(
        x, _engine.new(x.shape[0], x.device, key), key, lost=lost
    )
    return guarded
