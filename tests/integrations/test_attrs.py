"""Classes of attrs are containers as dataclasses are: built without ``__init__``, its converters and its validators."""

from __future__ import annotations

import functools
from typing import Any

import attr
import attrs
import numpy as np
import pytest
import torch

import tensorbridge as tb
from tensorbridge import tree

CALLS: list[Any] = []


def converted(x: Any) -> Any:
    CALLS.append(x)
    return x


def is_array(_: Any, __: Any, x: Any) -> None:
    assert isinstance(x, np.ndarray)


@attrs.define
class Plain:
    obs: Any = attrs.field(converter=converted)
    _mask: Any = attrs.field(validator=is_array)
    count: Any = attrs.field(init=False, default=0)
    note: Any = attrs.field(init=False)  # never set

    def __attrs_post_init__(self) -> None:
        self.count += 1


@attrs.frozen(slots=False)
class Frozen:
    obs: Any = attrs.field(converter=converted)
    _mask: Any = attrs.field(validator=is_array)
    count: Any = attrs.field(init=False, default=1)

    @functools.cached_property
    def total(self) -> Any:
        return self.obs.sum()


@attrs.define
class Slotted(Plain):
    more: Any = None

    @functools.cached_property
    def total(self) -> Any:
        CALLS.append("total")
        return self.obs.sum()


@attr.s(auto_attribs=True)
class Old:
    obs: Any = attr.ib(converter=converted)
    _mask: Any = attr.ib(validator=is_array)
    count: Any = attr.ib(init=False, default=1)


@attrs.define(eq=False)
class Child(Old):
    more: Any = None


CLASSES = [Plain, Frozen, Slotted, Old, Child]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_instance_comes_back_as_it_was_with_other_arrays(cls):
    a, mask = np.arange(3.0), np.array([True, False])
    source = cls({"x": a}, mask)
    CALLS.clear()
    made = tree.to_torch([source])[0]
    assert type(made) is cls
    assert CALLS == []
    assert torch.equal(made.obs["x"], torch.from_numpy(a))
    assert torch.equal(made._mask, torch.from_numpy(mask))
    assert made.count == 1
    assert not hasattr(made, "note")
    assert (source.obs["x"] is a, source._mask is mask) == (True, True)
    assert tree.plan(source, "torch").zero_copy


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_collate_takes_instances(cls):
    batch = tb.collate([cls(np.full(2, i), np.zeros(1)) for i in range(3)])
    assert type(batch) is cls
    assert batch.obs.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert batch._mask.shape == (3, 1)
    assert batch.count.tolist() == [1, 1, 1]


@pytest.mark.parametrize("cls", [Frozen, Slotted])
def test_what_was_derived_from_the_old_arrays_is_derived_again_and_only_when_asked_for(cls):
    source, other = cls(np.arange(3.0), np.zeros(1)), cls(np.arange(3.0), np.zeros(1))
    assert source.total == 3
    CALLS.clear()
    made = tree.to_torch([source, other])
    assert CALLS == []
    assert all(isinstance(x.total, torch.Tensor) for x in made)


@pytest.mark.parametrize("slots", [True, False])
def test_a_hash_that_is_kept_is_that_of_the_new_values(slots):
    @attrs.define(unsafe_hash=True, cache_hash=True, slots=slots)
    class Hashed:
        obs: Any

    t = torch.zeros(2)
    source = Hashed(t)
    hash(source)
    made = tree.to_torch(source, copy=True)
    assert hash(made) == hash(Hashed(made.obs))


def test_an_error_names_the_field():
    with pytest.raises(tb.UnsupportedArrayError, match=r"^batch\['s'\]\._mask: "):
        tree.to_numpy({"s": Old(np.zeros(2), np.zeros(2, "M8[s]"))})


def test_one_without_an_array_is_the_same_object():
    source = attrs.make_class("Empty", ["x"])("text")
    assert tree.to_torch([source])[0] is source


def test_alone_it_is_a_container():
    with pytest.raises(
        tb.UnsupportedArrayError, match=r"a container is not one array\.\n.*tensorbridge\.tree\.to_torch\(x\)"
    ):
        tb.to_torch(Old(np.zeros(2), np.zeros(2)))
