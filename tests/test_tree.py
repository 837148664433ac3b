"""Trees: containers come back as they were, leaves converted as they are alone, the same memory stays one."""

from __future__ import annotations

import array
import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import gc
import pathlib
import pickle
import threading
import time
import types
import typing
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from arrays import ARRAYS, numbers
from torch.autograd import forward_ad
from torch.utils import _pytree

import tensorbridge as tb
from tensorbridge import _leaf, tree
from tensorbridge._adapters import adapter_of
from tensorbridge._step import Want

# -- Containers, by name: each holds the array `a` at two places, and things that are no arrays


class Pair(typing.NamedTuple):
    left: Any
    right: Any


class Noted(Pair):
    """A namedtuple with a dict of its own."""


@dataclasses.dataclass
class Plain:
    obs: Any
    mask: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    obs: Any
    mask: Any


@dataclasses.dataclass
class Derived:
    obs: Any
    mask: Any = dataclasses.field(init=False)
    calls: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        self.mask = None
        self.calls += 1

    @functools.cached_property
    def total(self) -> Any:
        return self.obs.sum()


class BySlots:
    __slots__ = "_note"


@dataclasses.dataclass(frozen=True)
class Slotted(BySlots):
    __slots__ = ("mask", "obs")
    obs: Any
    mask: Any


