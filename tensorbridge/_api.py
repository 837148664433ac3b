"""The public functions for one array: what they take, what they promise, what they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np

from tensorbridge import _device_lanes, _lanes, _options
from tensorbridge._array import ArrayInfo
from tensorbridge._convert import convert, described, planned
from tensorbridge._eager import eager, noticing
from tensorbridge._loaded import Named
from tensorbridge._memory import infos_share
from tensorbridge._options import DeviceLike, DtypeLike, PlanOptions, Unpack, UntypedDtype
from tensorbridge._remember import remembering
from tensorbridge._step import Plan

if TYPE_CHECKING:
    import cupy
    import torch
    from numpy.typing import NDArray
else:
    cupy, torch, NDArray = Named("cupy"), Named("torch"), np.ndarray
_Out = TypeVar("_Out", bound="NDArray[Any]")
_Scalar = TypeVar("_Scalar", bound=np.generic)


@overload
def to_numpy(
    x: Any, *, dtype: DtypeLike | None = ..., copy: bool | None = ..., writable: bool | None = ...,
    detach: bool = ..., out: _Out,
) -> _Out: ...  # fmt: skip
@overload
def to_numpy(
    x: NDArray[_Scalar], *, dtype: None = ..., copy: bool | None = ..., writable: bool | None = ...,
    detach: bool = ..., out: None = ...,
) -> NDArray[_Scalar]: ...  # fmt: skip
@overload
def to_numpy(
    x: Any, *, dtype: type[_Scalar] | np.dtype[_Scalar], copy: bool | None = ..., writable: bool | None = ...,
    detach: bool = ..., out: None = ...,
) -> NDArray[_Scalar]: ...  # fmt: skip
@overload
def to_numpy(
    x: Any, *, dtype: UntypedDtype | None = ..., copy: bool | None = ..., writable: bool | None = ...,
    detach: bool = ..., out: None = ...,
) -> NDArray[Any]: ...  # fmt: skip
@_lanes.plain_tensor_to_numpy
@remembering
@eager
def to_numpy(
    x: Any,
    *,
    dtype: DtypeLike | None = None,
    copy: bool | None = None,
    writable: bool | None = None,
    detach: bool = True,
    out: Any = None,
) -> NDArray[Any]:
    """Return `x` as a NumPy array on the host, sharing memory whenever that is safe.

    Parameters
    ----------
    x : array of any framework, shape ``(*s)``
        NumPy, torch on any of its devices, CuPy; anything with DLPack, an array interface, the buffer protocol or
        ``__array__``; a number; a list of numbers or of equal-shaped arrays.
    dtype : dtype of any framework, its name, or a mapping, optional
        Default: the dtype of `x`; bfloat16 and float8 arrive as ml_dtypes types of the same bits, whose sums and means
        are made in these few bits: say "float32" to compute. ``{"float64": "float32"}`` casts float64 alone; a key may
        be a kind of the array API ("real floating"). A cast has the values that the framework of `x` gives (float8
        overflows to nan from NumPy and torch 2.11, to the largest number from torch 2.13). NumPy warns of overflow;
        from float32 to float16 torch casts, where it is loaded, silently, unless `np.errstate` wants more than that.
    copy : bool or None
        None shares when no promise is broken, else copies once. False never moves a byte, and refuses an object of
        another library that has to copy itself to be read. True returns fresh memory in the memory order of `x`.
    writable : bool or None
        None: fresh memory is writable; shared memory is as the source, and read-only if the source requires grad, is
        immutable, or overlaps itself. True: writable; a read-only or overlapping source is copied; a tensor that
        requires grad is shared: you promise to change nothing that a backward needs. False: a read-only view.
    detach : bool
        False refuses a tensor that requires grad instead of leaving its graph behind.
    out : numpy.ndarray, shape ``(*s)``, optional
        Filled and returned. Its dtype is the dtype asked for, narrowing included.

    Returns
    -------
    numpy.ndarray, shape ``(*s)``
        Shares memory with `x` unless ``plan(x, "numpy")`` says otherwise. On the host a shared result stays valid
        whatever happens to `x`, but for ``x.share_memory_()`` (which torch.multiprocessing calls too): it frees the
        memory, and cannot be prevented.

    Raises
    ------
    CopyRequiredError
        `copy` is False and bytes would have to move; ``error.plan`` says which and why.
    GraphError
        `detach` is False and `x` requires grad.
    UnsupportedArrayError, ProducerError, DeviceError
        `x` has no NumPy equal, described itself wrongly, or lies on a device that cannot be reached.
    ValueError, TypeError
        An option is misspelt or contradicts another (`out` and ``copy=False``); `out` shares memory with `x`.

    Cost
    ----
    Shared: 0 bytes. A copy: ``x.nbytes``; a plain one of 16 MiB and more by torch's threads, where torch is loaded and
    the main thread asks. From a GPU: ``x.nbytes`` over the bus; waits for the copy.

    Examples
    --------
    >>> import torch
    >>> t = torch.ones(3, requires_grad=True)
    >>> to_numpy(t).flags.writeable
    False
    >>> to_numpy(t.to(torch.bfloat16)).dtype
    dtype(bfloat16)
    """
    want = _options.want("numpy", dtype=dtype, copy=copy, writable=writable, detach=detach, out=out)
    return convert(x, want, out)  # type: ignore[no-any-return]


@_lanes.plain_array_to_torch
@_device_lanes.plain_cupy_to_torch
@remembering
@eager
def to_torch(
    x: Any,
    *,
    device: DeviceLike | None = None,
    dtype: DtypeLike | None = None,
    copy: bool | None = None,
    share_readonly: bool = False,
    detach: bool = False,
    pin_memory: bool = False,
    non_blocking: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `x` as a torch tensor, sharing memory whenever that is safe.

    Parameters
    ----------
    x : array of any framework, shape ``(*s)``
        As for `to_numpy`. A NumPy view of a tensor comes back as an alias of that tensor, with its version counter; if
        the view was read-only, `to_numpy` of that alias is. A view of such a view that was made read-only, or to
        overlap (`broadcast_to`, sliding windows), is copied as any read-only array is.
    device : "cpu", "cuda", "cuda:1", "mps", torch.device, cupy.cuda.Device or int (CUDA index), optional
        Default: where `x` is. A kind without an index ("cuda") leaves an array that is on such a device where it is,
        and means the current one for others. What torch alone knows ("xpu", a backend's) is reached by its own copy.
    dtype : dtype of any framework, its name, or a mapping as for `to_numpy`, optional
        Default: the dtype of `x`, never torch's default dtype.
    copy : bool or None
        None shares when no promise is broken, else copies once; False never moves a byte, the bus included; True
        returns fresh memory in the memory order of `x`: NumPy's where that is faster, a storage that cannot be resized.
    share_readonly : bool
        A tensor cannot be read-only, so a read-only source is copied. True shares it instead: you will not write. What
        `to_numpy` shares of it on the host, or of a view of it, is read-only; `out=` and `editing` refuse it.
    detach : bool
        True leaves the graph of a tensor behind; the default keeps it, for a tensor can. A `dtype` without gradients
        (integers, bool) ends it, as in torch, and the plan says so.
    pin_memory : bool
        The result lies in page-locked host memory, which torch has where it sees a CUDA device. It goes with no CUDA
        `device` and no `out`.
    non_blocking : bool
        To a CUDA device, return before the transfer is done; then leave `x` alone until it is.
    out : torch.Tensor, shape ``(*s)``, optional
        Filled and returned; it fixes dtype and device. It joins the graph of a tensor, as with ``out.copy_(x)``, unless
        `detach`: say so where one `out` is filled again and again.

    Returns
    -------
    torch.Tensor, shape ``(*s)``
        Shares memory with `x` unless ``plan(x, "torch")`` says otherwise; `x` is kept alive by it.

    Raises
    ------
    CopyRequiredError
        `copy` is False and bytes would have to move; ``error.plan`` says which and why.
    MissingFrameworkError, DeviceError
        torch is not installed; the device does not exist or cannot be used from this process.
    UnsupportedArrayError, ProducerError
        torch, or the device, has no such dtype (float64 on "mps") or layout; a foreign object described itself wrongly.
    ValueError, TypeError
        As for `to_numpy`.

    Cost
    ----
    Shared: 0 bytes. A copy: ``x.nbytes``; a plain one of 16 MiB and more by torch's threads, where the main thread
    asks. To a GPU: ``x.nbytes`` over the bus, and the host waits until `x` may be changed, unless `non_blocking`.

    Examples
    --------
    >>> a = np.zeros(3)
    >>> t = to_torch(a)
    >>> t[0] = 1.0
    >>> a
    array([1., 0., 0.])
    >>> to_torch(a[::-1], copy=False)
    Traceback (most recent call last):
    ...
    tensorbridge.CopyRequiredError: to_torch(copy=False): numpy float64 (3,) on cpu cannot be shared.
      pack   24 B   torch has no negative strides
      share   0 B   torch.from_numpy: the same memory
    Allow the copy with copy=None, or share x, the argument, as it lies, values in opposite order: to_torch(x[::-1]).
    """
    _options.require("torch")
    want = _options.want(
        "torch", device=device, dtype=dtype, copy=copy, share_readonly=share_readonly, detach=detach,
        pin_memory=pin_memory, non_blocking=non_blocking, out=out,
    )  # fmt: skip
    return convert(x, want, out)  # type: ignore[no-any-return]


