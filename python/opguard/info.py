"""What ``opguard info`` says: versions, devices, instruction set, floors, what was only audited."""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from typing import Any

from opguard._sizes import readable

__all__ = ["as_json", "as_text", "collect"]

PYTHON_FLOOR = "3.11"
COMPANIONS = (
    "transformers",
    "diffusers",
    "huggingface_hub",
    "accelerate",
    "bitsandbytes",
    "torchao",
    "safetensors",
    "numpy",
    "rich",
    "pytest",
)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    """Every device torch sees; the memory is in bytes, None where torch does not say."""
    import torch

    devices: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": platform.processor() or platform.machine(),
            "memory": None,
            "threads": torch.get_num_threads(),
        }
    ]
    if not torch.accelerator.is_available():
        return devices
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    module = torch.get_device_module(kind)
    for index in range(torch.accelerator.device_count()):
        row: dict[str, Any] = {"device": f"{kind.type}:{index}", "name": kind.type, "memory": None}
        if hasattr(module, "get_device_properties"):
            properties = module.get_device_properties(index)
            row["name"] = properties.name
            row["memory"] = getattr(properties, "total_memory", None)
        devices.append(row)
    return devices


def collect() -> dict[str, Any]:
    """Everything ``opguard info`` prints, as plain values; imports torch, nothing heavier."""
    import torch

    import opguard
    from opguard import _C, _runtime

    ops = _C.ops_info()
    here = f"{platform.python_implementation()} {platform.python_version()}"
    torch_floor = ".".join(map(str, _runtime.TORCH_FLOOR))
    return {
        "opguard": opguard.__version__,
        "python": here,
        "executable": sys.executable,
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "companions": {name: _version(name) for name in COMPANIONS},
        "devices": _devices(),
        "isa": ops["isa"],
        "cuda_kernels": "ready" if not ops["cuda"] else f"not in use: {ops['cuda']}",
        "floors": {"python": PYTHON_FLOOR, "torch": torch_floor},
        "runs_here": f"{here} with torch {torch.__version__}",
        "audited_not_run": (
            f"other CPython >= {PYTHON_FLOOR} with the GIL (abi3audit), "
            f"other torch >= {torch_floor} (torch-abi-audit)"
        ),
    }


def as_json() -> str:
    """The result of ``collect`` as indented JSON."""
    return json.dumps(collect(), indent=2)


def _size(memory: int | None) -> str:
    return "" if memory is None else f", {readable(memory)}"


def as_text() -> str:
    """The result of ``collect`` as aligned lines for a terminal."""
    facts = collect()
    companions = ", ".join(
        f"{name} {version}" for name, version in facts["companions"].items() if version
    )
    rows = [
        ("opguard", facts["opguard"]),
        ("python", f"{facts['python']} ({facts['executable']})"),
        ("platform", facts["platform"]),
        ("torch", f"{facts['torch']}, built for CUDA {facts['torch_cuda'] or '- (none)'}"),
        ("beside it", companions or "-"),
    ]
    rows += [
        ("device", f"{row['device']}: {row['name']}{_size(row['memory'])}")
        for row in facts["devices"]
    ]
    rows += [
        ("instruction set", facts["isa"]),
        ("CUDA kernels", facts["cuda_kernels"]),
        ("floors", f"Python {facts['floors']['python']}, torch {facts['floors']['torch']}"),
        ("running", facts["runs_here"]),
        ("audited, not run", facts["audited_not_run"]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
