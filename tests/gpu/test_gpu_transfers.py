"""Transfers on a device: by every road the same values, sources free in time, nothing handed out too early."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from holding import twice

import tensorbridge as tb
from tensorbridge import _lease, _staging, _streams

pytestmark = pytest.mark.gpu

MIB = 1 << 20
SIZES = {"small": 1000, "medium": MIB // 4, "one slot": 2 * MIB, "more than the ring": 11 * MIB + 3}  # of float32
DTYPES = ["bool", "uint8", "int64", "float16", "float32", "complex64", "bfloat16"]


def numbers(n, dtype="float32"):
    raw = np.random.default_rng(n).integers(0, 100, n)
    return raw % 2 == 0 if dtype == "bool" else raw.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def on_device(framework, a):
    return (tb.to_torch if framework == "torch" else tb.to_cupy)(a, device="cuda")


@pytest.mark.parametrize("framework", ["torch", "cupy"])
@pytest.mark.parametrize("size", SIZES)
def test_what_goes_up_comes_down(torch, cupy, unchanged, framework, size):
    a = numbers(SIZES[size])
    x = on_device(framework, a)
    found = tb.to_numpy(x)
    assert np.array_equal(found, a)
    assert found.flags.writeable
    assert tb.plan(x, "numpy").bytes_moved == a.nbytes


@pytest.mark.parametrize("framework", ["torch", "cupy"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["small", "more than the ring"])
def test_every_dtype_survives_by_every_road(torch, cupy, framework, dtype, size):
    a = numbers(SIZES[size], dtype)
    found = tb.to_numpy(on_device(framework, a))
    assert found.dtype == a.dtype
    assert np.array_equal(found.view(np.uint8), a.view(np.uint8))


LAYOUTS = {
    "channels last": lambda a: a[: 1 << 21].reshape(2, 16, 256, 256).transpose(0, 3, 1, 2),
    "transposed": lambda a: a[: 1 << 21].reshape(1 << 10, 1 << 11).T,
    "strided": lambda a: a[::2],
    "reversed": lambda a: a[::-1],
    "broadcast": lambda a: np.broadcast_to(a[:1000], (100, 1000)),
    "0-d": lambda a: a[3:4].reshape(()),
    "empty": lambda a: a[:0].reshape(0, 3),
}


@pytest.mark.parametrize("framework", ["torch", "cupy"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_survives_and_keeps_its_order(torch, cupy, framework, name):
    a = LAYOUTS[name](numbers(1 << 22))
    x = on_device(framework, a)
    assert np.array_equal(tb.to_numpy(x), a)
    if name in ("channels last", "transposed"):
        assert tb.describe(x).strides == a.strides
        assert tb.to_numpy(x).strides == a.strides


@pytest.mark.parametrize("framework", ["torch", "cupy"])
def test_strided_device_memory_is_packed_there_and_comes_down(torch, cupy, framework):
    a = numbers(1 << 22).reshape(1 << 11, 1 << 11)
    x = on_device(framework, a)[:, ::3]
    assert [s.kind for s in tb.plan(x, "numpy").steps if s.kind] == ["d2d", "d2h"]
    assert np.array_equal(tb.to_numpy(x), a[:, ::3])


def test_a_dtype_is_changed_where_fewer_bytes_cross(torch):
    a = numbers(1 << 20, "uint8")
    up = tb.plan(a, "torch", device="cuda", dtype="float32")
    assert [(s.op, s.nbytes) for s in up.steps if s.kind] == [("to_device", 1 << 20), ("cast", 1 << 22)]
    t = tb.to_torch(a, device="cuda", dtype="float32")
    assert np.array_equal(tb.to_numpy(t, dtype="uint8"), a)
    assert [s.op for s in tb.plan(t, "numpy", dtype="uint8").steps if s.kind] == ["cast", "to_host"]


@pytest.mark.parametrize("framework", ["torch", "cupy"])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_out_is_filled_whether_it_is_pinned_or_not(torch, cupy, framework, pinned, size):
    a = numbers(SIZES[size])
    x = on_device(framework, a)
    out = _staging.pinned_empty(a.nbytes).view(np.float32) if pinned else np.zeros_like(a)
    assert tb.to_numpy(x, out=out) is out
    assert np.array_equal(out, a)


def test_filling_a_tensor_over_the_bus_is_seen_by_autograd(torch):
    a = numbers(SIZES["more than the ring"])
    t = torch.zeros(a.size, device="cuda")
    version = t._version
    tb.to_torch(a, out=t)
    assert t._version > version
    back = torch.zeros(a.size)
    version = back._version
    tb.to_torch(t, out=back)
    assert back._version > version
    assert np.array_equal(back.numpy(), a)


def test_a_graph_is_kept_over_the_bus(torch):
    x = torch.ones(2 * MIB, requires_grad=True)
    there = tb.to_torch(x, device="cuda")
    back = tb.to_torch(there * 2, device="cpu")
    back.sum().backward()
    assert set(x.grad.unique().tolist()) == {2.0}


def test_pinned_results_are_pinned_and_whole(torch):
    t = torch.arange(2 * MIB, device="cuda", dtype=torch.float32)
    back = tb.to_torch(t, device="cpu", pin_memory=True)
    assert back.is_pinned()
    assert torch.equal(back, t.cpu())
    assert [s.op for s in tb.plan(t, "torch", device="cpu", pin_memory=True).steps if s.kind] == ["to_host"]


# What may be changed, and when


@pytest.mark.parametrize("framework", ["torch", "cupy"])
@pytest.mark.parametrize("nbytes", [8 * MIB, 32 * MIB], ids=["one slot", "four slots"])
def test_up_returns_with_the_source_free_and_without_waiting_for_the_stream(torch, cupy, gate, framework, nbytes):
    """The ring has room: nothing is waited for, though the stream is held."""
    stream = torch.cuda.Stream()
    source = np.empty(nbytes // 4, np.float32)

    def body(really):
        source.fill(1.0)
        with tb.use_stream(stream), gate.shut(really=really):
            gate.put_on(stream)
            x = on_device(framework, source)
            source.fill(2.0)
            assert not really or not stream.query(), "it waited for the stream"
        return set(np.unique(tb.to_numpy(x)).tolist())

    assert twice(body) == {1.0}


def test_by_hand_a_source_that_is_changed_too_early_sends_other_values(torch, gate):
    """The negative control of the test above."""
    stream = torch.cuda.Stream()
    source = torch.empty(2 * MIB, pin_memory=True)

    def body(really):
        source.fill_(1.0)
        x = torch.zeros(2 * MIB, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream), gate.shut(really=really):
            gate.put_on(stream)
            x.copy_(source, non_blocking=True)
            source.fill_(2.0)
        return set(x.unique().tolist())

    assert twice(body) == {2.0}


def test_a_pinned_source_is_kept_with_non_blocking_until_it_has_been_read(torch, gate):
    stream = torch.cuda.Stream()

    def body(really):
        source = torch.full((2 * MIB,), 1.0).pin_memory()
        with torch.cuda.stream(stream), gate.shut(really=really):
            gate.put_on(stream)
            x = tb.to_torch(source, device="cuda", non_blocking=True)
            del source
            fillers = [torch.full((2 * MIB,), 2.0, pin_memory=True) for _ in range(2)] if not really else []
            assert len(_lease._pending) >= really
        assert len(fillers) in (0, 2)
        return set(x.unique().tolist())

    assert twice(body) == {1.0}
    torch.cuda.synchronize()
    assert _lease.settle() == 0


def test_by_hand_a_result_that_is_read_too_early_is_not_filled(torch, gate):
    """The negative control of `to_numpy`: what torch's own non_blocking hands out."""
    stream = torch.cuda.Stream()
    out = torch.zeros(2 * MIB, pin_memory=True)

    def body(really):
        out.zero_()
        t = torch.ones(2 * MIB, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream), gate.shut(really=really):
            gate.put_on(stream)
            out.copy_(t, non_blocking=True)
            return set(out.unique().tolist())

    assert twice(body) == {0.0}


