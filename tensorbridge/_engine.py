"""The copy engine's choice: whose kernel writes the bytes of a copy on the host. Pure, like _plan, which asks it.

torch is chosen where its kernel is better (half-precision casts, transposes), and for its threads from 16 MiB on. They
double the speed of a plain copy on idle cores; when another process holds one, they wait for it for some milliseconds
or longer, so that such a moment is left to one thread (docs/cost.md has measurements). NumPy allocates, because from
4 MiB on it asks the kernel for huge pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tensorbridge import _dtypes
from tensorbridge._array import CPU, FROM_LARGE
from tensorbridge._step import Op

if TYPE_CHECKING:
    from tensorbridge._array import Traits
    from tensorbridge._step import Here, Step

_HALF = frozenset(name for name in _dtypes.DTYPES if name in ("float16", "bfloat16") or name.startswith("float8"))


# Casts that give the same values by every kernel: widening, and rounding once. From float64 torch rounds twice, and the
# float8 types differ beyond their range; such a cast stays where it is, whether torch is loaded or not.
_WIDE = frozenset({"float32", "float64"})
_ROUNDED_ALIKE = frozenset({"float16", "bfloat16"})
_WITHIN_HALF = frozenset({"bool", "uint8", "int8", "int16"})  # no value of theirs is beyond float16's range


IN_PIECES = "torch in pieces"


class Kernel(NamedTuple):
    by: str  # "numpy" or "torch"
    why: str = ""

    @property
    def said(self) -> str:
        return f"; by {self.by}: {self.why}" if self.why else ""


NUMPY = Kernel("numpy")


def kernel(now: Traits, dtype: str, order: str, here: Here) -> Kernel:
    """Whose kernel copies an array of kind `now`, which torch can view, to `dtype` and memory `order` on the host."""
    if here.worker or not here.torch or now.size == "empty" or faults(now):
        return NUMPY
    rounds = now.dtype == "float32" and dtype in _ROUNDED_ALIKE
    told = here.heard and dtype == "float16"  # NumPy has nothing to say of bfloat16
    fits = now.dtype in _WITHIN_HALF and dtype == "float16" and now.size != "small"
    if (now.dtype in _HALF and dtype in _WIDE) or (rounds and not told) or fits:
        return Kernel("torch", "its half-precision casts are vectorised")
    if now.size == "huge" and now.dtype == dtype and here.threads:
        return Kernel("torch", "its threads share a copy of this size")
    if now.order != order and now.size != "small" and _dtypes.keeps_values(now.dtype, dtype):
        return Kernel("torch", "it transposes in blocks")
    return NUMPY


def of_tensor(now: Traits, dtype: str, order: str, here: Here) -> Kernel:
    """The same for a tensor. A cast has torch's values, whatever its size."""
    if now.dtype == dtype:
        return kernel(now, dtype, order, here._replace(torch=True))
    return Kernel("torch")


def into(now: Traits, out: Traits, here: Here) -> Kernel:
    """Whose kernel fills memory of the other framework, where both could."""
    if now.framework == "torch":
        return of_tensor(now, out.dtype, out.order, here)
    return kernel(now, out.dtype, out.order, here)


def in_numpy_pages(now: Traits, dtype: str, by: str) -> bool:
    """Whether the copy of a tensor goes into memory that NumPy allocates: where NumPy makes it, or torch would take
    small pages.
    """
    return numpy_may_copy(now, dtype) and (by == "numpy" or now.size in FROM_LARGE)


def in_pieces(step: Step, before: Traits) -> Step:
    """The step as a forked process does it: torch's threads have not survived the fork, and it would wait for them.
    What autograd records stays whole.
    """
    if step.kind != "h2h" or step.op not in _PIECEWISE or (step.by or step.after.framework) != "torch":
        return step
    unless = ", unless autograd records it" if before.graph else ""
    return step._replace(by=IN_PIECES, why=f"{step.why}; in pieces{unless}: torch's threads have not survived the fork")


_PIECEWISE = frozenset({Op.STACK, Op.RESOLVE, Op.CAST, Op.PACK, Op.COPY, Op.FILL})


def numpy_may_copy(now: Traits, dtype: str) -> bool:
    """Whether NumPy may copy a tensor: from the size on where torch would use threads, and one that torch's kernels may
    fault on. One in a graph is autograd's.
    """
    both = _dtypes.exists_in(now.dtype, "numpy") and _dtypes.exists_in(dtype, "numpy")
    plain = now.device == CPU and not now.graph and not now.lazy
    return (now.size == "medium" or now.size in FROM_LARGE or faults(now)) and plain and both


def faults(now: Traits) -> bool:
    """Whether torch's kernels may end the process at an element of a misaligned tensor that is read many times, or is
    its only one: NumPy aligns complex128 to 8 bytes, and torch, which takes it so, to 16.
    """
    misaligned = now.framework == "torch" and now.dtype == "complex128" and not now.aligned
    return misaligned and (now.overlap or now.size == "small")  # how many a small one has is not seen here
