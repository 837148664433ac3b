"""Trees: containers come back as they were, with all that they carry; what is not an array is left alone."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import sys
import types
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from arrays import numbers
from containers import CONTAINERS, KEPT, Converting, Derived, Items, Opaque, Registered, Wrapped, derived

import tensorbridge as tb
from tensorbridge import tree
from tensorbridge._trees import _containers


def parts(x: Any) -> tuple[Any, list[Any]]:
    """What a container is apart from its values, and its values: written without tensorbridge."""
    attributes = {k: v for k, v in getattr(x, "__dict__", {}).items() if isinstance(v, str)}
    attributes |= {"_note": x._note} if hasattr(type(x), "_note") else {}
    if isinstance(x, collections.abc.Mapping):
        extra = (getattr(x, "default_factory", None), attributes if getattr(x, "__dict__", None) is not x else None)
        return (type(x), list(x), extra), [x[key] for key in x]
    if dataclasses.is_dataclass(x):
        names = [f.name for f in dataclasses.fields(x)]
        return (type(x), names, getattr(x, "_note", None)), [getattr(x, name) for name in names]
    if isinstance(x, Converting):
        names = ["obs", "_mask"]
        return (type(x), hasattr(x, "unset")), [getattr(x, name) for name in names]
    if isinstance(x, types.SimpleNamespace):
        return (type(x), list(vars(x))), list(vars(x).values())
    if isinstance(x, Registered):
        return (type(x), x.note), [x.first, x.second]
    if isinstance(x, (list, tuple, collections.deque, collections.UserList)):
        return (type(x), len(x), getattr(x, "maxlen", None), attributes), list(x)
    return None, []


def assert_alike(source: Any, result: Any, leaf: Any) -> int:
    """The same tree with `leaf` in place of every array; the number of leaves."""
    if isinstance(source, (np.ndarray, torch.Tensor)):
        leaf(source, result)
        return 1
    frame, children = parts(source)
    if frame is None:
        assert result is source
        return 0
    made, others = parts(result)
    assert made == frame
    assert len(children) == len(others)
    return sum(assert_alike(a, b, leaf) for a, b in zip(children, others, strict=True))


def assert_tensor_of(source: Any, result: Any) -> None:
    assert isinstance(result, torch.Tensor)
    assert np.array_equal(numbers(result), numbers(source))


@pytest.fixture
def a() -> Any:
    return np.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize("options", [{}, {"copy": True}, {"dtype": "float32"}])
@pytest.mark.parametrize("name", CONTAINERS)
def test_container_comes_back_as_it_was(name, options, a):
    source = CONTAINERS[name](a)
    result = tree.to_torch(source, **options)
    assert result is not source
    assert assert_alike(source, result, assert_tensor_of) > 0


@pytest.mark.parametrize("name", CONTAINERS)
def test_input_is_never_changed(name, a):
    source = CONTAINERS[name](a)
    before = assert_alike(source, source, lambda x, y: None)
    held: list[Any] = []
    assert_alike(source, source, lambda x, _: held.append(x))
    result = tree.to_torch(source, copy=True)
    after: list[Any] = []
    assert assert_alike(source, source, lambda x, _: after.append(x)) == before
    assert all(x is y for x, y in zip(held, after, strict=True))
    assert_alike(source, result, lambda x, y: y.add_(100))
    assert np.array_equal(a, np.arange(6.0).reshape(2, 3))


def test_dict_idiom_keeps_items_and_attributes_one(a):
    result = tree.to_torch(Items(obs=a))
    assert result.obs is result["obs"]
    assert isinstance(result.obs, torch.Tensor)


def test_values_that_a_dataclass_derived_from_old_arrays_are_derived_again(a):
    result = tree.to_torch(derived(a))
    assert isinstance(result.total, torch.Tensor)
    assert result.calls == 1


def test_field_that_was_never_set_stays_unset(a):
    source = Derived.__new__(Derived)
    source.obs = a
    assert not hasattr(tree.to_torch(source), "mask")


class Scopes(collections.ChainMap):  # type: ignore[type-arg]
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


@pytest.mark.parametrize("make", [collections.ChainMap, lambda: Scopes("kept")])
def test_maps_of_a_chain_are_kept_apart(a, make):
    source = make()
    source.maps[:] = [{"n": 1}, {"x": a, "n": 2}, collections.OrderedDict(x=a[::-1])]
    made = tree.to_torch(source)
    assert type(made) is type(source)
    assert getattr(made, "name", None) == getattr(source, "name", None)
    assert [type(inner) for inner in made.maps] == [dict, dict, collections.OrderedDict]
    assert made.maps[0] == {"n": 1}
    assert_tensor_of(a, made.maps[1]["x"])
    assert_tensor_of(a[::-1], made.maps[2]["x"])
    assert source.maps[1]["x"] is a
    assert [leaf.path for leaf in tree.plan(source, "torch").leaves] == ["batch.maps[1]['x']", "batch.maps[2]['x']"]


def test_mapping_that_cannot_be_built_is_refused_by_name_and_left_alone(a):
    class Strange(Wrapped):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    source = Strange("x")
    source["obs"] = a
    refused = r"batch\['in'\]: a Strange cannot be built .*\nGive dict\(x\) in its place, register it"
    for call in (tree.to_torch, lambda x: tree.plan(x, "torch"), lambda x: tree.plan(x, "numpy")):
        with pytest.raises(tb.UnsupportedArrayError, match=refused):
            call({"in": source})
        assert source["obs"] is a
    assert_tensor_of(a, tree.to_torch({"in": dict(source)})["in"]["obs"])


# -- Containers that do not hold what they are given


class Coerced(dict):  # type: ignore[type-arg]
    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, np.asarray(value))


class Decoded(dict):  # type: ignore[type-arg]
    def __getitem__(self, key: Any) -> Any:
        return dict.__getitem__(self, key) + 0


class CoercedItems(collections.UserDict):  # type: ignore[type-arg]
    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, np.asarray(value))


class CoercedList(list):  # type: ignore[type-arg]
    def __setitem__(self, place: Any, value: Any) -> None:
        super().__setitem__(place, [np.asarray(x) for x in value])


class CoercedDeque(collections.deque):  # type: ignore[type-arg]
    def extend(self, values: Any) -> None:
        super().extend(map(np.asarray, values))


@dataclasses.dataclass
class CoercedField:
    obs: Any

    @property
    def obs(self) -> Any:
        return self._obs

    @obs.setter
    def obs(self, value: Any) -> None:
        self._obs = np.asarray(value)


class Forgetful(Wrapped):
    def __copy__(self) -> Any:
        return type(self)()

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def weak(a: Any) -> Any:
    return weakref.WeakValueDictionary({"obs": a})


COERCED: dict[str, Any] = {
    "dict": (lambda a: Coerced(obs=a), "dict(x)"),
    "dict that makes what it is asked for": (lambda a: Decoded(obs=a), "{key: x[key] for key in x}"),
    "dict around a list": (lambda a: Coerced(obs=[a, a]), "dict(x)"),
    "user dict": (lambda a: CoercedItems(obs=a), "dict(x)"),
    "mapping that forgets": (lambda a: Forgetful({"obs": a}), "dict(x)"),
    "dict of weak references": (weak, "dict(x)"),
    "list": (lambda a: CoercedList([a]), "list(x)"),
    "deque": (lambda a: CoercedDeque([a]), "list(x)"),
    "dataclass": (CoercedField, ""),
}


@pytest.mark.parametrize("name", COERCED)
def test_container_that_does_not_hold_what_was_converted_is_refused_with_a_cure_that_works(name, a):
    make, cure = COERCED[name]
    source = make(a)
    with pytest.raises(tb.UnsupportedArrayError) as error:
        tree.to_torch({"in": source})
    said, cures = str(error.value).splitlines()
    assert said.startswith(f"batch['in']: a {type(source).__name__} cannot be built from converted values: ")
    assert cures.startswith(f"Give {cure} in its place, register it with" if cure else "Register it with")
    if cure:
        made = tree.to_torch(eval(cure, {"x": source}))
        assert assert_alike(made, made, assert_tensor_of) > 0


def test_what_a_container_of_weak_references_would_lose_is_seen_by_the_plan_too(a):
    with pytest.raises(tb.UnsupportedArrayError, match="cannot be built from converted values: "):
        tree.plan(weak(a), "torch")


class Groups(Wrapped):
    """Gives its groups as new objects, takes no others, and keeps its arrays as NumPy's."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items_[key] = value if isinstance(value, dict) else np.asarray(value)

    def __getitem__(self, key: Any) -> Any:
        value = self.items_[key]
        return Groups(value) if isinstance(value, dict) else value

    def __copy__(self) -> Any:
        return type(self)(self.items_)


