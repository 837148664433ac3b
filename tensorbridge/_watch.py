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
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ContextDecorator, contextmanager
from contextvars import ContextVar, Token
from typing import Any, Literal, NamedTuple, TypeVar

from tensorbridge._eager import eager
from tensorbridge._errors import CopyRequiredError, CopyWarning
from tensorbridge._step import Plan, Step, bytes_text, step_lines

_F = TypeVar("_F", bound=Callable[..., Any])
KINDS = ("h2h", "h2d", "d2h", "d2d")

watching = 0  # open guards and traces: what a conversion asks first, and all that it pays when there is none
_lock = threading.Lock()


def _watch(more: int) -> None:
    global watching
    with _lock:
        watching += more


# -- The guard


class _Policy(NamedTuple):
    mode: str
    min_bytes: int
    kinds: frozenset[str]


_policy: ContextVar[_Policy | None] = ContextVar("tensorbridge_copy_guard", default=None)


class copy_guard(ContextDecorator):
    """Forbid, or report, conversions that would move bytes, inside a ``with`` block (or a decorated function).

    Parameters
    ----------
    mode : "error", "warn" or "allow"
        "error" raises before anything moves; "warn" warns at the caller's line; "allow" opens a gap in an outer guard.
    min_bytes : int
        Smaller moves pass: the bytes of the selected kinds, summed per array.
    kinds : iterable of "h2h", "h2d", "d2h", "d2d", optional
        The moves that count: host to host, to the device, from it, on it. Default: all.

    Returns
    -------
    context manager
        The innermost one decides. It holds for this thread and this async task; tasks and `prefetch` workers started
        inside inherit it, plain threads and child processes do not.

    Raises
    ------
    CopyRequiredError
        From the conversion, with mode "error": ``error.plan`` says which bytes and why.
    ValueError, TypeError
        An unknown mode or kind, a negative or non-integer `min_bytes`.

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
    Allow it with copy_guard("allow") around this call, or reverse on the torch side: to_torch(a[::-1]).flip(0).
    """  # noqa: E501

    def __init__(
        self, mode: Literal["error", "warn", "allow"], *, min_bytes: int = 0, kinds: Iterable[str] | None = None
    ) -> None:
        if mode not in ("error", "warn", "allow"):
            raise ValueError(f'copy_guard({mode!r}): choose "error", "warn" or "allow"')
        if isinstance(min_bytes, bool) or not isinstance(min_bytes, int):
            raise TypeError(f"copy_guard(min_bytes={min_bytes!r}): a number of bytes, as an int")
        if min_bytes < 0:
            raise ValueError(f"copy_guard(min_bytes={min_bytes}): a number of bytes from 0")
        chosen = frozenset([kinds] if isinstance(kinds, str) else KINDS if kinds is None else kinds)
        if not chosen <= set(KINDS):
            raise ValueError(f"copy_guard(kinds={sorted(chosen - set(KINDS))}): choose from {', '.join(KINDS)}")
        self._policy = _Policy(mode, min_bytes, chosen)
        self._tokens: list[Token[_Policy | None]] = []

    def __call__(self, function: _F) -> _F:
        if (
            inspect.iscoroutinefunction(function)
            or inspect.isgeneratorfunction(function)
            or inspect.isasyncgenfunction(function)
        ):
            name = getattr(function, "__name__", "it")
            raise TypeError(
                f"copy_guard as a decorator would guard only the call that makes the coroutine or generator {name}, "
                "not its body; open it with a with block inside"
            )
        return super().__call__(function)

    def _recreate_cm(self) -> copy_guard:
        return copy_guard(self._policy.mode, min_bytes=self._policy.min_bytes, kinds=self._policy.kinds)  # type: ignore[arg-type]

    @eager
    def __enter__(self) -> copy_guard:
        self._tokens.append(_policy.set(self._policy))
        _watch(+1)
        return self

    @eager
    def __exit__(self, *exc: object) -> None:
        _watch(-1)
        _policy.reset(self._tokens.pop())


