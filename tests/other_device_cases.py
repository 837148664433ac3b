"""What is true of tensors on a device that only torch knows. Run by `test_other_device.py`, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import threading
import types

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import tensorbridge as tb
from tensorbridge import Traits, _options
from tensorbridge._autograd import _graph
from tensorbridge._cuda import _streams
from tensorbridge._step import Want


def register():
    """The stand-in, known to torch as "other", with two devices."""
    spec = importlib.util.spec_from_file_location("other_device", os.environ["OTHER_DEVICE"])
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    torch.utils.rename_privateuse1_backend("other")
    module = types.ModuleType("torch.other")
    module.is_available = lambda: True
    module.device_count, module.current_device = found.device_count, found.current_device
    torch._register_device_module("other", module)
    return found


DEVICE = register()
VALUES = np.arange(12, dtype="f4").reshape(3, 4)
LARGE = np.arange(2_000_000, dtype="f4")  # beyond what goes through CUDA's ring


@pytest.fixture(autouse=True)
def no_call_of_cuda(monkeypatch):
    """No stream is asked for, no page is locked: torch would raise, or start CUDA. It is not here, even where it is."""

    def refuse(*args, **options):
        raise AssertionError("CUDA was asked")

    for name in ("init", "current_stream", "current_device", "synchronize", "Event", "Stream"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    DEVICE.copies()


def there(values=VALUES, index=0):
    return torch.tensor(values).to(f"other:{index}")


def on_host(t):
    """The values of a tensor, by hand. A copy from there would not see a negative bit, nor one there."""
    t = t.detach()
    return -torch._neg_view(t).cpu().resolve_conj() if t.is_neg() else t.cpu().resolve_conj()


def ops(plan):
    return [step.op for step in plan.steps]


# -- Facts


def test_the_facts_are_those_of_torch():
    t = there()[:, ::2].requires_grad_()
    info = tb.describe(t * 2)
    assert (info.device, info.dtype, info.shape, info.stream) == ("other:0", "float32", (3, 2), None)
    assert (info.device.type, info.device.index, info.device.is_cuda) == ("other", 0, False)
    assert info.requires_grad
    assert info.grad_fn == "MulBackward0"
    assert tb.describe(there()[:, ::2]).order == "strided C"
    assert tb.describe(there(index=1)).device == "other:1"


def test_memory_is_the_same_inside_one_storage_alone():
    """A handle is no address: those of two storages may lie closer than their bytes."""
    a, b = there(LARGE), there(LARGE)
    assert abs(a.data_ptr() - b.data_ptr()) < a.nbytes
    assert tb.describe(a).address == a.data_ptr()
    assert not tb.shares_memory(a, b)
    assert tb.shares_memory(a, a[5:])
    assert not tb.shares_memory(a[:5], a[5:])
    assert not tb.shares_memory(a[::2], a[1::2])
    assert not tb.shares_memory(a, LARGE)
    handle_in_the_middle = a[(b.data_ptr() - a.data_ptr()) // 4 :]
    assert handle_in_the_middle.data_ptr() == b.data_ptr()
    assert not tb.shares_memory(handle_in_the_middle, b)


def test_what_has_no_storage_has_no_address(monkeypatch):
    """As tensors of torch_xla, which are computed when they are asked for."""
    from tensorbridge._adapters import _torch

    def refuse(t):
        raise RuntimeError("Cannot access data pointer of Tensor that doesn't have storage")

    x = there()
    monkeypatch.setattr(_torch, "_has_storage", lambda t: t.is_cpu)
    monkeypatch.setattr(torch.Tensor, "data_ptr", refuse)
    monkeypatch.setattr(torch.Tensor, "untyped_storage", refuse)
    info = tb.describe(x)
    assert (info.device, info.address, info.storage) == ("other:0", 0, 0)
    assert not tb.shares_memory(x, x)
    assert tb.plan(x, "numpy").bytes_moved == x.nbytes


# -- Down


DOWN = {
    "as it is": (lambda: there(), {}, "detach to_host share"),
    "large": (lambda: there(LARGE), {}, "detach to_host share"),
    "with gaps": (lambda: there()[:, ::2], {}, "detach pack to_host share"),
    "turned": (lambda: there().t(), {}, "detach to_host share"),
    "expanded": (lambda: there()[:1].expand(3, 4), {}, "detach pack to_host share"),
    "in a graph": (lambda: there().requires_grad_() * 2, {}, "detach to_host share"),
    "conjugate": (lambda: there(VALUES + 1j).conj(), {}, "detach resolve to_host share"),
    "negative": (lambda: there(VALUES + 1j).conj().imag, {}, "detach resolve to_host share"),
    "bfloat16": (lambda: there().bfloat16(), {}, "detach to_host share"),
    "float8": (lambda: torch.tensor(VALUES).to(torch.float8_e4m3fn).to("other"), {}, "detach to_host share"),
    "empty": (lambda: there(VALUES[:0]), {}, "detach to_host share"),
    "narrowed": (lambda: there(), {"dtype": "float16"}, "detach cast to_host share"),
    "to what few have": (lambda: there(), {"dtype": "float8_e4m3fn"}, "detach to_host share cast"),
    "widened": (lambda: there(), {"dtype": "float64"}, "detach to_host share cast"),
    "as wide": (lambda: there(VALUES.astype("i8")), {"dtype": "float64"}, "detach to_host share cast"),
    "by torch's cast": (lambda: there(VALUES + 0j).to(torch.complex32), {"dtype": "complex128"}, None),
    "copied": (lambda: there(), {"copy": True}, "detach to_host share"),
    "read-only": (lambda: there(), {"writable": False}, "detach to_host share protect"),
    "a list": (lambda: [there(), there()], {}, "stack detach to_host share"),
}


@pytest.mark.parametrize("name", DOWN)
def test_down_to_numpy(name):
    make, options, expected = DOWN[name]
    x = make()
    plan = tb.plan(x, "numpy", **options)
    assert expected is None or ops(plan) == expected.split()
    result = tb.to_numpy(x, **options)
    by_hand = on_host(torch.stack(x) if isinstance(x, list) else x)
    assert result.dtype.name == options.get("dtype", str(by_hand.dtype).removeprefix("torch."))
    assert result.shape == tuple(by_hand.shape)
    wide = torch.complex128 if by_hand.is_complex() else torch.float64
    assert np.array_equal(result.astype("c16" if by_hand.is_complex() else "f8"), by_hand.to(wide).numpy())
    assert result.flags.writeable == (options.get("writable") is not False)
    assert plan.blocking == bool(x if isinstance(x, list) else x.numel())
    assert plan.target.device == "cpu"


@pytest.mark.parametrize("dtype", ["float64", "float8_e4m3fn"])
def test_a_reason_says_that_fewer_bytes_cross_where_they_do(dtype):
    why = {step.op: step.why for step in tb.plan(there(), "numpy", dtype=dtype).steps}["cast"]
    assert ("fewer bytes cross" in why) == (dtype == "float64")


def test_the_bytes_cross_once_and_are_waited_for():
    x = there()
    DEVICE.copies()
    tb.to_numpy(x)
    assert DEVICE.copies() == ["d2h"]
    tb.to_torch(VALUES, device="other")
    assert DEVICE.copies() == ["h2d"]
    assert tb.plan(x, "numpy").bytes_moved == x.nbytes


def test_the_result_is_ordinary_memory_of_its_own():
    x = there()
    a = tb.to_numpy(x)
    x.zero_()
    assert np.array_equal(a, VALUES)


def test_into_the_caller_s_array():
    for dtype in ("f4", "f8", "i2"):
        out = np.empty((3, 4), dtype)
        assert tb.to_numpy(there(), out=out) is out
        assert np.array_equal(out, VALUES)
        out = torch.empty((4, 3), dtype=torch.from_numpy(out).dtype).t()
        assert tb.to_torch(there(), out=out) is out
        assert np.array_equal(out.numpy(), VALUES)


def test_into_gaps_of_the_same_strides():
    """Apple's GPU, up to torch 2.13, copies one block there and writes between the elements (pytorch#189961)."""
    for dtype in ("f4", "f8"):
        parent = np.full(20, -1, dtype)
        x = there(LARGE[:20])[::2]
        tb.to_numpy(x, out=parent[::2])
        assert np.array_equal(parent[::2], LARGE[:20:2])
        assert set(parent[1::2]) == {-1}
        columns = torch.full((3, 4), -1.0, dtype=torch.from_numpy(parent).dtype)
        tb.to_torch(there()[:, 2], out=columns[:, 2])
        assert np.array_equal(columns[:, 2], VALUES[:, 2])
        assert set(columns[:, [0, 1, 3]].ravel().tolist()) == {-1.0}


