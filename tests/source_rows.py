"""The rows of docs/sources.md, and what holds one: the plan, the memory, and writes in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import tensorbridge as tb

TEXT = (Path(__file__).parent.parent / "docs" / "sources.md").read_text(encoding="utf-8")
TABLE = TEXT.split("<!-- sources: begin -->\n")[1].split("<!-- sources: end -->")[0]
ROWS = {
    row: (to_numpy, to_torch)
    for row, to_numpy, to_torch, _ in re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+) \|$", TABLE, re.MULTILINE)[1:]
}
RECIPES = dict(re.findall(r"<!-- runs with (\w+) -->\n```python\n(.*?)```", TEXT, re.DOTALL))
NEW, WRITTEN = 7, 9  # what is written to a result, and to a source; no source holds either


class Source(NamedTuple):
    """How it is made, in a folder of its own, and how its owner writes WRITTEN to a part of it, where he can."""

    make: Callable[[Path], Any]
    write: Callable[[Any], Any] | None = None


def put(x: Any) -> None:
    x[0] = WRITTEN


def cell(x: Any, to: str) -> str:
    """What the page says of `x`, by its plan."""
    plan = tb.plan(x, to)
    moves = [step.op for step in plan.steps if step.kind]
    assert plan.zero_copy == (not moves)
    words = "copy: " + ", ".join(moves) if moves != ["copy"] else "copy"
    frozen = to == "numpy" and not tb.to_numpy(x).flags.writeable
    return ("**shared**" if plan.zero_copy else words) + (", read-only" if frozen else "")


def assert_row_is_true(row: str, source: Source, folder: Path) -> None:
    x = source.make(folder)
    for to, said in zip(("numpy", "torch"), ROWS[row], strict=True):
        convert = {"numpy": tb.to_numpy, "torch": tb.to_torch}[to]
        if said == "refused":
            for ask in (convert, lambda x, to=to: tb.plan(x, to)):
                with pytest.raises(tb.UnsupportedArrayError):
                    ask(x)
            continue
        assert cell(x, to) == said
        shared = said.startswith("**shared**")
        with tb.trace() as seen:
            result = convert(x)
        assert seen.totals.nbytes == tb.plan(x, to).bytes_moved
        seen_by_numpy, again = np.asarray(result), np.asarray(convert(x))
        assert np.shares_memory(seen_by_numpy, again) == shared
        assert tb.shares_memory(result, x) == shared
        if seen_by_numpy.flags.writeable:
            before = np.array(x)
            seen_by_numpy[...] = NEW
            assert np.array_equal(np.array(x), np.full_like(before, NEW) if shared else before)
        if source.write is not None:
            source.write(x)
            assert (seen_by_numpy == WRITTEN).any() == shared
