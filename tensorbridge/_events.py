"""What a trace has recorded: one event a conversion, their totals, a table for a person, a file for Perfetto."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from typing import Any, NamedTuple

from tensorbridge._eager import eager
from tensorbridge._step import Step, bytes_text


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
    """The sums of a `Trace`."""

    conversions: int
    shared: int  # of them, without moving a byte
    nbytes: int
    seconds: float
    by_kind: dict[str, int]  # bytes, by "h2h", "h2d", "d2h", "d2d"


class Trace:
    """The conversions performed while a `trace` block was open, from every thread of this process.

    ``events`` in the order in which they ended; ``totals``; ``report()`` for a person; ``save(path)`` for Perfetto.
    It stays readable after the block.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._began = time.perf_counter()

    @eager
    def __repr__(self) -> str:
        return f"<Trace: {_said(self.totals)}, {bytes_text(self.totals.nbytes)} moved; report() is the table>"

    @property
    @eager
    def totals(self) -> Totals:
        """How many conversions there were, how many shared, bytes and seconds in all."""
        events = list(self.events)
        by_kind: dict[str, int] = defaultdict(int)
        for event in events:
            for step in event.steps:
                if step.kind:
                    by_kind[step.kind] += step.nbytes
        shared = sum(not event.nbytes for event in events)
        seconds = sum(event.seconds for event in events)
        return Totals(len(events), shared, sum(event.nbytes for event in events), seconds, dict(by_kind))

    @eager
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
            shared = sum(not any(step.kind for step in event.steps) for event in events)
            some = [f"{shared} of {len(events)} shared"] if 0 < shared < len(events) else []
            rows.append(
                (
                    bytes_text(sum(event.nbytes for event in events)),
                    str(len(events)),
                    f"{seconds * 1e3:.2f}",
                    where,
                    route,
                    "; ".join([*some, *reasons]) or "shared",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = []
        for *cells, because in rows:
            numbers = [cell.rjust(width) for cell, width in zip(cells[:3], widths[:3], strict=True)]
            words = [cell.ljust(width) for cell, width in zip(cells[3:], widths[3:], strict=True)]
            lines.append("  ".join([*numbers, *words, because]))
        t = self.totals
        kinds = ", ".join(f"{kind} {bytes_text(n)}" for kind, n in sorted(t.by_kind.items()))
        end = f"{_said(t)}; {bytes_text(t.nbytes)} moved{f' ({kinds})' if kinds else ''} in {t.seconds * 1e3:.2f} ms."
        note = "Conversions by tensorbridge in this process; those made by hand and in child processes are not seen."
        return "\n".join([*lines, end, note] if len(rows) > 1 else ["No conversion was performed.", note])

    @eager
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the events as Chrome trace JSON, which Perfetto and chrome://tracing open.

        Raises
        ------
        OSError
            `path` cannot be written; the events are kept.
        """
        import json  # only needed here

        events = list(self.events)  # other threads may still add to them
        threads = {name: number for number, name in enumerate(dict.fromkeys(e.thread for e in events), 1)}
        pid = os.getpid()
        records: list[dict[str, Any]] = [
            {"name": "thread_name", "ph": "M", "pid": pid, "tid": number, "args": {"name": name}}
            for name, number in threads.items()
        ]
        for event in events:
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
            text = f"the trace cannot be written ({error.strerror}); its {len(events)} events are kept"
            raise OSError(error.errno, text, os.fspath(path)) from error


def _said(totals: Totals) -> str:
    return f"{totals.conversions} conversion{'s' * (totals.conversions != 1)}, {totals.shared} of them shared"


def _short(where: str) -> str:
    path, _, line = where.rpartition(":")
    try:
        near = os.path.relpath(path)
    except (ValueError, OSError):  # another drive; a working directory that is gone
        near = path
    return f"{path if near.startswith('..') else near}:{line}"