# to_numpy_async


@pytest.mark.parametrize("framework", ["torch", "cupy"])
@pytest.mark.parametrize("pinned", [False, True])
def test_a_transfer_is_not_done_while_its_producer_is_held_and_right_afterwards(torch, cupy, gate, framework, pinned):
    stream = torch.cuda.Stream()

    def body(really):
        with tb.use_stream(stream):
            x = torch.zeros(4 * MIB, device="cuda") if framework == "torch" else cupy.zeros(4 * MIB, cupy.float32)
            torch.cuda.synchronize()
            with gate.shut(really=really):
                gate.put_on(stream)
                x.fill_(1.0) if framework == "torch" else x.fill(1.0)
                transfer = tb.to_numpy_async(x, pinned=pinned)
                del x
                if really:
                    with pytest.raises(TimeoutError):
                        transfer.result(timeout=0.2)
                    assert not transfer.done()
                    gate.open()
                found = transfer.result(timeout=30)
        return set(np.unique(found).tolist())

    assert twice(body) == {1.0}


def test_a_tree_comes_down_in_the_background(torch, cupy, unchanged):
    tree = {
        "t": torch.arange(1000.0, device="cuda"),
        "many": [torch.full((10,), float(i), device="cuda") for i in range(100)],
        "c": cupy.arange(2 * MIB, dtype=cupy.float32).reshape(2, -1).T,
        "host": np.arange(3),
        "text": "x",
    }
    for pinned in (False, True):
        found = tb.to_numpy_async(tree, pinned=pinned).result(timeout=30)
        assert np.array_equal(found["t"], np.arange(1000.0))
        assert [a[0] for a in found["many"]] == list(range(100))
        assert np.array_equal(found["c"], cupy.asnumpy(tree["c"]))
        assert found["text"] == "x"


def test_many_small_arrays_go_in_one_transfer_either_way(torch):
    leaves = {str(i): np.full(1024, i, np.float32) for i in range(1000)}
    there = tb.tree.to_torch(leaves, device="cuda")
    assert all(bool((there[str(i)] == i).all()) for i in range(0, 1000, 97))
    back = tb.tree.to_numpy(there)
    assert all(np.array_equal(back[name], leaf) for name, leaf in leaves.items())


# Bad input; everything is left as it was


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
    a = numbers(SIZES["more than the ring"])
    assert np.array_equal(tb.to_numpy(tb.to_torch(a, device="cuda")), a)
    ring = _staging.ring()
    torch.cuda.synchronize()
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
    except tb.DeviceError as error: print(True, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
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
        [sys.executable, "-c", CHILDREN[name]], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.stdout.strip() in ("True", "TrueTrue"), run.stderr


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
