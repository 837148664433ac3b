"""Fast lanes for copies: `copy=True` or `out=`, alone, of plain dense arrays of exact types.

As in `_lanes`: a lane takes only what it can tell for sure in a few checks, and gives what the full road gives. None is
no answer: the full road decides. Where arrays are so small that torch's kernels use one thread, they are called, for
their calls are cheaper; from there on NumPy copies, over a view that it borrows for the moment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tensorbridge import _readonly
from tensorbridge._adapters import Adapter

_SMALL = 32_768  # bytes; torch's kernels start a second thread at so many elements
_ndarray = np.ndarray

_Tensor: Any = None
_plain: frozenset[Any] = frozenset()
_plain_numpy: frozenset[Any] = frozenset()
_forward_ad: Any
_from_numpy: Callable[[Any], Any]
_borrowed: Callable[[Any], Any]
_is_plain: Callable[[Any], bool]
_increment_version: Callable[[Any], None]


def open(adapter: Adapter) -> None:
    global _Tensor, _plain, _plain_numpy, _forward_ad, _from_numpy, _borrowed, _is_plain, _increment_version
    facts: Any = adapter
    _plain, _plain_numpy = facts.PLAIN, facts.PLAIN_NUMPY
    _forward_ad, _from_numpy, _borrowed = facts.forward_ad, facts.from_numpy, facts.borrowed
    _is_plain, _increment_version = facts.is_plain, facts.increment_version
    _Tensor = facts.Tensor


def tensor_to_numpy(x: Any, options: dict[str, Any]) -> Any:
    """What `to_numpy` gives for a tensor of exactly that type."""
    copy, out = options.get("copy") is True, options.get("out")
    if len(options) != 1 or not (copy or type(out) is _ndarray) or x.dtype not in _plain:
        return None
    try:
        if not _is_dense(x):
            return None
        if x.requires_grad:
            x = x.detach()
        small = x.nbytes <= _SMALL
        if not small and not _is_plain(x):
            return None
        if copy:
            # Not x.numpy(): the storage of x must stay resizable.
            made = (x.clone() if small else _from_numpy(_borrowed(x).copy("K"))).numpy()
            return None if made.flags.owndata else made
        assert out is not None
        if not out.flags.carray or out.dtype not in _plain_numpy:
            return None
        if out.base is not None and (type(out.base) is not _ndarray or out.base.base is not None):
            return None
        into = _from_numpy(out)
        if into.dtype is x.dtype and into.shape == x.shape and _are_apart(into, x):
            if small:
                into.copy_(x)
            else:
                np.copyto(out, _borrowed(x))
            return out
    except (RuntimeError, TypeError, ValueError):  # no memory of its own, a lazy bit, a strange stride: too rare to ask
        pass
    return None


def array_to_torch(x: Any, options: dict[str, Any]) -> Any:
    """What `to_torch` gives for an array of exactly that type, of a plain dtype."""
    if len(options) != 1 or not x.flags.forc:
        return None
    if options.get("copy") is True:
        return _from_numpy(x.copy("K"))
    out: Any = options.get("out")
    if type(out) is not _Tensor or not x.flags.carray or out.requires_grad:
        return None
    source = _from_numpy(x)
    try:
        if not _is_dense(out):
            return None
        fits = out.dtype is source.dtype and out.shape == source.shape and _are_apart(out, source)
        if not fits or not _is_plain(out) or out.is_inference() or _readonly.is_marked(out):
            return None
        if x.nbytes <= _SMALL:
            return out.copy_(source)
        np.copyto(_borrowed(out), x)
        _increment_version(out)
        return out
    except RuntimeError:  # no memory of its own
        pass
    return None


def _is_dense(t: Any) -> bool:
    return t.is_cpu and t.is_contiguous() and _forward_ad._current_level < 0 and is_held(t)


def is_held(t: Any) -> bool:
    """Whether the storage of a dense tensor holds all of it. After a ``resize_`` that failed it does not."""
    return bool(t.storage_offset() * t.element_size() + t.nbytes <= t.untyped_storage().nbytes())


def _are_apart(a: Any, b: Any) -> bool:
    """Whether two dense tensors of one size have no byte in common."""
    return abs(a.data_ptr() - b.data_ptr()) >= a.nbytes  # type: ignore[no-any-return]