@contextmanager
def inherited() -> Iterator[None]:
    """Keep a guard of this context in force for a worker that outlives the ``with`` block it was started in."""
    more = 1 if _policy.get() is not None else 0
    _watch(+more)
    try:
        yield
    finally:
        _watch(-more)


def allow(plan: Plan, asked: str) -> None:
    """Raise or warn if this context's guard forbids what the plan would move."""
    policy = _policy.get()
    if policy is None or policy.mode == "allow":
        return
    nbytes = sum(step.nbytes for step in plan.steps if step.kind in policy.kinds)
    if not nbytes or nbytes < policy.min_bytes:
        return
    first = f'{asked}: {plan.source} would move {bytes_text(nbytes)}, and copy_guard("error") forbids it.'
    cure = next((s.cure for s in plan.steps if s.kind in policy.kinds and s.cure), "")
    if policy.mode == "warn":
        why = next(s.why for s in plan.steps if s.kind in policy.kinds)
        text = f"{asked}: {plan.source} moves {bytes_text(nbytes)}: {why}"
        text += f" (avoid it: {cure})" if cure else ""
        where = called_from.get()
        if where is None:
            warnings.warn(text, CopyWarning, stacklevel=_caller()[1])
        else:
            path, _, line = where.rpartition(":")
            warnings.warn_explicit(text, CopyWarning, path, int(line))
        return
    last = 'Allow it with copy_guard("allow") around this call' + (f", or {cure}." if cure else ".")
    error = CopyRequiredError("\n".join([first, *step_lines(plan.steps), last]))
    error.plan = plan
    raise error


_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


# Set in a worker's context: the ``file:line`` that started it, as no line of the caller's is on its stack.
called_from: ContextVar[str | None] = ContextVar("tensorbridge_called_from", default=None)


