"""Transfers through the ring, on a fake of CUDA where no byte moves before the host waits for it, or the test says so.

A slot that is read before its event, or filled again before it, shows as wrong bytes here: the copy comes late.
"""

import os
import subprocess
import sys
import threading

import fake_frameworks
import numpy as np
import pytest
from sources import eventually

from tensorbridge import DeviceError
from tensorbridge._cuda import _copiers, _lease, _staging, _streams

SLOT, SLOTS, PART = 1024, 4, 256
SIZES = [1, 255, SLOT - 1, SLOT, SLOT + 1, 3 * SLOT, 4 * SLOT, 4 * SLOT + 1, 23 * SLOT + 17]


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(_copiers, "PART", PART)
    yield from fake_frameworks.installed(monkeypatch, devices=2, without=["torch"])


@pytest.fixture
def link(machine):
    return _staging.link_of("cupy", 0)


@pytest.fixture
def ring(machine):
    return _staging.Ring(_staging.pinned_empty, SLOTS, SLOT)


def some_bytes(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, n, np.uint8)


def block_with(machine, data):
    """A device block that holds these bytes already."""
    block = machine.cupy.empty(data.size, np.uint8)
    block.array()[:] = data
    return block


def is_whole(ring):
    """The thread that has read a slot gives it back, a moment after its bytes are there."""
    return eventually(lambda: len(ring._free) == ring._made <= SLOTS)


# The two ways


@pytest.mark.parametrize("n", SIZES)
def test_a_block_comes_down_whole(machine, link, ring, n):
    data = some_bytes(n)
    out = np.zeros(n, np.uint8)
    _staging.fill_host(link, block_with(machine, data), out, through=ring)
    assert np.array_equal(out, data)
    assert is_whole(ring)


@pytest.mark.parametrize("n", SIZES)
def test_a_block_goes_up_whole_and_its_source_may_be_changed_at_once(machine, link, ring, n):
    data = some_bytes(n)
    source, block = data.copy(), machine.cupy.empty(n, np.uint8)
    _staging.fill_device(link, block, source, through=ring)
    source[:] = 0
    machine.run()
    assert np.array_equal(block.array(), data)
    assert is_whole(ring)


def test_going_up_waits_for_nothing_while_there_are_slots(machine, link, ring):
    _staging.fill_device(link, machine.cupy.empty(SLOTS * SLOT, np.uint8), some_bytes(SLOTS * SLOT), through=ring)
    assert "synchronize" not in machine.names()
    assert [call for call in machine.calls if call[0] == "memcpy"] == [("memcpy", 1, SLOT, (0, 1))] * SLOTS


def test_the_copies_run_on_the_current_stream_of_the_framework(machine, link, ring):
    machine.current["cupy"][0] = 0x60
    _staging.fill_device(link, machine.cupy.empty(SLOT, np.uint8), some_bytes(SLOT), through=ring)
    assert machine.calls[0] == ("memcpy", 1, SLOT, (0, 0x60))
    assert ("record", 0x60) in machine.calls


class HastyRing(_staging.Ring):
    """Gives slots out again without looking at their events."""

    def _idle(self):
        return self._free.popleft() if self._free else None


def test_a_ring_that_does_not_wait_for_events_sends_wrong_bytes(machine, link):
    """The negative control: the fake does see a slot that is filled too early."""
    data = some_bytes(9 * SLOT)
    block = machine.cupy.empty(data.size, np.uint8)
    _staging.fill_device(link, block, data, through=HastyRing(_staging.pinned_empty, SLOTS, SLOT))
    machine.run()
    assert not np.array_equal(block.array(), data)


def test_a_result_that_is_read_without_waiting_has_wrong_bytes(machine, link):
    """The negative control of coming down."""
    data, out = some_bytes(100), np.zeros(100, np.uint8)
    link.down(block_with(machine, data), 0, out)
    assert not np.array_equal(out, data)


def test_the_ring_is_made_once_and_stays_as_large_as_it_is(machine, link, ring):
    for seed in range(3):
        data = some_bytes(11 * SLOT, seed)
        out = np.zeros(data.size, np.uint8)
        _staging.fill_host(link, block_with(machine, data), out, through=ring)
        assert np.array_equal(out, data)
    assert ring._made == SLOTS
    assert is_whole(ring)


