"""Question: what does a shared crossing cost over the line that a careful user writes by hand?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import tensorbridge as tb

TO_NUMPY: dict[str, Callable[[Any], Any]] = {
    "by hand": lambda t: t.detach().cpu().numpy(),
    "numpy(force=True)": lambda t: t.numpy(force=True),
    "tensorbridge": tb.to_numpy,
}
TO_TORCH: dict[str, Callable[[Any], Any]] = {
    "torch.as_tensor": torch.as_tensor,
    "torch.from_numpy": torch.from_numpy,
    "tensorbridge": tb.to_torch,
}
TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "plain": lambda: torch.rand(16),
    "requires grad": lambda: torch.rand(16, requires_grad=True),
    "transposed": lambda: torch.rand(4, 8).T,
}
ARRAYS: dict[str, Callable[[], Any]] = {
    "plain": lambda: np.random.default_rng(7).random(16),
    "slice": lambda: np.random.default_rng(7).random(64)[8:24],
    "transposed": lambda: np.random.default_rng(7).random((4, 8)).T,
}


@pytest.mark.parametrize("way", TO_NUMPY)
@pytest.mark.parametrize("kind", TENSORS)
def bench_tensor_to_numpy(benchmark: Any, kind: str, way: str) -> None:
    benchmark.group = f"tensor to NumPy, {kind}"
    t = TENSORS[kind]()
    out = benchmark(TO_NUMPY[way], t)
    assert tb.shares_memory(out, t)


@pytest.mark.parametrize("way", TO_TORCH)
@pytest.mark.parametrize("kind", ARRAYS)
def bench_array_to_torch(benchmark: Any, kind: str, way: str) -> None:
    benchmark.group = f"array to torch, {kind}"
    a = ARRAYS[kind]()
    out = benchmark(TO_TORCH[way], a)
    assert tb.shares_memory(out, a)
