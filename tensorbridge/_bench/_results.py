"""What was measured, as a record that is written to and read from results.json, and what follows from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tensorbridge._bench._measure import Timing, spread
from tensorbridge._bench._rows import Goal, Way

SCHEMA = 1


class Result(NamedTuple):
    """One row: timed, or the reason why not."""

    question: str
    title: str
    device: str
    nbytes: int = 0
    missing: str = ""  # "not installed" ...; empty if it was timed
    wrong: bool = False  # the missing row is an error of the program, not of the machine
    timings: tuple[Timing, ...] = ()
    goals: tuple[Goal, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.question} · {self.title}"

    def timing(self, name: str) -> Timing:
        return next(t for t in self.timings if t.way.name == name)

    def ours(self) -> list[Timing]:
        return [t for t in self.timings if t.way.role == "bridge"]


class Run(NamedTuple):
    """One run of the benchmark."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    results: tuple[Result, ...]
    stopped: str = ""  # why it ended early; empty if complete


class Verdict(NamedTuple):
    """What a goal asks and what was measured: the median over rounds, each round compared with itself."""

    goal: Goal
    theirs: str
    value: float
    low: float
    high: float
    met: bool
    limit: float | None  # the same figure for the limit in our place
    kept: float | None = None  # and for a line by hand that keeps our promises


def verdict(result: Result, goal: Goal) -> Verdict:
    pick = max if goal.slowest else min
    theirs = pick((result.timing(name) for name in goal.against), key=lambda t: median(t.ns))
    values = compared(goal.sense, result.timing(goal.way), theirs)
    value = median(values)
    low, high = spread(values)
    limits = [t for t in result.timings if t.way.role == "limit" and t.way.state == result.timing(goal.way).way.state]
    limits = limits or [t for t in result.timings if t.way.role == "limit"]
    limit = None
    if limits and theirs not in limits and goal.sense != "extra" and goal.name != "floor":
        limit = median(compared(goal.sense, min(limits, key=lambda t: median(t.ns)), theirs))
    kept = [median(compared(goal.sense, t, theirs)) for t in result.timings if t.way.role == "promises"]
    return Verdict(goal, theirs.way.name, value, low, high, reaches(goal, value), limit, *kept[:1])


def compared(sense: str, ours: Timing, theirs: Timing) -> list[float]:
    pairs = zip(ours.ns, theirs.ns, strict=True)
    if sense == "cost":
        return [a / b for a, b in pairs]
    if sense == "speed":
        return [b / a for a, b in pairs]
    return [a - b for a, b in pairs]


def reaches(goal: Goal, value: float) -> bool:
    return value >= goal.bound if goal.sense == "speed" else value <= goal.bound


def verdicts(run: Run) -> Iterator[tuple[Result, Verdict]]:
    for result in run.results:
        if not result.missing:
            for goal in result.goals:
                yield result, verdict(result, goal)


# -- The file


def dump(run: Run, path: Path) -> None:
    """Write the whole file, or leave the old one as it is."""
    head = json.dumps({"schema": SCHEMA, **run._asdict(), "results": []}, indent=1, ensure_ascii=False)
    rows = ",\n".join("  " + json.dumps(_plain(result), ensure_ascii=False) for result in run.results)
    text = head.replace('"results": []', f'"results": [\n{rows}\n ]' if rows else '"results": []', 1)
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def _plain(result: Result) -> dict[str, Any]:
    ways = [
        {
            "name": t.way.name,
            "code": t.way.code,
            "role": t.way.role,
            "state": t.way.state,
            "unlike": t.way.unlike,
            "calls": t.calls,
            "median_ns": _short(median(t.ns)),
            "min_ns": _short(min(t.ns)),
            "ns": [_short(ns) for ns in t.ns],
        }
        for t in result.timings
    ]
    return {**result._asdict(), "timings": ways, "goals": [goal._asdict() for goal in result.goals]}


def _short(ns: float) -> float:
    return float(f"{ns:.5g}")


def load(path: Path) -> Run:
    """Raises OSError if the file cannot be read, ValueError if it is not a result of this benchmark."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if plain["schema"] != SCHEMA:
            raise ValueError(f"{path}: written by another version of this benchmark (schema {plain['schema']})")
        results = tuple(_result(r) for r in plain["results"])
        return Run(plain["machine"], plain["settings"], results, plain["stopped"])
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a results.json of this benchmark ({error!r})") from error


def _result(plain: dict[str, Any]) -> Result:
    timings = tuple(
        Timing(Way(w["name"], w["code"], w["role"], w["state"], unlike=w.get("unlike", "")), w["calls"], tuple(w["ns"]))
        for w in plain["timings"]
    )
    goals = tuple(Goal(**{**goal, "against": tuple(goal["against"])}) for goal in plain["goals"])
    return Result(**{**plain, "timings": timings, "goals": goals})
