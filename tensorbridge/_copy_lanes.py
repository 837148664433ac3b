"""Fast lanes for copies: `copy=True` or `out=`, alone, of plain dense arrays of exact types.

As in `_lanes`: a lane takes only what it can tell for sure in a few checks, and gives what the full road gives. None is
no answer: the full road decides. NumPy copies, over a view of the tensor's memory that it borrows for the moment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tensorbridge import _readonly
from tensorbridge._adapters import Adapter
from tensorbridge._array import HUGE

_ndarray = np.ndarray
_may_share_memory = np.may_share_memory

_Tensor: Any = None
_plain: frozenset[Any] = frozenset()
_from_numpy: Callable[[Any], Any]
_dense: Callable[[Any], Any]
_increment_version: Callable[[Any], None]


def open(adapter: Adapter) -> None:
    global _Tensor, _plain, _from_numpy, _dense, _increment_version
    facts: Any = adapter
    _plain, _dense = facts.PLAIN, facts.dense
    _from_numpy, _increment_version = facts.from_numpy, facts.increment_version
    _Tensor = facts.Tensor


def tensor_to_numpy(x: Any, options: dict[str, Any]) -> Any:
    """What `to_numpy` gives for a tensor of exactly that type."""
    if len(options) != 1 or x.dtype not in _plain:
        return None
    if options.get("copy") is True:
        return None if (view := _dense(x)) is None or view.nbytes >= HUGE else view.copy()
    out: Any = options.get("out")
    if type(out) is not _ndarray or not out.flags.carray or (view := _dense(x)) is None:
        return None
    if out.base is not None and (type(out.base) is not _ndarray or out.base.base is not None):
        return None
    if view.dtype is not out.dtype or view.shape != out.shape or out.nbytes >= HUGE or _may_share_memory(view, out):
        return None
    out[...] = view
    return out


def array_to_torch(x: Any, options: dict[str, Any]) -> Any:
    """What `to_torch` gives for an array of exactly that type, of a plain dtype."""
    if len(options) != 1 or not x.flags.forc or x.nbytes >= HUGE:
        return None
    if options.get("copy") is True:
        return _from_numpy(x.copy("K"))
    out: Any = options.get("out")
    if type(out) is not _Tensor or not x.flags.carray or out.requires_grad or out.dtype not in _plain:
        return None
    if out.is_inference() or _readonly.is_marked(out) or (view := _dense(out)) is None:
        return None
    if view.dtype is not x.dtype or view.shape != x.shape or _may_share_memory(view, x):
        return None
    view[...] = x
    _increment_version(out)
    return out


def is_held(t: Any) -> bool:
    """Whether the storage of a dense tensor holds all of it. After a ``resize_`` that failed it does not."""
    return bool(t.storage_offset() * t.element_size() + t.nbytes <= t.untyped_storage().nbytes())
