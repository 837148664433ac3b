"""CUDA streams: what one is, which is current where, and making one current in both frameworks.

They are known by raw handle and device, always explicit, never guessed. How one waits for another is `_stream_order`.

What it knows of the two frameworks:

* Both report 0 for the legacy default stream, whose protocol number is 1 (0 is not allowed in DLPack and in the array
  interface). 2 is the per-thread default stream: another thread cannot name it, so it is refused where memory is lent.
* torch compares streams by id: a pool stream and an `ExternalStream` of its handle differ. Handles are compared here.
  `ExternalStream(0)` is a fresh stream up to torch 2.12, and `ExternalStream(1)` none at all: neither is ever built.
* CuPy's ``with stream`` forgets a stream that ``.use()`` made current: it is entered here, and ``.use()`` restores.

Specification of the numbers: ``__dlpack__`` in the array API, and ``__cuda_array_interface__`` version 3.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from tensorbridge import _forks
from tensorbridge._errors import DeviceError
from tensorbridge._loaded import loaded

LEGACY_DEFAULT = 1
PER_THREAD_DEFAULT = 2  # CuPy's under CUPY_CUDA_PER_THREAD_DEFAULT_STREAM=1

_wrapped: dict[tuple[str, int, int], Any] = {}  # (framework, index, number): the stream as an object of the framework
_held: dict[tuple[int, int], Any] = {}  # (index, number): streams that must outlive every event recorded on them
_behind: dict[tuple[int, int], Any] = {}  # the same for CuPy's wrappers: what they stand for may own the stream, or not
_side: dict[int, Any] = {}  # index: the stream for transfers
_lock = threading.Lock()  # while one is made
_NO_DEVICE = "there is no usable CUDA device here, or neither torch nor CuPy is imported."
_usable: set[str] = set()  # frameworks that have been seen to have a device: they keep it
_counts: dict[str, int] = {}  # devices, by framework
_cupy_in_parent = False  # in a forked child: whether CuPy had asked CUDA before. torch keeps this itself
in_child = False  # of a fork, whatever the parent did: the lanes leave everything to the full roads


def current(framework: str, index: int) -> int:
    """The number of the stream current in `framework` on CUDA device `index`."""
    if framework == "torch":
        torch = sys.modules["torch"]
        if not torch.cuda._is_in_bad_fork():  # where a tensor can still be described
            try:
                torch.cuda.init()
            except AssertionError as error:  # a torch without CUDA beside a CuPy that has it
                raise DeviceError(f"torch cannot hold device memory here: {error}.\nMove to the host first.") from error
        return torch._C._cuda_getCurrentRawStream(index) or LEGACY_DEFAULT  # 20 times cheaper than current_stream()
    return int(sys.modules["cupy"].cuda.get_current_stream(index).ptr) or LEGACY_DEFAULT


def same(index: int) -> bool:
    """Whether torch and CuPy have one current stream on CUDA device `index`."""
    return current("torch", index) == current("cupy", index)


def currents() -> dict[int, set[int]]:
    """The streams that are current on each device, in the frameworks that use CUDA already; none where none does."""
    found: dict[int, set[int]] = {}
    if forked():
        return found
    for name in _using():
        for index in range(_count(name)):
            found.setdefault(index, set()).add(current(name, index))
    return found


# -- Devices and forks


def usable(framework: str) -> bool:
    """Whether `framework` is imported and sees a CUDA device."""
    if framework in _usable:
        return True
    module = loaded(framework)
    if module is None:
        return False
    try:
        found = module.cuda.is_available() if framework == "torch" else _devices_of(module)
    except RuntimeError:  # CuPy without a driver
        return False
    if found:
        _usable.add(framework)
    return bool(found)


def mover() -> str:
    """Who moves device memory that neither torch nor CuPy owns: torch where it sees a device, else CuPy."""
    return "torch" if usable("torch") else "cupy"


def forked() -> bool:
    """Whether this is a forked process whose parent used CUDA: it is unusable here."""
    torch = loaded("torch")
    if torch is not None and torch.cuda._is_in_bad_fork():
        return True
    return in_child and (_cupy_in_parent or (not usable("cupy") and _is_lost(loaded("cupy"))))


def _devices_of(cupy: Any) -> int:
    """The runtime remembers the number, in a forked child too, where all is lost: there the driver is asked as well."""
    runtime = cupy.cuda.runtime
    return 0 if in_child and runtime.getDevice() < 0 else int(runtime.getDeviceCount())


def _is_lost(cupy: Any) -> bool:
    """Whether this process's parent used CUDA before the fork: CuPy does not keep that, and CUDA says so."""
    try:
        return cupy is not None and not _devices_of(cupy)
    except RuntimeError as error:
        return "InitializationError" in str(error)


