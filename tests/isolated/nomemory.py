"""Every C entry point with Python's n-th allocation failing, for every n.

    nomemory.py [NAME ...]      the extension is OPGUARD_C

A scenario may end well or in MemoryError; anything else, a crash included, is a failure. Prints one
line a scenario and exits 1 if any failed. Runs without torch.
"""

from __future__ import annotations

import _imp
import _testcapi
import faulthandler
import gc
import os
import shutil
import sys
import tempfile
import types
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parents[1] / "torchfree"))

from conftest import load_extension
from fake_modes import FakeModule, bind, state
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
        # Without its traceback it is in no ring with this frame: Python 3.11 keeps sixteen
        # MemoryErrors for when there is no memory, and dies when all of them are in use.
        raised = error.with_traceback(None)
    finally:
        _testcapi.remove_mem_hooks()
    return raised


def run(name: str, make: Scenario) -> list[str]:
    """One and three failing allocations at every place, then all of them from every place."""
    failed, ended_well = [], 0
    widths = [1, 3]
    # The interpreter itself gives up when its own frames find no memory to raise with.
    if make().__name__ == "<lambda>":
        widths.append(0)
    for width in widths:
        quiet = 0
        for first in range(MOST):
            prepared = make()
            gc.disable()
            raised = attempt(prepared, first, first + width if width else 0)
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
    def exchange_paths() -> Callable[[], object]:
        folder = tempfile.TemporaryDirectory()
        paths = [os.path.join(folder.name, name) for name in ("first", "second")]
        for path in paths:
            os.mkdir(path)
        return lambda: (C.exchange_paths(*paths), folder)[0]

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

    def guard(kind: int, flags: int, *models: FakeModule) -> object:
        return C.Guard(kind, flags, models or None, None, None, None, None, None)

    @scenario
    def guard_plain() -> Callable[[], object]:
        value = [FakeTensor(2, requires_grad=True)]

        def calling() -> object:
            with C.Guard() as g:
                return g(value)

        return calling

    @scenario
    def guard_model() -> Callable[[], object]:
        model = FakeModule(FakeModule(), FakeModule(FakeModule()))
        settings = (1, 3, (model,), ("cpu", None), None, None, None, None)

        def calling() -> object:
            try:
                with C.Guard(*settings) as g:
                    out = g(model, 3)
                return out, g.memory, g.settings
            finally:
                _testcapi.remove_mem_hooks()
                # Modules may stay in eval, with the MemoryError that says so; the thread may not.
                assert state() == (False, True)

        return calling

    @scenario
    def guard_run_failing() -> Callable[[], object]:
        model = FakeModule(FakeModule())
        g = guard(2, 3, model)

        def fail(*args: object) -> None:
            raise KeyError(*args)

        def calling() -> object:
            try:
                return g.run(fail, (FakeTensor(3),), {})
            except KeyError as error:
                return error
            finally:
                _testcapi.remove_mem_hooks()
                # Modules may stay in eval, with the MemoryError that says so; the thread may not.
                assert state() == (False, True)

        return calling

    @scenario
    def guard_step() -> Callable[[], object]:
        def body() -> object:
            got = yield [FakeTensor(2, requires_grad=True)]
            yield got

        g = guard(1, 3)

        def calling() -> object:
            step = g.step(body(), True)
            try:
                next(step)
                step.send(1)
                step.throw(KeyError("thrown"))
                return step.close()
            except KeyError as error:
                return error
            finally:
                del step
                _testcapi.remove_mem_hooks()
                assert state() == (False, True)

        return calling

    @scenario
    def guard_sanitize() -> Callable[[], object]:
        error = failing(2)
        return lambda: C.guard_sanitize(error, None, (KeyError,))

    @scenario
    def bind_guards() -> Callable[[], object]:
        return lambda: C.bind_guards(await_warning=RuntimeWarning)

    class Placed:
        def __init__(self) -> None:
            self._opguard_location = (7, 3)

    def long(*args: object) -> object:
        return list(args)

    def flags_bound() -> None:
        names = "check check_ index push push_ merge merge_ find is_ok is_err count max_severity"
        more = ("gather", "new", "read", "read_all")
        C.flags_bind(**dict.fromkeys([*names.split(), *more], long))
        C.flags_bind(resolve=len)
        C.flags_epoch(7)

    @scenario
    def flags_bind() -> Callable[[], object]:
        return flags_bound

    @scenario
    def flags_record() -> Callable[[], object]:
        flags_bound()
        t, places = FakeTensor(2, 3), (Placed(), "abc", 5, None)

        def calling() -> object:
            for place in places:
                C.flags_check(t, place, None, 7, 16)
                C.flags_check_(t, place, t, 7, 16)
                C.flags_index(t, 9, place, t, 16)
                C.flags_push(t, t, 1, place, None, 16)
                C.flags_push_(t, None, 9, place, 2, 16, 3)
            C.flags_merge([t, t], 16)
            C.flags_gather(t, t, 16)
            return C.flags_merge_(t, t, 16)

        return calling

    @scenario
    def flags_ask() -> Callable[[], object]:
        flags_bound()
        t = FakeTensor(2, 3)

        def calling() -> object:
            C.flags_find(t, 60, 4)
            C.flags_is_ok(t)
            C.flags_is_err(t)
            C.flags_count(t)
            C.flags_max_severity(t)
            C.flags_new(3, None, 16)
            C.flags_read(t, 0)
            return C.flags_read_all(t, None)

        return calling

    first, second = (os.memfd_create("pages") for _ in range(2))

    @scenario
    def pool_pages() -> Callable[[], object]:
        for fd in (first, second):
            os.ftruncate(fd, 12288)

        def calling() -> object:
            pages = C.SpillMap(first, 4096, 8192)
            memoryview(pages)[5000] = 1
            pages.check()
            pages.populate(0, 4096)
            pages.changed()
            pages.give_back()
            pages.resident()
            pages.move(second)
            pages.fileno()
            return pages.address, pages.nbytes, pages.method, pages.broken, pages.writable

        return calling

    streams: list[int] = []  # a thread each, for as long as the process

    @scenario
    def pool_arena() -> Callable[[], object]:
        if shutil.which("gcc") is None:
            return lambda: None
        from emulated import Emulated

        emulated = Emulated()
        path = str(emulated.path)
        if not streams:
            streams.append(emulated.stream())
        source, target = b"x" * 4096, bytearray(4096)

        def calling() -> object:
            driver = C.DeviceDriver(path, 0, 1 << 14, streams)
            arena = C.DeviceArena(driver, 1 << 16)
            pinned = C.PinnedMemory(driver, 4096)
            arena.map(0, 1 << 16)
            pinned.fill(0, source)
            arena.copy_in(0, pinned, 0, 4096)
            copied = driver.copies()
            copied.hold(0)
            copied.wait()
            copied.done()
            arena.stage_in(4096, source)
            arena.stage_out(0, target)
            arena.copy_out(0, pinned, 0, 4096)
            driver.work(0).wait()
            driver.work().wait()
            pinned.pour(0, target)
            pinned.close()
            capsule = arena.dlpack(0, 4096, 1)
            arena.unmap(0, 1 << 16)
            seen = driver.memory(), driver.capturing()
            return seen, arena.address, arena.nbytes, arena.mapped, capsule

        return calling

    @scenario
    def ledger() -> Callable[[], object]:
        books = C.Ledger()
        books.add_pool(100)
        one, two = books.add_owner(0, 1), books.add_owner(0, 2)
        units = tuple(books.add_unit(0, size) for size in (20, 20, 20, 40))
        held = books.request(one, units[:3], ((0, 10),))
        for unit in held.load:
            books.loaded(unit)
        seen = books.pool(0)

        def calling() -> object:
            C.Ledger().add_pool(1)
            books.drop_owner(books.add_owner(one))
            books.remove_unit(books.add_unit(0, 5))
            books.enter(one, units[:1])
            books.leave(one, units[:1])
            books.holders(units[0])
            books.units(0)
            books.request(two, units[2:], (), 0, C.POOL_TRY)
            ticket = books.request(two, units[3:], ((0, 20),)).ticket
            try:
                books.waiting()
                books.leave(one, units[:3], ((0, 10),))
                books.pump()
                books.reclaim(0, 0)
            finally:
                books.cancel(ticket)
            granted = books.request(one, units[:3], ((0, 10),))
            assert granted.verdict == C.POOL_GRANTED
            assert books.pool(0) == seen
            return C.Ledger

        return calling

    @scenario
    def a_new_module() -> Callable[[], object]:
        spec = C.__spec__

        def calling() -> object:
            module = _imp.create_dynamic(spec)
            _imp.exec_dynamic(module)
            return module

        return calling


