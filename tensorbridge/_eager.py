"""Inside ``torch.compile``, conversions run eagerly: a graph break, the same result, no warning.

Dynamo is told so about our own functions only: an attribute keeps it from tracing a call, and a mark on the code, made
as soon as torch is there, from compiling the frame. ``torch.compiler.disable`` does the same, but would import Dynamo
for it, and cost every call a wrapper. (If the first use ever is in compiled code, and torch came after this package,
Dynamo compiles one frame of ours and may warn; the result is the same.)
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar

import numpy as np

_F = TypeVar("_F", bound=Callable[..., Any])
unmarked: list[tuple[CodeType, bool]] = []  # code, and whether all that it calls is meant too
compiling: Callable[[], Any] = lambda: None  # Dynamo's callback while compiled code runs, else None


def eager(function: _F) -> _F:
    """Hide a function, and all that it calls, from Dynamo."""
    return _hidden(function, below=True)


def outermost(function: _F) -> _F:
    """Hide a function from Dynamo, but let it see whether compiled code has called it."""
    return _hidden(function, below=False)


def _hidden(function: _F, *, below: bool) -> _F:
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    unmarked.append((function.__code__, below))
    return function


@eager
def mark() -> None:
    """Make the marks, once torch is there. A torch without them only compiles, and warns, more than it has to."""
    global compiling
    frames: Any = getattr(getattr(getattr(sys.modules.get("torch"), "_C", None), "_dynamo", None), "eval_frame", None)
    if frames is None:
        return
    if hasattr(frames, "set_code_exec_strategy"):
        skip, default = frames._FrameAction.SKIP, frames._FrameAction.DEFAULT
        for code, below in unmarked:
            frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip if below else default))
        compiling = frames.get_eval_frame_callback
    unmarked.clear()


@eager
def carried(result: Any) -> Any:
    """A result that Dynamo can carry over the graph break.

    It takes a read-only array only if it can make it writable for a moment (to clone it), and fails otherwise. NumPy
    allows that if a writable buffer stands behind the array, so one is put there.
    """
    if type(result) is not np.ndarray or result.flags.writeable or not result.size:
        return result
    low = sum((n - 1) * s for n, s in zip(result.shape, result.strides, strict=True) if s < 0)
    span = sum((n - 1) * abs(s) for n, s in zip(result.shape, result.strides, strict=True)) + result.itemsize
    buffer = (ctypes.c_char * span).from_address(result.__array_interface__["data"][0] + low)
    buffer.owner = result
    view: Any = np.ndarray(result.shape, result.dtype, buffer, -low, result.strides)
    view.setflags(write=False)
    return view
