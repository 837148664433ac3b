"""What is never converted, by the text of its refusal: what it is, why not, and the call that works."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import subprocess
import sys
import warnings
from collections import namedtuple
from unittest.mock import MagicMock, Mock

import ml_dtypes
import numpy as np
import pytest
import torch
from arrays import spiral
from torch._subclasses.fake_tensor import FakeTensorMode

import tensorbridge as tb


@dataclasses.dataclass
class Batch:
    images: object


Pair = namedtuple("Pair", "images labels")


class Interceptor(torch.Tensor):
    """A wrapper whose own memory is not its value."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def fake():
    with FakeTensorMode():
        return torch.ones(3)


def ragged(layout=torch.strided):
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


def objects(parts):
    a = np.empty(len(parts), dtype=object)
    a[:] = parts
    return a


def saved(dtype):
    """Numbers that np.save writes without their dtype."""
    file = io.BytesIO()
    np.save(file, np.arange(3).astype(dtype))
    file.seek(0)
    return np.load(file)


def packed():
    return torch.zeros(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


NOT_AN_ARRAY = "it is no array of NumPy, torch or CuPy, and has no __dlpack__, array interface, buffer or __array__"
MISSING_NUMBER = 'Say float("nan") for what is missing, or leave it out.'
ENCODE = "Encode it as numbers first."
GIVE = "Give an array, a number or a list of them; of an object that holds an array, that array."
DENSE = "a sparse tensor has no strided memory to share"
REFERENCES = "object elements are Python references, not numbers"
STANDS_IN = (
    "it answers to every name, as a mock or a value that is being traced does, and holds no data",
    "Give the array that it stands for; of a value that is being traced, convert outside the tracing.",
)
UNPACK = "Convert x.to_padded_tensor(0.0), x.values(), or each tensor of x.unbind()."
FIELDS = "Convert one field, x['name'], or the tree {n: x[n] for n in x.dtype.names}."
CODES = "Encode it first, once for the whole data set: np.unique(x, return_inverse=True)[1] gives codes."
TREE = "Convert every leaf: tensorbridge.tree.to_numpy(x)."
ONE_KIND = "Bring them to one first: to_numpy([to_numpy(part) for part in x])."
PAD = "Pad the parts to one shape, or keep the list and use tensorbridge.tree."


def masked_tensor():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that they are a prototype
        return torch.masked.masked_tensor(torch.ones(2), torch.tensor([True, False]))


# name: how to make it, what it is called, why not, what works
REFUSED = {
    "sparse": (
        lambda: torch.eye(3).to_sparse(),
        "torch sparse_coo float32 (3, 3)",
        DENSE,
        "Convert x.to_dense(), or x.values().",
    ),
    "uncoalesced": (
        lambda: torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (3, 3), check_invariants=False),
        "torch sparse_coo float32 (3, 3)",
        DENSE,
        "Convert x.to_dense(), or x.coalesce().values().",
    ),
    "compressed": (
        lambda: torch.eye(3).to_sparse_csr(),
        "torch sparse_csr float32 (3, 3)",
        DENSE,
        "Convert x.to_dense(), or x.values().",
    ),
    "nested": (ragged, "torch nested float32", "a nested tensor has rows of different lengths", UNPACK),
    "jagged": (
        lambda: ragged(torch.jagged),
        "NestedTensor float32",
        "a nested tensor has rows of different lengths",
        UNPACK,
    ),
    "mkldnn": (
        lambda: torch.ones(3).to_mkldnn(),
        "torch mkldnn float32 (3,)",
        "an mkldnn tensor has a layout private to oneDNN",
        "Convert x.to_dense().",
    ),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "torch quantized qint8 (3,)",
        "a quantized tensor means its integers times a scale",
        "Convert x.dequantize(), or x.int_repr() for the integers.",
    ),
    "meta": (
        lambda: torch.ones(3, device="meta"),
        "torch meta float32 (3,)",
        "a meta tensor has a shape but no data",
        "Make one that has, and fill it: torch.zeros_like(x, device='cpu').",
    ),
    "fake": (
        fake,
        "FakeTensor float32 (3,)",
        "a fake tensor has a shape but no data",
        "Convert outside FakeTensorMode, torch.export or tracing.",
    ),
    "functionalized": (
        lambda: torch._to_functional_tensor(torch.ones(3)),
        "torch functional float32 (3,)",
        "a tensor inside functionalization has no memory of its own",
        "Convert outside the functionalized function.",
    ),
    "interceptor": (
        lambda: Interceptor(torch.ones(3)),
        "Interceptor float32 (3,)",
        "this tensor subclass intercepts every operation (__torch_dispatch__); its memory need not be its value",
        "Convert the plain tensor that it holds.",
    ),
    "masked tensor": (
        masked_tensor,
        "MaskedTensor float32 (2,)",
        "the mask of a masked tensor would be lost",
        "Convert x.get_data() and x.get_mask().",
    ),
    "masked": (
        lambda: np.ma.array([1.0, 2.0], mask=[0, 1]),
        "masked numpy float64 (2,)",
        "the mask of a masked array would be lost",
        "Convert x.filled(value) and x.mask, or x.data if masked values are fine.",
    ),
    "structured": (
        lambda: np.zeros(3, dtype=[("name", "f4"), ("b", "i4")]),
        "numpy [('name', '<f4'), ('b', '<i4')] (3,)",
        "a structured dtype has several fields",
        FIELDS,
    ),
    "object": (
        lambda: np.array([1, None], dtype=object),
        "numpy object (2,)",
        REFERENCES,
        'Convert x.astype("float64"), after dealing with None and text.',
    ),
    "text array": (lambda: np.array(["a", "bc"]), "numpy <U2 (2,)", "text is not a number", CODES),
    "bytes array": (lambda: np.array([b"a"]), "numpy |S1 (1,)", "text is not a number", CODES),
    "string array": (
        lambda: np.array(["a"], dtype=np.dtypes.StringDType()),
        "numpy StringDType() (1,)",
        "text is not a number",
        CODES,
    ),
    "dates": (
        lambda: np.array(["2020-01-01"], dtype="datetime64[D]"),
        "numpy datetime64[D] (1,)",
        "dates and durations are numbers with a unit, and only plain numbers are converted",
        'Convert x.view("int64") and keep the unit beside it.',
    ),
    "dates, one missing": (
        lambda: np.array(["2020-01-01", "NaT"], dtype="datetime64[D]"),
        "numpy datetime64[D] (2,)",
        "dates and durations are numbers with a unit, and only plain numbers are converted",
        'Convert x.view("int64") and keep the unit beside it, where NaT is the lowest int64.',
    ),
    "dates, big-endian": (
        lambda: np.array(["2020-01-01"], dtype=">M8[D]"),
        "numpy >M8[D] (1,)",
        "dates and durations are numbers with a unit, and only plain numbers are converted",
        'Convert x.astype("int64"), which swaps the bytes, and keep the unit beside it.',
    ),
    "objects that are arrays": (
        lambda: objects([np.ones(2), np.zeros(2)]),
        "numpy object (2,)",
        REFERENCES,
        "Convert np.stack(x) if its rows are of one length, or pad them first.",
    ),
    "objects that are lists": (
        lambda: objects([[1, 2], [3, 4]]),
        "numpy object (2,)",
        REFERENCES,
        "Convert np.stack(x) if its rows are of one length, or pad them first.",
    ),
    "objects that are lists, in a matrix": (
        lambda: objects([[1, 2], [3, 4]]).reshape(2, 1),
        "numpy object (2, 1)",
        REFERENCES,
        "Convert x.tolist() if its rows are of one length, or pad them first.",
    ),
    "objects that are text": (lambda: objects(["a", "b"]), "numpy object (2,)", REFERENCES, CODES),
    "one object": (
        lambda: np.array(2.0, dtype=object),
        "numpy object ()",
        REFERENCES,
        "Convert what it holds, x.item().",
    ),
    "bfloat16 that went through np.save": (
        lambda: saved(ml_dtypes.bfloat16),
        "numpy |V2 (3,)",
        "raw bytes (a void dtype) have no number type",
        'Say what they are: x.view("uint8"), or x.view(ml_dtypes.bfloat16), which np.save writes as raw bytes.',
    ),
    "float8 that went through np.save": (
        lambda: saved(ml_dtypes.float8_e4m3fn),
        "numpy |V1 (3,)",
        "raw bytes (a void dtype) have no number type",
        'Say what they are: x.view("uint8"), or x.view(ml_dtypes.float8_e4m3fn) or such, which np.save writes as raw '
        "bytes.",
    ),
    "durations": (
        lambda: np.array([1], dtype="timedelta64[s]"),
        "numpy timedelta64[s] (1,)",
        "dates and durations are numbers with a unit, and only plain numbers are converted",
        'Convert x.view("int64") and keep the unit beside it.',
    ),
    "void": (
        lambda: np.zeros(3, "V4"),
        "numpy |V4 (3,)",
        "raw bytes (a void dtype) have no number type",
        'Say what they are: x.view("uint8").',
    ),
    **{
        f"void, {name}": (
            make,
            f"numpy |V4 {shape}",
            "raw bytes (a void dtype) have no number type",
            'Say what they are: np.ascontiguousarray(x).view("uint8").',
        )
        for name, make, shape in (
            ("strided", lambda: np.zeros((4, 6), "V4")[:, ::2], "(4, 3)"),
            ("reversed", lambda: np.zeros(3, "V4")[::-1], "(3,)"),
            ("transposed", lambda: np.zeros((2, 3), "V4").T, "(3, 2)"),
            ("one element", lambda: np.zeros((), "V4"), "()"),
        )
    },
    "void, rows apart": (
        lambda: np.zeros((4, 2), "V4")[::2],
        "numpy |V4 (2, 2)",
        "raw bytes (a void dtype) have no number type",
        'Say what they are: x.view("uint8").',
    ),
    "void, one column": (
        lambda: np.zeros((2, 8), "V4").T[::4][:, :1],
        "numpy |V4 (2, 1)",
        "raw bytes (a void dtype) have no number type",
        'Say what they are: x.view("uint8").',
    ),
    "ragged list": (lambda: [[1, 2], [3]], "list of 2", "its parts have different shapes: (1,), (2,)", PAD),
    "ragged arrays": (
        lambda: [np.zeros(2), np.zeros(3)],
        "list of 2",
        "its parts have different shapes: (2,), (3,)",
        PAD,
    ),
    "uneven depth": (lambda: [[1, 2], 3], "list of 2", "some of its parts are lists and some are not", PAD),
    "mixed frameworks": (
        lambda: [np.zeros(2), torch.zeros(2).double()],
        "list of 2",
        "its parts have different frameworks: numpy, torch",
        ONE_KIND,
    ),
    "mixed dtypes": (
        lambda: [np.zeros(2), np.zeros(2, "f4")],
        "list of 2",
        "its parts have different dtypes: float32, float64",
        'Say dtype="float64".',
    ),
    "numbers and arrays": (lambda: [np.array(1), 3], "list of 2", "it holds both numbers and arrays", ONE_KIND),
    "numbers beside rows": (
        lambda: [np.zeros(2), 3],
        "list of 2",
        "it holds both numbers and arrays, of different shapes: (), (2,)",
        PAD,
    ),
    "list of text": (lambda: ["a"], "list of 1, item [0]: str", "text is not an array", ENCODE),
    "list with None": (lambda: [1, None], "list of 2, item [1]: None", "None is no number", MISSING_NUMBER),
    "lists with text": (lambda: [[1, 2], [3, "4"]], "list of 4, item [1][1]: str", "text is not an array", ENCODE),
    "dict": (lambda: {"a": np.zeros(2)}, "dict", "a container is not one array", TREE),
    "dataclass": (lambda: Batch(np.zeros(2)), "Batch", "a container is not one array", TREE),
    "namedtuple": (lambda: Pair(1, 2), "namedtuple Pair", "a container is not one array", TREE),
    "set": (lambda: {1, 2}, "set", "the elements of a set have no order", "Convert list(x), or each element."),
    "mock": (Mock, "Mock", *STANDS_IN),
    "mock of everything": (MagicMock, "MagicMock", *STANDS_IN),
    "range": (lambda: range(3), "range", "a range is not an array", "Convert list(x)."),
    **{
        f"sparse, {kind}": (
            lambda kind=kind: getattr(pytest.importorskip("scipy.sparse", reason="no SciPy"), kind)(np.eye(2)),
            kind,
            "a sparse array has no strided memory to share",
            "Convert x.toarray().",
        )
        for kind in ("csr_matrix", "coo_array", "lil_array")
    },
    "text": (lambda: "abc", "str", "text is not an array", ENCODE),
    "None": (lambda: None, "NoneType", NOT_AN_ARRAY, GIVE),
    "generator": (lambda: (i for i in range(3)), "generator", NOT_AN_ARRAY, GIVE),
    "class": (lambda: np.ndarray, "type", NOT_AN_ARRAY, GIVE),
    "large integer": (
        lambda: 2**70,
        "Python int of 71 bits",
        "a Python integer is int64 here, and this one does not fit",
        'Say dtype="float64".',
    ),
}
EVERYWHERE = {"to_numpy": tb.to_numpy, "to_torch": tb.to_torch, "describe": tb.describe}


