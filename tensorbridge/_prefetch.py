"""prefetch: a worker thread reads and converts batches ahead, while the consumer computes.

At most `depth` batches are ahead of the consumer, the one that is being read included. The worker runs in a copy of the
caller's context (copy guards hold in it) and in the caller's grad mode. It holds no reference to the iterator, so that
dropping the iterator ends it; the source is closed by the worker, which alone knows that it is not in the middle of it.

On CUDA the worker's stream is the device's side stream, and host arrays go through pinned memory (`_staging`, `_pack`).
The consumer's current stream waits for its batch by an event; the memory is kept for that stream too (`_lease`).
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import copy_context
from queue import Empty, SimpleQueue
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

from tensorbridge import _options, _tables, _watch
from tensorbridge._array import CPU, Device, Traits
from tensorbridge._containers import flatten
from tensorbridge._eager import eager, is_inside, mark, told
from tensorbridge._prefetch_roads import Batch, Host, road_for
from tensorbridge._step import Want

_T = TypeVar("_T")
_USUAL = Device("cuda")  # by its identity told from a "cuda" that is given
PATIENCE = 1.0  # seconds that close() waits for a worker whose source does not answer


@told
def prefetch(
    batches: Iterable[_T],
    *,
    to: Literal["numpy", "torch", "cupy"] = "torch",
    device: Any = _USUAL,
    depth: int = 2,
    transform: Callable[[_T], Any] | None = None,
    copy: bool | None = None,
) -> Prefetch:
    """Return an iterator over `batches`, converted and on their device before they are asked for.

    Parameters
    ----------
    batches : iterable of trees of arrays
        A list, a generator, a DataLoader. Read by a thread, ahead of the consumer.
    to : "torch", "cupy" or "numpy"
    device : as for `to_torch` and `to_cupy`
        "cpu" converts on the host, which is the only choice for NumPy, and taken there.
    depth : int
        How many batches may be ahead of the consumer, at most. They are all in memory at once, on the device too.
    transform : callable, optional
        Called by the thread with each batch before it is converted; returns the batch to convert.
    copy : bool or None
        As for `to_torch`. On the host, None shares batches with the source where that is safe: an operation in place
        on a batch (``batch.mul_(2)``) then changes the data set, and a source that fills a buffer again and again
        overwrites batches that wait. True gives each batch memory of its own.

    Returns
    -------
    Prefetch
        An iterator and a context manager, with ``close()``, and a length where `batches` has one. Batches keep their
        structure, as with `tree.to_torch`; on the device they are ordered after the transfer, for the stream that is
        current when they are asked for.

    Raises
    ------
    DeviceError, MissingFrameworkError, ValueError, TypeError
        At the call: no such device or framework; `batches` is no iterable of batches; an option makes no sense.
    Exception
        From ``next()``: what the source, `transform` or the conversion raised, at its place in the order, with its
        traceback. The iteration ends there.

    Cost
    ----
    One thread. On CUDA, host arrays are copied once into pinned memory; the consumer waits for nothing that is done.

    Examples
    --------
    >>> import numpy as np
    >>> batches = ({"x": np.full(2, i)} for i in range(3))
    >>> with prefetch(batches, device="cpu") as ready:
    ...     [batch["x"].tolist() for batch in ready]
    [[0, 0], [1, 1], [2, 2]]
    """
    if copy is None and is_inside():
        copy = True  # the source and the transform are the caller's own code, and may have shared
    want = _want(to, device, depth, transform, copy)
    source = _iterator(batches)
    road = road_for(want)
    state = _State(depth)
    where = _watch._caller()[0]
    arguments = (_work, state, source, transform, want, road, _grad_mode(), where)
    worker = _Worker(state, copy_context().run, arguments, where)
    iterator = Prefetch(worker, road, batches if isinstance(batches, Sized) else None)
    _workers.add(worker)
    worker.start()
    return iterator


def _iterator(batches: Any) -> Iterator[Any]:
    """Of what yields batches; a batch itself can often be iterated too."""
    if _tables.is_one_batch(batches):
        text = f"prefetch: batches is {type(batches).__name__}, which is no sequence of batches"
        raise TypeError(f"{text}: iterating it gives its keys or parts; give a list, [batch], or its values")
    try:
        return iter(batches)
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise  # out of its own __iter__
        text = f"prefetch: batches is {type(batches).__name__}, which cannot be iterated"
        raise TypeError(f"{text}; give a list, a generator, a DataLoader") from None


def _want(to: str, device: Any, depth: int, transform: Any, copy: Any) -> Want:
    if to not in _options.WANTS:
        raise ValueError(f'prefetch(to={to!r}): choose "numpy", "torch" or "cupy"')
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise TypeError(f"prefetch(depth={depth!r}): a number of batches, as an int")
    if depth < 1:
        raise ValueError(f"prefetch(depth={depth}): at least 1 batch")
    if transform is not None and not callable(transform):
        raise TypeError(f"prefetch(transform={transform!r}): a callable or None")
    if to == "numpy":
        if device is not _USUAL and _options.device_named(device, to) not in (None, CPU):
            raise ValueError(f'prefetch(to="numpy", device={device!r}): NumPy arrays are on the host; leave device out')
        return _options.want_numpy(None, copy, None, True, None, "prefetch")
    _options.require(to, "prefetch")
    if to == "cupy":
        want = _options.want_cupy(device, None, copy, False, True, False, None, "prefetch")
    else:
        want = _options.want_torch(device, None, copy, False, False, False, False, None, "prefetch")
    return _options.placed(want, Traits("numpy"))


# -- What the thread and the iterator share


class _Failure(NamedTuple):
    error: BaseException


class _State:
    """A bounded shelf between the worker and the consumer.

    Its queues may be used wherever the garbage collector strikes, and cost a batch half of what a condition does.
    """

    def __init__(self, depth: int) -> None:
        self.ready: SimpleQueue[Batch | _Failure | None] = SimpleQueue()  # None: no more
        self.room: SimpleQueue[None] = SimpleQueue()  # an entry for each batch that may be read
        for _ in range(depth):
            self.room.put(None)
        self.closed = False  # the consumer wants no more
        self.failure: BaseException | None = None  # of closing the source
        self.process = os.getpid()

    def wait_for_room(self) -> bool:
        """Whether another batch is wanted; waits until one may be read."""
        self.room.get()
        return not self.closed

    def put(self, item: Batch | _Failure) -> None:
        self.ready.put(item)
        if self.closed:
            self.close()  # it may have looked before this came

    def take(self) -> Batch | _Failure | None:
        """The next batch or failure; None at the end."""
        if os.getpid() != self.process:
            raise RuntimeError("prefetch: the worker thread is in the parent process; make the iterator after the fork")
        item = None if self.closed else self.ready.get()
        if item is None:  # what was taken before another consumer closed is given out still
            self.ready.put(None)  # for whoever asks again
            return None
        self.room.put(None)
        return item

    def close(self) -> None:
        self.closed = True
        with suppress(Empty):
            while True:
                self.ready.get_nowait()
        self.ready.put(None)
        self.room.put(None)

    def end(self, failure: BaseException | None) -> None:
        self.failure = failure
        self.ready.put(None)


class _Worker(threading.Thread):
    """A daemon: a source that hangs must not keep the interpreter from ending."""

    def __init__(self, state: _State, target: Callable[..., Any], args: tuple[Any, ...], where: str) -> None:
        super().__init__(target=target, args=args, name=f"prefetch {where}", daemon=True)
        self.state = state


class Prefetch(Iterator[Any]):
    """Batches that were read and converted ahead. Made by `prefetch`; ``close()`` it, or use it in a ``with`` block."""

    def __init__(self, worker: _Worker, road: Host, sized: Sized | None) -> None:
        self._state, self._worker, self._road, self._sized = worker.state, worker, road, sized
        self._dropped = weakref.finalize(self, _State.close, worker.state)
        self._dropped.atexit = False

    @eager
    def __next__(self) -> Any:
        if self._worker.ident == threading.get_ident():
            text = "prefetch: its own source or transform asks for the next batch, which would wait for itself"
            raise RuntimeError(f"{text}; read ahead in the source")
        self._road.may_be_asked()
        item = self._state.take()
        if item is None:
            self.close()
            raise StopIteration
        if isinstance(item, _Failure):
            self.close()
            try:
                raise item.error
            finally:
                del item  # the traceback holds this frame
        return self._road.handed_over(item)

    def __len__(self) -> int:
        """How many batches there are in all, read or not: as for an iterator over a DataLoader."""
        if self._sized is None:
            raise TypeError("object of type 'Prefetch' has no len(): the source has none")
        return len(self._sized)

    def __bool__(self) -> bool:
        return True  # whatever its length

    def close(self) -> None:
        """Stop the worker and close the source. Waits a second at most for a source that does not answer: then its
        thread ends when it does.
        """
        self._state.close()
        if self._worker is not threading.current_thread():
            self._worker.join(PATIENCE)
        failure, self._state.failure = self._state.failure, None
        if failure is not None:
            raise failure

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Asked by copy, deepcopy and pickle."""
        text = "prefetch: an iterator over batches cannot be copied or pickled: one thread of this process fills it"
        raise TypeError(f"{text}; call prefetch where the batches are used")

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# -- The worker


