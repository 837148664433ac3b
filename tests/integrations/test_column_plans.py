"""A column that has to be copied is planned, guarded and counted as a copy; what is made of it is new."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import tensorbridge as tb


def arrow_pandas(values: Any, kind: Any) -> Any:
    return pd.Series(values, dtype=pd.ArrowDtype(kind))


COPIED = {
    "polars chunks": lambda: pl.concat([pl.Series([1, 2]), pl.Series([3])], rechunk=False),
    "polars truths": lambda: pl.Series([True, False]),
    "polars lists in chunks": lambda: pl.concat([pl.Series([[1]]), pl.Series([[3]])], rechunk=False),
    "polars frame": lambda: pl.DataFrame([pl.Series("a", [1])]).with_columns(b="a"),  # neighbours in memory are shared
    "pandas arrow truths": lambda: pd.Series([True, False], dtype="bool[pyarrow]"),
    "pandas arrow chunks": lambda: arrow_pandas(pa.chunked_array([[1], [2]]), pa.int64()),
    "pandas categories": lambda: pd.Series([1.5, 2.5], dtype="category"),
    "pandas category index": lambda: pd.CategoricalIndex([1, 2]),
    "pandas sparse": lambda: pd.Series(pd.arrays.SparseArray([0.0, 0.0, 1.0], fill_value=0.0)),
    "pandas frame": lambda: pd.DataFrame({"a": [1]}).assign(b=2),
    "pandas frame of categories": lambda: pd.DataFrame({"a": [1, 2]}, dtype="category"),
    "pandas masked frame": lambda: pd.DataFrame({"a": [1], "b": [2]}, dtype="Int64"),
    "arrow truths": lambda: pa.array([True, False]),
    "arrow chunks": lambda: pa.chunked_array([[1], [2]]),
    "arrow categories": lambda: pa.array([1, 2]).dictionary_encode(),
    "arrow bool8": lambda: pa.ExtensionArray.from_storage(pa.bool8(), pa.array([0, 1], pa.int8())),
    "arrow table": lambda: pa.table({"a": [1], "b": [2]}),
}


@pytest.mark.parametrize("name", COPIED)
def test_a_column_that_has_to_be_copied_is_planned_guarded_and_counted_as_a_copy(name):
    x = COPIED[name]()
    nbytes = tb.to_numpy(x).nbytes
    plan = tb.plan(x, "numpy")
    assert not plan.zero_copy
    assert plan.bytes_moved == nbytes > 0
    with tb.trace() as seen:
        tb.to_numpy(x)
    assert seen.totals.nbytes == nbytes
    for convert in (tb.to_numpy, tb.to_torch):
        with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError, match=f"would move {nbytes} B"):
            convert(x)
        with pytest.raises(tb.CopyRequiredError, match=f"{nbytes} B"):
            convert(x, copy=False)


JOINED, UNPACKED = "its chunks are joined into one array", "its booleans, which are single bits, are unpacked"
DECODED = "its categories are decoded: an array holds what they stand for"
BESIDE = "its columns are joined into one array, row after row"
WHY = {
    "polars chunks": JOINED,
    "polars truths": UNPACKED,
    "polars lists in chunks": JOINED,
    "polars frame": BESIDE,
    "pandas arrow truths": UNPACKED,
    "pandas arrow chunks": JOINED,
    "pandas categories": DECODED,
    "pandas category index": DECODED,
    "pandas sparse": "what a sparse column leaves out is filled in",
    "pandas frame": BESIDE,
    "pandas frame of categories": BESIDE,
    "pandas masked frame": BESIDE,
    "arrow truths": UNPACKED,
    "arrow chunks": JOINED,
    "arrow categories": DECODED,
    "arrow bool8": "its booleans, which are bytes of any value, are made True or False",
    "arrow table": BESIDE,
    "arrow lists of truths": UNPACKED,
    "polars arrays of truths": UNPACKED,
    "arrow chunks of truths": UNPACKED,
}
MORE = {
    "polars arrays of truths": lambda: pl.Series([[True]], dtype=pl.Array(pl.Boolean, 1)),
    "arrow lists of truths": lambda: pa.array([[True], [False]]),
    "arrow chunks of truths": lambda: pa.chunked_array([[True], [False]]),
}


@pytest.mark.parametrize("name", WHY)
def test_the_plan_of_a_column_says_what_has_to_be_done_to_it_and_speaks_of_no_list(name):
    x = (COPIED | MORE)[name]()
    for target in ("numpy", "torch"):
        plan = tb.plan(x, target)
        assert [step.why for step in plan.steps if step.kind] == [WHY[name]]
        assert "list" not in str(plan)
        kind = "table" if hasattr(x, "columns") else "column"
        assert str(plan).startswith(f"{kind} {plan.source.dtype} ")
    assert tb.describe(x).framework == kind


def test_every_column_that_has_to_be_copied_is_said_why():
    assert WHY.keys() >= COPIED.keys()


@pytest.mark.parametrize("name", COPIED)
def test_a_list_of_columns_is_stacked(name):
    x = COPIED[name]()
    one = tb.to_numpy(x)
    for result in (tb.to_numpy([x, x]), tb.to_torch([x, x])):
        assert str(result.dtype).removeprefix("torch.") == str(one.dtype)
        assert result.tolist() == [one.tolist()] * 2


@pytest.mark.parametrize("name", COPIED)
def test_what_is_made_of_a_column_is_new_and_writable(name):
    x = COPIED[name]()
    before = tb.to_numpy(x)
    assert before.flags.writeable
    again = tb.to_numpy(x)
    tb.to_torch(x).zero_()
    before[...] = 0
    assert tb.to_numpy(x).tolist() == again.tolist()
    assert not np.shares_memory(tb.to_numpy(x), again)


def test_a_plan_does_not_convert(monkeypatch):
    chunks = pl.concat([pl.Series([1, 2]), pl.Series([3])], rechunk=False)
    categories = pd.Series([1, 2], dtype="category")

    def convert(self: Any, *args: Any, **options: Any) -> Any:
        if len(self) and options.get("copy") is not False:
            raise AssertionError("converted")
        return real[type(self)](self, *args, **options)

    real = {kind: kind.__array__ for kind in (pl.Series, pd.Series)}
    for kind in real:
        monkeypatch.setattr(kind, "__array__", convert)
    for x in (chunks, categories):
        assert tb.plan(x, "numpy").bytes_moved == 8 * len(x)
        with pytest.raises(AssertionError, match="converted"):
            tb.to_numpy(x)
