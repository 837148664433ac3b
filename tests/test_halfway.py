"""What is found after a failure or an interrupt halfway, in threads, in forked children, and on several devices."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import fake_frameworks
import numpy as np
import pytest
import torch
from races import SHAPE, Race, crossings, with_adapters
from sources import on_host

import tensorbridge as tb
from tensorbridge import _convert
from tensorbridge._adapters import named
from tensorbridge._array import Device, Traits
from tensorbridge._autograd import _editing
from tensorbridge._background import _async
from tensorbridge._background import _roads as _prefetch_roads
from tensorbridge._cuda import _copiers, _lease, _staging, _stream_order
from tensorbridge._step import Here, Step, Want

named("torch")  # of the real torch: read before a fake stands in its place
SLOT, SLOTS, PART = 1024, 4, 256
CUDA0, CUDA1 = Device("cuda:0"), Device("cuda:1")
WAYS = pytest.mark.parametrize("way", [_staging.fill_host, _staging.fill_device], ids=["down", "up"])
fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(_copiers, "PART", PART)
    yield from fake_frameworks.installed(monkeypatch, devices=2, without=["torch"])


@pytest.fixture
def both(monkeypatch):
    yield from with_adapters(monkeypatch)


@pytest.fixture
def ring(machine):
    return _staging.Ring(_staging.pinned_empty, SLOTS, SLOT)


def some_bytes(n):
    return np.random.default_rng(0).integers(0, 256, n, np.uint8)


def block_with(machine, data):
    block = machine.cupy.empty(data.size, np.uint8)
    block.array()[:] = data
    return block


# The ring


@WAYS
def test_an_interrupt_while_a_slot_is_copied_loses_no_slot(machine, ring, way, monkeypatch):
    """Four lost slots, and the next transfer waits for one for ever."""

    def interrupted(target, source):
        raise KeyboardInterrupt

    data = some_bytes(3 * SLOT)
    for _ in range(SLOTS + 1):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(_copiers, "copying", interrupted)
            way(_staging.link_of("cupy", 0), block_with(machine, data), data.copy(), through=ring)
        machine.run()
        assert len(ring._free) == ring._made


def test_a_slot_whose_borrower_was_ended_before_he_could_give_it_back_is_found(machine, ring):
    """As an interrupt does, at any line: the slot dies with his frame."""
    addresses = []
    for _ in range(SLOTS + 1):
        slot = ring.take(wait=True)
        addresses.append(slot.memory.__array_interface__["data"][0])
        del slot
    assert len(set(addresses)) == 1 == ring._made
    assert len({id(ring.take(wait=False).memory) for _ in range(2)}) == 1


def test_one_that_something_may_still_use_is_not_given_out_again_but_replaced(machine, ring):
    slots = [ring.take(wait=True) for _ in range(SLOTS)]
    used = {id(slot.memory) for slot in slots[:2]}
    slots[0].busy = slots[1].busy = "moving"
    del slots
    again = [ring.take(wait=False) for _ in range(SLOTS)]
    assert None not in again
    assert not used & {id(slot.memory) for slot in again}
    assert used == {id(slot.memory) for slot in ring._lost}  # kept: nobody else gets that memory
    assert ring._made == SLOTS


def test_who_waits_for_a_slot_finds_one_that_nobody_gave_back(machine, ring):
    slots = [ring.take(wait=True) for _ in range(SLOTS)]
    found = []
    waiting = threading.Thread(target=lambda: found.append(ring.take(wait=True)))
    waiting.start()
    slots.pop()
    waiting.join(10)
    assert found


class NoThreads:
    """A pool that can start no thread: its task is in the queue before it says so, and runs once there is a thread."""

    def __init__(self, says):
        self.queue, self.says = [], says

    def submit(self, function, *args):
        self.queue.append(partial(function, *args))
        raise self.says


@WAYS
@pytest.mark.parametrize("says", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
def test_a_task_that_a_pool_could_not_start_copies_nothing_later(machine, ring, way, says, monkeypatch):
    pool = NoThreads(says)
    monkeypatch.setattr(_copiers, "_pool", lambda: pool)
    data = some_bytes(3 * SLOT)
    device, host = block_with(machine, data), data.copy()
    if isinstance(says, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            way(_staging.link_of("cupy", 0), device, host, through=ring)
    else:
        way(_staging.link_of("cupy", 0), device, host, through=ring)
    machine.run()
    assert len(ring._free) == ring._made
    host[:] = 1  # the caller's again
    for slot in ring._free:
        slot.memory[:] = 2  # another transfer's
    assert pool.queue
    for task in pool.queue:
        task()
    assert set(host) == {1}
    assert {int(byte) for slot in ring._free for byte in slot.memory} == {2}


@WAYS
def test_page_locked_memory_that_a_failed_transfer_may_still_use_is_not_given_back(machine, way, monkeypatch):
    made: list[Any] = []

    def allocate(nbytes):
        memory = np.zeros(nbytes, np.uint8)
        made.append(weakref.ref(memory))
        return memory

    ring = _staging.Ring(allocate, SLOTS, SLOT)
    data = some_bytes(SLOT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_staging, "mark", lambda link: (_ for _ in ()).throw(KeyboardInterrupt))
        way(_staging.link_of("cupy", 0), block_with(machine, data), data.copy(), through=ring)
    assert made[0]() is not None
    assert ring._made == 0
    way(_staging.link_of("cupy", 0), block_with(machine, data), data.copy(), through=ring)
    assert len(made) == 2


def test_the_first_transfer_may_be_made_in_an_atexit_handler():
    """Where concurrent.futures can no longer be imported."""
    code = """
