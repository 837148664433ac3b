"""Threads that copy host memory in parts: the first touch of fresh pages is what limits one thread.

`np.copyto` lets the GIL go; torch's kernels would bring a pool of threads each.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from tensorbridge import _forks

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

Bytes: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"

PART = 4 * 1024 * 1024  # bytes that one thread copies at a time: whole huge pages, and far above the cost of a task
THREADS = 8

_threads: ThreadPoolExecutor | None = None
_lock = threading.Lock()


@_forks.in_child
def _forked() -> None:
    global _threads, _lock
    _threads, _lock = None, threading.Lock()


def copying(target: Bytes, source: Bytes) -> list[Future[None]]:
    """Copy in parts, on threads of their own where there is more than one part. If it raises, nothing is under way."""
    if target.size <= PART or (pool := _pool()) is None:
        np.copyto(target, source)
        return []
    from concurrent.futures import Future

    starts = range(0, target.size, PART)
    parts = deque((target[i : i + PART], source[i : i + PART], Future[None]()) for i in starts)
    futures = [future for _, _, future in parts]
    try:
        for _ in futures:
            pool.submit(_copy_one, parts)
    except BaseException as error:
        while parts:
            _copy_one(parts)
        if not isinstance(error, RuntimeError):  # that no thread can be started
            wait(futures)
            raise
    return futures


def _copy_one(parts: deque[tuple[Bytes, Bytes, Future[None]]]) -> None:
    """A pool that cannot start a thread has put the task into its queue before it says so: then no part is left."""
    try:
        target, source, future = parts.popleft()
    except IndexError:
        return
    try:
        np.copyto(target, source)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(None)


def wait(copies: Iterable[Future[None]]) -> None:
    for copy in copies:
        copy.exception()


def _pool() -> ThreadPoolExecutor | None:
    global _threads
    try:
        from concurrent.futures import ThreadPoolExecutor  # brings logging along, and only transfers need it
    except RuntimeError:  # in an atexit handler, where it was not needed before
        return None
    with _lock:
        if _threads is None and (count := min(THREADS, _cores())) > 1:
            _threads = ThreadPoolExecutor(count, "tensorbridge-copy")
        return _threads


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def when_done(copies: list[Future[None]], then: Callable[[], None]) -> None:
    left, lock = len(copies), threading.Lock()

    def one_less(_: object) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = not left
        if last:
            then()

    for copy in copies:
        copy.add_done_callback(one_less)
    if not copies:
        then()
