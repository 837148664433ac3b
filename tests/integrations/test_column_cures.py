"""What an error says to do about a column is said in the words of its own library, and works."""

from __future__ import annotations

import datetime
import decimal
import re
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

import tensorbridge as tb
from tensorbridge import tree

BIG = 2**53 + 1  # no float64


def arrow_pandas(values: Any, kind: Any) -> Any:
    return pd.Series(values, dtype=pd.ArrowDtype(kind))


def tensors(values: Any) -> Any:
    storage = pa.array(values, pa.list_(pa.float64(), 2))
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float64(), [2]), storage)


MOMENT = datetime.datetime(2020, 1, 1)
CURES: dict[str, tuple[Any, str, Any]] = {
    "arrow text": (
        lambda: pa.array(["b", "a", "b"]),
        "x.dictionary_encode().indices",
        [0, 1, 0],
    ),
    "arrow text in chunks": (
        lambda: pa.chunked_array([["b", "a"], ["b"]]),
        "x.combine_chunks().dictionary_encode().indices",
        [0, 1, 0],
    ),
    "arrow bytes": (lambda: pa.array([b"b", b"a"], pa.large_binary()), "x.dictionary_encode().indices", [0, 1]),
    "arrow text views": (lambda: pa.array(["b", "a"], pa.string_view()), "x.dictionary_encode().indices", [0, 1]),
    "arrow codes": (lambda: pa.array(["b", "a", "b"]).dictionary_encode(), "x.indices", [0, 1, 0]),
    "arrow codes in chunks": (
        lambda: pa.chunked_array([pa.array(["b"]).dictionary_encode(), pa.array(["a", "b"]).dictionary_encode()]),
        "x.combine_chunks().indices",
        [0, 1, 0],
    ),
    "arrow moments": (lambda: pa.array([1, 2], pa.timestamp("s")), 'x.cast("int64")', [1, 2]),
    "arrow moments in chunks": (lambda: pa.chunked_array([[1], [2]], pa.timestamp("s")), 'x.cast("int64")', [1, 2]),
    "arrow durations": (lambda: pa.array([1, 2], pa.duration("s")), 'x.cast("int64")', [1, 2]),
    "arrow times": (lambda: pa.array([1, 2], pa.time64("us")), 'x.cast("int64")', [1, 2]),
    "arrow short times": (lambda: pa.array([1, 2], pa.time32("s")), 'x.cast("int32")', [1, 2]),
    "arrow dates": (lambda: pa.array([1, 2], pa.date32()), 'x.cast("int32")', [1, 2]),
    "arrow long dates": (lambda: pa.array([1, 2], pa.date64()), 'x.cast("int64")', [1, 2]),
    "arrow decimals": (lambda: pa.array([1, 2], pa.decimal128(3)), 'x.cast("float64")', [1, 2]),
    "arrow runs": (lambda: pc.run_end_encode(pa.array([1, 1, 2])), "pyarrow.compute.run_end_decode(x)", [1, 1, 2]),
    "arrow records": (
        lambda: pa.chunked_array([[{"name": 1}], [{"name": 2}]]),
        "pyarrow.compute.struct_field(x, name)",
        [1, 2],
    ),
    "arrow null": (lambda: pa.array([1, None]), "x.fill_null(0)", [1, 0]),
    "arrow null dropped": (lambda: pa.chunked_array([[[1]], [None]]), "x.drop_null()", [[1]]),
    "arrow null in a list": (
        lambda: pa.array([[1, None], [3, 4]]),
        "tensorbridge.to_numpy(pyarrow.compute.list_flatten(x, recursive=True).fill_null(0)).reshape(-1, 2)",
        [[1, 0], [3, 4]],
    ),
    "arrow null in a tensor": (
        lambda: pa.chunked_array([tensors([[1.0, 2.0], [None, 3.0]])]),
        "tensorbridge.to_numpy(pyarrow.compute.list_flatten("
        "x.cast(x.type.storage_type), recursive=True).fill_null(0)).reshape(-1, 2)",
        [[1, 2], [0, 3]],
    ),
    "arrow null in a dictionary": (
        lambda: pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array([5, None])),
        "x.cast(x.type.value_type).fill_null(0)",
        [5, 0],
    ),
    "arrow null row": (lambda: pa.array([[1, 2], None, [3, 4]]), "x.drop_null()", [[1, 2], [3, 4]]),
    "arrow null row of a fixed length": (
        lambda: pa.array([[1, 2], None], pa.list_(pa.int64(), 2)),
        "x.drop_null()",
        [[1, 2]],
    ),
    "arrow nothing": (lambda: pa.nulls(2), 'x.cast("int64").fill_null(0)', [0, 0]),
    "arrow truth and null": (lambda: pa.array([True, None]), "x.fill_null(False)", [True, False]),
    "arrow truth codes and null": (
        lambda: pa.array([True, None]).dictionary_encode(),
        "x.cast(x.type.value_type).fill_null(False)",
        [True, False],
    ),
    "arrow text and null": (
        lambda: pa.array(["b", None, "a"]),
        "x.dictionary_encode().indices.fill_null(-1)",
        [0, -1, 1],
    ),
    "arrow text and null in chunks": (
        lambda: pa.chunked_array([["b", None], ["a"]]),
        "x.combine_chunks().dictionary_encode().indices.fill_null(-1)",
        [0, -1, 1],
    ),
    "arrow codes and null": (
        lambda: pa.array(["b", None]).dictionary_encode(),
        'x.indices.cast("int64").fill_null(-1)',
        [0, -1],
    ),
    "arrow codes of numbers and null": (
        lambda: pa.array([5, None]).dictionary_encode(),
        "x.cast(x.type.value_type).fill_null(0)",
        [5, 0],
    ),
    "arrow dates and null": (lambda: pa.array([1, None], pa.date32()), 'x.drop_null().cast("int32")', [1]),
    "arrow decimals and null": (
        lambda: pa.array([1, None], pa.decimal128(3)),
        'x.drop_null().cast("float64")',
        [1],
    ),
    "arrow records and null": (
        lambda: pa.array([{"name": 1}, None]),
        "pyarrow.compute.struct_field(x.drop_null(), name)",
        [1],
    ),
    "arrow null among truths in a list": (
        lambda: pa.array([[True, None]]),
        "tensorbridge.to_numpy(pyarrow.compute.list_flatten(x, recursive=True).fill_null(False)).reshape(-1, 2)",
        [[True, False]],
    ),
    "pandas rows of lists": (lambda: pd.Series([[1, 2], [3, 4]]), "np.stack(x)", [[1, 2], [3, 4]]),
    "pandas rows of arrays": (
        lambda: pd.Series([np.ones(2), np.zeros(2)], index=[5, 7]),
        "np.stack(x)",
        [[1, 1], [0, 0]],
    ),
    "pandas integer and null": (lambda: pd.Series([1, None], dtype="Int64"), "x.fillna(0)", [1, 0]),
    "pandas truth and null": (lambda: pd.Series([True, None], dtype="boolean"), "x.fillna(False)", [True, False]),
    "pandas categories and null": (
        lambda: pd.Series([3, None, 3], dtype="category"),
        'x.astype("Float64").fillna(0)',
        [3, 0, 3],
    ),
    "pandas categories without null": (lambda: pd.Series([3, None, 3], dtype="category"), "x.dropna()", [3, 3]),
    "pandas labels that are categories": (
        lambda: pd.CategoricalIndex([3, None]),
        'x.astype("Float64").fillna(0)',
        [3, 0],
    ),
    "pandas text and null": (lambda: pd.Series(["b", None, "a"]), "pandas.factorize(x)[0]", [0, -1, 1]),
    "pandas text categories and null": (
        lambda: pd.Series(["b", None, "a"], dtype="category"),
        "in the order of its categories, -1 for what is missing: x.cat.codes",
        [1, -1, 0],
    ),
    "pandas labels that are text categories and null": (
        lambda: pd.CategoricalIndex(["b", None, "a"]),
        "x.codes",
        [1, -1, 0],
    ),
    "pandas array of text categories and null": (lambda: pd.Categorical(["b", None, "a"]), "x.codes", [1, -1, 0]),
    "pandas arrow text categories and null": (
        lambda: arrow_pandas(pa.array(["b", None]).dictionary_encode(), pa.dictionary(pa.int32(), pa.string())),
        "pandas.factorize(x)[0]",
        [0, -1],
    ),
    "pandas arrow text and null": (lambda: arrow_pandas(["b", None], pa.string()), "pandas.factorize(x)[0]", [0, -1]),
    "pandas array of categories and null": (
        lambda: pd.Categorical([3, None]),
        'x.astype("Float64").fillna(0)',
        [3, 0],
    ),
    "pandas arrow truth codes and null": (
        lambda: arrow_pandas(pa.array([True, None]).dictionary_encode(), pa.dictionary(pa.int32(), pa.bool_())),
        'x.astype("bool[pyarrow]").fillna(False)',
        [True, False],
    ),
    "pandas records in an array": (
        lambda: arrow_pandas([{"name": 1}], pa.struct({"name": pa.int64()})).array,
        "pandas.Series(x).struct.field(name)",
        [1],
    ),
    "pandas records and null in labels": (
        lambda: pd.Index(arrow_pandas([{"name": 1}, None], pa.struct({"name": pa.int64()}))),
        "pandas.Series(x.dropna()).struct.field(name)",
        [1],
    ),
    "pandas rows and None": (lambda: pd.Series([None, [1, 2], [3, 4]]), "np.stack(x.dropna())", [[1, 2], [3, 4]]),
    "pandas labels that are lists": (lambda: pd.Index([[1, 2], [3, 4]]), "np.stack(x)", [[1, 2], [3, 4]]),
    "pandas objects and None": (lambda: pd.Series([1, True, None], dtype=object), "pandas.factorize(x)[0]", None),
    "pandas objects and NA": (lambda: pd.Series([1, pd.NA], dtype=object), 'x.dropna().astype("float64")', [1]),
    "pandas complex objects": (lambda: pd.Series([1j, 2j], dtype=object), 'x.astype("complex128")', [1j, 2j]),
    "pandas array of intervals and null": (
        lambda: pd.arrays.IntervalArray.from_tuples([(0, 1), None]),
        "-1 for what is missing: pandas.factorize(x)[0]",
        [0, -1],
    ),
    "pandas array of rows and None": (lambda: pd.Series([[1, 2], None]).array, "np.stack(x.dropna())", [[1, 2]]),
    "pandas arrow nothing": (
        lambda: arrow_pandas([None, None], pa.null()),
        'x.astype("int64[pyarrow]").fillna(0)',
        [0, 0],
    ),
    "pandas arrow codes of numbers and null": (
        lambda: arrow_pandas(pa.array([5, None]).dictionary_encode(), pa.dictionary(pa.int32(), pa.int64())),
        'x.astype("Float64").fillna(0)',
        [5, 0],
    ),
    "pandas arrow null row": (
        lambda: arrow_pandas([[1, 2], None], pa.list_(pa.int64())),
        "x.dropna()",
        [[1, 2]],
    ),
    **{
        f"pandas {name} and NaT, rows kept": (make, 'np.where(x.isna(), 0, x.astype("int64"))', expected)
        for name, make, expected in [
            ("moments", lambda: pd.Series([MOMENT, None]).astype("datetime64[s]"), [1577836800, 0]),
            ("zoned moments", lambda: pd.Series([MOMENT, None]).astype("datetime64[s]").dt.tz_localize("UTC"), None),
            ("durations", lambda: pd.Series(pd.to_timedelta([1, None], unit="s")).astype("timedelta64[s]"), [1, 0]),
            ("periods", lambda: pd.Series(pd.PeriodIndex(["1970-01-02", None], freq="D")), [1, 0]),
            ("labels of moments", lambda: pd.DatetimeIndex([MOMENT, None]).as_unit("s"), [1577836800, 0]),
            ("an array of moments", lambda: pd.DatetimeIndex([MOMENT, None]).as_unit("s").array, [1577836800, 0]),
        ]
    },
    "pandas arrow dates and null, rows kept": (
        lambda: arrow_pandas(pa.array([1, None], pa.date32()), pa.date32()),
        'x.astype("int32[pyarrow]").fillna(0)',
        [1, 0],
    ),
    "pandas arrow moments and null, rows kept": (
        lambda: arrow_pandas(pa.array([1, None], pa.timestamp("s")), pa.timestamp("s")),
        'x.astype("int64[pyarrow]").fillna(0)',
        [1, 0],
    ),
    "arrow moments and null, rows kept": (
        lambda: pa.array([1, None], pa.timestamp("s")),
        'x.cast("int64").fill_null(0)',
        [1, 0],
    ),
    "arrow dates and null, rows kept": (
        lambda: pa.array([1, None], pa.date32()),
        'x.cast("int32").fill_null(0)',
        [1, 0],
    ),
    "polars dates and null, rows kept": (
        lambda: pl.Series([datetime.date(1970, 1, 2), None]),
        "x.to_physical().fill_null(0)",
        [1, 0],
    ),
    "pandas moments and null": (
        lambda: pd.Series([MOMENT, None]).astype("datetime64[s]"),
        'x.dropna().astype("int64")',
        [1577836800],
    ),
    "pandas zoned moments and null": (
        lambda: pd.Series([MOMENT, None]).astype("datetime64[s]").dt.tz_localize("UTC"),
        'x.dropna().astype("int64")',
        [1577836800],
    ),
    "pandas arrow dates and null": (
        lambda: arrow_pandas(pa.array([1, None], pa.date32()), pa.date32()),
        'x.dropna().astype("int32[pyarrow]")',
        [1],
    ),
    "polars truth and null": (lambda: pl.Series([True, None]), "x.fill_null(False)", [True, False]),
    "polars nothing": (lambda: pl.Series([None, None]), "x.cast(polars.Int64).fill_null(0)", [0, 0]),
    "polars null row": (lambda: pl.Series([[1, 2], None]), "x.drop_nulls()", [[1, 2]]),
    "polars text and null": (
        lambda: pl.Series(["b", None]),
        "x.cast(polars.Categorical).to_physical().cast(polars.Int64).fill_null(-1)",
        None,
    ),
    "polars categories and null": (
        lambda: pl.Series(["b", None], dtype=pl.Enum(["a", "b"])),
        "x.to_physical().cast(polars.Int64).fill_null(-1)",
        [1, -1],
    ),
    "polars dates and null": (
        lambda: pl.Series([datetime.date(1970, 1, 2), None]),
        "x.drop_nulls().to_physical()",
        [1],
    ),
    "polars wide and null": (
        lambda: pl.Series([1, None], dtype=pl.Int128),
        "x.drop_nulls().cast(polars.Int64)",
        [1],
    ),
    "polars null among truths in a list": (
        lambda: pl.Series([[True, None]]),
        "x.list.eval(polars.element().fill_null(False))",
        [[True, False]],
    ),
    "pandas text": (lambda: pd.Series(["b", "a", "b"]), "pandas.factorize(x)[0]", [0, 1, 0]),
    "pandas text labels": (lambda: pd.Index(["b", "a", "b"]), "pandas.factorize(x)[0]", [0, 1, 0]),
    "pandas arrow text": (lambda: arrow_pandas(["b", "a"], pa.string()), "pandas.factorize(x)[0]", [0, 1]),
    "pandas text categories": (lambda: pd.Series(["b", "a"], dtype="category"), "x.cat.codes", [1, 0]),
    "pandas labels that are text categories": (lambda: pd.CategoricalIndex(["b", "a"]), "x.codes", [1, 0]),
    "pandas array of text categories": (lambda: pd.Categorical(["b", "a"]), "x.codes", [1, 0]),
    "pandas interval categories": (lambda: pd.cut(pd.Series([5, 1]), [0, 2, 6]), "x.cat.codes", [1, 0]),
    "pandas arrow text categories": (
        lambda: arrow_pandas(pa.array(["b", "a"]).dictionary_encode(), pa.dictionary(pa.int32(), pa.string())),
        "pandas.factorize(x)[0]",
        [0, 1],
    ),
    "pandas objects": (lambda: pd.Series([1, 2], dtype=object), 'x.astype("float64")', [1, 2]),
    "pandas text objects": (lambda: pd.Series(["b", "a"], dtype=object), "pandas.factorize(x)[0]", [0, 1]),
    "pandas pairs": (lambda: pd.MultiIndex.from_tuples([(1, 2), (1, 3)]), "pandas.factorize(x)[0]", [0, 1]),
    "pandas intervals": (lambda: pd.Series(pd.interval_range(0, 2)), "pandas.factorize(x)[0]", [0, 1]),
    "pandas moments": (lambda: pd.Series([MOMENT]).astype("datetime64[s]"), 'x.astype("int64")', [1577836800]),
    "pandas zoned moments": (
        lambda: pd.Series([MOMENT]).astype("datetime64[s]").dt.tz_localize("UTC"),
        'x.astype("int64")',
        [1577836800],
    ),
    "pandas durations": (lambda: pd.Series(pd.to_timedelta([1], unit="s")), 'x.astype("int64")', None),
    "pandas periods": (lambda: pd.Series(pd.period_range("1970-01-01", periods=2)), 'x.astype("int64")', [0, 1]),
    "pandas labels of moments": (lambda: pd.DatetimeIndex([MOMENT]).as_unit("s"), 'x.astype("int64")', [1577836800]),
    "pandas arrow moments": (
        lambda: arrow_pandas(pa.array([1], pa.timestamp("s")), pa.timestamp("s")),
        'x.astype("int64[pyarrow]")',
        [1],
    ),
    "pandas arrow times": (
        lambda: arrow_pandas(pa.array([1], pa.time64("us")), pa.time64("us")),
        'x.astype("int64[pyarrow]")',
        [1],
    ),
    "pandas arrow dates": (
        lambda: arrow_pandas(pa.array([1], pa.date32()), pa.date32()),
        'x.astype("int32[pyarrow]")',
        [1],
    ),
    "pandas arrow decimals": (
        lambda: arrow_pandas(pa.array([1], pa.decimal128(3)), pa.decimal128(3)),
        'x.astype("float64")',
        [1],
    ),
    "pandas records": (
        lambda: arrow_pandas([{"name": 1}], pa.struct({"name": pa.int64()})),
        "x.struct.field(name)",
        [1],
    ),
    "pandas null in a list": (
        lambda: arrow_pandas([[1, None], [3, 4]], pa.list_(pa.int64())),
        "tensorbridge.to_numpy(pyarrow.compute.list_flatten(pyarrow.array(x), recursive=True).fill_null(0))"
        ".reshape(-1, 2)",
        [[1, 0], [3, 4]],
    ),
    "polars text": (lambda: pl.Series(["b", "a", "b"]), "x.cast(polars.Categorical).to_physical()", None),
    "polars categories": (lambda: pl.Series(["b", "a"], dtype=pl.Enum(["a", "b"])), "x.to_physical()", [1, 0]),
    "polars moments": (lambda: pl.Series([MOMENT]), "x.to_physical()", [1577836800000000]),
    "polars dates": (lambda: pl.Series([datetime.date(1970, 1, 2)]), "x.to_physical()", [1]),
    "polars times": (lambda: pl.Series([datetime.time(0, 0, 1)]), "x.to_physical()", [10**9]),
    "polars durations": (lambda: pl.Series([datetime.timedelta(seconds=1)]), "x.to_physical()", [10**6]),
    "polars decimals": (lambda: pl.Series(["1.5"]).cast(pl.Decimal(3, 1)), "x.cast(polars.Float64)", [1.5]),
    "polars wide": (lambda: pl.Series([1], dtype=pl.Int128), "x.cast(polars.Int64)", [1]),
    "polars null": (lambda: pl.Series([1, None]), "x.fill_null(0)", [1, 0]),
    "polars null list": (lambda: pl.Series([[1], None]), "x.drop_nulls()", [[1]]),
    "polars null in a list": (
        lambda: pl.Series([[1, None], [3, 4]]),
        "x.list.eval(polars.element().fill_null(0))",
        [[1, 0], [3, 4]],
    ),
    "polars null in an array": (
        lambda: pl.Series([[1, None], [3, 4]], dtype=pl.Array(pl.Int64, 2)),
        "x.arr.to_list().list.eval(polars.element().fill_null(0))",
        [[1, 0], [3, 4]],
    ),
}


