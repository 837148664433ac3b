"""Device memory to the host while the program goes on: a worker converts, and a handle gives out what it made.

One thread converts one transfer after the other, on each device's side stream, which first waits for what was queued on
the caller's current streams at the call. It is the ordinary conversion, under the caller's guard: so a tree is packed,
and an error worded, as everywhere else. The worker waits for its events, so it is done when the bytes are there, and it
holds the source until then; the handle holds nothing but the outcome, and may be dropped.
"""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack
from inspect import unwrap
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tensorbridge import _api, _convert, _dtypes, _forks, _watch, tree
from tensorbridge._array import CPU, ArrayInfo, by_stride
from tensorbridge._background._roads import devices_of
from tensorbridge._cuda import _staging, _stream_order, _streams, _threads
from tensorbridge._eager import eager, noticing
from tensorbridge._errors import DeviceError
from tensorbridge._trees._containers import Kind, kind_of
from tensorbridge._trees._leaf import identity
from tensorbridge._trees._pack import ALIGN
from tensorbridge._trees._walk import flatten

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from typing_extensions import TypeVar as TypeVarWithDefault

    _Made_co = TypeVarWithDefault("_Made_co", covariant=True, default=Any)  # `Transfer` alone is one of anything
else:
    _Made_co = TypeVar("_Made_co", covariant=True)

_worker: ThreadPoolExecutor | None = None
_lock = threading.Lock()


class Transfer(Generic[_Made_co]):
    """Arrays on their way to the host. They cannot be reached before their bytes are there.

    In a coroutine, ``await transfer`` waits for them without holding up the event loop; a wait that is cancelled does
    not cancel the transfer.
    """

    __slots__ = ("_future", "_process")

    def __init__(self, future: Future[_Made_co]) -> None:
        self._future, self._process = future, os.getpid()

    @eager
    def done(self) -> bool:
        """Whether `result` returns, or raises, at once."""
        return self._future.done()

    @eager
    def result(self, timeout: float | None = None) -> _Made_co:
        """The arrays, waited for.

        Raises
        ------
        TimeoutError
            They are not there after `timeout` seconds; ask again.
        BridgeError
            What the conversion raised.
        RuntimeError
            It was under way when this process was forked: it ends in the parent only.
        """
        self._refuse_fork()
        from concurrent import futures  # brings logging along, and only transfers need it

        try:
            return self._future.result(timeout)
        except futures.TimeoutError:
            if self._future.done():
                raise
            raise TimeoutError(f"the transfer is not done after {timeout} s; it goes on") from None
        finally:
            del self  # an error's traceback holds this frame, and the future the error

    @eager
    def __await__(self) -> Generator[Any, None, _Made_co]:
        import asyncio

        self._refuse_fork()
        return asyncio.shield(asyncio.wrap_future(self._future)).__await__()

    def _refuse_fork(self) -> None:
        if self._process != os.getpid() and not self._future.done():
            raise RuntimeError(
                "to_numpy_async: the transfer goes on in the parent process; take its result before a fork"
            )

    @eager
    def __repr__(self) -> str:
        return f"<tensorbridge.Transfer: {'done' if self.done() else 'under way'}>"


