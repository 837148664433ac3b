"""prefetch to a device: what is called, against a record, and what arrives, on a real one."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import fake_frameworks
import numpy as np
import pytest
import torch
from sources import SOON, on_host

import tensorbridge as tb
from tensorbridge._background import _prefetch, _roads
from tensorbridge._cuda import _lease, _stream_order, _streams

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.mark.parametrize("lies_on", [0, 1])
def test_batch_is_handed_over_to_the_stream_that_asks(monkeypatch, lies_on):
    """Worker: read on the side stream, marked there. Consumer: waits for that mark, keeps the memory for its stream.

    What lies on another device is read after what the caller had queued there, and before what it queues next.
    """
    calls: list[Any] = []
    streams = {"side": 100, "mine": 7}

    def used_on(array: Any, stream: Any) -> None:
        calls.append(("used_on", array, stream))
        raise ValueError("memory of another library: nobody here knows its owner, and it is handed over as it is")

    class Mark:
        def __init__(self, place: int) -> None:
            self.place = place

        def holds_back(self, number: int, index: int) -> None:
            calls.append(("wait", self.place, number))

    monkeypatch.setattr(_streams, "side_stream", lambda index: "side")
    monkeypatch.setattr(_streams, "identify", lambda stream: (streams[stream], 0))
    monkeypatch.setattr(_streams, "current", lambda framework, index: 7)
    monkeypatch.setattr(_streams, "currents", lambda: {0: {7}, 1: {9}})
    monkeypatch.setattr(_streams, "capturing", lambda *indices: False)
    monkeypatch.setattr(_streams, "usable", lambda framework: False)  # CuPy may be loaded, and see one
    monkeypatch.setattr(_roads, "_frameworks", lambda: ["torch"])
    monkeypatch.setattr(_roads, "devices_of", lambda leaves: {lies_on})
    monkeypatch.setattr(_stream_order, "link", lambda *a: calls.append(("link", *a)))
    monkeypatch.setattr(_streams, "use_stream", lambda stream: calls.append(("use", stream)) or tb.copy_guard("allow"))
    monkeypatch.setattr(_stream_order, "mark", lambda number, index: calls.append(("mark", number)) or Mark(len(calls)))
    assert tb.used_on is _lease.used_on  # loaded by now, and not when the other stands in its place
    monkeypatch.setattr(_lease, "used_on", used_on)
    monkeypatch.setattr(_lease, "keep", lambda array, number, index: calls.append(("keep", array, number)))
    monkeypatch.setattr(_roads.Cuda, "on_device", lambda road, batch: [type(batch).__name__])
    monkeypatch.setattr(_roads, "_current_stream", lambda framework, index: "mine")
    monkeypatch.setattr(_roads._leaves, "converted", lambda batch, want: calls.append("convert") or (batch,))
    monkeypatch.setattr(_prefetch, "road_for", lambda want: _roads.Cuda("torch", 0))
    ready = on_host([[1]])
    assert next(ready) == ([1],)
    assert list(ready) == []
    assert calls == [
        ("mark", 9),
        ("link", 7, 100, 0),
        ("use", "side"),
        *[("wait", 1, 7)] * lies_on,  # for the first call, of the caller's stream there
        "convert",
        ("keep", "list", 100),
        ("keep", "list", 100),
        ("mark", 100),
        *[("wait", 7 + lies_on, 7)] * (1 + lies_on),
        ("used_on", "tuple", "mine"),
    ]


@pytest.fixture
def machine(monkeypatch):
    for machine in fake_frameworks.installed(monkeypatch, without=["torch"]):
        machine.patience = SOON
        yield machine


@pytest.mark.parametrize("waits", [True, False])
def test_work_of_the_consumer_waits_for_its_batch_on_a_device(waits, machine, monkeypatch):
    """The transfer has not begun when the batch is taken. Without the wait, a read on another stream is too early."""
    if not waits:
        monkeypatch.setattr(_stream_order.Mark, "holds_back", lambda mark, number, index: None)
    mine, side = 0x50, _streams.side_stream(0).ptr
    machine.current["cupy"][0] = mine
    seen: list[Any] = []
    with machine.hold(0, side):
        ready = tb.prefetch([{"x": np.ones(3, "f4"), "y": np.ones(2, "f4")}], to="cupy")
        batch = next(ready)
        machine.kernel(0, mine, lambda: seen.append(batch["x"].array().tolist()))
        machine.run()
        assert seen == ([] if waits else [[0, 0, 0]])
    assert seen == [[1, 1, 1] if waits else [0, 0, 0]]
    assert list(ready) == []


def test_no_batch_is_handed_over_while_a_graph_is_captured(machine):
    """Its transfer is no part of the graph: waiting for it would break the capture."""
    machine.current["cupy"][0] = 0x50
    ready = tb.prefetch([np.ones(3, "f4")] * 3, to="cupy")
    next(ready)
    machine.capturing.add((0, 0x50))
    machine.calls.clear()
    with pytest.raises(tb.DeviceError, match="Take the batch before"):
        next(ready)
    machine.capturing.clear()
    ready.close()


def test_batches_that_were_on_the_device_are_let_go_once_they_were_read(machine):
    gone: list[Any] = []

    def source() -> Iterator[Any]:
        for i in range(20):
            a = machine.cupy.full((3,), float(i))
            gone.append(weakref.ref(a))
            yield a
            del a
            machine.run()  # what was queued for the batch before is done

    for batch in tb.prefetch(source(), to="cupy"):
        del batch
    kept = [reference() is not None for reference in gone]
    assert kept[:-2] == [False] * 18


def test_a_tensor_without_a_storage_is_left_to_the_conversion_to_refuse(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    sparse = torch.eye(3).to_sparse()
    assert _roads.Cuda.on_device(None, [sparse]) == []


def test_batch_that_is_no_tree_before_its_transform_goes_to_a_device_too(machine):
    strange: Any = [np.ones(3, "f4")]
    strange.append(strange)
    (made,) = tb.prefetch([strange], to="cupy", transform=lambda batch: batch[0])
    machine.run()
    assert made.array().tolist() == [1, 1, 1]
    with pytest.raises(tb.UnsupportedArrayError, match="contains itself"):
        list(tb.prefetch([strange], to="cupy"))


@pytest.mark.gpu
def test_what_has_no_storage_of_its_own_is_refused_or_passed_on():
    with pytest.raises(tb.UnsupportedArrayError, match="sparse"):
        list(tb.prefetch([torch.eye(3).to_sparse().cuda()]))
    (zero,) = tb.prefetch([torch._efficientzerotensor((3,), device="cuda")])
    assert tb.to_numpy(zero).tolist() == [0, 0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("to", ["torch", "cupy"])
def test_batches_arrive_on_the_device_in_order(to):
    rng = np.random.default_rng(0)
    batches = [{"x": rng.random((512, 1024), "f4"), "small": rng.random(7), "n": i} for i in range(12)]
    for i, batch in enumerate(tb.prefetch(batches, to=to)):
        assert batch["n"] == i
        assert np.array_equal(tb.to_numpy(batch["x"]), batches[i]["x"])
        assert np.array_equal(tb.to_numpy(batch["small"]), batches[i]["small"])


@pytest.mark.gpu
def test_source_may_reuse_its_memory():
    buffer = np.empty((1024, 1024), "f4")

    def source() -> Iterator[Any]:
        for i in range(20):
            buffer.fill(i)
            yield buffer

    sums = [batch.double().sum() for batch in tb.prefetch(source(), depth=3)]
    assert [s.item() for s in sums] == [i * 1024 * 1024.0 for i in range(20)]


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_consumer_on_a_side_stream_sees_finished_batches_and_keeps_their_memory(pinned):
    """The consumer's stream is held busy, so that its reads are late; batches are dropped at once."""
    source = [torch.full((1024, 1024), float(i)) for i in range(10)]
    if pinned:
        source = [t.pin_memory() for t in source]
    side = torch.cuda.Stream()
    sums = []
    with torch.cuda.stream(side):
        for batch in tb.prefetch(source, depth=2):
            torch.cuda._sleep(20_000_000)
            sums.append(batch.double().sum())
            del batch
    side.synchronize()
    assert [s.item() for s in sums] == [i * 1024 * 1024.0 for i in range(10)]


@pytest.mark.gpu
def test_current_stream_and_device_are_left_as_they_were():
    before = torch.cuda.current_stream(), torch.cuda.current_device()
    list(tb.prefetch([torch.zeros(1000)] * 5))
    assert (torch.cuda.current_stream(), torch.cuda.current_device()) == before


@pytest.mark.gpu
def test_tensors_already_on_the_device_pass_through_ordered():
    source = [torch.full((1 << 20,), float(i), device="cuda") for i in range(6)]
    made = [batch.sum().item() for batch in tb.prefetch(source, transform=lambda t: t + 1)]
    assert made == [(i + 1) * float(1 << 20) for i in range(6)]
