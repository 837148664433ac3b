"""Several devices: what is asked about one is asked about the right one, and what is current is left as it was."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from holding import twice

import tensorbridge as tb
from tensorbridge._cuda import _lease

pytestmark = pytest.mark.gpu
N = 1 << 16


@pytest.fixture(autouse=True)
def several(torch):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device")


@pytest.fixture(params=["torch", "cupy"])
def zeros(request, torch, cupy):
    def make(index):
        if request.param == "torch":
            return torch.zeros(N, device=f"cuda:{index}")
        with cupy.cuda.Device(index):
            return cupy.zeros(N, cupy.float32)

    return make


def index_of(x):
    return x.get_device() if hasattr(x, "get_device") else x.data.device_id


@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize("source", [0, 1])
def test_conversions_are_on_the_device_that_was_named_and_leave_the_current_one(
    torch, cupy, unchanged, zeros, source, target
):
    with torch.cuda.device(source), cupy.cuda.Device(source):
        x = zeros(source)
        x += 3
    for convert in (tb.to_torch, tb.to_cupy):
        found = convert(x, device=f"cuda:{target}")
        assert index_of(found) == target
        assert tb.shares_memory(found, x) is (source == target)
        assert set(np.unique(tb.to_numpy(found)).tolist()) == {3.0}
        moved = tb.tree.to_torch({"x": x, "n": np.ones(2)}, device=f"cuda:{target}")
        assert {t.get_device() for t in moved.values()} == {target}
        assert tb.plan(x, "torch", device=f"cuda:{target}").bytes_moved == (0 if source == target else x.nbytes)


def test_batches_from_another_device_are_read_in_order(torch, zeros, gate):
    stream = torch.cuda.Stream(0)
    there = zeros(1)  # contexts, before anything is held
    tb.to_torch(tb.to_torch(there, device="cuda:0"), device="cuda:1")

    def body(really):
        with tb.use_stream(stream):
            x = zeros(0)
            torch.cuda.synchronize()
            with gate.shut(really=really):
                gate.put_on(stream)
                x += 1
                ready = tb.prefetch([{"x": x}], device="cuda:1")
            (batch,) = ready
            x += 6  # behind the copy
            assert batch["x"].get_device() == 1
            return set(batch["x"].unique().tolist())

    assert twice(body) == {1.0}


def test_what_is_written_next_is_behind_the_copy_of_a_batch(torch, zeros):
    with tb.use_stream(torch.cuda.Stream(0)):
        for _ in range(20):
            x = zeros(0)
            x += 1
            for batch in tb.prefetch([{"x": x}], device="cuda:1"):
                x += 6
                assert set(batch["x"].unique().tolist()) == {1.0}


@pytest.mark.parametrize("options", [{"device": None}, {"device": "cpu"}, {"device": "cuda"}, {"to": "numpy"}], ids=str)
@pytest.mark.parametrize("framework", ["torch", "cupy"])
def test_the_source_and_the_transform_of_prefetch_run_on_the_device_of_the_caller(torch, cupy, framework, options):
    found = []

    def look(x):
        made = torch.ones(3, device="cuda") if framework == "torch" else cupy.ones(3)
        found.append((index_of(made), torch.cuda.current_device(), cupy.cuda.runtime.getDevice()))
        return x

    def source():
        yield look(np.ones(3))

    with torch.cuda.device(1):
        list(tb.prefetch(source(), transform=look, **options))
    assert found == [(1, 1, 1)] * 2


def test_a_stream_that_does_not_say_its_device_is_one_of_the_arrays(torch, cupy):
    stream = torch.cuda.Stream(1)
    for handle in (stream.cuda_stream, torch.cuda.ExternalStream(stream.cuda_stream, device=1)):
        x = torch.ones(N, device="cuda:1")
        tb.used_on(x, handle)
        del x
        with cupy.cuda.Device(1):
            c = cupy.ones(N, cupy.float32)
        tb.used_on(c, stream.cuda_stream)
        del c
        for index in (0, 1):
            torch.cuda.synchronize(index)
        assert _lease.settle() == 0


def test_a_capture_on_another_device_than_the_current_one_is_seen(torch, cupy):
    x = torch.zeros(N, device="cuda:1")
    with torch.cuda.device(1):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(1)):  # that of its own is on whatever device came first
            x += 1
            with torch.cuda.device(0):
                for call in (
                    lambda: tb.to_numpy(x),
                    lambda: tb.to_torch(np.zeros(3), device="cuda:1"),
                    lambda: tb.to_cupy(x),
                    lambda: tb.to_torch(x, copy=True),
                    lambda: tb.to_numpy_async(x).result(),
                    lambda: tb.prefetch([np.zeros(3)], device="cuda:1"),
                ):
                    with pytest.raises(tb.DeviceError, match="captured"):
                        call()
            x += 1
        graph.replay()
    torch.cuda.synchronize(1)
    assert set(x.unique().tolist()) == {2.0}


class Interface:
    def __init__(self, x, said=None):
        self.x, self.__cuda_array_interface__ = x, x.__cuda_array_interface__
        if said is not None:
            self.device = type("Device", (), {"id": said})()


def test_an_array_interface_is_on_the_device_where_its_memory_is(zeros):
    x = zeros(1)
    assert index_of(tb.to_torch(Interface(x))) == index_of(tb.to_cupy(Interface(x))) == 1
    assert index_of(tb.to_torch(Interface(x, said=1))) == 1
    for convert in (tb.to_torch, tb.to_cupy, tb.to_numpy):
        with pytest.raises(tb.ProducerError, match="says that it is on device 0, and its memory is on device 1"):
            convert(Interface(x, said=0))


def test_leases_are_not_looked_at_while_another_device_is_captured(torch, cupy):
    x, y, c = torch.zeros(N, device="cuda:1"), torch.zeros(3, device="cuda:0"), cupy.zeros(N, cupy.float32)
    with torch.cuda.stream(torch.cuda.Stream(0)):
        lent = tb.to_torch(c)
        torch.cuda._sleep(50_000_000)
        del lent
    with torch.cuda.device(1):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(1), capture_error_mode="thread_local"):
            x += 1
            with torch.cuda.device(0):
                with pytest.raises(tb.DeviceError, match="captured"):
                    tb.to_numpy(y)
                tb.to_torch(c)
            x += 1
        graph.replay()
    torch.cuda.synchronize(1)
    assert set(x.unique().tolist()) == {2.0}


@pytest.mark.parametrize("default", ["", "torch.set_default_device('cpu')", "torch.set_default_device('cuda:0')"])
def test_an_array_interface_is_where_its_memory_is_without_cupy_too(default):
    code = f"""
import sys, numpy as np, torch, tensorbridge as tb
{default}
class Shown:
    def __init__(self, facts): self.__cuda_array_interface__ = facts
facts = torch.arange(6.0, device="cuda:1").__cuda_array_interface__
t = torch.ones(6, device="cuda:1")
print(tb.to_torch(Shown(t.__cuda_array_interface__)).device)
for address in (np.zeros(3).ctypes.data, 0xdead0000):
    try: tb.to_torch(Shown(facts | {{"data": (address, False)}}))
    except tb.ProducerError as error: print("no device has memory" in str(error))
print("cupy" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert run.stdout.split() == ["cuda:1", "True", "True", "False"], run.stderr
