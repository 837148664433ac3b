"""Memory that is lent, read late, and dropped in between: the body of every lifetime test on the fake of CUDA."""

import numpy as np
from fake_frameworks import Tensor, cupy_adapter, installed

from tensorbridge import Device, Traits
from tensorbridge._adapters import _foreign, _torch_cuda
from tensorbridge._cuda import _lease

SHAPE = (2, 3)
ON_TORCH = Traits("torch", Device("cuda:0"), "float32")
ON_CUPY = Traits("cupy", Device("cuda:0"), "float32")


def with_adapters(monkeypatch):
    """For a fixture. torch itself is the real one in its adapter; only what it makes of a capsule is replaced."""
    for machine in installed(monkeypatch):
        monkeypatch.setattr(_torch_cuda, "_imported", lambda capsule, index, m=machine: capsule.consumed(m))
        monkeypatch.setattr(_torch_cuda, "_seen_again", Tensor.again)
        yield machine


def crossings():
    adapter = cupy_adapter()
    return {
        "torch": lambda t: adapter.from_torch(ON_TORCH, capturing=False)(t.detach()),
        "cupy": _torch_cuda.from_cupy(ON_CUPY),
    }


def raw(machine):
    """What people write by hand: the same memory, and nobody keeps it once it is dropped."""

    def to_cupy(t):
        cuda = machine.cupy.cuda
        memory = cuda.UnownedMemory(t.data_ptr(), 24, t, 0)
        return machine.cupy.ndarray(t.shape, np.float32, cuda.MemoryPointer(memory, 0))

    return {"torch": to_cupy, "cupy": lambda c: c.__dlpack__(stream=1).consumed(machine)}


def other(owner):
    return "cupy" if owner == "torch" else "torch"


class Race:
    """Memory of `owner` is lent, read by queued work of the borrower, and dropped before that work has begun."""

    OWNING, READING = 0x50, 0x60

    def __init__(self, machine, owner, cross):
        self.machine, self.owner, self.cross = machine, owner, cross
        self.module = {"torch": machine.torch, "cupy": machine.cupy}[owner]
        self.seen = []

    def lend(self, reading=READING):
        machine = self.machine
        machine.current[self.owner][0] = self.OWNING
        machine.current[other(self.owner)][0] = reading
        x = self.module.full(SHAPE, 1.0)
        machine.run()
        return x, self.cross[self.owner](x)

    def read_late(self, view, stream=READING):
        array = view.array()
        self.machine.kernel(0, stream, lambda: self.seen.append(array.copy()))

    def successor(self):
        """Memory of the same size, asked for on the owner's stream, and filled at once."""
        self.machine.current[self.owner][0] = self.OWNING
        taken = self.module.full(SHAPE, 2.0)
        self.machine.run()
        return taken

    def settled(self):
        """All that is not held has been done, and looked at."""
        for _ in range(3):  # an owner that is dropped may release another
            self.machine.run()
            left = _lease.settle()
        return left

    @property
    def values(self):
        (seen,) = self.seen
        return set(seen.ravel().tolist())


def address(x):
    return x.data_ptr() if hasattr(x, "data_ptr") else x.data.ptr


def plays(race, *, stream=Race.READING, keep=lambda x, view: view):
    """The body of every race. Returns the freed address and that of the successor."""
    x, view = race.lend()
    where = address(x)
    with race.machine.hold(0, stream):
        race.read_late(view, stream)
        held = keep(x, view)
        del x, view, held
        race.settled()
        taken = race.successor()
        next_one = address(taken)
    return where, next_one


class Producer:
    """Neither torch nor CuPy."""

    def __init__(self):
        self.memory = np.zeros(6, np.float32)


def foreign(producer, **facts):
    """Device memory of another library, as `_protocols` has read it."""
    known = {"shape": SHAPE, "strides": (12, 4), "dtype": "float32", "device": Device("cuda:0"), "capsule": None}
    known |= {"address": producer.memory.ctypes.data, "producer": producer, "stream": None}
    return _foreign.Foreign(**({"readonly": False} | known | facts))
