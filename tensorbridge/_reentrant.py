"""A ``with`` block that can be opened again; contextlib's cannot, and answer with an AttributeError of their own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

from tensorbridge._eager import eager

_T = TypeVar("_T")


class Reentrant(AbstractContextManager[_T], Generic[_T]):
    """Opens what `make` makes, anew each time; blocks of one object nest."""

    def __init__(self, make: Callable[[], AbstractContextManager[_T]], call: str) -> None:
        self._make, self._call = make, call
        self._open: list[AbstractContextManager[_T]] = []

    def __repr__(self) -> str:
        return f"<{self._call}: open it by a with block>"

    @eager
    def __enter__(self) -> _T:
        block = self._make()
        value = block.__enter__()
        self._open.append(block)
        return value

    @eager
    def __exit__(self, *exc: Any) -> bool | None:
        return self._open.pop().__exit__(*exc)
