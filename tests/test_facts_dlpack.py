"""DLPack as NumPy and torch speak it on the CPU: structs, flags, negotiation, stream numbers.

Part of the fact tests: see test_facts.py.
"""

import inspect

import numpy as np
import pytest
import torch
from _facts_probes import (
    IS_COPIED,
    NUMPY,
    READ_ONLY,
    Producer,
    ProducerBefore2023,
    address,
    capsule_name,
    read_capsule,
)

# 2.4: RuntimeError; a ValueError from 2.5 on.
NUMPY_REFUSES_A_STREAM_WITH = RuntimeError if NUMPY < (2, 5) else ValueError

CAPSULES = {  # what, dtype (code, bits, lanes), strides in elements
    "numpy": (lambda: np.arange(6.0).reshape(2, 3), (2, 64, 1), (3, 1)),
    "numpy-reversed": (lambda: np.arange(6)[::-2], (0, 64, 1), (-2,)),
    "numpy-offset": (lambda: np.arange(6, dtype=np.uint8)[2:], (1, 8, 1), (1,)),
    "numpy-0d": (lambda: np.array(1j), (5, 128, 1), None),
    "numpy-empty": (lambda: np.zeros((0, 3), bool), (6, 8, 1), (0, 0)),
    "torch": (lambda: torch.ones(2, 3).t(), (2, 32, 1), (1, 3)),
    "torch-size-1": (lambda: torch.rand(16)[::3][:1], (2, 32, 1), (3,)),
    "torch-bfloat16": (lambda: torch.ones(2, dtype=torch.bfloat16), (4, 16, 1), (1,)),
    "torch-float8_e4m3fn": (lambda: torch.ones(2, dtype=torch.float8_e4m3fn), (10, 8, 1), (1,)),
    "torch-float8_e4m3fnuz": (lambda: torch.ones(2, dtype=torch.float8_e4m3fnuz), (11, 8, 1), (1,)),
    "torch-float8_e5m2": (lambda: torch.ones(2, dtype=torch.float8_e5m2), (12, 8, 1), (1,)),
    "torch-float8_e5m2fnuz": (lambda: torch.ones(2, dtype=torch.float8_e5m2fnuz), (13, 8, 1), (1,)),
    "torch-float8_e8m0fnu": (lambda: torch.ones(2, dtype=torch.float8_e8m0fnu), (14, 8, 1), (1,)),
    "torch-float4_e2m1fn_x2": (lambda: torch.ones(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), (17, 4, 2), (1,)),
    "torch-empty": (lambda: torch.ones(0, 3, dtype=torch.bool), (6, 8, 1), (3, 1)),
}


@pytest.mark.parametrize("max_version", [None, (0, 8), (1, 0)])
@pytest.mark.parametrize("name", CAPSULES)
def test_a_capsule_has_the_layout_of_dlpack_h(name, max_version):
    make, dtype, strides = CAPSULES[name]
    x = make()
    capsule = x.__dlpack__(max_version=max_version)
    told = read_capsule(capsule)
    assert capsule_name(capsule) == ("dltensor_versioned" if max_version == (1, 0) else "dltensor")
    assert (told.major, told.flags) == ((1, 0) if max_version == (1, 0) else (None, None))
    assert (told.device, told.dtype, told.shape) == ((1, 0), dtype, tuple(x.shape))
    left_out = told.strides is None and isinstance(x, np.ndarray)  # by NumPy 2.2, of arrays in C's order
    assert left_out or told.strides == strides
    assert told.byte_offset == 0
    if 0 in x.shape:  # the spec says NULL; NumPy sends an address
        assert (told.data is None) == isinstance(x, torch.Tensor)
    else:
        assert told.data == address(x)


def test_only_numpy_marks_a_copy():
    assert read_capsule(np.ones(2).__dlpack__(max_version=(1, 0), copy=True)).flags == IS_COPIED
    assert read_capsule(torch.ones(2).__dlpack__(max_version=(1, 0), copy=True)).flags == 0


def test_read_only_crosses_dlpack_into_numpy_but_not_into_torch():
    a = np.arange(3.0)
    a.setflags(write=False)
    assert read_capsule(a.__dlpack__(max_version=(1, 0))).flags == READ_ONLY
    with pytest.raises(BufferError, match="readonly"):
        a.__dlpack__()
    assert not np.from_dlpack(a).flags.writeable
    through_torch = np.from_dlpack(torch.from_dlpack(a))
    assert through_torch.flags.writeable
    assert address(through_torch) == address(a)