NEGATIVE = {
    "to NumPy": lambda x: tb.to_numpy(x),
    "to the host": lambda x: tb.to_torch(x, device="cpu"),
    "to the other": lambda x: tb.to_torch(x, device="other:1"),
    "copied": lambda x: tb.to_torch(x, copy=True),
    "cast": lambda x: tb.to_torch(x, dtype="float16"),
    "cast, to NumPy": lambda x: tb.to_numpy(x, dtype="float64"),
    "into an array": lambda x: tb.to_numpy(x, out=np.empty(x.shape, "f4")),
    "into a tensor": lambda x: tb.to_torch(x, out=torch.empty(x.shape)),
    "into one there": lambda x: tb.to_torch(x, out=torch.empty(x.shape, device="other")),
    "in a tree": lambda x: tb.tree.to_numpy([x])[0],
    "in a list": lambda x: tb.to_numpy([x, x])[1],
    "in a list, to the host": lambda x: tb.to_torch([x], device="cpu")[0],
    "collated": lambda x: tb.collate([{"x": x}, {"x": x}])["x"][1],
}


@pytest.mark.parametrize("way", NEGATIVE)
@pytest.mark.parametrize("kind", ["negative", "conjugate too", "strided"])
def test_a_negative_bit_is_not_lost(way, kind):
    """Apple's copies do not see it (pytorch#184403), nor do those of the stand-in."""
    x = there(VALUES + 1j).conj().imag
    expected = -np.ones_like(VALUES)
    if kind == "strided":
        x, expected = x[:, 1::2], expected[:, 1::2]
    elif kind == "conjugate too":
        if way in ("cast", "cast, to NumPy", "into an array", "into a tensor", "into one there"):
            return  # to another dtype: a complex one
        x, expected = torch._neg_view(there(VALUES + 2j)).conj(), -(VALUES - 2j).astype("c8")
    assert x.is_neg()
    made = NEGATIVE[way](x)
    assert np.array_equal(made if isinstance(made, np.ndarray) else on_host(made).numpy(), expected)


