"""Copies that change layout or dtype, on the host: by NumPy's kernel, by torch's, and through tensorbridge."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from tensorbridge._bench._rows import (
    FRESH,
    KIB,
    MIB,
    REUSED,
    UNDECIDED,
    WARM,
    Case,
    Goal,
    Question,
    Row,
    Scope,
    Way,
    bytes_name,
    dtype_name,
    expect,
    floor,
    random_array,
    same_values,
    threads,
)
from tensorbridge._bench._sizes import copied, with_modules


class Change(NamedTuple):
    """One kind of copy, written for both frameworks. `x` is the source, `w` and `wn` the same memory in use."""

    name: str
    goal: float | None  # times as fast as NumPy; None: the floor alone
    make: Callable[[int], dict[str, Any]]  # from a size in bytes: x, wanted (the values), and where needed w, wn
    ours: str
    numpy: str
    torch: str = ""
    state: str = FRESH


def _side(nbytes: int, itemsize: int) -> int:
    return max(2, int((nbytes / itemsize) ** 0.5) // 2 * 2)


def _matrix(nbytes: int, dtype: str, itemsize: int) -> Any:
    n = _side(nbytes, itemsize)
    return random_array(dtype, n, n)


def _with_out(x: Any, wanted: Any) -> dict[str, Any]:
    import numpy as np
    import torch

    wn = np.zeros(wanted.shape, wanted.dtype)
    return {"x": x, "wanted": wanted, "w": torch.from_numpy(wn), "wn": wn}


def _transposed(nbytes: int) -> dict[str, Any]:
    import numpy as np

    x = _matrix(nbytes, "float32", 4).T
    return _with_out(x, np.ascontiguousarray(x))


def _as_tensor(make: Callable[[int], dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
    def made(nbytes: int) -> dict[str, Any]:
        import torch

        names = make(nbytes)
        return {**names, "x": torch.from_numpy(names["x"])}

    return made


def _images(nbytes: int) -> dict[str, Any]:
    import numpy as np

    side = min(224, max(4, int((nbytes / 3) ** 0.5)))
    x = random_array("uint8", max(1, nbytes // (3 * side * side)), side, side, 3).transpose(0, 3, 1, 2)
    return _with_out(x, np.ascontiguousarray(x))


def _channels_last(nbytes: int) -> dict[str, Any]:
    import torch

    side = min(64, max(4, int((nbytes / 64) ** 0.5)))
    x = torch.from_numpy(random_array("float32", max(1, nbytes // (64 * side * side)), side, side, 16))
    return {"x": x.permute(0, 3, 1, 2), "wanted": x.permute(0, 3, 1, 2).numpy()}


def _cast(source: str, wanted: str) -> Callable[[int], dict[str, Any]]:
    def made(nbytes: int) -> dict[str, Any]:
        from tensorbridge import _dtypes

        row = _dtypes.DTYPES[source]
        x = random_array(source, nbytes // row.itemsize)
        return {"x": x, "wanted": x.astype(_dtypes.DTYPES[wanted].numpy), "dtype": _dtypes.DTYPES[wanted].numpy}

    return made


def _casts(source: str, wanted: str, goal: float | None) -> Change:
    return Change(
        f"{source} to {wanted}",
        goal,
        _cast(source, wanted),
        f'tb.to_torch(x, dtype="{wanted}")',
        "torch.from_numpy(x.astype(dtype))",
        f"torch.from_numpy(x).to(torch.{wanted})",
    )


def _strided(nbytes: int) -> dict[str, Any]:
    x = _matrix(2 * nbytes, "float32", 4)[:, ::2]
    return {"x": x, "wanted": x}


def _reversed(nbytes: int) -> dict[str, Any]:
    x = _matrix(nbytes, "float32", 4)[::-1]
    return {"x": x, "wanted": x}


def _big_endian(nbytes: int) -> dict[str, Any]:
    x = random_array("float32", nbytes // 4).astype(">f4")
    return {"x": x, "wanted": x.astype("float32")}


def _plain(dtype: str, itemsize: int) -> Callable[[int], dict[str, Any]]:
    def made(nbytes: int) -> dict[str, Any]:
        x = random_array(dtype, nbytes // itemsize)
        return {"x": x, "wanted": x}

    return made


CHANGES = (
    Change(
        "float32 transposed, to torch", 5.0, _transposed,
        "tb.to_torch(x, out=w)", "np.copyto(w.numpy(), x)", "w.copy_(torch.from_numpy(x))", WARM,
    ),
    Change(
        "float32 transposed, to NumPy", 5.0, _as_tensor(_transposed),
        "tb.to_numpy(x, out=wn)", "np.copyto(wn, x.numpy())", "torch.from_numpy(wn).copy_(x)", WARM,
    ),
    Change(
        "uint8 images, channels last to first", None, _images,
        "tb.to_torch(x, out=w)", "np.copyto(w.numpy(), x)", "w.copy_(torch.from_numpy(x))", WARM,
    ),
    Change(
        "float32 channels_last, kept", None, _channels_last,
        "tb.to_numpy(x, copy=True)", 'x.numpy().copy(order="K")', "x.clone().numpy()",
    ),
    Change(
        "float32, every second column", None, _strided,
        "tb.to_torch(x, copy=True)", "torch.from_numpy(x.copy())", "torch.from_numpy(x).clone()",
    ),
    Change(
        "float32 reversed", None, _reversed,
        "tb.to_torch(x)", "torch.from_numpy(x.copy())", "torch.from_numpy(x[::-1]).flip(0)",
    ),
    Change(
        "float32 big-endian", None, _big_endian,
        "tb.to_torch(x)", 'torch.from_numpy(x.astype("float32"))',
        "torch.from_numpy(x.view(np.uint8).reshape(-1, 4)).flip(1).view(torch.float32).view(-1)",
    ),
    _casts("float32", "float16", 5.0),
    _casts("float16", "float32", 4.0),
    _casts("float64", "float32", None),
    _casts("uint8", "float32", None),
    _casts("uint8", "float16", None),
    _casts("bool", "float32", None),
    _casts("float32", "bfloat16", None)._replace(
        numpy="torch.from_numpy(x.astype(dtype).view(np.int16)).view(torch.bfloat16)"
    ),
    Change(
        "float32 to float16, to NumPy", 5.0, _as_tensor(_cast("float32", "float16")),
        'tb.to_numpy(x, dtype="float16")', "x.numpy().astype(np.float16)", "x.to(torch.float16).numpy()",
    ),
    Change(
        "bool, copied", None, _plain("bool", 1),
        "tb.to_torch(x, copy=True)", "torch.from_numpy(x.copy())", "torch.from_numpy(x).clone()",
    ),
    Change(
        "bfloat16, copied", None, _plain("bfloat16", 2),
        "tb.to_torch(x, copy=True)", "torch.from_numpy(x.copy().view(np.int16)).view(torch.bfloat16)",
        "torch.from_numpy(x.view(np.int16)).clone().view(torch.bfloat16)",
    ),
)  # fmt: skip


LARGE = 16 * MIB
SMALL = 64 * KIB  # up to here, a row shows what the call costs: the result is dropped, its memory reused


def change_case(change: Change, nbytes: int) -> Case:
    names = with_modules(change.make(nbytes))
    wanted = names.pop("wanted")
    undecided = UNDECIDED if nbytes < LARGE else ""
    started = threads(names["x"].nbytes, cast=dtype_name(names["x"]) != dtype_name(wanted))
    state = REUSED if change.state == FRESH and nbytes <= SMALL else change.state
    ways = [
        Way("tensorbridge", change.ours, "bridge", state),
        Way("NumPy", change.numpy, "baseline", state, unlike=undecided),
        # With a goal of its own, ours is torch's kernel too.
        Way("torch", change.torch, "baseline", state, unlike=(change.goal is None and started) or undecided),
        Way("memcpy", "np.copyto(spare, block)", "limit", WARM),
    ]
    goals = [floor("NumPy", "torch")]
    if change.goal is not None and nbytes >= LARGE:
        goals.insert(0, Goal("B2", ("NumPy",), "speed", change.goal))
    block = random_array("uint8", (names["x"].nbytes + wanted.nbytes) // 2)
    names |= {"block": block, "spare": block.copy()}
    inner = copied(names, wanted)

    def check(way: Way, result: Any) -> None:
        if way.role == "limit":
            expect(same_values(names["spare"], block), "memcpy: other values")
        else:
            inner(way, result)

    return Case(tuple(ways), names, check, int(names["x"].nbytes), tuple(goals))


def _change_rows(scope: Scope) -> list[Row]:
    sizes = (64 * KIB, 16 * MIB) if scope.quick else (4 * KIB, 64 * KIB, MIB, 64 * MIB)
    return [
        Row(f"{change.name}, {bytes_name(n)}", partial(change_case, change, n), 8 * n)
        for n in reversed(sizes)
        for change in CHANGES
    ]


QUESTIONS = (
    Question(
        "B2",
        "What do copies cost that change layout or dtype?",
        "The same work by NumPy's kernel and by torch's. The limit is a memcpy that reads and writes as many bytes in "
        "all, into memory in use. The multiples of NumPy's speed are asked of large copies, the floor of all.",
        _change_rows,
    ),
)
