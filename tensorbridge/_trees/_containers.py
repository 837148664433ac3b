"""Containers: which values are trees of arrays, how one is opened into its children, how its like is built again.

Exact built-in types are known at once; then come those registered with torch's pytrees or optree, tables, subclasses of
built-in containers, dataclasses, classes of attrs, and the like. Sets are not containers here: arrays cannot be hashed.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import ChainMap, OrderedDict, UserList, defaultdict, deque
from collections.abc import Callable, Mapping
from enum import Enum
from mmap import mmap
from numbers import Number
from os import PathLike
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from tensorbridge._adapters import _columns, _strangers
from tensorbridge._errors import UnsupportedArrayError
from tensorbridge._loaded import array_class, loaded
from tensorbridge._refuse import OBSTACLES, plain_dict
from tensorbridge._trees import _rebuild, _tables


class Kind(NamedTuple):
    """What is done with containers of one type."""

    open: Callable[[Any], tuple[list[Any], Any]]  # its children, and what is needed to build and to name
    build: Callable[[Any, Any, list[Any]], Any]  # the original, what `open` kept, new children: its like
    name: Callable[[Any, Any, int], str] = lambda node, keys, i: f"[{keys[i]!r}]"  # of child i, as a person writes it
    exotic: bool = True  # kept as it is where nothing in it is an array; else its like can always be built
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
    node = node.copy()  # one moment: another thread may change it between the values and the keys
    return list(node.values()), list(node)


def sequence_open(node: Any) -> tuple[list[Any], None]:
    return list(node), None


DICT = Kind(_dict_open, lambda node, keys, children: dict(zip(keys, children, strict=True)), exotic=False)
LIST = Kind(sequence_open, lambda node, _, children: children, at, exotic=False)
TUPLE = Kind(sequence_open, lambda node, _, children: tuple(children), at, exotic=False)
MAPPING = Kind(_mapping_open, _rebuild.mapping_build)
CHAINMAP = Kind(lambda node: (list(node.maps), None), _rebuild.chainmap_build, lambda node, _, i: f".maps[{i}]")
FIELDS = Kind(_fields_open, _rebuild.fields_build, _dot)
NAMESPACE = FIELDS._replace(open=lambda node: _dict_open(vars(node)))
ROOT = Kind(
    lambda node: ([node], None), lambda node, _, children: children[0], lambda node, _, i: "batch", exotic=False
)

# What a value is: a Kind of container, an array, or anything else, which is kept as it is.
ARRAY, OTHER = "array", "other"
EXACT: dict[type, Any] = {
    dict: DICT,
    list: LIST,
    tuple: TUPLE,
    OrderedDict: MAPPING._replace(exotic=False),
    defaultdict: MAPPING._replace(exotic=False),
    deque: Kind(sequence_open, _rebuild.deque_build, at, exotic=False),
    np.ndarray: ARRAY,
    **dict.fromkeys([str, bytes, bytearray, bool, int, float, complex, type(None), range, slice, type], OTHER),
}
_REMEMBERED = 128  # classes: a program may make them by the call, and what is kept here lives
# Numbers, text and raw bytes are kept, though NumPy's scalars speak array protocols and bytes are buffers.
_KEPT = (str, bytes, bytearray, mmap, int, float, complex, np.generic, Enum, type)
_PROTOCOLS = ("__dlpack__", "__cuda_array_interface__", "__array_interface__", "__array__")


def kind_of(x: Any) -> Any:
    """The Kind of a container, ARRAY or OTHER."""
    cls = type(x)
    found = EXACT.get(cls)
    if found is None and cls is getattr(sys.modules.get("torch"), "Size", None):
        found = EXACT[cls] = OTHER  # a shape, though some torch modules register it as a pytree
    return found or _registered(cls) or _by_class(x, cls)


def is_by_class(cls: type) -> bool:
    """Whether the class alone says what a value is."""
    return cls in EXACT or issubclass(cls, (*_KEPT, tuple, list))


def is_array(x: Any) -> bool:
    return kind_of(x) is ARRAY


TEXTUAL = frozenset("SUTO")  # the kinds of NumPy's dtypes whose elements are, or may be, text
HOLD_TEXT: frozenset[type] = frozenset({np.ndarray, np.memmap})


def is_text(x: Any) -> bool:
    """Whether the elements of a value are text, all of them: an array of NumPy that a tree keeps as it keeps text."""
    if type(x) not in HOLD_TEXT or x.dtype.kind not in TEXTUAL:
        return False
    elements = set(map(type, x.flat)) - {type(None)} if x.dtype.kind == "O" else {str}
    return bool(elements) and all(issubclass(cls, (str, bytes)) for cls in elements)


def may_hold_arrays(x: Any) -> bool:
    """Whether what is kept as it is may have arrays in its attributes, or give them one by one: a module, a generator.
    Numbers, text and shapes cannot.
    """
    if EXACT.get(type(x)) is OTHER or isinstance(x, (*_KEPT, Number, PathLike, FunctionType)):
        return False
    if isinstance(x, (set, frozenset)):
        return any(is_array(element) or may_hold_arrays(element) for element in x)
    return any(hasattr(x, name) for name in ("__dict__", "__slots__", "__iter__"))


def left_as(x: Any) -> str:
    """How a plan calls a value that stays as it is in a tree, though somebody may have meant it; else ""."""
    if is_text(x):
        return "text"
    return "" if is_array(x) or not may_hold_arrays(x) else type(x).__name__


def check_known(tree: Any, framework: str, call: str = "") -> None:
    """Refuse what is left as it is at the root, though it may hold arrays: nothing at all would be converted."""
    if isinstance(kind_of(tree), Kind) or is_array(tree) or not may_hold_arrays(tree):
        return
    cls, found = type(tree), _strangers.obstacle_of(tree)
    module = sys.modules.get("torch.nn.modules.module")
    if found in ("rows", "dataset", "lazy"):
        cure = OBSTACLES[found].cure.replace("{framework}", framework)
    elif module is not None and isinstance(tree, module.Module):
        cure = "Give x.state_dict(), or dict(x.named_parameters())."
    elif hasattr(cls, "__iter__"):
        cure = "Give list(x)."
    else:
        cure = "Give vars(x), or register its class with torch.utils._pytree.register_pytree_node or with optree."
    text = f"{cls.__name__} is not a container that tensorbridge knows: what it holds would stay as it is"
    raise UnsupportedArrayError(f"{call or 'tree.to_' + framework}: {text}.\n{cure}")


def _registered(cls: type) -> Kind | None:
    """As torch's pytrees or optree open it, where they are loaded and know exactly this class."""
    node = getattr(loaded("torch.utils._pytree"), "SUPPORTED_NODES", {}).get(cls)
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
    known: dict[Any, Any] = getattr(loaded("optree.registry"), "_NODETYPE_REGISTRY", {})
    known = known.copy()  # another thread may register a class
    return known.get(cls) or next((e for key, e in known.items() if type(key) is tuple and key[1] is cls), None)


