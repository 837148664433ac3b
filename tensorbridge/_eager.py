"""Inside ``torch.compile``, conversions run eagerly: a graph break, the same values, no warning, and no shared memory.

Around a graph break Dynamo takes an array for a tensor of its own: it drops the read-only flag (of the caller's own
array too), and code compiled behind the break may write to the array before or after it reads the tensor that stands on
the same memory. So a conversion that compiled code has called is decided as such: `is_inside`.

Dynamo is told so about our own functions only: an attribute keeps it from tracing a call, and a mark on the code, made
as soon as torch is there, from compiling the frame. ``torch.compiler.disable`` does the same, but would import Dynamo
for it, and cost every call a wrapper. (If the first use ever is in compiled code, and torch came after this package,
Dynamo compiles one frame of ours and may warn; the result is the same.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import wraps
from inspect import unwrap
from types import CodeType
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])
unhidden: list[tuple[CodeType, bool]] = []  # code, and whether all that it calls is meant too
compiling: Callable[[], Any] = lambda: None  # Dynamo's callback while compiled code runs, else None


def eager(function: _F) -> _F:
    """Hide a function, and all that it calls, from Dynamo."""
    return _hidden(function, below=True)


def outermost(function: _F) -> _F:
    """Hide a function from Dynamo, but let it see whether compiled code has called it."""
    return _hidden(function, below=False)


# What torch gives as the reason where a graph may not break. Its hint to remove a call is for whoever wrote that.
REASON = (
    "tensorbridge runs between compiled graphs, never in one, so fullgraph=True and strict export are impossible "
    "around it: convert before or after the compiled function, or leave fullgraph=True out; there is no call to remove"
)


def _hidden(function: _F, *, below: bool) -> _F:
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = REASON  # type: ignore[attr-defined]
    unhidden.append((function.__code__, below))
    hide_all()  # torch may be there already
    return function


def hide_all() -> None:
    """Make the marks, once torch is there. A torch without them only compiles, and warns, more than it has to."""
    global compiling
    frames: Any = getattr(getattr(getattr(sys.modules.get("torch"), "_C", None), "_dynamo", None), "eval_frame", None)
    if frames is None:
        return
    try:
        mark, strategy, asked = frames.set_code_exec_strategy, frames._FrameExecStrategy, frames.get_eval_frame_callback
        skip, default = frames._FrameAction.SKIP, frames._FrameAction.DEFAULT
    except AttributeError:
        unhidden.clear()
        return
    compiling = asked  # first: to other threads, that none is left to be marked says that this is known
    with suppress(IndexError):  # none is left: another thread may take the last one
        while True:
            code, below = unhidden.pop()
            mark(code, strategy(skip, skip if below else default))


eager(hide_all)

_inside: ContextVar[bool] = ContextVar("tensorbridge_compiled", default=False)
is_inside = _inside.get  # whether compiled code has called the conversion that is being decided


@eager
def inside(function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
    """Call, by the road that decides, a function that compiled code has called."""
    before = _inside.set(True)
    try:
        return unwrap(function)(*args, **options)
    finally:
        _inside.reset(before)


def noticing(function: _F) -> _F:
    """Hide a function, and decide in it as for compiled code where compiled code has called it."""
    hidden = eager(function)

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if unhidden:
            hide_all()
        return hidden(*args, **options) if compiling() is None else inside(hidden, *args, **options)

    return outermost(call)  # type: ignore[return-value]
