"""Errors by their text: what was asked, why it cannot be, how many bytes it would take, what works instead."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from arrays import column, frozen, in_inference_mode, on_disk, spiral, tensor, unaligned

import tensorbridge as tb
from tensorbridge._step import Step, cure_of


class Copier:
    """Offers only `__array__`, and always copies."""

    def __array__(self, dtype=None, copy=None):
        if copy is False:
            raise ValueError("I always copy")
        return np.zeros(3)


class Device:
    """Device memory, read-only or not, of nobody we know."""

    def __init__(self, readonly):
        facts = {"shape": (3,), "typestr": "<f4", "data": (1 << 20, readonly), "version": 3}
        self.__cuda_array_interface__ = facts


def in_graph():
    return torch.ones(3, requires_grad=True) * 2


def six():
    return np.arange(6.0)


NO_COPY = {
    "reversed": (
        lambda: tb.to_torch(np.zeros((1000, 3))[::-1], copy=False),
        """to_torch(copy=False): numpy float64 (1000, 3) on cpu cannot be shared.
  pack   24 000 B   torch has no negative strides
  share       0 B   torch.from_numpy: the same memory
Allow the copy with copy=None, or share x, the argument, as it lies, values in opposite order: to_torch(x[::-1]).""",
    ),
    "cast": (
        lambda: tb.to_torch(six(), copy=False, dtype="float32"),
        """to_torch(dtype='float32', copy=False): numpy float64 (6,) on cpu cannot be shared.
  cast   24 B   dtype=float32 was asked for
  share   0 B   torch.from_numpy: the same memory
Allow the copy with copy=None, or keep float64.""",
    ),
    "read-only": (
        lambda: tb.to_torch(frozen(six()), copy=False),
        """to_torch(copy=False): numpy float64 (6,) on cpu, read-only, cannot be shared.
  copy   48 B   the source is read-only: torch cannot keep that promise
  share   0 B   torch.from_numpy: the same memory
Allow the copy with copy=None, or share_readonly=True if nothing will write to the result.""",
    ),
    "read-only memory map": (
        lambda: tb.to_torch(on_disk("r"), copy=False),
        """to_torch(copy=False): numpy float64 (6,) on cpu, read-only, cannot be shared.
  copy   48 B   the memory map is read-only: torch cannot keep that promise
  share   0 B   torch.from_numpy: the same memory
Allow the copy with copy=None, or open the file with mode="c" (np.load: mmap_mode="c"): writable pages, at no cost.""",
    ),
    "read-only, to be written": (
        lambda: tb.to_numpy(frozen(six()), copy=False, writable=True),
        """to_numpy(copy=False, writable=True): numpy float64 (6,) on cpu, read-only, cannot be shared.
  copy   48 B   writable=True, and the source is read-only
  share   0 B   the same array
Allow the copy with copy=None, or take a read-only view with writable=None.""",
    ),
    "overlap": (
        lambda: tb.to_numpy(tensor(3).expand(2, 3), copy=False, writable=True),
        """to_numpy(copy=False, writable=True): torch float64 (2, 3) on cpu cannot be shared.
  copy   48 B   writable=True, and one write would change many elements of an overlapping array
  share   0 B   Tensor.numpy of an alias: the same memory
Allow the copy with copy=None, or take a read-only view with writable=None.""",
    ),
    "big-endian": (
        lambda: tb.to_torch(six().astype(">f8"), copy=False),
        """to_torch(copy=False): numpy >float64 (6,) on cpu cannot be shared.
  byteswap  48 B   torch has native byte order only
  share      0 B   torch.from_numpy: the same memory
Allow the copy with copy=None, or swap once where the data is read: x.astype(x.dtype.newbyteorder('=')).""",
    ),
    "odd strides": (
        lambda: tb.to_torch(column(), copy=False),
        """to_torch(copy=False): numpy float32 (6,) on cpu cannot be shared.
  pack   24 B   torch strides are whole elements
  share   0 B   torch.from_numpy: the same memory
Allow the copy with copy=None, or keep the column in an array of its own.""",
    ),
    "unaligned": (
        lambda: tb.to_torch(unaligned(), copy=False),
        """to_torch(copy=False): numpy float64 (6,) on cpu cannot be shared.
  pack   48 B   torch's kernels want aligned elements
  share   0 B   torch.from_numpy: the same memory