@pytest.mark.parametrize("source", ["f4", "f8", "i8", "bool"])
@pytest.mark.parametrize("place", ["host", "there", "array"])
def test_a_negative_view_is_filled_with_the_values(source, place):
    whole = there(VALUES + 1j)
    out = whole.conj().imag
    assert out.is_neg()
    values = (VALUES % 3).astype(source)
    x = {"host": torch.tensor(values), "there": torch.tensor(values).to("other"), "array": values}[place]
    assert tb.to_torch(x, out=out) is out
    assert np.array_equal(on_host(out), values)
    assert np.array_equal(on_host(whole), VALUES - 1j * values.astype("f4"))  # imag of the conjugate


# -- Up, and there


UP = {
    "numpy": (lambda: VALUES, {}, "share to_device"),
    "large": (lambda: LARGE, {}, "share to_device"),
    "reversed": (lambda: VALUES[::-1], {}, "pack share to_device"),
    "read-only": (lambda: np.broadcast_to(VALUES[0], (2, 4)), {}, "share pack to_device"),
    "big-endian": (lambda: VALUES.astype(">f4"), {}, "byteswap share to_device"),
    "torch": (lambda: torch.tensor(VALUES), {}, "share to_device"),
    "list": (lambda: [[1.0, 2.0]], {}, "stack share to_device"),
    "number": (lambda: 3.5, {}, "wrap share to_device"),
    "narrowed": (lambda: VALUES.astype("f8"), {"dtype": "float32"}, "cast share to_device"),
    "narrowed by torch": (lambda: VALUES, {"dtype": "float16"}, "share cast to_device"),
    "widened": (lambda: VALUES.astype("u1"), {"dtype": "float32"}, "share to_device cast"),
    "from there": (lambda: there(index=1), {}, "share to_device"),
}


@pytest.mark.parametrize("name", UP)
@pytest.mark.parametrize("device", ["other", "other:0", torch.device("other"), torch.device("other", 0)], ids=str)
def test_up_to_the_device(name, device):
    make, options, expected = UP[name]
    x = make()
    if name == "from there" and str(device) == "other":
        assert tb.shares_memory(tb.to_torch(x, device=device), x)  # on a device of that kind already
        assert tb.plan(x, "torch", device=device).target.device == "other:1"
        return
    plan = tb.plan(x, "torch", device=device, **options)
    assert ops(plan) == expected.split()
    t = tb.to_torch(x, device=device, **options)
    assert t.device == torch.device("other:0")
    assert tb.describe(t).dtype == options.get("dtype", tb.describe(x).dtype.lstrip(">"))
    assert np.array_equal(t.cpu().numpy(), x.cpu().numpy() if isinstance(x, torch.Tensor) else x)


