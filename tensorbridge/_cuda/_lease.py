"""How long memory is kept once it is used across streams: the only place that knows.

DLPack and the array interface order the *start* of foreign use. Nothing orders its *end*: when the last reference dies,
kernels may still be queued on the borrower's stream, and the owner's allocator may give the memory out again.

* torch's memory, lent to CuPy: `record_stream`, always (it does nothing on the stream of the allocation, and the
  current stream need not be that one). torch records an event on that stream when the block is freed, so the stream is
  held for the life of the process. It does nothing, silently, for memory that torch did not allocate (its storage
  is not resizable), nor with every allocator that torch can be given: there a lease does it.
* CuPy's memory, lent to torch, and memory of neither: a lease. A weak reference on what the borrower holds (a storage,
  or the owner object in a CuPy array) is told when the last view is gone; an event is then recorded on every stream
  that the memory was used on, and the owner is dropped once those have passed: at once, or at the next crossing. CuPy
  cannot be asked which of its arenas a block goes back to, and an event that has *passed* is right for all of them.

The weak reference's callback runs on any thread, at any time, even while another one runs here: so there is no lock,
and the only shared things are dicts and deques, whose single operations are atomic. During a graph capture nothing is
recorded or asked; what is released meanwhile waits. At exit, and in a child forked from a process that has lent, owners
are kept, not touched.
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from typing import Any, TypeAlias

import numpy as np

from tensorbridge import _forks
from tensorbridge._cuda import _stream_order, _streams
from tensorbridge._loaded import array_class

Uses: TypeAlias = "frozenset[tuple[int, int]]"  # streams, as (number, device)

_leases: dict[int, Lease] = {}  # by the identity of what the borrower holds
_pending: dict[Uses, deque[_Ending]] = {}  # by the streams that they wait for, in the order in which they will pass
_disowned = False  # a forked child that has leases of its parent's: CUDA may not be touched


class Loan:
    """What a CuPy array holds instead of the memory's owner: it dies with the array's last view."""

    __slots__ = ("__weakref__",)


class Lease(weakref.ref[Any]):
    """One loan of memory: its owner, and the streams, as (number, device), that it is used on."""

    __slots__ = ("key", "owner", "uses")

    key: int
    owner: Any
    uses: set[tuple[int, int]]


class _Ending:
    """A loan that is over for the host: the owner is kept until the work on its streams has been done too."""

    __slots__ = ("_marks", "_owner", "uses")

    def __init__(self, owner: Any, uses: Uses) -> None:
        self._owner, self.uses = owner, uses
        self._marks: list[_stream_order.Mark] | None = None

    def passed(self) -> bool:
        try:
            if _streams.capturing():
                return False
            if self._marks is None:
                if any(_streams.capturing_on(*use) for use in self.uses):
                    return False  # an event recorded there would belong to the graph
                self._marks = [_stream_order.mark(*use) for use in self.uses]
            return all(mark.passed() for mark in self._marks)
        except RuntimeError:  # a capture in another thread forbids to ask, or the device is lost: not known to be over
            return False


def lend(hook: Any, key: int, owner: Any, number: int, index: int) -> None:
    """Keep `owner` while `hook` lives, and then until the work on stream `number` of device `index` has been done."""
    lease = Lease(hook, _released)
    lease.key, lease.owner, lease.uses = key, owner, {(number, index)}
    held = _leases.setdefault(key, lease)
    if held is lease:
        return
    if held() is hook:  # lent by another thread meanwhile: a lease that is replaced would not be told of the end
        held.uses.add((number, index))
    else:
        _leases[key] = lease


def lend_storage(tensor: Any, owner: Any, number: int, index: int) -> None:
    """`owner`'s memory is in the hands of torch, as `tensor`, which uses it on stream `number`."""
    storage = tensor.untyped_storage()
    lend(storage, storage._cdata, owner, number, index)


