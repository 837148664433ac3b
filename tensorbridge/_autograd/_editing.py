"""torch, written by NumPy: autograd does not see such a write, so `editing` tells it.

A tensor, its base and all its views share one version counter, and every saved tensor remembers where it stood. An
in-place operation of torch moves it; a write through NumPy does not. `.data` and `torch.from_numpy` make aliases with a
counter of their own, which nobody can find from here.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorbridge import _api, _dtypes, _readonly, _refuse, _watch
from tensorbridge._adapters import adapter_of
from tensorbridge._array import Device, Traits, shape_text
from tensorbridge._cuda import _streams
from tensorbridge._eager import eager
from tensorbridge._errors import DeviceError, GraphError, UnsupportedArrayError
from tensorbridge._loaded import Named
from tensorbridge._reentrant import Reentrant
from tensorbridge._step import HERE, Plan, Want, bytes_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from numpy.typing import NDArray

    Key = tuple[object, ...]
else:
    NDArray, torch = np.ndarray, Named("torch")


@eager
def editing(tensor: torch.Tensor) -> contextlib.AbstractContextManager[NDArray[Any]]:
    """Write into `tensor` with NumPy, and let autograd know: ``with editing(t) as a: a[...] = 0``.

    It is like an in-place operation of torch under ``no_grad``: the write is not recorded, but a backward that needed
    the old values of `tensor`, of its base or of a view raises instead of returning wrong gradients. It raises inside
    the block and after it, whether or not an element was changed or the block ended in an exception.

    The end of the block counts as a write too, for nobody knows when the last one was: build the graph after the block.

    What cannot be seen: a graph that is built *and* run backward inside the block (close the block before
    ``backward()``), and aliases with a version counter of their own, made by ``.data`` or by way of NumPy. An inference
    tensor has no counter and needs none: autograd refuses to save it. Views of the yielded array that were made inside
    the block stay writable after it, and a write through them is not seen.

    A tensor on a device is edited through a copy on the host, written back when the block ends without an exception.
    Blocks on the same tensor share that copy. A tensor that was changed on its device meanwhile is not overwritten.

    Parameters
    ----------
    tensor : torch.Tensor, strided, shape ``(*s)``
        It may require grad, be a leaf (a parameter), a view, or an intermediate result.

    Returns
    -------
    context manager that yields a numpy.ndarray, shape ``(*s)``, writable until the block ends, read-only from then on
        On the CPU it shares memory with `tensor` (whose storage can then no longer be resized); bfloat16 and the float8
        family are ml_dtypes arrays. For a device it is fresh memory.

    Raises
    ------
    UnsupportedArrayError
        At the call: `tensor` has no memory that NumPy could write, or one write would change several elements.
    CopyRequiredError
        An open `copy_guard` forbids the copy of a tensor on a device: at the start, or the way back at the end.
    DeviceError
        A CUDA graph is being captured, or this is a forked process that cannot use CUDA.
    GraphError
        At the end of the block: a tensor on a device was changed there while its copy was edited.

    Cost
    ----
    CPU: 0 bytes; waits for nothing. Device: ``nbytes`` to the host at the start and back at the end, both waited for.

    Examples
    --------
    >>> import torch
    >>> x = torch.ones(3, requires_grad=True)
    >>> z = (x**2).sum()
    >>> with editing(x) as a:
    ...     a[0] = 5
    >>> x.tolist()
    [5.0, 1.0, 1.0]
    >>> z.backward()
    Traceback (most recent call last):
        ...
    RuntimeError: one of the variables needed for gradient computation has been modified by an inplace operation: ...
    >>> a[0] = 6
    Traceback (most recent call last):
        ...
    ValueError: assignment destination is read-only
    """
    torch = torch_of(tensor, "editing(tensor) as array")
    edit = _edit_host if on_host(_alias(torch, tensor)) else _edit_copy
    return Reentrant(lambda: edit(torch, tensor), "editing(tensor) as array")


@contextlib.contextmanager
def _edit_host(torch: Any, tensor: torch.Tensor) -> Iterator[NDArray[Any]]:
    alias = _alias(torch, tensor)
    array, owner = _as_numpy(torch, alias)
    count = torch.autograd.graph.increment_version
    close, is_ending = _close, sys.is_finalizing  # where the interpreter ends, names end before blocks
    count(alias)  # seen by a backward inside the block
    try:
        yield array
    finally:
        close(array, owner)
        try:
            count(alias)  # seen by the backward of a graph that was built inside the block
        except (AttributeError, TypeError, NameError):
            if not is_ending():  # where the interpreter ends with the block open, torch may have ended before
                raise


class _HostCopy:
    """The host copy of a device tensor that is being edited, by one block or by several."""

    def __init__(self, alias: torch.Tensor) -> None:
        self.alias = alias
        self.host = _seen(lambda: _api.plan(alias, "torch", device="cpu"), lambda: alias.to("cpu", copy=True))
        self.version = _version(alias)
        self.blocks = 0


_open_copies: dict[Key, _HostCopy] = {}  # emptied by the blocks that fill it
_lock = threading.RLock()  # a block may end in the garbage collector, while this thread makes a copy


@contextlib.contextmanager
def _edit_copy(torch: Any, tensor: torch.Tensor) -> Iterator[NDArray[Any]]:
    alias = _alias(torch, tensor)
    # Where there are no addresses, a handle is told from others by its storage alone.
    inside = 0 if Device(str(alias.device)).has_addresses else alias.untyped_storage().data_ptr()
    key = (alias.device, inside, alias.data_ptr(), alias.dtype, tuple(alias.shape), alias.stride())
    with _lock:
        copy = _open_copies.get(key) or _HostCopy(alias)
        _open_copies[key] = copy
        copy.blocks += 1
    close, lock, copies = _close, _lock, _open_copies  # as above
    try:
        array, owner = _as_numpy(torch, copy.host)
        try:
            yield array
        finally:
            close(array, owner)
    finally:
        with lock:
            copy.blocks -= 1
            if not copy.blocks:
                del copies[key]
    _refuse_moment(torch, alias)
    with _lock:
        if _version(copy.alias) != copy.version:
            raise GraphError(
                f"editing: {_what(alias, 'was changed on its device while a copy of it was edited on the host')}; "
                "writing the copy back would undo that change, so nothing was written. "
                "Close the block before the tensor is changed in another way."
            )
        # An in-place operation, so autograd sees it.
        _seen(lambda: _api.plan(copy.host, "torch", out=alias), lambda: alias.copy_(copy.host))
        copy.version = _version(copy.alias)


def _seen(plan: Callable[[], Plan], run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A guard may forbid what is moved, and a trace records it."""
    return _watch.perform(plan(), "editing", run) if _watch.watching else run()


