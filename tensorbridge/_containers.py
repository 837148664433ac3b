"""Containers: which values are trees of arrays, how one is opened into its children, how its like is built again.

A tree is walked with a stack of its own, so that depth costs nothing. Exact built-in types are known at once; then
come those registered with torch's pytrees or optree, tables, subclasses of built-in containers, dataclasses, classes of
attrs, and the like. Sets are not containers here: arrays cannot be hashed.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import ChainMap, OrderedDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import partial
from mmap import mmap
from numbers import Number
from os import PathLike
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from tensorbridge import _rebuild, _tables
from tensorbridge._errors import UnsupportedArrayError
from tensorbridge._refuse import plain_dict


class Kind(NamedTuple):
    """What is done with containers of one type."""

    open: Callable[[Any], tuple[list[Any], Any]]  # its children, and what is needed to build and to name
    build: Callable[[Any, Any, list[Any]], Any]  # the original, what `open` kept, new children: its like
    name: Callable[[Any, Any, int], str] = lambda node, keys, i: f"[{keys[i]!r}]"  # of child i, as a person writes it
    exotic: bool = True  # kept as it is where nothing in it is an array
    asked: bool = True  # an exotic one's like is asked whether it holds the new children


def at(node: Any, keys: Any, i: int) -> str:
    return f"[{i}]"


def _mapping_open(node: Any) -> tuple[list[Any], list[Any]]:
    keys = list(node)
    return [node[key] for key in keys], keys


def _namedtuple_name(node: Any, _: Any, i: int) -> str:
    return f".{node._fields[i]}"


def _fields_open(node: Any) -> tuple[list[Any], list[str]]:
    """Of a dataclass, or a class of attrs, those that are set."""
    cls = type(node)
    fields = cls.__attrs_attrs__ if hasattr(cls, "__attrs_attrs__") else dataclasses.fields(node)
    names = [field.name for field in fields if hasattr(node, field.name)]
    return [getattr(node, name) for name in names], names


def _dot(node: Any, names: list[str], i: int) -> str:
    return f".{names[i]}"


def _dict_open(node: Any) -> tuple[list[Any], list[Any]]:
    return list(node.values()), list(node)


def sequence_open(node: Any) -> tuple[list[Any], None]:
    return list(node), None


DICT = Kind(_dict_open, lambda node, keys, children: dict(zip(keys, children, strict=True)), exotic=False)
LIST = Kind(sequence_open, lambda node, _, children: children, at, exotic=False)
TUPLE = Kind(sequence_open, lambda node, _, children: tuple(children), at, exotic=False)
MAPPING = Kind(_mapping_open, _rebuild.mapping_build)
CHAINMAP = Kind(lambda node: (list(node.maps), None), _rebuild.chainmap_build, lambda node, _, i: f".maps[{i}]")
FIELDS = Kind(_fields_open, _rebuild.fields_build, _dot)
NAMESPACE = FIELDS._replace(open=lambda node: (list(vars(node).values()), list(vars(node))))
ROOT = Kind(
    lambda node: ([node], None), lambda node, _, children: children[0], lambda node, _, i: "batch", exotic=False
)

# What a value is: a Kind of container, an array, or anything else, which is kept as it is.
ARRAY, OTHER = "array", "other"
_exact: dict[type, Any] = {
    dict: DICT,
    list: LIST,
    tuple: TUPLE,
    OrderedDict: MAPPING._replace(exotic=False),
    defaultdict: MAPPING._replace(exotic=False),
    deque: Kind(sequence_open, _rebuild.deque_build, at, exotic=False),
    np.ndarray: ARRAY,
    **dict.fromkeys([str, bytes, bytearray, bool, int, float, complex, type(None), range, slice, type], OTHER),
}
# Numbers, text and raw bytes are kept, though NumPy's scalars speak array protocols and bytes are buffers.
_KEPT = (str, bytes, bytearray, mmap, int, float, complex, np.generic, Enum, type)
_PROTOCOLS = ("__dlpack__", "__cuda_array_interface__", "__array_interface__", "__array__")


def kind_of(x: Any) -> Any:
    """The Kind of a container, ARRAY or OTHER."""
    cls = type(x)
    found = _exact.get(cls)
    if found is None and cls is getattr(sys.modules.get("torch"), "Size", None):
        found = _exact[cls] = OTHER  # a shape, though some torch modules register it as a pytree
    return found or _registered(cls) or _by_class(x, cls)


def is_by_class(cls: type) -> bool:
    """Whether the class alone says what a value is."""
    return cls in _exact or issubclass(cls, (*_KEPT, tuple, list))


def is_array(x: Any) -> bool:
    return kind_of(x) is ARRAY


def may_hold_arrays(x: Any) -> bool:
    """Whether what is kept as it is may have arrays in its attributes, or give them one by one: a module, a generator.
    Numbers, text and shapes cannot.
    """
    if _exact.get(type(x)) is OTHER or isinstance(x, (*_KEPT, Number, PathLike, FunctionType)):
        return False
    if isinstance(x, (set, frozenset)):
        return any(is_array(element) or may_hold_arrays(element) for element in x)
    return any(hasattr(x, name) for name in ("__dict__", "__slots__", "__iter__"))


def _registered(cls: type) -> Kind | None:
    """As torch's pytrees or optree open it, where they are loaded and know exactly this class."""
    pytree = sys.modules.get("torch.utils._pytree")
    node = None if pytree is None else pytree.SUPPORTED_NODES.get(cls)
    if node is not None:
        return Kind(
            lambda x: _opened(node.flatten_fn(x)),
            lambda x, kept, children: node.unflatten_fn(children, kept[0]),
            lambda x, kept, i: _pytree_name(node, x, i),
            asked=False,
        )
    entry = _in_optree(cls)
    if entry is None:
        return None
    return Kind(
        lambda x: _opened(entry.flatten_func(x)),
        lambda x, kept, children: entry.unflatten_func(kept[0], children),
        lambda x, kept, i: f"[{kept[1][i]!r}]" if len(kept) > 1 and kept[1] is not None else f"[{i}]",
        asked=False,
    )