def test_mappings_in_mappings_are_refused_with_a_cure_for_all_of_them(a):
    source = Groups({"x": a, "deep": {"y": a, "deeper": {"z": a}}})
    with pytest.raises(tb.UnsupportedArrayError, match="a Groups cannot be built") as error:
        tree.to_torch(source)
    cure = str(error.value).splitlines()[1]
    assert cure.startswith("Give plain(x) in place of the outermost, plain = lambda x: ")
    names: dict[str, Any] = {"collections": collections}
    exec(cure.partition(", ")[2].partition(", register")[0], names)
    made = tree.to_torch(names["plain"](source))
    assert_tensor_of(a, made["x"])
    assert_tensor_of(a, made["deep"]["deeper"]["z"])


class Refusing(Wrapped):
    """As xarray's datasets: with a method of arrays that refuses."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError("cannot directly convert this.")


@pytest.mark.parametrize("inner", [{}, {"deep": Wrapped({"y": np.zeros(2)})}], ids=["flat", "deep"])
def test_mapping_that_refuses_to_be_an_array_is_told_as_the_container_it_is(inner, a):
    source = Refusing({"x": a, **inner})
    with pytest.raises(tb.UnsupportedArrayError, match="Refusing cannot be converted: a container is not one") as error:
        tb.to_torch(source)
    cure, _, plain = str(error.value).partition("\nConvert every leaf: ")[2].removesuffix(".").partition(", ")
    names: dict[str, Any] = {"tensorbridge": tb, "collections": collections, "x": source}
    exec(plain, names)
    assert_tensor_of(a, eval(cure, names)["x"])


class Secretive:
    __slots__ = ("__secret", "open")

    def __init__(self) -> None:
        self.__secret = self.open = "kept"

    def told(self) -> tuple[str, str]:
        return self.__secret, self.open


@dataclasses.dataclass
class SecretiveBatch(Secretive):
    x: Any

    def __post_init__(self) -> None:
        Secretive.__init__(self)


class SecretiveList(list):
    __slots__ = ("__secret",)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.__secret = "kept"

    def told(self) -> str:
        return self.__secret


class Scaled(collections.abc.Mapping):  # type: ignore[type-arg]
    def __init__(self, items: Any, scale: int = 1) -> None:
        self._items, self.scale, self.kinds = items, scale, " ".join(type(x).__name__ for x in items.values())

    @functools.cached_property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.values())

    def __getitem__(self, key: Any) -> Any:
        return self._items[key]

    def __iter__(self) -> Any:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def test_settings_of_a_mapping_that_is_made_from_a_dict_are_kept(a):
    source = Scaled({"x": a}, scale=9)
    assert source.nbytes == a.nbytes
    made = tree.to_torch(source, dtype="float16")
    assert (type(made), made.scale, made.kinds, made.nbytes) == (Scaled, 9, "Tensor", a.size * 2)
    assert source["x"] is a


def test_private_slots_are_kept(a):
    assert tree.to_torch(SecretiveBatch(a)).told() == ("kept", "kept")
    assert tree.to_torch(SecretiveList([a])).told() == "kept"


class Frozen(Wrapped):
    """Makes its inner dicts its own kind as they are asked for, and lists anew: with what they held in them."""

    def __getitem__(self, key: Any) -> Any:
        value = self.items_[key]
        return Frozen(value) if isinstance(value, (dict, Frozen)) else [*value] if isinstance(value, list) else value


def test_container_that_wraps_what_it_holds_anew_is_asked_for_the_arrays_in_it(a):
    made = tree.to_torch(Frozen({"x": {"y": a}, "l": [a, {"z": a}], "n": 3}))
    assert type(made) is type(made["x"]) is Frozen
    assert_tensor_of(a, made["x"]["y"])
    assert_tensor_of(a, made["l"][1]["z"])


class Lowered(dict):  # type: ignore[type-arg]
    """Writes its keys small, and keeps those that it was copied with."""

    def __copy__(self) -> Any:
        return Lowered()

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key.lower(), value)


def test_container_that_changes_its_keys_is_refused(a):
    with pytest.raises(tb.UnsupportedArrayError, match="a Lowered cannot be built from converted values"):
        tree.to_torch(Lowered(X=a))


class Anew(Wrapped):
    """Makes what is no array anew as it is asked for."""

    def __getitem__(self, key: Any) -> Any:
        value = self.items_[key]
        return bytearray(value) if isinstance(value, bytearray) else value


def test_container_that_makes_what_is_no_array_anew_is_asked_for_its_arrays_alone(a):
    made = tree.to_torch(Anew({"x": a, "raw": bytearray(b"raw")}))
    assert_tensor_of(a, made["x"])
    assert made["raw"] == b"raw"


class Ring(collections.deque):  # type: ignore[type-arg]
    """Says how it is copied."""

    def __copy__(self) -> Any:
        like = Ring((), self.maxlen)
        like.note = "copied"
        return like


def test_deque_that_says_how_it_is_copied_is_copied_so(a):
    made = tree.to_torch(Ring([a, a], 3))
    assert (type(made), made.maxlen, made.note, len(made)) == (Ring, 3, "copied", 2)


@dataclasses.dataclass
class Counted:
    """Is made by a `__new__` that wants to know for what."""

    x: Any

    def __new__(cls, x: Any) -> Any:
        return super().__new__(cls)

    def __reduce__(self) -> Any:
        return Counted, (self.x,)


def test_dataclass_whose_new_wants_an_argument_is_copied(a):
    source = Counted(a)
    assert_tensor_of(a, tree.to_torch(source).x)
    assert source.x is a


def test_quoted_reason_ends_in_one_full_stop(a):
    class Ends(Wrapped):
        def __init__(self, items: Any = ()) -> None:
            if any(isinstance(value, torch.Tensor) for value in dict(items).values()):
                raise ValueError("takes no tensors.")
            super().__init__(items)

    with pytest.raises(tb.UnsupportedArrayError, match=r"ValueError: takes no tensors\.\n"):
        tree.to_torch(Ends({"x": a}))


def test_planning_builds_containers_and_changes_none(a):
    for make in CONTAINERS.values():
        source = make(a)
        before = parts(source)
        tree.plan(source, "torch")
        assert parts(source)[0] == before[0]
        assert all(x is y for x, y in zip(parts(source)[1], before[1], strict=True))


# -- What is not an array


class Sparse:
    """As SciPy's sparse arrays: it offers no array, and makes one when it is told to."""

    shape = (2, 2)

    def toarray(self) -> Any:
        return np.eye(2)


