"""The leaves of a tree: told apart, decided, packed where they cross the bus together, and converted.

Plain arrays take a lane without a decision (`_tree_lanes`). All others are opened and decided before any byte moves
(`_leaf`), so that what cannot be converted is refused first. The walk knows nothing of arrays (`_walk`), the
packing nothing of trees (`_pack`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from tensorbridge import _convert, _lanes, _remember, _rules, _watch
from tensorbridge import _words as words
from tensorbridge._array import CPU
from tensorbridge._convert import Case, judged
from tensorbridge._eager import is_inside
from tensorbridge._step import Op, Plan, Step, Want, usual
from tensorbridge._trees import _pack
from tensorbridge._trees._containers import check_known
from tensorbridge._trees._fill import aligned, checked
from tensorbridge._trees._leaf import FACTS, NAMED, Leaf, decided, key_of, name, opened
from tensorbridge._trees._pack import Block
from tensorbridge._trees._tree_lanes import through_lanes
from tensorbridge._trees._walk import Flat, flatten


def converted(tree: Any, want: Want, *, out: Any = None, pack: bool = True) -> Any:
    if pack is not True:
        check_pack(pack, f"tree.to_{want.framework}")
    flat = flatten(tree)
    if not flat.leaves:
        check_known(tree, want.framework)
    if out is not None:
        return _filled(flat, want, out)
    results: list[Any] = [None] * len(flat.leaves)
    seen: dict[Any, int] = {}
    rest: Sequence[int] = range(len(results))
    plain = not _watch.watching and not is_inside()
    if rest and plain:
        rest = through_lanes(flat.leaves, want, results, seen)
    if rest and not (plain and not seen and _as_before(flat, want, rest, results)):
        _through_decisions(flat, want, rest, results, seen, pack)
        if plain:
            _remember.remember_leaves(want, [flat.leaves[i] for i in rest])
    return flat.built(results)


def _as_before(flat: Flat, want: Want, rest: Sequence[int], results: list[Any]) -> bool:
    """Whether the leaves at these places were all of kinds that are remembered, and are converted now."""
    recipes = _remember.again(want, [flat.leaves[i] for i in rest])
    for i, recipe in zip(rest, recipes or (), strict=recipes is not None):
        try:
            results[i] = _convert.perform(recipe, flat.leaves[i], None)
        except NAMED as error:
            name(error, flat, i)
            raise
    return recipes is not None


def check_pack(pack: object, call: str) -> None:
    if pack is not True and pack is not False:
        raise TypeError(f"{call}(pack={pack!r}): pack is True or False")


def _through_decisions(
    flat: Flat, want: Want, rest: Sequence[int], results: list[Any], seen: dict[Any, int], pack: bool
) -> None:
    at_once: list[tuple[Block, list[Case]]] = []
    if pack and not _watch.watching and len(rest) == len(results):
        at_once, rest = _decided_at_once(flat, want)
    leaves, same = decided(flat, want, rest, seen)
    crossing = any(_may_cross(leaf.case) for leaf in leaves)
    blocks = blocks_of(leaves) if pack and crossing else []
    alone = outside(blocks, leaves, flat, want) if crossing else leaves
    packed = ((leaves[i], block) for block in blocks for i in block.members)
    with _allowed(flat, chain(packed, ((leaf, None) for leaf in alone))):
        for block, cases in at_once:
            _cross_at_once(block, flat.leaves, cases, block.members, results)
        for block in blocks:
            _cross(block, leaves, results)
        for leaf in alone:
            results[leaf.place] = _alone(flat, leaf)
    for i, first in same.items():
        results[i] = results[first]


def _filled(flat: Flat, want: Want, out: Any) -> Any:
    outs = aligned(flat, flatten(out), want.framework)
    plain = not _watch.watching and not is_inside() and want == usual(want.framework)
    recipes = _remember.fills(want.framework, flat.leaves, outs) if plain else None
    if recipes is not None:
        for i, recipe in enumerate(recipes):
            try:
                _convert.perform(recipe, flat.leaves[i], outs[i])
            except NAMED as error:
                name(error, flat, i)
                raise
        return out
    leaves, _ = checked(flat, outs, want)
    with _allowed(flat, ((leaf, None) for leaf in leaves)):
        for leaf in leaves:
            _alone(flat, leaf, outs[leaf.place])
    if plain:
        _remember.remember_fills(want.framework, flat.leaves, outs)
    return out


def _alone(flat: Flat, leaf: Leaf, out: Any = None) -> Any:
    """A leaf that is in no block, converted; into `out`, if there is one."""
    try:
        return _watched(leaf, None, partial(_convert.perform, leaf.case.recipe, leaf.handle, out))
    except NAMED as error:
        name(error, flat, leaf.place)
        raise


# A thousand small arrays of few kinds and shapes: decided by kind and shape, without a look at each by itself.


def _decided_at_once(flat: Flat, want: Want) -> tuple[list[tuple[Block, list[Case]]], Sequence[int]]:
    """The blocks of a tree whose arrays are all plain and all apart, with the case of each run; the other places.

    No block where any array is a view, comes twice, or could be the same memory as another: that takes a closer look.
    """
    leaves = flat.leaves
    classes = set(map(type, leaves))
    up = _goes_up(want)
    if classes == {np.ndarray} and up:
        alike = _owned(leaves)
    elif classes == {_lanes._Tensor} and (up or want.framework == "numpy" or want.device == CPU):
        alike = _tensors(leaves, on_host=up)
    else:
        alike = {}
    groups: list[_pack.Group] = []
    cases: dict[int, Case] = {}  # by the identity of routes
    routes: dict[Any, _pack.Route | None] = {None: None}
    for members in alike.values():
        first = leaves[members[0]]
        key = key_of(first)
        if key not in routes:
            try:
                case = judged(first, want)[1]
            except NAMED as error:
                name(error, flat, members[0])
                raise
            routes[key] = _pack.route(case.traits, case.recipe.decision.steps)
            cases[id(routes[key])] = case
        route = routes[key]
        if route is not None:
            groups.append((route, tuple(first.shape), members))
    blocks = _pack.blocks(groups)
    packed = {i for block in blocks for i in block.members}
    rest = [i for i in range(len(leaves)) if i not in packed]
    return [(block, [cases[id(run.route)] for run in block.runs]) for block in blocks], rest


def _owned(leaves: list[Any]) -> dict[Any, list[int]]:
    """Arrays by what decides, and by shape. Those that own their memory are apart if they are not the same object."""
    found: dict[Any, list[int]] = {}
    if len(set(map(id, leaves))) < len(leaves):
        return found
    last: Any = None
    members: list[int] = []
    for i, a in enumerate(leaves):
        if a.base is not None:
            return {}
        dtype, shape, facts = a.dtype, a.shape, a.flags.num & FACTS
        if last is None or dtype is not last[0] or shape != last[1] or facts != last[2]:
            last = (dtype, shape, facts)
            members = found.setdefault(last, [])
        members.append(i)
    return found


def _tensors(leaves: list[Any], on_host: bool) -> dict[Any, list[int]]:
    """Tensors by what decides, and by shape; apart if no two begin at one address."""
    found: dict[Any, list[int]] = {}
    addresses = set()
    for i, t in enumerate(leaves):
        key = key_of(t) if t.is_cpu is on_host else None
        if key is None:
            return {}
        addresses.add(t.data_ptr())
        found.setdefault((key, t.shape), []).append(i)
    return found if len(addresses) == len(leaves) else {}


def blocks_of(leaves: Sequence[Leaf]) -> list[Block]:
    """The blocks in which leaves cross the bus, by their index in `leaves`. A guard may forbid what packing adds."""
    forbidden = _watch.guarded_kinds()
    routes: dict[int, _pack.Route | None] = {}  # by the identity of cases
    groups: dict[Any, _pack.Group] = {}
    for i, leaf in enumerate(leaves):
        case = leaf.case
        if id(case) not in routes:
            route = _pack.route(case.traits, case.recipe.decision.steps) if _may_cross(case) else None
            routes[id(case)] = None if route is None or _pack.EXTRA[route.kind] & forbidden else route
        route = routes[id(case)]
        if route is not None:
            shape = tuple(leaf.handle.shape)
            groups.setdefault((id(case), shape), (route, shape, []))[2].append(i)
    return _pack.blocks(groups.values())


def _may_cross(case: Case) -> bool:
    return case.traits.device != CPU or _goes_up(case.want)


def _goes_up(want: Want) -> bool:
    return want.framework == "cupy" or want.device not in (None, CPU)


def outside(blocks: list[Block], leaves: list[Leaf], flat: Flat, want: Want, *, planning: bool = False) -> list[Leaf]:
    """The leaves that are in no block. A host tensor that crosses by itself is asked now whether it is pinned."""
    packed = {i for block in blocks for i in block.members}
    found = []
    for i, leaf in enumerate(leaves):
        if i not in packed:
            traits = leaf.case.traits
            if leaf.alike and traits.framework == "torch" and traits.device == CPU and _may_cross(leaf.case):
                leaf = opened(leaf.place, flat.leaves[leaf.place], want, planning=planning)
            found.append(leaf)
    return found


def _allowed(flat: Flat, leaves: Iterable[tuple[Leaf, Block | None]]) -> AbstractContextManager[Any]:
    """What to convert in: a guard is asked about all leaves before the first byte moves, and then no more."""
    if not _watch.watching:
        return nullcontext()
    for leaf, block in leaves:
        try:
            _watch.allow(plan_of(leaf, block), words.call(leaf.case.want))
        except NAMED as error:
            name(error, flat, leaf.place)
            raise
    return _watch.copy_guard("allow")


def plan_of(leaf: Leaf, block: Block | None) -> Plan:
    """The steps that are run for a leaf."""
    plan = leaf.case.plan(leaf.handle)
    return plan if block is None else _pack.planned(plan, block)


def _watched(leaf: Leaf, block: Block | None, run: Callable[[], Any]) -> Any:
    if not _watch.watching:
        return run()
    return _watch.perform(plan_of(leaf, block), words.call(leaf.case.want), run)


def _cross(block: Block, leaves: Sequence[Leaf], results: list[Any]) -> None:
    """The leaves of a block, converted. A trace sees an event for each; the time is in the first one's."""
    members = [leaves[i] for i in block.members]
    cases = [leaves[run.leaves[0]].case for run in block.runs]
    arrays, places = [leaf.handle for leaf in leaves], [leaf.place for leaf in members]
    others = members[1:] if _watch.watching else []
    _watched(members[0], block, partial(_cross_at_once, block, arrays, cases, places, results))
    for leaf in others:
        _watched(leaf, block, lambda: None)


