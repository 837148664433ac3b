"""CUDA streams: which one is current where, and how one waits for another. Numbers are raw handles, always explicit.

In the DLPack and array-interface protocols 1 is the legacy default stream and 0 is not allowed; torch and CuPy both
report 0 for it. See "Stream numbers" of the DLPack specification and ``__cuda_array_interface__`` version 3.
"""

from __future__ import annotations

import sys
from typing import Any

LEGACY_DEFAULT = 1


def current(framework: str, index: int) -> int:
    """The number of the stream current in `framework` on CUDA device `index`."""
    if framework == "torch":
        raw = sys.modules["torch"].cuda.current_stream(index).cuda_stream
    else:
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(index):
            raw = cupy.cuda.get_current_stream().ptr
    return int(raw) or LEGACY_DEFAULT


def same(index: int) -> bool:
    """Whether torch and CuPy have one current stream on CUDA device `index` (by raw handle: torch compares ids)."""
    return current("torch", index) == current("cupy", index)


def capturing() -> bool:
    """Whether a CUDA graph is being captured on torch's or CuPy's current stream."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return True
    return cupy is not None and bool(cupy.cuda.get_current_stream().is_capturing())


def external(framework: str, number: int, index: int) -> Any:
    """The stream of this number as an object of `framework`."""
    if framework == "torch":
        torch = sys.modules["torch"]
        if number in (0, LEGACY_DEFAULT):
            return torch.cuda.default_stream(index)
        return torch.cuda.ExternalStream(number, device=index)
    cupy = sys.modules["cupy"]
    return cupy.cuda.Stream.null if number in (0, LEGACY_DEFAULT) else cupy.cuda.ExternalStream(number, index)


def wait(framework: str, number: int, index: int) -> None:
    """`framework`'s current stream on device `index` waits for the work now on stream `number`; the host does not."""
    if number == current(framework, index):
        return
    if framework == "torch":
        torch = sys.modules["torch"]
        torch.cuda.current_stream(index).wait_stream(external("torch", number, index))
        return
    cupy = sys.modules["cupy"]
    with cupy.cuda.Device(index):
        event = cupy.cuda.Event(disable_timing=True)
        event.record(external("cupy", number, index))
        cupy.cuda.get_current_stream().wait_event(event)
