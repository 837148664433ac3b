"""Transfers between host and device: a small ring of pinned slots, and threads that fill and empty it.

Ordinary host memory crosses the bus at full speed only through page-locked memory, which costs half a second a GiB to
make: so there is a ring of four slots of 8 MiB, made once, and reused. A slot is used again only after the event behind
its last transfer has passed. What limits the host side is the first touch of fresh pages: threads copy parts of a slot
side by side (`_copiers`).

Everything runs on the framework's current stream, so a result needs no ordering. `download` returns when the bytes are
there; it waits for events, not for the device. `upload` returns when the source has been read into slots, while the
last transfers may still be under way: the source may be changed, and work on the current stream sees the bytes.

For the other modules, in bytes (uint8, one dimension), for `framework` "torch" or "cupy" (`link_of`):

    upload(source, index)      -> a fresh device block;  `pinned=True`: straight from page-locked memory
    download(block, out=None)  -> `out`, or fresh ordinary memory
    pinned_empty(nbytes)       -> page-locked memory that the caller owns
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tensorbridge import _forks
from tensorbridge._array import LARGE
from tensorbridge._cuda import _copiers, _lease, _stream_order, _streams
from tensorbridge._cuda._copiers import Bytes
from tensorbridge._errors import DeviceError

if TYPE_CHECKING:
    from concurrent.futures import Future

SLOT = 8 * 1024 * 1024  # bytes: long enough for full speed on the bus
SLOTS = 4


class Link(Protocol):
    """The few CUDA calls of a transfer: asynchronous copies on the stream current in one framework on one device."""

    index: int

    def fresh(self, nbytes: int) -> Any:
        """A device block."""

    def down(self, block: Any, start: int, host: Bytes) -> None:
        """Start to copy bytes of the block, from `start` on, to `host`."""

    def up(self, block: Any, start: int, host: Bytes) -> None:
        """Start to copy `host` to the block, from byte `start` on."""

    def stream(self) -> int:
        """The number of the current stream."""


class TorchLink:
    """Blocks are uint8 tensors of one dimension."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.torch = sys.modules["torch"]

    def fresh(self, nbytes: int) -> Any:
        return self.torch.empty(nbytes, dtype=self.torch.uint8, device=f"cuda:{self.index}")

    def down(self, block: Any, start: int, host: Bytes) -> None:
        self.torch.from_numpy(host).copy_(block[start : start + host.size], non_blocking=True)

    def up(self, block: Any, start: int, host: Bytes) -> None:
        block[start : start + host.size].copy_(self.torch.from_numpy(host), non_blocking=True)

    def stream(self) -> int:
        return _streams.current("torch", self.index)