def unseen(held: object) -> Any:
    """`held`, out of sight of the garbage collector, for CuPy's memory objects to hold.

    Of a reference cycle it tells weak references, and calls `__del__`, while other objects of the cycle may still use
    the memory. A NumPy array takes no part in that: what it holds ends when it does.
    """
    holder = np.empty((), object)
    holder[()] = held
    return holder


def lend_array(owner: Any, number: int, index: int) -> Any:
    """`owner`'s memory is in the hands of CuPy, which uses it on stream `number`: what its array is to hold."""
    loan = Loan()
    lend(loan, id(loan), owner, number, index)
    return unseen(loan)


def lend_tensor(tensor: Any, number: int, index: int, stream: object, *, capturing: bool = False) -> Any:
    """The memory of `tensor`, an alias, is in the hands of CuPy on its stream `number`: what its array is to hold."""
    _streams.hold(number, index, stream)
    if not (tensor.untyped_storage().resizable() and _records()):
        return lend_array(tensor, number, index)
    if not capturing:
        tensor.record_stream(_streams.wrapped("torch", number, index))
    return tensor


def hold_if_current(number: int, index: int) -> None:
    """Keep torch's current stream if it is CuPy's as well: a lease records on it at its end."""
    if number > _streams.PER_THREAD_DEFAULT and (index, number) not in _streams._held and _streams.usable("cupy"):
        stream = sys.modules["cupy"].cuda.get_current_stream(index)
        if stream.ptr == number:
            _streams.hold(number, index, stream)


def _records() -> bool:
    """Whether torch's allocator does what `record_stream` asks; one that was plugged in does nothing, silently."""
    return bool(sys.modules["torch"].cuda.get_allocator_backend() == "native")


def keep(owner: Any, number: int, index: int) -> None:
    """Keep `owner` until the work that is on stream `number` now has been done."""
    _look_at(_Ending(owner, frozenset({(number, index)})))


def settle() -> int:
    """Drop the owners whose last use has passed; return how many are still waited for. Called at every crossing.

    Of those that wait for the same streams, none passes before the first: a host that runs far ahead of the device has
    thousands, and asks for one.
    """
    for waiting in () if _disowned else _queues():
        while waiting:
            try:
                ending = waiting.popleft()
            except IndexError:  # another thread settles too
                break
            if not _look_at(ending, first=True):
                break
    return pending()


def pending() -> int:
    """How many owners are kept whose loan is over for the host."""
    return sum(map(len, _queues()))


def _queues() -> tuple[deque[_Ending], ...]:
    while True:
        try:
            return tuple(_pending.values())
        except RuntimeError:  # it grew meanwhile: to make the tuple may collect garbage
            pass


def _look_at(ending: _Ending, *, first: bool = False) -> bool:
    """Whether its work has been done; if not, or if that cannot be found out, it waits for the next look."""
    done = False
    try:
        done = not _disowned and ending.passed()
    finally:  # whatever is raised, an interrupt say, must not drop the owner
        if not done:
            _wait(ending, first=first)
    return done


def _wait(ending: _Ending, *, first: bool) -> None:
    waiting = _pending.setdefault(ending.uses, deque())
    (waiting.appendleft if first else waiting.append)(ending)


def _released(lease: Lease) -> None:
    """The borrower's last view is gone. Runs in whatever thread dropped it; must not raise."""
    if _leases.get(lease.key) is lease:  # and not the next one's of that identity
        del _leases[lease.key]
    ending = _Ending(lease.owner, frozenset(lease.uses))
    if sys.is_finalizing():
        _wait(ending, first=False)
    else:
        _look_at(ending)


@_forks.in_child
def _forked() -> None:
    """A child whose parent has lent nothing may be able to use CUDA; one that is not makes no lease."""
    global _disowned
    _disowned = _disowned or bool(_leases or any(_pending.values()))
    _streams.never_freed(_leases, _pending)