def _work(
    state: _State,
    source: Iterator[Any],
    transform: Any,
    want: Want,
    road: Host,
    grad_mode: Callable[[], Any],
    where: str,
) -> None:
    failure: BaseException | None = None
    try:
        with _watch.inherited(), grad_mode(), road.entered():
            _read(state, source, transform, want, road, where)
    except BaseException as error:  # of the road itself: the consumer must not take it for the end of the source
        state.put(_Failure(error))
    finally:
        try:
            close = getattr(source, "close", None)
            if close is not None:
                close()
        except BaseException as error:  # for close() to raise: nobody hears it here
            failure = error
        del source
        state.end(failure)


def _read(state: _State, source: Iterator[Any], transform: Any, want: Want, road: Host, where: str) -> None:
    number = 0
    while state.wait_for_room():
        try:
            batch = next(source)
            read = road.on_device(batch)
            if transform is not None:
                batch = _transformed(transform, batch, number)
            said = _watch.called_from.set(where)  # only here: the source and the transform have lines of their own
            try:
                item: Any = road.converted(batch, want, read)
            finally:
                _watch.called_from.reset(said)
            del batch, read
        except StopIteration:
            return
        except BaseException as error:
            state.put(_Failure(error))
            del error
            return
        state.put(item)
        del item
        number += 1


