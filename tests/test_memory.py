"""Memory: change one side and look at the other; lose the source and use the result; promises to the source are kept."""

from __future__ import annotations

import gc
import mmap
from typing import Any

import numpy as np
import pytest
import torch
from arrays import ARRAYS, FOREIGN, NUMPY, digits, frozen, numbers, tensor, unaligned
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import HAS

import tensorbridge as tb

CONVERT = {"numpy": tb.to_numpy, "torch": tb.to_torch}
IN_MEMORY = [name for name in ARRAYS if not name.startswith("python") and "empty" not in name and "large" not in name]


def silence(x: Any) -> None:
    """Overwrite every element: none is zero in any named array."""
    if isinstance(x, torch.Tensor):
        x.detach().zero_()
    else:
        x[...] = np.zeros((), dtype=x.dtype)


def is_beyond_torch(name: str) -> bool:
    return tb.describe(ARRAYS[name]()).dtype.lstrip(">") not in HAS["torch"]


def stirred() -> list[Any]:
    """Allocations of every small size, full of other values: freed memory does not keep its content by luck."""
    noise = [np.full(size, 0x55, dtype="uint8") for size in (1, 3, 12, 24, 48, 96, 192, 384) for _ in range(40)]
    return noise + [torch.full((size,), 0x55, dtype=torch.uint8) for size in (12, 24, 48, 96, 192) for _ in range(40)]


@pytest.mark.parametrize("target", CONVERT)
@pytest.mark.parametrize("name", IN_MEMORY)
def test_writing_the_result_changes_the_source_exactly_if_the_plan_says_zero_copy(name, target):
    array = ARRAYS[name]()
    try:
        plan, result = tb.plan(array, target), CONVERT[target](array)
    except tb.UnsupportedArrayError:
        assert is_beyond_torch(name)
        return
    assert getattr(result, "flags", None) is None or result.flags.writeable == plan.target.writable
    if not plan.target.writable or tb.describe(result).lazy == "zero":  # torch itself refuses to write into it
        return
    values = numbers(array) if not name.startswith("foreign") else numbers(tb.to_numpy(array, copy=True))
    silence(result)
    after = numbers(array) if not name.startswith("foreign") else numbers(tb.to_numpy(array, copy=True))
    assert np.array_equal(values, after) != plan.zero_copy


@pytest.fixture(scope="module")
def orphans() -> Any:
    """The result of every conversion, its source deleted, freed memory overwritten; and what its values should be."""
    results = {}
    for name in IN_MEMORY:
        for target, options in (("numpy", {}), ("torch", {"share_readonly": True})):
            if target == "numpy" or not is_beyond_torch(name):
                array = ARRAYS[name]()
                results[name, target] = CONVERT[target](array, **options), numbers(array)
                del array
    gc.collect()
    noise = stirred()
    yield results
    del noise


@pytest.mark.parametrize("target", CONVERT)
@pytest.mark.parametrize("name", IN_MEMORY)
def test_result_outlives_its_source(name, target, orphans):
    if is_beyond_torch(name) and target == "torch":
        assert (name, target) not in orphans
        return
    result, values = orphans[name, target]
    assert np.array_equal(numbers(result), values)


# -- What torch can do to a tensor whose memory NumPy views


def module_of(t: torch.Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(t.detach(), requires_grad=False)
    return module


AFTERWARDS = {
    "set_": lambda t: t.detach().set_() if t.requires_grad else t.set_(),
    "data": lambda t: setattr(t, "data", torch.zeros(7, dtype=t.dtype)),
    "resize_ to less": lambda t: t.detach().resize_(2),
    "t_": lambda t: t.detach().t_(),
    "unsqueeze_": lambda t: t.detach().unsqueeze_(0),
    "swap": lambda t: torch.utils.swap_tensors(t, torch.zeros(7, dtype=t.dtype)),
    "nothing": lambda t: None,
}
REFUSED_AFTERWARDS = {
    "resize_": lambda t: t.detach().resize_(4096),
    "resize_ of the storage": lambda t: t.untyped_storage().resize_(0),
    "growth of the storage": lambda t: t.untyped_storage().resize_(65536),
    "out=": lambda t: torch.cat([torch.ones(64, 64, dtype=t.dtype)] * 2, out=t.detach()),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "requires grad"])
