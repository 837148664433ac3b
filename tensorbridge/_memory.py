"""Do two arrays share memory? Asked of their addresses: no element is touched, so it works for any device."""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heappop, heappush
from typing import Any

import numpy as np

from tensorbridge import _dtypes
from tensorbridge._adapters import _numpy
from tensorbridge._array import ArrayInfo, reach

_DENSE = frozenset({"C", "F"})
_BOUND: Any = 10_000  # candidate solutions that NumPy may try


def infos_share(a: ArrayInfo, b: ArrayInfo) -> bool:
    """Intervals first, then NumPy's exact test on the addresses: no element is touched, device addresses too."""
    if (a.device, a.storage) != (b.device, b.storage) or not (a.nbytes and b.nbytes and a.address and b.address):
        return False
    low_a, high_a = _bounds(a)
    low_b, high_b = _bounds(b)
    if high_a <= low_b or high_b <= low_a:
        return False
    return overlap(_at_address(a), _at_address(b))


def overlap(a: Any, b: Any) -> bool:
    """NumPy's exact test, with bounded work: True where that cannot exclude a common element."""
    try:
        return np.shares_memory(a, b, max_work=_BOUND)
    except np.exceptions.TooHardError:
        return True


def first_meeting(written: Mapping[int, ArrayInfo], read: Mapping[int, ArrayInfo]) -> tuple[int, int, bool] | None:
    """Two places where a write would change what is written or read at the other, if there are any.

    The first is a place in `written`; whether the other is so too, comes last. What is read and written at one place is
    not compared. Only arrays whose intervals overlap are asked, in order of address.
    """
    sides = ((written, True), (read, False))
    spans = [(*_bounds(x), i, writes) for side, writes in sides for i, x in side.items() if x.nbytes and x.address]
    near: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # heaps of (end, place)
    for low, high, i, writes in sorted(spans):
        for heap in near.values():
            while heap and heap[0][0] <= low:
                heappop(heap)
        for other in (True, False) if writes else (True,):
            for _, j in near[other]:
                if i != j and infos_share((read, written)[writes][i], (read, written)[other][j]):
                    return (i, j, False) if not other else (j, i, False) if not writes else (max(i, j), min(i, j), True)
        heappush(near[writes], (high, i))
    return None


def _bounds(info: ArrayInfo) -> tuple[int, int]:
    if info.order in _DENSE:
        return info.address, info.address + info.nbytes
    low, high = reach(info.shape, info.strides, _dtypes.itemsize(info.dtype))
    return info.address + low, info.address + high


def _at_address(info: ArrayInfo) -> Any:
    return elements(info.address, info.shape, info.strides, _dtypes.itemsize(info.dtype))


def elements(address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> Any:
    """An array over addresses of any device, to be compared and never read.

    Axes that lead to no other address are left out: what is left, NumPy can hold.
    """
    axes = [(n, s) for n, s in zip(shape, strides, strict=True) if s and n != 1]
    lengths, steps = tuple([n for n, _ in axes]), tuple([s for _, s in axes])
    return np.asarray(_numpy.Memory(address, lengths, steps, f"|V{itemsize}", True, None))
