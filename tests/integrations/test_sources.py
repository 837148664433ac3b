"""docs/sources.md: the rows and recipes about other libraries are what those libraries do."""

from __future__ import annotations

import dask
import dask.array
import h5py
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import safetensors.numpy
import safetensors.torch
import scipy.sparse
import tifffile
import torch
import xarray
import zarr
from source_rows import RECIPES, ROWS, WRITTEN, Source, assert_row_is_true, put
from test_sources_page import SOURCES as PLAIN

import tensorbridge as tb
from tensorbridge import tree

pytestmark = pytest.mark.filterwarnings("ignore:Can't acquire a memory view:FutureWarning")
A = np.arange(6.0).reshape(3, 2)
INTEGERS = pd.Series([1, 2], dtype="int64[pyarrow]")


def put_first(x):
    x.iloc[0] = WRITTEN


def hdf5(dtype=None):
    def make(folder):
        file = h5py.File(folder / "x.h5", "w")
        file["x"] = A.astype(dtype or A.dtype)
        return file["x"]

    return make


def zipped(folder):
    return h5py.File(folder / "x.h5", "w").create_dataset("x", data=A, chunks=(1, 2), compression="gzip")


def groups(folder):
    file = h5py.File(folder / "groups.h5", "w")
    file["x"] = A
    file["inner/x"] = A + 1
    return file


def zarr_groups(folder):
    group = zarr.open_group(folder / "groups.zarr", mode="w")
    group.create_array("x", data=A)
    group.create_group("inner").create_array("x", data=A + 1)
    return group


def stored(folder):
    return zarr.create_array(folder / "x.zarr", data=A, chunks=(2, 2))


def dataset(folder, **options):
    xarray.Dataset({"x": (("i", "j"), A)}).to_zarr(folder / "set.zarr", consolidated=False)
    return xarray.open_dataset(folder / "set.zarr", engine="zarr", consolidated=False, **options)


def tiff(byteorder):
    def make(folder):
        tifffile.imwrite(folder / "x.tif", A.astype(byteorder + "u2"), byteorder=byteorder)
        return tifffile.imread(folder / "x.tif")

    return make


def tensors(module, x):
    def make(folder):
        module.save_file({"x": x}, folder / "x.safetensors")
        return module.load_file(folder / "x.safetensors")["x"]

    return make


