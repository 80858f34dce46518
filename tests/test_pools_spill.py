"""The folder that weights are spilled to: whose it is, what is left in it, and after whom."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest

from opguard.pools._spill import SpillFolder
from opguard.pools._spill_format import Piece, safetensors_header
from opguard.pools.errors import PoolFileChanged

MIB = 1 << 20


def piece(data: bytearray, offset: int = 0, name: str = "w") -> Piece:
    memory = (ctypes.c_char * len(data)).from_buffer(data)
    return Piece(name, len(data), offset, lambda: (ctypes.addressof(memory), memory))


@pytest.fixture
def folder(tmp_path):
    made = SpillFolder(tmp_path)
    yield made
    made.close()


def modes(path: Path) -> dict[str, str]:
    return {
        found.name: oct(stat.S_IMODE(found.stat().st_mode))
        for found in [path, path.parent, *path.iterdir()]
    }


def test_files_are_this_users_alone(folder, tmp_path):
    kept = os.umask(0)
    try:
        file = folder.write("a/../b", [piece(bytearray(b"x" * 10))], 4096, {})
    finally:
        os.umask(kept)
    found = modes(folder.path)
    assert found.pop(file.name) == found.pop(".lock") == "0o600"
    assert set(found.values()) == {"0o700"}
    assert len(found) == 2
    assert "/" not in file.name
    assert folder.path.parent.parent == tmp_path


def test_a_file_is_safetensors_on_page_boundaries(folder):
    """Anybody's tool reads it, gaps between the tensors and all."""
    from safetensors import safe_open

    first, second = bytearray(os.urandom(100)), bytearray(os.urandom(5000))
    pieces = [piece(first, 0, "first"), piece(second, 4096, "ünicode ~ name")]
    file = folder.write("m", pieces, 12288, {"format": "pt"})
    assert file.offset % 4096 == 0
    assert os.pread(file.fd, 5000, file.offset + 4096) == second
    with safe_open(folder.path / file.name, "pt") as tensors:
        assert bytes(tensors.get_tensor("first").numpy()) == first
        assert bytes(tensors.get_tensor("ünicode ~ name").numpy()) == second


@pytest.mark.parametrize("names", [["x" * length] for length in (1, 3900, 4000, 9000)])
def test_headers_are_whole_pages(names):
    header = safetensors_header([piece(bytearray(3), 0, names[0])], 4096, {})
    assert len(header) % 4096 == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    assert names[0] in json.loads(header[8:])


@pytest.mark.parametrize("names", [1, 3970, 4 << 20], ids=["short", "page", "long"])
def test_large_data_begin_where_an_entry_of_a_page_table_does(folder, names):
    """Else no large folio of theirs is mapped as one. What lies before takes no disk."""
    from safetensors import safe_open

    data = bytearray(os.urandom(2 * MIB + 100))
    piece_of_data = piece(data, 64, "n" * names)
    file = folder.write("m", [piece_of_data], 3 * MIB, {})
    copy = folder.copy(file, file.fd)
    for one in (file, copy):
        assert one.offset % (2 * MIB) == 0
        assert os.pread(one.fd, len(data), one.offset + 64) == data
        found = os.fstat(one.fd)
        assert found.st_size == one.offset + 3 * MIB
        assert found.st_blocks * 512 <= names + 4 * 4096 + 3 * MIB
        with safe_open(folder.path / one.name, "pt") as tensors:
            assert bytes(tensors.get_tensor("n" * names).numpy()) == data
    file.close()
    copy.close()
    assert folder.used == 0
    assert folder.write("m", [piece(data[: 2 * MIB - 1])], 2 * MIB - 1, {}).offset < 2 * MIB


def test_many_small_pieces_and_large_ones(folder, monkeypatch):
    """More than one call of the kernel takes, in chunks, with calls that end early."""
    from opguard.pools import _spill_format

    rng = random.Random(0)
    monkeypatch.setattr(_spill_format, "CHUNK", 8192)
    monkeypatch.setattr(_spill_format, "MOST_PARTS", 20)
    write = os.pwritev
    monkeypatch.setattr(
        os, "pwritev", lambda fd, parts, at: write(fd, [parts[0][: rng.randint(1, 9000)]], at)
    )
    expected, pieces, end = bytearray(), [], 0
    for _ in range(150):
        end += rng.randrange(0, 3) * 64
        data = bytearray(rng.randbytes(rng.choice([0, 1, 64, 700, 20000])))
        expected = expected.ljust(end, b"\0") + data
        pieces.append(piece(data, end, f"p{len(pieces)}"))
        end += len(data)
    file = folder.write("m", pieces, end + 4096, {})
    assert os.pread(file.fd, end, file.offset) == expected


