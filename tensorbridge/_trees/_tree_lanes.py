"""Fast lanes for the leaves of trees: plain arrays are converted with no decision to look up, as in `_lanes`.

A lane takes what it can tell for sure in a few checks, and answers with the places of the rest. The same object twice
has one result. The same memory twice stays one: what shares leaves it so; in a lane that copies, arrays that own their
memory are told apart as objects, and only where one is a view its address is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from tensorbridge import _api, _convert, _dtypes, _lanes
from tensorbridge._array import CPU, LARGE
from tensorbridge._errors import BridgeError
from tensorbridge._step import Want


def through_lanes(leaves: list[Any], want: Want, results: list[Any], seen: dict[Any, int]) -> Sequence[int]:
    _convert.open_lanes()
    if _lanes._intercepted():  # what is made has no address
        return range(len(leaves))
    on_host = want.device is None or want.device == CPU
    plain = want.dtype is None and want.casts is None and not want.pin_memory and want.copy is not False
    if want.framework == "torch" and on_host and plain:
        if not want.copy:
            rest = _shared_arrays(leaves, results)
            return rest if want.share_readonly or not rest else _readonly_arrays(leaves, results, rest)
        if set(map(type, leaves)) == {np.ndarray} and not [a for a in leaves if a.base is not None]:
            return _copied_arrays(leaves, results)
        return _copied_views(leaves, results, seen)
    if want == _WANT_NUMPY:
        return _shared_tensors(leaves, results)
    if want == _WANT_COPIES:
        return _copied_tensors(leaves, results)
    return range(len(leaves))


_WANT_NUMPY, _WANT_COPIES = Want("numpy"), Want("numpy", copy=True)


def _shared_arrays(leaves: list[Any], results: list[Any]) -> list[int]:
    from_numpy, plain, ndarray, tensor = _lanes._from_numpy, _lanes._plain_numpy, np.ndarray, _lanes._Tensor
    rest: list[int] = []
    first = _first_of(leaves)
    last = None  # a dtype is slow to hash, and most often the one before
    for i, a in enumerate(leaves):
        if type(a) is not ndarray:
            rest.append(i)
            continue
        flags = a.flags
        held = flags.carray or (flags.behaved and (flags.f_contiguous or _lanes.is_forward(a)))
        if held and ((dtype := a.dtype) is last or dtype in plain):
            last = dtype
            base: Any = a.base
            own = base is None or (type(base) is ndarray and base.base is None)
            if own or (type(base) is tensor and flags.carray and a.size and _lanes.is_whole(a, base)):
                if first is not None and results[first[id(a)]] is not None:
                    results[i] = results[first[id(a)]]
                    continue
                try:
                    results[i] = from_numpy(a) if own else base.detach()
                    continue
                except (ValueError, TypeError):  # as in _lanes
                    pass
        rest.append(i)
    return rest


_MANY = 16  # arrays, from which on it pays to ask all of them before the first is copied


def _copied_arrays(leaves: list[Any], results: list[Any]) -> list[int]:
    """Arrays that all own their memory: two are the same memory only if they are the same object."""
    from_numpy, plain = _lanes._from_numpy, _lanes._plain_numpy
    first = _first_of(leaves)
    if first is None and len(leaves) >= _MANY and _are_alike(leaves) and not [a for a in leaves if a.nbytes >= LARGE]:
        with suppress(ValueError, TypeError):  # as in _lanes
            results[:] = [from_numpy(a.copy()) for a in leaves]
            return []
    rest: list[int] = []
    for i, a in enumerate(leaves):
        if a.flags.c_contiguous and a.nbytes < LARGE and a.dtype in plain:
            if first is not None and results[first[id(a)]] is not None:
                results[i] = results[first[id(a)]]
                continue
            try:
                results[i] = from_numpy(a.copy())
                continue
            except (ValueError, TypeError):
                pass
        rest.append(i)
    return rest


def _are_alike(arrays: list[Any]) -> bool:
    """Whether all are in C's order and of one plain dtype. (A list that stays empty is twice as fast as `any`.)"""
    dtypes = [a.dtype for a in arrays]
    alike = dtypes.count(dtypes[0]) == len(dtypes) and dtypes[0] in _lanes._plain_numpy
    return alike and not [a for a in arrays if not a.flags.c_contiguous]


def _readonly_arrays(leaves: list[Any], results: list[Any], rest: list[int]) -> list[int]:
    """Of what cannot be shared, the read-only arrays, if all of it owns its memory."""
    arrays = [leaves[i] for i in rest]
    if not all(type(a) is np.ndarray and a.base is None and not a.flags.writeable for a in arrays):
        return rest
    made: list[Any] = [None] * len(rest)
    left = _copied_arrays(arrays, made)
    for i, result in zip(rest, made, strict=True):
        results[i] = result
    return [rest[i] for i in left]


def _first_of(leaves: list[Any]) -> dict[int, int] | None:
    """The index at which each object comes first; None if none comes twice."""
    if len(set(map(id, leaves))) == len(leaves):
        return None
    found: dict[int, int] = {}
    for i, leaf in enumerate(leaves):
        found.setdefault(id(leaf), i)
    return found


def _copied_views(leaves: list[Any], results: list[Any], seen: dict[Any, int]) -> list[int]:
    """Arrays of which some are views: only their addresses tell what is the same memory. torch reads those fastest."""
    from_numpy, plain, ndarray = _lanes._from_numpy, _lanes._plain_numpy, np.ndarray
    rest: list[int] = []
    for i, a in enumerate(leaves):
        if type(a) is ndarray and a.flags.carray and a.dtype in plain and a.nbytes < LARGE:
            try:
                address = from_numpy(a).data_ptr()
            except (ValueError, TypeError):
                rest.append(i)
                continue
            key = (CPU, address, _dtypes.of_numpy(a.dtype), a.shape, None, True, False, "", None)  # as _leaf.identity
            first = seen.setdefault(key if address else id(a), i)
            results[i] = results[first] if first != i else from_numpy(a.copy())
            continue
        rest.append(i)
    return rest


def _shared_tensors(leaves: list[Any], results: list[Any]) -> list[int]:
    to_numpy, tensor = _api.to_numpy, _lanes._Tensor
    rest: list[int] = []
    first = _first_of(leaves)
    for i, t in enumerate(leaves):
        if first is not None and results[first[id(t)]] is not None:
            results[i] = results[first[id(t)]]
        elif type(t) is tensor and t.is_cpu and not (t.is_conj() or t.is_neg()):
            try:
                results[i] = to_numpy(t)
            except BridgeError:
                rest.append(i)  # to be refused again, by name
        else:
            rest.append(i)
    return rest


def _copied_tensors(leaves: list[Any], results: list[Any]) -> Sequence[int]:
    """Dense tensors of which no two begin at one address: what is the same memory twice takes a closer look."""
    everything = range(len(leaves))
    tensor = _lanes._Tensor
    if tensor is None or set(map(type, leaves)) != {tensor}:
        return everything
    try:
        if len(set(map(tensor.data_ptr, leaves))) < len(leaves):
            return everything
    except RuntimeError:  # no memory of its own
        return everything
    rest: list[int] = []
    for i, t in enumerate(leaves):
        results[i] = _lanes.tensor_to_numpy(t, _COPY)
        if results[i] is None:
            rest.append(i)
    return rest


_COPY = {"copy": True}