# What torch says once of its new layouts.
@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::UserWarning:test_errors_refused")
@pytest.mark.parametrize("call", EVERYWHERE)
@pytest.mark.parametrize("name", REFUSED)
def test_refusal_says_what_it_is_why_not_and_what_works(name, call):
    make, what, why, cure = REFUSED[name]
    with pytest.raises(tb.UnsupportedArrayError) as raised:
        EVERYWHERE[call](make())
    if call != "describe":
        cure = ONE_KIND.replace("to_numpy", call) if cure == ONE_KIND else cure.replace("tree.to_numpy", f"tree.{call}")
    assert str(raised.value) == f"{call}: {what} cannot be converted: {why}.\n{cure}"


CALL = re.compile(
    r"(?<![\w.])(?:np\.unique\(x.*?\)\[1\]|np\.stack\(x\)|np\.ascontiguousarray\(x\)\.view\(\"uint8\"\)|(?:torch|tensorbridge)(?:\.\w+)+\(x[^()]*\)|(?:list|float)\(x\)"
    r"|x(?:\.\w+(?:\([^()]*\))?)+|x\['\w+'\]|\{n: .*?\})"
)


NAMES = {"torch": torch, "np": np, "ml_dtypes": ml_dtypes, "tensorbridge": tb, "value": 0.0}


