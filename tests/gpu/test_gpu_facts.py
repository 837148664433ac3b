"""What torch, CuPy and CUDA do on a device, without a bridge: one probe per behaviour that the GPU modules lean on.

tensorbridge is not imported here. docs/gpu-facts.md lists these beside those of test_facts_gpu.py, with what each has
shown so far. A probe that fails says that the code which leans on it must be looked at.
"""

import gc
import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
from _facts_probes import read_capsule
from holding import Handle, twice

pytestmark = pytest.mark.gpu

N = 1 << 20


def in_a_process(code):
    return subprocess.run(
        [sys.executable, "-u", "-c", code],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env=dict(os.environ),
    )


# Streams


def test_the_raw_handle_of_torchs_current_stream_is_what_current_stream_says(torch):
    assert torch._C._cuda_getCurrentRawStream(0) == torch.cuda.current_stream(0).cuda_stream == 0
    with torch.cuda.stream(torch.cuda.Stream()):
        found = torch.cuda.current_stream(0).cuda_stream
        assert found > 2
        assert torch._C._cuda_getCurrentRawStream(0) == found


def test_cupys_default_stream_is_0_and_a_foreign_one_belongs_to_no_device_and_is_not_destroyed(torch, cupy):
    assert cupy.cuda.get_current_stream(0).ptr == 0
    stream = torch.cuda.Stream()
    wrapped = cupy.cuda.Stream.from_external(stream)
    assert (wrapped.ptr, wrapped.device_id) == (stream.cuda_stream, -1)
    del wrapped
    gc.collect()
    with torch.cuda.stream(stream):
        assert torch.ones(3, device="cuda").sum().item() == 3


def test_an_external_stream_of_0_is_the_default_stream_from_2_13_on(torch):
    """Before, it is a fresh one: pytorch#182960."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    assert (torch.cuda.ExternalStream(0).cuda_stream == 0) is (version >= (2, 13))


def test_an_external_stream_of_1_is_no_stream_at_all(torch):
    with pytest.raises(RuntimeError, match="invalid StreamId"):
        torch.cuda.ExternalStream(1).cuda_stream  # noqa: B018


def test_torch_takes_a_pool_stream_and_its_handle_for_two_streams(torch):
    stream = torch.cuda.Stream()
    assert torch.cuda.ExternalStream(stream.cuda_stream) != stream
    assert torch.cuda.ExternalStream(stream.cuda_stream).cuda_stream == stream.cuda_stream


def test_cupys_with_block_forgets_a_stream_that_was_made_current_by_use(cupy):
    """cupy#7866, open."""
    before, mine = cupy.cuda.get_current_stream(), cupy.cuda.Stream(non_blocking=True)
    mine.use()
    with cupy.cuda.Stream(non_blocking=True):
        pass
    assert cupy.cuda.get_current_stream() is not mine
    before.use()


def test_the_gate_tells_streams_that_wait_for_each_other_from_those_that_do_not(torch, gate):
    held = torch.cuda.Stream()
    other = gate.beside(iter([held, *(torch.cuda.Stream() for _ in range(31))]).__next__, held)
    assert other != held
    assert not gate.apart(held, held)
    assert gate.apart(held, other)


def test_a_wait_takes_the_state_that_an_event_has_at_the_call(torch, cupy, gate):
    """So one event a thread is enough: it may be recorded again at once."""
    held, waiting = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    idle = gate.beside(lambda: cupy.cuda.Stream(non_blocking=True), held, waiting)
    event = cupy.cuda.Event(disable_timing=True)
    end = cupy.cuda.Event(disable_timing=True)

    def body(really):
        with gate.shut(really=really):
            gate.put_on(held)
            cupy.cuda.runtime.eventRecord(event.ptr, held.ptr)
            cupy.cuda.runtime.streamWaitEvent(waiting.ptr, event.ptr)
            cupy.cuda.runtime.eventRecord(event.ptr, idle.ptr)
            end.record(waiting)
            event.synchronize()
            return end.done

    assert twice(body) is False


@pytest.mark.parametrize("number", [1, 0])
def test_1_and_0_both_mean_the_default_stream_to_the_runtime(torch, cupy, gate, number):
    event = cupy.cuda.Event(disable_timing=True)

    def body(really):
        with gate.shut(really=really):
            gate.put_on(torch.cuda.default_stream())
            cupy.cuda.runtime.eventRecord(event.ptr, number)
            return event.done

    assert twice(body) is False


