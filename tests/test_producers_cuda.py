"""Foreign producers on a device: whose stream they are asked for, when they are not asked at all, what is believed."""

import contextlib
import sys
import types

import numpy as np
import pytest
from _producers import Producer
from fake_frameworks import cupy_adapter
from races import with_adapters

import tensorbridge as tb
from tensorbridge import Device, Traits
from tensorbridge._adapters import _foreign, _protocols, _torch_cuda
from tensorbridge._cuda import _streams
from tensorbridge._plan import decide
from tensorbridge._step import Want


@pytest.fixture
def machine(monkeypatch):
    yield from with_adapters(monkeypatch)


class OnDevice(Producer):
    def __init__(self, memory, **fields):
        super().__init__(memory, device=(2, 0), **fields)
        self.asked_on = []

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **options):
        self.asked_on.append(_streams.current_device())
        return super().__dlpack__(**options)


class Interface:
    def __init__(self, memory, **changes):
        self.memory = memory
        facts = memory.__array_interface__
        named = {name: facts[name] for name in ("shape", "typestr", "data", "strides")}
        self.__cuda_array_interface__ = named | {"version": 3} | changes


def orders(machine):
    return [call for call in machine.calls if call[0] in ("record", "wait")]


# -- Streams


@pytest.mark.parametrize("reader", ["torch", "cupy"])
def test_whoever_reads_first_waits_for_the_stream_that_the_producer_was_asked_for(machine, reader):
    """Reversed memory goes to torch by way of CuPy: the producer ordered torch's stream, and CuPy reads first."""
    machine.current["torch"][0], machine.current["cupy"][0] = 0x50, 0x60
    producer = OnDevice(np.arange(6, dtype=np.float32)[::-1])
    handle, traits, _ = _protocols.open(producer, Want(reader))
    asked = {"torch": 0x50, "cupy": 0x60}[reader]
    assert (traits.spacing, handle.stream) == ("reversed", asked)
    assert producer.asked == [{"max_version": (1, 0), "stream": asked}]
    kept = cupy_adapter().imported(handle)
    assert orders(machine) == ([("record", 0x50), ("wait", 0x60)] if reader == "torch" else [])
    assert kept.shape == (6,)


def test_torch_waits_too_where_its_stream_is_another_by_then(machine, monkeypatch):
    machine.current["torch"][0] = 0x50
    exporter = machine.cupy.full((6,), 1.0)
    handle, _, _ = _protocols.open(OnDevice(np.arange(6, dtype=np.float32)), Want("torch"))
    handle = handle._replace(address=exporter.data.ptr, capsule=exporter.__dlpack__())
    machine.current["torch"][0] = 0x70
    kept = _torch_cuda.imported(handle)
    assert orders(machine) == [("record", 0x50), ("wait", 0x70)]
    assert kept.shape == (6,)


def test_the_producer_is_asked_under_its_device_and_the_current_one_is_left_as_it_was(machine):
    machine.devices = 2
    machine.device = 1
    producer = OnDevice(np.arange(6, dtype=np.float32))
    _protocols.open(producer, Want("cupy"))
    assert (producer.asked_on, machine.device) == ([0], 1)


# -- Capture


@pytest.mark.parametrize("to", ["numpy", "torch", "cupy"])
def test_a_producer_is_not_asked_while_a_graph_is_captured(machine, to):
    """It may record an event, which would break the capture."""
    machine.current["torch"][0] = machine.current["cupy"][0] = 0x50
    machine.capturing.add((0, 0x50))
    producer = OnDevice(np.arange(6, dtype=np.float32))
    with pytest.raises(tb.DeviceError, match=r"OnDevice .* captured[\s\S]*use_stream"):
        _protocols.open(producer, Want(to))
    assert producer.asked == []


def test_host_memory_is_asked_for_during_a_capture(machine):
    machine.current["torch"][0] = 0x50
    machine.capturing.add((0, 0x50))
    producer = Producer(np.arange(6, dtype=np.float32))
    assert _protocols.open(producer, Want("numpy"))[0].tolist() == [0, 1, 2, 3, 4, 5]