SOURCES = {
    "pandas `Series`, column, `Index`": [
        Source(lambda _: pd.Series([1.0, 2.0]), put_first),
        Source(lambda _: pd.DataFrame({"a": [1, 2], "b": [3, 4]})["a"], put_first),
        Source(lambda _: pd.Index([1, 2])),
        Source(lambda _: pd.RangeIndex(3)),
    ],
    "pandas nullable column without NA": [Source(lambda _: pd.Series([1, 2], dtype="Int64"), put_first)],
    "pandas Arrow column in one chunk": [Source(lambda _: pd.Series([1, 2], dtype="int64[pyarrow]"))],
    "pandas `DataFrame` in one block": [
        Source(lambda _: pd.DataFrame(A.copy()), put_first),
        Source(lambda _: pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]}), put_first),
    ],
    "pandas `DataFrame` of one dtype in several blocks": [
        Source(lambda _: pd.DataFrame(A.copy()).assign(later=0.5), put_first)
    ],
    "pandas `DataFrame` of several dtypes": [Source(lambda _: pd.DataFrame({"a": [1.0], "b": [1]}))],
    "pandas categories that are numbers": [Source(lambda _: pd.Series([3, 4, 3], dtype="category"))],
    "polars `Series`, pyarrow `Array`, `ChunkedArray` of one chunk": [
        Source(lambda _: pl.Series([1.0, 2.0])),
        Source(lambda _: pa.array([1.0, 2.0])),
        Source(lambda _: pa.chunked_array([[1.0, 2.0]])),
    ],
    "several chunks: pandas Arrow column, polars, pyarrow": [
        Source(lambda _: pd.concat([INTEGERS, INTEGERS])),
        Source(lambda _: pl.concat([pl.Series([1, 2]), pl.Series([3])], rechunk=False)),
        Source(lambda _: pa.chunked_array([[1, 2], [3]])),
    ],
    "booleans of polars, pyarrow": [
        Source(lambda _: pl.Series([True, False])),
        Source(lambda _: pa.array([True, False])),
    ],
    "polars `DataFrame`, pyarrow `Table`": [
        Source(lambda _: pl.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]})),
        Source(lambda _: pa.table({"a": [1.0, 2.0], "b": [3.0, 4.0]})),
    ],
    "pyarrow dictionary of numbers": [Source(lambda _: pa.array([5, 6, 5]).dictionary_encode())],
    "NA or null: pandas, polars, pyarrow": [
        Source(lambda _: pd.Series([1, None], dtype="Int64")),
        Source(lambda _: pd.Series([1, None], dtype="int64[pyarrow]")),
        Source(lambda _: pl.Series([1, None])),
        Source(lambda _: pa.array([1, None])),
    ],
    "JAX array on the CPU": [Source(lambda _: jnp.arange(3.0))],
    "h5py `Dataset`, zarr `Array`": [Source(hdf5(), put), Source(zipped, put), Source(stored, put)],
    "what h5py or zarr read: `x[...]`": [
        Source(lambda folder: hdf5()(folder)[...], put),
        Source(lambda folder: hdf5()(folder)[:2], put),
        Source(lambda folder: hdf5(">f8")(folder).astype("float64")[...], put),
        Source(lambda folder: stored(folder)[...], put),
    ],
    "h5py `Dataset`, big-endian": [Source(hdf5(">f8"), put)],
    "xarray `DataArray` in memory": [
        Source(lambda _: xarray.DataArray(A.copy()), put),
        Source(lambda folder: dataset(folder)["x"].load(), put),
        Source(lambda folder: dataset(folder, chunks={})["x"].load(), put),
    ],
    "xarray `DataArray` from a file, lazy": [Source(lambda folder: dataset(folder)["x"], put)],
    "xarray `DataArray` from a file with `cache=False`, or over dask": [
        Source(lambda folder: dataset(folder, cache=False)["x"]),
        Source(lambda folder: dataset(folder, chunks={})["x"]),
    ],
    "h5py `File`, `Group`; zarr `Group`": [
        Source(groups),
        Source(lambda folder: groups(folder)["inner"]),
        Source(zarr_groups),
    ],
    "xarray `Dataset`": [Source(dataset)],
    "dask array": [
        Source(lambda _: dask.array.from_array(A, chunks=2)),
        Source(lambda _: dask.array.from_array(A, chunks=-1)),
        Source(lambda _: dask.array.ones((3, 2), chunks=2) + 1),
    ],
    "`tifffile.imread(path)`": [Source(tiff("<"), put), Source(tiff(">"), put)],
    "`load_file` of safetensors, for NumPy and torch": [
        Source(tensors(safetensors.numpy, A), put),
        Source(tensors(safetensors.torch, torch.ones(3)), put),
    ],
    "sparse array of SciPy": [
        Source(lambda _: scipy.sparse.csr_array(A)),
        Source(lambda _: scipy.sparse.coo_matrix(A)),
    ],
}
CASES = [(row, number) for row, sources in SOURCES.items() for number in range(len(sources))]


@pytest.mark.parametrize(("row", "number"), CASES)
def test_row_of_the_page_is_what_the_library_does(row, number, tmp_path):
    assert_row_is_true(row, SOURCES[row][number], tmp_path)


def test_every_row_of_the_page_is_held_here_or_there():
    assert {**PLAIN, **SOURCES}.keys() == ROWS.keys()


@pytest.mark.parametrize("make", [groups, zarr_groups])
def test_a_tree_reads_groups_into_dicts(make, tmp_path):
    made = tree.to_torch(make(tmp_path))
    assert sorted(made) == ["inner", "x"]
    assert made["x"].tolist() == A.tolist()
    assert made["inner"]["x"].tolist() == (A + 1).tolist()


@pytest.mark.parametrize("link", ["self", "inner/up", "inner/more/up"])
def test_a_group_that_contains_itself_is_refused(link, tmp_path):
    file = groups(tmp_path)
    file.create_group("inner/more")
    file[link] = file["inner"] if link.startswith("inner") else file["/"]
    with pytest.raises(tb.UnsupportedArrayError, match="a tree that contains itself has no end"):
        tree.to_torch(file)


@pytest.mark.parametrize("library", RECIPES)
def test_recipe_on_the_page_runs(library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(RECIPES[library], f"docs/sources.md, {library}", "exec"), {})


def test_lazy_array_that_its_library_caches_counts_as_shared(tmp_path):
    """The plan reads the file; what has been read is there when the file is gone."""
    x = dataset(tmp_path)["x"]
    assert tb.plan(x, "torch").zero_copy
    (tmp_path / "set.zarr").rename(tmp_path / "gone")
    assert tb.to_torch(x).tolist() == A.tolist()


