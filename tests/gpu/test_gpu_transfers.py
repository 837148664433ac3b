"""Transfers on a device: by every road the same values, sources free in time, nothing handed out too early."""

import threading

import ml_dtypes
import numpy as np
import pytest
from holding import twice

import tensorbridge as tb
from tensorbridge._cuda import _lease, _staging

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
def test_up_returns_with_the_source_free_and_without_waiting_for_the_stream(
    torch, cupy, gate, whole_ring, framework, nbytes
):
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


def by_hand(source):
    import torch

    return torch.empty(source.shape, device="cuda").copy_(source, non_blocking=True)


def by_bridge(source):
    return tb.to_torch(source, device="cuda", non_blocking=True)


@pytest.mark.parametrize(("send", "arrived"), [(by_hand, {2.0}), (by_bridge, {1.0})], ids=["by hand", "tensorbridge"])
def test_a_pinned_source_is_kept_with_non_blocking_until_it_has_been_read(torch, cupy, gate, send, arrived):
    """Memory of CuPy's pinned pool, which gives it out again at once; torch's own would wait for an event."""
    stream = torch.cuda.Stream()

    def pinned(value):
        memory = cupy.cuda.alloc_pinned_memory(8 * MIB)
        a = np.frombuffer(memory, np.float32, 2 * MIB)
        a.fill(value)
        return torch.from_numpy(a)

    def body(really):
        spare = [pinned(0.0) for _ in range(3)]
        del spare
        with torch.cuda.stream(stream), gate.shut(really=really):
            gate.put_on(stream)
            x = send(source := pinned(1.0))
            where = source.data_ptr()
            del source
            taken = pinned(2.0)
            assert (taken.data_ptr() == where) is (send is by_hand) or not really, "blind"
        return set(x.unique().tolist())

    assert twice(body) == arrived
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
def test_a_transfer_is_not_done_while_its_producer_is_held_and_right_afterwards(
    torch, cupy, gate, whole_ring, framework, pinned
):
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


DTYPES = ["float32", "float64", "uint16", "bool", "complex64", "bfloat16"]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        *((dtype, options) for dtype in DTYPES for options in ({}, {"pin_memory": True}, {"copy": True})),
        *((dtype, {"dtype": "float32"}) for dtype in DTYPES if dtype != "complex64"),
    ],
    ids=str,
)
def test_small_arrays_of_either_library_come_down_as_tensors(torch, cupy, dtype, options):
    there = tb.tree.to_torch([np.arange(n) for n in (3, 4, 5, 6)], device="cuda", dtype=dtype)
    if dtype != "bfloat16":
        there += [tb.to_cupy(t, copy=True) for t in there]
    with tb.trace() as trace:
        found = tb.tree.to_torch(there, device="cpu", **options)
    assert [t.tolist() for t in found] == [t.tolist() for t in there]
    assert all(t.device.type == "cpu" and t.dtype == getattr(torch, options.get("dtype", dtype)) for t in found)
    assert len(trace.events) == len(there)
    back = tb.tree.to_numpy(there)
    assert [a.astype(complex).tolist() for a in back] == [[complex(v) for v in t.tolist()] for t in there]


def test_small_cupy_arrays_are_prefetched_to_the_host(cupy):
    (batch,) = tb.prefetch([[cupy.arange(3.0), cupy.arange(4.0)]], device="cpu")
    assert [t.tolist() for t in batch] == [[0, 1, 2], [0, 1, 2, 3]]


@pytest.mark.parametrize("nbytes", [1 << 10, 8 * MIB])
@pytest.mark.parametrize("to", [tb.to_torch, tb.to_cupy])
def test_a_pinned_tensor_goes_up_at_once_where_nothing_is_to_be_waited_for(torch, cupy, gate, to, nbytes):
    stream, source = torch.cuda.Stream(), torch.ones(nbytes // 4, pin_memory=True)
    options = {"device": "cuda", "non_blocking": True}

    def body(really):
        with tb.use_stream(stream), gate.shut(really=really):
            gate.put_on(stream)
            plan = tb.plan(source, to.__name__.removeprefix("to_"), **options)
            x = to(source, **options)
            assert not really or not stream.query(), "it waited for the stream"
        assert (plan.blocking, "straight from pinned memory" in str(plan)) == (False, True)
        return set(np.unique(tb.to_numpy(x)).tolist())

    assert twice(body) == {1.0}


HOST = {
    "ordinary array": lambda torch, n: np.ones(n, "float32"),
    "ordinary tensor": lambda torch, n: torch.ones(n),
    "page-locked": lambda torch, n: torch.ones(n, pin_memory=True),
    "page-locked, every other": lambda torch, n: torch.ones(2 * n, pin_memory=True)[::2],
    "page-locked, another dtype": lambda torch, n: torch.ones(n, dtype=torch.int32, pin_memory=True),
}


@pytest.mark.parametrize("n", [1000, 4 * MIB])
@pytest.mark.parametrize("where", ["out", "device"])
@pytest.mark.parametrize("kind", HOST)
def test_plan_says_whether_the_host_waits_for_what_goes_up(torch, cupy, gate, whole_ring, kind, where, n):
    """The stream is held until it is let go by a timer: who comes back before that has not waited."""
    mine = torch.cuda.Stream()
    x = HOST[kind](torch, n)
    options = {"out": torch.zeros(n, device="cuda")} if where == "out" else {"device": "cuda"}
    options["non_blocking"] = True
    said = tb.plan(x, "torch", **options).blocking

    def body(really):
        torch.cuda.synchronize()
        with torch.cuda.stream(mine), gate.shut(really=really):
            gate.put_on(mine)
            timer = threading.Timer(0.5, gate.open)
            timer.start()
            result = tb.to_torch(x, **options)
            waited = mine.query()
            timer.join()
        assert set(result.unique().tolist()) == {1.0}
        return waited

    assert said or not twice(body)


@pytest.mark.parametrize("many", [1, 50])
@pytest.mark.parametrize("to", ["torch", "cupy"])
def test_a_tree_casts_what_is_meant_on_the_way_up_and_down(torch, cupy, unchanged, to, many):
    """On the host before the bus, on the device behind it, and not at all: in blocks that are the same."""
    names = ("float64", "float32", "float16", "int32", "bool")
    tree = {name: [numbers(30 + i, name) for i in range(many)] for name in names}
    casts = {"float64": "float32", "float16": "float32"}
    up = tb.tree.to_torch if to == "torch" else tb.tree.to_cupy
    there = up(tree, device="cuda", dtype=casts)
    back = tb.tree.to_numpy(there, dtype={"real floating": "float64"})
    for name in names:
        for source, gone, found in zip(tree[name], there[name], back[name], strict=True):
            assert tb.describe(gone).dtype == casts.get(name, name)
            assert found.dtype == (name if name in ("int32", "bool") else "float64")
            assert np.array_equal(found, source)


@pytest.mark.parametrize("call", ["tree", "prefetch"])
def test_small_leaves_cross_where_there_is_no_more_page_locked_memory(torch, cupy, monkeypatch, call):
    batch = {name: np.full(1000, i, "float32") for i, name in enumerate("abc")}

    def none(nbytes):
        raise tb.DeviceError("no page-locked host memory")

    monkeypatch.setattr(_staging, "pinned_empty", none)
    if call == "tree":
        made = tb.tree.to_torch(batch, device="cuda")
    else:
        (made,) = tb.prefetch([batch])
    assert [set(t.unique().tolist()) for t in made.values()] == [{0.0}, {1.0}, {2.0}]
