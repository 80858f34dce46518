"""``opguard exports list|verify|prune``: what is exported, whether it is whole, and what may go.

Exit status: 0 done, 1 a bad export was found (verify), one could not be removed (prune) or nothing
is of a name that was given, 2 there can be no exports where OPGUARD_EXPORTS says.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fnmatch
import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opguard.exports import store

__all__ = ["run"]

_DAY_S = 86400.0
_QUANT = re.compile(r"-((?:i8|fp4|nf4)(?:-dq)?)$")
_OF_CLASS = re.compile(r"models--(?P<name>.+)-detector(?:-.*)?")
_LEFT = re.compile(r"\.(?P<name>models--.+)\.(?:tmp|old)-\d+-[0-9a-f]{8}")


@dataclass(frozen=True)
class _Export:
    """One row of the list; what its metadata does not say is None."""

    name: str
    bytes: int
    model: str | None = None
    revision: str | None = None
    commit: str | None = None
    dtype: str | None = None
    quant: str | None = None
    made_at: str | None = None
    used_at: str | None = None
    problem: str | None = None


def _folders() -> list[Path]:
    root = store.exports_root()
    if root is None or not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.name.startswith("models--"))


def _size(folder: Path) -> int:
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # a writer at work may have removed it
                total += os.lstat(os.path.join(where, name)).st_size
    return total


def _source(made_from: Any) -> dict[str, Any]:
    found = made_from.get("source") if isinstance(made_from, dict) else None
    return found if isinstance(found, dict) else {}


def _used_s(folder: Path) -> float:
    """When the export was last loaded, as seconds since 1970."""
    try:
        return (folder / store.METADATA).stat().st_mtime
    except OSError:
        return folder.stat().st_mtime


def _as_row(folder: Path) -> _Export:
    quant = _QUANT.search(folder.name)
    used = datetime.datetime.fromtimestamp(_used_s(folder), datetime.UTC)
    plain: dict[str, Any] = {
        "name": folder.name,
        "bytes": _size(folder),
        "quant": quant[1] if quant else None,
        "used_at": used.isoformat(timespec="seconds"),
    }
    try:
        metadata = store.read(folder)
    except (OSError, store.BrokenExport) as error:
        return _Export(**plain, problem=str(error))
    source = _source(metadata["made_from"])
    dtype = metadata["made_from"].get("dtype")
    return _Export(
        **plain,
        model=source.get("model"),
        revision=source.get("revision"),
        commit=source.get("commit"),
        dtype=dtype.removeprefix("torch.") if isinstance(dtype, str) else None,
        made_at=metadata.get("made_at"),
        problem=metadata.get("unfit"),
    )


def _readable(count: int) -> str:
    size = float(count)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _list(arguments: argparse.Namespace) -> int:
    rows = [_as_row(folder) for folder in _folders()]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return 0
    for row in rows:
        print(f"{row.name}  {_readable(row.bytes)}")
        if row.problem:
            print(f"  {row.problem}")
        if row.model is not None:
            at = row.commit or row.revision
            print(f"  model   {row.model}" + (f" at {at}" if at else ""))
        values = [text for text in (row.dtype, row.quant) if text]
        if values:
            print(f"  values  {' '.join(values)}")
        print(f"  made    {row.made_at or 'unknown'}, last used {row.used_at}")
    total = _readable(sum(row.bytes for row in rows))
    print(
        f"{len(rows)} exports, {total}, in {store.exports_root() or 'no folder: exports are off'}"
    )
    return 0


def _problem(folder: Path) -> str | None:
    """Reads an export whole, and returns what is wrong with it."""
    for _ in range(3):
        before = store.stamp(folder)
        try:
            store.verify(folder, store.read(folder), afresh=True)
            problem = None
        except (OSError, store.BrokenExport) as error:
            problem = str(error)
        if store.stamp(folder) == before:
            break
    return problem


def _names_of(folder: Path) -> set[str]:
    """Returns what an export may be called: its folder, with models-- and without, and its NAME."""
    names = {folder.name, folder.name.removeprefix("models--")}
    try:
        name = store.read(folder)["made_from"].get("name")
    except (OSError, store.BrokenExport):
        found = _OF_CLASS.fullmatch(folder.name)
        name = found["name"] if found else None
    return names | {name.replace("/", "--")} if isinstance(name, str) else names


def _named(names: list[str] | None) -> tuple[list[Path], list[str]]:
    """Returns the exports called like one of `names`, all for none, and the names of no export."""
    if not names:
        return _folders(), []
    called = {folder: _names_of(folder) for folder in _folders()}
    found: set[Path] = set()
    unknown = []
    for name in names:
        like = name.replace("/", "--")
        fits = {
            folder
            for folder, these in called.items()
            if any(fnmatch.fnmatchcase(each, like) for each in these)
        }
        found |= fits
        unknown += [] if fits else [name]
    return sorted(found), unknown


def _say_unknown(unknown: list[str]) -> bool:
    if unknown:
        where = store.exports_root() or "no folder: exports are off"
        said = f"opguard exports: no export in {where} is named {' or '.join(unknown)}"
        print(f"{said}; `opguard exports list` names them", file=sys.stderr)
    return bool(unknown)


def _verify(arguments: argparse.Namespace) -> int:
    results = []
    folders, unknown = _named(arguments.name)
    for folder in folders:
        begin = time.perf_counter()
        problem = _problem(folder)
        rate = _size(folder) / (time.perf_counter() - begin) / 1e9
        results.append({"name": folder.name, "problem": problem})
        if not arguments.json:
            print(f"{folder.name}: {problem or f'whole ({rate:.2f} GB/s)'}", flush=True)
    if arguments.json:
        print(json.dumps(results, indent=2))
    is_bad = any(result["problem"] for result in results)
    return 1 if _say_unknown(unknown) or is_bad else 0


def _goes(folder: Path, arguments: argparse.Namespace) -> bool:
    """Whether every condition that was given holds; with none given, no export goes."""
    older = arguments.older_than
    if older is not None and time.time() - _used_s(folder) < older * _DAY_S:
        return False
    if arguments.broken and _problem(folder) is None:
        return False
    return bool(older is not None or arguments.broken or arguments.name)


def _leftover_names() -> set[str]:
    root = store.exports_root()
    if root is None or not root.is_dir():
        return set()
    return {found["name"] for path in root.iterdir() if (found := _LEFT.fullmatch(path.name))}


def _prune(arguments: argparse.Namespace) -> int:
    root = store.exports_root()
    folders, unknown = _named(arguments.name)
    named = {folder.name: folder for folder in folders}
    status = 1 if _say_unknown(unknown) else 0
    for name in sorted(named.keys() | _leftover_names()):
        assert root is not None  # or there would be no names
        try:
            with store.lock(root / name, wait=False):
                folder = named.get(name)
                left = store.leftovers(root / name)
                if folder is not None and _goes(folder, arguments):
                    left.append(folder)
                for path in left:
                    size = _readable(_size(path))
                    if not arguments.dry_run:
                        store.discard(path)
                    said = "would be removed" if arguments.dry_run else "removed"
                    print(f"{path.name}: {said}, {size}")
        except OSError as error:
            print(f"{name}: left as it is, {error}")
            status = 1
    return status


def run(arguments: argparse.Namespace) -> int:
    """Runs ``opguard exports``, whose arguments the command line has parsed; returns its status."""
    root = store.exports_root()
    if root is not None and os.path.exists(root) and not root.is_dir():
        print(
            f"opguard exports: expected a folder of exports in {root}, it is a file; "
            "set OPGUARD_EXPORTS to a folder",
            file=sys.stderr,
        )
        return 2
    actions = {"list": _list, "verify": _verify, "prune": _prune}
    return actions[arguments.action](arguments)
