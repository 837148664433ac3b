"""Any view of any memory: whatever strides, dtype, byte order, offset and owner, the result is what the elements say.

The reference is plain: elements copied one by one by NumPy or torch, addresses, and the set of bytes that each element
covers. Nothing here knows a rule of the planner.
"""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from _facts_probes import address
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tensorbridge as tb
from tensorbridge._dtypes import DTYPES

CAREFUL = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
IN_BOTH = [name for name, row in DTYPES.items() if row.numpy is not None and row.torch and name != "complex32"]
CASTABLE = [name for name in IN_BOTH if name.startswith(("int", "uint", "float", "bfloat")) and "8_" not in name]


def covered(shape, strides, itemsize):
    """The bytes of each element, counted from the first."""
    starts = (sum(i * s for i, s in zip(at, strides)) for at in itertools.product(*map(range, shape)))
    return [range(start, start + itemsize) for start in starts]


def is_overlapping(shape, strides, itemsize):
    of_each = covered(shape, strides, itemsize)
    return len(set().union(*of_each)) < sum(map(len, of_each))


def by_stride(shape, strides):
    """The axes that matter, the slowest first."""
    return sorted(
        (axis for axis, length in enumerate(shape) if length > 1), key=lambda axis: (-abs(strides[axis]), axis)
    )


def bits(x):
    if isinstance(x, torch.Tensor):
        x = x.detach().resolve_conj().resolve_neg()
        flat = torch.empty(x.numel(), dtype=x.dtype)
        return bytes(flat.copy_(x.reshape(-1)).view(torch.uint8).tolist())
    return np.ascontiguousarray(x).tobytes()


@st.composite
def layouts(draw, unit, lowest, odd):
    """Shape and strides: axes in any order, dense or not, forward or not, of lengths that mean something or not."""
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 1, 2, 2, 3]), max_size=4)))
    if draw(st.booleans()):
        strides, step = [0] * len(shape), unit
        for axis in draw(st.permutations(range(len(shape)))):
            step *= draw(st.sampled_from([1, 1, 1, 2]))
            strides[axis] = step * draw(st.sampled_from([1, 1, lowest]))
            step *= max(shape[axis], 1)
    else:
        loose = st.integers(-40, 40) if odd else st.integers(0, 40)
        strides = [
            draw(loose) if n <= 1 else unit * draw(st.integers(4 * min(lowest, 0), 5)) + draw(st.just(0) | st.just(odd))
            for n in shape
        ]
    return shape, tuple(strides)


@st.composite
def arrays(draw):
    name = draw(st.sampled_from(IN_BOTH))
    dtype = DTYPES[name].numpy
    shape, strides = draw(layouts(dtype.itemsize, -1, draw(st.sampled_from([0, 0, 1, 3]))))
    reach = [(n - 1) * s for n, s in zip(shape, strides) if n] * (0 not in shape)
    low, high = sum(s for s in reach if s < 0), sum(s for s in reach if s > 0)
    offset = draw(st.sampled_from([0, 0, 1, dtype.itemsize]))
    size = high - low + dtype.itemsize + offset
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    memory = random.integers(0, 2 if name == "bool" else 256, size, dtype="uint8")
    owner = draw(st.sampled_from(["array", "array", "tensor", "bytes", "bytearray"]))
    if owner == "tensor":
        memory = torch.from_numpy(memory).clone().numpy()
    elif owner != "array":
        memory = np.frombuffer({"bytes": bytes, "bytearray": bytearray}[owner](memory), dtype="uint8")
    if dtype.itemsize > 1 and not DTYPES[name].carrier and draw(st.integers(0, 5)) == 0:
        dtype = dtype.newbyteorder(">")
    a = np.ndarray(shape, dtype, memory, offset - low, strides)
    if draw(st.integers(0, 3)) == 0:
        a.flags.writeable = False
    return name, a, owner == "tensor"


@st.composite
def tensors(draw):
    name = draw(st.sampled_from(IN_BOTH))
    dtype = getattr(torch, name)
    shape, strides = draw(layouts(1, 1, 0))
    offset = draw(st.sampled_from([0, 0, 1, 3]))
    count = sum((n - 1) * s for n, s in zip(shape, strides) if n) + 1 + offset
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    data = torch.from_numpy(random.integers(0, 2 if name == "bool" else 256, count * dtype.itemsize, dtype="uint8"))
    t = data.clone().view(dtype).as_strided(shape, strides, offset)
    if name in ("float16", "bfloat16", "float32", "float64", "complex64", "complex128") and draw(st.booleans()):
        t = t.requires_grad_()
    if t.is_complex() and draw(st.booleans()):
        t = t.conj()
        if draw(st.booleans()):
            t, name = t.imag, {"complex64": "float32", "complex128": "float64"}[name]
    return name, t


COPY = st.sampled_from([None, None, True, False])


