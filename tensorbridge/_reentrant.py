"""A ``with`` block that can be opened again; contextlib's cannot, and answer with an AttributeError of their own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import get_ident
from typing import Any, Generic, NoReturn, TypeVar

from tensorbridge._eager import eager

_T = TypeVar("_T")


class Reentrant(AbstractContextManager[_T], Generic[_T]):
    """Opens what `make` makes, anew each time; blocks of one object nest, in each thread by themselves."""

    _thread = staticmethod(get_ident)  # where the interpreter ends, names end before blocks

    def __init__(self, make: Callable[[], AbstractContextManager[_T]], line: str) -> None:
        self._make, self._line = make, line  # of a `with`: "trace() as seen"
        self._open: dict[int, list[AbstractContextManager[_T]]] = defaultdict(list)  # by thread

    def __repr__(self) -> str:
        return f"<{self._line.partition('(')[0]}: open it by a with block>"

    def __call__(self, *_: Any) -> NoReturn:
        call = self._line.partition(" as ")[0]
        text = f"{call} is no decorator: the function would not get what it yields"
        raise TypeError(f"{text}.\nOpen it inside: with tensorbridge.{self._line}:")

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
