"""Foreign producers with `__array__` only, which comes last; columns that lack values; and what is no array at all."""

from __future__ import annotations

import collections
import gc
import re
import types
import warnings
import weakref

import numpy as np
import pytest
import torch
from _facts_probes import address

import tensorbridge as tb

TARGETS = {"numpy": tb.to_numpy, "torch": tb.to_torch}


class Says:
    """An object with these attributes and nothing else."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


# -- __array__


class Array:
    """`__array__` as NumPy 2 wants it; shares when it may."""

    def __init__(self, memory):
        self.memory = memory

    def __array__(self, dtype=None, copy=None):
        return self.memory.copy() if copy else self.memory


class ArrayBefore2024(Array):
    def __array__(self, dtype=None):
        return self.memory


class ArrayBare(Array):
    def __array__(self):
        return self.memory


class ArrayThatCopies(Array):
    def __array__(self, dtype=None, copy=None):
        if copy is False:
            raise ValueError("it is stored otherwise")
        return self.memory.copy()


class ArrayThatCopiesAndRaisesAsPolarsDoes(Array):
    def __array__(self, dtype=None, copy=None):
        if copy is False:
            raise RuntimeError("copy not allowed")
        return self.memory.copy()


ARRAYS = [Array, ArrayBefore2024, ArrayBare, ArrayThatCopies, ArrayThatCopiesAndRaisesAsPolarsDoes]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("cls", ARRAYS)
def test_array_is_asked_without_a_warning_and_the_plan_says_what_is_known_of_sharing(cls, target):
    producer = cls(np.arange(3.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TARGETS[target](producer).tolist() == [0, 1, 2]
        known = "the producer gave a copy" if "Copies" in cls.__name__ else "the object decides"
        assert known in str(tb.plan(producer, target))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("cls", ARRAYS)
def test_copy_false_takes_only_an_array_that_promises_to_share(cls, target):
    producer = cls(np.arange(3.0))
    if cls is Array:
        assert address(TARGETS[target](producer, copy=False)) == address(producer.memory)
    else:
        with pytest.raises(tb.CopyRequiredError, match="does not promise"):
            TARGETS[target](producer, copy=False)


@pytest.mark.parametrize("target", TARGETS)
def test_copy_true_is_fresh_whatever_array_does(target):
    producer = ArrayBare(np.zeros(3))
    TARGETS[target](producer, copy=True)[0] = 1
    assert producer.memory.tolist() == [0, 0, 0]


def test_an_array_that_comes_read_only_stays_so():
    memory = np.zeros(3)
    memory.flags.writeable = False
    assert not tb.to_numpy(Array(memory)).flags.writeable
    tb.to_torch(Array(memory)).fill_(1)
    assert memory.tolist() == [0, 0, 0]


def returns(value):
    return type("Returns", (), {"__array__": lambda self, dtype=None, copy=None: value})()


@pytest.mark.parametrize("copy", [None, False, True])
@pytest.mark.parametrize("value", [[1, 2], None, 5])
def test_what_array_returns_must_be_an_array(value, copy):
    with pytest.raises(tb.ProducerError, match=r"^to_numpy.*: Returns "):
        tb.to_numpy(returns(value), copy=copy)


@pytest.mark.parametrize("copy", [None, False])
def test_a_mask_that_array_returns_is_not_lost(copy):
    with pytest.raises(tb.UnsupportedArrayError, match="mask"):
        tb.to_numpy(returns(np.ma.masked_array([1, 2], [0, 1])), copy=copy)


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("b"), MemoryError("c")])
def test_an_array_method_that_raises_is_quoted(error):
    def fails(self, dtype=None, copy=None):
        raise error

    with pytest.raises(tb.ProducerError, match=type(error).__name__) as caught:
        tb.to_numpy(type("Fails", (), {"__array__": fails})())
    assert caught.value.__cause__ is error


def test_dlpack_is_asked_before_the_others_and_array_last():
    asked = []

    def ask(name, value):
        return property(lambda self: asked.append(name) or value)

    class Everything(bytearray):
        __cuda_array_interface__ = ask("cuda", None)
        __array_interface__ = ask("interface", None)

        def __array__(self, dtype=None, copy=None):
            raise AssertionError("asked though the buffer is there")

    assert tb.to_numpy(Everything(b"\x01")).tolist() == [1]
    assert asked == ["cuda", "interface"]


# -- Columns and tables, by what they can do; the real libraries are in integrations/


class Column:
    """Numbers, some of which `NaN` stands for in an array: as polars, pyarrow and pandas make it without a word."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def __array__(self, dtype=None, copy=None):
        return np.array([1, np.nan])


