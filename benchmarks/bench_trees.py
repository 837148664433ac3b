"""Question: what does a tree of many small arrays cost, against a comprehension over its leaves?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import tensorbridge as tb


class Way(NamedTuple):
    call: Callable[[dict[str, Any]], dict[str, Any]]
    shares: bool


WAYS = {
    "tree, shared": Way(tb.tree.to_torch, True),
    "from_numpy of each leaf": Way(lambda x: {k: torch.from_numpy(v) for k, v in x.items()}, True),
    "tree, copied": Way(lambda x: tb.tree.to_torch(x, copy=True), False),
    "torch.tensor of each leaf": Way(lambda x: {k: torch.tensor(v) for k, v in x.items()}, False),
    "from_numpy of a copy of each leaf": Way(lambda x: {k: torch.from_numpy(v.copy()) for k, v in x.items()}, False),
}


@pytest.fixture
def leaves() -> dict[str, Any]:
    rng = np.random.default_rng(7)
    return {f"leaf{i}": rng.random((16, 16), dtype=np.float32) for i in range(1000)}


@pytest.mark.parametrize("way", WAYS)
def bench_tree_of_arrays(benchmark: Any, timed: Any, leaves: dict[str, Any], way: str) -> None:
    chosen = WAYS[way]
    benchmark.group = f"1000 arrays of 1 KiB, {'shared' if chosen.shares else 'copied'}"
    out = timed(chosen.call, leaves, fresh=0 if chosen.shares else 1000 * 1024)
    for key, leaf in leaves.items():
        assert tb.shares_memory(out[key], leaf) == chosen.shares
        np.testing.assert_array_equal(out[key].numpy(), leaf)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["tree", "one call a leaf"])
def bench_tree_to_the_device(benchmark: Any, leaves: dict[str, Any], way: str) -> None:
    benchmark.group = "1000 arrays of 1 KiB, to the device"
    calls: dict[str, Callable[[], dict[str, Any]]] = {
        "tree": lambda: tb.tree.to_torch(leaves, device="cuda"),
        "one call a leaf": lambda: {k: torch.from_numpy(v).to("cuda") for k, v in leaves.items()},
    }

    def waited() -> dict[str, Any]:
        out = calls[way]()
        torch.cuda.synchronize()
        return out

    out = benchmark(waited)
    for key, leaf in leaves.items():
        np.testing.assert_array_equal(out[key].cpu().numpy(), leaf)