ASKS = {
    "to_numpy": tb.to_numpy,
    "to_torch": tb.to_torch,
    "copy": lambda x: tb.to_torch(x, copy=True),
    "out": lambda x: tb.to_torch(x, out=torch.empty(4, dtype=torch.float64)),
    "plan": lambda x: tb.plan(x, "torch"),
    "describe": tb.describe,
    "tree": lambda x: tree.to_torch({"x": x}),
}


@pytest.mark.parametrize("ask", ASKS)
def test_dask_computes_once_for_each_ask_and_warns(ask):
    computed = []

    def block(x):
        computed.append(1)
        return x + 1

    x = dask.array.from_array(np.zeros(4), chunks=-1).map_blocks(block, dtype="float64", meta=np.zeros(0))
    with dask.config.set(scheduler="synchronous"), pytest.warns(FutureWarning, match="memory view"):
        ASKS[ask](x)
    assert len(computed) == 1


def test_what_pandas_writes_in_place_later_is_seen_in_what_it_lent():
    x = pd.DataFrame({"a": [1.0, 2.0]})
    lent = tb.to_numpy(x["a"])
    x.loc[0, "a"] = WRITTEN
    assert lent.tolist() == [WRITTEN, 2.0]
    assert not lent.flags.writeable


def test_nat_of_pandas_becomes_the_least_integer():
    x = pd.Series(pd.to_datetime(["1970-01-02", None])).astype("datetime64[s]")
    assert tb.to_numpy(x.astype("int64")).tolist() == [86400, -(2**63)]
    assert tb.to_numpy(x.dropna().astype("int64")).tolist() == [86400]


def test_a_tiff_is_mapped_for_writing_unless_told_otherwise(tmp_path):
    tiff("<")(tmp_path)
    tb.to_torch(tifffile.memmap(tmp_path / "x.tif")).zero_()
    assert not tifffile.imread(tmp_path / "x.tif").any()
    assert not tb.plan(tifffile.memmap(tmp_path / "x.tif", mode="r"), "torch").zero_copy


def test_bfloat16_of_safetensors_is_that_of_ml_dtypes(tmp_path):
    x = tensors(safetensors.numpy, np.ones(3, ml_dtypes.bfloat16))(tmp_path)
    assert x.dtype == ml_dtypes.bfloat16
    assert tb.plan(x, "torch").zero_copy


def test_what_safetensors_saves_of_numpy_and_torch(tmp_path):
    with pytest.raises(AttributeError, match="float8"):
        tensors(safetensors.numpy, np.ones(3, ml_dtypes.float8_e4m3fn))(tmp_path)
    with pytest.raises(ValueError, match="contiguous"):
        safetensors.torch.save_file({"x": tb.to_torch(A.T)}, tmp_path / "x")
    backward = np.arange(8.0)[3::-1]
    assert tensors(safetensors.numpy, backward)(tmp_path).tolist() != backward.tolist()


def test_containers_of_xarray_are_given_as_dicts(tmp_path):
    containers = dataset(tmp_path).assign_coords(i=[1, 2, 3])
    for x in (containers, containers.data_vars, containers.coords):
        with pytest.raises(tb.UnsupportedArrayError, match=r"dict\(x\)"):
            tree.to_torch({"set": x})
        assert {name: t.tolist() for name, t in tree.to_torch(dict(x)).items()} in ({"x": A.tolist()}, {"i": [1, 2, 3]})


def test_a_null_dataset_of_hdf5_is_told_as_such_and_named(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["full"], file["inner/none"], file["one"] = A, h5py.Empty("f4"), 2.5
        for x in (file["inner/none"], file["inner/none"][()]):
            for convert in (tb.to_numpy, tb.to_torch, lambda x: tb.plan([x], "torch")):
                with pytest.raises(tb.UnsupportedArrayError, match="null dataset of HDF5 holds no elements") as caught:
                    convert(x)
            cure = str(caught.value).partition("stand for it: ")[2].removesuffix(".")
            a = eval(cure, {"numpy": np, "x": x})
            assert (tb.to_torch(a).shape, tb.to_torch(a).dtype) == ((0,), torch.float32)
        for walk in (tree.to_torch, lambda x: tree.plan(x, "torch")):
            with pytest.raises(tb.UnsupportedArrayError, match=r"^batch\['inner'\]\['none'\]: .*null dataset"):
                walk(file)
        del file["inner/none"]
        assert tree.to_torch(file)["one"] == 2.5
