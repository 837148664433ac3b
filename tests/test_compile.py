"""Inside torch.compile conversions run eagerly: the same result, and no warning."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import tensorbridge as tb
from tensorbridge import _eager


def there_and_back(x):
    y = x * 2
    array = tb.to_numpy(y)
    return tb.to_torch(array + 1) * 3 + tb.to_torch(array[::-1])


def with_everything(x):
    assert tb.plan(x, "torch").zero_copy
    assert tb.describe(x).shape == tuple(x.shape)
    with tb.copy_guard("allow"), tb.trace() as seen:
        stacked = tb.to_torch([x, x])
    assert seen.totals.conversions == 1
    return stacked.sum()


def while_edited(x):
    y = x.detach() * 2
    with tb.editing(y) as array:
        array[0] = 5.0
    return y * 3


def drawn(x):
    assert bool(tb.autograd_graph(x * 2).nodes) == x.requires_grad
    return x * 3


def watched(x):
    with tb.trace() as seen:
        tb.to_numpy(x)
    return x * len(seen.events)


def said(x):
    """What is asked of the records, and made for a person."""
    plan, transfer = tb.plan(x, "numpy"), tb.to_numpy_async(x.detach())
    with tb.trace() as seen:
        tb.to_numpy(x)
    for text in (str(plan), repr(plan), str(tb.describe(x)), str(tb.info()), seen.report(), repr(transfer)):
        assert text
    assert str(tb.tree.plan([x], "numpy"))
    assert tb.info().tensorbridge
    assert seen.totals.conversions
    return x * (len(transfer.result()) + transfer.done())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", [there_and_back, with_everything, while_edited, drawn, watched, said])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiled_code_gives_the_same_result_without_a_warning(function, backend, requires_grad):
    torch.compiler.reset()
    compiled = torch.compile(function, backend=backend)
    x = torch.ones(3, requires_grad=requires_grad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert torch.equal(compiled(x), function(x))


def test_first_use_in_compiled_code_gives_the_same_result():
    code = """
import tensorbridge as tb, torch
def f(x):
    return tb.to_torch(tb.to_numpy(x * 2) + 1)
x = torch.ones(3, requires_grad=True)
assert torch.equal(torch.compile(f, backend="eager")(x), f(x))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False)
    assert done.returncode == 0


def test_another_thread_may_take_the_last_mark(monkeypatch):
    class Shared(list):
        def __bool__(self):
            there = len(self) > 0
            if len(self) == 1:
                self.pop()
            return there

    monkeypatch.setattr(_eager, "unhidden", Shared([((lambda: 1).__code__, True), ((lambda: 2).__code__, True)]))
    _eager.hide_all()
    assert len(_eager.unhidden) == 0


def test_whether_compiled_code_calls_is_known_before_the_last_code_is_marked(monkeypatch):
    """Another thread that finds none left to be marked asks at once."""
    frames = torch._C._dynamo.eval_frame
    mark, known = frames.set_code_exec_strategy, []

    def marked(*args):
        known.append(_eager.compiling is frames.get_eval_frame_callback)
        mark(*args)

    monkeypatch.setattr(frames, "set_code_exec_strategy", marked)
    monkeypatch.setattr(_eager, "compiling", lambda: None)
    monkeypatch.setattr(_eager, "unhidden", [((lambda: 1).__code__, True)])
    _eager.hide_all()
    assert known == [True]


def listed_ahead(x):
    return list(tb.prefetch([x], device="cpu"))


@pytest.mark.parametrize("function", [there_and_back, with_everything, while_edited, drawn, watched, listed_ahead])
def test_where_a_graph_may_not_break_torch_says_what_to_do(function):
    text = (
        "(reason: tensorbridge runs between compiled graphs, never in one, so fullgraph=True and strict export are "
        "impossible around it: convert before or after the compiled function, or leave fullgraph=True out; there is no "
        "call to remove)"
    )

    class Module(torch.nn.Module):
        def forward(self, x):
            return function(x)

    torch.compiler.reset()
    for call in (
        lambda: torch.compile(function, fullgraph=True, backend="eager")(torch.ones(3)),
        lambda: torch.export.export(Module(), (torch.ones(3),), strict=True),
    ):
        with pytest.raises(Exception, match=re.escape(text)) as caught:
            call()
        assert type(caught.value).__module__.startswith("torch.")


def test_export_that_is_not_strict_is_refused_by_name():
    class Module(torch.nn.Module):
        def forward(self, x):
            return there_and_back(x)

    with pytest.raises(tb.UnsupportedArrayError) as caught:
        torch.export.export(Module(), (torch.ones(3),), strict=False)
    assert str(caught.value).splitlines()[-1] == "Convert outside FakeTensorMode, torch.export or tracing."


# Compiled code takes an array for a tensor of its own: it drops the read-only flag, and may write to the array before
# or after it reads the tensor that stands on the same memory. So nothing is shared with it.


def writes_a_saved_value(q):
    y = q * 2
    z = (y**2).sum()
    tb.to_numpy(y)[:] = 0
    return z