def test_to_another_device_of_its_kind():
    x = there()
    t = tb.to_torch(x, device="other:1")
    assert t.device == torch.device("other:1")
    assert tb.plan(x, "torch", device="other:1").steps[-1].kind == "d2d"
    assert np.array_equal(t.cpu().numpy(), VALUES)


def test_it_stays_where_it_is_without_a_byte():
    x = there().requires_grad_() * 2
    for options in ({}, {"device": "other"}, {"device": "other:0"}, {"copy": False}):
        plan = tb.plan(x, "torch", **options)
        assert plan.zero_copy
        t = tb.to_torch(x, **options)
        assert tb.shares_memory(t, x)
        assert t.grad_fn is x.grad_fn
    assert not tb.to_torch(x, detach=True).requires_grad


def test_a_copy_and_a_cast_are_made_there():
    x = there()
    t = tb.to_torch(x, copy=True)
    assert [step.kind for step in tb.plan(x, "torch", copy=True).steps] == ["d2d", ""]
    assert t.device == x.device
    assert not tb.shares_memory(t, x)
    assert tb.to_torch(x, dtype="float16").dtype == torch.float16
    assert tb.to_torch(x, dtype="float16").device == x.device


def test_back_to_the_host_as_a_tensor():
    x = (there(VALUES + 1j).requires_grad_() * 1).conj()
    t = tb.to_torch(x, device="cpu")
    assert t.is_cpu
    assert t.requires_grad
    assert not t.is_conj()
    assert np.array_equal(t.detach().numpy(), VALUES - 1j)
    negative = there(VALUES + 1j).conj().imag
    assert negative.is_neg()
    assert not tb.to_torch(negative, device="cpu").is_neg()
    assert np.array_equal(tb.to_torch(negative, device="cpu").numpy(), -np.ones_like(VALUES))


def test_a_graph_goes_on_over_the_bus():
    w = torch.ones(3, requires_grad=True)
    tb.to_torch(tb.to_torch(w, device="other") * 3, device="cpu").sum().backward()
    assert w.grad.tolist() == [3.0, 3.0, 3.0]


def test_into_the_caller_s_tensor_there():
    for source in (VALUES, VALUES.astype("f8"), torch.tensor(VALUES).t().contiguous().t(), there(), there(index=1)):
        out = torch.zeros((3, 4), device="other:0")
        assert tb.to_torch(source, out=out) is out
        assert np.array_equal(out.cpu().numpy(), VALUES)
    assert out._version


# -- What is refused, and how


def test_what_may_not_be_copied_is_refused_with_the_bytes():
    with pytest.raises(tb.CopyRequiredError) as raised:
        tb.to_numpy(there(), copy=False)
    assert str(raised.value) == (
        "to_numpy(copy=False): torch float32 (3, 4) on other:0 cannot be shared.\n"
        "  detach    0 B   an alias is shared, so that set_ and .data of the tensor cannot free the memory\n"
        "  to_host  48 B   other:0 to the host\n"
        "  share     0 B   Tensor.numpy of an alias: the same memory\n"
        "Allow the copy with copy=None, or stay on the device with to_torch."
    )
    with pytest.raises(tb.CopyRequiredError, match="leave device= out"):
        tb.to_torch(there(), device="cpu", copy=False)
    with pytest.raises(tb.CopyRequiredError, match="keep it on cpu"):
        tb.to_torch(VALUES, device="other", copy=False)


