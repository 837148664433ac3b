"""Packing: small leaves that must cross the bus go as one block, in one transfer; which, is decided from their steps.

A leaf on the device stands alone in every way but memory: its version counter is its own, yet it lies in the block's
storage, so that `Tensor.record_stream` guards it. It keeps its block, which is why a block is never larger than BLOCK;
`torch.save` writes the block, and `resize_` beyond its size would run into its neighbours. A leaf on the host is copied
out of the block and stands alone altogether.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from tensorbridge import _dtypes
from tensorbridge._array import SMALL, Device, Traits
from tensorbridge._plan import Op, Plan, Step, bytes_text

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4 * 1024 * 1024  # bytes: what one kept leaf keeps at most
ALIGN = 256  # bytes: what CUDA's allocator gives any array of its own


class Crossing(NamedTuple):
    """What packing sees of a leaf: the one step with which it crosses the bus, and what lies in memory then."""

    step: int  # its index among the leaf's steps
    kind: str  # "h2d" or "d2h"
    giver: str  # the framework that holds it before; "" on the host, where bytes are bytes
    receiver: str
    device: Device
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _dtypes.DTYPES[self.dtype].itemsize


class Part(NamedTuple):
    """One leaf's place in a block."""

    leaf: int
    offset: int  # bytes
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Block(NamedTuple):
    """Leaves that cross together. Parts of one dtype and shape follow one another in equal steps."""

    crossing: Crossing  # of the first leaf
    parts: tuple[Part, ...]
    nbytes: int  # padding included


def crossing(traits: Traits, steps: Sequence[Step], shape: tuple[int, ...]) -> Crossing | None:
    """How a leaf crosses the bus, if it may do so in a block with others.

    It must be small, lie in C order (a block knows no strides), cross once, and leave no graph behind that is wanted.
    """
    moves = [i for i, step in enumerate(steps) if step.kind in ("h2d", "d2h")]
    if len(moves) != 1 or steps[moves[0]].op not in (Op.TO_DEVICE, Op.TO_HOST):
        return None
    step = steps[moves[0]]
    before = steps[moves[0] - 1].after if moves[0] else traits
    if before.graph or before.lazy or before.overlap or (before.order, before.spacing) != ("C", "dense"):
        return None
    row = _dtypes.DTYPES.get(before.dtype)  # swapped bytes have no row
    if row is None or row.numpy is None or any(later.op == Op.FILL for later in steps):
        return None
    up = step.op == Op.TO_DEVICE
    device = step.after.device if up else before.device
    found = Crossing(
        moves[0], step.kind, "" if up else before.framework, step.after.framework, device, before.dtype, tuple(shape)
    )
    return found if found.nbytes < SMALL else None