@pytest.mark.parametrize("name", CURES)
def test_the_cure_that_is_said_works(name):
    make, cure, expected = CURES[name]
    x = make()
    for convert in (tb.to_numpy, tb.to_torch, lambda x: tree.to_numpy({"c": x})):
        with pytest.raises(tb.UnsupportedArrayError, match=re.escape(cure)) as caught:
            convert(x)
        assert len(str(caught.value).splitlines()) == 2
    names = {"x": x, "np": np, "name": "name", "tensorbridge": tb, "pyarrow": pa, "pandas": pd, "polars": pl}
    cured = eval(cure.partition("-1 for what is missing: ")[2] or cure, names)
    for a in (tb.to_numpy(cured), tree.to_numpy({"c": cured})["c"]):
        assert a.dtype.kind in "iufbc"
        assert len(a) == len(cured)
        if expected is not None:
            assert a.tolist() == expected


NAN = {
    "arrow integers": (lambda: pa.array([1, None]), 'x.cast("float64").fill_null(float("nan"))'),
    "arrow integers in chunks": (lambda: pa.chunked_array([[1], [None]]), 'x.cast("float64").fill_null(float("nan"))'),
    "arrow floats": (lambda: pa.array([1.0, None]), 'x.fill_null(float("nan"))'),
    "arrow half floats": (lambda: pa.array([1.0, None], pa.float16()), 'x.fill_null(float("nan"))'),
    "pandas integers": (lambda: pd.Series([1, None], dtype="Int64"), 'x.astype("float64")'),
    "pandas floats": (lambda: pd.Series([1, None], dtype="Float64"), 'x.astype("float64")'),
    "pandas labels": (lambda: pd.Index([1, None], dtype="Int64"), 'x.astype("float64")'),
    "pandas, of arrow": (lambda: arrow_pandas([1, None], pa.int8()), 'x.astype("float64")'),
    "polars integers": (lambda: pl.Series([1, None]), 'x.cast(polars.Float64).fill_null(float("nan"))'),
    "polars floats": (lambda: pl.Series([1.0, None], dtype=pl.Float32), 'x.fill_null(float("nan"))'),
}


