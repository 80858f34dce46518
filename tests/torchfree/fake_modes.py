"""Modes and modules for tests without torch: what the guards' C core asks of torch.

``bind(C)`` binds them; ``state()`` tells what is on in this thread.
"""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

from fakes import FakeParameter, FakeTensor


class _State(threading.local):
    inference = False
    grad = True


_now = _State()


def state() -> tuple[bool, bool]:
    """(inference, grad) of this thread."""
    return _now.inference, _now.grad


class Inference:
    """On when made, off when released, as ``torch._C._InferenceMode``."""

    def __init__(self, on: bool) -> None:
        self._before = (_now.inference, _now.grad)
        _now.inference, _now.grad = on, not on

    def __del__(self) -> None:
        _now.inference, _now.grad = self._before


def set_grad(on: bool) -> None:
    _now.grad = on


def is_grad() -> bool:
    return _now.grad


def is_inference() -> bool:
    return _now.inference


class FakeModule:
    """A tree of modules with a mode; calling one adds a tensor with history."""

    def __init__(self, *children: FakeModule) -> None:
        self.training = True
        self._modules = {str(i): child for i, child in enumerate(children)}

    def train(self, mode: bool = True) -> FakeModule:
        self.training = mode
        for child in self._modules.values():
            child.train(mode)
        return self

    def __call__(self, value: Any) -> list[Any]:
        return [value, FakeTensor(2, requires_grad=True), self.training, state()]

    def modes(self) -> list[bool]:
        """Its own mode and those of all below it."""
        found = [self.training]
        for child in self._modules.values():
            found += child.modes()
        return found


class Autocast:
    def __init__(self, *settings: Any) -> None:
        self.calls: list[str] = []

    def enter(self) -> None:
        self.calls.append("enter")

    def leave(self) -> None:
        self.calls.append("leave")

    suspend = leave
    resume = enter


class Memory:
    def __init__(self, devices: Any) -> None:
        self.devices = devices

    def finish(self) -> None:
        pass


def bind(C: ModuleType) -> None:
    """Makes a bare ``_C`` work with the fakes."""
    C.bind_types(FakeTensor, FakeParameter)
    C.bind_guards(
        inference_type=Inference,
        is_inference=is_inference,
        set_grad=set_grad,
        is_grad=is_grad,
        module_type=FakeModule,
        module_train=FakeModule.train,
        autocast=Autocast,
        decorate=lambda guard, function: function,
        release=lambda devices, collect: None,
        measure=Memory,
        is_oom=lambda error: isinstance(error, MemoryError),
        await_warning=RuntimeWarning,
    )
