"""Foreign producers without DLPack: array interfaces and buffers of all kinds."""

from __future__ import annotations

import array
import ctypes
import gc
import io
import mmap
import re
import sys
import warnings
import weakref
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import pytest
from _facts_probes import address
from _producers import laid_out

import tensorbridge as tb

TARGETS = {"numpy": tb.to_numpy, "torch": tb.to_torch}


class Says:
    """An object with these attributes and nothing else."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


ABSENT = object()


def interface(memory, **fields):
    """An object with the array interface of `memory`, but for these fields."""
    facts = {**memory.__array_interface__, **fields}
    return Says(__array_interface__={k: v for k, v in facts.items() if v is not ABSENT}, kept=memory)


# -- __array_interface__


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("strides", [(3, 1), (1, 2), (-3, 1), (0, 1)])
def test_an_array_interface_is_read_with_its_strides(strides, target):
    memory = laid_out((2, 3), strides)
    result = TARGETS[target](interface(memory))
    assert result.tolist() == memory.tolist()
    assert tb.plan(interface(memory), target).zero_copy == (address(result) == address(memory))


@pytest.mark.parametrize("typestr", [">f8", "<f8", "|u1", "<c16", "|b1", ">i2"])
def test_an_array_interface_keeps_its_dtype_and_torch_gets_native_bytes(typestr):
    memory = np.ones(3, dtype=typestr)
    assert tb.to_numpy(interface(memory), copy=False).dtype == np.dtype(typestr)
    t = tb.to_torch(interface(memory))
    assert str(t.dtype).removeprefix("torch.") == np.dtype(typestr).newbyteorder("=").name
    assert t.tolist() == [1, 1, 1]


def test_a_read_only_array_interface_stays_read_only():
    memory = np.zeros(3)
    memory.flags.writeable = False
    assert not tb.to_numpy(interface(memory)).flags.writeable
    tb.to_torch(interface(memory)).fill_(1)
    assert memory.tolist() == [0, 0, 0]


def test_the_object_behind_an_array_interface_is_kept_alive():
    producer = interface(np.arange(3.0))
    alive = weakref.ref(producer)
    views = [tb.to_numpy(producer), tb.to_torch(producer)]
    del producer
    assert alive() is not None
    assert [v.tolist() for v in views] == [[0, 1, 2]] * 2
    del views
    gc.collect()
    assert alive() is None


def test_data_may_be_a_buffer_or_the_object_s_own():
    facts = {"version": 3, "shape": (2,), "typestr": "<i2"}
    assert tb.to_torch(Says(__array_interface__={**facts, "data": b"\x01\0\x02\0"})).tolist() == [1, 2]

    class Own(bytearray):
        __array_interface__ = facts

    own = Own(b"\x01\0\x02\0")
    t = tb.to_torch(own)
    t[0] = 7
    assert bytes(own) == b"\x07\0\x02\0"


BUFFERS = {
    "too short": (8, {}, "bytes 0 to 64 of its buffer, which holds 8"),
    "one byte short": (63, {}, "bytes 0 to 64 of its buffer, which holds 63"),
    "an offset beyond": (64, {"offset": 8}, "bytes 8 to 72 of its buffer, which holds 64"),
    "an offset before": (64, {"offset": -8}, "bytes -8 to 56 of its buffer, which holds 64"),
    "strides beyond": (64, {"strides": (16,)}, "bytes 0 to 120 of its buffer, which holds 64"),
    "strides before": (64, {"strides": (-8,)}, "bytes -56 to 8 of its buffer, which holds 64"),
    "nothing": (0, {"shape": ()}, "bytes 0 to 8 of its buffer, which holds 0"),
}
ENOUGH = {
    "just": (64, {}),
    "after an offset": (72, {"offset": 8}),
    "one element again and again": (8, {"strides": (0,)}),
    "backwards from the last": (64, {"strides": (-8,), "offset": 56}),
    "no element": (0, {"shape": (0, 3)}),
    "dates as numbers": (np.zeros(8, "<M8[s]"), {}),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", BUFFERS)
def test_an_array_interface_that_reaches_out_of_its_buffer_is_a_malformed_producer(name, target):
    held, fields, words = BUFFERS[name]
    facts = {"version": 3, "shape": (8,), "typestr": "<f8", **fields}
    for data in (bytes(held), bytearray(held)):
        producer = Says(__array_interface__={**facts, "data": data})
        with pytest.raises(tb.ProducerError, match=rf"malformed producer: __array_interface__ needs {words}\.$"):
            TARGETS[target](producer)
    own = type("Own", (bytearray,), {"__array_interface__": facts})(held)
    with pytest.raises(tb.ProducerError, match=words):
        tb.plan(own, target)


@pytest.mark.parametrize("name", ENOUGH)
def test_an_array_interface_may_use_its_buffer_up(name):
    held, fields = ENOUGH[name]
    data = bytearray(held) if isinstance(held, int) else held
    facts = {"version": 3, "shape": (8,), "typestr": "<f8", "data": data, **fields}
    assert not tb.to_numpy(Says(__array_interface__=facts)).any()


def test_the_buffer_of_an_array_interface_cannot_be_grown_under_the_result():
    data = bytearray(np.arange(8.0))
    a = tb.to_numpy(Says(__array_interface__={"version": 3, "shape": (8,), "typestr": "<f8", "data": data}))
    with pytest.raises(BufferError):
        data.extend(bytes(2**20))
    a[0] = 1
    assert np.frombuffer(data)[0] == 1


GARBAGE = {
    "no dict": [1],
    "null address": {"data": (0, False)},
    "address by name": {"data": ("here", False)},
    "no data at all": {"data": ABSENT},
    "unknown typestr": {"typestr": "garbage"},
    "no typestr": {"typestr": ABSENT},
    "no shape": {"shape": ABSENT},
    "shape of floats": {"shape": (3.0,)},
    "shape by name": {"shape": "abc"},
    "negative length": {"shape": (-3,)},
    "more elements than addresses": {"shape": (2**62, 2**62), "strides": None},
    "one stride too many": {"strides": (8, 8)},
    "strides by name": {"strides": "no"},
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fault", GARBAGE)
def test_a_garbled_array_interface_is_a_malformed_producer(fault, target):
    fields = GARBAGE[fault]
    producer = interface(np.zeros(3), **fields) if isinstance(fields, dict) else Says(__array_interface__=fields)
    with pytest.raises(tb.ProducerError, match=f"^to_{target}: Says is a malformed producer: __array_inter") as caught:
        TARGETS[target](producer)
    if fault in ("no dict", "no shape", "no typestr"):  # asked before NumPy is, which dies of it up to 2.2
        assert "no dict with a shape and a typestr" in str(caught.value)
    if fault == "no data at all":  # NumPy would speak of scalars
        assert str(caught.value).endswith('lacks "data", and the object has no buffer to take for it.')
    assert re.search(r"[^.]\.$", str(caught.value)), "one full stop, NumPy's own or ours"


MEANT = {
    "mask": ({"mask": np.zeros(3, dtype=bool)}, "mask"),
    "fields": ({"typestr": "|V8", "descr": [("a", "<f4"), ("b", "<f4")]}, "structured"),
    "objects": ({"typestr": "|O8"}, "object"),
    "dates": ({"typestr": "<M8[s]"}, "dates"),
    "text": ({"typestr": "<U2"}, "text"),
    "raw bytes": ({"typestr": "|V8", "descr": ABSENT}, "void"),
}


@pytest.mark.parametrize("meaning", MEANT)
def test_an_array_interface_of_no_plain_numbers_is_refused_with_a_cure(meaning):
    fields, words = MEANT[meaning]
    with pytest.raises(tb.UnsupportedArrayError, match=words) as caught:
        tb.to_torch(interface(np.zeros(3), **fields))
    assert len(str(caught.value).splitlines()) == 2


# -- __cuda_array_interface__, as far as it goes without a device

CUDA_FACTS = {"shape": (3,), "typestr": "<f4", "data": (4096, False), "version": 3}


def test_a_cuda_array_interface_is_described_without_a_device(monkeypatch):
    monkeypatch.setattr("tensorbridge._cuda._streams.usable", lambda framework: False)
    info = tb.describe(Says(__cuda_array_interface__={**CUDA_FACTS, "strides": (-4,)}))
    assert (info.framework, info.device, info.dtype, info.strides) == (
        "cuda_array_interface",
        "cuda:0",
        "float32",
        (-4,),
    )


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"typestr": "garbage"}, tb.ProducerError, "garbles"),
        ({"data": None}, tb.ProducerError, "garbles"),
        ({"shape": None}, tb.ProducerError, "garbles"),
        ({"stream": 0}, tb.ProducerError, "stream 0"),
        ({"stream": "main"}, tb.ProducerError, "garbles"),
        ({"shape": (3.0,)}, tb.ProducerError, "garbles"),
        ({"shape": (-3,)}, tb.ProducerError, r"shape \(-3,\)"),
        ({"strides": (4, 4)}, tb.ProducerError, r"strides \(4, 4\)"),
        ({"strides": 4}, tb.ProducerError, "garbles"),
        ({"data": (0, False)}, tb.ProducerError, "address 0"),
        ({"mask": 1}, tb.UnsupportedArrayError, "mask"),
        ({"typestr": ">f4"}, tb.UnsupportedArrayError, ">f4"),
    ],
)
def test_a_garbled_cuda_array_interface_is_refused(fields, error, words):
    with pytest.raises(error, match=words):
        tb.describe(Says(__cuda_array_interface__={**CUDA_FACTS, **fields}))


def test_a_cuda_array_interface_must_be_a_dict():
    with pytest.raises(tb.ProducerError, match="is int, not a dict"):
        tb.describe(Says(__cuda_array_interface__=5))


@pytest.mark.parametrize("attribute", ["__cuda_array_interface__", "__array_interface__"])
def test_an_interface_that_raises_is_quoted(attribute):
    broken = type("Broken", (), {attribute: property(lambda self: 1 // 0)})
    with pytest.raises(tb.ProducerError, match="ZeroDivisionError") as caught:
        tb.to_numpy(broken())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


# -- Buffers


def ctypes_array(kind, *values):
    return (kind * len(values))(*values)


def mapped(**how):
    region = mmap.mmap(-1, 4, **how)
    region[:] = b"\x01\x02\x03\x04"
    return region


def cast(format, *shape):
    return memoryview(bytearray(range(1, 9))).cast(format, *([shape] if shape else []))


EXPORTERS = {  # what exports, the dtype, the values
    "bytes": (lambda: b"\x01\x02", "uint8", [1, 2]),
    "bytearray": (lambda: bytearray(b"\x01\x02"), "uint8", [1, 2]),
    "memoryview": (lambda: memoryview(bytearray(b"\x01\x02")), "uint8", [1, 2]),
    "memoryview reversed": (lambda: memoryview(bytearray(b"\x01\x02"))[::-1], "uint8", [2, 1]),
    "memoryview in steps": (lambda: cast("B")[1::3], "uint8", [2, 5, 8]),
    "memoryview of shorts": (lambda: cast("h"), "int16", [0x0201, 0x0403, 0x0605, 0x0807]),
    "memoryview in two dimensions": (lambda: cast("B", 2, 4), "uint8", [[1, 2, 3, 4], [5, 6, 7, 8]]),
    "memoryview of nothing": (lambda: memoryview(b""), "uint8", []),
    "memoryview of no dimension": (lambda: cast("q", *()), "int64", [0x0807060504030201]),
    "memoryview of truths": (lambda: memoryview(bytearray(b"\x01\0")).cast("?"), "bool", [True, False]),
    "read-only memoryview": (lambda: memoryview(bytearray(b"\x01\x02")).toreadonly(), "uint8", [1, 2]),
    "mmap": (mapped, "uint8", [1, 2, 3, 4]),
    "BytesIO": (lambda: io.BytesIO(b"\x01\x02").getbuffer(), "uint8", [1, 2]),
    "ctypes": (lambda: ctypes_array(ctypes.c_int, 1, -2), "int32", [1, -2]),
    "ctypes in two dimensions": (lambda: ((ctypes.c_double * 2) * 2)((1, 2), (3, 4)), "float64", [[1, 2], [3, 4]]),
    "ctypes truths": (lambda: ctypes_array(ctypes.c_bool, True, False), "bool", [True, False]),
    "ctypes of the other byte order": (lambda: ctypes_array(ctypes.c_int16.__ctype_be__, 1, 2), ">i2", [1, 2]),
    "ctypes number": (lambda: ctypes.c_float(1.5), "float32", 1.5),
    **{
        f"array of {code!r}": (lambda code=code: array.array(code, [1, 2]), np.dtype(code).name, [1, 2])
        for code in "bBhHiIlLqQfd"
    },
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", EXPORTERS)
def test_a_buffer_is_read_as_what_it_says_it_holds(name, target):
    """`torch.asarray` and `torch.frombuffer` would read the bytes as float32 and as one dimension."""
    export, dtype, values = EXPORTERS[name]
    source = export()
    result = TARGETS[target](source)
    assert result.tolist() == values
    native = np.dtype(dtype).newbyteorder("=").name
    assert str(result.dtype).removeprefix("torch.") == (native if target == "torch" else str(np.dtype(dtype)))
    if target == "torch" and not memoryview(source).readonly:
        result.fill_(0)
        assert np.asarray(memoryview(source)).any() != tb.plan(source, "torch").zero_copy or not result.numel()


@pytest.mark.parametrize("name", EXPORTERS)
def test_a_buffer_is_writable_as_its_exporter_Says(name):
    source = EXPORTERS[name][0]()
    view = memoryview(source)
    assert tb.to_numpy(source, copy=False).flags.writeable == (not view.readonly)
    assert tb.describe(source).writable == (not view.readonly)
    if view.readonly and view.nbytes:
        with pytest.raises(tb.CopyRequiredError, match="read-only"):
            tb.to_torch(source, copy=False)


def extend(source):
    source.extend(source)


def shared_memory_buffer():
    region = SharedMemory(create=True, size=4)
    region.buf[:4] = b"\x01\x02\x03\x04"
    region.unlink()
    return region


GROWING = {
    "bytearray": (lambda: bytearray(b"\x01\x02\x03\x04"), extend),
    "array": (lambda: array.array("B", b"\x01\x02\x03\x04"), extend),
    "mmap": (mapped, lambda source: source.close()),
    "mmap resized": (
        lambda: mapped(flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
        lambda source: source.resize(4 * mmap.PAGESIZE),
    ),
    "BytesIO": (lambda: io.BytesIO(b"\x01\x02\x03\x04"), lambda source: source.write(b"x" * 4096)),
    "SharedMemory": (shared_memory_buffer, lambda source: source.close()),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", GROWING)
def test_an_exporter_cannot_free_the_memory_under_the_result(name, target):
    make, act = GROWING[name]
    source = make()
    exported = {"BytesIO": lambda: source.getbuffer(), "SharedMemory": lambda: source.buf}.get(name, lambda: source)()
    result = TARGETS[target](exported)
    if isinstance(exported, memoryview):
        exported.release()
    with pytest.raises(BufferError):
        act(source)
    assert result.tolist() == [1, 2, 3, 4]
    del result
    act(source)


CLOSED = {
    "mmap": (mapped, lambda source: source.close()),
    "memoryview": (lambda: memoryview(bytearray(4)), lambda source: source.release()),
}


@pytest.mark.parametrize("name", CLOSED)
def test_an_exporter_that_is_closed_is_refused(name):
    make, close = CLOSED[name]
    source = make()
    close(source)
    with pytest.raises(tb.ProducerError, match=f"^to_torch: {name} failed to export its buffer: "):
        tb.to_torch(source)


def test_a_buffer_of_pointers_to_rows_is_refused():
    testbuffer = pytest.importorskip("_testbuffer", reason="this Python comes without its test modules")
    rows = testbuffer.ndarray(list(range(12)), shape=[3, 4], format="L", flags=testbuffer.ND_PIL)
    with pytest.raises(tb.ProducerError, match=r"ndarray exports a buffer that is no array: .*suboffsets"):
        tb.to_numpy(rows)


class Failing:
    def __buffer__(self, flags):
        raise OSError("the disk is gone")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="before Python 3.12 only C exports buffers")
def test_an_exporter_that_fails_is_named():
    with pytest.raises(tb.ProducerError, match="Failing failed to export its buffer: the disk is gone") as told:
        tb.to_torch(Failing())
    assert isinstance(told.value.__cause__, OSError)


class Pair(ctypes.Structure):
    _fields_ = [("a", ctypes.c_int), ("b", ctypes.c_double)]


class Either(ctypes.Union):
    _fields_ = [("a", ctypes.c_int), ("b", ctypes.c_double)]


NO_NUMBERS = {
    "structures": (lambda: (Pair * 2)(), "several fields"),
    "one structure": (lambda: Pair(), "several fields"),
    "unions": (lambda: (Either * 2)(), "raw bytes"),
    "pointers": (lambda: (ctypes.c_void_p * 2)(), "'<P'"),
    "typed pointers": (lambda: (ctypes.POINTER(ctypes.c_int) * 2)(), "'&<i'"),
    "references": (lambda: (ctypes.py_object * 2)(), "object"),
    "long doubles": (lambda: (ctypes.c_longdouble * 2)(), "'<g'"),
    "wide characters": (lambda: (ctypes.c_wchar * 2)(), "'<u'"),
    "characters": (lambda: (ctypes.c_char * 2)(), "text"),
    "unicode": (lambda: array.array("w" if sys.version_info >= (3, 13) else "u", "ab"), "text"),
    "a view of pointers": (lambda: cast("P"), "'P'"),
}


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_a_buffer_of_no_numbers_is_refused_without_a_guess_or_a_warning(name):
    export, words = NO_NUMBERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = export()
        with pytest.raises(tb.UnsupportedArrayError, match=words):
            tb.to_torch(source)