@pytest.mark.parametrize("name", NAN)
def test_the_first_cure_of_missing_numbers_keeps_them_missing(name):
    make, cure = NAN[name]
    x = make()
    with pytest.raises(
        tb.UnsupportedArrayError, match=r"and an array can mark that only as NaN\.\nFill or drop"
    ) as caught:
        tb.to_torch(x)
    assert str(caught.value).partition("Fill or drop them first: ")[2].startswith(f"{cure} for NaN, x.fill")
    made = tb.to_numpy(eval(cure, {"x": x, "polars": pl}))
    np.testing.assert_array_equal(made, [1, np.nan])
    with pytest.raises(tb.UnsupportedArrayError, match=re.escape(cure)):
        tb.to_torch(x, dtype="float32")
    made = tb.to_torch(eval(cure, {"x": x, "polars": pl}), dtype="float32")
    np.testing.assert_array_equal(made, torch.tensor([1, float("nan")]))


ONLY_CODES = {
    "text": lambda: pd.Series(["b", "a"], dtype=object),
    "mixed": lambda: pd.Series([1, "a", None], dtype=object),
    "dates": lambda: pd.Series([MOMENT.date()] * 2),
    "intervals": lambda: pd.Series(pd.interval_range(0, 2)),
    "labels that are intervals": lambda: pd.interval_range(0, 2),
    "intervals and null": lambda: pd.Series(pd.arrays.IntervalArray.from_tuples([(0, 1), None])),
    "pairs": lambda: pd.MultiIndex.from_tuples([(1, 2), (1, None)]),
    "pairs of text": lambda: pd.MultiIndex.from_tuples([(1, "a"), (1, "b")]),
}


