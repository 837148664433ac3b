"""Columns, tables and indexes of other libraries: what their arrays would not say of them.

Known by what they can do, not by name: pyarrow, polars and pandas each count missing values in their own way. As arrays
they come as NaN where the library may turn integers into floats for it, and as zeros where it may not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tensorbridge._errors import UnsupportedArrayError


def refuse_nulls(x: Any) -> None:
    """Raise if `x` counts values as missing that an array could only hold as numbers. NaN is a number."""
    if not (hasattr(x, "null_count") or hasattr(x, "isna") or hasattr(x, "itercolumns")):
        return
    for name, column in _columns(x):
        count = _missing(column)
        if count:
            raise UnsupportedArrayError(
                f"{type(x).__name__} cannot be converted: {f'its column {name!r}' if name else 'it'} has {count} "
                f"missing value{'s' * (count > 1)}, for which arrays have no sign.\n{_FILL[hasattr(column, 'isna')]}"
            )


_FILL = {
    True: "Fill or drop them first: x.fillna(0), x.dropna().",
    False: "Fill or drop them first: x.fill_null(0), x.drop_null() or x.drop_nulls().",
}


def _columns(x: Any) -> Iterator[tuple[str, Any]]:
    if hasattr(x, "itercolumns"):  # pyarrow
        yield from zip(x.column_names, x.itercolumns(), strict=True)
    elif hasattr(x, "iter_columns"):  # polars
        yield from ((column.name, column) for column in x.iter_columns())
    elif hasattr(x, "items") and hasattr(x, "columns"):  # pandas
        yield from ((str(name), column) for name, column in x.items())
    else:
        yield "", x


def _missing(column: Any) -> int:
    """How many values are missing by another sign than NaN."""
    count = getattr(column, "null_count", None)
    count = count() if callable(count) else count
    if isinstance(count, int):
        parts = None if count else _parts(column)
        return count if parts is None else _missing(parts)
    dtype = getattr(column, "dtype", None)
    if not hasattr(column, "isna") or dtype is None or isinstance(dtype, np.dtype):
        return 0
    if isinstance(getattr(dtype, "na_value", None), float) and dtype.kind == "f":  # sparse floats: NaN is a value
        return 0
    return int(column.isna().sum())


def _parts(column: Any) -> Any:
    """What the rows of a nested column are made of: its own count says nothing of them."""
    if hasattr(getattr(column, "dtype", None), "inner"):  # polars Array
        return column.explode()
    storage: Any = getattr(column, "storage", None)  # pyarrow extension types: fixed-shape tensors
    return storage.flatten() if hasattr(storage, "flatten") and hasattr(storage, "null_count") else None


def is_index(x: Any) -> bool:
    """Whether `x` is the labels of a table: hashed, so that nobody may write to them, yet NumPy gets them writable."""
    return hasattr(type(x), "get_indexer")


def cure(x: Any) -> str:
    """What helps a producer that refuses to export: a type that is not packed, not text, not dates."""
    example = ', as in x.cast("uint8")' if hasattr(x, "cast") else ""
    return f"Cast it to plain numbers with its own library first{example}."
