"""torch and CuPy on one GPU, without a bridge: what is reused while it is read, and what refuses to cross.

Part of the fact tests: see test_facts.py. A stream is held busy by a kernel that sleeps for about a second; a test
whose stream is idle when it looks saw no race, and fails as blind.
"""

import importlib
import weakref

import numpy as np
import pytest
import torch
from _facts_probes import address, in_a_process, read_capsule

pytestmark = pytest.mark.gpu

CYCLES = 2_000_000_000
ELEMENTS = 16 << 20  # 64 MiB of float32: a block that torch's allocator neither splits nor merges


@pytest.fixture
def cupy(gpu, a_minute):
    torch.cuda._sleep(1)  # kernels load lazily, and a load can wait behind a busy stream
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    yield importlib.import_module("cupy")
    torch.cuda.synchronize()


def keep_busy(stream, cycles=CYCLES):
    with torch.cuda.stream(stream):
        torch.cuda._sleep(cycles)


def beside(owner, make):
    """A stream of CuPy's that keeps `owner` waiting for nothing: two streams may share one queue of the hardware."""
    scratch, tried = torch.zeros(1 << 20, device="cuda"), []
    scratch.zero_()
    torch.cuda.synchronize()
    for _ in range(64):
        tried.append(make())
        busy = torch.cuda.ExternalStream(tried[-1].ptr)
        keep_busy(busy, CYCLES // 10)
        with torch.cuda.stream(busy):
            scratch.zero_()  # what waits in the queue
        with torch.cuda.stream(owner):
            torch.cuda._sleep(1)
        owner.synchronize()
        apart = not busy.query()
        torch.cuda.synchronize()
        if apart:
            return tried[-1]
    pytest.fail("blind: no stream gets on beside a busy one")


def test_a_reversed_cupy_array_does_not_become_a_tensor_by_its_cuda_array_interface(cupy):
    """`TensorMaker::computeStorageSize` is noexcept, so up to 2.13 this should be the abort of pytorch#188023."""
    run = in_a_process(
        imports="cupy, torch",
        code="""
reversed_array = cupy.arange(6.0)[::-1]
print("made", flush=True)
torch.as_tensor(reversed_array, device="cuda")
print("taken")""",
    )
    assert run.stdout == "made\n", run.stderr
    assert run.returncode != 0


@pytest.mark.parametrize("recorded", [False, True])
def test_torch_gives_a_block_out_again_at_once_unless_the_busy_stream_was_recorded(cupy, recorded):
    block = torch.empty(ELEMENTS, device="cuda")
    spare = torch.empty(ELEMENTS, device="cuda") if recorded else None  # so that nothing need be allocated while busy
    freed, busy = address(block), torch.cuda.Stream()
    keep_busy(busy)
    if recorded:
        block.record_stream(busy)
    del block, spare
    again = torch.empty(ELEMENTS, device="cuda")
    assert not busy.query(), "blind"
    assert (address(again) == freed) is not recorded


def test_record_stream_does_nothing_for_memory_that_cupy_owns(cupy):
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        array = cupy.zeros(1 << 20, cupy.uint8)
    t = torch.from_dlpack(array)
    assert not t.untyped_storage().resizable()
    busy = torch.cuda.Stream()
    keep_busy(busy)
    t.record_stream(busy)
    del array
    assert pool.used_bytes() == 1 << 20
    del t
    assert pool.used_bytes() == 0
    assert not busy.query(), "blind"


def test_a_raw_crossing_reads_the_values_of_the_tensor_that_took_its_block(cupy):
    """The negative control of every lifetime test: the view is dropped while CuPy's stream has yet to read it."""
    owner = torch.cuda.Stream()
    reader = beside(owner, lambda: cupy.cuda.Stream(non_blocking=True))
    with torch.cuda.stream(owner):
        t = torch.full((ELEMENTS,), 1.0, device="cuda")
    out = cupy.zeros(ELEMENTS, cupy.float32)
    out.data.copy_from_device_async(cupy.empty_like(out).data, out.nbytes)  # no first time while busy
    torch.cuda.synchronize()
    freed = address(t)
    with reader:
        view = cupy.from_dlpack(t)
        keep_busy(torch.cuda.ExternalStream(reader.ptr))
        out.data.copy_from_device_async(view.data, view.nbytes, reader)
    del view, t
    with torch.cuda.stream(owner):
        successor = torch.full((ELEMENTS,), 2.0, device="cuda")
    owner.synchronize()
    assert address(successor) == freed, "blind"
    assert not reader.done, "blind"
    reader.synchronize()
    assert np.unique(out.get()).tolist() == [2.0]


@pytest.mark.parametrize("holder", ["an alias", "a CuPy view"])
def test_a_finalizer_on_a_cuda_storage_fires_once_when_the_last_holder_is_gone(cupy, holder):
    fired = []
    t = torch.zeros(4, device="cuda")
    weakref.finalize(t.untyped_storage(), fired.append, True)
    last = t[1:] if holder == "an alias" else cupy.from_dlpack(t)[1:]
    del t
    assert fired == []
    assert last is not None
    del last
    assert fired == [True]


def test_a_pinned_tensor_says_cuda_host_and_exports_cpu_so_cupy_refuses_it(cupy):
    pinned = torch.ones(4).pin_memory()
    assert pinned.__dlpack_device__() == (3, 0)
    assert read_capsule(pinned.__dlpack__()).device == (1, 0)
    assert address(np.from_dlpack(pinned)) == address(pinned)
    with pytest.raises(TypeError):
        cupy.from_dlpack(pinned)
