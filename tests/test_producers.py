"""Foreign producers of DLPack, of any age and manners: what can be read is read, what cannot is an error of ours.

A capsule is made up field by field (see _producers.py); what it describes is never read by a framework first.
"""

from __future__ import annotations

import contextlib
import ctypes
import warnings

import numpy as np
import pytest
import torch
from _facts_probes import address, capsule_name
from _producers import AGES, LEGACY, VERSIONED, Holder, Made, Producer, laid_out, numbers

import tensorbridge as tb
from tensorbridge._adapters import _dlpack
from tensorbridge._dtypes import DTYPES

TARGETS = {"numpy": tb.to_numpy, "torch": tb.to_torch}
IMPORTABLE = [name for name, row in DTYPES.items() if row.dlpack is not None and row.numpy is not None]


# -- Any age of the protocol


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("age", AGES)
def test_every_age_of_the_protocol_is_read(age, target):
    producer = AGES[age](laid_out((2, 3), (3, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = TARGETS[target](producer)
    assert numbers(result).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert result.dtype == {"numpy": np.int64, "torch": torch.int64}[target]


@pytest.mark.parametrize("age", AGES)
def test_without_flags_nobody_has_offered_the_memory_for_writing(age):
    producer = AGES[age](laid_out((3,), (1,)))
    has_flags = age == "today"
    a = tb.to_numpy(producer, copy=False)
    assert a.flags.writeable == has_flags
    assert address(a) == address(producer.made.memory)
    assert tb.plan(producer, "torch").zero_copy == has_flags
    assert address(tb.to_torch(producer, copy=False, share_readonly=True)) == address(producer.made.memory)


def test_the_newest_version_is_asked_for_and_no_stream_of_host_memory():
    producer = Producer(laid_out((3,), (1,)))
    tb.to_torch(producer)
    assert producer.asked == [{"max_version": (1, 0)}]


def test_a_minor_version_that_is_not_known_is_read_all_the_same():
    assert tb.to_numpy(Producer(laid_out((2,), (1,)), version=(1, 9))).tolist() == [1, 2]


def test_a_proxy_hands_the_protocol_through():
    class Proxy:
        def __init__(self, wrapped):
            self.__dict__["wrapped"] = wrapped

        def __getattr__(self, name):
            return getattr(self.wrapped, name)

    assert tb.to_torch(Proxy(Producer(laid_out((2,), (1,))))).tolist() == [1, 2]
    assert tb.to_torch(Proxy(torch.tensor([1, 2]))).tolist() == [1, 2]


# -- What a capsule may say


@pytest.mark.parametrize("name", IMPORTABLE)
def test_every_dtype_that_dlpack_can_say_keeps_its_bits(name):
    memory = (np.arange(6) % 2 + 1).astype("float32").astype(DTYPES[name].numpy)
    producer = Producer(memory)
    a = tb.to_numpy(producer)
    assert (a.dtype, a.tobytes(), address(a)) == (memory.dtype, memory.tobytes(), address(memory))
    if DTYPES[name].torch:
        t = tb.to_torch(producer)
        assert (t.dtype, address(t)) == (getattr(torch, name), address(memory))
    else:
        with pytest.raises(tb.UnsupportedArrayError, match=f"torch has no {name}"):
            tb.to_torch(producer)


LAYOUTS = {  # shape, strides in elements
    "C": ((2, 3), (3, 1)),
    "F": ((2, 3), (1, 2)),
    "gaps": ((2, 3), (12, 2)),
    "reversed": ((3,), (-1,)),
    "reversed both ways": ((2, 3), (-3, -1)),
    "broadcast": ((2, 3), (0, 1)),
    "overlapping": ((3, 2), (1, 1)),
    "length 1, any stride": ((1, 3), (-7, 1)),
    "length 1, huge stride": ((3, 1), (1, 2**40)),
    "0-d": ((), ()),
    "empty": ((0, 3), (3, 1)),
    "empty, strides of zero": ((2, 0), (0, 0)),
    "empty, negative stride": ((0,), (-1,)),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_and_torch_is_never_given_a_negative_stride(layout, target):
    memory = laid_out(*LAYOUTS[layout])
    result = TARGETS[target](Producer(memory))
    assert tuple(result.shape) == memory.shape
    assert numbers(result).tolist() == numbers(memory).tolist()
    assert target == "numpy" or min(result.stride(), default=0) >= 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plan_knows_where_the_memory_is(layout):
    memory = laid_out(*LAYOUTS[layout])
    producer = Producer(memory)
    for target, convert in TARGETS.items():
        made = tb.plan(producer, target)
        assert made.zero_copy == (not memory.size or address(convert(producer)) == address(memory))


NULLS = {
    "strides": ({"strides": None}, (2, 3)),
    "strides and shape of a 0-d array": ({"strides": None, "shape": None}, ()),
    "data of an empty array": ({"data": None}, (0, 3)),
    "strides and data": ({"data": None, "strides": None}, (3, 0)),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("null", NULLS)
def test_null_pointers_that_mean_something_are_read(null, target):
    fields, shape = NULLS[null]
    memory = np.arange(1, 1 + int(np.prod(shape))).reshape(shape)
    result = TARGETS[target](Producer(memory, **fields))
    assert tuple(result.shape) == shape
    assert result.tolist() == memory.tolist()


@pytest.mark.parametrize("offset", [1, 3, 4, 8, 64])
def test_byte_offset_is_added_and_what_is_then_unaligned_is_copied_for_torch(offset):
    memory = laid_out((3,), (1,), offset=offset)
    producer = Producer(memory, data=address(memory) - offset, byte_offset=offset)
    assert address(tb.to_numpy(producer)) == address(memory)
    t = tb.to_torch(producer)
    assert t.tolist() == [1, 2, 3]
    assert (address(t) == address(memory)) == (address(memory) % 8 == 0) == tb.plan(producer, "torch").zero_copy


def test_a_read_only_flag_is_kept():
    producer = Producer(laid_out((3,), (1,)), flags=1)
    assert not tb.to_numpy(producer).flags.writeable
    assert tb.to_numpy(producer, writable=True).flags.writeable
    tb.to_torch(producer).zero_()
    assert producer.made.memory.tolist() == [1, 2, 3]
    with pytest.raises(tb.CopyRequiredError, match="read-only"):
        tb.to_torch(producer, copy=False)


class OnCuda(Producer):
    def __dlpack_device__(self):
        return 2, 3


@pytest.fixture
def stream_seven(monkeypatch):
    monkeypatch.setattr("tensorbridge._cuda._streams.current", lambda framework, index: 7)
    monkeypatch.setattr("tensorbridge._cuda._streams.on_device", lambda index: contextlib.nullcontext())


def test_a_capsule_on_a_device_is_read_without_one_and_asked_for_on_a_stream(stream_seven):
    producer = OnCuda(laid_out((2, 3), (-3, 1)), device=(2, 3), flags=1)
    info = tb.describe(producer)
    assert (info.framework, info.device, info.shape, info.strides) == ("dlpack", "cuda:3", (2, 3), (-24, 8))
    assert (info.order, info.writable, info.address) == ("reversed C", False, address(producer.made.memory))
    assert producer.asked == [{"max_version": (1, 0), "stream": 7}]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "complex128"])
def test_negative_strides_that_cupy_divided_as_unsigned_numbers_are_negative(stream_seven, dtype):
    """CuPy 14.2 exports -4 bytes of float32 as 2**62 - 1 elements; in bytes both are the same 64 bits."""
    memory = np.zeros((4, 6), dtype)[::-2, ::-2]
    itemsize = memory.itemsize
    divided = tuple(s if itemsize == 1 else (s + 2**64) // itemsize for s in memory.strides)
    info = tb.describe(OnCuda(memory, device=(2, 3), strides=divided))
    assert info.strides == memory.strides == (-12 * itemsize, -2 * itemsize)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"shape": (-3,)}, r"shape \(-3,\)"),
        ({"data": None}, "null address"),
        ({"ndim": 65}, "65 dimensions"),
        ({"device": (1, 0)}, "device type 1, not on CUDA"),
    ],
)
def test_a_malformed_capsule_on_a_device_is_refused(stream_seven, fields, words):
    with pytest.raises(tb.ProducerError, match=words):
        tb.describe(OnCuda(laid_out((3,), (1,)), **{"device": (2, 3), **fields}))


