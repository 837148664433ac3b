"""Tensors that claim more than their memory holds, or more than an array can be: refused before a byte is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import tensorbridge as tb


def outgrown():
    """`resize_` has set the shape before it finds that the storage, which NumPy sees too, cannot grow."""
    t = torch.from_numpy(np.ones(4, "f4"))
    with pytest.raises(RuntimeError, match="not resizable"):
        t.resize_(64)
    return t


def freed():
    t = torch.ones(8)
    t.untyped_storage().resize_(0)  # as FSDP does between steps
    return t


def shrunk():
    t = torch.ones(64)
    view = t[2::3]
    t.untyped_storage().resize_(16)
    return view


SHORT = "(a resize_ that failed leaves it so, or a storage that was freed)"
OWN_STORAGE = "Convert what is there, torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()), or have it filled again."

# name: how to make it, what it is called, why not, what works
REFUSED = {
    "outgrown storage": (
        outgrown,
        "torch float32 (64,)",
        f"it needs 256 B and its storage holds 16 B {SHORT}",
        OWN_STORAGE,
    ),
    "view beyond its storage": (
        shrunk,
        "torch float32 (21,)",
        f"it needs 252 B and its storage holds 16 B {SHORT}",
        OWN_STORAGE,
    ),
    "freed storage": (
        freed,
        "torch float32 (8,)",
        f"it needs 32 B and its storage holds 0 B {SHORT}",
        OWN_STORAGE,
    ),
    "uninitialized": (
        torch.nn.parameter.UninitializedParameter,
        "UninitializedParameter float32",
        "a lazy module has not given it a shape yet",
        "Run a forward pass of its module first.",
    ),
}
CALLS = {
    "to_numpy": lambda x: tb.to_numpy(x, copy=None),
    "to_torch": tb.to_torch,
    "describe": tb.describe,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", REFUSED)
def test_refusal_says_what_it_is_why_not_and_what_works(name, call):
    make, what, why, cure = REFUSED[name]
    with pytest.raises(tb.UnsupportedArrayError) as raised:
        CALLS[call](make())
    assert str(raised.value) == f"{call}: {what} cannot be converted: {why}.\n{cure}"


@pytest.mark.parametrize("name", ["outgrown storage", "freed storage"])
def test_what_is_left_in_the_storage_can_be_had_as_the_message_says(name):
    x = REFUSED[name][0]()
    left = tb.to_numpy(eval(OWN_STORAGE.partition("there, ")[2].partition(", or have")[0]))
    assert left.tolist() == [1.0] * (x.untyped_storage().nbytes() // 4)


@pytest.mark.parametrize("name", ["outgrown storage", "view beyond its storage", "freed storage"])
@pytest.mark.parametrize("options", [{"copy": True}, {"dtype": "float64"}, {"writable": False}], ids=str)
def test_no_option_reads_past_the_end_of_a_storage(name, options):
    with pytest.raises(tb.UnsupportedArrayError, match="its storage holds"):
        tb.to_numpy(REFUSED[name][0](), **options)


def test_a_freed_storage_is_refused_without_options_too():
    with pytest.raises(tb.UnsupportedArrayError, match="its storage holds 0 B"):
        tb.to_numpy(freed())


def test_a_part_that_its_storage_still_holds_is_shared():
    t = outgrown()[1:4]
    assert tb.to_numpy(t, copy=False).tolist() == [1, 1, 1]


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_real_tensor_inside_fake_tensor_mode_is_refused(call, allow):
    t = torch.ones(3)
    with FakeTensorMode(allow_non_fake_inputs=allow), pytest.raises(tb.UnsupportedArrayError) as raised:
        CALLS[call](t)
    assert str(raised.value) == (
        f"{call}: torch float32 (3,) cannot be converted: inside FakeTensorMode torch computes shapes and no values.\n"
        "Convert outside FakeTensorMode, torch.export or tracing."
    )


@pytest.mark.parametrize("grad", [False, True])
def test_real_tensor_inside_fake_tensor_mode_is_refused_without_options_too(grad):
    t = torch.ones(3, requires_grad=grad)
    tb.to_numpy(t)  # from now on there is a lane
    with FakeTensorMode(), pytest.raises(tb.UnsupportedArrayError, match="inside FakeTensorMode"):
        tb.to_numpy(t)


def test_other_dispatch_modes_do_not_stand_in_the_way():
    class Passing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Passing():
        assert tb.to_numpy(torch.ones(3), copy=True).tolist() == [1, 1, 1]


BEYOND = {
    "axes": (lambda: torch.ones((1,) * 65), "x.flatten()"),
    "bytes": (lambda: torch.ones(1).expand(2**61), "x[:4]"),
    "list of them": (lambda: [torch.ones((1,) * 65)], "x[0].flatten()"),
}


@pytest.mark.parametrize("what", BEYOND)
def test_what_is_larger_than_a_numpy_array_can_be_is_refused_where_it_leaves_torch(what):
    make, cure = BEYOND[what]
    x = make()
    for target, called in (("numpy", "NumPy"), ("cupy", "CuPy")):
        with pytest.raises(tb.UnsupportedArrayError) as raised:
            tb.plan(x, target)
        assert str(raised.value).endswith(
            f"cannot be converted: a {called} array has at most 64 axes and 2**63 - 1 bytes.\n"
            "Flatten it first, x.flatten(), or convert a part of it."
        )
    with pytest.raises(tb.UnsupportedArrayError, match="at most 64 axes"):
        tb.to_numpy(x)
    assert tb.to_numpy(eval(cure)).ndim == 1
    assert len(tb.describe(x).shape) in (1, 65, 66)


@pytest.mark.parametrize("what", ["axes", "bytes"])
def test_what_is_larger_than_a_numpy_array_can_be_stays_a_tensor(what):
    x = BEYOND[what][0]()
    assert tb.to_torch(x).shape == x.shape


@pytest.mark.parametrize("what", ["axes", "bytes"])
def test_what_is_larger_than_a_numpy_array_can_be_has_memory_that_is_compared(what):
    x = BEYOND[what][0]()
    assert tb.shares_memory(x, x)
    assert tb.shares_memory(x, x.flatten()[:1])
    assert not tb.shares_memory(x, torch.ones(1))


@pytest.mark.parametrize("what", ["axes", "bytes"])
def test_what_is_larger_than_a_numpy_array_can_be_has_a_graph(what):
    x = BEYOND[what][0]().requires_grad_()
    assert len(tb.autograd_graph(x).nodes) == 2