def _cross_at_once(
    block: Block, arrays: Sequence[Any], cases: list[Case], places: Sequence[int], results: list[Any]
) -> None:
    """The arrays of a block, each run of one kind, converted into `results` at `places`."""
    runs = list(zip(block.runs, cases, strict=True))
    given = [_through([arrays[i] for i in run.leaves], _before(case, run.route.step)) for run, case in runs]
    crossing = _pack.upload if block.route.kind == "h2d" else _pack.download
    made: list[Any] = []
    for (run, case), crossed in zip(runs, crossing(block, given, _pack.bus_for(block)), strict=True):
        made += _through(crossed, _after(case, run.route.step))
    for place, x in zip(places, made, strict=True):
        results[place] = x


def _before(case: Case, step: int) -> Sequence[Callable[..., Any]]:
    """What is done before a leaf crosses. As bytes for a block, a NumPy array need not become a tensor first."""
    steps = case.recipe.decision.steps
    if step and steps[step - 1].op == Op.SHARE and steps[step - 1].after.framework == "torch":
        giver = steps[step - 2].after if step > 1 else case.traits
        step -= giver.framework == "numpy"
    return case.recipe.functions[:step]


def _after(case: Case, step: int) -> Sequence[Callable[..., Any]]:
    """What is done after a leaf has crossed. Out of a block that came down, it is a NumPy array already."""
    steps = case.recipe.decision.steps
    rest = case.recipe.functions[step + 1 :]
    if steps[step].kind == "h2d":
        return rest
    if rest and steps[step + 1].op == Op.SHARE and steps[step + 1].after.framework == "numpy":
        return rest[1:]
    made = steps[step].after
    if made.framework != "torch":
        return rest
    share = Step(Op.SHARE, _rules.share_why("numpy", "torch"), 0, "", made)
    return (*_convert.compiled((share,), made._replace(framework="numpy"), case.want), *rest)


def _through(arrays: Sequence[Any], functions: Sequence[Callable[..., Any]]) -> Sequence[Any]:
    for function in functions:
        arrays = list(map(function, arrays))
    return arrays