import atexit, numpy as np
from tensorbridge._cuda import _copiers
def late():
    target = np.zeros(2 * _copiers.PART, np.uint8)
    for copy in _copiers.copying(target, np.ones(2 * _copiers.PART, np.uint8)):
        copy.result()
    print(bool(target.all()))
atexit.register(late)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("True\n", "")


# Leases


def interrupts(ending):
    raise KeyboardInterrupt


def test_an_interrupt_while_a_lease_ends_does_not_drop_its_owner(both, monkeypatch):
    x, view = Race(both, "cupy", crossings()).lend()
    with monkeypatch.context() as patch:
        patch.setattr(_lease._Ending, "passed", interrupts)
        patch.setattr(sys, "unraisablehook", lambda args: None)
        del x, view
    assert both.cupy_memory.used == 24
    both.run()
    _lease.settle()
    both.run()
    assert _lease.settle() == 0
    assert both.cupy_memory.used == 0


def test_an_interrupt_in_settle_or_keep_does_not_drop_an_owner(both, monkeypatch):
    both.kernel(0, 0x60, lambda: None)
    _lease.keep(object(), 0x60, 0)
    with monkeypatch.context() as patch:
        patch.setattr(_lease._Ending, "passed", interrupts)
        with pytest.raises(KeyboardInterrupt):
            _lease.settle()
        assert _lease.pending() == 1
        with pytest.raises(KeyboardInterrupt):
            _lease.keep(object(), 0x60, 0)
    assert _lease.pending() == 2


def test_two_threads_that_name_streams_of_one_array_at_once_are_both_heard(both, monkeypatch):
    class Late(dict):
        """The other thread lends between the look and the lease."""

        def get(self, key, default=None):
            found = super().get(key, default)
            _lease.lend(base, id(base), base.data, 0x70, 0)
            return found

    base = both.cupy.full(SHAPE, 1.0)
    monkeypatch.setattr(_lease, "_leases", Late())
    tb.used_on(base, 0x80)
    (lease,) = _lease._leases.values()
    assert lease.uses == {(0x70, 0), (0x80, 0)}


def test_an_event_between_two_streams_is_nobody_elses_before_it_is_waited_for(both, monkeypatch):
    """A signal handler, or a finalizer, that crosses between the record and the wait."""
    seen = []
    runtime = both.cupy.cuda.runtime
    record = runtime.eventRecord

    def interrupted(event, number):
        record(event, number)
        if number == 0x50:
            _stream_order.link(0x70, 0x80, 0)

    monkeypatch.setattr(runtime, "eventRecord", interrupted)
    with both.hold(0, 0x50):
        both.kernel(0, 0x50, lambda: seen.append("given"))
        _stream_order.link(0x50, 0x60, 0)
        both.kernel(0, 0x60, lambda: seen.append("read"))
        both.run()
    assert seen == ["given", "read"]


# Forks


def test_a_child_whose_parent_has_lent_nothing_settles_its_own_leases(both, monkeypatch):
    monkeypatch.setattr(_lease, "_disowned", False)
    _lease._forked()
    x, view = Race(both, "cupy", crossings()).lend()
    del x, view
    both.run()
    assert _lease.settle() == 0
    assert both.cupy_memory.used == 0


@fork
def test_a_transfer_of_the_parent_is_not_waited_for_in_a_child():
    code = """
import os
from concurrent.futures import Future
from tensorbridge._background._async import Transfer
transfer = Transfer(Future())
pid = os.fork()
if not pid:
    try:
        transfer.result(5)
    except RuntimeError as error:
        print(error)
    raise SystemExit
os.waitpid(pid, 0)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "the transfer goes on in the parent process" in run.stdout, run.stderr


@fork
def test_a_lock_that_another_thread_held_at_the_fork_is_free_in_the_child():
    code = """
