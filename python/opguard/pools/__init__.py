"""Many models, little memory: which model is on which device now, and what is patched into it."""

from opguard.pools._patched import DeltaCommit, PatchedWeightsChanged
from opguard.pools.commits import (
    AttributeCommit,
    CallableCommit,
    CommitABC,
    CommitWithAutoManage,
    ForwardHookCommit,
)
from opguard.pools.errors import (
    Deadlock,
    LeaseTimeout,
    PatchFailed,
    PoolError,
    PoolFileChanged,
    PoolRefused,
    Unmanageable,
)
from opguard.pools.lora import LoraCommit
from opguard.pools.management import (
    Management,
    get_management,
    initialize,
    setup_default_pools,
)
from opguard.pools.modules import TorchModuleWrapper
from opguard.pools.pipelines import DiffusersPipelineWrapper
from opguard.pools.policies import Candidate
from opguard.pools.proxies import AutoManageCommitObjectProxy, CommitObjectProxy
from opguard.pools.resource_pools import ResourcePool
from opguard.pools.users import ResourcePoolUser, register_user
from opguard.pools.wrappers import AutoManageWrapper, auto_manage, free, manage, unmanage

get_resource_management = get_management

__all__ = [
    "AttributeCommit",
    "AutoManageCommitObjectProxy",
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
    "ResourcePool",
    "ResourcePoolUser",
    "TorchModuleWrapper",
    "Unmanageable",
    "auto_manage",
    "free",
    "get_management",
    "get_resource_management",
    "initialize",
    "manage",
    "register_user",
    "setup_default_pools",
    "unmanage",
]