@pytest.mark.parametrize("how", [*AFTERWARDS, *REFUSED_AFTERWARDS])
def test_view_stays_valid_whatever_torch_does_to_its_tensor_afterwards(how, grad, dtype):
    t = tensor(2, 3, dtype=dtype).requires_grad_(grad)
    a, values = tb.to_numpy(t), numbers(t)
    assert tb.shares_memory(a, t)
    if how in REFUSED_AFTERWARDS:
        with pytest.raises(RuntimeError):
            REFUSED_AFTERWARDS[how](t)
    else:
        AFTERWARDS[how](t)
    del t
    kept = stirred()
    assert np.array_equal(numbers(a), values)
    assert kept


@pytest.mark.parametrize("move", ["to(float64)", "half", "apply"])
def test_view_of_a_weight_stays_valid_when_its_module_moves(move):
    module = module_of(tensor(2, 3, dtype=torch.float32))
    a = tb.to_numpy(module.weight)
    {
        "to(float64)": lambda: module.to(torch.float64),
        "half": lambda: module.half(),
        "apply": lambda: module._apply(lambda t: t.clone() * 0),
    }[move]()
    kept = stirred()
    assert a.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert kept


def test_storage_grows_freely_while_only_plans_and_refusals_have_looked_at_it():
    t = tensor(6, dtype=torch.float32)
    tb.plan(t, "numpy")
    tb.describe(t)
    tb.shares_memory(t, np.zeros(6))
    tb.to_numpy(t, copy=True)
    tb.to_torch(t)
    with pytest.raises(tb.CopyRequiredError):
        tb.to_numpy(t, copy=False, dtype="float64")
    assert t.untyped_storage().resizable()
    tb.to_numpy(t)
    assert not t.untyped_storage().resizable()


def test_shared_array_cannot_be_resized_under_its_tensor():
    a = digits(6)
    t = tb.to_torch(a)
    with pytest.raises(ValueError, match="cannot resize"):
        a.resize(4096)
    assert t.tolist() == a.tolist()


def test_growing_bytearray_is_held_while_a_tensor_views_it():
    data = bytearray([1, 2, 3])
    t = tb.to_torch(data)
    with pytest.raises(BufferError):
        data.extend(b"more")
    t[0] = 7
    assert data[0] == 7
    del t
    gc.collect()
    data.extend(b"more")


def test_memory_map_cannot_be_closed_under_its_array():
    with mmap.mmap(-1, 64) as mapped:
        a = tb.to_numpy(mapped)
        with pytest.raises(BufferError):
            mapped.close()
        a[0] = 7
        assert mapped[0] == 7
        del a
        gc.collect()


# -- Tensors that come back


VIEWS = {
    "whole": lambda a: a,
    "strided": lambda a: a[1::2],
    "transposed": lambda a: a.T,
    "same width": lambda a: a.view(f"int{8 * a.itemsize}"),
    "zero-d": lambda a: a[0, 0, ...],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "requires grad"])
def test_view_of_a_tensor_comes_back_as_its_alias_with_its_version_counter(view, dtype, grad):
    t = tensor(2, 3, dtype=dtype).requires_grad_(grad)
    a = VIEWS[view](tb.to_numpy(t))
    back = tb.to_torch(a, copy=False)
    assert np.array_equal(numbers(back), numbers(a))
    assert tb.shares_memory(back, t)
    version = t._version
    back.zero_()
    assert t._version > version


def test_writing_through_the_alias_is_caught_by_backward():
    x = tensor(3).requires_grad_()
    y = x * 2
    z = (y**2).sum()
    tb.to_torch(tb.to_numpy(y)).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()


def test_view_of_a_resized_tensor_comes_back_within_its_storage():
    t = tensor(6)
    a = tb.to_numpy(t)[2:]
    t.resize_(2)
    assert tb.to_torch(a, copy=False).tolist() == [3, 4, 5, 6]


# -- Promises to the source


READ_ONLY = [name for name in IN_MEMORY if not tb.describe(ARRAYS[name]()).writable]


