"""`share_memory_pool`: CuPy allocates from torch's pool, on the right stream, and can be given its own back."""

import gc
import sys

import fake_frameworks
import pytest

import tensorbridge as tb
from tensorbridge._cuda import _pool


@pytest.fixture
def machine(monkeypatch):
    yield from fake_frameworks.installed(monkeypatch, devices=2)


@pytest.fixture
def cuda(machine):
    return machine.cupy.cuda


def test_cupys_blocks_are_torchs_inside_and_cupys_own_outside(machine, cuda):
    before = cuda.get_allocator()
    with tb.share_memory_pool():
        inside = cuda.alloc(100)
        assert (machine.torch_memory.used, machine.cupy_memory.used) == (100, 0)
    assert cuda.get_allocator() is before
    assert machine.torch_memory.used == 100, "a block in use stays where it is"
    outside = cuda.alloc(50)
    assert machine.cupy_memory.used == 50
    del inside
    assert machine.torch_memory.used == 0
    assert outside.ptr


@pytest.mark.parametrize("number", [1, 0x60])
def test_a_block_belongs_to_the_stream_that_is_current_in_cupy(machine, cuda, number):
    machine.current["torch"][1], machine.current["cupy"][1] = 0x50, number
    with tb.share_memory_pool(), cuda.Device(1):
        block = machine.blocks[cuda.alloc(64).ptr]
    assert (block.device, block.number) == (1, number)
    assert machine.device == 0
    assert machine.current["torch"][1] == 0x50


def test_no_block_is_allocated_on_the_per_thread_default_stream(machine, cuda):
    """torch knows it as one stream, and would give the block out to another thread, whose stream it is not."""
    machine.current["cupy"][0] = 2
    with tb.share_memory_pool(), pytest.raises(tb.DeviceError, match="per-thread default stream"):
        cuda.alloc(64)
    assert machine.torch_memory.used == 0


def test_a_freed_block_is_reused_on_its_own_stream_only(machine, cuda):
    with tb.share_memory_pool():
        machine.current["cupy"][0] = 0x60
        first = cuda.alloc(64).ptr
        assert cuda.alloc(64).ptr == first
        machine.current["cupy"][0] = 0x70
        assert cuda.alloc(64).ptr != first


def test_a_block_is_held_by_what_the_garbage_collector_does_not_take_apart(machine, cuda):
    """CuPy's `PythonFunctionAllocator` is: of an array in a cycle it loses the block, for it can free it no more."""
    with tb.share_memory_pool():
        memory = cuda.alloc(64).mem
    assert not gc.is_tracked(memory._owner)
    del memory
    assert machine.torch_memory.used == 0


def test_nothing_is_asked_of_torch_for_no_bytes(machine, cuda):
    with tb.share_memory_pool():
        nothing = cuda.alloc(0)
    assert (nothing.ptr, machine.blocks) == (0, {})


def test_it_can_be_undone_once_and_twice_does_no_harm(machine, cuda):
    before = cuda.get_allocator()
    shared = tb.share_memory_pool()
    assert cuda.get_allocator() is not before
    shared.restore()
    assert cuda.get_allocator() is before
    cuda.set_allocator("somebody else's")
    shared.restore()
    assert cuda.get_allocator() == "somebody else's"


def test_an_allocator_that_somebody_else_has_set_since_is_left_alone(cuda):
    with tb.share_memory_pool():
        cuda.set_allocator("somebody else's")
    assert cuda.get_allocator() == "somebody else's"


def test_it_nests(machine, cuda):
    before = cuda.get_allocator()
    with tb.share_memory_pool():
        outer = cuda.get_allocator()
        with tb.share_memory_pool():
            assert cuda.get_allocator() is not outer
        assert cuda.get_allocator() is outer
    assert cuda.get_allocator() is before


def test_it_is_undone_after_an_error(machine, cuda):
    before = cuda.get_allocator()
    with pytest.raises(ZeroDivisionError), tb.share_memory_pool():
        raise ZeroDivisionError
    assert cuda.get_allocator() is before


def test_out_of_memory_is_cupys_error_with_torchs_as_its_cause(machine, cuda):
    with tb.share_memory_pool(), pytest.raises(cuda.memory.OutOfMemoryError) as caught:
        cuda.alloc(1 << 40)
    assert isinstance(caught.value.__cause__, machine.torch.OutOfMemoryError)
    assert isinstance(caught.value, MemoryError)


def test_blocks_that_die_with_the_interpreter_are_left_alone(machine, cuda, monkeypatch):
    with tb.share_memory_pool():
        block = cuda.alloc(64)
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    del block
    assert machine.torch_memory.used == 64


def test_a_lease_is_needed_with_it_as_without_it(machine, cuda):
    """The pool gives a block back on its own stream, whatever other streams do with it."""
    with tb.share_memory_pool():
        first = cuda.alloc(64)
        where = first.ptr
        with machine.hold(0, 0x60):
            machine.kernel(0, 0x60, lambda: None)
            del first
            assert cuda.alloc(64).ptr == where


@pytest.mark.parametrize("owner", ["cupy", "numpy", None])
def test_only_torch_can_own_it(machine, cuda, owner):
    before = cuda.get_allocator()
    with pytest.raises(ValueError, match='only "torch" can own'):
        tb.share_memory_pool(owner)
    assert cuda.get_allocator() is before


@pytest.mark.parametrize("blind", ["torch", "cupy"])
def test_without_a_device_it_says_so(machine, cuda, blind):
    if blind == "torch":
        machine.torch.cuda.is_available = lambda: False
    else:
        cuda.runtime.getDeviceCount = lambda: 0
    before = cuda.get_allocator()
    with pytest.raises(tb.DeviceError, match="no usable CUDA device"):
        tb.share_memory_pool()
    assert cuda.get_allocator() is before


def test_without_cupy_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(tb.MissingFrameworkError, match="cupy"):
        tb.share_memory_pool()
    assert _pool.share_memory_pool is tb.share_memory_pool
