"""Large copies on the host, against the speed of memory; and what pages and threads make of one."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from tensorbridge._array import HUGE
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
    threads,
)
from tensorbridge._bench._sizes import copied, from_array, with_modules

# -- B1: large copies against the memory's own speed


def _large_rows(scope: Scope) -> list[Row]:
    sizes = (64 * MIB,) if scope.quick else (64 * MIB, 256 * MIB, GIB)

    def fresh(nbytes: int) -> Case:
        import torch

        names = with_modules(from_array(nbytes // 4))
        ways = (
            Way("tensorbridge", "tb.to_torch(x, copy=True)", "bridge", FRESH),
            Way("torch.tensor", "torch.tensor(x)", "baseline", FRESH),
            Way("NumPy's copy", "x.copy()", "baseline", FRESH),
            Way("torch's threads, NumPy's pages", "torch.from_numpy(np.empty_like(x)).copy_(v)", "limit", FRESH),
        )
        names["v"] = torch.from_numpy(names["x"])
        goals = (Goal("B1", ("torch.tensor",), "speed", 3.0), Goal("B1", ("NumPy's copy",), "speed", 0.85))
        return Case(ways, names, result_is(names["x"]), nbytes, goals)

    def warm(nbytes: int) -> Case:
        names = with_modules(from_array(nbytes // 4))
        names |= {"memmove": ctypes.memmove, "to": names["w"].data_ptr(), "at": names["x"].ctypes.data, "n": nbytes}
        ways = (
            Way("tensorbridge", "tb.to_torch(x, out=w)", "bridge", WARM),
            Way("NumPy's copy", "np.copyto(w.numpy(), x)", "baseline", WARM),
            Way("torch's copy", "w.copy_(torch.from_numpy(x))", "baseline", WARM, unlike=threads(nbytes)),
            Way("memcpy", "memmove(to, at, n)", "limit", WARM),
        )
        goals = (Goal("B1", ("memcpy",), "speed", 0.9), floor("NumPy's copy", "torch's copy"))
        return Case(ways, names, copied(names), nbytes, goals)

    return [
        row
        for n in sizes
        for row in (
            Row(f"to_torch(a, copy=True), {bytes_name(n)}", partial(fresh, n), 5 * n),
            Row(f"to_torch(a, out=w), {bytes_name(n)}", partial(warm, n), 3 * n),
        )
    ]


# -- What the memory's pages make of one copy, and what torch's threads do


def _pages_rows(scope: Scope) -> list[Row]:
    nbytes = 16 * MIB if scope.quick else 64 * MIB

    def build() -> Case:
        names = with_modules(from_array(nbytes // 4))
        ways = (
            Way("tensorbridge", "tb.to_torch(x, copy=True)", "bridge", FRESH),
            Way("fresh from torch", "torch.from_numpy(x).clone()", "baseline", FRESH),
            Way("fresh from NumPy", "x.copy()", "baseline", FRESH),
            Way("memory in use", "np.copyto(wn, x)", "limit", WARM),
        )
        return Case(ways, names, copied(names), nbytes)

    return [Row(f"copy of {bytes_name(nbytes)}", build, 6 * nbytes)]


def _threads_rows(scope: Scope) -> list[Row]:
    def build(busy: int, nbytes: int) -> Case:
        import torch

        names = with_modules(from_array(nbytes // 4))
        own = torch.get_num_threads()
        several, one = (lambda: torch.set_num_threads(own)), (lambda: torch.set_num_threads(1))
        line = "w.copy_(torch.from_numpy(x))"
        ways = (
            Way("tensorbridge", "tb.to_torch(x, out=w)", "bridge", WARM, before=several),
            Way(f"torch, {own} threads", line, "baseline", WARM, before=several),
            Way("torch, one thread", line, "baseline", WARM, before=one),
            Way("NumPy", "np.copyto(wn, x)", "baseline", WARM),
        )
        return Case(ways, names, copied(names), nbytes, around=lambda: company(busy, several))

    return [
        Row(f"copy of {bytes_name(n)}, {title}", partial(build, busy, n), 3 * n)
        for n in (4 * MIB, HUGE, 64 * MIB)
        for title, busy in (("cores idle", 0), ("one busy process", 1), ("a busy process a core", len(_cores())))
    ]


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return list(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextmanager
def company(processes: int, restore: Callable[[], None]) -> Iterator[None]:
    """While it lasts, so many other processes keep a core busy each."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()
        restore()


QUESTIONS = (
    Question(
        "B1",
        "Does a large copy run at the speed of memory?",
        "float32, one dimension. The limits: torch's threads into pages fresh from NumPy; memcpy, which has one, into "
        "memory in use.",
        _large_rows,
    ),
    Question(
        "pages",
        "Where does the time of a large copy go?",
        "One copy, into memory fresh from torch's allocator or NumPy's, or in use.",
        _pages_rows,
    ),
    Question(
        "threads",
        "What do torch's threads make of a copy when the cores are busy?",
        "Into memory in use. torch's threads wait for each other, so a copy takes as long as the one that has to wait "
        "for a core: look at the ranges in the last table. tensorbridge starts them for 16 MiB and more, where cores "
        "are idle.",
        _threads_rows,
    ),
)
