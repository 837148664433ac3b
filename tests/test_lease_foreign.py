"""Leases on memory that neither torch nor CuPy owns: ordered by us, checked, and kept until the reader is done."""

import contextlib
import gc
import types
import weakref

import numpy as np
import pytest
from fake_frameworks import cupy_adapter
from races import SHAPE, Producer, foreign, with_adapters

import tensorbridge as tb
from tensorbridge._adapters import _torch_cuda
from tensorbridge._cuda import _lease


@pytest.fixture
def machine(monkeypatch):
    yield from with_adapters(monkeypatch)


@pytest.fixture
def torch(machine):
    return machine.torch


@pytest.fixture
def cupy(machine):
    return machine.cupy


@pytest.mark.parametrize("capsule", [None, "a capsule"])
def test_a_foreign_producer_is_kept_until_cupys_stream_is_done_and_is_ordered_by_us(machine, capsule):
    producer = Producer()
    alive = weakref.ref(producer)
    facts = foreign(producer, capsule=capsule, stream=0x70)
    machine.current["cupy"][0] = 0x60
    c = cupy_adapter().imported(facts)
    assert [call for call in machine.calls if call[0] in ("record", "wait")] == [("record", 0x70), ("wait", 0x60)]
    assert (c.data.ptr, c.shape, c.strides) == (facts.address, SHAPE, (12, 4))
    del facts, producer
    with machine.hold(0, 0x60):
        machine.kernel(0, 0x60, lambda: None)
        del c
        gc.collect()
        assert alive() is not None
    assert _lease.settle() == 0
    assert alive() is None


def test_a_further_stream_is_added_to_the_lease_of_a_foreign_array(machine):
    producer = Producer()
    alive = weakref.ref(producer)
    c = cupy_adapter().imported(foreign(producer))
    tb.used_on(c, 0x80)
    del producer
    with machine.hold(0, 0x80):
        machine.kernel(0, 0x80, lambda: None)
        del c
        machine.run()
        _lease.settle()
        assert alive() is not None
    _lease.settle()
    assert alive() is None


def test_a_foreign_capsule_in_torchs_hands_is_ordered_checked_and_kept(machine):
    exporter = machine.cupy.full(SHAPE, 1.0)
    producer = Producer()
    alive = weakref.ref(producer)
    machine.current["torch"][0] = 0x60
    facts = foreign(producer, address=exporter.data.ptr, capsule=exporter.__dlpack__(), stream=0x70)
    machine.calls.clear()
    t = _torch_cuda.imported(facts)
    assert [call for call in machine.calls if call[0] in ("record", "wait")] == [("record", 0x70), ("wait", 0x60)]
    assert t.data_ptr() == exporter.data.ptr
    del facts, producer
    with machine.hold(0, 0x60):
        machine.kernel(0, 0x60, lambda: None)
        del t
        assert alive() is not None
    _lease.settle()
    assert alive() is None
    wrong = foreign(Producer(), address=1 << 20, capsule=exporter.__dlpack__())
    with pytest.raises(tb.ProducerError, match="torch finds other memory"):
        _torch_cuda.imported(wrong)


def torch_that_reads(interface_reader):
    """What `_torch_cuda` asks of torch for an array interface."""
    device = types.SimpleNamespace(device=lambda index: contextlib.nullcontext())
    return types.SimpleNamespace(as_tensor=interface_reader, cuda=device)


def test_an_array_interface_in_torchs_hands_is_shown_as_it_was_read_and_kept(machine, monkeypatch):
    exporter = machine.cupy.full(SHAPE, 1.0)
    seen = []

    def read(interface, device):
        seen.append((interface.__cuda_array_interface__, device))
        return exporter.__dlpack__().consumed(machine)

    monkeypatch.setattr(_torch_cuda, "torch", torch_that_reads(read))
    producer = Producer()
    alive = weakref.ref(producer)
    t = _torch_cuda.imported(foreign(producer, address=exporter.data.ptr))
    interface, device = seen.pop()
    assert (interface["data"], interface["shape"], interface["strides"]) == ((exporter.data.ptr, False), SHAPE, (12, 4))
    assert (interface["typestr"], device) == ("<f4", "cuda:0")
    del producer
    assert alive() is not None
    del t
    machine.run()
    _lease.settle()
    assert alive() is None


def test_memory_that_only_its_capsule_holds_is_kept_until_torchs_stream_is_done(machine):
    exporter = machine.cupy.full(SHAPE, 1.0)
    machine.run()
    capsule, address, alive = exporter.__dlpack__(), exporter.data.ptr, weakref.ref(exporter)
    machine.current["torch"][0] = 0x60
    t = _torch_cuda.imported(foreign(Producer(), address=address, capsule=capsule))
    del exporter, capsule
    with machine.hold(0, 0x60):
        machine.kernel(0, 0x60, lambda: None)
        del t
        gc.collect()
        assert alive() is not None
    _lease.settle()
    assert alive() is None


def test_a_foreign_array_with_negative_strides_spans_all_of_its_memory(machine):
    memory = np.arange(6, dtype=np.float32)[::-1]
    producer = types.SimpleNamespace(memory=memory)
    facts = foreign(producer, shape=(6,), strides=(-4,))
    c = cupy_adapter().imported(facts)
    assert (c.data.ptr, c.data.mem.ptr, c.data.mem.size) == (facts.address, facts.address - 20, 24)