def used_on(x: Any, stream: Any) -> None:
    """Say that the memory of `x` is also used on `stream`: keep it until that work is done.

    A crossing keeps memory for the stream that was current when it crossed. Kernels that read or write it on further
    streams are to be named with this, once a stream, before the array is dropped. It orders nothing: a stream that must
    not start before another has finished still needs an event.

    Parameters
    ----------
    x : torch.Tensor or cupy.ndarray on a CUDA device
    stream : torch.cuda.Stream, cupy.cuda.Stream, cuda.core.Stream, anything with ``__cuda_stream__``, or int
        As for `use_stream`, but that a stream which does not say its device (an int, a wrapper of a handle) is one of
        `x`'s. It is kept for the life of the process; of an int, its owner has to keep the stream.

    Raises
    ------
    TypeError, ValueError
        `x` is no array on a CUDA device, or one whose memory came from elsewhere without `to_torch` or `to_cupy`, or
        from an allocator that was plugged into torch, and knows one stream only; `stream` is no CUDA stream.
    DeviceError
        This is a forked process that cannot use CUDA.

    Cost
    ----
    Moves nothing, waits for nothing.

    Examples
    --------
    ::

        t = tensorbridge.to_torch(c)          # kept for torch's current stream
        with torch.cuda.stream(side):
            side.wait_stream(torch.cuda.current_stream())
            y = t * 2
        tensorbridge.used_on(t, side)         # and for this one
    """
    is_tensor = isinstance(x, array_class("torch"))
    if not is_tensor and not isinstance(x, array_class("cupy")):
        raise TypeError(f"used_on: {type(x).__name__} is neither a tensor nor a CuPy array")
    if is_tensor and not x.is_cuda:
        raise ValueError(f"used_on: the tensor is on {x.device}, where no CUDA stream uses it")
    number, index = _streams.identify(stream, x.get_device() if is_tensor else int(x.data.device_id))
    _streams.refuse_fork()
    _streams.hold(number, index, stream)
    if is_tensor:
        _tensor_used_on(x, number, index)
    else:
        _array_used_on(x, number, index)


def _tensor_used_on(t: Any, number: int, index: int) -> None:
    try:
        storage = t.untyped_storage()
    except NotImplementedError:
        layout = str(t.layout)
        why = f"a tensor of layout {layout} has no storage of its own"
        if layout.startswith("torch.sparse"):
            why = "a sparse tensor has no storage of its own; name the tensors that it consists of, as x.values()"
        elif layout == "torch.strided":
            why = "inside torch.func a tensor has no storage of its own; say it outside of the transform"
        raise ValueError(f"used_on: {why}") from None
    if t._is_zerotensor():  # torch knows the zeros by name only
        return
    lease = _leases.get(storage._cdata)
    if lease is not None:
        lease.uses.add((number, index))
    elif storage.resizable() and _records():
        t.detach().record_stream(_streams.wrapped("torch", number, index))
    elif storage.resizable():
        raise ValueError(
            f"used_on: torch's allocator here ({sys.modules['torch'].cuda.get_allocator_backend()}) hears of no other "
            "stream, and may give the memory out again while that is at work.\n"
            "Hold the tensor until its work there is done."
        )
    else:
        raise ValueError(
            "used_on: this tensor stands on memory of another library, whose owner is not known here.\n"
            "Let it cross with tensorbridge.to_torch, which keeps the owner."
        )


def _array_used_on(x: Any, number: int, index: int) -> None:
    owner = getattr(x.data.mem, "_owner", None)
    if isinstance(owner, array_class("torch")):
        _tensor_used_on(owner, number, index)
        return
    loan = owner[()] if type(owner) is np.ndarray and owner.dtype.hasobject and not owner.ndim else None
    base = loan if isinstance(loan, Loan) else x if x.base is None else x.base
    lease = _leases.get(id(base))
    if lease is not None:
        lease.uses.add((number, index))
    else:  # CuPy's own memory: views hold their base, and the pointer holds the memory
        lend(base, id(base), x.data, number, index)
