"""The leaves of a tree: told apart, decided, packed where they cross the bus together, and converted.

Plain arrays take a lane without a decision, as in `_lanes`. All others are opened and decided before any byte moves, so
that what cannot be converted is refused first. The same memory twice is converted once. The walk knows nothing of
arrays (`_containers`), the packing nothing of trees (`_pack`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tensorbridge import _convert, _dtypes, _lanes, _options, _pack, _tables, _watch
from tensorbridge import _words as words
from tensorbridge._adapters import Adapter
from tensorbridge._array import CPU, LARGE, ArrayInfo, Traits
from tensorbridge._containers import Flat, flatten
from tensorbridge._errors import BridgeError
from tensorbridge._pack import Block
from tensorbridge._plan import Op, Plan, Want, bind, decide

if TYPE_CHECKING:
    from tensorbridge._convert import Road


def converted(
    tree: Any, want: Want, *, out: Any = None, pack: bool = True, finish: Callable[[Any], Any] | None = None
) -> Any:
    """The tree, converted; `finish` has the last word on each result."""
    if pack is not True and pack is not False:
        raise TypeError(f"tree.to_{want.framework}(pack={pack!r}): pack is True or False")
    flat = flatten(tree)
    if out is not None:
        return _filled(flat, want, out)
    results: list[Any] = [None] * len(flat.leaves)
    seen: dict[Any, int] = {}
    rest: Sequence[int] = range(len(results))
    if rest and not _watch.watching:
        rest = _through_lanes(flat.leaves, want, results, seen)
    if rest:
        _through_decisions(flat, want, rest, results, seen, pack)
    if finish is not None:
        results = [finish(result) for result in results]
    return flat.built(results)


# Lanes. A leaf that no lane takes is left to the decisions; they answer with the indices of those.


def _through_lanes(leaves: list[Any], want: Want, results: list[Any], seen: dict[Any, int]) -> Sequence[int]:
    _convert._open_lanes()
    on_host = want.device is None or want.device == CPU
    if want.framework == "torch" and on_host and want.dtype is None and not want.pin_memory and want.copy is not False:
        if not want.copy:
            return _shared_arrays(leaves, results)
        if all(type(a) is np.ndarray and a.base is None for a in leaves):
            return _copied_arrays(leaves, results)
        return _copied_views(leaves, results, seen)
    if want == _WANT_NUMPY:
        return _shared_tensors(leaves, results)
    return range(len(leaves))


_WANT_NUMPY = Want("numpy")


def _shared_arrays(leaves: list[Any], results: list[Any]) -> list[int]:
    from_numpy, plain, ndarray = _lanes._from_numpy, _lanes._plain_numpy, np.ndarray
    rest: list[int] = []
    seen: dict[Any, Any] = {}
    last = None  # a dtype is slow to hash, and most often the one before
    for i, a in enumerate(leaves):
        if type(a) is ndarray and a.flags.carray and ((dtype := a.dtype) is last or dtype in plain):
            last = dtype
            base = a.base
            if base is None or (type(base) is ndarray and base.base is None):
                try:
                    t = from_numpy(a)
                except (ValueError, TypeError):  # as in _lanes
                    rest.append(i)
                    continue
                first = seen.setdefault(t.data_ptr(), t)
                if first is not t and (first.dtype is not t.dtype or first.shape != t.shape):
                    first = seen.setdefault((t.data_ptr(), t.dtype, t.shape), t)
                results[i] = first
                continue
        rest.append(i)
    return rest


_DENSE = 0x101  # C-contiguous and aligned, of NumPy's flags


def _copied_arrays(leaves: list[Any], results: list[Any]) -> list[int]:
    """Arrays that all own their memory: two are the same memory only if they are the same object."""
    from_numpy, plain = _lanes._from_numpy, _lanes._plain_numpy
    rest: list[int] = []
    first = _first_of(leaves)
    last = None
    for i, a in enumerate(leaves):
        if a.flags.num & _DENSE == _DENSE and a.nbytes < LARGE and ((dtype := a.dtype) is last or dtype in plain):
            last = dtype
            if first is not None and first[id(a)] != i:
                results[i] = results[first[id(a)]]
                continue
            try:
                results[i] = from_numpy(a.copy())
                continue
            except (ValueError, TypeError):  # as in _lanes
                pass
        rest.append(i)
    return rest


def _first_of(leaves: list[Any]) -> dict[int, int] | None:
    """The index at which each object comes first; None if none comes twice."""
    if len(set(map(id, leaves))) == len(leaves):
        return None
    found: dict[int, int] = {}
    for i, leaf in enumerate(leaves):
        found.setdefault(id(leaf), i)
    return found


def _copied_views(leaves: list[Any], results: list[Any], seen: dict[Any, int]) -> list[int]:
    """Arrays of which some are views: only their addresses tell what is the same memory. torch reads those fastest."""
    from_numpy, plain, ndarray = _lanes._from_numpy, _lanes._plain_numpy, np.ndarray
    rest: list[int] = []
    for i, a in enumerate(leaves):
        if type(a) is ndarray and a.flags.carray and a.dtype in plain and a.nbytes < LARGE:
            try:
                address = from_numpy(a).data_ptr()
            except (ValueError, TypeError):
                rest.append(i)
                continue
            key = (CPU, address, _dtypes.of_numpy(a.dtype), a.shape, a.strides, True, False, "", 0)
            first = seen.setdefault(key, i) if address else i
            results[i] = results[first] if first != i else from_numpy(a.copy())
            continue
        rest.append(i)
    return rest


def _shared_tensors(leaves: list[Any], results: list[Any]) -> list[int]:
    to_numpy, tensor = _convert.to_numpy, _lanes._Tensor
    rest: list[int] = []
    first = _first_of(leaves)
    for i, t in enumerate(leaves):
        if first is not None and first[id(t)] != i:
            results[i] = results[first[id(t)]]
        elif type(t) is tensor and t.is_cpu and not (t.is_conj() or t.is_neg()):
            try:
                results[i] = to_numpy(t)
            except BridgeError:
                rest.append(i)  # to be refused again, by name
        else:
            rest.append(i)
    return rest


# Decisions


class Leaf(NamedTuple):
    """A leaf that was opened and decided."""

    place: int  # in the tree
    adapter: Adapter
    handle: Any
    traits: Traits
    want: Want
    road: Road

    @property
    def info(self) -> ArrayInfo:
        return self.adapter.describe(self.handle, self.traits)


def _opened(place: int, x: Any, want: Want, *, planning: bool = False) -> Leaf:
    x = _tables.leaf(x)
    adapter, handle, traits = _convert._opened(x, want, "")
    if want.device is not None or want.pin_memory or want.framework == "cupy":
        want = _options.placed(want, traits, planning=planning)
    here = _convert._here(traits, want)
    if planning:
        road = _convert.Road(decide(traits, want, here), ())
    else:
        road = _convert._roads.get((traits, want, here)) or _convert._build(traits, want, here)
    if road.decision.refusal is not None:
        raise words.refused(road.decision, adapter.describe(handle, traits), want)
    return Leaf(place, adapter, handle, traits, want, road)


def _memory(leaf: Leaf) -> Any:
    """What makes two leaves the same memory, to be treated alike; None where no address is known.

    Tensors inside a graph are what their node made them: only leaves of the graph can be tied.
    """
    info = leaf.info
    if not (info.address and info.nbytes):
        return None
    node = getattr(leaf.handle, "grad_fn", None) if info.grad_fn else None
    return (
        *(
            info.device,
            info.address,
            info.dtype,
            info.shape,
            info.strides,
            info.writable,
            info.requires_grad,
            info.lazy,
        ),
        id(node) if node is not None else 0,
    )


def decided(
    flat: Flat, want: Want, rest: Sequence[int], seen: dict[Any, int], *, planning: bool = False
) -> tuple[list[Leaf], dict[int, int]]:
    """The leaves to convert, and for every other index the one whose result it shares.

    Only conversions that move bytes are shared by address: those that do not leave the memory one anyway, and give each
    object its own like.
    """
    objects: dict[int, int] = {}
    same: dict[int, int] = {}
    leaves: list[Leaf] = []
    for i in rest:
        x = flat.leaves[i]
        first = objects.setdefault(id(x), i)
        if first == i:
            try:
                leaf = _opened(i, x, want, planning=planning)
            except NAMED as error:
                name(error, flat, i)
                raise
            if any(step.kind for step in leaf.road.decision.steps):
                memory = _memory(leaf)
                first = i if memory is None else seen.setdefault(memory, i)
        if first == i:
            leaves.append(leaf)
        else:
            same[i] = first
    return leaves, same


NAMED = (BridgeError, ValueError, TypeError)


def name(error: Exception, flat: Flat, index: int) -> None:
    """Let an error begin with the leaf that it is about."""
    path = flat.path(index)
    if path != "batch" and len(error.args) == 1:
        error.args = (f"{path}: {error}",)


def _through_decisions(
    flat: Flat, want: Want, rest: Sequence[int], results: list[Any], seen: dict[Any, int], pack: bool
) -> None:
    leaves, same = decided(flat, want, rest, seen)
    blocks = blocks_of(leaves) if pack else []
    packed = {part.leaf: block for block in blocks for part in block.parts}
    if _watch.watching:
        for position, leaf in enumerate(leaves):
            try:
                _watch.allow(plan_of(leaf, packed.get(position)), words.call(leaf.want))
            except NAMED as error:
                name(error, flat, leaf.place)
                raise
        allowed: AbstractContextManager[Any] = _watch.copy_guard("allow")  # all of it was, before the first byte moves
    else:
        allowed = nullcontext()
    with allowed:
        for block in blocks:
            members = [leaves[part.leaf] for part in block.parts]
            for leaf, result in zip(members, _crossed(block, members), strict=True):
                results[leaf.place] = result
        for position, leaf in enumerate(leaves):
            if position not in packed:
                try:
                    results[leaf.place] = _watched(leaf, None, partial(_convert._perform, leaf.road, leaf.handle, None))
                except NAMED as error:
                    name(error, flat, leaf.place)
                    raise
    for i, first in same.items():
        results[i] = results[first]


def blocks_of(leaves: Sequence[Leaf]) -> list[Block]:
    """The blocks in which leaves cross the bus, by their place in `leaves`. A guard may forbid what packing adds."""
    policy = _watch._policy.get() if _watch.watching else None
    forbidden = policy.kinds if policy is not None and policy.mode != "allow" else frozenset()
    found = [
        _pack.crossing(leaf.traits, leaf.road.decision.steps, leaf.info.shape) if _crosses(leaf) else None
        for leaf in leaves
    ]
    return _pack.blocks([None if c is None or _pack.EXTRA[c.kind] & forbidden else c for c in found])


def _crosses(leaf: Leaf) -> bool:
    return leaf.traits.device != CPU or leaf.want.framework == "cupy" or leaf.want.device not in (None, CPU)


def plan_of(leaf: Leaf, block: Block | None) -> Plan:
    """The steps that are run for a leaf."""
    plan = bind(leaf.road.decision.steps, leaf.info, leaf.want)
    return plan if block is None else _pack.planned(plan, _step_across(leaf), block)


def _watched(leaf: Leaf, block: Block | None, run: Callable[[], Any]) -> Any:
    if not _watch.watching:
        return run()
    return _watch.perform(plan_of(leaf, block), words.call(leaf.want), run)


def _crossed(block: Block, members: Sequence[Leaf]) -> list[Any]:
    """The members of a block, converted. A trace sees one event each; the time is in the first."""
    made: list[Any] = []

    def cross() -> None:
        at = [_step_across(leaf) for leaf in members]
        arrays = [_before(leaf, step) for leaf, step in zip(members, at, strict=True)]
        bus = _pack.bus_for(block)
        if block.crossing.kind == "h2d":
            crossed = _pack.upload(block, arrays, bus)
            functions = [leaf.road.functions[step + 1 :] for leaf, step in zip(members, at, strict=True)]
        else:
            crossed = _pack.download(block, arrays, bus)
            functions = []
            for i, (leaf, step) in enumerate(zip(members, at, strict=True)):
                later = leaf.road.decision.steps[step + 1 :]
                shared = bool(later) and later[0].op == Op.SHARE and later[0].after.framework == "numpy"
                functions.append(leaf.road.functions[step + 1 + shared :])
                if block.crossing.receiver == "torch" and not shared:
                    crossed[i] = _convert.to_torch(crossed[i])
        made.extend(_through(x, rest) for x, rest in zip(crossed, functions, strict=True))

    for i, leaf in enumerate(members):

        def run(i: int = i) -> Any:
            if not made:
                cross()
            return made[i]

        _watched(leaf, block, run)
    return made


def _step_across(leaf: Leaf) -> int:
    return next(i for i, step in enumerate(leaf.road.decision.steps) if step.kind in ("h2d", "d2h"))


def _before(leaf: Leaf, step: int) -> Any:
    """What a leaf is before it crosses. As bytes for a block, a NumPy array need not become a tensor first."""
    steps = leaf.road.decision.steps
    if step and steps[step - 1].op == Op.SHARE and steps[step - 1].after.framework == "torch":
        giver = steps[step - 2].after if step > 1 else leaf.traits
        step -= giver.framework == "numpy"
    return _through(leaf.handle, leaf.road.functions[:step])


def _through(x: Any, functions: Sequence[Callable[..., Any]]) -> Any:
    for function in functions:
        x = function(x)
    return x


def _filled(flat: Flat, want: Want, out: Any) -> Any:
    """Into the arrays of `out`, one by one."""
    into = aligned(flat, flatten(out), want.framework)
    i = 0
    try:
        wants = [_options._with_out(want, array) for i, array in enumerate(into.leaves)]
        for i, (x, array) in enumerate(zip(flat.leaves, into.leaves, strict=True)):
            _convert._convert(_tables.leaf(x), wants[i], array)
    except NAMED as error:
        name(error, flat, i)
        raise
    return out


def aligned(flat: Flat, into: Flat, framework: str) -> Flat:
    """`into`, whose arrays lie where those of `flat` do."""
    paths, others = flat.paths(), into.paths()
    if paths != others:
        strange = [f"it has {p}" for p in others if p not in paths] + [
            f"it lacks {p}" for p in paths if p not in others
        ]
        raise ValueError(f"tree.to_{framework}(out=...): out is another tree: {(strange or ['its order differs'])[0]}")
    return into
