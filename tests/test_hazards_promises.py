"""No promise is broken: read-only, immutable, one write for one element; and what is fine today stays so.

Whoever may not be written to is not written to, on any way in: copied, or refused with copy=False, or shared where the
result can keep the promise, or on the caller's word.
"""

from __future__ import annotations

import dataclasses
import mmap
import threading
import warnings
import weakref
from collections import namedtuple

import ml_dtypes
import numpy as np
import pytest
import torch
from _facts_probes import address
from _producers import Of2021, Producer, laid_out

import tensorbridge as tb


def interface(a):
    return type("Interface", (), {"__array_interface__": a.__array_interface__, "kept": a})()


def frozen(a):
    a.flags.writeable = False
    return a


def array_method(a):
    return type("Array", (), {"__array__": lambda self, dtype=None, copy=None: a.copy() if copy else a})()


class Index:
    """Labels as pandas keeps them: immutable to the user, and writable in NumPy's eyes."""

    def __init__(self, labels):
        self.labels = np.array(labels)

    def get_indexer(self, target):
        return np.searchsorted(self.labels, target)

    def __array__(self, dtype=None, copy=None):
        return self.labels.copy() if copy else self.labels


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "numbers"
    np.arange(1.0, 5.0).tofile(path)
    return path


def mapped(file):
    with file.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


READ_ONLY = {  # sources of 1.0, 2.0, 3.0, 4.0 that must not be written
    "array": lambda file: frozen(np.arange(1.0, 5.0)),
    "view": lambda file: frozen(np.arange(9.0))[1:5],
    "matrix": lambda file: frozen(np.arange(1.0, 5.0).reshape(2, 2).T),
    "subclass": lambda file: frozen(np.arange(1.0, 5.0).view(np.matrix)),
    "memmap": lambda file: np.memmap(file, mode="r"),
    "memmap of numbers": lambda file: np.memmap(file, mode="r", dtype="float64"),
    "view of a memmap": lambda file: np.asarray(np.memmap(file, mode="r", dtype="float64"))[:],
    "frombuffer": lambda file: np.frombuffer(file.read_bytes()),
    "bytes": lambda file: file.read_bytes(),
    "memoryview": lambda file: memoryview(bytearray(file.read_bytes())).toreadonly(),
    "mmap": mapped,
    "DLPack with a flag": lambda file: Producer(laid_out((4,), (1,), "float64"), flags=1),
    "DLPack without flags": lambda file: Of2021(laid_out((4,), (1,), "float64")),
    "array interface": lambda file: interface(frozen(np.arange(1.0, 5.0))),
    "array method": lambda file: array_method(frozen(np.arange(1.0, 5.0))),
    "index": lambda file: Index([1.0, 2.0, 3.0, 4.0]),
    "bfloat16": lambda file: frozen(np.arange(1, 5).astype(ml_dtypes.bfloat16)),
    "broadcast": lambda file: np.broadcast_to(np.float64(1), (4,)),
    "reversed": lambda file: frozen(np.arange(1.0, 5.0))[::-1],
    "big-endian": lambda file: frozen(np.arange(1.0, 5.0).astype(">f8")),
}
CANNOT_BE_SHARED = {"reversed", "big-endian"}  # whoever may write


@pytest.fixture
def source(name, file):
    return READ_ONLY[name](file)


def values(x):
    return np.array(tb.to_numpy(x, copy=True)).tolist()