def _in_optree(cls: type) -> Any:
    """The entry of a class in optree's registry, in whatever namespace: nobody says here which one is meant."""
    known: dict[Any, Any] = getattr(sys.modules.get("optree.registry"), "_NODETYPE_REGISTRY", {})
    return known.get(cls) or next((e for key, e in known.items() if type(key) is tuple and key[1] is cls), None)


def _opened(flattened: Any) -> tuple[list[Any], tuple[Any, ...]]:
    children, *kept = flattened
    return list(children), tuple(kept)


def _pytree_name(node: Any, x: Any, i: int) -> str:
    if node.flatten_with_keys_fn is None:
        return f"[{i}]"
    return str(node.flatten_with_keys_fn(x)[0][i][0])


def _by_class(x: Any, cls: type) -> Any:
    if _is_framework_array(cls):
        _exact[cls] = ARRAY
        return ARRAY
    if issubclass(cls, _KEPT):
        return OTHER
    if issubclass(cls, tuple):
        return Kind(sequence_open, _rebuild.tuple_build, _namedtuple_name if hasattr(cls, "_fields") else at)
    if issubclass(cls, (list, UserList)):
        return Kind(sequence_open, _rebuild.list_build, at)
    if issubclass(cls, deque):
        return Kind(sequence_open, _rebuild.deque_build, at)
    columns = _tables.opener(x)
    if columns is not None:
        return Kind(columns, DICT.build, exotic=False)
    if issubclass(cls, ChainMap):
        return CHAINMAP
    if issubclass(cls, Mapping):
        return MAPPING
    if _is_array(x, cls):
        return ARRAY
    if issubclass(cls, SimpleNamespace):
        return NAMESPACE
    if dataclasses.is_dataclass(cls) or hasattr(cls, "__attrs_attrs__"):
        return FIELDS
    # A sparse array would make an array if told to: it is refused by name, not left alone.
    return ARRAY if hasattr(cls, "toarray") and hasattr(x, "shape") else OTHER