def test_default_streams_hide_a_race(torch, cupy, gate):
    """torch on its default stream, CuPy on a plain one: the raw road is in order by luck. A test there is blind."""
    plain = cupy.cuda.Stream()
    n = 16 << 20
    out = cupy.zeros(n, cupy.float32)

    def body(really):
        spare = [torch.empty(n, device="cuda") for _ in range(2)]
        del spare
        t = torch.full((n,), 1.0, device="cuda")
        torch.cuda.synchronize()
        with gate.shut(really=really):
            with plain:
                c = cupy.from_dlpack(t)
                gate.put_on(plain)
                cupy.cuda.runtime.memcpyAsync(out.data.ptr, c.data.ptr, c.nbytes, 3, plain.ptr)
            freed = t.data_ptr()
            del c, t
            taken = torch.full((n,), 2.0, device="cuda")
            reused = taken.data_ptr() == freed
        return reused, set(np.unique(out.get()).tolist())

    assert twice(body) == (True, {1.0})


# Memory


def test_torchs_memory_is_resizable_and_memory_of_others_is_not(torch, cupy):
    assert torch.ones(3, device="cuda").untyped_storage().resizable()
    assert not torch.from_dlpack(cupy.ones(3)).untyped_storage().resizable()


def test_the_callback_on_a_storage_runs_before_its_block_is_free(torch):
    """So a stream that only the callback kept would be destroyed before torch records on it."""
    found = []
    t = torch.zeros(16 << 20, device="cuda")
    freed = t.data_ptr()

    def look(_):
        probe = torch.empty(16 << 20, device="cuda")
        found.append(probe.data_ptr())

    torch.empty(16 << 20, device="cuda")  # a free block, so that nothing need be allocated in the callback
    reference = weakref.ref(t.untyped_storage(), look)
    del t
    assert reference() is None
    assert found != [freed]
    assert len(found) == 1
    assert torch.empty(16 << 20, device="cuda").data_ptr() in (freed, *found)


def test_the_owner_of_unowned_memory_dies_with_cupys_last_view(torch, cupy):
    class Owner:
        pass

    owner = Owner()
    alive = weakref.ref(owner)
    t = torch.zeros(8, device="cuda")
    memory = cupy.cuda.UnownedMemory(t.data_ptr(), t.nbytes, owner, 0)
    a = cupy.ndarray((2, 4), np.float32, cupy.cuda.MemoryPointer(memory, 0))
    view = a[1:, ::2]
    del owner, memory, a
    assert alive() is not None
    assert view.base is not None
    del view
    assert alive() is None


def test_views_of_a_cupy_array_keep_the_first_array_as_their_base(cupy):
    a = cupy.zeros((4, 4))
    assert a[1:][1:].base is a
    assert a.T.view(cupy.int64).base is a


def test_cupys_pool_gives_a_block_out_again_at_once(cupy):
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        a = cupy.empty(N)
        address = a.data.ptr
        del a
        assert cupy.empty(N).data.ptr == address


def test_recording_on_a_cupy_stream_that_was_destroyed_does_not_pass_unnoticed(gpu):
    """What holding the streams prevents: torch records on it when the block is freed."""
    run = in_a_process("""
import torch, cupy
s = cupy.cuda.Stream(non_blocking=True)
t = torch.ones(1 << 20, device="cuda")
t.record_stream(torch.cuda.ExternalStream(s.ptr))
del s
del t
torch.empty(1 << 20, device="cuda")
torch.cuda.synchronize()
print("unnoticed")
""")
    if run.stdout == "unnoticed\n":  # CUDA leaves undefined what a destroyed handle does
        pytest.skip("it passed unnoticed on this driver: streams are held all the same")
    assert run.returncode != 0


# Exchange


def test_cupys_export_with_minus_1_orders_nothing(torch, cupy, gate):
    held = cupy.cuda.Stream(non_blocking=True)
    mine = gate.beside(torch.cuda.Stream, held)

    def body(really):
        c = cupy.zeros(N, cupy.float32)
        torch.cuda.synchronize()
        with gate.shut(really=really), held, torch.cuda.stream(mine):
            gate.put_on(held)
            t = torch.utils.dlpack.from_dlpack(c.__dlpack__(stream=-1, max_version=(1, 0)))
            t.sum()
            event = mine.record_event()
            event.synchronize()
            return event.query() and (not really or not held.done)

    assert twice(body) is True


def test_cupys_export_divides_negative_strides_as_unsigned_numbers(cupy):
    """So a reader of capsules has to take strides in bytes modulo 2**64, as an address plus a stride does."""
    capsule = read_capsule(cupy.zeros(4, cupy.float32)[::-1].__dlpack__(stream=-1, max_version=(1, 0)))
    assert capsule.strides == (2**62 - 1,)


