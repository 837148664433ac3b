"""What a plan says is what is done: every step on every named array, described after it was run."""

from __future__ import annotations

import inspect
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from arrays import ARRAYS, attempt, numbers

import tensorbridge as tb
from tensorbridge import _convert, _options
from tensorbridge._adapters import adapter_of
from tensorbridge._dtypes import DTYPES
from tensorbridge._plan import decide
from tensorbridge._step import Want, bind

# torch says once a process that complex32 is experimental; nothing else may warn.
silent = pytest.mark.filterwarnings("error", "ignore:ComplexHalf support is experimental")

HOW: dict[str, dict[str, dict[str, Any]]] = {
    "numpy": {
        "as it is": {},
        "copied": {"copy": True},
        "never copied": {"copy": False},
        "writable": {"writable": True},
        "read-only": {"writable": False},
        "copied, read-only": {"copy": True, "writable": False},
        "not detached": {"detach": False},
        "as float32": {"dtype": "float32"},
        "as complex128": {"dtype": "complex128"},
        "as bfloat16": {"dtype": "bfloat16", "copy": True},
        "as float8": {"dtype": "float8_e5m2"},
        "as int16": {"dtype": "int16", "writable": False},
        "as longdouble": {"dtype": "longdouble"},
        "as int4": {"dtype": "int4"},
    },
    "torch": {
        "as it is": {},
        "copied": {"copy": True},
        "never copied": {"copy": False},
        "shared, read-only or not": {"share_readonly": True},
        "detached": {"detach": True},
        "detached, copied": {"detach": True, "copy": True},
        "as float32": {"dtype": torch.float32},
        "as complex128": {"dtype": "complex128"},
        "as bfloat16": {"dtype": "bfloat16", "copy": True},
        "as float8": {"dtype": "float8_e5m2", "share_readonly": True},
        "as int16": {"dtype": "int16"},
        "as complex32": {"dtype": "complex32"},
        "as float4": {"dtype": "float4_e2m1fn_x2"},
        "on the host": {"device": "cpu"},
    },
}
OF_LARGE = {"as it is", "copied", "writable", "as float32", "as bfloat16"}
CONVERT = {"numpy": tb.to_numpy, "torch": tb.to_torch}
DEFAULTS = {name: {**inspect.signature(function).parameters} for name, function in CONVERT.items()}
ITSELF = (np.ndarray, torch.Tensor)


def wanted(target: str, options: dict[str, Any]) -> Want:
    """The canonical wish behind options, as the public function makes it."""
    given = {name: p.default for name, p in DEFAULTS[target].items() if p.kind is p.KEYWORD_ONLY}
    return _options.want(target, **(given | options))


def facts(x: Any) -> Any:
    """What a step promises. The size class is the source's; page-locking is asked only where the bus is crossed."""
    _, traits, _ = adapter_of(type(x)).open(x, Want("numpy"))
    return promised(traits)


def promised(traits: Any) -> Any:
    known = traits.origin != "unknown" and traits.size != "empty"  # an empty array has no memory behind it
    return traits._replace(size="", pinned=None, origin=traits.origin if known else "")


def address(x: Any) -> int:
    return x.data_ptr() if isinstance(x, torch.Tensor) else x.__array_interface__["data"][0]


def values_as(values: Any, dtype: str) -> Any:
    """The values of the source in another dtype, by NumPy's own cast of small numbers (exact in each of them)."""
    name = dtype.lstrip(">")
    if name.startswith("complex") or name in ("clongdouble", "float4_e2m1fn_x2"):
        return values
    return numbers(values.real.astype(getattr(ml_dtypes, name, name)))


