"""Reading LoRA files: which module each pair of matrices belongs to, in four layouts.

peft's, diffusers' of today and of its first years, kohya's (LoCon included). Every key is
understood or refused by name; none is passed over. The tensors are copied into memory of our own:
what happens to the file later has no effect.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opguard.pools._lora_config import check_config, check_pair, config_of, scaling

__all__ = ["Adapter", "Pair", "Replacement", "read"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PEFT = "base_model.model."
# What kohya's names begin with, and the attributes of a pipeline that they may stand for.
KOHYA = {
    "lora_unet": ("unet", "transformer"),
    "lora_transformer": ("transformer",),
    "lora_te": ("text_encoder",),
    "lora_te1": ("text_encoder",),
    "lora_te2": ("text_encoder_2",),
    "lora_te3": ("text_encoder_3",),
    "lycoris": ("unet", "transformer"),
}
_KOHYA = re.compile(rf"^({'|'.join(sorted(KOHYA, key=len, reverse=True))})_(.+)$")
# (key, role by what the key says, what kind of key); groups: module, role, adapter's name.
_ROLES: tuple[tuple[re.Pattern[str], dict[str, str], str], ...] = (
    (re.compile(r"^(.+)\.lora_([AB])(?:\.([^.]+))?\.weight$"), {"A": "down", "B": "up"}, ""),
    (re.compile(r"^(.+)\.lora_B()(?:\.([^.]+))?\.bias$"), {"": "bias"}, ""),
    (
        re.compile(r"^(.+)\.lora_embedding_([AB])(?:\.([^.]+))?$"),
        {"A": "down", "B": "up"},
        "embedding",
    ),
    (re.compile(r"^(.+)\.lora_(down|up|mid)\.weight$"), {}, ""),
    (re.compile(r"^(.+)\.lora(?:_linear_layer)?\.(down|up)\.weight$"), {}, ""),
    (re.compile(r"^(.+\.to_(?:q|k|v|out))_lora\.(down|up)\.weight$"), {}, "old"),
    (re.compile(r"^(.+\.to_(?:q|k|v|out))_lora\.(alpha)$"), {}, "old"),
    (re.compile(r"^(.+)\.(alpha)$"), {}, ""),
)
_PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_WHOLE = re.compile(r"^(.+?)(?:\.base_layer|\.modules_to_save(?:\.[^.]+)?)\.(weight|bias)$")
_OTHER = (
    (("lora_magnitude_vector", "dora_scale"), "DoRA's norms"),
    (("hada_",), "a Hadamard product (LoHa)"),
    (("lokr_",), "a Kronecker product (LoKr)"),
    (("oft_", "boft_"), "an orthogonal transform (OFT)"),
    ((".diff", ".diff_b", ".set_weight"), "a full difference of weights"),
    (("bundle_emb", "emb_params"), "a textual inversion"),
)


@dataclass
class Pair:
    """Two matrices for one module, not scaled yet.

    Attributes:
        path: the module's path; with ``_`` for every dot where ``flat``.
        component: kohya's prefix, "" where the path alone says it.
        up: [rows, r]; down: [r, columns of the flattened kernel]; fp32, or fp64.
        scale: what the product is multiplied by: the file's scaling and the user's.
        kernel: size of the kernel that ``down`` has, () for a linear layer.
        bias: what is added to the module's bias, not scaled either.
        key: a key of the file, for messages.
    """

    path: str
    component: str
    flat: bool
    peft: bool
    embedding: bool
    up: Tensor
    down: Tensor
    scale: float
    kernel: tuple[int, ...]
    bias: Tensor | None
    key: str


@dataclass
class Replacement:
    """A parameter that the file brings whole."""

    path: str
    name: str
    tensor: Tensor
    key: str


@dataclass
class Adapter:
    """A file, read.

    Attributes:
        where: how messages name it.
        digest: of every tensor and setting, in hexadecimal; equal for equal contents.
        assumed: how many pairs had no alpha, so that alpha = r was taken.
    """

    where: str
    pairs: list[Pair]
    replacements: list[Replacement]
    digest: str
    assumed: int


@dataclass
class _Entry:
    """The tensors of one module as they are found."""

    path: str
    component: str
    flat: bool
    peft: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    embedding: bool = False


def _folder(path: Path) -> tuple[Path, Path | None]:
    """The file of tensors in an adapter's folder, and its config."""
    config = path / "adapter_config.json"
    known = path / "adapter_model.safetensors"
    if known.is_file():
        return known, config if config.is_file() else None
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        pickled = " (pickled .bin files are not read: save it with safe_serialization)"
        raise FileNotFoundError(
            f"expected adapter_model.safetensors in {path}, came {len(found)} .safetensors files"
            f"{pickled if list(path.glob('*.bin')) else ''}; give the path of the file itself"
        )
    return found[0], config if config.is_file() else None


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file and its metadata, from one reading of its bytes."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = path.read_bytes()
    if data.startswith(_PICKLED):
        raise ValueError(
            f"expected a safetensors file at {path}, came a pickled one, which could run code when "
            "it is read; save it with safe_serialization=True"
        )
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"expected a whole safetensors file at {path}, came {len(data)} bytes that are none "
            f"({error}); fetch or save it again"
        ) from None
    return tensors, metadata


