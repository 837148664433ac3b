"""Python numbers: no memory yet, so they become what was asked for, or are refused. Arrays wrap, as in NumPy."""

from __future__ import annotations

import enum

import numpy as np
import pytest
import torch

import tensorbridge as tb
from tensorbridge._adapters import _numbers

INF, NAN = float("inf"), float("nan")


class Level(enum.IntEnum):
    HIGH = 300


def holds(name):
    info = np.iinfo(name)
    return f"it does not fit {name}, which holds {info.min} to {info.max}"


# name: the number, the dtype asked for, what it is called, the dtype that the message names
REFUSED = {
    "int": (2**40, "int32", "Python int 1099511627776", "int64"),
    "one too many": (128, "int8", "Python int 128", "uint8"),
    "negative": (-1, "uint8", "Python int -1", "int8"),
    "same kind": (300, "uint8", "Python int 300", "uint16"),
    "enum": (Level.HIGH, "int8", "Python int 300", "int16"),
    "for uint64": (2**63, "int64", "Python int 9223372036854775808", "uint64"),
    "for floats": (2**70, "int64", "Python int of 71 bits", "float64"),
    "negative for uint64": (-(2**63) - 1, "uint64", f"Python int {-(2**63) - 1}", "float64"),
    "nan": (NAN, "int64", "Python float nan", "float64"),
    "infinity": (-INF, "int32", "Python float -inf", "float64"),
    "float": (256.0, "uint8", "Python float 256.0", "uint16"),
    "float, int64": (2.0**63, "int64", "Python float 9.223372036854776e+18", "uint64"),
    "list": ([70000], "int16", "list of 1 numbers, item [0]: 70000", "int32"),
    "list of lists": ([[1, 40000], [2, 3]], "int16", "list of 4 numbers, item [0][1]: 40000", "uint16"),
    "list, both ends": ([200, -1], "uint8", "list of 2 numbers, item [1]: -1", "int16"),
    "tuple": ((1, 2, 2**63), "int64", "list of 3 numbers, item [2]: 9223372036854775808", "uint64"),
    "list of floats": ([0.5, NAN, 1.0], "int8", "list of 3 numbers, item [1]: nan", "float64"),
    "nan at the start": ([NAN, 0.5], "int8", "list of 2 numbers, item [0]: nan", "float64"),
    "floats and ints": ([0.5, 300], "uint8", "list of 2 numbers, item [1]: 300", "uint16"),
    "beside a float": ([0.5, 2**63], "int64", "list of 2 numbers, item [1]: 9223372036854775808", "uint64"),
    "beside a NumPy number": ([np.int8(1), 300], "int8", "list of 2 numbers, item [1]: 300", "int16"),
    "enums": ([Level.HIGH, 1], "int8", "list of 2 numbers, item [0]: 300", "int16"),
    "mixed signs, large": ([2**63, -1], "uint64", "list of 2 numbers, item [1]: -1", "float64"),
}
CALLS = {
    "to_numpy": lambda x, dtype: tb.to_numpy(x, dtype=dtype),
    "to_torch": lambda x, dtype: tb.to_torch(x, dtype=dtype),
    "plan": lambda x, dtype: tb.plan(x, "torch", dtype=dtype),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_number_that_does_not_fit_the_integers_asked_for_is_refused_with_a_dtype_that_works(name, call):
    number, dtype, what, cure = REFUSED[name]
    with pytest.raises(tb.UnsupportedArrayError) as raised:
        CALLS[call](number, dtype)
    asked = f"to_{'numpy' if call == 'to_numpy' else 'torch'}(dtype={dtype!r})"
    assert str(raised.value) == f'{asked}: {what} cannot be converted: {holds(dtype)}.\nSay dtype="{cure}".'
    works = tb.to_numpy(number, dtype=cure)
    assert np.array_equal(works, np.array(number, dtype=cure), equal_nan=cure == "float64")
    assert np.array_equal(works, tb.to_torch(number, dtype=cure), equal_nan=cure == "float64")


def test_into_out_the_message_asks_for_another_out():
    with pytest.raises(tb.UnsupportedArrayError, match=r"does not fit int8.*\nGive an out of dtype \"int16\"\."):
        tb.to_numpy([300, -1], out=np.zeros(2, "int8"))
    with pytest.raises(tb.UnsupportedArrayError, match="does not fit uint8"):
        tb.to_torch(-1, out=torch.zeros((), dtype=torch.uint8))


INTEGERS = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_the_ends_of_every_integer_dtype_fit_and_what_is_next_to_them_does_not(dtype):
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    assert tb.to_numpy([least, most], dtype=dtype).tolist() == tb.to_torch([least, most], dtype=dtype).tolist()
    assert tb.to_numpy([least, most], dtype=dtype).tolist() == [least, most]
    assert [tb.to_numpy(n, dtype=dtype).item() for n in (least, most)] == [least, most]
    for number in (least - 1, most + 1):
        for source in (number, [number], [[0], [number]]):
            with pytest.raises(tb.UnsupportedArrayError, match=f"does not fit {dtype}"):
                tb.to_numpy(source, dtype=dtype)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2", "uint2"])
def test_numbers_of_a_few_bits_are_checked_too(dtype):
    most = (1 << int(dtype[-1]) - dtype.startswith("int")) - 1
    assert int(tb.to_numpy(most, dtype=dtype)) == most
    with pytest.raises(tb.UnsupportedArrayError, match=f"does not fit {dtype}"):
        tb.to_numpy([most + 1], dtype=dtype)


BESIDE = {
    "a float": [2**53 + 1, 0.5],
    "a complex number": [0.5j, 2**53 + 1],
    "a float of NumPy": [np.int64(2**53 + 1), np.float64(0.5)],
    "an int of another sign": [np.int64(-1), np.uint64(2**53 + 1)],
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("convert", [tb.to_numpy, tb.to_torch])
def test_an_int_that_is_no_float_is_not_rounded_for_what_stands_beside_it(name, convert):
    with pytest.raises(tb.UnsupportedArrayError) as caught:
        convert([BESIDE[name]])
    assert "item [0][" in str(caught.value)
    assert "it would be 9007199254740992" in str(caught.value)
    wanted = "complex128" if "complex" in name else "float64"
    assert str(caught.value).endswith(f'Say dtype="{wanted}".')
    assert tb.to_numpy(convert([BESIDE[name]], dtype=wanted)).dtype == wanted
    assert tb.to_numpy(convert([2**53, 2**60, 0.5])).tolist() == [2**53, 2**60, 0.5]


@pytest.mark.parametrize("number", [127.9, -128.9, [0.5, 127.9], [True, 1.5]], ids=str)
def test_a_float_loses_its_fraction_as_in_the_frameworks(number):
    assert tb.to_torch(number, dtype="int8").tolist() == np.trunc(number).tolist()


@pytest.mark.parametrize("beside", [0.5, np.float64(0.5), np.float32(0.5)], ids=str)
def test_an_int_beside_floats_is_not_rounded_on_its_way_to_integers(beside):
    for number, dtype in ((2**53 + 1, "int64"), (2**63 - 1, "int64"), (2**64 - 1, "uint64")):
        assert tb.to_numpy([beside, number], dtype=dtype).tolist() == [0, number]
        assert tb.to_torch([beside, number], dtype=dtype).tolist() == [0, number]


@pytest.mark.parametrize("number", [True, [True, False], 300, [300], NAN, [NAN, 300], 300.0], ids=str)
def test_bools_and_floats_hold_every_number(number):
    assert np.array_equal(tb.to_numpy(number, dtype="bool"), np.array(number).astype(bool))
    assert np.array_equal(tb.to_numpy(number, dtype="float16"), np.array(number, "float16"), equal_nan=True)


def test_arrays_and_numbers_of_numpy_wrap_as_in_numpy():
    for source in (np.array([300, -1]), np.array(300), np.int64(300), [np.int64(300), np.int64(-1)]):
        assert np.array_equal(tb.to_numpy(source, dtype="uint8"), np.asarray(source).astype("uint8"))
    assert tb.to_torch([np.array([300])], dtype="uint8").tolist() == [[44]]
    for source in (np.float64(300), [np.float64(300)], [np.float64(300), 1]):
        assert tb.to_numpy(source, dtype="uint8").dtype == "uint8"


@pytest.mark.parametrize("number", [300 + 1j, [1j, 300], [1j, 2**70]], ids=str)
def test_of_complex_numbers_the_imaginary_part_is_what_is_in_the_way(number):
    with pytest.raises(tb.UnsupportedArrayError, match="imaginary part"):
        tb.to_numpy(number, dtype="int8")


# -- Ints beyond int64

BIG = {
    "uint64": (2**63, f"Python int {2**63}", "uint64"),
    "floats": (2**70, "Python int of 71 bits", "float64"),
    "negative": (-(2**63) - 1, f"Python int {-(2**63) - 1}", "float64"),
    "list": ([1, 2**63], "list of 2 numbers, item [1]: 9223372036854775808", "uint64"),
    "list with a negative": ([2**63, -1], "list of 2 numbers, item [0]: 9223372036854775808", "float64"),
    "list with a float": ([1.5, 2**63], "list of 2 numbers, item [1]: 9223372036854775808", "float64"),
    "list with a NumPy number": ([np.int8(1), 2**63], "list of 2 numbers, item [1]: 9223372036854775808", "float64"),
    "list with a complex": ([1j, 2**63], "list of 2 numbers, item [1]: 9223372036854775808", "complex128"),
    "list of lists": ([[1], [2**70]], "list of 2 numbers, item [1][0]: int of 71 bits", "float64"),
}


@pytest.mark.parametrize("name", BIG)
def test_an_int_beyond_int64_is_refused_with_a_dtype_that_works(name):
    number, what, cure = BIG[name]
    with pytest.raises(tb.UnsupportedArrayError) as raised:
        tb.to_torch(number)
    why = "a Python integer is int64 here, and this one does not fit"
    assert str(raised.value) == f'to_torch: {what} cannot be converted: {why}.\nSay dtype="{cure}".'
    assert np.array_equal(tb.to_numpy(number, dtype=cure), np.array(number).astype(cure))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "bool", "complex64"])