def _is_framework_array(cls: type) -> bool:
    frameworks = ((sys.modules.get("torch"), "Tensor"), (sys.modules.get("cupy"), "ndarray"))
    return issubclass(cls, (np.ndarray, *(getattr(module, name, ()) for module, name in frameworks if module)))


def _is_array(x: Any, cls: type) -> bool:
    if _tables.is_scalar(x):
        return False
    own = getattr(x, "__dict__", ())
    if any(hasattr(cls, name) or name in own for name in _PROTOCOLS):
        return True
    try:
        memoryview(x).release()
    except (TypeError, BufferError, ValueError):
        return False
    return True


def rebuilt(kind: Kind, node: Any, keys: Any, children: list[Any], where: Callable[[], str], around: Any) -> Any:
    """The like of a container that lies in `around`, with new children. Refused where it does not hold them."""
    cause: Exception | None = None
    why = "it does not hold them as they are given"
    try:
        made = kind.build(node, keys, children)
        if not (kind.exotic and kind.asked) or _holds(kind, made, keys, children):
            return made
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        cause, why = error, f"{type(error).__name__}: {error}".removesuffix(".")
    text = f"{where() or 'batch'}: a {type(node).__name__} cannot be built from converted values: {why}"
    ways = ["register it with torch.utils._pytree.register_pytree_node", "or convert its arrays one by one"]
    if kind is MAPPING:
        nested = any(x is not node and kind_of(x) is MAPPING for x in (around, *children))
        call, meaning = plain_dict(nested)
        ways.insert(0, f"give {call} in {'place of the outermost' if nested else 'its place'}{meaning}")
    elif kind.open is sequence_open:
        ways.insert(0, "give list(x) in its place")
    raise UnsupportedArrayError(f"{text}.\n{ways[0][0].upper()}{', '.join(ways)[1:]}.") from cause


def _holds(kind: Kind, made: Any, keys: Any, children: list[Any]) -> bool:
    held, its = kind.open(made)
    return its == keys and len(held) == len(children) and all(map(_is_held, held, children))


def _is_held(x: Any, child: Any) -> bool:
    """Whether what a container gives is the child it got. It may wrap inner containers anew, around the same arrays."""
    if x is child:
        return True
    kind, inner = kind_of(x), kind_of(child)
    if not (isinstance(kind, Kind) and isinstance(inner, Kind)):
        return kind is inner is OTHER
    children, keys = inner.open(child)
    return _holds(kind, x, keys, children)


# -- The walk


class Frame:
    """One container of a tree while it is walked: its children, which of them are leaves, which are containers.

    Frames know one another by number: references would be cycles, and keep arrays alive until they are collected.
    """

    __slots__ = ("above", "built", "first", "inner", "keys", "kind", "node", "open", "parts", "place", "size", "where")

    def __init__(self, node: Any, kind: Kind, above: int, place: int) -> None:
        self.node, self.kind, self.above, self.place = node, kind, above, place
        self.parts, self.keys = kind.open(node)
        self.first = self.size = 0  # its own leaves are leaves[first : first + size] of the tree
        self.where: list[int] | None = None  # among its children; None: all of them
        self.inner: list[tuple[int, int]] = []  # place among the children, number of the frame
        self.open = True  # not yet walked to its end
        self.built: Any = None