def blocks(leaves: Sequence[Crossing | None]) -> list[Block]:
    """The blocks in which these leaves cross; those that are in none cross by themselves."""
    routes: dict[tuple[Any, ...], list[int]] = {}
    for i, leaf in enumerate(leaves):
        if leaf is not None:
            routes.setdefault((leaf.kind, leaf.giver, leaf.receiver, leaf.device), []).append(i)
    found: list[Block] = []
    for members in routes.values():
        members.sort(key=lambda i: (leaves[i].dtype, leaves[i].shape))  # type: ignore[union-attr]
        parts: list[Part] = []
        end = 0
        for i in members:
            leaf = leaves[i]
            assert leaf is not None
            if end + leaf.nbytes > BLOCK:
                found.append(_block(leaves, parts, end))
                parts, end = [], 0
            parts.append(Part(i, end, leaf.dtype, leaf.shape, leaf.nbytes))
            end += -(-leaf.nbytes // ALIGN) * ALIGN
        found.append(_block(leaves, parts, end))
    return [block for block in found if len(block.parts) > 1]


def _block(leaves: Sequence[Crossing | None], parts: list[Part], end: int) -> Block:
    first = leaves[parts[0].leaf]
    assert first is not None
    return Block(first, tuple(parts), end)


def planned(plan: Plan, at: int, block: Block) -> Plan:
    """The plan of a leaf that crosses at step `at`, with what packing adds to it."""
    step = plan.steps[at]
    before = plan.steps[at - 1].after if at else Traits(plan.source.framework, plan.source.device)
    others = f"a block of {bytes_text(block.nbytes)} with {len(block.parts) - 1} more"
    if block.crossing.kind == "h2d":
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


class _Run(NamedTuple):
    """Parts of one dtype and shape, in equal steps."""

    parts: tuple[Part, ...]
    step: int  # bytes

    @property
    def first(self) -> Part:
        return self.parts[0]

    @property
    def dtype(self) -> _dtypes.Dtype:
        return _dtypes.DTYPES[self.first.dtype]

    def rows(self, block: Any) -> Any:
        """A view of the block, (parts, \\*shape), of the carrier type."""
        carrier = np.dtype(self.dtype.carrier or self.dtype.numpy)
        shape = (len(self.parts), *self.first.shape)
        strides = (self.step, *_c_strides(self.first.shape, carrier.itemsize))
        return np.ndarray(shape, carrier, block, self.first.offset, strides)


def _c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = [itemsize] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def _runs(block: Block) -> list[_Run]:
    found: list[_Run] = []
    start = 0
    for i in range(1, len(block.parts) + 1):
        first = block.parts[start]
        if i == len(block.parts) or (block.parts[i].dtype, block.parts[i].shape) != (first.dtype, first.shape):
            found.append(_Run(block.parts[start:i], -(-first.nbytes // ALIGN) * ALIGN))
            start = i
    return found


def upload(block: Block, arrays: Sequence[Any], bus: Bus) -> list[Any]:
    """The parts of a block, host arrays of NumPy or torch, as arrays of the receiver on the device, in order."""
    host = bus.host_block(block.nbytes)
    runs = _runs(block)
    start = 0
    for run in runs:
        rows = run.rows(host)
        for i in range(len(run.parts)):
            rows[i] = _carried(arrays[start + i], run.dtype)
        start += len(run.parts)
    there = bus.up(host, block.crossing.device)
    cut = _torch_parts if block.crossing.receiver == "torch" else _cupy_parts
    return [part for run in runs for part in cut(there, run)]


def _carried(array: Any, dtype: _dtypes.Dtype) -> Any:
    """A host array as NumPy, under its carrier type."""
    if isinstance(array, np.ndarray):
        return array.view(dtype.carrier) if dtype.carrier else array
    import torch

    return (array.view(getattr(torch, dtype.carrier)) if dtype.carrier else array).numpy()


def _torch_parts(block: Tensor, run: _Run) -> list[Tensor]:
    """Tensors over the block's storage, each with a version counter of its own, which is what `Tensor.data` gives."""
    import torch

    dtype = getattr(torch, run.dtype.torch)
    return [row.data for row in _torch_rows(block, run, dtype).unbind(0)]


def _torch_rows(block: Tensor, run: _Run, dtype: Any) -> Tensor:
    itemsize = run.dtype.itemsize
    shape = (len(run.parts), *run.first.shape)
    strides = (run.step // itemsize, *_c_strides(run.first.shape, 1))
    return block.view(dtype).as_strided(shape, strides, run.first.offset // itemsize)


def _cupy_parts(block: Any, run: _Run) -> list[Any]:
    import cupy

    return [cupy.ndarray(part.shape, run.dtype.numpy, block.data + part.offset) for part in run.parts]


def download(block: Block, arrays: Sequence[Any], bus: Bus) -> list[Any]:
    """The parts of a block, arrays on the device, as NumPy arrays with memory of their own, in order."""
    giver = block.crossing.giver
    there = _torch_block(block, arrays) if giver == "torch" else _cupy_block(block, arrays)
    host = bus.down(there, block.crossing.device)
    out: list[Any] = []
    for run in _runs(block):
        rows = run.rows(host)
        own = [rows[i, ...].copy() for i in range(len(run.parts))]
        out.extend([a.view(run.dtype.numpy) for a in own] if run.dtype.carrier else own)
    return out


def _torch_block(block: Block, arrays: Sequence[Tensor]) -> Tensor:
    """One kernel for the parts of one dtype and shape."""
    import torch

    there = torch.empty(block.nbytes, dtype=torch.uint8, device=arrays[0].device)
    start = 0
    for run in _runs(block):
        parts = list(arrays[start : start + len(run.parts)])
        plain = _OPAQUE.get(run.first.dtype) or run.dtype.carrier
        dtype = getattr(torch, plain or run.dtype.torch)
        if plain:
            parts = [t.view(dtype) for t in parts]
        torch.stack(parts, out=_torch_rows(there, run, dtype))
        start += len(run.parts)
    return there


_OPAQUE = {"uint16": "int16", "uint32": "int32", "uint64": "int64"}  # of which torch's kernels know few


def _cupy_block(block: Block, arrays: Sequence[Any]) -> Any:
    import cupy

    with arrays[0].device:
        there = cupy.empty(block.nbytes, dtype=cupy.uint8)
        start = 0
        for run in _runs(block):
            shape = (len(run.parts), *run.first.shape)
            strides = (run.step, *_c_strides(run.first.shape, run.dtype.itemsize))
            rows = cupy.ndarray(shape, run.dtype.numpy, there.data + run.first.offset, strides)
            cupy.stack(arrays[start : start + len(run.parts)], out=rows)
            start += len(run.parts)
    return there


class Staging:
    """Blocks go from pinned memory, which is kept until they have arrived; the host does not wait for that."""

    def __init__(self, framework: str) -> None:
        self.framework = framework

    def host_block(self, nbytes: int) -> Any:
        from tensorbridge import _staging

        return _staging.pinned_empty(nbytes)

    def up(self, host: Any, device: Device) -> Any:
        from tensorbridge import _staging

        return _staging.upload(host, framework=self.framework, index=device.index, pinned=True, non_blocking=True)

    def down(self, block: Any, device: Device) -> Any:
        from tensorbridge import _staging

        return _staging.download(block, framework=self.framework, index=device.index)


def bus_for(block: Block) -> Bus:
    return Staging(block.crossing.giver or block.crossing.receiver)