def _alias(torch: Any, tensor: torch.Tensor) -> torch.Tensor:
    """A plain tensor outside the graph, with the memory and the version counter of `tensor`; or the reason why not."""
    with torch._C.DisableTorchFunctionSubclass():  # the tensor itself, whatever a subclass makes of looking at it
        _refuse_unwritable(torch, tensor)
        alias = tensor.detach()
        _refuse_unwritable(torch, alias)  # a dispatch mode may have answered
        _refuse_moment(torch, alias)
    return alias


def _as_numpy(torch: Any, alias: torch.Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """The array over the memory of a CPU tensor, and the array that owns it (for most dtypes the same)."""
    row = _dtypes.DTYPES[_dtypes.of_torch(alias.dtype)]
    if not row.carrier:
        array = alias.numpy()
        return array, array
    owner = alias.view(getattr(torch, row.carrier)).numpy()
    return owner.view(row.numpy), owner  # type: ignore[arg-type]


def _close(array: NDArray[Any], owner: NDArray[Any]) -> None:
    """From now on a write would be unseen. With its owner read-only too, the array cannot be made writable again."""
    array.setflags(write=False)
    owner.setflags(write=False)


def _version(alias: torch.Tensor) -> int:
    return 0 if alias.is_inference() else alias._version


# What works, where that is not what works for a conversion: an edit has to reach the tensor.
_CURES = {
    "distributed": "Edit this process's part: editing(t.to_local()).",
    "meta": 'Make one that has: torch.zeros_like(t, device="cpu").',
    "mkldnn": "Edit a copy, t.to_dense(), then call to_mkldnn() on it.",
    "nested": "Edit one of the tensors of t.unbind().",
    "quantized": "Edit a copy, t.dequantize(), and quantize that again.",
    "sparse": "Edit a copy, t.to_dense().",
}


def _refuse_unwritable(torch: Any, t: torch.Tensor) -> None:
    """What stands in the way of `to_numpy` stands in the way of writing; so does what it would copy."""
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() is not None or functorch.is_functorch_wrapped_tensor(t):
        why = _refuse.OBSTACLES["functorch"].why
        raise UnsupportedArrayError(f"editing: {why}. Edit it outside the transformed function.")
    adapter: Any = adapter_of(type(t))
    try:
        _, traits, _ = adapter.open(t, Want("numpy"))
    except _refuse.Obstacle as found:
        cure = _CURES.get(found.name) or found.refusal.cure.replace("Convert", "Edit")
        raise UnsupportedArrayError(f"editing: {found.what} cannot be an array: {found.why}. {cure}") from None
    obstacle = _why_unwritable(t, traits)
    if obstacle is not None:
        raise UnsupportedArrayError(f"editing: {_what(t, obstacle[0])}. {obstacle[1]}")


def _why_unwritable(t: torch.Tensor, traits: Traits) -> tuple[str, str] | None:
    """Why NumPy cannot write into a tensor that it could be given, and what works."""
    refusal = _refuse.before(traits, Want("numpy"), HERE)
    if refusal is not None:
        back = f"Edit a copy, t.to(torch.{refusal.cast}), and write it back with t.copy_()."
        cure = back if refusal.cast else refusal.cure.replace("Convert", "Edit")
        return f"cannot be an array: {refusal.why}", cure
    if traits.lazy == "zero":
        return "has no memory: it only stands for zeros", "Make one that has: torch.zeros_like(t)."
    if t.is_conj():
        return (
            "has its conjugate bit set: its values are not what its memory says",
            "Edit the memory itself, which holds the conjugates: editing(t.conj()).",
        )
    if t.is_neg():
        return (
            "has its negative bit set: its values are not what its memory says",
            "Edit the tensor that it is a view of, or a copy: t.resolve_neg().",
        )
    if _readonly.is_memory_marked(t):
        return "lies on memory that is read-only, and was shared on your word not to write", "Edit a copy, t.clone()."
    if traits.overlap:
        return (
            "overlaps itself (it was expanded, or is a sliding window), so one write would change several elements",
            "Edit the tensor that it is a view of, or a copy of "
            f"{bytes_text(t.numel() * t.element_size())}: t.contiguous().",
        )
    return None


def _refuse_moment(torch: Any, tensor: torch.Tensor) -> None:
    """A device must be free to copy: at the call, when the block begins and when it ends."""
    if tensor.device.type == "cuda" and torch.cuda._is_in_bad_fork():
        raise DeviceError(
            f"editing: {_what(tensor, 'cannot be reached from a forked process')}. Start workers with the spawn method."
        )
    if tensor.device.type == "cuda" and _streams.capturing():
        raise DeviceError(
            f"editing: {_what(tensor, 'cannot be copied to the host and back while a CUDA graph is captured')}: "
            "the copies would break the capture. Edit it before or after, outside the capture."
        )


def _what(tensor: torch.Tensor, predicate: str) -> str:
    shape = shape_text(tuple(tensor.shape))
    return f"torch {_dtypes.of_torch(tensor.dtype)} {shape} on {tensor.device} {predicate}"


def on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def torch_of(tensor: object, asked: str) -> Any:
    """The torch module. Whoever holds a tensor has loaded it."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(tensor, torch.Tensor):
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        raise UnsupportedArrayError(
            f"{asked} takes a torch.Tensor, not {kind}: autograd and its graphs are torch's. "
            "Arrays of other frameworks have no graph, and are written in place."
        )
    return torch
