"""The thread of `prefetch`: it reads and converts batches ahead, and puts them on a shelf.

At most `depth` batches are ahead of the consumer, the one that is being read included. The thread runs in a copy of the
caller's context (copy guards hold in it) and in the caller's grad mode. It holds no reference to the iterator, so that
dropping the iterator ends it; the source is closed by the thread, which alone knows that it is not in the middle of it.
"""

from __future__ import annotations

import _thread
import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import copy_context
from operator import methodcaller
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from tensorbridge import _convert, _watch
from tensorbridge._background._roads import Batch, Host, grad_mode
from tensorbridge._cuda import _threads
from tensorbridge._step import Want
from tensorbridge._trees._walk import flatten

PATIENCE = 1.0  # seconds that close() waits for a worker whose source does not answer


_GET = methodcaller("get")


class Failure(NamedTuple):
    error: BaseException


class State:
    """A bounded shelf between the worker and the consumer.

    Its queues may be used wherever the garbage collector strikes, and cost a batch half of what a condition does.
    """

    def __init__(self, depth: int) -> None:
        self.ready: SimpleQueue[Batch | Failure | None] = SimpleQueue()  # None: no more
        self.room: SimpleQueue[None] = SimpleQueue()  # an entry for each batch that may be read
        for _ in range(depth):
            self.room.put(None)
        self.back: deque[Batch | Failure | None] = deque()  # what was taken and could not be given out
        self.closed: bool = False  # the consumer wants no more
        self.outran: bool = False  # a later prefetch has taken the source
        self.consumer: int = threading.get_ident()
        self.failure: BaseException | None = None  # of closing the source
        self.process: int = os.getpid()

    def wait_for_room(self) -> bool:
        """Whether another batch is wanted; waits until one may be read."""
        self.room.get()
        return not self.closed

    def put(self, item: Batch | Failure) -> None:
        self.ready.put(item)
        if self.closed:
            self.close()  # it may have looked before this came

    def take(self) -> Batch | Failure | None:
        """The next batch or failure; None at the end."""
        if os.getpid() != self.process:
            raise RuntimeError("prefetch: the worker thread is in the parent process; make the iterator after the fork")
        self.consumer = threading.get_ident()
        item = None if self.closed else self._taken()
        if item is None:  # what was taken before another consumer closed is given out still
            self.ready.put(None)  # for whoever asks again
            if self.outran:
                text = "prefetch: a later prefetch reads this loader, whose persistent workers serve one loop at a time"
                raise RuntimeError(f"{text}; give each loop a loader of its own")
            return None
        return item

    def _taken(self) -> Batch | Failure | None:
        """Waited for and taken by one call of C's: an exception of a signal handler comes before it or after, where the
        item is given back.
        """
        taken: deque[Batch | Failure | None] = deque()
        try:
            with suppress(IndexError):
                taken.append(self.back.popleft())
            if not taken:
                taken.extend(map(_GET, (self.ready,)))
            self.room.put(None)
            return taken[0]
        except BaseException:
            self.back.extend(taken)
            raise

    def close(self) -> None:
        self.closed = True
        self.back.clear()
        with suppress(Empty):
            while True:
                self.ready.get_nowait()
        self.ready.put(None)
        self.room.put(None)

    def outrun(self) -> None:
        """Close, and say so to whoever still asks."""
        self.outran = not self.closed
        self.close()

    def end(self, failure: BaseException | None) -> None:
        self.failure = failure
        self.ready.put(None)


class Worker(threading.Thread):
    """A daemon: a source that hangs must not keep the interpreter from ending."""

    def __init__(
        self, batches: Any, source: Iterator[Any], depth: int, transform: Any, want: Want, road: Host, where: str
    ) -> None:
        _convert.import_ahead()
        self.state: State = State(depth)
        self.loader: Any = batches if _hands_out_one(batches) else None
        arguments = (_work, self.state, source, transform, want, road, grad_mode(), where)
        super().__init__(target=copy_context().run, args=arguments, name=f"prefetch {where}", daemon=True)

    def stop(self) -> None:
        """Want no more; wait for a batch that is being read. The next loop may need what it is read from."""
        self.state.close()
        if self is not threading.current_thread() and self.ident is not None:  # which it has once it was started
            self.join(PATIENCE if self.loader is None else None)


def dropped(worker: Worker) -> None:
    """The iterator is gone. The garbage collector may notice in a thread that the source waits for."""
    if worker.state.consumer == threading.get_ident():
        try:
            worker.stop()
        except KeyboardInterrupt:  # Python drops what a finalizer raises: it comes again when this has returned
            threading.Timer(0.01, _thread.interrupt_main).start()
    worker.state.close()


def _hands_out_one(batches: Any) -> bool:
    """Whether this is a DataLoader that gives every loop the same iterator, reset: one thread may read it at a time."""
    return bool(getattr(batches, "persistent_workers", False))


def end_readers_of(batches: Any) -> None:
    """Wait for earlier threads that are in the middle of such a loader, however long its batch takes."""
    if _hands_out_one(batches):
        for worker in _others():
            if worker.loader is batches:
                worker.state.outrun()
                worker.join()


def _work(
    state: State,
    source: Iterator[Any],
    transform: Any,
    want: Want,
    road: Host,
    in_grad_mode: Callable[[], Any],
    where: str,
) -> None:
    failure: BaseException | None = None
    _watch.called_from.set(where)
    try:
        with in_grad_mode(), road.entered():
            _threads.attach()
            _read(state, source, transform, want, road)
    except BaseException as error:  # of the road itself: the consumer must not take it for the end of the source
        state.put(Failure(error))
    finally:
        try:
            close = getattr(source, "close", None)
            if close is not None:
                close()
        except BaseException as error:  # for close() to raise: nobody hears it here
            failure = error
        del source
        state.end(failure)


def _read(state: State, source: Iterator[Any], transform: Any, want: Want, road: Host) -> None:
    number = 0
    while state.wait_for_room():
        try:
            batch = next(source)
            if state.closed:
                return
            read = road.arrived(batch)
            if transform is not None:
                batch = _transformed(transform, batch, number)
            item: Any = road.converted(batch, want, read)
            del batch, read
        except StopIteration:
            return
        except BaseException as error:
            state.put(Failure(error))
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
    if made is None or (not flatten(made).leaves and flatten(batch).leaves):
        what = "None" if made is None else f"{type(made).__name__} without an array in it"
        raise TypeError(f"prefetch: transform returned {what} for batch {number}; return the batch to convert")
    return made


def _others() -> list[Worker]:
    """The workers of this process that have not ended, but for the one that asks."""
    here = threading.current_thread()
    return [t for t in threading.enumerate() if isinstance(t, Worker) and t.is_alive() and t is not here]


@atexit.register
def _close_all() -> None:
    """No thread may be in the middle of a framework when the interpreter ends; one whose source hangs is given up.

    Threads are joined: one that has given its last batch may still be closing a DataLoader, whose last reference it
    holds, and the interpreter would end it there, which aborts the process.
    """
    workers = _others()
    for worker in workers:
        worker.state.close()
    until = time.monotonic() + PATIENCE
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))
