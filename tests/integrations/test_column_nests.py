"""A missing value at any depth of lists in lists: what the error says to do is pasted, and gives the array."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import tensorbridge as tb
from tensorbridge import tree

LEAVES = {
    "ints": (pl.Int64, pa.int64(), 7),
    "floats": (pl.Float32, pa.float32(), 7.5),
    "truths": (pl.Boolean, pa.bool_(), True),
}
NESTS = ["".join(kinds) for depth in (1, 2, 3) for kinds in itertools.product("LA", repeat=depth)]  # of lists, arrays


def nested(kinds: str, leaf: str, lacks: int) -> Any:
    """Three rows of lists of two, with one null at the level `lacks`."""
    value = LEAVES[leaf][2]

    def part(level: int, holed: bool) -> Any:
        if holed and level == lacks:
            return None
        if level == len(kinds):
            return value
        return [part(level + 1, False), part(level + 1, holed)]

    return [part(0, False), part(0, True), part(0, False)]


def of_polars(kinds: str, leaf: str, lacks: int) -> Any:
    dtype: Any = LEAVES[leaf][0]
    for kind in reversed(kinds):
        dtype = pl.List(dtype) if kind == "L" else pl.Array(dtype, 2)
    return pl.Series("c", nested(kinds, leaf, lacks), dtype=dtype)


def of_arrow(kinds: str, leaf: str, lacks: int) -> Any:
    dtype: Any = LEAVES[leaf][1]
    for kind in reversed(kinds):
        dtype = pa.list_(dtype) if kind == "L" else pa.list_(dtype, 2)
    return pa.array(nested(kinds, leaf, lacks), dtype)


def of_pandas(kinds: str, leaf: str, lacks: int) -> Any:
    x = of_arrow(kinds, leaf, lacks)
    return pd.Series(x, dtype=pd.ArrowDtype(x.type), index=[5, 7, 9])


def chunked(kinds: str, leaf: str, lacks: int) -> Any:
    x = of_arrow(kinds, leaf, lacks)
    return pa.chunked_array([x[:1], x[1:]])


MAKES = {
    "polars": of_polars,
    "polars in chunks": lambda *how: of_polars(*how)[:1].append(of_polars(*how)[1:]),
    "arrow": of_arrow,
    "arrow in chunks": chunked,
    "pandas": of_pandas,
    "pandas array": lambda *how: of_pandas(*how).array,
    "pandas labels": lambda *how: pd.Index(of_pandas(*how)),
}


def pasted(x: Any) -> Any:
    """What the one call that the error says gives."""
    with pytest.raises(tb.UnsupportedArrayError, match="1 missing value") as caught:
        tb.to_torch(x)
    found = re.fullmatch(r"(Drop|Fill)[a-z ]+: (.*)\.", str(caught.value).splitlines()[1])
    assert found, caught.value
    return eval(found[2], {"x": x, "tensorbridge": tb, "pyarrow": pa, "polars": pl})


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("kinds", NESTS)
@pytest.mark.parametrize("name", MAKES)
def test_a_null_at_any_depth_is_filled_or_its_row_is_dropped(name, kinds, leaf):
    value = LEAVES[leaf][2]
    full = np.full((3, *[2] * len(kinds)), value)
    for lacks in range(len(kinds) + 1):
        x = MAKES[name](kinds, leaf, lacks)
        expected = full[:2]
        if lacks == len(kinds):
            expected = full.copy()
            expected[(1, *[1] * len(kinds))] = 0
        cured = pasted(x)
        for a in (tb.to_numpy(cured), tree.to_numpy({"c": cured})["c"]):
            assert a.tolist() == expected.tolist()
            assert a.dtype == tb.to_numpy(x[:1]).dtype


def extension(kind: Any, storage: Any) -> Any:
    return pa.ExtensionArray.from_storage(kind, storage)


def of_tensors(*rows: Any, permutation: Any = None) -> Any:
    kind = pa.fixed_shape_tensor(pa.int64(), [1, 2], permutation=permutation)
    return extension(kind, pa.array(rows, pa.list_(pa.int64(), 2)))


def in_pairs(x: Any) -> Any:
    return pa.FixedSizeListArray.from_arrays(x, 2)


def coded(values: Any, codes: Any) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(values))


OTHERS = {
    "one row of truths in bytes": (
        lambda: in_pairs(extension(pa.bool8(), pa.array([1, None], pa.int8()))),
        [],
    ),
    "truths in bytes": (lambda: extension(pa.bool8(), pa.array([1, None], pa.int8())), [True]),
    "truths in bytes in lists": (
        lambda: in_pairs(extension(pa.bool8(), pa.array([1, 0, 1, None], pa.int8()))),
        [[True, False]],
    ),
    "a type of somebody": (lambda: extension(pa.opaque(pa.int64(), "t", "v"), pa.array([1, None])), [1]),
    "tensors": (lambda: of_tensors([1, 2], [3, None]), [[[1, 2]], [[3, 0]]]),
    "tensors in another order": (lambda: of_tensors([1, 2], [3, None], permutation=[1, 0]), [[[1], [2]], [[3], [0]]]),
    "tensors in lists": (lambda: in_pairs(of_tensors([1, 2], [3, 4], [5, 6], [7, None])), [[[[1, 2]], [[3, 4]]]]),
    "a category": (lambda: coded([5, None], [0, 1]), [5, 0]),
    "a category that is a truth": (lambda: coded([True, None], [0, 1]), [True, False]),
    "a category in lists": (lambda: in_pairs(coded([5, None], [0, 0, 0, 1])), [[5, 5], [5, 0]]),
    "a code in lists": (lambda: in_pairs(coded([5], [0, 0, 0, None])), [[5, 5], [5, 0]]),
    "a category that is a truth in lists": (lambda: in_pairs(coded([True, None], [0, 1])), [[True, False]]),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("library", ["arrow", "arrow in chunks", "pandas", "pandas array"])
def test_a_null_in_what_arrow_stores_in_a_way_of_its_own(library, name):
    make, expected = OTHERS[name]
    x = make()
    if library == "arrow in chunks":
        x = pa.chunked_array([x])
    if "pandas" in library:
        x = pd.Series(x, dtype=pd.ArrowDtype(x.type))
    x = x.array if library == "pandas array" else x
    assert tb.to_numpy(pasted(x)).tolist() == expected
