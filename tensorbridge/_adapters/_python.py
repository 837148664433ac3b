"""Python: numbers are 0-d bool, int64, float64, complex128 arrays; lists of numbers or of equal arrays are stacked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from tensorbridge import _casting, _dtypes
from tensorbridge._adapters import _numbers, _numpy, adapter_of, is_scalar
from tensorbridge._array import CPU, MOST_AXES, ArrayInfo, Traits, c_strides, shape_text, size_class
from tensorbridge._errors import UnsupportedArrayError
from tensorbridge._refuse import Obstacle
from tensorbridge._step import Step, Want


class Parts(NamedTuple):
    """A list to stack: `numbers` as it came, or the arrays in it and the shape of the lists around them."""

    shape: tuple[int, ...]
    arrays: list[Any] | None
    numbers: Sequence[Any]

    def stacked(self, stack: Callable[..., Any], dtype: Any = None) -> Any:
        if self.arrays is None:
            return np.array(self.numbers, dtype=dtype)
        arrays, kinds = self.arrays, set(map(type, self.arrays))
        if any(hasattr(kind, "stacked") for kind in kinds):  # columns: to be made
            arrays = [a.stacked(stack, None) if hasattr(a, "stacked") else a for a in arrays]
        if any(issubclass(kind, np.ndarray) and kind is not np.ndarray for kind in kinds):
            arrays = [np.asarray(a) for a in arrays]  # np.stack of np.matrix writes beyond its memory
        whole = stack(arrays) if dtype is None else stack(arrays, dtype=dtype)
        return whole.reshape(self.shape)


def open(x: Any, want: Want) -> tuple[Any, Traits, Want]:
    if not isinstance(x, (list, tuple)):
        return _scalar(x, want)
    if hasattr(x, "_fields"):
        raise Obstacle("container", f"namedtuple {type(x).__name__}")
    outer, leaves, kinds = _unfolded(x)
    if all(is_scalar(kind) for kind in kinds):
        dtype, want = _numbers.made_as(leaves, kinds, want, outer)
        size = size_class(math.prod(outer) * _dtypes.itemsize(dtype))
        return Parts(outer, None, x), Traits("numpy list", dtype=dtype, size=size), want
    return _arrays(outer, leaves, want)


def _scalar(x: Any, want: Want) -> tuple[Any, Traits, Want]:
    if isinstance(x, np.generic):
        dtype = _numpy.traits(np.asarray(x)).dtype.lstrip(">")
        return x, Traits("python scalar", dtype=dtype), want.settled(dtype)
    base = _numbers.base_of(x)
    dtype, want = _numbers.made_as([base(x)], {base}, want, ())
    return x, Traits("python scalar", dtype=dtype), want


def _unfolded(x: Any) -> tuple[tuple[int, ...], Sequence[Any], set[type]]:
    """How lists nest in lists, which must be even; what is in the innermost, in a row; the types of that."""
    shape: list[int] = []
    level: Sequence[Any] = [x]
    above: set[int] = set()
    kinds = {type(x)}
    while level and all(map(_is_list, kinds)):
        here = set(map(id, level))
        if here & above:
            raise UnsupportedArrayError("a list that contains itself has no shape.\nBreak the cycle.")
        above |= here
        lengths = {len(part) for part in level}
        if len(lengths) > 1:
            raise _ragged(x, (f"({n},)" for n in sorted(lengths)))
        shape.append(lengths.pop())
        level = level[0] if len(level) == 1 else list(chain.from_iterable(level))
        kinds = set(map(type, level))
        _check_axes(len(shape))
    if any(map(_is_list, kinds)):
        raise Obstacle("ragged", f"list of {len(x)}", "some of its parts are lists and some are not")
    return tuple(shape), level, kinds


def _is_list(cls: type) -> bool:
    """A namedtuple is no list of equals: its fields have meanings of their own."""
    return issubclass(cls, (list, tuple)) and not hasattr(cls, "_fields")


def _check_axes(count: int) -> None:
    if count > MOST_AXES:
        raise UnsupportedArrayError(
            f"a list that becomes one array of {count} axes or more: NumPy has at most {MOST_AXES}.\n"
            "Flatten its parts first."
        )


def _arrays(outer: tuple[int, ...], leaves: Sequence[Any], want: Want) -> tuple[Parts, Traits, Want]:
    what = f"list of {len(leaves)}"
    handles: list[Any] = []
    kinds: list[tuple[Traits, ArrayInfo]] = []  # of all parts but those that are like the first
    becomes: set[str] = set()  # the dtypes that they get
    alike: Callable[[Sequence[Any]], bool] | None = None
    for place, leaf in enumerate(leaves):
        if alike is not None and alike([leaf]):
            handles.append(leaf)
            continue
        try:
            if leaf is None:
                raise Obstacle("missing number", "None")
            adapter = adapter_of(type(leaf))
            handle, found, settled = adapter.open(leaf, want._replace(copy=None))
        except Obstacle as obstacle:
            obstacle.what = f"{what}, item {_numbers.index_of(place, outer)}: {obstacle.what}"
            raise
        handles.append(handle)
        kinds.append((found, adapter.describe(handle, found)))
        becomes.add(settled.gets(found.dtype.lstrip(">")))
        if not place and hasattr(adapter, "like"):
            alike = adapter.like(leaf)
            if alike is not None and alike(leaves):  # all at once, which is quicker, and how most lists are
                handles = list(leaves)
                break
    shapes = {info.shape for _, info in kinds}
    if any(found.framework == "python scalar" for found, _ in kinds):
        detail = "it holds both numbers and arrays"
        if len(shapes) > 1:
            raise Obstacle("ragged", what, f"{detail}, of different shapes: {_first(map(shape_text, sorted(shapes)))}")
        raise Obstacle("mixed list", what, detail).cured(_one_by_one(kinds, becomes, want, len(outer)))
    if len(shapes) > 1:
        raise _ragged(leaves, map(shape_text, sorted(shapes)))
    dtypes = _dtypes_of(kinds)
    mixed = len(dtypes) > 1 and len(becomes) == 1 and _are_cast_at_once(kinds, min(becomes))
    for name, values in (
        ("frameworks", _holders(kinds)),
        ("devices", {t.device for t, _ in kinds}),
        ("dtypes", dtypes if len(dtypes) > 1 else becomes),
    ):
        if len(values) > 1 and not (name == "dtypes" and mixed):
            detail = f"its parts have different {name}: {', '.join(sorted(values))}"
            raise Obstacle("mixed list", what, detail).cured(_one_by_one(kinds, becomes, want, len(outer)))
    first = kinds[0][0]
    if first.device != CPU and first.framework not in ("torch", "cupy"):
        raise Obstacle("mixed list", what, "device arrays of other libraries are not stacked")
    shape = outer + kinds[0][1].shape
    _check_axes(0 if first.framework == "torch" else len(shape))
    dtype = min(becomes if mixed else dtypes)
    found = Traits(
        f"{_holder(first)} list",
        first.device,
        dtype,
        "C" if all(t.order == "C" for t, _ in kinds) else "K",  # else the framework's choice
        graph=any(t.graph for t, _ in kinds),
        size=size_class(math.prod(shape) * _dtypes.itemsize(dtype), len(shape)),
        origin=f", which casts its parts, of several dtypes, to {dtype}" if mixed else "",
    )
    if want.casts is not None:  # each part has been settled
        want = want._replace(dtype=None if becomes == dtypes else min(becomes), casts=None)
    return Parts(shape, handles, ()), found, want


def _holder(part: Traits) -> str:
    """Who stacks it."""
    return part.framework if part.framework in ("torch", "cupy") else "numpy"


def _holders(kinds: list[tuple[Traits, ArrayInfo]]) -> set[str]:
    return {_holder(t) for t, _ in kinds}


def _dtypes_of(kinds: list[tuple[Traits, ArrayInfo]]) -> set[str]:
    return {t.dtype.lstrip(">") for t, _ in kinds}


def _are_cast_at_once(kinds: list[tuple[Traits, ArrayInfo]], wanted: str) -> bool:
    """Whether parts of several dtypes are written into one array of `wanted`, each element once.

    In a graph every such write would be a node that keeps all of the array; elsewhere `copy_` casts too few dtypes.
    """
    holders = _holders(kinds)
    plain = not any(t.graph or t.device.is_other for t, _ in kinds)
    return len(holders) == 1 and "cupy" not in holders and plain and are_cast(_dtypes_of(kinds), wanted, min(holders))


def are_cast(dtypes: Iterable[str], wanted: str, framework: str = "numpy") -> bool:
    """Whether arrays of these dtypes become one of the `wanted`."""
    return all(
        _dtypes.can_cast(framework, dtype, wanted) and (_dtypes.is_complex(wanted) or not _dtypes.is_complex(dtype))
        for dtype in dtypes
    )


def one_dtype(dtypes: set[str], becomes: set[str], framework: str = "numpy", sides: Iterable[str] = ("numpy",)) -> str:
    """The dtype to ask for where there are several: for what they are to become, if one of `sides` can cast to that."""
    found = min(becomes) if len(becomes) == 1 else _common(becomes, framework)
    return found if any(are_cast(dtypes, found, side) for side in sides) else _common(dtypes, framework)


def _common(dtypes: set[str], framework: str) -> str:
    """The dtype that NumPy would give what has several; where it knows none, or `framework` has not got it, one that
    holds most numbers.
    """
    with suppress(TypeError):
        kinds = [_dtypes.DTYPES[dtype].numpy or np.dtype("complex64") for dtype in dtypes]  # NumPy lacks complex32
        found = _dtypes.of_numpy(np.result_type(*kinds))
        if _dtypes.exists_in(found, framework):
            return found
    return "complex128" if any(map(_dtypes.is_complex, dtypes)) else "float64"


def _one_by_one(kinds: list[tuple[Traits, ArrayInfo]], becomes: set[str], want: Want, depth: int) -> str:
    """What helps arrays of several kinds, so many lists deep: to bring each to one framework, device and dtype."""
    dtypes, devices = _dtypes_of(kinds), {t.device for t, _ in kinds}
    wanted = one_dtype(dtypes, becomes, want.framework, {*_holders(kinds), want.framework})
    numbers = any(t.framework == "python scalar" for t, _ in kinds)
    if len(devices) == 1 and not numbers and _are_cast_at_once(kinds, wanted):
        return f'Say dtype="{wanted}".'
    via = "to_{framework}" if len(devices) == 1 else "to_numpy"
    made = f"{via}(part)" if {wanted} == dtypes else f'{via}(part, dtype="{wanted}")'
    names = ["part", "row", *(f"rows{n or ''}" for n in range(depth))][:depth]
    for name, around in zip(names, [*names[1:], "x"], strict=True):
        made = f"[{made} for {name} in {around}]"
    return f"Bring them to one first: to_{{framework}}({made})."


def _ragged(parts: Sequence[Any], shapes: Any) -> Obstacle:
    return Obstacle("ragged", f"list of {len(parts)}", f"its parts have different shapes: {_first(shapes)}")


def _first(named: Iterable[str]) -> str:
    """A few of them, in a row."""
    found = list(named)
    return ", ".join(found[:4]) + ", ..." * (len(found) > 4)


def describe(handle: Any, traits: Traits) -> ArrayInfo:
    """A number, or an array that does not exist yet: C order is what it will have."""
    shape = getattr(handle, "shape", ())
    itemsize = _dtypes.itemsize(traits.dtype)
    return ArrayInfo(
        traits.framework,
        traits.device,
        traits.dtype,
        shape,
        c_strides(shape, itemsize),
        math.prod(shape) * itemsize,
        "C",
        True,
        traits.graph,
        None,
        "",
        None,
        None,
    )


def performer(step: Step, before: Traits, want: Want) -> Callable[[Any], Any]:
    dtype, wanted = _dtypes.DTYPES[before.dtype].numpy, _dtypes.DTYPES[step.after.dtype].numpy
    cast = _casting.with_warnings(lambda a: a.astype(wanted, copy=False), before.dtype, step.after.dtype)
    return lambda x: cast(np.array(x, dtype=dtype))
