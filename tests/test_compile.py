"""Inside torch.compile conversions run eagerly: the same result, and no warning."""

from __future__ import annotations

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
    assert tb.plan(x, "numpy").zero_copy
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


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", [there_and_back, with_everything, while_edited, drawn, watched])
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


def test_carried_array_is_the_same_memory_and_read_only():
    base = np.arange(12.0).reshape(3, 4)[::-1, ::2]
    base.setflags(write=False)
    carried = _eager.carried(base)
    assert np.array_equal(carried, base)
    assert not carried.flags.writeable
    assert np.shares_memory(carried, base)
    carried.flags.writeable = True  # what Dynamo does
