"""The walk: a tree of containers is taken apart into its arrays, and built again of others.

It has a stack of its own, so that depth costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from tensorbridge._errors import UnsupportedArrayError
from tensorbridge._trees._containers import (
    ARRAY,
    EXACT,
    HOLD_TEXT,
    OTHER,
    ROOT,
    TEXTUAL,
    Kind,
    is_text,
    kind_of,
    rebuilt,
)


class Frame:
    """One container of a tree while it is walked: its children, which of them are leaves, which are containers.

    Frames know one another by number: references would be cycles, and keep arrays alive until they are collected.
    """

    __slots__ = ("above", "built", "first", "inner", "keys", "kind", "node", "open", "parts", "place", "size", "where")

    def __init__(self, node: Any, kind: Kind, above: int, place: int) -> None:
        self.node, self.kind, self.above, self.place = node, kind, above, place
        self.parts, self.keys = kind.open(node)
        self.first = self.size = 0  # its own leaves are leaves[first : first + size] of the tree
        self.where: list[int] | None = None  # among its children; None: all of them
        self.inner: list[tuple[int, int]] = []  # place among the children, number of the frame
        self.open = True  # not yet walked to its end
        self.built: Any = None


class Flat(NamedTuple):
    """A tree taken apart: its leaves, its containers, and in which order to build them: inner ones first.

    Frame 0 stands around the tree, and is never built.
    """

    leaves: list[Any]
    frames: list[Frame]
    order: list[int]

    def path(self, leaf: int) -> str:
        """How a person writes the way to a leaf: ``batch['obs'][1].mask``."""
        number = self._frame_of(leaf)
        return self.way(number) + _leaf_name(self.frames[number], leaf - self.frames[number].first)

    def around(self, leaf: int) -> tuple[Any, int]:
        """The container that a leaf lies in, and its place among the children."""
        frame = self.frames[self._frame_of(leaf)]
        return frame.node, _place(frame, leaf - frame.first)

    def _frame_of(self, leaf: int) -> int:
        return next(n for n, f in enumerate(self.frames) if f.first <= leaf < f.first + f.size)

    def paths(self) -> list[str]:
        """The ways to all leaves."""
        found = [""] * len(self.leaves)
        for number, frame in enumerate(self.frames):
            before = self.way(number) if frame.size else ""
            for i in range(frame.size):
                found[frame.first + i] = before + _leaf_name(frame, i)
        return found

    def way(self, number: int) -> str:
        """The way to a container."""
        names: list[str] = []
        while number > 0:
            frame = self.frames[number]
            parent = self.frames[frame.above]
            names.append(parent.kind.name(parent.node, parent.keys, frame.place))
            number = frame.above
        return "".join(reversed(names))

    def built(self, results: list[Any]) -> Any:
        """The tree with `results` for leaves. Only once: the children are handed over."""
        frames = self.frames
        full: set[int] = set()  # frames with an array in them, or below
        for number in self.order:
            frame = frames[number]
            children, kind = frame.parts, frame.kind
            if frame.size:
                mine = results[frame.first : frame.first + frame.size]
                if frame.where is None:
                    children = mine
                else:
                    for place, result in zip(frame.where, mine, strict=True):
                        children[place] = result
            filled = frame.size > 0
            for place, inner in frame.inner:
                children[place] = frames[inner].built
                filled = filled or inner in full
            if filled:
                full.add(number)
            if not kind.exotic:
                frame.built = kind.build(frame.node, frame.keys, children)
            elif filled:
                where = partial(self.way, number)
                frame.built = rebuilt(kind, frame.node, frame.keys, children, where, frames[frame.above].node)
            else:
                frame.built = frame.node
        if len(frames) > 1:
            return frames[1].built
        return results[0] if results else frames[0].node


def _leaf_name(frame: Frame, i: int) -> str:
    return frame.kind.name(frame.node, frame.keys, _place(frame, i))


def _place(frame: Frame, i: int) -> int:
    return i if frame.where is None else frame.where[i]


def flatten(tree: Any, *, everything: bool = False) -> Flat:
    """Take a tree apart into its arrays; with `everything`, into all values that are no containers."""
    root = Frame(tree, ROOT, -1, 0)
    flat = Flat([], [root], [])
    kind = EXACT.get(type(tree)) or kind_of(tree)
    if not isinstance(kind, Kind):
        if kind is ARRAY or everything:
            flat.leaves.append(tree)
            root.size = 1
        return flat
    whole = Frame(tree, kind, 0, 0)
    flat.frames.append(whole)
    root.inner.append((0, 1))
    containers = _inner(whole, flat.leaves, everything)
    if not containers:
        flat.order.append(1)
        return flat
    stack = [(1, iter(containers))]
    seen = {id(tree): 1}
    while stack:
        number, inner = stack[-1]
        frame = flat.frames[number]
        for place, kind in inner:
            child = frame.parts[place]
            known = seen.get(id(child))
            if known is None:
                known = seen[id(child)] = len(flat.frames)
                frame.inner.append((place, known))
                flat.frames.append(Frame(child, kind, number, place))
                stack.append((known, iter(_inner(flat.frames[known], flat.leaves, everything))))
                break
            if flat.frames[known].open:
                here = flat.way(number) + frame.kind.name(frame.node, frame.keys, place)
                text = f"{here} is {flat.way(known)} again: a tree that contains itself has no end"
                raise UnsupportedArrayError(f"{text}.\nTake the cycle out first.")
            frame.inner.append((place, known))
        else:
            stack.pop()
            frame.open = False
            flat.order.append(number)
    return flat


def _inner(frame: Frame, leaves: list[Any], everything: bool) -> Sequence[tuple[int, Kind]]:
    """Take the leaves of a container, all at once; its inner containers, and their places. Text stays in it."""
    children = frame.parts
    frame.first = len(leaves)
    classes = set(map(type, children))
    texts: set[int] = set()
    if not HOLD_TEXT.isdisjoint(classes):
        arrays = children if len(classes) == 1 else [x for x in children if type(x) in HOLD_TEXT]
        if not TEXTUAL.isdisjoint([a.dtype.kind for a in arrays]):
            texts = set(map(id, filter(is_text, arrays)))
    if len(classes) == 1 and not texts:
        only = EXACT.get(classes.pop())
        if only is ARRAY or (everything and only is OTHER):
            leaves.extend(children)
            frame.size = len(children)
            return ()
        if only is OTHER:
            return ()
    where: list[int] = []
    inner: list[tuple[int, Kind]] = []
    for place, child in enumerate(children):
        kind: Any = OTHER if id(child) in texts else EXACT.get(type(child)) or kind_of(child)
        if kind is ARRAY or (everything and kind is OTHER):
            where.append(place)
            leaves.append(child)
        elif kind is not OTHER:
            inner.append((place, kind))
    frame.where, frame.size = where, len(where)
    return inner
