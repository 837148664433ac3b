"""What offers no array, or one that hides something: told by what it is, so that the error names a call that works."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from tensorbridge._adapters import _missing, _numpy
from tensorbridge._refuse import Obstacle


def obstacle_of(x: Any) -> str:
    """What it is that offers no array."""
    cls = type(x)
    if isinstance(x, deque):
        return "queue"
    if isinstance(x, Mapping) or hasattr(cls, "__dataclass_fields__") or hasattr(cls, "__attrs_attrs__"):
        return "container"
    if isinstance(x, (Set, range)):
        return "set" if isinstance(x, Set) else "range"
    if answers_to_all(x):
        return "stand-in"
    shared = sys.modules.get("multiprocessing.sharedctypes")
    if shared is not None and isinstance(x, shared.SynchronizedBase):
        return "text" if isinstance(x, shared.SynchronizedString) else "synchronized"
    if hasattr(cls, "toarray"):
        return "scipy"
    for kind in ("rows", "dataset"):
        if _missing.library(x, kind):
            return kind
    lazy = getattr(sys.modules.get("polars"), "LazyFrame", None)
    return "lazy" if lazy is not None and isinstance(x, lazy) else "not an array"


def refuse_unseen(x: Any) -> None:
    """What the array of an object lacks: the unit of pint's quantities; of dask's collections, which promote columns to
    one dtype, the mask; of null datasets of HDF5, any shape.
    """
    if _missing.library(x, "stored") and x.shape is None:
        raise Obstacle("null dataset", type(x).__name__)
    if hasattr(type(x), "magnitude"):
        _numpy.refuse_meaning(x, type(x).__name__, "x.magnitude, or x.m_as(unit)")
    if not hasattr(type(x), "__dask_graph__"):
        return
    meta = getattr(x, "_meta", None)
    if isinstance(meta, np.ma.MaskedArray):
        raise Obstacle("masked", type(x).__name__).cured("Convert x.compute().filled(value) and x.compute().mask.")
    if _missing.library(meta, "table") or _missing.library(meta, "column"):
        detail = "its columns are known when it has been computed"
        raise Obstacle("lazy", type(x).__name__, detail).cured("Convert x.compute().")


def answers_to_all(x: Any) -> bool:
    """Whether `x` has any attribute that it is asked for: what it says of itself then means nothing."""
    try:
        return hasattr(x, "no_array_has_this_name")
    except Exception:  # foreign code may raise anything
        return False


def is_deleted(x: Any) -> bool:
    """Whether this is an array of JAX whose memory is gone, which its own errors do not say."""
    try:
        return bool(x.is_deleted())
    except Exception:  # it has no such method, or is being traced
        return False
