"""Trees of arrays: every array in a nested container is converted, and the containers come back as they were."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, overload

from tensorbridge import _eager, _options
from tensorbridge._loaded import loaded
from tensorbridge._options import DeviceLike, DtypeLike
from tensorbridge._step import usual
from tensorbridge._trees._leaves import converted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import ClassVar, Protocol

    from numpy.typing import NDArray

    class _Dataclass(Protocol):
        __dataclass_fields__: ClassVar[dict[str, Any]]


# Not any type: one that None is not, so that an `out` that may be None gives what a call without it gives.
_Out = TypeVar("_Out", bound="Mapping[Any, Any] | Sequence[Any] | NDArray[Any] | _Dataclass")


_F = TypeVar("_F", bound=Callable[..., Any])


def _quickly(full: _F) -> _F:
    """A lane in front of a conversion: a call without options asks for what is usual, and that is known."""
    want = usual(full.__name__.removeprefix("to_"))

    @wraps(full)
    def convert(*args: Any, **options: Any) -> Any:
        if len(args) == 1 and not options and loaded(want.framework) and not _eager.unhidden:
            if _eager.compiling() is None:
                return converted(args[0], want)
        return full(*args, **options)

    return _eager.outermost(convert)  # type: ignore[return-value]


@overload
def to_numpy(
    tree: Any, *, dtype: DtypeLike | None = ..., copy: bool | None = ..., writable: bool | None = ...,
    detach: bool = ..., out: _Out, pack: bool = ...,
) -> _Out: ...  # fmt: skip
@overload
def to_numpy(
    tree: Any, *, dtype: DtypeLike | None = ..., copy: bool | None = ..., writable: bool | None = ...,
    detach: bool = ..., out: Any = ..., pack: bool = ...,
) -> Any: ...  # fmt: skip
@_quickly
@_eager.noticing
def to_numpy(
    tree: Any,
    *,
    dtype: DtypeLike | None = None,
    copy: bool | None = None,
    writable: bool | None = None,
    detach: bool = True,
    out: Any = None,
    pack: bool = True,
) -> Any:
    """Return `tree` with every array in it as a NumPy array on the host, sharing memory whenever that is safe.

    Parameters
    ----------
    tree : nested containers of arrays
        dict, list, tuple, namedtuple, dataclass, OrderedDict, defaultdict, deque, SimpleNamespace; classes of attrs;
        subclasses of Mapping, list, tuple; what is registered with torch's pytrees or optree; tables of pandas, polars
        and pyarrow; groups of h5py and zarr.
    dtype, copy, writable, detach
        As for `tensorbridge.to_numpy`, for every array: ``dtype="float32"`` casts labels and masks too, where
        ``dtype={"real floating": "float32"}`` leaves them alone.
    out : tree of numpy.ndarray, optional
        Of the same structure; its arrays are filled, and it is returned. All are checked before the first is written:
        where one is refused, or shares memory with another or with any source, none is. (A cast for which `np.errstate`
        or a filter makes NumPy raise does so when it has written.) The same memory twice may have
        one place in `out` for both, or one each. What is not an array (a counter, a name) stays in `out` as it is.
    pack : bool
        Small arrays that cross the bus do so in one block. False moves them one by one.

    Returns
    -------
    containers of the same types, keys and order (a table becomes a dict of columns)
        What is not an array (text and NumPy's arrays of it, None, numbers, bytes, sets) is the same object. The same
        memory twice stays one: of one address, dtype, shape and strides, writable or requiring grad both or neither.
        Other views of one memory, ``W`` and ``W.T``, become two where they are copied.

    Raises
    ------
    BridgeError
        What `tensorbridge.to_numpy` raises; the message begins with the leaf: ``batch['obs'][1].mask: ...``. An
        `UnsupportedArrayError` where a tree contains itself, or where `tree` itself is an object that may hold arrays
        and is no container, such as a module or a generator: within a tree it is left as it is.

    Cost
    ----
    That of each conversion, and a few microseconds per container. Many small device arrays: one transfer. With `out`,
    more than that: all are checked before the first is written.

    Examples
    --------
    >>> import torch
    >>> batch = {"obs": (torch.zeros(3), torch.ones(2)), "name": "a"}
    >>> to_numpy(batch)
    {'obs': (array([0., 0., 0.], dtype=float32), array([1., 1.], dtype=float32)), 'name': 'a'}
    """
    want = _options.want("numpy", "tree.to_numpy", dtype=dtype, copy=copy, writable=writable, detach=detach)
    return converted(tree, want, out=out, pack=pack)


@overload
def to_torch(
    tree: Any, *, device: DeviceLike | None = ..., dtype: DtypeLike | None = ..., copy: bool | None = ...,
    share_readonly: bool = ..., detach: bool = ..., pin_memory: bool = ..., non_blocking: bool = ...,
    out: _Out, pack: bool = ...,
) -> _Out: ...  # fmt: skip
@overload
def to_torch(
    tree: Any, *, device: DeviceLike | None = ..., dtype: DtypeLike | None = ..., copy: bool | None = ...,
    share_readonly: bool = ..., detach: bool = ..., pin_memory: bool = ..., non_blocking: bool = ...,
    out: Any = ..., pack: bool = ...,
) -> Any: ...  # fmt: skip
@_quickly
@_eager.noticing
def to_torch(
    tree: Any,
    *,
    device: DeviceLike | None = None,
    dtype: DtypeLike | None = None,
    copy: bool | None = None,
    share_readonly: bool = False,
    detach: bool = False,
    pin_memory: bool = False,
    non_blocking: bool = False,
    out: Any = None,
    pack: bool = True,
) -> Any:
    """Return `tree` with every array in it as a torch tensor, sharing memory whenever that is safe.

    Parameters
    ----------
    tree : nested containers of arrays
        As for `tree.to_numpy`.
    device, dtype, copy, share_readonly, detach, pin_memory, non_blocking
        As for `tensorbridge.to_torch`, for every array; ``dtype={"real floating": "float32"}`` is for floats alone.
    out : tree of torch.Tensor, optional
        Of the same structure; its tensors are filled, all or none, and it is returned: see `tree.to_numpy`.
    pack : bool
        Small arrays that go to a device are packed into blocks of up to 4 MiB, one transfer each. Each tensor stands
        alone, but keeps its block alive, and `torch.save` of it writes the block. False moves them one by one.

    Returns
    -------
    containers of the same types, keys and order (a table becomes a dict of columns)
        What is not an array is the same object. The same memory twice stays one: tied weights stay tied;
        which memory is the same, says `tree.to_numpy`.

    Raises
    ------
    BridgeError
        What `tensorbridge.to_torch` raises; the message begins with the leaf: ``batch['obs'][1].mask: ...``.

    Cost
    ----
    That of each conversion, and a few microseconds per container. Many small arrays to a device: one transfer. With
    `out`, see `tree.to_numpy`.

    Examples
    --------
    >>> import numpy as np
    >>> to_torch([np.zeros(2), {"label": 3, "mask": np.ones(2, bool)}])
    [tensor([0., 0.], dtype=torch.float64), {'label': 3, 'mask': tensor([True, True])}]
    """
    _options.require("torch", "tree.to_torch")
    want = _options.want(
        "torch", "tree.to_torch", device=device, dtype=dtype, copy=copy, share_readonly=share_readonly, detach=detach,
        pin_memory=pin_memory, non_blocking=non_blocking,
    )  # fmt: skip
    return converted(tree, want, out=out, pack=pack)


@overload
def to_cupy(
    tree: Any, *, device: DeviceLike | None = ..., dtype: DtypeLike | None = ..., copy: bool | None = ...,
    share_readonly: bool = ..., detach: bool = ..., non_blocking: bool = ...,
    out: _Out, pack: bool = ...,
) -> _Out: ...  # fmt: skip
@overload
def to_cupy(
    tree: Any, *, device: DeviceLike | None = ..., dtype: DtypeLike | None = ..., copy: bool | None = ...,
    share_readonly: bool = ..., detach: bool = ..., non_blocking: bool = ...,
    out: Any = ..., pack: bool = ...,
) -> Any: ...  # fmt: skip
@_eager.eager
def to_cupy(
    tree: Any,
    *,
    device: DeviceLike | None = None,
    dtype: DtypeLike | None = None,
    copy: bool | None = None,
    share_readonly: bool = False,
    detach: bool = True,
    non_blocking: bool = False,
    out: Any = None,
    pack: bool = True,
) -> Any:
    """Return `tree` with every array in it as a CuPy array, sharing device memory whenever that is safe.

    Parameters
    ----------
    tree : nested containers of arrays
        As for `tree.to_numpy`.
    device, dtype, copy, share_readonly, detach, non_blocking
        As for `tensorbridge.to_cupy`, for every array.
    out : tree of cupy.ndarray, optional
        Of the same structure; its arrays are filled, all or none, and it is returned: see `tree.to_numpy`.
    pack : bool
        As for `tree.to_torch`.

    Returns
    -------
    containers of the same types, keys and order (a table becomes a dict of columns)
        What is not an array is the same object. The same memory twice stays one.

    Raises
    ------
    BridgeError
        What `tensorbridge.to_cupy` raises; the message begins with the leaf.

    Cost
    ----
    That of each conversion, and a few microseconds per container. Many small arrays from the host: one transfer.

    Examples
    --------
    >>> import numpy as np
    >>> print(plan({"a": np.zeros(3), "b": np.ones(5)}, "cupy"))
    2 arrays -> cupy: 128 B moved, 1 transfer
    2 x numpy float64 on cpu -> cupy float64 on cuda:0: batch['a'], batch['b']
      pack       64 B   into a block of 512 B with 1 more: one transfer
      to_device  64 B   the host to cuda:0
    """
    _options.require("cupy", "tree.to_cupy")
    want = _options.want(
        "cupy", "tree.to_cupy", device=device, dtype=dtype, copy=copy, share_readonly=share_readonly, detach=detach,
        non_blocking=non_blocking,
    )  # fmt: skip
    return converted(tree, want, out=out, pack=pack)