def _metadata_config(metadata: Mapping[str, str], where: str) -> dict[str, Any] | None:
    """The configuration that diffusers writes into the file: keys begin with the component."""
    text = metadata.get("lora_adapter_metadata")
    if not text:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"expected JSON under lora_adapter_metadata of {where}, came {text[:40]!r}; "
            "save it again, or give config="
        )
    return found


def _open(source: object, config: object) -> tuple[dict[str, Tensor], dict[str, Any] | None, str]:
    """Tensors, configuration and name of whatever is given as a LoRA."""
    if isinstance(source, Mapping):
        tensors = {}
        for key, value in source.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"expected tensors in the state dict of a LoRA, came "
                    f"{type(value).__name__} at {key!r}; leave it out"
                )
            if value.is_meta:
                raise ValueError(
                    f"expected tensors with values in the state dict of a LoRA, came a meta "
                    f"tensor at {key!r}; load it first"
                )
            tensors[str(key)] = value.detach().to("cpu", copy=True)
        return tensors, config_of(config, "a state dict"), "a state dict"
    if not isinstance(source, str | PathLike):
        raise TypeError(
            f"expected a LoRA as a path or a state dict, came {type(source).__name__}; "
            "give a .safetensors file, a peft adapter folder or a dict of tensors"
        )
    path = Path(source)
    where = str(path)
    beside: Path | None = None
    if path.is_dir():
        path, beside = _folder(path)
    elif not path.is_file():
        raise FileNotFoundError(
            f"expected a .safetensors file or an adapter folder at {path}, came nothing; "
            "fetch it first (huggingface_hub.snapshot_download) and give its path"
        )
    elif path.name == "adapter_model.safetensors":
        beside = path.with_name("adapter_config.json")
    tensors, metadata = _load(path)
    settings = config_of(config, where)
    if settings is None and beside is not None and beside.is_file():
        settings = config_of(beside, where)
    if settings is None:
        settings = _metadata_config(metadata, where)
    return tensors, settings, where


def _checked(key: str, tensor: Tensor, where: str) -> Tensor:
    if key.endswith(".alpha") and not tensor.is_floating_point() and not tensor.is_complex():
        tensor = tensor.double()  # some tools write the rank itself
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"expected float tensors in {where}, came {tensor.dtype} at {key!r}; "
            "save the LoRA in float32, float16 or bfloat16"
        )
    if not bool(tensor.isfinite().all()):
        raise ValueError(
            f"expected finite numbers in {where}, came NaN or infinity at {key!r}; "
            "this LoRA is broken, train or fetch it again"
        )
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _placed(path: str) -> tuple[str, str, bool, bool]:
    """(path, component, flat, peft) from what a key says before its role."""
    if path.startswith(PEFT):
        return _without(path[len(PEFT) :], "base_layer"), "", False, True
    kohya = _KOHYA.match(path)
    if kohya and "." not in path:
        return kohya[2], kohya[1], True, False
    # diffusers wrote peft's prefix behind its own for some time.
    return _without(path, "processor").replace(f".{PEFT}", "."), "", False, False


def _without(path: str, level: str) -> str:
    return ".".join(name for name in path.split(".") if name != level)


def _old_name(path: str) -> str:
    """The first layout of diffusers named the processor's matrix, not the projection."""
    stem, _, last = path.rpartition(".")
    if "self_attn" in stem:
        return f"{stem}.{last.removeprefix('to_')}_proj"
    return f"{path}.0" if last == "to_out" else path


