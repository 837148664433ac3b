"""Nothing lies: a result that is not what the source says, a source that changes behind its owner's back.

Lazy bits, tensors without data of their own, writes that autograd does not see, bytes read as something else, dtypes
and masks that get lost, sharing that depends on luck.
"""

from __future__ import annotations

import array
import contextlib
import warnings

import ml_dtypes
import numpy as np
import pytest
import torch
from _facts_probes import address
from _producers import Producer, laid_out

import tensorbridge as tb
from tensorbridge._dtypes import DTYPES

# -- Values that are not what the bytes say


def complex_pair(dtype=torch.complex64):
    return torch.tensor([1 + 2j, 3 - 4j], dtype=dtype)


LAZY = {  # a tensor with a mark on it, and its values
    "conj": (lambda: complex_pair().conj(), [1 - 2j, 3 + 4j]),
    "conj, double": (lambda: complex_pair(torch.complex128).conj(), [1 - 2j, 3 + 4j]),
    "conj, 0-d": (lambda: complex_pair()[0].conj(), 1 - 2j),
    "conj, strided": (lambda: complex_pair()[::2].conj(), [1 - 2j]),
    "conj, expanded": (lambda: complex_pair()[:1].conj().expand(3), [1 - 2j] * 3),
    "conj, in a graph": (lambda: complex_pair().requires_grad_().conj(), [1 - 2j, 3 + 4j]),
    "conj of conj": (lambda: complex_pair().conj().conj(), [1 + 2j, 3 - 4j]),
    "neg": (lambda: complex_pair().conj().imag, [-2, 4]),
    "neg, double": (lambda: complex_pair(torch.complex128).conj().imag, [-2, 4]),
    "neg, by itself": (lambda: torch._neg_view(torch.tensor([1.0, -2.0])), [-1, 2]),
    "neg, integers": (lambda: torch._neg_view(torch.tensor([1, -2])), [-1, 2]),
    "neg and conj": (lambda: torch._neg_view(complex_pair().conj()), [-1 + 2j, -3 - 4j]),
    "real of conj": (lambda: complex_pair().conj().real, [1, 3]),
    "zero": (lambda: torch._efficientzerotensor(3), [0, 0, 0]),
    "zero, complex conj": (lambda: torch._efficientzerotensor(2, dtype=torch.complex64).conj(), [0, 0]),
    "zero, transposed": (lambda: torch._efficientzerotensor((2, 3)).T, [[0, 0]] * 3),
    "of an inference": (lambda: inference(lambda: complex_pair().conj()), [1 - 2j, 3 + 4j]),
}
WAYS = {
    "numpy": lambda t: tb.to_numpy(t),
    "numpy, writable": lambda t: tb.to_numpy(t, writable=True),
    "numpy, copied": lambda t: tb.to_numpy(t, copy=True),
    "numpy, cast": lambda t: tb.to_numpy(t, dtype="complex128"),
    "numpy, into out": lambda t: tb.to_numpy(t, out=np.empty(t.shape, dtype="complex128")),
    "numpy, into a reversed out": lambda t: (
        tb.to_numpy(t, out=np.empty(t.shape, dtype="complex128").T[..., ::-1].T) if t.dim() else tb.to_numpy(t)
    ),
    "numpy, from a list": lambda t: tb.to_numpy([t, t])[1],
    "torch": lambda t: tb.to_torch(t),
    "torch, copied": lambda t: tb.to_torch(t, copy=True),
    "torch, into out": lambda t: tb.to_torch(t, out=torch.empty(t.shape, dtype=torch.complex128)),
    "torch, from a list": lambda t: tb.to_torch([t, t])[1],
    "round trip": lambda t: tb.to_torch(tb.to_numpy(t)),
}


def inference(make):
    with torch.inference_mode():
        return make()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAZY)
def test_lazy_bits_are_resolved_on_every_way(name, way):
    make, values = LAZY[name]
    result = WAYS[way](make())
    found = result.detach().resolve_conj().resolve_neg().clone() if isinstance(result, torch.Tensor) else result
    assert np.array_equal(found.tolist(), values)


@pytest.mark.parametrize("name", LAZY)
def test_what_has_to_be_resolved_is_not_called_shared(name):
    t = LAZY[name][0]()
    lazy = t.is_conj() or t.is_neg() or t._is_zerotensor()
    plan = tb.plan(t, "numpy")
    assert plan.zero_copy != lazy
    if lazy:
        assert tb.describe(t).lazy
        with pytest.raises(tb.CopyRequiredError, match="resolve"):
            tb.to_numpy(t, copy=False)
    assert tb.plan(t, "torch").zero_copy


