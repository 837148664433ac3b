"""How the like of a container is built: of its class, with other values, and with all else that it carries.

The original is not changed, and its class's `__init__` is called only where there is no other way. Whether a like holds
what it was given is not seen here: the caller checks that.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary


def mapping_build(node: Any, keys: list[Any], children: list[Any]) -> Any:
    """The copy of `node` that its class makes, with every value replaced: factories and attributes are kept.

    A mapping that keeps its items in an object of its own has to say how it is copied: a shallow copy would share that
    object, and be written through. Failing that, its class makes one from a dict, or it is an error.
    """
    cls: Any = type(node)
    if isinstance(node, WeakValueDictionary):
        raise TypeError("it keeps no value that nobody else keeps")
    if isinstance(node, (dict, UserDict)) or hasattr(cls, "__copy__"):
        like = _copied(node, keys, children)
        if like is not None:
            return like
    like = cls(dict(zip(keys, children, strict=True)))
    _keep_settings(like, node)
    return like


def _keep_settings(like: Any, node: Any) -> None:
    """Numbers and text that its class takes beside the items, by the name of the argument."""
    code = getattr(type(node).__init__, "__code__", None)
    for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if code else ():
        value = getattr(node, "__dict__", {}).get(name)
        if type(value) in _PLAIN and name in getattr(like, "__dict__", ()):
            object.__setattr__(like, name, value)


_PLAIN = frozenset({bool, int, float, complex, str, bytes})


def _copied(node: Any, keys: list[Any], children: list[Any]) -> Any:
    """A copy with new values; None where items cannot be set, or a copy is the mapping itself: it is immutable."""
    try:
        like = _alike(node)
        if like is node:
            return None
        for key, child in zip(keys, children, strict=True):
            like[key] = child
    except TypeError:
        return None
    if getattr(node, "__dict__", None) is node:  # the idiom `self.__dict__ = self`: items are attributes
        like.__dict__ = like
    return like


def list_build(node: Any, _: Any, children: list[Any]) -> Any:
    like = _alike(node)
    like[:] = children
    return like


def deque_build(node: Any, _: Any, children: list[Any]) -> Any:
    like = _alike(node)
    like.clear()
    like.extend(children)
    return like


def tuple_build(node: Any, _: Any, children: list[Any]) -> Any:
    if hasattr(type(node), "n_sequence_fields"):  # a C struct sequence makes itself from one sequence
        return type(node)(children)
    like = tuple.__new__(type(node), children)
    if getattr(node, "__dict__", None):
        like.__dict__.update(node.__dict__)
    return like


def chainmap_build(node: Any, _: Any, children: list[Any]) -> Any:
    """Its maps are kept apart: a write to its like goes to the first one, and a copy would share the others."""
    cls: Any = type(node)
    like = cls.__new__(cls)
    _keep_attributes(like, node)
    like.maps = children
    return like


def fields_build(node: Any, names: list[str], children: list[Any]) -> Any:
    """An instance made without ``__init__``: its fields are not arguments of it (init=False), or were changed since."""
    cls: Any = type(node)
    like = cls.__new__(cls) if cls.__new__ in (object.__new__, SimpleNamespace.__new__) else copy.copy(node)
    _keep_attributes(like, node, besides=names)
    for name, child in zip(names, children, strict=True):
        object.__setattr__(like, name, child)
    if hasattr(cls, "__attrs_attrs__") and hasattr(node, _HASH_OF_ATTRS):  # of the old values; None: not made yet
        object.__setattr__(like, _HASH_OF_ATTRS, None)
    return like


_HASH_OF_ATTRS = "_attrs_cached_hash"


def _alike(node: Any) -> Any:
    """A shallow copy, as its class makes it.

    The standard library copies subclasses of these three by calling them, as if their `__init__` were its own, and
    loses attributes. Their likes are made without `__init__`, and empty.
    """
    cls: Any = type(node)
    base: Any = next((base for base in (defaultdict, OrderedDict, deque) if isinstance(node, base)), None)
    if base is None or cls is base or any(getattr(cls, name, None) != getattr(base, name, None) for name in _COPYING):
        return copy.copy(node)
    like = base.__new__(cls)
    _keep_attributes(like, node)
    if base is defaultdict:
        like.default_factory = node.default_factory
    if base is deque:
        deque.__init__(like, (), node.maxlen)
    return like


_COPYING = ("__copy__", "__reduce__", "__reduce_ex__")


def _keep_attributes(like: Any, node: Any, besides: Sequence[str] = ()) -> None:
    cls = type(node)
    for name, value in getattr(node, "__dict__", {}).items():
        if not isinstance(getattr(cls, name, None), cached_property):  # derived from the old arrays
            object.__setattr__(like, name, value)
    for slot in _slots(cls):
        if slot not in ("__dict__", "__weakref__", *besides) and hasattr(node, slot):
            object.__setattr__(like, slot, getattr(node, slot))


def _slots(cls: type) -> Iterator[str]:
    """As attributes are called: a private one by its class too. Besides fields, attrs has slots for what was derived
    from them.
    """
    for base in cls.__mro__:
        names = () if "__attrs_attrs__" in vars(base) else vars(base).get("__slots__", ())
        owner = base.__name__.lstrip("_")
        for name in [names] if isinstance(names, str) else names:
            private = owner and name.startswith("__") and not name.endswith("__")
            yield f"_{owner}{name}" if private else name
