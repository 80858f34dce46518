"""How the hooks of a checked model and torch.compile get along.

Dynamo traces hooks that it meets inside a graph. Two things it has to be told: that hooks which
run outside are no frames to compile, and that a model it compiled before has other hooks now.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

__all__ = ["compile_anew", "never_a_frame"]


def never_a_frame(*functions: Callable[..., Any]) -> None:
    """Keeps Dynamo from compiling calls of ``functions`` that no graph contains.

    A compiled model runs its own hooks outside its graph, and their frames would be compiled one by
    one, and anew for each number of samples.
    """
    try:
        frames = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        how = frames._FrameExecStrategy(skip, skip)
        for function in functions:
            frames.set_code_exec_strategy(function.__code__, how)
    except AttributeError:
        return  # another torch calls it otherwise: slower, and right


def compile_anew(models: Iterable[torch.nn.Module]) -> None:
    """Forgets what torch.compile made of ``models``: it does not notice that hooks came or went."""
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    if frames is None:
        return
    kinds = {type(module) for model in models for module in model.modules()}
    # Not by kind.forward, which a scripted module's class does not have without an instance.
    forwards = (inspect.getattr_static(kind, "forward", None) for kind in kinds)
    for code in {getattr(forward, "__code__", None) for forward in forwards} - {None}:
        frames.remove_from_cache(code)
