"""`to_numpy_async`: done at once on the host; on a fake of CUDA, nothing is handed out too early or freed too soon."""

import asyncio
import gc
import threading
import weakref
from pathlib import Path

import fake_frameworks
import numpy as np
import pytest

import tensorbridge as tb
from tensorbridge._background import _async
from tensorbridge._cuda import _lease, _staging, _stream_order, _streams

MINE = 0x50


@pytest.fixture
def machine(monkeypatch):
    for machine in fake_frameworks.installed(monkeypatch, without=["torch"]):
        machine.patience = 30
        machine.current["cupy"][0] = MINE
        yield machine


@pytest.fixture
def late(machine):
    """An array whose values are written by work that has not begun."""
    machine.held.add((0, MINE))
    return machine.cupy.full((2, 3), 7.0)


def let_go(machine):
    machine.held.discard((0, MINE))


def side(machine):
    return _streams.side_stream(0).ptr


# On the host


def test_on_the_host_it_is_done_at_once_and_shares():
    a = np.arange(3.0)
    transfer = tb.to_numpy_async(a)
    assert transfer.done()
    assert np.shares_memory(transfer.result(), a)
    assert transfer.result() is transfer.result(timeout=0)
    assert "done" in repr(transfer)


def test_a_tensor_and_a_tree_are_converted_as_ever():
    import torch

    t = torch.ones(2)
    made = tb.to_numpy_async({"t": t, "rest": ("text", [np.zeros(1)])}).result()
    assert tb.shares_memory(made["t"], t)
    assert made["rest"][0] == "text"
    assert tb.shares_memory(tb.to_numpy_async(t, pinned=True).result(), t), "there is nothing to transfer"
    assert tb.to_numpy_async(2.5).result() == 2.5


@pytest.mark.parametrize("x", ["text", object(), np.array([None]), [np.ma.masked_array([1])]])
def test_errors_come_from_result_and_each_time(x):
    transfer = tb.to_numpy_async(x)
    assert transfer.done()
    for _ in range(2):
        with pytest.raises(tb.UnsupportedArrayError):
            transfer.result()