REFUSED = {
    "no such index": (
        tb.DeviceError,
        lambda: tb.to_torch(VALUES, device="other:2"),
        "to_torch(device='other:2'): other:2 does not exist: torch sees 2 other devices here.\n"
        "Give a lower index; plan() shows the steps without a device.",
    ),
    "no such backend": (
        tb.DeviceError,
        lambda: tb.to_torch(VALUES, device="hpu"),
        "to_torch(device='hpu'): hpu:0 does not exist: torch sees no usable hpu device here.\n"
        "Import the package that adds it to torch; plan() shows the steps without a device.",
    ),
    "non_blocking up": (
        ValueError,
        lambda: tb.to_torch(VALUES, device="other", non_blocking=True),
        "to_torch(device='other:0', non_blocking=True): numpy float32 (3, 4) on cpu cannot be converted: "
        "non_blocking=True is CUDA's: on other devices nobody tells when the source has been read.\nLeave it out.",
    ),
    "non_blocking down": (
        ValueError,
        lambda: tb.to_torch(there(), device="cpu", non_blocking=True),
        "to_torch(device='cpu', non_blocking=True): torch float32 (3, 4) on other:0 cannot be converted: "
        "non_blocking=True off the device hands out memory that is not filled yet.\n"
        "Leave it out, or use to_numpy_async, which cannot be read too early.",
    ),
    "pinned up": (
        ValueError,
        lambda: tb.to_torch(VALUES, device="other", pin_memory=True),
        "to_torch(pin_memory=True, device='other'): pinned memory is host memory; leave pin_memory out",
    ),
    "pinned there": (
        tb.DeviceError,
        lambda: tb.to_torch(there(), pin_memory=True),
        "to_torch(pin_memory=True): pinned memory needs a CUDA device, and torch sees none here.\nLeave it out.",
    ),
    "for CuPy": (
        ValueError,
        lambda: tb.plan(VALUES, "cupy", device="other"),
        'device=\'other\': choose "cpu", "cuda", "cuda:0" ... or a CUDA index from 0',
    ),
    "a dtype of no tensor": (
        tb.UnsupportedArrayError,
        lambda: tb.to_torch(np.zeros(2, "longdouble"), device="other"),
        "to_torch(device='other:0'): numpy longdouble (2,) on cpu cannot be converted: torch has no longdouble.\n"
        'Use dtype="float64": a copy of 16 B.',
    ),
    "CUDA, which is not here": (
        tb.DeviceError,
        lambda: tb.to_torch(there(), device="cuda"),
        "to_torch(device='cuda'): cuda:0 does not exist: torch sees no usable CUDA device here.\n"
        "Check CUDA_VISIBLE_DEVICES and the driver; plan() shows the steps without a device.",
    ),
    "an out that is the source": (
        ValueError,
        lambda: (lambda x: tb.to_torch(x, out=x))(there()),
        "to_torch(out=...): out shares memory with the source",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_why_and_what_works(name):
    error, call, text = REFUSED[name]
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    assert str(raised.value) == text


def test_a_dtype_that_the_device_lacks_is_refused_before_anything_moves(monkeypatch):
    """As on Apple's GPU, which is not here."""
    from tensorbridge import _convert, _refuse

    monkeypatch.setitem(_refuse._LACKING, "other", _refuse._LACKING["mps"])
    _convert._recipes.clear()
    try:
        with pytest.raises(tb.UnsupportedArrayError) as raised:
            tb.to_torch(np.zeros(3), device="other")
        assert DEVICE.copies() == []
        assert str(raised.value) == (
            "to_torch(device='other:0'): numpy float64 (3,) on cpu cannot be converted: "
            "other devices have no float64.\n"
            'Use dtype="float32": a copy of 12 B.'
        )
        assert tb.to_torch(np.zeros(3), device="other", dtype="float32").dtype == torch.float32
        assert tb.to_numpy(there(), dtype="float64").dtype == np.float64
    finally:
        _convert._recipes.clear()


def test_streams_are_no_matter_here(monkeypatch):
    """Nor is whether a CUDA graph is being captured, or who would move CUDA's memory."""

    def refuse(*args):
        raise AssertionError("streams were asked")

    for name in ("usable", "capturing", "same", "mover", "current"):
        monkeypatch.setattr(_streams, name, refuse)
    assert np.array_equal(tb.to_numpy(tb.to_torch(VALUES, device="other")), VALUES)
    assert np.array_equal(tb.to_numpy(tb.to_torch(there(), dtype="float64", copy=True)), VALUES)


def test_cuda_is_reached_by_the_host():
    assert _options.placed(Want("cupy"), Traits("torch", tb.Device("other:1")), planning=True).device == "cuda:0"
    assert ops(tb.plan(there(), "torch", device="cuda:0")) == ["to_host", "share", "to_device"]
    assert ops(tb.plan(there(), "cupy")) == ["detach", "to_host", "share", "to_device"]


# -- What is built on it


def test_guards_and_traces_see_what_crosses():
    with tb.trace() as trace, tb.copy_guard("error", kinds=("h2d",)):
        tb.to_numpy(there())
    assert [event.kind for event in trace.events] == ["d2h"]
    with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError, match="to_host"):
        tb.to_numpy(there())


def test_trees_cross_leaf_by_leaf_and_keep_the_same_memory_one():
    shared = there()
    tree = {"a": shared, "b": [there(VALUES[0]), shared], "c": "text", "d": VALUES}
    plan = tb.tree.plan(tree, "numpy")
    assert not any(step.op == "pack" for leaf in plan.leaves for step in leaf.plan.steps)
    result = tb.tree.to_numpy(tree)
    assert result["a"] is result["b"][1]
    assert np.array_equal(result["b"][0], VALUES[0])
    back = tb.tree.to_torch(result, device="other")
    assert {back["a"].device.type, back["d"].device.type} == {"other"}
    assert back["a"] is back["b"][1]
    assert np.array_equal(back["d"].cpu().numpy(), VALUES)
    many = tb.tree.to_torch([VALUES.copy() for _ in range(50)], device="other")
    assert len({t.untyped_storage().data_ptr() for t in many}) == 50
    assert all(np.array_equal(a, VALUES) for a in tb.tree.to_numpy(many))


def test_trees_fill_trees_there():
    """Handles of two storages lie closer than their bytes: they are not the same array given twice."""
    source = {"a": VALUES, "b": [LARGE, VALUES + 1]}
    for _ in range(2):
        out = {"a": torch.zeros(3, 4).to("other"), "b": [torch.zeros(LARGE.size).to("other"), there()]}
        assert tb.tree.to_torch(source, out=out)["b"] is out["b"]
        assert np.array_equal(out["a"].cpu(), VALUES)
        assert np.array_equal(out["b"][0].cpu(), LARGE)
        back = {"a": np.empty_like(VALUES), "b": [np.empty_like(LARGE), np.empty((3, 4), "f8")]}
        assert tb.tree.to_numpy(out, out=back)["a"] is back["a"]
        assert np.array_equal(back["b"][1], VALUES + 1)
        assert np.array_equal(back["b"][0], LARGE)
    with pytest.raises(ValueError, match="out"):
        tb.tree.to_torch([VALUES, VALUES + 1], out=[out["a"], out["a"]])


def test_leaves_of_two_storages_are_not_taken_for_one():
    a, b = there(LARGE), there(VALUES)
    view = a[(b.data_ptr() - a.data_ptr()) // 4 :][:12].view(3, 4)
    assert view.data_ptr() == b.data_ptr()
    result = tb.tree.to_numpy([view, b])
    assert np.array_equal(result[0], view.cpu().numpy())
    assert np.array_equal(result[1], VALUES)
    assert not _graph._overlap(_graph._memory(view), _graph._memory(b))
    assert _graph._overlap(_graph._memory(view), _graph._memory(a))
    with tb.editing(view) as first, tb.editing(b) as second:
        first[:] = -1
        second[:] = -2
    assert set(view.cpu().ravel().tolist()) == {-1.0}
    assert set(b.cpu().ravel().tolist()) == {-2.0}


def test_a_guard_and_a_trace_see_what_editing_moves():
    x = there()
    with tb.trace() as trace, tb.editing(x) as a:
        a[0] = 0
    assert [(event.kind, event.nbytes) for event in trace.events] == [("d2h", 48), ("h2d", 48)]
    said = r"editing: torch float32 \(3, 4\) on other:0 would move 48 B"
    with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError, match=said), tb.editing(x):
        pass
    block = tb.editing(x)
    block.__enter__()[0] = 5
    said = r"editing: torch float32 \(3, 4\) on cpu would move 48 B"
    with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError, match=said):
        block.__exit__(None, None, None)
    assert on_host(x)[0].tolist() == [0, 0, 0, 0]