class CupyLink:
    """Blocks are dense CuPy arrays of any dtype and shape: only their address is used."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.cupy = sys.modules["cupy"]

    def fresh(self, nbytes: int) -> Any:
        with self.cupy.cuda.Device(self.index):
            return self.cupy.empty(nbytes, dtype=np.uint8)

    def down(self, block: Any, start: int, host: Bytes) -> None:
        runtime = self.cupy.cuda.runtime
        self._copy(_address(host), block.data.ptr + start, host.size, runtime.memcpyDeviceToHost)

    def up(self, block: Any, start: int, host: Bytes) -> None:
        runtime = self.cupy.cuda.runtime
        self._copy(block.data.ptr + start, _address(host), host.size, runtime.memcpyHostToDevice)

    def _copy(self, target: int, source: int, nbytes: int, kind: int) -> None:
        with self.cupy.cuda.Device(self.index):
            self.cupy.cuda.runtime.memcpyAsync(target, source, nbytes, kind, self.stream())

    def stream(self) -> int:
        return _streams.current("cupy", self.index)


def link_of(framework: str, index: int) -> Link:
    return TorchLink(index) if framework == "torch" else CupyLink(index)


def mark(link: Link) -> _stream_order.Mark:
    return _stream_order.mark(link.stream(), link.index)


def _address(host: Bytes) -> int:
    return int(host.__array_interface__["data"][0])


# -- Page-locked memory


def pinned_empty(nbytes: int) -> Bytes:
    """Fresh page-locked host memory that the array owns: from torch's caching allocator, else from CuPy's."""
    try:
        if _streams.usable("torch"):
            torch = sys.modules["torch"]
            host = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
            return host.numpy()  # type: ignore[no-any-return]
        memory = sys.modules["cupy"].cuda.alloc_pinned_memory(nbytes)
    except RuntimeError as error:
        raise DeviceError(f"no page-locked host memory ({nbytes} B) for a transfer: {error}") from error
    return np.frombuffer(memory, dtype=np.uint8, count=nbytes)


COPYING, MOVING = "copying", "moving"  # what may use a slot that no mark stands for: a thread, a transfer


class Slot:
    """A piece of page-locked memory, and the event behind its last transfer.

    Whoever has taken one gives it back. But an interrupt may end him at any line: then it dies with his frame, and what
    it was goes where the ring finds it.
    """

    __slots__ = ("_orphans", "busy", "mark", "memory")

    def __init__(
        self, orphans: deque[Any], memory: Bytes, mark: _stream_order.Mark | None = None, busy: str = ""
    ) -> None:
        self._orphans, self.memory, self.mark, self.busy = orphans, memory, mark, busy

    def __del__(self) -> None:
        self._orphans.append((self.memory, self.mark, self.busy))


class Ring:
    """Slots, shared by all threads. Whoever holds one may not wait for another: two would wait for each other."""

    def __init__(self, allocate: Callable[[int], Bytes], count: int = SLOTS, nbytes: int = SLOT) -> None:
        self.nbytes = nbytes
        self._allocate, self._count, self._made = allocate, count, 0
        self._free: deque[Slot] = deque()  # the longest free first
        self._orphans: deque[Any] = deque()  # what slots were whose borrowers were ended in the middle
        self._lost: list[Slot] = []  # whose transfer failed, and may still use them: CuPy's pool would reuse the memory
        self._changed = threading.Condition()

    def exists(self) -> bool:
        """Whether there is a slot at all. Without one, the frameworks' own copies of ordinary memory have to do."""
        with self._changed:
            if not self._made:
                try:
                    self._free.append(self._new())
                except DeviceError:
                    return False
            return True

    def take(self, *, wait: bool) -> Slot | None:
        """A slot that no transfer uses; None if there is none just now and the caller does not `wait`."""
        with self._changed:
            while True:
                self._adopt()
                found = self._idle()
                if found is not None:
                    return found
                if self._made < self._count and (made := self._another()) is not None:
                    return made
                if not wait:
                    return None
                if self._free:
                    slot = self._free.popleft()
                    break
                self._changed.wait(0.1)  # of an orphan nobody is told
        try:
            if slot.mark is not None:
                slot.mark.synchronize()
        except BaseException:
            self.give(slot)
            raise
        slot.mark = None
        return slot

    def _new(self) -> Slot:
        slot = Slot(self._orphans, self._allocate(self.nbytes))
        self._made += 1
        return slot

    def _another(self) -> Slot | None:
        """One slot more; where page-locked memory has run out, those that there are have to do."""
        try:
            return self._new()
        except DeviceError:
            if not self._made:
                raise
            self._count = self._made
            return None

    def _adopt(self) -> None:
        while self._orphans:
            self._back(Slot(self._orphans, *self._orphans.popleft()))

    def _idle(self) -> Slot | None:
        for slot in self._free:
            if slot.mark is None or slot.mark.passed():
                slot.mark = None
                self._free.remove(slot)
                return slot
        return None

    def give(self, slot: Slot) -> None:
        """Back into the ring; its memory is used again once its mark has passed."""
        with self._changed:
            self._back(slot)
            self._changed.notify()

    def _back(self, slot: Slot) -> None:
        if slot.busy:
            self._made -= 1
            self._lost.append(slot)
        else:
            self._free.append(slot)


_ring: Ring | None = None
_lock = threading.Lock()


def ring() -> Ring:
    global _ring
    with _lock:
        if _ring is None:
            _ring = Ring(pinned_empty)
        return _ring


@_forks.in_child
def _forked() -> None:
    global _ring, _lock
    _streams.never_freed(_ring)
    _ring, _lock = None, threading.Lock()


