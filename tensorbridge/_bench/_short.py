"""A run in a dozen lines: what people convert, beside the lines that they write for it today."""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

from tensorbridge._bench._report import duration
from tensorbridge._bench._results import Result, Run, compared


class Line(NamedTuple):
    """`{}` in the words stands for the size that was measured."""

    words: str
    key: str  # of the row
    written: str  # the way that most people write
    fastest: str = ""  # that of one who knows all


HEADLINE = (
    Line("tensor to NumPy, shared", "A1 · float32 (16,)", "by hand", "limit"),
    Line("tensor that requires grad to NumPy, shared", "A1 · float32 (16,), requires grad", "by hand", "limit"),
    Line("array to torch, shared", "A2 · float32 (16,)", "torch.as_tensor", "torch.from_numpy"),
    Line("{} to torch, copied", "B1 · to_torch(a, copy=True), 64 MiB", "torch.tensor", "NumPy's copy"),
    Line("{} float32 to float16", "B2 · float32 to float16, 64 MiB", "NumPy", "torch"),
    Line("{} transposed into `out=`", "B2 · float32 transposed, to torch, 64 MiB", "NumPy", "torch"),
    Line(
        "dict of 1000 arrays, copied",
        "B3 · flat dict, copied to torch",
        "torch.tensor, leaf by leaf",
        "from_numpy of a copy, leaf by leaf",
    ),
    Line(
        "dict of 5 arrays, shared",
        "B3 · dict of 5 arrays, shared with torch",
        "torch's default_convert",
        "from_numpy, leaf by leaf",
    ),
    Line(
        "64 samples of (3, 32, 32) and a label, collated",
        "B3 · 64 samples of (3, 32, 32) and a label, collated",
        "torch's default_collate",
    ),
)
OF_CUDA = (
    Line("{} of a device to NumPy", "C2 · 256 MiB", "by hand"),
    Line("{} of NumPy's to a device", "C3 · 256 MiB", "by hand"),
    Line("tree of 1000 arrays to a device", "C4 · host to device", "one call a leaf"),
    Line("tensor to CuPy, shared", "C5 · torch to CuPy, one stream", "by hand"),
    Line("CuPy array to torch, shared", "C5 · CuPy to torch, one stream", "by hand"),
)


def short(run: Run) -> str:
    """What was measured of these, each beside the line by hand; empty if nothing of them was."""
    lines = []
    for words, key, written, fastest in HEADLINE + OF_CUDA:
        row = _measured(run, key)
        if row is None:
            continue
        ours, theirs = row.timing("tensorbridge"), row.timing(written or fastest)
        times = duration(median(ours.ns)), duration(median(theirs.ns))
        ratio = f"{median(compared('cost', ours, theirs)):.2f}x"
        lines.append((words.format(_size(row)).replace("`", ""), *times, ratio, theirs.way.code))
    if not lines:
        return ""
    lines.insert(0, ("", "tensorbridge", "by hand", "ours / by hand", "the line by hand"))
    first, *widths = [max(len(line[i]) for line in lines) for i in range(4)]
    rows = [[line[0].ljust(first), *map(str.rjust, line[1:4], widths), line[4]] for line in lines]
    return "\n".join(map("  ".join, rows))


def _measured(run: Run, key: str) -> Result | None:
    """The row, or in a quick run the largest of the same name."""
    name, comma, size = key.rpartition(", ")
    known = [r for r in run.results if not r.missing]
    alike = [r for r in known if comma and size.endswith("MiB") and r.key.rpartition(", ")[0] == name]
    exact = [r for r in known if r.key == key]
    return max(exact or alike, key=lambda r: r.nbytes, default=None)


def _size(row: Result) -> str:
    return row.key.replace(" · ", ", ").rpartition(", ")[2]
