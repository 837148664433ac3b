"""Trees: errors name the leaf, options and plans are those of one array, guards and traces see every leaf."""

from __future__ import annotations

import collections
import dataclasses
import gc
import pickle
import sys
import threading
import types
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from arrays import frozen
from containers import KEPT, Opaque, Pair, Plain, Registered, Settings

import tensorbridge as tb
from tensorbridge import tree


@pytest.fixture
def a() -> Any:
    return np.arange(6.0).reshape(2, 3)


# -- Errors, cycles, depth

PLACES: dict[str, Any] = {
    "batch['obs'][1].mask": lambda x: {"obs": [0, Plain(None, x)]},
    "batch[0].right": lambda x: [Pair(1, x)],
    "batch[3][('k', 1)]": lambda x: [0, 0, 0, {("k", 1): x}],
    "batch[1]": lambda x: collections.deque([1, x]),
    "batch.first": lambda x: Registered(x, 1, ""),
    "batch['a']['b']": lambda x: collections.OrderedDict(a=Settings({"c": np.zeros(2), "b": x})),
}


DATES = np.array(["2026-01-01"], dtype="M8[D]")


@pytest.mark.parametrize("path", PLACES)
def test_error_names_the_leaf(path, a):
    with pytest.raises(tb.CopyRequiredError) as error:
        tree.to_torch(PLACES[path](a[::-1]), copy=False)
    assert str(error.value).startswith(f"{path}: to_torch(copy=False): numpy float64 (2, 3) on cpu cannot be shared.")
    assert error.value.plan is not None
    with pytest.raises(tb.UnsupportedArrayError) as refused:
        tree.to_torch(PLACES[path](DATES))
    assert str(refused.value).startswith(f"{path}: to_torch: numpy datetime64[D] (1,)")
    with pytest.raises(tb.UnsupportedArrayError) as planned:
        tree.plan(PLACES[path](DATES), "torch")
    assert str(planned.value) == str(refused.value)


def test_error_names_the_batch_where_that_is_the_leaf(a):
    for call in (
        lambda x: tree.to_torch(x),
        lambda x: tree.plan(x, "torch"),
        lambda x: tree.to_torch(x, out=torch.zeros(1)),
    ):
        with pytest.raises(tb.UnsupportedArrayError, match=r"^batch: to_torch.*: numpy datetime64\[D\] \(1,\)"):
            call(DATES)


def test_what_cannot_be_converted_is_refused_before_anything_moves(a):
    source = {"good": a[::-1], "bad": DATES}
    with tb.trace() as seen, pytest.raises(tb.UnsupportedArrayError):
        tree.to_torch(source)
    assert seen.events == []


def cyclic_list(a: Any) -> Any:
    x: Any = [a]
    x.append({"z": x})
    return x


def cyclic_dataclass(a: Any) -> Any:
    x = Plain(a)
    x.mask = [x]
    return x


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (cyclic_list, r"batch\[1\]\['z'\] is batch again"),
        (cyclic_dataclass, r"batch\.mask\[0\] is batch again"),
        (lambda a: {"k": cyclic_list(a)}, r"batch\['k'\]\[1\]\['z'\] is batch\['k'\] again"),
    ],
)
@pytest.mark.parametrize("call", [tree.to_torch, lambda x: tree.plan(x, "numpy")])
def test_cycle_is_a_clear_error(build, text, call, a):
    with pytest.raises(tb.UnsupportedArrayError, match=text):
        call(build(a))


@pytest.mark.parametrize("depth", [200, 5000])
def test_depth_costs_nothing(depth, a):
    top: Any = a
    for level in range(depth):
        top = [{"x": top}, (top,), Plain(top)][level % 3] if depth == 200 else [top]
    result = tree.to_torch(top)
    for level in range(depth - 1, -1, -1):
        kind = type(result)
        assert kind is ([dict, tuple, Plain][level % 3] if depth == 200 else list)
        result = result["x"] if kind is dict else result.obs if kind is Plain else result[0]
    assert isinstance(result, torch.Tensor)


def test_error_far_down_names_the_leaf(a):
    top: Any = DATES
    for _ in range(200):
        top = [top]
    with pytest.raises(tb.UnsupportedArrayError) as error:
        tree.to_torch(top)
    assert str(error.value).startswith("batch" + "[0]" * 200 + ": ")


# -- Options


def test_options_are_those_of_the_function_for_one_array(a):
    result = tree.to_torch({"x": a, "y": np.ones(2, "i4")}, dtype="float16", copy=True)
    assert {t.dtype for t in result.values()} == {torch.float16}
    t = torch.ones(2, requires_grad=True) * 2
    assert tree.to_torch([t])[0].grad_fn is not None
    assert tree.to_torch([t], detach=True)[0].grad_fn is None
    assert not tree.to_numpy([t])[0].flags.writeable
    assert tree.to_numpy([t], writable=True)[0].flags.writeable
    with pytest.raises(tb.GraphError, match=r"^batch\[0\]: "):
        tree.to_numpy([t], detach=False)


