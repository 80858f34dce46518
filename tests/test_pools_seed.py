"""The quick start the pools were asked for, as it was written, with this package's name."""

from __future__ import annotations

import gc

import torch

from pools_kit import fresh_pools

QUICK_START = """
import torch
from opguard import pools

# 1. Initialize the resource pools
pools.setup_default_pools()

# 2. Create your PyTorch model
class MyModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(10, 1)

    def forward(self, x):
        print(f"Executing forward on device: {x.device}")
        return self.linear(x)

model = MyModel()
print(f"Model initial device: {next(model.parameters()).device}")

# 3. Wrap the model to make it managed
managed_model = pools.manage(model)

# 4. Use the auto_manage context manager for inference
print("Entering auto_manage context...")
with pools.auto_manage(managed_model) as am_wrapper:
    # Inside this block, the model is on the execution device
    execution_device = am_wrapper.get_execution_device()
    print(f"Model is now on device: {next(model.parameters()).device}")
    assert next(model.parameters()).device == execution_device

    # Input tensor must be on the same device
    dummy_input = torch.randn(1, 10).to(execution_device)

    # Run inference
    output = model(dummy_input)

print("Exited auto_manage context.")
print(f"Model is now back on device: {next(model.parameters()).device}")
"""


def test_the_quick_start_runs_as_written(tmp_path, capsys):
    with fresh_pools(tmp_path):
        names: dict[str, object] = {}
        exec(compile(QUICK_START, "quick_start.py", "exec"), names)
        wrapper, model = names["am_wrapper"], names["model"]
        assert wrapper.obj is model
        assert names["output"].shape == (1, 1)
        assert torch.equal(names["output"], model(names["dummy_input"]))
        del names, wrapper, model
        gc.collect()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Model initial device: cpu"
    assert said[3].startswith("Executing forward on device: ")
    assert said[-2].startswith("Model is now back on device: ")


def test_names_of_the_original_are_there():
    from opguard import pools

    for name in ("setup_default_pools", "initialize", "manage", "auto_manage", "AutoManageWrapper",
                 "TorchModuleWrapper", "AutoManageHook", "CommitABC", "CallableCommit",
                 "CommitObjectProxy", "ResourcePool", "ResourcePoolUser", "get_management",
                 "get_resource_management"):  # fmt: skip
        assert name in pools.__all__
        assert hasattr(pools, name)
