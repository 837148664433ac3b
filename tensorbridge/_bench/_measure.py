"""The stopwatch: ways of doing one thing, timed in interleaved rounds whose order rotates, and checked.

A case is visited several times, far apart and with new arrays: a machine changes its pace, and where the system
puts an array matters. What a single visit calls its scatter knows of neither.

A way is a line of code, as a user would write it; the line that is shown is the line that is timed. One call may be too
short for a clock, so a round repeats it. Ways whose result is fresh memory keep every result of a round alive: one that
is dropped comes back from the allocator as warm memory, and "fresh" would be untrue.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tensorbridge._bench import _malloc
from tensorbridge._bench._rows import FRESH, Case, Way


class Settings(NamedTuple):
    """How long to measure. Never fewer than 7 rounds."""

    rounds: int = 21  # over all visits
    visits: int = 3
    round_s: float = 0.01  # a round repeats a call until it takes this long
    case_s: float = 6.0  # fewer rounds, but never fewer than 7, where all of them would take longer


QUICK = Settings(rounds=12, round_s=0.002, case_s=1.5)
FEWEST = 7


class Timing(NamedTuple):
    """One way, timed."""

    way: Way
    calls: int  # in a round
    ns: tuple[float, ...]  # per call, one a round; round i of every way of a case ran next to each other


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The range of the rounds without the lowest and the highest seventh: one in seven is left out on each side."""
    ordered = sorted(values)
    cut = len(ordered) // FEWEST
    return ordered[cut], ordered[-1 - cut]


_TEMPLATE = """
def timed(_count, _clock, _sync, _keep):
    _each = _repeat(None, _count)
    _sync()
    _begin = _clock()
    for _ in _each:
        {line}
    _sync()
    return _clock() - _begin
"""


def timer(way: Way, names: dict[str, Any]) -> Callable[..., int]:
    """A function that runs the line `count` times and returns the ns between its two looks at the clock."""
    if way.sample is not None:
        sample = way.sample
        return lambda count, clock, sync, keep: sum(sample() for _ in range(count))
    keeps = way.state == FRESH
    space = {**names, "_repeat": itertools.repeat}
    exec(compile(_TEMPLATE.format(line=f"_keep({way.code})" if keeps else way.code), f"<{way.name}>", "exec"), space)
    timed: Callable[..., int] = space["timed"]
    return timed


class _Rounds:
    """Runs a way as often as a round repeats it, and keeps the results alive where they are to be fresh."""

    def __init__(self, case: Case, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._sync = case.sync or (lambda: None)
        self._timed = {way.name: timer(way, case.names) for way in case.ways}
        self._kept: list[Any] = []

    def run(self, way: Way, count: int) -> int:
        if way.state == FRESH:
            _malloc.give_fresh()
        else:
            _malloc.give_reused()
        if way.before is not None:
            way.before()
        ns = self._timed[way.name](count, self._clock, self._sync, self._kept.append)
        if way.state == FRESH:
            del self._kept[:-1]
            _malloc.release()
        return max(ns, 1)

    def last(self) -> Any:
        return self._kept[-1]

    def end(self) -> None:
        self._kept.clear()
        _malloc.give_reused()
        _malloc.release()


def measure(
    case: Case,
    settings: Settings,
    before: Sequence[Timing] = (),
    *,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> list[Timing]:
    """Check what every way of a case makes, then time them round by round: one visit, added to those `before` it.

    Raises
    ------
    WrongResult
        The case's own check did not hold.
    """
    with case.around():
        check(case)
        return _measured(case, settings, before, clock)


def check(case: Case) -> None:
    """Run every way once and assert what it made."""
    for way in case.ways:
        if way.before is not None:
            way.before()
        if way.sample is None:
            case.check(way, eval(way.code, dict(case.names)))


def _measured(case: Case, settings: Settings, before: Sequence[Timing], clock: Callable[[], int]) -> list[Timing]:
    ways = case.ways
    times: list[list[float]] = [list(t.ns) for t in before] or [[] for _ in ways]
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    rounds = _Rounds(case, clock)
    try:
        if before:
            calls = [(t.calls, rounds.run(way, t.calls)) for way, t in zip(ways, before, strict=True)]
        else:
            calls = [_calls(rounds, way, case.nbytes, settings) for way in ways]
        for _ in range(_count(sum(ns for _, ns in calls), settings)):
            first = len(times[0]) % len(ways)
            for i in (*range(first, len(ways)), *range(first)):
                times[i].append(rounds.run(ways[i], calls[i][0]) / calls[i][0])
        fresh = [way for way in ways if way.state == FRESH]
        if len(fresh) == 1:  # the last result is one of those that were timed
            case.check(fresh[0], rounds.last())
    finally:
        rounds.end()
        if was_enabled:
            gc.enable()
    return [Timing(way, n, tuple(ns)) for way, (n, _), ns in zip(ways, calls, times, strict=True)]


def _calls(rounds: _Rounds, way: Way, nbytes: int, settings: Settings) -> tuple[int, int]:
    """How often a round repeats the call, and how long that takes; found by doing it, which is the warm-up too."""
    most = max(1, KEPT_A_ROUND // nbytes) if way.state == FRESH and nbytes else 1 << 20
    wanted = settings.round_s * 1e9
    rounds.run(way, 1)
    count = 1
    while True:
        ns = rounds.run(way, count)
        if ns >= wanted / 2 or count >= most:
            return count, ns
        count = min(most, max(count + 1, int(count * min(10.0, wanted / ns))))


KEPT_A_ROUND = 16 * 1024**2  # bytes of fresh results that a round makes, unless one alone is larger


def _count(one_round: int, settings: Settings) -> int:
    """How many rounds a visit: fewer where they are long, but never fewer than 7 in all."""
    rounds = max(FEWEST, min(settings.rounds, int(settings.case_s * 1e9 / one_round)))
    return -(-rounds // settings.visits)