def _caller() -> tuple[str, int]:
    """The first line outside this package that led here, as ``file:line``, and how far up the stack it is."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _is_ours(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    return f"{frame.f_code.co_filename}:{frame.f_lineno}", level


_CONTEXTLIB = contextmanager.__code__.co_filename
_SCRIPTS = frozenset({_HERE + "_demo.py", _HERE + "_why_detach.py"})  # they use the package as anybody does


def _is_ours(filename: str) -> bool:
    return (filename.startswith(_HERE) and filename not in _SCRIPTS) or filename == _CONTEXTLIB


# -- The trace


class Event(NamedTuple):
    """One conversion that was performed."""

    source: str  # "numpy float64 (3,) on cpu"
    target: str  # "torch float64 on cpu"
    steps: tuple[Step, ...]
    nbytes: int
    seconds: float  # of the host; device work that nobody waits for is not in it
    kind: str  # "h2h", "h2d+d2d" ...; "" when no byte moved
    where: str  # file:line of the caller
    thread: str
    start: float = 0.0  # seconds after the trace began


class Totals(NamedTuple):
    conversions: int
    shared: int  # of them, without moving a byte
    nbytes: int
    seconds: float
    by_kind: dict[str, int]  # bytes


class Trace:
    """The conversions performed while a `trace` block was open, from every thread of this process.

    ``events`` in the order in which they ended; ``totals``; ``report()`` for a person; ``save(path)`` for Perfetto.
    It stays readable after the block.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._began = time.perf_counter()

    @property
    def totals(self) -> Totals:
        events = list(self.events)
        by_kind: dict[str, int] = defaultdict(int)
        for event in events:
            for step in event.steps:
                if step.kind:
                    by_kind[step.kind] += step.nbytes
        shared = sum(not event.nbytes for event in events)
        seconds = sum(event.seconds for event in events)
        return Totals(len(events), shared, sum(event.nbytes for event in events), seconds, dict(by_kind))

    def report(self) -> str:
        """A table: one row a call site and kind of crossing, most bytes first, with the reason of each copy."""
        groups: dict[tuple[str, str], list[Event]] = defaultdict(list)
        for event in list(self.events):
            route = f"{event.source.split()[0]} -> {event.target.split()[0]}"
            groups[_short(event.where), route].append(event)
        rows = [("bytes", "calls", "ms", "where", "crossing", "because")]
        for (where, route), events in sorted(groups.items(), key=lambda g: -sum(e.nbytes for e in g[1])):
            reasons = {f"{step.op}: {step.why}": None for event in events for step in event.steps if step.kind}
            seconds = sum(event.seconds for event in events)
            rows.append(
                (
                    bytes_text(sum(event.nbytes for event in events)),
                    str(len(events)),
                    f"{seconds * 1e3:.2f}",
                    where,
                    route,
                    "; ".join(reasons) or "shared",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                [
                    cell.rjust(w) if i < 3 else cell.ljust(w)
                    for i, (cell, w) in enumerate(zip(row, widths, strict=False))
                ]
                + [row[5]]
            )
            for row in rows
        ]
        t = self.totals
        kinds = ", ".join(f"{kind} {bytes_text(n)}" for kind, n in sorted(t.by_kind.items()))
        end = (
            f"{t.conversions} conversions, {t.shared} of them shared; {bytes_text(t.nbytes)} moved"
            f"{f' ({kinds})' if kinds else ''} in {t.seconds * 1e3:.2f} ms."
        )
        note = "Conversions by tensorbridge in this process; those made by hand and in child processes are not seen."
        return "\n".join([*lines, end, note] if len(rows) > 1 else ["No conversion was performed.", note])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the events as Chrome trace JSON, which Perfetto and chrome://tracing open.

        Raises
        ------
        OSError
            `path` cannot be written; the events are kept.
        """
        import json  # only needed here

        threads = {name: number for number, name in enumerate(dict.fromkeys(e.thread for e in self.events), 1)}
        pid = os.getpid()
        records: list[dict[str, Any]] = [
            {"name": "thread_name", "ph": "M", "pid": pid, "tid": number, "args": {"name": name}}
            for name, number in threads.items()
        ]
        for event in self.events:
            steps = [f"{s.op} {bytes_text(s.nbytes)}: {s.why}" for s in event.steps]
            records.append(
                {
                    "name": f"{event.source.split()[0]} -> {event.target.split()[0]}",
                    "cat": event.kind or "shared",
                    "ph": "X",
                    "ts": event.start * 1e6,
                    "dur": event.seconds * 1e6,
                    "pid": pid,
                    "tid": threads[event.thread],
                    "args": {
                        "source": event.source,
                        "target": event.target,
                        "bytes": event.nbytes,
                        "where": event.where,
                        "steps": steps,
                    },
                }
            )
        try:
            with open(path, "w", encoding="utf-8") as file:
                json.dump({"traceEvents": records, "displayTimeUnit": "ns"}, file)
        except OSError as error:
            text = f"the trace cannot be written ({error.strerror}); its {len(self.events)} events are kept"
            raise OSError(error.errno, text, os.fspath(path)) from error


def _short(where: str) -> str:
    path, _, line = where.rpartition(":")
    try:
        near = os.path.relpath(path)
    except ValueError:  # another drive
        near = path
    return f"{path if near.startswith('..') else near}:{line}"


_traces: tuple[Trace, ...] = ()


@contextmanager
def trace() -> Iterator[Trace]:
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
    global _traces
    seen = Trace()
    with _lock:
        _traces = (*_traces, seen)
    _watch(+1)
    try:
        yield seen
    finally:
        _watch(-1)
        with _lock:
            _traces = tuple(t for t in _traces if t is not seen)


def perform(plan: Plan, asked: str, run: Callable[[], Any]) -> Any:
    """Run a conversion under this context's guard and every open trace."""
    allow(plan, asked)
    traces = _traces
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
        called_from.get() or _caller()[0],
        threading.current_thread().name,
    )
    for seen in traces:
        seen.events.append(event._replace(start=began - seen._began))
    return result