def test_an_out_with_a_lazy_bit_receives_the_values_and_not_the_bytes():
    z = complex_pair()
    tb.to_torch(np.array([5 + 6j, 7], dtype="complex64"), out=z.conj())
    assert z.tolist() == [5 - 6j, 7]
    tb.to_torch(np.array([1, 2], dtype="float32"), out=z.conj().imag)
    assert z.imag.tolist() == [-1, -2]


# -- Tensors that have no data of their own


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3)


def functional():
    return torch._to_functional_tensor(torch.ones(3))


def functional_in_mode():
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    with FunctionalTensorMode():
        return torch.ones(3)


EMPTY_HANDED = {
    "meta": (lambda: torch.ones(3, device="meta"), "no data"),
    "meta parameter": (lambda: torch.nn.Parameter(torch.ones(3, device="meta")), "no data"),
    "meta bfloat16": (lambda: torch.ones(3, dtype=torch.bfloat16, device="meta"), "no data"),
    "fake": (fake, "no data"),
    "functional": (functional, "functionalization"),
    "functional that requires grad": (lambda: functional().requires_grad_(), "functionalization"),
    "functional in its mode": (functional_in_mode, "functional"),
}


@pytest.mark.parametrize("target", ["numpy", "torch"])
@pytest.mark.parametrize("name", EMPTY_HANDED)
def test_a_tensor_without_data_of_its_own_is_refused_by_name(name, target):
    """`__dlpack__` exports garbage for most of these, and `.numpy()` of a functional tensor is made-up memory."""
    make, words = EMPTY_HANDED[name]
    convert = {"numpy": tb.to_numpy, "torch": tb.to_torch}[target]
    tb.to_numpy(torch.ones(3))  # the lanes are open by now
    for wrap in (lambda t: t, lambda t: [t, t]):
        with pytest.raises(tb.UnsupportedArrayError, match=words) as caught:
            convert(wrap(make()))
        assert str(caught.value).startswith(f"to_{target}: ")


TRANSFORMS = {
    "vmap": lambda f: torch.func.vmap(f)(torch.ones(2, 3)),
    "grad": lambda f: torch.func.grad(f)(torch.ones(3)),
    "jvp": lambda f: torch.func.jvp(f, (torch.ones(3),), (torch.ones(3),)),
    "vjp": lambda f: torch.func.vjp(f, torch.ones(3)),
    "jacrev": lambda f: torch.func.jacrev(f)(torch.ones(3)),
    "hessian": lambda f: torch.func.hessian(f)(torch.ones(3)),
    "functionalize": lambda f: torch.func.functionalize(f)(torch.ones(3)),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f))(torch.ones(2, 3)),
}