def _opened(flattened: Any) -> tuple[list[Any], tuple[Any, ...]]:
    children, *kept = flattened
    return list(children), tuple(kept)


def _pytree_name(node: Any, x: Any, i: int) -> str:
    if node.flatten_with_keys_fn is None:
        return f"[{i}]"
    return str(node.flatten_with_keys_fn(x)[0][i][0])


def _by_class(x: Any, cls: type) -> Any:
    if issubclass(cls, (np.ndarray, array_class("torch"), array_class("cupy"))):
        if len(EXACT) < _REMEMBERED:
            EXACT[cls] = ARRAY
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


def _is_array(x: Any, cls: type) -> bool:
    if _columns.is_scalar(x):  # one value of pyarrow: its text would offer letters as bytes
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
    """The like of an exotic container that lies in `around`, with new children. Refused where it does not hold them."""
    cause: Exception | None = None
    why = "it does not hold them as they are given"
    try:
        made = kind.build(node, keys, children)
        if not kind.asked or _holds(kind, made, keys, children):
            return made
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        cause, why = error, f"{type(error).__name__}: {error}".removesuffix(".")
    text = f"{where() or 'batch'}: a {type(node).__name__} cannot be built from converted values: {why}"
    ways = ["register it with torch.utils._pytree.register_pytree_node", "or convert its arrays one by one"]
    if kind is MAPPING:
        nested = any(x is not node and kind_of(x) is MAPPING for x in (around, *children))
        call, meaning = plain_dict(nested)
        if call == "dict(x)" and isinstance(node, dict) and type(node).__getitem__ is not dict.__getitem__:
            call = "{key: x[key] for key in x}"  # dict(x) would not ask it
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
