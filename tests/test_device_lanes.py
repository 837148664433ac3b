"""The lanes between torch and CuPy: they do what the full road does, and leave to it what is not plain. On the fake."""

import numpy as np
import pytest
from fake_frameworks import cupy_adapter
from races import ON_CUPY, ON_TORCH, SHAPE, Race, address, plays, with_adapters

import tensorbridge as tb
from tensorbridge import _device_lanes
from tensorbridge._adapters import _torch_cuda
from tensorbridge._convert import moment
from tensorbridge._cuda import _lease, _streams
from tensorbridge._plan import decide
from tensorbridge._step import Want

ONE = 0x60  # the stream that is current in both


@pytest.fixture
def machine(monkeypatch):
    for machine in with_adapters(monkeypatch):
        cupy_adapter()._SHARED[machine.torch.Tensor.dtype] = np.dtype("float32")
        machine.current["torch"][0] = machine.current["cupy"][0] = ONE
        yield machine


def to_cupy(t):
    return cupy_adapter().plain_from_torch(t)


@pytest.fixture(params=["torch", "cupy"])
def crossing(request, machine):
    """An array, its lane, and its full road."""
    if request.param == "torch":
        full = cupy_adapter().from_torch(ON_TORCH, capturing=False)
        return machine.torch.full(SHAPE, 1.0), to_cupy, lambda t: full(t.detach())
    return machine.cupy.full(SHAPE, 1.0), _torch_cuda.plain_from_cupy, _torch_cuda.from_cupy(ON_CUPY)


def test_a_lane_makes_what_the_full_road_makes_and_asks_cuda_for_the_same(machine, crossing):
    x, lane, full = crossing
    machine.calls.clear()
    by_road, asked = full(x), list(machine.calls)
    machine.calls.clear()
    by_lane = lane(x)
    assert address(by_lane) == address(by_road) == address(x)
    assert tuple(by_lane.shape) == tuple(by_road.shape) == SHAPE
    assert type(by_lane) is type(by_road)
    assert [call for call in machine.calls if call[0] != "is_capturing"] == asked
    assert len(_lease._leases) == (2 if isinstance(x, machine.cupy.ndarray) else 0)


@pytest.fixture
def torch_without_cuda(machine, monkeypatch):
    """A torch for the CPU alone, beside a CuPy that has a device."""

    def init():
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(machine.torch.cuda, "init", init)
    for name in ("is_available", "is_initialized"):
        monkeypatch.setattr(machine.torch.cuda, name, lambda: False)


@pytest.mark.usefixtures("torch_without_cuda")
def test_what_a_torch_without_cuda_cannot_hold_comes_to_the_host_through_cupy(machine):
    here = moment(ON_CUPY, Want("torch", tb.Device("cpu")))
    assert here.gpu == "cupy"
    steps = decide(ON_CUPY, Want("torch", tb.Device("cpu")), here).steps
    assert [(step.op, step.after.framework) for step in steps] == [("to_host", "numpy"), ("share", "torch")]


@pytest.mark.usefixtures("torch_without_cuda")
def test_a_torch_without_cuda_gets_no_device_memory(machine):
    x = machine.cupy.full(SHAPE, 1.0)
    assert _torch_cuda.plain_from_cupy(x) is None
    with pytest.raises(tb.DeviceError, match="not compiled with CUDA enabled"):
        _streams.current("torch", 0)


def test_a_lane_leaves_a_tensor_without_memory_of_its_own_to_be_refused(machine, monkeypatch):
    """Compressed sparse tensors are not even contiguous or not: torch raises."""

    def raises(self):
        raise RuntimeError("Sparse CSR tensors do not have is_contiguous")

    t = machine.torch.full(SHAPE, 1.0)
    for name in ("is_contiguous", "data_ptr"):
        with monkeypatch.context() as patched:
            patched.setattr(machine.torch.Tensor, name, raises)
            assert to_cupy(t) is None


def test_in_a_forked_child_a_lane_leaves_all_to_the_full_road_and_asks_cuda_nothing(machine, crossing, monkeypatch):
    x, lane, _ = crossing
    machine.calls.clear()
    monkeypatch.setattr(_streams, "in_child", True)
    assert lane(x) is None
    assert machine.calls == []


@pytest.mark.parametrize("owner", ["torch", "cupy"])
def test_memory_that_a_lane_has_lent_is_kept(machine, owner):
    """The memory was allocated on another stream than the one that is current in both at the crossing."""

    def cross(x):
        before = machine.current["torch"][0], machine.current["cupy"][0]
        machine.current["torch"][0] = machine.current["cupy"][0] = Race.READING
        made = to_cupy(x) if owner == "torch" else _torch_cuda.plain_from_cupy(x)
        machine.current["torch"][0], machine.current["cupy"][0] = before
        assert made is not None
        return made

    race = Race(machine, owner, {owner: cross})
    freed, taken = plays(race)
    assert taken != freed
    assert race.values == {1.0}