@noticing
def to_numpy_async(x: Any, *, pinned: bool = False) -> Transfer[Any]:
    """Start to bring `x` to the host, and return at once.

    Do not write to `x` before the transfer is done: its bytes are read meanwhile. It may be dropped: it is kept.

    Parameters
    ----------
    x : array of any framework, or a tree of them
        As for `to_numpy` and `tree.to_numpy`.
    pinned : bool
        What comes from a device lies in page-locked memory (views of one block): the fastest road, and as fast back.
        Page-locked memory is scarce and slow to make, and may not be used in a forked child. What is on the host
        already is shared, as with `to_numpy`, so the same call runs where there is no device. From a device that only
        torch knows ("mps", "xpu") it comes in ordinary memory, and the call waits for it.

    Returns
    -------
    Transfer
        ``done()``, ``result(timeout=None)``; or await it. The result is what `to_numpy` returns for an array or a
        number, and what `tree.to_numpy` returns for a container: a list is one, so numbers in it stay numbers. Of
        memory on the host there is nothing to transfer: it is done at once, and shares as `to_numpy` does.

    Raises
    ------
    TypeError
        `pinned` is not a bool. All other errors come from ``result()``.

    Cost
    ----
    That of `to_numpy`, in a thread of its own and on a side stream; the call waits for nothing. A CUDA graph captured
    meanwhile in "global" mode may break: capture with ``capture_error_mode="thread_local"``.

    Examples
    --------
    >>> import numpy as np
    >>> transfer = to_numpy_async({"loss": np.zeros(2)})
    >>> transfer.done(), transfer.result()
    (True, {'loss': array([0., 0.])})
    >>> to_numpy_async([1, np.zeros(2)]).result()
    [1, array([0., 0.])]
    """
    if pinned is not True and pinned is not False:
        raise TypeError(f"to_numpy_async(pinned={pinned!r}): pinned is True or False")
    is_tree = isinstance(kind_of(x), Kind)
    job = unwrap(tree.to_numpy if is_tree else _api.to_numpy)  # a lane would not ask whether compiled code has called
    try:
        indices = sorted(devices_of(flatten(x).leaves if is_tree else [x]), reverse=True)
        if not indices or not (_streams.usable("torch") or _streams.usable("cupy") or _streams.forked()):
            return _done(result=job(x))
        if _streams.forked() or _streams.capturing():  # refused before CUDA is touched
            why, cure = "while a CUDA graph is being captured", "Do it before or after."
            if _streams.forked():
                why, cure = "in a forked process", "Start workers with the spawn method, or do it in the main process."
            raise DeviceError(f"to_numpy_async: device memory cannot be transferred {why}.\n{cure}")
        # Whatever made the arrays: a foreign producer's work may be on either framework's stream, and it is asked in
        # the worker, where others are current.
        callers = _streams.currents()
        for index in indices:
            side = _streams.identify(_streams.side_stream(index))[0]
            for number in callers.get(index, ()):
                _stream_order.link(number, side, index)
        return Transfer(_started(_into_pinned if pinned else job, x, indices))
    except Exception as error:  # like the errors of a transfer under way
        return _done(error=error)


def _done(*, result: Any = None, error: Exception | None = None) -> Transfer[Any]:
    """Made here, where no traceback of `error` comes by: it would hold the future, which holds `error`."""
    from concurrent.futures import Future

    outcome: Future[Any] = Future()
    if error is None:
        outcome.set_result(result)
    else:
        outcome.set_exception(error)
    return Transfer(outcome)


def _started(job: Callable[[Any], Any], x: Any, indices: list[int]) -> Future[Any]:
    global _worker
    from concurrent.futures import ThreadPoolExecutor

    _convert.import_ahead()
    with _lock:
        if _worker is None:
            _worker = ThreadPoolExecutor(1, "tensorbridge-transfer")
        context = contextvars.copy_context()
        context.run(_watch.called_from.set, _watch._caller()[0])
        return _worker.submit(context.run, _on_side_streams, job, x, indices)


def _on_side_streams(job: Callable[[Any], Any], x: Any, indices: list[int]) -> Any:
    with ExitStack() as stack:
        for index in indices:
            stack.enter_context(_streams.use_stream(_streams.side_stream(index)))
        _threads.attach()
        return job(x)


@_forks.in_child
def _forked() -> None:
    global _worker, _lock
    _worker, _lock = None, threading.Lock()


# -- Into page-locked memory


def _into_pinned(x: Any) -> Any:
    """Device arrays into views of one page-locked block; the same memory twice stays one."""
    flat = flatten(x) if isinstance(kind_of(x), Kind) else None
    leaves = [x] if flat is None else flat.leaves
    infos = [_convert.described(leaf, "to_numpy_async") for leaf in leaves]
    keys = [identity(info, leaf) or id(leaf) for info, leaf in zip(infos, leaves, strict=True)]
    places: dict[Any, int] = {}
    end = 0
    for key, info in zip(keys, infos, strict=True):
        if info.device != CPU and key not in places:
            places[key] = end
            end += -(-info.nbytes // ALIGN) * ALIGN
    block = _staging.pinned_empty(end)
    filled: dict[Any, Any] = {}
    for key, leaf, info in zip(keys, leaves, infos, strict=True):
        if key not in filled:
            start = places.get(key)
            out = None if start is None else _laid_out(block[start : start + info.nbytes], info)
            filled[key] = _api.to_numpy(leaf, out=out)
    results = [filled[key] for key in keys]
    return results[0] if flat is None else flat.built(results)


def _laid_out(block: Any, info: ArrayInfo) -> Any:
    """A block as an array like this one, in its memory order; None if NumPy has no such elements, to be refused."""
    dtype = _dtypes.DTYPES[info.dtype].numpy
    if dtype is None:
        return None
    axes, back = by_stride(info.strides)
    return block.view(dtype).reshape([info.shape[axis] for axis in axes]).transpose(back)
