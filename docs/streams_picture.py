"""Draw docs/streams.svg: two loans of device memory over time, and what would go wrong without the bridge.

python docs/streams_picture.py            writes the file beside this script
python docs/streams_picture.py -          prints it
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

WIDTH, LANE, LEFT = 980, 44, 150
INK, GREY, RED = "#1b1f24", "#6b7280", "#b42318"
FILL = {"torch": "#fde2d3", "cupy": "#d8e9d2", "held": "#d5e3f5", "free": "#ffffff", "danger": "#fbd5d5"}


class Bar(NamedTuple):
    lane: int
    start: int
    stop: int
    text: str
    fill: str
    dashed: bool = False


class Arrow(NamedTuple):
    """From the end of work on one lane to the start of work on another."""

    x: int
    lane: int
    to_x: int
    to_lane: int
    text: str


class Scene(NamedTuple):
    title: str
    lanes: tuple[str, ...]
    calls: tuple[tuple[int, str], ...]  # on the first lane, the host: when, what
    bars: tuple[Bar, ...]
    arrows: tuple[Arrow, ...]
    note: str


SCENES = (
    Scene(
        "torch's memory, used by CuPy",
        ("host", "torch's stream", "CuPy's stream", "the block"),
        ((170, "c = to_cupy(t)"), (330, "f(c)"), (420, "del c, t"), (560, "u = torch.empty(...)")),
        (
            Bar(1, 150, 330, "t is written", "torch"),
            Bar(1, 600, 780, "u is written", "torch"),
            Bar(2, 390, 720, "f reads t's memory", "cupy"),
            Bar(3, 150, 420, "t", "torch"),
            Bar(3, 420, 720, "held: recorded on CuPy's stream", "held"),
            Bar(3, 720, 960, "free", "free", True),
        ),
        (
            Arrow(330, 1, 390, 2, "order: CuPy's stream waits for an event"),
            Arrow(720, 2, 720, 3, "torch's event has passed"),
        ),
        "By hand, nothing holds the block after `del c, t`: u gets it at once, and f reads u's values.",
    ),
    Scene(
        "CuPy's memory, used by torch",
        ("host", "CuPy's stream", "torch's stream", "the block"),
        (
            (170, "t = to_torch(c)"),
            (330, "g(t)"),
            (420, "del t, c"),
            (560, "d = cupy.empty(...)"),
            (790, "any crossing"),
        ),
        (
            Bar(1, 150, 330, "c is written", "cupy"),
            Bar(1, 600, 780, "d is written", "cupy"),
            Bar(2, 390, 720, "g reads c's memory", "torch"),
            Bar(3, 150, 420, "c", "cupy"),
            Bar(3, 420, 790, "held by the lease, event behind g", "held"),
            Bar(3, 790, 960, "back in CuPy's pool", "free", True),
        ),
        (
            Arrow(330, 1, 390, 2, "order: torch's stream waits for an event"),
            Arrow(720, 2, 720, 3, "the event has passed"),
        ),
        "By hand, CuPy's pool gives the block to d at once. The lease looks at its event at the next crossing.",
    ),
)


def text(
    x: float, y: float, words: str, *, size: int = 13, fill: str = INK, anchor: str = "start", weight: str = ""
) -> str:
    bold = f' font-weight="{weight}"' if weight else ""
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{bold}>{words}</text>'


def scene(this: Scene, top: int) -> tuple[list[str], int]:
    """The lines of one scene, and where the next one may begin."""
    lane_y = [top + 40 + LANE * i for i in range(len(this.lanes))]
    out = [text(20, top + 18, this.title, size=16, weight="600")]
    for y, name in zip(lane_y, this.lanes):
        out.append(text(20, y + 21, name, fill=GREY))
        out.append(f'<line x1="{LEFT}" y1="{y + 32}" x2="{WIDTH - 20}" y2="{y + 32}" stroke="#e5e7eb"/>')
    for x, words in this.calls:
        out.append(f'<circle cx="{x}" cy="{lane_y[0] + 26}" r="3" fill="{INK}"/>')
        out.append(text(x + 7, lane_y[0] + 21, words, size=12))
    for bar in this.bars:
        dash = ' stroke-dasharray="4 3"' if bar.dashed else ""
        y = lane_y[bar.lane] + 4
        out.append(
            f'<rect x="{bar.start}" y="{y}" width="{bar.stop - bar.start}" height="26" rx="4" fill="{FILL[bar.fill]}" '
            f'stroke="{GREY}"{dash}/>'
        )
        out.append(text((bar.start + bar.stop) / 2, y + 17, bar.text, size=12, anchor="middle"))
    for arrow in this.arrows:
        start, end = lane_y[arrow.lane] + 30, lane_y[arrow.to_lane] + 4
        out.append(
            f'<path d="M{arrow.x} {start - 4} L{arrow.to_x} {end - 1}" stroke="{INK}" stroke-width="1.5" fill="none" '
            'marker-end="url(#head)"/>'
        )
        out.append(text(arrow.to_x + 8, end - 6, arrow.text, size=11, fill=GREY))
    bottom = lane_y[-1] + LANE + 14
    out.append(text(20, bottom, this.note, size=13, fill=RED))
    return out, bottom + 34


def picture() -> str:
    top, body = 16, []
    for this in SCENES:
        lines, top = scene(this, top)
        body += lines
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" role="img" '
        'font-family="system-ui, sans-serif">'
    )
    about = "<title>How memory is ordered and kept when it is lent across CUDA streams; time runs to the right</title>"
    marker = (
        '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        f'<path d="M0 0 L7 3 L0 6 z" fill="{INK}"/></marker></defs>'
    )
    ground = f'<rect width="{WIDTH}" height="{top}" fill="#ffffff"/>'
    return "\n".join([head, about, marker, ground, *body, "</svg>"]) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["-"]:
        sys.stdout.write(picture())
    else:
        Path(__file__).with_name("streams.svg").write_text(picture(), encoding="utf-8")