def writes_a_weight(p):
    tb.to_numpy(p)[0] = 9
    return (p * 1).sum()


def writes_and_reads(q):
    z = q * 2
    n = tb.to_numpy(z)
    n[0] = 0
    return z.sum() + n[1]


def writes_a_leaf_of_a_tree(q):
    z = q * 2
    tb.tree.to_numpy({"z": z})["z"][:] = 0
    return (z**2).sum()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", [writes_a_saved_value, writes_a_weight, writes_and_reads, writes_a_leaf_of_a_tree])
def test_what_compiled_code_writes_to_an_array_changes_no_tensor(function, backend):
    torch.compiler.reset()
    q = torch.tensor([1.0, 2.0], requires_grad=function is not writes_and_reads)
    values = {writes_a_saved_value: 20.0, writes_a_weight: 3.0, writes_and_reads: 10.0, writes_a_leaf_of_a_tree: 20.0}
    result = torch.compile(function, backend=backend)(q)
    assert result.item() == values[function]
    assert q.tolist() == [1.0, 2.0]
    if q.requires_grad:
        result.backward()
        assert q.grad.tolist() == ([1.0, 1.0] if function is writes_a_weight else [8.0, 16.0])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("convert", [tb.to_torch, lambda a: tb.tree.to_torch([a])[0]], ids=["array", "tree"])
def test_what_compiled_code_writes_to_a_tensor_changes_no_array(convert, backend):
    torch.compiler.reset()

    def function(q, a):
        t = convert(a)
        t += 1
        return t * q

    a = np.ones(2, "float32")
    a.flags.writeable = False
    assert torch.compile(function, backend=backend)(torch.ones(2), a).tolist() == [2.0, 2.0]
    assert a.tolist() == [1.0, 1.0]


BY_OTHER_WAYS = {
    "prefetch": lambda x: next(tb.prefetch([x], device="cpu")),
    "prefetch of a tree": lambda x: next(tb.prefetch([{"x": x}], device="cpu"))["x"],
    "prefetch to NumPy": lambda x: next(tb.prefetch([x], to="numpy", device="cpu")),
    "prefetch with a transform": lambda x: next(tb.prefetch([x], device="cpu", transform=tb.to_torch)),
    "async": lambda x: tb.to_numpy_async(x).result(),
    "async, a tree": lambda x: tb.to_numpy_async({"x": x}).result()["x"],
    "a list": lambda x: tb.to_numpy([x])[0],
    "collate": lambda x: tb.collate([x])[0],
}


@pytest.mark.parametrize("way", BY_OTHER_WAYS)
@pytest.mark.parametrize("source", ["array", "tensor"])
def test_no_other_way_shares_an_array_with_compiled_code(way, source):
    torch.compiler.reset()
    made = []

    @torch.compiler.disable
    def keep(x):
        made.append(x)

    def function(q, x):
        keep(BY_OTHER_WAYS[way](x))
        return q * 2

    x = np.arange(3.0) if source == "array" else torch.arange(3.0)
    torch.compile(function, backend="eager")(torch.ones(2), x)
    assert made[0].tolist() == [0.0, 1.0, 2.0]
    both_torch = source == "tensor" and isinstance(made[0], torch.Tensor)
    assert both_torch or not tb.shares_memory(made[0], x)


def test_sharing_with_compiled_code_is_refused_where_it_is_asked_for():
    torch.compiler.reset()
    says = "compiled code takes an array for a tensor of its own"
    function = torch.compile(lambda q: tb.to_numpy(q, copy=False)[0], backend="eager")
    with pytest.raises(tb.CopyRequiredError, match=says):
        function(torch.ones(2))
    with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError, match=says):
        torch.compile(lambda q: tb.to_numpy(q * 2)[0], backend="eager")(torch.ones(2))


def test_a_plan_made_by_compiled_code_shows_the_copy():
    torch.compiler.reset()
    made = []

    def function(x):
        made.extend([tb.plan(x, "numpy"), tb.tree.plan([x], "numpy"), tb.plan(x, "torch")])
        return x * 2

    torch.compile(function, backend="eager")(torch.ones(3))
    assert [plan.bytes_moved for plan in made] == [12, 12, 0]


def test_a_function_that_is_not_compiled_shares_though_compiled_code_calls_it():
    torch.compiler.reset()
    shared = []

    @torch.compiler.disable
    def by_hand(t):
        shared.append(tb.shares_memory(tb.to_numpy(t), t))

    def function(q):
        by_hand(q)
        return q * 2

    torch.compile(function, backend="eager")(torch.ones(2))
    assert shared == [True]


@pytest.mark.parametrize(
    "name", ["set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction", "get_eval_frame_callback"]
)
def test_a_torch_without_the_names_by_which_code_is_hidden_is_no_error(name):
    code = f"""
import torch
delattr(torch._C._dynamo.eval_frame, {name!r})
import numpy as np, tensorbridge as tb
print(tb.to_torch(np.ones(3)).sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "3.0\n", done.stderr
