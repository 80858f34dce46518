"""Whether code that torch.compile has just traced draws random numbers.

torch.cond (2.13) computes a branch again for its gradients, with other random numbers: its dropout
would differentiate a mask that was never applied. So branches that draw are selected otherwise.
"""

from __future__ import annotations

from typing import Any

__all__ = ["draws_since", "traced_so_far"]

_DRAWING = {
    "alpha_dropout_",
    "bernoulli",
    "bernoulli_",
    "cauchy_",
    "exponential_",
    "geometric_",
    "gumbel_softmax",
    "log_normal_",
    "multinomial",
    "normal",
    "normal_",
    "poisson",
    "rrelu",
    "uniform_",
}


def _nodes() -> list[Any]:
    """The nodes of the graph being traced; none where it is not Dynamo that traces."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return list(InstructionTranslator.current_tx().output.graph.nodes)
    except AttributeError:
        return []


def _argument(node: Any, name: str, place: int, default: Any) -> Any:
    return node.kwargs.get(name, node.args[place] if len(node.args) > place else default)


def _draws(node: Any) -> bool:
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if node.op not in ("call_function", "call_method"):
        return False
    if name == "scaled_dot_product_attention":
        return bool(_argument(node, "dropout_p", 4, 0.0) != 0.0)
    if "dropout" in name and not name.endswith("_"):
        training = _argument(node, "training", 2, True)
        return bool(_argument(node, "train", 2, training) is not False)
    return name in _DRAWING or "dropout" in name or name.startswith("rand")


def traced_so_far() -> int:
    """How many operations the graph holds; for :func:`draws_since`."""
    return len(_nodes())


def draws_since(count: int) -> bool:
    """Whether an operation after the first ``count`` draws random numbers."""
    return any(_draws(node) for node in _nodes()[count:])


# What torch.compiler.assume_constant_result sets: Dynamo calls these while it traces.
traced_so_far._dynamo_marked_constant = True  # type: ignore[attr-defined]
draws_since._dynamo_marked_constant = True  # type: ignore[attr-defined]