SPARSE = r"batch\['s'\]: .*no strided memory to share\.\nConvert x\.toarray"


@pytest.mark.parametrize(
    "call", [tree.to_torch, tree.to_numpy, lambda x: tree.plan(x, "torch"), lambda x: tb.collate([x])]
)
def test_sparse_array_is_refused_in_a_tree_as_it_is_alone(call, a):
    with pytest.raises(tb.UnsupportedArrayError, match=SPARSE):
        call({"x": a, "s": Sparse()})


@pytest.mark.parametrize("to", [tree.to_torch, tree.to_numpy])
@pytest.mark.parametrize("name", KEPT)
def test_what_is_not_an_array_is_the_same_object(name, to, a):
    value = KEPT[name]
    result = to({"x": value, "a": a, "l": [value]})
    assert result["x"] is value
    assert result["l"][0] is value
    if name not in ("object", "module"):
        assert to(value) is value


UNKNOWN: dict[str, tuple[Any, str]] = {
    "a generator": (lambda a: (x for x in [a]), "list(x)"),
    "a view of values": (lambda a: {"x": a}.values(), "list(x)"),
    "a set of tensors": (lambda a: {torch.zeros(1)}, "list(x)"),
    "parameters": (lambda a: torch.nn.Linear(1, 1).parameters(), "list(x)"),
    "a module": (lambda a: torch.nn.Linear(1, 1), "x.state_dict()"),
    "an object": (lambda a: Opaque(a), "vars(x)"),
}
WAYS = {
    "to_numpy": tree.to_numpy,
    "to_torch": tree.to_torch,
    "out": lambda x: tree.to_numpy(x, out=x),
    "plan": lambda x: tree.plan(x, "numpy"),
    "prefetch": lambda x: next(tb.prefetch([x], device="cpu")),
    "collate": lambda x: tb.collate([x]),
    "async": lambda x: tb.to_numpy_async(x).result(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_may_hold_arrays_and_is_no_container_is_no_tree(name, way, a):
    make, cure = UNKNOWN[name]
    x = make(a)
    with pytest.raises(tb.UnsupportedArrayError) as told:
        WAYS[way](x)
    assert type(x).__name__ in str(told.value)
    if way == "async":
        return
    unknown = f"{type(x).__name__} is not a container that tensorbridge knows"
    assert f"{unknown}: what it holds would stay as it is.\nGive {cure}" in str(told.value)
    assert tree.to_numpy(eval(cure, {"x": x}))


@pytest.mark.parametrize("value", [None, "text", 3, 2.5, b"raw", range(3), (), [], {}, set(), frozenset({1}), ["a"]])
@pytest.mark.parametrize("way", ["to_numpy", "to_torch", "plan", "prefetch", "collate"])
def test_a_tree_without_arrays_is_one(way, value):
    WAYS[way](value)


def test_containers_without_arrays_are_new_ones_where_that_costs_nothing(a):
    source = {"a": a, "meta": {"id": [1, 2]}, "env": types.MappingProxyType({"k": 1})}
    result = tree.to_torch(source)
    result["meta"]["id"].append(3)
    assert source["meta"] == {"id": [1, 2]}
    assert result["env"] is source["env"]


def test_an_array_alone_is_a_tree(a):
    assert tree.to_torch(a).data_ptr() == a.__array_interface__["data"][0]


@pytest.mark.parametrize("empty", [{}, [], (), None, "x"])
def test_tree_without_arrays(empty):
    result = tree.to_torch(empty)
    assert result == empty
    assert result is not empty or not isinstance(empty, (dict, list))
    assert tree.plan(empty, "torch").zero_copy


@dataclasses.dataclass
class Episode:
    obs: Any

    def toarray(self) -> Any:
        return self.obs


class Simulator:
    def toarray(self) -> None: ...


def test_a_method_of_a_containers_own_does_not_make_it_a_sparse_array():
    simulator = Simulator()
    space = types.SimpleNamespace(obs=np.ones(2), toarray=len)
    made = tree.to_torch([Episode(np.ones(2)), simulator, space])
    assert isinstance(made[0], Episode)
    assert torch.is_tensor(made[0].obs)
    assert made[1] is simulator
    assert torch.is_tensor(made[2].obs)


def test_an_object_that_has_its_array_protocol_as_an_attribute_of_its_own_is_an_array(a):
    holder = types.SimpleNamespace(__array_interface__=a.__array_interface__, owner=a)
    assert_tensor_of(a, tree.to_torch({"x": holder})["x"])


def test_classes_of_arrays_are_not_kept_without_end():
    seen = weakref.WeakSet()
    for i in range(300):
        cls = type(f"Array{i}", (np.ndarray,), {})
        seen.add(cls)
        tree.to_numpy([np.zeros(2).view(cls)])
        del cls
    gc.collect()
    assert len(seen) < 300


def test_a_class_may_be_registered_by_another_thread_while_a_tree_is_opened(monkeypatch):
    class Registry(dict):
        def items(self):
            for item in super().items():
                self["elsewhere", type("New", (), {})] = None  # as the other thread does between two looks
                yield item

    registry = types.ModuleType("optree.registry")
    registry._NODETYPE_REGISTRY = Registry({("here", int): None, ("here", str): None})
    monkeypatch.setitem(sys.modules, "optree.registry", registry)
    kept = object()
    assert tb.tree.to_torch([np.zeros(1), kept])[1] is kept


@pytest.mark.parametrize("make", [dict, types.SimpleNamespace])
def test_no_value_comes_out_under_another_key_while_another_thread_changes_the_tree(make, monkeypatch):
    node = make(a=np.zeros(1), b=np.ones(1), c=np.full(1, 2.0))
    held = node if make is dict else vars(node)
    before, kind = dict(held), _containers.kind_of(node)

    def list_of(view):
        made = list(view)
        held["a"] = held.pop("a")  # as the other thread does between two looks
        held[f"new {len(held)}"] = None
        return made

    monkeypatch.setattr(_containers, "list", list_of, raising=False)
    children, keys = kind.open(node)
    assert dict(zip(keys, children, strict=True)) == before
    assert list(held) != list(before)
