"""What an array is: facts, and the few of them on which decisions rest.

`Traits` is the kind of an array: everything that a decision may look at, and nothing that differs between two arrays of
one kind (its shape, its address). `ArrayInfo` is one array described for a person.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from tensorbridge._eager import eager

if TYPE_CHECKING:
    from collections.abc import Sequence

SMALL = 64 * 1024  # bytes: below, a copy costs its call, not its bytes
LARGE = 4 * 1024 * 1024  # bytes: from here on, NumPy asks the kernel for huge pages
HUGE = 16 * 1024 * 1024  # bytes: from here on, torch's threads may share a copy where cores are idle
ON_A_TENSOR = frozenset({"tensor", "narrowed"})  # origins: a write is one to the tensor, whose version it counts
MOST, MOST_AXES = 2**63 - 1, 64  # bytes and axes: a tensor may claim more (a huge expand), a NumPy array may not


class Device(str):
    """A device under the name that the field gives it: "cpu", "cuda:0", "mps:0". Compares and hashes as that string.

    torch has more kinds than two. Of those beside the host and CUDA nothing is known here but what torch does for all:
    it copies to the host and back, and waits.
    """

    __slots__ = ()

    @property
    def type(self) -> str:
        """The kind: "cpu", "cuda", or another one of torch's: "mps", "xpu" ..."""
        return self.partition(":")[0]

    @property
    def is_cuda(self) -> bool:
        """Whether streams, page-locked memory, CuPy and addresses that can be compared are to be had there."""
        return self.startswith("cuda")

    @property
    def is_other(self) -> bool:
        """Whether torch alone knows this kind: Apple's and Intel's GPUs, and what torch's backends add."""
        return self.type not in ("cpu", "cuda")

    @property
    def has_addresses(self) -> bool:
        """Whether what torch gives as an address is known to be one. Apple's is a handle: see ``ArrayInfo.storage``."""
        return self.type in ("cpu", "cuda", "xpu")

    @property
    def index(self) -> int:  # type: ignore[override]
        """Which one of its kind; 0 for the host."""
        return int(self.partition(":")[2] or 0)


CPU = Device("cpu")


class Layout(NamedTuple):
    """How elements lie in memory, as far as anybody decides by it."""

    order: str = "C"  # axes by falling stride: "C" last axis fastest, "F" first axis fastest, "K" any other permutation
    spacing: str = "dense"  # or "strided" (gaps), "reversed" (a negative stride), "odd" (not whole elements apart)
    overlap: bool = False  # two indices may lead to one element (a broadcast, a sliding window)
    loose: bool = False  # an axis of length 1 (or an empty array) carries a stride that torch refuses; it means nothing


class Traits(NamedTuple):
    """The kind of an array: all that a decision may see. Two arrays of one kind are always treated alike."""

    # "numpy", "torch", "cupy"; of what is no array yet: a protocol ("dlpack" ...), "torch list", "python scalar",
    # "column", "table"
    framework: str
    device: Device = CPU
    dtype: str = "float32"  # its name, as in the array API; ">float32": bytes swapped
    order: str = "C"  # axes by falling stride: "C", "F", or "K" for any other permutation
    spacing: str = "dense"  # or "strided" (gaps), "reversed" (a negative stride), "odd" (not whole elements apart)
    overlap: bool = False  # two indices may lead to one element
    loose: bool = False  # an axis of length 1 carries a stride that torch refuses, and that means nothing
    aligned: bool = True  # the address is a multiple of the item size that the CPU wants
    writable: bool = True
    graph: bool = False  # requires grad: an autograd graph hangs on it, or may
    lazy: str = ""  # "conj", "neg", "conj neg", "zero": values that are not what the bytes say
    pinned: bool | None = None  # page-locked host memory; None: not asked
    size: str = "small"  # "empty", "small" (< 64 KiB), "medium", "large" (>= 4 MiB), "huge" (>= 16), "beyond" NumPy
    # Who stands behind a view: "tensor" (a NumPy view of one), "narrowed" (such a view that was made read-only, or to
    # overlap, by others: the array that lies on the tensor is not), "memmap", "unknown" (`__array__`). Nobody: "copied"
    # (the producer made a copy for us and says so), "made" (it is seen to have). Of a column: how it becomes an array.
    # Of a list of arrays of several dtypes: that they are cast.
    origin: str = ""


