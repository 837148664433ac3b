"""The fast lanes on a device: plain arrays of torch and CuPy, on one stream, cross with no decision to look up.

As in `_lanes`: a lane takes only what it can tell for sure in a few checks. It does what the full road does with such
an array: an alias and `record_stream`, or a lease.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from tensorbridge import _eager, _watch
from tensorbridge._adapters import Adapter

_F = TypeVar("_F", bound=Callable[..., Any])

# Set by `open` when both libraries have shown up. Until then no object is of these types.
_Tensor: Any = None
_Array: Any = None
_forward_ad: Any  # torch's module: inside a dual level a plain-looking tensor may carry a tangent
# A mode may answer for torch: the alias that is to keep the memory would be a fake, which keeps nothing.
_intercepted: Callable[[], bool] = lambda: False
_from_torch: Callable[[Any], Any]
_from_cupy: Callable[[Any], Any]


def open(torch: Adapter, cupy: Adapter) -> None:
    global _Tensor, _Array, _forward_ad, _intercepted, _from_torch, _from_cupy
    of_torch: Any = torch
    of_cupy: Any = cupy
    of_cupy.open_lane(of_torch.DTYPES)
    _intercepted = of_torch.is_intercepted
    _forward_ad, _from_torch, _from_cupy = of_torch.forward_ad, of_cupy.plain_from_torch, of_torch.plain_from_cupy
    _Tensor, _Array = of_torch.Tensor, of_cupy.Array


def plain_tensor_to_cupy(full: _F) -> _F:
    """A lane in front of `to_cupy`."""

    @wraps(full)
    def to_cupy(x: Any, **options: Any) -> Any:
        if type(x) is _Tensor and not options and not _watch.watching and x.is_cuda:
            if _forward_ad._current_level < 0 and not _intercepted() and (made := _from_torch(x)) is not None:
                return made
        if _eager.unhidden:
            _eager.hide_all()
        return full(x, **options)

    return _eager.outermost(to_cupy)  # type: ignore[return-value]


def plain_cupy_to_torch(full: _F) -> _F:
    """A lane in front of `to_torch`."""

    @wraps(full)
    def to_torch(x: Any, **options: Any) -> Any:
        if type(x) is _Array and not options and not _watch.watching and (made := _from_cupy(x)) is not None:
            return made
        return full(x, **options)

    return _eager.outermost(to_torch)  # type: ignore[return-value]
