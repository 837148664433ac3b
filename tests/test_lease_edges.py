"""Leases at the edges: captures, threads, forks, exit, thousands of them, and what `used_on` refuses."""

import gc
import itertools
import os
import subprocess
import sys
import threading
import types
import weakref

import numpy as np
import pytest
from fake_frameworks import cupy_adapter
from races import ON_CUPY, ON_TORCH, SHAPE, Producer, Race, address, crossings, plays, raw, with_adapters

import tensorbridge as tb
from tensorbridge._adapters import _torch_cuda
from tensorbridge._cuda import _lease, _stream_order, _streams


@pytest.fixture
def machine(monkeypatch):
    yield from with_adapters(monkeypatch)


@pytest.fixture
def torch(machine):
    return machine.torch


@pytest.fixture
def cupy(machine):
    return machine.cupy


OWNERS = pytest.mark.parametrize("owner", ["torch", "cupy"])


@OWNERS
def test_a_crossing_looks_at_what_is_pending(machine, owner):
    machine.kernel(0, 0x60, lambda: None)
    _lease.keep(object(), 0x60, 0)
    machine.run()
    assert _lease.pending() == 1
    lent = Race(machine, owner, crossings()).lend()
    assert not _lease.pending()
    assert lent


def test_cupy_is_told_to_order_nothing_as_we_have_done_it(machine):
    Race(machine, "cupy", crossings()).lend()
    assert ("__dlpack__", -1) in machine.calls


# Capture


@OWNERS
def test_a_crossing_during_a_capture_records_and_queries_nothing(machine, owner):
    machine.current["torch"][0] = machine.current["cupy"][0] = 0x60
    x = {"torch": machine.torch, "cupy": machine.cupy}[owner].full(SHAPE, 1.0)
    machine.run()
    machine.capturing.add((0, 0x60))
    machine.calls.clear()
    if owner == "torch":
        view = cupy_adapter().from_torch(ON_TORCH, capturing=True)(x.detach())
    else:
        view = _torch_cuda.from_cupy(ON_CUPY)(x)
    assert set(machine.names()) <= {"is_capturing", "__dlpack__"}
    assert address(view) == address(x)


def test_what_is_released_during_a_capture_waits_and_is_settled_after_it(machine):
    race = Race(machine, "cupy", crossings())
    x, view = race.lend()
    machine.current["torch"][0] = 0x90
    machine.capturing.add((0, 0x90))
    machine.calls.clear()
    del x, view
    assert _lease.pending() == 1
    assert machine.cupy_memory.used == 24
    assert _lease.settle() == 1, "a crossing during the capture leaves it alone"
    assert set(machine.names()) == {"is_capturing"}
    machine.capturing.clear()
    assert _lease.settle() == 1, "now the event is recorded"
    machine.run()
    assert _lease.settle() == 0
    assert machine.cupy_memory.used == 0


def test_a_lease_on_the_stream_that_another_thread_captures_waits_too(machine):
    """Recorded there, its event would become part of the graph."""
    race = Race(machine, "cupy", crossings())
    x, view = race.lend()
    machine.capturing.add((0, race.READING))
    box = [view]
    del x, view
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    assert _lease.pending() == 1
    machine.capturing.clear()
    machine.run()
    _lease.settle()
    machine.run()
    assert _lease.settle() == 0


def test_where_another_threads_capture_forbids_to_ask_the_owner_is_kept(machine):
    race = Race(machine, "cupy", crossings())
    x, view = race.lend()
    machine.capturing.add((0, 0xA0))
    del x, view  # the query fails here: nothing may be raised, and nothing dropped
    assert _lease.pending() == 1
    assert machine.cupy_memory.used == 24
    machine.capturing.clear()
    machine.run()
    assert _lease.settle() == 0


# What is kept, and for how long


def test_a_source_is_kept_while_its_transfer_is_under_way(machine):
    source = Producer()
    alive = weakref.ref(source)
    machine.kernel(0, 0x60, lambda: None)
    _lease.keep(source, 0x60, 0)
    del source
    assert _lease.settle() == 1
    assert alive() is not None
    machine.run()
    assert _lease.settle() == 0
    assert alive() is None