def _refuse(key: str, where: str) -> ValueError:
    for signs, what in _OTHER:
        if any(sign in key for sign in signs):
            return ValueError(
                f"expected plain LoRA matrices in {where}, came {what} at {key!r}; "
                "merge it with the tool that made it and manage the merged model"
            )
    return ValueError(
        f"expected LoRA keys of peft, diffusers or kohya in {where}, came {key!r}; "
        "leave it out of the file, or list its module in config['modules_to_save']"
    )


def _replaced(key: str, saved: Sequence[str], tied: bool) -> tuple[str, str] | None:
    """(path, parameter) where a key brings a whole parameter and the file says that it does.

    Args:
        saved: endings of modules' paths, as peft matches them.
        tied: peft saves what is tied to one of them too, and its config does not name that.
    """
    if not key.startswith(PEFT):
        return None
    whole = _WHOLE.match(key)
    if whole:
        return whole[1].removeprefix(PEFT), whole[2]
    path, _, name = key.removeprefix(PEFT).rpartition(".")
    named = any(re.search(rf"{re.escape(module)}(\.|$)", path) for module in saved)
    return (path, name) if named or (saved and tied) else None


def _saved(settings: Mapping[str, Any], where: str) -> Sequence[str]:
    """modules_to_save of a configuration."""
    saved = settings.get("modules_to_save") or ()
    listed = isinstance(saved, list | tuple | set | frozenset)
    if not listed or not all(isinstance(module, str) for module in saved):
        raise TypeError(
            f"expected modules_to_save in the config of {where} as a list of names, came "
            f"{saved!r}; correct the config"
        )
    return tuple(saved)


def _entries(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], where: str
) -> tuple[dict[tuple[str, str], _Entry], list[Replacement]]:
    """Each key of the file at its place, or an exception that names it."""
    entries: dict[tuple[str, str], _Entry] = {}
    replacements = []
    saved, tied = _saved(settings, where), bool(settings.get("ensure_weight_tying"))
    for key in sorted(tensors):
        tensor = _checked(key, tensors[key], where)
        for pattern, names, kind in _ROLES:
            found = pattern.match(key)
            if not found:
                continue
            role = str(names.get(found[2], found[2]))
            path, component, flat, peft = _placed(found[1])
            path = _old_name(path) if kind == "old" else path
            entry = entries.setdefault((component, path), _Entry(path, component, flat, peft))
            if role in entry.tensors:
                raise ValueError(
                    f"expected one adapter in {where}, came {entry.keys[role]!r} and {key!r} for "
                    "one place; save each adapter to a file of its own"
                )
            entry.tensors[role], entry.keys[role] = tensor, key
            entry.embedding |= kind == "embedding"
            break
        else:
            whole = _replaced(key, saved, tied)
            if whole is None:
                raise _refuse(key, where)
            replacements.append(Replacement(*whole, tensor, key))
    if saved and not replacements:
        raise ValueError(
            f"expected the weights of {', '.join(saved)} in {where} by modules_to_save of its "
            "config, came none; the file is incomplete, fetch or save it again"
        )
    return entries, replacements


def _matrices(entry: _Entry, where: str) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """(up [rows, r], down [r, columns], kernel) of one module, a middle kernel folded in."""
    missing = [role for role in ("down", "up") if role not in entry.tensors]
    if missing:
        here = next(iter(entry.keys.values()))
        raise ValueError(
            f"expected both matrices of {entry.path} in {where}, came {here!r} without the "
            f"{missing[0]} one; the file is incomplete, fetch or save it again"
        )
    up, down, mid = entry.tensors["up"], entry.tensors["down"], entry.tensors.get("mid")
    fits = (
        up.dim() >= 2
        and down.dim() >= 2
        and up.shape[1] == down.shape[0] > 0
        and up.numel() == up.shape[0] * up.shape[1]
    )
    if fits and mid is not None:
        rank = down.shape[0]
        fits = mid.dim() > 2 and mid.shape[:2] == (rank, rank) and down[0].numel() == down.shape[1]
        if fits:
            down = torch.einsum("ij...,jc->ic...", mid, down.flatten(1))
    if not fits:
        shapes = {entry.keys[r]: list(t.shape) for r, t in entry.tensors.items() if r != "alpha"}
        raise ValueError(
            f"expected matrices of one rank for {entry.path} in {where}, came {shapes}; "
            "the file is damaged or of another kind, fetch or save it again"
        )
    return up.flatten(1), down.flatten(1), tuple(down.shape[2:])


