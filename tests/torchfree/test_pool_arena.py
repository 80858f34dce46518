"""Arenas of a GPU through an emulated driver: memory that comes and goes at one address."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import subprocess
import sys
import threading
import time

import pytest
from emulated import OUT_OF_MEMORY, Emulated

UNIT = 1 << 16


@pytest.fixture
def emulated():
    gc.collect()
    made = Emulated()
    yield made
    gc.collect()
    assert not made.left()
    assert made.count("misuse") == 0


def content(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def test_bytes_go_there_and_come_back(C, emulated):
    driver = C.DeviceDriver(emulated.path)
    arena = C.DeviceArena(driver, 100_000)
    assert (driver.granularity, driver.ordinal) == (UNIT, 0)
    assert (arena.nbytes, arena.mapped) == (2 * UNIT, 0)
    pinned = C.PinnedMemory(driver, 100_000)
    assert pinned.nbytes == 100_000
    data = content(100_000)
    pinned.fill(0, data)
    address = arena.address
    for _ in range(3):
        arena.map(0, arena.nbytes)
        assert arena.mapped == arena.nbytes == emulated.count("used")
        arena.copy_in(0, pinned, 0, 100_000)
        driver.copies().wait()
        back = C.PinnedMemory(driver, 100_000)
        arena.copy_out(0, back, 0, 100_000)
        driver.copies().wait()
        got = bytearray(100_000)
        assert back.pour(0, got) == 100_000
        assert got == data
        arena.unmap(0, arena.nbytes)
        assert arena.mapped == 0
        assert arena.address == address
    assert emulated.calls("cuMemAddressReserve") == 1


def test_one_copy_for_a_whole_model(C, emulated):
    driver = C.DeviceDriver(emulated.path)
    arena = C.DeviceArena(driver, 1 << 20)
    pinned = C.PinnedMemory(driver, 1 << 20)
    arena.map(0, arena.nbytes)
    arena.copy_in(0, pinned, 0, 1 << 20)
    driver.copies().wait()
    assert emulated.calls("cuMemcpyHtoDAsync_v2") == 1
    assert emulated.calls("cuCtxSynchronize") == 0


def test_copies_are_asynchronous_and_events_say_when(C, emulated):
    driver = C.DeviceDriver(emulated.path)
    arena = C.DeviceArena(driver, UNIT)
    pinned = C.PinnedMemory(driver, UNIT)
    pinned.fill(0, b"\1" * UNIT)
    arena.map(0, UNIT)
    emulated.pause(0.1)
    arena.copy_in(0, pinned, 0, UNIT)
    ready = driver.copies()
    assert not ready.done()
    stream = emulated.stream()
    ready.hold(stream)  # the kernel comes after the copy though nobody waited here
    emulated.read(stream, arena.address, UNIT)
    assert not ready.done()
    driver.work(stream).wait()
    assert ready.done()
    assert emulated.count("sum") == UNIT


def test_without_the_event_the_kernel_would_have_been_too_early(C, emulated):
    """The test above can fail: new memory is full of rubbish."""
    driver = C.DeviceDriver(emulated.path)
    arena = C.DeviceArena(driver, UNIT)
    pinned = C.PinnedMemory(driver, UNIT)
    arena.map(0, UNIT)
    emulated.pause(0.1)
    arena.copy_in(0, pinned, 0, UNIT)
    stream = emulated.stream()
    emulated.read(stream, arena.address, UNIT)
    driver.work(stream).wait()
    assert emulated.count("sum") == 0xA5 * UNIT
    driver.copies().wait()


@pytest.mark.parametrize("marks", [True, False], ids=["12.5", "older"])
def test_work_covers_streams_nobody_named(C, marks):
    emulated = Emulated(marks=marks)
    driver = C.DeviceDriver(emulated.path)
    arena = C.DeviceArena(driver, UNIT)
    arena.map(0, UNIT)
    for _ in range(2):
        emulated.read(emulated.stream(), arena.address, UNIT, seconds=0.05)
    driver.work().wait()
    assert emulated.count("sum") == 2 * 0xA5 * UNIT
    assert emulated.calls("cuCtxSynchronize") == (0 if marks else 1)
    arena.unmap(0, UNIT)


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, UNIT - 1, 5 * UNIT + 17])
def test_staging_through_a_small_ring(C, emulated, nbytes):
    driver = C.DeviceDriver(emulated.path, ring=4 * 4096)
    arena = C.DeviceArena(driver, nbytes)
    arena.map(0, arena.nbytes)
    data = content(nbytes)
    arena.stage_in(0, data)
    back = bytearray(nbytes)
    assert arena.stage_out(0, back) == nbytes
    assert back == data
    assert arena.stage_out(0, back) == 0
    if nbytes > 4096:
        back[4096] ^= 1
        assert arena.stage_out(0, back) == min(4096, nbytes - 4096)
        assert back == data
    assert emulated.count("pinned") == 1  # the ring, and nothing of the size of the data


def test_parts_come_and_go_alone(C, emulated):
    driver = C.DeviceDriver(emulated.path)
    arena = C.DeviceArena(driver, 4 * UNIT)
    arena.map(0, UNIT)
    arena.map(2 * UNIT, 4 * UNIT)
    assert arena.mapped == 3 * UNIT
    arena.stage_in(2 * UNIT, b"x" * (2 * UNIT))
    for wrong in ((UNIT, 3 * UNIT), (0, UNIT), (1, UNIT), (UNIT, UNIT), (3 * UNIT, 5 * UNIT)):
        with pytest.raises(ValueError, match="expected a part"):
            arena.map(*wrong)
    with pytest.raises(ValueError, match="as it was mapped"):
        arena.unmap(2 * UNIT, 3 * UNIT)
    with pytest.raises(ValueError, match="one mapped part"):
        arena.stage_in(UNIT, b"x")
    arena.unmap(0, UNIT)
    arena.map(0, 2 * UNIT)
    back = bytearray(2 * UNIT)
    arena.stage_out(2 * UNIT, back)
    assert back == b"x" * (2 * UNIT)


def test_a_full_gpu_is_a_memory_error_and_changes_nothing(C):
    emulated = Emulated(nbytes=3 * UNIT)
    driver = C.DeviceDriver(emulated.path)
    first, second = C.DeviceArena(driver, 2 * UNIT), C.DeviceArena(driver, 2 * UNIT)
    first.map(0, 2 * UNIT)
    assert driver.memory()[0] == UNIT
    with pytest.raises(MemoryError, match=r"making memory on GPU 0: CUDA_ERROR_OUT_OF_MEMORY"):
        second.map(0, 2 * UNIT)
    assert second.mapped == 0
    first.unmap(0, 2 * UNIT)
    second.map(0, 2 * UNIT)
    assert emulated.count("misuse") == 0


def script_of_everything(C, emulated):
    driver = C.DeviceDriver(emulated.path, ring=4 * 4096)
    arena = C.DeviceArena(driver, 2 * UNIT)
    pinned = C.PinnedMemory(driver, UNIT)
    pinned.fill(0, b"7" * UNIT)
    arena.map(0, UNIT)
    arena.map(UNIT, 2 * UNIT)
    arena.copy_in(0, pinned, 0, UNIT)
    arena.stage_in(UNIT, b"8" * UNIT)
    driver.copies().wait()
    driver.work().wait()
    back = bytearray(UNIT)
    arena.stage_out(0, back)
    assert back == b"7" * UNIT
    arena.copy_out(UNIT, pinned, 0, UNIT)
    driver.copies().wait()
    assert pinned.pour(0, back) == UNIT
    assert back == b"8" * UNIT
    arena.unmap(0, UNIT)
    pinned.close()
    pinned.close()


@pytest.mark.parametrize("code", [OUT_OF_MEMORY, 700])
def test_every_driver_call_may_fail(C, code):
    """The n-th call fails, for every n: an exception, and nothing is left behind."""
    emulated = Emulated()
    script_of_everything(C, emulated)
    failed = 0
    calm = 0
    for nth in range(1, 400):
        if calm > 60:  # more calls than freeing makes: the whole script is through
            break
        emulated = Emulated()
        emulated.fail("*", nth, code)
        try:
            script_of_everything(C, emulated)
        except (MemoryError, OSError, RuntimeError) as error:
            assert str(error)
            failed += 1
            calm = -1
        calm += 1
        emulated.fail("", 0, 0)
        left = emulated.left()
        # What fails while it frees leaves that, at most a device with its ring and four events.
        assert sum(count for name, count in left.items() if name != "used") <= 6, (nth, left)
        assert emulated.count("misuse") == 0, nth
    assert failed > 40


def test_closed_and_busy_memory_is_refused(C, emulated):
    driver = C.DeviceDriver(emulated.path)
    arena = C.DeviceArena(driver, UNIT)
    pinned = C.PinnedMemory(driver, UNIT)
    arena.map(0, UNIT)
    for at, nbytes in ((-1, 5), (UNIT, 1), (0, UNIT + 1)):
        with pytest.raises(ValueError, match="pinned block"):
            arena.copy_in(0, pinned, at, nbytes)
        if at >= 0:
            with pytest.raises(ValueError, match="pinned block"):
                pinned.fill(at, b"x" * nbytes)
    other = C.DeviceDriver(emulated.path)
    with pytest.raises(ValueError, match="own driver"):
        C.DeviceArena(other, UNIT).copy_in(0, pinned, 0, 1)
    pinned.close()
    assert pinned.nbytes == 0
    with pytest.raises(ValueError, match="closed"):
        arena.copy_in(0, pinned, 0, 1)
    for nbytes in (0, -1):
        with pytest.raises(ValueError, match="at least one byte"):
            C.DeviceArena(driver, nbytes)
        with pytest.raises(ValueError, match="at least one byte"):
            C.PinnedMemory(driver, nbytes)
    with pytest.raises(TypeError):
        C.DeviceArena("driver", 1)
    with pytest.raises(TypeError):
        C.DeviceEvent()
    for wrong in (-1, 1 << 70):
        with pytest.raises((OverflowError, TypeError)):
            driver.work(wrong)


def test_two_threads_on_one_arena(C, emulated):
    """The second is refused, and the ring serves two arenas in turn."""
    driver = C.DeviceDriver(emulated.path, ring=4 * 4096)
    arena = C.DeviceArena(driver, 16 * UNIT)
    arena.map(0, arena.nbytes)
    emulated.pause(0.002)
    thread = threading.Thread(target=arena.stage_in, args=(0, b"x" * (16 * UNIT)))
    thread.start()
    refused = 0
    while thread.is_alive():
        try:
            arena.stage_in(0, b"y")
        except RuntimeError as error:
            assert "another thread" in str(error)
            refused += 1
        time.sleep(0.005)
    thread.join()
    assert refused
    emulated.pause(0.0005)
    arenas = [C.DeviceArena(driver, 4 * UNIT) for _ in range(3)]
    wrong = []

    def use(one, seed: int) -> None:
        one.map(0, one.nbytes)
        for turn in range(3):
            data, back = content(one.nbytes, seed + turn), bytearray(one.nbytes)
            one.stage_in(0, data)
            one.stage_out(0, back)
            if back != data:
                wrong.append((seed, turn))

    threads = [threading.Thread(target=use, args=(one, 10 * i)) for i, one in enumerate(arenas)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong


def test_no_driver_no_gpu_no_maps(C, emulated):
    with pytest.raises(OSError, match="expected the CUDA driver"):
        C.DeviceDriver("/nowhere/libcuda.so.1")
    with pytest.raises(OSError, match="looking for a device on GPU 7"):
        C.DeviceDriver(emulated.path, 7)
    with pytest.raises(ValueError, match="ring"):
        C.DeviceDriver(emulated.path, ring=1)
    driver = C.DeviceDriver(Emulated(maps=False).path)
    assert driver.granularity == 0
    with pytest.raises(RuntimeError, match="maps memory"):
        C.DeviceArena(driver, 1)


def test_capsules_keep_the_arena(C, emulated):
    arena = C.DeviceArena(C.DeviceDriver(emulated.path), UNIT)
    capsules = [arena.dlpack(0, UNIT, 1), arena.dlpack(UNIT, 0, 1)]
    for wrong in ((-1, 1), (0, UNIT + 1), (UNIT + 1, 0)):
        with pytest.raises(ValueError, match="to lie in an arena"):
            arena.dlpack(*wrong, 1)
    del arena
    gc.collect()
    assert emulated.count("reserved") == 1
    del capsules
    assert emulated.count("reserved") == 0


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from conftest import load_extension
from emulated import Emulated
C, emulated = load_extension(), Emulated()
arena = C.DeviceArena(C.DeviceDriver(emulated.path), {unit})
arena.map(0, {unit})
stream = emulated.stream()
emulated.read(stream, arena.address, {unit}, seconds=0.1)
if {wait}:
    emulated.finish()
arena.unmap(0, {unit})
emulated.finish()
print("alive")
"""