def test_editing_writes_back():
    x = there().requires_grad_()
    y = (x**2).sum()
    with tb.editing(x) as a:
        a[0] = 7.0
    assert x[0].tolist() == [7.0] * 4
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_an_asynchronous_transfer_is_done_at_once():
    transfer = tb.to_numpy_async({"x": there()})
    assert transfer.done()
    assert np.array_equal(transfer.result()["x"], VALUES)


@pytest.mark.parametrize("to", ["torch", "numpy"])
def test_batches_are_read_ahead(to):
    data = TensorDataset(torch.arange(12.0).reshape(6, 2))
    seen = []

    def transform(batch):
        seen.append(threading.current_thread())
        return batch[0] if to == "torch" else batch[0].to("other")

    options = {"device": "other:1"} if to == "torch" else {}
    with tb.prefetch(DataLoader(data, batch_size=2), to=to, transform=transform, **options) as batches:
        found = list(batches)
    assert threading.main_thread() not in seen
    if to == "torch":
        assert {str(batch.device) for batch in found} == {"other:1"}
        found = [batch.cpu() for batch in found]
    assert np.array_equal(np.concatenate(found), np.arange(12.0).reshape(6, 2))


def test_only_the_thread_that_asks_gives_the_device_work(monkeypatch):
    """Two threads at once may end the process on Apple's GPU (pytorch#197805)."""
    seen, move = [], torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda t, *to, **how: (seen.append(threading.get_ident()), move(t, *to, **how))[1]
    )
    batches = [{"x": VALUES + i, "y": torch.tensor([i]), "n": i} for i in range(3)]
    for i, batch in enumerate(tb.prefetch(batches, device="other")):
        assert batch["x"].device == batch["y"].device == torch.device("other:0")
        assert np.array_equal(batch["x"].cpu(), VALUES + i)
        assert batch["n"] == i
    assert len(seen) >= 6
    assert set(seen) == {threading.get_ident()}