class Flat(NamedTuple):
    """A tree taken apart: its leaves, its containers, and in which order to build them: inner ones first."""

    leaves: list[Any]
    frames: list[Frame]
    order: list[int]

    def path(self, leaf: int) -> str:
        """How a person writes the way to a leaf: ``batch['obs'][1].mask``."""
        number = next(n for n, f in enumerate(self.frames) if f.first <= leaf < f.first + f.size)
        return self._to(number) + _leaf_name(self.frames[number], leaf - self.frames[number].first)

    def paths(self) -> list[str]:
        """The ways to all leaves."""
        found = [""] * len(self.leaves)
        for number, frame in enumerate(self.frames):
            before = self._to(number) if frame.size else ""
            for i in range(frame.size):
                found[frame.first + i] = before + _leaf_name(frame, i)
        return found

    def _to(self, number: int) -> str:
        names: list[str] = []
        while number > 0:
            frame = self.frames[number]
            parent = self.frames[frame.above]
            names.append(parent.kind.name(parent.node, parent.keys, frame.place))
            number = frame.above
        return "".join(reversed(names))

    def built(self, results: list[Any]) -> Any:
        """The tree with `results` for leaves. Only once: the children are handed over."""
        frames = self.frames
        full: set[int] = set()  # frames with an array in them, or below
        for number in self.order:
            frame = frames[number]
            children, kind = frame.parts, frame.kind
            if frame.size:
                mine = results[frame.first : frame.first + frame.size]
                if frame.where is None:
                    children = mine
                else:
                    for place, result in zip(frame.where, mine, strict=True):
                        children[place] = result
            filled = frame.size > 0
            for place, inner in frame.inner:
                children[place] = frames[inner].built
                filled = filled or inner in full
            if filled:
                full.add(number)
            elif kind.exotic:
                frame.built = frame.node
                continue
            where = partial(self._to, number)
            frame.built = rebuilt(kind, frame.node, frame.keys, children, where, frames[frame.above].node)
        return frames[0].built


def _leaf_name(frame: Frame, i: int) -> str:
    return frame.kind.name(frame.node, frame.keys, i if frame.where is None else frame.where[i])


_NONE: Iterator[Any] = iter(())


def flatten(tree: Any, *, everything: bool = False) -> Flat:
    """Take a tree apart into its arrays; with `everything`, into all values that are no containers."""
    root = Frame(tree, ROOT, -1, 0)
    flat = Flat([], [root], [])
    kind = _exact.get(type(tree)) or kind_of(tree)
    if not isinstance(kind, Kind):
        _inner(root, flat.leaves, everything)
        flat.order.append(0)
        return flat
    whole = Frame(tree, kind, 0, 0)
    flat.frames.append(whole)
    root.inner.append((0, 1))
    stack = [(0, _NONE), (1, _inner(whole, flat.leaves, everything))]
    seen = {id(tree): 1}
    while stack:
        number, inner = stack[-1]
        frame = flat.frames[number]
        for place, kind in inner:
            child = frame.parts[place]
            known = seen.get(id(child))
            if known is None:
                known = seen[id(child)] = len(flat.frames)
                frame.inner.append((place, known))
                flat.frames.append(Frame(child, kind, number, place))
                stack.append((known, _inner(flat.frames[known], flat.leaves, everything)))
                break
            if flat.frames[known].open:
                here = flat._to(number) + frame.kind.name(frame.node, frame.keys, place)
                text = f"{here} is {flat._to(known)} again: a tree that contains itself has no end"
                raise UnsupportedArrayError(f"{text}.\nTake the cycle out first.")
            frame.inner.append((place, known))
        else:
            stack.pop()
            frame.open = False
            flat.order.append(number)
    return flat


def _inner(frame: Frame, leaves: list[Any], everything: bool) -> Iterator[tuple[int, Kind]]:
    """Take the leaves of a container, all at once; then its inner containers."""
    children = frame.parts
    frame.first = len(leaves)
    classes = set(map(type, children))
    if len(classes) == 1:
        only = _exact.get(classes.pop())
        if only is ARRAY or (everything and only is OTHER):
            leaves.extend(children)
            frame.size = len(children)
            return _NONE
        if only is OTHER:
            return _NONE
    where: list[int] = []
    inner: list[tuple[int, Kind]] = []
    for place, child in enumerate(children):
        kind = _exact.get(type(child)) or kind_of(child)
        if kind is ARRAY or (everything and kind is OTHER):
            where.append(place)
            leaves.append(child)
        elif kind is not OTHER:
            inner.append((place, kind))
    frame.where, frame.size = where, len(where)
    return iter(inner)
