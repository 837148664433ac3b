"""Large copies on the host, against the speed of memory; and what pages and threads make of one."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from tensorbridge._bench._rows import (
    FRESH,
    GIB,
    MIB,
    WARM,
    Case,
    Goal,
    Question,
    Row,
    Scope,
    Way,
    bytes_name,
    floor,
    result_is,
)
from tensorbridge._bench._sizes import copied, from_array, with_modules

# -- B1: large copies against the memory's own speed


def _large_rows(scope: Scope) -> list[Row]:
    sizes = (64 * MIB,) if scope.quick else (64 * MIB, 256 * MIB, GIB)

    def fresh(nbytes: int) -> Case:
        names = with_modules(from_array(nbytes // 4))
        ways = (
            Way("tensorbridge", "tb.to_torch(x, copy=True)", "bridge", FRESH),
            Way("torch.tensor", "torch.tensor(x)", "baseline", FRESH),
            Way("NumPy's copy", "x.copy()", "limit", FRESH),
        )
        goals = (Goal("B1", ("torch.tensor",), "speed", 3.0), Goal("B1", ("NumPy's copy",), "speed", 0.85))
        return Case(ways, names, result_is(names["x"]), nbytes, goals)

    def warm(nbytes: int) -> Case:
        names = with_modules(from_array(nbytes // 4))
        names |= {"memmove": ctypes.memmove, "to": names["w"].data_ptr(), "at": names["x"].ctypes.data, "n": nbytes}
        ways = (
            Way("tensorbridge", "tb.to_torch(x, out=w)", "bridge", WARM),
            Way("NumPy's copy", "np.copyto(wn, x)", "baseline", WARM),
            Way("torch's copy", "w.copy_(torch.from_numpy(x))", "baseline", WARM),
            Way("memcpy", "memmove(to, at, n)", "limit", WARM),
        )
        goals = (Goal("B1", ("memcpy",), "speed", 0.9), floor("NumPy's copy", "torch's copy"))
        return Case(ways, names, copied(names), nbytes, goals)

    return [
        row
        for n in sizes
        for row in (
            Row(f"to_torch(a, copy=True), {bytes_name(n)}", lambda n=n: fresh(n), 5 * n),  # type: ignore[misc]
            Row(f"to_torch(a, out=w), {bytes_name(n)}", lambda n=n: warm(n), 3 * n),  # type: ignore[misc]
        )
    ]


# -- What the memory's pages and torch's threads make of the same copy


def _pages_rows(scope: Scope) -> list[Row]:
    nbytes = 16 * MIB if scope.quick else 64 * MIB

    def build(threads: int | None) -> Case:
        names = with_modules(from_array(nbytes // 4))
        ways = (
            Way("tensorbridge", "tb.to_torch(x, copy=True)", "bridge", FRESH),
            Way("fresh from torch", "torch.from_numpy(x).clone()", "baseline", FRESH),
            Way("fresh from NumPy", "x.copy()", "baseline", FRESH),
            Way(
                "fresh from NumPy, torch's kernel", "torch.from_numpy(np.empty_like(x)).copy_(torch.from_numpy(x))",
                "baseline", FRESH,
            ),
            Way("in use, torch's kernel", "w.copy_(torch.from_numpy(x))", "limit", WARM),
            Way("in use, NumPy's kernel", "np.copyto(wn, x)", "limit", WARM),
        )  # fmt: skip
        return Case(ways, names, copied(names), nbytes, around=lambda: torch_threads(threads))

    size = bytes_name(nbytes)
    return [
        Row(f"copy of {size}, torch's own number of threads", lambda: build(None), 6 * nbytes),
        Row(f"copy of {size}, one torch thread", lambda: build(1), 6 * nbytes),
    ]


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


QUESTIONS = (
    Question(
        "B1",
        "Does a large copy run at the speed of memory?",
        "float32, one dimension. The limits: NumPy's copy into its own fresh pages; memcpy into memory in use.",
        _large_rows,
    ),
    Question(
        "pages",
        "Where does the time of a large copy go?",
        "One copy, into memory fresh from either allocator or in use, with torch's threads and with one.",
        _pages_rows,
    ),
)