import os, threading
from tensorbridge._cuda import _copiers
with _copiers._lock:  # as another thread would
    pid = os.fork()
    if not pid:
        def copy():
            _copiers._pool()
            print("in", flush=True)
        thread = threading.Thread(target=copy, daemon=True)
        thread.start()
        thread.join(5)
        os._exit(0)
os.waitpid(pid, 0)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "in\n", run.stderr


# Handles


def test_a_worker_that_cannot_be_started_is_an_error_of_the_result(machine, monkeypatch):
    def none(*args):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_async, "_started", none)
    transfer = tb.to_numpy_async(machine.cupy.full((3,), 1.0))
    with pytest.raises(RuntimeError, match="can't start new thread"):
        transfer.result()


def test_a_copy_for_editing_that_could_not_be_made_is_forgotten(monkeypatch):
    monkeypatch.setattr(_editing, "on_host", lambda tensor: False)
    t = torch.zeros(3)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(_editing, "_as_numpy", lambda *args: (_ for _ in ()).throw(MemoryError))
        tb.editing(t).__enter__()
    assert not _editing._open_copies


# prefetch


def test_a_road_that_cannot_be_entered_is_no_end_of_the_source(monkeypatch):
    @contextmanager
    def broken(road) -> Iterator[None]:
        raise RuntimeError("CUDA error: out of memory")
        yield

    monkeypatch.setattr(_prefetch_roads.Host, "entered", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(on_host([np.zeros(3)]))


def test_a_batch_that_is_refused_during_a_capture_comes_after_it(machine):
    machine.current["cupy"][0] = 0x50
    ready = tb.prefetch([np.full(3, i, "f4") for i in range(3)], to="cupy")
    machine.capturing.add((0, 0x50))
    with pytest.raises(tb.DeviceError, match="Take the batch before"):
        next(ready)
    machine.capturing.clear()
    batches = list(ready)
    machine.run()
    assert [batch.array().tolist() for batch in batches] == [[i] * 3 for i in range(3)]


@pytest.mark.parametrize("framework", ["torch", "cupy"])
def test_what_either_framework_has_queued_comes_before_the_first_batch(both, framework):
    """A source of CuPy arrays for torch: they were made on CuPy's stream."""
    both.current["torch"][0], both.current["cupy"][0] = 0x50, 0x60
    for late in (0x50, 0x60):
        made: list[str] = []
        with both.hold(0, late):
            both.kernel(0, late, partial(made.append, "made"))
            road = _prefetch_roads.Cuda(framework, 0)
            both.kernel(0, road.number, partial(made.append, "read"))
            both.run()
        assert made == ["made", "read"]


def test_a_batch_is_kept_for_the_stream_of_its_own_device(machine):
    """CuPy's default stream names no device, and another one is current where the batch is asked for."""
    (batch,) = tb.prefetch([np.ones(3, "f4")], to="cupy", device="cuda:1")
    assert batch.data.device_id == 1
    assert machine.device == 0
    assert [lease.uses for lease in _lease._leases.values()] == [{(1, 1)}]


# What is read of lent memory before its owner's stream writes there again


def test_a_source_is_not_overwritten_before_it_was_copied_to_another_device(machine):
    adapter = fake_frameworks.cupy_adapter()
    machine.current["cupy"][0], machine.current["cupy"][1] = 0x50, 0x60
    x = machine.cupy.full(SHAPE, 1.0)
    machine.run()
    step = Step("to_device", "", after=Traits("cupy", CUDA1))
    with machine.hold(1, 0x60):
        made = adapter.performer(step, Traits("cupy", CUDA0), Want("cupy", CUDA1))(x)
        machine.kernel(0, 0x50, lambda: x.array().fill(9.0))
        machine.run()
    assert set(made.array().ravel()) == {1.0}
    assert machine.device == 0


def test_a_tensor_is_not_overwritten_before_it_was_copied_into_an_array(both):
    both.current["torch"][0], both.current["cupy"][0] = 0x50, 0x60
    t, out = both.torch.full(SHAPE, 1.0), both.cupy.full(SHAPE, 0.0)
    both.run()
    traits = Traits("torch", CUDA0)
    want = Want("cupy", CUDA0, out=Traits("cupy", CUDA0))
    recipe = _convert.recipe_for(traits, want, Here(same_stream=False, gpu="torch", torch=True))
    with both.hold(0, 0x60):
        assert _convert.perform(recipe, t, out) is out
        both.kernel(0, 0x50, lambda: t.array().fill(9.0))
        both.run()
    assert set(out.array().ravel()) == {1.0}
