"""Bad input on a device, and memory of others: clear errors, and devices, streams and pools are left as found."""

import subprocess
import sys

import numpy as np
import pytest
from holding import twice

import tensorbridge as tb
from tensorbridge import _lease, _staging, _streams

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
