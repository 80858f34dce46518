"""SpillMap on its own: what goes to the file, what stays, and what is refused."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import gc
import mmap
import os
import signal
import sys
import threading
import warnings

import pytest

PAGE = os.sysconf("SC_PAGESIZE")
METHODS = ["scan", "pagemap", "compare"]


@pytest.fixture
def file(tmp_path):
    with open(tmp_path / "weights", "w+b", buffering=0) as opened:
        opened.write(bytes(range(256)) * (4 * PAGE // 256))
        yield opened


def content(file) -> bytes:
    return os.pread(file.fileno(), 1 << 20, 0)


@pytest.mark.parametrize("method", METHODS)
def test_changed_pages_go_to_the_file_and_no_others(C, file, method):
    before = content(file)
    pages = C.SpillMap(file.fileno(), PAGE, 3 * PAGE, method)
    view = memoryview(pages)
    assert (pages.nbytes, len(view), pages.method) == (3 * PAGE, 3 * PAGE, method)
    assert view == before[PAGE:]
    assert pages.changed() == 0
    view[PAGE + 5] = 77
    assert content(file) == before
    assert pages.changed() == pages.changed(PAGE, 2 * PAGE) == PAGE
    assert pages.changed(0, PAGE) == 0
    assert pages.give_back(0, PAGE) == 0
    assert pages.give_back() == PAGE
    assert pages.changed() == 0
    assert view[PAGE + 5] == 77
    assert content(file) == before[: 2 * PAGE + 5] + b"M" + before[2 * PAGE + 6 :]
    pages.check()


def test_resident_pages(C, file):
    pages = C.SpillMap(file.fileno(), 0, 4 * PAGE)
    assert pages.resident() == 0
    pages.populate(PAGE, 2 * PAGE)
    assert pages.resident() >= PAGE
    pages.populate()
    assert pages.resident() == 4 * PAGE
    assert pages.give_back(0, PAGE) == 0
    assert pages.resident() == 3 * PAGE
    pages.give_back()
    assert pages.resident() == 0


def test_the_best_way_is_chosen_and_others_by_name(C, file):
    assert C.SpillMap(file.fileno(), 0, PAGE).method in ("scan", "pagemap")
    with pytest.raises(ValueError, match="expected method to be scan, pagemap or compare"):
        C.SpillMap(file.fileno(), 0, PAGE, "guess")


def test_elements_of_a_size(C, file):
    assert C.SpillMap(file.fileno(), 0, PAGE).grain == 1
    assert C.SpillMap(file.fileno(), 0, PAGE, grain=8).grain == 8
    for wrong in (0, 3, 16, -1):
        with pytest.raises(ValueError, match="expected grain to be 1, 2, 4 or 8"):
            C.SpillMap(file.fileno(), 0, PAGE, grain=wrong)


def test_arguments(C, file):
    fd = file.fileno()
    for wrong in ((fd,), (fd, 0, "1"), ("x", 0, 1)):
        with pytest.raises(TypeError):
            C.SpillMap(*wrong)
    for wrong in ((fd, 0, 0), (fd, -PAGE, PAGE), (fd, 0, -1)):
        with pytest.raises(ValueError, match="expected nbytes above 0"):
            C.SpillMap(*wrong)
    for wrong, code in (
        ((fd, 1, PAGE), errno.EINVAL),
        ((fd, 0, 2**62), errno.ESTALE),
        ((fd, 0, 2**63 - 1), errno.EINVAL),
        ((fd, 0, 5 * PAGE), errno.ESTALE),
        ((9999, 0, PAGE), errno.EBADF),
        ((fd, 0, PAGE, None, 17), errno.EINVAL),
    ):
        with pytest.raises(OSError, match=r"\[Errno") as caught:
            C.SpillMap(*wrong)
        assert caught.value.errno == code
    pages = C.SpillMap(fd, 0, PAGE)
    for name in ("populate", "changed", "resident", "give_back"):
        with pytest.raises(TypeError, match="expected start and end, or neither"):
            getattr(pages, name)(1)
        with pytest.raises(ValueError, match="expected 0 <= start <= end"):
            getattr(pages, name)(2, 1)
        with pytest.raises(TypeError):
            getattr(pages, name)("a", 1)
        getattr(pages, name)(PAGE * 9, PAGE * 10)
    with pytest.raises(TypeError):
        pages.move("x")


def test_a_view_keeps_the_map(C, file):
    view = memoryview(C.SpillMap(file.fileno(), 0, PAGE))
    file.close()
    gc.collect()
    view[0] = 9
    assert bytes(view[:3]) == b"\x09\x01\x02"


def test_a_map_that_is_somebody_elses(C, file):
    """Its pages can be given back; nothing is written, and what was changed stays."""
    before = content(file)
    theirs = mmap.mmap(file.fileno(), 4 * PAGE, access=mmap.ACCESS_COPY)
    theirs[PAGE] = 200
    with open("/proc/self/maps") as lines:
        address = next(int(line.split("-")[0], 16) for line in lines if file.name in line)
    pages = C.SpillMap(file.fileno(), 0, 4 * PAGE, None, address)
    assert not pages.writable
    assert pages.changed() == PAGE
    assert pages.give_back() == 0
    assert pages.changed() == pages.resident() == PAGE
    with pytest.raises(OSError, match="Read-only"):
        pages.move(file.fileno())
    del pages
    assert theirs[PAGE] == 200
    assert content(file) == before
    theirs.close()


def test_a_file_that_is_cut_is_an_exception(C, file):
    pages, other = (C.SpillMap(file.fileno(), 0, 4 * PAGE) for _ in range(2))
    view = memoryview(pages)
    view[0] = 50
    os.ftruncate(file.fileno(), PAGE)
    for step in (pages.check, other.check, other.populate, pages.give_back):
        with pytest.raises(OSError, match=r"\[Errno") as caught:
            step()
        assert caught.value.errno == errno.ESTALE
    assert not pages.broken
    assert view[3 * PAGE] == 0
    assert pages.broken
    assert not other.broken
    assert view[0] == 50
    assert len(content(file)) == PAGE


@pytest.mark.parametrize("order", ["before", "after"])
def test_faulthandler_beside_ours(C, file, tmp_path, order):
    """Whichever was installed last: our maps are mended, its own faults are told of."""
    with open(tmp_path / "told", "w+") as told, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if order == "before":
                    faulthandler.enable(told)
                pages = C.SpillMap(file.fileno(), 0, 4 * PAGE)
                if order == "after":
                    faulthandler.enable(told)
                os.ftruncate(file.fileno(), 0)
                status = 0 if memoryview(pages)[PAGE] == 0 and pages.broken else 2
                os.kill(os.getpid(), signal.SIGBUS)  # somebody else's: ends the process
            finally:
                os._exit(status or 3)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        # ASan answers the signal in its own way: it is asked last, and exits with 99. memcheck then
        # reads all memory, cut files and what is not there after a fork too, and may end of that.
        preloaded = os.environ.get("LD_PRELOAD", "")
        ends = [99] if "libasan" in preloaded else [-signal.SIGBUS]
        if "vgpreload_memcheck" in preloaded:
            ends.append(-signal.SIGSEGV)
        assert ended in ends
        if order == "before":
            told.seek(0)
            assert "Fatal Python error: Bus error" in told.read()


def test_another_file_after_a_fork(C, file, tmp_path):
    pages = C.SpillMap(file.fileno(), 0, 4 * PAGE)
    before = content(file)
    view = memoryview(pages)
    view[1] = 99
    with open(tmp_path / "copy", "w+b", buffering=0) as copy:
        copy.write(before)
        assert pages.move(copy.fileno()) == PAGE
        assert pages.resident() == 0
        assert view[1] == 99
        view[2] = 98
        pages.give_back()
        assert content(copy)[:4] == bytes([0, 99, 98, 3])
    assert content(file) == before
    pages.check()


def flags_of(pages) -> list[str]:
    """What the kernel knows of a mapping, in its words of two letters."""
    with open("/proc/self/smaps") as lines:
        inside = False
        for line in lines:
            first = line.split()[0]
            if not first.endswith(":"):
                start, end = (int(part, 16) for part in first.split("-"))
                inside = start <= pages.address < end
            elif inside and first == "VmFlags:":
                return line.split()[1:]
    return []


@pytest.mark.skipif(
    not os.path.isdir("/sys/kernel/mm/transparent_hugepage"), reason="a kernel without huge pages"
)
def test_what_the_page_cache_lost_is_read_again_in_large_pieces(C, tmp_path):
    """Pages read one by one are mapped one by one for good, which costs fifty times as much."""
    size = 4 << 20
    with open(tmp_path / "one", "w+b") as one, open(tmp_path / "two", "w+b") as two:
        for file in (one, two):
            file.truncate(size)
        pages = C.SpillMap(one.fileno(), 0, size)
        assert "hg" in flags_of(pages)
        pages.populate()
        pages.give_back()
        assert "hg" in flags_of(pages)
        pages.move(two.fileno())
        assert "hg" in flags_of(pages)


def test_threads_that_come_and_go_together(C, file):
    """Giving back, populating and checking at once never says that the file has changed."""
    pages = C.SpillMap(file.fileno(), 0, 4 * PAGE)
    view, failed = memoryview(pages), []

    def work(start: int) -> None:
        try:
            for i in range(60):
                view[start + 7] = i
                pages.populate(start, start + PAGE)
                pages.check()
                pages.give_back(start, start + PAGE)
                assert view[start + 7] == i
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i * PAGE,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def theirs_and_ours(C, file, method):
    """Somebody's private map of the file, and pages over it."""
    theirs = mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size, access=mmap.ACCESS_COPY)
    address = ctypes.addressof(ctypes.c_char.from_buffer(theirs))
    return theirs, C.SpillMap(file.fileno(), 0, len(theirs), method, address)


@pytest.mark.parametrize("method", ["scan", "pagemap"])
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_what_a_thread_writes_meanwhile_is_not_lost(C, tmp_path, whose, method):
    """A stranger writes each page once while they are given back again and again."""
    count = 1024
    interval = sys.getswitchinterval()
    with open(tmp_path / "pages", "w+b", buffering=0) as file:
        file.write(bytes(count * PAGE))
        if whose == "theirs":
            theirs, pages = theirs_and_ours(C, file, method)
            view = memoryview(theirs)
        else:
            pages = C.SpillMap(file.fileno(), 0, count * PAGE, method)
            view = memoryview(pages)
        for value in range(1, 9):

            def write(value=value):
                for i in range(count):
                    view[i * PAGE + value] = value

            stranger = threading.Thread(target=write)
            sys.setswitchinterval(1e-5)
            try:
                stranger.start()
                while stranger.is_alive():
                    pages.give_back()
            finally:
                sys.setswitchinterval(interval)
                stranger.join()
            assert [i for i in range(count) if view[i * PAGE + value] != value] == []
        view.release()