@pytest.mark.parametrize("name", [name for name in REFUSED if CALL.search(REFUSED[name][3])])
def test_calls_that_a_refusal_names_do_work(name):
    make, _, _, cure = REFUSED[name]
    for call in CALL.findall(cure):
        found = eval(call, NAMES | {"x": make()})
        one = isinstance(found, (np.ndarray, torch.Tensor, list, float))
        assert tb.describe(found) if one else tb.tree.to_numpy(found) is not None


# name: the call that its cure names, and what that makes of it
CURED = {
    "dates": ('x.view("int64")', [18262]),
    "dates, big-endian": ('x.astype("int64")', [18262]),
    "durations": ('x.view("int64")', [1]),
    "objects that are arrays": ("np.stack(x)", [[1, 1], [0, 0]]),
    "objects that are lists": ("np.stack(x)", [[1, 2], [3, 4]]),
    "objects that are lists, in a matrix": ("x.tolist()", [[[1, 2]], [[3, 4]]]),
    "objects that are text": ("np.unique(x, return_inverse=True)[1]", [0, 1]),
    "text array": ("np.unique(x, return_inverse=True)[1]", [0, 1]),
    "one object": ("x.item()", 2),
    "bfloat16 that went through np.save": ("x.view(ml_dtypes.bfloat16)", [0, 1, 2]),
    "float8 that went through np.save": ("x.view(ml_dtypes.float8_e4m3fn)", [0, 1, 2]),
    "uncoalesced": ("x.coalesce().values()", [3]),
    "sparse": ("x.values()", [1, 1, 1]),
    "sparse, coo_array": ("x.toarray()", [[1, 0], [0, 1]]),
    "range": ("list(x)", [0, 1, 2]),
}


