"""torch and CuPy on the machine of fake_cuda.py: modules with the calls that the GPU modules make, and no more."""

from __future__ import annotations

import importlib
import sys
import threading
import types
import weakref
from contextlib import contextmanager

import numpy as np
from fake_cuda import LEGACY, PER_THREAD, Event, Machine, at

import tensorbridge._adapters as adapters
from tensorbridge import _device_lanes
from tensorbridge._cuda import _lease, _staging, _stream_order, _streams

adapters.named("torch")  # made for the real torch, before another stands in its place


def installed(monkeypatch, *, devices=1, without=()):
    """For a fixture: the machine, with torch and CuPy on it where tensorbridge looks for them, and nothing kept yet."""
    machine = Machine(devices)
    machine.backend = "native"  # torch's allocator
    machine.torch, machine.cupy = make_torch(machine), make_cupy(machine)
    sys.modules.pop("tensorbridge._adapters._cupy", None)  # made for the real CuPy, where it is installed
    for name in ("torch", "cupy"):
        monkeypatch.setitem(sys.modules, name, getattr(machine, name))
        if name in without:
            monkeypatch.delitem(sys.modules, name)
    for module, name, value in (
        (_streams, "_wrapped", {}),
        (_streams, "_held", {}),
        (_streams, "_behind", {}),
        (_streams, "_side", {}),
        (_streams, "_usable", set()),
        (_stream_order, "_events", {}),
        (_lease, "_leases", {}),
        (_lease, "_pending", {}),
        (_streams, "_counts", {}),
        (_staging, "_ring", None),
        (_device_lanes, "_Tensor", None),
        (_device_lanes, "_Array", None),
        (adapters, "_of_type", dict(adapters._of_type)),
    ):
        monkeypatch.setattr(module, name, value)
    yield machine
    machine.capturing.clear()
    machine.held.clear()
    sys.modules.pop("tensorbridge._adapters._cupy", None)  # it was made for these modules
    adapters.__dict__.pop("_cupy", None)


def cupy_adapter():
    return importlib.import_module("tensorbridge._adapters._cupy")


# -- torch


class Storage:
    """Frees its block when it dies, or lets go of the exporter."""

    def __init__(self, machine, block=None, exporter=None):
        self.machine, self.block, self.exporter = machine, block, exporter
        self._cdata = id(self)

    def resizable(self):
        return self.exporter is None

    def nbytes(self):
        return 1 << 40  # never short of what a tensor claims

    def __del__(self):
        if self.block is not None:
            self.machine.torch_memory.release(self.block)


class Tensor:
    """A contiguous float32 tensor on a CUDA device: no more of it than the GPU modules touch."""

    is_cuda, dtype = True, "torch.float32"
    requires_grad = is_nested = False

    def __init__(self, storage, address, shape, index):
        self._storage, self._address, self.shape, self.index = storage, address, shape, index
        self.device = types.SimpleNamespace(type="cuda", index=index)

    def again(self):
        return Tensor(Storage(self._storage.machine, exporter=self), self._address, self.shape, self.index)

    def _is_zerotensor(self):
        return False

    def untyped_storage(self):
        return self._storage

    def data_ptr(self):
        return self._address

    def is_neg(self):
        return False

    def is_contiguous(self):
        return True

    def storage_offset(self):
        return 0

    def element_size(self):
        return 4

    def get_device(self):
        return self.index

    @property
    def nbytes(self):
        return 4 * self.numel()

    def numel(self):
        return int(np.prod(self.shape))

    def stride(self):
        return tuple(np.cumprod([1, *self.shape[:0:-1]])[::-1].tolist())

    def detach(self):
        return Tensor(self._storage, self._address, self.shape, self.index)

    def record_stream(self, stream):
        machine = self._storage.machine
        machine.did("record_stream", stream.cuda_stream or LEGACY)
        if self._storage.block is not None:  # silently nothing for memory of others
            self._storage.block.uses.add((stream.device_index, stream.cuda_stream or LEGACY))

    def array(self):
        return at(self._address, self.shape, np.float32)


