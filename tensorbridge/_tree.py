"""Trees of arrays: every array in a nested container is converted, and the containers come back as they were."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, Literal, NamedTuple

from tensorbridge import _api, _eager, _options
from tensorbridge._array import ArrayInfo, Traits
from tensorbridge._containers import Flat, flatten
from tensorbridge._leaf import NAMED, decided, name
from tensorbridge._leaves import aligned, blocks_of, converted, outside, plan_of
from tensorbridge._pack import Block
from tensorbridge._step import Plan, bytes_text, step_lines


@_eager.outermost
def to_numpy(
    tree: Any,
    *,
    dtype: Any = None,
    copy: bool | None = None,
    writable: bool | None = None,
    detach: bool = True,
    out: Any = None,
    pack: bool = True,
) -> Any:
    """Return `tree` with every array in it as a NumPy array on the host, sharing memory whenever that is safe.

    Parameters
    ----------
    tree : nested containers of arrays
        dict, list, tuple, namedtuple, dataclass, OrderedDict, defaultdict, deque; subclasses of Mapping, list, tuple;
        what is registered with torch's pytrees or optree; tables of pandas, polars and pyarrow.
    dtype, copy, writable, detach
        As for `tensorbridge.to_numpy`, for every array.
    out : tree of numpy.ndarray, optional
        Of the same structure; its arrays are filled, and it is returned.
    pack : bool
        Small arrays that cross the bus do so in one block. False moves them one by one.

    Returns
    -------
    containers of the same types, keys and order (a table becomes a dict of columns)
        What is not an array (text, None, numbers, bytes, sets) is the same object. The same memory twice stays one.

    Raises
    ------
    BridgeError
        What `tensorbridge.to_numpy` raises; the message begins with the leaf: ``batch['obs'][1].mask: ...``. A tree
        that contains itself is an `UnsupportedArrayError`.

    Cost
    ----
    That of each array, and about half a microsecond for the walk. Many small device arrays: one transfer.

    Examples
    --------
    >>> import torch
    >>> batch = {"obs": (torch.zeros(3), torch.ones(2)), "name": "a"}
    >>> to_numpy(batch)
    {'obs': (array([0., 0., 0.], dtype=float32), array([1., 1.], dtype=float32)), 'name': 'a'}
    """
    if _eager.unmarked:
        _eager.mark()
    return _to_numpy(tree, dtype, copy, writable, detach, out, pack, _eager.compiling() is not None)


@_eager.eager
def _to_numpy(
    tree: Any, dtype: Any, copy: Any, writable: Any, detach: Any, out: Any, pack: bool, compiling: bool
) -> Any:
    want = _options.want_numpy(dtype, copy, writable, detach, None)
    return converted(tree, want, out=out, pack=pack, finish=_eager.carried if compiling else None)


@_eager.eager
def to_torch(
    tree: Any,
    *,
    device: Any = None,
    dtype: Any = None,
    copy: bool | None = None,
    share_readonly: bool = False,
    detach: bool = False,
    pin_memory: bool = False,
    non_blocking: bool = False,
    out: Any = None,
    pack: bool = True,
) -> Any:
    """Return `tree` with every array in it as a torch tensor, sharing memory whenever that is safe.

    Parameters
    ----------
    tree : nested containers of arrays
        As for `tree.to_numpy`.
    device, dtype, copy, share_readonly, detach, pin_memory, non_blocking
        As for `tensorbridge.to_torch`, for every array.
    out : tree of torch.Tensor, optional
        Of the same structure; its tensors are filled, and it is returned.
    pack : bool
        Small arrays that go to a device are packed into blocks of up to 4 MiB, one transfer each. Each tensor stands
        alone, but keeps its block alive, and `torch.save` of it writes the block. False moves them one by one.

    Returns
    -------
    containers of the same types, keys and order (a table becomes a dict of columns)
        What is not an array is the same object. The same memory twice stays one: tied weights stay tied.

    Raises
    ------
    BridgeError
        What `tensorbridge.to_torch` raises; the message begins with the leaf: ``batch['obs'][1].mask: ...``.

    Cost
    ----
    That of each array, and about half a microsecond for the walk. Many small arrays to a device: one transfer.

    Examples
    --------
    >>> import numpy as np
    >>> to_torch([np.zeros(2), {"label": 3, "mask": np.ones(2, bool)}])
    [tensor([0., 0.], dtype=torch.float64), {'label': 3, 'mask': tensor([True, True])}]
    """
    _options.require("torch")
    want = _options.want_torch(device, dtype, copy, share_readonly, detach, pin_memory, non_blocking, None)
    return converted(tree, want, out=out, pack=pack)


@_eager.eager
def to_cupy(
    tree: Any,
    *,
    device: Any = None,
    dtype: Any = None,
    copy: bool | None = None,
    share_readonly: bool = False,
    detach: bool = True,
    non_blocking: bool = False,
    out: Any = None,
    pack: bool = True,
) -> Any:
    """Return `tree` with every array in it as a CuPy array, sharing device memory whenever that is safe.

    Parameters
    ----------
    tree : nested containers of arrays
        As for `tree.to_numpy`.
    device, dtype, copy, share_readonly, detach, non_blocking
        As for `tensorbridge.to_cupy`, for every array.
    out : tree of cupy.ndarray, optional
        Of the same structure; its arrays are filled, and it is returned.
    pack : bool
        As for `tree.to_torch`.

    Returns
    -------
    containers of the same types, keys and order (a table becomes a dict of columns)
        What is not an array is the same object. The same memory twice stays one.

    Raises
    ------
    BridgeError
        What `tensorbridge.to_cupy` raises; the message begins with the leaf.

    Cost
    ----
    That of each array; many small arrays from the host: one transfer.

    Examples
    --------
    >>> import numpy as np
    >>> print(plan({"a": np.zeros(3), "b": np.ones(5)}, "cupy"))
    2 arrays -> cupy: 128 B moved, 1 transfer
    2 x numpy float64 on cpu -> cupy float64 on cuda:0: batch['a'], batch['b']
      pack       64 B   into a block of 512 B with 1 more: one transfer
      to_device  64 B   the host to cuda:0
    """
    _options.require("cupy")
    want = _options.want_cupy(device, dtype, copy, share_readonly, detach, non_blocking, None)
    return converted(tree, want, out=out, pack=pack)


# -- The plan


class LeafPlan(NamedTuple):
    """What happens to one array of a tree."""

    path: str  # batch['obs'][1].mask
    plan: Plan
    same_as: str = ""  # the path of an array that is the same memory: converted once, there


class TreePlan(NamedTuple):
    """What the conversion of a tree does, decided before it is done. `str` is a table for a person."""

    target: str  # framework
    leaves: tuple[LeafPlan, ...]
    blocks: tuple[Block, ...]  # of small arrays that cross the bus together, each at most 4 MiB
    zero_copy: bool
    bytes_moved: int
    blocking: bool

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
            source, made = leaf.plan.source, leaf.plan.target
            kind = (
                source.framework,
                source.dtype,
                source.device,
                source.writable,
                made.dtype,
                made.device,
                made.writable,
            )
            groups[kind, tuple((step.op, step.why) for step in leaf.plan.steps)].append(leaf)
        for (kind, _), members in groups.items():
            framework, dtype, device, writable, made, there, result_writable = kind
            giver = f"{framework} {dtype} on {device}{'' if writable else ', read-only'}"
            made_there = f"{self.target} {made} on {there}{'' if result_writable else ', read-only'}"
            lines.append(f"{len(members)} x {giver} -> {made_there}: {_some([leaf.path for leaf in members])}")
            columns = zip(*(leaf.plan.steps for leaf in members), strict=True)
            lines += step_lines(tuple(c[0]._replace(nbytes=sum(step.nbytes for step in c)) for c in columns))
        twice = [f"{leaf.path} is {leaf.same_as}" for leaf in self.leaves if leaf.same_as]
        if twice:
            lines.append(f"{len(twice)} x the same memory as another: {_some(twice)}")
        return "\n".join(lines)


def _kind(array: ArrayInfo | Traits) -> tuple[Any, ...]:
    return array.framework, array.dtype, array.device, array.writable


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@_eager.eager
def plan(tree: Any, to: Literal["numpy", "torch", "cupy"], *, pack: bool = True, **options: Any) -> TreePlan:
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
        ``blocking``; ``str(plan)`` is a table.

    Raises
    ------
    BridgeError, ValueError, TypeError
        What the conversion would raise; but a device or framework that is missing here is planned for.

    Cost
    ----
    No element is read; waits for nothing.

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
    if to not in _FUNCTIONS:
        raise ValueError(f'tree.plan(to={to!r}): choose "numpy", "torch" or "cupy"')
    defaults = {
        name: p.default for name, p in signature(_FUNCTIONS[to]).parameters.items() if name not in ("tree", "pack")
    }
    unknown = sorted(options.keys() - defaults.keys())
    if unknown:
        raise TypeError(
            f"tree.plan(to={to!r}): tree.to_{to} has no option {unknown[0]!r}; it has {', '.join(defaults)}"
        )
    out = options.pop("out", None)
    want = _options.WANTS[to](**(defaults | options | {"out": None}))
    flat = flatten(tree)
    paths = flat.paths()
    if out is not None:
        into = aligned(flat, flatten(out), to)
        return _tree_plan(to, [_leaf_plan(flat, paths, i, to, options | {"out": x}) for i, x in enumerate(into.leaves)])
    leaves, same = decided(flat, want, range(len(paths)), {}, planning=True)
    blocks = blocks_of(leaves) if pack else []
    plans = {leaf.place: plan_of(leaf, None) for leaf in outside(blocks, leaves, flat, want, planning=True)}
    plans |= {leaves[i].place: plan_of(leaves[i], block) for block in blocks for i in block.members}
    found = [LeafPlan(paths[i], plans[same.get(i, i)], paths[same[i]] if i in same else "") for i in range(len(paths))]
    return _tree_plan(to, found, blocks)


def _leaf_plan(flat: Flat, paths: list[str], i: int, to: Any, options: dict[str, Any]) -> LeafPlan:
    try:
        return LeafPlan(paths[i], _api.plan(flat.leaves[i], to, **options))
    except NAMED as error:
        name(error, flat, i)
        raise


def _tree_plan(to: str, leaves: list[LeafPlan], blocks: Sequence[Block] = ()) -> TreePlan:
    own = [leaf.plan for leaf in leaves if not leaf.same_as]
    moved = sum(made.bytes_moved for made in own)
    return TreePlan(to, tuple(leaves), tuple(blocks), moved == 0, moved, any(made.blocking for made in own))


_FUNCTIONS: dict[str, Callable[..., Any]] = {"numpy": to_numpy, "torch": to_torch, "cupy": to_cupy}
_eager.mark()  # torch may be there already
