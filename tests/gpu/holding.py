"""A kernel that holds a stream until the host lets it go, so that a missing wait is seen every time.

Nothing may be allocated or loaded for the first time while a stream is held: it could wait behind it. So each body runs
twice, first with the gate open, then held. The kernel gives up after LIMIT seconds and says so; nothing hangs a card.
"""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from importlib import import_module

import numpy as np

LIMIT = 3.0  # seconds
SOURCE = r"""
extern "C" __global__ void hold(volatile int* gate, unsigned long long limit_ns) {
  unsigned long long t0, t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t0));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    if (t - t0 > limit_ns) { gate[1] = 1; return; }
  } while (gate[0] == 0);
}
"""


class Handle:
    """A raw handle under the CUDA stream protocol."""

    def __init__(self, number):
        self.number = number

    def __cuda_stream__(self):
        return 0, self.number


def number_of(stream):
    return stream.cuda_stream if hasattr(stream, "cuda_stream") else stream.ptr


class Gate:
    def __init__(self):
        torch, cupy = import_module("torch"), import_module("cupy")
        self.cupy = cupy
        self.pinned = torch.zeros(2, dtype=torch.int32, device="cpu", pin_memory=True)
        self.flags = self.pinned.numpy()  # [open, timed out]
        self.kernel = cupy.RawKernel(SOURCE, "hold")
        self.scratch = cupy.zeros(2 << 20, cupy.uint8)
        self.flags[0] = 1
        self.put_on(torch.cuda.current_stream())  # the kernel is loaded now
        self.touch(torch.cuda.current_stream())
        torch.cuda.synchronize()

    def put_on(self, stream):
        """Queue the kernel on a stream of either library."""
        address = np.uint64(self.flags.__array_interface__["data"][0])
        before = self.cupy.cuda.get_current_stream()  # a with block would forget one made current by `.use()`
        self.cupy.cuda.Stream.from_external(Handle(number_of(stream))).use()
        try:
            self.kernel((1,), (1,), (address, np.uint64(LIMIT * 1e9)))
        finally:
            before.use()

    def touch(self, stream):
        """Queue a little work, and an event behind it."""
        runtime, number, at = self.cupy.cuda.runtime, number_of(stream), self.scratch.data.ptr
        event = self.cupy.cuda.Event(disable_timing=True)
        runtime.memsetAsync(at, 0, 1 << 20, number)
        runtime.memcpyAsync(at + (1 << 20), at, 1 << 20, runtime.memcpyDeviceToDevice, number)
        runtime.eventRecord(event.ptr, number)
        return event

    def beside(self, make, *held):
        """A stream from `make` whose work gets on while each of `held` is held.

        Two streams may share one queue of the hardware. Where work waits there, that of the other waits behind it: the
        hold would time out, or a control see no race, and no code under test would be to blame.
        """
        tried = []  # kept meanwhile: what is destroyed might be made again
        for _ in range(64):
            tried.append(make())
            if all(self.apart(one, tried[-1]) for one in held):
                return tried[-1]
        raise AssertionError("blind: no stream gets on beside the held one")

    def apart(self, held, other):
        with self.shut():
            self.put_on(held)
            self.touch(held)
            event, until = self.touch(other), time.monotonic() + 0.1
            while not event.done and time.monotonic() < until:
                time.sleep(0.001)
            return event.done

    def open(self):
        self.flags[0] = 1

    @contextmanager
    def shut(self, *, really=True):
        """Kernels queued inside hold their stream to the end of the block; with `really` False they do not."""
        self.flags[:] = (0 if really else 1), 0
        try:
            yield
        finally:
            self.open()
        import_module("torch").cuda.synchronize()
        assert not self.flags[1], "the hold timed out: something waited for the held stream, or shared its queue"


def twice(body):
    """What `body(really)` returns when the stream is really held; before, it runs once with the gate open."""
    body(False)
    settled()
    result = body(True)
    settled()
    return result


def settled():
    """Nothing is queued, and memory that waited for it is free again; tensorbridge need not be there."""
    lease = sys.modules.get("tensorbridge._cuda._lease")
    for _ in range(3):  # an owner that is dropped may release another
        import_module("torch").cuda.synchronize()
        if lease is not None:
            lease.settle()