def test_a_slow_stream_does_not_hold_back_the_others(machine):
    for number in (0x60, 0x70):
        machine.kernel(0, number, lambda: None)
        _lease.keep(object(), number, 0)
    with machine.hold(0, 0x60):
        machine.run()
        assert _lease.settle() == 1
    assert _lease.settle() == 0


def test_a_crossing_asks_once_a_stream_and_sees_at_once_what_has_passed(machine):
    """A host that runs far ahead of the device on one stream, and waits for another."""
    with machine.hold(0, 0x60):
        machine.kernel(0, 0x60, lambda: None)
        for _ in range(1000):
            _lease.keep(object(), 0x60, 0)
        machine.kernel(0, 0x70, lambda: None)
        _lease.keep(object(), 0x70, 0)
        machine.run()
        machine.calls.clear()
        assert _lease.settle() == 1000
        assert machine.names().count("query") == 2
    assert _lease.settle() == 0, "once they have passed, all at once"


def test_owners_that_release_others_while_they_are_dropped_are_no_problem(machine):
    class Chain:
        def __init__(self, rest):
            self.rest = rest

        def __del__(self):
            if self.rest:
                _lease.keep(Chain(self.rest - 1), 0x60, 0)

    machine.kernel(0, 0x60, lambda: None)
    _lease.keep(Chain(3), 0x60, 0)
    machine.run()
    counts = list(itertools.takewhile(bool, (_lease.settle() or machine.run() for _ in range(20))))
    machine.run()
    assert len(counts) < 20
    assert _lease.settle() == 0


@OWNERS
def test_there_are_no_reference_cycles(machine, owner):
    """Without the garbage collector everything goes."""
    race = Race(machine, owner, crossings())
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            plays(race)
            race.seen.clear()
        machine.run()
        _lease.settle()
        race.machine.current[owner][0] = race.OWNING
        race.successor()
        assert (machine.torch_memory.used, machine.cupy_memory.used) == (0, 0)
    finally:
        gc.enable()
    assert not _lease._leases
    assert not _lease.pending()


def test_threads_may_lend_release_and_settle_side_by_side(machine):
    race = Race(machine, "cupy", crossings())
    errors = []

    def work():
        try:
            machine.current["cupy"][0], machine.current["torch"][0] = 0x50, 0x60
            for _ in range(50):
                c = machine.cupy.ndarray(SHAPE)
                _torch_cuda.from_cupy(ON_CUPY)(c)
                _lease.settle()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    machine.run()
    while _lease.settle():
        machine.run()
    assert not _lease._leases
    assert race.machine.cupy_memory.used == 0


def test_in_a_forked_child_owners_are_kept_and_cuda_is_not_touched(machine, monkeypatch):
    race = Race(machine, "cupy", crossings())
    x, view = race.lend()
    monkeypatch.setattr(_lease, "_disowned", False)
    _lease._forked()  # what the child does first
    machine.calls.clear()
    del x, view
    assert _lease.settle() == 1
    assert machine.calls == []
    assert machine.cupy_memory.used == 24