@pytest.mark.parametrize("number", [2**70, [2**70], [[2**70, -1], [0.5, 1]], [2**70, np.int8(1)]], ids=str)
def test_what_floats_hold_is_taken_where_floats_are_asked_for(number, dtype):
    t = tb.to_torch(number, dtype=dtype)
    assert str(t.dtype) == f"torch.{dtype}"
    assert torch.equal(t, torch.from_numpy(np.array(number, "float64")).to(t.dtype))


@pytest.mark.parametrize("dtype", [None, "float64", "int8", "uint64"])
@pytest.mark.parametrize("number", [10**400, [10**400], [1.5, -(10**400)], [NAN, 10**400], 10**5000], ids=lambda _: "")
def test_an_int_that_no_dtype_holds_is_refused(number, dtype):
    with pytest.raises(tb.UnsupportedArrayError, match=r"does not fit.*\nNo element type holds it: scale it"):
        tb.to_torch(number, dtype=dtype)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize(
    "other", [np.float64("nan"), np.float64(300.5), np.float32(300.5), np.int64(300), np.uint64(300)]
)
@pytest.mark.parametrize("first", [True, 1, 0.5])
def test_numpys_numbers_in_a_list_are_cast_as_an_array_is_whatever_is_beside_them(first, other):
    made = tb.to_numpy([first, other], dtype="int8")
    assert made.tolist() == np.array([first, other]).astype("int8").tolist()


def test_floats_are_not_asked_one_by_one_whether_they_are_ints_that_would_be_rounded(monkeypatch):
    """A million of them would cost a second."""
    asked = []
    monkeypatch.setattr(_numbers, "_is_rounded", lambda x: asked.append(x))
    tb.to_numpy([0.5, 2, True, 1.5])
    assert asked == [2]
    tb.to_numpy([0.5, True, np.float32(1), 1j])
    assert asked == [2]
