"""Guards with the n-th allocation failing, for n from 0 up: no crash, everything put back."""

from __future__ import annotations

import _testcapi
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "torchfree"))

from conftest import load_extension

C = load_extension()
RANGE = 400


class Modes:
    inference, grad = False, True


class Inference:
    def __init__(self, on):
        self.before = Modes.inference, Modes.grad
        Modes.inference, Modes.grad = on, not on

    def __del__(self):
        Modes.inference, Modes.grad = self.before


class Module:
    def __init__(self, *children):
        self.training = True
        self._modules = {str(i): child for i, child in enumerate(children)}

    def train(self, mode=True):
        self.training = mode
        for child in self._modules.values():
            child.train(mode)


class Own(Module):
    def train(self, mode=True):
        Module.train(self, mode)


C.bind_guards(
    inference_type=Inference,
    is_inference=lambda: Modes.inference,
    set_grad=lambda on: setattr(Modes, "grad", on),
    is_grad=lambda: Modes.grad,
    module_type=Module,
    module_train=Module.train,
)
MODEL = Module(Module(), Own(Module()), *[Module() for _ in range(80)])
NONE = (None,) * 5


def body():
    yield [1]
    yield 2


def enter():
    with C.Guard(1, 3, (MODEL,), *NONE) as g:
        g([1])
        g(len, "a")


def overlap():
    first, second = C.Guard(0, 2, (MODEL,), *NONE), C.Guard(0, 2, (MODEL,), *NONE)
    first.__enter__()
    try:
        second.__enter__()
    except MemoryError:
        first.__exit__(None, None, None)
        raise
    try:
        first.__exit__(None, None, None)
    finally:
        second.__exit__(None, None, None)


def steps():
    stepper = C.Guard().step(body(), True)
    next(stepper)
    next(stepper)
    stepper.close()


def fail():
    try:
        with C.Guard():
            raise ValueError("x")
    except ValueError:
        pass


def run():
    C.Guard().run(list, (), {})


def put_back() -> bool:
    modules = [MODEL, *MODEL._modules.values(), *MODEL._modules["1"]._modules.values()]
    return (Modes.inference, Modes.grad) == (False, True) and all(m.training for m in modules)


def main() -> int:
    sys.unraisablehook = lambda info: None
    for function in (enter, overlap, steps, fail, run):
        function()
        failures = 0
        for n in range(RANGE):
            _testcapi.set_nomemory(n, n + 1)
            try:
                function()
            except MemoryError:
                failures += 1
            finally:
                _testcapi.remove_mem_hooks()
            if not put_back():
                print(f"{function.__name__}: allocation {n} failed and not all is put back")
                return 1
        print(f"{function.__name__}: {failures} failures")
        if not 0 < failures < RANGE:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
