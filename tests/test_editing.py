"""editing(): NumPy may write into a tensor, and a backward that needed the old values raises instead of lying."""

from __future__ import annotations

import asyncio
import gc
import threading
import time

import ml_dtypes
import numpy as np
import pytest
import torch

import tensorbridge as tb
from tensorbridge._autograd._editing import editing
from tensorbridge._dtypes import DTYPES
from tensorbridge._errors import UnsupportedArrayError

STALE = "modified by an inplace operation"


def graph_that_saved(y):
    """A loss whose backward needs the values of y."""
    return (y**2).sum()


# -------------------------------------------------------------------------------------------- what is written, and when


def test_what_is_written_is_in_the_tensor_at_once_and_nothing_is_copied():
    t = torch.zeros(2, 3)
    with editing(t) as a:
        a[0] = 7
        assert a.ctypes.data == t.data_ptr()
        assert t[0].tolist() == [7, 7, 7]
    assert t[1].tolist() == [0, 0, 0]


def test_a_parameter_is_written_although_it_requires_grad_and_stays_a_leaf():
    w = torch.nn.Parameter(torch.zeros(3))
    with editing(w) as a:
        a[:] = [1, 2, 3]
    assert w.tolist() == [1, 2, 3]
    assert w.is_leaf
    assert w.requires_grad


def test_a_scalar_and_an_empty_tensor_are_edited_too():
    t = torch.tensor(1.0)
    with editing(t) as a:
        a[...] = 3
    assert t.item() == 3
    for empty in (torch.empty(0, 4), torch.empty(1, 0).expand(4, 0)):
        with editing(empty) as a:
            assert a.shape == empty.shape


def test_a_view_with_gaps_is_written_where_it_lies_and_nowhere_else():
    t = torch.zeros(4, 4)
    with editing(t[::2, 1:3].T) as a:
        a[:] = 1
    assert t.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


NARROW = ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]


@pytest.mark.parametrize("name", NARROW)
def test_a_type_that_numpy_lacks_is_edited_as_its_ml_dtypes_partner(name):
    t = torch.ones(4).to(getattr(torch, name))
    with editing(t) as a:
        assert a.dtype == np.dtype(getattr(ml_dtypes, name))
        a[1] = 2
    assert t.float().tolist() == [1, 2, 1, 1]
    with pytest.raises(ValueError, match="read-only"):
        a[1] = 3
    with pytest.raises(ValueError):
        a.setflags(write=True)


