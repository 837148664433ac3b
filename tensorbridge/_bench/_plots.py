"""Plots of a run, as SVG and PNG: cost against size, ratio to the line by hand, copies that change layout or dtype."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from tensorbridge._bench._measure import spread
from tensorbridge._bench._report import duration
from tensorbridge._bench._results import Result, Run, compared
from tensorbridge._bench._rows import bytes_name

# Okabe and Ito: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#888888"


def missing() -> str:
    """Why no plot can be drawn; empty if they can."""
    return "" if find_spec("matplotlib") else "matplotlib is not installed (pip install matplotlib)"


def draw(run: Run, out: Path) -> list[str]:
    """Draw what the run has figures for; returns the names of the files, without their endings."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    style: Any = {
        "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11,
        "svg.hashsalt": "tensorbridge", "svg.fonttype": "none", "figure.dpi": 110, "legend.frameon": False,
    }  # fmt: skip
    drawn = []
    with plt.rc_context(style):
        for name, make in PLOTS.items():
            figure = make(run, plt)
            if figure is None:
                continue
            for ending, facts in (("svg", {"Date": None}), ("png", {})):
                figure.savefig(out / f"{name}.{ending}", bbox_inches="tight", metadata=facts)
            plt.close(figure)
            drawn.append(name)
    return drawn


def _timed(run: Run, question: str) -> list[Result]:
    return [r for r in run.results if r.question == question and not r.missing]


# -- Cost against size

LINES = {
    "copy by hand": (VERMILION, "--", "copy by hand"),
    "copy": (BLUE, "-", "copy, fresh memory"),
    "copy, dropped": (PURPLE, "-", "copy, result dropped"),
    "copy into out": (GREEN, "-", "copy into out="),
    "share": (ORANGE, "-", "share"),
}


def _sizes(question: str) -> Callable[[Run, Any], Any]:
    def make(run: Run, plt: Any) -> Any:
        rows = _timed(run, question)
        directions = list(dict.fromkeys(r.title.rpartition(", ")[0] for r in rows))
        if not directions:
            return None
        columns = min(2, len(directions))
        lines = -(-len(directions) // columns)
        shape = {"figsize": (5.4 * columns, 4.3 * lines), "sharey": True, "squeeze": False, "layout": "constrained"}
        figure, axes = plt.subplots(lines, columns, **shape)
        for ax, direction in zip(axes.flat, directions):
            _one_direction(ax, [r for r in rows if r.title.startswith(direction + ", ")])
            ax.set_title(direction)
        for ax in axes.flat[len(directions) :]:
            ax.remove()
        for ax in axes[:, 0]:
            ax.set_ylabel("time of one call")
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.suptitle(
            f"Copy against share: the cost of one conversion over the size of the array\n{_where(run)}", fontsize=11
        )
        return figure

    return make


def _one_direction(ax: Any, rows: list[Result]) -> None:
    for name, (colour, dash, label) in LINES.items():
        points = [(r.nbytes, t) for r in rows for t in r.timings if t.way.name == name]
        if not points:
            continue
        sizes = [n for n, _ in points]
        ax.plot(sizes, [median(t.ns) for _, t in points], dash, color=colour, label=label, marker="o", ms=3.5, lw=1.6)
        low, high = zip(*(spread(t.ns) for _, t in points), strict=True)
        ax.fill_between(sizes, low, high, color=colour, alpha=0.15, lw=0)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks([64 * 16**i for i in range(7) if 64 * 16**i <= 1.1 * max(r.nbytes for r in rows)])
    ax.xaxis.set_major_formatter(lambda x, _: bytes_name(x))
    ax.yaxis.set_major_formatter(lambda y, _: duration(y).replace(".00", "").replace(".0", ""))
    ax.set_xlabel("size of the array")
    ax.grid(alpha=0.25, which="major")
    ax.minorticks_off()


def _where(run: Run) -> str:
    gpu = run.machine.get("GPU", "")
    names = [run.machine["CPU"], f"torch {run.machine['torch']}", f"NumPy {run.machine['NumPy']}"]
    return ", ".join(names if gpu.startswith("no") or not gpu else [gpu, *names[1:]])


# -- Ratio to the line by hand

BY_HAND = {
    "A1": ("by hand", "to_numpy, shared: over t.detach().cpu().numpy()"),
    "A2": ("torch.as_tensor", "to_torch, shared: over torch.as_tensor(a)"),
    "A3": ("their function", "shared: over another library's converter"),
    "B1": ("torch.tensor", "large copy: over torch.tensor(a)"),
    "B2": ("NumPy", "other layout or dtype: over NumPy's copy"),
    "B3": ("torch.tensor, leaf by leaf", "tree of 1000 arrays, copied: over torch.tensor(v) for each"),
    "C2": ("by hand", "device to host: over x.cpu().numpy()"),
    "C3": ("by hand", 'host to device: over torch.from_numpy(a).to("cuda")'),
    "C4": ("one call a leaf", "tree across the bus: over one call a leaf"),
    "C5": ("by hand", "torch and CuPy: over from_dlpack"),
}


def _ratios(run: Run, plt: Any) -> Any:
    groups: list[tuple[str, list[tuple[str, tuple[float, float, float]]]]] = []
    for question, (by_hand, title) in BY_HAND.items():
        rows = [r for r in _timed(run, question) if any(t.way.name == by_hand for t in r.timings)]
        if question == "B2":
            largest = max((r.nbytes for r in rows), default=0)
            rows = [r for r in rows if r.nbytes > largest / 4]
        if rows:
            groups.append((f"{question}  {title}", [(r.title, _ratio(r, by_hand)) for r in rows]))
    if not groups:
        return None
    count = sum(len(points) + 1.6 for _, points in groups)
    figure, ax = plt.subplots(figsize=(8.6, 0.21 * count + 1.3), layout="constrained")
    y, ticks, labels = 0.0, [], []
    for title, points in groups:
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        place = {"transform": ax.get_yaxis_transform(), "va": "center", "zorder": 3, "bbox": paper}
        ax.text(0.0, y, title, fontweight="bold", fontsize=9, **place)
        for label, (value, low, high) in points:
            y -= 1
            colour = BLUE if value <= 1 else VERMILION
            ax.plot([low, high], [y, y], color=colour, lw=2.4, alpha=0.35, solid_capstyle="butt")
            ax.plot(value, y, "o", color=colour, ms=5)
            ticks.append(y)
            labels.append(label)
        y -= 1.6
    ax.axvline(1, color="black", lw=0.9)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}x" if x >= 1 else f"1/{1 / x:g}")
    ax.set_yticks(ticks, labels, fontsize=8.5)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(y + 0.9, 0.9)
    ax.grid(axis="x", alpha=0.25)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("time of tensorbridge / time of the other line   (left of 1x: tensorbridge is faster)")
    figure.suptitle(f"Ratio to the line by hand\n{_where(run)}", fontsize=11)
    return figure


