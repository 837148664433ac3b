"""Memory that is lent across streams is not reused before the borrower's work is done; by hand, it is.

A block is lent, read by work that is held, and dropped before that work has begun; then the owner asks for a block of
the same size and fills it. Read afterwards: 1, what was lent, or 2, what its successor wrote. A control that does not
read 2, at an address that was really reused, is blind, and fails.
"""

import subprocess
import sys
import threading
from importlib import import_module

import numpy as np
import pytest
from holding import twice

import tensorbridge as tb
from tensorbridge._cuda import _lease

pytestmark = pytest.mark.gpu

N = 16 << 20  # float32: 64 MiB, a block that torch's allocator neither splits nor merges
NBYTES = 4 * N
ON_DEVICE = 3  # cudaMemcpyDeviceToDevice


def ends(a):
    """One value if all are the same. (`np.unique` of so many takes a third of a second.)"""
    return {float(a.min()), float(a.max())}


def spare_blocks(make):
    """Free blocks for later: nothing is to be asked of the driver while a stream is held."""
    blocks = [make() for _ in range(3)]
    del blocks


class TorchOwned:
    """torch's memory, which CuPy reads late on a stream that nobody orders behind torch's."""

    raw = staticmethod(lambda t: import_module("cupy").from_dlpack(t))
    cross = staticmethod(tb.to_cupy)

    def __init__(self, torch, cupy, gate):
        self.torch, self.cupy = torch, cupy
        self.owning, self.out = torch.cuda.Stream(), cupy.zeros(N, cupy.float32)
        self.reading = gate.beside(lambda: cupy.cuda.Stream(non_blocking=True), self.owning)
        self.further = gate.beside(lambda: cupy.cuda.Stream(non_blocking=True), self.owning, self.reading)
        torch.cuda.synchronize()

    def make(self, value):
        with self.torch.cuda.stream(self.owning):
            return self.torch.full((N,), value, device="cuda")

    def spare(self):
        spare_blocks(lambda: self.make(0.0))

    def lend(self, cross, x):
        with self.reading:
            return cross(x)

    def read(self, view, stream):
        self.cupy.cuda.runtime.memcpyAsync(self.out.data.ptr, view.data.ptr, view.nbytes, ON_DEVICE, stream.ptr)

    def part(self, view):
        return view[: N // 2]

    def address(self, x):
        return x.data_ptr()

    def is_idle(self, stream):
        return stream.done

    def settle_owner(self):
        self.owning.synchronize()

    def successors(self):
        """torch gives out the lowest address of the free blocks of one size: the one that was given out last."""
        return [self.make(2.0)]

    def values(self):
        return ends(self.out.get())


class CupyOwned:
    """The mirror image, with a pool of its own so that nobody else's blocks are in the way."""

    raw = staticmethod(lambda c: import_module("torch").from_dlpack(c))
    cross = staticmethod(tb.to_torch)

    def __init__(self, torch, cupy, gate):
        self.torch, self.cupy = torch, cupy
        self.pool = cupy.cuda.MemoryPool()
        self.owning, self.out = cupy.cuda.Stream(non_blocking=True), torch.zeros(N, device="cuda")
        self.reading = gate.beside(torch.cuda.Stream, self.owning)
        self.further = gate.beside(torch.cuda.Stream, self.owning, self.reading)
        torch.cuda.synchronize()

    def make(self, value):
        with self.cupy.cuda.using_allocator(self.pool.malloc), self.owning:
            return self.cupy.full(N, value, self.cupy.float32)

    def spare(self):
        spare_blocks(lambda: self.make(0.0))

    def lend(self, cross, x):
        with self.torch.cuda.stream(self.reading):
            return cross(x)

    def read(self, view, stream):
        with self.torch.cuda.stream(stream):
            self.out[: view.numel()].copy_(view)

    def part(self, view):
        return view[: N // 2]

    def address(self, x):
        return x.data.ptr

    def is_idle(self, stream):
        return stream.query()

    def settle_owner(self):
        self.owning.synchronize()

    def successors(self):
        """CuPy's free blocks are a set, which gives out any: so all of them are taken."""
        return [self.make(2.0) for _ in range(self.pool.n_free_blocks())]

    def values(self):
        return ends(self.out.cpu().numpy())


CASES = {"torch-owned": TorchOwned, "cupy-owned": CupyOwned}


@pytest.fixture(params=CASES)
def case(request, torch, cupy, gate):
    return CASES[request.param](torch, cupy, gate)


def race(case, gate, cross, *, stream=None, use=lambda x, view, case: view, drop=lambda box: box.clear()):
    """Whether the block was reused while it was read, and which values were read."""

    def body(really):
        reading = stream or case.reading
        case.spare()
        x = case.make(1.0)
        case.settle_owner()
        view = case.lend(cross, x)
        case.torch.cuda.synchronize()
        freed = case.address(x)
        with gate.shut(really=really):
            gate.put_on(reading)
            view = use(x, view, case)
            case.read(view, reading)
            box = [x, view]
            del x, view
            drop(box)
            if stream is not None:  # what was lent for has been done, and only a further stream is held
                case.reading.synchronize()
                _lease.settle()
            successors = case.successors()
            case.settle_owner()
            assert not really or not case.is_idle(reading), "blind: the stream was not held"
            reused = freed in map(case.address, successors)
        return reused, case.values()

    return twice(body)


def test_by_hand_the_memory_is_reused_while_it_is_read(case, gate):
    """The negative control of this file."""
    reused, values = race(case, gate, case.raw)
    assert reused, "blind: the address was not reused"
    assert values == {2.0}


def test_lent_memory_is_not_reused_before_the_borrowers_work_is_done(case, gate):
    assert race(case, gate, case.cross) == (False, {1.0})


def test_afterwards_the_memory_is_free_again(case, gate, torch):
    race(case, gate, case.cross)
    torch.cuda.synchronize()
    assert _lease.settle() == 0
    if isinstance(case, CupyOwned):
        assert case.pool.used_bytes() == 0
    else:
        case.spare()  # torch looks at its events when it allocates
        stats = torch.cuda.memory_stats()
        assert stats["active_bytes.all.current"] == stats["allocated_bytes.all.current"], "a block waits for an event"


def test_a_view_that_outlives_the_array_keeps_the_memory(case, gate):
    reused, values = race(case, gate, case.cross, use=lambda x, view, case: case.part(view))
    assert not reused
    assert 2.0 not in values


def test_the_last_view_may_die_in_another_thread(case, gate):
    def drop(box):
        thread = threading.Thread(target=box.clear)
        thread.start()
        thread.join()

    assert race(case, gate, case.cross, drop=drop) == (False, {1.0})


def test_a_further_stream_is_waited_for_where_used_on_names_it(case, gate):
    def use(x, view, case):
        tb.used_on(view, case.further)
        return view

    assert race(case, gate, case.cross, stream=case.further, use=use) == (False, {1.0})


def test_a_further_stream_is_not_waited_for_where_nobody_names_it(case, gate):
    """The negative control of the test above."""
    assert race(case, gate, case.cross, stream=case.further) == (True, {2.0})


def test_memory_that_crossed_from_a_stream_that_did_not_allocate_it_is_kept_too(case, gate):
    """The current stream of the owner is another one at the crossing: it need not be that of the allocation."""

    def cross(x):
        other = case.torch.cuda.Stream()
        with tb.use_stream(other), tb.use_stream(case.reading):
            return case.cross(x)

    assert race(case, gate, cross) == (False, {1.0})


def test_a_tensor_over_cupys_memory_that_autograd_saved_keeps_it(torch, cupy, gate):
    """Nobody holds the tensor but the graph; backward is queued, and the graph is gone before it has run."""
    case = CupyOwned(torch, cupy, gate)
    weight = torch.ones(N, device="cuda", requires_grad=True)

    def body(really):
        case.spare()
        c = case.make(1.0)
        case.settle_owner()
        freed = c.data.ptr
        with torch.cuda.stream(case.reading):
            y = (tb.to_torch(c) * weight).sum()
            torch.cuda.synchronize()
            del c
            with gate.shut(really=really):
                gate.put_on(case.reading)
                (grad,) = torch.autograd.grad(y, weight)
                del y
                successors = case.successors()
                case.settle_owner()
                assert not really or not case.reading.query(), "blind"
                reused = freed in map(case.address, successors)
        return reused, set(grad.unique().tolist())

    assert twice(body) == (False, {1.0})


@pytest.mark.parametrize("by", ["torch", "interface"])
def test_a_cupy_stream_may_be_dropped_before_the_lease_that_names_it(torch, cupy, by):
    """The lease records an event on it when the last view is gone."""
    pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
    with cupy.cuda.using_allocator(pool.malloc):
        c = cupy.ones(1000, cupy.float32)
    with stream:
        view = tb.to_cupy(tb.to_torch(c) if by == "torch" else Interface(c))
    del stream, c, view
    for _ in range(3):
        torch.cuda.synchronize()
        left = _lease.settle()
    assert (left, pool.used_bytes()) == (0, 0)


class Interface:
    def __init__(self, owner):
        self.owner, self.__cuda_array_interface__ = owner, owner.__cuda_array_interface__


def test_memory_that_neither_owns_is_kept_while_cupy_reads_it(torch, cupy, gate):
    """CuPy's memory through torch and back: record_stream would do nothing, and does not say so."""
    case = CupyOwned(torch, cupy, gate)
    reading = gate.beside(lambda: cupy.cuda.Stream(non_blocking=True), case.owning)
    out = cupy.zeros(N, cupy.float32)

    def body(really):
        case.spare()
        c = case.make(1.0)
        case.settle_owner()
        freed = c.data.ptr
        with reading:
            back = tb.to_cupy(tb.to_torch(c))
        torch.cuda.synchronize()
        assert back.data.ptr == freed
        with gate.shut(really=really):
            gate.put_on(reading)
            cupy.cuda.runtime.memcpyAsync(out.data.ptr, back.data.ptr, NBYTES, ON_DEVICE, reading.ptr)
            del c, back
            successors = case.successors()
            case.settle_owner()
            assert not really or not reading.done, "blind"
            reused = freed in map(case.address, successors)
        return reused, ends(out.get())

    assert twice(body) == (False, {1.0})
    for _ in range(3):
        torch.cuda.synchronize()
        left = _lease.settle()
    assert left == 0
    assert case.pool.used_bytes() == 0


def test_a_cupy_stream_may_be_dropped_before_the_tensor_that_was_used_on_it(gpu):
    """torch records an event on it when the block is freed. In a process of its own: by hand this may end it."""
    code = """
import torch, cupy, tensorbridge as tb
for _ in range(50):
    t = torch.ones(1 << 20, device="cuda")
    s = cupy.cuda.Stream(non_blocking=True)
    with s:
        c = tb.to_cupy(t)
        c += 1
    del s, c, t
    torch.empty(1 << 20, device="cuda")
torch.cuda.synchronize()
print("alive")
"""
    run = subprocess.run([sys.executable, "-u", "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert (run.returncode, run.stdout) == (0, "alive\n"), run.stderr


@pytest.mark.parametrize("change", ["set_", "data", "del"])
def test_what_is_done_to_the_tensor_does_not_free_the_memory_under_cupys_array(torch, cupy, change):
    t = torch.full((1 << 20,), 1.0, device="cuda")
    c = tb.to_cupy(t)
    if change == "set_":
        t.set_(torch.empty(0, device="cuda"))
    elif change == "data":
        t.data = torch.empty(0, device="cuda")
    else:
        del t
    fillers = [torch.full((1 << 20,), 2.0, device="cuda") for _ in range(4)]
    torch.cuda.synchronize()
    assert float(c.max()) == 1.0
    assert len(fillers) == 4


class MadeOnExport:
    """Its memory is held by the capsule alone."""

    def __init__(self, case):
        self.case = case

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **options):
        made = self.case.make(1.0)
        self.case.settle_owner()
        self.freed = made.data.ptr
        return made.__dlpack__(**options)


def test_memory_that_only_a_capsule_holds_is_kept_while_torch_reads_it(torch, cupy, gate):
    case = CupyOwned(torch, cupy, gate)
    producer = MadeOnExport(case)
    out = torch.zeros(N, device="cuda")

    def body(really):
        case.spare()
        with torch.cuda.stream(case.reading):
            t = tb.to_torch(producer)
            torch.cuda.synchronize()
            with gate.shut(really=really):
                gate.put_on(case.reading)
                out.copy_(t)
                del t
                successors = case.successors()
                case.settle_owner()
                assert not really or not case.reading.query(), "blind"
                reused = producer.freed in map(case.address, successors)
        return reused, set(out.unique().tolist())

    assert twice(body) == (False, {1.0})


MOVES = {
    "to_numpy": lambda t: tb.to_numpy(t),
    "to the host": lambda t: tb.to_torch(t, device="cpu"),
    "from the host": lambda t: tb.to_torch(np.zeros(3, np.float32), device="cuda"),
    "into out": lambda t: tb.to_torch(t, out=t.cpu()),
    "a crossing": lambda t: tb.to_cupy(t),
}


@pytest.mark.parametrize("name", MOVES)
def test_memory_comes_back_at_the_next_call_though_another_stream_is_held(torch, cupy, gate, name):
    """Thousands of loans may be waiting for the other stream."""
    held = torch.cuda.Stream()
    free = gate.beside(torch.cuda.Stream, held)
    pool, small = cupy.cuda.MemoryPool(), torch.ones(3, device="cuda")
    with torch.cuda.stream(free):
        MOVES[name](small)  # loaded
    torch.cuda.synchronize()

    def body(really):
        with cupy.cuda.using_allocator(pool.malloc):
            others = [cupy.zeros(16, cupy.float32) for _ in range(100)]
            c = cupy.zeros(N, cupy.float32)
        torch.cuda.synchronize()
        with gate.shut(really=really):
            gate.put_on(held)
            with torch.cuda.stream(held):
                lent = [tb.to_torch(x) for x in others]
            del lent, others
            with torch.cuda.stream(free):
                t = tb.to_torch(c)
                del t, c
                free.synchronize()
                MOVES[name](small)
            return pool.used_bytes() < NBYTES

    assert twice(body)
