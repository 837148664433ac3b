"""`out=`: filled whatever the source and whatever its own layout, and nothing else is touched."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from arrays import ARRAYS, attempt, numbers, tensor, unaligned

import tensorbridge as tb

CONVERT = {"numpy": tb.to_numpy, "torch": tb.to_torch}
OUTS = {
    "numpy": {
        "plain": lambda shape: np.zeros(shape),
        "fortran": lambda shape: np.zeros(shape, order="F"),
        "narrow": lambda shape: np.zeros(shape, dtype="int16"),
        "bfloat16": lambda shape: np.zeros(shape, dtype=tb.to_numpy(torch.zeros(1, dtype=torch.bfloat16)).dtype),
        "complex": lambda shape: np.zeros(shape, dtype="complex64"),
        "reversed": lambda shape: np.zeros(shape)[::-1],
        "big-endian": lambda shape: np.zeros(shape, dtype=">f8"),
        "odd": lambda shape: np.zeros(shape, dtype=[("tag", "i1"), ("x", "f4")])["x"],
        "unaligned": lambda shape: unaligned(count=int(np.prod(shape))).reshape(shape),
        "longdouble": lambda shape: np.zeros(shape, dtype="longdouble"),
        "view of a tensor": lambda shape: torch.zeros(shape).numpy(),
    },
    "torch": {
        "plain": lambda shape: torch.zeros(shape, dtype=torch.float64),
        "narrow": lambda shape: torch.zeros(shape, dtype=torch.int16),
        "transposed": lambda shape: torch.zeros(shape[::-1]).permute(list(reversed(range(len(shape))))),
        "bfloat16": lambda shape: torch.zeros(shape, dtype=torch.bfloat16),
        "complex": lambda shape: torch.zeros(shape, dtype=torch.complex64),
        "strided": lambda shape: torch.zeros([*shape, 2])[..., 1],
        "conj": lambda shape: torch.zeros(shape, dtype=torch.complex64).conj(),
    },
}
INTO_OUT = [
    name
    for name in ARRAYS
    if "large" not in name and "zero-d" not in name and (len(name) < 99) and "float4" not in name
]


@pytest.mark.filterwarnings("error", "ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("target", OUTS)
@pytest.mark.parametrize("name", INTO_OUT)
def test_out_is_filled_whatever_the_source_and_the_layout_of_out(name, target):
    for kind, make in OUTS[target].items():
        array = ARRAYS[name]()
        values = numbers(array)
        shape = tb.describe(array).shape
        if not shape and kind in ("reversed",):
            continue
        out = make(shape)
        version = out._version if target == "torch" else 0
        resizable = None if target == "numpy" else out.untyped_storage().resizable()
        plan, refusal = attempt(lambda array=array, out=out: tb.plan(array, target, out=out))
        if refusal is not None:
            assert re.search("imaginary|NumPy cannot cast|numpy has no complex32", str(refusal)), kind
            continue
        assert CONVERT[target](array, out=out) is out, kind
        kept = numbers(out)
        wanted = values if tb.describe(out).dtype.startswith("complex") else values.real
        assert np.array_equal(kept, wanted), kind
        assert np.array_equal(numbers(array), values), kind
        assert plan.steps[-1].op == "fill", kind
        if target == "torch":
            assert out._version > version, kind
            assert out.untyped_storage().resizable() == resizable, kind


def test_out_given_with_writable_false_comes_back_as_a_read_only_view_of_it():
    out = np.zeros(6)
    result = tb.to_numpy(tensor(6), out=out, writable=False)
    assert not result.flags.writeable
    assert out.flags.writeable
    assert tb.shares_memory(result, out)
    assert out.tolist() == [1, 2, 3, 4, 5, 6]


def test_out_keeps_the_graph_of_a_tensor_unless_detached():
    x = tensor(3).requires_grad_()
    assert tb.to_torch(x, out=torch.zeros(3)).requires_grad
    assert not tb.to_torch(x, out=torch.zeros(3), detach=True).requires_grad


def test_plan_says_that_out_joins_the_graph_and_only_then():
    y = tensor(3).requires_grad_() * 2
    joins = "into the caller's array, `out`, which joins the autograd graph (MulBackward0), as with copy_"
    assert tb.plan(y, "torch", out=torch.zeros(3)).steps[-1].why == joins
    for plan in (
        tb.plan(y, "torch", out=torch.zeros(3), detach=True),
        tb.plan(y, "torch", out=torch.zeros(3, dtype=torch.int64)),
        tb.plan(y, "numpy", out=np.zeros(3)),
        tb.plan(y.detach(), "torch", out=torch.zeros(3)),
    ):
        assert "joins" not in str(plan)


def test_one_out_for_many_sources_in_a_graph_by_the_cure_that_the_error_names():
    x, out = tensor(3).requires_grad_(), torch.zeros(3)
    tb.to_torch(x * 2, out=out)
    cure = r"fill out\.detach\(\), and say detach=True where the source's graph is not wanted in it"
    with pytest.raises(ValueError, match=cure):
        tb.to_torch(x * 3, out=out)
    with_graph = tb.to_torch(x * 3, out=out.detach())
    assert with_graph.requires_grad
    for factor in (4, 5):
        filled = tb.to_torch(x * factor, out=out.detach(), detach=True)
        assert not filled.requires_grad
        assert out.tolist() == [factor, 2 * factor, 3 * factor]
    fresh = torch.zeros(3)
    for factor in (2, 3):
        assert tb.to_torch(x * factor, out=fresh, detach=True) is fresh
        assert not fresh.requires_grad
    with pytest.raises(ValueError) as refused:
        tb.to_torch(x * 3, out=out, detach=True)
    assert str(refused.value).endswith("out requires grad; fill out.detach()")


def test_filling_a_numpy_view_of_a_tensor_is_seen_by_autograd():
    saved = torch.ones(3)
    w = torch.ones(3, requires_grad=True)
    z = (saved * w).sum()
    tb.to_numpy(torch.zeros(3), out=tb.to_numpy(saved))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()


def negative(dtype, count=5):
    return torch._neg_view(torch.arange(1, count + 1).to(dtype))


def widened(t):
    return t.to(torch.complex128)


@pytest.mark.parametrize("count", [5, 40_000])
@pytest.mark.parametrize("wanted", ["bool", "float16", "float32", "float64", "int64", "complex64", "float8_e5m2"])
@pytest.mark.parametrize("source", ["float16", "float32", "int8", "uint8"])
def test_the_sign_of_a_negative_view_reaches_an_out_of_another_dtype(source, wanted, count):
    """Tensor.copy_ loses it between float16 and float32, and raises for bool."""
    x = negative(getattr(torch, source), count)
    expected = x.resolve_neg().to(getattr(torch, wanted))
    assert torch.equal(widened(tb.to_torch(x, out=torch.zeros(count, dtype=expected.dtype))), widened(expected))
    filled = tb.to_numpy(x, out=tb.to_numpy(torch.zeros(count, dtype=expected.dtype)))
    assert torch.equal(widened(tb.to_torch(filled)), widened(expected))


@pytest.mark.parametrize("wanted", ["float16", "float32", "int64"])
@pytest.mark.parametrize("source", ["float16", "float32", ">f4", "int8"])
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_a_negative_out_of_another_dtype_gets_the_values(source, wanted, framework):
    x = np.arange(5).astype(source)
    out = negative(getattr(torch, wanted))
    tb.to_torch(x if framework == "numpy" else tb.to_torch(x), out=out)
    assert out.resolve_neg().tolist() == [0, 1, 2, 3, 4]


def test_a_negative_view_reaches_an_out_of_its_dtype_in_one_pass():
    x = torch._neg_view(torch.arange(6.0))
    plan = tb.plan(x, "torch", out=torch.empty(6))
    assert [str(step.op) for step in plan.steps] == ["fill"]
    assert plan.bytes_moved == 24