@pytest.mark.parametrize("target", ["numpy", "torch"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_inside_a_transform_a_wrapped_tensor_is_refused(transform, target):
    convert = {"numpy": tb.to_numpy, "torch": tb.to_torch}[target]
    refused = []

    def function(x):
        try:
            convert(x)
        except tb.UnsupportedArrayError as error:
            refused.append(str(error))
        return (x * x).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on its first functionalization
        TRANSFORMS[transform](function)
    assert refused
    assert all("Convert outside" in text for text in refused)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_tensor_that_escaped_from_a_transform_has_its_values_or_is_refused(transform):
    escaped = []

    def function(x):
        escaped.append(x)
        return (x * x).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TRANSFORMS[transform](function)
    a = np.ones(3)
    with contextlib.suppress(tb.UnsupportedArrayError):
        a = tb.to_numpy(escaped[0])
    assert (a == 1).all()


# -- Writes that autograd does not see (pytorch#6990, the seed question)

IN_A_GRAPH = {
    "leaf": lambda x: x,
    "result": lambda x: x * 2,
    "view": lambda x: (x * 2)[1:],
    "transposed": lambda x: (x * 2).reshape(2, 2).T,
    "strided": lambda x: (x * 2)[::2],
    "0-d": lambda x: (x * 2)[0],
    "expanded": lambda x: (x * 2)[:1].expand(4),
    "bfloat16": lambda x: (x * 2).bfloat16(),
    "complex": lambda x: torch.complex(x, x),
    "parameter": lambda x: torch.nn.Parameter(x.detach()),
    "conjugate": lambda x: torch.complex(x, x).conj(),
}
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", IN_A_GRAPH)
def test_the_view_of_a_tensor_in_a_graph_cannot_be_written(name, mode):
    """Also where `Tensor.numpy` would allow it: under `no_grad`."""
    t = IN_A_GRAPH[name](torch.arange(4.0, requires_grad=True))
    with MODES[mode]():
        a = tb.to_numpy(t)
        shared = address(a) == t.data_ptr()
        assert shared == (name != "conjugate")
        assert a.flags.writeable != shared
        if shared:
            with pytest.raises(ValueError, match="read-only"):
                a[...] = 0
        assert tb.to_numpy(t, copy=True).flags.writeable


def test_the_gradient_is_right_where_a_detached_alias_makes_it_wrong():
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    y = x * 2
    z = (y**2).sum()
    y.detach().numpy()[:] = 0
    z.backward()
    assert x.grad.tolist() == [0, 0]  # the lie

    x = torch.tensor([2.0, 3.0], requires_grad=True)
    y = x * 2
    z = (y**2).sum()
    with pytest.raises(ValueError, match="read-only"):
        tb.to_numpy(y)[:] = 0
    z.backward()
    assert x.grad.tolist() == [16, 24]


@pytest.mark.parametrize("seen_as", [np.ndarray, np.matrix])
def test_a_write_through_the_way_back_to_torch_is_seen_by_autograd(seen_as):
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    y = x * 2
    z = (y**2).sum()
    tb.to_torch(tb.to_numpy(y).view(seen_as)[..., :1]).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()


def test_a_saved_input_that_requires_no_grad_can_be_overwritten_unseen_and_a_copy_cannot():
    """Documented: that a graph saved `x` cannot be seen in `x`. `copy=True`, or `editing`, is the careful way."""
    grads = {}
    for way, options in {"shared": {}, "copied": {"copy": True}}.items():
        w, x = torch.tensor([1.0], requires_grad=True), torch.tensor([5.0])
        loss = (w * x).sum()
        tb.to_numpy(x, **options)[:] = 0
        loss.backward()
        grads[way] = w.grad.item()
    assert grads == {"shared": 0, "copied": 5}


# -- Bytes read as something else, dtypes that change unasked

TABLED = [name for name, row in DTYPES.items() if row.numpy is not None]


@pytest.mark.parametrize("name", TABLED)
def test_no_dtype_changes_unasked_from_numpy(name):
    a = np.array([1, 1, 0]).astype("float32").astype(DTYPES[name].numpy)
    assert tb.to_numpy(a).dtype == a.dtype
    assert tb.to_numpy([a, a]).dtype == a.dtype
    if DTYPES[name].torch:
        t = tb.to_torch(a)
        assert t.dtype is getattr(torch, name)
        assert tb.to_numpy(t).dtype == a.dtype
        assert tb.to_numpy(t).tobytes() == a.tobytes()
        assert tb.to_torch([a, a]).dtype is t.dtype
    else:
        with pytest.raises(tb.UnsupportedArrayError, match=f"torch has no {name}"):
            tb.to_torch(a)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_torch_decides_nothing(default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = [
            tb.to_torch(x).dtype for x in (1.5, [1.5], np.float32(1), np.ones(2), [np.ones(2)], array.array("f", [1]))
        ]
    finally:
        torch.set_default_dtype(before)
    assert found == [torch.float64, torch.float64, torch.float32, torch.float64, torch.float64, torch.float32]


def test_the_default_device_of_torch_decides_nothing():
    with torch.device("meta"):
        found = [tb.to_torch(x) for x in (1.5, [1.5], np.ones(2), np.ones(2)[::-1], [np.ones(2)], b"ab")]
    assert {t.device.type for t in found} == {"cpu"}


def test_a_name_that_equals_another_is_still_that_number():
    """`ulonglong` equals `uint64` and is refused by `torch.from_numpy`; `longlong` is taken."""
    for name in ("longlong", "ulonglong", "long", "ulong", "intc", "uintc"):
        a = np.array([1, 2], dtype=name)
        for source in (a, a[::-1][::-1], np.array([[2, 1]], dtype=name)[0, ::-1]):
            for t in (tb.to_torch(source), tb.to_torch([source, source])[1], tb.to_torch(source, copy=True)):
                assert (t.tolist(), str(t.dtype)) == ([1, 2], f"torch.{a.dtype.name}"), name


@pytest.mark.parametrize("dtype", [">f4", ">i8", ">c16", ">u2", ">f8"])
def test_swapped_bytes_are_numbers(dtype):
    a = np.array([1, 2, 3]).astype(dtype)
    assert tb.to_torch(a).tolist() == [1, 2, 3]
    assert tb.to_torch(a[::-1]).tolist() == [3, 2, 1]
    assert tb.to_torch([a, a])[1].tolist() == [1, 2, 3]
    assert tb.to_numpy(a).tolist() == [1, 2, 3]
    assert tb.to_torch(a, out=torch.empty(3, dtype=torch.complex128)).tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", ["float32", "complex64", "int16", "bfloat16"])
def test_a_tensor_seen_as_another_dtype_comes_back_as_that(name):
    """A view of the same width is an alias; of another width, or of shifted bytes, it is other numbers."""
    t = torch.arange(8.0).to(getattr(torch, name))
    a = tb.to_numpy(t)
    same = {"float32": "int32", "complex64": "float64", "int16": "float16", "bfloat16": "uint16"}[name]
    assert tb.to_torch(a.view(same)).view(t.dtype).tolist() == t.tolist()
    assert address(tb.to_torch(a.view(same))) == t.data_ptr()
    as_bytes = a.view("uint8")
    assert tb.to_torch(as_bytes).tolist() == as_bytes.tolist()
    shifted = as_bytes[1 : 1 + 4 * a.itemsize].view(same)
    assert tb.to_numpy(tb.to_torch(shifted)).tobytes() == shifted.tobytes()


# -- Masks and meanings

MASKED = {
    "masked": lambda: np.ma.masked_array([1.0, 2.0], [False, True]),
    "nothing masked": lambda: np.ma.masked_array([1.0, 2.0]),
    "the masked number": lambda: np.ma.masked,
    "a view of masked": lambda: np.ma.masked_array([[1, 2]], [[0, 1]])[0],
    "in a list": lambda: [np.ma.masked_array([1.0], [True])] * 2,
    "masked tensor": lambda: masked_tensor(),
}


def masked_tensor():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch
        return torch.masked.masked_tensor(torch.ones(2), torch.tensor([True, False]))


@pytest.mark.parametrize("target", ["numpy", "torch"])
@pytest.mark.parametrize("name", MASKED)
def test_a_mask_is_not_dropped(name, target):
    with pytest.raises(tb.UnsupportedArrayError, match="mask"):
        {"numpy": tb.to_numpy, "torch": tb.to_torch}[target](MASKED[name]())


class Named(np.ndarray):
    """A subclass that adds a method, and no meaning."""

    def name(self):
        return "x"


def test_a_subclass_comes_as_its_plain_array_as_documented():
    a = np.arange(3.0).view(Named)
    assert type(tb.to_numpy(a)) is np.ndarray
    assert address(tb.to_numpy(a)) == address(a) == tb.to_torch(a).data_ptr()


class Length(np.ndarray):
    """As the quantities of astropy and unyt are: a subclass whose class knows of a unit."""

    unit = property(lambda self: getattr(self, "_unit", None))

    @property
    def value(self):
        return self.view(np.ndarray)


class Unyt(np.ndarray):
    """As the quantities of unyt are: the unit is the array's alone."""

    value = Length.value


def unyt(unit):
    made = np.arange(3.0).view(Unyt)
    made.units = unit
    return made


class Drawn(np.ndarray):
    """Has methods that are called as what others hide."""

    def mask(self, where):
        return self

    def unit(self):
        return self

    units = unit


class Hidden(np.ndarray):
    """As the masked arrays of astropy are, which are none of NumPy's."""

    mask = property(lambda self: np.array([True, False, False]))


class Pint:
    """As the quantities of pint are: no arrays, but with an array to give."""

    magnitude, units = np.arange(3.0), "metre"

    def __array__(self, dtype=None, copy=None):
        return self.magnitude


def length(unit):
    made = np.arange(3.0).view(Length)
    made._unit = unit
    return made


MEANS_MORE = {
    "a unit": (lambda: length("km"), "numpy float64 (3,) in km", "x.value"),
    "a unit of its own": (lambda: unyt("km"), "numpy float64 (3,) in km", "x.value"),
    "a unit of a quantity that is no array": (Pint, "Pint in metre", "x.magnitude"),
    "a mask of its own": (lambda: np.arange(3.0).view(Hidden), "masked numpy float64 (3,)", "x.unmasked and x.mask"),
}


@pytest.mark.parametrize("road", ["alone", "tree", "list", "collate", "dtype"])
@pytest.mark.parametrize("name", MEANS_MORE)
def test_a_unit_is_not_dropped_nor_a_mask_of_a_library_s_own(name, road):
    make, what, cure = MEANS_MORE[name]
    convert = {
        "alone": tb.to_numpy,
        "dtype": lambda x: tb.to_torch(x, dtype="float32"),
        "tree": lambda x: tb.tree.to_torch({"x": x}),
        "list": lambda x: tb.to_torch([x, x]),
        "collate": lambda x: tb.collate([x, x]),
    }[road]
    with pytest.raises(tb.UnsupportedArrayError) as caught:
        convert(make())
    assert what in str(caught.value)
    assert cure in str(caught.value)


@pytest.mark.parametrize("unit", [None, "", "dimensionless"])
def test_a_quantity_without_a_unit_is_its_numbers(unit):
    assert tb.to_torch(length(unit)).tolist() == [0, 1, 2]
    assert tb.to_torch(unyt(unit)).tolist() == [0, 1, 2]


def test_methods_that_are_called_mask_or_unit_hide_nothing():
    assert tb.to_torch(np.arange(3.0).view(Drawn)).tolist() == [0, 1, 2]
    records = np.rec.fromrecords([(1.0, 2)], names="units,mask")
    with pytest.raises(tb.UnsupportedArrayError, match="a structured dtype has several fields"):
        tb.to_torch(records)


def test_an_out_with_a_unit_is_refused():
    out = length("m")
    with pytest.raises(ValueError, match=r"out is numpy float64 \(3,\) in m: its unit would be lost"):
        tb.to_numpy(np.ones(3), out=out)
    assert out.value.tolist() == [0, 1, 2]


# -- Sharing by luck


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8, 16, 32, 64])
def test_what_is_shared_is_decided_by_the_address_and_said_before(offset):
    """jax#37830: whether 64-byte alignment is met, and so whether memory is shared, is the allocator's luck there."""
    memory = np.zeros(256, dtype="uint8")
    start = -memory.ctypes.data % 64 + offset
    a = memory[start : start + 32].view("float32")
    for source in (a, Producer(laid_out((8,), (1,), "float32", offset=offset))):
        t = tb.to_torch(source)
        assert (
            tb.plan(source, "torch").zero_copy == tb.shares_memory(source, t) == (tb.describe(source).address % 4 == 0)
        )


def test_bfloat16_is_found_where_numpy_s_own_protocols_call_it_void():
    a = np.ones(3, dtype=ml_dtypes.bfloat16)
    assert a.__array_interface__["typestr"] == "<V2"
    assert tb.to_torch(a).dtype is torch.bfloat16
    assert tb.to_torch(a[:1][::-1]).dtype is torch.bfloat16


class Answers(torch.Tensor):
    """A subclass whose operations give something else, as units, names or logs do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(torch.Tensor) * 0 - 1 if isinstance(result, torch.Tensor) else result


class Raises(torch.Tensor):
    """One that knows few operations."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func.__name__)


@pytest.mark.parametrize("cls", [Answers, Raises])
@pytest.mark.parametrize(
    "options",
    [{}, {"copy": True}, {"dtype": "float64"}, {"dtype": "float16"}, {"writable": False}, {"out": "float32"}],
    ids=str,
)
def test_what_a_subclass_answers_for_torch_is_not_what_its_memory_holds(cls, options):
    """Shared or copied: an array has the elements that lie in the memory."""
    t = torch.arange(3.0).as_subclass(cls)
    if "out" in options:
        options = {"out": np.zeros(3, options["out"])}
    assert tb.to_numpy(t, **options).tolist() == [0, 1, 2]
    assert tb.tree.to_numpy([t], **{k: [v] if k == "out" else v for k, v in options.items()})[0].tolist() == [0, 1, 2]
    assert tb.plan(t, "numpy", **options).source.shape == (3,)
    assert tb.describe(t).nbytes == 12
    assert tb.to_torch(t) is t


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_sums_of_small_floats_are_made_in_their_own_bits_in_numpy(dtype):
    """As documented: it is ml_dtypes' doing, and the reason to compute in float32."""
    ones = torch.ones(1000).to(dtype)
    assert float(tb.to_numpy(ones).sum()) < 1000
    assert float(tb.to_numpy(ones, dtype="float32").sum()) == 1000
