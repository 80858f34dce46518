"""What an adapter's configuration says about its scaling, and what in it cannot be honoured."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["check_config", "check_pair", "config_of", "scaling"]

# Read here.
USED = {"r", "lora_alpha", "lora_bias", "use_rslora", "rank_pattern", "alpha_pattern",
        "modules_to_save", "ensure_weight_tying"}  # fmt: skip
# Of training, of choosing modules (the file's keys have chosen) or of how peft runs the adapter:
# the product of the two matrices is the same whatever they say. fan_in_fan_out follows from the
# module's type, as in peft, which corrects a wrong value.
NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "corda_config",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type",
}  # fmt: skip
# Beginnings that leave the base weights alone. The file of one that moved them fits those alone.
KEPT_BASE = ("gaussian", "eva", "orthogonal", "mica")
WHY_NOT = {
    "bias": "biases that were trained beside it replace the model's own",
    "use_dora": "DoRA scales whole rows by a norm of the sum, which is no product of two matrices",
    "target_parameters": "it patches parameters that are no module's weight",
    "layer_replication": "it adds layers to the model",
    "alora_invocation_tokens": "it is active for some tokens only",
    "trainable_token_indices": "it replaces single rows of an embedding",
    "arrow_config": "it chooses between adapters by the input",
}


def config_of(config: object, where: str) -> dict[str, Any] | None:
    """A configuration given as a mapping, a path or peft's own object, as a plain dict."""
    if config is None:
        return None
    if isinstance(config, Mapping):
        return {str(key): value for key, value in config.items()}
    if isinstance(config, str | Path):
        try:
            loaded = json.loads(Path(config).read_bytes())
        except FileNotFoundError:
            raise FileNotFoundError(
                f"expected the config of {where} at {config}, came nothing; correct the path, or "
                "give config= as a dict"
            ) from None
        except ValueError as error:
            raise ValueError(
                f"expected JSON in {config}, came text that does not parse ({error}); "
                "write it again, or give config= as a dict"
            ) from None
        if not isinstance(loaded, dict):
            raise TypeError(
                f"expected an object of settings in {config}, came {type(loaded).__name__}; "
                "write it again, or give config= as a dict"
            )
        return loaded
    to_dict = getattr(config, "to_dict", None)
    if callable(to_dict):
        return dict(to_dict())
    raise TypeError(
        f"expected config of {where} as a dict, a path or a peft config, "
        f"came {type(config).__name__}; give {{'r': ..., 'lora_alpha': ...}}"
    )


def _idle(value: object) -> bool:
    return value is None or value is False or value in ("", "none") or value in ([], {}, ())


def _value(value: object) -> object:
    """Enum members, as peft's own object has them, by what they are written as."""
    return getattr(value, "value", value)


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raise for a setting that changes the result in a way that is not computed here."""
    kind = str(_value(config.get("peft_type", "LORA"))).upper()
    if kind != "LORA":
        raise ValueError(
            f"expected peft_type LORA in the config of {where}, came {kind}; "
            "apply it with peft itself and manage the merged model"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in KEPT_BASE:
        raise ValueError(
            f"expected an adapter for the base weights as published in {where}, came "
            f"init_lora_weights={start!r}, which moved them or is not known here; save it by "
            "peft's path_initial_model_for_weight_conversion"
        )
    known = USED | NEUTRAL | {"peft_type", "init_lora_weights"}
    for key, value in config.items():
        if key in known or _idle(value):
            continue
        why = WHY_NOT.get(key, "its effect on the weights is not known here")
        raise ValueError(
            f"expected settings of a plain LoRA in the config of {where}, came {key}={value!r}: "
            f"{why}; merge it with peft and manage the merged model"
        )


def _pattern(patterns: object, path: str, where: str) -> float | None:
    """The value of the first pattern that matches the end of a module's path, as peft matches."""
    if not patterns:
        return None
    if not isinstance(patterns, Mapping):
        raise TypeError(
            f"expected rank_pattern and alpha_pattern of {where} as a mapping from patterns to "
            f"numbers, came {type(patterns).__name__}; write them again"
        )
    for pattern, value in patterns.items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", path)
        except re.error as error:
            raise ValueError(
                f"expected regular expressions in the patterns of {where}, came {pattern!r} "
                f"({error}); correct the config"
            ) from None
        if found:
            return _number(value, f"the pattern {pattern!r}", where)
    return None


def _number(value: object, what: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(
            f"expected a finite number for {what} in the config of {where}, came {value!r}; "
            "correct the config"
        )
    return float(value)


def check_pair(
    config: Mapping[str, Any], path: str, rank: int, *, bias: bool, key: str, where: str
) -> None:
    """Raise where the config and the tensors differ about the rank or the bias of one module."""
    said = _pattern(config.get("rank_pattern"), path, where)
    if said is None and config.get("r") is not None:
        said = _number(config["r"], "r", where)
    if said is not None and said != rank:
        raise ValueError(
            f"expected rank {said:g} of {path} by the config of {where}, came {rank} in {key!r}; "
            "give the config that was saved with this file"
        )
    if "lora_bias" in config and bool(config["lora_bias"]) != bias:
        raise ValueError(
            f"expected lora_bias={config['lora_bias']!r} of {path} by the config of {where}, came "
            f"{key!r} with{'' if bias else 'out'} a bias beside it; give the config and the file "
            "that were saved together"
        )


def scaling(config: Mapping[str, Any] | None, path: str, rank: int, where: str) -> float | None:
    """What the product at ``path`` is multiplied by; None where the config does not say."""
    if config is None:
        return None
    alpha = _pattern(config.get("alpha_pattern"), path, where)
    if alpha is None:
        if config.get("lora_alpha") is None:
            return None
        alpha = _number(config["lora_alpha"], "lora_alpha", where)
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