def assert_honest(array: Any, values: Any, target: str, options: dict[str, Any]) -> None:
    plan, refusal = attempt(lambda: tb.plan(array, target, **options))
    if refusal is not None:
        _, again = attempt(lambda: CONVERT[target](array, **options))
        assert type(again) is type(refusal)
        assert str(again) == str(refusal)
        return
    adapter, want = adapter_of(type(array)), wanted(target, options)
    result, traits, want = adapter.open(array, want)
    source = adapter.describe(result, traits)
    steps = decide(traits, want, _convert.moment(traits, want)).steps
    assert bind(steps, source, want) == plan
    stacked = traits.framework.endswith(" list") and traits.order == "K"  # in which order is the framework's choice
    for step, function in zip(steps, _convert.compiled(steps, traits, want), strict=True):
        before, result = result, function(result)
        assert isinstance(result, ITSELF), step
        assert stacked or facts(result) == promised(step.after), step
        if source.nbytes and isinstance(before, ITSELF) and step.op != "export":  # which was done before we saw it
            assert (address(before) != address(result)) == bool(step.kind), step
        if step.kind or step.op in ("share", "restride"):
            assert np.array_equal(numbers(result), values_as(values, step.after.dtype)), step
    public = CONVERT[target](array, **options)
    fresh: dict[str, str] = {"origin": ""} if plan.bytes_moved else {}  # a lane makes it with no tensor behind it
    assert facts(public)._replace(**fresh) == facts(result)._replace(**fresh)
    assert np.array_equal(numbers(public), numbers(result))
    assert tuple(public.shape) == plan.source.shape
    assert isinstance(public, np.ndarray if target == "numpy" else torch.Tensor)
    assert type(public) is np.ndarray or target == "torch"
    if source.nbytes and source.address:
        assert tb.shares_memory(array, public) == plan.zero_copy
        assert plan.zero_copy == (plan.bytes_moved == 0)


@silent
@pytest.mark.parametrize("target", HOW)
@pytest.mark.parametrize("name", ARRAYS)
def test_every_step_makes_what_it_promised(name, target):
    values = numbers(ARRAYS[name]())
    for how, options in HOW[target].items():
        if "-large" in name and how not in OF_LARGE:
            continue
        array = ARRAYS[name]()
        try:
            assert_honest(array, values, target, options)
        except Exception as error:
            error.args = (f"{how}: {error}",)
            raise
        assert np.array_equal(numbers(array), values), how


ORDERS = {
    "numpy-plain": "C",
    "numpy-zero-d": "C",
    "numpy-fortran": "F",
    "numpy-permuted": "K",
    "numpy-strided-fortran": "strided F",
    "numpy-sliced-rows": "strided C",
    "numpy-reversed-both": "reversed C",
    "numpy-reversed-fortran": "reversed F",
    "numpy-odd": "odd C",
    "numpy-broadcast": "strided C",
    "numpy-length-1-axis-odd": "C",
    "torch-transposed": "F",
    "torch-channels-last": "K",
    "foreign-dlpack-reversed": "reversed C",
}


@pytest.mark.parametrize("name", ORDERS)
def test_order_is_told_in_the_words_of_the_field(name):
    assert tb.describe(ARRAYS[name]()).order == ORDERS[name]


# -- Every cast

ONES = {f"numpy-{name}": ("numpy", row.numpy) for name, row in DTYPES.items() if row.numpy is not None} | {
    f"torch-{name}": ("torch", getattr(torch, row.torch)) for name, row in DTYPES.items() if row.torch
}


@silent
@pytest.mark.parametrize("target", CONVERT)
@pytest.mark.parametrize("source", ONES)
def test_every_cast_keeps_a_one_or_is_refused_in_our_words(source, target):
    framework, dtype = ONES[source]
    if source == "torch-float4_e2m1fn_x2":
        ones = torch.ones(3, dtype=torch.uint8).view(dtype)
    else:
        ones = torch.ones(3).to(dtype) if framework == "torch" else np.ones(3, dtype="float32").astype(dtype)
    for wanted in DTYPES:
        result, refusal = attempt(lambda wanted=wanted: CONVERT[target](ones, dtype=wanted))
        if refusal is None:
            assert tb.describe(result).dtype == wanted
            assert numbers(result).tolist() == [1, 1, 1], wanted
        else:
            assert type(refusal) is tb.UnsupportedArrayError, f"{wanted}: {refusal!r}"
            assert re.search(f"has no {wanted}|cast|imaginary part", str(refusal)), wanted