def _transformed(transform: Any, batch: Any, number: int) -> Any:
    try:
        made = transform(batch)
    except StopIteration as error:  # would end the iteration as if the source were at its end
        raise RuntimeError(f"prefetch: transform raised StopIteration for batch {number}") from error
    if made is None or not flatten(made).leaves:
        what = "None" if made is None else f"{type(made).__name__} without an array in it"
        raise TypeError(f"prefetch: transform returned {what} for batch {number}; return the batch to convert")
    return made


def _grad_mode() -> Callable[[], AbstractContextManager[Any]]:
    """torch's grad mode is each thread's own: the worker gets the caller's."""
    torch = sys.modules.get("torch")
    if torch is None:
        return nullcontext
    enabled = torch.is_grad_enabled()
    return lambda: torch.set_grad_enabled(enabled)


_workers: weakref.WeakSet[_Worker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """No thread may be in the middle of a framework when the interpreter ends; one whose source hangs is given up.

    Threads are joined: one that has given its last batch may still be closing a DataLoader, whose last reference it
    holds, and the interpreter would end it there, which aborts the process.
    """
    workers = [worker for worker in _workers if worker.state.process == os.getpid()]
    for worker in workers:
        worker.state.close()
    until = time.monotonic() + PATIENCE
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))


mark()  # torch may be there already
