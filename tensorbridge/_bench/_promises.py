"""Where the time of a small call goes: what a fast lane asks before it shares or copies, each question timed alone.

The lines are the lanes' own, found again in their source: a lane that changes leaves its row without a measurement.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, NamedTuple

from tensorbridge._bench._calls import ARRAYS, TENSORS
from tensorbridge._bench._rows import NONE, REUSED, SHARED, WARM, Case, Question, Row, Scope, Way, expect, result_is


class Part(NamedTuple):
    """A line of a lane, and what it is there for."""

    why: str
    code: str


class Lane(NamedTuple):
    """A call, the functions it goes through, and what they ask."""

    call: str
    make: Callable[[Any], Any]  # of torch: the array that is converted, `x`
    functions: tuple[str, ...]
    parts: tuple[Part, ...]


_HELD = "t.storage_offset() * t.element_size() + t.nbytes > t.untyped_storage().nbytes()"
_OVER = "np.ndarray(t.shape, _torch_steps.IN_NUMPY[t.dtype], _numpy.bytes_at(t.data_ptr()))"
_CALL = Part("a Python function with options is called", "called(x)")
_ALWAYS = (
    Part("no copy guard or trace is open", "not _watch.watching"),
    Part("compiled code, which would drop the promises, is not calling", "_compiling() is None"),
)
_A_TENSOR = (
    _CALL,
    Part("it is exactly a tensor", "type(x) is _Tensor"),
    *_ALWAYS,
    Part("its memory did not come read-only", "not (_marked and _is_marked(x))"),
    Part("NumPy has its dtype", "x.dtype"),
)
_SHARED_TENSOR = (
    *_A_TENSOR,
    Part("it is on the host", "x.is_cpu"),
    Part("it carries no tangent of forward differentiation", "_forward_ad._current_level < 0"),
)
_DENSE_TENSOR = (
    *_A_TENSOR,
    Part("its values lie in memory on the host as they are: no lazy bit, no wrapper", "_raw(_keys(t)) & _ASKED"),
    Part("no mode answers for it", "not _modes()"),
    Part("its elements lie in C's order", "t.is_contiguous()"),
    Part("its storage holds all of it, which one that was freed or failed to grow does not", f"not {_HELD}"),
    Part("an array over it, which leaves the storage free to grow", _OVER),
)
_WRITE = Part("**the copy itself**", "out.__setitem__(..., view)")  # a statement in the lane
_AN_ARRAY = (
    _CALL,
    Part("it is exactly an array", "type(x) is _ndarray"),
    *_ALWAYS,
    Part("torch has its dtype", "x.dtype"),
)
_A_VIEW = (*_AN_ARRAY, Part("what stands behind it", "x.base"), Part("how it lies in memory", "x.flags"))
_FROM_TENSOR, _FROM_ARRAY = "_lanes.plain_tensor_to_numpy", "_lanes.plain_array_to_torch"
_COPIED = (_FROM_TENSOR, "_lanes.tensor_to_numpy", "_torch.in_place")
LANES = {
    "to_numpy, a plain tensor": Lane(
        "tb.to_numpy(x)",
        TENSORS["float32 (16,)"],
        (_FROM_TENSOR,),
        (
            *_SHARED_TENSOR,
            Part("and no gradient", "not x.requires_grad"),
            Part("**the sharing itself**", "x.numpy()"),
            Part("no two elements are one, and the memory is the tensor's", "a.flags.num & 7"),
        ),
    ),
    "to_numpy, in a graph": Lane(
        "tb.to_numpy(x)",
        TENSORS["float32 (16,), in a graph"],
        (_FROM_TENSOR,),
        (
            *_SHARED_TENSOR,
            Part("whether it requires grad", "x.requires_grad"),
            Part("**the sharing itself**", "x.numpy(force=not in_child)"),
            Part("the tensor has memory of its own, which a functional one has not", "not a.flags.owndata"),
            Part("and the array lies on it: a lazy bit would have made a copy", "a.base.data_ptr() == x.data_ptr()"),
            Part("no write through the array corrupts gradients", "a.setflags(False)"),
        ),
    ),
    "to_numpy, copied": Lane(
        "tb.to_numpy(x, copy=True)",
        TENSORS["float32 (16,)"],
        _COPIED,
        (*_DENSE_TENSOR, Part("**the copy itself**", 'view.copy("K")')),
    ),
    "to_numpy, copied into out": Lane(
        "tb.to_numpy(x, out=out)",
        TENSORS["float32 (16,)"],
        _COPIED,
        (
            *_DENSE_TENSOR,
            Part("out takes a write in C's order", "out.flags.carray"),
            Part("and has the same shape", "not view.shape != out.shape"),
            Part("and no byte of the tensor", "not _may_share_memory(view, out)"),
            _WRITE,
        ),
    ),
    "to_torch, copied": Lane(
        "tb.to_torch(x, copy=True)",
        lambda torch: ARRAYS["float32 (16,)"](),
        (_FROM_ARRAY, "_lanes.array_to_torch"),
        (
            *_AN_ARRAY,
            Part("it has no gaps", "flags.forc"),
            Part("**the copy itself**", '_from_numpy(x.copy("K"))'),
        ),
    ),
    "to_torch, a column": Lane(
        "tb.to_torch(x)",
        lambda torch: ARRAYS["float32 (16,), a column"](),
        (_FROM_ARRAY,),
        (
            *_A_VIEW,
            Part("its strides are torch's, and no two elements are one", "is_forward(x)"),
            Part("**the sharing itself**", "_from_numpy(x)"),
        ),
    ),
    "to_torch, a view of a tensor": Lane(
        "tb.to_torch(x)",
        lambda torch: ARRAYS["float32 (16,), a view of a tensor"](),
        (_FROM_ARRAY,),
        (
            *_A_VIEW,
            Part("no mode answers for torch", "not _modes()"),
            Part("it is the whole of the tensor behind it, bit for bit", "is_whole(x, base)"),
            Part("**the sharing itself**, with the tensor's version counter", "base.detach()"),
        ),
    ),
}
_NOTHING = Part("the loop that times a line", "None")
_OURS = (_CALL, _NOTHING, _WRITE)  # beside the lines of the lanes


def _called(x: Any, **options: Any) -> Any:
    return x


def _rows(scope: Scope) -> list[Row]:
    return [
        Row(f"{title}: {part.why}, `{part.code}`", partial(_build, title, part))
        for title, lane in LANES.items()
        for part in (Part("**all of it**", lane.call), *lane.parts, _NOTHING)
    ]


def _build(title: str, part: Part) -> Case:
    import numpy as np
    import torch

    import tensorbridge as tb
    from tensorbridge import _lanes
    from tensorbridge._adapters import _torch

    lane = LANES[title]
    x = lane.make(torch)
    a = x.numpy(force=True) if isinstance(x, torch.Tensor) else x
    tb.to_torch(tb.to_numpy(x)[::-1])  # the lanes are open
    out = np.empty_like(a)
    if part.code == lane.call:
        state = SHARED if "=" not in lane.call else WARM if "out=" in lane.call else REUSED
        return Case((Way("alone", lane.call, "bridge", state),), {"tb": tb, "x": x, "out": out}, result_is(x, a))
    modules = {"_lanes": _lanes, "_torch": _torch}
    source = "".join([inspect.getsource(attrgetter(path)(SimpleNamespace(**modules))) for path in lane.functions])

    def check(way: Way, result: Any) -> None:
        expect(way.code.removeprefix("not ") in source or part in _OURS, f"{way.code}: no line of this lane")
        expect(result is not False, f"{way.code}: such an array does not take the lane")

    names = {k: v for module in reversed(modules.values()) for k, v in vars(module).items()}
    names |= {
        "called": _called,
        "x": x,
        "t": x,
        "a": a,
        "flags": a.flags,
        "view": a,
        "out": out,
        "base": getattr(x, "base", None),
    }
    return Case((Way("alone", part.code, "bridge", NONE),), names, check)


QUESTIONS = (
    Question(
        "promises",
        "Where does the time of a small call go?",
        "What a lane asks before it shares or copies, and what each question keeps from happening. Every line is timed "
        "alone, in a tight loop, where it is at its fastest: the parts need not add up to the whole.",
        _rows,
    ),
)
