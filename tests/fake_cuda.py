"""A CUDA machine without CUDA: the few calls that the GPU modules make, recorded, and queued as on a device.

Nothing that is queued on a stream runs before the host waits for it, or the test says `run`; a stream can be held, and
waiting for what is held fails instead of hanging. Memory is real host memory, given out again by two allocators with
the rules of the real ones, so that a block which is reused too early is read with somebody else's values in it.

The frameworks on top of it are in fake_frameworks.py. What both assume of the real ones is listed, with the probes that
hold it on a device, in docs/gpu-facts.md.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import defaultdict, deque
from contextlib import contextmanager

import numpy as np

LEGACY, PER_THREAD = 1, 2


class CaptureError(RuntimeError):
    """What both frameworks raise for a call that a capture forbids."""


class Event:
    """A CUDA event: the last record counts, and a wait takes the state at the call."""

    def __init__(self, machine):
        self.machine, self.recorded, self.reached = machine, 0, {0}

    def passed(self):
        return self.recorded in self.reached


class PerThread:
    """What is current: a value a key, each thread with its own."""

    def __init__(self, default):
        self.default, self.local = default, threading.local()

    def __getitem__(self, key):
        return self.local.__dict__.get(str(key), self.default)

    def __setitem__(self, key, value):
        self.local.__dict__[str(key)] = value


class Machine:
    def __init__(self, devices=1):
        self.devices = devices
        self.queues = defaultdict(deque)  # (device, number): operations not yet done
        self.held = set()
        self.patience = 0  # seconds that a waiting host gives a held stream: for threads that are to wait
        self.capturing = set()  # (device, number)
        self.destroyed = set()
        self.calls = []  # what was asked of CUDA, as (name, *arguments)
        self.blocking_capture = False  # the capture is on a stream that the default stream waits for
        self.current = {"torch": PerThread(LEGACY), "cupy": PerThread(LEGACY)}  # by device: the number of a stream
        self.objects = PerThread(None)  # by device: CuPy's stream, made current as an object
        self.chosen = PerThread(0)
        self.handles = iter(range(0x1000, 1 << 30, 0x10))
        self.blocks = weakref.WeakValueDictionary()  # address: Block
        self.lies_on = {}  # address: the device of memory that no allocator here has made
        self.lock = threading.RLock()
        self.torch_memory, self.cupy_memory = TorchAllocator(self), CupyPool(self)

    # -- the device and the streams

    @property
    def device(self):
        return self.chosen["device"]

    @device.setter
    def device(self, index):
        self.chosen["device"] = index

    def did(self, name, *arguments):
        self.calls.append((name, *arguments))

    def names(self):
        return [call[0] for call in self.calls]

    def put(self, device, number, operation):
        """Queue (kind, *arguments) on a stream."""
        assert (device, number) not in self.destroyed, f"stream {number:#x} was used after its destruction"
        self.queues[device, number].append(operation)

    def kernel(self, device, number, function):
        self.put(device, number, ("call", function))

    def record(self, event, device, number):
        self.did("record", number)
        assert (device, number) not in self.capturing, "an event was recorded on a capturing stream"
        event.recorded += 1
        self.put(device, number, ("record", event, event.recorded))

    def wait(self, event, device, number):
        self.did("wait", number)
        if not event.passed():
            self.put(device, number, ("wait", event, event.recorded))

    def query(self, event):
        self.did("query")
        if self.capturing:  # in "global" mode, and from any thread
            raise CaptureError("operation not permitted when stream is capturing")
        return event.passed()

    def synchronize(self, event):
        self.did("synchronize")
        self.run()
        until = time.monotonic() + self.patience
        while not event.passed() and time.monotonic() < until:
            time.sleep(0.001)
            self.run()
        assert event.passed(), "the host waits for work that is held"

    def run(self):
        """Do all that can be done."""
        with self.lock:
            moved = True
            while moved:
                moved = False
                for key, queue in list(self.queues.items()):
                    while queue and key not in self.held and self._do(queue[0]):
                        queue.popleft()
                        moved = True

    def _do(self, operation):
        kind, *arguments = operation
        if kind == "call":
            arguments[0]()
        elif kind == "record":
            event, version = arguments
            event.reached.add(version)
        else:
            event, version = arguments
            return version in event.reached
        return True

    @contextmanager
    def hold(self, device, number):
        """The stream does nothing inside."""
        self.held.add((device, number))
        try:
            yield
        finally:
            self.held.discard((device, number))
            self.run()

    def is_capturing(self, device, number):
        self.did("is_capturing", number)
        if number == LEGACY and self.capturing and self.blocking_capture:
            raise CaptureError("operation would make the legacy stream depend on a capturing blocking stream")
        return (device, number) in self.capturing


# -- Memory


class Block:
    """Device memory: real bytes, and the stream that was current when it was allocated."""

    def __init__(self, nbytes, device, number):
        self.bytes = np.zeros(nbytes, np.uint8)
        self.address = self.bytes.__array_interface__["data"][0]
        self.nbytes, self.device, self.number = nbytes, device, number
        self.uses = set()


class CupyPool:
    """One free list a stream. A block goes back at once, whatever is queued on other streams."""

    def __init__(self, machine):
        self.machine, self.free = machine, defaultdict(list)
        self.used = 0

    def alloc(self, nbytes):
        device = self.machine.device
        number = self.machine.current["cupy"][device]
        found = self.free[device, number, nbytes]
        block = found.pop() if found else Block(nbytes, device, number)
        self.used += nbytes
        self.machine.blocks[block.address] = block
        return block

    def release(self, block):
        self.used -= block.nbytes
        self.free[block.device, block.number, block.nbytes].append(block)


class TorchAllocator(CupyPool):
    """As CuPy's, but a block used on other streams waits for an event on each, which the next allocation looks at."""

    def __init__(self, machine):
        super().__init__(machine)
        self.waiting = []

    def alloc(self, nbytes):
        still = []
        for block, events in self.waiting:
            (still.append((block, events)) if not all(e.passed() for e in events) else super().release(block))
        self.waiting = still
        device = self.machine.device
        number = self.machine.current["torch"][device]
        found = self.free[device, number, nbytes]
        block = found.pop() if found else Block(nbytes, device, number)
        self.used += nbytes
        self.machine.blocks[block.address] = block
        return block

    def release(self, block):
        events = []
        for device, number in block.uses - {(block.device, block.number)}:
            event = Event(self.machine)
            event.recorded += 1
            self.machine.put(device, number, ("record", event, 1))
            events.append(event)
        block.uses = set()
        if events:
            self.waiting.append((block, events))
        else:
            super().release(block)


def at(address, shape, dtype, strides=None):
    """Memory as an array, for a kernel."""

    class Memory:
        __array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": tuple(shape),
            "strides": strides,
            "typestr": np.dtype(dtype).str,
        }

    return np.asarray(Memory())
