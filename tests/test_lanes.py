"""The fast lanes give what the full road gives for every named array, and leave to it what they cannot tell."""

from __future__ import annotations

from inspect import unwrap
from typing import Any

import numpy as np
import pytest
import torch
from arrays import ARRAYS, attempt, looks, numbers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import tensorbridge as tb
from tensorbridge._adapters._numpy import owner_of

# torch says once a process that complex32 is experimental; nothing else may warn.
silent = pytest.mark.filterwarnings("error", "ignore:ComplexHalf support is experimental")
tangents = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, at its first tangent

CONVERT = {"numpy": tb.to_numpy, "torch": tb.to_torch}


def address(x: Any) -> int:
    return x.data_ptr() if isinstance(x, torch.Tensor) else x.__array_interface__["data"][0]


@silent
@pytest.mark.parametrize("target", CONVERT)
@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in ARRAYS for how in ("as it is", "on the host")]
    # NumPy's copies differ from torch's in the strides of axes of length 1, which mean nothing.
    + [(name, "copied") for name in ARRAYS if "length-1" not in name],
)
def test_fast_lanes_give_what_the_full_road_gives(name, how, target):
    options = {"copy": True} if how == "copied" else {}
    if how == "on the host" and target == "torch":
        options = {"device": torch.device("cpu") if "tensor" in name else "cpu"}
    array = ARRAYS[name]()
    convert = CONVERT[target]
    full, refusal = attempt(lambda: unwrap(convert)(array, **options))
    result, again = attempt(lambda: convert(array, **options))
    assert str(refusal) == str(again)
    if refusal is not None:
        return
    assert looks(result) == looks(full)
    assert np.array_equal(numbers(result), numbers(full))
    if not name.startswith("python"):
        assert tb.shares_memory(array, result) == tb.shares_memory(array, full)
    if tb.shares_memory(result, full):
        assert address(result) == address(full)


@pytest.mark.parametrize("options", [{}, {"copy": True}], ids=["as it is", "copied"])
def test_fast_lane_leaves_a_mask_to_the_full_road(options):
    tb.to_torch(np.ones(3))  # the lanes are open from here on, if they were not
    with pytest.raises(tb.UnsupportedArrayError):
        tb.to_torch(np.ma.array([1.0, 2.0], mask=[0, 1]), **options)


def out_for(array, target, kind):
    """An `out` that fits this array, or only nearly does."""
    info = tb.describe(array)
    dtype, shape = getattr(torch, info.dtype.lstrip(">"), torch.float32), info.shape
    t = torch.zeros(shape[::-1], dtype=dtype).permute(list(reversed(range(len(shape)))))
    if kind == "wider":
        t = torch.zeros(shape, dtype=torch.complex128)
    elif kind == "another shape":
        t = torch.zeros([2, *shape], dtype=dtype)
    elif kind != "transposed":
        t = t.contiguous()
    if kind == "requires grad" and (dtype.is_floating_point or dtype.is_complex):
        t.requires_grad_()
    if kind == "inference":
        with torch.inference_mode():
            t = t.clone()
    if kind == "functional":
        t = torch._to_functional_tensor(t)
    if target == "torch":
        return t
    a = tb.to_numpy(t.detach(), copy="view of a tensor" not in kind)
    a = a[...] if kind.startswith("view of a view") else a
    a.flags.writeable = kind != "read-only"
    return a


OUTS = {
    "numpy": (
        "plain",
        "transposed",
        "wider",
        "another shape",
        "read-only",
        "view of a tensor",
        "view of a view of a tensor",
    ),
    "torch": ("plain", "transposed", "wider", "another shape", "requires grad", "inference", "functional"),
}


@silent
@pytest.mark.parametrize("target", CONVERT)
@pytest.mark.parametrize(
    "name", [name for name in ARRAYS if not any(word in name for word in ("large", "python", "int4", "int2"))]
)
def test_fast_lanes_fill_what_the_full_road_fills(name, target):
    def filled(convert, kind):
        array = ARRAYS[name]()
        out, impossible = attempt(lambda: array if kind == "itself" else out_for(array, target, kind))
        if impossible is not None:
            return None
        result, refusal = attempt(lambda: convert(array, out=out))
        if refusal is not None:
            return str(refusal)
        assert result is out
        tensor = out if target == "torch" else owner_of(out)
        written = tensor._version if isinstance(tensor, torch.Tensor) else 0
        return looks(result), written, numbers(result).tolist(), numbers(array).tolist()

    for kind in (*OUTS[target], "itself"):
        by_lane, by_road = filled(CONVERT[target], kind), filled(unwrap(CONVERT[target]), kind)
        assert repr(by_lane) == repr(by_road), kind


