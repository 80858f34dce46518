"""Keeps a block off the network: strict for the context that asked, invisible to every other one.

How far the guard reaches is a context variable, so threads and asyncio tasks are independent. Three
layers ask it, and all of them are taken down when the last guard of the process is left:

1. `huggingface_hub.constants.HF_HUB_OFFLINE`, which huggingface_hub, transformers and diffusers
   ask before each request and each cache decision, becomes an object whose truth is the user's own
   value or, inside a guard, True. No environment variable is touched.
2. `socket.getaddrinfo`, its elders and what connects or sends of `socket.socket` refuse to leave
   this machine inside a guard, for what does not ask layer 1.
3. A failure that means "not on this machine" leaves the guard as one sentence.

A thread that is started inside a guard, and a job that is given to a thread pool inside one, stays
off the network to its end, also when the guard was left before. What neither goes through Python's
sockets nor its threads (a child process, a C library with sockets of its own) is out of reach.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Container, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from opguard.guards._base import Guard, _is_compiling
from opguard.hub import LocalFileMissing, cache_in_use, local_folder

__all__ = ["LocalFileMissing", "LocalityError", "is_local", "local_guard"]

# Addresses only: a name that begins like one may be anybody's.
THIS_MACHINE: Final = re.compile(r"(?:::ffff:)?127(?:\.[0-9]+){1,3}|::1", re.IGNORECASE)

_depth: ContextVar[int] = ContextVar("opguard_local_depth", default=0)


class LocalityError(ConnectionError):
    """Something inside a `local_guard` tried to reach another machine."""


def is_local() -> bool:
    """Returns whether the current context is inside a strict `local_guard`."""
    return _depth.get() > 0


def is_offline() -> bool:
    """Returns whether the hub may not be asked here: by a guard, by the user, or for want of it."""
    if is_local():
        return True
    try:
        from huggingface_hub import constants
    except ImportError:
        return True
    return bool(constants.HF_HUB_OFFLINE)


class _Offline:
    """The offline constant while a guard is active anywhere: true where the guard is."""

    __slots__ = ("own",)

    def __init__(self, own: object) -> None:
        self.own = own

    def __bool__(self) -> bool:
        return _depth.get() > 0 or bool(self.own)

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    def __hash__(self) -> int:
        return hash(bool(self))

    def __repr__(self) -> str:
        return repr(bool(self))


def _leaves_machine(address: object) -> bool:
    """Returns whether a socket address, or a host, is on another machine."""
    host = address[0] if isinstance(address, tuple) and address else address
    if isinstance(host, bytes | bytearray):
        host = bytes(host).decode("ascii", "replace")
    if not isinstance(host, str):
        return False
    # A name without an address is a unix socket's path or the empty host, which is this machine.
    if host in ("", "localhost") or host.startswith(("/", "\0")):
        return False
    return not THIS_MACHINE.fullmatch(host)


def _refuse(what: object) -> None:
    raise LocalityError(
        f"local_guard: expected no connection to another machine, got one to {what!r:.120}; "
        "load from a local folder or a filled cache, or leave the guard for this step"
    )


class _Patches:
    """The two process-wide layers: in place while any guard is active, counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active = 0
        self._undo: list[Callable[[], None]] = []

    def acquire(self) -> None:
        with self._lock:
            if self._active == 0:
                self._install()
            else:
                self._offline_again()
            self._active += 1

    def release(self) -> None:
        with self._lock:
            self._active -= 1
            if self._active == 0:
                while self._undo:
                    self._undo.pop()()

    def _replace(self, owner: Any, name: str, new: object) -> None:
        had = name in vars(owner)
        old = getattr(owner, name)
        setattr(owner, name, new)

        def undo() -> None:
            # Somebody else's later patch is theirs to take back.
            if vars(owner).get(name) is new:
                if had:
                    setattr(owner, name, old)
                else:
                    delattr(owner, name)

        self._undo.append(undo)

    def _offline_again(self) -> None:
        """Puts layer 1 back where a program has set the constant while a guard was active."""
        constants = sys.modules.get("huggingface_hub.constants")
        own = getattr(constants, "HF_HUB_OFFLINE", None)
        if constants is not None and own is not None and not isinstance(own, _Offline):
            self._replace(constants, "HF_HUB_OFFLINE", _Offline(own))

    def _install(self) -> None:
        try:
            # Two milliseconds, and transformers or diffusers imported later inside the guard
            # find the constant as it must be.
            from huggingface_hub import constants
        except ImportError:
            pass
        else:
            own = getattr(constants, "HF_HUB_OFFLINE", False)
            self._replace(constants, "HF_HUB_OFFLINE", _Offline(own))
        for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
            self._replace(socket, name, _guarded_lookup(getattr(socket, name)))
        for name in ("connect", "connect_ex"):
            self._replace(socket.socket, name, _guarded_connect(getattr(socket.socket, name)))
        for name, place in (("sendto", -1), ("sendmsg", 3)):
            if hasattr(socket.socket, name):
                real = getattr(socket.socket, name)
                self._replace(socket.socket, name, _guarded_send(real, place))
        self._replace(threading.Thread, "start", _guarded_start(threading.Thread.start))
        pool = concurrent.futures.ThreadPoolExecutor
        self._replace(pool, "submit", _guarded_submit(pool.submit))