class Items(dict):  # type: ignore[type-arg]
    """Items are attributes too, by the usual idiom."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Settings(collections.UserDict):  # type: ignore[type-arg]
    note = "class"


class Locked(dict):  # type: ignore[type-arg]
    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("locked")


class OneOfAKind(dict):  # type: ignore[type-arg]
    """Its copy is itself, so it must not be written to."""

    def __copy__(self) -> Any:
        return self


class Wrapped(collections.abc.MutableMapping):  # type: ignore[type-arg]
    """Keeps its items in a dict of its own, which a shallow copy would share."""

    def __init__(self, items: Any = ()) -> None:
        self.items_ = dict(items)

    def __getitem__(self, key: Any) -> Any:
        return self.items_[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items_[key] = value

    def __delitem__(self, key: Any) -> None:
        del self.items_[key]

    def __iter__(self) -> Any:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


class Rows(list):  # type: ignore[type-arg]
    pass


class Tagged:
    """Mixed in: its __init__ asks for more than that of the container, and keeps it."""

    def __init__(self, tag: str, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.tag = tag


class TaggedDefault(Tagged, collections.defaultdict):  # type: ignore[type-arg]
    pass


class TaggedOrdered(Tagged, collections.OrderedDict):  # type: ignore[type-arg]
    __slots__ = ("_note",)


class TaggedDeque(Tagged, collections.deque):  # type: ignore[type-arg]
    pass


class TaggedList(Tagged, list):  # type: ignore[type-arg]
    pass


class Registered:
    def __init__(self, first: Any, second: Any, note: str) -> None:
        self.first, self.second, self.note = first, second, note


_pytree.register_pytree_node(
    Registered,
    lambda x: ([x.first, x.second], x.note),
    lambda children, note: Registered(*children, note),
    flatten_with_keys_fn=lambda x: (
        [(_pytree.GetAttrKey("first"), x.first), (_pytree.GetAttrKey("second"), x.second)],
        x.note,
    ),
)


def noted(a: Any) -> Noted:
    made = Noted(a, "text")
    made.note = "kept"  # type: ignore[attr-defined]
    return made


def derived(a: Any) -> Derived:
    made = Derived(a)
    made.mask, made.total  # noqa: B018
    made.mask = a
    return made


def slotted(a: Any) -> Slotted:
    made = Slotted(a, a)
    object.__setattr__(made, "_note", "kept")
    return made


def settings(a: Any) -> Settings:
    made = Settings({"obs": a, "n": 3})
    made.note = "kept"
    return made


def ordered(a: Any) -> TaggedOrdered:
    made = TaggedOrdered("kept", [("z", a), ("a", a)])
    made._note = "kept"
    return made


CONTAINERS: dict[str, Any] = {
    "dict": lambda a: {"b": a, "a": "text", 3: None, ("k", 1): a},
    "list": lambda a: [a, 1, "text", None, b"raw", 2.5, a],
    "tuple": lambda a: (a, (a,), ()),
    "namedtuple": lambda a: Pair(a, Pair("text", a)),
    "namedtuple with attributes": noted,
    "ordered dict": lambda a: collections.OrderedDict([("z", a), ("a", a)]),
    "defaultdict": lambda a: collections.defaultdict(list, {"x": a, "y": [a]}),
    "deque": lambda a: collections.deque([a, 2, a], maxlen=5),
    "dict subclass": lambda a: Items(obs=a, n=3),
    "locked dict": lambda a: Locked(obs=a, n=3),
    "dict that is its own copy": lambda a: OneOfAKind(obs=a, n=3),
    "defaultdict with more to init": lambda a: TaggedDefault("kept", list, {"x": a}),
    "ordered dict with more to init": ordered,
    "deque with more to init": lambda a: TaggedDeque("kept", [a, 1], maxlen=3),
    "list with more to init": lambda a: TaggedList("kept", [a, 1]),
    "user dict": settings,
    "user list": lambda a: collections.UserList([a, 1]),
    "list subclass": lambda a: Rows([a, 1]),
    "mapping": lambda a: types.MappingProxyType({"obs": a, "n": 3}),
    "mapping with items of its own": lambda a: Wrapped({"obs": a, "n": 3}),
    "chain map": lambda a: collections.ChainMap({"obs": a, "n": 3}),
    "dataclass": lambda a: Plain(a, {"deep": a}),
    "frozen dataclass with slots": lambda a: Frozen(a, "text"),
    "dataclass with fields that init does not take": derived,
    "dataclass with slots of a base": slotted,
    "registered": lambda a: Registered(a, "text", "kept"),
    "torch return type": lambda a: torch.max(torch.from_numpy(np.stack([a, a])), 0),
    "nested": lambda a: {"obs": [Plain(a, (a, {"x": Pair(a, 1)}))], "n": collections.OrderedDict(k=[[a]])},
}


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


def test_mapping_that_cannot_be_built_is_refused_by_name_and_left_alone(a):
    class Strange(Wrapped):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    source = Strange("x")
    source["obs"] = a
    with pytest.raises(tb.UnsupportedArrayError, match=r"batch\['in'\]: a Strange cannot be built .*\n.*register"):
        tree.to_torch({"in": source})
    assert source["obs"] is a


# -- What is not an array


class Colour(enum.Enum):
    RED = 1


class Opaque:
    def __init__(self, array: Any) -> None:
        self.array = array


KEPT: dict[str, Any] = {
    "text": "text",
    "bytes": b"raw",
    "bytearray": bytearray(b"raw"),
    "none": None,
    "int": 3,
    "bool": True,
    "float": 2.5,
    "complex": 1j,
    "numpy number": np.float32(2),
    "numpy date": np.datetime64("2026-01-01"),
    "set": {1, 2},
    "type": int,
    "array type": np.ndarray,
    "dtype": np.dtype("f4"),
    "torch dtype": torch.float32,
    "torch device": torch.device("cpu"),
    "size": torch.Size([2, 3]),
    "function": len,
    "range": range(3),
    "object": Opaque(np.zeros(3)),
    "module": torch.nn.Linear(1, 1),
    "struct": time.gmtime(0),
    "date": datetime.datetime(2026, 1, 1),
    "path": pathlib.Path("x"),
    "decimal": decimal.Decimal(1),
    "frozen set": frozenset("ab"),
    "enum": Colour.RED,
    "method": "text".upper,
    "dataclass type": Plain,
}


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


# -- Leaves are converted as they are alone


def outcome(convert: Any) -> Any:
    try:
        return convert()
    except (tb.BridgeError, ValueError) as error:
        return error


def sibling(x: Any) -> Any:
    """A plain array of the dtype of `x`: what is decided for it must not be taken for `x`."""
    if isinstance(x, np.ndarray) and x.dtype.kind in "biufcV":
        return np.ones(6, dtype=x.dtype.newbyteorder("="))
    if isinstance(x, torch.Tensor) and x.dtype is not torch.float4_e2m1fn_x2:
        return torch.ones(6).to(x.dtype)
    return np.ones(6)


def described(x: Any) -> Any:
    return tb.describe(x)._replace(address=0) if not isinstance(x, Exception) else type(x)


OPTIONS: list[dict[str, Any]] = [{}, {"copy": True}, {"copy": False}, {"dtype": "float32"}]
LEAVES = [n for n in ARRAYS if not n.startswith("python-") and n not in ("foreign-bytes", "foreign-bytearray")]


@pytest.mark.filterwarnings("error", "ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("to", ["torch", "numpy"])
@pytest.mark.parametrize("name", LEAVES)
def test_leaf_becomes_what_it_becomes_alone(name, to):
    x = ARRAYS[name]()
    convert, in_tree = {"torch": (tb.to_torch, tree.to_torch), "numpy": (tb.to_numpy, tree.to_numpy)}[to]
    for options in OPTIONS[:2] if "large" in name else OPTIONS:
        alone = outcome(lambda options=options: convert(x, **options))
        leaf = outcome(lambda options=options: in_tree({"x": x, "n": 1}, **options)["x"])
        if not isinstance(outcome(lambda options=options: convert(sibling(x), **options)), Exception):
            beside = outcome(lambda options=options: in_tree([sibling(x), sibling(x), x], **options)[2])
            assert described(beside) == described(leaf), options
            assert isinstance(leaf, Exception) or np.array_equal(numbers(beside), numbers(leaf), equal_nan=True)
        assert described(leaf) == described(alone), options
        if isinstance(alone, Exception):
            assert str(leaf) == f"batch['x']: {alone}"
        else:
            assert np.array_equal(numbers(leaf), numbers(alone), equal_nan=True), options
            assert tb.shares_memory(leaf, x) == tb.shares_memory(alone, x), options


ALL_OF_ONE_KIND: dict[str, Any] = {
    "read-only": ("torch", {}, lambda i: np.frombuffer(bytes([i] * 8)).copy()),
    "read-only in Fortran order": ("torch", {}, lambda i: np.full((2, 3), i, order="F")),
    "read-only, without elements": ("torch", {}, lambda i: np.zeros((0, i))),
    "tensors, copied": ("numpy", {"copy": True}, lambda i: torch.full((3,), float(i))),
    "transposed tensors, copied": ("numpy", {"copy": True}, lambda i: torch.full((2, 3), float(i)).T),
    "tensors that require grad, copied": (
        "numpy",
        {"copy": True},
        lambda i: torch.full((3,), i + 0.5, requires_grad=True),
    ),
    "conjugates, copied": ("numpy", {"copy": True}, lambda i: torch.full((3,), i + 1j).conj()),
    "bfloat16, copied": ("numpy", {"copy": True}, lambda i: torch.full((3,), i, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("name", ALL_OF_ONE_KIND)
def test_leaves_of_one_kind_become_what_each_becomes_alone(name, twice):
    """Lanes are for trees of one kind: what they give is what the function for one array gives."""
    to, options, make = ALL_OF_ONE_KIND[name]
    leaves = [make(i) for i in range(4)]
    for leaf in leaves:
        if name.startswith("read-only"):
            leaf.setflags(write=False)
    leaves += leaves[:2] if twice else []
    convert = {"torch": (tree.to_torch, tb.to_torch), "numpy": (tree.to_numpy, tb.to_numpy)}[to]
    made = convert[0](leaves, **options)
    for leaf, result in zip(leaves, made, strict=True):
        alone = convert[1](leaf, **options)
        found, wanted = tb.describe(result), tb.describe(alone)
        assert (found.dtype, found.strides, found.writable, found.order) == (
            wanted.dtype,
            wanted.strides,
            wanted.writable,
            wanted.order,
        )
        assert np.array_equal(numbers(result), numbers(leaf))
        assert not tb.shares_memory(result, leaf)
    if twice:
        assert made[4] is made[0]


def test_read_only_array_and_a_view_of_it_become_one_tensor():
    whole = np.zeros(3)
    whole.setflags(write=False)
    first, second = tree.to_torch([whole, whole[:]])
    assert first.data_ptr() == second.data_ptr()


def test_arrays_that_are_decided_alike_are_alike():
    tree.to_torch(np.zeros(1))  # tensors are known from the first conversion on
    kinds: dict[Any, dict[Any, str]] = collections.defaultdict(dict)
    for name in LEAVES:
        x = ARRAYS[name]()
        for one in (x, sibling(x)) if isinstance(x, (np.ndarray, torch.Tensor)) else ():
            key = _leaf.key_of(one)
            if key is not None:
                kinds[type(one), key][adapter_of(type(one)).open(one, Want("numpy"))[1]] = name
    assert {kind for kind, _ in kinds} == {np.ndarray, torch.Tensor}
    assert [found for found in kinds.values() if len(found) > 1] == []


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, at its first tangent
def test_tensor_with_a_tangent_is_what_it_is_alone():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        for options in ({}, {"dtype": "float32"}):
            alone = tb.to_numpy(dual, **options)
            beside = tree.to_numpy([torch.ones(2), torch.ones(2), dual], **options)[2]
            assert described(beside) == described(alone)
            assert not beside.flags.writeable


def test_view_of_a_tensor_comes_back_as_its_alias_beside_plain_arrays_too():
    t = torch.zeros(6, dtype=torch.float64)
    for options in ({}, {"dtype": "float64"}):
        tree.to_torch([np.ones(6), np.ones(6), t.numpy()], **options)[2].add_(1)
    assert t._version == 2


def test_staying_in_torch_gives_back_each_tensor_itself():
    t = torch.arange(6.0)
    view, parameter = t.view(6), torch.nn.Parameter(t)
    result = tree.to_torch([t, view, parameter, t])
    assert all(x is y for x, y in zip(result, [t, view, parameter, t], strict=True))


def test_lists_inside_trees_are_containers_and_numbers_stay_numbers():
    assert tree.to_torch({"labels": [0, 1, 2]}) == {"labels": [0, 1, 2]}


# -- The same memory stays one


def two(base: Any, first: Any, second: Any) -> Any:
    return first(base), second(base)


def same(x: Any) -> Any:
    return x


def six() -> Any:
    return np.arange(6.0)


ONE: dict[str, Any] = {
    "one array": lambda: two(six(), same, same),
    "an array and its view": lambda: two(six(), same, lambda a: a[:]),
    "two views": lambda: two(np.arange(12.0), lambda a: a[2:8], lambda a: a[2:8]),
    "one reversed view": lambda: two(six()[::-1], same, same),
    "two reversed views": lambda: two(six(), lambda a: a[::-1], lambda a: a[::-1]),
    "two read-only views": lambda: two(six(), *[lambda a: np.broadcast_to(a, (2, 6))] * 2),
    "an array and a tensor over it": lambda: two(six(), same, torch.from_numpy),
    "a view and a tensor over it": lambda: two(six(), lambda a: a[1:], lambda a: torch.from_numpy(a)[1:]),
    "one tensor": lambda: two(torch.arange(6.0), same, same),
    "a tensor and its view": lambda: two(torch.arange(6.0), same, lambda t: t.view(6)),
    "a tensor and an array over it": lambda: two(torch.arange(6.0), same, lambda t: t.numpy()),
    "two aliases of a tensor": lambda: two(torch.arange(6.0), torch.Tensor.detach, torch.Tensor.detach),
    "one parameter": lambda: two(torch.nn.Parameter(torch.ones(3)), same, same),
    "parameters tied by their data": lambda: two(torch.ones(3), torch.nn.Parameter, torch.nn.Parameter),
    "two buffers": lambda: two(array.array("d", [1, 2]), memoryview, memoryview),
}


@pytest.mark.parametrize("to", ["torch", "numpy"])
@pytest.mark.parametrize("name", ONE)
def test_same_memory_is_copied_once(name, to):
    first, second = ONE[name]()
    result = getattr(tree, f"to_{to}")({"x": first, "y": [second]}, copy=True)
    assert result["x"] is result["y"][0]
    assert not tb.shares_memory(result["x"], first)


@pytest.mark.parametrize("name", ONE)
def test_same_memory_shared_is_still_one(name):
    first, second = ONE[name]()
    assert tb.shares_memory(*tree.to_torch([first, second], share_readonly=True))
    assert tb.shares_memory(*tree.to_numpy([first, second]))


@pytest.mark.parametrize("to", [tree.to_torch, tree.to_numpy])
@pytest.mark.parametrize("name", [name for name in ONE if name.startswith("one ")])
def test_one_object_becomes_one_object(name, to):
    first, second = ONE[name]()
    made = to([first, np.zeros(1), torch.zeros(1), second])
    assert made[0] is made[3]


def test_lazy_views_of_one_tensor_are_resolved_once():
    z = torch.tensor([1 + 2j, 3j])
    made = tree.to_numpy([z.conj(), z.conj()])
    assert made[0] is made[1]
    assert made[0].tolist() == [1 - 2j, -3j]


def test_state_dict_of_tied_weights_stays_tied():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    result = tree.to_numpy(model.state_dict(), copy=True)
    assert result["0.weight"] is result["1.weight"]


def test_shared_views_of_one_memory_become_one_tensor():
    base = np.arange(4.0)
    result = tree.to_torch([base[:], base[:]])
    assert result[0] is result[1]


DIFFERENT: dict[str, Any] = {
    "shape": lambda: two(six(), same, lambda a: a.reshape(2, 3)),
    "length": lambda: two(six(), same, lambda a: a[:3]),
    "dtype": lambda: two(six(), same, lambda a: a.view("int64")),
    "dtype and length": lambda: two(six(), same, lambda a: a.view("int32")),
    "strides": lambda: two(np.arange(9.0).reshape(3, 3), same, lambda a: a.T),
    "strides of tensors": lambda: two(torch.arange(9.0).reshape(3, 3), same, lambda t: t.T),
    "conjugate bit": lambda: two(torch.tensor([1 + 2j]), same, torch.Tensor.conj),
    "negative bit": lambda: two(torch.tensor([1 + 2j]).conj().imag, same, torch._neg_view),
    "requires grad": lambda: two(torch.ones(3, requires_grad=True), same, torch.Tensor.detach),
    "node": lambda: two(torch.ones(3, requires_grad=True) * 2, same, lambda t: t.view(3)),
    "node of a view": lambda: two(torch.ones(6, requires_grad=True) * 2, lambda t: t[::2], lambda t: t[::2]),
    "writable": lambda: two(six(), same, lambda a: np.broadcast_to(a, a.shape)),
    "memory": lambda: (np.zeros(3), np.zeros(3)),
    "memory of tensors": lambda: (torch.zeros(3), torch.zeros(3)),
    "dtype of nothing": lambda: (np.zeros(0), np.zeros(0, "f4")),
}


@pytest.mark.parametrize("to", ["torch", "numpy"])
@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_in_anything_that_decides_stays_two(name, to):
    first, second = DIFFERENT[name]()
    for copy in (True, None):
        result = getattr(tree, f"to_{to}")([first, second], copy=copy)
        assert result[0] is not result[1]
        for made, source in zip(result, (first, second), strict=True):
            assert np.array_equal(numbers(made), numbers(source))
            assert tb.describe(made).shape == tb.describe(source).shape


def test_many_views_of_one_block_are_told_apart_and_twins_kept():
    block = np.arange(100.0).reshape(20, 5)
    leaves = {i: block[i % 10] for i in range(20)}
    for copy in (None, True):
        result = tree.to_torch(leaves, copy=copy)
        assert all(result[i] is result[i + 10] for i in range(10))
        assert len({t.data_ptr() for t in result.values()}) == 10
        assert all(np.array_equal(t.numpy(), leaves[i]) for i, t in result.items())


def test_container_that_occurs_twice_occurs_twice_in_the_result(a):
    inner = {"w": a}
    result = tree.to_torch([inner, inner, (inner,)])
    assert result[0] is result[1] is result[2][0]


def test_doubling_containers_are_walked_once(a):
    top: Any = [a]
    for _ in range(60):
        top = [top, top]
    assert isinstance(tree.to_torch(top), list)


# -- Errors, cycles, depth

PLACES: dict[str, Any] = {
    "batch['obs'][1].mask": lambda x: {"obs": [0, Plain(None, x)]},
    "batch[0].right": lambda x: [Pair(1, x)],
    "batch[3][('k', 1)]": lambda x: [0, 0, 0, {("k", 1): x}],
    "batch[1]": lambda x: collections.deque([1, x]),
    "batch.first": lambda x: Registered(x, 1, ""),
    "batch['a']['b']": lambda x: collections.OrderedDict(a=Settings({"c": np.zeros(2), "b": x})),
}


@pytest.mark.parametrize("path", PLACES)
def test_error_names_the_leaf(path, a):
    with pytest.raises(tb.CopyRequiredError) as error:
        tree.to_torch(PLACES[path](a[::-1]), copy=False)
    assert str(error.value).startswith(f"{path}: to_torch(copy=False): numpy float64 (2, 3) on cpu cannot be shared.")
    assert error.value.plan is not None
    with pytest.raises(tb.UnsupportedArrayError) as refused:
        tree.to_torch(PLACES[path](np.array(["text"])))
    assert str(refused.value).startswith(f"{path}: to_torch: numpy <U4 (1,)")
    with pytest.raises(tb.UnsupportedArrayError) as planned:
        tree.plan(PLACES[path](np.array(["text"])), "torch")
    assert str(planned.value) == str(refused.value)


def test_error_names_the_batch_where_that_is_the_leaf(a):
    for call in (
        lambda x: tree.to_torch(x),
        lambda x: tree.plan(x, "torch"),
        lambda x: tree.to_torch(x, out=torch.zeros(1)),
    ):
        with pytest.raises(tb.UnsupportedArrayError, match=r"^batch: to_torch.*: numpy <U4 \(1,\)"):
            call(np.array(["text"]))


def test_what_cannot_be_converted_is_refused_before_anything_moves(a):
    source = {"good": a[::-1], "bad": np.array(["text"])}
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
    top: Any = np.array(["text"])
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


def test_plan_names_objects_that_may_hold_arrays_and_are_left_as_they_are(a):
    source = {
        "space": types.SimpleNamespace(x=a),
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
        "6 x left as it is: batch['space'] (SimpleNamespace), batch['lazy'] (generator), batch['values'] (dict_values) "
        "and 3 more"
    )
    assert tree.to_torch(source)["space"] is source["space"]
    assert str(tree.plan(torch.nn.Linear(1, 1), "numpy")).endswith("1 x left as it is: batch (Linear)")


ORDINARY = [name for name in KEPT if name not in ("object", "module")]


@pytest.mark.parametrize("name", ORDINARY)
def test_plan_says_nothing_of_ordinary_values(name, a):
    assert tree.plan({"a": a, "x": KEPT[name]}, "torch").left == ()


def test_plan_of_a_fill_names_what_is_left(a):
    source = {"x": a, "space": types.SimpleNamespace(x=a)}
    assert [left.type for left in tree.plan(source, "numpy", out={"x": np.zeros((2, 3))}).left] == ["SimpleNamespace"]


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


def test_module_is_public():
    assert tb.tree is tree
    assert set(tree.__all__) == {"LeafPlan", "LeftPart", "TreePlan", "plan", "to_cupy", "to_numpy", "to_torch"}