@pytest.mark.parametrize("wait", [True, False], ids=["waited", "too early"])
def test_memory_unmapped_under_a_kernel_is_fatal(wait):
    """The emulation tells: who unmaps without waiting does not survive it."""
    folder = os.path.dirname(os.path.abspath(__file__))
    script = SCRIPT.format(folder=folder, unit=UNIT, wait=wait)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if "LD_PRELOAD" in environment:
        pytest.skip("an instrument answers the signal in its own way")
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment
    )
    if wait:
        assert (run.returncode, run.stdout) == (0, "alive\n"), run.stderr
    else:
        assert run.returncode < 0
        assert "alive" not in run.stdout


def bytes_without_forks() -> int:
    """Of this process's memory, what a child does not get."""
    found = size = 0
    with open("/proc/self/smaps") as file:
        for line in file:
            name, *values = line.split()
            if name == "Size:":
                size = int(values[0]) * 1024
            elif name == "VmFlags:" and "dc" in values:
                found += size
    return found


def test_a_forked_child_lets_the_gpu_alone(C, emulated):
    """Nor has it pinned memory: the first write after a fork would go to a page of one's own,
    which the GPU does not copy from."""
    kept = bytes_without_forks()
    driver = C.DeviceDriver(emulated.path)
    arena, block = C.DeviceArena(driver, UNIT), C.PinnedMemory(driver, 4096)
    assert bytes_without_forks() == kept + 4096
    arena.map(0, UNIT)
    child = os.fork()
    if child == 0:
        status = 0
        for call in (driver.memory, lambda: block.fill(0, b"2" * 4096)):
            try:
                call()
                status = 1
            except RuntimeError as error:
                status |= 0 if "fork" in str(error) else 2
        before = emulated.calls("cuMemUnmap")
        call = None
        del arena, block, driver
        gc.collect()
        os._exit(status or int(emulated.calls("cuMemUnmap") != before) * 3)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    arena.unmap(0, UNIT)


