"""prefetch: a worker thread reads and converts batches ahead, while the consumer computes.

The thread is `_worker`'s. On CUDA its stream is the device's side stream, and host arrays go through pinned
memory (`_staging`, `_pack`). The consumer's current stream waits for its batch by an event; the memory is kept for that
stream too (`_lease`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

from tensorbridge import _options, _watch
from tensorbridge._array import CPU, Device, Traits
from tensorbridge._background._roads import Host, road_for
from tensorbridge._background._worker import Failure, Worker, dropped, end_readers_of
from tensorbridge._cuda import _streams
from tensorbridge._eager import eager, is_inside, noticing
from tensorbridge._errors import DeviceError
from tensorbridge._options import DeviceLike, DtypeLike
from tensorbridge._step import Want
from tensorbridge._trees import _tables

if TYPE_CHECKING:  # without a batch in brackets it is of any: as an annotation, `Prefetch` alone is no error
    from typing_extensions import TypeVar as TypeVarWithDefault

    _Batch_co = TypeVarWithDefault("_Batch_co", covariant=True, default=Any)
else:
    _Batch_co = TypeVar("_Batch_co", covariant=True)
_T = TypeVar("_T")
_USUAL = Device("cuda")  # by its identity told from a "cuda" that is given


@noticing
def prefetch(
    batches: Iterable[_T],
    *,
    to: Literal["numpy", "torch", "cupy"] = "torch",
    device: DeviceLike | None = _USUAL,
    depth: int = 2,
    transform: Callable[[_T], Any] | None = None,
    dtype: DtypeLike | None = None,
    copy: bool | None = None,
) -> Prefetch[Any]:
    """Return an iterator over `batches`, converted and on their device before they are asked for.

    Parameters
    ----------
    batches : iterable of trees of arrays
        A list, a generator, a DataLoader. Read by a thread, ahead of the consumer: what it draws from a global random
        generator comes between the draws of the consumer, in no fixed order. A DataLoader with persistent workers
        serves one loop at a time: an earlier one that has been left is waited for.
    to : "torch", "cupy" or "numpy"
    device : as for `to_torch` and `to_cupy`
        "cpu" converts on the host, which is the only choice for NumPy, and taken there; None converts where a batch
        lies. To a device that only torch knows ("mps", "xpu") a batch is moved when it is asked for, by the thread that
        asks: the one that reads ahead leaves it on the host, in memory of its own.
    depth : int
        How many batches may be ahead of the consumer, at most. They are all in memory at once, on the device too.
    transform : callable, optional
        Called by the thread with each batch before it is converted; returns the batch to convert. The caller's grad
        mode and context variables are in force there, not its autocast, inference mode or default device.
    dtype : dtype, its name, or a mapping from what an array has, optional
        As for `tree.to_torch`: ``{"float64": "float32"}`` leaves labels and masks as they are. Cast on the side where
        fewer bytes cross the bus, ahead where the batch is sent ahead.
    copy : bool or None
        As for `to_torch`. On the host, None shares batches with the source where that is safe: an operation in place
        on a batch (``batch.mul_(2)``) then changes the data set, and a source that fills a buffer again and again
        overwrites batches that wait. True gives each batch memory of its own.

    Returns
    -------
    Prefetch
        An iterator for one loop: call `prefetch` again for the next epoch; a second loop over one finds no batch, and
        warns. A context manager too, with ``close()``, and a length where `batches` has one. Batches keep their
        structure, as with `tree.to_torch`; on the device they are ordered after the transfer, for the stream that is
        current when they are asked for.

    Raises
    ------
    DeviceError, MissingFrameworkError, ValueError, TypeError
        At the call: no such device or framework; `batches` is no iterable of batches, or a loader that Accelerate has
        prepared, which tells the loop of its last batch when that is read; an option makes no sense.
    Exception
        From ``next()``: what the source, `transform` or the conversion raised, at its place in the order, with its
        traceback. The iteration ends there. RuntimeError where a later prefetch has begun to read the same DataLoader
        with persistent workers.

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
    want = _want(to, device, depth, transform, dtype, copy)
    end_readers_of(batches)
    source = _iterator(batches)
    road = road_for(want)
    worker = Worker(batches, source, depth, transform, want, road, _watch._caller()[0])
    iterator: Prefetch[Any] = Prefetch(worker, road, batches, again=source is not batches)
    worker.start()
    return iterator