@_device_lanes.plain_tensor_to_cupy
@eager
def to_cupy(
    x: Any,
    *,
    device: DeviceLike | None = None,
    dtype: DtypeLike | None = None,
    copy: bool | None = None,
    share_readonly: bool = False,
    detach: bool = True,
    non_blocking: bool = False,
    out: cupy.ndarray | None = None,
) -> cupy.ndarray:
    """Return `x` as a CuPy array on a CUDA device, sharing device memory whenever that is safe.

    Parameters
    ----------
    x : array of any framework, shape ``(*s)``
        As for `to_numpy`.
    device : "cuda", "cuda:1", cupy.cuda.Device, torch.device or int (CUDA index), optional
        Default: where `x` is; for host memory the current device.
    dtype : dtype of any framework, its name, or a mapping as for `to_numpy`, optional
        Default: the dtype of `x`. Cast on the side where fewer bytes cross the bus.
    copy : bool or None
        None shares when no promise is broken, else copies once; False never moves a byte, the bus included; True
        returns fresh memory in the memory order of `x`.
    share_readonly : bool
        A CuPy array cannot be read-only, so memory that must not be written (a tensor that requires grad, an
        overlapping view) is copied on the device. True shares it instead: you will not write.
    detach : bool
        False refuses a tensor that requires grad instead of leaving its graph behind.
    non_blocking : bool
        From the host, return before the transfer is done; then leave `x` alone until it is.
    out : cupy.ndarray, shape ``(*s)``, optional
        Filled and returned; it fixes dtype and device.

    Returns
    -------
    cupy.ndarray, shape ``(*s)``
        Shares memory with a torch tensor on CUDA unless ``plan(x, "cupy")`` says otherwise; ordered after the
        tensor's current stream.

    Raises
    ------
    CopyRequiredError
        `copy` is False and bytes would have to move; ``error.plan`` says which and why.
    MissingFrameworkError, DeviceError
        CuPy is not installed; there is no usable CUDA device, or not from this process.
    GraphError, UnsupportedArrayError, ProducerError, ValueError, TypeError
        As for `to_numpy`.

    Cost
    ----
    Shared: 0 bytes, no wait on the host. A copy on the device: ``x.nbytes``. From the host: ``x.nbytes`` over the bus.

    Examples
    --------
    >>> print(plan(np.zeros(3), "cupy"))
    numpy float64 (3,) on cpu
      -> cupy float64 on cuda:0: 24 B moved; the host waits for the transfer
      to_device  24 B   the host to cuda:0
    """
    _options.require("cupy")
    want = _options.want(
        "cupy", device=device, dtype=dtype, copy=copy, share_readonly=share_readonly, detach=detach,
        non_blocking=non_blocking, out=out,
    )  # fmt: skip
    return convert(x, want, out)


