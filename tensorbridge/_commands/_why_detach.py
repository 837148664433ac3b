"""The runs behind docs/why-detach.md: who may write into a tensor's memory, and what becomes of the gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

import tensorbridge as tb

RIGHT = [8.0, 16.0]  # of the sum of (2 x) ** 2 at x = [1, 2]: 8 x


class Run(NamedTuple):
    write: str  # what was done between forward and backward
    outcome: str  # "gradients right", "gradients WRONG, no error", or who refused
    gradient: list[float] | None  # what backward left in .grad; None: it did not get that far


def _torch_write(y: Any) -> None:
    y.detach().zero_()


def _numpy_write(y: Any) -> None:
    y.detach().numpy()[:] = 0


def _no_grad_write(y: Any) -> None:
    import torch

    with torch.no_grad():
        y.numpy()[:] = 0


def _bridge_write(y: Any) -> None:
    tb.to_numpy(y)[:] = 0


def _bridge_copy(y: Any) -> None:
    tb.to_numpy(y, copy=True)[:] = 0


def _editing(y: Any) -> None:
    with tb.editing(y) as array:
        array[:] = 0


# y = 2 x requires grad, and the square saved it for backward.
RESULT_WRITES: dict[str, Callable[[Any], None]] = {
    "nothing": lambda y: None,
    "`y.detach().zero_()`": _torch_write,
    "`y.detach().numpy()[:] = 0`": _numpy_write,
    "`with torch.no_grad(): y.numpy()[:] = 0`": _no_grad_write,
    "`tb.to_numpy(y)[:] = 0`": _bridge_write,
    "`tb.to_numpy(y, copy=True)[:] = 0`": _bridge_copy,
    "`with tb.editing(y) as a: a[:] = 0`": _editing,
}
# batch does not require grad, but the product saved it for backward.
INPUT_WRITES: dict[str, Callable[[Any], None]] = {
    "nothing": lambda batch: None,
    "`batch.zero_()`": lambda batch: batch.zero_(),
    "`batch.numpy()[:] = 0`": lambda batch: batch.numpy().fill(0),
    "`with tb.editing(batch) as a: a[:] = 0`": _editing,
}


def result_runs() -> list[Run]:
    """Writes into an intermediate result: ``y = x * 2; z = (y ** 2).sum()``."""
    import torch

    runs = []
    for name, write in RESULT_WRITES.items():
        x = torch.tensor([1.0, 2.0], requires_grad=True, device="cpu")
        y = x * 2
        z = (y**2).sum()
        runs.append(_run(name, write, y, z, x, RIGHT))
    return runs


def input_runs() -> list[Run]:
    """Writes into an input that does not require grad: ``loss = (w * batch).sum()``."""
    import torch

    runs = []
    for name, write in INPUT_WRITES.items():
        w = torch.tensor([1.0, 1.0], requires_grad=True, device="cpu")
        batch = torch.tensor([3.0, 4.0], device="cpu")
        loss = (w * batch).sum()
        runs.append(_run(name, write, batch, loss, w, [3.0, 4.0]))
    return runs


def _run(name: str, write: Callable[[Any], None], target: Any, end: Any, leaf: Any, right: list[float]) -> Run:
    refused = ""
    try:
        write(target)
    except ValueError as error:
        refused = f"NumPy refuses: {error}; "
    try:
        end.backward()
    except RuntimeError as error:
        reason = "modified by an inplace operation"
        if reason not in str(error):
            raise
        return Run(name, f"backward raises: {reason}", None)
    gradient = leaf.grad.tolist()
    return Run(name, refused + ("gradients right" if gradient == right else "**gradients wrong, no error**"), gradient)


def table(runs: list[Run]) -> str:
    lines = ["| between forward and backward | then | gradient |", "|---|---|---|"]
    for run in runs:
        gradient = "none" if run.gradient is None else f"`{run.gradient}`"
        lines.append(f"| {run.write} | {run.outcome} | {gradient} |")
    return "\n".join(lines)


def figure(path: str) -> None:
    """The picture of ``((x @ w) ** 2).sum()`` that the page shows."""
    import torch

    x = torch.tensor([[1.0, 2.0]], device="cpu")
    w = torch.tensor([[3.0], [4.0]], requires_grad=True, device="cpu")
    y = x @ w
    z = y**2
    tb.autograd_graph(z).save(path)


def main() -> int:
    if find_spec("torch") is None:
        print("This needs torch: pip install torch", file=sys.stderr)
        return 1
    plain = str.maketrans("", "", "`*")
    print("Why .detach() before .numpy()? A write through shared memory, and what backward makes of it.\n")
    for title, runs in (
        ("y = x * 2; z = (y ** 2).sum(); x = [1, 2]. Right is 8 x = [8, 16].", result_runs()),
        ("loss = (w * batch).sum(); batch = [3, 4] does not require grad. Right is batch.", input_runs()),
    ):
        print(title)
        for run in runs:
            gradient = "" if run.gradient is None else f": {np.array(run.gradient)}"
            print(f"  {run.write.translate(plain):<42} {run.outcome.translate(plain)}{gradient}")
        print()
    return 0
