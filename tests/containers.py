"""Containers by name, each holding the array `a` and things that are no arrays; and what is no container, by name."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import pathlib
import time
import types
import typing
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree


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


class Field(typing.NamedTuple):
    name: str


class Converting:
    """As attrs makes a class: fields that are listed, and converted by `__init__`, which takes one by another name."""

    __attrs_attrs__ = (Field("obs"), Field("_mask"), Field("unset"))

    def __init__(self, obs: Any, mask: Any) -> None:
        self.obs, self._mask = np.asarray(obs), (mask,)

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(self, name):
            raise AttributeError("frozen")
        object.__setattr__(self, name, value)


class ConvertingBySlots(Converting):
    __slots__ = ("obs",)
    __attrs_attrs__ = (Field("obs"),)


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


class TaggedNamespace(Tagged, types.SimpleNamespace):
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
    "class of attrs": lambda a: Converting(a, {"deep": a}),
    "class of attrs with a slot": lambda a: ConvertingBySlots(a, "text"),
    "namespace": lambda a: types.SimpleNamespace(obs=a, mask={"deep": a}, n=3),
    "namespace with more to init": lambda a: TaggedNamespace("kept", obs=a),
    "registered": lambda a: Registered(a, "text", "kept"),
    "torch return type": lambda a: torch.max(torch.from_numpy(np.stack([a, a])), 0),
    "nested": lambda a: {"obs": [Plain(a, (a, {"x": Pair(a, 1)}))], "n": collections.OrderedDict(k=[[a]])},
}


# What is not an array, and kept as it is.


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
    "class of attrs itself": Converting,
}
