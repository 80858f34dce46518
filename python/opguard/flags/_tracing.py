"""What torch.compile has to be told of checked models and functions.

Dynamo traces hooks and decorators that it meets inside a graph. Two things it does not know: that
those which run outside are no frames to compile, and that a model it compiled before has other
hooks now.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

__all__ = ["break_graph", "compile_anew", "never_a_frame"]

logger = logging.getLogger("opguard")


def never_a_frame(*functions: Callable[..., Any]) -> None:
    """Keeps Dynamo from compiling calls of ``functions`` that no graph contains.

    It inlines them into graphs as before. A compiled model runs its own hooks outside its graph,
    and their frames would be compiled one by one, and anew for each number of samples.
    """
    try:
        frames = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        how = frames._FrameExecStrategy(skip, skip)
        for function in functions:
            frames.set_code_exec_strategy(function.__code__, how)
    except (AttributeError, TypeError):
        return  # another torch calls it otherwise: slower, and right


def compile_anew(models: Iterable[torch.nn.Module]) -> None:
    """Forgets what torch.compile made of ``models``: it does not notice that hooks came or went."""
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    if frames is None:
        return
    forget = getattr(frames, "remove_from_cache", None)
    if forget is None:
        logger.warning(
            "check_model: torch %s offers no way to forget what it compiled; call"
            " torch._dynamo.reset(), or a model compiled before keeps its hooks as they were",
            torch.__version__,
        )
        return
    kinds = {type(module) for model in models for module in model.modules()}
    # Not by kind.forward, which a scripted module's class does not have without an instance.
    forwards = (inspect.getattr_static(kind, "forward", None) for kind in kinds)
    for code in {getattr(forward, "__code__", None) for forward in forwards} - {None}:
        forget(code)


def break_graph() -> None:
    """Not to be traced: what on_flag does is Python's, between two graphs."""


break_graph._torchdynamo_disable = True  # type: ignore[attr-defined]
break_graph._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "check_model(on_flag=...) reads flags between two graphs; compile the checked model itself, "
    "or leave on_flag out and read .flags"
)