_FUNCTIONS: dict[str, Callable[..., Any]] = {"numpy": to_numpy, "torch": to_torch, "cupy": to_cupy}


@eager
def describe(x: Any) -> ArrayInfo:
    """Return the facts about `x`: device, dtype, shape, memory layout, whether it is writable, its autograd state.

    Parameters
    ----------
    x : anything that can be converted

    Returns
    -------
    ArrayInfo
        framework, device, dtype, shape, strides in bytes, nbytes, order, writable, requires_grad, grad_fn, lazy bits,
        pinned (None: not asked), stream (None off CUDA), address, overlap, storage.

    Raises
    ------
    UnsupportedArrayError, ProducerError
        `x` cannot be converted, or described itself wrongly.

    Cost
    ----
    No element is read; waits for nothing. Another library's object exports its array: it may read a file for that.

    Examples
    --------
    >>> info = describe(np.zeros((2, 3))[:, ::-1])
    >>> info.strides, info.order
    ((24, -8), 'reversed C')
    """
    return described(x)


@noticing
def plan(x: Any, to: Literal["numpy", "torch", "cupy"], **options: Unpack[PlanOptions]) -> Plan:
    """Return the very steps that ``to_numpy``, ``to_torch`` or ``to_cupy`` would perform, and perform none.

    Parameters
    ----------
    x : anything that can be converted
    to : "numpy", "torch" or "cupy"
    **options
        Those of the function of that name.

    Returns
    -------
    Plan
        ``source``, ``target``, ``steps`` (op, why, nbytes, kind), ``zero_copy``, ``bytes_moved``, ``blocking``;
        ``str(plan)`` is a table.

    Raises
    ------
    BridgeError, ValueError, TypeError
        What the conversion would raise; but a device or framework that is missing here is planned for.

    Cost
    ----
    No element is read; waits for nothing. An object of another library exports its array, and may copy it for that.

    Examples
    --------
    >>> print(plan(np.zeros(3)[::-1], "torch"))
    numpy float64 (3,) on cpu
      -> torch float64 on cpu: 24 B moved
      pack   24 B   torch has no negative strides
      share   0 B   torch.from_numpy: the same memory
    """
    every = _options.of_plan("plan", _FUNCTIONS, to, options)
    return planned(x, _options.want(to, **every), every["out"])


@eager
def shares_memory(a: Any, b: Any) -> bool:
    """Return whether writing one array can change the other, across frameworks and devices, views included.

    Parameters
    ----------
    a, b : anything that can be converted

    Returns
    -------
    bool
        Exact for the usual layouts; True where bounded work cannot exclude it. Empty arrays share nothing. Two mappings
        of one physical page are not seen.

    Raises
    ------
    UnsupportedArrayError, ProducerError
        As for `describe`.

    Cost
    ----
    No element is read, device memory included; waits for nothing. Foreign objects are asked for their arrays.

    Examples
    --------
    >>> a = np.zeros(4)
    >>> shares_memory(a[::2], to_torch(a)), shares_memory(a[::2], to_torch(a)[1::2])
    (True, False)
    """
    return infos_share(described(a, "shares_memory"), described(b, "shares_memory"))
