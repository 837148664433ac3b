"""Tables as trees of columns: pandas, polars and pyarrow tables, and ``.npz`` files. A row index is not a column.

A pyarrow column is a list of chunks: one is shared as it is, several become one array, which is a step with bytes.
Lists of one length are the rows of a matrix.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from tensorbridge import _adapters, _api, _dtypes
from tensorbridge._adapters import _columns, _numpy, _python
from tensorbridge._array import ArrayInfo, Traits, size_class
from tensorbridge._errors import UnsupportedArrayError
from tensorbridge._step import Step, Want

Open = Callable[[Any], tuple[list[Any], list[Any]]]


def opener(x: Any) -> Open | None:
    """How to open `x` into columns and their names, if it is a table."""
    for module, names, opened in (
        ("pyarrow", ("Table", "RecordBatch"), _arrow_columns),
        ("pandas", ("DataFrame",), _pandas_columns),
        ("polars", ("DataFrame",), _polars_columns),
    ):
        loaded = sys.modules.get(module)
        if loaded is not None and isinstance(x, tuple(getattr(loaded, name) for name in names)):
            return opened
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


def _distinct(x: Any, names: Any) -> list[Any]:
    found = list(names)
    twice = next((name for i, name in enumerate(found) if name in found[:i]), None)
    if twice is not None:
        raise UnsupportedArrayError(f"{type(x).__name__} has two columns named {twice!r}.\nRename one of them.")
    return found


# -- pyarrow columns


def leaf(x: Any) -> Any:
    """What stands for `x` in a conversion: a pyarrow column by its chunks, anything else as it is."""
    arrow = sys.modules.get("pyarrow")
    if arrow is None or not isinstance(x, (arrow.ChunkedArray, arrow.Array)):
        return x
    _columns.refuse_nulls(x)
    if isinstance(x, arrow.Array):
        return _part(arrow, x)
    if arrow.types.is_boolean(x.type):  # joined as bits, then unpacked once
        return _part(arrow, x.combine_chunks())
    parts = [_part(arrow, chunk) for chunk in x.chunks] or [_part(arrow, arrow.array([], x.type))]
    if len(parts) == 1:
        return parts[0]
    arrays = [part.join() if isinstance(part, Joined) else _api.to_numpy(part) for part in parts]
    shape = (sum(map(len, arrays)), *arrays[0].shape[1:])
    return Joined(shape, arrays[0].dtype, lambda: np.concatenate(arrays))


def _part(arrow: Any, chunk: Any) -> Any:
    """One chunk, as something that can be converted."""
    types = arrow.types
    if isinstance(chunk, arrow.ExtensionArray):
        ndarray = getattr(chunk, "to_numpy_ndarray", None)
        return _part(arrow, chunk.storage) if ndarray is None else ndarray()
    if types.is_boolean(chunk.type):
        return Joined((len(chunk),), np.dtype(bool), lambda: chunk.to_numpy(zero_copy_only=False))
    if types.is_fixed_size_list(chunk.type):
        return _rows(arrow, chunk, chunk.type.list_size)
    if types.is_list(chunk.type) or types.is_large_list(chunk.type):
        lengths = np.diff(_api.to_numpy(chunk.offsets))
        if len(lengths) and (lengths != lengths[0]).any():
            raise UnsupportedArrayError(
                f"{type(chunk).__name__} is ragged: its lists have {lengths.min()} to {lengths.max()} elements.\n"
                "Pad them to one length, or keep the column out of the tree."
            )
        return _rows(arrow, chunk, int(lengths[0]) if len(lengths) else 0)
    return chunk


def _rows(arrow: Any, lists: Any, length: int) -> Any:
    """Lists of one length: the values behind them, seen as a matrix."""
    values = lists.flatten()
    _columns.refuse_nulls(values)
    part = _part(arrow, values)
    if isinstance(part, Joined):
        shape = (len(lists), length, *part.shape[1:])
        return Joined(shape, part.dtype, lambda: part.join().reshape(shape))
    flat = _api.to_numpy(part)
    return flat.reshape(len(lists), length, *flat.shape[1:])


class Joined(NamedTuple):
    """An array that does not exist yet: chunks to be joined, bits to be unpacked."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    join: Callable[[], Any]

    def stacked(self, stack: object, dtype: Any) -> Any:
        """The array; the name and the arguments are those of a list that is stacked."""
        return self.join()


class _Adapter:
    """To the planner it is what a list of arrays is: one step with bytes."""

    def open(self, x: Joined, want: Want) -> tuple[Joined, Traits]:
        name = _dtypes.of_numpy(x.dtype)
        return x, Traits("numpy list", dtype=name, size=size_class(math.prod(x.shape) * x.dtype.itemsize))

    def describe(self, x: Joined, traits: Traits) -> ArrayInfo:
        return _python.describe(x, traits)

    def performer(self, step: Step, before: Traits, want: Want) -> Callable[..., Any]:
        return _numpy.performer(step, before, want)


_adapters._of_type[Joined] = _Adapter()
