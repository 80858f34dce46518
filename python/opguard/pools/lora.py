"""LoRA files as commits: applied by pointing parameters at patched tensors, reverted bit-exactly."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opguard.pools._lora_files import KOHYA, Adapter, Pair, read
from opguard.pools._lora_math import Added, LowRank, Whole
from opguard.pools._lora_places import Place, places
from opguard.pools._patched import Delta, DeltaCommit

__all__ = ["LoraCommit"]