def test_a_lane_looks_at_what_is_pending(machine, crossing):
    x, lane, _ = crossing
    machine.kernel(0, ONE, lambda: None)
    _lease.keep(object(), ONE, 0)
    machine.run()
    made = lane(x)
    assert not _lease.pending()
    assert made is not None


MOMENTS = {
    "torch on another stream": lambda m: m.current["torch"].__setitem__(0, 0x70),
    "CuPy on another stream": lambda m: m.current["cupy"].__setitem__(0, 0x70),
    "a capture": lambda m: m.capturing.add((0, ONE)),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_needs_a_decision_goes_the_full_road(machine, crossing, moment):
    x, lane, _ = crossing
    machine.run()
    MOMENTS[moment](machine)
    machine.calls.clear()
    assert lane(x) is None
    assert set(machine.names()) <= {"is_capturing"}


def test_memory_is_not_lent_on_the_per_thread_default_stream(machine):
    t = machine.torch.full(SHAPE, 1.0)
    machine.current["torch"][0] = machine.current["cupy"][0] = 2
    assert to_cupy(t) is None


def without_memory():
    raise RuntimeError("Cannot access data pointer of Tensor that doesn't have storage")


TENSORS = {
    "another dtype": {"dtype": "torch.complex64"},
    "in a graph": {"requires_grad": True},
    "negative bit": {"is_neg": lambda: True},
    "nested": {"is_nested": True},
    "not contiguous": {"is_contiguous": lambda: False},
    "empty": {"data_ptr": lambda: 0},
    "of torch.func": {"data_ptr": without_memory},
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_is_not_plain_goes_the_full_road(machine, name):
    t = machine.torch.full(SHAPE, 1.0)
    for attribute, value in TENSORS[name].items():
        setattr(t, attribute, value)
    assert to_cupy(t) is None
    assert "record_stream" not in machine.names()


def test_an_array_that_is_not_plain_goes_the_full_road(machine):
    for shape, dtype, strides in (((0, 3), "f4", None), ((2, 3), "V2", None), ((2, 3), "f4", (4, 8))):
        c = machine.cupy.ndarray((2, 3) if 0 not in shape else shape, np.dtype(dtype), None, strides)
        assert _torch_cuda.plain_from_cupy(c) is None
    assert not _lease._leases


def test_the_lane_to_cupy_knows_dtypes_that_mean_their_bytes_only():
    """A conjugate tensor may look plain; bfloat16 CuPy has as itself."""
    import torch

    names = {"float32", "bfloat16", "bool", "complex64", "float8_e4m3fn", "uint16"}
    adapter = None
    for machine in with_adapters(monkeypatch := pytest.MonkeyPatch()):
        adapter = cupy_adapter()
        adapter.open_lane({name: getattr(torch, name) for name in names})
        known = {str(dtype) for dtype in adapter._SHARED if isinstance(dtype, torch.dtype)}
        assert known == {"torch.float32", "torch.bfloat16", "torch.bool", "torch.uint16"}
        assert machine
    monkeypatch.undo()


# In front of the public functions


class Plain:
    is_cuda = True


class Sub(Plain):
    pass


@pytest.fixture
def lanes(monkeypatch):
    class Level:
        _current_level = -1

    monkeypatch.setattr(_device_lanes, "_Tensor", Plain)
    monkeypatch.setattr(_device_lanes, "_Array", Plain)
    monkeypatch.setattr(_device_lanes, "_forward_ad", Level, raising=False)
    monkeypatch.setattr(_device_lanes, "_from_torch", lambda x: "lane", raising=False)
    monkeypatch.setattr(_device_lanes, "_from_cupy", lambda x: "lane", raising=False)
    return Level


@pytest.mark.parametrize("lane", [_device_lanes.plain_tensor_to_cupy, _device_lanes.plain_cupy_to_torch])
def test_a_lane_is_for_exact_types_without_options_that_nobody_watches(lanes, monkeypatch, lane):
    call = lane(lambda x, **options: "full")
    assert call(Plain()) == "lane"
    assert call(Sub()) == "full"
    assert call(np.zeros(3)) == "full"
    assert call(Plain(), copy=None) == "full"
    with tb.trace():
        assert call(Plain()) == "full"
    with tb.copy_guard("allow"):
        assert call(Plain()) == "full"
    monkeypatch.setattr(_device_lanes, "_from_torch", lambda x: None)
    monkeypatch.setattr(_device_lanes, "_from_cupy", lambda x: None)
    assert call(Plain()) == "full"


def test_inside_a_dual_level_and_on_the_host_a_tensor_goes_the_full_road(lanes):
    call = _device_lanes.plain_tensor_to_cupy(lambda x, **options: "full")
    on_host = Plain()
    on_host.is_cuda = False
    assert call(on_host) == "full"
    lanes._current_level = 0
    assert call(Plain()) == "full"