@pytest.mark.parametrize("copy", [None, True])
@pytest.mark.parametrize("beside", ["nothing", "a tensor there"])
def test_a_source_may_fill_its_buffer_again(beside, copy):
    x = there()

    def source():
        buffer = np.empty(3, "f4")
        for i in range(4):
            buffer.fill(i)
            yield {"y": buffer, "twin": buffer, **({"x": x} if beside != "nothing" else {})}

    for i, batch in enumerate(tb.prefetch(source(), device="other", depth=3, copy=copy)):
        assert batch["y"].tolist() == [i] * 3
        assert batch["y"] is batch["twin"]
        assert ("x" in batch) == (beside != "nothing")
        assert "x" not in batch or tb.shares_memory(batch["x"], x) == (copy is None)


def test_a_copy_of_what_lies_there_is_made_by_the_thread_that_asks():
    x, y, read = there(), there(), threading.Event()

    def source():
        yield x
        yield y
        read.set()

    DEVICE.copies()
    ready = tb.prefetch(source(), device="other", copy=True, depth=3)
    assert read.wait(30)
    assert DEVICE.copies() == []
    assert not tb.shares_memory(next(ready), x)
    assert DEVICE.copies() == ["d2d"]


@pytest.mark.parametrize("dtype", ["float16", "float64", {"float32": "float64", "float64": "float32"}], ids=str)
def test_casts_are_made_by_the_thread_that_asks(monkeypatch, dtype):
    """And once: a mapping may lead in a circle."""
    x, read, seen, move = there(), threading.Event(), [], torch.Tensor.to

    def source():
        yield {"there": x, "here": VALUES, "wide": VALUES.astype("f8"), "n": np.arange(3)}
        read.set()

    ready = tb.prefetch(source(), device="other", dtype=dtype)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda t, *to, **how: (seen.append(threading.get_ident()), move(t, *to, **how))[1]
    )
    assert read.wait(30)
    batch = next(ready)
    assert set(seen) == {threading.get_ident()}
    wanted = dtype if isinstance(dtype, str) else dtype["float32"]
    assert batch["there"].dtype == batch["here"].dtype == getattr(torch, wanted)
    assert batch["wide"].dtype == (getattr(torch, dtype) if isinstance(dtype, str) else torch.float32)
    assert batch["n"].dtype == (getattr(torch, dtype) if isinstance(dtype, str) else torch.int64)
    for name in ("there", "here", "wide"):
        assert np.array_equal(batch[name].cpu().float(), VALUES)


def test_guard_and_grad_mode_are_those_of_the_call():
    w = there().requires_grad_()
    with tb.copy_guard("error", kinds=("h2d",)):
        ready = tb.prefetch([VALUES], device="other")
    with pytest.raises(tb.CopyRequiredError):
        next(ready)
    ready = tb.prefetch([{"x": VALUES}], device="other")
    with tb.copy_guard("error"), tb.trace() as seen:
        next(ready)
    assert [(event.kind, event.nbytes) for event in seen.events if event.nbytes] == [("h2d", VALUES.nbytes)]
    with torch.no_grad():
        ready = tb.prefetch([w], device="other:1")
    assert next(ready).grad_fn is None
    ready = tb.prefetch([w], device="other:1")
    with torch.no_grad():
        assert next(ready).grad_fn is not None


