"""Where a LoRA's pairs go in an object: paths and underscored names to modules, no guesses."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from opguard.pools._lora_files import KOHYA, Pair, Replacement

__all__ = ["Place", "places"]

_COMPONENT = re.compile(r"^(unet|transformer(?:_\d+)?|text_encoder(?:_\d+)?|prior|controlnet)\.")


@dataclass(frozen=True)
class Place:
    """One pair or replacement and the module it is for."""

    path: str
    module: nn.Module
    what: Pair | Replacement


def _modules(root: nn.Module) -> dict[str, nn.Module]:
    """Every path of every module, a compiled one under the path it had before."""
    found = {}
    for path, module in root.named_modules(remove_duplicate=False):
        if not path.endswith("_orig_mod"):
            inner = module._modules.get("_orig_mod") or module
            found[path.replace("_orig_mod.", "")] = inner
    return found


def _sgm(name: str, layers: int) -> str:
    """diffusers' underscored name for one of the UNet that SDXL was trained as."""
    for ours, theirs in (
        (r"^input_blocks_0_0", "conv_in"),
        (r"^time_embed_0", "time_embedding_linear_1"),
        (r"^time_embed_2", "time_embedding_linear_2"),
        (r"^label_emb_0_0", "add_embedding_linear_1"),
        (r"^label_emb_0_2", "add_embedding_linear_2"),
        (r"^out_2", "conv_out"),
    ):
        if re.match(ours + "$", name):
            return theirs
    found = re.match(r"^(input|output)_blocks_(\d+)_(\d+)_(.+)$", name)
    middle = re.match(r"^middle_block_([012])_(.+)$", name)
    if found:
        number, inner, rest = int(found[2]), int(found[3]), found[4]
        number -= found[1] == "input"
        block, layer = divmod(number, layers + 1)
        side = "down" if found[1] == "input" else "up"
        if rest == "op":
            where = "downsamplers_0"
        elif inner and rest == "conv":
            where = "upsamplers_0"
        else:
            where = f"{'attentions' if inner else 'resnets'}_{layer}"
        name = f"{side}_blocks_{block}_{where}_{'conv' if rest == 'op' else rest}"
    elif middle:
        where = ("resnets_0", "attentions_0", "resnets_1")[int(middle[1])]
        name = f"mid_block_{where}_{middle[2]}"
    for theirs, ours in (
        ("in_layers_2", "conv1"), ("out_layers_3", "conv2"), ("emb_layers_1", "time_emb_proj"),
        ("skip_connection", "conv_shortcut"),
    ):  # fmt: skip
        name = name.replace(theirs, ours)
    return name


class _Places:
    """The modules of one component, found by path or by underscored name."""

    def __init__(self, root: nn.Module, label: str, where: str) -> None:
        self.root, self.label, self.where = root, label, where
        self.modules = _modules(root)

    @cached_property
    def flat(self) -> dict[str, list[str]]:
        """The paths that each underscored name may stand for."""
        found: dict[str, list[str]] = {}
        for path in self.modules:
            found.setdefault(path.replace(".", "_"), []).append(path)
        return found

    def _prefixes(self) -> Iterator[str]:
        """What libraries put before a path, or leave out, when they wrap a model."""
        base = getattr(self.root, "base_model_prefix", "")
        return iter(dict.fromkeys(p for p in (base, "text_model", "model") if p))

    def _variants(self, path: str, dot: str) -> Iterator[str]:
        yield path
        for prefix in self._prefixes():
            if path.startswith(prefix + dot):
                yield path[len(prefix) + 1 :]
            yield f"{prefix}{dot}{path}"

    def _variant(self, path: str) -> str | None:
        return next((p for p in self._variants(path, ".") if p in self.modules), None)

    def _flat(self, name: str, key: str) -> str | None:
        names = list(self._variants(name, "_"))
        layers = getattr(getattr(self.root, "config", None), "layers_per_block", None)
        if isinstance(layers, int):
            names.append(_sgm(name, layers))
        for candidate in names:
            found = self.flat.get(candidate, [])
            if len({id(self.modules[path]) for path in found}) > 1:
                raise ValueError(
                    f"expected one module of {self.label} for {key!r} of {self.where}, came "
                    f"{' and '.join(found)}; save this LoRA in peft's layout, which keeps the dots"
                )
            if found:
                return found[0]
        return None

    def find(self, pair: Pair | Replacement, path: str) -> Place | None:
        """Where one pair goes; None where there is no such module."""
        if isinstance(pair, Pair) and pair.flat:
            found = self._flat(path, pair.key)
        else:
            found = path if path in self.modules else self._variant(path)
        return None if found is None else Place(found, self.modules[found], pair)

    def missing(self, pair: Pair | Replacement, path: str) -> LookupError:
        names = self.flat if isinstance(pair, Pair) and pair.flat else self.modules
        near = difflib.get_close_matches(path, [n for n in names if n], n=1, cutoff=0.5)
        hint = f", the nearest is {near[0]!r}" if near else ""
        return LookupError(
            f"expected a module {path!r} in {self.label} for {pair.key!r} of {self.where}, came "
            f"none{hint}; this LoRA was made for another model"
        )


