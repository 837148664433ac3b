"""Producers that make an array and do not say so: known by nobody else holding it. All others stay as they were."""

from __future__ import annotations

import array
import ctypes
import mmap
import weakref

import numpy as np
import pytest
import torch
from _facts_probes import address

import tensorbridge as tb

TARGETS = {"numpy": tb.to_numpy, "torch": tb.to_torch}


class Arrays:
    """`__array__` by a function; it knows no word about copies, as before NumPy 2."""

    def __init__(self, make):
        self.make = make

    def __array__(self, dtype=None):
        return self.make()


class Accepts(Arrays):
    """It takes the word, and does as it likes."""

    def __array__(self, dtype=None, copy=None):
        return self.make()


class Interface:
    """`__array_interface__` by a function that makes what is under "data", as Pillow's images do."""

    def __init__(self, data, **fields):
        self.data, self.fields = data, {"version": 3, "shape": (2,), "typestr": "<f8", **fields}

    @property
    def __array_interface__(self):
        return {**self.fields, "data": self.data()}


class Labelled(np.ndarray):
    pass


def fresh():
    return np.arange(2.0)


MADE = {
    "array": lambda: Arrays(fresh),
    "array, copy=False taken": lambda: Accepts(fresh),
    "a view of it": lambda: Accepts(lambda: np.arange(6.0)[1::3]),
    "views of views": lambda: Accepts(lambda: np.arange(6.0).view(Labelled).reshape(2, 3)[:, 1].view(np.ndarray)),
    "a subclass": lambda: Accepts(lambda: fresh().view(Labelled)),
    "bytes": lambda: Accepts(lambda: np.frombuffer(fresh().tobytes())),
    "interface over bytes": lambda: Interface(lambda: fresh().tobytes()),
    "interface over a bytearray": lambda: Interface(lambda: bytearray(fresh())),
    "interface over an array": lambda: Interface(fresh),
}
READ_ONLY = {"bytes", "interface over bytes"}
WHY = "the object made this array for us: nobody else holds it"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MADE)
def test_what_nobody_else_holds_was_made_for_us_and_is_in_the_plan_with_its_bytes(name, target):
    plan = tb.plan(MADE[name](), target)
    first = plan.steps[0]
    assert (first.op, first.nbytes, first.kind, first.why) == ("export", 16, "h2h", WHY)
    assert (plan.zero_copy, plan.source.address) == (False, 0)
    assert [step.op for step in plan.steps[1:]] == ["copy"] * (target == "torch" and name in READ_ONLY) + ["share"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MADE)
def test_it_is_refused_where_no_byte_may_move_and_a_guard_hears_of_it(name, target):
    with pytest.raises(tb.CopyRequiredError, match=WHY if name != "array" else "does not promise"):
        TARGETS[target](MADE[name](), copy=False)
    with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError, match=WHY):
        TARGETS[target](MADE[name]())
    with tb.copy_guard("warn"), pytest.warns(tb.CopyWarning, match=WHY):
        TARGETS[target](MADE[name]())
    assert not tb.shares_memory(*[MADE[name]()] * 2)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("copy", [None, True])
@pytest.mark.parametrize("name", sorted(set(MADE) - READ_ONLY))
def test_it_is_not_copied_again_and_can_be_written(name, copy, target):
    steps = tb.plan(MADE[name](), target, copy=copy).steps
    assert [step.op for step in steps] == ["export", "share"]
    result = TARGETS[target](MADE[name](), copy=copy)
    result[0] = 7
    assert result[0] == 7


@pytest.mark.parametrize("name", sorted(READ_ONLY))
def test_what_was_made_read_only_stays_so_or_is_copied(name):
    assert not tb.to_numpy(MADE[name]()).flags.writeable
    assert tb.to_numpy(MADE[name](), copy=True).flags.writeable
    assert [step.op for step in tb.plan(MADE[name](), "numpy", writable=True).steps] == ["export", "copy", "share"]
    with pytest.raises(tb.CopyRequiredError) as caught:
        tb.to_torch(MADE[name](), copy=False)
    assert str(caught.value).endswith(
        "Allow the copy with copy=None."
    )  # what avoids the copy does not avoid the export


# -- What somebody else holds, or may hold