@pytest.mark.parametrize("name", CURED)
def test_what_a_cure_makes_has_the_values_that_were_meant(name):
    make, _, _, cure = REFUSED[name]
    call, values = CURED[name]
    assert call in cure
    assert tb.to_torch(eval(call, NAMES | {"x": make()})).tolist() == values


def test_two_calls_that_an_error_names_do_work():
    x = np.ones(3, ml_dtypes.float8_e8m0fnu)
    with pytest.raises(tb.UnsupportedArrayError) as raised:
        tb.to_numpy(x, dtype="float8_e5m2")
    calls = re.search(r"two calls: (.*)\.$", str(raised.value)).group(1)
    assert eval(calls, {"x": x, "to_numpy": tb.to_numpy}).astype("f4").tolist() == [1, 1, 1]


def test_transformed_function_is_named():
    with pytest.raises(tb.UnsupportedArrayError) as raised:
        torch.func.vmap(tb.to_numpy)(torch.ones(2, 3))
    assert str(raised.value) == (
        "to_numpy: torch functorch float32 (3,) cannot be converted: inside torch.func.vmap, grad and the like a "
        "tensor has no memory of its own.\nConvert outside the transformed function."
    )


def test_a_value_that_is_being_traced_is_told_from_an_array_that_fails():
    with pytest.raises(tb.UnsupportedArrayError) as raised:
        torch.fx.symbolic_trace(lambda x: tb.to_torch(x))
    assert str(raised.value) == f"to_torch: Proxy cannot be converted: {STANDS_IN[0]}.\n{STANDS_IN[1]}"


