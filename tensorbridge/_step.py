"""What is said between the three verbs: a wish, the facts of the moment, steps, a plan. Records only, and no rule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from tensorbridge import _dtypes
from tensorbridge._array import ArrayInfo, Device, Traits
from tensorbridge._eager import eager
from tensorbridge._roads import RING

if TYPE_CHECKING:
    from collections.abc import Sequence


class Op:
    """The names of steps. Those in MOVING write every element once; the others move no byte."""

    DETACH = "detach"  # an alias outside the graph
    WRAP = "wrap"  # a scalar as a 0-d array
    IMPORT = "import"  # a foreign array, seen through its protocol
    RESTRIDE = "restride"  # meaningless strides of length-1 axes made plain
    ORDER = "order"  # the consumer's stream waits for the producer's
    SHARE = "share"  # the same memory under the other framework
    PROTECT = "protect"  # a read-only view
    EXPORT = "export"  # a foreign array that its producer has copied or made for us, seen through its protocol
    STACK = "stack"  # a list, a column or a table into one array
    RESOLVE = "resolve"  # lazy conjugate, negative and zero bits made real
    BYTESWAP = "byteswap"  # native byte order
    CAST = "cast"  # another dtype
    PACK = "pack"  # a layout that the other side can hold
    COPY = "copy"  # fresh memory
    PIN = "pin"  # fresh page-locked memory
    FILL = "fill"  # into `out`
    TO_HOST = "to_host"
    TO_DEVICE = "to_device"


MOVING = frozenset(
    {Op.EXPORT, Op.STACK, Op.RESOLVE, Op.BYTESWAP, Op.CAST, Op.PACK, Op.COPY, Op.PIN, Op.FILL, Op.TO_HOST, Op.TO_DEVICE}
)
IN_PLACE = "in place"  # how an array that was made on the way becomes read-only: itself, not by a view of it
COLUMNS = frozenset({"column", "table"})  # of other libraries, that are no array yet
PROTOCOLS = frozenset({"dlpack", "cuda_array_interface", "array_interface", "buffer", "__array__"})
# Memory that a producer has given away, and how we know.
EXPORTED = {
    "copied": "the producer gave a copy, and says so",
    "made": "the object made this array for us: nobody else holds it",
}


class Want(NamedTuple):
    """What the caller asked for; every option of the public functions, in canonical form."""

    framework: str
    device: Device | None = None  # None: where it is ("cpu" for NumPy)
    dtype: str | None = None
    copy: bool | None = None
    writable: bool | None = None
    share_readonly: bool = False
    detach: bool = True
    pin_memory: bool = False
    non_blocking: bool = False
    out: Traits | None = None
    casts: _dtypes.Casts | None = None  # in place of `dtype`, until it is known what the array has

    def settled(self, has: str) -> Want:
        """The wish for an array of this dtype: what becomes of it is its `dtype`, and no longer hangs on anything."""
        return self if self.casts is None else self._replace(dtype=self.casts.of(has), casts=None)

    def gets(self, has: str) -> str:
        """What elements of this dtype become."""
        return self.settled(has).dtype or has


def usual(framework: str) -> Want:
    """What is asked for by a call without options: a tensor can keep its graph, an array cannot."""
    return Want(framework, detach=framework != "torch")


class Here(NamedTuple):
    """Facts of the moment. On the host: whether torch is loaded, a mode answers for it, it has threads, this process
    was forked, compiled code is calling, overflow is to be told. The rest is read only where a GPU is involved.
    """

    same_stream: bool = True  # the two frameworks' current streams are one, by raw handle
    capturing: bool = False  # a CUDA graph is being captured on a current stream
    forked: bool = False  # CUDA was in use in the parent of this forked process
    worker: bool = False  # a forked process: torch copies nothing on the host, for its threads did not survive the fork
    intercepted: bool = False  # a mode or a transform answers for torch: what becomes an array is made outside of it
    threads: bool = False  # torch has threads to share a huge copy
    torch: bool = False  # torch is loaded: its kernels may do what NumPy's are slow at
    gpu: str = "torch"  # who moves device memory that neither torch nor CuPy owns
    per_thread: bool = False  # memory is to be lent on the per-thread default stream, which is another in every thread
    heard: bool = False  # the caller's np.errstate wants overflow told, of which torch's casts say nothing
    compiled: bool = False  # code compiled by torch.compile has called, which takes arrays for tensors of its own


HERE = Here()


class Step(NamedTuple):
    """One thing that is done. `nbytes` is 0 until the step is bound to an array.

    These move no byte: "detach" (an alias outside the graph), "wrap" (a scalar as a 0-d array), "import" (a foreign
    array, seen through its protocol), "restride" (strides that mean nothing made plain), "order" (one stream waits for
    another), "share" (the same memory under the other framework), "protect" (a read-only view). These write every
    element once: "export" (its producer has made or copied the array for us), "stack" (a list or a table into one
    array), "resolve" (lazy bits made real), "byteswap", "cast", "pack" (a layout that the other side can hold), "copy",
    "pin" (page-locked memory), "fill" (into `out`), "to_host", "to_device".
    """

    op: str  # one of those
    why: str
    nbytes: int = 0
    kind: str = ""  # "h2h", "h2d", "d2h", "d2d", "" when no byte moves
    after: Traits = Traits("numpy")  # the array that the step promises
    by: str = ""  # whose kernel moves the bytes, or by which road, where there is a choice
    cure: str = ""  # what avoids it

    @eager
    def __repr__(self) -> str:
        return f"<Step {self.op}: {bytes_text(self.nbytes)}{self.kind and f' {self.kind}'}, {self.why}>"


class Refusal(NamedTuple):
    error: type[Exception]
    why: str
    cure: str
    cast: str = ""  # the dtype of the copy that the cure makes


class Decision(NamedTuple):
    steps: tuple[Step, ...]
    refusal: Refusal | None = None


class Plan(NamedTuple):
    """What a conversion does, decided before it is done. `str` is a table for a person."""

    source: ArrayInfo
    target: Traits  # the kind of the result: framework, device, dtype, layout, whether it may be written
    steps: tuple[Step, ...]
    zero_copy: bool  # no byte moves (an empty array has none)
    bytes_moved: int  # by all steps together
    blocking: bool  # the host waits for a transfer

    @eager
    def __str__(self) -> str:
        result = self.target
        frozen = "" if result.writable else ", read-only"
        end = f"{bytes_text(self.bytes_moved)} moved" if not self.zero_copy else "zero copy"
        if self.blocking:
            end += "; the host waits for the transfer"
        head = f"{self.source}\n  -> {result.framework} {result.dtype} on {result.device}{frozen}: {end}"
        return "\n".join([head, *step_lines(self.steps)])

    @eager
    def __repr__(self) -> str:
        return str(self)  # what a person at a prompt, or in a notebook, wants to see


def step_lines(steps: tuple[Step, ...]) -> list[str]:
    """A table of steps: name, bytes, reason."""
    width = max((len(step.op) for step in steps), default=0)
    sizes = [bytes_text(step.nbytes) for step in steps]
    room = max(map(len, sizes), default=0)
    return [f"  {s.op:<{width}}  {n:>{room}}   {s.why}" for s, n in zip(steps, sizes, strict=True)]


def cure_of(moving: Sequence[Step]) -> str:
    """What avoids all of these steps; nothing, where there is one that nothing avoids."""
    cures = [step.cure for step in moving]
    return " and ".join(dict.fromkeys(cures)) if all(cures) else ""


def bytes_text(n: int) -> str:
    return f"{n:,}".replace(",", " ") + " B"


def named(text: str, source: ArrayInfo) -> str:
    """A reason or a cure with what only one array tells: the node of its graph, the axes that run backwards."""
    if "{" not in text:
        return text
    axes = [axis for axis, (n, s) in enumerate(zip(source.shape, source.strides, strict=True)) if n > 1 and s < 0]
    index = ", ".join("::-1" if axis in axes else ":" for axis in range(max(axes, default=-1) + 1))
    text = text.replace("{grad_fn}", f" ({source.grad_fn})" if source.grad_fn else "")
    return text.replace("{reversed}", f"x[{index}]")


def bind(steps: tuple[Step, ...], source: ArrayInfo, want: Want) -> Plan:
    """The steps with the sizes and names of one array."""
    count = math.prod(source.shape)
    bound = tuple(
        step._replace(
            nbytes=count * _dtypes.itemsize(step.after.dtype) if step.kind else 0,
            why=named(step.why, source),
            cure=named(step.cure, source),
        )
        for step in steps
    )
    moved = sum(step.nbytes for step in bound)
    blocking = any(_waits(step, source, want) for step in bound)
    return Plan(source, bound[-1].after, bound, moved == 0, moved, blocking)


def _waits(step: Step, source: ArrayInfo, want: Want) -> bool:
    """Whether the host waits for a transfer. Into `out`, only a whole block of page-locked memory is read behind it."""
    if step.kind != "h2d" or not want.non_blocking or step.by == RING:
        return step.kind in ("d2h", "h2d")
    out = step.after
    plain = out.spacing == "dense" and not (out.lazy or source.lazy)
    whole = plain and (source.dtype, source.order) == (out.dtype, out.order)
    return step.op == Op.FILL and not (source.pinned and whole)
