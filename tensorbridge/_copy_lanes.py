"""Fast lanes for small copies: `copy=True` or `out=`, alone, of plain dense arrays of exact types.

As in `_lanes`: a lane takes only what it can tell for sure in a few checks, and gives what the full road gives. It is
for arrays so small that torch's kernels use one thread, and that deciding would cost more than copying. None is no
answer: the full road decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tensorbridge._adapters import Adapter

_MOST = 32_768  # bytes; torch's kernels start a second thread at so many elements
_ndarray = np.ndarray

_Tensor: Any = None
_plain: frozenset[Any] = frozenset()
_plain_numpy: frozenset[Any] = frozenset()
_forward_ad: Any
_from_numpy: Callable[[Any], Any]
_is_functional: Callable[[Any], bool]


def open(adapter: Adapter) -> None:
    global _Tensor, _plain, _plain_numpy, _forward_ad, _from_numpy, _is_functional
    facts: Any = adapter
    _plain, _plain_numpy = facts.PLAIN, facts.PLAIN_NUMPY
    _forward_ad, _from_numpy, _is_functional = facts.forward_ad, facts.from_numpy, facts.is_functional
    _Tensor = facts.Tensor


def tensor_to_numpy(x: Any, options: dict[str, Any]) -> Any:
    """What `to_numpy` gives for a tensor of exactly that type."""
    if len(options) != 1 or x.dtype not in _plain or x.nbytes > _MOST or not _is_dense(x):
        return None
    try:
        if x.requires_grad:
            x = x.detach()
        if options.get("copy") is True:
            made = x.clone().numpy()  # of the clone: the source's own storage stays resizable
            return None if made.flags.owndata else made
        out: Any = options.get("out")
        if type(out) is not _ndarray or not out.flags.carray or out.dtype not in _plain_numpy:
            return None
        if out.base is not None and (type(out.base) is not _ndarray or out.base.base is not None):
            return None
        into = _from_numpy(out)
        if into.dtype is x.dtype and into.shape == x.shape and _are_apart(into, x):
            into.copy_(x)
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
    if type(out) is not _Tensor or not x.flags.carray or x.nbytes > _MOST or not _is_dense(out) or out.requires_grad:
        return None
    source = _from_numpy(x)
    try:
        fits = out.dtype is source.dtype and out.shape == source.shape and _are_apart(out, source)
        if fits and not _is_functional(out):
            return out.copy_(source)
    except RuntimeError:  # no memory of its own; an inference tensor
        pass
    return None


def _is_dense(t: Any) -> bool:
    return t.is_cpu and t.is_contiguous() and _forward_ad._current_level < 0  # type: ignore[no-any-return]


def _are_apart(a: Any, b: Any) -> bool:
    """Whether two dense tensors of one size have no byte in common."""
    return abs(a.data_ptr() - b.data_ptr()) >= a.nbytes  # type: ignore[no-any-return]