@pytest.mark.parametrize("name", ONLY_CODES)
def test_what_no_cast_makes_numbers_of_is_not_told_to_be_cast(name):
    x = ONLY_CODES[name]()
    with pytest.raises(
        tb.UnsupportedArrayError,
        match=r"\nConvert its codes, made once for the whole data set.*: pandas\.factorize\(x\)\[0\]",
    ) as caught:
        tb.to_torch(x)
    assert "astype" not in str(caught.value)
    assert tb.to_torch(pd.factorize(x)[0]).shape == (len(x),)


@pytest.mark.parametrize("rows", [[{"a": 1}], [{1, 2}]])
def test_objects_of_which_nothing_makes_numbers_are_left_out(rows):
    with pytest.raises(tb.UnsupportedArrayError, match=r"Python objects, not numbers\.\nLeave the column out"):
        tb.to_torch(pd.Series(rows))


def test_the_way_to_leave_a_wide_polars_column_out_works():
    df = pl.DataFrame({"wide": pl.Series([1], dtype=pl.Int128), "n": [2]})
    with pytest.raises(tb.UnsupportedArrayError, match=r"or leave the column out: df\.drop\('wide'\)\.$"):
        tb.to_numpy(df)
    assert tb.to_numpy(df.drop("wide")).tolist() == [[2]]


