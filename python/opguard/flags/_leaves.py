"""Which modules of a model are looked at, by which names, and where their answers are batched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

__all__ = ["Dims", "Leaf", "bare", "batch_dims", "ends_in", "leaves_of"]

# The tensors in what a module returned, each with its batch dimension; None where it has none.
Dims = Callable[[Any], "list[tuple[Tensor, int | None]]"]

# Hold modules and are never called.
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# Have modules inside that they do not call as modules.
WHOLE = (nn.MultiheadAttention, torch.jit.ScriptModule)
# Wrap a model of which they are no part; by name, for importing them takes long.
WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


class Leaf(NamedTuple):
    """A module without modules of its own, by its qualified name in the model."""

    name: str
    module: nn.Module


def bare(model: nn.Module) -> nn.Module:
    """The model whose hooks run: what torch.compile was given, for what it returned."""
    inner = model
    while type(inner).__name__ == "OptimizedModule":
        inner = inner._modules["_orig_mod"] or inner
    return inner


def leaves_of(root: nn.Module) -> list[Leaf]:
    """The leaves in the order of ``named_modules``, each once; a wrapper adds nothing to a name.

    Parametrizations are no leaves: they make weights, whose rows are no samples.
    """
    found: list[Leaf] = []
    seen: set[nn.Module] = set()
    stack = [("", root)]
    while stack:
        name, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        inner = [
            (key, child)
            for key, child in module._modules.items()
            if child is not None and key != "parametrizations"
        ]
        if isinstance(module, WHOLE) or not inner:
            if not isinstance(module, CONTAINERS):
                found.append(Leaf(name, module))
            continue
        wrapped = WRAPPERS.get(type(module).__name__)
        stack += [
            (name if key == wrapped else f"{name}.{key}".strip("."), child)
            for key, child in reversed(inner)
        ]
    return found


def ends_in(root: nn.Module, modules: list[nn.Module]) -> bool:
    """Whether what ``root`` returns is what one of ``modules`` returned, and nothing else."""
    while type(root) is nn.Sequential and len(root):
        root = root[-1]
    return any(root is module for module in modules)


def batch_dims(module: nn.Module) -> Dims | None:
    """How to find the batch in what ``module`` returns; None: in dim 0 of every tensor."""
    if isinstance(module, nn.RNNBase):
        return _of_batch_first_rnn if module.batch_first else _of_rnn
    if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
        return _of_attention
    return None


def _of_rnn(output: Any, batch: int = 1) -> list[tuple[Tensor, int | None]]:
    """The output, by time and batch or the other way, and the states, (layers, batch, width)."""
    steps, states = output
    found: list[tuple[Tensor, int | None]] = []
    if isinstance(steps, PackedSequence):  # its rows are steps of all sequences
        found.append((steps.data, None))
    else:
        found.append((steps, batch if steps.dim() == 3 else None))
    for state in states if isinstance(states, tuple) else (states,):
        found.append((state, 1 if state.dim() == 3 else None))
    return found


def _of_batch_first_rnn(output: Any) -> list[tuple[Tensor, int | None]]:
    return _of_rnn(output, 0)


def _of_attention(output: Any) -> list[tuple[Tensor, int | None]]:
    """The answers, (steps, batch, width), and the weights, which begin with the batch."""
    answers, weights = output
    batched = answers.dim() == 3
    found: list[tuple[Tensor, int | None]] = [(answers, 1 if batched else None)]
    if weights is not None:
        found.append((weights, 0 if batched else None))
    return found
