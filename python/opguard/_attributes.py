"""Checks of what a subclass of ``OpGuardBase`` declares, when the class is made.

A value of a wrong type is an error that names the class and the attribute. A name that is nearly
one of the known ones, with a value that would fit it, is most likely a slip and is logged.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

__all__ = ["check_attributes", "check_switches"]

BOOLEANS = (
    "USE_SAFETENSORS",
    "NEED_GRADS",
    "IS_CALLABLE",
    "SKIP_TO_DEVICE",
    "SKIP_TO_DTYPE",
    "DEFAULT_QUANT_USE_DOUBLE",
    "DEFAULT_FLAGS",
)
# Keywords of the constructor that may be None too: then the class says it.
OPTIONAL_SWITCHES = ("quant_use_double_override", "flags")
OTHERS = {
    "NAME": str,
    "MODEL_ID": str,
    "REVISION": str,
    "DETECTOR_TYPE": type,
    "DEFAULT_DEVICE": str,
    "DEFAULT_DEVICE_MAP": (str, dict),
    "DTYPE_PREFERENCE": str,
    "FROM_PRETRAINED_SKIP_KWARGS": tuple,
    "FROM_PRETRAINED_ADDITIONAL_KWARGS": dict,
    "DEFAULT_QUANT_TYPE": str,
}
KNOWN: dict[str, Any] = dict.fromkeys(BOOLEANS, bool) | OTHERS
LONGEST_NAME = 200  # it is part of a folder's name
ALIKE = 0.9  # so that only a letter or two differ: MODEL_ID and T5_MODEL_ID are not alike

logger = logging.getLogger("opguard")


def _wrong(cls: type, name: str, expected: str, value: Any, way: str) -> TypeError:
    return TypeError(
        f"{cls.__name__}.{name}: expected {expected}, got {type(value).__name__}; {way}"
    )


def check_attributes(cls: type) -> None:
    """Raises TypeError or ValueError for an attribute of a wrong type; warns of near misses."""
    for name in BOOLEANS:
        value = getattr(cls, name)
        if not isinstance(value, bool):
            raise _wrong(cls, name, "True or False", value, "write one of the two")
    own = getattr(cls, "NAME", None)
    if own is not None and not isinstance(own, str):
        raise _wrong(cls, "NAME", "a short name such as 'tiny-vae'", own, "write a str")
    if own is not None and ("\0" in own or len(own) > LONGEST_NAME):
        got = "one with a NUL" if "\0" in own else f"{len(own)}"
        raise ValueError(
            f"{cls.__name__}.NAME: expected at most {LONGEST_NAME} characters and no NUL, got "
            f"{got}; it is part of a folder's name, choose a short one"
        )
    revision = getattr(cls, "REVISION", None)
    if revision is not None and not isinstance(revision, str):
        raise _wrong(cls, "REVISION", "a commit, tag or branch, or None", revision, "write a str")
    kind = inspect.getattr_static(cls, "DETECTOR_TYPE", None)
    late = hasattr(type(kind), "__get__")  # imported when it is read: that is not now
    if kind is not None and not (late or callable(kind) or hasattr(kind, "from_pretrained")):
        what = "a class with from_pretrained, or a callable that gets the model id"
        raise _wrong(cls, "DETECTOR_TYPE", what, kind, "give the class itself, not its name")
    _warn_of_near_misses(cls)
    _check_loading(cls)


def _check_loading(cls: Any) -> None:
    skip = cls.FROM_PRETRAINED_SKIP_KWARGS
    if not isinstance(skip, tuple):
        raise _wrong(
            cls, "FROM_PRETRAINED_SKIP_KWARGS", "a tuple of names", skip, "write ('name',)"
        )
    more = cls.FROM_PRETRAINED_ADDITIONAL_KWARGS
    if not isinstance(more, Mapping):
        name = "FROM_PRETRAINED_ADDITIONAL_KWARGS"
        raise _wrong(cls, name, "a mapping", more, "write {'name': value}")
    for name in ("NAME", "MODEL_ID", "REVISION", "DETECTOR_TYPE"):
        value = cls.__dict__.get(name, ...)
        if isinstance(value, str) and not value:
            raise ValueError(f"{cls.__name__}.{name}: expected a value, got an empty string")


def _warn_of_near_misses(cls: type) -> None:
    for name, value in vars(cls).items():
        if name.startswith("_") or not name.isupper() or name in KNOWN or name[-1].isdigit():
            continue
        import difflib

        for near in difflib.get_close_matches(name, KNOWN, n=1, cutoff=ALIKE):
            if isinstance(value, KNOWN[near]):
                logger.warning(
                    "%s.%s: no attribute that opguard knows, did you mean %s? It has no effect.",
                    cls.__name__,
                    name,
                    near,
                )


def check_switches(name: str, given: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raises TypeError for constructor keywords of a wrong type: "no" would count as true."""
    for key, default in defaults.items():
        optional = key in OPTIONAL_SWITCHES
        if (isinstance(default, bool) or optional) and not (
            isinstance(given[key], bool) or (optional and given[key] is None)
        ):
            raise TypeError(
                f"{name}({key}=...): expected True or False, got {type(given[key]).__name__} "
                f"{given[key]!r:.40}; write one of the two"
            )
    config = given["quant_config_override"]
    if isinstance(config, str):
        raise TypeError(
            f"{name}(quant_config_override=...): expected a configuration such as "
            f"BitsAndBytesConfig, got the str {config!r:.40}; for the name of a type write "
            f"quant_type_override={config!r:.40}"
        )
