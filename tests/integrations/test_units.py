"""Quantities and masked arrays of the libraries that have them: refused, and the call that the error names works."""

from __future__ import annotations

from typing import Any

import astropy.units
import numpy as np
import pint
import pytest
import unyt
from astropy.table import Column
from astropy.utils.masked import Masked

import tensorbridge as tb

PINT: Any = pint.UnitRegistry()
QUANTITIES: dict[str, Any] = {
    "astropy": lambda: np.ones(2) * astropy.units.km,
    "a number of astropy": lambda: 3 * astropy.units.m,
    "a column of astropy": lambda: Column([1.0, 2.0], unit="m"),
    "unyt": lambda: unyt.unyt_array([1.0, 2.0], "km"),
    "a number of unyt": lambda: unyt.unyt_quantity(3.0, "m"),
    "pint": lambda: np.ones(2) * PINT.km,
    "a number of pint": lambda: 3 * PINT.m,
}
ROADS: dict[str, Any] = {
    "alone": tb.to_torch,
    "to NumPy": tb.to_numpy,
    "list": lambda x: tb.to_torch([x, x]),
    "tree": lambda x: tb.tree.to_torch({"x": x}),
    "collate": lambda x: tb.collate([x, x]),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", QUANTITIES)
def test_a_unit_is_not_dropped(name, road):
    x = QUANTITIES[name]()
    with pytest.raises(tb.UnsupportedArrayError, match="its unit would be lost") as caught:
        ROADS[road](x)
    number = x.magnitude if "x.magnitude" in str(caught.value) else x.value
    assert np.array_equal(tb.to_numpy(number), number)


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.ones(2) * astropy.units.dimensionless_unscaled,
        lambda: Column([1.0, 1.0]),
        lambda: unyt.unyt_array([1.0, 1.0], "dimensionless"),
        lambda: np.ones(2) * PINT.dimensionless,
    ],
    ids=["astropy", "a column of astropy", "unyt", "pint"],
)
def test_numbers_without_a_unit_are_converted(make):
    assert tb.to_torch(make()).tolist() == [1, 1]


@pytest.mark.parametrize("road", ROADS)
def test_a_mask_of_astropy_is_not_dropped(road):
    x = Masked(np.arange(3.0), mask=[True, False, False])
    with pytest.raises(tb.UnsupportedArrayError, match=r"the mask of a masked array would be lost.\n.*x\.filled"):
        ROADS[road](x)
    assert tb.to_torch(x.filled(-1.0)).tolist() == [-1, 1, 2]
    assert tb.to_torch(x.mask).tolist() == [True, False, False]
