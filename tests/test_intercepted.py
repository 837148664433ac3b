"""Where a mode or a transform answers for torch, its kernels may write nothing: arrays are made outside of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

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


def transformed(run: Callable[..., Any]) -> Callable[[Callable[[], Any]], Any]:
    def inside(call: Callable[[], Any]) -> Any:
        made: list[Any] = []

        def function(x: Any) -> Any:
            made.append(call())
            return (x * x).sum()

        run(function)(torch.ones(2, 2))
        return made[0]

    return inside


def jvp(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: torch.func.jvp(function, (x,), (x,))


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def in_passing_mode(call: Callable[[], Any]) -> Any:
    with Passing():
        return call()


TRANSFORMS = {
    "functionalize": functionalized,
    "grad": transformed(torch.func.grad),
    "vmap": transformed(torch.func.vmap),
    "jvp": transformed(jvp),
    "hessian": transformed(torch.func.hessian),
    "a mode": in_passing_mode,
}
MODES = {"fake": in_fake_mode, **{name: TRANSFORMS[name] for name in ("functionalize", "grad")}}
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
    "small half": lambda: tb.to_numpy(ROWS[0], dtype="float16"),
    "small": lambda: tb.to_numpy(ROWS[0], dtype="int32"),
    "copied": lambda: tb.to_numpy(TENSOR, copy=True),
    "transposed": lambda: tb.to_numpy(TENSOR, out=np.zeros((512, 512), "float32", order="F")),
    "half into out": lambda: tb.to_numpy(TENSOR, out=np.zeros((512, 512), "float16")),
    "large": lambda: tb.to_numpy(FULL, copy=True)[:3],
    "large into out": lambda: tb.to_numpy(FULL, out=np.zeros(HUGE // 4, "float32"))[:3],
    "conjugate": lambda: tb.to_numpy(CONJUGATE),
    "graph": lambda: tb.to_numpy(GRAPH),
    "shared": lambda: tb.to_numpy(TENSOR),
    "read-only": lambda: tb.to_numpy(TENSOR, writable=False),
    "a tree": lambda: tb.tree.to_numpy({"x": [TENSOR]}, dtype="float16")["x"][0],
    "a tree, shared": lambda: tb.tree.to_numpy({"x": [TENSOR, TENSOR_HALF]})["x"][1],
    "a list": lambda: tb.to_numpy(ROWS),
}
TENSOR_HALF, FULL, ROWS = TENSOR.half(), torch.from_numpy(LARGE), [TENSOR[0], TENSOR[1]]
CONJUGATE, GRAPH = torch.full((3,), 1 + 1j).conj(), torch.ones(3, requires_grad=True) * 2


@pytest.mark.parametrize("mode", TRANSFORMS)
@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_tensor_gives_its_values(name, mode, known):
    """It is a constant to the transform, which knows nothing of arrays."""
    call = CAPTURED[name]
    wanted = call()
    for _ in range(2):
        if known:
            call()
        made = TRANSFORMS[mode](call)
        assert (made.dtype, made.flags.writeable) == (wanted.dtype, wanted.flags.writeable)
        np.testing.assert_array_equal(made, wanted)


@pytest.mark.parametrize("mode", {**TRANSFORMS, **MODES})
@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"copy": True}], ids=str)
def test_the_plan_is_the_same_inside(mode, options):
    inside = {**TRANSFORMS, **MODES}[mode]
    for x in [SQUARE] if mode == "fake" else [SQUARE, TENSOR]:
        assert inside(lambda x=x: tb.plan(x, "numpy", **options)) == tb.plan(x, "numpy", **options)


def test_inside_fake_mode_a_real_tensor_is_refused():
    """torch itself takes it for a fake there, or refuses it."""
    for call in (lambda: tb.to_numpy(TENSOR), lambda: tb.plan(TENSOR, "numpy")):
        with pytest.raises(tb.UnsupportedArrayError, match="inside FakeTensorMode"):
            in_fake_mode(call)


@pytest.mark.parametrize("view", ["the whole", "a part", "read-only"])
def test_inside_fake_mode_a_view_of_a_real_tensor_becomes_what_an_array_becomes(view):
    a = torch.arange(6.0).numpy()
    a = {"the whole": a, "a part": a[2:], "read-only": a[:]}[view]
    options = {}
    if view == "read-only":
        a.setflags(write=False)
        options = {"share_readonly": True}
    for _ in range(3):
        with FakeTensorMode():
            made = tb.to_torch(a, **options)
            assert type(made) is type(tb.to_torch(np.ones(6)))
        assert (made.shape, made.dtype) == (a.shape, torch.float32)
    with Passing():
        assert tb.shares_memory(tb.to_torch(a, **options), a)


@pytest.mark.parametrize("mode", TRANSFORMS)
def test_what_is_shared_inside_is_shared(mode):
    t = torch.zeros(3)
    TRANSFORMS[mode](lambda: tb.to_numpy(t))[0] = 7
    assert t[0] == 7


BIG = np.array([1e300])


def test_the_modes_and_transforms_are_there_again_when_a_conversion_has_failed():
    stack: list[Any] = []

    def body(x: Any) -> Any:
        with np.errstate(over="raise"), pytest.raises(FloatingPointError):
            tb.to_numpy(BIG, dtype="float32")
        with pytest.raises(tb.UnsupportedArrayError, match="no memory of its own"):
            tb.to_numpy(x)
        stack.append(torch._C._functorch.peek_interpreter_stack())
        return (x * x).sum()

    with Passing():
        gradient = torch.func.vmap(torch.func.grad(body))(torch.ones(2, 2))
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is not None
    assert gradient.tolist() == [[2, 2], [2, 2]]
    assert stack[0] is not None


def test_a_model_is_exported_with_the_values_of_its_arrays():
    table = np.arange(6, dtype="float16").reshape(2, 3)

    class Model(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x + float(tb.to_numpy(table, dtype="float32").sum())

    exported = torch.export.export(Model(), (torch.zeros(2),), strict=False)
    assert exported.module()(torch.zeros(2)).tolist() == [15, 15]