Allow the copy with copy=None, or start the buffer at a multiple of the item size.""",
    ),
    "conjugate": (
        lambda: tb.to_numpy(spiral(3).conj(), copy=False),
        """to_numpy(copy=False): torch complex128 (3,) on cpu, conj bit set, cannot be shared.
  resolve  48 B   the conjugate is only a mark on the tensor: its bytes say otherwise
  share     0 B   Tensor.numpy of an alias: the same memory
Allow the copy with copy=None.""",
    ),
    "list": (
        lambda: tb.to_numpy([1, 2, 3], copy=False),
        """to_numpy(copy=False): numpy list int64 (3,) on cpu cannot be shared.
  stack  24 B   the list becomes one array, by numpy
  share   0 B   the same array
Allow the copy with copy=None.""",
    ),
    "to a device": (
        lambda: tb.plan(six(), "torch", device="cuda:1", copy=False),
        """to_torch(device='cuda:1', copy=False): numpy float64 (6,) on cpu cannot be shared.
  share       0 B   torch.from_numpy: the same memory
  to_device  48 B   the host to cuda:1
Allow the copy with copy=None, or keep it on cpu.""",
    ),
    "only __array__": (
        lambda: tb.to_numpy(Copier(), copy=False),
        """to_numpy(copy=False): Copier offers only __array__, and does not promise that no byte moves: I always copy.
Allow the copy with copy=None.""",
    ),
}


def assert_raises(error, call, text):
    with pytest.raises(tb.BridgeError if error is None else error) as raised:
        call()
    assert str(raised.value) == text
    assert error is None or type(raised.value) is error


@pytest.mark.parametrize("what", NO_COPY)
def test_copy_that_may_not_be_names_its_steps_its_bytes_and_its_cure(what):
    call, text = NO_COPY[what]
    assert_raises(tb.CopyRequiredError, call, text)


REVERSED = {  # an array, and the words of its cure
    "last axis": (lambda a: a[..., ::-1], "to_torch(x[:, :, ::-1])"),
    "first axis": (lambda a: a[::-1], "to_torch(x[::-1])"),
    "two axes": (lambda a: a[::-1, :, ::-1], "to_torch(x[::-1, :, ::-1])"),
    "transposed": (lambda a: a[::-1].T, "to_torch(x[:, :, ::-1])"),
    "an axis of length 1": (lambda a: a[:, :1][::-1, ::-1], "to_torch(x[::-1])"),
}


@pytest.mark.parametrize("name", REVERSED)
def test_the_cure_for_negative_strides_names_the_axes_that_have_them_and_works(name):
    make, cure = REVERSED[name]
    a = make(np.arange(24.0).reshape(2, 3, 4))
    with pytest.raises(tb.CopyRequiredError) as raised:
        tb.to_torch(a, copy=False)
    assert str(raised.value).endswith(f"or share x, the argument, as it lies, values in opposite order: {cure}.")
    with tb.copy_guard("error"):
        unreversed = eval(cure, {"x": a, "to_torch": tb.to_torch})
    assert tb.shares_memory(unreversed, a)
    axes = [axis for axis, (n, stride) in enumerate(zip(a.shape, a.strides, strict=True)) if n > 1 and stride < 0]
    assert np.array_equal(unreversed.flip(axes), a)
    with pytest.raises(tb.CopyRequiredError, match=re.escape(cure)), tb.copy_guard("error"):
        tb.to_torch(a)


GRAPH = "cannot be converted: a NumPy array cannot carry the autograd graph"
GRAPHS = {
    "node": (
        lambda: tb.to_numpy(in_graph(), detach=False),
        f"""to_numpy(detach=False): torch float32 (3,) on cpu, in a graph (MulBackward0), {GRAPH} (MulBackward0), \
and detach=False keeps it.
Leave detach=False out to get a read-only view of the values, or stay in torch.""",
    ),
    "leaf": (
        lambda: tb.to_numpy(torch.ones(3, requires_grad=True), detach=False),
        f"""to_numpy(detach=False): torch float32 (3,) on cpu, requires grad, {GRAPH}, and detach=False keeps it.
Leave detach=False out to get a read-only view of the values, or stay in torch.""",
    ),
    "first of several reasons": (
        lambda: tb.to_numpy(in_graph(), detach=False, writable=True, copy=False, dtype="float16"),
        f"""to_numpy(dtype='float16', copy=False, writable=True, detach=False): torch float32 (3,) on cpu, in a graph \
(MulBackward0), {GRAPH} (MulBackward0), and detach=False keeps it.
Leave detach=False out to get a read-only view of the values, or stay in torch.""",
    ),
    "for CuPy": (
        lambda: tb.plan(in_graph(), "cupy", device="cuda:0", detach=False),
        """to_cupy(device='cuda:0', detach=False): torch float32 (3,) on cpu, in a graph (MulBackward0), cannot be \