@pytest.mark.parametrize("to", [tree.to_torch, tree.to_numpy])
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"copy": 1}, TypeError),
        ({"pack": None}, TypeError),
        ({"dtype": "float99"}, TypeError),
        ({"nope": 1}, TypeError),
    ],
)
def test_wrong_options_are_errors_before_anything_happens(to, options, error, a):
    with pytest.raises(error):
        to({"x": a}, **options)


def test_errors_of_options_speak_of_the_function_for_trees(a):
    for call, text in {
        lambda: tree.to_torch([a], typo=1): r"^tree\.to_torch\(\) got an unexpected keyword argument 'typo'",
        lambda: tree.to_torch([a], copy=1): r"^tree\.to_torch\(copy=1\): copy is True, False or None",
        lambda: tree.to_numpy([a], writable=1): r"^tree\.to_numpy\(writable=1\)",
        lambda: tree.to_torch([a], pack=1): r"^tree\.to_torch\(pack=1\): pack is True or False",
        lambda: tree.plan([a], "torch", pack=1): r"^tree\.to_torch\(pack=1\): pack is True or False",
        lambda: tree.plan([a], "cupy", share_readonly=1): r"^tree\.to_cupy\(share_readonly=1\)",
        lambda: tree.plan([a], "jax"): r'^tree\.plan\(to=\'jax\'\): choose "numpy"',
    }.items():
        with pytest.raises((TypeError, ValueError), match=text):
            call()


def test_plan_names_the_option_that_was_meant_and_all_there_are(a):
    with pytest.raises(TypeError) as error:
        tree.plan([a], "torch", pac=False)
    assert str(error.value) == (
        "tree.plan(to='torch'): tree.to_torch has no option 'pac'; it has device, dtype, copy, "
        "share_readonly, detach, pin_memory, non_blocking, out, pack; did you mean 'pack'?"
    )


@pytest.mark.parametrize("options", [{"copy": True}, {"dtype": "float64"}], ids=str)
def test_a_tensor_that_has_outgrown_its_storage_is_found_among_its_like(options):
    outgrown = torch.from_numpy(np.ones(6, "float32"))
    with pytest.raises(RuntimeError):
        outgrown.resize_(4096)
    with pytest.raises(tb.UnsupportedArrayError, match=r"^batch\[2\]: .*its storage holds 24 B"):
        tree.to_numpy([torch.ones(6), torch.ones(5), outgrown], **options)


@pytest.mark.parametrize("name", ["plan", "to_cupy", "to_numpy", "to_torch"])
def test_functions_of_trees_can_be_pickled(name):
    """A DataLoader that spawns its workers pickles what they call."""
    assert pickle.loads(pickle.dumps(getattr(tree, name))) is getattr(tree, name)