def _guarded_lookup(real: Callable[..., Any]) -> Callable[..., Any]:
    def lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        if _depth.get() > 0 and host is not None and _leaves_machine(host):
            _refuse(host)
        return real(host, *args, **kwargs)

    return lookup


def _check_address(sock: socket.socket, address: object) -> None:
    if sock.family != getattr(socket, "AF_UNIX", None) and _leaves_machine(address):
        _refuse(address)


def _guarded_connect(real: Callable[..., Any]) -> Callable[..., Any]:
    def connect(self: socket.socket, address: Any) -> Any:
        if _depth.get() > 0:
            _check_address(self, address)
        return real(self, address)

    return connect


def _guarded_send(real: Callable[..., Any], place: int) -> Callable[..., Any]:
    """Wraps a method of sockets that sends to the address at ``place`` of its arguments."""

    def send(self: socket.socket, *args: Any) -> Any:
        if _depth.get() > 0 and len(args) > max(1, place) and args[place] is not None:
            _check_address(self, args[place])
        return real(self, *args)

    return send


def _guarded_start(real: Callable[..., Any]) -> Callable[..., Any]:
    def start(self: threading.Thread) -> None:
        if _depth.get() > 0 and not _outlives_guards(self):
            run = self.run

            def run_locally() -> None:
                vars(self).pop("run", None)
                run_local(run)

            self.run = run_locally  # type: ignore[method-assign]
            try:
                real(self)
            except BaseException:
                vars(self).pop("run", None)
                raise
            return
        real(self)

    return start


def _outlives_guards(thread: threading.Thread) -> bool:
    """Returns whether a thread serves the whole process, whoever happened to start it."""
    # Each job of a pool brings its own locality; tqdm watches its bars to the process's end.
    worker = getattr(sys.modules.get("concurrent.futures.thread"), "_worker", None)
    if worker is not None and getattr(thread, "_target", None) is worker:
        return True
    return type(thread).__module__.partition(".")[0] == "tqdm"


