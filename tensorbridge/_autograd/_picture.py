"""Pictures of a graph: a table for a terminal, mermaid, DOT and SVG.

What is too much to look at is folded before it is drawn, so that ten thousand nodes cost little more than some hundred:
long chains into one box each, and if that is not enough, everything between the first nodes and the last.
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from tensorbridge._array import shape_text
from tensorbridge._autograd._svg import COLOURS, INK, RED, Box, Link, draw

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tensorbridge._autograd._graph import Graph, Node

LIMIT = 300  # nodes in a picture or a table; beyond, it is folded
SAVED_LIMIT = 12  # saved tensors named at one node

CUT = "to_numpy would cut here"
SHARES = "shares memory with the NumPy array: a write to the array changes it"


class Sketch(NamedTuple):
    """A graph as it is drawn: every link leads to a later box."""

    boxes: list[Box]
    links: list[Link]
    note: str  # what was folded; "" if nothing was


def sketch(graph: Graph) -> Sketch:
    if not graph.nodes:
        lines = textwrap.wrap(graph.about, 46)
        return Sketch([Box("none", tuple((line, "plain") for line in lines))], [], "")
    box_of, members = _fold(graph, LIMIT)
    boxes = [_marked(_box(group[0]) if len(group) == 1 else _fold_box(group)) for group in members]
    links: dict[Link, None] = {}
    for edge in graph.edges:
        source, target = box_of[edge.source], box_of[edge.target]
        if source != target:
            nr = edge.input_nr if len(members[source]) == 1 else 0
            links[Link(source, target, nr, edge.cut)] = None
    hidden = sum(len(group) for group in members if len(group) > 1)
    total = len(graph.nodes)
    note = f"Folded: {_number(hidden)} of {_number(total)} nodes stand in boxes that begin with …" if hidden else ""
    return Sketch(boxes, list(links), note)


def _fold(graph: Graph, limit: int) -> tuple[list[int], list[list[Node]]]:
    """Which box each node goes into, and what is in each box. Ids are topological, so a run of ids makes no cycle."""
    nodes, edges = graph.nodes, graph.edges
    fresh = [True] * len(nodes)  # a new box begins here
    if len(nodes) > limit or len(edges) > 4 * limit:
        into, out = Counter(edge.target for edge in edges), Counter(edge.source for edge in edges)
        plain = [node.kind == "op" and into[node.id] == out[node.id] == 1 for node in nodes]
        follows = {edge.target for edge in edges if edge.source == edge.target - 1}
        chained = [plain[i] and i > 0 and plain[i - 1] and i in follows for i in range(len(nodes))]
        for i in range(3, len(nodes) - 2):  # two nodes at either end of a chain stay in sight
            fresh[i] = not all(chained[i - 2 : i + 3])
        starts = [i for i, begins in enumerate(fresh) if begins]
        drawn = sum(fresh[edge.target] or edge.source < edge.target - 1 for edge in edges)
        if len(starts) > limit or drawn > 4 * limit:  # not enough: keep the beginning and the end, and fold all between
            first, last = starts[min(limit // 8, len(starts) // 3)], starts[-min(limit // 5, len(starts) // 3)]
            fresh[first + 1 : last] = [False] * (last - first - 1)
    members: list[list[Node]] = []
    box_of = []
    for node, begins in zip(nodes, fresh):
        if begins:
            members.append([])
        members[-1].append(node)
        box_of.append(len(members) - 1)
    return box_of, members


def _marked(box: Box) -> Box:
    return Box(box.kind, tuple((f"● {text}" if role == "shares" else text, role) for text, role in box.lines))


def _title(graph: Graph) -> str:
    return _clip(graph.about, 90) if graph.nodes else "No autograd graph"


def _box(node: Node) -> Box:
    kind = _clip(f"{node.dtype} {shape_text(node.shape)}" if node.dtype else shape_text(node.shape))
    if node.kind == "leaf":
        lines = [(_clip(node.variable) or "leaf", "title"), (f"leaf {kind}" if node.variable else kind, "plain")]
        lines += [("shares memory", "shares")] if node.shares_view else []
    elif node.kind == "output":
        lines = [(_clip(node.variable) or "the tensor", "title"), (kind, "plain")]
    elif node.kind == "numpy":
        sharing = ("the memory of the tensor", "shares") if node.shares_view else ("a copy on the host", "plain")
        lines = [("NumPy array", "title"), (kind, "plain"), sharing]
    else:
        more = f", {node.outputs} results" if node.outputs > 1 else ""
        result = f"{_clip(node.variable)}: {kind}{more}" if node.variable else kind + more
        lines = [(_clip(node.name), "title"), (result, "plain"), *_saved_lines(node)]
    return Box(node.kind, tuple(lines))


def _saved_lines(node: Node) -> list[tuple[str, str]]:
    lines = []
    for saved in node.saved:
        if saved.shape is None:
            continue
        words = [saved.variable, "" if saved.dtype == node.dtype else saved.dtype, shape_text(saved.shape)]
        text = _clip(f"saved {saved.name}: {' '.join(filter(None, words))}")
        role = "shares" if saved.shares_view else "plain"
        lines.append((text, role))
        if saved.state == "modified":
            lines.append(("modified since: backward raises", "trouble"))
    for state, text in (("freed", "freed by a backward"), ("packed", "packed by a hook")):
        names = ", ".join(saved.name for saved in node.saved if saved.state == state)
        lines += [(_clip(f"saved {names}: {text}"), "plain")] if names else []
    more = len(lines) - SAVED_LIMIT
    return [*lines[:SAVED_LIMIT], (f"saved {_number(more)} more", "plain")] if more > 1 else lines


def _fold_box(group: Sequence[Node]) -> Box:
    lines = [(f"… {_number(len(group))} nodes", "title")]
    names = Counter(node.name for node in group if node.kind == "op")
    leaves = [node.variable for node in group if node.kind == "leaf"]
    if leaves:
        lines.append((f"{_number(len(leaves))} of them leaves", "plain"))
    lines += [(_clip(f"{_number(count)} {name}"), "plain") for name, count in names.most_common(3)]
    if len(names) > 3:
        lines.append((f"{_number(len(names) - 3)} other kinds", "plain"))
    if any(saved.shares_view for node in group for saved in node.saved) or any(node.shares_view for node in group):
        lines.append(("some share memory", "shares"))
    return Box("fold", tuple(lines))


def count_text(kinds: Iterable[str]) -> str:
    count = Counter(kinds)
    operations, leaves = count["op"], count["leaf"]
    many = ("" if operations == 1 else "s", "leaf" if leaves == 1 else "leaves")
    return f"{_number(operations)} operation{many[0]} from {_number(leaves)} {many[1]}"


def _number(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _clip(text: str, width: int = 46) -> str:
    """One line that any format can hold: no control characters, the middle of long names left out."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= width else f"{text[: width // 2]}…{text[-(width // 2 - 1) :]}"


def to_text(graph: Graph) -> str:
    about = _clip(graph.about, 160)
    if not graph.nodes:
        return about
    box_of, members = _fold(graph, LIMIT)
    sources: list[list[str]] = [[] for _ in members]
    for edge in graph.edges:
        if box_of[edge.source] != box_of[edge.target]:
            source = members[box_of[edge.source]][-1].id
            sources[box_of[edge.target]].append(f"{source}.{edge.input_nr}" if edge.input_nr else str(source))
    rows = [("#", "node", "result", "from", "saved for backward")]
    for group, above in zip(members, sources):
        node, box = group[0], _box(group[0])
        origin = (
            ", ".join(dict.fromkeys(above)) if len(above) < 9 else f"{', '.join(above[:6])} … ({_number(len(above))})"
        )
        if len(group) > 1:
            kinds = ", ".join(text for text, _ in _fold_box(group).lines[1:])
            rows.append((f"…{group[-1].id}", f"… {_number(len(group))} nodes", "", origin, kinds))
            continue
        title = {"leaf": "leaf", "output": "the tensor", "numpy": "NumPy array"}.get(node.kind, box.lines[0][0])
        result = f"{node.dtype} {shape_text(node.shape)}" + (f", {node.outputs} results" if node.outputs > 1 else "")
        result = f"{_clip(node.variable)}: {result}" if node.variable else result
        notes = [(f"{text} *" if role == "shares" else text) for text, role in box.lines[2:]] or [""]
        if node.kind == "numpy":
            rows.append(("", f"- - - {CUT}: no gradient comes back - - -", "", "", ""))
        rows.append((str(node.id), title, result, origin, notes[0].removeprefix("saved ")))
        rows += [("", "", "", "", note.removeprefix("saved ")) for note in notes[1:]]
    widths = [max(len(row[i]) for row in rows if not row[1].startswith("- - -")) for i in range(4)]
    table = []
    for number, *rest in rows:
        cells = (cell.ljust(width) for cell, width in zip(rest, widths[1:]))
        table.append("  ".join((number.rjust(widths[0]), *cells, rest[-1])).rstrip())
    foot = [f"* {SHARES}"] if any(row[4].endswith(" *") for row in rows) else []
    return "\n".join([about, *table, *foot])


def to_svg(graph: Graph) -> str:
    boxes, links, note = sketch(graph)
    captions = ["Values flow down the arrows, gradients flow back up.", note] if graph.nodes else []
    if any(role == "shares" for box in boxes if box.kind != "numpy" for _, role in box.lines):
        captions.append(f"● {SHARES}")
    return draw(boxes, links, _title(graph), captions, [CUT, "no gradient comes back"])


def to_mermaid(graph: Graph) -> str:
    boxes, links, note = sketch(graph)
    lines = ["---", f"title: {json.dumps(_title(graph) + (f'. {note}' if note else ''))}", "---", "flowchart TD"]
    for kind, (fill, border) in COLOURS.items():
        lines.append(f"  classDef {kind} fill:{fill},stroke:{border},color:{INK}")
    for number, box in enumerate(boxes):
        label = "<br/>".join(_mermaid(text) for text, _ in box.lines)
        lines.append(f'  n{number}["{label}"]:::{box.kind}')
    for number, link in enumerate(links):
        arrow = f'-. "{CUT}" .->' if link.cut else f'-- "result {link.input_nr}" -->' if link.input_nr else "-->"
        lines.append(f"  n{link.source} {arrow} n{link.target}")
        if link.cut:
            lines.append(f"  linkStyle {number} stroke:{RED}")
    return "\n".join(lines) + "\n"


def _mermaid(text: str) -> str:
    special = {"#": "#35;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "&": "#amp;", "`": "#96;"}
    special["\\"] = "#92;#8203;"  # with a space of no width, or mermaid reads a backslash before n as a new line
    return "".join(special.get(c, c) for c in text)


def to_dot(graph: Graph) -> str:
    boxes, links, note = sketch(graph)
    lines = [
        "digraph autograd {",
        f'  graph [label={_dot(_title(graph), note)} labelloc=t bgcolor="white" fontname="monospace" fontsize=12]',
        '  node [shape=box style="rounded,filled" fontname="monospace" fontsize=11]',
        '  edge [color="#6e7781" fontname="monospace" fontsize=10]',
    ]
    for number, box in enumerate(boxes):
        fill, border = COLOURS[box.kind]
        lines.append(
            f'  n{number} [label={_dot(*(text for text, _ in box.lines))} fillcolor="{fill}" color="{border}"]'
        )
    for link in links:
        cut = f' [label={_dot(CUT)} style=dashed color="{RED}" fontcolor="{RED}"]' if link.cut else ""
        nr = f" [label={_dot(f'result {link.input_nr}')}]" if link.input_nr else ""
        lines.append(f"  n{link.source} -> n{link.target}{cut or nr}")
    return "\n".join([*lines, "}"]) + "\n"


def _dot(*texts: str) -> str:
    return '"' + "\\n".join(text.replace("\\", "\\\\").replace('"', '\\"') for text in texts if text) + '"'
