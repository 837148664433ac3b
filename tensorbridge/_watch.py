"""Copy guard and trace: both are shown the plan of a conversion, the guard before it is performed, the trace after.

A guard is policy: it holds for this thread and this async task, and for what is started from them with their context. A
trace is a profiler: it sees every thread of the process. Neither sees child processes, nor conversions made by hand.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from tensorbridge import _forks
from tensorbridge._eager import eager
from tensorbridge._errors import CopyRequiredError, CopyWarning, nearest
from tensorbridge._events import Event, Trace
from tensorbridge._reentrant import Reentrant
from tensorbridge._step import Plan, bytes_text, cure_of, step_lines

_F = TypeVar("_F", bound=Callable[..., Any])
Mode: TypeAlias = Literal["error", "warn", "allow"]
MODES: tuple[Mode, ...] = get_args(Mode)
Kind: TypeAlias = Literal["h2h", "h2d", "d2h", "d2d"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Guards that a context holds, and open traces, by identity: what a conversion asks first, and all that it pays when
# there is none. No lock: a finalizer or a signal handler may open or end one at any time, each by one operation.
watching: dict[int, Trace | None] = {}


# -- The guard


class _Opened:
    """One opening of a guard: in force for as long as a context holds it, that of the block or a copy of it, in a task
    that outlives the block.
    """

    def __init__(self, guard: copy_guard) -> None:
        self.guard, self.ended = guard, False
        watching[id(self)] = None

    def __del__(self, watching: dict[int, Trace | None] = watching) -> None:
        watching.pop(id(self), None)

    def end(self) -> None:
        """Guard nobody any more, whatever contexts hold it."""
        self.ended = True
        watching.pop(id(self), None)


# Those of this context, the innermost last.
_opened: ContextVar[tuple[_Opened, ...]] = ContextVar("tensorbridge_copy_guard", default=())


class _Changing(threading.local):
    """That this thread changes its context; the garbage collector may end a generator's block in the middle of that."""

    def __init__(self) -> None:
        self.busy = False
        self.left: list[_Opened] = []


_changing = _Changing()


def _without(opened: _Opened) -> None:
    _opened.set(tuple(x for x in _opened.get() if x is not opened))


def _change(opened: _Opened, *, enter: bool) -> None:
    """Enter or leave an opening in this context; and leave what was left in the middle of it, which came back by it."""
    nested, _changing.busy = _changing.busy, True
    try:
        if enter:
            _opened.set((*[x for x in _opened.get() if not x.ended], opened))
        elif nested:
            _changing.left.append(opened)
        else:
            _without(opened)
        while not nested and _changing.left:
            _without(_changing.left.pop())
    finally:
        _changing.busy = nested


def _guard() -> copy_guard | None:
    """The guard that decides here, if one does."""
    innermost = next((x.guard for x in reversed(_opened.get()) if not x.ended), None)
    return None if innermost is None or innermost._mode == "allow" else innermost


