"""The arrays of `out`: every leaf is opened, decided and checked against all others before a byte is written."""

from __future__ import annotations

from numbers import Number
from typing import Any

import numpy as np

from tensorbridge import _options
from tensorbridge._adapters import adapter_of
from tensorbridge._array import ArrayInfo
from tensorbridge._memory import first_meeting
from tensorbridge._step import Want
from tensorbridge._trees._containers import DICT, LIST, ROOT, TUPLE, is_text
from tensorbridge._trees._leaf import NAMED, Leaf, identity, name, opened
from tensorbridge._trees._walk import Flat, Frame, flatten


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
    if len(flat.frames) == len(into.frames) and all(map(_alike, flat.frames, into.frames)):
        return into.leaves
    paths, others = flat.paths(), into.paths()
    if paths == others:
        return into.leaves
    known, named = set(paths), dict(zip(others, into.leaves, strict=True))
    if strange := [p for p in others if p not in known]:
        raise ValueError(f"tree.to_{framework}(out=...): out is another tree: {_strange(flat, strange[0])}")
    if lacks := [p for p in paths if p not in named]:
        raise ValueError(f"tree.to_{framework}(out=...): out is another tree: it lacks {lacks[0]}")
    if not len(paths) == len(others) == len(named):
        raise ValueError(f"tree.to_{framework}(out=...): out is another tree: its order differs")
    return [named[path] for path in paths]


def _strange(flat: Flat, path: str) -> str:
    """Why an array of `out` has no source: often it has one, which is no array."""
    everything = flatten(flat.frames[0].node, everything=True)
    value = next((x for x, name in zip(everything.leaves, everything.paths()) if name == path), None)
    if is_text(value):
        return f"it has {path}, which is text in the source"
    if not isinstance(value, (Number, np.bool_)):
        return f"it has {path}"
    kind = type(value).__name__
    return f"it has {path}, which is {kind} in the source: numbers are left as they are, give numpy.asarray(x) there"


def _alike(a: Frame, b: Frame) -> bool:
    """Whether two containers certainly hold the same, by the same names."""
    plain = a.kind is b.kind and any(a.kind is kind for kind in (ROOT, DICT, LIST, TUPLE))
    return plain and (a.size, a.where, a.inner, a.keys) == (b.size, b.where, b.inner, b.keys)