@pytest.mark.parametrize("count", [3, 30_000])
def test_copying_lanes_read_and_write_the_signs_that_a_mark_changes(count):
    negative = torch._neg_view(torch.ones(count))
    assert tb.to_numpy(negative, copy=True).sum() == -count
    assert tb.to_numpy(negative, out=np.zeros(count, "float32")).sum() == -count
    assert tb.to_torch(np.ones(count, "float32"), out=negative).sum() == count


@pytest.mark.parametrize("road", ["lane", "full road"])
def test_a_copying_lane_does_not_fill_what_it_reads(road):
    tb.to_torch(np.ones(3))  # the lanes are open from here on, if they were not
    a = np.arange(4.0)
    t = torch.from_numpy(a)
    for convert, x, out in ((tb.to_numpy, t, a), (tb.to_torch, a, t), (tb.to_torch, a[:3], t[1:])):
        with pytest.raises(ValueError, match="shares memory"):
            (convert if road == "lane" else unwrap(convert))(x, out=out)


@tangents
@pytest.mark.parametrize("road", ["lane", "full road"])
def test_a_copying_lane_does_not_fill_a_tensor_with_a_tangent(road):
    """Its tangent would stay what it was."""
    tb.to_torch(np.ones(3))
    with forward_ad.dual_level():
        out = forward_ad.make_dual(torch.zeros(3), torch.ones(3))
        with pytest.raises(ValueError, match="requires grad"):
            (tb.to_torch if road == "lane" else unwrap(tb.to_torch))(np.ones(3, "float32"), out=out)


def test_copying_lanes_leave_the_source_resizable():
    t = torch.ones(3)
    tb.to_numpy(t, copy=True)
    tb.to_numpy(t, out=np.zeros(3, "float32"))
    assert t.untyped_storage().resizable()


NO_MEMORY_OF_ITS_OWN = {
    "vmap": lambda see: torch.func.vmap(see)(torch.ones(2, 3)),
    "grad": lambda see: torch.func.grad(lambda x: (see(x), x.sum())[1])(torch.ones(3)),
    "jvp": lambda see: torch.func.jvp(see, (torch.ones(3),), (torch.ones(3),)),
    "functionalize": lambda see: torch.func.functionalize(see)(torch.ones(3)),
    "functional by hand": lambda see: see(torch._to_functional_tensor(torch.ones(3))),
    "fake": lambda see: in_fake_mode(see),
}


def in_fake_mode(see):
    with FakeTensorMode():
        see(torch.ones(3))


@tangents
@pytest.mark.parametrize("options", [{"copy": True}, {"out": np.zeros(3, "float32")}], ids=["copied", "into out"])
def test_copying_lanes_refuse_what_has_no_memory_of_its_own(options):
    for see in NO_MEMORY_OF_ITS_OWN.values():
        seen: list[Any] = []

        def refused(x, seen=seen):
            with pytest.raises(tb.UnsupportedArrayError):
                tb.to_numpy(x, **options)
            seen.append(x)
            return x * 1

        see(refused)
        assert seen


@tangents
@pytest.mark.parametrize("where", NO_MEMORY_OF_ITS_OWN)
def test_fast_lane_fills_no_tensor_without_memory_of_its_own(where):
    def see(out):
        for convert in (tb.to_torch, unwrap(tb.to_torch)):
            with pytest.raises((ValueError, tb.UnsupportedArrayError)):
                convert(np.ones(out.shape, "float32"), out=out)
        seen.append(out)
        return out * 1

    seen: list[Any] = []
    NO_MEMORY_OF_ITS_OWN[where](see)
    assert seen


@tangents
@pytest.mark.parametrize("where", NO_MEMORY_OF_ITS_OWN)
@pytest.mark.parametrize("road", [tb.to_numpy, unwrap(tb.to_numpy)], ids=["lane", "full road"])
def test_tensors_without_memory_of_their_own_are_refused_on_either_road(where, road):
    def see(x):
        with pytest.raises(tb.UnsupportedArrayError):
            road(x)
        seen.append(x)
        return x * 1

    seen: list[Any] = []
    NO_MEMORY_OF_ITS_OWN[where](see)
    assert seen


@tangents
@pytest.mark.parametrize("where", ["grad", "jvp"])
def test_tensors_that_outlived_a_derivative_are_plain_again_on_either_road(where):
    leaked: list[Any] = []
    NO_MEMORY_OF_ITS_OWN[where](lambda x: (leaked.append(x), x * 1)[1])
    for road in (tb.to_numpy, unwrap(tb.to_numpy), tb.to_torch):
        assert road(leaked[0]).tolist() == [1, 1, 1]


@tangents
@pytest.mark.parametrize("road", [tb.to_numpy, unwrap(tb.to_numpy)], ids=["lane", "full road"])
def test_forward_mode_numbers_are_guarded_as_a_graph_is(road):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(3), torch.ones(3))
        assert not road(dual).flags.writeable
        assert tb.shares_memory(road(dual), dual)
        with pytest.raises(tb.GraphError):
            road(dual, detach=False)
        assert road(torch.ones(3)).flags.writeable