def refuse_fork(call: str = "") -> None:
    if forked():
        raise DeviceError(
            f"{call}CUDA cannot be used in a forked process.\n"
            "Start workers with the spawn method, or do it in the main process."
        )


def never_freed(*objects: object) -> None:
    """Keep them beyond the end of the interpreter. In a forked child the parent's events and page-locked memory can
    neither be used nor freed, and torch, trying, may end the process (as its sources read; not seen on a device).
    """
    for x in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(x))


@_forks.in_child
def _after_fork() -> None:
    global _cupy_in_parent, _lock, in_child
    _cupy_in_parent, _lock, in_child = _cupy_in_parent or "cupy" in _usable, threading.Lock(), True
    _usable.clear()
    _counts.clear()


def current_device() -> int:
    """The index of the current CUDA device of this thread."""
    refuse_fork()
    if usable("torch"):
        return int(sys.modules["torch"].cuda.current_device())
    if usable("cupy"):
        return int(sys.modules["cupy"].cuda.runtime.getDevice())
    raise DeviceError(_NO_DEVICE)


def on_device(index: int) -> AbstractContextManager[Any]:
    """Device `index` is current inside: exporters order by its streams, whatever device their memory is on."""
    if usable("torch"):
        return sys.modules["torch"].cuda.device(index)  # type: ignore[no-any-return]
    return sys.modules["cupy"].cuda.Device(index) if usable("cupy") else nullcontext()


def call_on(cupy: Any, index: int, function: Callable[..., Any], *args: int) -> Any:
    """A runtime call under its device: the handles of the default streams mean those of the current device."""
    if cupy.cuda.runtime.getDevice() == index:
        return function(*args)
    with cupy.cuda.Device(index):
        return function(*args)


# -- Graph capture. Asking is legal at any time: cudaStreamIsCapturing neither synchronises nor is captured.


def capturing() -> bool:
    """Whether a CUDA graph is being captured on a stream that is current in this thread, on whatever device."""
    using = _using()
    if "torch" in using and _asked(sys.modules["torch"].cuda.is_current_stream_capturing):
        return True
    if "cupy" in using and _asked(sys.modules["cupy"].cuda.get_current_stream().is_capturing):
        return True
    for name in using:
        for index in range(_count(name) if _count(name) > 1 else 0):
            number = current(name, index)
            if number > PER_THREAD_DEFAULT and capturing_on(number, index):  # the default stream cannot be captured
                return True
    return False


def _count(name: str) -> int:
    """How many devices a framework sees; asked once, for every crossing wants to know."""
    if name not in _counts:
        cuda = sys.modules[name].cuda
        _counts[name] = int(cuda.device_count() if name == "torch" else cuda.runtime.getDeviceCount())
    return _counts[name]


def _using() -> list[str]:
    """The frameworks that use CUDA, or can be asked without making them start it."""
    torch = loaded("torch")
    started = torch is not None and torch.cuda.is_initialized()
    return ["torch"] * started + ["cupy"] * usable("cupy")