def test_an_interrupt_is_no_error_of_the_transfer(monkeypatch):
    def interrupted(x):
        raise KeyboardInterrupt

    monkeypatch.setattr(_async._api, "to_numpy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tb.to_numpy_async(np.zeros(1))


def test_a_timeout_of_the_conversion_itself_is_not_taken_for_one_of_the_wait(monkeypatch):
    def slow(x):
        raise TimeoutError("its own")

    monkeypatch.setattr(_async._api, "to_numpy", slow)
    with pytest.raises(TimeoutError, match="its own"):
        tb.to_numpy_async(np.zeros(1)).result(timeout=1)


def test_elements_that_numpy_does_not_have_are_left_to_be_refused():
    import torch

    info = tb.describe(torch.zeros(3, dtype=torch.uint8))._replace(dtype="float4_e2m1fn_x2")
    assert _async._laid_out(np.zeros(3, np.uint8), info) is None


def test_a_list_is_a_tree():
    assert tb.to_numpy_async([1, 2]).result() == tb.tree.to_numpy([1, 2]) == [1, 2]
    assert tb.to_numpy_async(3).result().shape == ()


def test_what_is_done_or_refused_can_be_awaited():
    async def awaited(x):
        return await tb.to_numpy_async(x)

    a = np.zeros(2)
    assert np.shares_memory(asyncio.run(awaited(a)), a)
    with pytest.raises(tb.UnsupportedArrayError):
        asyncio.run(awaited(np.array(["text"])))


def test_awaiting_does_not_hold_up_the_loop_and_giving_up_does_not_cancel_the_transfer(machine, late):
    async def main():
        transfers = [tb.to_numpy_async(late), tb.to_numpy_async(late)]  # the second waits for its turn
        for transfer in transfers:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(transfer, 0.05)
            assert not transfer.done()
        let_go(machine)
        return [await transfer for transfer in transfers]

    for result in asyncio.run(main()):
        assert result.tolist() == [[7.0] * 3] * 2


@pytest.mark.parametrize("pinned", [None, 1, "yes"])
def test_pinned_is_a_bool(pinned):
    with pytest.raises(TypeError, match="pinned is True or False"):
        tb.to_numpy_async(np.zeros(1), pinned=pinned)


# From a device


@pytest.mark.parametrize("pinned", [False, True])
def test_the_array_is_handed_out_with_its_bytes_and_not_before(machine, late, pinned):
    transfer = tb.to_numpy_async(late, pinned=pinned)
    assert not transfer.done()
    assert "under way" in repr(transfer)
    with pytest.raises(TimeoutError, match=r"not done after 0\.05 s"):
        transfer.result(timeout=0.05)
    let_go(machine)
    assert set(transfer.result(timeout=30).ravel()) == {7.0}
    assert transfer.done()


def test_without_the_order_it_reads_too_early(machine, late, monkeypatch):
    """The negative control: the side stream has to wait for the caller's."""
    monkeypatch.setattr(_stream_order, "link", lambda *args: None)
    assert set(tb.to_numpy_async(late).result(timeout=30).ravel()) == {0.0}


def test_it_runs_on_the_side_stream_in_a_thread_of_its_own(machine):
    c = machine.cupy.full((2, 3), 7.0)
    before = threading.active_count()
    tb.to_numpy_async(c).result(timeout=30)
    copies = [call for call in machine.calls if call[0] == "memcpy"]
    assert [call[3] for call in copies] == [(0, side(machine))]
    assert machine.current["cupy"][0] == MINE
    assert threading.active_count() <= before + 1


def test_the_source_may_be_dropped_at_once_and_is_let_go_afterwards(machine):
    machine.held.add((0, MINE))
    source = machine.cupy.full((2, 3), 7.0)
    alive = weakref.ref(source)
    transfer = tb.to_numpy_async(source)
    del source
    gc.collect()
    assert alive() is not None
    let_go(machine)
    assert set(transfer.result(timeout=30).ravel()) == {7.0}
    tb.to_numpy_async(machine.cupy.full((1,), 0.0)).result(timeout=30)  # the worker has turned to something else
    gc.collect()
    assert alive() is None


def test_the_handle_may_be_dropped_at_once(machine, late):
    tb.to_numpy_async(late)
    let_go(machine)
    assert set(tb.to_numpy_async(machine.cupy.full((3,), 1.0)).result(timeout=30)) == {1.0}


def test_errors_of_the_worker_come_from_result(machine, monkeypatch):
    def none(nbytes):
        raise RuntimeError("cudaErrorMemoryAllocation: out of memory")

    monkeypatch.setattr(machine.cupy.cuda, "alloc_pinned_memory", none)
    transfer = tb.to_numpy_async(machine.cupy.full((3,), 1.0), pinned=True)
    with pytest.raises(tb.DeviceError, match="no page-locked host memory"):
        transfer.result(timeout=30)


def test_a_guard_holds_for_the_worker_even_when_its_block_is_over(machine, late):
    with tb.copy_guard("error", kinds=["d2h"]):
        first = tb.to_numpy_async(late)
        second = tb.to_numpy_async(late)
    let_go(machine)
    for transfer in (first, second):
        with pytest.raises(tb.CopyRequiredError):
            transfer.result(timeout=30)
    assert set(tb.to_numpy_async(late).result(timeout=30).ravel()) == {7.0}


def test_trace_and_warning_name_the_line_that_asked(machine, late):
    with tb.trace() as seen, tb.copy_guard("warn"), pytest.warns(tb.CopyWarning) as warned:
        transfer = tb.to_numpy_async(late)  # asked here
        let_go(machine)
        transfer.result(timeout=30)
    lines = Path(__file__).read_text().splitlines()
    here = next(i for i, line in enumerate(lines, 1) if line.endswith("# asked here"))
    assert [event.where for event in seen.events] == [f"{__file__}:{here}"]
    assert [(w.filename, w.lineno) for w in warned] == [(__file__, here)]


@pytest.mark.parametrize("when", ["capturing", "forked"])
def test_in_a_capture_and_in_a_fork_it_is_refused_before_cuda_is_touched(machine, monkeypatch, when):
    c = machine.cupy.full((3,), 1.0)
    monkeypatch.setattr(_streams, when, lambda *indices: True)
    machine.calls.clear()
    transfer = tb.to_numpy_async(c)
    with pytest.raises(tb.DeviceError, match="captured" if when == "capturing" else "forked"):
        transfer.result()
    assert machine.calls == []


# Into page-locked memory


def test_pinned_results_of_a_tree_are_views_of_one_block(machine, monkeypatch):
    blocks = []
    plain = _staging.pinned_empty
    monkeypatch.setattr(_staging, "pinned_empty", lambda n: blocks.append(plain(n)) or blocks[-1])
    a, b = machine.cupy.full((2, 3), 1.0), machine.cupy.full((5,), 2.0)
    host = np.arange(2.0)
    made = tb.to_numpy_async({"a": a, "b": b, "again": a, "host": host, "text": "x"}, pinned=True).result(timeout=30)
    (block,) = blocks
    assert np.array_equal(made["a"], np.ones((2, 3)))
    assert np.array_equal(made["b"], np.full(5, 2.0))
    assert made["again"] is made["a"]
    assert made["host"] is host or np.shares_memory(made["host"], host)
    assert made["text"] == "x"
    assert np.shares_memory(made["a"], block)
    assert np.shares_memory(made["b"], block)
    assert not np.shares_memory(made["a"], made["b"])
    assert block.nbytes == 2 * _async.ALIGN


class Maker:
    """Makes its array anew whenever it is asked, so that no address tells two of them apart."""

    def __init__(self, value):
        self.value = value

    def __array__(self, dtype=None, copy=None):
        return np.full(3, self.value)


@pytest.mark.parametrize("pinned", [False, True])
def test_what_lies_on_the_host_beside_device_memory_stays_itself(machine, pinned):
    a = np.zeros(3)
    frozen = a.view()
    frozen.flags.writeable = False
    tree = [machine.cupy.full((3,), 9.0), a, frozen, Maker(1.0), Maker(2.0)]
    made = tb.to_numpy_async(tree, pinned=pinned).result(timeout=30)
    assert [x[0] for x in made] == [9.0, 0.0, 0.0, 1.0, 2.0]
    assert [made[1].flags.writeable, made[2].flags.writeable] == [True, False]


@pytest.mark.parametrize("name", ["transposed", "0-d", "empty", "plain"])
def test_pinned_results_keep_the_memory_order(machine, name):
    arrays = {
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "0-d": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "plain": np.arange(6, dtype=np.float32),
    }
    a = arrays[name]
    there = fake_frameworks.cupy_adapter().uploaded(a, 0, pinned=False, non_blocking=False)
    made = tb.to_numpy_async(there, pinned=True).result(timeout=30)
    assert made.shape == a.shape
    assert np.array_equal(made, a)
    assert made.strides == a.strides or name == "empty"


def test_nothing_is_left_behind(machine):
    for _ in range(5):
        tb.to_numpy_async([machine.cupy.full((9,), 1.0)] * 3, pinned=True).result(timeout=30)
    gc.collect()
    tb.to_numpy_async(machine.cupy.full((1,), 0.0)).result(timeout=30)
    gc.collect()
    assert machine.cupy_memory.used <= 4
    assert not _lease._leases
    assert _lease.settle() == 0


def test_an_error_keeps_nothing_alive_until_the_collector_comes():
    """Its traceback would hold the frame that raised it, the frame the transfer, and the transfer the error."""

    class Failing:
        def __array__(self, dtype=None, copy=None):
            raise ValueError("broken")

    gc.collect()
    gc.disable()
    try:
        source = Failing()
        alive = weakref.ref(source)
        transfer = tb.to_numpy_async(source)
        with pytest.raises(tb.ProducerError):
            transfer.result()
        del source, transfer
        assert alive() is None
    finally:
        gc.enable()
