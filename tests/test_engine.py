"""The copy engine: torch's kernels where they are better, and never at the price of other values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tensorbridge as tb
from tensorbridge import _dtypes, _engine
from tensorbridge._array import Traits
from tensorbridge._step import HERE

FLOATS = [name for name in _dtypes.DTYPES if "float" in name and _dtypes.exists_in(name, "torch")]
LOADED = HERE._replace(torch=True)


@pytest.mark.parametrize("source", [name for name in FLOATS if _dtypes.exists_in(name, "numpy")])
@pytest.mark.parametrize("wanted", [name for name in FLOATS if _dtypes.exists_in(name, "numpy")])
def test_values_of_a_cast_do_not_depend_on_whether_torch_is_loaded(source, wanted):
    """Where torch's kernel is chosen, it gives what NumPy's gives, out of range and between two values too."""
    choice = _engine.kernel(Traits("numpy", dtype=source, size="medium"), wanted, "C", LOADED)
    if choice.by == "numpy":
        return
    rng = np.random.default_rng(0)
    wide = np.concatenate(
        [
            rng.standard_normal(50_000) * 100,
            [0.0, -0.0, np.inf, -np.inf, np.nan, 1e9, -1e9, 448, 449, 65504, 65520, 1e-8],
        ]
    )
    with np.errstate(all="ignore"):
        a = wide.astype(_dtypes.DTYPES[source].numpy)
        by_numpy = a.astype(_dtypes.DTYPES[wanted].numpy)
    np.testing.assert_array_equal(tb.to_numpy(a, dtype=wanted).astype("float64"), by_numpy.astype("float64"))


def test_half_precision_is_cast_by_torch_where_it_is_loaded():
    half = Traits("numpy", dtype="float32")
    assert torch
    assert _engine.kernel(half, "float16", "C", LOADED).by == "torch"
    assert _engine.kernel(half, "float16", "C", HERE).by == "numpy"
    assert _engine.kernel(half, "float16", "C", LOADED._replace(worker=True)).by == "numpy"
    assert _engine.kernel(half._replace(dtype="float64"), "float16", "C", LOADED).by == "numpy"


def test_plain_copies_stay_with_numpy_and_large_transposes_go_to_torch():
    plain = Traits("numpy", size="large")
    assert _engine.kernel(plain, "float32", "C", LOADED).by == "numpy"
    assert _engine.kernel(plain, "float32", "F", LOADED).by == "torch"
    assert _engine.kernel(plain._replace(size="small"), "float32", "F", LOADED).by == "numpy"