def beside_a_capture(emulated, stream: int, work) -> None:
    """Calls ``work`` while another thread captures a graph, as torch.cuda.graph does."""
    begun, over = threading.Event(), threading.Event()
    spoilt = []

    def capture() -> None:
        try:
            with emulated.capture(stream):
                begun.set()
                over.wait(10)
        except AssertionError as error:
            spoilt.append(error)

    thread = threading.Thread(target=capture)
    thread.start()
    begun.wait(10)
    try:
        work()
    finally:
        over.set()
        thread.join()
    assert not spoilt


def test_beside_a_capture_everything_goes_but_waiting_for_all(C, emulated):
    graph = emulated.stream()
    driver = C.DeviceDriver(emulated.path, ring=4 * 4096, streams=[emulated.stream(), graph])
    assert driver.capturing() is False
    before = driver.work()

    def everything() -> None:
        assert driver.capturing() is True
        arena = C.DeviceArena(driver, UNIT)
        pinned = C.PinnedMemory(driver, UNIT)
        pinned.fill(0, b"7" * UNIT)
        arena.map(0, UNIT)
        arena.copy_in(0, pinned, 0, UNIT)
        ready = driver.copies()
        ready.done()
        ready.hold(emulated.stream())
        ready.wait()
        back = bytearray(UNIT)
        arena.stage_out(0, back)
        assert back == b"7" * UNIT
        arena.stage_in(0, b"8" * UNIT)
        driver.copies().wait()
        with pytest.raises(RuntimeError, match="a graph is: waiting for all"):
            driver.work()
        before.wait()
        driver.memory()
        arena.unmap(0, UNIT)
        pinned.close()

    beside_a_capture(emulated, graph, everything)
    driver.work().wait()


