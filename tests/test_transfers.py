"""Transfers of arrays: which road the plan names, and that layouts and dtypes survive it; without a device."""

import types

import fake_frameworks
import numpy as np
import pytest
import torch

import tensorbridge as tb
from tensorbridge import Device, Traits, _roads
from tensorbridge._adapters import _torch_cuda
from tensorbridge._cuda import _lease, _staging, _stream_order, _streams
from tensorbridge._plan import decide
from tensorbridge._step import Here, Step, Want

CPU, CUDA0, CUDA1 = Device("cpu"), Device("cuda:0"), Device("cuda:1")


# Roads


def steps(traits, want, here=None):
    decision = decide(traits, want, here or Here())
    assert decision.refusal is None, decision.refusal
    return {step.op: step for step in decision.steps}


ON_TORCH = Traits("torch", CUDA0, size="large")
ROADS = {
    # from, wish: which step, by which road
    "a large tensor comes down": (ON_TORCH, Want("numpy"), "to_host", "ring"),
    "a large CuPy array comes down": (ON_TORCH._replace(framework="cupy"), Want("numpy"), "to_host", "ring"),
    "to torch on the host": (ON_TORCH, Want("torch", CPU, detach=False), "to_host", "ring"),
    "a medium one takes the plain road": (ON_TORCH._replace(size="medium"), Want("numpy"), "to_host", ""),
    "a graph is torch's to keep": (ON_TORCH._replace(graph=True), Want("torch", CPU, detach=False), "to_host", ""),
    "conjugate bits too": (ON_TORCH._replace(lazy="conj"), Want("torch", CPU, detach=False), "to_host", ""),
    "out of the graph it is bytes": (ON_TORCH._replace(graph=True), Want("numpy"), "to_host", "ring"),
    "strided is packed on the device": (ON_TORCH._replace(spacing="strided"), Want("numpy"), "to_host", "ring"),
    "into pinned memory": (ON_TORCH, Want("torch", CPU, detach=False, pin_memory=True), "to_host", "pinned"),
    "small, into pinned memory": (
        ON_TORCH._replace(size="small"), Want("torch", CPU, detach=False, pin_memory=True), "to_host", "pinned",
    ),
    "CuPy knows no pinned memory of torch's": (
        ON_TORCH._replace(framework="cupy"), Want("torch", CPU, pin_memory=True), "to_host", "ring",
    ),
    "a cast comes after, so pinned comes last": (
        ON_TORCH._replace(dtype="uint8"), Want("torch", CPU, "float32", pin_memory=True), "to_host", "ring",
    ),
    "a large array goes up": (Traits("numpy", size="large"), Want("torch", CUDA0), "to_device", "ring"),
    "a large array goes up to CuPy": (Traits("numpy", size="large"), Want("cupy", CUDA0), "to_device", "ring"),
    "a small array goes up": (Traits("numpy"), Want("torch", CUDA0), "to_device", ""),
    "a pinned tensor goes up": (Traits("torch", pinned=True), Want("torch", CUDA0), "to_device", "pinned"),
    "a pinned tensor goes up to CuPy": (Traits("torch", pinned=True), Want("cupy", CUDA0), "to_device", "pinned"),
    "a pinned strided one is packed first": (
        Traits("torch", spacing="strided", pinned=True, size="large"), Want("torch", CUDA0), "to_device", "ring",
    ),
    "a large tensor in a graph goes up": (
        Traits("torch", graph=True, size="large"), Want("torch", CUDA0, detach=False), "to_device", "",
    ),
    "from device to device": (ON_TORCH, Want("torch", CUDA1, detach=False), "to_device", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", ROADS)
def test_the_plan_names_the_road(name):
    traits, want, op, by = ROADS[name]
    step = steps(traits, want)[op]
    assert step.by == by
    assert (
        step.why.partition(", ")[2]
        == {
            "ring": "through the ring of pinned slots",
            "pinned": "straight " + ("into" if op == "to_host" else "from") + " pinned memory",
            "": "",
        }[by]
    )


def test_gaps_are_no_plain_bytes():
    """The planner packs before it asks; a tensor in a graph it does not pack."""
    strided = ON_TORCH._replace(spacing="strided")
    assert _roads.down(strided, pinned=True) == _roads.up(strided, CUDA0, pinned=True) == _roads.Road(_roads.PLAIN)
    overlapping = ON_TORCH._replace(overlap=True)
    assert _roads.down(overlapping, pinned=False) == _roads.Road(_roads.PLAIN)


@pytest.mark.parametrize("size", ["small", "large"])
def test_the_roads_of_cuda_are_not_taken_to_or_from_a_device_that_only_torch_knows(size):
    there, here = Traits("torch", Device("mps:0"), size=size), Traits("torch", CPU, size=size, pinned=True)
    plain = _roads.Road(_roads.PLAIN)
    assert _roads.down(there, pinned=True) == _roads.up(here, there.device, pinned=True) == plain
    assert _roads.into(there, here) == _roads.into(here, there) == ""


@pytest.mark.parametrize(
    ("change", "ring"),
    [({}, True), ({"size": "medium"}, False), ({"dtype": "float64"}, False), ({"lazy": "conj"}, True)],
    ids=str,
)
def test_the_plan_says_by_which_road_out_is_filled(change, ring):
    for device in (CUDA0, CPU):
        source = ON_TORCH._replace(device=device)._replace(**change)
        out = Traits("torch", CPU if device == CUDA0 else CUDA0, size="large")
        fill = steps(source, Want("torch", out.device, "float32", detach=False, out=out))["fill"]
        assert ("through the ring" in fill.why) is ring
    marked = Traits("torch", CPU, size="large", lazy="neg")
    assert "ring" not in steps(ON_TORCH, Want("torch", CPU, "float32", detach=False, out=marked))["fill"].why
    on_one_side = steps(ON_TORCH, Want("torch", CUDA0, "float32", detach=False, out=ON_TORCH))["fill"]
    assert on_one_side.why == "into the caller's array, `out`"


def test_what_lies_with_gaps_is_packed_on_its_side_of_the_bus_by_a_step_of_its_own():
    down = decide(ON_TORCH._replace(spacing="strided"), Want("numpy"), Here()).steps
    up = decide(Traits("numpy", spacing="strided", size="large"), Want("torch", CUDA0), Here()).steps
    across = decide(Traits("cupy", CUDA0, spacing="strided"), Want("cupy", CUDA1), Here()).steps
    assert [(s.op, s.kind) for s in down if s.kind] == [("pack", "d2d"), ("to_host", "d2h")]
    assert [(s.op, s.kind) for s in up if s.kind] == [("pack", "h2h"), ("to_device", "h2d")]
    assert [(s.op, s.kind) for s in across if s.kind] == [("pack", "d2d"), ("to_device", "d2d")]


@pytest.mark.parametrize(
    ("size", "non_blocking", "waits"),
    [(1 << 20, False, True), (1 << 20, True, True), (16, False, True), (16, True, False)],
)
def test_a_plan_says_whether_the_host_waits(size, non_blocking, waits):
    """What goes through the ring is read whole before the call returns."""
    made = tb.plan(np.zeros(size), "cupy", non_blocking=non_blocking)
    assert made.blocking is waits
    assert ("the host waits" in str(made)) is waits
    assert ("through the ring of pinned slots" in str(made)) is (size > 16)


def test_a_crossing_in_a_capture_says_that_nothing_is_recorded():
    captured = Here(capturing=True)
    for traits, want in ((ON_TORCH, Want("cupy")), (ON_TORCH._replace(framework="cupy"), Want("torch"))):
        share = steps(traits, want, captured)["share"]
        assert share.by == _roads.CAPTURED
        assert "nothing is recorded" in share.why
        assert steps(traits, want)["share"].by == ""


@pytest.mark.parametrize("framework", ["torch", "dlpack"])
def test_memory_is_not_lent_on_the_per_thread_default_stream(framework):
    decision = decide(Traits(framework, CUDA0), Want("cupy"), Here(per_thread=True))
    assert decision.refusal.error is tb.DeviceError
    assert "use_stream" in decision.refusal.cure


def test_device_memory_of_others_does_not_cross_in_a_capture():
    """Nobody knows the stream of its work."""
    for want in (Want("torch"), Want("cupy")):
        refusal = decide(Traits("dlpack", CUDA0), want, Here(capturing=True)).refusal
        assert refusal.error is tb.DeviceError
    assert decide(Traits("dlpack"), Want("torch"), Here(capturing=True)).refusal is None


# torch's side, on host tensors that stand for device ones


TENSORS = {
    "contiguous": lambda: torch.arange(24.0).reshape(2, 3, 4),
    "channels last": lambda: torch.arange(120.0).reshape(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.arange(12.0).reshape(3, 4).t(),
    "with an offset": lambda: torch.arange(12.0)[4:],
    "bool": lambda: torch.tensor([True, False, True]),
    "bfloat16": lambda: torch.arange(6.0).bfloat16(),
    "float8": lambda: torch.arange(6.0).to(torch.float8_e4m3fn),
    "complex": lambda: torch.arange(6.0).to(torch.complex128),
    "uint16": lambda: torch.arange(6).to(torch.uint16),
}


def as_int(t):
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}[t.element_size()])


def assert_same(made, t):
    assert (made.dtype, made.shape, made.stride()) == (t.dtype, t.shape, t.stride())
    assert made.data_ptr() != t.data_ptr()
    assert torch.equal(as_int(made.flatten()), as_int(t.flatten()))


@pytest.fixture
def bytewise(monkeypatch):
    """The ring, replaced by copies of bytes, which are counted."""
    moved = []

    def download(block, *, framework, index, out=None, pinned=False):
        data = _torch_cuda.bytes_of(block)
        moved.append(("down", data.size))
        if out is None:
            return data.copy()
        out[:] = data
        return out

    def upload(source, *, framework, index, into=None, pinned=False, non_blocking=False):
        moved.append(("up", source.size))
        into.copy_(torch.from_numpy(source.copy()))
        return into

    monkeypatch.setattr(_staging, "download", download)
    monkeypatch.setattr(_staging, "upload", upload)
    return moved


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_comes_down_through_the_ring_as_it_was(bytewise, name):
    t = TENSORS[name]()
    made = _torch_cuda.to_host(Traits("torch", CUDA0), Step("to_host", "", by="ring"))(t)
    assert_same(made, t)
    assert bytewise == [("down", t.nbytes)]


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_goes_up_through_the_ring_as_it_was_and_its_storage_stays_its_own(bytewise, name):
    t = TENSORS[name]()
    resizable = t.untyped_storage().resizable()
    step = Step("to_device", "", by="ring", after=Traits("torch", CPU))
    made = _torch_cuda.to_device(Traits("torch"), step, Want("torch", CPU))(t)
    assert_same(made, t)
    assert bytewise == [("up", t.nbytes)]
    assert t.untyped_storage().resizable() == resizable
    assert made._version <= 1


def test_the_roads_that_are_not_the_ring_are_torchs_own(bytewise):
    t = torch.arange(6.0, requires_grad=True)
    down = _torch_cuda.to_host(Traits("torch", CUDA0), Step("to_host", ""))(t)
    up = _torch_cuda.to_device(
        Traits("torch"), Step("to_device", "", after=Traits("torch", CPU)), Want("torch", CPU)
    )(t)  # fmt: skip
    assert down.requires_grad
    assert up.requires_grad
    assert bytewise == []


def filled(before, out, target, source):
    fill = _torch_cuda.filler(before, Want("torch", out=out))
    fill(target, source)
    return target


@pytest.mark.parametrize(
    ("before", "out"),
    [
        (Traits("torch", CUDA0, size="large"), Traits("torch", CPU, size="large")),
        (Traits("torch", CPU, size="large"), Traits("torch", CUDA0, size="large")),
    ],
    ids=["down", "up"],
)
def test_filling_over_the_bus_goes_through_the_ring_and_is_seen_by_autograd(bytewise, before, out):
    target = torch.zeros(6)
    version = target._version
    filled(before, out, target, torch.arange(6.0))
    assert target.tolist() == [0, 1, 2, 3, 4, 5]
    assert len(bytewise) == 1
    assert target._version > version


@pytest.mark.parametrize(
    "change",
    [{"size": "medium"}, {"dtype": "float64"}, {"lazy": "conj"}, {"spacing": "strided"}, "other strides"],
    ids=str,
)
def test_filling_is_torchs_own_where_the_bytes_are_not_the_same(bytewise, change):
    before = Traits("torch", CUDA0, size="large")
    source, target = torch.arange(6.0).reshape(2, 3), torch.zeros(2, 3)
    if change == "other strides":
        target = torch.zeros(3, 2).t()
    else:
        before = before._replace(**change)
    filled(before, Traits("torch", CPU, size="large"), target, source)
    assert torch.equal(target, source)
    assert bytewise == []


def test_on_one_side_of_the_bus_there_is_nothing_to_fill_over_it():
    assert _torch_cuda.filler(Traits("torch"), Want("torch", out=Traits("torch"))) is None
    assert _torch_cuda.filler(Traits("torch", CUDA0), Want("torch", out=Traits("torch", CUDA1))) is None


@pytest.mark.parametrize("non_blocking", [False, True])
@pytest.mark.parametrize("by", ["", "pinned"])
def test_a_source_that_is_not_waited_for_is_kept(monkeypatch, by, non_blocking):
    kept, waited = [], []
    monkeypatch.setattr(_lease, "keep", lambda source, number, index: kept.append((source, number, index)))
    mark = types.SimpleNamespace(synchronize=lambda: waited.append(True))
    monkeypatch.setattr(_streams, "current", lambda *a: 0x60)
    monkeypatch.setattr(_stream_order, "mark", lambda *a: mark)
    step = Step("to_device", "", by=by, after=Traits("torch", CPU))
    source = torch.arange(3.0)
    _torch_cuda.to_device(Traits("torch"), step, Want("torch", CPU, non_blocking=non_blocking))(source)
    assert bool(kept) == non_blocking
    assert bool(waited) == (by == "pinned" and not non_blocking), "Tensor.to waits by itself"
    assert not kept or (kept[0][0] is source and kept[0][1:] == (0x60, 0))


def test_pinned_memory_is_handed_out_when_it_is_filled(monkeypatch):
    order = []
    mark = types.SimpleNamespace(synchronize=lambda: order.append("waited"))
    monkeypatch.setattr(_streams, "current", lambda *a: 0x60)
    monkeypatch.setattr(_stream_order, "mark", lambda *a: mark)
    plain = torch.empty_strided
    monkeypatch.setattr(
        torch, "empty_strided", lambda *a, pin_memory, **k: order.append(f"pinned {pin_memory}") or plain(*a, **k)
    )
    t = torch.arange(6.0).reshape(2, 3).t()
    made = _torch_cuda.to_host(Traits("torch", CUDA0), Step("to_host", "", by="pinned"))(t)
    assert_same(made, t)
    assert order == ["pinned True", "waited"]


# CuPy's side, on the fake


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(_staging, "LARGE", 512)
    yield from fake_frameworks.installed(monkeypatch, devices=2, without=["torch"])


ARRAYS = {
    "C": lambda: np.arange(600, dtype=np.float32).reshape(2, 300),
    "F": lambda: np.asfortranarray(np.arange(600, dtype=np.float32).reshape(2, 300)),
    "permuted": lambda: np.arange(600, dtype=np.float32).reshape(2, 30, 10).transpose(1, 2, 0),
    "length-1 axes": lambda: np.arange(300, dtype=np.int16).reshape(1, 300, 1).transpose(2, 1, 0),
    "0-d": lambda: np.array(3.5),
    "empty": lambda: np.zeros((0, 3)),
    "small": lambda: np.arange(6.0).reshape(2, 3).T,
    "bool": lambda: np.arange(600) % 3 == 0,
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_goes_up_and_comes_down_as_it_was(machine, name):
    a = ARRAYS[name]()
    adapter = fake_frameworks.cupy_adapter()
    there = adapter.uploaded(a, 0, pinned=False, non_blocking=False)
    back = adapter.downloaded(there, 0)
    assert (back.dtype, back.shape) == (a.dtype, a.shape)
    assert np.array_equal(back, a)
    assert back.strides == a.strides or name in ("empty", "length-1 axes")
    assert there.strides == a.strides or name in ("empty", "length-1 axes")


@pytest.mark.parametrize("name", ["C", "F", "permuted", "small"])
@pytest.mark.parametrize("same_order", [True, False])
def test_an_array_fills_out_in_whatever_order_its_axes_lie(machine, name, same_order):
    a = ARRAYS[name]()
    adapter = fake_frameworks.cupy_adapter()
    there = adapter.uploaded(a, 0, pinned=False, non_blocking=False)
    out = np.zeros_like(a) if same_order else np.zeros(a.shape[::-1], a.dtype).T
    fill = adapter._filler(Traits("cupy", CUDA0), Want("numpy"))
    assert fill(there, out) is out
    assert np.array_equal(out, a)


@pytest.mark.parametrize(("kind", "copies"), [(0, 3), (1, 1)], ids=["ordinary", "page-locked"])
def test_out_is_filled_directly_where_it_is_page_locked(machine, monkeypatch, kind, copies):
    monkeypatch.setattr(_staging, "SLOT", 1024)
    monkeypatch.setattr(_staging, "_ring", _staging.Ring(_staging.pinned_empty, 4, 1024))
    machine.cupy.cuda.runtime.pointerGetAttributes = lambda address: types.SimpleNamespace(type=kind)
    a = ARRAYS["C"]()
    adapter = fake_frameworks.cupy_adapter()
    there = adapter.uploaded(a, 0, pinned=False, non_blocking=False)
    machine.calls.clear()
    out = np.zeros_like(a)
    adapter._filler(Traits("cupy", CUDA0), Want("numpy"))(there, out)
    assert np.array_equal(out, a)
    assert machine.names().count("memcpy") == copies


def test_a_peer_copy_waits_for_the_source_and_keeps_it(machine):
    adapter = fake_frameworks.cupy_adapter()
    machine.current["cupy"][0], machine.current["cupy"][1] = 0x50, 0x60
    x = machine.cupy.full((2, 3), 1.0)
    step = Step("to_device", "", after=Traits("cupy", CUDA1))
    with machine.hold(0, 0x50):
        made = adapter.performer(step, Traits("cupy", CUDA0), Want("cupy", CUDA1))(x)
        assert made.data.device_id == 1
        machine.run()
        assert _lease.pending() == 1
        used = machine.cupy_memory.used
        del x
        assert machine.cupy_memory.used == used, "the source is kept"
    assert set(made.array().ravel()) == {1.0}
    assert _lease.settle() == 0
    assert machine.device == 0


def test_filling_an_array_on_another_device_waits_for_the_source_and_keeps_it(machine):
    adapter = fake_frameworks.cupy_adapter()
    machine.current["cupy"][0], machine.current["cupy"][1] = 0x50, 0x60
    x = machine.cupy.full((2, 3), 1.0)
    with machine.cupy.cuda.Device(1):
        out = machine.cupy.empty((2, 3))
    step = Step("fill", "", after=Traits("cupy", CUDA1))
    fill = adapter.performer(step, Traits("cupy", CUDA0), Want("cupy", CUDA1, out=Traits("cupy", CUDA1)))
    with machine.hold(0, 0x50):
        assert fill(x, out) is out
        machine.run()
        used = machine.cupy_memory.used
        del x
        assert machine.cupy_memory.used == used, "the source is kept"
    machine.run()
    assert set(out.array().ravel()) == {1.0}
    assert _lease.settle() == 0


def test_a_transfer_leaves_the_current_device_and_streams_as_they_were(machine):
    adapter = fake_frameworks.cupy_adapter()
    a = ARRAYS["C"]()
    up = adapter.performer(Step("to_device", "", after=Traits("cupy", CUDA1)), Traits("numpy"), Want("cupy", CUDA1))
    there = up(a)
    down = adapter.performer(Step("to_host", "", after=Traits("numpy")), Traits("cupy", CUDA1), Want("numpy"))
    assert np.array_equal(down(there), a)
    assert there.data.device_id == 1
    assert (machine.device, machine.current["cupy"][0], machine.current["cupy"][1]) == (0, 1, 1)
