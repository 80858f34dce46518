"""The Hugging Face hub as opguard sees it: where its cache is, what is in it, what it has now.

Only `upstream_commit` opens a connection, and only its caller knows whether it may.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from pathlib import Path

__all__ = [
    "LocalFileMissing",
    "cache_in_use",
    "expanded",
    "hub_cache_dir",
    "is_commit",
    "local_commit",
    "local_folder",
    "upstream_commit",
]

logger = logging.getLogger("opguard")

UPSTREAM_TIMEOUT_S = 5.0
UPSTREAM_KEPT_S = 60.0

_upstream: dict[tuple[str, str, str], tuple[float, str | None]] = {}
_upstream_lock = threading.Lock()


class LocalFileMissing(FileNotFoundError):
    """A file, or an export, that may only be read on this machine is not on it.

    The failure of the library that looked for it, where there is one, is the `__cause__`.
    """


def expanded(path: str) -> Path:
    """Returns the path with ``~`` as the user's folder; as it is where there is no such user."""
    return Path(os.path.expanduser(path))  # pathlib's own raises there


def hub_cache_dir() -> Path:
    """Returns the folder of the Hugging Face hub cache, whether or not it exists."""
    direct = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if direct:
        return expanded(direct)
    home = os.environ.get("HF_HOME")
    if home:
        return expanded(home) / "hub"
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface/hub"


def cache_in_use() -> str:
    """Returns the cache folder that huggingface_hub uses, as a program may have changed it."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return str(hub_cache_dir())
    return str(constants.HF_HUB_CACHE)


def is_commit(revision: str | None) -> bool:
    """Returns whether a revision is a full commit, which names its content for ever."""
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def _repo(model_id: str, cache_dir: str | None) -> Path:
    return Path(cache_dir or cache_in_use()) / ("models--" + model_id.replace("/", "--"))


def local_commit(model_id: str, revision: str | None, cache_dir: str | None = None) -> str | None:
    """Returns the commit that `revision` (None: main) names in the cache, None where it is not."""
    if revision is not None and is_commit(revision):
        return revision
    repo = _repo(model_id, cache_dir)
    try:
        return (repo / "refs" / (revision or "main")).read_text().strip() or None
    except (OSError, ValueError):
        return None


def local_folder(model_id: str, revision: str | None, cache_dir: str | None = None) -> Path | None:
    """Returns the folder with the files of `model_id` on this machine, None where there is none."""
    direct = expanded(model_id)
    if os.path.isdir(direct):
        return direct
    commit = local_commit(model_id, revision, cache_dir) or revision or "main"
    folder = _repo(model_id, cache_dir) / "snapshots" / commit
    return folder if os.path.isdir(folder) else None


def upstream_commit(model_id: str, revision: str | None) -> str | None:
    """Asks the hub for the commit that `revision` (None: main) names now; None: no answer.

    Waits `UPSTREAM_TIMEOUT_S` at most, and asks again for the same after `UPSTREAM_KEPT_S` only.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_id):
        return None
    try:
        from huggingface_hub import HfApi
    except ImportError:
        return None
    api = HfApi()
    key = (str(api.endpoint), model_id, revision or "main")
    with _upstream_lock:
        asked, commit = _upstream.get(key, (float("-inf"), None))
        if time.monotonic() - asked < UPSTREAM_KEPT_S:
            return commit
    try:
        commit = api.model_info(model_id, revision=revision, timeout=UPSTREAM_TIMEOUT_S).sha
    except Exception as error:
        # Whatever is wrong with the hub: what is on this machine counts then.
        logger.info("%s: the hub was not asked, %s: %s", model_id, type(error).__name__, error)
        if type(error).__name__ == "OfflineModeIsEnabled":
            return None  # this block may not ask, the next one may
        commit = None
    with _upstream_lock:
        _upstream[key] = time.monotonic(), commit
    return commit