def test_a_query_of_polars_is_collected():
    x = pl.LazyFrame({"n": [1, 2]})
    with pytest.raises(tb.UnsupportedArrayError, match=r"Convert x\.collect\(\)"):
        tb.to_torch(x)
    assert tb.to_torch(x.collect()).tolist() == [[1], [2]]


@pytest.mark.parametrize("make", [lambda: pa.array([["a"], None]), lambda: pl.Series([["a"], None])])
def test_nulls_beside_what_has_no_cure_are_left_out_with_their_column(make):
    with pytest.raises(tb.UnsupportedArrayError, match=r"1 missing value.*\nLeave the column out"):
        tb.to_numpy(make())


def test_the_cure_for_polars_records_works():
    x = pl.Series("c", [{"id": BIG, "w": 0.5}])
    with pytest.raises(tb.UnsupportedArrayError, match="Convert its fields: ") as caught:
        tree.to_numpy({"c": x})
    cure = str(caught.value).partition("Convert its fields: ")[2].partition(";")[0]
    made = eval(cure, {"x": x, "tensorbridge": tb})
    assert made["id"].tolist() == [BIG]
    assert made["w"].tolist() == [0.5]


@pytest.mark.parametrize(
    "make", [lambda: pa.array([["a"], ["b"]]), lambda: pl.Series([["a"], ["b"]])], ids=["arrow", "polars"]
)
def test_no_cure_is_said_for_text_in_lists_but_to_leave_it_out(make):
    with pytest.raises(tb.UnsupportedArrayError, match=r"text is not a number\.\nLeave the column out"):
        tb.to_numpy(make())


