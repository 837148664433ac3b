"""Sources of batches for the tests of `prefetch`, and how long they wait for a thread."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

import tensorbridge as tb

SOON = 5.0  # seconds: far more than anything here takes


class Source:
    """Batches, and what is done with them: how many were read, whether it was closed, and by which thread."""

    def __init__(self, count: int, *, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.count, self.fail_at, self.error = count, fail_at, error or ValueError("broken source")
        self.read = 0
        self.closed = threading.Event()
        self.threads: set[str] = set()

    def __iter__(self) -> Source:
        return self

    def __next__(self) -> Any:
        self.threads.add(threading.current_thread().name)
        if self.read == self.fail_at:
            raise self.error
        if self.read == self.count:
            raise StopIteration
        self.read += 1
        return {"x": np.full(3, self.read - 1), "name": f"batch {self.read - 1}"}

    def close(self) -> None:
        self.closed.set()


def eventually(condition: Any) -> bool:
    until = time.monotonic() + SOON
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.002)
    return False


def on_host(batches: Any, **options: Any) -> Any:
    return tb.prefetch(batches, device="cpu", **options)