@CAREFUL
@given(arrays(), COPY, st.booleans())
def test_any_array_to_torch(drawn, copy, share_readonly):
    name, a, of_tensor = drawn
    before = bits(a)
    native = bits(a.astype(a.dtype.newbyteorder("="))) if not a.dtype.isnative else before
    free = tb.plan(a, "torch", share_readonly=share_readonly)
    assert free.bytes_moved == (0 if free.zero_copy else a.nbytes)
    if copy is False and not free.zero_copy:
        with pytest.raises(tb.CopyRequiredError) as caught:
            tb.to_torch(a, copy=False, share_readonly=share_readonly)
        assert caught.value.plan.bytes_moved == a.nbytes
        return
    t = tb.to_torch(a, copy=copy, share_readonly=share_readonly)
    assert (str(t.dtype), tuple(t.shape), bits(t)) == (f"torch.{name}", a.shape, native)
    if not a.size:
        return
    shared = address(t) == address(a)
    assert shared == tb.shares_memory(a, t) == (free.zero_copy and copy is not True)
    overlapping = is_overlapping(a.shape, a.strides, a.itemsize)
    assert not overlapping or tb.describe(a).overlap
    if shared:
        assert a.dtype.isnative
        assert of_tensor or share_readonly or (a.flags.writeable and not overlapping)
        return
    strides = [s * t.element_size() for s in t.stride()]
    assert not is_overlapping(t.shape, strides, t.element_size())
    assert tb.describe(a).overlap or by_stride(t.shape, strides) == by_stride(a.shape, a.strides)
    t.view(torch.uint8 if t.element_size() == 1 else t.dtype).zero_()
    assert bits(a) == before


@CAREFUL
@given(tensors(), COPY, st.sampled_from([None, True, False]))
def test_any_tensor_to_numpy_and_back(drawn, copy, writable):
    name, t = drawn
    before, lazy = bits(t), t.is_conj() or t.is_neg()
    free = tb.plan(t, "numpy", writable=writable)
    if copy is False and not free.zero_copy:
        with pytest.raises(tb.CopyRequiredError) as caught:
            tb.to_numpy(t, copy=False, writable=writable)
        assert caught.value.plan.bytes_moved == t.numel() * t.element_size()
        return
    a = tb.to_numpy(t, copy=copy, writable=writable)
    assert (a.dtype, a.shape, bits(a), type(a)) == (DTYPES[name].numpy, tuple(t.shape), before, np.ndarray)
    if not a.size:
        return
    strides = [s * t.element_size() for s in t.stride()]
    overlapping = is_overlapping(t.shape, strides, t.element_size())
    shared = address(a) == t.data_ptr()
    assert shared == tb.shares_memory(t, a) == (free.zero_copy and copy is not True)
    assert not (shared and lazy)
    assert writable is None or a.flags.writeable == writable
    if shared:
        assert not (a.flags.writeable and (overlapping or (t.requires_grad and not writable)))
        back = tb.to_torch(a, copy=False)
        assert (back.data_ptr(), back.dtype, bits(back)) == (t.data_ptr(), t.dtype, before)
    else:
        assert writable is False or a.flags.writeable
        assert not is_overlapping(a.shape, a.strides, a.itemsize)
        if a.flags.writeable:
            a[...] = np.zeros((), a.dtype)
            assert bits(t) == before


@CAREFUL
@given(st.data(), st.sampled_from(CASTABLE), st.sampled_from(CASTABLE))
def test_any_out_receives_any_array(data, source, target):
    """`out` of any layout, either side, either framework; values that every dtype here holds."""
    shape, strides = data.draw(layouts(1, 1, 0))
    size = sum((n - 1) * s for n, s in zip(shape, strides) if n) + 1
    out = torch.zeros(size, dtype=getattr(torch, target)).as_strided(shape, strides)
    values = np.arange(out.numel()).reshape(shape) % 2 + 1
    a = values.astype("float32").astype(DTYPES[source].numpy)[..., ::-1] if shape else np.array(values, dtype="int8")
    into_numpy = data.draw(st.booleans())
    if into_numpy:
        out = tb.to_numpy(out, writable=not tb.describe(out).overlap)
    convert = tb.to_numpy if into_numpy else tb.to_torch
    source_array = tb.to_torch(a.copy()) if data.draw(st.booleans()) else a
    if tb.describe(out).overlap:
        with pytest.raises(ValueError, match=r"overlaps itself|read-only"):
            convert(source_array, out=out)
        return
    assert convert(source_array, out=out) is out
    assert out.tolist() == a.astype("int64").tolist()


@CAREFUL
@given(layouts(4, -1, 1), st.sampled_from([2, 4]))
def test_a_layout_is_never_thought_disjoint_that_is_not(layout, itemsize):
    from tensorbridge._array import layout as laid

    shape, strides = layout
    found = laid(shape, strides, itemsize)
    assert found.overlap or not is_overlapping(shape, strides, itemsize)
    of_each = covered(shape, strides, itemsize)
    if found.spacing == "dense" and of_each:
        assert set().union(*of_each) == set(range(len(of_each) * itemsize))
    assert found.spacing != "strided" or not any(n > 1 and (s < 0 or s % itemsize) for n, s in zip(shape, strides))


def test_the_reference_sees_what_it_should():
    assert is_overlapping((2, 3), (4, 4), 4)
    assert is_overlapping((2,), (2,), 4)
    assert not is_overlapping((2, 3), (12, 4), 4)
    assert bits(np.array([1, 2], dtype=ml_dtypes.bfloat16)) == bits(torch.tensor([1, 2], dtype=torch.bfloat16))
    assert bits(torch.tensor([1 + 2j]).conj()) == np.array([1 - 2j], dtype="complex64").tobytes()
