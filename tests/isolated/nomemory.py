"""Every C entry point with one Python allocation failing, then with all failing from there on.

    nomemory.py [NAME ...]      the extension is OPGUARD_C

A scenario may end well or in MemoryError; anything else, a crash included, is a failure. Prints one
line a scenario and exits 1 if any failed. Runs without torch.
"""

from __future__ import annotations

import _imp
import _testcapi
import faulthandler
import gc
import sys
import types
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parents[1] / "torchfree"))

from conftest import load_extension
from fakes import FakeParameter, FakeTensor

MOST = 1500  # more allocations than any scenario makes
Scenario = Callable[[], Callable[[], object]]
SCENARIOS: dict[str, Scenario] = {}


def scenario(make: Scenario) -> Scenario:
    """make() prepares, with memory; what it returns is run without."""
    SCENARIOS[make.__name__] = make
    return make


def attempt(prepared: Callable[[], object], first: int, stop: int) -> BaseException | None:
    """The exception the call ended in; the hook is off again whatever happens."""
    raised = None
    _testcapi.set_nomemory(first, stop)
    try:
        prepared()
    except BaseException as error:
        _testcapi.remove_mem_hooks()
        raised = error
    finally:
        _testcapi.remove_mem_hooks()
    return raised


def run(name: str, make: Scenario) -> list[str]:
    """One failing allocation at every place, then everything failing from every place."""
    failed, ended_well = [], 0
    for every in (False, True):
        quiet = 0
        for first in range(MOST):
            prepared = make()
            gc.disable()
            raised = attempt(prepared, first, 0 if every else first + 1)
            gc.enable()
            if raised is None:
                ended_well += 1
                quiet += 1
            else:
                quiet = 0
                if not isinstance(raised, MemoryError):
                    failed.append(f"{name}: allocation {first} failed, {raised!r} came of it")
            del prepared, raised
            # A call that swallows failures ends well each time: 300 calm ones in a row are the end.
            if quiet > 300:
                break
    if not ended_well:
        failed.append(f"{name}: never ended well")
    return failed


class Holder:
    """An object with slots and attributes of its own."""

    __slots__ = ("__dict__", "slotted")

    def __init__(self, leaf: FakeTensor) -> None:
        self.slotted = leaf
        self.leaf = [leaf]


class Refusing(list):
    """A container that cannot be read."""

    def __init__(self, leaf: FakeTensor) -> None:
        super().__init__([leaf])

    def __iter__(self):  # type: ignore[no-untyped-def]
        raise TypeError("no")

    def __len__(self) -> int:
        return 7


def scenarios_of(C: ModuleType) -> None:
    """Defines what needs the module; kept in one place, one function an entry point."""

    def failing(depth: int) -> BaseException:
        held = [FakeTensor(2, 3)]

        def fall(n: int) -> None:
            mine = FakeTensor(n + 1, requires_grad=True)
            if n == 0:
                raise ValueError("deep", mine, {"in": [held[0]]})
            fall(n - 1)

        try:
            fall(depth)
        except ValueError as error:
            try:
                raise RuntimeError("above", held) from error
            except RuntimeError as above:
                return above
        raise AssertionError

    @scenario
    def sanitize_exception() -> Callable[[], object]:
        error = failing(4)
        return lambda: C.sanitize_exception(error)

    @scenario
    def sanitize_group() -> Callable[[], object]:
        group = BaseExceptionGroup("many", [failing(1), failing(2)])
        group.payload = {"t": FakeTensor(1)}
        return lambda: C.sanitize_exception(group, None, (StopIteration,), True)

    @scenario
    def sanitize_exit() -> Callable[[], object]:
        error, handled = failing(2), failing(1)
        return lambda: C.sanitize_exit(error, handled, ())

    @scenario
    def bind_types() -> Callable[[], object]:
        return lambda: C.bind_types(FakeTensor, FakeParameter)

    @scenario
    def ops_info() -> Callable[[], object]:
        def calling() -> object:
            try:
                return C.ops_info()
            except RuntimeError as error:
                if "import opguard" not in str(error):
                    raise
            return None

        return calling

    @scenario
    def load_ops() -> Callable[[], object]:
        def calling() -> object:
            try:
                return C.load_ops("/no/such/library.so")
            except ImportError:
                return None

        return calling

    def containers() -> list[object]:
        """Every kind of container, a ring and the same leaf twice."""
        leaf, plain = FakeTensor(2, requires_grad=True), FakeTensor(3)
        ring: list[object] = [leaf]
        ring.append(ring)
        named = namedtuple("named", "a b")
        bag = types.SimpleNamespace(t=leaf, plain=plain)
        return [
            leaf, FakeParameter(), (leaf, plain), ring, {"k": leaf, 2: [plain]}, named(leaf, 1),
            {leaf}, frozenset((leaf, plain)), deque([leaf], 3), OrderedDict(a=leaf),
            defaultdict(list, a=[leaf]), bag, Holder(leaf), types.MappingProxyType({"p": leaf}),
            FakeTensor(2, device="far"), FakeTensor(2, device="meta"), "text", 1.5, None,
        ]  # fmt: skip

    @scenario
    def detach() -> Callable[[], object]:
        value = containers()
        return lambda: C.detach(value, False)

    @scenario
    def detach_copy() -> Callable[[], object]:
        value = containers()
        return lambda: C.detach(value, True, ())

    @scenario
    def detach_refused() -> Callable[[], object]:
        value = {"deep": [Refusing(FakeTensor(1, requires_grad=True))]}

        def calling() -> object:
            try:
                return C.detach(value)
            except TypeError:
                return None

        return calling

    @scenario
    def register_detach() -> Callable[[], object]:
        made = type("Made", (), {})
        value = [made(), made()]

        def calling() -> object:
            C.register_detach(made, lambda value, detach: detach([]))
            try:
                return C.detach(value)
            finally:
                C.register_detach(made, None)

        return calling

    @scenario
    def detach_bind() -> Callable[[], object]:
        return lambda: C.detach_bind(lambda kind: None, None, None, None, None, {})

    @scenario
    def a_new_module() -> Callable[[], object]:
        spec = C.__spec__

        def calling() -> object:
            module = _imp.create_dynamic(spec)
            _imp.exec_dynamic(module)
            return module

        return calling


def main(names: list[str]) -> int:
    faulthandler.enable()
    # A generator that is freed without memory says so by this hook; that is CPython's to tell.
    sys.unraisablehook = lambda told: None
    C = load_extension()
    C.bind_types(FakeTensor, FakeParameter)
    scenarios_of(C)
    failed = []
    for name, make in SCENARIOS.items():
        if not names or name in names:
            print(name, flush=True)
            failed += run(name, make)
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
