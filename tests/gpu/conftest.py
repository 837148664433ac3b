"""For tests on a device: bounded in time, with the device left idle, and nothing imported before a test runs."""

from __future__ import annotations

import gc
from importlib import import_module

import pytest


@pytest.fixture(autouse=True)
def bounded(gpu, a_minute):
    yield
    import_module("torch").cuda.synchronize()
    gc.collect()
    import_module("tensorbridge._cuda._lease").settle()


@pytest.fixture
def torch(gpu):
    module = import_module("torch")
    module.cuda.init()
    return module


@pytest.fixture
def cupy(gpu):
    return import_module("cupy")


@pytest.fixture
def gate(torch, cupy):
    return import_module("holding").Gate()


@pytest.fixture
def whole_ring(gpu):
    """All slots of the ring are made: page-locked memory that is asked for beside a held stream may wait for it."""
    staging = import_module("tensorbridge._cuda._staging")
    ring = staging.ring()
    slots = [ring.take(wait=False) for _ in range(staging.SLOTS)]
    for slot in filter(None, slots):  # None: it is in use
        ring.give(slot)
    return ring


@pytest.fixture
def unchanged(torch, cupy):
    """Asks, after the test, whether the current device and streams are what they were."""

    def currents():
        return (
            torch.cuda.current_device(),
            cupy.cuda.runtime.getDevice(),
            torch.cuda.current_stream().cuda_stream,
            cupy.cuda.get_current_stream().ptr,
        )

    before = currents()
    yield currents
    assert currents() == before
