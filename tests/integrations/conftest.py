"""Tests against the real libraries, which `make test-integrations` installs; without them they fail, not skip."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

import tensorbridge

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported

LIBRARIES = (
    "astropy", "attrs", "dask", "datasets", "h5py", "jax", "optree", "pandas", "pint", "polars", "pyarrow",
    "safetensors", "tifffile", "transformers", "unyt", "xarray", "zarr",
)  # fmt: skip
missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
if missing:
    raise pytest.UsageError(f"missing: {', '.join(missing)}; `make test-integrations` installs what these tests need")

HOME = os.path.join(os.path.dirname(tensorbridge.__file__), "")  # other libraries may lie in a clone of that name


@pytest.fixture(autouse=True)
def no_warnings(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """Converting warns of nothing: what is wrong is an error, what is right is silent."""
    yield
    ours = [str(w.message) for w in recwarn if w.filename.startswith(HOME)]
    assert not ours
