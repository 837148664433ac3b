"""A consumer on another stream starts after the producer, the host waits for nothing, and all is left as found."""

import threading

import numpy as np
import pytest
from holding import twice

import tensorbridge as tb
from tensorbridge._cuda import _streams

pytestmark = pytest.mark.gpu

N = 1 << 20
ON_DEVICE = 3  # cudaMemcpyDeviceToDevice


class Crossing:
    """A producer that is held, and a consumer that copies what it got, once for each direction."""

    def __init__(self, torch, cupy, giver, gate):
        self.torch, self.cupy, self.giver = torch, cupy, giver
        self.torch_stream = torch.cuda.Stream()
        self.cupy_stream = gate.beside(lambda: cupy.cuda.Stream(non_blocking=True), self.torch_stream)
        self.producing = self.torch_stream if giver == "torch" else self.cupy_stream

    def body(self, gate, cross):
        """The values that the consumer saw, and whether it was still waiting while the producer was held."""

        def run(really):
            if self.giver == "torch":
                x, out = self.torch.zeros(N, device="cuda"), self.cupy.zeros(N, self.cupy.float32)
            else:
                x, out = self.cupy.zeros(N, self.cupy.float32), self.torch.zeros(N, device="cuda")
            self.torch.cuda.synchronize()
            with self.torch.cuda.stream(self.torch_stream), self.cupy_stream, gate.shut(really=really):
                gate.put_on(self.producing)
                x.fill_(1.0) if self.giver == "torch" else x.fill(1.0)
                y = cross(x)
                if self.giver == "torch":
                    self.cupy.cuda.runtime.memcpyAsync(
                        out.data.ptr, y.data.ptr, y.nbytes, ON_DEVICE, self.cupy_stream.ptr
                    )
                    event = self.cupy_stream.record(self.cupy.cuda.Event(disable_timing=True))
                    done = lambda: event.done
                else:
                    out.copy_(y)
                    event = self.torch_stream.record_event()
                    done = event.query
                if really and cross in RAW:
                    event.synchronize()  # it waits for nothing that is held
                waiting = not done()
            host = out.get() if self.giver == "torch" else out.cpu().numpy()
            return set(np.unique(host).tolist()), waiting

        return twice(run)


def by_interface_to_cupy(t):
    import cupy

    return cupy.asarray(t)  # __cuda_array_interface__ of torch names no stream


def by_interface_to_torch(c):
    import torch

    return torch.as_tensor(c, device="cuda")  # torch ignores the stream that it names


RAW = [by_interface_to_cupy, by_interface_to_torch]


@pytest.fixture(params=["torch", "cupy"])
def crossing(request, torch, cupy, gate):
    return Crossing(torch, cupy, request.param, gate)


def test_by_hand_the_consumer_reads_before_the_producer_has_written(crossing, gate):
    """The negative control: the roads that the documentation of both libraries teaches."""
    raw = RAW[0] if crossing.giver == "torch" else RAW[1]
    assert crossing.body(gate, raw) == ({0.0}, False)


def test_the_consumer_waits_for_the_producer_and_the_host_for_neither(crossing, gate):
    cross = tb.to_cupy if crossing.giver == "torch" else tb.to_torch
    assert crossing.body(gate, cross) == ({1.0}, True)