# -- Devices


def test_an_interface_that_names_no_device_is_where_the_driver_says(machine):
    machine.devices = 2
    memory = np.arange(6, dtype=np.float32)
    machine.lies_on[memory.ctypes.data] = 1
    cupy_adapter()
    handle, traits, _ = _protocols.open(Interface(memory), Want("cupy"))
    assert handle.device == traits.device == "cuda:1"


def test_an_address_that_the_driver_does_not_know_is_the_producers_fault(machine):
    cupy_adapter()
    with pytest.raises(tb.ProducerError, match="malformed producer: no device has memory at 0x1000"):
        _protocols.open(Interface(np.arange(6, dtype=np.float32), data=(0x1000, False)), Want("cupy"))


def test_an_interface_without_memory_is_on_the_current_device(machine):
    machine.devices, machine.device = 2, 1
    memory = np.empty((0, 3), np.float32)
    handle, _, _ = _protocols.open(Interface(memory, data=(0, False)), Want("cupy"))
    assert handle.device == "cuda:1"


def test_an_interface_that_names_its_device_is_not_believed_against_the_driver(machine):
    machine.devices = 2
    memory = np.arange(6, dtype=np.float32)
    machine.lies_on[memory.ctypes.data] = 1
    cupy_adapter()
    x = Interface(memory)
    for said in (1, True, "one", None):
        x.device = types.SimpleNamespace(id=said)
        assert _protocols.open(x, Want("cupy"))[0].device == "cuda:1"
    for said in (0, 7):
        x.device = types.SimpleNamespace(id=said)
        with pytest.raises(tb.ProducerError, match=f"says that it is on device {said}, and its memory is on device 1"):
            _protocols.open(x, Want("cupy"))


@pytest.mark.parametrize("index", [0, 1, None])
def test_without_cupy_torch_is_asked_where_an_address_is(monkeypatch, index):
    """Given no device: it would be believed, or the memory copied to it."""

    def as_tensor(interface):
        if index is None:
            raise RuntimeError("The specified pointer resides on host memory")
        facts = interface.__cuda_array_interface__
        assert (facts["shape"], facts["typestr"]) == ((1,), "|u1")
        return types.SimpleNamespace(data_ptr=lambda: facts["data"][0], get_device=lambda: index)

    cuda = types.SimpleNamespace(device=lambda i: contextlib.nullcontext(), device_count=lambda: 2)
    inside = types.SimpleNamespace(DisableTorchFunction=contextlib.nullcontext)
    monkeypatch.setattr(_torch_cuda, "torch", types.SimpleNamespace(as_tensor=as_tensor, cuda=cuda, _C=inside))
    monkeypatch.setattr(_streams, "usable", lambda framework: framework == "torch")
    monkeypatch.setattr(_streams, "capturing", lambda: False)
    x = Interface(np.arange(6, dtype=np.float32), data=(0x5000, False))
    if index is None:
        with pytest.raises(tb.ProducerError, match="no device has memory at 0x5000"):
            tb.describe(x)
    else:
        assert tb.describe(x).device == f"cuda:{index}"


def test_in_a_forked_child_no_producer_is_asked(machine, monkeypatch):
    monkeypatch.setattr(_streams, "forked", lambda: True)
    x = OnDevice(np.zeros(3))
    with pytest.raises(tb.DeviceError, match=r"OnDevice cannot be asked for device memory: CUDA .* forked"):
        _protocols.open(x, Want("cupy"))
    assert x.asked_on == machine.calls == []


def test_a_device_that_cupy_does_not_have_is_a_device_error(machine, monkeypatch):
    """torch has an error for it, CuPy a list of streams."""

    def current(framework, index):
        return [1][index]

    class Elsewhere(OnDevice):
        def __dlpack_device__(self):
            return 2, 3

    monkeypatch.setattr(_streams, "current", current)
    with pytest.raises(tb.DeviceError, match="Elsewhere lies on cuda:3, which cupy cannot use here"):
        _protocols.open(Elsewhere(np.zeros(3)), Want("cupy"))