class Keeps:
    """Holds an array, and gives it as `give` says; `kept` is where its memory is."""

    def __init__(self, give, make=lambda: np.arange(2.0)):
        self.a, self.give = make(), give

    @property
    def kept(self):
        return address(self.a if isinstance(self.a, (np.ndarray, torch.Tensor)) else np.frombuffer(self.a, "uint8"))

    def __array__(self, dtype=None, copy=None):
        return self.give(self)


class Exposes(Keeps):
    """The same, through an array interface; by `__array__` it would give another."""

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("asked last")

    @property
    def __array_interface__(self):
        return {"version": 3, "shape": (2,), "typestr": "<f8", "data": self.give(self)}


def cached(self):
    if not hasattr(self, "cache"):
        self.cache = self.a = np.arange(2.0)
    return self.cache


def weakly(self):
    """As a cache of arrays that are in use does."""
    made = getattr(self, "weak", lambda: None)()
    if made is None:
        made = np.arange(2.0)
        self.weak = weakref.ref(made)
    return made


def through_a_view(self):
    """Only a view is kept, and another view of the same memory is given."""
    self.a = np.arange(2.0)[:]
    return self.a.view(Labelled)


def of_a_subclass(self):
    """NumPy leaves out what is between a view and the owner where they are of one class."""
    self.a = np.arange(2.0).view(Labelled)
    return self.a[:]


def over_a_view_of_a_buffer(self):
    """Views of one buffer hold it together: only one is counted."""
    self.a = memoryview(bytearray(16))
    return np.frombuffer(self.a[:])


def from_ctypes(self):
    return np.frombuffer((ctypes.c_double * 2).from_address(address(self.a)))


def from_capsule(self):
    return np.from_dlpack(torch.from_numpy(self.a))


HELD = {
    "its own array": lambda: Keeps(lambda self: self.a),
    "a view of it": lambda: Keeps(lambda self: self.a[:]),
    "a view as a subclass": lambda: Keeps(lambda self: self.a.view(Labelled)),
    "a view of a kept view": lambda: Keeps(through_a_view),
    "a view of a kept subclass": lambda: Keeps(of_a_subclass),
    "a cache": lambda: Keeps(cached),
    "its bytes": lambda: Keeps(lambda self: np.frombuffer(self.a), lambda: bytes(range(16))),
    "its bytearray": lambda: Keeps(lambda self: np.frombuffer(self.a), lambda: bytearray(16)),
    "a kept memoryview": lambda: Keeps(over_a_view_of_a_buffer),
    "its array.array": lambda: Keeps(lambda self: np.frombuffer(self.a), lambda: array.array("d", [0, 1])),
    "pages": lambda: Keeps(lambda self: np.frombuffer(self.a, count=2), lambda: mmap.mmap(-1, 4096)),
    "a tensor": lambda: Keeps(lambda self: self.a.numpy(), lambda: torch.arange(2.0).double()),
    "a torch subclass": lambda: Keeps(lambda self: self.a.detach().numpy(), lambda: torch.nn.Parameter(torch.ones(2))),
    "ctypes": lambda: Keeps(from_ctypes),
    "a capsule": lambda: Keeps(from_capsule),
    "interface: its bytes": lambda: Exposes(lambda self: self.a, lambda: bytes(range(16))),
    "interface: its bytearray": lambda: Exposes(lambda self: self.a, lambda: bytearray(16)),
    "interface: a new view": lambda: Exposes(lambda self: memoryview(self.a), lambda: bytearray(16)),
    "interface: its array": lambda: Exposes(lambda self: self.a[:]),
    "interface: an address": lambda: Exposes(lambda self: (address(self.a), False)),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", HELD)
def test_memory_that_the_producer_holds_is_shared_as_it_is(name, target):
    producer = HELD[name]()
    assert tb.plan(producer, target).steps[0].op == "import"
    result = TARGETS[target](producer, copy=False, **({"share_readonly": True} if target == "torch" else {}))
    assert address(result) == producer.kept
    with tb.copy_guard("error"):
        tb.to_numpy(producer)


def test_an_array_that_the_producer_can_find_again_is_not_ours():
    producer = Keeps(weakly)
    result = tb.to_numpy(producer, copy=False)
    assert address(producer.weak()) == address(result)


def test_an_interface_that_is_kept_keeps_its_data():
    class Kept:
        def __init__(self):
            self.__array_interface__ = {"version": 3, "shape": (2,), "typestr": "<f8", "data": bytearray(16)}

    producer = Kept()
    assert tb.plan(producer, "numpy").zero_copy
    tb.to_numpy(producer, copy=False)[0] = 1
    assert np.asarray(producer).tolist() == [1, 0]


def test_a_memory_map_that_is_opened_anew_has_nobody_who_made_its_bytes(tmp_path):
    file = tmp_path / "a"
    np.arange(2.0).tofile(file)
    opens = Accepts(lambda: np.memmap(file, "float64", mode="r"))
    assert tb.plan(opens, "numpy").zero_copy
    assert tb.to_numpy(opens, copy=False).tolist() == [0, 1]


def test_memory_of_no_python_object_is_not_taken_for_ours():
    """An array that neither owns its memory nor says who does: C code can make one."""
    memory = np.arange(2.0)
    new = ctypes.pythonapi["PyMemoryView_FromMemory"]
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]
    lent = Accepts(lambda: np.frombuffer(new(address(memory), 16, 0x200)))
    assert address(tb.to_numpy(lent, copy=False)) == address(memory)