def test_our_own_kernels_before_the_crossing_are_waited_for_too(torch, cupy, gate):
    """A reversed array is packed on CuPy's stream, behind what holds it."""
    giving, taking = cupy.cuda.Stream(non_blocking=True), torch.cuda.Stream()

    def body(really):
        c, out = cupy.arange(N, dtype=cupy.float32), torch.zeros(N, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(taking), giving, gate.shut(really=really):
            gate.put_on(giving)
            out.copy_(tb.to_torch(c[::-1]))
        return out.cpu().numpy()

    assert np.array_equal(twice(body), np.arange(N, dtype=np.float32)[::-1])


def test_streams_that_are_one_by_raw_handle_are_not_ordered(torch, cupy):
    t = torch.ones(3, device="cuda")
    with tb.use_stream(torch.cuda.Stream()):
        assert [step.op for step in tb.plan(t, "cupy").steps] == ["detach", "share"]
    with cupy.cuda.Stream(non_blocking=True):
        assert "order" in [step.op for step in tb.plan(t, "cupy").steps]


def test_both_default_streams_are_one(torch):
    assert _streams.same(0)
    assert "order" not in [step.op for step in tb.plan(torch.ones(3, device="cuda"), "cupy").steps]


# use_stream


STREAMS = {
    "torch": lambda torch, cupy: torch.cuda.Stream(),
    "torch default": lambda torch, cupy: torch.cuda.default_stream(),
    "CuPy": lambda torch, cupy: cupy.cuda.Stream(non_blocking=True),
    "CuPy null": lambda torch, cupy: cupy.cuda.Stream.null,
    "handle": lambda torch, cupy: torch.cuda.Stream().cuda_stream,
    "0": lambda torch, cupy: 0,
    "1": lambda torch, cupy: 1,
}


@pytest.mark.parametrize("name", STREAMS)
def test_use_stream_is_current_in_both_and_kernels_of_both_run_on_it(torch, cupy, gate, unchanged, name):
    stream = STREAMS[name](torch, cupy)
    number, _ = _streams.identify(stream)
    with tb.use_stream(stream):
        assert (torch.cuda.current_stream().cuda_stream or 1) == number
        assert (cupy.cuda.get_current_stream().ptr or 1) == number
        t = torch.arange(N, device="cuda", dtype=torch.float64)  # in which the sum is exact in any order
        c = tb.to_cupy(t)
        c += 1
        total = float(tb.to_torch(c).sum())
    assert total == N * (N + 1) / 2


def test_use_stream_holds_through_a_with_block_of_cupys(torch, cupy, unchanged):
    stream = torch.cuda.Stream()
    with tb.use_stream(stream):
        with cupy.cuda.Stream(non_blocking=True):
            pass
        assert cupy.cuda.get_current_stream().ptr == stream.cuda_stream


def test_use_stream_restores_after_an_error_and_a_stream_made_current_by_use(torch, cupy, unchanged):
    mine = cupy.cuda.Stream(non_blocking=True)
    before = cupy.cuda.get_current_stream()
    mine.use()
    with pytest.raises(ZeroDivisionError), tb.use_stream(torch.cuda.Stream()):
        raise ZeroDivisionError
    assert cupy.cuda.get_current_stream() is mine
    before.use()


def test_a_stream_of_torchs_pool_is_not_destroyed_with_its_cupy_wrapper(torch, cupy):
    stream = torch.cuda.Stream()
    for _ in range(3):
        with tb.use_stream(stream):
            cupy.zeros(3)
    with torch.cuda.stream(stream):
        assert torch.ones(3, device="cuda").sum().item() == 3


@pytest.mark.parametrize("stream", [2, -1, None, "cuda"])
def test_what_is_no_stream_is_refused_and_nothing_changes(torch, cupy, unchanged, stream):
    with pytest.raises((TypeError, ValueError)):
        tb.use_stream(stream).__enter__()


# What waits for what


def test_to_numpy_waits_for_the_producer(torch, gate, whole_ring):
    stream = torch.cuda.Stream()

    def body(really):
        t = torch.zeros(N, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream), gate.shut(really=really):
            gate.put_on(stream)
            t.fill_(1.0)
            opener = threading.Timer(0.2, gate.open)
            opener.start()
            found = tb.to_numpy(t)
            opener.join()
        return set(np.unique(found).tolist())

    assert twice(body) == {1.0}


@pytest.mark.parametrize("n", [N // 4, 16 * N], ids=["plain", "ring"])
@pytest.mark.parametrize("framework", ["torch", "cupy"])
def test_to_numpy_waits_for_its_own_stream_and_not_for_the_device(torch, cupy, gate, whole_ring, framework, n):
    held = torch.cuda.Stream()
    mine = gate.beside(torch.cuda.Stream, held)

    def body(really):
        with tb.use_stream(mine):
            x = torch.ones(n, device="cuda") if framework == "torch" else cupy.ones(n, cupy.float32)
            torch.cuda.synchronize()
            with gate.shut(really=really):
                gate.put_on(held)
                found = tb.to_numpy(x)
                assert not really or not held.query(), "it waited for the device"
        return set(np.unique(found).tolist())

    assert twice(body) == {1.0}


# -- What is read late, and written to again by its owner


class Named:
    """CuPy's memory as another library shows it: by the array interface, which names the stream it was made on."""

    def __init__(self, array):
        self.array, self.__cuda_array_interface__ = array, array.__cuda_array_interface__


READS = {
    "a copy": lambda p, torch: tb.to_torch(p, copy=True),
    "a cast": lambda p, torch: tb.to_torch(p, dtype="float64"),
    "into out": lambda p, torch: tb.to_torch(p, out=torch.empty(N, device="cuda")),
    "in a tree": lambda p, torch: tb.tree.to_torch([p], copy=True)[0],
    "into out, in a tree": lambda p, torch: tb.tree.to_torch([p], out=[torch.empty(N, device="cuda")])[0],
}


@pytest.mark.parametrize("name", READS)
def test_what_a_foreign_producer_writes_next_is_behind_the_copy_of_what_it_had(torch, cupy, gate, name):
    reading = torch.cuda.Stream()
    making = gate.beside(lambda: cupy.cuda.Stream(non_blocking=True), reading)

    def body(really):
        with making:
            c = cupy.full(N, 1.0, cupy.float32)
            producer = Named(c)
        torch.cuda.synchronize()
        with torch.cuda.stream(reading), gate.shut(really=really):
            gate.put_on(reading)
            found = READS[name](producer, torch)
            cupy.cuda.runtime.memsetAsync(c.data.ptr, 0, c.nbytes, making.ptr)
            assert not really or not reading.query(), "blind"
        return set(found.unique().tolist())

    assert twice(body) == {1.0}


def test_by_hand_it_is_not(torch, cupy, gate):
    reading = torch.cuda.Stream()
    making = gate.beside(lambda: cupy.cuda.Stream(non_blocking=True), reading)

    def body(really):
        with making:
            c = cupy.full(N, 1.0, cupy.float32)
        torch.cuda.synchronize()
        with torch.cuda.stream(reading), gate.shut(really=really):
            gate.put_on(reading)
            found = torch.as_tensor(c, device="cuda").clone()
            cupy.cuda.runtime.memsetAsync(c.data.ptr, 0, c.nbytes, making.ptr)
            making.synchronize()
        return set(found.unique().tolist())

    assert twice(body) == {0.0}


def test_the_owner_of_collated_samples_writes_behind_the_batch(torch, cupy, gate):
    reading = torch.cuda.Stream()
    making = gate.beside(lambda: cupy.cuda.Stream(non_blocking=True), reading)

    def body(really):
        with making:
            samples = [cupy.full(N, float(i), cupy.float32) for i in (1, 2, 3)]
        torch.cuda.synchronize()
        with torch.cuda.stream(reading), making, gate.shut(really=really):
            gate.put_on(reading)
            batch = tb.collate(samples)
            for c in samples:
                cupy.cuda.runtime.memsetAsync(c.data.ptr, 0, c.nbytes, making.ptr)
        return batch[:, 0].tolist()

    assert twice(body) == [1.0, 2.0, 3.0]


class Passes:
    """Says nothing of a stream: its work is on whatever stream its library had current."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)


@pytest.mark.parametrize("show", [Passes, Named])
@pytest.mark.parametrize("maker", ["torch", "cupy"])
def test_a_foreign_producer_is_read_in_the_background_behind_what_the_caller_had_queued(torch, cupy, gate, show, maker):
    stream = cupy.cuda.Stream(non_blocking=True) if maker == "cupy" else torch.cuda.Stream()
    current = (lambda: stream) if maker == "cupy" else (lambda: torch.cuda.stream(stream))

    def body(really):
        with current():
            x = cupy.zeros(N, cupy.float32) if maker == "cupy" else torch.zeros(N, device="cuda")
            torch.cuda.synchronize()
            with gate.shut(really=really):
                gate.put_on(stream)
                x += 1
                transfer = tb.to_numpy_async(show(x))
            return set(np.unique(transfer.result(30)).tolist())

    assert twice(body) == {1.0}


@pytest.mark.parametrize("options", [{"to": "numpy"}, {"device": "cpu"}, {"device": "cuda"}], ids=str)
@pytest.mark.parametrize("maker", ["torch", "cupy"])
def test_batches_on_the_device_are_read_ahead_behind_what_the_caller_had_queued(torch, cupy, gate, options, maker):
    stream = cupy.cuda.Stream(non_blocking=True) if maker == "cupy" else torch.cuda.Stream()
    current = (lambda: stream) if maker == "cupy" else (lambda: torch.cuda.stream(stream))
    torch.cuda.synchronize()

    def body(really):
        with current():
            x = cupy.zeros(N, cupy.float32) if maker == "cupy" else torch.zeros(N, device="cuda")
            torch.cuda.synchronize()
            with gate.shut(really=really):
                gate.put_on(stream)
                x += 1
                ready = tb.prefetch([{"x": x}], **options)
            (batch,) = ready
            return set(np.unique(tb.to_numpy(batch["x"])).tolist())

    assert twice(body) == {1.0}


@pytest.mark.parametrize("show", [Passes, Named])
@pytest.mark.parametrize("options", [{"to": "numpy"}, {"device": "cpu"}, {"device": "cuda"}], ids=str)
def test_foreign_producers_are_read_ahead_behind_what_the_caller_had_queued(torch, cupy, gate, options, show):
    stream = torch.cuda.Stream()

    def body(really):
        with torch.cuda.stream(stream):
            x = torch.zeros(N, device="cuda")
            torch.cuda.synchronize()
            with gate.shut(really=really):
                gate.put_on(stream)
                x += 1
                ready = tb.prefetch([{"x": show(x)}], **options)
            (batch,) = ready
            return set(np.unique(tb.to_numpy(batch["x"])).tolist())

    assert twice(body) == {1.0}


@pytest.mark.parametrize("late", ["torch", "cupy"])
@pytest.mark.parametrize("convert", [tb.tree.to_numpy, lambda x: tb.tree.to_torch(x, copy=True)], ids=["down", "copy"])
def test_leaves_on_one_memory_wait_for_the_stream_of_each_library(torch, cupy, gate, convert, late):
    mine = torch.cuda.Stream()
    theirs = gate.beside(lambda: cupy.cuda.Stream(non_blocking=True), mine)

    def body(really):
        with torch.cuda.stream(mine), theirs:
            t = torch.zeros(N, device="cuda")
            c = tb.to_cupy(t)
            torch.cuda.synchronize()
            torch.cuda._sleep(20_000_000) if late == "torch" else gate_sleep(torch, theirs)
            t.fill_(1) if late == "torch" else c.fill(1)
            found = [convert(leaves) for leaves in ({"t": t, "c": c}, {"c": c, "t": t})]
        torch.cuda.synchronize()
        name = "t" if late == "torch" else "c"
        return {float(np.unique(tb.to_numpy(leaves[name]))[0]) for leaves in found}

    assert twice(body) == {1.0}


def gate_sleep(torch, stream):
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
        torch.cuda._sleep(20_000_000)


def test_the_stream_of_the_caller_may_be_dropped_before_the_batches_are_read(torch, cupy):
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        ready = tb.prefetch((torch.full((3,), float(i), device="cuda") for i in range(6)), device="cpu", depth=1)
    found = [next(ready)]
    del stream
    found += ready
    assert [t[0].item() for t in found] == [0, 1, 2, 3, 4, 5]


def test_the_stream_that_a_sample_names_waits_for_the_batch(torch, cupy, gate):
    class Array(cupy.ndarray):
        pass

    reading = torch.cuda.Stream()
    making = gate.beside(lambda: cupy.cuda.Stream(non_blocking=True), reading)

    for show in (Named, lambda c: c.view(Array)):

        def body(really, show=show):
            with making:
                arrays = [cupy.full(N, float(i), cupy.float32) for i in (1, 2, 3)]
                samples = [show(c) for c in arrays]
            torch.cuda.synchronize()
            with torch.cuda.stream(reading), making, gate.shut(really=really):
                gate.put_on(reading)
                batch = tb.collate(samples)
                for c in arrays:
                    cupy.cuda.runtime.memsetAsync(c.data.ptr, 0, c.nbytes, making.ptr)
            return batch[:, 0].tolist()

        assert twice(body) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("maker", ["torch", "cupy"])
@pytest.mark.parametrize("options", [{"copy": True}, {"transform": lambda x: {"x": x["x"] * 1}}], ids=["copy", "made"])
def test_batches_that_stay_where_they_are_are_handed_over_behind_the_worker(torch, cupy, gate, options, maker):
    """With `device=None` what a batch becomes is made by the worker, on the default stream."""
    consumer = gate.beside(torch.cuda.Stream, torch.cuda.default_stream())

    def body(really):
        value = 2.0 if really else 1.0
        x = torch.full((N,), value, device="cuda") if maker == "torch" else cupy.full(N, value, cupy.float32)
        torch.cuda.synchronize()

        def source():
            gate.put_on(torch.cuda.current_stream())
            yield {"x": x}

        with torch.cuda.stream(consumer), gate.shut(really=really):
            batch = next(tb.prefetch(source(), device=None, **options))
            found = batch["x"].clone()
            assert not really or not consumer.query(), "blind"
        return set(found.unique().tolist())

    assert twice(body) == {2.0}


def test_batches_that_stay_where_they_are_are_kept_for_their_consumer(torch, cupy, gate):
    consumer = torch.cuda.Stream()

    def body(really):
        x = torch.full((N,), 1.0, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(consumer), gate.shut(really=really):
            batch = next(tb.prefetch([x], device=None, copy=True))
            address = batch.data_ptr()
            gate.put_on(consumer)
            found = batch.clone()
            del batch
            with torch.cuda.stream(torch.cuda.default_stream()):
                again = [torch.full((N,), 7.0, device="cuda") for _ in range(4)]
            assert address not in [t.data_ptr() for t in again]
        return set(found.unique().tolist())

    assert twice(body) == {1.0}
