"""Arrow columns, and what stands for the columns that are not arrays yet: chunks, bits, categories, lists of lists.

A column is a list of chunks: one is shared as it is, several become one array, which is a step with bytes. Lists of one
length are the rows of a matrix. Nothing is joined, unpacked or decoded before a conversion performs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tensorbridge._adapters import _missing
from tensorbridge._array import shape_text


class Joined(NamedTuple):
    """An array that does not exist yet. To the planner it is what a list of arrays is: one step with bytes.

    `join` makes it in memory that is nobody else's; `why` is what is done by that, in words for the plan.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    join: Callable[[], Any]
    why: str

    def stacked(self, stack: object, dtype: Any) -> Any:
        """The array; the name and the arguments are those of a list that is stacked."""
        return self.join()


JOINED = "its chunks are joined into one array"
UNPACKED = "its booleans, which are single bits, are unpacked"
DECODED = "its categories are decoded: an array holds what they stand for"
_TRUTHS = "its booleans, which are bytes of any value, are made True or False"


def made(part: Any) -> Any:
    return part.join() if isinstance(part, Joined) else part


class Whole(NamedTuple):
    """The column that a part belongs to: what errors name, and the library whose calls cure it."""

    x: Any
    library: str
    said: object
    nested: bool = False  # it is about what is inside its rows
    lengths: tuple[int, ...] = ()  # of the lists that this is inside of

    def obstacle(self, kind: str, detail: str = "") -> Exception:
        return _missing.obstacle(self.x, self.library, kind, self.said, detail, nested=self.nested)

    def inside(self, *lengths: int) -> Whole:
        return self._replace(nested=True, lengths=self.lengths + lengths)

    def refuse_nulls(self, count: int, kind: str) -> None:
        """`kind` is what the column holds, as far as it says how to fill it."""
        if count:
            _missing.refuse_count(self.x, count, _missing.cure_of_nulls(self.x, self.library, kind, self.said))

    def refuse_inside(self, count: int, filled: str) -> None:
        """`filled` is the call that fills what is missing inside rows; without one, these rows can be left out."""
        if count:
            cure = f"Fill them first: {filled}." if filled else _missing.cure_of_rows(self.library, len(self.lengths))
            _missing.refuse_count(self.x, count, cure, inside=True)


def column(x: Any, whole: Whole) -> Any:
    """A view of an Arrow array, or the array to be made of it; whatever is in the way is said of `whole`."""
    arrow = sys.modules["pyarrow"]
    if x.null_count:
        whole.refuse_nulls(x.null_count, _held(arrow, x.type))
    if not isinstance(x, arrow.ChunkedArray):
        return _part(arrow, x, whole)
    if arrow.types.is_boolean(x.type):  # joined as bits, then unpacked once
        return _bits(x, x.combine_chunks)
    chunks = [chunk for chunk in x.chunks if len(chunk)] or [arrow.nulls(0, x.type)]
    return joined([_part(arrow, chunk, whole) for chunk in chunks], whole)


def joined(parts: list[Any], whole: Whole) -> Any:
    if len(parts) == 1:
        return parts[0]
    rows = sorted({part.shape[1:] for part in parts})
    if len(rows) > 1 and len(rows[0]) == 1:
        raise ragged(whole, [length for (length,) in rows])
    if len(rows) > 1:
        shapes = ", ".join(map(shape_text, rows[:4]))
        raise whole.obstacle("ragged", f"it is ragged: its rows have different shapes: {shapes}")
    shape = (sum(part.shape[0] for part in parts), *rows[0])
    return Joined(shape, parts[0].dtype, lambda: np.concatenate([made(part) for part in parts]), JOINED)


def ragged(whole: Whole, lengths: Any) -> Exception:
    return whole.obstacle("ragged", f"it is ragged: its lists have {min(lengths)} to {max(lengths)} elements")


def shaped(part: Any, *shape: int) -> Any:
    """The same elements in this shape."""
    if isinstance(part, Joined):
        return Joined(shape, part.dtype, lambda: part.join().reshape(shape), part.why)
    return part.reshape(shape)


def is_plain(kind: Any) -> bool:
    """Whether elements of this Arrow type lie in memory as they do in an array."""
    types = sys.modules["pyarrow"].types
    return bool(types.is_integer(kind) or types.is_floating(kind))


def _part(arrow: Any, chunk: Any, whole: Whole) -> Any:
    kind, types = chunk.type, arrow.types
    if isinstance(kind, arrow.BaseExtensionType):
        return _extension(arrow, chunk, whole)
    if is_plain(kind):
        return chunk.to_numpy(zero_copy_only=True)
    if types.is_boolean(kind):
        return _bits(chunk, lambda: chunk)
    if types.is_dictionary(kind) and (is_plain(kind.value_type) or types.is_boolean(kind.value_type)):
        if chunk.dictionary.null_count:
            fill = _fill(arrow, whole, kind) if whole.nested else _missing.filled(whole.library, _held(arrow, kind))
            whole.refuse_inside(chunk.dictionary.null_count, fill)
        values, codes = _part(arrow, chunk.dictionary, whole), chunk.indices.to_numpy(zero_copy_only=True)
        return Joined((len(chunk),), values.dtype, lambda: made(values)[codes], DECODED)
    if _is_list(types, kind):
        return _lists(arrow, chunk, whole)
    raise whole.obstacle(_kind(types, kind))