@pytest.mark.parametrize("name", READ_ONLY)
def test_read_only_source_is_copied_unless_told_to_share(name):
    array = ARRAYS[name]()
    assert not tb.to_numpy(array).flags.writeable
    assert tb.to_numpy(array, writable=True).flags.writeable
    assert not tb.shares_memory(tb.to_numpy(array, writable=True), array)
    if tb.plan(array, "torch").steps[-1].why.startswith("an alias of the tensor"):
        assert tb.shares_memory(tb.to_torch(array), array)
        return
    if not tb.describe(array).dtype.startswith((">", "long", "clong", "int4")):
        assert not tb.shares_memory(tb.to_torch(array), array)
        with pytest.raises(tb.CopyRequiredError, match="read-only|reversed|negative strides|whole elements|aligned"):
            tb.to_torch(array, copy=False)


SHARED_ON_YOUR_WORD = [
    "numpy-read-only",
    "numpy-read-only-view",
    "numpy-frombuffer-bytes",
    "numpy-memmap-r",
    "numpy-overlap-writable",
    "numpy-overlap-read-only",
    "numpy-broadcast",
    "numpy-zero-d-read-only",
    "numpy-subclass-read-only",
    "foreign-dlpack-read-only",
    "foreign-dlpack-old",
    "foreign-bytes",
    "foreign-memoryview-read-only",
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SHARED_ON_YOUR_WORD)
def test_share_readonly_shares_without_a_warning(name):
    array = ARRAYS[name]()
    t = tb.to_torch(array, share_readonly=True, copy=False)
    assert tb.shares_memory(array, t)
    assert np.array_equal(numbers(t), numbers(array))
    assert name.startswith("foreign") or tb.describe(array).writable == tb.describe(ARRAYS[name]()).writable


def test_private_memory_map_is_shared_writable_and_never_reaches_the_file(tmp_path):
    digits(6).tofile(tmp_path / "six")
    with pytest.raises(tb.CopyRequiredError, match='mode="c"'):
        tb.to_torch(np.memmap(tmp_path / "six", dtype="float64", mode="r"), copy=False)
    tb.to_torch(np.memmap(tmp_path / "six", dtype="float64", mode="c"), copy=False).zero_()
    assert np.fromfile(tmp_path / "six").tolist() == digits(6).tolist()


@pytest.mark.parametrize("name", ["torch-overlap", "torch-in-graph", "torch-leaf", "numpy-overlap-writable"])
def test_guarded_memory_is_viewed_read_only_and_stays_so_through_both_directions(name):
    array = ARRAYS[name]()
    a = tb.to_numpy(array)
    assert tb.shares_memory(a, array)
    assert not a.flags.writeable
    assert not tb.to_numpy(a).flags.writeable


@pytest.mark.parametrize("name", ["torch-overlap", "numpy-overlap-writable", "numpy-broadcast"])
def test_overlap_is_copied_for_writing(name):
    array = ARRAYS[name]()
    a = tb.to_numpy(array, writable=True)
    values = numbers(array)
    a[...] = 0
    assert np.array_equal(numbers(array), values)


# -- Memory order


@pytest.mark.parametrize("target", CONVERT)
@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("numpy-fortran", (8, 16)),
        ("numpy-permuted", (32, 8, 96)),
        ("numpy-strided-fortran", (8, 16)),
        ("numpy-reversed-rows", (24, 8)),
        ("numpy-reversed-both", (48, 8)),
        ("numpy-reversed-fortran", (8, 16)),
        ("numpy-sliced-rows", (16, 8)),
        ("torch-transposed", (8, 16)),
        ("torch-channels-last", (96, 8, 48, 24)),
        ("torch-permuted", (32, 8, 96)),
        ("foreign-dlpack-reversed", (8,)),
        ("foreign-dlpack-of-tensor", (8, 24)),
    ],
)
def test_copies_keep_the_memory_order_and_turn_reversed_axes_forward(name, strides, target):
    plain = {"numpy-fortran": (8, 16), "numpy-reversed-both": (48, 8), "torch-transposed": (8, 24)}.get(name, strides)
    result = tb.describe(CONVERT[target](ARRAYS[name](), copy=True))
    axes = np.argsort(result.strides)
    assert (np.argsort(np.abs(tb.describe(ARRAYS[name]()).strides)) == axes).all(), plain
    assert min(result.strides) == 8
    assert result.order in ("C", "F", "K")