@pytest.mark.parametrize("consume", [np.from_dlpack, torch.from_dlpack])
def test_a_producer_from_before_2023_is_asked_again_without_keywords(consume):
    a = np.arange(3.0)
    shared = consume(ProducerBefore2023(a))
    assert address(shared) == address(a)
    if consume is np.from_dlpack:
        assert not shared.flags.writeable  # a legacy capsule cannot say read-only, so NumPy takes it for that


def test_copy_is_a_type_error_in_numpy_and_forgotten_by_torch_when_the_producer_is_old():
    a = np.arange(3.0)
    with pytest.raises(TypeError):
        np.from_dlpack(ProducerBefore2023(a), copy=False)
    assert address(torch.from_dlpack(ProducerBefore2023(a), copy=False)) == address(a)
    assert address(torch.from_dlpack(ProducerBefore2023(a), copy=True)) != address(a)


ASKED = [
    (np.from_dlpack, {}, {"dl_device": None, "copy": None, "max_version": (1, 0)}),
    (np.from_dlpack, {"copy": False}, {"dl_device": None, "copy": False, "max_version": (1, 0)}),
    (torch.from_dlpack, {}, {"max_version": (1, 0)}),
    (torch.from_dlpack, {"copy": True}, {"max_version": (1, 0), "copy": True}),
    (torch.from_dlpack, {"device": "cpu"}, {"max_version": (1, 0), "dl_device": (1, 0)}),
]


@pytest.mark.parametrize(("consume", "options", "keywords"), ASKED)
def test_no_stream_is_asked_for_on_the_cpu(consume, options, keywords):
    producer = Producer(np.arange(3.0))
    consume(producer, **options)
    assert producer.asked == [keywords]


def test_stream_numbers_that_a_cpu_producer_takes():
    """numpy: none at all. torch: None and -1, which is its default (PR #163242, array-api#974)."""
    with pytest.raises(NUMPY_REFUSES_A_STREAM_WITH, match="stream=None"):
        np.ones(2).__dlpack__(stream=-1)
    assert inspect.signature(torch.Tensor.__dlpack__).parameters["stream"].default == -1
    torch.ones(2).__dlpack__(stream=None)
    with pytest.raises(AssertionError, match="stream should be None on cpu"):
        torch.ones(2).__dlpack__(stream=1)


def test_a_capsule_is_consumed_once_and_renamed():
    capsule = np.arange(3.0).__dlpack__(max_version=(1, 0))
    torch.from_dlpack(capsule)
    assert capsule_name(capsule) == "used_dltensor_versioned"
    with pytest.raises(RuntimeError, match="consumed only once"):
        torch.from_dlpack(capsule)


UNEXPORTABLE = {
    "requires grad": (lambda: torch.ones(2, requires_grad=True), "require gradient"),
    "sparse": (lambda: torch.ones(2).to_sparse(), "layout"),
    "meta": (lambda: torch.ones(2, device="meta"), "meta"),
}


@pytest.mark.parametrize("name", UNEXPORTABLE)
def test_torch_refuses_to_export_with_a_buffer_error(name):
    make, words = UNEXPORTABLE[name]
    with pytest.raises(BufferError, match=words):
        make().__dlpack__(max_version=(1, 0))


def test_numpy_refuses_to_export_what_dlpack_cannot_say():
    for a in np.arange(3, dtype=">f4"), np.zeros(3, "u1, <f4")["f1"], np.zeros(2, np.longdouble):
        with pytest.raises(BufferError):
            a.__dlpack__(max_version=(1, 0))


def test_numpy_scalars_export_nothing_or_a_read_only_capsule():
    """NumPy's main branch gives scalars `__dlpack__`; 2.4 does not."""
    one = np.float32(1)
    if hasattr(one, "__dlpack__"):
        assert read_capsule(one.__dlpack__(max_version=(1, 0))).flags & READ_ONLY
    else:
        with pytest.raises(AttributeError):
            np.from_dlpack(one)


def test_torch_streams_have_the_cuda_stream_protocol():
    assert hasattr(torch.cuda.Stream, "__cuda_stream__")
    assert hasattr(torch.cuda.ExternalStream, "__cuda_stream__")