def _bits(x: Any, bits: Callable[[], Any]) -> Joined:
    return Joined((len(x),), np.dtype(bool), lambda: bits().to_numpy(zero_copy_only=False), UNPACKED)


def _is_list(types: Any, kind: Any) -> bool:
    return bool(types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind))


def _lists(arrow: Any, lists: Any, whole: Whole) -> Any:
    if arrow.types.is_fixed_size_list(lists.type):
        length = lists.type.list_size
    else:
        lengths = np.diff(lists.offsets.to_numpy())
        if len(lengths) and (lengths != lengths[0]).any():
            raise ragged(whole, lengths)
        length = int(lengths[0]) if len(lengths) else 0
    values, inside = lists.flatten(), whole.inside(length)
    if values.null_count and _held(arrow, values.type) in HELD:  # what else there is, is refused for itself
        inside.refuse_inside(values.null_count, _fill(arrow, inside, values.type))
    part = _part(arrow, values, inside)
    return shaped(part, len(lists), length, *part.shape[1:])


def _fill(arrow: Any, whole: Whole, leaf: Any) -> str:
    """The call that fills what is missing inside lists: their elements in a row are filled, and put back into rows.

    Nothing for rows, and for what an extension type inside lists hides from the call that flattens them.
    """
    types, pandas = arrow.types, whole.library == "pandas"
    outer: Any = getattr(whole.said, "pyarrow_dtype", whole.said)
    stored = flat = getattr(outer, "storage_type", outer)
    while _is_list(types, flat):
        flat = flat.value_type
    if flat != leaf or isinstance(leaf, arrow.BaseExtensionType):
        return ""
    lists = "pyarrow.array(x)" if pandas else "x"
    if stored is not outer:
        lists += f".cast(x.{'dtype.pyarrow_dtype' if pandas else 'type'}.storage_type)"
    value = leaf.value_type if types.is_dictionary(leaf) else leaf
    decoded = f'.cast("{value}")' * (value is not leaf)
    zero = "0" if is_plain(value) else "False"
    filled = f"pyarrow.compute.list_flatten({lists}, recursive=True){decoded}.fill_null({zero})"
    shape = ", ".join(map(str, getattr(outer, "shape", whole.lengths)))
    moved = f".transpose{_axes(outer)}" if getattr(outer, "permutation", None) else ""
    return f"tensorbridge.to_numpy({filled}).reshape(-1, {shape}){moved}"


def _extension(arrow: Any, chunk: Any, whole: Whole) -> Any:
    """What is stored, for the types that say no more than how to see it."""
    kind = chunk.type
    part = _part(arrow, chunk.storage, whole.inside())
    if kind.extension_name == "arrow.bool8":  # any byte but 0 is true
        return Joined(part.shape, np.dtype(bool), lambda: part.astype(bool), _TRUTHS)
    if kind.extension_name != "arrow.fixed_shape_tensor":
        return part
    part = shaped(part, len(chunk), *kind.shape)
    if kind.permutation is None:
        return part
    axes = _axes(kind)
    if isinstance(part, Joined):
        shape = tuple(part.shape[axis] for axis in axes)
        return Joined(shape, part.dtype, lambda: part.join().transpose(axes), part.why)
    return part.transpose(axes)


def _axes(kind: Any) -> tuple[int, ...]:
    return 0, *(axis + 1 for axis in kind.permutation)


HELD = ("number", "truth", "codes", "truths", "rows")  # of which an array can be made, once nothing is missing


def _held(arrow: Any, kind: Any) -> str:
    """What a column holds, as far as that decides how its nulls are filled."""
    types = arrow.types
    if is_plain(kind):
        return "number"
    if types.is_boolean(kind):
        return "truth"
    if types.is_null(kind):
        return "nothing"
    if types.is_dictionary(kind) and is_plain(kind.value_type):
        return "codes"
    if types.is_dictionary(kind) and types.is_boolean(kind.value_type):
        return "truths"
    if isinstance(kind, arrow.BaseExtensionType):
        return "rows" if _held(arrow, kind.storage_type) in HELD else "unknown dtype"  # which no call fills
    if _is_list(types, kind):
        return "rows" if _held(arrow, kind.value_type) in HELD else "unknown dtype"
    return _kind(types, kind)


def _kind(types: Any, kind: Any) -> str:
    """What is in the way of a type that holds no numbers."""
    if types.is_dictionary(kind):
        return "categories"
    if types.is_date32(kind) or types.is_time32(kind):
        return "datetime32"
    if types.is_temporal(kind) and not types.is_interval(kind):  # months and days and nanoseconds are no one number
        return "datetime"
    if types.is_decimal(kind):
        return "decimal"
    if types.is_struct(kind):
        return "structured"
    if types.is_run_end_encoded(kind):
        return "runs"
    texts = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view")
    if any(getattr(types, name)(kind) for name in texts):
        return "string"
    return "unknown dtype"