def test_labels_are_not_told_to_leave_out_a_column():
    with pytest.raises(tb.UnsupportedArrayError, match=r'Convert x.astype\("int64"\) and keep the unit beside it\.$'):
        tb.to_numpy(pd.DatetimeIndex([MOMENT]))
    with pytest.raises(tb.UnsupportedArrayError, match=r"Convert np\.where.* or x\.dropna\(\)\.astype.*beside it\.$"):
        tb.to_numpy(pd.DatetimeIndex([MOMENT, None]))


def test_an_interval_of_months_and_days_is_no_one_number():
    with pytest.raises(tb.UnsupportedArrayError, match=r"\nLeave the column out"):
        tb.to_numpy(pa.array([(1, 2, 3)], pa.month_day_nano_interval()))


SELECTED = {
    "arrow": (pa.table, 'table.select(["name", ...])', lambda x: x.select(["n", "b"])),
    "pandas": (
        pd.DataFrame,
        'df.select_dtypes(["number", "bool"], exclude="timedelta")',
        lambda x: x.select_dtypes(["number", "bool"], exclude="timedelta"),
    ),
    "polars": (
        pl.DataFrame,
        "df.select(polars.selectors.integer() | polars.selectors.float() | polars.selectors.boolean())",
        lambda x: x.select(pl.selectors.integer() | pl.selectors.float() | pl.selectors.boolean()),
    ),
}


NO_NUMBERS = {
    "text": ["a", "b"],
    "moments": [MOMENT, MOMENT],
    "dates": [datetime.date(2020, 1, 1)] * 2,
    "durations": [datetime.timedelta(1)] * 2,
    "decimals": [decimal.Decimal("1.5")] * 2,
}


@pytest.mark.parametrize("column", NO_NUMBERS)
@pytest.mark.parametrize("name", SELECTED)
def test_a_table_with_text_or_dates_says_how_to_go_on_without(name, column):
    make, said, select = SELECTED[name]
    frame = make({"n": [1, 2], "t": NO_NUMBERS[column], "b": [True, False]})
    with pytest.raises(
        tb.UnsupportedArrayError, match=rf"^batch\['t'\]: .*\n.*leave the column out: {re.escape(said)}"
    ):
        tree.to_torch(frame)
    made = tree.to_torch(select(frame))
    assert {n: t.dtype for n, t in made.items()} == {"n": torch.int64, "b": torch.bool}