def test_at_exit_nothing_is_recorded(tmp_path):
    """A lease that is alive when the interpreter ends, in a process of its own."""
    code = """
import torch, numpy as np
from tensorbridge._cuda import _lease, _stream_order, _streams
_streams.capturing = _stream_order.mark = lambda *a: print("touched")
t = torch.from_numpy(np.zeros(3))
_lease.lend_storage(t, object(), 1, 0)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True)
    assert (run.stdout, run.stderr) == ("", "")


@pytest.mark.parametrize("holder", ["alias", "view", "saved by autograd", "exported by DLPack"])
def test_the_hook_on_a_real_storage_fires_once_when_its_last_holder_is_gone(holder, monkeypatch):
    """On the CPU; test_gpu_facts.py asks the same of a CUDA storage."""
    import torch

    released = []
    monkeypatch.setattr(_streams, "capturing", lambda: False)
    monkeypatch.setattr(_streams, "capturing_on", lambda *use: False)
    done = types.SimpleNamespace(passed=lambda: True)
    monkeypatch.setattr(_stream_order, "mark", lambda number, index: released.append(number) or done)
    t = torch.from_numpy(np.ones(3))
    _lease.lend_storage(t, object(), 0x60, 0)
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    keeps = {
        "alias": lambda t: t.detach(),
        "view": lambda t: t[1:],
        "saved by autograd": lambda t: t * weight,
        "exported by DLPack": np.from_dlpack,
    }
    last = keeps[holder](t)
    del t
    gc.collect()
    assert released == []
    assert last is not None
    del last
    assert released == [0x60]


# used_on: bad input


@pytest.mark.parametrize("x", [np.zeros(3), "text", None])
def test_used_on_takes_tensors_and_cupy_arrays_only(machine, x):
    with pytest.raises(TypeError, match="neither a tensor nor a CuPy array"):
        tb.used_on(x, 0x60)


def test_used_on_refuses_host_memory_and_foreign_memory_whose_owner_is_unknown(machine, torch):
    on_host = torch.full(SHAPE, 1.0)
    on_host.is_cuda, on_host.device = False, "cpu"
    with pytest.raises(ValueError, match="on cpu"):
        tb.used_on(on_host, 0x60)
    by_hand = raw(machine)["cupy"](machine.cupy.full(SHAPE, 1.0))
    with pytest.raises(ValueError, match=r"tensorbridge\.to_torch"):
        tb.used_on(by_hand, 0x60)


def test_used_on_refuses_memory_of_an_allocator_that_hears_of_no_other_stream(machine, torch):
    x = torch.full(SHAPE, 1.0)
    machine.backend = "pluggable"
    with pytest.raises(ValueError, match=r"allocator here \(pluggable\) hears of no other stream"):
        tb.used_on(x, 0x60)
    assert not [call for call in machine.calls if call[0] == "record_stream"]


def test_used_on_takes_an_array_whose_owner_is_a_numpy_array_of_objects(machine, cupy):
    block = cupy.full(SHAPE, 1.0)
    memory = machine.cupy.cuda.UnownedMemory(block.data.ptr, block.nbytes, np.array([block, None], object), 0)
    x = machine.cupy.ndarray(SHAPE, np.float32, machine.cupy.cuda.MemoryPointer(memory, 0))
    tb.used_on(x, 0x60)
    assert any((0x60, 0) in lease.uses for lease in _lease._leases.values())


def test_used_on_checks_the_stream(machine, torch):
    with pytest.raises(ValueError, match="per-thread"):
        tb.used_on(torch.full(SHAPE, 1.0), 2)


def test_a_lease_that_ends_late_takes_no_other_with_it(machine):
    """A key is an identity, which the next borrower may have before the last one's end has been told of."""

    class Hook:
        pass

    first, second = Hook(), Hook()
    _lease.lend(first, 7, "one", 0x50, 0)
    late = _lease._leases[7]
    _lease._leases.pop(7)
    _lease.lend(second, 7, "two", 0x50, 0)
    _lease._released(late)
    assert _lease._leases[7].owner == "two"
    del second
    assert 7 not in _lease._leases


def test_tensors_without_a_storage_of_their_own_have_nothing_to_keep():
    import torch

    for sparse in (torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()):
        with pytest.raises(ValueError, match=r"a sparse tensor has no storage of its own; .* as x\.values\(\)"):
            _lease._tensor_used_on(sparse, 0x50, 0)
    with pytest.raises(ValueError, match=r"^used_on: a tensor of layout torch\._mkldnn has no storage"):
        _lease._tensor_used_on(torch.ones(2, 2).to_mkldnn(), 0x50, 0)
    with pytest.raises(ValueError, match=r"^used_on: inside torch\.func a tensor has no storage of its own"):
        torch.func.vmap(lambda t: _lease._tensor_used_on(t, 0x50, 0))(torch.ones(3, 2))
    _lease._tensor_used_on(torch._efficientzerotensor((3,)), 0x50, 0)
