"""Conjugate and negative bits across the bus: marks on a tensor, which torch's own copy may apply twice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import tensorbridge as tb

pytestmark = pytest.mark.gpu
LARGE = 1 << 20  # elements of complex64: beyond what the ring leaves alone
LAYOUTS = {"dense": lambda t: t, "strided": lambda t: t[::2], "transposed": lambda t: t.reshape(-1, 2).T}
MARKS = {
    "conj": lambda t: t.conj(),
    "neg": lambda t: t.conj().imag,
}


def values(n):
    return (np.arange(n) + 1j * np.arange(1, n + 1)).astype("c8")


def marked(torch, where, mark, layout, n=12):
    t = torch.from_numpy(values(n)).to(where)
    return LAYOUTS[layout](MARKS[mark](t))


def wanted(mark, layout, n=12):
    a = values(n).conj()
    a = a if mark == "conj" else a.imag
    return a[::2] if layout == "strided" else a.reshape(-1, 2).T if layout == "transposed" else a


@pytest.mark.parametrize(("mark", "layout"), [*itertools.product(MARKS, LAYOUTS)])
@pytest.mark.parametrize("n", [12, LARGE])
def test_what_comes_down_into_out_has_its_true_values(torch, mark, layout, n):
    x, true = marked(torch, "cuda", mark, layout, n), wanted(mark, layout, n)
    assert x.is_conj() or x.is_neg()
    assert np.array_equal(tb.to_numpy(x, out=np.empty_like(true, order="C")), true)
    assert np.array_equal(tb.to_numpy(x, out=np.empty_like(true, order="F")), true)
    assert np.array_equal(tb.to_numpy_async(x, pinned=True).result(30), true)
    for pinned in (False, True):
        out = torch.empty(true.shape, dtype=x.dtype, pin_memory=pinned)
        assert np.array_equal(tb.to_torch(x, out=out).numpy(), true)
    wide = "c16" if mark == "conj" else "f8"
    assert np.array_equal(tb.to_numpy(x, out=np.empty(true.shape, wide)), true)
    assert np.array_equal(tb.tree.to_numpy([x, x], out=[np.empty_like(true), np.empty_like(true)])[1], true)


@pytest.mark.parametrize(("mark", "layout"), [*itertools.product(MARKS, LAYOUTS)])
@pytest.mark.parametrize("n", [12, LARGE])
def test_what_goes_up_into_out_has_its_true_values(torch, cupy, mark, layout, n):
    x, true = marked(torch, "cpu", mark, layout, n), wanted(mark, layout, n)
    out = torch.empty(true.shape, dtype=x.dtype, device="cuda")
    for options in ({}, {"non_blocking": True}):
        assert np.array_equal(tb.to_torch(x, out=out.zero_(), **options).cpu().numpy(), true)
    assert np.array_equal(tb.tree.to_torch([x], out=[out.zero_()])[0].cpu().numpy(), true)
    assert np.array_equal(cupy.asnumpy(tb.to_cupy(x, out=cupy.empty(true.shape, true.dtype))), true)
    pinned = marked(torch, "cpu", mark, layout, n).clone().pin_memory()
    assert np.array_equal(tb.to_torch(pinned, out=out.zero_()).cpu().numpy(), true)


@pytest.mark.parametrize(("source", "target"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
@pytest.mark.parametrize(("mark", "layout"), [*itertools.product(MARKS, LAYOUTS)])
@pytest.mark.parametrize("n", [12, LARGE])
def test_an_out_that_has_such_a_bit_is_given_the_true_values(torch, source, target, mark, layout, n):
    true = wanted(mark, layout, n)
    x = torch.from_numpy(true.copy()).to(source)
    for pinned in {False, target == "cpu"}:
        memory = torch.zeros(n, dtype=torch.complex64, device=target, pin_memory=pinned)
        out = LAYOUTS[layout](MARKS[mark](memory))
        tb.to_torch(x, out=out)
        torch.cuda.synchronize()
        assert np.array_equal(out.cpu().resolve_conj().resolve_neg().numpy(), true)
        assert np.array_equal(tb.to_numpy(out), true)


@pytest.mark.parametrize(("mark", "layout"), [*itertools.product(MARKS, LAYOUTS)])
def test_other_ways_over_the_bus_give_the_true_values_too(torch, mark, layout):
    true = wanted(mark, layout)
    for grad in (False, True):
        x, up = marked(torch, "cuda", mark, layout), marked(torch, "cpu", mark, layout)
        x, up = x.requires_grad_(grad), up.requires_grad_(grad)
        assert np.array_equal(tb.to_numpy(x), true)
        down = tb.to_torch(x, device="cpu")
        assert np.array_equal(tb.to_numpy(down), true)
        assert np.array_equal(tb.to_numpy(tb.to_torch(up, device="cuda")), true)
        assert np.array_equal(tb.to_numpy(tb.to_torch(x, device="cpu", pin_memory=True)), true)
        assert np.array_equal(tb.to_numpy(tb.tree.to_torch([up, up], device="cuda")[0]), true)
        assert np.array_equal(tb.to_numpy(tb.tree.to_torch([x, x], device="cpu")[0]), true)
