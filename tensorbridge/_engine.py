"""The copy engine's choice: whose kernel writes the bytes of a copy on the host. Pure, like _plan, which asks it.

torch is chosen where its kernel is better (half-precision casts, transposes), not where it merely has more threads:
those double the speed of a plain copy on idle cores, and cost a hundredfold when another process holds one
(docs/cost.md has the measurements). NumPy allocates, because from 4 MiB on it asks the kernel for huge pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tensorbridge import _dtypes

if TYPE_CHECKING:
    from tensorbridge._array import Traits
    from tensorbridge._step import Here

_HALF = frozenset(name for name in _dtypes.DTYPES if name in ("float16", "bfloat16") or name.startswith("float8"))


_FLOATS = _HALF | {"float32", "float64"}  # between others, values out of range would depend on the kernel


class Kernel(NamedTuple):
    by: str  # "numpy" or "torch"
    why: str = ""


NUMPY = Kernel("numpy")


def kernel(now: Traits, dtype: str, order: str, here: Here) -> Kernel:
    """Whose kernel copies an array of kind `now`, which torch can view, to `dtype` and memory `order` on the host."""
    if here.worker or not here.torch or now.size == "empty":
        return NUMPY
    if now.dtype != dtype and _HALF & {now.dtype, dtype} and {now.dtype, dtype} <= _FLOATS:
        return Kernel("torch", "its half-precision casts are vectorised")
    if now.order != order and now.size != "small":
        return Kernel("torch", "it transposes in blocks")
    return NUMPY


def wants_numpy_pages(now: Traits, dtype: str) -> bool:
    """Whether the copy of a tensor goes into memory that NumPy allocates; a copy in a graph is autograd's own."""
    both = _dtypes.exists_in(now.dtype, "numpy") and _dtypes.exists_in(dtype, "numpy")
    return now.size == "large" and not now.graph and not now.lazy and both