@pytest.mark.parametrize("framework", ["torch", "cupy"])
def test_numpy_imports_device_memory_as_a_copy_on_the_host(torch, cupy, framework):
    x = torch.arange(3.0, device="cuda") if framework == "torch" else cupy.arange(3.0)
    a = np.from_dlpack(x, device="cpu")
    assert a.tolist() == [0, 1, 2]
    x += 1
    torch.cuda.synchronize()
    assert a.tolist() == [0, 1, 2]


def test_torch_exports_an_array_interface_without_a_stream(torch):
    interface = torch.ones(3, device="cuda").__cuda_array_interface__
    assert interface["version"] == 2
    assert "stream" not in interface


# Transfers


def test_the_driver_knows_page_locked_memory_by_its_address(torch, cupy):
    runtime = cupy.cuda.runtime
    pinned, plain = torch.zeros(N, pin_memory=True), np.zeros(N)
    assert runtime.pointerGetAttributes(pinned.data_ptr()).type == runtime.memoryTypeHost
    assert runtime.pointerGetAttributes(pinned.data_ptr() + 1000).type == runtime.memoryTypeHost
    assert runtime.pointerGetAttributes(plain.ctypes.data).type != runtime.memoryTypeHost
    assert torch.from_numpy(pinned.numpy()[100:]).is_pinned()


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_copy_to_or_from_a_numpy_view_of_pinned_memory_is_not_waited_for(torch, gate, way):
    slot = torch.zeros(N, dtype=torch.uint8, pin_memory=True).numpy()
    block = torch.zeros(N, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()

    def body(really):
        with gate.shut(really=really), torch.cuda.stream(stream):
            gate.put_on(stream)
            host = torch.from_numpy(slot[: N // 2])
            if way == "up":
                block[: N // 2].copy_(host, non_blocking=True)
            else:
                host.copy_(block[: N // 2], non_blocking=True)
            return stream.query()

    assert twice(body) is False


def test_cupys_asynchronous_copy_from_pinned_memory_is_not_waited_for(torch, cupy, gate):
    slot = torch.zeros(N, dtype=torch.uint8, pin_memory=True)
    block = cupy.zeros(N, cupy.uint8)
    stream = cupy.cuda.Stream(non_blocking=True)

    def body(really):
        with gate.shut(really=really):
            gate.put_on(stream)
            runtime = cupy.cuda.runtime
            runtime.memcpyAsync(block.data.ptr, slot.data_ptr(), N, runtime.memcpyHostToDevice, stream.ptr)
            return stream.done

    assert twice(body) is False


# Capture


def test_asking_whether_a_stream_is_captured_is_legal_at_any_time(torch, cupy):
    x = torch.zeros(3, device="cuda")
    x += 1
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert torch.cuda.is_current_stream_capturing()
        assert not cupy.cuda.get_current_stream().is_capturing()
        number = torch.cuda.current_stream().cuda_stream
        assert cupy.cuda.runtime.streamIsCapturing(number)
        assert not cupy.cuda.runtime.streamIsCapturing(1)
        x += 1
    graph.replay()
    assert x.tolist() == [2, 2, 2]


def test_the_default_stream_cannot_be_asked_while_a_blocking_stream_is_captured(torch, cupy):
    """The error says "captur", breaks nothing, and does not stick."""
    stream = cupy.cuda.Stream()
    c = cupy.zeros(3)
    c += 1  # the kernel is loaded before the capture
    cupy.cuda.runtime.deviceSynchronize()
    with stream:
        stream.begin_capture()
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="captur"):
            cupy.cuda.Stream.null.is_capturing()
        with pytest.raises(RuntimeError, match="captur"):
            torch.cuda.is_current_stream_capturing()
        c += 1
        graph = stream.end_capture()
    graph.launch(stream)
    stream.synchronize()
    assert c.tolist() == [2, 2, 2]
    assert torch.ones(3, device="cuda").sum().item() == 3


def test_by_hand_a_crossing_to_another_stream_breaks_a_capture(gpu):
    """In a process of its own: a broken capture may leave more behind."""
    run = in_a_process("""
import torch, cupy
x = torch.zeros(1024, device="cuda")
x += 1
cupy.from_dlpack(x)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph):
        cupy.from_dlpack(x)
        x += 1
except RuntimeError:
    print("broken")
""")
    assert run.stdout == "broken\n", run.stderr


def test_a_stream_handle_means_the_same_to_both_libraries(torch, cupy, gate):
    """A kernel of CuPy's on torch's stream is behind torch's work there."""
    stream = torch.cuda.Stream()

    def body(really):
        with gate.shut(really=really), cupy.cuda.Stream.from_external(Handle(stream.cuda_stream)):
            gate.put_on(stream)
            cupy.zeros(3)
            return stream.query()

    assert twice(body) is False
