"""Python's numbers: no memory yet, so each becomes an element of the dtype asked for, or is refused; it never wraps.

NumPy's numbers are 0-d arrays in all but name: they are cast as arrays are.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from typing import Any

import numpy as np

from tensorbridge import _dtypes
from tensorbridge._dtypes import BOUNDS, OF_PYTHON
from tensorbridge._refuse import Obstacle
from tensorbridge._step import Want

_INT64 = BOUNDS["int64"]


def base_of(number: Any) -> type:
    """Which of Python's numbers this is, an enum for one."""
    return next(cls for cls in OF_PYTHON if isinstance(number, cls))


def made_as(numbers: Sequence[Any], kinds: set[type], want: Want, outer: tuple[int, ...]) -> tuple[str, Want]:
    """The dtype in which numbers of these types are made: their own, or the one asked for where only that holds them.

    `outer` is the shape of the lists around them: () for one number. With it the settled wish.
    """
    whole = kinds <= {int, bool}
    dtypes = {np.dtype(OF_PYTHON[kind]) for kind in kinds if kind in OF_PYTHON}
    if len(dtypes) < len(kinds):
        dtypes |= {np.asarray(x).dtype for x in numbers if type(x) not in OF_PYTHON}
    found = np.result_type(*dtypes) if dtypes else np.dtype("float64")
    want = want.settled(_dtypes.of_numpy(found))
    asked = BOUNDS.get(want.dtype or "")
    if asked is not None and found.kind != "c":  # of complex numbers the imaginary part is in the way first
        own = numbers if kinds <= OF_PYTHON.keys() else [x for x in numbers if _is_python(x)]
        if own and not (_between(own, asked) if whole else _fit(own, asked)):
            raise _out_of_bounds(numbers, own, asked, want, outer)
        exact = own is numbers or _fit(numbers, asked)  # else NumPy's numbers are cast as an array is: they wrap
        if own and exact and (whole or len(dtypes) > 1):  # at once: in between, an int beside floats is rounded
            return str(want.dtype), want
    elif int in kinds and not _between(numbers if whole else [x for x in numbers if type(x) is int], _INT64):
        if want.dtype is None or not _fit_floats(numbers):
            raise _too_big(numbers, kinds, want, outer)
        found = np.result_type(found, np.float64)
    if want.dtype is None and found.kind in "fc":
        ints = {kind for kind in kinds if issubclass(kind, (int, np.integer)) and kind is not bool}
        place = next((i for i, x in enumerate(numbers) if type(x) in ints and _is_rounded(x)), None) if ints else None
        if place is not None:
            why = f"as {found}, which it is beside others, it would be {int(float(numbers[place]))}"
            raise Obstacle("big integer", _what(numbers, place, outer), why).cured(f'Say dtype="{found}".')
    name = _dtypes.of_numpy(found)
    if not name:
        obstacle = Obstacle("datetime" if found.kind in "mM" else "unknown dtype", f"list of {len(numbers)} values")
        raise obstacle.cured(obstacle.refusal.cure.replace("x.view", "np.asarray(x).view"))
    return name.lstrip(">"), want


_EXACT = 2**53  # up to here float64 holds every int


def _is_rounded(x: Any) -> bool:
    """Whether this is an int that float64 does not hold."""
    return isinstance(x, (int, np.integer)) and not -_EXACT <= x <= _EXACT and int(x) != float(x)


def _is_python(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, np.generic)


def _fits(x: Any, bounds: tuple[int, int]) -> bool:
    """Whether it does, a float without its fraction. Python compares ints and floats exactly."""
    return bool(bounds[0] - 1 < x < bounds[1] + 1)


def _between(numbers: Sequence[Any], bounds: tuple[int, int]) -> bool:
    return _fits(min(numbers), bounds) and _fits(max(numbers), bounds)


def _fit(numbers: Sequence[Any], bounds: tuple[int, int]) -> bool:
    """Whether all do. A nan hides from min and max unless it is the first."""
    return _between(numbers, bounds) and not any(map(isnan, numbers))


def _fit_floats(numbers: Sequence[Any]) -> bool:
    try:
        return all(float(x) is not None for x in numbers if isinstance(x, int))
    except OverflowError:
        return False


def _out_of_bounds(
    numbers: Sequence[Any], own: Sequence[Any], asked: tuple[int, int], want: Want, outer: tuple[int, ...]
) -> Obstacle:
    place = next(i for i, x in enumerate(numbers) if _is_python(x) and not _fits(x, asked))
    why = f"it does not fit {want.dtype}, which holds {asked[0]} to {asked[1]}"
    kinds = ("uint", "int") if str(want.dtype).startswith("u") else ("int", "uint")
    names = [kind + size for size in ("8", "16", "32", "64") for kind in kinds]
    cure = next((name for name in names if _fit(own, BOUNDS[name])), "float64")
    return Obstacle("big integer", _what(numbers, place, outer), why).cured(_say(cure, numbers, want))


def _too_big(numbers: Sequence[Any], kinds: set[type], want: Want, outer: tuple[int, ...]) -> Obstacle:
    place = next(i for i, x in enumerate(numbers) if type(x) is int and not _fits(x, _INT64))
    fit = kinds <= {int, bool} and _fit(numbers, BOUNDS["uint64"])
    cure = "uint64" if fit else "complex128" if any(issubclass(kind, complex) for kind in kinds) else "float64"
    return Obstacle("big integer", _what(numbers, place, outer)).cured(_say(cure, numbers, want))


def _say(name: str, numbers: Sequence[Any], want: Want) -> str:
    if not _fit_floats(numbers):
        return "No element type holds it: scale it down first."
    return f'Say dtype="{name}".' if want.out is None else f'Give an out of dtype "{name}".'


def _what(numbers: Sequence[Any], place: int, outer: tuple[int, ...]) -> str:
    x = numbers[place].item() if isinstance(numbers[place], np.generic) else numbers[place]
    cls = base_of(x)
    long = cls is int and x.bit_length() > 64
    said = f"int of {x.bit_length()} bits" if long else str(cls(x))
    if outer:
        return f"list of {len(numbers)} numbers, item {index_of(place, outer)}: {said}"
    return f"Python {said}" if long else f"Python {cls.__name__} {said}"


def index_of(place: int, outer: tuple[int, ...]) -> str:
    """Where a leaf is, as one would index it: ``[0][2]``."""
    path = []
    for length in reversed(outer):
        place, here = divmod(place, length)
        path.append(f"[{here}]")
    return "".join(reversed(path))