def _iterator(batches: Any) -> Iterator[Any]:
    """Of what yields batches; a batch itself can often be iterated too."""
    if _tables.is_one_batch(batches):
        text = f"prefetch: batches is {type(batches).__name__}, which is no sequence of batches"
        raise TypeError(f"{text}: iterating it gives its keys or parts; give a list, [batch], or its values")
    if hasattr(batches, "gradient_state") and hasattr(batches, "end_of_dataloader"):
        text = f"prefetch: batches is {type(batches).__name__}, a loader that Accelerate has prepared"
        why = "It tells accumulate() and gather_for_metrics() when the last batch is read, which here is too early"
        raise ValueError(f"{text}. {why}: gradients would be lost. Iterate it as it is; it moves its batches itself.")
    try:
        return iter(batches)
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise  # out of its own __iter__
        text = f"prefetch: batches is {type(batches).__name__}, which cannot be iterated"
        raise TypeError(f"{text}; give a list, a generator, a DataLoader") from None


def _want(to: str, device: Any, depth: int, transform: Any, dtype: Any, copy: Any) -> Want:
    _options.check_target("prefetch", to)
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise TypeError(f"prefetch(depth={depth!r}): a number of batches, as an int")
    if depth < 1:
        raise ValueError(f"prefetch(depth={depth}): at least 1 batch")
    if transform is not None and not callable(transform):
        raise TypeError(f"prefetch(transform={transform!r}): a callable or None")
    if to == "numpy":
        if device is not _USUAL and device is not None and _options.device_named(device, "torch") != CPU:
            raise ValueError(f'prefetch(to="numpy", device={device!r}): NumPy arrays are on the host; leave device out')
        return _options.want(to, "prefetch", dtype=dtype, copy=copy)
    framework = _options.require(to, "prefetch")
    try:
        want = _options.want(to, "prefetch", device=device, dtype=dtype, copy=copy)
        return _options.placed(want, Traits("numpy"))
    except DeviceError as error:
        error.args = (str(error).replace(f"to_{to}(", "prefetch(", 1),)
        if device is _USUAL and to == "torch" and not _streams.forked():
            there = framework.accelerator.current_accelerator(check_available=True)
            error.args = (f'{error}\nThat is where prefetch goes by default: give device="{there or CPU}".',)
        raise


class Prefetch(Iterator[_Batch_co]):
    """Batches that were read and converted ahead. Made by `prefetch`; ``close()`` it, or use it in a ``with`` block."""

    def __init__(self, worker: Worker, road: Host, batches: Iterable[Any], again: bool) -> None:
        self._state, self._worker, self._road = worker.state, worker, road
        self._sized = batches if isinstance(batches, Sized) else None
        self._again = f"prefetch({type(batches).__name__})" if again else ""  # the call for another loop over them
        self._source, self._used_up = type(batches).__name__, False
        weakref.finalize(self, dropped, worker).atexit = False

    @eager
    def __repr__(self) -> str:
        return f"<tensorbridge.Prefetch of {self._source}{', used up' * self._used_up}>"

    @eager
    def __iter__(self) -> Prefetch[_Batch_co]:
        if self._used_up and self._again:
            text = f"prefetch: this iterator is used up and gives no batch; call {self._again} again for another loop"
            _watch.warn(text, UserWarning)
        return self

    @eager
    def __next__(self) -> _Batch_co:
        if self._worker is threading.current_thread():
            text = "prefetch: its own source or transform asks for the next batch, which would wait for itself"
            raise RuntimeError(f"{text}; read ahead in the source")
        self._road.may_be_asked()
        item = self._state.take()
        if item is None:
            self.close()
            raise StopIteration
        if isinstance(item, Failure):
            try:
                raise item.error
            finally:
                del item  # the traceback holds this frame
                self.close()  # what the source raises at its end has the failure as its context
        try:
            return self._road.handed_over(item)  # type: ignore[no-any-return]
        except BaseException:  # it ends the iteration, as one of the worker's; none is left out
            self.close()
            raise

    def __len__(self) -> int:
        """How many batches there are in all, read or not: as for an iterator over a DataLoader."""
        if self._sized is None:
            raise TypeError("object of type 'Prefetch' has no len(): the source has none")
        return len(self._sized)

    def __bool__(self) -> bool:
        return True  # whatever its length

    def close(self) -> None:
        """Stop the worker and close the source. Waits a second at most for a source that does not answer: then its
        thread ends when it does. A DataLoader with persistent workers is waited for, as its next loop would have to.
        """
        self._used_up = True
        self._worker.stop()
        failure, self._state.failure = self._state.failure, None
        if failure is not None:
            raise failure

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Asked by copy, deepcopy and pickle."""
        text = "prefetch: an iterator over batches cannot be copied or pickled: one thread of this process fills it"
        raise TypeError(f"{text}; call prefetch where the batches are used")

    def __enter__(self) -> Prefetch[_Batch_co]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