def test_whoever_reads_is_imported_where_it_is_not_yet(machine, monkeypatch):
    """CuPy, for host memory to be made of what lies on a device, where torch sees none."""
    cupy = machine.cupy
    monkeypatch.delitem(sys.modules, "cupy")
    monkeypatch.setattr(_streams, "mover", lambda: "cupy")
    monkeypatch.setattr(_foreign, "named", lambda name: sys.modules.__setitem__(name, cupy))
    machine.current["cupy"][0] = 0x60
    producer = OnDevice(np.arange(6, dtype=np.float32))
    assert _protocols.open(producer, Want("numpy"))[0].stream == 0x60


def test_a_cupy_that_cannot_be_imported_is_told_why(machine, monkeypatch):
    def broken(name):
        raise ImportError("libcuda.so.1: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "cupy")
    monkeypatch.setattr(_foreign, "named", broken)
    text = (
        "OnDevice lies on cuda:0, and is read by CuPy, which cannot be imported: libcuda.so.1: cannot open shared "
        "object file.\npip install cupy-cuda12x or cupy-cuda13x[ctk], whichever the driver's CUDA version asks for"
    )
    with pytest.raises(tb.MissingFrameworkError) as raised:
        _protocols.open(OnDevice(np.zeros(3)), Want("cupy"))
    assert str(raised.value) == text


# -- Alignment


def halfway():
    """Complex numbers of 16 bytes, 8 off a multiple of that."""
    block = np.zeros(9, np.float64)
    return block[block.ctypes.data % 16 // 8 ^ 1 :][:8].view(np.complex128)


@pytest.mark.parametrize("via", [OnDevice, Interface])
def test_foreign_memory_tells_whether_its_elements_are_aligned(machine, via):
    machine.current["torch"][0] = 0x50
    off = halfway()
    assert off.ctypes.data % 16 == 8
    machine.lies_on[off.ctypes.data] = 0
    cupy_adapter()
    assert not _protocols.open(via(off), Want("torch"))[1].aligned
    whole = np.zeros(4, np.complex128)
    machine.lies_on[whole.ctypes.data] = 0
    assert _protocols.open(via(whole), Want("torch"))[1].aligned == (whole.ctypes.data % 16 == 0)


def test_a_cupy_array_tells_whether_its_elements_are_aligned(machine):
    cuda, adapter = machine.cupy.cuda, cupy_adapter()

    def traits_at(address):
        memory = cuda.UnownedMemory(address, 64, None, 0)
        return adapter.traits(machine.cupy.ndarray((4,), np.complex128, cuda.MemoryPointer(memory, 0)))

    assert traits_at(0x5000).aligned
    assert not traits_at(0x5008).aligned


CUDA0 = Device("cuda:0")
ASKEW = {"unaligned": {"aligned": False}, "odd": {"spacing": "odd"}}


@pytest.mark.parametrize("facts", ASKEW.values(), ids=ASKEW)
@pytest.mark.parametrize("source", ["dlpack", "cuda_array_interface", "cupy"])
@pytest.mark.parametrize("want", [Want("torch"), Want("cupy"), Want("torch", dtype="float32"), Want("numpy")], ids=str)
def test_elements_that_no_kernel_may_read_are_packed_by_bytes_before_anything_else(facts, source, want):
    """A kernel that reads them ends the CUDA context of the process."""
    if source == want.framework:
        return  # the caller's own array, as it is
    steps = decide(Traits(source, CUDA0, "complex64" if not want.dtype else "float64", **facts), want).steps
    ops = [step.op for step in steps if step.op not in ("import", "detach")]
    assert ops[0] == "pack"
    assert steps[0].after.framework == "cupy", "torch cannot"


@pytest.mark.parametrize("axes", [(0, 1), (1, 0)], ids=["C", "F"])
def test_packing_by_bytes_keeps_values_order_and_dtype(machine, axes):
    off = halfway()
    off[:] = range(4)
    cuda, adapter = machine.cupy.cuda, cupy_adapter()
    memory = cuda.UnownedMemory(off.ctypes.data, off.nbytes, off, 0)
    x = machine.cupy.ndarray((2, 2), np.complex128, cuda.MemoryPointer(memory, 0)).transpose(axes)
    before = adapter.traits(x)
    (step, *_) = decide(before, Want("torch")).steps
    made = adapter.performer(step, before, Want("torch"))(x)
    machine.run()
    assert [call[1:3] for call in machine.calls if call[0] == "memcpy"] == [(3, 64)]
    assert adapter.traits(made) == step.after
    assert made.array().tolist() == np.arange(4).reshape(2, 2).transpose(axes).tolist()


def test_packing_an_overlapping_array_by_bytes_gives_the_order_that_is_promised(machine):
    off = halfway()
    cuda, adapter = machine.cupy.cuda, cupy_adapter()
    memory = cuda.UnownedMemory(off.ctypes.data, off.nbytes, off, 0)
    pointer = cuda.MemoryPointer(memory, 0)
    x = machine.cupy.ndarray((3, 4), np.complex128, pointer, (0, 16))
    y = machine.cupy.ndarray((4, 3), np.complex128, pointer, (16, 0))
    for array in (x, y):
        before = adapter.traits(array)
        (step, *_) = decide(before, Want("torch")).steps
        assert adapter.traits(adapter.performer(step, before, Want("torch"))(array)) == step.after


def test_the_lane_leaves_what_is_not_aligned_to_the_planner(machine):
    cuda = machine.cupy.cuda
    cupy_adapter()

    def lane(address):
        memory = cuda.UnownedMemory(address, 64, None, 0)
        return _torch_cuda.plain_from_cupy(machine.cupy.ndarray((4,), np.complex128, cuda.MemoryPointer(memory, 0)))

    assert lane(0x5008) is None
    assert lane(0x5000).data_ptr() == 0x5000


def test_device_arrays_of_other_libraries_are_not_stacked(machine):
    cupy_adapter()
    parts = [Interface(np.zeros(3, "f4")), Interface(np.ones(3, "f4"))]
    for part in parts:
        machine.lies_on[part.memory.ctypes.data] = 0
    with pytest.raises(tb.UnsupportedArrayError, match="device arrays of other libraries are not stacked"):
        tb.plan(parts, "torch")


class Mute(OnDevice):
    def __dlpack_device__(self):
        raise ZeroDivisionError("no answer")


def test_a_producer_that_fails_when_asked_for_its_device_is_left_to_the_conversion(machine):
    memory = np.zeros(3, "f4")
    assert _foreign.device_index(OnDevice(memory)) == 0
    for other in (Mute(memory), Producer(memory), memory, "text", 5):
        assert _foreign.device_index(other) is None
    assert _foreign.stream_named(Interface(memory, stream=7)) == 7
    assert _foreign.stream_named(Interface(memory)) is None is _foreign.stream_named("text")


def test_a_stream_that_is_none_is_the_producers_fault(machine, monkeypatch):
    memory = np.arange(6, dtype=np.float32)
    machine.lies_on[memory.ctypes.data] = 0
    cupy_adapter()
    with pytest.raises(tb.ProducerError, match="-1 in __cuda_array_interface__ is no stream"):
        tb.plan(Interface(memory, stream=-1), "cupy")

    def refuse(*_):
        raise RuntimeError("invalid resource handle")

    handle, _, _ = _protocols.open(Interface(memory, stream=0x70), Want("cupy"))
    monkeypatch.setattr(_foreign._stream_order, "wait", refuse)
    with pytest.raises(tb.ProducerError, match="112 is no stream of cuda:0: invalid resource handle"):
        handle.wait_in("cupy")


def test_the_stream_that_an_array_interface_names_waits_for_what_is_copied_on_the_device():
    lent = Traits("cuda_array_interface", Device("cuda:0"), "float32")
    for options, back in (({"copy": True}, True), ({"dtype": "float64"}, True), ({}, False)):
        first = decide(lent, Want("torch", **options)).steps[0]
        assert (first.op, first.by == "both ways") == ("import", back)
    assert decide(lent, Want("numpy")).steps[0].by != "both ways", "the host waits for it"