class ArrayInfo(NamedTuple):
    """One array, described. No element was read, unless an object of another library had to compute its array.

    Bytes for strides and sizes, as NumPy counts them; `stream` is the CUDA stream current for the array's framework,
    None elsewhere; `address` is the first element's, on its device, 0 where there is no memory to share. On a device
    that has no addresses ("mps:0" ...) it may be a handle, and means something only inside one `storage`.
    """

    # "numpy", "torch", "cupy"; "python scalar"; "numpy list", "torch list" ..., by who stacks it; "column", "table";
    # what another library's object speaks: "dlpack", "cuda_array_interface", "array_interface", "buffer", "__array__"
    framework: str
    device: Device
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    nbytes: int  # of the elements: product of the shape times the item size, whatever memory lies behind
    order: str  # "C", "F", "K" (another permutation); with gaps or worse: "strided C", "reversed C", "odd C"
    writable: bool
    requires_grad: bool
    grad_fn: str | None  # name of the node that made it, as "MulBackward0"; None at a leaf or outside a graph
    lazy: str  # "conj", "neg", "conj neg", "zero": values that are not what the bytes say; "" otherwise
    pinned: bool | None  # None: not asked
    stream: int | None
    address: int = 0  # of the first element
    overlap: bool = False  # two indices may lead to one element: a broadcast, a sliding window
    storage: int = 0  # inside which `address` can be compared; 0 where any two can be: on the host, "cuda" and "xpu"

    @eager
    def __str__(self) -> str:
        graph = f", in a graph ({self.grad_fn})" if self.grad_fn else ", requires grad" if self.requires_grad else ""
        lazy = f", {self.lazy} bit set" if self.lazy else ""
        frozen = "" if self.writable else ", read-only"
        return f"{self.framework} {self.dtype} {shape_text(self.shape)} on {self.device}{graph}{lazy}{frozen}"


def shape_text(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "(?)"
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


FROM_LARGE = frozenset({"large", "huge"})  # size classes


def size_class(nbytes: int, axes: int = 0) -> str:
    if axes > MOST_AXES:
        return "beyond"
    if nbytes >= HUGE:
        return "huge" if nbytes <= MOST else "beyond"
    if nbytes >= LARGE:
        return "large"
    if nbytes >= SMALL:
        return "medium"
    return "small" if nbytes else "empty"


@lru_cache(maxsize=4096)
def layout(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> Layout:
    """The memory layout of an array; `strides` in bytes.

    Axes of length 1 say nothing and are left out. `overlap` is True unless the strides exclude it (each axis steps over
    all that the finer axes span), so a few exotic disjoint layouts count as overlapping: copied, never harmed.
    """
    loose = any(
        length <= 1 and (stride < 0 or stride % itemsize) for length, stride in zip(shape, strides, strict=True)
    )
    if 0 in shape:
        return Layout(loose=loose or any(s < 0 or s % itemsize for s in strides))
    axes = [(stride, length) for length, stride in zip(shape, strides, strict=True) if length > 1]
    falling, _ = by_stride([stride for stride, _ in axes])
    span, dense, overlap = itemsize, True, False
    for stride, length in (axes[i] for i in reversed(falling)):
        dense = dense and abs(stride) == span
        overlap = overlap or abs(stride) < span
        span += abs(stride) * (length - 1)
    if overlap or falling == sorted(falling):
        order = "C"
    else:
        order = "F" if falling[::-1] == sorted(falling) else "K"
    if any(stride % itemsize for stride, _ in axes):
        spacing = "odd"
    elif any(stride < 0 for stride, _ in axes):
        spacing = "reversed"
    else:
        spacing = "dense" if dense else "strided"
    return Layout(order, spacing, overlap, loose)


def c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The strides of a dense array in C order; in bytes, or in elements with an `itemsize` of 1."""
    strides = [itemsize] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    return tuple(strides)


def by_stride(strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """The axes as they lie in memory, from the longest stride to the shortest; and the axes that transpose back."""
    axes = sorted(range(len(strides)), key=lambda i: (-abs(strides[i]), i))
    return axes, sorted(range(len(axes)), key=axes.__getitem__)


def reach(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """How far the bytes of an array lie from its first element: from where, and up to where."""
    if 0 in shape:
        return 0, 0
    steps = [(n - 1) * s for n, s in zip(shape, strides, strict=True)]
    return sum(s for s in steps if s < 0), sum(s for s in steps if s > 0) + itemsize


def order_text(order: str, spacing: str) -> str:
    return order if spacing == "dense" else f"{spacing} {order}"
