"""Lists of arrays: what only looks like the first item is not taken for it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from arrays import numbers
from torch.autograd import forward_ad

import tensorbridge as tb


def outgrown():
    t = torch.from_numpy(np.ones(6, "float32"))
    with pytest.raises(RuntimeError):
        t.resize_(4096)
    return t


def shrunk():
    """Strided, with room for as many elements as it has, but not where they are."""
    view = torch.zeros(8192)[::2]
    view.untyped_storage().resize_(4 * 4096)
    return view


NEARLY = {
    "requires grad": (torch.zeros, lambda t: t.requires_grad_()),
    "negative": (torch.zeros, lambda t: torch._neg_view(t + 2)),
    "transposed": (torch.zeros, lambda t: t.T.contiguous().T),
    "expanded": (torch.zeros, lambda t: t[:1, :1].expand(3, 4)),
    "subclass": (torch.zeros, lambda t: torch.nn.Parameter(t + 2)),
    "conjugate": (lambda *shape: torch.zeros(*shape, dtype=torch.complex64), lambda t: (t + 2j).conj()),
    "zero tensor": (torch.zeros, lambda t: torch._efficientzerotensor(3, 4)),
    "reversed array": (np.zeros, lambda a: a[::-1]),
    "read-only array": (np.zeros, lambda a: np.frombuffer(bytes(a), a.dtype).reshape(3, 4)),
    "big-endian array": (np.zeros, lambda a: a.astype(">f8")),
    "view of an array": (np.zeros, lambda a: np.ones((6, 4))[::2]),
    "bfloat16 array": (
        lambda shape: np.zeros(shape, ml_dtypes.bfloat16),
        lambda a: np.ones(a.shape, ml_dtypes.bfloat16),
    ),
}


@pytest.mark.parametrize("name", NEARLY)
def test_an_item_that_is_nearly_like_the_first_keeps_its_values_wherever_it_stands(name):
    make, change = NEARLY[name]
    for order in ([0, 1], [1, 0], [0, 0, 1, 0], [1, 1]):
        items = [change(make((3, 4))) if changed else make((3, 4)) for changed in order]
        expected = np.stack([numbers(item) for item in items])
        for convert in (tb.to_numpy, tb.to_torch):
            assert np.array_equal(numbers(convert(items)), expected), order


REFUSED = {
    "dtype": (lambda: torch.zeros(2, dtype=torch.float64), "different dtypes: float32, float64"),
    "shape": (lambda: torch.zeros(3), r"different shapes: \(2,\), \(3,\)"),
    "framework": (lambda: np.zeros(2, "float32"), "different frameworks: numpy, torch"),
    "number": (lambda: 1.0, "both numbers and arrays"),
    "nothing": (lambda: None, r"item \[2\]: None"),
    "sparse": (lambda: torch.zeros(2).to_sparse(), r"item \[2\]: torch sparse"),
    "functional": (lambda: torch._to_functional_tensor(torch.zeros(2)), r"item \[2\]: torch functional"),
    "outgrown": (outgrown, "its storage holds 24 B"),
    "shrunk": (shrunk, "its storage holds 16 384 B"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_item_that_cannot_be_stacked_is_found_behind_those_that_can(name):
    make, text = REFUSED[name]
    shape = (4096,) if name in ("outgrown", "shrunk") else (2,)
    with pytest.raises(tb.UnsupportedArrayError, match=text):
        tb.to_numpy([torch.zeros(shape), torch.zeros(shape), make()])


def test_an_item_with_a_tangent_is_found_behind_one_without():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        for items in ([torch.ones(2), dual], [dual, torch.ones(2)], [dual, dual]):
            with pytest.raises(tb.GraphError):
                tb.to_numpy(items, detach=False)