def make_torch(machine):
    torch = types.ModuleType("torch")
    cuda = types.SimpleNamespace()
    current = machine.current["torch"]

    class Stream:
        def __init__(self, device=None, number=None):
            self.device_index = machine.device if device is None else device
            self.cuda_stream = next(machine.handles) if number is None else number
            self.device = types.SimpleNamespace(type="cuda", index=self.device_index)

        def __cuda_stream__(self):
            return 0, self.cuda_stream

        def wait_event(self, event):
            machine.wait(event.inner, self.device_index, self.cuda_stream or LEGACY)

    def external(number, device=None):
        assert number not in (0, 1), "ExternalStream(0) is a fresh stream up to torch 2.12, and (1) none at all"
        return Stream(device, number)

    class CudaEvent:
        def __init__(self):
            machine.did("torch.Event")
            self.inner = Event(machine)

        def record(self, stream):
            machine.record(self.inner, stream.device_index, stream.cuda_stream or LEGACY)

        def query(self):
            return machine.query(self.inner)

        def synchronize(self):
            machine.synchronize(self.inner)

    @contextmanager
    def stream(chosen):
        device, index = machine.device, chosen.device_index
        before = current[index]
        current[index], machine.device = chosen.cuda_stream or LEGACY, index
        try:
            yield
        finally:
            current[index], machine.device = before, device

    @contextmanager
    def device(index):
        before, machine.device = machine.device, index
        try:
            yield
        finally:
            machine.device = before

    def allocate(nbytes, index, number):
        if nbytes > 1 << 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        with device(index), stream(Stream(index, number)):
            block = machine.torch_memory.alloc(nbytes)
        blocks[block.address] = block
        return block.address

    blocks = {}
    torch.OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})
    torch.Tensor, torch.Stream, torch.cuda = Tensor, Stream, cuda
    torch._C = types.SimpleNamespace(
        _cuda_getCurrentRawStream=lambda index: current[index] if current[index] != LEGACY else 0
    )
    cuda.Stream, cuda.ExternalStream, cuda.Event, cuda.stream, cuda.device = Stream, external, CudaEvent, stream, device
    cuda.default_stream = lambda index: Stream(index, 0)
    cuda.current_device, cuda.device_count = lambda: machine.device, lambda: machine.devices
    cuda.init = lambda: None
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda._is_in_bad_fork = lambda: False
    cuda.is_current_stream_capturing = lambda: machine.is_capturing(machine.device, current[machine.device])
    cuda.caching_allocator_alloc = allocate
    cuda.caching_allocator_delete = lambda address: machine.torch_memory.release(blocks.pop(address))
    cuda.get_allocator_backend = lambda: machine.backend
    cuda.memory_allocated = lambda index=0: machine.torch_memory.used

    def full(shape, value):
        """Allocated and filled on torch's current stream."""
        block = machine.torch_memory.alloc(4 * int(np.prod(shape)))
        t = Tensor(Storage(machine, block), block.address, shape, block.device)
        machine.kernel(block.device, current[block.device], lambda: t.array().fill(value))
        return t

    torch.full = full
    return torch


# -- CuPy


