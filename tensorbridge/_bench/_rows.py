"""Questions as data: what is asked, and the rows that answer it. A row builds its arrays when its turn comes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from tensorbridge._array import HUGE

KIB, MIB, GIB = 1024, 1024**2, 1024**3


# What the result is, and so what is asserted about it.
SHARED = "shared"  # no byte moved
FRESH = "fresh"  # memory new to the process
REUSED = "reused"  # results are dropped at once, so the allocator gives the same memory again
WARM = "warm"  # written over memory in use
PINNED = "pinned"  # written over page-locked memory in use
POOL = "pool"  # device memory, from the framework's pool
NONE = ""  # there is no result to speak of


class WrongResult(Exception):
    """What was timed is not what the row says: a value differs, or a copy is no copy, or sharing shares nothing."""


class Unavailable(Exception):
    """A row that cannot be measured here, with the reason that the report prints."""


class Way(NamedTuple):
    """One way of doing it."""

    name: str
    code: str  # an expression, timed as it stands here
    # "bridge" (ours), "baseline" (what people use), "limit" (what the machine can do), "promises" (what one line can do
    # that keeps ours, written by hand for this row alone)
    role: str = "baseline"
    state: str = SHARED
    sample: Callable[[], int] | None = None  # a measurement of its own, in ns, where a line in this process will not do
    before: Callable[[], Any] | None = None  # called ahead of each round, outside the time
    unlike: str = ""  # what it does, or leaves out, that we do not: where it is faster, this stands in our way


class Goal(NamedTuple):
    """A claim about one of our ways, and who it is measured against: the fastest of these ways, or the slowest."""

    name: str
    against: tuple[str, ...]
    sense: str  # "cost": ours / theirs at most bound. "speed": theirs / ours at least. "extra": ours - theirs, ns
    bound: float
    stretch: float | None = None
    way: str = "tensorbridge"
    slowest: bool = False


class Case(NamedTuple):
    """What one row times."""

    ways: tuple[Way, ...]
    names: dict[str, Any]  # what the code sees
    check: Callable[[Way, Any], None]
    nbytes: int = 0  # bytes of the elements that one call deals with; 0: no rate is given
    goals: tuple[Goal, ...] = ()
    sync: Callable[[], Any] | None = None  # called before and after each round, inside the time
    around: Callable[[], AbstractContextManager[Any]] = nullcontext  # holds while the case is timed


class Scope(NamedTuple):
    """How much is asked."""

    quick: bool = False


class Row(NamedTuple):
    title: str
    build: Callable[[], Case]
    needs: int = 0  # bytes of free host memory


class Question(NamedTuple):
    name: str  # as in the goals: "A1"; a name of its own where there is no goal
    title: str
    about: str  # what a reader has to know to read the table
    rows: Callable[[Scope], list[Row]]
    device: str = "cpu"
    once: bool = False  # what it measures happens once in a process
    last: bool = False  # it changes the process, so all others come before it


# Never slower than this share of the speed of the better of NumPy and torch, on any row.
FLOOR = 0.95


# What stands in the way of a small call.
UNASKED, SEE = "it asks nothing first", ": see `promises`"
UNDECIDED = "it decides nothing: ours asks what the arrays are, and looks the decision up (docs/cost.md)"


def threads(nbytes: int, *, cast: bool = False) -> str:
    """What torch's plain copy of so many bytes, or its cast, does that ours does not."""
    ours = nbytes <= 32 * KIB or (nbytes >= HUGE and not cast)
    return "" if ours else "it starts threads, which wait for any core that is busy (docs/cost.md)"


def floor(*against: str, way: str = "tensorbridge") -> Goal:
    return Goal("floor", against, "speed", FLOOR, way=way)


def expect(holds: object, what: str) -> None:
    if not holds:
        raise WrongResult(what)


def bytes_name(nbytes: float) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.4g} {name}"
    return f"{nbytes:.0f} B"


def random_array(dtype: str, *shape: int) -> Any:
    """Random elements of any dtype that NumPy or ml_dtypes names; the same ones every time."""
    import numpy as np

    from tensorbridge import _dtypes

    rng = np.random.default_rng(7)
    wanted: Any = _dtypes.DTYPES[dtype].numpy
    if wanted.kind == "b":
        return rng.integers(0, 2, shape, dtype=np.uint8).view(np.bool_)
    if wanted.kind in "iu":
        return rng.integers(0, 100, shape, dtype=wanted)
    if wanted in (np.dtype("float32"), np.dtype("float64")):
        return rng.random(shape, dtype=wanted.type)
    return rng.random(shape, dtype=np.float32).astype(wanted)


def result_is(source: Any, values: Any = None) -> Callable[[Way, Any], None]:
    """A check for conversions on the host: the values of `values` (default: of `source`), shared as the way says."""

    def check(way: Way, result: Any) -> None:
        import tensorbridge as tb

        expect(tb.shares_memory(result, source) == (way.state == SHARED), f"{way.name} ({way.code}): not {way.state}")
        expect(same_values(result, source if values is None else values), f"{way.name} ({way.code}): other values")

    return check


def same_values(a: Any, b: Any) -> bool:
    """Elementwise, bit for bit, dtype included; read by the frameworks themselves, not by what is being measured."""
    if (dtype_name(a), tuple(a.shape)) != (dtype_name(b), tuple(b.shape)):
        return False
    a, b = _bytes(a), _bytes(b)
    return all(bool((a[i : i + _AT_ONCE] == b[i : i + _AT_ONCE]).all()) for i in range(0, a.size, _AT_ONCE))


_AT_ONCE = 64 * MIB


def dtype_name(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")


def _bytes(x: Any) -> Any:
    import numpy as np

    if hasattr(x, "detach"):
        torch = sys.modules["torch"]
        return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(x if isinstance(x, np.ndarray) else x.get()).reshape(-1).view(np.uint8)
