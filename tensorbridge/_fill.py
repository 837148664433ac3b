"""The arrays of `out`: every leaf is opened, decided and checked against all others before a byte is written."""

from __future__ import annotations

from typing import Any

from tensorbridge import _options
from tensorbridge._adapters import adapter_of
from tensorbridge._array import ArrayInfo
from tensorbridge._leaf import NAMED, Leaf, identity, name, opened
from tensorbridge._memory import first_meeting
from tensorbridge._step import Want
from tensorbridge._walk import Flat


def checked(flat: Flat, outs: list[Any], want: Want, *, planning: bool = False) -> tuple[list[Leaf], dict[int, int]]:
    """The leaves to convert into `outs`, and for every other place the one that is filled for it too."""
    found: list[Leaf] = []
    same: dict[int, int] = {}
    first_of: dict[Any, int] = {}
    read: dict[int, ArrayInfo] = {}
    written: dict[int, ArrayInfo] = {}
    for i, (x, out) in enumerate(zip(flat.leaves, outs, strict=True)):
        try:
            leaf = opened(i, x, _options.with_out(want, out), planning=planning)
            traits = leaf.case.want.out
            assert traits is not None
            source, target = leaf.info, adapter_of(type(out)).describe(out, traits)
            _options.check_out(source, target, leaf.case.want)
        except NAMED as error:
            name(error, flat, i)
            raise
        tied = identity(source, leaf.handle) or id(x), identity(target, out)  # on both sides
        first = first_of.setdefault(tied, i)
        if first != i:
            same[i] = first
            continue
        found.append(leaf)
        read[i], written[i] = source, target
    _refuse_meeting(flat, want, written, read)
    return found, same


def _refuse_meeting(flat: Flat, want: Want, written: dict[int, ArrayInfo], read: dict[int, ArrayInfo]) -> None:
    met = first_meeting(written, read)
    if met is None:
        return
    i, j, both_written = met
    other = f"out of {flat.path(j)}" if both_written else f"{flat.path(j)}, which is read too"
    raise ValueError(f"{flat.path(i)}: to_{want.framework}(out=...): out shares memory with {other}")


def aligned(flat: Flat, into: Flat, framework: str) -> list[Any]:
    """The arrays of `into`, each for the one of `flat` that has its name: dicts may have their keys in any order."""
    paths, others = flat.paths(), into.paths()
    if paths == others:
        return into.leaves
    known, named = set(paths), dict(zip(others, into.leaves, strict=True))
    strange = [f"it has {p}" for p in others if p not in known] + [f"it lacks {p}" for p in paths if p not in named]
    if strange or not len(paths) == len(others) == len(named):
        raise ValueError(f"tree.to_{framework}(out=...): out is another tree: {(strange or ['its order differs'])[0]}")
    return [named[path] for path in paths]
