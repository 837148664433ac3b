"""Casts by NumPy: what it says of them (overflow, invalid value) is said at the caller's line, not at one of ours.

NumPy warns at the line that casts, and Python shows a warning once a line: one in here would stand for every caller.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from functools import cache
from typing import Any, TypeVar

import numpy as np

from tensorbridge import _dtypes, _watch

_T = TypeVar("_T")
_KINDS = {"divide by zero": "divide", "overflow": "over", "underflow": "under", "invalid value": "invalid"}


class _Listener:
    """Hears what NumPy has to say while `state` is in `variable`, where NumPy keeps what `np.errstate` sets.

    To set a context variable takes a tenth of the time of `np.errstate`. A NumPy that has none leaves `variable` None.
    """

    def __init__(self) -> None:
        self.said: list[str] = []
        self.variable: ContextVar[Any] | None = None
        if len(found := Context().run(self._open)) == 1:
            ((self.variable, self.state),) = found.items()

    def _open(self) -> Context:
        with np.errstate(all="call", call=self.hear):
            return copy_context()

    def hear(self, kind: str, flag: int) -> None:
        self.said.append(kind)


_idle: list[_Listener] = []  # each hears one cast at a time


@cache
def _errstate() -> ContextVar[Any] | None:
    return _Listener().variable


def is_heard() -> bool:
    """Whether the caller's `errstate` wants overflow or underflow told otherwise than by NumPy's default, a warning.

    torch's kernels tell nothing, so NumPy makes such a cast.
    """
    variable = _errstate()
    if variable is not None and variable.get(None) is None:
        return False
    modes = np.geterr()
    return modes["over"] not in ("warn", "ignore") or modes["under"] != "ignore"


def with_warnings(cast: Callable[..., _T], source: str, wanted: str) -> Callable[..., _T]:
    """`cast`, from elements of one name to another, with its warnings at the caller's line.

    What NumPy has to say is kept back for the moment of the cast, as by its own `errstate`, in this context alone.
    Where the caller's `errstate` asks for more than a warning (`raise`, `call` ...), the cast is done again under it.
    """
    if not _may_fail(source.lstrip(">"), wanted.lstrip(">")):
        return cast

    def cast_and_tell(*arrays: Any) -> _T:
        try:
            listener = _idle.pop()
        except IndexError:
            listener = _Listener()
        made = _heard(listener, cast, arrays)
        said, listener.said = listener.said, []
        _idle.append(listener)
        if said:
            modes: Any = np.geterr()
            asked = {kind: modes[_KINDS[kind]] for kind in said}
            if not {"warn", "ignore"}.issuperset(asked.values()):
                return cast(*arrays)
            for kind in (kind for kind, mode in asked.items() if mode == "warn"):
                _watch.warn(f"{kind} encountered in cast", RuntimeWarning)
        return made

    return cast_and_tell


def _heard(listener: _Listener, cast: Callable[..., _T], arrays: tuple[Any, ...]) -> _T:
    if (variable := listener.variable) is None:
        with np.errstate(all="call", call=listener.hear):
            return cast(*arrays)
    return copy_context().run(_listened, variable, listener.state, cast, arrays)


def _listened(variable: ContextVar[Any], state: Any, cast: Callable[..., _T], arrays: tuple[Any, ...]) -> _T:
    """In a copy of the caller's context: an interrupt anywhere leaves nothing in his own."""
    variable.set(state)
    return cast(*arrays)


def _may_fail(source: str, wanted: str) -> bool:
    """Whether NumPy may have anything to say: not of a cast that keeps every value."""
    before, after = _dtypes.DTYPES[source].numpy, _dtypes.DTYPES[wanted].numpy
    if source == wanted or before is None or after is None:
        return False
    integers = before.kind in "biu" and after.kind in "biu"
    return not (integers or np.can_cast(before, after, "safe"))
