"""Class attributes that are imported when they are first read.

The classes a task wraps come from libraries that take seconds to import; naming one is to cost
nothing until an instance of the task is made.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from opguard.guards.locality import enter_local, leave_local

__all__ = ["Late"]


class Late:
    """Reads as ``module.name``, from the class and from its instances.

    Raises:
        ImportError: the library is not installed; the sentence says which extra brings it.
    """

    def __init__(self, module: str, name: str, *, extra: str) -> None:
        self._module = module
        self._name = name
        self._extra = extra

    def __repr__(self) -> str:
        return f"{self._module}.{self._name}"

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if self._name in vars(sys.modules.get(self._module, self)):
            return getattr(sys.modules[self._module], self._name)
        enter_local()  # importing diffusers imports bitsandbytes, which may ask the hub for code
        try:
            return getattr(importlib.import_module(self._module), self._name)
        except ModuleNotFoundError as error:
            if importlib.util.find_spec(self._module.partition(".")[0]) is not None:
                raise  # something that the library needs, which it names
            task = "a task" if owner is None else owner.__name__
            raise ImportError(
                f"{task}: expected the library {self._module}, it is not installed; "
                f"install opguard[{self._extra}]"
            ) from error
        finally:
            leave_local()
