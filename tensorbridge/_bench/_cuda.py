"""What crossing the bus costs, and crossing between torch and CuPy on the device. Run only with ``--device cuda``.

A transfer is timed by the wall clock with the device idle at both ends of a round: the copy on the host is the cost. A
crossing that shares is timed on the host alone, without waiting: that it does not wait is the point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from tensorbridge._bench._rows import (
    FRESH,
    GIB,
    MIB,
    NONE,
    PINNED,
    POOL,
    SHARED,
    WARM,
    Case,
    Goal,
    Question,
    Row,
    Scope,
    Way,
    bytes_name,
    expect,
    random_array,
    result_is,
    same_values,
)  # fmt: skip

CUDA = "cuda"
THREADS = 8  # that touch fresh pages in the limit of C2

DMA_TO_HOST = "(p.copy_(x, non_blocking=True), event.record(), event.synchronize())"
DMA_TO_DEVICE = "(d.copy_(p, non_blocking=True), event.record(), event.synchronize())"


def cuda_event(**options: bool) -> Any:
    import torch

    return torch.cuda.Event(**options)  # type: ignore[no-untyped-call]


def pinned(count: int) -> Any:
    import torch

    return torch.zeros(count, pin_memory=True)


@cache
def warmed_up(nbytes: int) -> None:
    """Touch and free the largest buffers once, so that no row pays for the first use of the device."""
    import torch

    block = torch.zeros(nbytes, dtype=torch.uint8, device=CUDA)
    (block[: MIB * 16].cpu().to(CUDA) + 1).sum().item()
    del block
    torch.cuda.synchronize()


def names_of(nbytes: int, x: str) -> dict[str, Any]:
    """`x` on "host" or "device"; `d`, `p`, `w`: memory in use on the device, page-locked, ordinary. float32."""
    import numpy as np
    import torch

    import tensorbridge as tb

    warmed_up(nbytes)
    count = nbytes // 4
    host = random_array("float32", count)
    w, p = torch.zeros(count), pinned(count)
    return {
        "tb": tb, "np": np, "torch": torch, "event": cuda_event(), "cuda": CUDA,
        "x": host if x == "host" else torch.from_numpy(host).to(CUDA), "values": host,
        "d": torch.zeros(count, device=CUDA), "p": p, "pn": p.numpy(), "w": w, "wn": w.numpy(),
    }  # fmt: skip


def into(names: dict[str, Any]) -> Callable[[Way, Any], None]:
    """The check of a transfer: a result of its own, or `w`, `p` or `d` filled; what was filled is wiped."""
    plain = result_is(names["x"], names["values"])

    def check(way: Way, result: Any) -> None:
        if way.state == NONE:
            return
        if way.state in (FRESH, POOL, SHARED):
            plain(way, result)
            return
        filled = names["d"] if "d.copy_" in way.code else names["w"] if way.state == WARM else names["p"]
        names["torch"].cuda.synchronize()
        expect(same_values(filled, names["values"]), f"{way.name} ({way.code}): other values in the destination")
        filled.zero_()

    return check


def case(names: dict[str, Any], ways: tuple[Way, ...], goals: tuple[Goal, ...] = ()) -> Case:
    names["p"].copy_(names["torch"].from_numpy(names["values"]))  # the source of a DMA to the device
    return Case(ways, names, into(names), names["values"].nbytes, goals, names["torch"].cuda.synchronize)


def rows_over(build: Callable[[int], Case], *sizes: int) -> Callable[[Scope], list[Row]]:
    """One row a size; the first two of them where it has to be quick."""
    return lambda scope: [Row(bytes_name(n), partial(build, n), 6 * n) for n in (sizes[:2] if scope.quick else sizes)]


# -- C1, C2: device to host


def _to_pinned(nbytes: int) -> Case:
    ways = (
        Way("tensorbridge", "tb.to_numpy(x, out=pn)", "bridge", PINNED),
        Way("torch's copy", "p.copy_(x)", "baseline", PINNED),
        Way("pinned DMA", DMA_TO_HOST, "limit", PINNED),
    )
    return case(names_of(nbytes, "device"), ways, (Goal("C1", ("pinned DMA",), "speed", 0.9),))


def _to_fresh(nbytes: int) -> Case:
    names = names_of(nbytes, "device")
    pool = ThreadPoolExecutor(THREADS)

    def touch() -> Any:
        fresh = names["np"].empty_like(names["values"])
        step = -(-fresh.size // THREADS)
        list(pool.map(lambda i: fresh[i * step : (i + 1) * step].fill(0), range(THREADS)))
        return fresh

    names["touch"] = touch
    ways = (
        Way("tensorbridge", "tb.to_numpy(x)", "bridge", FRESH),
        Way("by hand", "x.cpu().numpy()", "baseline", FRESH),
        Way("ordinary memory in use", "w.copy_(x)", "baseline", WARM),
        Way("pinned DMA", DMA_TO_HOST, "limit", PINNED),
        Way(f"first touch by {THREADS} threads", "touch()", "limit", FRESH),
    )
    limits = ("pinned DMA", f"first touch by {THREADS} threads")
    goals = (
        Goal("C2", ("by hand",), "speed", 2.0, 4.0),
        Goal("C2", limits, "speed", 0.7, slowest=True),
    )
    made = case(names, ways, goals)
    return made._replace(check=lambda way, result: None if way.code == "touch()" else made.check(way, result))


# -- C3: host to device


def _to_device(nbytes: int) -> Case:
    ways = (
        Way("tensorbridge", "tb.to_torch(x, device=cuda)", "bridge", POOL),
        Way("by hand", "torch.from_numpy(x).to(cuda)", "baseline", POOL),
        Way("pinned first", "torch.from_numpy(x).pin_memory().to(cuda)", "baseline", POOL),
        Way("pinned DMA", DMA_TO_DEVICE, "limit", PINNED),
    )
    return case(names_of(nbytes, "host"), ways, (Goal("C3", ("by hand",), "speed", 1.5, 2.0),))


# -- Pinned memory, cold


def _cold_pinned(nbytes: int) -> Case:
    import time

    import torch

    warmed_up(16 * MIB)
    kept: list[Any] = []  # the host allocator would hand the same block out again

    def sample(pin: bool) -> Callable[[], int]:
        def once() -> int:
            begun = time.perf_counter_ns()
            block = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pin)
            if not pin:
                block.zero_()
            spent = time.perf_counter_ns() - begun
            kept.append(block) if pin else None
            return spent

        return once

    @contextmanager
    def around() -> Iterator[None]:
        try:
            yield
        finally:
            kept.clear()
            torch.cuda.synchronize()

    line = f"torch.empty({nbytes}, dtype=torch.uint8"
    ways = (
        Way("page-locked, first time", f"{line}, pin_memory=True)", "baseline", NONE, sample(True)),
        Way("ordinary, touched", f"{line}).zero_()", "baseline", NONE, sample(False)),
    )
    return Case(ways, {}, lambda way, result: None, around=around)


QUESTIONS = (
    Question(
        "pinned",
        "What does page-locked memory cost, the first time?",
        "Allocated and never freed, so that the allocator cannot hand the same block out again.",
        rows_over(_cold_pinned, 16 * MIB, 64 * MIB, 256 * MIB),
        "cuda",
        once=True,
    ),
    Question(
        "C1",
        "Does a copy into page-locked memory run at the speed of the link?",
        "Device to host, into `out=`. The limit is one DMA into the same memory, waited for by its event.",
        rows_over(_to_pinned, 16 * MIB, 64 * MIB, 256 * MIB, GIB),
        "cuda",
    ),
    Question(
        "C2",
        "What does a copy from the device into ordinary memory cost?",
        "The result is fresh memory. The limits: one DMA into page-locked memory, and the first touch of as many fresh "
        f"pages by {THREADS} threads.",
        rows_over(_to_fresh, 64 * MIB, 256 * MIB, GIB),
        "cuda",
    ),
    Question(
        "C3",
        "What does a copy from ordinary memory to the device cost?",
        "The source is ordinary memory, the destination comes from torch's pool. The limit is one DMA from page-locked "
        "memory.",
        rows_over(_to_device, 64 * MIB, 256 * MIB, GIB),
        "cuda",
    ),
)