def _component(pair: Pair | Replacement) -> tuple[str, ...]:
    """The attributes of a pipeline that a pair may be for, () for one that names none."""
    if isinstance(pair, Pair) and pair.component:
        return KOHYA[pair.component]
    if isinstance(pair, Pair) and not pair.peft:
        found = _COMPONENT.match(pair.path)
        return (found[1],) if found else ()
    return ()


def _inner(pair: Pair | Replacement) -> str:
    flat = isinstance(pair, Pair) and pair.flat
    return pair.path if flat else _COMPONENT.sub("", pair.path, count=1)


def _in_module(root: nn.Module, whats: Sequence[Pair | Replacement], where: str) -> list[Place]:
    """One module: the paths as they are, or all without the one component they name."""
    label = type(root).__name__
    inside = _Places(root, label, where)
    found = [inside.find(what, what.path) for what in whats]
    prefixes = {what.component for what in whats if isinstance(what, Pair)} - {""}
    if all(found) and len(prefixes) < 2:
        return [place for place in found if place is not None]
    named = {_component(what) for what in whats} - {()}
    if named and all(any(isinstance(getattr(root, n, None), nn.Module) for n in names)
                     for names in named):  # fmt: skip
        return _in_pipeline(root, whats, where)
    if len(named) > 1:
        parts = " and ".join(sorted(names[0] for names in named))
        raise ValueError(
            f"expected a LoRA for one model to go into {label}, came {where} for {parts}; "
            f"give component={sorted(names[0] for names in named)[0]!r}, or apply it to the "
            "pipeline"
        )
    result = []
    for what, whole in zip(whats, found, strict=True):
        path = _inner(what) if _component(what) else what.path
        place = whole or inside.find(what, path)
        if place is None:
            raise inside.missing(what, path)
        result.append(place)
    return result


def _in_pipeline(obj: Any, whats: Sequence[Pair | Replacement], where: str) -> list[Place]:
    """An object with models for attributes, as a diffusers pipeline."""
    label = type(obj).__name__
    known: dict[str, _Places] = {}
    result = []
    for what in whats:
        names = _component(what)
        name = next((n for n in names if isinstance(getattr(obj, n, None), nn.Module)), None)
        if name is None:
            wanted = " or ".join(names) if names else "the component's name before the path"
            raise LookupError(
                f"expected {wanted} in {label} for {what.key!r} of {where}, came none; "
                "apply it to the module that it was made for"
            )
        inside = known.get(name) or _Places(getattr(obj, name), f"{label}.{name}", where)
        known[name] = inside
        place = inside.find(what, _inner(what))
        if place is None:
            raise inside.missing(what, _inner(what))
        result.append(place)
    return result


def places(
    obj: Any, whats: Sequence[Pair | Replacement], where: str, component: str | None
) -> list[Place]:
    """Where everything of a LoRA goes in ``obj``; raises where one thing of it has no place.

    Args:
        component: take only what is for this part of a pipeline, and ``obj`` is that part.
    """
    if component is not None:
        chosen = [what for what in whats if component in _component(what)]
        if not chosen:
            have = sorted({name for what in whats for name in _component(what)})
            raise LookupError(
                f"expected matrices for {component!r} in {where}, came "
                f"{', '.join(have) or 'none that name a component'}; leave component out or "
                "name one of these"
            )
        nameless = next((what for what in whats if not _component(what)), None)
        if nameless is not None:
            raise LookupError(
                f"expected every key of {where} to name its component, came {nameless.key!r}; "
                "leave component out, or save each part to a file of its own"
            )
        whats = chosen
    if isinstance(obj, nn.Module):
        found = _in_module(getattr(obj, "_orig_mod", obj), whats, where)
    else:
        found = _in_pipeline(obj, whats, where)
    _refuse_twice(found, where)
    return found


def _refuse_twice(found: Sequence[Place], where: str) -> None:
    """One file may have a module under names of two layouts: nobody knows whether it means both."""
    pairs: dict[int, Place] = {}
    for place in found:
        if not isinstance(place.what, Pair):
            continue
        other = pairs.setdefault(id(place.module), place)
        if other is not place:
            raise ValueError(
                f"expected one pair of matrices for {place.path} in {where}, came "
                f"{other.what.key!r} and {place.what.key!r}; leave one of them out"
            )