def test_a_small_transfer_makes_one_slot_only(machine, link, ring):
    _staging.fill_host(link, block_with(machine, some_bytes(10)), np.zeros(10, np.uint8), through=ring)
    assert ring._made == 1


def test_transfers_of_several_threads_share_the_ring_without_a_deadlock(machine, ring):
    wrong = []

    def work(seed):
        link = _staging.link_of("cupy", 0)
        machine.current["cupy"][0] = 0x100 + 0x10 * seed
        for i in range(4):
            data = some_bytes(7 * SLOT + seed, 10 * seed + i)
            block, back = machine.cupy.empty(data.size, np.uint8), np.zeros(data.size, np.uint8)
            _staging.fill_device(link, block, data, through=ring)
            _staging.fill_host(link, block, back, through=ring)
            if not np.array_equal(back, data):
                wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a deadlock"
    assert wrong == []
    assert is_whole(ring)


# What goes wrong


class Failing(_staging.CupyLink):
    """The n-th transfer fails."""

    def __init__(self, index, n):
        super().__init__(index)
        self.left = n

    def _copy(self, *args):
        self.left -= 1
        if not self.left:
            raise MemoryError("out of memory")
        super()._copy(*args)


@pytest.mark.parametrize("n", [1, 2, 5, 9])
@pytest.mark.parametrize("way", [_staging.fill_host, _staging.fill_device], ids=["down", "up"])
def test_after_a_failed_transfer_the_ring_works_as_before(machine, link, ring, way, n):
    data = some_bytes(9 * SLOT)
    with pytest.raises(MemoryError):
        way(Failing(0, n), block_with(machine, data), data.copy(), through=ring)
    machine.run()
    assert is_whole(ring)
    out = np.zeros(data.size, np.uint8)
    _staging.fill_host(link, block_with(machine, data), out, through=ring)
    assert np.array_equal(out, data)


def test_an_error_of_a_copying_thread_comes_out(machine, link, ring):
    out = np.zeros(3 * SLOT, np.uint8)
    out.setflags(write=False)
    with pytest.raises(ValueError, match="read-only"):
        _staging.fill_host(link, block_with(machine, some_bytes(3 * SLOT)), out, through=ring)
    assert is_whole(ring)


def test_no_page_locked_memory_at_all_is_a_device_error(machine, link, monkeypatch):
    def none(nbytes):
        raise RuntimeError("cudaErrorMemoryAllocation: out of memory")

    monkeypatch.setattr(machine.cupy.cuda, "alloc_pinned_memory", none)
    ring = _staging.Ring(_staging.pinned_empty, SLOTS, SLOT)
    with pytest.raises(DeviceError, match="no page-locked host memory"):
        _staging.fill_host(link, block_with(machine, some_bytes(10)), np.zeros(10, np.uint8), through=ring)
    assert ring._made == 0


def test_without_any_page_locked_memory_the_frameworks_own_copy_does(machine, monkeypatch):
    def none(nbytes):
        raise RuntimeError("cudaErrorMemoryAllocation: out of memory")

    monkeypatch.setattr(machine.cupy.cuda, "alloc_pinned_memory", none)
    values = some_bytes(_staging.LARGE)
    there = _staging.upload(values, framework="cupy", index=0)
    assert np.array_equal(_staging.download(there, framework="cupy", index=0), values)


def test_where_page_locked_memory_runs_out_the_slots_that_there_are_have_to_do(machine, link):
    left = [2]

    def allocate(nbytes):
        left[0] -= 1
        if left[0] < 0:
            raise DeviceError("out of memory")
        return np.zeros(nbytes, np.uint8)

    ring = _staging.Ring(allocate, SLOTS, SLOT)
    data = some_bytes(9 * SLOT)
    out = np.zeros(data.size, np.uint8)
    _staging.fill_host(link, block_with(machine, data), out, through=ring)
    assert np.array_equal(out, data)
    assert ring._made == 2


def test_at_shutdown_the_copies_are_made_without_threads(machine, link, ring, monkeypatch):
    class Closed:
        def submit(self, *args):
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(_copiers, "_pool", Closed)
    data = some_bytes(3 * SLOT)
    out = np.zeros(data.size, np.uint8)
    _staging.fill_host(link, block_with(machine, data), out, through=ring)
    assert np.array_equal(out, data)


