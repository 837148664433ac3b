"""Where prefetched batches go, and what that needs: on CUDA a stream, marks and kept memory; on another device of
torch's the consumer's own thread; on the host nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import copy_context
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tensorbridge._adapters import _foreign
from tensorbridge._array import CPU
from tensorbridge._cuda import _lease, _stream_order, _streams, _threads
from tensorbridge._errors import DeviceError, UnsupportedArrayError
from tensorbridge._loaded import array_class, loaded
from tensorbridge._step import Want
from tensorbridge._trees import _leaves
from tensorbridge._trees._walk import flatten


class Batch(NamedTuple):
    value: Any
    mark: Any = None  # what the consumer's stream has to wait for
    memory: Sequence[Any] = ()  # arrays whose memory the consumer's stream will use
    others: frozenset[int] = frozenset()  # further devices that were read from: their streams wait for the mark too


class Host:
    """Batches come to the host."""

    def __init__(self, own: int = -1) -> None:
        # What the caller has queued, in either framework, may have made arrays that the source holds. On the default
        # stream it is in order: that is the worker's too.
        callers = {} if _streams.capturing() else _streams.currents()
        self.on_same_device = _threads.same_device()
        self.own: set[int] = callers.pop(own, set())
        self.marks: dict[int, list[_stream_order.Mark]] = {
            index: [_stream_order.mark(number, index) for number in numbers - {_streams.LEGACY_DEFAULT}]
            for index, numbers in callers.items()
        }

    def arrived(self, batch: Any) -> list[Any]:
        """Called by the worker: the CUDA arrays of a batch, which its streams may read from now on."""
        if any(self.marks.values()):
            for index in devices_of(leaves_of(batch)):
                for mark in self.marks.get(index, ()):
                    _hold_back(index, mark)
        return self.on_device(batch)

    def entered(self) -> AbstractContextManager[Any]:
        """What the worker runs in: the source and the transform are the caller's, and meant for its device."""
        return self.on_same_device()

    def on_device(self, batch: Any) -> list[Any]:
        """The arrays of a batch that the worker's side stream reads, and its consumer's will."""
        return []

    def converted(self, batch: Any, want: Want, read: list[Any]) -> Batch:
        """Called by the worker; `read` are CUDA arrays that it has read meanwhile."""
        return Batch(_leaves.converted(batch, want))

    def may_be_asked(self) -> None:
        """Called by the consumer before it takes a batch, so that none is lost where this raises."""

    def handed_over(self, batch: Batch) -> Any:
        """Called by the consumer."""
        return batch.value


class Stay(Host):
    """Batches stay where they lie. What lies on CUDA is converted on the default stream of its device."""

    def __init__(self) -> None:
        super().__init__()
        self.met = False  # a batch on CUDA

    def on_device(self, batch: Any) -> list[Any]:
        return _device_arrays(batch)

    def converted(self, batch: Any, want: Want, read: list[Any]) -> Batch:
        read += self.on_device(batch)
        made = _leaves.converted(batch, want)
        memory = self.on_device(made)
        if not (read or memory):
            return Batch(made)
        self.met = True
        _lease.settle()
        for array in read:  # whose owner knows nothing of this stream
            _lease.keep(array, _streams.LEGACY_DEFAULT, _index_of(array))
        return Batch(made, {i: _stream_order.mark(_streams.LEGACY_DEFAULT, i) for i in devices_of(memory)}, memory)

    def may_be_asked(self) -> None:
        if self.met and _streams.capturing():
            raise DeviceError(_CAPTURING)

    def handed_over(self, batch: Batch) -> Any:
        for index, mark in (batch.mark or {}).items():
            _hold_back(index, mark)
        for array in batch.memory:
            framework = "cupy" if isinstance(array, array_class("cupy")) else "torch"
            _used_by_consumer(array, _current_stream(framework, _index_of(array)), _index_of(array))
        return batch.value


class Elsewhere(Host):
    """Batches go to a device that only torch knows, when they are asked for. What the worker makes lies on the host.

    Two threads must not give Apple's GPU work at once: the process may die of it (pytorch#197805).
    """

    def __init__(self, want: Want) -> None:
        super().__init__()
        self.want, self.context, self.in_grad_mode = want, copy_context(), grad_mode()

    def converted(self, batch: Any, want: Want, read: list[Any]) -> Batch:
        """What lies on the device stays; the rest gets memory of its own, for the source may fill a buffer again. Casts
        are for the thread that asks: what they are made of may lie there.
        """
        here = want._replace(device=None, dtype=None, casts=None, copy=False if want.copy is False else None)
        made = _leaves.converted(batch, here)
        if want.copy is False:
            return Batch(made)
        flat = flatten(made)
        each = {id(leaf): leaf for leaf in flat.leaves}
        own = {key: leaf.clone() if leaf.is_cpu else leaf for key, leaf in each.items()}
        return Batch(flat.built([own[id(leaf)] for leaf in flat.leaves]))

    def handed_over(self, batch: Batch) -> Any:
        """Under the guard and the grad mode that `prefetch` was called in, as what the worker does."""
        return self.context.copy().run(self._moved, batch.value)

    def _moved(self, batch: Any) -> Any:
        with self.in_grad_mode():
            return _leaves.converted(batch, self.want)


