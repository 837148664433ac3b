"""Columns, tables and indexes of pandas, polars and pyarrow: seen as arrays where that moves no byte, else to be made.

An array holds what the column holds or there is none: nothing is promoted, no missing value becomes a number. Columns
that the library would have to copy are `Joined`: a step with bytes, which a plan shows and a guard can forbid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tensorbridge import _dtypes
from tensorbridge._adapters import _arrow, _missing, _strangers
from tensorbridge._adapters._arrow import Joined, Whole
from tensorbridge._adapters._numpy import stacked_as
from tensorbridge._adapters._python import are_cast, one_dtype
from tensorbridge._refuse import Obstacle
from tensorbridge._step import Want

_BESIDE = "its columns are joined into one array, row after row"
_CAST = "its columns, of several dtypes, are cast as they are joined into one array, row after row"
_SPARSE = "what a sparse column leaves out is filled in"
_MADE = "its library makes an array of it"


def stand_in(x: Any, want: Want) -> tuple[Any, Want]:
    """What stands for `x` in a conversion: a NumPy view of a column, a `Joined`; all that is no column, as it is. The
    wish is settled where it says what columns of several dtypes are cast to.

    A plain Arrow array speaks for itself, and so does the one chunk of a column.
    """
    where = _missing.library(x, "column")
    if where == "pyarrow":
        _refuse_scalar(x)
        only = x.chunk(0) if getattr(x, "num_chunks", 0) == 1 else x
        if not x.null_count and _arrow.is_plain(x.type) and not hasattr(only, "chunks"):
            return only, want
    if where:
        return _COLUMN[where](x), want
    if _missing.library(x, "table"):
        return _table(x, want)
    _strangers.refuse_unseen(x)
    _missing.refuse_nulls(x)
    return x, want


def kind_of(x: Any) -> str:
    """What the source is called in a plan, if it has to be made: a column, or all of a table."""
    return "table" if _missing.library(x, "table") else "column"


def is_scalar(x: Any) -> bool:
    """Whether `x` is one value of pyarrow: no array, though text of pyarrow speaks the buffer protocol."""
    return hasattr(type(x), "as_py") and _missing.library(x, "column") == "pyarrow"


def _table(x: Any, want: Want) -> tuple[Any, Want]:
    """A table of one dtype is a matrix. Of several, the one that it gets is for the caller to say."""
    if _missing.library(x, "table") == "pandas" and (plain := _plain_dtype(x)):
        a = _shared(x)
        return a if a is not None else Joined(x.shape, plain, lambda: np.array(x), _BESIDE), want
    parts, names = [], []
    for place, (name, column) in enumerate(_missing.named_columns(x)):
        try:
            parts.append(_COLUMN[_missing.library(column, "column")](column))
        except Obstacle as obstacle:
            obstacle.what = f"{type(x).__name__}, column {name!r}: {obstacle.what}"
            raise obstacle.cured(obstacle.refusal.cure + others_refused(x, place)) from None
        names.append(name)
    if not parts:
        raise Obstacle("empty list", type(x).__name__, "a table without columns has no dtype")
    kinds = {(part.dtype, part.shape[1:]): name for part, name in zip(reversed(parts), reversed(names), strict=True)}
    shape = (parts[0].shape[0], len(parts), *parts[0].shape[1:])
    alike = len({row for _, row in kinds}) == 1
    dtypes = {_dtypes.of_numpy(dtype).lstrip(">") for dtype, _ in kinds}
    becomes = set(map(want.gets, dtypes))
    if len(kinds) > 1 and alike and len(becomes) == 1 and are_cast(dtypes, wanted := min(becomes)):
        dtype: Any = _dtypes.DTYPES[wanted].numpy
        joined = Joined(shape, dtype, lambda: stacked_as([*map(_arrow.made, parts)], 1, dtype=dtype), _CAST)
        return joined, want._replace(dtype=want.dtype or (None if becomes == dtypes else wanted), casts=None)
    if len(kinds) > 1:
        gets = want.gets if len(becomes) > 1 else str  # one that all would get is not what is in the way
        said = sorted({f"{name!r} {_said(dtype, gets)}{list(row) or ''}" for (dtype, row), name in kinds.items()})
        detail = f"its columns have different dtypes: {', '.join(said[:4])}{', ...' * (len(said) > 4)}"
        one = f'say dtype="{one_dtype(dtypes, becomes)}"' if alike else "give them one shape and dtype first"
        cure = f"Convert every column by itself, tensorbridge.tree.to_{{framework}}(x), or {one}."
        raise Obstacle("container", type(x).__name__, detail).cured(cure)
    if not any(isinstance(part, Joined) for part in parts):
        a = _shared(x)
        if a is not None:
            return a, want
    join = lambda: np.stack([_arrow.made(part) for part in parts], axis=1)
    return Joined(shape, parts[0].dtype, join, _BESIDE), want


def _said(dtype: Any, gets: Callable[[str], str]) -> str:
    """The dtype of a column in words, or what it gets in place of its own."""
    name = _dtypes.of_numpy(dtype)
    becomes = gets(name.lstrip(">"))
    return f"is {dtype}" if becomes == name.lstrip(">") else f"becomes {becomes}"


_FEW = 4


def others_refused(x: Any, place: int) -> str:
    """The columns of a table, beside that at `place`, of which there are no arrays: a line of its error, or nothing."""
    found = []
    for i, (name, column) in enumerate(_missing.named_columns(x)):
        try:
            if i != place:
                _COLUMN[_missing.library(column, "column")](column)
        except Obstacle:
            count = _missing.count(column)
            said = _missing.shorten(column.type if hasattr(column, "type") else column.dtype)
            found.append(f"{name!r} ({said}{f', {count} missing value' * bool(count)}{'s' * (count > 1)})")
    more = f" and {len(found) - _FEW} more" * (len(found) > _FEW)
    return f"\nOther columns of this table that cannot be converted: {', '.join(found[:_FEW])}{more}." * bool(found)


def _plain_dtype(x: Any) -> Any:
    """The one dtype of a pandas table whose columns are NumPy's numbers, which says all; None of others."""
    kinds = set(x.dtypes)
    only = kinds.pop() if len(kinds) == 1 else None
    return only if isinstance(only, np.dtype) and _dtypes.of_numpy(only) else None