@pytest.mark.parametrize("name", READ_ONLY)
def test_a_read_only_source_is_copied_for_torch_and_no_write_reaches_it(source, name):
    before = values(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t = tb.to_torch(source)
    assert not tb.plan(source, "torch").zero_copy
    t.zero_()
    assert values(source) == before


@pytest.mark.parametrize("name", READ_ONLY)
def test_a_read_only_source_is_refused_where_it_would_have_to_be_copied(source, name):
    with pytest.raises(tb.CopyRequiredError) as caught:
        tb.to_torch(source, copy=False)
    assert "Allow the copy with copy=None" in str(caught.value)
    assert caught.value.plan.bytes_moved == tb.describe(source).nbytes
    if "memmap" in name:
        assert 'mode="c"' in str(caught.value)


@pytest.mark.parametrize("name", READ_ONLY)
def test_a_read_only_source_is_shared_on_the_caller_s_word_without_a_warning(source, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t = tb.to_torch(source, share_readonly=True)
    assert tb.shares_memory(source, t) == (name not in CANNOT_BE_SHARED)
    assert not tb.describe(source).writable


@pytest.mark.parametrize("name", READ_ONLY)
def test_a_read_only_source_is_shared_with_numpy_which_keeps_the_promise(source, name):
    a = tb.to_numpy(source, copy=False)
    assert tb.shares_memory(source, a)
    with pytest.raises(ValueError, match="read-only"):
        a[...] = 0
    with pytest.raises(ValueError, match="read-only"):
        tb.to_numpy(a)[...] = 0
    writable = tb.to_numpy(source, writable=True)
    writable[...] = 0
    assert not tb.shares_memory(source, writable)
    with pytest.raises(tb.CopyRequiredError):
        tb.to_numpy(source, writable=True, copy=False)


@pytest.mark.parametrize("name", READ_ONLY)
def test_a_list_of_read_only_parts_becomes_an_array_of_its_own(source, name):
    before = values(source)
    tb.to_torch([source, source]).zero_()
    tb.to_numpy([source, source])[...] = 0
    assert values(source) == before


def test_a_copy_of_a_memmap_is_no_memmap(file):
    copied = frozen(np.memmap(file, mode="r", dtype="float64").copy())
    with pytest.raises(tb.CopyRequiredError) as caught:
        tb.to_torch(copied[:], copy=False)
    assert 'mode="c"' not in str(caught.value)


def test_a_memmap_in_mode_c_is_shared_and_leaves_the_file_alone(file):
    t = tb.to_torch(np.memmap(file, mode="c", dtype="float64"), copy=False)
    t.zero_()
    assert np.fromfile(file).tolist() == [1, 2, 3, 4]


# -- One write, one element

OVERLAPPING = {
    "expanded": lambda: torch.zeros(1).expand(4),
    "expanded rows": lambda: torch.zeros(3).expand(2, 3),
    "expanded bfloat16": lambda: torch.zeros(1, dtype=torch.bfloat16).expand(4),
    "unfolded": lambda: torch.zeros(5).unfold(0, 3, 1),
    "as_strided": lambda: torch.zeros(4).as_strided((2, 3), (1, 1)),
    "broadcast": lambda: np.broadcast_to(np.zeros(3), (2, 3)),
    "broadcast, writable": lambda: np.lib.stride_tricks.as_strided(np.zeros(3), (2, 3), (0, 8)),
    "sliding window": lambda: np.lib.stride_tricks.sliding_window_view(np.zeros(5), 3, writeable=True),
    "sliding window, reversed": lambda: np.lib.stride_tricks.sliding_window_view(np.zeros(5), 3, writeable=True)[::-1],
    "half an element apart": lambda: np.ndarray((3,), "float32", bytearray(8), 0, (2,)),
    "DLPack": lambda: Producer(laid_out((2, 3), (0, 1))),
    "memoryview": lambda: memoryview(np.lib.stride_tricks.as_strided(np.zeros(3), (2, 3), (0, 8))),
}


@pytest.mark.parametrize("name", OVERLAPPING)
def test_no_write_changes_two_elements(name):
    source = OVERLAPPING[name]()
    a = tb.to_numpy(source)
    assert tb.describe(source).overlap
    assert tb.shares_memory(source, a)
    for fresh in (tb.to_numpy(source, writable=True), tb.to_numpy(source, copy=True)):
        one = np.zeros(fresh.shape, dtype=bool)
        one[(0,) * fresh.ndim] = True
        fresh[...] = 1
        fresh[one] = 2
        assert (np.asarray(fresh, dtype="float64") == 2).sum() == 1
    if not isinstance(source, torch.Tensor):
        assert not tb.shares_memory(source, tb.to_torch(source))


@pytest.mark.parametrize("name", OVERLAPPING)
def test_an_overlapping_array_is_never_handed_out_writable(name):
    assert not tb.to_numpy(OVERLAPPING[name]()).flags.writeable


# -- Containers keep their type, so what would lose it is not taken

Batch = namedtuple("Batch", "images labels")


@dataclasses.dataclass
class Sample:
    image: object
    label: int


@pytest.mark.parametrize(
    "container",
    [
        Batch(np.zeros(2), np.zeros(2)),
        Sample(np.zeros(2), 1),
        {"images": np.zeros(2)},
        [Batch(1, 2), Batch(3, 4)],
        [{"a": 1}, {"a": 2}],
    ],
    ids=["namedtuple", "dataclass", "dict", "list of namedtuples", "list of dicts"],
)
def test_a_container_does_not_become_an_array_of_something_else(container):
    for convert in (tb.to_numpy, tb.to_torch):
        with pytest.raises(tb.UnsupportedArrayError, match=rf"tensorbridge\.tree\.{convert.__name__}\(x\)"):
            convert(container)


# -- Fine today, and held here because we rely on it


def test_set_under_a_numpy_view_leaves_the_view():
    t = torch.arange(4.0)
    a = tb.to_numpy(t)
    t.set_(torch.zeros(2))
    assert a.tolist() == [0, 1, 2, 3]


def test_a_result_may_die_on_any_thread():
    """torch drops arrays without the GIL, as in a thread of its own or after a backward."""
    alive = []
    for _ in range(50):
        a = np.arange(1000.0)
        alive.append(weakref.ref(a))
        t = tb.to_torch(a).requires_grad_()
        loss = (t * t).sum()
        del a, t
        held = [loss]
        del loss
        thread = threading.Thread(target=lambda held=held: held.pop().backward())
        thread.start()
        thread.join()
        del thread, held
    assert [ref() for ref in alive] == [None] * 50


@pytest.mark.parametrize("make", [lambda: torch.empty(0, 3), lambda: np.empty((0, 3)), lambda: b""])
def test_nothing_leaks_by_empty_arrays(make):
    kept = [weakref.ref(make()) for _ in range(3)] if not isinstance(make(), bytes) else []
    for convert in (tb.to_numpy, tb.to_torch):
        source = make()
        result = convert(source)
        assert (result.size if isinstance(result, np.ndarray) else result.numel()) == 0
        if not isinstance(source, bytes):
            kept.append(weakref.ref(source))
        del source, result
    assert [ref() for ref in kept] == [None] * len(kept)


def test_truths_cross_dlpack():
    memory = np.array([True, False, True])
    assert tb.to_torch(Producer(memory)).tolist() == [True, False, True]
    assert tb.to_numpy(Producer(memory)).dtype == np.bool_


def test_the_plan_says_what_is_promised_where_a_tensor_in_a_graph_is_shared_writable():
    y = torch.ones(3, requires_grad=True).exp()
    said = "; writable on your word, and autograd does not see a write (tensorbridge.editing tells it)"
    assert tb.plan(y, "numpy", writable=True).steps[-1].why.endswith(said)
    for x, options in ((y, {}), (y.detach(), {"writable": True}), (y, {"writable": True, "copy": True})):
        assert "on your word" not in str(tb.plan(x, "numpy", **options))


def test_no_grad_does_not_make_a_tensor_writable():
    t = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert t.numpy().flags.writeable  # torch's own way out
        assert not tb.to_numpy(t).flags.writeable
        assert address(tb.to_numpy(t)) == t.data_ptr()


# -- The graph of a tensor that stays in torch


@pytest.mark.parametrize("dtype", ["int64", "bool", "uint8"])
def test_a_dtype_without_gradients_ends_the_graph_and_the_plan_says_so(dtype):
    t = torch.ones(3, requires_grad=True) * 2
    detach, cast, _ = tb.plan(t, "torch", dtype=dtype).steps
    assert (detach.op, detach.why) == (
        "detach",
        f"{dtype} has no gradients, so it ends the autograd graph (MulBackward0)",
    )
    assert not detach.after.graph
    assert cast.op == "cast"
    result = tb.to_torch(t, dtype=dtype)
    assert not result.requires_grad
    assert t.requires_grad


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "complex64"])
def test_a_dtype_with_gradients_keeps_the_graph(dtype):
    t = torch.ones(3, requires_grad=True)
    assert [step.op for step in tb.plan(t, "torch", dtype=dtype).steps] == ["cast", "share"]
    tb.to_torch(t, dtype=dtype).abs().sum().backward()
    assert t.grad.tolist() == [1, 1, 1]


def test_filling_integers_from_a_graph_leaves_it_and_filling_floats_carries_it_on():
    t = torch.ones(3, requires_grad=True)
    for dtype, kept in ((torch.int64, False), (torch.float64, True)):
        out = torch.zeros(3, dtype=dtype)
        assert tb.plan(t, "torch", out=out).target.graph == kept
        assert tb.to_torch(t, out=out).requires_grad == kept
