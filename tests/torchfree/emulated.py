"""The CUDA driver of tests/core/cuda_driver.c: built once a process, and its controls."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OUT_OF_MEMORY = 2
ILLEGAL_ADDRESS = 700
HELD = ("used", "reserved", "mapped", "pinned", "events", "handles", "contexts", "depth")


@functools.cache
def driver_path() -> Path:
    """The library, built at the first use; a test is skipped where there is no gcc."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc to build the emulated driver with")
    target = Path(tempfile.mkdtemp(prefix="opguard-driver-")) / "libcuda.so.1"
    command = ["gcc", "-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    command += ["-pthread", f"-I{ROOT / 'csrc'}", str(ROOT / "tests" / "core" / "cuda_driver.c")]
    made = subprocess.run(
        [*command, "-o", str(target)], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr[-4000:]
    return target


class Emulated:
    """Controls of the emulated driver, and what it counted since they were made."""

    def __init__(
        self, nbytes: int = 64 << 20, unit: int = 1 << 16, maps: bool = True, marks: bool = True
    ) -> None:
        self.path = driver_path()
        self.library = ctypes.CDLL(str(self.path))
        self.library.emu_stream.restype = ctypes.c_void_p
        self.library.emu_calls.restype = ctypes.c_long
        self.library.emu_count.restype = ctypes.c_long
        # What an earlier test left for good, by a call that failed on purpose, does not count.
        self._before = {name: self._count(name) for name in HELD}
        self.library.emu_configure(
            ctypes.c_longlong(nbytes + self._before["used"]),
            ctypes.c_longlong(unit),
            int(maps),
            int(marks),
        )

    def fail(self, name: str, nth: int = 1, code: int = ILLEGAL_ADDRESS) -> None:
        """The nth call from now of a driver function ("*": of any) fails."""
        self.library.emu_fail(name.encode(), ctypes.c_long(nth), code)

    def break_down(self, code: int = ILLEGAL_ADDRESS) -> None:
        """From now on every call fails with this, as after a kernel that went wrong."""
        self.library.emu_break(code)

    @contextlib.contextmanager
    def capture(self, stream: int, mode: int = 0) -> Iterator[None]:
        """This thread captures a graph on a stream; AssertionError if that was spoilt.

        Args:
            stream: of this driver.
            mode: 0 is global, as torch.cuda.graph has it; 1 of this thread; 2 relaxed.
        """
        self.library.emu_capture(ctypes.c_void_p(stream), mode)
        try:
            yield
        finally:
            code = self.library.emu_end(ctypes.c_void_p(stream))
        assert code == 0, f"the capture was spoilt: {code}"

    def pause(self, seconds: float) -> None:
        """How long each copy takes to begin."""
        self.library.emu_pause(ctypes.c_long(int(seconds * 1e6)))

    def calls(self, name: str) -> int:
        return int(self.library.emu_calls(name.encode()))

    def count(self, what: str) -> int:
        """How many there are, or bytes, more than when this object was made."""
        return self._count(what) - self._before.get(what, 0)

    def _count(self, what: str) -> int:
        return int(self.library.emu_count(what.encode()))

    def stream(self) -> int:
        return int(self.library.emu_stream())

    def read(self, stream: int, address: int, nbytes: int, seconds: float = 0.0) -> None:
        """A kernel that reads a range, ``seconds`` after it begins."""
        self._kernel(self.library.emu_read, stream, address, nbytes, seconds)

    def add(self, stream: int, address: int, nbytes: int, seconds: float = 0.0) -> None:
        """A kernel that adds one to each byte."""
        self._kernel(self.library.emu_add, stream, address, nbytes, seconds)

    def _kernel(self, function, stream, address, nbytes, seconds) -> None:
        function(
            ctypes.c_void_p(stream),
            ctypes.c_void_p(address),
            ctypes.c_size_t(nbytes),
            ctypes.c_long(int(seconds * 1e6)),
        )

    def finish(self) -> None:
        """Until every stream has nothing left to do."""
        self.library.emu_finish()

    def hurry(self) -> None:
        """The same, and kernels that were queued by now take no time any more."""
        self.library.emu_hurry()
        self.finish()

    def left(self) -> dict[str, int]:
        """What is still held, by name; empty when all was given back."""
        return {name: count for name in HELD if (count := self.count(name))}