@pytest.mark.parametrize("marks", [True, False], ids=["12.5", "older"])
def test_the_emulation_spoils_captures_as_the_driver_does(C, marks):
    """A stream that the driver was not told of: nobody could know."""
    emulated = Emulated(marks=marks)
    driver = C.DeviceDriver(emulated.path)
    with (
        pytest.raises(AssertionError, match="spoilt"),
        emulated.capture(emulated.stream(), 1),
        pytest.raises(RuntimeError, match="GPU 0"),
    ):
        driver.work()
    assert emulated.count("misuse") == 1
    assert emulated.calls("cuCtxSynchronize") == (0 if marks else 1)


def test_an_arena_that_dies_during_a_capture_waits_for_its_end(C, emulated):
    graph = emulated.stream()
    driver = C.DeviceDriver(emulated.path, streams=[graph])
    arena = [C.DeviceArena(driver, UNIT)]
    arena[0].map(0, UNIT)
    over = threading.Timer(0.1, lambda: emulated.library.emu_end(ctypes.c_void_p(graph)))
    with emulated.capture(graph):
        over.start()
        arena.clear()
        assert emulated.count("used") == 0
        over.join()


@pytest.mark.parametrize("function", ["cuCtxSynchronize", "cuStreamSynchronize"])
def test_memory_stays_where_nobody_can_wait_for_what_uses_it(C, function):
    emulated = Emulated()
    driver = C.DeviceDriver(emulated.path)
    arena, pinned = C.DeviceArena(driver, UNIT), C.PinnedMemory(driver, UNIT)
    arena.map(0, UNIT)
    arena.copy_in(0, pinned, 0, UNIT)
    emulated.fail(function)
    del arena
    pinned.close()
    assert emulated.count("misuse") == 0
    assert (emulated.count("used") > 0) == (function == "cuCtxSynchronize")
    assert (emulated.count("pinned") > 0) == (function == "cuStreamSynchronize")
    emulated.finish()