def test_used_bytes_and_files_that_go(folder):
    assert folder.used == 0
    one = folder.write("one", [piece(bytearray(10))], 4096, {})
    two = folder.write("two", [piece(bytearray(10))], 8192, {})
    assert folder.used == 4096 + 4096 + 4096 + 8192
    one.close()
    one.close()
    assert folder.used == 4096 + 8192
    copied = folder.copy(two, two.fd)
    assert os.pread(copied.fd, 99999, 0) == os.pread(two.fd, 99999, 0)
    del two, copied
    assert folder.used == 0
    assert os.listdir(folder.path) == [".lock"]


def test_an_interrupt_after_the_rename_leaves_no_file(folder, monkeypatch):
    rename = os.rename

    def interrupted(*args, **kwargs):
        rename(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder.write("m", [piece(bytearray(10))], 4096, {})
    assert os.listdir(folder.path) == [".lock"]
    assert folder.used == 0


def test_a_folder_that_cannot_be_made_again(folder, tmp_path):
    """Tried again and again: no descriptor is left open, none of others' is closed."""
    folder.path.rename(tmp_path / "gone")
    mine(tmp_path).rename(tmp_path / "mine")
    mine(tmp_path).touch(0o700)
    others, counts = [], []
    for _ in range(4):
        with pytest.raises(PermissionError, match="expected to write"):
            folder.path
        others.append(os.open("/dev/null", os.O_RDONLY))
        counts.append(len(os.listdir("/proc/self/fd")))
    for fd in others:
        os.close(fd)
    assert [count - counts[0] for count in counts] == [0, 1, 2, 3]
    mine(tmp_path).unlink()
    assert folder.path.is_dir()


def test_a_process_without_descriptors_is_told_so(folder):
    folder.path
    kept, taken = resource.getrlimit(resource.RLIMIT_NOFILE), []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, kept[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(OSError, match="ulimit -n"):
            folder.write("m", [piece(bytearray(10))], 4096, {})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, kept)
        for fd in taken:
            os.close(fd)


# --- whose folder -------------------------------------------------------------------------------


def mine(tmp_path: Path) -> Path:
    return tmp_path / f"opguard-spill-{os.geteuid()}"


@pytest.mark.parametrize("kind", ["link", "mode", "file", "owner"])
def test_a_folder_of_others_is_refused(tmp_path, kind):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if kind == "link":
        mine(tmp_path).symlink_to(elsewhere)
    elif kind == "file":
        mine(tmp_path).touch(0o700)
    else:
        mine(tmp_path).mkdir(mode=0o700)
        if kind == "mode":
            mine(tmp_path).chmod(0o770)
        elif os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        else:
            os.chown(mine(tmp_path), 12345, -1)
    with pytest.raises(PermissionError, match=r"expected a folder of user .* mode 0700, found"):
        SpillFolder(tmp_path).write("m", [piece(bytearray(1))], 4096, {})
    assert not list(elsewhere.iterdir())


def test_a_link_in_the_folder_is_not_followed(tmp_path):
    """A dead process's folder that turns out to be a link: what it points at stays."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "data").touch()
    mine(tmp_path).mkdir(mode=0o700)
    (mine(tmp_path) / "1-abc").symlink_to(kept)
    folder = SpillFolder(tmp_path)
    assert folder.path.is_dir()
    folder.close()
    assert (kept / "data").exists()


def test_memory_is_no_disk():
    if not os.path.ismount("/dev/shm"):
        pytest.skip("there is no /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as where:
        folder = SpillFolder(where)
        with pytest.warns(RuntimeWarning, match="to be on a disk, it is on tmpfs"):
            folder.path
        folder.path
        folder.close()


def test_the_default_and_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("OPGUARD_SPILL", str(tmp_path / "a" / "b"))
    folder = SpillFolder()
    assert folder.path.parent == mine(tmp_path / "a" / "b")
    folder.close()
    monkeypatch.delenv("OPGUARD_SPILL")
    assert SpillFolder().base == Path("/var/tmp")


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", Path("/proc/self")):
        with pytest.raises(OSError, match=r"expected to write below .*; set OPGUARD_SPILL"):
            SpillFolder(path).write("m", [piece(bytearray(1))], 4096, {})


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(folder):
    folder.path
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, kept[1]))
    try:
        with pytest.raises(OSError, match=r"expected to write \d+ bytes .* free some") as caught:
            folder.write("m", [piece(bytearray(2 * MIB))], 2 * MIB, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert caught.value.errno == errno.EFBIG
    assert os.listdir(folder.path) == [".lock"]
    assert folder.used == 0


def test_a_really_full_disk(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        folder = SpillFolder(small)
        with pytest.warns(RuntimeWarning, match="tmpfs"):
            folder.path
        with pytest.raises(OSError, match="free some there") as caught:
            folder.write("m", [piece(bytearray(2 * MIB))], 2 * MIB, {})
        assert caught.value.errno == errno.ENOSPC
        assert os.listdir(folder.path) == [".lock"]
        folder.write("m", [piece(bytearray(MIB // 2))], MIB // 2, {})
        folder.close()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_memory_of_a_file_that_was_cut(folder, tmp_path):
    """The user's own map: an exception where reading it in the process would be a signal."""
    import mmap

    path = tmp_path / "weights"
    path.write_bytes(b"x" * 8 * MIB)
    with open(path, "r+b") as opened:
        view = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        data = (ctypes.c_char * len(view)).from_buffer(view)
        os.truncate(path, 5 * MIB)
        weights = Piece("w", len(view), 0, lambda d=data: (ctypes.addressof(d), d))
        with pytest.raises(PoolFileChanged, match="a file that is shorter now"):
            folder.write("m", [weights], 8 * MIB, {})
        del data, weights
        view.close()
    assert os.listdir(folder.path) == [".lock"]


# --- processes ------------------------------------------------------------------------------------

POINTS = ["mkdir", "flock", "posix_fallocate", "pwritev", "fsync", "rename", "end"]


def die(*_args: object, **_kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def spill(where: Path, point: str, size: int = 65536, count: int = 2) -> None:
    """What a child does until it is killed; at a named step it kills itself."""
    import fcntl

    original = os.pwritev
    if point == "pwritev":
        os.pwritev = lambda fd, parts, at: die(original(fd, [bytes(parts[0][:4096])], at))
    elif point in POINTS[:-1]:
        setattr(fcntl if point == "flock" else os, point, die)
    folder = SpillFolder(where)
    weights = piece(bytearray(size))
    files = [folder.write("m", [weights], size, {}) for _ in range(count)]
    assert files
    die()


def start(*args: object) -> int:
    with warnings.catch_warnings():
        # 3.12 and later warn of threads, which the child does not touch.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            spill(*args)
        finally:
            os._exit(1)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in mine(tmp_path).iterdir() if path.name != ".lock")


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_step_the_next_start_removes_it(tmp_path, point):
    """One who lives keeps its files meanwhile."""
    alive = SpillFolder(tmp_path)
    file = alive.write("m", [piece(bytearray(10))], 4096, {})
    assert ended(start(tmp_path, point)) == -signal.SIGKILL
    assert len(left(tmp_path)) == (1 if point == "mkdir" else 2) - (point == "flock")
    folder = SpillFolder(tmp_path)
    expected = sorted([folder.path.name, alive.path.name])
    assert left(tmp_path) == expected
    assert os.listdir(folder.path) == [".lock"]
    assert (alive.path / file.name).exists()
    folder.close()
    alive.close()
    assert left(tmp_path) == []


def test_killed_at_random(tmp_path):
    """Two at a time, so that each may be removing what another one left."""
    rng = random.Random(time.time_ns())
    for _ in range(10):
        children = [start(tmp_path, "end", MIB, 400) for _ in range(2)]
        time.sleep(rng.uniform(0, 0.06))
        for child in children:
            os.kill(child, signal.SIGKILL)
            ended(child)
    folder = SpillFolder(tmp_path)
    assert [folder.path.name] == left(tmp_path)
    assert os.listdir(folder.path) == [".lock"]
    folder.close()


EXIT = """
import ctypes, os, sys
from opguard.pools._spill import SpillFolder
from opguard.pools._spill_format import Piece
data = bytearray(10)
memory = (ctypes.c_char * 10).from_buffer(data)
weights = Piece("w", 10, 0, lambda: (ctypes.addressof(memory), memory))
folder = SpillFolder(sys.argv[1])
file = folder.write("m", [weights], 4096, {})
if os.fork() == 0:
    own = folder.write("m", [weights], 4096, {})
    sys.exit(sorted(os.listdir(folder.path)) != [".lock", own.name])
assert os.wait()[1] == 0
assert sorted(os.listdir(folder.path)) == [".lock", file.name], os.listdir(folder.path)
"""


def test_exit_removes_and_a_forked_child_only_its_own(tmp_path):
    import opguard

    environment = {**os.environ, "PYTHONPATH": str(Path(opguard.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", EXIT, str(tmp_path)], check=True, env=environment)
    assert left(tmp_path) == []
