"""SVG from boxes and links, with a layered layout of our own, after Sugiyama.

A layer for each step from the leaves; an order within layers that crosses few links; places that keep links straight.
A link longer than one layer runs through a lane of its own in each layer between, so that no link crosses a box; links
from one box share their lanes. Everything is iterative.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right, insort
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
INK, MUTED, RED, LINE = "#1f2328", "#59636e", "#cf222e", "#6e7781"
COLOURS = {  # kind of box: (fill, border), light enough for dark text
    "leaf": ("#dafbe1", "#1a7f37"),
    "op": ("#f6f8fa", "#8c959f"),
    "output": ("#ddf4ff", "#0969da"),
    "numpy": ("#fff8c5", "#9a6700"),
    "fold": ("#ffffff", "#8c959f"),
    "none": ("#f6f8fa", "#8c959f"),
}
ROLES = {"title": INK, "plain": MUTED, "shares": RED, "trouble": RED}
SIZE, ROW = 11.5, 16.0
CROWD = 8  # leaves side by side
PADDING, MARGIN, BETWEEN, LANE, GAP = 11.0, 20.0, 26.0, 12.0, 34.0


class Box(NamedTuple):
    """What is drawn for a node, or for a fold of many."""

    kind: str  # a key of COLOURS
    lines: tuple[tuple[str, str], ...]  # (text, role of ROLES)


class Link(NamedTuple):
    source: int
    target: int
    input_nr: int
    cut: bool


def draw(boxes: Sequence[Box], links: Sequence[Link], title: str, captions: Sequence[str], cut: Sequence[str]) -> str:
    """Every link must lead to a later box. `cut` labels the cut: what is said above the line and below it."""
    layout = _Layout(boxes, links)
    layout.order()
    layout.place()
    heading = [line for line in (title, *captions) if line]
    top = MARGIN + ROW * len(heading) + 8
    ends = layout.stack(top)
    width = max(layout.width, *(_width(line) for line in heading))
    shift = MARGIN + (width - layout.width) / 2
    cuts = [link for link in links if link.cut]
    if cuts:  # the label stands to the right of the link
        width = max(width, shift - MARGIN + layout.x[cuts[0].source] + 14 + max(map(_width, cut)))
    width, height = width + 2 * MARGIN, ends + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="{FONT}" font-size="{SIZE}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
    ]
    for row, line in enumerate(heading):
        weight = f' font-weight="600" fill="{INK}"' if row == 0 else f' fill="{MUTED}"'
        parts.append(f'<text x="{MARGIN:.0f}" y="{MARGIN + ROW * row + SIZE:.1f}"{weight}>{escape(line)}</text>')
    parts.append(f'<g transform="translate({shift:.1f} 0)">')
    parts += layout.lines()
    for link in cuts:
        parts += layout.cut(link, cut, -shift, width - shift)
    parts += (layout.box(number) for number in range(len(boxes)))
    return "\n".join([*parts, "</g>", "</svg>", ""])


class _Layout:
    """Boxes, and the lanes between them, as points: points 0, 1, … are the boxes."""

    def __init__(self, boxes: Sequence[Box], links: Sequence[Link]) -> None:
        self.boxes = boxes
        self.half = [
            max(_width(text) * (1.08 if role == "title" else 1) for text, role in box.lines) / 2 + PADDING
            for box in boxes
        ]
        self.height = [ROW * len(box.lines) + PADDING for box in boxes]
        self.layer, self.depth = _layers(len(boxes), links)
        self.above: list[list[int]] = [[] for _ in boxes]
        self.below: list[list[int]] = [[] for _ in boxes]
        self.cuts = {(link.source, link.target) for link in links if link.cut}
        lanes: dict[tuple[int, int], int] = {}
        for source, target in sorted({(link.source, link.target) for link in links}):
            point = source
            for layer in range(self.layer[source] + 1, self.layer[target]):
                lane = lanes.get((source, layer))
                if lane is None:
                    lane = lanes[source, layer] = len(self.layer)
                    self.layer.append(layer)
                    self.depth.append(self.depth[source])
                    self.half.append(LANE / 2)
                    self.above.append([])
                    self.below.append([])
                    self._join(point, lane)
                point = lane
            self._join(point, target)
        self.rows: list[list[int]] = [[] for _ in range(max(self.layer) + 1)]
        origin = [*range(len(boxes)), *(source for source, _ in lanes)]  # lanes were numbered as they were entered
        for point in sorted(range(len(origin)), key=origin.__getitem__):
            self.rows[self.layer[point]].append(point)
        self.x = [0.0] * len(self.layer)
        self.y = [0.0] * len(self.layer)
        self.tops: list[float] = []
        self.bottoms: list[float] = []
        self.width = 0.0

    def _join(self, upper: int, lower: int) -> None:
        self.below[upper].append(lower)
        self.above[lower].append(upper)

    def order(self) -> None:
        """Barycentre sweeps, down and up, keeping the order that crosses the fewest links."""
        best, fewest = [list(row) for row in self.rows], self._crossings()
        for sweep in range(12 if len(self.layer) < 3000 else 4):
            if not fewest:
                break
            down = sweep % 2 == 0
            near = self.above if down else self.below
            position = self._positions()
            for row in self.rows if down else reversed(self.rows):
                centre = {p: sum(position[q] for q in near[p]) / len(near[p]) if near[p] else position[p] for p in row}
                row.sort(key=centre.__getitem__)
                for place, point in enumerate(row):
                    position[point] = place
            crossings = self._crossings()
            if crossings < fewest:
                best, fewest = [list(row) for row in self.rows], crossings
        self.rows = best

    def _positions(self) -> list[float]:
        position = [0.0] * len(self.layer)
        for row in self.rows:
            for place, point in enumerate(row):
                position[point] = place
        return position

    def _crossings(self) -> int:
        position, total = self._positions(), 0
        for row in self.rows:
            seen: list[float] = []
            for point in row:
                ends = [position[q] for q in self.below[point]]
                total += sum(len(seen) - bisect_right(seen, end) for end in ends)
                for end in ends:
                    insort(seen, end)
        return total

    def place(self) -> None:
        """Places that keep lanes and chains straight: four leanings, and the middle of them (Brandes and Köpf 2001)."""
        kept = self._straightest()
        leanings = []
        for down in (True, False):
            for left in (True, False):
                rows = [row if left else row[::-1] for row in (self.rows if down else self.rows[::-1])]
                places = self._lean(rows, self.above if down else self.below, kept)
                leanings.append(places if left else [-x for x in places])
        spans = [(min(places), max(places)) for places in leanings]
        low, high = min(spans, key=lambda span: span[1] - span[0])
        for number, (places, span) in enumerate(zip(leanings, spans)):
            shift = low - span[0] if number % 2 == 0 else high - span[1]
            leanings[number] = [x + shift for x in places]
        self.x = [sum(sorted(candidates)[1:3]) / 2 for candidates in zip(*leanings)]
        first = min(x - half for x, half in zip(self.x, self.half))
        self.x = [x - first for x in self.x]
        self.width = max(x + half for x, half in zip(self.x, self.half))

    def _straightest(self) -> set[tuple[int, int]]:
        """The links that may be drawn straight. Where one between two lanes is crossed, it comes first."""
        boxes, position, kept = len(self.boxes), self._positions(), set()
        for row in self.rows[:-1]:
            links = [(upper, lower) for upper in row for lower in self.below[upper]]
            inner = sorted((position[u], position[v]) for u, v in links if u >= boxes and v >= boxes)
            runs_on = {u for u, v in links if u >= boxes and v >= boxes}
            straight: list[tuple[float, float]] = []
            for start, end in inner:  # two lanes that cross: the first stays straight
                if not straight or end > straight[-1][1]:
                    straight.append((start, end))
            starts = [start for start, _ in straight]
            for u, v in links:
                place = bisect_left(starts, position[u])
                is_inner = u >= boxes and v >= boxes
                if is_inner and not (place < len(starts) and straight[place] == (position[u], position[v])):
                    continue
                left = place == 0 or straight[place - 1][1] < position[v]
                right = place == len(starts) or straight[place][1] > position[v]
                trunk = max(self.depth[other] for other in self.above[v])
                aside = self.depth[u] < min(2, trunk)  # a parameter stands beside the trunk, not above it
                if is_inner or (left and right and u not in runs_on and not aside):
                    kept.add((u, v))
        return kept

    def _lean(self, rows: list[list[int]], near: list[list[int]], kept: set[tuple[int, int]]) -> list[float]:
        """Points in blocks of one place each: as far left as can be, then as far right as makes nothing wider."""
        points = range(len(self.layer))
        position, block, taken = [0] * len(points), list(points), [False] * len(points)
        for row in rows:
            for place, point in enumerate(row):
                position[point] = place
        for row in rows[1:]:
            reached = -1
            for point in row:
                sides = sorted(
                    (q for q in near[point] if (q, point) in kept or (point, q) in kept), key=position.__getitem__
                )
                for q in sides[(len(sides) - 1) // 2 : len(sides) // 2 + 1]:  # the middle one, or either middle one
                    if block[point] == point and not taken[q] and position[q] > reached:
                        block[point], taken[q], reached = block[q], True, position[q]
        after: dict[int, list[tuple[int, float]]] = {}
        before: dict[int, list[tuple[int, float]]] = {}
        for row in rows:
            for left, right in pairwise(row):
                lane = left >= len(self.boxes) or right >= len(self.boxes)
                apart = self.half[left] + self.half[right] + (BETWEEN / 2 if lane else BETWEEN)
                after.setdefault(block[left], []).append((block[right], apart))
                before.setdefault(block[right], []).append((block[left], apart))
        waiting = {b: len(before.get(b, ())) for b in set(block)}
        ready, order = sorted(b for b, count in waiting.items() if not count), []
        x = dict.fromkeys(waiting, 0.0)
        while ready:
            b = ready.pop()
            order.append(b)
            x[b] = max((x[other] + apart for other, apart in before.get(b, ())), default=0.0)
            for other, _ in after.get(b, ()):
                waiting[other] -= 1
                if not waiting[other]:
                    ready.append(other)
        for b in reversed(order):
            room = min((x[other] - apart for other, apart in after.get(b, ())), default=x[b])
            x[b] = max(x[b], room)
        return [x[b] for b in block]

    def stack(self, top: float) -> float:
        """Layers from top to bottom, further apart where links run far sideways; returns where the last one ends."""
        cut_rows = {self.layer[source] for source, _ in self.cuts}
        for number, row in enumerate(self.rows):
            height = max((self.height[p] for p in row if p < len(self.boxes)), default=ROW)
            self.tops.append(top)
            self.bottoms.append(top + height)
            for point in row:
                self.y[point] = top + height / 2
            far = max((abs(self.x[p] - self.x[q]) for p in row for q in self.below[p]), default=0.0)
            top += height + (2 * ROW + 26 if number in cut_rows else GAP + min(46.0, far / 9))
        return self.bottoms[-1]

    def box(self, number: int) -> str:
        box, x, y = self.boxes[number], self.x[number], self.y[number]
        half, height = self.half[number], self.height[number]
        fill, border = COLOURS[box.kind]
        dashes = ' stroke-dasharray="4 3"' if box.kind in ("fold", "none") else ""
        parts = [
            f'<rect x="{x - half:.1f}" y="{y - height / 2:.1f}" width="{2 * half:.1f}" height="{height:.1f}" rx="6" '
            f'fill="{fill}" stroke="{border}" stroke-width="1.3"{dashes}/>'
        ]
        for row, (text, role) in enumerate(box.lines):
            weight = ' font-weight="600"' if role == "title" else ""
            base = y - height / 2 + PADDING / 2 + ROW * row + SIZE
            style = f'text-anchor="middle" fill="{ROLES[role]}"{weight}'
            parts.append(f'<text x="{x:.1f}" y="{base:.1f}" {style}>{escape(text)}</text>')
        return "\n".join(parts)

    def lines(self) -> list[str]:
        """One path for each link between neighbouring layers; those into a box end in arrows, side by side."""
        found = []
        for lower, above in enumerate(self.above):
            is_box = lower < len(self.boxes)
            ports = sorted(above, key=self.x.__getitem__)
            step = min(16.0, 1.4 * self.half[lower] / len(ports)) if ports else 0.0
            for port, upper in enumerate(ports):
                x1, x2 = self.x[upper], self.x[lower] + (port - (len(ports) - 1) / 2) * step
                y1 = self.y[upper] + self.height[upper] / 2 if upper < len(self.boxes) else self.tops[self.layer[upper]]
                y2 = self.y[lower] - self.height[lower] / 2 if is_box else self.tops[self.layer[lower]]
                bend1, bend2 = self.bottoms[self.layer[upper]], self.tops[self.layer[lower]]
                middle = (bend1 + bend2) / 2
                curve = f"C{x1:.1f} {middle:.1f} {x2:.1f} {middle:.1f} {x2:.1f} {bend2 - 8 * is_box:.1f}"
                is_cut = (upper, lower) in self.cuts
                colour, dashes = (RED, ' stroke-dasharray="5 4"') if is_cut else (LINE, "")
                path = f"M{x1:.1f} {y1:.1f}V{bend1:.1f}{curve}V{y2 - 6 * is_box:.1f}"
                found.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.3"{dashes}/>')
                if is_box:
                    found.append(f'<path d="M{x2 - 3.5:.1f} {y2 - 8:.1f}h7l-3.5 8z" fill="{colour}"/>')
        return found

    def cut(self, link: Link, words: Sequence[str], left: float, right: float) -> list[str]:
        x = self.x[link.source]
        y = (self.bottoms[self.layer[link.source]] + self.tops[self.layer[link.target]]) / 2
        path = f"M{left + MARGIN:.1f} {y:.1f}H{right - MARGIN:.1f}"
        line = f'<path d="{path}" stroke="{RED}" stroke-dasharray="5 4" fill="none"/>'
        return [line] + [
            f'<text x="{x + 14:.1f}" y="{y + shift:.1f}" fill="{RED}">{escape(text)}</text>'
            for text, shift in zip(words, (-6.0, SIZE + 4.0))
        ]


def _layers(count: int, links: Sequence[Link]) -> tuple[list[int], list[int]]:
    """Longest path from the leaves; then what grows from leaves alone, as a tree, moves down to what it feeds.

    Returns the layers, and the longest paths.
    """
    sources: list[list[int]] = [[] for _ in range(count)]
    targets: list[list[int]] = [[] for _ in range(count)]
    for link in links:
        sources[link.target].append(link.source)
        targets[link.source].append(link.target)
    layer, tree = [0] * count, [False] * count
    for i in range(count):
        layer[i] = max((layer[j] + 1 for j in sources[i]), default=0)
        tree[i] = all(tree[j] and len(targets[j]) == 1 for j in sources[i])
    depth = list(layer)
    for i in reversed(range(count)):
        if tree[i] and targets[i]:
            layer[i] = min(layer[j] for j in targets[i]) - 1
    crowds: dict[int, list[int]] = {}
    for i in range(count):
        if not sources[i]:
            crowds.setdefault(layer[i], []).append(i)
    for crowd in crowds.values():  # too many leaves side by side stand in several rows
        for number, i in enumerate(crowd):
            layer[i] -= number % -(-len(crowd) // CROWD)
    return [number - min(layer) for number in layer], depth


def _width(text: str) -> float:
    """Of a line in a monospaced font, whose characters are 0.60 em wide; 0.61 leaves room for rounding."""
    return 7.0 * sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
