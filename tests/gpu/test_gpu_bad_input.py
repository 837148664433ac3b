"""Bad input on a device, and memory of others: clear errors, and devices, streams and pools are left as found."""

import contextlib
import gc
import subprocess
import sys
import time

import numpy as np
import pytest
from holding import twice

import tensorbridge as tb
from tensorbridge._adapters import _dlpack
from tensorbridge._cuda import _lease, _staging, _streams

pytestmark = pytest.mark.gpu

MIB = 1 << 20


def test_a_wrong_index_is_a_device_error(torch, cupy, unchanged):
    for call in (tb.to_torch, tb.to_cupy):
        with pytest.raises(tb.DeviceError, match="cuda:99 does not exist"):
            call(np.zeros(3), device="cuda:99")


def test_out_of_memory_on_the_device_leaves_the_ring_and_the_streams_as_they_were(torch, unchanged):
    torch.cuda.empty_cache()
    source = np.zeros(1 << 28, np.float32)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.5 * source.nbytes / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            tb.to_torch(source, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    a = np.random.default_rng(0).random(11 * MIB, np.float32)
    assert np.array_equal(tb.to_numpy(tb.to_torch(a, device="cuda")), a)
    ring = _staging.ring()
    until = time.monotonic() + 5  # the last thread that copies gives its slot back after it has said that it is done
    while len(ring._free) < ring._made and time.monotonic() < until:
        time.sleep(0.01)
    assert len(ring._free) == ring._made <= _staging.SLOTS


CHILDREN = {
    "a forked worker": """
import os, torch, numpy as np, tensorbridge as tb
torch.ones(1, device="cuda")
pid = os.fork()
if not pid:
    try: tb.to_torch(np.zeros(3), device="cuda")
    except tb.DeviceError as error: print("forked" in str(error), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
""",
    "a forked worker after CuPy alone": """
import os, cupy, numpy as np, tensorbridge as tb
tb.to_cupy(np.zeros(3))
pid = os.fork()
if not pid:
    try: tb.to_cupy(np.zeros(3))
    except tb.DeviceError as error: print("forked process" in str(error), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
""",
    "a forked worker after CuPy by itself": """
import os, cupy, numpy as np, tensorbridge as tb
c = cupy.zeros(3)
pid = os.fork()
if not pid:
    told = 0
    for call in (lambda: tb.to_cupy(np.zeros(3)), lambda: tb.to_numpy(c), lambda: tb.to_torch(c)):
        try: call()
        except tb.DeviceError as error: told += "forked process" in str(error)
    print(told == 3, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
""",
    "a forked worker after CuPy by itself, or torch": """
import os, sys, cupy, torch, numpy as np, tensorbridge as tb
for x in (cupy.zeros(3), torch.zeros(3, device="cuda")):
    pid = os.fork()
    if not pid:
        told = 0
        for call in (
            lambda: tb.to_torch(x), lambda: tb.to_cupy(x, copy=True), lambda: tb.to_cupy(np.zeros(3)),
            tb.share_memory_pool, lambda: tb.to_torch(np.zeros(3), device="cuda"),
            lambda: tb.prefetch([x], device="cuda"),
        ):
            try: call()
            except tb.DeviceError as error: told += "forked process" in str(error)
        os._exit(told)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 6: sys.exit(1)
print(True)
""",
    "a forked worker with arrays of its parent": """
import os, torch, cupy, numpy as np, tensorbridge as tb
t, c = torch.ones(3, device="cuda"), cupy.ones(3, cupy.float32)
class Exporter:
    def __dlpack_device__(self): return t.__dlpack_device__()
    def __dlpack__(self, **options): return t.__dlpack__(**options)
tb.to_numpy_async([tb.to_torch(c), tb.to_cupy(t)]).result()
calls = [
    lambda: tb.to_cupy(t), lambda: tb.to_torch(c), lambda: tb.to_numpy(t), lambda: tb.to_numpy(c),
    lambda: tb.to_numpy(Exporter()), lambda: tb.to_numpy_async(t).result(), lambda: tb.editing(t),
    lambda: tb.used_on(t, 0), lambda: tb.used_on(c, 0), lambda: tb.use_stream(0).__enter__(),
]
pid = os.fork()
if not pid:
    told = 0
    for call in calls:
        try: call()
        except tb.DeviceError as error: told += "forked" in str(error)
    described = [tb.describe(x).device for x in (t, c)] == ["cuda:0"] * 2
    print(told == len(calls) and described and tb.info().devices == (), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
""",
    "a forked child that runs to the interpreter's end": """
import os, sys, numpy as np, torch, tensorbridge as tb
from tensorbridge._cuda import _lease, _stream_order
tb.to_numpy(tb.to_torch(np.zeros(1 << 24), device="cuda"))  # through the ring
t = torch.ones(1 << 20, device="cuda")
with torch.cuda.stream(torch.cuda.Stream()): c = tb.to_cupy(t)  # ordered by an event
kept = _stream_order.mark(1, 0)
_lease._pending[frozenset()] = [kept]
del t, c, kept
torch.cuda.synchronize()
sys.stdout.flush()
pid = os.fork()
if not pid: sys.exit(0)
print(os.waitpid(pid, 0)[1] == 0)
_lease._pending.clear()
""",
    "a device lost from view": """
import os
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import numpy as np, tensorbridge as tb
for call in (tb.to_torch, tb.to_cupy):
    try: call(np.zeros(3), device="cuda")
    except tb.DeviceError as error: print("does not exist" in str(error), end="")
print()
""",
}


@pytest.mark.parametrize("name", CHILDREN)
def test_where_there_is_no_usable_device_the_error_says_so(gpu, name):
    run = subprocess.run(
        [sys.executable, "-u", "-c", CHILDREN[name]], capture_output=True, text=True, timeout=50, check=False
    )
    assert run.stdout.strip() in ("True", "TrueTrue"), run.stderr
    assert "Exception ignored" not in run.stderr  # objects of CUDA's that a child would destroy


class Interface:
    """Foreign device memory, described by a dict."""

    def __init__(self, owner, **changes):
        self.owner = owner
        self.__cuda_array_interface__ = owner.__cuda_array_interface__ | changes


@pytest.mark.parametrize("call", ["torch", "cupy"])
def test_a_foreign_producer_without_a_stream_is_taken_as_it_is(torch, cupy, unchanged, call):
    c = cupy.arange(6, dtype=cupy.float32)
    facts = Interface(c)
    del facts.__cuda_array_interface__["stream"]
    made = (tb.to_torch if call == "torch" else tb.to_cupy)(facts)
    assert tb.shares_memory(made, c)
    assert tb.to_numpy(made).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("call", ["torch", "cupy"])
def test_a_foreign_producers_stream_is_waited_for_by_an_event(torch, cupy, gate, call):
    producing, consuming = cupy.cuda.Stream(non_blocking=True), torch.cuda.Stream()
    n = MIB

    def body(really):
        c = cupy.zeros(n, cupy.float32)
        torch.cuda.synchronize()
        with gate.shut(really=really):
            with producing:
                gate.put_on(producing)
                c.fill(1.0)
                foreign = Interface(c)
            with tb.use_stream(consuming):
                y = (tb.to_torch if call == "torch" else tb.to_cupy)(foreign)
                assert not really or not producing.done, "the host waited"
                z = y + 1
        return set(np.unique(tb.to_numpy(z)).tolist())

    assert twice(body) == {2.0}


class Exporter:
    """Foreign device memory, whose work is on a stream of its own."""

    def __init__(self, c, stream):
        self.c, self.stream = c, stream

    def __dlpack_device__(self):
        return self.c.__dlpack_device__()

    def __dlpack__(self, **options):
        with self.stream:
            return self.c.__dlpack__(**options)


def test_whoever_reads_foreign_memory_first_waits_for_its_producer(torch, cupy, gate):
    """Reversed memory is packed by CuPy, on a stream that is neither the producer's nor torch's."""
    producing, packing = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    taking = torch.cuda.Stream()

    def body(really):
        c, out = cupy.zeros(MIB, cupy.float32), torch.zeros(MIB, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(taking), packing, gate.shut(really=really):
            gate.put_on(producing)
            with producing:
                c.fill(1.0)
            out.copy_(tb.to_torch(Exporter(c[::-1], producing)))
            assert not really or not producing.done, "the host waited"
        return set(out.unique().tolist())

    assert twice(body) == {1.0}


ASKEW = """
import numpy as np, torch, cupy, tensorbridge as tb
class Interface:
    def __init__(self, **facts): self.__cuda_array_interface__ = {"version": 3, "shape": (4,), **facts}
block = cupy.arange(-1, 8, dtype=cupy.float64)
off = block.view(cupy.uint8)[8:].view(cupy.complex128)
thirds = cupy.arange(12, dtype=cupy.float32)
cupy.cuda.runtime.deviceSynchronize()
assert off.data.ptr % 16 == 8
half, odd = [0 + 1j, 2 + 3j, 4 + 5j, 6 + 7j], [0 + 1j, 3 + 4j, 6 + 7j, 9 + 10j]
for x, values in (
    (off, half),
    (Interface(typestr="<c16", data=(off.data.ptr, False)), half),
    (Interface(typestr="<c8", data=(thirds.data.ptr, False), strides=(12,)), odd),
):
    assert tb.to_torch(x).tolist() == tb.to_numpy(x).tolist() == values
    assert tb.to_torch(x, dtype="complex64").tolist() == values
    assert x is off or cupy.asnumpy(tb.to_cupy(x)).tolist() == values
    try: tb.to_torch(x, copy=False)
    except tb.CopyRequiredError: pass
torch.cuda.synchronize()
print("whole")
"""


def test_elements_at_addresses_that_no_kernel_may_read_are_packed_and_nothing_faults(gpu):
    """In a process of its own: a misaligned address ends a CUDA context."""
    run = subprocess.run([sys.executable, "-u", "-c", ASKEW], capture_output=True, text=True, timeout=50, check=False)
    assert run.stdout == "whole\n", run.stderr


@pytest.mark.parametrize("changes", [{"stream": 0}, {"data": (1 << 40, False)}, {"shape": None}], ids=str)
def test_a_malformed_foreign_producer_is_named(torch, cupy, unchanged, changes):
    foreign = Interface(cupy.arange(6, dtype=cupy.float32), **changes)
    with pytest.raises(tb.ProducerError, match="malformed"):
        tb.to_numpy(tb.to_torch(foreign))


def test_one_pool_serves_both_and_can_be_undone(torch, cupy):
    before = torch.cuda.memory_allocated()
    allocator = cupy.cuda.get_allocator()
    with tb.share_memory_pool():
        c = cupy.ones(MIB, cupy.float32)
        assert torch.cuda.memory_allocated() >= before + c.nbytes
        t = tb.to_torch(c)
        assert t.sum().item() == MIB
        with tb.use_stream(torch.cuda.Stream()):
            d = cupy.full(MIB, 2.0, cupy.float32)
            assert float(d.sum()) == 2 * MIB
        del c, t, d
    torch.cuda.synchronize()
    _lease.settle()
    assert cupy.cuda.get_allocator() is allocator
    assert torch.cuda.memory_allocated() == before
    assert _streams.same(0)


def test_the_pool_of_both_gets_the_blocks_of_arrays_in_cycles_back(torch, cupy):
    gc.collect()
    before = torch.cuda.memory_allocated()
    with tb.share_memory_pool():
        for _ in range(10):
            cycle = [cupy.ones(MIB, cupy.uint8)]
            cycle.append(cycle)
        del cycle
        gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("outgrown", [lambda t: t.untyped_storage().resize_(16), lambda t: t.resize_(1 << 45)])
def test_a_tensor_that_claims_more_than_its_storage_holds_is_refused(torch, cupy, unchanged, outgrown):
    tb.to_cupy(torch.ones(4, device="cuda"))  # the lanes are open
    t = torch.ones(1 << 20, device="cuda")
    with contextlib.suppress(RuntimeError):
        outgrown(t)
    for options in ({}, {"detach": True}):
        with pytest.raises(tb.UnsupportedArrayError, match="its storage holds"):
            tb.to_cupy(t, **options)


class Managed:
    """As CuPy says of managed memory: the capsule names another type of device."""

    def __init__(self, c):
        self.c = c

    def __dlpack_device__(self):
        return (13, 0)

    def __dlpack__(self, **options):
        capsule = self.c.__dlpack__(**options)
        tensor, _ = _dlpack.read(self.c, capsule)
        tensor.device_type = 13
        return capsule


@pytest.mark.parametrize("to", ["numpy", "torch", "cupy"])
def test_managed_memory_is_read_at_its_address(torch, cupy, unchanged, to):
    c = cupy.arange(5, dtype=cupy.float32)
    plan = tb.plan(Managed(c), to)
    made = {"numpy": tb.to_numpy, "torch": tb.to_torch, "cupy": tb.to_cupy}[to](Managed(c))
    assert made.tolist() == [0, 1, 2, 3, 4]
    assert plan.zero_copy == (to != "numpy")
    assert to == "numpy" or tb.shares_memory(made, c)
