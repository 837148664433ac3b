"""Shared by the suites: sizes, devices, and a stopwatch that says whether results are fresh memory.

    pytest benchmarks                          time everything, up to 64 MiB
    pytest benchmarks --largest 1024           ... up to 1 GiB
    pytest benchmarks -q --benchmark-disable   run every line once, small, and check what it made

The report with goals, limits and interleaved rounds is ``python -m tensorbridge bench``; these suites answer one
question each, and `pytest-benchmark` stores and compares their answers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tensorbridge._bench import _malloc

KIB, MIB = 1024, 1024**2
SIZES = [64, 4 * KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--largest", type=int, default=64, metavar="MIB", help="largest array, in MiB (default: 64)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "nbytes" in metafunc.fixturenames:
        untimed = metafunc.config.getoption("benchmark_disable")
        largest = 64 * KIB if untimed else metafunc.config.getoption("largest") * MIB
        sizes = [n for n in SIZES if n <= largest]
        metafunc.parametrize("nbytes", sizes, ids=[_name(n) for n in sizes])


def _name(nbytes: int) -> str:
    return f"{nbytes // MIB}MiB" if nbytes >= MIB else f"{nbytes // KIB}KiB" if nbytes >= KIB else f"{nbytes}B"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = ""
    if any(item.get_closest_marker("gpu") for item in items):
        why = gpu_missing()
    for item in items:
        if why and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=why))


def gpu_missing() -> str:
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return "" if importlib.util.find_spec("cupy") else "CuPy is not installed"


@pytest.fixture
def timed(benchmark: Any) -> Iterator[Callable[..., Any]]:
    """``timed(function, *args, fresh=nbytes)``: time it, and return what it made.

    With `fresh`, results stay alive and large blocks come from the kernel: otherwise the allocator hands warm memory
    out again.
    """
    kept: list[Any] = []

    def run(function: Callable[..., Any], *args: Any, fresh: int = 0) -> Any:
        if not fresh or benchmark.disabled:
            return benchmark(function, *args)
        _malloc.give_fresh()
        calls = max(1, min(1000, 4 * MIB // fresh))
        if calls == 1:  # one result may be large: the last one goes before each round, outside the time
            return benchmark.pedantic(kept_alive(function), args, setup=kept.clear, rounds=9, warmup_rounds=1)
        return benchmark.pedantic(kept_alive(function), args, rounds=9, iterations=calls, warmup_rounds=1)

    def kept_alive(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            out = function(*args)
            kept.append(out)
            return out

        return call

    yield run
    kept.clear()
    _malloc.give_reused()
    _malloc.release()


@pytest.fixture
def array(nbytes: int) -> np.ndarray[Any, Any]:
    """Random float32 of `nbytes`."""
    return np.random.default_rng(7).random(nbytes // 4, dtype=np.float32)