# -- A failed call


FAILING = {
    "a copy that may not be": ("numpy-reversed", tb.to_torch, {"copy": False}),
    "a read-only source": ("numpy-read-only", tb.to_torch, {"copy": False}),
    "a graph that may not be cut": ("torch-in-graph", tb.to_numpy, {"detach": False}),
    "a dtype that is not there": ("numpy-dtype-longdouble", tb.to_torch, {}),
    "an imaginary part": ("torch-conj", tb.to_numpy, {"dtype": "float32"}),
    "a wrong option": ("torch-plain", tb.to_numpy, {"copy": "yes"}),
    "an out of another shape": ("torch-plain", tb.to_numpy, {"out": np.zeros(5)}),
    "a device that is not there": ("torch-plain", tb.to_torch, {"device": "cuda:7"}),
    "a copy of a foreign array": ("foreign-dlpack-reversed", tb.to_torch, {"copy": False}),
}


@pytest.mark.parametrize("why", FAILING)
def test_failed_call_leaves_the_source_as_it_was(why):
    name, convert, options = FAILING[why]
    array = ARRAYS[name]()
    before, values = tb.describe(array), numbers(array)
    version = array._version if isinstance(array, torch.Tensor) else 0
    with pytest.raises((tb.BridgeError, ValueError, TypeError)):
        convert(array, **options)
    assert tb.describe(array) == before
    assert np.array_equal(numbers(array), values)
    if isinstance(array, torch.Tensor):
        assert array._version == version
        assert array.untyped_storage().resizable()


# -- out


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
        frozen_before = None if target == "numpy" else out.untyped_storage().resizable()
        try:
            plan = tb.plan(array, target, out=out)
        except tb.UnsupportedArrayError as refusal:
            assert "imaginary" in str(refusal) or "cannot cast" in str(refusal) or "neither side" in str(refusal), kind
            continue
        assert CONVERT[target](array, out=out) is out, kind
        kept = numbers(out)
        wanted = values if tb.describe(out).dtype.startswith("complex") else values.real
        assert np.array_equal(kept, wanted), kind
        assert np.array_equal(numbers(array), values), kind
        assert plan.steps[-1].op == "fill", kind
        if target == "torch":
            assert out._version > version, kind
            assert out.untyped_storage().resizable() == frozen_before, kind


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


# -- shares_memory


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_shares_memory_says_what_the_sets_of_addresses_say(data):
    base = np.zeros(48, dtype="int16")
    one, two = (data.draw(windows(base)) for _ in range(2))
    common = addresses(one) & addresses(two)
    assert tb.shares_memory(one, tb.to_torch(two) if min(two.strides, default=0) >= 0 and two.size else two) == bool(
        common
    )


@st.composite
def windows(draw: Any, base: Any) -> Any:
    a = base.reshape(draw(st.sampled_from([(48,), (6, 8), (2, 4, 6)])))
    for axis, length in enumerate(a.shape):
        start, stop = sorted(draw(st.tuples(st.integers(0, length), st.integers(0, length))))
        step = draw(st.sampled_from([1, 2, 3, -1]))
        a = a[(slice(None),) * axis + (slice(start, stop, step) if step > 0 else slice(None, None, step),)]
    return a


def addresses(a: Any) -> set[int]:
    first = a.__array_interface__["data"][0]
    return {
        first + sum(i * s for i, s in zip(index, a.strides, strict=True)) + byte
        for index in np.ndindex(a.shape)
        for byte in range(a.itemsize)
    }


@pytest.mark.parametrize("name", [*(f"numpy-{n}" for n in NUMPY), *(f"foreign-{n}" for n in FOREIGN)])
def test_shares_memory_of_an_array_with_itself_unless_it_is_empty(name):
    array = ARRAYS[name]()
    assert tb.shares_memory(array, array) == ("empty" not in name)


def test_arrays_apart_share_nothing():
    a = frozen(digits(8))
    assert not tb.shares_memory(a, a.copy())
    assert not tb.shares_memory(a[::2], a[1::2])
    assert tb.shares_memory(a[::2], a[2:3])
    assert not tb.shares_memory(tensor(3), tensor(3))
    assert not tb.shares_memory(a, [1, 2])