def _shared(x: Any) -> Any:
    """The memory of a column or table as NumPy sees it, None where its library would have to copy."""
    try:
        return x.__array__(copy=False)
    except (ValueError, RuntimeError):  # polars refuses to copy by the latter
        return None


# -- pyarrow


def _refuse_scalar(x: Any) -> None:
    if hasattr(x, "as_py"):
        detail = "one value of pyarrow is not an array"
        raise Obstacle("not an array", type(x).__name__, detail).cured("Convert x.as_py() if it is a number.")


def _of_pyarrow(x: Any) -> Any:
    return _arrow.column(x, Whole(x, "pyarrow", x.type))


# -- pandas


def _of_pandas(x: Any) -> Any:
    dtype, whole = x.dtype, Whole(x, "pandas", x.dtype)
    if isinstance(dtype, np.dtype) and _dtypes.of_numpy(dtype) and (a := _shared(x)) is not None:
        return a
    if hasattr(dtype, "pyarrow_dtype"):
        return _arrow.column(getattr(x, "array", x).__arrow_array__(), whole)
    empty = np.asarray(x[:0])
    kind = _pandas_kind(dtype, empty.dtype)
    if kind:
        whole.refuse_nulls(_missing.count(x), kind)
        raise whole.obstacle(kind)
    held = "codes" if hasattr(dtype, "categories") else "truth" if empty.dtype.kind == "b" else "number"
    whole.refuse_nulls(_missing.count(x), held)
    a = _shared(x)
    if a is not None:
        return a
    why = _arrow.DECODED if hasattr(dtype, "categories") else _SPARSE if hasattr(dtype, "fill_value") else _MADE
    return Joined((len(x),), empty.dtype, lambda: np.array(x), why)


