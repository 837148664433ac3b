"""Memory: change one side, look at the other; lose the source, use the result; what was promised to it is kept."""

from __future__ import annotations

import gc
import mmap
from typing import Any

import numpy as np
import pytest
import torch
from arrays import ARRAYS, digits, numbers, tensor
from oracle import HAS

import tensorbridge as tb

CONVERT = {"numpy": tb.to_numpy, "torch": tb.to_torch}
IN_MEMORY = [name for name in ARRAYS if not name.startswith("python") and "empty" not in name and "large" not in name]


def has_dtype(target: str, name: str) -> bool:
    """Whether `target` has the elements of this named array; dtypes are in the names."""
    dtype = next((rare for rare in ("int4", "complex32") if name.endswith(rare)), name.partition("dtype-")[2])
    return dtype in HAS[target] or not dtype


CROSSINGS = [(name, target) for name in IN_MEMORY for target in CONVERT if has_dtype(target, name)]


def silence(x: Any) -> None:
    """Overwrite every element: none is zero in any named array."""
    if isinstance(x, torch.Tensor):
        x.detach().zero_()
    else:
        x[...] = np.zeros((), dtype=x.dtype)


def stirred() -> list[Any]:
    """Allocations of every small size, full of other values: freed memory does not keep its content by luck."""
    noise = [np.full(size, 0x55, dtype="uint8") for size in (1, 3, 12, 24, 48, 96, 192, 384) for _ in range(40)]
    return noise + [torch.full((size,), 0x55, dtype=torch.uint8) for size in (12, 24, 48, 96, 192) for _ in range(40)]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize(("name", "target"), CROSSINGS)
def test_writing_the_result_changes_the_source_exactly_if_the_plan_says_zero_copy(name, target):
    array = ARRAYS[name]()
    plan, result = tb.plan(array, target), CONVERT[target](array)
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
    for name, target in CROSSINGS:
        array = ARRAYS[name]()
        options = {"share_readonly": True} if target == "torch" else {}
        results[name, target] = CONVERT[target](array, **options), numbers(array)
        del array
    gc.collect()
    noise = stirred()
    yield results
    del noise


@pytest.mark.parametrize(("name", "target"), CROSSINGS)
def test_result_outlives_its_source(name, target, orphans):
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


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "requires grad"])
@pytest.mark.parametrize("how", [*AFTERWARDS, *REFUSED_AFTERWARDS])
@pytest.mark.parametrize("road", [tb.to_numpy, tb.to_numpy.__wrapped__], ids=["lane", "full road"])
def test_view_stays_valid_whatever_torch_does_to_its_tensor_afterwards(road, how, grad, dtype):
    t = tensor(2, 3, dtype=dtype).requires_grad_(grad)
    a, values = road(t), numbers(t)
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
    "of a window": lambda a: np.lib.stride_tricks.sliding_window_view(a, (1, 2), writeable=a.flags.writeable)[0, 0],
    "by as_strided": lambda a: np.lib.stride_tricks.as_strided(a, (2,), (a.strides[0],)),
    "of a memoryview": lambda a: np.asarray(memoryview(a.view(f"int{8 * a.itemsize}"))),
    "bytes": lambda a: a.view("uint8"),
    "bytes, strided": lambda a: a.view("uint8")[:, 1::3],
    "twice the width": lambda a: a.reshape(-1)[2:].view(f"int{16 * a.itemsize}"),
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


@pytest.mark.parametrize("part", ["real", "imag"])
def test_a_part_of_a_complex_tensor_comes_back_as_its_alias_too(part):
    t = torch.complex(tensor(3), tensor(3))
    back = tb.to_torch(getattr(tb.to_numpy(t), part), copy=False)
    version = t._version
    back.zero_()
    assert t._version > version
    assert getattr(t, part).tolist() == [0, 0, 0]


@pytest.mark.parametrize("how", ["reversed", "bytes", "real"])
def test_filling_any_view_of_a_tensor_is_counted(how):
    t = torch.ones(4, dtype=torch.complex64)
    a = tb.to_numpy(t)
    out = {"reversed": a[::-1], "bytes": a.view("uint8"), "real": a.real}[how]
    version = t._version
    tb.to_numpy(np.zeros(out.shape, out.dtype), out=out)
    assert t._version > version
    assert not out.any()


def test_view_of_a_tensor_between_two_of_its_elements_keeps_its_values():
    a = tb.to_numpy(torch.arange(9, dtype=torch.uint8))[1:9].view("int32")
    assert tb.to_torch(a).tolist() == a.tolist()


def test_reversed_view_of_a_tensor_is_packed_as_any_other():
    t = tensor(3)
    back = tb.to_torch(tb.to_numpy(t)[::-1])
    assert back.tolist() == [3, 2, 1]
    assert not tb.shares_memory(back, t)


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


