"""Packing: small leaves that must cross the bus go as one block, in one transfer; which, is decided from their steps.

A leaf on the device stands alone in every way but memory: its version counter is its own, yet it lies in the block's
storage, so that `Tensor.record_stream` guards it. It keeps its block, which is why a block is never larger than BLOCK;
`torch.save` writes the block, and `resize_` beyond its size would run into its neighbours. A leaf on the host is copied
out of the block and stands alone altogether.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from tensorbridge import _dtypes
from tensorbridge._array import Device, Traits, c_strides
from tensorbridge._errors import DeviceError
from tensorbridge._step import Op, Plan, Step, bytes_text

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4 * 1024 * 1024  # bytes: what one kept leaf keeps at most
ALIGN = 256  # bytes: what CUDA's allocator gives any array of its own


class Route(NamedTuple):
    """How leaves of one kind cross the bus: what packing sees of them, but for the shape."""

    step: int  # which of the leaf's steps is the crossing
    kind: str  # "h2d" or "d2h"
    giver: str  # the framework that holds it before; "" on the host, where bytes are bytes
    receiver: str
    device: Device
    dtype: str

    @property
    def way(self) -> tuple[Any, ...]:
        """What leaves of one block have in common."""
        return self.kind, self.giver, self.receiver, self.device


class Run(NamedTuple):
    """Leaves of one kind and shape in a block, in equal steps."""

    leaves: tuple[int, ...]
    route: Route
    shape: tuple[int, ...]
    offset: int  # bytes
    step: int  # bytes
    nbytes: int  # of one leaf

    @property
    def rows(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape of all leaves in one array, and its strides in bytes."""
        within = c_strides(self.shape, _dtypes.itemsize(self.route.dtype))
        return (len(self.leaves), *self.shape), (self.step, *within)


class Block(NamedTuple):
    """Leaves that cross together."""

    runs: tuple[Run, ...]
    nbytes: int  # padding included

    @property
    def members(self) -> list[int]:
        return [i for run in self.runs for i in run.leaves]

    @property
    def route(self) -> Route:
        return self.runs[0].route


def route(traits: Traits, steps: Sequence[Step]) -> Route | None:
    """How arrays of a kind cross the bus, if they may do so in a block with others.

    They must be small, lie in C order (a block knows no strides), cross once, leave no graph behind that is wanted, and
    not be wanted in page-locked memory. Blocks are CUDA's: of another device nobody says how a block is cut there.
    """
    moves = [i for i, step in enumerate(steps) if step.kind in ("h2d", "d2h")]
    if traits.size != "small" or len(moves) != 1 or steps[moves[0]].op not in (Op.TO_DEVICE, Op.TO_HOST):
        return None
    step = steps[moves[0]]
    before = steps[moves[0] - 1].after if moves[0] else traits
    row = _dtypes.DTYPES.get(before.dtype)  # swapped bytes have no row
    if row is None or row.numpy is None:
        return None
    if before.graph or before.lazy or before.overlap or (before.order, before.spacing) != ("C", "dense"):
        return None
    if step.kind == "d2h" and step.after.pinned:
        return None
    up = step.op == Op.TO_DEVICE
    device = step.after.device if up else before.device
    if not device.is_cuda:
        return None
    giver = "" if up else before.framework
    return Route(moves[0], step.kind, giver, step.after.framework, device, before.dtype)


Group: TypeAlias = "tuple[Route, tuple[int, ...], list[int]]"  # leaves of one route and shape


def blocks(groups: Iterable[Group]) -> list[Block]:
    """The blocks in which leaves cross; one that would be alone in its block crosses by itself."""
    ways: dict[Any, list[Group]] = {}
    for group in groups:
        ways.setdefault(group[0].way, []).append(group)
    return [block for way in ways.values() for block in _filled(way) if len(block.members) > 1]


