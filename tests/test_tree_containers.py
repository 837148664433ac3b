"""Trees: containers come back as they were, with all that they carry; what is not an array is left alone."""

from __future__ import annotations

import collections
import dataclasses
import types
from typing import Any

import numpy as np
import pytest
import torch
from arrays import numbers
from containers import CONTAINERS, KEPT, Derived, Items, Registered, Wrapped, derived

import tensorbridge as tb
from tensorbridge import tree


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
    refused = r"batch\['in'\]: a Strange cannot be built .*\nGive dict\(x\) in its place. Register"
    for call in (tree.to_torch, lambda x: tree.plan(x, "torch"), lambda x: tree.plan(x, "numpy")):
        with pytest.raises(tb.UnsupportedArrayError, match=refused):
            call({"in": source})
        assert source["obs"] is a
    assert_tensor_of(a, tree.to_torch({"in": dict(source)})["in"]["obs"])


def test_planning_builds_containers_and_changes_none(a):
    for make in CONTAINERS.values():
        source = make(a)
        before = parts(source)
        tree.plan(source, "torch")
        assert parts(source)[0] == before[0]
        assert all(x is y for x, y in zip(parts(source)[1], before[1], strict=True))


# -- What is not an array


@pytest.mark.parametrize("to", [tree.to_torch, tree.to_numpy])
@pytest.mark.parametrize("name", KEPT)
def test_what_is_not_an_array_is_the_same_object(name, to, a):
    value = KEPT[name]
    result = to({"x": value, "a": a, "l": [value]})
    assert result["x"] is value
    assert result["l"][0] is value
    assert to(value) is value


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
