"""One leaf of a tree: opened and decided, its memory told from others', errors given its name.

Decisions do not see the shape, so small plain arrays of one kind are decided once a tree: the first is opened, the rest
are like it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tensorbridge import _lanes, _readonly
from tensorbridge._adapters import _columns, _missing
from tensorbridge._array import SMALL, ArrayInfo, c_strides
from tensorbridge._convert import Case, judged
from tensorbridge._errors import BridgeError, UnsupportedArrayError
from tensorbridge._step import Want
from tensorbridge._trees._walk import Flat

NAMED = (BridgeError, ValueError, TypeError)


def name(error: Exception, flat: Flat, place: int) -> None:
    """Let an error begin with the leaf that it is about."""
    if len(error.args) == 1:
        text = str(error)
        lacks = _LACKS.search(text) if len(flat.leaves) > 1 else None
        if lacks and "dtype=" not in text[: lacks.start()]:
            casts = f'dtype={{"{lacks[1]}": "{lacks[2]}"}}'
            text += f"\nIn a tree that casts every array: {casts} casts those of this dtype alone."
        node, child = flat.around(place)
        if isinstance(error, UnsupportedArrayError) and _missing.library(node, "table"):
            text += _columns.others_refused(node, child)
        error.args = (f"{flat.path(place)}: {text}",)


_LACKS = re.compile(r'ha(?:s|ve) no (\w+)\.\nUse dtype="(\w+)"')


class Leaf:
    """A leaf that was opened and decided."""

    __slots__ = ("alike", "case", "handle", "place")

    def __init__(self, place: int, handle: Any, case: Case, alike: bool = False) -> None:
        self.place, self.handle, self.case = place, handle, case
        self.alike = alike  # not opened itself: another of its kind was

    @property
    def info(self) -> ArrayInfo:
        return self.case.info(self.handle)


def opened(place: int, x: Any, want: Want, *, planning: bool = False) -> Leaf:
    return Leaf(place, *judged(x, want, planning=planning))


def decided(
    flat: Flat, want: Want, rest: Sequence[int], seen: dict[Any, int], *, planning: bool = False
) -> tuple[list[Leaf], dict[int, int]]:
    """The leaves to convert, and for every other place the one whose result it shares.

    Only conversions that move bytes are shared by address: those that do not leave the memory one anyway, and give each
    object its own like.
    """
    arrays = flat.leaves
    first_of: dict[int, int] = {}
    same: dict[int, int] = {}
    found: list[Leaf] = []
    cases: dict[Any, Case] = {}
    # Arrays that all own their memory are the same memory only as the same object.
    apart = all(type(x) is np.ndarray and x.base is None for x in arrays)
    for i in rest:
        x = arrays[i]
        first = first_of.setdefault(id(x), i)
        if first == i:
            key = key_of(x)
            case = None if key is None else cases.get(key)
            if case is not None:
                leaf = Leaf(i, x, case, True)
            else:
                try:
                    leaf = opened(i, x, want, planning=planning)
                except NAMED as error:
                    name(error, flat, i)
                    raise
                case = leaf.case
                if key is not None and leaf.handle is x:
                    cases[key] = case
            if not apart and case.recipe.moves:
                memory = _memory_of(leaf, key)
                first = i if memory is None else seen.setdefault(memory, i)
        if first == i:
            found.append(leaf)
        else:
            same[i] = same.get(first, first)
    return found, same


_PLAIN, _WRITABLE = 0x101, 0x400  # of NumPy's flags: in C order and aligned; writable
FACTS = _PLAIN | _WRITABLE


def key_of(x: Any) -> Any:
    """A key under which small plain arrays are decided alike; None for all others.

    Whether a host tensor is pinned is not in it: that costs a call of the driver, and packing does not ask. A leaf that
    crosses by itself after all is opened again.
    """
    cls = type(x)
    if cls is np.ndarray:
        flags, base = x.flags.num, x.base
        if flags & _PLAIN != _PLAIN or not 0 < x.nbytes < SMALL:
            return None
        if 1 in x.shape and x.strides != c_strides(x.shape, x.itemsize):  # they mean nothing, and torch may refuse them
            return None
        if base is not None and not (type(base) is np.ndarray and base.base is None and x.dtype.kind != "c"):
            return None  # a complex view may be aligned to NumPy, and not to torch
        return x.dtype, flags & _WRITABLE
    if cls is not _lanes._Tensor or _lanes._forward_ad._current_level >= 0:
        return None
    try:
        # A tensor without memory of its own (sparse, meta, inside torch.func) has no address, or raises; so does the
        # shape of a nested one. A dtype that is never converted stops the first of its kind.
        address = x.data_ptr()
        if not address or address % 16 or not x.is_contiguous() or x.nbytes >= SMALL:
            return None
        if x.is_nested or not (x.is_cpu or x.is_cuda) or x.is_neg() or x.is_conj() or not _lanes.is_held(x):
            return None
        if _readonly.is_marked(x):
            return None
        return x.dtype, x.get_device(), x.requires_grad
    except RuntimeError:
        return None


def _memory_of(leaf: Leaf, key: Any) -> Any:
    """What makes two leaves the same memory, to be treated alike; None where no address is known.

    Tensors inside a graph are what their node made them: only leaves of the graph can be tied.
    """
    x, traits = leaf.handle, leaf.case.traits
    if key is not None and traits.framework == "torch":
        node = x.grad_fn if traits.graph else None  # itself: torch may make the object anew each time it is asked for
        # As `identity` would say, without describing it.
        return (traits.device, x.data_ptr(), traits.dtype, x.shape, None, True, traits.graph, "", node)
    return identity(leaf.info, x)


def identity(info: ArrayInfo, x: Any) -> Any:
    """What makes two arrays the same memory; None where no address is known."""
    if not (info.address and info.nbytes):
        return None
    node = x.grad_fn if info.grad_fn else None
    strides = None if info.order == "C" else info.strides
    address = (info.storage, info.address) if info.storage else info.address
    who = (info.device, address, info.dtype, info.shape, strides)
    if info.stream is not None:  # on CUDA: what another framework, or stream, has done to it is to be waited for
        who = (*who, info.framework, info.stream)  # type: ignore[assignment]
    return (*who, info.writable, info.requires_grad, info.lazy, node)