def test_dtensor_is_refused_with_its_two_ways_out():
    from torch.distributed.tensor import DTensor

    class Spread(DTensor):  # made as DTensor makes itself, without a process group
        @staticmethod
        def __new__(cls):
            return torch.Tensor._make_wrapper_subclass(cls, (3,))

        def __init__(self):
            pass

        def __repr__(self):
            return "Spread"

    with pytest.raises(tb.UnsupportedArrayError) as raised:
        tb.to_numpy(Spread())
    assert str(raised.value) == (
        "to_numpy: Spread float32 (3,) cannot be converted: a DTensor is spread over processes.\n"
        "Convert x.to_local() for this process's part, or x.full_tensor()."
    )


# name: the call, what it says after "cannot be converted: "
DTYPES = {
    "longdouble": (
        lambda: tb.to_torch(np.zeros(3, "longdouble")),
        'torch has no longdouble.\nUse dtype="float64": a copy of 24 B.',
    ),
    "clongdouble": (
        lambda: tb.to_torch(np.zeros(3, "clongdouble")),
        'torch has no clongdouble.\nUse dtype="complex128": a copy of 48 B.',
    ),
    "longdouble for CuPy": (
        lambda: tb.plan(np.zeros(3, "longdouble"), "cupy"),
        'cupy has no longdouble.\nUse dtype="float64": a copy of 24 B.',
    ),
    "int4": (lambda: tb.to_torch(np.zeros(3, ml_dtypes.int4)), 'torch has no int4.\nUse dtype="int8": a copy of 3 B.'),
    "float8_e3m4": (
        lambda: tb.to_torch(np.zeros(3, ml_dtypes.float8_e3m4)),
        'torch has no float8_e3m4.\nUse dtype="float16": a copy of 6 B.',
    ),
    "float8 for CuPy": (
        lambda: tb.plan(torch.zeros(3, dtype=torch.float8_e5m2), "cupy"),
        'cupy has no float8_e5m2.\nUse dtype="float16": a copy of 6 B.',
    ),
    "packed": (
        lambda: tb.to_numpy(packed()),
        "numpy has no float4_e2m1fn_x2.\nConvert x.view(torch.uint8), two elements a byte.",
    ),
    "unpacking": (
        lambda: tb.to_torch(packed(), dtype="float32"),
        "torch cannot cast float4_e2m1fn_x2 to float32.\nConvert x.view(torch.uint8), two elements a byte.",
    ),
    "packing": (
        lambda: tb.to_torch(torch.zeros(3), dtype="float4_e2m1fn_x2"),
        "torch cannot cast float32 to float4_e2m1fn_x2.\nPack two elements a byte, as uint8, and view the tensor: "
        "t.view(torch.float4_e2m1fn_x2).",
    ),
    "cast that nobody has": (
        lambda: tb.to_numpy(np.ones(3, ml_dtypes.float8_e8m0fnu), dtype="float8_e5m2"),
        "NumPy cannot cast float8_e8m0fnu to float8_e5m2.\n"
        'Cast in two calls: to_numpy(to_numpy(x, dtype="float32"), dtype="float8_e5m2").',
    ),
    "imaginary part": (
        lambda: tb.to_numpy(spiral(3), dtype="float32"),
        "complex128 to float32 would drop the imaginary part.\nConvert x.real, or abs(x).",
    ),
    "imaginary part, into out": (
        lambda: tb.to_numpy(spiral(3), out=np.zeros(3)),
        "complex128 to float64 would drop the imaginary part.\nConvert x.real, or abs(x).",
    ),
}


