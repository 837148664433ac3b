"""A ``with`` block that can be opened again; contextlib's cannot, and answer with an AttributeError of their own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import get_ident
from typing import Any, Generic, TypeVar

from tensorbridge._eager import eager

_T = TypeVar("_T")


class Reentrant(AbstractContextManager[_T], Generic[_T]):
    """Opens what `make` makes, anew each time; blocks of one object nest, in each thread by themselves."""

    _thread = staticmethod(get_ident)  # where the interpreter ends, names end before blocks

    def __init__(self, make: Callable[[], AbstractContextManager[_T]], call: str) -> None:
        self._make, self._call = make, call
        self._open: dict[int, list[AbstractContextManager[_T]]] = defaultdict(list)  # by thread

    def __repr__(self) -> str:
        return f"<{self._call}: open it by a with block>"

    @eager
    def __enter__(self) -> _T:
        block = self._make()
        value = block.__enter__()
        self._open[self._thread()].append(block)
        return value

    @eager
    def __exit__(self, *exc: Any) -> bool | None:
        mine = self._open[self._thread()] or next(filter(None, self._open.values()))  # a generator may end elsewhere
        return mine.pop().__exit__(*exc)
