"""tensorbridge: NumPy, PyTorch and CuPy arrays into one another; every conversion is decided before it is done."""

from tensorbridge._array import ArrayInfo, Device, Traits
from tensorbridge._convert import describe, plan, shares_memory, to_cupy, to_numpy, to_torch
from tensorbridge._errors import (
    BridgeError,
    CopyRequiredError,
    DeviceError,
    GraphError,
    MissingFrameworkError,
    ProducerError,
    UnsupportedArrayError,
)
from tensorbridge._plan import Plan, Step

__version__ = "0.1.0"

__all__ = [
    "ArrayInfo",
    "BridgeError",
    "CopyRequiredError",
    "Device",
    "DeviceError",
    "GraphError",
    "MissingFrameworkError",
    "Plan",
    "ProducerError",
    "Step",
    "Traits",
    "UnsupportedArrayError",
    "describe",
    "plan",
    "shares_memory",
    "to_cupy",
    "to_numpy",
    "to_torch",
]
