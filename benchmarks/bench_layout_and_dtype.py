"""Question: what do copies cost that change layout or dtype, against NumPy's kernels and torch's?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import tensorbridge as tb


class Change(NamedTuple):
    make: Callable[[Any], Any]  # the source, from random float32
    tensorbridge: Callable[[Any], Any]
    numpy: Callable[[Any], Any]
    torch: Callable[[Any], Any]


def _square(a: Any) -> Any:
    side = int(a.size**0.5)
    return a[: side * side].reshape(side, side)


CHANGES = {
    "float32 to float16": Change(
        lambda a: a,
        lambda a: tb.to_torch(a, dtype="float16"),
        lambda a: torch.from_numpy(a.astype(np.float16)),
        lambda a: torch.from_numpy(a).to(torch.float16),
    ),
    "float16 to float32": Change(
        lambda a: a.astype(np.float16),
        lambda a: tb.to_torch(a, dtype="float32"),
        lambda a: torch.from_numpy(a.astype(np.float32)),
        lambda a: torch.from_numpy(a).to(torch.float32),
    ),
    "uint8 to float32": Change(
        lambda a: (a * 255).astype(np.uint8),
        lambda a: tb.to_torch(a, dtype="float32"),
        lambda a: torch.from_numpy(a.astype(np.float32)),
        lambda a: torch.from_numpy(a).to(torch.float32),
    ),
    "every second column": Change(
        lambda a: _square(a)[:, ::2],
        lambda a: tb.to_torch(a, copy=True),
        lambda a: torch.from_numpy(a.copy()),
        lambda a: torch.from_numpy(a).clone(),
    ),
    "reversed": Change(
        lambda a: a[::-1],
        tb.to_torch,
        lambda a: torch.from_numpy(a.copy()),
        lambda a: torch.from_numpy(a[::-1]).flip(0),
    ),
    "big-endian": Change(
        lambda a: a.astype(">f4"),
        tb.to_torch,
        lambda a: torch.from_numpy(a.astype(np.float32)),
        lambda a: torch.from_numpy(a.view(np.uint8).reshape(-1, 4)).flip(1).view(torch.float32).view(-1),
    ),
}
WAYS = ("tensorbridge", "numpy", "torch")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CHANGES)
def bench_changing_copy(benchmark: Any, timed: Any, array: Any, nbytes: int, name: str, way: str) -> None:
    benchmark.group = f"{name}, {nbytes} B"
    change = CHANGES[name]
    source = change.make(array)
    out = timed(getattr(change, way), source, fresh=nbytes)
    assert not tb.shares_memory(out, source)
    np.testing.assert_array_equal(out.numpy(), change.numpy(source).numpy())


@pytest.mark.parametrize("way", WAYS)
def bench_transpose_into_out(benchmark: Any, array: Any, nbytes: int, way: str) -> None:
    benchmark.group = f"transposed into out, {nbytes} B"
    source = _square(array).T
    out = torch.zeros(source.shape)
    view = out.numpy()
    fill: dict[str, Callable[[], Any]] = {
        "tensorbridge": lambda: tb.to_torch(source, out=out),
        "numpy": lambda: np.copyto(view, source),
        "torch": lambda: out.copy_(torch.from_numpy(source)),
    }
    benchmark(fill[way])
    np.testing.assert_array_equal(view, source)