class copy_guard(ContextDecorator):
    """Forbid, or report, conversions that would move bytes, inside a ``with`` block (or a decorated function).

    Parameters
    ----------
    mode : "error", "warn" or "allow"
        "error" raises before anything moves, except for what an object of another library does to export itself: one
        with `__array__` may read a whole file first. "warn" warns at the caller's line; "allow" opens a gap in an outer
        guard.
    min_bytes : int
        Smaller moves pass: the bytes of the selected kinds, summed per array.
    kinds : iterable of "h2h", "h2d", "d2h", "d2d", optional
        The moves that count: host to host, to the device, from it, on it. Default: all.

    Returns
    -------
    context manager
        The innermost one decides. It holds for this thread and this async task; tasks and `prefetch` workers started
        inside inherit it, and keep it when they outlive the block; plain threads and child processes do not:
        `asyncio.to_thread` does, ``loop.run_in_executor`` does not. (Where `sys.flags.thread_inherit_context` is set,
        as from Python 3.14 on without the GIL, every thread that is started inside inherits it.) In a generator, a
        block holds for the caller as well until the generator has left it.

    Raises
    ------
    CopyRequiredError
        From the conversion, with mode "error": ``error.plan`` says which bytes and why.
    ValueError, TypeError
        An unknown mode or kind, a negative or non-integer `min_bytes`.
    RuntimeError
        The guard is left without having been entered, as by ``ExitStack.push`` instead of ``enter_context``.

    Cost
    ----
    Inside: the plan of every conversion is made in full. Outside: one comparison a call.

    Examples
    --------
    >>> import numpy as np, tensorbridge as tb
    >>> with tb.copy_guard("error"):
    ...     t = tb.to_torch(np.zeros(3))
    ...     tb.to_torch(np.zeros(3)[::-1])
    Traceback (most recent call last):
    ...
    tensorbridge.CopyRequiredError: to_torch: numpy float64 (3,) on cpu would move 24 B, and copy_guard("error") forbids it.
      pack   24 B   torch has no negative strides
      share   0 B   torch.from_numpy: the same memory
    Allow it with copy_guard("allow") around this call, or share x, the argument, as it lies, values in opposite order: to_torch(x[::-1]).
    """  # noqa: E501

    def __init__(self, mode: Mode, *, min_bytes: int = 0, kinds: Kind | Iterable[Kind] | None = None) -> None:
        if mode not in MODES:
            raise ValueError(f'copy_guard({mode!r}): choose "error", "warn" or "allow"{nearest(mode, MODES)}')
        if isinstance(min_bytes, bool) or not isinstance(min_bytes, int):
            raise TypeError(f"copy_guard(min_bytes={min_bytes!r}): a number of bytes, as an int")
        if min_bytes < 0:
            raise ValueError(f"copy_guard(min_bytes={min_bytes}): a number of bytes from 0")
        chosen: frozenset[str] = frozenset([kinds] if isinstance(kinds, str) else KINDS if kinds is None else kinds)
        if not chosen <= set(KINDS):
            raise ValueError(f"copy_guard(kinds={sorted(chosen - set(KINDS))}): choose from {', '.join(KINDS)}")
        if not chosen:
            raise ValueError('copy_guard(kinds=[]): guards nothing; leave kinds out for all, or say mode="allow"')
        self._mode, self._min_bytes, self._kinds = mode, min_bytes, chosen
        # Blocks of any thread or task that have not ended. No list: without the GIL, one that another thread takes
        # something out of is not found whole.
        self._open: dict[_Opened, None] = {}
        self._used = False

    _used = True  # where it could not be made

    def __del__(self) -> None:
        if not (self._used or sys.is_finalizing()):
            warn(f"{self!r} was never opened, and guarded nothing; open it by a with block", RuntimeWarning)

    def __call__(self, function: _F) -> _F:
        self._used = True
        if inspect.isclass(function):
            raise TypeError(
                f"copy_guard as a decorator of a class would guard only the making of {function.__name__}, not its "
                "methods; decorate those"
            )
        lasting = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
        if any(is_one(function) for is_one in lasting):
            name = getattr(function, "__name__", "it")
            raise TypeError(
                f"copy_guard as a decorator would guard only the call that makes the coroutine or generator {name}, "
                "not its body; open it with a with block inside"
            )
        return super().__call__(function)

    def __repr__(self) -> str:
        chosen = f", kinds={sorted(self._kinds)}" if self._kinds != set(KINDS) else ""
        return f"copy_guard({self._mode!r}{f', min_bytes={self._min_bytes}' if self._min_bytes else ''}{chosen})"

    @eager
    def __enter__(self) -> copy_guard:
        self._used, opened = True, _Opened(self)
        self._open[opened] = None
        _change(opened, enter=True)
        return self

    @eager
    def __exit__(self, *exc: object) -> None:
        mine = next((x for x in reversed(_opened.get()) if x in self._open), None)
        if mine is not None:  # the last of its own, even where blocks end out of turn, as those of generators may
            del self._open[mine]
            _change(mine, enter=False)
        elif self._open:  # of a generator that ends elsewhere
            self._open.popitem()[0].end()
        else:
            raise RuntimeError(f"{self!r}: left without having been entered; open it by a with block or enter_context")


@_forks.in_child
def _forked() -> None:
    """A child that is spawned inherits no guard and is seen by no trace, so neither is one that is forked."""
    _opened.set(())
    watching.clear()


def guarded_kinds() -> frozenset[str]:
    """The kinds of moves for which this context's guard has a limit."""
    guard = _guard()
    return frozenset() if guard is None else guard._kinds


def is_traced() -> bool:
    return bool(_traces())