def _scale(entry: _Entry, rank: int, config: dict[str, Any] | None, where: str) -> float | None:
    """alpha / r from the file's own tensor or the configuration, which must not disagree."""
    said = scaling(config, entry.path, rank, where)
    alpha = entry.tensors.get("alpha")
    if alpha is None:
        return said
    if alpha.numel() != 1:
        raise ValueError(
            f"expected one number at {entry.keys['alpha']!r} of {where}, came shape "
            f"{list(alpha.shape)}; the file is damaged, fetch or save it again"
        )
    if float(alpha) == 0:
        raise ValueError(
            f"expected an alpha other than 0 at {entry.keys['alpha']!r} of {where}, which some "
            "tools take for the rank and others for no change; leave it out, or write the rank"
        )
    own = float(alpha) / rank
    if said is not None and abs(said - own) > 1e-6 * max(abs(said), abs(own)):
        raise ValueError(
            f"expected one scaling of {entry.path} in {where}, came {own:g} by "
            f"{entry.keys['alpha']!r} and {said:g} by the config; leave one of them out"
        )
    return own


def _by_component(config: dict[str, Any] | None, path: str) -> tuple[dict[str, Any] | None, str]:
    """The part of a configuration for a path, and the path within that part."""
    if config is None:
        return None, path
    head, _, rest = path.partition(".")
    own = {
        key[len(head) + 1 :]: value for key, value in config.items() if key.startswith(f"{head}.")
    }
    if own:
        return own, rest
    return {key: value for key, value in config.items() if "." not in key}, path


def _digest(tensors: Mapping[str, Tensor], pairs: list[Pair], scales: list[float]) -> str:
    """Of what the file does: two configurations that lead to one scaling are the same."""
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    for pair, scale in zip(pairs, scales, strict=True):
        digest.update(f"{pair.component}\0{pair.path}\0{scale!r}\0".encode())
    return digest.hexdigest()


def _pairs(
    entries: Mapping[tuple[str, str], _Entry],
    config: dict[str, Any] | None,
    extra: float,
    where: str,
) -> Iterator[tuple[Pair, float | None]]:
    for entry in entries.values():
        up, down, kernel = _matrices(entry, where)
        rank = up.shape[1]
        own, entry_path = _by_component(config, entry.path)
        if own is not None:
            bias = "bias" in entry.tensors
            check_pair(own, entry_path, rank, bias=bias, key=entry.keys["down"], where=where)
        scale = _scale(entry, rank, own, where)
        wide = torch.promote_types(up.dtype, down.dtype)
        factor = extra * (1.0 if scale is None else scale)
        up, down, added = up.to(wide), down.to(wide), entry.tensors.get("bias")
        if not all(bool((t * factor).isfinite().all()) for t in (up, down)):
            raise ValueError(
                f"expected a scaling of {entry.path} in {where} that leaves its matrices finite, "
                f"came {factor:g}; give a smaller scale"
            )
        pair = Pair(
            path=entry.path, component=entry.component, flat=entry.flat, peft=entry.peft,
            embedding=entry.embedding, up=up, down=down, scale=factor, kernel=kernel,
            bias=None if added is None else added.to(wide), key=entry.keys["down"],
        )  # fmt: skip
        yield pair, scale


def _check_settings(config: Mapping[str, Any], where: str) -> None:
    """Each component's settings for themselves, and those of the file."""
    check_config({key: value for key, value in config.items() if "." not in key}, where)
    for part in sorted({key.partition(".")[0] for key in config if "." in key}):
        start = len(part) + 1
        own = {key[start:]: value for key, value in config.items() if key.startswith(f"{part}.")}
        check_config(own, f"{where} ({part})")


def read(source: object, config: object = None, scale: float = 1.0) -> Adapter:
    """A LoRA from a file, an adapter folder or a state dict, multiplied by ``scale``.

    Raises:
        ValueError, TypeError: what is in it is not a plain LoRA, is damaged or contradicts itself;
            the message names the key.
        FileNotFoundError: there is no such file.
    """
    tensors, settings, where = _open(source, config)
    if not tensors:
        raise ValueError(f"expected LoRA matrices in {where}, came no tensor; give another file")
    _check_settings(settings or {}, where)
    entries, replacements = _entries(tensors, settings or {}, where)
    made = list(_pairs(entries, settings, scale, where))
    pairs = [pair for pair, _ in made]
    scales = [1.0 if alpha is None else alpha for _, alpha in made]
    return Adapter(
        where=where,
        pairs=pairs,
        replacements=replacements,
        digest=_digest(tensors, pairs, scales),
        assumed=sum(alpha is None for _, alpha in made),
    )
