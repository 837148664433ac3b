"""One pool of device memory for torch and CuPy: CuPy allocates from torch's caching allocator.

Otherwise each keeps what it has freed, and one runs out of memory that the other is not using (rmm#501, cupy#7556). A
block belongs to the stream that is current in CuPy when it is allocated, and goes back to torch's free list of that
stream, as with CuPy's own pool: so work on one stream stays in order, and what crosses streams is kept by `_lease`.
Blocks that CuPy allocated before stay with its old pool until they are freed. The alternative without this: torch with
``PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync`` beside ``cupy.cuda.MemoryAsyncPool``.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from tensorbridge import _options
from tensorbridge._cuda import _streams
from tensorbridge._cuda._lease import unseen
from tensorbridge._errors import DeviceError


class share_memory_pool:
    """Let CuPy allocate device memory from torch's pool, from now on or for a ``with`` block.

    Parameters
    ----------
    owner : "torch"
        Whose pool it is. (torch cannot be given another allocator once it has used CUDA.)

    Returns
    -------
    a handle with ``restore()``, which is also a context manager
        `restore` gives CuPy back the allocator that it had; blocks that are in use stay where they are. It does nothing
        a second time, nor where something else has replaced the allocator since.

    Raises
    ------
    ValueError
        Another `owner`; or inside ``cupy.cuda.using_allocator``, which CuPy itself does not allow.
    MissingFrameworkError, DeviceError
        torch or CuPy is not installed; there is no usable CUDA device; and, when CuPy allocates, its current stream is
        the per-thread default stream (CUPY_CUDA_PER_THREAD_DEFAULT_STREAM=1).

    Cost
    ----
    A call into Python for each block that CuPy allocates; moves nothing, waits for nothing.

    Examples
    --------
    ::

        tensorbridge.share_memory_pool()            # for good
        with tensorbridge.share_memory_pool():      # for a while
            c = cupy.empty(1 << 30, dtype="uint8")  # counted by torch.cuda.memory_allocated()
    """

    def __init__(self, owner: str = "torch") -> None:
        if owner != "torch":
            raise ValueError(f'share_memory_pool({owner!r}): only "torch" can own the pool of both')
        torch, cupy = (_options.require(name, "share_memory_pool") for name in ("torch", "cupy"))
        _streams.refuse_fork("share_memory_pool: ")
        if not (_streams.usable("torch") and _streams.usable("cupy")):
            raise DeviceError("share_memory_pool: there is no usable CUDA device here.")
        torch.cuda.init()
        self._cupy = cupy
        self._before: Any = cupy.cuda.get_allocator()
        self._malloc: Any = partial(_malloc, cupy)  # an object of its own, by which `restore` knows it
        cupy.cuda.set_allocator(self._malloc)

    def restore(self) -> None:
        """Give CuPy back the allocator that it had before."""
        if self._cupy.cuda.get_allocator() is self._malloc:
            self._cupy.cuda.set_allocator(self._before)

    def __enter__(self) -> share_memory_pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.restore()


def _allocate(nbytes: int, index: int) -> int:
    torch = sys.modules["torch"]
    number = _streams.current("cupy", index)
    if number == _streams.PER_THREAD_DEFAULT:  # one stream to torch, and another in every thread
        raise DeviceError(
            "share_memory_pool: CuPy's current stream is the per-thread default stream, and torch would give its "
            "blocks to other threads.\nMake a stream of your own current, with tensorbridge.use_stream."
        )
    try:
        raw = 0 if number == _streams.LEGACY_DEFAULT else number  # torch's allocator knows the default stream as 0
        return int(torch.cuda.caching_allocator_alloc(nbytes, index, raw))
    except torch.OutOfMemoryError as error:
        raise sys.modules["cupy"].cuda.memory.OutOfMemoryError(nbytes, torch.cuda.memory_allocated(index)) from error


class _Block:
    """A block of torch's, which goes back with its last reference.

    CuPy's `PythonFunctionAllocator` loses blocks: its memory objects take part in garbage collection (CuPy 14.2), which
    takes their free function from them before they end, so an array in a reference cycle is never given back.
    """

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def __del__(self, sys: Any = sys) -> None:  # of this module nothing may be left when the interpreter ends
        if not sys.is_finalizing():
            sys.modules["torch"].cuda.caching_allocator_delete(self.address)


def _malloc(cupy: Any, nbytes: int) -> Any:
    cuda = cupy.cuda
    index = cuda.runtime.getDevice()
    if not nbytes:
        return cuda.MemoryPointer(cuda.UnownedMemory(0, 0, None, index), 0)
    address = _allocate(nbytes, index)
    return cuda.MemoryPointer(cuda.UnownedMemory(address, nbytes, unseen(_Block(address)), index), 0)
