"""Copy against share over sizes, on the host: what a conversion costs when it moves nothing, and when it does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from tensorbridge._bench._malloc import LARGEST
from tensorbridge._bench._rows import (
    FRESH,
    KIB,
    MIB,
    REUSED,
    SEE,
    SHARED,
    UNASKED,
    WARM,
    Case,
    Question,
    Row,
    Scope,
    Way,
    bytes_name,
    expect,
    floor,
    random_array,
    result_is,
    same_values,
    threads,
)

FULL_SIZES = tuple(64 * 4**i for i in range(13))  # 64 B to 1 GiB
QUICK_SIZES = (64, 4 * KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB)


UNCOUNTED = "it counts no write for autograd"
LOCKS = "it makes the storage of the tensor unresizable for good"


class Direction(NamedTuple):
    name: str
    make: Callable[[int], dict[str, Any]]  # "x", the source; "w" and "wn", memory in use under both frameworks
    ways: tuple[Way, ...]


def from_array(count: int) -> dict[str, Any]:
    import torch

    wn = random_array("float32", count)
    return {"x": random_array("float32", count), "w": torch.from_numpy(wn), "wn": wn}


def from_tensor(count: int) -> dict[str, Any]:
    made = from_array(count)
    import torch

    return {**made, "x": torch.from_numpy(made["x"])}


TO_TORCH = Direction(
    "NumPy to torch",
    from_array,
    (
        Way("share", "tb.to_torch(x)", "bridge", SHARED),
        Way("copy", "tb.to_torch(x, copy=True)", "bridge", FRESH),
        Way("copy, dropped", "tb.to_torch(x, copy=True)", "bridge", REUSED),
        Way("copy into out", "tb.to_torch(x, out=w)", "bridge", WARM),
        Way("share by hand", "torch.from_numpy(x)", "baseline", SHARED),
        Way("copy by hand", "torch.tensor(x)", "baseline", FRESH),
        Way("NumPy's copy", "torch.from_numpy(x.copy())", "baseline", FRESH, unlike=UNASKED + SEE),
        Way("torch's copy", "torch.from_numpy(x).clone()", "baseline", FRESH, unlike=UNASKED + SEE),
        Way("NumPy's copy, dropped", "torch.from_numpy(x.copy())", "baseline", REUSED, unlike=UNASKED + SEE),
        Way("torch's copy, dropped", "torch.from_numpy(x).clone()", "baseline", REUSED, unlike=UNASKED + SEE),
        Way("NumPy's copy into out", "np.copyto(w.numpy(), x)", "baseline", WARM, unlike=UNCOUNTED),
        Way("torch's copy into out", "w.copy_(torch.from_numpy(x))", "baseline", WARM, unlike=UNASKED + SEE),
    ),
)
TO_NUMPY = Direction(
    "torch to NumPy",
    from_tensor,
    (
        Way("share", "tb.to_numpy(x)", "bridge", SHARED),
        Way("copy", "tb.to_numpy(x, copy=True)", "bridge", FRESH),
        Way("copy, dropped", "tb.to_numpy(x, copy=True)", "bridge", REUSED),
        Way("copy into out", "tb.to_numpy(x, out=wn)", "bridge", WARM),
        Way("share by hand", "x.detach().cpu().numpy()", "baseline", SHARED),
        Way("copy by hand", "x.detach().cpu().numpy().copy()", "baseline", FRESH),
        Way("NumPy's copy", "np.array(x.numpy())", "baseline", FRESH, unlike=LOCKS),
        Way("torch's copy", "x.clone().numpy()", "baseline", FRESH, unlike=UNASKED + SEE),
        Way("NumPy's copy, dropped", "np.array(x.numpy())", "baseline", REUSED, unlike=LOCKS),
        Way("torch's copy, dropped", "x.clone().numpy()", "baseline", REUSED, unlike=UNASKED + SEE),
        Way("NumPy's copy into out", "np.copyto(wn, x.numpy())", "baseline", WARM, unlike=LOCKS),
        Way("torch's copy into out", "torch.from_numpy(wn).copy_(x)", "baseline", WARM, unlike=UNASKED + SEE),
    ),
)
SWEEP_GOALS = (
    floor("NumPy's copy", "torch's copy", way="copy"),
    floor("NumPy's copy, dropped", "torch's copy, dropped", way="copy, dropped"),
    floor("NumPy's copy into out", "torch's copy into out", way="copy into out"),
)


def _sweep_rows(scope: Scope) -> list[Row]:
    def build(direction: Direction, nbytes: int) -> Case:
        names = with_modules(direction.make(nbytes // 4))
        ways = tuple(
            w for w in direction.ways if w.state != REUSED or nbytes <= LARGEST
        )  # larger ones are fresh anyway
        if started := threads(nbytes):
            ways = tuple(w._replace(unlike=started) if w.name.startswith("torch's") else w for w in ways)
        told = {way.name for way in ways}
        return Case(ways, names, copied(names), nbytes, tuple(goal for goal in SWEEP_GOALS if goal.way in told))

    return [
        Row(f"{direction.name}, {bytes_name(n)}", partial(build, direction, n), 6 * n)
        for direction in (TO_TORCH, TO_NUMPY)
        for n in (QUICK_SIZES if scope.quick else FULL_SIZES)
    ]


def with_modules(made: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import torch

    import tensorbridge as tb

    return {"tb": tb, "np": np, "torch": torch, **made}


def copied(names: dict[str, Any], values: Any = None) -> Callable[[Way, Any], None]:
    """The check for ways that share, copy, or fill `w`: then the values are looked for there, and wiped."""
    plain = result_is(names["x"], values)
    wanted = names["x"] if values is None else values

    def check(way: Way, result: Any) -> None:
        if way.state != WARM:
            plain(way, result)
            return
        expect(same_values(names["w"], wanted), f"{way.name} ({way.code}): other values in the destination")
        names["w"].zero_()

    return check


QUESTIONS = (
    Question(
        "sizes",
        "What does a copy cost against sharing, over sizes?",
        "float32, one dimension. Sharing does not see the size. A fresh copy writes memory that is new to the process; "
        "`out=` writes memory that is in use.",
        _sweep_rows,
    ),
)