class ExtensionType:
    """A dtype that is not NumPy's, and its sign for what is missing."""

    def __init__(self, kind, na_value):
        self.kind, self.na_value = kind, na_value


def nested(count):
    """A column whose rows say nothing of what is missing inside them."""
    return Column(null_count=lambda: 0, dtype=Says(inner=int), explode=lambda: Column(null_count=lambda: count))


def stored(count):
    return Column(null_count=0, storage=Says(null_count=0, flatten=lambda: Column(null_count=count)))


def masked(kind, na_value, dtype=None):
    marks = np.array([False, True])
    return Column(dtype=dtype or ExtensionType(kind, na_value), isna=lambda: marks)


def table(**columns):
    return Column(itercolumns=lambda: list(columns.values()), column_names=list(columns))


INCOMPLETE = {
    "a count": (lambda: Column(null_count=1), r"it has 1 missing value,.*\n.*fill_null"),
    "a method": (lambda: Column(null_count=lambda: 2), r"it has 2 missing values,.*\n.*fill_null"),
    "inside rows": (lambda: nested(3), "it has 3 missing values"),
    "inside a stored type": (lambda: stored(1), "it has 1 missing value,"),
    "a mask": (lambda: masked("i", None), r"it has 1 missing value,.*\n.*fillna"),
    "a mask beside NaN": (lambda: masked("f", None), "it has 1 missing value,"),
    "codes": (lambda: masked("O", float("nan")), "it has 1 missing value,"),
    "in a table": (
        lambda: table(a=Column(null_count=0), b=Column(null_count=4)),
        "its column 'b' has 4 missing values",
    ),
}
COMPLETE = {
    "a count": lambda: Column(null_count=0),
    "a method": lambda: Column(null_count=lambda: 0),
    "inside rows": lambda: nested(0),
    "inside a stored type": lambda: stored(0),
    "floats of NumPy, where NaN is a number": lambda: masked("f", None, dtype=np.dtype("float64")),
    "sparse floats, where NaN is a number": lambda: masked("f", float("nan")),
    "in a table": lambda: table(a=Column(null_count=0)),
    "a count that is none": lambda: Column(null_count=lambda: "lazy"),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_missing_values_are_an_error_and_do_not_become_nan(name):
    make, words = INCOMPLETE[name]
    for target, convert in TARGETS.items():
        with pytest.raises(tb.UnsupportedArrayError, match=words) as caught:
            convert(make())
        assert str(caught.value).startswith(f"to_{target}: Column cannot be converted: ")


@pytest.mark.parametrize("error", [RuntimeError("asked"), ValueError("asked")])
def test_an_object_that_raises_at_whatever_it_is_asked_is_quoted(error):
    class Touchy:
        def __getattr__(self, name):
            raise error

    for convert in TARGETS.values():
        with pytest.raises(
            tb.ProducerError, match=rf"Touchy failed to export .*{type(error).__name__}: asked"
        ) as caught:
            convert(Touchy())
        assert caught.value.__cause__ is error


@pytest.mark.parametrize("name", COMPLETE)
def test_a_column_without_missing_values_is_converted(name):
    assert tb.to_numpy(COMPLETE[name]())[0] == 1


def test_the_cure_for_an_object_that_gives_an_array_of_arrays_works():
    rows = np.empty(2, dtype=object)
    rows[:] = [np.ones(2), np.zeros(2)]
    x = Array(rows)
    with pytest.raises(tb.UnsupportedArrayError) as caught:
        tb.to_numpy(x)
    call = re.search(r"Convert (.*) if its rows", str(caught.value)).group(1)
    assert eval(call, {"np": np, "x": x}).tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize(("error", "said"), [(TypeError, "a container is not one array"), (OSError, "OSError: gone")])
def test_a_mapping_that_fails_to_be_an_array_is_quoted_and_one_that_refuses_is_a_container(error, said):
    class Set(dict):
        def __array__(self, *args, **options):
            raise error("gone")

    with pytest.raises(tb.BridgeError, match=said):
        tb.to_torch(Set())


class Collection(Array):
    """As dask has it: what it holds is known before it is computed, and its array does not tell."""

    def __init__(self, meta, a):
        super().__init__(a)
        self._meta = meta

    def __dask_graph__(self):
        return {}


@pytest.mark.parametrize("target", TARGETS)
def test_a_mask_that_is_computed_later_is_not_lost(target):
    x = Collection(np.ma.zeros(0), np.zeros(3))
    with pytest.raises(tb.UnsupportedArrayError) as caught:
        TARGETS[target](x)
    assert "Collection cannot be converted: the mask of a masked array would be lost" in str(caught.value)
    assert str(caught.value).endswith("Convert x.compute().filled(value) and x.compute().mask.")
    assert tb.to_numpy(Collection(np.zeros(0), np.zeros(3))).tolist() == [0, 0, 0]


# -- Neither

CONTAINERS = {
    "dict": dict,
    "deque": collections.deque,
    "UserDict": collections.UserDict,
    "OrderedDict": collections.OrderedDict,
    "namedtuple": lambda: collections.namedtuple("Batch", "a b")(1, 2),
    "mappingproxy": lambda: types.MappingProxyType({}),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_is_pointed_to_the_tree(name):
    with pytest.raises(tb.UnsupportedArrayError, match=r"tensorbridge\.tree"):
        tb.to_torch(CONTAINERS[name]())


@pytest.mark.parametrize("make", [set, frozenset, dict.fromkeys([1]).keys])
def test_a_set_has_no_order_in_which_it_could_become_an_array(make):
    with pytest.raises(tb.UnsupportedArrayError, match=r"Convert list\(x\)"):
        tb.to_torch(make())


@pytest.mark.parametrize(
    "x", [None, object(), np.ndarray, Ellipsis, (1).__add__, "text"], ids=lambda x: type(x).__name__
)
def test_what_is_no_array_at_all_is_refused(x):
    with pytest.raises(tb.UnsupportedArrayError, match=r"^to_numpy: "):
        tb.to_numpy(x)


def test_classes_that_are_thrown_away_are_not_kept_for_having_been_seen():
    seen = []
    for _ in range(500):
        cls = type("Throwaway", (Array,), {})
        assert tb.to_numpy(cls(np.arange(2.0)))[1] == 1
        seen.append(weakref.ref(cls))
    del cls
    gc.collect()
    assert sum(cls() is not None for cls in seen) <= 200


def test_an_object_with_half_of_dlpack_is_told_which_half_is_missing():
    half = type("Half", (), {"__dlpack__": lambda self, **keywords: None})()
    with pytest.raises(tb.UnsupportedArrayError, match="it has __dlpack__ and no __dlpack_device__") as caught:
        tb.to_numpy(half)
    assert "has no __dlpack__" not in str(caught.value)
    other = type("OtherHalf", (), {"__dlpack_device__": lambda self: (1, 0)})()
    with pytest.raises(tb.UnsupportedArrayError, match="has no __dlpack__"):
        tb.to_numpy(other)


def test_half_of_dlpack_does_not_hide_the_protocol_that_is_whole():
    half = type("Half", (Array,), {"__dlpack__": lambda self, **keywords: None})
    assert tb.to_numpy(half(np.arange(2.0))).tolist() == [0, 1]


def test_a_view_of_a_tensor_that_an_object_gives_is_an_alias_of_that_tensor():
    t = torch.zeros(3)
    alias = tb.to_torch(Array(t.numpy()))
    version = t._version
    alias += 1
    assert t._version > version
    assert t.tolist() == [1, 1, 1]
