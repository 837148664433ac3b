"""Question: what does the same work cost through what people use today?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import tensorbridge as tb


class Peer(NamedTuple):
    module: str
    to_numpy: Callable[[Any, Any], Any]  # (the module, a tensor)
    to_torch: Callable[[Any, Any], Any]  # (the module, an array)


PEERS = {
    "tensorbridge": Peer("tensorbridge", lambda m, t: m.to_numpy(t), lambda m, a: m.to_torch(a)),
    "by hand": Peer("torch", lambda m, t: t.detach().cpu().numpy(), lambda m, a: m.as_tensor(a)),
    "MONAI": Peer(
        "monai.utils.type_conversion", lambda m, t: m.convert_to_numpy(t), lambda m, a: m.convert_to_tensor(a)
    ),
    "skorch": Peer("skorch.utils", lambda m, t: m.to_numpy(t), lambda m, a: m.to_tensor(a, device="cpu")),
    "eagerpy": Peer(
        "eagerpy", lambda m, t: m.astensor(t).numpy(), lambda m, a: m.from_numpy(m.astensor(torch.ones(1)), a).raw
    ),
    "thinc": Peer("thinc.util", lambda m, t: m.torch2xp(t), lambda m, a: m.xp2torch(a)),
    "tvm-ffi": Peer(
        "tvm_ffi", lambda m, t: np.from_dlpack(m.from_dlpack(t)), lambda m, a: torch.from_dlpack(m.from_dlpack(a))
    ),
    "array-api-compat, NumPy": Peer("array_api_compat.numpy", lambda m, t: m.from_dlpack(t), lambda m, a: m.asarray(a)),
    "array-api-compat, torch": Peer("array_api_compat.torch", lambda m, t: m.asarray(t), lambda m, a: m.from_dlpack(a)),
}


def _module(name: str) -> Any:
    return pytest.importorskip(PEERS[name].module, reason=f"{name} is not installed", exc_type=ModuleNotFoundError)


@pytest.mark.parametrize("name", [name for name in PEERS if name != "array-api-compat, torch"])
def bench_tensor_to_numpy(benchmark: Any, name: str) -> None:
    benchmark.group = "float32 (16,), tensor to NumPy"
    module, t = _module(name), torch.rand(16)
    out = benchmark(PEERS[name].to_numpy, module, t)
    assert type(out) is np.ndarray
    assert tb.shares_memory(out, t)


@pytest.mark.parametrize("name", [name for name in PEERS if name != "array-api-compat, NumPy"])
def bench_array_to_torch(benchmark: Any, name: str) -> None:
    benchmark.group = "float32 (16,), array to torch"
    module, a = _module(name), np.random.default_rng(7).random(16, dtype=np.float32)
    out = benchmark(PEERS[name].to_torch, module, a)
    assert type(out) is torch.Tensor
    assert tb.shares_memory(out, a)
