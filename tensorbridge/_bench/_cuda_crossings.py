"""Sharing between torch and CuPy on the device; copies against sharing over sizes. Run with ``--device cuda``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from tensorbridge._bench._cuda import CUDA, case, names_of, warmed_up
from tensorbridge._bench._rows import (
    FRESH,
    GIB,
    KIB,
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
    Unavailable,
    Way,
    bytes_name,
    result_is,
)
from tensorbridge._bench._sizes import Direction

# -- C5: torch and CuPy on the device


def cupy_module() -> Any:
    if find_spec("cupy") is None:
        raise Unavailable("CuPy is not installed")
    return import_module("cupy")


@contextmanager
def _streams_restored() -> Iterator[None]:
    cupy = cupy_module()
    before = cupy.cuda.get_current_stream()
    try:
        yield
    finally:
        before.use()


def _torch_cupy(to_cupy: bool, differ: bool) -> Case:
    cupy = cupy_module()
    import torch

    import tensorbridge as tb

    warmed_up(16 * MIB)
    t = torch.rand(16, device=CUDA)
    c = cupy.arange(16, dtype=cupy.float32)  # cupy.random would need a library more
    other = cupy.cuda.Stream(non_blocking=True)
    names = {"tb": tb, "torch": torch, "cupy": cupy, "t": t, "c": c, "p": c.data, "shape": c.shape, "dtype": c.dtype}
    source, ours = (t, "tb.to_cupy(t)") if to_cupy else (c, "tb.to_torch(c)")
    theirs = "cupy.from_dlpack(t)" if to_cupy else "torch.from_dlpack(c)"
    limit = "cupy.ndarray(shape, dtype, p)" if to_cupy else "t.detach()"
    same: Callable[[], Any] = cupy.cuda.Stream.null.use
    ways: tuple[Way, ...]
    if differ:
        ways = (
            Way("tensorbridge", ours, "bridge", SHARED, before=other.use),
            Way("on one stream", ours, "limit", SHARED, before=same),
        )
        goals = (Goal("C5", ("on one stream",), "extra", 4000.0),)
    else:
        ways = (
            Way("tensorbridge", ours, "bridge", SHARED, before=same),
            Way("by hand", theirs, "baseline", SHARED, before=same),
            Way("one object made", limit, "limit", NONE, before=same),
        )
        goals = (Goal("C5", ("by hand",), "cost", 0.5 if to_cupy else 0.7),)
    plain = result_is(source)

    def check(way: Way, result: Any) -> None:
        if way.state == SHARED:
            torch.cuda.synchronize()
            plain(way, result)

    return Case(ways, names, check, goals=goals, around=_streams_restored)


def _crossing_rows(scope: Scope) -> list[Row]:
    return [
        Row(
            f"{'torch to CuPy' if to_cupy else 'CuPy to torch'}, {'streams differ' if differ else 'one stream'}",
            partial(_torch_cupy, to_cupy, differ),
        )
        for differ in (False, True)
        for to_cupy in (True, False)
    ]


# -- Copy against share over sizes


def _cupy_array(nbytes: int) -> dict[str, Any]:
    cupy = cupy_module()
    names = names_of(nbytes, "host")
    return {**names, "cupy": cupy, "x": cupy.asarray(names["values"])}


DIRECTIONS = (
    Direction(
        "NumPy to torch on the device",
        lambda n: names_of(n, "host"),
        (
            Way("copy", "tb.to_torch(x, device=cuda)", "bridge", POOL),
            Way("copy by hand", "torch.from_numpy(x).to(cuda)", "baseline", POOL),
        ),
    ),
    Direction(
        "torch on the device to NumPy",
        lambda n: names_of(n, "device"),
        (
            Way("copy", "tb.to_numpy(x)", "bridge", FRESH),
            Way("copy into out", "tb.to_numpy(x, out=wn)", "bridge", WARM),
            Way("copy into pinned out", "tb.to_numpy(x, out=pn)", "bridge", PINNED),
            Way("copy by hand", "x.cpu().numpy()", "baseline", FRESH),
        ),
    ),
    Direction(
        "NumPy to CuPy",
        lambda n: {**names_of(n, "host"), "cupy": cupy_module()},
        (
            Way("copy", "tb.to_cupy(x)", "bridge", POOL),
            Way("copy by hand", "cupy.asarray(x)", "baseline", POOL),
        ),
    ),
    Direction(
        "CuPy to NumPy",
        _cupy_array,
        (
            Way("copy", "tb.to_numpy(x)", "bridge", FRESH),
            Way("copy by hand", "cupy.asnumpy(x)", "baseline", FRESH),
        ),
    ),
    Direction(
        "torch to CuPy",
        lambda n: {**names_of(n, "device"), "cupy": cupy_module()},
        (
            Way("share", "tb.to_cupy(x)", "bridge", SHARED),
            Way("copy", "tb.to_cupy(x, copy=True)", "bridge", POOL),
            Way("share by hand", "cupy.from_dlpack(x)", "baseline", SHARED),
            Way("copy by hand", "cupy.from_dlpack(x).copy()", "baseline", POOL),
        ),
    ),
    Direction(
        "CuPy to torch",
        _cupy_array,
        (
            Way("share", "tb.to_torch(x)", "bridge", SHARED),
            Way("copy", "tb.to_torch(x, copy=True)", "bridge", POOL),
            Way("share by hand", "torch.from_dlpack(x)", "baseline", SHARED),
            Way("copy by hand", "torch.from_dlpack(x).clone()", "baseline", POOL),
        ),
    ),
)
FULL_SIZES = (4 * KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB)
QUICK_SIZES = (4 * KIB, MIB, 64 * MIB)


def _sweep_rows(scope: Scope) -> list[Row]:
    def build(direction: Direction, nbytes: int) -> Case:
        return case(direction.make(nbytes), direction.ways)

    return [
        Row(f"{d.name}, {bytes_name(n)}", partial(build, d, n), 6 * n)
        for d in DIRECTIONS
        for n in (QUICK_SIZES if scope.quick else FULL_SIZES)
    ]


QUESTIONS = (
    Question(
        "sizes-cuda",
        "What does a copy cost against sharing, over sizes, where a device is involved?",
        "float32, one dimension; the device is idle at both ends of a round.",
        _sweep_rows,
        "cuda",
    ),
    Question(
        "C5",
        "What does sharing between torch and CuPy cost?",
        "float32 (16,) on the device; time of the host, which waits for nothing.",
        _crossing_rows,
        "cuda",
    ),
)