@pytest.mark.parametrize("name", ["Affine2D", "buffer_rgba"])
def test_matplotlib_shares_what_it_keeps(name):
    if name == "Affine2D":
        x = pytest.importorskip("matplotlib.transforms", reason="no matplotlib").Affine2D()
    else:
        names = ("matplotlib.backends.backend_agg", "matplotlib.figure")
        agg, figure = (pytest.importorskip(name, reason="no matplotlib") for name in names)
        canvas = agg.FigureCanvasAgg(figure.Figure((1, 1)))
        canvas.draw()
        x = canvas.buffer_rgba()
    assert tb.plan(x, "numpy").zero_copy
    assert np.shares_memory(tb.to_numpy(x, copy=False), np.asarray(x))


def test_where_references_are_not_counted_nothing_is_inferred(monkeypatch):
    from tensorbridge._adapters import _made

    monkeypatch.setattr(_made, "_COUNTED", False)
    for name in MADE:
        assert tb.plan(MADE[name](), "numpy").zero_copy


# -- Wherever arrays are converted


def test_an_empty_array_has_no_byte_that_was_moved():
    assert tb.to_numpy(Accepts(lambda: np.empty((0, 3))), copy=False).shape == (0, 3)


ASKED = {
    "describe": tb.describe,
    "plan": lambda x: tb.plan(x, "torch"),
    "tree.plan": lambda x: tb.tree.plan([x], "torch"),
    "shares_memory": lambda x: tb.shares_memory(x, np.zeros(2)),
    "copy=False": lambda x: tb.to_torch(x, copy=False),
    "copy_guard": tb.copy_guard("error")(tb.to_torch),
}


@pytest.mark.parametrize("call", ASKED)
def test_an_object_has_made_its_array_by_the_time_it_can_be_described_planned_or_refused(call):
    made = []

    def make():
        made.append(1)
        return np.arange(2.0)

    if call.startswith("copy"):
        with pytest.raises(tb.CopyRequiredError, match=WHY):
            ASKED[call](Accepts(make))
    else:
        ASKED[call](Accepts(make))
    assert len(made) == 1


def test_in_a_tree_it_is_made_once_an_object():
    made = []

    def make():
        made.append(1)
        return np.arange(2.0)

    x = Accepts(make)
    assert "export" in str(tb.tree.plan({"a": x}, "torch"))
    made.clear()
    result = tb.tree.to_torch({"a": x, "b": x, "c": Accepts(fresh)})
    assert len(made) == 1
    assert [t.tolist() for t in result.values()] == [[0, 1]] * 3
    with pytest.raises(tb.CopyRequiredError, match=WHY):
        tb.tree.to_torch({"a": x}, copy=False)
    with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError, match=WHY):
        tb.tree.to_torch({"a": x})


def test_a_batch_of_them_is_collated():
    batch = tb.collate([{"a": MADE[name]()} for name in ("array", "interface over bytes")])
    assert batch["a"].tolist() == [[0, 1], [0, 1]] or batch["a"].shape == (2, 2)


def test_a_prefetched_one_meets_the_guard_of_whoever_asked():
    batches = [Accepts(fresh)]
    assert [t.tolist() for t in tb.prefetch(batches, device="cpu")] == [[0, 1]]
    with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError, match=WHY):
        list(tb.prefetch(batches, device="cpu"))


def test_a_list_of_them_is_stacked():
    assert tb.to_torch([Accepts(fresh), Arrays(fresh)]).tolist() == [[0, 1], [0, 1]]
