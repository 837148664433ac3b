"""Memory that is there and is no array yet: behind a pointer, behind a lock. The cure in the message gives it."""

from __future__ import annotations

import ctypes
import multiprocessing

import numpy as np
import pytest

import tensorbridge as tb

NUMBERS = (ctypes.c_double * 3)(1, 2, 3)
POINTERS = {
    "to a number": (lambda: ctypes.cast(NUMBERS, ctypes.POINTER(ctypes.c_double)), "'&<d'", (3,)),
    "to an array": (lambda: ctypes.pointer(NUMBERS), "'&(3)<d'", (1,)),
}


@pytest.mark.parametrize("name", POINTERS)
def test_a_pointer_is_refused_with_the_call_that_says_how_much_lies_there(name):
    make, form, shape = POINTERS[name]
    x = make()
    with pytest.raises(tb.UnsupportedArrayError) as raised:
        tb.to_torch(x)
    assert str(raised.value) == (
        f"to_torch: {type(x).__name__} (buffer format {form!s}) cannot be converted: a pointer does not say how many "
        "elements lie there.\nConvert np.ctypeslib.as_array(x, shape)."
    )
    assert tb.to_torch(np.ctypeslib.as_array(x, shape)).ravel().tolist() == [1, 2, 3]


def test_of_an_array_of_pointers_each_is_converted():
    x = (ctypes.POINTER(ctypes.c_double) * 2)(NUMBERS, NUMBERS)
    with pytest.raises(
        tb.UnsupportedArrayError, match=r"\nConvert np\.ctypeslib\.as_array\(x\[i\], shape\) of each\.$"
    ):
        tb.to_numpy(x)
    assert tb.to_numpy(np.ctypeslib.as_array(x[1], (3,))).tolist() == [1, 2, 3]


def test_a_pointer_to_nothing_is_not_looked_behind():
    with pytest.raises(tb.UnsupportedArrayError, match="how many elements"):
        tb.to_numpy(ctypes.POINTER(ctypes.c_double)())


# -- Memory of multiprocessing, behind a lock

LOCKED = {
    "an array": lambda: multiprocessing.Array("d", [1.0]),
    "an array with a lock of its own": lambda: multiprocessing.Array("i", [1], lock=multiprocessing.Lock()),
    "a value": lambda: multiprocessing.Value("q", 1),
}


@pytest.mark.parametrize("name", LOCKED)
@pytest.mark.parametrize("to", ["numpy", "torch"])
def test_memory_behind_a_lock_is_refused_with_the_call_that_shares_it(name, to):
    x, convert = LOCKED[name](), {"numpy": tb.to_numpy, "torch": tb.to_torch}[to]
    with pytest.raises(tb.UnsupportedArrayError) as raised:
        convert(x)
    assert str(raised.value) == (
        f"to_{to}: {type(x).__name__} cannot be converted: it guards its memory by a lock, and gives no array.\n"
        "Convert x.get_obj(), the same memory; hold the lock, with x.get_lock(), while it is read or written."
    )
    with x.get_lock():
        a = convert(x.get_obj(), copy=False)
        a[...] = 7
    assert (x[0] if hasattr(x, "__getitem__") else x.value) == 7


def test_text_behind_a_lock_is_text():
    with pytest.raises(tb.UnsupportedArrayError, match="text is not an array"):
        tb.to_numpy(multiprocessing.Array("c", b"text"))
