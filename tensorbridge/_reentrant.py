"""A ``with`` block that can be opened again; contextlib's cannot, and answer with an AttributeError of their own."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import get_ident
from typing import Any, Generic, NoReturn, TypeVar

from tensorbridge._eager import eager

_T = TypeVar("_T")


def _place(identify: Callable[[], int] = get_ident, modules: dict[str, Any] = sys.modules) -> tuple[int, int]:
    """The thread and the async task that are running."""
    asyncio: Any = modules.get("asyncio")
    running = getattr(asyncio, "_get_running_loop", None)
    loop = None if running is None else running()
    return identify(), 0 if loop is None else id(asyncio.current_task(loop))


class Reentrant(AbstractContextManager[_T], Generic[_T]):
    """Opens what `make` makes, anew each time; blocks of one object nest, in each thread and task by themselves."""

    _place = staticmethod(_place)  # where the interpreter ends, names end before blocks

    def __init__(self, make: Callable[[], AbstractContextManager[_T]], line: str) -> None:
        self._make, self._line = make, line  # of a `with`: "trace() as seen"
        self._open: dict[tuple[int, int], list[AbstractContextManager[_T]]] = defaultdict(list)  # by place

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
        self._open[self._place()].append(block)
        return value

    @eager
    def __exit__(self, *exc: Any) -> bool | None:
        place = self._place()
        others = filter(None, list(self._open.values()))  # a generator may end elsewhere
        mine = self._open.get(place) or next(others, None)
        if mine is None:
            call = self._line.partition(" as ")[0]
            raise RuntimeError(f"{call}: left without having been entered; open it by a with block")
        block = mine.pop()
        if not self._open.get(place):
            self._open.pop(place, None)
        return block.__exit__(*exc)