def allow(plan: Plan, asked: str) -> None:
    """Raise or warn if this context's guard forbids what the plan would move."""
    guard = _guard()
    if guard is None:
        return
    nbytes = sum(step.nbytes for step in plan.steps if step.kind in guard._kinds)
    if not nbytes or nbytes < guard._min_bytes:
        return
    first = f'{asked}: {plan.source} would move {bytes_text(nbytes)}, and copy_guard("error") forbids it.'
    cure = cure_of([s for s in plan.steps if s.kind in guard._kinds])
    if guard._mode == "warn":
        why = next(s.why for s in plan.steps if s.kind in guard._kinds)
        text = f"{asked}: {plan.source} moves {bytes_text(nbytes)}: {why}"
        text += f" (avoid it: {cure})" if cure else ""
        warn(text, CopyWarning)
        return
    last = 'Allow it with copy_guard("allow") around this call' + (f", or {cure}." if cure else ".")
    error = CopyRequiredError("\n".join([first, *step_lines(plan.steps), last]))
    error.plan = plan
    raise error


def warn(text: str, category: type[Warning]) -> None:
    """Warn at the caller's line."""
    where, level = _caller()
    if level:
        warnings.warn(text, category, stacklevel=level)
    else:
        path, _, line = where.rpartition(":")
        warnings.warn_explicit(text, category, path, int(line), registry=_said.setdefault(path, {}))


_HERE = os.path.dirname(__file__) + os.sep  # as frames have it, by way of ".." or not

# Set in a worker's context: the ``file:line`` that started it, for what is done where no line of the caller's led to.
called_from: ContextVar[str] = ContextVar("tensorbridge_called_from")
# What workers have warned of, by file: as the registry of a module, so that Python's filters say a thing once too.
_said: dict[str, dict[str | tuple[str, type[Warning], int], int]] = {}


def _caller() -> tuple[str, int]:
    """The first line that led here, as ``file:line``, of code that is not ours nor torch's loader's; and how far up.
    In a worker of ours where there is none, the line that started it, and 0.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _is_ours(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    started_by = called_from.get("") if frame.f_code.co_filename in _THREADS else ""
    return (started_by, 0) if started_by else (f"{frame.f_code.co_filename}:{frame.f_lineno}", level)


_THREADING = threading.Thread.run.__code__.co_filename
_THREADS = {_THREADING, os.path.join(os.path.dirname(_THREADING), "concurrent", "futures", "thread.py")}
_CONTEXTLIB = contextmanager.__code__.co_filename
_COMMANDS = _HERE + "_commands" + os.sep  # they use the package as anybody does


_LOADER = os.sep.join(("", "torch", "utils", "data", ""))  # calls `collate` for whoever asks for a batch


def _is_ours(filename: str) -> bool:
    ours = filename.startswith(_HERE) and not filename.startswith(_COMMANDS)
    return ours or filename == _CONTEXTLIB or _LOADER in filename


# -- The trace


def _traces() -> list[Trace]:
    return [seen for seen in list(watching.values()) if seen is not None]


@eager
def trace() -> AbstractContextManager[Trace]:
    """Record every conversion that tensorbridge performs in this process while the block is open.

    Returns
    -------
    context manager yielding Trace
        ``events``, ``totals``, ``report()``, ``save(path)``. Traces nest: each sees all. Conversions made by hand
        (``t.numpy()``), and those of child processes, are not seen; a conversion that failed is no event.

    Cost
    ----
    Inside: a plan and a look at the stack for every conversion. Outside: one comparison a call.

    Examples
    --------
    >>> import numpy as np, tensorbridge as tb
    >>> with tb.trace() as seen:
    ...     t = tb.to_torch(np.zeros(3))
    ...     t = tb.to_torch(np.zeros(3)[::-1])
    >>> [(event.kind, event.nbytes) for event in seen.events]
    [('', 0), ('h2h', 24)]
    """
    return Reentrant(_traced, "trace() as seen")


@contextmanager
def _traced() -> Iterator[Trace]:
    seen = Trace()
    watching[id(seen)] = seen
    try:
        yield seen
    finally:
        watching.pop(id(seen), None)


def perform(plan: Plan, asked: str, run: Callable[[], Any]) -> Any:
    """Run a conversion under this context's guard and every open trace."""
    allow(plan, asked)
    traces = _traces()
    if not traces:
        return run()
    began = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - began
    kinds = dict.fromkeys(step.kind for step in plan.steps if step.kind)
    made = plan.target
    event = Event(
        str(plan.source),
        f"{made.framework} {made.dtype} on {made.device}",
        plan.steps,
        plan.bytes_moved,
        seconds,
        "+".join(kinds),
        _caller()[0],
        threading.current_thread().name,
    )
    for seen in traces:
        seen.events.append(event._replace(start=began - seen._began))
    return result