# -- What it must not say

MALFORMED = {
    "no data": ({"data": None}, "null address"),
    "negative length": ({"shape": (-3,)}, r"shape \(-3,\)"),
    "negative dimensions": ({"ndim": -1}, "-1 dimensions"),
    "too many dimensions": ({"ndim": 65}, "65 dimensions"),
    "dimensions without end": ({"ndim": 2**31 - 1}, "2147483647 dimensions"),
    "no shape": ({"shape": None, "ndim": 1}, "without a shape"),
    "more elements than addresses": ({"shape": (2**40, 2**40), "strides": None}, "too big"),
    "strides beyond all memory": ({"strides": (2**62,)}, "strides"),
    "version 2": ({"version": (2, 0)}, r"DLPack 2\.0"),
    "device other than it said": ({"device": (2, 0)}, "device type 2"),
    "another capsule": ({"name": b"arrow_schema"}, "arrow_schema"),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_capsule_is_refused_and_left_to_free_itself(fault, target):
    fields, words = MALFORMED[fault]
    producer = Producer(laid_out((3,), (1,)), **fields)
    with pytest.raises(tb.ProducerError, match=words) as caught:
        TARGETS[target](producer)
    assert str(caught.value).startswith(f"to_{target}: Producer is a malformed producer")
    caught.value.__traceback__ = caught.value.__context__ = caught.value.__cause__ = None
    del caught
    taken_for_dlpack = fault != "another capsule"
    assert producer.made.freed == producer.made.made * taken_for_dlpack


@pytest.mark.parametrize("dtype", [(2, 64, 2), (2, 64, 0), (0, 4, 1), (3, 64, 1), (17, 4, 1), (200, 8, 1)])
def test_elements_that_are_no_numbers_here_are_refused_by_their_code(dtype):
    with pytest.raises(tb.UnsupportedArrayError, match="Producer"):
        tb.to_numpy(Producer(laid_out((3,), (1,)), dtype=dtype))


class Says:
    """A producer that does as it is told."""

    def __init__(self, device=lambda: (1, 0), capsule=lambda: None):
        self._device, self._capsule = device, capsule

    def __dlpack_device__(self):
        return self._device()

    def __dlpack__(self, **_):
        return self._capsule()

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("DLPack was refused, and __array__ asked all the same")


def raising(error):
    def function():
        raise error

    return function


class OwnTypeError(TypeError):
    """As pyarrow's ArrowTypeError."""


FAULTS = {
    "no capsule": ({"capsule": lambda: 5}, tb.ProducerError, "returned int, not a capsule"),
    "none": ({"capsule": lambda: None}, tb.ProducerError, "returned NoneType"),
    "device of three": ({"device": lambda: (1, 0, 0)}, tb.ProducerError, r"returned \(1, 0, 0\)"),
    "device by name": ({"device": lambda: "cpu"}, tb.ProducerError, "returned 'cpu'"),
    "no device": ({"device": lambda: None}, tb.ProducerError, "returned None"),
    "metal": ({"device": lambda: (8, 0)}, tb.DeviceError, "DLPack type 8"),
    "a CUDA device that is not there": (
        {"device": lambda: (2, 99)},
        (tb.DeviceError, tb.MissingFrameworkError),
        "cuda:99",
    ),
    "BufferError": ({"capsule": raising(BufferError("busy"))}, tb.ProducerError, "BufferError: busy"),
    "KeyError": ({"capsule": raising(KeyError("key"))}, tb.ProducerError, "KeyError: 'key'"),
    "RuntimeError": ({"capsule": raising(RuntimeError("gone"))}, tb.ProducerError, "RuntimeError: gone"),
    "TypeError": ({"capsule": raising(TypeError("no bits"))}, tb.UnsupportedArrayError, "refuses .* no bits"),
    "its own TypeError": ({"capsule": raising(OwnTypeError("nulls"))}, tb.UnsupportedArrayError, "refuses .* nulls"),
    "device raises": ({"device": raising(RuntimeError("deleted"))}, tb.ProducerError, "device.*deleted"),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_producer_that_fails_is_quoted_and_asked_nothing_else(fault, target):
    answers, error, words = FAULTS[fault]
    with pytest.raises(error, match=words) as caught:
        TARGETS[target](Says(**answers))
    assert str(caught.value).startswith(f"to_{target}: Says ")
    raised = next((f for f in answers.values() if f.__name__ == "function"), None)
    if raised is not None:
        assert isinstance(caught.value.__cause__, Exception)
        assert str(caught.value.__cause__) in str(caught.value)


def test_a_refusal_by_the_producer_s_own_class_is_not_asked_for_again():
    asked = []

    class Arrow(Says):
        def __dlpack__(self, **keywords):
            asked.append(keywords)
            raise OwnTypeError("nulls")

    with pytest.raises(tb.UnsupportedArrayError):
        tb.to_numpy(Arrow())
    assert asked == [{"max_version": (1, 0)}]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes_through(error):
    with pytest.raises(error):
        tb.to_numpy(Says(capsule=raising(error())))


# -- Who holds the memory


@pytest.mark.parametrize("kind", [LEGACY, VERSIONED])
@pytest.mark.parametrize("target", TARGETS)
def test_the_memory_lives_as_long_as_the_result_and_is_freed_once(target, kind):
    made = Made(laid_out((3,), (1,)))
    result = TARGETS[target](Holder(made.capsule(kind)), **({"share_readonly": True} if target == "torch" else {}))
    view = result[1:]
    del result
    assert (made.freed, view.tolist()) == (0, [2, 3])
    del view
    assert made.freed == 1


@pytest.mark.parametrize("kind", [LEGACY, VERSIONED])
def test_a_capsule_under_a_view_is_taken_so_that_nobody_else_frees_it(kind):
    made = Made(laid_out((3,), (1,)))
    holder = Holder(made.capsule(kind))
    a = tb.to_numpy(holder)
    assert capsule_name(holder.capsule) == "used_" + kind.decode()
    with pytest.raises(RuntimeError, match="invalid capsule"):
        torch.from_dlpack(holder)
    with pytest.raises(tb.ProducerError, match="consumed before"):
        tb.to_numpy(holder)
    assert a.tolist() == [1, 2, 3]
    del a
    assert made.freed == 0  # the holder has it still
    assert tb.to_numpy(holder).tolist() == [1, 2, 3]


def test_looking_takes_nothing():
    made = Made(laid_out((3,), (1,)))
    holder = Holder(made.capsule(VERSIONED))
    tb.plan(holder, "numpy")
    tb.plan(holder, "torch", copy=True)
    tb.describe(holder)
    tb.shares_memory(holder, np.zeros(3))
    assert capsule_name(holder.capsule) == "dltensor_versioned"
    assert torch.from_dlpack(holder).tolist() == [1, 2, 3]
    with pytest.raises(tb.ProducerError, match="consumed before"):
        tb.to_numpy(holder)


def test_a_copy_lets_the_capsule_go():
    producer = Producer(laid_out((3,), (1,)))
    copies = tb.to_numpy(producer, copy=True), tb.to_torch(producer, dtype="float32")
    assert [c.tolist() for c in copies] == [[1, 2, 3], [1, 2, 3]]
    assert producer.made.freed == producer.made.made == 2


def test_other_users_of_ctypes_do_not_disturb_the_reading(monkeypatch):
    """What attributes of ctypes.pythonapi give is shared by the process: others set other argument types on it."""
    assert _dlpack  # imported before the others come
    for name in ("PyCapsule_SetName", "PyCapsule_GetName", "PyCapsule_GetPointer"):
        monkeypatch.setattr(getattr(ctypes.pythonapi, name), "argtypes", [ctypes.c_double])

    class Foreign:
        def __dlpack__(self, **keywords):
            return np.arange(3.0).__dlpack__(**keywords)

        def __dlpack_device__(self):
            return (1, 0)

    assert tb.to_numpy(Foreign()).tolist() == [0.0, 1.0, 2.0]