@pytest.mark.parametrize("name", DTYPES)
def test_dtype_without_a_partner_names_the_one_that_works_and_its_bytes(name):
    call, text = DTYPES[name]
    with pytest.raises(tb.UnsupportedArrayError) as raised:
        call()
    assert str(raised.value).partition("cannot be converted: ")[2] == text


@pytest.mark.parametrize("name", [name for name in DTYPES if 'Use dtype="' in DTYPES[name][1]])
def test_dtype_that_an_error_names_does_work(name):
    dtype = re.search(r'Use dtype="(\w+)"', DTYPES[name][1]).group(1)
    source = np.ones(3, "longdouble") if "longdouble" in name else np.ones(3, ml_dtypes.int4)
    assert tb.to_torch(source, dtype=dtype).tolist() == [1, 1, 1]


# -- A framework that is not installed

BLOCK = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import numpy as np, tensorbridge as tb
class Device:
    __cuda_array_interface__ = {{"shape": (3,), "typestr": "<f4", "data": (1 << 20, True), "version": 3}}
class Writable:
    __cuda_array_interface__ = {{**Device.__cuda_array_interface__, "data": (1 << 20, False)}}
class Capsule:
    def __dlpack_device__(self):
        return 2, 0
    def __dlpack__(self, **_):
        raise AssertionError("asked")
