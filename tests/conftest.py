"""Arrays are built inside fixtures, by name: nothing touches a GPU, or imports CuPy, while tests are collected."""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import os
import threading
import time
from collections.abc import Iterator

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

# Streams share the hardware's queues, of which a process gets 8 unless it asks for more; torch alone makes dozens of
# streams. What waits in a queue holds up all that is behind it. Read by the driver when CUDA is first used.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

REQUIRE_GPU = os.environ.get("TENSORBRIDGE_REQUIRE_GPU") == "1"
collect_ignore = [] if os.environ.get("TENSORBRIDGE_REQUIRE_INTEGRATIONS") == "1" else ["integrations"]


def gpu_missing() -> str:
    """Why GPU tests cannot run here; empty if they can."""
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    import cupy

    try:
        return "" if cupy.cuda.runtime.getDeviceCount() else "CuPy sees no CUDA device"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy sees no CUDA device: {error}"


@pytest.fixture(scope="session")
def gpu() -> None:
    why = gpu_missing()
    if why and REQUIRE_GPU:
        pytest.fail(f"TENSORBRIDGE_REQUIRE_GPU=1, but {why}")
    if why:
        pytest.skip(why)


SECONDS = 60


@pytest.fixture
def a_minute(request: pytest.FixtureRequest) -> Iterator[None]:
    """What waits in C code hears no signal: the process shows its stacks, past pytest's capture, and ends."""
    shown = request.config.stash.get(fault_handler_stderr_fd_key, 2)
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=shown)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    if not set(threading.enumerate()) <= before:
        gc.collect()
    until = time.monotonic() + 5.0
    while time.monotonic() < until and not set(threading.enumerate()) <= before:
        time.sleep(0.005)
    assert set(threading.enumerate()) <= before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):
            item.fixturenames[:0] = ["gpu", "a_minute"]  # type: ignore[attr-defined]
