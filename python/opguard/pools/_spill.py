"""Files of ours that weights lie in while they are not in memory.

Everything is below one folder of this user's, mode 0700: a folder a process, with a lock that the
kernel releases when the process dies, so that the next start sees whose files are left over.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
import secrets
import stat
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from opguard.pools._forks import ForkLock
from opguard.pools._spill_format import Layout, Piece, allocate, copy, laid_out, write, write_pieces

__all__ = ["SpillFile", "SpillFolder"]

DEFAULT = "/var/tmp"
LOCK = ".lock"
PARTIAL = ".partial"
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")


class SpillFile:
    """One file of weights of ours; its name goes when this does.

    Attributes:
        fd: open until ``let_go``, which whoever has mapped the file calls.
        layout: where the data are in it: from a whole page on.
    """

    def __init__(self, folder: SpillFolder, name: str, fd: int, layout: Layout) -> None:
        self.name = name
        self.fd = fd
        self.layout = layout
        self._close = weakref.finalize(self, folder._forget, name, layout.used)
        self._close.atexit = False  # the folder goes whole
        self._let_go = weakref.finalize(self, os.close, fd)
        self._let_go.atexit = False

    @property
    def offset(self) -> int:
        """Of the data in the file."""
        return self.layout.offset

    def let_go(self) -> None:
        """Closes the descriptor; the file stays."""
        self._let_go()

    def close(self) -> None:
        """Removes the file; maps of it stay readable."""
        self._let_go()
        self._close()


class SpillFolder:
    """Where this process keeps its files; made by the first file.

    Args:
        path: a folder on a disk; None: ``$OPGUARD_SPILL``, else /var/tmp. The files lie in a folder
            of this user's inside it, which nobody else may read.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        chosen = path if path is not None else os.environ.get("OPGUARD_SPILL") or DEFAULT
        self.base = Path(os.path.abspath(os.fspath(chosen)))
        self._lock = ForkLock()
        self._process = 0
        self._fd = -1
        self._locked = -1
        self._used = 0
        self._own: Path | None = None

    @property
    def used(self) -> int:
        """Bytes of this process's files."""
        return self._used

    @property
    def path(self) -> Path:
        """The folder of this process; made if it is not there yet."""
        with self._lock.here:
            return self._opened()

    def write(
        self, name: str, pieces: Sequence[Piece], nbytes: int, metadata: Mapping[str, str]
    ) -> SpillFile:
        """A file with the bytes of ``pieces``, nbytes of data in all.

        Written under another name, synced and renamed. OSError: the disk is full or the folder
        cannot be written. PoolFileChanged: the bytes lie in a file that was cut meanwhile.
        """
        header, layout = laid_out(pieces, nbytes, metadata)
        with self._new_file(name, layout) as (fd, final):
            write(fd, header, 0)
            write_pieces(fd, pieces, layout.offset)
        return SpillFile(self, final, fd, layout)

    def copy(self, file: SpillFile, fd: int) -> SpillFile:
        """Another file with the same bytes, read from ``fd``: for after a fork."""
        with self._new_file(file.name.partition(".")[0], file.layout) as (fresh, final):
            for at, left in file.layout.ranges:
                copy(fd, fresh, at, left)
        return SpillFile(self, final, fresh, file.layout)

    def close(self) -> None:
        """Removes this process's folder with all files; the next file makes a new one."""
        with self._lock.here:
            if self._process == os.getpid() and self._own is not None:
                _remove_folder(self._fd, self._own.name)
                self._let_go()
            self._own, self._process, self._used = None, 0, 0

    # --- inside ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _new_file(self, name: str, layout: Layout) -> Iterator[tuple[int, str]]:
        """An open file with room for all, renamed to its name if the block ends well."""
        with self._lock.here:
            own = self._opened()
        final = f"{_safe(name)}.{secrets.token_hex(4)}.safetensors"
        partial = final + PARTIAL
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = folder = -1
        try:
            folder = os.open(own, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            fd = os.open(partial, flags, 0o600, dir_fd=folder)
            for at, size in layout.ranges:
                allocate(fd, at, size)
            yield fd, final
            os.fsync(fd)
            os.rename(partial, final, src_dir_fd=folder, dst_dir_fd=folder)
            self._used += layout.used
        except BaseException as error:
            if fd >= 0:
                os.close(fd)
                for left in (partial, final):  # an interrupt may come right after the renaming
                    with contextlib.suppress(OSError):
                        os.unlink(left, dir_fd=folder)
            if isinstance(error, OSError):
                raise _said(error, own, layout.used) from error
            raise
        finally:
            if folder >= 0:
                os.close(folder)

    def _forget(self, name: str, size: int) -> None:
        if self._process == os.getpid() and self._own is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._own / name)
                self._used -= size

    def _opened(self) -> Path:
        """Makes the folder of this process, and removes those of processes that are dead."""
        if self._own is not None and self._process == os.getpid():
            if self._own.is_dir():
                return self._own
            # Somebody tidies up in /var/tmp. What is mapped is read and written on without names.
            self._let_go()
        self._fd = self._locked = -1  # after a fork they are the parent's, and kept for its lock
        try:
            mine = self._user_folder()
            if _file_system(self._fd) in IN_MEMORY:
                warnings.warn(
                    f"expected the spill folder {mine} to be on a disk, it is on "
                    f"{_file_system(self._fd)}, which is memory: weights given back still take "
                    "memory there; set OPGUARD_SPILL or spill_dir to a folder on a disk",
                    RuntimeWarning,
                    stacklevel=5,
                )
            with _held(self._fd, LOCK):
                _remove_dead(self._fd)
                name = f"{os.getpid()}-{secrets.token_hex(6)}"
                os.mkdir(name, 0o700, dir_fd=self._fd)
                self._locked = _open_lock(self._fd, f"{name}/{LOCK}")
                fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException as error:
            self._close_descriptors()
            if isinstance(error, OSError):
                raise _said(error, self.base, 0) from error
            raise
        self._own, self._process, self._used = mine / name, os.getpid(), 0
        atexit.register(self.close)
        return self._own

    def _let_go(self) -> None:
        self._own, self._process, self._used = None, 0, 0
        self._close_descriptors()
        atexit.unregister(self.close)

    def _close_descriptors(self) -> None:
        for fd in (self._fd, self._locked):
            if fd >= 0:
                os.close(fd)
        self._fd = self._locked = -1

    def _user_folder(self) -> Path:
        """Opens, and makes where needed, this user's folder; refuses one open to others."""
        user = os.geteuid()
        mine = self.base / f"opguard-spill-{user}"
        with contextlib.suppress(FileExistsError):
            mine.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            mine.mkdir(mode=0o700)
        found = os.lstat(mine)
        mode = stat.S_IMODE(found.st_mode)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or mode & 0o077:
            what = "a link" if stat.S_ISLNK(found.st_mode) else f"of user {found.st_uid}"
            raise PermissionError(
                errno.EPERM,
                f"expected a folder of user {user} with mode 0700, found one {what} with mode "
                f"{mode:04o}; remove it, or set OPGUARD_SPILL to another place",
                str(mine),
            )
        self._fd = os.open(mine, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        opened = os.fstat(self._fd)
        if (opened.st_dev, opened.st_ino) != (found.st_dev, found.st_ino):
            raise PermissionError(errno.EPERM, "expected the folder to stay in place", str(mine))
        return mine


# --- folders --------------------------------------------------------------------------------------


def _said(error: OSError, folder: Path, size: int) -> OSError:
    """The same error, saying what was to be written, and where."""
    needed = f" {size} bytes of weights" if size else ""
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        way_out = "free some there or set OPGUARD_SPILL or spill_dir to another disk"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        way_out = "close some files, or raise the limit (ulimit -n): each model keeps one open"
    else:
        way_out = "set OPGUARD_SPILL or spill_dir to a folder that can be written"
    message = f"expected to write{needed} below {folder}: {error.strerror}; {way_out}"
    return type(error)(error.errno, message)


def _safe(name: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name)[:60] or "model"


def _file_system(fd: int) -> str:
    """The kind of file system, as Linux names it; empty where it does not say."""
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8") as lines:
        for line in lines:
            mount, _, kind = line.partition(" - ")
            if mount.split()[2] == wanted:
                return kind.split()[0]
    return ""


def _open_lock(folder: int, name: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, 0o600, dir_fd=folder)


@contextlib.contextmanager
def _held(folder: int, name: str) -> Iterator[None]:
    fd = _open_lock(folder, name)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove_dead(folder: int) -> None:
    """Removes the folders whose process no longer holds their lock."""
    for name in os.listdir(folder):
        if name == LOCK:
            continue
        with contextlib.suppress(OSError):
            lock = _open_lock(folder, f"{name}/{LOCK}")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_folder(folder, name)
            finally:
                os.close(lock)


def _remove_folder(folder: int, name: str) -> None:
    """One folder of files, without following links."""
    with contextlib.suppress(OSError):
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        inner = os.open(name, flags, dir_fd=folder)
        try:
            for file in os.listdir(inner):
                os.unlink(file, dir_fd=inner)
        finally:
            os.close(inner)
        os.rmdir(name, dir_fd=folder)
