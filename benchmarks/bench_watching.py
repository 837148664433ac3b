"""Question: what does an open copy guard or trace add to a shared crossing, and what does a closed one?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

import tensorbridge as tb

WATCHERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nobody": nullcontext,
    "copy guard": lambda: tb.copy_guard("error"),
    "trace": tb.trace,
}


@pytest.mark.parametrize("watcher", WATCHERS)
def bench_shared_crossing_while_watched(benchmark: Any, watcher: str) -> None:
    benchmark.group = "float32 (16,), tensor to NumPy, watched by"
    t = torch.rand(16)
    with WATCHERS[watcher]():
        out = benchmark(tb.to_numpy, t)
    assert tb.shares_memory(out, t)