@pytest.mark.parametrize(
    "name", ["bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "complex128"]
)
def test_a_type_that_numpy_has_is_edited_as_itself(name):
    t = torch.zeros(3, dtype=getattr(torch, name))
    with editing(t) as a:
        assert a.dtype == np.dtype(name)
        a[2] = 1
    assert t.tolist() == [0, 0, 1]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", [name for name, row in DTYPES.items() if row.torch])
def test_every_type_that_to_numpy_shares_is_edited_and_no_other(name):
    t = (
        torch.zeros(4, dtype=torch.uint8).view(getattr(torch, name))
        if "x2" in name
        else torch.zeros(4).to(getattr(torch, name))
    )
    try:
        dtype = tb.to_numpy(t).dtype
    except UnsupportedArrayError:
        with pytest.raises(UnsupportedArrayError, match=f"numpy has no {name}"):
            editing(t)
    else:
        with editing(t) as a:
            assert a.dtype == dtype
            a.view("uint8")[:] = 1
        assert t.view(torch.uint8).tolist() == [1] * t.nbytes


def test_a_block_can_be_opened_again_and_in_itself():
    t = torch.zeros(2)
    block = editing(t)
    for value in (1, 2):
        with block as a:
            a[0] = value
    with block as a, block as b:
        b[1] = 3
        assert a[1] == 3
    assert t.tolist() == [2, 3]
    with pytest.raises(ValueError, match="read-only"):
        a[0] = 4
    assert repr(block) == "<editing: open it by a with block>"
    with pytest.raises(
        TypeError, match=r"^editing\(tensor\) is no decorator: .*\n.* with tensorbridge\.editing\(tensor\) as"
    ):
        block(print)


def test_a_block_that_is_open_in_two_threads_closes_the_array_of_its_own():
    block, opened = editing(torch.zeros(2)), threading.Event()
    given = []

    def first():
        with block as a:
            given.append(a)
            opened.wait()

    thread = threading.Thread(target=first)
    thread.start()
    while not given:
        time.sleep(0.001)
    with block as b:
        opened.set()
        thread.join()
        assert (given[0].flags.writeable, b.flags.writeable) == (False, True)
    assert not b.flags.writeable


def test_a_subclass_without_own_memory_rules_is_edited_as_a_plain_array():
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise AssertionError(f"{func} was intercepted")

    t = torch.zeros(3).as_subclass(Loud)
    with editing(t) as a:
        a[:] = 1
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.Tensor.tolist(t) == [1, 1, 1]


# ----------------------------------------------------------------------------------------------------- autograd is told


def test_the_seed_question_writing_behind_autograd_gives_a_wrong_gradient_without_an_error():
    """The control: what editing() is for. Were this to raise one day, editing() would no longer be needed."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = x * 2
    z = graph_that_saved(y)
    y.detach().numpy()[:] = 0
    z.backward()
    assert x.grad.tolist() == [0, 0]  # the truth is [8, 16]


def test_backward_after_the_block_raises_where_the_old_values_were_needed():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = x * 2
    z = graph_that_saved(y)
    with editing(y) as a:
        a[:] = 0
    with pytest.raises(RuntimeError, match=STALE):
        z.backward()
    assert x.grad is None


def test_backward_inside_the_block_raises_where_the_old_values_were_needed():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = x * 2
    z = graph_that_saved(y)
    with editing(y) as a:
        a[:] = 0
        with pytest.raises(RuntimeError, match=STALE):
            z.backward()


def test_a_graph_built_inside_the_block_and_run_after_it_raises():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = x * 2
    with editing(y) as a:
        z = graph_that_saved(y)
        a[:] = 0
    with pytest.raises(RuntimeError, match=STALE):
        z.backward()


def test_a_graph_built_inside_the_block_raises_after_an_exception_too():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = x * 2
    with pytest.raises(KeyError), editing(y) as a:
        z = graph_that_saved(y)
        a[:] = 0
        raise KeyError
    with pytest.raises(RuntimeError, match=STALE):
        z.backward()


def test_a_graph_built_after_the_block_sees_the_new_values_and_is_right():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with editing(x) as a:
        a[:] = [3, 4]
    graph_that_saved(x).backward()
    assert x.grad.tolist() == [6, 8]


def test_a_backward_that_did_not_need_the_old_values_still_runs():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = x * 2
    with editing(y) as a:
        a[:] = 0
    y.sum().backward()
    assert x.grad.tolist() == [2, 2]


def test_an_input_that_does_not_require_grad_but_was_saved_is_covered():
    x, w = torch.ones(2, 3), torch.ones(3, 1, requires_grad=True)
    z = (x @ w).sum()
    with editing(x) as a:
        a[:] = 0
    with pytest.raises(RuntimeError, match=STALE):
        z.backward()
    assert w.grad is None  # by hand, w.grad would be 0 without an error


RELATIVES = {
    "a view of it was saved": lambda y: (y, y[1:]),
    "its base was saved": lambda y: (y[1:], y),
    "a detached alias was saved": lambda y: (y, y.detach() * torch.ones(3, requires_grad=True)),
    "another view of the base was saved": lambda y: (y[:2], y[1:]),
}


@pytest.mark.parametrize("relation", RELATIVES)
@pytest.mark.parametrize("moment", ["inside", "after"])
def test_relatives_of_the_tensor_are_covered(relation, moment):
    base = torch.tensor([1.0, 2.0, 3.0], requires_grad=True) * 2
    edited, saved = RELATIVES[relation](base)
    z = graph_that_saved(saved) if relation != "a detached alias was saved" else saved.sum()
    with editing(edited) as a:
        a[:] = 0
        if moment == "inside":
            with pytest.raises(RuntimeError, match=STALE):
                z.backward()
    if moment == "after":
        with pytest.raises(RuntimeError, match=STALE):
            z.backward()


def test_an_alias_made_by_data_has_no_shared_counter_as_the_docstring_says():
    y = torch.tensor([1.0, 2.0], requires_grad=True) * 2
    before = y._version
    with editing(y.data):
        pass
    assert y._version == before
    assert ".data" in editing.__doc__


def test_an_inference_tensor_is_edited_because_autograd_refuses_to_save_it():
    with torch.inference_mode():
        t = torch.zeros(3)
    with editing(t) as a:
        a[:] = 1
    assert t.tolist() == [1, 1, 1]
    with pytest.raises(RuntimeError, match="cannot be saved for backward"):
        t * torch.ones(3, requires_grad=True)


def test_inside_inference_mode_and_no_grad_a_normal_tensor_is_covered_as_well():
    for mode in (torch.inference_mode, torch.no_grad):
        x = torch.tensor([1.0, 2.0], requires_grad=True)
        z = graph_that_saved(x)
        with mode(), editing(x) as a:
            a[:] = 0
        with pytest.raises(RuntimeError, match=STALE):
            z.backward()


# ------------------------------------------------------------------------------------------------------ after the block


def test_after_the_block_the_array_is_read_only_and_cannot_be_made_writable():
    t = torch.zeros(3)
    with editing(t) as a:
        a[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        a[0] = 2
    with pytest.raises(ValueError):
        a.setflags(write=True)
    assert t[0] == 1


def test_after_an_exception_the_array_is_read_only_too():
    t = torch.zeros(3)
    with pytest.raises(KeyError), editing(t) as a:
        raise KeyError
    assert not a.flags.writeable


def test_a_view_made_inside_the_block_stays_writable_as_the_docstring_says():
    t = torch.zeros(3)
    with editing(t) as a:
        view = a[1:]
    view[:] = 5
    assert t.tolist() == [0, 5, 5]
    assert "stay writable" in " ".join(editing.__doc__.split())


def test_the_array_outlives_the_tensor():
    t = torch.arange(1000.0)
    with editing(t) as a:
        del t
        gc.collect()
        a[0] = 5
    assert a[0] == 5
    assert a[999] == 999


def test_nothing_is_kept_once_the_array_is_gone():
    import weakref

    t = torch.zeros(3)
    gone = weakref.ref(t)
    with editing(t):
        pass
    del t
    assert gone() is None


# -------------------------------------------------------------------------------------------------------------- nesting


def test_nested_editing_of_one_tensor_shares_the_memory_and_closes_one_array_at_a_time():
    t = torch.zeros(3)
    with editing(t) as outer:
        outer[0] = 1
        with editing(t) as inner:
            assert inner[0] == 1
            inner[1] = 2
        assert not inner.flags.writeable
        assert outer.flags.writeable
        assert outer[1] == 2
        outer[2] = 3
    assert t.tolist() == [1, 2, 3]
    assert not outer.flags.writeable


def test_one_object_serves_async_tasks_that_overlap():
    """Each closes its own block: the array of another stays writable."""
    t = torch.zeros(2)
    edit = tb.editing(t)

    async def task(before, inside, place):
        await asyncio.sleep(before)
        with edit as array:
            await asyncio.sleep(inside)
            array[place] = 1

    async def both():
        await asyncio.gather(task(0, 0.02, 0), task(0.01, 0.05, 1))

    asyncio.run(both())
    assert t.tolist() == [1, 1]