def _pandas_kind(dtype: Any, made: Any) -> str:
    """What is in the way of a type that holds no numbers; `made` is the dtype of its array."""
    if dtype.kind in "mM" or hasattr(dtype, "freq"):  # periods count their unit too
        return "datetime"
    if _dtypes.of_numpy(made):
        return ""
    return "categories" if hasattr(dtype, "categories") else "string" if hasattr(dtype, "storage") else "object"


# -- polars


def _of_polars(x: Any) -> Any:
    whole = Whole(x, "polars", x.dtype)
    if x.null_count():
        whole.refuse_nulls(x.null_count(), _polars_held(x.dtype))
    return _polars_part(x, whole)


def _polars_part(x: Any, whole: Whole) -> Any:
    dtype = x.dtype
    if hasattr(dtype, "inner"):
        chunks = [chunk for chunk in x.get_chunks() if len(chunk)] or [x[:0]]
        return _arrow.joined([_polars_lists(chunk, whole) for chunk in chunks], whole)
    kind = _polars_kind(dtype)
    if kind:
        raise whole.obstacle(kind)
    a = _shared(x)
    if a is not None:
        return a
    why = _arrow.JOINED if str(dtype) != "Boolean" else _arrow.UNPACKED
    return Joined((len(x),), np.asarray(x[:0]).dtype, lambda: np.array(x), why)


def _polars_lists(x: Any, whole: Whole) -> Any:
    if hasattr(x.dtype, "shape"):
        length = x.dtype.shape[0]
    else:
        lengths = x.list.len()
        length = lengths.max() or 0
        if len(x) and lengths.min() != length:
            raise _arrow.ragged(whole, (lengths.min(), length))
    values = x.explode() if length else x[:0].explode()  # which makes nulls of empty lists
    held, inside = _polars_held(values.dtype), whole.inside(length)
    if held in _arrow.HELD:  # what else there is, is refused for itself
        filled = "" if held == "rows" else _polars_filled("x", whole.said, held == "truth")
        inside.refuse_inside(values.null_count(), filled)
    part = _polars_part(values, inside)
    return _arrow.shaped(part, len(x), length, *part.shape[1:])


def _polars_filled(x: str, dtype: Any, truth: bool) -> str:
    """The call that fills what is missing in `x`, or inside its lists, however deep."""
    if not hasattr(dtype, "inner"):
        return f"{x}.fill_null({False if truth else 0})"
    lists = f"{x}.arr.to_list().list" if hasattr(dtype, "shape") else f"{x}.list"
    return f"{lists}.eval({_polars_filled('polars.element()', dtype.inner, truth)})"


def _polars_held(dtype: Any) -> str:
    """What a column holds, as far as that decides how its nulls are filled."""
    if hasattr(dtype, "inner"):
        return "rows" if _polars_held(dtype.inner) in _arrow.HELD else "unknown dtype"
    held = {"Boolean": "truth", "Null": "nothing"}.get(str(dtype), "")
    return held or _polars_kind(dtype) or "number"


def _polars_kind(dtype: Any) -> str:
    """What is in the way of a type that holds no numbers."""
    if dtype.is_decimal():
        return "decimal"
    if str(dtype) in ("Int128", "UInt128"):
        return "wide"
    if dtype.is_numeric() or str(dtype) == "Boolean":
        return ""
    if dtype.is_temporal():
        return "datetime"
    found = {"String": "string", "Categorical": "categories", "Enum": "categories", "Struct": "structured"}
    return found.get(str(dtype).partition("(")[0], "unknown dtype")


_COLUMN = {"pyarrow": _of_pyarrow, "pandas": _of_pandas, "polars": _of_polars}


# -- Whoever else refuses to export


def cure(x: Any) -> str:
    """What helps a producer that refuses to export: a type that is not packed, not text, not dates."""
    example = ', as in x.cast("uint8")' if hasattr(type(x), "cast") else ""
    return f"Cast it to plain numbers with its own library first{example}."
