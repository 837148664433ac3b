"""Tables as trees of columns: of pandas, polars and pyarrow; ``.npz`` files; groups of arrays stored by h5py or zarr.

A row index is not a column, and the attributes of a group are none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tensorbridge._adapters import _missing
from tensorbridge._errors import UnsupportedArrayError

Open = Callable[[Any], tuple[list[Any], list[Any]]]


def opener(x: Any) -> Open | None:
    """How to open `x` into columns and their names, if it is a table."""
    found = _OPENED.get(_missing.library(x, "table"))
    if found is not None:
        return found
    if _missing.library(x, "group"):
        return _members
    return _npz_columns if isinstance(x, np.lib.npyio.NpzFile) else None


def is_one_batch(x: Any) -> bool:
    """Whether iterating `x` gives its keys, columns or letters, and so neither batches nor samples."""
    return isinstance(x, (Mapping, str, bytes)) or opener(x) is not None


def _arrow_columns(x: Any) -> tuple[list[Any], list[Any]]:
    return list(x.itercolumns()), _distinct(x, x.schema.names)


def _pandas_columns(x: Any) -> tuple[list[Any], list[Any]]:
    return [column for _, column in x.items()], _distinct(x, x.columns)


def _polars_columns(x: Any) -> tuple[list[Any], list[Any]]:
    return list(x.iter_columns()), list(x.columns)


def _npz_columns(x: Any) -> tuple[list[Any], list[Any]]:
    return [x[name] for name in x.files], list(x.files)


def _members(x: Any) -> tuple[list[Any], list[Any]]:
    names = list(x)
    members = [x[name] for name in names]
    above = _around(x)
    for name, member in zip(names, members, strict=True):
        if _missing.library(member, "group") and member in above:  # HDF5 may link a group into itself
            what = f"{type(x).__name__} {x.name!r} has itself, or what it is in, as {name!r}"
            raise UnsupportedArrayError(f"{what}.\n{_CYCLE}")
    return members, names


_CYCLE = "Convert its arrays one by one: a tree that contains itself has no end."


def _around(x: Any) -> list[Any]:
    """A group and all groups that it is in. (A file has no end of parents: its root is its own.)"""
    found = [x]
    while getattr(found[-1], "parent", None) is not None and found[-1].name != "/":
        found.append(found[-1].parent)
    return found


def _distinct(x: Any, names: Any) -> list[Any]:
    found = list(names)
    twice, times = next(iter(Counter(found).most_common(1)), ("", 0))
    if times > 1:
        raise UnsupportedArrayError(f"{type(x).__name__} has two columns named {twice!r}.\nRename one of them.")
    return found


_OPENED: dict[str, Open] = {"pyarrow": _arrow_columns, "pandas": _pandas_columns, "polars": _polars_columns}
