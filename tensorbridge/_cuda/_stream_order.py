"""Order between CUDA streams: one waits for another, or the host for what is on one; nobody waits for a device.

`ndarray.__dlpack__` and `Tensor.__dlpack__` order by streams of the *current* device and, where streams differ, through
wrappers that are slow. Here one event, kept per thread and device, orders two handles: a wait takes the state that the
event has when it is asked for, so the event can be recorded again at once.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from tensorbridge import _forks
from tensorbridge._array import Traits
from tensorbridge._cuda import _streams
from tensorbridge._loaded import loaded

# Those not in use, by (thread, whether CuPy's, index). Not thread-local: a forked child would destroy those of other
# threads.
_events: dict[tuple[int, bool, int], Any] = {}


def order(giver: str, receiver: str, index: int) -> None:
    """`receiver`'s current stream waits for the work now on `giver`'s; the host does not."""
    link(_streams.current(giver, index), _streams.current(receiver, index), index)


def ordered(before: Traits, receiver: str) -> Callable[[Any], Any]:
    """The step of a plan: the same array, which the receiver's stream may read from now on."""

    def order_first(x: Any) -> Any:
        order(before.framework, receiver, before.device.index)
        return x

    return order_first


def wait(framework: str, number: int, index: int) -> None:
    """`framework`'s current stream on device `index` waits for the work now on stream `number`; the host does not."""
    link(number, _streams.current(framework, index), index)


def link(first: int, then: int, index: int, then_index: int | None = None) -> None:
    """What is queued on stream `then` from now on waits for what is on stream `first` now; no event if they are one.

    `index` is the device of `first`, and of `then` unless `then_index` says otherwise.
    """
    other = index if then_index is None else then_index
    if (first, index) == (then, other):
        return
    cupy = sys.modules["cupy"] if _streams.usable("cupy") else None
    key = (threading.get_ident(), cupy is not None, index)
    # Out of the dict: a signal handler or a finalizer that crosses before the wait would record it on another stream.
    event = _events.pop(key, None) or _new_event(cupy, index)
    if cupy is not None:
        runtime = cupy.cuda.runtime
        _streams.call_on(cupy, index, runtime.eventRecord, event.ptr, first)
        _streams.call_on(cupy, other, runtime.streamWaitEvent, then, event.ptr)
    else:
        event.record(_streams.wrapped("torch", first, index))
        _streams.wrapped("torch", then, other).wait_event(event)
    _events[key] = event


def _new_event(cupy: Any, index: int) -> Any:
    if cupy is None:
        return sys.modules["torch"].cuda.Event()
    with cupy.cuda.Device(index):
        return cupy.cuda.Event(disable_timing=True)


# -- Events that are waited for


class Mark:
    """An event recorded on a stream: has the work that was on it then been done?"""

    __slots__ = ("_event",)

    def __init__(self, event: Any) -> None:
        self._event = event

    def passed(self) -> bool:
        event = self._event
        return bool(event.query() if hasattr(event, "query") else event.done)

    def synchronize(self) -> None:
        """The host waits, for this work only."""
        self._event.synchronize()

    def holds_back(self, number: int, index: int) -> None:
        """What is queued on this stream from now on waits for that work; the host does not."""
        if hasattr(self._event, "query"):
            _streams.wrapped("torch", number, index).wait_event(self._event)
        else:
            cupy = sys.modules["cupy"]
            _streams.call_on(cupy, index, cupy.cuda.runtime.streamWaitEvent, number, self._event.ptr)


def mark(number: int, index: int) -> Mark:
    """An event recorded now on stream `number` of device `index`."""
    torch = loaded("torch")
    if torch is not None and torch.cuda.is_initialized():
        event = torch.cuda.Event()
        event.record(_streams.wrapped("torch", number, index))
        return Mark(event)
    cupy = sys.modules["cupy"]
    with cupy.cuda.Device(index):
        event = cupy.cuda.Event(disable_timing=True)
        cupy.cuda.runtime.eventRecord(event.ptr, number)
    return Mark(event)


_forks.in_child(lambda: _streams.never_freed(_events))