class Cuda(Host):
    """Batches go to a device, on its side stream: transfers overlap with the consumer's work on other streams."""

    def __init__(self, framework: str, index: int) -> None:
        self.framework, self.index = framework, index
        if _streams.capturing():
            raise DeviceError(_CAPTURING)
        super().__init__(index)
        self.stream = _streams.side_stream(index)
        self.number = _streams.identify(self.stream)[0]
        for number in self.own:
            _stream_order.link(number, self.number, index)

    def entered(self) -> AbstractContextManager[Any]:
        return _streams.use_stream(self.stream)

    def on_device(self, batch: Any) -> list[Any]:
        return _device_arrays(batch)

    def converted(self, batch: Any, want: Want, read: list[Any]) -> Batch:
        _lease.settle()  # torch, given its own tensors, crosses nothing that would do it
        read += self.on_device(batch)
        others = devices_of([*read, *leaves_of(batch)]) - {self.index}
        made = _leaves.converted(batch, want)
        for array in read:  # on this stream, of which its owner knows nothing; perhaps dropped before that is done
            _lease.keep(array, self.number, self.index)
        return Batch(made, _stream_order.mark(self.number, self.index), self.on_device(made), frozenset(others))

    def may_be_asked(self) -> None:
        if _streams.current(self.framework, self.index) != self.number and _streams.capturing():
            raise DeviceError(_CAPTURING)

    def handed_over(self, batch: Batch) -> Any:
        for index in batch.others:
            _hold_back(index, batch.mark)
        stream = _current_stream(self.framework, self.index)
        number = _streams.identify(stream)[0]
        if number != self.number:
            batch.mark.holds_back(number, self.index)
            for array in batch.memory:
                _used_by_consumer(array, stream, self.index)
        return batch.value


def grad_mode() -> Callable[[], AbstractContextManager[Any]]:
    """What opens torch's grad mode as it is here: each thread has its own."""
    torch = loaded("torch")
    return partial(torch.set_grad_enabled, torch.is_grad_enabled()) if torch is not None else nullcontext


def _used_by_consumer(array: Any, stream: Any, index: int) -> None:
    with _streams.on_device(index), suppress(ValueError):  # memory of another library that came as it was is used so
        _lease.used_on(array, stream)  # CuPy's default stream is that of whatever device is current


def _index_of(array: Any) -> int:
    return int(array.get_device() if hasattr(array, "get_device") else array.data.device_id)


_CAPTURING = (
    "prefetch: a CUDA graph is being captured, and the transfer of a batch is no part of it.\n"
    "Take the batch before, and copy it into the static input."
)


def _frameworks() -> list[str]:
    return [framework for framework in ("torch", "cupy") if _streams.usable(framework)]


def _hold_back(index: int, mark: _stream_order.Mark) -> None:
    """What either framework queues on a device from now on waits for the mark."""
    for framework in _frameworks():
        mark.holds_back(_streams.current(framework, index), index)


def leaves_of(batch: Any) -> list[Any]:
    """None of what is no tree yet: a transform may make one of it; if not, it is refused."""
    with suppress(UnsupportedArrayError):
        return flatten(batch).leaves
    return []


def devices_of(leaves: Iterable[Any]) -> set[int]:
    """The CUDA devices on which leaves lie, those of other libraries too."""
    found: set[int] = set()
    tensor, cupy_array = array_class("torch"), array_class("cupy")
    for leaf in leaves:
        if isinstance(leaf, tensor):
            if leaf.is_cuda:
                found.add(leaf.get_device())
        elif isinstance(leaf, cupy_array):
            found.add(int(leaf.data.device_id))
        elif not isinstance(leaf, (np.ndarray, type)):
            index = _foreign.device_index(leaf)
            if index is not None:
                found.add(index)
    return found


def _device_arrays(batch: Any) -> list[Any]:
    """Those of torch and CuPy on CUDA; one for each storage."""
    found: dict[int, Any] = {}
    tensor, cupy_array = array_class("torch"), array_class("cupy")
    for leaf in leaves_of(batch):
        if isinstance(leaf, tensor) and leaf.is_cuda:
            with suppress(NotImplementedError):  # sparse: the conversion refuses it
                found[leaf.untyped_storage()._cdata] = leaf
        elif isinstance(leaf, cupy_array):
            found[id(leaf)] = leaf
    return list(found.values())


def _current_stream(framework: str, index: int) -> Any:
    cuda = sys.modules[framework].cuda
    return cuda.current_stream(index) if framework == "torch" else cuda.get_current_stream(index)


def road_for(want: Want) -> Host:
    if want.framework == "numpy" or want.device == CPU:
        return Host()
    if want.device is None:
        return Stay()
    return Cuda(want.framework, want.device.index) if want.device.is_cuda else Elsewhere(want)