def test_a_forked_child_has_no_ring_and_does_not_free_its_parents():
    code = """
import os
from tensorbridge._cuda import _staging as s
class Slot:
    def __del__(self): print("freed")
s._ring = Slot()
pid = os.fork()
if not pid:
    print(s._ring, s._copiers._threads)
    raise SystemExit
os.waitpid(pid, 0)
s._ring = None
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True)
    assert run.stdout == "None None\nfreed\n", run.stderr


# upload and download


LARGE = _staging.LARGE


@pytest.mark.parametrize("n", [1, LARGE - 1, LARGE, LARGE + 3])
def test_download_and_upload_return_the_bytes(machine, n):
    data = some_bytes(n)
    block = _staging.upload(data, framework="cupy", index=1)
    assert block.data.device_id == 1
    back = _staging.download(block, framework="cupy", index=1)
    assert np.array_equal(back, data)
    assert back.base is None, "ordinary memory of its own"
    assert machine.device == 0
    places = {call[3] for call in machine.calls if call[0] == "memcpy"}
    assert places == {(1, 1)}, "on the default stream of the block's device, not of the current one"


def test_small_transfers_take_the_plain_road(machine):
    _staging.download(_staging.upload(some_bytes(100), framework="cupy", index=0), framework="cupy", index=0)
    assert [name for name in machine.names() if name in ("memcpy", "synchronize")] == ["memcpy", "synchronize"] * 2
    assert _staging._ring is None


def test_pinned_memory_is_filled_and_read_directly(machine):
    data = some_bytes(LARGE)
    block = _staging.upload(data, framework="cupy", index=0, pinned=True)
    out = np.zeros(LARGE, np.uint8)
    assert _staging.download(block, framework="cupy", index=0, out=out, pinned=True) is out
    assert np.array_equal(out, data)
    assert [name for name in machine.names() if name in ("memcpy", "synchronize")] == ["memcpy", "synchronize"] * 2
    assert _staging._ring is None


def test_a_pinned_source_is_not_waited_for_with_non_blocking_but_kept(machine):
    source = some_bytes(1000)
    block = _staging.upload(source, framework="cupy", index=0, pinned=True, non_blocking=True)
    assert "synchronize" not in machine.names()
    before = sys.getrefcount(source)
    assert _lease.pending() == 1
    machine.run()
    assert _lease.settle() == 0
    assert sys.getrefcount(source) < before
    assert np.array_equal(block.array(), source)


def test_upload_fills_a_block_that_is_there(machine):
    block = machine.cupy.empty(10, np.uint8)
    assert _staging.upload(some_bytes(10), framework="cupy", index=0, into=block) is block


@pytest.mark.parametrize("call", ["up", "down"])
def test_a_transfer_looks_at_what_is_pending(machine, call):
    _lease.keep(object(), 0x60, 0)
    machine.kernel(0, 0x60, lambda: None)
    _lease.keep(object(), 0x60, 0)
    machine.run()
    if call == "up":
        _staging.upload(some_bytes(10), framework="cupy", index=0)
    else:
        _staging.download(block_with(machine, some_bytes(10)), framework="cupy", index=0)
    assert not _lease.pending()


def test_the_links_call_torch_as_it_is():
    """On host tensors, where copy_ is done at once."""
    import torch

    link = _staging.TorchLink(0)
    block, host = torch.arange(10, dtype=torch.uint8), np.zeros(3, np.uint8)
    link.down(block, 4, host)
    assert host.tolist() == [4, 5, 6]
    link.up(block, 7, host)
    assert block.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6]


def test_the_links_start_copies_and_do_not_wait_for_them(monkeypatch):
    import torch

    asked = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source, **options: asked.append(options))
    link = _staging.TorchLink(0)
    link.down(torch.zeros(3, dtype=torch.uint8), 0, np.zeros(3, np.uint8))
    link.up(torch.zeros(3, dtype=torch.uint8), 0, np.zeros(3, np.uint8))
    assert asked == [{"non_blocking": True}] * 2


def test_pinned_memory_is_asked_of_torch_on_the_host_whatever_the_default_device(monkeypatch):
    import torch

    asked = []
    monkeypatch.setattr(_streams, "_usable", {"torch"})
    monkeypatch.setattr(torch, "empty", lambda n, **k: asked.append(k) or torch.zeros(n, dtype=torch.uint8))
    assert _staging.pinned_empty(5).nbytes == 5
    assert asked == [{"dtype": torch.uint8, "device": "cpu", "pin_memory": True}]
