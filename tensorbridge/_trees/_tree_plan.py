"""What the conversion of a tree does, decided before it is done: the plan of every array in it, and their blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from tensorbridge import _eager, _options
from tensorbridge._adapters import is_scalar
from tensorbridge._array import ArrayInfo, Traits
from tensorbridge._options import PlanOptions, Unpack
from tensorbridge._step import Plan, bytes_text, step_lines
from tensorbridge._trees._containers import check_known, left_as
from tensorbridge._trees._fill import aligned, checked
from tensorbridge._trees._leaf import decided
from tensorbridge._trees._leaves import blocks_of, check_pack, outside, plan_of
from tensorbridge._trees._pack import Block
from tensorbridge._trees._tree import to_cupy, to_numpy, to_torch
from tensorbridge._trees._walk import flatten


class LeafPlan(NamedTuple):
    """What happens to one array of a tree."""

    path: str  # batch['obs'][1].mask
    plan: Plan
    same_as: str = ""  # the path of an array that is the same memory: converted once, there


class LeftPart(NamedTuple):
    """What is left as it is and might have been meant: an object that may hold arrays, and is not a container that
    tensorbridge knows; a list of numbers, of type "numbers"; an array of text, of type "text".
    """

    path: str
    type: str


class TreePlan(NamedTuple):
    """What the conversion of a tree does, decided before it is done. `str` is a table for a person."""

    target: str  # framework
    leaves: tuple[LeafPlan, ...]
    blocks: tuple[Block, ...]  # of small arrays that cross the bus together, each at most 4 MiB
    zero_copy: bool
    bytes_moved: int
    blocking: bool
    left: tuple[LeftPart, ...] = ()

    @_eager.eager
    def __str__(self) -> str:
        own = [leaf for leaf in self.leaves if not leaf.same_as]
        crossing = sum(any(step.kind in ("h2d", "d2h") for step in leaf.plan.steps) for leaf in own)
        transfers = crossing - sum(len(block.members) - 1 for block in self.blocks)
        end = "zero copy" if self.zero_copy else f"{bytes_text(self.bytes_moved)} moved"
        end += f", {transfers} transfer{'s' * (transfers != 1)}" if transfers else ""
        end += "; the host waits" if self.blocking else ""
        lines = [f"{len(self.leaves)} array{'s' * (len(self.leaves) != 1)} -> {self.target}: {end}"]
        groups: dict[Any, list[LeafPlan]] = defaultdict(list)
        for leaf in own:
            ends = f"{_kind(leaf.plan.source)} -> {_kind(leaf.plan.target)}"
            groups[ends, tuple((step.op, step.why) for step in leaf.plan.steps)].append(leaf)
        for (ends, _), members in groups.items():
            lines.append(f"{len(members)} x {ends}: {_some([leaf.path for leaf in members])}")
            columns = zip(*(leaf.plan.steps for leaf in members), strict=True)
            lines += step_lines(tuple(c[0]._replace(nbytes=sum(step.nbytes for step in c)) for c in columns))
        twice = [f"{leaf.path} is {leaf.same_as}" for leaf in self.leaves if leaf.same_as]
        if twice:
            lines.append(f"{len(twice)} x the same memory as another: {_some(twice)}")
        if self.left:
            lines.append(f"{len(self.left)} x left as it is: {_some([f'{x.path} ({x.type})' for x in self.left])}")
        return "\n".join(lines)

    @_eager.eager
    def __repr__(self) -> str:
        return str(self)


def _kind(array: ArrayInfo | Traits) -> str:
    return f"{array.framework} {array.dtype} on {array.device}{'' if array.writable else ', read-only'}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@_eager.noticing
def plan(
    tree: Any, to: Literal["numpy", "torch", "cupy"], *, pack: bool = True, **options: Unpack[PlanOptions]
) -> TreePlan:
    """Return the very steps that ``tree.to_numpy``, ``to_torch`` or ``to_cupy`` would perform, and perform none.

    Parameters
    ----------
    tree : nested containers of arrays
    to : "numpy", "torch" or "cupy"
    pack, **options
        Those of the function of that name.

    Returns
    -------
    TreePlan
        ``leaves`` (path, plan, same_as), ``blocks`` (what crosses the bus together), ``zero_copy``, ``bytes_moved``,
        ``blocking``, ``left`` (objects that may hold arrays, such as modules and generators, and are no containers
        that are known here); ``str(plan)`` is a table.

    Raises
    ------
    BridgeError, ValueError, TypeError
        What the conversion would raise; but a device or framework that is missing here is planned for, and whether a
        container keeps converted values is seen in the conversion alone (a dict that makes NumPy arrays of them does
        not: give ``dict(x)``). One that does not keep even its own (an `xarray.Dataset`) is refused here too.

    Cost
    ----
    No element is read; waits for nothing. Foreign objects are asked for their arrays, and may copy to give them. The
    containers are built once, of the arrays that they hold.

    Examples
    --------
    >>> import numpy as np
    >>> a = np.zeros((2, 3))
    >>> print(plan({"x": a, "y": [a[:, ::-1], a]}, "torch"))
    3 arrays -> torch: 48 B moved
    1 x numpy float64 on cpu -> torch float64 on cpu: batch['x']
      share  0 B   torch.from_numpy: the same memory
    1 x numpy float64 on cpu -> torch float64 on cpu: batch['y'][0]
      pack   48 B   torch has no negative strides
      share   0 B   torch.from_numpy: the same memory
    1 x the same memory as another: batch['y'][1] is batch['x']
    """
    every = _options.of_plan("tree.plan", _FUNCTIONS, to, {**options, "pack": pack})
    out = every.pop("out")
    check_pack(every.pop("pack"), f"tree.to_{to}")
    want = _options.want(to, f"tree.to_{to}", **every)
    flat = flatten(tree)
    if not flat.leaves:
        check_known(tree, to)
    paths = flat.paths()
    blocks: list[Block] = []
    if out is None:
        leaves, same = decided(flat, want, range(len(paths)), {}, planning=True)
        blocks = blocks_of(leaves) if pack else []
        alone = outside(blocks, leaves, flat, want, planning=True)
    else:
        leaves, same = checked(flat, aligned(flat, flatten(out), to), want, planning=True)
        alone = leaves
    plans = {leaf.place: plan_of(leaf, None) for leaf in alone}
    plans |= {leaves[i].place: plan_of(leaves[i], block) for block in blocks for i in block.members}
    if out is None:
        flat.built([*flat.leaves])  # of its own values: a container that cannot be built again is refused here too
    found = [LeafPlan(paths[i], plans[same.get(i, i)], paths[same[i]] if i in same else "") for i in range(len(paths))]
    own = [leaf.plan for leaf in found if not leaf.same_as]
    moved = sum(made.bytes_moved for made in own)
    blocking = any(made.blocking for made in own)
    return TreePlan(to, tuple(found), tuple(blocks), moved == 0, moved, blocking, _left(tree))


def _left(tree: Any) -> tuple[LeftPart, ...]:
    flat = flatten(tree, everything=True)
    numbers: list[LeftPart] = []
    others: dict[int, str] = {}
    for number, frame in enumerate(flat.frames):
        mine = range(frame.first, frame.first + frame.size)
        leaves = [flat.leaves[i] for i in mine]
        if type(frame.node) is list and leaves and not frame.inner and all(map(is_scalar, map(type, leaves))):
            numbers.append(LeftPart(flat.way(number), "numbers"))
        others |= {i: name for i, x in zip(mine, leaves, strict=True) if (name := left_as(x))}
    paths = flat.paths() if others else []
    return (*(LeftPart(paths[i], name) for i, name in others.items()), *numbers)


_FUNCTIONS: dict[str, Callable[..., Any]] = {"numpy": to_numpy, "torch": to_torch, "cupy": to_cupy}
