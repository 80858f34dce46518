"""Many models, little memory: which model is on which device now, and what is patched into it."""

from typing import TYPE_CHECKING, Any

from opguard.pools.errors import (
    Deadlock,
    LeaseTimeout,
    PatchFailed,
    PoolError,
    PoolFileChanged,
    PoolRefused,
    Unmanageable,
    WeightsAstray,
)
from opguard.pools.hooks import AutoManageHook
from opguard.pools.management import (
    Management,
    get_management,
    initialize,
    setup_default_pools,
)
from opguard.pools.modules import TorchModuleWrapper
from opguard.pools.pipelines import DiffusersPipelineWrapper
from opguard.pools.policies import Candidate
from opguard.pools.resource_pools import ResourcePool
from opguard.pools.users import ResourcePoolUser, register_user
from opguard.pools.wrappers import AutoManageWrapper, auto_manage, free, manage, unmanage

if TYPE_CHECKING:
    from opguard.pools._patched import DeltaCommit, PatchedWeightsChanged
    from opguard.pools._snapshots import Snapshot
    from opguard.pools.commits import (
        AttributeCommit,
        CallableCommit,
        CommitABC,
        CommitWithAutoManage,
        ForwardHookCommit,
    )
    from opguard.pools.lora import LoraCommit
    from opguard.pools.proxies import AutoManageCommitObjectProxy, CommitObjectProxy
    from opguard.pools.reporting import Report, report

get_resource_management = get_management

# What most programs that manage models do not use is imported when it is asked for.
_LAZY = {
    "AttributeCommit": "commits",
    "AutoManageCommitObjectProxy": "proxies",
    "CallableCommit": "commits",
    "CommitABC": "commits",
    "CommitObjectProxy": "proxies",
    "CommitWithAutoManage": "commits",
    "DeltaCommit": "_patched",
    "ForwardHookCommit": "commits",
    "LoraCommit": "lora",
    "PatchedWeightsChanged": "_patched",
    "Report": "reporting",
    "Snapshot": "_snapshots",
    "report": "reporting",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))


__all__ = [
    "AttributeCommit",
    "AutoManageCommitObjectProxy",
    "AutoManageHook",
    "AutoManageWrapper",
    "CallableCommit",
    "Candidate",
    "CommitABC",
    "CommitObjectProxy",
    "CommitWithAutoManage",
    "Deadlock",
    "DeltaCommit",
    "DiffusersPipelineWrapper",
    "ForwardHookCommit",
    "LeaseTimeout",
    "LoraCommit",
    "Management",
    "PatchFailed",
    "PatchedWeightsChanged",
    "PoolError",
    "PoolFileChanged",
    "PoolRefused",
    "Report",
    "ResourcePool",
    "ResourcePoolUser",
    "Snapshot",
    "TorchModuleWrapper",
    "Unmanageable",
    "WeightsAstray",
    "auto_manage",
    "free",
    "get_management",
    "get_resource_management",
    "initialize",
    "manage",
    "register_user",
    "report",
    "setup_default_pools",
    "unmanage",
]
