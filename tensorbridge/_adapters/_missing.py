"""Missing values in columns, tables and indexes of other libraries, and the words for what is no number there.

pyarrow, polars and pandas each count missing values in their own way. As arrays they come as NaN where the library may
turn integers into floats for it, and as zeros where it may not. Those that are not known by name are known by what they
can do.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Hashable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from tensorbridge._refuse import OBSTACLES, Obstacle, cure_rows

_CLASSES: dict[str, dict[str, tuple[str, ...]]] = {
    "table": {"pyarrow": ("Table", "RecordBatch"), "pandas": ("DataFrame",), "polars": ("DataFrame",)},
    "column": {
        "pyarrow": ("Array", "ChunkedArray", "Scalar"),
        "pandas": ("Series", "Index", "api.extensions.ExtensionArray"),
        "polars": ("Series",),
    },
    "group": {"h5py": ("Group",), "zarr": ("Group",)},
    "stored": {"h5py": ("Dataset", "Empty")},
    "rows": {"datasets": ("Column",)},
    "dataset": {"datasets": ("Dataset",)},
}


def library(x: Any, kind: str) -> str:
    """Which of the libraries `x` comes from, if it is a "table" or another kind in `_CLASSES`; none is imported."""
    cls: Any = type(x)
    return _library_of(cls, kind)


@lru_cache(maxsize=256)  # it keeps the classes alive
def _library_of(cls: type, kind: str) -> str:
    """Known for good: a class comes after the library of its parents."""
    for name, paths in _CLASSES[kind].items():
        loaded = sys.modules.get(name)
        if loaded is not None and issubclass(cls, tuple(_class(loaded, path) for path in paths)):
            return name
    return ""


def _class(module: Any, path: str) -> Any:
    """A class of a module; none where the import of the module is still under way."""
    for name in path.split("."):
        module = getattr(module, name, ())
    return module


# -- What is counted as missing


def refuse_nulls(x: Any) -> None:
    """Raise if `x` counts values as missing that an array could only hold as numbers. NaN is a number."""
    if not (hasattr(x, "null_count") or hasattr(x, "isna") or hasattr(x, "itercolumns")):
        return
    for name, column in named_columns(x):
        cure = (
            "x.fillna(0), x.dropna()" if hasattr(column, "isna") else "x.fill_null(0), x.drop_null() or x.drop_nulls()"
        )
        refuse_count(x, count(column), f"Fill or drop them first: {cure}.", f"its column {name!r}" if name else "it")


def refuse_count(x: Any, count: int, cure: str, whose: str = "it", inside: bool = False) -> None:
    """Raise if `count` values are missing, `inside` the rows of the column or as rows."""
    if count:
        detail = f"{whose} has {count} missing value{'s' * (count > 1)}{' inside its rows' * inside}"
        mark = f"an array can mark {'them' if count > 1 else 'that'} only as NaN"
        raise Obstacle("missing", type(x).__name__, f"{detail}, and {mark}").cured(cure)


# By library and by what the column holds, where filling or coding can do without dropping rows.
_DROP = {"pyarrow": "x.drop_null()", "pandas": "x.dropna()", "polars": "x.drop_nulls()"}
_FILL = {
    "pyarrow": {
        "number": "x.fill_null(0)",
        "truth": "x.fill_null(False)",
        "codes": "x.cast(x.type.value_type).fill_null(0)",
        "truths": "x.cast(x.type.value_type).fill_null(False)",
        "nothing": 'x.cast("int64").fill_null(0)',
    },
    "pandas": {
        "number": "x.fillna(0)",
        "truth": "x.fillna(False)",
        "codes": 'x.astype("Float64").fillna(0)',
        "truths": 'x.astype("bool[pyarrow]").fillna(False)',
        "nothing": 'x.astype("int64[pyarrow]").fillna(0)',
    },
    "polars": {
        "number": "x.fill_null(0)",
        "truth": "x.fill_null(False)",
        "nothing": "x.cast(polars.Int64).fill_null(0)",
    },
}
_NAN = {  # of integers, of floats
    "pyarrow": ('x.cast("float64").fill_null(float("nan"))', 'x.fill_null(float("nan"))'),
    "pandas": ('x.astype("float64")', 'x.astype("float64")'),
    "polars": ('x.cast(polars.Float64).fill_null(float("nan"))', 'x.fill_null(float("nan"))'),
}
_CODES = {
    "pyarrow": {
        "string": "{whole}.dictionary_encode().indices.fill_null(-1)",
        "categories": '{whole}.indices.cast("int64").fill_null(-1)',
    },
    "pandas": {"string": "pandas.factorize(x)[0]", "categories": "{codes}"},
    "polars": {
        "string": "x.cast(polars.Categorical).to_physical().cast(polars.Int64).fill_null(-1)",
        "categories": "x.to_physical().cast(polars.Int64).fill_null(-1)",
    },
}


def cure_of_nulls(x: Any, where: str, kind: str, said: object) -> str:
    """What makes numbers of a column with missing values: one call, for their fill and for what else is in the way."""
    drop = _DROP[where]
    rest = "." if is_index(x) else f"; or leave the column out: {_SELECT[where]}."
    if kind in _CODES[where]:
        once, codes = _coded(x, where) if kind == "categories" else (_ONCE, "")
        codes = _CODES[where][kind].format(whole=_whole(x), codes=codes)
        return f"Convert its codes, {once}, -1 for what is missing: {codes}{rest}"
    cure = _cure(x, where, kind, said)
    if kind in ("datetime", "datetime32"):
        call = cure.removeprefix("Convert ").removesuffix(_UNIT)
        kept = _KEPT["arrow" if hasattr(said, "pyarrow_dtype") else where].format(call)
        return f"Convert {kept}, 0 for what is missing, or {_OF_X.sub(drop, call)},{_UNIT}{rest}"
    if cure:
        return (cure if kind == "object" else _OF_X.sub(drop, cure)) + rest
    if kind == "nothing":
        return f"Fill them first: {_FILL[where][kind]}."
    if kind == "unknown dtype":
        return f"Leave the column out: {_SELECT[where]}."
    fill = _FILL[where].get(kind)
    if kind == "number":
        floats = str(said) == "double" or "float" in str(said).lower()
        fill = f"{_NAN[where][floats]} for NaN, {fill}"
    return f"Fill or drop them first: {fill}, {drop}." if fill else f"Drop them first: {drop}."


_UNIT = " and keep the unit beside it"
# By library: dates as integers, {}, in which nothing is missing.
_KEPT = {
    "pyarrow": "{}.fill_null(0)",
    "pandas": "np.where(x.isna(), 0, {})",
    "arrow": "{}.fillna(0)",  # in pandas
    "polars": "{}.fill_null(0)",
}
# By library; {} says whether a row is kept.
_ROWS = {
    "pyarrow": "x.filter([{} for row in x.to_pylist()])",
    "pandas": "x[[{} for row in x]]",
    "polars": "x.filter([{} for row in x.to_list()])",
}


def cure_of_rows(where: str, depth: int) -> str:
    """What leaves out the rows of which a part is missing, `depth` lists down."""
    kept = "None not in row"
    for _ in range(1, depth):
        kept = f"all({kept} for row in row)"
    return f"Drop the rows that have them: {_ROWS[where].format(kept)}."


def filled(where: str, kind: str) -> str:
    """The call that fills what is missing in a column that holds this."""
    return _FILL[where][kind]


_OF_X = re.compile(r"\bx\b")


def named_columns(x: Any) -> Iterator[tuple[str, Any]]:
    if hasattr(x, "itercolumns"):  # pyarrow
        yield from zip(x.column_names, x.itercolumns(), strict=True)
    elif hasattr(x, "iter_columns"):  # polars
        yield from ((column.name, column) for column in x.iter_columns())
    elif hasattr(x, "items") and hasattr(x, "columns"):  # pandas
        yield from ((str(name), column) for name, column in x.items())
    else:
        yield "", x


def count(column: Any) -> int:
    """How many values are missing by another sign than NaN."""
    nulls = getattr(column, "null_count", None)
    nulls = nulls() if callable(nulls) else nulls
    if isinstance(nulls, int):
        parts = None if nulls else _parts(column)
        return nulls if parts is None else count(parts)
    dtype = getattr(column, "dtype", None)
    if not hasattr(column, "isna") or dtype is None or (isinstance(dtype, np.dtype) and dtype.kind not in "mM"):
        return 0
    if isinstance(getattr(dtype, "na_value", None), float) and dtype.kind == "f":  # sparse floats: NaN is a value
        return 0
    return int(column.isna().sum())


def _parts(column: Any) -> Any:
    """What the rows of a nested column are made of: its own count says nothing of them."""
    if library(column, "column"):  # which look inside by themselves
        return None
    if hasattr(getattr(column, "dtype", None), "inner"):
        return column.explode()
    storage: Any = getattr(column, "storage", None)
    return storage.flatten() if hasattr(storage, "flatten") and hasattr(storage, "null_count") else None


# -- What is no number


# By library and by what is in the way; {whole} is x, as one array where it is in chunks. What is not here has no cure.
_CURES = {
    "pyarrow": {
        "string": "Convert its codes, {once}: {whole}.dictionary_encode().indices",
        "categories": "Convert its codes, {whole}.indices",
        "datetime": 'Convert x.cast("int64") and keep the unit beside it',
        "datetime32": 'Convert x.cast("int32") and keep the unit beside it',
        "decimal": 'Convert x.cast("float64")',
        "structured": "Convert each field, pyarrow.compute.struct_field(x, name)",
        "runs": "Convert pyarrow.compute.run_end_decode(x)",
        "ragged": "Pad its lists to one length",
    },
    "pandas": {
        "string": "Convert its codes, {once}: pandas.factorize(x)[0]",
        "categories": "Convert its codes, {once}: {codes}",
        "datetime": 'Convert x.astype("int64{arrow}") and keep the unit beside it',
        "datetime32": 'Convert x.astype("int32{arrow}") and keep the unit beside it',
        "decimal": 'Convert x.astype("float64")',
        "structured": "Convert each field, {whole}.struct.field(name)",
        "ragged": "Pad its lists to one length",
    },
    "polars": {
        "string": "Convert its codes, {once}: x.cast(polars.Categorical).to_physical()",
        "categories": "Convert its codes, x.to_physical()",
        "datetime": "Convert x.to_physical() and keep the unit beside it",
        "decimal": "Convert x.cast(polars.Float64)",
        "structured": "Convert its fields: tensorbridge.tree.to_{{framework}}(x.struct.unnest())",
        "ragged": "Pad its lists to one length",
        "wide": "Convert x.cast(polars.Int64) if that is wide enough",
    },
}
_SELECT = {
    "pyarrow": 'table.select(["name", ...])',
    "pandas": 'df.select_dtypes(["number", "bool"], exclude="timedelta")',
    "polars": "df.select(polars.selectors.integer() | polars.selectors.float() | polars.selectors.boolean())",
}
_ONCE = "made once for the whole data set"
# The dtype for Python objects that are numbers, by what pandas says that they are.
_OBJECTS = {
    **dict.fromkeys(("integer", "floating", "mixed-integer-float", "decimal", "boolean", "empty"), "float64"),
    "complex": "complex128",
}
_KNOWN_AS = {"datetime32": "datetime"}
_WHY = {
    "categories": "its categories are not numbers",
    "object": "its elements are Python objects, not numbers",
    "structured": "each of its rows is a record of several fields",
    "runs": "runs of equal values are not elements in a row",
}


def obstacle(x: Any, where: str, kind: str, said: object, detail: str = "", *, nested: bool = False) -> Obstacle:
    """What stands in the way of a column, with the cure of its own library and the way to go on without it.

    No call on the whole column cures what is `nested` in its rows.
    """
    name = _KNOWN_AS.get(kind, kind)
    found = Obstacle(name if name in OBSTACLES else "unknown dtype", f"{type(x).__name__} of {shorten(said)}")
    found.why = detail or _WHY.get(kind, found.why)
    cure = "" if nested and kind != "ragged" else _cure(x, where, kind, said)
    select = f"df.drop({x.name!r})" if kind == "wide" and not nested else _SELECT[where]
    if cure and is_index(x):
        return found.cured(f"{cure}.")
    return found.cured(f"{cure}; or leave the column out: {select}." if cure else f"Leave the column out: {select}.")


def _cure(x: Any, where: str, kind: str, said: object) -> str:
    if where == "pandas" and kind == "object":
        return _cure_of_objects(x)
    arrow = "[pyarrow]" * hasattr(said, "pyarrow_dtype")
    once, codes = _coded(x, where) if kind == "categories" else (_ONCE, "")
    return _CURES[where].get(kind, "").format(whole=_whole(x), arrow=arrow, once=once, codes=codes)


def _coded(x: Any, where: str) -> tuple[str, str]:
    """Of categories: how they are numbered, and, in pandas, by which call."""
    if where != "pandas" or not hasattr(x.dtype, "categories"):  # pyarrow's in pandas
        return _ONCE, "pandas.factorize(x)[0]"
    return "in the order of its categories", "x.cat.codes" if hasattr(x, "cat") else "x.codes"


def _cure_of_objects(x: Any) -> str:
    """What makes numbers of the objects of pandas, and what of those that are missing."""
    pandas, there = sys.modules["pandas"], x.dropna()
    lacks = len(there) < len(x)
    values = np.asarray(there)
    first = values[0] if len(values) else None
    hashed = isinstance(first, Hashable)
    rows = cure_rows(first, f"np.stack({'x.dropna()' if lacks else 'x'})")
    if rows and not (hashed and is_index(x)):
        return rows.removesuffix(".")
    dtype = _OBJECTS.get(pandas.api.types.infer_dtype(values))
    if dtype:
        return f'Convert {"x.dropna()" if any(value is pandas.NA for value in x) else "x"}.astype("{dtype}")'
    said = ", -1 for what is missing" * lacks
    return f"Convert its codes, {_ONCE}{said}: pandas.factorize(x)[0]" if hashed else ""


def is_index(x: Any) -> bool:
    """Whether `x` is the labels of a table: no column, that could be left out. They are hashed, so that nobody may
    write to them, yet NumPy gets them writable.
    """
    return hasattr(type(x), "get_indexer")


def _whole(x: Any) -> str:
    """`x` as what has the calls that are said of it: as one array, or one that lies in a table."""
    if hasattr(x, "combine_chunks"):
        return "x.combine_chunks()"
    return "pandas.Series(x)" if library(x, "column") == "pandas" and not hasattr(x, "struct") else "x"


def shorten(said: object) -> str:
    """A type in at most a line: categories and records say all that is in them."""
    text = " ".join(str(said).split())
    return text if len(text) <= 60 else f"{text[:56]} ..."
