"""Where a mode or a transform answers for torch, a copy by its kernels may write nothing: NumPy makes the copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tensorbridge as tb
from tensorbridge import _remember
from tensorbridge._array import HUGE


def in_fake_mode(call: Callable[[], Any]) -> Any:
    with FakeTensorMode():
        return call()


def functionalized(call: Callable[[], Any]) -> Any:
    made: list[Any] = []

    def run(x: Any) -> Any:
        made.append(call())
        return x

    torch.func.functionalize(run)(torch.zeros(2))
    result = made[0]
    if isinstance(result, torch.Tensor) and torch._is_functional_tensor(result):
        torch._sync(result)
        result = torch._from_functional_tensor(result)
    return result


MODES = {"fake": in_fake_mode, "functionalize": functionalized}
SQUARE = np.arange(1.0, 1 + 512 * 512, dtype="float32").reshape(512, 512) % 1000
LARGE = np.ones(HUGE // 4, "float32")
ARRAYS: dict[str, Callable[[], Any]] = {
    "half": lambda: tb.to_numpy(SQUARE, dtype="float16"),
    "small half": lambda: tb.to_numpy(SQUARE[0], dtype="float16"),
    "from half": lambda: tb.to_numpy(SQUARE.astype("float16"), dtype="float32"),
    "bfloat16": lambda: tb.to_numpy(SQUARE, dtype="bfloat16"),
    "transposed": lambda: tb.to_numpy(SQUARE, out=np.zeros((512, 512), "float32", order="F")),
    "half into out": lambda: tb.to_numpy(SQUARE, out=np.zeros((512, 512), "float16")),
    "large": lambda: tb.to_numpy(LARGE, copy=True)[:3],
    "large into out": lambda: tb.to_numpy(LARGE, out=np.zeros_like(LARGE))[:3],
    "a tree": lambda: tb.tree.to_numpy([LARGE, SQUARE], copy=True)[1],
    "a tree into a tree": lambda: tb.tree.to_numpy([SQUARE], out=[np.zeros((512, 512), "float16")])[0],
    "a list": lambda: tb.to_numpy([SQUARE, SQUARE], dtype="float16")[1],
}


@pytest.fixture(autouse=True, params=["decided there", "known"])
def known(request, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    _remember._asked.clear()
    yield request.param == "known"
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_become_arrays_of_the_same_values(name, mode, known):
    call = ARRAYS[name]
    wanted = call()
    for _ in range(2):
        if known:
            call()
        made = MODES[mode](call)
        assert type(made) is np.ndarray
        assert (made.dtype, made.tolist()) == (wanted.dtype, wanted.tolist())


TENSOR = torch.from_numpy(SQUARE)
TORCHS: dict[str, Callable[[], Any]] = {
    "large": lambda: tb.to_torch(LARGE, copy=True)[:3],
    "half": lambda: tb.to_torch(SQUARE, dtype="float16"),
    "transposed into a tensor": lambda: tb.to_torch(SQUARE.T, out=PLAIN),
    "half into a tensor": lambda: tb.to_torch(SQUARE, out=INTO),
    "large into a tensor": lambda: tb.to_torch(LARGE, out=WIDE)[:3],
}
PLAIN, INTO, WIDE = torch.zeros(512, 512), torch.zeros(512, 512, dtype=torch.float16), torch.zeros(HUGE // 4)


@pytest.mark.parametrize("name", TORCHS)
def test_arrays_become_tensors_of_the_same_values_inside_functionalize(name, known):
    call = TORCHS[name]
    wanted = call().clone()
    for _ in range(2):
        PLAIN.zero_(), INTO.zero_(), WIDE.zero_()
        made = functionalized(call)
        assert torch.equal(made, wanted)


CAPTURED: dict[str, Callable[[], Any]] = {
    "half": lambda: tb.to_numpy(TENSOR, dtype="float16"),
    "from half": lambda: tb.to_numpy(TENSOR_HALF, dtype="float32"),
    "small half": lambda: tb.to_numpy(TENSOR[0], dtype="float16"),
    "small": lambda: tb.to_numpy(TENSOR[0], dtype="int32"),
    "copied": lambda: tb.to_numpy(TENSOR, copy=True),
    "transposed": lambda: tb.to_numpy(TENSOR, out=np.zeros((512, 512), "float32", order="F")),
    "half into out": lambda: tb.to_numpy(TENSOR, out=np.zeros((512, 512), "float16")),
    "large": lambda: tb.to_numpy(FULL, copy=True)[:3],
    "large into out": lambda: tb.to_numpy(FULL, out=np.zeros(HUGE // 4, "float32"))[:3],
    "conjugate": lambda: tb.to_numpy(torch.full((3,), 1 + 1j).conj()),
    "graph": lambda: tb.to_numpy(torch.ones(3, requires_grad=True) * 2),
    "shared": lambda: tb.to_numpy(TENSOR),
}
TENSOR_HALF, FULL = TENSOR.half(), torch.from_numpy(LARGE)
REFUSED = ("small half", "small", "half", "from half", "large", "conjugate", "graph")


@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_tensor_gives_its_values_or_is_refused_inside_functionalize(name, known):
    call = CAPTURED[name]
    wanted = call()
    for _ in range(2):
        if known:
            call()
        if name in REFUSED:
            with pytest.raises(tb.UnsupportedArrayError, match=r"^to_numpy: .*functionalization.*\nConvert outside"):
                functionalized(call)
            continue
        made = functionalized(call)
        assert (made.dtype, made.tolist()) == (wanted.dtype, wanted.tolist())


def test_a_model_is_exported_with_the_values_of_its_arrays():
    table = np.arange(6, dtype="float16").reshape(2, 3)

    class Model(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x + float(tb.to_numpy(table, dtype="float32").sum())

    exported = torch.export.export(Model(), (torch.zeros(2),), strict=False)
    assert exported.module()(torch.zeros(2)).tolist() == [15, 15]


@pytest.mark.parametrize("mode", MODES)
def test_the_plan_says_that_numpy_makes_the_copy(mode):
    said = MODES[mode](lambda: [step.by for step in tb.plan(SQUARE, "numpy", dtype="float16").steps if step.kind])
    assert said == ["numpy"]
    assert [step.by for step in tb.plan(SQUARE, "numpy", dtype="float16").steps if step.kind] == ["torch"]