"""
CUPY = "pip install cupy-cuda12x or cupy-cuda13x[ctk], whichever the driver's CUDA version asks for"
OR_TORCH = f"{CUPY}, or import a torch built for CUDA first"
MISSING = {
    "torch": (
        "tb.to_torch(np.zeros(3))",
        "to_torch: torch cannot be imported: No module named 'torch'.\n"
        "pip install torch (for the CPU alone, from PyTorch's own CPU index)",
    ),
    "CuPy": (
        "tb.to_cupy(np.zeros(3))",
        "to_cupy: cupy cannot be imported: No module named 'cupy'.\n"
        "pip install cupy-cuda12x or cupy-cuda13x[ctk], whichever the driver's CUDA version asks for",
    ),
    "a reader of read-only device memory": (
        "import torch; tb.to_torch(Device())",
        "to_torch: device memory that is read-only, unaligned, or has negative or odd strides, is read by CuPy, which "
        f"is not installed.\n{CUPY}",
    ),
    "a reader of device memory": (
        "tb.to_numpy(Writable())",
        f"to_numpy: device memory is read by CuPy, which is not installed.\n{OR_TORCH}",
    ),
    "a reader of device memory by DLPack": (
        "tb.to_numpy(Capsule())",
        f"to_numpy: Capsule lies on cuda:0, and is read by CuPy, which is not installed.\n{OR_TORCH}",
    ),
    "a reader of device memory by DLPack, with a torch that sees no device": (
        "import torch; tb.plan(Capsule(), 'numpy')",
        f"to_numpy: Capsule lies on cuda:0, and is read by CuPy, which is not installed.\n{OR_TORCH}",
    ),
    "a reader of a leaf": (
        "tb.tree.to_numpy({'x': [Capsule()]})",
        f"batch['x'][0]: to_numpy: Capsule lies on cuda:0, and is read by CuPy, which is not installed.\n{OR_TORCH}",
    ),
    "torch, of which only a plan is made": (
        "tb.plan(Capsule(), 'torch')",
        "to_torch: Capsule lies on cuda:0, and is read by torch, which is not installed.\n"
        "pip install torch (for the CPU alone, from PyTorch's own CPU index)",
    ),
}


def last_words(code, *blocked):
    command = [sys.executable, "-c", BLOCK.format(blocked=blocked) + code]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=hidden)
    return run.returncode, run.stdout + run.stderr


@pytest.mark.parametrize("what", MISSING)
def test_missing_framework_is_named_with_the_command_that_installs_it(what):
    code, text = MISSING[what]
    blocked = ("cupy",) if "torch;" in code else ("torch", "cupy")
    status, words = last_words(code, *blocked)
    assert status == 1
    assert words.rstrip().endswith(f"tensorbridge.MissingFrameworkError: {text}")


def test_everything_else_works_without_torch_and_cupy():
    code = """
assert tb.to_numpy([1, 2]).tolist() == [1, 2]
assert str(tb.plan(np.zeros(3)[::-1], "torch")).endswith("share   0 B   torch.from_numpy: the same memory")
assert tb.plan(np.zeros(3), "cupy").bytes_moved == 24
assert tb.plan(np.zeros(3), "torch", pin_memory=True).bytes_moved == 24
assert tb.shares_memory(np.zeros(3), np.zeros(3)) is False
"""
    assert last_words(code, "torch", "cupy") == (0, "")


@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_complex_numbers_in_a_list_have_a_cure_that_a_list_can_take(framework):
    x = [2j, 3.0]
    convert = tb.to_torch if framework == "torch" else tb.to_numpy
    with pytest.raises(tb.UnsupportedArrayError) as told:
        convert(x, dtype="float32")
    cures = str(told.value).rpartition("Convert ")[2].removesuffix(".").split(", or ")
    assert cures == ["numpy.real(x)", "numpy.abs(x)"]
    assert [eval(cure, {"numpy": np, "x": x}).tolist() for cure in cures] == [[0, 3], [2, 3]]


def test_what_is_reversed_and_read_only_has_a_cure_that_shares():
    a = np.arange(3.0)
    a.setflags(write=False)
    x = a[::-1]
    with pytest.raises(tb.CopyRequiredError) as told:
        tb.to_torch(x, copy=False)
    cure = str(told.value).rpartition("opposite order: ")[2].removesuffix(".")
    with tb.copy_guard("error"):
        shared = eval(cure, {"x": x, "to_torch": tb.to_torch})
    assert tb.shares_memory(shared, x)
    assert shared.tolist() == a.tolist()