def make_cupy(machine):
    cupy = types.ModuleType("cupy")
    cuda = types.SimpleNamespace()
    current = machine.current["cupy"]
    stacks = {}  # (thread, device): CuPy's `with` blocks

    class RuntimeFailure(RuntimeError):
        pass

    class Stream:
        null = None

        def __init__(self, non_blocking=False, number=None, device_id=None):
            self.ptr = next(machine.handles) if number is None else number
            self.device_id = machine.device if device_id is None else device_id
            self._foreign_stream_ref = None
            self.machine = machine

        @classmethod
        def from_external(cls, other):
            made = cls(number=other.__cuda_stream__()[1], device_id=-1)
            made._foreign_stream_ref = other
            return made

        def __cuda_stream__(self):
            return 0, self.ptr

        def use(self):
            assert self.device_id in (-1, machine.device), "the stream's device is not current"
            current[machine.device] = self.ptr or LEGACY
            machine.objects[machine.device] = self

        def __enter__(self):
            self.use()
            stacks.setdefault((threading.get_ident(), machine.device), []).append(self)
            return self

        def __exit__(self, *exc):
            """Back to the `with` block around it, or to the default stream: `use` is forgotten (cupy#7866)."""
            stack = stacks[threading.get_ident(), machine.device]
            stack.pop()
            (stack[-1] if stack else Stream.null).use()

        def is_capturing(self):
            return machine.is_capturing(machine.device, self.ptr or LEGACY)

        def __del__(self):
            if self._foreign_stream_ref is None and self.ptr > PER_THREAD:
                machine.destroyed.add((self.device_id, self.ptr))

    Stream.null = Stream(number=0, device_id=-1)

    class CudaEvent:
        def __init__(self, disable_timing=False):
            machine.did("cupy.Event")
            self.inner, self.ptr = Event(machine), next(machine.handles)
            events[self.ptr] = self.inner

        @property
        def done(self):
            return machine.query(self.inner)

        def synchronize(self):
            machine.synchronize(self.inner)

    class Device:
        def __init__(self, index):
            self.id = index

        def __enter__(self):
            self.before, machine.device = machine.device, self.id

        def __exit__(self, *exc):
            machine.device = self.before

    class UnownedMemory:
        def __init__(self, ptr, size, owner, device_id=-1):
            if device_id == -1:  # the driver is asked; CuPy takes its "none" (-1, in some modes -2) for the current one
                device_id = machine.lies_on.get(ptr, machine.device)
            self.ptr, self.size, self._owner, self.device_id = ptr, size, owner, device_id

    class OwnMemory:
        def __init__(self, block):
            self.block, self.ptr, self.device_id = block, block.address, block.device

        def __del__(self):
            machine.cupy_memory.release(self.block)

    class MemoryPointer:
        def __init__(self, mem, offset):
            self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id

        def __add__(self, nbytes):
            return MemoryPointer(self.mem, self.ptr - self.mem.ptr + nbytes)

    class ndarray:
        def __init__(self, shape, dtype=np.float32, memptr=None, strides=None):
            dense = np.empty(shape, dtype)
            self.shape, self.dtype = dense.shape, dense.dtype
            self.strides = dense.strides if strides is None else strides
            self.size, self.itemsize, self.nbytes, self.ndim = dense.size, dense.itemsize, dense.nbytes, dense.ndim
            self.flags = types.SimpleNamespace(c_contiguous=self.strides == dense.strides)
            self.data = memptr or MemoryPointer(OwnMemory(machine.cupy_memory.alloc(dense.nbytes)), 0)
            self.base = None

        def view(self):
            view = ndarray(self.shape, self.dtype, self.data, self.strides)
            view.base = self if self.base is None else self.base
            return view

        def transpose(self, axes):
            view = self.view()
            view.shape, view.strides = (tuple(of[i] for i in axes) for of in (self.shape, self.strides))
            return view

        def copy(self):
            """To the current device, on its current stream; dense arrays only."""
            made = ndarray(self.shape, self.dtype)
            memcpy(made.data.ptr, self.data.ptr, self.nbytes, 3, current[machine.device])
            return made

        def __dlpack__(self, *, stream=None, max_version=None):
            machine.did("__dlpack__", stream)
            return Capsule(self)

        def array(self):
            return at(self.data.ptr, self.shape, self.dtype, self.strides)

    def memcpy(target, source, nbytes, kind, number):
        device = machine.device
        machine.did("memcpy", kind, nbytes, (device, number))
        machine.kernel(device, number, lambda: np.copyto(at(target, (nbytes,), "u1"), at(source, (nbytes,), "u1")))

    events = weakref.WeakValueDictionary()
    chosen = [lambda nbytes: MemoryPointer(OwnMemory(machine.cupy_memory.alloc(nbytes)), 0)]
    cupy.ndarray, cupy.cuda = ndarray, cuda
    cupy.empty = lambda shape, dtype=np.float32: ndarray(shape, dtype)
    cuda.Stream, cuda.Event, cuda.Device = Stream, CudaEvent, Device
    cuda.UnownedMemory, cuda.MemoryPointer = UnownedMemory, MemoryPointer
    cuda.get_allocator = lambda: chosen[0]
    cuda.set_allocator = lambda malloc: chosen.__setitem__(0, malloc)
    cuda.alloc = lambda nbytes: chosen[0](nbytes)
    cuda.memory = types.SimpleNamespace(OutOfMemoryError=type("OutOfMemoryError", (MemoryError,), {}))
    cuda.alloc_pinned_memory = lambda nbytes: bytearray(nbytes)

    def get_current_stream(index=-1):
        index = machine.device if index == -1 else index
        number = current[index]
        found = machine.objects[index]
        if found is not None and (found.ptr or LEGACY) == number:
            return found
        return Stream.null if number == LEGACY else Stream.from_external(types.SimpleNamespace(
            __cuda_stream__=lambda: (0, number)
        ))  # fmt: skip

    cuda.get_current_stream = get_current_stream
    cuda.runtime = types.SimpleNamespace(
        CUDARuntimeError=RuntimeFailure,
        memcpyHostToDevice=1,
        memcpyDeviceToHost=2,
        memoryTypeUnregistered=0,
        memoryTypeHost=1,
        memoryTypeDevice=2,
        getDevice=lambda: machine.device,
        getDeviceCount=lambda: machine.devices,
        eventRecord=lambda event, number: machine.record(events[event], machine.device, number),
        streamWaitEvent=lambda number, event: machine.wait(events[event], machine.device, number),
        streamIsCapturing=lambda number: machine.is_capturing(machine.device, number),
        memcpyAsync=memcpy,
        pointerGetAttributes=lambda address: types.SimpleNamespace(
            type=2 if address in machine.lies_on else 0, device=machine.lies_on.get(address, -2)
        ),
    )

    def full(shape, value):
        """Allocated and filled on CuPy's current stream."""
        a = ndarray(shape)
        device = a.data.device_id
        machine.kernel(device, current[device], lambda: a.array().fill(value))
        return a

    def copyto(out, x, casting):
        memcpy(out.data.ptr, x.data.ptr, x.nbytes, 3, current[machine.device])

    cupy.full, cupy.copyto = full, copyto
    return cupy


class Capsule:
    """What `__dlpack__` gives: it keeps the exporter."""

    def __init__(self, exporter):
        self.exporter = exporter

    def consumed(self, machine):
        """What torch makes of it: a tensor whose storage is not its own."""
        x = self.exporter
        return Tensor(Storage(machine, exporter=x), x.data.ptr, x.shape, x.data.device_id)