# -- The two ways


def _pieces(nbytes: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, nbytes)) for start in range(0, nbytes, size)]


def fill_host(link: Link, block: Any, out: Bytes, *, through: Ring | None = None) -> None:
    """Bytes of a device block into ordinary memory, through the ring; returns when they are there."""
    slots = through or ring()
    flying: deque[tuple[Slot, int, int]] = deque()
    copies: list[Future[None]] = []

    def land() -> None:
        slot, start, stop = flying[0]
        assert slot.mark is not None
        slot.mark.synchronize()
        slot.busy = COPYING
        try:
            started = _copiers.copying(out[start:stop], slot.memory[: stop - start])
        except BaseException:
            slot.busy = ""
            raise
        copies.extend(started)
        flying.popleft()
        _copiers.when_done(started, lambda: _read(slot, slots))

    try:
        for start, stop in _pieces(out.size, slots.nbytes):
            slot = slots.take(wait=not flying)
            while slot is None:
                land()
                slot = slots.take(wait=not flying)
            try:
                slot.busy = MOVING
                link.down(block, start, slot.memory[: stop - start])
                slot.mark, slot.busy = mark(link), ""
            except BaseException:
                slots.give(slot)
                raise
            flying.append((slot, start, stop))
        while flying:
            land()
    finally:
        while flying:
            slots.give(flying.popleft()[0])
        _copiers.wait(copies)
    for copy in copies:
        copy.result()


def _read(slot: Slot, slots: Ring) -> None:
    slot.mark, slot.busy = None, ""
    slots.give(slot)


def fill_device(link: Link, block: Any, source: Bytes, *, through: Ring | None = None) -> None:
    """Ordinary memory into a device block, through the ring; returns when `source` has been read."""
    slots = through or ring()
    filling: deque[tuple[Slot, int, int, list[Future[None]]]] = deque()

    def lift() -> None:
        slot, start, stop, copies = filling[0]
        for copy in copies:
            copy.result()
        slot.busy = MOVING
        link.up(block, start, slot.memory[: stop - start])
        slot.mark, slot.busy = mark(link), ""
        filling.popleft()
        slots.give(slot)

    try:
        for start, stop in _pieces(source.size, slots.nbytes):
            slot = slots.take(wait=not filling)
            while slot is None:
                lift()
                slot = slots.take(wait=not filling)
            slot.busy = COPYING
            try:
                copies = _copiers.copying(slot.memory[: stop - start], source[start:stop])
            except BaseException:
                slot.busy = ""
                slots.give(slot)
                raise
            filling.append((slot, start, stop, copies))
        while filling:
            lift()
    finally:
        while filling:
            slot, _, _, copies = filling[0]
            _copiers.wait(copies)
            if slot.busy == COPYING:
                slot.busy = ""
            filling.popleft()
            slots.give(slot)


def download(block: Any, *, framework: str, index: int, out: Bytes | None = None, pinned: bool = False) -> Bytes:
    """The bytes of a device block in `out`, or in fresh ordinary memory; returns when they are there.

    `pinned` says that `out` is page-locked: one transfer then fills it.
    """
    link = link_of(framework, index)
    _lease.settle()
    if out is None:
        out = np.empty(int(block.nbytes), np.uint8)
    if pinned or out.size < LARGE or not ring().exists():
        link.down(block, 0, out)
        mark(link).synchronize()
    else:
        fill_host(link, block, out)
    return out


def upload(
    source: Bytes, *, framework: str, index: int, into: Any = None, pinned: bool = False, non_blocking: bool = False
) -> Any:
    """A device block with these bytes (`into`, or a fresh one), for work on the current stream.

    Returns when `source` may be changed; with `non_blocking` at once, and `source` is kept until then, but for what
    goes through the ring, which reads all of it first.
    """
    link = link_of(framework, index)
    _lease.settle()
    block = link.fresh(source.size) if into is None else into
    if not pinned and source.size >= LARGE and ring().exists():
        fill_device(link, block, source)
        return block
    link.up(block, 0, source)
    if non_blocking:
        _lease.keep(source, link.stream(), index)
    else:
        mark(link).synchronize()
    return block