def _filled(groups: Iterable[Group]) -> list[Block]:
    """Blocks for leaves that go one way, one after the other, each as full as the cap allows."""
    found: list[Block] = []
    runs: list[Run] = []
    end = 0
    for route, shape, members in groups:
        nbytes = math.prod(shape) * _dtypes.itemsize(route.dtype)
        step = -(-nbytes // ALIGN) * ALIGN
        left = members
        while left:
            room = (BLOCK - end) // step
            if room:
                runs.append(Run(tuple(left[:room]), route, shape, end, step, nbytes))
                end += step * len(left[:room])
                left = left[room:]
            if left:
                found.append(Block(tuple(runs), end))
                runs, end = [], 0
    return [*found, Block(tuple(runs), end)]


def planned(plan: Plan, block: Block) -> Plan:
    """The plan of a leaf that crosses in a block, with what packing adds to it."""
    at, step = next((i, step) for i, step in enumerate(plan.steps) if step.kind == block.route.kind)
    before = plan.steps[at - 1].after if at else Traits(plan.source.framework, plan.source.device)
    others = f"a block of {bytes_text(block.nbytes)} with {len(block.members) - 1} more"
    if block.route.kind == "h2d":
        packed = Step(Op.PACK, f"into {others}: one transfer", step.nbytes, "h2h", before)
        steps = (*plan.steps[:at], packed, *plan.steps[at:])
        return plan._replace(steps=steps, bytes_moved=plan.bytes_moved + step.nbytes, blocking=False)
    packed = Step(Op.PACK, f"into {others}: one transfer", step.nbytes, "d2d", before)
    alone = Step(Op.COPY, "out of the block, into memory of its own", step.nbytes, "h2h", step.after)
    steps = (*plan.steps[:at], packed, step, alone, *plan.steps[at + 1 :])
    return plan._replace(steps=steps, bytes_moved=plan.bytes_moved + 2 * step.nbytes)


EXTRA = {"h2d": {"h2h"}, "d2h": {"d2d", "h2h"}}  # the kinds of move that packing adds


# -- Performing


class Bus(Protocol):
    """What a block needs of the device; a test puts a recorder in its place."""

    def host_block(self, nbytes: int) -> Any: ...  # host memory to upload from, as a flat uint8 array

    def up(self, host: Any, device: Device) -> Any: ...  # the block on the device, flat uint8

    def down(self, block: Any, device: Device) -> Any: ...  # the block on the host, as a flat uint8 array


def _rows(run: Run, block: Any) -> Any:
    """The leaves of a run as rows of the host block, of the carrier type."""
    row, (shape, strides) = _dtypes.DTYPES[run.route.dtype], run.rows
    return np.ndarray(shape, row.carrier or row.numpy, block, run.offset, strides)


def upload(block: Block, arrays: Sequence[Sequence[Any]], bus: Bus) -> list[Sequence[Any]]:
    """Host arrays of NumPy or torch, run by run, as arrays of the receiver on the device."""
    host = bus.host_block(block.nbytes)
    for run, members in zip(block.runs, arrays, strict=True):
        rows, carrier = _rows(run, host), _dtypes.DTYPES[run.route.dtype].carrier
        if not carrier and not isinstance(members[0], np.ndarray):
            _stack(rows, members)
            continue
        for i, array in enumerate(members):
            rows[i] = _carried(array, carrier) if carrier else array
    there = bus.up(host, block.route.device)
    return (_torch_leaves if block.route.receiver == "torch" else _cupy_leaves)(there, block.runs)


def _stack(rows: Any, members: Sequence[Tensor]) -> None:
    import torch

    torch.stack(list(members), out=torch.from_numpy(rows))


def _carried(array: Any, carrier: str) -> Any:
    """A host array as NumPy, under its carrier type."""
    if isinstance(array, np.ndarray):
        return array.view(carrier)
    import torch

    return array.view(getattr(torch, carrier)).numpy()


def _torch_leaves(block: Tensor, runs: Sequence[Run]) -> list[Sequence[Tensor]]:
    """Tensors over the block's storage, each with a version counter of its own.

    Below autograd's dispatch a view is just a tensor. Where that is no longer so, `Tensor.data` makes it one.
    """
    import torch

    below: Any = getattr(torch._C, "_AutoDispatchBelowADInplaceOrView", nullcontext)
    with below():
        typed = {name: block.view(getattr(torch, _dtypes.DTYPES[name].torch)) for name in {r.route.dtype for r in runs}}
        found: list[Sequence[Tensor]] = []
        for run in runs:
            whole = typed[run.route.dtype]
            if len(run.leaves) == 1:
                start = run.offset // whole.element_size()
                found.append([whole.as_strided(run.shape, c_strides(run.shape, 1), start)])
            else:
                found.append(_torch_rows(whole, run).unbind(0))
    return found if found[0][0]._base is None else [[leaf.data for leaf in leaves] for leaves in found]


def _torch_rows(typed: Tensor, run: Run) -> Tensor:
    itemsize, (shape, strides) = typed.element_size(), run.rows
    return typed.as_strided(shape, [s // itemsize for s in strides], run.offset // itemsize)


def _cupy_leaves(block: Any, runs: Sequence[Run]) -> list[Sequence[Any]]:
    import cupy

    def leaves(run: Run) -> Sequence[Any]:
        dtype, start = _dtypes.DTYPES[run.route.dtype].numpy, block.data + run.offset
        return [cupy.ndarray(run.shape, dtype, start + i * run.step) for i in range(len(run.leaves))]

    return [leaves(run) for run in runs]


def download(block: Block, arrays: Sequence[Sequence[Any]], bus: Bus) -> list[Sequence[Any]]:
    """Arrays on the device, run by run, as NumPy arrays with memory of their own."""
    fill = _fill_torch_block if block.route.giver == "torch" else _fill_cupy_block
    host = bus.down(fill(block, arrays), block.route.device)
    found: list[Sequence[Any]] = []
    for run in block.runs:
        rows, row = _rows(run, host), _dtypes.DTYPES[run.route.dtype]
        own = [rows[i, ...].copy() for i in range(len(run.leaves))]
        found.append([a.view(row.numpy) for a in own] if row.carrier else own)
    return found


_OPAQUE = {"uint16": "int16", "uint32": "int32", "uint64": "int64"}  # of which torch's kernels know few


def _fill_torch_block(block: Block, arrays: Sequence[Sequence[Tensor]]) -> Tensor:
    """One kernel a run."""
    import torch

    there = torch.empty(block.nbytes, dtype=torch.uint8, device=arrays[0][0].device)
    for run, members in zip(block.runs, arrays, strict=True):
        row = _dtypes.DTYPES[run.route.dtype]
        plain = _OPAQUE.get(row.name) or row.carrier
        dtype = getattr(torch, plain or row.torch)
        parts = [t.view(dtype) for t in members] if plain else list(members)
        torch.stack(parts, out=_torch_rows(there.view(dtype), run))
    return there


def _fill_cupy_block(block: Block, arrays: Sequence[Sequence[Any]]) -> Any:
    import cupy

    with arrays[0][0].device:
        there = cupy.empty(block.nbytes, dtype=cupy.uint8)
        for run, members in zip(block.runs, arrays, strict=True):
            dtype, (shape, strides) = _dtypes.DTYPES[run.route.dtype].numpy, run.rows
            cupy.stack(members, out=cupy.ndarray(shape, dtype, there.data + run.offset, strides))
    return there


class Staging:
    """Blocks go from pinned memory, which is kept until they have arrived; the host does not wait for that."""

    def __init__(self, framework: str) -> None:
        self.framework = framework
        self.pinned = True

    def host_block(self, nbytes: int) -> Any:
        from tensorbridge._cuda import _staging

        try:
            return _staging.pinned_empty(nbytes)
        except DeviceError:  # there is no more of it: ordinary memory will do, and is waited for
            self.pinned = False
            return np.empty(nbytes, np.uint8)

    def up(self, host: Any, device: Device) -> Any:
        from tensorbridge._cuda import _staging

        road = {"pinned": self.pinned, "non_blocking": self.pinned}
        return _staging.upload(host, framework=self.framework, index=device.index, **road)

    def down(self, block: Any, device: Device) -> Any:
        from tensorbridge._cuda import _staging

        return _staging.download(block, framework=self.framework, index=device.index)


def bus_for(block: Block) -> Bus:
    return Staging(block.route.giver or block.route.receiver)