def test_missing_device_names_the_leaf(a, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(tb.DeviceError, match=r"^batch\['x'\]: .*cuda:0 does not exist"):
        tree.to_torch({"x": a}, device="cuda:0")


# -- The plan, the trace, the guard


def batch(a: Any) -> Any:
    t = torch.ones(3, requires_grad=True)
    return {
        "x": a,
        "y": [a[::-1], a[::-1], t * 2],
        "z": Plain(a, torch.zeros(2)),
        "n": 1,
        "f": np.broadcast_to(a[0], (2, 3)),
    }


@pytest.mark.parametrize("options", [{}, {"copy": True}, {"dtype": "float32"}], ids=str)
@pytest.mark.parametrize("to", ["torch", "numpy"])
def test_plan_says_what_is_done(to, options, a):
    source = batch(a)
    plan = tree.plan(source, to, **options)
    with tb.trace() as seen:
        getattr(tree, f"to_{to}")(source, **options)
    own = [leaf.plan for leaf in plan.leaves if not leaf.same_as]
    assert [event.steps for event in seen.events] == [p.steps for p in own]
    assert seen.totals.nbytes == plan.bytes_moved == sum(p.bytes_moved for p in own)
    assert plan.zero_copy == (plan.bytes_moved == 0)
    assert plan.target == to


def test_plan_reads_as_a_table(a):
    text = str(tree.plan({"x": a, "y": [a[:, ::-1], a], **{f"k{i}": np.zeros(2) for i in range(5)}}, "torch"))
    assert text.splitlines() == [
        "8 arrays -> torch: 48 B moved",
        "6 x numpy float64 on cpu -> torch float64 on cpu: batch['x'], batch['k0'], batch['k1'] and 3 more",
        "  share  0 B   torch.from_numpy: the same memory",
        "1 x numpy float64 on cpu -> torch float64 on cpu: batch['y'][0]",
        "  pack   48 B   torch has no negative strides",
        "  share   0 B   torch.from_numpy: the same memory",
        "1 x the same memory as another: batch['y'][1] is batch['x']",
    ]


class Space(Opaque):
    pass


def test_plan_names_objects_that_may_hold_arrays_and_are_left_as_they_are(a):
    source = {
        "space": Space(a),
        "net": [torch.nn.Linear(1, 1), Opaque(a)],
        "lazy": (x for x in [a]),
        "values": {"x": a}.values(),
        "set": {torch.zeros(1)},
        "x": a,
    }
    plan = tree.plan(source, "torch")
    assert [left.path for left in plan.left] == [
        "batch['space']",
        "batch['lazy']",
        "batch['values']",
        "batch['set']",
        "batch['net'][0]",
        "batch['net'][1]",
    ]
    assert str(plan).splitlines()[-1] == (
        "6 x left as it is: batch['space'] (Space), batch['lazy'] (generator), batch['values'] (dict_values) and 3 more"
    )
    assert tree.to_torch(source)["space"] is source["space"]
    assert str(tree.plan([torch.nn.Linear(1, 1)], "numpy")).endswith("1 x left as it is: batch[0] (Linear)")


ORDINARY = [name for name in KEPT if name not in ("object", "module")]


@pytest.mark.parametrize("name", ORDINARY)
def test_plan_says_nothing_of_ordinary_values(name, a):
    assert tree.plan({"a": a, "x": KEPT[name]}, "torch").left == ()


def test_plan_knows_an_array_that_comes_twice_and_is_the_memory_of_another(a):
    w = torch.arange(3.0)
    v = w.view_as(w)  # another object
    plan = tree.plan([w, v, v], "torch", copy=True)
    assert [leaf.same_as for leaf in plan.leaves] == ["", "batch[0]", "batch[0]"]
    assert plan.bytes_moved == 12
    locked = frozen(a)
    view = locked[:]
    assert [leaf.same_as for leaf in tree.plan([locked, view, view], "torch").leaves] == ["", "batch[0]", "batch[0]"]


def test_plan_names_lists_of_numbers_which_stay_lists(a):
    source = {"ids": [[1, 2], [3, 4]], "label": [0, True, 2.0], "x": a, "n": 3, "t": (np.float32(1), None)}
    plan = tree.plan(source, "torch")
    assert [tuple(left) for left in plan.left] == [
        ("batch['ids'][0]", "numbers"),
        ("batch['ids'][1]", "numbers"),
        ("batch['label']", "numbers"),
    ]
    made = tree.to_torch(source)
    assert all(made[name] == source[name] for name in ("ids", "label", "t"))
    assert tree.plan([1, 2, {"a": a}], "torch").left == ()
    assert str(tree.plan([1, 2], "numpy")) == "0 arrays -> numpy: zero copy\n1 x left as it is: batch (numbers)"


def test_plan_of_a_fill_names_what_is_left(a):
    source = {"x": a, "space": Space(a)}
    assert [left.type for left in tree.plan(source, "numpy", out={"x": np.zeros((2, 3))}).left] == ["Space"]


@pytest.mark.parametrize(
    ("to", "options", "error"), [("jax", {}, ValueError), ("torch", {"writable": True}, TypeError)]
)
def test_plan_refuses_what_the_function_does_not_know(to, options, error, a):
    with pytest.raises(error):
        tree.plan({"x": a}, to, **options)


def test_guard_refuses_a_tree_before_any_of_its_bytes_move(a):
    source = {"first": a[::-1], "second": a}
    with tb.trace() as seen, tb.copy_guard("error"):
        assert tb.shares_memory(tree.to_torch({"second": a})["second"], a)
        with pytest.raises(tb.CopyRequiredError, match=r"^batch\['first'\]: .*copy_guard"):
            tree.to_torch(source)
    assert [event.nbytes for event in seen.events] == [0]


def test_guard_warns_once_a_leaf_at_the_callers_line(a):
    with tb.copy_guard("warn"), pytest.warns(tb.CopyWarning) as warned:
        tree.to_torch([a[::-1], a, a.T[::-1]])
    assert len(warned) == 2
    assert {w.filename for w in warned} == {__file__}


# -- Nothing is left behind


def test_results_and_sources_die_with_their_last_reference(a):
    class Watched(np.ndarray):
        pass

    leaf = a.view(Watched)
    gone = weakref.ref(leaf)
    gc.disable()
    try:
        result = tree.to_torch({"x": [leaf, {"y": (1, leaf)}]}, copy=True)
        del leaf
        assert gone() is None
        kept = weakref.ref(result["x"][0])
        del result
        assert kept() is None
    finally:
        gc.enable()


def test_threads_convert_side_by_side(a):
    wrong: list[Any] = []

    def work(n: int) -> None:
        for _ in range(50):
            made = tree.to_torch({"x": np.full(3, n), "y": [np.full(2, n)[::-1]]})
            if made["x"].tolist() != [n] * 3 or made["y"][0].tolist() != [n] * 2:
                wrong.append(made)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_packed_sequence_keeps_its_type():
    sequence = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    result = tree.to_torch(sequence, copy=True)
    assert type(result) is type(sequence)
    assert torch.equal(result.data, sequence.data)
    assert not tb.shares_memory(result.data, sequence.data)
    assert isinstance(tree.to_numpy(sequence).data, np.ndarray)


def test_npz_file_is_a_table(tmp_path, a):
    np.savez(tmp_path / "x.npz", x=a, y=np.arange(3))
    with np.load(tmp_path / "x.npz") as stored:
        result = tree.to_torch(stored)
    assert {name: t.tolist() for name, t in result.items()} == {"x": a.tolist(), "y": [0, 1, 2]}


class Stored:
    """An array in a file, as h5py and zarr give it: read when it is asked for."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.array.copy()


@dataclasses.dataclass
class ZarrGroup:
    """As zarr has it: a dataclass that is no Mapping, and holds its arrays in none of its fields."""

    _store: Any

    def __iter__(self) -> Any:
        return iter(self._store.array)

    def __getitem__(self, key: Any) -> Any:
        value = self._store.array[key]
        return type(self)(Opaque(value)) if isinstance(value, dict) else value


class H5pyGroup(collections.abc.Mapping):  # type: ignore[type-arg]
    """As h5py has it: a Mapping that is not made from a dict."""

    def __init__(self, bind: Any) -> None:
        if type(bind) is not Opaque:
            raise ValueError(f"{bind} is not a GroupID")
        self.bind = bind

    def __iter__(self) -> Any:
        return iter(self.bind.array)

    def __len__(self) -> int:
        return len(self.bind.array)

    def __getitem__(self, key: Any) -> Any:
        value = self.bind.array[key]
        return H5pyGroup(Opaque(value)) if isinstance(value, dict) else value


@pytest.mark.parametrize(("module", "cls"), [("h5py", H5pyGroup), ("zarr", ZarrGroup)])
def test_group_of_stored_arrays_is_a_table(module, cls, a, monkeypatch):
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(Group=cls))
    source = cls(Opaque({"x": Stored(a), "g": {"y": Stored(a[0])}}))
    with pytest.raises(tb.UnsupportedArrayError, match="a container is not one array") as error:
        tb.to_torch(source)
    cure = str(error.value).partition("\nConvert every leaf: ")[2].removesuffix(".")
    made = eval(cure, {"tensorbridge": tb, "x": source})
    assert type(made) is type(made["g"]) is dict
    assert {"x": made["x"].tolist(), "y": made["g"]["y"].tolist()} == {"x": a.tolist(), "y": a[0].tolist()}
    plan = tree.plan(source, "torch")
    assert ([leaf.path for leaf in plan.leaves], plan.left) == (["batch['x']", "batch['g']['y']"], ())
    assert tb.collate([source, source])["g"]["y"].shape == (2, 3)


def test_module_is_public():
    assert tb.tree is tree
    assert set(tree.__all__) == {"LeafPlan", "LeftPart", "TreePlan", "plan", "to_cupy", "to_numpy", "to_torch"}


# -- An option is for every leaf, and an error that asks for one says so


def test_a_cure_by_dtype_says_that_it_is_for_every_array():
    batch = {"x": np.zeros((2, 3)), "labels": np.arange(2)}
    with pytest.raises(tb.UnsupportedArrayError) as caught:
        tree.plan(batch, "torch", device="mps")
    assert str(caught.value) == (
        "batch['x']: to_torch(device='mps:0'): numpy float64 (2, 3) on cpu cannot be converted: "
        'mps devices have no float64.\nUse dtype="float32": a copy of 24 B.\n'
        'In a tree that casts every array: dtype={"float64": "float32"} casts those of this dtype alone.'
    )
    plan = tree.plan(batch, "torch", device="mps", dtype={"float64": "float32"})
    assert [leaf.plan.target.dtype for leaf in plan.leaves] == ["float32", "int64"]


def test_a_cure_for_the_dtype_that_was_asked_for_says_no_more():
    batch = {"x": np.zeros((2, 3), "float32"), "labels": np.arange(2)}
    with pytest.raises(tb.UnsupportedArrayError, match=r'Use dtype="float32": a copy of 24 B\.$'):
        tree.plan(batch, "torch", device="mps", dtype={"float32": "float64"})


def test_a_cure_by_dtype_of_the_only_array_says_no_more():
    with pytest.raises(tb.UnsupportedArrayError, match=r'Use dtype="float32": a copy of 24 B\.$'):
        tree.plan([np.zeros(6)], "torch", device="mps")