converted: a CuPy array cannot carry the autograd graph (MulBackward0), and detach=False keeps it.
Leave detach=False out to get the values, or stay in torch.""",
    ),
}


@pytest.mark.parametrize("what", GRAPHS)
def test_graph_that_would_be_cut_is_named(what):
    call, text = GRAPHS[what]
    assert_raises(tb.GraphError, call, text)


DEVICES = {
    "name": (
        lambda: tb.to_torch(six(), device="cuda"),
        """to_torch(device='cuda'): cuda:0 does not exist: torch sees no usable CUDA device here.
Check CUDA_VISIBLE_DEVICES and the driver; plan() shows the steps without a device.""",
    ),
    "index": (
        lambda: tb.to_torch(six(), device=3),
        """to_torch(device='cuda:3'): cuda:3 does not exist: torch sees no usable CUDA device here.
Check CUDA_VISIBLE_DEVICES and the driver; plan() shows the steps without a device.""",
    ),
    "pinned memory": (
        lambda: tb.to_torch(six(), pin_memory=True),
        """to_torch(pin_memory=True): pinned memory needs a CUDA device, and torch sees none here.
Leave it out.""",
    ),
}


ELSEWHERE = """does not exist: torch sees no usable {} device here.
{}; plan() shows the steps without a device."""


@pytest.mark.parametrize(
    ("device", "named"), [("mps", "mps:0"), ("mps:0", "mps:0"), ("xpu:1", "xpu:1"), ("hpu", "hpu:0")]
)
def test_a_device_of_torch_that_is_not_there_is_said_before_anything_moves(device, named, monkeypatch):
    for module in (torch.mps, torch.xpu):
        monkeypatch.setattr(module, "is_available", lambda: False)
    kind = named.partition(":")[0]
    own = f"This build of torch, or this machine, has no {kind}"
    cure = own if hasattr(torch, kind) else "Import the package that adds it to torch"
    text = f"to_torch(device={device!r}): {named} {ELSEWHERE.format(kind, cure)}"
    assert_raises(tb.DeviceError, lambda: tb.to_torch(six(), device=device), text)
    assert_raises(tb.DeviceError, lambda: tb.to_torch(six(), device=torch.device(device)), text)
    assert tb.plan(six(), "torch", device=device, dtype="float32").target.device == named


def test_a_dtype_that_a_device_lacks_is_refused_in_the_plan_with_one_that_it_has():
    text = """to_torch(device='mps:0'): numpy float64 (6,) on cpu cannot be converted: mps devices have no float64.
Use dtype="float32": a copy of 24 B."""
    assert_raises(tb.UnsupportedArrayError, lambda: tb.plan(np.zeros(6), "torch", device="mps"), text)
    text = """to_torch(device='mps:0', dtype='complex128'): numpy float32 (6,) on cpu cannot be converted: \
mps devices have no complex128.
Use dtype="complex64": a copy of 48 B."""
    wide = lambda: tb.plan(np.zeros(6, "f4"), "torch", device="mps", dtype="complex128")
    assert_raises(tb.UnsupportedArrayError, wide, text)
    assert [step.op for step in tb.plan(np.zeros(6), "torch", device="mps", dtype="float32").steps][-1] == "to_device"


@pytest.mark.parametrize("what", DEVICES)
def test_device_that_is_not_there_is_said_before_anything_moves(what, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    call, text = DEVICES[what]
    assert_raises(tb.DeviceError, call, text)


FORKED = {
    "pinned": (
        {"pin_memory": True},
        """to_torch(pin_memory=True): pinned memory is CUDA's, and CUDA cannot be used in a forked process.
Pin in the main process, as DataLoader(pin_memory=True) does, or start workers with the spawn method.""",
    ),
    "over the bus": (
        {"device": "cuda"},
        """to_torch(device='cuda'): CUDA cannot be used in a forked process.
Start workers with the spawn method, or convert in the main process (tensorbridge.prefetch does).""",
    ),
}


@pytest.mark.parametrize("what", FORKED)
def test_a_forked_process_is_told_so_before_cuda_is_asked_anything(what, monkeypatch):
    def raw(*_):
        raise RuntimeError("CUDA error: initialization error")

    options, text = FORKED[what]
    for name, value in (("_is_in_bad_fork", True), ("is_available", False), ("device_count", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.Tensor, "is_pinned", raw)
    assert_raises(tb.DeviceError, lambda: tb.to_torch(torch.zeros(3), **options), text)


def test_device_beyond_the_last_is_counted(monkeypatch):
    for name, value in (("is_available", True), ("device_count", 2), ("is_initialized", False)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    text = """to_torch(device='cuda:7'): cuda:7 does not exist: torch sees 2 CUDA devices here.
