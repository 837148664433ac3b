"""tensorbridge: NumPy, PyTorch and CuPy arrays into one another; every conversion is decided before it is done."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tensorbridge import _lanes
from tensorbridge._api import describe, plan, shares_memory, to_cupy, to_numpy, to_torch
from tensorbridge._array import ArrayInfo, Device, Traits
from tensorbridge._cuda._streams import use_stream
from tensorbridge._errors import (
    BridgeError,
    CopyRequiredError,
    CopyWarning,
    DeviceError,
    GraphError,
    MissingFrameworkError,
    ProducerError,
    UnsupportedArrayError,
)
from tensorbridge._events import Event, Trace
from tensorbridge._step import Plan, Step
from tensorbridge._watch import copy_guard, trace

if TYPE_CHECKING:
    from tensorbridge import tree
    from tensorbridge._autograd._editing import editing
    from tensorbridge._autograd._graph import Graph, autograd_graph
    from tensorbridge._background._async import Transfer, to_numpy_async
    from tensorbridge._background._prefetch import Prefetch, prefetch
    from tensorbridge._commands._info import Info, info
    from tensorbridge._cuda._lease import used_on
    from tensorbridge._cuda._pool import share_memory_pool
    from tensorbridge._trees._collate import collate

__version__ = "0.1.0"

__all__ = [
    "ArrayInfo",
    "BridgeError",
    "CopyRequiredError",
    "CopyWarning",
    "Device",
    "DeviceError",
    "Event",
    "Graph",
    "GraphError",
    "Info",
    "MissingFrameworkError",
    "Plan",
    "Prefetch",
    "ProducerError",
    "Step",
    "Trace",
    "Traits",
    "Transfer",
    "UnsupportedArrayError",
    "autograd_graph",
    "collate",
    "copy_guard",
    "describe",
    "editing",
    "info",
    "plan",
    "prefetch",
    "share_memory_pool",
    "shares_memory",
    "to_cupy",
    "to_numpy",
    "to_numpy_async",
    "to_torch",
    "trace",
    "tree",
    "use_stream",
    "used_on",
]

# Loaded when first asked for: the import costs what a conversion needs.
_LATER = {
    "Graph": "_autograd._graph",
    "Info": "_commands._info",
    "Prefetch": "_background._prefetch",
    "Transfer": "_background._async",
    "autograd_graph": "_autograd._graph",
    "collate": "_trees._collate",
    "editing": "_autograd._editing",
    "info": "_commands._info",
    "prefetch": "_background._prefetch",
    "share_memory_pool": "_cuda._pool",
    "to_numpy_async": "_background._async",
    "tree": "",
    "used_on": "_cuda._lease",
}


def _load(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'tensorbridge' has no attribute {name!r}")
    found = import_module("tensorbridge." + (_LATER[name] or name))
    value = globals()[name] = getattr(found, name) if _LATER[name] else found
    return value


def _load_all() -> None:
    """CPython does not cache the names of a module that has a ``__getattr__``: 40 ns for every ``tb.to_numpy(x)``. So
    it goes with the first conversion that sees torch, whose own import took a hundred times as long.
    """
    for name in _LATER:
        if name not in globals():
            _load(name)
    globals().pop("__getattr__", None)


if not TYPE_CHECKING:  # a type checker would take any name for one of ours
    __getattr__ = _load
_lanes.opened = _load_all


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("_")), *__all__})
