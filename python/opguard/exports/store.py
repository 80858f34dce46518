"""The folder of an export: made aside and exchanged whole, verified file by file, locked.

Files of an export named N, all in one folder (`exports_root`):

- ``N``: the export; its ``metadata.json`` says what it was made from and holds a digest a file, its
  ``.verified.json`` the digests of files of it and of its source, by their stat on this machine
- ``.N.tmp-PID-RANDOM``: one being written, or the one it replaced, on its way out
- ``.N.old-PID-RANDOM``: the replaced one, for an instant, where a file system cannot exchange
- ``.locks/N.lock``: held by who writes

A process killed at any instant leaves N whole, the old one or the new, or in the third case to be
put back; what else it leaves is removed by the next writer.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opguard import hub
from opguard.exports import hashing

if TYPE_CHECKING:
    from filelock import FileLock

__all__ = [
    "METADATA",
    "BrokenExport",
    "discard",
    "export_folder",
    "exports_root",
    "key_of",
    "known_digests",
    "leftovers",
    "lock",
    "mark_unfit",
    "needs_recovery",
    "note_digests",
    "read",
    "recover",
    "stamp",
    "touch",
    "verify",
    "write",
]

logger = logging.getLogger("opguard")

METADATA = "metadata.json"
VERIFIED = ".verified.json"
KNOWN_AT_MOST = 4096
FORMAT = 1
# Opening one of these runs what is in it.
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"})

LONG_WAIT_S = 60.0

_held = threading.local()


class BrokenExport(Exception):
    """An export that must not be loaded; the message says which file is wrong and how."""


def exports_root() -> Path | None:
    """Returns the folder of all exports: OPGUARD_EXPORTS, or beside the hub cache.

    None where OPGUARD_EXPORTS is 0, which turns exports off.
    """
    named = os.environ.get("OPGUARD_EXPORTS")
    if named == "0":
        return None
    root = hub.expanded(named) if named else hub.hub_cache_dir().parent / "exports"
    return root.absolute()  # of one load, though the program changes its working directory


def export_folder(
    name: str,
    *,
    precision: str | None = None,
    quant_type: str | None = None,
    quant_use_double: bool = False,
) -> Path | None:
    """Returns ``models--NAME[-fp16|-bf16][-i8|-fp4|-nf4[-dq]]`` in the folder of all exports.

    precision: "fp16", "bf16", or None for full precision. None is returned where exports are off.
    """
    root = exports_root()
    if root is None:
        return None
    double = "dq" if quant_type and quant_use_double else None
    return root / "-".join(
        ["models-", name.replace("/", "--"), *filter(None, (precision, quant_type, double))]
    )


def key_of(made_from: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a description, in its one canonical spelling."""
    text = json.dumps(made_from, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# Reading


def stamp(folder: Path) -> tuple[int, bytes] | None:
    """Returns what differs after the export was exchanged; None where there is none."""
    try:
        return folder.stat().st_ino, (folder / METADATA).read_bytes()
    except (OSError, ValueError):  # also a name that no folder can have
        return None


def read(folder: Path) -> dict[str, Any]:
    """Returns the metadata of an export.

    Raises:
        FileNotFoundError: there is no export.
        BrokenExport: there is no metadata in it, or none that says what it must.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no export in {folder}")
    try:
        found = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        made_from, files, known = found["made_from"], found["files"], found["known"]
        whole = found["format"] == FORMAT and found["key"] == key_of(made_from)
        whole = whole and isinstance(made_from, dict)
        whole = whole and all(
            isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str | list)
            for entry in files.values()
        )
        whole = whole and all(isinstance(digest, str | list) for digest in known.values())
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise BrokenExport(f"{METADATA} is not valid ({type(error).__name__}: {error})") from None
    if not whole:
        raise BrokenExport(
            f"{METADATA} is not valid (its key is not that of what it was made from)"
        )
    return dict(found)


def _files(folder: Path) -> dict[str, Path]:
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if not path.is_dir() and path.name != METADATA and not path.name.startswith(".")
    }


def verify(folder: Path, metadata: Mapping[str, Any], *, afresh: bool = False) -> None:
    """Compares the digest of every file of an export with the one in its metadata.

    A file is read unless its stat says that it is the one that was read and found whole before, by
    this process or another: whatever writes to a file changes that. Only what happens below the
    file system escapes it, and `afresh`, which reads everything, sees that as well.

    Raises:
        BrokenExport: a file is missing, altered, not listed, or of a kind that runs code.
    """
    here, listed = _files(folder), metadata["files"]
    for name in here.keys() | listed.keys():
        if Path(name).suffix in PICKLES:
            raise BrokenExport(f"{name} is no safetensors file, and opening it would run its code")
        if name not in here:
            raise BrokenExport(f"{name} is missing")
        if name not in listed:
            raise BrokenExport(f"{name} was not exported, somebody added it")
    hashing.remember(known_digests(folder))
    try:
        for name, path in here.items():
            size = path.stat().st_size
            if size != listed[name]["bytes"]:
                raise BrokenExport(f"{name} has {size} bytes instead of {listed[name]['bytes']}")
        with hashing.collected() as found:
            digests = hashing.hash_files(here.values(), afresh=afresh)
    except OSError as error:
        raise BrokenExport(f"{error.filename or 'a file'} cannot be read ({error})") from None
    for name, path in here.items():
        if digests[path] != listed[name]["sha256"]:
            raise BrokenExport(f"{name} has not the content that was exported")
    note_digests(folder, found)


def known_digests(folder: Path) -> dict[str, hashing.Digest]:
    """Returns what was noted of files that were read on this machine: stat signature -> digest."""
    try:
        found = json.loads((folder / VERIFIED).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(found, dict) and all(isinstance(each, str | list) for each in found.values())
    return found if whole else {}


def note_digests(folder: Path, found: Mapping[str, hashing.Digest]) -> None:
    """Notes digests of the export's files, or of its source's, for the next process."""
    known = known_digests(folder)
    if found.keys() <= known.keys():
        return
    if len(known) > KNOWN_AT_MOST:  # of files that were replaced again and again
        known = {}
    with contextlib.suppress(OSError):  # somebody else's folder, or a read-only one
        _replace_json(folder / VERIFIED, known | dict(found))


def touch(folder: Path) -> None:
    """Notes in the time of metadata.json that the export was used now."""
    with contextlib.suppress(OSError):  # somebody else's folder, or a read-only one
        os.utime(folder / METADATA)


# Writing


def _wait_for(held: FileLock, folder: Path) -> None:
    from filelock import Timeout

    try:
        held.acquire(timeout=LONG_WAIT_S)
    except Timeout:
        logger.warning(
            "exports: still waiting for another load that makes %s, after %g s; where two classes "
            "share this NAME and one loads the other, give one of them another",
            folder,
            LONG_WAIT_S,
        )
        held.acquire()


@contextlib.contextmanager
def lock(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the right to write the export, across processes; a thread that has it keeps it.

    Raises:
        OSError: no lock can be had there, or without `wait` somebody else has it.
    """
    from filelock import FileLock, Timeout

    mine: set[Path] = _held.__dict__.setdefault("folders", set())
    if folder in mine:
        yield
        return
    locks = folder.parent / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    held = FileLock(locks / f"{folder.name}.lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise BlockingIOError(f"{folder.name} is being written") from None
        logger.info("exports: waiting for another load that makes %s", folder)
        _wait_for(held, folder)
    mine.add(folder)
    try:
        yield
    finally:
        mine.discard(folder)
        held.release()


def _leftovers_of(folder: Path, kind: str) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.{kind}-\d+-[0-9a-f]{{8}}")
    try:
        return [path for path in folder.parent.iterdir() if pattern.fullmatch(path.name)]
    except OSError:
        return []


def _aside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def needs_recovery(folder: Path) -> bool:
    """Whether the writer of an export was killed, or is just, between two renames."""
    return not os.path.lexists(folder) and bool(_leftovers_of(folder, "old"))


def recover(folder: Path) -> bool:
    """Puts such an export back. Needs the lock."""
    if not needs_recovery(folder):
        return False
    for old in _leftovers_of(folder, "old"):
        with contextlib.suppress(OSError, BrokenExport):
            read(old)
            old.rename(folder)
            return True
    return False


def leftovers(folder: Path) -> list[Path]:
    """Returns what killed writers left of this export and nobody needs. Needs the lock."""
    recover(folder)
    return _leftovers_of(folder, "tmp") + _leftovers_of(folder, "old")


def discard(folder: Path) -> None:
    """Removes an export, or what was left of one: at once for its readers. Needs the lock.

    Raises:
        OSError: it cannot be removed.
    """
    if not folder.name.startswith("."):
        folder = folder.rename(_aside(folder, "tmp"))
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:  # a link to a folder elsewhere: what it names is not ours
        folder.unlink()


def _sync(path: Path) -> None:
    """Has a file, or a folder's list of names, written to the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _exchange(fresh: Path, folder: Path) -> None:
    """Puts `fresh` in the place of `folder`, which is `fresh` then, or gone."""
    from opguard import _C

    try:
        _C.exchange_paths(str(fresh), str(folder))
        return
    except FileNotFoundError:
        fresh.rename(folder)
        return
    except OSError as error:
        logger.info("exports: %s cannot exchange two folders (%s)", folder.parent, error)
    old = _aside(folder, "old")
    folder.rename(old)
    try:
        fresh.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    _remove(old)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _measured(folder: Path) -> dict[str, dict[str, Any]]:
    files = _files(folder)
    pickled = sorted(name for name in files if Path(name).suffix in PICKLES)
    if pickled:
        raise ValueError(f"it was not saved as safetensors, but as {pickled[0]}")
    digests = hashing.hash_files(files.values())
    return {
        name: {"bytes": path.stat().st_size, "sha256": digests[path]}
        for name, path in files.items()
    }


def write(
    folder: Path,
    fill: Callable[[Path], bool],
    made_from: Mapping[str, Any],
    known: Mapping[str, hashing.Digest],
) -> bool:
    """Makes an export: `fill` writes it into an empty folder, which then takes the old one's place.

    False when `fill` says that there is nothing to export. Needs the lock. `known`: the digests of
    the source's files by stat signature, kept for the next process.

    Raises:
        Exception: what went wrong; the old export stands as it was.
    """
    import opguard

    for path in leftovers(folder):
        _remove(path)
    fresh = _aside(folder, "tmp")
    fresh.mkdir(parents=True)
    try:
        if not fill(fresh):
            return False
        _write_json(
            fresh / METADATA,
            {
                "format": FORMAT,
                "opguard": str(opguard.__version__),
                "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "key": key_of(made_from),
                "made_from": made_from,
                "files": _measured(fresh),
                "known": dict(known),
            },
        )
        _sync_tree(fresh)
        _exchange(fresh, folder)
        _sync(folder.parent)
    finally:
        _remove(fresh)
    return True


def _replace_json(path: Path, value: Any) -> None:
    """Writes a file at once or not at all."""
    aside = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        _write_json(aside, value)
        _sync(aside)
        aside.replace(path)
    finally:
        _remove(aside)


def mark_unfit(folder: Path, reason: str) -> None:
    """Notes in the metadata that loading this export does not give the model it was made from.

    Needs the lock.
    """
    _replace_json(folder / METADATA, read(folder) | {"unfit": reason})
