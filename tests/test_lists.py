"""Lists of arrays: what only looks like the first item is not taken for it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from arrays import numbers
from torch.autograd import forward_ad

import tensorbridge as tb
from tensorbridge._adapters import _python
from tensorbridge._array import Device, Traits


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


def parts(*dtypes):
    return [np.arange(3).astype(dtype) for dtype in dtypes]


@pytest.mark.parametrize(
    "dtypes", [("float32", "float64"), ("int64", "float32", "bool"), (">f4", "int8"), ("float16", ml_dtypes.bfloat16)]
)
def test_arrays_of_several_dtypes_are_stacked_in_the_one_that_is_asked_for(dtypes):
    items = parts(*dtypes)
    expected = np.stack([item.astype("float32") for item in items])
    for convert in (tb.to_numpy, tb.to_torch):
        made = convert(items, dtype="float32")
        assert tb.describe(made).dtype == "float32"
        assert np.array_equal(numbers(made), expected)
    assert tb.plan(items, "torch", dtype="float32").bytes_moved == expected.nbytes  # each element is written once
    assert "which casts its parts, of several dtypes, to float32" in str(tb.plan(items, "torch", dtype="float32"))
    out = torch.zeros(expected.shape)
    tb.to_torch(items, out=out)
    assert np.array_equal(out.numpy(), expected)
    with pytest.raises(tb.UnsupportedArrayError, match="different dtypes"):
        tb.to_torch(items)


TENSORS = {
    "floats": ("float32", "float64"),
    "ints beside floats": ("int64", "float16", "bool"),
    "small floats": ("float16", "bfloat16"),
    "not in C's order": ("int8", "float64"),
}


@pytest.mark.parametrize("to", ["torch", "numpy"])
@pytest.mark.parametrize("wanted", ["float32", "int16", "complex64"])
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_several_dtypes_are_stacked_in_the_one_that_is_asked_for(name, wanted, to):
    items = [torch.arange(6).to(getattr(torch, dtype)).reshape(2, 3) for dtype in TENSORS[name]]
    if name == "not in C's order":
        items = [item.T for item in items]
    convert = {"torch": tb.to_torch, "numpy": tb.to_numpy}[to]
    expected = torch.stack([item.to(getattr(torch, wanted)) for item in items])
    made = convert(items, dtype=wanted)
    assert tb.describe(made).dtype == wanted
    assert np.array_equal(numbers(made), expected.numpy())
    casts = {"integral": wanted, "real floating": wanted, "bool": wanted}
    assert np.array_equal(numbers(convert(items, dtype=casts)), expected.numpy())
    plan = tb.plan(items, to, dtype=casts)
    assert plan == tb.plan(items, to, dtype=wanted)
    assert [step.op for step in plan.steps if step.kind] == ["stack"]  # each element is written once
    assert plan.bytes_moved == expected.nbytes
    assert f"by torch, which casts its parts, of several dtypes, to {wanted}" in str(plan)
    with tb.trace() as seen:
        convert(items, dtype=casts)
    assert seen.totals.nbytes == expected.nbytes
    with pytest.raises(tb.CopyRequiredError):
        convert(items, dtype=casts, copy=False)
    with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError):
        convert(items, dtype=casts)


def test_tensors_of_several_dtypes_fill_out():
    items = [torch.ones(2, 3), torch.arange(6).reshape(2, 3)]
    out = torch.zeros(2, 2, 3, dtype=torch.float64)
    assert tb.to_torch(items, out=out) is out
    assert torch.equal(out, torch.stack([item.double() for item in items]))


@pytest.mark.parametrize("dtype", ["float32", {"real floating": "float32"}])
def test_tensors_of_several_dtypes_in_a_graph_are_cast_one_by_one(dtype):
    """Filling a part of a tensor is a node that keeps all of it: the gradient would be copied once a part."""
    items = [torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.float64)]
    made = cured(items, tb.to_torch, dtype=dtype)
    assert (made.dtype, made.requires_grad) == (torch.float32, True)


def test_cupy_arrays_of_several_dtypes_are_cast_one_by_one():
    kinds = [(Traits("cupy", Device("cuda:0"), dtype), None) for dtype in ("float32", "float64")]
    assert not _python._are_cast_at_once(kinds, "float32")
    assert _python._are_cast_at_once([(t._replace(framework="torch"), info) for t, info in kinds], "float32")


def test_conjugate_tensors_of_several_dtypes_are_stacked_by_value():
    items = [torch.tensor([1 + 2j]).conj(), torch.tensor([1.5], dtype=torch.float64), torch.tensor([3j]).conj().imag]
    assert tb.to_torch(items, dtype="complex128").tolist() == [[1 - 2j], [1.5], [-3]]


def test_no_integer_goes_by_way_of_a_float_that_cannot_hold_it():
    big = 2**53 + 1
    items = [np.array([big], "int64"), np.array([big], "uint64"), np.array([True])]
    assert tb.to_torch(items, dtype="int64").tolist() == [[big], [big], [1]]


def test_a_cast_of_one_of_several_warns_at_the_callers_line():
    with pytest.warns(RuntimeWarning, match="overflow encountered in cast") as seen:
        tb.to_torch([np.array([1e300]), np.ones(1, "float32")], dtype="float32")
    assert [w.filename for w in seen] == [__file__]


def test_an_imaginary_part_is_not_dropped_from_one_of_several():
    with pytest.raises(tb.UnsupportedArrayError, match='Say dtype="complex128"'):
        tb.to_torch([np.ones(2), np.ones(2, "complex64")], dtype="float32")


CURED = {
    "dtypes": parts("float32", "float64"),
    "dtypes that have no common one": parts("float16", ml_dtypes.bfloat16),
    "dtypes of which torch has no common one": parts("float32", "longdouble"),
    "dtypes of tensors": [torch.zeros(3), torch.zeros(3, dtype=torch.float64)],
    "dtypes of tensors in a graph": [torch.zeros(3), torch.zeros(3, dtype=torch.float64, requires_grad=True)],
    "frameworks": [np.zeros(2), torch.zeros(2).double()],
    "frameworks and dtypes": [np.zeros(2), torch.zeros(2)],
    "numbers": [0.5, torch.tensor(2.0).double()],
    "numbers and a narrow tensor": [torch.tensor(1.0), 2.0],
    "ints and a tensor": [torch.tensor(1.5), 2],
    "numbers, arrays and tensors": [np.float32(0.5), np.array(1), torch.tensor(2.0)],
}


def cured(x, convert, **options):
    """What the cure gives that is said where `x` is refused, followed to the letter."""
    with pytest.raises(tb.UnsupportedArrayError) as error:
        convert(x, **options)
    cure = str(error.value).splitlines()[1].rstrip(".")
    name = convert.__name__
    call = f"{name}(x, {cure.removeprefix('Say ')})" if cure.startswith("Say ") else cure.partition(": ")[2]
    return eval(call, {"to_torch": tb.to_torch, "to_numpy": tb.to_numpy, "x": x})


@pytest.mark.parametrize("convert", [tb.to_torch, tb.to_numpy])
@pytest.mark.parametrize("name", CURED)
def test_the_cure_of_a_mixed_list_works(name, convert):
    x = CURED[name]
    made = cured(x, convert)
    assert np.array_equal(numbers(made), np.stack([numbers(part) for part in x]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", {"real floating": "float32", "integral": "float32"}])
@pytest.mark.parametrize("name", ["dtypes of tensors in a graph", "frameworks", "ints and a tensor", "numbers"])
def test_the_cure_of_a_mixed_list_gives_the_dtype_that_was_asked_for(name, dtype):
    made = cured(CURED[name], tb.to_torch, dtype=dtype)
    assert tb.describe(made).dtype == (dtype if isinstance(dtype, str) else "float32")


def test_the_cure_of_a_list_of_tensors_gives_the_dtype_of_out():
    with pytest.raises(tb.UnsupportedArrayError, match=r'to_torch\(part, dtype="float32"\) for part'):
        tb.to_torch([torch.tensor(1.0), 2.0], out=torch.zeros(2))


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16, torch.complex32])
def test_the_cure_of_a_mixed_list_drops_no_imaginary_part(narrow, dtype):
    x = [torch.ones(2, dtype=narrow), torch.ones(2, dtype=torch.complex64)]
    assert cured(x, tb.to_torch, dtype=dtype).dtype.is_complex
    assert cured([x[0], np.ones(2, "complex64")], tb.to_torch, dtype=dtype).dtype.is_complex


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_the_cure_of_lists_in_lists_reaches_their_parts(depth):
    x = [[torch.tensor(1.5), 2], [3, torch.tensor(4)]]
    expected = np.array([[1.5, 2], [3, 4]])
    for _ in range(depth - 1):
        x, expected = [x, x], np.stack([expected, expected])
    assert np.array_equal(cured(x, tb.to_torch, dtype="float32"), expected)


def test_numbers_beside_arrays_that_have_axes_are_not_told_to_be_converted_one_by_one():
    with pytest.raises(tb.UnsupportedArrayError, match=r"of different shapes: \(\), \(2,\)\.\nPad the parts"):
        tb.to_torch([torch.zeros(2), 1.0])
