"""Wrong options are plain errors, before anything happens: what was given, what is allowed, what was probably meant."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from arrays import tensor

import tensorbridge as tb
from tensorbridge._dtypes import DTYPES


def six():
    return np.arange(6.0)


def assert_raises(error, call, text):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == text
    assert type(raised.value) is error


OPTIONS = {
    "copy": (
        TypeError,
        lambda: tb.to_torch(six(), copy="never"),
        "to_torch(copy='never'): copy is True, False or None",
    ),
    "copy as a number": (
        TypeError,
        lambda: tb.to_numpy(six(), copy=0),
        "to_numpy(copy=0): copy is True, False or None",
    ),
    "writable": (
        TypeError,
        lambda: tb.to_numpy(tensor(6), writable="yes"),
        "to_numpy(writable='yes'): writable is True, False or None",
    ),
    "detach": (
        TypeError,
        lambda: tb.to_numpy(tensor(6), detach=None),
        "to_numpy(detach=None): detach is True or False",
    ),
    "share_readonly": (
        TypeError,
        lambda: tb.to_torch(six(), share_readonly=1),
        "to_torch(share_readonly=1): share_readonly is True or False",
    ),
    "non_blocking": (
        TypeError,
        lambda: tb.to_torch(six(), non_blocking=None),
        "to_torch(non_blocking=None): non_blocking is True or False",
    ),
    "device": (
        ValueError,
        lambda: tb.to_torch(six(), device="gpu"),
        'device=\'gpu\': choose "cpu", "cuda", "cuda:0", "mps" ... or a CUDA index from 0; did you mean \'cuda\'?',
    ),
    "device with a slip": (
        ValueError,
        lambda: tb.to_torch(six(), device="cdua:0"),
        'device=\'cdua:0\': choose "cpu", "cuda", "cuda:0", "mps" ... or a CUDA index from 0; did you mean \'cuda\'?',
    ),
    "device in capitals": (
        ValueError,
        lambda: tb.plan(six(), "torch", device="CPU"),
        'device=\'CPU\': choose "cpu", "cuda", "cuda:0", "mps" ... or a CUDA index from 0; did you mean \'cpu\'?',
    ),
    "device of torch alone": (
        ValueError,
        lambda: tb.to_torch(six(), device=torch.device("meta")),
        'device=\'meta\': choose "cpu", "cuda", "cuda:0", "mps" ... or a CUDA index from 0; a tensor on it '
        "has no values: torch.empty(x.shape, device='meta') makes one",
    ),
    "device by an index that torch refuses": (
        ValueError,
        lambda: tb.plan(six(), "torch", device="cuda:01"),
        'device=\'cuda:01\': choose "cpu", "cuda", "cuda:0", "mps" ... or a CUDA index from 0; did you mean \'cuda\'?',
    ),
    "negative device": (
        ValueError,
        lambda: tb.to_torch(six(), device=-1),
        'device=-1: choose "cpu", "cuda", "cuda:0", "mps" ... or a CUDA index from 0',
    ),
    "device in capitals, of torch alone": (
        ValueError,
        lambda: tb.plan(six(), "torch", device="MPS"),
        'device=\'MPS\': choose "cpu", "cuda", "cuda:0", "mps" ... or a CUDA index from 0; did you mean \'mps\'?',
    ),
    "device that is none": (
        TypeError,
        lambda: tb.to_torch(six(), device=1.5),
        "device=1.5: give a name, a CUDA index, torch.device or cupy.cuda.Device",
    ),
    "host for CuPy": (
        ValueError,
        lambda: tb.plan(six(), "cupy", device="cpu"),
        'to_cupy(device="cpu"): CuPy arrays live on CUDA devices; use to_numpy for the host',
    ),
    "pinned device memory": (
        ValueError,
        lambda: tb.to_torch(six(), pin_memory=True, device="cuda:1"),
        "to_torch(pin_memory=True, device='cuda:1'): pinned memory is host memory; leave pin_memory out, transfers are "
        "staged through pinned memory already",
    ),
    "big-endian dtype": (
        TypeError,
        lambda: tb.to_numpy(six(), dtype=">f4"),
        "dtype='>f4': results are in native byte order; ask for 'float32'",
    ),
    "target": (ValueError, lambda: tb.plan(six(), "jax"), 'plan(to=\'jax\'): choose "numpy", "torch" or "cupy"'),
    "target with a slip": (
        ValueError,
        lambda: tb.plan(six(), "pytorch"),
        'plan(to=\'pytorch\'): choose "numpy", "torch" or "cupy"; did you mean \'torch\'?',
    ),
    "target as a module": (
        ValueError,
        lambda: tb.plan(six(), torch),
        'plan(to=<module torch>): choose "numpy", "torch" or "cupy"; did you mean \'torch\'?',
    ),
    "target as a list": (
        ValueError,
        lambda: tb.plan(six(), ["torch"]),
        'plan(to=[\'torch\']): choose "numpy", "torch" or "cupy"',
    ),
    "option with a slip": (
        TypeError,
        lambda: tb.plan(six(), "numpy", writeable=True),
        "plan(to='numpy'): to_numpy has no option 'writeable'; it has dtype, copy, writable, detach, out; "
        "did you mean 'writable'?",
    ),
    "option of another function": (
        TypeError,
        lambda: tb.plan(six(), "torch", writable=True),
        "plan(to='torch'): to_torch has no option 'writable'; it has device, dtype, copy, share_readonly, detach, "
        "pin_memory, non_blocking, out",
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_wrong_option_is_a_plain_error_that_says_what_is_allowed(option):
    assert_raises(*OPTIONS[option])


NO_DTYPE = {
    "float33": "did you mean 'float32'?",
    "flaot32": "did you mean 'float32'?",
    "torch.flaot32": "did you mean 'float32'?",
    "Bfloat16": "did you mean 'bfloat16'?",
    "bf16": "did you mean 'bfloat16'?",
    "fp32": "did you mean 'float32'?",
    "e4m3fn": "did you mean 'float8_e4m3fn'?",
    "zzz": 'names are those of NumPy and torch, "float32", "int64", "bfloat16" ...',
    object: 'names are those of NumPy and torch, "float32", "int64", "bfloat16" ...',
    torch.qint8: 'names are those of NumPy and torch, "float32", "int64", "bfloat16" ...',
}


@pytest.mark.parametrize("dtype", NO_DTYPE, ids=str)
def test_dtype_that_is_none_names_the_nearest_there_is(dtype):
    text = f"dtype={dtype!r} is not an element type that arrays can share; {NO_DTYPE[dtype]}"
    assert_raises(TypeError, lambda: tb.to_torch(six(), dtype=dtype), text)


@pytest.mark.parametrize("dtype", [str, "U5", "datetime64[s]", "torch.str", "torch.cfloat32"])
def test_dtype_that_cannot_be_shared_is_a_type_error(dtype):
    with pytest.raises(TypeError, match="is not an element type that arrays can share"):
        tb.to_torch(six(), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool], ids=str)
def test_dtype_is_also_known_by_the_name_that_torch_prints(dtype):
    assert tb.to_torch(six(), dtype=str(dtype)).dtype is dtype


ALIASES = ["double", "float", "half", "long", "int", "short", "cdouble", "cfloat", "chalf"]


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
@pytest.mark.parametrize("name", ALIASES)
def test_names_behind_torch_mean_what_they_mean_in_torch(name):
    meant = getattr(torch, name)
    assert tb.to_torch(torch.ones(3), dtype=f"torch.{name}").dtype is meant


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
@pytest.mark.parametrize("name", ["cfloat", "chalf"])
def test_names_that_torch_alone_has_need_no_torch(name):
    assert tb.to_torch(torch.ones(3), dtype=name).dtype is getattr(torch, name)


def test_all_aliases_of_torch_are_known():
    spellings = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
    shared = {name for name, dtype in spellings.items() if str(dtype).removeprefix("torch.") in DTYPES}
    assert shared - DTYPES.keys() == set(ALIASES)


@pytest.mark.parametrize("name", ["float", "int", "double", "half", "long", "short", "single", "bool"])
def test_names_without_torch_mean_what_they_mean_in_numpy(name):
    assert tb.to_numpy(six(), dtype=name).dtype == np.dtype(name)


NAMES_ITSELF = {
    "describe": lambda: tb.describe("text"),
    "shares_memory": lambda: tb.shares_memory(six(), "text"),
    "share_memory_pool": lambda: tb.share_memory_pool(),
}


@pytest.mark.parametrize("name", NAMES_ITSELF)
def test_error_begins_with_the_function_that_was_called(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # not to be imported
    with pytest.raises(tb.BridgeError, match=f"^{name}: "):
        NAMES_ITSELF[name]()