READ_ONLY = [
    "numpy-zero-d-read-only",
    "numpy-reversed-read-only",
    "numpy-odd-read-only",
    "numpy-overlap-read-only",
    "numpy-broadcast",
    "numpy-unaligned-read-only",
    "numpy-read-only",
    "numpy-read-only-view",
    "numpy-frombuffer-bytes",
    "numpy-memmap-r",
    "numpy-memmap-r-view",
    "numpy-memmap-r-reversed",
    "numpy-big-endian-unaligned-read-only",
    "numpy-length-1-read-only",
    "numpy-medium-read-only",
    "numpy-subclass-read-only",
    "numpy-view-of-tensor-broadcast",
    "foreign-dlpack-read-only",
    "foreign-dlpack-old",
    "foreign-dlpack-old-of-tensor",
    "foreign-interface-read-only",
    "foreign-arrayed-read-only",
    "foreign-bytes",
    "foreign-memoryview-read-only",
]
ALIASED = ["numpy-view-of-tensor-in-graph", "numpy-view-of-tensor-read-only"]


def test_read_only_names_are_all_there_are():
    assert [name for name in IN_MEMORY if not tb.describe(ARRAYS[name]()).writable] == sorted(
        READ_ONLY + ALIASED, key=list(ARRAYS).index
    )


@pytest.mark.parametrize("name", READ_ONLY)
def test_read_only_source_is_copied_unless_told_to_share(name):
    array = ARRAYS[name]()
    assert not tb.to_numpy(array).flags.writeable
    assert tb.to_numpy(array, writable=True).flags.writeable
    assert not tb.shares_memory(tb.to_numpy(array, writable=True), array)
    assert not tb.shares_memory(tb.to_torch(array), array)
    with pytest.raises(tb.CopyRequiredError):
        tb.to_torch(array, copy=False)
    with pytest.raises(tb.CopyRequiredError):
        tb.to_numpy(array, copy=False, writable=True)


@pytest.mark.parametrize("name", ALIASED)
def test_read_only_view_of_a_tensor_comes_back_all_the_same(name):
    array = ARRAYS[name]()
    assert not tb.to_numpy(array).flags.writeable
    assert tb.shares_memory(tb.to_torch(array, copy=False), array)


SHARED_ON_YOUR_WORD = [
    "numpy-read-only",
    "numpy-read-only-view",
    "numpy-frombuffer-bytes",
    "numpy-memmap-r",
    "numpy-overlap-writable",
    "numpy-overlap-read-only",
    "numpy-broadcast",
    "numpy-view-of-tensor-broadcast",
    "numpy-zero-d-read-only",
    "numpy-subclass-read-only",
    "foreign-dlpack-read-only",
    "foreign-dlpack-old",
    "foreign-bytes",
    "foreign-memoryview-read-only",
]


@pytest.fixture
def every_warning() -> Any:
    """torch warns of read-only arrays once a process; here it would every time."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("every_warning")
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
        ("torch-transposed", (8, 24)),
        ("torch-channels-last", (96, 8, 48, 24)),
        ("torch-permuted", (32, 8, 96)),
        ("foreign-dlpack-reversed", (8,)),
        ("foreign-dlpack-of-tensor", (8, 24)),
    ],
)
def test_copies_keep_the_memory_order_and_turn_reversed_axes_forward(name, strides, target):
    assert tb.describe(CONVERT[target](ARRAYS[name](), copy=True)).strides == strides


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


@pytest.mark.parametrize("options", [{"copy": True}, {"dtype": "float16"}], ids=str)
@pytest.mark.parametrize("count", [3, 2**20], ids=["small", "large"])
def test_a_copy_of_what_overlaps_is_in_c_order_whatever_axis_is_the_finer(count, options):
    t = torch.zeros(count + 4).as_strided((count, 3), (1, 2))
    a = np.lib.stride_tricks.as_strided(np.zeros(count + 4, "f4"), (count, 3), (4, 8))
    for x, convert in ((t, tb.to_torch), (a, tb.to_torch), (t, tb.to_numpy), (a, tb.to_numpy)):
        made = tb.describe(convert(x, **options))
        assert made.strides == (made.nbytes // count, made.nbytes // count // 3)
        assert tb.plan(x, made.framework, **options).target.order == made.order == "C"


def test_a_tensor_that_no_kernel_may_read_as_it_lies_is_told():
    t = torch.frombuffer(bytearray(25), dtype=torch.float64, offset=1, count=3)
    assert not tb.plan(t, "numpy").target.aligned
    assert tb.plan(t[:0], "numpy").target.aligned
