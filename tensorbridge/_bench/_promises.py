"""Where the time of a small call goes: what a fast lane asks before it shares, each question timed alone.

The lines are the lanes' own, found again in their source: a lane that changes leaves its row without a measurement.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from tensorbridge._bench._calls import ARRAYS, TENSORS
from tensorbridge._bench._rows import NONE, SHARED, Case, Question, Row, Scope, Way, expect, result_is


class Part(NamedTuple):
    """A line of a lane, and what it is there for."""

    why: str
    code: str


_CALL = Part("a Python function with options is called", "called(x)")
_ALWAYS = (
    Part("no copy guard or trace is open", "not _watch.watching"),
    Part("compiled code, which would drop the promises, is not calling", "_compiling() is None"),
)
_IN_A_GRAPH = (
    _CALL,
    Part("it is exactly a tensor", "type(x) is _Tensor"),
    *_ALWAYS,
    Part("its memory did not come read-only", "not (_marked and _is_marked(x))"),
    Part("NumPy has its dtype", "x.dtype"),
    Part("it is on the host", "x.is_cpu"),
    Part("it carries no tangent of forward differentiation", "_forward_ad._current_level < 0"),
    Part("whether it requires grad", "x.requires_grad"),
    Part("**the sharing itself**", "x.numpy(force=True)"),
    Part("the tensor has memory of its own, which a functional one has not", "not a.flags.owndata"),
    Part("and the array lies on it: a lazy bit would have made a copy", "a.base.data_ptr() == x.data_ptr()"),
    Part("no write through the array corrupts gradients", "a.setflags(False)"),
)
_A_VIEW = (
    _CALL,
    Part("it is exactly an array", "type(x) is _ndarray"),
    *_ALWAYS,
    Part("torch has its dtype", "x.dtype"),
    Part("what stands behind it", "x.base"),
    Part("how it lies in memory", "x.flags"),
)
LANES: dict[str, tuple[str, str, Callable[[Any], Any], tuple[Part, ...]]] = {
    "to_numpy, in a graph": (
        "tb.to_numpy(x)", "plain_tensor_to_numpy", TENSORS["float32 (16,), in a graph"], _IN_A_GRAPH
    ),
    "to_torch, a column": (
        "tb.to_torch(x)",
        "plain_array_to_torch",
        lambda torch: ARRAYS["float32 (16,), a column"](),
        (
            *_A_VIEW,
            Part("its strides are torch's, and no two elements are one", "_is_forward(x)"),
            Part("**the sharing itself**", "_from_numpy(x)"),
        ),
    ),
    "to_torch, a view of a tensor": (
        "tb.to_torch(x)",
        "plain_array_to_torch",
        lambda torch: ARRAYS["float32 (16,), a view of a tensor"](),
        (
            *_A_VIEW,
            Part("it is the whole of the tensor behind it, bit for bit", "_is_whole(x, base)"),
            Part("**the sharing itself**, with the tensor's version counter", "base.detach()"),
        ),
    ),
}  # fmt: skip
_NOTHING = Part("the loop that times a line", "None")
_OURS = (_CALL, _NOTHING)  # beside the lines of the lanes


def _called(x: Any, **options: Any) -> Any:
    return x


def _rows(scope: Scope) -> list[Row]:
    return [
        Row(f"{title}: {part.why}, `{part.code}`", lambda title=title, part=part: _build(title, part))  # type: ignore[misc]
        for title, (whole, _, _, parts) in LANES.items()
        for part in (Part("**all of it**", whole), *parts, _NOTHING)
    ]


def _build(title: str, part: Part) -> Case:
    import numpy as np
    import torch

    import tensorbridge as tb
    from tensorbridge import _lanes

    whole, lane, make, _ = LANES[title]
    x = make(torch)
    a = x.numpy(force=True) if isinstance(x, torch.Tensor) else x
    tb.to_torch(tb.to_numpy(x)[::-1])  # the lanes are open
    if part.code == whole:
        return Case((Way("alone", whole, "bridge", SHARED),), {"tb": tb, "x": x}, result_is(x, a))
    source = inspect.getsource(getattr(_lanes, lane))

    def check(way: Way, result: Any) -> None:
        expect(way.code in source or part in _OURS, f"{way.code}: no line of {lane}")
        expect(result is not False, f"{way.code}: such an array does not take the lane")

    names = {**vars(_lanes), "called": _called, "x": x, "a": a, "base": None if a is not x else np.asarray(x).base}
    return Case((Way("alone", part.code, "bridge", NONE),), names, check)


QUESTIONS = (
    Question(
        "promises",
        "Where does the time of a small shared call go?",
        "What a lane asks before it shares, and what each question keeps from happening. Every line is timed alone, in "
        "a tight loop, where it is at its fastest: the parts need not add up to the whole.",
        _rows,
    ),
)
