"""Ten thousand crossings later: both pools, the ring, and what is kept are where they were."""

import gc

import numpy as np
import pytest

import tensorbridge as tb
from tensorbridge._cuda import _lease, _staging, _streams

pytestmark = pytest.mark.gpu

TIMES = 10_000


def settled(torch):
    gc.collect()
    for _ in range(3):  # an owner that is dropped may release another
        torch.cuda.synchronize()
        left = _lease.settle()
    return left


def state(torch, cupy):
    pending, ring = settled(torch), _staging._ring
    return {
        "torch": torch.cuda.memory_allocated(),
        "CuPy": cupy.get_default_memory_pool().used_bytes(),
        "leases": len(_lease._leases),
        "pending": pending,
        "streams held": len(_streams._held),
        "slots": None if ring is None else ring._made,
    }


def to_cupy(torch, cupy, x):
    tb.to_cupy(x["t"])


def to_torch(torch, cupy, x):
    tb.to_torch(x["c"])


def and_back(torch, cupy, x):
    tb.to_cupy(tb.to_torch(x["c"]))


def on_other_streams(torch, cupy, x):
    with x["stream"]:
        tb.to_torch(x["c"] + 1)
        tb.to_cupy(x["t"] + 1)


CROSSINGS = {"to_cupy": to_cupy, "to_torch": to_torch, "there and back": and_back, "other streams": on_other_streams}


@pytest.fixture
def arrays(torch, cupy):
    return {
        "t": torch.zeros(1000, device="cuda"),
        "c": cupy.zeros(1000, cupy.float32),
        "stream": cupy.cuda.Stream(non_blocking=True),
    }


@pytest.mark.parametrize("name", CROSSINGS)
def test_ten_thousand_crossings_leave_nothing_behind(torch, cupy, arrays, name):
    cross = CROSSINGS[name]
    for _ in range(100):
        cross(torch, cupy, arrays)
    before = state(torch, cupy)
    for _ in range(TIMES):
        cross(torch, cupy, arrays)
    assert state(torch, cupy) == before
    assert before["pending"] == 0


def test_many_transfers_leave_nothing_behind(torch, cupy, whole_ring):
    a = np.zeros(3 << 20, np.float32)

    def move():
        t = tb.to_torch(a, device="cuda")
        tb.to_numpy(t)
        tb.to_numpy(tb.to_cupy(a))
        tb.to_numpy_async({"t": t}, pinned=True).result(timeout=30)

    for _ in range(3):
        move()
    before = state(torch, cupy)
    pinned = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    for _ in range(50):
        move()
    assert state(torch, cupy) == before
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] <= pinned
    assert before["slots"] <= _staging.SLOTS
