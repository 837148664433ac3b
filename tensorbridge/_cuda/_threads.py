"""What a thread of ours takes over from the one that starts it: the current device, and a context there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from tensorbridge._cuda import _streams


def same_device() -> Callable[[], AbstractContextManager[Any]]:
    """What makes the device that is current here current in another thread: every thread begins on the first."""
    using = [] if _streams.forked() else _streams._using()
    for name in using:
        cuda = sys.modules[name].cuda
        index = int(cuda.current_device() if name == "torch" else cuda.runtime.getDevice())
        if index:
            return partial(cuda.device if name == "torch" else cuda.Device, index)
    return nullcontext


def attach() -> None:
    """Give a thread of ours the context of its current device, where CUDA is in use.

    It has none before the first call that needs one, and until then the driver knows no address there: whoever asks it
    about one is told an error, as CuPy's `__dlpack_device__`, or nothing, as torch's `is_pinned`.
    """
    if not _streams.forked():
        _streams.capturing()  # to ask a stream does it
