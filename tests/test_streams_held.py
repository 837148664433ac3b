"""A CuPy stream is destroyed with its object. One that torch or a lease will still record on is kept: on the fake."""

import gc
import weakref

import pytest
from races import ON_CUPY, SHAPE, Producer, crossings, foreign, with_adapters

import tensorbridge as tb
from tensorbridge._adapters import _torch_cuda
from tensorbridge._cuda import _stream_order, _streams


@pytest.fixture
def machine(monkeypatch):
    yield from with_adapters(monkeypatch)


@pytest.fixture
def stream(machine):
    return [machine.cupy.cuda.Stream(non_blocking=True)]  # in a list, so that a test can drop the last reference


def enter(machine, s):
    with tb.use_stream(s.ptr):
        pass


class Handle:
    """The stream of a library that gives no more than this."""

    def __init__(self, number):
        self.number = number

    def __cuda_stream__(self):
        return 0, self.number


def wrapper(machine, number):
    return machine.cupy.cuda.Stream.from_external(Handle(number))


OWNS_NOTHING = {
    "a handle in use_stream": enter,
    "a handle": lambda machine, s: _streams.hold(s.ptr, 0, s.ptr),
    "torch's object": lambda machine, s: _streams.hold(s.ptr, 0, machine.torch.cuda.ExternalStream(s.ptr)),
    "a wrapper of another's": lambda machine, s: _streams.hold(s.ptr, 0, wrapper(machine, s.ptr)),
    "our wrapper": lambda machine, s: _streams.hold(s.ptr, 0, _streams.wrapped("cupy", s.ptr, 0)),
}


@pytest.mark.parametrize("first", OWNS_NOTHING)
def test_a_stream_is_kept_though_something_that_owns_nothing_was_held_before(machine, stream, first):
    (s,) = stream
    number, t = s.ptr, machine.torch.full(SHAPE, 1.0)
    OWNS_NOTHING[first](machine, s)
    with s:
        lent = crossings()["torch"](t)
    stream.clear()
    del s
    gc.collect()
    assert (0, number) not in machine.destroyed
    machine.run()
    del t, lent  # torch records on the stream now: the fake refuses one that is destroyed


def test_a_wrapper_is_kept_for_what_stands_behind_it_may_own_the_stream(machine):
    wraps = wrapper(machine, 0x770)
    behind = weakref.ref(wraps._foreign_stream_ref)
    _streams.hold(0x770, 0, wraps)
    _streams.hold(0x770, 0, machine.cupy.cuda.Stream(number=0x770))
    _streams.hold(0x770, 0, wrapper(machine, 0x770))
    del wraps
    gc.collect()
    assert behind() is not None
    assert (0, 0x770) not in machine.destroyed


def of_another_library(exporter):
    return foreign(Producer(), address=exporter.data.ptr, capsule=exporter.__dlpack__())


LENDS = {
    "torch": lambda machine: crossings()["torch"](machine.torch.full(SHAPE, 1.0)),
    "cupy": lambda machine: _torch_cuda.from_cupy(ON_CUPY)(machine.cupy.full(SHAPE, 1.0)),
    "cupy, by its lane": lambda machine: _torch_cuda.plain_from_cupy(machine.cupy.full(SHAPE, 1.0)),
    "another library": lambda machine: _torch_cuda.imported(of_another_library(machine.cupy.full(SHAPE, 1.0))),
}


@pytest.mark.parametrize("owner", LENDS)
def test_a_stream_that_is_current_in_both_is_kept_whoever_owns_the_memory(machine, stream, owner):
    """As CuPy's documentation has it: torch on ExternalStream(s.ptr), CuPy in `with s`."""
    (s,) = stream
    number = s.ptr
    machine.current["torch"][0] = number
    with s:
        lent = LENDS[owner](machine)
    machine.current["torch"][0] = 1
    stream.clear()
    del s
    gc.collect()
    assert lent is not None
    assert (0, number) not in machine.destroyed
    machine.run()
    del lent


def test_a_stream_of_cupy_alone_is_destroyed_with_its_object(machine, stream):
    """The control: nothing else keeps one."""
    number = stream[0].ptr
    with stream[0]:
        pass
    stream.clear()
    gc.collect()
    assert (0, number) in machine.destroyed


@pytest.fixture
def cupy_without_driver(machine, monkeypatch):
    """A CuPy that is installed for another CUDA, beside a torch that has a device: any call of its runtime raises."""

    def broken(*args):
        raise machine.cupy.cuda.runtime.CUDARuntimeError("cudaErrorInsufficientDriver")

    for name in ("getDeviceCount", "getDevice", "eventRecord", "streamWaitEvent", "streamIsCapturing"):
        monkeypatch.setattr(machine.cupy.cuda.runtime, name, broken)


@pytest.mark.usefixtures("cupy_without_driver")
def test_where_cupy_cannot_use_the_driver_torch_orders_streams_and_tells_captures(machine):
    machine.calls.clear()
    _stream_order.link(0x30, 0x40, 0)
    assert [call[0] for call in machine.calls] == ["torch.Event", "record", "wait"]
    assert not _streams.capturing_on(0x30, 0)


def test_a_lane_leaves_a_tensor_to_be_refused_while_a_mode_answers_for_torch(machine, monkeypatch):
    """Under FakeTensorMode an alias of a real tensor is a fake, and keeps no memory."""
    from tensorbridge import _device_lanes

    lane = _device_lanes.plain_tensor_to_cupy(lambda x: "the full road")
    t = machine.torch.full(SHAPE, 1.0)
    monkeypatch.setattr(_device_lanes, "_Tensor", type(t))
    monkeypatch.setattr(_device_lanes, "_forward_ad", _NoLevel, raising=False)
    monkeypatch.setattr(_device_lanes, "_from_torch", lambda x: "the lane", raising=False)
    monkeypatch.setattr(type(t), "is_cuda", True, raising=False)
    assert lane(t) == "the lane"
    monkeypatch.setattr(_device_lanes, "_intercepted", lambda: True)
    assert lane(t) == "the full road"


class _NoLevel:
    _current_level = -1
