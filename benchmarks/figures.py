"""Writes the figures of docs/cost.md and README.md, so that none of them is from memory.

    python benchmarks/figures.py            after new results are in benchmarks/results/
    python benchmarks/figures.py --check    say which figures are not those of the results

A figure in a page stands between two comments, of which the first says where it comes from:

    <!-- time: A1 · float32 (16,) | tensorbridge -->0.80 µs<!-- end -->
    <!-- slow: row | way -->1.2 ms<!-- end -->                the slow end of the range of the rounds
    <!-- rate: B1 · to_torch(a, out=w), 64 MiB | memcpy -->12 GB/s<!-- end -->
    <!-- ratio: row | slower way | faster way -->3.1<!-- end -->
    <!-- fact: CPU -->...<!-- end -->
    <!-- table: headline -->...<!-- end -->
    <!-- rate@amd-epyc-2-cores: ... -->...<!-- end -->     of another machine in benchmarks/results/
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

from tensorbridge._bench._measure import Timing, spread
from tensorbridge._bench._report import duration, goals_table, table
from tensorbridge._bench._results import Result, Run, compared, load
from tensorbridge._bench._short import HEADLINE

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MACHINE = "intel-xeon-2-cores"
PAGES = (ROOT / "docs" / "cost.md", ROOT / "README.md")
MARK = re.compile(r"(<!-- (time|slow|rate|ratio|fact|table)(?:@([\w-]+))?: (.*?) -->)(.*?)(<!-- end -->)", re.DOTALL)


def result(run: Run, key: str) -> Result:
    for found in run.results:
        if found.key == key:
            if found.missing:
                raise LookupError(f"{key}: {found.missing}")
            return found
    raise LookupError(f"no row {key!r} in the results")


def timing(run: Run, key: str, way: str) -> Timing:
    for found in result(run, key).timings:
        if found.way.name == way:
            return found
    raise LookupError(f"row {key!r} has no way {way!r}")


def _time(run: Run, key: str, way: str) -> str:
    return duration(median(timing(run, key, way).ns))


def _slow(run: Run, key: str, way: str) -> str:
    return duration(spread(timing(run, key, way).ns)[1])


def _rate(run: Run, key: str, way: str) -> str:
    return f"{result(run, key).nbytes / median(timing(run, key, way).ns):.2g} GB/s"


def _ratio(run: Run, key: str, slower: str, faster: str) -> str:
    value = median(compared("cost", timing(run, key, slower), timing(run, key, faster)))
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _fact(run: Run, name: str) -> str:
    return str(run.machine[name])


def _table(run: Run, name: str) -> str:
    return "\n\n" + TABLES[name](run) + "\n\n"


def headline(run: Run) -> str:
    lines = []
    for words, key, written, fastest in HEADLINE:
        ours = timing(run, key, "tensorbridge")
        line = [words.format(key.rpartition(", ")[2]), duration(median(ours.ns))]
        for way in (written, fastest):
            other = timing(run, key, way) if way else None
            ratio = f"{median(compared('cost', ours, other)):.2f}x" if other else ""
            line += [f"`{other.way.code}`" if other else "", ratio]
        lines.append(line)
    return table(
        ("", "tensorbridge", "the line people write", "ours / this line", "the fastest by hand", "ours / this line"),
        lines,
    )


def over_sizes(run: Run) -> str:
    """Share against copy, from NumPy to torch."""
    ways = ("share", "copy", "copy into out", "copy by hand")
    rows = [r for r in run.results if r.key.startswith("sizes · NumPy to torch, ") and not r.missing]
    lines = [(r.title.rpartition(", ")[2], *(duration(median(r.timing(way).ns)) for way in ways)) for r in rows]
    head = ("size", "share", "copy, fresh memory", "copy into `out=`", "`torch.tensor(a)`")
    return table(head, lines)


def promises(run: Run) -> str:
    """What is asked of a tensor in a graph before it is shared."""
    rows = [r for r in run.results if r.key.startswith("promises · to_numpy, in a graph: ") and not r.missing]
    lines = []
    for r in rows:
        why, _, code = r.title.partition(": ")[2].rpartition(", ")
        lines.append((why, code, duration(median(r.timings[0].ns))))
    return table(("", "the line", "alone"), lines)


TABLES: dict[str, Callable[[Run], str]] = {
    "headline": headline,
    "sizes": over_sizes,
    "goals": goals_table,
    "promises": promises,
}
KINDS: dict[str, Callable[..., str]] = {
    "time": _time,
    "slow": _slow,
    "rate": _rate,
    "ratio": _ratio,
    "fact": _fact,
    "table": _table,
}


def results_of(machine: str) -> Run:
    return load(RESULTS / machine / "results.json")


def filled(text: str, run: Run) -> str:
    """The page with every figure as the results have it. Raises LookupError for one that they do not have."""

    def fill(match: re.Match[str]) -> str:
        opening, kind, machine, arguments, _, closing = match.groups()
        chosen = results_of(machine) if machine else run
        return opening + KINDS[kind](chosen, *(part.strip() for part in re.split(r"\s\\?\|\s", arguments))) + closing

    return MARK.sub(fill, text)


def main(check: bool) -> int:
    run = results_of(MACHINE)
    stale = []
    for page in PAGES:
        if not page.exists():
            continue
        before = page.read_text(encoding="utf-8")
        after = filled(before, run)
        if after != before:
            stale.append(page.name)
            if not check:
                page.write_text(after, encoding="utf-8")
    said = ("not those of the results: " if check else "written: ") + ", ".join(stale) if stale else "all as measured"
    print(said)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