def capturing_on(number: int, index: int) -> bool:
    """Whether a CUDA graph is being captured on this stream, in whatever thread."""
    if usable("cupy"):
        cupy = sys.modules["cupy"]
        return _asked(lambda: call_on(cupy, index, cupy.cuda.runtime.streamIsCapturing, number))
    torch = sys.modules["torch"]
    with torch.cuda.stream(wrapped("torch", number, index)):
        return _asked(torch.cuda.is_current_stream_capturing)


def _asked(question: Callable[[], Any]) -> bool:
    """Both frameworks raise where CUDA cannot answer: the default stream, asked while a blocking stream is captured; a
    capture that an error has broken. A capture it is.
    """
    try:
        return bool(question())
    except RuntimeError as error:
        if "captur" in str(error):
            return True
        raise


# -- Streams as objects


class _Handle:
    """A raw handle under the CUDA stream protocol."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.number


def wrapped(framework: str, number: int, index: int) -> Any:
    """The stream of this number as an object of `framework`, which is imported; the same object each time."""
    found = _wrapped.get((framework, index, number))
    if found is not None:
        return found
    cuda = sys.modules[framework].cuda
    if framework == "torch":
        stream = cuda.default_stream(index) if number == LEGACY_DEFAULT else cuda.ExternalStream(number, device=index)
    elif number == LEGACY_DEFAULT:
        stream = cuda.Stream.null
    else:
        stream = cuda.Stream.from_external(_Handle(number))
    return _wrapped.setdefault((framework, index, number), stream)


def hold(number: int, index: int, stream: object) -> None:
    """Keep a stream for the life of the process: torch records on the streams that a block was used on when the block
    is freed, and CuPy destroys a stream with its object.
    """
    if number > PER_THREAD_DEFAULT and (index, number) not in _held and _owns(stream, number, index):
        wraps = getattr(stream, "_foreign_stream_ref", None) is not None  # by `Stream.from_external`
        (_behind if wraps else _held).setdefault((index, number), stream)


def _owns(stream: object, number: int, index: int) -> bool:
    """Whether the stream may live and die with this object. A handle owns none, nor do torch's objects, whose streams
    are never destroyed, nor wrappers: held first, they would keep the owner out.
    """
    if isinstance(stream, int) or hasattr(stream, "cuda_stream") or type(stream).__name__ == "ExternalStream":
        return False
    return stream is not _wrapped.get(("cupy", index, number))


def side_stream(index: int) -> Any:
    """The stream of device `index` for transfers that overlap with work: one a device, torch's if torch is imported."""
    found = _side.get(index)
    if found is None:
        with _lock:
            if index not in _side:
                _side[index] = _new_side_stream(index)
            found = _side[index]
    return found


def _new_side_stream(index: int) -> Any:
    if usable("torch"):
        return sys.modules["torch"].cuda.Stream(device=index)
    if usable("cupy"):
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(index):
            return cupy.cuda.Stream(non_blocking=True)
    raise DeviceError(_NO_DEVICE)