def test_a_plain_tensor_that_a_transform_closes_over_is_shared():
    outside = torch.ones(3)
    seen: list[Any] = []
    torch.func.vmap(lambda x: (seen.append(tb.to_numpy(outside)), x)[1])(torch.ones(2))
    assert tb.shares_memory(seen[0], outside)


def test_a_trace_sees_what_would_go_by_a_fast_lane():
    with tb.trace() as seen:
        tb.to_numpy(torch.ones(3))
        tb.to_torch(np.ones(3))
    assert [event.target for event in seen.events] == ["numpy float32 on cpu", "torch float64 on cpu"]


def set_shape(a: Any, t: torch.Tensor) -> None:
    a.shape = 4


def set_dtype(a: Any, t: torch.Tensor) -> None:
    a.dtype = "int32"


AFTERWARDS = {
    "array of another shape": set_shape,
    "array of another dtype": set_dtype,
    "tensor turned": lambda a, t: t.t_(),
    "tensor of other memory": lambda a, t: t.set_(torch.zeros(2, 2)),
    "tensor in a graph": lambda a, t: t.requires_grad_(),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", AFTERWARDS)
def test_an_array_or_its_tensor_that_was_changed_in_place_is_taken_as_it_is_now(name):
    """Then the array is all of its tensor no more, as it was when it was made."""
    owner = torch.arange(4.0).view(2, 2)
    a = tb.to_numpy(owner)
    AFTERWARDS[name](a, a.base)
    made = tb.to_torch(a)
    with tb.trace():
        full = tb.to_torch(a)
    assert (made.shape, made.dtype, made.stride()) == (full.shape, full.dtype, full.stride())
    assert made.requires_grad == full.requires_grad == a.base.requires_grad
    assert np.array_equal(made.detach().numpy(), a)
    assert tb.shares_memory(made, owner)


@pytest.mark.parametrize("options", [{"copy": True}, {"dtype": "float32"}, {"detach": True}, {"copy": False}], ids=str)
def test_the_host_named_beside_another_option_hides_none(options):
    a = np.arange(3.0)
    for _ in range(2):
        made = tb.to_torch(a, device="cpu", **options)
        assert tb.describe(made).dtype == options.get("dtype", "float64")
        assert tb.shares_memory(made, a) == (not {"dtype", "copy"} & options.keys() or options.get("copy") is False)


@pytest.mark.parametrize("options", [{"copy": True}, {"out": np.zeros(4, "f4")}], ids=["copied", "filled"])
@pytest.mark.parametrize("step", [1, 2], ids=["dense", "with gaps"])
@pytest.mark.parametrize("offset", [0, 4])
def test_a_tensor_that_has_outgrown_its_storage_is_not_copied(options, offset, step):
    tb.to_numpy(torch.ones(16)[::2], copy=True)  # the lanes are open
    t = torch.ones(16)[offset : offset + 4 * step : step]
    t.untyped_storage().resize_(4 * offset + 12 * step)  # the last element is missing
    for _ in range(3):
        with pytest.raises(tb.UnsupportedArrayError, match="its storage holds"):
            tb.to_numpy(t, **options)


STRETCHED = {
    "a stride beyond NumPy's": lambda: torch.as_strided(
        torch.arange(8.0, dtype=torch.float64), (1, 2, 2), (2**61, 1, 2)
    ),
    "65 axes": lambda: torch.ones([1] * 63 + [2, 2]).transpose(-1, -2),
}


@pytest.mark.parametrize("options", [{"copy": True}, {"copy": True, "dtype": None}], ids=["lane", "full road"])
@pytest.mark.parametrize("name", STRETCHED)
def test_a_tensor_of_which_numpy_has_no_view_is_copied_or_refused_by_name(name, options):
    tb.to_numpy(torch.ones(3)[::2], copy=True)  # the lanes are open
    t = STRETCHED[name]()
    if name == "65 axes":
        with pytest.raises(tb.UnsupportedArrayError, match="at most 64 axes"):
            tb.to_numpy(t, **options)
    else:
        assert tb.to_numpy(t, **options).tolist() == t.tolist()


def test_inside_a_mode_no_lane_copies_a_real_tensor():
    """The full road refuses: a mode answers for torch. (The lanes are open, and the tensors made outside.)"""
    real, strided, a = torch.zeros(3), torch.zeros(6)[::2], np.ones(3, "f4")
    tb.to_torch(a, out=real)
    real.zero_()
    with FakeTensorMode():
        for call in (
            lambda: tb.to_torch(a, out=real),
            lambda: tb.to_numpy(real, copy=True),
            lambda: tb.to_numpy(strided, copy=True),
        ):
            with pytest.raises((ValueError, tb.UnsupportedArrayError), match="inside FakeTensorMode"):
                call()
    assert real.tolist() == [0, 0, 0]