def test_a_second_gpu_is_another_context(C, emulated):
    """From a thread that has the first one current: what is made on one is used on that one."""
    first, second = (C.DeviceDriver(emulated.path, ordinal) for ordinal in (0, 1))
    assert second.ordinal == 1
    pinned = C.PinnedMemory(second, UNIT)
    arenas = [C.DeviceArena(driver, UNIT) for driver in (first, second)]
    for arena in arenas:
        arena.map(0, UNIT)
    arenas[1].copy_in(0, pinned, 0, UNIT)
    second.copies().wait()
    # Neither waits for the other's kernels.
    emulated.read(emulated.stream(), arenas[0].address, UNIT, seconds=0.2)
    second.work().wait()
    assert emulated.count("sum") == 0
    first.work().wait()
    assert emulated.count("sum") == 0xA5 * UNIT
    with pytest.raises(ValueError, match="own driver"):
        arenas[0].copy_in(0, pinned, 0, UNIT)


def test_a_gpu_that_broke_down_is_an_exception_each_time(C):
    """An error of a kernel sticks: every call fails from then on, and freeing is no crash."""
    emulated = Emulated()
    driver = C.DeviceDriver(emulated.path)
    arena, pinned = C.DeviceArena(driver, UNIT), C.PinnedMemory(driver, UNIT)
    arena.map(0, UNIT)
    emulated.break_down()
    calls = (
        driver.work,
        driver.copies,
        driver.memory,
        lambda: arena.unmap(0, UNIT),
        lambda: arena.copy_in(0, pinned, 0, UNIT),
        lambda: arena.stage_in(0, b"x"),
        lambda: C.PinnedMemory(driver, 1),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="700"):
            call()
    assert arena.mapped == UNIT
    pinned.close()
    assert emulated.count("misuse") == 0


def test_an_arena_that_dies_lets_other_threads_run(C, emulated):
    """It waits for what is queued on it."""
    driver = C.DeviceDriver(emulated.path)
    arena = C.DeviceArena(driver, UNIT)
    arena.map(0, UNIT)
    beats, over = [], threading.Event()

    def beat():
        while not over.wait(0.01):
            beats.append(time.monotonic())

    thread = threading.Thread(target=beat)
    thread.start()
    emulated.add(emulated.stream(), arena.address, UNIT, 0.3)
    begun = time.monotonic()
    del arena
    ended = time.monotonic()
    over.set()
    thread.join()
    assert ended - begun > 0.2
    assert sum(begun < at < ended - 0.05 for at in beats) >= 3
