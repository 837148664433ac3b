"""The fast lanes: plain arrays of exact types, without options or with `copy=True` or `out=` alone, cross with no
decision to look up.

A lane takes only what it can tell for sure in a few checks, and a test holds it to the result of the full road for
every kind of array. Everything else, and everything while a guard or a trace is open, goes the full road.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from tensorbridge import _eager, _forks, _readonly, _watch
from tensorbridge._adapters import Adapter, _numpy
from tensorbridge._array import HUGE, SMALL, layout

_F = TypeVar("_F", bound=Callable[..., Any])
_ndarray = np.ndarray
_may_share_memory = np.may_share_memory
_address = _numpy.address

# Set by `open` when torch shows up. Until then no object is of type `_Tensor`, and no array has a lane to torch.
_Tensor: Any = None
_common: Any = None  # the dtype asked first: float32
_float32: Any = None  # NumPy's
_plain_dtypes: frozenset[Any] = frozenset()  # torch dtypes that NumPy has as themselves
_plain_numpy: frozenset[Any] = frozenset()
_host: frozenset[Any] = frozenset()  # its names, as `device`
_in_numpy: Mapping[Any, Any] = {}  # NumPy's dtype for one of torch's
_forward_ad: Any  # torch's module: inside a dual level a plain-looking tensor may carry a tangent
_from_numpy: Callable[[Any], Any]
_dense: Callable[[Any], Any]
_in_place: Callable[[Any], Any]
_increment_version: Callable[[Any], None]
_intercepted: Callable[[], bool] = lambda: False
_modes: Callable[[], int]
_marked, _is_marked = _readonly.marked, _readonly.is_marked
_compiling: Callable[[], Any] = lambda: None  # not None: compiled code is calling, and nothing is shared with it


in_child = False  # of a fork, which has none of the threads that torch may have used


@_forks.in_child
def _forked() -> None:
    global in_child
    in_child = True


opened: Callable[[], None] = lambda: None  # called once, when torch has shown up


def open(adapter: Adapter) -> None:
    global _Tensor, _common, _float32, _plain_dtypes, _plain_numpy, _host, _in_numpy
    global _forward_ad, _from_numpy, _dense, _in_place, _increment_version, _compiling, _intercepted, _modes
    facts: Any = adapter
    _intercepted, _modes = facts.is_intercepted, facts.modes
    _forward_ad, _from_numpy, _host = facts.forward_ad, facts.from_numpy, facts.HOST
    _dense, _in_place, _increment_version = facts.dense, facts.in_place, facts.increment_version
    _eager.hide_all()
    _compiling = _eager.compiling
    _common, _plain_dtypes, _plain_numpy, _in_numpy = facts.COMMON, facts.PLAIN, facts.PLAIN_NUMPY, facts.IN_NUMPY
    _float32, _Tensor = np.dtype("float32"), facts.Tensor  # last: other threads may be in a lane
    opened()


def plain_tensor_to_numpy(full: _F) -> _F:
    """A lane in front of `to_numpy`.

    What `Tensor.numpy` itself refuses need not be asked: torch.func wrappers, conj and neg bits, sparse layouts. An
    array that owns its data was made up on the way: the tensor is functional, and has none.
    """

    @wraps(full)
    def to_numpy(x: Any, **options: Any) -> Any:
        if type(x) is _Tensor and not _watch.watching and not (_marked and _is_marked(x)) and _compiling() is None:
            dtype = x.dtype
            if options:
                if (made := tensor_to_numpy(x, options)) is not None:
                    return made
            elif (dtype is _common or dtype in _plain_dtypes) and x.is_cpu and _forward_ad._current_level < 0:
                try:
                    if x.requires_grad:
                        a = x.numpy(force=not in_child)  # else refused: it would resolve a lazy bit by torch's threads
                        if not a.flags.owndata and a.base.data_ptr() == x.data_ptr():  # else a lazy bit was resolved
                            a.setflags(False)  # positional: a fifth of the price of .flags.writeable
                            return a
                    else:
                        a = x.numpy()
                        flags = a.flags.num & 7
                        if 0 < flags < 4:  # contiguous in C's order (1) or Fortran's (2), and not owning its data (4)
                            return a
                        if not flags and not layout(a.shape, a.strides, a.itemsize).overlap:
                            return a
                except (RuntimeError, TypeError, ValueError, AssertionError):  # lazy bits, FakeTensorMode ...: too rare
                    pass
        if _eager.unhidden:
            _eager.hide_all()
        return full(x, **options) if _eager.compiling() is None else _eager.inside(full, x, **options)

    return _eager.outermost(to_numpy)  # type: ignore[return-value]


def is_forward(a: Any) -> bool:
    """Whether torch can hold the strides of this array, and no two of its elements are one."""
    lay = layout(a.shape, a.strides, a.itemsize)
    return not lay.overlap and lay.spacing in ("dense", "strided")


def is_whole(a: Any, base: Any) -> bool:
    """Whether this array is all of the tensor behind it, as `Tensor.numpy` made it."""
    same = _in_numpy.get(base.dtype) is a.dtype and _address(a) == base.data_ptr() and base.shape == a.shape
    return same and base.is_contiguous() and not base.requires_grad


def plain_array_to_torch(full: _F) -> _F:
    """A lane in front of `to_torch`. A view is plain if an array with its own memory stands behind it, or a tensor of
    which it is the whole.
    """

    @wraps(full)
    def to_torch(x: Any, **options: Any) -> Any:
        if type(x) is _ndarray and not _watch.watching and _compiling() is None:
            try:
                if (dtype := x.dtype) is not _float32 and dtype not in _plain_numpy:
                    pass
                elif not options or (len(options) == 1 and options.get("device") in _host):
                    base: Any = x.base
                    if base is None or (type(base) is _ndarray and base.base is None):
                        flags = x.flags
                        if flags.carray or (flags.behaved and (flags.f_contiguous or is_forward(x))):
                            return _from_numpy(x)
                    elif type(base) is _Tensor and x.flags.carray and x.size and not _modes() and is_whole(x, base):
                        return base.detach()
                elif (made := array_to_torch(x, options)) is not None:
                    return made
            except (ValueError, TypeError):  # a negative stride on an axis of length 1; C's unsigned long long
                pass
        if _eager.unhidden:
            _eager.hide_all()
        return full(x, **options) if _eager.compiling() is None else _eager.inside(full, x, **options)

    return _eager.outermost(to_torch)  # type: ignore[return-value]


# -- With `copy=True` or `out=`, alone. None is no answer: the full road decides. NumPy copies, dense arrays and small
# ones however they lie, over a view of the tensor's memory that it borrows for the moment.


def tensor_to_numpy(x: Any, options: dict[str, Any]) -> Any:
    """What `to_numpy` gives for a tensor of exactly that type."""
    if len(options) != 1 or x.dtype not in _plain_dtypes:
        return None
    if options.get("copy") is True:
        return None if (view := _in_place(x)) is None or view.nbytes >= HUGE else view.copy("K")
    out: Any = options.get("out")
    if type(out) is not _ndarray or not out.flags.carray or _in_numpy.get(x.dtype) is not out.dtype:
        return None
    if (view := _in_place(x)) is None:
        return None
    if out.base is not None and (type(out.base) is not _ndarray or out.base.base is not None):
        return None
    if view.shape != out.shape or out.nbytes >= HUGE or _may_share_memory(view, out):
        return None
    out[...] = view
    return out


def array_to_torch(x: Any, options: dict[str, Any]) -> Any:
    """What `to_torch` gives for an array of exactly that type, of a plain dtype."""
    if len(options) != 1 or x.nbytes >= HUGE:
        return None
    flags = x.flags
    if options.get("copy") is True:
        plain = flags.forc or (flags.behaved and x.nbytes < SMALL and is_forward(x))
        return _from_numpy(x.copy("K")) if plain else None
    out: Any = options.get("out")
    if type(out) is not _Tensor or out.requires_grad or _in_numpy.get(out.dtype) is not x.dtype:
        return None
    if not (flags.carray or (flags.behaved and x.nbytes < SMALL)):
        return None
    if out.is_inference() or _readonly.is_marked(out) or (view := _dense(out)) is None:
        return None
    if view.shape != x.shape or _may_share_memory(view, x):
        return None
    view[...] = x
    _increment_version(out)
    return out


def is_held(t: Any) -> bool:
    """Whether the storage of a dense tensor holds all of it. After a ``resize_`` that failed it does not."""
    return bool(t.storage_offset() * t.element_size() + t.nbytes <= t.untyped_storage().nbytes())