def _guarded_submit(real: Callable[..., Any]) -> Callable[..., Any]:
    def submit(self: Any, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if _depth.get() > 0:
            return real(self, run_local, fn, *args, **kwargs)
        return real(self, fn, *args, **kwargs)

    return submit


def run_local(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Calls ``function`` off the network."""
    enter_local()
    try:
        return function(*args, **kwargs)
    finally:
        leave_local()


_patches: Final = _Patches()


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        waiting += [found.__context__, found.__cause__]


_LIBRARIES = ("huggingface_hub", "transformers", "diffusers")
_REPO_NAMES = ("repo_id", "path_or_repo_id", "pretrained_model_name_or_path")
_FILE_NAMES = ("filename", "weights_name")


def _library_locals(error: BaseException) -> Iterator[dict[str, Any]]:
    """Yields the locals of the hub libraries' frames that `error` passed, outermost first."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] in _LIBRARIES:
            yield frame.f_locals
        trace = trace.tb_next


def _wanted(error: BaseException) -> dict[str, str]:
    """Returns what was looked for: repo, and file, revision and kind where they are known."""
    wanted: dict[str, str] = {}
    for found in _chain(error):
        for names in _library_locals(found):
            for name in _REPO_NAMES:
                if isinstance(names.get(name), str | os.PathLike):
                    wanted["repo"] = os.fspath(names[name])
            for name in _FILE_NAMES:
                if isinstance(names.get(name), str):
                    wanted["file"] = names[name]
            for name in ("revision", "repo_type", "subfolder"):
                if isinstance(names.get(name), str) and names[name]:
                    wanted[name] = str(names[name])
        named = re.search(r"(?:no file named|containing an?) ([\w-]+(?:\.\w+)+)", str(found))
        if named:
            wanted.setdefault("file", named[1])
    return wanted


_ABSENT = ("no file named", "not appear to have", "couldn't find", "not fully cached")


def _means_missing(error: BaseException, wanted: dict[str, str]) -> bool:
    """Returns whether `error` comes from a file or repo that is not on this machine."""
    for found in _chain(error):
        if isinstance(found, LocalityError):
            return True
        if type(found).__name__ in (
            "LocalEntryNotFoundError",
            "OfflineModeIsEnabled",
            "HFValidationError",
        ):
            return True
    folder = Path(wanted["repo"])
    if isinstance(error, OSError):
        if str(error).startswith("Can't load"):  # also said of a file that is here and is damaged
            here = local_folder(wanted["repo"], wanted.get("revision"))
            return here is None or not (here / wanted.get("file", "")).exists()
        return any(words in str(error) for words in _ABSENT)
    if folder.is_dir() and (isinstance(error, ValueError) or _in_models(error)):
        # transformers says "unrecognized model" of a folder without a configuration, or takes the
        # defaults, which no weights fit.
        wanted["file"] = "config.json"
        return not any((folder / name).exists() for name in ("config.json", "model_index.json"))
    return False


def _in_models(error: BaseException) -> bool:
    """Returns whether `error` passed transformers' loading of a model."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == "transformers.modeling_utils":
            return True
        trace = trace.tb_next
    return False


def _pickled(wanted: dict[str, str]) -> str | None:
    """Returns the weights of another format that are where safetensors were looked for."""
    folder = local_folder(wanted["repo"], wanted.get("revision"))
    if folder is None or not wanted.get("file", "").endswith(".safetensors"):
        return None
    where = (folder / wanted.get("subfolder", "") / wanted["file"]).parent
    names = ("pytorch_model*.bin", "diffusion_pytorch_model*.bin")
    found = sorted(path.name for name in names for path in where.glob(name))
    return found[0] if found else None


def _set_by_user() -> bool:
    constants = sys.modules.get("huggingface_hub.constants")
    own = getattr(constants, "HF_HUB_OFFLINE", False)
    return bool(own.own if isinstance(own, _Offline) else own)


def _sentence(wanted: dict[str, str]) -> str:
    pickled = _pickled(wanted)
    if pickled is not None:
        return (
            f"local_guard: expected {wanted['file']} of {wanted['repo']!r}, found {pickled}, which "
            "may run code when it is opened; if you trust it set USE_SAFETENSORS = False"
        )
    unset = "; unset HF_HUB_OFFLINE for that" if _set_by_user() else ""
    return _how_to_fetch(_by_id(wanted)) + unset


_SNAPSHOT = re.compile(r".*/models--([^/]+)/snapshots/[^/]+/?(.*)")


def _by_id(wanted: dict[str, str]) -> dict[str, str]:
    """Returns what was wanted by its hub id, where a library asked for a folder of the cache."""
    folder, file = wanted["repo"], wanted.get("file", "")
    found = _SNAPSHOT.fullmatch(folder)
    if found is None:
        return wanted
    asked = wanted | {"repo": found[1].replace("--", "/", 1)}
    name = file.removeprefix(folder).lstrip("/")
    name = name if not found[2] or name.startswith(found[2]) else f"{found[2]}/{name}"
    return asked | ({"file": name} if file else {})


def _how_to_fetch(wanted: dict[str, str]) -> str:
    repo, file = wanted["repo"], wanted.get("file")
    if wanted.get("subfolder") and file and not file.startswith(wanted["subfolder"]):
        file = f"{wanted['subfolder']}/{file}"
    what = f"{file} of {repo!r}" if file else repo
    if os.path.isdir(repo):
        return (
            f"local_guard: expected {file or 'a model'} in the folder {repo!r}, found none; "
            f"fetch it first with: hf download REPO {file or ''}".rstrip()
            + f" --local-dir {repo}"
        )
    if repo.startswith(("/", ".", "~")) or repo.count("/") > 1:
        return (
            f"local_guard: expected {what} on this machine, there is no folder {repo!r}; "
            f"fetch it first with: hf download REPO --local-dir {repo}"
        )
    words = ["hf download", repo]
    if file:
        words.append(file)
    if wanted.get("repo_type", "model") != "model":
        words.append(f"--repo-type {wanted['repo_type']}")
    if wanted.get("revision", "main") != "main":
        words.append(f"--revision {wanted['revision']}")
    return (
        f"local_guard: expected {what if file else repr(repo)} on this machine, found no copy in "
        f"{cache_in_use()}; fetch it first with: {' '.join(words)}"
    )


def check_config(kind: Any, model_id: str, given: Container[str]) -> None:
    """Raises `LocalFileMissing` where a transformers model has a folder without a config.json.

    transformers would make the model by the defaults of its class, which may be billions of
    parameters, before it finds that no weights fit.
    """
    if not hasattr(kind, "config_class") or not str(kind.__module__).startswith("transformers."):
        return
    elsewhere = any(name in given for name in ("config", "gguf_file", "subfolder"))
    if elsewhere or not os.path.isdir(model_id):
        return
    names = ("config.json", "adapter_config.json")
    if not any(os.path.exists(os.path.join(model_id, name)) for name in names):
        raise LocalFileMissing(_sentence({"repo": model_id, "file": "config.json"}))


def missing_file(
    error: BaseException | None, *, folders_only: bool = False
) -> LocalFileMissing | None:
    """Returns the one sentence that `error` means, None where it means something else.

    folders_only: of a folder only, which is on this machine whether or not the hub may be asked.
    """
    if isinstance(error, LocalFileMissing) or not isinstance(error, Exception):
        return None
    wanted = _wanted(error)
    if "repo" not in wanted or (folders_only and not os.path.isdir(wanted["repo"])):
        return None
    if not _means_missing(error, wanted):
        return None
    return LocalFileMissing(_sentence(wanted))


class Naming(Guard):
    """A guard that, where it kept its block off the network, names the file that was missing."""

    local_files_only: bool = True

    def _missing(self, error: BaseException | None) -> LocalFileMissing | None:
        return missing_file(error) if self.local_files_only else None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.in_graph and _is_compiling():
            return
        # Before the frames that know the name are sanitized.
        missing = self._missing(error)
        super().__exit__(kind, error, trace)
        if missing is not None:
            try:
                raise missing from error
            finally:
                # This frame is part of the new traceback: it must keep neither the old one nor,
                # by a ring with the error, the frames that called it.
                del missing, error, trace


class local_guard(Naming):
    """Opens no connection to another machine inside the block, in this context only.

    huggingface_hub, transformers and diffusers read what is on this machine as if they were told
    to be offline; whatever else tries to connect gets a `LocalityError`. A file that is not here is
    a `LocalFileMissing` that names it and the command that fetches it.

    `local_files_only=False` changes nothing: it neither lifts the user's own HF_HUB_OFFLINE nor an
    outer `local_guard`. Yields the guard.
    """

    in_graph = True  # a graph opens no connections

    def __init__(self, *, local_files_only: bool = True) -> None:
        self.local_files_only = bool(local_files_only)

    def _enter(self) -> local_guard:
        if self.local_files_only:
            enter_local()
        return self

    def _exit(self, error: BaseException | None) -> None:
        if self.local_files_only:
            leave_local()


def enter_local() -> None:
    """Takes this context off the network, once more."""
    _patches.acquire()
    _depth.set(_depth.get() + 1)
    _forget_sessions()


def leave_local() -> None:
    """Undoes one `enter_local` of this context."""
    _depth.set(max(0, _depth.get() - 1))
    _patches.release()
    _forget_sessions()


def _forget_sessions() -> None:
    """Drops the sessions of huggingface_hub before 1.0, which decide at birth to be offline."""
    http = sys.modules.get("huggingface_hub.utils._http")
    reset = getattr(http, "reset_sessions", None)
    if callable(reset):
        reset()
