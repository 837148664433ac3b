"""What one would write by hand, for one row alone, with the promises that tensorbridge makes: the least they cost."""

from __future__ import annotations

from typing import Any

from torch import from_numpy

from tensorbridge._adapters._numpy import address
from tensorbridge._lanes import is_forward


def in_graph(t: Any) -> Any:
    """A tensor of a graph, shared read-only; not a copy that was made on the way, of a lazy bit or a functional one."""
    a = t.numpy(force=True)
    if a.flags.owndata or a.base.data_ptr() != t.data_ptr():
        raise ValueError
    a.setflags(False)
    return a


def no_two_are_one(a: Any) -> Any:
    """An array that may be written to, of which no two elements share a byte."""
    if not (a.flags.behaved and is_forward(a)):
        raise ValueError
    return from_numpy(a)


def alias(a: Any) -> Any:
    """The tensor that an array is the whole of, with its version counter."""
    base = a.base
    same = base.data_ptr() == address(a) and base.shape == a.shape and base.is_contiguous()
    if not same or base.requires_grad:
        raise ValueError
    return base.detach()