def identify(stream: Any, here: int | None = None) -> tuple[int, int]:
    """The number and the device of a caller's stream; `here` if it does not say, or the current device.

    Raises
    ------
    TypeError, ValueError
        It is no stream; it is the per-thread default stream, or a stream of another kind of device.
    """
    if isinstance(stream, bool) or stream is None:
        raise TypeError(f"{stream!r} is no CUDA stream; give a stream of torch, CuPy or cuda.core, or its raw handle")
    torch = loaded("torch")
    if torch is not None and isinstance(stream, torch.Stream) and not hasattr(stream, "cuda_stream"):
        if stream.device.type != "cuda":
            raise ValueError(f"{stream!r} is no CUDA stream")
        ids = {name: getattr(stream, name) for name in ("stream_id", "device_index", "device_type")}
        stream = torch.cuda.Stream(**ids)
    index: Any = None
    if isinstance(stream, int):
        number = stream
    elif hasattr(stream, "cuda_stream"):
        number, index = stream.cuda_stream, stream.device_index
    elif hasattr(stream, "ptr") and hasattr(stream, "device_id"):
        number, index = stream.ptr, stream.device_id
    elif hasattr(stream, "__cuda_stream__"):
        number, index = stream.__cuda_stream__()[1], getattr(getattr(stream, "device", None), "device_id", None)
    else:
        raise TypeError(
            f"{type(stream).__name__} is no CUDA stream: it has no __cuda_stream__. "
            "Give a stream of torch, CuPy or cuda.core, or its raw handle"
        )
    number = int(number)  # older releases of cuda.core answer with an object
    if number < 0:
        raise ValueError(f"{number} is no stream handle")
    if number == PER_THREAD_DEFAULT:
        raise ValueError("the per-thread default stream is another stream in every thread; make a stream of your own")
    if index is None or index < 0:
        index = current_device() if here is None else here
    return int(number) or LEGACY_DEFAULT, int(index)


# -- One stream for both


@contextmanager
def use_stream(stream: Any) -> Iterator[Any]:
    """Make one CUDA stream current in torch and in CuPy, so that nothing between them needs to be ordered.

    Parameters
    ----------
    stream : torch.cuda.Stream, cupy.cuda.Stream, cuda.core.Stream, anything with ``__cuda_stream__``, or int
        An int is a raw handle on the current device; 0 and 1 are the default stream. It holds no stream: its owner has
        to keep that for as long as memory that was used on it lives.

    Returns
    -------
    context manager yielding `stream`
        Inside, the stream's device is current, and `stream` in every framework that was imported before. Afterwards
        devices and streams are as they were. A stream, not an int, is kept for the life of the process.

    Raises
    ------
    TypeError, ValueError
        It is no CUDA stream, or the per-thread default stream, which is another one in every thread.
    DeviceError
        There is no usable CUDA device, or this is a forked process that cannot use it.

    Cost
    ----
    Moves nothing, orders nothing, waits for nothing: work already on other streams is not waited for.

    Examples
    --------
    In a CUDA graph, crossings are allowed on the capturing stream only; CuPy functions that make new arrays there need
    `share_memory_pool`, so that these stand on the graph's memory::

        with torch.cuda.graph(graph), tensorbridge.use_stream(torch.cuda.current_stream()):
            c = tensorbridge.to_cupy(static_input)

    >>> import tensorbridge
    >>> with tensorbridge.use_stream(None):
    ...     pass
    Traceback (most recent call last):
    ...
    TypeError: None is no CUDA stream; give a stream of torch, CuPy or cuda.core, or its raw handle
    """
    number, index = identify(stream)
    refuse_fork("use_stream: ")
    if not (usable("torch") or usable("cupy")):
        raise DeviceError(f"use_stream: {_NO_DEVICE}")
    hold(number, index, stream)
    with ExitStack() as stack:
        if usable("torch"):
            torch = sys.modules["torch"]
            torch.cuda.init()
            own = stream if isinstance(stream, torch.cuda.Stream) else wrapped("torch", number, index)
            stack.enter_context(torch.cuda.stream(own))
        if usable("cupy"):
            cupy = sys.modules["cupy"]
            stack.enter_context(cupy.cuda.Device(index))
            own = stream if isinstance(stream, cupy.cuda.Stream) else wrapped("cupy", number, index)
            stack.callback(_use_again, cupy, cupy.cuda.get_current_stream(index), index)
            stack.enter_context(own)  # `.use()` would be forgotten at the end of a with block of CuPy's inside
            stack.enter_context(cupy.cuda.Device(index))  # again: `own` is left on whatever device is current then
        yield stream


def _use_again(cupy: Any, stream: Any, index: int) -> None:
    with cupy.cuda.Device(index):
        stream.use()