def test_an_interrupt_while_a_batch_is_moved_ends_the_iteration(monkeypatch):
    ready = tb.prefetch([VALUES] * 4, device="other")
    next(ready)

    def interrupted(*args, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "to", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(ready)
    monkeypatch.undo()
    assert list(ready) == []


def test_what_lies_there_already_stays_and_what_may_not_move_is_refused():
    x = there()
    (same,) = tb.prefetch([x], device="other")
    assert tb.shares_memory(same, x)
    ready = tb.prefetch([VALUES, VALUES], device="other", copy=False)
    with pytest.raises(tb.CopyRequiredError, match=r"to_torch\(device='other:0', copy=False\)"):
        next(ready)
    assert list(ready) == []


def test_a_batch_that_is_missing_its_device_is_refused_at_the_call():
    with pytest.raises(tb.DeviceError, match="other:7 does not exist: torch sees 2 other devices"):
        tb.prefetch([VALUES], device="other:7")


def test_tensors_of_several_dtypes_are_brought_to_one_first():
    """Of other devices than CUDA it is not known which casts they do as a row is filled."""
    x = [there(), there(VALUES.astype("i4"))]
    with pytest.raises(
        tb.UnsupportedArrayError, match=r"first: to_torch\(\[to_torch\(part, dtype=\"float32\"\) for part"
    ):
        tb.to_torch(x, dtype="float32")
    assert torch.equal(
        tb.to_torch([tb.to_torch(part, dtype="float32") for part in x]).cpu(), torch.tensor([VALUES] * 2)
    )


def test_samples_are_stacked_where_they_are():
    batch = tb.collate([{"x": there(), "y": 1}, {"x": there(), "y": 2}])
    assert batch["x"].device.type == "other"
    assert batch["x"].shape == (2, 3, 4)
    assert batch["y"].tolist() == [1, 2]


def test_a_backend_without_a_module_is_known_by_its_tensors(monkeypatch):
    """torch_xla registers none; who registers it by hand gives one that has neither question."""
    x = there()
    for module in (None, types.ModuleType("torch.other")):
        monkeypatch.setattr(torch, "other", module)
        assert tb.to_torch(x, device=x.device) is x
        assert tb.to_torch(VALUES, device="other").device == x.device
        assert tb.plan(VALUES, "torch", device="other:1").target.device == "other:1"


def test_a_device_that_has_not_started_is_not_started_to_plan(monkeypatch):
    """As XPU's, whose current device cannot be asked in a forked child."""

    def refuse():
        raise RuntimeError("Cannot re-initialize XPU in forked subprocess.")

    monkeypatch.setattr(torch.other, "current_device", refuse)
    monkeypatch.setattr(torch.other, "is_initialized", lambda: False, raising=False)
    assert tb.plan(VALUES, "torch", device="other").target.device == "other:0"


def test_a_process_that_was_forked_after_its_use_is_refused(monkeypatch):
    monkeypatch.setattr(torch.other, "_is_in_bad_fork", lambda: True, raising=False)
    with pytest.raises(tb.DeviceError) as refused:
        tb.to_torch(VALUES, device="other")
    assert str(refused.value) == (
        "to_torch(device='other'): other cannot be used in a forked process.\n"
        "Start workers with the spawn method, or convert in the main process (tensorbridge.prefetch does)."
    )


def test_the_current_device_is_as_it_was():
    DEVICE.set_device(1)
    try:
        assert tb.to_torch(VALUES, device="other").device == torch.device("other:1")
        tb.to_torch(VALUES, device="other:0")
        tb.to_numpy(there())
        assert DEVICE.current_device() == 1
    finally:
        DEVICE.set_device(0)


def test_a_fork_after_cuda_is_no_matter_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    assert np.array_equal(tb.to_numpy(tb.to_torch(VALUES, device="other")), VALUES)


def test_whether_memory_is_page_locked_is_not_asked(monkeypatch):
    def refuse(t):
        raise AssertionError("the driver was asked")

    monkeypatch.setattr(torch.Tensor, "is_pinned", refuse)
    tb.to_torch(torch.tensor(VALUES), device="other")
    tb.to_torch(there(), out=torch.empty(3, 4))
    tb.to_torch(torch.tensor(VALUES), out=there())
    assert tb.describe(tb.to_torch(there(), device="cpu")).pinned is None


def test_a_parameter_and_a_subclass_come_as_on_the_host():
    class Own(torch.Tensor):
        pass

    assert np.array_equal(tb.to_numpy(torch.nn.Parameter(there())), VALUES)
    assert np.array_equal(tb.to_numpy(there().as_subclass(Own)), VALUES)
    assert type(tb.to_torch(there().as_subclass(Own))) is Own


def test_the_host_is_served_as_before():
    """Where a backend is registered, the lanes of the host go on."""
    t = torch.tensor(VALUES)
    assert tb.shares_memory(tb.to_numpy(t), t)
    assert tb.shares_memory(tb.to_torch(VALUES), VALUES)
