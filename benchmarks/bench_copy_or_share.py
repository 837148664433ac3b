"""Question: what does a copy cost over sharing, for every size, between NumPy, torch and CuPy?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import tensorbridge as tb


class Way(NamedTuple):
    call: Callable[[Any], Any]
    shares: bool


def _cupy() -> Any:
    import cupy

    return cupy


FROM_ARRAY = {
    "share": Way(tb.to_torch, True),
    "copy": Way(lambda a: tb.to_torch(a, copy=True), False),
    "share by hand": Way(torch.from_numpy, True),
    "copy by hand": Way(torch.tensor, False),
    "NumPy's copy": Way(lambda a: torch.from_numpy(a.copy()), False),
}
FROM_TENSOR = {
    "share": Way(tb.to_numpy, True),
    "copy": Way(lambda t: tb.to_numpy(t, copy=True), False),
    "share by hand": Way(lambda t: t.detach().cpu().numpy(), True),
    "copy by hand": Way(lambda t: t.detach().cpu().numpy().copy(), False),
    "torch's copy": Way(lambda t: t.clone().numpy(), False),
}
ON_DEVICE = {
    "torch to CuPy, share": Way(tb.to_cupy, True),
    "torch to CuPy, copy": Way(lambda t: tb.to_cupy(t, copy=True), False),
    "torch to CuPy, share by hand": Way(lambda t: _cupy().from_dlpack(t), True),
    "torch to NumPy": Way(tb.to_numpy, False),
    "torch to NumPy by hand": Way(lambda t: t.cpu().numpy(), False),
}
TO_DEVICE = {
    "NumPy to torch": Way(lambda a: tb.to_torch(a, device="cuda"), False),
    "NumPy to torch by hand": Way(lambda a: torch.from_numpy(a).to("cuda"), False),
    "NumPy to CuPy": Way(tb.to_cupy, False),
    "NumPy to CuPy by hand": Way(lambda a: _cupy().asarray(a), False),
}


def assert_crossed(out: Any, source: Any, values: Any, way: Way) -> None:
    assert tb.shares_memory(out, source) == way.shares
    np.testing.assert_array_equal(tb.to_numpy(out), values)


@pytest.mark.parametrize("way", FROM_ARRAY)
def bench_array_to_torch(benchmark: Any, timed: Any, array: Any, nbytes: int, way: str) -> None:
    benchmark.group = f"array to torch, {nbytes} B"
    chosen = FROM_ARRAY[way]
    out = timed(chosen.call, array, fresh=0 if chosen.shares else nbytes)
    assert_crossed(out, array, array, chosen)


@pytest.mark.parametrize("way", FROM_TENSOR)
def bench_tensor_to_numpy(benchmark: Any, timed: Any, array: Any, nbytes: int, way: str) -> None:
    benchmark.group = f"tensor to NumPy, {nbytes} B"
    chosen, t = FROM_TENSOR[way], torch.from_numpy(array)
    out = timed(chosen.call, t, fresh=0 if chosen.shares else nbytes)
    assert_crossed(out, t, array, chosen)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ON_DEVICE)
def bench_tensor_on_the_device(benchmark: Any, timed: Any, array: Any, nbytes: int, way: str) -> None:
    benchmark.group = f"tensor on the device, {nbytes} B"
    chosen, t = ON_DEVICE[way], torch.from_numpy(array).to("cuda")

    def waited(x: Any) -> Any:
        out = chosen.call(x)
        torch.cuda.synchronize()
        return out

    out = timed(chosen.call if chosen.shares else waited, t)
    assert_crossed(out, t, array, chosen)


@pytest.mark.gpu
@pytest.mark.parametrize("way", TO_DEVICE)
def bench_array_to_the_device(benchmark: Any, timed: Any, array: Any, nbytes: int, way: str) -> None:
    benchmark.group = f"array to the device, {nbytes} B"
    chosen = TO_DEVICE[way]

    def waited(x: Any) -> Any:
        out = chosen.call(x)
        torch.cuda.synchronize()
        return out

    out = timed(waited, array)
    assert_crossed(out, array, array, chosen)