def _ratio(result: Result, by_hand: str) -> tuple[float, float, float]:
    ratios = compared("cost", result.ours()[0], result.timing(by_hand))
    return median(ratios), *spread(ratios)


# -- Copies that change layout or dtype


def _changes(run: Run, plt: Any) -> Any:
    rows = _timed(run, "B2")
    largest = max((r.nbytes for r in rows), default=0)
    rows = [r for r in rows if r.nbytes > largest / 4][::-1]
    if not rows:
        return None
    figure, ax = plt.subplots(figsize=(8.6, 0.5 * len(rows) + 1.5), layout="constrained")
    for offset, name, colour in ((0.27, "tensorbridge", BLUE), (0, "torch", ORANGE), (-0.27, "NumPy", GREY)):
        rates = [r.nbytes / median(r.timing(name).ns) for r in rows]
        ax.barh([i + offset for i in range(len(rows))], rates, height=0.25, color=colour, label=name)
    limits = [r.nbytes / median(r.timing("memcpy").ns) for r in rows]
    ax.plot(limits, range(len(rows)), "|", color="black", ms=17, mew=1.6, label="memcpy of as many bytes")
    ax.set_yticks(range(len(rows)), [r.title.rpartition(", ")[0] for r in rows])
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("GB of the source per second")
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.grid(axis="x", alpha=0.25)
    ax.set_axisbelow(True)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"Copies of {bytes_name(largest)} that change layout or dtype\n{_where(run)}", fontsize=11)
    return figure


PLOTS: dict[str, Callable[[Run, Any], Any]] = {
    "cost-against-size": _sizes("sizes"),
    "cost-against-size-cuda": _sizes("sizes-cuda"),
    "ratio-to-the-line-by-hand": _ratios,
    "layout-and-dtype": _changes,
}
