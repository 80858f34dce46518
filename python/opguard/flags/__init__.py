"""Per-sample error flags: every NaN, Inf, bad index or fallback of a batch, recorded in a tensor.

Flags are a tensor ``(samples, words)`` that travels with the data, in eager and in compiled code,
without a device sync: each word holds two or four 16-bit errors of code, severity and location.
"""

from __future__ import annotations

from opguard import __version__
from opguard.flags import experimental, typing
from opguard.flags._err import err
from opguard.flags.checking import FlagEvent, ModelCheck, check_model
from opguard.flags.codes import ErrorCode, ErrorDomain, Severity
from opguard.flags.config import (
    CONFIG,
    AccumulationConfig,
    AccumulationPolicy,
    Dedupe,
    ErrorConfig,
    Order,
    Priority,
    get_config,
    set_config,
)
from opguard.flags.constants import (
    CODE_BITS,
    CODE_MASK,
    CODE_SHIFT,
    LOCATION_BITS,
    LOCATION_MASK,
    LOCATION_SHIFT,
    SEVERITY_BITS,
    SEVERITY_MASK,
    SEVERITY_SHIFT,
    SLOT_BITS,
    SLOT_MASK,
    SLOTS_PER_WORD,
)
from opguard.flags.control import AND, HAS, IF, IS, NOT, OR
from opguard.flags.distributed import dist_merge
from opguard.flags.errors import (
    BatchMismatchError,
    CodeError,
    FlagsError,
    FlagsLayoutError,
    LocationError,
    RowsLost,
    SeverityError,
)
from opguard.flags.extraction import (
    LocationExtractor,
    extract_locations,
    location_from_stack,
)
from opguard.flags.failures import Failure, first_failure
from opguard.flags.guarded import GuardedTensor, guard
from opguard.flags.helpers import (
    find,
    fix,
    flag_inf,
    flag_inf_,
    flag_nan,
    flag_nan_,
    flag_nan_and_inf,
    flag_nan_and_inf_,
    flag_nan_inf,
    flag_oob_indices,
    has_err,
    push,
    push_,
)
from opguard.flags.indexing import guarded_embedding, guarded_gather, guarded_index_select
from opguard.flags.inspection import ErrorFlags, UnpackedError, flags, inspect
from opguard.flags.locations import ErrorLocation, resolve_location
from opguard.flags.opchecks import check, check_ops
from opguard.flags.reporting import FlagCounters, Report, plot, prometheus, report, to_dataframe
from opguard.flags.results import Err, Ok, Result, as_exception, as_result, unwrap
from opguard.flags.tensorcheck import tensorcheck
from opguard.flags.tracked import assign_locations, track, tracked
from opguard.flags.tree import LocationTree, WeightedLocationTree
from opguard.flags.typing import (
    Broadcast,
    DeviceMismatchError,
    Dim,
    DimensionMismatchError,
    DTypeMismatchError,
    InvalidParameterError,
    InvalidReturnTypeError,
    TypeMismatchError,
    ValidationError,
    error_t,
)
from opguard.flags.typing import (
    Tensor as Tensor,  # not among the names below: torch has one as well
)

__all__ = [
    "AND",
    "CODE_BITS",
    "CODE_MASK",
    "CODE_SHIFT",
    "CONFIG",
    "HAS",
    "IF",
    "IS",
    "LOCATION_BITS",
    "LOCATION_MASK",
    "LOCATION_SHIFT",
    "NOT",
    "OR",
    "SEVERITY_BITS",
    "SEVERITY_MASK",
    "SEVERITY_SHIFT",
    "SLOTS_PER_WORD",
    "SLOT_BITS",
    "SLOT_MASK",
    "AccumulationConfig",
    "AccumulationPolicy",
    "BatchMismatchError",
    "Broadcast",
    "CodeError",
    "DTypeMismatchError",
    "Dedupe",
    "DeviceMismatchError",
    "Dim",
    "DimensionMismatchError",
    "Err",
    "ErrorCode",
    "ErrorConfig",
    "ErrorDomain",
    "ErrorFlags",
    "ErrorLocation",
    "Failure",
    "FlagCounters",
    "FlagEvent",
    "FlagsError",
    "FlagsLayoutError",
    "GuardedTensor",
    "InvalidParameterError",
    "InvalidReturnTypeError",
    "LocationError",
    "LocationExtractor",
    "LocationTree",
    "ModelCheck",
    "Ok",
    "Order",
    "Priority",
    "Report",
    "Result",
    "RowsLost",
    "Severity",
    "SeverityError",
    "TypeMismatchError",
    "UnpackedError",
    "ValidationError",
    "WeightedLocationTree",
    "__version__",
    "as_exception",
    "as_result",
    "assign_locations",
    "check",
    "check_model",
    "check_ops",
    "dist_merge",
    "err",
    "error_t",
    "experimental",
    "extract_locations",
    "find",
    "first_failure",
    "fix",
    "flag_inf",
    "flag_inf_",
    "flag_nan",
    "flag_nan_",
    "flag_nan_and_inf",
    "flag_nan_and_inf_",
    "flag_nan_inf",
    "flag_oob_indices",
    "flags",
    "get_config",
    "guard",
    "guarded_embedding",
    "guarded_gather",
    "guarded_index_select",
    "has_err",
    "inspect",
    "location_from_stack",
    "plot",
    "prometheus",
    "push",
    "push_",
    "report",
    "resolve_location",
    "set_config",
    "tensorcheck",
    "to_dataframe",
    "track",
    "tracked",
    "typing",
    "unwrap",
]
