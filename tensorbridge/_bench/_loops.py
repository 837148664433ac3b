"""A loop over batches on the host: reading ahead by a thread, against reading and working in turn."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from tensorbridge._bench._rows import Case, Question, Row, Scope, Way, expect, random_array

BATCHES = 10
READING = 2e-3  # seconds a batch: a disk, a network, a decoder that lets go of Python's lock
SIDE = 512  # of the square matrix that is multiplied


def _read(matrix: Any) -> Iterator[dict[str, Any]]:
    for number in range(BATCHES):
        time.sleep(READING)
        yield {"x": matrix, "number": number}


def _work(batches: Iterable[Any]) -> tuple[float, int]:
    """What was computed, and how many batches came, in order."""
    total, seen = 0.0, 0
    for batch in batches:
        expect(batch["number"] == seen, f"batch {batch['number']} came as number {seen}")
        total += float((batch["x"] @ batch["x"]).sum())
        seen += 1
    return total, seen


def _drained(batches: Iterable[Any]) -> tuple[float, int]:
    return 0.0, sum(1 for _ in batches)


def _rows(scope: Scope) -> list[Row]:
    def build() -> Case:
        import tensorbridge as tb

        matrix = random_array("float32", SIDE, SIDE)
        expected = float((matrix @ matrix).sum()) * BATCHES

        def check(way: Way, result: tuple[float, int]) -> None:
            total, seen = result
            expect(seen == BATCHES, f"{way.name}: {seen} batches")
            if way.role != "limit":
                expect(abs(total - expected) <= 1e-3 * abs(expected), f"{way.name}: {total}, not {expected}")

        names = {"tb": tb, "read": lambda: _read(matrix), "work": _work, "drained": _drained}
        ways = (
            Way("tensorbridge", 'work(tb.prefetch(read(), device="cpu"))', "bridge", ""),
            Way("in turn", "work(map(tb.tree.to_torch, read()))", "baseline", ""),
            Way("the reading alone", "drained(read())", "limit", ""),
        )
        return Case(ways, names, check)

    return [Row(f"{BATCHES} batches, each 2 ms to read and a product of {SIDE} x {SIDE}", build)]


QUESTIONS = (
    Question(
        "prefetch",
        "Does prefetch hide the reading behind the work, on the host?",
        "A source that waits for its data, and work on each batch. The limit is the reading alone: what a loop takes "
        "whose work is free.",
        _rows,
    ),
)
