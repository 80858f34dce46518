"""The one decision of a load: the export matches and is read, or the source is, and exported anew.

An export that may not match is never read in silence: whatever differs, a load from the source
costs time, a stale model costs trust. The caller knows how to load and save; nothing here does.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from opguard.exports import hashing, store
from opguard.hub import LocalFileMissing

__all__ = ["ExportUnfit", "Settings", "load_or_refresh"]

logger = logging.getLogger("opguard")

T = TypeVar("T")
_ATTEMPTS = 3
_SHOWN = 4
_EXPECTED = ("missing", "forced")
_DIGEST = re.compile("[0-9a-f]{64}")


class ExportUnfit(Exception):
    """Raised by ``from_export``: what it loaded is not the model that was exported.

    The source is loaded then, and this export, which is as good as its loader makes it, is not
    tried again until what it is made from changes.
    """


class Settings(NamedTuple):
    """How `load_or_refresh` goes about it.

    only_load_export: from the export or not at all; the source may be gone. force_refresh: made
    anew though it matches. local_on_refresh: the hub is not asked. network: whether it may be.
    """

    only_load_export: bool = False
    force_refresh: bool = False
    local_on_refresh: bool = False
    network: bool = False


def load_or_refresh(
    *,
    folder: Path | None,
    describe: Callable[[bool], Mapping[str, Any]],
    from_source: Callable[[], T],
    from_export: Callable[[Path], T],
    save: Callable[[T, Path], bool],
    settings: Settings,
) -> T:
    """Returns what ``from_export`` makes of a matching export, otherwise what ``from_source`` does.

    folder: of the export (`store.export_folder`); None: exports are off, the source is loaded.
    describe: ``describe(network)`` returns all that the model is made from (`identity`), asking
        the hub only if ``network``. Any nesting of JSON values; a part from
        `identity.describe_model` is compared as a source of weights wherever it stands. Two keys
        at the top have a meaning here: "class" (two of them share the folder: said so) and
        "versions" (under only_load_export a difference is a warning).
    from_source: loads the model; holds ``local_guard`` itself where that is asked.
    from_export: loads it from the folder given, off the network. May run again, if the export was
        exchanged meanwhile. Any Exception means that the export is no good, `ExportUnfit` as above.
    save: writes the model into an empty folder as safetensors, before any forward; False: there is
        nothing that can be exported, and it has said why.

    Raises:
        LocalFileMissing: under only_load_export there is no export that matches.
        Exception: what ``from_source`` raises, and under only_load_export ``from_export``.
    """
    if settings.only_load_export and settings.force_refresh:
        raise ValueError(
            "only_load_export: expected without force_export_refresh, which loads the source; "
            "leave one of them out"
        )
    if folder is None:
        if settings.only_load_export:
            raise LocalFileMissing(
                "only_load_export: expected exports to be on, OPGUARD_EXPORTS=0 turns them off; "
                "unset it"
            )
        return from_source()
    loading = _Loading(
        _folder=folder,
        _describe=describe,
        _from_source=from_source,
        _from_export=from_export,
        _save=save,
        _settings=settings,
    )
    return loading.run()


class _Tried(Generic[T]):
    """What came of trying an export: the model, or why not."""

    def __init__(self, why: str, *, kind: str = "differs", models: tuple[T, ...] = ()) -> None:
        self.why = why
        self.kind = kind  # loaded, missing, differs, broken, unfit
        self.models = models


@dataclass(frozen=True, kw_only=True)
class _Loading(Generic[T]):
    _folder: Path
    _describe: Callable[[bool], Mapping[str, Any]]
    _from_source: Callable[[], T]
    _from_export: Callable[[Path], T]
    _save: Callable[[T, Path], bool]
    _settings: Settings

    def run(self) -> T:
        settings = self._settings
        if settings.force_refresh:
            return self._refresh(_Tried("it was asked for by force_export_refresh", kind="forced"))
        try:
            wanted, used = self._wanted(
                settings.network and not (settings.only_load_export or settings.local_on_refresh)
            )
        except OSError as error:
            if settings.only_load_export:
                raise
            return self._without(error)
        self._put_back()
        seen = store.stamp(self._folder)
        tried = self._try(wanted)
        if tried.models:
            store.note_digests(self._folder, used)
            return tried.models[0]
        if settings.only_load_export:
            way = "leave only_load_export out, or mend the loader"
            if tried.kind != "unfit":
                way = "load once without only_load_export, which makes it or says why it cannot"
            raise LocalFileMissing(
                f"only_load_export: expected an export in {self._folder} that matches, but "
                f"{tried.why}; {way}"
            )
        if tried.kind == "unfit":
            logger.info("exports: %s is not used, %s", self._folder, tried.why)
            return self._from_source()
        return self._refresh(tried, wanted, seen)

    # Describing

    def _wanted(self, network: bool) -> tuple[dict[str, Any], dict[str, hashing.Digest]]:
        """Returns the description as metadata.json would give it back, and the digests it used."""
        # Without it the source's files are read again.
        with contextlib.suppress(OSError, store.BrokenExport):
            hashing.remember(store.read(self._folder)["known"])
        hashing.remember(store.known_digests(self._folder))
        with hashing.collected() as known:
            described = dict(self._describe(network))
        plain: dict[str, Any] = json.loads(json.dumps(described, sort_keys=True))
        return plain, known

    # The export

    def _put_back(self) -> None:
        if not store.needs_recovery(self._folder):
            return
        try:
            with store.lock(self._folder):
                store.recover(self._folder)
        except OSError as error:
            logger.warning("exports: %s cannot be put back: %s", self._folder, error)

    def _try(self, wanted: Mapping[str, Any]) -> _Tried[T]:
        for _ in range(_ATTEMPTS):
            before = store.stamp(self._folder)
            tried = self._try_once(wanted)
            if store.stamp(self._folder) == before:
                return tried
            # It was exchanged meanwhile: what was loaded may be half the one and half the other.
            tried = _Tried("it is exchanged again and again", kind="broken")
        return tried

    def _try_once(self, wanted: Mapping[str, Any]) -> _Tried[T]:
        only = self._settings.only_load_export
        try:
            metadata = store.read(self._folder)
        except FileNotFoundError:
            return _Tried("there is none", kind="missing")
        except store.BrokenExport as error:
            return _Tried(str(error), kind="broken")
        found = list(differences(metadata["made_from"], wanted, relaxed=only))
        if only:
            newer = [text for path, text in found if path.startswith("versions.")]
            found = [(path, text) for path, text in found if not path.startswith("versions.")]
            if newer and not found:
                logger.warning("exports: %s is loaded although %s", self._folder, _listed(newer))
        if found:
            return _Tried(_reason(found))
        if "unfit" in metadata:
            return _Tried(
                f"loading it does not give the same model: {metadata['unfit']}", kind="unfit"
            )
        try:
            store.verify(self._folder, metadata)
        except store.BrokenExport as error:
            return _Tried(str(error), kind="broken")
        return self._read()

    def _read(self) -> _Tried[T]:
        try:
            model = self._from_export(self._folder)
        except ExportUnfit as error:
            self._mark(str(error))
            return _Tried(str(error), kind="unfit")
        except Exception as error:
            if self._settings.only_load_export:
                raise
            return _Tried(f"it does not load ({type(error).__name__}: {error})", kind="broken")
        store.touch(self._folder)
        return _Tried("", kind="loaded", models=(model,))

    def _mark(self, reason: str) -> None:
        logger.warning(
            "exports: %s is not used from now on, loading it does not give the model that was "
            "exported: %s; the loader must give the same model for the export as for its source, "
            "and _export_identity name what it reads beside them (an adapter's file, the "
            "environment)",
            self._folder,
            reason,
        )
        try:
            with store.lock(self._folder):
                store.mark_unfit(self._folder, reason)
        except (OSError, store.BrokenExport) as error:
            logger.info("exports: %s could not be marked: %s", self._folder, error)

    # The source

    def _refresh(
        self,
        tried: _Tried[T],
        wanted: Mapping[str, Any] | None = None,
        seen: object = None,
    ) -> T:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(store.lock(self._folder))
            except (OSError, ValueError, NotImplementedError) as error:
                why = "" if tried.kind in _EXPECTED else f"; {tried.why}"
                logger.warning("exports: no export in %s: %s%s", self._folder, error, why)
                return self._source(tried)
            if wanted is not None and store.stamp(self._folder) != seen:
                again = self._try(wanted)  # somebody made it while this one waited
                if again.models:
                    return again.models[0]
            try:
                before, _ = self._wanted(False)
            except OSError as error:
                return self._without(error)
            model = self._load(tried)
            if self._export(model, before, wanted) and tried.kind == "missing":
                logger.info("exports: %s is made", self._folder)
            return model

    def _without(self, error: OSError) -> T:
        """Loads a source that has a file that cannot be read; the load may not need it."""
        logger.warning("exports: no export in %s, its source: %s", self._folder, error)
        return self._from_source()

    def _load(self, tried: _Tried[T]) -> T:
        if tried.kind != "missing":  # or whether it can be made is not known yet
            level = logging.INFO if tried.kind in _EXPECTED else logging.WARNING
            logger.log(level, "exports: %s is made anew, %s", self._folder, tried.why)
        return self._source(tried)

    def _source(self, tried: _Tried[T]) -> T:
        try:
            return self._from_source()
        except Exception as error:
            if tried.kind == "differs":
                error.add_note(
                    f"opguard: an export stands in {self._folder}, but {tried.why}; "
                    "only_load_export=True never asks for the source"
                )
            raise

    def _export(
        self, model: T, before: Mapping[str, Any], wanted: Mapping[str, Any] | None
    ) -> bool:
        """Saves the model; that is best effort, since the model is there."""
        try:
            # Described again: loading may have brought the source to this machine.
            made_from, known = self._wanted(False)
            changed = list(_changed_meanwhile(before, made_from))
            if not self._settings.network or self._settings.local_on_refresh:
                changed += _moved_meanwhile(before, made_from)
            elif wanted is not None:  # the load may have moved it to what the hub has
                changed += _moved_meanwhile(before, made_from, wanted)
            if changed:
                raise OSError(f"{_listed(changed)} while it was loaded")
            return store.write(
                self._folder, lambda aside: self._save(model, aside), made_from, known
            )
        except Exception as error:
            logger.warning(
                "exports: no export in %s: %s: %s", self._folder, type(error).__name__, error
            )
            return False


# Comparing


def _is_source(value: Any) -> bool:
    return isinstance(value, dict) and {"model", "revision", "commit", "files"} <= value.keys()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _was(path: str, old: Any, new: Any) -> str:
    if all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (old, new)):
        return f"{path} changed"
    return f"{path} was {_short(old)} and is {_short(new)}"


def differences(old: Any, new: Any, *, relaxed: bool, path: str = "") -> Iterator[tuple[str, str]]:
    """Yields (path, sentence) for each place where an export's description is not what is wanted.

    relaxed: a source that is not on this machine is whatever the export was made from.
    """
    if _is_source(old) and _is_source(new):
        yield from _source_differences(old, new, relaxed, path)
    elif isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            inner = f"{path}.{name}" if path else name
            if name not in old:
                yield inner, f"{inner} is new: {_short(new[name])}"
            elif name not in new:
                yield inner, f"{inner} is gone, it was {_short(old[name])}"
            else:
                yield from differences(old[name], new[name], relaxed=relaxed, path=inner)
    elif relaxed and _is_source(old) and old["model"] == new:
        return  # a file that an attribute names, and that is gone as the source is
    elif old != new or type(old) is not type(new):
        yield path, _was(path, old, new)


def _source_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], relaxed: bool, path: str
) -> Iterator[tuple[str, str]]:
    plain = [name for name in ("model", "revision") if old[name] != new[name]]
    for name in plain:
        yield f"{path}.{name}", _was(f"{path}.{name}", old[name], new[name])
    if plain or (relaxed and new["files"] is None):
        return
    model, revision = new["model"], new["revision"] or "main"
    if old["commit"] != new["commit"] and new["commit"] is not None:
        yield (
            f"{path}.commit",
            f"{model} at {revision!r} moved from commit {old['commit']} to {new['commit']} (pin it "
            f"with REVISION = {str(old['commit'])!r} to keep the old weights)",
        )
    elif new["files"] is None:
        if new["commit"] is None:
            yield f"{path}.files", f"{model} is not on this machine to compare with"
    else:
        for text in _file_differences(old["files"] or {}, new["files"], new["commit"] is None):
            yield f"{path}.files", f"{text} of {model}"


def _file_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], is_folder: bool
) -> Iterator[str]:
    """Yields what differs; of a commit not all files need be here, of a folder each counts."""
    for name in sorted(old.keys() & new.keys()):
        if old[name] != new[name]:
            yield f"{name} changed"
    if is_folder:
        yield from (f"{name} is new" for name in sorted(new.keys() - old.keys()))
        yield from (f"{name} is gone" for name in sorted(old.keys() - new.keys()))


def _changed_meanwhile(before: Any, after: Any) -> Iterator[str]:
    """Yields the files of a source that are not what they were before it was loaded."""
    if _is_source(before) and _is_source(after):
        if before["commit"] == after["commit"] and before["files"] is not None:
            yield from _file_differences(before["files"], after["files"] or {}, False)
    elif isinstance(before, dict) and isinstance(after, dict):
        for name in before.keys() & after.keys():
            yield from _changed_meanwhile(before[name], after[name])


def _moved_meanwhile(before: Any, after: Any, upstream: Any = None) -> Iterator[str]:
    """Yields the sources that are at another commit than before they were loaded.

    Somebody else has moved them, and which of the two was loaded nobody can tell, unless it is the
    one that the hub had said.
    """
    if _is_source(before) and _is_source(after):
        old, new = before["commit"], after["commit"]
        said = upstream["commit"] if _is_source(upstream) else None
        if old is not None and new not in (old, said):
            yield f"{before['model']} moved from commit {old} to {new}"
    elif isinstance(before, dict) and isinstance(after, dict):
        inner = upstream if isinstance(upstream, dict) else {}
        for name in before.keys() & after.keys():
            yield from _moved_meanwhile(before[name], after[name], inner.get(name))


def _listed(texts: list[str]) -> str:
    more = len(texts) - _SHOWN
    return "; ".join(texts[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _reason(found: list[tuple[str, str]]) -> str:
    text = _listed([sentence for _, sentence in found])
    if any(path == "class" for path, _ in found):
        text += "; two classes share this NAME, give one of them another"
    elif any(path.partition(".")[0] in ("identity", "instance") for path, _ in found):
        text += "; to keep an export of each, give one a NAME of its own in a subclass"
    return text