Check CUDA_VISIBLE_DEVICES and the driver; plan() shows the steps without a device."""
    assert_raises(tb.DeviceError, lambda: tb.to_torch(six(), device="cuda:7"), text)


def test_where_several_steps_move_bytes_the_cure_avoids_all_of_them():
    swap, pin, made = (Step(op, "", cure=cure) for op, cure in (("byteswap", "a"), ("pin", "b"), ("export", "")))
    assert cure_of([swap, pin, swap]) == "a and b"
    assert cure_of([made, swap]) == ""


def test_device_memory_of_another_library_without_a_device_is_a_device_error(monkeypatch):
    def missing(*_):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr("tensorbridge._cuda._streams.usable", lambda framework: False)
    monkeypatch.setattr(torch.cuda, "init", missing)
    text = "to_torch: Device lies on cuda:0, which torch cannot use here: Torch not compiled with CUDA enabled."
    with pytest.raises(tb.DeviceError) as raised:
        tb.to_torch(Device(readonly=False))
    assert str(raised.value).splitlines()[0] == text


def overlapping():
    return torch.zeros(1).expand(6)


def shared():
    a = six()
    return tb.to_torch(a, out=torch.from_numpy(a))


OUTS = {
    "framework": (TypeError, lambda: tb.to_numpy(six(), out=torch.zeros(6)), "out is Tensor, not an array of numpy"),
    "shape": (ValueError, lambda: tb.to_numpy(six(), out=np.zeros(5)), "out has shape (5,), the source (6,)"),
    "read-only": (ValueError, lambda: tb.to_numpy(six(), out=frozen(np.zeros(6))), "out is read-only"),
    "overlap": (
        ValueError,
        lambda: tb.to_torch(six(), out=overlapping()),
        "out overlaps itself: two of its elements are one",
    ),
    "source": (ValueError, shared, "out shares memory with the source"),
    "graph": (
        ValueError,
        lambda: tb.to_torch(six(), out=torch.zeros(6, requires_grad=True)),
        "out requires grad; fill out.detach(), and say detach=True where the source's graph is not wanted in it",
    ),
    "dtype": (
        ValueError,
        lambda: tb.to_torch(six(), out=torch.zeros(6), dtype="float64"),
        "out is float32, and dtype=float64 was asked for; leave dtype out",
    ),
    "device": (
        ValueError,
        lambda: tb.to_torch(six(), out=torch.zeros(6), device="cuda"),
        "out is on cpu, and device='cuda' was asked for; leave device out",
    ),
    "copy": (
        ValueError,
        lambda: tb.to_torch(six(), out=torch.zeros(6), copy=False),
        "filling out moves bytes, which copy=False forbids; leave copy out",
    ),
    "pin_memory": (
        ValueError,
        lambda: tb.to_torch(six(), out=torch.zeros(6), pin_memory=True),
        "out has its memory already; leave pin_memory out",
    ),
    "sparse": (
        ValueError,
        lambda: tb.to_torch(six(), out=torch.zeros(6).to_sparse()),
        "out is torch sparse_coo float32 (6,): a sparse tensor has no strided memory to share",
    ),
    "masked": (
        ValueError,
        lambda: tb.to_numpy(six(), out=np.ma.zeros(6)),
        "out is masked numpy float64 (6,): the mask of a masked array would be lost",
    ),
    "zero tensor": (
        ValueError,
        lambda: tb.to_torch(six(), out=torch._efficientzerotensor((6,))),
        "out is a zero tensor, which has no memory; fill out.clone()",
    ),
    "inference tensor": (
        ValueError,
        lambda: tb.to_torch(six().reshape(2, 3), out=in_inference_mode()),
        "out is an inference tensor, which torch writes only inside inference_mode; fill out.clone()",
    ),
}


@pytest.mark.parametrize("what", OUTS)
def test_out_that_does_not_fit_is_said_in_one_line(what):
    error, call, text = OUTS[what]
    with pytest.raises(error) as raised:
        call()
    asked, _, why = str(raised.value).partition(": ")
    assert asked in ("to_numpy(out=...)", "to_torch(out=...)")
    assert why == text