def lease_scenarios(C: ModuleType) -> None:
    def pool_seat() -> tuple[object, object]:
        ledger = C.Ledger()
        pool = ledger.add_pool(1000)
        C.pool_owner(ledger)  # ContextVar.set without memory for its token takes CPython down

        def enter(seat: object, owner: object, timeout: object) -> object:
            for unit in ledger.request(owner.id, seat.units).load:
                ledger.loaded(unit)
            return ((pool, 0),)

        return ledger, C.Seat(ledger, (ledger.add_unit(pool, 10), ledger.add_unit(pool, 20)), enter)

    def pool_is_free(ledger: object, seat: object) -> None:
        left = [ledger.unit(unit).leases for unit in seat.units]
        if any(left) or seat.leases:
            raise AssertionError(f"leases left: {left}, {seat.leases}")

    @scenario
    def pool_lease() -> Callable[[], object]:
        ledger, seat = pool_seat()

        def calling() -> object:
            try:
                lease = C.Lease(seat, "value", None, list)
                with lease, lease:
                    C.pool_owner(ledger).held
                    C.pool_owners(ledger)
            finally:
                _testcapi.remove_mem_hooks()
                pool_is_free(ledger, seat)

        return calling

    @scenario
    def pool_lease_of_tasks() -> Callable[[], object]:
        ledger, seat = pool_seat()
        with C.Lease(seat):
            pass

        async def use() -> None:
            async with C.Lease(seat):
                pass

        def calling() -> object:
            try:
                return use().send(None)
            except StopIteration:
                return None
            finally:
                _testcapi.remove_mem_hooks()
                pool_is_free(ledger, seat)

        return calling

    @scenario
    def pool_lease_that_others_wait_for() -> Callable[[], object]:
        ledger, seat = pool_seat()
        other = C.Seat(ledger, (ledger.add_unit(0, 10),), seat.enter_slow, lambda seat: None)
        with C.Lease(other):
            pass
        held, told = C.Lease(seat), []
        held.__enter__()
        ledger.request(ledger.add_owner(), (ledger.add_unit(0, 995),))

        async def use() -> None:
            async with C.Lease(other):
                pass

        def calling() -> object:
            before, sys.unraisablehook = sys.unraisablehook, told.append
            try:
                return use().send(None)
            except StopIteration:
                return held
            finally:
                _testcapi.remove_mem_hooks()
                sys.unraisablehook = before
                if any(one.exc_type is SystemError for one in told):
                    raise AssertionError("a function was called with an exception set")
                pool_is_free(ledger, other)

        return calling

    @scenario
    def pool_lease_adopted() -> Callable[[], object]:
        ledger, seat = pool_seat()
        with C.Lease(seat):
            pass
        owner = C.pool_owner(ledger)

        def calling() -> object:
            lease = C.Lease(seat)
            ledger.enter(owner.id, seat.units)
            lease.adopt(owner, ((0, 0),))
            lease.__exit__(None, None, None)

        return calling

    @scenario
    def pool_forward() -> Callable[[], object]:
        class Model:
            def forward(self, *args: object, **kwargs: object) -> object:
                return args, kwargs

        ledger, seat = pool_seat()
        model = Model()

        def calling() -> object:
            try:
                forward = C.LeasedForward(seat, Model.forward, model)
                forward.prepare = lambda args, kwargs: (args, kwargs)
                forward.__wrapped__.__name__
                return forward(1, 2, x=3), forward.__code__, forward.seat
            finally:
                _testcapi.remove_mem_hooks()
                pool_is_free(ledger, seat)

        return calling

    @scenario
    def pool_seats() -> Callable[[], object]:
        ledger, seat = pool_seat()

        def calling() -> object:
            seat.units = (*seat.units[:1], *seat.units[1:])
            return C.Seat(ledger, seat.units, None, None).units

        return calling


def main(names: list[str]) -> int:
    faulthandler.enable()
    # A generator that is freed without memory says so by this hook; that is CPython's to tell.
    sys.unraisablehook = lambda told: None
    C = load_extension()
    bind(C)
    scenarios_of(C)
    lease_scenarios(C)
    failed = []
    for name, make in SCENARIOS.items():
        if not names or name in names:
            print(name, flush=True)
            failed += run(name, make)
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
